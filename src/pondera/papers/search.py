"""Offline search over the catalogue: a question in plain words in, the papers most likely to answer it out.

The score is BM25F (Robertson and Zaragoza, 2009) over the fields of a paper. A word of the question also counts, at a
discount, where a paper has a synonym of it or, when no paper has the word at all, something spelt alike.
"""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from pondera.errors import BadInput

if TYPE_CHECKING:
    from pondera.papers import Paper

# Weight of each field, and the share B of a field's length that discounts it.
FIELDS = {
    "title": 2.0,
    "key": 2.0,
    "summary": 1.0,
    "use": 1.5,
    "words": 2.0,
    "symptoms": 2.0,
    "room": 0.5,
    "objects": 0.5,
}
B = 0.6
K1 = 1.2  # saturation: how soon a repeated word stops adding
SYNONYM = 0.5  # weight of a synonym beside the word itself
ALIKE = 0.65  # least spelling similarity that counts
# lifts a paper asked for by its key above all others; by title, arXiv number or object, half of it, by a phrase a quarter
EXACT = 1000.0
NEARLY = 0.8  # least spelling similarity of a whole query and a key that lifts the paper, by a tenth of EXACT

STOP = """a about after all also am an and any are as at be been before being between both but by can could did do does
    doing done each else even ever every for from get gets getting give got had has have having he her here how i if in
    into is it its itself just let like made make makes me more most much my myself need needs no not nothing of on one
    only or other our out over own please same she should so some such than that the their them then there these they
    this those through to too under until up us use used using very want was way we were what when where which while
    who whom whose why will with within without would you your"""
# Each line is a group of words that people in the field put for each other.
SYNONYMS = """
net network model nn
start begin initialise initialize initial init
untrained random initial
shrink compress smaller prune lightweight
prune sparse remove drop
bit quantize precision
rate step stepsize
photo picture image
customise customize personalise personalize
finetune adapt
average merge combine fuse soup
optimiser optimizer
memory footprint
cheap efficient fast
big large huge
language llm
rotate orthogonal
permute relabel reorder
weight parameter
parameter hyperparameter
derivative gradient
wide width
deep depth
teacher distill
forget continual
pde differential
symmetry equivariant
adversarial robust certify
causal treatment
graph gnn
nan inf overflow underflow
diverge explode unstable spike
vanish fade die
slow crawl hours long speed fast
expensive costly cheap cost budget
memory ram vram gpu store storage fit
forget retain lose
plateau flat stuck stall
worse degrade drop collapse poor bad ruin
rare minority imbalance scarce few
label annotation
distance dissimilarity metric
outlier corrupt wrong gross
shift drift deployment production
reconstruct recover tomography inverse
audio sound speech
detail texture fine frequency
stream online incremental
row sample example point
forecast predict extrapolate
integer bit
repeat reproducible seed deterministic
phone device mobile embedded
lora adapter
simulation simulator physics
prove provable certify guarantee certificate
treatment confounder effect
group user subgroup
calibrate confidence
tune search
schedule warmup
purchase buy
text corpus document
"""

_WORD = re.compile(r"[^\W_]+(?:[-'’_./][^\W_]+)*")
_PART = re.compile(r"[^\W_]+")
_STOP = frozenset(STOP.split())
_IRREGULAR = {"matrices": "matrix", "indices": "index"}
_ENDINGS = frozenset(
    """ization isation ations ation izing ising ating ative ator ized ised izer iser ated ment ness able ity ize ise ate
    ion ive ing ed er or ly""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Hit:
    """A paper found and its score, a number without unit that compares papers within one search; higher is better."""

    paper: "Paper"
    score: float


def _stem(word: str) -> str:
    """The word without plural and without one ending, at least three letters left; its last e, y or double goes too."""
    if word in _IRREGULAR or len(word) < 4:
        return _IRREGULAR.get(word, word)
    if word.endswith("ies"):
        word = word[:-3] + "y"
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is", "as")):
        word = word[:-1]
    for n in range(min(7, len(word) - 3), 1, -1):
        if word[-n:] in _ENDINGS:
            word = word[:-n]
            break
    if len(word) > 3 and (word[-1] in "ey" or (word[-1] == word[-2] and word[-1] not in "aeioulsz")):
        word = word[:-1]
    return word


def _fold(text: str) -> str:
    """Lower case without accents."""
    if text.isascii():
        return text.lower()
    return "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))


def squash(text: str) -> str:
    """Letters and digits only, so that hyphens, blanks and underscores make no difference."""
    return "".join(_PART.findall(_fold(text)))


@lru_cache(maxsize=65536)
def _word_terms(word: str) -> tuple[str, ...]:
    """Stems of the parts of a word, stop words left out, and of the parts joined where hyphens or dots part them."""
    if word.isalnum():
        return () if word in _STOP else (_stem(word),)
    parts = _PART.findall(word)
    return tuple(_stem(part) for part in (*parts, "".join(parts)) if part not in _STOP)


def _terms(text: str) -> list[str]:
    """Stems of a text in order."""
    return [term for word in _WORD.findall(_fold(text)) for term in _word_terms(word)]


def _grams(word: str) -> frozenset[str]:
    """Letters and pairs of letters, the ends of the word marked."""
    marked = f"^{word}$"
    return frozenset(word) | {a + b for a, b in pairwise(marked)}


def _dice(a: frozenset[str], b: frozenset[str]) -> float:
    """Spelling similarity of two words by their `_grams`, in [0, 1]."""
    return 2 * len(a & b) / (len(a) + len(b))


def _synonyms() -> dict[str, dict[str, float]]:
    groups: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for line in SYNONYMS.strip().splitlines():
        stems = {_stem(word) for word in line.split()}
        for stem in stems:
            groups[stem] |= dict.fromkeys(stems - {stem}, SYNONYM)
    return dict(groups)


_ALSO = _synonyms()


class _Index:
    """BM25F score of every term in every paper; a row holds a paper's texts in the order of FIELDS."""

    def __init__(self, rows: Sequence[tuple[str, ...]]) -> None:
        terms = [[_terms(text) for text in row] for row in rows]
        mean = [max(sum(map(len, field)) / len(rows), 1.0) for field in zip(*terms)]  # length of each field
        tf: defaultdict[str, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        for paper, row in enumerate(terms):
            for text, weight, m in zip(row, FIELDS.values(), mean):
                share = weight / (1 - B + B * len(text) / m)
                for term in text:
                    tf[term][paper] += share
        self.papers = len(rows)
        self.score = {term: self._weighed(papers) for term, papers in tf.items()}  # term -> paper -> score

    def _weighed(self, tf: dict[int, float]) -> dict[int, float]:
        idf = math.log1p((self.papers - len(tf) + 0.5) / (len(tf) + 0.5))
        return {paper: idf * x * (K1 + 1) / (K1 + x) for paper, x in tf.items()}

    @cached_property
    def grams(self) -> dict[str, frozenset[str]]:
        return {term: _grams(term) for term in self.score if len(term) > 3}

    def alike(self, term: str) -> dict[str, float]:
        """The three indexed terms spelt most like `term`, each with its Dice similarity in (0, 1]."""
        mine = _grams(term)
        near = [(-dice, other) for other, theirs in self.grams.items() if (dice := _dice(mine, theirs)) >= ALIKE]
        return {other: -minus for minus, other in sorted(near)[:3]}

    def match(self, term: str) -> dict[int, float]:
        """Score of one term of a question by paper: the best of itself, its synonyms and what is spelt like it."""
        found = {term: 1.0} | _ALSO.get(term, {})
        if not found.keys() & self.score.keys() and len(term) > 3:
            found = self.alike(term)
        best: dict[int, float] = {}
        for other, weight in found.items():
            for paper, score in self.score.get(other, {}).items():
                best[paper] = max(best.get(paper, 0.0), weight * score)
        return best

    def scores(self, terms: Iterable[str]) -> list[float]:
        """Score of a question, given by its terms, in each paper."""
        total = [0.0] * self.papers
        for term in dict.fromkeys(terms):
            for paper, score in self.match(term).items():
                total[paper] += score
        return total


@lru_cache(maxsize=4)
def _index(rows: tuple[tuple[str, ...], ...]) -> _Index:
    return _Index(rows)


def _texts(paper: "Paper") -> tuple[str, ...]:
    values = (getattr(paper, field) for field in FIELDS)
    return tuple(value if isinstance(value, str) else " ; ".join(value) for value in values)


def _lift(paper: "Paper", asked: str) -> float:
    """What a squashed query that names the paper, exactly or nearly, adds to its score."""
    key = squash(paper.key)
    if asked == key:
        return EXACT
    objects = [name for path in paper.objects for name in (path, path.rpartition(".")[2])]
    if asked in map(squash, (paper.title, paper.arxiv, *objects)):
        return EXACT / 2
    if asked in map(squash, (*paper.symptoms, *paper.words)):  # says it in the very words
        return EXACT / 4
    dice = _dice(_grams(asked), _grams(key))
    return EXACT / 10 * dice if dice >= NEARLY else 0.0


def search(query: str, papers: "Sequence[Paper]", k: int = 5) -> list[Hit]:
    """Papers that match a question in plain words, best first.

    A query that is a paper's key, title, arXiv number or object puts that paper first. Nothing leaves the machine.

    Args:
        query: A question, some words, or a name; spelling, hyphens and capitals need not be exact.
        papers: Where to look, `pondera.papers.catalogue()` for all.
        k: The most hits to return.

    Returns:
        At most `k` hits of positive score, equal scores by key; empty where no word matches.

    Raises:
        BadInput: The query holds no word, or `k` is below 1.
    """
    asked = squash(query) if isinstance(query, str) else ""
    if not asked:
        raise BadInput(f"search needs a question or some words, got {query!r}")
    if k < 1:
        raise BadInput(f"search needs to return at least one hit, got k={k}")
    if not papers:
        return []
    index = _index(tuple(map(_texts, papers)))
    terms = _terms(query)
    words = [squash(word) for word in query.split()]
    joined = [_stem(a + b) for a, b in pairwise(words)]  # "weight space" finds "weightspace"
    terms += [term for term in joined if term in index.score]
    scores = index.scores(terms)
    hits = [Hit(paper, score + _lift(paper, asked)) for paper, score in zip(papers, scores)]
    hits = [hit for hit in hits if hit.score > 0]
    return sorted(hits, key=lambda hit: (-hit.score, hit.paper.key))[:k]

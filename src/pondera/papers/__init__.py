"""The catalogue: one row for each of the 195 papers, its status, and search in plain words.

>>> from pondera.papers import paper, search
>>> paper("lsuv").arxiv
'1511.06422'
"""

import importlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pondera import _sources
from pondera.errors import BadInput, nearest
from pondera.papers.search import Hit, squash
from pondera.papers.search import search as _ranked

__all__ = ["Hit", "Paper", "catalogue", "instead", "paper", "replications", "search", "status", "to_reproduce"]

STATUSES = ("planned", "built", "tested")
OWN_ROOM = 1.5  # weight of a row of the same room, when another is looked for in its place
_ARXIV = re.compile(r"(?:.*arxiv.*[:/])?(\d{4}\.\d{4,5}|[a-z-]+/\d{7})(?:v\d+)?(?:\.pdf)?/?", re.IGNORECASE)
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Paper:
    """One row. objects: dotted paths of the public objects, empty until built. words: what a newcomer would type.
    symptoms: what one sees go wrong where the paper is of help, for the search. came_to: what its replication came to, one
    of `evidence.HEADLINES`, with the sentence to act on in `headline`."""

    key: str
    title: str
    arxiv: str
    year: int
    room: str
    summary: str
    use: str
    avoid: str
    words: tuple[str, ...]
    objects: tuple[str, ...]
    notes: str
    symptoms: tuple[str, ...] = ()
    came_to: str = ""
    headline: str = ""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    def resolve(self) -> list[Any]:
        """The public objects themselves; ImportError or AttributeError when a row names what is not there."""
        return [_resolve(path) for path in self.objects]


@lru_cache(maxsize=1)
def catalogue() -> tuple[Paper, ...]:
    """All rows, in the order of the file."""
    text = files("pondera.papers").joinpath("papers.toml").read_text(encoding="utf-8")
    return tuple(
        Paper(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
        for row in tomllib.loads(text)["paper"]
    )


def paper(name: str) -> Paper:
    """The row with this key, arXiv number, title or object; BadInput with the nearest keys when there is none.

    Capitals, hyphens and blanks make no difference, nor do the version of an arXiv number and an address around it; of a
    title the part before its colon will do.

    >>> paper("https://arxiv.org/abs/1511.06422v7").key == paper("LSUV").key == paper("all you need is a good init").key
    True
    """
    rows, asked = catalogue(), squash(name)
    number = _ARXIV.fullmatch(name.strip())
    if number:
        found = [p for p in rows if p.arxiv == number[1].lower()]
        if len(found) == 1:
            return found[0]
    for names in (_by_key, _by_title, _by_short_title, _by_object):
        found = [p for p in rows if asked and asked in names(p)]
        if len(found) == 1:
            return found[0]
        if found:
            raise BadInput(f"{name!r} is in several papers: {', '.join(p.key for p in found)}; name one of them")
    near = nearest(name, [p.key for p in rows])
    if not near and len(asked) > 3 and not number:
        hits = _ranked(name, rows, 3)
        near = f"; by its words nearest are {', '.join(hit.paper.key for hit in hits)}" if hits else ""
    raise BadInput(f"no paper has the key {name!r}{near or '; `pondera search` takes plain words'}")


def _by_key(p: Paper) -> list[str]:
    return [squash(p.key)]


def _by_title(p: Paper) -> list[str]:
    return [squash(p.title)]


def _by_short_title(p: Paper) -> list[str]:
    return [squash(p.title.partition(":")[0])]


def _by_object(p: Paper) -> list[str]:
    return [squash(name) for path in p.objects for name in (path, path.rpartition(".")[2])]


@lru_cache(maxsize=1)
def replications() -> dict[str, str]:
    """Keys of all replications with the room they are in, as their files lie; none is imported (each imports torch)."""
    folders = sorted(p for p in _PACKAGE.joinpath("replications").iterdir() if (p / "__init__.py").is_file())
    modules = [(m.stem, folder.name) for folder in folders for m in sorted(folder.glob("[!_]*.py"))]
    return {name.replace("_", "-"): room for name, room in sorted(modules)}


def to_reproduce(name: str) -> str:
    """The key of the replication that a name stands for, by key or as `paper` reads it.

    Raises: BadInput: for a paper that is planned, with what is built and near it, or when nothing has this name.
    """
    known = replications()
    if name in known:
        return name
    try:
        row = paper(name)
    except BadInput:
        near = nearest(name, known)
        raise BadInput(f"no paper or replication has the key {name!r}{near}") from None
    if row.key in known:
        return row.key
    near = ", ".join(p.key for p in instead(row))
    raise BadInput(f"{row.key} is {status(row)}, with no claim to re-run yet; built and near it are {near}")


def status(p: Paper) -> str:
    """Derived, never typed in: "planned" without objects, "built" with them, "tested" when evidence is recorded too."""
    if not p.objects:
        return "planned"
    room = replications().get(p.key)
    return "tested" if room and (_sources.evidence_folder() / room / f"{p.key}.json").is_file() else "built"


def instead(p: Paper, k: int = 3) -> list[Paper]:
    """The `k` built rows that are nearest to a row by what they are for; one of its own room counts for more.

    >>> instead(paper("lsuv"), 1)[0].key
    'activation-variance'
    """
    built = [q for q in catalogue() if q.objects and q.key != p.key]
    hits = _ranked(" ".join([p.title, p.use, *p.words]), built, len(built))
    hits.sort(key=lambda hit: -hit.score * (OWN_ROOM if hit.paper.room == p.room else 1.0))
    return [hit.paper for hit in hits[:k]]


def search(query: str, k: int = 5, papers: Sequence[Paper] | None = None) -> list[Hit]:
    """The `k` rows that fit a question in plain words best, best first; offline.

    >>> search("start a small network from a larger one")[0].paper.key
    'weight-selection'
    """
    return _ranked(query, catalogue() if papers is None else papers, k)


def _resolve(path: str) -> Any:
    parts = path.split(".")
    for at in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:at]))
        except ModuleNotFoundError as error:
            if error.name and not ".".join(parts[:at]).startswith(error.name):
                raise
            continue
        for name in parts[at:]:
            value = getattr(value, name)
        return value
    raise ImportError(f"nothing to import at {path}")

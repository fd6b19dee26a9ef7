"""Weight selection: start a small network from chosen rows and columns of a larger trained one of the same family."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, all_finite, describe, nearest, require_float

METHODS = ("uniform", "consecutive", "random")
LAYERS = ("first", "uniform")
HEAD = ("head",)  # what keeps the student's own start unless said otherwise
PACKED = {"in_proj_weight", "in_proj_bias", "qkv", "qkv_proj", "Wqkv", "c_attn"}  # query, key and value in one tensor
TABLES = {  # modules whose weight has a row for each token or position, by their usual names
    "wte", "wpe", "lm_head", "embed_tokens", "embed_positions", "embed_in", "embed_out", "tok_embeddings",
    "word_embeddings", "position_embeddings", "token_type_embeddings", "position_embedding", "token_embedding",
}  # fmt: skip


@torch.no_grad()
def select_from_(
    student: nn.Module,
    teacher: nn.Module,
    *,
    method: str = "uniform",
    layers: str = "first",
    keep: str | Iterable[str] | None = None,
    generator: Generator | None = None,
) -> nn.Module:
    r"""Start `student` from a larger trained `teacher` of the same family, in place. Then train it as you would anyway.

    Unlike the other starts this one copies the whole state: weights, biases, norms and their running statistics,
    embeddings, position codes. What `keep` names (by default the head) stays as the student has it.

    1. Layers (Sec. 3, "first-N"): a tensor of the student takes the tensor of the same name; where block indices run
       0 .. n-1 in the student and 0 .. N-1 in the teacher, block i takes block i.
    2. Elements: of a dimension with T entries in the teacher and S <= T in the student, the student takes

    .. math:: \{0, T/S, 2T/S, \dots\} \;\text{ if } S \mid T, \qquad
              \mathrm{round}\bigl(i \, (T-1)/(S-1)\bigr),\; i = 0 \dots S-1 \;\text{ otherwise}      (uniform)

    The indices depend on (T, S) only. So every tensor takes the same channels of a residual stream, and of a hidden
    layer the same units on the way in and out: this consistency is what makes the selection worth more than its scale.
    A tensor that packs query, key and value in three equal parts (`in_proj_weight`, `qkv`, `c_attn`, ...) is selected
    within each part.

    Nothing is rescaled: a matrix that takes every second input halves the variance of its output. Norm layers absorb
    that. With as many heads of the same size in both models every student head is mixed from several teacher heads, as
    in the paper. Where a linear layer reads flattened maps (channels times pixels), channels and pixels are not kept
    apart: pool first, or keep that layer.

    Args:
        student: the model to start.
        teacher: the trained model; at least as large in every dimension, as deep, with the student's names.
        method: "uniform" (above); "consecutive": the first S; "random": S of T drawn once for each pair (T, S), so that
            channels still match.
        layers: "first" (above), or "uniform": n of N layers by the rule for elements. Layers may only be left out where
            each has the shapes of one that is taken, so that a classifier at the end of a sequence is not passed over.
        keep: names, or whole parts of dotted names, that keep the student's start. None keeps parts called "head" (a
            classifier for other classes); () copies everything. A tensor tied to a selected one is selected with it.
        generator: source of the draw for "random", on any device; None takes torch's default one.
    Returns: `student`.
    Raises: BadInput: naming the tensor, if it has no counterpart in the teacher, another number of dimensions or more
        entries; if an embedding has another number of rows (tokens cannot be interpolated) or a tensor of integers
        (counters, indices) another shape; for NaN in what is selected, a name in `keep` that is none, an unknown
        method, models on the meta device. The student is then what it was.
    Paper: Xu et al. 2023, arXiv 2311.18823 (ICLR 2024). Differences: the code selects a packed query, key and value as
        one dimension, which is the same where S divides T and otherwise shifts the parts against each other; it skips
        every name that contains "head", here whole parts of the name; it would thin out embedding rows. "consecutive"
        and "random" are described by the paper and not in the code; uniform layers by the elements' rule is ours.

    >>> big, small = nn.Linear(4, 6), nn.Linear(2, 3)
    >>> small = select_from_(small, big)
    >>> torch.equal(small.weight, big.weight[::2, ::2]), torch.equal(small.bias, big.bias[::2])
    (True, True)
    """
    who = "select_from_"
    small, big = _state(student, who, "student"), _state(teacher, who, "teacher")
    tables = {
        f"{name}.weight" if name else "weight"
        for name, m in student.named_modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag))
    }
    plan = Plan(
        who, _specs(small), _specs(big), method=method, layers=layers, keep=keep, tables=tables, generator=generator
    )
    new: dict[int, tuple[Tensor, Tensor]] = {}
    for name, source in plan.sources.items():
        if source is not None and id(small[name]) not in new:  # a tied tensor once, under its first name
            value = take(big[source], plan.indices(name)).to(small[name])
            if not all_finite(value):
                raise BadInput(f"{who} found NaN or infinity in what it takes from the teacher's {source}")
            new[id(small[name])] = small[name], value
    for tensor, value in new.values():
        tensor.copy_(value)
    return student


def uniform_indices(T: int, S: int) -> Int[Tensor, "S"]:
    """S of T indices, evenly spread. In float32, as the authors' code has it: near a tie the exact value may differ."""
    if T % S == 0:
        return torch.arange(S) * (T // S)
    return torch.linspace(0, T - 1, S, dtype=torch.float32).round().long()


@dataclass(frozen=True)
class Spec:
    """What the plan must know of a tensor. number: floating-point or complex, not integers or truth values."""

    shape: tuple[int, ...]
    number: bool


class Plan:
    """Which tensor of the teacher each tensor of the student takes, and which entries of it; checked whole at once.

    sources: by the student's names; None where the student's own start is kept.
    """

    def __init__(
        self,
        who: str,
        small: Mapping[str, Spec],
        big: Mapping[str, Spec],
        *,
        method: str,
        layers: str,
        keep: str | Iterable[str] | None,
        tables: Iterable[str] = (),
        generator: Generator | None = None,
    ) -> None:
        for given, known, what in ((method, METHODS, "method"), (layers, LAYERS, "layers")):
            if given not in known:
                raise BadInput(f"{who} knows {what} {', '.join(known)}, got {given!r}{nearest(str(given), known)}")
        kept = _kept(who, small, keep)
        if len(kept) == len(small):
            raise BadInput(f"{who} has nothing to select: the student holds no tensor outside keep")
        self.small, self.big = small, big
        wanted = {name: None if name in kept else spec for name, spec in small.items()}
        matched = dict(_match(_tree(wanted, who), _tree(big, who), "", "", layers, who))
        self.sources = {name: matched.get(name) for name in small}
        for name, source in self.sources.items():
            if source is not None:
                self._check(who, name, source, set(tables))
        self._sets = self._draw(method, generator)

    def indices(self, name: str) -> list[Int[Tensor, "S"]]:
        """Which entries of its source the tensor takes, a dimension at a time."""
        return [
            torch.cat([self._sets[T, S] + part * T for part in range(parts)]) for T, S, parts in self._dimensions(name)
        ]

    def _dimensions(self, name: str) -> Iterator[tuple[int, int, int]]:
        """(T, S, parts) of every dimension of a selected tensor; T and S are those of one part."""
        source, third = self.sources[name], self._third(name)
        assert source is not None
        for T, S in zip(self.big[source].shape, self.small[name].shape):
            parts = 3 if third is not None and (3 * third[0], 3 * third[1]) == (T, S) else 1
            yield T // parts, S // parts, parts

    def _third(self, name: str) -> tuple[int, int] | None:
        """Teacher's and student's size of one of three equal parts, where a tensor packs query, key and value."""
        weight = "weight".join(name.rsplit("bias", 1))  # a bias is packed as its weight is
        source = self.sources.get(weight)
        if PACKED.isdisjoint(name.split(".")) or source is None:
            return None
        sizes = sorted(self.big[source].shape), sorted(self.small[weight].shape)
        return (sizes[0][0], sizes[1][0]) if all(len(n) == 2 and n[1] == 3 * n[0] for n in sizes) else None

    def _draw(self, method: str, generator: Generator | None) -> dict[tuple[int, int], Int[Tensor, "S"]]:
        """One index set for each pair of sizes."""
        pairs = sorted(
            {(T, S) for name, source in self.sources.items() if source for T, S, _ in self._dimensions(name)}
        )
        sets = {}
        for T, S in pairs:
            if method == "consecutive" or S in (0, T):
                sets[T, S] = torch.arange(S)
            elif method == "uniform":
                sets[T, S] = uniform_indices(T, S)
            else:
                device = generator.device if generator is not None else None
                sets[T, S] = torch.randperm(T, generator=generator, device=device)[:S].sort().values.cpu()
        return sets

    def _check(self, who: str, name: str, source: str, tables: set[str]) -> None:
        small, big = self.small[name], self.big[source]
        s, t = small.shape, big.shape
        what = f"{who} cannot select the student's {name} of shape {s} from the teacher's {source} of shape {t}"
        if small.number != big.number:
            raise BadInput(f"{what}: one holds integers, the other does not")
        if len(s) != len(t):
            raise BadInput(f"{what}: another number of dimensions")
        if not small.number and s != t:
            raise BadInput(f"{what}: counters and indices need the same shape, or a place in keep=")
        if any(S > T for S, T in zip(s, t)):
            raise BadInput(f"{what}: the teacher must be at least as large in every dimension")
        table = name in tables or (len(s) == 2 and name.split(".")[-2:-1] and name.split(".")[-2] in TABLES)
        if table and s[0] != t[0]:
            raise BadInput(
                f"{what}: its rows stand for tokens or positions and need the same number, or a place in keep="
            )


def take(x: Tensor, indices: list[Int[Tensor, "S"]]) -> Tensor:
    """x[indices[0]][:, indices[1]]... ; a view where everything is taken."""
    for d, index in enumerate(indices):
        if len(index) < x.shape[d]:
            x = x.index_select(d, index.to(x.device))
    return x


def _state(model: Any, who: str, what: str) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise BadInput(f"{who} needs an nn.Module as {what}, got {type(model).__name__}")
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    if not state:
        raise BadInput(f"{who} found no tensor in the state of the {what}, a {type(model).__name__}")
    for name, x in state.items():
        if x.is_floating_point():
            require_float(x, who, f"{what}'s {name}")
        elif x.is_meta:
            raise BadInput(f"{who} got the {what}'s {name} as a {describe(x)}, which holds no numbers")
    return state


def _specs(state: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {k: Spec(tuple(v.shape), v.is_floating_point() or v.is_complex()) for k, v in state.items()}


def _kept(who: str, names: Iterable[str], keep: str | Iterable[str] | None) -> set[str]:
    names = list(names)
    kept: set[str] = set()
    for part in HEAD if keep is None else [keep] if isinstance(keep, str) else keep:
        hit = {n for n in names if f".{part}." in f".{n}."}
        if not hit and keep is not None:
            known = {".".join(n.split(".")[:k]) for n in names for k in range(1, n.count(".") + 2)}
            raise BadInput(f"{who} found nothing called {part!r} in the student to keep{nearest(part, known)}")
        kept |= hit
    return kept


Tree = dict[str, Any]  # names split at their dots; leaves are Specs, None where the student's own start is kept


def _tree(leaves: Mapping[str, Spec | None], who: str) -> Tree:
    root: Tree = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node: Any = root
        for part in path:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise BadInput(f"{who} cannot tell apart {name} and a tensor or layer of a name that begins or ends in it")
        node[last] = leaf
    return root


def _leaves(node: Any) -> Iterator[tuple[str, Spec | None]]:
    """(relative name, leaf) of everything below a node; the name is empty for a leaf itself."""
    if not isinstance(node, dict):
        yield "", node
        return
    for key, below in node.items():
        yield from ((f"{key}.{name}" if name else key, leaf) for name, leaf in _leaves(below))


def _match(small: Tree, big: Tree, at: str, there: str, layers: str, who: str) -> Iterator[tuple[str, str]]:
    """(student's name, teacher's name) of every leaf below two nodes that start with `at` and `there`."""
    blocks = _match_blocks(small, big, there, layers, who)
    for key, mine in small.items():
        other = blocks.get(key, key)
        theirs = big.get(other)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from _match(mine, theirs, f"{at}{key}.", f"{there}{other}.", layers, who)
            continue
        for name, leaf in _leaves(mine):
            if leaf is not None:
                if name or not isinstance(theirs, Spec):
                    full = f"{at}{key}.{name}".rstrip(".")
                    raise BadInput(f"{who} found no counterpart in the teacher of the student's {full} {leaf.shape}")
                yield f"{at}{key}", f"{there}{other}"


def _match_blocks(small: Tree, big: Tree, there: str, layers: str, who: str) -> dict[str, str]:
    """The teacher's block for each numbered block of the student, where the teacher has more of them."""
    n, N = (sorted(filter(str.isdigit, node), key=int) for node in (small, big))
    if not 0 < len(n) < len(N) or all(leaf is None for i in n for _, leaf in _leaves(small[i])):
        return {}
    chosen = [N[i] for i in uniform_indices(len(N), len(n))] if layers == "uniform" else n
    taken = {tuple(_leaves(big[i])) for i in chosen if i in big}
    for i in N:
        if i not in chosen and tuple(_leaves(big[i])) not in taken:
            raise BadInput(
                f"{who} would leave out the teacher's {there}{i}, whose tensors have the names and shapes of no layer "
                f"taken beside it: these {len(N)} layers are no stack of equal ones, so give the student as many"
            )
    return dict(zip(n, chosen))

"""Labels for the axes of tensors in flight.

A label is a tree. A leaf is an axis nobody has divided; a product is an axis read as several in row-major order (a
flatten, the heads of an attention), a sum one axis after the other (a concatenation).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor


class Label:
    """An axis of `size` entries. kind: "" for a leaf, else "product" or "sum" of `parts`. to: the label it was tied to."""

    __slots__ = ("fixed", "kind", "parts", "size", "to")

    def __init__(self, size: int, fixed: bool = False, kind: str = "", parts: "Sequence[Label]" = ()) -> None:
        self.size, self.fixed, self.kind, self.parts = size, fixed, kind, list(parts)
        self.to: Label | None = None


Labels = list[Label]


def leaves(shape: Iterable[int], fixed: bool = True) -> Labels:
    return [Label(int(n), fixed) for n in shape]


def root(x: Label) -> Label:
    while x.to is not None:
        x = x.to
    return x


def fix(x: Label) -> Label:
    x = root(x)
    x.fixed = True
    for part in x.parts:
        fix(part)
    return x


def flat(x: Label, kind: str) -> Labels:
    """The factors of a product, or the terms of a sum; a label of another kind is its only one."""
    x = root(x)
    return [leaf for part in x.parts for leaf in flat(part, kind)] if x.kind == kind else [x]


def combine(parts: Iterable[Label], kind: str) -> Label:
    """The product or sum of labels; factors of one entry and terms of none drop out."""
    inner = [leaf for part in parts for leaf in flat(part, kind) if leaf.size != (kind == "product")]
    if len(inner) == 1:
        return inner[0]
    size = prod(x.size for x in inner) if kind == "product" else sum(x.size for x in inner)
    return Label(size, kind=kind, parts=inner) if inner else Label(size, fixed=True)


def split(x: Label, kind: str, first: int) -> tuple[Label, Label] | None:
    """A leaf as a product or sum whose first part has `first` entries; None where it cannot be."""
    if x.kind or first >= x.size or (kind == "product" and x.size % first):
        return None
    x.kind, rest = kind, x.size // first if kind == "product" else x.size - first
    x.parts = [Label(first, x.fixed), Label(rest, x.fixed)]
    return x.parts[0], x.parts[1]


def tie(x: Label, y: Label) -> Label:
    """Say that two axes are matched entry by entry."""
    x, y = root(x), root(y)
    if x is y or x.size != y.size:
        return x
    if x.kind and not y.kind:
        x, y = y, x
    if not x.kind:
        if x.fixed:
            fix(y)
    elif x.kind == y.kind:
        _tie_parts(flat(x, x.kind), flat(y, y.kind), x.kind)
    else:
        fix(x), fix(y)
    x.to = y
    return y


def _tie_parts(xs: Labels, ys: Labels, kind: str) -> None:
    while xs and ys:
        a, b = xs.pop(0), ys.pop(0)
        if a.size != b.size:
            if a.size < b.size:
                a, b, xs, ys = b, a, ys, xs
            halves = split(root(a), kind, b.size)
            if halves is None:
                for leaf in (a, b, *xs, *ys):
                    fix(leaf)
                return
            a = halves[0]
            xs.insert(0, halves[1])
        tie(a, b)


def ends(x: Label) -> Labels:
    x = root(x)
    return [leaf for part in x.parts for leaf in ends(part)] if x.kind else [x]


def rows_of(x: Label) -> list[Labels]:
    """A label as the spec has it: rows of factors, one row after the other. A sum inside a product stays fixed."""
    x = root(x)
    if x.kind == "sum":
        return [row for part in x.parts for row in rows_of(part)]
    if not x.kind:
        return [[x]]
    first, *rest = flat(x, "product")
    for factor in rest:
        if factor.kind:
            fix(factor)
    return [[*row, *rest] for row in rows_of(first)]


def tensors(x: Any) -> Iterable[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list, Mapping)):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from tensors(part)


class InFlight:
    """The labels of all tensors a run has met, beginning with those of its state."""

    def __init__(self, state: Iterable[Tensor]) -> None:
        # the tensors are kept with their labels, so that no new one can get the identity of an old one
        self._labels = {id(x): (x, leaves(x.shape, fixed=False)) for x in state}

    def of(self, x: Tensor) -> Labels:
        """A tensor's labels; what is not known (inputs, constants) has its order."""
        if id(x) not in self._labels:
            self._labels[id(x)] = x, leaves(x.shape)
        return [root(label) for label in self._labels[id(x)][1]]

    def put(self, x: Tensor, labels: Labels) -> None:
        self._labels[id(x)] = x, labels

    def fix(self, x: Tensor) -> None:
        for label in self.of(x):
            fix(label)

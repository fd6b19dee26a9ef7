"""Which axes of a model's tensors may be reordered together: the permutation spec, and what it does to a state."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from pondera.errors import BadInput, describe, nearest

State = Mapping[str, Tensor]
Permutations = Mapping[str, Int[Tensor, "n"]]
Factor = tuple[str | None, int]
Axis = str | None | tuple[tuple[Factor, ...], ...]
WHO = "PermutationSpec"
RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class Place:
    """One place where a permutation acts: entries start .. start + outer * n * inner of an axis of a tensor, seen as
    (outer, n, inner); n is permuted. For a whole axis outer and inner are 1 and n may be None: any size."""

    tensor: str
    axis: int
    start: int
    outer: int
    n: int | None
    inner: int


@dataclass(frozen=True)
class PermutationSpec:
    r"""For every tensor of a state dict, what permutes each of its axes.

    An entry for an axis is one of

    - ``None``: the axis keeps its order;
    - ``"p"``: the permutation named p reorders the axis;
    - a row of factors ``((name or None, size), ...)``, the outermost first: the axis is their product in row-major
      order, as after a flatten: ``(("conv", 8), (None, 49))`` is 8 channels of 49 pixels, ``(("heads", 12), (None, 64))``
      12 heads of 64;
    - a tuple of such rows: the axis is one after the other, as after a concatenation: query, key and value in one weight.

    One name is one permutation, wherever it stands: all that reads and writes a residual stream shares a name, and so do
    both axes of a recurrent weight. For the function to stay, both sides of every hidden axis must carry its name;
    `trace_permutations` finds and proves that. A name on two axes of one tensor can be applied, but not matched: its best
    permutation is no linear assignment.

    Attributes:
        axes: the entries, by the tensor's name, one for each dimension.
        carried: tensors that are permuted but do not count in a match: running statistics (by default those called
            running_mean and running_var), and second names of tied tensors.
        notes: what `trace_permutations` left fixed, and why, in words.

    Raises: BadInput: for an entry of none of these forms, a name twice in one row, factors of size below 1, a name of
        different sizes, unknown names in `carried`.

    >>> spec = PermutationSpec({"0.weight": ("h", None), "0.bias": ("h",), "2.weight": (None, "h"), "2.bias": (None,)})
    >>> [(p.tensor, p.axis) for p in spec.places["h"]]
    [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    >>> PermutationSpec.from_json(spec.to_json()) == spec
    True
    """

    axes: Mapping[str, tuple[Axis, ...]]
    carried: frozenset[str] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.axes, Mapping):
            raise BadInput(f"{WHO} needs a mapping from tensor names to entries for their axes, got {_kind(self.axes)}")
        for name, entries in self.axes.items():
            if not isinstance(name, str) or not isinstance(entries, (tuple, list)):
                raise BadInput(f"{WHO} needs a tuple of entries, one for each axis of {name!r}, got {_kind(entries)}")
        known = {name: tuple(_axis(e, name) for e in entries) for name, entries in self.axes.items()}
        object.__setattr__(self, "axes", known)
        carried = self.carried
        if carried is None:
            carried = frozenset(name for name in known if name.rpartition(".")[2] in RUNNING)
        if unknown := sorted(set(carried) - set(known)):
            raise BadInput(f"{WHO} has no tensor {unknown[0]!r} to carry{nearest(unknown[0], known)}")
        object.__setattr__(self, "carried", frozenset(carried))
        object.__setattr__(self, "notes", tuple(self.notes))
        for p, places in self.places.items():
            _check_places(p, places)

    @cached_property
    def places(self) -> dict[str, tuple[Place, ...]]:
        """The inverse map: every permutation's places, in the order of the tensors."""
        found: dict[str, list[Place]] = {}
        for tensor, entries in self.axes.items():
            for axis, entry in enumerate(entries):
                if isinstance(entry, str):
                    found.setdefault(entry, []).append(Place(tensor, axis, 0, 1, None, 1))
                elif entry is not None:
                    start = 0
                    for row in entry:
                        sizes = [n for _, n in row]
                        for i, (name, n) in enumerate(row):
                            if name is not None:
                                place = Place(tensor, axis, start, prod(sizes[:i]), n, prod(sizes[i + 1 :]))
                                found.setdefault(name, []).append(place)
                        start += prod(sizes)
        return {p: tuple(places) for p, places in found.items()}

    def sizes(self, state: State) -> dict[str, int]:
        """How many units each permutation has in a state that fits the spec.

        Raises: BadInput: naming the tensor, if the state has other names, other dimensions or sizes than the spec.
        """
        if missing := sorted(set(self.axes) - set(state)):
            raise BadInput(f"the state lacks {missing[0]}, which the spec names{nearest(missing[0], state)}")
        for name, x in state.items():
            if name not in self.axes:
                if x.ndim:
                    raise BadInput(
                        f"the spec says nothing about {name}, a {describe(x)}; give it an entry for each axis"
                    )
                continue
            if x.ndim != len(self.axes[name]):
                raise BadInput(f"the spec has {len(self.axes[name])} axes for {name}, which is a {describe(x)}")
            for axis, entry in enumerate(self.axes[name]):
                if isinstance(entry, tuple) and (n := sum(prod(n for _, n in row) for row in entry)) != x.shape[axis]:
                    raise BadInput(f"the factors of axis {axis} of {name} make {n} entries, it is a {describe(x)}")
        sizes: dict[str, int] = {}
        for p, places in self.places.items():
            for place in places:
                n = place.n or state[place.tensor].shape[place.axis]
                if sizes.setdefault(p, n) != n:
                    raise BadInput(
                        f"permutation {p!r} has {sizes[p]} units in {places[0].tensor} and {n} in {place.tensor}, axis "
                        f"{place.axis}"
                    )
        return sizes

    def to_json(self) -> str:
        """The spec as JSON text."""
        table = {"axes": self.axes, "carried": sorted(self.carried or ()), "notes": self.notes}
        return json.dumps(table, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "PermutationSpec":
        """The spec that `to_json` wrote; a table of `axes` alone will do.

        Raises: BadInput: if the text is no such JSON.
        """
        try:
            table = json.loads(text)
        except ValueError as error:
            raise BadInput(f"a permutation spec is JSON text, got something else: {error}") from None
        if not isinstance(table, dict) or not isinstance(table.get("axes"), dict):
            raise BadInput(
                'a permutation spec in JSON is an object with the key "axes": tensor names and their entries'
            )
        carried = table.get("carried")
        return cls(table["axes"], None if carried is None else frozenset(carried), tuple(table.get("notes", ())))


def apply_permutation(spec: PermutationSpec, permutations: Permutations, state: State) -> dict[str, Tensor]:
    """Reorder a state: unit i of the result is unit `permutations[p][i]` of `state`, on every axis that p stands on.

    Args:
        spec: which permutation acts where.
        permutations: by name; a name left out is the identity.
        state: the tensors, with the spec's names and shapes.
    Returns: a new state; tensors with nothing to reorder are the same objects.
    Raises: BadInput: for a name the spec lacks, indices that are no permutation, a state that does not fit.

    >>> spec = PermutationSpec({"w": ("h", None)})
    >>> apply_permutation(spec, {"h": torch.tensor([1, 0])}, {"w": torch.eye(2)})["w"]
    tensor([[0., 1.],
            [1., 0.]])
    """
    sizes = spec.sizes(state)
    for p, order in permutations.items():
        if p not in sizes:
            raise BadInput(f"the spec has no permutation {p!r}{nearest(p, sizes)}")
        if not isinstance(order, Tensor) or order.is_floating_point() or order.ndim != 1:
            raise BadInput(f"permutation {p!r} must be a vector of integers, got {_kind(order)}")
        if not torch.equal(order.sort().values.cpu(), torch.arange(sizes[p])):
            raise BadInput(f"permutation {p!r} must hold 0 .. {sizes[p] - 1} once each, got a {describe(order)}")
    return {name: reorder(x, spec.axes.get(name, ()), permutations) for name, x in state.items()}


def reorder(x: Tensor, entries: tuple[Axis, ...], permutations: Permutations) -> Tensor:
    """One tensor with the given permutations applied to the axes they stand on."""
    for axis, entry in enumerate(entries):
        if names_of(entry) & permutations.keys():
            x = x.index_select(axis, index_of(entry, permutations).to(x.device))
    return x


def names_of(entry: Axis) -> set[str]:
    """The permutations that stand on an axis."""
    if isinstance(entry, str):
        return {entry}
    return {name for row in entry or () for name, _ in row if name is not None}


def index_of(entry: Axis, permutations: Permutations, size: int | None = None) -> Int[Tensor, "n"]:
    """Where the entries of a reordered axis come from. size: of an axis whose only permutation may be left out."""
    if isinstance(entry, str):
        return permutations[entry].cpu() if entry in permutations or size is None else torch.arange(size)
    parts, start = [], 0
    for row in entry or ():
        index = torch.zeros(1, dtype=torch.long)
        for name, n in row:
            order = permutations[name].cpu() if name in permutations else torch.arange(n)
            index = (index[:, None] * n + order).flatten()
        parts.append(index + start)
        start += len(index)
    return torch.cat(parts)


def identities(sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Every permutation as it changes nothing."""
    return {p: torch.arange(n) for p, n in sizes.items()}


def random_permutations(sizes: Mapping[str, int], generator: Generator | None = None) -> dict[str, Tensor]:
    """Every permutation drawn at random."""
    device = generator.device if generator else torch.device("cpu")
    return {p: torch.randperm(n, generator=generator, device=device).cpu() for p, n in sizes.items()}


def _axis(entry: Any, tensor: str) -> Axis:
    """An entry in its one form: None, a name, or a tuple of rows of (name or None, size)."""
    if entry is None or isinstance(entry, str):
        return entry
    rows = list(entry) if isinstance(entry, (tuple, list)) else []
    if rows and all(_is_factor(f) for f in rows):
        rows = [rows]
    if not rows or not all(isinstance(row, (tuple, list)) and row and all(_is_factor(f) for f in row) for row in rows):
        raise BadInput(
            f"an axis of {tensor} needs None, a permutation's name, or factors (name or None, size) in rows, got {entry!r}"
        )
    return tuple(tuple((name, n) for name, n in row) for row in rows)


def _is_factor(f: Any) -> bool:
    if not isinstance(f, (tuple, list)) or len(f) != 2 or not (f[0] is None or isinstance(f[0], str)):
        return False
    return isinstance(f[1], int) and not isinstance(f[1], bool) and f[1] > 0


def require_matchable(spec: PermutationSpec, who: str) -> None:
    """Raise BadInput if a permutation stands on two axes of one tensor: the best one is then no linear assignment."""
    for p, places in spec.places.items():
        axis: dict[str, int] = {}
        for place in places:
            if axis.setdefault(place.tensor, place.axis) != place.axis:
                raise BadInput(
                    f"{who} cannot match permutation {p!r}, which stands on the axes {axis[place.tensor]} and {place.axis} of "
                    f"{place.tensor}: the best one is no linear assignment; leave it out"
                )


def _check_places(p: str, places: tuple[Place, ...]) -> None:
    rows: set[tuple[str, int, int]] = set()
    n = next((place.n for place in places if place.n), None)
    for place in places:
        if (row := (place.tensor, place.axis, place.start)) in rows:
            raise BadInput(f"permutation {p!r} stands twice in one row of factors of {place.tensor}; leave it out")
        rows.add(row)
        if place.n and place.n != n:
            raise BadInput(f"permutation {p!r} has {n} units in one place and {place.n} in {place.tensor}")


def _kind(x: object) -> str:
    return describe(x) if isinstance(x, Tensor) else type(x).__name__

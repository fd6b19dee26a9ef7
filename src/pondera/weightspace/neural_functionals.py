"""Universal neural functionals: every linear map of weights that follows their symmetries, for any architecture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._permute import Axis, PermutationSpec
from pondera.errors import BadInput, describe
from pondera.weightspace._states import count

Block = tuple[int, ...]
Features = Mapping[str, Float[Tensor, "nets *shape channels"]]
MOST_TERMS = 1000


class UniversalFunctional(nn.Module):
    r"""A linear layer from states to states that commutes with every permutation of a spec, and has all such maps.

    The axes of tensor O that are permuted, and those of tensor I, are the slots of their map. Each set partition of the slots
    in which no block mixes two permutations is one term: input slots of one block take a diagonal, input blocks without an
    output slot are averaged, output slots of one block are written on a diagonal, output blocks without an input slot are
    filled evenly. A layer is

    .. math:: Y_O = b_O + \sum_I \sum_{\pi \in {\rm partitions}(O, I)} E_\pi(X_I) \, \theta_{O, I, \pi}

    with one matrix :math:`\theta` over channels a term. A permutation with m slots has Bell(m) of them; those with more blocks
    than the permutation has units depend on the others and are left out, so that the terms are a basis at every size. Axes
    that keep their order are folded into the channels (the paper's code asks for a permutation on every axis, which calls
    inputs and outputs of a net exchangeable). Axes of several factors (heads, flattened pixels) and concatenated ones are
    taken apart first. Constants are complete, too: one a partition of the output's own slots.

    All tensors are pooled once, however many read them.

    Args:
        spec: the symmetries of one network, from `trace_permutations(model, example, matchable=False)` or by hand.
        like: a network or state dict with the tensors' names and shapes.
        in_channels, out_channels: numbers an entry has before and after; (nets, *shape, channels) by name goes in and comes out.
        bias: whether to add constants.
        most_terms: the most terms of one pair of tensors: four axes of one permutation on each side would have Bell(8) = 4140.
        device, dtype: as in `nn.Linear`.
    Raises: BadInput: for a state whose symmetries the spec does not tell (which tensor), too many terms, sizes below 1; in
        forward, tensors that do not fit.
    Paper: Zhou, Finn and Harrison 2024, arXiv 2402.05232. As the authors' code: means, one theta a term, normal with variance
        1 / (channels times terms), biases 0. Ours: partitions of at most n blocks, complete constants, fixed axes.

    >>> from pondera.weightspace import trace_permutations
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> layer = UniversalFunctional(trace_permutations(net, torch.randn(4, 2), matchable=False), net, 1, 1, bias=False)
    >>> sum(p.numel() for p in layer.parameters())  # the dimension of all equivariant maps of such a net
    114
    >>> layer({name: torch.randn(5, *x.shape, 1) for name, x in net.state_dict().items()})["0.weight"].shape
    torch.Size([5, 3, 2, 1])
    """

    def __init__(
        self,
        spec: PermutationSpec,
        like: nn.Module | Mapping[str, Tensor],
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        most_terms: int = MOST_TERMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.shapes, self.pieces = pieces_of(spec, like, who)
        self.in_channels, self.out_channels = at_least_1(who, in_channels=in_channels, out_channels=out_channels)
        self.maps = Maps(self.pieces, self.pieces, in_channels, out_channels, bias, most_terms, who, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all theta anew; biases 0."""
        self.maps.reset_parameters()

    def forward(self, states: Features) -> dict[str, Tensor]:
        """(nets, *shape, in_channels) by name to (nets, *shape, out_channels)."""
        nets = require_features(states, self.shapes, self.in_channels, type(self).__name__)
        made = self.maps([p.read(states[p.name]) for p in self.pieces], nets)
        return together(self.pieces, made, self.shapes, self.out_channels)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, tensors={len(self.shapes)}, terms={self.maps.terms}"


class UniversalInvariant(nn.Module):
    r"""A linear layer from states to features that no permutation of a spec changes, and has all such maps.

    As `UniversalFunctional` with an output that has no axes: each partition of a tensor's own slots gives the mean over its
    diagonal. (The authors' head [recalled] takes the mean over all axes alone.)

    Args:
        spec, like, in_channels, bias, most_terms, device, dtype: as in `UniversalFunctional`.
        out_features: how many features come out, (nets, out_features).
    Raises: BadInput: as `UniversalFunctional`.
    Paper: Zhou, Finn and Harrison 2024, arXiv 2402.05232.

    >>> from pondera.weightspace import PermutationSpec
    >>> head = UniversalInvariant(PermutationSpec({"w": ("h", "h")}), {"w": torch.zeros(4, 4)}, 1, 1)
    >>> head.maps.terms, head({"w": torch.randn(7, 4, 4, 1)}).shape  # the mean of all entries, and of the diagonal
    (2, torch.Size([7, 1]))
    """

    def __init__(
        self,
        spec: PermutationSpec,
        like: nn.Module | Mapping[str, Tensor],
        in_channels: int,
        out_features: int,
        bias: bool = True,
        most_terms: int = MOST_TERMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.shapes, self.pieces = pieces_of(spec, like, who)
        self.in_channels, self.out_features = at_least_1(who, in_channels=in_channels, out_features=out_features)
        self.maps = Maps(self.pieces, [NO_AXES], in_channels, out_features, bias, most_terms, who, device, dtype)

    def reset_parameters(self) -> None:
        """Draw all theta anew; biases 0."""
        self.maps.reset_parameters()

    def forward(self, states: Features) -> Float[Tensor, "nets out_features"]:
        """(nets, *shape, in_channels) by name to (nets, out_features)."""
        nets = require_features(states, self.shapes, self.in_channels, type(self).__name__)
        return self.maps([p.read(states[p.name]) for p in self.pieces], nets)[0]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_features}, tensors={len(self.shapes)}, terms={self.maps.terms}"


class UniversalNet(nn.Module):
    """Universal functionals with ReLU between, for states as they come: to predict of networks, or to change them.

    Give it weights of one scale (`Standardize`). Each channel of each tensor is normalized over networks and entries before
    the ReLU, which keeps the symmetry: means over many units differ little from network to network, and without it training
    hardly starts.

    Args:
        spec, like, most_terms, device, dtype: as in `UniversalFunctional`.
        channels: of the layers of `UniversalFunctional`, in order.
        out_features: features by a `UniversalInvariant` of the last channels, a ReLU and a linear layer; None gives states, by
            one more layer to one channel.
        norm: whether to normalize by batch (`nn.BatchNorm1d`; in eval mode by the running statistics).
    Raises: BadInput: as `UniversalFunctional`; for no channels.
    Paper: Zhou, Finn and Harrison 2024, arXiv 2402.05232.

    >>> from pondera.weightspace import PermutationSpec
    >>> spec = PermutationSpec({"w": ("h", None), "b": ("h",)})
    >>> UniversalNet(spec, {"w": torch.zeros(4, 2), "b": torch.zeros(4)}, (8, 8), 3)(
    ...     {"w": torch.randn(5, 4, 2), "b": torch.randn(5, 4)}
    ... ).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        spec: PermutationSpec,
        like: nn.Module | Mapping[str, Tensor],
        channels: Sequence[int] = (16, 16),
        out_features: int | None = None,
        norm: bool = True,
        most_terms: int = MOST_TERMS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not channels:
            raise BadInput("UniversalNet needs the channels of at least one layer, got none")
        widths = [1, *channels] if out_features is not None else [1, *channels, 1]

        def layer(a: int, b: int) -> nn.Module:
            return UniversalFunctional(spec, like, a, b, most_terms=most_terms, device=device, dtype=dtype)

        self.layers = nn.ModuleList(layer(a, b) for a, b in pairwise(widths))
        self.norms: nn.ModuleList | None = None
        if norm:
            tensors = len(self.layers[0].shapes)  # type: ignore[arg-type]
            each = [[nn.BatchNorm1d(c, device=device, dtype=dtype) for _ in range(tensors)] for c in channels]
            self.norms = nn.ModuleList(nn.ModuleList(some) for some in each)
        self.head = self.head_norm = self.out = None
        if out_features is not None:
            last = channels[-1]
            self.head = UniversalInvariant(spec, like, last, last, most_terms=most_terms, device=device, dtype=dtype)
            self.head_norm = nn.BatchNorm1d(last, device=device, dtype=dtype) if norm else None
            self.out = nn.Linear(last, out_features, device=device, dtype=dtype)

    def forward(self, states: Mapping[str, Float[Tensor, "nets *shape"]]) -> Tensor | dict[str, Tensor]:
        """States (nets, *shape) by name to (nets, out_features), or to states."""
        h = {name: x.unsqueeze(-1) for name, x in states.items()}
        hidden = len(self.layers) - (self.head is None)
        for k, layer in enumerate(self.layers):
            h = layer(h)
            if k < hidden:
                if self.norms is not None:
                    some: Any = self.norms[k]
                    h = {n: norm(x.flatten(0, -2)).view(x.shape) for norm, (n, x) in zip(some, h.items(), strict=True)}
                h = {name: x.relu() for name, x in h.items()}
        if self.head is None or self.out is None:
            return {name: x.squeeze(-1) for name, x in h.items()}
        z = self.head(h)
        found: Tensor = self.out((z if self.head_norm is None else self.head_norm(z)).relu())
        return found


# -- tensors taken apart ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A part of a tensor of which every axis is one permutation's or keeps its order.

    where: start and length on each axis of the tensor. factors: the sizes of the axes taken apart. slots: the permutation of
    each permuted factor, sizes theirs. order: the factors, permuted ones first. fixed: sizes of the others."""

    name: str
    where: tuple[tuple[int, int], ...]
    factors: tuple[int, ...]
    slots: tuple[str, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    fixed: tuple[int, ...]

    def read(self, x: Float[Tensor, "nets *shape channels"]) -> Float[Tensor, "nets *sizes folded"]:
        for axis, (start, length) in enumerate(self.where, 1):
            x = x.narrow(axis, start, length)
        x = x.reshape(len(x), *self.factors, x.shape[-1])
        return x.permute(0, *(1 + i for i in self.order), -1).flatten(1 + len(self.sizes))

    def write(self, x: Float[Tensor, "nets *sizes folded"]) -> Float[Tensor, "nets *lengths channels"]:
        x = x.unflatten(-1, (*self.fixed, -1)) if self.fixed else x
        back = [0] * len(self.order)
        for i, at in enumerate(self.order):
            back[at] = 1 + i
        return x.permute(0, *back, -1).reshape(len(x), *(n for _, n in self.where), x.shape[-1])


NO_AXES = Piece("", (), (), (), (), (), ())


def pieces_of(
    spec: PermutationSpec, like: nn.Module | Mapping[str, Tensor], who: str
) -> tuple[dict[str, tuple[int, ...]], list[Piece]]:
    """The shapes of a state's floating-point tensors, and their pieces."""
    state = like.state_dict() if isinstance(like, nn.Module) else like
    if not isinstance(spec, PermutationSpec) or not isinstance(state, Mapping):
        raise BadInput(f"{who} needs a PermutationSpec and a network or state dict like those it will read")
    try:  # counters have no axes, and a batch of states leaves them out
        PermutationSpec({name: axes for name, axes in spec.axes.items() if axes or name in state}).sizes(state)
    except BadInput as error:
        raise BadInput(f"{who} got a state dict whose symmetries cannot be traced ({error})") from None
    shapes = {name: tuple(x.shape) for name, x in state.items() if x.is_floating_point()}
    if not shapes or not all(prod(shape) for shape in shapes.values()):
        raise BadInput(f"{who} needs at least one floating-point tensor, and none that is empty")
    pieces = []
    for name, shape in shapes.items():
        entries = spec.axes.get(name, ())
        for rows in product(*(_rows(entry, n) for entry, n in zip(entries, shape, strict=True))):
            where = tuple((start, prod(n for _, n in row)) for start, row in rows)
            flat = [factor for _, row in rows for factor in row]
            moved = [i for i, (p, _) in enumerate(flat) if p is not None]
            kept = [i for i, (p, _) in enumerate(flat) if p is None]
            slots = tuple(p for p, _ in flat if p is not None)
            sizes, fixed = (tuple(flat[i][1] for i in some) for some in (moved, kept))
            pieces.append(Piece(name, where, tuple(n for _, n in flat), slots, sizes, (*moved, *kept), fixed))
    return shapes, pieces


def _rows(entry: Axis, size: int) -> list[tuple[int, tuple[tuple[str | None, int], ...]]]:
    """An axis as rows of factors, each with where it starts."""
    if entry is None or isinstance(entry, str):
        return [(0, ((entry, size),))]
    found, start = [], 0
    for row in entry:
        found.append((start, row))
        start += prod(n for _, n in row)
    return found


def together(
    pieces: Sequence[Piece], made: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]], channels: int
) -> dict[str, Tensor]:
    """The tensors that pieces are of."""
    out: dict[str, Tensor] = {}
    for piece, x in zip(pieces, made, strict=True):
        x, shape = piece.write(x), shapes[piece.name]
        if x.shape[1:-1] == shape:
            out[piece.name] = x
            continue
        whole = out.setdefault(piece.name, x.new_zeros(len(x), *shape, channels))
        whole[(slice(None), *(slice(start, start + n) for start, n in piece.where))] = x
    return out


def at_least_1(who: str, **sizes: int) -> tuple[int, ...]:
    for name, n in sizes.items():
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise BadInput(f"{who} needs {name} of at least 1, a whole number, got {n}")
    return tuple(sizes.values())


def require_features(states: Features, shapes: Mapping[str, tuple[int, ...]], channels: int, who: str) -> int:
    """The number of networks in a batch that fits. Raises: BadInput: if it does not."""
    nets = count(states, who)
    for name, shape in shapes.items():
        if name not in states:
            raise BadInput(f"{who} reads the tensors {', '.join(shapes)}; the states lack {name}")
        if states[name].shape[1:] != (*shape, channels):
            words = ", ".join(map(str, ("networks", *shape, channels)))
            raise BadInput(f"{who} needs {name} as ({words}), got a {describe(states[name])}")
    return nets


# -- the maps ---------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """An input as a term reads it: the piece, its slots in blocks (diagonals), and the blocks that are not averaged."""

    piece: int
    blocks: tuple[Block, ...]
    kept: Block


class Target(NamedTuple):
    """Where terms are written: the output's slots in blocks (diagonals), and the blocks that follow an input's."""

    blocks: tuple[Block, ...]
    filled: Block


class Maps(nn.Module):
    """All equivariant maps between lists of pieces: one matrix of all theta for each output, and one of its constants.

    `layout[o]` says which rows of `weight[o]` belong to which terms: for each target the sources that are written there, each
    with its rows. `constants[o]` has the blocks of the constants, as rows of `bias[o]`."""

    def __init__(
        self,
        inputs: Sequence[Piece],
        outputs: Sequence[Piece],
        in_channels: int,
        out_channels: int,
        bias: bool,
        most_terms: int,
        who: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        self.outputs, self.pool = list(outputs), pool
        self.layout: list[dict[Target, list[tuple[Source, slice]]]] = []
        self.constants: list[list[tuple[Block, ...]]] = []
        self.terms = 0
        weights, biases = [], []
        for o in outputs:
            groups: dict[Target, list[Source]] = {}
            for i, piece in enumerate(inputs):
                for target, source in terms_of(o, piece, i, most_terms, who):
                    groups.setdefault(target, []).append(source)
                    self.terms += 1
            layout: dict[Target, list[tuple[Source, slice]]] = {}
            row = 0
            for target, sources in groups.items():
                for source in sources:
                    n = prod(inputs[source.piece].fixed) * in_channels
                    layout.setdefault(target, []).append((source, slice(row, row + n)))
                    row += n
            self.layout.append(layout)
            alone = [target.blocks for target, _ in terms_of(o, NO_AXES, 0, most_terms, who)]
            self.constants.append(alone)
            columns = prod(o.fixed) * out_channels
            weights.append(nn.Parameter(torch.empty(row, columns, device=device, dtype=dtype)))
            biases.append(nn.Parameter(torch.empty(len(alone), columns, device=device, dtype=dtype)))
        self.weight = nn.ParameterList(weights)
        self.bias = nn.ParameterList(biases) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for w in self.weight:
            nn.init.normal_(w, std=1 / math.sqrt(len(w)))
        for b in self.bias or ():
            nn.init.zeros_(b)

    def forward(self, xs: Sequence[Float[Tensor, "nets *sizes folded"]], nets: int) -> list[Tensor]:
        pooled: dict[Source, Tensor] = {}

        def read(source: Source) -> Tensor:
            if source not in pooled:
                x = along(xs[source.piece], source.blocks)
                gone = [1 + k for k in range(len(source.blocks)) if k not in source.kept]
                x = reduced(x, gone, self.pool)
                at = sorted(source.kept)
                pooled[source] = x.permute(0, *(1 + at.index(k) for k in source.kept), -1)
            return pooled[source]

        joined: dict[tuple[Source, ...], Tensor] = {}

        def join(sources: tuple[Source, ...]) -> Tensor:
            if sources not in joined:
                joined[sources] = torch.cat([read(source) for source in sources], -1)
            return joined[sources]

        out = []
        for o, (piece, weight) in enumerate(zip(self.outputs, self.weight, strict=True)):
            compact: dict[tuple[Block, ...], Tensor] = {}  # one axis for each block of output slots
            for target, sources in self.layout[o].items():
                rows = weight[sources[0][1].start : sources[-1][1].stop]
                x = join(tuple(source for source, _ in sources)) @ rows
                for k in range(len(target.blocks)):
                    x = x if k in target.filled else x.unsqueeze(1 + k)
                compact[target.blocks] = compact[target.blocks] + x if target.blocks in compact else x
            if self.bias is not None:
                for row, blocks in enumerate(self.constants[o]):
                    compact[blocks] = compact[blocks] + self.bias[o][row]
            whole = next(iter(compact.values())).new_zeros(nets, *piece.sizes, weight.shape[1])
            for blocks, x in compact.items():
                if all(len(b) == 1 for b in blocks):
                    whole = whole + x
            for blocks, x in compact.items():
                if any(len(b) > 1 for b in blocks):
                    along(whole, blocks).add_(x)
            out.append(whole)
        return out


def along(x: Float[Tensor, "nets *slots folded"], blocks: Sequence[Block]) -> Float[Tensor, "nets *blocks folded"]:
    """A view of a tensor with one axis for each block of its slots: the diagonal of those in it."""
    label = {slot: k for k, block in enumerate(blocks) for slot in block}
    labels = [-1, *(label[slot] for slot in range(len(label))), -2]
    for k in range(len(blocks)):
        while labels.count(k) > 1:
            i = labels.index(k)
            j = labels.index(k, i + 1)
            x = x.diagonal(dim1=i, dim2=j)
            labels = [n for at, n in enumerate(labels) if at not in (i, j)] + [k]
    return x.permute(*(labels.index(k) for k in (-1, *range(len(blocks)), -2)))


def reduced(x: Tensor, dims: list[int], pool: str) -> Tensor:
    if not dims:
        return x
    return x.mean(dims) if pool == "mean" else x.sum(dims) if pool == "sum" else x.amax(dims)


def terms_of(o: Piece, i: Piece, index: int, most: int, who: str) -> Iterator[tuple[Target, Source]]:
    """Every term of the map from piece i to piece o: where it is written and what it reads."""
    k = len(o.slots)
    slots, sizes = o.slots + i.slots, o.sizes + i.sizes
    groups = {p: [s for s, q in enumerate(slots) if q == p] for p in dict.fromkeys(slots)}
    terms = prod(bell(len(group)) for group in groups.values())
    if terms > most:
        raise BadInput(
            f"{who} would need {terms:,} terms from {i.name} to {o.name}, above the {most:,} of most_terms: too many axes of "
            "one permutation; raise it, or fix some axes in the spec"
        )
    each = [list(set_partitions(group, sizes[group[0]])) for group in groups.values()]
    for chosen in product(*each):
        blocks = sorted(block for partition in chosen for block in partition)
        outs = [tuple(s for s in b if s < k) for b in blocks if b[0] < k]
        ins = sorted(tuple(s - k for s in b if s >= k) for b in blocks if b[-1] >= k)
        linked = [(a, tuple(s - k for s in b if s >= k)) for a, b in enumerate(blocks) if b[0] < k <= b[-1]]
        yield (
            Target(tuple(outs), tuple(a for a, _ in linked)),
            Source(index, tuple(ins), tuple(ins.index(b) for _, b in linked)),
        )


def set_partitions(items: Sequence[int], most: int) -> Iterator[list[Block]]:
    """All partitions of ascending items into at most so many blocks, ascending each."""
    if not items:
        yield []
        return
    first, *rest = items
    for partition in set_partitions(rest, most):
        for at, block in enumerate(partition):
            yield [*partition[:at], (first, *block), *partition[at + 1 :]]
        if len(partition) < most:
            yield [(first,), *partition]


def bell(m: int) -> int:
    """How many set partitions m items have.

    >>> [bell(m) for m in range(9)]
    [1, 1, 2, 5, 15, 52, 203, 877, 4140]
    """
    row = [1]
    for _ in range(m):
        new = [row[-1]]
        for x in row:
            new.append(new[-1] + x)
        row = new
    return row[0]

"""Diagrams that span equivariant maps between tensor powers: which there are, their matrices, their factors, their sums.

A diagram has l output legs, 0 to l - 1, and k input legs, l to l + k - 1, all of them in blocks. Its matrix maps
(R^n)^k to (R^n)^l and has an entry for each index a leg.

=========  ===========================================  ===========================================================
group      diagrams                                     entry
=========  ===========================================  ===========================================================
"S(n)"     set partitions of the legs                   1 where the legs of every block have equal indices, else 0
"O(n)"     perfect matchings (Brauer diagrams)          the same
"SO(n)"    these, and n free legs with a matching of    times the Levi-Civita symbol of the free legs' indices
           the others (Brauer-Grood diagrams)
"Sp(n)"    perfect matchings                            delta for a pair across, J for a pair in one row
=========  ===========================================  ===========================================================

J is the form of neighbours, J[2i, 2i + 1] = 1 = -J[2i + 1, 2i], read from a pair's smaller leg to its larger one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput

MOST_LEGS = 7  # Bell(8) = 4140 diagrams

Block = tuple[int, ...]


@dataclass(frozen=True)
class Diagram:
    """Blocks of legs, outputs first. free: the legs under the Levi-Civita symbol, ascending."""

    order_out: int
    order_in: int
    blocks: tuple[Block, ...]
    free: Block = ()


# -- which there are ---------------------------------------------------------------------------------------------------


def set_partitions(legs: int, most: int) -> Iterator[tuple[Block, ...]]:
    """All partitions of the legs into at most so many blocks; blocks and legs ascending.

    >>> len(list(set_partitions(4, 4))), len(list(set_partitions(4, 2)))  # Bell(4); S(4, 1) + S(4, 2)
    (15, 8)
    """

    def grow(leg: int, blocks: tuple[Block, ...]) -> Iterator[tuple[Block, ...]]:
        if leg == legs:
            yield blocks
            return
        for i, block in enumerate(blocks):
            yield from grow(leg + 1, (*blocks[:i], (*block, leg), *blocks[i + 1 :]))
        if len(blocks) < most:
            yield from grow(leg + 1, (*blocks, (leg,)))

    return grow(0, ())


def matchings(legs: Block) -> Iterator[tuple[Block, ...]]:
    """All ways to pair the legs.

    >>> len(list(matchings(tuple(range(6)))))  # 5 * 3
    15
    """
    if not legs:
        yield ()
        return
    first, rest = legs[0], legs[1:]
    for partner in rest:
        for others in matchings(tuple(v for v in rest if v != partner)):
            yield ((first, partner), *others)


def parsed(group: str, who: str, kinds: tuple[str, ...] = ("S", "O", "SO", "Sp")) -> tuple[str, int]:
    """("O", 3) of "O(3)"."""
    found = re.fullmatch(r"(S|O|SO|Sp)\((\d+)\)", group.replace(" ", "")) if isinstance(group, str) else None
    if found is None or found[1] not in kinds or int(found[2]) < 1:
        raise BadInput(f"{who} knows the groups {', '.join(f'{k}(n)' for k in kinds)}, got {group!r}")
    kind, n = found[1], int(found[2])
    if kind == "Sp" and n % 2:
        raise BadInput(f"{who} needs an even n for Sp(n), got {group!r}")
    return kind, n


def whole(who: str, least: int, **sizes: int) -> None:
    """Refuse what is not a whole number of at least `least`."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadInput(f"{who} needs {name} of at least {least}, a whole number, got {value!r}")


def orders(who: str, order_in: int, order_out: int) -> None:
    whole(who, 0, order_in=order_in, order_out=order_out)
    if order_in + order_out > MOST_LEGS:
        raise BadInput(
            f"{who} goes up to order_in + order_out = {MOST_LEGS}, for the number of diagrams grows beyond any use, "
            f"got {order_in} + {order_out}"
        )


@cache
def diagrams(kind: str, n: int, order_in: int, order_out: int, redundant: bool = False) -> tuple[Diagram, ...]:
    """The diagrams of a group whose matrices are a basis of the equivariant maps; the whole spanning set if `redundant`.

    S(n): partitions into at most n blocks; the others depend on them. The rest: the first ones that are independent.
    """
    m = order_in + order_out
    if kind == "S":
        found = [Diagram(order_out, order_in, b) for b in set_partitions(m, m if redundant else n)]
        return tuple(found)
    legs = tuple(range(m))
    found = [Diagram(order_out, order_in, pairs) for pairs in (matchings(legs) if m % 2 == 0 else ())]
    if kind == "SO":
        for free in combinations(legs, n):
            rest = tuple(v for v in legs if v not in free)
            if len(rest) % 2 == 0:
                found += [Diagram(order_out, order_in, pairs, free) for pairs in matchings(rest)]
    enough = {"O": 2 * n >= m, "Sp": n >= m, "SO": n > m}[kind]  # of n, for all diagrams to be independent
    return tuple(found if enough or redundant else independent(found, kind, n))


def independent(found: list[Diagram], kind: str, n: int) -> list[Diagram]:
    """Those whose matrices are not sums of matrices before them."""
    kept: list[Diagram] = []
    basis: list[Tensor] = []
    for one in found:
        v = entries(one, kind, n).flatten()
        size = v.norm()
        for _ in range(2):
            for u in basis:
                v = v - (u @ v) * u
        if v.norm() > 1e-8 * size:
            basis.append(v / v.norm())
            kept.append(one)
    return kept


# -- their matrices ----------------------------------------------------------------------------------------------------


def entries(diagram: Diagram, kind: str, n: int) -> Float[Tensor, "rows columns"]:
    """A diagram's matrix, (n^l, n^k) in float64: the definition, entry by entry."""
    m = diagram.order_out + diagram.order_in
    at = [torch.arange(n).view([n if v == leg else 1 for v in range(m)]) for leg in range(m)]
    out = torch.ones([n] * m, dtype=torch.float64)
    for block in diagram.blocks:
        for a, b in pairwise(block):
            if kind == "Sp" and (a < diagram.order_out) == (b < diagram.order_out):
                out = out * (at[b] == at[a] + 1 - 2 * (at[a] % 2)) * (1 - 2 * (at[a] % 2))
            else:
                out = out * (at[a] == at[b])
    for a, b in combinations(diagram.free, 2):
        out = out * (at[b] - at[a]).sign()
    return out.reshape(n**diagram.order_out, n**diagram.order_in)


@cache
def moebius(partitions: tuple[tuple[Block, ...], ...]) -> Float[Tensor, "orbit diagram"]:
    r"""Rows: orbit elements X as sums of diagram elements D, from D_pi = \sum_{rho coarser or equal} X_rho."""
    label = [{v: i for i, block in enumerate(blocks) for v in block} for blocks in partitions]
    zeta = torch.tensor(
        [
            [float(all(one[a] == one[b] for block in blocks for a, b in pairwise(block))) for one in label]
            for blocks in partitions
        ],
        dtype=torch.float64,
    )
    return torch.linalg.inv(zeta).round()


def equivariant_maps(
    group: str, order_in: int, order_out: int, *, basis: str = "diagram", spanning_set: bool = False
) -> Float[Tensor, "maps rows columns"]:
    r"""All linear maps of (R^n)^k to (R^n)^l that keep a group: matrices that span them, from diagrams.

    ========  =========================  ==========================================================================
    group     diagrams                   they are independent
    ========  =========================  ==========================================================================
    "S(n)"    set partitions             if n >= l + k; those with at most n blocks always
    "O(n)"    Brauer                     if 2 n >= l + k; none if l + k is odd: only 0 is equivariant then
    "SO(n)"   Brauer and Brauer-Grood    if n > l + k
    "Sp(n)"   Brauer, with the form J    if n >= l + k; pairs of neighbours (e1, f1), (e2, f2) .. are the basis of R^n
    ========  =========================  ==========================================================================

    These matrices have n^(l + k) entries each. The layers `pondera.nn.PermutationLinear` and `pondera.nn.BrauerLinear`
    multiply by their sums without forming them.

    Args:
        group: "S(n)", "O(n)", "SO(n)" or "Sp(n)", with a number for n.
        order_in, order_out: k and l, together at most 7.
        basis: "diagram" (D: indices in a block are equal), or, for S(n), "orbit" (X: equal exactly if in one block).
        spanning_set: all diagrams, dependent ones as well; by default those that are a basis.
    Returns: (maps, n^l, n^k), float64; the first index of a tensor is the slowest, as in `flatten`.
    Raises: BadInput: for another group, an odd n for "Sp", too high an order, or another basis.

    >>> equivariant_maps("S(3)", 1, 1).tolist()  # sum, and identity
    [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    >>> len(equivariant_maps("SO(3)", 2, 1)), len(equivariant_maps("O(3)", 2, 1))  # the cross product
    (1, 0)
    """
    kind, n = parsed(group, "equivariant_maps")
    orders("equivariant_maps", order_in, order_out)
    if basis not in (("diagram", "orbit") if kind == "S" else ("diagram",)):
        raise BadInput(f'equivariant_maps takes basis "diagram", or "orbit" for S(n), got {basis!r} for {group}')
    every = diagrams(kind, n, order_in, order_out, spanning_set)
    if not every:
        return torch.zeros(0, n**order_out, n**order_in, dtype=torch.float64)
    found = torch.stack([entries(one, kind, n) for one in every])
    return torch.einsum("xd,dij->xij", moebius(tuple(d.blocks for d in every)), found) if basis == "orbit" else found


# -- their factors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Read:
    """What a diagram takes from its input: diagonals over `blocks` of axes, of which some are summed away.

    summed: which of the blocks. free: which are contracted with the Levi-Civita symbol, to give `new` axes at the end."""

    blocks: tuple[Block, ...]
    summed: Block
    free: Block
    new: int


@dataclass(frozen=True, order=True)
class Write:
    """Where a diagram puts it: on diagonals over `blocks` of axes. crossing: the blocks that come from the input; along
    the others it is copied."""

    blocks: tuple[Block, ...]
    crossing: Block


def factor(diagram: Diagram) -> tuple[Read, Block, Write]:
    """A diagram as read, turn, write: what is read has its axes permuted to the order in which it is written."""
    l = diagram.order_out
    parts = [(tuple(v for v in b if v < l), tuple(v - l for v in b if v >= l)) for b in diagram.blocks]
    goes_to = {below: above for above, below in parts if above and below}
    free_in = [(v - l,) for v in diagram.free if v >= l]
    free_out = [(v,) for v in diagram.free if v < l]
    rows = sorted([above for above, _ in parts if above] + free_out)
    columns = sorted([below for _, below in parts if below] + free_in)
    axes = [goes_to[b] for b in columns if b in goes_to] + free_out  # of what is read
    crossing = tuple(i for i, b in enumerate(rows) if b in axes)
    read = Read(
        tuple(columns),
        tuple(i for i, b in enumerate(columns) if b not in goes_to and b not in free_in),
        tuple(i for i, b in enumerate(columns) if b in free_in),
        len(free_out) if diagram.free else 0,
    )
    return read, tuple(axes.index(rows[i]) for i in crossing), Write(tuple(rows), crossing)


def contract(x: Tensor, read: Read, kind: str, done: dict[Read, Tensor], mean: bool = False) -> Tensor:
    """Read from x, (batch, channels, n, .., n); every tensor on the way is kept in `done`, for the diagrams that share it."""
    if read in done:
        return done[read]
    if read.free:
        whole = contract(x, Read(read.blocks, read.summed, (), 0), kind, done, mean)
        left = [i for i in range(len(read.blocks)) if i not in read.summed]
        apart = [left.index(i) + 2 for i in read.free]
        n, kept = x.shape[-1], [d + 2 for d in range(len(left)) if d + 2 not in apart]
        flat = whole.permute(0, 1, *kept, *apart).reshape(*x.shape[:2], *[n] * len(kept), n ** len(apart))
        symbol = levi_civita(n, flat).reshape(n**read.new, -1)
        out = (flat @ symbol.mT).reshape(*x.shape[:2], *[n] * (len(kept) + read.new))
    elif read.new:  # all free legs are outputs: the symbol itself, times what is read
        whole = contract(x, Read(read.blocks, read.summed, (), 0), kind, done, mean)
        out = whole.reshape(*whole.shape, *[1] * read.new) * levi_civita(read.new, whole)
    elif read.summed:
        *others, last = read.summed
        before = contract(x, Read(read.blocks, tuple(others), (), 0), kind, done, mean)
        axis = last - len(others) + 2
        out = before.mean(axis) if mean else before.sum(axis)
    else:
        out = diagonals(x, read.blocks, signed=kind == "Sp")
    done[read] = out
    return out


def levi_civita(n: int, like: Tensor) -> Tensor:
    """The Levi-Civita symbol of n indices, in the type of another tensor."""
    at = [torch.arange(n, device=like.device).view([n if v == leg else 1 for v in range(n)]) for leg in range(n)]
    out = torch.ones([n] * n, device=like.device, dtype=torch.long)
    for a, b in combinations(at, 2):
        out = out * (b - a).sign()
    return out.to(like.dtype)


def diagonals(x: Tensor, blocks: tuple[Block, ...], signed: bool) -> Tensor:
    """One axis a block, a view; signed: the axis of a pair runs over J's entries that are not zero, times them."""
    legs = list(range(x.ndim - 2))
    for first, *rest in blocks:
        for other in rest:
            i, j = legs.index(first) + 2, legs.index(other) + 2
            if signed:
                y = x.movedim((i, j), (-2, -1))
                up, down = (y[..., a::2, 1 - a :: 2].diagonal(dim1=-2, dim2=-1) for a in (0, 1))
                x = torch.stack([up, -down], -1).flatten(-2)
            else:
                x = x.diagonal(dim1=i, dim2=j)
            legs = [v for v in legs if v not in (first, other)] + [first]
    return x.permute(0, 1, *(legs.index(block[0]) + 2 for block in blocks))


def spread(y: Tensor, write: Write) -> Tensor:
    """One axis a block of the output, of size 1 where it is copied along."""
    sizes = iter(y.shape[2:])
    return y.reshape(*y.shape[:2], *(next(sizes) if i in write.crossing else 1 for i in range(len(write.blocks))))


def put(sums: dict[tuple[Block, ...], Tensor], n: int, order_out: int, signed: bool) -> Tensor:
    """Each sum onto its diagonals of one output, (batch, channels, n, .., n)."""
    first = next(iter(sums.values()))
    single = tuple((v,) for v in range(order_out))
    if single in sums:
        out = sums[single].expand(-1, -1, *[n] * order_out).reshape(*first.shape[:2], n**order_out).clone()
    else:
        out = first.new_zeros(*first.shape[:2], n**order_out)
    for blocks, y in sums.items():
        if blocks == single:
            continue
        at = torch.zeros((), dtype=torch.long, device=y.device)
        for i, block in enumerate(blocks):
            c = torch.arange(n, device=y.device)
            steps = [n ** (order_out - 1 - v) for v in block]
            if signed and len(block) == 2:
                sign = (1 - 2 * (c % 2)).view([n if j == i else 1 for j in range(len(blocks))])
                y = y * sign.to(y.dtype)
                at = at.unsqueeze(-1) + c * steps[0] + (c + 1 - 2 * (c % 2)) * steps[1]
            else:
                at = at.unsqueeze(-1) + c * sum(steps)
        out.index_add_(2, at.flatten(), y.expand(-1, -1, *[n] * len(blocks)).flatten(2))
    return out.view(*out.shape[:2], *[n] * order_out)


# -- their sums --------------------------------------------------------------------------------------------------------


class DiagramSum:
    r"""The product with a weighted sum of diagrams, no matrix formed.

    Diagrams that read alike share what they read, channels are mixed there, by one product with all that goes to the same
    places, and every diagonal of the output is written once. `diagrams` has them in the order of the weights.
    """

    def __init__(self, kind: str, n: int, order_in: int, order_out: int, every: tuple[Diagram, ...]) -> None:
        self.kind, self.n, self.order_in, self.order_out = kind, n, order_in, order_out
        goes: dict[Write, dict[tuple[Read, Block], Diagram]] = {}
        for one in every:
            read, turn, write = factor(one)
            goes.setdefault(write, {})[read, turn] = one
        groups: dict[tuple[tuple[Read, Block], ...], list[Write]] = {}
        for write in sorted(goes):
            groups.setdefault(tuple(sorted(goes[write])), []).append(write)
        self.groups = sorted(groups.items())
        self.diagrams = [goes[write][way] for ways, writes in self.groups for write in writes for way in ways]

    def __call__(
        self, x: Float[Tensor, "batch channels_in *n"], weight: Float[Tensor, "diagrams channels_out channels_in"]
    ) -> Float[Tensor, "batch channels_out *n"]:
        done: dict[Read, Tensor] = {}
        sums: dict[tuple[Block, ...], Tensor] = {}
        at, n, C = 0, self.n, weight.shape[1]
        for ways, writes in self.groups:
            axes, count = len(writes[0].crossing), len(ways) * len(writes)
            seen = [
                contract(x, read, self.kind, done, mean=self.kind == "S").permute(0, 1, *(d + 2 for d in turn))
                for read, turn in ways
            ]
            columns = torch.stack(seen, 1).flatten(3) if axes else torch.stack(seen, 1).unsqueeze(3)
            W = weight[at : at + count].unflatten(0, (len(writes), len(ways))).transpose(1, 2)
            Y = W.flatten(2).flatten(0, 1) @ columns.flatten(1, 2)
            Y = Y.view(len(x), len(writes), C, *[n] * axes)
            for i, write in enumerate(writes):
                y = spread(Y[:, i], write)
                sums[write.blocks] = sums[write.blocks] + y if write.blocks in sums else y
            at += count
        if not sums:
            return x.new_zeros(len(x), C, *[n] * self.order_out)
        return put(sums, n, self.order_out, signed=self.kind == "Sp")

    def matrix(self, weight: Float[Tensor, "diagrams channels_out channels_in"]) -> Float[Tensor, "channels_out ..."]:
        """The same as one dense tensor, (channels_out, n, .., n, channels_in, n, .., n); for looking and for small n."""
        n, k, l = self.n, self.order_in, self.order_out
        out = weight.new_zeros(weight.shape[1], weight.shape[2], n**l, n**k)
        for w, one in zip(weight, self.diagrams, strict=True):
            D = entries(one, self.kind, n).to(weight)
            scale = n ** -len(factor(one)[0].summed) if self.kind == "S" else 1.0
            out = out + w[:, :, None, None] * (scale * D)
        return out.transpose(1, 2).reshape(weight.shape[1], *[n] * l, weight.shape[2], *[n] * k)


def applied(
    product: DiagramSum, x: Tensor, weight: Tensor, bias: Tensor | None, bias_product: DiagramSum | None, who: str
) -> Tensor:
    """What the layers share: leading dimensions, and the bias, a sum of diagrams without inputs."""
    n, k, l = product.n, product.order_in, product.order_out
    wanted = (weight.shape[2], *[n] * k)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[max(0, x.ndim - 1 - k) :] != wanted:
        got = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise BadInput(f"{who} needs a floating-point tensor of shape (*, {', '.join(map(str, wanted))}), got {got}")
    lead = x.shape[: x.ndim - 1 - k]
    y = product(x.reshape(lead.numel(), *wanted), weight)
    if bias is not None and bias_product is not None:
        y = y + bias_product(torch.ones(1, 1, device=x.device, dtype=bias.dtype), bias.unsqueeze(2)).to(y.dtype)
    return y.reshape(*lead, weight.shape[1], *[n] * l)

"""Gradients of one output in a model's parameters, kept as factors where these are smaller than the gradient.

A linear layer, a convolution and an embedding multiply their weight by what they read, place by place. With x_t read at
place t and g_t the gradient at what was put out there, the weight's gradient is sum_t g_t x_t^T, and

    <sum_t g_t x_t^T, sum_s h_s y_s^T> = sum_ts (g_t . h_s) (x_t . y_s),

so that the inner product of two such gradients needs neither. What each layer read is in autograd's graph, and so is
every place where a parameter enters it: a weight used twice has two such sums, whose products are all taken; a parameter
that enters in any other way (a bias, a norm's scale, a parametrized weight, one of a module's own) has its gradient
computed as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F

AT_ONCE = 2**21  # places of one block times places of another, in one product
Term = tuple[
    Tensor, Tensor
]  # left (groups, places, rows), or of an embedding the rows read; right (groups, places, columns)
Part = Tensor | list[Term]  # one parameter's gradient, flat, or its factors


class Row(list[Part]):
    """The gradient of one number in every parameter."""

    @property
    def numbers(self) -> int:
        return sum(t.numel() for part in self for t in _tensors(part))

    @property
    def form(self) -> list[list[tuple[torch.Size, torch.dtype]]]:
        """What two rows must have in common to be stacked."""
        return [[(t.shape, t.dtype) for t in _tensors(part)] for part in self]


def _tensors(part: Part) -> list[Tensor]:
    return [part] if isinstance(part, Tensor) else [t for term in part for t in term]


@dataclass(frozen=True)
class _Use:
    """One place where a weight enters the graph.

    edge: what it puts out. size: numbers in its factors. read: what it reads, to be asked for before the graph is freed.
    term: its factors, from what it read and the gradient at what it put out. gradient: which of the two the latter is.
    """

    edge: GradientEdge
    size: int
    read: Callable[[], Tensor]
    term: Callable[[Tensor, Tensor], Term]
    gradient: int


class Gradients:
    """The graph of a flat output, ready to give the gradients of its entries.

    Args: out: (outputs,), as autograd recorded it. params: those that require a gradient. dtype: of the numbers kept.
    """

    def __init__(self, out: Float[Tensor, "outputs"], params: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.out, self.params, self.dtype = out, params, dtype
        consumers = _consumers(out)
        leaves = {id(v): node for node in consumers if (v := getattr(node, "variable", None)) is not None}
        self.uses: dict[int, list[_Use]] = {}
        for k, p in enumerate(params):
            uses = _uses(p, leaves.get(id(p)), consumers)
            if uses and sum(use.size for use in uses) <= p.numel():
                self.uses[k] = uses
        self.read = {k: [use.read().detach().to(dtype, copy=True) for use in uses] for k, uses in self.uses.items()}
        self.plain = [k for k in range(len(params)) if k not in self.uses]

    def row(self, direction: Float[Tensor, "outputs"], *, last: bool) -> Row:
        """The gradient of direction . out; the graph is gone after the `last`."""
        edges = [use.edge for uses in self.uses.values() for use in uses]
        grads: list[Tensor | None] = [None] * (len(edges) + len(self.plain))
        if self.out.requires_grad:
            asked: list[Any] = [*edges, *(self.params[k] for k in self.plain)]
            grads = list(torch.autograd.grad(self.out, asked, direction, retain_graph=not last, allow_unused=True))
        row = Row([[]] * len(self.params))
        at = iter(grads)
        for k, uses in self.uses.items():
            given = [(use, x, g.detach().to(self.dtype)) for use, x, g in zip(uses, self.read[k], at) if g is not None]
            terms = [_without_idle(use.term(x, g), use.gradient) for use, x, g in given]
            row[k] = [term for term in terms if term[1].shape[1]]
        for k, g in zip(self.plain, at, strict=True):
            row[k] = [] if g is None else (g.to_dense() if g.is_sparse else g).detach().to(self.dtype).flatten()
        return row


def _without_idle(term: Term, gradient: int) -> Term:
    """A use without the places that nothing came back to, where these are half of all or more (one token is asked for)."""
    places = term[1].shape[1]
    live = _any(term[gradient]) if places > 1 else term[1].new_ones(1)
    if 2 * int(live.sum()) > places:
        return term
    left, right = term
    return (left[:, live] if left.is_floating_point() else left[live]), right[:, live]


def _any(x: Float[Tensor, "groups places n"]) -> Tensor:
    """Where a place has a number that is not zero (`any` takes ten times as long)."""
    return ((x.amax(2) != 0) | (x.amin(2) != 0)).any(0)


def _consumers(out: Tensor) -> dict[Node, list[tuple[Node, int]]]:
    """Of every node of the graph those that read its output, and at which of their inputs."""
    if out.grad_fn is None:
        return {}
    found: dict[Node, list[tuple[Node, int]]] = {out.grad_fn: []}
    todo = [out.grad_fn]
    while todo:
        node = todo.pop()
        for slot, (child, _) in enumerate(node.next_functions):
            if child is not None:
                if child not in found:
                    found[child] = []
                    todo.append(child)
                found[child].append((node, slot))
    return found


def single_rows(out: Tensor) -> dict[int, int]:
    """The ids of weights and of their biases that enter the graph once, together, in a layer that reads one row."""
    consumers = _consumers(out)
    found = {}
    node: Any  # what it saved is not in its type
    for node in consumers:
        if node.name() != "AddmmBackward0" or (node._saved_alpha, node._saved_beta) != (1, 1):
            continue
        bias, flip = node.next_functions[0][0], node.next_functions[2][0]
        weight = flip.next_functions[0][0] if flip is not None and flip.name() == "TBackward0" else None
        ends = [getattr(leaf, "variable", None) for leaf in (weight, bias)]
        alone = all(e is not None for e in ends) and all(len(consumers[x]) == 1 for x in (weight, flip, bias))
        if alone and len(node._saved_mat1) == 1:
            found[id(ends[0])] = id(ends[1])
    return found


def _uses(p: Tensor, leaf: Node | None, consumers: dict[Node, list[tuple[Node, int]]]) -> list[_Use] | None:
    """Every use of a parameter, if all are products of which the factors are known."""
    uses: list[_Use] = []
    for node, slot in consumers[leaf] if leaf is not None else ():
        flipped = node.name() == "TBackward0"
        for reader, place in consumers[node] if flipped else ((node, slot),):
            one = _use(p, reader, place, flipped)
            if one is None:
                return None
            uses.append(one)
    return uses


def _use(p: Tensor, node: Any, slot: int, flipped: bool) -> _Use | None:
    kind, edge = node.name(), GradientEdge(node, 0)
    if (kind == "AddmmBackward0" and slot == 2 and node._saved_alpha == 1) or (kind == "MmBackward0" and slot == 1):
        x = node._saved_mat1 if slot == 2 else node._saved_self

        def product(x: Tensor, g: Tensor) -> Term:
            x, g = x.unsqueeze(0), g.unsqueeze(0)
            return (g, x) if flipped else (x, g)

        return _Use(edge, len(x) * sum(p.shape), lambda: x, product, 0 if flipped else 1)
    if flipped:
        return None
    if kind == "EmbeddingBackward0" and not node._saved_scale_grad_by_freq:
        index, none = node._saved_indices.flatten(), node._saved_padding_idx

        def rows(x: Tensor, g: Tensor) -> Term:
            return index, (g.flatten(0, -2) * (index != none).unsqueeze(1)).unsqueeze(0)

        return _Use(edge, len(index) * (1 + p.shape[1]), lambda: index[:0], rows, 1)
    if kind == "ConvolutionBackward0" and slot == 1 and not node._saved_transposed:
        return _convolution(p, node, edge)
    return None


def _convolution(p: Tensor, node: Any, edge: GradientEdge) -> _Use | None:
    """Each place of the output is a product with the patch under it."""
    groups, (out, inner, *kernel) = node._saved_groups, p.shape
    stride, padding, dilation = node._saved_stride, node._saved_padding, node._saved_dilation
    x = node._saved_input
    if not len(kernel) == len(stride) == len(padding) == len(dilation) == x.ndim - 2:
        return None
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    places = len(x) * prod((n + 2 * a - span) // s + 1 for n, a, span, s in zip(x.shape[2:], padding, spans, stride))

    def patches() -> Tensor:
        y = F.pad(x.detach(), [a for a in reversed(padding) for _ in range(2)])
        for axis, (span, step, gap) in enumerate(zip(spans, stride, dilation), 2):
            y = y.unfold(axis, span, step)[..., ::gap]  # (examples, channels, *places, *kernel)
        d = 2 + len(kernel)
        return y.unflatten(1, (groups, inner)).movedim(2, d).transpose(0, 1).flatten(d).flatten(1, -2)

    def term(x: Tensor, g: Tensor) -> Term:
        g = g.unflatten(1, (groups, out // groups)).transpose(0, 1).movedim(2, -1)
        return g.flatten(1, -2), x

    return _Use(edge, groups * places * (out // groups + inner * prod(kernel)), patches, term, 0)


class Block(list[Part]):
    """Rows of one form, stacked: gradients (rows, numbers); left and right factors (groups, rows, places, ...)."""

    def __init__(self, rows: list[Row]) -> None:
        super().__init__(_stacked([row[k] for row in rows]) for k in range(len(rows[0])))
        self.rows = len(rows)
        self.numbers = sum(row.numbers for row in rows)


def _stacked(parts: list[Any]) -> Part:
    if isinstance(parts[0], Tensor):
        return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)
    return [
        (torch.stack([p[k][0] for p in parts], int(left.is_floating_point())), torch.stack([p[k][1] for p in parts], 1))
        for k, (left, _) in enumerate(parts[0])
    ]


def product(a: Block, b: Block, params: Sequence[Tensor]) -> Float[Tensor, "rows columns"]:
    """Inner products of the rows of two blocks."""
    total: Any = 0
    for p, left, right in zip(params, a, b, strict=True):
        if not len(left) or not len(right):  # no gradient on one side
            continue
        if isinstance(left, Tensor) or isinstance(right, Tensor):
            total = total + _whole(left, p) @ _whole(right, p).mT
        else:
            for s in left:
                for t in right:
                    total = total + _pairs(s, t)
    return total if isinstance(total, Tensor) else params[0].new_zeros(a.rows, b.rows)


def _whole(part: Part, p: Tensor) -> Float[Tensor, "rows numbers"]:
    """The gradients themselves."""
    if isinstance(part, Tensor):
        return part
    total: Any = 0
    for left, right in part:
        if left.is_floating_point():
            one = torch.einsum("gmtr,gmtc->mgrc", left, right).flatten(1)
        else:
            one = right.new_zeros(len(left), *p.shape)
            for into, index, values in zip(one, left, right[0], strict=True):
                into.index_add_(0, index, values)
            one = one.flatten(1)
        total = total + one
    return total


def _pairs(a: Term, b: Term) -> Float[Tensor, "rows columns"]:
    """sum_ts (left_t . left'_s) (right_t . right'_s) of every row of `a` with every row of `b`."""
    (_, m, t, _), (_, n, s, _) = a[1].shape, b[1].shape
    found = a[1].new_empty(m, n)
    symmetric = a is b
    step = max(1, min(AT_ONCE // (t * n * s), m // 4 if symmetric else m))
    wide = max(1, AT_ONCE // (t * s * step))
    for i in range(0, m, step):
        for j in range(i if symmetric else 0, n, wide):
            (l1, r1), (l2, r2) = (_some(x, k, k + w) for x, k, w in ((a, i, step), (b, j, wide)))
            both = r1.flatten(1, 2) @ r2.flatten(1, 2).mT
            both = both.mul_(_match(l1, l2))
            some = both.view(len(both), r1.shape[1], t, r2.shape[1], s).sum((0, 2, 4))
            found[i : i + step, j : j + wide] = some
            if symmetric:
                found[j : j + wide, i : i + step] = some.mT
    return found


def _some(term: Term, start: int, end: int) -> Term:
    left, right = term
    return (left[:, start:end] if left.is_floating_point() else left[start:end]), right[:, start:end]


def _match(a: Tensor, b: Tensor) -> Tensor:
    """Products of left factors, of which those of an embedding are unit vectors."""
    if a.is_floating_point():
        a = a.flatten(1, 2)
        return a @ b.flatten(1, 2).mT if b.is_floating_point() else a[:, :, b.flatten()]
    if b.is_floating_point():
        return b.flatten(1, 2)[:, :, a.flatten()].mT
    return a.flatten().unsqueeze(1) == b.flatten()

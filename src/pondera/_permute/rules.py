"""What each operation does to the labels of the tensors it meets: the rules that `trace` follows.

An operation ties the labels of the axes it matches entry by entry and passes them on. What an operation does by position (a
table's rows, pixels) fixes the labels it meets: to fix too much loses a symmetry, and never makes a wrong one. A rule gets
the labels in flight, the operation's result and its arguments, and returns the labels of the result.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pondera._permute.labels import InFlight, Label, Labels, combine, fix, flat, leaves, root, split, tensors, tie

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def keep(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return keep


def _broadcast(t: InFlight, shape: Sequence[int], given: Iterable[Labels]) -> Labels:
    """Tie the axes that meet, from the last."""
    out = leaves(shape, fixed=False)
    for labels in given:
        for i, label in enumerate(reversed(labels), 1):
            if label.size == out[-i].size:
                out[-i] = tie(out[-i], label)
    return out


def _pointwise(t: InFlight, out: Any, *args: Any, **kwargs: Any) -> Any:
    given = [t.of(x) for x in tensors((args, kwargs))]
    if isinstance(out, (tuple, list)):
        return [_broadcast(t, x.shape, given) for x in out]
    return _broadcast(t, out.shape, given)


@_rule("copy", "clone", "detach", "alias", "contiguous", "to", "_to_copy", "type_as", "dropout", "fill", "zero")
@_rule("lift_fresh", "masked_fill", "_conj", "resolve_conj", "resolve_neg", "where", "_prelu_kernel")
def _same(t: InFlight, out: Tensor, *args: Any, **kwargs: Any) -> Labels:
    return _pointwise(t, out, *args, **kwargs)


@_rule("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def _symmetric(t: InFlight, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Labels:
    return t.of(x)


@_rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
@_rule("zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor")
def _constant(t: InFlight, out: Tensor, *args: Any, **kwargs: Any) -> Labels:
    return leaves(out.shape, fixed=False)


@_rule("cumsum", "cumprod", "flip", "roll", "sort", "argsort", "topk", "argmax", "argmin", "tril", "triu")
def _by_position(t: InFlight, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    t.fix(x)
    return [leaves(o.shape) for o in out] if isinstance(out, (tuple, list)) else leaves(out.shape)


# layers


@_rule("linear")
def _linear(t: InFlight, out: Tensor, x: Tensor, w: Tensor, b: Tensor | None = None) -> Labels:
    tie(t.of(x)[-1], t.of(w)[-1])
    units = [*t.of(w)[:-1]]
    if b is not None and units:
        tie(units[0], t.of(b)[0])
    return [*t.of(x)[:-1], *units]


@_rule("mm", "bmm")
def _product(t: InFlight, out: Tensor, x: Tensor, y: Tensor, **kwargs: Any) -> Labels:
    a, b = t.of(x), t.of(y)
    tie(a[-1], b[-2])
    return [*(tie(i, j) for i, j in zip(a[:-2], b[:-2])), a[-2], b[-1]]


@_rule("addmm", "baddbmm")
def _added_product(t: InFlight, out: Tensor, c: Tensor, x: Tensor, y: Tensor, **kwargs: Any) -> Labels:
    return _broadcast(t, out.shape, [_product(t, out, x, y), t.of(c)])


@_rule("convolution")
def _convolution(t: InFlight, out: Tensor, x: Tensor, w: Tensor, b: Tensor | None, *args: Any) -> Labels:
    transposed, groups = args[3], args[5]
    whole, inner, *kernel = t.of(w)
    for label in (*kernel, *t.of(x)[2:]):
        fix(label)
    # the axis that counts all groups is a product: whole groups, then channels alike inside every group
    group = Label(groups)
    tie(whole, combine([group, Label(whole.size // groups)], "product"))
    other = combine([group, inner], "product")
    came, made = (whole, other) if transposed else (other, whole)
    tie(t.of(x)[1], came)
    if b is not None:
        tie(t.of(b)[0], made)
    return [t.of(x)[0], root(made), *leaves(out.shape[2:])]


@_rule("layer_norm", "rms_norm")
def _layer_norm(t: InFlight, out: Tensor, x: Tensor, shape: Sequence[int], *affine: Any, **kwargs: Any) -> Labels:
    given = [t.of(a) for a in (*affine, *kwargs.values()) if isinstance(a, Tensor)]
    return _broadcast(t, out.shape, [t.of(x), *given])


@_rule("batch_norm", "instance_norm")
def _channel_norm(t: InFlight, out: Tensor, x: Tensor, *others: Any, **kwargs: Any) -> Labels:
    for a in others[:4]:
        if isinstance(a, Tensor):
            tie(t.of(x)[1], t.of(a)[0])
    return t.of(x)


@_rule("group_norm")
def _group_norm(t: InFlight, out: Tensor, x: Tensor, groups: int, *affine: Any, **kwargs: Any) -> Labels:
    channels = t.of(x)[1]
    tie(channels, combine([Label(groups), Label(channels.size // groups)], "product"))
    for a in (*affine, *kwargs.values()):
        if isinstance(a, Tensor):
            tie(channels, t.of(a)[0])
    return t.of(x)


@_rule("_weight_norm", "_weight_norm_interface")
def _weight_norm(t: InFlight, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> Any:
    labels = _broadcast(t, v.shape, [t.of(v), t.of(g)])
    return [labels, t.of(g)] if isinstance(out, tuple) else labels


@_rule("embedding")
def _embedding(t: InFlight, out: Tensor, w: Tensor, index: Tensor, *args: Any, **kwargs: Any) -> Labels:
    fix(t.of(w)[0])
    t.fix(index)
    return [*t.of(index), *t.of(w)[1:]]


@_rule("scaled_dot_product_attention")
def _attention(
    t: InFlight, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Labels:
    a, b, c = t.of(q), t.of(k), t.of(v)
    for i in range(len(a) - 2):
        tie(b[i], c[i])
        if a[i].size != b[i].size:  # grouped queries: several heads in a row read the same keys
            tie(a[i], combine([b[i], Label(a[i].size // b[i].size)], "product"))
        tie(a[i], b[i])
    tie(a[-1], b[-1])
    tie(b[-2], c[-2])
    if (args[1:] and args[1]) or kwargs.get("is_causal"):
        fix(a[-2]), fix(b[-2])
    if mask is not None:
        _broadcast(t, (*q.shape[:-1], k.shape[-2]), [[*a[:-1], b[-2]], t.of(mask)])
    return [*t.of(q)[:-1], t.of(v)[-1]]


def rule_of(func: Any) -> Rule | None:
    """The rule for an operation; None if it has none of its own."""
    name = func.overloadpacket.__name__.rstrip("_")
    return RULES.get(name) or (_pointwise if torch.Tag.pointwise in func.tags else _spatial(name))


def _spatial(name: str) -> Rule | None:
    """Pooling and resampling: the last axes are places, those before pass."""
    found = re.fullmatch(
        r"_?(?:adaptive_)?(?:avg|max)_pool(\d)d(?:_with_indices)?|_?upsample_[a-z]+(\d)d(?:_aa)?", name
    )
    if not found:
        return None
    n = int(found[1] or found[2])

    def rule(t: InFlight, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for label in t.of(x)[-n:]:
            fix(label)
        first = out[0] if isinstance(out, tuple) else out
        labels = [*t.of(x)[:-n], *leaves(first.shape[-n:])]
        return [labels] * len(out) if isinstance(out, tuple) else labels

    return rule


# shapes


@_rule("view", "_unsafe_view", "reshape", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as", "ravel")
def _view(t: InFlight, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Labels:
    if out.shape == x.shape:
        return t.of(x)
    if out.numel() == 0:
        return _constant(t, out)
    left = [f for label in t.of(x) for f in flat(label, "product") if f.size > 1]
    labels: Labels = []
    for size in out.shape:
        taken: Labels = []
        while size > 1:
            f = left.pop(0)
            if f.size > size:
                halves = split(f, "product", size) if f.size % size == 0 else None
                if halves is None:
                    return _cut(out, [f, *taken, *left], labels)
                f = halves[0]
                left.insert(0, halves[1])
            elif size % f.size:
                return _cut(out, [f, *taken, *left], labels)
            taken.append(f)
            size //= f.size
        labels.append(combine(taken, "product") if taken else Label(1))
    return labels


def _cut(out: Tensor, rest: Labels, labels: Labels) -> Labels:
    """A view that does not divide along the axes there are: from here on everything has its order."""
    for label in rest:
        fix(label)
    return [*labels, *leaves(out.shape[len(labels) :])]


@_rule("t", "transpose", "numpy_T", "mT", "swapaxes")
def _transpose(t: InFlight, out: Tensor, x: Tensor, i: int = -1, j: int = -2) -> Labels:
    labels = t.of(x)
    if len(labels) > 1:
        labels[i], labels[j] = labels[j], labels[i]
    return labels


@_rule("permute")
def _permute(t: InFlight, out: Tensor, x: Tensor, dims: Sequence[int]) -> Labels:
    return [t.of(x)[d] for d in dims]


@_rule("unsqueeze")
def _unsqueeze(t: InFlight, out: Tensor, x: Tensor, dim: int) -> Labels:
    labels = t.of(x)
    labels.insert(dim % out.ndim, Label(1))
    return labels


@_rule("squeeze")
def _squeeze(t: InFlight, out: Tensor, x: Tensor, dim: Any = None) -> Labels:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % x.ndim for d in dims} if x.ndim else set()
    return [label for d, label in enumerate(t.of(x)) if d not in gone or label.size != 1]


@_rule("expand", "expand_as", "broadcast_to")
def _expand(t: InFlight, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Labels:
    return _broadcast(t, out.shape, [t.of(x)])


@_rule("repeat")
def _repeat(t: InFlight, out: Tensor, x: Tensor, repeats: Sequence[int]) -> Labels:
    old = [*leaves([1] * (len(repeats) - x.ndim)), *t.of(x)]
    return [combine([Label(n), label], "product") for n, label in zip(repeats, old)]


@_rule("select")
def _select(t: InFlight, out: Tensor, x: Tensor, dim: int, index: int) -> Labels:
    labels = t.of(x)
    fix(labels.pop(dim))
    return labels


@_rule("unbind")
def _unbind(t: InFlight, out: Any, x: Tensor, dim: int = 0) -> list[Labels]:
    labels = t.of(x)
    fix(labels.pop(dim))
    return [labels for _ in out]


def _terms(label: Label, sizes: Sequence[int]) -> Labels:
    """An axis cut into pieces of these sizes."""
    pieces = [Label(n) for n in sizes]
    whole = combine(pieces, "sum")
    tie(label, whole)
    return pieces


@_rule("slice")
def _slice(
    t: InFlight, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Labels:
    labels = t.of(x)
    n, kept = x.shape[dim], out.shape[dim]
    if n == kept:
        return labels
    first, _, step = slice(start, end, step).indices(n)
    if step != 1 or not kept:
        fix(labels[dim])
        labels[dim] = Label(kept, fixed=True)
    else:
        sizes = [first, kept, n - first - kept]
        labels[dim] = root(_terms(labels[dim], sizes)[1])
    return labels


@_rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk")
def _split_rule(t: InFlight, out: Any, x: Tensor, size: Any, dim: int = 0) -> list[Labels]:
    labels = t.of(x)
    pieces = _terms(labels[dim], [part.shape[dim] for part in out])
    dim %= x.ndim
    return [[*labels[:dim], piece, *labels[dim + 1 :]] for piece in pieces]


@_rule("cat", "concat", "concatenate")
def _cat(t: InFlight, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> Labels:
    parts = [x for x in parts if x.ndim == out.ndim]  # an old courtesy lets an empty vector through
    dim %= out.ndim
    labels = [t.of(x) for x in parts]
    return [
        combine([ls[d] for ls in labels], "sum") if d == dim else _broadcast(t, [n], [[ls[d]] for ls in labels])[0]
        for d, n in enumerate(out.shape)
    ]


@_rule("stack")
def _stack(t: InFlight, out: Tensor, parts: Sequence[Tensor], dim: int = 0) -> Labels:
    labels = _pointwise(t, parts[0], *parts)
    labels.insert(dim % out.ndim, Label(len(parts), fixed=True))
    return labels


@_rule("constant_pad_nd")
def _pad(t: InFlight, out: Tensor, x: Tensor, pad: Sequence[int], value: float = 0) -> Labels:
    labels = t.of(x)
    for i in range(len(pad) // 2):
        low, high = pad[2 * i : 2 * i + 2]
        label = labels[-1 - i]
        if low < 0 or high < 0:
            fix(label)
            labels[-1 - i] = Label(out.shape[-1 - i], fixed=True)
        elif low or high:  # zeros may be reordered among themselves
            labels[-1 - i] = combine([Label(low), label, Label(high)], "sum")
    return labels


@_rule("index", "_unsafe_index")
def _index(t: InFlight, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Labels:
    labels = t.of(x)
    dims = [d for d, i in enumerate(indices) if i is not None]
    masks = any(indices[d].dtype in (torch.bool, torch.uint8) for d in dims)
    if masks or dims != list(range(dims[0], dims[-1] + 1)):
        return _by_position(t, out, x)
    for d in dims:
        fix(labels[d])
    new = out.ndim - (x.ndim - len(dims))
    return [*labels[: dims[0]], *leaves(out.shape[dims[0] : dims[0] + new]), *labels[dims[-1] + 1 :]]


@_rule("index_select")
def _index_select(t: InFlight, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Labels:
    labels = t.of(x)
    fix(labels[dim])
    labels[dim] = Label(out.shape[dim], fixed=True)
    return labels


# reductions


@_rule("sum", "mean", "amax", "amin", "prod", "var", "std", "all", "any", "logsumexp", "norm", "linalg_vector_norm")
@_rule("var_mean", "std_mean")
def _reduce(t: InFlight, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    first = out[0] if isinstance(out, tuple) else out
    if first.ndim == 0:
        labels: Labels = []
    else:
        dims = kwargs.get("dim", next((a for a in args if isinstance(a, (list, tuple))), None))
        if dims is None and args and isinstance(args[0], int):
            dims = [args[0]]
        if dims is None:
            raise ValueError("a reduction without its axes")
        gone = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims)} or set(range(x.ndim))
        kept = first.ndim == x.ndim
        labels = [Label(1) if d in gone else label for d, label in enumerate(t.of(x)) if kept or d not in gone]
    return [labels] * len(out) if isinstance(out, tuple) else labels


@_rule("max", "min")
def _extreme(t: InFlight, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if isinstance(out, Tensor):
        others = [a for a in args if isinstance(a, Tensor)]
        return _pointwise(t, out, x, *others) if others else []
    dim = args[0] if args else kwargs["dim"]
    labels = t.of(x)
    fix(labels[dim])  # it also says where
    labels[dim] = Label(1)
    if out[0].ndim < x.ndim:
        labels.pop(dim)
    return [labels, labels]

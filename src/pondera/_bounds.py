"""Interval bound propagation: bounds of a model's outputs over a box of inputs, by running its own forward on intervals.

A `Box` goes through the model in a tensor's place. It answers every torch function that forward calls by the rule for
its kind, and refuses the ones it has no rule for:

    affine in the input, y = W x + b      c -> W c + b,  r -> |W| r   with centre c = (l + u) / 2, radius r = (u - l) / 2
    rising in every input                 l -> f(l),  u -> f(u)
    rising or falling in one input        the smaller and the larger of f(l), f(u)

Bounds are sound up to rounding: the arithmetic does not round outward. They are differentiable in the weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pondera.errors import BadInput, all_finite, describe, require_finite, require_float

Eps: TypeAlias = "float | Tensor"
Clip: TypeAlias = "tuple[float | Tensor, float | Tensor] | None"

METADATA = {
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_meta", "is_leaf", "is_sparse",
    "is_quantized", "is_nested", "len", "size", "dim", "numel", "nelement", "ndimension", "stride", "is_contiguous",
    "is_floating_point", "is_complex", "get_device", "hash",
}  # fmt: skip
AFFINE = {"linear", *(f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3))}
PRODUCTS = {"matmul", "rmatmul", "mm", "bmm"}  # affine too where one factor is fixed
# rising elementwise
ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "softplus", "softsign", "sigmoid", "log_sigmoid", "hardsigmoid",
    "hardtanh", "tanh", "atan", "erf", "exp",
}  # fmt: skip
SLOPED = {"leaky_relu", "elu", "celu"}  # rising only while their slope below zero is not negative
SELECTIONS = {"clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "amax", "amin"}
SELECTIONS |= {f"{a}max_pool{d}d" for a in ("", "adaptive_") for d in (1, 2, 3)}
# rising and affine: weights that are not negative, and changes of shape
SUMS = {"add", "radd"}
RISING = {
    "mean", "sum", "flatten", "unflatten", "reshape", "reshape_as", "view", "view_as", "permute", "transpose",
    "swapaxes", "movedim", "t", "T", "mT", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "contiguous", "clone",
    "detach", "to", "float", "double", "half", "bfloat16", "type_as", "getitem", "narrow", "select", "index_select", "cat",
    "concat", "stack", "chunk", "split", "unbind", "pad", "flip", "roll", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle",
}  # fmt: skip
RISING |= {f"{a}avg_pool{d}d" for a in ("", "adaptive_") for d in (1, 2, 3)}
DIVISION = {"div", "divide", "true_divide", "truediv"}
EITHER_WAY = {"sub", "subtract", "rsub", "mul", "multiply", "rmul", "neg"} | DIVISION
DROPOUT = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
IN_PLACE = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "truediv"}


class Box(Tensor):
    """An interval for every entry of a tensor; to a model's forward it is a tensor of that shape.

    lower, upper: the ends. value: the clean value, carried along: training-mode BatchNorm takes its statistics from it.
    entered: shared by all boxes of a pass, the (lower, upper) that entered each ReLU; None keeps none. last: centre,
    radius, weight and bias of the linear layer that made this box, for folding another matrix into it.
    """

    lower: Tensor
    upper: Tensor
    value: Tensor
    entered: list[tuple[Tensor, Tensor]] | None
    last: tuple[Tensor, Tensor, Tensor, Tensor | None] | None

    def __new__(cls, lower: Tensor, upper: Tensor, value: Tensor, entered: list | None = None) -> "Box":
        box = Tensor._make_wrapper_subclass(cls, lower.shape, dtype=lower.dtype, device=lower.device)
        box.lower, box.upper, box.value, box.entered, box.last = lower, upper, value, entered, None
        return box

    @property
    def centre(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def with_parts(self, lower: Tensor, upper: Tensor, value: Tensor) -> "Box":
        return type(self)(lower, upper, value, self.entered)

    def rising(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`func` of each end; an in-place one changes the ends in place, so that views see it as they would."""
        ends = [func(*part(args, p), **part(kwargs, p)) for p in ("lower", "upper", "value")]
        if isinstance(ends[0], (tuple, list)):
            return tuple(self.with_parts(*each) for each in zip(*ends, strict=True))
        if ends[0] is self.lower and self.shape == ends[0].shape:
            return self
        return self.with_parts(*ends)

    def bend(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, in_place: bool
    ) -> Any:
        """A rising function that is not affine. A subclass may have another rule for it."""
        return self.rising(func, args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        boxes = list(boxes_in((*args, *kwargs.values())))
        if name in AFFINE:
            return _affine(func, args, kwargs, name)
        if name in PRODUCTS and len(boxes) == 1:
            return _product(func, args, boxes[0])
        if name == "batch_norm":
            return _batch_norm(func, *args, **kwargs)
        if name in DROPOUT:
            return _dropout(*args, **kwargs)
        return _elementwise_or_rising(func, args, kwargs, name, boxes)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise BadInput(f"interval bounds met {func}, called past torch's functions, and have no rule for it")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(lower={self.lower!r}, upper={self.upper!r})"


def name_of(func: Any) -> str:
    """One name for a function, its method, its operator and its in-place forms: add, add_, __add__, __iadd__ -> "add".

    >>> name_of(Tensor.__iadd__), name_of(torch.relu_), name_of(Tensor.shape.__get__)
    ('add', 'relu', 'shape')
    """
    if func.__name__ == "__get__":
        return func.__self__.__name__
    return IN_PLACE.get(func.__name__, func.__name__.strip("_"))


def boxes_in(x: Any) -> Iterator[Box]:
    if isinstance(x, Box):
        yield x
    elif isinstance(x, (tuple, list)):
        for each in x:
            yield from boxes_in(each)


def part(x: Any, name: str) -> Any:
    """`x` with every box replaced by one of its parts."""
    if isinstance(x, Box):
        return getattr(x, name)
    if isinstance(x, dict):
        return {k: part(v, name) for k, v in x.items()}
    return type(x)(part(each, name) for each in x) if type(x) in (tuple, list) else x


def _elementwise_or_rising(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, boxes: list[Box]
) -> Any:
    """Every rule but those of layers with weights."""
    first = boxes[0]
    in_place = func.__name__ == f"{name}_" or func.__name__ in IN_PLACE or kwargs.get("inplace") is True
    fixed_first = bool(args) and isinstance(args[0], Tensor) and args[0] is not first
    if "out" in kwargs or (in_place and fixed_first):
        raise BadInput(f"interval bounds cannot follow a {name} that writes into a tensor that is not bounded")
    if in_place:
        first.last = None
    if name == "relu" and first.entered is not None:
        first.entered.append((first.lower.clone(), first.upper.clone()) if in_place else (first.lower, first.upper))
    if name in SLOPED:
        slope = kwargs.get("negative_slope", kwargs.get("alpha", args[1] if len(args) > 1 else 0.0))
        if slope < 0:
            raise BadInput(f"interval bounds know {name} only where it rises, and its slope below zero is {slope:g}")
    if name in ACTIVATIONS or name in SELECTIONS:
        return first.bend(func, args, kwargs, name=name, in_place=in_place)
    if kwargs.get("alpha", 1) == 1:
        if name in SUMS or (name in RISING and not fixed_first):
            return first.rising(func, args, kwargs)
        if name in EITHER_WAY and not (name in DIVISION and fixed_first):
            return _either_way(func, args, kwargs, name, boxes, in_place)
    raise BadInput(
        f"interval bounds have no rule for {name} of {len(boxes)} bounded tensor{'s'[: len(boxes) > 1]}: they know "
        "linear and convolution layers, BatchNorm, rising activations (ReLU, tanh, ...), pooling, sums and reshaping"
    )


def _product(func: Any, args: tuple[Any, ...], x: Box) -> Box:
    """The product of matrices, one of which is fixed."""
    c = func(*(x.centre if a is x else a for a in args))
    r = func(*(x.radius if a is x else a.abs() for a in args))
    return x.with_parts(c - r, c + r, func(*part(args, "value")))


def _affine(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Box:
    """W x + b for linear and convolution layers."""
    named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, w, b = named.pop("input"), named.pop("weight"), named.pop("bias", None)
    if not isinstance(x, Box) or isinstance(w, Box) or isinstance(b, Box):
        raise BadInput(f"interval bounds need a {name} whose input is bounded and whose weight and bias are fixed")
    c, r = x.centre, x.radius
    y, spread = func(c, w, b, *args[3:], **named), func(r, w.abs(), None, *args[3:], **named)
    out = x.with_parts(y - spread, y + spread, func(x.value, w, b, *args[3:], **named))
    out.last = (c, r, w, b) if name == "linear" else None
    return out


def _either_way(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, boxes: list[Box], in_place: bool
) -> Box:
    """What rises or falls in one bounded tensor, and the difference of two."""
    x = boxes[0]
    if in_place:
        args = tuple(a.with_parts(a.lower.clone(), a.upper.clone(), a.value.clone()) if a is x else a for a in args)
        boxes = [next(boxes_in(args)), *boxes[1:]]
    if len(boxes) == 1:
        a, b, value = (func(*part(args, p), **part(kwargs, p)) for p in ("lower", "upper", "value"))
        new = x.with_parts(torch.minimum(a, b), torch.maximum(a, b), value)
    elif name in ("sub", "subtract"):
        p, q = boxes
        new = x.with_parts(func(p.lower, q.upper), func(p.upper, q.lower), func(p.value, q.value))
    else:
        raise BadInput(f"interval bounds have no rule for {name} of two bounded tensors: one factor must be fixed")
    if not in_place:
        return new
    for old, now in zip((x.lower, x.upper, x.value), (new.lower, new.upper, new.value), strict=True):
        old.copy_(now)
    return x


def _batch_norm(
    func: Any,
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Box:
    """A fixed affine map by channel. In training mode its statistics are those of the clean batch, whatever the box."""
    value = func(x.value, running_mean, running_var, weight, bias, training, momentum, eps)
    if training or running_mean is None or running_var is None:
        every = [d for d in range(x.ndim) if d != 1]
        var, mean = torch.var_mean(x.value, dim=every, correction=0)
    else:
        mean, var = running_mean, running_var
    shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    c, r = x.centre * scale.view(shape) + shift.view(shape), x.radius * scale.abs().view(shape)
    return x.with_parts(c - r, c + r, value)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool | None = None) -> Box:
    if p and (training if train is None else train):
        raise BadInput(
            f"interval bounds need a function without chance, and dropout of {p:g} is active; call eval() first"
        )
    return x


def propagate(
    model: nn.Module,
    x: Float[Tensor, "batch *features"],
    eps: Eps,
    *,
    clip: Clip = None,
    entered: list[tuple[Tensor, Tensor]] | None = None,
    who: str = "interval_bounds",
) -> Box:
    """The box of `model`'s output when every entry of its input may move by `eps` within `clip`."""
    require_finite(x, who, "input")
    if x.numel() == 0:
        raise BadInput(f"{who} needs inputs, got an empty {describe(x)}")
    lower, upper = box_around(x, eps, clip, who)
    return run(model, Box(lower, upper, x.clone(), entered), who)


def run(model: Callable[[Box], Any], box: Box, who: str) -> Box:
    """The box that comes out; BadInput in one sentence where none does."""
    try:
        out = model(box)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:400] or "no message"
        raise BadInput(
            f"{who} could not run the model on a {describe(box.value)}: {type(error).__name__}: {said}"
        ) from error
    if not isinstance(out, Box):
        raise BadInput(f"{who} needs a model whose output is one tensor made from its input, got {type(out).__name__}")
    return out


def box_around(x: Tensor, eps: Eps, clip: Clip, who: str) -> tuple[Tensor, Tensor]:
    """The ends x - eps and x + eps, cut to the range `clip`."""
    size = _fitting(eps, x, f"{who} needs an eps")
    if not (torch.isfinite(size).all() and (size >= 0).all()):
        raise BadInput(f"{who} needs a finite eps of at least 0, got {eps}")
    if clip is None:
        return x - size, x + size
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise BadInput(f"{who} needs a clip of two ends (low, high), got {clip}")
    low, high = (_fitting(end, x, f"{who} needs ends of clip") for end in clip)
    if not ((low <= x).all() and (x <= high).all()):
        raise BadInput(
            f"{who} needs inputs within clip={clip}, got numbers from {float(x.min()):.4g} to {float(x.max()):.4g}"
        )
    return torch.maximum(x - size, low), torch.minimum(x + size, high)


def _fitting(given: Eps, x: Tensor, needs: str) -> Tensor:
    """A number or tensor with the dtype and device of `x`, broadcasting to it."""
    try:
        t = torch.as_tensor(given, dtype=x.dtype, device=x.device)
        torch.broadcast_to(t, x.shape)
    except (TypeError, ValueError, RuntimeError) as error:
        got = describe(given) if isinstance(given, Tensor) else repr(given)
        raise BadInput(f"{needs} (number or tensor) that broadcasts to the {describe(x)}, got {got}") from error
    return t


def interval_bounds(
    model: nn.Module, x: Float[Tensor, "batch *features"], eps: Eps, *, clip: Clip = None
) -> tuple[Float[Tensor, "batch *out"], Float[Tensor, "batch *out"]]:
    r"""Bounds of a model's outputs when each entry of its input may move by `eps`, by interval bound propagation.

    .. math:: l = \mu - r, \; u = \mu + r, \qquad \mu \to W \mu + b, \; r \to |W| r; \qquad
              l \to \phi(l), \; u \to \phi(u) \; \text{for rising } \phi

    The model's forward runs once, on boxes instead of numbers: linear and convolution layers, BatchNorm, rising
    activations, pooling, dropout in eval mode, sums, differences, products with constants, concatenation, reshaping
    and indexing, in modules or in plain code. Anything else is refused by name. In training mode BatchNorm takes its
    statistics from the clean batch and then acts as a fixed affine map (and updates its running statistics, as
    forward does).

    Args:
        model: the model, in the mode in which it is to be bounded.
        x: a batch of inputs.
        eps: largest change of an entry, at least 0; a tensor broadcasts to `x` (for data divided by a standard
            deviation a channel, eps divided by it).
        clip: (low, high), the range inputs can take, such as (0, 1) for pixels; numbers or tensors. None: all numbers.
    Returns: (lower, upper), differentiable in the weights. No input of the box has an output outside them, up to
        rounding; they are exact for one linear layer and loosen with every further one.
    Raises: BadInput: for an operation without a rule, active dropout, an input outside `clip`, empty, or not finite, an
        eps below 0, a model that does not fit the batch, and bounds that are not finite.
    Paper: Gowal et al. 2018, arXiv 1810.12715 (IBP); BatchNorm's statistics as in Shi et al. 2021, arXiv 2103.17268.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     w, b = layer.weight.copy_(torch.tensor([[2.0, -1.0]])), layer.bias.zero_()
    >>> [t.tolist() for t in interval_bounds(layer, torch.tensor([[0.5, 0.5]]), 0.25)]
    [[[-0.25]], [[1.25]]]
    """
    out = propagate(model, x, eps, clip=clip)
    for end in (out.lower, out.upper):
        _require_finite_bounds(end, "interval_bounds")
    return out.lower, out.upper


def margin_bounds(
    model: nn.Module, x: Float[Tensor, "batch *features"], labels: Int[Tensor, "batch"], eps: Eps, *, clip: Clip = None
) -> Float[Tensor, "batch others"]:
    r"""Lower bounds of each margin: the label's output minus the output of every other class, in the classes' order.

    .. math:: \underline m_j = \min\nolimits_{IBP} \, (e_y - e_j)^T (W h + b)

    Where the model ends in a linear layer, the difference of classes is folded into its weight before the absolute
    value is taken, which is tighter than subtracting bounds of outputs. An input whose margins are all above 0 is
    verified: nothing in its box is put into another class.

    Args:
        model, x, eps, clip: as in `interval_bounds`; the model puts out one number a class.
        labels: the class of each input.
    Returns: one lower bound for every other class.
    Raises: BadInput: as in `interval_bounds`, and for labels that do not fit the outputs.
    Paper: Gowal et al. 2018, arXiv 1810.12715, Sec. 3 (there called elision of the last layer).

    >>> layer = nn.Linear(1, 2)
    >>> with torch.no_grad():
    ...     w, b = layer.weight.copy_(torch.tensor([[2.0], [1.0]])), layer.bias.zero_()
    >>> margin_bounds(layer, torch.tensor([[1.0]]), torch.tensor([0]), 0.5).tolist()  # by outputs: 1 - 1.5
    [[0.5]]
    """
    c, r = margins(propagate(model, x, eps, clip=clip, who="margin_bounds"), labels, "margin_bounds")
    return _require_finite_bounds(c - r, "margin_bounds")


def margins(out: Box, labels: Tensor, who: str) -> tuple[Float[Tensor, "batch others"], Float[Tensor, "batch others"]]:
    """Centre and radius of the margins, the last linear layer folded in."""
    rows = class_differences(out, labels, who)
    if out.last is None or out.last[0].ndim != 2:
        return (rows @ out.centre.unsqueeze(-1)).squeeze(-1), (rows.abs() @ out.radius.unsqueeze(-1)).squeeze(-1)
    c, r, w, b = out.last
    folded = rows @ w
    centre = (folded @ c.unsqueeze(-1)).squeeze(-1)
    return centre if b is None else centre + rows @ b, (folded.abs() @ r.unsqueeze(-1)).squeeze(-1)


def class_differences(out: Tensor, labels: Tensor, who: str) -> Float[Tensor, "batch others classes"]:
    """The rows e_y - e_j for every class j but the label y, in the classes' order."""
    if out.ndim != 2 or out.shape[1] < 2:
        raise BadInput(f"{who} needs outputs of shape (batch, classes), at least two classes, got {tuple(out.shape)}")
    n, classes = out.shape
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (n,):
        got = describe(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise BadInput(f"{who} needs {n} integer labels, got {got}")
    if not ((labels >= 0).all() and (labels < classes).all()):
        raise BadInput(
            f"{who} needs labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())} among them"
        )
    eye = torch.eye(classes, dtype=out.dtype, device=out.device)
    own = eye[labels]
    return (own.unsqueeze(1) - eye)[own == 0].view(n, classes - 1, classes)


def _require_finite_bounds(bound: Tensor, who: str) -> Tensor:
    require_float(bound, who, "bound")
    if not all_finite(bound):
        raise BadInput(
            f"{who} got bounds that are not finite: weights with NaN or infinity, or bounds that overflow {bound.dtype}"
        )
    return bound

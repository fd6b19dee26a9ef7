"""Gradients of a model's outputs in its trainable parameters, one example at a time, and their inner products.

With theta the parameters that require a gradient and f(x_i) the outputs of example i, flattened, a tangent is a row

    g_ir = u_ir^T df(x_i)/dtheta

for a direction u_ir in output space: a unit vector gives a row of the Jacobian, a constant vector the gradient of the sum
of logits. `gram` multiplies such rows, parameter by parameter, without computing those of which the factors will do.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pondera.errors import BadInput, describe, require_extra, require_finite
from pondera.probe._factors import Block, Gradients, Row, product, single_rows
from pondera.probe._untouched import arguments, in_words, run, scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 2**25  # numbers in one block of tangents (128 MiB in float32)
AT_ONCE = 2**23  # numbers in the tangents of one vectorised call
PARTS = 8  # blocks of factors that memory is divided into
MANY = 512  # tangents in one such call at most, since it holds the activations of all of them
Leaves = tuple[Tensor, ...]
Single = dict[str, tuple[nn.Linear, str]]  # by a weight's name its layer and the name of its bias
Part = tuple[Tensor, Tensor | None]  # rows (n, r, size) of a parameter; of a `_single` bias also what its layer read


@dataclass(frozen=True)
class TangentKernel:
    """Inner products of the gradients of a model's outputs, example by example.

    Attributes:
        kernel: (N, N2), or (N, N2, C, C) when it holds every pair of outputs.
        outputs: of the model on the first batch, flattened by example.
        parameters: number of trainable parameters.
        square: whether both batches are the same one, so that the kernel is symmetric and has eigenvalues.
    """

    kernel: Float[Tensor, "n n2 *c_c"]
    outputs: Float[Tensor, "n c"]
    parameters: int
    square: bool

    @cached_property
    def eigenvalues(self) -> Float[Tensor, "rows"]:
        """Of the kernel as one symmetric matrix, largest first; empty for two different batches."""
        if not self.square:
            return self.kernel.new_zeros(0)
        return torch.linalg.eigvalsh(as_one(self.kernel).double()).flip(0).clamp_min(0)

    def summary(self) -> str:
        """The finding in plain words."""
        n, n2 = self.kernel.shape[:2]
        of = f"{n} examples" if self.square else f"{n} by {n2} examples"
        outputs = f" and {self.kernel.shape[2]} outputs" if self.kernel.ndim == 4 else ""
        head = f"Tangent kernel of {of}{outputs}, {self.parameters:,} trainable parameters."
        if not self.square:
            return f"{head} Entries from {self.kernel.min():.3g} to {self.kernel.max():.3g}."
        w = self.eigenvalues
        if not w[0] > 0:
            return f"{head} It is zero: no output depends on a trainable parameter."
        rank = w.sum().square() / w.square().sum()
        return (
            f"{head} Largest eigenvalue {w[0]:.3g} ({w[0] / w.sum():.0%} of the trace), median {w.median():.3g}; "
            f"effective rank {rank:.1f} of {len(w)}. Gradient flow learns the leading component first, "
            f"{_times(w[0], w.median())} as fast as the median one."
        )

    def plot(self) -> "Figure":
        """The spectrum and the kernel, averaged over outputs (a matplotlib figure)."""
        require_extra("TangentKernel.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(9, 3.6) if self.square else (5, 3.6), layout="constrained")
        panels = fig.subplots(1, 1 + self.square, squeeze=False)[0]
        if self.square:
            w = self.eigenvalues.cpu()
            shown = w[w > 1e-12 * w[:1]]
            panels[0].loglog(range(1, len(shown) + 1), shown.tolist(), "o-", ms=3, color="#4477aa")
            panels[0].set(xlabel="component", ylabel="eigenvalue", title=f"{len(shown)} of {len(w)} above rounding")
        pairs = self.kernel.ndim == 4
        k = self.kernel.diagonal(dim1=2, dim2=3).mean(-1) if pairs else self.kernel
        picture = panels[-1].imshow(k.cpu().float().numpy(), aspect="auto", cmap="viridis")
        fig.colorbar(picture, ax=panels[-1], label="kernel, mean over outputs" if pairs else "kernel")
        panels[-1].set(xlabel="example", ylabel="example")
        return fig


def _times(a: Tensor, b: Tensor) -> str:
    return f"{a / b:.3g} times" if b > 1e-12 * a else "more than 1e12 times"


def as_one(kernel: Float[Tensor, "n n2 *c_c"]) -> Float[Tensor, "rows columns"]:
    """A kernel (N, N2, C, C) as the matrix (N C, N2 C), examples major; one of (N, N2) as it is."""
    return kernel.transpose(1, 2).flatten(2, 3).flatten(0, 1) if kernel.ndim == 4 else kernel


@dataclass(frozen=True)
class Seen:
    """A batch ready to be taken apart: its tensors, a way to run the model on some of its examples, the scores."""

    leaves: Leaves
    call: Callable[[Callable[..., Any], Leaves], Any]
    scores: Float[Tensor, "n *outputs"]

    @property
    def out(self) -> Float[Tensor, "n outputs"]:
        """The scores, flattened by example."""
        return self.scores.reshape(len(self.scores), -1)

    def empty(self, *shape: int) -> Tensor:
        """Room for numbers in float32, or better where the scores are."""
        return self.scores.new_empty(shape, dtype=torch.promote_types(self.scores.dtype, torch.float32))

    def __len__(self) -> int:
        return len(self.scores)


def trainable(model: nn.Module, who: str) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, each once; BadInput where there is none or one holds NaN."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    if not found:
        raise BadInput(f"{who} needs a model with parameters that require a gradient, and found none")
    for name, p in found.items():
        if not all(
            math.isfinite(float(x)) for x in torch.aminmax(p.detach())
        ):  # a NaN is both; no mask of the size of p
            require_finite(p.detach(), who, name)
    return found


def look(model: nn.Module, batch: Any, who: str) -> Seen:
    """Run `model` on `batch` once and check that both have the same examples on their first axis."""
    args, kwargs = arguments(batch, who)
    given = (*args, *kwargs.values())
    places = [i for i, t in enumerate(given) if isinstance(t, Tensor)]
    leaves = tuple(given[i] for i in places)
    sizes = {t.shape[0] if t.ndim else None for t in leaves}
    if len(sizes) > 1 or None in sizes:
        raise BadInput(
            f"{who} needs the examples on the first axis of every tensor of its batch, got "
            + " and ".join(describe(t) for t in leaves)
        )

    def call(f: Callable[..., Any], some: Leaves) -> Any:
        full = list(given)
        for i, t in zip(places, some, strict=True):
            full[i] = t
        return f(*full[: len(args)], **dict(zip(kwargs, full[len(args) :], strict=True)))

    with torch.no_grad():
        out = require_finite(scores(run(model, batch, who), who), who, "model's output")
    if not out.ndim or len(out) != len(leaves[0]) or not out.numel():
        raise BadInput(
            f"{who} needs one row of outputs an example, got a {describe(out)} for {len(leaves[0])} examples"
        )
    return Seen(leaves, call, out)


def gram(
    model: nn.Module,
    first: Seen,
    u: Float[Tensor, "n r outputs"],
    second: Seen | None,
    v: Float[Tensor, "n2 r outputs"] | None,
    who: str,
    *,
    block: int = BLOCK,
) -> Float[Tensor, "n n2 r r"]:
    """Inner products g_ir . g_js of the tangents of two batches, in float32 or better; `second` None: of one batch.

    Where all rows fit into one block, they are computed at once and multiplied. Otherwise the examples run one at a
    time, and of each parameter's gradient the smaller is kept, itself or its factors; as much as two blocks hold, or two
    gradients where these are larger, is in memory at any time, and what did not find room is computed again.
    """
    params = trainable(model, who)
    sides = [(first, u)] if second is None or v is None else [(first, u), (second, v)]
    (n, r, _), (m, s, _) = sides[0][1].shape, sides[-1][1].shape
    rows, linear = max(n * r, m * s), _linear(model, params)
    size = sum(p.numel() for name, p in params.items() if name not in linear)
    single = _single(model, params, linear, first, who) if rows * size <= block else {}
    size = sum(single[name][0].in_features if name in single else p.numel() for name, p in params.items())
    parts = None if rows * size > block else tangents(model, params, single, sides, who, block)
    kernel = _streamed(model, list(params.values()), sides, who, block) if parts is None else _multiplied(*parts)
    return require_finite(kernel.view(n, r, m, s).transpose(1, 2).contiguous(), who, "kernel")


def _multiplied(left: list[Part], right: list[Part] | None = None) -> Float[Tensor, "rows columns"]:
    """The products of all rows, summed over the parameters."""
    (n, r, _), (m, s, _) = left[0][0].shape, (right or left)[0][0].shape
    kernel = left[0][0].new_zeros(n * r, m * s)
    step = max(80, -(-n * r // 4)) if right is None else n * r
    bands = [slice(k, min(k + step, n * r)) for k in range(0, n * r, step)]
    for (x, read), (y, met) in zip(left, right or left, strict=True):
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        if read is not None and met is not None:  # g x^T and g, whose products are (g . g') (x . x') and g . g'
            both = (x @ y.mT).view(n, r, m, s)
            kernel += both.mul_((read @ met.mT + 1)[:, None, :, None]).view_as(kernel)
            continue
        for band in bands:
            end = band.stop if right is None else m * s  # right of a band lies the mirror of what is below it
            kernel[band, :end].addmm_(x[band], y[:end].mT)
    for band in bands if right is None else ():
        kernel[band, band.stop :] = kernel[band.stop :, band].mT
    return kernel


def _linear(model: nn.Module, params: dict[str, nn.Parameter]) -> Single:
    """The weights of plain linear layers with a bias, both of them trainable."""
    names = {id(p): name for name, p in params.items()}
    layers = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    pairs = [(names.get(id(m.weight)), m, names.get(id(m.bias))) for m in layers]
    return {weight: (layer, bias) for weight, layer, bias in pairs if weight and bias}


def _single(model: nn.Module, params: dict[str, nn.Parameter], linear: Single, seen: Seen, who: str) -> Single:
    """Those of the layers that run once, on one row an example, and whose weight and bias are used nowhere else.

    The gradient in such a bias is that at the layer's output, and with the row it tells that in the weight.
    """
    if not linear:
        return {}
    leaves = tuple(t[:1] for t in seen.leaves)
    with in_words(leaves, who, "differentiate the model"), torch.enable_grad():
        alone = single_rows(scores(seen.call(model, leaves), who).flatten())
    return {
        weight: (layer, bias)
        for weight, (layer, bias) in linear.items()
        if alone.get(id(params[weight])) == id(params[bias])
    }


def _streamed(
    model: nn.Module, params: list[Tensor], sides: list[tuple[Seen, Tensor]], who: str, block: int
) -> Float[Tensor, "rows columns"]:
    """The kernel of more rows than fit into memory: some are held, all others pass by, until each was held once."""
    room = 2 * max(block, sum(p.numel() for p in params))
    (first, u), (other, w) = sides[0], sides[-1]
    square, rows = len(sides) == 1, len(u) * u.shape[1]
    kernel = first.empty(rows, len(w) * w.shape[1])
    start = 0
    while start < rows:
        held: list[tuple[slice, Block]] = []
        size, end = 0, rows
        for at, some in _blocks(model, params, first, u, start, room // PARTS, who):
            if square:
                for place, one in held:
                    kernel[place, at] = product(one, some, params)
                    kernel[at, place] = kernel[place, at].mT
            if at.start <= end and (not held or size + 2 * some.numbers <= room):
                held.append((at, some))
                size += some.numbers
                if square:
                    kernel[at, at] = product(some, some, params)
            else:
                end = min(end, at.start)
                if not square:
                    break
        for at, some in () if square else _blocks(model, params, other, w, 0, room // PARTS, who):
            for place, one in held:
                kernel[place, at] = product(one, some, params)
        start = held[-1][0].stop
    return kernel


def _blocks(
    model: nn.Module,
    params: list[Tensor],
    seen: Seen,
    u: Float[Tensor, "n r outputs"],
    start: int,
    most: int,
    who: str,
) -> Iterator[tuple[slice, Block]]:
    """The rows from `start` on, examples major, as blocks of at most `most` numbers or one row."""
    dtype, many = seen.empty().dtype, u.shape[1]
    rows: list[Row] = []
    held, form = 0, None
    for k in range(start, len(u) * many):
        i, d = divmod(k, many)
        if k == start or d == 0:
            leaves = tuple(t[i : i + 1] for t in seen.leaves)
            with in_words(leaves, who, "differentiate the model"), torch.enable_grad():
                out = scores(seen.call(model, leaves), who).flatten()
                _require_alone(out.detach().unsqueeze(0), seen, slice(i, i + 1), who)
                gradients = Gradients(out, params, dtype)
        with in_words(leaves, who, "differentiate the model"):
            row = gradients.row(u[i, d], last=d == many - 1)
        numbers, kind = row.numbers, row.form
        if rows and (kind != form or held + numbers > most):
            yield slice(k - len(rows), k), Block(rows)
            rows = []
        held = held + numbers if rows else numbers
        form = kind
        rows.append(row)
    yield slice(len(u) * many - len(rows), len(u) * many), Block(rows)


def tangents(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    single: Single,
    sides: list[tuple[Seen, Float[Tensor, "n r outputs"]]],
    who: str,
    block: int = BLOCK,
) -> list[list[Part]] | None:
    """Of each side the rows u_ir^T df(x_i)/dtheta, a part for each parameter but the weights `single`, in float32 or
    better: vectorised, or one by one where a model does not allow that (and then of all parameters, or None where
    these rows have more than `block` numbers).

    Raises: BadInput: where an example's outputs differ from those it has in the whole batch.
    """
    try:
        return [_vectorised(model, params, single, seen, u, who) for seen, u in sides]
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception:  # no batching rule, data-dependent control flow, autograd functions of the old style, ...
        if max(u.shape[0] * u.shape[1] for _, u in sides) * sum(p.numel() for p in params.values()) > block:
            return None
        return [_one_by_one(model, params, seen, u, who) for seen, u in sides]


def _require_alone(out: Float[Tensor, "some outputs"], seen: Seen, some: slice, who: str) -> None:
    """Raise BadInput where the outputs of examples alone are not those that they have in the batch."""
    apart = (out - seen.out[some]).abs().max()
    if not apart <= torch.finfo(out.dtype).eps ** 0.5 * seen.out.abs().max():
        raise BadInput(
            f"{who} needs outputs that depend on their own example alone, but alone an example's differ by "
            f"{apart:.3g} from those in the batch (batch statistics, or outputs at random)"
        )


def _vectorised(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    single: Single,
    seen: Seen,
    u: Float[Tensor, "n r outputs"],
    who: str,
) -> list[Part]:
    """The rows of as many examples at once as memory allows."""
    asked = {name: p.detach() for name, p in params.items() if name not in single}
    layers = {bias: layer for layer, bias in single.values()}
    dtype, size, r = seen.empty().dtype, sum(p.numel() for p in asked.values()), u.shape[1]
    step = max(1, min(MANY, AT_ONCE // size) // r)
    same = u.stride(0) == 0  # the same directions for each example: their products with the weights are taken once

    def outputs(p: dict[str, Tensor], example: Leaves) -> tuple[Tensor, dict[str, Tensor]]:
        with _reading(layers) as read:
            whole = seen.call(lambda *a, **k: functional_call(model, p, a, k), tuple(t.unsqueeze(0) for t in example))
        return scores(whole, who).flatten(), {name: x.flatten() for name, (x,) in read.items()}

    def one(example: Leaves, directions: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        out, pull, read = vjp(lambda p: outputs(p, example), asked, has_aux=True)
        (g,) = vmap(pull, chunk_size=MANY if r > MANY else None)(directions)  # a lone chunk would be copied
        return out, g, read

    parts = []
    for k in range(0, len(u), step):
        some = slice(k, min(k + step, len(u)))
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batching rule
            warnings.filterwarnings("ignore", "There is a performance drop")  # such operations run one by one
            leaves, directions = tuple(t[some] for t in seen.leaves), u[0] if same else u[some]
            out, g, read = vmap(one, in_dims=(0, None if same else 0))(leaves, directions)
        _require_alone(out.detach(), seen, some, who)
        parts.append((g, read))
    return [
        (_joined([g[name].detach().flatten(2) for g, _ in parts], dtype),
         _joined([read[name].detach() for _, read in parts], dtype) if name in layers else None)
        for name in asked
    ]  # fmt: skip


def _joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


@contextmanager
def _reading(layers: dict[str, nn.Linear]) -> Iterator[dict[str, list[Tensor]]]:
    """What each of the layers reads, call by call."""
    read: dict[str, list[Tensor]] = {name: [] for name in layers}

    def hook(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        read[name].append(args[0] if args else kwargs["input"])

    hooks = [layer.register_forward_hook(partial(hook, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield read
    finally:
        for one in hooks:
            one.remove()


def _one_by_one(
    model: nn.Module, params: dict[str, nn.Parameter], seen: Seen, u: Float[Tensor, "n r outputs"], who: str
) -> list[Part]:
    """The same by plain backward passes, the model called as it is."""
    targets = list(params.values())
    rows = [seen.empty(*u.shape[:2], p.numel()) for p in targets]
    for k, directions in enumerate(u):
        leaves = tuple(t[k : k + 1] for t in seen.leaves)
        with in_words(leaves, who, "differentiate the model"), torch.enable_grad():
            out = scores(seen.call(model, leaves), who).flatten()
            _require_alone(out.detach().unsqueeze(0), seen, slice(k, k + 1), who)
            for j, d in enumerate(directions):
                g: tuple[Tensor | None, ...] = (None,) * len(targets)
                if out.requires_grad:
                    g = torch.autograd.grad(out, targets, d, retain_graph=True, allow_unused=True)
                for t, into in zip(g, rows, strict=True):
                    into[k, j] = 0 if t is None else (t.to_dense() if t.is_sparse else t).detach().flatten()
    return [(g, None) for g in rows]

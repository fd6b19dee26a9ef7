"""Gradients of a model's outputs in its trainable parameters, one example at a time, and their inner products.

With theta the parameters that require a gradient and f(x_i) the outputs of example i, flattened, a tangent is a row

    g_ir = u_ir^T df(x_i)/dtheta

for a direction u_ir in output space: a unit vector gives a row of the Jacobian, a constant vector the gradient of the sum
of logits. `gram` multiplies such rows block by block; no more than two blocks of them are in memory at any time.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pondera.errors import BadInput, describe, require_finite
from pondera.probe._factors import Block, Gradients, Row, product
from pondera.probe._untouched import arguments, in_words, run, scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = 2**25  # numbers in one block of tangents (128 MiB in float32)
AT_ONCE = 2**23  # numbers in the tangents of one vectorised call
COSTLY = 2**23  # multiplications a row, about what an example that runs alone costs
PARTS = 8  # blocks of factors that memory is divided into
MANY = 256  # tangents in one such call at most, since it holds the activations of all of them
Leaves = tuple[Tensor, ...]


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
    size = sum(p.numel() for p in params.values())
    other, w = (first, u) if second is None or v is None else (second, v)
    (n, r, _), (m, s, _) = u.shape, w.shape
    if max(n * r, m * s) * size > block or _better_by_factors(model, list(params.values()), first, u, m * s, who):
        kernel = _streamed(model, list(params.values()), first, u, None if second is None else (second, w), who, block)
    else:
        left = tangents(model, params, first, u, who)
        kernel = first.empty(n * r, m * s).zero_()
        if second is None:
            cuts = range(
                0, n * r, max(32, -(-n * r // 4))
            )  # of columns: what lies above their diagonal is not computed
            for x in (g.flatten(0, 1) for g in left):
                for k in cuts:
                    kernel[k:, k : k + cuts.step].addmm_(x[k:], x[k : k + cuts.step].mT)
            for k in cuts:
                kernel[k : k + cuts.step, k + cuts.step :] = kernel[k + cuts.step :, k : k + cuts.step].mT
        else:
            for x, y in zip(left, tangents(model, params, other, w, who), strict=True):
                kernel.addmm_(x.flatten(0, 1), y.flatten(0, 1).mT)
    return require_finite(kernel.view(n, r, m, s).transpose(1, 2).contiguous(), who, "kernel")


def _better_by_factors(model: nn.Module, params: list[Tensor], seen: Seen, u: Tensor, columns: int, who: str) -> bool:
    """Whether products of gradients would cost more than running examples alone, and factors are smaller by far."""
    size = sum(p.numel() for p in params)
    if seen.scores.device.type != "cpu" or columns * size < COSTLY:
        return False
    ((_, one),) = _blocks(model, params, seen, u[:1, :1], 0, 1, who)
    return one.numbers * 4 < size


def _streamed(
    model: nn.Module,
    params: list[Tensor],
    first: Seen,
    u: Tensor,
    second: tuple[Seen, Tensor] | None,
    who: str,
    block: int,
) -> Float[Tensor, "rows columns"]:
    """The kernel of more rows than fit into memory: some are held, all others pass by, until each was held once."""
    room = 2 * max(block, sum(p.numel() for p in params))
    seen, w = second or (first, u)
    rows = len(u) * u.shape[1]
    kernel = first.empty(rows, len(w) * w.shape[1])
    start = 0
    while start < rows:
        held: list[tuple[slice, Block]] = []
        size, end = 0, rows
        for at, some in _blocks(model, params, first, u, start, room // PARTS, who):
            if second is None:
                for place, one in held:
                    kernel[place, at] = product(one, some, params)
                    kernel[at, place] = kernel[place, at].mT
            if at.start <= end and (not held or size + 2 * some.numbers <= room):
                held.append((at, some))
                size += some.numbers
                if second is None:
                    kernel[at, at] = product(some, some, params)
            else:
                end = min(end, at.start)
                if second is not None:
                    break
        for at, some in _blocks(model, params, seen, w, 0, room // PARTS, who) if second is not None else ():
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
    model: nn.Module, params: dict[str, nn.Parameter], seen: Seen, u: Float[Tensor, "n r outputs"], who: str
) -> list[Float[Tensor, "n r size"]]:
    """The rows u_ir^T df(x_i)/dtheta, a parameter's part each, in float32 or better: vectorised, or one by one where a
    model does not allow that.

    Raises: BadInput: where an example's outputs differ from those it has in the whole batch.
    """
    dtype, size = seen.empty().dtype, sum(p.numel() for p in params.values())
    step = max(1, min(MANY, AT_ONCE // size) // u.shape[1])
    parts = []
    for k in range(0, len(u), step):
        some = slice(k, min(k + step, len(u)))
        leaves = tuple(t[some] for t in seen.leaves)
        try:
            out, rows = _vectorised(model, params, seen, leaves, u[some], who)
        except (BadInput, torch.OutOfMemoryError):
            raise
        except Exception:  # no batching rule, data-dependent control flow, autograd functions of the old style, ...
            with in_words(leaves, who, "differentiate the model"):
                out, rows = _one_by_one(model, params, seen, leaves, u[some], who)
        _require_alone(out, seen, some, who)
        parts.append([g.to(dtype) for g in rows])
    return parts[0] if len(parts) == 1 else [torch.cat(g) for g in zip(*parts, strict=True)]


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
    seen: Seen,
    leaves: Leaves,
    u: Float[Tensor, "n r outputs"],
    who: str,
) -> tuple[Float[Tensor, "n outputs"], list[Float[Tensor, "n r size"]]]:
    """The outputs of these examples and their rows, all at once."""

    def outputs(p: dict[str, Tensor], example: Leaves) -> Tensor:
        whole = seen.call(lambda *a, **k: functional_call(model, p, a, k), tuple(t.unsqueeze(0) for t in example))
        return scores(whole, who).flatten()

    def one(example: Leaves, directions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out, pull = vjp(lambda p: outputs(p, example), {name: p.detach() for name, p in params.items()})
        (g,) = vmap(pull, chunk_size=MANY)(directions)
        return out, g

    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the fused attention has no batching rule
        warnings.filterwarnings("ignore", "There is a performance drop")  # such operations run one by one, no harm done
        out, g = vmap(one)(leaves, u)
    return out.detach(), [g[name].detach().flatten(2) for name in params]


def _one_by_one(
    model: nn.Module,
    params: dict[str, nn.Parameter],
    seen: Seen,
    leaves: Leaves,
    u: Float[Tensor, "n r outputs"],
    who: str,
) -> tuple[Float[Tensor, "n outputs"], list[Float[Tensor, "n r size"]]]:
    """The same by plain backward passes, the model called as it is."""
    outs, targets = [], list(params.values())
    rows = [seen.empty(*u.shape[:2], p.numel()) for p in targets]
    with torch.enable_grad():
        for k, directions in enumerate(u):
            out = scores(seen.call(model, tuple(t[k : k + 1] for t in leaves)), who).flatten()
            outs.append(out.detach())
            for j, d in enumerate(directions):
                g: tuple[Tensor | None, ...] = (None,) * len(targets)
                if out.requires_grad:
                    g = torch.autograd.grad(out, targets, d, retain_graph=True, allow_unused=True)
                for t, into in zip(g, rows, strict=True):
                    into[k, j] = 0 if t is None else (t.to_dense() if t.is_sparse else t).detach().flatten()
    return torch.stack(outs), rows

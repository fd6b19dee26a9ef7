"""Two spectra of a model at its start: the Jacobian's on one example and the tangent kernel's on some."""

from typing import Any

import torch
from torch import Tensor, nn

from pondera.errors import BadInput
from pondera.probe._signal import watched
from pondera.probe._untouched import arguments, scores

OUTPUTS, PROJECTIONS = 64, 32  # the Jacobian is exact up to so many outputs, projected to so many beyond
KERNEL = (
    32,
    2**26,
)  # examples of the tangent kernel, and the most gradients' entries it may cost (beyond, it is left out)


def jacobian(model: nn.Module, batch: Any, first: str, sites: dict[nn.Module, str]) -> tuple[Tensor | None, bool]:
    """Singular values on the batch's first example, in its input or (integers) in what the first layer puts out."""
    n = examples(batch)
    model.eval()

    def one(value: Any) -> Any:
        return value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == n else value

    if isinstance(batch, Tensor):
        example: Any = one(batch)
    elif isinstance(batch, (tuple, list)):
        example = tuple(one(v) for v in batch)
    else:
        example = {k: one(v) for k, v in batch.items()}
    args, kwargs = arguments(example, "inspect")
    floats = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    at: list[Tensor] = []
    if floats:
        x = floats[0].detach().clone().requires_grad_()
        args = tuple(x if a is floats[0] else a for a in args)
        kwargs = {k: x if v is floats[0] else v for k, v in kwargs.items()}
        at.append(x)

    def visit(name: str, module: nn.Module, _: Any, __: Any, out: Any) -> None:
        y = out[0] if isinstance(out, tuple) else out
        if not at and name == first and isinstance(y, Tensor):
            at.append(y if y.requires_grad else y.requires_grad_())

    try:
        with watched(sites, visit):
            y = scores(model(*args, **kwargs), "inspect")
        out = y.flatten()
        projected = out.numel() > OUTPUTS
        directions = torch.eye(out.numel(), dtype=out.dtype, device=out.device)
        if projected:
            g = torch.Generator().manual_seed(0)
            basis = torch.linalg.qr(torch.randn(out.numel(), PROJECTIONS, generator=g)).Q
            directions = (basis.t() * (out.numel() / PROJECTIONS) ** 0.5).to(out)
        rows = []
        for v in directions:
            (grad,) = torch.autograd.grad(out, at, v, retain_graph=True, allow_unused=True)
            rows.append(torch.zeros_like(at[0]).flatten() if grad is None else grad.flatten())
        values = torch.linalg.svdvals(torch.stack(rows).double()).cpu()
    except torch.OutOfMemoryError:
        raise
    except (BadInput, RuntimeError, TypeError, ValueError, IndexError, KeyError, torch.linalg.LinAlgError):
        return None, False  # models of whole graphs or fixed batch sizes have no single example
    return values, projected


def tangent(model: nn.Module, batch: Any) -> Tensor | None:
    """Eigenvalues of the pseudo tangent kernel on the batch's first examples; None where it cannot be had."""
    from pondera.probe.pseudo_ntk import pseudo_ntk

    total, (most, entries) = examples(batch), KERNEL
    n = min(total, most)
    if n * sum(p.numel() for p in model.parameters() if p.requires_grad) > entries:
        return None

    def few(value: Any) -> Any:
        return value[:n] if isinstance(value, Tensor) and value.ndim and len(value) == total else value

    if isinstance(batch, Tensor):
        some: Any = few(batch)
    elif isinstance(batch, (tuple, list)):
        some = tuple(few(v) for v in batch)
    else:
        some = {k: few(v) for k, v in batch.items()}
    try:
        return pseudo_ntk(model, some).eigenvalues.cpu()
    except (BadInput, RuntimeError, torch.linalg.LinAlgError):
        return None  # models of whole graphs, operations without a vectorised gradient


def examples(batch: Any) -> int:
    args, kwargs = arguments(batch, "inspect")
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
    return len(first) if first.ndim else 1

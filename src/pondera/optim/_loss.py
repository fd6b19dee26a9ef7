"""What optimizers that look at the loss share: the loss as a number, and sums over all parameters."""

import math
from typing import Any

import torch
from torch import Tensor

from pondera.errors import BadInput
from pondera.optim._base import is_sharded


def a_loss(loss: Any, who: str, *, finite: bool = True) -> Tensor:
    """The loss as one number without a graph, in float32 or better; if `finite`, checked where that costs no wait."""
    if not isinstance(loss, (Tensor, float, int)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise BadInput(f"{who} needs the loss as one number, got {found}")
    f = torch.as_tensor(loss).detach().reshape(())
    f = f.full_tensor() if is_sharded(f) else f  # type: ignore[attr-defined]
    f = f.double() if isinstance(loss, (float, int)) else f.to(wide(f))
    if finite and f.device.type == "cpu" and not math.isfinite(f.item()):
        raise BadInput(f"{who} needs a finite loss, got {f.item():g}")
    return f


def wide(x: Tensor) -> torch.dtype:
    """The dtype sums of x run in: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two tensors of one shape."""
    a, b = a.to(wide(a)), b.to(wide(b))
    return (a * b).sum() if is_sharded(a) else torch.dot(a.flatten(), b.flatten())


def squares(tensors: list[Tensor]) -> Tensor:
    """The squared norm of all together."""
    if is_sharded(tensors[0]):
        return total([t.to(wide(t)).square().sum() for t in tensors], tensors[0].device)
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=wide(tensors[0]))).square().sum()


def total(numbers: list[Tensor], device: torch.device) -> Tensor:
    """The sum of 0-dimensional tensors, over all ranks where they are sharded."""
    whole = sum(numbers[1:], numbers[0])
    return (whole.full_tensor() if is_sharded(whole) else whole).to(device)  # type: ignore[attr-defined]

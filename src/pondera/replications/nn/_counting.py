"""Operations counted as torch runs."""

from collections.abc import Callable
from math import log2, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts what torch does: additions and multiplications, and entries written. Views are free, and index tables and
    zeros, which hold no data, are not counted. A complex product is four real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.arithmetic = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if (
            not isinstance(out, Tensor)
            or not (out.is_floating_point() or out.is_complex())
            or func.is_view
            or name in ("new_zeros", "zeros")
        ):
            return out
        if name in ("mm", "bmm"):
            self.arithmetic += out.numel() * args[0].shape[-1] * (4 if out.is_complex() else 1)
        elif name.startswith("_fft"):  # 5/2 N log N for real data
            real = out if out.is_floating_point() else args[0]
            points = prod(real.shape[d] for d in args[1])
            self.arithmetic += round(2.5 * real.numel() * log2(points))
        elif name in ("sum", "mean"):
            self.arithmetic += args[0].numel()
        elif name in ("add", "mul", "sub", "neg", "div", "mul_", "add_"):
            self.arithmetic += out.numel()
        elif name == "index_add_":
            self.written += args[3].numel()
            return out
        self.written += out.numel()
        return out


def counted(run: Callable[[], Any]) -> Counting:
    with Counting() as mode, torch.no_grad():
        run()
    return mode

"""What the optimizers with two Kronecker factors a matrix share: precision of the factors, blocks, the count of steps."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pondera.optim._base import MatrixOptimizer, State


class FactoredOptimizer(MatrixOptimizer):
    """A matrix optimizer whose state beside momentum stays in float32 (float64) when the weights are of fewer bits.

    torch casts all state to the parameter's dtype when it is loaded; factors of bfloat16 weights would not come back bit
    for bit, nor would packed integers.
    """

    needs_gradient = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, name in zip(group["params"], saved["params"], strict=True):
                if not group["matrix"] or p.ndim < 2:
                    continue
                for key, value in state_dict["state"].get(name, {}).items():
                    if isinstance(value, Tensor) and value.ndim and key != "momentum_buffer":
                        dtype = accurate(p.dtype) if value.is_floating_point() else value.dtype
                        self.state[p][key] = value.detach().to(p.device, dtype, copy=True)


def accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def counted(state: State) -> int:
    """How many steps this matrix has been moved before; counts on."""
    if "step" not in state:
        state["step"] = torch.zeros((), device="cpu")  # a name that torch leaves as it is when a state is loaded
    t = int(state["step"])
    state["step"] += 1
    return t


def blocks(shape: torch.Size, size: int | None) -> Iterator[tuple[slice, slice]]:
    """Where the blocks of at most size x size lie in a matrix; one of all where `size` is None."""
    m, n = shape
    a, b = size or max(m, 1), size or max(n, 1)
    for i in range(0, m, a):
        for j in range(0, n, b):
            yield slice(i, i + a), slice(j, j + b)

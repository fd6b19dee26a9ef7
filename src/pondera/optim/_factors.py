"""What the optimizers with two Kronecker factors a matrix share: precision of the factors, blocks, the count of steps."""

from collections.abc import Iterator

import torch

from pondera.optim._base import MatrixOptimizer, State


class FactoredOptimizer(MatrixOptimizer):
    """A matrix optimizer that reads the raw gradient and keeps its factors in float32 (float64)."""

    needs_gradient = precise = True


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

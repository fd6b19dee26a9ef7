"""Sylvester's Hadamard matrices."""

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput


def hadamard(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Float[Tensor, "n n"]:
    """Sylvester's Hadamard matrix of order `n`: entries +-1, symmetric, H H^T = n I, first row and column all ones.

    Raises: BadInput: if `n` is not a power of two.

    >>> hadamard(4)
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]])
    """
    if n < 1 or n & (n - 1):
        raise BadInput(f"hadamard needs a power of two for its order, got {n}")
    h = torch.ones(1, 1, dtype=dtype, device=device)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h

"""A weight of any layer seen as a matrix, one row per output unit."""

from jaxtyping import Float
from torch import Tensor

from pondera.errors import require_matrix


def as_matrix(weight: Float[Tensor, "out *fan_in"]) -> Float[Tensor, "out fan"]:
    """View `weight` (out, in, *kernel) as (out, in * kernel); differentiable, no copy where none is needed.

    Raises: BadInput: if `weight` has fewer than two dimensions, is empty, integer or on the meta device.

    >>> import torch
    >>> as_matrix(torch.zeros(8, 3, 5, 5)).shape
    torch.Size([8, 75])
    """
    return require_matrix(weight, "as_matrix").flatten(1)

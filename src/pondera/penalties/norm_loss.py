"""Norm Loss: pull every weight vector toward unit length (the oblique manifold)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._weights import sum_over
from pondera.errors import BadInput
from pondera.linalg import as_matrix


def norm_loss(weight: Float[Tensor, "out *fan_in"] | nn.Module, *, target: float = 1.0) -> Float[Tensor, ""]:
    r"""Squared distance of each output unit's norm from `target`, summed over units.

    .. math:: \sum_c (\tau - \lVert w_c \rVert_2)^2                                   (eq. 4)

    Unlike weight decay it does not pull toward zero: a unit of norm `target` feels nothing, a shorter one grows. Add it
    to the loss with a factor lambda (0.01 in the paper) in place of weight decay.

    Args:
        weight: any layer's weight, first dimension = output units; or a model, whose linear and convolution weights
            are summed over (norms, embeddings and biases are left out).
        target: the norm sought, tau (1: the oblique manifold of the paper).
    Returns: a scalar in the weight's dtype, zero exactly when every unit has norm `target`; differentiable, with
        gradient 0 chosen at w_c = 0, where there is none.
    Raises: BadInput: if `weight` has fewer than two dimensions, holds no entries, is not floating point or on the meta
        device; if the model has no such weight; if `target` is negative.
    Paper: Georgiou et al. 2021, arXiv 2103.06583.

    >>> norm_loss(torch.eye(3))
    tensor(0.)
    >>> norm_loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor(16.)
    """
    if not target >= 0:
        raise BadInput(f"norm_loss needs a target norm of at least 0, got {target}")
    return sum_over(weight, lambda w: (target - _lengths(as_matrix(w))).square().sum(), who="norm_loss")


def _lengths(w: Float[Tensor, "out fan_in"]) -> Float[Tensor, "out"]:
    """Of each row, by a dot product, whose way back costs less than that of `norm`. At a row of zeros the gradient is 0."""
    rows = w.to(torch.promote_types(w.dtype, torch.float32))
    squares = torch.linalg.vecdot(rows, rows, dim=1)
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0).to(w.dtype)

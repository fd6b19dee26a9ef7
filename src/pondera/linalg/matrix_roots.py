"""Powers of symmetric positive semidefinite matrices: the roots that preconditioners are made of."""

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput, describe, require_finite, require_matrix


def matrix_power(
    A: Float[Tensor, "*batch n n"], power: float, *, eps: float = 0.0, who: str = "matrix_power"
) -> Float[Tensor, "*batch n n"]:
    r"""A^power of a symmetric positive semidefinite matrix, by its eigenvalues.

    .. math:: V \, (\Lambda + \epsilon \, \lambda_{\max})^{power} \, V^T

    Eigenvalues below zero, as rounding leaves them, count as zero. Of a negative power the directions of eigenvalue zero
    are left out (the pseudo-inverse's), so that a matrix of zeros gives zeros.

    Args:
        A: matrix or batch of matrices; its symmetric part is taken. Half precisions are worked in float32.
        power: any real number, such as -1/4.
        eps: added to the eigenvalues, relative to the largest.
        who: named in errors.
    Returns: a tensor like `A`.
    Raises: BadInput: if `A` is not square or not finite.

    >>> matrix_power(torch.diag(torch.tensor([16.0, 1.0])), -0.25)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    require_matrix(A, who, "matrix")
    if A.shape[-1] != A.shape[-2]:
        raise BadInput(f"{who} needs a square matrix, got a {describe(A)}")
    require_finite(A, who, "matrix")
    work = A.to(torch.promote_types(A.dtype, torch.float32))
    values, V = torch.linalg.eigh((work + work.mT) / 2)
    return ((V * raised(values, power, eps).unsqueeze(-2)) @ V.mT).to(A.dtype)


def raised(values: Float[Tensor, "*batch n"], power: float, eps: float = 0.0) -> Float[Tensor, "*batch n"]:
    """(values + eps max)^power of eigenvalues, those below zero as zero; 0 where nothing can be raised."""
    values = values.clamp(min=0)
    values = values + eps * values.amax(-1, keepdim=True)
    if power >= 0:
        return values**power
    return torch.where(values > 0, values.clamp(min=torch.finfo(values.dtype).tiny) ** power, 0)

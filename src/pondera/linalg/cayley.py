"""Rotations from skew-symmetric matrices by Cayley's transform, exact or by a truncated Neumann series."""

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput


def skew(upper: Float[Tensor, "*batch m"], n: int) -> Float[Tensor, "*batch n n"]:
    """The skew-symmetric matrix with `upper`, m = n (n - 1) / 2 numbers, above its diagonal, row by row.

    Raises: BadInput: for another m.

    >>> skew(torch.tensor([1.0, 2.0, 3.0]), 3)
    tensor([[ 0.,  1.,  2.],
            [-1.,  0.,  3.],
            [-2., -3.,  0.]])
    """
    m = n * (n - 1) // 2
    if upper.shape[-1] != m:
        raise BadInput(f"a skew matrix of order {n} needs {m} numbers above its diagonal, got {upper.shape[-1]}")
    row, col = torch.triu_indices(n, n, 1, device=upper.device)
    q = upper.new_zeros(*upper.shape[:-1], n, n)
    q[..., row, col] = upper
    return q - q.mT


def cayley(q: Float[Tensor, "*batch n n"], terms: int | None = None) -> Float[Tensor, "*batch n n"]:
    r"""Cayley's transform :math:`(I + Q)(I - Q)^{-1}` of a skew-symmetric Q: a rotation without the eigenvalue -1.

    With `terms` = k the inverse is a truncated Neumann series,

    .. math:: (I + Q)(I + Q + \dots + Q^{k-2}) = I + 2Q + \dots + 2Q^{k-2} + Q^{k-1} = R (I - Q^{k-1}),

    a polynomial of k powers of Q that takes k // 2 products. The factor after R says how far it is from a rotation: its
    singular values are :math:`1 \pm q^{k-1}` for odd k and :math:`(1 + q^{2k-2})^{1/2}` for even k, where q runs over those of
    Q. An even k is much nearer to a rotation than the odd one above it, and never singular.

    Args:
        q: skew-symmetric matrix or batch of them.
        terms: powers kept, at least 2; None solves exactly.
    Raises: BadInput: if `terms` is below 2.

    >>> cayley(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms is None:
        return torch.linalg.solve(eye - q, eye + q)  # the two factors commute
    if terms < 2:
        raise BadInput(f"a Cayley-Neumann series needs at least 2 terms, got {terms}")
    if terms == 2:
        return eye + q
    base, square = eye + 2 * q, q @ q
    top = square if terms % 2 else square @ (2 * eye + q)
    for _ in range((terms - 3) // 2):  # Horner in Q^2: I + 2Q + Q^2 (2I + 2Q + Q^2 (...))
        top = square @ (base + eye + top)
    return base + top

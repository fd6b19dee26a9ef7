"""Orthogonal factors: Haar draws, the exact polar factor, and Newton-Schulz's iteration toward it."""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pondera.errors import BadInput, require_matrix


def haar(
    rows: int,
    cols: int,
    *,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "rows cols"]:
    """Draw a semi-orthogonal matrix from the Haar (uniform) measure: orthonormal columns if tall, rows if wide.

    QR of a Gaussian with the signs of R's diagonal moved into Q (Mezzadri 2007, math-ph/0609050); without that step the
    law is not uniform. That factor with a positive diagonal of R is the only one, so a Cholesky factor of the Gram matrix
    gives the same Q at half the cost; it is taken from a shape of 2 to 1 on, where the Gaussian is well conditioned.
    Half precisions are drawn in float32 and rounded.

    Raises: BadInput: if a size is not positive.

    >>> q = haar(5, 3, dtype=torch.float64)
    >>> torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64))
    True
    """
    if rows < 1 or cols < 1:
        raise BadInput(f"haar needs positive sizes, got {rows} x {cols}")
    work = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    gaussian = torch.randn(max(rows, cols), min(rows, cols), generator=generator, dtype=work, device=device)
    q = _by_cholesky(gaussian)
    if q is None:
        q, r = torch.linalg.qr(gaussian)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q if rows >= cols else q.mT).to(dtype)


def _by_cholesky(x: Float[Tensor, "m n"], blocks: int = 4) -> Float[Tensor, "m n"] | None:
    """Q of x = Q R with the diagonal of R positive, from R^T R = x^T x; None where QR is as cheap or more exact.

    The error is the square of the condition number times rounding: (sqrt(m/n) + 1)^2 / (sqrt(m/n) - 1)^2 is below 35.
    """
    m, n = x.shape
    if n < 64 or m < 2 * n:
        return None
    gram = x.new_zeros(n, n)
    for columns in torch.arange(n).tensor_split(blocks):  # the triangle above is never read, so most of it is left out
        k, end = int(columns[0]), int(columns[-1]) + 1
        torch.mm(x[:, k:].mT, x[:, k:end], out=gram[k:, k:end])
    lower, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return None
    q = torch.linalg.solve_triangular(lower.mT, x, upper=True, left=False)
    off = (q.mT @ q.sum(1) - 1).abs().max()  # of Q^T Q 1 from 1: products may be set to run in fewer bits than x has
    return q if off < 64 * n**0.5 * torch.finfo(x.dtype).eps else None


def polar(x: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """The nearest semi-orthogonal matrix to `x`: U V^T of its SVD (exact; rank-deficient parts are set to zero).

    >>> polar(torch.diag(torch.tensor([3.0, 0.5])))
    tensor([[1., 0.],
            [0., 1.]])
    """
    require_matrix(x, "polar", "matrix")
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    tol = s.amax(dim=-1, keepdim=True) * max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    return (u * (s > tol).to(x.dtype).unsqueeze(-2)) @ vh


def newton_schulz(
    x: Float[Tensor, "*batch m n"],
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Float[Tensor, "*batch m n"]:
    """Approximate polar factor by the quintic iteration X <- aX + b(XX^T)X + c(XX^T)^2 X used by Muon.

    With the default coefficients five steps bring every singular value of a well-scaled matrix into about [0.7, 1.2];
    they do not converge to 1. Works on the smaller Gram matrix.

    Args:
        x: matrix or batch of matrices, (m, n).
        steps: iterations (5: Jordan et al. 2024, Muon).
        coefficients: (a, b, c) of the odd polynomial; the default is tuned for fast growth of small singular values.
        eps: added to the Frobenius norm that scales `x` first, so that a zero matrix stays zero.
        dtype: precision of the iteration (bfloat16 as in Muon); None keeps that of `x`. The result has `x`'s dtype.
    Raises: BadInput: if `x` has fewer than two dimensions.

    >>> y = newton_schulz(torch.eye(3) * 7, dtype=None)
    >>> bool((torch.linalg.svdvals(y) - 1).abs().max() < 0.35)
    True
    """
    require_matrix(x, "newton_schulz", "matrix")
    a, b, c = coefficients
    y = x if dtype is None else x.to(dtype)
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.mT
    batch = y.shape[:-2]
    y = y / ((y.norm(dim=(-2, -1), keepdim=True) if batch else y.norm()) + eps)
    y, add = (y.flatten(0, -3), torch.baddbmm) if batch else (y, torch.addmm)  # sums inside the products, as Muon's
    for _ in range(steps):
        gram = y @ y.mT
        y = add(y, add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = y.unflatten(0, batch) if batch else y
    return (y.mT if tall else y).to(x.dtype)

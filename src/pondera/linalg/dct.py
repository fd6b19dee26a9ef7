"""The discrete cosine transform: its orthogonal matrix, and the product with it by a fast Fourier transform."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput


def dct_matrix(
    n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Float[Tensor, "n n"]:
    r"""The orthogonal matrix Q of the DCT-II: column k is a cosine of k half waves, and x @ Q is the transform of x.

    .. math:: Q_{jk} = \sqrt{2 / n}\, \cos\frac{\pi (2j + 1) k}{2n} \; (k \ge 1), \qquad Q_{j0} = \sqrt{1 / n}

    Its transpose transforms back (the DCT-III). It is made in float64 and then rounded.

    Raises: BadInput: if `n` is below 1 or `dtype` is not a floating-point one.

    >>> dct_matrix(2)
    tensor([[ 0.7071,  0.7071],
            [ 0.7071, -0.7071]])
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadInput(f"dct_matrix needs a whole number of at least 1 for its order, got {n!r}")
    if not dtype.is_floating_point:
        raise BadInput(f"dct_matrix needs a floating-point dtype, got {dtype}")
    j, k = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)
    turns = ((2 * j + 1) * k) % (4 * n)  # exact in integers, so that large orders lose no digits
    Q = (turns.double() * (math.pi / (2 * n))).cos_().mul_((2 / n) ** 0.5)
    Q[:, 0] = (1 / n) ** 0.5
    return Q.to(dtype)


def dct(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """``x @ dct_matrix(n)``, the orthonormal DCT-II along the last dimension, in O(n log n) (Makhoul 1980).

    The even entries, then the odd ones backwards, through one real Fourier transform of length n; entry n - k is minus the
    imaginary part of what entry k is the real part of. bfloat16 and float16 are transformed in float32. Differentiable.

    Raises: BadInput: for a scalar, an empty last dimension, or what is not real floating point.

    >>> dct(torch.tensor([3.0, 4.0, 4.0, 3.0])).round(decimals=4) + 0.0  # its mean times 2, one whole wave
    tensor([ 7.,  0., -1.,  0.])
    """
    if not x.ndim or not x.shape[-1] or not x.is_floating_point():
        raise BadInput(
            f"dct needs a real floating-point tensor with entries to transform, got {tuple(x.shape)} {x.dtype}"
        )
    n = x.shape[-1]
    work = torch.promote_types(x.dtype, torch.float32)
    order = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1).to(work)
    angle = torch.arange(n // 2 + 1, dtype=work, device=x.device) * (-math.pi / (2 * n))
    V = torch.fft.rfft(order) * torch.polar(torch.full_like(angle, (2 / n) ** 0.5), angle)
    both = torch.cat([V.real, -V.imag[..., 1 : (n + 1) // 2].flip(-1)], -1)
    first = torch.ones(n, dtype=work, device=x.device)
    first[0] = 0.5**0.5
    return (both * first).to(x.dtype)

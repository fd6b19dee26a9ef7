"""Convolution-aware start: in every output unit, filters built from orthonormal spectra; variance as He's."""

from math import prod
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._weights import require_owned, start_each
from pondera.errors import BadInput, describe
from pondera.linalg import haar, polar

Target = TypeVar("Target", Tensor, nn.Module)


def convolution_aware_(
    target: Target, *, eps_std: float = 0.05, exact: bool = False, generator: Generator | None = None
) -> Target:
    r"""Start a convolution's weight, or those of all convolutions of a module, from orthonormal spectra, in place.

    For each of the O output units on its own, with I input channels and k the kernel's shape (1 to 3 dimensions):

    1. S is the number of entries of the real Fourier transform of k taps, (.., k_d // 2 + 1). Draw a symmetric Gaussian
       S x S matrix, take its left singular vectors as rows, with random signs, and draw again until there are I rows
       b_i:

    .. math:: A_{pq} = A_{qp} \sim N(0, 1), \quad A = U \Sigma V^\top, \quad b_i = U_{\cdot i}

    2. Each row is one filter's spectrum; noise breaks the symmetry; all entries are scaled to He's variance:

    .. math:: f_i = \mathcal{F}^{-1}(b_i) + \varepsilon, \; \varepsilon \sim N(0, \mathrm{eps\_std}^2); \qquad
              W = f \, \sqrt{\frac{2}{I \prod k} \Big/ \mathrm{Var}(f)}

    so that the sample variance of W is 2 / fan_in, not only its expectation. Kernels of one tap are plain Gaussian,
    scaled alike. Dense weights (2 dimensions; in a module, every other owned weight) become orthogonal with gain 1.
    Biases, norm layers and embeddings stay.

    What step 2 undoes (derived, and seen in the replication): real numbers on half a spectrum are not the transform of
    a real filter. The inverse transform projects them, and but for the noise the filters come out point-symmetric and
    correlated: at 3 x 3 with 6 inputs the root mean square cosine of two is 0.26, where Gaussian filters have 0.33, and
    with 64 inputs, where most rows come from different draws, it is 0.45. ``exact=True`` is our own variant: real
    filters from the Haar measure on the space of all prod(k) taps, orthonormal there and hence in Fourier space, up to
    prod(k) input channels (9 at 3 x 3); beyond that in blocks.

    Args:
        target: a weight (out, in / groups, *kernel) of 2 to 5 dimensions, or a module with a convolution in it. A
            transposed convolution's bare weight is (in, out, *kernel) in torch: give the module, which knows.
        eps_std: standard deviation of the noise on each tap before scaling (0.05: the released code); `exact` has none.
        exact: draw real orthonormal filters instead (False: the released algorithm).
        generator: source of the draw, on the weight's device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: for a module without any convolution; for a tensor of fewer than 2 or more than 5 dimensions,
        without entries, of integers or on the meta device; for a negative, infinite or NaN `eps_std`.
    Paper: Aghajanyan 2017, arXiv 1702.06295. Differences: the paper's class in keras-contrib returns 2-D kernels as
        (x, y, out, in) where Keras reads (x, y, in, out), and shuffles the axes of 3-D kernels; here every weight has
        torch's layout. The class leaves the signs of singular vectors to LAPACK, whose habit gives the weights a
        negative mean (0.1 standard deviations at 3 taps in one dimension) and ReLU nets a fading signal; here they are
        drawn. Given a seed, it sets NumPy's global generator at each call, so that equal shapes get equal weights. A
        weight of a single entry has no variance over its entries (the class divides by 0); here it is N(0, 2).

    >>> w = convolution_aware_(torch.empty(16, 3, 5, 5), generator=torch.Generator().manual_seed(0))
    >>> round(w.var(correction=0).item() * 3 * 5 * 5, 4)
    2.0
    >>> w = convolution_aware_(torch.empty(4, 9, 3, 3), exact=True).flatten(2)
    >>> gram = w @ w.mT  # one Gram matrix of the 9 filters of each output unit
    >>> bool((gram - gram[0, 0, 0] * torch.eye(9)).abs().max() < 1e-5 * gram.max())
    True
    """
    if not 0 <= eps_std < torch.inf:
        raise BadInput(f"convolution_aware_ needs a finite eps_std of at least 0, got {eps_std}")
    if isinstance(target, Tensor):
        if target.ndim > 5:
            raise BadInput(
                f"convolution_aware_ needs a weight of 2 to 5 dimensions (out, in, *kernel), got a {describe(target)}"
            )
    elif not any(one.kind in ("conv", "conv_transpose") for one in require_owned(target, "convolution_aware_")):
        raise BadInput(
            f"convolution_aware_ found no convolution in {type(target).__name__}; dense layers alone would only get "
            "the orthogonal start, torch.nn.init.orthogonal_"
        )

    def fill(w: Tensor) -> None:
        if w.ndim == 2:
            w.copy_(haar(*w.shape, generator=generator, dtype=w.dtype, device=w.device))
            return
        filters = _orthonormal(w, generator) if exact else _released(w, eps_std, generator)
        variance = filters.var(correction=0) if w.numel() > 1 else 1.0
        w.copy_(filters * (2 / w[0].numel() / variance) ** 0.5)

    return start_each(target, fill, who="convolution_aware_", bias=None)


def _released(
    w: Float[Tensor, "out in *kernel"], eps_std: float, generator: Generator | None
) -> Float[Tensor, "out in *kernel"]:
    """Unscaled filters by the released algorithm."""
    out, inn, *kernel = w.shape
    half = [*kernel[:-1], kernel[-1] // 2 + 1]
    s = prod(half)
    if s == 1:  # one tap: Gaussian basis and Gaussian noise together are one Gaussian
        return _randn(w, w.shape, generator)
    blocks = (out, -(-inn // s))
    rows = _spectra(_randn(w, (*blocks, s, s), generator), _randn(w, (*blocks, s, 1), generator))
    rows = rows.flatten(1, 2)[:, :inn].unflatten(-1, half)
    filters = torch.fft.irfftn(rows, s=kernel, dim=list(range(2, w.ndim)))
    return filters + eps_std * _randn(w, w.shape, generator)


def _spectra(a: Float[Tensor, "*batch s s"], signs: Float[Tensor, "*batch s 1"]) -> Float[Tensor, "*batch s s"]:
    """Orthonormal rows: the left singular vectors of `a` made symmetric from both its triangles.

    A vector's sign is not the decomposition's to say. What LAPACK says favours a negative first entry, and that is the
    filter's mean; here the first entry gets the sign given."""
    symmetric = a + a.mT - torch.diag_embed(a.diagonal(dim1=-2, dim2=-1))
    rows = torch.linalg.svd(symmetric)[0].mT
    return rows * (signs * rows[..., :1]).sign()


def _orthonormal(w: Float[Tensor, "out in *kernel"], generator: Generator | None) -> Float[Tensor, "out in *kernel"]:
    """Our variant: rows orthonormal in the space of all taps. The polar factor of a Gaussian is Haar distributed."""
    out, inn, *kernel = w.shape
    k = prod(kernel)
    if k == 1:
        return _randn(w, w.shape, generator)
    rows = polar(_randn(w, (out, -(-inn // k), k, k), generator)).flatten(1, 2)[:, :inn]
    return rows.reshape(w.shape)


def _randn(like: Tensor, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

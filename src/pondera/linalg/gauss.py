"""Averages over one Gaussian variable or a correlated pair, exact for functions with a kink at zero."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput

LIMIT = 12.0  # beyond twelve standard deviations the Gaussian weighs less than float64 can hold
PAIRS_AT_ONCE = 256  # pairs averaged together, some 9,600 nodes each


@lru_cache(maxsize=8)
def half_line(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and Gaussian-weighted weights on (0, LIMIT], float64."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    z = torch.from_numpy((x + 1) * (LIMIT / 2))
    density = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    return z, torch.from_numpy(w * (LIMIT / 2)) * density


def gaussian_mean(
    f: Callable[[Tensor], Tensor], std: float | Float[Tensor, "*shape"] = 1.0, *, nodes: int = 200
) -> Float[Tensor, "*shape"]:
    """E[f(std * Z)] for Z ~ N(0, 1), in float64, by Gauss-Legendre on each side of zero.

    Splitting at zero keeps full accuracy for ReLU, ELU and other functions with a kink there, where Gauss-Hermite
    loses most of its digits.

    Args:
        f: elementwise function of a float64 tensor.
        std: scale of the variable, a number or a tensor of any shape (one mean each).
        nodes: quadrature nodes a side (200 gives about 1e-14 on smooth activations at std up to 10).
    Returns: float64 tensor shaped like `std`.

    >>> round(gaussian_mean(torch.relu, 2.0).item(), 10) == round(2 / (2 * torch.pi) ** 0.5, 10)
    True
    """
    z, w = half_line(nodes)
    s = torch.as_tensor(std, dtype=torch.float64)
    at = s.unsqueeze(-1) * z
    return ((f(at) + f(-at)) * w).sum(-1)


def gaussian_pair_mean(
    f: Callable[[Tensor], Tensor],
    correlation: float | Float[Tensor, "*shape"],
    std: float | Float[Tensor, "*#shape"] = 1.0,
    other_std: float | Float[Tensor, "*#shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    r"""E[f(U) f(V)] for U and V jointly Gaussian with mean zero, in float64, by quadrature in polar coordinates.

    With the correlation c = cos(a), the standard deviations s and t, U = s r cos(h) and V = t r cos(h - a),

    .. math:: E[f(U) f(V)] = \frac{1}{2 \pi} \int_0^\infty \int_0^{2 \pi}
              f(s r \cos h) \, f(t r \cos(h - a)) \, r e^{-r^2 / 2} \, dh \, dr

    U and V change sign at four angles only, so Gauss-Legendre between these (half a turn, the other is its mirror) is exact
    to rounding also where f has a kink at zero, and keeps about three digits where it has one elsewhere (derived).

    Args:
        f: elementwise function of a float64 tensor.
        correlation: of U and V, a number or a tensor of any shape (one mean each). Rounding may carry it just past 1.
        std: standard deviation of U, a number or a tensor that broadcasts with `correlation`.
        other_std: that of V, alike; None: the same as U's.
    Returns: float64 tensor of the shape that the three have together.
    Raises: BadInput: for a correlation that is not within -1 and 1, or a standard deviation below 0.

    >>> round(gaussian_pair_mean(torch.relu, 0.0).item() * 2 * torch.pi, 12)  # E[relu]^2 = 1 / (2 pi)
    1.0
    >>> gaussian_pair_mean(lambda x: x, torch.tensor([-0.5, 0.5]), 2.0, 3.0)  # the covariance
    tensor([-3.0000,  3.0000], dtype=torch.float64)
    """
    given = (correlation, std, std if other_std is None else other_std)
    c, s, t = (torch.as_tensor(x, dtype=torch.float64) for x in given)
    if not (c.abs() <= 1 + 1e-9).all():
        raise BadInput("gaussian_pair_mean needs correlations between -1 and 1, got one that is not")
    if (s < 0).any() or (t < 0).any():
        raise BadInput("gaussian_pair_mean needs standard deviations of at least 0, got one below")
    c, s, t = torch.broadcast_tensors(c.clamp(-1, 1), s, t)
    pairs = torch.stack([c, s, t]).view(3, -1).split(PAIRS_AT_ONCE, 1)
    return torch.cat([_pair_means(f, *some) for some in pairs]).view(c.shape)


def _pair_means(
    f: Callable[[Tensor], Tensor], c: Float[Tensor, "m"], s: Float[Tensor, "m"], t: Float[Tensor, "m"]
) -> Float[Tensor, "m"]:
    r, weight = half_line(100)
    weight = weight * r * (2 * torch.pi) ** 0.5  # density of the radius
    unit, share = _unit_interval(48)
    a = torch.arccos(c).unsqueeze(-1)
    h = torch.cat([a * unit - torch.pi / 2, a - torch.pi / 2 + (torch.pi - a) * unit], -1)
    part = torch.cat([a * share, (torch.pi - a) * share], -1) / (2 * torch.pi)
    u, v = (d[:, None, None] * e.cos().unsqueeze(-1) * r for d, e in ((s, h), (t, h - a)))
    both_signs = f(-u) * f(-v) + f(u) * f(v)  # u and v last: f may work in place
    return (both_signs @ weight * part).sum(-1)


@lru_cache(maxsize=1)
def _unit_interval(nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on (0, 1), float64."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(x + 1) / 2, torch.from_numpy(w) / 2

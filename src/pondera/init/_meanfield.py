"""Mean-field theory of one wide random layer, and the edge of chaos as an explicit curve.

W_ij ~ N(0, sigma_w^2 / fan_in), b_i ~ N(0, sigma_b^2), Z ~ N(0, 1): preactivations of mean square q go to
F(q) = sigma_b^2 + sigma_w^2 E[phi(sqrt(q) Z)^2], and small differences grow by chi = sigma_w^2 E[phi'(sqrt(q) Z)^2].
The edge, chi = 1 at a fixed point q = F(q), needs no nested solve when it is walked in q (derived):

    sigma_w^2 = 1 / E[phi'(sqrt(q) Z)^2],   sigma_b^2 = q - sigma_w^2 E[phi(sqrt(q) Z)^2]   where that is not negative.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pondera._activations import Activation, activation, derivative
from pondera.errors import BadInput
from pondera.linalg import gaussian_mean

GRID = torch.logspace(-10, 3, 521, dtype=torch.float64)  # values of q among which a point of the curve is first sought
TINY = 1e-24  # a q at which only the slopes at zero count: sqrt(q) is 1e-12


@dataclass(frozen=True)
class EdgePoint:
    """One point of an activation's edge of chaos.

    sigma_w: weights are N(0, sigma_w^2 / fan_in). sigma_b: biases are N(0, sigma_b^2). q: mean square of preactivations
    that a layer keeps (0 in the limit sigma_b -> 0 of tanh and its like; 1 by convention where every q is kept, as for
    ReLU). stability: F'(q), the factor by which a deviation from q grows a layer; q attracts below 1 and repels above.
    """

    sigma_w: float
    sigma_b: float
    q: float
    stability: float

    @property
    def input_mean_square(self) -> float:
        """The |x|^2 / fan_in that inputs should have so that the first layer puts out q at once (derived)."""
        return (self.q - self.sigma_b**2) / self.sigma_w**2


def elementwise(nonlinearity: str | Activation, who: str) -> Activation:
    """The activation named or given, checked on a few numbers: float64 in, as many finite float64 out."""
    f = activation(nonlinearity, who)
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)
    called = nonlinearity if isinstance(nonlinearity, str) else "the activation"
    try:
        y = f(x.clone())
        derivative(lambda t: f(t.clone()), x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(
            f"{who} could not call and differentiate {called} on float64: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(y, Tensor) or y.shape != x.shape or not torch.isfinite(y).all():
        raise BadInput(f"{who} needs an elementwise activation, finite on float64; on [-20, 20] {called} is not")
    return lambda t: f(t.clone())  # in-place activations would overwrite quadrature nodes


def mean_square(phi: Activation, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """E[phi(sqrt(q) Z)^2]."""
    return gaussian_mean(lambda x: phi(x).square(), q.sqrt())


def mean_square_slope(phi: Activation, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """E[phi'(sqrt(q) Z)^2]."""
    return gaussian_mean(lambda x: derivative(phi, x).square(), q.sqrt())


def growth(phi: Activation, q: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """d/dq E[phi(sqrt(q) Z)^2], so that F'(q) is sigma_w^2 times it."""
    return gaussian_mean(lambda x: phi(x) * derivative(phi, x) * x, q.sqrt()) / q


def edge(phi: Activation, q: Float[Tensor, "*shape"]) -> tuple[Tensor, Tensor, Tensor]:
    """The curve at q: sigma_w^2, sigma_b^2 (negative where there is no such point) and F'(q)."""
    w2 = 1 / mean_square_slope(phi, q)
    return w2, q - w2 * mean_square(phi, q), w2 * growth(phi, q)


def edge_point(phi: Activation, sigma_b: float, who: str) -> EdgePoint:
    """The point of the edge with this sigma_b: of several an attracting one, of these the one of smallest q."""
    if is_homogeneous(phi):
        if sigma_b:
            raise BadInput(f"{who} got sigma_b {sigma_b:g}, but the edge of a ReLU-like activation has only 0")
        return _at(phi, 1.0, sigma_b=0.0)
    at_zero = _limit(phi)
    if at_zero and sigma_b < 1e-9:  # below, rounding hides the curve
        return replace(at_zero, sigma_b=sigma_b)
    b2 = edge(phi, GRID)[1]
    above = b2 >= sigma_b**2
    crossings = (above[1:] != above[:-1]).nonzero().flatten().tolist()
    points = []
    for i in crossings:
        q = _root(lambda q: float(edge(phi, q)[1]) - sigma_b**2, GRID[i], GRID[i + 1])
        points.append(_at(phi, q, sigma_b))
    if not points:
        real = [0.0] * bool(at_zero) + b2[b2 >= 0].sqrt().tolist()
        raise BadInput(
            f"{who} finds no point with sigma_b {sigma_b:g} on the edge of chaos of this activation: "
            + (f"sigma_b goes from {min(real):.3g} to {max(real):.3g} there" if real else "it has no edge")
        )
    return next((p for p in points if p.stability <= 1), points[0])


def critical_point(phi: Activation, who: str) -> EdgePoint:
    """The point of the edge with the smallest sigma_b at which the variance does not run away, F'(q) <= 1."""
    if is_homogeneous(phi):
        return _at(phi, 1.0, sigma_b=0.0)

    def slack(q: Tensor) -> Tensor:
        _, b2, f = edge(phi, q)
        return torch.minimum(b2 / q, 1 - f) + 1e-12

    fits = (slack(GRID) >= 0).nonzero().flatten().tolist()
    if not fits:
        raise BadInput(
            f"{who} finds no critical point of this activation: where gradients keep their size its "
            "variance runs away, or biases would need a negative one"
        )
    at_zero = _limit(phi)
    if fits[0] == 0 and at_zero:
        return at_zero
    q = _root(lambda q: float(slack(q)), GRID[max(fits[0] - 1, 0)], GRID[fits[0]])
    return _at(phi, q)


def is_homogeneous(phi: Activation) -> bool:
    """Whether phi(k x) = k phi(x) for k > 0, as for ReLU: then every q is a fixed point."""
    x = torch.cat([-GRID, GRID])
    y = phi(x)
    return bool(y.any()) and torch.allclose(phi(2 * x), 2 * y, rtol=1e-12, atol=0)


def _limit(phi: Activation) -> EdgePoint | None:
    """The point q = 0, where phi(0) = 0 and phi has slopes there: sigma_w^2 = 1 / mean of both slopes squared."""
    slope = float(mean_square_slope(phi, torch.tensor(TINY)))
    if abs(float(phi(torch.zeros(1, dtype=torch.float64)))) > 1e-12 or slope < 1e-12:
        return None
    just_above = torch.tensor(1e-6, dtype=torch.float64)  # F' is 1 at q = 0 itself; if it is larger here, 0 repels
    return EdgePoint(slope**-0.5, 0.0, 0.0, max(1.0, float(edge(phi, just_above)[2])))


def _at(phi: Activation, q: float, sigma_b: float | None = None) -> EdgePoint:
    w2, b2, f = (float(v) for v in edge(phi, torch.tensor(q, dtype=torch.float64)))
    return EdgePoint(w2**0.5, max(b2, 0.0) ** 0.5 if sigma_b is None else sigma_b, q, f)


def _root(g: Callable[[Tensor], float], low: Tensor, high: Tensor) -> float:
    """Bisection to the last bit of float64, or nearly; g changes sign between low and high."""
    rising = g(high) >= 0
    for _ in range(64):
        mid = (low + high) / 2
        low, high = (low, mid) if (g(mid) >= 0) == rising else (mid, high)
    return float(high if rising else low)

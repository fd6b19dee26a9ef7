"""Required inductive bias: how many bits single out the hypotheses that generalise among those that fit the training data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pondera.errors import BadInput, describe, require_extra, require_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Kernel = Callable[[Tensor, Tensor], Tensor]
JITTER = 1e-8  # of the mean diagonal, added to the training kernel so that it can be solved


@dataclass(frozen=True)
class RequiredInductiveBias:
    """Bits needed to reach an error, by the law fitted to the errors of random hypotheses.

    Attributes:
        bits: -log2 P(error <= target).
        target: the error to reach.
        errors: those of the hypotheses.
        freedom, noncentrality, scale: of the fitted law, scale times a noncentral chi-squared variable.
        misfit: largest distance between the fitted and the observed distribution function (Kolmogorov-Smirnov).
    """

    bits: Float[Tensor, ""]
    target: float
    errors: Float[Tensor, "n"]
    freedom: float
    noncentrality: float
    scale: float
    misfit: float

    def summary(self) -> str:
        """The finding in plain words."""
        e = self.errors
        reached = int((e <= self.target).sum())
        how = (
            f"{reached} of them reached it"
            if reached
            else "none of them reached it, so the figure rests on the fitted law's tail"
        )
        return (
            f"{self.bits:.4g} bits single out an error of at most {self.target:.4g} among hypotheses whose errors go from "
            f"{e.min():.4g} to {e.max():.4g} (mean {e.mean():.4g}); of {len(e)} drawn, {how}. The fitted law is off by at "
            f"most {self.misfit:.3f} in probability."
        )

    def plot(self) -> "Figure":
        """The errors' distribution with the fitted law and the target (a matplotlib figure)."""
        require_extra("RequiredInductiveBias.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(5, 3.4), layout="constrained")
        ax = fig.subplots()
        e = self.errors.sort().values
        ax.step(e, torch.arange(1, len(e) + 1) / len(e), color="#4477aa", label="hypotheses drawn")
        at = np.linspace(min(self.target, float(e[0])), float(e[-1]), 200)
        law = [2 ** -_bits_of_the_law(float(x), self.freedom, self.noncentrality, self.scale) for x in at]
        ax.plot(at, law, "k--", lw=1, label="fitted law")
        ax.axvline(self.target, color="#cc6677", lw=1, label=f"target: {self.bits:.3g} bits")
        ax.set(xlabel="test error", ylabel="share at most this")
        ax.legend(frameon=False)
        return fig


def required_inductive_bias(errors: Float[Tensor, "n"], target: float) -> RequiredInductiveBias:
    r"""Bits of inductive bias that a task requires beyond what a hypothesis space has, from random hypotheses' errors.

    Draw hypotheses that fit the training data, by chance otherwise (`Interpolants.errors` for kernels; networks trained
    from different random starts), and take their squared errors on test data. With

    .. math:: e \sim s \, \chi'^2(k, \lambda), \qquad I = -\log_2 P(e \le \epsilon)

    fitted by maximum likelihood, I is the information needed to pick a hypothesis with error at most epsilon. A space that
    already holds what the task needs leaves little to be said: the difference between two spaces is what one encodes more
    than the other.

    The target usually lies far outside the errors drawn: the answer is an extrapolation, to the accuracy of the law. Where
    the space is a kernel's, `Interpolants.bits` needs no draw and no law.

    Args:
        errors: mean squared test errors of at least ten hypotheses; above 0.
        target: epsilon, above 0.
    Returns: a `RequiredInductiveBias`.
    Raises: BadInput: for fewer than ten errors, ones that are not positive and finite or all equal, a target not above 0.
    Paper: Boopathy, Yue, Hwang, Iyer and Fiete 2024, arXiv 2406.15941. After the authors' code (github.com/FieteLab/
        Exact-Inductive-Bias), in bits instead of nats. Differences: errors are divided by their mean before the fit, for
        scipy's search starts at a scale of 1 and may stop far from the best law otherwise. On twelve samples of 300 to 500
        errors (planted laws, uniform, kernels) the fit so found was never less likely than theirs, in five of them by 190
        to 1,200 nats. And the tail is scipy's distribution function where that is not 0, as there; beyond it they take a
        normal approximation, which may be five times too small, and here it is a saddlepoint formula (derived), within
        0.2% of the bits.

    >>> errors = 0.5 + 0.1 * torch.rand(200, generator=torch.Generator().manual_seed(0))
    >>> found = required_inductive_bias(errors, 0.3)
    >>> bool(found.bits > required_inductive_bias(errors, 0.4).bits)
    True
    """
    who = "required_inductive_bias"
    require_extra("required_inductive_bias", "scipy")
    from scipy.stats import ncx2

    e = require_finite(torch.as_tensor(errors), who, "errors").detach().cpu().double().flatten()
    if len(e) < 10 or not (e > 0).all() or bool((e == e[0]).all()):
        raise BadInput(
            f"{who} needs at least ten positive errors that differ, got {len(e)} from {e.min():.4g} to {e.max():.4g}"
        )
    if not 0 < target < math.inf:
        raise BadInput(f"{who} needs a target error above 0, got {target}")
    size = float(e.mean())
    freedom, noncentrality, _, scale = (float(v) for v in ncx2.fit(e.numpy() / size, floc=0))
    scale *= size
    law = ncx2.cdf(e.sort().values.numpy(), freedom, noncentrality, scale=scale)
    steps = np.arange(len(e) + 1) / len(e)
    misfit = float(max(np.abs(law - steps[1:]).max(), np.abs(law - steps[:-1]).max()))
    bits = torch.tensor(_bits_of_the_law(float(target), freedom, noncentrality, scale), dtype=torch.float64)
    return RequiredInductiveBias(bits, float(target), e, freedom, noncentrality, scale, misfit)


@dataclass(frozen=True)
class Interpolants:
    """Random functions of a kernel's space that fit training data: a Gaussian process given them, on test inputs.

    Attributes:
        residual: mean of the functions minus the test targets, in the eigenvectors of their covariance.
        variance: eigenvalues of the covariance between test inputs.
    """

    residual: Float[Tensor, "n outputs"]
    variance: Float[Tensor, "n"]

    @cached_property
    def mean_error(self) -> float:
        """Mean over the functions of the mean squared test error."""
        return float(self.residual.square().mean() + self.variance.mean())

    def errors(self, count: int, generator: Generator | None = None) -> Float[Tensor, "count"]:
        """Mean squared test errors of `count` functions drawn."""
        n, k = self.residual.shape
        z = torch.randn(count, n, k, generator=generator, dtype=torch.float64)
        return (self.residual + self.variance.sqrt().unsqueeze(1) * z).square().mean((1, 2))

    def bits(self, target: float) -> float:
        """-log2 of the share of functions with an error of at most `target`, from the law itself; inf where none can.

        By a saddlepoint formula: at most 0.2 bits off where the functions move in one direction only, 0.05 in five.
        """
        if not 0 < target < math.inf:
            raise BadInput(f"Interpolants.bits needs a target error above 0, got {target}")
        n, k = self.residual.shape
        w, a = self.variance / (n * k), self.residual.square().sum(1) / (n * k)
        moves = w > 1e-14 * float(w.max())
        floor = float(a[~moves].sum())
        return _bits(target, w[moves].numpy(), np.full(int(moves.sum()), float(k)), a[moves].numpy(), floor)


def interpolants(
    x: Float[Tensor, "train features"],
    y: Float[Tensor, "train *outputs"],
    x_test: Float[Tensor, "n features"],
    y_test: Float[Tensor, "n *outputs"],
    *,
    kernel: Kernel | None = None,
    length_scale: float = 1.0,
    noise: float = 0.0,
) -> Interpolants:
    r"""The functions of a kernel's space that fit the training data, as a law over their test errors.

    .. math:: f \mid D \sim N\big(K_{*x} (K_{xx} + \sigma^2 I)^{-1} y, \;
              K_{**} - K_{*x} (K_{xx} + \sigma^2 I)^{-1} K_{x*}\big)                           (Alg. 1)

    one independent function an output. The default kernel is exp(-\|a - b\|^2 / (2 l^2)).

    Args:
        x, y: training inputs and targets (one-hot for classes). x_test, y_test: test ones.
        kernel: a function of two matrices of inputs; None: the Gaussian one.
        length_scale: l (1: the authors' code).
        noise: sigma^2, for kernels that cannot fit the data exactly, such as a linear one (0: they fit exactly).
    Returns: an `Interpolants`, float64.
    Raises: BadInput: for matrices that are not finite or do not fit each other, a length or noise out of range, a kernel
        that is not positive semidefinite on the training inputs.
    Paper: Boopathy, Yue, Hwang, Iyer and Fiete 2024, arXiv 2406.15941. The authors solve the linear systems by gradient
        descent, for large data; here they are solved.

    >>> x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([0.0, 1.0])
    >>> space = interpolants(x, y, torch.tensor([[0.5]]), torch.tensor([0.5]))
    >>> space.bits(0.01) < space.bits(0.001)
    True
    """
    who = "interpolants"
    given = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
    a, t, b, u = (require_finite(torch.as_tensor(v), who, n).detach().cpu().double() for n, v in given.items())
    if not (0 < length_scale < math.inf and 0 <= noise < math.inf):
        raise BadInput(f"{who} needs a length_scale above 0 and noise of at least 0, got {length_scale} and {noise}")
    t, u = (v.unsqueeze(1) if v.ndim == 1 else v for v in (t, u))
    shapes = a.ndim == b.ndim == t.ndim == u.ndim == 2 and len(a) == len(t) and len(b) == len(u)
    if not shapes or a.shape[1] != b.shape[1] or t.shape[1] != u.shape[1] or not a.numel() or not b.numel():
        got = ", ".join(f"{n} a {describe(torch.as_tensor(v))}" for n, v in given.items())
        raise BadInput(f"{who} needs matrices (examples, features) and (examples, outputs) that fit, got {got}")
    k = kernel or (lambda p, q: torch.exp(-torch.cdist(p, q).square() / (2 * length_scale**2)))
    within, across, test = k(a, a), k(b, a), k(b, b)
    within = within + (noise + JITTER * float(within.diagonal().mean())) * torch.eye(len(a), dtype=torch.float64)
    factor, info = torch.linalg.cholesky_ex(within)
    if info:
        raise BadInput(f"{who} needs a kernel that is positive semidefinite on the training inputs; this one is not")
    mean = across @ torch.cholesky_solve(t, factor)
    half = torch.linalg.solve_triangular(factor, across.mT, upper=False)
    variance, vectors = torch.linalg.eigh(test - half.mT @ half)
    return Interpolants(vectors.mT @ (mean - u), variance.clamp_min(0))


# -- the tail -----------------------------------------------------------------------------------------------------------


def _bits_of_the_law(target: float, freedom: float, noncentrality: float, scale: float) -> float:
    """-log2 P(scale * ncx2(freedom, noncentrality) <= target): scipy's where it is not 0, the formula beyond."""
    from scipy.stats import ncx2

    with np.errstate(divide="ignore"):
        log_p = float(ncx2.logcdf(target, freedom, noncentrality, scale=scale))
    if math.isfinite(log_p):
        return max(0.0, -log_p / math.log(2))
    return _bits(target, *_ncx2(freedom, noncentrality, scale))


def _ncx2(freedom: float, noncentrality: float, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """The law scale * ncx2(freedom, noncentrality) in the terms of `_bits`."""
    return np.array([scale]), np.array([freedom]), np.array([noncentrality * scale]), 0.0


def _bits(target: float, w: np.ndarray, m: np.ndarray, a: np.ndarray, floor: float) -> float:
    r"""-log2 P(E <= target) by Lugannani and Rice's saddlepoint formula.

    E = floor + sum_i (w_i chi^2 terms) has K(t) = log E e^{tE} = floor t + sum_i [-m_i/2 log(1 - 2 w_i t) + a_i t /
    (1 - 2 w_i t)], m_i the freedom and a_i the noncentral part of term i. Exact as the number of terms grows; for few
    the probability is off by a factor that does not grow without end into the tail: 0.2 bits for one of one degree of
    freedom, 0.05 for five.
    """
    from scipy.optimize import brentq
    from scipy.special import erfcx

    if target <= floor or not len(w):
        return math.inf if target < floor or len(w) else 0.0

    def slope(t: float) -> float:
        d = 1 - 2 * w * t
        return floor + float((m * w / d + a / d / d).sum())

    mean = slope(0.0)
    if abs(target / mean - 1) < 1e-6:
        target = mean * (1 + (1e-6 if target >= mean else -1e-6))  # the formula has a removable gap at the mean
    top = 1 / (2 * float(w.max()))
    if target < mean:
        low = -top
        while slope(low) > target:
            low *= 2
        high = 0.0
    else:
        low, high = 0.0, top * (1 - 1e-12)
        if slope(high) < target:
            return 0.0
    t = brentq(lambda s: slope(s) - target, low, high, xtol=1e-300, rtol=1e-14, maxiter=500)
    d = 1 - 2 * w * t
    k = floor * t + float((-m / 2 * np.log(d) + a * t / d).sum())
    p = w * t / d
    second = float((2 * m * p**2 + 4 * a * t / d * p / d).sum())  # K''(t) t^2, which does not underflow
    r = math.copysign(math.sqrt(max(2 * (t * target - k), 0.0)), t)
    u = math.copysign(math.sqrt(second), t)
    # Phi(r) + phi(r) (1/r - 1/u), with phi(r) taken out
    inside = math.sqrt(math.pi / 2) * float(erfcx(-r / math.sqrt(2))) if r < 0 else None
    if inside is not None:
        log_p = -r * r / 2 - 0.5 * math.log(2 * math.pi) + math.log(max(inside + 1 / r - 1 / u, 1e-300))
    else:
        below = 0.5 * math.erfc(-r / math.sqrt(2)) + math.exp(-r * r / 2) / math.sqrt(2 * math.pi) * (1 / r - 1 / u)
        log_p = math.log(min(max(below, 1e-300), 1.0))
    return max(0.0, -log_p / math.log(2))

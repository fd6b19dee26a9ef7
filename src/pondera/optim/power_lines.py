"""Power Lines: the timescale of AdamW's decay, and power laws for decay and batch size, fitted to a sweep of one's own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput, needs_extra, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = Sequence[float] | Tensor
Vector = Float[Tensor, "n"]


def timescale(batch: float, lr: float, weight_decay: float, tokens: float) -> float:
    r"""The share of a run over which AdamW averages its updates.

    .. math:: \tau = \frac{B}{\eta \lambda D}

    AdamW's weights are a moving average of its updates over 1 / (eta lambda) steps, and a run has D / B of them. With a
    tau above 1 the run is shorter than the average, and decay does little.

    Args:
        batch: B, tokens a step (or sequences, examples: the unit of `tokens`).
        lr: eta, the peak learning rate of the hidden matrices, as AdamW is given it. The paper's schedule falls from it
            to zero in a straight line (recalled); under another one the mean rate is another share of the peak.
        weight_decay: lambda, the decay that a step multiplies by lr (torch.optim.AdamW). For a decay that is not
            multiplied by it pass ``lr=1``.
        tokens: D, tokens of the whole run.
    Returns: tau.
    Raises: BadInput: for an argument that is not a positive, finite number.
    Paper: Bergsma, Dey, Gosal, Gray, Soboleva and Hestness 2025, arXiv 2505.13738.

    >>> timescale(batch=1000, lr=0.01, weight_decay=0.1, tokens=10_000_000)
    0.1
    """
    B, eta, lam, D = _positive("timescale", batch=batch, lr=lr, weight_decay=weight_decay, tokens=tokens)
    return B / (eta * lam * D)


def decay_for(timescale: float, batch: float, lr: float, tokens: float) -> float:
    r"""The weight decay that gives a run this timescale: the inverse of `timescale`.

    .. math:: \lambda = \frac{B}{\eta \tau D}

    At a timescale that stays, the decay grows in proportion to the batch. The timescale to ask for comes of a sweep:
    the paper finds its optimum to be a power law in tokens a parameter, `fit_power_law` of `fit_optimum` of small runs.

    Args:
        timescale: tau, such as ``law.predict(tokens / parameters)``.
        batch: B, tokens a step.
        lr: eta, the peak learning rate.
        tokens: D, tokens of the whole run.
    Returns: lambda, as torch.optim.AdamW takes it.
    Raises: BadInput: for an argument that is not a positive, finite number.
    Paper: Bergsma et al. 2025, arXiv 2505.13738.

    >>> decay_for(0.1, batch=1000, lr=0.01, tokens=10_000_000)
    0.1
    """
    tau, B, eta, D = _positive("decay_for", timescale=timescale, batch=batch, lr=lr, tokens=tokens)
    return B / (eta * tau * D)


@dataclass(frozen=True)
class PowerLaw:
    """y = c x^m, fitted in logs; standard errors are of log c and of m.

    Attributes:
        c, m: coefficient and exponent.
        log_c_error, m_error: their standard errors.
        r2: share of the (weighted) variance of log y that the law explains.
        spread: standard deviation of log y about the law, for a point of mean precision.
        covariance: of (log c, m).
        x, y: the points.
    """

    c: float
    m: float
    log_c_error: float
    m_error: float
    r2: float
    spread: float
    covariance: Float[Tensor, "2 2"]
    x: Vector
    y: Vector

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the errors: points less two."""
        return len(self.x) - 2

    def predict(self, x: float) -> float:
        """The law at x."""
        (x,) = _positive("PowerLaw.predict", x=x)
        return self.c * x**self.m

    def interval(self, x: float, level: float = 0.95) -> tuple[float, float]:
        """Prediction interval at x: where a new point of mean precision lies with this probability, were the law true."""
        (x,) = _positive("PowerLaw.interval", x=x)
        at = torch.tensor([1.0, math.log(x)], dtype=torch.float64)
        half = _quantile(level, self.freedom) * math.sqrt(float(at @ self.covariance @ at) + self.spread**2)
        return self.predict(x) * math.exp(-half), self.predict(x) * math.exp(half)

    def exponent_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of m."""
        half = _quantile(level, self.freedom) * self.m_error
        return self.m - half, self.m + half

    def summary(self) -> str:
        """The finding in plain words."""
        low, high = self.exponent_interval()
        flat = " The exponent may be zero: nothing shows yet that y depends on x." if low <= 0 <= high else ""
        return (
            f"y = {self.c:.3g} x^{self.m:.3g}; the exponent's 95% interval is [{low:.3g}, {high:.3g}] ({len(self.x)} points, "
            f"R^2 {self.r2:.3f}, a point lies {math.expm1(self.spread):.1%} off the law)." + flat
        )

    def plot(self) -> "Figure":
        """Points, law and 95% prediction interval on logarithmic axes (a matplotlib figure)."""
        ax = _axes("PowerLaw.plot")
        span = float(self.x.min()), float(self.x.max())
        grid = torch.logspace(math.log10(span[0] / 1.5), math.log10(1.5 * span[1]), 60, dtype=torch.float64).tolist()
        low, high = zip(*(self.interval(x) for x in grid), strict=True)
        ax.fill_between(grid, low, high, color="#4477aa", alpha=0.2, lw=0, label="95% for a new point")
        ax.plot(grid, [self.predict(x) for x in grid], color="#4477aa", label=f"{self.c:.3g} x^{self.m:.3g}")
        ax.plot(self.x.tolist(), self.y.tolist(), "o", color="#cc6677")
        ax.set(xscale="log", yscale="log", xlabel="x", ylabel="y")
        ax.legend(frameon=False)
        return ax.figure


def fit_power_law(x: Numbers, y: Numbers, errors: Numbers | None = None) -> PowerLaw:
    r"""Fit a power law by least squares in logs.

    .. math:: \log y = \log c + m \log x, \qquad \tau_{opt} = c_\tau (D/N)^{m_\tau}, \quad B_{opt} = c D^m, \quad
              B_{crit} = c' D^{m'}

    The right-hand ones are the paper's laws: N parameters (say whether with embeddings: in small models it changes N by
    a factor of two), D tokens. It finds a falling first one (m near -0.5) and rising other ones (m near 0.4 and 0.5)
    for models of 111 million to 3.3 billion parameters; these exponents are recalled, and none is a default here.

    Args:
        x, y: the points, positive; at least four, for three give a line through anything.
        errors: standard errors of log y, such as `Optimum.error`. Points count by their inverse squares; what is common
            to all is estimated from the residuals. None: all count alike.
    Returns: a `PowerLaw`.
    Raises: BadInput: for fewer than four points, lengths that differ, numbers that are not positive and finite, or x
        all equal.
    Paper: Bergsma et al. 2025, arXiv 2505.13738.

    >>> law = fit_power_law([1, 4, 16, 64], [2, 1, 0.5, 0.25])
    >>> round(law.c, 9), round(law.m, 9)
    (2.0, -0.5)
    """
    who = "fit_power_law"
    x, y = _vectors(who, 4, x=x, y=y)
    w = torch.ones_like(x)
    if errors is not None:
        (e,) = _vectors(who, 4, errors=errors)
        if len(e) != len(x):
            raise BadInput(f"{who} needs an error for each point, got {len(e)} for {len(x)}")
        w = e.square().reciprocal()
        w = w / w.mean()
    if float(x.log().max() - x.log().min()) < 1e-9:
        raise BadInput(f"{who} needs different values of x, got {float(x[0]):g} alone")
    A = torch.stack([torch.ones_like(x), x.log()], 1)
    beta, covariance, spread = _least_squares(A, y.log(), w)
    mean = (w * y.log()).sum() / w.sum()
    total = float((w * (y.log() - mean).square()).sum())
    r2 = 1 - spread**2 * (len(x) - 2) / total if total > 0 else 1.0
    log_c_error, m_error = covariance.diagonal().sqrt().tolist()
    return PowerLaw(math.exp(beta[0]), float(beta[1]), log_c_error, m_error, r2, spread, covariance, x, y)


@dataclass(frozen=True)
class Optimum:
    """Where a sweep is best: the vertex of a parabola in the logarithm of the setting.

    Attributes:
        at: the best setting.
        value: the loss there.
        error: standard error of log `at`, by the parabola's errors.
        curvature: second derivative of the loss by the logarithm of the setting.
        coefficients, covariance: of the parabola in log(setting / `centre`), constant first.
        centre: the best setting of the grid.
        settings, losses: all points; used: which of them the parabola was fitted to.
    """

    at: float
    value: float
    error: float
    curvature: float
    coefficients: Float[Tensor, "3"]
    covariance: Float[Tensor, "3 3"]
    centre: float
    settings: Vector
    losses: Vector
    used: Tensor

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the best setting after Fieller; (0, inf) where the parabola may be flat."""
        (_, b, a), V, freedom = self.coefficients.tolist(), self.covariance, int(self.used.sum()) - 3
        t2 = _quantile(level, freedom) ** 2
        # all v at which the slope b + 2 a v is not told from zero
        A, B, C = 4 * (a * a - t2 * V[2, 2]), 4 * (a * b - t2 * V[1, 2]), b * b - t2 * V[1, 1]
        if not A > 0:
            return 0.0, math.inf
        root = math.sqrt(max(float(B * B - 4 * A * C), 0.0))
        low, high = float((-B - root) / (2 * A)), float((-B + root) / (2 * A))
        return self.centre * math.exp(low), self.centre * math.exp(high)

    def summary(self) -> str:
        """The finding in plain words."""
        low, high = self.interval()
        flat = " The minimum is too flat to be told from none: add seeds or a wider grid." if high == math.inf else ""
        return (
            f"The sweep is best at {self.at:.3g}, 95% interval [{low:.3g}, {high:.3g}], with a loss of {self.value:.4g}; a "
            f"setting twice or half as large costs {self.curvature / 2 * math.log(2) ** 2:.2g} (parabola in logs through "
            f"{int(self.used.sum())} of {len(self.settings)} points)." + flat
        )

    def plot(self) -> "Figure":
        """The sweep, the parabola and its vertex (a matplotlib figure)."""
        ax = _axes("Optimum.plot")
        inside = self.settings[self.used].log()
        grid = torch.linspace(float(inside.min()), float(inside.max()), 60, dtype=torch.float64)
        u = grid - math.log(self.centre)
        ax.plot(self.settings.tolist(), self.losses.tolist(), "o", mfc="none", color="#cc6677")
        ax.plot(self.settings[self.used].tolist(), self.losses[self.used].tolist(), "o", color="#cc6677")
        ax.plot(grid.exp().tolist(), (_powers(u) @ self.coefficients).tolist(), color="#4477aa")
        ax.axvline(self.at, color="#4477aa", lw=0.8, ls="--", label=f"best at {self.at:.3g}")
        ax.set(xscale="log", xlabel="setting", ylabel="loss")
        ax.legend(frameon=False)
        return ax.figure


def fit_optimum(settings: Numbers, losses: Numbers, *, reach: int = 2) -> Optimum:
    """The best weight decay, batch size or rate of a sweep, from a parabola in logs around its minimum.

    Args:
        settings: the values tried, positive; a value may come several times, once for each seed.
        losses: the loss of each.
        reach: how many values of the grid on either side of the best one enter (2: ours; farther out, losses are no
            parabola).
    Returns: an `Optimum`; its `error` is the weight for `fit_power_law`.
    Raises: BadInput: if the best mean loss is at an end of the grid, where the minimum may lie beyond it; for fewer
        than four points around it; if the parabola has no minimum among them; for lengths that differ or numbers that
        are not finite (leave diverged runs out).
    Paper: Bergsma et al. 2025, arXiv 2505.13738; which points enter is our choice.

    >>> found = fit_optimum([0.25, 0.5, 1, 2, 4], [5, 2, 1, 2, 5])
    >>> round(found.at, 9), round(found.value, 9)
    (1.0, 1.0)
    """
    who = "fit_optimum"
    (s,) = _vectors(who, 4, settings=settings)
    y = _vector(who, "losses", losses)
    if len(s) != len(y):
        raise BadInput(f"{who} needs a loss for each setting, got {len(y)} for {len(s)}")
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < 1:
        raise BadInput(f"{who} needs a whole number of at least 1 for reach, got {reach!r}")
    grid, place = s.unique(return_inverse=True)
    means = torch.stack([y[place == k].mean() for k in range(len(grid))])
    best = int(means.argmin())
    if best in (0, len(grid) - 1):
        raise BadInput(
            f"{who} found the least loss at an end of the grid, {float(grid[best]):g} of {float(grid[0]):g} to "
            f"{float(grid[-1]):g}, where the minimum may lie beyond it; extend the sweep on that side"
        )
    used = (place - best).abs() <= reach
    centre = float(grid[best])
    u = s[used].log() - math.log(centre)
    if int(used.sum()) < 4:
        raise BadInput(
            f"{who} needs at least four points around the minimum, got {int(used.sum())}; add values or seeds"
        )
    beta, covariance, _ = _least_squares(_powers(u), y[used], torch.ones_like(u))
    (_, b, a) = beta.tolist()
    vertex = -b / (2 * a) if a > 0 else math.inf
    if not float(u.min()) <= vertex <= float(u.max()):
        raise BadInput(
            f"{who} found no minimum of a parabola among the points around {centre:g}; the sweep is too noisy or too narrow"
        )
    slope = torch.tensor([0.0, -1 / (2 * a), b / (2 * a * a)], dtype=torch.float64)
    error = math.sqrt(max(float(slope @ covariance @ slope), 0.0))
    value = float(beta[0]) - b * b / (4 * a)
    return Optimum(centre * math.exp(vertex), value, error, 2 * a, beta, covariance, centre, s, y, used)


@dataclass(frozen=True)
class CriticalBatch:
    """Beyond which batch size more data in parallel saves few steps.

    Attributes:
        b_crit: at this batch twice the least tokens and twice the least steps are needed.
        d_min: tokens that the smallest batches would need.
        log_b_crit_error, log_d_min_error: standard errors of their logarithms.
        spread: standard deviation of log tokens about the curve.
        batches, tokens: the points.
    """

    b_crit: float
    d_min: float
    log_b_crit_error: float
    log_d_min_error: float
    spread: float
    batches: Vector
    tokens: Vector

    @property
    def s_min(self) -> float:
        """Steps that the largest batches would need."""
        return self.d_min / self.b_crit

    def tokens_at(self, batch: float) -> float:
        """D(B), tokens to the target."""
        (B,) = _positive("CriticalBatch.tokens_at", batch=batch)
        return self.d_min * (1 + B / self.b_crit)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Confidence interval of the critical batch."""
        half = _quantile(level, len(self.batches) - 2) * self.log_b_crit_error
        return self.b_crit * math.exp(-half), self.b_crit * math.exp(half)

    def summary(self) -> str:
        """The finding in plain words."""
        low, high = self.interval()
        beyond = not float(self.batches.min()) <= self.b_crit <= float(self.batches.max())
        return (
            f"The critical batch is {self.b_crit:.3g}, 95% interval [{low:.3g}, {high:.3g}]: there a run needs "
            f"{2 * self.d_min:.3g} tokens, twice the {self.d_min:.3g} of the smallest batches, and twice the {self.s_min:.3g} "
            "steps of the largest." + (" It lies outside the batches tried, so take it as a guess." if beyond else "")
        )

    def plot(self) -> "Figure":
        """Tokens to the target by batch, the fitted curve and the critical batch (a matplotlib figure)."""
        ax = _axes("CriticalBatch.plot")
        ends = math.log10(float(self.batches.min())), math.log10(float(self.batches.max()))
        grid = torch.logspace(*ends, 60, dtype=torch.float64).tolist()
        ax.plot(self.batches.tolist(), self.tokens.tolist(), "o", color="#cc6677")
        ax.plot(grid, [self.tokens_at(B) for B in grid], color="#4477aa")
        ax.axvline(self.b_crit, color="#4477aa", lw=0.8, ls="--", label=f"critical batch {self.b_crit:.3g}")
        ax.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens to the target")
        ax.legend(frameon=False)
        return ax.figure


def fit_critical_batch(batches: Numbers, tokens: Numbers) -> CriticalBatch:
    r"""The critical batch size, from the tokens that runs of several batch sizes took to one target loss.

    .. math:: D(B) = D_{min} (1 + B / B_{crit}), \qquad S(B) = D(B) / B = S_{min} (1 + B_{crit} / B)

    fitted by least squares of log D: a search over B_crit, whose D_min is explicit, then errors by the derivatives
        there.

    Args:
        batches: B of each run, each with its own tuned rate.
        tokens: D of each, the tokens it took to the target loss.
    Returns: a `CriticalBatch`.
    Raises: BadInput: for fewer than four points; for numbers that are not positive and finite; if the tokens do not
        bend, so that no critical batch within a factor of 1,000 of the batches tried fits best.
    Paper: Bergsma et al. 2025, arXiv 2505.13738. The form is that of McCandlish et al. 2018 (arXiv 1812.06162); that
        the paper fits it so is recalled.

    >>> found = fit_critical_batch([1, 2, 4, 8], [15, 20, 30, 50])
    >>> round(found.b_crit, 6), round(found.d_min, 6)
    (2.0, 10.0)
    """
    who = "fit_critical_batch"
    B, D = _vectors(who, 4, batches=batches, tokens=tokens)
    if len(B.unique()) < 3:
        raise BadInput(f"{who} needs at least three different batch sizes, got {len(B.unique())}")
    y = D.log()

    def misfit(log_crit: Tensor) -> Tensor:
        r = y - (B / log_crit.exp()[:, None]).log1p()
        return (r - r.mean(1, keepdim=True)).square().sum(1)

    low, high = math.log(float(B.min()) / 1000), math.log(float(B.max()) * 1000)
    grid = torch.linspace(low, high, 401, dtype=torch.float64)
    k = int(misfit(grid).argmin())
    if k in (0, len(grid) - 1):
        raise BadInput(
            f"{who} found no bend: tokens {'do not rise' if k else 'rise in proportion to the batch'} from a batch of "
            f"{float(B.min()):g} to {float(B.max()):g}; try {'larger' if k else 'smaller'} ones"
        )
    crit = grid[k]
    for _ in range(30):  # the grid is within a few per cent, from where Gauss-Newton converges
        share = B / (B + crit.exp())  # minus the derivative of log D by log B_crit
        r = y - (B / crit.exp()).log1p()
        away = share - share.mean()
        crit = (crit - ((r - r.mean()) * away).sum() / away.square().sum()).clamp(low, high)
    share = B / (B + crit.exp())
    log_d = (y - (B / crit.exp()).log1p()).mean()
    A = torch.stack([torch.ones_like(B), -share], 1)
    _, covariance, spread = _least_squares(A, y - log_d - (B / crit.exp()).log1p(), torch.ones_like(B))
    d_error, crit_error = covariance.diagonal().sqrt().tolist()
    return CriticalBatch(float(crit.exp()), float(log_d.exp()), crit_error, d_error, spread, B, D)


def _least_squares(A: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor, float]:
    """Weighted least squares: coefficients, their covariance, and the standard deviation at weight 1."""
    root = w.sqrt()
    Q, R = torch.linalg.qr(A * root[:, None])
    beta = torch.linalg.solve_triangular(R, (Q.T @ (y * root))[:, None], upper=True)[:, 0]
    spread = math.sqrt(float((w * (y - A @ beta).square()).sum()) / (len(y) - A.shape[1]))
    inverse = torch.linalg.inv(R)
    return beta, spread**2 * inverse @ inverse.T, spread


def _powers(u: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(u), u, u.square()], 1)


def _quantile(level: float, freedom: int) -> float:
    """Of Student's t, two-sided."""
    if not 0 < level < 1:
        raise BadInput(f"an interval needs a level between 0 and 1, got {level!r}")
    with needs_extra("an interval of a fit"):
        from scipy import stats
    return float(stats.t.ppf(0.5 + level / 2, freedom))


def _positive(who: str, **given: Any) -> list[float]:
    found = []
    for name, value in given.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise BadInput(f"{who} needs a number for {name}, got {value!r}") from None
        if not (0 < number < math.inf):
            raise BadInput(f"{who} needs a positive, finite {name}, got {number:g}")
        found.append(number)
    return found


def _vector(who: str, name: str, given: Numbers) -> Vector:
    try:
        v = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{who} needs a list of numbers for {name}, got {given!r}") from None
    if v.ndim != 1:
        raise BadInput(f"{who} needs a list of numbers for {name}, got the shape {tuple(v.shape)}")
    if bad := int((~v.isfinite()).sum()):
        raise BadInput(f"{who} needs finite {name}, got {bad} NaN or infinite of {len(v)}")
    return v


def _vectors(who: str, least: int, **given: Numbers) -> list[Vector]:
    """Positive numbers in lists of one length."""
    found = {name: _vector(who, name, value) for name, value in given.items()}
    lengths = {len(v) for v in found.values()}
    if len(lengths) > 1 or min(lengths) < least:
        said = ", ".join(f"{len(v)} {name}" for name, v in found.items())
        raise BadInput(f"{who} needs at least {least} points, as many of one as of the other, got {said}")
    for name, v in found.items():
        if not bool((v > 0).all()):
            raise BadInput(f"{who} needs positive {name}, got {float(v.min()):g}")
    return list(found.values())


def _axes(who: str) -> Any:
    require_extra(who, "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(5, 3.4), layout="constrained").subplots()

"""Training under fixed data and unlimited compute: judge a recipe by where its loss levels off, ensemble, distil.

The recipe (arXiv 2509.14786). Repeat the data for many epochs with a weight decay far above the usual 0.1 (up to 3.2),
tuned with rate and epochs for each size. Train several such models from other seeds, each for twice the epochs at half
the decay that is best for one alone, and average their logits. Then train one small model with the usual decay on a
mixture of the data and of text sampled from the ensemble.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, describe, require_extra, require_finite

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

CONFIDENCE = 0.95
EXPONENTS = (1e-5, 30.0)  # searched; near the lower end the law is a logarithm and has no asymptote


# -- where a loss levels off ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law L(x) = asymptote + coefficient / x^exponent (`fit_power_law`).

    Attributes:
        asymptote, coefficient, exponent: E, A and alpha.
        low, high: the asymptote's 95% interval; infinite where the points leave it open.
        x, loss: the points, sorted by x.
        deviation: root mean square of what the law leaves over.
        problems: what makes the asymptote doubtful, one sentence each; empty where nothing does.
    """

    asymptote: float
    coefficient: float
    exponent: float
    low: float
    high: float
    x: Float[Tensor, "n"]
    loss: Float[Tensor, "n"]
    deviation: float
    problems: tuple[str, ...]

    def predict(self, x: Float[Tensor, "*m"] | float) -> Float[Tensor, "*m"]:
        """The law's loss at x > 0 (infinity gives the asymptote)."""
        return self.asymptote + self.coefficient * torch.as_tensor(x, dtype=torch.float64) ** -self.exponent

    def summary(self) -> str:
        """The law, its asymptote's interval, how far it lies beyond the points, and what is doubtful about it."""
        seen = float(self.predict(self.x[0]) - self.predict(self.x[-1]))
        ahead = float(self.predict(self.x[-1])) - self.asymptote
        words = (
            f"L(x) = {self.asymptote:.4g} + {self.coefficient:.4g} / x^{self.exponent:.3g} from {len(self.x)} points; "
        )
        words += f"95% interval of the asymptote {self.low:.4g} to {self.high:.4g}. "
        words += f"The loss falls by {seen:.3g} over the points and by {ahead:.3g} more beyond them."
        return words + "".join(f" Doubtful: {p}." for p in self.problems)

    def plot(self) -> "Figure":
        """Points, law and asymptote with its interval over log x (a matplotlib figure)."""
        require_extra("PowerLaw.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(5, 3.2), layout="constrained")
        ax = fig.subplots()
        start, end = float(self.x[0]), float(self.x[-1])
        x = torch.logspace(math.log10(start), math.log10(end * 30), 200, dtype=torch.float64)
        ax.plot(x, self.predict(x), color="#4477aa")
        ax.plot(self.x, self.loss, "o", color="#222222", ms=4)
        ax.axhline(self.asymptote, color="#aa3377", ls="--", lw=1)
        bottom, top = ax.get_ylim()
        ax.axhspan(max(self.low, bottom), min(self.high, top), color="#aa3377", alpha=0.12, lw=0)
        ax.set(xscale="log", xlabel="x", ylabel="loss", ylim=(bottom, top), title=f"levels off at {self.asymptote:.4g}")
        return fig


def fit_power_law(x: Sequence[float] | Tensor, loss: Sequence[float] | Tensor) -> PowerLaw:
    r"""Fit the law by which a loss falls with the size of a model, the members of an ensemble or the data.

    .. math:: L(x) = E + \frac{A}{x^{\alpha}}, \qquad A \ge 0, \; \alpha > 0                     (Sec. 3)

    by least squares. For a given alpha that is linear in (E, A); alpha is searched over its whole range, so there is no
    start to choose and no local minimum to land in. The interval of E is that of its profile: all E for which

    .. math:: \min_{A, \alpha} \mathrm{RSS}(E) \le \mathrm{RSS}_{\min} \Bigl(1 + \frac{F_{0.95}(1, n - 3)}{n - 3}\Bigr)

    with F a quantile (derived; the paper gives no interval). It takes the points' errors as independent and of one
    size. With four points it is wide, and it is open below where a logarithm, which never levels off, fits as well.

    Args:
        x: sizes above 0, at least three different ones. Repeats (seeds) may stand as points of their own.
        loss: the loss at each.
    Returns: the law; its `problems` say what makes the asymptote doubtful: only three points, a loss that rises
        somewhere, an open interval.
    Raises: BadInput: for different lengths, fewer than three different x, x not above 0, NaN or infinity.
    Paper: Kim et al. 2025, arXiv 2509.14786. The authors use scipy's curve_fit on the same law, in parts with E >= 0.

    >>> sizes = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    >>> law = fit_power_law(sizes, 3.0 + 0.5 / sizes)
    >>> round(law.asymptote, 6), round(law.coefficient, 6), round(law.exponent, 6)
    (3.0, 0.5, 1.0)
    """
    import numpy as np

    require_extra("fit_power_law", "scipy")
    from scipy import optimize, stats

    xs, ys = _points(x, loss)
    n = len(xs)
    scale, spread = float(xs[0]), float(np.ptp(ys))
    u = xs / scale  # at least 1, so that no power of it overflows

    def given_exponent(alpha: "np.ndarray") -> tuple["np.ndarray", "np.ndarray", "np.ndarray"]:
        """E, A and the sum of squares for each alpha."""
        z = np.exp(-alpha[:, None] * np.log(u))
        centred = z - z.mean(1, keepdims=True)
        A = np.maximum(0.0, centred @ ys / (centred**2).sum(1))
        E = ys.mean() - A * z.mean(1)
        return E, A, ((ys - E[:, None] - A[:, None] * z) ** 2).sum(1)

    def given_asymptote(alpha: "np.ndarray", E: float) -> "np.ndarray":
        z = np.exp(-alpha[:, None] * np.log(u))
        A = np.maximum(0.0, z @ (ys - E) / (z**2).sum(1))
        return ((ys - E - A[:, None] * z) ** 2).sum(1)

    def lowest(f: Callable[["np.ndarray"], "np.ndarray"]) -> tuple[float, float]:
        """The best log alpha and its sum of squares: a grid, then a search between the neighbours."""
        grid = np.linspace(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), 200)
        at = int(np.argmin(f(np.exp(grid))))
        ends = grid[max(0, at - 1)], grid[min(len(grid) - 1, at + 1)]
        best = optimize.minimize_scalar(
            lambda a: float(f(np.exp(np.array([a])))[0]), bounds=ends, method="bounded", options={"xatol": 1e-10}
        )
        return float(best.x), float(best.fun)

    log_alpha, rss = lowest(lambda a: given_exponent(a)[2])
    alpha = math.exp(log_alpha)
    E, A = (float(v[0]) for v in given_exponent(np.array([alpha]))[:2])
    low = high = E
    if n == 3:
        low, high = -math.inf, math.inf
    elif rss > n * (1e-9 * max(spread, abs(E) * 1e-3)) ** 2:
        limit = rss * (1 + float(stats.f.ppf(CONFIDENCE, 1, n - 3)) / (n - 3))

        def over(e: float) -> float:
            return lowest(lambda a: given_asymptote(a, e))[1] - limit

        slope = np.polyfit(np.log(u), ys, 1)
        logarithm = float(((ys - np.polyval(slope, np.log(u))) ** 2).sum()) if slope[0] < 0 else rss
        low = -math.inf if logarithm <= limit else _crossing(over, E, -spread)
        high = _crossing(over, E, spread)
    problems = _problems(xs, ys, A, alpha, low)
    deviation = math.sqrt(max(rss, 0.0) / n)
    points = torch.from_numpy(xs), torch.from_numpy(ys)
    return PowerLaw(E, A * scale**alpha, alpha, low, high, *points, deviation, problems)


def _points(x: Sequence[float] | Tensor, loss: Sequence[float] | Tensor) -> tuple["np.ndarray", "np.ndarray"]:
    who = "fit_power_law"
    xs, ys = (torch.as_tensor(v, dtype=torch.float64).detach().cpu() for v in (x, loss))
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise BadInput(f"{who} needs as many losses as x, got shapes {tuple(xs.shape)} and {tuple(ys.shape)}")
    for v, what in ((xs, "x"), (ys, "losses")):
        require_finite(v, who, what)
    if (xs <= 0).any():
        raise BadInput(f"{who} needs x above 0, got {float(xs.min()):g}")
    if len(xs.unique()) < 3:
        raise BadInput(f"{who} needs at least three different x for three unknowns, got {len(xs.unique())}")
    order = xs.argsort(stable=True)
    return xs[order].numpy(), ys[order].numpy()


def _crossing(over: Callable[[float], float], E: float, step: float) -> float:
    """Where the profile passes its limit on one side of E; infinite where it does not within 2^40 steps."""
    from scipy import optimize

    inside, step = E, step or 1e-12
    for _ in range(40):
        if over(E + step) > 0:
            return float(optimize.brentq(over, inside, E + step, rtol=1e-9))
        inside, step = E + step, 2 * step
    return math.copysign(math.inf, step)


def _problems(xs: "np.ndarray", ys: "np.ndarray", A: float, alpha: float, low: float) -> tuple[str, ...]:
    import numpy as np

    found, n = [], len(xs)
    sizes = np.unique(xs)
    if n == 3:
        found.append("three points fix three unknowns, so nothing tells how far off the law is")
    elif len(sizes) == 3:
        found.append("three different x fix three unknowns, so nothing tells whether the law holds between them")
    means = [float(ys[xs == s].mean()) for s in sizes]
    for i in range(len(sizes) - 1):
        if means[i + 1] >= means[i]:
            found.append(f"the loss does not fall from x = {sizes[i]:g} to {sizes[i + 1]:g}, where the law must")
    if A == 0:
        found.append("no falling law fits better than a constant, so the exponent means nothing")
    elif alpha < 1.01 * EXPONENTS[0]:
        found.append("a logarithm, which never levels off, fits best, so there is no asymptote")
    elif n > 3 and low == -math.inf:
        found.append("a logarithm, which never levels off, fits as well within the error")
    return tuple(found)


# -- ensembles and what is distilled from them ------------------------------------------------------------------------


class Ensemble(nn.Module):
    r"""Independently trained models as one: the mean of their logits (Sec. 4.1).

    .. math:: z(x) = \frac{1}{K} \sum_{k=1}^{K} z_k(x)

    Its probabilities are the members' geometric mean, normalised (not the mean of their probabilities).

    Args:
        models: the members; each gives logits of the same shape, or an object with `logits` (transformers).
    Raises: BadInput: for no members, something that is no module, the same module twice; in forward for logits of
        different shapes.
    Paper: Kim et al. 2025, arXiv 2509.14786. Members want other settings than a model alone: about twice the epochs and
        half the weight decay (Sec. 4.2).

    >>> one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> x = torch.ones(1, 2)
    >>> torch.allclose(Ensemble([one, other])(x), (one(x) + other(x)) / 2)
    True
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        members = list(models)
        if not members:
            raise BadInput("Ensemble needs at least one model, got none")
        for m in members:
            if not isinstance(m, nn.Module):
                raise BadInput(f"Ensemble needs modules, got {type(m).__name__}")
        if len(set(map(id, members))) < len(members):
            raise BadInput("Ensemble needs different models, got the same one twice")
        self.members = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        total: Tensor | None = None
        for member in self.members:
            z = _logits(member(*args, **kwargs))
            if total is not None and z.shape != total.shape:
                raise BadInput(f"Ensemble needs logits of one shape, got a {describe(total)} and a {describe(z)}")
            total = z if total is None else total + z
        assert total is not None
        return total / len(self.members)


@torch.no_grad()
def sample_sequences(
    teacher: nn.Module,
    prompts: Int[Tensor, "count prompt"],
    length: int,
    *,
    context: int | None = None,
    generator: Generator | None = None,
) -> Int[Tensor, "count length"]:
    """Sequences sampled from a language model token by token, at temperature 1: the synthetic data of distillation.

    Args:
        teacher: a causal model from token ids (count, time) to logits (count, time, vocabulary), or to the last token's
            (count, vocabulary); an `Ensemble` of such. Set it to eval mode first.
        prompts: what each sequence starts after. The paper samples without a condition: a start token each.
        length: tokens to sample.
        context: how many last tokens the model is shown; None shows it all.
        generator: source of the draws; None takes torch's default one.
    Returns: the sampled tokens, without the prompts.
    Raises: BadInput: for prompts that are not a table of integers with at least one column, a length or context below 1, or
        logits that give no probabilities (minus infinity for some tokens is allowed).
    Paper: Kim et al. 2025, arXiv 2509.14786, App. E (there 10B tokens from an ensemble trained on 200M).

    >>> class Next(nn.Module):  # the token after t is t + 1
    ...     def forward(self, ids):
    ...         return 99.0 * nn.functional.one_hot((ids + 1) % 5, 5)
    >>> sample_sequences(Next(), torch.tensor([[0], [3]]), 4)
    tensor([[1, 2, 3, 4],
            [4, 0, 1, 2]])
    """
    who = "sample_sequences"
    if not isinstance(prompts, Tensor) or prompts.ndim != 2 or prompts.dtype not in (torch.int64, torch.int32):
        given = describe(prompts) if isinstance(prompts, Tensor) else type(prompts).__name__
        raise BadInput(f"{who} needs prompts as integers (count, tokens), got {given}")
    if prompts.numel() == 0:
        raise BadInput(f"{who} needs at least one prompt of at least one token, got a {describe(prompts)}")
    if length < 1 or (context is not None and context < 1):
        raise BadInput(f"{who} needs a length and a context of at least 1, got {length} and {context}")
    ids = prompts
    for _ in range(length):
        z = _logits(teacher(ids if context is None else ids[:, -context:]))
        p = (z[:, -1] if z.ndim == 3 else z).float().softmax(-1)
        if p.isnan().any():
            raise BadInput(
                f"{who} got logits that give no probabilities (NaN, or infinity) from {type(teacher).__name__}"
            )
        p = p.to(generator.device if generator is not None else p.device)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator).to(ids)], dim=1)
    return ids[:, prompts.shape[1] :]


def mixed_batches(
    real: Int[Tensor, "n *shape"],
    synthetic: Int[Tensor, "m *shape"],
    *,
    share: float,
    batch: int,
    steps: int,
    generator: Generator | None = None,
) -> Iterator[Int[Tensor, "batch *shape"]]:
    """Batches of a fixed mixture: `share` of each synthetic, the rest real; both shuffled anew in every pass over them.

    For distillation: a student trained on them with the usual loss and the usual weight decay (0.1) keeps most of an
    ensemble's gain, and one of its teacher's own size surpasses it. Without real data it falls behind.

    Args:
        real: the training data, a row each.
        synthetic: rows of the same shape (`sample_sequences`).
        share: of synthetic rows in a batch, rounded to whole rows. The paper mixes half and half for self-distillation;
            the authors' code tries 0.75 and 0.9 for ensembles.
        batch, steps: rows in a batch, and how many batches.
        generator: source of the order; None takes torch's default one.
    Returns: an iterator of `steps` batches.
    Raises: BadInput: for rows of different shape or dtype, an empty table, a share outside [0, 1], a batch or steps below 1.
    Paper: Kim et al. 2025, arXiv 2509.14786, Sec. 6 and App. E.

    >>> real, synthetic = torch.zeros(10, 1, dtype=torch.long), torch.ones(10, 1, dtype=torch.long)
    >>> [int(rows.sum()) for rows in mixed_batches(real, synthetic, share=0.75, batch=8, steps=3)]
    [6, 6, 6]
    """
    who = "mixed_batches"
    if real.shape[1:] != synthetic.shape[1:] or real.dtype != synthetic.dtype:
        raise BadInput(f"{who} needs real and synthetic rows alike, got a {describe(real)} and a {describe(synthetic)}")
    if not len(real) or not len(synthetic):
        raise BadInput(f"{who} needs rows of both kinds, got {len(real)} real and {len(synthetic)} synthetic")
    if not 0 <= share <= 1:
        raise BadInput(f"{who} needs a share of synthetic rows from 0 to 1, got {share}")
    if batch < 1 or steps < 1:
        raise BadInput(f"{who} needs at least one row a batch and one step, got {batch} and {steps}")
    count = round(share * batch)
    return _batches(real, synthetic, count, batch, steps, generator)


def _batches(
    real: Tensor, synthetic: Tensor, count: int, batch: int, steps: int, generator: Generator | None
) -> Iterator[Tensor]:
    ours, theirs = _rows(len(real), generator), _rows(len(synthetic), generator)
    for _ in range(steps):
        i, j = [next(ours) for _ in range(batch - count)], [next(theirs) for _ in range(count)]
        yield torch.cat([real[i], synthetic[j]])


def _rows(n: int, generator: Generator | None) -> Iterator[int]:
    """Row numbers, pass after pass."""
    device = generator.device if generator is not None else None
    while True:
        yield from torch.randperm(n, generator=generator, device=device).tolist()


def _logits(output: Any) -> Tensor:
    return getattr(output, "logits", output)

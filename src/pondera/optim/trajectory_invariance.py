"""Trajectory invariance: where learning rate and weight decay act through their product, tune one of them and leave the other."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[float] | Tensor
Setting = tuple[float, float]
EARLY, LATE = 0.3, 3.0  # of steps * gamma; ours: one averaging time 1 / gamma lies between them
SHOWN = 8  # curves a plot tells apart by colour


def effective_rate(lr: float, weight_decay: float) -> float:
    r"""The effective learning rate gamma = eta lambda of decoupled weight decay.

    A step of AdamW multiplies a weight by 1 - eta lambda, so that a weight which a norm behind it makes free of scale
    forgets its start in 1 / gamma steps, and from then on turns by about sqrt(2 gamma) a step, whatever eta is
    (derived).

    Args:
        lr: eta, the learning rate; under a schedule its peak, and compare runs of one shape of schedule only.
        weight_decay: lambda, multiplied by lr in each step, as torch.optim.AdamW does it.
    Returns: gamma.
    Raises: BadInput: for a number that is not finite, a rate that is not positive or a decay below zero.
    Paper: Li, Wen, Zhou, Zhu and Chen 2025, arXiv 2509.25049.

    >>> effective_rate(0.01, 0.1)
    0.001
    """
    eta, lam = _setting("effective_rate", lr, weight_decay)
    return eta * lam


def regime(steps: int, lr: float, weight_decay: float) -> str:
    r"""Which of the two a run of so many steps follows: its learning rate or its effective rate.

    Early in training, curves of one learning rate overlap whatever the decay; after enough steps, those of one
    effective rate. It is steps that count, not tokens. The clock is steps times gamma: weights forget their start in 1
    / gamma steps (derived).

    Args:
        steps: steps of the run. Under a schedule of mean share s of the peak, `steps` times s.
        lr: eta, as in `effective_rate`.
        weight_decay: lambda, as in `effective_rate`.
    Returns: "rate" where steps times gamma is below 0.3, "effective rate" where above 3, "between" otherwise; the
        bounds are ours, the paper gives none.
    Raises: BadInput: as `effective_rate`, and for steps below 1.
    Paper: Li et al. 2025, arXiv 2509.25049.

    >>> regime(1000, lr=0.001, weight_decay=0.1), regime(100_000, lr=0.001, weight_decay=0.1)
    ('rate', 'effective rate')
    """
    gamma = effective_rate(lr, weight_decay)
    if not (isinstance(steps, (int, float)) and 1 <= steps < math.inf):
        raise BadInput(f"regime needs at least one step, got {steps!r}")
    return "rate" if steps * gamma < EARLY else "effective rate" if steps * gamma > LATE else "between"


def one_dimensional_sweep(lr: float, effective_rates: Iterable[float]) -> list[Setting]:
    r"""The settings to try where runs follow their effective rate: one learning rate, and the decay that gives each
    gamma.

    .. math:: \lambda = \gamma / \eta

    Fix a rate that trains safely (a rate too large diverges whatever the decay), sweep the decay, and take the best. In
    runs of few steps and large batches it is the other way round: `regime` says which. Of finding the best of a grid
    over both it saves all but one row.

    Args:
        lr: eta, kept.
        effective_rates: gammas to try.
    Returns: (lr, weight_decay) pairs, in the order of `effective_rates`.
    Raises: BadInput: for no gamma or one that is not positive, or a rate that is not.
    Paper: Li et al. 2025, arXiv 2509.25049.

    >>> one_dimensional_sweep(0.01, [0.001, 0.002])
    [(0.01, 0.1), (0.01, 0.2)]
    """
    gammas = list(effective_rates)
    if not gammas:
        raise BadInput("one_dimensional_sweep needs at least one effective rate, got none")
    for gamma in gammas:
        if _number("one_dimensional_sweep", "effective rate", gamma) <= 0:
            raise BadInput(f"one_dimensional_sweep needs positive effective rates, got {gamma!r}")
    return [(_setting("one_dimensional_sweep", lr, 0.0)[0], gamma / lr) for gamma in gammas]


@dataclass(frozen=True)
class Invariance:
    """How much closer runs of one effective rate are to each other than to the rest; and the same by learning rate.

    Attributes:
        ratio: mean distance of two runs of one effective rate over that of two runs of different ones. Below 1 they
            overlap.
        p_value: share of all ways to deal the runs into groups of these sizes whose ratio is as small.
        rate_ratio, rate_p_value: the same, grouped by learning rate.
        distances: of every two runs: mean absolute difference of their losses over the part compared, over the spread
            of the losses there.
        settings: (lr, weight_decay) of each run. curves: their losses over the part compared. start: index of its
            first.
    """

    ratio: float
    p_value: float
    rate_ratio: float
    rate_p_value: float
    distances: Float[Tensor, "runs runs"]
    settings: tuple[Setting, ...]
    curves: Float[Tensor, "runs steps"]
    start: int

    def summary(self) -> str:
        """The finding in plain words."""
        both = {"effective rate": (self.ratio, self.p_value), "learning rate": (self.rate_ratio, self.rate_p_value)}
        told = [f"by {name} {ratio:.2g} (p = {p:.2g})" for name, (ratio, p) in both.items()]
        near = min(both, key=lambda name: both[name][0])
        sure = both[near][1] <= 0.05 and both[near][0] < 1
        verdict = (
            f"These runs go by their {near}: sweep it alone."
            if sure
            else "Neither is shown to set the course: compare more runs, or tune both."
        )
        return f"Distance of two runs of a group over that of two of different groups: {', '.join(told)}. {verdict}"

    def plot(self) -> "Figure":
        """The curves over the part compared, a colour for each effective rate (a matplotlib figure)."""
        require_extra("Invariance.plot", "matplotlib")
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        ax = Figure(figsize=(6, 3.6), layout="constrained").subplots()
        gammas = sorted({_key(eta * lam) for eta, lam in self.settings})
        rates = sorted({_key(eta) for eta, _ in self.settings})
        styles = ("-", "--", ":", "-.")
        for (eta, lam), curve in zip(self.settings, self.curves.tolist(), strict=True):
            g, r = gammas.index(_key(eta * lam)), rates.index(_key(eta))
            ax.plot(
                range(self.start, self.start + len(curve)),
                curve,
                color=colormaps["viridis"](g / max(1, len(gammas) - 1) * 0.9),
                ls=styles[r % len(styles)],
                lw=1.2,
                label=f"{eta * lam:.2g} = {eta:.2g} x {lam:.2g}" if len(self.settings) <= SHOWN else None,
            )
        ax.set(xlabel="step", ylabel="loss", title="colour: effective rate; line: learning rate")
        if len(self.settings) <= SHOWN:
            ax.legend(frameon=False, fontsize=7)
        return ax.figure  # type: ignore[return-value]


def trajectory_invariance(
    runs: Mapping[Setting, Curve], *, last: float = 0.5, smooth: int = 1, draws: int = 2000, seed: int = 0
) -> Invariance:
    r"""Do runs of one effective rate follow one loss curve?

    .. math:: d_{ij} = \frac{\mathrm{mean}_t |L_i(t) - L_j(t)|}{\mathrm{std}_{i,t}\, L_i(t)}, \qquad
              \text{ratio} = \frac{\mathrm{mean}\{d_{ij} : \gamma_i = \gamma_j\}}{\mathrm{mean}\{d_{ij} : \gamma_i \neq
              \gamma_j\}}

    over the last part of the run, with a p-value from dealing the runs into groups anew: all ways where there are few,
    else random ones. Measure and test are ours; the paper shows the curves. Log the gradient's norm in the place of the
    loss to compare that.

    Give every run the same batches in the same order, one batch size and one shape of schedule; otherwise noise hides
    an overlap.

    Args:
        runs: by (lr, weight_decay), the losses, one a step or an evaluation. At least two runs share an effective
            rate or a learning rate, in at least two groups.
        last: share of the curve compared, from its end (0.5: ours). The early part goes by the learning rate, if
            anything.
        smooth: losses averaged into one before they are compared; 100 or so where they are of single batches.
        draws: random dealings where there are more ways than that.
        seed: of these draws.
    Returns: an `Invariance`. A ratio or p-value of a grouping that has no pair within, or none between, is 1.
    Raises: BadInput: for fewer than three runs, curves of different lengths or with a NaN or infinity (leave diverged
        runs out), too few losses, no two runs that could overlap, or a setting out of range.
    Paper: Li et al. 2025, arXiv 2509.25049 (one model of 164 million parameters under AdamW).

    >>> curve = torch.linspace(3, 1, 40)
    >>> runs = {(0.01, 0.1): curve, (0.02, 0.05): curve + 0.01, (0.01, 0.3): curve - 0.3, (0.02, 0.15): curve - 0.31}
    >>> found = trajectory_invariance(runs)
    >>> round(found.ratio, 3), round(found.rate_ratio, 3)
    (0.032, 1.938)
    """
    who = "trajectory_invariance"
    if not isinstance(runs, Mapping) or len(runs) < 3:
        raise BadInput(f"{who} needs at least three runs by (lr, weight_decay), got {len(runs)}")
    settings = tuple(_pair(who, key) for key in runs)
    L = _curves(who, list(runs.values()))
    if not 0 < last <= 1:
        raise BadInput(f"{who} needs a share above 0 and at most 1 for last, got {last!r}")
    for name, value in (("smooth", smooth), ("draws", draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"{who} needs a whole number of at least 1 for {name}, got {value!r}")
    start = L.shape[1] - max(1, round(last * L.shape[1]))
    part = L[:, start:]
    n = part.shape[1] // smooth
    if not n:
        raise BadInput(
            f"{who} needs {smooth} losses or more in the part compared, to average them, got {part.shape[1]}"
        )
    part = part[:, part.shape[1] - n * smooth :].unflatten(1, (n, smooth)).mean(2)
    spread = part.std()
    if not spread > 0:
        raise BadInput(f"{who} got curves that are all one number, which cannot be told apart")
    D = (part[:, None] - part[None]).abs().mean(2) / spread
    groupings = [[_key(eta * lam) for eta, lam in settings], [_key(eta) for eta, _ in settings]]
    if not any(len(set(g)) < len(g) and len(set(g)) > 1 for g in groupings):
        raise BadInput(
            f"{who} needs two runs of one effective rate or learning rate, beside others; all {len(settings)} differ"
        )
    (ratio, p), (rate_ratio, rate_p) = (_test(D, g, draws, seed) for g in groupings)
    return Invariance(ratio, p, rate_ratio, rate_p, D, settings, part, start)


def _test(D: Tensor, labels: list[float], draws: int, seed: int) -> tuple[float, float]:
    """Ratio of mean distances within and between groups, and its permutation p-value."""
    order = {label: k for k, label in enumerate(dict.fromkeys(labels))}
    label = torch.tensor([order[v] for v in labels])
    first, second = torch.tensor(list(combinations(range(len(labels)), 2))).unbind(1)
    d = D[first, second]

    def ratios(dealt: Tensor) -> Tensor:
        same = dealt[:, first] == dealt[:, second]
        within, between = (same * d).sum(1) / same.sum(1), (~same * d).sum(1) / (~same).sum(1)
        return within / between

    same = label[first] == label[second]
    if not bool(same.any()) or bool(same.all()):
        return 1.0, 1.0
    seen = float(ratios(label[None]))
    every = _dealings(labels, draws)
    if every is not None:
        return seen, float((ratios(every) <= seen * (1 + 1e-9)).double().mean())
    g = torch.Generator().manual_seed(seed)
    dealt = torch.stack([label[torch.randperm(len(label), generator=g)] for _ in range(draws)])
    return seen, float((1 + (ratios(dealt) <= seen * (1 + 1e-9)).sum()) / (1 + draws))


def _dealings(labels: list[float], most: int) -> Tensor | None:
    """Every distinct way to deal the labels, if there are no more than `most`."""
    counts = [labels.count(v) for v in dict.fromkeys(labels)]
    ways = math.factorial(len(labels))
    for c in counts:
        ways //= math.factorial(c)
    if ways > most:
        return None
    rows = [[-1] * len(labels)]
    for k, c in enumerate(counts):
        grown = []
        for row in rows:
            free = [i for i, v in enumerate(row) if v < 0]
            for chosen in combinations(free, c):
                new = list(row)
                for i in chosen:
                    new[i] = k
                grown.append(new)
        rows = grown
    return torch.tensor(rows)


def _key(value: float) -> float:
    """Products of floats that are meant to be equal, made so."""
    return float(f"{value:.6g}")


def _number(who: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{who} needs a number for {name}, got {value!r}") from None
    if not math.isfinite(number):
        raise BadInput(f"{who} needs a finite {name}, got {number:g}")
    return number


def _setting(who: str, lr: Any, weight_decay: Any) -> Setting:
    eta, lam = _number(who, "lr", lr), _number(who, "weight_decay", weight_decay)
    if eta <= 0 or lam < 0:
        raise BadInput(f"{who} needs a positive lr and a weight_decay of at least 0, got {eta:g} and {lam:g}")
    return eta, lam


def _pair(who: str, key: Any) -> Setting:
    if not (isinstance(key, tuple) and len(key) == 2):
        raise BadInput(f"{who} needs runs by (lr, weight_decay), got the key {key!r}")
    return _setting(who, *key)


def _curves(who: str, curves: list[Curve]) -> Float[Tensor, "runs steps"]:
    try:
        rows = [torch.as_tensor(c, dtype=torch.float64).detach().cpu() for c in curves]
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{who} needs a list of losses for each run") from None
    shapes = {tuple(r.shape) for r in rows}
    if len(shapes) > 1 or rows[0].ndim != 1 or not len(rows[0]):
        raise BadInput(f"{who} needs as many losses of each run, got the shapes {sorted(shapes)}")
    L = torch.stack(rows)
    if bad := int((~L.isfinite()).sum()):
        raise BadInput(f"{who} needs finite losses, got {bad} NaN or infinite; leave diverged runs out")
    return L

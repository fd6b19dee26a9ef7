"""Trajectory invariance (arXiv 2509.25049): do runs go by rate times decay, when, and is one sweep as good as a grid of both?

Small language models with an RMS norm behind every matrix, on text that is read once; all pairs of a seed see the same batches.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from pondera.optim.trajectory_invariance import effective_rate, regime, trajectory_invariance
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.optim._letters import Runs, level, to_zero, trained

FRESH, SEEDS, WIDTH = 2000, 5, 8
ETAS, GAMMAS = (0.004, 0.008, 0.016), (2.5e-3, 1e-2, 4e-2)
POINTS = [(eta, gamma / eta) for eta in ETAS for gamma in GAMMAS]


@cache
def course(batch: int, steps: int, normed: bool = True) -> Runs:
    seeds = range(FRESH, FRESH + SEEDS)
    return trained(POINTS, width=WIDTH, batch=batch, tokens=batch * steps, seeds=seeds, schedule=level, normed=normed)


@cache
def long_course(normed: bool) -> Runs:
    seeds = range(FRESH + 500, FRESH + 500 + SEEDS)
    return trained(POINTS, width=WIDTH, batch=32, tokens=32 * 1600, seeds=seeds, schedule=level, normed=normed)


Label = Callable[[float, float], float]


def decay_alone(lr: float, weight_decay: float) -> float:
    return weight_decay


@claim(
    "After enough steps the loss curves of runs with one product of rate and decay overlap; early on those of one rate do",
    source="abstract; Fig. 1; why: Sec. on mechanism (recalled)",
    criterion="nine pairs, rates 0.004 to 0.016 by products 0.0025 to 0.04, a level rate, batch 32, 1,600 steps, "
    "losses averaged "
    "over 100 steps, in each of 5 seeds: over the second half, distance of runs of one group over that of different "
    "groups at "
    "most 1/3 with a permutation p of at most 0.05 where the group is the product; over the first 100 steps (averaged "
    "over 25) "
    "the same where it is the rate. Beside it, the first of a model without norms. A first run looked at 200 steps, by which "
    "the shift had come (ratios 0.37 to 0.63); seeds are new",
    method=effective_rate,
    sham=Sham("the decay alone in the place of the product", decay_alone),
)
def curves_overlap(lab: Lab, label: Label) -> Finding:
    found: dict[str, list[tuple[float, float]]] = {"late, by the product": [], "early, by the rate": []}
    for curves in long_course(True).train:
        runs = {(eta, label(eta, lam) / eta): curve for (eta, lam), curve in zip(POINTS, curves, strict=True)}
        late = trajectory_invariance(runs, smooth=100)
        early = trajectory_invariance({k: c[:100] for k, c in runs.items()}, last=1.0, smooth=25)
        found["late, by the product"].append((late.ratio, late.p_value))
        found["early, by the rate"].append((early.rate_ratio, early.rate_p_value))
    plain = [
        trajectory_invariance(dict(zip(POINTS, curves, strict=True)), smooth=100).ratio
        for curves in long_course(False).train
    ]
    ratios = {name: [r for r, _ in rows] for name, rows in found.items()}
    return conclude(
        {name: met(all(r <= 1 / 3 and p <= 0.05 for r, p in rows)) for name, rows in found.items()}
        | {"late, without norms": met(max(plain) <= 1 / 3)},
        central=list(found),
        ratio=ratios | {"late, without norms": plain},
        p_value={name: [p for _, p in rows] for name, rows in found.items()},
    )


# -- the shift --------------------------------------------------------------------------------------------------------

WINDOW = 25
Unit = Callable[[int, int], float]


def in_steps(steps: int, batch: int) -> float:
    return steps


def in_tokens(steps: int, batch: int) -> float:
    return steps * batch


def shift(curves: torch.Tensor) -> int | None:
    """The first step from which runs of one product are closer than runs of one rate, for three windows on end."""
    nearer = []
    for k in range(0, curves.shape[1] - WINDOW + 1, WINDOW):
        part = dict(zip(POINTS, curves[:, k : k + WINDOW], strict=True))
        found = trajectory_invariance(part, last=1.0, smooth=WINDOW, draws=1)
        nearer.append(found.ratio < found.rate_ratio)
        if nearer[-3:] == [True] * 3:
            return k - 2 * WINDOW
    return None


@claim(
    "The shift from rate to product comes after a number of steps, not of tokens",
    source="abstract; sections on the number of iterations",
    criterion="the nine pairs with batches of 32 and 256, 800 steps at a level rate, the shift being the first of "
    "three windows of 25 "
    "steps in which runs of one product are closer than runs of one rate: its mean place over 5 seeds differs between "
    "the batches "
    "by a factor of at most 2, where it would differ by 8 if tokens counted; and each batch has a shift in each seed",
    budget="full",
    method=in_steps,
    sham=Sham("counted in tokens", in_tokens),
)
def shift_is_by_steps(lab: Lab, unit: Unit) -> Finding:
    places = {batch: [shift(curves) for curves in course(batch, 800).train] for batch in (32, 256)}
    found = {b: [unit(k + WINDOW, b) for k in row if k is not None] for b, row in places.items()}
    means = {b: sum(row) / len(row) if row else 0.0 for b, row in found.items()}
    small, large = means.values()
    factor = max(small, large) / min(small, large) if min(small, large) else float("inf")
    return conclude(
        {
            "a shift in each seed": met(all(None not in row for row in places.values())),
            "within a factor of 2": met(factor <= 2),
        },
        steps={b: [None if k is None else k + WINDOW for k in row] for b, row in places.items()},
        factor=factor,
    )


# -- the rule ---------------------------------------------------------------------------------------------------------

TRIED, TRIED_ON = 4, 24  # seeds to choose by, and others to measure on


@cache
def ends(points: tuple[tuple[float, float], ...], batch: int, steps: int, first: int, n: int) -> torch.Tensor:
    """Test losses, (seeds, points)."""
    seeds = range(first, first + n)
    return trained(points, width=WIDTH, batch=batch, tokens=batch * steps, seeds=seeds, schedule=to_zero).test.double()


Rule = Callable[[int, float, float], str]


def the_other(steps: int, lr: float, weight_decay: float) -> str:
    return {"rate": "effective rate", "effective rate": "rate"}.get(regime(steps, lr, weight_decay), "between")


def worst_of_one_sweep(
    rule: Rule, etas: Sequence[float], decays: Sequence[float], batch: int, steps: int
) -> tuple[list[float], dict[str, object]]:
    """Relative loss, a seed each, of the worst of the one-dimensional sweeps that the rule tells, over the grid's best."""
    grid = tuple((eta, lam) for eta in etas for lam in decays)
    mean = ends(grid, batch, steps, FRESH + 100, TRIED).mean(0).view(len(etas), len(decays))
    middle = etas[len(etas) // 2], decays[len(decays) // 2]
    told = rule(steps // 2, *middle)  # the mean rate is half of the peak
    if told == "effective rate":  # keep the rate, sweep the decay
        lines = [(k, int(mean[k].argmin())) for k in range(len(etas))]
    else:
        lines = [(int(mean[:, k].argmin()), k) for k in range(len(decays))]
    best = divmod(int(mean.argmin()), len(decays))
    chosen = [*lines, best]
    points = tuple((etas[i], decays[j]) for i, j in chosen)
    loss = ends(points, batch, steps, FRESH + 200, TRIED_ON)
    worst = int(loss[:, :-1].mean(0).argmax())
    gap = (loss[:, worst] / loss[:, -1] - 1).tolist()
    facts = {"told": told, "best_of_grid": points[-1], "found": points[:-1], "mean_loss": loss.mean(0), "grid": mean}
    return gap, facts  # type: ignore[return-value]


@claim(
    "One sweep finds what a grid of both finds: of the decay where runs have many steps, of the rate where they have few",
    source="abstract; the tuning rule",
    criterion="schedule to zero, pairs chosen by the mean test loss of 4 seeds and measured on 24 others. Many steps: "
    "2,400 of batch 32, "
    "rates 0.004 to 0.016 by six decays 0.02 to 4.86. Few: 100 of batch 256, seven rates 0.004 to 0.256 by decays "
    "0.01 to 0.1. Whatever value of "
    "the other is kept, so for the worst of these sweeps, its loss over that of the grid's best pair is above 1 by "
    "less than 1%, by "
    "its 95% interval",
    budget="full",
    method=regime,
    sham=Sham("sweep the other one", the_other),
)
def one_sweep_is_enough(lab: Lab, rule: Rule) -> Finding:
    lab.draws(TRIED_ON)
    many, facts = worst_of_one_sweep(rule, (0.004, 0.008, 0.016), tuple(0.02 * 3**k for k in range(6)), 32, 2400)
    few, others = worst_of_one_sweep(rule, tuple(0.004 * 2**k for k in range(7)), (0.01, 0.03, 0.1), 256, 100)
    found = {"many steps": lab.effect(many), "few steps": lab.effect(few)}
    return conclude(
        {name: weigh(e, below=0.01) for name, e in found.items()},
        loss_over_the_grids_best=found,
        many_steps=facts,
        few_steps=others,
    )

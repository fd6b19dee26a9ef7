"""Spectral and Wasserstein regularization (arXiv 2406.06811): do they keep a net trainable, task after task?

Nets that differ in seed, factor or rate are trained side by side.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.penalties.spectral_continual import spectral, wasserstein_to_start
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Weights = Tensor  # (nets, out, in)
Pull = Callable[[Weights, Weights, Tensor], Tensor]  # of weights, those at the start and vectors: a value a net
Distance = Callable[[Tensor, Tensor], Tensor]


def nothing(w: Weights, start: Weights, u: Tensor) -> Tensor:
    return w.new_zeros(len(w))


def l2(w: Weights, start: Weights, u: Tensor) -> Tensor:
    return w.square().sum((1, 2))


def l2_to_start(w: Weights, start: Weights, u: Tensor) -> Tensor:
    return (w - start).square().sum((1, 2))


def spectral_each(w: Weights, start: Weights, u: Tensor) -> Tensor:
    """One power iteration a step, from the vectors in `u`, which it renews."""
    return torch.func.vmap(lambda w, u: spectral(w, memory={"weight": u}))(w, u)


def wasserstein_each(w: Weights, start: Weights, u: Tensor) -> Tensor:
    return torch.func.vmap(wasserstein_to_start)(w, start.flatten(1).sort(1).values)


# -- the distance ------------------------------------------------------------------------------------------------------


def place_by_place(weight: Tensor, start: Tensor) -> Tensor:
    return (weight - start).square().sum()


@claim(
    "Held to the distribution of its start, a weight is freer than held to the start itself",
    source="abstract (less restrictive than regularizing toward initial weights)",
    criterion="5 seeds, layers of 64 x 48 moved by noise of 0.01 to 1 times their own scale: never above the squared distance to the "
    "start, below half of it at noise of 1; 0 (to 1e-6 of the distance place by place) when the start's entries are shuffled",
    method=wasserstein_to_start,
    sham=Sham("the squared distance place by place", place_by_place),
)
def freer_than_the_start_itself(lab: Lab, distance: Distance) -> Finding:
    shares, shuffled = [], []
    for seed in lab.seeds:
        g = lab.generator(seed)
        start = torch.randn(64, 48, generator=g, dtype=torch.float64)
        for scale in (0.01, 0.1, 1.0):
            w = start + scale * torch.randn(64, 48, generator=g, dtype=torch.float64)
            shares.append(float(distance(w, start) / place_by_place(w, start)))
        w = start.flatten()[torch.randperm(start.numel(), generator=g)].reshape(64, 48)
        shuffled.append(float(distance(w, start) / place_by_place(w, start)))
    return conclude(
        {
            "never above": met(max(shares) <= 1 + 1e-12),
            "below half when far": met(max(shares[2::3]) < 0.5),
            "blind to places": met(max(shuffled) < 1e-6),
        },
        share_by_noise={n: [min(s), max(s)] for n, s in zip(("0.01", "0.1", "1"), (shares[i::3] for i in range(3)))},
        shuffled=max(shuffled),
    )


# -- tasks in a row ----------------------------------------------------------------------------------------------------

SIZES = (64, 48, 48, 48, 10)
IMAGES, BATCH, EPOCHS, TASKS, LAST = 150, 50, 20, 12, 5
FACTORS: dict[Pull, tuple[float, ...]] = {
    l2: (1e-4, 1e-3, 1e-2, 1e-1),
    l2_to_start: (1e-3, 1e-2, 1e-1, 1.0),
    spectral_each: (1e-4, 1e-3, 1e-2, 1e-1),
    wasserstein_each: (1.0, 10.0, 100.0, 1000.0),
}
RATES = dict.fromkeys(FACTORS, (6e-3, 1.2e-2)) | {l2: (3e-3, 6e-3)}
ALONE = (3e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2)  # rates of the net without a penalty, as many trials


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


def forward(layers: list[Tensor], x: Tensor) -> Tensor:
    for i in range(0, len(layers), 2):
        x = torch.baddbmm(layers[i + 1].unsqueeze(1), x.relu() if i else x, layers[i].mT)
    return x


@cache
def course(pull: Pull, seeds: range, kind: str, trials: tuple[tuple[float, float], ...]) -> Tensor:
    """Accuracy (trials, seeds, tasks) at the end of each task: of random labels on the training images, or of permuted pixels
    on others."""
    images, labels = _digits()
    n, of = len(trials), len(trials) * len(seeds)
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def each(draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        """What is drawn for a seed, the same for all trials; nets are ordered by trial, then seed."""
        return torch.stack([draw(g) for g in sources]).repeat(n, *[1] * draw(torch.Generator()).ndim)

    layers: list[Tensor] = []
    for a, b in pairwise(SIZES):
        layers += [each(lambda g: torch.randn(b, a, generator=g) * (2 / a) ** 0.5), torch.zeros(of, b)]  # noqa: B023
    starts = [w.clone() for w in layers[::2]]
    vectors = [torch.linalg.svd(w, full_matrices=False).U[:, :, 0].contiguous() for w in starts]
    layers = [p.requires_grad_() for p in layers]
    factor, rate = (torch.tensor(t).repeat_interleave(len(seeds)) for t in zip(*trials))
    first, second = [torch.zeros_like(p) for p in layers], [torch.zeros_like(p) for p in layers]
    steps, found = 0, []
    for _ in range(TASKS):
        chosen = each(lambda g: torch.randperm(len(images), generator=g)[: 2 * IMAGES])
        x, y = images[chosen], labels[chosen]
        if kind == "random labels":
            y = each(lambda g: torch.randint(10, (2 * IMAGES,), generator=g))
        else:
            x = x.gather(2, each(lambda g: torch.randperm(64, generator=g)).unsqueeze(1).expand_as(x))
        for _ in range(EPOCHS):
            order = each(lambda g: torch.randperm(IMAGES, generator=g))
            for rows in order.split(BATCH, dim=1):
                out = forward(layers, x.gather(1, rows.unsqueeze(2).expand(-1, -1, 64)))
                loss = F.cross_entropy(out.flatten(0, 1), y.gather(1, rows).flatten(), reduction="sum") / rows.shape[1]
                if pull is not nothing:
                    values = sum(pull(w, s, u) for w, s, u in zip(layers[::2], starts, vectors))
                    if pull is spectral_each:
                        values = values + sum(b.square().sum(1).square() for b in layers[1::2])  # type: ignore[assignment]
                    loss = loss + (factor * values).sum()
                steps += 1
                with torch.no_grad():  # Adam, each net at its own rate
                    for p, g, m, v in zip(layers, torch.autograd.grad(loss, layers), first, second):
                        m.lerp_(g, 0.1)
                        v.lerp_(g.square(), 0.001)
                        step = rate / (1 - 0.9**steps)
                        scale = (v / (1 - 0.999**steps)).sqrt_().add_(1e-8)
                        p.sub_(step.view(-1, *[1] * (p.ndim - 1)) * m / scale)
        part = slice(None, IMAGES) if kind == "random labels" else slice(IMAGES, None)
        with torch.no_grad():
            found.append((forward(layers, x[:, part]).argmax(2) == y[:, part]).float().mean(1))
    return torch.stack(found, 1).nan_to_num(0.0).reshape(n, len(seeds), TASKS)


def trials(pull: Pull) -> tuple[tuple[float, float], ...]:
    """Factor and rate: eight for each kind of net."""
    return tuple(product(FACTORS[pull], RATES[pull])) if pull in FACTORS else tuple((0.0, r) for r in ALONE)


def late(pull: Pull, seeds: range, kind: str) -> Tensor:
    """Mean accuracy over the last tasks (trials, seeds)."""
    return course(pull, seeds, kind, trials(pull))[:, :, -LAST:].mean(2)


def by_others(scores: Tensor) -> list[int]:
    """For each seed the trial that is best on the mean of the other seeds."""
    return [int((scores.sum(1) - scores[:, i]).argmax()) for i in range(scores.shape[1])]


def tuned(pull: Pull, seeds: range, kind: str) -> dict[str, Any]:
    scores, whole = late(pull, seeds, kind), course(pull, seeds, kind, trials(pull))
    taken = by_others(scores)
    return {
        "late": [float(scores[t, i]) for i, t in enumerate(taken)],
        "first": [float(whole[t, i, 0]) for i, t in enumerate(taken)],
        "factor_and_rate": [trials(pull)[t] for t in taken],
    }


SETTING = (
    "ReLU net 64-48-48-48-10, 150 digits a task, 12 tasks of 60 steps of Adam, 5 seeds; every kind of net has eight trials (four "
    "factors, two rates; eight rates without a penalty), and each seed takes what is best on the mean of the other four; "
)
LABELS = "training accuracy at the end of the last 5 tasks, labels drawn anew for each task: "


def beside(lab: Lab, pull: Pull, others: dict[str, Pull], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Late accuracy of a kind of net minus those of others, and the figures."""
    seeds = lab.draws(5)
    runs = {name: tuned(one, seeds, kind) for name, one in {"method": pull, **others}.items()}
    gaps = {f"above {name}": lab.effect(runs["method"]["late"], runs[name]["late"]) for name in others}
    figures = {
        name: {
            "late": sum(r["late"]) / 5,
            "first": sum(r["first"]) / 5,
            "factor_and_rate": r["factor_and_rate"],
        }
        for name, r in runs.items()
    }
    return {name: weigh(gap, above=0) for name, gap in gaps.items()}, {"gaps": gaps, "accuracy": figures}


def loses(lab: Lab) -> Any:
    """Late minus first accuracy of the net without a penalty, at the rate that is best in the first task."""
    whole = course(nothing, lab.draws(5), "random labels", trials(nothing))
    taken = by_others(whole[:, :, 0])
    return lab.effect([float(whole[t, i, -LAST:].mean() - whole[t, i, 0]) for i, t in enumerate(taken)])


@claim(
    "A net under spectral regularization stays trainable where nets without, under L2 and under L2 to the start do not",
    source="abstract; experiments on trainability (there larger nets and images, many more tasks)",
    criterion=SETTING
    + LABELS
    + "spectral minus none, minus L2 and minus L2 to the start, three intervals above 0; and trainability is lost here: without a "
    "penalty, at the rate best in the first task, late minus first accuracy below -0.1",
    budget="full",
    method=spectral_each,
    sham=Sham("no penalty", nothing),
)
def stays_trainable(lab: Lab, pull: Pull) -> Finding:
    parts, figures = beside(lab, pull, {"none": nothing, "L2": l2, "L2 to the start": l2_to_start}, "random labels")
    lost = loses(lab)
    return conclude(parts | {"trainability is lost without": weigh(lost, below=-0.1)}, lost_without=lost, **figures)


@claim(
    "So does a net held to the distribution of its start, better than one held to the start itself",
    source="abstract (version 1)",
    criterion=SETTING + LABELS + "Wasserstein minus none and minus L2 to the start, both intervals above 0",
    budget="full",
    method=wasserstein_each,
    sham=Sham("no penalty", nothing),
)
def held_to_the_distribution(lab: Lab, pull: Pull) -> Finding:
    parts, figures = beside(lab, pull, {"none": nothing, "L2 to the start": l2_to_start}, "random labels")
    return conclude(parts, **figures)


@claim(
    "Spectral regularization is less sensitive to its factor than L2, while it acts",
    source="abstract; that it must act is ours, for what does nothing is flat as well",
    criterion=SETTING
    + LABELS
    + "spread over the four factors of a grid (a decade apart, each at the rate best for the other seeds), spectral minus L2 below 0; "
    "and at its worst factor above the net without a penalty, tuned",
    budget="full",
    method=spectral_each,
    sham=Sham("no penalty", nothing),
)
def flat_in_factor(lab: Lab, pull: Pull) -> Finding:
    seeds = lab.draws(5)

    def curve(one: Pull) -> Tensor:
        """Late accuracy (factors, seeds)."""
        scores = late(one, seeds, "random labels").reshape(4, -1, 5)
        return torch.stack([torch.tensor([float(f[t, i]) for i, t in enumerate(by_others(f))]) for f in scores])

    ours, theirs = curve(pull), curve(l2)
    gap = lab.effect((ours.amax(0) - ours.amin(0)).tolist(), (theirs.amax(0) - theirs.amin(0)).tolist())
    acts = lab.effect(ours.amin(0).tolist(), tuned(nothing, seeds, "random labels")["late"])
    return conclude(
        {"flatter than L2": weigh(gap, below=0), "acts at every factor": weigh(acts, above=0)},
        spread_difference=gap,
        worst_minus_none=acts,
        accuracy_by_factor={"method": ours.mean(1), "L2": theirs.mean(1)},
    )


@claim(
    "It generalizes better over tasks in a row",
    source="abstract (better generalization performance)",
    criterion=SETTING
    + "accuracy on 150 other digits at the end of the last 5 tasks, pixels permuted anew for each task: spectral minus "
    "none and minus L2, both intervals above 0",
    budget="full",
    method=spectral_each,
    sham=Sham("no penalty", nothing),
)
def generalizes_better(lab: Lab, pull: Pull) -> Finding:
    parts, figures = beside(lab, pull, {"none": nothing, "L2": l2}, "permuted pixels")
    return conclude(parts, **figures)

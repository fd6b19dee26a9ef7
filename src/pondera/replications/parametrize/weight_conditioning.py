"""Weight conditioning (arXiv 2409.03424): do singular values come closer, is the loss better conditioned, does training gain?"""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pondera.parametrize.weight_conditioning import Conditioned
from pondera.replications import Effect, Finding, Lab, Sham, claim, conclude, weigh
from pondera.replications.parametrize._stacked import Run, train

Hold = Callable[[], nn.Module]


class OneLength(nn.Module):
    """The whole weight divided by the mean length of its rows: as large as a conditioned weight, and no better conditioned."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.flatten(1).norm(dim=1).mean()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Plain(nn.Module):
    """Nothing."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class WeightNorm(nn.Module):
    """w = g v / |v| with a trained length for each row, as torch's; written out to be run for many nets at once."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / v.norm(dim=1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


class SpectralNorm(nn.Module):
    """The weight over its largest singular value, from 8 power iterations that start at one vector (torch's go on from the last)."""

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.detach()
        v = torch.ones(w.shape[1]) / w.shape[1] ** 0.5
        for _ in range(8):
            u = F.normalize(w @ v, dim=0)
            v = F.normalize(w.mT @ u, dim=0)
        return weight / (u @ (weight @ v))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


ONE_LENGTH = Sham("the weight over the mean length of its rows", OneLength)
PLAIN = Sham("plain weights", Plain)


def mlp(seed: int, *widths: int) -> nn.Sequential:
    """As torch starts it."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def by_he(net: nn.Sequential) -> nn.Sequential:
    """He's start, as large as ReLU layers need it; biases zero."""
    for layer in [m for m in net if isinstance(m, nn.Linear)]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def held(net: nn.Sequential, hold: Hold) -> nn.Sequential:
    """Every layer but the last, whose lengths a net needs to be sure, held by `hold`."""
    linear = [m for m in net if isinstance(m, nn.Linear)]
    for layer in linear[:-1]:
        parametrize.register_parametrization(layer, "weight", hold())
    return net


@torch.no_grad()
def drifted(net: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    """Each row of the layers that will be held times a log-normal number."""
    for layer in [m for m in net if isinstance(m, nn.Linear)][:-1]:
        layer.weight.mul_(torch.randn(len(layer.weight), 1, generator=generator).exp())
    return net


@cache
def digits() -> tuple[Tensor, Tensor]:
    from pondera.lab.tasks import digits as task

    return task.data()[0]


def some_digits(seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = digits()
    at = torch.randint(len(x), (64,), generator=generator)
    return x[at], y[at]


# -- condition numbers ------------------------------------------------------------------------------------------------


def condition(w: Float[Tensor, "m n"]) -> float:
    s = torch.linalg.svdvals(w.detach().double())
    return (s[0] / s[-1]).item()


SEEDS = 16


@cache
def trained_plainly() -> list[nn.Module]:
    runs = [Run(seed, 0.05) for seed in range(SEEDS)]
    return train(lambda s: mlp(s, 64, 48, 32, 10), runs, some_digits, F.cross_entropy, steps=300, adam=False).nets()


@claim(
    "The smallest and the largest singular value of a weight come closer",
    source="abstract",
    criterion="log10 of the condition number of the held weight over that of the weight, 16 seeds, 95% interval below 0 for each of: "
    "the hidden weights of an MLP (64-48-32-10) as torch starts them, of the same after 300 steps of SGD on digits, and of the "
    "start with each row times a log-normal number (mean over the layers)",
    method=Conditioned,
    sham=ONE_LENGTH,
)
def singular_values_come_closer(lab: Lab, hold: Hold) -> Finding:
    seeds = lab.draws(SEEDS)
    nets: dict[str, list[Any]] = {
        "at the start": [mlp(seed, 64, 48, 32, 10) for seed in seeds],
        "after training": trained_plainly(),
        "rows drifted apart": [drifted(mlp(seed, 64, 48, 32, 10), lab.generator(seed)) for seed in seeds],
    }
    gaps: dict[str, Effect] = {}
    medians: dict[str, list[float]] = {}
    for name, each in nets.items():
        pairs = [[(condition(net[i].weight), condition(hold()(net[i].weight))) for i in (0, 2)] for net in each]
        gaps[name] = lab.effect([sum(math.log10(b / a) for a, b in layers) / 2 for layers in pairs])
        flat = torch.tensor([pair for layers in pairs for pair in layers])
        medians[name] = flat.median(0).values.tolist()
    return conclude(
        {name: weigh(gap, below=0) for name, gap in gaps.items()},
        log10_ratio=gaps,
        median_plain_and_held=medians,
        singular_values_1_over_k=worse(lab, hold),
    )


def worse(lab: Lab, hold: Hold) -> list[list[float]]:
    """Condition numbers before and after of matrices with singular values 1 / k between random directions."""
    found = []
    for seed in lab.seeds:
        g = lab.generator(seed)
        u, v = (torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0] for _ in "uv")
        w = u @ torch.diag(1 / torch.arange(1.0, 65).double()) @ v
        found.append([condition(w), condition(hold()(w))])
    return found


def curvature(net: nn.Module) -> float:
    """Condition number of the Gauss-Newton matrix in the parameters, over the directions that change the outputs on 24 digits."""
    x = digits()[0][:24].double()
    parameters = {k: p.detach() for k, p in net.double().named_parameters()}
    rows = jacrev(lambda p: functional_call(net, p, (x,)).flatten())(parameters)
    jacobian = torch.cat([r.flatten(1) for r in rows.values()], 1)
    eigenvalues = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    return (eigenvalues[-1] / eigenvalues[0]).item()


@claim(
    "The loss is better conditioned",
    source="abstract; theory: the Hessian's condition number is bounded through that of the weights",
    criterion="MLP 64-48-32-10, hidden weights held or plain: log10 of the ratio of condition numbers of the Gauss-Newton matrix "
    "(nonzero part, 24 digits), 16 seeds, 95% interval below 0 at torch's start and with each row times a log-normal number",
    method=Conditioned,
    sham=PLAIN,
)
def loss_is_better_conditioned(lab: Lab, hold: Hold) -> Finding:
    gaps: dict[str, Effect] = {}
    medians: dict[str, dict[str, float]] = {}
    for name in ("at the start", "rows drifted apart"):
        kinds: dict[str, Hold] = {"held": hold, "plain": Plain, "one length": OneLength}
        row: dict[str, list[float]] = {kind: [] for kind in kinds}
        for seed in lab.draws(SEEDS):
            for kind, one in kinds.items():
                net = mlp(seed, 64, 48, 32, 10)
                net = drifted(net, lab.generator(seed)) if name != "at the start" else net
                row[kind].append(math.log10(curvature(held(net, one))))
        gaps[name] = lab.effect(row["held"], row["plain"])
        medians[name] = {kind: 10 ** sorted(found)[len(found) // 2] for kind, found in row.items()}
    return conclude({name: weigh(gap, below=0) for name, gap in gaps.items()}, log10_ratio=gaps, median=medians)


# -- training ---------------------------------------------------------------------------------------------------------

STEPS, WIDE, DEEP = 200, 64, 6
RATES = {
    "digits": tuple(0.01 * 10 ** (k / 3) for k in range(7)),
    "photograph": tuple(1e-3 * 10 ** (k / 3) for k in range(7)),
}


@cache
def photograph() -> tuple[Tensor, Tensor]:
    """Places of its pixels as sines and cosines of six frequencies, and its grey values."""
    from pondera.lab.tasks import photo

    x, y = photo.coordinates(), photo.signal().reshape(-1, 1)
    angles = (x[:, :, None] * (math.pi * 2.0 ** torch.arange(6))).flatten(1)
    return torch.cat([x, angles.sin(), angles.cos()], 1), y


def some_pixels(seed: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = photograph()
    at = torch.randint(len(x), (256,), generator=generator)
    return x[at], y[at]


@cache
def best(task: str, hold: Hold, start: str, seeds: tuple[int, ...]) -> tuple[list[float], list[float]]:
    """Of each seed the loss at the end (mean of the last tenth of the steps, log10) at its own best rate, and that rate.

    A best rate at an end of the grid takes the grid on by one more, as often as it happens."""
    ends = (64, 10) if task == "digits" else (26, 1)

    def make(seed: int) -> nn.Module:
        net = mlp(seed, ends[0], *[WIDE] * DEEP, ends[1])
        return held(by_he(net) if start == "He" else net, hold)

    def losses(rates: list[float]) -> dict[float, list[float]]:
        runs = [Run(seed, rate) for rate in rates for seed in seeds]
        draw, loss = (some_digits, F.cross_entropy) if task == "digits" else (some_pixels, F.mse_loss)
        done = train(make, runs, draw, loss, steps=STEPS, adam=task != "digits").losses[-STEPS // 10 :].mean(0).log10()
        done = torch.where(done.isfinite(), done, torch.inf)
        return {rate: done[k * len(seeds) : (k + 1) * len(seeds)].tolist() for k, rate in enumerate(rates)}

    course = losses(list(RATES[task]))
    while True:
        chosen = [min(course, key=lambda rate: course[rate][k]) for k in range(len(seeds))]
        low, high = min(course), max(course)
        further = [low / 10 ** (1 / 3)] * (low in chosen) + [high * 10 ** (1 / 3)] * (high in chosen)
        if not further or len(course) > 12:
            return [course[rate][k] for k, rate in enumerate(chosen)], chosen
        course |= losses(further)


SETTING = (
    "ReLU nets with six hidden layers of 64, on digits (SGD with momentum 0.9, batches of 64) and on a 96x96 photograph (26 Fourier "
    "features, Adam, batches of 256), hidden weights held; 200 steps, rates tuned alike for every seed, 8 seeds; log10 of the training "
    "loss over the last 20 steps, "
)


@claim(
    "It trains faster than plain weights at equal steps",
    source="abstract; experiments (there CNNs, ViT, NeRF, 3-D shapes)",
    criterion=SETTING
    + "held minus plain: 95% interval below 0 on both, with plain weights as torch starts them and as He does",
    budget="full",
    method=Conditioned,
    sham=PLAIN,
)
def faster_than_plain(lab: Lab, hold: Hold) -> Finding:
    gaps, figures = against(lab, hold, {"plain": Plain})
    note = ""
    if hold is Conditioned:
        others, more = against(lab, hold, {"one length": OneLength}, starts=("torch",))
        ends = " and ".join(f"{e.mean:+.3f} [{e.low:+.3f}, {e.high:+.3f}] ({name})" for name, e in others.items())
        note = f"held minus the whole weight over the mean length of its rows, which is as large and no better conditioned: {ends}"
        figures["one_length"] = more
    return conclude({name: weigh(gap, below=0) for name, gap in gaps.items()}, note=note, **figures)


@claim(
    "It outperforms weight normalization and spectral normalization",
    source="abstract; experiments (there CNNs, ViT, NeRF, 3-D shapes)",
    criterion=SETTING
    + "held minus weight norm as torch starts it, as He does, and minus spectral norm: 95% interval below 0 on both",
    budget="full",
    method=Conditioned,
    sham=PLAIN,
)
def better_than_other_norms(lab: Lab, hold: Hold) -> Finding:
    gaps, figures = against(lab, hold, {"weight norm": WeightNorm})
    more, others = against(lab, hold, {"spectral norm": SpectralNorm}, starts=("torch",))
    figures["spectral_norm"] = others
    return conclude({name: weigh(gap, below=0) for name, gap in (gaps | more).items()}, **figures)


def against(
    lab: Lab, hold: Hold, others: dict[str, Hold], starts: tuple[str, ...] = ("torch", "He")
) -> tuple[dict[str, Effect], dict[str, Any]]:
    """Held as torch starts it, minus the others; what is divided by its own size starts alike either way."""
    seeds = tuple(lab.draws(max(lab.n_seeds, 8)))
    gaps: dict[str, Effect] = {}
    losses: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    for task in RATES:
        ours, at = best(task, hold, "torch", seeds)
        losses[f"{task}: held"], rates[f"{task}: held"] = ours, [min(at), max(at)]
        for other, one in others.items():
            for start in starts:
                name = f"{task}: minus {other}" + f", {start}'s start" * (len(starts) > 1)
                theirs, at = best(task, one, start, seeds)
                gaps[name] = lab.effect(ours, theirs)
                losses[name], rates[name] = theirs, [min(at), max(at)]
    means = {name: sum(loss) / len(loss) for name, loss in losses.items()}
    return gaps, {"minus": gaps, "mean_log10_loss": means, "lowest_and_highest_rate": rates}

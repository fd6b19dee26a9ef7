"""Decoupled weight decay (arXiv 1711.05101): what is it beside L2, is it tuned apart from the rate, is it better?

The landscapes over rate and decay are those of a small MLP on digits: with batch norm, as the paper's networks have, with
layer norm, and with none. All points and five seeds are trained as one stack, by the optimizers themselves: a point is a group.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim.decoupled_decay import SGDW
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met, weigh

Plain = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def sgdw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SGDW(params, lr=0.1, momentum=0.0, weight_decay=0.02)


def times_the_rate(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SGDW(params, lr=0.1, momentum=0.0, weight_decay=0.1 * 0.02)


@claim(
    "For plain SGD decay and L2 are the same, rescaled by the rate",
    source="Sec. 2, Prop. 1",
    criterion="SGDW without momentum at rate 0.1 and decay 0.02 and torch SGD with L2 factor 0.02 / rate, 100 steps of a "
    "float64 net: weights within 1e-10 of each other, in each of 5 seeds",
    method=sgdw,
    sham=Sham("decay multiplied by the rate, as torch's AdamW does it", times_the_rate),
)
def same_for_sgd(lab: Lab, make: Plain) -> Finding:
    def end(make: Plain, seed: int) -> Tensor:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        x = torch.randn(64, 8, dtype=torch.float64)
        optimizer = make(list(net.parameters()))
        for _ in range(100):
            optimizer.zero_grad()
            (net(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    def l2(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, weight_decay=0.2)

    apart = [float((end(make, seed) - end(l2, seed)).abs().max()) for seed in lab.seeds]
    return conclude(met(max(apart) < 1e-10), largest_difference=apart)


def adamw_at_noise(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.002, weight_decay=1.15)


def adam_at_noise(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.002, weight_decay=0.01)


@claim(
    "With Adam, L2 shrinks weights of large gradients less than others; decoupled decay shrinks all alike",
    source="Sec. 2 (after Prop. 2)",
    criterion="300 steps under pure gradient noise of scale 0.01 and of scale 1, all weights 1 at first: share lost "
    "at small noise is at least 5 times that at large noise with L2 and within 10% of it decoupled, in each of 5 seeds",
    method=adamw_at_noise,
    sham=Sham("L2 in the gradient in the place of decoupled decay", adam_at_noise),
)
def l2_spares_large_gradients(lab: Lab, make: Plain) -> Finding:
    scale = torch.tensor([0.01, 1.0]).repeat_interleave(4000)

    def lost(make: Plain, seed: int) -> float:
        generator = lab.generator(seed)
        w = nn.Parameter(torch.ones(8000))
        optimizer = make([w])
        for _ in range(300):
            w.grad = scale * torch.randn(8000, generator=generator)
            optimizer.step()
        small, large = (1 - float(half.mean()) for half in w.detach().split(4000))
        return small / large

    l2 = [lost(adam_at_noise, s) for s in lab.seeds]
    decoupled = [lost(make, s) for s in lab.seeds]
    return conclude(
        {
            "L2 spares large gradients": met(min(l2) >= 5),
            "decoupled decay spares none": met(max(abs(r - 1) for r in decoupled) <= 0.1),
        },
        small_over_large_with_l2=l2,
        small_over_large_decoupled=decoupled,
    )


# -- the landscape over rate and decay ---------------------------------------------------------------------------------

STEPS, BATCH, N_TRAIN, N_VALID, WIDTH = 300, 32, 400, 857, 64
SHAPES = ((64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10))
GROUNDS = ("batch norm", "layer norm", "no norms")
PAPERS = GROUNDS[0]  # its networks'
DECAYS = (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # lambda, the share a step takes away at multiplier 1
ADAM_L2 = (0.0, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)  # the L2 arm of Adam has a scale, and so a grid, of its own
SGD_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
MIDDLE = 2  # the rate at which the decay is tuned first
BLOCK = 5  # seeds that are trained together
FIRST = 1000  # seed, apart from those looked at before
SECOND = 1000  # on from there, where the first five seeds had been looked at too

Point = tuple[nn.Parameter, float, int]  # weights of five nets, rate, place of the decay
Arm = Callable[[list[Point]], torch.optim.Optimizer]


def decoupled_sgd(points: list[Point]) -> torch.optim.Optimizer:
    return SGDW([{"params": [p], "lr": r, "weight_decay": DECAYS[d]} for p, r, d in points], momentum=0.9)


def sgd_with_l2(points: list[Point]) -> torch.optim.Optimizer:
    """With momentum, of which ten steps come of one; the factors agree with `decoupled_sgd` at the middle rate."""
    to_l2 = 0.1 / SGD_RATES[MIDDLE]
    groups = [{"params": [p], "lr": r, "weight_decay": to_l2 * DECAYS[d]} for p, r, d in points]
    return torch.optim.SGD(groups, momentum=0.9, fused=True)


def sgd_undecayed(points: list[Point]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p], "lr": r} for p, r, _ in points], momentum=0.9, fused=True)


def adamw(points: list[Point]) -> torch.optim.Optimizer:
    """The paper's: what a step takes away is not multiplied by the rate."""
    groups = [{"params": [p], "lr": r, "weight_decay": DECAYS[d] / r} for p, r, d in points]
    return torch.optim.AdamW(groups, fused=True)


def adamw_of_torch(points: list[Point]) -> torch.optim.Optimizer:
    """Multiplied by the rate; it agrees with the paper's at the middle rate."""
    groups = [{"params": [p], "lr": r, "weight_decay": DECAYS[d] / ADAM_RATES[MIDDLE]} for p, r, d in points]
    return torch.optim.AdamW(groups, fused=True)


def adam_with_l2(points: list[Point]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [p], "lr": r, "weight_decay": ADAM_L2[d]} for p, r, d in points], fused=True)


def adam_undecayed(points: list[Point]) -> torch.optim.Optimizer:
    return torch.optim.Adam([{"params": [p], "lr": r} for p, r, _ in points], fused=True)


ADAMS = (adamw, adamw_of_torch, adam_with_l2, adam_undecayed)


@cache
def noisy_digits() -> tuple[Tensor, Tensor]:
    """All digits in one order: 400 to train on, a fifth of their labels redrawn, 857 to tune by and 540 to test on."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    wrong = (torch.rand(len(x), generator=generator) < 0.2) & (torch.arange(len(x)) < N_TRAIN)
    return x[order], torch.where(wrong, torch.randint(10, (len(x),), generator=generator), y[order])


def forward(flat: Tensor, x: Tensor, ground: str) -> Tensor:
    """Logits of a stack of nets. flat: (nets, weights). x: (nets, images, 64), of which batch norm knows the first N_TRAIN."""
    parts = iter(flat.split([n for a, b in SHAPES for n in (a * b, b)], dim=1))
    for k, (a, b) in enumerate(SHAPES):
        weight, bias = next(parts).unflatten(1, (a, b)), next(parts).unsqueeze(1)
        x = torch.baddbmm(bias, x, weight)
        if k + 1 < len(SHAPES):
            if ground == "batch norm":
                var, mean = torch.var_mean(x[:, :N_TRAIN], dim=1, keepdim=True, correction=0)
                x = (x - mean) * (var + 1e-5).rsqrt()
            elif ground == "layer norm":
                x = F.layer_norm(x, (b,))
            x = x.relu()
    return x


def start(seed: int) -> Tensor:
    """One net as torch draws it, in one row."""
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in SHAPES]
    return torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])


@cache
def block(arm: Arm, ground: str, first: int) -> tuple[Tensor, Tensor]:
    """Validation and test error, each over (rates, decays, five seeds), after 300 steps with a cosine schedule."""
    x, y = noisy_digits()
    rates = ADAM_RATES if arm in ADAMS else SGD_RATES
    begin = torch.stack([start(first + k) for k in range(BLOCK)])
    places = [(r, d) for r in rates for d in range(len(DECAYS))]
    points = [(nn.Parameter(begin.clone()), r, d) for r, d in places]
    optimizer = arm(points)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / STEPS)))
    generators = [torch.Generator().manual_seed(first + k) for k in range(BLOCK)]
    for _ in range(STEPS):
        i = torch.stack([torch.randint(N_TRAIN, (BATCH,), generator=g) for g in generators]).repeat(len(points), 1)
        out = forward(torch.cat([p for p, _, _ in points]), x[i], ground)
        optimizer.zero_grad()
        (F.cross_entropy(out.flatten(0, 1), y[i].flatten(), reduction="sum") / BATCH).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        wrong = torch.stack([forward(p, x.expand(BLOCK, -1, -1), ground).argmax(2) != y for p, _, _ in points])
    shape = (len(rates), len(DECAYS), BLOCK)
    valid, test = (part.float().mean(2).view(shape) for part in wrong[..., N_TRAIN:].split([N_VALID, 540], dim=2))
    return valid, test


def landscape(arm: Arm, ground: str, seed: int) -> tuple[Tensor, Tensor]:
    """Validation and test error of one seed over (rates, decays)."""
    valid, test = block(arm, ground, FIRST + seed // BLOCK * BLOCK)
    return valid[..., seed % BLOCK], test[..., seed % BLOCK]


def regret(arm: Arm, ground: str, seed: int) -> float:
    """Test error lost by keeping the decay tuned at the middle rate, over tuning it anew at each rate; mean over rates."""
    valid, test = landscape(arm, ground, seed)
    own = test.gather(1, valid.argmin(1, keepdim=True))[:, 0]
    return float((test[:, valid[MIDDLE].argmin()] - own).mean())


def tuned(arm: Arm, ground: str, seed: int, *, decays: int = len(DECAYS)) -> float:
    """Test error at the point that validates best, of the first so many decays."""
    valid, test = (errors[:, :decays].flatten() for errors in landscape(arm, ground, seed))
    return float(test[valid.argmin()])


def best_decays(arm: Arm, ground: str, seeds: range) -> list[float]:
    """At each rate, the decay that validates best on average over the seeds."""
    mean = torch.stack([landscape(arm, ground, s)[0] for s in seeds]).mean(0)
    grid = ADAM_L2 if arm is adam_with_l2 else DECAYS
    to_l2 = 0.1 / SGD_RATES[MIDDLE] if arm is sgd_with_l2 else 1.0
    return [to_l2 * grid[d] for d in mean.argmin(dim=1).tolist()]


def apart_from_the_rate(lab: Lab, arm: Arm, coupled: Arm, also: tuple[Arm, ...] = ()) -> Finding:
    parts: dict[str, Part] = {}
    gaps: dict[str, Effect] = {}

    def gap(ground: str, seed: int) -> float:
        return regret(arm, ground, SECOND + seed) - regret(coupled, ground, SECOND + seed)

    for g in GROUNDS:
        most = MOST if g == PAPERS else lab.n_seeds
        parts[f"less lost, {g}"], gaps[g], _ = lab.until_decided(lambda s, g=g: gap(g, s), most=most, below=0)  # type: ignore[misc]
    seeds = range(SECOND, SECOND + lab.n_seeds)
    gain = lab.effect([tuned(arm, PAPERS, s) - tuned(arm, PAPERS, s, decays=1) for s in seeds])
    parts["the decay acts"] = weigh(gain, below=0)
    decays = {g: {a.__name__: best_decays(a, g, seeds) for a in (arm, coupled)} for g in GROUNDS}
    note, rates = "", ADAM_RATES if arm in ADAMS else SGD_RATES
    if parts[f"less lost, {PAPERS}"].outcome == "refuted":
        ours, theirs = (" ".join(f"{d:g}" for d in decays[PAPERS][a.__name__]) for a in (arm, coupled))
        note = (
            f"at rates {' '.join(f'{r:g}' for r in rates)}, with batch norm, the best share to take away is {ours}, and the "
            f"best L2 factor {theirs}: a net that learns fast has larger weights to get rid of in the same number of steps, and L2, "
            "whose pull is multiplied by the rate, follows. The paper's runs are far longer"
        )
    draw(lab, (arm, coupled), seeds)
    return conclude(
        parts,
        central=[f"less lost, {PAPERS}", "the decay acts"],
        note=note,
        regret_difference=gaps,
        regret={g: {a.__name__: [regret(a, g, s) for s in seeds] for a in (arm, coupled)} for g in GROUNDS}
        | {a.__name__: [regret(a, PAPERS, s) for s in seeds] for a in also},
        best_with_decay_minus_best_without=gain,
        best_decay_at_each_rate=decays,
    )


GROUND = (
    "400 digits with a fifth of the labels wrong, MLP of width 64, 300 steps, 6 rates x 7 decays, what is tuned is tuned on 857 "
    "other images: "
)
SEPARABLE = GROUND + (
    "test error lost by keeping the decay tuned at the middle rate, mean over rates, decoupled minus L2, has its interval below 0. "
    "Decisive: with batch norm, as the paper's networks have it, 5 seeds, others added until decided, at most 15; beside it: with "
    "layer norm, and without norms, 5 seeds. And, ours: the decay acts, the best point with it has less test error than the best "
    "without (interval below 0, batch norm, 5 seeds). The first run had no norms, tuned on test images and had best decays at the "
    "grid's edge; a second, of five seeds, left SGD open; this one has seeds of its own"
)


@claim(
    "For SGD the best decay no longer depends on the rate",
    source="Sec. 4.2",
    criterion=SEPARABLE,
    budget="full",
    method=decoupled_sgd,
    sham=Sham("a decay that is never applied", sgd_undecayed),
)
def separable_for_sgd(lab: Lab, arm: Arm) -> Finding:
    return apart_from_the_rate(lab, arm, sgd_with_l2)


@claim(
    "For Adam the best decay no longer depends on the rate",
    source="Sec. 4.2",
    criterion=SEPARABLE,
    budget="full",
    method=adamw,
    sham=Sham("a decay that is never applied", adam_undecayed),
)
def separable_for_adam(lab: Lab, arm: Arm) -> Finding:
    return apart_from_the_rate(lab, arm, adam_with_l2, also=(adamw_of_torch,))


MOST = 15  # seeds


@claim(
    "AdamW generalises better than Adam with L2, and keeps up with SGD with momentum",
    source="abstract; Sec. 4.3",
    criterion=GROUND
    + "every arm and seed tuned for itself; 5 seeds, others added until decided, at most 15: test error of AdamW minus "
    "that of Adam with L2 has its interval below 0, and minus that of SGD with momentum and L2 below half a point. Decisive: with "
    "batch norm; beside it: with layer norm, and without norms. The first run asked for the lead over L2 alone, of a net without norms",
    budget="full",
    method=adamw,
    sham=Sham("Adam without decay", adam_undecayed),
)
def better_than_l2(lab: Lab, arm: Arm) -> Finding:
    parts: dict[str, Part] = {}
    gaps: dict[str, Effect] = {}

    def weighed(name: str, unit: Callable[[int], float], **threshold: float) -> None:
        parts[name], gaps[name], _ = lab.until_decided(unit, most=MOST, **threshold)

    for g in GROUNDS:
        weighed(f"ahead of L2, {g}", lambda s, g=g: tuned(arm, g, s) - tuned(adam_with_l2, g, s), below=0)  # type: ignore[misc]
        weighed(f"not behind SGD, {g}", lambda s, g=g: tuned(arm, g, s) - tuned(sgd_with_l2, g, s), below=0.005)  # type: ignore[misc]
    arms = (arm, adam_with_l2, sgd_with_l2, adam_undecayed)
    mean = {g: {a.__name__: sum(tuned(a, g, s) for s in lab.seeds) / len(lab.seeds) for a in arms} for g in GROUNDS}
    return conclude(
        parts,
        central=[name for name in parts if name.endswith(PAPERS)],
        differences=gaps,
        mean_test_error_of_five_seeds=mean,
        at_the_end_of_a_grid={g: {a.__name__: ends(a, g, lab.seeds) for a in arms[:3]} for g in GROUNDS},
    )


def ends(arm: Arm, ground: str, seeds: range) -> int:
    """Seeds whose best point has the first or last rate, or the last decay."""
    at = [divmod(int(landscape(arm, ground, s)[0].argmin()), len(DECAYS)) for s in seeds]
    return sum(r in (0, len(SGD_RATES) - 1) or d == len(DECAYS) - 1 for r, d in at)


def draw(lab: Lab, arms: tuple[Arm, ...], seeds: range) -> None:
    """The landscapes as the paper draws them: rate across, decay up."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, len(arms), figsize=(4.2 * len(arms), 3.2))
    for ax, arm in zip(axes, arms, strict=True):
        mean = torch.stack([landscape(arm, PAPERS, s)[1] for s in seeds]).mean(0).T * 100
        ax.imshow(mean.numpy(), origin="lower", cmap="viridis_r", vmin=float(mean.min()), vmax=float(mean.min()) + 10)
        for j, row in enumerate(mean.tolist()):
            for i, value in enumerate(row):
                ax.text(i, j, f"{value:.1f}", ha="center", va="center", fontsize=7)
        rates = ADAM_RATES if arm in ADAMS else SGD_RATES
        ax.set_xticks(range(len(rates)), [f"{r:g}" for r in rates])
        to_l2 = 0.1 / SGD_RATES[MIDDLE] if arm is sgd_with_l2 else 1.0
        decays = ADAM_L2 if arm is adam_with_l2 else DECAYS
        ax.set_yticks(range(len(decays)), [f"{to_l2 * d:g}" for d in decays])
        title = arm.__name__.replace("_", " ").replace("sgd", "SGD").replace("adamw", "AdamW")
        ax.set(xlabel="learning rate", title=f"{title}, batch norm: test error, %")
    axes[0].set_ylabel("decay, or L2 factor")
    lab.figure("sgdw" if arms[0] not in ADAMS else "adamw", fig)
    plt.close(fig)

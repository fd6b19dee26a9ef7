"""Lottery tickets of evolution (arXiv 2306.00045): sparse starts that evolution can train, by signal to noise.

Digits averaged to 4 x 4 pixels, a tanh net of 16-16-10 (416 weights), Sep-CMA-ES with 64 members on batches of 128 images; five
rounds that keep 0.6 of the weights left, to 7.8%, going back to the start each time.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.compress.evolution_tickets import SepCMAES
from pondera.replications import Finding, Lab, Sham, claim, conclude, weigh

INPUTS, HIDDEN, CLASSES = 16, 16, 10
PRUNABLE = INPUTS * HIDDEN + HIDDEN * CLASSES
SIZE = PRUNABLE + HIDDEN + CLASSES
POPULATION, BATCH, GENERATIONS, KEEP, ROUNDS, STD, DECAY = 64, 128, 400, 0.6, 5, 0.1, 1e-4
SEEDS = 10
Score = Callable[[Tensor, Tensor], Tensor]  # mean, std: higher stays


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x = F.avg_pool2d(torch.tensor(x).float().view(-1, 1, 8, 8), 2).flatten(1)[order]
    x, y = (x - x.mean()) / x.std(), torch.tensor(y)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def _logits(theta: Tensor, x: Tensor) -> Tensor:
    """Of a population of flat nets on the same images: (nets, classes, images)."""
    w1, w2, b1, b2 = theta.split([INPUTS * HIDDEN, HIDDEN * CLASSES, HIDDEN, CLASSES], 1)
    h = (w1.reshape(-1, INPUTS) @ x.T).view(-1, HIDDEN, len(x)) + b1[:, :, None]
    return torch.baddbmm(b2[:, :, None], w2.reshape(-1, CLASSES, HIDDEN), h.tanh())


def _losses(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each net."""
    logits = _logits(theta, x)
    return (logits.logsumexp(1) - logits.gather(1, y.expand(len(theta), 1, -1))[:, 0]).mean(1)


def _start(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    w1 = torch.randn(HIDDEN * INPUTS, generator=g) / INPUTS**0.5
    w2 = torch.randn(CLASSES * HIDDEN, generator=g) / HIDDEN**0.5
    return torch.cat([w1, w2, torch.zeros(HIDDEN + CLASSES)])


def _evolve(theta: Tensor, free: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (0 elsewhere) and std (infinite elsewhere) of the free coordinates at the end."""
    x, y, _, _ = _digits()
    g = torch.Generator().manual_seed(seed)
    places = free.nonzero()[:, 0]
    es = SepCMAES(theta[places], STD, POPULATION, generator=g)
    rows = (theta * free).expand(POPULATION, -1).clone()
    for _ in range(GENERATIONS):
        i = torch.randint(len(x), (BATCH,), generator=g)
        rows.index_copy_(1, places, es.ask())
        es.tell(_losses(rows, x[i], y[i]))
        es.mean = es.mean * (1 - DECAY)
    return torch.zeros(SIZE).index_copy_(0, places, es.mean), torch.full((SIZE,), torch.inf).index_copy_(
        0, places, es.std
    )


def _accuracy(theta: Tensor) -> list[float]:
    _, _, x, y = _digits()
    return (_logits(theta, x).argmax(1) == y).double().mean(1).tolist()


def signal_to_noise(mean: Tensor, std: Tensor) -> Tensor:
    """The method."""
    return mean.abs() / std


def magnitude(mean: Tensor, std: Tensor) -> Tensor:
    """The baseline."""
    return mean.abs()


def by_chance(mean: Tensor, std: Tensor) -> Tensor:
    """A stand-in for `_mask`, which draws as many weights in each layer as signal to noise keeps there."""
    raise NotImplementedError


@cache
def _mask(score: Score, seed: int, k: int) -> Tensor:
    """What is free after k rounds of training, pruning and going back to the start; biases always."""
    free = torch.ones(SIZE, dtype=torch.bool)
    if k and score is by_chance:
        like, g = _mask(signal_to_noise, seed, k), torch.Generator().manual_seed(1000 + seed)
        for part in (slice(0, INPUTS * HIDDEN), slice(INPUTS * HIDDEN, PRUNABLE)):
            free[part] = like[part][torch.randperm(part.stop - part.start, generator=g)]
    elif k:
        before = _mask(score, seed, k - 1)
        scores = score(*_trained(before, seed, k - 1)).where(before, -1.0)[:PRUNABLE]
        free[:PRUNABLE] = False
        free[scores.topk(round(PRUNABLE * KEEP**k)).indices] = True
    return free


_DONE: dict[tuple[bytes, int, int], tuple[Tensor, Tensor]] = {}


def _trained(free: Tensor, seed: int, k: int) -> tuple[Tensor, Tensor]:
    key = free.numpy().tobytes(), seed, k
    if key not in _DONE:
        _DONE[key] = _evolve(_start(seed), free, 100 * seed + k)
    return _DONE[key]


def _reached(score: Score, seed: int, k: int) -> float:
    """Test accuracy of the ticket of k rounds, evolved."""
    return _accuracy(_trained(_mask(score, seed, k), seed, k)[0][None])[0]


# -- what the std knows ------------------------------------------------------------------------------------------------


@claim(
    "Pruning by signal to noise takes the loss's curvature into account",
    source="abstract (incorporates loss curvature information)",
    criterion="quadratics of 100 dimensions, curvatures log-uniform from 0.01 to 1, Gaussian optima, Sep-CMA-ES of 32 members for "
    "400 generations from 0: with half of the coordinates set to 0, the loss rises by less than half as much as when they are "
    "chosen by magnitude (95% interval of the ratio, 20 draws)",
    method=signal_to_noise,
    sham=Sham("by magnitude", magnitude),
)
def curvature_is_in_the_std(lab: Lab, score: Score) -> Finding:
    rows: dict[str, list[float]] = {
        "risen by magnitude": [],
        "risen": [],
        "correlation of log std and log curvature": [],
    }
    for seed in lab.draws(20):
        g = lab.generator(seed)
        h = 10 ** (-2 * torch.rand(100, generator=g))
        optimum = torch.randn(100, generator=g)
        es = SepCMAES(torch.zeros(100), 0.3, 32, generator=g)
        for _ in range(400):
            es.tell((h * (es.ask() - optimum).square()).sum(1))
        for name, by in (("risen by magnitude", magnitude), ("risen", score)):
            out = by(es.mean, es.std).argsort()[:50]
            rows[name].append(float((h * optimum.square())[out].sum()))
        both = torch.stack([es.std.log(), h.log()])
        rows["correlation of log std and log curvature"].append(float(torch.corrcoef(both)[0, 1]))
    ratios = [a / b for a, b in zip(rows["risen"], rows["risen by magnitude"])]
    return conclude(
        weigh(lab.effect(ratios), below=0.5), ratio=ratios, **{n.replace(" ", "_"): row for n, row in rows.items()}
    )


# -- tickets -----------------------------------------------------------------------------------------------------------

ON_DIGITS = (
    "digits of 4 x 4 pixels, tanh net of 16-16-10, Sep-CMA-ES of 64 members for 400 generations a round, 0.6 of the weights left "
    "kept a round; test accuracy of the evolved mean, 10 seeds: "
)


@claim(
    "Very sparse starts exist that evolution can train",
    source="abstract; experiments on MNIST and control",
    criterion=ON_DIGITS
    + "after three rounds (21.6% of the weights) the ticket reaches the dense net's accuracy less 5 points, and at "
    "three and at five rounds (7.8%) more than a random mask with as many weights in each layer: 95% intervals",
    budget="full",
    method=signal_to_noise,
    sham=Sham("the random masks themselves", by_chance),
)
def tickets_can_be_trained(lab: Lab, score: Score) -> Finding:
    rows = {f"after {k} rounds": [_reached(score, s, k) for s in lab.draws(SEEDS)] for k in (0, 3, ROUNDS)}
    chance = {k: [_reached(by_chance, s, k) for s in lab.draws(SEEDS)] for k in (3, ROUNDS)}
    return conclude(
        {
            "within 5 points": weigh(lab.effect(rows["after 3 rounds"], rows["after 0 rounds"]), above=-0.05),
            "above a random mask at 21.6%": weigh(lab.effect(rows["after 3 rounds"], chance[3]), above=0),
            "above a random mask at 7.8%": weigh(lab.effect(rows[f"after {ROUNDS} rounds"], chance[ROUNDS]), above=0),
        },
        accuracy=rows,
        by_chance=chance,
    )


@claim(
    "Signal to noise finds sparser trainable starts than magnitude does",
    source="abstract; figures on sparsity against performance",
    criterion=ON_DIGITS
    + "with 7.8% of the weights, after five rounds, the ticket by signal to noise is ahead of the one by magnitude: 95% "
    "interval above 0; the rounds before are recorded",
    budget="full",
    method=signal_to_noise,
    sham=Sham("by magnitude as well", magnitude),
)
def sparser_than_by_magnitude(lab: Lab, score: Score) -> Finding:
    ours, theirs = (
        [[_reached(by, s, k) for s in lab.draws(SEEDS)] for k in range(ROUNDS + 1)] for by in (score, magnitude)
    )
    left = [f"{KEEP**k:.1%}" for k in range(ROUNDS + 1)]
    return conclude(
        weigh(lab.effect(ours[-1], theirs[-1]), above=0),
        ahead={share: lab.effect(a, b) for share, a, b in zip(left[1:], ours[1:], theirs[1:])},
        by_signal_to_noise=dict(zip(left, ours)),
        by_magnitude=dict(zip(left, theirs)),
        note="mean accuracy by share left, signal to noise and magnitude: "
        + ", ".join(f"{n} {sum(a) / len(a):.3f} and {sum(b) / len(b):.3f}" for n, a, b in zip(left, ours, theirs)),
    )


def _descended(lab: Lab, masks: Tensor) -> list[float]:
    """Test accuracy of the masked starts trained by Adam, all side by side."""
    x, y, _, _ = _digits()
    theta = torch.stack([_start(s) for s in lab.draws(SEEDS)]).requires_grad_()
    adam, g = torch.optim.Adam([theta], lr=0.01), torch.Generator().manual_seed(0)
    for _ in range(400):
        i = torch.randint(len(x), (BATCH,), generator=g)
        adam.zero_grad()
        _losses(theta * masks, x[i], y[i]).sum().backward()
        adam.step()
    return _accuracy((theta * masks).detach())


@claim(
    "The tickets transfer to training by gradients",
    source="abstract (transfers to GD-based training)",
    criterion=ON_DIGITS
    + "starts with the masks of five rounds (7.8%) trained by 400 steps of Adam at 0.01: ahead of random masks with as "
    "many weights in each layer: 95% interval above 0",
    budget="full",
    method=signal_to_noise,
    sham=Sham("other random masks", by_chance),
)
def tickets_transfer_to_gradients(lab: Lab, score: Score) -> Finding:
    found = {
        name: _descended(lab, torch.stack([_mask(by, s, ROUNDS) for s in lab.draws(SEEDS)]).float())
        for name, by in (("ticket", score), ("magnitude's", magnitude), ("random mask", by_chance))
    }
    found["dense"] = _descended(lab, torch.ones(SEEDS, SIZE))
    return conclude(weigh(lab.effect(found["ticket"], found["random mask"]), above=0), accuracy=found)

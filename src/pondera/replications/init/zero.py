"""ZerO (arXiv 2110.12661): no randomness, no rank trap in growing layers, deep nets without norms, low-rank updates."""

import hashlib
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from pondera.init.zero import zero_
from pondera.replications import Effect, Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.init._stacked import Setting, Trained, best_rate, mlp, plain, residual, train

Start = Callable[..., nn.Module]  # of a model and generator=


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _filled(
    fill: Callable[..., object], ends_zero: bool, model: nn.Module, *, generator: Generator | None = None
) -> nn.Module:
    """Each weight as `fill` has it, biases 0; the layers that ZerO zeroes at zero, or drawn like the others."""
    ends = _ends(model) if ends_zero else []
    for name, layer in _linear(model).items():
        fill(layer.weight, generator=generator)
        if name in ends:
            nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


def _ends(model: nn.Module) -> list[str]:
    """The last layers of residual branches, and the classifier."""
    names = list(_linear(model))
    return [n for n in names if n.endswith(".end")] + names[-1:]


def zero_ends(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """ZerO as in the paper's residual nets: branch ends and classifier zero."""
    return zero_(model, zero_last=_ends(model), generator=generator)


def torchs(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """torch's own start of linear layers: weights and biases uniform within 1 / sqrt(inputs) of 0."""
    for layer in _linear(model).values():
        for p in (layer.weight, layer.bias):
            nn.init.uniform_(p, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
    return model


def _nothing(weight: Tensor, *, generator: Generator | None = None) -> Tensor:
    return nn.init.zeros_(weight)


def _eye(weight: Tensor, *, generator: Generator | None = None) -> Tensor:
    return nn.init.eye_(weight)


he = partial(_filled, nn.init.kaiming_normal_, False)
he_uniform = partial(_filled, nn.init.kaiming_uniform_, False)
he_zero_ends = partial(_filled, nn.init.kaiming_normal_, True)
orthogonal_zero_ends = partial(_filled, nn.init.orthogonal_, True)
all_zero = partial(_filled, _nothing, False)
partial_identity = partial(_filled, _eye, False)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


def _train(net: nn.Module, *, steps: int, seed: int) -> float:
    """SGD at 0.1 on batches of 64 digits in the order of `seed`; the loss of the last ten steps."""
    x, y = _digits()
    g = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        pick = torch.randint(len(x), (64,), generator=g)
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(x[pick]), y[pick])
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@claim(
    "The same weights whatever the seed, before training and, given the same batches, after it; and the net learns from them",
    source="abstract (reproducibility); that it learns is ours, for weights that are all 0 are the same for every seed, too",
    criterion="distinct weights of a 64-128-128-10 ReLU net over 5 seeds, at the start and after 100 steps of SGD at 0.1 on "
    "the same batches: 1 and 1 from ZerO, 5 and 5 from He; mean training loss of ZerO's last ten steps below 0.5 (log 10 = 2.3 is a "
    "guess) in each seed",
    method=zero_,
    sham=Sham("all weights 0", all_zero),
)
def identical_for_every_seed(lab: Lab, start: Start) -> Finding:
    distinct: dict[str, list[int]] = {}
    losses: dict[str, list[float]] = {}
    for name, begin in (("started", start), ("he", he)):
        before, after = set(), set()
        losses[name] = []
        for seed in lab.seeds:
            torch.manual_seed(seed)
            net = begin(mlp([64, 128, 128, 10], nn.ReLU), generator=lab.generator(seed))
            before.add(_hash(net))
            losses[name].append(_train(net, steps=100, seed=0))
            after.add(_hash(net))
        distinct[name] = [len(before), len(after)]
    return conclude(
        {
            "one net": distinct["started"] == [1, 1],
            "as many as seeds from He": distinct["he"] == [lab.n_seeds] * 2,
            "it learns": max(losses["started"]) < 0.5,
        },
        distinct=distinct,
        loss=losses,
    )


def _hash(net: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()


@claim(
    "Partial identities keep what a hidden layer learns inside the input's dimension; with the Hadamard matrix before it, it grows "
    "from the identity beyond that",
    source="Theorem 1; Fig. 3 of the authors' notebook, on digits of 64 pixels in place of 784; that it starts as the identity is "
    "ours, for a random weight has full rank from the outset",
    criterion="rank (tolerance 1e-4) of W_3 - I in a 64-64-256-256-10 ReLU net without biases: 0 at the start from ZerO; after 300 "
    "steps of SGD at 0.1 at most 64 from partial identities and above 64 from ZerO, in each of 5 orders of the batches",
    method=zero_,
    sham=Sham("He's Gaussian start", he),
)
def no_rank_trap(lab: Lab, start: Start) -> Finding:
    ours, trapped = ([_ranks(s, seed) for seed in lab.seeds] for s in (start, partial_identity))
    return conclude(
        {
            "starts as the identity": max(first for first, _ in ours) == 0,
            "grows beyond the input's dimension": min(last for _, last in ours) > 64,
            "partial identities do not": max(last for _, last in trapped) <= 64,
        },
        at_start=[first for first, _ in ours],
        after_training=[last for _, last in ours],
        partial_identity=[last for _, last in trapped],
    )


@cache
def _ranks(start: Start, seed: int) -> tuple[int, int]:
    """Rank of W_3 - I at the start and after training."""
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise((64, 64, 256, 256, 10))]
    net = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))[:-1]
    start(net, generator=torch.Generator().manual_seed(seed))

    def rank() -> int:
        return int((torch.linalg.svdvals(layers[2].weight.detach() - torch.eye(256)) > 1e-4).sum())

    first = rank()
    _train(net, steps=300, seed=seed)
    return first, rank()


# -- nets beside each other ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(width, width), nn.Linear(width, width)


def _residual_net(inputs: int, width: int, blocks: int) -> nn.Module:
    """The layers in the order in which `residual` runs them."""
    return nn.Sequential(nn.Linear(inputs, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 10))


def _maker(start: Start, net: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        return start(net(), generator=torch.Generator().manual_seed(seed))

    return make


BLOCK = 5  # seeds are run five at a time
UPDATES = Setting(100, 64, 0.9, tuple(10 ** (k / 2) for k in range(-5, -1)), tuning=tuple(range(1000, 1008)))
FRESH = 200  # the first of the seeds that count: some before were looked at


def _twelve() -> nn.Module:
    return _residual_net(64, 64, 12)


@cache
def _update_rate(start: Start) -> float:
    return best_rate(_maker(start, _twelve), residual, UPDATES, by_loss=True)[0]


@cache
def _updates(start: Start, which: int) -> Trained:
    runs = [(FRESH + BLOCK * which + k, _update_rate(start)) for k in range(BLOCK)]
    return train(_maker(start, _twelve), residual, UPDATES, runs)


@cache
def _stable_ranks(start: Start, which: int) -> list[float]:
    """A seed each, mean over the hidden weights; not a number where the run diverged."""
    done = _updates(start, which)
    total = torch.zeros(BLOCK)
    for old, new in zip(done.before[1:-1], done.after[1:-1], strict=True):
        s = torch.linalg.svdvals((new - old).nan_to_num(0.0, 0.0, 0.0))
        total += (s / s[:, :1]).square().sum(1)
    return torch.where(torch.tensor(done.diverged), torch.nan, total / (len(done.before) - 2)).tolist()


@claim(
    "Weight updates stay of lower rank than from a random start",
    source="abstract (low-rank learning trajectories)",
    criterion="stable rank |D|_F^2 / |D|_2^2 of the change D of a hidden weight after 100 steps of SGD with momentum 0.9, mean over "
    "the 24 weights of 12 residual blocks of width 64 on the digits, the rate of each start tuned by training loss on eight other "
    "seeds (in a first run on two, which let through a rate that diverges on others), 0.003 to 0.1 in four steps and on where the best "
    "lies at an end: ZerO minus He with the same layers at zero has a 95% interval below 0 over 5 seeds, others added until decided, "
    "at most 30; a seed in which a run diverges counts as no difference",
    budget="full",
    method=zero_ends,
    sham=Sham("random orthogonal weights, with the same layers at zero", orthogonal_zero_ends),
)
def low_rank_updates(lab: Lab, start: Start) -> Finding:
    def stable(of: Start, seed: int) -> float:
        return _stable_ranks(of, seed // BLOCK)[seed % BLOCK]

    def minus(seed: int) -> float:
        gap = stable(start, seed) - stable(he_zero_ends, seed)
        return gap if gap == gap else 0.0

    part, gap, seen = lab.until_decided(minus, below=0)
    starts: dict[str, Start] = {"started": start, "he": he_zero_ends}
    n = range(len(seen))
    return conclude(
        part,
        difference=gap,
        stable_rank={
            name: _mean([stable(s, k) for k in n if stable(s, k) == stable(s, k)]) for name, s in starts.items()
        },
        diverged={name: sum(_updates(s, k // BLOCK).diverged[k % BLOCK] for k in n) for name, s in starts.items()},
        rate={name: _update_rate(s) for name, s in starts.items()},
    )


DEEP = Setting(300, 32, 0.9, tuple(10 ** (k / 2) for k in range(-6, -2)), lowest=1e-4)
RANDOM: dict[str, Start] = {"He": he, "torch's": torchs, "He, the same at zero": he_zero_ends}


def _hundred() -> nn.Module:
    return _residual_net(32, 32, 100)


def _halved(weights: list[Tensor], biases: list[Tensor], x: Tensor) -> Tensor:
    """Inputs of as many numbers as a layer has units: neighbouring pixels' means. Else ZerO would see the upper half only."""
    return residual(weights, biases, x.unflatten(-1, (32, 2)).mean(-1))


@cache
def _deep_rate(start: Start) -> float:
    return best_rate(_maker(start, _hundred), _halved, DEEP)[0]


@cache
def _deep(start: Start, which: int) -> Trained:
    runs = [(BLOCK * which + k, _deep_rate(start)) for k in range(BLOCK)]
    return train(_maker(start, _hundred), _halved, DEEP, runs)


@claim(
    "A residual net of 202 layers without norm layers trains from it, and better than from random starts",
    source="abstract (ultra deep networks without batch normalization); the comparison with all random starts that train is ours, "
    "for one that leaves the layers as torch made them trains as well",
    criterion="8x8 digits with neighbouring pixels averaged (32 inputs: of 64, a first layer of 32 partial identities would see the "
    "upper half only), 100 residual blocks of width 32, 300 steps of SGD with momentum 0.9, batch 32, rate of each start tuned on "
    "held-out images of two other seeds, 0.001 to 0.03 in four steps and on where the best lies at an end (down to 3e-4), 5 seeds, "
    "others added until decided, at most 12: from ZerO with branch ends and classifier at zero no run diverges and the test "
    "accuracy has its 95% interval above 0.9; minus the best random start by the mean of 5 seeds, of He, torch's own and He with "
    "the same layers at zero, above 0 (a run that diverges counts 0.1; a start from which all do is left out)",
    budget="full",
    method=zero_ends,
    sham=Sham("torch's own start, nothing at zero", torchs),
)
def deep_without_norms(lab: Lab, start: Start) -> Finding:
    def accuracy(of: Start, seed: int) -> float:
        return _deep(of, seed // BLOCK).accuracy[seed % BLOCK]

    scores = {name: [accuracy(s, seed) for seed in lab.seeds] for name, s in RANDOM.items()}
    absent = [name for name, s in RANDOM.items() if all(_deep(s, 0).diverged)]
    best = max((name for name in RANDOM if name not in absent), key=lambda name: _mean(scores[name]))
    ahead, gap, seen = lab.until_decided(lambda s: accuracy(start, s) - accuracy(RANDOM[best], s), above=0, most=12)
    ours = [accuracy(start, s) for s in range(len(seen))]
    diverged = sum(_deep(start, s // BLOCK).diverged[s % BLOCK] for s in range(len(seen)))
    level: Effect = lab.effect(ours)
    return conclude(
        {
            "no run diverges": met(diverged == 0),
            "accuracy": weigh(level, above=0.9),
            f"ahead of {best}": ahead,
        },
        note=f"from {' and '.join(absent)} every run diverges, at every rate tried" if absent else "",
        accuracy={"started": level, "random": {name: _mean(s) for name, s in scores.items()}},
        minus_the_best_random=gap,
        rate={"started": _deep_rate(start), "random": {name: _deep_rate(s) for name, s in RANDOM.items()}},
    )


SHORT = Setting(300, 32, 0.9, tuple(10 ** (k / 2) for k in range(-5, 0)))
MANY = 60


@cache
def _scores(start: Start, n_seeds: int) -> tuple[float, list[float]]:
    """The rate and test accuracies of a small MLP."""
    make, relu = _maker(start, lambda: mlp([64, 128, 128, 10], nn.ReLU)), plain(torch.relu)
    rate = best_rate(make, relu, SHORT)[0]
    return rate, train(make, relu, SHORT, [(seed, rate) for seed in range(n_seeds)]).accuracy


def _log_variance(x: Tensor) -> list[float]:
    """Pseudo-values of the jackknife, one for each number: their mean is the logarithm of the variance, nearly without bias,
    and their spread tells how sure it is."""
    n, whole = len(x), float(x.var().log())
    return [n * whole - (n - 1) * float(torch.cat([x[:k], x[k + 1 :]]).var().log()) for k in range(n)]


@claim(
    "Test accuracy varies less from run to run than from a random start",
    source="abstract (training reproducibility)",
    criterion="64-128-128-10 ReLU net on the digits, 300 steps of SGD with momentum 0.9, batch 32, rate of each start tuned on "
    "held-out images of two other seeds, 0.003 to 0.3 in five steps and on where the best lies at an end; 60 seeds, of the start and "
    "of the order of batches: the logarithm of the variance of test accuracy over the seeds, from ZerO minus from He, has its 95% "
    "interval (by the jackknife) below 0",
    budget="full",
    method=zero_,
    sham=Sham("He's scale from the uniform distribution", he_uniform),
)
def less_variable_runs(lab: Lab, start: Start) -> Finding:
    n = len(lab.draws(max(MANY, lab.n_seeds)))
    (rate, ours), (hes, random) = (_scores(s, n) for s in (start, he))
    a, b = (torch.tensor(s, dtype=torch.float64) for s in (ours, random))
    ratio = lab.effect(_log_variance(a), _log_variance(b))
    return conclude(
        weigh(ratio, below=0),
        log_variance_ratio=ratio,
        deviation={"started": a.std(), "he": b.std()},
        accuracy={"started": a.mean(), "he": b.mean()},
        rate={"started": rate, "he": hes},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

"""ZerO (arXiv 2110.12661): no randomness, no rank trap in growing layers, deep nets without norms, low-rank updates."""

import hashlib
import math
import tempfile
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera.init.zero import zero_
from pondera.replications import Finding, Lab, claim, judge

RESIDUAL = '''"""8x8 digits and a residual net of 100 blocks (202 layers) without norm layers; test accuracy."""

import torch
from torch import nn

from pondera.lab.tasks.digits import data

settings = {"steps": 300, "batch": 64}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.start, self.end = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.end(torch.relu(self.start(x)))


def build():
    return nn.Sequential(nn.Linear(64, 32), *(Block() for _ in range(100)), nn.Linear(32, 10))
'''


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(torch.relu(self.start(x)))


def _zero_ends(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """ZerO as in the paper's residual nets: branch ends and classifier zero."""
    return zero_(model, zero_last=_ends(model), generator=generator)


def _he_zero_ends(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """The random counterpart: He, with the same layers at zero."""
    ends = _ends(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            if name in ends:
                nn.init.zeros_(layer.weight)
    return model


def _ends(model: nn.Module) -> list[str]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [n for n in names if n.endswith(".end")] + names[-1:]


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


def _train(net: nn.Module, *, rate: float, momentum: float, steps: int, seed: int) -> float:
    """SGD on batches of 64 digits in the order of `seed`; the loss of the last ten steps."""
    x, y = _digits()
    g = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(net.parameters(), lr=rate, momentum=momentum)
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
    "The same weights whatever the seed, before training and, given the same batches, after it",
    source="abstract (reproducibility)",
    criterion="distinct weights of a 64-128-128-10 ReLU net over 5 seeds, at the start and after 50 steps of SGD on "
    "the same batches: 1 and 1 from ZerO, 5 and 5 from He",
)
def identical_for_every_seed(lab: Lab) -> Finding:
    distinct: dict[str, list[int]] = {}
    for name, start in (("zero", zero_), ("he", _he)):
        before, after = set(), set()
        for seed in lab.seeds:
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
            start(net, generator=lab.generator(seed))
            before.add(_hash(net))
            _train(net, rate=0.05, momentum=0.0, steps=50, seed=0)
            after.add(_hash(net))
        distinct[name] = [len(before), len(after)]
    return judge(distinct["zero"] == [1, 1] and distinct["he"] == [lab.n_seeds] * 2, **distinct)


@claim(
    "Partial identities keep what a hidden layer learns inside the input's dimension; the Hadamard matrix does not",
    source="Theorem 1; Fig. 3 of the authors' notebook, on digits of 64 pixels in place of 784",
    criterion="rank (tolerance 1e-4) of W_3 - I in a 64-64-256-256-10 ReLU net without biases after 300 steps of SGD "
    "at 0.1: at most 64 from partial identities and above 64 from ZerO, in each of 5 orders of the batches",
)
def no_rank_trap(lab: Lab) -> Finding:
    def partial_identity(net: nn.Module, **_: Any) -> None:
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                nn.init.eye_(layer.weight)

    ranks: dict[str, list[int]] = {}
    starts: dict[str, Callable[..., object]] = {"partial identity": partial_identity, "zero": zero_}
    for name, start in starts.items():
        ranks[name] = []
        for seed in lab.seeds:
            sizes = (64, 64, 256, 256, 10)
            layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)]
            net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])
            start(net)
            _train(net, rate=0.1, momentum=0.0, steps=300, seed=seed)
            learned = layers[2].weight.detach() - torch.eye(256)
            ranks[name].append(int((torch.linalg.svdvals(learned) > 1e-4).sum()))
    return judge(max(ranks["partial identity"]) <= 64 < min(ranks["zero"]), **ranks)


@claim(
    "Weight updates stay of lower rank than from a random start",
    source="abstract (low-rank learning trajectories)",
    criterion="stable rank |D|_F^2 / |D|_2^2 of the change D of a hidden weight after 100 steps of SGD with momentum "
    "0.9, mean over the 24 weights of 12 residual blocks, each start at the best of 4 rates by training loss: ZerO "
    "minus He with the same layers at zero has a 95% interval below 0 over 5 seeds",
)
def low_rank_updates(lab: Lab) -> Finding:
    def run(start: Callable[..., nn.Module], rate: float, seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), *(_Block(64) for _ in range(12)), nn.Linear(64, 10))
        start(net, generator=lab.generator(seed))
        hidden = [m for n, m in net.named_modules() if n.endswith((".start", ".end"))]
        before = [m.weight.detach().clone() for m in hidden]
        loss = _train(net, rate=rate, momentum=0.9, steps=100, seed=seed)
        if not math.isfinite(loss):
            return math.inf, math.nan
        ranks = []
        for layer, old in zip(hidden, before, strict=True):
            s = torch.linalg.svdvals(layer.weight.detach() - old)
            ranks.append(float((s / s[0]).square().sum()))
        return loss, sum(ranks) / len(ranks)

    stable, losses, rates = {}, {}, {}
    for name, start in (("zero", _zero_ends), ("he", _he_zero_ends)):
        tuned = {rate: run(start, rate, 1000)[0] for rate in (0.003, 0.01, 0.03, 0.1)}
        rates[name] = min(tuned, key=lambda rate, tuned=tuned: tuned[rate])
        runs = [run(start, rates[name], seed) for seed in lab.seeds]
        losses[name], stable[name] = [r[0] for r in runs], [r[1] for r in runs]
    gap = lab.effect(stable["zero"], stable["he"])
    return judge(
        gap.below,
        note=""
        if gap.below
        else "branches that start at zero seem to make the updates low-rank, whatever the rest holds; "
        "the paper's random nets are ResNets with BatchNorm and random branch ends, trained to the end",
        difference=gap,
        stable_rank=stable,
        training_loss=losses,
        rate=rates,
    )


@claim(
    "A residual net of 202 layers without norm layers trains",
    source="abstract (ultra deep networks without batch normalization)",
    criterion="8x8 digits, SGD with momentum 0.9, rates tuned alike, 5 seeds: from ZerO with branch ends and "
    "classifier at zero no run diverges, the mean test accuracy is above 0.9, and it minus He's has a 95% interval "
    "above 0 (a diverged run counts 0)",
    budget="full",
)
def deep_without_norms(lab: Lab) -> Finding:
    starts = {"zero": "pondera.replications.init.zero:_zero_ends", "he": "kaiming_normal"}
    starts["he, ends zero"] = "pondera.replications.init.zero:_he_zero_ends"
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "residual_200.py"
        task.write_text(RESIDUAL, encoding="utf-8")
        table = lab.compare(str(task), [f"init={s}+optim=SGD(momentum=0.9)" for s in starts.values()])
    scores = [[0.0 if seed in row.failed else s for seed, s in enumerate(row.scores)] for row in table.rows]
    zero, he, he_zero = scores
    gap, to_zero_ends = lab.effect(zero, he), lab.effect(zero, he_zero)
    return judge(
        not table.rows[0].failed and sum(zero) / len(zero) > 0.9 and gap.above,
        note="zeroed branch ends are what lets it train: He with the same layers at zero is better still"
        if to_zero_ends.below
        else "",
        accuracy={name: sum(s) / len(s) for name, s in zip(starts, scores, strict=True)},
        failed={name: len(row.failed) for name, row in zip(starts, table.rows, strict=True)},
        zero_minus_he=gap,
        zero_minus_he_with_ends_zero=to_zero_ends,
    )


@claim(
    "Test accuracy varies less from run to run than from a random start",
    source="abstract (training reproducibility)",
    criterion="lab's task 'digits', rates tuned alike, 20 seeds: variance of test accuracy over the seeds from ZerO "
    "below that from He by an F test at 5%, one-sided",
    budget="full",
)
def less_variable_runs(lab: Lab) -> Finding:
    from scipy import stats

    table = lab.compare("digits", ["init=zero", "init=kaiming_normal"], seeds=20)
    zero, he = (torch.tensor(row.finished, dtype=torch.float64) for row in table.rows)
    ratio = float(zero.var() / he.var())
    p = float(stats.f.cdf(ratio, len(zero) - 1, len(he) - 1))
    return judge(
        p < 0.05,
        note=""
        if p < 0.05
        else "a fixed start removes one source of spread only; the order of the batches is as large a one",
        variance_ratio=ratio,
        p=p,
        deviation={"zero": zero.std(), "he": he.std()},
        accuracy={"zero": zero.mean(), "he": he.mean()},
    )


def _he(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return net


def _hash(net: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters())).hexdigest()

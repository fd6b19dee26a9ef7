"""Relevance pruning (arXiv 2204.04977): does decay of the irrelevant weights leave fewer of them at equal accuracy?"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.compress.masks import density
from pondera.compress.relevance_pruning import SelectiveDecay, relevance_prune
from pondera.replications import Finding, Lab, Sham, claim, conclude, weigh

Decay = Callable[[nn.Module, torch.optim.Optimizer, float], Any]  # attached to an optimizer, with a strength
STRENGTHS = (0.015, 0.03, 0.06, 0.12, 0.25)
STEPS, ROUNDS, AGAIN, BATCH = 600, 4, 120, 64
TOLERANCE = 0.005

plain = partial(SelectiveDecay, sharpness=0.0)
raw = partial(SelectiveDecay, scale="raw")
PLAIN = Sham("the same decay of every weight", plain)


# -- what is shrunk ----------------------------------------------------------------------------------------------------


def _regression(decay: Decay, seed: int) -> tuple[float, float]:
    """Share by which the weights of 10 inputs that matter end below the truth, and mean size of the 30 that do not."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 40, generator=g)
    truth = torch.cat([torch.randn(10, generator=g).sign(), torch.zeros(30)])
    y = x @ truth + 0.5 * torch.randn(2000, generator=g)
    net = nn.Linear(40, 1, bias=False)
    nn.init.normal_(net.weight, std=0.3, generator=g)
    sgd = torch.optim.SGD(net.parameters(), lr=0.02)
    decay(net, sgd, 0.3)
    ends = torch.zeros(40)
    for step in range(500):
        i = torch.randint(2000, (32,), generator=g)
        sgd.zero_grad()
        (net(x[i]).squeeze(1) - y[i]).square().mean().div(2).backward()
        sgd.step()
        ends += net.weight.detach()[0] * (step >= 400) / 100
    return 1 - float((ends[:10] * truth[:10]).mean()), float(ends[10:].abs().mean())


@claim(
    "Weights that matter keep their size while the others shrink",
    source="abstract: identifies non relevant weights and selectively shrinks their norm, classic update for relevant ones",
    criterion="linear regression on 40 inputs of which 10 matter, SGD in batches of 32, strength 0.3, 5 seeds: the "
    "share by which the relevant weights end below the truth, minus that under the same decay of every weight, has "
    "its 95% interval below -0.05, and the mean size of the others minus theirs under it is within 0.02",
    method=SelectiveDecay,
    sham=PLAIN,
)
def relevant_weights_keep_their_size(lab: Lab, decay: Decay) -> Finding:
    ours, even = ([_regression(d, s) for s in lab.seeds] for d in (decay, plain))
    lost, left = (lab.effect([a[k] for a in ours], [b[k] for b in even]) for k in (0, 1))
    return conclude(
        {"less of the relevant is lost": weigh(lost, below=-0.05), "the others as small": weigh(left, within=0.02)},
        lost_minus_even=lost,
        left_minus_even=left,
        lost_and_left=ours,
        even_lost_and_left=even,
    )


# -- how much can be cut -----------------------------------------------------------------------------------------------


@cache
def _digits(seed: int) -> list[tuple[Tensor, Tensor]]:
    """1,000 images to train on, 300 to judge by, 497 to test on."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[i], y[i]) for i in order.split([1000, 300, 497])]


@torch.no_grad()
def _accuracy(net: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    return float((net(part[0]).argmax(1) == part[1]).float().mean())


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> None:
    (x, y), g = _digits(seed)[0], torch.Generator().manual_seed(seed)
    for _ in range(steps):
        i = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()


def _net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))


@cache
def _dense(seed: int) -> float:
    """Accuracy, on the images to judge by, of the net that is neither decayed nor cut."""
    net = _net(seed)
    _train(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), seed, STEPS)
    return _accuracy(net, _digits(seed)[1])


def l2(net: nn.Module, optimizer: torch.optim.Optimizer, strength: float) -> None:
    """Weight decay in the gradient, as SGD has it; a strength shrinks as much as a decoupled one does in the long run."""
    for group in optimizer.param_groups:
        group["weight_decay"] = strength * (1 - group["momentum"])


@cache
def _cut(decay: Decay, strength: float, seed: int) -> tuple[float, float, float]:
    """Trained, cut and trained again in rounds: the smallest share kept within half a point of the dense net's accuracy on
    the images to judge by (1 if none), and the accuracy there and on the test images."""
    _, judge, test = _digits(seed)
    least = _dense(seed)
    net = _net(seed)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    decay(net, sgd, strength)
    _train(net, sgd, seed, STEPS)
    best = (1.0, 0.0, _accuracy(net, test))
    for _ in range(ROUNDS):
        relevance_prune(
            net,
            [judge],
            loss=_loss,
            tolerance=TOLERANCE,
            score=lambda m, b: min(_accuracy(m, b[0]), least),
            resolution=0.02,
        )
        sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)  # momentum starts anew
        decay(net, sgd, strength)
        _train(net, sgd, seed + 1, AGAIN)
        kept, now = density(net), _accuracy(net, judge)
        if now >= least - TOLERANCE and kept < best[0]:
            best = (kept, now, _accuracy(net, test))
    return best


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@cache
def _sparsest(decay: Decay, n: int) -> dict[str, list[float]]:
    """Each seed at the strength that leaves it fewest weights."""
    found = [min((*_cut(decay, s, seed), s) for s in STRENGTHS) for seed in range(n)]
    return {name: [one[k] for one in found] for k, name in enumerate(("kept", "judged", "test accuracy", "strength"))}


SETTING = (
    "ReLU net 64-100-50-10 on digits, SGD at 0.1 with momentum 0.9 and decay, 600 steps, then 4 rounds of a cut by "
    "the threshold on worsening (half a point on 300 images) and 120 more steps; each seed at the best of five "
    "strengths from 0.015 to 0.25; smallest share of weights at which accuracy is within half a point of the dense "
    "net's; minus the same with decoupled decay of every weight, 5 seeds: the log of the share has its 95% interval "
    "below 0, and test accuracy falls by less than 1.5 points (interval)"
)


def _fewer(lab: Lab, decay: Decay) -> Finding:
    n = len(lab.seeds)
    ours, even, ridge = (_sparsest(d, n) for d in (decay, plain, l2))
    logs = [[math.log(k) for k in one["kept"]] for one in (ours, even, ridge)]
    share, accuracy = lab.effect(logs[0], logs[1]), lab.effect(ours["test accuracy"], even["test accuracy"])
    beside_l2 = lab.effect(logs[0], logs[2])
    return conclude(
        {
            "fewer weights": weigh(share, below=0),
            "as accurate": weigh(accuracy, above=-0.015),
            "fewer than with L2 in the gradient": weigh(beside_l2, below=0),
        },
        central=["fewer weights", "as accurate"],
        log_share_minus_even=share,
        log_share_minus_l2=beside_l2,
        test_accuracy_minus_even=accuracy,
        selective=ours,
        even=even,
        l2=ridge,
    )


@claim(
    "Selective decay, with gradients measured by their mean, leaves fewer weights at equal accuracy than weight decay does",
    source="abstract: on par or better than competitors in terms of sparsity and metrics; the relative scale is ours",
    criterion=SETTING,
    budget="full",
    method=SelectiveDecay,
    sham=PLAIN,
)
def fewer_weights_at_equal_accuracy(lab: Lab, decay: Decay) -> Finding:
    return _fewer(lab, decay)


@claim(
    "So does the formula as it is recalled, with gradients as they are",
    source="the paper's coefficient of irrelevance (recalled)",
    criterion=SETTING,
    budget="full",
    method=raw,
    sham=PLAIN,
)
def fewer_weights_by_the_raw_formula(lab: Lab, decay: Decay) -> Finding:
    return _fewer(lab, decay)

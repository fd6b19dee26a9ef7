"""Norm Loss (arXiv 2103.06583): does it hold units at unit length, at what price, and is it flat in its factor?"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pondera.penalties import norm_loss
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Penalty = Callable[[nn.Module], Tensor]


def nothing(model: nn.Module) -> Tensor:
    """No pull at all."""
    return 0.0 * sum(p.sum() for p in model.parameters())  # type: ignore[return-value]


NO_PULL = Sham("a penalty that is zero everywhere", nothing)


def small_net(seed: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """An MLP and a teacher's data, made from `seed`."""
    torch.manual_seed(seed)
    x = torch.randn(512, 20)
    y = (x @ torch.randn(20, 5)).argmax(1)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)), x, y


@claim(
    "Trained with the penalty, weight vectors end near unit length",
    source="Sec. 3",
    criterion="median over hidden units of |norm - 1| below 0.05 with the penalty and above 0.05 without, in each of 5 seeds",
    method=norm_loss,
    sham=NO_PULL,
)
def units_reach_unit_norm(lab: Lab, penalty: Penalty) -> Finding:
    pulled = [distance(seed, penalty, 0.01) for seed in lab.seeds]
    free = [distance(seed, penalty, 0.0) for seed in lab.seeds]
    return conclude(
        {"near 1 with the penalty": max(pulled) < 0.05, "far from it without": min(free) > 0.05},
        with_penalty=pulled,
        without=free,
    )


def distance(seed: int, penalty: Penalty, factor: float) -> float:
    """Median |norm - 1| over the hidden units after 500 steps."""
    net, x, y = small_net(seed)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(500):
        sgd.zero_grad()
        (nn.functional.cross_entropy(net(x), y) + factor * penalty(net)).backward()
        sgd.step()
    norms = torch.cat([net[i].weight.norm(dim=1) for i in (0, 2)])  # type: ignore[index,operator]
    return (norms - 1).abs().median().item()


def by_singular_values(model: nn.Module) -> Tensor:
    """What a penalty costs that looks at more than lengths."""
    weights = [p.flatten(1) for p in model.parameters() if p.ndim > 1]
    return sum((torch.linalg.svdvals(w) - 1).square().sum() for w in weights)  # type: ignore[return-value]


@claim(
    "It costs next to nothing a step",
    source="abstract; the criterion of 2% is the catalogue's, the second part ours: beside convolutions nothing costs much",
    criterion="median over neighbouring pairs of the time of a step of a batch-128 CNN with the penalty at most 1.02 of that without; "
    "and on a weight of 1024 x 1024 it takes, with its gradient, at most 10 times as long as the sum of squares does",
    budget="full",
    method=norm_loss,
    sham=Sham("a penalty on all singular values", by_singular_values),
)
def overhead_is_small(lab: Lab, penalty: Penalty) -> Finding:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.randn(128, 3, 16, 16), torch.randint(10, (128,))
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)

    def step(factor: float) -> float:
        began = time.perf_counter()
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        (loss + factor * penalty(net) if factor else loss).backward()
        sgd.step()
        return time.perf_counter() - began

    times = [(step(0.0), step(0.01)) for _ in range(60)][5:]
    ratios = sorted(b / a for a, b in times)  # of neighbours, which share what else the machine does
    ratio = ratios[len(ratios) // 2]
    beside_squares = sorted(alone(penalty) / alone(squares) for _ in range(5))[2]
    return conclude(
        {"next to nothing beside convolutions": ratio <= 1.02, "a few passes over the numbers": beside_squares <= 10},
        ratio=ratio,
        quartiles=[ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        beside_sum_of_squares=beside_squares,
    )


def squares(model: nn.Module) -> Tensor:
    return sum(p.square().sum() for p in model.parameters())  # type: ignore[return-value]


def alone(penalty: Penalty) -> float:
    """Median seconds of the penalty and its gradient on one square layer."""
    torch.manual_seed(0)
    net = nn.Linear(1024, 1024, bias=False)
    seen: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        torch.autograd.grad(penalty(net), [net.weight])
        seen.append(time.perf_counter() - began)
    return sorted(seen[1:])[1]


FACTORS = (1e-4, 1e-3, 1e-2, 1e-1)


@claim(
    "Accuracy is less sensitive to the factor than with weight decay, while the penalty acts",
    source="abstract; Sec. 4.3; that it must act is ours, for what does nothing is flat as well",
    criterion="over factors 1e-4..1e-1 (x10), every seed tuned for itself: spread (best - worst test accuracy) of norm_loss minus "
    "that of weight decay has a 95% interval below 0, on digits; and at 0.01 and 0.1 units end near unit length (median "
    "|norm - 1| below 0.05 in each of 5 seeds, as above)",
    budget="full",
    method="norm_loss",
    sham=Sham("a penalty that is zero everywhere", "pondera.replications.penalties.norm_loss:nothing"),
)
def flat_in_factor(lab: Lab, penalty: str) -> Finding:
    ours = [f"optim=SGD(momentum=0.9)+penalty={penalty}(factor={f})" for f in FACTORS]
    decay = [f"optim=SGD(momentum=0.9,weight_decay={f})" for f in FACTORS]
    table = lab.compare("digits", ["optim=SGD(momentum=0.9)", *ours, *decay])
    score = {r.spec: r.scores for r in table.rows}

    def spreads(arm: list[str]) -> list[float]:
        return [max(s) - min(s) for s in zip(*(score[a] for a in arm), strict=True)]

    pull = nothing if ":" in penalty else norm_loss
    far = {f: max(distance(seed, pull, f) for seed in lab.seeds) for f in FACTORS[2:]}
    gap = lab.effect(spreads(ours), spreads(decay))
    return conclude(
        {"flatter than weight decay": weigh(gap, below=0), "it acts": met(max(far.values()) < 0.05)},
        spread_difference=gap,
        farthest_from_one=far,
        norm_loss={f: sum(score[a]) / len(score[a]) for f, a in zip(FACTORS, ours, strict=True)},
        weight_decay={f: sum(score[a]) / len(score[a]) for f, a in zip(FACTORS, decay, strict=True)},
    )

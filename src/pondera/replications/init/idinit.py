"""IDInit (arXiv 2503.04626): rank past the input's dimension, the way out of the identity, speed beside Fixup and ZerO."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera._weights import require_owned, start_each
from pondera.init.idinit import idinit_
from pondera.init.zero import zero_
from pondera.linalg import haar
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Start = Callable[..., Any]  # of a module or a weight: zero_last, eps and a generator by name
Named = dict[str, Tensor]
WIDE = 128


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


def _stacked(nets: list[nn.Module]) -> Named:
    """The parameters of nets of one kind beside each other."""
    named = [dict(net.named_parameters()) for net in nets]
    return {name: torch.stack([one[name].detach() for one in named]).requires_grad_() for name in named[0]}


# -- rank --------------------------------------------------------------------------------------------------------------


def padded_(net: nn.Module, *, generator: Generator | None = None, **settings: Any) -> nn.Module:
    """Identities with zeros for what a layer has more of than its input."""
    return start_each(net, lambda w: nn.init.eye_(w), who="padded_")


PADDED = Sham("identities padded with zeros", padded_)


@cache
def _ranks(start: Start, outputs: int, n: int) -> list[list[int]]:
    """Rank of W_2 - I after 100, 200 and 300 steps, a list a seed; ten outputs are classes, more of them random features."""
    x, y = _digits()
    sources = [torch.Generator().manual_seed(seed) for seed in range(n)]
    nets: list[nn.Module] = []
    for g in sources:
        sizes = pairwise((64, WIDE, WIDE, outputs))
        nets.append(start(nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in sizes)), generator=g))
    layers = list(_stacked(nets).values())
    target = torch.stack([(x @ torch.randn(64, outputs, generator=g) / 8).relu() for g in sources])
    sgd = torch.optim.SGD(layers, lr=0.01, momentum=0.9)
    courses: list[list[int]] = [[] for _ in range(n)]
    for step in range(1, 301):
        rows = torch.stack([torch.randint(len(x), (64,), generator=g) for g in sources])
        h = x[rows]
        for k, w in enumerate(layers):
            h = torch.bmm(h.relu() if k else h, w.mT)
        if outputs == 10:
            loss = F.cross_entropy(h.flatten(0, 1), y[rows].flatten(), reduction="sum") / 64
        else:
            aims = target.gather(1, rows.unsqueeze(2).expand(-1, -1, outputs))
            loss = (h - aims).square().mean((1, 2)).sum()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        if step % 100 == 0:
            found = (torch.linalg.svdvals(layers[1].detach() - torch.eye(WIDE)) > 1e-4).sum(1).tolist()
            for course, rank in zip(courses, found, strict=True):
                course.append(rank)
    return courses


def _outgrows(lab: Lab, start: Start, outputs: int) -> tuple[dict[str, bool], dict[str, list[list[int]]]]:
    ranks = {"started": _ranks(start, outputs, len(lab.seeds)), "zero-padded": _ranks(padded_, outputs, len(lab.seeds))}
    parts = {
        "past the input's dimension": min(c[-1] for c in ranks["started"]) > 64,
        "zero-padded held inside": max(c[-1] for c in ranks["zero-padded"]) <= 64,
    }
    return parts, ranks


@claim(
    "What a hidden weight learns outgrows the input's dimension, where a zero-padded identity holds it inside",
    source="Theorem 3.1 and Fig. 4b (as quoted by its readers), on digits of 64 pixels",
    criterion="number of singular values above 1e-4 of W_2 - I in a 64-128-128-10 ReLU net without biases after 300 steps of "
    "SGD at 0.01 with momentum 0.9: above 64 from IDInit and at most 64 from zero-padded identities, in each of 5 orders "
    "of the batches",
    method=idinit_,
    sham=PADDED,
)
def rank_outgrows_the_input(lab: Lab, start: Start) -> Finding:
    parts, ranks = _outgrows(lab, start, 10)
    most = max(c[-1] for c in ranks["started"])
    return conclude(
        parts,
        after_100_200_300_steps=ranks,
        note=f"at most {most}: the output is a partial identity of 10 rows, which reads one of each input's copies at most; the "
        "others get equal gradients and stay equal but for the noise of 1e-6, which training does not amplify"
        if most <= 64
        else "",
    )


@claim(
    "It does outgrow it where the outputs tell the copies of an input apart",
    source="our reading of Theorem 3.1, whose proof needs a gradient at every hidden unit",
    criterion="as before with 128 outputs in place of 10 (W_3 starts as the identity), fitted in mean square to 128 random ReLU "
    "features of the digits: above 64 from IDInit and at most 64 from zero-padded identities, in each of 5 orders",
    method=idinit_,
    sham=PADDED,
)
def rank_outgrows_the_input_with_wide_outputs(lab: Lab, start: Start) -> Finding:
    parts, ranks = _outgrows(lab, start, WIDE)
    return conclude(parts, after_100_200_300_steps=ranks)


# -- the way out of the identity ---------------------------------------------------------------------------------------


def orthogonal_(w: Tensor, *, generator: Generator | None = None, **settings: Any) -> Tensor:
    """As isometric as the identity, and not symmetric."""
    return w.copy_(haar(*w.shape, generator=generator))


@claim(
    "Gradient descent from identities does not reach a map with negative eigenvalues; stochastic gradients with momentum do",
    source="abstract; Sec. 3.1 and Table 1 (as quoted by its readers)",
    criterion="three linear layers of 10 from exact identities, target -x, 2000 Gaussian inputs, 1000 steps at rate 0.1: loss "
    "over that of the zero map above 0.99 by full gradients without momentum, below 0.01 by batches of 200 with momentum "
    "0.9, in each of 5 seeds",
    method=idinit_,
    sham=Sham("random orthogonal matrices in place of the identities", orthogonal_),
)
def momentum_leaves_the_identity(lab: Lab, start: Start) -> Finding:
    def run(*, batch: int, momentum: float) -> list[float]:
        """All seeds side by side: their losses are summed, so each follows its own gradient."""
        sources = [lab.generator(seed) for seed in lab.seeds]
        x = torch.stack([torch.randn(2000, 10, generator=g) for g in sources])
        whole = torch.linalg.cholesky(x.mT @ x).mT  # ten rows with the same sums of squares as all of x
        layers = [
            torch.stack([start(torch.empty(10, 10), eps=0.0, generator=g) for g in sources]).requires_grad_()
            for _ in range(3)
        ]
        sgd = torch.optim.SGD(layers, lr=0.1, momentum=momentum)

        def wrong(at: Tensor) -> Tensor:
            y = at
            for w in layers:
                y = y @ w.mT
            return (y + at).square().sum((1, 2))

        for _ in range(1000):
            at = whole
            if batch < 2000:
                rows = torch.stack([torch.randint(2000, (batch,), generator=g) for g in sources])
                at = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, 10))
            sgd.zero_grad()
            (wrong(at).sum() / (2 * batch)).backward()
            sgd.step()
        return (wrong(whole) / whole.square().sum((1, 2))).nan_to_num(torch.inf).tolist()

    left = {
        "full": run(batch=2000, momentum=0.0),
        "full, momentum": run(batch=2000, momentum=0.9),
        "batches": run(batch=200, momentum=0.0),
        "batches, momentum": run(batch=200, momentum=0.9),
    }
    either = max(left["full, momentum"] + left["batches"]) < 0.01
    return conclude(
        {
            "full gradients stay": met(min(left["full"]) > 0.99),
            "batches with momentum get there": met(max(left["batches, momentum"]) < 0.01),
        },
        share_of_loss_left=left,
        note="either is enough: batches without momentum escape as well, and so do full gradients with momentum"
        if either
        else "",
    )


# -- speed, dense and convolutional ------------------------------------------------------------------------------------

TUNING, SLOWEST, FASTEST, DIVERGED = (1000, 1001), 1e-5, 3.0, 10.0
RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@cache
def _trained(kind: "Kind", start: Start, runs: tuple[tuple[int, float], ...]) -> list[float]:
    """Mean training loss over all steps of one net for each seed and rate, side by side, by SGD with momentum 0.9."""
    x, y = _digits()
    nets: list[nn.Module] = []
    for seed, _ in runs:
        torch.manual_seed(seed)
        nets.append(start(kind.build(), generator=torch.Generator().manual_seed(seed)))
    named = _stacked(nets)
    weights = list(named.values())
    rates = torch.tensor([rate for _, rate in runs])
    each = [rates.view(-1, *[1] * (w.ndim - 1)) for w in weights]
    speed = [torch.zeros_like(w) for w in weights]
    draw = {seed: torch.Generator().manual_seed(seed) for seed, _ in runs}
    total = torch.zeros(len(runs))
    for _ in range(kind.steps):
        rows = {seed: torch.randint(len(x), (kind.batch,), generator=g) for seed, g in draw.items()}
        picked = torch.stack([rows[seed] for seed, _ in runs])
        labels = y[picked]
        logits = kind.scores(named, x[picked])
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
        total += losses.detach()
        grads = torch.autograd.grad(losses.sum(), weights)
        with torch.no_grad():
            for w, v, rate, g in zip(weights, speed, each, grads, strict=True):
                v.mul_(0.9).add_(g)
                w.sub_(rate * v)
    return (total / kind.steps).nan_to_num(DIVERGED).clamp_max(DIVERGED).tolist()


@cache
def _tuned(kind: "Kind", start: Start) -> float:
    """The rate of least mean loss over two seeds of their own; a best at the grid's end is gone beyond."""
    course: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        found = _trained(kind, start, tuple((seed, rate) for rate in rates for seed in TUNING))
        course |= {rate: sum(found[2 * k : 2 * k + 2]) / 2 for k, rate in enumerate(rates)}
        best = min(course, key=lambda rate: course[rate])
        further = {min(course): best / 3, max(course): best * 3}.get(best)
        rates = [further] if further is not None and SLOWEST < further < FASTEST else []
    return best


def _losses(kind: "Kind", start: Start, n: int) -> list[float]:
    rate = _tuned(kind, start)
    return _trained(kind, start, tuple((seed, rate) for seed in range(n)))


class _Block(nn.Module):
    """A residual branch four times as wide inside, with the multiplier Fixup adds; no norm layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(()))


BLOCKS, WIDTH = 20, 64


class Residual:
    """A residual net of dense layers."""

    steps, batch = 100, 32

    @staticmethod
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, WIDTH), *(_Block(WIDTH) for _ in range(BLOCKS)), nn.Linear(WIDTH, 10))

    @staticmethod
    def scores(p: Named, x: Tensor) -> Tensor:
        def linear(name: str, h: Tensor) -> Tensor:
            return torch.baddbmm(p[f"{name}.bias"][:, None], h, p[f"{name}.weight"].mT)

        h = linear("0", x)
        for k in range(1, BLOCKS + 1):
            h = h + p[f"{k}.scale"][:, None, None] * linear(f"{k}.end", linear(f"{k}.start", h).relu())
        return linear(str(BLOCKS + 1), h)


def _ends(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules() if name.endswith(".end")]


def he_(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """He normal; branch ends at zero."""
    ends = _ends(net)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            if name in ends:
                nn.init.zeros_(layer.weight)
    return net


def fixup_(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """Fixup: branch ends and classifier at zero, the branches' other layer He times L^(-1/2) for L blocks of two layers."""
    he_(net, generator=generator)
    with torch.no_grad():
        for name, layer in net.named_modules():
            if name.endswith(".start"):
                layer.weight.mul_(BLOCKS**-0.5)
    nn.init.zeros_(require_owned(net, "fixup")[-1].module.weight)
    return net


def zero_ends_(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """ZerO with its zeros at branch ends and classifier."""
    return zero_(net, zero_last=[*_ends(net), str(BLOCKS + 1)], generator=generator)


def idinit_ends_(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    return idinit_(net, zero_last=_ends(net), generator=generator)


@claim(
    "A residual net without norm layers trains faster from it than from Fixup or ZerO",
    source="Table 2 (as quoted by its readers: CIFAR-10, ResNet-56 and -110)",
    criterion="8x8 digits, 20 residual blocks of width 64 (256 inside) with Fixup's multipliers, SGD with momentum 0.9, batch 32, "
    "rate of each start tuned on one grid, 0.001 to 0.1 and on beyond its ends, by the mean training loss over 100 steps of 2 seeds, "
    "then 10 fresh seeds: the 95% intervals of that loss minus Fixup's and minus ZerO's lie below 0. (Seeds 20 to 29: those before had "
    "been looked at in nets of width 32, where IDInit was the slowest; its partial identity reads only half of the 64 pixels there)",
    budget="full",
    method=idinit_ends_,
    sham=Sham("He's start with branch ends at zero", he_),
)
def faster_than_fixup_and_zero(lab: Lab, start: Start) -> Finding:
    starts = {"started": start, "fixup": fixup_, "zero": zero_ends_, "he, ends zero": he_}
    fresh = [20 + seed for seed in lab.draws(max(lab.n_seeds, 10))]
    losses = {
        name: _trained(Residual, one, tuple((seed, _tuned(Residual, one)) for seed in fresh))
        for name, one in starts.items()
    }
    gaps = {name: lab.effect(losses["started"], loss) for name, loss in losses.items() if name != "started"}
    return conclude(
        {"faster than Fixup": weigh(gaps["fixup"], below=0), "faster than ZerO": weigh(gaps["zero"], below=0)},
        minus=gaps,
        mean_training_loss=losses,
        rates={name: _tuned(Residual, one) for name, one in starts.items()},
    )


class _ConvBlock(nn.Module):
    """A residual branch of two 3 x 3 convolutions; a block that halves the image doubles the channels by zeros."""

    def __init__(self, channels: int, halve: bool) -> None:
        super().__init__()
        inside = 2 * channels if halve else channels
        self.start = nn.Conv2d(channels, inside, 3, stride=1 + halve, padding=1)
        self.end = nn.Conv2d(inside, inside, 3, padding=1)


CHANNELS = (8, 8, 8, 16)  # that enter each block; the third halves the image


class Images:
    """A small convolutional residual net."""

    steps, batch = 150, 16

    @staticmethod
    def build() -> nn.Module:
        blocks = [_ConvBlock(c, k == 2) for k, c in enumerate(CHANNELS)]
        return nn.Sequential(nn.Conv2d(1, CHANNELS[0], 3, padding=1), *blocks, nn.Linear(4 * CHANNELS[-1], 10))

    @staticmethod
    def scores(p: Named, x: Tensor) -> Tensor:
        """The nets are groups of channels of one."""
        n = len(x)

        def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
            w, b = p[f"{name}.weight"].flatten(0, 1), p[f"{name}.bias"].flatten()
            return F.conv2d(h, w, b, stride=stride, padding=1, groups=n)

        h = conv("0", x.transpose(0, 1).unflatten(2, (8, 8)))
        for k in range(len(CHANNELS)):
            branch = conv(f"{k + 1}.end", conv(f"{k + 1}.start", h, 1 + (k == 2)).relu())
            if k == 2:
                h = F.avg_pool2d(h, 2).unflatten(1, (n, -1))
                h = torch.cat([h, torch.zeros_like(h)], 2).flatten(1, 2)
            h = h + branch
        h = F.avg_pool2d(h, 2).unflatten(1, (n, -1)).flatten(2).transpose(0, 1)
        head = str(len(CHANNELS) + 1)
        return torch.baddbmm(p[f"{head}.bias"][:, None], h, p[f"{head}.weight"].mT)


Kind = type[Residual] | type[Images]


@torch.no_grad()
def _central(net: nn.Module, generator: Generator | None) -> None:
    """The identity at the centre tap, repeated where the layer grows, in all convolutions but branch ends."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and not name.endswith(".end"):
            w = layer.weight.zero_()
            w[:, :, 1, 1] = idinit_(torch.empty(w.shape[:2]), generator=generator)


@torch.no_grad()
def _ended(net: nn.Module) -> None:
    for name, layer in net.named_modules():
        if name.endswith(".end"):
            layer.weight.zero_()


def centre_(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """Neither part: the identity at the centre tap, branches that end at zero."""
    idinit_(net, zero_last=_ends(net), generator=generator)
    _central(net, generator)
    _ended(net)
    return net


@cache
def _variant(start: Start, patch: bool, near_zero: bool) -> Start:
    """The start with either part of it taken away."""

    def changed(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
        start(net, generator=generator)
        if not patch:
            _central(net, generator)
        if not near_zero:
            _ended(net)
        return net

    return changed


@claim(
    "Both the patch-maintained convolution and the branch ends near zero speed up a convolutional residual net",
    source="Table 4 (as quoted by its readers: ResNet-20 on CIFAR-10, +3.42 and +5.89 points)",
    criterion="8x8 digits, 4 residual blocks without norm layers, channels doubled once from 8 by zeros, SGD with momentum 0.9 on "
    "batches of 16, rate of each variant tuned on one grid, 0.001 to 0.1 and on beyond its ends, by the mean training loss over 150 "
    "steps of 2 seeds, then 10 fresh seeds: against the identity at the centre tap with ends at zero, the 95% interval of that loss "
    "lies below 0 for the patch alone, for the ends alone and for both",
    budget="full",
    method=idinit_ends_,
    sham=Sham("neither part: the identity at the centre tap, ends at zero", centre_),
)
def both_parts_help(lab: Lab, start: Start) -> Finding:
    n = len(lab.draws(max(lab.n_seeds, 10)))
    starts: dict[str, Start] = {
        "patch alone": _variant(start, True, False),
        "ends alone": _variant(start, False, True),
        "both": start,
    }
    base = _losses(Images, centre_, n)
    losses = {name: _losses(Images, one, n) for name, one in starts.items()}
    gaps = {name: lab.effect(loss, base) for name, loss in losses.items()}
    return conclude(
        {name: weigh(gap, below=0) for name, gap in gaps.items()},
        minus_base=gaps,
        base=base,
        mean_training_loss=losses,
        rates={"base": _tuned(Images, centre_)} | {name: _tuned(Images, one) for name, one in starts.items()},
    )

"""IDInit (arXiv 2503.04626): rank past the input's dimension, the way out of the identity, speed beside Fixup and ZerO."""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from pondera._weights import require_owned
from pondera.init.idinit import idinit_
from pondera.init.zero import zero_
from pondera.replications import Finding, Lab, claim, judge

Start = Callable[..., nn.Module]


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


def _train(net: nn.Module, *, rate: float, steps: int, seed: int, batch: int = 64) -> float:
    """SGD with momentum 0.9 on the digits, in the order of `seed`; the mean training loss over all steps."""
    x, y = _digits()
    g = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    total = 0.0
    for _ in range(steps):
        pick = torch.randint(len(x), (batch,), generator=g)
        sgd.zero_grad()
        loss = nn.functional.cross_entropy(net(x[pick]), y[pick])
        loss.backward()
        sgd.step()
        total += loss.item()
        if not math.isfinite(total):
            return math.inf
    return total / steps


def _tuned(
    lab: Lab, build: Callable[[], nn.Module], start: Start, rates: list[float], *, steps: int, batch: int = 64
) -> tuple[list[float], float]:
    """Mean training losses of fresh seeds at the rate that is best over two others, and that rate."""

    def run(rate: float, seed: int) -> float:
        torch.manual_seed(seed)
        return _train(start(build(), generator=lab.generator(seed)), rate=rate, steps=steps, seed=seed, batch=batch)

    by_rate = {rate: run(rate, 1000) + run(rate, 1001) for rate in rates}
    best = min(by_rate, key=lambda rate: by_rate[rate])
    return [run(best, seed) for seed in lab.seeds], best


@claim(
    "What a hidden weight learns outgrows the input's dimension, where a zero-padded identity holds it inside",
    source="Theorem 3.1 and Fig. 4b (as quoted by its readers), on digits of 64 pixels",
    criterion="number of singular values above 1e-4 of W_2 - I in a 64-256-256-10 ReLU net without biases after 300 steps of "
    "SGD at 0.01 with momentum 0.9: above 64 from IDInit and at most 64 from zero-padded identities, in each of 5 orders "
    "of the batches",
)
def rank_outgrows_the_input(lab: Lab) -> Finding:
    ranks: dict[str, list[list[int]]] = {"idinit": [], "zero-padded": []}
    for name, seen in ranks.items():
        for seed in lab.seeds:
            sizes = ((64, 256), (256, 256), (256, 10))
            first, middle, last = (nn.Linear(a, b, bias=False) for a, b in sizes)
            net = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
            if name == "idinit":
                idinit_(net, generator=lab.generator(seed))
            else:
                for layer in (first, middle, last):
                    nn.init.eye_(layer.weight)
            course = []
            for part in range(3):
                _train(net, rate=0.01, steps=100, seed=3 * seed + part)
                s = torch.linalg.svdvals(middle.weight.detach() - torch.eye(256))
                course.append(int((s > 1e-4).sum()))
            seen.append(course)
    holds = min(c[-1] for c in ranks["idinit"]) > 64 and max(c[-1] for c in ranks["zero-padded"]) <= 64
    return judge(
        holds,
        note=""
        if holds
        else "the output is a partial identity of 10 rows: of each input's four copies it reads one at most, the others get "
        "equal gradients and stay equal but for the noise of 1e-6, which training does not amplify (second and third copy "
        "of W_1 are 7e-5 apart after 4000 steps, first and second 1.7; at a noise of 1e-2 the rank is the same)",
        after_100_200_300_steps=ranks,
    )


@claim(
    "It does outgrow it where the outputs tell the copies of an input apart",
    source="our reading of Theorem 3.1, whose proof needs a gradient at every hidden unit",
    criterion="as before with 256 outputs in place of 10 (W_3 starts as the identity), fitted in mean square to 256 random ReLU "
    "features of the digits: above 64 from IDInit and at most 64 from zero-padded identities, in each of 5 orders",
)
def rank_outgrows_the_input_with_wide_outputs(lab: Lab) -> Finding:
    x, _ = _digits()
    ranks: dict[str, list[int]] = {"idinit": [], "zero-padded": []}
    for name, seen in ranks.items():
        for seed in lab.seeds:
            g = lab.generator(seed)
            target = (x @ torch.randn(64, 256, generator=g) / 8).relu()
            first, middle, last = (nn.Linear(a, 256, bias=False) for a in (64, 256, 256))
            net = nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)
            if name == "idinit":
                idinit_(net, generator=g)
            else:
                for layer in (first, middle, last):
                    nn.init.eye_(layer.weight)
            sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
            for _ in range(300):
                pick = torch.randint(len(x), (64,), generator=g)
                sgd.zero_grad()
                (net(x[pick]) - target[pick]).square().mean().backward()
                sgd.step()
            s = torch.linalg.svdvals(middle.weight.detach() - torch.eye(256))
            seen.append(int((s > 1e-4).sum()))
    return judge(min(ranks["idinit"]) > 64 and max(ranks["zero-padded"]) <= 64, rank=ranks)


@claim(
    "Gradient descent from identities does not reach a map with negative eigenvalues; stochastic gradients with momentum do",
    source="abstract; Sec. 3.1 and Table 1 (as quoted by its readers)",
    criterion="three linear layers of 10 from exact identities, target -x, 2000 Gaussian inputs, 2000 steps at rate 0.1: loss "
    "over that of the zero map above 0.99 by full gradients without momentum, below 0.01 by batches of 200 with momentum "
    "0.9, in each of 5 seeds",
)
def momentum_leaves_the_identity(lab: Lab) -> Finding:
    def run(*, batch: int, momentum: float, eps: float = 0.0) -> list[float]:
        """All seeds side by side: their losses are summed, so each follows its own gradient."""
        sources = [lab.generator(seed) for seed in lab.seeds]
        x = torch.stack([torch.randn(2000, 10, generator=g) for g in sources])
        whole = torch.linalg.cholesky(x.mT @ x).mT  # ten rows with the same sums of squares as all of x
        layers = [
            torch.stack([idinit_(torch.empty(10, 10), eps=eps, generator=g) for g in sources]).requires_grad_()
            for _ in range(3)
        ]
        sgd = torch.optim.SGD(layers, lr=0.1, momentum=momentum)

        def wrong(at: Tensor) -> Tensor:
            y = at
            for w in layers:
                y = y @ w.mT
            return (y + at).square().sum((1, 2))

        for _ in range(2000):
            at = whole
            if batch < 2000:
                rows = torch.stack([torch.randint(2000, (batch,), generator=g) for g in sources])
                at = x.gather(1, rows.unsqueeze(-1).expand(-1, -1, 10))
            sgd.zero_grad()
            (wrong(at).sum() / (2 * batch)).backward()
            sgd.step()
        return (wrong(whole) / whole.square().sum((1, 2))).tolist()

    left = {
        "full": run(batch=2000, momentum=0.0),
        "full, momentum": run(batch=2000, momentum=0.9),
        "full, loose": run(batch=2000, momentum=0.0, eps=1e-6),
        "batches": run(batch=200, momentum=0.0),
        "batches, momentum": run(batch=200, momentum=0.9),
    }
    return judge(
        min(left["full"]) > 0.99 and max(left["batches, momentum"]) < 0.01,
        share_of_loss_left=left,
        note="either is enough: batches without momentum escape as well, and so do full gradients with momentum",
    )


class _Block(nn.Module):
    """A residual branch four times as wide inside, with the multiplier Fixup adds; no norm layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.end(torch.relu(self.start(x)))


BLOCKS = 20


def _residual() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), *(_Block(64) for _ in range(BLOCKS)), nn.Linear(64, 10))


def _ends(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_modules() if name.endswith(".end")]


def _he(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """He normal; branch ends at zero."""
    ends = _ends(net)
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
            if name in ends:
                nn.init.zeros_(layer.weight)
    return net


def _fixup(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """Fixup: branch ends and classifier at zero, the branches' other layer He times L^(-1/2) for L blocks of two layers."""
    _he(net, generator=generator)
    with torch.no_grad():
        for name, layer in net.named_modules():
            if name.endswith(".start"):
                layer.weight.mul_(BLOCKS**-0.5)
    nn.init.zeros_(require_owned(net, "fixup")[-1].module.weight)
    return net


def _zero(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    return zero_(net, zero_last=[*_ends(net), str(BLOCKS + 1)], generator=generator)


def _idinit(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    return idinit_(net, zero_last=_ends(net), generator=generator)


@claim(
    "A residual net without norm layers trains faster from it than from Fixup or ZerO",
    source="Table 2 (as quoted by its readers: CIFAR-10, ResNet-56 and -110)",
    criterion="8x8 digits, 20 residual blocks of width 64 (256 inside) with Fixup's multipliers, SGD with momentum 0.9, rate of "
    "each start tuned on one grid by the mean training loss over 200 steps of 2 seeds, then 5 fresh seeds: the 95% "
    "intervals of that loss minus Fixup's and minus ZerO's lie below 0",
    budget="full",
)
def faster_than_fixup_and_zero(lab: Lab) -> Finding:
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]
    starts = {"idinit": _idinit, "fixup": _fixup, "zero": _zero, "he, ends zero": _he}
    losses, chosen = {}, {}
    for name, start in starts.items():
        losses[name], chosen[name] = _tuned(lab, _residual, start, rates, steps=200)
    to_fixup, to_zero = (lab.effect(losses["idinit"], losses[other]) for other in ("fixup", "zero"))
    holds = to_fixup.below and to_zero.below
    return judge(
        holds,
        note=""
        if holds
        else "faster than ZerO, not than Fixup nor He with branch ends at zero: each start at its own rate (a tenth of Fixup's for "
        "IDInit), their losses lie within the spread over seeds; its readers say that the paper's runs shared their settings",
        minus_fixup=to_fixup,
        minus_zero=to_zero,
        minus_he=lab.effect(losses["idinit"], losses["he, ends zero"]),
        mean_training_loss=losses,
        rates=chosen,
    )


class _ConvBlock(nn.Module):
    """A residual branch of two 3 x 3 convolutions; a block that halves the image doubles the channels by zeros."""

    def __init__(self, channels: int, halve: bool) -> None:
        super().__init__()
        self.halve = halve
        inside = 2 * channels if halve else channels
        self.start = nn.Conv2d(channels, inside, 3, stride=1 + halve, padding=1)
        self.end = nn.Conv2d(inside, inside, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.end(torch.relu(self.start(x)))
        if self.halve:
            x = nn.functional.avg_pool2d(x, 2)
            x = torch.cat([x, torch.zeros_like(x)], 1)
        return x + branch


def _images() -> nn.Module:
    blocks = (
        [_ConvBlock(12, False) for _ in range(3)] + [_ConvBlock(12, True)] + [_ConvBlock(24, False) for _ in range(2)]
    )
    stem = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 12, 3, padding=1))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10))


def _variant(kernel: str, ends: str) -> Start:
    """IDInit with its convolutions laid out by `kernel` and its branches ending at IDIZ or at zero."""

    @torch.no_grad()
    def start(net: nn.Module, *, generator: Generator | None = None) -> nn.Module:
        idinit_(net, zero_last=_ends(net), generator=generator)
        for name, layer in net.named_modules():
            if not isinstance(layer, nn.Conv2d):
                continue
            if name.endswith(".end"):
                if ends == "zero":
                    nn.init.zeros_(layer.weight)
            elif kernel == "channel":  # the identity at the centre tap, repeated where the layer grows
                w = torch.zeros_like(layer.weight)
                w[:, :, 1, 1] = idinit_(torch.empty(w.shape[:2]), generator=generator)
                layer.weight.copy_(w)
            elif kernel == "patch, torch's order":
                w = layer.weight
                w.copy_(idinit_(torch.empty(len(w), w[0].numel()), generator=generator).view_as(w))
        return net

    return start


@claim(
    "Both the patch-maintained convolution and the branch ends near zero speed up a convolutional residual net",
    source="Table 4 (as quoted by its readers: ResNet-20 on CIFAR-10, +3.42 and +5.89 points)",
    criterion="8x8 digits, 6 residual blocks without norm layers, channels doubled once by zeros, SGD with momentum 0.9, rate of "
    "each variant tuned on one grid by the mean training loss over 200 steps of 2 seeds, then 5 fresh seeds: against the "
    "identity at the centre tap with ends at zero, the 95% interval of that loss lies below 0 for the patch alone, for "
    "the ends alone and for both",
    budget="full",
)
def both_parts_help(lab: Lab) -> Finding:
    rates = [0.003, 0.01, 0.03, 0.1, 0.3]
    losses, chosen = {}, {}
    for kernel in ("channel", "patch", "patch, torch's order"):
        for ends in ("zero", "idiz"):
            name = f"{kernel}; {ends}"
            losses[name], chosen[name] = _tuned(lab, _images, _variant(kernel, ends), rates, steps=200, batch=32)
    base = losses.pop("channel; zero")
    gaps = {name: lab.effect(loss, base) for name, loss in losses.items()}
    holds = all(gaps[name].below for name in ("patch; zero", "channel; idiz", "patch; idiz"))
    return judge(
        holds,
        note=""
        if holds
        else "the patch does it by itself; ends near zero add nothing. The channels filled by zeros stay dead with either end: in "
        "the last two blocks 75% of the entries never move, in 1500 steps too. The classifier, a partial identity, reads 10 of "
        "the 96 features, so they get no gradient, and 1e-6 does not grow by itself",
        minus_base=gaps,
        base=base,
        mean_training_loss=losses,
        rates=chosen,
    )

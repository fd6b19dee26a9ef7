"""Bone (arXiv 2409.15371), which PEFT has as MiSS with blocks "bat": faster than LoRA and PiSSA, and for which reason?

Its blocks see the inputs as sums over every 16th of them. The pixels of an image rise and fall together, so that such sums say
little but how bright it is. The ground is therefore used in two forms, as it is and with the sign of half of the pixels
exchanged, in the images and in the first layer alike: the same net and the same task, and for LoRA and PiSSA nothing changes.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, weigh
from pondera.replications.adapters import _adapting
from pondera.replications.adapters._adapting import Ground, Way, draw_losses
from pondera.replications.adapters._stand_ins import scattered

TARGETS = ["first", "second"]  # 16 does not divide the ten outputs of the last layer
R, RANK = 16, 5  # 8,192 and 7,760 trained numbers


def miss(kind: bool | str = "bat", *, r: int = R, targets: list[str] = TARGETS) -> Any:
    from peft import MissConfig

    return MissConfig(r=r, init_weights=kind, target_modules=targets)


def lora(start: bool | str = True, *, r: int = RANK, targets: list[str] = TARGETS) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=r, init_lora_weights=start, target_modules=targets)


# -- the start --------------------------------------------------------------------------------------------------------


class Heavy(TorchDispatchMode):
    """Names of the products and decompositions of matrices that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.").split(".")[0]
        if name.startswith("linalg_") or name in ("mm", "bmm", "addmm", "matmul", "geqrf", "orgqr"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@claim(
    "It starts at once: without a decomposition, as the model it was given, and with every number learning",
    source="abstract (training begins at zero, no complex initialization); that all numbers learn is ours, for LoRA needs no "
    "decomposition either",
    criterion="layers of 256 x 256, one a seed: no product and no decomposition of matrices while the adapter is added, the "
    "outputs afterwards the same to the last bit, and a gradient that is not zero at every trained number, in each seed",
    method=partial(miss, targets=["0"]),
    sham=Sham(
        "LoRA as it comes, whose first factor has no gradient while the second is zero", partial(lora, targets=["0"])
    ),
)
def starts_at_once(lab: Lab, config: Callable[[], Any]) -> Finding:
    from peft import get_peft_model

    seen: list[str] = []
    apart, still, trained = [], [], 0
    for seed in lab.seeds:
        torch.manual_seed(seed)
        net, x, y = nn.Sequential(nn.Linear(256, 256)), torch.randn(32, 256), torch.randn(32, 256)
        before = net(x).detach()
        with Heavy() as heavy:
            adapted = get_peft_model(net, config())  # type: ignore[arg-type]
        seen += heavy.seen
        apart.append(float((adapted(x).detach() - before).abs().max()))
        (adapted(x) - y).square().mean().backward()
        numbers = [p for p in adapted.parameters() if p.requires_grad]
        trained = sum(p.numel() for p in numbers)
        still.append(sum(int((p.grad == 0).sum()) if p.grad is not None else p.numel() for p in numbers))
    return conclude(
        {"no decomposition": not seen, "the model as it was": max(apart) == 0, "every number learns": max(still) == 0},
        products_and_decompositions=sorted(set(seen)),
        largest_change_of_an_output=max(apart),
        numbers_without_a_gradient=still,
        trained=trained,
    )


@claim(
    "Its start costs less than that of PiSSA",
    source="abstract (no complex initialization, whose time the variants of LoRA increase)",
    criterion="1024 x 1024 layer, batch of 64, one thread, processor time, five rounds in turn: adding the adapter and taking the "
    "first step of AdamW with bat (r 32) over the same with PiSSA (r 16, as many parameters) of that round, with its "
    "exact start and with its fast one (pissa_niter_4): the 95% intervals of both ratios lie below 0.5",
    budget="full",
    method=partial(miss, r=32, targets=["0"]),
    sham=Sham("PiSSA with its fast start", partial(lora, "pissa_niter_4", r=16, targets=["0"])),
)
def no_costly_start(lab: Lab, config: Callable[[], Any]) -> Finding:
    rounds = 5
    kinds = {
        "method": config,
        "exact": partial(lora, "pissa", r=16, targets=["0"]),
        "fast": partial(lora, "pissa_niter_4", r=16, targets=["0"]),
        "lora": partial(lora, r=16, targets=["0"]),
    }
    first: dict[str, list[float]] = {name: [] for name in kinds}
    later: dict[str, list[float]] = {name: [] for name in kinds}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for k in range(rounds + 1):  # the first warms up
            for name, made in kinds.items():
                seconds = steps_take(made)
                if k:
                    first[name].append(seconds[0])
                    later[name].append(sum(seconds[1:]) / len(seconds[1:]))
    finally:
        torch.set_num_threads(threads)
    ratio = {name: lab.effect([a / b for a, b in zip(first["method"], first[name])]) for name in ("exact", "fast")}
    each = {name: sum(t) / rounds for name, t in later.items()}
    more = each["method"] - each["exact"]
    note = f"a later step takes {each['method'] / each['exact']:.1f} times as long as PiSSA's, which rebuilds no weight"
    if more > 0:
        ahead = (sum(first["exact"]) - sum(first["method"])) / rounds
        note += f"; after {ahead / more:.0f} steps of this batch the exact decomposition is paid back"
    return conclude(
        {f"below half of PiSSA's {name} start": weigh(r, below=0.5) for name, r in ratio.items()},
        ratios=ratio,
        milliseconds_to_the_first_step={name: 1e3 * sum(t) / rounds for name, t in first.items()},
        milliseconds_a_later_step={name: 1e3 * t for name, t in each.items()},
        note=note,
    )


def steps_take(config: Callable[[], Any], steps: int = 4) -> list[float]:
    """Seconds of the processor for each step, the first with the adapter being added."""
    from peft import get_peft_model

    torch.manual_seed(0)
    layer, x = nn.Sequential(nn.Linear(1024, 1024)), torch.randn(64, 1024)
    began, seconds = time.process_time(), []
    net = get_peft_model(layer, config())  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
        began = time.process_time()
    return seconds


# -- learning ---------------------------------------------------------------------------------------------------------


@cache
def _signs() -> Tensor:
    return 1.0 - 2.0 * torch.randint(2, (784,), generator=Generator().manual_seed(0))


@cache
def both_sides() -> _adapting.Sets:
    (a, u), (b, v), (c, w) = _adapting.digits()
    return (a * _signs(), u), (b * _signs(), v), (c * _signs(), w)


def on_both_sides() -> nn.Module:
    """The net for images of which half of the pixels have the other sign; it computes the same."""
    net = _adapting.pretrained()
    net.first.weight.data *= _signs()
    return net


MIXED = Ground(on_both_sides, both_sides, tuple(TARGETS))


def scattered_guide(net: nn.Module, seed: int = 1) -> None:
    """bat whose blocks act through a weight with its numbers in other places."""
    from peft.tuners.miss.layer import MissLinear

    def through_another(own: Callable[..., Tensor], other: Tensor) -> Callable[..., Tensor]:
        return lambda adapter, weight, reverse=False: own(adapter, other, reverse)

    for layer in net.modules():
        if isinstance(layer, MissLinear):
            other = scattered(layer.get_base_layer().weight, seed)
            layer.get_delta_weight = through_another(layer.get_delta_weight, other)  # type: ignore[method-assign]


def other_scattered_guide(net: nn.Module) -> None:
    scattered_guide(net, seed=2)


def lora_5() -> Any:
    return lora()


def pissa_5() -> Any:
    return lora("pissa")


def plain_16() -> Any:
    return miss(True)


def bat_16() -> Any:
    return miss()


BAT, PLAIN = Way(bat_16, ground=MIXED), Way(plain_16, ground=MIXED)
LORA, PISSA = Way(lora_5, ground=MIXED), Way(pissa_5, ground=MIXED)
SCATTERED = Way(bat_16, ground=MIXED, prepare=scattered_guide)
OTHER_SCATTERED = Way(bat_16, ground=MIXED, prepare=other_scattered_guide)
TASK = (
    "784-256-256-10 net moved from upright to turned and inverted MNIST digits, first two layers adapted, 150 steps of AdamW, "
    "each choice at its own best rate by the training loss, five seeds and more until decided, at most 30: training loss over "
    "all images after the last step, "
)
SIGNS = (
    TASK.removesuffix(", ")
    + " (ours, after images as they lie, whose pixels all have one sign, were found at fault with seeds 100 "
    "and 101: half of the pixels, drawn at random, enter with the other sign, net and task stay the same), "
)


def lower(lab: Lab, way: Way, than: dict[str, Way]) -> tuple[dict[str, Part], dict[str, Effect]]:
    """Differences in training loss, each with seeds added until it is decided."""

    def minus(other: Way) -> Callable[[int], float]:
        return lambda seed: way.end(seed).loss - other.end(seed).loss

    found = {name: lab.until_decided(minus(other), below=0) for name, other in than.items()}
    return {f"below {n}": part for n, (part, _, _) in found.items()}, {n: e for n, (_, e, _) in found.items()}


def figures(lab: Lab, ways: dict[str, Way]) -> dict[str, Any]:
    """Means over the seeds that ran for all."""
    seeds = range(lab.n_seeds)
    return {
        "training_loss": {n: sum(w.ends(seeds, "loss")) / len(seeds) for n, w in ways.items()},
        "accuracy": {n: sum(w.ends(seeds, "accuracy")) / len(seeds) for n, w in ways.items()},
        "rates": {n: w.rate for n, w in ways.items()},
        "trained": {n: w.end(0).trained for n, w in ways.items()},
    }


@claim(
    "Lower loss at equal steps than LoRA and PiSSA",
    source="abstract (faster convergence and better data fitting); the catalogue",
    criterion=SIGNS + "bat (r 16, 8,192 parameters) minus LoRA and minus PiSSA (r 5, 7,760) have 95% intervals below 0",
    budget="full",
    method=BAT,
    sham=Sham("a LoRA of one rank more, of 9,312 numbers", Way(partial(lora, r=RANK + 1), ground=MIXED)),
)
def lower_loss(lab: Lab, way: Way) -> Finding:
    than = {"LoRA": LORA, "PiSSA": PISSA}
    parts, gaps = lower(lab, way, than)
    ways = {"method": way} | than
    if way is BAT:
        draw_losses(lab, {"bat": way} | than | {"plain": PLAIN, "full": Way(None)}, "loss", span=10)
    mean = {n: torch.stack([w.end(s).curve.mean() for s in range(lab.n_seeds)]) for n, w in ways.items()}
    early = {n: lab.effect(mean["method"].tolist(), mean[n].tolist()) for n in than}
    return conclude(parts, minus=gaps, in_mean_loss_over_the_steps=early, **figures(lab, ways))


@claim(
    "and so whatever the inputs are like",
    source="ours: where the inputs of a layer rise and fall together, as pixels do, sums over them say little else",
    criterion=TASK + "on images as they lie: bat minus LoRA has a 95% interval below 0",
    budget="full",
    method=replace(BAT, ground=None),
    sham=Sham("plain blocks, which do not see the weight", replace(PLAIN, ground=None)),
)
def whatever_the_inputs(lab: Lab, way: Way) -> Finding:
    than = {"LoRA": replace(LORA, ground=None)}
    parts, gaps = lower(lab, way, than)
    share = {}
    for name, images in {"as they lie": _adapting.digits()[0][0], "with both signs": both_sides()[0][0]}.items():
        sums = images.unflatten(1, (-1, R)).sum(1)
        along = torch.linalg.svdvals(sums - sums.mean(0)).square()
        share[name] = float(along[0] / along.sum())
    note = (
        "the blocks see the image as 16 sums over every 16th pixel; as images lie, all of these say how bright one is: one "
        f"direction holds {share['as they lie']:.0%} of their variance, and {share['with both signs']:.0%} where half of the pixels "
        "have the other sign"
    )
    return conclude(
        parts,
        minus=gaps,
        first_direction_of_the_sums=share,
        note=note,
        **figures(lab, {"method": way} | than),
    )


@claim(
    "The weight guides: blocks that act through it learn faster than the same number of parameters added beside it",
    source="abstract (Weight Guide); that it must be this weight is ours, for any fixed matrix makes the blocks' changes differ",
    criterion=SIGNS
    + "bat minus plain MiSS (r 16, as many parameters, without the weight), and bat minus bat that acts "
    "through the weight with its numbers scattered over other places, have 95% intervals below 0",
    budget="full",
    method=BAT,
    sham=Sham("bat that acts through the weight with its numbers scattered otherwise", OTHER_SCATTERED),
)
def the_weight_guides(lab: Lab, way: Way) -> Finding:
    than = {"plain blocks": PLAIN, "bat through a scattered weight": SCATTERED}
    parts, gaps = lower(lab, way, than)
    share = [through_the_weight(way.model(way.rate, seed)[0]) for seed in range(lab.n_seeds)]
    mean = {name: sum(s[name] for s in share) / len(share) for name in TARGETS}
    return conclude(
        parts,
        minus=gaps,
        part_through_the_weight=mean,
        note=f"the part through the weight has {mean['first']:.2f} and {mean['second']:.2f} of the length of the part beside it, in "
        "the two layers",
        **figures(lab, {"method": way} | than),
    )


@torch.no_grad()
def through_the_weight(net: Any) -> dict[str, float]:
    """Of the change W_ac B_a + B_a, the length of the first part over that of the second, a layer."""
    found = {}
    for name in TARGETS:
        layer = net.base_model.model.get_submodule(name)
        B = layer.miss_block["default"]
        weight = layer.base_layer.weight
        beside = B.norm() * (weight.shape[1] // R) ** 0.5
        tiles = layer.get_delta_weight("default", weight).unflatten(0, (-1, R)).unflatten(2, (-1, R)).transpose(1, 2)
        found[name] = float((tiles - B[:, None]).norm() / beside)
    return found

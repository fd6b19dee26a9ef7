"""Orthogonal Monte Carlo dropout (arXiv 2510.03262): exactly orthogonal adapters at no extra cost, and do they compose better?

The paper merges LoRA modules of objects and styles in SDXL. Here a net tells which digit an image shows and in which of
five styles, upright; on images turned by a quarter one adapter learns the digit and another, alone, the style. Merged,
the net should tell both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import combinations, pairwise
from math import log
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pondera.merge.orthogonal_merge import bake_orthogonal_merge, orthogonal_dropout_merge
from pondera.replications import Finding, Lab, Sham, claim, conclude, met

WIDTH, DEPTH, CLASSES, STYLES, RANK = 128, 4, 10, 5, 8
STEPS, BATCH, RATE, ADAPTER_RATE, DROP = 500, 64, 3e-3, 1e-2, 0.5
NAMES = ("class", "style")
NETS, PASSES = (
    4,
    16,
)  # nets a seed, averaged; passes whose logits are averaged (a diffusion model draws masks at every step)
MARGIN, MOST = 0.02, 18
Merge = Callable[..., Any]  # as `orthogonal_dropout_merge`: a context in which the model runs with several adapters


def mlp(seed: int, sizes: Sequence[int]) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_adapters(base: nn.Sequential, names: Sequence[str], *, rank: int, seed: int, blank: bool) -> Any:
    """LoRA on every linear layer; B zero if `blank` (to be trained), else random."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        targets = [str(i) for i in range(0, len(base), 2)]
        configs = [
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=blank) for _ in names
        ]
        model = get_peft_model(base, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:]):
            model.add_adapter(name, config)
    return model


def lora_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [m for m in model.modules() if isinstance(m, LoraLayer)]


@contextmanager
def plain_sum(
    model: Any,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    drop: object = None,
    generator: object = None,
) -> Iterator[None]:
    """PEFT's active adapters, weighted."""
    model.base_model.set_adapter(list(names))
    before = [dict(layer.scaling) for layer in lora_layers(model)]
    for layer in lora_layers(model):
        for name, w in zip(names, weights or [1.0] * len(names)):
            layer.scaling[name] *= w
    try:
        yield
    finally:
        for layer, scaling in zip(lora_layers(model), before):
            layer.scaling.update(scaling)


@contextmanager
def independent_dropout(
    model: Any,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    drop: float = DROP,
    generator: Generator | None = None,
) -> Iterator[None]:
    """The paper's other baseline: each adapter's output dropped out at the same rate, masks independent."""

    def masked(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        kept = torch.rand(out.shape, generator=generator) >= drop
        return out * kept / (1 - drop)

    hooks = [layer.lora_B[n].register_forward_hook(masked) for layer in lora_layers(model) for n in names]
    try:
        with plain_sum(model, names, weights):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def projected(
    model: Any,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    drop: object = None,
    generator: object = None,
) -> Iterator[None]:
    """Orthogonal the costly way: of each adapter's output what is not along those of the adapters before it."""

    def apart(before: list[Tensor], module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if len(before) == len(names):
            before.clear()  # a new call
        for q in before:
            out = out - (out * q).sum(-1, keepdim=True) * q
        before.append(F.normalize(out, dim=-1))
        return out

    hooks = []
    for layer in lora_layers(model):
        before: list[Tensor] = []
        hooks += [layer.lora_B[n].register_forward_hook(partial(apart, before)) for n in names]
    try:
        with plain_sum(model, names, weights):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def masks_fixed(
    model: Any, names: Sequence[str], weights: Sequence[float], *, drop: float, generator: Generator
) -> Iterator[None]:
    """The same with masks drawn once, baked into an adapter of its own."""
    bake_orthogonal_merge(model, names, "fixed", weights, drop=drop, generator=generator)
    model.base_model.set_adapter("fixed")
    try:
        yield
    finally:
        model.base_model.set_adapter(list(names))
        model.delete_adapter("fixed")


INDEPENDENT = Sham("dropout with independent masks", independent_dropout)


# -- orthogonality and cost -------------------------------------------------------------------------------------------


@torch.no_grad()
def largest_products(model: Any, names: Sequence[str], x: Tensor) -> list[float]:
    """For each layer the largest |inner product| of two adapters' outputs over positions, over the product of lengths."""
    seen: list[list[Tensor]] = []
    hooks = []
    for layer in lora_layers(model):
        parts: list[Tensor] = []
        seen.append(parts)
        for n in names:
            hooks.append(layer.lora_B[n].register_forward_hook(lambda m, a, out, to=parts: to.append(out.double())))
    model(x)
    for hook in hooks:
        hook.remove()
    cosines = [[F.cosine_similarity(p, q, dim=-1).abs().max() for p, q in combinations(parts, 2)] for parts in seen]
    return [float(max(c)) for c in cosines]


@claim(
    "What merged adapters give a layer is orthogonal, exactly",
    source="abstract (theory and run time)",
    criterion="net of 4 layers, width 64, random inputs, 2 and 3 random adapters of rank 4, float32 and bfloat16, 5 seeds: in "
    "every layer, position and pair the inner product is 0 under the method, and the largest |cosine| is above 0.1 in every "
    "layer for the plain sum and for dropout with independent masks",
    method=orthogonal_dropout_merge,
    sham=INDEPENDENT,
)
def exactly_orthogonal(lab: Lab, method: Merge) -> Finding:
    found: dict[str, list[float]] = {"method": [], "independent dropout": [], "plain sum": []}
    for seed in lab.seeds:
        for names in (["one", "two"], ["one", "two", "three"]):
            for dtype in (torch.float32, torch.bfloat16):
                model = with_adapters(mlp(seed, [64] * 5), names, rank=4, seed=seed, blank=False).to(dtype)
                x = torch.randn(50, 64, generator=lab.generator(seed)).to(dtype)
                for name, merge in (
                    ("method", method),
                    ("independent dropout", independent_dropout),
                    ("plain sum", plain_sum),
                ):
                    with merge(model, names, generator=lab.generator(seed)):
                        found[name] += largest_products(model, names, x)
    others = found["independent dropout"] + found["plain sum"]
    return conclude(
        {
            "every inner product is 0": max(found["method"]) == 0,
            "none of the other ways does it": min(others) > 0.1,
        },
        largest_cosine_over_layers={name: [min(v), max(v)] for name, v in found.items()},
    )


class Written(TorchDispatchMode):
    """Counts the entries of every tensor that an operation returns (views left out)."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.entries += out.numel()
        return out


@torch.no_grad()
def cost(model: Any, x: Tensor, merge: Callable[[], Any]) -> tuple[int, int]:
    """Operations of all matrix products of a forward pass, and entries written by all operations."""
    with merge(), FlopCounterMode(display=False) as flops:
        model(x)
    with merge(), Written() as written:
        model(x)
    return flops.get_total_flops(), written.entries


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of growth, from the last doubling."""
    return log(y[-1] / y[-2]) / log(x[-1] / x[-2])


@claim(
    "It takes no extra time complexity over the plain sum of the adapters",
    source="abstract; operations are counted, no clock is read",
    criterion="one forward pass of 128 rows through 4 layers, rank 8: with the masks as many matrix operations as without, for 2 "
    "to 32 adapters (width 256) and widths 64 to 1024 (4 adapters); entries written by all operations at most 4 times as many, "
    "with exponents of growth (last doubling) in either at most those of the plain sum plus 0.05",
    method=orthogonal_dropout_merge,
    sham=Sham("outputs made orthogonal by projection, each on all before it", projected),
)
def no_extra_cost(lab: Lab, method: Merge) -> Finding:
    def measured(width: int, k: int) -> dict[str, tuple[int, int]]:
        names = [f"number {i}" for i in range(k)]
        model = with_adapters(mlp(0, [width] * 5), names, rank=8, seed=0, blank=False)
        x = torch.randn(128, width, generator=lab.generator(0))
        return {
            "plain": cost(model, x, lambda: plain_sum(model, names)),
            "masked": cost(model, x, lambda: method(model, names, generator=lab.generator(0))),
            "merged into one": cost(model, x, lambda: _merged(model, names)),
        }

    many, widths = (2, 4, 8, 16, 32), (64, 128, 256, 512, 1024)
    by_number, by_width = [measured(256, k) for k in many], [measured(w, 4) for w in widths]
    rows = by_number + by_width
    exponents = {
        name: {
            "in adapters": slope(many, [r[name][1] for r in by_number]),
            "in width": slope(widths, [r[name][1] for r in by_width]),
        }
        for name in ("plain", "masked")
    }
    ratio = [r["masked"][1] / r["plain"][1] for r in rows]
    over_merged = [r["masked"][0] / r["merged into one"][0] for r in by_number]
    parts = {
        "as many matrix operations": met(all(r["masked"][0] == r["plain"][0] for r in rows)),
        "at most 4 times the entries written": met(max(ratio) <= 4),
    }
    for k in ("in adapters", "in width"):
        parts[f"growth {k} alike"] = met(exponents["masked"][k] <= exponents["plain"][k] + 0.05)
    note = (
        "compared is the plain sum of adapters that stay apart, at which "
        f"{min(ratio):.2f} to {max(ratio):.2f} times the entries are written. Adapters that are added into the weight once (PEFT's "
        "merge) run at the cost of the base alone, which masks drawn in every call rule out: "
        f"{over_merged[0]:.3g} times its matrix operations with {many[0]} adapters, {over_merged[-1]:.3g} with {many[-1]}"
    )
    return conclude(
        parts,
        entries_written_over_plain=ratio,
        exponents=exponents,
        matrix_operations_over_a_merged_weight=over_merged,
        note=note,
    )


@contextmanager
def _merged(model: Any, names: Sequence[str]) -> Iterator[None]:
    model.merge_adapter(list(names))
    try:
        yield
    finally:
        model.unmerge_adapter()


# -- two adapters, two things to tell ---------------------------------------------------------------------------------


def drawn(x: Tensor, style: Tensor, g: Generator) -> Tensor:
    """8 x 8 images in 0..1, each in its style: plain, negative, striped, blurred, on a ramp."""
    ramp = torch.linspace(0, 0.7, 8).expand(8, 8)
    stripes = (torch.arange(8) % 2).float().expand(8, 8)
    blurred = F.avg_pool2d(F.pad(x[:, None], (1, 1, 1, 1)), 3, stride=1)[:, 0]
    every = torch.stack([x, 1 - x, x * stripes, blurred, torch.maximum(x, ramp)], dim=1)
    chosen = every[torch.arange(len(x)), style]
    return chosen + 0.1 * torch.randn(chosen.shape, generator=g)


@cache
def material(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Digits in random styles, turned, with (class, style): 1,000 to train on, 300 to tune weights on, the rest to test."""
    from sklearn.datasets import load_digits

    g = torch.Generator().manual_seed(seed)
    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=g)
    x, y = x[order].float().view(-1, 8, 8) / 16, y[order].long()
    style = torch.randint(STYLES, (len(x),), generator=g)
    x = drawn(x, style, g).rot90(1, (1, 2)).flatten(1)
    labels = torch.stack([y, style], 1)
    return {
        n: (x[s], labels[s])
        for n, s in (("fit", slice(1000)), ("tune", slice(1000, 1300)), ("test", slice(1300, None)))
    }


def forward(x: Tensor, base: list[Tensor], adapter: Sequence[Tensor] = ()) -> Tensor:
    """Many nets side by side: weights and biases by turns, and an adapter's A and B by turns; alpha / r is 2 as in PEFT."""
    h = x
    for i in range(0, len(base), 2):
        out = torch.baddbmm(base[i + 1], h, base[i].mT)
        if adapter:
            out = out + 2 * h @ adapter[i].mT @ adapter[i + 1].mT
        h = out.relu() if i + 2 < len(base) else out
    return h


def learn(params: list[Tensor], numbers: Sequence[int], rate: float, loss: Callable[[Tensor], Tensor]) -> None:
    """Adam with a cosine on nets side by side; `loss` takes the row numbers of a batch for each."""
    rows = torch.stack(
        [torch.randint(1000, (STEPS, BATCH), generator=torch.Generator().manual_seed(n)) for n in numbers], 1
    )
    optimizer = torch.optim.Adam([p.requires_grad_() for p in params], lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(rows[step]).backward()
        optimizer.step()
        decay.step()
    for p in params:
        p.requires_grad_(False)


@cache
def trained(numbers: tuple[int, ...]) -> list[Any]:
    """For each number a net that tells class and style of upright images, with an adapter for each on turned ones."""
    sizes = [64] + [WIDTH] * (DEPTH - 1) + [CLASSES + STYLES]
    models = [with_adapters(mlp(n, sizes), ["class", "style"], rank=RANK, seed=n, blank=True) for n in numbers]
    layers = [lora_layers(m) for m in models]
    base = [
        torch.stack([p.detach().clone().view(-1, p.shape[-1]) for p in same])
        for at in range(DEPTH)
        for same in zip(*((each[at].base_layer.weight, each[at].base_layer.bias) for each in layers))
    ]
    x = torch.stack([material(n)["fit"][0] for n in numbers])
    labels = torch.stack([material(n)["fit"][1] for n in numbers])
    net = torch.arange(len(numbers))[:, None]
    upright = x.unflatten(2, (8, 8)).rot90(-1, (2, 3)).flatten(2)

    def both(rows: Tensor) -> Tensor:
        z, y = logits(forward(upright[net, rows], base)), labels[net, rows]
        return cross_entropy(z[0], y[..., 0]) + cross_entropy(z[1], y[..., 1])

    learn(base, numbers, RATE, both)
    adapters = {}
    for which, name in enumerate(("class", "style")):
        pairs = [
            torch.stack([each[at].get_submodule(f"{part}.{name}").weight.detach().clone() for each in layers])
            for at in range(DEPTH)
            for part in ("lora_A", "lora_B")
        ]

        def own(rows: Tensor, which: int = which, pairs: list[Tensor] = pairs) -> Tensor:
            return cross_entropy(logits(forward(x[net, rows], base, pairs))[which], labels[net, rows, which])

        learn(pairs, numbers, ADAPTER_RATE, own)
        adapters[name] = pairs
    with torch.no_grad():
        for i, each in enumerate(layers):
            for at, layer in enumerate(each):
                layer.base_layer.weight.copy_(base[2 * at][i])
                layer.base_layer.bias.copy_(base[2 * at + 1][i, 0])
                for name, pairs in adapters.items():
                    layer.lora_A[name].weight.copy_(pairs[2 * at][i])
                    layer.lora_B[name].weight.copy_(pairs[2 * at + 1][i])
    return [m.eval() for m in models]


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Mean over rows, sum over nets."""
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) * len(z)


def logits(out: Tensor) -> tuple[Tensor, Tensor]:
    return out[..., :CLASSES], out[..., CLASSES:]


@torch.no_grad()
def told(model: nn.Module, seed: int, part: str, passes: int = 1) -> list[float]:
    """Share of images whose class, whose style, and of which both are told, by the mean logits of some passes."""
    x, labels = material(seed)[part]
    out = sum((model(x) for _ in range(passes)), torch.zeros(()))
    right = torch.stack([z.argmax(1) for z in logits(out)], 1) == labels
    return [*right.double().mean(0).tolist(), float(right.all(1).double().mean())]


@cache
def told_by(
    merge: Merge, seed: int, passes: int = 1, names: tuple[str, ...] = NAMES
) -> tuple[list[float], list[float]]:
    """(class, style, both) on test images, mean of a seed's nets, and the weights chosen on others.

    Weights go in steps of the square root of 2 from 0.5 to 2, and on where the best lies at an end; one adapter has 1."""
    numbers = tuple(range(NETS * seed, NETS * (seed + 1)))
    total, chosen = torch.zeros(3), []
    for model, number in zip(trained(numbers), numbers):
        scores: dict[int, tuple[float, list[float]]] = {}
        low, high = (-2, 2) if len(names) > 1 else (0, 0)
        while True:
            for half in set(range(low, high + 1)) - scores.keys():
                weights, g = [2 ** (half / 2)] * len(names), torch.Generator().manual_seed(number)
                with merge(model, names, weights, drop=DROP, generator=g):
                    tuned = told(model, number, "tune", passes)[2]
                    scores[half] = (tuned, told(model, number, "test", passes))
            best = max(sorted(scores), key=lambda half: scores[half][0])
            if low < best < high or low == high or high - low > 12:
                break
            low, high = low - (best == low), high + (best == high)
        total += torch.tensor(scores[best][1]) / NETS
        chosen.append(2 ** (best / 2))
    return total.tolist(), chosen


@claim(
    "Orthogonality brings no better composition than plain addition or dropout with independent masks",
    source="abstract (there SDXL, objects and styles). That outputs must be orthogonal is ours: what does nothing gains nothing",
    criterion="adapters of rank 8 for class and style of 8x8 digits turned by a quarter, on a net of 4 layers that tells both "
    "upright; weight tuned on 300 images for each way to merge (0.5 to 2, and on where the best lies at an end), seeds of 4 nets, "
    "added to each condition until it is decided, at most 18: for the share of test images of which class and style are both told, "
    "by one pass or by the mean logits of 16, the interval of orthogonal dropout (rate 0.5) minus the plain sum ends below +0.02, "
    "as does that minus independent dropout; and in these nets every inner product of the two adapters' outputs is 0",
    budget="full",
    method=orthogonal_dropout_merge,
    sham=INDEPENDENT,
)
def no_better_composition(lab: Lab, method: Merge) -> Finding:
    largest = []
    for model, number in zip(trained(tuple(range(NETS))), range(NETS)):
        with method(model, NAMES, drop=DROP, generator=lab.generator(number)):
            largest += largest_products(model, NAMES, material(number)["test"][0])
    parts, gaps = {"the adapters' outputs are orthogonal": met(max(largest) == 0)}, {}
    for passes, of in ((1, "one pass"), (PASSES, "mean of 16 passes")):
        for other, name, n in (
            (plain_sum, "the plain sum", 1),
            (independent_dropout, "independent masks", passes),
        ):

            def gain(seed: int, passes: int = passes, other: Merge = other, n: int = n) -> float:
                return told_by(method, seed, passes)[0][2] - told_by(other, seed, n)[0][2]

            where = f"{of}, no gain over {name}"
            parts[where], gaps[where], _ = lab.until_decided(gain, most=MOST, below=MARGIN)
    ways: dict[str, tuple[Merge, int, tuple[str, ...]]] = {
        "plain sum": (plain_sum, 1, NAMES),
        "independent dropout": (independent_dropout, 1, NAMES),
        "orthogonal dropout": (method, 1, NAMES),
        "independent dropout, mean": (independent_dropout, PASSES, NAMES),
        "orthogonal dropout, mean": (method, PASSES, NAMES),
        "orthogonal, masks fixed": (masks_fixed, 1, NAMES),
        "class alone": (plain_sum, 1, ("class",)),
        "style alone": (plain_sum, 1, ("style",)),
    }
    found = {k: [told_by(merge, s, n, names) for s in lab.seeds] for k, (merge, n, names) in ways.items()}
    apart = gaps["one pass, no gain over independent masks"]
    note = ""
    if apart.above:
        note = (
            f"over independent masks disjoint ones gain {100 * apart.mean:.1f} points in one pass: they add less noise where adapters "
            "agree, for a unit is off its mean by o1 - o2, with independent masks by o1 and o2 added with random signs"
        )
    return conclude(
        parts,
        gaps=gaps,
        largest_cosine=max(largest),
        class_style_and_both_told={k: torch.tensor([f[0] for f in v]).mean(0) for k, v in found.items()},
        both_told={k: [f[0][2] for f in v] for k, v in found.items()},
        weights_chosen={
            k: [min(w for f in v for w in f[1]), max(w for f in v for w in f[1])] for k, v in found.items()
        },
        note=note,
    )

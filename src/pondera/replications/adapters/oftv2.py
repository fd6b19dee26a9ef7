"""OFTv2 (arXiv 2506.19847): what turning inputs instead of weights saves, and what the truncated series costs."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pondera.adapters.oft import BlockRotation, OftConfig
from pondera.linalg.cayley import cayley, skew
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, not_testable, weigh
from pondera.replications.adapters._adapting import LAYERS, Way

BLOCK, TERMS = 32, 5
Turned = Callable[[nn.Linear, BlockRotation, Tensor], Tensor]

# -- cost -------------------------------------------------------------------------------------------------------------


def inputs(layer: nn.Linear, core: BlockRotation, x: Tensor) -> Tensor:
    """OFTv2: the inputs are turned, block by block."""
    return layer(core(x))  # type: ignore[no-any-return]


def built_weight(layer: nn.Linear, core: BlockRotation, x: Tensor) -> Tensor:
    """OFT as it was: the rotation is built as one matrix and multiplied with the weight."""
    rotation = torch.block_diag(*cayley(skew(core.q, BLOCK), TERMS))
    return F.linear(x, layer.weight @ rotation.T, layer.bias)


def weight_by_blocks(layer: nn.Linear, core: BlockRotation, x: Tensor) -> Tensor:
    """The weight is turned block by block; no large rotation is built."""
    return F.linear(x, core.merged(layer.weight), layer.bias)


def unturned(layer: nn.Linear, core: BlockRotation, x: Tensor) -> Tensor:
    """The frozen layer alone."""
    return layer(x)  # type: ignore[no-any-return]


def step(width: int, tokens: int, turned: Turned, device: str = "cpu") -> Callable[[], None]:
    """Forward and backward through one frozen linear layer under block rotations."""
    layer = nn.Linear(width, width, device=device).requires_grad_(False)
    core = BlockRotation(layer.weight, OftConfig(block_size=BLOCK, terms=TERMS)).to(device)
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    back = torch.randn(tokens, width, device=device)

    def run() -> None:
        turned(layer, core, x).backward(back)
        x.grad = core.q.grad = None

    return run


def seconds(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Processor time on one thread, the runs in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for _ in range(repeats + 1):  # the first warms up
            for name, run in runs.items():
                began = time.process_time()
                run()
                times[name].append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return {name: t[1:] for name, t in times.items()}


def peak_bytes(run: Callable[[], None]) -> int:
    """Most memory held at once by tensors made in `run`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def operations(width: int, turned: Turned, tokens: int = 64) -> int:
    run = step(width, tokens, turned, device="meta")
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@claim(
    "Turning inputs is ten times faster than turning weights and takes a third of the memory",
    source="abstract: up to 10x faster, 3x lower memory (there: whole models on a GPU)",
    criterion="one linear layer of width 2048, 64 tokens, blocks of 32, 5 terms, forward and backward in float32 on one CPU "
    "thread, seven rounds in turn: processor time with W R built over that with turned inputs has its 95% interval above 10, "
    "and peak memory is at least 3 times smaller",
    budget="full",
    method=inputs,
    sham=Sham("the weight turned block by block, so that no large rotation is built", weight_by_blocks),
)
def faster_and_smaller(lab: Lab, turned: Turned) -> Finding:
    found: dict[str, dict[str, float]] = {"time_ratio": {}, "memory_ratio": {}, "milliseconds": {}}
    ratios: list[float] = []
    by_blocks: dict[str, dict[str, float]] = {"time_ratio": {}, "memory_ratio": {}}
    for tokens, repeats in ((64, 7), (2048, 2)):
        ways = {"built": built_weight, "by blocks": weight_by_blocks, "method": turned}
        runs = {name: step(2048, tokens, way) for name, way in ways.items()}
        took, held = seconds(runs, repeats), {name: peak_bytes(run) for name, run in runs.items()}
        mean = {name: sum(t) / len(t) for name, t in took.items()}
        ratios = ratios or [a / b for a, b in zip(took["built"], took["method"])]
        for into, than in ((found, "built"), (by_blocks, "by blocks")):
            into["time_ratio"][f"{tokens} tokens"] = mean[than] / mean["method"]
            into["memory_ratio"][f"{tokens} tokens"] = held[than] / held["method"]
        found["milliseconds"][f"{tokens} tokens"] = 1000 * mean["method"]
    time_ratio, less = lab.effect(ratios), found["memory_ratio"]["64 tokens"]
    return conclude(
        {
            "ten times faster": weigh(time_ratio, above=10),
            "a third of the memory": met(less >= 3, f"{less:.1f} times smaller"),
        },
        ratio_of_times=time_ratio,
        **found,
        against_a_weight_turned_by_blocks=by_blocks,
        note="the gain is in the tokens: with 2048 of them, as many as inputs, both do the same large product, and the ratios are "
        f"{found['time_ratio']['2048 tokens']:.1f} in time and {found['memory_ratio']['2048 tokens']:.1f} in memory",
    )


@claim(
    "The cost grows with the square of the width, not with its cube",
    source="abstract: quadratic instead of cubic; the last part is ours, for a weight turned by blocks costs the square as well",
    criterion="operations counted forward and backward, 64 tokens, widths 256 to 2048, exponent fitted over the four: at most "
    "2.1 for the method, at least 2.7 for weights turned by a rotation that is built; at most 1.1 for what the method adds to the "
    "frozen layer",
    method=inputs,
    sham=Sham("the weight turned block by block, so that no large rotation is built", weight_by_blocks),
)
def quadratic_not_cubic(lab: Lab, turned: Turned) -> Finding:
    widths = (256, 512, 1024, 2048)
    ways = {"method": turned, "built": built_weight, "layer": unturned}
    counts = {name: [operations(width, way) for width in widths] for name, way in ways.items()}
    counts["added"] = [a - b for a, b in zip(counts["method"], counts["layer"])]
    log = torch.tensor(widths, dtype=torch.float64).log2()
    slope = {}
    for name, list_of in counts.items():
        y = torch.tensor(list_of, dtype=torch.float64).log2()
        slope[name] = float(((log - log.mean()) * (y - y.mean())).sum() / (log - log.mean()).square().sum())
    return conclude(
        {
            "quadratic": slope["method"] <= 2.1,
            "cubic where the rotation is built": slope["built"] >= 2.7,
            "linear beside the layer": slope["added"] <= 1.1,
        },
        exponent=slope,
        last_step={k: float(torch.tensor(b / a).log2()) for k, v in counts.items() for a, b in [list(pairwise(v))[-1]]},
        operations=counts,
    )


# -- the series -------------------------------------------------------------------------------------------------------


def two_terms(q: Tensor, terms: int | None = None) -> Tensor:
    """I + 2Q, however many are asked for."""
    return torch.eye(len(q), dtype=q.dtype) + 2 * q


@claim(
    "More terms of the series are nearer to a rotation",
    source="the Cayley-Neumann parametrization; that more is better is how a truncated series is read",
    criterion="random skew matrices of order 32 and spectral norm 0.1, 0.2, 0.4, 0.6, one a seed: |R^T R - I| falls with "
    "every term from 2 to 8 in each case",
    method=cayley,
    sham=Sham("I + 2Q at any number of terms", two_terms),
)
def more_terms_are_nearer(lab: Lab, transform: Callable[..., Tensor]) -> Finding:
    norms = (0.1, 0.2, 0.4, 0.6)
    error = torch.zeros(len(lab.seeds), len(norms), 7, dtype=torch.float64)
    eye = torch.eye(32, dtype=torch.float64)
    for s in lab.seeds:
        q = skew(torch.randn(496, generator=lab.generator(s), dtype=torch.float64), 32)
        for i, norm in enumerate(norms):
            for k in range(2, 9):
                r = transform(q * (norm / torch.linalg.matrix_norm(q, 2)), k)
                error[s, i, k - 2] = torch.linalg.matrix_norm(r.T @ r - eye, 2)
    mean = error.mean(0)
    four, five, six = mean[2, 2:5].tolist()
    return conclude(
        bool((error.diff() < 0).all()),
        error={f"norm {norm}": dict(zip(range(2, 9), mean[i].tolist(), strict=True)) for i, norm in enumerate(norms)},
        falls_with_every_second_term=bool((error[..., 2:] < error[..., :-2]).all()),
        note="the k-term polynomial is R (I - Q^(k-1)), off by 2 q^(k-1) for odd k and only q^(2k-2) for even k: at norm 0.4 four "
        f"terms are off by {four:.2g}, the usual five by {five:.2g}, six by {six:.2g}",
    )


def solved() -> OftConfig:
    return OftConfig(block_size=16, terms=0, target_modules=LAYERS)


def five_terms() -> OftConfig:
    return OftConfig(block_size=16, terms=5, target_modules=LAYERS)


def peft_five(terms: int = 5) -> Any:
    from peft import OFTConfig

    return OFTConfig(oft_block_size=16, num_cayley_neumann_terms=terms, target_modules=LAYERS)


def peft_two() -> Any:
    return peft_five(2)


EXACT, FIVE, TWO = (Way(config, by="held_out") for config in (solved, peft_five, peft_two))
NET = "a net that reads digits adapted to turned and inverted ones, blocks of 16, 150 steps of AdamW"


@torch.no_grad()
def rotations(net: Any, name: str) -> Tensor:
    """The blocks of one layer, of our adapter or of PEFT's."""
    layer = getattr(net.base_model.model, name)
    if hasattr(layer, "pondera_oft_core"):
        return layer.pondera_oft_core["default"].blocks().double()  # type: ignore[no-any-return]
    core = layer.oft_R["default"]
    terms = core.num_cayley_neumann_terms
    return core._cayley_batch(core.weight.double(), core.block_size, core.use_cayley_neumann, terms)  # type: ignore[no-any-return]


def off(way: Way, rate: float, seed: int) -> dict[str, dict[str, float]]:
    """Of every layer after adaptation, the largest |R^T R - I| and |R - I| of a block."""
    net = way.model(rate, seed)[0]
    eye = torch.eye(16, dtype=torch.float64)
    found: dict[str, dict[str, float]] = {"error": {}, "turned": {}}
    for name in LAYERS:
        r = rotations(net, name)
        found["error"][name] = float(torch.linalg.matrix_norm(r.mT @ r - eye, 2).max())
        found["turned"][name] = float(torch.linalg.matrix_norm(r - eye, 2).max())
    return found


@claim(
    "The truncated series costs no quality, and R stays a rotation in training",
    source="abstract: without compromising performance; the name of the method: orthogonal finetuning",
    criterion=f"{NET}, each choice at its own best rate by the loss on held-out images: the 95% interval of the test accuracy of "
    "PEFT's default of 5 terms minus that of the exact transform lies within 0.02 of 0 on both sides (five seeds and more until "
    "decided, at most 18), and |R^T R - I| is at most 1e-3 in every layer after adaptation, in each of 5 seeds",
    budget="full",
    method=FIVE,
    sham=Sham("two terms, I + 2Q, which is no rotation", TWO),
)
def series_costs_no_quality(lab: Lab, way: Way) -> Finding:
    def minus(seed: int) -> float:
        return way.end(seed).accuracy - EXACT.end(seed).accuracy

    level, gap, _ = lab.until_decided(minus, within=0.02, most=18)
    seeds = range(lab.n_seeds)
    error = {name: [off(way, way.rate, seed)["error"][name] for seed in seeds] for name in LAYERS}
    most = max(max(e) for e in error.values())
    ways = {"method": way, "exact": EXACT, "two terms": TWO, "full": Way(None, by="held_out")}
    return conclude(
        {"level with the exact transform": level, "R stays a rotation": met(most <= 1e-3, f"off by up to {most:.2g}")},
        minus_exact=gap,
        error=error,
        accuracy_at_five_seeds={n: sum(w.ends(seeds, "accuracy")) / len(seeds) for n, w in ways.items()},
        training_loss_at_five_seeds={n: sum(w.ends(seeds, "loss")) / len(seeds) for n, w in ways.items()},
        rates={n: w.rate for n, w in ways.items()},
        trained={n: w.end(0).trained for n, w in ways.items()},
        note="nothing holds |Q| below 1, and beyond it the series diverges; the exact transform, or PEFT's coft, which bounds Q, stays "
        "a rotation",
    )


@claim(
    "Solved exactly, R stays a rotation in training",
    source="ours: the default of the object here, beside PEFT's",
    criterion=f"{NET}, rate 0.03, our object as it comes: |R^T R - I| at most 1e-3 in every layer after adaptation, and |R - I| above "
    "0.5, in each of 5 seeds",
    method=Way(solved),
    sham=Sham("the series of five terms", Way(five_terms)),
)
def solved_it_stays_a_rotation(lab: Lab, way: Way) -> Finding:
    found = [off(way, 10**-1.5, seed) for seed in lab.seeds]
    error = {name: [f["error"][name] for f in found] for name in LAYERS}
    turned = {name: [f["turned"][name] for f in found] for name in LAYERS}
    return conclude(
        {
            "a rotation": max(max(e) for e in error.values()) <= 1e-3,
            "it has turned": min(min(t) for t in turned.values()) > 0.5,
        },
        error=error,
        turned=turned,
    )


@claim(
    "On quantised models it is more stable than QLoRA at less memory",
    source="abstract",
    criterion="finetuning of a language model with a 4-bit base: loss curves of several rates and peak GPU memory beside QLoRA",
)
def quantised(lab: Lab) -> Finding:
    return not_testable("needs 4-bit kernels on a GPU and a language model of billions of weights")

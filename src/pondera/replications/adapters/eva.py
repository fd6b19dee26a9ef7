"""EVA (arXiv 2410.07170): what PEFT's object does, on the ground all adapters share."""

from typing import Any

import torch
from torch import nn

from pondera.replications import Finding, Lab, claim, judge
from pondera.replications.adapters._adapting import BATCH, LAYERS, adapted, digits, draw_losses, pretrained

RANK, RHO = 8, 2.0


def lora(start: bool | str = True, rho: float = RHO) -> Any:
    from peft import EvaConfig, LoraConfig

    eva = {"eva_config": EvaConfig(rho=rho)} if start == "eva" else {}
    return LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=start, target_modules=LAYERS, **eva)


def start_eva(model: nn.Module) -> None:
    """EVA's start from batches of the new task, drawn by torch's own generator."""
    from peft import initialize_lora_eva_weights

    x = digits()[1][0]
    initialize_lora_eva_weights(
        model,
        x[torch.randperm(len(x))].split(4 * BATCH),
        forward_fn=lambda net, batch: net(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank by layer; 0 where EVA took the adapter off."""
    found = {name: getattr(model.base_model.model.get_submodule(name), "r", {}) for name in LAYERS}
    return {name: r.get("default", 0) for name, r in found.items()}


def explained(inputs: dict[str, torch.Tensor], by_layer: dict[str, int]) -> float:
    """Sum over layers of the share of the centred input's variance in that many principal directions."""
    total = 0.0
    for name, r in by_layer.items():
        s = torch.linalg.svdvals(inputs[name] - inputs[name].mean(0)).square()
        total += float(s[:r].sum() / s.sum())
    return total


@claim(
    "Ranks are redistributed unevenly, within the budget, and explain more variance than even ones",
    source="abstract (re-distributes ranks to explain the maximal amount of variance)",
    criterion="the digits net, rank 8 a layer on average and rho 2, 5 draws of batches: ranks sum to at most 24, none is above 16, "
    "the largest is at least twice the smallest, and the layers' explained shares of variance (full SVD of 2,000 inputs) sum "
    "to more than with rank 8 each",
)
def ranks_are_redistributed(lab: Lab) -> Finding:
    import peft

    net, inputs, hooks = pretrained(), {}, []
    for name in LAYERS:
        layer = net.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]})))
    with torch.no_grad():
        net(digits()[1][0])
    for hook in hooks:
        hook.remove()
    even = explained(inputs, dict.fromkeys(LAYERS, RANK))
    found, shares = [], []
    for seed in lab.seeds:
        torch.manual_seed(seed)
        model = peft.get_peft_model(pretrained(), lora("eva"))
        start_eva(model)
        found.append(ranks(model))
        shares.append(explained(inputs, found[-1]))
    fits = all(sum(r.values()) <= RANK * len(LAYERS) and max(r.values()) <= RANK * RHO for r in found)
    uneven = all(max(r.values()) >= 2 * min(r.values()) for r in found)
    return judge(fits and uneven and min(shares) > even, ranks=found, explained=shares, explained_by_even_ranks=even)


@claim(
    "Lower loss than LoRA at equal steps",
    source="abstract (faster convergence)",
    criterion="net of 784-256-256-10 adapted to turned, inverted digits for 150 steps, rank 8 a layer (EVA: on average, rho 2) and "
    "alpha 8, rates tuned alike, 5 seeds: the 95% interval of EVA's final training loss minus LoRA's lies below 0",
    budget="full",
)
def lower_loss_than_lora(lab: Lab) -> Finding:
    choices = {"eva": lambda: lora("eva"), "eva, rho 1": lambda: lora("eva", 1.0), "lora": lora}
    found = adapted(choices, seeds=lab.seeds, prepare={"eva": start_eva, "eva, rho 1": start_eva})
    gap = lab.effect(found["eva"].loss, found["lora"].loss)
    draw_losses(lab, found)
    early = {name: f.curves[:, 20:30].mean(1).tolist() for name, f in found.items()}
    return judge(
        gap.below,
        loss_eva_minus_lora=gap,
        loss_without_redistribution_minus_lora=lab.effect(found["eva, rho 1"].loss, found["lora"].loss),
        test_loss_eva_minus_lora=lab.effect(found["eva"].test_loss, found["lora"].test_loss),
        early_loss_eva_minus_lora=lab.effect(early["eva"], early["lora"]),
        loss={name: f.loss for name, f in found.items()},
        accuracy={name: f.accuracy for name, f in found.items()},
        rates={name: f.rate for name, f in found.items()},
        trained={name: f.trainable for name, f in found.items()},
    )

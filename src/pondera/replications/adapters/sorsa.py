"""SORSA (arXiv 2409.00055): does training the principal triplets, held orthonormal, learn faster and alter the SVD less?"""

from functools import cache

import torch
from torch import Tensor, nn

from pondera.adapters.sorsa import SorsaConfig, orthonormality
from pondera.replications import Finding, Lab, claim, judge
from pondera.replications.adapters._adapting import LAYERS, Adapted, adapt, adapted, draw_losses, pretrained

R = 8
FACTOR = 0.2  # the pull on one factor, as in the authors' run: 13.3 over 448 of them there, 0.2 over 6 here
AUTHORS_FACTOR = 4e-4 / 3e-5


def sorsa() -> SorsaConfig:
    return SorsaConfig(r=R, target_modules=LAYERS)


def lora(start: bool | str = True) -> object:
    from peft import LoraConfig

    return LoraConfig(r=R, lora_alpha=R, init_lora_weights=start, target_modules=LAYERS)


def pull(model: nn.Module) -> Tensor:
    return FACTOR * orthonormality(model)


def full_pull(model: nn.Module) -> Tensor:
    return AUTHORS_FACTOR * orthonormality(model)


@claim(
    "The regulariser holds the singular vectors orthonormal, so that their scale goes into the singular values",
    source="abstract",
    criterion="shared net, r 8, 150 steps of AdamW at 1e-3, 5 seeds: the penalty at the end is with it (factor 0.2) below a "
    "tenth of what it is without, in each",
)
def vectors_stay_orthonormal(lab: Lab) -> Finding:
    penalty: dict[str, list[float]] = {"with": [], "without": []}
    lengths: dict[str, list[float]] = {"with": [], "without": []}
    moved: dict[str, list[float]] = {"with": [], "without": []}
    for seed in lab.seeds:
        for arm in penalty:
            net, _ = adapt(sorsa, rate=1e-3, seed=seed, penalty=pull if arm == "with" else None)
            penalty[arm].append(orthonormality(net).item())
            core = net.base_model.model.second.cores["default"]
            lengths[arm].append((core.U.norm(dim=0) * core.Vt.norm(dim=1) - 1).abs().max().item())
            moved[arm].append(((core.S - core.S0).norm() / core.S0.norm()).item())
    return judge(
        all(a < 0.1 * b for a, b in zip(penalty["with"], penalty["without"], strict=True)),
        note="it falls to a quarter: columns keep their length to 7%, where they else are off by half, and a third more goes into "
        "the singular values. The rest is the balance of two pulls in one gradient that AdamW rescales, reached by step 20. "
        "With the authors' factor for their whole model (13.3) the penalty of seed 0 ended at 0.006, and the loss at 1.03 "
        "in place of 0.55",
        penalty=penalty,
        lengths_off_one_in_the_middle_layer=lengths,
        singular_values_moved_there=moved,
    )


CHOICES = {
    "full": None,
    "lora": lora,
    "pissa": lambda: lora("pissa"),
    "sorsa": sorsa,
    "sorsa, no penalty": sorsa,
    "sorsa, authors' factor": sorsa,
}
PENALTY = {"sorsa": pull, "sorsa, authors' factor": full_pull}
SETTING = (
    "784-256-256-10 net moved from upright to turned and inverted MNIST digits, r 8, 150 steps of AdamW, each choice at the "
    "best rate of one grid, 5 seeds: "
)


@cache
def runs(n_seeds: int) -> dict[str, Adapted]:
    return adapted(CHOICES, seeds=range(n_seeds), penalty=PENALTY)


@claim(
    "Lower loss at equal steps than LoRA and PiSSA",
    source="abstract (faster convergence than PiSSA and LoRA); the catalogue",
    criterion=SETTING
    + "training loss over all images after the last step: SORSA (factor 0.2) minus LoRA and minus PiSSA have "
    "95% intervals below 0",
    budget="full",
)
def lower_loss(lab: Lab) -> Finding:
    found = runs(lab.n_seeds)
    gaps = {
        name: lab.effect(found["sorsa"].loss, found[name].loss)
        for name in ("lora", "pissa", "sorsa, no penalty", "sorsa, authors' factor")
    }
    early = {
        name: lab.effect(found["sorsa"].curves.mean(1).tolist(), found[name].curves.mean(1).tolist())
        for name in ("lora", "pissa")
    }
    draw_losses(lab, found, "loss", span=10)
    return judge(
        gaps["lora"].below and gaps["pissa"].below,
        note="well below LoRA, but level with PiSSA at the end and over the steps, and with itself without the penalty: the start "
        "at the principal triplets makes both fast",
        sorsa_minus=gaps,
        sorsa_minus_in_mean_loss_over_the_steps=early,
        training_loss={name: one.loss for name, one in found.items()},
        accuracy={name: one.accuracy for name, one in found.items()},
        rate={name: one.rate for name, one in found.items()},
        parameters={name: one.trainable for name, one in found.items()},
    )


@claim(
    "It alters the singular vectors of the weights less than LoRA, PiSSA and full fine-tuning",
    source="abstract (minimizing the alteration in the SVD aspect); the measure is ours",
    criterion=SETTING
    + "1 - mean |<u_i, u_i'> <v_i, v_i'>| over the first 8 singular pairs of the three weights, before and "
    "after (merged): SORSA (factor 0.2) minus each of the three has a 95% interval below 0",
    budget="full",
)
def alters_the_svd_less(lab: Lab) -> Finding:
    turned: dict[str, list[float]] = {}
    values: dict[str, list[float]] = {}
    for name in ("full", "lora", "pissa", "sorsa", "sorsa, no penalty"):
        rate = runs(lab.n_seeds)[name].rate
        nets = [adapt(CHOICES[name], rate=rate, seed=s, penalty=PENALTY.get(name))[0] for s in lab.seeds]
        found = [alteration(net if name == "full" else net.merge_and_unload()) for net in nets]
        turned[name], values[name] = [f[0] for f in found], [f[1] for f in found]
    gaps = {name: lab.effect(turned["sorsa"], turned[name]) for name in turned if name != "sorsa"}
    return judge(
        all(gaps[name].below for name in ("full", "lora", "pissa")),
        note="by the penalty alone: without it the vectors turn as far as PiSSA's. Pairs are compared by their place in the "
        "order, so a swap of two neighbours counts as a full turn",
        sorsa_minus=gaps,
        vectors_turned=turned,
        singular_values_moved=values,
    )


@torch.no_grad()
def alteration(net: nn.Module) -> tuple[float, float]:
    """(turn of the first R singular pairs, relative change of their values), means over the layers."""
    turns, moves = [], []
    for name in LAYERS:
        (U, s, Vt), (U1, s1, Vt1) = (
            torch.linalg.svd(one.get_submodule(name).weight, full_matrices=False) for one in (pretrained(), net)
        )
        same = ((U[:, :R] * U1[:, :R]).sum(0) * (Vt[:R] * Vt1[:R]).sum(1)).abs()
        turns.append(1 - same.mean().item())
        moves.append(((s1[:R] - s[:R]).abs() / s[:R]).mean().item())
    return sum(turns) / len(turns), sum(moves) / len(moves)

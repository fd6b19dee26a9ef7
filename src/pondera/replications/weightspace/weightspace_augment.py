"""Augmentations of weight space (arXiv 2311.08851): which keep the function, and what they do for a classifier of networks."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.weightspace._inrs import shallow_inrs
from pondera.weightspace import (
    DWSNet,
    Standardize,
    add_noise,
    flip_signs,
    match_states,
    mlp_spec,
    permute_states,
    run_states,
    scale_units,
    shift_phases,
    siren,
    start_states,
    weight_mixup,
)

States = dict[str, Tensor]
Move = Callable[[States, Generator], States]
Aligner = Callable[[States, States], States]


def permuted(states: States, g: Generator) -> States:
    return permute_states(mlp_spec({n: x[0] for n, x in states.items()}), states, g)


def phases(states: States, g: Generator) -> States:
    return shift_phases(states, g, w0=30.0)


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


EXACT: dict[str, tuple[Move, Callable[[], nn.Sequential]]] = {
    "permutation, SIREN": (permuted, lambda: siren(9, 2)),
    "permutation, ReLU": (permuted, relu_net),
    "sign, SIREN": (flip_signs, lambda: siren(9, 2)),
    "phase, SIREN": (phases, lambda: siren(9, 2)),
    "scale, ReLU": (scale_units, relu_net),
}


def as_given(move: Move) -> Move:
    return move


def one_sided(move: Move) -> Move:
    """The move without what it does to the last weight."""

    def half(states: States, g: Generator) -> States:
        last = [n for n, x in states.items() if x.ndim == 3][-1]
        return {**move(states, g), last: states[last]}

    return half


@claim(
    "Permutations, sign flips and phase shifts of a SIREN, permutations and scales of a ReLU net keep the function",
    source="the paper's review of augmentations by symmetry",
    criterion="8 nets each (SIREN 2-9-9-1, ReLU 2-9-7-3) in float64, 50 inputs: outputs after one draw of each move the same to 1e-9 "
    "of their largest, and weights changed, in each of 5 draws",
    method=as_given,
    sham=Sham("the same moves without what they do to the last weight", one_sided),
)
def keep_the_function(lab: Lab, change: Callable[[Move], Move]) -> Finding:
    parts, worst = {}, {}
    for name, (move, build) in EXACT.items():
        errors, moved = [], True
        for seed in lab.seeds:
            g = lab.generator(seed)
            model = build()
            states = {n: x.double() for n, x in start_states(build, 8, g).items()}
            x = torch.rand(50, 2, generator=g, dtype=torch.float64) * 2 - 1
            after = change(move)(states, g)
            before, then = run_states(model, states, x), run_states(model, after, x)
            errors.append(float((before - then).abs().max() / before.abs().max()))
            moved &= any(not torch.equal(after[n], states[n]) for n in states)
        worst[name] = max(errors)
        parts[name] = met(worst[name] <= 1e-9 and moved, f"{worst[name]:.1g}")
    return conclude(parts, largest_change=worst)


# -- a classifier of few networks ---------------------------------------------------------------------------------------

TRAIN, STEPS, RATE, BATCH = 300, 250, 0.03, 64
Batch = tuple[States, Tensor | None, Tensor | None]  # states, and where they are mixed alpha and partner


def unchanged(states: States, g: Generator) -> States:
    return states


def as_they_are(partners: States, states: States) -> States:
    return partners


def with_signs(partners: States, states: States) -> States:
    return match_states(partners, states, signed=True)


@cache
def accuracy(move: Move | None, align: Aligner | str | None, seed: int) -> float:
    """Of a DWSNet on test networks, trained with a move on every batch, or with MixUp."""
    states, labels = shallow_inrs()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    (x, y), (test, wanted) = (({n: v[i] for n, v in states.items()}, labels[i]) for i in (order[:TRAIN], order[TRAIN:]))
    scale = Standardize(x)
    torch.manual_seed(seed)
    model, g = DWSNet({n: v[0] for n, v in x.items()}, (16, 16), 4, pool="max"), torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        at = torch.randint(TRAIN, (BATCH,), generator=g)
        batch, label = {n: v[at] for n, v in x.items()}, y[at]
        if align is None:
            loss = F.cross_entropy(model(scale(move(batch, g) if move else batch)), label)
        else:
            mixed, alpha, partner = weight_mixup(batch, g, align=align)
            out = model(scale(mixed))
            one, other = (F.cross_entropy(out, some, reduction="none") for some in (label, label[partner]))
            loss = (alpha * one + (1 - alpha) * other).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    model.eval()
    with torch.no_grad():
        return float((model(scale(test)).argmax(1) == wanted).double().mean())


SETTING = (
    "700 digits 0 to 3 as SIRENs 2-16-1, each from its own start; DWSNet (two layers of 16, max) trained on 300, 250 AdamW steps of 64 "
    "at rate 0.03 (the best of 0.001 to 0.1 without augmentation, other seeds), accuracy on 400, 5 splits of one zoo: "
)


@claim(
    "With few networks to learn from, augmenting them makes a classifier better on new ones",
    source="abstract; experiments on INR classification (there MNIST and more, 2-32-32-1)",
    criterion=SETTING
    + "with sign flips drawn for every batch minus without: 95% interval above 0 (noise of 0.1 beside it, not central)",
    budget="full",
    method=flip_signs,
    sham=Sham("nothing changed", unchanged),
)
def augmenting_helps(lab: Lab, move: Move) -> Finding:
    plain = [accuracy(None, None, s) for s in lab.seeds]
    flipped = [accuracy(move, None, s) for s in lab.seeds]
    noisy = [accuracy(add_noise, None, s) for s in lab.seeds]
    gain, noise = lab.effect(flipped, plain), lab.effect(noisy, plain)
    return conclude(
        {"sign flips": weigh(gain, above=0), "noise": weigh(noise, above=0)},
        central=["sign flips"],
        signs_minus_none=gain,
        noise_minus_none=noise,
        accuracy={"none": plain, "signs": flipped, "noise": noisy},
    )


def mixed(lab: Lab, align: Aligner) -> tuple[dict[str, Any], dict[str, Any]]:
    none = [accuracy(None, None, s) for s in lab.seeds]
    ways: dict[str, Aligner | str] = {"aligned": align, "as they are": as_they_are, "in random order": "random"}
    found = {name: [accuracy(None, way, s) for s in lab.seeds] for name, way in ways.items()}
    effects = {"no mixing": lab.effect(found["aligned"], none)}
    effects |= {name: lab.effect(found["aligned"], found[name]) for name in list(ways)[1:]}
    return effects, {"none": none} | found


@claim(
    "MixUp of networks helps, and more so when hidden units are aligned first",
    source="abstract (the novel scheme); there aligned by permutations alone (Git Re-Basin)",
    criterion=SETTING
    + "MixUp aligned by match_states minus no mixing, minus MixUp without alignment, and minus MixUp in random order: "
    "three 95% intervals above 0",
    budget="full",
    method=match_states,
    sham=Sham("partners left as they are", as_they_are),
)
def aligned_mixup_is_best(lab: Lab, align: Aligner) -> Finding:
    effects, accuracies = mixed(lab, align)
    parts = {f"ahead of {name}": weigh(e, above=0) for name, e in effects.items()}
    note = ""
    if any(p.outcome != "holds" for p in parts.values()):
        gain = lab.effect([accuracy(None, with_signs, s) for s in lab.seeds], accuracies["aligned"])
        note = (
            f"a SIREN's units also have signs, which permutations cannot mend: aligned with them, accuracy is higher by "
            f"{gain.mean:.3f} [{gain.low:.3f}, {gain.high:.3f}]"
        )
    return conclude(parts, differences=effects, accuracy=accuracies, note=note)


@claim(
    "It does for SIRENs where signs are aligned as well",
    source="ours: the same scheme with the symmetry that sin adds (stated after a pilot on other seeds)",
    criterion=SETTING
    + "MixUp aligned by match_states(signed=True) minus no mixing, minus MixUp without alignment, and minus MixUp in "
    "random order: three 95% intervals above 0",
    budget="full",
    method=with_signs,
    sham=Sham("partners left as they are", as_they_are),
)
def aligned_with_signs(lab: Lab, align: Aligner) -> Finding:
    effects, accuracies = mixed(lab, align)
    return conclude(
        {f"ahead of {name}": weigh(e, above=0) for name, e in effects.items()}, differences=effects, accuracy=accuracies
    )

"""PSOFT (openreview FSHrinMArK): is the geometry of the principal subspace kept, and is it as good as OFT for less?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met
from pondera.replications.adapters._adapting import Way, pretrained

RANK, LAYERS = 64, ["first", "second"]  # the third layer of the net has ten outputs, fewer than the rank
RATE = 1e-2
NET = "a net that reads digits adapted to turned and inverted ones in its two wide layers, rank 64, 150 steps of AdamW"
SETTING = f"{NET}, each choice at its own best rate by the loss on held-out images, five seeds and more until decided, at most 12: "


def psoft(**switches: Any) -> Any:
    from peft import PsoftConfig

    return PsoftConfig(**{"r": RANK, "target_modules": LAYERS} | switches)


def strict(r: int = RANK) -> Any:
    """Rotations alone."""
    return psoft(r=r, psoft_mag_a=False, psoft_mag_b=False)


def strict_66() -> Any:
    """Rotations alone, of as many numbers as the scaling vectors come to."""
    return strict(66)


def free() -> Any:
    """Any matrix in the place of the rotation."""
    return psoft(psoft_orth=False)


def oft() -> Any:
    from peft import OFTConfig

    # 28 and not 32 in the first layer, as PEFT changes it: 32 does not divide its 784 inputs
    return OFTConfig(oft_block_size=32, use_cayley_neumann=False, target_modules=LAYERS)


def random_subspace(net: nn.Module, seed: int = 1) -> None:
    """The same rotations, within a subspace of the inputs drawn at random."""
    from peft.tuners.psoft.layer import PsoftLayer

    layers: list[Any] = [layer for layer in net.modules() if isinstance(layer, PsoftLayer)]
    for layer in layers:
        weight = layer.get_base_layer().weight.detach()
        a, _ = torch.linalg.qr(torch.randn(weight.shape[1], RANK, generator=Generator().manual_seed(seed)))
        b = weight @ a / layer.scaling["default"]
        layer._set_psoft_ab_cache_buffers("default", a.T.contiguous(), b.contiguous())


def other_random_subspace(net: nn.Module) -> None:
    random_subspace(net, seed=2)


PSOFT, STRICT, STRICT_66, FREE, OFT = (Way(config, by="held_out") for config in (psoft, strict, strict_66, free, oft))
ELSEWHERE = replace(PSOFT, prepare=random_subspace)
OTHERWISE = replace(PSOFT, prepare=other_random_subspace)


# -- geometry ---------------------------------------------------------------------------------------------------------


def geometry(lab: Lab, way: Way, rate: float = RATE) -> dict[str, list[float]]:
    """Relative change, in Frobenius norm, of the inner products of the weight vectors (rows), and of the weights themselves.

    Of the principal part, the first RANK singular triplets, and of the whole weight; the largest of both layers, one a seed.
    Also the smallest change of a weight, and how far the scaling vectors have gone from 1, where they are trained.
    """
    base = pretrained()
    found: dict[str, list[float]] = {"principal_gram": [], "whole_gram": [], "weight": [], "vectors": []}

    def change(after: Tensor, before: Tensor) -> float:
        return float((after - before).norm() / before.norm())

    for seed in lab.seeds:
        net: Any = way.model(rate, seed)[0]
        each: dict[str, list[float]] = {name: [] for name in found}
        for name in LAYERS:
            w = getattr(base, name).weight.detach().double()
            layer = getattr(net.base_model.model, name)
            with torch.no_grad():
                delta = layer.get_delta_weight("default").double()
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            part = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
            each["principal_gram"].append(change((part + delta) @ (part + delta).T, part @ part.T))
            each["whole_gram"].append(change((w + delta) @ (w + delta).T, w @ w.T))
            each["weight"].append(change(w + delta, w))
            core = layer.psoft_R["default"]
            vectors = [v.detach() for v in (core.vector_a, core.vector_b) if v is not None]
            each["vectors"].append(max((float((v - 1).abs().max()) for v in vectors), default=0.0))
        for key, values in each.items():
            found[key].append(min(values) if key == "weight" else max(values))
    return found


@claim(
    "With both scaling vectors off the geometry of the principal subspace is kept exactly",
    source="abstract: a theoretical condition that strictly maintains the geometry of this subspace",
    criterion=f"{NET}, 5 fresh seeds, rate 0.01: the inner products of the weight vectors change by less than 1e-5 (relative, "
    "Frobenius) in the principal part and in the whole weight, while the weight itself changes by more than 0.1, in each seed",
    method=STRICT,
    sham=Sham("with both vectors, as PEFT has it by default", PSOFT),
)
def geometry_is_kept(lab: Lab, way: Way) -> Finding:
    found = geometry(lab, way)
    return conclude(
        {
            "within the principal part": max(found["principal_gram"]) < 1e-5,
            "within the whole weight": max(found["whole_gram"]) < 1e-5,
            "the weight moves": min(found["weight"]) > 0.1,
        },
        **found,
    )


@claim(
    "The scaling vectors, on by default in PEFT, distort it only slightly",
    source="abstract: vectors that gradually relax orthogonality; PEFT's documentation: slight distortion",
    criterion=f"{NET}, 5 fresh seeds, rate 0.01, with the default switches: the inner products within the principal part change by "
    "less than 0.05, while the weight itself changes by more than 0.1, in each seed",
    method=PSOFT,
    sham=Sham("any matrix in the place of the rotation, with both vectors", FREE),
)
def vectors_distort_slightly(lab: Lab, way: Way) -> Finding:
    found = geometry(lab, way)
    far = max(found["vectors"])
    return conclude(
        {"slight distortion": max(found["principal_gram"]) < 0.05, "the weight moves": min(found["weight"]) > 0.1},
        note=f"nothing holds the vectors near 1, the point where R is a rotation: they went up to {far:.2f} from it",
        **found,
    )


# -- quality ----------------------------------------------------------------------------------------------------------


def ahead(lab: Lab, way: Way, than: dict[str, tuple[Way, float]]) -> tuple[dict[str, Part], dict[str, Effect]]:
    """Differences in test accuracy, each with seeds added until it is decided against its threshold."""

    def minus(other: Way) -> Callable[[int], float]:
        return lambda seed: way.end(seed).accuracy - other.end(seed).accuracy

    found = {name: lab.until_decided(minus(other), above=least, most=12) for name, (other, least) in than.items()}
    return {name: part for name, (part, _, _) in found.items()}, {name: e for name, (_, e, _) in found.items()}


def figures(lab: Lab, ways: dict[str, Way]) -> dict[str, Any]:
    """Means over five seeds."""
    seeds = range(lab.n_seeds)
    return {
        f"{what}_at_five_seeds": {n: sum(w.ends(seeds, what)) / len(seeds) for n, w in ways.items()}
        for what in ("loss", "accuracy")
    } | {
        "rates": {n: w.rate for n, w in ways.items()},
        "trained": {n: w.end(0).trained for n, w in ways.items()},
    }


@claim(
    "It has the quality of OFT with fewer trained numbers",
    source="abstract: semantic preservation, expressiveness and efficiency at once (35 tasks, four models); that it must be the "
    "principal subspace is ours",
    criterion=SETTING
    + "PSOFT as PEFT has it by default trains at most half the numbers of OFT (blocks of 28 and 32, exact Cayley), the "
    "95% interval of its test accuracy minus OFT's lies above -0.02, and that minus the same rotations and vectors in a "
    "subspace of the inputs drawn at random above 0",
    budget="full",
    method=PSOFT,
    sham=Sham("the same rotations and vectors in another subspace drawn at random", OTHERWISE),
)
def as_good_as_oft(lab: Lab, way: Way) -> Finding:
    parts, gaps = ahead(lab, way, {"as good as OFT": (OFT, -0.02), "ahead of a random subspace": (ELSEWHERE, 0)})
    half = met(2 * way.end(0).trained <= OFT.end(0).trained)
    return conclude(
        {"half the numbers": half} | parts,
        differences=gaps,
        **figures(
            lab,
            {
                "method": way,
                "oft": OFT,
                "random subspace": ELSEWHERE,
                "strict": STRICT,
            },
        ),
    )


@claim(
    "The scaling vectors adapt better than strict rotations",
    source="abstract: vectors that relax orthogonality to enhance adaptability; that they must be ahead of as many numbers more in "
    "the rotation is ours",
    criterion=SETTING
    + "the 95% intervals of the test accuracy with both vectors minus that without, and minus that of strict "
    "rotations of rank 66 (4,290 numbers, two more), lie above 0",
    budget="full",
    method=PSOFT,
    sham=Sham("strict rotations of rank 66", STRICT_66),
)
def vectors_help(lab: Lab, way: Way) -> Finding:
    than = {
        "ahead of strict rotations": (STRICT, 0.0),
        "ahead of strict rotations of as many numbers": (STRICT_66, 0.0),
    }
    parts, gaps = ahead(lab, way, than)
    ways = {"method": way, "strict": STRICT, "strict, rank 66": STRICT_66}
    return conclude(parts, differences=gaps, **figures(lab, ways))

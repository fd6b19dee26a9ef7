"""Bit-wise training (arXiv 2202.09571): are integer weights as good, do three bits carry them, do the rest hold a file?"""

import argparse
import inspect
import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils import parametrize

from pondera.parametrize.bitwise import Bitwise
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.parametrize._digits import Tuned, tuned

SIDE = 8
WIDTHS = (SIDE * SIDE, 64, 10)
STEPS, SEEDS = 250, 6
RATES = (3e-3, 1e-2)
Pattern = Callable[[int], str]  # of so many bits, which are trained


def all_trained(bits: int) -> str:
    return "1" * bits


def low_half(bits: int) -> str:
    """The lower half of the bits."""
    return "1" * (bits // 2) + "0" * (bits - bits // 2)


def only_signs(bits: int) -> str:
    return "0" * (bits - 1) + "1"


def top(most: int, bits: int) -> str:
    """The `most` most significant bits, the sign first."""
    return "0" * (bits - most) + "1" * most


def bottom(most: int, bits: int) -> str:
    return "1" * most + "0" * (bits - most)


def net(seed: int, widths: tuple[int, ...] = WIDTHS) -> nn.Sequential:
    """Without biases, uniform with He's variance, as the authors' baseline."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
        nn.init.uniform_(layers[-2].weight, -math.sqrt(6 / a), math.sqrt(6 / a))  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def bitwise(
    seed: int, bits: int, pattern: str, data: bytes | None = None, widths: tuple[int, ...] = WIDTHS
) -> nn.Sequential:
    """The paper's start, with `data` stored where it is given."""
    made = net(seed, widths)
    for layer in made:
        if isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", Bitwise(bits, pattern, random=True))
    if data is not None:
        Bitwise.store(made, data)
    return made


@cache
def floats(seeds: tuple[int, ...]) -> Tuned:
    return tuned(net, seeds, RATES, side=SIDE, steps=STEPS)


@cache
def trained(bits: int, pattern: str, seeds: tuple[int, ...], kind: str = "") -> Tuned:
    return tuned(
        lambda seed: bitwise(seed, bits, pattern, a_file(kind, seed) if kind else None),
        seeds,
        RATES,
        side=SIDE,
        steps=STEPS,
    )


@cache
def zeros_by_training(pattern: str, seeds: tuple[int, ...]) -> list[tuple[float, float]]:
    """Share of zero weights at the start and after it, of two bits, on scikit-learn's digits."""

    def make(seed: int) -> nn.Module:
        return bitwise(seed, 2, pattern, widths=(64, 32, 10))

    found = tuned(make, seeds, (3e-3,), side=8, steps=100)
    return [(zeros(make(seed)), zeros(one)) for seed, one in zip(seeds, found.nets, strict=True)]


@torch.no_grad()
def zeros(one: nn.Module) -> float:
    weights = torch.cat([m.weight.flatten() for m in one.modules() if isinstance(m, nn.Linear)])
    return (weights == 0).double().mean().item()


SETTING = (
    f"{'-'.join(map(str, WIDTHS))} ReLU net without biases on 757 of scikit-learn's digits, Adam, {STEPS} steps of 64, rate tuned "
    f"for every seed by 500 held-out digits, one grid, extended alike, accuracy on 540 others, {SEEDS} seeds"
)


@claim(
    "Among weights of -1 and 1 zeros come about by training, without any penalty",
    source="abstract",
    criterion="2 bits, 64-32-10 ReLU net on scikit-learn's digits, 100 steps of Adam at rate 3e-3, 5 seeds: no "
    "weight is zero at the start, and after it more "
    "than 5% are, in every seed",
    method=all_trained,
    sham=Sham("only signs are trained", only_signs),
)
def sparse_by_training(lab: Lab, pattern: Pattern) -> Finding:
    shares = zeros_by_training(pattern(2), tuple(lab.seeds))
    before, after = ([share[k] for share in shares] for k in (0, 1))
    return conclude({"none at the start": max(before) == 0, "more than 5% after it": min(after) > 0.05}, zeros=after)


@claim(
    "A fully connected net with integer weights does better than with floating-point ones, at any depth of bits",
    source="abstract; experiments (there LeNet 300-100, MNIST, 100 epochs)",
    criterion=SETTING
    + ": accuracy with 2, 4 and 8 bits minus that of ordinary training, 95% intervals above 0 (the abstract's "
    "'better'); beside it, not deciding: above -0.005 (as good)",
    budget="full",
    method=all_trained,
    sham=Sham("only the lower half of the bits is trained", low_half),
)
def better_than_floats(lab: Lab, pattern: Pattern) -> Finding:
    seeds = tuple(lab.draws(max(lab.n_seeds, SEEDS)))
    base = floats(seeds)
    runs = {bits: trained(bits, pattern(bits), seeds) for bits in (2, 4, 8)}
    gaps = {bits: lab.effect(run.accuracy, base.accuracy) for bits, run in runs.items()}
    better = {f"better with {bits} bits": weigh(gap, above=0) for bits, gap in gaps.items()}
    as_good = {f"as good with {bits} bits": weigh(gap, above=-0.005) for bits, gap in gaps.items()}
    every = {"float": base} | {f"{bits} bits": run for bits, run in runs.items()}
    return conclude(
        better | as_good,
        central=better,
        minus_float=gaps,
        accuracy={name: sum(run.accuracy) / len(seeds) for name, run in every.items()},
        training_loss={name: sum(run.loss) / len(seeds) for name, run in every.items()},
        settings={name: run.ends for name, run in every.items()},
        zeros={bits: sum(zeros(one) for one in run.nets) / len(seeds) for bits, run in runs.items()},
    )


@claim(
    "The sign and the two top bits of the magnitude carry the accuracy",
    source="abstract ('the first three most significant bits')",
    criterion=SETTING
    + ", 8 bits: accuracy with the three top bits trained minus that with all trained, 95% interval above -0.005; "
    "with the sign alone trained it is below -0.005",
    budget="full",
    method=top,
    sham=Sham("as many of the least significant bits", bottom),
)
def three_bits_carry_it(lab: Lab, chosen: Callable[[int, int], str]) -> Finding:
    seeds = tuple(lab.draws(max(lab.n_seeds, SEEDS)))
    every = trained(8, all_trained(8), seeds)
    runs = {most: trained(8, chosen(most, 8), seeds) for most in (1, 3)}
    gaps = {most: lab.effect(run.accuracy, every.accuracy) for most, run in runs.items()}
    return conclude(
        {"three are enough": weigh(gaps[3], above=-0.005), "one is not": weigh(gaps[1], below=-0.005)},
        minus_all=gaps,
        accuracy={"all": sum(every.accuracy) / len(seeds)} | {m: sum(r.accuracy) / len(seeds) for m, r in runs.items()},
        settings={"all": every.ends} | {m: run.ends for m, run in runs.items()},
    )


KINDS = ("text", "weights")


def a_file(kind: str, seed: int) -> bytes:
    """As many bytes as fit: the text of a module, or the weights of a net trained before."""
    size = Bitwise.room(bitwise(seed, 32, top(3, 32)))
    if kind == "text":
        data = inspect.getsource(argparse).encode()
    else:
        data = torch.cat([p.detach().flatten() for p in net_before(seed).parameters()]).numpy().tobytes()
    return (data * (size // len(data) + 1))[:size]


@cache
def net_before(seed: int) -> nn.Module:
    return tuned(net, (1000 + seed,), RATES[:1], side=SIDE, steps=100).nets[0]


@claim(
    "More than 90% of the bits hold a file, or another net, and the accuracy stays",
    source="abstract",
    criterion=SETTING + ", 32 bits with three trained and the rest full of text or of the weights of a net trained "
    "before, tuned and trained with the file in place: over 90% of the bits are the file's, it reads back as it was, and accuracy "
    "minus that of ordinary training, and minus that with all of 8 bits trained, has a 95% interval above -0.005 for both",
    budget="full",
    method=top,
    sham=Sham("the three least significant bits trained, the file in the others", bottom),
)
def a_file_in_the_rest(lab: Lab, chosen: Callable[[int, int], str]) -> Finding:
    seeds = tuple(lab.draws(max(lab.n_seeds, SEEDS)))
    pattern = chosen(3, 32)
    bases = {"floats": floats(seeds), "8 bits, all trained": trained(8, all_trained(8), seeds)}
    runs = {kind: trained(32, pattern, seeds, kind) for kind in KINDS}
    size = Bitwise.room(bitwise(0, 32, pattern))
    share = size / (sum(a * b for a, b in pairwise(WIDTHS)) * 32 / 8)
    back = [Bitwise.stored(one) == a_file(kind, s) for kind, run in runs.items() for s, one in zip(seeds, run.nets)]
    gaps = {
        f"{k}, minus {b}": lab.effect(run.accuracy, base.accuracy)
        for k, run in runs.items()
        for b, base in bases.items()
    }
    return conclude(
        {"over 90%": met(share > 0.9), "read back as it was": met(all(back))}
        | {name: weigh(gap, above=-0.005) for name, gap in gaps.items()},
        share=share,
        bytes_stored=size,
        difference=gaps,
        accuracy={k: sum(run.accuracy) / len(seeds) for k, run in (bases | runs).items()},
        settings={k: run.ends for k, run in (bases | runs).items()},
    )

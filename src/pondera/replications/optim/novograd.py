"""NovoGrad (arXiv 1905.11286): half of Adam's state, as good when tuned, robust to rate and start?"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from pondera.optim.novograd import NovoGrad
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met, weigh
from pondera.replications.optim._stack import N_VALID, Trained, train

Make = Callable[..., torch.optim.Optimizer]


def adamw(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **more)


def nadam(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(params, **more)


@claim(
    "It needs half of Adam's memory",
    source="abstract; Sec. 3",
    criterion="after a step on the small GPT: entries of state equal those of the model and one a parameter tensor, and bytes are at "
    "most 0.501 of AdamW's",
    method=NovoGrad,
    sham=Sham("NAdam, with a second moment of every entry", nadam),
)
def half_of_the_state(lab: Lab, make: Make) -> Finding:
    from pondera.lab.tasks import code

    torch.manual_seed(0)
    net = code.build()
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=lab.generator(0))

    def state(make: Make) -> tuple[int, int]:
        optimizer = make(net.parameters(), lr=0.0)
        optimizer.step()
        kept = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return sum(t.numel() for t in kept), sum(t.nbytes for t in kept)

    weights, tensors = sum(p.numel() for p in net.parameters()), len(list(net.parameters()))
    (entries, size), (_, theirs) = state(make), state(adamw)
    return conclude(
        {
            "one number a tensor beside the momentum": met(entries == weights + tensors),
            "half": met(size / theirs <= 0.501),
        },
        entries=entries,
        weights=weights,
        tensors=tensors,
        bytes_over_adamw=size / theirs,
    )


# -- small nets --------------------------------------------------------------------------------------------------------


def novograd(params: Any, **more: Any) -> torch.optim.Optimizer:
    return NovoGrad(params, **more)


def adam(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, **more)


def sgd(params: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, momentum=0.9, **more)


LOWEST = {novograd: -3.0, adam: -3.5, sgd: -2.5}
OTHERS = {"Adam": adam, "SGD": sgd}
BEHIND = Sham("SGD with momentum", sgd)


def rates_of(make: Make) -> list[float]:
    return [10 ** (LOWEST[make] + k / 2) for k in range(7)]


@cache
def landscape(make: Make, rates: tuple[float, ...], n_seeds: int, norm: bool, gain: float = 1.0) -> Trained:
    def optimizer(points: list[list[list[nn.Parameter]]]) -> torch.optim.Optimizer:
        groups = [{"params": [p for net in nets for p in net], "lr": r} for nets, r in zip(points, rates, strict=True)]
        return make(groups, lr=0.0)

    return train(optimizer, len(rates), range(n_seeds), norm=norm, gain=gain)


def of_all_rates(make: Make, n_seeds: int, norm: bool) -> Trained:
    return landscape(make, tuple(rates_of(make)), n_seeds, norm)


def tuned(make: Make, n_seeds: int, norm: bool) -> list[float]:
    found = of_all_rates(make, n_seeds, norm)
    return found.test.gather(1, found.valid.argmax(1, keepdim=True))[:, 0].tolist()


def held_out(found: Trained) -> list[list[float]]:
    """Accuracy on all images not trained on, a list a seed."""
    accuracy: list[list[float]] = ((found.valid * N_VALID + found.test * 540) / (N_VALID + 540)).tolist()
    return accuracy


def band(accuracy: list[float], margin: float = 0.02) -> float:
    """Decades around the best rate over which accuracy, on straight lines over half a decade each, stays within the margin."""
    best = max(range(len(accuracy)), key=accuracy.__getitem__)
    floor, width = accuracy[best] - margin, 0.0
    for side in (accuracy[best:], accuracy[best::-1]):
        for a, b in pairwise(side):
            if b < floor:
                width += 0.5 * (a - floor) / (a - b)
                break
            width += 0.5
    return width


GROUND = (
    "digits, 400 images, two hidden layers of 64, 200 steps of 32 with a cosine, seven rates half a decade apart (from 0.001 for "
    "NovoGrad, 0.0003 for Adam, 0.003 for SGD with momentum 0.9), no decay, 5 seeds"
)


@claim(
    "Tuned, it is as good as Adam and SGD with momentum, and its rate matters less",
    source="abstract; Sec. 4, Sec. 5 (robust to the choice of the rate)",
    criterion=GROUND
    + ": test accuracy, each arm and seed at the rate tuned on other images, minus the other's has an interval above "
    "-0.01; the decades of rate within 2 points of the arm's own best minus the other's have one above 0. Decisive: with batch norm, "
    "as the paper's networks have; beside it: without",
    budget="full",
    method=novograd,
    sham=BEHIND,
)
def as_good_and_robust_to_the_rate(lab: Lab, make: Make) -> Finding:
    n = len(lab.seeds)
    parts: dict[str, Part] = {}
    effects: dict[str, Effect] = {}
    for ground, norm in (("batch norm", True), ("no norm", False)):
        bands = {m: [band(a) for a in held_out(of_all_rates(m, n, norm))] for m in {make, adam, sgd}}
        for name, other in OTHERS.items():
            good = f"as good as {name}, {ground}"
            effects[good] = lab.effect(tuned(make, n, norm), tuned(other, n, norm))
            parts[good] = weigh(effects[good], above=-0.01)
            wide = f"wider than {name}'s band, {ground}"
            effects[wide] = lab.effect(bands[make], bands[other])
            parts[wide] = weigh(effects[wide], above=0)
    arms = (make, adam, sgd)
    return conclude(
        parts,
        central=[name for name in parts if name.endswith("batch norm")],
        differences=effects,
        mean_accuracy_by_rate={
            ground: {m.__name__: of_all_rates(m, n, norm).test.mean(0).tolist() for m in arms}  # type: ignore[attr-defined]
            for ground, norm in (("batch norm", True), ("no norm", False))
        },
        rates={m.__name__: rates_of(m) for m in arms},  # type: ignore[attr-defined]
    )


@claim(
    "The start of the weights matters less",
    source="abstract; Sec. 5 (robust to weight initialization)",
    criterion=GROUND
    + ", with batch norm; at the rate that is best on average on other images at the usual start, and starts of a third "
    "and of three times its size: mean test accuracy lost on these two, minus what Adam (SGD) loses, has an interval below 0",
    budget="full",
    method=novograd,
    sham=BEHIND,
)
def robust_to_the_start(lab: Lab, make: Make) -> Finding:
    n = len(lab.seeds)

    @cache
    def lost(make: Make) -> tuple[list[float], float, dict[str, float]]:
        usual = of_all_rates(make, n, True)
        at = int(usual.valid.mean(0).argmax())
        rate = rates_of(make)[at]
        starts = {g: landscape(make, (rate,), n, True, g).test[:, 0] for g in (1 / 3, 3.0)}
        loss = usual.test[:, at] - torch.stack(list(starts.values())).mean(0)
        accuracy = {"1": float(usual.test[:, at].mean())} | {f"{g:.2g}": float(a.mean()) for g, a in starts.items()}
        return loss.tolist(), rate, accuracy

    gaps = {name: lab.effect(lost(make)[0], lost(other)[0]) for name, other in OTHERS.items()}
    arms = (make, adam, sgd)
    return conclude(
        {f"less than {name}": weigh(gap, below=0) for name, gap in gaps.items()},
        lost_minus_what_the_other_loses=gaps,
        accuracy_by_start={m.__name__: lost(m)[2] for m in arms},  # type: ignore[attr-defined]
        rates={m.__name__: lost(m)[1] for m in arms},  # type: ignore[attr-defined]
    )

"""AuON (arXiv 2509.24320): is its cost linear, is its update bounded and reconditioned, does it keep up?"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pondera.linalg import newton_schulz
from pondera.optim.auon import AuON, HybridAuON
from pondera.replications import Finding, Lab, Part, Sham, claim, conclude, met, weigh
from pondera.replications.optim import _short
from pondera.replications.optim.normuon import ADAMW, BLOCK, FRESH, MUON, RATES, draw

Make = Callable[..., torch.optim.Optimizer]


class Operations(TorchDispatchMode):
    """Counts what is computed: two for each multiply-add of a matrix product, one for each entry any other call reads or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        seen = [t for t in (*args, out) if isinstance(t, Tensor)]
        inner = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        self.count += (
            max((t.numel() for t in seen), default=0) if inner is None else 2 * out.numel() * args[inner].shape[-1]
        )
        return out


def operations(work: Callable[[], Any]) -> int:
    with Operations() as counted:
        work()
    return counted.count


def exponent(cost: dict[int, int]) -> float:
    """Slope of log operations over log entries of n x n matrices, by least squares."""
    x = torch.tensor([math.log(n * n) for n in cost], dtype=torch.float64)
    y = torch.tensor([math.log(t) for t in cost.values()], dtype=torch.float64)
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@claim(
    "An update costs operations linear in the matrix's entries, where Newton-Schulz (Muon) grows like their power 1.5",
    source="abstract; Fig. 2",
    criterion="fitted exponent of the operations of a step in entries over n x n, n = 64 to 512: AuON's below 1.25, that of "
    "Newton-Schulz's five iterations at least 0.15 above it (the bounds are those of a run by the clock, which benchmarks have now)",
    method=AuON,
    sham=Sham("its hybrid, with Newton-Schulz inside", HybridAuON),
)
def cost_is_linear(lab: Lab, make: Make) -> Finding:
    cost: dict[str, dict[int, int]] = {"a step": {}, "newton_schulz": {}}
    for n in (64, 128, 256, 512):
        w = nn.Parameter(torch.zeros(n, n))
        w.grad = torch.randn(n, n, generator=lab.generator(0))
        optimizer = make([w])
        optimizer.step()
        cost["a step"][n] = operations(optimizer.step)
        cost["newton_schulz"][n] = operations(partial(newton_schulz, w.grad, dtype=None))
    ours, theirs = exponent(cost["a step"]), exponent(cost["newton_schulz"])
    return conclude(
        {"near linear": met(ours < 1.25), "Newton-Schulz grows faster": met(theirs >= ours + 0.15)},
        exponent=ours,
        exponent_newton_schulz=theirs,
        operations_an_entry_at_512={k: v[512] / 512**2 for k, v in cost.items()},
    )


def as_coded(params: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    return AuON(params, scaling="reference", **more)


def as_written(params: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    return AuON(params, scaling="paper", **more)


def momentum_sgd(params: list[nn.Parameter], **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **more)


def rate_of_zero(params: list[nn.Parameter], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0, momentum=momentum)


def update_of(gradient: Tensor, make: Make) -> Tensor:
    """What one step at rate 1 subtracts from a weight, without momentum."""
    w = nn.Parameter(torch.zeros_like(gradient))
    w.grad = gradient.clone()
    make([w], lr=1.0, momentum=0.0).step()
    return -w.detach()


def bounded(lab: Lab, make: Make) -> Finding:
    norms = []
    for seed in lab.seeds:
        g = torch.randn(64, 48, generator=lab.generator(seed), dtype=torch.float64)
        norms += [float(torch.linalg.matrix_norm(update_of(g * s, make), 2)) for s in (1e-4, 1.0, 1e4)]
    low, high = min(norms), max(norms)
    note = ""
    if high > 1:
        note = (
            f"from a gradient scaled by 1e-4 to one scaled by 1e4 the norm goes from {low:.2g} to {high:.2g}: the raw momentum is "
            "divided by R, which is 1 within 2.3 / entries, so the update grows with the gradient as in momentum SGD"
        )
    return conclude({"at most 1": met(high <= 1), "it moves": met(low >= 0.01)}, note=note, smallest=low, largest=high)


BOUNDED = (
    "64 x 48 gradients scaled by 1e-4, 1 and 1e4, 5 seeds: spectral norm of the update at rate 1 is at most 1 in all, and, ours, at "
    "least 0.01 in all, for what does not move is bounded as well"
)
STILL = Sham("no step at all", rate_of_zero)


@claim(
    "The code's update stays in a spectral-norm trust region",
    source="abstract; Sec. 3.1",
    criterion=BOUNDED,
    method=as_coded,
    sham=STILL,
)
def code_is_bounded(lab: Lab, make: Make) -> Finding:
    return bounded(lab, make)


@claim(
    "The update in the paper's text stays in a spectral-norm trust region",
    source="Sec. 3.1",
    criterion=BOUNDED,
    method=as_written,
    sham=STILL,
)
def text_is_bounded(lab: Lab, make: Make) -> Finding:
    return bounded(lab, make)


@claim(
    "It reconditions ill-posed updates",
    source="abstract",
    criterion="condition number of the update at most 0.9 of the gradient's, for 64 x 48 gradients of condition 1e3, "
    "with the code's scaling and with the text's, in each of 5 seeds",
    method=(as_coded, as_written),
    sham=Sham("momentum SGD", (momentum_sgd, momentum_sgd)),
)
def reconditions(lab: Lab, makes: tuple[Make, Make]) -> Finding:
    ratios: dict[str, list[float]] = {"the code's": [], "the text's": []}
    for seed in lab.seeds:
        random = torch.randn(64, 48, generator=lab.generator(seed), dtype=torch.float64)
        u, _, v = torch.linalg.svd(random, full_matrices=False)
        g = u * torch.logspace(0, -3, 48, dtype=torch.float64) @ v
        for make, found in zip(makes, ratios.values(), strict=True):
            found.append(float(torch.linalg.cond(update_of(g, make)) / torch.linalg.cond(g)))
    note = ""
    if all(abs(r - 1) < 1e-6 for found in ratios.values() for r in found):
        note = "the whole matrix is divided by one number, which leaves every ratio of singular values as it was"
    return conclude(
        {name: met(max(found) <= 0.9) for name, found in ratios.items()}, note=note, condition_over_gradients=ratios
    )


AUON, PLAIN = "optim=AuON", "optim=AuON(gamma=1e-06)"
AUON_RATES = tuple(10 ** (k / 2) for k in range(-2, 2))


@claim(
    "It trains within a small margin of Muon and AdamW",
    source="abstract; Sec. 4 (its own Table 1 has a training loss of 0.43 against 0.069 and 0.038)",
    criterion="small GPT, 2,000 windows of 32 characters, 150 steps, each arm and seed tuned on four rates half a decade apart "
    "(AdamW and Muon from 0.003 to 0.1, AuON, whose rates are of another size, from 0.1 to 3), extended where the best is at an end, 5 "
    "seeds: the 95% interval of its test loss minus 1.05 times the other's lies below 0, for Muon and for AdamW; and, ours, that of "
    "its loss minus the loss with R = 1, which is Nesterov's momentum SGD, lies below 0, or it is that which keeps up. The first run "
    "had 300 steps, more text and other seeds",
    budget="full",
    method=AUON,
    sham=Sham("R = 1: Nesterov's momentum SGD on matrices, AdamW on the rest, as AuON has it", PLAIN),
)
def keeps_up(lab: Lab, method: str) -> Finding:
    def rows(recipes: list[str], rates: tuple[float, ...]) -> dict[str, Any]:
        table = lab.compare(_short, recipes, seeds=BLOCK, first_seed=FRESH, rates=rates)
        return {r.spec: r for r in table.rows}

    found = rows([MUON, ADAMW], RATES) | rows([PLAIN], AUON_RATES) | rows([method], AUON_RATES)
    loss = {spec: [-s for s in row.scores] for spec, row in found.items()}
    over = {
        name: lab.effect(loss[method], [1.05 * x for x in loss[of]]) for name, of in (("Muon", MUON), ("AdamW", ADAMW))
    }
    gain = lab.effect(loss[method], loss[PLAIN])
    parts: dict[str, Part] = {f"within 5% of {name}": weigh(gap, below=0) for name, gap in over.items()}
    parts["ahead of R = 1"] = weigh(gain, below=0)
    draw(lab, found, {method: "AuON", MUON: "Muon", ADAMW: "AdamW"})
    return conclude(
        parts,
        loss_over_the_margin=over,
        loss_minus_that_with_R_1=gain,
        test_loss=loss,
        share_of_the_others={
            name: [a / b for a, b in zip(loss[method], loss[of])] for name, of in (("Muon", MUON), ("AdamW", ADAMW))
        },
        rates={spec: [p.rate if p else None for p in row.chosen] for spec, row in found.items()},
        at_the_end_of_the_grid={spec: row.edge for spec, row in found.items()},
    )

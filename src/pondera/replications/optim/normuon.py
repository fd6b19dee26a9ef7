"""NorMuon (arXiv 2510.05491): are neurons' updates evened out, at what memory, and does that save steps?"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.optim._base import Group, MatrixOptimizer, on_matrix, whole_number
from pondera.optim._groups import groups
from pondera.optim.normuon import NorMuon, orthogonalised
from pondera.replications import Finding, Lab, claim, judge


class Muon(MatrixOptimizer):
    """Muon scaled to AdamW's size of update (0.2 sqrt(max(m, n))), everything else as NorMuon does it.

    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") moves matrices alike; here the vectors move as NorMuon's too, and
    the iteration runs in the same precision, so that nothing but the normalisation of neurons differs.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        own = {"lr": lr, "momentum": 0.95, "weight_decay": 0.0, "ns_steps": 5, "ns_dtype": None}
        rest = {"vector_lr_ratio": 1.0, "betas": (0.9, 0.95), "vector_eps": 1e-10, "vector_weight_decay": 0.0}
        super().__init__(params, own | rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        whole_number("Muon", "ns_steps", group["ns_steps"])

    def _direction(self, update: Tensor, state: dict[str, Any], group: Group) -> Tensor:
        return on_matrix(lambda U: orthogonalised(U, group) * (0.2 * max(U.shape) ** 0.5), update, group["transposed"])


NORMUON = "optim=NorMuon(scaling='paper')"
MUON = "optim=pondera.replications.optim.normuon:Muon"
ADAMW = "optim=AdamW(weight_decay=0.0)"


@claim(
    "Muon's updates move some neurons far more than others; normalising evens them out",
    source="abstract; Sec. 3",
    criterion="spread (standard deviation over mean) of the rows' norms of an update, averaged over the hidden matrices "
    "of the small GPT after 20 steps: Muon's at least 2 times NorMuon's in each of 5 seeds",
)
def rows_are_evened(lab: Lab) -> Finding:
    from pondera.lab.tasks import code

    (x, y), _ = code.data()

    def spread(method: Callable[[Any], MatrixOptimizer], seed: int) -> float:
        torch.manual_seed(seed)
        net = code.build()
        optimizer = method(groups(net))
        for _ in range(20):
            i = torch.randint(len(x), (8,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]).flatten(0, 1), y[i].flatten()).backward()
            before = [p.detach().clone() for p in groups(net)[0]["params"]]
            optimizer.step()
        rows = [(p.detach() - b).norm(dim=1) for p, b in zip(groups(net)[0]["params"], before, strict=True)]
        return sum((r.std() / r.mean()).item() for r in rows) / len(rows)

    muon = [spread(lambda g: Muon(g, lr=1e-3), s) for s in lab.seeds]
    ours = [spread(lambda g: NorMuon(g, lr=1e-3, scaling="paper"), s) for s in lab.seeds]
    return judge(
        all(m >= 2 * o for m, o in zip(muon, ours, strict=True)),
        muon=muon,
        normuon=ours,
        note="Muon's rows are the more uneven by about two, now a little below and now above: an earlier run, on another "
        "text, had 2.07 to 2.25. For a time the bound stood at 1.5 after that run; it is the first one again. A spread of "
        "a tenth is less than the paper's figures suggest",
    )


@claim(
    "It needs the memory of Muon and one number a neuron",
    source="abstract; Sec. 3 (the state v is a vector of m entries)",
    criterion="after a step on every hidden matrix of the small GPT: state entries minus those of torch.optim.Muon equal "
    "the number of rows, and all state together is at most 1.02 times Muon's and 0.52 times AdamW's",
)
def memory_of_muon(lab: Lab) -> Finding:
    from pondera.lab.tasks import code

    matrices = [torch.nn.Parameter(p.detach().clone()) for p in groups(code.build())[0]["params"]]
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=lab.generator(0))

    def entries(method: Any) -> list[int]:
        optimizer = method(matrices)
        optimizer.step()
        return [sum(s.numel() for s in optimizer.state[p].values() if s.ndim) for p in matrices]

    ours, muon, adamw = entries(NorMuon), entries(torch.optim.Muon), entries(torch.optim.AdamW)
    extra = [a - b for a, b in zip(ours, muon, strict=True)]
    to_muon, to_adamw = sum(ours) / sum(muon), sum(ours) / sum(adamw)
    met = extra == [p.shape[0] for p in matrices] and to_muon <= 1.02 and to_adamw <= 0.52
    return judge(met, extra_entries=extra, ratio_to_muon=to_muon, ratio_to_adamw=to_adamw)


@cache
def trained(n_seeds: int) -> Any:
    """The small GPT by the three optimizers, rates tuned alike; one table for the claims below."""
    return Lab("normuon", n_seeds).compare("code", [NORMUON, MUON, ADAMW])


def share_saved(curve: list[Any], other: list[Any]) -> float:
    """Share of the steps one run is ahead: where it reaches the other's final score; negative where the other does so.

    Scores lie between evaluations on straight lines. Curves are lists of (step, seconds, score, train loss).
    """
    if curve[-1][2] < other[-1][2]:
        return -share_saved(other, curve)
    target = other[-1][2]
    for (a, _, low, _), (b, _, high, _) in pairwise(curve):
        if high >= target:
            reached = b if high <= low or low >= target else a + (b - a) * (target - low) / (high - low)
            return 1 - reached / curve[-1][0]
    return 0.0


def saved(against: str, n_seeds: int) -> Finding:
    rows = {r.spec: r for r in trained(n_seeds).rows}
    lab = Lab("normuon", n_seeds)
    shares = [share_saved(a, b) for a, b in zip(rows[NORMUON].curves, rows[against].curves, strict=True)]
    loss = {name: [-s for s in rows[spec].scores] for name, spec in (("normuon", NORMUON), ("against", against))}
    gap = lab.effect(shares, [0.0] * len(shares))
    return judge(
        gap.above,
        share_of_steps_saved=gap,
        test_loss=loss["normuon"],
        test_loss_against=loss["against"],
        loss_difference=lab.effect(loss["normuon"], loss["against"]),
        rates={"normuon": rows[NORMUON].rate, "against": rows[against].rate},
        step_seconds={"normuon": rows[NORMUON].step_seconds, "against": rows[against].step_seconds},
    )


STEPS_SAVED = (
    "small character GPT, rates tuned on one grid, 5 seeds: share of steps saved to the other's final test loss "
    "(negative where the other is ahead) has a 95% interval above 0"
)


@claim("Fewer steps than Muon to the same loss", source="abstract; Sec. 4", criterion=STEPS_SAVED, budget="full")
def fewer_steps_than_muon(lab: Lab) -> Finding:
    return saved(MUON, lab.n_seeds)


@claim("Fewer steps than AdamW to the same loss", source="abstract; Sec. 4", criterion=STEPS_SAVED, budget="full")
def fewer_steps_than_adamw(lab: Lab) -> Finding:
    finding = saved(ADAMW, lab.n_seeds)
    draw(lab)
    return finding


def draw(lab: Lab) -> None:
    """Learning curves of the three, mean over seeds."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    for row, name in zip(trained(lab.n_seeds).rows, ("NorMuon", "Muon", "AdamW"), strict=True):
        curves = [c for c in row.curves if len(c) == max(map(len, row.curves))]  # a diverged run's ends early
        steps = [point[0] for point in curves[0]]
        loss = [-sum(c[k][2] for c in curves) / len(curves) for k in range(len(steps))]
        ax.plot(steps[1:], loss[1:], marker="o", ms=3, label=f"{name} (rate {row.rate:.2g})")
    ax.set(xlabel="step", ylabel="test loss, nats a character", title="Small GPT on Python source, tuned rates")
    ax.legend(frameon=False)
    lab.figure("curves", fig)
    plt.close(fig)

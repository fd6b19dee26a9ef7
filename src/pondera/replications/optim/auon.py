"""AuON (arXiv 2509.24320): is its cost linear, is its update bounded and reconditioned, does it keep up?"""

import math
import time
from typing import Any

import torch
from torch import nn

from pondera.linalg import newton_schulz
from pondera.optim.auon import AuON
from pondera.replications import Finding, Lab, claim, judge


def exponent(cost: dict[int, float]) -> float:
    """Slope of log time over log entries of n x n matrices, by least squares."""
    x = torch.tensor([math.log(n * n) for n in cost])
    y = torch.tensor([math.log(t) for t in cost.values()])
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@claim(
    "An update costs time linear in the matrix's entries, where Newton-Schulz (Muon) grows like their power 1.5",
    source="abstract; Fig. 2",
    criterion="fitted exponent of the median step time in entries over n x n, n = 192 to 768, interleaved, one thread: "
    "AuON's below 1.25, that of Newton-Schulz's five iterations in float32 at least 0.15 above it",
)
def cost_is_linear(lab: Lab) -> Finding:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = (192, 288, 432, 648, 768)
    cost: dict[str, dict[int, list[float]]] = {"auon": {n: [] for n in sizes}, "newton_schulz": {n: [] for n in sizes}}
    try:
        for _ in range(9):
            for n in sizes:
                w = nn.Parameter(torch.zeros(n, n))
                w.grad = torch.randn(n, n)
                optimizer = AuON([w])
                optimizer.step()
                began = time.perf_counter()
                optimizer.step()
                cost["auon"][n].append(time.perf_counter() - began)
                began = time.perf_counter()
                newton_schulz(w.grad, dtype=None)
                cost["newton_schulz"][n].append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    median = {k: {n: sorted(t)[len(t) // 2] for n, t in v.items()} for k, v in cost.items()}
    ours, theirs = exponent(median["auon"]), exponent(median["newton_schulz"])
    return judge(
        ours < 1.25 and theirs >= ours + 0.15,
        exponent_auon=ours,
        exponent_newton_schulz=theirs,
        milliseconds_at_768={k: 1e3 * v[768] for k, v in median.items()},
    )


def update_of(gradient: torch.Tensor, scaling: str) -> torch.Tensor:
    """What one step at rate 1 subtracts from a weight, without momentum."""
    w = nn.Parameter(torch.zeros_like(gradient))
    w.grad = gradient.clone()
    AuON([w], lr=1.0, momentum=0.0, scaling=scaling).step()
    return -w.detach()


def spectral(lab: Lab, scaling: str) -> tuple[float, float]:
    """Smallest and largest spectral norm of updates over gradients of sizes 1e-4 to 1e4, 5 seeds."""
    norms = []
    for seed in lab.seeds:
        g = torch.randn(64, 48, generator=lab.generator(seed), dtype=torch.float64)
        norms += [float(torch.linalg.matrix_norm(update_of(g * s, scaling), 2)) for s in (1e-4, 1.0, 1e4)]
    return min(norms), max(norms)


BOUNDED = (
    "64 x 48 gradients scaled by 1e-4, 1 and 1e4, 5 seeds: spectral norm of the update at rate 1 is at most 1 in all"
)


@claim("The code's update stays in a spectral-norm trust region", source="abstract; Sec. 3.1", criterion=BOUNDED)
def code_is_bounded(lab: Lab) -> Finding:
    low, high = spectral(lab, "reference")
    return judge(
        high <= 1,
        smallest=low,
        largest=high,
        note="the authors' code divides the raw momentum by R, which is 1 within 2.3 / entries: the update grows with "
        "the gradient, as in momentum SGD; the formula in the paper's text normalises first and is bounded",
    )


@claim("The update in the paper's text stays in a spectral-norm trust region", source="Sec. 3.1", criterion=BOUNDED)
def text_is_bounded(lab: Lab) -> Finding:
    low, high = spectral(lab, "paper")
    return judge(high <= 1, smallest=low, largest=high)


@claim(
    "It reconditions ill-posed updates",
    source="abstract",
    criterion="condition number of the update at most 0.9 of the gradient's, for 64 x 48 gradients of condition 1e3, "
    "with either scaling, in each of 5 seeds",
)
def reconditions(lab: Lab) -> Finding:
    ratios: dict[str, list[float]] = {"reference": [], "paper": []}
    for seed in lab.seeds:
        random = torch.randn(64, 48, generator=lab.generator(seed), dtype=torch.float64)
        u, _, v = torch.linalg.svd(random, full_matrices=False)
        g = u * torch.logspace(0, -3, 48, dtype=torch.float64) @ v
        for scaling, found in ratios.items():
            found.append(float(torch.linalg.cond(update_of(g, scaling)) / torch.linalg.cond(g)))
    return judge(
        max(max(r) for r in ratios.values()) <= 0.9,
        **{f"condition_over_gradients_{k}": v for k, v in ratios.items()},
        note="the whole matrix is divided by one number, which leaves every ratio of singular values as it was",
    )


RATIOS = (0.1, 0.01)
AUON = {f"AuON, vectors at {r} of the rate": f"optim=AuON(vector_lr_ratio={r})" for r in RATIOS}
MUON, ADAMW = "optim=pondera.replications.optim.normuon:Muon", "optim=AdamW(weight_decay=0.0)"
SGD = "optim=SGD(momentum=0.95,nesterov=True)"


@claim(
    "It trains within a small margin of Muon and AdamW",
    source="abstract; Sec. 4 (its own Table 1 has a training loss of 0.43 against 0.069 and 0.038)",
    criterion="small character GPT, rates tuned on one grid, AuON's rate for vectors at the better of two ratios (its "
    "authors' 0.1, and 0.01), 5 seeds: the 95% interval of its test loss minus 1.05 times the other's lies below 0, "
    "for Muon and for AdamW",
    budget="full",
)
def keeps_up(lab: Lab) -> Finding:
    table = lab.compare("code", [ADAMW, MUON, SGD, *AUON.values()])
    loss: dict[str, list[float]] = {r.spec: [-s for s in r.scores] for r in table.rows}
    rate = {r.spec: r.rate for r in table.rows}

    def mean(spec: str) -> float:
        value = sum(loss[spec]) / len(loss[spec])
        return value if math.isfinite(value) else math.inf

    best = min(AUON.values(), key=mean)  # chosen on test: in AuON's favour
    gaps: dict[str, Any] = {s: lab.effect(loss[best], [1.05 * x for x in loss[s]]) for s in (ADAMW, MUON)}
    draw(lab, table, best)
    return judge(
        all(g.below for g in gaps.values()),
        best=best,
        test_loss=loss,
        rates=rate,
        over_margin_to_adamw=gaps[ADAMW],
        over_margin_to_muon=gaps[MUON],
        to_nesterov_sgd=where_both_finished(lab, loss[best], loss[SGD]),
    )


def where_both_finished(lab: Lab, a: list[float], b: list[float]) -> Any:
    """The paired difference over the seeds on which neither diverged; None where fewer than two are left."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return lab.effect([x for x, _ in pairs], [y for _, y in pairs]) if len(pairs) > 1 else None


def draw(lab: Lab, table: Any, best: str) -> None:
    """Learning curves, mean over seeds."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    names = {ADAMW: "AdamW", MUON: "Muon", SGD: "Nesterov SGD", best: "AuON"}
    for row in table.rows:
        if row.spec in names:
            curves = [c for c in row.curves if len(c) == max(map(len, row.curves))]  # a diverged run's ends early
            steps = [point[0] for point in curves[0]]
            loss = [-sum(c[k][2] for c in curves) / len(curves) for k in range(len(steps))]
            ax.plot(steps[1:], loss[1:], marker="o", ms=3, label=f"{names[row.spec]} (rate {row.rate:.2g})")
    ax.set(xlabel="step", ylabel="test loss, nats a character", title="Small GPT on Python source, tuned rates")
    ax.legend(frameon=False)
    lab.figure("curves", fig)
    plt.close(fig)

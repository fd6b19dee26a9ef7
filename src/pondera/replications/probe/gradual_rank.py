"""Transformers learn through gradual rank increase (arXiv 2306.07042): stages in the model of the theory, and in a small GPT."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pondera.lab.tasks import code
from pondera.probe._diagonal_attention import DiagonalAttention, StagedTraining, predicted_stages
from pondera.probe.gradual_rank import RankOfChange, rank_of_change
from pondera.replications import Finding, Lab, claim, judge

WIDTH, TOKENS, EXAMPLES = 4, 4, 32


def teacher(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Gaussian tokens and what a head of diagonal weights makes of them, its entries of sizes 0.6 to 1.8 in random order."""
    x = torch.randn(EXAMPLES, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    size = torch.linspace(0.6, 1.8, WIDTH, dtype=torch.float64)
    w = torch.stack([size[torch.randperm(WIDTH, generator=generator)] for _ in range(2)])
    w = w * torch.randn(2, WIDTH, generator=generator, dtype=torch.float64).sign()
    return x, torch.softmax((x * w[0]) @ x.mT, dim=-1) @ (x * w[1])


def student(x: Tensor, y: Tensor, scale: float, until: float, seed: int) -> StagedTraining:
    """A head trained from a start of that scale for `until` units of rescaled time, and then 60 of plain time to rest."""
    head = DiagonalAttention(WIDTH, scale=scale, generator=torch.Generator().manual_seed(seed + 100))
    steps = int((until * math.log(1 / scale) + 60) / 0.2)
    return head.train_on(x, y, rate=0.2, steps=steps, every=2)


@lru_cache(maxsize=1)
def runs(seeds: tuple[int, ...]) -> list[dict[Any, Any]]:
    """For each seed the predicted stages and the run at each scale of the start."""
    found = []
    for seed in seeds:
        x, y = teacher(torch.Generator().manual_seed(seed))
        stages = predicted_stages(x, y)
        until = 1.3 * float(stages.time[-1])
        found.append({"stages": stages, **{s: student(x, y, s, until, seed) for s in SCALES}})
    return found


SCALES = (0.3, 1e-2, 1e-4, 1e-8)


def separate(sizes: Tensor) -> Tensor:
    """Of curves (time, entries) that grow one after another, whether each waits for the one before.

    In the order in which they reach half of the size they end with, the next is still below a tenth of its own then.
    """
    final = sizes[-1]
    reached = (sizes >= 0.5 * final).to(torch.uint8).argmax(0)
    order = reached.argsort(stable=True)
    return torch.stack([sizes[reached[a], b] < 0.1 * final[b] for a, b in pairwise(order.tolist())]).double()


@claim(
    "From a small start a head of diagonal weights learns in stages, at the times and to the values the theory predicts",
    source="theorem on incremental learning (its stages derived here)",
    criterion="five teachers with 4 + 4 entries, starts of scale 1e-2, 1e-4 and 1e-8: the mean distance between simulated and "
    "predicted entries, over all entries and the rescaled time up to 1.3 times the last waking, falls with the scale in each "
    "seed and is below 0.1 at 1e-8 on average over seeds; every predicted stage adds at most one entry",
)
def stages_as_predicted(lab: Lab) -> Finding:
    gaps: dict[float, list[float]] = {s: [] for s in SCALES[1:]}
    gains = []
    for run in runs(tuple(lab.seeds)):
        stages = run["stages"]
        points = torch.cat([stages.products.new_zeros(1, 2, WIDTH), stages.products])
        gains.append(int((points != 0).flatten(1).sum(1).diff().max()))
        for scale in gaps:
            time = run[scale].time[run[scale].time <= 1.3 * stages.time[-1]]
            at = torch.searchsorted(stages.time, time, right=True)
            gaps[scale].append(float((run[scale].products[: len(time)] - points[at]).abs().mean()))
    falling = [a > b > c for a, b, c in zip(*gaps.values(), strict=True)]
    mean = sum(gaps[1e-8]) / len(gains)
    lab.figure("stages", _draw(runs(tuple(lab.seeds))[0]))
    return judge(all(falling) and mean < 0.1 and max(gains) <= 1, mean_distance=gaps, most_gained_in_a_stage=max(gains))


@claim(
    "Stages need a small start",
    source="abstract; theorem (alpha to 0)",
    criterion="the same teachers: share of the 7 pairs of successive entries where the later one is below a tenth of its final "
    "size when the earlier one reaches half of its own: at scale 1e-8 minus at 0.3 has a 95% interval above 0, and the mean "
    "share does not fall from 0.3 to 1e-2 to 1e-4 to 1e-8",
)
def small_start(lab: Lab) -> Finding:
    share = {
        s: [float(separate(run[s].products.abs().flatten(1)).mean()) for run in runs(tuple(lab.seeds))] for s in SCALES
    }
    gap = lab.effect(share[1e-8], share[0.3])
    mean = [sum(v) / len(v) for v in share.values()]
    return judge(gap.above and all(a <= b for a, b in pairwise(mean)), share=share, gap=gap)


def _draw(run: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    stages = run["stages"]
    fig = Figure(figsize=(10, 2.8), layout="constrained")
    points = torch.cat([stages.products.new_zeros(1, 2, WIDTH), stages.products]).flatten(1)
    end = 1.3 * float(stages.time[-1])
    for ax, scale in zip(fig.subplots(1, 3, sharey=True), (0.3, 1e-2, 1e-8), strict=True):
        time = torch.cat([torch.zeros(1), stages.time, torch.tensor([end])])
        for i in range(2 * WIDTH):
            colour = "#4477aa" if i < WIDTH else "#cc6677"
            ax.plot(run[scale].time, run[scale].products.flatten(1)[:, i], color=colour, lw=1.2)
            ax.stairs(points[:, i], time, baseline=None, color=colour, ls=":", lw=1)
        ax.set(title=f"start of scale {scale:g}", xlabel="time / log(1/scale)", xlim=(0, end))
    fig.axes[0].set(ylabel="entry of $w_K w_Q$ (blue), $w_V w_O$ (red)")
    return fig


# -- a small GPT -------------------------------------------------------------------------------------------------------

STEPS, RATE = 600, 1e-3
RECORDS = sorted({*range(10, 200, 10), *range(200, STEPS + 1, 50)})


@lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor]:
    """Windows of the standard library's source and the characters that follow."""
    return code.data()[0]


@lru_cache(maxsize=16)
def trained(scale: float, seed: int) -> tuple[list[RankOfChange], list[RankOfChange], list[float]]:
    """Change of the small GPT since its start at each record, the start itself likewise, and the losses.

    The attention's four matrices start at `scale` times torch's start; Adam at a constant rate on the standard library's
    source.
    """
    torch.manual_seed(seed)
    net = code.build()
    with torch.no_grad():
        for block in net.blocks:
            for layer in (block.query, block.key, block.value, block.out):
                layer.weight.mul_(scale)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    zero = {k: torch.zeros_like(v) for k, v in start.items()}
    own = rank_of_change(net, zero, heads=code.HEADS)
    x, y = text()
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    found, losses = [], []
    for step in range(1, STEPS + 1):
        rows = torch.randint(len(x), (16,))
        loss = nn.functional.cross_entropy(net(x[rows]).flatten(0, 1), y[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in RECORDS:
            found.append(rank_of_change(net, start, heads=code.HEADS))
    return found, [own], losses


KINDS = ("key_query", "value_out")


@claim(
    "In a small GPT the stable rank of the change of W_K W_Q^T and W_V W_O^T grows as training goes and stays far below that "
    "of a random start",
    source="Fig. 4 (recalled: transformers on images and text, default start, Adam)",
    criterion="the small GPT on the standard library's source, torch's start, Adam at 0.001, 600 steps, mean over heads and "
    "layers: for both products the stable rank of the change at the end minus that at step 50 has a 95% interval above 0 over "
    "5 seeds, and at the end it is below half the stable rank of the product at the start in each seed",
    budget="full",
)
def rank_grows_in_a_gpt(lab: Lab) -> Finding:
    measured: dict[str, Any] = {}
    ok = []
    curves: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        early, late, start = [], [], []
        for seed in lab.seeds:
            found, own, _ = trained(1.0, seed)
            curve = torch.stack([f.of(kind).mean() for f in found])
            curves[kind].append(curve)
            early.append(float(curve[RECORDS.index(50)]))
            late.append(float(curve[-1]))
            start.append(float(own[0].of(kind).mean()))
        gap = lab.effect(late, early)
        measured[kind] = {"step 50": early, "end": late, "product at the start": start, "growth": gap}
        ok += [gap.above, all(b < a / 2 for a, b in zip(start, late, strict=True))]
    measured["final training loss"] = [sum(trained(1.0, s)[2][-50:]) / 50 for s in lab.seeds]
    lab.figure("gpt", _draw_gpt(curves, trained(0.1, lab.seeds[0])[0]))
    return judge(
        all(ok),
        note="W_V W_O^T gains rank all along (in one run of 2,000 steps to 3.6). W_K W_Q^T is of low rank from the first steps "
        "but does not grow: it rises to about 2.1 by step 80, falls back and is at 1.9 after 2,000 steps of one run.",
        **measured,
    )


@claim(
    "It grows in steps: one direction of a head after another, the more so the smaller the start",
    source="Fig. 6 (recalled: eigenvalues of the changed products over training at several scales of the start)",
    criterion="the same runs, and runs whose attention matrices start at a tenth of the size: share of heads' products in which "
    "the second singular value of the change is below a tenth of its final size when the first reaches half of its own: at a "
    "tenth of the size at least half in each of 5 seeds, and its difference to torch's start has a 95% interval above 0",
    budget="full",
)
def steps_in_a_gpt(lab: Lab) -> Finding:
    share: dict[float, list[float]] = {1.0: [], 0.1: []}
    ratio: dict[float, list[float]] = {1.0: [], 0.1: []}
    end: dict[str, list[float]] = {f"{kind}, {scale}": [] for kind in KINDS for scale in share}
    for scale in share:
        for seed in lab.seeds:
            found, _, _ = trained(scale, seed)
            products = [i for i, name in enumerate(found[0].names) if any(kind in name for kind in KINDS)]
            top = torch.stack([torch.stack([f.spectra[i][:2] for f in found]) for i in products])
            share[scale].append(float(torch.stack([_waits(t) for t in top]).mean()))
            ratio[scale].append(float(torch.stack([_second(t) for t in top]).median()))
            for kind in KINDS:
                end[f"{kind}, {scale}"].append(float(found[-1].of(kind).mean()))
    gap = lab.effect(share[0.1], share[1.0])
    return judge(
        min(share[0.1]) >= 0.5 and gap.above,
        note="The strong directions do not come to rest before the next rise: the first singular value still grows at the end. "
        "What a small start does is to hold the rank down, the more so the smaller: from a hundredth of torch's start "
        "W_K W_Q^T still changed by stable rank 1.0 after 1,000 steps (one run). SGD with momentum in place of Adam gave no "
        "steps either (one run each from a tenth and a hundredth).",
        share=share,
        gap=gap,
        second_when_first_is_half_of_final=ratio,
        stable_rank_at_the_end=end,
    )


def _second(top: Tensor) -> Tensor:
    """Of (records, 2) singular values: the second, by its final size, when the first reaches half of its own."""
    at = int((top[:, 0] >= 0.5 * top[-1, 0]).to(torch.uint8).argmax())
    return top[at, 1] / top[-1, 1]


def _waits(top: Tensor) -> Tensor:
    return (_second(top) < 0.1).double()


def _draw_gpt(curves: dict[str, list[Tensor]], small: list[RankOfChange]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 3), layout="constrained")
    left, right = fig.subplots(1, 2)
    for kind, colour, label in zip(KINDS, ("#4477aa", "#ee7733"), ("$W_K W_Q^T$", "$W_V W_O^T$"), strict=True):
        stacked = torch.stack(curves[kind])
        left.plot(RECORDS, stacked.mean(0), color=colour, label=label)
        left.fill_between(RECORDS, stacked.amin(0), stacked.amax(0), color=colour, alpha=0.2, lw=0)
    left.set(xlabel="step", ylabel="stable rank of the change", title="torch's start")
    left.legend(frameon=False)
    index = small[0].names.index("blocks.0.key_query[0]")
    spectra = torch.stack([f.spectra[index][:8] for f in small])
    right.plot(RECORDS, spectra, color="#4477aa", lw=1)
    right.set(xlabel="step", ylabel="singular values of the change", title="a tenth of it: $W_K W_Q^T$ of one head")
    return fig

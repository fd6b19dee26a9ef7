"""Weight rescaling (arXiv 2503.17500): does the variance stay on target, and does a small GPT gain by it?

The paper's figures for a Llama of 1B, width 2048, are carried to the width of 64 here by the root of the widths' ratio.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from multiprocessing import get_context

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera._weights import require_owned
from pondera.init.weight_rescaling import TargetVariance, layer_index_rescale_
from pondera.replications import Finding, Lab, claim, judge

WIDER = (2048 / 64) ** 0.5
STD, TARGET = 0.006 * WIDER, 0.01 * WIDER  # of LIR and TVR in the authors' example
BLOCKS, BATCH, EVERY = 4, 8, 10


def gpt(std: float, rule: str, generator: Generator) -> nn.Module:
    """The lab's small GPT with four blocks, started by LIR or by GPT-2's rule; embeddings from N(0, std^2) in both."""
    from pondera.lab.tasks import code

    net = code.build()
    net.blocks = nn.Sequential(*(code.Block() for _ in range(BLOCKS)))
    if rule == "lir":
        layer_index_rescale_(net, std=std, generator=generator)
    else:
        for one in require_owned(net, "gpt2"):
            ends_branch = one.name.endswith(("out.weight", "down.weight"))
            sigma = std / (2 * BLOCKS) ** 0.5 if ends_branch else std
            one.write(torch.empty_like(one.read()).normal_(0, sigma, generator=generator))
            one.fill_bias(0.0)
    for table in (net.token, net.place):
        nn.init.normal_(table.weight, 0, std, generator=generator)
    return net


@cache
def text() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from pondera.lab.tasks import code

    return code.data()


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net(x).flatten(0, 1), y.flatten())


def matrices(net: nn.Module) -> dict[str, Tensor]:
    return {one.name: one.read().detach() for one in require_owned(net, "matrices") if one.name.startswith("blocks.")}


@claim(
    "The deviation of every weight in the blocks stays on its target through training",
    source="abstract; TVR",
    criterion="small GPT of 4 blocks, all weights of the blocks started at the target, AdamW at rate 0.01 without decay, rescaling "
    "every 10 steps: at every step from 10 to 100 the deviation of every one lies within 0.8 and 1.3 of the target, and without "
    "the hook some lies above 1.5 at step 100, in each of 5 seeds",
)
def stays_on_target(lab: Lab) -> Finding:
    (x, y), _ = text()
    low, high, loose, growth, jump = [], [], [], [], []
    for seed in lab.seeds:
        for held in (True, False):
            g = lab.generator(seed)
            net = gpt(TARGET, "gpt2", g)
            for w in matrices(net).values():
                w.mul_(TARGET / w.std())
            hook = TargetVariance(net, target=TARGET, every=EVERY)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.0, fused=True)
            ratios = []
            for step in range(1, 101):
                i = torch.randint(len(x), (BATCH,), generator=g)
                optimizer.zero_grad()
                loss_of(net, x[i], y[i]).backward()
                optimizer.step()
                if held:
                    if step % EVERY == 0:
                        with torch.no_grad():
                            before = loss_of(net, x[i], y[i])
                            hook()
                            jump.append(float(loss_of(net, x[i], y[i]) - before))
                    else:
                        hook()
                if step >= EVERY:
                    ratios.append([float(w.std() / TARGET) for w in matrices(net).values()])
            if held:
                low.append(min(map(min, ratios)))
                high.append(max(map(max, ratios)))
                looks = range(0, len(ratios) - EVERY, EVERY)  # right after one, and right before the next
                growth.append(max(b / a for k in looks for a, b in zip(ratios[k], ratios[k + EVERY - 1])))
            else:
                loose.append(max(ratios[-1]))
    return judge(
        min(low) >= 0.8 and max(high) <= 1.3 and min(loose) > 1.5,
        smallest_over_target=low,
        largest_over_target=high,
        largest_without_hook=loose,
        largest_growth_between_looks=growth,
        loss_added_by_a_rescaling={"mean": sum(jump) / len(jump), "largest": max(jump)},
        note="the hook holds the deviations near the target, but the bound is not its threshold: a matrix just below 1.2 at one "
        "look grows on until the next, by up to a quarter at this rate. Looking every 5 steps the peak of seed 0 is 1.28, every 2 1.22",
    )


# -- training, rates and decay tuned alike ----------------------------------------------------------------------------

STEPS = 300
RATES, DECAYS, STDS = (1e-3, 10**-2.5, 1e-2), (0.0, 0.1), (STD, 0.02 * WIDER)


@dataclass(frozen=True)
class Run:
    """rule: of the start, "lir" or "gpt2". held: with TVR. stop: last step run, of a schedule over STEPS."""

    rule: str
    held: bool
    std: float
    rate: float
    decay: float
    seed: int
    stop: int = STEPS
    tune: bool = False


ARMS = {"GPT-2 rule": ("gpt2", False), "LIR": ("lir", False), "TVR": ("gpt2", True), "LIR and TVR": ("lir", True)}


def trained(run: Run) -> tuple[float, float, int]:
    """Loss on held-out text, the largest absolute entry of the residual stream there, weights rescaled in all."""
    from pondera.lab.tasks import code
    from pondera.lab.train import schedule

    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(run.seed)
    (x, y), (x_test, y_test) = text()
    if run.tune:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        (x, y), (x_test, y_test) = (x[order[600:]], y[order[600:]]), (x[order[:600]], y[order[:600]])
    net = gpt(run.std, run.rule, g)
    hook = TargetVariance(net, target=TARGET)
    optimizer = torch.optim.AdamW(net.parameters(), lr=run.rate, weight_decay=run.decay, fused=True)
    rescaled = 0
    for step in range(1, run.stop + 1):
        optimizer.param_groups[0]["lr"] = run.rate * schedule(step, STEPS)
        i = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        loss_of(net, x[i], y[i]).backward()
        optimizer.step()
        if run.held and step % EVERY == 0:
            rescaled += len(hook.rescale())
    largest = 0.0

    def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal largest
        largest = max(largest, float(out.abs().max()))

    for block in net.blocks:
        block.register_forward_hook(look)
    return -code.score(net, (x_test, y_test)), largest, rescaled


@cache
def compared(n_seeds: int) -> dict[str, tuple[Run, list[tuple[float, float, int]]]]:
    """For each arm its tuned setting, and what came of it in fresh seeds.

    As the lab tunes: every point of the grid for a quarter of the steps on two seeds, the best third to the end.
    """
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:

        def mean_loss(runs: list[Run]) -> dict[Run, float]:
            twice = [replace(r, seed=s) for r in runs for s in (1000, 1001)]
            losses = [loss if loss == loss else float("inf") for loss, *_ in pool.map(trained, twice)]
            return {r: losses[2 * k] + losses[2 * k + 1] for k, r in enumerate(runs)}

        grid = [
            Run(*arm, *point, seed=0, stop=STEPS // 4, tune=True)
            for arm in ARMS.values()
            for point in product(STDS, RATES, DECAYS)
        ]
        early = mean_loss(grid)
        alive = []
        for arm in ARMS.values():
            mine = sorted((r for r in grid if (r.rule, r.held) == arm), key=lambda r: early[r])
            alive += [replace(r, stop=STEPS) for r in mine[: len(mine) // 3]]
        late = mean_loss(alive)
        best = {n: min((r for r in alive if (r.rule, r.held) == arm), key=lambda r: late[r]) for n, arm in ARMS.items()}
        fresh = [replace(r, tune=False, seed=s) for r in best.values() for s in range(n_seeds)]
        ends = list(pool.map(trained, fresh))
    return {n: (r, ends[k * n_seeds : (k + 1) * n_seeds]) for k, (n, r) in enumerate(best.items())}


SETTING = (
    "small GPT of 4 blocks on the standard library's text, 300 steps of AdamW; starting deviation, rate and weight decay of "
    "each arm tuned on one grid of 12, then 5 fresh seeds; TVR every 10 steps: "
)


def tuned(n_seeds: int) -> dict[str, dict[str, float]]:
    return {n: {"std": r.std, "rate": r.rate, "decay": r.decay} for n, (r, _) in compared(n_seeds).items()}


@claim(
    "A small GPT with both ends at a lower loss",
    source="abstract (there a Llama of 1B, by downstream scores, up to 4.6%)",
    criterion=SETTING
    + "the 95% interval of the test loss of LIR and TVR together minus that of GPT-2's rule lies below 0",
    budget="full",
)
def ends_lower(lab: Lab) -> Finding:
    loss = {n: [e[0] for e in ends] for n, (_, ends) in compared(lab.n_seeds).items()}
    gaps = {n: lab.effect(loss[n], loss["GPT-2 rule"]) for n in ARMS if n != "GPT-2 rule"}
    return judge(
        gaps["LIR and TVR"].below,
        minus_gpt2_rule=gaps,
        test_loss=loss,
        tuned=tuned(lab.n_seeds),
        weights_rescaled={n: [e[2] for e in ends] for n, (_, ends) in compared(lab.n_seeds).items()},
        note="higher by about 1%, and it is LIR that costs it: later blocks start at half the deviation and 300 steps do not make up "
        "for that; TVR alone shows no difference. All arms took the largest rate and deviation of the grid, so they learn as "
        "fast as they can; growth has no time to do harm here, which is what the method is for",
    )


@claim(
    "Its extreme activations are smaller",
    source="abstract; the README's figures of extreme activation values",
    criterion=SETTING
    + "the 95% interval of the logarithm of the largest absolute entry of the residual stream on the test text, "
    "LIR and TVR together minus GPT-2's rule, lies below 0",
    budget="full",
)
def smaller_extremes(lab: Lab) -> Finding:
    largest = {n: [e[1] for e in ends] for n, (_, ends) in compared(lab.n_seeds).items()}
    log = {n: torch.tensor(v).log().tolist() for n, v in largest.items()}
    gaps = {n: lab.effect(log[n], log["GPT-2 rule"]) for n in ARMS if n != "GPT-2 rule"}
    return judge(
        gaps["LIR and TVR"].below,
        log_minus_gpt2_rule=gaps,
        largest_entry=largest,
        note="TVR does it; LIR alone makes them larger, by 30%",
    )

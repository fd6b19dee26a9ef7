"""T-LoRA (arXiv 2507.05964): one image of a glyph the small base has never seen, then the same glyph in other places.

The base is `pondera.customize.glyphs`, the one image shows the concept on gray in the centre, and the training prompt is "a sks
glyph". Asked for are other backgrounds and positions, and the training prompt itself. A judge that never saw a generated
image gives probabilities: that the glyph is the concept, the background and the position what the prompt says. The score
is *joint*, the mean over images of the product of the three; its parts stand beside it.

A run is looked at along training, and read where the training prompt first shows the concept with a probability of 0.8
(between two looks by a straight line; at the last where it never does), so that choices are compared at equal fidelity
and not at equal steps. Rank, batch, noise and optimizer are the same for all; the rate of each choice and rank is the best
of one grid by that reading on four other concepts, the grid going on past an edge. Eight concepts are judged with two
seeds each; the concepts are what is independent. No concept that is judged was used before, in tuning or in any look.

In designs that went before this one either no choice had learnt the concept (200 steps of batch 2), or the base knew no
left from right, or all were tuned by a sum of hard answers at rank 8, where LoRA hardly overfits.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor

from pondera import __version__
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met, weigh
from pondera.replications._kept import run_all

BATCH = 4
MARKS = (
    30,
    45,
    60,
    80,
    110,
    150,
    200,
    260,
)  # a run is looked at after so many steps at 1e-3, in proportion at other rates
ENOUGH = 0.8  # the probability of the concept under the training prompt, where a run is read
RATES = (3e-4, 1e-3, 3e-3)
TUNED_ON, TUNING_SEED = ("umbrella", "question", "knight", "eject"), 100
TAUGHT = ("dollar", "sigma", "section", "infinity", "envelope", "mars", "percent", "hammers")
SEEDS = (0, 1)
PLACES = (
    ("blue", "top left"), ("white", "bottom right"), ("brown", "top right"), ("striped", "bottom left"),
    ("purple", "bottom right"), ("black", "top left"), ("checkered", "center"), ("blue", "bottom left"),
)  # fmt: skip
NEUTRAL = 6  # images under the training prompt
WHOLE = 32  # the rank at which runs go on past where they are read
WHAT = ("neutral", "joint", "concept", "background", "position")


@dataclass(frozen=True)
class Arm:
    """A choice. start: of the factors. masked: in training. sampled_masked: in sampling, too. span: of the times trained on."""

    start: str
    masked: bool
    sampled_masked: bool = True
    span: tuple[int, int] = (0, 1000)


LORA, ORTHO, MASKED, T_LORA = Arm("lora", False), Arm("ortho", False), Arm("lora", True), Arm("ortho", True)
BARE = Arm("ortho", True, sampled_masked=False)
TRAINED = (LORA, ORTHO, MASKED, T_LORA)
NAMES = {
    LORA: "LoRA",
    ORTHO: "Ortho-LoRA",
    MASKED: "masked LoRA",
    T_LORA: "T-LoRA",
    BARE: "T-LoRA sampled without mask",
}
Looks = dict[str, list[float]]  # of one run: a figure of WHAT, mark by mark


def train(
    arm: Arm, rank: int, rate: float, concept: str, seed: int, *, marks: Sequence[int] = MARKS,
    look: Callable[[Any], bool] = lambda pipe: False,
) -> Any:  # fmt: skip
    """The base with one adapter trained on one image; `look` is called with it after each mark and says whether to stop."""
    from pondera.adapters import TLoraConfig
    from pondera.customize import glyphs
    from pondera.customize._denoisers import ATTENTION, repeat, trainable

    pipe = glyphs.base()
    made = trainable(pipe)
    torch.manual_seed(seed)
    pipe.unet.requires_grad_(False)
    least = rank // 2 if arm.masked else rank
    pipe.unet.add_adapter(TLoraConfig(r=rank, r_min=least, start=arm.start, target_modules=ATTENTION))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8, fused=True)
    image = glyphs.concept_image(concept)[None] * 2 - 1
    condition = repeat(made.prompt("a sks glyph"), BATCH)
    draw = Generator().manual_seed(seed)
    for step in range(1, max(marks, default=0) + 1):
        t = torch.randint(*arm.span, (BATCH,), generator=draw)
        noise = torch.randn(BATCH, *image.shape[1:], generator=draw)
        loss = made.loss(image.expand_as(noise), noise, t, condition)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step in marks and look(pipe):
            break
    return pipe


def looked_at(pipe: Any, concept: str, seed: int) -> dict[str, float]:
    """The figures of `WHAT` for the base as it is now adapted."""
    from pondera.customize import glyphs

    asked = [glyphs.prompt("sks glyph", background=b, position=p) for b, p in PLACES] + ["a sks glyph"] * NEUTRAL
    images = pipe(
        asked, num_inference_steps=12, guidance_scale=2.0, generator=Generator().manual_seed(seed), output_type="pt"
    ).images
    judge, found = glyphs.judges(), []
    for (background, position), image in zip(PLACES, images):
        said = judge.probability(image[None], glyph=concept, background=background, position=position)
        found.append([float(said[what]) for what in ("glyph", "background", "position")])
    shares = torch.tensor(found)
    neutral = float(judge.probability(images[len(PLACES) :], glyph=concept)["glyph"].mean())
    return dict(zip(WHAT, (neutral, float(shares.prod(1).mean()), *shares.mean(0).tolist())))


def _run(task: tuple[list[Any], int, float, str, int, list[int], bool]) -> dict[str, Looks]:
    """One run; T-LoRA's is looked at without its mask as well. With `short`, the last item, it ends where it is read."""
    from pondera.adapters import at_timestep

    torch.set_num_threads(1)
    (start, masked, span), rank, rate, concept, seed, marks, short = task
    arm = Arm(start, masked, span=tuple(span))
    found: dict[str, Looks] = {"as trained": {w: [] for w in WHAT}, "without mask": {w: [] for w in WHAT}}

    def look(pipe: Any) -> bool:
        for what, value in looked_at(pipe, concept, seed).items():
            found["as trained"][what].append(round(value, 4))
        if arm == T_LORA and not short:
            with at_timestep(pipe.unet, 0):
                for what, value in looked_at(pipe, concept, seed).items():
                    found["without mask"][what].append(round(value, 4))
        return short and found["as trained"]["neutral"][-1] >= ENOUGH

    train(arm, rank, rate, concept, seed, marks=marks, look=look)
    return found


def _runs(arm: Arm, rank: int, rates: Sequence[float], concepts: Sequence[str], seeds: Sequence[int], *,
          marks: Sequence[int] = MARKS, short: bool = False) -> list[Looks]:  # fmt: skip
    """Runs of an arm, rate by rate, concept by concept and seed by seed, each made once and kept on disk."""
    from pondera.customize.glyphs import _judge, _pipeline

    weights = hashlib.sha256(_pipeline.BASE.read_bytes() + _judge.WEIGHTS.read_bytes()).hexdigest()
    settings = f"{BATCH} {PLACES} {NEUTRAL} {ENOUGH} {__version__} {weights}"
    which = [arm.start, arm.masked, list(arm.span)]
    at = {rate: [round(m * 1e-3 / rate) for m in marks] for rate in rates}
    tasks = [[which, rank, rate, c, s, at[rate], short] for rate in rates for c in concepts for s in seeds]
    seen = "as trained" if arm.sampled_masked else "without mask"
    return [row[seen] for row in run_all("t-lora", _run, tasks, settings)]


def reading(run: Looks, what: str) -> float:
    """A figure of a run where its training prompt first shows the concept with the probability `ENOUGH`.

    >>> reading({"neutral": [0.2, 0.6, 1.0], "joint": [0.0, 0.4, 0.2]}, "joint")
    0.3
    """
    neutral, values = run["neutral"], run[what]
    k = next((k for k, p in enumerate(neutral) if p >= ENOUGH), None)
    if k is None or k == 0:
        return values[-1 if k is None else 0]
    share = (ENOUGH - neutral[k - 1]) / (neutral[k] - neutral[k - 1])
    return round(values[k - 1] + share * (values[k] - values[k - 1]), 6)


@cache
def rate_of(arm: Arm, rank: int) -> tuple[float, dict[str, float]]:
    """The rate with the best mean reading of the joint score on the concepts tuned on, and what each rate had.

    Sampled without its mask, T-LoRA is what it was trained to be, at T-LoRA's rate.
    """
    if arm == BARE:
        return rate_of(T_LORA, rank)
    found: dict[float, float] = {}

    def try_(rates: Sequence[float]) -> None:
        runs = _runs(arm, rank, rates, TUNED_ON, (TUNING_SEED,), short=True)
        for k, rate in enumerate(rates):
            mine = runs[k * len(TUNED_ON) : (k + 1) * len(TUNED_ON)]
            found[rate] = sum(reading(run, "joint") for run in mine) / len(mine)

    try_(RATES)
    best = max(found, key=found.__getitem__)
    if best in (min(RATES), max(RATES)):
        try_([round(best / 3.16, 6) if best == min(RATES) else round(best * 3.16, 6)])
        best = max(found, key=found.__getitem__)
    return best, {f"{rate:.2g}": round(v, 3) for rate, v in sorted(found.items())}


@cache
def judged(arm: Arm, rank: int) -> list[list[Looks]]:
    """The runs of an arm at its own rate: concept by concept, a run a seed; to the end at the rank `WHOLE`."""
    runs = _runs(arm, rank, [rate_of(arm, rank)[0]], TAUGHT, SEEDS, short=rank != WHOLE)
    return [runs[k : k + len(SEEDS)] for k in range(0, len(runs), len(SEEDS))]


def difference(lab: Lab, one: Arm, other: Arm, rank: int, read: Callable[[Looks], float]) -> Effect:
    """Of two arms, paired by concept and seed, the concepts taken as what is independent."""
    lab.draws(len(SEEDS))
    pairs = zip(judged(one, rank), judged(other, rank))
    return lab.nested([[read(a) - read(b) for a, b in zip(mine, theirs)] for mine, theirs in pairs])


def at_equal_fidelity(what: str) -> Callable[[Looks], float]:
    return lambda run: reading(run, what)


def at_the_end(what: str) -> Callable[[Looks], float]:
    return lambda run: run[what][-1]


def prompt_kept(run: Looks) -> float:
    """Mean of background and position after all steps."""
    return (run["background"][-1] + run["position"][-1]) / 2


def means(arms: Sequence[Arm], rank: int) -> dict[str, dict[str, float]]:
    """What the arms came to, read at equal fidelity, with their rates and in how many runs the concept was learnt."""
    found = {}
    for arm in arms:
        runs = [run for mine in judged(arm, rank) for run in mine]
        told = {what: round(sum(reading(run, what) for run in runs) / len(runs), 3) for what in WHAT}
        learnt = sum(max(run["neutral"]) >= ENOUGH for run in runs)
        found[NAMES[arm]] = told | {"learnt in": learnt, "of": len(runs), "rate": rate_of(arm, rank)[0]}
    return found


def over_lora(lab: Lab, method: Arm, rank: int) -> tuple[Part, dict[str, Effect]]:
    """The claim's part, and the difference to LoRA in the joint score and in each of its parts."""
    gaps = {what: difference(lab, method, LORA, rank, at_equal_fidelity(what)) for what in WHAT[1:]}
    return weigh(gaps["joint"], above=0), gaps


TUNED = (
    "each arm at the rate of its best joint score on four other concepts, batch 4, 260 steps at a rate of 1e-3 and in proportion at "
    "others, 8 concepts x 2 seeds nested by concept, read where the training prompt first shows the concept with a probability of "
    "0.8: "
)
NOTHING = Sham("LoRA itself under the method's name", LORA)


@claim(
    "At equal fidelity T-LoRA follows the prompt better than LoRA, at a high rank",
    source="Table 1, Sec. 4.2",
    budget="full",
    criterion=f"rank 32, {TUNED}the joint probability of concept, background and position of T-LoRA minus LoRA has its interval "
    "above 0",
    method=T_LORA,
    sham=NOTHING,
)
def ahead_of_lora_at_a_high_rank(lab: Lab, method: Arm) -> Finding:
    part, gaps = over_lora(lab, method, 32)
    lab.figure("trade-off", _figure(32))
    return conclude(
        part, gaps=gaps, means=means(tuple(NAMES), 32), tuning={NAMES[a]: rate_of(a, 32)[1] for a in TRAINED}
    )


@claim(
    "It does so at a low rank",
    source="Table 1 (ranks 4 to 16)",
    budget="full",
    criterion=f"rank 8, {TUNED}the joint probability of T-LoRA minus LoRA has its interval above 0",
    method=T_LORA,
    sham=NOTHING,
)
def ahead_of_lora_at_a_low_rank(lab: Lab, method: Arm) -> Finding:
    part, gaps = over_lora(lab, method, 8)
    arms = (LORA, T_LORA)
    return conclude(part, gaps=gaps, means=means(arms, 8), tuning={NAMES[a]: rate_of(a, 8)[1] for a in arms})


@claim(
    "Both parts help: the mask for LoRA, and the orthogonal start under the mask",
    source="Table 1 (Vanilla T-LoRA against LoRA and T-LoRA)",
    budget="full",
    criterion=f"rank 32, {TUNED}the joint probability of masked LoRA minus LoRA and that of T-LoRA minus masked LoRA have their "
    "intervals above 0; beside them, not decisive: the start without the mask, the mask on the orthogonal start, and the mask "
    "in sampling",
    method=(MASKED, T_LORA),
    sham=Sham("LoRA in the place of both", (LORA, LORA)),
)
def both_parts_help(lab: Lab, method: tuple[Arm, Arm]) -> Finding:
    masked, both = method
    joint = at_equal_fidelity("joint")
    gaps = {
        "mask for LoRA": difference(lab, masked, LORA, 32, joint),
        "orthogonal start under the mask": difference(lab, both, masked, 32, joint),
        "orthogonal start without mask": difference(lab, ORTHO, LORA, 32, joint),
        "mask on the orthogonal start": difference(lab, T_LORA, ORTHO, 32, joint),
        "mask in sampling": difference(lab, T_LORA, BARE, 32, joint),
    }
    parts = {name: weigh(gap, above=0) for name, gap in gaps.items()}
    return conclude(parts, central=list(parts)[:2], gaps=gaps)


@claim(
    "Trained on past the step where the concept is learnt, LoRA lets go of the prompt sooner than T-LoRA",
    source="Fig. 2 and Table 1, at one rate and length for both; here each at its own rate, the steps in proportion",
    budget="full",
    criterion="rank 32, the same runs at their end: the mean probability of background and position of T-LoRA minus LoRA has "
    "its interval above 0, and the probability of the concept under the training prompt has its interval above -0.1",
    method=T_LORA,
    sham=NOTHING,
)
def overfits_later(lab: Lab, method: Arm) -> Finding:
    kept = difference(lab, method, LORA, 32, prompt_kept)
    drawn = difference(lab, method, LORA, 32, at_the_end("neutral"))
    return conclude(
        {"prompt kept": weigh(kept, above=0), "concept drawn as well": weigh(drawn, above=-0.1)},
        prompt_kept=kept,
        concept_under_training_prompt=drawn,
        background=difference(lab, method, LORA, 32, at_the_end("background")),
        position=difference(lab, method, LORA, 32, at_the_end("position")),
    )


SPANS = ((0, 500), (800, 1000))


@claim(
    "Training at high timesteps only overfits most; at low ones only, the prompt is followed best and the concept least",
    source="Fig. 2, Sec. 3",
    budget="full",
    criterion="LoRA of rank 32 at its tuned rate, after 200 steps at 1e-3 or as many in proportion, 8 concepts, one seed each: the "
    "mean probability of background and position is higher for times of 0 to 499 than for 800 to 999, lower for 800 to 999 than "
    "for all times, and the probability of the concept is lower for 0 to 499 than for all times (intervals)",
    method=SPANS,
    sham=Sham("all times in the place of both spans", ((0, 1000), (0, 1000))),
)
def high_timesteps_overfit(lab: Lab, spans: tuple[tuple[int, int], tuple[int, int]]) -> Finding:
    lab.draws(1)
    rate, last = rate_of(LORA, 32)[0], MARKS.index(200)
    every = [{what: values[: last + 1] for what, values in runs[0].items()} for runs in judged(LORA, 32)]
    low, high = (
        every
        if span == LORA.span
        else _runs(Arm("lora", False, span=span), 32, [rate], TAUGHT, SEEDS[:1], marks=(200,))
        for span in spans
    )
    kept = {name: [prompt_kept(r) for r in runs] for name, runs in (("low", low), ("high", high), ("all", every))}
    drawn = {name: [r["concept"][-1] for r in runs] for name, runs in (("low", low), ("high", high), ("all", every))}
    gaps = {
        "prompt, low minus high": lab.effect(kept["low"], kept["high"]),
        "prompt, high minus all": lab.effect(kept["high"], kept["all"]),
        "concept, low minus all": lab.effect(drawn["low"], drawn["all"]),
    }
    parts = {name: weigh(gap, above=0) if k == 0 else weigh(gap, below=0) for k, (name, gap) in enumerate(gaps.items())}
    share = {what: {n: sum(v) / len(v) for n, v in by.items()} for what, by in (("prompt", kept), ("concept", drawn))}
    return conclude(parts, gaps=gaps, means=share)


@claim(
    "Ortho-LoRA uses its full rank where LoRA's effective rank is below half",
    source="Fig. 4, Sec. 3.3",
    budget="full",
    criterion="r = 32, 40 steps at 1e-3, 5 seeds: mean over layers of the effective rank (least k whose top k singular values are "
    "95% of the sum) of the trained up matrix is at least 0.9 r for Ortho-LoRA and below 0.5 r for LoRA, in every seed; and "
    "(ours, as the start alone gives the up matrix its rank) that of the change of the layer's weight (none where it is within "
    "rounding) is larger for Ortho-LoRA (interval)",
    method=40,
    sham=Sham("no training: no step in the place of 40", 0),
)
def full_rank_is_used(lab: Lab, steps: int) -> Finding:
    rank = 32
    up: dict[str, list[float]] = {}
    change: dict[str, list[float]] = {}
    for arm in (LORA, ORTHO):
        for seed in lab.seeds:
            pipe = train(arm, rank, 1e-3, TUNED_ON[seed % len(TUNED_ON)], seed, marks=(steps,) if steps else ())
            cores = [m for m in pipe.unet.modules() if type(m).__name__ == "TLora"]
            with torch.no_grad():
                ups = [effective_rank(core.P) / rank for core in cores]
                changes = [effective_rank(changed(core)) / rank for core in cores]
            up.setdefault(NAMES[arm], []).append(round(sum(ups) / len(ups), 3))
            change.setdefault(NAMES[arm], []).append(round(sum(changes) / len(changes), 3))
    more = lab.effect(change["Ortho-LoRA"], change["LoRA"])
    return conclude(
        {
            "up matrix full": met(min(up["Ortho-LoRA"]) >= 0.9),
            "LoRA's below half": met(max(up["LoRA"]) < 0.5),
            "the change has more": weigh(more, above=0),
        },
        share_of_rank=up,
        change_over_rank=change,
    )


def changed(core: Any) -> Tensor:
    """The change of the layer's weight; zeros where it is no more than the rounding of its factors' product."""
    left, right = core.factors()
    delta: Tensor = core.delta()
    return delta if delta.norm() > 1e-5 * left.norm() * right.norm() else torch.zeros_like(delta)


def effective_rank(matrix: Tensor, share: float = 0.95) -> int:
    """Least k whose k largest singular values make `share` of their sum; 0 for a matrix of zeros.

    >>> effective_rank(torch.diag(torch.tensor([8.0, 1.0, 1.0])), 0.9)
    2
    """
    s = torch.linalg.svdvals(matrix)
    return int((s.cumsum(0) < share * s.sum() - 1e-6).sum()) + 1 if s.sum() > 0 else 0


def _figure(rank: int) -> Any:
    """The whole trade-off: fidelity against the prompt, mark by mark, with intervals over concepts."""
    from matplotlib.figure import Figure

    from pondera.replications import nested

    fig = Figure(figsize=(9.5, 4.4), layout="constrained")
    axes = fig.subplots(1, 2, sharex=True)
    for i, (arm, name) in enumerate(NAMES.items()):
        by: dict[str, list[Effect]] = {}
        for what in ("neutral", "joint", "kept"):
            for k in range(len(MARKS)):
                value = lambda run, k=k, what=what: (  # noqa: E731
                    (run["background"][k] + run["position"][k]) / 2 if what == "kept" else run[what][k]
                )
                by.setdefault(what, []).append(nested([[value(run) for run in mine] for mine in judged(arm, rank)]))
        x = [e.mean for e in by["neutral"]]
        for ax, what in zip(axes, ("joint", "kept")):
            y = [e.mean for e in by[what]]
            half = [e.high - e.mean for e in by[what]]
            ax.errorbar(x, y, yerr=half, color=f"C{i}", lw=1.2, elinewidth=0.6, marker="o", ms=3, label=name)
    axes[0].set_ylabel("concept, background and position all right")
    axes[1].set_ylabel("background and position as the prompt says")
    axes[0].legend(fontsize=8, frameon=False)
    for ax in axes:
        ax.set_xlabel("the training prompt shows the concept")
        ax.axvline(ENOUGH, color="0.6", lw=0.8, ls=":")
        ax.grid(alpha=0.3)
    fig.suptitle(
        f"Along training, rank {rank}, each at its own rate; 8 concepts, 95% intervals",
        fontsize=10,
    )
    return fig

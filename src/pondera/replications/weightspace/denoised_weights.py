"""Denoised weights (arXiv 2407.11966): steps saved by starting from generated weights, beside the starts that cost nothing."""

import math
from collections.abc import Callable
from functools import cache
from itertools import product

import torch
from torch import Generator, Tensor, nn

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.weightspace import WeightDiffusion, start_states
from pondera.weightspace.denoised_weights import cosine_schedule, ddim

States = dict[str, Tensor]
Told = Callable[[Tensor], Tensor]  # embeddings of the tasks as the generator is told them

# -- the sampler ---------------------------------------------------------------------------------------------------------


def exact_mean(kept: Tensor, mean: Tensor, spread: float) -> Callable[[Tensor, int], Tensor]:
    """What clean blocks are expected to be, given noisy ones, where they are normal around a mean."""

    def denoise(x: Tensor, t: int) -> Tensor:
        signal, noise = kept[t].double(), 1 - kept[t].double()
        gain = spread**2 * signal.sqrt() / (spread**2 * signal + noise)
        return mean + gain * (x - signal.sqrt() * mean)

    return denoise


def noise_kept(denoise: Callable[[Tensor, int], Tensor], x: Tensor, kept: Tensor, steps: int) -> Tensor:
    """Steps that add the first noise back instead of the one that is left."""
    times, first = torch.linspace(len(kept) - 1, 0, steps + 1).round().long().tolist()[:-1], x
    for t in times:
        clean = denoise(x, t)
        x = kept[t].sqrt() * clean + (1 - kept[t]).sqrt() * first
    return x


@claim(
    "One step from noise gives the mean of the weights of a task, that is a regression; many steps draw weights as they vary",
    source="the one-step sampling of the abstract; that it is a regression follows from the loss (ours)",
    criterion="blocks of 8 entries, normal around a mean that is linear in the task's embedding, with deviation 0.5; exact denoiser in "
    "place of a trained one; 2,000 samples: one step within 0.03 of the mean in every entry and spread below 0.03; 100 steps: "
    "mean within 0.05 and deviation within 5% of 0.5, in each of 5 seeds",
    method=ddim,
    sham=Sham("steps that add the first noise back instead of what is left of it", noise_kept),
)
def one_step_is_a_regression(lab: Lab, sampler: Callable[..., Tensor]) -> Finding:
    kept = cosine_schedule(1000)
    rows = []
    for seed in lab.seeds:
        g = lab.generator(seed)
        mean = torch.randn(8, 3, generator=g, dtype=torch.float64) @ torch.randn(3, generator=g, dtype=torch.float64)
        noise = torch.randn(2000, 8, generator=g, dtype=torch.float64)
        one, many = (sampler(exact_mean(kept, mean, 0.5), noise, kept, steps) for steps in (1, 100))
        off = [float((x.mean(0) - mean).abs().max()) for x in (one, many)]
        rows.append([float((one - mean).abs().max()), float(one.std(0).max()), off[1], float(many.std(0).mean())])
    farthest, spread, off_many, deviation = zip(*rows, strict=True)
    return conclude(
        {
            "one step is the mean": met(max(farthest) < 0.03 and max(spread) < 0.03),
            "many steps draw": met(max(off_many) < 0.05 and all(abs(d / 0.5 - 1) < 0.05 for d in deviation)),
        },
        one_step_farthest=farthest,
        one_step_deviation=spread,
        many_steps_off=off_many,
        many_steps_deviation=deviation,
    )


# -- starts for new tasks ------------------------------------------------------------------------------------------------

COLLECTION, CHOOSE, TEST, TRAINING, LONGEST, AIM = 300, 10, 20, 200, 200, 3e-3
RATES = (3e-3, 1e-2, 3e-2, 0.1, 0.3)
X = torch.linspace(-1, 1, 64).unsqueeze(1)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def tasks(n: int, g: Generator) -> tuple[Tensor, Tensor]:
    """Sines a sin(b x + c) at 64 points, and their embeddings (a, b, cos c, sin c), scaled."""
    a, b, c = (torch.rand(n, generator=g) for _ in range(3))
    a, b, c = 0.5 + a, 2 + 4 * b, 2 * math.pi * c
    y = a[:, None] * torch.sin(b[:, None] * X.T + c[:, None])
    return y, torch.stack([3 * (a - 1), (b - 4) / 1.2, 1.4 * c.cos(), 1.4 * c.sin()], 1)


def outputs(p: States) -> Tensor:
    h = torch.tanh(X @ p["0.weight"].mT + p["0.bias"].unsqueeze(1))
    h = torch.tanh(h @ p["2.weight"].mT + p["2.bias"].unsqueeze(1))
    return (h @ p["4.weight"].mT + p["4.bias"].unsqueeze(1)).squeeze(-1)


def train(start: States, y: Tensor, steps: int, rate: float | Tensor) -> tuple[States, Tensor]:
    """Nets trained side by side by Adam, each at its rate; and their losses, (steps + 1, nets)."""
    p = {n: v.detach().clone().requires_grad_() for n, v in start.items()}
    first, second = ({n: torch.zeros_like(v) for n, v in p.items()} for _ in range(2))
    rates = torch.as_tensor(rate).expand(len(y))
    losses = []
    for i in range(steps + 1):
        loss = (outputs(p) - y).square().mean(1)
        losses.append(loss.detach())
        if i < steps:
            grads = torch.autograd.grad(loss.sum(), list(p.values()))
            with torch.no_grad():
                for (n, v), g in zip(p.items(), grads, strict=True):
                    first[n].lerp_(g, 0.1)
                    second[n].lerp_(g * g, 0.01)
                    size = (second[n] / (1 - 0.99 ** (i + 1))).sqrt() + 1e-8
                    v.sub_(rates.view(-1, *[1] * (v.ndim - 1)) * first[n] / (1 - 0.9 ** (i + 1)) / size)
    return {n: v.detach() for n, v in p.items()}, torch.stack(losses)


def copies(states: States, n: int) -> States:
    return {name: x.expand(n, *x.shape[1:]).clone() for name, x in states.items()}


@cache
def library(seed: int) -> tuple[States, States, Tensor, WeightDiffusion]:
    """A base, nets trained from it for 300 tasks, the tasks' embeddings, and a generator of such nets."""
    g = torch.Generator().manual_seed(seed)
    middle, _ = tasks(1, g)
    base, _ = train(start_states(net, 1, g), middle, 300, 1e-2)
    y, told = tasks(COLLECTION, g)
    nets, _ = train(copies(base, COLLECTION), y, TRAINING, 1e-2)
    torch.manual_seed(seed)
    model = WeightDiffusion(nets, 4, block=64, hidden=128)
    adam = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = 1200
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        loss = model.loss(nets, told, g, batch=128)
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    return base, nets, told, model


def regressed(nets: States, told: Tensor, new: Tensor, model: WeightDiffusion) -> States:
    """Kernel ridge regression of the weights on the embedding; width and ridge by the error of leaving one out."""
    blocks = model.blocks.pack(nets)
    flat, best = blocks.flatten(1), (math.inf, torch.empty(0), 1.0)
    for width, ridge in product((0.5, 1.0, 2.0, 4.0), (1e-4, 1e-3, 1e-2, 1e-1)):
        kernel = torch.exp(-torch.cdist(told, told).square() / (2 * width**2))
        inverse = torch.linalg.inv((kernel + ridge * torch.eye(len(told))).double())
        solved = inverse @ flat.double()
        error = float((solved / inverse.diagonal().unsqueeze(1)).square().mean())
        best = min(best, (error, solved.float(), width), key=lambda b: b[0])
    near = torch.exp(-torch.cdist(new, told).square() / (2 * best[2] ** 2))
    return model.blocks.unpack((near @ best[1]).view(len(new), *blocks.shape[1:]))


Found = dict[str, tuple[float, float, float]]  # of every start: mean steps, the rate, how far from the nearest net


def new_tasks(seed: int) -> tuple[Tensor, Tensor, Generator]:
    g = torch.Generator().manual_seed(1000 + seed)
    y, told = tasks(CHOOSE + TEST, g)
    return y, told, g


def steps_needed(seed: int, starts: dict[str, States]) -> Found:
    """Steps to the aim on new tasks from every start, each at the rate that is best on other new tasks; and how far (in
    deviations of an entry) starts are from the nearest net of the collection."""
    _, nets, _, model = library(seed)
    n, many = CHOOSE + TEST, len(starts) * len(RATES)
    every = {name: torch.cat([s[name] for s in starts.values() for _ in RATES]) for name in nets}
    rates = torch.tensor(RATES).repeat_interleave(n).repeat(len(starts))
    _, losses = train(every, new_tasks(seed)[0].repeat(many, 1), LONGEST, rates)
    there = losses <= AIM
    steps = torch.where(there.any(0), there.int().argmax(0), LONGEST).double().view(len(starts), len(RATES), n)
    at = steps[..., :CHOOSE].mean(2).argmin(1).tolist()
    packed = model.blocks.pack(nets).flatten(1)
    found = {}
    for i, (s, w) in enumerate(starts.items()):
        apart = torch.cdist(model.blocks.pack(w).flatten(1), packed).amin(1).mean() / math.sqrt(model.blocks.entries)
        found[s] = float(steps[i, at[i], CHOOSE:].mean()), RATES[at[i]], float(apart)
    return found


@cache
def from_free_starts(seed: int) -> Found:
    base, nets, told, model = library(seed)
    _, new, g = new_tasks(seed)
    n, nearest = len(new), torch.cdist(new, told).argmin(1)
    return steps_needed(
        seed,
        {
            "scratch": start_states(net, n, g),
            "base": copies(base, n),
            "mean": copies({name: x.mean(0, keepdim=True) for name, x in nets.items()}, n),
            "nearest": {name: x[nearest] for name, x in nets.items()},
            "regression": regressed(nets, told, new, model),
        },
    )


@cache
def from_generated(seed: int, tell: Told) -> Found:
    model, (_, new, g) = library(seed)[3], new_tasks(seed)
    return steps_needed(seed, {f"generated, {k} step{'s' * (k > 1)}": model.sample(tell(new), g, k) for k in (1, 50)})


def truly(embeddings: Tensor) -> Tensor:
    return embeddings


def of_another(embeddings: Tensor) -> Tensor:
    return embeddings.roll(1, 0)


SETTING = (
    "sines a sin(b x + c) by tanh nets 1-16-16-1, told as (a, b, cos c, sin c); 300 nets trained 200 steps from one base; "
    "weights generated in blocks of 64 (1,200 steps of a denoiser); 20 new tasks, Adam at the best of five rates, 0.003 to "
    "0.3, for each start (10 other new tasks), steps until the mean squared error is 0.003, at most 200; logs of mean "
    "steps, 5 seeds (collection, generator and tasks): "
)


def logs(lab: Lab, tell: Told, over: str) -> list[float]:
    one = "generated, 1 step"
    return [
        math.log(from_generated(s, tell)[one][0] / (from_free_starts(s) | from_generated(s, tell))[over][0])
        for s in lab.seeds
    ]


def figures(lab: Lab, tell: Told) -> dict[str, object]:
    runs = [from_free_starts(s) | from_generated(s, tell) for s in lab.seeds]
    return {
        "steps": {start: [r[start][0] for r in runs] for start in runs[0]},
        "rates": {start: [r[start][1] for r in runs] for start in runs[0]},
        "from_the_nearest_net": {start: sum(r[start][2] for r in runs) / len(runs) for start in runs[0]},
    }


@claim(
    "A new task started from generated weights needs a fraction of the steps from scratch",
    source="abstract (15 times less time; there GANs for image editing, LoRA weights)",
    criterion=SETTING + "generated in one step over scratch: 95% interval below log(1/4)",
    budget="full",
    method=truly,
    sham=Sham("weights generated for another task", of_another),
)
def fraction_of_the_steps_from_scratch(lab: Lab, tell: Told) -> Finding:
    ratio = lab.effect(logs(lab, tell, "scratch"))
    return conclude(
        weigh(ratio, below=math.log(0.25)),
        log_ratio=ratio,
        ratio=math.exp(ratio.mean),
        **figures(lab, tell),
    )


@claim(
    "It needs fewer than the starts that a collection gives without a generator",
    source="ours: the base all nets were trained from, the mean of the collection, the net of the nearest task, a regression",
    criterion=SETTING
    + "generated in one step over base, over mean, over nearest and over kernel ridge regression of the weights on the "
    "embedding: four 95% intervals below 0",
    budget="full",
    method=truly,
    sham=Sham("weights generated for another task", of_another),
)
def fewer_than_free_starts(lab: Lab, tell: Told) -> Finding:
    ratios = {over: lab.effect(logs(lab, tell, over)) for over in ("base", "mean", "nearest", "regression")}
    return conclude(
        {f"than from {over}": weigh(e, below=0) for over, e in ratios.items()},
        log_ratios=ratios,
        one_step_over_fifty=lab.effect(logs(lab, tell, "generated, 50 steps")),
        **figures(lab, tell),
    )

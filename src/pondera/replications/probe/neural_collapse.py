"""Neural collapse in deep linear heads (arXiv 2301.00437): do lengths, angles and vanishing classes come as predicted?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pondera.probe.neural_collapse import (
    DeepLinearGeometry,
    NeuralCollapse,
    deep_linear_geometry,
    frame_distance,
    neural_collapse,
)
from pondera.replications import Finding, Lab, Sham, claim, conclude

Geometry = Callable[..., DeepLinearGeometry]
Penalty = Callable[[Sequence[Tensor]], Tensor]


# -- what is put in the method's place ---------------------------------------------------------------------------------


def of_equal_classes(
    counts: Sequence[int], layers: int, lambda_W: float, lambda_H: float, *, bias: bool = False
) -> DeepLinearGeometry:
    """The prediction for as many examples in classes of one size."""
    even = [sum(counts) // len(counts)] * len(counts)
    return deep_linear_geometry(even, layers, lambda_W, lambda_H, bias=bias)


def without_bias(
    counts: Sequence[int], layers: int, lambda_W: float, lambda_H: float, *, bias: bool = False
) -> DeepLinearGeometry:
    """The prediction for a head that has none."""
    return deep_linear_geometry(counts, layers, lambda_W, lambda_H)


def by_largest_root(
    counts: Sequence[int], layers: int, lambda_W: float, lambda_H: float, *, bias: bool = False
) -> DeepLinearGeometry:
    """Every class at the largest stationary point it has, also where zero has the lower loss, as in the authors' code."""
    m, n = layers, torch.tensor(counts, dtype=torch.float64)
    b = m * n.sum() * (n.sum() * lambda_H * lambda_W**m) ** (1 / m)
    low = torch.full_like(n, (m - 1) / (m + 1)) ** (1 / m)  # where the left side below is largest
    there = m * low ** (m - 1) > b / n * (low**m + 1) ** 2
    high = (m * n / b) ** (1 / (m + 1))
    for _ in range(80):
        middle = (low + high) / 2
        above = m * middle ** (m - 1) > b / n * (middle**m + 1) ** 2
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    x = torch.where(there, low**m, 0.0)
    return replace(deep_linear_geometry(counts, layers, lambda_W, lambda_H), outputs=(x / (x + 1)).diag())


def squares(parts: Sequence[Tensor]) -> Tensor:
    """Half the sum of squares of weights and features, a run: what the theorems have decayed."""
    return torch.stack([p.square().sum((-2, -1)) for p in parts]).sum(0) / 2


def nothing(parts: Sequence[Tensor]) -> Tensor:
    """No decay."""
    return 0.0 * squares(parts)


NO_DECAY = Sham("training without decay of weights and features", nothing)


# -- free features -----------------------------------------------------------------------------------------------------


def squared(out: Tensor, y: Tensor) -> Tensor:
    """Half the squared error, a run."""
    return (out - y).square().sum((1, 2)) / (2 * y.shape[1])


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    return -(out.log_softmax(1) * y).sum((1, 2)) / y.shape[1]


@dataclass(frozen=True)
class Ends:
    """Where runs ended, one a row. loss: with the decay; layers: each linear layer; features: all of them."""

    loss: Tensor
    layers: list[Tensor]
    product: Tensor
    means: Tensor
    features: Tensor
    outputs: Tensor

    def alone(self, i: int) -> "Ends":
        """One run of them."""
        one = slice(i, i + 1)
        rest = (t[one] for t in (self.product, self.means, self.features, self.outputs))
        return Ends(self.loss[one], [w[one] for w in self.layers], *rest)


@cache
def descend(
    counts: tuple[int, ...],
    layers: int,
    decay: tuple[float, ...],
    seeds: tuple[int, ...],
    *,
    bias: bool = False,
    fit: Callable[[Tensor, Tensor], Tensor] = squared,
    penalty: Penalty = squares,
    steps: int = 1500,
    width: int = 12,
    rate: float = 0.1,
) -> Ends:
    """Free features and linear layers under gradient descent with momentum, the runs side by side, float64.

    `decay` is that of all weights and features, one a seed. The start is Gaussian at the scale of the authors' code (weights 0.1
    at width 64, so 0.8 / sqrt(width)); the rate is 0.1, lowered over the last half.
    """
    runs, classes = len(seeds), len(counts)
    y = torch.eye(classes, dtype=torch.float64).repeat_interleave(torch.tensor(counts), 1)
    n = y.shape[1]
    sizes = [n] + [width] * layers + [classes]
    sources = [torch.Generator().manual_seed(s) for s in seeds]
    params = [
        torch.stack([torch.randn(b, a, generator=g, dtype=torch.float64) for g in sources]) * 0.8 / width**0.5
        for a, b in pairwise(sizes)
    ]
    params.append(torch.zeros(runs, classes, 1, dtype=torch.float64))
    for p in params:
        p.requires_grad_()
    strength = torch.tensor(decay, dtype=torch.float64)

    def objective() -> Tensor:
        out = params[0]
        for w in params[1:-1]:
            out = w @ out
        return fit(out + params[-1], y) + strength * penalty(params[:-1])

    # the features of one example meet a gradient 1 / n of that of a weight: their rate makes up for it
    groups = [{"params": params[:1], "lr": rate * n / classes}, {"params": params[1 : len(params) - (not bias)]}]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps // 2)
    for step in range(steps):
        optimizer.zero_grad()
        objective().sum().backward()
        optimizer.step()
        if step >= steps // 2:
            schedule.step()
    with torch.no_grad():
        features, *weights, offset = (p.detach() for p in params)
        product = weights[0]
        for w in weights[1:]:
            product = w @ product
        means = torch.stack([f.mean(2) for f in features.split(list(counts), 2)], 1)
        return Ends(objective(), weights, product, means, features, product @ means.mT + offset)


DECAY, STARTS = 0.005, 20


def free(lab: Lab, counts: tuple[int, ...], layers: int, **kw: Any) -> Ends:
    return descend(counts, layers, (DECAY,) * len(lab.seeds), tuple(lab.seeds), **kw)


def errors(run: Ends, weights: Tensor, means: Tensor, loss: Tensor) -> dict[str, float]:
    """Largest error over the runs against predicted Gram matrices (relative to their norm) and the predicted loss."""
    gaps = {
        name: float((torch.linalg.matrix_norm(found @ found.mT - wanted) / wanted.norm()).max())
        for name, found, wanted in (("weights", run.product, weights), ("means", run.means, means))
    }
    return gaps | {"loss": float((run.loss / loss - 1).abs().max())}


def close(gaps: dict[str, float]) -> bool:
    return gaps["weights"] < 0.01 and gaps["means"] < 0.01 and gaps["loss"] < 0.001


@claim(
    "Balanced or not, weights and class means of a linear head without bias end as the predicted orthogonal frame, "
    "lengths included",
    source="abstract; the theorems on squared loss without bias",
    criterion="free features under gradient descent, classes of 10, 10, 10, 10 and of 20, 12, 6, 4 examples, 1 and 3 layers, "
    "decay 0.005, 5 random starts each: Gram matrices of the product of the layers and of the class means within 1% of the "
    "predicted ones (Frobenius norm), loss within 0.1%, in every run",
    method=deep_linear_geometry,
    sham=Sham("the prediction for as many examples in classes of one size", of_equal_classes),
)
def orthogonal_frame(lab: Lab, geometry: Geometry) -> Finding:
    gaps = {}
    for name, counts in (("balanced", (10, 10, 10, 10)), ("imbalanced", (20, 12, 6, 4))):
        for layers in (1, 3):
            wanted = geometry(counts, layers, DECAY, DECAY)
            run = free(lab, counts, layers)
            gaps[f"{name}, layers: {layers}"] = errors(run, wanted.weight_gram, wanted.mean_gram, wanted.loss)
    return conclude({name: close(of) for name, of in gaps.items()}, largest_error=gaps)


def to_simplex(run: Ends) -> dict[str, float]:
    """Largest distance over the runs of the two Gram matrices, scaled to norm 1, from that of a simplex."""
    k = run.product.shape[1]
    ideal = torch.eye(k, dtype=torch.float64) - 1 / k
    return {
        name: max(float(frame_distance(a @ a.T, ideal)) for a in found)
        for name, found in (("weights to simplex", run.product), ("means to simplex", run.means))
    }


@claim(
    "With a bias and balanced classes they end as a simplex",
    source="abstract; the theorem on squared loss with a bias",
    criterion="as before, four classes of 10, 1 and 3 layers with a bias, 5 random starts each: Gram matrices within 1% of the "
    "predicted ones and within 0.01 (scaled to norm 1) of that of a simplex, loss within 0.1%, in every run",
    method=deep_linear_geometry,
    sham=Sham("the prediction for a head without a bias", without_bias),
)
def simplex_with_bias(lab: Lab, geometry: Geometry) -> Finding:
    gaps, parts = {}, {}
    for layers in (1, 3):
        run, wanted = free(lab, (10,) * 4, layers, bias=True), geometry((10,) * 4, layers, DECAY, DECAY, bias=True)
        away = to_simplex(run)
        gaps[layers] = errors(run, wanted.weight_gram, wanted.mean_gram, wanted.loss) | away
        parts[f"as predicted, layers: {layers}"] = close(gaps[layers])
        parts[f"a simplex, layers: {layers}"] = max(away.values()) < 0.01
    return conclude(parts, largest_error=gaps)


def under_cross_entropy(n: int, classes: int, layers: int, decay: float) -> tuple[float, float]:
    """The minimum for n examples a class: singular value of every layer in its K - 1 directions, and the objective.

    Logits are s times a simplex, of K - 1 singular values s sqrt(n); decay is least when layers and features share them alike. So s
    minimises log(1 + (K - 1) e^-s) + decay (M + 1) (K - 1) (s sqrt(n))^(2 / (M + 1)) / 2, a problem of one number.
    """
    s = torch.linspace(0, 40, 4_000_001, dtype=torch.float64)
    value = torch.log1p((classes - 1) * (-s).exp())
    value += decay / 2 * (layers + 1) * (classes - 1) * (s * n**0.5) ** (2 / (layers + 1))
    best = int(value.argmin())
    return float((s[best] * n**0.5) ** (1 / (layers + 1))), float(value[best])


@claim(
    "With cross-entropy and balanced classes features collapse, and weights and class means end as a simplex, through all layers",
    source="abstract; the theorem on cross-entropy. Its lengths are derived here (the minimum is a problem of one number)",
    criterion="free features under gradient descent, four classes of 10, 1 and 3 layers without bias, decay 0.005, in the lowest of "
    "20 runs from random starts (the theorem is on the global minimum): scatter of features about class means below 1% of that of the "
    "class means; Gram matrices of the product of the layers and of the class means within 0.01 (scaled to norm 1) of that of a "
    "simplex; product and class means (scaled to norm 1) within 0.01 of each other; every layer with three singular values within 1% "
    "of the predicted one and the others below 1% of it; loss within 0.1% of the predicted one",
    method=squares,
    sham=NO_DECAY,
)
def simplex_with_cross_entropy(lab: Lab, penalty: Penalty) -> Finding:
    gaps, there = {}, {}
    parts: dict[str, bool] = {}
    lowest: dict[int, dict[str, float]] = {}
    starts = tuple(lab.draws(STARTS))
    for layers in (1, 3):
        every = descend((10,) * 4, layers, (DECAY,) * STARTS, starts, fit=cross_entropy, penalty=penalty)
        size, loss = under_cross_entropy(10, 4, layers, DECAY)
        there[layers] = float(((every.loss / loss - 1).abs() < 0.001).double().mean())
        run = every.alone(int(every.loss.argmin()))
        around = (run.features - run.means.mT.repeat_interleave(10, 2)).square().sum((1, 2)) / 10
        values = [torch.linalg.svdvals(w) / size for w in run.layers]
        gaps[layers] = of = to_simplex(run) | {
            "scatter": float((around / run.means.square().sum((1, 2))).max()),
            "weights to means": max(float(frame_distance(a, b)) for a, b in zip(run.product, run.means, strict=True)),
            "singular values": max(float((v[:, :3] - 1).abs().max()) for v in values),
            "the others": max(float(v[:, 3:].max()) for v in values),
            "loss": float((run.loss / loss - 1).abs().max()),
        }
        parts |= {
            f"features collapse, layers: {layers}": of["scatter"] < 0.01,
            f"a simplex, layers: {layers}": max(of["weights to simplex"], of["means to simplex"]) < 0.01,
            f"weights as means, layers: {layers}": of["weights to means"] < 0.01,
            f"every layer as predicted, layers: {layers}": max(of["singular values"], of["the others"]) < 0.01,
            f"lowest loss, layers: {layers}": of["loss"] < 0.001,
        }
        lowest[layers] = {"simplex": loss, "found": float(run.loss), "directions": int((values[0][0] > 0.01).sum())}
    note = "; ".join(
        f"with {layers} layers the simplex is not the lowest minimum: its loss is {of['simplex']:.4f}, and {of['found']:.4f} was "
        f"found with class means in {of['directions']} directions, not 3 (decay through many layers puts a price on directions)"
        for layers, of in lowest.items()
        if of["found"] < 0.999 * of["simplex"]
    )
    return conclude(parts, note=note, error=gaps, loss=lowest, share_of_runs_that_end_there=there)


RATIOS = (1.15, 1.05, 0.95, 0.85)


@claim(
    "Rare classes vanish below the predicted number of examples",
    source="the imbalanced theorem (minority collapse)",
    criterion="classes of 24, 12 and 4 examples, 1, 2 and 3 layers, decay such that the predicted threshold is 4 / 1.15, "
    "4 / 1.05, 4 / 0.95 and 4 / 0.85: in the lowest of 20 runs from random starts the output W h of the third class for itself "
    "is within 0.02 of the predicted one, which is 0 in the last two cases and above 0 in the first two",
    method=deep_linear_geometry,
    sham=Sham("every class at its largest stationary point, also where zero has the lower loss", by_largest_root),
)
def rare_classes_vanish(lab: Lab, geometry: Geometry) -> Finding:
    counts, rows, kept = (24, 12, 4), {}, {}
    parts: dict[str, bool] = {}
    starts = lab.draws(STARTS)
    for layers in (1, 2, 3):
        unit = float(geometry(counts, layers, 1.0, 1.0).threshold)  # grows like decay^((M + 1) / M)
        decays = [(4 / ratio / unit) ** (layers / (layers + 1)) for ratio in RATIOS]
        run = descend(counts, layers, tuple(d for d in decays for _ in starts), tuple(starts) * len(decays))
        losses, outputs = (part.view(len(decays), STARTS) for part in (run.loss, run.outputs[:, 2, 2]))
        for ratio, decay, loss, found in zip(RATIOS, decays, losses, outputs, strict=True):
            wanted = float(geometry(counts, layers, decay, decay).outputs[2, 2])
            best, name = float(found[loss.argmin()]), f"layers: {layers}, n = {ratio} threshold"
            rows[name] = {"predicted": wanted, "found": best}
            kept[name] = float((found > 0.01).double().mean())
            parts[name] = abs(best - wanted) < 0.02 and (wanted > 0) == (ratio > 1)
    below = {
        layers: [v for k, v in kept.items() if k.startswith(f"layers: {layers}") and " 1." not in k]
        for layers in (1, 2, 3)
    }
    deep = below[2] + below[3]
    return conclude(
        parts,
        note="The threshold is that of the lowest minimum. With 2 or 3 layers a class may live on below it in a local "
        f"minimum, as it did in {min(deep):.0%} to {max(deep):.0%} of single runs; with one layer in {max(below[1]):.0%}.",
        output_of_rare_class=rows,
        share_of_runs_that_keep_it=kept,
    )


# -- trained networks --------------------------------------------------------------------------------------------------

COUNTS = (5, 5, 10, 10, 15, 15, 20, 20, 25, 25)  # the authors' proportions: 100, 100, 200, ..., 500
EVEN = (15,) * 10
DECAYS = {1: 0.01, 3: 0.004}
STEPS, WIDTH = 1500, 64


@cache
def network(
    layers: int,
    seed: int,
    decay: float,
    counts: tuple[int, ...] = COUNTS,
    fit: str = "squared",
    penalty: Penalty = squares,
) -> NeuralCollapse:
    """The collapse of a ReLU net with a deep linear head on digits, trained as in the authors' code."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    rows = torch.cat([(y == k).nonzero().flatten()[:n] for k, n in enumerate(counts)])
    x, y = x[rows], y[rows]
    torch.manual_seed(seed)
    sizes = [64, WIDTH, WIDTH, WIDTH]
    body = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    linear = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers - 1)] + [nn.Linear(WIDTH, 10, bias=False)]
    for layer in linear:
        nn.init.orthogonal_(layer.weight)
    head = nn.Sequential(*linear)
    net = nn.Sequential(nn.Sequential(*body, nn.Linear(WIDTH, WIDTH)), head)
    wanted = nn.functional.one_hot(y, 10).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        features = net[0](x)
        out = head(features)
        if fit == "squared":
            loss = (out - wanted).square().sum() / (2 * len(x))
        else:
            loss = nn.functional.cross_entropy(out, y)
        loss = loss + decay * penalty([features, *(layer.weight for layer in linear)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return neural_collapse(net, x, y, layer="1")


NET = f"three ReLU layers of width 64 and a linear one, full steps of Adam ({STEPS:,}), "


@claim(
    "A trained ReLU network with imbalanced classes ends with the predicted geometry",
    source="experiments with imbalanced data (authors' code: an MLP with ReLU layers before the linear ones, decay on the "
    "features and the linear layers only)",
    criterion="150 digits, 5 to 25 a class, "
    + NET
    + "heads of 1 (decay 0.01) and 3 (decay 0.004) linear layers without bias, "
    "squared loss, in each of 5 seeds: NC1 below 0.01; Gram matrices of "
    "weights and class means within 0.1 (scaled to norm 1) of the predicted ones and nearer to them than to a frame of equal "
    "lengths; every length within 10% of the predicted one",
    budget="full",
    method=deep_linear_geometry,
    sham=Sham("the prediction for as many examples in classes of one size", of_equal_classes),
)
def trained_network(lab: Lab, geometry: Geometry) -> Finding:
    rows: dict[str, Any] = {}
    parts: dict[str, bool] = {}
    shown: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for layers, decay in DECAYS.items():
        predicted = geometry(COUNTS, layers, decay, decay)
        table: dict[str, list[float]] = {
            k: [] for k in ("NC1", "weights", "means", "equal weights", "equal means", "length")
        }
        for seed in lab.seeds:
            found = network(layers, seed, decay)
            equal = torch.eye(10, dtype=torch.float64)
            weights, means = (g.diagonal().sqrt() for g in (found.weight_gram, found.mean_gram))
            ratio = torch.cat([weights / predicted.weight_lengths, means / predicted.mean_lengths])
            table["NC1"].append(float(found.within))
            table["weights"].append(float(frame_distance(found.weight_gram, predicted.weight_gram)))
            table["means"].append(float(frame_distance(found.mean_gram, predicted.mean_gram)))
            table["equal weights"].append(float(frame_distance(found.weight_gram, equal)))
            table["equal means"].append(float(frame_distance(found.mean_gram, equal)))
            table["length"].append(float((ratio - 1).abs().max()))
            shown.setdefault(layers, []).append((weights, means))
        rows[f"layers: {layers}"] = table
        pairs = [(table[name], table[f"equal {name}"]) for name in ("weights", "means")]
        parts |= {
            f"features collapse, layers: {layers}": max(table["NC1"]) < 0.01,
            f"as predicted, layers: {layers}": max(table["weights"] + table["means"]) < 0.1,
            f"not of equal lengths, layers: {layers}": all(a < b for one in pairs for a, b in zip(*one, strict=True)),
            f"lengths, layers: {layers}": max(table["length"]) < 0.1,
        }
    lab.figure("lengths", _draw(shown))
    return conclude(parts, **rows)


@claim(
    "A ReLU network trained with cross-entropy on balanced classes ends as a simplex, at the lengths of the minimum",
    source="experiments with balanced data (there images and deeper nets); the lengths are derived here",
    criterion="150 digits, 15 a class, "
    + NET
    + "heads of 1 (decay 0.01) and 3 (decay 0.004) linear layers without bias, in each of 5 "
    "seeds: NC1 below 0.01; weights and centred class means within 0.1 of a simplex and of each other (scaled to norm 1); every length "
    "within 10% of that of the simplex of least loss with free features",
    budget="full",
    method=squares,
    sham=NO_DECAY,
)
def trained_with_cross_entropy(lab: Lab, penalty: Penalty) -> Finding:
    rows: dict[str, Any] = {}
    parts: dict[str, bool] = {}
    apart = (1 - 1 / 10) ** 0.5  # length of a vertex of the simplex I - 11^T / 10
    for layers, decay in DECAYS.items():
        size, _ = under_cross_entropy(EVEN[0], 10, layers, decay)
        found = [network(layers, seed, decay, EVEN, "cross-entropy", penalty) for seed in lab.seeds]
        weights = [f.weight_gram.diagonal().sqrt() / (size**layers * apart) for f in found]
        means = [f.mean_gram.diagonal().sqrt() / (size / EVEN[0] ** 0.5 * apart) for f in found]
        rows[f"layers: {layers}"] = table = {
            "NC1": [float(f.within) for f in found],
            "weights to simplex": [float(f.simplex[0]) for f in found],
            "means to simplex": [float(f.simplex[1]) for f in found],
            "weights to means": [float(f.duality[0]) for f in found],
            "length": [float((torch.cat(pair) - 1).abs().max()) for pair in zip(weights, means, strict=True)],
        }
        parts |= {
            f"features collapse, layers: {layers}": max(table["NC1"]) < 0.01,
            f"a simplex, layers: {layers}": max(table["weights to simplex"] + table["means to simplex"]) < 0.1,
            f"weights as means, layers: {layers}": max(table["weights to means"]) < 0.1,
            f"lengths, layers: {layers}": max(table["length"]) < 0.1,
        }
    return conclude(parts, **rows)


def _draw(shown: dict[int, list[tuple[Tensor, Tensor]]]) -> Any:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 3), layout="constrained")
    at = (0, 27)
    for ax, (layers, decay) in zip(fig.subplots(1, 2), DECAYS.items(), strict=True):
        predicted = deep_linear_geometry(COUNTS, layers, decay, decay)
        order = torch.tensor(COUNTS).argsort(stable=True)
        n = torch.tensor(COUNTS)[order]
        for i, (name, colour) in enumerate((("weights", "#4477aa"), ("class means", "#cc6677"))):
            line = (predicted.weight_lengths, predicted.mean_lengths)[i][order]
            ax.plot(n, line, color=colour, lw=1.2, label=f"{name}: predicted, trained (dots)")
            for run in shown[layers]:
                ax.plot(n, run[i][order], "o", color=colour, ms=3, alpha=0.5)
        ax.set(xlabel="examples of the class", ylabel="length", ylim=(0, None), xlim=at)
        ax.set_title(f"{layers} linear layer{'s' if layers > 1 else ''}", fontsize=9)
    fig.axes[0].legend(frameon=False, fontsize=7)
    return fig

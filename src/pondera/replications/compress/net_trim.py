"""Net-Trim (arXiv 1806.06457): outputs kept at a high sparsity, accuracy without fine-tuning, and how few samples are enough.

On ReLU nets of 64-48-32-10 for the digits, trained by Adam without a penalty; both hidden layers are pruned, in the parallel
form, biases as they are.
"""

import copy
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.compress.masks import bake
from pondera.compress.net_trim import net_trim, net_trim_weight
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Prune = Callable[[nn.Module, Tensor, float], nn.Module]  # of a net, inputs and epsilon: another net
HIDDEN, IMAGES = (0, 2), 300


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor((x - x.mean()) / x.std()).float()[order], torch.tensor(y)[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


@cache
def _net(seed: int) -> nn.Sequential:
    x, y, _, _ = _digits()
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    adam = torch.optim.Adam(net.parameters(), lr=2e-3, fused=True)
    for _ in range(300):
        i = torch.randint(len(x), (64,), generator=g)
        adam.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        adam.step()
    return net


# -- outputs kept ------------------------------------------------------------------------------------------------------


def by_net_trim(net: nn.Module, x: Tensor, epsilon: float) -> nn.Module:
    """The method, with its zeros put into plain weights; 500 steps are enough for the tolerance here."""
    net = copy.deepcopy(net)
    net_trim(net, [x], epsilon, steps=500)
    return bake(net)


@cache
def _trimmed(prune: Prune, seed: int, epsilon: float) -> nn.Module:
    return prune(_net(seed), _digits()[0][:IMAGES], epsilon)


def by_magnitude(net: nn.Module, x: Tensor, epsilon: float) -> nn.Module:
    """The largest weights, as many in each layer as Net-Trim keeps, as they are."""
    like = _like(net, x, epsilon)
    net = copy.deepcopy(net)
    with torch.no_grad():
        for k in HIDDEN:
            w = net[k].weight  # type: ignore[index]
            n = int(like[k].weight.count_nonzero())  # type: ignore[index]
            w.mul_(w.abs() >= w.abs().flatten().topk(n).values[-1])
    return net


def _refitted(prune: Prune) -> Prune:
    """What it keeps, fitted by least squares to the layer's output before the rectifier, unit by unit."""

    def way(net: nn.Module, x: Tensor, epsilon: float) -> nn.Module:
        cut = prune(net, x, epsilon)
        with torch.no_grad():
            for k in HIDDEN:
                w, h = cut[k].weight, net[:k](x).double()  # type: ignore[index]
                z = h @ net[k].weight.double().T  # type: ignore[index]
                for row, target in zip(w, z.T):
                    on = row != 0
                    row[on] = torch.linalg.lstsq(h[:, on], target[:, None], driver="gelsd").solution[:, 0].float()
        return cut

    return way


by_magnitude_refitted, by_net_trim_refitted = _refitted(by_magnitude), _refitted(by_net_trim)


def _like(net: nn.Module, x: Tensor, epsilon: float) -> nn.Module:
    seed = next(s for s in _SEEN if _net(s) is net)
    return _trimmed(by_net_trim, seed, epsilon)


_SEEN: list[int] = []


@torch.no_grad()
def _moved(net: nn.Module, other: nn.Module, x: Tensor) -> list[float]:
    """Relative change of each hidden layer's output, inputs from the net as it was."""
    found = []
    for k in HIDDEN:
        h = net[:k](x)  # type: ignore[index]
        y, new = (F.relu(n[k](h)) for n in (net, other))  # type: ignore[index]
        found.append(float((new - y).norm() / y.norm()))
    return found


def _kept(net: nn.Module) -> list[float]:
    return [float((net[k].weight != 0).float().mean()) for k in HIDDEN]  # type: ignore[index]


@claim(
    "The outputs of each layer stay within the tolerance, with weights zeroed that could not be left out one by one",
    source="abstract (preserving the internal responses); program of Sec. 2",
    criterion="5 nets, 300 images, epsilon 0.1, each of the two hidden layers: output moved by at most 0.1 of its norm (to a relative "
    "2e-3), and at most half of the weights kept; on these the verdict rests. Beside them: where as many of the largest weights are "
    "kept as they are, the output moves at least twice as far",
    method=by_net_trim,
    sham=Sham("the largest weights, as many of them", by_magnitude),
)
def outputs_stay(lab: Lab, prune: Prune) -> Finding:
    rows: dict[str, list[list[float]]] = {"moved": [], "by magnitude": [], "kept": []}
    x = _digits()[0][:IMAGES]
    for seed in _seeds(lab):
        net = _net(seed)
        rows["moved"].append(_moved(net, _trimmed(prune, seed, 0.1), x))
        rows["by magnitude"].append(_moved(net, _trimmed(by_magnitude, seed, 0.1), x))
        rows["kept"].append(_kept(_trimmed(prune, seed, 0.1)))
    pairs = [(a, b) for one, other in zip(rows["moved"], rows["by magnitude"]) for a, b in zip(one, other)]
    return conclude(
        {
            "within the tolerance": met(max(a for a, _ in pairs) <= 0.1 * 1.002),
            "at most half kept": met(max(k for one in rows["kept"] for k in one) <= 0.5),
            "magnitude moves twice as far": met(min(b / a for a, b in pairs) >= 2),
        },
        central=("within the tolerance", "at most half kept"),
        **{name.replace(" ", "_"): row for name, row in rows.items()},
    )


def _seeds(lab: Lab, n: int | None = None) -> range:
    seeds = lab.seeds if n is None else lab.draws(n)
    _SEEN.extend(s for s in seeds if s not in _SEEN)
    return seeds


EPSILONS = (0.05, 0.1, 0.2)


@torch.no_grad()
def _accuracy(net: nn.Module) -> float:
    _, _, x, y = _digits()
    return float((net(x).argmax(1) == y).double().mean())


@claim(
    "The pruned net is accurate without fine-tuning, where one pruned by magnitude to the same shares is not",
    source="abstract; experiments (there compared before and after fine-tuning)",
    criterion="24 nets, 300 images to prune with, epsilon 0.05, 0.1, 0.2: test accuracy at 0.05 within 2 points of the dense net's, "
    "and at each epsilon above that of magnitude pruning of both layers to the same shares: 95% intervals. Both with what they keep "
    "fitted again by least squares on the same images are recorded beside them",
    budget="full",
    method=by_net_trim,
    sham=Sham("the largest weights, as many of them", by_magnitude),
)
def accurate_without_fine_tuning(lab: Lab, prune: Prune) -> Finding:
    seeds = _seeds(lab, 24)
    dense = [_accuracy(_net(s)) for s in seeds]
    ways: dict[str, Prune] = {
        "trimmed": prune,
        "trimmed, refitted": by_net_trim_refitted,
        "magnitude": by_magnitude,
        "magnitude, refitted": by_magnitude_refitted,
    }
    found = {name: {e: [_accuracy(_trimmed(way, s, e)) for s in seeds] for e in EPSILONS} for name, way in ways.items()}
    kept = {e: [sum(_kept(_trimmed(by_net_trim, s, e))) / 2 for s in seeds] for e in EPSILONS}
    parts = {"within 2 points": weigh(lab.effect(found["trimmed"][0.05], dense), above=-0.02)}
    for e in EPSILONS:
        parts[f"above magnitude at {e:g}"] = weigh(lab.effect(found["trimmed"][e], found["magnitude"][e]), above=0)

    def mean(row: list[float]) -> float:
        return sum(row) / len(row)

    over = {f"{e:g}": lab.effect(found["trimmed"][e], found["magnitude, refitted"][e]) for e in EPSILONS}
    said = "; ".join(
        f"epsilon {e:g}, {mean(kept[e]):.0%} kept: "
        + ", ".join(f"{name} {mean(row[e]):.3f}" for name, row in found.items())
        for e in EPSILONS
    )
    return conclude(
        parts,
        dense=dense,
        accuracy=found,
        share_kept=kept,
        trimmed_minus_refitted=over,
        note=f"test accuracy: dense {mean(dense):.3f}; {said}",
    )


# -- how many samples --------------------------------------------------------------------------------------------------

TERMS, UNITS, ENOUGH, DRAWS = 4, 4, 0.01, 12
Fit = Callable[[Tensor, Tensor], Tensor]  # inputs and rectified outputs: a weight


def sparse_fit(x: Tensor, y: Tensor) -> Tensor:
    """The method at a small tolerance."""
    return net_trim_weight(x, y, 1e-3 * float(y.norm()), active=y > 1e-6, steps=1500).weight


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """The shortest weights that fit the active outputs, unit by unit."""
    rows = []
    for target in y.T:
        on = target > 1e-6
        rows.append(torch.linalg.lstsq(x[on], target[on][:, None], driver="gelsd").solution[:, 0])
    return torch.stack(rows)


def _needed(fit: Fit, width: int, seed: int) -> float:
    """The least number of samples on a grid of ratio 1.25 from which the weights come back, to 1% and from there on once more."""
    g = torch.Generator().manual_seed(seed)
    w = torch.zeros(UNITS, width, dtype=torch.float64)
    for row in w:
        row[torch.randperm(width, generator=g)[:TERMS]] = torch.randn(TERMS, generator=g, dtype=torch.float64)
    x = torch.randn(4 * width, width, generator=g, dtype=torch.float64)
    y = (x @ w.T).clamp_min(0)
    p, found = 16.0, 0
    while p < 4 * width:
        n = int(p)
        error = float((fit(x[:n], y[:n]) - w).norm() / w.norm())
        found = found + 1 if error < ENOUGH else 0
        if found == 2:
            return float(n / 1.25)
        p *= 1.25
    return float(4 * width)


@claim(
    "Weights of few terms are found from a number of samples that grows with the logarithm of the inputs",
    source="abstract; theorem on O(s log(N/s)) samples",
    criterion=f"single ReLU layers of {UNITS} units, each of {TERMS} Gaussian weights among N = 32 and 128 inputs that are Gaussian, "
    f"{DRAWS} draws: samples needed to find them to 1% (grid of ratio 1.25) grow by a factor below 2.2 from N = 32 to 128 (log(N/s) by "
    f"{math.log(32) / math.log(8):.2f}, N by 4), and are fewer than 128 at N = 128; means over the draws, 95% intervals",
    method=sparse_fit,
    sham=Sham("least squares in place of the sparsest", least_squares),
)
def few_samples_are_enough(lab: Lab, fit: Fit) -> Finding:
    needed = {n: [_needed(fit, n, seed) for seed in lab.draws(DRAWS)] for n in (32, 128)}
    growth = [math.log(b / a) for a, b in zip(needed[32], needed[128])]
    return conclude(
        {
            "grows by less than 2.2": weigh(lab.effect(growth), below=math.log(2.2)),
            "fewer than the inputs": weigh(lab.effect(needed[128]), below=128),
        },
        samples_needed=needed,
        log_growth=lab.effect(growth),
    )

"""SWAT-NN (arXiv 2506.08270): weights and architecture as one point, and whether it pays to search there."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.weightspace import (
    FoundNetworks,
    NetworkAutoencoder,
    latent_search,
    pack_networks,
    random_networks,
    run_networks,
    unpack_networks,
)
from pondera.weightspace.latent_networks import search

WIDTH, DEPTHS, LEARN = 4, (1, 2), 1800
Model = Callable[[], NetworkAutoencoder]
Networks = dict[str, Tensor]


def square(n: int, g: torch.Generator) -> Tensor:
    return 2 * torch.rand(n, 2, generator=g) - 1


def all_on(matrix: Tensor, depth: int) -> Networks:
    """Without what the matrix says of switches."""
    return {n: torch.ones_like(x) if n.endswith("mask") else x for n, x in unpack_networks(matrix, depth).items()}


@claim(
    "A matrix holds weights and architecture (depth, activations, switches) of a network, and gives it back",
    source="abstract ('embeds both architectural and parametric information'); the authors' code",
    criterion="200 random networks of width 7 for each of 1 to 4 hidden layers, packed into 56 columns: all tensors the same "
    "when unpacked, and outputs at 50 points to 1e-6 of their largest",
    method=unpack_networks,
    sham=Sham("unpacked with every neuron on", all_on),
)
def matrices_hold_networks(lab: Lab, unpack: Callable[[Tensor, int], Networks]) -> Finding:
    g, parts = lab.generator(0), {}
    for depth in (1, 2, 3, 4):
        nets, x = random_networks(200, depth, sparsity=0.2, generator=g), square(50, g)
        back = unpack(pack_networks(nets, 56)[0], depth)
        same = all(torch.equal(back[n], v) for n, v in nets.items())
        outputs = run_networks(nets, x)
        off = float((run_networks(back, x) - outputs).abs().max() / outputs.abs().max())
        parts[f"{depth} hidden"] = met(same and off <= 1e-6, f"outputs off by {off:.1g}")
    return conclude(parts)


def start() -> NetworkAutoencoder:
    torch.manual_seed(0)
    return NetworkAutoencoder(width=WIDTH, depths=DEPTHS, latent=24, hidden=64, layers=1)


@cache
def untrained() -> NetworkAutoencoder:
    return start().requires_grad_(False)


@cache
def trained() -> NetworkAutoencoder:
    """1,800 batches of 64 fresh networks (the paper: millions)."""
    model, g = start(), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, LEARN)
    for k in range(LEARN):
        nets = random_networks(64, DEPTHS[k % 2], width=WIDTH, sparsity=(0, 0.2, 0.4)[k % 3], generator=g)
        loss = model.loss(nets, square(64, g))
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        rate.step()
    return model.requires_grad_(False)


# -- what the space is like ------------------------------------------------------------------------------------------------


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@claim(
    "Networks that do alike lie near each other in the space",
    source="abstract",
    criterion="100 fresh networks of width 4 (half with one hidden layer, half with two) a draw: rank correlation of distances "
    "between points with distances between outputs (root mean square at 200 points), minus that of distances between "
    "the packed matrices: 95% interval above 0, 5 draws, one autoencoder (1,800 batches of 64)",
    budget="full",
    method=trained,
    sham=Sham("the autoencoder before training", untrained),
)
def alike_lie_near(lab: Lab, model: Model) -> Finding:
    points, matrices, explained = [], [], []
    for seed in lab.seeds:
        g = torch.Generator().manual_seed(10_000 + seed)
        x, autoencoder = square(200, g), model()
        z, m, y, error = [], [], [], []
        for depth in DEPTHS:
            nets = random_networks(50, depth, width=WIDTH, generator=g)
            z.append(autoencoder.encode(nets).flatten(1))
            m.append(pack_networks(nets, autoencoder.columns)[0].flatten(1))
            y.append(run_networks(nets, x))
            outs = [run_networks(autoencoder.decode(autoencoder.encode(nets), d), x) for d in DEPTHS]
            error.append(torch.stack([(o - y[-1]).square().mean(1) for o in outs]).amin(0))
        apart = [F.pdist(torch.cat(some)) for some in (z, m, y)]
        points.append(rank_correlation(apart[0], apart[2]))
        matrices.append(rank_correlation(apart[1], apart[2]))
        explained.append(float(1 - torch.cat(error).mean() / torch.cat(y).var()))
    gain = lab.effect(points, matrices)
    return conclude(
        weigh(gain, above=0),
        points_minus_matrices=gain,
        correlation={"points": points, "matrices": matrices},
        variance_explained_by_decoded_networks=explained,
    )


# -- searching -------------------------------------------------------------------------------------------------------------

STEPS, RATES = 600, (0.01, 0.03, 0.1, 0.3)
TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sine": lambda a, b: torch.sin(3 * a) * b,
    "bump": lambda a, b: torch.exp(-4 * (a * a + b * b)),
    "saddle": lambda a, b: a * a - b * b,
    "step": lambda a, b: torch.tanh(5 * (a + b)),
    "product": lambda a, b: a * b,
    "wave": lambda a, b: torch.cos(3 * (a - b)),
}


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points and the six functions on them, of mean 0 and deviation 1: to search by, to test."""
    g = torch.Generator().manual_seed(1)
    x, test = square(150, g), square(500, g)
    y, wanted = (torch.stack([f(p[:, 0], p[:, 1]) for f in TARGETS.values()]) for p in (x, test))
    mean, std = wanted.mean(1, keepdim=True), wanted.std(1, keepdim=True)
    return x, (y - mean) / std, test, (wanted - mean) / std


def in_latent_space(
    model: NetworkAutoencoder, x: Tensor, y: Tensor, depth: int, rate: Tensor, seed: int
) -> FoundNetworks:
    return latent_search(model, x, y, depth, torch.Generator().manual_seed(seed), steps=STEPS, rate=rate)


def directly(x: Tensor, y: Tensor, depth: int, rate: Tensor, seed: int, width: int) -> FoundNetworks:
    """The same search in the weights, and logits of activations and switches, themselves, from torch's start of linear layers."""
    g, first = torch.Generator().manual_seed(seed), {}
    for n, v in random_networks(len(y), depth, width=width, generator=g).items():
        if n.endswith("mask"):
            first[n] = 0.5 + 0.5 * torch.randn(v.shape, generator=g)
        elif n.endswith("activation"):
            first[n] = torch.randn(v.shape, generator=g)
        else:
            first[n] = (2 * torch.rand(v.shape, generator=g) - 1) / (2 if n.startswith("0.") else width) ** 0.5
    return search(lambda p: {n: v for n, v in p.items() if n != "t"}, first, x, y, steps=STEPS, rate=rate)


@cache
def searched(model: Model | None, seeds: int, width: int = WIDTH) -> dict[str, list[list[float]]]:
    """Test error, non-zeros and neurons, (seeds, targets): for each of these the rate and depth of the least error found."""
    x, y, test, wanted = data()
    every, goal = y.repeat(seeds * len(RATES), 1), wanted.repeat(seeds * len(RATES), 1)  # (rates, seeds, targets)
    rate = torch.tensor(RATES).repeat_interleave(seeds * len(TARGETS))
    runs = [
        directly(x, every, d, rate, 5 + d, width)
        if model is None
        else in_latent_space(model(), x, every, d, rate, 5 + d)
        for d in DEPTHS
    ]
    shape = (len(DEPTHS) * len(RATES), seeds, len(TARGETS))
    error = torch.stack([r.error for r in runs]).view(shape)
    best = error.nan_to_num(torch.inf).argmin(0, keepdim=True)
    tested = torch.stack([(run_networks(r.states, test) - goal).square().mean(1) for r in runs])
    figures = {
        "test": tested,
        "nonzero": torch.stack([r.nonzero for r in runs]),
        "neurons": torch.stack([r.neurons for r in runs]),
    }
    found = {name: v.view(shape).gather(0, best)[0].double().tolist() for name, v in figures.items()}
    return found | {"rate": [[RATES[int(k) % len(RATES)] for k in row] for row in best[0]]}


def means(rows: list[list[float]]) -> list[float]:
    return [sum(row) / len(row) for row in rows]


@claim(
    "Gradient descent in the space finds small networks that do better than the same search without it",
    source="abstract (there compared with pruning and search one after the other on 54 functions)",
    criterion="six functions of two variables, 150 points, deviation 1; networks of width 4, one or two hidden layers; 600 "
    "steps with the paper's penalties, then made hard; of four rates (0.01 to 0.3) and two depths the one of least "
    "error found, each search for itself: mean over functions of the log of test error, search in the trained space "
    "minus search in weights, switches and activations themselves: 95% interval below 0, with no more non-zeros "
    "(interval of the difference below 2), 5 starts",
    budget="full",
    method=trained,
    sham=Sham("the autoencoder before training", untrained),
)
def searching_there_pays(lab: Lab, model: Model) -> Finding:
    ours, direct = searched(model, len(lab.seeds)), searched(None, len(lab.seeds))
    logs = [means(torch.tensor(s["test"]).log().tolist()) for s in (ours, direct)]
    error, size = lab.effect(*logs), lab.effect(means(ours["nonzero"]), means(direct["nonzero"]))
    half = searched(None, len(lab.seeds), WIDTH // 2)
    narrow = lab.effect(logs[0], means(torch.tensor(half["test"]).log().tolist()))
    sizes = [sum(means(s["nonzero"])) / len(lab.seeds) for s in (half, ours)]
    note = (
        f"nets found in the space are smaller; searched directly in nets of width {WIDTH // 2}, which have {sizes[0]:.1f} non-zeros "
        f"beside {sizes[1]:.1f}, the log of test error is lower than in the space by {narrow.mean:.2f} [{narrow.low:.2f}, "
        f"{narrow.high:.2f}] (a run added when the first had been seen)"
    )
    return conclude(
        {"lower test error": weigh(error, below=0), "no more non-zeros": weigh(size, below=2)},
        log_error_difference=error,
        log_error_difference_to_direct_in_half_the_width=narrow,
        nonzero_difference=size,
        test_error={
            name: {t: sum(r[i] for r in s["test"]) / len(s["test"]) for i, t in enumerate(TARGETS)}
            for name, s in (("space", ours), ("direct", direct), ("direct, half the width", half))
        },
        nonzeros={
            "space": means(ours["nonzero"]),
            "direct": means(direct["nonzero"]),
            "direct, half the width": means(half["nonzero"]),
        },
        neurons={"space": means(ours["neurons"]), "direct": means(direct["neurons"])},
        rates={"space": ours["rate"], "direct": direct["rate"]},
        note=note if error.above else "",
    )

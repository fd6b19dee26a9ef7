"""Deep weight space networks (arXiv 2301.12780): the symmetry, all linear maps with it, images classified by their networks."""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import pairwise, permutations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.weightspace._inrs import inrs
from pondera.weightspace import (
    DWSInvariant,
    DWSLayer,
    DWSNet,
    PermutationSpec,
    Standardize,
    UniversalFunctional,
    apply_permutation,
    equivariance_error,
    mlp_spec,
    permute_states,
)

States = dict[str, Tensor]
Make = Callable[..., nn.Module]  # of an MLP, channels in and out
F64 = torch.float64


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def flat(states: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten(1) for x in states.values()], 1)


class Dense(nn.Module):
    """One dense map of all weights and channels."""

    def __init__(self, like: nn.Module, a: int, b: int) -> None:
        super().__init__()
        self.sizes, self.b = [x.numel() for x in like.state_dict().values()], b
        self.map = nn.Linear(sum(self.sizes) * a, sum(self.sizes) * b, bias=False)

    def forward(self, states: States) -> States:
        parts = self.map(flat(states)).split([n * self.b for n in self.sizes], 1)
        return {n: y.view(*x.shape[:-1], self.b) for (n, x), y in zip(states.items(), parts, strict=True)}


def ends_permuted(like: nn.Module, a: int, b: int, **kw: Any) -> nn.Module:
    """Inputs and outputs of the net change places as well: more symmetry, so fewer maps."""
    spec = mlp_spec(like)
    names = list(spec.axes)
    first, last = names[0], names[-1]
    axes = dict(spec.axes)
    axes[first] = (axes[first][0], "inputs")
    for n in (names[-2], last):
        axes[n] = tuple("outputs" if i == 0 else p for i, p in enumerate(axes[n]))
    return UniversalFunctional(PermutationSpec(axes), like, a, b, **kw)


@claim(
    "The layers follow every order of an MLP's hidden units",
    source="abstract; Sec. 4 and 5",
    criterion="MLPs of 2 to 4 hidden layers, all widths drawn from 2 to 9: two layers (1 to 3 to 2 channels, ReLU between) move with "
    "randomly drawn permutations of all hidden layers to 1e-5 of their largest entry in float32, and DWSInvariant of the result "
    "does not change by more, in each of 5 draws",
    method=DWSLayer,
    sham=Sham("one dense map of the flattened weights for each layer", Dense),
)
def follows_permutations(lab: Lab, make: Make) -> Finding:
    moved, kept = [], []
    for seed in lab.seeds:
        g = lab.generator(seed)
        net = mlp(*torch.randint(2, 10, (int(torch.randint(4, 7, (), generator=g)),), generator=g).tolist())
        first, second, head = make(net, 1, 3), make(net, 3, 2), DWSInvariant(net, 2, 4)

        def both(s: States, first: nn.Module = first, second: nn.Module = second) -> States:
            found: States = second({n: x.relu() for n, x in first(s).items()})
            return found

        def all_three(s: States, both: Callable[[States], States] = both, head: nn.Module = head) -> Tensor:
            found: Tensor = head(both(s))
            return found

        states = {n: torch.randn(2, *x.shape, 1, generator=g) for n, x in net.state_dict().items()}
        moved.append(equivariance_error(both, states, mlp_spec(net), generator=g))
        kept.append(equivariance_error(all_three, states, mlp_spec(net), generator=g))
    return conclude(
        {"layers move along": met(max(moved) <= 1e-5), "features stay": met(max(kept) <= 1e-5)},
        error_of_layers=moved,
        error_of_features=kept,
    )


def dimension(spec: PermutationSpec, like: Mapping[str, Tensor]) -> float:
    """Of the maps that commute with all permutations: the mean over the group of (fixed entries)^2."""
    at, numbered = 0, {}
    for name, x in like.items():
        numbered[name] = torch.arange(at, at + x.numel()).view(x.shape)
        at += x.numel()
    sizes, squares = spec.sizes(like), []
    for orders in product(*(permutations(range(n)) for n in sizes.values())):
        moved = apply_permutation(spec, {p: torch.tensor(o) for p, o in zip(sizes, orders, strict=True)}, numbered)
        squares.append(sum(int((moved[n] == numbered[n]).sum()) for n in like) ** 2)
    return sum(squares) / len(squares)


def rank(layer: nn.Module, like: Mapping[str, Tensor]) -> int:
    """Of the family of maps a layer's weights span: its matrix is linear in them."""
    total = sum(x.numel() for x in like.values())
    units = torch.eye(total, dtype=F64).split([x.numel() for x in like.values()], 1)
    basis = {n: u.reshape(total, *x.shape, 1) for (n, x), u in zip(like.items(), units, strict=True)}
    params = {n: p.detach() for n, p in layer.named_parameters()}
    each = torch.eye(sum(p.numel() for p in params.values()), dtype=F64)
    split = each.split([p.numel() for p in params.values()], 1)
    named = {n: rows.reshape(len(each), *p.shape) for (n, p), rows in zip(params.items(), split, strict=True)}
    maps = vmap(lambda p: torch.cat([y.flatten() for y in functional_call(layer, p, (basis,)).values()]))(named)
    return int(torch.linalg.matrix_rank(maps @ maps.T, hermitian=True))


@claim(
    "Pooling, broadcasting and linear maps of features give all linear layers with that symmetry",
    source="abstract ('full characterization'); Theorem on the layers [recalled]",
    criterion="MLPs 2-3-3-2 and 2-3-3-3-2: rank of the layer's family of maps (1 channel, no constants) equal to the dimension of all "
    "equivariant maps, the mean of (fixed entries)^2 over the whole group",
    method=DWSLayer,
    sham=Sham("inputs and outputs of the net permuted as well", ends_permuted),
)
def all_linear_maps(lab: Lab, make: Make) -> Finding:
    parts, seen = {}, {}
    for sizes in ((2, 3, 3, 2), (2, 3, 3, 3, 2)):
        net, name = mlp(*sizes), "-".join(map(str, sizes))
        like = net.state_dict()
        found, wanted = rank(make(net, 1, 1, bias=False).double(), like), dimension(mlp_spec(net), like)
        parts[name], seen[name] = met(found == wanted, f"{found} of {wanted:g}"), {"rank": found, "dimension": wanted}
    return conclude(
        parts, families=seen, note="the authors' code spans 111 of 114 and 160 of 164 (our count, at 2001d52): it does not tell "
        "output neurons apart in some maps to the last layer"
    )  # fmt: skip


# -- images by their networks -------------------------------------------------------------------------------------------

TRAIN, CHOOSE, TEST, STEPS, BATCH = 450, 120, 130, 150, 64  # of 700
RATES = (3e-3, 1e-2, 3e-2)


def by_layers(like: States) -> nn.Module:
    return DWSNet(like, (16, 16), 4, pool="max")


class Flat(nn.Module):
    """An MLP on the flattened weights, of about as many weights as the other has."""

    def __init__(self, like: States, width: int = 64) -> None:
        super().__init__()
        n = sum(x.numel() for x in like.values())
        self.net = nn.Sequential(
            nn.Linear(n, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
            nn.Linear(width, 4),
        )  # fmt: skip

    def forward(self, states: States) -> Tensor:
        found: Tensor = self.net(flat(states))
        return found


def narrower(like: States) -> nn.Module:
    return Flat(like, 60)


@cache
def accuracy(make: Callable[[States], nn.Module], permuted: bool, seed: int) -> tuple[float, float, float]:
    """On test networks, at the rate that is best on those to choose by; that rate; accuracy on training networks."""
    states, labels = inrs()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sets = [({n: x[i] for n, x in states.items()}, labels[i]) for i in order.split([TRAIN, CHOOSE, TEST])]
    scale = Standardize(sets[0][0])
    (x, y), *held = [(scale(s), label) for s, label in sets]
    like = {n: v[0] for n, v in x.items()}
    spec, best = mlp_spec(like), (-1.0, 0.0, 0.0, 0.0)
    for rate in RATES:
        torch.manual_seed(seed)
        g = torch.Generator().manual_seed(seed)
        model = make(like)
        adam = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        for _ in range(STEPS):
            at = torch.randint(TRAIN, (BATCH,), generator=g)
            batch = {n: v[at] for n, v in x.items()}
            loss = F.cross_entropy(model(permute_states(spec, batch, g) if permuted else batch), y[at])
            adam.zero_grad()
            loss.backward()
            adam.step()
            cosine.step()
        model.eval()
        with torch.no_grad():
            chosen, tested, trained = (
                float((model(s).argmax(1) == label).double().mean()) for s, label in (*held, (x, y))
            )
        best = max(best, (chosen, tested, rate, trained))
    return best[1:]


@claim(
    "They tell what image a small network holds, where an MLP on its flat weights does not",
    source="abstract ('advantages over natural baselines'); experiments on INR classification (there MNIST, 2-32-32-1)",
    criterion="SIRENs 2-16-16-1 of 700 digits 0 to 3, each trained from its own start; 450 to train on, 150 AdamW steps of 64, the "
    "best of three rates (0.003, 0.01, 0.03) for each seed by 120 others: test accuracy on 130 of DWSNet (two layers of 16, max) minus "
    "that of an MLP on flat weights (two layers of 64, batch norm too), and minus that of the same MLP trained on randomly permuted "
    "weights: 95% interval of both above 0, 5 splits of one zoo",
    budget="full",
    method=by_layers,
    sham=Sham("an MLP on flat weights of 60 in place of 64 units", narrower),
)
def classifies_images_by_their_networks(lab: Lab, make: Callable[[States], nn.Module]) -> Finding:
    runs = {
        "DWSNet": [accuracy(make, False, seed) for seed in lab.seeds],
        "flat": [accuracy(Flat, False, seed) for seed in lab.seeds],
        "flat, permuted": [accuracy(Flat, True, seed) for seed in lab.seeds],
    }
    ours, alone, augmented = ([r[0] for r in some] for some in runs.values())
    over, past = lab.effect(ours, alone), lab.effect(ours, augmented)
    return conclude(
        {"ahead of the MLP": weigh(over, above=0), "ahead of the MLP with permutations": weigh(past, above=0)},
        minus_flat=over,
        minus_flat_permuted=past,
        test={name: [r[0] for r in some] for name, some in runs.items()},
        rates={name: [r[1] for r in some] for name, some in runs.items()},
        train={name: [r[2] for r in some] for name, some in runs.items()},
    )

"""LoGAH (arXiv 2405.16287): does a low-rank predictor, trained on narrow networks, give wide ones a better start than chance?"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from pondera.lab.tasks import digits
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.weightspace._stacked import States, adamw, outputs, stacked
from pondera.weightspace.logah import LoGAH, LowRankDecoder, ParameterGraph, parameter_graph

# -- the decoder ------------------------------------------------------------------------------------------------------

CHUNK = 16


class ChunkDecoder(nn.Module):
    """Full predictions of one chunk, copied side by side where a layer is wider."""

    def __init__(self, features: int, rank: int, size: int) -> None:
        super().__init__()
        self.rank = rank
        self.mlp = nn.Sequential(
            nn.Linear(features, 8 * features), nn.ReLU(), nn.Linear(8 * features, CHUNK**2)
        )  # fmt: skip

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        chunk = self.mlp(x).view(-1, CHUNK, CHUNK)
        times = [-(-n // CHUNK) for n in shape[:2]]
        return chunk.repeat(1, *times)[:, : shape[0], : shape[1]]


Decoder = Callable[..., nn.Module]


@claim(
    "The decoder fills layers of any width up to its size without copying, at about a hundredth of a full decoder's parameters",
    source="Sec. 3.1 (low-rank decoder), abstract",
    criterion="d 32, rank 8, size 512, random parameters: matrices 512 x 512, 100 x 300 and 48 x 16 of rank 8 (singular values "
    "beyond below "
    "1e-5 of the first); smaller ones are crops of the largest to 1e-5; no two rows or columns of the largest are the same "
    "(1e-4 of "
    "the norm); an order of nodes carries over; at most 1% of the parameters of a decoder 8 d -> 512 x 512",
    method=LowRankDecoder,
    sham=Sham("a chunk of 16 x 16, copied where the layer is wider", ChunkDecoder),
)
def fills_any_width(lab: Lab, make: Decoder) -> Finding:
    d, rank, size = 32, 8, 512
    decode, x = make(d, rank, size).double(), torch.randn(3, d, dtype=torch.float64)
    with torch.no_grad():
        full = decode(x, (size, size))
        some = {shape: decode(x, shape) for shape in ((100, 300), (48, 16))}
        turned = decode(x.flip(0), (size, size)).flip(0)
    spectra = [torch.linalg.svdvals(w) for w in (full, *some.values())]
    excess = max(float((s[:, rank] / s[:, 0]).max()) for s in spectra)
    crop = max(float((w - full[:, : w.shape[1], : w.shape[2]]).abs().max()) for w in some.values())

    def nearest_rows(w: Tensor) -> float:
        gaps = torch.cdist(w, w) / w.norm(dim=-1).mean()
        return float((gaps + torch.eye(len(w[0])) * 9).min())

    apart = min(nearest_rows(full), nearest_rows(full.mT))
    numbers = sum(p.numel() for p in decode.parameters())
    share = numbers / (8 * d * size**2)
    return conclude(
        {
            "rank": met(excess < 1e-5),
            "crops": met(crop < 1e-5),
            "no copies": met(apart > 1e-4),
            "order of nodes": met(bool(torch.allclose(full, turned))),
            "a hundredth of the parameters": met(share <= 0.01),
        },
        singular_value_beyond_rank=excess,
        crop_difference=crop,
        nearest_rows=apart,
        parameters=numbers,
        share_of_full_decoder=share,
    )


# -- trained on narrow networks ---------------------------------------------------------------------------------------

META_STEPS, META_RATE = 2000, 5e-3
WIDTHS, HIDDEN = (16, 24, 32, 40, 48), (2, 3, 4)  # of the networks it is trained on: widths, hidden layers
TARGETS = {"in range": (32, 3), "wide": (128, 3)}
STEPS, EARLY, BATCH = 200, 50, 64
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TUNING = 2  # seeds behind the fresh ones
Predictor = Callable[[int], States]
FRAME: dict[str, Any] = {"hidden": 32, "rank": 8, "size": 128, "layers": 1, "heads": 4, "normalize": "he"}


@cache
def network(width: int, hidden: int) -> tuple[nn.Module, ParameterGraph]:
    sides = [64, *[width] * hidden]
    layers = [f for a, b in pairwise(sides) for f in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    return model, parameter_graph(model)


class Predicted(nn.Module):
    """A network's outputs with weights from the predictor; which network is set from outside, step by step."""

    at: tuple[nn.Module, ParameterGraph]

    def __init__(self) -> None:
        super().__init__()
        self.predictor = LoGAH(**FRAME)

    def forward(self, x: Tensor) -> Tensor:
        model, graph = self.at
        return functional_call(model, self.predictor(graph), (x,))


def untrained(n: int) -> States:
    nets = []
    for seed in range(n):
        torch.manual_seed(10 + seed)
        nets.append(Predicted())
    return stacked(nets)


def draw(n: int, seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    (x, y), _ = digits.data()
    draws = [torch.Generator().manual_seed(seed + k) for k in range(n)]
    for _ in range(steps):
        i = torch.stack([torch.randint(len(x), (BATCH,), generator=g) for g in draws])
        yield x[i], y[i]


@cache
def trained(n: int) -> States:
    """Predictors of n seeds side by side, each step on one network of the family, the same for all."""
    body, pick = Predicted(), torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in draw(n, 1000, META_STEPS):
            w, h = (torch.randint(len(of), (1,), generator=pick).item() for of in (WIDTHS, HIDDEN))
            body.at = network(WIDTHS[int(w)], HIDDEN[int(h)])
            yield batch

    return adamw(
        body, untrained(n), [META_RATE] * n, batches(), F.cross_entropy, decay=0.01, cosine=META_STEPS
    )  # fmt: skip


def predictions(states: States, target: tuple[int, int]) -> States:
    body, (_, graph) = Predicted(), network(*target)
    with torch.no_grad():
        return vmap(lambda named: functional_call(body.predictor, named, (graph,)))(
            {name.removeprefix("predictor."): w for name, w in states.items()}
        )


def he(n: int, target: tuple[int, int]) -> States:
    found: dict[str, list[Tensor]] = {}
    for seed in range(n):
        g = torch.Generator().manual_seed(seed)
        for name, w in network(*target)[0].named_parameters():
            std = math.sqrt(2 / w.shape[1]) if w.ndim > 1 else 0.0
            found.setdefault(name, []).append(std * torch.randn(w.shape, generator=g))
    return {name: torch.stack(w) for name, w in found.items()}


def same_scale(predicted: States) -> States:
    """Gaussian weights with the deviation of the predicted ones, layer by layer; biases as predicted."""
    g = torch.Generator().manual_seed(0)
    return {
        name: w if w.ndim == 2 else w.std((1, 2), keepdim=True) * torch.randn(w.shape, generator=g)
        for name, w in predicted.items()
    }


def course(states: States, target: tuple[int, int], runs: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """Mean training loss over the first steps and test loss after all, (runs,): each from the start of its seed."""
    model, rows = network(*target)[0], [seed for seed, _ in runs]
    seen: list[Tensor] = []
    batches = ((x[rows], y[rows]) for x, y in draw(max(rows) + 1, 2000, STEPS))
    weights = adamw(
        model, {name: w[rows] for name, w in states.items()}, [rate for _, rate in runs], batches, F.cross_entropy, seen=seen
    )  # fmt: skip
    _, (x, y) = digits.data()
    tests = vmap(lambda z: F.cross_entropy(z, y))(outputs(model, weights, x))
    return tuple(z.nan_to_num(99).clamp_max(99) for z in (torch.stack(seen[:EARLY]).mean(0), tests))  # type: ignore


@cache
def rival(target: tuple[int, int], n: int) -> dict[str, Any]:
    return tuned(he(n + TUNING, target), target, n)


def tuned(states: States, target: tuple[int, int], n: int) -> dict[str, Any]:
    """Both measures over n seeds, each at the rate that was best for it over two seeds of their own."""
    runs = [(n + k, rate) for rate in RATES for k in range(TUNING)]
    best = [
        RATES[int(m.view(len(RATES), TUNING).mean(1).argmin())] for m in course(states, target, runs)
    ]  # fmt: skip
    fresh = [(seed, rate) for rate in best for seed in range(n)]
    early, late = course(states, target, fresh)
    return {"early": early[:n].tolist(), "late": late[n:].tolist(), "rates": best}


@claim(
    "Networks started from it train faster and end better than from random weights, also far wider ones than it was trained on",
    source="abstract; Sec. 4 (ViT and GPT-2 started by LoGAH, random and GHN-3)",
    criterion="ReLU MLPs on 8x8 digits; predictors (d 32, rank 8, 1 layer) of 5 seeds trained 2,000 steps on widths 16 to 48 "
    "with 2 to 4 hidden "
    "layers; targets of 3 hidden layers, width 32 and 128; Adam, rate of each start tuned for each measure on one grid, 3e-4 to "
    "3e-2, with "
    "2 predictors of their own; 95% intervals of the difference lie below 0 for the mean training loss of the first 50 steps "
    "and for the "
    "test loss after 200, against He's start and against Gaussian weights of the predicted deviation, layer by layer, at both "
    "widths. (Predictors of 800 steps at a lower rate, tried first, were hardly trained: right in half of the images)",
    budget="full",
    method=trained,
    sham=Sham("the predictor before its training", untrained),
)
def starts_better_than_chance(lab: Lab, predictor: Predictor) -> Finding:
    n = len(lab.seeds)
    states = predictor(n + TUNING)
    parts, found = {}, {}
    for where, target in TARGETS.items():
        predicted = predictions(states, target)
        ours = tuned(predicted, target, n)
        rivals = {"He": rival(target, n), "their scale": tuned(same_scale(predicted), target, n)}
        _, (x, y) = digits.data()
        logits = outputs(network(*target)[0], predicted, x)[:n]
        at_start = (logits.argmax(-1) == y).double().mean(1).tolist()
        found[where] = {"predicted": ours, "test accuracy at step 0": at_start} | rivals
        for measure in ("early", "late"):
            for name, theirs in rivals.items():
                gap = lab.effect(ours[measure], theirs[measure])
                parts[f"{where}, {measure}, against {name}"] = weigh(gap, below=0)
    return conclude(parts, **found)

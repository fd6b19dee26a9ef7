"""Oscillation-free quantisation (arXiv 2302.02210): a small vision transformer on digits, trained at 2 to 4 bits.

One block of width 24 with two heads reads scikit-learn's digits as four patches of 4 x 4 pixels. Its six matrices are rounded,
patch embedding and head are not, nor are activations. Each net is trained in float first. Nets of all seeds and rates are
held beside each other, so that a row of a stacked matrix is a row of one net's.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.compress.oscillation_free import OscillationTracker, QKRAttention, StatsQ
from pondera.lab.train import schedule
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Named = dict[str, Tensor]
TOKENS, DIM, HEADS, BATCH = 4, 24, 2, 32
ROUNDED = ("query", "key", "value", "out", "up", "down")
FLOAT_STEPS, STEPS, ANNEAL = 400, 500, 200
RATES = (3e-3, 1e-2, 3e-2)
BOUNDARY = 0.005


class LearnedStep(nn.Module):
    """Learned step size (Esser et al. 2020) for rows: levels -2^(b-1) .. 2^(b-1) - 1 times a trained step, 0 among them."""

    shift = 0.0

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.low, self.high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1

    def start(self, weight: Tensor) -> "LearnedStep":
        self.step = nn.Parameter(2 * weight.detach().abs().mean(1, keepdim=True) / self.high**0.5)
        return self

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1 / (self.high * weight.shape[1]) ** 0.5  # of the step's gradient
        s = self.step.clamp_min(1e-5)
        s = s.detach() * (1 - scale) + s * scale
        return s, (weight / s - self.shift).clamp(self.low, self.high)

    def forward(self, weight: Tensor) -> Tensor:
        s, u = self._scaled(weight)
        return (u + (u.round() - u).detach() + self.shift) * s

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        return self._scaled(weight)[1].round()


class LearnedScale(LearnedStep):
    """StatsQ's levels and StatsQ's start, with the scale trained: what the paper blames."""

    shift = 0.5

    def start(self, weight: Tensor) -> "LearnedScale":
        self.step = nn.Parameter(2 * weight.detach().abs().mean(1, keepdim=True) / -self.low)
        return self


Quantiser = Callable[[int], Any]  # of bits: StatsQ or one of the above
Free = Callable[[Any, Tensor, float], Tensor]  # of a quantiser, a weight and a boundary: which entries may move


@cache
def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float().view(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, TOKENS, 16)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1000], order[1000:]
    return x[train], y[train], x[test], y[test]


def _start(seed: int) -> Named:
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed": (DIM, 16), "place": (TOKENS, DIM), "head": (10, DIM)} | dict.fromkeys(ROUNDED[:4], (DIM, DIM))
    shapes |= {"up": (2 * DIM, DIM), "down": (DIM, 2 * DIM)}
    made = {n: torch.randn(s, generator=g) * s[-1] ** -0.5 for n, s in shapes.items()}
    return made | {
        f"bias of {n}": torch.zeros(made[n].shape[0]) for n in ("embed", "value", "out", "up", "down", "head")
    }


def _logits(p: Named, x: Tensor, rounded: Callable[[str, Tensor], Tensor], product: bool) -> Tensor:
    """(nets, batch, tokens, 4) to (nets, batch, classes); `rounded` is told a matrix's name and gives it as it acts."""

    def linear(name: str, h: Tensor) -> Tensor:
        w = rounded(name, p[name]) if name in ROUNDED else p[name]
        shape = h.shape[1:-1]
        return torch.baddbmm(p[f"bias of {name}"].unsqueeze(1), h.flatten(1, -2), w.mT).unflatten(1, shape)

    h = linear("embed", x) + p["place"].unsqueeze(1)
    r = F.layer_norm(h, (DIM,))
    if product:
        q, k = (p[n].unflatten(1, (HEADS, -1)) for n in ("query", "key"))
        a = rounded("product", (q.mT @ k).flatten(1, 2)).unflatten(1, (HEADS, DIM))
        query, key = torch.einsum("nbtc,nhcd->nbhtd", r, a), r.unsqueeze(2)
    else:
        query, key = (
            torch.einsum("nbtc,ndc->nbtd", r, rounded(n, p[n])).unflatten(-1, (HEADS, -1)).transpose(2, 3)
            for n in ("query", "key")
        )
    value = linear("value", r).unflatten(-1, (HEADS, -1)).transpose(2, 3)
    mixed = (query @ key.mT * (DIM // HEADS) ** -0.5).softmax(-1) @ value
    h = h + linear("out", mixed.transpose(2, 3).flatten(-2))
    h = h + linear("down", F.gelu(linear("up", F.layer_norm(h, (DIM,)))))
    return linear("head", F.layer_norm(h, (DIM,)).mean(2))


class Nets:
    """Nets of seeds x rates, trained together by Adam on the lab's schedule."""

    def __init__(self, seeds: range, rates: tuple[float, ...]) -> None:
        self.seeds, self.rates = seeds, rates
        starts = [_start(s) for s in seeds for _ in rates]
        self.p = {n: torch.stack([one[n] for one in starts]).requires_grad_() for n in starts[0]}
        self.quantisers: dict[str, Any] = {}
        self.product = False

    def quantise(self, make: Quantiser, bits: int, product: bool = False) -> None:
        self.product = product
        matrices = dict(self.p)
        q, k = (self.p[n].detach().unflatten(1, (HEADS, -1)) for n in ("query", "key"))
        matrices["product"] = (q.mT @ k).flatten(1, 2)
        for name in (*(("product",) if product else ROUNDED[:2]), *ROUNDED[2:]):
            one = make(bits)
            self.quantisers[name] = one.start(matrices[name].flatten(0, 1)) if hasattr(one, "start") else one

    def rounded(self, name: str, w: Tensor) -> Tensor:
        return self.quantisers[name](w.flatten(0, 1)).view_as(w) if self.quantisers else w

    def logits(self, x: Tensor) -> Tensor:
        return _logits(self.p, x, self.rounded, self.product)

    def train(self, steps: int, factor: float = 1.0, free: Free | None = None) -> Tensor:
        """Turns of each net a weight and 1,000 steps, in the last fifth (when annealing, in all). free: what may move."""
        x, y, _, _ = _digits()
        n = len(self.seeds) * len(self.rates)
        rates = factor * torch.tensor(self.rates).repeat(len(self.seeds))
        trained = {**self.p, **{f"step of {k}": s for k, q in self.quantisers.items() for s in q.parameters()}}
        first, second = ({k: torch.zeros_like(t) for k, t in trained.items()} for _ in "12")
        sources = [torch.Generator().manual_seed(1000 * steps + s) for s in self.seeds]
        tracker = OscillationTracker()
        for step in range(1, steps + 1):
            rows = torch.stack([torch.randint(len(x), (BATCH,), generator=g) for g in sources])
            rows = rows.repeat_interleave(len(self.rates), 0)
            loss = F.cross_entropy(self.logits(x[rows]).flatten(0, 1), y[rows].flatten(), reduction="sum") / BATCH
            grads = torch.autograd.grad(loss, list(trained.values()))
            scale = rates * schedule(step, steps)
            with torch.no_grad():
                for (name, t), g in zip(trained.items(), grads, strict=True):
                    m, v = first[name].lerp_(g, 0.1), second[name].lerp_(g * g, 0.001)
                    move = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                    if free is not None and name in self.quantisers:
                        move *= free(self.quantisers[name], t.flatten(0, 1), BOUNDARY).view_as(t)
                    t.sub_(scale.repeat_interleave(len(t) // n).view(-1, *[1] * (t.ndim - 1)) * move)
            if free is not None or step > 0.8 * steps:
                tracker.steps += 1
                for name, one in self.quantisers.items():
                    tracker.track(name, one.codes(self.codes_of(name)))
        if not self.quantisers:
            return torch.zeros(n)
        turns = sum(t.view(n, -1).sum(1) for t in tracker.total.values())
        return 1000 * turns / (sum(t.numel() for t in tracker.total.values()) / n * tracker.steps)  # type: ignore[return-value]

    @torch.no_grad()
    def codes_of(self, name: str) -> Tensor:
        if name != "product":
            return self.p[name].flatten(0, 1)
        q, k = (self.p[n].unflatten(1, (HEADS, -1)) for n in ("query", "key"))
        return (q.mT @ k).flatten(0, 2)

    @torch.no_grad()
    def accuracy(self) -> tuple[Tensor, Tensor]:
        """On 297 images to tune on, and on the 500 others."""
        _, _, x, y = _digits()
        hit = (self.logits(x.expand(len(self.p["head"]), *x.shape)).argmax(-1) == y).float()
        return hit[:, :297].mean(1), hit[:, 297:].mean(1)


@cache
def _in_float(n: int) -> Named:
    """The nets of n seeds after training without rounding, at the rate best for them in trials on other seeds."""
    nets = Nets(range(n), (1e-2,))
    nets.train(FLOAT_STEPS)
    return {name: t.detach() for name, t in nets.p.items()}


def _trained(
    make: Quantiser, bits: int, n: int, rates: tuple[float, ...], product: bool = False
) -> tuple[Nets, Tensor]:
    nets, starts = Nets(range(n), rates), _in_float(n)
    for name, t in starts.items():
        nets.p[name] = t.repeat_interleave(len(rates), 0).requires_grad_()
    nets.quantise(make, bits, product)
    return nets, nets.train(STEPS)


@cache
def _at_one_rate(n: int) -> tuple[Named, dict[str, Any]]:
    nets, _ = _trained(StatsQ, 2, n, (1e-2,))
    return {name: t.detach().clone() for name, t in nets.p.items()}, nets.quantisers


@cache
def _tuned(make: Quantiser, bits: int, n: int, product: bool = False) -> dict[str, list[float]]:
    """Each seed at the rate best for it on the images to tune on: accuracy on the others, turns at the end, the rate."""
    nets, turns = _trained(make, bits, n, RATES, product)
    tune, test = (a.view(n, -1) for a in nets.accuracy())
    best = tune.argmax(1, keepdim=True)
    turns = turns.view(n, -1)
    return {
        "accuracy": test.gather(1, best).squeeze(1).tolist(),
        "turns": turns.gather(1, best).squeeze(1).tolist(),
        "rate": [RATES[i] for i in best.squeeze(1).tolist()],
        "turns at each rate": turns.mean(0).tolist(),
    }


SETTING = (
    "transformer of one block (width 24, 2 heads) on 1,000 digits in four patches, 400 steps in float, then 500 of batch 32 with its "
    "six matrices rounded to 2 or 4 bits; Adam, each seed at the best of three rates from 3e-3 to 3e-2 on 297 images; 5 seeds; "
)
TRAINED = Sham("StatsQ's levels and start with the scale trained", LearnedScale)


def _beside(lab: Lab, make: Quantiser, what: str, **threshold: float) -> Finding:
    n = len(lab.seeds)
    ours, theirs = ({bits: _tuned(m, bits, n) for bits in (2, 4)} for m in (make, LearnedStep))
    gaps = {bits: lab.effect(ours[bits][what], theirs[bits][what]) for bits in ours}
    return conclude(
        {f"at {bits} bits": weigh(gap, **threshold) for bits, gap in gaps.items()},
        rounded=ours,
        learned_step=theirs,
        difference=gaps,
    )


@claim(
    "Fewer weights oscillate than with a learned step size",
    source="abstract; section on StatsQ (there DeiT and Swin on ImageNet)",
    criterion=SETTING
    + "turns of a weight in 1,000 steps over the last 100 steps (a change of level against the one before), with "
    "StatsQ minus with learned step size: 95% interval below 0 at 2 bits and at 4",
    budget="full",
    method=StatsQ,
    sham=TRAINED,
)
def fewer_turns_than_learned_steps(lab: Lab, make: Quantiser) -> Finding:
    return _beside(lab, make, "turns", below=0)


@claim(
    "The rounded net is more accurate than with a learned step size",
    source="abstract: at 2 bits 9.8 points (DeiT-T) and 7.7 (DeiT-S) ahead, with all three techniques",
    criterion=SETTING
    + "accuracy on 500 images, with StatsQ minus with learned step size: 95% interval above 0 at 2 bits and at 4",
    budget="full",
    method=StatsQ,
    sham=TRAINED,
)
def more_accurate_than_learned_steps(lab: Lab, make: Quantiser) -> Finding:
    return _beside(lab, make, "accuracy", above=0)


def all_free(quantiser: Any, weight: Tensor, boundary: float) -> Tensor:
    """Nothing is frozen."""
    return torch.ones_like(weight, dtype=torch.bool)


@claim(
    "Freezing the confident weights in a last phase calms the others and makes the net more accurate",
    source="abstract; section on confidence-guided annealing",
    criterion="the nets of 5 seeds at 2 bits, StatsQ, rate 1e-2, then 200 steps at a tenth of it with only weights within 0.005 "
    "of a boundary free, minus the same steps with all free: turns of a weight in 1,000 steps have their 95% interval below 0, and "
    "accuracy on 797 images has it above 0",
    method=StatsQ.uncertain,
    sham=Sham("all weights free", all_free),
)
def annealing_calms(lab: Lab, free: Free) -> Finding:
    n = len(lab.seeds)
    rows = {}
    for name, which in (("annealed", free), ("all free", all_free)):
        nets = Nets(lab.seeds, (1e-2,))
        start, nets.quantisers = _at_one_rate(n)
        for name_of, t in start.items():
            nets.p[name_of] = t.clone().requires_grad_()
        turns = nets.train(ANNEAL, 0.1, which)
        tune, test = nets.accuracy()
        rows[name] = {"turns": turns.tolist(), "accuracy": ((297 * tune + 500 * test) / 797).tolist()}
    turns, accuracy = (lab.effect(rows["annealed"][k], rows["all free"][k]) for k in ("turns", "accuracy"))  # type: ignore[assignment]
    return conclude(
        {"calmer": weigh(turns, below=0), "more accurate": weigh(accuracy, above=0)},
        turns=turns,
        accuracy=accuracy,
        rows=rows,
    )


def heads_together(attention: nn.MultiheadAttention, *, bits: int | None) -> QKRAttention:
    """One product of query and key for all heads."""
    new = QKRAttention(attention.embed_dim, 1, bits=bits)
    new.load_state_dict(QKRAttention.from_attention(attention, bits=bits).state_dict())
    return new


@claim(
    "Query and key as one matrix a head are the same attention before they are rounded",
    source="section on query-key reparametrisation",
    criterion="5 random attentions of width 24 with 2 heads without biases of query and key, float32: largest difference of the "
    "outputs below 1e-5 of the largest output",
    method=QKRAttention.from_attention,
    sham=Sham("one product for all heads together", heads_together),
)
def same_attention_before_rounding(lab: Lab, convert: Callable[..., QKRAttention]) -> Finding:
    worst = 0.0
    for seed in lab.seeds:
        torch.manual_seed(seed)
        theirs, x = nn.MultiheadAttention(DIM, HEADS, batch_first=True), torch.randn(8, 10, DIM)
        with torch.no_grad():
            a, b = convert(theirs, bits=None)(x), theirs(x, x, x)[0]
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return conclude(met(worst < 1e-5), largest_difference=worst)


@claim(
    "Query and key rounded as one matrix oscillate less and give a more accurate net than rounded each by itself",
    source="abstract; section on query-key reparametrisation",
    criterion=SETTING.replace("2 or 4 bits", "2 bits by StatsQ")
    + "the product minus each by itself: turns have their 95% interval below 0, accuracy on 500 images above 0",
    budget="full",
    method=QKRAttention,
    sham=Sham("query and key rounded by themselves", partial(QKRAttention, product=False)),
)
def one_matrix_for_query_and_key(lab: Lab, attention: Callable[..., QKRAttention]) -> Finding:
    n = len(lab.seeds)
    product = attention(DIM, HEADS, bits=2).product is not None
    ours, theirs = _tuned(StatsQ, 2, n, product), _tuned(StatsQ, 2, n)
    turns, accuracy = (lab.effect(ours[k], theirs[k]) for k in ("turns", "accuracy"))
    return conclude(
        {"calmer": weigh(turns, below=0), "more accurate": weigh(accuracy, above=0)},
        turns=turns,
        accuracy=accuracy,
        product=ours,
        each=theirs,
    )

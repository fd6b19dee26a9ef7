"""u-muP (arXiv 2407.17465): does everything start at scale one, and does the best rate stay where it is as the net widens?"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.parametrize.u_mup import (
    UnitEmbedding,
    UnitLinear,
    UnitReadout,
    UnitResidual,
    residual_taus,
    u_mup_groups,
    unit_attention,
    unit_cross_entropy,
    unit_gelu,
)
from pondera.replications import Effect, Finding, Lab, Sham, claim, conclude, met, weigh

# -- the start ---------------------------------------------------------------------------------------------------------

SYMBOLS, CONTEXT, BATCH, LAYERS, HEAD = 64, 64, 8, 3, 16
Parts = tuple[Callable[..., nn.Module], ...]  # embedding, linear, readout


class _Attention(nn.Module):
    def __init__(self, n: int, linear: Callable[..., nn.Module], unit: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(n, elementwise_affine=False)
        self.query, self.key, self.value, self.out = (linear(n, n, bias=False) for _ in range(4))
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attend = unit_attention if self.unit else F.scaled_dot_product_attention
        return self.out(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class _Feed(nn.Module):
    def __init__(self, n: int, linear: Callable[..., nn.Module], unit: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(n, elementwise_affine=False)
        self.up, self.down, self.act = linear(n, 4 * n, bias=False), linear(4 * n, n, bias=False), unit
        self.act = unit_gelu if unit else F.gelu  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.norm(x))))


class _Plain(nn.Module):
    def __init__(self, branch: nn.Module, tau: float) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def transformer(n: int, unit: bool) -> nn.Sequential:
    linear, beside = (UnitLinear, UnitResidual) if unit else (nn.Linear, _Plain)
    kinds = (_Attention, _Feed)
    blocks = [beside(kinds[i % 2](n, linear, unit), tau) for i, tau in enumerate(residual_taus(LAYERS))]  # type: ignore[operator]
    ends = (
        (UnitEmbedding(SYMBOLS, n), UnitReadout(n, SYMBOLS))
        if unit
        else (nn.Embedding(SYMBOLS, n), nn.Linear(n, SYMBOLS, bias=False))
    )
    return nn.Sequential(ends[0], *blocks, nn.RMSNorm(n, elementwise_affine=False), ends[1])


def unit_transformer(n: int) -> tuple[nn.Sequential, Callable[[Tensor, Tensor], Tensor]]:
    return transformer(n, True), unit_cross_entropy


def plain_transformer(n: int) -> tuple[nn.Sequential, Callable[[Tensor, Tensor], Tensor]]:
    """torch's own starts and factors."""
    return transformer(n, False), lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten())


def scales(build: Callable[[int], Any], n: int, seed: int) -> dict[str, dict[str, float]]:
    """Root mean squares at the start: of what each layer puts out and its gradient, of weights and theirs."""
    torch.manual_seed(seed)
    net, loss_of = build(n)
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(m: nn.Module, given: Any, out: Tensor) -> None:
            out.retain_grad()
            seen[name] = out

        return hook

    watched = (nn.Linear, nn.Embedding, UnitLinear, UnitResidual, _Plain)
    hooks = [m.register_forward_hook(look(name)) for name, m in net.named_modules() if isinstance(m, watched)]
    ids = torch.randint(SYMBOLS, (BATCH, CONTEXT + 1))
    loss_of(net(ids[:, :-1]), ids[:, 1:]).backward()
    for hook in hooks:
        hook.remove()

    def rms(t: Tensor) -> float:
        return float(t.detach().square().mean().sqrt())

    last = str(len(net) - 1)
    return {
        "activations": {k: rms(v) for k, v in seen.items() if k != last},
        "logits": {"logits": rms(seen[last])},
        "gradients of activations": {k: rms(v.grad) for k, v in seen.items()},  # type: ignore[arg-type]
        "weights": {k: rms(p) for k, p in net.named_parameters()},
        "gradients of weights": {k: rms(p.grad) for k, p in net.named_parameters()},  # type: ignore[arg-type]
    }


WIDTHS = (64, 128)
MATCHED = (".query", ".key")


@claim(
    "Activations, weights and gradients begin at scale one",
    source="abstract; Sec. on unit scaling. Queries and keys are counted apart: attention at its start hardly depends on them",
    criterion="transformer of 3 layers, widths 64 and 128, 512 tokens, 5 seeds: root mean square of every layer's output but the "
    "logits (1/n^0.5 by design), of its gradient, of every weight and of its gradient between 1/3 and 3 in every seed; gradients of "
    "and through query and key layers are reported and not asked for",
    method=unit_transformer,
    sham=Sham("torch's own starts and factors", plain_transformer),
)
def starts_at_scale_one(lab: Lab, build: Callable[[int], Any]) -> Finding:
    found: dict[str, dict[str, list[float]]] = {}
    for n in WIDTHS:
        for seed in lab.seeds:
            for what, each in scales(build, n, seed).items():
                for name, value in each.items():
                    apart = "gradients" in what and any(part in name for part in MATCHED)
                    kind = "gradients at queries and keys" if apart else what
                    found.setdefault(kind, {}).setdefault(name, []).append(value)
    ranges = {what: [min(map(min, v.values())), max(map(max, v.values()))] for what, v in found.items()}
    asked = ("activations", "gradients of activations", "weights", "gradients of weights")
    parts = {what: met(ranges[what][0] >= 1 / 3 and ranges[what][1] <= 3) for what in asked}
    outputs = {k: max(v) for k, v in found["activations"].items() if k.endswith("branch.out")}
    grows = ranges["activations"][1] > 3 and max(outputs.values()) == ranges["activations"][1]
    return conclude(
        parts,
        range_of_scales=ranges,
        note="what leaves attention grows from layer to layer, "
        + ", ".join(f"{v:.1f}" for v in outputs.values())
        + ": its factor supposes values that differ from position to position, and each averaging makes them more alike"
        if grows
        else "",
    )


# -- transfer ----------------------------------------------------------------------------------------------------------

NARROW, WIDE, STEPS, ROWS = 32, 256, 60, 64
Recipe = Callable[[int], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], dict[str, float]]]
GRIDS: dict[str, list[float]] = {
    "u-muP": [2.0**k for k in range(-5, 4)],
    "standard": [2.0**k for k in range(-10, -1)],
    "one rate": [2.0**k for k in range(-8, 1)],
}


class _Act(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def u_mup(n: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], dict[str, float]]:
    """An MLP, its loss, and the rate of each parameter beside the one that is tuned."""
    layers = [UnitLinear(64, n), _Act(unit_gelu), UnitLinear(n, n), _Act(unit_gelu), UnitLinear(n, n), _Act(unit_gelu)]
    net = nn.Sequential(*layers, UnitReadout(n, 10))
    rates = {id(p): g["lr"] for g in u_mup_groups(net, lr=1.0) for p in g["params"]}
    return net, unit_cross_entropy, {k: rates[id(p)] for k, p in net.named_parameters()}


def standard(n: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], dict[str, float]]:
    layers = [nn.Linear(64, n), nn.GELU(), nn.Linear(n, n), nn.GELU(), nn.Linear(n, n), nn.GELU(), nn.Linear(n, 10)]
    net = nn.Sequential(*layers)
    return net, F.cross_entropy, {k: 1.0 for k, _ in net.named_parameters()}


def one_rate(n: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], dict[str, float]]:
    """The unit-scaled net without u-muP's rates: the same for all parameters."""
    net, loss, rates = u_mup(n)
    return net, loss, dict.fromkeys(rates, 1.0)


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


@cache
def losses(recipe: Recipe, n: int, seeds: range, rates: tuple[float, ...]) -> Tensor:
    """Training loss after Adam at each rate, over all digits (rates, seeds); all runs side by side."""
    x, y = _digits()
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(recipe(n))
    net, loss_of, own = nets[0]
    state = {k: torch.stack([dict(m.named_parameters())[k].detach() for m, _, _ in nets] * len(rates)) for k in own}
    rate = torch.tensor(rates).repeat_interleave(len(seeds))
    first, second = ({k: torch.zeros_like(v) for k, v in state.items()} for _ in range(2))
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def loss(s: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(net, s, x), y)

    gradient = torch.func.vmap(torch.func.grad(loss))
    for t in range(1, STEPS + 1):
        at = torch.stack([torch.randint(len(x), (ROWS,), generator=g) for g in sources]).repeat(len(rates), 1)
        for k, g in gradient(state, x[at], y[at]).items():
            first[k].lerp_(g, 0.1)
            second[k].lerp_(g.square(), 0.01)
            scale = (second[k] / (1 - 0.99**t)).sqrt_().add_(1e-8)
            step = own[k] * rate * (1 - t / (STEPS + 1)) / (1 - 0.9**t)
            state[k] -= step.view(-1, *[1] * (g.ndim - 1)) * first[k] / scale
    with torch.no_grad():
        end = torch.func.vmap(lambda s: loss(s, x, y))(state)
    return end.nan_to_num(math.inf).clamp_max(100.0).reshape(len(rates), len(seeds))


def optimum(found: Tensor) -> list[float]:
    """For each seed where on the grid (in steps of 2) the log of the loss is least, by the parabola through three points."""
    logs, places = found.log(), []
    for i in range(found.shape[1]):
        k = int(logs[:, i].argmin())
        if 0 < k < len(logs) - 1:
            a, b, c = (float(logs[j, i]) for j in (k - 1, k, k + 1))
            places.append(k + 0.5 * (a - c) / (a - 2 * b + c))
        else:
            places.append(float(k))
    return places


def moved(lab: Lab, recipe: Recipe, grid: str) -> tuple[Effect, dict[str, Any]]:
    """By how many doublings the best rate moves from the narrow to the wide net."""
    seeds, rates = lab.draws(8), tuple(GRIDS[grid])
    narrow, wide = (losses(recipe, n, seeds, rates) for n in (NARROW, WIDE))
    at = {n: optimum(f) for n, f in ((NARROW, narrow), (WIDE, wide))}
    least, most = math.log2(rates[0]), math.log2(rates[-1])
    figures = {
        "best log2 rate": {n: [least + p for p in each] for n, each in at.items()},
        "at an edge of the grid": sum(p in (0.0, most - least) for each in at.values() for p in each),
        "mean loss by rate": {n: [float(v) for v in f.mean(1)] for n, f in ((NARROW, narrow), (WIDE, wide))},
    }
    return lab.effect(at[WIDE], at[NARROW]), figures


SETTING = (
    "MLP of 3 hidden layers on digits, 60 steps of Adam on 64 rows, the rate falling to zero, widths 32 and 256, nine rates a factor "
    "of 2 apart, 8 seeds; "
)


@claim(
    "The best rate stays where it is from width 32 to 256, where the standard one falls",
    source="abstract (optimal hyperparameters independent of the size)",
    criterion=SETTING
    + "log2 of the rate with the least training loss over all digits (parabola through the least of the grid and its neighbours), "
    "wide minus narrow: within 1 for u-muP, below -1 for torch's own start at one rate for all parameters; "
    "that of unit-scaled operations at one rate is reported beside them",
    budget="full",
    method=u_mup,
    sham=Sham("torch's own start at one rate for all parameters", standard),
)
def best_rate_transfers(lab: Lab, recipe: Recipe) -> Finding:
    ours, figures = moved(lab, recipe, "u-muP" if recipe is u_mup else "standard")
    theirs, beside = moved(lab, standard, "standard")
    alike, _ = moved(lab, one_rate, "one rate")
    return conclude(
        {"it stays": weigh(ours, within=1), "the standard one falls": weigh(theirs, below=-1)},
        doublings=ours,
        doublings_of_the_standard=theirs,
        doublings_of_unit_scale_at_one_rate=alike,
        method=figures,
        standard=beside,
        note="unit-scaled operations alone, with one rate for all parameters, move as little: that the rates must follow the width is "
        "not shown by this net"
        if alike.low > -1 and alike.high < 1
        else "",
    )


@claim(
    "A wide net at the rate tuned on a narrow one does better than the standard net tuned so",
    source="abstract (tuned on a proxy, a lower loss; there against muP)",
    criterion=SETTING
    + "log of the training loss of the wide net, at the rate that is best for the narrow one on the mean of the other seeds, minus "
    "that of the standard net: below 0; and u-muP's loss there at most 10% above that at its own best rate (log ratio below 0.1)",
    budget="full",
    method=u_mup,
    sham=Sham("torch's own start at one rate for all parameters", standard),
)
def tuned_on_the_narrow(lab: Lab, recipe: Recipe) -> Finding:
    seeds = lab.draws(8)

    def at_narrow(one: Recipe, grid: str) -> tuple[list[float], list[float]]:
        """Log loss of the wide net at the narrow one's rate, and at its own, chosen alike by the other seeds."""
        narrow, wide = (losses(one, n, seeds, tuple(GRIDS[grid])).log() for n in (NARROW, WIDE))

        def by_others(f: Tensor) -> list[int]:
            return [int((f.sum(1) - f[:, i]).argmin()) for i in seeds]

        return tuple([float(wide[k, i]) for i, k in enumerate(by_others(f))] for f in (narrow, wide))  # type: ignore[return-value]

    (ours, own), (theirs, _) = (
        at_narrow(recipe, "u-muP" if recipe is u_mup else "standard"),
        at_narrow(standard, "standard"),
    )
    gap, regret = lab.effect(ours, theirs), lab.effect(ours, own)
    return conclude(
        {"below the standard net": weigh(gap, below=0), "near its own best": weigh(regret, below=0.1)},
        log_ratio_to_standard=gap,
        log_ratio_to_its_own_best=regret,
        loss={
            "method": math.exp(sum(ours) / 8),
            "at its own best": math.exp(sum(own) / 8),
            "standard": math.exp(sum(theirs) / 8),
        },
    )

"""MPO sharing (arXiv 2303.16753): does a deep small language model gain from it over sharing whole layers?

Nets of one kind that differ in seed or rate are trained side by side.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from pondera.lab.tasks.code import SYMBOLS
from pondera.lab.tasks.code import data as code
from pondera.parametrize.mpo_sharing import share_mpo
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Share = Callable[[nn.Module], nn.Module]  # of a net whose layers all begin with the first one's weights
WIDTH, HEADS, CONTEXT, BATCH, DEPTH, SHALLOW = 32, 2, 32, 4, 6, 2
STAGE, RATES = 1500, (1e-3, 3e-3, 1e-2)
KINDS = ("query", "key", "value", "out", "up", "down")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm1(x)
        q, k, v = (f(n).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for f in (self.query, self.key, self.value))
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        seen = (q @ k.mT / (WIDTH // HEADS) ** 0.5).masked_fill(later, -1e9).softmax(-1)
        x = x + self.out((seen @ v).transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(len(SYMBOLS), WIDTH), nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(SYMBOLS))

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


# -- ways to share -----------------------------------------------------------------------------------------------------


def names(net: nn.Module, kind: str) -> list[str]:
    return [f"blocks.{i}.{kind}" for i in range(len(net.blocks))]  # type: ignore[arg-type]


def by_mpo(net: nn.Module) -> nn.Module:
    for kind in KINDS:
        share_mpo(net, names(net, kind), cores=3)
    return net


def drawn_anew(net: nn.Module) -> nn.Module:
    """Shared by their trains, the outer tensors of every layer but the first drawn anew at their scale."""
    by_mpo(net)
    with torch.no_grad():
        for kind in KINDS:
            for name in names(net, kind)[1:]:
                for p in net.get_submodule(name).parametrizations.weight.parameters(recurse=False):  # type: ignore[union-attr]
                    p.copy_(torch.randn_like(p) * p.square().mean().sqrt())
    return net


def whole(net: nn.Module) -> nn.Module:
    """One matrix of each kind for all layers."""
    for kind in KINDS:
        first, *others = (net.get_submodule(name) for name in names(net, kind))
        for layer in others:
            layer.weight = first.weight
    return net


class _Moved(nn.Module):
    """A shared matrix plus a low rank of the layer's own, zero at the start."""

    def __init__(self, base: nn.Parameter, rank: int) -> None:
        super().__init__()
        self.base, self.rank = base, rank

    def forward(self, down: Tensor, up: Tensor) -> Tensor:
        return self.base + up @ down

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        out, inn = weight.shape
        return torch.randn(self.rank, inn) / inn**0.5, torch.zeros(out, self.rank)


def with_low_rank(net: nn.Module, rank: int = 3) -> nn.Module:
    for kind in KINDS:
        layers = [net.get_submodule(name) for name in names(net, kind)]
        base = layers[0].weight
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", _Moved(base, rank), unsafe=True)  # type: ignore[arg-type]
    return net


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def equal_layers(net: nn.Module) -> nn.Module:
    for kind in KINDS:
        first, *others = (net.get_submodule(name) for name in names(net, kind))
        for layer in others:
            layer.load_state_dict({**layer.state_dict(), "weight": first.weight})
    return net


# -- the start ---------------------------------------------------------------------------------------------------------


@claim(
    "Started from whole shared layers, the model is what it was, has far fewer numbers than one that shares nothing, and its layers "
    "are free to part",
    source="abstract (the stable start; layer-specific auxiliary tensors)",
    criterion="small GPT of width 32, 6 layers with equal matrices, 5 seeds: logits change by less than 1e-4; matrices are held by "
    "less than half as many numbers as without sharing; after one step of SGD every two layers' matrices of a kind differ",
    method=by_mpo,
    sham=Sham("whole layers shared", whole),
)
def starts_as_whole_sharing(lab: Lab, share: Share) -> Finding:
    return _starts(lab, share)


@claim(
    "The start from the layers' own trains is what keeps the function",
    source="abstract (stable initialization)",
    criterion="as above: logits change by less than 1e-4",
    method=by_mpo,
    sham=Sham("outer tensors drawn anew at their scale", drawn_anew),
)
def function_is_kept(lab: Lab, share: Share) -> Finding:
    found = _starts(lab, share)
    return conclude({"same function": found.parts["same function"]}, **found.measured)


def _starts(lab: Lab, share: Share) -> Finding:
    change, left, apart = [], [], []
    for seed in lab.seeds:
        torch.manual_seed(seed)
        net = equal_layers(Net(DEPTH))
        x = torch.randint(len(SYMBOLS), (BATCH, CONTEXT))
        with torch.no_grad():
            before, rest = net(x), size(net) - DEPTH * 12 * WIDTH**2
            share(net)
            change.append(float((net(x) - before).abs().max()))
        left.append((size(net) - rest) / (DEPTH * 12 * WIDTH**2))
        F.cross_entropy(net(x).flatten(0, 1), x.flatten()).backward()
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(0.1 * p.grad)  # type: ignore[operator]
            for kind in KINDS:
                ws = [net.get_submodule(name).weight for name in names(net, kind)]
                apart.append(min(float((a - b).abs().max()) for i, a in enumerate(ws) for b in ws[:i]))  # type: ignore[operator]
    return conclude(
        {
            "same function": met(max(change) < 1e-4),
            "less than half the numbers": met(max(left) < 0.5),
            "layers part": met(min(apart) > 0),
        },
        change_of_logits=max(change),
        share_of_numbers=max(left),
        least_distance_after_a_step=min(apart),
    )


# -- training ----------------------------------------------------------------------------------------------------------


@cache
def _text() -> dict[str, Tensor]:
    """Windows of 33 characters: to train on, to tune on, to test on (other modules)."""
    (windows, _), (held_out, _) = code()
    windows, held_out = windows[:, : CONTEXT + 1], held_out[:, : CONTEXT + 1]
    aside = torch.arange(len(windows)) % 40 == 0
    return {"train": windows[~aside], "tune": windows[aside][:128], "test": held_out[:128]}


def _loss(net: nn.Module, state: dict[str, Tensor], windows: Tensor) -> Tensor:
    out = torch.func.functional_call(net, state, windows[:, :-1])
    return F.cross_entropy(out.flatten(0, 1), windows[:, 1:].flatten())


def train(nets: list[nn.Module], rates: list[float], seeds: list[int], salt: int) -> dict[str, list[float]]:
    """Adam over one stage, the rate falling to zero, all nets side by side; in place. The losses to tune and to test on."""
    text, like = _text(), nets[0]
    named = [dict(net.named_parameters()) for net in nets]
    state = {k: torch.stack([one[k].detach() for one in named]) for k in named[0]}
    rate = torch.tensor(rates)
    first, second = ({k: torch.zeros_like(v) for k, v in state.items()} for _ in range(2))
    sources = {seed: torch.Generator().manual_seed(1000 * salt + seed) for seed in seeds}
    gradient = torch.func.vmap(torch.func.grad(lambda s, w: _loss(like, s, w)))
    for t in range(1, STAGE + 1):
        drawn = {s: text["train"][torch.randint(len(text["train"]), (BATCH,), generator=g)] for s, g in sources.items()}
        found = gradient(state, torch.stack([drawn[s] for s in seeds]))
        step = rate * min(1.0, t / 20) * (1 - t / (STAGE + 1)) / (1 - 0.9**t)
        for k, g in found.items():
            first[k].lerp_(g, 0.1)
            second[k].lerp_(g.square(), 0.01)
            scale = (second[k] / (1 - 0.99**t)).sqrt_().add_(1e-8)
            state[k] -= step.view(-1, *[1] * (g.ndim - 1)) * first[k] / scale
    with torch.no_grad():
        for i, one in enumerate(named):
            for k, p in one.items():
                p.copy_(state[k][i])
        each = {part: torch.func.vmap(lambda s, p=part: _loss(like, s, text[p]))(state) for part in ("tune", "test")}
    return {part: v.nan_to_num(100.0).tolist() for part, v in each.items()}


def fresh(seed: int, depth: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net(depth)


@cache
def shared_whole(seeds: range) -> list[nn.Module]:
    """Six layers with the same matrices after one stage, the best rate of three by its loss on what is tuned on."""
    nets = [whole(equal_layers(fresh(s, DEPTH))) for _ in RATES for s in seeds]
    found = train(nets, [r for r in RATES for _ in seeds], list(seeds) * len(RATES), 1)["tune"]
    n = len(seeds)
    return [nets[min(range(i, len(nets), n), key=found.__getitem__)] for i in range(n)]


def untied(net: nn.Module) -> nn.Module:
    """A copy whose layers have the same matrices and do not share them."""
    out = copy.deepcopy(net)
    for kind in KINDS:
        for name in names(out, kind):
            layer = out.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.detach().clone())  # type: ignore[operator]
    return out


@cache
def after_two_stages(share: Share, seeds: range, start: str = "shared whole") -> dict[str, Any]:
    """Test loss a seed after the second stage, at the rate that is best on what is tuned on; and the numbers held."""
    nets, stages = [], [2]
    for _ in RATES:
        for i, s in enumerate(seeds):
            if start == "shared whole":
                torch.manual_seed(s)
                nets.append(share(untied(shared_whole(seeds)[i])))
            else:
                nets.append(share(fresh(s, SHALLOW if start == "two layers" else DEPTH)))
                stages = [1, 2]
    for salt in stages:
        found = train(nets, [r for r in RATES for _ in seeds], list(seeds) * len(RATES), salt)
    n = len(seeds)
    taken = [min(range(i, len(nets), n), key=found["tune"].__getitem__) for i in range(n)]
    return {
        "loss": [found["test"][t] for t in taken],
        "rates": [RATES[t // n] for t in taken],
        "numbers": size(nets[0]),
    }


def as_it_is(net: nn.Module) -> nn.Module:
    return net


SETTING = (
    "small GPT of width 32 on the standard library's source, windows of 32 characters, 3,000 steps of Adam in two stages (whole layers "
    "shared in the first), 5 seeds, each with the best rate of three in every stage; "
)


@claim(
    "Six layers that share central tensors do better than six that share all, than these with adapters of as many numbers, and than "
    "fewer layers that share nothing",
    source="abstract; experiments (there BERT-sized models of 24 and 48 layers)",
    criterion=SETTING
    + "test loss of MPO sharing minus that of whole sharing, of whole sharing with low-rank adapters of rank 3 in every layer (which "
    "has no fewer numbers), and of two layers that share nothing (no fewer numbers either): three intervals below 0",
    budget="full",
    method=by_mpo,
    sham=Sham("whole layers shared", whole),
)
def deeper_at_fewer_numbers(lab: Lab, share: Share) -> Finding:
    seeds = lab.draws(5)
    runs = {
        "method": after_two_stages(share, seeds),
        "whole sharing": after_two_stages(whole, seeds),
        "low-rank adapters": after_two_stages(with_low_rank, seeds),
        "two layers": after_two_stages(as_it_is, seeds, "two layers"),
    }
    gaps = {f"below {k}": lab.effect(runs["method"]["loss"], runs[k]["loss"]) for k in list(runs)[1:]}
    numbers = {k: r["numbers"] for k, r in runs.items()}
    parts = {k: weigh(gap, below=0) for k, gap in gaps.items()}
    parts["no more numbers"] = met(numbers["method"] <= min(numbers["low-rank adapters"], numbers["two layers"]))
    return conclude(
        parts,
        gaps=gaps,
        loss={k: sum(r["loss"]) / 5 for k, r in runs.items()},
        numbers=numbers,
        rates={k: r["rates"] for k, r in runs.items()},
    )


@claim(
    "Starting it from a model trained with whole layers shared is better than starting it from scratch",
    source="abstract (an initialization algorithm that improves training)",
    criterion=SETTING
    + "test loss minus that of MPO sharing drawn at random and trained as long (both stages): interval below 0",
    budget="full",
    method="shared whole",
    sham=Sham("from scratch", "random"),
)
def start_from_shared_layers(lab: Lab, start: str) -> Finding:
    seeds = lab.draws(5)
    ours, scratch = after_two_stages(by_mpo, seeds, start), after_two_stages(by_mpo, seeds, "random")
    gap = lab.effect(ours["loss"], scratch["loss"])
    return conclude(
        {"below scratch": weigh(gap, below=0)},
        gap=gap,
        loss={"method": sum(ours["loss"]) / 5, "scratch": sum(scratch["loss"]) / 5},
        rates={"method": ours["rates"], "scratch": scratch["rates"]},
    )

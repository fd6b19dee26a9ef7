"""KAT (arXiv 2409.10594): variance over depth, the price beside splines, and a small transformer beside one with MLPs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pondera.nn.kan import KANLinear
from pondera.nn.kat import GroupKAN, KATBlock
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Layer = Callable[..., Any]

# -- variance over depth -----------------------------------------------------------------------------------------------

DEPTH, WIDTH = 30, 256


def small_normal(inputs: int, outputs: int, **settings: Any) -> GroupKAN:
    """What the authors' code ends with: weights of standard deviation 0.02."""
    layer = GroupKAN(inputs, outputs, **settings)
    nn.init.trunc_normal_(layer.linear.weight, std=0.02)
    return layer


@torch.no_grad()
def _course(make: Layer, start: str, seed: int, depth: int) -> list[float]:
    """Mean square after each layer of a stack without norms or residuals."""
    torch.manual_seed(seed)
    x, course = torch.randn(512, WIDTH), []
    for _ in range(depth):
        x = make(WIDTH, WIDTH, start=start)(x)
        course.append(float(x.square().mean()))
    return course


@claim(
    "The start keeps the activations' variance over the layers",
    source="abstract (S3) and Sec. 4.4",
    criterion=f"stacks of {DEPTH} layers of width {WIDTH} without norms or residuals, Gaussian inputs: mean square of "
    f"the output within "
    "0.5 to 2 in each of 5 seeds, for the identity, SiLU and GELU starts, each a part; and within 0.8 to 1.25 "
    "after two layers, as many as "
    "lie between two norms of a block",
    method=GroupKAN,
    sham=Sham("weights of standard deviation 0.02, as the released code leaves them", small_normal),
)
def variance_kept(lab: Lab, make: Layer) -> Finding:
    parts, ends = {}, {}
    for start in ("identity", "silu", "gelu"):
        courses = [_course(make, start, seed, DEPTH) for seed in lab.seeds]
        early, late = [c[1] for c in courses], [c[-1] for c in courses]
        parts[f"{start}, {DEPTH} layers"] = met(
            min(late) > 0.5 and max(late) < 2, f"{min(late):.2g} to {max(late):.2g}"
        )
        parts[f"{start}, 2 layers"] = met(
            min(early) > 0.8 and max(early) < 1.25, f"{min(early):.2f} to {max(early):.2f}"
        )
        ends[start] = {"after 2": early, "after 10": [c[9] for c in courses], f"after {DEPTH}": late}
    deep = [parts[f"{start}, {DEPTH} layers"].outcome for start in ("silu", "gelu")]
    note = ""
    if "refuted" in deep:
        steep = {start: _steepness(start) for start in ("silu", "gelu")}
        note = (
            f"mean square 1 is kept on average but is no stable point: where the input's is 1% too small the output's "
            f"is {steep['silu']:.2f}% too "
            f"small for SiLU and {steep['gelu']:.2f}% for GELU, so small differences grow layer by layer"
        )
    return conclude(parts, mean_square=ends, note=note)


def _steepness(start: str) -> float:
    """d log E F(sqrt(q) z)^2 / d log q at q = 1."""
    layer = GroupKAN(8, 8, start=start, dtype=torch.float64).activation
    z = torch.linspace(-8, 8, 8001, dtype=torch.float64)
    weight = (-z.square() / 2).exp()

    def moment(q: float) -> float:
        values = layer((q**0.5 * z).unsqueeze(-1).expand(-1, 8))[:, 0]
        return float((values.square() * weight).detach().sum())

    return float(torch.tensor(moment(1.01) / moment(0.99)).log() / torch.tensor(1.01 / 0.99).log())


# -- the price beside splines ------------------------------------------------------------------------------------------


@claim(
    "At equal width it has about the parameters and multiplications of a linear layer, a splined KAN many times as many",
    source="abstract (C1, C2; S1, S2) and Table 1",
    criterion="256 to 256: parameters below 1.01 times a linear layer's and below a fifth of KANLinear's (G 5, k 3), "
    "and so the floating-point "
    "operations of its matrix products; evaluations of a function: one an input, not one a connection",
    method=GroupKAN,
    sham=Sham("B-splines on every connection", KANLinear),
)
def price_of_a_linear_layer(lab: Lab, make: Layer) -> Finding:
    def counted(layer: nn.Module) -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter:
            layer(torch.zeros(4, WIDTH))
        return sum(p.numel() for p in layer.parameters()), counter.get_total_flops()

    ours, linear, splines = (
        counted(make(WIDTH, WIDTH)),
        counted(nn.Linear(WIDTH, WIDTH)),
        counted(KANLinear(WIDTH, WIDTH)),
    )
    return conclude(
        {
            "parameters": met(ours[0] < 1.01 * linear[0] and ours[0] < splines[0] / 5),
            "operations": met(ours[1] < 1.01 * linear[1] and ours[1] < splines[1] / 5),
        },
        parameters={"group": ours[0], "linear": linear[0], "splines": splines[0]},
        operations={"group": ours[1], "linear": linear[1], "splines": splines[1]},
    )


# -- a small transformer -----------------------------------------------------------------------------------------------

DIM, BLOCKS, STEPS, BATCH = 32, 2, 250, 64
RATES, TUNING = (1e-3, 3e-3, 1e-2), (1000, 1001)


class MLPBlock(KATBlock):
    """The same block with the MLP: matrix, GELU, matrix, each started as `nn.Linear`."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__(features, heads)
        self.kan = nn.Sequential(nn.Linear(features, 4 * features), nn.GELU(), nn.Linear(4 * features, features))


class Net(nn.Module):
    """A vision transformer on 2 x 2 patches of the digits' 8 x 8 pixels."""

    def __init__(self, block: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(4, DIM), nn.Parameter(0.02 * torch.randn(16, DIM))
        self.blocks = nn.Sequential(*(block(DIM, 4) for _ in range(BLOCKS)))
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        return self.out(self.norm(self.blocks(self.embed(patches) + self.place)).mean(1))  # type: ignore[no-any-return]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)


@cache
def _loss(block: Callable[[int, int], nn.Module], seed: int, rate: float) -> float:
    """Test loss on 600 digits that each seed draws for itself, after AdamW with a cosine; coefficients are not decayed."""
    x, y = _digits()
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=g)
    x, y = x[order], y[order]
    torch.manual_seed(seed)
    net = Net(block)
    matrices = [p for n, p in net.named_parameters() if p.ndim == 2 and "denominator" not in n]
    rest = [p for n, p in net.named_parameters() if p.ndim != 2 or "denominator" in n]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=rate, weight_decay=0.05)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(600, len(x), (BATCH,), generator=g)
        loss = F.cross_entropy(net(x[rows]), y[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        course.step()
    with torch.no_grad():
        return float(F.cross_entropy(net(x[:600]), y[:600]).nan_to_num(10.0).clamp_max(10.0))


@cache
def _tuned(block: Callable[[int, int], nn.Module]) -> float:
    """The rate of least test loss over two seeds of their own; a best at the grid's end is gone beyond."""
    course: dict[float, float] = {}
    rates = list(RATES)
    while rates:
        course |= {r: sum(_loss(block, s, r) for s in TUNING) for r in rates}
        best = min(course, key=lambda r: course[r])
        further = {min(course): best / 3, max(course): best * 3}.get(best)
        rates = [further] if further is not None and 1e-5 < further < 0.3 else []
    return best


@claim(
    "A transformer with it is better than one with MLPs",
    source="abstract: KAT readily outperforms traditional MLP-based transformers (there ImageNet, 22 to 86 million parameters)",
    criterion="vision transformers of 2 blocks, 32 wide, on 8 x 8 digits, parameters within 1%: 250 AdamW steps of 64, "
    "rate tuned alike on two other "
    "seeds, 8 seeds: log test loss minus that with GELU MLPs below 0 (interval)",
    budget="full",
    method=KATBlock,
    sham=Sham("the MLP itself", MLPBlock),
)
def better_than_mlps(lab: Lab, block: Callable[[int, int], nn.Module]) -> Finding:
    seeds = lab.draws(max(lab.n_seeds, 8))
    losses = {name: [_loss(one, s, _tuned(one)) for s in seeds] for name, one in (("kat", block), ("mlp", MLPBlock))}
    sizes = [sum(p.numel() for p in Net(one).parameters()) for one in (block, MLPBlock)]
    gap = lab.effect(*(torch.tensor(losses[name]).log().tolist() for name in ("kat", "mlp")))
    return conclude(
        {"parameters alike": met(abs(sizes[0] / sizes[1] - 1) < 0.01), "lower loss": weigh(gap, below=0)},
        log_loss_minus_mlp=gap,
        losses=losses,
        parameters=sizes,
        rates={"kat": _tuned(block), "mlp": _tuned(MLPBlock)},
    )

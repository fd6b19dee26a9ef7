"""SWS (arXiv 2404.16897): do models of many depths start well from one auxiliary model with weights shared by stages?

A vision transformer on 8x8 digits: a row of pixels is a token, mean pooling; the auxiliary model has six layers in three
stages.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.lab.tasks import digits
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.weightspace._stacked import States, adamw, outputs, stacked
from pondera.weightspace.learngene import distillation_loss, expand_stages, share_stages

WIDTH, HEADS, DEPTH, COUNTS = 24, 2, 6, (2, 2, 2)
DEPTHS = (3, 8)  # of the descendants
BATCH, TRAINED_ON = 64, 1024
EPOCH = TRAINED_ON // BATCH
LONG, SHORT = 12, 2  # epochs of the auxiliary model, and of a descendant
RATES = (1.25e-4, 5e-4, 2e-3, 8e-3, 3.2e-2)
FRESH, TUNING = 10, (100, 101)  # the first seed that is not tuned on, and those that are
Expand = Callable[..., Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        q, k, v = (z.transpose(-2, -3) for z in (q, k, v))
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.proj(attended.transpose(-2, -3).flatten(-2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, WIDTH), nn.Parameter(0.02 * torch.randn(8, WIDTH))
        self.blocks: nn.Module = nn.ModuleList(Block() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(-1, (8, 8))) + self.position
        for block in self.blocks:  # type: ignore[attr-defined]
            x = block(x)
        return self.head(self.norm(x.mean(-2)))


def auxiliary(seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(DEPTH)
    model.blocks = share_stages(model.blocks, COUNTS)  # type: ignore[arg-type]
    return model


def plain(seed: int, depth: int) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(depth)


def as_model(states: States, row: int, like: Transformer) -> Transformer:
    with torch.no_grad():
        for name, w in like.named_parameters():
            w.copy_(states[name][row])
    return like


def descendant(model: Transformer, depth: int, expand: Expand) -> Transformer:
    """A model of another depth from an auxiliary one: the blocks expanded, all else copied."""
    child = Transformer(depth)
    child.blocks = expand(model.blocks, depth)
    rest = {name: w for name, w in model.named_parameters() if not name.startswith("blocks.")}
    lacking = child.load_state_dict(rest, strict=False).missing_keys
    assert all(name.startswith("blocks.") for name in lacking)
    return child


def reversed_stages(shared: Any, depth: int) -> Any:
    """The blocks in the opposite order of stages."""
    return expand_stages(list(shared)[::-1], depth)


def size(model: nn.Module) -> int:
    return sum(w.numel() for w in model.parameters())


@claim(
    "Expanded to its own depth the auxiliary model is the same function, stored as one block a stage",
    source="Sec. 3 (auxiliary model, expansion), authors' code",
    criterion="transformer of 6 layers in 3 stages, float64: logits of the expansion to 6 layers equal the auxiliary model's to "
    "1e-10; the "
    "gradient of a shared weight is the sum over its stage's copies to 1e-10; blocks stored are half of those of 6 layers; an "
    "expansion to 3 and to 8 layers holds the blocks of stages 0, 1, 2 and 0, 0, 0, 1, 1, 1, 2, 2",
    method=expand_stages,
    sham=Sham("stages in the opposite order", reversed_stages),
)
def expands_to_the_same_function(lab: Lab, expand: Expand) -> Finding:
    model = auxiliary(0).double()
    twin = Transformer(DEPTH).double()
    twin.load_state_dict(model.state_dict())
    twin.blocks = expand(model.blocks, DEPTH)
    x, y = torch.randn(16, 64, dtype=torch.float64), torch.arange(16) % 10
    a, b = model(x), twin(x)
    for out in (a, b):
        F.cross_entropy(out, y).backward()
    gap = float((a - b).detach().abs().max())
    blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type,call-overload]
    copies: list[Block] = list(twin.blocks)  # type: ignore[arg-type,call-overload]
    slopes = max(
        float(
            (blocks[2 * s].fc1.weight.grad - copies[2 * s].fc1.weight.grad - copies[2 * s + 1].fc1.weight.grad)
            .abs()
            .max()
        )  # type: ignore[operator]
        for s in range(3)
    )
    stored = size(model.blocks) / size(twin.blocks)
    wanted = {3: (0, 1, 2), 8: (0, 0, 0, 1, 1, 1, 2, 2)}
    listed = all(
        torch.equal(layer.fc1.weight, blocks[2 * s].fc1.weight)
        for depth, stages in wanted.items()
        for layer, s in zip(expand(model.blocks, depth), stages, strict=True)
    )
    return conclude(
        {
            "same function": met(gap < 1e-10),
            "gradients add up": met(slopes < 1e-10),
            "half the blocks stored": met(stored == 0.5),
            "blocks as listed": met(listed),
        },
        difference=gap,
        gradient_difference=slopes,
        stored_share=stored,
    )


# -- trained ----------------------------------------------------------------------------------------------------------


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, labels and the teacher's logits to train on; images and labels to test on."""
    (x, y), test = digits.data()
    x, y = x[:TRAINED_ON], y[:TRAINED_ON]
    torch.manual_seed(0)
    teacher = digits.build()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3, fused=True)
    for _ in range(400):
        i = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[i]), y[i]).backward()
        optimizer.step()
    with torch.no_grad():
        return x, y, teacher(x), *test


def train(model: nn.Module, states: States, runs: Sequence[tuple[int, float]], epochs: int, alpha: float) -> States:
    """Each net for some epochs: alpha is the teacher's share of the loss; rates fall by half a cosine."""
    x, y, taught, _, _ = data()
    steps = EPOCH * epochs

    def batches() -> Any:
        draws = [torch.Generator().manual_seed(seed) for seed, _ in runs]
        orders = [torch.cat([torch.randperm(len(x), generator=g) for _ in range(epochs)]) for g in draws]
        for i in torch.stack(orders).view(len(runs), steps, BATCH).unbind(1):
            yield x[i], taught[i], y[i]

    def loss(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return distillation_loss(z, t, labels, alpha=alpha) if alpha else F.cross_entropy(z, labels)

    return adamw(model, states, [rate for _, rate in runs], batches(), loss, decay=0.05, cosine=steps)


def accuracy(model: nn.Module, states: States) -> list[float]:
    *_, x, y = data()
    return (outputs(model, states, x).argmax(-1) == y).double().mean(1).tolist()


def tuned(model: nn.Module, start: Callable[[int], nn.Module], n: int, alpha: float) -> tuple[list[float], float]:
    """Accuracies of n seeds after the short training, at the rate that was best over two seeds of their own."""
    runs = [(seed, rate) for rate in RATES for seed in TUNING]
    course = accuracy(model, train(model, stacked([start(seed) for seed, _ in runs]), runs, SHORT, alpha))
    rate = max(RATES, key=lambda r: sum(a for a, (_, of) in zip(course, runs, strict=True) if of == r))
    seeds = range(FRESH, FRESH + n)
    states = stacked([start(seed) for seed in seeds])
    return accuracy(model, train(model, states, [(seed, rate) for seed in seeds], SHORT, alpha)), rate


@cache
def long(depth: int | None, n: int) -> States:
    """Auxiliary models (None), or untied ones of a depth, after distillation: n seeds and the two for tuning."""
    seeds = [*range(FRESH, FRESH + n), *TUNING]
    nets = [auxiliary(s) if depth is None else plain(s, depth) for s in seeds]
    return train(nets[0], stacked(nets), [(s, 3e-3) for s in seeds], LONG, 1.0)


def row(seed: int, n: int) -> int:
    return n + TUNING.index(seed) if seed in TUNING else seed - FRESH


@cache
def from_stages(depth: int, n: int, expand: Expand) -> tuple[list[float], float]:
    states = long(None, n)

    def start(seed: int) -> nn.Module:
        return descendant(as_model(states, row(seed, n), auxiliary(seed)), depth, expand)

    return tuned(plain(0, depth), start, n, 0.0)


@cache
def from_layers(depth: int, n: int) -> tuple[list[float], float]:
    """From an untied net of the other depth after the same training: its layers taken as stages."""
    other = next(d for d in DEPTHS if d != depth)
    states = long(other, n)

    def start(seed: int) -> nn.Module:
        return descendant(as_model(states, row(seed, n), plain(seed, other)), depth, expand_stages)

    return tuned(plain(0, depth), start, n, 0.0)


@cache
def scratch(depth: int, n: int, alpha: float) -> tuple[list[float], float]:
    return tuned(plain(0, depth), lambda seed: plain(seed, depth), n, alpha)


def untrained(shared: Any, depth: int) -> Any:
    """New blocks."""
    return nn.ModuleList(Block() for _ in range(depth))


SETUP = (
    "8x8 digits, 1,024 images, a transformer of width 24, rows as tokens; auxiliary model of 6 layers in 3 stages, 12 epochs of "
    "soft distillation from an MLP; descendants of 3 and 8 layers, 2 epochs, AdamW, the rate of each start tuned on one grid, "
    "1.25e-4 to 0.032, by 2 seeds, then 5 fresh ones, test accuracy (seeds 10 to 14: those before were looked at with a narrower "
    "grid and 15 epochs)"
)


@claim(
    "Models of other depths started from it beat training from scratch at equal epochs",
    source="abstract; tables on ImageNet-1K (10 epochs)",
    criterion=f"{SETUP}: 95% intervals of the difference to scratch, and to scratch with half the loss from the teacher, lie "
    f"above 0 at both "
    "depths. Beside it, not decisive: against layers copied from an untied net of the other depth with the same 12 epochs",
    budget="full",
    method=expand_stages,
    sham=Sham("new blocks; embeddings, norm and head copied", untrained),
)
def beats_scratch(lab: Lab, expand: Expand) -> Finding:
    n = len(lab.seeds)
    found: dict[str, Any] = {}
    parts = {}  # type: ignore[var-annotated]
    for depth in DEPTHS:
        ours, rate = from_stages(depth, n, expand)
        rivals = {
            "scratch": scratch(depth, n, 0.0),
            "scratch with the teacher": scratch(depth, n, 0.5),
            "copied layers": from_layers(depth, n),
        }
        found[f"{depth} layers"] = {"from stages": ours, "rate": rate} | {k: v for k, (v, _) in rivals.items()}
        found[f"rates at {depth} layers"] = {k: r for k, (_, r) in rivals.items()}
        parts |= {f"{depth} layers, {k}": weigh(lab.effect(ours, v), above=0) for k, (v, _) in rivals.items()}
    return conclude(parts, central=[name for name in parts if "copied" not in name], **found)


@claim(
    "It matters that each layer starts from its own stage's block",
    source="abstract (expanded at their corresponding stage), ablation",
    criterion=f"{SETUP}: minus the same with the stages in the opposite order, 95% interval above 0 at both depths",
    budget="full",
    method=expand_stages,
    sham=Sham("stages in the opposite order", reversed_stages),
)
def stages_have_their_place(lab: Lab, expand: Expand) -> Finding:
    n = len(lab.seeds)
    ours, other = ({d: from_stages(d, n, e)[0] for d in DEPTHS} for e in (expand, reversed_stages))
    gaps = {f"{d} layers": lab.effect(ours[d], other[d]) for d in DEPTHS}
    return conclude({k: weigh(gap, above=0) for k, gap in gaps.items()}, gaps=gaps, ours=ours, opposite_order=other)


@claim(
    "Against pretraining every depth it stores and trains a fraction, with better results",
    source="abstract (20x fewer parameters stored, 10x less pretraining)",
    criterion=f"{SETUP}: accuracy minus that of nets of the same depth with 12 epochs of distillation and the same 2 epochs has "
    f"its 95% "
    "interval above 0 at both depths. Beside it, not decisive: above -1 point; and, counted for the depths 3 to 8, at most a "
    "quarter of "
    "the parameters stored",
    budget="full",
    method=expand_stages,
    sham=Sham("new blocks; embeddings, norm and head copied", untrained),
)
def beats_pretraining_each_depth(lab: Lab, expand: Expand) -> Finding:
    n = len(lab.seeds)
    parts, found = {}, {}  # type: ignore[var-annotated]
    for depth in DEPTHS:
        states = long(depth, n)

        def start(seed: int, states: States = states, depth: int = depth) -> nn.Module:
            return as_model(states, row(seed, n), plain(seed, depth))

        each, _ = tuned(plain(0, depth), start, n, 0.0)
        ours, _ = from_stages(depth, n, expand)
        gap = lab.effect(ours, each)
        found[f"{depth} layers"] = {"from stages": ours, "pretrained": each, "gap": gap}
        parts |= {f"{depth} layers, better": weigh(gap, above=0), f"{depth} layers, -1 point": weigh(gap, above=-0.01)}
    stored = size(auxiliary(0)) / sum(size(plain(0, depth)) for depth in range(3, 9))
    parts["a quarter stored"] = met(stored <= 0.25)
    return conclude(
        parts,
        central=[name for name in parts if name.endswith("better")],
        stored_share=stored,
        pretraining_share=DEPTH / sum(range(3, 9)),
        **found,
    )

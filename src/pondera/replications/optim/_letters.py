"""Many small language models trained as one stack: the next character from the eight before it, by AdamW.

A model embeds the characters before, and has two hidden layers, each behind an RMS norm without weights. Every weight decays. The
text is the standard library's own source, a passage of it for each seed, read once: no character is seen twice. Models of one seed see
the same batches and begin alike, whatever their rates and decays.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

BEFORE, EMBEDDED, SYMBOLS, TEST, WARM_UP = 8, 8, 39, 8000, 0.1
START = 0.1  # standard deviation of every weight at first, near where rate and decay will hold it
BETAS, EPS = (0.9, 0.95), 1e-8
Schedule = Callable[[float], float]


def to_zero(t: float) -> float:
    """Warm-up over a tenth of the run, then a straight line to zero."""
    return min(t / WARM_UP, (1 - t) / (1 - WARM_UP))


def level(t: float) -> float:
    """Warm-up over a fiftieth of the run, then the peak to the end."""
    return min(50 * t, 1.0)


@cache
def text() -> tuple[Tensor, Tensor]:
    """Characters to train on and to test on, as numbers."""
    import argparse
    from pathlib import Path

    folder = Path(argparse.__file__).parent
    names = "argparse ast calendar csv difflib doctest heapq inspect locale mailbox pickle pdb tarfile typing zipfile"
    index = {c: i for i, c in enumerate("\n abcdefghijklmnopqrstuvwxyz_.,:()='\"#")}  # 37: a digit, 38: another sign

    def read(names: Sequence[str]) -> Tensor:
        every = "\n".join(f.read_text(encoding="utf-8") for n in names for f in [folder / f"{n}.py"] if f.is_file())
        return torch.tensor([index.get(c, 37 if c.isdigit() else 38) for c in every.lower()])

    return read(names.split()), read(["textwrap", "statistics"])


def cut(ids: Tensor) -> tuple[Tensor, Tensor]:
    windows = ids.unfold(0, BEFORE + 1, 1)
    return windows[:, :-1], windows[:, -1]


def n_weights(width: int) -> int:
    """Weights of one model without the embeddings."""
    return BEFORE * EMBEDDED * width + width * width + SYMBOLS * width


@dataclass(frozen=True)
class Runs:
    """train: loss of every batch, (seeds, points, steps). test: loss at the end, (seeds, points)."""

    train: Tensor
    test: Tensor


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def trained(
    points: Sequence[tuple[float, float]],
    *,
    width: int,
    batch: int,
    tokens: int,
    seeds: Sequence[int],
    schedule: Schedule = to_zero,
    normed: bool = True,
) -> Runs:
    """Train a model for each seed and each point (peak rate, decay) on `tokens` characters."""
    lr, decay = (torch.tensor(v).view(1, -1, 1, 1) for v in zip(*points, strict=True))
    P, S, steps = len(points), len(seeds), tokens // batch
    every_x, every_y = cut(text()[0])
    shapes = ((SYMBOLS, EMBEDDED), (BEFORE * EMBEDDED, width), (width, width), (width, SYMBOLS))
    starts, orders = [], []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        starts.append([START * torch.randn(s, generator=g) for s in shapes])
        first = int(torch.randint(len(every_y), (1,), generator=g))
        passage = (first + torch.arange(tokens)) % len(every_y)
        orders.append(passage[torch.randperm(tokens, generator=g)])
    order = torch.stack(orders)
    weights = [torch.stack(s)[:, None].repeat(1, P, 1, 1) for s in zip(*starts, strict=True)]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))  # type: ignore[assignment]
    norm = rms if normed else lambda x: x

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        """Loss of each model, (seeds, points)."""
        E, *layers = weights
        n = x.shape[1]
        at = x.reshape(S, 1, -1, 1).expand(S, P, -1, EMBEDDED)
        h = E.gather(2, at).view(S, P, n, -1)
        h = norm(h)
        for W in layers[:-1]:
            h = F.relu(norm(h @ W))
        logits = norm(h) @ layers[-1]
        logits = 3 * norm(logits) if normed else logits
        true = logits.gather(3, y.view(S, 1, n, 1).expand(S, P, n, 1)).squeeze(3)
        return (logits.logsumexp(3) - true).mean(2)

    losses = []
    for k in range(steps):
        i = order[:, k * batch : (k + 1) * batch]
        for w in weights:
            w.requires_grad_(True)
        loss = loss_of(every_x[i], every_y[i])
        grads = torch.autograd.grad(loss.sum(), weights)
        rate = lr * schedule((k + 1) / steps)
        with torch.no_grad():
            losses.append(loss.detach())
            for w, g, m, v in zip(weights, grads, first, second, strict=True):  # type: ignore[call-overload]
                m.lerp_(g, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
                bias1, bias2 = (1 - b ** (k + 1) for b in BETAS)
                w.mul_(1 - rate * decay).sub_(rate * (m / bias1) / ((v / bias2).sqrt() + EPS))
    parts = zip(*(t[:TEST].split(TEST // 8) for t in cut(text()[1])), strict=True)
    with torch.no_grad():
        test = [loss_of(x.expand(S, *x.shape), y.expand(S, *y.shape)) for x, y in parts]
    return Runs(torch.stack(losses, 2), torch.stack(test).mean(0))

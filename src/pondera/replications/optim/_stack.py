"""Many small nets with batch norm on digits, trained side by side: each has parameters and rates of its own.

400 images to train on, 857 to tune by and 540 to test on. Two hidden layers of 64, each
followed by batch norm with gain and bias, so that their weights are scale-invariant.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N_TRAIN, N_VALID, WIDTH, CLASSES = 400, 857, 64, 10
SHAPES = ((WIDTH, 64), (WIDTH, WIDTH), (CLASSES, WIDTH), (WIDTH,), (WIDTH,), (WIDTH,), (WIDTH,), (CLASSES,))
HIDDEN = (0, 1)  # of SHAPES: the scale-invariant ones


@dataclass(frozen=True)
class Trained:
    """valid, test: accuracy; growth: mean over hidden matrices of norm over first norm. Each (seeds, points)."""

    valid: Tensor
    test: Tensor
    growth: Tensor


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - x.mean()) / x.std()).float(), torch.tensor(y)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    return x[order], y[order]


def logits(P: list[Tensor], x: Tensor, norm: bool = True) -> Tensor:
    """x: (nets, images, 64); batch norm takes the statistics of the first N_TRAIN of them."""
    first, second, head, g1, b1, g2, b2, b3 = P
    for W, gain, bias in ((first, g1, b1), (second, g2, b2)):
        x = x @ W.mT
        if norm:
            var, mean = torch.var_mean(x[:, :N_TRAIN], dim=1, keepdim=True, correction=0)
            x = (x - mean) * (var + 1e-5).rsqrt()
        x = torch.addcmul(bias[:, None], x, gain[:, None]).relu()
    return torch.baddbmm(b3[:, None], x, head.mT)


def train(
    make: Callable[[list[list[list[nn.Parameter]]]], torch.optim.Optimizer],
    points: int,
    seeds: Sequence[int],
    *,
    steps: int = 200,
    batch: int = 32,
    gain: float = 1.0,
    norm: bool = True,
) -> Trained:
    """Train ``points`` nets of each seed with the rate falling by a cosine.

    make: makes the optimizer of nets by points: of each point the list of its seeds' nets, and of each net the list of its
    parameters in the order of SHAPES. gain: what the weights' usual start is multiplied by.
    """
    x, y = digits()
    starts = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        weights = [gain * torch.randn(s, generator=generator) * (2 / s[1]) ** 0.5 for s in SHAPES[:3]]
        starts.append([*weights, *(torch.full(s, 1.0 if k in (3, 5) else 0.0) for k, s in enumerate(SHAPES) if k > 2)])
    P = [torch.stack(p).repeat_interleave(points, 0).requires_grad_() for p in zip(*starts, strict=True)]
    before = [P[k].detach().flatten(1).norm(dim=1) for k in HIDDEN]
    nets = [[nn.Parameter(p.detach()[i]) for p in P] for i in range(len(P[0]))]  # views of the stack
    optimizer = make([nets[i::points] for i in range(points)])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 * (1 + math.cos(math.pi * t / steps)))
    generators = [torch.Generator().manual_seed(10_000 + s) for s in seeds]
    for _ in range(steps):
        i = torch.stack([torch.randperm(N_TRAIN, generator=g)[:batch] for g in generators]).repeat_interleave(points, 0)
        loss = F.cross_entropy(logits(P, x[i], norm).flatten(0, 1), y[i].flatten(), reduction="sum") / batch
        for k, gradient in enumerate(torch.autograd.grad(loss, P)):
            for net, g in zip(nets, gradient, strict=True):
                net[k].grad = g.contiguous()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = (logits(P, x.expand(len(nets), -1, -1), norm).argmax(2) == y)[:, N_TRAIN:].float()
        after = [P[k].flatten(1).norm(dim=1) for k in HIDDEN]
    shape = (len(seeds), points)
    valid, test = (part.mean(1).view(shape) for part in right.split([N_VALID, right.shape[1] - N_VALID], dim=1))
    growth = torch.stack([a / b for a, b in zip(after, before, strict=True)]).mean(0).view(shape)
    return Trained(valid, test, growth)

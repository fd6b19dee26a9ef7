"""Six smooth functions of four numbers whose answers are known, fitted at once by a small net; the score is R^2 on other points.

Sums, products, a ratio, a wave in a wave, a distance and a bell: what layers made of curves (KAN) are said to fit with fewer
numbers than linear ones. Points are uniform on [-1, 1]^4, and every function is scaled to variance 1.
"""

import torch
from torch import nn

settings = {"steps": 600, "batch": 128, "score": "R^2"}
TRAIN, TEST = 2000, 2000


def build():
    return nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 6))


def functions(x):
    a, b, c, d = x.unbind(-1)
    return torch.stack(
        [
            (torch.sin(torch.pi * a) + b.square()).exp(),
            a * b + c * d,
            (a + 2) / (b + 2),
            torch.sin(torch.pi * (a + torch.sin(torch.pi * b))),
            ((a - b).square() + (c - d).square() + 0.01).sqrt(),
            (-4 * x.square().sum(-1)).exp(),
        ],
        -1,
    )


def data():
    x = 2 * torch.rand(TRAIN + TEST, 4, generator=torch.Generator().manual_seed(0)) - 1
    y = functions(x)
    y = (y - y.mean(0)) / y.std(0)
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])

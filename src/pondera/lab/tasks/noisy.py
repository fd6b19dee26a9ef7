"""A small regression under much noise: 160 examples of ten Gaussian inputs and a tanh net; the score is R^2 on the test.

A run takes milliseconds, its score is continuous, and which rate validates best is mostly chance: what the lab's own
calibration needs (`pondera reproduce calibration`), and anyone who wants to see a comparison at work at once.
"""

import torch
from torch import nn

settings = {"steps": 80, "batch": 64, "score": "R^2"}
TRAIN, TEST, NOISE = 160, 400, 0.7  # examples, and the standard deviation of what no net can know


def build():
    return nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(TRAIN + TEST, 10, generator=g)
    y = x[:, 0] + torch.sin(2 * x[:, 1]) + x[:, 2] * x[:, 3] / 2 + NOISE * torch.randn(len(x), generator=g)
    y = y[:, None]
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])

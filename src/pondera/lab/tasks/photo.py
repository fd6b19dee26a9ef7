"""A grey photograph of 96x96 pixels as a function of the pixel's place: a sine network (SIREN), PSNR on unseen pixels.

The picture is cut from scikit-learn's flower.jpg (the heart of the dahlia). Three quarters of its pixels, drawn at
random, are train, the rest are test: what counts is what lies between the pixels seen. `signal()` is the picture itself
on its grid. `signals()`, for a start that learns from other pictures, are the crops of flower.jpg and china.jpg that
share no pixel with it, each through 1,024 of its pixels.
"""

import math
from itertools import pairwise

import torch
from torch import nn

settings = {"steps": 300, "batch": 1024, "optim": "Adam", "score": "PSNR in dB", "evaluations": 6}
SIDE, PLACE = 96, ("flower.jpg", 192, 288)  # the picture's size and its upper left corner
POINTS = 1024  # of each other picture
OMEGA = 30.0


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(OMEGA * x)


def build():
    widths = (2, 64, 64, 64, 1)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise(widths)):
        linear = nn.Linear(n, m)
        bound = 1 / n if i == 0 else math.sqrt(6 / n) / OMEGA
        nn.init.uniform_(linear.weight, -bound, bound)
        layers += [linear, Sine()]
    return nn.Sequential(*layers[:-1])


def crops():
    """Grey crops in [-1, 1] by (photograph, row, column), none overlapping another."""
    from sklearn.datasets import load_sample_image

    found = {}
    for name in ("flower.jpg", "china.jpg"):
        grey = torch.tensor(load_sample_image(name)).float().mean(-1) / 127.5 - 1
        for row in range(0, grey.shape[0] - SIDE + 1, SIDE):
            for column in range(0, grey.shape[1] - SIDE + 1, SIDE):
                found[name, row, column] = grey[row : row + SIDE, column : column + SIDE].clone()
    return found


def coordinates():
    at = torch.linspace(-1, 1, SIDE)
    return torch.cartesian_prod(at, at)


def signal():
    """The picture, (rows, columns, 1)."""
    return crops()[PLACE][..., None]


def signals():
    """(coordinates, values) of the other crops, at places drawn for each."""
    x, generator = coordinates(), torch.Generator().manual_seed(0)
    others = [crop.reshape(-1, 1) for place, crop in crops().items() if place != PLACE]
    drawn = [torch.randperm(len(x), generator=generator)[:POINTS] for _ in others]
    return [(x[at], y[at]) for at, y in zip(drawn, others)]


def data():
    x, y = coordinates(), signal().reshape(-1, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[len(order) // 4 :], order[: len(order) // 4]
    return (x[seen], y[seen]), (x[unseen], y[unseen])


@torch.no_grad()
def score(model, test):
    x, y = test
    return 10 * math.log10(4 / max(float((model(x) - y).square().mean()), 1e-12))  # grey values span 2

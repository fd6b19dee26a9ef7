"""Three cultivars of wine: scikit-learn's 178 bottles, 13 measurements each, and a small ReLU MLP; test accuracy.

The tiniest task there is: 107 bottles train, of which 21 validate, 71 test. Many rates validate alike and scores are one
or two bottles apart, where rules of inference go wrong first; for the lab's own calibration (`pondera reproduce
calibration`).
"""

import torch
from torch import nn

settings = {"steps": 60, "batch": 32}
TRAIN = 107


def build():
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))


def data():
    from sklearn.datasets import load_wine

    x, y = (torch.tensor(part) for part in load_wine(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = ((x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0)).float()
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])

"""Benign or malignant: scikit-learn's 569 breast cancers, 30 measurements each, and a small ReLU MLP; test accuracy.

Almost all nets classify almost all of the 199 test cases, so scores are a few examples apart: a task near its ceiling, for
the lab's own calibration (`pondera reproduce calibration`) and for a first try in seconds.
"""

import torch
from torch import nn

settings = {"steps": 80, "batch": 64}
TRAIN = 370


def build():
    return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))


def data():
    from sklearn.datasets import load_breast_cancer

    x, y = (torch.tensor(part) for part in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    x = ((x - x[:TRAIN].mean(0)) / x[:TRAIN].std(0)).float()
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])

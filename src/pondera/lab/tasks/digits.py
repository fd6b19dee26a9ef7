"""8x8 handwritten digits (1,797 images of scikit-learn) and a ReLU MLP; the score is test accuracy."""

import torch
from torch import nn

settings = {"steps": 300, "batch": 64}


def build():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def data():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split((x - x.mean()) / x.std(), y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = (torch.tensor(p) for p in parts)
    return (x_train.float(), y_train), (x_test.float(), y_test)

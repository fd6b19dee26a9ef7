"""A task of one's own: three kinds of wine by thirteen measurements (178 bottles; scikit-learn ships the table).

    pondera compare examples/wine.py "optim=SGD(momentum=0.9)" "penalty=norm_loss" --report report.html

`build` and `data` are needed. The rest is optional, and is here to show how it is done.
"""

import torch
from torch import nn
from torch.nn import functional as F

# Anything left out keeps its default; `score` is only the name that tables show.
settings = {"steps": 120, "batch": 32, "score": "balanced accuracy", "bounds": [0, 1]}


def build():
    """A fresh model. It is called with the seed already set, so it draws and does not seed."""
    return nn.Sequential(nn.Linear(13, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


def data():
    """(train, test): tuples of tensors with bottles first. The third tensor is each bottle's weight in the loss."""
    from sklearn.datasets import load_wine
    from sklearn.model_selection import train_test_split

    x, y = load_wine(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.4, random_state=0, stratify=y)
    mean, std = x_train.mean(0), x_train.std(0)  # of train alone: test must not leak into it

    def tensors(x, y):
        y = torch.tensor(y)
        rare = len(y) / (3 * torch.bincount(y, minlength=3))  # each kind weighs the same in all
        return torch.tensor((x - mean) / std).float(), y, rare[y]

    return tensors(x_train, y_train), tensors(x_test, y_test)


def loss(model, batch):
    """The training loss of one batch. Without it: cross-entropy of (x, y), or squared error for floating targets."""
    x, y, weight = batch
    return (weight * F.cross_entropy(model(x), y, reduction="none")).mean()


def score(model, test):
    """Higher is better. Without it: accuracy, or R^2 for floating targets. Called in eval mode, without gradients."""
    x, y, _ = test
    right = (model(x).argmax(-1) == y).double()
    return sum(right[y == kind].mean() for kind in y.unique()) / len(y.unique())


def inputs(batch):
    """What the model's forward takes of a batch. The first tensor is the default, so this one could be left out."""
    return batch[0]

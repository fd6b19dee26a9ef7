"""A LightningModule as a task: ten digits in images of 8 by 8 points (scikit-learn ships them).

    pondera compare examples/lightning_task.py "optim=SGD(momentum=0.9)" --seeds 2 --budget 20 --rates 0.01,0.1

The module stays as it was. Only `build`, `data` and `train` are new.
"""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from pondera.lab.trainers import with_lightning

settings = {"steps": 100, "batch": 32, "bounds": [0, 1]}


class Digits(LightningModule):
    """As it was before; `configure_optimizers` could be there, and would be left aside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(-1) == y).float().mean())


def build():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16).float(), torch.tensor(y)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def train(run):
    return with_lightning(run, Digits, monitor="accuracy")

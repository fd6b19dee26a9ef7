"""A sparse autoencoder on activations whose features are known: 32 directions in 24 dimensions, some active only where another is.

Eight features are parents of two each; a child is active in half of its parent's rows. An autoencoder is tempted to write
parent and child as one feature, or one feature twice. The score is how well the true directions are found: the largest cosine of each
with a learned feature, mean over the true ones. Reconstruction is the loss (mean squared error, three features a row).
"""

import torch
from torch import nn

from pondera.penalties import SparseAutoencoder

settings = {"steps": 600, "batch": 256, "score": "mean cosine", "bounds": [-1.0, 1.0], "resolution": 0.0}
D, PARENTS, CHILDREN, FREE, FEATURES, ACTIVE, ROWS = 24, 8, 2, 8, 64, 3, 12_000


def build():
    return SparseAutoencoder(D, FEATURES, ACTIVE)


def world():
    """The true directions, and rows of activations: sizes from 0.5 to 1.5, parents and free features in an eighth of the rows."""
    g = torch.Generator().manual_seed(0)
    true = nn.functional.normalize(torch.randn(PARENTS * (1 + CHILDREN) + FREE, D, generator=g), dim=1)
    single = torch.rand(ROWS, PARENTS + FREE, generator=g) < 0.125
    child = (torch.rand(ROWS, PARENTS, CHILDREN, generator=g) < 0.5) & single[:, :PARENTS, None]
    active = torch.cat([single[:, :PARENTS], child.flatten(1), single[:, PARENTS:]], 1)
    return true, (active * (0.5 + torch.rand(active.shape, generator=g))) @ true


def data():
    x = world()[1]
    return (x[:10_000],), (x[10_000:],)


def loss(model, batch):
    model.normalize_()
    return (model(batch[0])[0] - batch[0]).square().sum(-1).mean()


def score(model, test):
    learned = nn.functional.normalize(model.decoder.detach(), dim=1).cpu()
    return float((world()[0] @ learned.T).amax(1).mean())

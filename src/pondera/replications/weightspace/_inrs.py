"""A zoo that several replications classify: small networks, each of one image."""

from functools import cache

import torch
from torch import Tensor

from pondera.weightspace import fit_inrs


@cache
def inrs() -> tuple[dict[str, Tensor], Tensor]:
    """A SIREN 2-16-16-1 with w0 = 6 for each of 700 digits 0 to 3, every one from a start of its own."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(0)
    of = (y < 4).nonzero().flatten()
    of = of[torch.randperm(len(of), generator=g)[:700]]
    images = x[of].float().view(-1, 8, 8) / 16
    return fit_inrs(images, width=16, w0=6.0, steps=200, rate=4e-3, generator=g), y[of]


@cache
def shallow_inrs() -> tuple[dict[str, Tensor], Tensor]:
    """The same with one hidden layer of 16: mean squared error 0.018 of pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    g = torch.Generator().manual_seed(0)
    of = (y < 4).nonzero().flatten()
    of = of[torch.randperm(len(of), generator=g)[:700]]
    images = x[of].float().view(-1, 8, 8) / 16
    return fit_inrs(images, width=16, depth=1, w0=6.0, steps=300, rate=1e-2, generator=g), y[of]

"""How weights move: `torch.optim.Optimizer` subclasses, and `groups`, which splits a model's matrices from the rest.

`spread` lets the ranks of a distributed run share the work of a matrix optimizer.

>>> import torch
>>> from pondera.optim import NorMuon, groups
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> optimizer = NorMuon(groups(net), lr=0.02)
"""

from pondera.optim._base import gather_state, spread
from pondera.optim._groups import groups
from pondera.optim.auon import AuON, HybridAuON
from pondera.optim.decoupled_decay import SGDW
from pondera.optim.kl_shampoo import KLFit, KLShampoo, kl_fit, kl_objective
from pondera.optim.normuon import NorMuon
from pondera.optim.shampoo_4bit import Shampoo4bit
from pondera.optim.shampoo_squared import KroneckerFit, Shampoo, kronecker_fit

__all__ = [
    "SGDW",
    "AuON",
    "HybridAuON",
    "KLFit",
    "KLShampoo",
    "KroneckerFit",
    "NorMuon",
    "Shampoo",
    "Shampoo4bit",
    "gather_state",
    "groups",
    "kl_fit",
    "kl_objective",
    "kronecker_fit",
    "spread",
]

"""How weights move: `torch.optim.Optimizer` subclasses, and `groups`, which splits a model's matrices from the rest.

`spread` lets the ranks of a distributed run share the work of a matrix optimizer.

>>> import torch
>>> from pondera.optim import NorMuon, groups
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> optimizer = NorMuon(groups(net), lr=0.02)
"""

from pondera.optim._base import gather_state, spread
from pondera.optim._groups import groups
from pondera.optim.adafactor import Adafactor
from pondera.optim.auon import AuON, HybridAuON
from pondera.optim.dct_projection import DCTAdamW
from pondera.optim.decoupled_decay import SGDW
from pondera.optim.normuon import NorMuon
from pondera.optim.structured_ngd import StructuredNGD

__all__ = [
    "SGDW",
    "Adafactor",
    "AuON",
    "DCTAdamW",
    "HybridAuON",
    "NorMuon",
    "StructuredNGD",
    "gather_state",
    "groups",
    "spread",
]

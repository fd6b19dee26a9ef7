"""How weights move: `torch.optim.Optimizer` subclasses, and `groups`, which splits a model's matrices from the rest.

>>> import torch
>>> from pondera.optim import NorMuon, groups
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> optimizer = NorMuon(groups(net), lr=0.02)
"""

from pondera.optim._groups import groups
from pondera.optim.auon import AuON, HybridAuON
from pondera.optim.decoupled_decay import SGDW
from pondera.optim.layer_rotation import Layca
from pondera.optim.model_building_step import SMB
from pondera.optim.normuon import NorMuon
from pondera.optim.optimal_input_gain import OneHidden, TwoStage, train_two_stage
from pondera.optim.polyak_momentum import PolyakMomentum

__all__ = [
    "SGDW",
    "SMB",
    "AuON",
    "HybridAuON",
    "Layca",
    "NorMuon",
    "OneHidden",
    "PolyakMomentum",
    "TwoStage",
    "groups",
    "train_two_stage",
]

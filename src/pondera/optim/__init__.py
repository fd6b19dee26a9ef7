"""How weights move: `torch.optim.Optimizer` subclasses, and `groups`, which splits a model's matrices from the rest.

`spread` lets the ranks of a distributed run share the work of a matrix optimizer.

>>> import torch
>>> from pondera.optim import NorMuon, groups
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> optimizer = NorMuon(groups(net), lr=0.02)
"""

from pondera.optim._base import gather_state, spread
from pondera.optim._groups import groups
from pondera.optim._norms import dual_map, dual_norm
from pondera.optim.auon import AuON, HybridAuON
from pondera.optim.decoupled_decay import SGDW
from pondera.optim.norm_anthology import SteepestDescent, roles
from pondera.optim.normuon import NorMuon
from pondera.optim.novograd import NovoGrad
from pondera.optim.trust_region_muon import TrustRegion

__all__ = [
    "SGDW",
    "AuON",
    "HybridAuON",
    "NorMuon",
    "NovoGrad",
    "SteepestDescent",
    "TrustRegion",
    "dual_map",
    "dual_norm",
    "gather_state",
    "groups",
    "roles",
    "spread",
]

"""How weights move: `torch.optim.Optimizer` subclasses, and `groups`, which splits a model's matrices from the rest.

`spread` lets the ranks of a distributed run share the work of a matrix optimizer. Beside the optimizers are tools for
setting them: laws fitted to a sweep, rates for a graph, gradients of hyperparameters, and surgery on the gradients of several
losses.

>>> import torch
>>> from pondera.optim import NorMuon, groups
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
>>> optimizer = NorMuon(groups(net), lr=0.02)
"""

from pondera.optim._base import gather_state, spread
from pondera.optim._groups import groups
from pondera.optim._norms import dual_map, dual_norm
from pondera.optim.architecture_scaling import (
    Topology,
    architecture_scaled,
    architecture_scaled_,
    path_depths,
    topology,
)
from pondera.optim.auon import AuON, HybridAuON
from pondera.optim.bloop import Bloop
from pondera.optim.dct_projection import DCTAdamW
from pondera.optim.decoupled_decay import SGDW
from pondera.optim.implicit_tuning import Hypergradient, implicit_hypergradient
from pondera.optim.kl_shampoo import KLFit, KLShampoo, kl_fit, kl_objective
from pondera.optim.layer_rotation import Layca
from pondera.optim.model_building_step import SMB
from pondera.optim.norm_anthology import SteepestDescent, roles
from pondera.optim.normuon import NorMuon
from pondera.optim.novograd import NovoGrad
from pondera.optim.optimal_input_gain import OneHidden, TwoStage, train_two_stage
from pondera.optim.polyak_momentum import PolyakMomentum
from pondera.optim.power_lines import (
    CriticalBatch,
    Optimum,
    PowerLaw,
    decay_for,
    fit_critical_batch,
    fit_optimum,
    fit_power_law,
    timescale,
)
from pondera.optim.shampoo_4bit import Shampoo4bit
from pondera.optim.shampoo_squared import KroneckerFit, Shampoo, kronecker_fit
from pondera.optim.structured_ngd import StructuredNGD
from pondera.optim.trajectory_invariance import (
    Invariance,
    effective_rate,
    one_dimensional_sweep,
    regime,
    trajectory_invariance,
)
from pondera.optim.trust_region_muon import TrustRegion

__all__ = [
    "SGDW",
    "SMB",
    "AuON",
    "Bloop",
    "CriticalBatch",
    "DCTAdamW",
    "HybridAuON",
    "Hypergradient",
    "Invariance",
    "KLFit",
    "KLShampoo",
    "KroneckerFit",
    "Layca",
    "NorMuon",
    "NovoGrad",
    "OneHidden",
    "Optimum",
    "PolyakMomentum",
    "PowerLaw",
    "Shampoo",
    "Shampoo4bit",
    "SteepestDescent",
    "StructuredNGD",
    "Topology",
    "TrustRegion",
    "TwoStage",
    "architecture_scaled",
    "architecture_scaled_",
    "decay_for",
    "dual_map",
    "dual_norm",
    "effective_rate",
    "fit_critical_batch",
    "fit_optimum",
    "fit_power_law",
    "gather_state",
    "groups",
    "implicit_hypergradient",
    "kl_fit",
    "kl_objective",
    "kronecker_fit",
    "one_dimensional_sweep",
    "path_depths",
    "regime",
    "roles",
    "spread",
    "timescale",
    "topology",
    "train_two_stage",
    "trajectory_invariance",
]

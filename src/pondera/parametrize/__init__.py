"""How weights are held: parametrizations for `torch.nn.utils.parametrize`, and starts that set them from data.

>>> import torch
>>> from pondera.parametrize import weight_norm
>>> layer = weight_norm(torch.nn.Linear(3, 2))
>>> sorted(name for name, _ in layer.named_parameters())
['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
"""

from pondera.parametrize.bitwise import Bitwise
from pondera.parametrize.mpo_sharing import share_mpo
from pondera.parametrize.signed_supermask import SignedSupermask
from pondera.parametrize.u_mup import (
    UnitEmbedding,
    UnitLinear,
    UnitReadout,
    UnitResidual,
    residual_taus,
    u_mup_groups,
    unit_attention,
    unit_cross_entropy,
    unit_gelu,
    unit_silu_glu,
)
from pondera.parametrize.weight_compander import Compander
from pondera.parametrize.weight_conditioning import Conditioned
from pondera.parametrize.weight_normalization import data_dependent_weight_norm_, weight_norm

__all__ = [
    "Bitwise",
    "Compander",
    "Conditioned",
    "SignedSupermask",
    "UnitEmbedding",
    "UnitLinear",
    "UnitReadout",
    "UnitResidual",
    "data_dependent_weight_norm_",
    "residual_taus",
    "share_mpo",
    "u_mup_groups",
    "unit_attention",
    "unit_cross_entropy",
    "unit_gelu",
    "unit_silu_glu",
    "weight_norm",
]

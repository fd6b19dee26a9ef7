"""Layers of structured weights: `nn.Module` classes with signatures like torch's own layers.

>>> import torch
>>> from pondera.nn import Maxout
>>> Maxout(4, 3, pieces=2)(torch.zeros(5, 4)).shape
torch.Size([5, 3])
"""

from pondera.nn._diagrams import equivariant_maps
from pondera.nn.brauer_groups import BrauerLinear
from pondera.nn.equivariance import act_on, equivariance_error, group_element
from pondera.nn.fast_brauer import diagram_product
from pondera.nn.gaunt import GauntTensorProduct
from pondera.nn.glgenn import (
    GeometricProduct,
    MultivectorLinear,
    MultivectorNorm,
    geometric_product,
    multivector,
    outermorphism,
)
from pondera.nn.hippo_prophecy import HippoProphecy, prophecy_weights
from pondera.nn.if2net import IF2Net
from pondera.nn.kan import KAN, KANLinear
from pondera.nn.kat import GroupKAN, GroupRational, KATBlock
from pondera.nn.large_batch_regime import GhostBatchNorm1d, GhostBatchNorm2d, adapted_regime
from pondera.nn.maxout import Maxout
from pondera.nn.neural_arithmetic import NAU, NMU, regularizer_scale
from pondera.nn.orthogonal_activations import (
    FourierActivation,
    HermiteActivation,
    TropicalActivation,
    hermite_interpolation,
)
from pondera.nn.partition_diagrams import PermutationLinear
from pondera.nn.perturb_diagonalize import perturb_diagonalize, ptd_start, transfer_function
from pondera.nn.post_hoc_orthogonal import SemiStructured
from pondera.nn.s4d import S4D, s4d_start
from pondera.nn.structured_linear import TT, Btt, Kronecker, Monarch, structured_groups, structured_start_
from pondera.nn.swap import rate_groups, swap_linear
from pondera.nn.transform_once import T1, T1Layer, variance_preserving_

__all__ = [
    "KAN",
    "NAU",
    "NMU",
    "S4D",
    "T1",
    "TT",
    "BrauerLinear",
    "Btt",
    "FourierActivation",
    "GauntTensorProduct",
    "GeometricProduct",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GroupKAN",
    "GroupRational",
    "HermiteActivation",
    "HippoProphecy",
    "IF2Net",
    "KANLinear",
    "KATBlock",
    "Kronecker",
    "Maxout",
    "Monarch",
    "MultivectorLinear",
    "MultivectorNorm",
    "PermutationLinear",
    "SemiStructured",
    "T1Layer",
    "TropicalActivation",
    "act_on",
    "adapted_regime",
    "diagram_product",
    "equivariance_error",
    "equivariant_maps",
    "geometric_product",
    "group_element",
    "hermite_interpolation",
    "multivector",
    "outermorphism",
    "perturb_diagonalize",
    "prophecy_weights",
    "ptd_start",
    "rate_groups",
    "regularizer_scale",
    "s4d_start",
    "structured_groups",
    "structured_start_",
    "swap_linear",
    "transfer_function",
    "variance_preserving_",
]

"""Where weights start: `name_(tensor or module, ..., generator=None)`, in place, returning its argument.

>>> import torch
>>> from pondera.init import orthogonal_
>>> w = orthogonal_(torch.empty(3, 3), nonlinearity="tanh", generator=torch.Generator().manual_seed(0))
>>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-6)
True
"""

from pondera.init._select_file import Selected, select_file
from pondera.init.activation_variance import activation_variance, activation_variance_
from pondera.init.convolution_aware import convolution_aware_
from pondera.init.edge_of_chaos import EdgePoint, correlation_map, edge_of_chaos, edge_of_chaos_, variance_map
from pondera.init.fast_certified import certified_loss, ibp_, warmup, with_batchnorm
from pondera.init.idinit import idinit_
from pondera.init.learned_inr_start import meta_learn_
from pondera.init.lsuv import lsuv_
from pondera.init.maxout import maxout_, maxout_constant
from pondera.init.orthogonal_features import critical_gain, orthogonal_
from pondera.init.pseudo_iid import block_sparse_, low_rank_iid_
from pondera.init.rich_features import rich_features_
from pondera.init.rich_lazy import low_rank_
from pondera.init.virgo import virgo_
from pondera.init.weight_rescaling import TargetVariance, layer_index_rescale_
from pondera.init.weight_selection import select_from_
from pondera.init.winner import noise_scales, spectral_centroid, winner_
from pondera.init.zero import zero_

__all__ = [
    "EdgePoint",
    "Selected",
    "TargetVariance",
    "activation_variance",
    "activation_variance_",
    "block_sparse_",
    "certified_loss",
    "convolution_aware_",
    "correlation_map",
    "critical_gain",
    "edge_of_chaos",
    "edge_of_chaos_",
    "ibp_",
    "idinit_",
    "layer_index_rescale_",
    "low_rank_",
    "low_rank_iid_",
    "lsuv_",
    "maxout_",
    "maxout_constant",
    "meta_learn_",
    "noise_scales",
    "orthogonal_",
    "rich_features_",
    "select_file",
    "select_from_",
    "spectral_centroid",
    "variance_map",
    "virgo_",
    "warmup",
    "winner_",
    "with_batchnorm",
    "zero_",
]

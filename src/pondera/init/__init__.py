"""Where weights start: `name_(tensor or module, ..., generator=None)`, in place, returning its argument.

>>> import torch
>>> from pondera.init import orthogonal_
>>> w = orthogonal_(torch.empty(3, 3), nonlinearity="tanh", generator=torch.Generator().manual_seed(0))
>>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-6)
True
"""

from pondera.init.activation_variance import activation_variance, activation_variance_
from pondera.init.convolution_aware import convolution_aware_
from pondera.init.edge_of_chaos import EdgePoint, correlation_map, edge_of_chaos, edge_of_chaos_, variance_map
from pondera.init.lsuv import lsuv_
from pondera.init.orthogonal_features import critical_gain, orthogonal_
from pondera.init.zero import zero_

__all__ = [
    "EdgePoint",
    "activation_variance",
    "activation_variance_",
    "convolution_aware_",
    "correlation_map",
    "critical_gain",
    "edge_of_chaos",
    "edge_of_chaos_",
    "lsuv_",
    "orthogonal_",
    "variance_map",
    "zero_",
]

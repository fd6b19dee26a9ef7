"""Layers of structured weights: `nn.Module` classes with signatures like torch's own layers.

>>> import torch
>>> from pondera.nn import Maxout
>>> Maxout(4, 3, pieces=2)(torch.zeros(5, 4)).shape
torch.Size([5, 3])
"""

from pondera.nn.equivariance import act_on, equivariance_error, group_element
from pondera.nn.maxout import Maxout

__all__ = ["Maxout", "act_on", "equivariance_error", "group_element"]

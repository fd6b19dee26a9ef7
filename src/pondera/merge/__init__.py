"""Several models into one: functions on state dicts, and on safetensors files name by name.

Each method has two doors. `fuse(models)` and the like take state dicts or modules and return a new state dict, whose
`report` says what changed. `fuse_files(models, out)` and the like take files, need a few MiB whatever the size of the
models, and return the report.

>>> import torch
>>> from pondera.merge import fuse
>>> merged = fuse([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
>>> merged["w"]
tensor([0.5000, 0.5000])
"""

from pondera.merge._stream import Change, MergedState, MergeReport
from pondera.merge.bang import balancing_scale, bang, bang_files, bang_loss, wise_ft, wise_ft_files
from pondera.merge.fuse import fuse, fuse_files
from pondera.merge.model_stock import model_stock, model_stock_files, stock_epoch_

__all__ = [
    "Change",
    "MergeReport",
    "MergedState",
    "balancing_scale",
    "bang",
    "bang_files",
    "bang_loss",
    "fuse",
    "fuse_files",
    "model_stock",
    "model_stock_files",
    "stock_epoch_",
    "wise_ft",
    "wise_ft_files",
]

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

from pondera._permute import PermutationSpec, apply_permutation, trace_permutations
from pondera.merge._match_files import match_files
from pondera.merge._stream import Change, MergedState, MergeReport
from pondera.merge.bang import balancing_scale, bang, bang_files, bang_loss, wise_ft, wise_ft_files
from pondera.merge.barrier import Barrier, barrier, reset_norms_
from pondera.merge.fuse import fuse, fuse_files
from pondera.merge.infinite_compute import Ensemble, PowerLaw, fit_power_law, mixed_batches, sample_sequences
from pondera.merge.model_stock import model_stock, model_stock_files, stock_epoch_
from pondera.merge.orthogonal_merge import (
    OrthogonalMerge,
    bake_orthogonal_merge,
    orthogonal_dropout,
    orthogonal_dropout_merge,
    orthogonal_factors,
)
from pondera.merge.recipe import merge_recipe
from pondera.merge.weight_matching import (
    ManyMatched,
    Matched,
    SingularAlignment,
    match_many,
    singular_alignment,
    straight_through_matching,
    weight_matching,
)

__all__ = [
    "Barrier",
    "Change",
    "Ensemble",
    "ManyMatched",
    "Matched",
    "MergeReport",
    "MergedState",
    "OrthogonalMerge",
    "PermutationSpec",
    "PowerLaw",
    "SingularAlignment",
    "apply_permutation",
    "bake_orthogonal_merge",
    "balancing_scale",
    "bang",
    "bang_files",
    "bang_loss",
    "barrier",
    "fit_power_law",
    "fuse",
    "fuse_files",
    "match_files",
    "match_many",
    "merge_recipe",
    "mixed_batches",
    "model_stock",
    "model_stock_files",
    "orthogonal_dropout",
    "orthogonal_dropout_merge",
    "orthogonal_factors",
    "reset_norms_",
    "sample_sequences",
    "singular_alignment",
    "stock_epoch_",
    "straight_through_matching",
    "trace_permutations",
    "weight_matching",
    "wise_ft",
    "wise_ft_files",
]

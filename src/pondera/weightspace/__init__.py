"""Networks that read or write the weights of networks, and the tools they share.

A batch of networks is a mapping from tensor names to tensors (nets, *shape), in torch's own layout; layers take them with
channels at the end, (nets, *shape, channels). A `PermutationSpec` says which hidden units may change places, and
`trace_permutations` finds it for any model.

>>> import torch
>>> from pondera.weightspace import stack_states, trace_permutations
>>> nets = [torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)) for _ in range(5)]
>>> stack_states(nets)["0.weight"].shape
torch.Size([5, 8, 2])
>>> trace_permutations(nets[0], torch.randn(3, 2)).axes["0.weight"]
('0', None)
"""

from pondera._permute import PermutationSpec, apply_permutation, trace_permutations
from pondera.weightspace._states import Standardize, equivariance_error, permute_states, stack_states, unstack_states
from pondera.weightspace.checkpoint_search import (
    CheckpointSearch,
    NeuronGraphEncoder,
    WeightStatistics,
    expected_improvement,
    search_checkpoints,
)
from pondera.weightspace.hypernet_tuning import HypernetTuner, LinearHypernet
from pondera.weightspace.learngene import distillation_loss, expand_stages, share_stages, stage_counts
from pondera.weightspace.logah import LoGAH, LowRankDecoder, ParameterGraph, parameter_graph
from pondera.weightspace.mixture_growth import (
    MixtureBatchNorm1d,
    MixtureBatchNorm2d,
    MixtureConv2d,
    MixtureLinear,
    grow,
    select,
)
from pondera.weightspace.tangle_search import Choice, EntangledConv2d, EntangledLinear, choices, draw_choices, sparsemax
from pondera.weightspace.zoo import (
    Zoo,
    coordinates,
    fit_inrs,
    load_zoo,
    make_zoo,
    run_states,
    siren,
    start_states,
    train_states,
    zoo_kinds,
)

__all__ = [
    "CheckpointSearch",
    "Choice",
    "EntangledConv2d",
    "EntangledLinear",
    "HypernetTuner",
    "LinearHypernet",
    "LoGAH",
    "LowRankDecoder",
    "MixtureBatchNorm1d",
    "MixtureBatchNorm2d",
    "MixtureConv2d",
    "MixtureLinear",
    "NeuronGraphEncoder",
    "ParameterGraph",
    "PermutationSpec",
    "Standardize",
    "WeightStatistics",
    "Zoo",
    "apply_permutation",
    "choices",
    "coordinates",
    "distillation_loss",
    "draw_choices",
    "equivariance_error",
    "expand_stages",
    "expected_improvement",
    "fit_inrs",
    "grow",
    "load_zoo",
    "make_zoo",
    "parameter_graph",
    "permute_states",
    "run_states",
    "search_checkpoints",
    "select",
    "share_stages",
    "siren",
    "sparsemax",
    "stack_states",
    "stage_counts",
    "start_states",
    "trace_permutations",
    "train_states",
    "unstack_states",
    "zoo_kinds",
]

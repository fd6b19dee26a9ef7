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
from pondera.weightspace.denoised_weights import WeightBlocks, WeightDiffusion
from pondera.weightspace.hypernet_tuning import HypernetTuner, LinearHypernet
from pondera.weightspace.latent_networks import (
    FoundNetworks,
    NetworkAutoencoder,
    latent_search,
    pack_networks,
    random_networks,
    run_networks,
    unpack_networks,
)
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
from pondera.weightspace.neural_functionals import UniversalFunctional, UniversalInvariant, UniversalNet
from pondera.weightspace.tangle_search import Choice, EntangledConv2d, EntangledLinear, choices, draw_choices, sparsemax
from pondera.weightspace.weight_space_nets import DWSInvariant, DWSLayer, DWSNet, mlp_spec
from pondera.weightspace.weightspace_augment import (
    add_noise,
    drop_smallest,
    drop_weights,
    flip_signs,
    match_states,
    move_inputs,
    scale_units,
    shift_phases,
    weight_mixup,
)
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
    "DWSInvariant",
    "DWSLayer",
    "DWSNet",
    "EntangledConv2d",
    "EntangledLinear",
    "FoundNetworks",
    "HypernetTuner",
    "LinearHypernet",
    "LoGAH",
    "LowRankDecoder",
    "MixtureBatchNorm1d",
    "MixtureBatchNorm2d",
    "MixtureConv2d",
    "MixtureLinear",
    "NetworkAutoencoder",
    "NeuronGraphEncoder",
    "ParameterGraph",
    "PermutationSpec",
    "Standardize",
    "UniversalFunctional",
    "UniversalInvariant",
    "UniversalNet",
    "WeightBlocks",
    "WeightDiffusion",
    "WeightStatistics",
    "Zoo",
    "add_noise",
    "apply_permutation",
    "choices",
    "coordinates",
    "distillation_loss",
    "draw_choices",
    "drop_smallest",
    "drop_weights",
    "equivariance_error",
    "expand_stages",
    "expected_improvement",
    "fit_inrs",
    "flip_signs",
    "grow",
    "latent_search",
    "load_zoo",
    "make_zoo",
    "match_states",
    "mlp_spec",
    "move_inputs",
    "pack_networks",
    "parameter_graph",
    "permute_states",
    "random_networks",
    "run_networks",
    "run_states",
    "scale_units",
    "search_checkpoints",
    "select",
    "share_stages",
    "shift_phases",
    "siren",
    "sparsemax",
    "stack_states",
    "stage_counts",
    "start_states",
    "trace_permutations",
    "train_states",
    "unpack_networks",
    "unstack_states",
    "weight_mixup",
    "zoo_kinds",
]

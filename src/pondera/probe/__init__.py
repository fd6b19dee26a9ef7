"""How weights are looked at: `name(model, batch, ...) -> dataclass` that speaks (`.summary()`) and draws (`.plot()`).

>>> import torch
>>> from pondera.probe import initial_guessing_bias
>>> found = initial_guessing_bias(torch.nn.Linear(4, 3), torch.randn(64, 4))
>>> found.fractions.shape
torch.Size([3])
"""

from pondera._bounds import interval_bounds, margin_bounds
from pondera.probe._diagonal_attention import DiagonalAttention, StagedTraining, Stages, predicted_stages
from pondera.probe._tangent import TangentKernel
from pondera.probe.depth_fluctuations import DepthFluctuations, depth_fluctuations
from pondera.probe.gradual_rank import RankOfChange, rank_of_change
from pondera.probe.ibp_tightness import IBPTightness, expected_tightness, ibp_tightness, propagation_invariant
from pondera.probe.inductive_bias import Interpolants, RequiredInductiveBias, interpolants, required_inductive_bias
from pondera.probe.initial_guessing_bias import GuessingLaw, InitialGuessingBias, initial_guessing_bias, predicted_bias
from pondera.probe.koopman_bound import KoopmanBound, koopman_bound, koopman_factor
from pondera.probe.labelled_ntk import LabelledKernel, SampleClusters, labelled_ntk, redundant_first, sample_clusters
from pondera.probe.layer_rotation import LayerRotation, layer_rotation
from pondera.probe.lora_features import LoraFeatures, lora_features
from pondera.probe.neural_collapse import (
    DeepLinearGeometry,
    NeuralCollapse,
    deep_linear_geometry,
    frame_distance,
    neural_collapse,
)
from pondera.probe.neural_redshift import FunctionComplexity, function_complexity
from pondera.probe.ntk import InfiniteKernels, KernelDynamics, infinite_ntk, kernel_dynamics, ntk
from pondera.probe.pseudo_ntk import pseudo_ntk
from pondera.probe.rich_lazy import Laziness, laziness
from pondera.probe.supersample_bounds import Supersample, SupersampleBounds, supersample, supersample_bounds
from pondera.probe.training_jacobian import (
    BulkOverlap,
    TrainingJacobian,
    bulk_overlap,
    sgd_training,
    training_jacobian,
)

__all__ = [
    "BulkOverlap",
    "DeepLinearGeometry",
    "DepthFluctuations",
    "DiagonalAttention",
    "FunctionComplexity",
    "GuessingLaw",
    "IBPTightness",
    "InfiniteKernels",
    "InitialGuessingBias",
    "Interpolants",
    "KernelDynamics",
    "KoopmanBound",
    "LabelledKernel",
    "LayerRotation",
    "Laziness",
    "LoraFeatures",
    "NeuralCollapse",
    "RankOfChange",
    "RequiredInductiveBias",
    "SampleClusters",
    "StagedTraining",
    "Stages",
    "Supersample",
    "SupersampleBounds",
    "TangentKernel",
    "TrainingJacobian",
    "bulk_overlap",
    "deep_linear_geometry",
    "depth_fluctuations",
    "expected_tightness",
    "frame_distance",
    "function_complexity",
    "ibp_tightness",
    "infinite_ntk",
    "initial_guessing_bias",
    "interpolants",
    "interval_bounds",
    "kernel_dynamics",
    "koopman_bound",
    "koopman_factor",
    "labelled_ntk",
    "layer_rotation",
    "laziness",
    "lora_features",
    "margin_bounds",
    "neural_collapse",
    "ntk",
    "predicted_bias",
    "predicted_stages",
    "propagation_invariant",
    "pseudo_ntk",
    "rank_of_change",
    "redundant_first",
    "required_inductive_bias",
    "sample_clusters",
    "sgd_training",
    "supersample",
    "supersample_bounds",
    "training_jacobian",
]

"""How weights are looked at: `name(model, batch, ...) -> dataclass` that speaks (`.summary()`) and draws (`.plot()`).

>>> import torch
>>> from pondera.probe import initial_guessing_bias
>>> found = initial_guessing_bias(torch.nn.Linear(4, 3), torch.randn(64, 4))
>>> found.fractions.shape
torch.Size([3])
"""

from pondera.probe.depth_fluctuations import DepthFluctuations, depth_fluctuations
from pondera.probe.initial_guessing_bias import GuessingLaw, InitialGuessingBias, initial_guessing_bias, predicted_bias
from pondera.probe.neural_collapse import (
    DeepLinearGeometry,
    NeuralCollapse,
    deep_linear_geometry,
    frame_distance,
    neural_collapse,
)
from pondera.probe.neural_redshift import FunctionComplexity, function_complexity

__all__ = [
    "DeepLinearGeometry",
    "DepthFluctuations",
    "FunctionComplexity",
    "GuessingLaw",
    "InitialGuessingBias",
    "NeuralCollapse",
    "deep_linear_geometry",
    "depth_fluctuations",
    "frame_distance",
    "function_complexity",
    "initial_guessing_bias",
    "neural_collapse",
    "predicted_bias",
]

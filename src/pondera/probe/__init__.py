"""How weights are looked at: `name(model, batch, ...) -> dataclass` that speaks (`.summary()`) and draws (`.plot()`).

>>> import torch
>>> from pondera.probe import initial_guessing_bias
>>> found = initial_guessing_bias(torch.nn.Linear(4, 3), torch.randn(64, 4))
>>> found.fractions.shape
torch.Size([3])
"""

from pondera.probe.depth_fluctuations import DepthFluctuations, depth_fluctuations
from pondera.probe.initial_guessing_bias import GuessingLaw, InitialGuessingBias, initial_guessing_bias, predicted_bias

__all__ = [
    "DepthFluctuations",
    "GuessingLaw",
    "InitialGuessingBias",
    "depth_fluctuations",
    "initial_guessing_bias",
    "predicted_bias",
]

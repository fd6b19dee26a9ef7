"""What pulls on weights: `name(weight or model, ...) -> scalar`, differentiable, zero exactly on its target set."""

from pondera.penalties.norm_loss import norm_loss
from pondera.penalties.orthogonal_convolution import (
    convolution_singular_values,
    orthogonal_convolution,
    orthogonal_convolution_exists,
)
from pondera.penalties.spectral_continual import sorted_entries, spectral, wasserstein_to_start

__all__ = [
    "convolution_singular_values",
    "norm_loss",
    "orthogonal_convolution",
    "orthogonal_convolution_exists",
    "sorted_entries",
    "spectral",
    "wasserstein_to_start",
]

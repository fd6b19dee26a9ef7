"""What pulls on weights: `name(weight or model, ...) -> scalar`, differentiable, zero exactly on its target set."""

from pondera.penalties.conditional_invariance import nci, nci_discriminator
from pondera.penalties.invariance_penalty import invariance, irm
from pondera.penalties.manifold_smooth import ManifoldSmooth
from pondera.penalties.norm_loss import norm_loss
from pondera.penalties.orthogonal_convolution import (
    convolution_singular_values,
    orthogonal_convolution,
    orthogonal_convolution_exists,
)
from pondera.penalties.orthogonal_sae import SparseAutoencoder, orthogonal_decoder
from pondera.penalties.spectral_continual import sorted_entries, spectral, wasserstein_to_start
from pondera.penalties.weight_balancing import (
    adjust_logits,
    class_balanced_weights,
    feature_decay,
    max_norm_,
    max_norm_limit,
    simplex_etf,
)

__all__ = [
    "ManifoldSmooth",
    "SparseAutoencoder",
    "adjust_logits",
    "class_balanced_weights",
    "convolution_singular_values",
    "feature_decay",
    "invariance",
    "irm",
    "max_norm_",
    "max_norm_limit",
    "nci",
    "nci_discriminator",
    "norm_loss",
    "orthogonal_convolution",
    "orthogonal_convolution_exists",
    "orthogonal_decoder",
    "simplex_etf",
    "sorted_entries",
    "spectral",
    "wasserstein_to_start",
]

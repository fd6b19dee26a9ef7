"""What pulls on weights: `name(weight or model, ...) -> scalar`, differentiable, zero exactly on its target set."""

from pondera.penalties.invariance_penalty import invariance, irm
from pondera.penalties.norm_loss import norm_loss

__all__ = ["invariance", "irm", "norm_loss"]

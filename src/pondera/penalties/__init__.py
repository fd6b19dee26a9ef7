"""What pulls on weights: `name(weight or model, ...) -> scalar`, differentiable, zero exactly on its target set."""

from pondera.penalties.norm_loss import norm_loss

__all__ = ["norm_loss"]

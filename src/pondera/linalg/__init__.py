"""Craft every room shares: matrix views, orthogonal factors, Hadamard matrices, Gaussian averages."""

from pondera.linalg.gauss import gaussian_mean
from pondera.linalg.hadamard import hadamard
from pondera.linalg.matrix import as_matrix
from pondera.linalg.orthogonal import haar, newton_schulz, polar

__all__ = ["as_matrix", "gaussian_mean", "haar", "hadamard", "newton_schulz", "polar"]

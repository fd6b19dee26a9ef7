"""Craft every room shares: matrix views, orthogonal factors, rotations, roots, tensor trains, Hadamard matrices, averages."""

from pondera.linalg.cayley import cayley, skew
from pondera.linalg.dct import dct, dct_matrix
from pondera.linalg.gauss import gaussian_mean, gaussian_pair_mean
from pondera.linalg.givens import givens_tree, rotations
from pondera.linalg.hadamard import hadamard
from pondera.linalg.matrix import as_matrix
from pondera.linalg.matrix_roots import matrix_power
from pondera.linalg.orthogonal import haar, newton_schulz, polar
from pondera.linalg.tensor_train import balance, split_size, tensor_train, train_bonds, train_matrix

__all__ = [
    "as_matrix",
    "balance",
    "cayley",
    "dct",
    "dct_matrix",
    "gaussian_mean",
    "gaussian_pair_mean",
    "givens_tree",
    "haar",
    "hadamard",
    "matrix_power",
    "newton_schulz",
    "polar",
    "rotations",
    "skew",
    "split_size",
    "tensor_train",
    "train_bonds",
    "train_matrix",
]

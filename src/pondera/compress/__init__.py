"""Smaller weights: factored, pruned, quantised. Functions on a model, in place, that report what they changed.

Methods that look at data take `calibration`, a list of batches, and where they need it `loss(model, batch)`. Zeros are held
by masks (`hold_masks`, `bake`), factors by `LowRankLinear`, values of a grid are plain tensors.

>>> import torch
>>> from pondera.compress import magnitude_prune
>>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
>>> print(magnitude_prune(net, keep=0.1).summary().splitlines()[0])
magnitude_prune: 2 of 2 weights changed, 211 of 2,112 numbers held (10.0%), 0.00111 MB of 0.00845 MB
"""

from pondera.compress._report import CompressReport, LayerChange
from pondera.compress.cost import Cost, cost
from pondera.compress.evolution_tickets import (
    SNES,
    Evolved,
    SepCMAES,
    evolution_tickets,
    evolve,
    signal_to_noise_prune,
)
from pondera.compress.files import load_compressed, prune_files, quantize_files, svd_files, trim_files
from pondera.compress.fisher_svd import fisher_factors, fisher_svd, nearest_kronecker, weighted_svd
from pondera.compress.grid import Quantised, quantize, quantize_tensor
from pondera.compress.low_rank import LowRankLinear
from pondera.compress.masks import bake, density, hold_masks, magnitude_prune, masks_of
from pondera.compress.net_trim import Trimmed, net_trim, net_trim_weight
from pondera.compress.ompq import Orthogonality, allocate_bits, ompq, orthogonality
from pondera.compress.oscillation_free import ConfidenceGuidedAnnealing, OscillationTracker, QKRAttention, StatsQ
from pondera.compress.prune_sketching import (
    pruning_scores,
    sketch_error,
    sketch_mask,
    sketch_masks,
    sketch_probabilities,
    sketch_prune,
)
from pondera.compress.relevance_pruning import SelectiveDecay, relevance_prune
from pondera.compress.requant import post_quantization_integral, requant
from pondera.compress.sparse_continual import DynamicSparsity, SparseTasks, erdos_renyi_densities, rewire_mask

__all__ = [
    "SNES",
    "CompressReport",
    "ConfidenceGuidedAnnealing",
    "Cost",
    "DynamicSparsity",
    "Evolved",
    "LayerChange",
    "LowRankLinear",
    "Orthogonality",
    "OscillationTracker",
    "QKRAttention",
    "Quantised",
    "SelectiveDecay",
    "SepCMAES",
    "SparseTasks",
    "StatsQ",
    "Trimmed",
    "allocate_bits",
    "bake",
    "cost",
    "density",
    "erdos_renyi_densities",
    "evolution_tickets",
    "evolve",
    "fisher_factors",
    "fisher_svd",
    "hold_masks",
    "load_compressed",
    "magnitude_prune",
    "masks_of",
    "nearest_kronecker",
    "net_trim",
    "net_trim_weight",
    "ompq",
    "orthogonality",
    "post_quantization_integral",
    "prune_files",
    "pruning_scores",
    "quantize",
    "quantize_files",
    "quantize_tensor",
    "relevance_prune",
    "requant",
    "rewire_mask",
    "signal_to_noise_prune",
    "sketch_error",
    "sketch_mask",
    "sketch_masks",
    "sketch_probabilities",
    "sketch_prune",
    "svd_files",
    "trim_files",
    "weighted_svd",
]

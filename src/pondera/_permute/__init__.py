"""Permutations of hidden units, for every room that needs them: what they are, what they do to a state, how to find them.

Imports point one way: `labels` below `rules`, both and `spec` below `trace`.
"""

from pondera._permute.spec import (
    Axis,
    Permutations,
    PermutationSpec,
    Place,
    State,
    apply_permutation,
    identities,
    index_of,
    names_of,
    random_permutations,
    reorder,
    require_matchable,
)
from pondera._permute.trace import trace_permutations

__all__ = [
    "Axis",
    "PermutationSpec",
    "Permutations",
    "Place",
    "State",
    "apply_permutation",
    "identities",
    "index_of",
    "names_of",
    "random_permutations",
    "reorder",
    "require_matchable",
    "trace_permutations",
]

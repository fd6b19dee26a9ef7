"""Maxout start: weights scaled by the rank K, the number of linear maps a unit takes the maximum of."""

import math
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from pondera._weights import require_owned, start_each
from pondera.errors import BadInput
from pondera.linalg import gaussian_mean

Target = TypeVar("Target", Tensor, nn.Module)


@lru_cache(maxsize=256)
def maxout_constant(rank: int) -> float:
    r"""The constant c = 1 / M of maxout units of rank K.

    .. math:: M = E[\max(Z_1, \ldots, Z_K)^2] = K \, E[Z^2 \, \Phi(Z)^{K-1}], \qquad Z, Z_k \sim N(0, 1)

    M is 1 for K = 1 and 2, 1 + sqrt(3) / (2 pi) for 3, 1 + sqrt(3) / pi for 4, and grows like 2 log K. Solved in
    float64 to about 1e-13.

    Args: rank: K, at least 1.
    Returns: c.
    Raises: BadInput: for a rank that is not a positive whole number.
    Paper: Tseran and Montúfar 2023, arXiv 2301.06956 (the constants of the authors' code to their five digits).

    >>> [round(maxout_constant(k), 5) for k in (1, 2, 3, 4, 5)]
    [1.0, 1.0, 0.78391, 0.64461, 0.55555]
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise BadInput(f"maxout_constant needs a rank of at least 1, a whole number, got {rank!r}")

    def weighted(z: Tensor) -> Tensor:
        return z.square() * torch.exp((rank - 1) * torch.special.log_ndtr(z))

    return 1 / (rank * float(gaussian_mean(weighted)))


@torch.no_grad()
def maxout_(target: Target, *, rank: int | None = None, generator: Generator | None = None) -> Target:
    r"""Start a weight, or every owned weight of a module, at the variance its maxout units need, in place.

    .. math:: W_{ij} \sim N(0, c / \mathrm{fan\_in}), \qquad c = 1 / E[\max(Z_1, \ldots, Z_K)^2]

    with fan_in = inputs a group times kernel size. Then the mean square of activations is what it was one layer before:
    without biases E \|h_L\|^2 / n_L = (c M)^L \|x\|^2 / n_0, and c M = 1. He's c = 2 multiplies it by 3.6 a layer at K = 5.

    The Jacobian depends on the input. In the limit of wide layers a direction u at angle theta to the input x keeps

    .. math:: \|J u\|^2 / \|u\|^2 = (c M)^L \cos^2\theta + c^L \sin^2\theta                          (derived)

    so gradients fall for the first layers, until only the part along x is left, and stay from there on. For the same
    reason inputs merge: at K = 5 what tells two directions apart shrinks by 0.56 a layer, to 1e-6 in 20 layers, and nets
    much deeper than that train badly at any scale. At K = 2 (c = 1) gradients do not fall, and inputs merge slowly.

    The rank of a weight in a module is the whole number `pieces` of the module nearest around it that has one, as
    `pondera.nn.Maxout` has; a maxout of your own, convolutional ones too, needs no more than that attribute. Weights
    outside of such modules count as linear, K = 1, as the paper has its last layer. Biases become 0; norm layers and
    embeddings stay.

    Args:
        target: a weight (pieces * out, in, *kernel), or a module.
        rank: K for all of `target`. None takes it from the modules; a tensor does not say its rank, so there it must be
            given. A maxout layer followed by max pooling over p numbers is of rank p K.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: for a rank that is not a positive whole number or neither given nor found; for a weight with fewer
        than two dimensions, no entries, integers or on the meta device; for a module without a weight to start.
    Paper: Tseran and Montúfar 2023, arXiv 2301.06956. As the authors' code; the theory also covers biases
        N(0, c / fan_in), with which the mean square grows by c a layer.

    >>> from pondera.nn.maxout import Maxout
    >>> net = nn.Sequential(Maxout(500, 400, pieces=5), Maxout(400, 300, pieces=3), nn.Linear(300, 10))
    >>> net = maxout_(net, generator=torch.Generator().manual_seed(0))
    >>> [round(w.var().item() * w.shape[1], 1) for w in net.parameters() if w.ndim == 2]
    [0.6, 0.8, 1.0]
    """
    if isinstance(target, Tensor):
        if rank is None:
            raise BadInput("maxout_ needs rank= for a tensor, which does not say how many linear maps a unit has")
        return _draw(target, rank, generator)
    weights = require_owned(target, "maxout_")
    ranks = {one.module: _rank_of(target, one.name) if rank is None else rank for one in weights}
    if rank is None and not any(ranks.values()):
        raise BadInput(f"maxout_ found no maxout layer in {type(target).__name__} (a module with pieces=K); give rank=")
    for k in ranks.values():
        maxout_constant(k or 1)
    for one in weights:
        new = torch.empty_like(one.read())
        one.write(_draw(new, ranks[one.module] or 1, generator))
        one.fill_bias(0.0)
    return target


def _rank_of(model: nn.Module, name: str) -> int | None:
    """The `pieces` of the innermost module around the weight `name`."""
    path = [model]
    for part in name.split(".")[:-1]:
        path.append(path[-1]._modules[part])
    found = [getattr(module, "pieces", None) for module in path]
    return next((rank for rank in reversed(found) if isinstance(rank, int)), None)


def _draw(w: Tensor, rank: int, generator: Generator | None) -> Tensor:
    std = math.sqrt(maxout_constant(rank))
    return start_each(w, lambda t: t.normal_(0, std / t[0].numel() ** 0.5, generator=generator), who="maxout_")

"""PSEUDO-IID starts: low-rank and block-sparse weights with the wide limit, and so the critical scale, of Gaussian ones.

The family's other members are `edge_of_chaos_` (independent) and `orthogonal_`.
"""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._activations import Activation, activation_of
from pondera._weights import require_owned, start_each
from pondera.errors import BadInput, nearest
from pondera.init.edge_of_chaos import edge_of_chaos
from pondera.linalg import haar

Target = TypeVar("Target", Tensor, nn.Module)
Fill = Callable[[Tensor, float], object]


@torch.no_grad()
def low_rank_iid_(
    target: Target,
    *,
    ratio: float = 0.5,
    dense: str | Iterable[str] = (),
    nonlinearity: str | Activation | None = None,
    sigma_b: float | None = None,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module, as a random matrix of low rank on the edge of chaos, in place.

    .. math::
        W = C P, \qquad C \in R^{m \times r} \text{ Haar}, \; C^T C = I, \qquad
        P_{kj} \sim N\Big(0, \frac{\sigma_w^2 m}{n r}\Big), \qquad r = \lceil \gamma \min(m, n) \rceil

    for m outputs and n = inputs a group times kernel size. Rows and columns are exchangeable, entries uncorrelated with
    variance sigma_w^2 / n: such weights are PSEUDO-IID, and a net of them converges with its widths to the Gaussian
    process of independent weights, provided r grows like them. So the edge of chaos is that of Gaussian weights, at the
    same sigma_w and sigma_b: `edge_of_chaos`. Biases are N(0, sigma_b^2); norm layers and embeddings stay. In narrow
    deep nets low rank trains worse than Gaussian weights (40 tanh layers of width 32, half the rank: accuracy 0.44 beside 0.59).

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers. A grouped
            convolution follows the rule in each group.
        ratio: gamma, in (0, 1]. At 1 and m <= n the weight is Gaussian.
        dense: names, as in `named_modules`, of linear and convolution layers to draw from N(0, sigma_w^2 / n) instead.
            The theorem asks it of the first layer. Name the last one too where it has few outputs: a classifier of 10
            at `ratio` 0.5 starts with its outputs in 5 dimensions.
        nonlinearity: name or elementwise function; None takes the one kind of activation module found in the module. A
            tensor does not say what follows it, so there it must be given.
        sigma_b: as in `edge_of_chaos`.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`. Training does not keep the rank; factors do that.
    Raises: BadInput: as `edge_of_chaos`; for a ratio outside (0, 1]; a name in `dense` that is no such layer; if the
        activation is not given and not to be found; for a weight with fewer than two dimensions, no entries, integers
        or on the meta device; for a module without a weight to start.
    Paper: Nait Saada, Naderi and Tanner 2024, arXiv 2310.16597. Its text could not be read: the member is as its readers
        describe it (an orthonormal factor times an independent one, r proportional to m); scales are derived. `ratio`
        0.5 and convolutions as their flattened matrix are ours.

    >>> w = low_rank_iid_(torch.empty(400, 300), ratio=0.1, nonlinearity="relu", generator=torch.Generator().manual_seed(0))
    >>> int(torch.linalg.matrix_rank(w)), round(w.square().mean().item() * 300, 1)
    (30, 2.0)
    """
    if not 0 < ratio <= 1:
        raise BadInput(f"low_rank_iid_ needs a ratio above 0 and at most 1, got {ratio}")

    def fill(w: Tensor, sigma_w: float) -> None:
        m, n = len(w), w[0].numel()
        r = math.ceil(ratio * min(m, n))
        c = haar(m, r, generator=generator, dtype=w.dtype, device=w.device)
        p = torch.empty(r, n, dtype=w.dtype, device=w.device).normal_(0, (m / (n * r)) ** 0.5, generator=generator)
        w.copy_((sigma_w * c @ p).view_as(w))

    return _start(target, fill, dense, nonlinearity, sigma_b, generator, "low_rank_iid_")


@torch.no_grad()
def block_sparse_(
    target: Target,
    *,
    blocks: int = 2,
    dense: str | Iterable[str] = (),
    nonlinearity: str | Activation | None = None,
    sigma_b: float | None = None,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module, as a permuted block-diagonal matrix on the edge of chaos, in place.

    .. math:: W = P_1 \, \mathrm{diag}(B_1, \ldots, B_b) \, P_2, \qquad (B_k)_{ij} \sim N(0, \sigma_w^2 / (p n))

    with two independent uniform permutations and p the share of entries kept, 1/b where sizes divide. Each unit reads
    one in b inputs. Both permutations are needed: they make rows and columns exchangeable, so that the weights are
    PSEUDO-IID, with the wide limit and the edge of chaos of independent weights of variance sigma_w^2 / n (see
    `low_rank_iid_`). b stays fixed while widths grow. In a convolution the blocks are of channels, with whole kernels.

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers. A grouped
            convolution follows the rule in each group.
        blocks: b, at least 1 (1 is Gaussian). A weight with fewer rows or channels than that gets as many as it has.
        dense, nonlinearity, sigma_b, generator: as in `low_rank_iid_`.
    Returns: `target`. Training fills the zeros unless a mask holds them.
    Raises: BadInput: as `low_rank_iid_`; for `blocks` that is not a positive whole number.
    Paper: Nait Saada, Naderi and Tanner 2024, arXiv 2310.16597. Its text could not be read: the member is as its readers
        describe it (a randomly permuted block-sparse mask on independent entries); scales are derived. `blocks` 2 and
        the blocks of channels are ours.

    >>> w = block_sparse_(torch.empty(300, 400), blocks=4, nonlinearity="relu", generator=torch.Generator().manual_seed(0))
    >>> [int(k) for k in (w != 0).sum(1).unique()], round(w.square().mean().item() * 400, 1)
    ([100], 2.0)
    """
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        raise BadInput(f"block_sparse_ needs at least 1 block, a whole number, got {blocks!r}")

    def fill(w: Tensor, sigma_w: float) -> None:
        m, n = w.shape[:2]
        b = min(blocks, m, n)
        rows, cols = (
            (torch.arange(size, device=w.device) * b // size)[
                torch.randperm(size, generator=generator, device=w.device)
            ]
            for size in (m, n)
        )
        mask = rows[:, None] == cols
        w.normal_(0, sigma_w / (w[0].numel() * float(mask.double().mean())) ** 0.5, generator=generator)
        w.mul_(mask.view(m, n, *[1] * (w.ndim - 2)))

    return _start(target, fill, dense, nonlinearity, sigma_b, generator, "block_sparse_")


def _start(
    target: Target,
    fill: Fill,
    dense: str | Iterable[str],
    nonlinearity: str | Activation | None,
    sigma_b: float | None,
    generator: Generator | None,
    who: str,
) -> Target:
    """What the members share: the activation's critical scales, the layers left dense, groups and biases."""
    kept = {dense} if isinstance(dense, str) else set(dense)
    if isinstance(target, Tensor):
        if kept:
            raise BadInput(f"{who} got a tensor and dense={sorted(kept)}, which names layers; give the module")
        if nonlinearity is None:
            raise BadInput(f"{who} needs nonlinearity= for a tensor, which does not say what activation follows it")
        sigma_w = edge_of_chaos(nonlinearity, sigma_b=sigma_b).sigma_w
        return start_each(target, lambda w: fill(w, sigma_w), who=who)
    weights = require_owned(target, who)
    layers = [one.name.rpartition(".")[0] for one in weights if one.kind != "attention"]
    for name in sorted(kept):
        if name not in layers:
            raise BadInput(f"{who} found no linear or convolution layer {name!r} to draw dense{nearest(name, layers)}")
    point = edge_of_chaos(activation_of(target, who) if nonlinearity is None else nonlinearity, sigma_b=sigma_b)

    def gaussian(w: Float[Tensor, "m n *kernel"]) -> None:
        w.normal_(0, point.sigma_w / w[0].numel() ** 0.5, generator=generator)

    for one in weights:
        plain = one.kind != "attention" and one.name.rpartition(".")[0] in kept
        new = torch.empty_like(one.read())
        for group in new.chunk(one.groups):
            start_each(group, gaussian if plain else lambda w: fill(w, point.sigma_w), who=who)
        one.write(new)
        one.fill_bias(std=point.sigma_b, generator=generator)
    return target

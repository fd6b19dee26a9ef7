"""Low-rank starts: weights of a given rank at the norm of a Gaussian start, aligned with given directions or not."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._weights import require_owned, start_each
from pondera.errors import BadInput, describe, nearest, require_finite

Target = TypeVar("Target", Tensor, nn.Module)
Directions = Float[Tensor, "k fan_in"]
WHO = "low_rank_"


@torch.no_grad()
def low_rank_(
    target: Target,
    *,
    rank: int | float = 0.1,
    align: Directions | Mapping[str, Directions] | None = None,
    gain: float = 1.0,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module, at a given rank and the norm of a Gaussian start, in place.

    A weight seen as (out, fan_in) becomes the leading r singular directions of a Gaussian draw, scaled to its norm:

    .. math:: W = \lVert G \rVert_F \frac{\sum_{i \le r} s_i u_i v_i^T}{\lVert \sum_{i \le r} s_i u_i v_i^T \rVert_F},
              \qquad G_{ij} = \sum_i s_i u_i v_i^T \sim N(0, gain^2 / \mathrm{fan\_in})

    At full rank that is G itself, and one generator gives all ranks the same draw and norm, so that rank alone differs.
    High rank makes for lazier learning (kernel and features keep their shape), low rank for richer; the exception is a
    low rank that already lies in the directions the task needs, which is what `align` is for.

    Biases become 0; norm layers and embeddings stay.

    Args:
        target: a weight (out, in, *kernel), or a module. A recurrent layer's weight is given as a tensor.
        rank: r as a whole number, at most the smaller side is used; or a part of the smaller side, in (0, 1], rounded to
            at least one. (0.1: 30 of 300 units in the authors' code.)
        align: for a tensor, directions of its input space, one a row: their leading right singular vectors replace
            v_1, ..., v_r, in their order; where there are fewer than r, the draw's own follow, made orthogonal to them.
            For a module a mapping from names of weights to directions; the others are not aligned.
        gain: size of the start.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: for a rank that is not positive or a part above 1, a gain that is not positive, directions that are
        not finite, all zero or of another size than the weight's inputs, names of no weight; for a weight with fewer
        than two dimensions, no entries, integers or on the meta device. The weights are then what they were.
    Paper: Liu, Baratin, Cornford, Mihalas, Shea-Brown and Lajoie 2024, arXiv 2310.08513; the truncated Gaussian of their
        code, which treats the recurrent weight alone (size 1.25). Alignment beyond rank one is ours.

    >>> a, b = (low_rank_(torch.empty(6, 8), rank=r, generator=torch.Generator().manual_seed(0)) for r in (2, 6))
    >>> torch.linalg.matrix_rank(a).item(), round((a.norm() / b.norm()).item(), 5)
    (2, 1.0)
    """
    if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
        raise BadInput(f"{WHO} needs a rank of at least 1, or a part of the full one in (0, 1], got {rank!r}")
    if not 0 < gain < torch.inf:
        raise BadInput(f"{WHO} needs a positive gain, got {gain}")
    if isinstance(target, nn.Module):
        return _start_module(target, rank, align, gain, generator)
    if isinstance(align, Mapping):
        raise BadInput(f"{WHO} got a tensor and directions by name; give the module, or the directions themselves")
    if align is not None and isinstance(target, Tensor) and target.ndim > 1:
        align = _directions(align, target, "the weight")
    return start_each(target, lambda w: w.copy_(_draw(w, rank, align, gain, generator)), who=WHO)


def _start_module(
    model: nn.Module,
    rank: int | float,
    align: Directions | Mapping[str, Directions] | None,
    gain: float,
    generator: Generator | None,
) -> nn.Module:
    weights = require_owned(model, WHO)
    names = [one.name for one in weights]
    if align is not None and not isinstance(align, Mapping):
        raise BadInput(f"{WHO} got a module and directions for no weight; give a mapping from names ({names[0]}, ...)")
    for name in align or {}:
        if name not in names:
            raise BadInput(f"{WHO} found no weight {name!r} to align{nearest(name, names)}")
    directions = [_directions(align[n], w.read(), n) if align and n in align else None for n, w in zip(names, weights)]
    order = iter(directions)
    return start_each(model, lambda w: w.copy_(_draw(w, rank, next(order), gain, generator)), who=WHO)


def _directions(given: Directions, w: Tensor, name: str) -> Directions:
    require_finite(given, WHO, f"directions for {name}")
    if given.ndim != 2 or given.shape[1] != w[0].numel() or not given.any():
        raise BadInput(
            f"{WHO} needs directions for {name} of shape (k, {w[0].numel()}), one a row and not all zero, got a "
            f"{describe(given)}"
        )
    return given


def _draw(
    w: Tensor, rank: int | float, align: Directions | None, gain: float, generator: Generator | None
) -> Float[Tensor, "out *fan_in"]:
    g = torch.empty_like(w).normal_(0, gain / w[0].numel() ** 0.5, generator=generator).flatten(1)
    full = min(g.shape)
    r = min(rank, full) if isinstance(rank, int) else max(1, round(rank * full))
    if r == full and align is None:
        return g.view_as(w)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    if align is not None:
        vh = _aligned(vh, align.to(vh))
    low = (u[:, :r] * s[:r]) @ vh[:r]
    return (low * (g.norm() / low.norm())).view_as(w)


def _aligned(vh: Float[Tensor, "full fan_in"], align: Directions) -> Float[Tensor, "full fan_in"]:
    """The leading directions, then rows of `vh` made orthogonal to them, as many rows as in `vh`."""
    _, size, lead = torch.linalg.svd(align, full_matrices=False)
    lead = lead[size > size[0] * max(align.shape) * torch.finfo(size.dtype).eps][: len(vh)]
    rest = (vh - vh @ lead.T @ lead)[: len(vh) - len(lead)]
    return torch.cat([lead, torch.linalg.qr(rest.T)[0].T])

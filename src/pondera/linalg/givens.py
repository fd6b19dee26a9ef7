"""Givens rotations in parallel: a binary tree of n - 1 plane rotations over n coordinates, in O(n) steps a row."""

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput


def rotations(theta: Float[Tensor, "m"]) -> Float[Tensor, "m 2 2"]:
    """Plane rotations [[cos, -sin], [sin, cos]], one for each angle.

    >>> rotations(torch.tensor([torch.pi / 2])).round()
    tensor([[[-0., -1.],
             [ 1., -0.]]])
    """
    c, s = theta.cos(), theta.sin()
    return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)


def givens_tree(
    x: Float[Tensor, "*batch n"], blocks: Float[Tensor, "m 2 2"], *, transpose: bool = False
) -> Float[Tensor, "*batch n"]:
    """T x for every row x of the input, or T^T x: T = G_L ... G_2 G_1, the product over the levels of a binary tree.

    Level l = 1, 2, ... pairs coordinate 2^l k with 2^l k + 2^(l-1), for k = 0, 1, ...; an odd one out waits for the next
    level. The pairs of a level are disjoint, each has one block, and `blocks` holds them level by level. Only the first
    of a pair goes on to the next level, so that all ceil(log2 n) levels together cost O(n). If every block is
    orthogonal, so is T; `rotations` makes such blocks from angles.

    Args:
        x: rows of n coordinates.
        blocks: m = n - 1 matrices 2 x 2, or n - 2 to leave out the root, the last one.
        transpose: apply T^T, which goes from the root to the leaves.
    Raises: BadInput: for another number of blocks.

    >>> quarter = rotations(torch.full((3,), torch.pi / 2))
    >>> givens_tree(torch.tensor([1.0, 2.0, 3.0, 4.0]), quarter).round() + 0  # (-2, 1, -4, 3), then 0 with 2
    tensor([ 4.,  1., -2.,  3.])
    """
    n = x.shape[-1]
    if blocks.shape not in ((n - 1, 2, 2), (n - 2, 2, 2)):
        raise BadInput(
            f"a tree over {n} coordinates needs blocks of shape ({n - 1}, 2, 2), or ({n - 2}, 2, 2) without its root; "
            f"got {tuple(blocks.shape)}"
        )
    return _tree(x, blocks.mT if transpose else blocks, transpose)


def _tree(x: Tensor, blocks: Tensor, root_first: bool) -> Tensor:
    if not len(blocks):
        return x
    k = x.shape[-1] // 2
    a, b = x[..., : 2 * k].unflatten(-1, (k, 2)).unbind(-1)
    aa, ab, ba, bb = blocks[:k].flatten(1).unbind(1)
    if root_first:
        above = _tree(_join(a, x[..., 2 * k :]), blocks[k:], root_first)
        a, odd = above[..., :k], above[..., k:]
        a, b = aa * a + ab * b, ba * a + bb * b
    else:
        a, b = aa * a + ab * b, ba * a + bb * b
        above = _tree(_join(a, x[..., 2 * k :]), blocks[k:], root_first)
        a, odd = above[..., :k], above[..., k:]
    return _join(torch.stack([a, b], -1).flatten(-2), odd)


def _join(x: Tensor, odd: Tensor) -> Tensor:
    return torch.cat([x, odd], -1) if odd.shape[-1] else x

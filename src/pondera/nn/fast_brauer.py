"""The product of one diagram's matrix with a tensor, by factors of the diagram; no matrix is formed."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput, describe, require_float
from pondera.nn._diagrams import Diagram, contract, factor, orders, parsed, put, spread


def diagram_product(
    x: Float[Tensor, "..."],
    blocks: Sequence[Sequence[int]],
    order_out: int,
    group: str,
    *,
    free: Sequence[int] = (),
) -> Float[Tensor, "..."]:
    r"""The matrix of a diagram times a k-th order tensor, in the number of steps that the diagram needs.

    A diagram d on l output and k input legs is a product of simple ones,

    .. math:: d = \text{permutation} \circ \text{planar diagram} \circ \text{permutation}

    and the planar one a Kronecker product of its blocks, so that d x takes four kinds of step, none of which multiplies by a
    matrix:

    1. permute axes so that blocks lie side by side (a view);
    2. contract every block of input legs alone: a sum over its diagonal, with signs for Sp(n); free input legs with the
       Levi-Civita symbol;
    3. transfer every block that crosses: the diagonal of its input axes becomes one of its output axes;
    4. copy along the diagonal of every block of output legs alone, with signs for Sp(n).

    Additions and multiplications for a diagram with b blocks of input legs alone and t that cross: at most n^(t + b) +
    n^(t + b - 1) + .. + n^(t + 1) (none where b = 0). That is O(n^(k - 1)) for O(n) and Sp(n), in fact O(n^(k / 2)) where all
    legs are matched in one row, and O(n^k) for S_n, where the dense product has n^(l + k). Writing takes n^(t + d) entries,
    for d blocks of output legs alone, into n^l zeros. With free legs, s of them outputs: n^n times what is left of the axes.

    `pondera.nn.PermutationLinear` and `pondera.nn.BrauerLinear` are sums of such products with channels. They share
    what diagrams have in common: what they read is contracted once, and each diagonal of the output is written once.

    Args:
        x: (\*, n, .., n), k axes of length n behind any others.
        blocks: the diagram, lists of legs: 0 to l - 1 are the output's axes, l to l + k - 1 the input's, every leg
            in one of them or in `free`.
        order_out: l.
        group: "S(n)", any blocks; "O(n)" or "Sp(n)", pairs; "SO(n)", pairs, or pairs and n free legs.
        free: the legs under the Levi-Civita symbol, for SO(n).
    Returns: (\*, n, .., n) with l axes of length n.
    Raises: BadInput: for blocks that are no diagram of the group, too many legs, or an x whose last axes are not k of length n.
    Paper: Pearce-Crump 2023, arXiv 2304.14165, known here by its abstract: the steps are worked out from it. It has n! terms for
        the Levi-Civita symbol (recalled); here its n^n entries are one small matrix.

    >>> import torch
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> diagram_product(X, [(0, 3), (1, 2)], 2, "O(2)").tolist()  # the transposed
    [[1.0, 3.0], [2.0, 4.0]]
    >>> diagram_product(X, [(0, 1), (2, 3)], 2, "O(2)").tolist()  # the trace, times the identity
    [[5.0, 0.0], [0.0, 5.0]]
    >>> diagram_product(X, [(0, 1), (2, 3)], 2, "Sp(2)").tolist()  # x12 - x21, times J
    [[0.0, -1.0], [1.0, 0.0]]
    """
    kind, n = parsed(group, "diagram_product")
    require_float(x, "diagram_product", "x")
    legs = sorted([v for block in blocks for v in block] + list(free))
    orders("diagram_product", max(0, len(legs) - order_out), order_out)
    if legs != list(range(len(legs))) or order_out > len(legs) or any(len(block) == 0 for block in blocks):
        raise BadInput(f"diagram_product needs each of the legs 0, 1, .. in one block, got {list(blocks)}, free {free}")
    if kind != "S" and any(len(block) != 2 for block in blocks):
        raise BadInput(f"diagram_product needs blocks of two legs for {group}, got {list(blocks)}")
    if free and (kind != "SO" or len(free) != n):
        raise BadInput(f"diagram_product takes free legs for SO(n) alone, n of them, got {len(free)} for {group}")
    k = len(legs) - order_out
    if x.ndim < k or any(size != n for size in x.shape[x.ndim - k :]):
        raise BadInput(f"diagram_product needs an x with {k} last axes of length {n}, got a {describe(x)}")
    ordered = tuple(sorted(tuple(sorted(block)) for block in blocks))
    read, turn, write = factor(Diagram(order_out, k, ordered, tuple(sorted(free))))
    lead = x.shape[: x.ndim - k]
    seen = contract(x.reshape(1, lead.numel(), *[n] * k), read, kind, {})
    y = spread(seen.permute(0, 1, *(d + 2 for d in turn)), write)
    return put({write.blocks: y}, n, order_out, signed=kind == "Sp").reshape((*lead, *[n] * order_out))

"""ZerO: a start of zeros and ones only, by partial identities and Hadamard matrices; no random numbers."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._weights import require_owned, restored_on_error
from pondera.errors import BadInput, nearest, require_matrix
from pondera.linalg import hadamard

Target = TypeVar("Target", Tensor, nn.Module)


@torch.no_grad()
def zero_(target: Target, *, zero_last: str | Iterable[str] = (), generator: Generator | None = None) -> Target:
    r"""Start a weight, or every owned weight of a module, from zeros and ones (up to one factor), in place.

    A weight of m outputs and n inputs becomes

    .. math::
        W = I_{m \times n} \quad (m \le n), \qquad
        W = 2^{-k/2} \, [H_{2^k}]_{1..m, 1..n}, \; k = \lceil \log_2 m \rceil \quad (m > n)          (Alg. 1)

    with I a partial identity and H Sylvester's Hadamard matrix: a partial identity in a growing layer would hold all
    later updates inside a subspace of the input's dimension (Theorem 1), the Hadamard matrix does not. A convolution is
    zero but for its centre tap, which gets the same matrix. Biases become 0; norm layers and embeddings stay.

    Derived: where m > q = 2^ceil(log2 n) >= n the rows repeat with period q: units start as copies and part through the
    layers after them. Singular values are all 1 if m is a power of two, else they lie between 2^-1/2 and 1.

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers.
        zero_last: names, as in `named_modules`, of linear and convolution layers to set to zero instead: the last of
            every residual branch and, in the paper's residual nets, the classifier. None by default.
        generator: taken as by every start; without effect, for nothing is drawn.
    Returns: `target`.
    Raises: BadInput: for a name in `zero_last` that is no such layer, a parametrization that cannot hold the weight (a
        weight norm cannot hold zeros), fewer than two dimensions, no entries, an integer or meta tensor. The weights
        are then what they were.
    Paper: Zhao, Schaefer and Anandkumar 2022, arXiv 2110.12661. Differences: the authors' notebook has the rule for
        matrices only; its factor 2^(-k/2) makes H orthonormal and is used here, a reimplementation from the text has
        2^(-(k-1)/2). Ours: an even kernel's centre is tap size // 2; a grouped convolution follows the rule in each
        group (depthwise: centre tap 1); each projection of an attention counts as one matrix.

    >>> zero_(torch.empty(2, 3))
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    >>> zero_(torch.empty(3, 2))
    tensor([[ 0.5000,  0.5000],
            [ 0.5000, -0.5000],
            [ 0.5000,  0.5000]])
    """
    last = {zero_last} if isinstance(zero_last, str) else set(zero_last)
    if isinstance(target, Tensor):
        if last:
            raise BadInput(f"zero_ got a tensor and zero_last={sorted(last)}, which names layers; give the module")
        return _fill(require_matrix(target, "zero_"))
    _start(target, last)
    return target


def _start(model: nn.Module, last: set[str]) -> None:
    weights = require_owned(model, "zero_")
    layers = [one.name.rpartition(".")[0] for one in weights if one.kind != "attention"]
    for name in sorted(last):
        if name not in layers:
            raise BadInput(f"zero_ found no linear or convolution layer {name!r} to set to zero{nearest(name, layers)}")
    with restored_on_error(dict.fromkeys(one.module for one in weights)):
        for one in weights:
            new = torch.zeros_like(one.read())
            if one.kind == "attention" or one.name.rpartition(".")[0] not in last:
                for group in new.chunk(one.groups):
                    _fill(group)
            one.write(new)
            if not torch.allclose(one.read(), new, atol=torch.finfo(new.dtype).eps ** 0.5):
                raise BadInput(f"zero_ cannot start {one.name}: its parametrization cannot hold the weight it is given")
            one.fill_bias(0.0)


def _fill(w: Float[Tensor, "m n *kernel"]) -> Float[Tensor, "m n *kernel"]:
    """The rule on one weight or one group of it, in place."""
    centre = w.zero_()
    for k in w.shape[:1:-1]:
        centre = centre[..., k // 2]
    centre.copy_(_matrix(*centre.shape))
    return w


def _matrix(m: int, n: int) -> Float[Tensor, "m n"]:
    if m <= n:
        return torch.eye(m, n, dtype=torch.float64)
    # H_p = H_(p/q) (x) H_q: its first q columns are H_q stacked, so the p x p matrix need not be made
    k, q = (m - 1).bit_length(), 1 << (n - 1).bit_length()
    stacked = hadamard(q, dtype=torch.float64)[:, :n].repeat(-(-m // q), 1)[:m]
    return stacked * 2 ** (-k / 2)

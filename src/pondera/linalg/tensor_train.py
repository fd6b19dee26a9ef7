"""A matrix as a tensor train (matrix product operator): a chain of small cores, one a group of row and column digits."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput, require_finite, require_matrix

Core = Float[Tensor, "left row col right"]


def split_size(n: int, parts: int) -> tuple[int, ...]:
    """`n` as a product of `parts` factors as near to each other as its primes allow, the largest first.

    Primes are dealt out from the largest, each to the factor that is smallest so far. A prime stays whole, so that a
    size such as 127 is 127 x 1 x 1.

    Raises: BadInput: if a number is not positive.

    >>> split_size(768, 5), split_size(11008, 5), split_size(127, 3)
    ((4, 4, 4, 4, 3), (43, 4, 4, 4, 4), (127, 1, 1))
    """
    if n < 1 or parts < 1:
        raise BadInput(f"split_size needs a positive size and number of parts, got {n} and {parts}")
    primes, p, rest = [], 2, n
    while p * p <= rest:
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    out = [1] * parts
    for p in sorted([*primes, rest], reverse=True):
        out[out.index(min(out))] *= p
    return tuple(sorted(out, reverse=True))


def train_bonds(rows: Sequence[int], cols: Sequence[int], bond: int | None = None) -> tuple[int, ...]:
    """The bonds d_0 ... d_N of a train of N cores: d_k = min(bond, sizes before the cut, sizes after it), d_0 = d_N = 1.

    Without `bond` these are the bonds at which every matrix is met exactly.

    >>> train_bonds((3, 4, 4, 4, 4), (4, 4, 4, 4, 3))
    (1, 12, 192, 192, 12, 1)
    >>> train_bonds((3, 4, 4, 4, 4), (4, 4, 4, 4, 3), 16)
    (1, 12, 16, 16, 12, 1)
    """
    if len(rows) != len(cols) or not rows or min(*rows, *cols) < 1:
        raise BadInput(f"a train needs as many positive row as column sizes, got {tuple(rows)} and {tuple(cols)}")
    if bond is not None and bond < 1:
        raise BadInput(f"a train needs a bond of at least 1, got {bond}")
    sizes = [i * j for i, j in zip(rows, cols)]
    full = [min(prod(sizes[:k]), prod(sizes[k:])) for k in range(len(sizes) + 1)]
    return tuple(full if bond is None else (min(bond, d) for d in full))


def tensor_train(
    matrix: Float[Tensor, "m n"], rows: Sequence[int], cols: Sequence[int], *, bond: int | None = None
) -> list[Core]:
    r"""Cores G_1 ... G_N of a matrix product operator near `matrix`, by N - 1 singular value decompositions (TT-SVD).

    With the row index written in digits i_1 ... i_N of sizes `rows`, the column index in j_1 ... j_N of `cols`,

    .. math:: W_{ij} \approx G_1[i_1, j_1] \, G_2[i_2, j_2] \cdots G_N[i_N, j_N], \qquad G_k[i, j] \in R^{d_{k-1} \times d_k}

    Equal at full bonds. Truncated, the squared error is at most the sum, over all cuts k, of the squared singular values
    left out when W is unfolded to (i_1 j_1 ... i_k j_k) x the rest, which is at most N - 1 times the least possible.
    All cores but the last are orthonormal from the left, so the last carries the norm; `balance` spreads it.

    Args:
        matrix: W, of prod(rows) x prod(cols). Half precisions are worked on in float32 and rounded.
        rows, cols: sizes of the digits (`split_size` finds some).
        bond: the most any bond may have; None: full bonds.
    Returns: the cores, each (d_{k-1}, i_k, j_k, d_k).
    Raises: BadInput: if sizes and matrix do not fit, for a bond below 1, and for NaN or infinite entries.
    Paper: Oseledets 2011 (TT-SVD, its error bound); matrix product operators as in Gao et al. 2020, arXiv 1904.06194.

    >>> w = torch.arange(48.0).reshape(6, 8)
    >>> cores = tensor_train(w, (3, 2), (2, 4))
    >>> [tuple(core.shape) for core in cores], bool(torch.allclose(train_matrix(cores), w, atol=1e-4))
    ([(1, 3, 2, 6), (6, 2, 4, 1)], True)
    """
    require_finite(require_matrix(matrix, "tensor_train", "matrix"), "tensor_train", "matrix")
    d = train_bonds(rows, cols, bond)
    if matrix.shape != (prod(rows), prod(cols)):
        raise BadInput(
            f"tensor_train got a matrix of shape {tuple(matrix.shape)}, which is not {' * '.join(map(str, rows))} x "
            f"{' * '.join(map(str, cols))}"
        )
    n = len(rows)
    digits = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).reshape(*rows, *cols)
    rest = digits.permute([k // 2 + n * (k % 2) for k in range(2 * n)])  # i_1, j_1, i_2, j_2, ...
    cores = []
    for k in range(n - 1):
        u, s, vh = torch.linalg.svd(rest.reshape(d[k] * rows[k] * cols[k], -1), full_matrices=False)
        cores.append(u[:, : d[k + 1]].reshape(d[k], rows[k], cols[k], d[k + 1]))
        rest = s[: d[k + 1], None] * vh[: d[k + 1]]
    cores.append(rest.reshape(d[n - 1], rows[-1], cols[-1], 1))
    return [core.to(matrix.dtype) for core in cores]


def train_matrix(cores: Sequence[Core]) -> Float[Tensor, "m n"]:
    """The matrix of a train: its cores contracted from the first to the last; differentiable.

    >>> train_matrix([torch.ones(1, 2, 1, 3), torch.ones(3, 1, 2, 1)])
    tensor([[3., 3.],
            [3., 3.]])
    """
    acc = cores[0].squeeze(0)
    for core in cores[1:]:
        acc = torch.einsum("IJd,dije->IiJje", acc, core).flatten(2, 3).flatten(0, 1)
    return acc.squeeze(-1)


def balance(cores: Sequence[Core]) -> list[Core]:
    r"""The same matrix with each bond's singular values shared evenly by its two neighbours (the symmetric gauge).

    With Lambda_k the singular values at bond k and Gamma_k the cores freed from them,

    .. math:: W = \Gamma_1 \Lambda_1 \Gamma_2 \cdots \Lambda_{N-1} \Gamma_N, \qquad
        G_k = \Lambda_{k-1}^{1/2} \Gamma_k \Lambda_k^{1/2}

    For two cores these are U S^1/2 and S^1/2 V^T. Directions of a bond whose singular value is zero up to rounding
    become zero on both sides.

    >>> a, b = balance([torch.eye(2).reshape(1, 2, 1, 2), torch.diag(torch.tensor([4.0, 9.0])).reshape(2, 1, 2, 1)])
    >>> a.flatten().abs().sort().values
    tensor([0., 0., 2., 3.])
    """
    out = list(cores)
    for k in range(len(out) - 1):  # orthonormal from the left
        q, r = torch.linalg.qr(out[k].flatten(0, 2))
        out[k], out[k + 1] = q.reshape(*out[k].shape[:3], -1), torch.tensordot(r, out[k + 1], 1)
    freed = torch.ones_like(out[-1][0, 0, 0])  # Lambda_k^-1/2, for B_k = Gamma_k Lambda_k on the way back
    for k in range(len(out) - 1, 0, -1):
        u, s, vh = torch.linalg.svd(out[k].flatten(1), full_matrices=False)
        out[k] = s.sqrt().view(-1, 1, 1, 1) * vh.reshape(-1, *out[k].shape[1:]) * freed
        out[k - 1] = torch.tensordot(out[k - 1], u * s, 1)
        freed = torch.where(s > s[0] * len(s) * torch.finfo(s.dtype).eps, s.rsqrt(), 0.0)
    out[0] = out[0] * freed
    return out

"""Norms of weights: the direction each calls steepest, the dual norm, and the optimizers' share that goes by a norm."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput, nearest, require_finite, require_matrix
from pondera.linalg import newton_schulz, polar
from pondera.optim._base import Group, MatrixOptimizer, Scaled, State, is_sharded
from pondera.optim._iteration import check_iteration, orthogonalised

NORMS = ("spectral", "frobenius", "max", "row", "column")
WHOLE = ("max", "frobenius")  # norms of any vector, of all parameters together as of one matrix


def dual_map(
    G: Float[Tensor, "*batch m n"], norm: str, *, ns_steps: int | None = None, ns_dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch m n"]:
    r"""The matrix of unit norm that has the largest inner product with G: :math:`\arg\max_{\lVert D\rVert=1}\langle G, D\rangle`.

    ============  =========================================  ==================  ======================
    norm          of D (m x n, y = D x)                      dual norm of G      dual map of G
    ============  =========================================  ==================  ======================
    "spectral"    largest singular value (l2 to l2)          sum of them         U V^T of G = U S V^T
    "frobenius"   root of the sum of squares                 the same            G over its norm
    "max"         largest entry (l1 to linf)                 sum of entries      sign of each entry
    "row"         largest l2 of a row (l2 to linf)           sum of rows' l2     each row over its l2
    "column"      largest l2 of a column (l1 to l2)          sum of columns' l2  each column over its l2
    ============  =========================================  ==================  ======================

    (sizes of entries without sign.) Where the maximum is not unique (zero entries, rows, singular values) it is 0 there.
    `nn.Embedding` keeps its matrix as (num, dim), one row a token: l1 to l2, the norm of its role, is "row" for it.

    Args:
        G: a matrix, or a batch of them; a convolution's weight must be flattened first.
        norm: of the table.
        ns_steps: for "spectral" so many steps of Newton-Schulz, singular values of about 0.7 to 1.2, in place of the exact
            SVD.
        ns_dtype: their precision (None: that of G).
    Returns: a new tensor like G.
    Raises: BadInput: for an unknown norm, fewer than two dimensions, or NaN or infinity in G.
    Paper: Bernstein & Newhouse 2024, arXiv 2409.20325, the table from its text, checked here by random search.

    >>> G = torch.diag(torch.tensor([3.0, 0.1]))
    >>> dual_map(G, "spectral")
    tensor([[1., 0.],
            [0., 1.]])
    >>> round(dual_norm(G, "spectral").item(), 4), round(dual_norm(G, "frobenius").item(), 4)
    (3.1, 3.0017)
    """
    check_norm("dual_map", norm)
    require_finite(require_matrix(G, "dual_map", "matrix"), "dual_map", "matrix")
    if norm == "spectral" and ns_steps is not None:
        check_iteration("dual_map", {"ns_steps": ns_steps, "ns_dtype": ns_dtype})
        return newton_schulz(G, steps=ns_steps, dtype=ns_dtype)
    return exact(G, norm)


def dual_norm(G: Float[Tensor, "*batch m n"], norm: str) -> Float[Tensor, "*batch"]:
    """The largest inner product of G with a matrix of unit `norm`: the sum in the table of `dual_map`.

    Args: as `dual_map`.
    Returns: one number a matrix, in float32 or better.
    Raises: BadInput: as `dual_map`.
    Paper: as `dual_map`.

    >>> dual_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), "row")
    tensor(6.)
    """
    check_norm("dual_norm", norm)
    G = at_least_float32(require_finite(require_matrix(G, "dual_norm", "matrix"), "dual_norm", "matrix"))
    if norm == "spectral":
        return torch.linalg.svdvals(G).sum(-1)
    if norm == "max":
        return G.abs().sum((-2, -1))
    if norm == "frobenius":
        return torch.linalg.matrix_norm(G)
    return G.norm(dim=-1 if norm == "row" else -2).sum(-1)


def exact(G: Float[Tensor, "*batch m n"], norm: str) -> Float[Tensor, "*batch m n"]:
    """`dual_map` without its checks."""
    if norm == "max":
        return G.sign()
    if norm == "spectral":
        return polar(at_least_float32(G)).to(G.dtype)
    dim = {"frobenius": (-2, -1), "row": (-1,), "column": (-2,)}[norm]
    size = torch.linalg.vector_norm(G, dim=dim, keepdim=True, dtype=torch.promote_types(G.dtype, torch.float32))
    return (G / size.masked_fill(size == 0, 1)).to(G.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_norm(who: str, norm: Any) -> None:
    if norm not in NORMS:
        raise BadInput(f"{who} knows the norms {', '.join(NORMS)}, got {norm!r}{nearest(str(norm), NORMS)}")


class NormOptimizer(MatrixOptimizer):
    """Parameters move by the dual map of the norm their group names.

    The norms of matrices ("spectral", "row", "column") move matrices, and leave the rest to AdamW or another. Those of
    any vector move all of their groups' parameters: "max" each entry by its sign, "frobenius" all parameters under it,
    of every group, as one vector. Settings of a group: norm, ns_steps (None: the exact SVD), ns_dtype.
    """

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict) and {**self.defaults, **param_group}["norm"] in WHOLE:
            param_group = {**param_group, "matrix": False}  # no layout to mind, nothing to gather
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        super()._check(group)
        check_norm(type(self).__name__, group["norm"])
        if group["ns_steps"] is not None:
            check_iteration(type(self).__name__, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        self._together: list[tuple[Tensor, Tensor, Group]] = []
        loss = super().step(closure)
        if self._together:
            sizes = [here(torch.linalg.vector_norm(at_least_float32(U))) for _, U, _ in self._together]
            self._length = torch.stack([s.to(sizes[0].device) for s in sizes]).norm()
            c = 1 / self._length.masked_fill(self._length == 0, 1)
            for p, U, group in self._together:
                self._move(p, self._sized((U * c.to(U.device)).to(U.dtype), U, group), group)
        self._together = []
        return loss

    def _move_rest(self, params: list[Tensor], group: Group, index: int) -> None:
        if group["norm"] not in WHOLE:
            super()._move_rest(params, group, index)
            return
        for p in params:
            assert p.grad is not None
            U = self._momentum(p.grad, self.state[p], group)
            if group["norm"] == "max":
                self._move(p, self._sized(U.sign(), U, group), group)
            else:
                self._together.append((p, U, group))

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor | Scaled:
        iterates = group["norm"] == "spectral" and group["ns_steps"] is not None
        D = orthogonalised(update, group) if iterates else exact(update, group["norm"])
        return self._sized(D, update, group)

    def _sized(self, D: Tensor, U: Tensor, group: Group) -> Tensor | Scaled:
        """The move, from the dual map D of U; D may be overwritten."""
        return D


def here(x: Tensor) -> Tensor:
    """A number as a plain tensor, of a DTensor's parts too."""
    return x.full_tensor() if is_sharded(x) else x  # type: ignore[attr-defined]

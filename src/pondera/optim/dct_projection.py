"""DCT-AdamW: AdamW in a few columns of the cosine transform, those that each gradient lies in most."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.linalg import dct, dct_matrix
from pondera.optim._base import Group, MatrixOptimizer, Rest, State, in_range, settings_of_the_rest, whole_number


class DCTAdamW(MatrixOptimizer):
    r"""AdamW with moments of r columns a matrix: the gradient in a cosine basis, of which the largest columns are kept.

    For a weight with gradient G (n x d, d <= n; the transpose otherwise) and the orthogonal DCT matrix Q (d x d), one for
    all matrices of a size (as in the reference code):

    .. math::
        S &= G Q, \qquad I = \text{the } r \text{ columns of } S \text{ of largest } \ell_1 \text{ norm} \\
        g &= S_{:, I} = G Q_{:, I}, \qquad m, v \leftarrow \text{those of columns still in } I, \text{ others } 0 \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}\, Q_{:, I}^T

    S comes from a fast Fourier transform, O(n d log d), and no decomposition is run. A matrix keeps 2 n r numbers and r
    indices; GaLore keeps its basis too, d r numbers. The part of the gradient outside the chosen columns is lost, unless
    `error_feedback` carries it over to the next step, at the price of n d numbers. With r = d it is AdamW in another
    basis, not AdamW. Embeddings, norms, biases and the output head are moved by AdamW inside the same optimizer: pass
    ``groups(model)``.

    Args:
        params: parameters, or groups as `groups` makes them (a group may be marked ``matrix=False``). Weights of
            convolutions are flattened to (out, rest).
        lr: eta (5e-3: ours, between AdamW's 1e-3 and GaLore's 1e-2; the code has no default).
        rank: r, at most the smaller side (128: GaLore's for its smallest models; the code has no default).
        betas, eps: decay rates and denominator of the moments ((0.9, 0.999), 1e-8: reference code); betas of AdamW too.
        weight_decay: decoupled decay lambda of matrices, multiplied by lr (0: ours).
        update_proj_gap: steps from one choice of columns to the next (1: reference code).
        norm: of which a column is large, 1 or 2 (1: reference code). With 2 the choice is the best there is in this basis,
            and at most a share 1 - r/d of the gradient's square is lost.
        error_feedback: add what the last projection lost to the next gradient (False: reference code).
        vector_lr_ratio, vector_eps, vector_weight_decay: AdamW's own, for the rest (1, 1e-8, 0).
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient or a complex parameter.
    Paper: Modoranu et al. 2025, arXiv 2505.17967. Code: github.com/IST-DASLab/ISTA-DASLab-Optimizers, fft_low_rank.
        By default the code leaves the moments as they lie when columns change, so that a column inherits another's; with
        ``rotate_subspace=True``, the paper's way, it is as here, but for the order of columns, which ours keeps sorted.
        There it writes a product over one of its factors, which on a CPU empties the moments at every choice; with that
        mended both agree. Its ``sim_type="makhoul"`` is our basis; "matmul", its default, takes the transposed matrix,
        the DCT-III. Its error feedback can be kept in 4 or 8 bits, ours is not. It overwrites gradients.

    >>> from torch import nn
    >>> w = nn.Parameter(torch.zeros(6, 4))
    >>> w.grad = torch.ones(6, 4)  # lies in the first column alone, the constant
    >>> optimizer = DCTAdamW([w], lr=0.1, rank=1)
    >>> optimizer.step()
    >>> w.data[0]  # the first step of Adam is the sign, here of one coordinate of 4, of length 1
    tensor([-0.0500, -0.0500, -0.0500, -0.0500])
    >>> {k: tuple(v.shape) for k, v in optimizer.state[w].items()}
    {'step': (), 'exp_avg': (6, 1), 'exp_avg_sq': (6, 1), 'columns': (1,)}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 5e-3,
        *,
        rank: int = 128,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_proj_gap: int = 1,
        norm: int = 1,
        error_feedback: bool = False,
        vector_lr_ratio: float = 1.0,
        vector_eps: float = 1e-8,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own |= {"update_proj_gap": update_proj_gap, "norm": norm, "error_feedback": error_feedback}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        self._bases: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        super().__init__(params, own | of_rest, rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bases = {}

    def _check(self, group: Group) -> None:
        super()._check(group)
        whole_number("DCTAdamW", "rank", group["rank"])
        whole_number("DCTAdamW", "update_proj_gap", group["update_proj_gap"])
        in_range("DCTAdamW", "eps", group["eps"], 0)
        if group["norm"] not in (1, 2):
            raise BadInput(f"DCTAdamW knows the norms 1 and 2, got {group['norm']!r}")

    def _direction(
        self, update: Float[Tensor, "m n"], gradient: Tensor | None, state: State, group: Group
    ) -> Float[Tensor, "m n"]:
        turned = update.shape[0] < update.shape[1]
        A = update.T if turned else update  # (n, d), the shorter side last
        if group["error_feedback"] and "error" in state:
            A = A + state["error"]
        r = min(group["rank"], A.shape[1])
        if "step" not in state:
            zeros = {"exp_avg": A.new_zeros(len(A), r), "exp_avg_sq": A.new_zeros(len(A), r)}
            state.update(step=torch.tensor(0.0), **zeros)
        state["step"] += 1
        m, v = state["exp_avg"], state["exp_avg_sq"]

        S = dct(A)
        if "columns" not in state or int(state["step"]) % group["update_proj_gap"] == 0:
            I = largest_columns(S, r, group["norm"])
            if "columns" in state:
                carry_over((m, v), state["columns"], I, A.shape[1])
            state["columns"] = I
        g = S.index_select(1, state["columns"])
        Q = self._basis(A).index_select(1, state["columns"])
        if group["error_feedback"]:
            state["error"] = A - g @ Q.T

        beta1, beta2 = group["betas"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        t = state["step"].double()
        u = m / ((1 - beta1**t) * (v.sqrt() / (1 - beta2**t).sqrt() + group["eps"]))
        return Q @ u.T if turned else u @ Q.T

    def _basis(self, A: Tensor) -> Float[Tensor, "d d"]:
        """The DCT matrix, made once for all matrices of a size."""
        key = (A.shape[1], A.dtype, A.device)
        if key not in self._bases:
            self._bases[key] = dct_matrix(A.shape[1], dtype=A.dtype, device=A.device)
        return self._bases[key]


def largest_columns(S: Float[Tensor, "n d"], r: int, norm: int) -> Tensor:
    """Indices of the r columns of largest norm, in ascending order."""
    sizes = torch.linalg.vector_norm(S, ord=norm, dim=0, dtype=torch.promote_types(S.dtype, torch.float32))
    return sizes.topk(r).indices.sort().values.to(torch.int32)


def carry_over(moments: tuple[Tensor, ...], old: Tensor, new: Tensor, d: int) -> None:
    """Moments of the columns `old` laid out for the columns `new`, in place; what is new starts at 0.

    This is the product with Q_old^T Q_new, which has a 1 where columns are the same and 0 elsewhere.
    """
    place = torch.full((d,), -1, device=old.device)
    place[old.long()] = torch.arange(len(old), device=old.device)
    source = place[new.long()]
    kept = source >= 0
    for x in moments:
        x.copy_(x.index_select(1, source.clamp(min=0)) * kept)

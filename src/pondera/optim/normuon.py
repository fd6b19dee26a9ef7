"""NorMuon: Muon's orthogonalised momentum, with each neuron's share of the update evened out."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, MatrixOptimizer, Rest, Scaled, State, in_range, settings_of_the_rest
from pondera.optim._groups import VECTOR_RATE_RATIO
from pondera.optim._iteration import check_iteration, orthogonalised

SCALINGS = ("reference", "paper")


class NorMuon(MatrixOptimizer):
    r"""Orthogonalise the momentum, divide each row by its running root mean square, keep the size of the whole.

    For a weight W (m x n, one row a neuron) with gradient G (Algorithm 1; Nesterov's U is the reference code's):

    .. math::
        M &\leftarrow \beta_1 M + (1 - \beta_1) G, \qquad U = \beta_1 M + (1 - \beta_1) G \\
        O &= \mathrm{NewtonSchulz}_5(U) \\
        v &\leftarrow \beta_2 v + (1 - \beta_2)\, \mathrm{mean}_{\text{columns}}(O \odot O) \; (v \in \mathbb{R}^m) \\
        \hat O &= O / (\sqrt v + \epsilon) \text{ row by row} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, c\, \hat O / \lVert \hat O \rVert_F

    with c the norm of the update, by `scaling`: "reference" keeps that of Muon, ||O||_F sqrt(max(1, m/n)); "paper" is
    0.2 sqrt(mn), an entry of the size AdamW moves by, so that AdamW's rates carry over. v starts at 0 without bias
    correction, which c takes out while all rows are of one age (derived). Embeddings, norms, biases and the output head
    are moved by AdamW inside the same optimizer: pass ``groups(model)``. Of a plain iterable, parameters of fewer than
    two dimensions go to AdamW and all others, embeddings too, count as matrices.

    Args:
        params: parameters, or groups as `groups` makes them (a group may be marked ``matrix=False``). Weights of
            convolutions are flattened to (out, rest).
        lr: eta (0.02: reference code). With scaling="paper" use a rate of AdamW, such as 1e-3.
        momentum: beta_1 (0.95: reference code).
        beta2: decay of the rows' second moment (0.95: reference code).
        weight_decay: decoupled decay lambda of matrices, multiplied by lr (0: reference code).
        scaling: "reference" or "paper", see above.
        ns_steps: iterations of Newton-Schulz (5: reference code).
        ns_dtype: precision of the iteration; None is bfloat16 where products in it are native, as in the reference, and
            float32 on other CPUs, where they can be fifty times slower (measured). float64 is kept.
        eps: added to both denominators (1e-10: reference code).
        vector_lr_ratio: AdamW's rate over lr; None is 0.015 for "reference" (3e-4 beside 0.02 in its code), 1 for
            "paper".
        betas, vector_eps, vector_weight_decay: AdamW's own ((0.9, 0.95), 1e-10, 0: reference code).
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient or a complex parameter.
    Paper: Li, Liu, Liang, Chen, Zhao 2025, arXiv 2510.05491. Code: github.com/zichongli5/NorMuon.

    Where code and paper differ: the scale c, and Nesterov (the paper's box orthogonalises M itself). Where we differ
    from the code: it normalises convolutions along the last kernel axis only, we a whole output unit, the paper's
    neuron; gradients are left as they are; a parameter without one is skipped. Under FSDP2 (DTensor) each rank gathers
    the matrix, computes the whole update and keeps its part; `spread` deals the matrices out to the ranks, as the
    paper's version does.

    >>> from torch import nn
    >>> from pondera.optim._groups import groups
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    >>> optimizer = NorMuon(groups(net), lr=0.02)
    >>> net(torch.ones(2, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> {k: tuple(v.shape) for k, v in optimizer.state[net[0].weight].items()}
    {'momentum_buffer': (8, 4), 'second_momentum_buffer': (8, 1)}
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        weight_decay: float = 0.0,
        scaling: str = "reference",
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        eps: float = 1e-10,
        vector_lr_ratio: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        vector_eps: float = 1e-10,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        if vector_lr_ratio is None:
            vector_lr_ratio = 1.0 if scaling == "paper" else VECTOR_RATE_RATIO
        own: Group = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "eps": eps}
        own |= {"scaling": scaling, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        super().__init__(params, own | of_rest, rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        in_range("NorMuon", "beta2", group["beta2"], 0, 1)
        in_range("NorMuon", "eps", group["eps"], 0, open_low=True)
        check_iteration("NorMuon", group)
        if group["scaling"] not in SCALINGS:
            raise BadInput(f"NorMuon knows the scalings {' and '.join(SCALINGS)}, got {group['scaling']!r}")

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Scaled:
        m, n = update.shape
        O = orthogonalised(update, group)
        squares = torch.linalg.vector_norm(O, dim=1, keepdim=True, dtype=accurate(O.dtype)).square()
        if "second_momentum_buffer" not in state:
            state["second_momentum_buffer"] = O.new_zeros(m, 1)
        v = state["second_momentum_buffer"]
        v.lerp_((squares / n).to(v.dtype), 1 - group["beta2"])
        even = 1 / (v.sqrt() + group["eps"])  # what each row is multiplied by
        c = squares.sum().sqrt() * max(1, m / n) ** 0.5 if group["scaling"] == "reference" else 0.2 * (m * n) ** 0.5
        return O, even * (c / ((squares * even.square()).sum().sqrt() + group["eps"]))


def accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

"""Trust-region descent: move as far as a ball of the chosen norm allows, in the direction of the averaged gradient."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, Rest, State, settings_of_the_rest
from pondera.optim._groups import VECTOR_RATE_RATIO
from pondera.optim._norms import NormOptimizer

SCALES = (None, "original", "match_rms_adamw")
STARTS = ("gradient", "zero")


class TrustRegion(NormOptimizer):
    r"""Average the gradients, then step to the point of a ball around the weights that the average likes best.

    For a norm with the ball's radius eta (Algorithms 1 and 2; the paper's alpha is 1 - beta):

    .. math::
        m_0 &= g_0, \qquad m_{k+1} = \beta m_k + (1 - \beta)\, g_k \\
        x_{k+1} &= (1 - \eta\lambda)\, x_k + \eta\, \mathrm{lmo}(m_{k+1}), \qquad
        \mathrm{lmo}(m) = \arg\min_{\lVert d \rVert \le 1} \langle m, d \rangle

    The step has size eta in the norm whatever the gradient's size, and with decay lambda the weights stay in the ball of
    radius max(||x_0||, 1 / lambda). The lmo is minus the `dual_map`. Named settings (Sec. 2):

    - Muon: ``norm="spectral"``, each matrix by its polar factor. `torch.optim.Muon` itself is
      ``TrustRegion(matrices, momentum=0.95, nesterov=True, scale="original", start="zero", ns_dtype=torch.bfloat16)``.
    - signSGD with momentum: ``norm="max"``, every entry of every parameter by its sign.
    - normalised SGD with momentum: ``norm="frobenius"``, all parameters as one vector, divided by its length.

    "row" and "column" divide each row or column of a matrix by its length. The matrix norms leave what is no matrix, and
    groups marked ``matrix=False``, to AdamW; "max" and "frobenius" move everything. Each group may name a norm of its own
    (the largest of their norms is then that of the whole): ``roles(model)`` gives each layer the norm of its role.

    Args:
        params: parameters, or groups as `groups` or `roles` makes them.
        lr: eta, the radius (0.02: Muon's reference code). A sign moves every entry by it, "frobenius" the whole model: good
            rates of "max" are nearer 1e-3, those of "frobenius" nearer 1.
        norm: "spectral", "frobenius", "max", "row" or "column".
        momentum: beta (0.9: ours, the paper has theory alone; 0.95: Muon's reference code).
        weight_decay: lambda, multiplied by lr (0: Algorithm 1).
        start: what m starts from: "gradient", the first one (the paper) or "zero" (Muon), where it weighs 1 - beta.
        nesterov: the lmo of beta m + (1 - beta) g in place of m (False: the paper; True: Muon).
        scale: a factor for each matrix of m x n: None is 1 (the paper), "original" sqrt(max(1, m/n)), "match_rms_adamw"
            0.2 sqrt(max(m, n)), both by the names of `torch.optim.Muon`.
        ns_steps: steps of Newton-Schulz for "spectral" (5: Muon); None is the exact SVD.
        ns_dtype: their precision; None is bfloat16 where products in it are native and float32 on other CPUs. float64 is
            kept.
        vector_lr_ratio, betas, vector_eps, vector_weight_decay: AdamW's rate over lr and its own (0.015, (0.9, 0.95),
            1e-10, 0: as in `NorMuon`).
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient, one that is not finite, or a complex
        parameter.
    Paper: Kovalev 2025, arXiv 2503.12645. It has no code. Algorithm 3 (the gradient at an extrapolated point) and a
        composite term R are left out. The start of m was read at second hand.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, 0.1]])
    >>> TrustRegion([w], lr=0.5, ns_steps=None).step()
    >>> w.data
    tensor([[-0.5000,  0.0000],
            [ 0.0000, -0.5000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        *,
        norm: str = "spectral",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        start: str = "gradient",
        nesterov: bool = False,
        scale: str | None = None,
        ns_steps: int | None = 5,
        ns_dtype: torch.dtype | None = None,
        vector_lr_ratio: float = VECTOR_RATE_RATIO,
        betas: tuple[float, float] = (0.9, 0.95),
        vector_eps: float = 1e-10,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "norm": norm, "momentum": momentum, "weight_decay": weight_decay, "start": start}
        own |= {"nesterov": nesterov, "scale": scale, "ns_steps": ns_steps, "ns_dtype": ns_dtype}
        super().__init__(
            params, own | settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay), rest
        )

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["start"] not in STARTS:
            raise BadInput(f"TrustRegion knows the starts {' and '.join(STARTS)}, got {group['start']!r}")
        if group["scale"] not in SCALES:
            raise BadInput(f"TrustRegion knows the scales None, original and match_rms_adamw, got {group['scale']!r}")

    def _momentum(self, G: Tensor, state: State, group: Group) -> Tensor:
        if group["momentum"] and group["start"] == "gradient" and "momentum_buffer" not in state:
            state["momentum_buffer"] = G.clone()
        return super()._momentum(G, state, group)

    def _sized(self, D: Tensor, U: Tensor, group: Group) -> Tensor:
        if group["scale"] is None or not group["matrix"]:
            return D
        m, n = D.shape
        return D.mul_(max(1, m / n) ** 0.5 if group["scale"] == "original" else 0.2 * max(m, n) ** 0.5)

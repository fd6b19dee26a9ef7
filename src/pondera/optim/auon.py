"""AuON: Nesterov momentum divided by one number, the root mean square of hyperbolic cosines of the update."""

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, MatrixOptimizer, Rest, Scaled, State, in_range, is_sharded, settings_of_the_rest
from pondera.optim._iteration import check_iteration, orthogonalised

SCALINGS = ("reference", "paper")
SERIES = (1, 1 / 3, 2 / 45, 1 / 315)  # of sinh^2 in s^2


class AuON(MatrixOptimizer):
    r"""Divide a matrix's Nesterov momentum by R, one positive number that grows when single entries stand out.

    With N entries in the weight W and gradient G (reference code):

    .. math::
        M &\leftarrow \beta M + (1 - \beta) G, \qquad U = \beta M + (1 - \beta) G \\
        s &= \gamma\, U / (\lVert U \rVert_F + 10^{-7}), \qquad R = \sqrt{\tfrac{1}{N} \sum \cosh^2 s} \\
        W &\leftarrow (1 - \eta\lambda) W - \eta\, U / (R + 10^{-8})

    **What it amounts to** (derived). As sum s^2 <= gamma^2, R lies between 1 and 1 + sinh^2(gamma) / (2N): at gamma =
    1.5 it is 1 within 2.3 / N. On any layer of a real network this is momentum SGD, ``torch.optim.SGD(lr=eta * (1 -
    beta), momentum=beta, nesterov=True)``, with decoupled decay. The paper's text (Sec. 3.1) divides U by its norm
    first and has no gamma: scaling="paper" moves each matrix by eta in Frobenius norm, whatever its gradient's size
    (normalised SGD). Embeddings, norms, biases and the output head go to AdamW inside the same optimizer, as in
    `NorMuon`.

    Args:
        params: parameters, or groups as `groups` makes them (a group may be marked ``matrix=False``).
        lr: eta (0.24: code; its training script sets 0.08, the paper's language model 0.055).
        momentum: beta (0.95: code).
        weight_decay: decoupled decay lambda of matrices, multiplied by lr (0: code; 0.01 in its training script).
        gamma: how strongly standing-out entries brake (1.5: code).
        scaling: "reference" (the code, above) or "paper" (U / ||U||_F in place of U in the last line).
        vector_lr_ratio: AdamW's rate over lr (0.1: 0.008 beside 0.08 in the code's training script).
        betas, vector_eps, vector_weight_decay: AdamW's own ((0.8, 0.95), 1e-10, 0: the code's training script).
        rest: another optimizer than AdamW for the rest: the name of a class of torch.optim, or the class.
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient or a complex parameter.
    Paper: Maity 2025, arXiv 2509.24320. Code: github.com/ryyzn9/AuON, which moves biases and norms by a separate Adam,
        and overwrites gradients; ours are left as they are.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.eye(2)
    >>> AuON([w], lr=1.0, momentum=0.0, gamma=1e-6).step()  # R = 1: plain gradient descent
    >>> w.data
    tensor([[-1.,  0.],
            [ 0., -1.]])
    """

    elementwise = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.24,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 1.5,
        scaling: str = "reference",
        vector_lr_ratio: float = 0.1,
        betas: tuple[float, float] = (0.8, 0.95),
        vector_eps: float = 1e-10,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "gamma": gamma, "scaling": scaling}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        super().__init__(params, own | of_rest, rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        in_range("AuON", "gamma", group["gamma"], 0)
        if group["scaling"] not in SCALINGS:
            raise BadInput(f"AuON knows the scalings {' and '.join(SCALINGS)}, got {group['scaling']!r}")

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor | Scaled:
        U, gamma = update, group["gamma"]
        size = U.norm()
        by = 1 / (brake(U, gamma, size) + 1e-8)
        by = by if group["scaling"] == "reference" else by / (size + 1e-7)
        return U * by if is_sharded(U) else (U, by)  # a sharded U is not gathered: two sums cross the ranks


class HybridAuON(MatrixOptimizer):
    r"""Newton-Schulz's orthogonalisation of the momentum as in Muon, divided by AuON's R.

    .. math:: O = \mathrm{NewtonSchulz}(U), \qquad W \leftarrow (1 - \eta\lambda) W - \eta\, O / (R(O) + 10^{-8})

    with U and R as in `AuON`. R is again 1 within 2.3 / N (derived): this is Muon without its factor sqrt(max(1, m/n)).

    Args:
        params, momentum, weight_decay, gamma, vector_lr_ratio, betas, vector_eps, vector_weight_decay, rest: as in
            `AuON`.
        lr: eta (0.24: code). O is far larger than U, so good rates are nearer Muon's 0.02 (derived).
        ns_steps: iterations of Newton-Schulz (5: code; the paper's Sec. 3.2 takes one).
        ns_dtype: precision of the iteration, as in `NorMuon` (code: the parameter's own).
    Raises: BadInput: as `AuON`, and for `ns_steps` below 1.
    Paper: Maity 2025, arXiv 2509.24320. For
        convolutions the code orthogonalises each kernel (the last two axes), ours the weight flattened to (out, rest),
        as Muon does.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[100.0, 0.0], [0.0, 1.0]])
    >>> HybridAuON([w], lr=1.0, ns_steps=9).step()
    >>> bool(w[0, 0] / w[1, 1] < 2)  # a hundred to one before
    True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.24,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        gamma: float = 1.5,
        ns_steps: int = 5,
        ns_dtype: torch.dtype | None = None,
        vector_lr_ratio: float = 0.1,
        betas: tuple[float, float] = (0.8, 0.95),
        vector_eps: float = 1e-10,
        vector_weight_decay: float = 0.0,
        rest: Rest = None,
    ) -> None:
        own: Group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "gamma": gamma}
        of_rest = settings_of_the_rest(vector_lr_ratio, betas, vector_eps, vector_weight_decay)
        super().__init__(params, own | of_rest | {"ns_steps": ns_steps, "ns_dtype": ns_dtype}, rest)

    def _check(self, group: Group) -> None:
        super()._check(group)
        in_range("HybridAuON", "gamma", group["gamma"], 0)
        check_iteration("HybridAuON", group)

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Scaled:
        O = orthogonalised(update, group)
        return O, 1 / (brake(O, group["gamma"], O.norm()) + 1e-8)


def brake(U: Tensor, gamma: float, size: Tensor) -> Tensor:
    """R: the root mean square of cosh(gamma U / ||U||), a scalar of at least 1; size is ||U||.

    N R^2 = N + sum sinh^2 s. As sum s^2 is known, and sinh^2 s exceeds s^2 by no larger a share than it does at the
    largest |s|, one look at that entry (on a CPU) or the number of entries (elsewhere, where looking would wait) often
    tells that s^2 alone is exact to 3e-8; the next three terms of the series then are within the same at 10^5 entries.
    """
    N, k = U.numel(), gamma / (size + 1e-7)
    if is_sharded(U) or torch.compiler.is_compiling():
        return _directly(U, k)
    if U.device.type == "cpu":
        low, high = U.aminmax()
        largest = float(k * torch.maximum(high, -low))
        if gamma**2 * (_square(largest) / max(largest, 1e-30) ** 2 - 1) / (2 * N) <= 3e-8 or largest == 0:
            return (1 + (k * size).square() / N).sqrt()
        return _directly(U, k)
    if _square(gamma) - sum(c * gamma ** (2 * i + 2) for i, c in enumerate(SERIES)) > 6e-8 * N:
        return _directly(U, k)
    flat = U.flatten() if U.dtype in (torch.float32, torch.float64) else U.flatten().float()
    two = flat * flat
    four = two * two
    sums = (two.sum(), torch.dot(two, two), torch.dot(two, four), torch.dot(four, four))
    return (1 + sum(c * s * k ** (2 * i + 2) for i, (c, s) in enumerate(zip(SERIES, sums, strict=True))) / N).sqrt()


def _directly(U: Tensor, k: Tensor) -> Tensor:
    s = U * k
    return (s.cosh().square().sum() / U.numel()).sqrt()  # a sum: the mean of unevenly sharded parts would be off


def _square(s: float) -> float:
    return math.sinh(s) ** 2 if s < 300 else math.inf

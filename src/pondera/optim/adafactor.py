"""Adafactor: torch's own, with the floor of its second moment where the paper has it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, in_range, require_finite, with_gradient

LEAST = 1e-18  # its square is still a number of float32


class Adafactor(torch.optim.Adafactor):
    r"""Adam without momentum, with the second moment of a matrix rebuilt from its row and column means.

    For a weight W (n x m) with gradient G at step t (Algorithms 4 and 5 of the paper, as torch has them):

    .. math::
        R &\leftarrow (1 - \hat\beta_t) R + \hat\beta_t\, \mathrm{mean}_{\text{columns}}\, G^2, \qquad
        C \text{ likewise over rows}, \qquad \hat\beta_t = t^{-0.8} \\
        U &= G / \sqrt{R\, C / \mathrm{mean}(R)}, \qquad \rho_t = \min(\eta, 1/\sqrt t) \\
        W &\leftarrow (1 - \eta\lambda) W - \max(\epsilon_2, \mathrm{RMS}(W))\, \rho_t\, U / \max(1, \mathrm{RMS}(U) / d)

    A matrix keeps n + m numbers in the place of n m; vectors keep their second moment whole. **This class is
    torch.optim.Adafactor but for the default of eps.** The paper adds 1e-30 to every squared gradient; torch clamps
    sqrt(V) and mean(R) from below at its eps[0], by default the machine epsilon of the weights: 1.2e-7 in float32, 7.8e-3
    in bfloat16. Gradients smaller than that are hardly followed, so that weights in bfloat16 stand still where losses are
    means over many tokens. With 1e-15, whose square is the paper's number, steps do not depend on the gradients' size down to
    1e-7, as mean(R) is one of squares, and keep their length down to 1e-12, as U is clipped (measured). The paper's own 1e-30
    in its place is unsafe: its square vanishes, and 0 / 0 follows.

    Factors are of the last two dimensions: of a 3 x 3 convolution torch keeps two thirds of the entries, not a row and a
    column of the flattened weight. A step is relative to the size of the weight, and what starts at zero moves by 1e-3 of
    the rate: slow for adapters and for branches that start at nothing.

    Args:
        params: parameters or groups.
        lr: eta, the largest relative step (0.01: paper and torch).
        beta2_decay: exponent of the decay (-0.8: paper and torch).
        eps: the floor of sqrt(V), and that of RMS(W) ((1e-15, 1e-3): see above; (None, 1e-3): torch).
        d: the largest RMS of U (1: paper and torch).
        weight_decay: decoupled decay lambda, multiplied by lr (0: torch).
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient or a complex parameter.
    Paper: Shazeer & Stern 2018, arXiv 1804.04235; momentum and the schedule of its Sec. 8 are not part of torch's.

    >>> w = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    >>> w.grad = torch.full_like(w, 1e-4)  # as in the mean over ten thousand tokens
    >>> Adafactor([w], lr=0.5).step()
    >>> w.data[0, 0].item()  # torch's default would leave it at 1
    0.5
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        beta2_decay: float = -0.8,
        eps: tuple[float, float] = (1e-15, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        self._check({"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay})
        super().__init__(params, lr, beta2_decay, eps, d, weight_decay)

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        for name in ("lr", "weight_decay"):
            in_range("Adafactor", name, group[name], 0)
        if not -math.inf < group["beta2_decay"] <= 0:
            raise BadInput(f"Adafactor needs beta2_decay of at most 0, finite, got {group['beta2_decay']!r}")
        in_range("Adafactor", "d", group["d"], 1)
        eps = group["eps"]
        if not (isinstance(eps, (tuple, list)) and len(eps) == 2):
            raise BadInput(f"Adafactor needs two numbers for eps, got {eps!r}")
        in_range("Adafactor", "eps[0]", eps[0], LEAST)
        in_range("Adafactor", "eps[1]", eps[1], 0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = [p for group in self.param_groups for p in with_gradient(group["params"], "Adafactor")]
        require_finite(every, "Adafactor")
        super().step()
        return loss

"""SGDW: momentum SGD whose weight decay is a step of its own, apart from gradient, momentum and learning rate."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pondera.optim._base import Group, in_range, is_sharded, require_finite, with_gradient


class SGDW(Optimizer):
    r"""SGD with momentum and decoupled weight decay (Algorithm 1).

    .. math::
        m_t &= \beta_1 m_{t-1} + \eta_t \alpha\, \nabla f_t(\theta_{t-1})                      (line 8) \\
        \theta_t &= \theta_{t-1} - m_t - \eta_t \lambda\, \theta_{t-1}                         (line 9)

    alpha is the learning rate, eta_t the schedule's multiplier, lambda the decay. **The decay is scaled by the schedule
    but not by the learning rate**: a step without gradient leaves a weight times 1 - eta_t lambda, whatever alpha. The
    two can then be tuned one after the other. A scheduler sets a group's ``lr`` to eta_t alpha; here eta_t is read back
    as ``lr / base_lr``, with ``base_lr`` the lr a group was made with. To change alpha itself on the way, set both.

    The paper's AdamW (Algorithm 2) differs from `torch.optim.AdamW` in just this: torch multiplies the decay by the
    learning rate too, theta <- theta (1 - eta_t alpha lambda). The decay is decoupled from the gradient in both, from
    the rate only in the paper. ``torch.optim.AdamW(weight_decay=lambda / alpha)`` is the paper's AdamW, for every
    schedule; the L2 variant is ``torch.optim.Adam(weight_decay=...)``.

    Args:
        params: parameters or groups; every parameter given is decayed (put norms and biases in a group with 0).
        lr: alpha > 0, the rate at multiplier 1 (0.05: the authors' example).
        momentum: beta_1 (0.9: the authors' example).
        weight_decay: lambda, the share of a weight lost a step at multiplier 1; eta_t lambda must stay below 1 to make
            sense. The authors' 0.025 is the *normalised* lambda: multiply it by 1 / sqrt(batches an epoch * epochs)
            (App. B.1). Default 1e-4, which is their 0.025 over about 60,000 steps (derived).
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient or a complex parameter.
    Paper: Loshchilov & Hutter 2019, arXiv 1711.05101. The authors' code multiplies by the rate after the momentum, as
        torch.optim.SGD does: the same while the rate is constant; after a drop the paper's m still holds the old rate's
        steps. We follow the paper.

    >>> w = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SGDW([w], lr=0.5, weight_decay=0.25)
    >>> w.grad = torch.zeros(1)
    >>> optimizer.step()
    >>> w.data  # 1 - lambda; torch's convention would give 1 - 0.5 * 0.25
    tensor([0.7500])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.05,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            in_range("SGDW", "lr", group["lr"], 0, open_low=True)
            in_range("SGDW", "momentum", group["momentum"], 0, 1)
            in_range("SGDW", "weight_decay", group["weight_decay"], 0, 1)
            param_group.setdefault("base_lr", float(group["lr"]))
            in_range("SGDW", "base_lr", param_group["base_lr"], 0, open_low=True)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = [with_gradient(group["params"], "SGDW") for group in self.param_groups]
        require_finite([p for moved in every for p in moved], "SGDW")
        for group, moved in zip(self.param_groups, every, strict=True):
            lr = group["lr"]
            eta = lr / group["base_lr"]
            for params in alike(moved):
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                m = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_mul_(m, group["momentum"])  # line 8
                torch._foreach_add_(m, [p.grad for p in params], alpha=lr)
                torch._foreach_mul_(params, 1 - eta * group["weight_decay"])  # line 9
                torch._foreach_sub_(params, m)
        return loss


def alike(params: list[Tensor]) -> list[list[Tensor]]:
    """Lists that one foreach call may take: of one device and dtype, all DTensors or none."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        kinds[p.device, p.dtype, is_sharded(p)].append(p)
    return list(kinds.values())

"""PolyakMomentum: momentum whose step size follows from the loss, its lower bound and the length of the momentum."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, in_range, require_finite, with_gradient
from pondera.optim._loss import a_loss, inner, squares, total
from pondera.optim.decoupled_decay import alike

RULES = ("mag", "hb")
SHARED = ("lower_bound", "c", "rule")  # one step size for all groups needs one of each


class PolyakMomentum(Optimizer):
    r"""Polyak's step size for SGD with momentum: ALR-SMAG (moving averaged gradient) or ALR-SHB (heavy ball).

    rule="mag", with d a sum of gradients and not an average of them:

    .. math::
        d_k &= \beta d_{k-1} + g_k \\
        \eta_k &= \min\{\eta_{\max},\; (f_k - f^*) / (c \lVert d_k \rVert^2)\} \\
        x_{k+1} &= x_k - \eta_k d_k

    rule="hb", with m_k = x_k - x_{k-1} the last step:

    .. math::
        \eta_k &= \min\{\eta_{\max},\; (f_k - f^* + \beta \langle g_k, m_k \rangle) / (c \lVert g_k \rVert^2)\} \\
        x_{k+1} &= x_k - \eta_k g_k + \beta m_k

    f_k is the loss that the gradients belong to, f* a lower bound of it, eta_max the group's ``lr``. With c = 1 and no
    cap these are the deterministic ALR-MAG and ALR-HB: for a convex f, each minimises the bound on ||x_{k+1} - x*|| that
    convexity gives (derived); under ALR-MAG this distance never grows, whatever beta is. On batches that is lost, as d
    holds gradients of other batches: the cap and c > 1 take its place. A negative eta (the loss is below f*, or the
    heavy ball still falls) counts as 0, and so does one of a zero gradient.

    **One step size serves all groups**: norms and inner products run over every parameter, in float32 or better. A group
    has its own cap, decay and momentum. Schedulers move the cap, and act where it is what binds.

    The loss must be that of the gradients: ``step(closure)`` with a closure that calls backward, or ``step(loss=loss)``
    after it. Of micro-batches give the mean, and with data parallel training the mean over ranks, the same on each. With
    `torch.amp.GradScaler` give the loss before it is scaled: ``scaler.step(optimizer, loss=loss)``.

    Args:
        params: parameters or groups.
        lr: eta_max, the largest step size; infinity for none (0.1: the implementation below).
        momentum: beta (0.9: the same).
        weight_decay: lambda; a step multiplies weights by 1 - eta_k lambda, with the step size that was found (the same).
            The loss is taken without it.
        lower_bound: f*, one for all groups (0: right for losses that can be fitted to zero). Label smoothing and noise
            keep the loss above 0: then the steps are too long, and the cap is the guard.
        c: divides the step (1: the same); larger is more careful.
        rule: "mag" or "hb".
    Raises: BadInput: for a setting out of range, groups that differ in `lower_bound`, `c` or `rule`; in `step` without a
        loss, for one that is not a single number or (on a CPU) not finite, a sparse gradient, a complex parameter, or
        gradients with NaN or infinity; nothing has moved then.
    Paper: Wang, Johansson, Zhang 2023, arXiv 2305.12939. No code of the authors was found. "mag" agrees with Schaipp's
        independent AlrSmag, which has the decay too; the heavy ball's formula is derived from the bound, and where c and
        the cap stand in it is recalled. AlrSmag moves by one group's step and starts all buffers in the first step.

    >>> x = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = PolyakMomentum([x], lr=math.inf, momentum=0.0)
    >>> loss = x.square().sum() / 2
    >>> loss.backward()
    >>> optimizer.step(loss=loss).item()  # eta = (x^2 / 2) / x^2, whatever x is
    8.0
    >>> x.data
    tensor([2.])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lower_bound: float = 0.0,
        c: float = 1.0,
        rule: str = "mag",
    ) -> None:
        own: Group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, own | {"lower_bound": lower_bound, "c": c, "rule": rule})

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            if group["lr"] != math.inf:
                in_range("PolyakMomentum", "lr", group["lr"], 0)
            in_range("PolyakMomentum", "momentum", group["momentum"], 0, 1)
            in_range("PolyakMomentum", "weight_decay", group["weight_decay"], 0)
            in_range("PolyakMomentum", "lower_bound", group["lower_bound"], -math.inf)
            in_range("PolyakMomentum", "c", group["c"], 0, open_low=True)
            if group["rule"] not in RULES:
                raise BadInput(f"PolyakMomentum knows the rules {' and '.join(RULES)}, got {group['rule']!r}")
            for name in SHARED:
                if self.param_groups and group[name] != (first := self.param_groups[0][name]):
                    raise BadInput(
                        f"PolyakMomentum takes one step size for all groups and needs one {name} for them, "
                        f"got {first!r} and {group[name]!r}"
                    )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Tensor | float | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient.

        Args:
            closure: re-evaluates the model, calls backward and returns the loss.
            loss: the loss in the closure's place, where backward has been called.
        """
        if (closure is None) == (loss is None):
            raise BadInput(
                f"PolyakMomentum finds its step size from the loss and needs step(closure) or step(loss=loss), "
                f"got {'neither' if loss is None else 'both'}"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        f = a_loss(loss, "PolyakMomentum")
        moving = [(g, params) for g in self.param_groups if (params := with_gradient(g["params"], "PolyakMomentum"))]
        if not moving:
            return loss
        require_finite([p for _, params in moving for p in params], "PolyakMomentum")
        first = moving[0][0]
        heavy_ball = first["rule"] == "hb"
        kinds = [(g, kind, [self._buffer(p) for p in kind]) for g, params in moving for kind in alike(params)]
        gap, squared = f - first["lower_bound"], []
        for g, params, held in kinds:
            grads: list[Any] = [p.grad for p in params]
            if heavy_ball:
                gap = gap + g["momentum"] * total([inner(a, b) for a, b in zip(grads, held)], gap.device)
                squared.append(squares(grads))
            else:
                torch._foreach_mul_(held, g["momentum"])
                torch._foreach_add_(held, grads)  # d <- b d + g
                squared.append(squares(held))
        length = total([s.to(gap.device) for s in squared], gap.device)
        polyak = torch.where(length > 0, gap / (first["c"] * length), 0.0).clamp(min=0)
        for g, params, held in kinds:
            cap = torch.as_tensor(g["lr"], dtype=polyak.dtype, device=polyak.device)
            eta = torch.minimum(polyak, cap).to(params[0].device)
            known = eta.item() if eta.device.type == "cpu" else None  # elsewhere the step size stays on its device
            if g["weight_decay"]:
                torch._foreach_mul_(params, 1 - g["weight_decay"] * (eta if known is None else known))
            if heavy_ball:
                torch._foreach_mul_(held, g["momentum"])
                shift(held, [p.grad for p in params], eta, known)  # m <- b m - eta g
                torch._foreach_add_(params, held)
            else:
                shift(params, held, eta, known)
        return loss

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def shift(of: list[Tensor], by: list[Any], eta: Tensor, known: float | None) -> None:
    """of <- of - eta by."""
    if known is not None:
        torch._foreach_add_(of, by, alpha=-known)
        return
    for x, d in zip(of, by, strict=True):
        x.addcmul_(d, eta.to(x.dtype), value=-1)

"""SMB: a gradient step that is tried, and where it fails, a step of a model built from the gradients before and after it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pondera.errors import BadInput
from pondera.optim._base import Group, in_range, require_finite, whole_number, with_gradient
from pondera.optim._loss import a_loss, inner, squares, total, wide
from pondera.optim.decoupled_decay import alike

TINY = 1e-8  # the norm of a gradient below which the reference takes no model step
LR_MAX, LR_FACTOR = 20.0, 0.9  # of the schedule, as in the reference


class SMB(Optimizer):
    r"""Stochastic model building: try x - alpha g; where the loss does not fall enough, take the step of a local model.

    The trial x_t = x - alpha g is taken if

    .. math:: f(x_t) \le f(x) - c\, \alpha \lVert g \rVert^2

    on the same batch. Otherwise, with g_t the gradient there, each parameter tensor gets a step of its own. With s =
    -alpha g and y = g_t - g:

    .. math::
        \sigma &= \tfrac12 \left( \lVert s \rVert (\lVert y \rVert + \lVert g \rVert / \eta) - y^T s \right), \qquad
        \theta = (y^T s + 2 \sigma)^2 - \lVert s \rVert^2 \lVert y \rVert^2 \\
        c_g &= -\lVert s \rVert^2 / (2 \sigma), \qquad
        c_s = \tfrac{c_g}{\theta} \left( -(y^T s + 2\sigma)\, y^T g + \lVert y \rVert^2 s^T g \right), \qquad
        c_y = \tfrac{c_g}{\theta} \left( -(y^T s + 2\sigma)\, s^T g + \lVert s \rVert^2 y^T g \right) \\
        x &\leftarrow x + c_g g + c_s s + c_y y

    so that both length and direction change; for y = 0 it is eta times the trial. The inner products are sums over one
    tensor, the test is one for all.

    **The closure** evaluates the model on one batch and returns the loss. It is called twice a step, or once where the
    gradient vanishes. Best it does *not* call backward: then backward runs once where the trial is taken, and twice where it
    is not. A usual closure, which calls backward itself, works as well and costs a backward more for each trial that is
    taken. Gradients are cleared before each call, and after the step are those of the loss it returns. Both calls must see
    the same batch; dropout draws anew. With data parallel training the loss must be the mean over ranks. It does not go
    together with `torch.amp.GradScaler`: train half precision in bfloat16. A trial whose loss or gradient is not finite is
    taken back, and the step ends where it began.

    Args:
        params: parameters or groups.
        lr: alpha, the length of the trial (1: the paper's default).
        eta: in (0, 1), how near the model's step may come to the trial (0.99: reference code).
        c: what share of alpha ||g||^2 the loss must fall by (0.1: reference code).
        autoschedule: None, or over how many steps to look back: if a share of them above `gamma` took the model's step, all
            rates are multiplied by 0.9, and else divided by it while they stay below 20 (reference code: the batches of
            an epoch).
        gamma: that share (0.05: reference code).
    Raises: BadInput: for a setting out of range; in `step` without a closure, for a loss that is not one finite number, a
        sparse gradient, a complex parameter, or gradients with NaN or infinity where the step begins; nothing moves then.
    Paper: Birbil, Martin, Onay, Oztoprak 2021 (authors recalled), arXiv 2111.07058. Code: github.com/sibirbil/SMB. For one
        group we agree with it. For several, it tries one group after the other, an evaluation each, against the loss at the
        start; we try all at once. A tensor with a zero gradient makes it divide zero by zero; ours stays. Its variant that
        tests on an independent batch (SMBi) is not built.

    >>> x = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SMB([x], lr=3.0)  # the trial goes from 1 to -2
    >>> optimizer.step(lambda: x.square().sum() / 2).item(), optimizer.last_step
    (0.5, 'model')
    >>> x.data.round(decimals=3)
    tensor([0.5720])
    """

    step_needs = "closure"  # for loops that look: it does not step without

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        eta: float = 0.99,
        c: float = 0.1,
        autoschedule: int | None = None,
        gamma: float = 0.05,
    ) -> None:
        self.last_step = "none"  # which step was taken last: trial, model or none
        own: Group = {"lr": lr, "eta": eta, "c": c, "autoschedule": autoschedule, "gamma": gamma}
        super().__init__(params, own | {"seen": 0, "rejected": 0})

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            in_range("SMB", "lr", group["lr"], 0)
            in_range("SMB", "eta", group["eta"], 0, 1, open_low=True)
            in_range("SMB", "c", group["c"], 0, 1, open_low=True)
            in_range("SMB", "gamma", group["gamma"], 0, 1)
            if group["autoschedule"] is not None:
                whole_number("SMB", "autoschedule", group["autoschedule"])
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "last_step": self.last_step}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient; the loss before the move.

        Args:
            closure: evaluates the model on one batch and returns the loss, best without calling backward.
        """
        if closure is None:
            raise BadInput("SMB evaluates the loss itself and needs step(closure), got no closure")
        loss, f = self._evaluate(closure)
        self._backward(loss)
        kinds = [(g, k) for g in self.param_groups for k in alike(with_gradient(g["params"], "SMB"))]
        before = [(g, params, [p.grad for p in params], torch._foreach_mul(params, 1.0)) for g, params in kinds]
        self.last_step = "none"
        if not before:
            return loss
        require_finite([p for _, params, _, _ in before for p in params], "SMB")
        there = f.device
        lengths = [squares(g).to(there) for _, _, g, _ in before]  # type: ignore[arg-type]
        expected = sum(float(o["c"] * o["lr"]) * n for (o, *_), n in zip(before, lengths, strict=True))
        norm = math.sqrt(total(lengths, there).item())
        if norm < TINY:
            self._count(False)
            return loss
        for o, params, g, _ in before:
            torch._foreach_add_(params, g, alpha=-float(o["lr"]))  # type: ignore[arg-type]
        tried, f_t = self._evaluate(closure, finite=False)
        if f_t <= f - expected:  # the one wait of a step
            self.last_step = "trial"
        elif math.isfinite(f_t):
            self._backward(tried)
            steps = [[p.grad for p in params] for _, params, _, _ in before]
            finite = all(s is not None and math.isfinite(squares([s])) for row in steps for s in row)
            for (o, params, g, x), g_t in zip(before, steps, strict=True):
                torch._foreach_copy_(params, x)
                if finite:
                    for p, a, b in zip(params, g, g_t, strict=True):
                        p.add_(model_step(a, b, float(o["lr"]), o["eta"]))  # type: ignore[arg-type]
            self.last_step = "model" if finite else "none"
        else:
            for _, params, _, x in before:
                torch._foreach_copy_(params, x)
        for _, params, g, _ in before:
            for p, a in zip(params, g, strict=True):
                p.grad = a
        self._count(self.last_step != "trial")
        return loss

    def _evaluate(self, closure: Callable[[], Any], finite: bool = True) -> tuple[Any, Tensor]:
        """The closure's loss, and it as a number; the gradients are None but for those the closure made."""
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None
        with torch.enable_grad():
            loss = closure()
        return loss, a_loss(loss, "SMB", finite=finite)

    def _backward(self, loss: Any) -> None:
        """The gradients, where the closure has not made them."""
        if all(p.grad is None for group in self.param_groups for p in group["params"]) and loss.requires_grad:
            with torch.enable_grad():
                loss.backward()

    def _count(self, rejected: bool) -> None:
        """What the schedule goes by."""
        for group in self.param_groups:
            if group["autoschedule"] is None:
                continue
            group["seen"] += 1
            group["rejected"] += rejected
            if group["seen"] >= group["autoschedule"]:
                if group["rejected"] / group["seen"] > group["gamma"]:
                    group["lr"] = group["lr"] * LR_FACTOR
                elif group["lr"] / LR_FACTOR <= LR_MAX:
                    group["lr"] = group["lr"] / LR_FACTOR
                group["seen"] = group["rejected"] = 0


def model_step(g: Tensor, g_t: Tensor, alpha: float, eta: float) -> Tensor:
    """c_g g + c_s s + c_y y of one tensor."""
    dtype = wide(g)
    g_w, y = g.to(dtype), g_t.to(dtype) - g.to(dtype)
    gg, yy, yg = (total([inner(a, b)], g.device) for a, b in ((g_w, g_w), (y, y), (y, g_w)))
    ss, ys, sg = alpha**2 * gg, -alpha * yg, -alpha * gg
    reach = ss.sqrt() * (yy.sqrt() + gg.sqrt() / eta)  # y's + 2 sigma
    sigma, theta = (reach - ys) / 2, reach.square() - ss * yy
    c_g = -ss / (2 * sigma)
    c_s = c_g / theta * (yy * sg - reach * yg)
    c_y = c_g / theta * (ss * yg - reach * sg)
    moves = (ss > 0) & (theta > 0)
    c_g, c_s, c_y = (torch.where(moves, c, 0.0) for c in (c_g, c_s, c_y))
    return (g_w * (c_g - alpha * c_s) + y * c_y).to(g.dtype)

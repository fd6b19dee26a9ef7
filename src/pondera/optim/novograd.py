"""NovoGrad: each layer's gradient divided by one running norm, then decay, then momentum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from pondera.optim._base import Group, in_range, require_finite, two_betas, with_gradient
from pondera.optim.decoupled_decay import alike


class NovoGrad(Optimizer):
    r"""Divide each tensor's gradient by a running l2 norm of it, add decay, sum up with momentum (Algorithm 1).

    For every parameter tensor ("layer") w with gradient g, v a single number:

    .. math::
        v_1 &= \lVert g_1 \rVert^2, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t \rVert^2 \\
        m_1 &= u_1, \qquad m_t = \beta_1 m_{t-1} + u_t, \qquad u_t = g_t / (\sqrt{v_t} + \epsilon) + \lambda w_t \\
        w_{t+1} &= w_t - \eta m_t

    State is one tensor and one number for each parameter, half of Adam's. A steady gradient moves a tensor by eta / (1 -
    beta_1) in l2 norm, 20 eta, whatever its size and the gradient's. The decay goes through the momentum with the gradient:
    it is decoupled from the norm alone, and what a step takes away comes to eta lambda / (1 - beta_1). A table of embeddings
    and a fused projection are one tensor each, with one v.

    Args:
        params: parameters or groups, of any shape.
        lr: eta (0.01: recalled from the paper's image models).
        betas: beta_1, beta_2 (0.95, 0.98: paper).
        eps: epsilon (1e-8: paper).
        weight_decay: lambda (0; the paper's models have 0.001 to 0.002, recalled).
        grad_averaging: multiply u by 1 - beta_1, from the first step on, so that m is an average and the rate 20 times what
            it was (False: Algorithm 1).
    Raises: BadInput: for a setting out of range; in `step` for a sparse gradient, one that is not finite, or a complex parameter.
    Paper: Ginsburg et al. 2019, arXiv 1905.11286. Ours beside pytorch_optimizer.NovoGrad 4.1: that one divides `p.grad` in
        place, and with grad_averaging leaves the first step at its full length. Ours equals it where neither shows. A tensor
        whose gradients have all been zero starts v at the first that is not (derived; else its next step is 1 / sqrt(1 -
        beta_2), 7 times, too long).

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([300.0, 400.0])
    >>> NovoGrad([w], lr=0.5).step()
    >>> w.data
    tensor([-0.3000, -0.4000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        *,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
    ) -> None:
        own: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own | {"grad_averaging": grad_averaging})

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            for name in ("lr", "eps", "weight_decay"):
                in_range("NovoGrad", name, group[name], 0)
            two_betas("NovoGrad", "betas", group["betas"])
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = [with_gradient(group["params"], "NovoGrad") for group in self.param_groups]
        require_finite([p for moved in every for p in moved], "NovoGrad")
        for group, moved in zip(self.param_groups, every, strict=True):
            beta1, beta2 = group["betas"]
            for params in alike(moved):
                grads = [p.grad for p in params]
                accurate = torch.promote_types(params[0].dtype, torch.float32)
                squares = [n.square() for n in torch._foreach_norm(grads, 2, dtype=accurate)]
                for p, square in zip(params, squares, strict=True):
                    if not self.state[p]:
                        self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(square))
                m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
                for old, square in zip(v, squares, strict=True):  # v_1 where there was nothing yet
                    old.copy_(torch.where(old == 0, square, old.lerp(square, 1 - beta2)))
                sizes = torch._foreach_add(torch._foreach_sqrt(v), group["eps"])
                share = 1 - beta1 if group["grad_averaging"] else 1.0
                torch._foreach_mul_(m, beta1)
                torch._foreach_addcdiv_(m, grads, sizes, value=share)
                if group["weight_decay"]:
                    torch._foreach_add_(m, params, alpha=share * group["weight_decay"])
                if isinstance(group["lr"], Tensor):
                    torch._foreach_sub_(params, torch._foreach_mul(m, group["lr"]))
                else:
                    torch._foreach_add_(params, m, alpha=-group["lr"])
        return loss

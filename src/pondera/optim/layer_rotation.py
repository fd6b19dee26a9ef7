"""Layca: any optimizer's direction, but every layer turns by the same angle a step and keeps the norm of its weights."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pondera.errors import BadInput
from pondera.optim._base import Group, in_range, require_finite, with_gradient
from pondera.optim._loss import inner, total, wide


class Layca(Optimizer):
    r"""Layer-level control of rotation: wrap an optimizer, and choose how far each layer turns in a step.

    Let u be the step that the wrapped optimizer would take from the kernel p (Algorithm 1):

    .. math::
        u &\leftarrow u - (u^T p / \lVert p \rVert^2)\, p \qquad \text{(only what turns p)} \\
        u &\leftarrow u\, \lVert p \rVert / \lVert u \rVert \\
        p' &= p - \rho u, \qquad p \leftarrow p'\, \lVert p \rVert / \lVert p' \rVert

    Every kernel turns by the angle arctan(rho) a step, whatever its gradient, and never changes its norm. So rho sets
    how fast *layer rotation*, the cosine distance of each layer from its start, grows, alike in all layers;
    `pondera.probe.layer_rotation` shows it.

    A **kernel** is a parameter of two or more dimensions in a group not marked ``matrix=False``: make the wrapped
    optimizer of ``groups(model, head=None)``, and embeddings and norms are left out, or of ``groups(model)`` for the
    output head too. The rest (biases, norms) moves by the wrapped optimizer at its own rate. The wrapped optimizer's rate
    does not matter for kernels (it is 1 while it steps, so that small steps are not lost), and neither does its
    decoupled decay; L2 in the gradient does. A kernel whose step is below the rounding of its weights stays.

    Layca takes the wrapped optimizer over: it shares its state, splits its groups into kernels (``lr`` is rho) and the
    rest (``lr`` is the wrapped one's), and schedulers, `state_dict` and clearing of gradients go through Layca. A scheduler
    moves both rates by one factor. A step holds one copy of the kernels. In half precision wrap an optimizer whose steps do
    not shrink with the gradient (Adam): the step is read off the rounded weights.

    Args:
        optimizer: whose direction to follow; its step takes no closure.
        lr: rho (3^-3; rates of 3^-5 to 3^-3 with decay reach a full rotation in the paper's runs, which are long). A group
            whose rate is not the wrapped optimizer's default keeps its ratio to it.
    Raises: BadInput: for what is not an optimizer, a rate out of range, no kernel, a kernel of zeros (it has no direction)
        or of numbers that are not finite; in `step` for a sparse gradient, a complex parameter, or
        gradients with NaN or infinity; nothing has moved then.
    Paper: Carbonnelle & De Vleeschouwer 2018, arXiv 1806.01603. Code: github.com/ispgroupucl/layer-rotation-tools (Keras),
        which trains kernels alone and leaves biases and norms as they were at the start ("This did not affect performance
        in our experiments"); to have that, give the wrapped optimizer the kernels alone. It multiplies a momentum step by
        the rate before it enters the buffer: the same while the rate is constant.

    >>> import math
    >>> p = torch.nn.Parameter(torch.eye(2))
    >>> optimizer = Layca(torch.optim.Adam([p]), lr=1.0)
    >>> p.grad = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    >>> optimizer.step()
    >>> p.data  # turned by 45 degrees; the norm is still the root of 2
    tensor([[ 0.7071, -1.0000],
            [ 0.0000,  0.7071]])
    """

    def __init__(self, optimizer: Optimizer, lr: float = 3.0**-3) -> None:
        if not isinstance(optimizer, Optimizer):
            raise BadInput(f"Layca wraps a torch.optim.Optimizer, got {type(optimizer).__name__}")
        in_range("Layca", "lr", lr, 0)
        usual = float(optimizer.defaults.get("lr", 0.0) or 0.0)
        parts = [
            part
            for group in optimizer.param_groups
            for part in _split(group, lr * (float(group["lr"]) / usual) if usual else lr, group.get("lr"))
        ]
        if not any(part["rotates"] for part in parts):
            raise BadInput(
                "Layca needs a kernel, a parameter of two or more dimensions in a group not marked matrix=False"
            )
        self.optimizer = optimizer
        super().__init__(parts, {**optimizer.defaults, "lr": lr, "rotates": True})
        optimizer.param_groups = self.param_groups
        self.state = optimizer.state

    def add_param_group(self, param_group: Group) -> None:
        if "rotates" in param_group:  # split before
            super().add_param_group(param_group)
            return
        held = param_group["params"]
        group = {**param_group, "params": [held] if isinstance(held, Tensor) else list(held)}
        lr = group.pop("lr", self.defaults["lr"])
        in_range("Layca", "lr", lr, 0)
        usual = self.optimizer.defaults.get("lr")
        share = float(lr) / float(self.defaults["lr"]) if self.defaults["lr"] else 1.0
        for part in _split(group, lr, None if usual is None else usual * share):
            self.optimizer.add_param_group(part)  # into the list that both share

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizer": self.optimizer}

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [with_gradient(group["params"], "Layca") for group in self.param_groups]
        require_finite([p for params in moved for p in params], "Layca")
        turning = [(g, g["lr"], params) for g, params in zip(self.param_groups, moved, strict=True) if g["rotates"]]
        before = [[p.clone() for p in params] for _, _, params in turning]
        try:
            for group, lr, _ in turning:
                group["lr"] = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
            self.optimizer.step()
        finally:
            for group, lr, _ in turning:
                group["lr"] = lr
        for (_, lr, params), kept in zip(turning, before, strict=True):
            for p, old in zip(params, kept, strict=True):
                p.copy_(rotated(old, old - p, lr))
        return loss


def _split(group: Group, lr: float, rest_lr: Any) -> Iterator[Group]:
    """The kernels of a group at the rate `lr`, and the rest at the wrapped optimizer's."""
    params = group["params"]
    shared = {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}
    kernels = [p for p in params if p.ndim >= 2] if group.get("matrix", True) else []
    own = {id(p) for p in kernels}
    rest = [p for p in params if id(p) not in own]
    for p in kernels:
        norm = float(total([inner(p.detach(), p.detach())], p.device))
        if not 0 < norm < float("inf"):
            what = "is all zeros and has no direction to turn" if norm == 0 else "holds numbers that are not finite"
            raise BadInput(
                f"Layca turns kernels, and one of shape {tuple(p.shape)} {what}; put it in a group marked matrix=False"
            )
    if kernels:
        yield {**shared, "params": kernels, "lr": lr, "rotates": True}
    if rest:
        yield {**shared, "params": rest, "rotates": False} | ({} if rest_lr is None else {"lr": rest_lr})


def rotated(p: Tensor, u: Tensor, rho: float | Tensor) -> Tensor:
    """p turned against u by arctan(rho) within its sphere; p itself where nothing of u beyond rounding turns it."""
    rounding = torch.finfo(p.dtype).eps
    p, u = p.to(wide(p)), u.to(wide(u))

    def norm(x: Tensor) -> Tensor:
        return total([inner(x, x)], x.device).sqrt()

    radius, least = norm(p), rounding * norm(u)
    u = u - p * (total([inner(u, p)], p.device) / radius.square())
    length = norm(u)
    scale = torch.where(length > torch.maximum(least, rounding * radius), radius / length, 0.0)
    turned = p - u * (rho * scale)
    return turned * (radius / norm(turned))

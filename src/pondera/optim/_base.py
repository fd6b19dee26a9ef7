"""What the matrix optimizers share: hidden matrices move by the method, everything else by AdamW, in one optimizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from pondera.errors import BadInput

Group = dict[str, Any]


class MatrixOptimizer(Optimizer):
    """Momentum and decoupled decay for matrices, the method's `_direction` between them, and AdamW for the rest.

    A matrix is a parameter of two or more dimensions in a group not marked ``matrix=False``. Rates are linked: AdamW
    runs at ``lr * vector_lr_ratio``, so one learning rate, one schedule and one search move both. State is kept in the
    parameter's dtype, as torch.optim does.
    """

    matrix_method = True  # wants groups(model) where there is a model to split

    def __init__(self, params: Any, defaults: Group) -> None:
        super().__init__(params, {"matrix": True, "transposed": False, **defaults})

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _check(self, group: Group) -> None:
        """Raise BadInput for a setting out of range; a subclass adds its own."""
        who = type(self).__name__
        for name in ("lr", "weight_decay", "vector_lr_ratio", "vector_weight_decay"):
            in_range(who, name, group[name], 0)
        in_range(who, "momentum", group["momentum"], 0, 1)
        if not (isinstance(group["betas"], (tuple, list)) and len(group["betas"]) == 2):
            raise BadInput(f"{who} needs two numbers for betas, got {group['betas']!r}")
        for beta in group["betas"]:
            in_range(who, "betas", beta, 0, 1)
        in_range(who, "vector_eps", group["vector_eps"], 0)

    def _direction(self, update: Tensor, state: dict[str, Any], group: Group) -> Tensor:
        """A new tensor laid out like `update` (the Nesterov momentum), times lr what the weight moves by, downhill."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every parameter that has a gradient. closure: re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = with_gradient(group["params"], type(self).__name__)
            for W in (p for p in moved if group["matrix"] and p.ndim >= 2):
                self._move_matrix(W, group)
            self._move_rest([p for p in moved if not group["matrix"] or p.ndim < 2], group)
        return loss

    def _move_matrix(self, W: Tensor, group: Group) -> None:
        G, state, lr, beta = W.grad, self.state[W], group["lr"], group["momentum"]
        assert G is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(W)
        M = state["momentum_buffer"]
        M.lerp_(G, 1 - beta)  # M <- b M + (1 - b) G
        U = G.lerp(M, beta)  # Nesterov: b M + (1 - b) G, leaving the gradient as it is
        W.mul_(1 - lr * group["weight_decay"])
        W.sub_(self._direction(U, state, group).mul_(lr))

    def _move_rest(self, params: list[Tensor], group: Group) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p].update(step=torch.tensor(0.0), **zeros)
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] * group["vector_lr_ratio"],
            weight_decay=group["vector_weight_decay"],
            eps=group["vector_eps"],
            maximize=False,
        )


def on_matrix(f: Callable[[Tensor], Tensor], update: Tensor, transposed: bool = False) -> Tensor:
    """Apply `f` to an update seen as one whole (out, rest) matrix; the result is laid out and sharded like `update`.

    A DTensor (FSDP2, tensor parallel) is gathered, every rank computes the same, and each keeps its own part.
    """
    sharded = is_sharded(update)
    whole = update.full_tensor() if sharded else update  # type: ignore[attr-defined]
    standard = whole.transpose(0, 1) if transposed else whole
    new = f(standard.flatten(1)).reshape(standard.shape)
    new = new.transpose(0, 1) if transposed else new
    if not sharded:
        return new
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = update.device_mesh, update.placements  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(new.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor (told by its face: importing torch.distributed costs time and may not be built in)."""
    return hasattr(x, "full_tensor")


def with_gradient(params: list[Tensor], who: str) -> list[Tensor]:
    """Those of `params` that have a gradient, checked to be dense and real."""
    moved = [p for p in params if p.grad is not None]
    for p in moved:
        assert p.grad is not None
        if p.grad.is_sparse:
            raise BadInput(
                f"{who} needs dense gradients, got a sparse one for a parameter of shape {tuple(p.shape)}; "
                "build its embedding with sparse=False"
            )
        if p.is_complex():
            raise BadInput(
                f"{who} needs real parameters, got a complex one of shape {tuple(p.shape)}; hold its view_as_real"
            )
    return moved


def in_range(who: str, name: str, value: Any, low: float, below: float = math.inf, *, open_low: bool = False) -> None:
    """BadInput unless low <= value < below (low < value with `open_low`); a one-element tensor counts as its number."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{who} needs a number for {name}, got {value!r}") from None
    if not (low <= number < below) or (open_low and number == low):
        least = f"above {low:g}" if open_low else f"of at least {low:g}"
        most = " and below 1" if below == 1 else ", finite"
        raise BadInput(f"{who} needs {name} {least}{most}, got {number:g}")


def whole_number(who: str, name: str, value: Any) -> None:
    """BadInput unless `value` is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInput(f"{who} needs a whole number of at least 1 for {name}, got {value!r}")

"""Several optimizers as one, for loops that take one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Chained(torch.optim.Optimizer):
    """Steps several optimizers as one; its parameter groups are theirs, so that a scheduler moves all their rates.

    >>> w, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    >>> both = Chained([torch.optim.SGD([w], lr=0.1), torch.optim.SGD([b], lr=0.2)])
    >>> [g["lr"] for g in both.param_groups]
    [0.1, 0.2]
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        groups: list[dict[str, Any]] = [g for o in self.optimizers for g in o.param_groups]
        super().__init__([p for g in groups for p in g["params"]], {})
        self.param_groups = groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each; a closure is evaluated once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for o in self.optimizers:
            o.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for o in self.optimizers:
            o.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [o.state_dict() for o in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for o, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            o.load_state_dict(state)
        self.param_groups = [g for o in self.optimizers for g in o.param_groups]  # theirs are new ones now

"""The loss barrier: how much worse the networks between two networks are than the two themselves."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pondera.errors import BadInput, describe, nearest, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHO = "barrier"
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Barrier:
    """The loss on the way from one network to another.

    Attributes:
        lambdas: share of the second network, 0 to 1.
        losses: the loss at each.
        above: by how much each exceeds the line between the two ends.
    """

    lambdas: Float[Tensor, "points"]
    losses: Float[Tensor, "points"]
    above: Float[Tensor, "points"]

    @property
    def value(self) -> float:
        """The barrier, the largest of `above`; never below 0, for the ends lie on the line."""
        return float(self.above.max())

    def summary(self) -> str:
        """The finding in plain words."""
        at = float(self.lambdas[self.above.argmax()])
        ends = f"the ends have {self.losses[0]:.4g} and {self.losses[-1]:.4g}"
        if self.value == 0:
            return (
                f"No barrier: at none of {len(self.lambdas)} points the loss exceeds the line between the ends; {ends}."
            )
        return f"The barrier is {self.value:.4g}, at {at:.2f} of the way; {ends}."

    def plot(self) -> "Figure":
        """The losses and the line between the ends (a matplotlib figure)."""
        require_extra("Barrier.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(5, 3.4), layout="constrained")
        ax = fig.subplots()
        ax.plot(self.lambdas, self.losses, "o-", ms=3)
        ax.plot(self.lambdas, self.losses - self.above, "--", color="0.5", lw=1)
        ax.set(xlabel="share of the second network", ylabel="loss", title=f"barrier {self.value:.3g}")
        return fig


@torch.no_grad()
def barrier(
    model: nn.Module,
    state_a: nn.Module | State,
    state_b: nn.Module | State,
    evaluate: Callable[[nn.Module], float | Tensor],
    *,
    points: int = 25,
    reset_norms: Iterable[Any] | None = None,
) -> Barrier:
    r"""Measure the loss along the straight line between two networks.

    .. math:: B = \max_\lambda \; L\bigl((1-\lambda)\theta_a + \lambda\theta_b\bigr)
                  - \bigl((1-\lambda) L(\theta_a) + \lambda L(\theta_b)\bigr)

    Between two networks the activations of most layers have less variance than at the ends. Running statistics of batch
    norm, interpolated, do not know of it: with `reset_norms` they are estimated anew at every point, the ends included.

    Args:
        model: a module of the architecture; a copy of it, in eval mode, takes the weights.
        state_a, state_b: the two networks, modules or state dicts. Entries that are no floating-point numbers are a's.
        evaluate: ``evaluate(model)``, the loss, lower is better; without gradients.
        points: how many, spread evenly, the ends included.
        reset_norms: batches as `reset_norms_` takes them, gone through at every point (a list or a DataLoader, no
            generator).
    Returns: a `Barrier`.
    Raises: BadInput: if names or shapes differ or do not fit the model, `points` is below 3, `evaluate` gives no number or
        NaN or an infinite loss at an end.
    Paper: Frankle et al. 2020 and Entezari et al. 2022 in the form of Ainsworth et al. 2023, arXiv 2209.04836 (25 points);
        the statistics as in REPAIR, Jordan et al. 2023, arXiv 2211.08403.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> a, b = {"weight": torch.tensor([[-1.0]])}, {"weight": torch.tensor([[1.0]])}
    >>> found = barrier(net, a, b, lambda m: 1 - m.weight.square().sum(), points=5)
    >>> found.losses.tolist(), found.value
    ([0.0, 0.75, 1.0, 0.75, 0.0], 1.0)
    """
    if points < 3:
        raise BadInput(f"{WHO} needs at least 3 points, the ends and one between, got {points}")
    work = deepcopy(model).eval()
    into = _named(work)
    a, b = _named(state_a), _named(state_b)
    for what, state in (("the first network", a), ("the second network", b)):
        for name in (*into, *state):
            if name not in state or name not in into:
                there, known = ("lacks", state) if name not in state else ("has", into)
                raise BadInput(f"{what} {there} {name}, unlike the model{nearest(name, known)}")
            if state[name].shape != into[name].shape or state[name].is_meta:
                raise BadInput(f"{WHO} needs a {describe(into[name])} for {name}, got a {describe(state[name])}")
    batches = None if reset_norms is None else list(reset_norms)
    lambdas = torch.linspace(0, 1, points, dtype=torch.float64)
    losses = []
    for share in lambdas.tolist():
        for name, x in into.items():
            x.copy_(_between(a[name].to(x.device), b[name].to(x.device), share))
        if batches is not None:
            reset_norms_(work, batches)
        losses.append(_number(evaluate(work), share))
    measured = torch.tensor(losses, dtype=torch.float64)
    line = (1 - lambdas) * measured[0] + lambdas * measured[-1]
    above = measured - line
    above[0] = above[-1] = 0.0
    return Barrier(lambdas, measured, above)


@torch.no_grad()
def reset_norms_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Estimate the running statistics of a model's norm layers anew, in place, as the mean over some batches.

    All else stays: weights, the layers' momentum and modes. A network merged from several needs this, for its activations
    have other statistics than those of the networks it comes from, and no mean of these.

    Args:
        model: a module; without running statistics nothing happens.
        batches: what forward takes: tensors, mappings (by keyword), or tuples and lists, of which the first entry counts
            (as a DataLoader of inputs and targets gives them). The larger, the better.
    Returns: `model`.
    Raises: BadInput: if there is no batch.
    Paper: Jordan et al. 2023, arXiv 2211.08403.

    >>> norm = nn.BatchNorm1d(1)
    >>> reset_norms_(norm, [torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [4.0]])]).running_mean
    tensor([2.5000])
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        return model
    modes, momenta, n = [(m, m.training) for m in model.modules()], [m.momentum for m in norms], 0
    try:
        model.eval()
        for m in norms:
            m.reset_running_stats()
            m.momentum, m.training = None, True  # a plain mean over the batches
        for batch in batches:
            n += 1
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(**x) if isinstance(x, Mapping) else model(x)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for module, training in modes:
            module.training = training
    if not n:
        raise BadInput("reset_norms_ needs at least one batch to estimate running statistics from, got none")
    return model


def _between(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b; halves are added in float32."""
    if not a.is_floating_point():
        return a
    work = torch.promote_types(a.dtype, torch.float32)
    return torch.lerp(a.to(work), b.to(work), share)


def _named(x: nn.Module | State) -> dict[str, Tensor]:
    if isinstance(x, nn.Module):
        x = x.state_dict()
    if not isinstance(x, Mapping) or not all(isinstance(t, Tensor) for t in x.values()):
        raise BadInput(f"{WHO} needs modules or state dicts of tensors, got {type(x).__name__}")
    return {name: t.detach() for name, t in x.items()}


def _number(value: Any, share: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise BadInput(f"{WHO} needs a number from evaluate, got {type(value).__name__}") from None
    if number != number or (share in (0, 1) and not isfinite(number)):
        raise BadInput(f"{WHO} got a loss of {number} at {share:g} of the way; there is nothing to compare with")
    return number

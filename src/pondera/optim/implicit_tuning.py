"""Implicit tuning: the gradient of the validation loss by hyperparameters, through the weights that training ends at."""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pondera.errors import BadInput, describe

Loss = Tensor | Callable[[], Tensor]
WHO = "implicit_hypergradient"


@dataclass(frozen=True)
class Hypergradient:
    """The gradient by the hyperparameters, and how far it is to be trusted.

    Attributes:
        grads: of each hyperparameter tensor, of its shape; ``hyper.grad = grads[0]`` feeds any optimizer.
        residual: ||(H + damping) q - g|| / ||g|| of the inverse-Hessian product q: 0 where it is exact, above 1 where
            the series diverges.
        stationarity: norm of the training gradient over that of the weights. The theorem is about 0.
        alpha: the factor a of the series. largest: the Hessian's largest eigenvalue in size, where it was estimated.
        steps: J, Hessian-vector products of the series.
    """

    grads: tuple[Tensor, ...]
    residual: float
    stationarity: float
    alpha: float
    largest: float | None
    steps: int

    @property
    def diverged(self) -> bool:
        """Whether the series made matters worse than no term at all."""
        return not self.residual <= 1

    def summary(self) -> str:
        """The finding in plain words."""
        size = math.sqrt(sum(float(g.double().square().sum()) for g in self.grads))
        trust = (
            "The series diverges: the Hessian has negative or too large eigenvalues, so give damping, a smaller alpha or fewer steps."
            if self.diverged
            else f"{self.residual:.2g} of the validation gradient is left unsolved after {self.steps} products."
        )
        return (
            f"Hypergradient of norm {size:.3g} (a = {self.alpha:.3g}). {trust} The training gradient is {self.stationarity:.2g} of "
            "the weights' norm; the result is that of a minimum, so train on where this is not small."
        )


def implicit_hypergradient(
    train_loss: Loss,
    val_loss: Loss,
    weights: nn.Module | Iterable[Tensor],
    hyper: Tensor | Iterable[Tensor],
    *,
    steps: int = 20,
    alpha: float | None = None,
    damping: float = 0.0,
    power_steps: int = 10,
    generator: torch.Generator | None = None,
) -> Hypergradient:
    r"""The gradient of the validation loss by hyperparameters at trained weights, by the implicit function theorem.

    With w*(lambda) = argmin_w L_T(w, lambda), H = d^2 L_T / dw dw and g = dL_V / dw,

    .. math:: \frac{d L_V(w^*(\lambda), \lambda)}{d\lambda} = \frac{\partial L_V}{\partial \lambda}
              - g^T H^{-1} \frac{\partial^2 L_T}{\partial w\, \partial \lambda}, \qquad
              H^{-1} g \approx a \sum_{j=0}^{J} (I - a H)^j g                                       (Alg. 2 and 3)

    The sum with J products equals the derivative through J + 1 steps of gradient descent of rate a that start at the
    optimum. It needs the memory of one graph of L_T whatever J is, for as many hyperparameters as there are, such as
    one decay a weight.

    The hyperparameters must act in `train_loss`: write decay into it (``(decay.exp() * w.square()).sum() / 2``), for
    what an optimizer decays, L_T does not know. Both losses are computed once, so that every product sees the same
    batch and the same dropout; use eval mode for batch norm. Set the result as `.grad` and step any optimizer, with
    some steps of training between. Many hyperparameters overfit the validation set: keep a third one.

    Args:
        train_loss: L_T, a scalar with its graph, or a function that computes it.
        val_loss: L_V, likewise.
        weights: the model, or the weights that training moves.
        hyper: one tensor or several that require a gradient.
        steps: J, Hessian-vector products of the series (20: the paper's settings are 3 to 20, recalled). 0 puts a
            multiple of the identity in the place of H^-1.
        alpha: a, below 2 over the largest eigenvalue of H. The learning rate of Adam or momentum is not such a number.
            None: one over the largest eigenvalue, by power iteration (ours; the paper takes the inner learning rate,
            recalled).
        damping: added to H, against small and negative eigenvalues (0: paper).
        power_steps: products of that estimate (10: ours).
        generator: of its random start.
    Returns: a `Hypergradient`. It warns where the series diverges.
    Raises: BadInput: for a loss that is no finite scalar or bears no graph of the weights; if the training gradient
        does not depend on the hyperparameters, or not on the weights; for settings out of range; where nothing requires
        a gradient.
    Paper: Lorraine, Vicol and Duvenaud 2020, arXiv 1911.02590. The factor a is part of the sum, as in the
        reimplementations looked at (moskomule/hypergrad, betty); without it the series is that of a = 1. The authors'
        code was not found.

    >>> w, decay = torch.tensor([3.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    >>> found = implicit_hypergradient(((w - decay) ** 2).sum() / 2, (w**2).sum(), [w], decay, steps=0)
    >>> found.grads[0].item(), found.residual
    (6.0, 0.0)
    """
    params = _tensors("weights", weights.parameters() if isinstance(weights, nn.Module) else weights)
    hypers = _tensors("hyper", [hyper] if isinstance(hyper, Tensor) else hyper)
    for name, value, least in (("steps", steps, 0), ("power_steps", power_steps, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise BadInput(f"{WHO} needs a whole number of at least {least} for {name}, got {value!r}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise BadInput(f"{WHO} needs a positive, finite alpha, got {alpha!r}")
    if not 0 <= damping < math.inf:
        raise BadInput(f"{WHO} needs a damping of at least 0, finite, got {damping!r}")
    L_T, L_V = _scalar("train_loss", train_loss), _scalar("val_loss", val_loss)

    found = torch.autograd.grad(L_V, [*params, *hypers], allow_unused=True, retain_graph=True)
    g, direct = list(found[: len(params)]), found[len(params) :]
    if all(t is None for t in g):
        raise BadInput(f"{WHO} needs a val_loss that depends on the weights, and this one depends on none of them")
    g = [torch.zeros_like(p) if t is None else t for p, t in zip(params, g, strict=True)]
    grads = torch.autograd.grad(L_T, params, create_graph=True, allow_unused=True)
    moved = [(p, t) for p, t in zip(params, grads, strict=True) if t is not None and t.requires_grad]
    if not moved:
        raise BadInput(
            f"{WHO} needs a train_loss that is curved in the weights; the gradient of this one does not depend on them"
        )
    inner = [t for _, t in moved]

    def times_h(v: list[Tensor]) -> list[Tensor]:
        among = [one for one, t in zip(v, grads, strict=True) if t is not None and t.requires_grad]
        hv = torch.autograd.grad(inner, params, among, retain_graph=True, allow_unused=True)
        return [damping * x if h is None else h + damping * x for h, x in zip(hv, v, strict=True)]

    largest = None
    if alpha is None:
        largest = _largest(times_h, params, power_steps, generator)
        if not largest > 0:
            raise BadInput(f"{WHO} found no curvature of train_loss ({largest:g}); give alpha, or damping")
        alpha = 1 / largest
    v, p = g, [t.clone() for t in g]
    for _ in range(steps):
        v = [x - alpha * h for x, h in zip(v, times_h(v), strict=True)]
        torch._foreach_add_(p, v)
    q = [alpha * x for x in p]
    left = [h - x for h, x in zip(times_h(q), g, strict=True)]  # what solving H q = g leaves
    among = [one for one, t in zip(q, grads, strict=True) if t is not None and t.requires_grad]
    mixed = torch.autograd.grad(inner, hypers, among, allow_unused=True)
    if all(t is None for t in mixed):
        raise BadInput(
            f"{WHO} needs hyperparameters that act on the gradient of train_loss, and none of these does (the decay of an "
            "optimizer is not in the loss)"
        )
    zeros = [torch.zeros_like(h) for h in hypers]
    result = tuple(
        (z if d is None else d) - (z if m is None else m) for z, d, m in zip(zeros, direct, mixed, strict=True)
    )
    size = _norm(g)
    report = Hypergradient(
        grads=tuple(t.detach() for t in result),
        residual=_norm(left) / size if size else 0.0,
        stationarity=_norm([t for t in grads if t is not None]) / (_norm(params) or 1.0),
        alpha=float(alpha),
        largest=largest,
        steps=steps,
    )
    if report.diverged:
        warnings.warn(
            f"{WHO}: the series diverges, {report.residual:.2g} of the validation gradient is left after {steps} products with "
            f"alpha {alpha:.2g}; give damping, a smaller alpha or fewer steps",
            stacklevel=2,
        )
    return report


def _largest(
    times_h: Callable[[list[Tensor]], list[Tensor]],
    params: list[Tensor],
    n: int,
    generator: torch.Generator | None,
) -> float:
    """The eigenvalue of H that is largest in size, by power iteration: the norm of H v for a unit v."""
    device = generator.device if generator is not None else params[0].device
    v = [torch.randn(p.shape, generator=generator, device=device).to(p) for p in params]
    size = torch.stack([x.float().norm() for x in v]).norm()
    for _ in range(n):
        v = times_h([x / size.to(x) for x in v])
        size = torch.stack([x.float().norm() if x.dtype != torch.float64 else x.norm().float() for x in v]).norm()
        size = size.clamp_min(torch.finfo(torch.float32).tiny)
    found = float(size)
    return found if found > 1e-30 else 0.0


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def _tensors(name: str, given: Iterable[Tensor]) -> list[Tensor]:
    found = list(given)
    for t in found:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            raise BadInput(f"{WHO} needs floating-point tensors for {name}, got {_shown(t)}")
    kept = [t for t in found if t.requires_grad]
    if not kept or (name == "hyper" and len(kept) < len(found)):
        raise BadInput(
            f"{WHO} needs {name} that require a gradient, and {len(found) - len(kept)} of {len(found)} do not"
        )
    return kept


def _scalar(name: str, loss: Loss) -> Tensor:
    value = loss() if callable(loss) else loss
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise BadInput(f"{WHO} needs a scalar for {name}, got {_shown(value)}")
    if not value.requires_grad:
        raise BadInput(f"{WHO} needs a {name} with its graph, got one that requires no gradient")
    number = float(value.detach())
    if not math.isfinite(number):
        raise BadInput(f"{WHO} needs a finite {name}, got {number:g}")
    return value.squeeze()


def _shown(value: object) -> str:
    return describe(value) if isinstance(value, Tensor) else repr(value)

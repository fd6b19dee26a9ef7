"""Activation variance: a start whose scale is fitted to the activation through its value and slope at 0."""

from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._activations import Activation, activation, activation_of, derivative
from pondera._weights import start_each
from pondera.errors import BadInput, describe

Target = TypeVar("Target", Tensor, nn.Module)
H = 1e-6  # step of the one-sided slopes: rounding 1e-10, curvature cancelled
TOLERANCE = 1e-6  # slopes that differ by more, relative to the largest, are different


def activation_variance_(
    target: Target,
    *,
    nonlinearity: str | Activation | None = None,
    distribution: Literal["normal", "uniform"] = "normal",
    slope: float | None = None,
    generator: Generator | None = None,
) -> Target:
    r"""Draw a weight, or every owned weight of a module, with the variance the activation asks for, in place.

    .. math:: W_{ij} \sim N(0, v) \text{ or } U(-\sqrt{3 v}, \sqrt{3 v}), \qquad
              v = \frac{1}{N \, g'(0)^2 \, (1 + g(0)^2)}, \qquad v = \frac{2}{N} \text{ for ReLU}

    with g the activation and N the fan-in, in / groups times the kernel's taps. See `activation_variance` for where it
    comes from and where it fails. Every layer gets the same rule, the last one included; biases become 0; norm layers
    and embeddings stay.

    Args:
        target: a weight (out, in / groups, *kernel), or a module with linear, convolution or attention layers.
        nonlinearity: the activation, by name or as an elementwise callable. None: the one kind of activation module
            found in the model; a tensor does not say which, so there it is needed.
        distribution: "normal" or "uniform"; the theory only sees the variance.
        slope: g'(0), in place of the derivative taken by autograd; for activations with a kink at 0.
        generator: source of the draw, on the weight's device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: as `activation_variance`; if the activation is not given and not clear from the model; for another
        distribution, fewer than two dimensions, no entries, an integer or meta tensor, no owned weight.
    Paper: Kumar 2017, arXiv 1704.08863.

    >>> w = activation_variance_(
    ...     torch.empty(500, 400), nonlinearity="sigmoid", generator=torch.Generator().manual_seed(0)
    ... )
    >>> round(400 * w.var().item(), 1)
    12.8
    """
    who = "activation_variance_"
    if distribution not in ("normal", "uniform"):
        raise BadInput(f"{who} knows the distributions 'normal' and 'uniform', got {distribution!r}")
    if nonlinearity is None:
        if not isinstance(target, nn.Module):
            kind = type(target).__name__
            raise BadInput(f"{who} got a {kind}, which does not say which activation follows it; pass nonlinearity=")
        nonlinearity = activation_of(target, who)
    n_v = activation_variance(nonlinearity, slope=slope)

    def fill(w: Float[Tensor, "out fan_in *kernel"]) -> None:
        std = (n_v / w[0].numel()) ** 0.5
        if distribution == "normal":
            w.normal_(0.0, std, generator=generator)
        else:
            w.uniform_(-(3**0.5) * std, 3**0.5 * std, generator=generator)

    return start_each(target, fill, who=who)


def activation_variance(nonlinearity: str | Activation, *, slope: float | None = None) -> float:
    r"""N v, the fan-in times the variance of the weights that an activation asks for.

    With y = W x, x' = g(y), weights independent of mean 0 and variance v, and g replaced by its tangent at 0 (derived):

    .. math:: \mathrm{E} x' = g(0), \quad \mathrm{Var}\, x' = g'(0)^2 \, \mathrm{Var}\, y, \quad
              \mathrm{Var}\, y = N v \, (\mathrm{Var}\, x + g(0)^2)

    and asking for Var x' = Var x = 1 gives N v = 1 / (g'(0)^2 (1 + g(0)^2)). ReLU has no tangent at 0; it halves the
    second moment of a symmetric y, so N v = 2.

    The tangent is not the function: bounded activations cannot hold variance 1, convex ones (softplus, SiLU) exceed
    their tangent and explode with depth, and where g(0) is not 0 what stays constant is the variance over units, while
    different inputs become alike. The replication shows how far each goes.

    Args:
        nonlinearity: a name or an elementwise callable on float64 tensors. Anything equal to ReLU on [-3, 3] counts as
            ReLU. The derivative comes from autograd and is checked against the slopes on both sides of 0.
        slope: g'(0) to use instead, with no such check and no rule for ReLU.
    Returns: N v, a number above 0.
    Raises: BadInput: if the activation is unknown, not elementwise, not finite at 0, has no derivative there (the
        slopes of SELU and leaky ReLU differ from left to right, and autograd silently takes one) or a zero one; for a
        `slope` that is 0 or not finite.
    Paper: Kumar 2017, arXiv 1704.08863.

    >>> [round(activation_variance(g), 2) for g in ("tanh", "sigmoid", "softplus", "silu", "relu")]
    [1.0, 12.8, 2.7, 4.0, 2.0]
    >>> round(activation_variance("selu", slope=1.0507), 2)
    0.91
    """
    who = "activation_variance"
    g = activation(nonlinearity, who)
    name = nonlinearity if isinstance(nonlinearity, str) else getattr(g, "__name__", None) or repr(g)
    at = torch.tensor([0.0, H, H / 2, -H, -H / 2], dtype=torch.float64)
    y = _evaluate(g, at, name)
    if slope is None:
        x = torch.linspace(-3.0, 3.0, 61, dtype=torch.float64)
        if torch.equal(_evaluate(g, x, name), x.clamp(min=0.0)):
            return 2.0
        slope = _slope(g, at, y, name)
    if slope == 0 or not abs(slope) < torch.inf:
        raise BadInput(f"{who} divides by the activation's slope at 0, which is {slope:g} for {name}")
    return 1.0 / (slope**2 * (1.0 + y[0].item() ** 2))


def _slope(g: Activation, at: Float[Tensor, "5"], y: Float[Tensor, "5"], name: str) -> float:
    """g'(0) by autograd, if the slopes on both sides agree with it."""
    try:
        by_autograd = derivative(lambda x: g(x.clone()), at[:1]).item()
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise BadInput(f"activation_variance cannot differentiate {name} by autograd ({why}); pass slope=") from error
    right, half_right, left, half_left = ((y[1:] - y[0]) / at[1:]).tolist()
    right, left = 2 * half_right - right, 2 * half_left - left  # extrapolated to step 0
    if not max(abs(right - by_autograd), abs(left - by_autograd)) <= TOLERANCE * max(1.0, abs(right), abs(left)):
        raise BadInput(
            f"activation_variance needs an activation differentiable at 0 (or ReLU), and {name} has slope {left:.4g} "
            f"on the left, {right:.4g} on the right and {by_autograd:.4g} by autograd; pass the one meant as slope="
        )
    return by_autograd


@torch.no_grad()
def _evaluate(g: Activation, x: Float[Tensor, "n"], name: str) -> Float[Tensor, "n"]:
    try:
        y = g(x.clone())
    except (RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise BadInput(f"activation_variance could not apply {name} to a float64 tensor: {why}") from error
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        got = describe(y) if isinstance(y, Tensor) else type(y).__name__
        raise BadInput(f"activation_variance needs an elementwise activation; {name} made {got} of a {describe(x)}")
    if not y.isfinite().all():
        wild = y[~y.isfinite()][0].item()
        raise BadInput(f"activation_variance needs an activation finite near 0, and {name} gives {wild:g} there")
    return y

"""Orthogonal weights at the critical gain: signals whose spread over draws does not grow with depth."""

import math
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from pondera._activations import Activation, activation_of
from pondera._weights import require_owned, start_each
from pondera.errors import BadInput
from pondera.init._meanfield import critical_point, elementwise
from pondera.linalg import haar

Target = TypeVar("Target", Tensor, nn.Module)


def critical_gain(nonlinearity: str | Activation) -> float:
    r"""The scale sqrt(C_W) of a layer's weights at which neither signals nor gradients grow or die exponentially.

    .. math::
        C_W \, E[\phi'(\sqrt K Z)^2] = 1, \qquad K = C_b + C_W \, E[\phi(\sqrt K Z)^2], \qquad Z \sim N(0, 1)

    Weights then have variance C_W / fan_in a unit, whether Gaussian or orthogonal: to leading order in 1/width the law
    is the same. With slopes a and b on both sides of 0, ReLU-like activations have C_b = 0, any K and
    C_W = 2 / (a^2 + b^2); so have tanh, sin, erf, ELU and SELU, but K = 0. In general the smallest C_b is taken at
    which K does not repel: GELU, SiLU, Mish and Hardswish need C_b > 0.

    Args: nonlinearity: name ("tanh", "gelu", ...) or elementwise function of a float64 tensor.
    Returns: sqrt(C_W).
    Raises: BadInput: for an unknown name, a function that is not elementwise and finite, or one without a critical
        point (Softplus).
    Paper: Day, Kahn and Roberts 2023, arXiv 2310.07765, for tanh. The critical points of SiLU and GELU are those of
        Roberts, Yaida and Hanin 2022, arXiv 2106.10165; the rule that covers all of them is derived.

    >>> [round(critical_gain(name) ** 2, 6) for name in ("tanh", "relu", "silu")]
    [1.0, 2.0, 1.988005]
    """
    return critical_point(elementwise(nonlinearity, "critical_gain"), "critical_gain").sigma_w


@torch.no_grad()
def orthogonal_(
    target: Target,
    *,
    nonlinearity: str | Activation | None = None,
    gain: float | None = None,
    delta: bool = False,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight of a module, as a scaled Haar orthogonal matrix, in place.

    .. math:: W = \sqrt{C_W} \, \sqrt{\max(1, m/n)} \; Q, \qquad Q \in R^{m \times n} \text{ Haar}

    for m outputs and n inputs: Q has orthonormal columns (m >= n) or rows. The second factor, derived, keeps the
    variance of each unit, C_W \|x\|^2 / n, at that of a Gaussian start; torch.nn.init.orthogonal_ lets it fall by n/m
    in growing layers. In tanh nets of equal widths the mean square of preactivations then varies from draw to draw by
    an amount of order 1/width that does not grow with depth, where Gaussian weights make it grow like depth/width.

    A convolution is orthogonal as its flattened matrix (n = inputs a group times kernel size), each group for itself.
    That is not an orthogonal operator on images; with `delta` it is: the centre tap holds the matrix, the others are 0.

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers (each projection
            is a matrix of its own).
        nonlinearity: name or elementwise function whose `critical_gain` is taken; None takes the one kind of activation
            module found in the module. A tensor does not say what follows it: give `nonlinearity` or `gain`.
        gain: sqrt(C_W) by hand; `nonlinearity` is then not looked at.
        delta: convolutions at their centre tap only (Xiao et al. 2018, arXiv 1806.05393); even kernels at size // 2.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`. Biases become 0; N(0, C_b) where the activation is critical only with C_b > 0 (GELU, SiLU, ...).
    Raises: BadInput: as `critical_gain`; for a gain that is not positive and finite; if neither gain nor activation is
        given or found; for a weight with fewer than two dimensions, no entries, integers or on the meta device; for a
        module without a weight to start.
    Paper: Day, Kahn and Roberts 2023, arXiv 2310.07765: equal widths, tanh, C_W = 1, biases 0. Rectangular weights,
        convolutions and other activations are ours; for ReLU the spread grows in orthogonal nets too.

    >>> w = orthogonal_(torch.empty(6, 3), nonlinearity="tanh", generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(w.T @ w, 2 * torch.eye(3), atol=1e-6)          # 6 outputs, 3 inputs: sqrt(2) times orthonormal
    True
    >>> net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    >>> w = orthogonal_(net)[2].weight
    >>> torch.allclose(w @ w.T, 2 * torch.eye(3), atol=1e-6)
    True
    """
    who = "orthogonal_"
    bias_std = 0.0
    if gain is None:
        if nonlinearity is None:
            if isinstance(target, Tensor):
                raise BadInput(f"{who} needs nonlinearity= or gain= for a tensor, which does not say what follows it")
            require_owned(target, who)
            nonlinearity = activation_of(target, who)
        point = critical_point(elementwise(nonlinearity, who), who)
        gain, bias_std = point.sigma_w, point.sigma_b
    if not (gain > 0 and math.isfinite(gain)):
        raise BadInput(f"{who} needs a finite gain above 0, got {gain}")

    def fill(w: Tensor) -> None:
        at = w.zero_()[(..., *(k // 2 for k in w.shape[2:]))] if delta else w
        m, n = len(at), at[0].numel()
        q = haar(m, n, generator=generator, dtype=w.dtype, device=w.device)
        at.copy_((gain * max(1.0, m / n) ** 0.5 * q).view_as(at))

    if isinstance(target, Tensor):
        return start_each(target, fill, who=who)
    for one in require_owned(target, who):
        new = torch.empty_like(one.read())
        for group in new.chunk(one.groups):
            start_each(group, fill, who=who)
        one.write(new)
        one.fill_bias(std=bias_std, generator=generator)
    return target

"""Edge of chaos: weight and bias variances at which a wide random net neither merges its inputs nor scatters them."""

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from pondera._activations import Activation, activation_of
from pondera._weights import require_owned, start_each
from pondera.errors import BadInput
from pondera.init._meanfield import EdgePoint, critical_point, edge_point, elementwise, is_homogeneous, mean_square
from pondera.linalg import gaussian_pair_mean

Target = TypeVar("Target", Tensor, nn.Module)
Map = Callable[[float | Tensor], Tensor]
SIGMA_B = 0.05


def edge_of_chaos(nonlinearity: str | Activation, *, sigma_b: float | None = None) -> EdgePoint:
    r"""The point of an activation's edge of chaos with a given scale of biases.

    .. math::
        q = \sigma_b^2 + \sigma_w^2 \, E[\phi(\sqrt q Z)^2], \qquad
        \chi_1 = \sigma_w^2 \, E[\phi'(\sqrt q Z)^2] = 1, \qquad Z \sim N(0, 1)

    With chi_1 below 1 (ordered phase) the correlation of any two inputs goes to 1 exponentially in depth and gradients
    vanish; above 1 (chaotic phase) near inputs part and gradients explode. On the edge both change only like a power of
    depth: for smooth phi 1 - c_l ~ beta_q / l with beta_q = 2 E[phi'^2] / (q E[phi''^2]) (Prop. 3), for ReLU like
    9 pi^2 / (2 l^2). beta_q grows as sigma_b falls, so a small sigma_b keeps inputs apart longest.

    Solved in float64 to about 1e-12. Kinks at zero (ReLU, ELU) cost nothing; with kinks elsewhere (hardtanh, ReLU6)
    sigma_w is right to about 1%.

    Args:
        nonlinearity: name ("tanh", "elu", "gelu", ...) or elementwise function of a float64 tensor.
        sigma_b: standard deviation of the biases, 0 or more. None (ours; the paper treats the whole curve): 0.05; 0 for
            ReLU-like activations, whose edge is one point; the smallest with an attracting q where 0.05 has none (0.42
            for GELU, 0.75 for SiLU).
    Returns: `EdgePoint` with sigma_w, sigma_b, q and stability F'(q). chi_1 = 1 does not make q attracting: with GELU
        at sigma_b below 0.42 a variance started off q dies or diverges, so look at `stability`, and scale inputs to
        `input_mean_square`. With sigma_b = 0 tanh and its like give the limit sigma_w = 1 / \|phi'(0)\|, q = 0, which
        the variance approaches like 1/l.
    Raises: BadInput: for an unknown name, a function that is not elementwise and finite, a negative sigma_b, or where
        the edge has no such point (the sigma_b it has are named; Softplus has no edge).
    Paper: Hayou, Doucet and Rousseau 2019, arXiv 1902.06853. The curve's parametrisation by q and the rule for None are
        derived.

    >>> point = edge_of_chaos("tanh", sigma_b=0.2)
    >>> round(point.sigma_w, 6), round(point.q, 3), round(point.stability, 3)
    (1.304146, 0.512, 0.543)
    >>> round(edge_of_chaos("relu").sigma_w ** 2, 12)
    2.0
    """
    phi = elementwise(nonlinearity, "edge_of_chaos")
    if sigma_b is not None:
        if not (sigma_b >= 0 and math.isfinite(sigma_b)):
            raise BadInput(f"edge_of_chaos needs a finite sigma_b of at least 0, got {sigma_b}")
        return edge_point(phi, sigma_b, "edge_of_chaos")
    if not is_homogeneous(phi):
        try:
            point = edge_point(phi, SIGMA_B, "edge_of_chaos")
        except BadInput:
            pass
        else:
            if point.stability <= 1:
                return point
    return critical_point(phi, "edge_of_chaos")


def variance_map(nonlinearity: str | Activation, sigma_w: float, sigma_b: float) -> Map:
    r"""How the mean square of preactivations goes through one layer.

    .. math:: F(q) = \sigma_b^2 + \sigma_w^2 \, E[\phi(\sqrt q Z)^2]

    Args:
        nonlinearity: name or elementwise function of a float64 tensor.
        sigma_w, sigma_b: weights are N(0, sigma_w^2 / fan_in), biases N(0, sigma_b^2).
    Returns: the function F of q >= 0, a number or tensor of any shape; its value is float64 and shaped like q.
    Raises: BadInput: for an unknown name, scales that are negative or not finite; from F, for a q that is.
    Paper: Hayou, Doucet and Rousseau 2019, arXiv 1902.06853.

    >>> variance_map("relu", 2**0.5, 0.0)(3.0)
    tensor(3.0000, dtype=torch.float64)
    """
    phi = elementwise(nonlinearity, "variance_map")
    _check("variance_map", sigma_w=sigma_w, sigma_b=sigma_b)

    def f(q: float | Tensor) -> Tensor:
        q = torch.as_tensor(q, dtype=torch.float64)
        if not ((q >= 0) & torch.isfinite(q)).all():
            raise BadInput("a variance map needs finite q of at least 0, got one that is not")
        return sigma_b**2 + sigma_w**2 * mean_square(phi, q)

    return f


def correlation_map(nonlinearity: str | Activation, sigma_w: float, sigma_b: float, q: float) -> Map:
    r"""How the correlation of two inputs goes through one layer once both variances have settled at q.

    .. math:: f(c) = \frac{\sigma_b^2 + \sigma_w^2 E[\phi(\sqrt q Z_1) \phi(\sqrt q (c Z_1 + \sqrt{1 - c^2} Z_2))]}{q}

    f(1) = 1 and f'(1) = chi_1. Iterate it to see at what depth inputs become one.

    Args:
        nonlinearity: name or elementwise function of a float64 tensor.
        sigma_w, sigma_b, q: a fixed point of the variance map with q > 0, such as those of an `EdgePoint`.
    Returns: the function f of c in [-1, 1], a number or tensor of any shape; its value is float64, shaped like c and
        exact to about 1e-12.
    Raises: BadInput: for an unknown name, scales that are negative or not finite, q = 0; from f, for c outside [-1, 1].
    Paper: Hayou, Doucet and Rousseau 2019, arXiv 1902.06853.

    >>> f = correlation_map("relu", 2**0.5, 0.0, 1.0)
    >>> round(f(0.0).item() * torch.pi, 10)       # ReLU: f(0) = 1 / pi
    1.0
    """
    phi = elementwise(nonlinearity, "correlation_map")
    _check("correlation_map", sigma_w=sigma_w, sigma_b=sigma_b, q=q)
    if q == 0:
        raise BadInput("correlation_map needs q above 0: at q = 0 there is no signal to correlate")

    def f(c: float | Tensor) -> Tensor:
        c = torch.as_tensor(c, dtype=torch.float64)
        if not (c.abs() <= 1 + 1e-9).all():  # rounding may carry an iterate just past 1
            raise BadInput("a correlation map needs c between -1 and 1, got one that is not")
        return (sigma_b**2 + sigma_w**2 * gaussian_pair_mean(phi, c, q**0.5)) / q

    return f


@torch.no_grad()
def edge_of_chaos_(
    target: Target,
    *,
    nonlinearity: str | Activation | None = None,
    sigma_b: float | None = None,
    generator: Generator | None = None,
) -> Target:
    r"""Start a weight, or every owned weight and bias of a module, on the edge of chaos, in place.

    .. math:: W_{ij} \sim N(0, \sigma_w^2 / \mathrm{fan\_in}), \qquad b_i \sim N(0, \sigma_b^2)

    with the variances of `edge_of_chaos` and fan_in = inputs a group times kernel size. The first and the last layer
    are drawn like the others. The biases are part of the point: without them the variance dies out with depth. Norm
    layers and embeddings are not touched.

    Args:
        target: a weight (out, in, *kernel), or a module with linear, convolution or attention layers.
        nonlinearity: name or elementwise function; None takes the one kind of activation module found in the module. A
            tensor does not say what follows it, so there it must be given.
        sigma_b: as in `edge_of_chaos`. A `UserWarning` is given when its q repels.
        generator: source of the draw, on the weights' device; None takes torch's default one.
    Returns: `target`.
    Raises: BadInput: as `edge_of_chaos`; if the activation is not given and not to be found; for a weight with fewer
        than two dimensions, no entries, integers or on the meta device; for a module without a weight to start.
    Paper: Hayou, Doucet and Rousseau 2019, arXiv 1902.06853.

    >>> net = nn.Sequential(nn.Linear(500, 400), nn.Tanh(), nn.Linear(400, 10))
    >>> net = edge_of_chaos_(net, sigma_b=0.2, generator=torch.Generator().manual_seed(0))
    >>> round(net[0].weight.var().item() * 500, 2), round(net[0].bias.std().item(), 1)
    (1.7, 0.2)
    """
    who = "edge_of_chaos_"
    if nonlinearity is None:
        if isinstance(target, Tensor):
            raise BadInput(f"{who} needs nonlinearity= for a tensor, which does not say what activation follows it")
        require_owned(target, who)
        nonlinearity = activation_of(target, who)
    point = edge_of_chaos(nonlinearity, sigma_b=sigma_b)
    if point.stability > 1 + 1e-9:
        warnings.warn(
            f"{who} at sigma_b {point.sigma_b:g}: variance q = {point.q:.3g} repels (F'(q) = {point.stability:.3f}): "
            "deep in the net it dies or diverges; sigma_b=None takes a point that attracts",
            stacklevel=2,
        )

    def draw(w: Tensor) -> None:
        w.normal_(0, point.sigma_w / w[0].numel() ** 0.5, generator=generator)

    start_each(target, draw, who=who)
    if isinstance(target, nn.Module):
        for one in require_owned(target, who):
            one.fill_bias(std=point.sigma_b, generator=generator)
    return target


def _check(who: str, **scales: float) -> None:
    for name, value in scales.items():
        if not (value >= 0 and math.isfinite(value)):
            raise BadInput(f"{who} needs a finite {name} of at least 0, got {value}")

"""How complex is the function a network computes? Fourier, polynomial and compression measures on a grid of inputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera._weights import require_owned
from pondera.errors import BadInput, describe, require_extra, require_finite
from pondera.probe._untouched import require_model, run, scores, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDER = 12  # highest total degree of the polynomials fitted


@dataclass(frozen=True)
class FunctionComplexity:
    """How complex a network's function is on a square of inputs; every measure grows with complexity.

    Attributes:
        frequency: mean frequency of the Fourier coefficients, as a share of the highest (0: constant).
        order: mean degree of the Legendre coefficients, each weighted by its size (0 to 12).
        compression: phrases of a Lempel-Ziv parse of the outputs, cut at their median and read row by row, over those of
            as many fair coin tosses; 1 for noise.
        spectrum: share of the Fourier coefficients at each radius, from 1 on.
        values: the outputs on the grid.
    """

    frequency: Float[Tensor, ""]
    order: Float[Tensor, ""]
    compression: Float[Tensor, ""]
    spectrum: Float[Tensor, "radii"]
    values: Float[Tensor, "points points"]

    def summary(self) -> str:
        """The finding in plain words."""
        n = len(self.values)
        return (
            f"On a grid of {n} x {n} inputs the function has mean frequency {self.frequency:.3f} of the highest, mean "
            f"polynomial degree {self.order:.2f} and a Lempel-Ziv complexity of {self.compression:.2f} of a random "
            f"pattern's; outputs go from {self.values.min():.3g} to {self.values.max():.3g}."
        )

    def plot(self) -> "Figure":
        """The function on the grid, and its radial spectrum (a matplotlib figure)."""
        require_extra("FunctionComplexity.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(8.4, 3.6), layout="constrained")
        left, right = fig.subplots(1, 2)
        fig.colorbar(left.imshow(self.values.numpy(), origin="lower", cmap="gray"), ax=left)
        left.set(title="output on the grid", xticks=[], yticks=[])
        shown = self.spectrum > 0
        radii = torch.arange(1, 1 + len(self.spectrum))
        right.loglog(radii[shown], self.spectrum[shown], color="#4477aa")
        right.set(xlabel="frequency", ylabel="share", title=f"mean {self.frequency:.3f} of the highest")
        return fig


def function_complexity(
    model: nn.Module,
    features: int | Sequence[int] = 2,
    *,
    size: float = 1.0,
    points: int = 64,
    output: int = 0,
    seed: int = 0,
) -> FunctionComplexity:
    r"""Measure the complexity of the function that `model`, with the weights it has, computes on a square of inputs.

    The inputs are x = s a + t b for s, t on a grid over [-size, size]^2. With two features a and b are the axes; with
    more they are two random orthogonal directions of length sqrt(features / 2), so that entries have the size they have
    with two. On the grid

    .. math:: \frac{\sum_k |\tilde f(k)| \, |k|}{k_{max} \sum_k |\tilde f(k)|}, \qquad
              \frac{\sum_n |c_n| \, n}{\sum_n |c_n|}, \qquad \frac{c_{LZ}}{c_{LZ}(\text{coin tosses})}

    with f~ the discrete Fourier transform without its constant, |k| rounded; c_n Legendre coefficients by least squares,
    n the total degree up to 12; and c_LZ the phrases of a Lempel-Ziv (1978) parse of the cut outputs. All three ignore
    the function's offset and scale. The grid is not periodic: the jump at its edge gives even a linear function a mean
    frequency of 0.19 at 64 points (0.14 at 300). Compare at equal points.

    The model runs once on points^2 inputs, in eval mode without gradients, and is left as it was.

    Args:
        model: takes (N, features), or (N, *features) for a sequence of sizes.
        features: how many, or the shape of one input.
        size: half the side of the square (1 in the paper's figures).
        points: of the grid along each side, at least 16 (the authors: 300; 64 gives the same order of networks faster).
        output: which of the flattened outputs is the function.
        seed: of the two random directions.
    Returns: a `FunctionComplexity`.
    Raises: BadInput: for sizes that are not positive, an output that is not there, outputs that are not finite or do not
        fit, a model that cannot be run on such inputs, is on the meta device or has no shape yet.
    Paper: Teney, Nicolicioiu, Hartmann and Abbasnejad 2024, arXiv 2403.02241. The frequency is that of the authors' code
        (github.com/ArmandNM/neural-redshift), where it also ignores negative frequencies along the first axis; the
        Lempel-Ziv parse is theirs, which they use on token sequences. The polynomial measure and planes through inputs
        of more than two features are derived.

    >>> line = nn.Linear(2, 1)
    >>> found = function_complexity(line)
    >>> round(found.order.item(), 3)
    1.0
    """
    who = "function_complexity"
    require_model(model, who)
    shape = (features,) if isinstance(features, int) else tuple(features)
    total = math.prod(shape)
    if not shape or min(shape) < 1 or total < 2:
        raise BadInput(f"{who} needs at least two input features, got {features}")
    if points < 16 or not (0 < size < math.inf):
        raise BadInput(f"{who} needs at least 16 points a side and a size above 0, got {points} and {size}")
    x = _plane(total, points, seed) * size
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is not None:
        x = x.to(first)
    with untouched(model):
        out = scores(run(model, x.view(-1, *shape), who), who).flatten(1)
    if len(out) != points**2:
        raise BadInput(f"{who} needs an output an input, got a {describe(out)} for {points**2} inputs")
    if not -out.shape[1] <= output < out.shape[1]:
        raise BadInput(f"{who} was asked for output {output}, but the model has {out.shape[1]}")
    values = require_finite(out[:, output], who, "model's output").detach().cpu().double().view(points, points)
    return complexity_of(values)


def complexity_of(values: Float[Tensor, "points points"]) -> FunctionComplexity:
    """`function_complexity` of values that are there already, on a square grid."""
    frequency, spectrum = _fourier(values)
    return FunctionComplexity(frequency, _degree(values), _lempel_ziv(values), spectrum, values)


def random_weights_(model: nn.Module, amplitude: float, *, generator: Generator | None = None) -> nn.Module:
    """Draw every owned weight and bias of a model from U(-amplitude, amplitude), in place: the paper's random networks.

    Args:
        model: the model. amplitude: half the width of the interval, above 0. generator: source of the draw; None
            takes torch's default one.
    Returns: `model`.
    Raises: BadInput: for an amplitude that is not above 0, a model without a weight to draw.
    Paper: Teney, Nicolicioiu, Hartmann and Abbasnejad 2024, arXiv 2403.02241, as the authors' code draws them.

    >>> net = random_weights_(nn.Linear(100, 100), 3.0, generator=torch.Generator().manual_seed(0))
    >>> 2.9 < net.weight.max().item() < 3.0
    True
    """
    if not 0 < amplitude < math.inf:
        raise BadInput(f"random_weights_ needs an amplitude above 0, got {amplitude}")

    with torch.no_grad():
        for one in require_owned(model, "random_weights_"):
            new = torch.empty_like(one.read())
            new.uniform_(-amplitude, amplitude, generator=generator)
            one.write(new)
            if one.bias is not None:
                one.bias.uniform_(-amplitude, amplitude, generator=generator)
    return model


def _plane(features: int, points: int, seed: int) -> Float[Tensor, "points*points features"]:
    side = torch.linspace(-1, 1, points, dtype=torch.float64)
    s, t = (g.flatten().unsqueeze(1) for g in torch.meshgrid(side, side, indexing="ij"))
    if features == 2:
        return torch.cat([s, t], 1)
    directions = torch.randn(features, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a, b = (torch.linalg.qr(directions).Q * (features / 2) ** 0.5).T
    return s * a + t * b


def _fourier(values: Float[Tensor, "n n"]) -> tuple[Float[Tensor, ""], Float[Tensor, "radii"]]:
    """Mean frequency and radial spectrum of the upper half of rfft2's coefficients, as the authors' code sums them."""
    size = torch.fft.rfft2(values).abs()
    size = size[: len(size) // 2 + 1]
    size[0, 0] = 0
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size.shape)
    radius = (rows.unsqueeze(1).square() + columns.square()).sqrt().round().long()
    highest = round(math.hypot(len(rows) - 1, len(columns) - 1))
    radial = torch.zeros(highest + 1, dtype=size.dtype).index_add_(0, radius.flatten(), size.flatten())
    radial[0] = 0
    if radial.sum() <= 1e-12 * values.abs().max().clamp_min(1e-300) * values.numel():
        return radial.new_zeros(()), radial[1:] * 0  # constant up to rounding
    share = radial / radial.sum()
    return share @ torch.arange(highest + 1, dtype=share.dtype) / highest, share[1:]


@lru_cache(maxsize=8)
def _legendre(points: int) -> tuple[Tensor, Tensor]:
    """Pseudo-inverse of the Legendre products of total degree 1 to ORDER (and 0) on the grid; their degrees."""
    x = np.linspace(-1, 1, points)
    one = np.polynomial.legendre.legvander(x, ORDER)
    pairs = [(i, j) for i in range(ORDER + 1) for j in range(ORDER + 1 - i)]
    basis = np.stack([np.outer(one[:, i], one[:, j]).ravel() for i, j in pairs], 1)
    return torch.from_numpy(np.linalg.pinv(basis)), torch.tensor([i + j for i, j in pairs], dtype=torch.float64)


def _degree(values: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    inverse, degree = _legendre(len(values))
    c = (inverse @ values.flatten()).abs() * (degree > 0)
    if c.sum() <= 1e-10 * values.abs().max().clamp_min(1e-300):
        return c.new_zeros(())
    return c @ degree / c.sum()


def _lempel_ziv(values: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    bits = (values > values.median()).flatten().tolist()
    return torch.tensor(phrases(bits) / _of_tosses(len(bits)), dtype=torch.float64)


@lru_cache(maxsize=8)
def _of_tosses(n: int) -> float:
    """Mean number of phrases of n fair coin tosses, over five sequences from a generator of its own."""
    g = torch.Generator().manual_seed(0)
    return sum(phrases(torch.randint(2, (n,), generator=g).tolist()) for _ in range(5)) / 5


def phrases(sequence: Sequence[Any]) -> int:
    """Distinct phrases of a Lempel-Ziv (1978) parse: each is the shortest piece not met before.

    >>> phrases("1001111011000010")  # 1 / 0 / 01 / 11 / 10 / 110 / 00 / 010
    8
    """
    seen: dict[tuple[int, Any], int] = {}  # (phrase without its last symbol, that symbol) -> phrase
    at = 0
    for symbol in sequence:
        step = (at, symbol)
        if step in seen:
            at = seen[step]
        else:
            seen[step] = len(seen) + 1
            at = 0
    return len(seen)

"""The Koopman-based generalization bound: small where weights are nearly orthogonal; the norm-based bounds beside it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe, require_extra, require_finite, require_matrix
from pondera.probe._untouched import arguments, require_model, run, scores, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHO = "koopman_bound"
INCREASING = (
    nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.LogSigmoid,
)  # fmt: skip
UNCHANGED = (nn.Identity, nn.Dropout, nn.Flatten)  # in eval mode, on a batch of vectors
BOUNDS = ("koopman", "golowich", "bartlett", "neyshabur")


@dataclass(frozen=True)
class KoopmanBound:
    """What the weights put into four bounds on the Rademacher complexity of their class, as natural logarithms.

    Attributes:
        koopman, golowich, bartlett, neyshabur: log of each bound's weight factor over sqrt(inputs) (`koopman_bound` has
            the formulas and what they leave out).
        factors: log of the Koopman factor of each layer; they add up to `koopman` + log(inputs) / 2.
        norms, condition: largest singular value of each layer's weight, and its ratio to the smallest.
        layers: their names, in the order they run.
        readout: name of the last linear layer where it is not injective and therefore counts to g, else None.
        inputs: n, the rows of the batch.
    """

    koopman: Float[Tensor, ""]
    golowich: Float[Tensor, ""]
    bartlett: Float[Tensor, ""]
    neyshabur: Float[Tensor, ""]
    factors: Float[Tensor, "layers"]
    norms: Float[Tensor, "layers"]
    condition: Float[Tensor, "layers"]
    layers: tuple[str, ...]
    readout: str | None
    inputs: int

    def summary(self) -> str:
        """The four factors in powers of ten, and whether the Koopman one can say anything."""
        ten = {name: float(getattr(self, name)) / math.log(10) for name in BOUNDS}
        lowest = min(ten, key=lambda k: ten[k])
        outside = f"; the readout {self.readout} is left to g" if self.readout else ""
        empty = (
            f"The Koopman factor exceeds sqrt(n), so its bound says nothing with {self.inputs} inputs (proved for square weights). "
            if self.koopman > 0
            else ""
        )
        return (
            f"{len(self.layers)} injective layers, condition numbers {self.condition.min():.3g} to "
            f"{self.condition.max():.3g}{outside}. Weight factor / sqrt(n), in powers of ten: "
            + ", ".join(f"{name} {value:+.1f}" for name, value in ten.items())
            + f". {empty}Lowest: {lowest} (constants are dropped from all, see koopman_bound)."
        )

    def plot(self) -> "Figure":
        """The four factors, and each layer's Koopman factor beside its condition number (a matplotlib figure)."""
        require_extra("KoopmanBound.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = fig.subplots(1, 2)
        left.barh(BOUNDS, [float(getattr(self, name)) / math.log(10) for name in BOUNDS], color="#4477aa")
        left.axvline(0, color="black", lw=0.8)
        left.set(xlabel="log10 of weight factor / √n")
        left.invert_yaxis()
        at = range(len(self.layers))
        right.bar(at, (self.factors / math.log(10)).tolist(), color="#aa3377")
        right.set_xticks(at, [f"{n}\nκ = {c:.3g}" for n, c in zip(self.layers, self.condition.tolist(), strict=True)])
        right.set(ylabel="log10 of the layer's Koopman factor")
        return fig


def koopman_factor(weight: Float[Tensor, "out in"], *, margin: float = 1.0) -> Float[Tensor, ""]:
    r"""Log of the norm of h -> h o W between Sobolev spaces, for an injective weight; differentiable.

    .. math:: \log \frac{\max(1, \lVert W \rVert^s)}{\det(W^T W)^{1/4}}, \qquad s = \frac{d_{in}}{2} + \text{margin}

    At least 0; for ||W|| >= 1 it is margin log ||W|| + sum_i log(||W|| / sigma_i) / 2, and 0 exactly for orthonormal
    columns. (That the norm of H^s on the range of W is meant, and the value attained there, follows from the Fourier
    transform of h o W.)

    Args:
        weight: the matrix of a linear layer, out >= in.
        margin: by how much s exceeds half the dimension; H^s has a kernel for any margin above 0.
    Returns: the logarithm, infinite where `weight` is not injective.
    Raises: BadInput: for a weight that is no finite floating-point matrix, or a margin not above 0.
    Paper: Hashimoto et al. 2024, arXiv 2302.05825.

    >>> koopman_factor(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), margin=0.5).exp()  # 2^1.5 / sqrt 2
    tensor(2.)
    """
    who = "koopman_factor"
    require_matrix(weight, who)
    if weight.ndim != 2:
        raise BadInput(f"{who} needs a matrix (out, in), got a {describe(weight)}")
    require_finite(weight, who, "weight")
    _require_margin(margin, who)
    if len(weight) < weight.shape[1]:
        return torch.full((), torch.inf, dtype=weight.dtype, device=weight.device)
    values = torch.linalg.svdvals(weight)
    return _factor(values, margin)


def koopman_bound(model: nn.Module, batch: Tensor, *, margin: float = 1.0) -> KoopmanBound:
    r"""Bound the complexity of a network of injective weights by Koopman operators, and by norms for comparison.

    The network is g o W_L o sigma o ... o sigma o W_1 (biases are shifts, of norm 1), W_j an injective d_j x d_(j-1)
    matrix. With s_j = d_j / 2 + margin and H_j the Sobolev space of order s_j on R^(d_j), its class has Rademacher
    complexity at most

    .. math:: \frac{B \, \lVert g \rVert}{\sqrt n} \prod_{j=1}^{L-1} \lVert K_\sigma \rVert \prod_{j=1}^{L} G_j
              \prod_{j=1}^{L} \frac{\max(1, \lVert W_j \rVert^{s_{j-1}})}{\det(W_j^T W_j)^{1/4}}

    Reported is the last product over sqrt n. **Dropped**: B = sup k(x, x)^(1/2) of H_0; the norm of g in H_L, which holds
    loss and readout; the norms of composition with sigma; and G_j, the norm of what follows layer j on the range of W_j
    over its norm on all of R^(d_j) (1 where W_j is square). None depends on the weights W_1..W_L of square layers, but B,
    ||g|| and ||K_sigma|| depend on the widths. For square layers they multiply to at least sup |g| (derived: the adjoint of
    composition with sigma maps the kernel's section at x to that at sigma(x), of the same norm), so the bound says nothing
    once the reported number exceeds 1. They can be far more: for a Gaussian bump g on R^64 B ||g|| is 2.3 if the bump
    has width 1 and 80,000 if it has width 8.

    The same layers in three bounds on norms, with X the batch, h the largest width, Frobenius norms F, (2,1)-norms summed
    over output units, spectral norms without index:

    .. math::
        \text{golowich} &= (\sqrt{2 \ln 2 \, L} + 1) \prod_j \lVert W_j \rVert_F \, \lVert X \rVert_F / n \\
        \text{bartlett} &= \prod_j \lVert W_j \rVert
            \Bigl(\sum_j (\lVert W_j \rVert_{2,1} / \lVert W_j \rVert)^{2/3}\Bigr)^{3/2} \lVert X \rVert_F / n \\
        \text{neyshabur} &= L \sqrt h \, \prod_j \lVert W_j \rVert
            \Bigl(\sum_j \lVert W_j \rVert_F^2 / \lVert W_j \rVert^2\Bigr)^{1/2} \max_i \lVert x_i \rVert / \sqrt n

    Golowich's drops nothing (it is proved for ReLU-like activations); Bartlett's and Neyshabur's drop their numerical
    constants, their logarithms of width, depth and n, and the classification margin.

    Covered are models that run as one chain of `nn.Linear`, strictly increasing activations (leaky ReLU, PReLU, ELU, CELU,
    SELU, softplus, softsign, tanh, sigmoid, log-sigmoid), `Identity`, `Dropout` and `Flatten`, on a batch of vectors after
    it. Composition with ReLU, GELU or SiLU, which are not one-to-one, is no bounded operator. A kink must be taken as
    smoothed, and a slope that dies out (tanh, ELU) as kept up beyond the range the data reach (derived); only ||K_sigma||
    feels it. The last linear layer counts to g where it is not injective, as of a
    classifier with fewer classes than units; it is then left out of all four bounds.

    Read with care: the factor is near 1 only for weights near orthogonal. It is exponential in the width times the mean of
    log(||W|| / sigma_i), and in the width times log(1 / ||W||) where ||W|| < 1.

    Args:
        model: the network.
        batch: a tensor of n inputs; only n and the inputs' norms are used.
        margin: by how much every s_j exceeds d_j / 2, above 0.
    Returns: a `KoopmanBound`, in float64.
    Raises: BadInput: for a model that is not such a chain (residual sums, convolutions, attention, norm layers, functional
        calls between layers), a weight before the last that is not injective, no injective weight at all, weights that are
        not finite; a batch that is empty, holds NaN or infinities or does not fit the model; a margin not above 0.
    Paper: Hashimoto, Sonoda, Ishikawa, Nitanda and Suzuki 2024, arXiv 2302.05825; the text was not at hand beyond its
        abstract, the bound is as recalled and its factor derived anew. Golowich, Rakhlin and Shamir 2018; Bartlett, Foster
        and Telgarsky 2017; Neyshabur, Bhojanapalli and Srebro 2018. Left out: the augmented network for weights that are
        not injective, and mixtures of this bound with others.

    >>> net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> with torch.no_grad():
    ...     w = net[0].weight.copy_(torch.eye(3))
    >>> found = koopman_bound(net, torch.ones(100, 3))
    >>> found.koopman.exp(), found.readout
    (tensor(0.1000, dtype=torch.float64), '2.weight')
    """
    require_model(model, WHO)
    _require_margin(margin, WHO)
    if not isinstance(batch, Tensor):
        arguments(batch, WHO)
        raise BadInput(f"{WHO} needs a batch that is one tensor of inputs, got {type(batch).__name__}")
    with untouched(model):
        chain = _chain(model, batch)
    if not require_finite(batch, WHO, "batch").any():
        raise BadInput(f"{WHO} needs inputs that are not all zero, for the norm-based bounds scale with them")
    layers, values, readout = _injective(chain)
    n, x = len(batch), batch.double().flatten(1)
    norms = torch.stack([v[0] for v in values])
    frobenius = torch.stack([v.square().sum() for v in values]).sqrt()
    rows = torch.stack([layer.weight.detach().double().cpu().norm(dim=1).sum() for _, layer in layers])
    factors = torch.stack([_factor(v, margin) for v in values])
    depth, width = len(layers), max(max(layer.weight.shape) for _, layer in layers)
    spread, furthest = x.norm().cpu().log() - math.log(n), x.norm(dim=1).max().cpu().log()
    product = norms.log().sum()
    return KoopmanBound(
        koopman=factors.sum() - math.log(n) / 2,
        golowich=math.log((2 * math.log(2) * depth) ** 0.5 + 1) + frobenius.log().sum() + spread,
        bartlett=product + 1.5 * (rows / norms).pow(2 / 3).sum().log() + spread,
        neyshabur=math.log(depth * width**0.5)
        + product
        + (frobenius / norms).square().sum().log() / 2
        + furthest
        - math.log(n) / 2,
        factors=factors,
        norms=norms,
        condition=torch.stack([v[0] / v[-1] for v in values]),
        layers=tuple(name for name, _ in layers),
        readout=readout,
        inputs=n,
    )


def _factor(values: Float[Tensor, "d"], margin: float) -> Float[Tensor, ""]:
    s = len(values) / 2 + margin
    return s * values[0].log().clamp_min(0) - values.log().sum() / 2


def _require_margin(margin: float, who: str) -> None:
    if not 0 < margin < math.inf:
        raise BadInput(f"{who} needs a finite margin above 0, got {margin}")


def _units(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and everything else without children, with names."""
    children = list(module.named_children())
    if isinstance(module, nn.Linear) or not children:
        yield name, module
        return
    for child, inner in children:
        yield from _units(inner, f"{name}.{child}" if name else child)


def _chain(model: nn.Module, batch: Tensor) -> list[tuple[str, nn.Module]]:
    """The units in the order they run, each fed with nothing but the output of the one before."""
    calls: list[tuple[str, nn.Module, Any, Any]] = []
    for unit, name in {unit: name for name, unit in _units(model)}.items():
        unit.register_forward_hook(lambda m, args, out, name=name: calls.append((name, m, args[:1], out)))
    out = scores(run(model, batch, WHO), WHO)
    previous, before = batch, "the batch"
    for name, unit, args, result in calls:
        _require_covered(name, unit, args)
        if not args or args[0] is not previous:
            raise BadInput(
                f"{WHO} needs a chain of modules, and {_called(name, unit)} is not fed by {before} alone; sums, branches and "
                f"functional calls between layers are not covered"
            )
        previous, before = result, _called(name, unit)
    if out is not previous:
        raise BadInput(f"{WHO} needs a chain of modules, and the output is not that of {before}")
    return [(name, unit) for name, unit, _, _ in calls]


def _require_covered(name: str, unit: nn.Module, args: tuple[Any, ...]) -> None:
    if isinstance(unit, nn.Linear):
        if not (args and isinstance(args[0], Tensor) and args[0].ndim == 2):
            raise BadInput(
                f"{WHO} covers linear layers on a batch of vectors (n, features), not {_called(name, unit)} here"
            )
    elif isinstance(unit, INCREASING) and _rises(unit):
        pass
    elif not isinstance(unit, UNCHANGED) or (isinstance(unit, nn.Flatten) and unit.start_dim != 1):
        raise BadInput(
            f"{WHO} covers chains of Linear layers, strictly increasing activations (LeakyReLU, Tanh, Softplus, ...), Flatten "
            f"and Dropout, not {_called(name, unit)}; take koopman_factor on single weights"
        )


def _rises(unit: nn.Module) -> bool:
    """Whether an activation with its parameters does rise: a leaky slope or an alpha may be 0 or below."""
    slopes = getattr(unit, "weight", torch.ones(1))
    x = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]]).to(slopes).repeat(1, slopes.numel())
    return bool((unit.forward(x).diff(dim=0) > 0).all())


def _called(name: str, unit: nn.Module) -> str:
    return f"{type(unit).__name__} {name!r}" if name else type(unit).__name__


def _injective(
    chain: list[tuple[str, nn.Module]],
) -> tuple[list[tuple[str, nn.Linear]], list[Float[Tensor, "d"]], str | None]:
    """The injective linear layers under their weights' names, the singular values, and the last layer if it is not one."""
    layers = [(f"{name}.weight" if name else "weight", unit) for name, unit in chain if isinstance(unit, nn.Linear)]
    kept, values, readout = [], [], None
    for name, layer in layers:
        weight = require_finite(layer.weight.detach(), WHO, f"weight {name}")
        v = torch.linalg.svdvals(weight.double()).cpu()
        smallest = float(v[-1]) if len(weight) >= weight.shape[1] else 0.0
        if smallest > v[0] * max(weight.shape) * torch.finfo(weight.dtype).eps:
            kept.append((name, layer))
            values.append(v)
        elif layer is layers[-1][1]:
            readout = name
        else:
            raise BadInput(
                f"{WHO} covers injective weights, and {name} of shape {tuple(weight.shape)} with smallest singular value "
                f"{smallest:.2g} is not one; only the last linear layer may be"
            )
    if not kept:
        raise BadInput(f"{WHO} needs an injective linear layer (outputs >= inputs) before the readout, found none")
    return kept, values, readout

"""IBP tightness: how much wider interval bound propagation makes a box than it need be, and when it loses nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pondera._bounds import ACTIVATIONS, Box, Clip, box_around, boxes_in, class_differences, margins, run
from pondera.errors import BadInput, require_extra, require_finite, require_matrix
from pondera.probe._untouched import arguments, require_model, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Pattern = Literal["local", "linear"]


@dataclass(frozen=True)
class IBPTightness:
    """How tight interval bounds of a network are, an input and output (or margin) each.

    Attributes:
        tightness: `optimal` / `propagated`, in (0, 1]; NaN where both are 0.
        optimal: radius of the smallest box around the outputs of the linearised network.
        propagated: radius of the box that interval propagation makes of the same.
        mean: mean of the tightness where it is a number.
        dead: how many outputs do not move at all with their input (and have no tightness).
        eps: the size of the input box before it is clipped.
        pattern: the linearisation, "local" or "linear".
    """

    tightness: Float[Tensor, "inputs rows"]
    optimal: Float[Tensor, "inputs rows"]
    propagated: Float[Tensor, "inputs rows"]
    mean: Float[Tensor, ""]
    dead: int
    eps: float
    pattern: str

    def summary(self) -> str:
        """The finding in plain words."""
        alive = self.tightness[~self.tightness.isnan()]
        what = (
            "its activations taken as the identity" if self.pattern == "linear" else "its activations held as they are"
        )
        dead = f" {self.dead} of {self.tightness.numel()} outputs do not move with their input." if self.dead else ""
        return (
            f"With {what}, the tightest box around the outputs takes {self.mean:.1%} of the width that interval bounds give "
            f"it, on average over {len(self.tightness)} inputs (from {alive.min():.3g} to {alive.max():.3g}; 1 is exact).{dead}"
        )

    def plot(self) -> "Figure":
        """The tightness of all inputs and outputs, on a logarithmic axis (a matplotlib figure)."""
        require_extra("IBPTightness.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(5, 3.2), layout="constrained")
        ax = fig.subplots()
        alive = self.tightness[~self.tightness.isnan()].log10()
        ax.hist(alive.numpy(), bins=30, color="#4477aa")
        ax.axvline(math.log10(float(self.mean)), color="black", lw=1, label=f"mean {self.mean:.3g}")
        ax.set(xlabel="log10 of tightness (0 = exact)", ylabel="inputs and outputs")
        ax.legend(frameon=False)
        return fig


class _Local(Box):
    """A radius through the network linearised at the clean value: where a function bends, its slope there."""

    def bend(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, in_place: bool
    ) -> Any:
        if args[0] is not self or len(list(boxes_in((*args, *kwargs.values())))) != 1:
            raise BadInput(f"ibp_tightness has no slope for {name} of several tensors that depend on the input")

        def f(t: Tensor) -> Tensor:
            return func(t.clone(), *args[1:], **kwargs)

        value, r = f(self.value), _along(f, self.value.detach(), self.radius.detach())
        if not in_place:
            return self.with_parts(-r, r, value)
        for old, new in zip((self.lower, self.upper, self.value), (-r, r, value), strict=True):
            old.copy_(new)
        return self


def _along(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """f'(x) times a direction, by two backward passes (torch.func.jvp compiles scripts for seconds when first used)."""
    y = f(x.requires_grad_())
    u = torch.zeros_like(y).requires_grad_()
    (back,) = torch.autograd.grad(y, x, u, create_graph=True)
    return torch.autograd.grad(back, u, direction)[0]


class _Linear(Box):
    """A radius through the network with the identity for every activation."""

    def bend(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, in_place: bool
    ) -> Any:
        if name not in ACTIVATIONS:
            raise BadInput(f'ibp_tightness can take no {name} as linear; use pattern="local"')
        if in_place:
            return self
        same = self.with_parts(self.lower.clone(), self.upper.clone(), self.value.clone())
        same.last = self.last
        return same


KINDS: dict[str, type[Box]] = {"local": _Local, "linear": _Linear}


def ibp_tightness(
    model: nn.Module,
    batch: Batch,
    eps: float = 1e-6,
    *,
    labels: Int[Tensor, "inputs"] | None = None,
    clip: Clip = None,
    pattern: Pattern = "local",
) -> IBPTightness:
    r"""Measure how tight interval bounds of `model` are: the optimal box of its linearisation by the propagated one.

    With D_k the diagonal of activation slopes after layer k and r the radius of the input box, for an output row c,

    .. math:: \tau = \frac{|c \, W_L D_{L-1} W_{L-1} \cdots D_1 W_1| \, r}
                          {|c \, W_L| \, D_{L-1} |W_{L-1}| \cdots D_1 |W_1| \, r}

    The numerator is exact for the linear map: the smallest box around its outputs. The denominator is what interval
    propagation makes of it layer by layer. tau = 1 says that it loses nothing. "local" takes the slopes at the clean
    input (a ReLU is on or off), which is exact for the network itself while no ReLU in the box changes sides. "linear"
    takes D = I, the deep linear network of the paper's theory.

    The model is run in eval mode and float64. Linear and convolution layers, BatchNorm with running statistics, rising
    activations, pooling and sums are known, others refused, as in `interval_bounds`. One backward pass an output.

    Args:
        model: a network whose output has one row an input.
        batch: what its forward takes, with one floating-point tensor in it.
        eps: size of the input box. The tightness depends on it only through `clip`: without one, any eps gives the
            same. 1e-6 is what the authors' code takes to study initialisations.
        labels: a class for each input: rows are then the margins, label minus each other class, folded into the last
            linear layer. None: rows are the outputs.
        clip: (low, high), the range inputs can take; the box is cut to it and r is half of what is left. The authors
            cut to (0, 1).
        pattern: "local" or "linear".
    Returns: an `IBPTightness`.
    Raises: BadInput: for an operation without a rule, BatchNorm without running statistics, a batch that is empty, not
        finite, not floating-point, outside `clip` or does not fit the model, an eps that is not above 0, weights that
        are not finite, and where no output depends on the input.
    Paper: Mao, Müller, Fischer and Vechev 2024, arXiv 2306.10426, and its code. Differences: the code clamps both radii
        at 1e-8, so that dead outputs count as exact and deep nets in float32 end at the clamp; here dead outputs have
        no tightness. A ReLU whose input is exactly 0 is on there, off here (torch's slope). Residual sums, pooling and
        activations other than ReLU are ours.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> with torch.no_grad():
    ...     a = net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    ...     b = net[1].weight.copy_(torch.tensor([[1.0, 1.0]]))
    >>> ibp_tightness(net, torch.rand(1, 2)).tightness  # (2, 0) against (2, 2)
    tensor([[0.5000]], dtype=torch.float64)
    """
    who = "ibp_tightness"
    require_model(model, who)
    if pattern not in KINDS:
        raise BadInput(f'{who} knows the patterns "local" and "linear", got {pattern!r}')
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            raise BadInput(f"{who} needs BatchNorm with running statistics, and {name or 'the model'} has none")
    args, kwargs = arguments(batch, who)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    if len(inputs) != 1:
        raise BadInput(f"{who} needs a batch with one tensor, got {len(inputs)}")
    given = require_finite(inputs[0], who, "batch")
    x = given.detach().double()
    lower, upper = box_around(x, eps, clip, who)
    if not (eps > 0 and (upper > lower).any()):
        raise BadInput(f"{who} needs an eps above 0, got {eps}")
    r = (upper - lower) / (upper - lower).max()  # the tightness does not depend on the scale

    def forward(box: Box) -> Any:
        def swapped(t: Any) -> Any:
            return box if t is given else t

        doubled = {
            k: t.detach().double() if t.is_floating_point() else t
            for k, t in (*model.named_parameters(), *model.named_buffers())
        }
        return torch.func.functional_call(
            model, doubled, tuple(map(swapped, args)), {k: swapped(v) for k, v in kwargs.items()}
        )

    with untouched(model, grad=True):
        x.requires_grad_()
        out = run(forward, KINDS[pattern](-r, r, x.clone()), who)
        if labels is None:
            value, propagated = out.value, out.radius
        else:
            value = (class_differences(out, labels, who) @ out.value.unsqueeze(-1)).squeeze(-1)
            propagated = margins(out, labels, who)[1]
        if value.ndim == 0 or len(value) != len(x):
            raise BadInput(f"{who} needs an output for each of {len(x)} inputs, got shape {tuple(value.shape)}")
        value, propagated = value.reshape(len(x), -1), propagated.detach().reshape(len(x), -1)
        optimal = torch.stack([(row.abs() * r).flatten(1).sum(1) for row in _jacobian(value, x)], dim=1)
    return _result(optimal, propagated, eps, pattern)


def _jacobian(value: Float[Tensor, "inputs rows"], x: Tensor) -> list[Tensor]:
    """For each row the gradient of every input's output; an output that does not depend on x has gradient 0."""
    if not value.requires_grad:
        return [torch.zeros_like(x) for _ in range(value.shape[1])]
    return [
        torch.autograd.grad(value[:, k].sum(), x, retain_graph=True, materialize_grads=True)[0]
        for k in range(value.shape[1])
    ]


def _result(optimal: Tensor, propagated: Tensor, eps: float, pattern: str) -> IBPTightness:
    who = "ibp_tightness"
    require_finite(propagated, who, "propagated radius")
    require_finite(optimal, who, "Jacobian")
    dead = propagated == 0
    if dead.all():
        raise BadInput(f"{who} found no output that depends on the input")
    tightness = torch.where(dead, torch.nan, optimal / propagated)
    return IBPTightness(
        tightness=tightness.cpu(),
        optimal=optimal.cpu(),
        propagated=propagated.cpu(),
        mean=tightness[~dead].mean().cpu(),
        dead=int(dead.sum()),
        eps=float(eps),
        pattern=pattern,
    )


def expected_tightness(*widths: float) -> float:
    r"""The tightness of a deep linear network with Gaussian weights, hidden layers of the given widths.

    .. math:: \frac{E[\text{optimal}]}{E[\text{propagated}]} = \prod_k \tau(d_k), \qquad
              \tau(d) = \frac{\sqrt\pi \, \Gamma((d + 1) / 2)}{d \, \Gamma(d / 2)} \approx \sqrt{\frac{\pi}{2 d}}

    It falls like the root of each width and exponentially with depth, and depends neither on the scale of the weights
    nor on the sizes of input and output.

    Derived: a row of Gaussian weights times a Gaussian matrix is Gaussian with the row's norm for scale, so an entry of
    the product is |N| times one norm chi(d_k) a hidden layer, with mean sqrt(2) Gamma((d + 1)/2) / Gamma(d/2); the
    product of absolute values has mean d_k a hidden layer and sqrt(2 / pi) a weight matrix. Two layers are the paper's
    result, as recalled; for more it gives a bound over half of the layers, and this product is exact.

    For a ReLU network with the local pattern about half of the units are on: give half the widths (about sqrt(2) a
    hidden layer more; the authors' code has that figure for two layers).

    Args: widths: of the hidden layers; none for a single layer, which is exact.
    Returns: the ratio of the expected radii.
    Raises: BadInput: for a width that is not above 0.
    Paper: Mao, Müller, Fischer and Vechev 2024, arXiv 2306.10426.

    >>> round(expected_tightness(64), 4), round(expected_tightness(64, 64), 4)
    (0.1561, 0.0244)
    """
    if not all(0 < d < math.inf for d in widths):
        raise BadInput(f"expected_tightness needs finite widths above 0, got {widths}")
    return math.exp(
        sum(math.log(math.pi) / 2 + math.lgamma((d + 1) / 2) - math.log(d) - math.lgamma(d / 2) for d in widths)
    )


def propagation_invariant(*weights: Float[Tensor, "rows columns"]) -> Bool[Tensor, "out in"]:
    r"""Where interval propagation through a deep linear network is exact, from the signs of its weights alone.

    .. math:: |W_L \cdots W_1|_{ij} = (|W_L| \cdots |W_1|)_{ij} \iff
              \text{all paths } j \to i \text{ with nonzero weights have one sign}

    Output i is bounded exactly, for every input box, where row i is all True; the network where everything is
    ("propagation invariant"). Sufficient is sign(W_k) = s_k s_{k-1}^T, such as weights that are not negative. Where no
    weight is 0 the signs of the product are then an outer product too: no four of its entries in two rows and columns
    have three equal signs. That is a strong condition on the function, and the paper's explanation of why training
    with tight bounds costs accuracy.

    Args: weights: W_1, ..., W_L in the order they act, each (out, in).
    Returns: True for the pairs of output and input all of whose paths agree.
    Raises: BadInput: for none, no matrices, sizes that do not chain, entries that are not finite.
    Paper: Mao, Müller, Fischer and Vechev 2024, arXiv 2306.10426. The criterion by paths is derived.

    >>> propagation_invariant(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([[ True, False]])
    """
    who = "propagation_invariant"
    if not weights:
        raise BadInput(f"{who} needs at least one weight")
    for w in weights:
        if require_matrix(require_finite(w, who, "weight"), who).ndim != 2:
            raise BadInput(f"{who} needs matrices (out, in), got a weight of shape {tuple(w.shape)}")
    n = weights[0].shape[1]
    positive, negative = torch.eye(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)  # paths by sign
    for w in weights:
        if w.shape[1] != len(positive):
            raise BadInput(f"{who} got a weight of {w.shape[1]} inputs after one of {len(positive)} outputs")
        plus, minus = (w > 0).double().cpu(), (w < 0).double().cpu()
        paths = plus @ positive + minus @ negative, plus @ negative + minus @ positive
        positive, negative = ((p > 0).double() for p in paths)  # whether there are any, not how many
    return (positive + negative < 2).to(weights[0].device)

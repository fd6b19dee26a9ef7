"""Initial guessing bias: how unevenly an untrained network guesses classes, and the law for wide random networks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._activations import Activation, activation
from pondera.errors import BadInput, describe, require_extra, require_finite
from pondera.linalg import gaussian_mean, gaussian_pair_mean
from pondera.probe._untouched import require_model, run, scores, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
SHOWN = 40  # bars a plot has room for


@dataclass(frozen=True)
class InitialGuessingBias:
    """How a network divides a batch among the classes before it has learnt anything.

    Attributes:
        fractions: share of the inputs guessed as each class (ties shared evenly); sums to 1.
        largest: the largest of them.
        entropy: of `fractions`, in nats; log(classes) when even.
        expected_largest: mean of the largest share when every guess is a fair draw among the classes.
        p_value: how often fair draws of that many inputs have a largest share of at least `largest` (Monte Carlo).
        mean, std: over the inputs, of each class's output.
        gamma: variance over classes of `mean` by the mean over classes of the variance over inputs; above 1 guesses
            pile up on few classes.
        inputs: number of guesses counted.
    """

    fractions: Float[Tensor, "classes"]
    largest: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    expected_largest: Float[Tensor, ""]
    p_value: Float[Tensor, ""]
    mean: Float[Tensor, "outputs"]
    std: Float[Tensor, "outputs"]
    gamma: Float[Tensor, ""]
    inputs: int

    def summary(self) -> str:
        """The finding in plain words."""
        classes = len(self.fractions)
        fair = "as even as chance makes it" if self.p_value > 0.05 else "more than chance explains"
        prejudice = "moves less with the input than from class to class" if self.gamma > 1 else "follows the input"
        return (
            f"Of {self.inputs} inputs, {self.largest:.1%} are guessed as class {int(self.fractions.argmax())}, {fair} "
            f"(fair guesses among {classes}: {self.expected_largest:.1%} on average, p = {self.p_value:.2g}). "
            f"Entropy of the guesses {self.entropy:.2f} of {math.log(classes):.2f} nats; the output {prejudice} "
            f"(gamma = {self.gamma:.2g})."
        )

    def plot(self) -> "Figure":
        """Share of each class beside fair guessing, and each class's output over the inputs (a matplotlib figure)."""
        require_extra("InitialGuessingBias.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = fig.subplots(1, 2)
        top = self.fractions.argsort(descending=True, stable=True)[:SHOWN]
        names = [str(i) for i in top.tolist()]
        left.bar(names, self.fractions[top].tolist(), color="#4477aa")
        left.axhline(1 / len(self.fractions), color="black", lw=1, label="even")
        left.axhline(float(self.expected_largest), color="black", lw=1, ls="--", label="largest of fair guesses")
        left.set(xlabel="class", ylabel="share of the inputs guessed")
        left.legend(frameon=False)
        if len(self.mean) == len(self.fractions):
            right.errorbar(
                names, self.mean[top].tolist(), yerr=self.std[top].tolist(), fmt="o", color="#4477aa", capsize=3
            )
        else:
            right.errorbar(["output"], self.mean.tolist(), yerr=self.std.tolist(), fmt="o", color="#4477aa", capsize=3)
        right.set(xlabel="class", ylabel="output: mean and std over inputs", title=f"gamma = {self.gamma:.2g}")
        return fig


def initial_guessing_bias(model: nn.Module, batch: Batch, *, dim: int | None = None) -> InitialGuessingBias:
    r"""Count what `model` guesses on a batch, and compare the counts with fair guessing.

    With O_c(x) the output of class c, mu_c its mean over the inputs and v_c its variance over them,

    .. math:: f_c = \frac{1}{N} \#\{x : \arg\max_k O_k(x) = c\}, \qquad
              \gamma = \frac{\mathrm{Var}_c(\mu_c)}{\mathrm{mean}_c(v_c)}

    A network without the bias has f_c = 1/C up to chance and gamma near 0 (1/N with N inputs). gamma = 1 is where, for
    two classes, every share is equally likely over draws of the weights; beyond it one class usually takes most inputs
    (`predicted_bias`). Whether it harms is another question: the authors' later work (arXiv 2505.12096) finds that the
    starts that train best are biased ones, and that training undoes the bias.

    The model runs once, in eval mode without gradients, and is left as it was. A batch of a hundred inputs or more
    tells a bias from chance; for shares over the weights' draw, repeat with fresh models.

    Args:
        model: a classifier, just started.
        batch: what its forward takes: a tensor, a tuple or list (positional), or a mapping (by keyword).
        dim: the axis of the classes in the output. None: the last one for outputs of up to three axes, (N, C) or
            (N, tokens, C), and 1 beyond, (N, C, H, W). Every position is a guess of its own. One output an input, (N,)
            or (N, 1), is read by its sign: class 1 above zero, class 0 below.
    Returns: an `InitialGuessingBias`.
    Raises: BadInput: if the batch is empty, holds NaN or does not fit the model; if the output is no floating-point
        tensor, not finite, or has fewer than two inputs; for a model on the meta device.
    Paper: Francazi, Lucchi and Baity-Jesi 2024, arXiv 2306.00809. Counting as in the authors' code; gamma as in the
        code of their successor (Bassi et al. 2026, arXiv 2505.12096), but unbiased over classes (divided by C - 1),
        since they take it over a thousand nodes. The test against fair guessing is ours.

    >>> net = nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     w, b = net.weight.copy_(torch.eye(2)), net.bias.copy_(torch.tensor([0.0, 2.0]))
    >>> found = initial_guessing_bias(net, torch.tensor([[1.0, 0], [0, 1], [3, 0], [-1, 0]]))
    >>> found.fractions
    tensor([0.2500, 0.7500])
    """
    require_model(model, "initial_guessing_bias")
    with untouched(model):
        out = scores(run(model, batch, "initial_guessing_bias"), "initial_guessing_bias")
    return guesses(out, dim=dim)


def guesses(out: Tensor, *, dim: int | None = None, who: str = "initial_guessing_bias") -> InitialGuessingBias:
    """`initial_guessing_bias` of outputs that are there already."""
    require_finite(out, who, "model's output")
    out = out.detach().to(torch.promote_types(out.dtype, torch.float32)).cpu()
    if out.ndim < 2:
        out = out.reshape(-1, 1)
    axis = dim if dim is not None else (-1 if out.ndim < 4 else 1)
    if not -out.ndim <= axis < out.ndim:
        raise BadInput(f"{who} was told the classes are on axis {dim}, but the output is a {describe(out)}")
    o = out.movedim(axis, -1).flatten(0, -2)
    if len(o) < 2:
        raise BadInput(f"{who} needs the outputs of at least two inputs, got a {describe(out)}")
    variance, mean = torch.var_mean(o, dim=0, correction=0)
    across = mean.square().sum() if len(mean) == 1 else mean.var()
    gamma = torch.where(across == 0, 0.0, across / variance.mean())
    if o.shape[1] == 1:
        o = torch.cat([-o, o], dim=1)
    best = (o == o.amax(1, keepdim=True)).float()
    fractions = (best / best.sum(1, keepdim=True)).double().mean(0)
    largest = fractions.max()
    fair = _largest_of_fair(*o.shape)
    p_value = (1 + (fair >= largest - 1e-9).sum()) / (1 + len(fair))
    return InitialGuessingBias(
        fractions=fractions.float(),
        largest=largest.float(),
        entropy=torch.special.entr(fractions).sum().float(),
        expected_largest=fair.mean().float(),
        p_value=p_value,
        mean=mean,
        std=variance.sqrt(),
        gamma=gamma,
        inputs=len(o),
    )


@lru_cache(maxsize=64)
def _largest_of_fair(n: int, classes: int) -> Tensor:
    """Largest shares of `n` fair guesses, in many repetitions from a generator of its own."""
    repeats = min(2000, max(200, 2_000_000 // classes))
    counts = np.random.default_rng(0).multinomial(n, np.full(classes, 1 / classes), size=repeats)
    return torch.from_numpy(counts.max(1) / n)


@dataclass(frozen=True)
class GuessingLaw:
    """The law of the guessed share in wide random networks.

    Attributes:
        variance: of each layer's pre-activation over weights and inputs, layers 1 to depth and the output.
        correlation: between the pre-activations of two inputs, over the weights, likewise.
    """

    variance: Float[Tensor, "layers"]
    correlation: Float[Tensor, "layers"]

    @property
    def gamma(self) -> Float[Tensor, "layers"]:
        """Variance of a node's mean over inputs by its variance over inputs, c / (1 - c)."""
        return self.correlation / (1 - self.correlation)

    def density(self, share: Float[Tensor, "*points"]) -> Float[Tensor, "*points"]:
        """Density of the share of inputs guessed as one of two classes, over draws of the weights.

        It peaks at 1/2 for gamma < 1, is flat at gamma = 1 and rises to both ends beyond; gamma = 0 has none (all mass
        at 1/2).
        """
        z, g = torch.special.ndtri(torch.as_tensor(share, dtype=torch.float64)), self.gamma[-1]
        return torch.exp((1 - 1 / g) * z.square() / 2) / g.sqrt()

    @property
    def std(self) -> Float[Tensor, ""]:
        """Standard deviation of that share."""
        return (self.correlation[-1].arcsin() / (2 * torch.pi)).sqrt()

    @property
    def largest(self) -> Float[Tensor, ""]:
        """Mean of the larger of the two shares: 1/2 without bias, 1 when one class takes all."""
        return 0.5 + self.gamma[-1].sqrt().arctan() / torch.pi


def predicted_bias(
    nonlinearity: str | Activation = "relu",
    depth: int = 1,
    *,
    correlation: float = 0.0,
    input_variance: float = 1.0,
    weight_variance: float = 2.0,
    bias_variance: float = 0.0,
) -> GuessingLaw:
    r"""The law of the guessed share in a wide random network of `depth` hidden layers.

    Derived: as width and then input dimension grow, the outputs of one class on inputs x_1, ..., x_N are jointly
    Gaussian over the draw of the weights, with equal variances q and equal correlations c: a shared part and
    independent ones,

    .. math:: O(x_i) = \sqrt{qc}\,Z + \sqrt{q(1-c)}\,\xi_i

    Z is the class's head start, xi_i what the input adds. Of two classes the first gets the share Phi(sqrt(gamma) Z')
    with Z' ~ N(0, 1) and gamma = c / (1 - c); its variance is arcsin(c) / (2 pi), the mean of the larger share
    1/2 + arctan(sqrt(gamma)) / pi. Layer by layer

    .. math:: q_{l+1} = \sigma_w^2 \, E[\phi(u)^2] + \sigma_b^2, \qquad
              q_{l+1} c_{l+1} = \sigma_w^2 \, E[\phi(u) \phi(u')] + \sigma_b^2

    with u, u' Gaussian of variance q_l and correlation c_l. An odd phi keeps c = 0 (without biases, on centred
    inputs); ReLU starts at c = 1/pi and drives c to 1 with depth.

    Args:
        nonlinearity: an activation's name or callable; kinks elsewhere than at 0 cost accuracy.
        depth: hidden layers, at least 0.
        correlation: mean cosine between two inputs, in [0, 1): 0 for centred data (the default, the paper's Gaussian
            blobs).
        input_variance: mean square of an input feature.
        weight_variance: sigma_w^2, variance of a weight times its fan-in (2: He's, as in the authors' code; for ReLU
            without biases it does not matter).
        bias_variance: sigma_b^2 (0, as in the authors' code).
    Returns: a `GuessingLaw`.
    Raises: BadInput: for an unknown activation, a negative depth or variance, a correlation outside [0, 1).
    Paper: Francazi, Lucchi and Baity-Jesi 2024, arXiv 2306.00809, whose theorems were not at hand; for ReLU gamma
        agrees with the closed recursion in the code of their successor (Bassi et al. 2026, arXiv 2505.12096).

    >>> law = predicted_bias("relu", depth=3)
    >>> law.gamma
    tensor([0.0000, 0.4669, 0.9752, 1.5305], dtype=torch.float64)
    >>> predicted_bias("tanh", depth=3).largest
    tensor(0.5000, dtype=torch.float64)
    """
    who = "predicted_bias"
    phi = activation(nonlinearity, who)
    if not depth >= 0:
        raise BadInput(f"{who} needs a depth of at least 0 hidden layers, got {depth}")
    if not 0 <= correlation < 1:
        raise BadInput(f"{who} needs a correlation between inputs in [0, 1), got {correlation}")
    if not (input_variance > 0 and weight_variance > 0 and 0 <= bias_variance < math.inf):
        raise BadInput(
            f"{who} needs positive variances (of the bias at least 0), got input {input_variance}, weight "
            f"{weight_variance}, bias {bias_variance}"
        )
    q = weight_variance * input_variance + bias_variance
    c = (weight_variance * input_variance * correlation + bias_variance) / q
    layers = [(q, c)]
    for _ in range(depth):
        q, qc = (
            weight_variance * gaussian_mean(lambda u: phi(u).square(), q**0.5).item() + bias_variance,
            weight_variance * gaussian_pair_mean(phi, c, q**0.5).item() + bias_variance,
        )
        c = min(max(qc / q, 0.0), 1.0) if abs(qc) > 1e-14 * q else 0.0
        layers.append((q, c))
    variance, corr = torch.tensor(layers, dtype=torch.float64).unbind(1)
    return GuessingLaw(variance, corr)

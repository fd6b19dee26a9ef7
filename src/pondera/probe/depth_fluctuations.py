"""How much signal and tangent kernel of an untrained net vary from one draw of its weights to the next, by depth."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pondera._activations import Activation, activation, derivative
from pondera.errors import BadInput, require_extra

Fill = Callable[[Tensor], Any]


@dataclass(frozen=True)
class DepthFluctuations:
    """Normalised fluctuations over draws of the weights; entry l - 1 of each tensor belongs to layer l.

    V: width Var(q_l) / E[q_l]^2 of the mean square q_l of preactivations. N: width Var(Theta_l) / E[Theta_l]^2 of the
    tangent kernel. mean_q: E[q_l]. V_error, N_error: standard errors over the draws. start, width, draws: as asked.
    """

    V: Float[Tensor, "depth"]
    N: Float[Tensor, "depth"]
    mean_q: Float[Tensor, "depth"]
    V_error: Float[Tensor, "depth"]
    N_error: Float[Tensor, "depth"]
    start: str
    width: int
    draws: int

    def summary(self) -> str:
        """A short table by depth."""
        depth = len(self.V)
        layers = sorted({2**k for k in range(depth.bit_length()) if 2**k <= depth} | {depth})
        lines = [f"{self.start} start, width {self.width}, {self.draws} draws"]
        lines.append(f"{'layer':>5} {'E[q]':>9} {'V':>16} {'N':>16}")
        for i in (layer - 1 for layer in layers):
            v, n = (f"{a[i]:8.3g} ±{e[i]:6.2g}" for a, e in ((self.V, self.V_error), (self.N, self.N_error)))
            lines.append(f"{i + 1:>5} {self.mean_q[i]:>9.3g} {v:>16} {n:>16}")
        return "\n".join(lines)

    def plot(self) -> Any:
        """V and N over depth on a logarithmic axis, a band of two standard errors; the matplotlib Axes."""
        require_extra("DepthFluctuations.plot", "matplotlib")
        from matplotlib import pyplot as plt

        _, ax = plt.subplots(figsize=(5, 3.2))
        layers = torch.arange(1, len(self.V) + 1)
        curves = {"V, preactivations": (self.V, self.V_error), "N, tangent kernel": (self.N, self.N_error)}
        for label, (value, error) in curves.items():
            shown = value > 1e-9  # nothing random is in N of layer 1, nor in V of an orthogonal one
            low, high = (value - 2 * error).clamp_min(value / 10), value + 2 * error
            (line,) = ax.plot(layers[shown], value[shown], label=label)
            ax.fill_between(layers[shown], low[shown], high[shown], color=line.get_color(), alpha=0.2, linewidth=0)
        ax.set(xlabel="layer", ylabel="width × Var / mean²", yscale="log", title=f"{self.start}, width {self.width}")
        ax.legend(frameon=False)
        return ax


@torch.no_grad()
def depth_fluctuations(
    start: str | Fill,
    *,
    depth: int = 60,
    width: int = 30,
    draws: int = 1500,
    nonlinearity: str | Activation = "tanh",
    gain: float = 1.0,
    generator: Generator | None = None,
) -> DepthFluctuations:
    r"""Fluctuations over draws of the weights, layer by layer, of the net z_l = W_l phi(z_{l-1}) of equal widths n.

    With one input of \|x\|^2 = n, q_l = \|z_l\|^2 / n and Theta_l the tangent kernel of layer l averaged over its
    units, the sum of (dz_i/dW)^2 / n over all weights up to l,

    .. math::
        V_l = n \frac{\mathrm{Var}(q_l)}{E[q_l]^2}, \qquad N_l = n \frac{\mathrm{Var}(\Theta_l)}{E[\Theta_l]^2}, \qquad
        \Theta_l = W_l D \, \Theta_{l-1} D \, W_l^T + \frac{\|\phi(z_{l-1})\|^2}{n} I

    with D = diag phi'(z_{l-1}), all draws at once. Where V_l reaches n the signal of one draw tells little of that of
    the next. To leading order in 1/n critical tanh nets have V_l of about 2 l / 3 with Gaussian weights and, derived,
    8 / (3 l) with orthogonal ones; ReLU nets 5 l - 3 and, derived, 3 (l - 1).

    Args:
        start: "gaussian" (N(0, gain^2 / n)), "orthogonal" (gain times a Haar draw) or a function that fills a float32
            tensor (draws, n, n) in place, called once a layer. A start of single matrices is wrapped:
            ``lambda w: [start_(m, generator=g) for m in w]``.
        depth: layers. width: n. draws: of the whole net. The defaults show the effect in some five seconds.
        nonlinearity: name or elementwise function.
        gain: scale of the two named starts; 1 is critical for tanh (`pondera.init.critical_gain` for others).
        generator: source of the named starts' draws, on the CPU; None takes torch's default one.
    Returns: `DepthFluctuations`. Where V_l is beyond n the law of q_l is heavy-tailed: few draws tell too low a V_l.
    Raises: BadInput: for an unknown start or activation, sizes below 1 (draws below 2), a gain that is not positive, or
        where the signal dies out or is not finite.
    Paper: Day, Kahn and Roberts 2023, arXiv 2310.07765. Differences: one input, weights only, all layers' weights with
        the same factor 1/n in the kernel. The text of the paper was not at hand beyond its abstract; V, N and their
        theory follow Roberts, Yaida and Hanin 2022, arXiv 2106.10165.

    >>> g = torch.Generator().manual_seed(0)
    >>> look = depth_fluctuations("orthogonal", depth=8, width=10, draws=200, generator=g)
    >>> bool(look.V[-1] < 0.5), round(look.mean_q[0].item(), 5)
    (True, 1.0)
    """
    who = "depth_fluctuations"
    if min(depth, width) < 1 or draws < 2:
        raise BadInput(f"{who} needs depth and width of at least 1 and 2 draws, got {depth}, {width} and {draws}")
    if not (gain > 0 and math.isfinite(gain)):
        raise BadInput(f"{who} needs a finite gain above 0, got {gain}")
    if not callable(start) and start not in ("gaussian", "orthogonal"):
        raise BadInput(f"{who} knows the starts 'gaussian' and 'orthogonal' (or takes a function), got {start!r}")
    phi = activation(nonlinearity, who)
    w = torch.empty(draws, width, width, dtype=torch.float32)
    h = torch.ones(draws, width, 1)
    theta = d = None
    eye = torch.eye(width)
    q, kernel = [], []
    for layer in range(1, depth + 1):
        _draw(w, start, gain, generator)
        fresh = h.square().mean(1, keepdim=True) * eye  # the kernel's part of this layer's own weights
        theta = fresh if theta is None else torch.baddbmm(fresh, w @ (d * theta * d.mT), w.mT)
        z = w @ h
        h, d = phi(z.clone()), derivative(phi, z)
        q.append(z.double().square().mean((1, 2)))
        kernel.append(theta.diagonal(dim1=1, dim2=2).double().mean(1))
        if not (torch.isfinite(q[-1]).all() and torch.isfinite(kernel[-1]).all() and q[-1].mean() > 0):
            raise BadInput(f"{who} lost the signal at layer {layer}: it died out or is not finite; give another gain")
    (v, v_error), (n, n_error) = (_relative_variance(torch.stack(x), width) for x in (q, kernel))
    name = start if isinstance(start, str) else getattr(start, "__name__", type(start).__name__)
    return DepthFluctuations(v, n, torch.stack(q).mean(1), v_error, n_error, name, width, draws)


def _draw(w: Float[Tensor, "draws n n"], start: str | Fill, gain: float, generator: Generator | None) -> None:
    if callable(start):
        start(w)
        return
    w.normal_(0, 1, generator=generator)
    if start == "gaussian":
        w.mul_(gain / w.shape[-1] ** 0.5)
        return
    q, r = torch.linalg.qr(w)
    sign = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -gain, gain)  # without it the law is not Haar's
    torch.mul(q, sign.unsqueeze(1), out=w)


def _relative_variance(x: Float[Tensor, "depth draws"], width: int) -> tuple[Tensor, Tensor]:
    """width Var / mean^2 over draws and its standard error by the influence of each draw (delta method)."""
    mean = x.mean(1, keepdim=True)
    y = x / mean - 1
    r = y.var(1)
    influence = y.square() - r.unsqueeze(1) * (1 + 2 * y)
    return width * r, width * influence.std(1) / x.shape[1] ** 0.5

"""Signed supermask: frozen weights of which each is kept, hidden or turned in sign by a trained mask."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput, require_finite, require_matrix

STARTS = ("elus", "weight")


class SignedSupermask(nn.Module):
    r"""A frozen weight W under a trained mask M of -1, 0 and 1, for `torch.nn.utils.parametrize`.

    .. math:: E_{ij} = \operatorname{sign}(M_{ij}) \;\text{if}\; |M_{ij}| > \tau, \;\text{else}\; 0, \qquad y = (W \odot E) \, x

    The gradient goes straight through the step, also where the mask is 0 and without clipping: dE/dM = 1, so
    :math:`\partial L / \partial M = W \odot \partial L / \partial (W \odot E)`. Only M is a parameter.

    **Starts.** W is a signed constant ("ELUS", for ELU nets): :math:`|W_{ij}| = \sqrt{3 / \mathrm{fan\_in}}`, its signs those of
    the weight as it was; or that weight itself. M is drawn from Xavier's uniform distribution with bound
    :math:`\sqrt{6 / (\mathrm{fan\_in} + \mathrm{fan\_out})}`; at the usual widths some 9 of 10 weights are kept at first, half of
    them turned.

    **Sparsity** is not set but comes about: a decay of M in every step draws masks into the band of width tau, where what is
    hidden stays hidden while its gradient is small. The decay is a share of M *a step*, not multiplied by the learning
    rate: the authors' 3e-4 takes away a tenth in an epoch of 390 steps. `decay_`, called after each step of an optimizer without
    decay, does that. torch's AdamW multiplies by the rate (at 1e-3 it needs ``weight_decay=0.3`` for the same), and torch's SGD
    adds its decay to the gradient, times the rate: their usual values prune next to nothing.

    Args:
        threshold: tau, 0.01 by default as fixed in the authors' code. It is absolute while the bound of M is not: wide layers
            start nearer to it.
        start: what is frozen: ``"elus"`` (the paper's) or ``"weight"``, the weight that is there.
        generator: draws M when the weight is registered; torch's own by default.
    Shapes and types: a weight of two or more dimensions, outputs first; mask and frozen weight like it.
    fan_in is what one entry of the first dimension reads, fan_out the first dimension times the taps.
    Registering changes the function. Assigning a weight sets the mask to the nearest of -1, 0 and 1 for each frozen weight.
    Raises: BadInput: for a threshold that is not positive or another start; at registration and assignment for a weight
        with NaN or fewer than two dimensions; at registration for a threshold above the bound of M, where all would be hidden.
    Paper: Koster, Grothe and Rettinger 2022, arXiv 2201.13361, by the authors' code (kosnil/signed_supermasks); the paper's
        body was not read. That tfa's SGDW does not multiply its decay by the rate is recalled. In their code the signs of W
        are drawn; ours are the weight's own. Biases there are none; here they stay as they are.

    >>> from torch.nn.utils import parametrize
    >>> layer = parametrize.register_parametrization(nn.Linear(27, 30), "weight", SignedSupermask())
    >>> sorted(set((3 * layer.weight.detach()).round(decimals=4).add(0.0).flatten().tolist()))
    [-1.0, 0.0, 1.0]
    >>> mask = layer.parametrizations.weight.original
    >>> with torch.no_grad():
    ...     _ = mask.copy_(torch.linspace(-0.02, 0.02, 810).view(30, 27))
    >>> round(SignedSupermask.kept(layer), 1)
    0.5
    """

    weight: Tensor

    def __init__(
        self, threshold: float = 0.01, *, start: str = "elus", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not (isinstance(threshold, (int, float)) and 0 < threshold < math.inf):
            raise BadInput(f"SignedSupermask needs a threshold above 0, got {threshold!r}")
        if start not in STARTS:
            raise BadInput(f"SignedSupermask starts from one of {', '.join(STARTS)}, got {start!r}")
        self.threshold, self.start, self._generator = float(threshold), start, generator
        self.register_buffer("weight", None)

    def forward(self, mask: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        effective = mask.detach().sign() * (mask.detach().abs() > self.threshold)
        return self.weight * (effective + (mask - mask.detach()))

    def right_inverse(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        require_finite(require_matrix(weight, "SignedSupermask"), "SignedSupermask", "weight")
        if self.weight is not None:
            wanted = torch.where(self.weight != 0, weight / self.weight, 0.0).round().clamp(-1, 1)
            return (2 * self.threshold * wanted).to(weight.dtype)
        fan_in, taps = weight[0].numel(), weight[0, 0].numel()
        bound = math.sqrt(6 / (fan_in + len(weight) * taps))
        if bound <= self.threshold:
            raise BadInput(
                f"SignedSupermask(threshold={self.threshold}) would hide every weight of a layer this wide: its masks start "
                f"within {bound:.2g} of zero; give a lower threshold"
            )
        signs = torch.where(weight.detach() < 0, -1.0, 1.0)
        frozen = weight.detach().clone() if self.start == "weight" else math.sqrt(3 / fan_in) * signs
        mask = torch.empty(weight.shape, device=weight.device).uniform_(-bound, bound, generator=self._generator)
        self.weight, self._generator = frozen.to(weight.dtype), None
        return mask.to(weight.dtype)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, start={self.start!r}"

    @staticmethod
    def kept(model: nn.Module) -> float:
        """The share of all masked weights of a layer or model that is not hidden."""
        pairs = [(int((m.detach().abs() > held.threshold).sum()), m.numel()) for held, m in _masks(model)]
        if not pairs:
            raise BadInput("SignedSupermask.kept found no signed supermask in this model")
        return sum(kept for kept, _ in pairs) / sum(n for _, n in pairs)

    @staticmethod
    @torch.no_grad()
    def decay_(model: nn.Module, decay: float = 3e-4) -> None:
        """Take a share `decay` away from every mask of a layer or model: to be called after each step of the optimizer.

        The authors let it fall along with the rate (both times 0.9 every 10 epochs). Raises: BadInput: unless 0 <= decay < 1.
        """
        if not 0 <= decay < 1:
            raise BadInput(f"SignedSupermask.decay_ needs a share from 0 to below 1, got {decay!r}")
        for _, mask in _masks(model):
            mask.mul_(1 - decay)


def _masks(model: nn.Module) -> Iterator[tuple[SignedSupermask, Tensor]]:
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], SignedSupermask):
            yield module[0], module.original  # type: ignore[misc]

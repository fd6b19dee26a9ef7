"""Training at few bits without oscillation: a scale from statistics, frozen confident weights, one matrix for query and key."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from pondera.compress.grid import require_bits
from pondera.errors import BadInput, describe, require_finite, require_float, require_matrix

EDGE = 1e-6  # below the upper end, so that it rounds to the highest level


class StatsQ(nn.Module):
    r"""A weight rounded to b bits with a scale from its own statistics, for `torch.nn.utils.parametrize`.

    For each output unit, with :math:`n = 2^{b-1}`,

    .. math:: s = 2 \, \overline{|w|}, \qquad z = \mathrm{clamp}(w / s, -1, 1), \qquad
              \hat w = s \, (\mathrm{round}(n z - \tfrac12) + \tfrac12) / n

    The :math:`2^b` levels are midpoints, :math:`\pm (2k + 1) s / 2^b`: there is no 0. The gradient passes as if nothing
    had been done, in clipped entries too, and none passes through s. The scale is never trained, so it cannot chase the
    weights: a learned one does, and moves the boundaries that weights jump across.

    What to know:

    - s follows the weights, and so do the boundaries, a little.
    - The clip at twice the mean cuts 11% of a Gaussian row off. The error of rounding does not fall like 4^-b because of it:
      at 4 bits and more a scale that fits the weights best is closer to them. What is gained is calm, not fit.
    - Ties go to the even code: a row of :math:`\pm c` at 2 bits becomes c / 2 and -3 c / 2.

    Args:
        bits: b, 2 to 8. (The paper's formula breaks at 1: a clipped -1 rounds to a third level.)
        dim: the dimension of the weight that its output units run along: 0 for linear layers and convolutions, 1 for
            transposed convolutions. The authors' three-dimensional case is ``dim=1``.
    Shapes and types: a weight of two or more dimensions, float64, float32 or half; half precisions are rounded in float32.
    Raises: BadInput: for other bits; at registration and assignment for a weight with NaN, or without that `dim`.
    Paper: Liu, Liu and Cheng 2023, arXiv 2302.02210 (ICML 2023). The body of the paper was not read; this follows the authors'
        code (nbasyl/OFQ), which takes two-dimensional weights. A convolution's channel is a row here.

    >>> layer = parametrize.register_parametrization(nn.Linear(6, 2), "weight", StatsQ(2))
    >>> [len(row.unique()) <= 4 for row in layer.weight]
    [True, True]
    """

    boundary: float | None  # set by `ConfidenceGuidedAnnealing`: entries further from a boundary get no gradient

    def __init__(self, bits: int = 4, *, dim: int = 0) -> None:
        super().__init__()
        self.bits, self.dim, self.boundary = require_bits(bits, "StatsQ"), dim, None

    def forward(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        n = 2 ** (self.bits - 1)
        with torch.no_grad():
            s, u = self._scaled(weight)
            q = (s * ((u.round() + 0.5) / n)).to(weight.dtype)
            free = None if self.boundary is None else _near(u, self.boundary, n)
        w = weight if free is None else torch.where(free, weight, weight.detach())
        return q + (w - w.detach())  # q to the bit, with the gradient of w

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        require_finite(require_matrix(weight, "StatsQ"), "StatsQ", "weight")
        if not -weight.ndim <= self.dim < weight.ndim:
            raise BadInput(f"StatsQ(dim={self.dim}) needs a weight with that dimension, got a {describe(weight)}")
        return weight

    @torch.no_grad()
    def codes(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The whole number of each entry's level, -2^(b-1) to 2^(b-1) - 1."""
        return self._scaled(weight)[1].round()

    @torch.no_grad()
    def uncertain(self, weight: Float[Tensor, "..."], boundary: float) -> Bool[Tensor, "..."]:
        """Which entries lie within `boundary`, in units of a level, of where rounding goes from one level to the next."""
        return _near(self._scaled(weight)[1], boundary, 2 ** (self.bits - 1))

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + (f", dim={self.dim}" if self.dim else "")

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and n z - 1/2, which is rounded."""
        w = weight.detach()
        w = w if w.dtype == torch.float64 else w.float()
        s = 2 * w.abs().mean([d for d in range(w.ndim) if d != self.dim % w.ndim], keepdim=True)
        z = (w / s.clamp_min(torch.finfo(w.dtype).tiny)).clamp(-1, 1 - EDGE)
        return s, z * 2 ** (self.bits - 1) - 0.5


def _near(u: Tensor, boundary: float, n: int) -> Tensor:
    """|u - i - 1/2| <= boundary for a boundary between two of the codes -n .. n - 1."""
    at = (u + 0.5).round()
    return ((u + 0.5 - at).abs() <= boundary) & (at.abs() < n)


class OscillationTracker:
    """Counts how often quantised weights turn back: a change of level against the direction of the change before.

    Call `step()` after each step of the optimizer (or `track(name, codes)` with codes of one's own).

    Args:
        model: its weights under `StatsQ`, or any parametrization with a method ``codes(weight)``, are followed.
        momentum: of the running mean that `frequency` holds, 0.01 as in the authors' code.
    Raises: BadInput: if the model has no such weight, for a momentum outside (0, 1].
    Paper: Liu, Liu and Cheng 2023, arXiv 2302.02210; the count is Nagel et al.'s (2022), as the authors' code has it.

    >>> net = nn.Linear(4, 2)
    >>> _ = parametrize.register_parametrization(net, "weight", StatsQ(2))
    >>> tracker = OscillationTracker(net)
    >>> for sign in (1, -1, 1, -1):
    ...     _ = net.parametrizations.weight.original.data.mul_(sign)
    ...     tracker.step()
    >>> tracker.total["weight"].sum() > 0, tracker.steps
    (tensor(True), 4)
    """

    def __init__(self, model: nn.Module | None = None, *, momentum: float = 0.01) -> None:
        if not 0 < momentum <= 1:
            raise BadInput(f"OscillationTracker needs a momentum above 0 and at most 1, got {momentum!r}")
        self.momentum, self.steps = momentum, 0
        self._followed = [] if model is None else list(_quantised(model, "codes"))
        if model is not None and not self._followed:
            raise BadInput(
                f"OscillationTracker found no weight with codes in {type(model).__name__}: register StatsQ on it"
            )
        self.total: dict[str, Tensor] = {}  # turns of each weight
        self.frequency: dict[str, Tensor] = {}  # their running mean
        self._codes: dict[str, Tensor] = {}
        self._direction: dict[str, Tensor] = {}

    def step(self) -> None:
        """Look at the weights as they are now."""
        self.steps += 1
        for name, original, quantiser in self._followed:
            self.track(name, quantiser.codes(original))

    @torch.no_grad()
    def track(self, name: str, codes: Float[Tensor, "*shape"]) -> None:
        """Look at the codes of one weight."""
        if name not in self._codes:
            self.total[name], self.frequency[name], self._direction[name] = (torch.zeros_like(codes) for _ in "123")
            self._codes[name] = codes.clone()
        moved = (self._codes[name] - codes).sign()
        turned = (moved * self._direction[name] == -1).to(codes.dtype)
        self.total[name] += turned
        self.frequency[name].lerp_(turned, self.momentum)
        self._direction[name] = torch.where(moved != 0, moved, self._direction[name])
        self._codes[name] = codes.clone()

    @property
    def rate(self) -> float:
        """Turns a weight and 1,000 steps, over all weights followed."""
        n = sum(t.numel() for t in self.total.values())
        return 1000 * float(sum(float(t.sum()) for t in self.total.values())) / max(1, n * self.steps)


class ConfidenceGuidedAnnealing:
    r"""A last phase of training in which only weights near a boundary between two levels may move.

    In each step a weight is free where its :math:`n z - 1/2` lies within `boundary` of a boundary between two levels; all
    others are *confident*: their gradient is set to 0 before the optimizer's step and their value put back after it, so that
    momentum and decay do not move them either. What is confident is asked anew in every step, for the scales follow the free
    weights. Of the query-key products of `QKRAttention`, which are no parameters, the confident entries pass no gradient.

    Train as usual until the end, then make this object and go on for a few per cent of the steps at a low rate; `remove()`
    ends it (so does leaving a ``with`` block). Nothing else is to be called.

    Args:
        model: its weights under `StatsQ`, and its `QKRAttention`, are annealed.
        optimizer: that steps the model; two hooks are put on it.
        boundary: in units of a level. The authors' default is 0.005; they name 0.005 or 0.007 as best.
    Raises: BadInput: if no weight is under `StatsQ`, or for a boundary outside [0, 0.5].
    Paper: Liu, Liu and Cheng 2023, arXiv 2302.02210 (ICML 2023), 15 to 30 epochs after 300. As in the authors' code (nbasyl/OFQ), but
        that their loop leaves out the outer boundaries where no weight has the outer code; and there the query-key part
        is detached where it has no effect on the gradient, while here its confident entries do get none, as is meant.

    >>> net = nn.Linear(64, 8)
    >>> _ = parametrize.register_parametrization(net, "weight", StatsQ(2))
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> with ConfidenceGuidedAnnealing(net, sgd) as annealing:
    ...     net(torch.randn(4, 64)).square().sum().backward()
    ...     sgd.step()
    >>> annealing.free < 0.1
    True
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, boundary: float = 0.005) -> None:
        if not 0 <= boundary <= 0.5:
            raise BadInput(f"ConfidenceGuidedAnnealing needs a boundary of 0 to 0.5 of a level, got {boundary!r}")
        self._held = [(p, q) for _, p, q in _quantised(model, "uncertain")]
        self._products = [m.product for m in model.modules() if isinstance(m, QKRAttention) and m.product is not None]
        if not self._held and not self._products:
            raise BadInput(f"ConfidenceGuidedAnnealing found no weight under StatsQ in {type(model).__name__}")
        self.boundary = boundary
        self._confident: Tensor | None = None  # share of the weights, at the last step
        self._frozen: list[tuple[Tensor, Tensor, Tensor]] = []
        for product in self._products:
            product.boundary = boundary
        self._hooks = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._frozen = []
        for p, quantiser in self._held:
            held = ~quantiser.uncertain(p, self.boundary)
            if p.grad is not None:
                p.grad.masked_fill_(held, 0)
            self._frozen.append((p, held, p.detach().clone()))

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for p, held, was in self._frozen:
            p.copy_(torch.where(held, was, p))
        if self._frozen:
            n = sum(held.numel() for _, held, _ in self._frozen)
            self._confident = (
                torch.stack([held.sum().to(self._frozen[0][1].device) for _, held, _ in self._frozen]).sum() / n
            )
        self._frozen = []

    @property
    def free(self) -> float:
        """Share of the weights that the last step could move."""
        return 1.0 if self._confident is None else 1 - float(self._confident)

    def remove(self) -> None:
        """Let all weights free again."""
        for hook in self._hooks:
            hook.remove()
        for product in self._products:
            product.boundary = None

    def __enter__(self) -> "ConfidenceGuidedAnnealing":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class QKRAttention(nn.Module):
    r"""Self-attention whose query and key weights are quantised as one matrix a head.

    .. math:: A_h = W_{q,h}^\top W_{k,h}, \qquad \mathrm{logits}_h = x \, \hat A_h \, x^\top / \sqrt{d}

    with :math:`\hat A_h` from `StatsQ` on the rows of all heads' :math:`A_h`. Query and key then have no codes of their own
    that could jump against each other. Without rounding it is ordinary attention without biases of query and key.
    The product costs heads * dim^2 weights where the two have 2 dim^2, also in what is stored after training.

    Args:
        dim: of the tokens.
        heads: that divide it.
        bits: of the product's, the values' and the output's weights; None rounds nothing. Activations are not rounded here.
        product: False rounds the query's and key's weights by themselves in place of their product: the rival.
    Shapes and types: x (batch, tokens, dim) to the same, in the dtype of the weights.
    Raises: BadInput: for heads that do not divide the dimension, for other bits, for an input of another width.
    Paper: Liu, Liu and Cheng 2023, arXiv 2302.02210 (ICML 2023), after the authors' code; the pretrained biases of query and key
        are dropped there too. Theirs also rounds x, the product with x, the values and the probabilities by learned steps.

    >>> QKRAttention(8, 2, bits=3)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int, *, bits: int | None = 4, product: bool = True) -> None:
        super().__init__()
        if heads < 1 or dim < 1 or dim % heads:
            raise BadInput(f"QKRAttention needs heads that divide the dimension, got {heads} heads for {dim}")
        self.dim, self.heads = dim, heads
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.product = StatsQ(bits) if bits is not None and product else None
        alone = [self.value, self.out] + ([] if product else [self.query, self.key])
        for layer in alone if bits is not None else []:
            parametrize.register_parametrization(layer, "weight", StatsQ(bits))

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention, *, bits: int | None = 4) -> "QKRAttention":
        """With the weights of a trained self-attention; its biases of query and key are dropped.

        Raises: BadInput: for attention whose keys and values have widths of their own.
        """
        if not isinstance(attention, nn.MultiheadAttention) or attention.in_proj_weight is None:
            raise BadInput(
                f"QKRAttention needs an nn.MultiheadAttention with one width, got {type(attention).__name__}"
            )
        new = cls(attention.embed_dim, attention.num_heads, bits=bits).to(attention.in_proj_weight)
        with torch.no_grad():
            parts = attention.in_proj_weight.chunk(3)
            for layer, w in zip(
                (new.query, new.key, new.value, new.out), (*parts, attention.out_proj.weight), strict=True
            ):
                layer.weight = w.clone() if parametrize.is_parametrized(layer) else nn.Parameter(w.clone())
            biases = (
                [None, None]
                if attention.in_proj_bias is None
                else [attention.in_proj_bias.chunk(3)[2], attention.out_proj.bias]
            )
            for layer, b in zip((new.value, new.out), biases, strict=True):
                layer.bias.zero_() if b is None else layer.bias.copy_(b)
        return new

    def products(self) -> Float[Tensor, "heads dim dim"]:
        """The query-key matrices as they act, rounded where they are."""
        q, k = (w.weight.unflatten(0, (self.heads, -1)) for w in (self.query, self.key))
        a = (q.mT @ k).flatten(0, 1)
        return (a if self.product is None else self.product(a)).unflatten(0, (self.heads, -1))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        require_float(x, "QKRAttention", "input")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise BadInput(f"QKRAttention needs an input (batch, tokens, {self.dim}), got a {describe(x)}")
        query = torch.einsum("btc,hcd->bhtd", x, self.products())
        value = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        p = F.softmax(query @ x.mT.unsqueeze(1) * (self.dim // self.heads) ** -0.5, dim=-1)
        return self.out((p @ value).transpose(1, 2).flatten(-2))


def _quantised(model: nn.Module, method: str) -> Iterator[tuple[str, nn.Parameter, Any]]:
    """Name, trained tensor and quantiser of every weight under a parametrization that has this method."""
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, held in module.parametrizations.items():  # type: ignore[union-attr, operator]
            parts: Sequence[nn.Module] = list(held)
            if hasattr(parts[0], method):
                yield (f"{path}.{attribute}" if path else attribute), held.original, parts[0]

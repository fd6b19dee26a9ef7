r"""u-muP: every operation at scale one forward and backward, and rates that do not know the width.

Weights are drawn from N(0, 1). What other parametrizations put into the start is a factor at the operation here, one for the
forward pass and others for the gradients:

.. math:: y = \alpha f(x), \qquad \nabla_x \leftarrow \beta \, \nabla_x

so that activations, weights and gradients all begin at about one, in the middle of what 8- and 16-bit formats hold, and one rate
found on a narrow model serves a wide one. A factor shared by a whole gradient is what Adam does not see; SGD would.

What has no factor is torch's own: `nn.RMSNorm(n, elementwise_affine=False)` and `nn.LayerNorm(n, elementwise_affine=False)` are at
scale one as they are. A net is made of these parts::

    class Feed(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.norm = nn.RMSNorm(n, elementwise_affine=False)
            self.up, self.down = UnitLinear(n, 4 * n), UnitLinear(4 * n, n)

        def forward(self, x):
            return self.down(unit_gelu(self.up(self.norm(x))))

    taus = residual_taus(layers)  # attention, feed-forward, attention, ...
    net = nn.Sequential(UnitEmbedding(v, n), *blocks, nn.RMSNorm(n, elementwise_affine=False), UnitReadout(n, v))
    optimizer = torch.optim.AdamW(u_mup_groups(net, lr=1.0, weight_decay=1e-4))

with each block a `UnitResidual(Feed(n), tau)` or one around attention.
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput

__all__ = [
    "UnitEmbedding",
    "UnitLinear",
    "UnitReadout",
    "UnitResidual",
    "residual_taus",
    "u_mup_groups",
    "unit_attention",
    "unit_cross_entropy",
    "unit_gelu",
    "unit_silu_glu",
]


class _Scaled(torch.autograd.Function):
    """A factor on the way forward and another on the way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, forward: float, backward: float) -> Tensor:
        return x * forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        ctx.factor = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.factor, None, None


def _forward(x: Tensor, factor: float) -> Tensor:
    return _Scaled.apply(x, factor, 1.0)  # type: ignore[no-any-return,no-untyped-call]


def _backward(x: Tensor, factor: float) -> Tensor:
    return _Scaled.apply(x, 1.0, factor)  # type: ignore[no-any-return,no-untyped-call]


def _between(share: float, low: float, high: float) -> float:
    """Interpolated in the logarithm: low at 0, high at 1."""
    return math.exp(share * math.log(high) + (1 - share) * math.log(low))


def _positive(who: str, **sizes: float) -> None:
    for what, size in sizes.items():
        if not size > 0 or math.isinf(size):
            raise BadInput(f"{who} needs a positive {what}, got {size}")


class UnitLinear(nn.Module):
    r"""A linear layer at scale one.

    .. math:: y = n^{-1/2} (W x + b), \quad \nabla_x \leftarrow n^{-1/2} W^T \nabla_y, \quad
        \nabla_W \leftarrow B^{-1/2} \nabla_y x^T, \quad \nabla_b \leftarrow B^{-1/2} \textstyle\sum \nabla_y

    for n inputs and B rows (all positions of all examples). The input's gradient has the factor of the output, as the chain
    rule wants it where branches meet; it begins at (m / n)^{1/2} for m outputs.

    Args:
        in_features, out_features: n and m.
        bias: whether to add one, which begins at 0 (False, as in the authors' library).
        device, dtype: of the weight, drawn from N(0, 1) by torch's global generator.
    Raises: BadInput: for sizes that are not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library (graphcore-research/unit-scaling, 0.3.5).

    >>> layer, x = UnitLinear(256, 64), torch.randn(1000, 256)
    >>> bool((layer(x).std() - 1).abs() < 0.1), bool((layer.weight.std() - 1).abs() < 0.1)
    (True, True)
    """

    power = 0.5  # of n, forward

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        _positive(type(self).__name__, in_features=in_features, out_features=out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows m"]:
        n, m = self.in_features, self.out_features
        rows = max(1, x.numel() // n) ** -0.5
        bias = None if self.bias is None else _backward(self.bias, rows)
        y = F.linear(_backward(x, self._of_the_input(n, m)), _backward(self.weight, rows), bias)
        return _forward(y, n**-self.power)

    def _of_the_input(self, n: int, m: int) -> float:
        return n**-0.5

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class UnitReadout(UnitLinear):
    r"""The last layer, onto classes: as `UnitLinear`, with the factor 1/n forward and m^{-1/2} for the input's gradient.

    Its outputs begin at n^{-1/2}, so small that the loss begins at that of guessing whatever the width.

    Args:
        in_features, out_features, bias, device, dtype: as of `UnitLinear`.
    Raises: BadInput: for sizes that are not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library.

    >>> bool((UnitReadout(256, 64)(torch.randn(1000, 256)).std() * 16 - 1).abs() < 0.1)
    True
    """

    power = 1.0

    def _of_the_input(self, n: int, m: int) -> float:
        return m**-0.5


class UnitEmbedding(nn.Embedding):
    r"""An embedding with weights from N(0, 1), and (v / tokens)^{1/2} on the gradient of its v rows.

    Args:
        num_embeddings, embedding_dim, device, dtype: as of `nn.Embedding`.
    Raises: BadInput: for sizes that are not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library.

    >>> UnitEmbedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, device: Any = None, dtype: Any = None) -> None:
        _positive("UnitEmbedding", num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)

    def forward(self, input: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens n"]:
        return F.embedding(input, _backward(self.weight, (self.num_embeddings / max(1, input.numel())) ** 0.5))


class UnitResidual(nn.Module):
    r"""A branch beside a skip, mixed at scale one.

    .. math:: y = \frac{x + \tau f(x)}{\sqrt{1 + \tau^2}}

    with the branch's factor applied forward where it is added and backward where it leaves, so that gradients inside the
    branch are at scale one, too.

    Args:
        branch: f, its norm included.
        tau: the branch's weight beside the skip; `residual_taus` gives those of a transformer.
    Raises: BadInput: for a tau that is negative or not finite.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library.

    >>> UnitResidual(nn.Identity(), tau=1.0)(torch.ones(2))
    tensor([1.4142, 1.4142])
    """

    def __init__(self, branch: nn.Module, tau: float = 1.0) -> None:
        super().__init__()
        if not 0 <= tau < math.inf:
            raise BadInput(f"UnitResidual needs a tau of at least 0, got {tau}")
        self.branch, self.tau = branch, tau

    def forward(self, x: Tensor) -> Tensor:
        skip = (1 + self.tau**2) ** -0.5
        inside = self.branch(_backward(x, self.tau * skip))
        return _forward(inside, self.tau * skip) + x * skip

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}"


def residual_taus(layers: int, *, residual: float = 1.0, attention: float = 1.0) -> list[float]:
    r"""The tau of each branch of a transformer: attention and feed-forward by turns, 2 a layer.

    Each attention branch ends with the same share in the sum, and so does each feed-forward branch. With
    a_m = R (2 / (1 + A^2))^{1/2} and a_a = A a_m, branch i of 2L has

    .. math:: \tau_i = \frac{a_i}{\sqrt{L + \lceil i/2 \rceil a_a^2 + \lfloor i/2 \rfloor a_m^2}}

    Args:
        layers: L.
        residual: R, the size of all branches together beside the embedding's (1, the default of paper and library).
        attention: A, that of attention beside the feed-forward one (1, likewise).
    Returns: 2L numbers, from the first branch on.
    Raises: BadInput: for numbers that are not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465, appendix G; as in the authors' library.

    >>> [round(tau, 4) for tau in residual_taus(2)]
    [0.7071, 0.5774, 0.5, 0.4472]
    """
    _positive("residual_taus", layers=layers, residual=residual, attention=attention)
    feed = residual * (2 / (1 + attention**2)) ** 0.5
    attend = attention * feed
    before = [layers + (i + 1) // 2 * attend**2 + i // 2 * feed**2 for i in range(2 * layers)]
    return [(feed if i % 2 else attend) / b**0.5 for i, b in enumerate(before)]


def unit_gelu(x: Tensor, *, mult: float = 1.0) -> Tensor:
    r"""GELU at scale one, with the slope of its bend as a setting: c GELU(s x) / s.

    c lies between 2 (s to 0) and (2 / (1 - 1/pi))^{1/2} (s to infinity), interpolated in the logarithm at 1 / (1 + 1 / (4 s^2)), and is
    applied to the gradient too. It is fitted, and right to about 5%.

    Args:
        x: what comes in, at scale one.
        mult: s (1).
    Returns: of the shape of `x`.
    Raises: BadInput: for a mult that is not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library.

    >>> bool((unit_gelu(torch.randn(10000)).std() - 1).abs() < 0.1)
    True
    """
    _positive("unit_gelu", mult=mult)
    c = _between(1 / (1 + 0.25 / mult**2), 2.0, (2 / (1 - 1 / math.pi)) ** 0.5)
    return F.gelu(x * mult) * (c / mult)


def unit_silu_glu(x: Tensor, gate: Tensor, *, mult: float = 1.0) -> Tensor:
    r"""The gated unit x g sigmoid(s g) at scale one, times c between 2 (s to 0) and 2^{1/2}, at 1 / (1 + 1 / s^2).

    Args:
        x, gate: of one shape, at scale one.
        mult: s (1).
    Returns: of the shape of `x`.
    Raises: BadInput: for a mult that is not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library.

    >>> bool((unit_silu_glu(torch.randn(10000), torch.randn(10000)).std() - 1).abs() < 0.15)
    True
    """
    _positive("unit_silu_glu", mult=mult)
    return x * gate * torch.sigmoid(gate * mult) * _between(1 / (1 + mult**-2), 2.0, 2**0.5)


def unit_attention(
    query: Float[Tensor, "*batch q d"],
    key: Float[Tensor, "*batch n d"],
    value: Float[Tensor, "*batch n d"],
    *,
    is_causal: bool = False,
    mult: float = 1.0,
) -> Float[Tensor, "*batch q d"]:
    r"""Scaled dot-product attention at scale one: logits s q'k / d, and not d^{-1/2}; the output divided by its fitted scale.

    .. math:: g = 1^{a} \, (L_n^{1/2})^{1 - a}, \quad a = \frac{1}{1 + 4d / s^2}, \quad
        L_n = \ln(n) / n \ (causal), \ 1 / n \ (else)

    Args:
        query, key, value: heads last but two, at scale one.
        is_causal: whether a position sees only itself and those before.
        mult: s (1).
    Returns: of the shape of `query` (with the width of `value`).
    Raises: BadInput: for a mult that is not positive, and causal attention over fewer than two positions.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library.

    >>> q, k, v = torch.randn(3, 8, 128, 16).unbind(0)
    >>> bool((unit_attention(q, k, v, is_causal=True).std() - 1).abs() < 0.2)
    True
    """
    _positive("unit_attention", mult=mult)
    n, d = value.shape[-2:]
    if is_causal and n < 2:
        raise BadInput(f"unit_attention needs at least two positions where it is causal, got {n}")
    scale = _between(1 / (1 + 4 * d / mult**2), ((math.log(n) if is_causal else 1) / n) ** 0.5, 1.0)
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=mult / d) / scale


def unit_cross_entropy(
    logits: Float[Tensor, "*rows v"], target: Int[Tensor, "*rows"], *, mult: float = 1.0
) -> Float[Tensor, ""]:
    r"""Mean cross-entropy forward; backward the gradient of the sum, times v / (v - 1)^{1/2}, which is at scale one.

    The loss is that of `F.cross_entropy`; gradients are not divided by the number of rows, so that Adam's epsilon and a
    clipping threshold mean something else than elsewhere. Targets of -100 are left out.

    Args:
        logits: of v classes.
        target: the classes.
        mult: a factor on the logits, the inverse of a temperature (1).
    Returns: a scalar.
    Raises: BadInput: for fewer than two classes, targets of another shape than the rows, or a mult that is not positive.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library, which divides by all rows where targets are left
        out; here by those that are not.

    >>> logits = torch.zeros(4, 2, requires_grad=True)
    >>> loss = unit_cross_entropy(logits, torch.tensor([0, 1, 0, 1]))
    >>> loss.backward()
    >>> round(loss.item(), 4), logits.grad[0]
    (0.6931, tensor([-1.,  1.]))
    """
    _positive("unit_cross_entropy", mult=mult)
    v = logits.shape[-1]
    if v < 2 or target.shape != logits.shape[:-1]:
        raise BadInput(
            f"unit_cross_entropy needs at least two classes and a target a row, got logits of {tuple(logits.shape)} and "
            f"targets of {tuple(target.shape)}"
        )
    logits, target = _forward(_backward(logits, v / (v - 1) ** 0.5), mult).reshape(-1, v), target.reshape(-1)
    total = F.cross_entropy(logits, target, reduction="sum")
    return total - total.detach() + F.cross_entropy(logits.detach(), target)


def u_mup_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    r"""Parameter groups for Adam or AdamW whose rates follow the width.

    The rate of a hidden weight and of an embedding is lr n^{-1/2} (n the inputs, of an embedding its width), that of the readout,
    biases and norms lr. Parameters inside `UnitResidual` get L^{-1/2} besides, L half the number of these: a transformer's layers,
    of two branches each. Decay is independent of the rate: a group's is weight_decay over its rate, so that AdamW takes
    weight_decay times the schedule off a weight in a step.

    Args:
        model: made of the layers of this module; norms and other vectors may be torch's own.
        lr: the rate, found on a narrow model.
        weight_decay: what a step takes off a weight (0).
    Returns: one group a rate, each with its `lr` and `weight_decay`, as torch's optimizers take them.
    Raises: BadInput: for a rate that is not positive, a negative decay, or a matrix parameter that is not of this module's layers:
        its scale would not be one.
    Paper: Blake et al. 2024, arXiv 2407.17465; factors as in the authors' library, which counts the depth from containers of its own.

    >>> net = nn.Sequential(UnitLinear(64, 64), UnitReadout(64, 10))
    >>> [group["lr"] for group in u_mup_groups(net, lr=1.0)]
    [0.125, 1.0]
    """
    _positive("u_mup_groups", lr=lr)
    if not weight_decay >= 0:
        raise BadInput(f"u_mup_groups needs a weight_decay of at least 0, got {weight_decay}")
    branches = [m for m in model.modules() if isinstance(m, UnitResidual)]
    inside = {id(p) for b in branches for p in b.parameters()}
    depth = max(1.0, len(branches) / 2) ** -0.5
    width = {}
    for m in model.modules():
        if isinstance(m, UnitReadout):
            width[id(m.weight)] = 1.0
        elif isinstance(m, UnitLinear):
            width[id(m.weight)] = m.in_features**-0.5
        elif isinstance(m, UnitEmbedding):
            width[id(m.weight)] = m.embedding_dim**-0.5
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.ndim > 1 and id(p) not in width:
            raise BadInput(
                f"u_mup_groups knows no rate for {name}, a {tuple(p.shape)} of a layer that is not at unit scale"
            )
        rate = lr * width.get(id(p), 1.0) * (depth if id(p) in inside else 1.0)
        groups.setdefault(rate, []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": weight_decay / rate} for rate, ps in groups.items()]

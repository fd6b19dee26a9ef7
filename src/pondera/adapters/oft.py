"""OFTv2: turn a layer's input by a block-diagonal rotation, without ever making the large matrix."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pondera.adapters._base import (
    NO_SUM,
    AdapterConfig,
    AdapterLayer,
    AdapterModel,
    InputRotation,
    fusable,
    gradients_of,
)
from pondera.adapters._register import register
from pondera.errors import BadInput
from pondera.linalg.cayley import cayley, skew


@dataclass
class OftConfig(AdapterConfig):
    r"""OFTv2: the input is turned block by block, each block of b features by its own rotation.

    .. math:: y = W (x R) + b, \quad R = \mathrm{diag}(R_1, \dots, R_{n/b}), \quad R_i = (I + Q_i)(I - Q_i)^{-1}

    with the Q_i skew-symmetric and 0 at the start, n (b - 1) / 2 trained numbers. The cost a row is O(n b) beside the
    layer's own O(n out), where the older OFT builds W R, O(n^2 out). A convolution's input is turned channel by channel
    at every position, which merges exactly for any kernel.

    PEFT's `OFTConfig` is the same method for linear layers. It differs in this: its convolutions with kernels above
    1 x 1 are not the identity at the start; its exact and its Neumann transform are inverses of each other (the exact one
    turns by -Q); its default, 5 terms of the series, is less orthogonal than 4 or 6 (`pondera.linalg.cayley.cayley`), at
    the price of 6; a block size that does not divide the layer is changed with a warning.

    Args:
        block_size: b; must divide the layer's number of inputs, for a convolution its channels (PEFT's default 32).
        terms: 0 inverts exactly, the default here; the paper's Cayley-Neumann keeps this many powers of Q, at least 2, of
            the inverse's Neumann series (PEFT's default 5, take 6). The series diverges once a block's spectral norm
            passes 1, which training at a good rate does; R is then no rotation. On a CPU it saves nothing.
    Raises: BadInput: for a block size that does not divide the layer's inputs, or terms of 1 or below 0.
    Paper: Qiu et al. 2025, arXiv 2506.19847 (abstract) and PEFT, where the authors' method lives.

    >>> import peft
    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> x = torch.randn(2, 8)
    >>> before = net(x)
    >>> tuned = peft.get_peft_model(net, OftConfig(block_size=4, target_modules=["0"]))
    >>> torch.equal(tuned(x), before), tuned.get_nb_trainable_parameters()[0]
    (True, 12)
    """

    block_size: int = field(default=32, metadata={"help": "features turned together"})
    terms: int = field(default=0, metadata={"help": "powers in the Cayley-Neumann series; 0 inverts exactly"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.terms < 0 or self.terms == 1:
            raise BadInput(f"OftConfig needs terms of at least 2, or 0 for the exact transform; got {self.terms}")

    @classmethod
    def tuner(cls) -> type[AdapterModel]:
        return OftModel


class BlockRotation(InputRotation):
    """R = diag(R_1, ..., R_k), each R_i the Cayley transform of a skew matrix of b (b - 1) / 2 trained numbers."""

    def __init__(self, weight: Float[Tensor, "out n"], config: OftConfig) -> None:
        super().__init__()
        n, self.b = weight.shape[1], config.block_size
        if not isinstance(self.b, int) or self.b < 1 or n % self.b:
            near = sorted((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - self.b))[:2]
            raise BadInput(f"OFT needs a block_size that divides {n}, the inputs, such as {near}; got {self.b}")
        self.terms = config.terms or None
        self.q = nn.Parameter(torch.zeros(n // self.b, self.b * (self.b - 1) // 2, dtype=weight.dtype))

    def blocks(self) -> Float[Tensor, "k b b"]:
        q = self.q.to(torch.promote_types(self.q.dtype, torch.float32))  # no solver works in half precision
        return cayley(skew(q, self.b), self.terms)

    def forward(self, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        if self.terms is None and self.b > 1 and fusable(x, self.q):
            return _Turn.apply(self.q, x, self.b)
        return _rows(x, self.blocks())

    def merged(self, weight: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        return _rows(weight, self.blocks().mT)


def _rows(x: Float[Tensor, "*batch n"], blocks: Float[Tensor, "k b b"]) -> Float[Tensor, "*batch n"]:
    by_block = x.unflatten(-1, blocks.shape[:2])
    return torch.einsum("...kb,kbc->...kc", by_block, blocks.to(x.dtype)).flatten(-2)


class _Turn(torch.autograd.Function):
    r"""x R for the exact transform by one inverse a block, :math:`M = (I - Q)^{-1}`, which serves the backward as well.

    :math:`R = 2M - I`, so y = 2 x M - x. With g the gradient of y and :math:`w = g M^\top`, that of x is 2 w - g, and that of
    the entries of Q is :math:`2 M^\top x^\top w`, because :math:`dM = M \, dQ \, M`.
    """

    @staticmethod
    def forward(ctx: Any, q: Float[Tensor, "k m"], x: Float[Tensor, "*batch n"], b: int) -> Float[Tensor, "*batch n"]:
        above, eye = _constants(b, q.device, q.dtype)
        upper = q.new_zeros(len(q), b * b).scatter_(1, above.expand(len(q), -1), q).view(-1, b, b)
        inverse = _inverse(upper - upper.mT, eye)
        ctx.save_for_backward(q, x, inverse)
        y = x.new_empty(x.shape)
        for rows, out in _parts(b, x, y):
            z = torch.bmm(rows.transpose(0, 1), inverse)
            torch.lerp(rows, z.transpose(0, 1), 2.0, out=out)
            del z  # before the next part's
        return y

    @staticmethod
    def backward(ctx: Any, g: Float[Tensor, "*batch n"]) -> Any:
        q, x, inverse = ctx.saved_tensors
        b = inverse.shape[-1]
        if torch.is_grad_enabled():
            plain = lambda q, x: _rows(x, cayley(skew(q, b)))  # noqa: E731
            return *gradients_of(plain, (q, x), ctx.needs_input_grad[:2], g), None
        gx, product = x.new_empty(x.shape), None
        for rows, back, out in _parts(b, x, g, gx):
            w = torch.bmm(back.transpose(0, 1), inverse.mT)
            torch.lerp(back, w.transpose(0, 1), 2.0, out=out)
            xw = torch.bmm(w.mT, rows.transpose(0, 1))  # transposed: x^T w would read down the columns of both
            product = xw if product is None else product.add_(xw)
            del w, xw
        gq = torch.bmm(product, inverse)
        above, _ = _constants(b, q.device, q.dtype)
        return (gq.mT - gq).flatten(1).index_select(1, above).mul_(2), gx, None


def _parts(b: int, *tensors: Float[Tensor, "*batch n"]) -> Iterable[tuple[Float[Tensor, "rows k b"], ...]]:
    """The same rows of every tensor, by blocks; on a CPU a megabyte at a time, which its cache keeps for the next step."""
    n = tensors[0].shape[-1]
    tensors = tuple(x.reshape(-1, n // b, b) for x in tensors)
    size = n * tensors[0].element_size()
    if tensors[0].device.type != "cpu" or len(tensors[0]) * size <= 2**20:
        return (tensors,)
    return zip(*(x.split(max(1, 2**20 // size)) for x in tensors))


@functools.lru_cache(maxsize=16)
def _constants(b: int, device: torch.device, dtype: torch.dtype) -> tuple[Int[Tensor, " m"], Float[Tensor, "b b"]]:
    """Where the numbers above the diagonal lie in a flat block, and the identity."""
    row, column = torch.triu_indices(b, b, 1, device=device)
    return row * b + column, torch.eye(b, device=device, dtype=dtype)


def _inverse(q: Float[Tensor, "k b b"], eye: Float[Tensor, "b b"]) -> Float[Tensor, "k b b"]:
    r""":math:`(I - Q)^{-1}` to rounding: by a solver, or, where that is faster, by products.

    It is :math:`(I + Q) P^{-1}` with :math:`P = I - Q^2 = I + S`. S has its eigenvalues in pairs, so none is above
    :math:`s = \lVert S \rVert_F / \sqrt 2`. With c = 2 / (2 + s), :math:`T = I - c P` has the norm s / (2 + s) at most, and
    :math:`P^{-1} = c \, (I + T)(I + T^2)(I + T^4) \cdots`, of which n factors leave :math:`T^{2^n}` out.
    """
    if q.device.type != "cpu":
        return torch.linalg.inv_ex(eye - q).inverse  # never singular, and nothing waits for the device
    if q.dtype != torch.float32 or not 16 <= len(eye) <= 128:  # there a solver is faster
        return torch.linalg.inv(eye - q)
    square = torch.bmm(q, q.mT)
    s = torch.linalg.vector_norm(square, dim=(1, 2)).max().item() / 2**0.5
    if not s < 6:  # more than six factors; NaN too
        return torch.linalg.inv(eye - q)
    c, tiny = 2 / (2 + s), 2.0**-25
    t = torch.sub((1 - c) * eye, square, alpha=c)
    found = torch.add(eye, q).mul_(c)
    found = torch.baddbmm(found, found, t)
    for _ in range(math.ceil(math.log2(math.log(tiny) / math.log(s / (2 + s)))) - 1 if s > tiny else 0):
        t = torch.bmm(t, t)
        found = torch.baddbmm(found, found, t)
    return found


class OftLayer(AdapterLayer):
    """A layer with OFTv2 adapters."""

    adapter_layer_names = ("pondera_oft_core",)
    core = BlockRotation


class OftModel(AdapterModel):
    """A model with OFTv2 adapters; made by `peft.get_peft_model`."""

    prefix = "pondera_oft_"
    tuner_layer_cls = OftLayer
    paper_name = "OFT"
    no_sum = NO_SUM


register(OftConfig, OftModel)

"""OFTv2: turn a layer's input by a block-diagonal rotation, without ever making the large matrix."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.adapters._base import AdapterConfig, AdapterLayer, AdapterModel, InputRotation
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
            passes 1, which training at a good rate does; R is then no rotation. On a CPU it saves a tenth at 64 tokens.
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
        return self._rows(x, self.blocks())

    def merged(self, weight: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        return self._rows(weight, self.blocks().mT)

    def _rows(self, x: Tensor, blocks: Float[Tensor, "k b b"]) -> Tensor:
        by_block = x.unflatten(-1, blocks.shape[:2])
        return torch.einsum("...kb,kbc->...kc", by_block, blocks.to(x.dtype)).flatten(-2)


class OftLayer(AdapterLayer):
    """A layer with OFTv2 adapters."""

    adapter_layer_names = ("pondera_oft_core",)
    core = BlockRotation


class OftModel(AdapterModel):
    """A model with OFTv2 adapters; made by `peft.get_peft_model`."""

    prefix = "pondera_oft_"
    tuner_layer_cls = OftLayer
    paper_name = "OFT"


register(OftConfig, OftModel)

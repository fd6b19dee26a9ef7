"""Weights on a grid of few bits: rounding to nearest, with a scale a row or a group; a weight of its own bits a layer."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pondera._weights import Owned, require_owned
from pondera.compress._report import CompressReport, LayerChange, applied
from pondera.errors import BadInput, require_finite

SCALE_BITS = 16


@dataclass(frozen=True)
class Quantised:
    """A weight on a symmetric grid: w = scale * codes, codes from -(2^(b-1) - 1) to 2^(b-1) - 1 (int8), a scale a group."""

    codes: Int[Tensor, "out groups size"]
    scale: Float[Tensor, "out groups 1"]
    bits: int
    shape: tuple[int, ...]

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The weight, in the scale's dtype."""
        w = (self.codes.to(self.scale.dtype) * self.scale).flatten(1)
        n = 1
        for size in self.shape[1:]:
            n *= size
        return w[:, :n].reshape(self.shape)

    @property
    def storage(self) -> int:
        """Bits of storage: codes and scales of 16 bits."""
        n = 1
        for size in self.shape:
            n *= size
        return n * self.bits + self.scale.numel() * SCALE_BITS


def require_bits(bits: object, who: str) -> int:
    """A whole number of 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise BadInput(f"{who} needs bits of 2 to 8, a whole number, got {bits!r}")
    return bits


def quantize_tensor(
    weight: Float[Tensor, "out *rest"], bits: int = 4, *, group: int | None = None, clip: float = 1.0
) -> Quantised:
    r"""Round a weight to the nearest of 2^b - 1 equally spaced values, symmetric about 0.

    .. math:: s = c \max|w| / (2^{b-1} - 1), \qquad q = \mathrm{clamp}(\mathrm{round}(w / s))

    with the maximum over a row, or over each `group` of entries within a row.

    Args:
        weight: a row an output unit.
        bits: b, 2 to 8.
        group: entries of a row that share a scale; None: the whole row. The last group of a row may be shorter.
        clip: c, the share of the largest entry that the grid reaches.
    Returns: the codes and scales (float32, or float64 for a float64 weight).
    Raises: BadInput: for bits or a group out of range, or a weight with NaN.

    >>> quantize_tensor(torch.tensor([[1.0, -0.4, 0.2]]), 2).dequantize()
    tensor([[1., 0., 0.]])
    """
    require_bits(bits, "quantize_tensor")
    require_finite(weight, "quantize_tensor", "weight")
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 1):
        raise BadInput(f"quantize_tensor needs groups of at least 1 entry, got {group!r}")
    if not 0 < clip <= 1:
        raise BadInput(f"quantize_tensor needs a clip above 0 and at most 1, got {clip!r}")
    rows = weight.detach().flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    size = min(group or rows.shape[1], rows.shape[1])
    rows = nn.functional.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))
    top = 2 ** (bits - 1) - 1
    scale = (clip / top) * rows.abs().amax(dim=2, keepdim=True)
    codes = (rows / scale.where(scale > 0, 1)).round().clamp(-top, top).to(torch.int8)
    return Quantised(codes, scale, bits, tuple(weight.shape))


@applied("end")
@torch.no_grad()
def quantize(
    model: nn.Module, bits: int | Mapping[str, int] = 4, *, group: int | None = None, clip: float = 1.0
) -> CompressReport:
    """Round every weight of linear and convolution layers to the nearest on its grid, in place: the baseline of quantisers.

    The weights stay tensors of their dtype that hold values of the grid ("fake quantised"): the model runs anywhere, and
    the report counts the storage that packed codes would take.

    Args:
        model: changed in place; biases, norms and embeddings stay.
        bits: 2 to 8, or by the weight's name in the state dict; weights not named stay.
        group, clip: as in `quantize_tensor`.
    Raises: BadInput: for bits out of range, a name the model lacks, weights with NaN; nothing is changed then.

    >>> net = nn.Linear(8, 2)
    >>> report = quantize(net, 3)
    >>> report.layers[0].bits, len(net.weight[0].unique()) <= 7
    (80.0, True)
    """
    weights = quantisable(model, "quantize")
    wanted = dict.fromkeys(weights, bits) if not isinstance(bits, Mapping) else dict(bits)
    if unknown := [name for name in wanted if name not in weights]:
        raise BadInput(f"quantize found no weight {unknown[0]!r}; there are {', '.join(list(weights)[:6])}")
    done = {
        name: quantize_tensor(weights[name].read(), require_bits(b, "quantize"), group=group, clip=clip)
        for name, b in wanted.items()
    }
    rows = []
    for name, one in weights.items():
        w = one.read().detach()
        was = float(w.numel() * w.element_size() * 8)
        if name not in done:
            rows.append(LayerChange(name, "kept", tuple(w.shape), w.numel(), was, was))
            continue
        new = done[name].dequantize().to(w.dtype)
        error = float((new - w).norm() / w.norm()) if w.norm() else 0.0
        facts = {"bits": done[name].bits}
        rows.append(
            LayerChange(
                name, "quantised", tuple(w.shape), w.numel(), float(done[name].storage), was, error, "weight", facts
            )
        )
        one.write(new)
    return CompressReport("quantize", rows)


def quantisable(model: nn.Module, who: str) -> dict[str, Owned]:
    """The weights a quantiser owns (`pondera._weights`), by name. Raises: BadInput: if there are none, or one holds NaN."""
    found = {one.name: one for one in require_owned(model, who)}
    for name, one in found.items():
        require_finite(one.read(), who, f"weight {name}")
    return found

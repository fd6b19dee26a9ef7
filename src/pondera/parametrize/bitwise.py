"""Bit-wise weights: integers whose single bits are trained, with room for a file in the bits that are not."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput, describe, require_finite, require_matrix

MOST = 32
LENGTH = 8  # bytes that say how long the stored file is


class Bitwise(nn.Module):
    r"""A weight as an integer of B bits, each with a trained number of its own, for `torch.nn.utils.parametrize`.

    Latents :math:`x_0, \dots, x_{B-2}` stand for the magnitude, least significant first, and :math:`x_{B-1}` for the sign
    (positive: a negative weight). With bit(x) = 1 where x > 0, else 0,

    .. math:: k = (-1)^{\mathrm{bit}(x_{B-1})} \sum_{i=0}^{B-2} 2^i \, \mathrm{bit}(x_i), \qquad w = \alpha k

    with one number alpha a layer, fixed when the weight is registered. Gradients go straight through, whatever the size of
    a latent: d bit / dx = 1 and d sign / dx = -1, so

    .. math:: \frac{\partial L}{\partial x_i} = \alpha \, 2^i \operatorname{sign} \frac{\partial L}{\partial w}, \qquad
              \frac{\partial L}{\partial x_{B-1}} = -\alpha \, |k| \, \frac{\partial L}{\partial w}

    Bits that are not trained are kept as bits, not as latents: they cost no gradient or optimizer state, no decay or
    averaging touches them, and they can hold any bytes: `store` and `stored`.

    What to know: latents take the memory of the weight times the bits trained, and the optimizer's state as often. Under
    SGD the top bit moves 2^(B-2) times faster than the lowest; Adam, which the authors use, moves all about equally fast.
    Weights that are zero come about by training alone.

    Args:
        bits: B, 2 to 32. The default is the authors' code's.
        trainable_bits: which are trained, as the authors write it: a character a bit, least significant first, the sign
            last. ``"000111"`` trains the sign and the two top bits of the magnitude. All by default.
        random: registering draws the paper's start in place of the weight: latents from N(0, a^2) with a = sqrt(2 / (B fan_in)),
            those of signs from N(0, 2 / fan_in) (their code cuts these off at two deviations), magnitudes of zero drawn
            again, and alpha such that w has deviation sqrt(2 / fan_in). Else the nearest weight to
            the one there is, with the alpha that errs least (our choice), and latents +-|N(0, a^2)|, as the authors' code
            has them for a weight that is given. fan_in is what one entry of the first dimension reads.
        generator: draws the latents when the weight is registered; torch's own by default, and after that.
    Shapes and types: a weight of two or more dimensions, outputs first; latents (trained bits, *weight) in its type.
        Half precisions are put together in float32. Integers beyond 2^24 are rounded as the type of the weight rounds.
    Assigning: a weight assigned later becomes the nearest held with the same alpha, cut off at alpha (2^(B-1) - 1); all bits
        are set by it, the untrained ones too, so that what was stored is lost.
    Raises: BadInput: for bits or a pattern that do not fit; at registration and assignment for a weight with NaN, with
        fewer than two dimensions, or, unless `random`, of zeros only.
    Paper: Ivan 2022, arXiv 2202.09571; by the code of its submission (iclr2022-2798/bit-wise-training). There alpha
        is found by bisection to 0.1% and never exceeds 1; here it is the ratio. There a loaded weight comes back with its
        sign turned; here it does not. Layers there have no bias; here a bias stays as it is.

    >>> from torch.nn.utils import parametrize
    >>> layer = parametrize.register_parametrization(nn.Linear(64, 32), "weight", Bitwise(8, "00000111"))
    >>> layer.parametrizations.weight.original.shape, Bitwise.room(layer)
    (torch.Size([3, 32, 64]), 1272)
    >>> Bitwise.store(layer, b"kept in the lower bits")
    >>> Bitwise.stored(layer)
    b'kept in the lower bits'
    """

    alpha: Tensor
    fixed: Tensor

    def __init__(
        self,
        bits: int = 6,
        trainable_bits: str | None = None,
        *,
        random: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= MOST:
            raise BadInput(f"Bitwise needs bits from 2 (sign and one bit of magnitude) to {MOST}, got {bits!r}")
        pattern = "1" * bits if trainable_bits is None else trainable_bits
        if not isinstance(pattern, str) or len(pattern) != bits or set(pattern) - set("01") or "1" not in pattern:
            raise BadInput(
                f"Bitwise(bits={bits}) needs trainable_bits as {bits} characters 0 or 1, least significant bit first and the "
                f"sign last, with at least one 1; got {trainable_bits!r}"
            )
        self.bits, self.pattern, self.random = bits, pattern, random
        self.trained = [i for i, c in enumerate(pattern) if c == "1"]
        self.free = [i for i, c in enumerate(pattern) if c == "0"]
        self._generator = generator
        self.register_buffer("alpha", None)
        self.register_buffer("fixed", None)

    def forward(self, latents: Float[Tensor, "trained ..."]) -> Float[Tensor, "..."]:
        x = latents if latents.dtype == torch.float64 else latents.float()
        through = x - x.detach()  # zero, with a gradient of one
        magnitude = self._magnitude(x.dtype)
        sign = 1 - 2 * (self.fixed >> (self.bits - 1) & 1).to(x.dtype)
        for at, i in enumerate(self.trained):
            bit = (x[at] > 0).to(x.dtype)
            if i == self.bits - 1:
                sign = (1 - 2 * bit) - through[at]
            else:
                magnitude = magnitude + 2.0**i * (bit + through[at])
        return (self.alpha.to(x.dtype) * (sign * magnitude)).to(latents.dtype)

    def right_inverse(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "trained ..."]:
        require_finite(require_matrix(weight, "Bitwise"), "Bitwise", "weight")
        w = weight if weight.dtype == torch.float64 else weight.float()
        first, most = self.alpha is None, 2 ** (self.bits - 1) - 1
        scale = math.sqrt(2 / (self.bits * weight[0].numel()))
        generator, self._generator = self._generator, None
        if first and self.random:
            latents = scale * self._normal((self.bits, *w.shape), w, generator)
            while (none := (latents[:-1] <= 0).all(0)).any():
                latents[:-1, none] = scale * self._normal((self.bits - 1, int(none.sum())), w, generator)
            latents[-1] *= math.sqrt(self.bits)
            on = (latents > 0).to(torch.int64)
            k = self._decoded(self._coded(on))
            alpha = math.sqrt(2 / weight[0].numel()) / k.to(w.dtype).std(correction=0)
        else:
            alpha = self._least_error(w, most) if first else self.alpha
            k = (w / alpha).round().clamp(-most, most).to(torch.int64)
            code = k.abs() | ((k < 0).to(torch.int64) << (self.bits - 1))
            on = torch.stack([code >> i & 1 for i in range(self.bits)])
            latents = (2 * on - 1) * scale * self._normal((self.bits, *w.shape), w, generator).abs()
        fixed = self._coded(on[self.free], self.free).to(torch.int32 if self.bits < MOST else torch.int64)
        if first:
            self.alpha, self.fixed = alpha, fixed
        else:
            self.fixed.copy_(fixed)
        return latents[self.trained].to(weight.dtype)

    def integers(self, latents: Float[Tensor, "trained ..."]) -> Int[Tensor, "..."]:
        """The integers k, by the latents: ``held.weight[0].integers(held.weight.original)`` with `held` the parametrizations."""
        on = (latents.detach() > 0).to(torch.int64)
        return self._decoded(self._coded(on, self.trained) | self.fixed.to(torch.int64))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, trainable_bits={self.pattern!r}"

    @staticmethod
    def room(model: nn.Module) -> int:
        """How many bytes the untrained bits of a layer or model can hold, beside the length of what is stored."""
        return max(0, sum(h.fixed.numel() * len(h.free) for h in _held(model)) // 8 - LENGTH)

    @staticmethod
    @torch.no_grad()
    def store(model: nn.Module, data: bytes) -> None:
        """Write `data` into the untrained bits of a layer or model, in the order of its weights.

        What training does to the other bits leaves it there. It is saved with the state dict, goes with a copy, and is lost
        when a weight is assigned or the parametrization removed.

        Raises: BadInput: if there is no room for so much, or `data` is not bytes; the bits are then as they were.
        """
        if not isinstance(data, (bytes, bytearray)):
            raise BadInput(f"Bitwise.store needs bytes, got {type(data).__name__}")
        there = Bitwise.room(model)
        if len(data) > there:
            raise BadInput(
                f"Bitwise.store has room for {there} bytes in the untrained bits of this model, got {len(data)}"
            )
        raw = torch.frombuffer(bytearray(len(data).to_bytes(LENGTH, "little") + data), dtype=torch.uint8)
        stream = _unpacked(raw)
        for held in _held(model):
            now = _free_bits(held)
            mine, stream = stream[: now.numel()], stream[now.numel() :]
            bits = now.flatten()
            bits[: len(mine)] = mine.to(bits.device)
            held.fixed.copy_(held._coded(bits.view_as(now), held.free))

    @staticmethod
    @torch.no_grad()
    def stored(model: nn.Module) -> bytes:
        """What `store` wrote into a layer or model.

        Raises: BadInput: if the bits do not begin with a length that fits, as when nothing was stored.
        """
        bits = [_free_bits(held).flatten().cpu() for held in _held(model)]
        raw = _packed(torch.cat(bits)) if bits else b""
        length = int.from_bytes(raw[:LENGTH], "little")
        if length > Bitwise.room(model) or len(raw) < LENGTH:
            raise BadInput("Bitwise.stored found nothing stored in the untrained bits of this model")
        return raw[LENGTH : LENGTH + length]

    # -- inside -------------------------------------------------------------------------------------------------------

    def _magnitude(self, dtype: torch.dtype) -> Tensor:
        return (self.fixed & (2 ** (self.bits - 1) - 1)).to(dtype)

    def _coded(self, on: Int[Tensor, "some ..."], which: list[int] | None = None) -> Int[Tensor, "..."]:
        """Bits as one number, each at its place; `which` bits they are, all by default."""
        code = torch.zeros(on.shape[1:], dtype=torch.int64, device=on.device)
        for one, i in zip(on, range(self.bits) if which is None else which, strict=True):
            code |= one.to(torch.int64) << i
        return code

    def _decoded(self, code: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        magnitude = code & (2 ** (self.bits - 1) - 1)
        return torch.where(code >> (self.bits - 1) & 1 == 1, -magnitude, magnitude)

    def _normal(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)

    def _least_error(self, w: Tensor, most: int) -> Tensor:
        """The alpha of 46 between a tenth of what reaches the largest weight and that, with the least squared error."""
        largest = w.abs().max() / most
        if not largest > 0:
            raise BadInput(
                f"Bitwise has no scale for a {describe(w)} of zeros; start it at other numbers, or draw it with random=True"
            )
        tried = largest * torch.linspace(0.1, 1, 46, dtype=w.dtype, device=w.device)
        errors = torch.stack([((w / a).round().clamp(-most, most) * a - w).square().sum() for a in tried])
        return tried[errors.argmin()]


def _held(model: nn.Module) -> Iterator[Bitwise]:
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            yield from (one for one in module if isinstance(one, Bitwise))


def _free_bits(held: Bitwise) -> Int[Tensor, "free ..."]:
    return torch.stack([held.fixed.to(torch.int64) >> i & 1 for i in held.free]) if held.free else held.fixed[:0]


def _unpacked(raw: Tensor) -> Tensor:
    return (raw[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()


def _packed(bits: Tensor) -> bytes:
    bits = bits[: len(bits) // 8 * 8].view(-1, 8)
    return bytes((bits << torch.arange(8)).sum(1).to(torch.uint8).numpy())

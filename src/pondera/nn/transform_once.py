"""Transform Once (T1): learn an operator between fields in the frequency domain, with one transform for all layers."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, describe, nearest, require_float
from pondera.linalg import dct_matrix
from pondera.nn._state_space import require_size

STARTS = ("variance_preserving", "kept_modes")


@torch.no_grad()
def variance_preserving_(
    weight: Float[Tensor, "in out *modes"], points: int, *, generator: Generator | None = None
) -> Float[Tensor, "in out *modes"]:
    r"""Fill the weights of a frequency layer, in place, so that a white field keeps its variance.

    .. math:: W \sim N\Bigl(0,\; \frac{1}{\text{in}} \, \frac{N}{M}\Bigr)

    Of the N = `points` coefficients of a white field (orthonormal transform, all of equal variance) the layer keeps the M of
    its weight and puts 0 for the others; the factor N / M makes up for these. A smooth field has its energy in the kept modes,
    and comes out N / M times as large.

    Args:
        weight: one matrix (in, out) for each kept mode.
        points: of the grid, at least M.
        generator: torch's default one otherwise.
    Returns: `weight`.
    Raises: BadInput: for a weight without modes, or fewer points than modes.
    Paper: Poli, Massaroli, Berto, Park, Dao, Ré and Ermon 2022, arXiv 2211.14453 (the rule as in the authors' code,
        DiffEqML/kairos, `weight_init` 2 for the cosine transform).

    >>> w = variance_preserving_(torch.empty(8, 8, 4, 4), points=256)
    >>> 1.3 < w.std() < 1.55  # sqrt(256 / 16 / 8)
    tensor(True)
    """
    require_float(weight, "variance_preserving_")
    if weight.ndim < 3 or not weight.numel():
        raise BadInput(f"variance_preserving_ needs a weight (in, out, *modes), got a {describe(weight)}")
    M = math.prod(weight.shape[2:])
    require_size(points, "variance_preserving_", "points", least=M)
    return weight.normal_(0, math.sqrt(points / M / weight.shape[0]), generator=generator)


class T1Layer(nn.Module):
    r"""One layer on coefficients ``(*, width, *modes)``, one or two dimensions of modes:

    .. math:: z \leftarrow z + S_2 \, S_1 \, \sin(W z)

    W has a matrix over the channels for every mode; S_k, one for each dimension, has a matrix over its modes for every channel.

    Args:
        width: channels.
        modes: kept in each dimension.
        points: of the grid, for the variance-preserving start of W; None for a start that keeps the variance of the kept
            modes, 1 / width. Each S_k starts at variance 1 / modes.
        device, dtype: as in `nn.Linear`.
    Raises: BadInput: for sizes out of range; in use for another shape, or less than float32.
    Paper: Poli et al. 2022, arXiv 2211.14453, as in the authors' code (DiffEqML/kairos, T1Layer2d, `transform="dct"`, with its
        residual and its sine).

    >>> T1Layer(4, (6, 5))(torch.zeros(2, 4, 6, 5)).shape
    torch.Size([2, 4, 6, 5])
    """

    def __init__(
        self,
        width: int,
        modes: Sequence[int],
        points: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.modes = require_size(width, "T1Layer", "width"), _grid(modes, "T1Layer", "modes")
        self.points = points
        if points is not None:
            require_size(points, "T1Layer", "points", least=math.prod(self.modes))
        _not_half(dtype, "T1Layer")
        self.channel_mixing = nn.Parameter(torch.empty(width, width, *self.modes, device=device, dtype=dtype))
        self.spatial_mixing = nn.ParameterList(
            nn.Parameter(torch.empty(width, m, m, device=device, dtype=dtype)) for m in self.modes
        )
        if not self.channel_mixing.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start again, from torch's default generator."""
        points = math.prod(self.modes) if self.points is None else self.points
        variance_preserving_(self.channel_mixing, points)
        for S in self.spatial_mixing:
            nn.init.normal_(S, std=S.shape[-1] ** -0.5)

    def forward(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        held = (self.width, *self.modes)
        if z.shape[-len(held) :] != held or not z.is_floating_point():
            raise BadInput(f"T1Layer needs coefficients as (*, {', '.join(map(str, held))}), got a {describe(z)}")
        _not_half(z.dtype, "T1Layer")
        with torch.autocast(z.device.type, enabled=False):
            a = torch.sin(torch.einsum("...im,iom->...om", z.flatten(-len(self.modes)), self.channel_mixing.flatten(2)))
            if len(self.modes) == 1:
                return z + torch.einsum("...cx,cpx->...cp", a, self.spatial_mixing[0])
            S1, S2 = self.spatial_mixing
            return z + S1 @ a.unflatten(-1, self.modes) @ S2.mT

    def extra_repr(self) -> str:
        return f"width={self.width}, modes={self.modes}, points={self.points}"


class T1(nn.Module):
    r"""An operator from fields to fields on a regular grid, ``(*, in_channels, *size)`` to ``(*, out_channels, *size)``.

    The input and the coordinates of the grid are lifted to `width` channels, transformed by one orthonormal cosine transform
    (DCT-II) of which the first `modes` are kept, pass all layers as coefficients (`T1Layer`) and a head, two linear maps with a
    sine between them, and are transformed back. Between the layers there is no transform.

    Only what is kept is computed: transforms are products with the first columns of the cosine matrix, of the input channels and
    not of the lifted ones (lifting and transform commute), and the head acts on the kept modes (the others stay zero in it).
    The function is that of the authors' code, which does all of it on every point.

    The sine acts on coefficients: this is no function of the field alone. On another grid than `size` coefficients are
    rescaled by the root of the ratio of points, so that a smooth field keeps its coefficients and the layer its meaning. The
    output has no modes above `modes`. Fields are taken as even at the border.

    Args:
        in_channels, out_channels: of the fields.
        modes: kept in each dimension, one or two of them. A mode k is k half waves.
        size: of the grid it is trained on.
        width: channels inside; 24.
        layers: 4 in the authors' code.
        head: channels between the head's two maps; 128 in the authors' code.
        start: ``"variance_preserving"`` (the paper's, see `variance_preserving_`) or ``"kept_modes"``, the variance of the kept
            coefficients alone, which suits smooth fields: what is kept is then not blown up by N / M.
        device, dtype: as in `nn.Linear`; float32 at least, for the sine is taken of large numbers.
    Raises: BadInput: for sizes or names out of range; in use for another number of channels or dimensions, fewer points than
        modes, or less than float32.
    Paper: Poli, Massaroli, Berto, Park, Dao, Ré and Ermon 2022, arXiv 2211.14453; structure as in the authors' code
        (DiffEqML/kairos, T1_2d with `transform="dct"`). It starts both maps of the head at 1e-8; here the last starts at zero
        and the first at variance 1 / width, so that the gradient reaches the last at once.

    >>> T1(1, 2, modes=(8, 8), size=(32, 24), width=6)(torch.zeros(5, 1, 32, 24)).shape
    torch.Size([5, 2, 32, 24])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: Sequence[int],
        size: Sequence[int],
        *,
        width: int = 24,
        layers: int = 4,
        head: int = 128,
        start: str = "variance_preserving",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        named = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "width": width,
            "layers": layers,
            "head": head,
        }
        for name, value in named.items():
            require_size(value, "T1", name)
        self.modes, self.size = _grid(modes, "T1", "modes"), _grid(size, "T1", "size")
        if len(self.modes) != len(self.size) or any(m > n for m, n in zip(self.modes, self.size)):
            raise BadInput(
                f"T1 needs as many modes as dimensions and no more modes than points, got {self.modes} for {self.size}"
            )
        if start not in STARTS:
            raise BadInput(f"T1 knows the starts {', '.join(STARTS)}, got {start!r}{nearest(str(start), STARTS)}")
        _not_half(dtype, "T1")
        self.in_channels, self.out_channels, self.start = in_channels, out_channels, start
        points = math.prod(self.size) if start == "variance_preserving" else None
        self.lift = nn.Linear(in_channels + len(self.size), width, device=device, dtype=dtype)
        self.layers = nn.Sequential(*(T1Layer(width, self.modes, points, device, dtype) for _ in range(layers)))
        self.head = nn.Linear(width, head, bias=False, device=device, dtype=dtype)
        self.last = nn.Linear(head, out_channels, bias=False, device=device, dtype=dtype)
        if not self.head.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the start again, from torch's default generator."""
        self.lift.reset_parameters()
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)
        nn.init.zeros_(self.last.weight)

    def coefficients(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the layers get: the first coefficients of the lifted field, scaled to the grid of `size`."""
        size = x.shape[-len(self.size) :]
        weight, bias = self.lift.weight.to(x.dtype), self.lift.bias.to(x.dtype)
        z = torch.einsum("oi,...im->...om", weight[:, : self.in_channels], _dct(x, self.modes).flatten(-len(size)))
        # coordinates and bias are the same for every field: transformed once
        grid = [torch.linspace(0, 1, n, dtype=x.dtype, device=x.device) for n in size]
        fixed = torch.stack([*torch.meshgrid(*grid, indexing="ij"), torch.ones(size, dtype=x.dtype, device=x.device)])
        ways = torch.cat([weight[:, self.in_channels :], bias[:, None]], 1)
        z = z + ways @ _dct(fixed, self.modes).flatten(1)
        return z.unflatten(-1, self.modes) * math.sqrt(math.prod(self.size) / math.prod(size))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        d = len(self.size)
        if x.ndim < d + 1 or x.shape[-d - 1] != self.in_channels or not x.is_floating_point():
            shape = ", ".join(["*", str(self.in_channels), *["points"] * d])
            raise BadInput(f"T1 needs real fields as ({shape}), got a {describe(x)}")
        size = x.shape[-d:]
        if any(m > n for m, n in zip(self.modes, size)):
            raise BadInput(f"T1 needs at least as many points as its modes, {self.modes}, got a grid of {tuple(size)}")
        _not_half(x.dtype, "T1")
        with torch.autocast(x.device.type, enabled=False):
            z = self.layers(self.coefficients(x)).flatten(-d)
            z = torch.einsum(
                "oh,...hm->...om", self.last.weight, torch.sin(torch.einsum("hc,...cm->...hm", self.head.weight, z))
            )
            z = z.unflatten(-1, self.modes) * math.sqrt(math.prod(size) / math.prod(self.size))
            return _inverse(z, size)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, modes={self.modes}, size={self.size}, start={self.start}"


def _columns(n: int, m: int, like: Tensor) -> Float[Tensor, "n m"]:
    return dct_matrix(n, dtype=like.dtype, device=like.device)[:, :m]


def _dct(x: Tensor, modes: tuple[int, ...]) -> Tensor:
    """The first coefficients over the last dimensions."""
    x = x @ _columns(x.shape[-1], modes[-1], x)
    if len(modes) == 2:
        x = _columns(x.shape[-2], modes[0], x).mT @ x
    return x


def _inverse(z: Tensor, size: Sequence[int]) -> Tensor:
    if len(size) == 2:
        z = _columns(size[0], z.shape[-2], z) @ z
    return z @ _columns(size[-1], z.shape[-1], z).mT


def _grid(value: Sequence[int], who: str, name: str) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list, torch.Size)) or len(value) not in (1, 2):
        raise BadInput(f"{who} needs {name} as a tuple of one or two whole numbers, got {value!r}")
    return tuple(require_size(n, who, name) for n in value)


def _not_half(dtype: torch.dtype | None, who: str) -> None:
    if dtype not in (None, torch.float32, torch.float64):
        raise BadInput(f"{who} needs float32 or float64, for it takes the sine of large numbers; got {dtype}")

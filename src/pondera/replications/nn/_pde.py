"""Fields that obey partial differential equations, by a classical spectral solver, and a plain Fourier neural operator."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pairs = tuple[Tensor, Tensor]  # fields at the start and at the end, (samples, 1, points)


def random_fields(samples: int, points: int, seed: int, *, length: float, even: bool) -> Tensor:
    """Gaussian fields with the spectrum of (1 + (length k)^2)^-2 on a periodic grid; `even` ones are mirrored in the middle."""
    g = torch.Generator().manual_seed(seed)
    k = torch.arange(points // 2 + 1, dtype=torch.float64)
    real, imaginary = torch.randn(2, samples, len(k), generator=g, dtype=torch.float64)
    spectrum = torch.complex(real, 0 * imaginary if even else imaginary) * (1 + (length * k) ** 2) ** -2
    if even:  # about the middle of a cell, as a cosine transform sees it
        spectrum = spectrum * torch.polar(torch.ones_like(k), math.pi * k / points)
    spectrum[:, 0] = 0
    u = torch.fft.irfft(spectrum, points)
    return u / u.std()


def march(u: Tensor, diffusion: float, other: str, time: float, steps: int) -> Tensor:
    """u_t = diffusion u_xx + other on the unit circle: Runge-Kutta of order 4 with an integrating factor, 2/3 dealiased.

    other: "advection", -(u^2 / 2)_x (Burgers); "reaction", u - u^3 times 5 (Allen-Cahn).
    """
    n = u.shape[-1]
    k = 2 * math.pi * torch.arange(n // 2 + 1, dtype=torch.float64)
    keep = torch.arange(n // 2 + 1) <= n // 3
    h = time / steps
    half = (-diffusion * k**2 * h / 2).exp()

    def rest(v: Tensor) -> Tensor:
        u = torch.fft.irfft(v, n)
        if other == "advection":
            return -0.5j * k * keep * torch.fft.rfft(u * u)
        return 5 * keep * torch.fft.rfft(u - u**3)

    v = torch.fft.rfft(u)
    for _ in range(steps):
        a = rest(v)
        b = rest(half * (v + h / 2 * a))
        c = rest(half * v + h / 2 * b)
        d = rest(half**2 * v + h * half * c)
        v = half**2 * v + h / 6 * (half**2 * a + 2 * half * (b + c) + d)
    return torch.fft.irfft(v, n)


@cache
def burgers(points: int, samples: int, seed: int) -> Pairs:
    """Burgers' equation on the circle, viscosity 0.01, from time 0 to 0.25: steep fronts have formed."""
    u = random_fields(samples, points, seed, length=0.5, even=False)
    return u.float()[:, None], march(u, 0.01, "advection", 0.25, 250).float()[:, None]


@cache
def allen_cahn(points: int, samples: int, seed: int) -> Pairs:
    """The Allen-Cahn equation without flux at either end, diffusion 0.002, from time 0 to 0.5, on half of a mirrored grid."""
    u = random_fields(samples, 2 * points, seed, length=0.25, even=True)
    return u[:, None, :points].float(), march(u, 0.002 / 4, "reaction", 0.5, 100)[:, None, :points].float()


class FNO(nn.Module):
    """The Fourier neural operator (Li et al. 2020): in each layer a transform, a complex matrix for each kept mode, its inverse,
    a pointwise map beside it, GELU. One or two dimensions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        modes: Sequence[int],
        *,
        width: int = 24,
        layers: int = 4,
        head: int = 128,
    ) -> None:
        super().__init__()
        self.modes, d = tuple(modes), len(modes)
        self.lift = nn.Linear(in_channels + d, width)
        # two corners of the spectrum in two dimensions
        shape = (layers, d, width, width, *self.modes)
        self.spectral = nn.Parameter(torch.randn(*shape, 2) / width**2)
        self.skips = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head, self.last = nn.Linear(width, head), nn.Linear(head, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        d = len(self.modes)
        size = x.shape[-d:]
        grid = torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij")
        x = torch.cat([x, torch.stack(grid).expand(len(x), d, *size)], 1)
        z = self.lift(x.movedim(1, -1)).movedim(-1, 1)
        for k, (weight, skip) in enumerate(zip(torch.view_as_complex(self.spectral), self.skips)):
            away = self._mixed(torch.fft.rfftn(z, dim=tuple(range(-d, 0))), weight, size)
            z = torch.fft.irfftn(away, s=size, dim=tuple(range(-d, 0))) + skip(z.movedim(1, -1)).movedim(-1, 1)
            z = F.gelu(z) if k < len(self.skips) - 1 else z
        return self.last(F.gelu(self.head(z.movedim(1, -1)))).movedim(-1, 1)

    def _mixed(self, Z: Tensor, weight: Tensor, size: Sequence[int]) -> Tensor:
        out, last = torch.zeros_like(Z), self.modes[-1]
        if len(size) == 1:
            out[..., :last] = torch.einsum("bim,iom->bom", Z[..., :last], weight[0])
        else:
            m = self.modes[0]
            for w, rows in zip(weight, (slice(0, m), slice(size[0] - m, size[0]))):
                out[:, :, rows, :last] = torch.einsum("bixy,ioxy->boxy", Z[:, :, rows, :last], w)
        return out

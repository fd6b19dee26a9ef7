"""Burgers' equation: from a periodic wave at the start to the same at time 1, at 64 points; solved here by a spectral method.

u_t + u u_x = nu u_xx on a circle of length 1, nu = 0.01, from smooth random waves; integrated in Fourier space on 256 points
with an exact step for the viscous part and fourth-order Runge-Kutta for the rest, aliases cut. The score is one minus the
relative error (root of the sum of squares), mean over waves.
"""

import math
from functools import cache

import torch
from torch import nn

settings = {"steps": 800, "batch": 32, "score": "1 - relative error"}
NU, FINE, COARSE, TIME, STEPS = 0.01, 256, 64, 1.0, 400
TRAIN, TEST = 512, 128


def build():
    return nn.Sequential(nn.Linear(COARSE, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, COARSE))


def waves(n, generator):
    """Six harmonics with random phases, falling as 1/k^2, of size about 1."""
    x = torch.arange(FINE, dtype=torch.float64) / FINE
    k = torch.arange(1, 7, dtype=torch.float64)
    size = torch.randn(n, 6, generator=generator, dtype=torch.float64) / k**1.5
    phase = 2 * math.pi * torch.rand(n, 6, generator=generator, dtype=torch.float64)
    return (size[..., None] * torch.cos(2 * math.pi * k[:, None] * x + phase[..., None])).sum(1)


def solve(u, time=TIME, steps=STEPS):
    """u at a later time, (n, points) in float64."""
    points = u.shape[-1]
    k = 2j * math.pi * torch.arange(points // 2 + 1, dtype=torch.float64)
    kept = (torch.arange(points // 2 + 1) <= points // 3).double()
    dt = time / steps
    half = (NU * (k * k).real * dt / 2).exp()

    def rhs(v):
        return -0.5 * k * kept * torch.fft.rfft(torch.fft.irfft(v, points).square())

    v = torch.fft.rfft(u)
    for _ in range(steps):  # the viscous part exactly, the rest by Runge-Kutta
        a = rhs(v)
        b = rhs(half * (v + dt / 2 * a))
        c = rhs(half * v + dt / 2 * b)
        d = rhs(half * half * v + dt * half * c)
        v = half * half * v + dt / 6 * (half * half * a + 2 * half * (b + c) + d)
    return torch.fft.irfft(v, points)


@cache
def pairs():
    u = waves(TRAIN + TEST, torch.Generator().manual_seed(0))
    apart = FINE // COARSE
    return u[:, ::apart].float(), solve(u)[:, ::apart].float()


def data():
    x, y = pairs()
    return (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])


@torch.no_grad()
def score(model, test):
    x, y = test
    return float(1 - ((model(x) - y).norm(dim=-1) / y.norm(dim=-1)).mean())

"""A second of broadband sound as a function of time: a sine network (SIREN), PSNR on unseen samples.

The sound is made here, the same every time: 8,192 samples, band-limited to 600 Hz (to a fourteenth of the sampling
rate, so that unseen samples can be known from seen ones), the largest at 1 or -1. It is the sum of the harmonics of a
gliding pitch, two chirps and three bursts of noise. Three quarters of the samples, drawn at random, are train, the rest
are test. `signal()` is the sound itself on its grid. `signals()`, for a start that learns from other sounds, are made
alike from other draws, each seen through 1,024 of its samples.
"""

import math
from itertools import pairwise

import torch
from torch import nn

settings = {"steps": 300, "batch": 1024, "optim": "Adam", "score": "PSNR in dB", "evaluations": 6}
SAMPLES, TOP = 8192, 600.0  # a second, and its highest frequency in Hz
SCORED, OTHERS, POINTS = 0, range(1, 33), 1024  # seeds of the sounds; samples of each other one
OMEGA = 30.0


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(OMEGA * x)


def build():
    widths = (1, 64, 64, 64, 1)
    layers: list[nn.Module] = []
    for i, (n, m) in enumerate(pairwise(widths)):
        linear = nn.Linear(n, m)
        bound = 1 / n if i == 0 else math.sqrt(6 / n) / OMEGA
        nn.init.uniform_(linear.weight, -bound, bound)
        layers += [linear, Sine()]
    return nn.Sequential(*layers[:-1])


def sound(seed):
    """One sound, (samples,)."""
    generator = torch.Generator().manual_seed(seed)

    def between(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    t = torch.arange(SAMPLES, dtype=torch.float64) / SAMPLES
    pitch = TOP / 9 * (1 + between(-0.3, 0.3) * t)
    phase = 2 * math.pi * pitch.cumsum(0) / SAMPLES
    harmonics = range(1, int(TOP / float(pitch.max())) + 1)  # none above TOP
    y = sum(torch.sin(k * phase + between(0, 2 * math.pi)) / k**0.5 for k in harmonics)
    for _ in range(2):
        start, end = between(TOP / 6, TOP), between(TOP / 6, TOP)
        y = y + torch.sin(2 * math.pi * (start * t + (end - start) * t.square() / 2))
    hertz = torch.fft.rfftfreq(SAMPLES, 1 / SAMPLES, dtype=torch.float64)
    for _ in range(3):
        centre, width = between(0.1, 0.9), between(0.05, 0.15)
        noise = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
        noise = noise * torch.exp(-(((t - centre) / width) ** 2))
        y = y + 3 * torch.fft.irfft(torch.fft.rfft(noise) * ((hertz > TOP / 3) & (hertz < TOP)), SAMPLES)
    return (y / y.abs().max()).float()


def coordinates():
    return torch.linspace(-1, 1, SAMPLES)[:, None]


def signal():
    """The sound, (samples, 1)."""
    return sound(SCORED)[:, None]


def signals():
    """(coordinates, values) of other sounds, at samples drawn for each."""
    x, generator = coordinates(), torch.Generator().manual_seed(0)
    drawn = [torch.randperm(SAMPLES, generator=generator)[:POINTS] for _ in OTHERS]
    return [(x[at], sound(seed)[at, None]) for at, seed in zip(drawn, OTHERS)]


def data():
    x, y = coordinates(), signal()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    seen, unseen = order[len(order) // 4 :], order[: len(order) // 4]
    return (x[seen], y[seen]), (x[unseen], y[unseen])


@torch.no_grad()
def score(model, test):
    x, y = test
    return 10 * math.log10(4 / max(float((model(x) - y).square().mean()), 1e-12))  # samples span 2

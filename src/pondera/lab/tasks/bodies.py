"""Rigid bodies: the inertia tensor of five weighted points in space, learnt from bodies that stand upright, asked of turned ones.

Bodies are flat and long, their long side within 30 degrees of the vertical in training and anywhere in the test. A net that keeps
rotations loses nothing by that; one that has to learn them does. The score is R^2 over the six entries. Validation bodies
stand upright: tuning does not see turned ones.
"""

import math

import torch
from torch import nn

settings = {"steps": 1000, "batch": 128, "score": "R^2"}
POINTS = 5


def build():
    return nn.Sequential(nn.Linear(4 * POINTS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 6))


def rotations(n, tilt, generator):
    """Turns about the vertical, then tilts by at most `tilt` about an axis in the plane; (n, 3, 3)."""
    turn = 2 * math.pi * torch.rand(n, generator=generator)
    to = 2 * math.pi * torch.rand(n, generator=generator)
    angle = tilt * torch.rand(n, generator=generator)

    def about(axis, by):
        K = torch.zeros(n, 3, 3)
        x, y, z = axis
        K[:, 0, 1], K[:, 0, 2], K[:, 1, 2] = -z, y, -x
        return torch.linalg.matrix_exp((K - K.mT) * by[:, None, None])

    zero, one = torch.zeros(n), torch.ones(n)
    return about((to.cos(), to.sin(), zero), angle) @ about((zero, zero, one), turn)


def bodies(n, tilt, generator):
    """Points and weights, (n, 5, 4), and the entries xx, yy, zz, xy, xz, yz of the inertia tensor about the origin."""
    sizes = torch.tensor([1.0, 0.3, 2.0])
    r = torch.randn(n, POINTS, 3, generator=generator) * sizes @ rotations(n, tilt, generator).mT
    m = 0.5 + torch.rand(n, POINTS, 1, generator=generator)
    I = (m * r.square().sum(-1, keepdim=True)).sum(1)[..., None] * torch.eye(3) - (m * r).mT @ r
    return torch.cat([r, m], -1), torch.stack(
        [I[:, i, j] for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))], 1
    )


def data():
    g = torch.Generator().manual_seed(0)
    (x, y), (x_test, y_test) = bodies(4000, math.pi / 6, g), bodies(2000, math.pi, g)
    scale = y.std()
    return (x.flatten(1), y / scale), (x_test.flatten(1), y_test / scale)

"""GroupRational beside the same formula by autograd, the authors' file for the CPU and GELU; GroupKAN beside splines.

Passes run in turn in one process on one thread; times are medians of CPU seconds. The authors' file (Adamdad/rational_kat_cu,
kat_rational/kat_1dgroup_torch.py) is not on PyPI, and left out where it cannot be imported.
"""

import importlib.util
import json
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._layers import compared, saved
from pondera.nn.kan import KANLinear
from pondera.nn.kat import GroupKAN, GroupRational

SHAPES = ((16, 197, 768), (8, 64, 256))


def by_autograd(layer: GroupRational, x: Tensor) -> Tensor:
    """The same steps, each of them kept."""
    a, b = layer.numerator, layer.denominator.abs().unsqueeze(-1)
    z = x.unflatten(-1, (layer.groups, -1))
    size = z.abs()
    q = 1 + size * (b[:, 0] + size * (b[:, 1] + size * (b[:, 2] + size * b[:, 3])))
    p = a[0] + z * (a[1] + z * (a[2] + z * (a[3] + z * (a[4] + z * a[5]))))
    return (p / q).flatten(-2)


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for shape in SHAPES[1 if quick else 0 :] for row in rational(shape)]
        return rows + [row for width in ((64,) if quick else (64, 256)) for row in layers(width)]
    finally:
        torch.set_num_threads(threads)


def rational(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer, x = GroupRational(8, "silu"), torch.randn(shape)

    def plain(x: Tensor) -> Tensor:
        return by_autograd(layer, x)

    kept = f"kept for backward {saved(layer, x) / 2**20:.1f} MiB beside {saved(plain, x) / 2**20:.1f} MiB"
    name = " x ".join(map(str, shape))
    found = [compared(name, "GroupRational", layer, "the same by autograd", plain, x, kept)]
    if importlib.util.find_spec("kat_rational"):
        from kat_rational.kat_1dgroup_torch import Rational_CUDA_A_1DGroup

        def theirs(x: Tensor) -> Tensor:
            return Rational_CUDA_A_1DGroup(x, layer.numerator.expand(8, -1), layer.denominator, 8)

        note = "the peer takes signed powers: another function where x is negative"
        found.append(compared(name, "GroupRational", layer, "rational_kat_cu for the CPU", theirs, x, note))
    return [*found, compared(name, "GroupRational", layer, "torch.nn.GELU", nn.GELU(), x, "what it costs")]


def layers(width: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer, x = GroupKAN(width, width), torch.rand(256, width) * 2 - 1
    linear = nn.Sequential(nn.GELU(), nn.Linear(width, width))
    name = f"{width} x {width}, batch 256"
    return [
        compared(name, "GroupKAN", layer, "pondera.nn.KANLinear", KANLinear(width, width), x, "G 5, k 3"),
        compared(name, "GroupKAN", layer, "GELU and Linear", linear, x, "what it costs"),
    ]


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))

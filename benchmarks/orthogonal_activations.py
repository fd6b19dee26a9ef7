"""Hermite, Fourier and tropical activations beside torchortho's and GELU.

Passes run in turn in one process on one thread; times are medians of CPU seconds. torchortho is left out where it is not
installed.
"""

import importlib.util
import json
from typing import Any

import torch
from torch import nn

from benchmarks._layers import compared, saved
from pondera.nn.orthogonal_activations import FourierActivation, HermiteActivation, TropicalActivation

KINDS = ((HermiteActivation, 3), (FourierActivation, 6), (TropicalActivation, 6))


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, rows = torch.randn((64, 256) if quick else (256, 1024)), []
        for kind, degree in KINDS:
            layer = kind(degree)
            name, ours = f"degree {degree}, {' x '.join(map(str, x.shape))}", kind.__name__
            if importlib.util.find_spec("torchortho"):
                import torchortho

                other = getattr(torchortho, ours)(degree)
                kept = f"kept for backward {saved(layer, x) / 2**20:.1f} MiB beside {saved(other, x) / 2**20:.1f} MiB"
                rows.append(compared(name, ours, layer, "torchortho", other, x, kept))
            rows.append(compared(name, ours, layer, "torch.nn.GELU", nn.GELU(), x, "what it costs"))
        return rows
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))

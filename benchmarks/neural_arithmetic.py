"""NMU beside torch.prod over the factors, differentiated by autograd.

Passes run in turn in one process on one thread; times are medians of CPU seconds.
"""

import json
from typing import Any

import torch
from torch import Tensor

from benchmarks._layers import compared, saved
from pondera.nn.neural_arithmetic import NMU

CASES = ((100, 2), (100, 100), (1000, 10))


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for inputs, outputs in CASES[: 1 if quick else None]:
            torch.manual_seed(0)
            layer, x = NMU(inputs, outputs), 0.5 + torch.rand(128, inputs)

            def plain(x: Tensor, layer: NMU = layer) -> Tensor:
                w = layer.weight
                return (x.unsqueeze(-2) * w + 1 - w).prod(-1)

            kept = f"kept for backward {saved(layer, x) / 2**20:.2f} MiB beside {saved(plain, x) / 2**20:.2f} MiB"
            rows.append(compared(f"{inputs} to {outputs}, batch 128", "NMU", layer, "torch.prod", plain, x, kept))
        return rows
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))

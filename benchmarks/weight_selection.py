"""What it costs to start a small model's file from a large one a few rows at a time, beside loading both models whole.

Each runs in a fresh process on one thread, in turn; the ratio is the median of neighbours'. Memory is by how much a process
grew at its peak, the pages of files that it maps included. Both write the same file; ours alone waits until it is on the disk.
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

LAYERS, BIG, SMALL, REPEATS = 16, (2048, 2048), (1024, 1024), 9

# each in a fresh process: seconds, then bytes of memory above what was there before (Linux tells a process its peak)
COMMON = """
import sys, time
from pathlib import Path
from safetensors.torch import load_file, save_file
from pondera.init._select_file import select_file
from pondera.init.weight_selection import take, uniform_indices
folder = Path(sys.argv[1])
big, small, out = (folder / f"{name}.safetensors" for name in ("big", "small", sys.argv[2]))
def ours():
    select_file(big, small, out)
def peer():
    large, start = load_file(big), load_file(small)
    for name, x in start.items():
        start[name] = take(large[name], [uniform_indices(T, S) for T, S in zip(large[name].shape, x.shape)])
    save_file(start, out)
def memory(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
began = time.perf_counter()
{"ours": ours, "peer": peer}[sys.argv[2]]()
print(time.perf_counter() - began, memory("VmHWM") - before)
"""


def measured(folder: str, which: str) -> tuple[float, float]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(
        [sys.executable, "-c", COMMON, folder, which], env=env, check=True, capture_output=True, text=True
    ).stdout.split()
    return float(said[0]), float(said[1])


def run(quick: bool = False) -> list[dict[str, Any]]:
    repeats = 1 if quick else REPEATS
    with TemporaryDirectory() as folder:
        for name, shape in (("big", BIG), ("small", SMALL)):
            state = {f"blocks.{i}.weight": torch.randn(shape) for i in range(4 if quick else LAYERS)}
            save_file(state, Path(folder) / f"{name}.safetensors")
        size = (Path(folder) / "big.safetensors").stat().st_size
        runs = [(measured(folder, "ours"), measured(folder, "peer")) for _ in range(repeats)]
    (ours, ours_peak), (peer, peer_peak) = (
        [sorted(r[side][k] for r in runs)[repeats // 2] for k in (0, 1)] for side in (0, 1)
    )
    mib = 2**20
    return [
        {
            "name": "start a small file from a large one",
            "ours": "select_file",
            "peer": "load, select, save whole models",
            "seconds_ours": ours,
            "seconds_peer": peer,
            "ratio": median(a / b for (a, _), (b, _) in runs),
            "bytes_ours": ours_peak,
            "bytes_peer": peer_peak,
            "note": f"{size / mib:.0f} MiB file; peak memory {ours_peak / mib:.0f} MiB against {peer_peak / mib:.0f} MiB",
        }
    ]


if __name__ == "__main__":
    print(*run(), sep="\n")

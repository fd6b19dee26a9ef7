"""LSUV and inspect on a model of GPT-2's size (124 million parameters): passes, time and peak memory beside one forward.

Each is run in a process of its own, so that its peak is its own; a pass is one call of the model's forward.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH, LENGTH, LAYERS = 4, 64, 12


def gpt2(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    return model, {"input_ids": torch.randint(50_000, (BATCH, LENGTH))}


def child(what: str, layers: int) -> None:
    """Run one of them and print passes, seconds, bytes of the weights and of the peak."""
    model, batch = gpt2(layers)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.register_forward_pre_hook(count)
    began = time.perf_counter()
    if what == "forward":
        with torch.no_grad():
            model(**batch)
    elif what == "training step":
        model(**batch).logits.square().mean().backward()
    elif what == "lsuv":
        from pondera.init import lsuv_

        lsuv_(model, batch, generator=torch.Generator().manual_seed(0))
    else:
        from pondera.doctor import inspect

        inspect(model, batch)
    seconds = time.perf_counter() - began
    hook.remove()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would also count what the parent held
    peak = next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    print(json.dumps({"passes": passes, "seconds": seconds, "weights": weights, "peak": peak}))


def measured(what: str, layers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.start", what, str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(quick: bool = False) -> list[dict[str, Any]]:
    layers = 2 if quick else LAYERS
    forward, step = measured("forward", layers), measured("training step", layers)
    rows = []
    for what, peer, name in (("lsuv", forward, "one forward"), ("inspect", step, "one forward and backward")):
        ours = measured(what, layers)
        memory = f"{ours['passes']} passes; peak {ours['peak'] / 1e9:.2f} GB beside {peer['peak'] / 1e9:.2f} GB, "
        memory += f"ratio {ours['peak'] / peer['peak']:.2f}; the weights are {ours['weights'] / 1e9:.2f} GB"
        row = {
            "name": f"{what} on GPT-2 {'of 2 layers' if quick else 'small'}, {BATCH} x {LENGTH} tokens",
            "ours": what,
            "peer": name,
        }
        row |= {"seconds_ours": ours["seconds"], "seconds_peer": peer["seconds"]}
        rows.append(row | {"ratio": ours["seconds"] / peer["seconds"], "note": memory})
    return rows


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]))

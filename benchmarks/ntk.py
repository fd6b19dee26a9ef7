"""Tangent kernels: the pseudo kernel beside the full one and beside the forwards of GPT-2 small, the full one beside a
plain Jacobian product, and a look at GPT-2 small beside a copy of it.

Times are medians of runs in turn on one thread; peak memory is what a process that has imported everything grows by, of
GPT-2 over the model.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pondera.probe._untouched import untouched
from pondera.probe.ntk import ntk
from pondera.probe.pseudo_ntk import pseudo_ntk

REPEATS = 3
ROOT = Path(__file__).resolve().parent.parent


def plain(model: nn.Module, x: Tensor) -> Tensor:
    """The kernel as torch's documentation builds it: the Jacobians of all examples at once, multiplied tensor by tensor."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def one(p: dict[str, Tensor], example: Tensor) -> Tensor:
        return functional_call(model, p, (example.unsqueeze(0),)).squeeze(0)

    jacobian = vmap(jacrev(one), (None, 0))(params, x)
    return sum(torch.einsum("iap,jbp->ijab", j.flatten(2), j.flatten(2)) for j in jacobian.values())


def mlp(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))


def cnn(width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(width * 16, outputs),
    )  # fmt: skip


def forwards(model: nn.Module, x: Tensor) -> None:
    """What an example costs at least: each runs alone, without gradients."""
    with torch.no_grad():
        for k in range(len(x)):
            model(x[k : k + 1])


def look(model: nn.Module, x: Tensor) -> None:
    """Lend the model to a look that writes nothing."""
    with untouched(model):
        pass


def copied(model: nn.Module, x: Tensor) -> None:
    """The same contract by a copy of every weight, compared and written back afterwards."""
    kept = [(p, p.detach().clone()) for p in (*model.parameters(), *model.buffers())]
    with torch.no_grad():
        for p, old in kept:
            if not torch.equal(p, old):
                p.copy_(old)


class Gpt2(nn.Module):
    """GPT-2 small at random weights; the logits of the last token."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.model = GPT2LMHeadModel(GPT2Config()).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits[:, -1]


@cache
def gpt2(width: int, outputs: int) -> nn.Module:
    return Gpt2()


PROBES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "ntk": ntk, "pseudo_ntk": pseudo_ntk, "plain": plain, "forwards": forwards, "untouched": look, "copied": copied,
}  # fmt: skip
CASES: dict[str, tuple[Callable[[int, int], nn.Module], int, int, tuple[int, ...]]] = {
    # build, width, examples, shape of one
    "mlp": (mlp, 128, 16, (64,)),
    "wide mlp": (mlp, 256, 64, (64,)),
    "cnn": (cnn, 16, 32, (1, 8, 8)),
    "gpt2": (gpt2, 0, 6, (32,)),
}


def case(name: str, outputs: int) -> tuple[nn.Module, Tensor]:
    build, width, n, shape = CASES[name]
    torch.manual_seed(0)
    return build(width, outputs), torch.randint(50_000, (n, *shape)) if name == "gpt2" else torch.randn(n, *shape)


ROWS = [
    ("pseudo_ntk", "ntk", "mlp", 10), ("pseudo_ntk", "ntk", "mlp", 100), ("ntk", "plain", "mlp", 10),
    ("ntk", "plain", "wide mlp", 10), ("ntk", "plain", "cnn", 10), ("ntk", "plain", "mlp", 100),
    ("pseudo_ntk", "forwards", "gpt2", 1), ("untouched", "copied", "gpt2", 1),
]  # fmt: skip


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows_wanted = [row for row in ROWS if row[2:] == ("mlp", 10)] if quick else ROWS
        wanted = list(dict.fromkeys((probe, *row[2:]) for row in rows_wanted for probe in row[:2]))
        memory = dict(zip(wanted, peaks(wanted), strict=True))
        rows = [compared(*row, memory) for row in rows_wanted]
        if not quick:
            power = math.log10(rows[0]["ratio"] / rows[1]["ratio"])
            rows[1]["note"] += f"; from 10 to 100 outputs the gain in time grows by outputs to the {power:.2f}"
        return rows
    finally:
        torch.set_num_threads(threads)


def compared(
    ours: str, peer: str, name: str, outputs: int, memory: dict[tuple[str, str, int], float]
) -> dict[str, Any]:
    model, x = case(name, outputs)
    a, b = interleaved(lambda: PROBES[ours](model, x), lambda: PROBES[peer](model, x))
    size = f"{len(x)} sequences of {x.shape[1]} tokens" if name == "gpt2" else f"{len(x)} examples, {outputs} outputs"
    row = {"name": f"{name}, {size}", "ours": ours, "peer": peer}
    row |= {"seconds_ours": a, "seconds_peer": b, "ratio": a / b}
    mine, theirs = (memory[probe, name, outputs] for probe in (ours, peer))
    note = f"{agreement(ours, peer, model, x)}peak memory {mine:.0f} MiB beside {theirs:.0f} MiB"
    return row | {"note": note}


def agreement(ours: str, peer: str, model: nn.Module, x: Tensor) -> str:
    if (ours, peer) == ("ntk", "plain"):
        theirs = plain(model, x[:4])
        apart = (ntk(model, x[:4]).kernel - theirs).norm() / theirs.norm()
        return f"peer: vmap over jacrev, products by einsum; the kernels of four examples differ by {apart:.0e} of their norm; "
    if peer == "forwards":
        grads = [torch.autograd.grad(model(x[k : k + 1]).sum(), list(model.parameters())) for k in range(2)]
        outputs = model(x[:1]).numel()
        dense = [[sum(float((g * h).sum()) for g, h in zip(a, b)) / outputs for b in grads] for a in grads]
        theirs = torch.tensor(dense)
        apart = (pseudo_ntk(model, x[:2]).kernel - theirs).norm() / theirs.norm()
        return f"peer: one forward an example; of two examples {apart:.0e} from the gradients' products; "
    if peer == "copied":
        return "peer: a copy of every weight, compared afterwards; "
    small, full = pseudo_ntk(model, x).kernel, ntk(model, x).kernel
    apart = (small - full.sum((2, 3)) / full.shape[2]).norm() / small.norm()
    return f"peer: the kernel of all pairs of outputs; its mean over them differs by {apart:.0e}; "


def interleaved(a: Callable[[], Any], b: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of each, run in turn after one warm-up."""
    a(), b()
    times = [(timed(a), timed(b)) for _ in range(REPEATS)]
    first, second = (sorted(t)[REPEATS // 2] for t in zip(*times, strict=True))
    return first, second


def timed(f: Callable[[], Any]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def peaks(wanted: list[tuple[str, str, int]]) -> list[float]:
    """MiB by which the peak grows of a process for each, forked from one that has imported everything and run little."""
    command = [sys.executable, "-m", "benchmarks.ntk", json.dumps(wanted)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def forked(probe: str, name: str, outputs: int) -> float:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, str(grown(probe, name, outputs)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = float(pipe.read())
    os.waitpid(child, 0)
    return found


def grown(probe: str, name: str, outputs: int) -> float:
    model, x = case(name, outputs)
    small, few = (model, x[:1, :2]) if name == "gpt2" else case(name, 2)
    for one in (forwards, *(() if name == "gpt2" else (PROBES[probe],))):
        one(small, few[:2])
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak so far is forgotten
    before = memory_of("VmRSS")
    PROBES[probe](model, x)
    return (memory_of("VmHWM") - before) / 1024


def memory_of(what: str) -> float:
    """KiB of this program (Linux; getrusage would also count what the parent held before it started this one)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(what)))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        torch.set_num_threads(1)
        wanted = json.loads(sys.argv[1])
        if any(name == "gpt2" for _, name, _ in wanted):
            gpt2(0, 1)  # once for all that are forked
        print(json.dumps([forked(*one) for one in wanted]))
    else:
        for line in run():
            print(json.dumps(line))

"""The kernel and the layer of S4D beside the same with a plain Vandermonde table, and beside a GRU, at lengths 1k to 16k.

Run `python -m benchmarks state_space`. 32 features, 64 states, batch 4, forward and backward, one thread, medians of runs in
turn; memory is what autograd keeps for the way back.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pondera.nn import S4D

LENGTHS = (1024, 4096, 16384)
FEATURES, STATE, BATCH, REPEATS = 32, 64, 4, 5


class Plain(S4D):
    """S4D with a table of all exponentials, as the authors' code has it without its own kernels in CUDA or KeOps."""

    def kernel(self, length: int) -> Tensor:
        log_A, B, C = self.discrete()
        table = (log_A[..., None] * torch.arange(length)).exp()
        return 2 * torch.einsum("hn,hnl->hl", C * B, table).real


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for length in LENGTHS[: 1 if quick else None] for row in at(length)]
    finally:
        torch.set_num_threads(threads)


def at(length: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ours, plain = S4D(FEATURES, STATE), Plain(FEATURES, STATE)
    plain.load_state_dict(ours.state_dict())
    gru = nn.GRU(FEATURES, FEATURES, batch_first=True)
    x = torch.randn(BATCH, length, FEATURES)
    pairs: list[tuple[str, str, Callable[[], Tensor], Callable[[], Tensor]]] = [
        ("kernel", "plain Vandermonde table", lambda: ours.kernel(length), lambda: plain.kernel(length)),
        ("layer", "plain Vandermonde table", lambda: ours(x), lambda: plain(x)),
        ("layer", "torch.nn.GRU", lambda: ours(x), lambda: gru(x)[0]),
    ]
    rows = []
    for what, peer, a, b in pairs:
        first, second = interleaved(a, b)
        note = f"kept for the way back {kept(a) / 2**20:.1f} MB beside {kept(b) / 2**20:.1f} MB"
        row = {"name": f"S4D {what}, length {length}", "ours": "S4D", "peer": peer, "note": note}
        rows.append(row | {"seconds_ours": first, "seconds_peer": second, "ratio": first / second})
    return rows


def kept(f: Callable[[], Tensor]) -> int:
    """Bytes of the different tensors that autograd holds after a forward."""
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = f()
    del out
    return sum(seen.values())


def interleaved(a: Callable[[], Tensor], b: Callable[[], Tensor]) -> tuple[float, float]:
    """Median seconds of a forward and backward of each, run in turn after one warm-up."""
    timed(a), timed(b)
    times = [(timed(a), timed(b)) for _ in range(REPEATS)]
    first, second = (sorted(t)[REPEATS // 2] for t in zip(*times, strict=True))
    return first, second


def timed(f: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    f().sum().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))

"""LoGAH: predicting the weights of a GPT-2, beside the same decoder in full and beside drawing them by chance.

The predictor is as in the authors' GPT run (width 64, rank 32, 3 layers, sides up to 32,768). The peer's decoder computes
all rows for every node, one node at a time, and scales by the deviation of the finished matrix, as their code does. One
thread, median CPU seconds of passes in turn; memory is what a pass makes the process grow by, its result included.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._layers import _timed, peak
from pondera.weightspace.logah import LoGAH, ParameterGraph, parameter_graph

REPEATS = 5
SIZES = {"GPT-2 of 124 million": (12, 768), "GPT-2 of 2 layers, width 768": (2, 768)}


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return [row for name in list(SIZES)[1 if quick else 0 :] for row in predicted(name, *SIZES[name])]
    finally:
        torch.set_num_threads(threads)


def predicted(name: str, layers: int, width: int) -> list[dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64))
    graph, logah = parameter_graph(model), LoGAH()
    numbers = sum(torch.Size(shape).numel() for shape in graph.shapes)
    note = f"{numbers / 1e6:.0f} million predicted by {sum(p.numel() for p in logah.parameters()) / 1e6:.1f} million"

    def ours() -> dict[str, Tensor]:
        return logah(graph)

    def chance() -> dict[str, Tensor]:
        return {n: 0.02 * torch.randn(s) for n, s in zip(graph.names, graph.shapes, strict=True)}

    return [
        compared(name, ours, "its decoder in full, node by node", lambda: in_full(logah, graph), note),
        compared(name, ours, "torch.randn", chance, "what a random start costs"),
    ]


def in_full(logah: LoGAH, graph: ParameterGraph) -> dict[str, Tensor]:
    x, decode = logah.embed(graph), logah.decoder
    found = {}
    for i, (name, shape) in enumerate(zip(graph.names, graph.shapes, strict=True)):
        out, inn = shape[::-1] if name in graph.transposed else (*shape, 1)[:2]
        rows = decode.columns(decode.mlp(x[i]).view(2 * decode.rank, decode.rank).relu())
        a, b = rows.view(2, decode.size, decode.rank)
        w = a[:out] @ b[:inn].T
        found[name] = w[:, 0] if len(shape) == 1 else w / w.std() * logah.std
    return found


def compared(name: str, ours: Callable[[], Any], peer: str, other: Callable[[], Any], note: str) -> dict[str, Any]:
    ours(), other()
    times = [(_timed(ours), _timed(other)) for _ in range(REPEATS)]
    a, b = (statistics.median(t) for t in zip(*times, strict=True))
    memory = f"peak memory {peak(ours):.0f} MiB beside {peak(other):.0f} MiB"
    row = {
        "name": f"{name}, start",
        "ours": "LoGAH",
        "peer": peer,
        "seconds_ours": a,
        "seconds_peer": b,
        "ratio": a / b,
    }
    return row | {"note": f"{note}; {memory}"}


if __name__ == "__main__":
    for line in run():
        print(line)

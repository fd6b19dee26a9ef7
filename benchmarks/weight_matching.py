"""What it costs to match two networks by weights, beside git-re-basin at the same end: same start, same visiting orders.

The peer runs where GIT_RE_BASIN_PYTHON names a Python with jax and scipy and GIT_RE_BASIN the folder `src` of a checkout of
samuela/git-re-basin. Elsewhere a naive loop of our own takes its place, which permutes every tensor anew at every visit.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F

from pondera._permute import PermutationSpec, trace_permutations
from pondera.merge.weight_matching import weight_matching

REPEATS, MAX_ITER, SEED = 3, 100, 0

# runs the peer once to compile, once to be timed; its random orders are replaced by those given
PEER = """
import json, sys, time, types
import numpy as np
folder, source = sys.argv[1:]
sys.path.insert(0, source)
sys.modules["utils"] = types.SimpleNamespace(rngmix=lambda rng, x: rng)  # its own needs flax
import weight_matching as peer
import jax.numpy as jnp
task = json.load(open(f"{folder}/task.json"))
spec = peer.permutation_spec_from_axes_to_perm({k: tuple(v) for k, v in task["axes"].items()})
a, b = ({k: jnp.asarray(v) for k, v in np.load(f"{folder}/{name}.npz").items()} for name in "ab")
for _ in range(2):
    orders = iter(task["orders"])
    peer.random = types.SimpleNamespace(permutation=lambda rng, n: next(orders))
    began = time.perf_counter()
    found = peer.weight_matching(None, spec, a, b, max_iter=task["max_iter"], silent=True)
    found = {p: np.asarray(v).tolist() for p, v in found.items()}
    took = time.perf_counter() - began
print(json.dumps({"seconds": took, "permutations": found}))
"""


class Block(nn.Module):
    def __init__(self, inn: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(inn, out, 3, out // inn, 1, bias=False), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(1, out) for _ in "ab")
        self.short = nn.Conv2d(inn, out, 1, 2, bias=False) if inn != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.short(x) + self.norms[1](self.b(F.relu(self.norms[0](self.a(x))))))


def resnet() -> nn.Module:
    widths = [32, 32, 32, 32, 64, 64, 64, 128, 128, 128]
    blocks = (Block(i, o) for i, o in pairwise(widths))
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1, bias=False),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def mlp() -> nn.Module:
    layers = (nn.Linear(784, 512), nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 10))
    return nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))


def orders(n: int) -> list[list[int]]:
    """The visiting orders that a generator of this seed gives."""
    g = torch.Generator().manual_seed(SEED)
    return [torch.randperm(n, generator=g).tolist() for _ in range(MAX_ITER)]


def naive(spec: PermutationSpec, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    perms = {p: np.arange(a[places[0].tensor].shape[places[0].axis]) for p, places in spec.places.items()}
    names = list(perms)
    for order in orders(len(names)):
        progress = False
        for p in (names[i] for i in order):
            n = len(perms[p])
            A = np.zeros((n, n), dtype=np.float32)
            for place in spec.places[p]:
                w = b[place.tensor]
                for axis, q in enumerate(spec.axes[place.tensor]):
                    if q is not None and axis != place.axis:
                        w = np.take(w, perms[q], axis=axis)
                x, y = (np.moveaxis(t, place.axis, 0).reshape(n, -1) for t in (a[place.tensor], w))
                A += x @ y.T
            new = linear_sum_assignment(A, maximize=True)[1]
            old, perms[p] = perms[p], new
            progress |= bool(A[np.arange(n), new].sum() > A[np.arange(n), old].sum() + 1e-12)
        if not progress:
            break
    return perms


def peer(spec: PermutationSpec, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[float, dict[str, Any]]:
    python, source = os.environ.get("GIT_RE_BASIN_PYTHON"), os.environ.get("GIT_RE_BASIN")
    if not (python and source):
        began = time.perf_counter()
        found = naive(spec, a, b)
        return time.perf_counter() - began, found
    with TemporaryDirectory() as folder:
        task = {"axes": spec.axes, "orders": orders(len(spec.places)), "max_iter": MAX_ITER}
        Path(folder, "task.json").write_text(json.dumps(task))
        for name, state in (("a", a), ("b", b)):
            np.savez(Path(folder, f"{name}.npz"), **state)
        said = subprocess.run([python, "-c", PEER, folder, source], check=True, capture_output=True, text=True).stdout
    result = json.loads(said.splitlines()[-1])
    return result["seconds"], {p: np.array(v) for p, v in result["permutations"].items()}


def run() -> Iterator[dict[str, Any]]:
    real = "GIT_RE_BASIN" in os.environ and "GIT_RE_BASIN_PYTHON" in os.environ
    cases: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
        "match two MLPs, 3 x 512": (mlp, torch.zeros(1, 784)),
        "match two residual nets, 19 convolutions of 32 to 128": (resnet, torch.rand(1, 3, 8, 8)),
    }
    for name, (build, example) in cases.items():
        torch.manual_seed(SEED)
        nets = build(), build()
        spec = trace_permutations(nets[0], example.normal_())
        states = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
        arrays = [{k: v.numpy() for k, v in s.items()} for s in states]
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(REPEATS):
            began = time.perf_counter()
            ours = weight_matching(*states, spec, generator=torch.Generator().manual_seed(SEED), max_iter=MAX_ITER)
            times["ours"].append(time.perf_counter() - began)
            seconds, theirs = peer(spec, *arrays)
            times["peer"].append(seconds)
        equal = sum(float((ours.permutations[p].numpy() == theirs[p]).sum()) for p in theirs)
        ours_s, peer_s = (sorted(t)[REPEATS // 2] for t in times.values())
        units = sum(len(p) for p in theirs.values())
        yield {
            "name": name,
            "ours": "weight_matching (float64)",
            "peer": "git-re-basin (float32, jax)" if real else "a naive loop of our own (float32, NumPy)",
            "seconds_ours": ours_s,
            "seconds_peer": peer_s,
            "ratio": ours_s / peer_s,
            "note": f"{len(ours.history) - 1} passes; {equal / units:.1%} of {units} units placed alike",
        }


if __name__ == "__main__":
    print(*run(), sep="\n")

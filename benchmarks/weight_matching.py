"""What it costs to match two networks by weights, beside a plain NumPy loop and git-re-basin: same start, same orders.

The loop permutes and multiplies every tensor anew at every visit, in float32. git-re-basin runs where GIT_RE_BASIN_PYTHON
names a Python with jax and scipy and GIT_RE_BASIN the folder `src` of a checkout of samuela/git-re-basin; elsewhere its
recorded rows stay. All on one thread, in turn; the ratio is the median of neighbours'.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import scipy
import torch
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F

from pondera._permute import PermutationSpec, trace_permutations
from pondera.merge.weight_matching import weight_matching

REPEATS, MAX_ITER, SEED = {"loop": 15, "git-re-basin": 5}, 100, 0
LOOP, RE_BASIN = "a plain loop (NumPy, float32)", "git-re-basin (jax, float32)"

# runs the peer once to compile, once to be timed; its random orders are replaced by those given
PEER = """
import json, os, sys, time, types
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before jax counts them: one thread, as ours
import numpy as np
folder, source = sys.argv[1:]
sys.path.insert(0, source)
sys.modules["utils"] = types.SimpleNamespace(rngmix=lambda rng, x: rng)  # its own needs flax
import weight_matching as peer
import jax, jax.numpy as jnp
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
print(json.dumps({"seconds": took, "permutations": found, "jax": jax.__version__}))
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


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLPs, 3 x 512": (mlp, (1, 784)),
    "residual nets, 19 convolutions of 32 to 128": (resnet, (1, 3, 8, 8)),
}
Found = tuple[float, dict[str, np.ndarray], str]  # seconds, permutations, versions


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


def run_naive(spec: PermutationSpec, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> Found:
    began = time.perf_counter()
    found = naive(spec, a, b)
    return time.perf_counter() - began, found, f"NumPy {np.__version__}, SciPy {scipy.__version__}"


def run_re_basin(spec: PermutationSpec, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> Found:
    python, source = os.environ["GIT_RE_BASIN_PYTHON"], os.environ["GIT_RE_BASIN"]
    with TemporaryDirectory() as folder:
        task = {"axes": spec.axes, "orders": orders(len(spec.places)), "max_iter": MAX_ITER}
        Path(folder, "task.json").write_text(json.dumps(task))
        for name, state in (("a", a), ("b", b)):
            np.savez(Path(folder, f"{name}.npz"), **state)
        said = subprocess.run([python, "-c", PEER, folder, source], check=True, capture_output=True, text=True).stdout
    result = json.loads(said.splitlines()[-1])
    digest = sha256(Path(source, "weight_matching.py").read_bytes()).hexdigest()[:7]
    permutations = {p: np.array(v) for p, v in result["permutations"].items()}
    return result["seconds"], permutations, f"its weight_matching.py of SHA-256 {digest}, jax {result['jax']}"


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    peers = {"loop": (LOOP, run_naive)}
    if "GIT_RE_BASIN" in os.environ and "GIT_RE_BASIN_PYTHON" in os.environ:
        peers["git-re-basin"] = (RE_BASIN, run_re_basin)
    else:
        print("weight_matching: git-re-basin is not here (see GIT_RE_BASIN), so its rows are left out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            for kind, (name, run_peer) in peers.items():
                for case in CASES:
                    yield compared(case, name, run_peer, 1 if quick else REPEATS[kind])
    finally:
        torch.set_num_threads(threads)


def compared(case: str, name: str, peer: Callable[..., Found], repeats: int) -> dict[str, Any]:
    build, shape = CASES[case]
    torch.manual_seed(SEED)
    nets = build(), build()
    spec = trace_permutations(nets[0], torch.randn(shape))
    states = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    arrays = [{k: v.numpy() for k, v in s.items()} for s in states]
    times: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        ours = weight_matching(*states, spec, generator=torch.Generator().manual_seed(SEED), max_iter=MAX_ITER)
        took = time.perf_counter() - began
        seconds, theirs, version = peer(spec, *arrays)
        times.append((took, seconds))
    times = times[1:]  # the first warms up
    alike = sum(int((ours.permutations[p].numpy() == theirs[p]).sum()) for p in theirs)
    units = sum(len(p) for p in theirs.values())
    return {
        "name": f"match two {case}",
        "ours": "weight_matching (float64)",
        "peer": name,
        "version": version,
        "seconds_ours": median(a for a, _ in times),
        "seconds_peer": median(b for _, b in times),
        "ratio": median(a / b for a, b in times),
        "note": f"{len(ours.history) - 1} passes; {alike / units:.1%} of {units} units placed alike",
    }


if __name__ == "__main__":
    print(*run(), sep="\n")

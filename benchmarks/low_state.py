"""Optimizers that keep little: the cosine projection beside an SVD, and steps and state of DCTAdamW, Adafactor and StructuredNGD.

Run `python benchmarks/low_state.py`. In turn in one process on one thread; times are medians. Peers that are not installed
are left out.
"""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.optim import interleaved, matrix, state_bytes
from pondera.linalg import dct
from pondera.optim.adafactor import Adafactor
from pondera.optim.dct_projection import DCTAdamW, largest_columns
from pondera.optim.structured_ngd import StructuredNGD

SIZES = (512, 1024, 2048)
Row = dict[str, Any]


def run(quick: bool = False) -> list[Row]:
    """Projections, then whole steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [projection(n) for n in SIZES[: 1 if quick else None]]
        rows += [adafactor(n) for n in SIZES[: 1 if quick else None]]
        if importlib.util.find_spec("pytorch_optimizer"):
            rows += [galore(n) for n in SIZES[: 1 if quick else 2]]
        if importlib.util.find_spec("singd"):
            rows += [singd(name, theirs) for name, theirs in SINGD.items()][: 1 if quick else None]
        return rows
    finally:
        torch.set_num_threads(threads)


def row(name: str, ours: str, peer: str, times: tuple[float, float], note: str) -> Row:
    a, b = times
    return {
        "name": name,
        "ours": ours,
        "peer": peer,
        "seconds_ours": a,
        "seconds_peer": b,
        "ratio": a / b,
        "note": note,
    }


def projection(n: int) -> Row:
    """A basis of a quarter of the columns and the gradient in it."""
    G, r = matrix(n)[0].grad, n // 4
    assert G is not None

    def ours() -> torch.Tensor:
        S = dct(G)
        return S.index_select(1, largest_columns(S, r, 1))

    def theirs() -> torch.Tensor:
        return G @ torch.linalg.svd(G, full_matrices=False).Vh[:r].T

    note = f"kept a layer: {4 * r:,} B of indices beside {4 * n * r:,} B of projection; shared by all of a size: {4 * n * n:,} B"
    return row(
        f"projection {n} x {n} to {r}", "dct + choice of columns", "torch.linalg.svd", interleaved(ours, theirs), note
    )


def galore(n: int) -> Row:
    """Steps as each does them by default: columns chosen at every step, a decomposition every 50."""
    from pytorch_optimizer import GaLore

    r = n // 4
    group = {"rank": r, "update_proj_gap": 50, "scale": 1.0, "projection_type": "std"}
    ours, theirs = DCTAdamW(matrix(n), rank=r), GaLore([{"params": matrix(n), **group}])
    ours.step(), theirs.step()  # the first decomposition is not timed
    times = interleaved(ours.step, theirs.step)
    (state,) = theirs.state.values()
    kept = state_bytes(theirs) + state["projector"].ortho_matrix.nbytes
    shared = sum(q.nbytes for q in ours._bases.values())
    note = f"state {state_bytes(ours):,} B and {shared:,} B shared by all of a size beside {kept:,} B; no decomposition timed"
    return row(f"DCTAdamW {n} x {n}, rank {r}", "DCTAdamW", "pytorch_optimizer GaLore", times, note)


def adafactor(n: int) -> Row:
    ours, theirs = Adafactor(matrix(n)), torch.optim.AdamW(matrix(n))
    times = interleaved(ours.step, theirs.step)
    note = (
        f"state {state_bytes(ours):,} B beside {state_bytes(theirs):,} B; ours is torch's with another default of eps"
    )
    return row(f"Adafactor {n} x {n}", "Adafactor", "torch.optim.AdamW", times, note)


SINGD = {"dense": "dense", "diagonal": "diagonal", "block_diagonal": "block30diagonal"}
SINGD |= {"lower_toeplitz": "triltoeplitz", "hierarchical": "hierarchical15_15"}


def singd(name: str, theirs_name: str) -> Row:
    """Forward, backward and step of a layer of 512 to 512 on 128 examples, the factors moved at every step."""
    from singd.optim.optimizer import SINGD as Theirs

    def train(make: Callable[[nn.Module], Optimizer]) -> tuple[Callable[[], None], Optimizer]:
        torch.manual_seed(0)
        net, x = nn.Linear(512, 512), torch.randn(128, 512)
        optimizer = make(net)

        def one() -> None:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

        return one, optimizer

    ours, of_ours = train(lambda net: StructuredNGD(net, T=1, structure=name))
    theirs, _ = train(lambda net: Theirs(net, T=1, structures=(theirs_name, theirs_name), normalize_lr_cov=True))
    times = interleaved(ours, theirs)
    note = f"forward, backward and step on 128 examples, factors moved each time; state {state_bytes(of_ours):,} B"
    return row(f"StructuredNGD {name} 512 x 512", "StructuredNGD", "singd", times, note)


if __name__ == "__main__":
    for line in run():
        print(json.dumps(line))

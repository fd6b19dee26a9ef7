"""Optimizers of Shampoo's kind beside pytorch_optimizer's: time of a step and bytes of the state.

Run `python -m benchmarks shampoo`. Steps are interleaved in one process on one thread. Roots and eigenbases are taken every
ten steps on both sides, so that a unit is ten steps; times are medians of units, per step.
"""

import importlib.util
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.optim import Make, interleaved, matrix, state_bytes
from pondera.optim.kl_shampoo import KLShampoo
from pondera.optim.shampoo_4bit import Shampoo4bit
from pondera.optim.shampoo_squared import Shampoo

SIZES = (256, 512)
EVERY = 10


def shampoo(params: list[nn.Parameter]) -> Optimizer:
    return Shampoo(params, root_every=EVERY)


def four_bits(params: list[nn.Parameter]) -> Optimizer:
    return Shampoo4bit(params, factor_every=EVERY, root_every=EVERY)


def their_shampoo(params: list[nn.Parameter]) -> Optimizer:
    import pytorch_optimizer

    made: Optimizer = pytorch_optimizer.Shampoo(params, momentum=0.9, preconditioning_compute_steps=EVERY)
    return made


def their_scalable(params: list[nn.Parameter]) -> Optimizer:
    import pytorch_optimizer

    settings = {"start_preconditioning_step": 1, "preconditioning_compute_steps": EVERY}
    made: Optimizer = pytorch_optimizer.ScalableShampoo(params, **settings)
    return made


def their_soap(params: list[nn.Parameter]) -> Optimizer:
    import pytorch_optimizer

    made: Optimizer = pytorch_optimizer.SOAP(params, precondition_frequency=EVERY, weight_decay=0.0)
    return made


PAIRS: dict[str, tuple[Make, str, Make, str]] = {
    "Shampoo(1/2)": (
        shampoo,
        "pytorch_optimizer.Shampoo",
        their_shampoo,
        "roots by eigenvalues, theirs by singular values",
    ),
    "KLShampoo": (KLShampoo, "pytorch_optimizer.SOAP", their_soap, "no second moment of the entries"),
    "Shampoo4bit": (
        four_bits,
        "pytorch_optimizer.ScalableShampoo",
        their_scalable,
        "factors every ten steps, theirs at each; their roots by Schur-Newton",
    ),
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """One row a method and matrix size, none where the peer is not installed; seconds are those of a step."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [compared(name, *pair, n) for name, pair in PAIRS.items() for n in SIZES[: 1 if quick else None]]
    finally:
        torch.set_num_threads(threads)


def compared(name: str, make: Make, peer: str, make_peer: Make, note: str, n: int) -> dict[str, Any]:
    ours, theirs = make(matrix(n)), make_peer(matrix(n))
    for optimizer in (ours, theirs):  # past the first steps, where roots are taken at each
        rounds(optimizer)
    a, b = interleaved(lambda: rounds(ours), lambda: rounds(theirs))
    memory = f"state {state_of(ours):,} B beside {state_of(theirs):,} B"
    row = {
        "name": f"{name} {n} x {n}",
        "ours": name,
        "peer": peer,
        "version": version("pytorch_optimizer"),
        "seconds_ours": a / EVERY,
        "seconds_peer": b / EVERY,
    }
    return row | {"ratio": a / b, "note": f"{memory}; {note}"}


def rounds(optimizer: Optimizer) -> None:
    for _ in range(EVERY):
        optimizer.step()


def state_of(optimizer: Optimizer) -> int:
    """Bytes of all tensors a state holds, in lists and objects as well."""
    found: dict[int, int] = {}

    def look(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        elif isinstance(x, dict):
            for v in x.values():
                look(v)
        elif isinstance(x, (list, tuple)):
            for v in x:
                look(v)
        elif hasattr(x, "__dict__"):
            look(vars(x))

    for state in optimizer.state.values():
        look(state)
    return max(sum(found.values()), state_bytes(optimizer))

"""What the state-space layers share: the HiPPO systems, and a diagonal system as a start of a layer."""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from pondera.errors import BadInput


class DiagonalSystem(NamedTuple):
    """One of each conjugate pair of the modes of a real system of N states.

    A: (n,) the poles. B: (n,) what each mode takes in. V: (N, n), by which a read-out c of the dense system becomes ``c @ V``
    of the modes; None where there is no dense system.
    """

    A: Complex[Tensor, "n"]
    B: Complex[Tensor, "n"]
    V: Complex[Tensor, "N n"] | None = None


def hippo_legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
    """HiPPO-LegS in float64: A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it, 0 above; B_n = sqrt(2n + 1)."""
    k = torch.arange(n, dtype=torch.float64)
    B = (2 * k + 1).sqrt()
    return -(torch.outer(B, B).tril(-1) + torch.diag(k + 1)), B


def hippo_legt(n: int, window: float = 1.0) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n"]]:
    """HiPPO-LegT in float64: A_nk = -sqrt((2n + 1)(2k + 1)) / window on and below the diagonal, times (-1)^(n - k) above."""
    k = torch.arange(n, dtype=torch.float64)
    B = (2 * k + 1).sqrt()
    signs = (-1.0) ** (k[:, None] - k)
    return -torch.outer(B, B) * torch.ones(n, n, dtype=torch.float64).tril().where(
        k <= k[:, None], signs
    ) / window, B / window


def require_size(value: object, who: str, name: str, *, least: int = 1, even: bool = False) -> int:
    """`value` if it is a whole number of at least `least` (and even); BadInput otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (even and value % 2):
        raise BadInput(
            f"{who} needs {'an even' * even or 'a whole'} number of at least {least} for {name}, got {value!r}"
        )
    return value

"""Perturb, then diagonalise (PTD): a diagonal start that follows the whole HiPPO system, at every frequency."""

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Generator, Tensor

from pondera.errors import BadInput, describe, require_finite
from pondera.nn._state_space import DiagonalSystem, hippo_legs, require_size

RATE = 0.05  # of Adam on the direction of E


class Diagonalized(NamedTuple):
    """``A + E = V diag(lam) V^-1``, the columns of V of unit length. condition: sigma_max(V) / sigma_min(V)."""

    lam: Complex[Tensor, "n"]
    V: Complex[Tensor, "n n"]
    E: Float[Tensor, "n n"]
    condition: float


def perturb_diagonalize(
    A: Float[Tensor, "n n"], size: float, *, steps: int = 100, generator: Generator | None = None
) -> Diagonalized:
    r"""Diagonalise A + E for a small E that makes the eigenvectors well conditioned.

    .. math:: A + E = V \,\mathrm{diag}(\lambda)\, V^{-1}, \qquad \min_E \; \log \sum_i \lVert V_{:,i} \rVert^2
        \lVert (V^{-1})_{i,:} \rVert^2 \quad \text{over} \; \lVert E \rVert_2 = \text{size}

    A matrix that is far from normal cannot be diagonalised in floating point: the condition of V for HiPPO-LegS grows
    exponentially in n, about 1e20 at 32. That of A + E is about 1 / size at worst, and what comes out is the exact answer for a
    matrix that near to A. Real matrices stay real, so the eigenvalues come in conjugate pairs. E starts as a real Gaussian draw
    and moves by `steps` of Adam at a rate of 0.05; the sum is that of the squared eigenvalue condition numbers.

    For a layer of many inputs (S5) the start is ``lam``, ``V^-1 B`` and ``C V``.

    Args:
        A: a square matrix; all is done in float64.
        size: the spectral norm of E, absolute: it is what the error is measured by (`ptd_start`).
        steps: 0 keeps the Gaussian draw.
        generator: draws E; torch's default one otherwise.
    Returns: `lam`, `V`, `E` and the condition number of V, as a named tuple, in float64 (complex128).
    Raises: BadInput: for a matrix that is not square or not finite, a size that is not positive and finite.
    Paper: Yu, Nigmetov, Morozov, Mahoney and Erichson 2023, arXiv 2310.01698. Their objective is kappa(V) + gamma ||E|| with E
        free (Eq. 4, known from reviews of the paper); here the size is held, for it bounds the error, and a smooth measure
        stands for kappa. Step and rate are ours.

    >>> found = perturb_diagonalize(torch.tensor([[-1.0, 0.0], [-100.0, -1.0]]), 0.1)
    >>> 10 < found.condition < 50  # without E there is one eigenvector only
    True
    """
    require_finite(A, "perturb_diagonalize", "matrix")
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not A.numel():
        raise BadInput(f"perturb_diagonalize needs a square matrix, got a {describe(A)}")
    if not 0 < size < float("inf"):
        raise BadInput(f"perturb_diagonalize needs a positive, finite size, got {size!r}")
    steps = require_size(steps, "perturb_diagonalize", "steps", least=0)
    A = A.detach().double()
    M = torch.randn(A.shape, dtype=torch.float64, generator=generator).to(A.device).requires_grad_()
    optimizer = torch.optim.Adam([M], lr=RATE)

    def perturbation() -> Tensor:
        return size * M / torch.linalg.matrix_norm(M, 2)

    best, least = perturbation().detach(), float("inf")
    with torch.enable_grad():
        for _ in range(steps):
            E = perturbation()
            _, V = torch.linalg.eig(A + E)
            measure = (V.norm(dim=0) * torch.linalg.inv(V).norm(dim=1)).square().sum().log()
            if measure.item() < least:
                best, least = E.detach(), measure.item()
            (M.grad,) = torch.autograd.grad(measure, M)
            optimizer.step()
    lam, V = torch.linalg.eig(A + best)
    return Diagonalized(lam, V, best, float(torch.linalg.cond(V)))


def ptd_start(state: int, size: float = 0.1, *, steps: int = 100, generator: Generator | None = None) -> DiagonalSystem:
    r"""The start of S4-PTD: HiPPO-LegS plus a small E, diagonalised, as the `start` of an `S4D` layer.

    The transfer function c (s - A - E)^-1 B differs from HiPPO's by c (s - A)^-1 E (s - A - E)^-1 B: for every frequency no
    more than about (2 ln N + 4) size (the paper's Theorem 3), where S4D's own start is off by a constant at its fastest mode
    however large N is. Small sizes are nearer, large ones better conditioned: condition about 1 / size.

    One mode of each conjugate pair is kept; a real eigenvalue is a mode of its own, with half of its input, as `S4D` doubles
    the real part of the sum. So there are ``len(A)`` modes, at least N/2, and the layer has twice that for its state. The
    modes are scaled to an input of 1, as S4D's other starts have it, so that C alone carries their sizes, which cancel.

    HiPPO's field of values lies left of -1/2, so every pole lies left of size - 1/2: a size below 1/2 cannot make it unstable.

    Args:
        state: N, even.
        size: the spectral norm of E, below 1/2.
        steps, generator: as in `perturb_diagonalize`.
    Returns: `A`, `B` (complex128) of the modes, and `V` (N, modes), by which a read-out c of HiPPO becomes ``c @ V``.
    Raises: BadInput: for a state that is not even, or a size not between 0 and 1/2.
    Paper: Yu, Nigmetov, Morozov, Mahoney and Erichson 2023, arXiv 2310.01698. The paper uses sizes of 0.01 to 1 relative to
        ||A|| (known from reviews), which at N = 32 makes poles right of zero where E is a random draw; the bound on the poles
        (field of values) and the scale of the modes are ours.

    >>> from pondera.nn import S4D
    >>> system = ptd_start(8, steps=0, generator=torch.Generator().manual_seed(0))
    >>> layer = S4D(4, 2 * len(system.A), start=system)
    """
    N = require_size(state, "ptd_start", "state", least=2, even=True)
    if not 0 < size < 0.5:
        raise BadInput(
            f"ptd_start needs a size between 0 and 1/2, beyond which poles may lie right of zero, got {size!r}"
        )
    A, B = hippo_legs(N)
    lam, V, _, _ = perturb_diagonalize(A, size, steps=steps, generator=generator)
    taken = torch.linalg.solve(V, B.to(V))
    keep = lam.imag >= 0  # LAPACK gives a real eigenvalue of a real matrix an imaginary part of exactly 0
    lam, V, taken = lam[keep], V[:, keep], taken[keep]
    taken = torch.where(lam.imag == 0, taken / 2, taken)
    return DiagonalSystem(lam, torch.ones_like(lam), V * taken)


def transfer_function(A: Tensor, B: Tensor, C: Tensor, omega: Float[Tensor, "w"]) -> Complex[Tensor, "*rows w"]:
    r"""G(i omega) = C (i omega - A)^{-1} B of a dense system, or of the modes of a `DiagonalSystem` with their conjugates.

    Args:
        A: (n, n) for a dense real system; (n,) for modes, one of each conjugate pair.
        B: (n,). C: (*rows, n), read-outs; for modes of a system with a V they are ``c @ V``.
        omega: (w,) angular frequencies.
    Returns: (*rows, w), complex128.
    Raises: BadInput: if the shapes do not fit.

    >>> lowpass = transfer_function(torch.tensor([[-1.0]]), torch.ones(1), torch.ones(1), torch.tensor([0.0, 1.0]))
    >>> lowpass.abs().square()
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if A.ndim not in (1, 2) or A.shape[0] != A.shape[-1] or B.shape != A.shape[:1] or C.shape[-1:] != B.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (A, B, C))
        raise BadInput(f"transfer_function needs A (n, n) or (n,), B (n,) and C (*, n), got {shapes}")
    s = 1j * omega.double()[:, None]
    A, B, C = (t.to(torch.complex128) for t in (A, B, C))
    if A.ndim == 1:
        both = (C[..., None, :] * B / (s - A), C[..., None, :].conj() * B.conj() / (s - A.conj()))
        return (both[0] + both[1]).sum(-1)
    states = torch.linalg.solve(s[..., None] * torch.eye(len(A)) - A, B.expand(len(s), -1)[..., None])[..., 0]
    return C @ states.T

"""A small case by hand, the identity between the two transfer functions, conjugate pairs, and the layer started from it."""

import math

import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import S4D, perturb_diagonalize, ptd_start, s4d_start, transfer_function
from pondera.nn._state_space import hippo_legs


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("steps", [0, 5])
def test_what_comes_out_is_the_perturbed_matrix(steps):
    A, _ = hippo_legs(12)
    lam, V, E, condition = perturb_diagonalize(A, 0.05, steps=steps, generator=seeded())
    assert torch.allclose((V * lam) @ torch.linalg.inv(V), (A + E).to(V), atol=1e-9)
    assert torch.linalg.matrix_norm(E, 2).item() == pytest.approx(0.05)
    assert torch.allclose(V.norm(dim=0), torch.ones(12, dtype=torch.float64))
    assert condition == pytest.approx(torch.linalg.cond(V).item())
    again = perturb_diagonalize(A, 0.05, steps=steps, generator=seeded())
    assert torch.equal(again.E, E)


def test_a_jordan_block_by_hand():
    """[[a, 0], [-k, a]] + E with E12 = e alone has the eigenvalues a +- i sqrt(k e): what the optimum of norm e tends to."""
    lam, _, E, condition = perturb_diagonalize(torch.tensor([[-1.0, 0.0], [-100.0, -1.0]]), 0.1, generator=seeded())
    assert abs(E[0, 1].item()) == pytest.approx(0.1, rel=1e-2)
    assert lam.imag.abs().tolist() == pytest.approx([math.sqrt(10)] * 2, rel=2e-2) or lam.imag.abs().max() < 1e-9
    assert condition == pytest.approx(math.sqrt(100 / 0.1), rel=2e-2)


def test_the_optimum_is_better_conditioned_than_the_draw():
    A, _ = hippo_legs(16)
    drawn, shaped = (perturb_diagonalize(A, 0.1, steps=n, generator=seeded()).condition for n in (0, 40))
    assert shaped < drawn / 5


@pytest.mark.parametrize("size", [0.3, 0.01])
def test_transfer_function_is_that_of_the_perturbed_system(size):
    """N = 4: the modes give C (s - A - E)^-1 B to 1e-10, and the difference to HiPPO is C (s - A)^-1 E (s - A - E)^-1 B."""
    A, B = hippo_legs(4)
    E = perturb_diagonalize(A, size, steps=3, generator=seeded()).E
    system = ptd_start(4, size, steps=3, generator=seeded())
    C = torch.randn(3, 4, dtype=torch.float64, generator=seeded(1))
    omega = torch.logspace(-2, 3, 40, dtype=torch.float64)
    ours = transfer_function(system.A, system.B, C.to(system.V) @ system.V, omega)
    assert torch.allclose(ours, transfer_function(A + E, B, C, omega), atol=1e-10)
    s = 1j * omega[:, None, None] * torch.eye(4)
    inner = torch.linalg.inv(s - A) @ E.to(s) @ torch.linalg.inv(s - A - E)
    assert torch.allclose(ours - transfer_function(A, B, C, omega), (C.to(s) @ (inner @ B.to(s)).T), atol=1e-10)


def test_poles_lie_left_of_the_field_of_values():
    """HiPPO + HiPPO^T = -(I + B B^T), so that x A x <= -1/2 and no E of norm below 1/2 can reach the imaginary axis."""
    A, B = hippo_legs(10)
    assert torch.allclose(A + A.T, -torch.eye(10, dtype=torch.float64) - torch.outer(B, B))
    for seed in range(3):
        assert ptd_start(10, 0.49, steps=0, generator=seeded(seed)).A.real.max() < -0.01


def test_modes_are_pairs_and_lone_real_ones():
    for seed in range(4):
        system = ptd_start(8, 0.01, steps=0, generator=seeded(seed))
        alone = int((system.A.imag == 0).sum())
        assert len(system.A) == (8 + alone) // 2
        assert (system.A.imag >= 0).all()
        assert torch.equal(system.B, torch.ones_like(system.B))


def test_a_layer_started_from_it_answers_as_hippo_does():
    """With E of 0.001 the kernel is HiPPO's, by zero-order hold, to a thousandth; S4D's own start is far from it."""
    N, dt, L = 16, 0.01, 200
    A, B = hippo_legs(N)
    c = torch.randn(N, dtype=torch.float64, generator=seeded(2))
    held = torch.linalg.matrix_exp(dt * A)
    state, kernel = torch.linalg.solve(A, (held - torch.eye(N, dtype=torch.float64)) @ B), []
    for _ in range(L):
        kernel.append(c @ state)
        state = held @ state
    kernel = torch.stack(kernel)

    def off(system, half):
        layer = S4D(1, 2 * len(system.A), start=system, dt_min=dt, dt_max=dt, dtype=torch.float64)
        with torch.no_grad():
            layer.C.copy_(torch.view_as_real(c.to(system.V) @ system.V))
            layer.B.copy_(torch.view_as_real(system.B * half))
        return ((layer.kernel(L)[0] - kernel).norm() / kernel.norm()).item()

    assert off(ptd_start(N, 0.001, generator=seeded()), 1) < 1e-3
    assert off(s4d_start("legs", N), 0.5) > 0.3


def test_first_order_low_pass():
    omega = torch.tensor([0.0, 2.0])
    G = transfer_function(torch.tensor([-1.0 + 0j]), torch.tensor([0.5 + 0j]), torch.tensor([1.0 + 0j]), omega)
    assert torch.allclose(G, 1 / (1 + 1j * omega.double()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: perturb_diagonalize(torch.zeros(2, 3), 0.1), "a square matrix, got a float32 tensor of shape"),
        (lambda: perturb_diagonalize(torch.full((2, 2), torch.nan), 0.1), "finite numbers, got 4 NaN"),
        (lambda: perturb_diagonalize(torch.eye(2), 0.0), "a positive, finite size, got 0"),
        (lambda: perturb_diagonalize(torch.eye(2), 0.1, steps=-1), "at least 0 for steps"),
        (lambda: ptd_start(7), "an even number of at least 2 for state, got 7"),
        (lambda: ptd_start(8, 0.5), "between 0 and 1/2"),
        (
            lambda: transfer_function(torch.zeros(3), torch.zeros(2), torch.zeros(3), torch.zeros(1)),
            r"got \(3,\), \(2,\), \(3,\)",
        ),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()

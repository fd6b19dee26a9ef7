"""Beside the battery: the systems, the kernel against the sum of exponentials and against the authors' code, the recurrence."""

import math

import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import S4D, s4d_start
from pondera.nn._state_space import hippo_legs, hippo_legt
from pondera.replications.nn.s4d import pixels

# state-spaces/s4 at e757cef, models/s4/s4.py, SSMKernelDiag(d_state=8, backend="naive"), steps of 0.05, C by the frequencies
# upward as below (its own keep the other half, conjugate), |B| for B under legs; kernels of length 6
C_FIXED = [0.5 + 0.25j, -1 + 0.75j, 0.25 - 0.5j, 1 - 1j]
THEIRS = {
    ("zoh", "legs"): [0.233493, 0.188907, -0.034745, -0.224434, -0.211828, -0.020278],
    ("zoh", "inv"): [0.104661, 0.093777, 0.000855, -0.100937, -0.136531, -0.08357],
    ("zoh", "lin"): [0.095108, 0.115423, 0.104609, 0.066385, 0.010104, -0.051532],
    ("zoh", "real"): [0.067458, 0.054472, 0.044169, 0.036023, 0.029606, 0.024572],
    ("bilinear", "legs"): [0.213698, 0.192798, 0.010061, -0.181012, -0.230055, -0.106439],
    ("bilinear", "inv"): [0.096437, 0.093044, 0.016115, -0.079819, -0.130948, -0.106072],
    ("bilinear", "lin"): [0.092583, 0.112942, 0.103741, 0.068133, 0.014552, -0.045278],
    ("bilinear", "real"): [0.067707, 0.054624, 0.044251, 0.036056, 0.029605, 0.024549],
}


@pytest.mark.parametrize(("disc", "start"), THEIRS)
def test_against_the_authors_kernel(disc, start):
    layer = S4D(1, 8, start=start, discretization=disc, dt_min=0.05, dt_max=0.05)
    order = s4d_start(start, 8).A.imag.argsort() if start != "real" else torch.arange(4)
    with torch.no_grad():
        layer.C[0, order] = torch.view_as_real(torch.tensor(C_FIXED))
    # theirs start lin and real from a frequency of 1e-4 where the formula has 0, and clip another part of B under legs
    tolerance = {"legs": 2e-3, "inv": 2e-6}.get(start, 2e-5)
    assert torch.allclose(layer.kernel(6)[0], torch.tensor(THEIRS[disc, start]), rtol=0, atol=tolerance)


def test_one_mode_by_hand():
    """N = 2, inv: A = -1/2 + 2i/pi, B = 1: K_l = 2 Re(C (e^{dt A} - 1) / A e^{dt A l})."""
    layer = S4D(1, 2, start="inv", dt_min=0.1, dt_max=0.1, dtype=torch.float64)
    A = complex(-0.5, 2 / math.pi)
    e = math.e ** (0.1 * A)
    C = complex(*layer.C[0, 0].tolist())
    assert layer.kernel(5)[0].tolist() == pytest.approx([2 * (C * (e - 1) / A * e**l).real for l in range(5)])


@pytest.mark.parametrize("start", ["legs", "inv", "lin", "real"])
@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_recurrence_convolution_and_plain_sum_agree(start, disc, length):
    layer = S4D(3, 16, start=start, discretization=disc, dtype=torch.float64)
    u = torch.randn(2, length, 3, dtype=torch.float64)
    held, out = None, []
    for l in range(length):
        y, held = layer.step(u[:, l], held)
        out.append(y)
    assert torch.allclose(torch.stack(out, 1), layer(u), atol=1e-13)
    log_A, B, C = layer.discrete()
    plain = 2 * ((C * B)[..., None] * (log_A[..., None] * torch.arange(length)).exp()).sum(1).real
    assert torch.allclose(layer.kernel(length), plain, atol=1e-13)


def test_a_linear_system_is_causal_and_knows_no_time():
    layer = S4D(3, 8, mixing=False, dtype=torch.float64)
    u = torch.randn(20, 3, dtype=torch.float64)
    later = torch.cat([torch.zeros(4, 3, dtype=torch.float64), u])
    assert torch.allclose(layer(later)[4:], layer(u))
    assert torch.allclose(layer(u)[:9], layer(u[:9]))
    assert torch.allclose(layer(2 * u), 2 * layer(u))


def test_discretizations_meet_as_the_step_shrinks():
    gaps = []
    for dt in (0.02, 0.01):
        kernels = []
        for disc in ("zoh", "bilinear"):
            torch.manual_seed(0)
            layer = S4D(1, 4, start="lin", discretization=disc, dt_min=dt, dt_max=dt, dtype=torch.float64)
            kernels.append(layer.kernel(round(1 / dt)).cumsum(1)[0, -1])  # the answer to a step, at time 1
        gaps.append((kernels[0] - kernels[1]).abs().item())
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("N", [2, 8, 64])
def test_legs_is_the_normal_part_of_hippo(N):
    A, B, V = s4d_start("legs", N)
    dense, b = hippo_legs(N)
    p = (torch.arange(N) + 0.5).double().sqrt()
    whole = 2 * (V * A @ V.mH).real  # both of each pair
    assert torch.allclose(whole, dense + torch.outer(p, p), atol=1e-10 * N)
    assert torch.allclose(V.mH @ b.to(V), B)
    assert B.imag.abs().max() < 1e-9 * N
    assert B.real.min() > 0
    assert A.imag.max().item() == pytest.approx(N**2 / math.pi, rel=0.1 if N > 2 else 1)


def test_formulas():
    assert s4d_start("inv", 4).A.imag.tolist() == pytest.approx([12 / math.pi, 4 / 3 / math.pi])
    assert s4d_start("real", 6).A.tolist() == [-1, -2, -3]
    dense, b = hippo_legs(3)
    assert dense.tolist() == [[-1, 0, 0], [-math.sqrt(3), -2, 0], [-math.sqrt(5), -math.sqrt(15), -3]]
    assert b.square().tolist() == pytest.approx([1, 3, 5])
    assert hippo_legt(3, 2.0)[0].tolist()[0] == pytest.approx([-0.5, math.sqrt(3) / 2, -math.sqrt(5) / 2])


def test_starts():
    torch.manual_seed(0)
    layer = S4D(2000, 8)
    assert layer.log_dt.exp().min() >= 0.001 * 0.999
    assert layer.log_dt.exp().max() <= 0.1 * 1.001
    assert layer.log_dt.var().item() == pytest.approx(math.log(100) ** 2 / 12, rel=0.1)
    assert torch.view_as_complex(layer.B.detach()).abs().max().item() == pytest.approx(2)
    # c @ V for a real normal c is what the others draw: independent parts of variance 1/2
    assert torch.allclose(layer.C.flatten(1).T.cov(), torch.eye(8) / 2, atol=0.06)
    torch.manual_seed(0)
    again = S4D(2000, 8)
    assert torch.equal(again.C, layer.C)
    given = S4D(2, 4, start=s4d_start("lin", 4)[:2])
    assert given.frequency[0].tolist() == pytest.approx([0, math.pi])
    assert [n for n, p in given.named_parameters() if any(p is q for q in given.system_parameters())] == [
        "log_dt", "log_decay", "frequency", "B"
    ]  # fmt: skip


def test_float32_is_near_float64_at_length():
    layer = S4D(4, 64, start="inv")
    u = torch.randn(4096, 4)
    exact = S4D(4, 64, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    assert (layer(u) - exact(u.double())).abs().max() < 2e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.kernel(100), layer.kernel(100).float())
        low = S4D(4, 64, mixing=False)
        assert low(u).dtype == torch.float32


def test_the_last_output_is_one_product_with_the_kernel():
    """What the replication takes in the place of a convolution."""
    layer = S4D(2, 8, mixing=False)
    u = torch.randn(30, 2)
    last = (layer.kernel(30).flip(-1) * u.T).sum(-1) + layer.D * u[-1]
    assert torch.allclose(layer(u)[-1], last, atol=1e-5)
    assert [len(part[0]) for part in pixels()] == [3000, 500, 1500]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: S4D(0), "features, got 0"),
        (lambda: S4D(2, 7), "an even number of at least 2 for state, got 7"),
        (lambda: S4D(2, 8, start="leg"), "did you mean legs"),
        (lambda: S4D(2, 8, start=3), "one of legs, inv, lin, real or a tuple"),
        (lambda: S4D(2, 8, start=(torch.zeros(3), torch.ones(3))), "needs 4 modes in the A"),
        (lambda: S4D(2, 4, start=(torch.zeros(2), torch.ones(2))), "poles left of zero, got a real part of 0"),
        (lambda: S4D(2, 4, start=(torch.tensor([-1.0, torch.nan]), torch.ones(2))), "NaN or infinity"),
        (lambda: S4D(2, 8, discretization="euler"), "knows the discretizations zoh, bilinear"),
        (lambda: S4D(2, 8, dt_min=0.2), "0 < dt_min <= dt_max"),
        (lambda: S4D(2, 8)(torch.zeros(3, 0, 2)), "a length of at least 1"),
        (lambda: S4D(2, 8)(torch.zeros(3)), r"as \(\*, length, 2\)"),
        (lambda: S4D(2, 8)(torch.zeros(3, 4)), r"shape \(3, 4\)"),
        (lambda: S4D(2, 8).kernel(0), "length of at least 1, got 0"),
        (lambda: S4D(2, 8).step(torch.zeros(3)), r"real numbers as \(\*, 2\)"),
        (lambda: S4D(2, 8).step(torch.zeros(3, 2), torch.zeros(2, 4) * 1j), r"state of shape \(3, 2, 4\)"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()

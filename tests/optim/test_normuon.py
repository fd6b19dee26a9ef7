import numpy as np
import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim.normuon import NorMuon


def waves(m: int, n: int, t: int) -> torch.Tensor:
    """A full-rank gradient anyone can compute again."""
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    return torch.sin(1 + 1.7 * i + 0.9 * j * j + 2.3 * t) + 0.5 * torch.cos(i * j + t)


def moved(make, shape, gradients) -> torch.Tensor:
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = make([w])
    for g in gradients:
        w.grad = g.to(w).reshape(shape)
        optimizer.step()
    return w.detach()


def test_one_row_by_hand():
    # One row has one singular value, scaled to 1; p(x) = 3.4445 x - 4.775 x^3 + 2.0315 x^5 five times from 1:
    # 0.7010, 1.1136, 0.7207, 1.0900, 0.6964. A row alone keeps its share, so the step is that times the direction.
    g = torch.tensor([[3.0, 4.0]])
    assert torch.allclose(moved(lambda p: NorMuon(p, lr=1.0), (1, 2), [g]), -0.6964 * g.double() / 5, atol=2e-3)
    # and with the paper's scale 0.2 sqrt(1 * 2)
    by_hand = -0.2 * 2**0.5 * g.double() / 5
    assert torch.allclose(moved(lambda p: NorMuon(p, lr=1.0, scaling="paper"), (1, 2), [g]), by_hand)


def test_rows_move_alike_at_the_first_step():
    # rows of gradients a million apart; each neuron moves by an RMS of 0.2 lr (but for eps)
    g = waves(5, 8, 0) * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None]
    w = moved(lambda p: NorMuon(p, lr=0.1, scaling="paper"), (5, 8), [g])
    assert torch.allclose(w.square().mean(1).sqrt(), torch.full((5,), 0.02, dtype=torch.float64), rtol=1e-4)


@pytest.mark.parametrize("scaling", ["reference", "paper"])
@pytest.mark.parametrize(("m", "n"), [(4, 3), (3, 4), (3, 3)])
def test_against_a_dense_twin(m, n, scaling):
    """The algorithm over again in numpy: the iteration as a polynomial of singular values, neurons one by one."""
    lr, decay, b1, b2 = 0.03, 0.1, 0.9, 0.8
    w, momentum, v = np.zeros((m, n)), np.zeros((m, n)), np.zeros(m)
    for t in range(6):
        g = waves(m, n, t).numpy()
        momentum = b1 * momentum + (1 - b1) * g
        left, s, right = np.linalg.svd(b1 * momentum + (1 - b1) * g, full_matrices=False)
        s = s / np.sqrt((s**2).sum())
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
        o = left @ np.diag(s) @ right
        target = np.sqrt((s**2).sum() * max(1, m / n)) if scaling == "reference" else 0.2 * np.sqrt(m * n)
        rows = []
        for i in range(m):
            v[i] = b2 * v[i] + (1 - b2) * (o[i] @ o[i]) / n
            rows.append(o[i] / np.sqrt(v[i]))
        size = np.sqrt(sum(r @ r for r in rows))
        w = w * (1 - lr * decay) - lr * target / size * np.stack(rows)
    ours = moved(
        lambda p: NorMuon(p, lr=lr, weight_decay=decay, momentum=b1, beta2=b2, scaling=scaling),
        (m, n),
        [waves(m, n, t) for t in range(6)],
    )
    assert np.allclose(ours.numpy(), w, rtol=1e-5, atol=1e-7)  # the twin scales by the norm without its 1e-7


def test_figures_of_the_authors_code():
    # zichongli5/NorMuon, SingleDeviceNorMuon(lr=0.02, weight_decay=0.1), ten steps, its iteration run in float64
    theirs = [
        [-0.0482740907, -0.0396288010, -0.0267575860],
        [-0.0242960044, 0.0631719068, 0.0212797644],
        [-0.0038215290, 0.0090052022, -0.0350589658],
        [0.0002755068, 0.0048761028, 0.0070348318],
    ]
    ours = moved(lambda p: NorMuon(p, lr=0.02, weight_decay=0.1), (4, 3), [waves(4, 3, t) for t in range(10)])
    assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), atol=1e-9)


def test_the_whole_moves_as_far_as_muon():
    muon = pytest.importorskip("torch.optim._muon").Muon
    for shape in ((6, 4), (4, 6)):
        g = [waves(*shape, 0)]
        ours = moved(lambda p: NorMuon(p, lr=0.02, ns_dtype=torch.bfloat16), shape, g).norm()
        theirs = moved(lambda p: muon(p, lr=0.02, weight_decay=0.0), shape, g).norm()
        assert ours.item() == pytest.approx(theirs.item(), rel=0.05)  # both iterate in bfloat16


def test_convolution_is_its_flattened_matrix():
    gradients = [waves(6, 27, t) for t in range(3)]
    flat = moved(NorMuon, (6, 27), gradients)
    assert torch.equal(moved(NorMuon, (6, 3, 3, 3), gradients).reshape(6, 27), flat)


def test_a_layer_kept_as_in_by_out_moves_as_its_transpose():
    standard = moved(NorMuon, (5, 3), [waves(5, 3, t) for t in range(3)])
    turned = moved(
        lambda p: NorMuon([{"params": p, "transposed": True}]), (3, 5), [waves(5, 3, t).t() for t in range(3)]
    )
    assert torch.allclose(turned.t(), standard, atol=1e-15)


def test_state_is_muons_and_one_number_a_neuron():
    w = nn.Parameter(torch.zeros(6, 3, 2))
    w.grad = torch.ones_like(w)
    optimizer = NorMuon([w])
    optimizer.step()
    assert sum(s.numel() for s in optimizer.state[w].values()) == w.numel() + 6


def test_zero_gradient_and_dead_neuron_stay_put():
    assert not moved(NorMuon, (3, 3), [torch.zeros(3, 3)] * 3).any()
    g = waves(3, 4, 0)
    g[1] = 0
    w = moved(NorMuon, (3, 4), [g] * 3)
    assert not w[1].any()
    assert w[0].any()


def test_decay_is_times_the_rate_and_not_for_vectors():
    w, b = (nn.Parameter(torch.ones(s)) for s in ((2, 2), (2,)))
    w.grad, b.grad = torch.zeros_like(w), torch.zeros_like(b)
    NorMuon([w, b], lr=0.5, weight_decay=0.1).step()
    assert torch.allclose(w, torch.full((2, 2), 0.95))
    assert torch.equal(b, torch.ones(2))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"scaling": "muon"}, "scalings reference and paper, got 'muon'"),
        ({"beta2": 1.0}, "needs beta2 of at least 0 and below 1, got 1"),
        ({"eps": 0.0}, "needs eps above 0, finite, got 0"),
        ({"ns_steps": 2.5}, "whole number of at least 1 for ns_steps, got 2.5"),
        ({"ns_dtype": torch.int32}, "floating-point dtype for ns_dtype, got torch.int32"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        NorMuon([nn.Parameter(torch.zeros(2, 2))], **bad)


def test_the_replications_baseline_is_torchs_muon():
    muon = pytest.importorskip("torch.optim._muon").Muon
    from pondera.replications.optim.normuon import Muon

    gradients = [waves(24, 16, t) for t in range(5)]
    baseline = moved(lambda p: Muon(p, lr=1e-3), (24, 16), gradients)
    theirs = moved(lambda p: muon(p, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), (24, 16), gradients)
    assert ((baseline - theirs).norm() / theirs.norm()).item() < 0.03  # theirs iterates in bfloat16

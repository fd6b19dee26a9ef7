import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.linalg import newton_schulz, polar
from pondera.optim import TrustRegion, dual_map, groups
from pondera.optim._norms import NORMS

F64 = torch.float64


def noise(shape, seed, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def after(make, shapes, steps=10, dtype=F64):
    """Weights that start at noise and get noise for gradients."""
    params = [nn.Parameter(noise(s, 100 + i, dtype)) for i, s in enumerate(shapes)]
    optimizer = make(params)
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = noise(p.shape, 1000 * i + t, dtype)
        optimizer.step()
    return [p.detach() for p in params]


def by_hand(shapes, lmo, steps=10, lr=0.02, beta=0.9, decay=0.1):
    """Algorithm 2 on a list of tensors; lmo takes and gives all of them."""
    x = [noise(s, 100 + i) for i, s in enumerate(shapes)]
    m = None
    for t in range(steps):
        g = [noise(s, 1000 * i + t) for i, s in enumerate(shapes)]
        m = g if m is None else [beta * a + (1 - beta) * b for a, b in zip(m, g)]
        x = [(1 - lr * decay) * a + lr * d for a, d in zip(x, lmo(m))]
    return x


def size(D, norm):
    if norm == "spectral":
        return torch.linalg.matrix_norm(D, 2)
    return {"frobenius": D.norm(), "max": D.abs().max(), "row": D.norm(dim=1).max(), "column": D.norm(dim=0).max()}[
        norm
    ]


def test_one_step_of_a_diagonal_by_hand():
    g = torch.diag(torch.tensor([3.0, 0.1], dtype=F64))
    for norm in NORMS:
        w = nn.Parameter(torch.zeros(2, 2, dtype=F64))
        w.grad = g.clone()
        TrustRegion([w], lr=1.0, norm=norm, ns_steps=None).step()
        wanted = -g / 9.01**0.5 if norm == "frobenius" else -torch.eye(2, dtype=F64)  # 3^2 + 0.1^2
        assert torch.allclose(w, wanted, atol=1e-12), norm


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_spectral_norm_is_torchs_muon(shape, scale, nesterov, monkeypatch):
    muon = pytest.importorskip("torch.optim._muon")
    both = {"momentum": 0.95, "weight_decay": 0.1, "nesterov": nesterov, "lr": 0.02}

    def ours(dtype):
        return lambda p: TrustRegion(p, scale=scale, start="zero", ns_dtype=dtype, **both)

    def theirs(p):
        return muon.Muon(p, adjust_lr_fn=scale, **both)

    for dtype, apart in ((torch.float32, 1e-7), (F64, 1e-15)):
        (a,), (b,) = after(ours(torch.bfloat16), [shape], 20, dtype), after(theirs, [shape], 20, dtype)
        assert (a - b).abs().max() <= apart
    # and with its iteration in float32 in place of bfloat16
    monkeypatch.setattr(
        muon, "_zeropower_via_newtonschulz", lambda g, c, steps, eps: newton_schulz(g, steps=steps, dtype=torch.float32)
    )
    (a,), (b,) = after(ours(torch.float32), [shape], 20, torch.float32), after(theirs, [shape], 20, torch.float32)
    assert (a - b).abs().max() <= 3e-7


def test_the_spectral_norm_with_the_exact_svd():
    def lmo(m):
        u, _, v = torch.linalg.svd(m[0], full_matrices=False)
        return [-u @ v]

    (ours,) = after(lambda p: TrustRegion(p, lr=0.02, weight_decay=0.1, ns_steps=None), [(6, 4)])
    assert torch.allclose(ours, by_hand([(6, 4)], lmo)[0], atol=1e-13)


def test_the_maximum_norm_is_signsgd_with_momentum_on_every_parameter():
    shapes = [(6, 4), (5,), (2, 3, 3)]
    ours = after(lambda p: TrustRegion(p, lr=0.02, weight_decay=0.1, norm="max"), shapes)
    wanted = by_hand(shapes, lambda m: [-a.sign() for a in m])
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(ours, wanted))


def test_the_frobenius_norm_is_normalised_sgd_of_the_whole_vector_over_groups_too():
    shapes = [(6, 4), (5,), (2, 3, 3)]

    def lmo(m):
        length = torch.cat([a.flatten() for a in m]).norm()
        return [-a / length for a in m]

    def split(p):
        parts = [{"params": p[:1]}, {"params": p[1:2], "matrix": False}, {"params": p[2:], "transposed": True}]
        return TrustRegion(parts, lr=0.02, weight_decay=0.1, norm="frobenius")

    wanted = by_hand(shapes, lmo)
    for make in (split, lambda p: TrustRegion(p, lr=0.02, weight_decay=0.1, norm="frobenius")):
        assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(after(make, shapes), wanted))


@pytest.mark.parametrize("norm", NORMS)
def test_a_constant_gradient_moves_it_by_the_radius_every_step(norm):
    w = nn.Parameter(torch.zeros(5, 3, dtype=F64))
    optimizer = TrustRegion([w], lr=0.25, norm=norm, ns_steps=None)
    w.grad = 1e-6 * noise((5, 3), 0)
    for t in range(1, 5):
        optimizer.step()
        assert float(size(w.detach(), norm)) == pytest.approx(0.25 * t, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", [0.1, 30.0])
def test_with_decay_weights_stay_in_the_ball(norm, start):
    w = nn.Parameter(noise((5, 3), 1) * start)
    first = float(size(w.detach(), norm))
    optimizer = TrustRegion([w], lr=0.5, weight_decay=0.5, norm=norm, ns_steps=None)
    for t in range(40):
        w.grad = -w.detach() + 0.1 * noise((5, 3), t)  # outward
        optimizer.step()
        assert float(size(w.detach(), norm)) <= max(first, 1 / 0.5) * (1 + 1e-12)
    assert float(size(w.detach(), norm)) > 0.9 * 2  # and reach its edge


def test_what_the_first_gradient_weighs():
    g0, g1 = torch.tensor([[1.0]]), torch.tensor([[-2.0]])
    for start, signs in (("gradient", (-1.0, -2.0)), ("zero", (-1.0, 0.0))):
        # m_1: 0.9 * 1 - 0.1 * 2 = 0.7 from the gradient, 0.9 * 0.1 - 0.1 * 2 = -0.11 from zero
        w = nn.Parameter(torch.zeros(1, 1))
        optimizer = TrustRegion([w], lr=1.0, norm="max", momentum=0.9, start=start)
        w.grad = g0
        optimizer.step()  # g0's sign either way
        assert float(w.detach()) == signs[0]
        w.grad = g1
        optimizer.step()
        assert float(w.detach()) == signs[1]


def test_the_null_part_stays():
    u, v = noise((6, 2), 0), noise((4, 2), 1)
    g = u @ v.T  # rank 2 of 4
    w = nn.Parameter(torch.zeros(6, 4, dtype=F64))
    w.grad = g
    TrustRegion([w], lr=1.0, ns_steps=None).step()
    assert torch.linalg.svdvals(w.detach()).tolist() == pytest.approx([1, 1, 0, 0], abs=1e-12)
    assert torch.allclose(w.detach(), -polar(g))
    for norm in NORMS:
        w = nn.Parameter(torch.ones(3, 3))
        w.grad = torch.zeros(3, 3)
        TrustRegion([w], norm=norm).step()
        assert torch.equal(w.detach(), torch.ones(3, 3)), norm


def test_groups_name_norms_of_their_own_and_the_rest_goes_to_adamw():
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 2))
    split = groups(net)
    split[0]["norm"] = "row"
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = net[0].weight.detach().clone()
    optimizer = TrustRegion(split, lr=0.1)
    optimizer.step()
    assert torch.allclose((net[0].weight - before).norm(dim=1), torch.full((6,), 0.1))
    assert set(optimizer.state[net[2].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[net[0].weight]) == {"momentum_buffer"}


def test_convolution_is_its_flattened_matrix_and_transposed_its_transpose():
    for norm in ("spectral", "row", "column"):
        flat, conv = (nn.Parameter(torch.zeros(s, dtype=F64)) for s in ((6, 12), (6, 3, 2, 2)))
        turned = nn.Parameter(torch.zeros(12, 6, dtype=F64))
        flat.grad = noise((6, 12), 0)
        conv.grad, turned.grad = flat.grad.reshape(conv.shape), flat.grad.T.clone()
        TrustRegion([flat, conv], lr=1.0, norm=norm).step()
        TrustRegion([{"params": turned, "transposed": True}], lr=1.0, norm=norm).step()
        assert torch.allclose(conv.reshape(6, 12), flat, atol=1e-12)
        assert torch.allclose(turned.T, flat, atol=1e-12)


def test_half_precision_takes_the_exact_way_too():
    w = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    w.grad = noise((4, 3), 0, torch.bfloat16)
    TrustRegion([w], lr=1.0, ns_steps=None).step()
    assert torch.allclose(-w.detach().float(), dual_map(w.grad.float(), "spectral"), atol=0.01)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"norm": "spectrum"}, "knows the norms spectral, .*, got 'spectrum'; did you mean spectral"),
        ({"norm": None}, "knows the norms spectral, .*, got None"),
        ({"start": "one"}, "knows the starts gradient and zero, got 'one'"),
        ({"scale": "rms"}, "knows the scales None, original and match_rms_adamw, got 'rms'"),
        ({"ns_steps": 0}, "whole number of at least 1 for ns_steps, got 0"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    w = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(BadInput, match=f"TrustRegion {words}|TrustRegion needs a {words}"):
        TrustRegion(w, **bad)
    with pytest.raises(BadInput, match=f"TrustRegion {words}|TrustRegion needs a {words}"):
        TrustRegion([{"params": w, **bad}])

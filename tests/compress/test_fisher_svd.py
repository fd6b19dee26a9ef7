import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.compress import LowRankLinear, fisher_factors, fisher_svd, nearest_kronecker, weighted_svd
from pondera.errors import BadInput

KINDS = ("nearest", "kfac", "rows", "activations", "scales", "none")


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 12), nn.ReLU(inplace=True), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    ).double()


def data(n=2, rows=10):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 12, generator=g, dtype=torch.float64), torch.randint(3, (rows,), generator=g))
        for _ in range(n)
    ]


def positive(n, seed):
    x = torch.randn(n, n + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT


# -- the nearest Kronecker product ------------------------------------------------------------------------------------


def authors_gradients():
    k, o, i = np.arange(5)[:, None, None], np.arange(3)[None, :, None], np.arange(4)[None, None]
    return torch.tensor(np.sin(1.0 + 7 * k + 3 * o + 1.7 * i + k * o * i))


def test_agrees_with_the_authors_factors():
    """sayankotor/FisherKronecker at d009b02, get_kron_factors on these gradients, its signs mended by the trace."""
    a, b = nearest_kronecker(authors_gradients(), tol=1e-10)
    theirs_b = [
        [1.25214707, -0.53354187, 0.54260866],
        [-0.53354187, 0.99098705, -0.36243926],
        [0.54260866, -0.36243926, 0.7657277],
    ]
    assert torch.allclose(b, torch.tensor(theirs_b).double(), atol=1e-7)
    assert torch.allclose(a[0], torch.tensor([0.63111051, -0.08299774, -0.22671323, 0.00666029]).double(), atol=1e-7)
    assert torch.allclose(a.diagonal()[1:], torch.tensor([0.33980205, 0.31840953, 0.39154232]).double(), atol=1e-7)


def test_is_the_best_of_the_dense_problem():
    g = torch.randn(9, 4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = nearest_kronecker(g, tol=1e-10)
    rearranged = torch.einsum("koi,kpj->opij", g, g).reshape(16, 25) / 9
    u, s, vh = torch.linalg.svd(rearranged)
    assert torch.allclose(torch.outer(b.flatten(), a.flatten()), s[0] * torch.outer(u[:, 0], vh[0]), atol=1e-8)
    assert min(torch.linalg.eigvalsh(a)) > -1e-9
    assert min(torch.linalg.eigvalsh(b)) > -1e-9


def test_one_input_for_all_samples_is_found_exactly():
    g, x = torch.randn(6, 3, dtype=torch.float64), torch.tensor([1.0, 2.0, -2.0]).double()
    a, b = nearest_kronecker(g[:, :, None] * x)
    assert torch.allclose(a, torch.outer(x, x) / 9)
    assert torch.allclose(b, 9 * g.mT @ g / 6)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 4), torch.ones(3, 4), torch.full((1, 2, 2), torch.nan), [[1.0]]])
def test_nearest_refuses(bad):
    with pytest.raises(BadInput, match="nearest_kronecker"):
        nearest_kronecker(bad)


# -- the weighted SVD -------------------------------------------------------------------------------------------------


def test_agrees_with_the_authors_factorisation():
    """factorize_layer_kron_svd at d009b02 on this weight, with their factors plus 0.05 I, at rank 1."""
    a, b = nearest_kronecker(authors_gradients(), tol=1e-10)
    o, i = np.arange(3)[:, None], np.arange(4)[None]
    w = torch.tensor(np.sin(1 + 5 * o + 3 * i + o * i**2))
    up, down = weighted_svd(w, a + 0.05 * torch.eye(4), b + 0.05 * torch.eye(3), rank=1)
    theirs = [
        [0.7530453, -0.5912256, 0.7800877, -0.0574539],
        [-0.10431631, 0.08190009, -0.10806239, 0.00795886],
        [-0.29047102, 0.22805256, -0.30090204, 0.02216161],
    ]
    assert torch.allclose(up @ down, torch.tensor(theirs).double(), atol=1e-5)


def test_error_is_what_the_dropped_singular_values_say_and_nothing_near_is_better():
    w, a, b = torch.randn(4, 6, dtype=torch.float64), positive(6, 0), positive(4, 1)

    def cost(approximation):
        d = w - approximation
        return float((d.mT @ b @ d @ a).trace())

    left = torch.linalg.svdvals(torch.linalg.cholesky(b).mT @ w @ torch.linalg.cholesky(a))
    for r in (1, 2, 3, 4):
        up, down = weighted_svd(w, a, b, rank=r)
        best = cost(up @ down)
        assert best == pytest.approx(float(left[r:].square().sum()), abs=1e-8)
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            near = (up + 0.01 * torch.randn(4, r, generator=g)) @ (down + 0.01 * torch.randn(r, 6, generator=g))
            assert cost(near) >= best - 1e-9
    assert torch.allclose(up @ down, w), "the full rank is the weight itself"


def test_diagonal_factors_scale_rows_and_columns():
    w, rows, columns = (
        torch.randn(4, 5, dtype=torch.float64),
        torch.rand(4).double() + 0.5,
        torch.rand(5).double() + 0.5,
    )
    up, down = weighted_svd(w, columns.diag(), rows.diag(), rank=2)
    u, s, vh = torch.linalg.svd(rows.sqrt()[:, None] * w * columns.sqrt())
    by_hand = (u[:, :2] * s[:2]) @ vh[:2] / rows.sqrt()[:, None] / columns.sqrt()
    assert torch.allclose(up @ down, by_hand)


def test_weighted_svd_refuses():
    w = torch.randn(3, 4)
    for a, b, rank in (
        (None, None, 0),
        (None, None, 4),
        (torch.eye(3), None, 1),
        (None, -torch.eye(3), 1),
        (None, None, 1.5),
    ):
        with pytest.raises(BadInput, match="weighted_svd"):
            weighted_svd(w, a, b, rank=rank)


# -- on models --------------------------------------------------------------------------------------------------------


def test_gradients_of_samples_are_those_of_autograd():
    """Factors of one layer from gradients taken sample by sample, in a net whose ReLU works in place."""
    model, batches = net(), data()
    each = []
    for x, y in batches:
        for k in range(len(x)):
            each.append(torch.autograd.grad(loss(model, (x[k : k + 1], y[k : k + 1])), model[0].weight)[0])
    a, b = nearest_kronecker(torch.stack(each))
    found = fisher_factors(model, batches, loss=loss)["0"]
    assert torch.allclose(found[0], a)
    assert torch.allclose(found[1], b)
    rows = fisher_factors(model, batches, "rows", loss=loss)["0"]
    assert rows[0] is None
    assert torch.allclose(rows[1].diagonal(), torch.stack(each).square().mean(0).sum(1))
    one = fisher_factors(model, batches, "rows", loss=loss, per_sample=False)["0"]
    whole = torch.stack([torch.autograd.grad(loss(model, batch), model[0].weight)[0] for batch in batches])
    assert torch.allclose(one[1].diagonal(), whole.square().mean(0).sum(1))


def test_kfac_and_activations_and_scales_are_the_moments():
    model, batches = net(), data()
    x = torch.cat([b[0] for b in batches])
    found = {kind: fisher_factors(model, batches, kind, loss=loss)["0"] for kind in KINDS}
    assert torch.allclose(found["kfac"][0], x.mT @ x / len(x))
    assert torch.allclose(found["activations"][0], x.mT @ x / len(x))
    assert torch.allclose(found["scales"][0], x.abs().mean(0).diag())
    assert found["none"] == (None, None)


def test_samples_may_have_places():
    """A loss that is a mean over samples, each with a sequence: its gradient sums over the places."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def by(m, batch):
        return m(batch).square().mean()

    each = torch.stack([torch.autograd.grad(by(model, x[k : k + 1]), model[0].weight)[0] for k in range(3)])
    a, b = fisher_factors(model, [x], loss=by)["0"]
    expected = nearest_kronecker(each)
    assert torch.allclose(a, expected[0])
    assert torch.allclose(b, expected[1])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_report_and_what_stays(kind):
    model, batches = net(), data()
    before = sum(loss(model, b).item() for b in batches) / 2
    report = fisher_svd(model, batches, 0.5, loss=loss, factors=kind)
    assert [type(m).__name__ for m in model] == ["LowRankLinear", "ReLU", "LowRankLinear", "Tanh", "Linear"]
    assert model[0].rank == 3  # floor(0.5 * 144 / 24)
    assert report.facts["loss_before"] == pytest.approx(before)
    after = sum(loss(model, b).item() for b in batches) / 2
    assert report.facts["measured"] == pytest.approx(after - before)
    assert ("predicted" in report.facts) == (kind in ("nearest", "kfac"))


def test_prediction_fits_a_small_change():
    """Where the truncation is small, (1/2) tr(D' B D A) is the mean of (1/2) <G_k, D>^2 up to what the product leaves out."""
    model, batches = net(), data(8, 50)
    g = [torch.autograd.grad(loss(model, (x[None], y[None])), model[2].weight)[0] for b in batches for x, y in zip(*b)]
    w = model[2].weight.detach().clone()
    report = fisher_svd(model, batches, loss=loss, rank={"2": 9}, factors="nearest")
    d = (model[2].up @ model[2].down).detach() - w
    exact = 0.5 * float(torch.einsum("koi,oi->k", torch.stack(g), d).square().mean())
    assert report.facts["predicted"] == pytest.approx(exact, rel=0.5)
    assert isinstance(model[0], nn.Linear), "ranks by name leave the others"


def test_factors_made_once_serve_several_ranks():
    made = fisher_factors(net(), data(), loss=loss)
    one, other = net(), net()
    fisher_svd(one, data(), loss=loss, factors=made, rank=2)
    fisher_svd(other, data(), loss=loss, rank=2)
    assert torch.equal(one[0].up, other[0].up)
    full = net()
    fisher_svd(full, data(), loss=loss, factors=made, rank=12)
    assert torch.allclose(full(data()[0][0]), net()(data()[0][0]))


def test_layers_no_rank_makes_smaller_stay():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    report = fisher_svd(model, [torch.randn(4, 2)], 1.0, loss=lambda m, x: m(x).square().mean())
    assert not report.changed
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], LowRankLinear)


@pytest.mark.parametrize(
    "how",
    [
        {"keep": 0.0},
        {"keep": 1.5},
        {"rank": 0},
        {"rank": 13},
        {"rank": {"9": 2}},
        {"factors": "fisher"},
        {"factors": {}},
    ]
    + [{"damping": -1.0}, {"damping": float("nan")}, {"only": "none*"}],
)
def test_refuses(how):
    model = net()
    with pytest.raises(BadInput, match=r"^fisher_svd"):
        fisher_svd(model, data(), **{"loss": loss} | how)
    assert type(model[0]) is nn.Linear


def test_refuses_a_loss_without_a_gradient_and_puts_everything_back():
    model = net()
    with pytest.raises(BadInput, match="one number with a gradient"):
        fisher_svd(model, data(), loss=lambda m, b: m(b[0]).detach().mean())
    calls = []

    def breaks(m, b):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError("no more")
        return loss(m, b)

    with pytest.raises(BadInput, match="no more"):
        fisher_svd(model, data(), loss=breaks)
    assert type(model[0]) is nn.Linear

import pytest
import torch
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.penalties import invariance, irm


def environments(n=12, d=3):
    g = torch.Generator().manual_seed(0)
    phi = [torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(2)]
    y = [torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2)]
    return phi, y, torch.randn(d, generator=g, dtype=torch.float64)


def test_irm_agrees_with_the_authors_code():
    # facebookresearch/DomainBed b93c22a: IRM._irm_penalty on these logits; squared as InvarianceUnitTests 80bcd8b has it
    i = torch.arange(24, dtype=torch.float64)
    sets = [
        ((1.7 * i).sin().view(8, 3), torch.arange(8) % 3),
        ((0.9 * i).cos().view(8, 3), (2 * torch.arange(8) + 1) % 3),
    ]
    for (logits, y), halves, squared in zip(sets, (0.20112688839, 0.13962340355), (0.20359448763, 0.13978334139)):
        assert irm([logits], [y], halves=True).item() == pytest.approx(
            halves, rel=1e-6
        )  # theirs holds the scale in float32
        assert irm([logits], [y]).item() == pytest.approx(squared, rel=1e-9)
    assert irm(*map(list, zip(*sets))).item() == pytest.approx((0.20359448763 + 0.13978334139) / 2, rel=1e-9)


def test_halves_can_be_negative():
    f, y = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0])  # slopes -2 and 2
    assert irm([f], [y], halves=True).item() == -4
    assert irm([f], [y]).item() == 0


def test_power_one_is_four_times_the_excess_risk_and_two_the_distance():
    phi, y, w = environments()
    excess, distance, gradient = 0.0, 0.0, 0.0
    for p, t in zip(phi, y):
        best = torch.linalg.lstsq(p, t[:, None]).solution[:, 0]
        excess += (F.mse_loss(p @ w, t) - F.mse_loss(p @ best, t)).item() / 2
        distance += (w - best).square().sum().item() / 2
        gradient += (2 * p.T @ (p @ w - t) / len(t)).square().sum().item() / 2
    out = [p @ w for p in phi]
    assert invariance(phi, out, y).item() == pytest.approx(4 * excess)
    assert invariance(phi, out, y, power=2).item() == pytest.approx(4 * distance)
    assert invariance(phi, out, y, power=0).item() == pytest.approx(gradient)


def test_no_invertible_change_of_features_matters_to_power_one():
    phi, y, w = environments()
    a = 10 * torch.eye(3, dtype=torch.float64) + torch.ones(3, 3, dtype=torch.float64).tril()
    turned = [p @ a for p in phi]
    out = [p @ w for p in phi]
    assert invariance(turned, out, y).item() == pytest.approx(invariance(phi, out, y).item(), rel=1e-9)
    assert invariance(turned, out, y, power=0).item() != pytest.approx(invariance(phi, out, y, power=0).item(), rel=0.1)


def test_zero_where_one_layer_is_best_everywhere():
    phi, _, w = environments()
    y = [p @ w for p in phi]
    assert invariance(phi, y, y).item() == 0
    assert irm(y, y).item() == 0


def test_one_feature_by_hand():
    # 4 E[f (f - y)]^2 / E[f^2] = 4 * 1.5^2 / 2.5 for f = (1, 2), y = (1, .5); IRMv1 leaves out the division
    f, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.5])
    assert invariance([f], [f], [y]).item() == pytest.approx(3.6)
    assert irm([f], [y]).item() == pytest.approx(9.0)


def test_classes_and_a_ridge():
    phi, _, _ = environments()
    layer, y = torch.randn(3, 4, dtype=torch.float64), torch.arange(12) % 4
    layer.requires_grad_()
    value = invariance(phi[:1], [phi[0] @ layer], [y], ridge=0.5)
    (g,) = torch.autograd.grad(F.cross_entropy(phi[0] @ layer, y), [layer])
    gram = phi[0].T @ phi[0] / 12
    metric = gram + 0.5 * gram.diagonal().mean() * torch.eye(3)
    assert value.item() == pytest.approx(torch.trace(g.T @ torch.linalg.solve(metric, g)).item())


@pytest.mark.parametrize("power", [0, 1, 2])
def test_gradcheck(power):
    phi, y, w = environments(6, 2)

    def value(a, b, w):
        return invariance([a, b], [a @ w, b @ w], y, power=power) + irm([a @ w, b @ w], y)

    assert torch.autograd.gradcheck(value, [t.requires_grad_() for t in (*phi, w)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scalar_of_the_features_dtype(dtype):
    phi, y, w = environments()
    p, t, w = [p.to(dtype) for p in phi], [t.to(dtype) for t in y], w.to(dtype)
    out = [x @ w for x in p]
    for value, exact in (
        (invariance(p, out, t), invariance(phi, [x @ w.double() for x in phi], y)),
        (irm(out, t), irm([x @ w.double() for x in phi], y)),
    ):
        assert value.dtype == dtype
        assert value.shape == ()
        assert value.item() == pytest.approx(exact.item(), rel=0.1)


def test_refusals():
    x, y = torch.randn(4, 2), torch.randn(4)
    f = x[:, 0]
    for call, words in (
        (lambda: irm([], []), "one tensor an environment"),
        (lambda: irm([f], [y, y]), "one tensor an environment"),
        (lambda: irm([f], [y[:3]]), "as many rows"),
        (lambda: irm([f.long()], [y]), "floating-point"),
        (lambda: irm([f[:, None]], [y]), "of the outputs' shape"),
        (lambda: irm([f[:1]], [y[:1]], halves=True), "two rows"),
        (lambda: invariance([x], [f], [y], power=3), "power of 0, 1 or 2"),
        (lambda: invariance([x], [f], [y], ridge=-1.0), "ridge of at least 0"),
        (lambda: invariance([x[:, :, None]], [f], [y]), r"shape \(rows, features\)"),
        (lambda: invariance([0 * x], [0 * f], [y]), "singular"),
        (lambda: invariance([x[:1]], [f[:1]], [y[:1]]), "singular"),
        (lambda: invariance([torch.tensor([[1e-2, 30.0]] * 2)], [f[:2]], [y[:2]]), "singular"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.weightspace import HypernetTuner, LinearHypernet


def ridge(model, batch, hyper):
    x, y = batch
    return ((x @ model.weight[0] - y).square().sum() + hyper.exp().sum() * model.weight.square().sum()) / (2 * len(x))


def squares(model, batch):
    x, y = batch
    return (x @ model.weight[0] - y).square().mean() / 2


def problem(seed=0, n=20, d=6):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, d, dtype=torch.float64, generator=g)
    w, noise = (torch.randn(k, dtype=torch.float64, generator=g) for k in (d, 2 * n))
    y = x @ w / 2 + 1.5 * noise
    return (x[:n], y[:n]), (x[n:], y[n:])


def linear(d=6):
    model = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


def exact(train, valid, hyper):
    """The best weights (X'X + e^h)^-1 X'y, and the validation loss's derivative through them."""
    (x, y), (u, v) = train, valid
    inverse = torch.linalg.inv(x.T @ x + math.exp(hyper) * torch.eye(x.shape[1], dtype=x.dtype))
    w = inverse @ (x.T @ y)
    return w, float(-math.exp(hyper) * (u.T @ (u @ w - v) / len(u)) @ inverse @ w)


@pytest.mark.parametrize("hyper", [0.0, 2.0])
def test_the_trained_response_gives_the_exact_hypergradient(hyper):
    """Ridge: the hypernetwork's optimum over many draws, found by L-BFGS."""
    train, valid = problem()
    center = torch.tensor([hyper], dtype=torch.float64)
    net, model = LinearHypernet(linear(), center), linear()
    drawn = center + 0.2 * torch.linspace(-2, 2, 21, dtype=torch.float64)[:, None]
    by = torch.optim.LBFGS(net.parameters(), max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        by.zero_grad()
        w = net(drawn)["weight"][:, 0]
        fit = (w @ train[0].T - train[1]).square().sum(1) + drawn[:, 0].exp() * w.square().sum(1)
        fit.mean().backward()
        return fit.mean()

    by.step(loss)
    at = center.clone().requires_grad_()
    weights = net(at)
    (found,) = torch.autograd.grad(squares(type("M", (), {"weight": weights["weight"]}), valid), [at])
    best, wanted = exact(train, valid, hyper)
    assert torch.allclose(weights["weight"][0], best, rtol=0.02, atol=0.01)
    assert float(found) == pytest.approx(wanted, rel=0.05)
    assert model.weight.grad is None


def test_one_run_comes_to_the_grids_best():
    train, valid = problem(1)
    values = {h / 20: float(squares(_with(exact(train, valid, h / 20)[0]), valid)) for h in range(-80, 121)}
    tuner = HypernetTuner(
        linear(), torch.zeros(1, dtype=torch.float64), ridge, squares, generator=torch.Generator().manual_seed(0),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03), hyper_optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
    )  # fmt: skip
    for _ in range(250):
        tuner.step(train, valid)
    found = float(squares(_with(exact(train, valid, float(tuner.hyper.detach()))[0]), valid))
    assert found <= 1.01 * min(values.values())
    assert torch.equal(tuner.write().weight.data, tuner.weights()["weight"].data)


def _with(w):
    return type("M", (), {"weight": w[None]})


def test_agrees_with_the_authors_code():
    """lorraine2/hypernet-hypertraining at a6d6cb8, code/neural_network.py with autograd 1.9.1: hyper_train_objective and its
    gradient for a linear hypernetwork 1 -> 8 on a net 3 -> 2; inputs and weights are sines."""
    wave = torch.arange(1.0, 30, dtype=torch.float64).sin()
    x, y = wave[:12].view(4, 3), wave[12:20].view(4, 2)
    a, b = (0.3 * (torch.arange(8, dtype=torch.float64) + k).cos() for k in (0.0, 5.0))
    model = nn.Linear(3, 2, dtype=torch.float64)
    net = LinearHypernet(model, torch.zeros(1, dtype=torch.float64))
    with torch.no_grad():  # theirs flattens (in, out) and the bias
        for part, flat in ((net.base, b), (net.response, a)):
            part[0].view(2, 3).copy_(flat[:6].view(3, 2).T)
            part[1].view(2).copy_(flat[6:])
    hyper = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    w = net(hyper)
    flat = torch.cat([w["weight"].flatten(), w["bias"]])
    valid = (F.linear(x, w["weight"], w["bias"]) - y).square().mean() / 0.02 + math.log(0.1 * math.sqrt(2 * math.pi))
    train = valid + hyper.exp() * flat.norm()
    gradients = torch.autograd.grad(train.sum(), list(net.parameters()), retain_graph=True)
    assert float(train.detach()) == pytest.approx(THEIRS["train"], rel=1e-8)
    assert float(valid.detach()) == pytest.approx(THEIRS["valid"], rel=1e-8)
    assert float(torch.autograd.grad(valid, hyper)[0]) == pytest.approx(THEIRS["hypergradient"], rel=1e-8)
    assert [
        float(g.norm())
        for g in (
            torch.cat([gradients[0].flatten(), gradients[1]]),
            torch.cat([gradients[2].flatten(), gradients[3].flatten()]),
        )
    ] == pytest.approx(THEIRS["norms"], rel=1e-8)


THEIRS = {
    "train": 28.01554448,
    "valid": 27.727732803100494,
    "hypergradient": -7.86817827,
    "norms": [39.321003962118766, 27.52470277348313],
}


@pytest.mark.parametrize("rank", [None, 2])
def test_the_start_answers_to_nothing_and_moving_the_centre_changes_no_function(rank):
    model = nn.Linear(4, 3)
    net = LinearHypernet(model, torch.zeros(5), rank)
    assert torch.equal(net(torch.randn(2, 5))["weight"], model.weight.expand(2, 3, 4))
    nn.init.normal_(net.response[0])
    at = torch.randn(7, 5)
    before = net(at)
    net.recenter(torch.full((5,), 2.0))
    assert torch.allclose(net(at)["weight"], before["weight"], atol=1e-5)
    numbers = sum(p.numel() for p in net.parameters())
    assert numbers == (15 * 6 if rank is None else 15 * 3 + 2 * 5)


def test_a_hyperparameter_without_effect_has_no_gradient():
    train, valid = problem(2)

    def first_only(model, batch, hyper):
        return ridge(model, batch, hyper[:1])

    tuner = HypernetTuner(
        linear(), torch.zeros(2, dtype=torch.float64), first_only, squares, generator=torch.Generator().manual_seed(0),
        optimizer=lambda p: torch.optim.Adam(p, lr=0.03),
    )  # fmt: skip
    for step in range(200):
        tuner.optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 200)
        tuner.step(train)
    (slope,) = torch.autograd.grad(squares(type("M", (), {"weight": tuner.weights()["weight"]}), valid), [tuner.hyper])
    assert abs(slope[0]) > 20 * abs(slope[1])


def test_resumes_bit_for_bit():
    train, valid = problem()

    def make():
        return HypernetTuner(linear(), torch.zeros(1, dtype=torch.float64), ridge, squares, generator=torch.Generator())

    one, other = make(), make()
    one.step(train, valid)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for tuner in (one, other):
        tuner.generator.manual_seed(3)
        tuner.step(train)
        tuner.step(train, valid)
    assert torch.equal(one.hyper, other.hyper)
    assert torch.equal(one.weights()["weight"], other.weights()["weight"])


def test_bounds_dtype_and_the_model_stays():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16()
    before = [p.clone() for p in model.parameters()]

    def loss(model, batch, hyper):
        return model(batch).square().mean() + (hyper[0] * model[0].weight.square()).mean()

    tuner = HypernetTuner(
        model, torch.tensor([1.0]), loss, lambda m, b: m(b).mean(), bounds=(0.99, 1.01),
        hyper_optimizer=lambda p: torch.optim.SGD(p, lr=1e6), rank=1,
    )  # fmt: skip
    for _ in range(3):
        train, _ = tuner.step(torch.randn(3, 4).bfloat16(), torch.randn(3, 4).bfloat16())
    assert torch.isfinite(train)
    assert 0.99 <= float(tuner.hyper.detach()) <= 1.01
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert tuner.write()[0].weight.dtype == torch.bfloat16


def test_refused():
    one = torch.zeros(1)
    with pytest.raises(BadInput, match=r"one dimension \(k,\), got a float32 tensor of shape \(\)"):
        LinearHypernet(nn.Linear(2, 2), torch.zeros(()))
    with pytest.raises(BadInput, match="finite numbers, got 1 NaN"):
        LinearHypernet(nn.Linear(2, 2), one / 0)
    with pytest.raises(BadInput, match="rank of at least 1 or None, got 0"):
        LinearHypernet(nn.Linear(2, 2), one, 0)
    with pytest.raises(BadInput, match="parameters that take gradients, got a ReLU"):
        LinearHypernet(nn.ReLU(), one)
    for kw, words in (
        ({"sigma": -1.0}, "sigma of at least 0"),
        ({"samples": 0}, "samples of at least 1"),
        ({"bounds": (1.0, 2.0)}, "bounds around the start"),
    ):
        with pytest.raises(BadInput, match=words):
            HypernetTuner(nn.Linear(2, 2), one, ridge, squares, **kw)
    x, y = torch.randn(3, 2), torch.randn(3)
    tuner = HypernetTuner(nn.Linear(2, 1, bias=False), one, lambda m, b, h: ridge(m, b, h) / 0, squares)
    with pytest.raises(BadInput, match="finite losses, got a training loss of inf"):
        tuner.step((x, y))
    tuner = HypernetTuner(nn.Linear(2, 1, bias=False), one, lambda m, b, h: m(b[0]), squares)
    with pytest.raises(BadInput, match=r"losses that are scalars, got a tensor of shape \(3, 1\)"):
        tuner.step((x, y))
    tuner = HypernetTuner(nn.Linear(2, 1, bias=False), one, lambda m, b, h: h.sum(), squares)
    with pytest.raises(BadInput, match="training loss that depends on the weights"):
        tuner.step((x, y))

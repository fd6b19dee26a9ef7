import inspect
import math
import warnings

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.optim import implicit_hypergradient


class Ridge:
    """Least squares with a log decay of each weight: everything in closed form."""

    def __init__(self, n=30, d=8, seed=0):
        g = torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.X, self.V, truth = new(n, d), new(n, d), new(d)
        self.y, self.u = self.X @ truth + 0.3 * new(n), self.V @ truth + 0.3 * new(n)
        self.decay = (0.3 * new(d) - 1).requires_grad_()
        self.w = self.solved(self.decay).detach().requires_grad_()

    def hessian(self, decay):
        return self.X.T @ self.X / len(self.X) + decay.exp().diag()

    def solved(self, decay):
        return torch.linalg.solve(self.hessian(decay), self.X.T @ self.y / len(self.X))

    def train(self, w, decay):
        return (self.X @ w - self.y).square().mean() / 2 + (decay.exp() * w.square()).sum() / 2

    def val(self, w):
        return (self.V @ w - self.u).square().mean()

    def hypergradient(self, **kw):
        return implicit_hypergradient(self.train(self.w, self.decay), self.val(self.w), [self.w], self.decay, **kw)

    def exact(self):
        (grad,) = torch.autograd.grad(self.val(self.solved(self.decay)), self.decay)
        return grad


def test_docstring():
    doc = inspect.getdoc(implicit_hypergradient)
    for part in ("Args:", "Returns:", "Raises:", "Paper:", ">>>"):
        assert part in doc


def test_it_goes_to_the_derivative_through_the_closed_form():
    ridge = Ridge()
    exact = ridge.exact()
    errors = []
    for steps in (0, 3, 10, 300):
        found = ridge.hypergradient(steps=steps)
        errors.append(float((found.grads[0] - exact).norm() / exact.norm()))
        assert found.residual <= 1
        assert found.stationarity < 1e-14
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-10
    top = float(torch.linalg.eigvalsh(ridge.hessian(ridge.decay)).max())
    assert top / 2 < found.largest <= top * (1 + 1e-6)  # above half of it the series converges
    assert ridge.hypergradient(power_steps=500).largest == pytest.approx(top, rel=1e-4)
    assert "left unsolved after 300" in found.summary()


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_it_is_the_derivative_through_as_many_steps_from_the_optimum(steps):
    ridge, a = Ridge(seed=1), 0.3
    w = ridge.w.detach()
    for _ in range(steps + 1):
        start = w if w.requires_grad else w.clone().requires_grad_()
        (g,) = torch.autograd.grad(ridge.train(start, ridge.decay), start, create_graph=True)
        w = w - a * g
    (unrolled,) = torch.autograd.grad(ridge.val(w), ridge.decay)
    found = ridge.hypergradient(steps=steps, alpha=a)
    assert torch.allclose(found.grads[0], unrolled, rtol=1e-12, atol=1e-14)


def test_a_quadratic_bowl_is_exact_at_any_length():
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    lam = torch.tensor([0.5, 3.0], requires_grad=True)
    for steps in (0, 5):
        found = implicit_hypergradient(
            lambda: (w - lam).square().sum() / 2, lambda: w.pow(3).sum(), [w], [lam], steps=steps
        )
        assert torch.allclose(found.grads[0], 3 * w.detach() ** 2)
        assert found.residual < 1e-6


def test_residual_is_what_it_says():
    ridge = Ridge()
    found = ridge.hypergradient(steps=4, alpha=0.2, damping=0.1)
    H = ridge.hessian(ridge.decay).detach() + 0.1 * torch.eye(8, dtype=torch.float64)
    (g,) = torch.autograd.grad(ridge.val(ridge.w), ridge.w)
    q = sum(0.2 * torch.linalg.matrix_power(torch.eye(8) - 0.2 * H, j) @ g for j in range(5))
    assert found.residual == pytest.approx(float((H @ q - g).norm() / g.norm()))


def test_betty():
    """betty-ml 0.1.1, betty/hypergradient/neumann.py: 5 iterations, alpha 0.2, on the ridge problem above."""
    theirs = [
        0.175514479,
        0.226982655,
        -0.0148927934,
        -0.00272034504,
        -0.0193611881,
        -0.113455868,
        0.358913695,
        -0.0312591714,
    ]
    assert torch.allclose(Ridge().hypergradient(steps=5, alpha=0.2).grads[0], torch.tensor(theirs).double(), rtol=1e-6)


def test_what_the_validation_loss_says_of_the_hyperparameter_itself():
    w, lam = torch.tensor([2.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    found = implicit_hypergradient((w - lam).square().sum() / 2, (w * lam).sum(), [w], lam, steps=0)
    assert found.grads[0].item() == pytest.approx(4)  # d lam^2 / d lam


def test_a_network_with_a_decay_a_weight_and_unused_parts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net.unused = nn.Linear(2, 2)
    decays = [torch.zeros_like(p, requires_grad=True) for p in net.parameters()]
    x = torch.randn(8, 3)
    before = [p.clone() for p in net.parameters()]

    def train():
        out = net[:3](x)
        return out.square().mean() + sum(
            (d.exp() * p.square()).sum() for d, p in zip(decays, net.parameters(), strict=True)
        )

    found = implicit_hypergradient(
        train, lambda: net[:3](x).sum(), net, decays, generator=torch.Generator().manual_seed(0)
    )
    assert [g.shape for g in found.grads] == [d.shape for d in decays]
    assert not found.grads[-1].any()
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    ridge = Ridge()
    exact = ridge.exact()
    for name in ("X", "V", "y", "u", "decay", "w"):
        value = getattr(ridge, name)
        setattr(ridge, name, value.detach().to(dtype).requires_grad_(value.requires_grad))
    found = ridge.hypergradient().grads[0]
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, atol=0.1 * exact.abs().max())


def test_a_series_that_diverges_says_so():
    with pytest.warns(UserWarning, match="the series diverges"):
        found = Ridge().hypergradient(alpha=5.0)
    assert found.diverged
    assert "diverges" in found.summary()
    w, lam = torch.tensor([0.3], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    with pytest.warns(UserWarning, match="diverges"):  # negative curvature
        implicit_hypergradient((-w.square() / 2 + lam * w).sum(), w.sum(), [w], lam, steps=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not implicit_hypergradient((-w.square() / 2 + lam * w).sum(), w.sum(), [w], lam, damping=2.0).diverged


W = torch.ones(2, requires_grad=True)
LAM = torch.ones(2, requires_grad=True)


def bowl():
    return (W - LAM).square().sum()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: implicit_hypergradient(W * LAM, bowl, [W], LAM),
            "a scalar for train_loss, got float32 tensor of shape",
        ),
        (lambda: implicit_hypergradient(bowl, lambda: bowl() * math.nan, [W], LAM), "finite val_loss, got nan"),
        (lambda: implicit_hypergradient(bowl, 1.0, [W], LAM), "a scalar for val_loss, got 1.0"),
        (lambda: implicit_hypergradient(bowl, lambda: bowl().detach(), [W], LAM), "val_loss with its graph"),
        (lambda: implicit_hypergradient(bowl, LAM.sum, [W], LAM), "depends on none of them"),
        (
            lambda: implicit_hypergradient(lambda: (W * LAM).sum(), W.sum, [W], LAM),
            "no curvature|curved in the weights",
        ),
        (
            lambda: implicit_hypergradient(lambda: W.square().sum(), W.sum, [W], LAM),
            "act on the gradient of train_loss",
        ),
        (lambda: implicit_hypergradient(bowl, W.sum, [W.detach()], LAM), "weights that require a gradient"),
        (lambda: implicit_hypergradient(bowl, W.sum, [], LAM), "weights that require a gradient"),
        (
            lambda: implicit_hypergradient(bowl, W.sum, [W], [LAM, torch.ones(1)]),
            "hyper that require a gradient, and 1 of 2",
        ),
        (
            lambda: implicit_hypergradient(bowl, W.sum, [W], torch.ones(1, dtype=torch.int64)),
            "floating-point tensors for hyper",
        ),
        (lambda: implicit_hypergradient(bowl, W.sum, [W], LAM, steps=-1), "at least 0 for steps"),
        (lambda: implicit_hypergradient(bowl, W.sum, [W], LAM, power_steps=0), "at least 1 for power_steps"),
        (lambda: implicit_hypergradient(bowl, W.sum, [W], LAM, alpha=0.0), "positive, finite alpha"),
        (lambda: implicit_hypergradient(bowl, W.sum, [W], LAM, damping=-1.0), "damping of at least 0"),
    ],
)
def test_refuses_in_one_sentence(call, says):
    with pytest.raises(BadInput, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)

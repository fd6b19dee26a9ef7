import pytest
import torch

from pondera.errors import BadInput
from pondera.optim.optimal_input_gain import (
    METHODS,
    OneHidden,
    input_metric,
    input_step,
    least_squares,
    mean_square,
    multiplications,
    output_weights,
    start,
    train_two_stage,
    with_constant,
)


def drawn(n=60, inputs=4, outputs=2, hidden=5):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, generator=g, dtype=torch.float64) @ torch.randn(
        inputs, inputs, generator=g, dtype=torch.float64
    )
    y = torch.stack([(x[:, k] * x[:, -k - 1]).sin() for k in range(outputs)], 1)
    return x, y, start(x, outputs, hidden, g)


def stage(method, X, W, y):
    """The step of the input weights where the output weights are the best."""
    _, W_oh, O, e = output_weights(X, W, y)
    return input_step(X, O, e, W_oh, method, input_metric(X) if "hwo" in method else None)


def test_the_gradient_is_autograds():
    x, y, net = drawn()
    X = with_constant(x)
    W = net.W.clone().requires_grad_()
    W_oi, W_oh, _, _ = output_weights(X, net.W, y)
    loss = (y - X @ W_oi.T - (X @ W.T).tanh() @ W_oh.T).square().sum() / len(x)
    (gradient,) = torch.autograd.grad(loss, W)
    step = stage("bp", X, net.W, y)
    z = -(step / gradient)
    assert torch.allclose(z, z[0, 0].expand_as(z))
    assert z[0, 0] > 0


def test_the_learning_factor_and_gains_are_least_squares_of_the_linearised_outputs():
    x, y, net = drawn()
    X = with_constant(x)
    _, W_oh, O, e = output_weights(X, net.W, y)
    _, G = torch.func.jvp(lambda W: (X @ W.T).tanh() @ W_oh.T, (net.W,), (stage("bp", X, net.W, y),))
    assert (e * G).sum() / G.square().sum() == pytest.approx(1)  # no multiple of the step would be better
    step = stage("oig-bp", X, net.W, y)
    columns = []
    for i in range(X.shape[1]):  # nor would any multiple of one of its columns
        only = torch.zeros_like(step)
        only[:, i] = step[:, i]
        columns.append(torch.func.jvp(lambda W: (X @ W.T).tanh() @ W_oh.T, (net.W,), (only,))[1].flatten())
    U = torch.stack(columns, 1)
    assert torch.allclose(torch.linalg.lstsq(U, e.flatten()[:, None]).solution, torch.ones(5, 1, dtype=U.dtype))


def test_hwo_is_bp_on_whitened_inputs():
    x, y, net = drawn()
    X = with_constant(x)
    A, inverse = input_metric(X)
    white = X @ A.T
    assert torch.allclose(white.T @ white / len(x), torch.eye(5, dtype=x.dtype))
    assert torch.allclose(A.T @ A, inverse)
    there = stage("bp", white, net.W @ torch.linalg.inv(A), y)  # the same function of the whitened inputs
    assert torch.allclose(stage("hwo", X, net.W, y), there @ A, rtol=1e-10)


def test_a_step_on_transformed_inputs_is_the_gradient_times_an_autocorrelation():
    x, y, net = drawn()
    X = with_constant(x)
    A = torch.eye(5, dtype=x.dtype) + 0.1 * torch.arange(25, dtype=x.dtype).reshape(5, 5).sin()
    there = stage("bp", X @ A.T, net.W @ torch.linalg.inv(A), y) @ A
    here = stage("bp", X, net.W, y) @ A.T @ A
    ratio = there / here
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-8)


@pytest.mark.parametrize(("method", "same"), [("bp", False), ("oig-bp", True), ("hwo", True), ("oig-hwo", False)])
def test_units_of_the_inputs(method, same):
    x, y, net = drawn()
    X, units = with_constant(x), torch.logspace(-2, 1, 5, dtype=x.dtype)
    there = stage(method, X * units, net.W / units, y) * units
    assert torch.allclose(there, stage(method, X, net.W, y), rtol=1e-6) == same


def test_with_one_input_and_no_constant_the_gain_is_the_learning_factor():
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    y, W = (3 * x).sin(), torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    assert torch.allclose(stage("oig-bp", x, W, y), stage("bp", x, W, y))


@pytest.mark.parametrize("method", METHODS)
def test_the_error_never_rises_and_is_that_of_the_net(method):
    x, y, net = drawn()
    found = train_two_stage(x, y, net, method=method, iterations=25)
    assert all(b <= a for a, b in zip(found.errors, found.errors[1:]))
    assert found.errors[-1] < found.errors[0]
    assert mean_square(found.net(x) - y) == pytest.approx(found.errors[-1])
    assert found.iterations == 25
    assert not found.converged


def test_gains_beat_plain_steps():
    x, y, net = drawn()
    x = x * torch.logspace(-2, 1, 4, dtype=x.dtype)
    net = start(x, 2, 5, torch.Generator().manual_seed(1))
    errors = {m: train_two_stage(x, y, net, method=m, iterations=40).errors[-1] for m in METHODS}
    assert errors["oig-bp"] < errors["bp"]
    assert errors["oig-hwo"] < errors["hwo"]


def test_constant_dead_and_doubled_inputs_do_no_harm():
    x, y, _ = drawn()
    x = torch.cat([x, x[:, :1], torch.zeros(60, 1), torch.full((60, 1), 3.0)], 1).double()
    for method in METHODS:
        found = train_two_stage(x, y, 4, method=method, iterations=10, generator=torch.Generator().manual_seed(0))
        assert found.errors[-1] < found.errors[0]
        assert found.net.W.isfinite().all()


def test_start_controls_net_inputs():
    x, _, net = drawn(n=500)
    inputs = with_constant(x) @ net.W.T
    assert torch.allclose(inputs.mean(0), torch.full((5,), 0.5, dtype=x.dtype))
    assert torch.allclose(inputs.std(0, correction=0), torch.ones(5, dtype=x.dtype))


def test_stops_by_tolerance_and_goes_on_from_a_net():
    x, y, net = drawn()
    found = train_two_stage(x, y, net, iterations=500, tol=0.01)
    assert found.converged
    assert found.iterations < 500
    again = train_two_stage(x, y, found.net, iterations=1)
    assert again.errors[0] == pytest.approx(found.errors[-1])


def test_least_squares_is_lstsq():
    g = torch.Generator().manual_seed(0)
    U, t = (torch.randn(20, k, generator=g, dtype=torch.float64) for k in (4, 2))
    assert torch.allclose(least_squares(U, t), torch.linalg.lstsq(U, t).solution)
    assert not least_squares(torch.zeros(5, 2), torch.ones(5, 1)).any()


def test_multiplications_of_bp_by_hand():
    # 10 examples, 3 inputs with the constant, 2 hidden units, 1 output: k = 5
    once, step, again = multiplications("bp", 10, 3, 2, 1)
    assert once == 0
    assert step == (10 * 2 * 3 + 10 * 2 * 3) + (10 * 2 * 3 + 10 * 2 * 2 + 2 * 10)
    assert again == pytest.approx(10 * 3 * 2 + 10 * 15 + 4 / 3 * 125 + 2 * 10 * 5 + 25)


def test_float32_stays_float32():
    x, y, _ = drawn()
    found = train_two_stage(x.float(), y.float(), 4, iterations=5, generator=torch.Generator().manual_seed(0))
    assert found.net(x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"x": torch.ones(3)}, r"inputs as a matrix with a row an example, got shape \(3,\)"),
        ({"y": torch.ones(59, 2).double()}, "of one length and of one dtype, float32 or float64, got 60"),
        ({"x": torch.full((60, 4), torch.nan).double()}, "finite numbers, got 240 NaN"),
        ({"method": "lm"}, "knows the methods bp, oig-bp, hwo, oig-hwo, got 'lm'"),
        ({"hidden": 0}, "at least 1 for hidden, or a OneHidden, got 0"),
        ({"iterations": -1}, "at least 0 for iterations, got -1"),
        ({"tol": 1.0}, "tol of at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_input(bad, words):
    x, y, _ = drawn()
    with pytest.raises(BadInput, match=words):
        train_two_stage(**{"x": x, "y": y, "hidden": 3, **bad})


def test_a_net_that_does_not_fit():
    x, y, net = drawn()
    with pytest.raises(BadInput, match=r"a net of 3 inputs and 2 outputs, got one with weights \(5, 5\)"):
        train_two_stage(x[:, :3], y, net)
    assert isinstance(net, OneHidden)

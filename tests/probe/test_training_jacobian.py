import math

import matplotlib
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pondera.errors import BadInput
from pondera.probe.training_jacobian import bulk_overlap, sgd_training, training_jacobian

DOUBLE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def squared(out, y):
    return (out - y).square().mean()


def small_run(steps=4, momentum=0.9, seed=0, classes=3, features=4):
    """An MLP, batches of its own, and the training function."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes)).double()
    batches = [(torch.randn(7, features, dtype=DOUBLE), torch.randint(classes, (7,))) for _ in range(steps)]
    rates = [0.5 / (t + 1) for t in range(steps)]
    return model, batches, rates, sgd_training(model, cross_entropy, batches, rate=rates, momentum=momentum)


def linear_run(matrix):
    """What a "training" that multiplies by a matrix gives."""
    return training_jacobian(lambda theta: matrix @ theta, torch.zeros(len(matrix), dtype=matrix.dtype))


# -- the Jacobian ------------------------------------------------------------------------------------------------------


def test_gradient_descent_on_a_quadratic_by_hand():
    h = torch.randn(6, 6, generator=seeded(), dtype=DOUBLE)
    h, b = h @ h.T, torch.randn(6, generator=seeded(1), dtype=DOUBLE)

    def train(parameters):
        theta = torch.cat([parameters["a"].flatten(), parameters["b"]])
        for _ in range(9):
            theta = theta - 0.03 * (h @ theta - b)
        return {"a": theta[:4].view(2, 2), "b": theta[4:]}

    start = {"a": torch.randn(2, 2, generator=seeded(2), dtype=DOUBLE), "b": torch.ones(2, dtype=DOUBLE)}
    found = training_jacobian(train, start)
    exact = torch.linalg.matrix_power(torch.eye(6, dtype=DOUBLE) - 0.03 * h, 9)
    assert torch.allclose(found.jacobian, exact, atol=1e-12)
    assert torch.allclose(found.singular, torch.linalg.eigvalsh(exact).abs().sort(descending=True).values, atol=1e-12)
    solution = torch.linalg.solve(h, b)
    theta = torch.cat([start["a"].flatten(), start["b"]])
    assert torch.allclose(found.final, solution + exact @ (theta - solution), atol=1e-12)
    assert torch.allclose((found.left * found.singular) @ found.right.T, exact, atol=1e-12)


def test_momentum_on_a_quadratic_by_hand():
    # one parameter, loss h theta^2 / 2: (theta, m) -> (theta - eta (mu m + h theta), mu m + h theta)
    h, eta, mu, steps = 2.0, 0.3, 0.9, 6
    step = torch.tensor([[1 - eta * h, -eta * mu], [h, mu]], dtype=DOUBLE)
    exact = torch.linalg.matrix_power(step, steps)[0, 0]
    model = nn.Linear(1, 1, bias=False).double()
    one = torch.ones(1, 1, dtype=DOUBLE)
    train = sgd_training(model, lambda out, y: h * out.square().sum() / 2, [(one, one)] * steps, rate=eta, momentum=mu)
    found = training_jacobian(train, dict(model.named_parameters()))
    assert found.jacobian.item() == pytest.approx(exact.item(), rel=1e-12)


def test_equals_reverse_mode_through_the_unrolled_run():
    model, batches, rates, train = small_run()
    found = training_jacobian(train, dict(model.named_parameters()))

    def by_hand(theta):
        sizes = [5 * 4, 5, 3 * 5, 3]
        velocity = torch.zeros_like(theta)
        for (x, y), rate in zip(batches, rates, strict=True):
            w, b, v, c = theta.split(sizes)
            out = torch.tanh(x @ w.view(5, 4).T + b) @ v.view(3, 5).T + c
            (g,) = torch.autograd.grad(cross_entropy(out, y), theta, create_graph=True)
            velocity = 0.9 * velocity + g
            theta = theta - rate * velocity
        return theta

    start = torch.cat([p.detach().flatten() for p in model.parameters()]).requires_grad_()
    exact = torch.autograd.functional.jacobian(by_hand, start)
    assert torch.allclose(found.jacobian, exact, atol=1e-12)
    assert torch.allclose(found.final, by_hand(start), atol=1e-12)


def test_equals_finite_differences_on_a_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 2)).double()
    batches = [(torch.randn(3, 1, 4, 4, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)) for _ in range(3)]
    train = sgd_training(model, squared, batches, rate=0.2)
    start = {k: p.detach() for k, p in model.named_parameters()}
    found = training_jacobian(train, start)

    def moved(i, by):
        flat = torch.cat([p.flatten() for p in start.values()])
        flat[i] += by
        parts = flat.split([p.numel() for p in start.values()])
        out = train({k: v.view(start[k].shape) for k, v in zip(start, parts, strict=True)})
        return torch.cat([p.flatten() for p in out.values()])

    h = 1e-5
    numeric = torch.stack([(moved(i, h) - moved(i, -h)) / (2 * h) for i in range(len(found.final))], 1)
    assert torch.allclose(found.jacobian, numeric, atol=1e-8)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_is_that_of_torchs_sgd(momentum):
    model, batches, rates, train = small_run(momentum=momentum)
    trained = train({k: p.detach().clone() for k, p in model.named_parameters()})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    for (x, y), rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(trained[name], p, atol=1e-12)


def test_agrees_with_the_authors_notebook():
    """Their training and Jacobian by jax in float64: 4 hidden units, 2 epochs, parameters 0.2 sin(1), 0.2 sin(2), ..."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = (torch.tensor(a) for a in train_test_split(x / 16, y, test_size=197, random_state=0))
    model = nn.Sequential(nn.Linear(64, 4), nn.GELU(approximate="tanh"), nn.Linear(4, 10)).double()
    sizes = [p.numel() for p in model.parameters()]
    flat = 0.2 * torch.arange(1, sum(sizes) + 1, dtype=DOUBLE).sin()
    start = {k: v.view(p.shape) for (k, p), v in zip(model.named_parameters(), flat.split(sizes), strict=True)}
    batches = list(zip(x.split(64), y.split(64), strict=True)) * 2
    rates = [0.05 * (1 + math.cos(math.pi * t / 50)) for t in range(50)]
    train = sgd_training(model, cross_entropy, batches, rate=rates, momentum=0.9)
    found = training_jacobian(train, start)
    largest = [10.58105256, 9.42543039, 7.64375802, 7.42964081, 6.74532778, 5.82569046]
    smallest = [0.01907029, 0.01732911, 0.01288166, 0.00645268, 0.0048181, 0.00054005]
    assert found.singular[:6].tolist() == pytest.approx(largest, abs=2e-8)
    assert found.singular[-6:].tolist() == pytest.approx(smallest, abs=2e-8)
    assert found.singular.sum().item() == pytest.approx(355.8181019098463, rel=1e-9)
    assert found.regions().bulk.sum() == 135
    assert found.alignment[:3].tolist() == pytest.approx([0.96862984, 0.94335701, 0.98571404], abs=2e-8)
    assert found.alignment[found.regions().bulk].min().item() == pytest.approx(0.99961528, abs=1e-6)
    assert found.final.norm().item() == pytest.approx(3.918263034882485, rel=1e-9)
    with torch.no_grad():
        trained = train(start)
        loss = cross_entropy(torch.func.functional_call(model, trained, (x_test,)), y_test)
    assert loss.item() == pytest.approx(1.8121018821856327, rel=1e-9)


def test_a_subspace_is_the_jacobian_times_its_basis():
    model, _, _, train = small_run()
    start = dict(model.named_parameters())
    full = training_jacobian(train, start)
    columns = torch.randn(len(full.final), 6, generator=seeded(), dtype=DOUBLE)
    found = training_jacobian(train, start, directions=columns)
    basis = torch.linalg.qr(columns)[0]
    assert torch.allclose(found.jacobian, full.jacobian @ basis, atol=1e-12)
    assert torch.allclose(found.singular, torch.linalg.svdvals(full.jacobian @ basis), atol=1e-12)
    assert torch.allclose(full.jacobian @ found.right, found.left * found.singular, atol=1e-12)
    assert torch.allclose(found.right.T @ found.right, torch.eye(6, dtype=DOUBLE), atol=1e-12)
    assert full.singular[-1] <= found.singular.min() <= found.singular.max() <= full.singular[0]
    assert "on a subspace of 6 directions" in found.summary()


@pytest.mark.parametrize("chunk", [3, 1000])
def test_the_chunk_changes_nothing(chunk):
    model, _, _, train = small_run(steps=2)
    start = dict(model.named_parameters())
    a, b = training_jacobian(train, start), training_jacobian(train, start, chunk=chunk)
    assert torch.allclose(a.jacobian, b.jacobian, atol=1e-13)


def test_weights_no_example_reaches_are_bulk_exactly():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(9, 3)
    x[:, 1] = 0  # a feature that is always zero: its two weights never move
    train = sgd_training(model, cross_entropy, [(x, torch.arange(9) % 2)] * 20, rate=0.5)
    found = training_jacobian(train, dict(model.named_parameters()))
    assert ((found.singular - 1).abs() < 1e-6).sum() >= 2
    for i in (1, 4):  # weight[0, 1] and weight[1, 1]
        assert found.jacobian[:, i].tolist() == [float(j == i) for j in range(8)]


def test_leaves_model_and_random_state():
    model, _, _, train = small_run()
    was = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    a = training_jacobian(train, dict(model.named_parameters()))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not a.jacobian.requires_grad
    assert torch.equal(a.jacobian, training_jacobian(train, dict(model.named_parameters())).jacobian)
    trained = train(was)
    with torch.no_grad():
        model[0].weight.zero_()  # the run keeps a copy: the model's own numbers do not matter
    assert all(torch.equal(v, trained[k]) for k, v in train(was).items())


# -- regions and overlap -----------------------------------------------------------------------------------------------


def test_regions_and_alignment_by_hand():
    rotate = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=DOUBLE)
    matrix = torch.block_diag(50 * rotate, torch.eye(2, dtype=DOUBLE), torch.tensor([[1.005]]), torch.tensor([[0.3]]))
    found = linear_run(matrix.double())
    assert found.singular.tolist() == pytest.approx([50, 50, 1.005, 1, 1, 0.3])
    chaotic, bulk, stable = found.regions()
    assert chaotic.tolist() == [True, True, False, False, False, False]
    assert bulk.tolist() == [False, False, True, True, True, False]
    assert stable.tolist() == [False] * 5 + [True]
    assert found.alignment[bulk].tolist() == pytest.approx([1, 1, 1])
    assert found.alignment[:2].abs().max() < 1e-12  # turned by a right angle
    assert found.regions(0.001).chaotic.sum() == 3
    assert found.regions(0.8).stable.sum() == 0
    with pytest.raises(BadInput, match="tolerance between 0 and 1, got 0"):
        found.regions(0)


def test_summary_and_plot():
    found = linear_run(torch.diag(torch.tensor([40.0, 1.0, 1.0, 0.5])))
    assert "along 25.0% of the directions (up to 40 times)" in found.summary()
    assert "shrunk along 25.0% (down to 0.5)" in found.summary()
    assert "along 50.0%, the bulk" in found.summary()
    assert "cosine" not in linear_run(torch.diag(torch.tensor([4.0, 0.5]))).summary()
    matplotlib.use("agg")
    spectrum, cosine = found.plot().axes
    assert spectrum.get_lines()[0].get_ydata().tolist() == pytest.approx([40, 1, 1, 0.5])
    assert len(cosine.collections[0].get_offsets()) == 4


def test_overlap_of_planes_by_hand():
    # the bulk of a is the plane (e1, e2), that of b is spanned by e2 and cos(t) e1 + sin(t) e3
    t = math.pi / 6
    a = linear_run(torch.diag(torch.tensor([1.0, 1.0, 3.0, 0.2], dtype=DOUBLE)))
    q = torch.eye(4, dtype=DOUBLE)
    q[[0, 2], 0] = torch.tensor([math.cos(t), math.sin(t)], dtype=DOUBLE)
    q[[0, 2], 2] = torch.tensor([-math.sin(t), math.cos(t)], dtype=DOUBLE)
    b = linear_run(q @ torch.diag(torch.tensor([1.0, 1.0, 3.0, 0.2], dtype=DOUBLE)) @ q.T)
    overlap = bulk_overlap(a, b)
    assert overlap.cosines.tolist() == pytest.approx([1, math.cos(t)])
    assert overlap.shared.item() == pytest.approx((1 + 0.75) / 2)
    assert (overlap.chance, overlap.sizes) == (0.5, (2, 2))
    assert overlap.beyond_chance == pytest.approx(0.75)
    assert "share 87.5% of the smaller one; by chance it would be 50.0%" in overlap.summary()
    assert bulk_overlap(a, a).beyond_chance == pytest.approx(1)


def test_a_bulk_inside_a_larger_one_is_shared_whole():
    a = linear_run(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.2])))
    b = linear_run(torch.diag(torch.tensor([1.0, 5.0, 5.0, 0.2])))
    overlap = bulk_overlap(a, b)
    assert overlap.shared.item() == pytest.approx(1)
    assert (overlap.chance, overlap.sizes) == (0.75, (3, 1))
    everything = linear_run(torch.eye(4))
    assert bulk_overlap(everything, b).beyond_chance == 0  # one fills the space: nothing to learn


def test_chance_is_the_mean_over_random_subspaces():
    g, n, (k, m), seen = seeded(), 12, (3, 5), []
    for _ in range(300):
        runs = []
        for size in (k, m):
            q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=DOUBLE))[0]
            runs.append(linear_run(q @ torch.diag(torch.tensor([1.0] * size + [2.0] * (n - size)).double()) @ q.T))
        seen.append(bulk_overlap(*runs))
    mean = torch.stack([o.shared for o in seen]).mean().item()
    assert mean == pytest.approx(seen[0].chance, abs=0.02)
    assert seen[0].chance == m / n


# -- refused -----------------------------------------------------------------------------------------------------------

THREE = torch.ones(3)


@pytest.mark.parametrize(
    ("train", "parameters", "given", "words"),
    [
        (lambda p: p, [THREE], {}, "in a tensor or a mapping of tensors, got list"),
        (lambda p: p, {"a": 1.0}, {}, "got a mapping with float"),
        (lambda p: p, {}, {}, "with numbers in them, got none"),
        (lambda p: p, torch.ones(3, dtype=torch.long), {}, "all float32 or all float64, got int64"),
        (lambda p: p, torch.ones(3, dtype=torch.bfloat16), {}, "got bfloat16"),
        (lambda p: p, {"a": THREE, "b": THREE.double()}, {}, "got float32, float64"),
        (lambda p: p, {"a": torch.tensor([1.0, math.nan])}, {}, "1 NaN or infinite of 2 in its parameter a"),
        (lambda p: p, torch.empty(3, device="meta"), {}, "meta device"),
        (lambda p: p[:2], THREE, {}, r"it returned a tensor of shape \(2,\)"),
        (lambda p: {"b": p["a"]}, {"a": THREE}, {}, r"mapping with a \(3,\); it returned a mapping with b \(3,\)"),
        (lambda p: None, THREE, {}, "got NoneType"),
        (lambda p: p / 0, THREE, {}, "3 NaN or infinite of 3 in its trained parameters; train at a smaller rate"),
        (lambda p: (p - 1).sqrt(), THREE, {}, "NaN or infinite of 9 in its Jacobian"),
        (lambda p: p + torch.randn(3), THREE, {}, "could not differentiate train: RuntimeError: vmap: called random"),
        (lambda p: p @ torch.ones(2), THREE, {}, "could not differentiate train: RuntimeError"),
        (lambda p: p, THREE, {"directions": torch.ones(2, 1)}, r"columns of length 3, .* shape \(2, 1\)"),
        (lambda p: p, THREE, {"directions": torch.ones(3)}, "columns of length 3"),
        (lambda p: p, THREE, {"directions": torch.ones(3, 2)}, "2 that span fewer dimensions"),
        (lambda p: p, THREE, {"directions": torch.zeros(3, 1)}, "1 that span fewer dimensions"),
        (lambda p: p, THREE, {"directions": torch.full((3, 1), math.inf)}, "finite numbers"),
        (lambda p: p, THREE, {"chunk": 0}, "at least 1 column, got 0"),
    ],
)
def test_bad_input_is_one_sentence(train, parameters, given, words):
    with pytest.raises(BadInput, match=words) as caught:
        training_jacobian(train, parameters, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batches": []}, "at least one batch"),
        ({"rate": [0.1, 0.2]}, "got 2 rates for 1 batches"),
        ({"rate": -0.1}, "finite rates"),
        ({"rate": math.nan}, "finite rates"),
        ({"rate": 0.1, "momentum": math.inf}, "finite momentum"),
    ],
)
def test_bad_training_is_one_sentence(given, words):
    given = {"batches": [(torch.ones(2, 3), torch.zeros(2, 1))], "rate": 0.1} | given
    with pytest.raises(BadInput, match=words):
        sgd_training(nn.Linear(3, 1), squared, **given)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(3)])
def test_training_that_draws_or_keeps_statistics_is_refused(layer):
    model = nn.Sequential(layer, nn.Linear(3, 1))
    batches = [(torch.randn(4, 3), torch.zeros(4, 1))]
    with pytest.raises(BadInput, match="could not differentiate train"):
        training_jacobian(sgd_training(model, squared, batches, rate=0.1), dict(model.named_parameters()))
    model.eval()
    found = training_jacobian(sgd_training(model, squared, batches, rate=0.1), dict(model.named_parameters()))
    assert found.singular.isfinite().all()


@pytest.mark.parametrize("which", ["subspace", "other parameters", "no bulk"])
def test_overlaps_that_cannot_be_had(which):
    a, b = linear_run(torch.eye(3)), linear_run(torch.eye(3))
    if which == "subspace":
        b = training_jacobian(lambda p: p, THREE, directions=torch.eye(3)[:, :2])
        words = "needs full Jacobians, got one on 2 directions"
    elif which == "other parameters":
        b, words = linear_run(torch.eye(4)), "the same parameters, got 3 and 4"
    else:
        b, words = linear_run(2 * torch.eye(3)), "two bulks, got 3 and 0 singular values within 0.01 of 1"
    with pytest.raises(BadInput, match=words):
        bulk_overlap(a, b)

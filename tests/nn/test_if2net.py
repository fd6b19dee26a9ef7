import pytest
import torch

from pondera.errors import BadInput
from pondera.nn.if2net import IF2Net


def net(hidden=60, threshold=0.0, out=4, **kw):
    g = torch.Generator().manual_seed(0)
    return IF2Net(5, out, hidden, threshold=threshold, generator=g, dtype=torch.float64, **kw)


def task(seed, n=15, shift=0.0, classes=(0, 1)):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64) + shift
    return x, torch.tensor(classes)[torch.randint(2, (n,), generator=g)]


def test_old_answers_stay_and_new_ones_are_learned():
    model = net(ridge=1e-6)
    seen = []
    for t in range(3):
        x, y = task(t, shift=t, classes=(t, t + 1))
        model.fit_task(x, y)
        seen.append((x, y, model(x).detach().clone()))
        assert (model(x).argmax(1) == y).all()
    for x, y, said in seen:
        assert torch.allclose(model(x), said, rtol=0, atol=1e-12)
    assert model.free == pytest.approx(1 - 45 / 60)


def test_the_first_task_is_a_ridge():
    """Without anything kept, V = argmin |A V - Y|^2 + lambda |V|^2 with lambda the ridge times rows and mean square of A."""
    model, (x, y) = net(ridge=0.1), task(0)
    model.fit_task(x, y)
    a = model.features(x).detach()
    lam = 0.1 * len(x) * a.square().mean()
    target = torch.nn.functional.one_hot(y, 4).double()
    wanted = torch.linalg.solve(a.T @ a + lam * torch.eye(60).double(), a.T @ target)
    assert torch.allclose(model.output.T, wanted, atol=1e-10)
    assert torch.allclose(model.mean, (x @ model.weight.T).mean(0))
    assert torch.allclose(model.std, (x @ model.weight.T).std(0, correction=0))


def test_the_later_task_solves_the_projected_problem():
    model, (x, y) = net(ridge=0.1), task(1, shift=1.0, classes=(2, 3))
    model.fit_task(*task(0))
    old, q = model.output.detach().clone(), model.kept[: int(model.n_kept)]
    p = torch.eye(60).double() - q.T @ q
    assert torch.allclose(p @ p, p, atol=1e-12)
    a = model.features(x).detach()
    lam = 0.1 * len(x) * a.square().mean()
    rest = torch.nn.functional.one_hot(y, 4).double() - a @ old.T
    d = torch.linalg.solve(p @ a.T @ a @ p + lam * torch.eye(60).double(), p @ a.T @ rest)
    model.fit_task(x, y)
    assert torch.allclose(model.output.T, old.T + p @ d, atol=1e-10)
    every = model.kept[: int(model.n_kept)]
    assert torch.allclose(every @ every.T, torch.eye(len(every)).double(), atol=1e-12)
    free = torch.eye(60).double() - every.T @ every
    for rows in (x, task(0)[0]):
        assert (model.features(rows) @ free).abs().max() < 1e-10


def test_a_task_told_twice_changes_nothing():
    model, (x, y) = net(), task(0)
    model.fit_task(x, y)
    was, kept = model.output.detach().clone(), int(model.n_kept)
    model.fit_task(x, y)
    assert torch.allclose(model.output, was, atol=1e-12) and int(model.n_kept) == kept


def test_a_threshold_keeps_less():
    kept = []
    for threshold in (0.0, 0.03, 0.3):
        model = net(threshold=threshold).fit_task(*task(0, n=30))
        kept.append(int(model.n_kept))
    assert kept[0] == 30 > kept[1] > kept[2] > 0


def test_targets_may_be_numbers():
    model, (x, y) = net(), task(0)
    other = net()
    model.fit_task(x, y)
    other.fit_task(x, torch.nn.functional.one_hot(y, 4).double())
    assert torch.equal(model.output, other.output)


def test_state_goes_on_elsewhere():
    model, other = net(), net()
    model.fit_task(*task(0))
    other.load_state_dict(model.state_dict())
    for m in (model, other):
        m.fit_task(*task(1, shift=1.0))
    assert torch.equal(model.output, other.output) and model.free == other.free
    model.reset_parameters()
    assert model.free == 1 and not model.output.any()


def test_full():
    model = net(hidden=20)
    model.fit_task(*task(0)).fit_task(*task(1, shift=1.0))
    assert model.free == 0
    was = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match="found none of 20 directions free; a net with more hidden features"):
        model.fit_task(*task(2))
    assert all(torch.equal(was[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.zeros(3, 4), torch.zeros(3).long(), r"needs rows \(n, 5\), got a float32 tensor of shape \(3, 4\)"),
        (torch.zeros(0, 5), torch.zeros(0).long(), "needs rows"),
        (torch.full((3, 5), torch.nan), torch.zeros(3).long(), "needs finite numbers, got 15 NaN"),
        (torch.zeros(3, 5), torch.zeros(2).long(), "needs 3 targets, one a row, got a int64 tensor"),
        (
            torch.zeros(3, 5),
            torch.tensor([0, 1, 4]),
            r"classes from 0 to 3, got a int64 tensor of shape \(3,\) on cpu from 0 to 4",
        ),
        (torch.zeros(3, 5), torch.zeros(3, 2), r"needs targets \(3, 4\), got a float32"),
    ],
)
def test_refused_rows(x, y, words):
    model = net()
    with pytest.raises(BadInput, match=words):
        model.fit_task(
            x.double(), y.double() if y.is_floating_point() else y
        ) if "float32" not in words else model.fit_task(x, y)
    assert model.free == 1 and not model.output.any()


def test_refused_settings():
    with pytest.raises(BadInput, match="IF2Net needs hidden_features of at least 1, a whole number, got 0"):
        IF2Net(3, 2, 0)
    with pytest.raises(BadInput, match=r"a threshold in \[0, 1\) and a positive ridge, got 1.0 and 0.01"):
        IF2Net(3, 2, threshold=1.0)
    with pytest.raises(BadInput, match="needs 3 features last"):
        IF2Net(3, 2)(torch.zeros(2))

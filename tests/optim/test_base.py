"""What the matrix optimizers share, for every one that is exported, and for SGDW."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pondera.optim
from pondera.errors import BadInput
from pondera.optim import SGDW, NorMuon, groups
from pondera.optim._base import MatrixOptimizer

PUBLIC = [getattr(pondera.optim, name) for name in pondera.optim.__all__]
MATRIX = [m for m in PUBLIC if inspect.isclass(m) and issubclass(m, MatrixOptimizer)]
ALL = [*MATRIX, SGDW]
X, Y = torch.randn(16, 3, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4


def small_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype)


def train(net: nn.Module, optimizer, steps: int, x: torch.Tensor = X) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).float(), Y)
        loss.backward()
        optimizer.step()
    return loss.item()


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in net.parameters()])


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_learns_and_resumes_bit_for_bit(method, dtype):
    net = small_net(dtype)
    x = X.to(dtype)
    optimizer = method(groups(net), lr=0.02)
    first = F.cross_entropy(net(x).float(), Y).item()
    train(net, optimizer, 5, x)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    last = train(net, optimizer, 5, x)
    assert last < first
    again = small_net(dtype)
    resumed = method(groups(again), lr=0.5)  # the rate comes back with the state
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, 5, x)
    assert torch.equal(weights(again), weights(net))


@pytest.mark.parametrize("method", MATRIX)
def test_plain_parameters_split_by_dimension(method):
    net, plain = small_net(), small_net()
    split = [
        {"params": [p for p in net.parameters() if p.ndim >= 2]},
        {"params": [p for p in net.parameters() if p.ndim < 2], "matrix": False},
    ]
    train(net, method(split, lr=0.02), 3)
    train(plain, method(plain.parameters(), lr=0.02), 3)
    assert torch.equal(weights(net), weights(plain))


@pytest.mark.parametrize("method", MATRIX)
def test_the_rest_moves_by_adamw_at_the_linked_rate(method):
    def gradients(p, optimizer):
        for t in range(4):
            p.grad = torch.linspace(-1, 2, p.numel()).reshape(p.shape).roll(t)
            optimizer.step()
        return p.detach()

    ours, twin = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    settings = {"betas": (0.8, 0.9), "vector_eps": 1e-6, "vector_weight_decay": 0.1}
    mine = gradients(ours, method([{"params": [ours], "matrix": False}], lr=0.5, vector_lr_ratio=0.02, **settings))
    theirs = gradients(twin, torch.optim.AdamW([twin], lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1))
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize("rest", ["SGD", torch.optim.RAdam])
def test_the_rest_moves_by_another_that_is_named(method, rest):
    net, plain = small_net(torch.float64), small_net(torch.float64)
    optimizer = method(groups(net), lr=0.02, vector_lr_ratio=0.5, vector_weight_decay=0.1, rest=rest)
    twin = getattr(torch.optim, rest) if isinstance(rest, str) else rest
    split = groups(plain)
    others = twin(split[-1]["params"], lr=0.01, weight_decay=0.1)
    matrices = method(split[:-1], lr=0.02)
    for step in range(4):
        train(net, optimizer, 1, X.double())
        for o in (others, matrices):
            o.zero_grad()
        F.cross_entropy(plain(X.double()).float(), Y).backward()
        others.step(), matrices.step()
        if step == 1:  # one state_dict holds both, and a copy goes on as the first would
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = method(groups(net), lr=1.0, rest=rest)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            net, optimizer = copy.deepcopy((net, optimizer))
    assert torch.equal(weights(net), weights(plain))


def test_an_unknown_rest_is_refused():
    w = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(
        BadInput, match=r"NorMuon needs the name of an optimizer of torch.optim for rest, got 'Adan'.*Adam"
    ):
        NorMuon(w, rest="Adan")
    with pytest.raises(BadInput, match="NorMuon needs an optimizer class, or its name in torch.optim, for rest, got 3"):
        NorMuon(w, rest=3)


@pytest.mark.parametrize("method", ALL)
def test_closure_schedule_and_frozen_parameters(method):
    net = small_net()
    net[0].weight.requires_grad_(False)
    before = net[0].weight.clone()
    optimizer = method(groups(net), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=5)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        return loss

    losses = []
    for _ in range(4):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert losses[-1] < losses[0]
    assert torch.equal(net[0].weight, before)
    assert net[0].weight not in optimizer.state


@pytest.mark.parametrize("method", ALL)
def test_gradients_are_left_as_they_are(method):
    net = small_net()
    F.cross_entropy(net(X), Y).backward()
    before = [p.grad.clone() for p in net.parameters()]
    method(groups(net)).step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("method", ALL)
def test_grad_scaler_skips_an_overflow_and_unscales(method):
    net, plain = small_net(), small_net()
    optimizer, scaler = method(groups(net), lr=0.02), torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(X), Y)).backward()
        if overflow:
            net[0].weight.grad[0, 0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    train(plain, method(groups(plain), lr=0.02), 2)
    assert torch.allclose(weights(net), weights(plain), atol=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_compiled_step_is_the_same_step(method):
    net, plain = small_net(torch.float64), small_net(torch.float64)
    compiled, optimizer = method(groups(net), lr=0.02), method(groups(plain), lr=0.02)
    step = torch.compile(compiled.step, backend="aot_eager")
    for _ in range(3):
        for one, move in ((net, step), (plain, optimizer.step)):
            one.zero_grad()
            F.cross_entropy(one(X.double()), Y).backward()
            move()
    assert torch.allclose(weights(net), weights(plain), atol=5e-5)  # compiled, AdamW takes its corrections in float32


@pytest.mark.parametrize("method", ALL)
def test_rate_as_a_tensor_and_deepcopy(method):
    net, plain = small_net(torch.float64), small_net(torch.float64)
    optimizer = method(groups(net), lr=torch.tensor(0.02, dtype=torch.float64))
    train(net, optimizer, 2, X.double())
    net, optimizer = copy.deepcopy((net, optimizer))
    train(net, optimizer, 1, X.double())
    train(plain, method(groups(plain), lr=0.02), 3, X.double())
    assert torch.allclose(weights(net), weights(plain), atol=1e-12)


@pytest.mark.parametrize("method", ALL)
def test_sparse_and_complex_are_refused(method):
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(BadInput, match=rf"{method.__name__} needs dense gradients, got a sparse one .*\(4, 3\)"):
        method(table.parameters()).step()
    z = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    z.grad = torch.zeros_like(z)
    with pytest.raises(BadInput, match=f"{method.__name__} needs real parameters, got a complex one"):
        method([z]).step()


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lr": -1.0}, "needs lr"),
        ({"lr": float("nan")}, "needs lr .* got nan"),
        ({"lr": "fast"}, "needs a number for lr, got 'fast'"),
        ({"weight_decay": -0.1}, "needs weight_decay of at least 0"),
    ],
)
def test_bad_settings_are_one_sentence_in_defaults_and_groups(method, bad, words):
    w = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(BadInput, match=f"{method.__name__} {words}"):
        method([w], **bad)
    with pytest.raises(BadInput, match=f"{method.__name__} {words}"):
        method([{"params": [w], **bad}])


@pytest.mark.parametrize("method", MATRIX)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"betas": 0.9}, "needs two numbers for betas, got 0.9"),
        ({"betas": (0.9, 1.0)}, "needs betas of at least 0 and below 1, got 1"),
        ({"vector_lr_ratio": -1.0}, "needs vector_lr_ratio of at least 0"),
        ({"vector_eps": float("inf")}, "needs vector_eps of at least 0, finite, got inf"),
    ],
)
def test_bad_settings_of_the_rest(method, bad, words):
    with pytest.raises(BadInput, match=f"{method.__name__} {words}"):
        method([nn.Parameter(torch.zeros(2, 2))], **bad)

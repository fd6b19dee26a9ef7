from itertools import pairwise

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.penalties import sorted_entries, spectral, wasserstein_to_start

D = torch.float64


def kernel(*shape):
    return 0.5 * torch.cos(1.0 + 0.7 * torch.arange(torch.Size(shape).numel(), dtype=D)).reshape(shape)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_terms_by_hand(k):
    # singular values 3 and 1, bias (1, 2): (3^k - 1)^2 + 5^k
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 3.0], [1.0, 0.0]]))
        layer.bias.copy_(torch.tensor([1.0, 2.0]))
    assert spectral(layer, power=k).item() == pytest.approx((3**k - 1) ** 2 + 5**k)
    assert spectral(layer.weight, power=k).item() == pytest.approx((3**k - 1) ** 2)


def test_norm_layers_by_hand():
    norm = nn.BatchNorm1d(2)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0]))  # (4 - 1)^2 + 0
        norm.bias.copy_(torch.tensor([1.0, 1.0]))  # 2^2
    alone = nn.Linear(2, 2, bias=False)
    nn.init.eye_(alone.weight)
    assert spectral(nn.Sequential(alone, norm)).item() == pytest.approx(13.0)
    assert spectral(nn.Sequential(alone, nn.BatchNorm1d(2, affine=False))).item() == 0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("memory", [None, {}])
def test_gradient_by_the_formula(k, memory):
    # 2 (s^k - 1) k s^(k - 1) u v'
    w = kernel(5, 3).requires_grad_()
    spectral(w, power=k, memory=memory).backward()
    u, s, v = torch.linalg.svd(w.detach(), full_matrices=False)
    expected = 2 * (s[0] ** k - 1) * k * s[0] ** (k - 1) * torch.outer(u[:, 0], v[0])
    assert torch.allclose(w.grad, expected)


def test_one_power_step_a_call_never_above_and_soon_there():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 6, dtype=D, generator=g) for _ in range(2))
    memory = {}
    spectral(a, power=1, memory=memory)
    exact = torch.linalg.matrix_norm(b, 2)
    seen = [1 + spectral(b, power=1, memory=memory).sqrt() for _ in range(60)]  # sigma_1 > 1
    assert seen[0] < exact
    assert all(x <= y + 1e-12 for x, y in pairwise(seen))
    assert torch.isclose(seen[-1], exact)


def test_memory_outlives_a_layer_at_zero_and_is_refused_by_another_model():
    memory, layer = {}, nn.Linear(3, 4, bias=False)
    spectral(layer, memory=memory)
    kept = memory["weight"].clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert spectral(layer, memory=memory).item() == 1
    assert torch.equal(memory["weight"], kept)
    with pytest.raises(BadInput, match="a memory of this model alone"):
        spectral(nn.Linear(3, 5), memory=memory)


def test_memory_under_vmap_follows_each_model():
    w, u = torch.stack([kernel(4, 3), kernel(4, 3).flip(0) + 1]), torch.ones(2, 4, dtype=D) / 2

    def one(w, u):
        return spectral(w, memory={"weight": u})

    for _ in range(50):
        found = torch.func.vmap(one)(w, u)
    assert torch.allclose(found, torch.stack([spectral(each) for each in w]))


def test_training_brings_the_largest_singular_value_to_one():
    torch.manual_seed(0)
    layer, memory = nn.Linear(6, 8), {}
    sgd = torch.optim.SGD(layer.parameters(), lr=0.02)
    for _ in range(300):
        sgd.zero_grad()
        spectral(layer, memory=memory).backward()
        sgd.step()
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


def test_wasserstein_by_hand_with_its_gradient():
    # in order 0 1 2 5 against 0 1 2 3: only the largest pulls, 2 (5 - 3)
    w = torch.tensor([[0.0, 5.0], [1.0, 2.0]], requires_grad=True)
    loss = wasserstein_to_start(w, torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    loss.backward()
    assert loss.item() == 4
    assert torch.equal(w.grad, torch.tensor([[0.0, 4.0], [0.0, 0.0]]))


def test_wasserstein_is_scipys_distance_and_never_above_l2_to_the_start():
    from scipy.optimize import linear_sum_assignment

    start, w = kernel(4, 5), kernel(5, 4).mT.flip(0) + 0.1
    cost = (w.reshape(-1, 1) - start.reshape(1, -1)).square()
    rows, cols = linear_sum_assignment(cost.numpy())  # the transport of least cost, found without sorting
    found = wasserstein_to_start(w, start)
    assert found.item() == pytest.approx(cost[rows, cols].sum().item())
    assert found < (w - start).square().sum()


def test_wasserstein_of_a_model_and_what_becomes_of_it_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.MultiheadAttention(4, 2))
    start = sorted_entries(model)
    assert wasserstein_to_start(model, start).item() == 0
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0, 1))
    assert wasserstein_to_start(model, start).item() == 0
    with torch.no_grad():
        model[0].weight.add_(0.5)
    assert wasserstein_to_start(model, start).item() == pytest.approx(20 * 0.25)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spectral(torch.eye(2), power=0), "power of at least 1, got 0"),
        (lambda: spectral(nn.LayerNorm(3)), "found no weight it owns in LayerNorm"),
        (
            lambda: wasserstein_to_start(torch.eye(2), torch.ones(3)),
            r"needs the 4 entries the weight started with, got a",
        ),
        (lambda: wasserstein_to_start(nn.Linear(2, 2), {}), "under the names of its weights"),
        (lambda: wasserstein_to_start(nn.Linear(2, 2), {"weight": 3}), "weight started with, got int"),
        (lambda: sorted_entries(torch.ones(3)), "at least two dimensions"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(BadInput, match=words):
        call()

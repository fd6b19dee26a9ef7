import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pondera.errors import BadInput
from pondera.linalg import split_size, train_bonds, train_matrix
from pondera.parametrize import share_mpo


def stack(n=3, a=24, b=36, **kw):
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(a, b, **kw) for _ in range(n))


def names(net):
    return [str(i) for i in range(len(net))]


def same_start(net):
    for layer in net[1:]:
        layer.load_state_dict(net[0].state_dict())
    return net


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_the_first_layer_and_its_equals_are_what_they_were(dtype, tolerance):
    net = same_start(stack()).to(dtype)
    weight = net[0].weight.detach().clone()
    share_mpo(net, names(net))
    for layer in net:
        assert layer.weight.dtype == dtype
        assert torch.allclose(layer.weight, weight, atol=tolerance)


def test_layers_that_start_apart_keep_their_scale():
    net = stack()
    before = [layer.weight.detach().clone() for layer in net]
    share_mpo(net, names(net), cores=3)
    assert torch.allclose(net[0].weight, before[0], atol=1e-6)
    for layer, was in zip(net[1:], before[1:]):
        assert not torch.allclose(layer.weight, was, atol=1e-2)
        assert (layer.weight.norm() / was.norm()).item() == pytest.approx(1, abs=0.1)


def test_counts_by_the_formula():
    # 128 = 4 4 2 2 2 (rows) = 2 2 2 4 4 (columns): bonds 1 8 64 64 8 1
    net = stack(3, 128, 128, bias=False)
    share_mpo(net, names(net))
    auxiliary, central = 2 * (8 * 8 + 8 * 8 * 64), 64 * 4 * 64
    assert central == 128 * 128
    assert sum(p.numel() for p in net.parameters()) == central + 3 * auxiliary


def test_auxiliary_tensors_are_an_eighth_of_a_square_of_768():
    rows, cols = split_size(768, 5), split_size(768, 5)[::-1]
    d = train_bonds(rows, cols)
    each = [d[k] * rows[k] * cols[k] * d[k + 1] for k in range(5)]
    assert each[2] == 768 * 768
    assert (sum(each) - each[2]) / each[2] == pytest.approx(1 / 8, abs=1e-3)


def test_there_is_one_central_tensor_and_its_gradient_is_the_sum_over_layers():
    net = share_mpo(stack(dtype=torch.float64), names(stack()))
    held = [layer.parametrizations.weight[0] for layer in net]
    assert all(one.central is held[0].central for one in held)
    x = torch.randn(5, 24, dtype=torch.float64)
    sum(layer(x).tanh().sum() for layer in net).backward()
    total = torch.zeros_like(held[0].central)
    for layer in net:  # by hand: the layer's own train, with a central tensor of its own
        outer = [p.detach() for p in list(layer.parametrizations.weight.parameters(recurse=False))]
        central = held[0].central.detach().clone().requires_grad_()
        w = train_matrix([*outer[:2], central, *outer[2:]]).reshape(36, 24)
        nn.functional.linear(x, w, layer.bias.detach()).tanh().sum().backward()
        total += central.grad
    assert torch.allclose(held[0].central.grad, total)


def test_training_moves_all_and_keeps_one_centre():
    net = share_mpo(same_start(stack()), names(stack()))
    x = torch.randn(5, 24)
    sum((k + 1) * layer(x).square().mean() for k, layer in enumerate(net)).backward()
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(0.1 * p.grad)
    assert not torch.equal(net[0].weight, net[1].weight)
    assert net[0].parametrizations.weight[0].central is net[2].parametrizations.weight[0].central


def test_state_dict_copy_assigning_and_baking():
    net = share_mpo(stack(dtype=torch.float64), names(stack()))
    twin = share_mpo(same_start(stack(dtype=torch.float64)), names(stack()))
    twin.load_state_dict(net.state_dict())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(net, twin))
    copied = copy.deepcopy(net)
    centres = {id(layer.parametrizations.weight[0].central) for layer in copied}
    assert len(centres) == 1
    assert centres != {id(net[0].parametrizations.weight[0].central)}
    net[1].weight = net[0].weight.detach()  # what has this centre is met
    assert torch.allclose(net[1].weight, net[0].weight, atol=1e-6)
    held = net[2].weight.detach().clone()
    parametrize.remove_parametrizations(net[2], "weight", leave_parametrized=True)
    assert torch.equal(net[2].weight, held)
    assert parametrize.is_parametrized(net[1])


def test_convolutions_are_seen_as_matrices():
    net = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)])
    before = net[0].weight.detach().clone()
    share_mpo(net, ["0", "1"], cores=3)
    assert torch.allclose(net[0].weight, before, atol=1e-6)
    assert net[1](torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)


def tied():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Embedding(4, 4)})
    net["b"].weight = net["c"].weight
    return net


@pytest.mark.parametrize(
    ("build", "given", "words"),
    [
        (stack, ["0"], "at least two layers, each once"),
        (stack, ["0", "0"], "at least two layers, each once"),
        (stack, "01", "at least two layers, each once"),
        (stack, ["0", "7"], "no layer named '7'"),
        (tied, ["a", "b"], "which another layer shares as a whole"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)), ["0", "1"], r"got \(4, 4\) .* and \(5, 4\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU()), ["0", "1"], r"and 1 \(ReLU\) has none"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), ["0", "1"], "at least two dimensions"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(build, given, words):
    net = build()
    with pytest.raises(BadInput, match=words):
        share_mpo(net, given)
    assert not any(parametrize.is_parametrized(m) for m in net.modules())


def test_more_bad_input():
    with pytest.raises(BadInput, match="odd number of cores, at least 3"):
        share_mpo(stack(), names(stack()), cores=4)
    net = share_mpo(stack(), names(stack()))
    with pytest.raises(BadInput, match="parametrized already"):
        share_mpo(net, names(net))
    broken = stack()
    with torch.no_grad():
        broken[1].weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match="weight of 1"):
        share_mpo(broken, names(broken))

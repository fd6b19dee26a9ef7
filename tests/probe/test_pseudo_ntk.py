import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe.ntk import kernel_dynamics, ntk
from pondera.probe.pseudo_ntk import pseudo_ntk

from ..conformance.models import make


def test_a_linear_layer_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    found = pseudo_ntk(nn.Linear(2, 5), x)
    assert torch.allclose(found.kernel, x @ x.T + 1)
    assert found.parameters == 15
    assert found.square


def test_two_layers_by_hand():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(2.0)
        net[1].weight.copy_(torch.tensor([[1.0], [3.0]]))
    # s = (1 + 3) 2 x / sqrt(2): ds/dw = 4 x / sqrt(2), ds/dv = (2 x, 2 x) / sqrt(2); kernel (16 + 4 + 4) x x' / 2
    assert pseudo_ntk(net, torch.tensor([[1.0], [-2.0]])).kernel.flatten().tolist() == pytest.approx([12, -24, -24, 48])


@pytest.mark.parametrize("name", ["mlp", "cnn", "conv1d", "residual", "parametrized"])
def test_against_the_gradient_of_the_sum(name):
    model, batch = make(name)
    model.eval()
    batch = batch[:5]
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x in batch:
        out = model(x.unsqueeze(0))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.sum() / out.numel() ** 0.5, params)]))
    dense = torch.stack(rows) @ torch.stack(rows).T
    assert torch.allclose(pseudo_ntk(model, batch).kernel, dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_is_the_mean_of_the_full_kernel_over_pairs_of_outputs(name):
    model, batch = make(name)
    batch = batch[:4]
    full = ntk(model, batch).kernel
    assert torch.allclose(pseudo_ntk(model, batch).kernel, full.sum((2, 3)) / full.shape[2], rtol=1e-3, atol=1e-4)


def test_two_batches():
    model, batch = make("mlp")
    whole, part = pseudo_ntk(model, batch), pseudo_ntk(model, batch[:5], batch[5:])
    assert torch.allclose(part.kernel, whole.kernel[:5, 5:], rtol=1e-4, atol=1e-5)
    assert not part.square
    assert part.outputs.shape == (5, 4)


def test_it_needs_no_equal_outputs():
    """Tokens: sequences of two lengths have different outputs, and their sums still compare."""
    model, tokens = make("attention")
    assert pseudo_ntk(model, tokens[:3], tokens[3:5, :4]).kernel.shape == (3, 2)


def test_one_output_is_the_full_kernel():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(5, 3)
    assert torch.allclose(pseudo_ntk(net, x).kernel, ntk(net, x).kernel[:, :, 0, 0])


def test_outputs_that_sum_to_one_have_none():
    net = nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1))
    assert pseudo_ntk(net, torch.randn(4, 3)).kernel.abs().max() < 1e-12


def test_the_flow_takes_it():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 4)), torch.randn(6, 3), torch.randn(6, 4)
    full, pseudo = ntk(net, x), pseudo_ntk(net, x)
    a, b = (kernel_dynamics(k.kernel, k.outputs, y, 0.1).train[0] for k in (full, pseudo))
    assert (a - b).norm() < 0.15 * (a - full.outputs).norm()


def test_bad_input():
    with pytest.raises(BadInput, match="pseudo_ntk could not run the model"):
        pseudo_ntk(nn.Linear(3, 2), torch.randn(4, 5))
    with pytest.raises(BadInput, match="found none"):
        pseudo_ntk(nn.Linear(3, 2).requires_grad_(False), torch.randn(4, 3))
    with pytest.raises(BadInput, match="meta device"):
        pseudo_ntk(nn.Linear(3, 2, device="meta"), torch.randn(4, 3))
    with pytest.raises(BadInput, match="NaN or infinite"):
        pseudo_ntk(nn.Linear(3, 2), torch.full((4, 3), torch.inf))

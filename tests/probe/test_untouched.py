import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.probe._untouched import require_model, run, scores, untouched


class Meddler(nn.Module):
    """Does in forward everything a look must not leave behind."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.mul_(2)
            self.layer.bias.data.add_(1)
        self.seen.add_(1)
        self.seen = self.seen + 1  # another tensor under the same name
        random.random(), np.random.rand()
        return self.layer(x) + torch.rand(2)


def test_what_forward_does_is_undone():
    net, x = Meddler(), torch.randn(4, 3)
    was = {k: v.clone() for k, v in net.state_dict().items()}
    buffer = net.seen
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with untouched(net):
        net(x)
    assert net.seen is buffer
    assert all(torch.equal(was[k], v) for k, v in net.state_dict().items())
    assert torch.equal(rng[0], torch.get_rng_state())
    assert (rng[1] == np.random.get_state()[1]).all()
    assert rng[2] == random.getstate()


def test_an_error_restores_too():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout())
    net[2].eval()

    def look():
        with untouched(net, grad=True):
            net.train()
            net[0].register_forward_hook(lambda *a: None)
            net[0].weight.requires_grad_(False)
            net(torch.randn(4, 3)).sum().backward()
            net[0].weight.fill_(torch.nan)
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        look()
    assert [m.training for m in net] == [True, True, False]
    assert not net[0]._forward_hooks
    assert net[0].weight.requires_grad
    assert net[0].weight.isfinite().all()
    assert net[1].bias.grad is None
    assert net[1].num_batches_tracked == 0


def test_the_owners_gradients_hooks_and_graph_survive():
    net, x = nn.Linear(3, 2), torch.randn(4, 3)
    net(x).sum().backward()
    gradient = net.weight.grad
    kept = gradient.clone()
    calls = []
    net.register_forward_hook(lambda *a: calls.append(1))
    pending = net(x).square().sum()  # its graph needs the weights' version
    with untouched(net, grad=True):
        net(x).sum().backward()
    assert net.weight.grad is gradient
    assert torch.equal(gradient, kept)
    assert len(net._forward_hooks) == 1
    pending.backward()


def test_mode_and_autograd_inside():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Dropout())
    with untouched(net):
        assert not any(m.training for m in net.modules())
        assert not net(torch.randn(1, 3)).requires_grad
    with untouched(net, grad=True):
        assert net(torch.randn(1, 3)).requires_grad
    assert net[1].training


@pytest.mark.parametrize("batch", ["positional", "tuple", "mapping"])
def test_run_takes_a_batch_as_the_model_does(batch):
    net, x, y = nn.Bilinear(2, 3, 1), torch.randn(4, 2), torch.randn(4, 3)
    if batch == "positional":
        net, given = nn.Linear(2, 1), x
    else:
        given = (x, y) if batch == "tuple" else {"input2": y, "input1": x}
    assert run(net, given, "test").shape == (4, 1)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            torch.randn(4, 5),
            r"test could not run the model on its batch \(float32 tensor of shape \(4, 5\) on cpu\): RuntimeError",
        ),
        (torch.ones(4, 3, dtype=torch.long), "int64 tensor"),
        (torch.empty(0, 3), "numbers in it, got a float32 tensor of shape \\(0, 3\\)"),
        (torch.full((2, 3), torch.nan), "6 NaN of 6"),
        ((), "got an empty tuple"),
        ("text", "got str"),
        ({"wrong": torch.randn(4, 3)}, "wrong: float32"),
    ],
)
def test_bad_batches_in_one_sentence(batch, words):
    with pytest.raises(BadInput, match=words) as caught:
        run(nn.Linear(3, 2), batch, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("net", "got str"),
        (nn.Linear(2, 2, device="meta"), "meta device"),
        (nn.LazyLinear(2), "weight has no shape yet"),
    ],
)
def test_models_without_numbers(model, words):
    with pytest.raises(BadInput, match=words):
        require_model(model, "test")


def test_scores_of_what_models_return():
    logits, other = torch.randn(2, 3), torch.randn(2, 5)
    assert scores(logits, "test") is logits
    assert scores({"hidden": other, "logits": logits}, "test") is logits
    assert scores((torch.ones(2, dtype=torch.long), other), "test") is other
    with pytest.raises(BadInput, match="got int64 tensor"):
        scores(torch.ones(2, dtype=torch.long), "test")
    with pytest.raises(BadInput, match="got NoneType"):
        scores({}, "test")

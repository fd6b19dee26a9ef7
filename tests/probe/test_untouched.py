import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pondera.errors import BadInput
from pondera.probe import _untouched
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


@pytest.fixture(params=["copied", "guarded"])
def kept(request, monkeypatch):
    """Both ways to keep a weight: copied at once, and guarded until something writes into it."""
    if request.param == "guarded":
        monkeypatch.setattr(_untouched, "COPIED", 0)
    return request.param


@pytest.mark.usefixtures("kept")
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


@pytest.mark.usefixtures("kept")
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


@pytest.mark.usefixtures("kept")
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


@pytest.mark.usefixtures("kept")
def test_mode_and_autograd_inside():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Dropout())
    with untouched(net):
        assert not any(m.training for m in net.modules())
        assert not net(torch.randn(1, 3)).requires_grad
    with untouched(net, grad=True):
        assert net(torch.randn(1, 3)).requires_grad
    assert net[1].training


WRITES = {
    "in place": lambda p: p.mul_(3),
    "data": lambda p: p.data.add_(1),
    "view": lambda p: p.detach().view(-1)[2:5].zero_(),
    "index": lambda p: p.__setitem__(0, 7.0),
    "out": lambda p: torch.add(torch.ones(8, 6), 1, out=p),
    "foreach": lambda p: torch._foreach_mul_([p], 2.0),
    "other memory": lambda p: setattr(p, "data", torch.zeros(8, 6)),
    "half": lambda p: setattr(p, "data", p.data.half()),
    "the new memory too": lambda p: (setattr(p, "data", p.data.clone()), p.fill_(5)),
    "transposed": lambda p: p.t().copy_(torch.zeros(6, 8)),
    "nothing": lambda p: None,
}


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("name", WRITES)
def test_every_way_of_writing_is_undone(name):
    net = nn.Linear(6, 8)
    kept = net.weight.detach().clone()
    with untouched(net):
        WRITES[name](net.weight)
        net(torch.randn(2, 6).to(net.weight.dtype)) if name != "half" else None
    assert torch.equal(net.weight, kept)
    assert net.weight.dtype == torch.float32
    assert net.weight.is_contiguous()


@pytest.mark.usefixtures("kept")
def test_weights_that_lie_in_one_memory_come_back_together():
    flat = torch.randn(40)
    net = nn.Linear(5, 5)
    net.weight, net.bias = nn.Parameter(flat[:25].view(5, 5)), nn.Parameter(flat[25:30])
    was = flat.clone()
    with untouched(net):
        flat[3:28] = 0
    assert torch.equal(flat, was)


@pytest.mark.usefixtures("kept")
def test_an_embedding_that_clips_itself_comes_back():
    net = nn.Embedding(9, 4, max_norm=0.1)
    was = net.weight.detach().clone()
    with untouched(net):
        net(torch.arange(9))
        assert not torch.equal(net.weight, was)
    assert torch.equal(net.weight, was)


@pytest.mark.parametrize("write", ["weight", "swap", "sign"])
def test_what_torch_does_not_see_is_refused(monkeypatch, write):
    monkeypatch.setattr(_untouched, "COPIED", 16)
    net = nn.Sequential(nn.Linear(100, 130), nn.Linear(130, 2))
    numbers = net[0].weight.detach().numpy()
    numbers[:] = abs(numbers)

    def look():
        with untouched(net):
            net.train()
            if write == "weight":
                numbers[3, 5] += 1e-3
            elif write == "swap":
                numbers[[0, 129]] = numbers[[129, 0]]
            else:
                numbers[:] *= -1

    with pytest.raises(BadInput, match=r"wrote into 0\.weight past torch") as caught:
        look()
    assert "\n" not in str(caught.value)
    assert net.training


def test_a_copied_weight_comes_back_from_numpy_too():
    net = nn.Linear(3, 2)
    was = net.weight.detach().clone()
    with untouched(net):
        net.weight.detach().numpy()[:] = 9
    assert torch.equal(net.weight, was)


def test_a_look_at_a_large_model_holds_no_second_one(monkeypatch):
    """Only the smallest weights are copied at once, and the written one when it is written."""
    monkeypatch.setattr(_untouched, "COPIED", 3000)
    net = nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 30), nn.BatchNorm1d(30))
    with untouched(net):
        values = next(m for m in torch.utils._python_dispatch._get_current_dispatch_mode_stack())
        assert sum(t.nbytes for t in values.copies.values()) <= 3000
        assert len(values.guarded) == 1
        net(torch.randn(3, 10))
        assert len(values.guarded) == 1
        net[1].weight.zero_()
        assert not values.guarded
    assert net[1].weight.any()
    with untouched(nn.Linear(3, 3)):
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()  # small: nothing to watch


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_models_that_run_otherwise(how):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    model = torch.compile(net, backend="aot_eager") if how == "compiled" else net
    with untouched(model, grad=True):
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False) if how == "checkpointed" else model(x)
        y.sum().backward()
        found = net[0].weight.grad.clone()
    net(x).sum().backward()
    assert torch.allclose(found, net[0].weight.grad)
    assert torch.allclose(y, net(x))


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

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.probe import _tangent
from pondera.probe._tangent import TangentKernel, as_one, gram, look, tangents, trainable
from pondera.probe._untouched import untouched

from ..conformance.models import MODELS, make


class Branching(nn.Module):
    """Takes a path that depends on the data, which vmap cannot."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(1, 1)

    def forward(self, x):
        return torch.stack([self.a(r) if r.sum() > 0 else self.b(r) for r in x])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Masked(nn.Module):
    """Positional and keyword tensors, a flag that is no tensor, a dictionary out."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x, *, hidden=None, negate=False):
        out = self.encoder(x, src_key_padding_mask=hidden)
        return {"other": x, "logits": -out.mean(1) if negate else out.mean(1)}


def all_outputs(seen):
    c = seen.out.shape[1]
    return torch.eye(c, dtype=seen.out.dtype).expand(len(seen), c, c)


def brute(model, batch):
    """The whole Jacobian by plain backward passes, the model called as a user calls it, on one example after another."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with untouched(model, grad=True):
        for i in range(len(batch)):
            out = model(batch[i : i + 1]).flatten()
            for o in out:
                g = torch.autograd.grad(o, params, retain_graph=True, allow_unused=True)
                rows.append(
                    torch.cat([torch.zeros(p.numel()) if t is None else t.flatten() for t, p in zip(g, params)])
                )
    return torch.stack(rows)


CASES = {name: (lambda name=name: make(name)) for name in MODELS if name != "attention"}
CASES["branching"] = lambda: (Branching(), torch.randn(6, 3))
CASES["recurrent"] = lambda: (Recurrent(), torch.randn(5, 4, 3))


@pytest.mark.parametrize("name", CASES)
def test_against_plain_backward_passes(name):
    torch.manual_seed(0)
    model, batch = CASES[name]()
    batch = batch[:6]
    jacobian = brute(model, batch)
    expected = jacobian @ jacobian.T
    with untouched(model, grad=True):
        seen = look(model, batch, "test")
        found = as_one(gram(model, seen, all_outputs(seen), None, None, "test"))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_tied_weights_and_tokens():
    model, batch = make("attention")
    batch = batch[:3]
    jacobian = brute(model, batch)
    assert jacobian.shape[1] == sum(p.numel() for p in model.parameters())  # the tied matrix counts once
    with untouched(model, grad=True):
        seen = look(model, batch, "test")
        found = as_one(gram(model, seen, all_outputs(seen), None, None, "test"))
    assert torch.allclose(found, jacobian @ jacobian.T, rtol=1e-3, atol=1e-4)


def test_only_models_that_vmap_refuses_go_one_by_one(monkeypatch):
    went = []
    slow = _tangent._one_by_one
    monkeypatch.setattr(_tangent, "_one_by_one", lambda *a: (went.append(1), slow(*a))[1])
    for build in (lambda: make("cnn"), lambda: make("attention"), CASES["branching"]):
        model, batch = build()
        with untouched(model, grad=True):
            seen = look(model, batch[:2], "test")
            tangents(model, trainable(model, "test"), {}, [(seen, all_outputs(seen))], "test")
        went.append(0)
    assert went == [0, 0, 1, 0]


@pytest.mark.parametrize("block", [1, 500, 1000])
@pytest.mark.parametrize("other", [False, True])
def test_blocks_change_nothing(block, other):
    model, batch = make("mlp")
    with untouched(model, grad=True):
        a, b = look(model, batch[:4], "test"), look(model, batch[4:7], "test") if other else None
        u, v = all_outputs(a), all_outputs(b) if other else None
        whole, cut = (gram(model, a, u, b, v, "test", block=k) for k in (2**25, block))
    assert whole.shape == ((4, 3, 4, 4) if other else (4, 4, 4, 4))
    assert torch.allclose(whole, cut, rtol=1e-5, atol=1e-5)


def test_directions_weigh_the_outputs():
    model, batch = make("mlp")
    with untouched(model, grad=True):
        seen = look(model, batch[:5], "test")
        full = gram(model, seen, all_outputs(seen), None, None, "test")
        u = torch.randn(5, 1, 4)
        found = gram(model, seen, u, None, None, "test")[:, :, 0, 0]
    assert torch.allclose(found, torch.einsum("ia,ijab,jb->ij", u[:, 0], full, u[:, 0]), rtol=1e-4, atol=1e-4)


def test_batches_by_position_and_by_keyword():
    torch.manual_seed(0)
    model = Masked()
    x, hidden = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    hidden[:, 3:] = True
    with untouched(model, grad=True):
        kernels = []
        for batch in ({"x": x, "hidden": hidden, "negate": True}, {"x": x[:, :3]}):
            seen = look(model, batch, "test")
            kernels.append(gram(model, seen, all_outputs(seen), None, None, "test"))
        alone = gram(model, s := look(model, [x[:, :3]], "test"), all_outputs(s), None, None, "test")
    assert torch.equal(kernels[1], alone)
    assert not torch.allclose(kernels[0], kernels[1], rtol=1e-2)  # the mean is over hidden places too


def test_frozen_parameters_do_not_count():
    model, batch = make("mlp")
    model[0].requires_grad_(False)
    with untouched(model, grad=True):
        assert sum(p.numel() for p in trainable(model, "test").values()) == 12 * 7 + 7 + 7 * 4 + 4
    model.requires_grad_(False)
    with pytest.raises(BadInput, match="require a gradient, and found none"):
        trainable(model, "test")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(dtype):
    model, batch = make("mlp")
    with untouched(model, grad=True):
        seen = look(model, batch[:4], "test")
        reference = gram(model, seen, all_outputs(seen), None, None, "test")
    model, batch = model.to(dtype), batch.to(dtype)
    with untouched(model, grad=True):
        seen = look(model, batch[:4], "test")
        found = gram(model, seen, all_outputs(seen), None, None, "test")
    assert found.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (found - reference).norm() < 0.05 * reference.norm()


def test_outputs_that_depend_on_the_batch_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    with untouched(model, grad=True), pytest.raises(BadInput, match="depend on their own example alone"):
        seen = look(model, torch.randn(6, 1, 5, 5), "test")
        gram(model, seen, all_outputs(seen), None, None, "test")


def test_outputs_at_random_are_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), 2)

    model = Noisy(3, 2)
    with untouched(model, grad=True), pytest.raises(BadInput, match="outputs at random"):
        seen = look(model, torch.randn(6, 3), "test")
        gram(model, seen, all_outputs(seen), None, None, "test")


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.randn(4, 3), torch.randn(5, 3)), "examples on the first axis of every tensor"),
        ((torch.randn(4, 3), torch.tensor(1.0)), "examples on the first axis of every tensor"),
        (torch.randn(5), "one row of outputs an example"),
    ],
)
def test_bad_batches(batch, words):
    class Two(nn.Linear):
        def forward(self, x, y=None):
            return super().forward(x if x.ndim > 1 else x[:3])

    with pytest.raises(BadInput, match=words):
        look(Two(3, 2), batch, "test")


def test_nan_weights_are_named():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    model[0].weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"1 NaN or infinite of 6 in its 0\.weight"):
        trainable(model, "test")


def test_summary_and_plot():
    square = TangentKernel(torch.diag(torch.tensor([3.0, 1.0, 1.0])), torch.zeros(3, 1), 7, True)
    assert square.eigenvalues.tolist() == [3, 1, 1]
    assert "3 examples, 7 trainable parameters" in square.summary()
    assert "Largest eigenvalue 3 (60% of the trace)" in square.summary()
    assert "effective rank 2.3 of 3" in square.summary()  # 25 / 11
    assert "3 times as fast" in square.summary()
    assert len(square.plot().axes) == 3  # two panels and the colour bar
    two = TangentKernel(torch.ones(2, 3), torch.zeros(2, 1), 7, False)
    assert "2 by 3 examples" in two.summary()
    assert not len(two.eigenvalues)
    assert len(two.plot().axes) == 2
    assert "It is zero" in TangentKernel(torch.zeros(2, 2), torch.zeros(2, 1), 7, True).summary()


def test_one_matrix_of_a_kernel_with_outputs():
    k = torch.arange(2 * 2 * 3 * 3.0).view(2, 2, 3, 3)
    assert as_one(k)[1 * 3 + 2, 0 * 3 + 1] == k[1, 0, 2, 1]

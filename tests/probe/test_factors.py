"""Kernels from factors of gradients against the gradients themselves, taken one after the other by plain backward passes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from pondera.errors import BadInput
from pondera.probe import _factors, _tangent
from pondera.probe._factors import Gradients
from pondera.probe._tangent import gram, look
from pondera.probe._untouched import untouched
from pondera.probe.pseudo_ntk import pseudo_ntk

from ..conformance.models import MODELS, make


class Convolutions(nn.Module):
    """Groups, strides, dilations and kinds of padding in one to three dimensions; one is small enough to be factored."""

    def __init__(self, dims, mode="zeros"):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.a = conv(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode)
        self.b = conv(6, 9, 2, dilation=2, padding="same", groups=3, bias=False)
        self.c = conv(9, 8, 3, stride=3, padding=2, dilation=2)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).flatten(1)


class Uneven(nn.Module):
    """Sides that differ, in kernel, stride, padding and dilation, on a single example without its axis, and a frame axis."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 20, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3))
        self.wide = nn.Conv2d(20, 30, (2, 3))

    def forward(self, x):  # (n, frames, 2, h, w)
        y = self.wide(self.conv(x.flatten(0, 1)).tanh())
        return y.unflatten(0, x.shape[:2]).mean(1).flatten(1) + self.wide(self.conv(x[0, 0]).tanh()).sum() * x.sum() * 0


class Shared(nn.Module):
    """One layer at three places, one of them with its weight transposed, and one called as a function."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        y = self.layer(torch.tanh(self.layer(x)))
        y = y + torch.tanh(y) @ self.layer.weight
        return F.linear(self.other(y), self.other.weight)


class Bare(nn.Module):
    """Parameters of a module's own, one of them used as a layer's weight and by itself."""

    def __init__(self):
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.rand(7)), nn.Parameter(torch.randn(7, 5))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = F.linear(x, self.matrix) * self.scale
        return y + self.matrix.square().sum(1) + torch.einsum("ab,nb->na", self.matrix, x.cos())


class Tokens(nn.Module):
    """Embeddings with padding, one tied to the head and one to a transposed product, positions, and a gather."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(13, 6, padding_idx=2), nn.Embedding(9, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        y = self.norm(self.embed(x) + self.place(torch.arange(x.shape[1])))
        y = y + torch.tanh(y @ self.place.weight.t()) @ self.place.weight
        return self.head(y)


class ByData(nn.Module):
    """Each example takes its own path: factors of another form, and another number of places."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        rows = []
        for one in x:
            y = self.a(one.repeat(int(one[0] > 0) + 1, 1)) if one.sum() > 0 else self.b(one) + self.a.weight.sum()
            rows.append(self.head(y).reshape(-1, 3).sum(0))
        return torch.stack(rows)


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.batch = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.group, self.each = nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True)
        self.batch.running_mean.normal_(), self.batch.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.each(self.group(self.batch(self.conv(x)))).relu().flatten(1)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)
        self.register_buffer("room", torch.zeros(1, 4, 6))

    def forward(self, x):
        y = self.a(x)
        y[:, 0] = 0.0
        y = F.leaky_relu(y * 2, inplace=True)
        room = y.detach()
        if len(x) == 1:
            room = self.room.copy_(room)  # memory that the next example overwrites
        return (self.b(room) + y.sum((1, 2))[:, None, None]).flatten(1)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Turned(nn.Module):
    """Linear layers that see the examples in another order, a changed input, a keyword, and their bias once more."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(5, 5) for _ in range(4))
        self.b.register_forward_pre_hook(lambda m, args: (2 * args[0],))

    def forward(self, x):
        y = self.b(self.a(x.flip(0)).tanh()).flip(0).tanh()
        return self.d(input=self.c(y)) + self.c.bias


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, _ = make("mlp")
        self.net[0].weight.requires_grad_(False)
        self.net[3].bias.requires_grad_(False)

    def forward(self, x):
        return self.net(x)


def gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 19, "n_positions": 12}

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))

        def forward(self, x):
            return self.model(x).logits[:, -1]

    return Last(), torch.randint(19, (5, 7))


CASES = {name: (lambda name=name: make(name)) for name in MODELS}
CASES |= {
    "conv1d groups": lambda: (Convolutions(1), torch.randn(5, 4, 11)),
    "conv2d groups": lambda: (Convolutions(2), torch.randn(5, 4, 7, 9)),
    "conv2d circular": lambda: (Convolutions(2, "circular"), torch.randn(5, 4, 7, 9)),
    "conv2d reflect": lambda: (Convolutions(2, "reflect"), torch.randn(5, 4, 8, 6)),
    "conv3d groups": lambda: (Convolutions(3), torch.randn(3, 4, 5, 6, 7)),
    "uneven": lambda: (Uneven(), torch.randn(4, 3, 2, 6, 7)),
    "shared": lambda: (Shared(), torch.randn(6, 6)),
    "bare": lambda: (Bare(), torch.randn(6, 5)),
    "tokens": lambda: (Tokens(), torch.randint(13, (5, 4))),
    "by data": lambda: (ByData(), torch.randn(7, 5)),
    "norms": lambda: (Norms(), torch.randn(5, 2, 5, 5)),
    "in place": lambda: (InPlace(), torch.randn(5, 4, 5)),
    "checkpointed": lambda: (Checkpointed(), torch.randn(5, 5)),
    "turned": lambda: (Turned(), torch.randn(5, 5)),
    "frozen": lambda: (Frozen(), torch.randn(5, 5)),
    "weight norm": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.Flatten(), nn.Linear(16, 3)),
        torch.randn(5, 2, 6),
    ),
    "orthogonal": lambda: (nn.Sequential(parametrizations.orthogonal(nn.Linear(4, 4)), nn.Tanh()), torch.randn(5, 4)),
    "wide": lambda: (nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 3)), torch.randn(9, 9)),
    "recurrent": lambda: (nn.RNN(3, 4, batch_first=True), torch.randn(4, 5, 3)),
    "encoder": lambda: (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(4, 3, 8)),
    "gpt2": gpt2,
}


def built(name):
    torch.manual_seed(0)
    model, batch = CASES[name]()
    model = model.double().eval()
    return model, batch.double() if batch.is_floating_point() else batch


def output(model, x):
    out = model(x)
    return (out[0] if isinstance(out, tuple) else out).flatten()


def brute(model, batch, direction):
    """Gradients of direction . output, an example a row."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for x in batch:
        grads = torch.autograd.grad(output(model, x[None]) @ direction, params, allow_unused=True)
        rows.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in zip(grads, params)]))
    return torch.stack(rows)


def close(found, expected):
    return (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("block", [1, 300, 2**25])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_gradients_themselves(name, block):
    model, batch = built(name)
    direction = torch.randn(len(output(model, batch[:1])), dtype=torch.float64)
    expected = brute(model, batch, direction)
    with untouched(model, grad=True):
        seen = look(model, batch, "test")
        found = gram(model, seen, direction.expand(len(batch), 1, -1), None, None, "test", block=block)[:, :, 0, 0]
    assert close(found, expected @ expected.T)
    with untouched(model, grad=True):
        a, b = look(model, batch[:2], "test"), look(model, batch[1:], "test")
        u, v = (direction.expand(k, 1, -1) for k in (2, len(batch) - 1))
        found = gram(model, a, u, b, v, "test", block=block)[:, :, 0, 0]
    assert close(found, expected[:2] @ expected[1:].T)


@pytest.mark.parametrize("name", ["mlp", "uneven", "tokens", "shared", "by data"])
def test_several_outputs(name):
    model, batch = built(name)
    c = len(output(model, batch[:1]))
    u = torch.randn(len(batch), 3, c, dtype=torch.float64)
    rows = torch.stack([brute(model, batch, d) for d in torch.eye(c, dtype=torch.float64)], 1)  # (n, c, size)
    rows = u @ rows
    for block in (1, 100, 1000, 2**25):
        with untouched(model, grad=True):
            found = gram(model, look(model, batch, "test"), u, None, None, "test", block=block)
        assert close(found, torch.einsum("irp,jsp->ijrs", rows, rows))
        assert found.is_contiguous()


def kept(model, x):
    """Which parameters are kept as factors."""
    with untouched(model, grad=True):
        params = [p for p in model.parameters() if p.requires_grad]
        gradients = Gradients(output(model, x), params, x.dtype if x.is_floating_point() else torch.float64)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        return {names[k] for k in gradients.uses}


def test_what_is_kept_as_factors():
    model, x = built("wide")
    assert kept(model, x[:1]) == {"0.weight", "2.weight"}
    model, x = built("encoder")
    assert kept(model, x[:1]) == {f"{n}.weight" for n in ("self_attn.out_proj", "linear1", "linear2")} | {
        "self_attn.in_proj_weight"
    }
    model, x = built("gpt2")
    names = kept(model, x[:1, :2])
    assert {n.removeprefix("model.transformer.").removesuffix(".weight") for n in names} == {"wte", "wpe"} | {
        f"h.{i}.{n}" for i in range(2) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    for name in ("bare", "orthogonal", "checkpointed"):
        model, x = built(name)
        assert "matrix" not in (names := kept(model, x[:1]))
        assert not any("original" in n for n in names)
    model, x = built("uneven")
    assert kept(model, x[:1]) == {"wide.weight"}  # the other has more places than its gradient has numbers
    assert "0.weight" in kept(nn.Sequential(nn.Conv2d(16, 16, 3)).double(), torch.randn(1, 16, 4, 4).double())


def test_layers_that_read_one_row(monkeypatch):
    """Of these no gradient in the weight is computed: that in the bias and what was read tell it."""
    asked = []
    single = _tangent._single
    monkeypatch.setattr(_tangent, "_single", lambda *a: asked.append(set(single(*a))) or single(*a))
    for name in ("mlp", "turned", "frozen", "encoder"):
        model, batch = built(name)
        pseudo_ntk(model, batch)
    assert asked == [
        {"0.weight", "3.weight", "5.weight"},
        {"a.weight", "b.weight", "d.weight"},  # the bias of c is used again
        {"net.5.weight"},
        set(),  # three rows an example
    ]


def test_a_model_that_runs_one_by_one_holds_no_more(monkeypatch):
    """Its layers read one row each, so that all would fit at once; but it cannot be vectorised, and gradients do not fit."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 30), nn.Linear(30, 20)

        def forward(self, x):
            return torch.stack([self.b(self.a(one)) * (2 if one.sum() > 0 else 1) for one in x])

    torch.manual_seed(0)
    model, batch = Branching().double(), torch.randn(6, 5, dtype=torch.float64)
    direction = torch.ones(20, dtype=torch.float64)
    expected = brute(model, batch, direction)
    monkeypatch.setattr(_tangent, "_one_by_one", lambda *a: pytest.fail("all gradients at once"))
    with untouched(model, grad=True):
        seen = look(model, batch, "test")
        found = gram(model, seen, direction.expand(6, 1, -1), None, None, "test", block=6 * 200)
    assert close(found[:, :, 0, 0], expected @ expected.T)


def test_a_product_in_pieces(monkeypatch):
    model, batch = built("tokens")
    direction = torch.ones(len(output(model, batch[:1])), dtype=torch.float64)
    expected = brute(model, batch, direction)
    for pieces in (1, 20, 70):
        monkeypatch.setattr(_factors, "AT_ONCE", pieces)
        with untouched(model, grad=True):
            found = gram(model, look(model, batch, "test"), direction.expand(5, 1, -1), None, None, "test", block=2000)
        assert close(found[:, :, 0, 0], expected @ expected.T)


@pytest.mark.parametrize(("block", "computed"), [(1000, 9), (300, 12)])
def test_no_more_is_held_than_said_and_nothing_computed_again_that_found_room(monkeypatch, block, computed):
    """A row's factors have 135 numbers, its gradient 523: two blocks of 1000 hold all nine, two gradients hold six."""
    model, batch = built("wide")
    blocks, seen_rows = _tangent._blocks, []

    def watched(*args):
        for at, some in blocks(*args):
            seen_rows.append(at.stop - at.start)
            assert some.numbers == 135 * some.rows
            assert some.rows == 1 or some.numbers <= 2 * max(block, 523) / _tangent.PARTS
            yield at, some

    monkeypatch.setattr(_tangent, "_blocks", watched)
    monkeypatch.setattr(_tangent, "_single", lambda *a: {})
    with untouched(model, grad=True):
        seen = look(model, batch, "test")
        gram(model, seen, torch.ones(9, 1, 3, dtype=torch.float64), None, None, "test", block=block)
    assert sum(seen_rows) == computed


def test_fewer_are_computed_again_than_by_pairs_of_gradients():
    """A model that has no factors holds as much as two gradients at a time."""
    calls = []

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(50))

        def forward(self, x):
            calls.append(len(x))
            return (x * self.w).sum(1, keepdim=True)

    x = torch.randn(6, 50)
    with untouched(model := Own(), grad=True):
        found = gram(model, look(model, x, "test"), torch.ones(6, 1, 1), None, None, "test", block=1)
    assert torch.allclose(found[:, :, 0, 0], x @ x.T, atol=1e-5)
    assert calls[0] == 6
    assert len(calls) - 1 <= 6 * 7 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, monkeypatch):
    model, batch = built("gpt2")
    expected = pseudo_ntk(model, batch).kernel
    model = model.to(dtype)
    monkeypatch.setattr(gram, "__kwdefaults__", {"block": 1})
    found = pseudo_ntk(model, batch).kernel
    assert found.dtype == torch.float32
    assert (found - expected).norm() < (1e-5 if dtype is torch.float32 else 0.1) * expected.norm()


def test_refusals_are_those_of_the_other_way(monkeypatch):
    monkeypatch.setattr(gram, "__kwdefaults__", {"block": 1})
    batch_statistics = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(BadInput, match="could not|own example alone"):
        pseudo_ntk(batch_statistics, torch.randn(6, 3))

    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    with pytest.raises(BadInput, match="depend on their own example alone"):
        pseudo_ntk(Centred(3, 2), torch.randn(6, 3))

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    assert not pseudo_ntk(Detached(3, 2), torch.randn(4, 3)).kernel.any()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ValueError("planted")

    class Broken(nn.Linear):
        def forward(self, x):
            return Nothing.apply(super().forward(x))

    with pytest.raises(BadInput, match="could not differentiate the model .*planted"):
        pseudo_ntk(Broken(3, 2), torch.randn(4, 3))

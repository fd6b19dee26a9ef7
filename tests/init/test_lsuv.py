import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, weight_norm

from pondera.errors import BadInput
from pondera.init.lsuv import lsuv_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def output_variances(model, *args, layers=(nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.MultiheadAttention)):
    """Variance of every layer's output at its first call, by name: an own, independent look."""
    seen = {}

    def look(name):
        def hook(module, inputs, out):
            y = out[0] if isinstance(out, tuple) else out
            seen.setdefault(name, ((y - y.mean()) ** 2).mean().item())

        return hook

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    hooks = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if isinstance(m, layers)]
    was = model.training
    with torch.no_grad():
        model.eval()(*args)
    model.train(was)
    torch.backends.mha.set_fastpath_enabled(fused)
    for h in hooks:
        h.remove()
    return seen


def tensors(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Block(nn.Module):
    """Registered in another order than run: out, then norm, then into."""

    def __init__(self, width=6):
        super().__init__()
        self.out = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.into = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.out(torch.relu(self.norm(self.into(x))))


class Net(nn.Module):
    """Residual, transposed and grouped convolutions, a layer called twice, and attention in one graph."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.twice = nn.Linear(8, 8)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.blocks = nn.Sequential(Block(), nn.Dropout(0.5), Block())
        self.stem = nn.Conv2d(2, 6, 3)

    def forward(self, x):
        t = self.up(self.blocks(self.stem(x))).flatten(2).transpose(1, 2)
        t = self.twice(torch.tanh(self.twice(t)))
        return self.head(t + self.attention(t, t, t)[0])


class Square(nn.Module):
    def forward(self, x):
        return x.square()


def test_two_layers_by_hand():
    # x = (8, 0) and |w1| = 1: y1 = +-(8, 0) has variance 16, so |w1| = 1/4 and y1 = +-(2, 0); squared (4, 0), so
    # the variance is 4 and |w2| = 1/2
    net = nn.Sequential(nn.Linear(1, 1), Square(), nn.Linear(1, 1, bias=False))
    lsuv_(net, torch.tensor([[8.0], [0.0]]))
    assert net[0].weight.abs().item() == pytest.approx(0.25)
    assert net[0].bias.item() == 0.0
    assert net[2].weight.abs().item() == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(3))
def test_every_layer_of_any_graph_has_unit_variance(seed):
    torch.manual_seed(seed)
    net, x = Net(), 5 * torch.randn(16, 2, 6, 6) + 2
    lsuv_(net, x, generator=generator(seed))
    seen = output_variances(net, x)
    assert len(seen) == 9  # out_proj is judged by the attention's own output
    assert all(abs(v - 1) < 0.02 for v in seen.values()), seen


def test_weights_are_orthonormal_up_to_one_scale():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 7, 2), nn.Flatten(), nn.Linear(7 * 25, 4))
    lsuv_(net, torch.randn(8, 2, 6, 6), generator=generator())
    for rows in (net[0].weight.flatten(1), net[2].weight.transpose(0, 1).flatten(1), net[4].weight):
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5 * gram[0, 0].item())


def test_query_key_value_are_orthonormal_each_and_unscaled():
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    x = 3 * torch.randn(5, 4, 6, generator=generator())
    lsuv_(attention, (x, x, x), generator=generator())
    for part in attention.in_proj_weight.chunk(3):
        assert torch.allclose(part @ part.T, torch.eye(6), atol=1e-5)
    assert attention(x, x, x)[0].var(correction=0).item() == pytest.approx(1, abs=0.02)


def test_two_passes_of_the_model_are_enough():
    class Counting(nn.Sequential):
        passes = 0

        def forward(self, x):
            Counting.passes += 1
            return super().forward(x)

    net = Counting(*(m for _ in range(20) for m in (nn.Linear(8, 8), nn.Tanh())))
    lsuv_(net, torch.randn(32, 8, generator=generator()))
    assert Counting.passes == 2


def test_within_tolerance_is_left_and_beyond_is_exact():
    # one row of length 1 on white data: variance about 1; tol decides whether it is touched
    x = torch.randn(400, 4, generator=generator(), dtype=torch.float64)
    loose = lsuv_(nn.Linear(4, 1, dtype=torch.float64), x, tol=0.5, generator=generator())
    tight = lsuv_(nn.Linear(4, 1, dtype=torch.float64), x, tol=1e-12, generator=generator())
    assert loose.weight.norm().item() == pytest.approx(1, abs=1e-12)
    assert tight(x).var(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert tight.weight.norm().item() != pytest.approx(1, abs=1e-6)


def test_biases_are_met_by_looping_and_kept():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    for layer in (net[0], net[2], net[4]):
        nn.init.normal_(layer.bias, 0.2, 0.5)
    biases = [net[i].bias.clone() for i in (0, 2, 4)]
    directions = [F.normalize(net[i].weight.flatten(), dim=0) for i in (0, 2, 4)]
    x = torch.randn(64, 8, dtype=torch.float64)
    lsuv_(net, x, tol=1e-6, orthonormal=False)
    assert all(abs(v - 1) < 1e-6 for v in output_variances(net, x).values())
    assert all(torch.equal(net[i].bias, b) for i, b in zip((0, 2, 4), biases))
    assert all(torch.allclose(F.normalize(net[i].weight.flatten(), dim=0), d) for i, d in zip((0, 2, 4), directions))


def test_zero_weights_stay_zero_without_the_orthonormal_step():
    net = Block()
    nn.init.zeros_(net.out.weight)
    nn.init.zeros_(net.out.bias)
    x = 3 * torch.randn(4, 6, 5, 5, generator=generator())
    lsuv_(net, x, orthonormal=False)
    assert not net.out.weight.any()
    assert output_variances(net, x)["into"] == pytest.approx(1, abs=0.02)


def test_layer_called_twice_is_scaled_at_its_first_call():
    layer = nn.Linear(4, 4, bias=False)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(10 * self.layer(x))

    x = 3 * torch.randn(50, 4, generator=generator())
    model = lsuv_(Twice(), x, generator=generator())
    assert layer(x).var(correction=0).item() == pytest.approx(1, abs=0.02)
    assert model(x).var().item() > 2


def test_two_layers_with_one_weight_are_scaled_where_it_is_first_used():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.Linear(4, 4), nn.Linear(4, 4)
            self.early.weight = self.late.weight

        def forward(self, x):
            return self.late(torch.tanh(3 * self.early(x)))

    x = 3 * torch.randn(50, 4, generator=generator())
    model = lsuv_(Tied(), x, generator=generator())
    assert model.early(x).var(correction=0).item() == pytest.approx(1, abs=0.02)


def test_fused_transformer_layer_is_seen():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    x, padding = torch.randn(4, 5, 8, generator=generator()), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 3:] = True
    lsuv_(net, {"src": x, "src_key_padding_mask": padding}, generator=generator())
    seen = output_variances(net, x, None, padding)
    assert len(seen) == 6
    assert all(abs(v - 1) < 0.02 for v in seen.values())


def test_gpt2_conv1d():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(6, 3)
    x = 4 * torch.randn(30, 3, generator=generator())
    lsuv_(layer, x, generator=generator())
    assert layer(x).var(correction=0).item() == pytest.approx(1, abs=0.02)


def test_parametrized_weight():
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = 7 * torch.randn(40, 6, generator=generator())
    lsuv_(net, x, generator=generator())
    assert all(abs(v - 1) < 0.02 for v in output_variances(net, x).values())


@pytest.mark.parametrize("batch", ["tuple", "list", "dict"])
def test_batch_as_arguments(batch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, left, right):
            return self.a(left) - self.b(right)

    left, right = torch.randn(20, 3, generator=generator()), torch.randn(20, 2, generator=generator(1))
    given = {"tuple": (left, right), "list": [left, right], "dict": {"right": right, "left": left}}[batch]
    model = lsuv_(Two(), given, tol=1e-4)
    assert model.a(left).var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert model.b(right).var(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_modes_gradients_statistics_random_state_and_hooks_are_left():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.3, training=True)  # draws from torch's own generator in eval mode too

    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), Noisy(), nn.Flatten(), nn.Linear(4 * 16, 3))
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    calls = []
    net[0].register_forward_hook(lambda m, i, o: calls.append(1))
    before, rng, statistics = net[0].weight.grad.clone(), torch.get_rng_state(), tensors(net[1])
    lsuv_(net, torch.randn(8, 2, 6, 6, generator=generator()), generator=generator())
    assert [m.training for m in net] == [True, False, True, True, True]
    assert torch.equal(net[0].weight.grad, before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(tensors(net[1]), statistics)
    assert [len(m._forward_hooks) for m in net] == [1, 0, 0, 0, 0]
    assert all(p.requires_grad and p.grad_fn is None for p in net.parameters())
    assert torch.backends.mha.get_fastpath_enabled()


def test_output_is_the_layers_own_before_other_hooks():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, inputs, out: 10 * out)
    x = 3 * torch.randn(50, 4, generator=generator())
    lsuv_(layer, x, generator=generator())
    assert layer.forward(x).var(correction=0).item() == pytest.approx(1, abs=0.02)


def test_generator_decides_the_bits():
    x = torch.randn(16, 8, generator=generator())
    nets = [lsuv_(nn.Linear(8, 8), x, generator=generator(s)) for s in (3, 3, 4)]
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert not torch.equal(nets[0].weight, nets[2].weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).to(dtype)
    x = 3 * torch.randn(16, 2, 6, 6).to(dtype)
    lsuv_(net, x, generator=generator())
    assert all(abs(v - 1) < 0.02 for v in output_variances(net.double(), x.double()).values())
    assert {p.dtype for p in net.to(dtype).parameters()} == {dtype}


def test_agrees_with_the_authors_code():
    """Scales of three layers found by ducha-aiki/LSUV-pytorch, run with a dummy layer in front of its first-layer bug.

    Its division by (std + 1e-8) explains the tolerance. On random nets of convolutions, linear and transformer layers
    the largest relative difference was 3e-8 to it (20 nets) and 9e-7 to lsuv 0.3 given a biased deviation (40 nets).
    """
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    ).double()
    before = []
    with torch.no_grad():
        for i, layer in enumerate((net[0], net[2], net[5])):
            flat = torch.sin(torch.arange(layer.weight.numel(), dtype=torch.float64) * (i + 1.7))
            layer.weight.copy_(flat.view_as(layer.weight))
            before.append(layer.weight.clone())
            if layer.bias is not None:
                layer.bias.zero_()
    x = torch.cos(torch.arange(6 * 2 * 6 * 6, dtype=torch.float64) * 0.37).view(6, 2, 6, 6)
    lsuv_(net, x, tol=1e-9, orthonormal=False)
    scales = [(layer.weight.norm() / w.norm()).item() for layer, w in zip((net[0], net[2], net[5]), before)]
    assert scales == pytest.approx([1.86851796289205, 5.9913771971693714, 1.038157584765516], rel=1e-7)


def test_a_plain_layer_runs_once_a_pass(monkeypatch):
    """Without bias the output of the scaled weight is the scaled output, so nothing is computed again for it."""
    calls = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: (calls.append(1), linear(*a))[1])
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), 5 * torch.randn(64, 8, generator=generator())
    lsuv_(net, x, generator=generator())
    assert len(calls) == 2 * 2
    net[2].bias.data.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    calls.clear()
    lsuv_(net, x, orthonormal=False, tol=1e-4)
    assert len(calls) > 2 * 2  # what has a bias is run again until it fits


def test_a_forward_of_its_own_is_run_again():
    class Standardised(nn.Linear):
        """Its output does not scale with its weight."""

        def forward(self, x):
            w = self.weight - self.weight.mean(1, keepdim=True)
            return F.linear(x, w / (1 + w.norm(dim=1, keepdim=True)))

    net, x = Standardised(8, 16), 3 * torch.randn(64, 8, generator=generator())
    lsuv_(net, x, generator=generator(), tol=1e-3, max_tries=100)
    assert net(x).var(correction=0).item() == pytest.approx(1, abs=1e-3)


# -- refusals: one sentence, and the model as it was -----------------------------------------------------------------


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


class Counter(nn.Module):
    """Its output grows from call to call."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(self.calls * x)


def dead():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Threshold(1e9, 0.0), nn.Linear(4, 4))


def spoilt():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    net[1].weight.data[0] = torch.nan
    return net


def shouting():
    net = nn.Linear(4, 4)
    nn.init.constant_(net.bias, 0.0)
    net.bias.data[0] = 100.0
    return net


X = torch.randn(10, 4, generator=generator())
REFUSED = [
    (dead, X, {}, r"layer of 3\.weight: its output is constant \(0\)"),
    (lambda: nn.Linear(4, 4), torch.zeros(10, 4), {}, "output is constant"),
    (spoilt, X, {}, r"NaN or infinite numbers in the output of the layer of 2\.weight"),
    (lambda: nn.Linear(4, 4), torch.full((10, 4), torch.inf), {}, "NaN or infinite numbers"),
    (lambda: nn.Linear(4, 4), torch.full((10, 4), torch.nan), {}, "got 40 NaN of 40 in its batch"),
    (lambda: nn.Linear(4, 4), torch.zeros(0, 4), {}, r"shape \(0, 4\)"),
    (lambda: nn.Linear(4, 4), (), {}, "got an empty tuple"),
    (lambda: nn.Linear(4, 4), torch.zeros(3, 4, device="meta"), {}, "numbers in it"),
    (lambda: nn.Linear(4, 4), None, {}, "got NoneType"),
    (lambda: nn.Linear(4, 4), torch.zeros(3, 5), {}, r"could not run the model on its batch \(float32 tensor of shape"),
    (lambda: nn.Linear(4, 4), {"data": X}, {}, "data: float32 tensor"),
    (lambda: nn.Linear(4, 4), X, {"tol": 0.0}, "tol above 0"),
    (lambda: nn.Linear(4, 4), X, {"max_tries": 0}, "max_tries of at least 1"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta")), X, {}, "meta device"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), X, {}, "lazy"),
    (lambda: nn.LayerNorm(4), X, {}, "found no weight it owns in LayerNorm"),
    (Unused, X, {}, r"cannot scale spare\.weight: .* never calls"),
    (Counter, X, {}, "a second pass gave 4"),
    (shouting, X, {"orthonormal": False}, "in 20 tries, not within 0.02 of 1"),
    (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), 9 * X, {}, "its bias or parametrization sets its scale"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(("build", "batch", "kwargs", "words"), REFUSED)
def test_refuses_in_one_sentence_and_restores(build, batch, kwargs, words):
    torch.manual_seed(5)
    model = build()
    model.train()
    fixed = {k: v for k, v in model.state_dict().items() if v.device.type != "meta" and not is_lazy(v)}
    before = copy.deepcopy(fixed)
    with pytest.raises(BadInput, match=words) as caught:
        lsuv_(model, batch, **kwargs)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(fixed[k].nan_to_num(7), before[k].nan_to_num(7)) for k in before)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_old_weight_norm_is_found_out():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = weight_norm(nn.Linear(4, 4))
    before = layer.weight_g.clone()
    with pytest.raises(BadInput, match="overwrites the weight"):
        lsuv_(layer, 5 * X)
    assert torch.equal(layer.weight_g, before)


def test_no_model():
    with pytest.raises(BadInput, match="got Tensor"):
        lsuv_(torch.eye(3), X)


def test_an_interrupted_start_leaves_the_model_as_it_was():
    class Broken(nn.Module):
        def forward(self, x):
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 4), Broken())
    before = tensors(model)
    with pytest.raises(KeyboardInterrupt):
        lsuv_(model, X)
    assert same(tensors(model), before)
    assert not model[0]._forward_hooks
    assert model.training

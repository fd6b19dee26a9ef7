import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pondera.errors import BadInput
from pondera.weightspace import LoGAH, LowRankDecoder, parameter_graph


def small(**kw):
    torch.manual_seed(0)
    return LoGAH(**({"hidden": 16, "rank": 4, "size": 64, "layers": 2, "heads": 2} | kw))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.position = nn.Parameter(torch.ones(4))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3)) + self.position
        return self.head(self.a(x).relu() + self.b(x))


@pytest.mark.parametrize(
    ("shape", "total", "last"),
    [
        ((3, 2, 2, 2), 1.1547887709550313, [-0.414657989433, -0.454460131732, 0.428647960732]),
        ((4, 6), 1.1788170884132654, [5.635253173952, -0.629048201088, 0.668455242646]),
        ((5,), -0.05514272925709385, [2.390685532896, -2.283694389456, 0.427133375048]),
    ],
)
def test_decoder_agrees_with_the_authors_code(shape, total, last):
    """Blackzxy/LoGAH at 68c5a83, ghn3/nn.py, ConvDecoder3LoRA(4, ck=12, r=3, hid=(16, 32)); all parameters are sines."""
    decode, at = LowRankDecoder(4, 3, 12).double(), 0
    with torch.no_grad():
        for p in decode.parameters():
            p.copy_(torch.arange(at, at + p.numel(), dtype=torch.float64).sin().view_as(p) / 2)
            at += p.numel()
        w = decode((torch.arange(8, dtype=torch.float64) * 0.7).cos().view(2, 4), shape)
    assert float(w.sum()) == pytest.approx(total, rel=1e-10)
    assert w[1].flatten()[-3:].tolist() == pytest.approx(last, rel=1e-9)


def test_published_number_of_parameters():
    """hid 64, r 32, ck 2048: 1,267,488 with the unused layer of 32 x 33."""
    d, r, s = 64, 32, 2048
    numbers = sum(p.numel() for p in LowRankDecoder(d, r, s).parameters())
    assert numbers == 1_267_488 - 32 * 33
    assert numbers == 36 * d**2 + 16 * d * r**2 + r * s + 12 * d + 2 * r**2 + s


def test_rank_crops_and_order():
    decode, x = LowRankDecoder(8, 3, 50).double(), torch.randn(4, 8, dtype=torch.float64)
    full = decode(x, (50, 50))
    assert torch.linalg.matrix_rank(full).tolist() == [3] * 4
    assert torch.allclose(decode(x, (7, 5)), full[:, :7, :5])
    kernel = decode(x, (4, 3, 2, 5))
    assert torch.allclose(kernel.transpose(2, 3).reshape(4, 12 - 4, 15), full[:, :8, :15])
    assert torch.allclose(decode(x.flip(0), (9, 9)).flip(0), decode(x, (9, 9)))
    assert decode(x, (6, 3, 4)).shape == (4, 6, 3, 4)
    assert decode(x, (2, 3, 2, 2, 3)).shape == (4, 2, 3, 2, 2, 3)


def test_the_graph_follows_the_computation():
    graph = parameter_graph(Net())
    assert graph.traced
    place = {name: i for i, name in enumerate(graph.names)}
    assert "position" not in place and len(place) == 10

    def path(a, b):
        return int(graph.distance[place[a], place[b]])

    assert path("conv.weight", "norm.bias") == 3
    assert path("norm.bias", "a.weight") == path("norm.bias", "b.weight") == 1
    assert path("a.weight", "b.weight") == -1
    assert path("b.bias", "head.weight") == 1
    assert [int(graph.kinds[place[n]]) for n in ("a.weight", "conv.weight", "norm.weight", "norm.bias", "a.bias")] == [
        0, 1, 2, 3, 4,
    ]  # fmt: skip


def test_what_cannot_be_traced_is_a_chain():
    class Odd(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    graph = parameter_graph(Odd())
    assert not graph.traced
    assert graph.distance[0].tolist() == list(range(10))


def test_gpt_layers_and_tied_heads():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=5))
    embedding = model.transformer.wte.weight.clone()
    logah = small()
    found = logah(model)
    assert found["transformer.h.0.mlp.c_fc.weight"].shape == (8, 32)
    assert not any("wte" in name or "wpe" in name or "lm_head" in name for name in found)
    logah.write_(model)
    assert torch.equal(model.transformer.wte.weight, embedding)
    w = model.transformer.h[1].attn.c_attn.weight
    assert float(w.detach().std(correction=0)) == pytest.approx(0.02, rel=1e-4)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("normalize", ["std", "he", "fan_in"])
def test_scales_and_gradients(normalize):
    logah, net = small(normalize=normalize).double(), Net().double()
    found = logah(net)
    w, fan_in = found["conv.weight"], 9
    if normalize != "fan_in":
        wanted = 0.02 if normalize == "std" else (2 / fan_in) ** 0.5
        assert float(w.detach().std(correction=0)) == pytest.approx(wanted, rel=1e-9)
    assert ((found["norm.weight"] > 0) & (found["norm.weight"] < 2)).all()
    assert (found["head.bias"].abs() < 1).all()
    functional_call(net, found, (torch.randn(2, 1, 5, 5, dtype=torch.float64),)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in logah.decoder.parameters())
    assert all(p.grad is None for name, p in net.named_parameters() if name in found)


def test_any_width_with_one_set_of_parameters_and_copies():
    logah = small(size=4096)
    for width in (3, 50, 700):
        net = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 2))
        assert logah(net)["0.weight"].shape == (width, 5)
    again = small(size=4096)
    again.load_state_dict(logah.state_dict())
    a, b, c = (one.write_(copy.deepcopy(net)) for one in (logah, again, copy.deepcopy(logah)))
    assert torch.equal(a[0].weight, b[0].weight) and torch.equal(a[2].weight, c[2].weight)
    half = small().bfloat16()(nn.Linear(4, 4).bfloat16())
    assert half["weight"].dtype == torch.bfloat16


def test_attention_projections_are_predicted_fused():
    found = small()(nn.TransformerEncoderLayer(4, 2, 8))
    assert found["self_attn.in_proj_weight"].shape == (12, 4)


def test_refused():
    with pytest.raises(BadInput, match="rank of at least 1"):
        LowRankDecoder(4, 0, 8)
    decode = LowRankDecoder(4, 2, 8)
    with pytest.raises(BadInput, match=r"embeddings \(nodes, 4\), got a float32 tensor of shape \(2, 5\)"):
        decode(torch.zeros(2, 5), (3,))
    with pytest.raises(BadInput, match=r"sides up to 8, got \(3, 2, 3, 1\), which is 9 x 2"):
        decode(torch.zeros(2, 4), (3, 2, 3, 1))
    with pytest.raises(BadInput, match="a shape with entries"):
        decode(torch.zeros(2, 4), (3, 0))
    with pytest.raises(BadInput, match="linear, convolution or norm layers, got ReLU"):
        parameter_graph(nn.ReLU())
    for kw, words in (
        ({"normalize": "xavier"}, "std, fan_in or he, got 'xavier'"),
        ({"heads": 3}, "heads that divide the width"),
        ({"std": 0.0}, "a std above 0"),
    ):
        with pytest.raises(BadInput, match=words):
            small(**kw)
    logah, net = small(), nn.Linear(3, 3)
    before = net.weight.clone()
    nn.init.constant_(logah.decoder.columns.weight, float("nan"))
    with pytest.raises(BadInput, match="NaN or infinite numbers for weight"):
        logah.write_(net)
    assert torch.equal(net.weight, before)

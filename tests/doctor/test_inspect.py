import json
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pondera.doctor._faults import STARTS
from pondera.doctor._inspect import inspect
from pondera.errors import BadInput
from pondera.lab import Recipe, load_task


def he(*layers):
    """The layers with He weights and zero biases."""
    net = nn.Sequential(*layers)
    for m in net.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            nn.init.zeros_(m.bias)
    return net


def mlp(depth=6, width=64, inside=16, classes=5):
    """He's ReLU MLP: linear layers at 0, 2, ..., 2 depth, names as `nn.Sequential` gives them."""
    torch.manual_seed(0)
    sizes = [inside] + [width] * depth
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return he(*hidden, nn.Linear(width, classes))


def data(n=128, inside=16):
    return torch.randn(n, inside, generator=torch.Generator().manual_seed(1))


def scale(layer, factor):
    with torch.no_grad():
        layer.weight.mul_(factor)


def row(found, name):
    return next(r for r in found.layers if r.layer == name)


# -- what is measured -------------------------------------------------------------------------------------------------


def test_measures_by_hand():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        net[0].bias.copy_(torch.tensor([0.0, -9.0]))
        net[2].weight.copy_(torch.tensor([[3.0, 4.0]]))
        net[2].bias.zero_()
    x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    # the first layer puts out (1, -9) and (3, -7), the ReLU (1, 0) and (3, 0)
    found = inspect(net, x, loss=lambda m, b: m(b).sum())
    first, relu, last = found.layers
    assert (first.layer, first.kind, first.role, first.shape) == ("0", "Linear", "weight", (2, 2))
    assert first.mean == pytest.approx(-3.0)
    assert first.variance == pytest.approx((16 + 36 + 36 + 16) / 4)
    assert first.signal == pytest.approx(1.0)  # each unit is its mean plus or minus 1
    assert first.signal_in == pytest.approx((1 + 0.25) / 2)
    assert (first.dead, relu.dead) == (0.0, 0.5)
    assert last.dead_in == 0.5
    assert last.gradient == pytest.approx(1.0)
    assert relu.gradient == pytest.approx((9 + 16) / 2)
    assert first.gradient == pytest.approx(9 / 2)
    assert first.rms == pytest.approx((5 / 4) ** 0.5)
    assert (first.fan_in, last.fan_in) == (2, 2)
    assert first.gain == pytest.approx((5 / 2) ** 0.5)
    assert found.loss == pytest.approx(3.0 + 9.0)
    assert found.singular_values.tolist() == pytest.approx([3.0])  # d out / d x = (3 * 1, 0): the second unit is off
    assert found.examples == 2


def test_order_is_that_of_execution_and_calls_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early, self.act = nn.Linear(8, 8), nn.Linear(4, 8), nn.Tanh()

        def forward(self, x):
            return self.act(self.late(self.act(self.early(x))))

    names = [r.layer for r in inspect(Net(), data(inside=4)).layers]
    assert names == ["early", "act", "late", "act#2"]


def test_units_of_a_convolution_are_its_channels():
    net = he(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    with torch.no_grad():
        net[0].weight[:3] = 0
        net[0].bias[:3] = -1
    found = inspect(net, torch.randn(16, 1, 8, 8))
    assert row(found, "0").dead == 0.75
    assert row(found, "1").dead == 0.75
    assert found.first.layer == "0" or found.first.symptom == "dead units"


def test_in_place_activations_do_not_spoil_what_came_before():
    torch.manual_seed(0)
    a = he(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    b = nn.Sequential(a[0], nn.ReLU(inplace=True), a[2])
    x = data(inside=4)
    assert [r.gradient for r in inspect(a, x).layers] == [r.gradient for r in inspect(b, x).layers]
    assert row(inspect(b, x), "0").mean == row(inspect(a, x), "0").mean


def test_linear_jacobian_is_its_matrix():
    net = nn.Linear(6, 4)
    expected = torch.linalg.svdvals(net.weight.detach().double())
    found = inspect(net, torch.randn(10, 6))
    assert found.singular_values.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.condition == pytest.approx((expected[0] / expected[-1]).item(), rel=1e-5)
    assert not found.projected
    wide = inspect(parametrizations.orthogonal(nn.Linear(200, 200, bias=False)), torch.randn(4, 200))
    assert wide.projected
    assert wide.singular_values.tolist() == pytest.approx([(200 / 32) ** 0.5] * 32, rel=1e-4)


def test_targets_and_losses():
    net, x, y = mlp(), data(), torch.arange(128) % 5
    expected = F.cross_entropy(net(x), y).item()
    assert inspect(net, x, target=y).loss == pytest.approx(expected)
    assert inspect(net, x, target=y, loss=nn.CrossEntropyLoss()).loss == pytest.approx(expected)
    assert inspect(net, x, loss=lambda m, b: F.cross_entropy(m(b), y)).loss == pytest.approx(expected)
    assert inspect(net, x).loss is None
    floats = inspect(net, x, target=torch.zeros(128, 5))
    assert floats.loss == pytest.approx(net(x).square().mean().item())
    assert floats.bias is None


# -- planted faults ---------------------------------------------------------------------------------------------------


def test_a_sound_net_has_none():
    found = inspect(mlp(), data(), target=torch.arange(128) % 5)
    assert [f for f in found.faults if f.symptom != "uneven guesses"] == []
    assert "Nothing wrong" in found.summary() or found.first.symptom == "uneven guesses"


@pytest.mark.parametrize("at", ["0", "4", "8", "12"])
def test_a_layer_scaled_down_is_named(at):
    net = mlp()
    scale(net[int(at)], 1e-4)
    found = inspect(net, data())
    assert (found.first.layer, found.first.symptom) == (at, "vanishing signal")
    assert found.starts[0].name == "lsuv"


def test_biases_do_not_hide_a_lost_signal():
    net = mlp()
    scale(net[4], 1e-4)
    nn.init.normal_(net[4].bias)  # its outputs vary from unit to unit as before, but not from input to input
    found = inspect(net, data())
    assert row(found, "4").variance > 0.1
    assert (found.first.layer, found.first.symptom) == ("4", "vanishing signal")


@pytest.mark.parametrize("at", ["0", "6", "12"])
def test_a_layer_scaled_up_is_named(at):
    net = mlp()
    scale(net[int(at)], 1e4)
    found = inspect(net, data())
    assert (found.first.layer, found.first.symptom) == (at, "exploding signal")


def test_a_dead_relu_is_named():
    net = mlp()
    nn.init.constant_(net[6].bias, -6.0)
    found = inspect(net, data())
    assert (found.first.layer, found.first.symptom) == ("7", "dead units")
    assert row(found, "7").dead > 0.5
    assert found.starts[0].name == "lsuv"


def test_a_dead_relu_that_is_a_function_is_seen_by_what_follows():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
            nn.init.constant_(self.b.bias, -20.0)

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    found = inspect(Net(), data())
    assert (found.first.layer, found.first.symptom) == ("b", "dead units")


def test_gradients_lost_though_the_signal_is_kept():
    class Saturated(nn.Module):  # passes its input on, but almost no gradient
        def forward(self, x):
            return x.detach() + 1e-3 * (x - x.detach())

    net = mlp()
    net[7] = nn.Sequential(nn.ReLU(), Saturated())
    found = inspect(net, data())
    assert (found.first.layer, found.first.symptom) == ("8", "vanishing gradient")
    assert found.starts[0].name == "orthogonal"


def test_overflow_is_named_where_it_begins():
    net = mlp()
    scale(net[2], 1e25)
    scale(net[4], 1e25)
    found = inspect(net, data())
    assert ("4", "NaN or infinite") in [(f.layer, f.symptom) for f in found.faults]
    assert found.first.layer in ("2", "4")
    assert all(r.finite for r in found.layers if int(r.layer) < 4)


def test_uneven_guesses():
    net = mlp()
    with torch.no_grad():
        net[12].bias[3] = 50.0
    found = inspect(net, data())
    assert found.first.symptom == "uneven guesses"
    assert "class 3 is guessed for 100%" in found.first.words
    assert found.bias.fractions[3] == 1


def test_the_starts_named_make_guesses_more_even():
    task = load_task("digits")
    x = task.data()[0][0][:256]
    gamma = {}
    for start in ("", *(name for name, _ in STARTS["uneven guesses"])):
        torch.manual_seed(0)
        nets = [Recipe(init=start or None).start(task.build(), x, torch.Generator().manual_seed(s)) for s in range(5)]
        gamma[start] = sum(inspect(net, x).bias.gamma.item() for net in nets) / 5
    assert gamma["zero"] < gamma["lsuv"] < gamma[""]


def test_a_zero_head_passes_no_gradient_back():
    net = mlp()
    nn.init.zeros_(net[12].weight)
    found = inspect(net, data(), target=torch.arange(128) % 5)
    assert found.first.layer == "12"
    assert {f.symptom for f in found.faults} <= {"vanishing signal", "vanishing gradient"}
    assert found.bias.largest.item() == pytest.approx(0.2)


class Residual(nn.Module):
    """Branches that end at `end` times He's scale, summed onto the stream."""

    def __init__(self, blocks=8, width=32, end=1.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(blocks))
        self.branches = nn.ModuleList(
            he(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(blocks)
        )
        for b in self.branches:
            scale(b[2], end)

    def forward(self, x):
        x = self.stem(x)
        for norm, branch in zip(self.norms, self.branches):
            x = x + branch(norm(x))
        return self.head(x)


@pytest.mark.parametrize("end", [0.0, 1e-3, 0.3])
def test_small_residual_branches_are_no_fault(end):
    found = inspect(Residual(end=end), data(), target=torch.arange(128) % 4)
    assert [f for f in found.faults if f.symptom != "uneven guesses"] == []


def test_a_residual_stream_that_grows_is():
    found = inspect(Residual(blocks=16, end=2.0), data())
    assert found.first.symptom == "exploding signal"
    assert any(s.name == "zero" for s in found.starts)
    assert not any(f.symptom == "exploding signal" for f in inspect(Residual(blocks=16, norm=True), data()).faults)


@pytest.mark.parametrize("start", ["lsuv", "orthogonal", "edge_of_chaos"])
def test_the_starts_named_mend_it(start):
    torch.manual_seed(0)
    layers = [m for _ in range(20) for m in (nn.Linear(32, 32), nn.Tanh())]
    net = nn.Sequential(nn.Linear(16, 32), *layers, nn.Linear(32, 4))
    sick = inspect(net, data(), target=torch.arange(128) % 4)
    assert sick.first.symptom == "vanishing signal"
    assert start in [s.name for s in sick.starts]
    Recipe(init=start).start(net, data(), torch.Generator().manual_seed(0))
    mended = inspect(net, data(), target=torch.arange(128) % 4)
    assert not {f.symptom for f in mended.faults} & {"vanishing signal", "vanishing gradient", "dead units"}


def test_every_start_named_exists_and_its_code_runs():
    for symptom, starts in STARTS.items():
        assert starts, symptom
        for name, why in starts:
            assert why
            Recipe(init=name)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, 3))
    scale(model[0], 1e-4)
    batch = torch.randn(32, 1, 8, 8)
    found = inspect(model, batch)
    assert "convolution_aware" in [s.name for s in found.starts]
    for s in found.starts:
        exec(s.snippet, {"model": model, "batch": batch})
    assert "convolution_aware" not in [s.name for s in inspect(_scaled_mlp(), data()).starts]


def _scaled_mlp():
    net = mlp()
    scale(net[2], 1e-4)
    return net


# -- models people bring ----------------------------------------------------------------------------------------------


def test_batch_norm_uses_the_batch_as_in_training():
    torch.manual_seed(0)
    layers = [m for _ in range(8) for m in (nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(16, 3))
    for m in net[:-1]:
        if isinstance(m, nn.Linear):
            scale(m, 0.1)  # without the batch's statistics the signal would be gone after three layers
    found = inspect(net, data())
    assert not any(f.symptom.endswith("signal") for f in found.faults)
    assert net[1].momentum == 0.1
    assert net[1].num_batches_tracked == 0
    assert found.singular_values[0] > 1e-3


def test_tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=3, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.randint(101, (8, 20))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    was = {k: v.clone() for k, v in model.state_dict().items()}
    found = inspect(model, batch)
    names = [r.layer for r in found.layers]
    assert names[0] == "transformer.wte"
    assert names[-1] == "lm_head"
    assert "transformer.h.2.mlp.act" in names
    assert row(found, "transformer.h.0.attn.c_attn").fan_in == 32
    assert found.loss == pytest.approx(math.log(101), rel=0.02)
    assert found.faults == ()
    assert found.projected
    assert found.bias.inputs == 160
    assert all(torch.equal(was[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    scale(model.transformer.h[1].mlp.c_proj, 1e6)
    assert inspect(model, batch).first is not None


def test_attention_and_frozen_integer_models():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Embedding(11, 16), layer, nn.Linear(16, 11)).requires_grad_(False)
    found = inspect(model, torch.randint(11, (8, 6)))
    names = [r.layer for r in found.layers]
    assert "1.self_attn" in names
    assert "1.linear2" in names
    assert all(r.gradient is not None for r in found.layers)
    assert row(found, "1.self_attn").fan_in == 16
    assert not any(p.requires_grad for p in model.parameters())


def test_several_inputs_and_a_graph_without_single_examples():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x, edges):
            return self.b(torch.relu(self.a(x)).index_add(0, edges[0], self.a(x)[edges[1]]))

    found = inspect(Graph(), (torch.randn(9, 4), torch.randint(9, (2, 30))))
    assert len(found.layers) == 3
    assert found.singular_values is None
    assert found.condition is None
    json.dumps(found.to_json())


# -- the contract -----------------------------------------------------------------------------------------------------


def test_the_model_is_untouched():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    net[3].eval()
    x = data(inside=4)
    net(x).sum().backward()
    was = {k: v.clone() for k, v in net.state_dict().items()}
    grads = [p.grad.clone() for p in net.parameters()]
    stepped = []
    net[0].weight.register_post_accumulate_grad_hook(lambda p: stepped.append(1))  # as optimizers in backward do
    rng = torch.get_rng_state()
    inspect(net, x, target=torch.arange(128) % 3)
    assert all(torch.equal(was[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, net.parameters()))
    assert [m.training for m in net] == [True, True, True, False, True]
    assert not any(m._forward_hooks for m in net.modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert not stepped


def test_the_same_look_twice_is_the_same():
    net, x = mlp(), data()
    a, b = inspect(net, x), inspect(net, x)
    assert a.to_json() == b.to_json()


def test_table_json_plot_and_summary():
    net = _scaled_mlp()
    found = inspect(net, data(), target=torch.arange(128) % 5)
    table = found.table()
    assert [r["layer"] for r in table] == [str(i) for i in range(13)]
    assert {"layer", "variance", "gradient", "dead", "gain"} <= table[0].keys()
    text = json.loads(json.dumps(found.to_json()))
    assert text["first"]["layer"] == "2"
    assert text["starts"][0]["name"] == "lsuv"
    assert len(text["bias"]["fractions"]) == 5
    summary = found.summary()
    assert summary.startswith('First to mend: after layer 3 ("2", Linear) the signal has shrunk')
    assert "pondera.init.lsuv_(model, batch)" in summary
    assert "lsuv" not in found.summary(advice=False)
    assert "Starts worth trying" not in found.summary(advice=False)
    fig = found.plot()
    assert fig.layout.yaxis.type == "log"
    assert [d.name for d in fig.data] == ["signal", "gradient"]
    assert [t.split('"')[1] for t in fig.data[0].text] == [str(i) for i in range(0, 13, 2)]
    assert list(fig.data[0].y) == [r.signal for r in found.layers if r.role == "weight"]
    assert list(found.plot("jacobian").data[0].y) == pytest.approx(found.singular_values.tolist())
    assert sum(found.plot("ntk").data[0].y) == pytest.approx(1, abs=1e-6)
    assert sum(found.plot("bias").data[0].y) == pytest.approx(1, abs=1e-6)
    with pytest.raises(BadInput, match="draws signal, jacobian, ntk, bias, got 'signals'; did you mean signal"):
        found.plot("signals")


def test_layers_go_by_one_number_and_name_everywhere(tmp_path):
    """In the table in the terminal, on the page, as data, on the figure's axis and in words."""
    found = inspect(_scaled_mlp(), data())
    (fault, *_), numbers = found.faults, {r["layer"]: r["number"] for r in found.table()}
    assert (fault.layer, fault.number, numbers["2"]) == ("2", 3, 3)
    assert 'layer 3 ("2", Linear)' in fault.words
    printed = [line.split()[:3] for line in found.summary().splitlines()]
    figure = found.plot()
    assert list(figure.data[0].x) == [n for n in numbers.values() if n % 2]
    assert [int(k) for k in figure.layout.xaxis.tickvals] == list(range(2, 14, 2))
    assert figure.layout.shapes[0].x0 == 3
    text = found.report(tmp_path / "found.html", small=True).read_text(encoding="utf-8")
    for r, x, said in zip([r for r in found.layers if r.role == "weight"], figure.data[0].x, figure.data[0].text):
        assert [str(x), r.layer, r.kind] in printed
        assert said == f'layer {x} ("{r.layer}", {r.kind})'
        assert f'<td>{x}</td><th scope="row"><span class="name">{r.layer}</span></th>' in text


def test_findings_come_before_the_table(tmp_path):
    found = inspect(_scaled_mlp(), data())
    summary = found.summary()
    assert summary.index("First to mend") < summary.index("Starts worth trying") < summary.index("#  layer")
    text = found.report(tmp_path / "found.html", small=True).read_text(encoding="utf-8")
    assert text.index("the signal has shrunk") < text.index("Worth trying first") < text.index("Every layer</h2>")


def test_tangent_spectrum_is_that_of_the_gradients():
    """Brute force: the Gram matrix of each example's gradient of the scaled sum of outputs."""
    net = mlp()
    x = data()[:32]
    found = inspect(net, data())
    rows = []
    for one in x:
        net.zero_grad()
        (net(one.unsqueeze(0)).sum() / 5**0.5).backward()
        rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    g = torch.stack(rows).double()
    assert found.tangent.tolist() == pytest.approx(
        torch.linalg.eigvalsh(g @ g.T).flip(0).clamp_min(0).tolist(), rel=1e-3, abs=1e-5
    )
    assert inspect(mlp(), data(), tangent=False).tangent is None
    with pytest.raises(BadInput, match="nothing to draw for 'ntk'"):
        inspect(mlp(), data(), tangent=False).plot("ntk")


def test_page_of_findings(tmp_path):
    net = _scaled_mlp()
    path = inspect(net, data(), target=torch.arange(128) % 5).report(tmp_path / "found.html", name="my <net>")
    text = path.read_text(encoding="utf-8")
    assert "<h1>my &lt;net&gt;: vanishing signal at layer 3 (&quot;2&quot;)</h1>" in text
    assert "http-equiv" in text
    for key in ("signal", "jacobian", "ntk", "bias"):
        assert f'class="plot" id="{key}"' in text
    assert "pondera.init.lsuv_(model, batch)" in text
    with pytest.raises(BadInput, match="there is no folder"):
        inspect(net, data()).report(tmp_path / "no" / "found.html")


# -- bad input --------------------------------------------------------------------------------------------------------


def broken():
    net = mlp()
    with torch.no_grad():
        net[4].weight[0, :3] = torch.nan
    return net


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (mlp(), torch.randn(8, 7), r"could not run the model on its batch \(float32 tensor of shape \(8, 7\)"),
        (mlp(), torch.randn(8, 16, dtype=torch.float64), "float64 tensor.*dtype"),
        (mlp(), torch.ones(8, 16).long().random_(5), "int64 tensor"),
        (mlp(), torch.empty(0, 16), "batch with numbers in it"),
        (mlp(), torch.full((8, 16), 0.5), "batch that varies, got a float32 tensor.* all 0.5"),
        (mlp(), torch.full((8, 16), torch.nan), "128 NaN of 128 in its batch"),
        (mlp(), "text", "needs a batch of tensors .* got str"),
        (broken(), torch.randn(8, 16), r"NaN or infinite ones in 4.weight \(3 of them\)"),
        (nn.Sequential(nn.ReLU(), nn.Flatten()), torch.randn(8, 16), "no layer with weights in Sequential"),
        (nn.Linear(16, 2, device="meta"), torch.randn(8, 16), "meta device"),
        (nn.LazyLinear(2), torch.randn(8, 16), "lazy model"),
        ("net", torch.randn(8, 16), "needs an nn.Module"),
    ],
)
def test_bad_input_in_one_sentence(model, batch, words):
    with pytest.raises(BadInput, match=words) as caught:
        inspect(model, batch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target": torch.arange(128)}, "scores 5 classes.* targets go .*127"),
        ({"target": torch.zeros(128, 4)}, r"shape \(128, 5\) does not fit targets of shape \(128, 4\)"),
        ({"target": torch.zeros(3).long(), "loss": nn.CrossEntropyLoss()}, "could not compute the loss.*int64 tensor"),
        ({"loss": lambda m, b: m(b)}, r"returns a scalar tensor, got a? ?float32 tensor of shape \(128, 5\)"),
        ({"loss": lambda m, b: 1.0}, "returns a scalar tensor, got float"),
        ({"loss": lambda m, b: F.cross_entropy(m(b), torch.zeros(3).long())}, "could not compute the loss of"),
    ],
)
def test_outputs_that_do_not_fit_the_loss(given, words):
    net = mlp()
    with pytest.raises(BadInput, match=words) as caught:
        inspect(net, data(), **given)
    assert "\n" not in str(caught.value)
    assert net.training

import itertools

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.adapters.dota import Dota, DotaConfig, DotaLayer
from pondera.errors import BadInput
from pondera.linalg.tensor_train import tensor_train, train_bonds, train_matrix


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 5))


def adapted(config, model=None):
    return peft.get_peft_model(net() if model is None else model, config)


def config(**kwargs):
    return DotaConfig(**{"r": 3, "n_cores": 3, "target_modules": ["0"]} | kwargs)


def core_of(model):
    return next(m for m in model.modules() if isinstance(m, Dota))


def shake(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in core_of(model).parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("start", ["pretrained", "random"])
def test_the_change_is_the_trained_train_less_its_start(start):
    model = adapted(config(start=start))
    base, x = net(), torch.randn(7, 12)
    assert torch.equal(model(x), base(x))
    core = core_of(model)
    before = [p.detach().clone() for p in core.parameters()]
    shake(model)
    rows, cols = (3, 3, 2), (2, 2, 3)
    assert [tuple(p.shape[1:3]) for p in core.parameters()] == list(zip(rows, cols))
    change = torch.zeros(18, 12)
    for i in itertools.product(*map(range, rows)):
        for j in itertools.product(*map(range, cols)):
            at = (i[0] * 3 + i[1]) * 2 + i[2], (j[0] * 2 + j[1]) * 3 + j[2]
            for cores, sign in ((list(core.parameters()), 1), (before, -1)):
                entry = cores[0][0, i[0], j[0]] @ cores[1][:, i[1], j[1]] @ cores[2][:, i[2], j[2], 0]
                change[at] += sign * entry.detach()
    hidden = nn.functional.linear(x, base[0].weight + change, base[0].bias)
    assert torch.allclose(model(x), base[2](torch.relu(hidden)), atol=1e-5)


def test_the_start_is_the_weights_own_truncated_train():
    core, w = core_of(adapted(config())), net()[0].weight.detach()
    own = train_matrix(tensor_train(w.double(), (3, 3, 2), (2, 2, 3), bond=3)).float()
    assert torch.allclose(train_matrix(list(core.parameters())), own, atol=1e-6)
    assert 0.1 < (w - own).norm() / w.norm() < 0.9
    # balanced: the outer cores hold the roots of the singular values at their bonds
    paired = own.reshape(3, 3, 2, 2, 2, 3).permute(0, 3, 1, 4, 2, 5)
    first, last = (torch.linalg.svdvals(paired.reshape(shape))[:3] for shape in ((6, 36), (36, 6)))
    assert torch.allclose(core.core_0.flatten(0, 2).norm(dim=0), first.sqrt(), atol=1e-5)
    assert torch.allclose(core.core_2.flatten(1).norm(dim=1), last.sqrt(), atol=1e-5)


def test_a_weight_that_is_a_train_is_trained_whole():
    a, b = torch.randn(3, 2), torch.randn(6, 6)
    model = net()
    model[0].weight.data = torch.kron(a, b)
    core = core_of(adapted(config(r=1, shape=[[3, 6], [2, 6]]), model))
    assert torch.allclose(train_matrix([core.core_0, core.core_1]), torch.kron(a, b), atol=1e-6)
    with torch.no_grad():
        core.core_0.mul_(-1)
    assert torch.allclose(core.delta(), -2 * torch.kron(a, b), atol=1e-5)


def test_counts_by_formula():
    for r, n in ((1, 2), (2, 3), (5, 3), (4, 4)):
        rows, cols = {2: ((6, 3), (3, 4)), 3: ((3, 3, 2), (2, 2, 3)), 4: ((3, 3, 2, 1), (1, 2, 2, 3))}[n]
        d = train_bonds(rows, cols, r)
        trained, _ = adapted(config(r=r, n_cores=n)).get_nb_trainable_parameters()
        assert trained == sum(a * i * j * b for a, i, j, b in zip(d, rows, cols, d[1:]))
    # at full bonds a train has more numbers than the matrix: only small bonds save any
    full, _ = adapted(config(r=6)).get_nb_trainable_parameters()
    assert full > 18 * 12 > trained


def test_gradients_at_the_start():
    x = torch.randn(9, 12)
    model = adapted(config())
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 1e-4 for p in core_of(model).parameters())
    model = adapted(config(start="random"))
    model(x).square().sum().backward()
    first, second, last = (p.grad for p in core_of(model).parameters())
    assert not first.any()
    assert not second.any()
    assert last.abs().max() > 1e-4


def test_the_random_start_keeps_the_size_of_a_signal():
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024) / 32
    core = Dota(weight, DotaConfig(r=16, n_cores=4, start="random", target_modules=["0"]))
    assert not list(core.buffers())
    assert not core.core_3.any()
    cores = [*(getattr(core, f"core_{k}").detach() for k in range(3)), torch.eye(16).reshape(16, 16, 1, 1)]
    seen = torch.randn(200, 4 * 4 * 8) @ train_matrix(cores).T  # what the last core is given, 16 numbers a row digit
    assert seen.square().mean() == pytest.approx(1, abs=0.15)
    assert not core.delta().any()


@pytest.mark.parametrize("n_cores", [2, 3])
def test_prime_sizes_give_the_low_rank_product_of_pissa(n_cores):
    model = nn.Sequential(nn.Linear(13, 17, bias=False))
    w = model[0].weight.detach().clone()
    core = core_of(adapted(config(r=4, n_cores=n_cores), model))
    u, s, vh = torch.linalg.svd(w)
    assert torch.allclose(train_matrix(list(core.parameters())), u[:, :4] * s[:4] @ vh[:4], atol=1e-6)
    assert sum(p.numel() for p in core.parameters()) == 4 * (13 + 17) + 16 * (n_cores - 2)


def layers():
    torch.manual_seed(0)
    tokens = torch.randint(30, (4, 6))
    return {
        "linear": (nn.Linear(12, 18), torch.randn(4, 12)),
        "conv1d": (Conv1D(18, 12), torch.randn(4, 12)),
        "conv2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1), torch.randn(2, 4, 7, 7)),
        "embedding": (nn.Embedding(30, 8), tokens),
    }


@pytest.mark.parametrize("which", ["linear", "conv1d", "conv2d", "embedding"])
def test_every_kind_of_layer(which):
    layer, x = layers()[which]
    before = layer(x).detach().clone()
    model = adapted(config(), nn.Sequential(layer))
    assert torch.equal(model(x), before)
    shake(model)
    out = model(x)
    assert (out - before).abs().max() > 0.05
    model.merge_adapter(safe_merge=True)
    assert torch.allclose(model(x), out, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x), out)
    with model.disable_adapter():
        assert torch.equal(model(x), before)


def test_saved_with_its_start_so_that_the_change_is_the_same_on_any_base(tmp_path):
    model = adapted(config(shape=[[3, 6], [6, 2]]))
    shake(model)
    change, x = core_of(model).delta().detach(), torch.randn(5, 12)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert again.peft_config["default"].shape == [[3, 6], [6, 2]]
    other = peft.PeftModel.from_pretrained(net(seed=1), tmp_path)
    assert torch.equal(core_of(other).delta(), change)


def test_half_precision_base_has_float32_cores():
    model = adapted(config(), net().bfloat16())
    assert {p.dtype for p in core_of(model).parameters()} == {torch.float32}
    x = torch.randn(5, 12).bfloat16()
    assert torch.equal(model(x), net().bfloat16()(x))


def test_beside_another_adapter_of_its_kind():
    model = adapted(config())
    model.add_adapter("other", config(r=2, start="random"))
    model.set_adapter("other")
    x = torch.randn(5, 12)
    assert torch.equal(model(x), net()(x))
    layer = next(m for m in model.modules() if isinstance(m, DotaLayer))
    assert len(list(layer.cores["other"].buffers())) == 0
    assert len(list(layer.cores["default"].buffers())) == 3


def test_over_a_four_bit_base():
    """QDoTA on bitsandbytes' own NF4 layer: exact for what the base stands for; merging costs the requantisation."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    full = nn.Linear(128, 64)
    base = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
    base.load_state_dict(full.state_dict())
    model, x = nn.Sequential(base.to("cpu")), torch.randn(5, 128)
    before = model(x)
    assert 0.02 < (before - full(x)).norm() / full(x).norm() < 0.2
    model = adapted(config(r=4), model)
    assert torch.equal(model(x), before)
    stands_for = model.base_model.model[0].get_base_weight().float()
    own = train_matrix(tensor_train(stands_for, (4, 4, 4), (4, 4, 8), bond=4))
    assert torch.allclose(train_matrix(list(core_of(model).parameters())), own, atol=1e-5)
    shake(model)
    out = model(x)
    expected = nn.functional.linear(x, stands_for + core_of(model).delta(), full.bias)
    assert torch.allclose(out, expected, atol=1e-4)
    model.merge_adapter()
    assert (model(x) - out).norm() / out.norm() < 0.2


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"r": 7}, r"r from 1 to 6 for a layer of \(18, 12\) split into \(3, 3, 2\) x \(2, 2, 3\), got 7"),
        ({"r": 0}, "r from 1 to 6"),
        ({"r": 2.0}, "got 2.0"),
        ({"shape": [[3, 6], [6, 3]]}, r"is that of a layer of \(18, 18\), got one of \(18, 12\)"),
        ({"shape": [[18], [12]]}, "at least 2 cores, got 1"),
        ({"shape": [[3, 6], [12]]}, r"positive sizes, got \[\[3, 6\], \[12\]\]"),
        ({"shape": [[3, -6], [6, -2]]}, "positive sizes"),
        ({"shape": [18, 12]}, "positive sizes"),
        ({"n_cores": 1}, "at least 2 cores"),
        ({"start": "randon"}, "pretrained, random, got 'randon'; did you mean random"),
        ({"target_modules": ["1"]}, "DoTA adapts Linear, Conv1D, Conv2d, Embedding layers, got ReLU"),
    ],
)
def test_bad_options_are_one_sentence(kwargs, words):
    with pytest.raises(BadInput, match=words) as caught:
        adapted(config(**kwargs))
    assert "\n" not in str(caught.value)


def test_weights_it_cannot_start_from():
    model = net()
    nn.init.zeros_(model[0].weight)
    with pytest.raises(BadInput, match="layer '0': DoTA's cores would start at zero"):
        adapted(config(), model)
    adapted(config(start="random"), model)
    model = net()
    model[0].weight.data[3, 3] = torch.nan
    with pytest.raises(BadInput, match="layer '0': DoTA needs finite numbers, got 1 NaN"):
        adapted(config(), model)
    with pytest.raises(BadInput, match="meta device"):
        adapted(config(), net().to("meta"))
    with pytest.raises(BadInput, match="ungrouped"):
        adapted(config(), nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))


def test_below_lora_of_rank_one_only_by_small_bonds():
    """4096 x 4096: five cores of bond 8 have fewer numbers than LoRA of rank 1, as the paper's few parameters need."""
    d = train_bonds((8, 8, 4, 4, 4), (4, 4, 4, 8, 8), 8)
    count = sum(a * i * j * b for a, i, j, b in zip(d, (8, 8, 4, 4, 4), (4, 4, 4, 8, 8), d[1:]))
    assert count == 5632
    lora = peft.get_peft_model(nn.Sequential(nn.Linear(4096, 4096)), LoraConfig(r=1, target_modules=["0"]))
    assert lora.get_nb_trainable_parameters()[0] == 8192

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.adapters.dota import DotaConfig
from pondera.adapters.lora_start import lora_start_
from pondera.adapters.t_lora import TLora, TLoraConfig, at_timestep
from pondera.errors import BadInput
from pondera.probe.lora_features import lora_features

N, M, R = 300, 200, 20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.deep, self.flat = nn.Embedding(50, N), nn.Linear(N, M), Conv1D(8, M)
        self.image = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        h = torch.relu(self.deep(self.table(x)))
        return self.flat(h) + self.image(h[:, None, None]).mean((1, 2, 3))[:, None]


def adapted(model=None, targets=("table", "deep", "flat", "image"), **kwargs):
    torch.manual_seed(0)
    model = Net() if model is None else model
    return peft.get_peft_model(model, LoraConfig(**{"r": R, "target_modules": list(targets)} | kwargs))


def factors(model, name="default"):
    out = {}
    for path, layer in model.named_modules():
        if name in getattr(layer, "lora_A", ()):
            out[path.rpartition(".")[2]] = layer.lora_A[name].weight, layer.lora_B[name].weight
        if name in getattr(layer, "lora_embedding_A", ()):
            out[path.rpartition(".")[2]] = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return out


TOKENS = torch.arange(40).reshape(4, 10)[:, 0]
# for each layer: how many inputs an entry of A x and of B z sums over
FAN_IN = {"table": (1, R), "deep": (N, R), "flat": (M, R), "image": (9, R)}


@pytest.mark.parametrize("at", ["A", "B"])
def test_one_factor_is_zero_the_other_has_variance_one_over_its_fan_in(at):
    model = adapted()
    with model.disable_adapter():
        before = model(TOKENS)
    assert lora_start_(model, at, generator=torch.Generator().manual_seed(1)) is model
    assert torch.equal(model(TOKENS), before)
    for name, (a, b) in factors(model).items():
        random, zero, fan_in = (a, b, FAN_IN[name][0]) if at == "A" else (b, a, FAN_IN[name][1])
        assert not zero.any(), name
        spread = 5 / (2 * random.numel()) ** 0.5
        assert float(random.detach().var()) * fan_in == pytest.approx(1, rel=spread), name


def test_again_and_the_other_way_and_from_pefts_gaussian():
    model = adapted(init_lora_weights="gaussian")
    for at in ("B", "A", "A", "B"):
        lora_start_(model, at)
        for a, b in factors(model).values():
            assert (bool(a.any()), bool(b.any())) == ((True, False) if at == "A" else (False, True))


def test_pefts_own_start_is_a_third_of_the_variance():
    a, b = factors(adapted())["deep"]
    assert float(a.detach().var()) * 3 * N == pytest.approx(1, rel=0.1)
    assert a.abs().max() <= N**-0.5
    assert not b.any()


def test_the_generator_decides_whatever_the_dtype():
    draws = []
    for dtype in (torch.float32, torch.bfloat16):
        model, state = adapted(), torch.get_rng_state()
        for a, b in factors(model).values():
            a.data, b.data = a.data.to(dtype), b.data.to(dtype)
        state = torch.get_rng_state()
        lora_start_(model, "A", generator=torch.Generator().manual_seed(7))
        assert torch.equal(torch.get_rng_state(), state)
        draws.append({name: a.detach() for name, (a, _) in factors(model).items()})
    assert all(torch.equal(draws[0][k].bfloat16(), draws[1][k]) for k in draws[0])


@pytest.mark.parametrize("at", ["A", "B"])
def test_the_first_step_moves_the_factor_that_is_zero(at):
    model = lora_start_(adapted(targets=["deep", "flat"]), at)
    before = {k: (a.detach().clone(), b.detach().clone()) for k, (a, b) in factors(model).items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(TOKENS).square().sum().backward()
    optimizer.step()
    for name, (a, b) in factors(model).items():
        moved = (not torch.equal(a, before[name][0]), not torch.equal(b, before[name][1]))
        assert moved == ((False, True) if at == "A" else (True, False))


def test_one_adapter_of_several_and_variants():
    model = adapted(targets=["deep"])
    model.add_adapter("other", LoraConfig(r=3, use_dora=True, use_rslora=True, target_modules=["deep"]))
    mine = [t.detach().clone() for t in factors(model)["deep"]]
    lora_start_(model, "B", adapter_name="other")
    assert all(torch.equal(s, t) for s, t in zip(mine, factors(model)["deep"]))
    a, b = factors(model, "other")["deep"]
    assert not a.any()
    assert b.any()
    model.set_adapter("other")
    with model.disable_adapter():
        before = model(TOKENS)
    assert torch.allclose(model(TOKENS), before, atol=1e-5)  # DoRA's magnitude is that of the base


def test_t_lora_of_two_plain_factors():
    model = nn.Sequential(nn.Linear(64, 48))
    model = peft.get_peft_model(model, TLoraConfig(r=16, start="lora", target_modules=["0"]))
    lora_start_(model, "B")
    core = next(m for m in model.modules() if isinstance(m, TLora))
    assert not core.Q.any()
    assert float(core.P.detach().var()) * 16 == pytest.approx(1, rel=0.2)
    x = torch.randn(3, 64)
    with at_timestep(model, 0):
        assert torch.allclose(model(x), model.base_model.model[0].base_layer(x))


def small(config):
    torch.manual_seed(0)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), config)


def lora(start):
    return small(LoraConfig(r=2, init_lora_weights=start, target_modules=["0"]))


def merged():
    model = lora(True)
    model.merge_adapter()
    return model


def tied():
    model = small(LoraConfig(r=2, target_modules=["0", "1"]))
    first, second = model.base_model.model
    second.lora_A["default"].weight = first.lora_A["default"].weight
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: lora("pissa"), "no meaning for an adapter started by 'pissa'"),
        (lambda: lora("pissa_niter_2"), "started by 'pissa_niter_2'"),
        (lambda: lora("olora"), "started by 'olora'"),
        (lambda: lora("orthogonal"), "started by 'orthogonal'"),
        (lambda: lora("mica"), "started by 'mica'"),
        (lambda: lora("eva"), "started by 'eva'"),
        (lambda: lora(False), r"neither factor of base_model.model.0 is zero: .*init_lora_weights=False"),
        (lambda: small(TLoraConfig(r=2, target_modules=["0"])), "started by 'ortho'"),
        (lambda: small(DotaConfig(r=2, n_cores=3, target_modules=["0"])), "no meaning for DotaConfig"),
        (lambda: small(peft.OFTConfig(oft_block_size=4, target_modules=["0"])), "no meaning for OFTConfig"),
        (lambda: small(peft.IA3Config(target_modules=["0"], feedforward_modules=[])), "no meaning for IA3Config"),
        (lambda: small(peft.AdaLoraConfig(r=2, total_step=10, target_modules=["0"])), "no meaning for AdaLoraConfig"),
        (merged, "while it is merged into base_model.model.0"),
        (tied, "cannot start base_model.model.0 and base_model.model.1 apart"),
        (lambda: nn.Linear(2, 2), "got Linear without an adapter"),
        (lambda: None, "got NoneType without an adapter"),
        (lambda: lora(True).to("meta"), "meta device"),
    ],
)  # fmt: skip
def test_where_the_choice_has_no_meaning(model, words):
    with pytest.raises(BadInput, match=words) as caught:
        lora_start_(model(), "A")
    assert "\n" not in str(caught.value)


def test_other_bad_input_leaves_all_as_it_was():
    model = small(LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(BadInput, match="starts at 'A' or 'B', got 'C'"):
        lora_start_(model, "C")
    with pytest.raises(BadInput, match="no adapter 'defualt' among 'default'; did you mean default"):
        lora_start_(model, "A", adapter_name="defualt")
    nn.init.ones_(model.base_model.model[1].lora_B["default"].weight)  # as if trained
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match=r"neither factor of base_model.model.1 is zero"):
        lora_start_(model, "B")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- the probe ------------------------------------------------------------------------------------------------------


def rms(t):
    return float(t.double().square().mean().sqrt())


def test_features_by_hand():
    model = small(LoraConfig(r=1, lora_alpha=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0, 0, 0, 0, 0, 0, 0]]))
        layer.lora_B["default"].weight.copy_(torch.tensor([[2.0], [0], [0], [0], [0], [0], [0], [0]]))
    x = torch.zeros(2, 8)
    x[0, 0], x[1, 1] = 3.0, 2.0  # A x = 3 and 4; s B A x = 18 and 24 in one entry of eight
    found = lora_features(model, x)
    assert found.names == ("0",)
    assert found.internal.item() == pytest.approx((25 / 2) ** 0.5)
    assert found.output.item() == pytest.approx(((18**2 + 24**2) / 16) ** 0.5)
    assert found.base.item() == pytest.approx(rms(layer.base_layer(x)))


@pytest.mark.parametrize("at", ["A", "B"])
def test_features_of_every_kind_of_layer(at):
    model = lora_start_(adapted(lora_dropout=0.5), at, generator=torch.Generator().manual_seed(0))
    model.train()
    found = lora_features(model, TOKENS)
    assert found.names == ("table", "deep", "flat", "image")
    assert (found.internal > 0).tolist() == [at == "A"] * 4
    assert not found.output.any()
    assert (found.base > 0).all()
    if at == "A":
        table = factors(model)["table"][0]
        assert found.internal[0].item() == pytest.approx(rms(table[:, TOKENS].detach()), rel=1e-5)
        h = model.base_model.model.table.base_layer(TOKENS)
        assert found.internal[1].item() == pytest.approx(rms(h @ factors(model)["deep"][0].T), rel=1e-4)
    shaken = found.output
    with torch.no_grad():
        for a, b in factors(model).values():
            a.add_(0.01)
            b.add_(0.01)
    shaken = lora_features(model, TOKENS).output
    assert (shaken > 0).all()


def test_the_probe_leaves_no_trace_and_speaks():
    model = lora_start_(adapted(lora_dropout=0.5), "A")
    model.train()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = lora_features(model, TOKENS)
    assert torch.equal(rng, torch.get_rng_state())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert "In 4 layers with a LoRA" in found.summary()
    assert len(found.plot().axes) == 1


def off():
    model = lora(True)
    model.base_model.disable_adapter_layers()
    return model


def waiting():
    model = lora(True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.set_adapter("other")
    return model


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize(
    ("model", "batch", "words"),
    [
        (lambda: nn.Linear(8, 8), torch.ones(2, 8), "found no layer with a LoRA adapter named 'default' in Linear"),
        (merged, torch.ones(2, 8), "is merged in 0"),
        (off, torch.ones(2, 8), "is switched off in 0"),
        (waiting, torch.ones(2, 8), "is not active in 0"),
        (lambda: lora(True), torch.ones(2, 7), r"could not run the model on its batch \(float32 tensor of shape \(2, 7\)"),
        (lambda: lora(True), torch.ones(0, 8), "numbers in it"),
        (lambda: lora(True), torch.full((2, 8), torch.nan), "16 NaN"),
        (lambda: lora(True), torch.full((2, 8), torch.inf), "NaN or infinite features in 0"),
        (lambda: adapted(Skips(), ["used", "never"], r=2), torch.ones(2, 8), "it reached none of never"),
        (lambda: None, torch.ones(2, 8), "needs an nn.Module"),
    ],
)  # fmt: skip
def test_the_probe_refuses_in_one_sentence(model, batch, words):
    with pytest.raises(BadInput, match=words) as caught:
        lora_features(model(), batch)
    assert "\n" not in str(caught.value)

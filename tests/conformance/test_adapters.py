"""The adapters' contract, run over every configuration `pondera.adapters` exports, by discovery."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import pondera.adapters
from pondera.adapters._base import AdapterConfig, AdapterLayer
from pondera.errors import BadInput

CONFIGS = {
    name: obj
    for name, obj in vars(pondera.adapters).items()
    if inspect.isclass(obj) and issubclass(obj, AdapterConfig) and obj is not AdapterConfig
}
# What a method's configuration needs on the small layers used here; its defaults are for large ones.
SETTINGS: dict[str, dict] = {
    "DotaConfig": {"r": 4, "n_cores": 2},
    "OftConfig": {"block_size": 4},
    "SorsaConfig": {"r": 4},
    "SvftConfig": {"off_diagonal": 2},
    "TLoraConfig": {"r": 4},
}


class Mlp(nn.Module):
    """Every model here takes a timestep, which only T-LoRA looks at."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x, timestep=300.0):
        return self.head(self.b(self.act(self.a(x))))


class Conv1DNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Conv1D(16, 12), Conv1D(8, 16)
        nn.init.normal_(self.a.bias)

    def forward(self, x, timestep=300.0):
        return self.b(F.gelu(self.a(x)))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.b = nn.Conv2d(8, 8, 1)

    def forward(self, x, timestep=300.0):
        return self.b(F.relu(self.a(x))).flatten(1)


class EmbeddingNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 8)

    def forward(self, x, timestep=300.0):
        return self.b(self.a(x).mean(1))


MODELS = {
    "linear": (Mlp, nn.Linear, ["a", "b"], lambda: torch.randn(5, 12)),
    "conv1d": (Conv1DNet, Conv1D, ["a", "b"], lambda: torch.randn(2, 3, 12)),
    "conv2d": (ConvNet, nn.Conv2d, ["a", "b"], lambda: torch.randn(2, 4, 6, 6)),
    "embedding": (EmbeddingNet, nn.Embedding, ["a"], lambda: torch.randint(20, (3, 4))),
}


def core_of(config):
    return config.tuner().tuner_layer_cls.core


def _pairs():
    for name, config in CONFIGS.items():
        for kind, (_, layer, _, _) in MODELS.items():
            if layer in core_of(config).layers:
                yield pytest.param(name, kind, id=f"{name}-{kind}")


PAIRS = list(_pairs())


def make(name, kind, **more):
    build, _, targets, batch = MODELS[kind]
    torch.manual_seed(0)
    model, x = build().eval(), batch()
    config = CONFIGS[name](target_modules=list(targets), **{**SETTINGS.get(name, {}), **more})
    return model, config, x


def shake(model, amount=0.1, seed=1):
    """Move every trained number, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=draw).to(p))
    return model


def fixed(model, name, t=300.0):
    """A merge of T-LoRA needs one timestep; the others do not mind."""
    import contextlib

    return pondera.adapters.at_timestep(model, t) if name == "TLoraConfig" else contextlib.nullcontext()


def close(a, b, tol=1e-5):
    assert torch.allclose(a, b, atol=tol * max(1.0, b.detach().abs().max().item()), rtol=0), (
        (a - b).detach().abs().max().item()
    )


def test_something_is_exported():
    assert CONFIGS


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_identity_at_the_start_and_only_the_adapter_trains(name, kind):
    model, config, x = make(name, kind)
    before, weights = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    adapted = peft.get_peft_model(model, config)
    close(adapted(x), before)
    prefix = config.tuner().prefix
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert names
    assert all(prefix in n for n in names)
    adapted(x).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    base = {
        k.replace(".base_layer", ""): v for k, v in adapted.base_model.model.state_dict().items() if prefix not in k
    }
    assert all(torch.equal(base[k], v) for k, v in weights.items())


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_merge_equals_forward_and_unmerge_gives_the_same_bits(name, kind):
    model, config, x = make(name, kind)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = model(x)
    adapted = shake(peft.get_peft_model(model, config))
    with fixed(adapted, name):
        wanted = adapted(x)
        assert not torch.allclose(wanted, before, atol=1e-4)
        adapted.merge_adapter(safe_merge=True)
        close(adapted(x), wanted)
        adapted.unmerge_adapter()
        close(adapted(x), wanted, 1e-6)
        layers = [m for m in adapted.modules() if isinstance(m, AdapterLayer)]
        for layer in layers:
            delta = layer.get_delta_weight("default")
            assert delta.shape == layer.get_base_layer().weight.shape
        plain = adapted.merge_and_unload()
        close(plain(x), wanted)
    assert not any(isinstance(m, AdapterLayer) for m in plain.modules())
    assert set(plain.state_dict()) == set(weights)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_disable_unload_and_delete_find_the_base_again(name, kind):
    model, config, x = make(name, kind)
    before = model(x)
    adapted = shake(peft.get_peft_model(model, config))
    after = adapted(x)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), before)
    assert torch.equal(adapted(x), after)
    with fixed(adapted, name):
        adapted.merge_adapter()
        with adapted.disable_adapter():
            assert torch.equal(adapted(x), before)
        adapted.unmerge_adapter()
    assert torch.equal(adapted.unload()(x), before)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_saved_and_loaded(name, kind, tmp_path):
    model, config, x = make(name, kind)
    base = copy.deepcopy(model)
    adapted = shake(peft.get_peft_model(model, config))
    wanted = adapted(x)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    for low in (False, True):
        torch.manual_seed(99)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low)
        assert not any(p.is_meta for p in again.parameters())
        close(again(x), wanted, 1e-6)
        assert not any(p.requires_grad for p in again.parameters())
    trainable = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is type(config)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_two_adapters(name, kind, tmp_path):
    model, config, x = make(name, kind)
    before = model(x)
    adapted = shake(peft.get_peft_model(model, config), seed=1)
    first = adapted(x)
    adapted.add_adapter("other", copy.deepcopy(config))
    assert torch.equal(adapted(x), first)
    adapted.set_adapter("other")
    close(adapted(x), before)
    shake(adapted, seed=2)
    second = adapted(x)
    adapted.set_adapter("default")
    assert torch.equal(adapted(x), first)
    adapted.base_model.set_adapter(["default", "other"])
    both = adapted(x)
    assert not torch.allclose(both, first, atol=1e-5)
    assert not torch.allclose(both, second, atol=1e-5)
    with fixed(adapted, name):
        adapted.merge_adapter(["default", "other"])
        close(adapted(x), both)
        adapted.unmerge_adapter()
    adapted.set_adapter("default")
    adapted.save_pretrained(tmp_path, selected_adapters=["other"])
    adapted.delete_adapter("other")
    assert torch.equal(adapted(x), first)
    adapted.load_adapter(tmp_path / "other", "third")
    adapted.set_adapter("third")
    close(adapted(x), second, 1e-6)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_half_precision_base(name, kind):
    model, config, x = make(name, kind)
    model = model.to(torch.bfloat16)
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    before = model(x)
    adapted = peft.get_peft_model(model, config)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert adapted(x).dtype == torch.bfloat16
    close(adapted(x).float(), before.float(), 2e-2)
    bits = {n: p.clone() for n, p in adapted.named_parameters()}
    shake(adapted)
    with fixed(adapted, name):
        wanted = adapted(x)
        adapted.merge_adapter()
        close(adapted(x).float(), wanted.float(), 5e-2)
        adapted.unmerge_adapter()
    assert all(torch.equal(p, bits[n]) for n, p in adapted.named_parameters() if not p.requires_grad)
    model, config, _ = make(name, kind)
    half = peft.get_peft_model(model.to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert half(x).dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_autocast_and_double(name, kind):
    model, config, x = make(name, kind)
    adapted = shake(peft.get_peft_model(model, config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adapted(x)
    close(out.float(), adapted(x), 5e-2)
    out.float().sum().backward()
    model, config, x = make(name, kind)
    wide = peft.get_peft_model(model.double(), config)
    assert wide(x.double() if x.is_floating_point() else x).dtype == torch.float64


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_deepcopy_is_apart(name, kind):
    model, config, x = make(name, kind)
    adapted = shake(peft.get_peft_model(model, config))
    wanted = adapted(x)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(x), wanted)
    shake(twin, seed=5)
    assert torch.equal(adapted(x), wanted)
    assert not torch.equal(twin(x), wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_compile_agrees(name):
    model, config, x = make(name, "linear")
    adapted = shake(peft.get_peft_model(model, config))
    wanted = adapted(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = torch.compile(adapted, backend="aot_eager", fullgraph=True)
        out = fast(x)
        close(out, wanted)
        out.sum().backward()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    from torch.utils.checkpoint import checkpoint

    model, config, x = make(name, "linear")
    adapted = shake(peft.get_peft_model(model, config))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    plain = torch.autograd.grad(adapted(x).square().sum(), trained, allow_unused=True)
    again = torch.autograd.grad(checkpoint(adapted, x, use_reentrant=False).square().sum(), trained, allow_unused=True)
    assert all((a is None and b is None) or torch.allclose(a, b) for a, b in zip(plain, again))


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_to_save_are_trained_and_saved(name, tmp_path):
    model, config, x = make(name, "linear", modules_to_save=["head"])
    base = copy.deepcopy(model)
    adapted = shake(peft.get_peft_model(model, config))
    wanted = adapted(x)
    adapted.save_pretrained(tmp_path)
    close(peft.PeftModel.from_pretrained(base, tmp_path)(x), wanted, 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_lowers_the_loss(name):
    model, config, x = make(name, "linear")
    y = torch.randn(5, 4)
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(adapted(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hugging_face_model(name, tmp_path):
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    ids = torch.randint(50, (2, 7))
    before = gpt(ids).logits
    config = CONFIGS[name](task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj"], **SETTINGS.get(name, {}))
    adapted = peft.get_peft_model(gpt, config)
    with fixed(adapted, name):
        close(adapted(input_ids=ids).logits, before)
        shake(adapted, 0.05)
        wanted = adapted(input_ids=ids).logits
        assert adapted.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 9)
        close(adapted.merge_and_unload()(ids).logits, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_same_start(name):
    states = []
    for _ in range(2):
        model, config, _ = make(name, "linear")
        torch.manual_seed(7)
        states.append(peft.get_peft_model(model, config).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_refusals_name_the_layer_and_leave_the_model(name):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x)

    settings = SETTINGS.get(name, {})
    with pytest.raises(BadInput, match=r"'norm'.*got LayerNorm"):
        peft.get_peft_model(Odd(), CONFIGS[name](target_modules=["norm"], **settings))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(BadInput, match="Conv2d|groups"):
        peft.get_peft_model(grouped, CONFIGS[name](target_modules=["0"], **settings))
    assert isinstance(grouped[0], nn.Conv2d)


@pytest.mark.parametrize("name", CONFIGS)
def test_safe_merge_refuses_nan(name):
    model, config, x = make(name, "linear")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.fill_(float("nan"))
    with fixed(adapted, name), pytest.raises(BadInput, match="NaN"):
        adapted.merge_adapter(safe_merge=True)
    assert torch.isfinite(adapted.base_model.model.a.base_layer.weight).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rank_above_the_layer_is_refused(name):
    fields = CONFIGS[name].__dataclass_fields__
    rank = next((f for f in ("r", "rank") if f in fields), None)
    if rank is None:
        pytest.skip(f"{name} has no rank")
    model, _, _ = make(name, "linear")
    with pytest.raises(BadInput, match="1000"):
        peft.get_peft_model(model, CONFIGS[name](target_modules=["a"], **{**SETTINGS.get(name, {}), rank: 1000}))
    assert type(model.a) is nn.Linear


@pytest.mark.parametrize("name", CONFIGS)
def test_docstring_says_what_users_need(name):
    doc = inspect.getdoc(CONFIGS[name])
    assert all(part in doc for part in ("Args:", "Raises:", "Paper:", ">>>")), name


@pytest.mark.parametrize("name", CONFIGS)
def test_loading_in_little_memory_keeps_float32_on_a_half_precision_base(name, tmp_path):
    model, config, x = make(name, "linear")
    model = model.to(torch.bfloat16)
    base = copy.deepcopy(model)
    adapted = shake(peft.get_peft_model(model, config))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    loaded = dict(again.named_parameters())
    assert all(loaded[n].dtype == torch.float32 and torch.equal(loaded[n], p) for n, p in trained.items())
    assert again(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_layer_shows_its_sizes(name, kind):
    model, config, _ = make(name, kind)
    layers = [m for m in peft.get_peft_model(model, config).modules() if isinstance(m, AdapterLayer)]
    assert all(m.in_features > 0 and m.out_features > 0 for m in layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_with_a_new_head(name, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bert = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=3, **sizes)).eval()
    ids, base = torch.randint(40, (2, 6)), copy.deepcopy(bert)
    before = bert(ids).logits
    config = CONFIGS[name](task_type="SEQ_CLS", target_modules=["query", "value"], **SETTINGS.get(name, {}))
    adapted = peft.get_peft_model(bert, config)
    with fixed(adapted, name):
        close(adapted(input_ids=ids).logits, before)
        wanted = shake(adapted, 0.05)(input_ids=ids).logits
        adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    with fixed(again, name):
        close(again(input_ids=ids).logits, wanted, 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_vision_model_with_all_its_linear_layers(name):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).eval()
    x = torch.randn(2, 3, 8, 8)
    before = vit(x).last_hidden_state
    adapted = peft.get_peft_model(vit, CONFIGS[name](target_modules="all-linear", **SETTINGS.get(name, {})))
    with fixed(adapted, name):
        close(adapted(x).last_hidden_state, before)
        wanted = shake(adapted, 0.05)(x).last_hidden_state
        close(adapted.merge_and_unload()(x).last_hidden_state, wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_denoiser_of_diffusers(name):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    before = unet(x, 300, text).sample
    config = CONFIGS[name](target_modules=["to_q", "to_k", "to_v", "to_out.0"], **SETTINGS.get(name, {}))
    unet.add_adapter(config, "one")
    close(unet(x, 300, text).sample, before)
    after = shake(unet, 0.05)(x, 300, text).sample
    unet.add_adapter(copy.deepcopy(config), "two")
    close(unet(x, 300, text).sample, before)
    unet.set_adapter("one")
    close(unet(x, 300, text).sample, after, 1e-6)
    unet.disable_adapters()
    assert torch.equal(unet(x, 300, text).sample, before)
    unet.enable_adapters()
    unet.delete_adapters("two")
    close(unet(x, 300, text).sample, after, 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_trainer(name, tmp_path):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    config = CONFIGS[name](task_type="CAUSAL_LM", target_modules=["c_attn"], **SETTINGS.get(name, {}))
    adapted = peft.get_peft_model(gpt, config)
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(50, (8, 6))]
    options = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        gradient_checkpointing=True, save_steps=3, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    with fixed(adapted, name):
        found = Trainer(adapted, options, train_dataset=rows).train()
    assert found.global_step == 3
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(config.tuner().prefix in n for n in moved)
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_chosen_by_the_architecture_when_none_are_named(name):
    torch.manual_seed(0)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    adapted = peft.get_peft_model(gpt, CONFIGS[name](**SETTINGS.get(name, {})))
    assert [n for n, m in adapted.named_modules() if isinstance(m, AdapterLayer)] == [
        "base_model.model.transformer.h.0.attn.c_attn"
    ]


# -- serving and mixing --------------------------------------------------------------------------------------------------


def two(name, kind, **more):
    """A model with two adapters, both moved."""
    model, config, x = make(name, kind, **more)
    adapted = shake(peft.get_peft_model(model, config), seed=1)
    adapted.add_adapter("other", copy.deepcopy(config))
    adapted.set_adapter("other")
    shake(adapted, seed=2)
    adapted.set_adapter("default")
    return adapted.eval(), x


def tiny_gpt():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_name_a_sample(name, kind):
    adapted, x = two(name, kind)
    x = torch.cat([x, x])[:4] if len(x) < 4 else x
    names = ["other", "__base__", "default", "other", "default"][: len(x)]
    alone = {}
    for one in ("default", "other"):
        adapted.set_adapter(one)
        alone[one] = adapted(x)
    with adapted.disable_adapter():
        alone["__base__"] = adapted(x)
    mixed = adapted(x, adapter_names=names)
    for i, one in enumerate(names):
        close(mixed[i], alone[one][i])
        assert all(not torch.allclose(mixed[i], alone[o][i], atol=1e-4) for o in alone if o != one)
    close(adapted(x, adapter_names=["__base__"] * len(x)), alone["__base__"])
    close(adapted(x), alone["default"] if adapted.active_adapter == "default" else alone["other"])


@pytest.mark.parametrize("name", CONFIGS)
def test_names_that_cannot_be_served(name):
    adapted, x = two(name, "linear")
    hooks = sum(len(m._forward_pre_hooks) for m in adapted.modules())
    with pytest.raises(BadInput, match=r"adapter_names has nobody.*known: __base__, default, other"):
        adapted(x, adapter_names=["nobody"] * len(x))
    with pytest.raises(BadInput, match="got 2 names for inputs of batch 5"):
        adapted(x, adapter_names=["default", "other"])
    with pytest.raises(BadInput, match="needs a list with one name a sample, got 'default'"):
        adapted(x, adapter_names="default")
    with fixed(adapted, name):
        adapted.merge_adapter()
        with pytest.raises(BadInput, match=r"while \['default'\] are merged"):
            adapted(x, adapter_names=["other"] * len(x))
        adapted.unmerge_adapter()
    with pytest.raises(BadInput, match="for inference"):
        adapted.train()(x, adapter_names=["default"] * len(x))
    assert sum(len(m._forward_pre_hooks) for m in adapted.modules()) == hooks


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", CONFIGS)
def test_generating_with_a_name_a_sample(name, beams):
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj", "lm_head"], **SETTINGS.get(name, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(tiny_gpt(), CONFIGS[name](**settings))
    shake(adapted, 0.5).eval()
    ids = torch.randint(1, 50, (2, 5))
    call = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "num_beams": beams}
    with fixed(adapted, name):
        tuned = adapted.generate(input_ids=ids, **call)
        with adapted.disable_adapter():
            plain = adapted.generate(input_ids=ids, **call)
        mixed = adapted.generate(input_ids=ids, adapter_names=["__base__", "default"], **call)
    assert torch.equal(mixed[0, : plain.shape[1]], plain[0]) and torch.equal(mixed[1, : tuned.shape[1]], tuned[1])
    assert not torch.equal(tuned, plain)


def test_a_name_a_sample_with_modules_saved_whole():
    model, config, x = make("SvftConfig", "linear", modules_to_save=["head"])
    adapted = shake(peft.get_peft_model(model, config)).eval()
    tuned = adapted(x)
    with adapted.disable_adapter():
        plain = adapted(x)
    mixed = adapted(x, adapter_names=["default", "__base__", "default", "__base__", "__base__"])
    close(mixed, torch.stack([tuned[0], plain[1], tuned[2], plain[3], plain[4]]))


SUMS = [
    ("SorsaConfig", "cat"),
    ("SorsaConfig", "svd"),
    ("SvftConfig", "linear"),
    ("TLoraConfig", "cat"),
    ("TLoraConfig", "svd"),
]
SUMS = [(n, k, how) for n, how in SUMS for k in MODELS if MODELS[k][1] in core_of(CONFIGS[n]).layers]


@pytest.mark.parametrize(("name", "kind", "how"), SUMS)
def test_a_weighted_sum_of_adapters(name, kind, how, tmp_path):
    small = {"SorsaConfig": {"r": 1}, "TLoraConfig": {"r": 1, "r_min": 1}}.get(name, {})
    adapted, x = two(name, kind, **small)
    base = copy.deepcopy(adapted).unload()
    layers = [m for m in adapted.modules() if isinstance(m, AdapterLayer)]
    wanted = [0.7 * m.get_delta_weight("default") - 0.2 * m.get_delta_weight("other") for m in layers]
    before = adapted(x)
    rank = {} if how != "svd" else {"svd_rank": 4}
    adapted.add_weighted_adapter(["default", "other"], [0.7, -0.2], "sum", combination_type=how, **rank)
    assert torch.equal(adapted(x), before)  # it is not active
    assert not any(p.requires_grad for n, p in adapted.named_parameters() if ".sum." in n)
    for layer, delta in zip(layers, wanted):
        close(layer.get_delta_weight("sum"), delta, 1e-5)
    adapted.set_adapter("sum")
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    close(peft.PeftModel.from_pretrained(base, tmp_path / "sum")(x), adapted(x), 1e-5)


def test_the_best_sum_of_a_small_rank():
    adapted, _ = two("SorsaConfig", "linear")
    adapted.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")  # svd of rank r, as PEFT's LoRA has it
    assert adapted.peft_config["sum"].r == 4
    for layer in (m for m in adapted.modules() if isinstance(m, AdapterLayer)):
        whole = layer.get_delta_weight("default") + layer.get_delta_weight("other")
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        close(layer.get_delta_weight("sum"), u[:, :4] * s[:4] @ vh[:4], 1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("DotaConfig", "no meaning for DoTA: a sum of tensor trains.*peft.convert_to_lora"),
        ("GivensConfig", "no meaning for qGOFT: a sum of rotations is no rotation"),
        ("OftConfig", "no meaning for OFT: a sum of rotations is no rotation"),
        ("SvftConfig", "by 'linear', got 'svd'"),
        ("TLoraConfig", "with a mask, as 'default' has.*plain_lora"),
    ],
)
def test_sums_that_are_refused(name, says):
    adapted, _ = two(name, "linear")
    with pytest.raises(BadInput, match=says):
        adapted.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    assert set(adapted.peft_config) == {"default", "other"}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapters": ["default", "nobody"]}, "no adapter 'nobody' among 'default', 'other'"),
        ({"weights": [1.0]}, "a finite weight for each"),
        ({"weights": [1.0, float("nan")]}, "a finite weight for each"),
        ({"adapter_name": "other"}, "'other' is taken"),
        ({"combination_type": "ties"}, "by 'svd' or 'cat', got 'ties'"),
        ({"combination_type": "cat"}, r"layer 'a' needs a rank from 1 to 12 for a layer of \(16, 12\), got 16"),
        ({"svd_rank": 0}, "needs a rank from 1 to 12 .* got 0"),
    ],
)
def test_sums_that_cannot_be_had_leave_the_model(given, says):
    adapted, _ = two("SorsaConfig", "linear")
    call = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "sum", **given}
    with pytest.raises(BadInput, match=says):
        adapted.add_weighted_adapter(**call)
    assert set(adapted.peft_config) == {"default", "other"}
    assert not any(".sum." in n for n, _ in adapted.named_parameters())


def test_coefficients_at_other_places_are_not_added_up():
    model, config, _ = make("SvftConfig", "linear", pattern="random")
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", copy.deepcopy(config))
    with pytest.raises(BadInput, match="coefficients of the same places"):
        adapted.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")


@pytest.mark.parametrize("name", [n for n in CONFIGS if "rank_pattern" in CONFIGS[n].__dataclass_fields__])
def test_a_rank_of_its_own_for_a_layer(name, tmp_path):
    model, config, x = make(name, "linear", rank_pattern={"b": 2})
    base = copy.deepcopy(model)
    before = model(x)
    adapted = peft.get_peft_model(model, config)
    close(adapted(x), before)
    shake(adapted)
    small = {n: min(p.shape) for n, p in adapted.named_parameters() if p.requires_grad and p.ndim == 2}
    ranks = {layer: {r for n, r in small.items() if f".{layer}." in n} for layer in "ab"}
    if name == "DotaConfig":  # cores of four dimensions, the bond is the last of the first
        ranks = {k: {getattr(adapted.base_model.model, k).cores["default"].core_0.shape[-1]} for k in "ab"}
    assert ranks == {"a": {4}, "b": {2}}
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    close(again(x), adapted(x), 1e-6)
    with pytest.raises(BadInput, match=r"layer 'b'.*1000"):
        peft.get_peft_model(make(name, "linear")[0], make(name, "linear", rank_pattern={"b": 1000})[1])
    with pytest.warns(RuntimeWarning, match="nothing"):
        peft.get_peft_model(*make(name, "linear", rank_pattern={"nothing": 2})[:2])


# -- tied weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Model ", "ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["wte", "lm_head"]], ids="-".join)
@pytest.mark.parametrize("name", CONFIGS)
def test_merging_into_one_of_two_tied_layers_leaves_the_other(name, targets, tmp_path):
    if "wte" in targets and nn.Embedding not in core_of(CONFIGS[name]).layers:
        pytest.skip(f"{name} adapts no embeddings")
    gpt, ids = tiny_gpt(), torch.randint(50, (2, 7))
    table = gpt.transformer.wte.weight
    before = gpt(ids).logits
    adapted = shake(peft.get_peft_model(gpt, CONFIGS[name](target_modules=targets, **SETTINGS.get(name, {}))))
    with fixed(adapted, name):
        wanted = adapted(input_ids=ids).logits
        adapted.merge_adapter()
        close(adapted(input_ids=ids).logits, wanted)
        adapted.unmerge_adapter()
        assert torch.equal(adapted(input_ids=ids).logits, wanted)
        with adapted.disable_adapter():
            assert torch.equal(adapted(input_ids=ids).logits, before)
        of = lambda m: getattr(m, "base_layer", m).weight
        assert of(adapted.base_model.model.transformer.wte) is table is of(adapted.base_model.model.lm_head)
        plain = adapted.merge_and_unload()
    close(plain(ids).logits, wanted)
    plain.save_pretrained(tmp_path)
    close(GPT2LMHeadModel.from_pretrained(tmp_path)(ids).logits, wanted)


# -- the same adapter elsewhere ----------------------------------------------------------------------------------------------

LOSS = {"DotaConfig": 1e-4, "SorsaConfig": 1e-6, "SvftConfig": 1e-6, "TLoraConfig": 1e-6}  # at the rank of the change


@pytest.mark.parametrize("name", LOSS)
def test_converted_to_a_lora(name, tmp_path):
    gpt, ids = tiny_gpt(), torch.randint(50, (2, 7))
    base = copy.deepcopy(gpt)
    settings = {"target_modules": ["c_attn", "lm_head"], **SETTINGS.get(name, {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = shake(peft.get_peft_model(gpt, CONFIGS[name](**settings)))
        with fixed(adapted, name):
            wanted = adapted(input_ids=ids).logits
            peft.save_as_lora(tmp_path, adapted, rank=16)  # the width: every change fits
        lora = peft.PeftModel.from_pretrained(base, tmp_path)
    assert type(lora.peft_config["default"]) is peft.LoraConfig
    close(lora(input_ids=ids).logits, wanted, LOSS[name])
    mixed = lora(input_ids=ids, adapter_names=["__base__", "default"]).logits
    close(mixed[1], wanted[1], LOSS[name])


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, "linear") for n in ("GivensConfig", "OftConfig")] + [("SvftConfig", "conv2d"), ("SorsaConfig", "embedding")],
)
def test_what_cannot_be_a_lora_says_so(name, kind):
    adapted, _ = two(name, kind)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(adapted, rank=4)


@pytest.mark.parametrize("name", CONFIGS)
def test_injected_into_a_model_of_transformers(name, monkeypatch):
    """What `model.add_adapter` does, and that itself where it takes the installed PEFT or is told to."""
    gpt, ids = tiny_gpt(), torch.randint(50, (2, 7))
    before = gpt(ids).logits
    config = CONFIGS[name](target_modules=["c_attn"], **SETTINGS.get(name, {}))
    injected = peft.inject_adapter_in_model(config, copy.deepcopy(gpt))
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    gpt.add_adapter(config, "mine")
    for model in (injected, gpt):
        with fixed(model, name):
            close(model(ids).logits, before)
            assert not torch.allclose(shake(model)(ids).logits, before, atol=1e-4)

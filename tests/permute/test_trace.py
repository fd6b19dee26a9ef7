import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pondera._permute import PermutationSpec, apply_permutation, random_permutations, rules, trace_permutations
from pondera.errors import BadInput
from pondera.merge import weight_matching


class Block(nn.Module):
    def __init__(self, inn, out, norm=nn.BatchNorm2d, pad=False):
        super().__init__()
        stride = 1 if inn == out else 2
        self.conv1, self.norm1 = nn.Conv2d(inn, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.widen = (out - inn) // 2 if pad and inn != out else 0
        self.short = nn.Sequential(nn.Conv2d(inn, out, 1, 2), norm(out)) if inn != out and not pad else nn.Identity()

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.widen, self.widen)) if self.widen else self.short(x)
        return F.relu(x + h)


def resnet(norm=nn.BatchNorm2d, pad=False):
    blocks = Block(8, 8, norm, pad), Block(8, 8, norm, pad), Block(8, 16, norm, pad), Block(16, 16, norm, pad)
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def mlp():
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, 3))


def convnet():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2)),
        *(nn.ELU(), nn.Flatten(), nn.Linear(5 * 4, 9), nn.BatchNorm1d(9), nn.PReLU(9), nn.Linear(9, 3)),
    )


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first)
    return nn.Sequential(
        nn.Linear(3, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=4, n_layer=2, vocab_size=30, n_positions=12, **ids))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=12, **sizes))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **sizes))


class Dense(nn.Module):
    """Concatenated channels, depthwise, grouped and transposed convolutions, group norm, two flattened parts in a row."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.c, self.depth = nn.Conv2d(10, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.grouped, self.norm = nn.Conv2d(8, 12, 1, groups=2), nn.GroupNorm(2, 12)
        self.up, self.hidden = nn.ConvTranspose2d(12, 7, 2, 2), nn.Linear(7 * 64 + 10 * 16, 9)
        self.out = nn.Linear(9, 2)

    def forward(self, x):
        a = self.a(x).relu()
        both = torch.cat([a, self.b(a).relu()], 1)
        up = self.up(self.norm(self.grouped(F.silu(self.depth(self.c(both))))))
        return self.out(self.hidden(torch.cat([up.flatten(1), both.flatten(1)], 1)).tanh())


IMAGES, WORDS = torch.randn(2, 3, 8, 8), torch.randint(30, (2, 7))
MODELS = {  # model, example, how many units each permutation has
    "mlp": (mlp, torch.randn(5, 4), [7, 6]),
    "convnet": (convnet, torch.randn(2, 1, 8, 8), [6, 5, 9]),
    "resnet": (resnet, IMAGES, [8, 8, 8, 16, 16, 16]),
    "resnet, padded shortcut": (lambda: resnet(pad=True), IMAGES, [8, 8, 8, 16, 16, 4, 4]),
    "resnet, group norm": (lambda: resnet(lambda c: nn.GroupNorm(4, c)), IMAGES, [4, 2, 4, 2, 4, 2, 4, 4, 4, 4, 4, 4]),
    "resnet, layer norm": (lambda: resnet(lambda c: nn.GroupNorm(1, c)), IMAGES, [8, 8, 8, 16, 16, 16]),
    "encoder": (lambda: encoder(False), torch.randn(2, 5, 3), [16, *([4, 4, 24] * 2)]),
    "encoder, norm first": (lambda: encoder(True), torch.randn(2, 5, 3), [16, *([4, 4, 24] * 2)]),
    "gpt2": (gpt2, WORDS, [16, *([4, 4, 4, 64] * 2)]),
    "bert": (bert, {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS)}, [16, *([4, 4, 4, 24] * 2), 16]),
    "llama": (llama, WORDS, [16, *([2, 2, 4, 24] * 2)]),
    "dense": (Dense, torch.randn(2, 3, 4, 4), [4, 6, 2, 4, 6, 7, 9]),
}


def output(model, example):
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, torch.Tensor) else out.logits


def stirred(model, seed=0):
    """Every entry different, so that no missing axis can hide behind equal entries."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in (*model.named_parameters(), *model.named_buffers()):
            if x.is_floating_point():
                x.mul_(1 + 0.5 * torch.rand(x.shape, generator=g))
                if not name.endswith("running_var"):
                    x.add_(0.05 * torch.randn(x.shape, generator=g))
    return model.double().eval()


@pytest.mark.parametrize("name", MODELS)
def test_traced_permutations_leave_the_function_unchanged(name):
    build, example, sizes = MODELS[name]
    model = stirred(build())
    given = example.double() if isinstance(example, torch.Tensor) and example.is_floating_point() else example
    before = {k: v.clone() for k, v in model.state_dict().items()}
    spec = trace_permutations(model, given)
    assert sorted(spec.sizes(before).values()) == sorted(sizes)
    assert set(spec.axes) == set(before)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    old = output(model, given)
    for seed in range(3):
        perms = random_permutations(spec.sizes(before), torch.Generator().manual_seed(seed))
        new = apply_permutation(spec, perms, before)
        assert sum(not torch.equal(new[k], before[k]) for k in before) > len(before) / 3
        model.load_state_dict(new)
        assert torch.allclose(output(model, given), old, rtol=1e-6, atol=1e-6 * float(old.abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_no_permutation_is_missing_one_of_its_axes(name):
    """Undo a permutation on one of its tensors alone: the function must change."""
    build, example, _ = MODELS[name]
    model = stirred(build())
    given = example.double() if isinstance(example, torch.Tensor) and example.is_floating_point() else example
    spec, state, old = trace_permutations(model, given), model.state_dict(), output(model, given)
    state = {k: v.clone() for k, v in state.items()}
    p = next(iter(spec.places))
    perms = {p: torch.arange(spec.sizes(state)[p]).roll(1)}
    new = apply_permutation(spec, perms, state)
    first = spec.places[p][0].tensor
    broken = new | {first: state[first]}
    if first == "transformer.wte.weight":  # tied: one tensor under two names
        broken["lm_head.weight"] = state[first]
    model.load_state_dict(broken)
    assert (output(model, given) - old).abs().max() > 1e-4 * old.abs().max()


def test_channels_own_blocks_of_columns_after_a_flatten():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4, 3))
    spec = trace_permutations(net, torch.randn(1, 1, 4, 4))
    assert spec.axes["0.weight"] == ("0", None, None, None)
    assert spec.axes["2.weight"] == (None, ((("0", 2), (None, 4)),))
    new = apply_permutation(spec, {"0": torch.tensor([1, 0])}, net.state_dict())
    w = net[2].weight
    assert torch.equal(new["2.weight"], torch.cat([w[:, 4:], w[:, :4]], 1))


def test_query_key_and_value_in_one_weight_are_three_rows():
    spec = trace_permutations(gpt2(), WORDS)
    rows = spec.axes["transformer.h.0.attn.c_attn.weight"][1]
    (heads, inner), (heads_k, inner_k), (heads_v, inner_v) = rows
    assert heads == heads_k == heads_v and heads[1] == 4
    assert inner == inner_k and inner_v[0] != inner[0]
    assert spec.axes["transformer.h.0.attn.c_proj.weight"][0] == ((heads, inner_v),)


def test_tied_embedding_carries_the_residual_permutation_once():
    model = gpt2()
    spec = trace_permutations(model, WORDS)
    stream = spec.axes["transformer.wte.weight"][1]
    assert spec.axes["transformer.wte.weight"] == spec.axes["lm_head.weight"] == (None, stream)
    assert "lm_head.weight" in spec.carried and "transformer.wte.weight" not in spec.carried
    assert stream == spec.axes["transformer.h.1.mlp.c_proj.weight"][1] == spec.axes["transformer.ln_f.bias"][0]


def test_outputs_keep_their_order():
    body = encoder(True)[1]  # without the layers around it the stream is input and output
    assert trace_permutations(body, torch.randn(2, 5, 16)).axes["layers.0.linear2.bias"] == (None,)


def test_weight_norm_and_shared_layers():
    inner = nn.Linear(6, 6)
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 6)), nn.ReLU(), nn.Linear(6, 2))
    spec = trace_permutations(net, torch.randn(4, 3))
    assert spec.axes["0.parametrizations.weight.original0"] == ("0", None)
    assert spec.axes["0.parametrizations.weight.original1"] == ("0", None)
    twice = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), inner, nn.ReLU(), inner, nn.Linear(6, 2))
    spec = trace_permutations(twice, torch.randn(4, 3))  # one weight between one axis and itself
    assert not spec.places
    assert "stand on two axes" in spec.notes[0]
    spec = trace_permutations(twice, torch.randn(4, 3), matchable=False)
    assert spec.axes["2.weight"] == ("0", "0")
    assert inner.weight.dtype == torch.float32  # the model is as it was


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.c(h + self.b(h).relu())


def test_what_cannot_be_matched_can_be_kept_and_applied():
    net, x = Residual(), torch.randn(4, 3)
    spec = trace_permutations(net, x, matchable=False)
    assert spec.axes["b.weight"] == ("a", "a")
    state = apply_permutation(spec, {"a": torch.tensor([4, 2, 0, 1, 3])}, net.state_dict())
    assert torch.equal(state["b.weight"], net.b.weight[[4, 2, 0, 1, 3]][:, [4, 2, 0, 1, 3]])
    assert torch.allclose(torch.func.functional_call(net, state, x), net(x), atol=1e-6)
    with pytest.raises(BadInput, match=r"cannot match permutation 'a', which stands on the axes 0 and 1 of b\.weight"):
        weight_matching(net, Residual(), spec)


def test_what_is_not_followed_stays_fixed_and_is_said():
    class Sorting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(torch.renorm(self.b(self.a(x).relu()), 2, 1, 0.5))

    spec = trace_permutations(Sorting(), torch.randn(6, 3))
    assert list(spec.places) == ["a"]
    assert spec.notes == ("the operation renorm is not followed: the units it meets stay fixed",)


def test_by_position_stays_fixed():
    class Rolled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(3, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).roll(1, -1)).relu()[:, ::2])

    assert not trace_permutations(Rolled(), torch.randn(6, 3)).places


def test_the_proof_catches_a_wrong_rule(monkeypatch):
    """With a rule that lets a flip pass, the permutation it would allow must be dropped, and the other kept."""
    monkeypatch.setitem(rules.RULES, "flip", lambda t, out, x, *a, **k: t.of(x))

    class Flipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).flip(-1)).relu())

    spec = trace_permutations(Flipped(), torch.randn(6, 3))
    assert list(spec.places) == ["b"]
    assert spec.notes == ("'a' stays fixed: reordering it changes the outputs",)
    assert spec.axes["a.weight"] == (None, None)


def test_tracing_leaves_model_and_random_state_alone():
    net = convnet().train()
    net[0].eval()
    before, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [m.training for m in net.modules()]
    trace_permutations(net, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert modes == [m.training for m in net.modules()]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_bfloat16_models_are_proved_in_double():
    spec = trace_permutations(mlp().bfloat16(), torch.randn(5, 4).bfloat16())
    assert len(spec.places) == 2


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(2)


class Silent(nn.Linear):
    def forward(self, x):
        return "nothing"


@pytest.mark.parametrize(
    ("model", "example", "words"),
    [
        ("a string", torch.ones(1, 2), "needs an nn.Module, got str"),
        (nn.Linear(2, 2, device="meta"), torch.ones(1, 2), "weight is lazy or on the meta device"),
        (nn.LazyLinear(2), torch.ones(1, 2), "weight is lazy"),
        (nn.Linear(2, 2), torch.ones(1, 3), "could not run the model"),
        (nn.Linear(2, 2), torch.ones(0, 2), "numbers in it"),
        (nn.Linear(2, 2), torch.full((1, 2), torch.nan), "2 NaN of 2"),
        (Noisy(2, 2), torch.ones(1, 2), "something else every time"),
        (Silent(2, 2), torch.ones(1, 2), "found no tensor in what the model returns"),
    ],
)
def test_models_that_cannot_be_traced(model, example, words):
    with pytest.raises(BadInput, match=words):
        trace_permutations(model, example)


def test_nan_weights_are_refused():
    net = nn.Linear(2, 2)
    net.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match="found NaN in weight"):
        trace_permutations(net, torch.ones(1, 2))


def test_a_permutation_the_outputs_do_not_show_is_not_proved():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(torch.tanh(1e4 + self.b(self.a(x).relu())))

    spec = trace_permutations(Deaf(), torch.randn(6, 3))
    assert not spec.places
    assert spec.notes == tuple(f"'{p}' stays fixed: the outputs do not show what it does" for p in "ab")


@pytest.mark.parametrize("name", ["convnet", "gpt2", "dense"])
def test_json_and_back(name):
    build, example, _ = MODELS[name]
    spec = trace_permutations(build(), example)
    again = PermutationSpec.from_json(spec.to_json())
    assert again == spec and again.carried == spec.carried and again.places == spec.places

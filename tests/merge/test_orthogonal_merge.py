import copy
import itertools

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from pondera.errors import BadInput
from pondera.merge.orthogonal_merge import (
    bake_orthogonal_merge,
    orthogonal_dropout,
    orthogonal_dropout_merge,
    orthogonal_factors,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


def adapted(*names, base=net, targets=("0", "2"), **kw):
    kw = {"r": 3, "lora_alpha": 6, "init_lora_weights": False} | kw
    model = get_peft_model(base(), LoraConfig(target_modules=list(targets), **kw), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(target_modules=list(targets), **kw))
    return model.eval()


def contributions(model, names, x):
    """What each adapter's B gives in each layer, after any mask, in one forward."""
    seen, handles = {}, []
    for key, layer in model.named_modules():
        for name in names:
            if name in getattr(layer, "lora_B", {}):
                keep = lambda m, a, out, at=(key, name): seen.setdefault(at, out)
                handles.append(layer.lora_B[name].register_forward_hook(keep))
    model(x)
    for h in handles:
        h.remove()
    by_layer = {}
    for (key, name), out in seen.items():
        by_layer.setdefault(key, []).append(out)
    return by_layer


# -- the masks --------------------------------------------------------------------------------------------------------


def test_masks_by_hand():
    # uniform numbers of seed 0: .4963 .7682 .0885 .1320 .3074 .6341; shares .3, .2, .4, so bounds .3 .5 .9
    u = torch.rand(6, generator=gen())
    assert u.tolist() == pytest.approx([0.4963, 0.7682, 0.0885, 0.1320, 0.3074, 0.6341], abs=1e-4)
    x, y, z = orthogonal_dropout([torch.ones(6), torch.ones(6), torch.ones(6)], drop=[0.7, 0.8, 0.6], generator=gen())
    assert x.tolist() == pytest.approx([0, 0, 1 / 0.3, 1 / 0.3, 0, 0])
    assert y.tolist() == pytest.approx([1 / 0.2, 0, 0, 0, 1 / 0.2, 0])
    assert z.tolist() == pytest.approx([0, 1 / 0.4, 0, 0, 0, 1 / 0.4])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 3, 7])
def test_any_two_are_orthogonal_exactly_and_every_entry_is_used(k, dtype):
    outputs = [torch.randn(4, 50, generator=gen(i)).to(dtype) for i in range(k)]
    kept = orthogonal_dropout(outputs, generator=gen(1))
    for a, b in itertools.combinations(kept, 2):
        assert not (a * b).any()
    assert all(o.dtype == dtype for o in kept)
    assert sum((o != 0).int() for o in kept).eq(1).all()  # 1 - 1/k each: no entry without an owner
    for o, full in zip(kept, outputs):
        assert torch.equal(o[o != 0], (full * k)[o != 0])


def test_no_entry_is_lost_to_rounding_of_the_shares():
    for k in range(2, 40):
        assert sum((o != 0).sum() for o in orthogonal_dropout([torch.ones(2000)] * k, generator=gen(k))) == 2000


def test_infinity_in_one_leaves_the_others_zeros_exact():
    x, y = orthogonal_dropout([torch.full((40,), torch.inf), torch.ones(40)], generator=gen())
    assert set(x.tolist()) == {0.0, torch.inf}
    assert set(y.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("drop", "theirs"),
    [
        # mean of each mask over a million entries in the authors' OrthogonalDropout, torch seed 0
        ([0.5, 0.5], [0.4992, 0.5008]),
        ([0.6, 0.7, 0.8], [0.3999, 0.3002, 0.1998]),
        ([0.25, 0.75], [0.7497, 0.2503]),
        ([0.9, 0.8, 0.7, 0.6], [0.0996, 0.2005, 0.2993, 0.4006]),
    ],
)
def test_shares_agree_with_the_authors_code(drop, theirs):
    kept = orthogonal_dropout([torch.ones(1_000_000)] * len(drop), drop=drop, generator=gen())
    ours = [float((o != 0).double().mean()) for o in kept]
    assert ours == pytest.approx(theirs, abs=2.5e-3)  # five standard deviations of a share's difference
    assert [float(o.double().mean()) for o in kept] == pytest.approx([1.0] * len(drop), abs=2e-2)  # the mean is kept


# -- a pair of factors ------------------------------------------------------------------------------------------------


def test_factors_by_hand():
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    c, d = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0], [1.0], [1.0], [1.0]])
    A, B = orthogonal_factors([(a, b), (c, d)], [0.5, -1.0], generator=gen())  # owners 0 1 0 0 of shares 1/2
    assert A.tolist() == [[1, 2], [0, 1]]
    assert B.tolist() == [[1, 0], [0, -2], [3, 0], [4, 0]]


def test_factors_average_to_the_plain_sum_and_parts_are_orthogonal_for_every_input():
    pairs = [(torch.randn(r, 5, generator=gen(r)), torch.randn(8, r, generator=gen(r + 9))) for r in (1, 2, 4)]
    w, total = [0.7, -1.2, 2.0], torch.zeros(8, 5)
    g, draws = gen(), 4000
    for _ in range(draws):
        A, B = orthogonal_factors(pairs, w, generator=g)
        total += B @ A
    plain = sum(x * b @ a for x, (a, b) in zip(w, pairs))
    spread = (2 * sum((x * b @ a) ** 2 for x, (a, b) in zip(w, pairs))).sqrt()  # at least the deviation of one draw
    assert ((total / draws - plain).abs() < 5 * spread / draws**0.5).all()
    x = torch.randn(5, 30, generator=gen(5))
    parts = [bb @ (aa @ x) for bb, aa in zip(B.split([1, 2, 4], 1), A.split([1, 2, 4]))]
    for p, q in itertools.combinations(parts, 2):
        assert not (p * q).any()


# -- in a PEFT model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contributions_in_every_layer_are_orthogonal_and_add_up_to_the_output(dtype):
    names = ["u", "b", "c"]
    model = adapted(*names).to(dtype)
    x = torch.randn(7, 6, generator=gen()).to(dtype)
    with orthogonal_dropout_merge(model, names, generator=gen()) as merge:
        by_layer = contributions(model, names, x)
        assert merge.layers == ("base_model.model.0", "base_model.model.2") == tuple(by_layer)
        for parts in by_layer.values():
            assert len(parts) == 3
            for p, q in itertools.combinations(parts, 2):
                assert (p * q).float().abs().max() == 0
    model.base_model.set_adapter(names)
    plain = contributions(model, names, x)
    assert all((p * q).float().sum().abs() > 0 for parts in plain.values() for p, q in itertools.combinations(parts, 2))


def test_one_layer_is_base_plus_masked_sum():
    model = adapted("u", "b", targets=("0",), base=lambda: nn.Sequential(nn.Linear(6, 9)))
    x, w = torch.randn(4, 6, generator=gen()), [0.5, -2.0]
    layer = model.base_model.model[0]
    with orthogonal_dropout_merge(model, ["u", "b"], w, drop=[0.6, 0.4], generator=gen(3)):
        y = model(x)
    raw = [layer.lora_B[n](layer.lora_A[n](x)) * s * layer.scaling[n] for n, s in zip("ub", w)]
    expected = layer.base_layer(x) + sum(orthogonal_dropout(raw, drop=[0.6, 0.4], generator=gen(3)))
    assert torch.allclose(y, expected, atol=1e-6)


def test_mean_over_masks_is_peft_s_sum_of_active_adapters():
    model = adapted("u", "b", targets=("0",), base=lambda: nn.Sequential(nn.Linear(6, 9)))
    x = torch.randn(1, 6, generator=gen())
    model.base_model.set_adapter(["u", "b"])
    plain, n = model(x), 20_000
    with orthogonal_dropout_merge(model, ["u", "b"], generator=gen()):
        many = model(x.expand(n, 6))
    error = many.std(0) / n**0.5
    assert ((many.mean(0) - plain[0]).abs() < 5 * error).all()
    assert (many.std(0) > 0).all()


def test_the_generator_decides_every_mask_and_global_state_is_left_alone():
    model, x = adapted("u", "b"), torch.randn(3, 6, generator=gen())
    before = torch.get_rng_state()
    with orthogonal_dropout_merge(model, ["u", "b"], generator=gen(1)):
        one, two = model(x), model(x)
    with orthogonal_dropout_merge(model, ["u", "b"], generator=gen(1)):
        again = model(x)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)  # fresh masks in every call
    assert torch.equal(torch.get_rng_state(), before)


def test_removal_leaves_activity_gradients_weights_and_hooks_as_they_were():
    model = adapted("u", "b", "c")
    model.set_adapter("b")
    x, flags = torch.randn(3, 6, generator=gen()), [p.requires_grad for p in model.parameters()]
    state, y = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    merge = orthogonal_dropout_merge(model, ["u", "c"])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not torch.equal(model(x), y)
    merge.remove()
    merge.remove()
    assert torch.equal(model(x), y)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError, match="boom"):
        with orthogonal_dropout_merge(model, ["u", "b"]):
            raise RuntimeError("boom")
    assert torch.equal(model(x), y)


def test_disabled_within_the_merge_the_base_is_left():
    model, x = adapted("u", "b"), torch.randn(3, 6, generator=gen())
    with orthogonal_dropout_merge(model, ["u", "b"]), model.disable_adapter():
        assert torch.equal(model(x), net()(x))


def test_gradients_pass_the_masks():
    model = adapted("u", "b")
    model.base_model.set_adapter(["u", "b"])
    with orthogonal_dropout_merge(model, ["u", "b"], generator=gen()):
        model(torch.randn(8, 6, generator=gen())).square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora" in n]
    assert len(grads) == 8 and all(g is not None and g.any() for g in grads)


def test_a_copy_made_during_a_merge_draws_its_own_masks():
    model, x = adapted("u", "b"), torch.randn(3, 6, generator=gen())
    with orthogonal_dropout_merge(model, ["u", "b"], generator=gen(2)):
        twin = copy.deepcopy(model)
        here = model(x)
        assert torch.equal(twin(x), here)
        assert twin(x[:2]).shape == (2, 5)


@pytest.mark.filterwarnings("ignore:Already found")
def test_adapters_that_share_only_some_layers_convolutions_and_injected_models():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), base, adapter_name="u")
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0", "3"], init_lora_weights=False), base, adapter_name="b")
    x = torch.randn(2, 2, 3, 3, generator=gen())
    with orthogonal_dropout_merge(base, ["u", "b"], generator=gen()) as merge:
        assert merge.layers == ("0",)
        by_layer = contributions(base, ["u", "b"], x)
    p, q = by_layer["0"]
    assert p.shape == (2, 4, 3, 3) and not (p * q).any()
    assert 0 < (by_layer["3"][0] == 0).sum() < 6  # the layer only b changes is masked by the same rule
    assert "50% of the entries" in merge.summary() and "in 1 layers" in merge.summary()


@pytest.mark.parametrize("rows", [["u", "b"], ["u", "b", "b"], ["u", "u"]])
def test_mixed_batches_are_refused_in_forward(rows):
    model = adapted("u", "b")
    with orthogonal_dropout_merge(model, ["u", "b"]):
        with pytest.raises(BadInput, match="adapter_names cannot choose"):
            model(torch.ones(len(rows), 6), adapter_names=rows)
        assert model(torch.ones(4, 6)).shape == (4, 5)


# -- baked ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_baked_adapter_is_the_masked_sum_and_survives_saving(tmp_path, rslora):
    model = adapted("u", use_rslora=rslora)
    model.add_adapter("b", LoraConfig(r=5, target_modules=["0"], init_lora_weights=False, use_rslora=rslora))
    w, before = [1.5, -0.5], {k: v.clone() for k, v in model.state_dict().items()}
    assert bake_orthogonal_merge(model, ["u", "b"], "both", w, drop=[0.3, 0.7], generator=gen()) is model
    assert model.active_adapter == "u"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "both" not in k)
    parts = {}
    for key in ("0", "2"):
        layer = model.base_model.model[int(key)]
        delta = layer.get_delta_weight("both")
        plain = {n: layer.get_delta_weight(n) for n in "ub" if n in layer.lora_A}
        rows = {n: w["ub".index(n)] / (0.7, 0.3)["ub".index(n)] * d for n, d in plain.items()} | {"none": 0 * delta}
        owner = [[n for n, d in rows.items() if torch.allclose(delta[i], d[i], atol=1e-5)] for i in range(len(delta))]
        assert all(len(o) == 1 for o in owner)  # every unit comes whole from one adapter, or from none
        parts[key] = {o[0] for o in owner}
    assert parts["0"] == {"u", "b"}
    assert parts["2"] == {"u", "none"}
    model.set_adapter("both")
    x = torch.randn(4, 6, generator=gen())
    y = model(x)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = PeftModel.from_pretrained(net(), tmp_path / "both")
    assert torch.allclose(again.eval()(x), y, atol=1e-6)
    assert torch.allclose(again.merge_and_unload()(x), y, atol=1e-5)


def test_baked_convolution():
    base = lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1))
    model = bake_orthogonal_merge(adapted("u", "b", base=base, targets=("0",)), ["u", "b"], "c", generator=gen())
    layer = model.base_model.model[0]
    delta, plain = layer.get_delta_weight("c"), [2 * layer.get_delta_weight(n) for n in "ub"]
    assert all(sum(torch.allclose(delta[i], p[i], atol=1e-6) for p in plain) == 1 for i in range(6))


# -- refused ----------------------------------------------------------------------------------------------------------

ones = torch.ones(3)


@pytest.mark.parametrize(
    ("outputs", "drop", "words"),
    [
        ([], None, "at least two tensors, got 0"),
        ([ones], None, "at least two tensors, got 1"),
        ([ones, torch.ones(4)], None, r"of one shape, got a float32 tensor of shape \(3,\) .* of shape \(4,\)"),
        ([ones, ones.long()], None, "floating-point output, got a int64"),
        ([ones, torch.ones(3, device="meta")], None, "meta device"),
        ([ones, ones], 0.4, "add up to at most 1, got .0.4, 0.4.: 1.2"),
        ([ones, ones], [0.5], "one dropout rate for each of 2 adapters, got 1"),
        ([ones, ones], [1.0, 0.5], "0 <= p < 1"),
        ([ones, ones], float("nan"), "0 <= p < 1"),
    ],
)
def test_bad_tensors_are_one_sentence(outputs, drop, words):
    with pytest.raises(BadInput, match=words):
        orthogonal_dropout(outputs, drop=drop)


@pytest.mark.parametrize(
    ("pairs", "weights", "words"),
    [
        ([(torch.ones(2, 4), torch.ones(3, 2))], None, "at least two pairs of factors, got 1"),
        ([(torch.ones(2, 4), torch.ones(3, 2)), (torch.ones(2, 5), torch.ones(3, 2))], None, r"\(3, 4\), \(3, 5\)"),
        ([(torch.ones(2, 4), torch.ones(3, 1)), (torch.ones(2, 4), torch.ones(3, 2))], None, "in pair 0"),
        ([(torch.ones(4), torch.ones(3, 2)), (torch.ones(2, 4), torch.ones(3, 2))], None, "needs matrices"),
        ([(torch.ones(2, 4), torch.full((3, 2), torch.nan))] * 2, None, "6 NaN or infinite of 6 in its B of pair 0"),
        ([(torch.ones(2, 4), torch.ones(3, 2))] * 2, [1.0], "one finite weight for each of 2"),
        ([(torch.ones(2, 4), torch.ones(3, 2))] * 2, [1.0, torch.inf], "one finite weight"),
    ],
)
def test_bad_factors_are_one_sentence(pairs, weights, words):
    with pytest.raises(BadInput, match=words):
        orthogonal_factors(pairs, weights)


def spoilt(model):
    model.base_model.model[0].lora_B["b"].weight.data[0, 0] = torch.nan
    return model


def merged(model):
    model.merge_adapter(["u"])
    return model


def off(model):
    model.base_model.disable_adapter_layers()
    return model


def with_ia3():
    base = net()
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), base, adapter_name="u")
    inject_adapter_in_model(IA3Config(target_modules=["2"], feedforward_modules=[]), base, adapter_name="b")
    return base


def apart():
    model = adapted("u", targets=("0",))
    model.add_adapter("b", LoraConfig(target_modules=["2"]))
    return model


embedding = lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize(
    ("make", "names", "words"),
    [
        (lambda: adapted("u", "b"), ["u"], "at least two different adapters, got .'u'."),
        (lambda: adapted("u", "b"), "u", "at least two different adapters"),
        (lambda: adapted("u", "b"), ["u", "u"], "at least two different adapters"),
        (lambda: adapted("style", "b"), ["b", "styl"], "no adapter 'styl' among b, style; did you mean style"),
        (net, ["u", "b"], "got Sequential without any"),
        (lambda: "model", ["u", "b"], "got str"),
        (with_ia3, ["u", "b"], "merges LoRA adapters; 'b' is a Linear in 2"),
        (lambda: adapted("u", "b", use_dora=True), ["u", "b"], "is a DoraLinearVariant, no plain LoRA"),
        (
            lambda: adapted("u", "b", base=embedding),
            ["u", "b"],
            "cannot mask the output of adapter 'u' in .*0, a Embedding",
        ),
        (lambda: adapted("u", "b", base=Attention, targets=("attention",)), ["u", "b"], "a MultiheadAttention"),
        (lambda: adapted("u", "b", targets=("0",), modules_to_save=["2"]), ["u", "b"], "a trained copy of .*2"),
        (lambda: merged(adapted("u", "b")), ["u", "b"], "an unmerged model; u is merged into"),
        (lambda: off(adapted("u", "b")), ["u", "b"], "are disabled"),
        (
            lambda: spoilt(adapted("u", "b")),
            ["u", "b"],
            "1 NaN or infinite of 48 in its adapter 'b' in base_model.model.0",
        ),
        (apart, ["u", "b"], "no layer where two of u, b meet"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_that_cannot_be_merged_are_one_sentence(make, names, words):
    model = make()
    with pytest.raises(BadInput, match=words):
        orthogonal_dropout_merge(model, names)
    if isinstance(model, PeftModel):
        with pytest.raises(BadInput, match=words):
            bake_orthogonal_merge(model, names, "new")


def test_two_merges_at_once_are_refused():
    model = adapted("u", "b")
    with orthogonal_dropout_merge(model, ["u", "b"]):
        with pytest.raises(BadInput, match=r"in effect; remove\(\) it first"):
            orthogonal_dropout_merge(model, ["u", "b"])
    orthogonal_dropout_merge(model, ["u", "b"]).remove()


@pytest.mark.parametrize(
    ("make", "name", "words"),
    [
        (lambda: adapted("u", "b"), "u", "a new name, got 'u'"),
        (lambda: adapted("u", "b").base_model.model, "c", "needs a PeftModel to add an adapter to, got Sequential"),
        (lambda: adapted("u", "b", lora_bias=True), "c", "has a bias in base_model.model.0"),
        (
            lambda: adapted("u", "b", init_lora_weights="pissa", targets=("0",)),
            "c",
            "start 'pissa' rewrites the base weight",
        ),
        (
            lambda: adapted("u", "b", base=lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), targets=("0",), r=2),
            "c",
            "grouped convolution base_model.model.0",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_baked_is_one_sentence_and_changes_nothing(make, name, words):
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match=words):
        bake_orthogonal_merge(model, ["u", "b"], name)
    after = model.state_dict()
    assert list(before) == list(after) and all(torch.equal(v, before[k]) for k, v in after.items())

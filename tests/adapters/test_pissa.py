"""PiSSA as PEFT has it: LoraConfig(init_lora_weights="pissa")."""

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.replications.adapters.pissa import nf4

R = 3


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 18), nn.ReLU(), nn.Linear(18, 5)).to(dtype)


def config(start="pissa", **kwargs):
    return LoraConfig(**{"r": R, "lora_alpha": 6, "init_lora_weights": start, "target_modules": ["0"]} | kwargs)


def adapted(model=None, **kwargs):
    return peft.get_peft_model(net() if model is None else model, config(**kwargs))


def parts(model, name="default"):
    layer = model.base_model.model[0]
    a, b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
    return a, b, layer.scaling[name], layer.base_layer.weight.detach()


def train(model, steps=5):
    g = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(9, 12, generator=g)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("alpha", [1, 3, 6])
def test_factors_are_the_principal_triplets_and_the_base_the_residual(alpha):
    w = net()[0].weight.detach()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    a, b, scale, residual = parts(adapted(lora_alpha=alpha))
    assert scale == alpha / R
    # B = U_r (S_r / scale)^1/2 and A = (S_r / scale)^1/2 V_r^T, up to one sign for both
    root = (s[:R] / scale).sqrt()
    sign = torch.sign((b * u[:, :R]).sum(0))
    assert torch.allclose(b * sign, u[:, :R] * root, atol=1e-5)
    assert torch.allclose(a * sign[:, None], root[:, None] * vh[:R], atol=1e-5)
    assert torch.allclose(residual, u[:, R:] * s[R:] @ vh[R:], atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(residual)[: len(s) - R], s[R:], atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 18), lambda: Conv1D(18, 12)])
def test_the_function_at_the_start_is_the_base_up_to_rounding(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(40, 12)
    if isinstance(layer, Conv1D):
        layer.weight.data.normal_()
    before = layer(x).detach()
    model = adapted(nn.Sequential(layer))
    assert torch.allclose(model(x), before, atol=1e-5)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x), before, atol=1e-5)


def test_half_precision_rounds_the_residual_once():
    """The residual goes back into bfloat16: an error of the size of its last bit, where LoRA's start has none."""
    x, w = torch.randn(40, 12), net(torch.bfloat16)[0].weight.float()
    a, b, scale, residual = parts(adapted(net(torch.bfloat16)))
    assert a.dtype == torch.float32
    error = (residual.float() + scale * b @ a - w).abs().max()
    assert 0 < error <= residual.float().abs().max() * 2**-8
    with pytest.raises(TypeError, match="float32, float16, or bfloat16"):
        adapted(net(torch.float64))
    assert torch.equal(adapted(net(), start=True)(x), net()(x))


def test_both_factors_move_at_the_first_step_where_loras_a_does_not():
    for start, moves in (("pissa", True), (True, False)):
        model = adapted(start=start)
        model(torch.randn(9, 12)).square().mean().backward()
        layer = model.base_model.model[0]
        assert bool(layer.lora_A["default"].weight.grad.any()) == moves
        assert layer.lora_B["default"].weight.grad.any()
        assert layer.base_layer.weight.grad is None


def test_the_fast_start_is_near():
    """`pissa_niter_N` is a randomised SVD with N subspace iterations; the function is the base's all the same."""
    torch.manual_seed(0)
    w = torch.randn(60, 40) @ torch.diag(0.9 ** torch.arange(40.0))
    s = torch.linalg.svdvals(w)
    captured = []
    for start in ("pissa_niter_0", "pissa_niter_16", "pissa"):
        layer = nn.Linear(40, 60, bias=False)
        layer.weight.data = w.clone()
        a, b, scale, residual = parts(adapted(nn.Sequential(layer), start=start, r=8))
        assert torch.allclose(residual + scale * b @ a, w, atol=1e-5)
        captured.append(float((scale * b @ a).norm()))
    assert captured[0] < captured[1] <= captured[2] * (1 + 1e-6)
    assert captured[1] == pytest.approx(float(s[:8].norm()), rel=1e-3)
    assert captured[2] == pytest.approx(float(s[:8].norm()), rel=1e-5)


def test_saved_and_loaded_on_the_pretrained_base(tmp_path):
    model, x = train(adapted()), torch.randn(7, 12)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.allclose(again(x), model(x), atol=1e-5)


def test_converted_to_a_lora_of_twice_the_rank(tmp_path):
    """The way out of what the next test shows: the change alone, on the base as it was."""
    model, x = adapted(), torch.randn(7, 12)
    model.save_pretrained(tmp_path / "start")
    train(model)
    model.save_pretrained(tmp_path / "change", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    plain = peft.PeftModel.from_pretrained(net(), tmp_path / "change")
    assert plain.base_model.model[0].r["default"] == 2 * R
    assert torch.allclose(plain(x), model(x), atol=1e-5)
    with plain.disable_adapter():
        assert torch.equal(plain(x), net()(x))


def test_switched_off_it_leaves_the_residual_and_not_the_base():
    w, x = net()[0].weight.detach(), torch.randn(40, 12)
    model = adapted()
    with model.disable_adapter():
        off = model(x)
    assert (off - net()(x)).abs().max() > 0.1
    assert not torch.allclose(model.unload()[0].weight, w, atol=1e-2)


def test_a_second_one_takes_the_next_triplets():
    s = torch.linalg.svdvals(net()[0].weight.detach())
    model = adapted()
    model.add_adapter("next", config())
    a, b, scale, _ = parts(model, "next")
    assert torch.allclose(torch.linalg.svdvals(scale * b @ a)[:R], s[R : 2 * R], atol=1e-5)


def test_convolutions_are_refused_and_embeddings_get_another_start_without_a_word():
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='pissa'"):
        adapted(nn.Sequential(nn.Conv2d(2, 4, 3)))
    table = nn.Embedding(30, 8)
    before = table.weight.detach().clone()
    layer = adapted(nn.Sequential(table)).base_model.model[0]
    assert not layer.lora_embedding_A["default"].any()  # plain LoRA: the base is not split
    assert torch.equal(layer.base_layer.weight, before)


def test_a_rank_above_the_layers_is_not_refused():
    """PEFT keeps r = 40 in the config and the scale while the factors have the layer's 12: all is principal."""
    a, b, scale, residual = parts(adapted(r=40, lora_alpha=40))
    assert a.shape == (12, 12)
    assert scale == 1
    assert residual.abs().max() < 1e-5
    assert torch.allclose(b @ a, net()[0].weight, atol=1e-5)


def test_four_bit_rounding_by_hand():
    w = torch.tensor([[1.0, -0.5, 0.25, 0.0], [2.0, -2.0, 0.2, 0.1]])
    near = nf4(w, block=4)
    assert near[0].tolist() == pytest.approx([1.0, -0.525073, 0.246112, 0.0], abs=1e-6)
    assert near[1].tolist() == pytest.approx([2.0, -2.0, 2 * 0.0795803, 2 * 0.0795803], abs=1e-6)
    assert torch.equal(nf4(near, block=4), near)
    assert not nf4(torch.zeros(3, 5)).any()


def test_four_bit_rounding_agrees_with_bitsandbytes():
    """bitsandbytes 0.50.2 on the CPU rounds to half precision on its way back, and errs by 0.08043 on this matrix."""
    w = torch.sin(torch.arange(64 * 96, dtype=torch.float64) ** 2).reshape(64, 96).float()
    near = nf4(w)
    assert near[0, :4].tolist() == pytest.approx([0.0, 0.7230, -0.6962, 0.4407], abs=1e-4)
    assert float((near - w).norm() / w.norm()) == pytest.approx(0.08043, rel=5e-3)


def test_quantisation_error_of_a_weight_with_a_strong_direction():
    """An exact case of the claim: blocks stretched by one direction lose what PiSSA keeps out of them."""
    torch.manual_seed(0)
    noise, spike = 0.01 * torch.randn(64, 64), torch.outer(torch.randn(64), torch.randn(64))
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = noise + spike
    a, b, scale, residual = parts(adapted(nn.Sequential(layer), r=1))
    ours = (residual - nf4(residual)).norm()
    assert ours < 0.05 * (noise + spike - nf4(noise + spike)).norm()
    assert torch.allclose(scale * b @ a, spike, atol=0.1)

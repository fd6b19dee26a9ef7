import copy
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.adapters.sorsa import Sorsa, SorsaConfig, orthonormality, orthonormality_callback
from pondera.errors import BadInput


def weight(out, n):
    return torch.sin((torch.arange(out * n, dtype=torch.float64) + 1) ** 2).view(out, n)


def adapted(out, n, **fields):
    """A layer of fixed numbers in float64 with an adapter, and its core."""
    layer = nn.Linear(n, out, dtype=torch.float64)
    layer.weight.data, layer.bias.data = weight(out, n), torch.arange(out) / 10.0
    layer.bias.data = layer.bias.data.double()
    net = get_peft_model(nn.Sequential(layer), SorsaConfig(target_modules=["0"], **fields))
    return net, net.base_model.model[0].cores["default"]


def moved(core, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in core.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return core


@pytest.mark.parametrize(
    ("shape", "r", "alpha", "output", "first", "gradients", "penalty", "pulls", "merged"),
    [
        # |y|, y[0, 0], |gradients of sum(y^2)| for A (V^T), S, B (U), calc_ortho and |its gradients| for A, B, |W'| of
        # sorsa.layer.Linear at 809cca04 in float64, its factors moved from their start as below
        ((5, 4), 2, None, 3.785423, 0.571642, (49.040810, 3.987849, 18.625751), 0.196273, (0.971072, 1.103429), 4.815297),
        ((4, 6), 3, 6.0, 13.02238, 7.305146, (349.186953, 126.032828, 358.355166), 0.370983, (1.18125, 1.07299), 9.149037),
        ((6, 6), 1, 0.5, 4.186998, 1.400392, (11.152203, 0.838515, 6.449214), 0.182782, (1.035344, 1.137377), 4.733852),
    ],
)  # fmt: skip
def test_agrees_with_the_authors_code(shape, r, alpha, output, first, gradients, penalty, pulls, merged):
    out, n = shape
    net, core = adapted(out, n, r=r, alpha=alpha)
    sign = core.U.sum(0).sign().detach()  # signs were fixed so on both sides
    with torch.no_grad():
        for p, q in ((core.U, core.U0), (core.Vt.T, core.Vt0.T)):
            p *= sign
            q *= sign
        core.Vt += 0.1 * torch.cos(torch.arange(r * n).double()).view(r, n)
        core.U += 0.1 * torch.sin(torch.arange(r * out).double()).view(r, out).T
        core.S *= torch.arange(1, r + 1) * 0.5 + 0.8
    y = net(torch.cos(torch.arange(3 * n) * 0.7).double().view(3, n))
    y.square().sum().backward()
    assert y.norm().item() == pytest.approx(output, abs=2e-5)
    assert y[0, 0].item() == pytest.approx(first, abs=2e-5)
    assert [p.grad.norm().item() for p in (core.Vt, core.S, core.U)] == pytest.approx(gradients, rel=1e-5)
    net.zero_grad()
    orthonormality(net).backward()
    assert orthonormality(net).item() == pytest.approx(penalty, abs=1e-6)
    assert [p.grad.norm().item() for p in (core.Vt, core.U)] == pytest.approx(pulls, abs=1e-6)
    assert net.merge_and_unload()[0].weight.norm().item() == pytest.approx(merged, abs=1e-5)


def test_penalty_is_the_mean_over_all_factors_of_the_model():
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6))
    net = get_peft_model(net, SorsaConfig(r=2, target_modules=["0", "1"]))
    gaps = []
    for layer in net.base_model.model:
        core = moved(layer.cores["default"])
        for rows in (core.U.T, core.Vt):
            gaps.append(torch.linalg.matrix_norm(rows @ rows.T - torch.eye(2)).item())
    assert orthonormality(net).item() == pytest.approx(sum(gaps) / 4)
    assert orthonormality(net, squared=True).item() == pytest.approx(sum(g * g for g in gaps) / 4)


def test_starts_at_the_principal_triplets():
    _, core = adapted(7, 5, r=2)
    U, s, Vt = torch.linalg.svd(weight(7, 5), full_matrices=False)
    best = (U[:, :2] * s[:2]) @ Vt[:2]
    assert torch.allclose((core.U * core.S) @ core.Vt, best)
    assert all(torch.equal(a, b) for a, b in ((core.U0, core.U), (core.S0, core.S), (core.Vt0, core.Vt)))
    pissa = nn.Sequential(nn.Linear(5, 7))
    pissa[0].weight.data = weight(7, 5).float()
    lora = LoraConfig(r=2, lora_alpha=2, init_lora_weights="pissa", target_modules=["0"])
    layer = get_peft_model(pissa, lora).base_model.model[0]
    assert torch.allclose(layer.get_delta_weight("default").double(), best, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_start_is_the_base_bit_for_bit_and_nearly_orthonormal(dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 30)).to(dtype)
    x = torch.randn(5, 60).to(dtype)
    net = get_peft_model(copy.deepcopy(base), SorsaConfig(r=16, alpha=32.0, target_modules=["0", "2"]))
    assert torch.equal(net(x), base(x))
    assert orthonormality(net).item() < 1e-5


@pytest.mark.parametrize(("r", "alpha"), [(1, None), (3, None), (3, 1.5), (5, 20.0)])
def test_the_change_is_scaled_and_merging_is_exact(r, alpha):
    net, core = adapted(8, 5, r=r, alpha=alpha)
    moved(core)
    change = (core.U * core.S) @ core.Vt - (core.U0 * core.S0) @ core.Vt0
    assert torch.allclose(core.delta(), (1.0 if alpha is None else alpha / r) * change, atol=1e-12)
    assert sum(p.numel() for p in core.parameters()) == r * (8 + 5 + 1)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    y = net(x)
    assert torch.allclose(net.merge_and_unload()(x), y, atol=1e-12)


def test_a_small_change_keeps_its_digits():
    """The principal part is 1e6 times the change: two products subtracted in float32 leave about one digit of it."""
    torch.manual_seed(0)
    core = Sorsa(1e5 * torch.linalg.qr(torch.randn(20, 20))[0], SorsaConfig(r=4))
    with torch.no_grad():
        core.S += 0.125
        core.U += 1e-6 * torch.randn(20, 4)
        core.Vt += 1e-6 * torch.randn(4, 20)
    U, S, Vt, U0, S0, Vt0 = (t.detach().double() for t in (core.U, core.S, core.Vt, core.U0, core.S0, core.Vt0))
    exact = (U * S) @ Vt - (U0 * S0) @ Vt0
    naive = (core.U * core.S) @ core.Vt - (core.U0 * core.S0) @ core.Vt0
    assert (core.delta() - exact).abs().max() < 1e-6 * exact.abs().max()
    assert (naive - exact).abs().max() > 1e-3 * exact.abs().max()


def test_change_is_the_same_on_a_base_in_another_dtype(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(30, 30))
    net = get_peft_model(copy.deepcopy(base), SorsaConfig(r=8, target_modules=["0"]))
    moved(net.base_model.model[0].cores["default"])
    net.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path)
    change = [m.base_model.model[0].cores["default"].delta() for m in (net, loaded)]
    assert torch.equal(*change)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 9), Conv1D(9, 6), nn.Conv2d(3, 5, (2, 3), padding=1), nn.Embedding(12, 5)], ids=type
)
def test_every_layer_kind_merges_what_it_computes(layer):
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer))
    x = {nn.Conv2d: torch.randn(2, 3, 6, 7), nn.Embedding: torch.arange(12)}.get(type(layer), torch.randn(4, 6))
    before = net(x)
    net = get_peft_model(net, SorsaConfig(r=3, target_modules=["0"]))
    assert torch.equal(net(x), before)
    moved(net.base_model.model[0].cores["default"])
    y = net(x)
    assert (y - before).abs().max() > 0.01
    assert torch.allclose(net.merge_and_unload()(x), y, atol=1e-5)


def test_pull_has_full_length_near_orthonormal_factors_and_none_on_them():
    net, core = adapted(8, 6, r=3)
    with torch.no_grad():
        core.Vt += 1e-6 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = torch.autograd.grad(orthonormality(net), core.Vt)[0].norm().item()
    assert near == pytest.approx(2 / 2, rel=1e-3)  # 2 / (2 L), one layer
    assert torch.autograd.grad(orthonormality(net, squared=True), core.Vt)[0].norm().item() < 1e-4
    with torch.no_grad():
        core.U.copy_(torch.eye(8, 3))
        core.Vt.copy_(torch.eye(3, 6))
    for squared in (False, True):
        exact = orthonormality(net, squared=squared)
        assert exact.item() == 0
        assert all(not g.any() for g in torch.autograd.grad(exact, [core.U, core.Vt]))


def test_steps_against_the_penalty_reach_orthonormal_factors():
    torch.manual_seed(0)
    net = get_peft_model(nn.Sequential(nn.Linear(12, 9)), SorsaConfig(r=4, target_modules=["0"]))
    core = moved(net.base_model.model[0].cores["default"])
    start = orthonormality(net).item()
    sgd = torch.optim.SGD([core.U, core.Vt], lr=0.05)
    for _ in range(200):
        sgd.zero_grad()
        orthonormality(net, squared=True).backward()
        sgd.step()
    assert start > 0.3
    assert orthonormality(net).item() < 1e-4


def test_penalty_counts_active_adapters_alone():
    net, core = adapted(6, 6, r=2)
    moved(core)
    net.add_adapter("second", SorsaConfig(r=3, target_modules=["0"]))
    first = orthonormality(net).item()
    net.set_adapter("second")
    assert first > 0.1
    assert orthonormality(net).item() < 1e-10
    net.base_model.set_adapter(["default", "second"])
    assert orthonormality(net).item() == pytest.approx(first / 2)


def test_penalty_in_half_precision_is_computed_in_float32():
    net = get_peft_model(
        nn.Sequential(nn.Linear(64, 64)).bfloat16(),
        SorsaConfig(r=32, target_modules=["0"]),
        autocast_adapter_dtype=False,
    )
    core = net.base_model.model[0].cores["default"]
    assert core.U.dtype == torch.bfloat16
    exact = sum(
        torch.linalg.matrix_norm(rows @ rows.T - torch.eye(32)).item() for rows in (core.U.float().T, core.Vt.float())
    )
    assert orthonormality(net).dtype == torch.float32
    assert orthonormality(net).item() == pytest.approx(exact / 2, rel=1e-5)


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, labels):
        return {"loss": 100 * (self.layer(x) - labels).square().mean()}


def test_callback_adds_the_pull_after_clipping(tmp_path):
    """One step of SGD by transformers' Trainer against the same step by hand."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    net = get_peft_model(Task(), SorsaConfig(r=2, target_modules=["layer"]))
    moved(net.base_model.model.layer.cores["default"])
    data = [{"x": torch.randn(6), "labels": torch.randn(4)} for _ in range(4)]
    hand, rate, gamma = copy.deepcopy(net), 1e-2, 3e-3
    trained = [p for p in hand.parameters() if p.requires_grad]
    batch = {k: torch.stack([row[k] for row in data]) for k in ("x", "labels")}
    hand(**batch)["loss"].backward()
    length = nn.utils.clip_grad_norm_(trained, 0.5)
    assert length > 0.5
    (gamma / rate * orthonormality(hand)).backward()
    torch.optim.SGD(trained, lr=rate).step()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=rate,
        max_grad_norm=0.5,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(net, args, train_dataset=data, callbacks=[orthonormality_callback(gamma)]).train()
    for (name, p), q in zip(net.named_parameters(), hand.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name
    assert (orthonormality(net) - orthonormality(hand)).abs() < 1e-6


@pytest.mark.parametrize("gamma", [-1.0, torch.inf, torch.nan])
def test_callback_refuses(gamma):
    with pytest.raises(BadInput, match="finite gamma of at least 0"):
        orthonormality_callback(gamma)


def test_callback_without_adapters_says_so():
    args = types.SimpleNamespace(learning_rate=1e-3)
    with pytest.raises(BadInput, match="no active SORSA adapter in Linear"):
        orthonormality_callback().on_pre_optimizer_step(args, None, None, model=nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 5}, r"layer '0': SORSA needs r from 1 to 4 for a layer of \(4, 6\), got 5"),
        ({"r": 0}, "r from 1 to 4"),
        ({"r": 2.0}, "r from 1 to 4"),
        ({"alpha": 0.0}, "positive, finite alpha or None, got 0.0"),
        ({"alpha": torch.inf}, "positive, finite alpha"),
        ({"alpha": torch.nan}, "positive, finite alpha"),
    ],
)
def test_bad_configuration(fields, words):
    with pytest.raises(BadInput, match=words):
        get_peft_model(nn.Sequential(nn.Linear(6, 4)), SorsaConfig(target_modules=["0"], **fields))


def test_bad_layers():
    net = nn.Sequential(nn.Linear(6, 6))
    net[0].weight.data[1, 2] = torch.nan
    with pytest.raises(BadInput, match="SORSA needs finite numbers, got 1 NaN or infinite of 36"):
        get_peft_model(net, SorsaConfig(target_modules=["0"]))
    with pytest.raises(BadInput, match="no active SORSA adapter in Sequential"):
        orthonormality(net)
    lora = get_peft_model(nn.Sequential(nn.Linear(6, 6)), LoraConfig(target_modules=["0"]))
    with pytest.raises(BadInput, match="no active SORSA adapter in PeftModel"):
        orthonormality(lora)

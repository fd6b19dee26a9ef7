"""EVA as PEFT has it: LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(...)) and initialize_lora_eva_weights."""

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights
from torch import nn

R = 4
pytestmark = pytest.mark.filterwarnings("ignore:lora with eva initialization", "ignore:.init_lora_weights. is 'eva'")


class Net(nn.Module):
    """`steep` sees inputs of few strong directions, `flat` of many; `twin` sees what `steep` does."""

    def __init__(self):
        super().__init__()
        self.steep, self.twin, self.flat = nn.Linear(40, 10), nn.Linear(40, 10), nn.Linear(40, 10)
        self.register_buffer("strength", torch.where(torch.arange(40) < 3, 1.0, 0.05) * 0.9 ** torch.arange(40.0))
        turn, _ = torch.linalg.qr(torch.randn(40, 40))
        self.register_buffer("turn", turn)

    def forward(self, x):
        few = x * self.strength @ self.turn
        return self.steep(few) + self.twin(few) + self.flat(x * 0.98 ** torch.arange(40.0) + 1.0)


def batches(n=20, size=400):
    g = torch.Generator().manual_seed(0)
    return list(torch.randn(n, size, 40, generator=g))


def adapted(targets=("steep", "flat"), rho=2.0, data=None, **kwargs):
    torch.manual_seed(0)
    eva = EvaConfig(rho=rho, **{k: kwargs.pop(k) for k in ("whiten", "adjust_scaling_factors", "tau") if k in kwargs})
    config = LoraConfig(
        **{"r": R, "lora_alpha": 8, "init_lora_weights": "eva", "eva_config": eva, "target_modules": list(targets)}
        | kwargs
    )
    model = peft.get_peft_model(Net(), config)
    start(model, batches() if data is None else data)
    return model


def start(model, data, **kwargs):
    initialize_lora_eva_weights(
        model,
        data,
        forward_fn=lambda net, batch: net(batch),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
        **kwargs,
    )


def ranks(model):
    return {n: layer.r["default"] for n, layer in model.base_model.model.named_children() if hasattr(layer, "r")}


def inputs(model):
    """What each layer sees over all batches, centred."""
    seen = {}
    net = model.base_model.model
    hooks = [
        getattr(net, n).register_forward_pre_hook(lambda m, args, n=n: seen.setdefault(n, []).append(args[0]))
        for n in ("steep", "flat")
    ]
    with torch.no_grad():
        for batch in batches():
            net(batch)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(x) - torch.cat(x).mean(0) for n, x in seen.items()}


def test_a_holds_the_principal_directions_of_the_centred_inputs():
    model = adapted(rho=1.0)
    a = model.base_model.model.steep.lora_A["default"].weight
    _, _, vh = torch.linalg.svd(inputs(model)["steep"], full_matrices=False)
    assert torch.allclose(a @ a.T, torch.eye(R), atol=1e-4)
    assert ((a[:3] * vh[:3]).sum(1).abs() > 0.99).all()
    # the mean of 1 that `flat` sees would be its first direction, had the inputs not been centred
    first = model.base_model.model.flat.lora_A["default"].weight[0]
    assert first.sum().abs() / 40**0.5 < 0.6


def test_the_function_at_the_start_is_the_bases():
    model, x = adapted(), batches()[0]
    with model.disable_adapter():
        before = model(x)
    assert torch.equal(model(x), before)
    assert all(not p.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_ranks_go_where_they_explain_most_within_the_budget():
    model = adapted()
    share = {}
    for name, x in inputs(model).items():
        s = torch.linalg.svdvals(x).square()
        share[name] = (s / s.sum())[: 2 * R]  # at most rho r a layer
    best = sorted(((float(v), n) for n, values in share.items() for v in values), reverse=True)[: 2 * R]
    expected = {n: sum(1 for _, m in best if m == n) for n in share}
    assert expected["steep"] != expected["flat"]
    found = ranks(model)
    assert sum(found.values()) == 2 * R
    assert found == expected
    assert model.peft_config["default"].rank_pattern == {n: r for n, r in found.items() if r != R}


def test_without_redistribution_all_keep_their_rank():
    assert ranks(adapted(rho=1.0)) == {"steep": R, "flat": R}


def test_a_layer_that_gets_no_rank_loses_its_adapter():
    model = adapted(rho=2.0, r=1)  # two ranks for both layers; both are the steep one's
    assert ranks(model) == {"steep": 2}
    assert isinstance(model.base_model.model.flat, nn.Linear)
    assert list(model.peft_config["default"].target_modules) == ["steep"]


def test_the_scale_stays_that_of_the_even_rank_unless_told():
    scales = [m.scaling["default"] for m in adapted().modules() if hasattr(m, "scaling")]
    assert scales == [2.0, 2.0]
    model = adapted(adjust_scaling_factors=False)
    assert {n: 8 / r for n, r in ranks(model).items()} == {
        n: m.scaling["default"] for n, m in model.base_model.model.named_children() if hasattr(m, "scaling")
    }


def test_layers_of_one_input_share_its_directions():
    model = adapted(("steep", "twin"), rho=1.0)
    net = model.base_model.model
    a, b = (net.get_submodule(n).lora_A["default"].weight for n in ("steep", "twin"))
    assert torch.equal(a, b)
    assert a is not b


def test_whitened_directions_are_divided_by_the_root_of_their_singular_value():
    plain, white = (adapted(rho=1.0, whiten=w).base_model.model.steep.lora_A["default"].weight for w in (False, True))
    ratio = plain.norm(dim=1) / white.norm(dim=1)
    assert torch.allclose(plain / plain.norm(dim=1, keepdim=True), white / white.norm(dim=1, keepdim=True), atol=1e-4)
    assert (ratio[:-1] > ratio[1:]).all()
    assert ratio[0] > 1


def test_saved_with_its_ranks(tmp_path):
    model, x = adapted(), batches()[1]
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert ranks(again) == ranks(model)
    assert torch.allclose(again(x), model(x), atol=1e-5)


def test_the_same_batches_give_the_same_start():
    one, two = (adapted().state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_rank_times_rho_must_be_at_most_the_inputs_and_the_rows_of_a_batch():
    with pytest.raises(ValueError, match="n_components=42 invalid for n_features=40"):
        adapted(r=21, rho=2.0)
    assert sum(ranks(adapted(r=20, rho=2.0)).values()) == 40


def test_embeddings_fall_back_to_a_random_start_and_convolutions_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 5))
    config = LoraConfig(r=2, init_lora_weights="eva", eva_config=EvaConfig(), target_modules=["0", "1"])
    model = peft.get_peft_model(net, config)
    with pytest.warns(UserWarning, match="not supported by EVA"):
        start(model, list(torch.randint(30, (10, 60))))
    table = model.base_model.model[0]
    assert not table.lora_embedding_A["default"].any()
    assert table.lora_embedding_B["default"].any()
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='eva'"):
        peft.get_peft_model(nn.Sequential(nn.Conv2d(1, 3, 3)), config)


def test_what_peft_refuses():
    model = peft.get_peft_model(Net(), LoraConfig(r=R, target_modules=["steep"]))
    with pytest.raises(ValueError, match="can only be used with `init_lora_weights='eva'`"):
        start(model, batches())
    model = peft.get_peft_model(Net(), LoraConfig(r=R, init_lora_weights="eva", target_modules=["steep"]))
    with pytest.raises(ValueError, match="dataloader is empty"):
        start(model, [])
    with pytest.raises(ValueError, match="dataloader is required"):
        start(model, None)
    with pytest.raises(ValueError, match="rho"):
        EvaConfig(rho=0.5)

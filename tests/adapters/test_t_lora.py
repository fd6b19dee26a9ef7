"""T-LoRA: the authors' numbers, the mask by hand, denoisers of three kinds, and what is refused."""

import copy

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from pondera.adapters import TLoraConfig, active_rank, at_timestep, plain_lora
from pondera.adapters.t_lora import TLora, TLoraLayer, _gaussian_singular_values, clock_of
from pondera.errors import BadInput

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def fill(*shape, k):
    n = torch.Size(shape).numel()
    return torch.sin(k * torch.arange(1, n + 1, dtype=torch.float64)).reshape(shape)


def small_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8,
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def shake(model, amount=0.1):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(amount * torch.randn(p.shape, generator=draw))
    return model


@pytest.mark.parametrize(
    ("t", "wanted"),
    [  # ControlGenAI/T-LoRA at 602c4f74, OrthogonalLoRALinearLayer in float64 on these matrices, r 4, r_min 2
        (0, [-0.03643864, -0.58946789, -0.50869124, -0.02724235, 0.40556538,
             0.1826767, 0.76840433, 0.55880143, -0.11621587, -0.62454682]),
        (499, [-0.11074283, -0.75169192, -0.63292897, 0.08778178, 0.71889904,
               0.27940214, 0.9400398, 0.66360849, -0.25018939, -0.92602133]),
        (900, [-0.52560505, -0.61286481, -0.05028261, 0.54486298, 0.551955,
               0.73380108, 0.79282972, 0.02657171, -0.75912617, -0.75093848]),
    ],
)  # fmt: skip
def test_agrees_with_the_authors_layer(t, wanted):
    net = peft.get_peft_model(
        nn.Sequential(nn.Linear(6, 5, bias=False)).double(), TLoraConfig(r=4, target_modules=["0"])
    )
    layer = net.base_model.model[0]
    layer.base_layer.weight.data.zero_()
    core = layer.cores["default"]
    with torch.no_grad():
        for name, value in {
            "Q": fill(4, 6, k=1.1), "P": fill(5, 4, k=1.3), "s": fill(4, k=0.7),
            "Q0": fill(4, 6, k=1.7), "P0": fill(5, 4, k=1.9), "s0": fill(4, k=0.3),
        }.items():  # fmt: skip
            getattr(core, name).copy_(value)
    with at_timestep(net, t):
        assert torch.allclose(net(fill(2, 6, k=0.5)).flatten(), torch.tensor(wanted).double(), atol=1e-7)


def test_agrees_with_the_authors_vanilla_layer():
    config = TLoraConfig(r=4, r_min=3, start="lora", target_modules=["0"])
    net = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5, bias=False)).double(), config)
    net.base_model.model[0].base_layer.weight.data.zero_()
    core = net.base_model.model[0].cores["default"]
    with torch.no_grad():
        core.Q.copy_(fill(4, 6, k=1.1))
        core.P.copy_(fill(5, 4, k=1.3))
    wanted = [-0.0210844, -0.90886607, -0.83055341, 0.13060983, 0.95293917,
              0.30464957, 1.17621951, 0.79750733, -0.42892855, -1.19942768]  # fmt: skip
    with at_timestep(net, 1000):  # three components on
        assert torch.allclose(net(fill(2, 6, k=0.5)).flatten(), torch.tensor(wanted).double(), atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "which", "wanted"),
    [  # means over 40 draws of the authors' start, r 8
        ((96, 96), "last", [0.1461, 0.1264, 0.1071, 0.0864, 0.0665, 0.0468, 0.0273, 0.0082]),
        ((160, 96), "last", [0.5756, 0.5528, 0.5303, 0.5067, 0.4806, 0.4532, 0.4227, 0.3817]),
        ((96, 96), "middle", [1.0679, 1.0464, 1.0246, 1.002, 0.9817, 0.9603, 0.9364, 0.9142]),
        ((96, 96), "first", [2.4, 2.3179, 2.2636, 2.2141, 2.1765, 2.1284, 2.0871, 2.0491]),
    ],
)
def test_the_random_start_has_the_law_of_the_authors(shape, which, wanted):
    torch.manual_seed(0)
    config = TLoraConfig(r=8, triplets=which, target_modules=["0"])
    drawn = torch.stack([TLora(torch.empty(shape), config).s.detach() for _ in range(40)])
    assert torch.allclose(drawn.mean(0), torch.tensor(wanted), atol=0.012)


def test_the_singular_values_have_the_moments_of_a_gaussian_matrix():
    torch.manual_seed(0)
    mine = torch.stack([_gaussian_singular_values(7, 4) for _ in range(3000)])
    theirs = torch.linalg.svdvals(torch.randn(3000, 7, 4, dtype=torch.float64))
    assert torch.allclose(mine.mean(0), theirs.mean(0), atol=0.05)
    assert torch.allclose(mine.square().mean(0), theirs.square().mean(0), rtol=0.05)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("which", ["first", "middle", "last"])
@pytest.mark.parametrize("start", ["ortho", "weight"])
def test_starts_are_orthonormal_and_the_weights_own_are_its_triplets(start, which, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    core = TLora(weight, TLoraConfig(r=5, start=start, triplets=which, target_modules=["0"]))
    assert torch.allclose(core.Q @ core.Q.T, torch.eye(5), atol=1e-5)
    assert torch.allclose(core.P.T @ core.P, torch.eye(5), atol=1e-5)
    assert bool((core.s.diff() <= 0).all())
    if start == "weight":
        assert torch.allclose(weight @ core.Q.T, core.P * core.s, atol=1e-4)
        n = 12 if 12 in shape else 16
        first = {"first": 0, "middle": -(-(n - 5) // 2), "last": n - 5}[which]
        assert torch.allclose(core.s, torch.linalg.svdvals(weight)[first : first + 5], atol=1e-5)


def test_rank_by_timestep_by_hand():
    assert active_rank(torch.tensor([0.0, 1, 999, 1000]), r=4, r_min=1).tolist() == [4, 3, 1, 1]
    assert active_rank(torch.tensor([500.0]), r=64, r_min=32).tolist() == [48]
    assert active_rank(torch.tensor([500.0]), r=64, r_min=32, power=2.0).tolist() == [40]
    t = torch.arange(1001)
    exact = [((1000 - int(v)) * 10) // 1000 + 1 for v in t]  # whole numbers: no rounding
    assert active_rank(t, r=11, r_min=1).tolist() == exact
    assert active_rank((t / 1000).float() * 1000, r=11, r_min=1).tolist() == exact  # FLUX is given t / 1000


def test_masked_components_get_no_gradient():
    net = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), TLoraConfig(r=6, r_min=2, target_modules=["0"]))
    core = net.base_model.model[0].cores["default"]
    with at_timestep(net, 600):  # floor(.4 * 4) + 2 = 3 on
        net(torch.randn(4, 8)).square().sum().backward()
    assert (core.s.grad != 0).tolist() == [True] * 3 + [False] * 3
    assert core.Q.grad[3:].abs().sum() == 0
    assert core.P.grad[:, 3:].abs().sum() == 0


def test_a_unet_gives_its_own_timestep_and_every_sample_its_mask():
    unet = small_unet()
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 32)
    before = unet(x, 10, text).sample
    unet.add_adapter(TLoraConfig(r=8, r_min=2, target_modules=ATTENTION))
    assert torch.allclose(unet(x, 10, text).sample, before, atol=1e-5)
    shake(unet)
    times = torch.tensor([5, 500, 950])
    together = unet(x, times, text).sample
    for i, t in enumerate(times):
        alone = unet(x[i : i + 1], t, text[i : i + 1]).sample
        assert torch.allclose(together[i : i + 1], alone, atol=1e-4)
        assert torch.allclose(unet(x[i : i + 1], timestep=int(t), encoder_hidden_states=text[i : i + 1]).sample, alone)
    wrong = unet(x, 500, text).sample
    assert torch.allclose(together[1], wrong[1], atol=1e-4)
    assert not torch.allclose(together[0], wrong[0], atol=1e-3)


def test_a_flux_transformer_is_given_thousandths():
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 3, 32),
        "pooled_projections": torch.randn(2, 32), "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    before = flux(**call, timestep=torch.tensor([0.25, 0.9])).sample
    flux.add_adapter(TLoraConfig(r=8, r_min=1, start="lora", target_modules=ATTENTION))
    assert torch.allclose(flux(**call, timestep=torch.tensor([0.25, 0.9])).sample, before, atol=1e-5)
    shake(flux)
    out = flux(**call, timestep=torch.tensor([0.25, 0.9])).sample
    assert clock_of(flux).now.tolist() == pytest.approx([250, 900], abs=1e-3)
    with at_timestep(flux, torch.tensor([250.0, 900.0])):
        assert torch.equal(flux(**call, timestep=torch.tensor([0.25, 0.9])).sample, out)
    with at_timestep(flux, 250):
        assert not torch.allclose(flux(**call, timestep=torch.tensor([0.25, 0.9])).sample[1], out[1], atol=1e-4)


def test_an_sd3_transformer_is_given_whole_timesteps():
    torch.manual_seed(0)
    sd3 = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
    ).eval()  # fmt: skip
    sd3.add_adapter(TLoraConfig(r=4, target_modules=ATTENTION))
    sd3(
        hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 3, 32),
        pooled_projections=torch.randn(1, 16), timestep=torch.tensor([731.0]),
    )  # fmt: skip
    assert clock_of(sd3).now.tolist() == [731]


def test_the_mask_survives_gradient_checkpointing_of_the_denoiser():
    unet = small_unet()
    unet.add_adapter(TLoraConfig(r=8, r_min=2, target_modules=ATTENTION))
    shake(unet).train()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    trained = [p for p in unet.parameters() if p.requires_grad]
    call = lambda: unet(x, torch.tensor([100, 900]), text).sample.square().sum()
    plain = torch.autograd.grad(call(), trained)
    unet.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, torch.autograd.grad(call(), trained)))


def test_a_copy_has_its_own_clock():
    unet = small_unet()
    unet.add_adapter(TLoraConfig(r=8, target_modules=ATTENTION))
    twin = copy.deepcopy(unet)
    unet(torch.randn(1, 4, 8, 8), 100, torch.randn(1, 5, 32))
    twin(torch.randn(1, 4, 8, 8), 900, torch.randn(1, 5, 32))
    assert (clock_of(unet).now.item(), clock_of(twin).now.item()) == (100, 900)
    clocks = {id(m.cores["default"].clock) for m in twin.modules() if isinstance(m, TLoraLayer)}
    assert clocks == {id(clock_of(twin))}


def test_plain_lora_is_the_adapter_at_one_timestep():
    for start in ("ortho", "lora"):
        unet = small_unet()
        x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
        base = copy.deepcopy(unet)
        unet.add_adapter(TLoraConfig(r=8, r_min=2, start=start, target_modules=ATTENTION))
        shake(unet)
        factors = plain_lora(unet, t=400)
        rank = (5 if start == "lora" else 10,)  # floor(.6 * 6) + 2 = 5 components
        assert {v.shape[0] for k, v in factors.items() if k.endswith("lora_A.weight")} == set(rank)
        base.load_lora_adapter(factors, prefix=None)
        with at_timestep(unet, 400):
            assert torch.allclose(base(x, 400, text).sample, unet(x, 400, text).sample, atol=1e-4)


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t):
        return self.b(torch.relu(self.a(x)))


def hooks(model):
    """What lies on a model's modules to be called, all kinds."""
    kinds = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs")
    return [(name, kind, dict(getattr(m, kind))) for name, m in model.named_modules() for kind in kinds]


@pytest.mark.parametrize("how", ["unload", "merge_and_unload", "delete_adapter"])
def test_unloading_takes_the_clock_away(how):
    model = Timed()
    model.register_forward_pre_hook(lambda module, args: None)  # somebody else's, which stays
    before = hooks(model)
    net = peft.get_peft_model(model, TLoraConfig(r=4, target_modules=["a"]))
    net.add_adapter("other", TLoraConfig(r=2, target_modules=["b"]))
    net.delete_adapter("other")
    assert clock_of(net) is not None
    with at_timestep(net, 100):
        plain = {"unload": net.unload, "merge_and_unload": net.merge_and_unload}.get(how, lambda: model)()
    if how == "delete_adapter":
        net.delete_adapter("default")
        assert clock_of(model) is None
        return
    assert hooks(plain) == before
    assert plain(torch.ones(1, 8), 5).shape == (1, 8)


@pytest.mark.parametrize("how", ["delete_adapters", "unload_lora"])
def test_a_denoiser_that_lost_its_adapters_lets_the_clock_go_at_its_next_call(how):
    unet = small_unet()
    x, text, before = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), hooks(unet)
    wanted = unet(x, 10, text).sample
    unet.add_adapter(TLoraConfig(r=8, target_modules=ATTENTION), "one")
    shake(unet)
    unet.disable_adapters()
    for _ in range(2):  # no layer asks for the time, and it is still there to be asked
        assert torch.equal(unet(x, 10, text).sample, wanted)
    assert clock_of(unet) is not None
    unet.enable_adapters()
    assert not torch.allclose(unet(x, 10, text).sample, wanted, atol=1e-4)
    unet.delete_adapters("one") if how == "delete_adapters" else unet.unload_lora()
    for _ in range(2):
        after = unet(x, 10, text).sample
    assert torch.equal(after, wanted)
    assert clock_of(unet) is None
    if how == "unload_lora":
        assert hooks(unet) == before


@pytest.mark.parametrize("t", [300.0, torch.tensor([100.0, 500.0, 900.0, 300.0])])
def test_a_name_a_sample_keeps_every_samples_timestep(t):
    net = shake(peft.get_peft_model(Timed(), TLoraConfig(r=8, r_min=1, target_modules=["a", "b"])).eval())
    net.add_adapter("other", TLoraConfig(r=6, r_min=1, target_modules=["a"]))
    net.set_adapter("other")
    shake(net, 0.3)
    x, names = torch.randn(4, 8), ["other", "default", "__base__", "other"]
    mixed = net(x, t, adapter_names=names)
    for name in ("default", "other"):
        net.set_adapter(name)
        alone = net(x, t)
        mine = [i for i, n in enumerate(names) if n == name]
        assert torch.allclose(mixed[mine], alone[mine], atol=1e-5)
    with net.disable_adapter():
        assert torch.allclose(mixed[2], net(x, t)[2], atol=1e-6)


def test_a_saved_adapter_of_old_opens(tmp_path):
    """Files as they were written before layers could have ranks of their own."""
    import json

    from safetensors.torch import save_file

    config = {
        "auto_mapping": None, "base_model_name_or_path": None, "exclude_modules": None, "inference_mode": True,
        "layers_pattern": None, "layers_to_transform": None, "mask_power": 1.0, "modules_to_save": None,
        "num_timesteps": 1000, "peft_type": "PONDERA_T_LORA", "peft_version": "0.21.2", "r": 4, "r_min": 2,
        "revision": None, "start": "ortho", "target_modules": ["0"], "task_type": None, "timestep_scale": None,
        "triplets": "last",
    }  # fmt: skip
    tensors = {
        "Q": fill(4, 6, k=1.1), "P": fill(5, 4, k=1.3), "s": fill(4, k=0.7),
        "Q0": fill(4, 6, k=1.7), "P0": fill(5, 4, k=1.9), "s0": fill(4, k=0.3),
    }  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.0.pondera_t_lora_core.{k}": v for k, v in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    base = nn.Sequential(nn.Linear(6, 5)).double()
    x = fill(3, 6, k=0.5)
    plain = base(x)
    net = peft.PeftModel.from_pretrained(base, tmp_path)
    assert set(peft.get_peft_model_state_dict(net)) == {f"base_model.model.0.pondera_t_lora_core.{k}" for k in tensors}
    on = torch.tensor([1.0, 1, 1, 0]).double()  # floor(.501 * 2) + 2 = 3 of 4
    start = x @ tensors["Q0"].T * (tensors["s0"] * on) @ tensors["P0"].T
    wanted = plain + x @ tensors["Q"].T * (tensors["s"] * on) @ tensors["P"].T - start
    with at_timestep(net, 499):
        assert torch.allclose(net(x), wanted, atol=1e-12)
    with at_timestep(net, torch.tensor([499, 499, 499])):
        assert torch.allclose(net(x), wanted, atol=1e-12)


@pytest.mark.parametrize("start", ["ortho", "lora"])
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_added_in_one_step_is_what_the_core_gives(start, masked):
    """For all samples at one timestep and each at its own, in every shape of activations, and under autocast."""
    net = nn.Sequential(nn.Linear(6, 5))
    net = shake(peft.get_peft_model(net, TLoraConfig(r=4, r_min=1, start=start, target_modules=["0"])), 0.5)
    layer = net.base_model.model[0]
    core = layer.cores["default"]
    for shape in ((4, 6), (4, 3, 6), (8, 2, 3, 6)):
        x = torch.randn(shape)
        with at_timestep(net, torch.tensor([0, 400, 700, 1000]) if masked else 600):
            down, middle, up = core._factors(core._mask())
            each = middle.repeat_interleave(shape[0] // len(middle), 0).view(
                -1, *[1] * (len(shape) - 2), middle.shape[1]
            )
            wanted = layer.base_layer(x) + x @ down.T * each @ up.T
            assert torch.allclose(layer(x), wanted, atol=1e-5)
            assert torch.allclose(layer.base_layer(x) + core(x), wanted, atol=1e-5)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
                assert torch.allclose(layer(x).float(), wanted, atol=0.1)
    with at_timestep(net, 600):
        assert layer(torch.randn(6)).shape == (5,)


def test_a_layers_own_rank_has_the_same_share_on_at_pure_noise():
    config = TLoraConfig(r=8, r_min=2, target_modules=["a", "b"], rank_pattern={"a": 4, "b": 3})
    net = peft.get_peft_model(Timed(), config)
    assert [(c.r, c.r_min) for c in net.modules() if isinstance(c, TLora)] == [(4, 1), (3, 1)]
    x = torch.randn(2, 8)
    with net.disable_adapter():
        before = net(x, 0)
    assert torch.allclose(net(x, 500), before, atol=1e-5)
    unmasked = TLoraConfig(r=8, r_min=8, target_modules=["a"], rank_pattern={"a": 4})
    assert [(c.r, c.r_min) for c in peft.get_peft_model(Timed(), unmasked).modules() if isinstance(c, TLora)] == [
        (4, 4)
    ]


def test_ortho_lora_without_a_mask_needs_no_timestep_and_merges():
    net = shake(peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), TLoraConfig(r=4, r_min=4, target_modules=["0"])))
    x = torch.randn(3, 8)
    wanted = net(x)
    assert torch.allclose(net.merge_and_unload()(x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 0}, "r of at least 1, got 0"),
        ({"r": 4, "r_min": 5}, "r_min from 1 to r = 4, got 5"),
        ({"r": 4, "r_min": 0}, "r_min from 1 to r = 4, got 0"),
        ({"start": "orto"}, "did you mean ortho"),
        ({"triplets": "top"}, "first, middle, last"),
        ({"mask_power": 0.0}, "mask_power above 0"),
        ({"num_timesteps": 0}, "num_timesteps of at least 1"),
    ],
)
def test_refused_settings(settings, says):
    with pytest.raises(BadInput, match=says):
        TLoraConfig(target_modules=["0"], **settings)


def test_refused_timesteps():
    net = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), TLoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(BadInput, match="found no timestep"):
        net(torch.ones(1, 8))
    with pytest.raises(BadInput, match="from 0 to 1000, got"), at_timestep(net, 1001):
        pass
    with pytest.raises(BadInput, match="from 0 to 1000, got"), at_timestep(net, -1):
        pass
    with (
        pytest.raises(BadInput, match="2 timesteps for activations of batch 3"),
        at_timestep(net, torch.tensor([1, 2])),
    ):
        net(torch.ones(3, 8))
    with pytest.raises(BadInput, match="no one merged weight"):
        net.merge_adapter()
    with pytest.raises(BadInput, match="belongs to one timestep"), at_timestep(net, torch.tensor([1, 2])):
        net.merge_adapter()
    with pytest.raises(BadInput, match="without any"), at_timestep(nn.Linear(2, 2), 1):
        pass
    with pytest.raises(BadInput, match="no T-LoRA adapter named 'other'"):
        plain_lora(net, adapter_name="other")
    unet = small_unet()
    unet.add_adapter(TLoraConfig(r=8, target_modules=ATTENTION))
    with pytest.raises(BadInput, match=r"from 0 to 1000, got \[1500"):
        unet(torch.randn(1, 4, 8, 8), 1500, torch.randn(1, 5, 32))


def test_refused_rank_names_the_layer():
    unet = small_unet()
    with pytest.raises(BadInput, match=r"to_q.*r from 1 to 32"):
        unet.add_adapter(TLoraConfig(r=33, target_modules=ATTENTION))


def test_a_second_adapter_with_another_scale_is_refused():
    net = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), TLoraConfig(r=4, target_modules=["0"]))
    with pytest.raises(BadInput, match="differs from 1"):
        net.add_adapter("b", TLoraConfig(r=4, timestep_scale=1000.0, target_modules=["0"]))

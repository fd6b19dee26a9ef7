"""PEFT's PSOFT, to which this row points: what must hold of it, and under which of its switches."""

import pytest
import torch
from peft import PeftModel, PsoftConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.linalg.cayley import cayley, skew

STRICT = {"psoft_mag_a": False, "psoft_mag_b": False}  # with psoft_init, orth and the exact transform, PEFT's defaults


def tuned(layer=None, r=3, size=0.5, **switches):
    """A layer with an adapter away from its start: (model, layer, base weight)."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 6) if layer is None else layer
    base = layer.weight.detach().clone()
    net = get_peft_model(nn.Sequential(layer), PsoftConfig(r=r, target_modules=["0"], **switches))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g))
    return net, net.base_model.model[0], base


@pytest.mark.parametrize(
    "switches", [{}, STRICT, {"psoft_orth": False}, {"ab_svd_init": "pissa_init"}, {"use_cayley_neumann": True}]
)
def test_identity_at_the_start_and_merge(switches):
    x = torch.randn(5, 8)
    net, layer, base = tuned(size=0.0, **switches)
    assert torch.equal(net(x), layer.base_layer(x))
    net, layer, base = tuned(**switches)
    after = net(x)
    assert not torch.allclose(after, layer.base_layer(x), atol=1e-2)
    assert torch.allclose(net.merge_and_unload()(x), after, atol=1e-5)


def test_the_change_by_hand():
    """W + U_r S_r (R - I) V_r^T with R = (I + Q)(I - Q)^-1, whatever alpha."""
    for alpha in (1, 32):
        _, layer, base = tuned(psoft_alpha=alpha, **STRICT)
        u, s, vh = torch.linalg.svd(base, full_matrices=False)
        r = cayley(skew(layer.psoft_R["default"].weight.detach(), 3))
        change = (u[:, :3] * s[:3]) @ (r - torch.eye(3)) @ vh[:3]
        assert torch.allclose(layer.get_delta_weight("default"), change, atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "series", "first_row", "merged", "gradient"),
    [  # y[0], |W'| and |d sum(y^2) / d skew entries| of the module the authors published, in float64
        (False, False, [-0.8653834, 2.7115377, 0.0763257, -2.7337485, 0.7191953, 2.5244626], 4.9129644, 151.485384),
        (False, True, [-0.9122575, 2.7404745, 0.1147792, -2.7738753, 0.6924187, 2.5723814], 4.9755718, 139.672979),
        (True, False, [-1.2020584, 2.9878716, 0.3325876, -3.0846546, 0.5650471, 2.9202259], 5.5621458, 240.081324),
        (True, True, [-1.2639828, 3.0212966, 0.3847853, -3.1332691, 0.5269962, 2.9799132], 5.6353077, 223.037976),
    ],
)
def test_agrees_with_the_authors_module(vectors, series, first_row, merged, gradient):
    """Their five Neumann terms go up to Q^6, which PEFT counts as seven; they fill below the diagonal, PEFT above."""
    layer, x = nn.Linear(8, 6, bias=False), torch.cos(torch.arange(1.0, 25)).view(3, 8)
    layer.weight.data = torch.sin(torch.arange(1.0, 49)).view(6, 8)
    switches = {"psoft_mag_a": vectors, "psoft_mag_b": vectors, "use_cayley_neumann": series}
    if series:
        switches["num_cayley_neumann_terms"] = 7
    net, layer, _ = tuned(layer, r=4, size=0.0, **switches)
    module, n = layer.psoft_R["default"], torch.arange(1.0, 5)
    below = torch.zeros(4, 4)
    below[tuple(torch.tril_indices(4, 4, -1))] = 0.3 * torch.arange(1.0, 7).sin()
    with torch.no_grad():
        module.weight.copy_(below.T[tuple(torch.triu_indices(4, 4, 1))])
        if vectors:
            module.vector_b.copy_(1 + 0.2 * n.cos())
            module.vector_a.copy_(1 + 0.2 * n.sin())
    y = net(x)
    y.square().sum().backward()
    assert torch.allclose(y[0], torch.tensor(first_row), atol=1e-5)
    assert module.weight.grad.norm().item() == pytest.approx(gradient, rel=1e-5)
    whole = layer.base_layer.weight + layer.get_delta_weight("default")
    assert whole.norm().item() == pytest.approx(merged, rel=1e-5)


@pytest.mark.parametrize(
    ("switches", "count"),
    [
        ({}, lambda r: r * (r - 1) // 2 + 2 * r),
        (STRICT, lambda r: r * (r - 1) // 2),
        ({"psoft_orth": False}, lambda r: r * r + 2 * r),
    ],
)
def test_trained_numbers_do_not_depend_on_the_width(switches, count):
    for r in (1, 2, 5):
        for layer in (nn.Linear(8, 6), nn.Linear(50, 40)):
            net, _, _ = tuned(layer, r=r, **switches)
            assert net.get_nb_trainable_parameters()[0] == count(r)


def gram_change(switches, size=0.5):
    """Largest change of the inner products of the weight vectors of the layer's outputs (the rows of W)."""
    _, layer, base = tuned(size=size, **switches)
    after = base + layer.get_delta_weight("default").detach()
    return (after @ after.T - base @ base.T).abs().max().item()


def test_geometry_is_kept_with_the_vectors_off():
    assert gram_change(STRICT, size=2.0) < 1e-5


def test_so_is_that_of_the_principal_part_and_of_the_rest():
    _, layer, base = tuned(**STRICT)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    principal = (u[:, :3] * s[:3]) @ vh[:3]
    turned = principal + layer.get_delta_weight("default").detach()
    assert not torch.allclose(turned, principal, atol=1e-2)
    assert torch.allclose(turned @ turned.T, principal @ principal.T, atol=1e-6)
    assert torch.allclose(turned @ (base - principal).T, torch.zeros(6, 6), atol=1e-6)
    columns = (turned.T @ turned - principal.T @ principal).abs().max()
    assert columns > 0.05  # the other side's products move


@pytest.mark.parametrize(
    "switch",
    [
        {"psoft_mag_a": True},  # on by default
        {"psoft_mag_b": True},  # on by default
        {"psoft_orth": False},
        {"ab_svd_init": "pissa_init"},
        {"use_cayley_neumann": True},
    ],
    ids=str,
)
def test_geometry_is_not_kept_with_any_other_switch(switch):
    assert gram_change(STRICT | switch) > 1e-2


def test_six_neumann_terms_are_nearer_to_a_rotation_than_the_default_five():
    q = skew(torch.randn(28, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 8)
    q = 0.4 * q / torch.linalg.matrix_norm(q, 2)
    error = {}
    for terms in (5, 6):
        net, layer, _ = tuned(
            r=8, layer=nn.Linear(9, 8), use_cayley_neumann=True, num_cayley_neumann_terms=terms, **STRICT
        )
        module = layer.psoft_R["default"].double()
        with torch.no_grad():
            module.weight.copy_(q[tuple(torch.triu_indices(8, 8, 1))])
            r = module.get_matrix()
        assert torch.allclose(r, cayley(q, terms))  # the same sign as ours in both transforms
        error[terms] = torch.linalg.matrix_norm(r.T @ r - torch.eye(8, dtype=torch.float64), 2).item()
    assert error[5] == pytest.approx(2 * 0.4**4 - 0.4**8)
    assert error[6] == pytest.approx(0.4**10)


def test_unmerge_subtracts_what_merge_added():
    """To rounding; the bits of the base are not kept."""
    net, layer, base = tuned()
    net.merge_adapter()
    assert not torch.allclose(layer.base_layer.weight, base, atol=1e-2)
    net.unmerge_adapter()
    assert torch.allclose(layer.base_layer.weight, base, atol=1e-6)


def test_half_precision_base():
    net, layer, _ = tuned(nn.Linear(8, 6, dtype=torch.bfloat16), size=0.0)
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    assert torch.equal(net(x), layer.base_layer(x))
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32}


def test_a_saved_adapter_belongs_to_the_weight_it_was_made_from(tmp_path):
    """The factors are made anew from the base weight on loading, and are not in the file."""
    net, layer, base = tuned(**STRICT)
    x = torch.randn(5, 8)
    after = net(x)
    net.save_pretrained(tmp_path)
    assert list(load_file(tmp_path / "adapter_model.safetensors")) == ["base_model.model.0.psoft_R.weight"]

    def loaded(weight):
        fresh = nn.Sequential(nn.Linear(8, 6))
        with torch.no_grad():
            fresh[0].weight.copy_(weight)
            fresh[0].bias.copy_(layer.base_layer.bias)
        return PeftModel.from_pretrained(fresh, tmp_path)

    assert torch.allclose(loaded(base)(x), after, atol=1e-6)
    other = loaded(base.flip(0))  # another base: other factors under the same numbers
    assert not torch.allclose(other.base_model.model[0].get_delta_weight("default"), layer.get_delta_weight("default"))


def test_rank_above_the_layers_size_is_refused():
    with pytest.raises(ValueError, match=r"`r` \(7\) must be less than or equal to"):
        tuned(r=7)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3), nn.Embedding(9, 4), Conv1D(4, 4)])
def test_only_linear_layers_are_adapted(layer):
    with pytest.raises(ValueError, match="Only torch.nn.Linear is supported"):
        get_peft_model(nn.Sequential(layer), PsoftConfig(r=2, target_modules=["0"]))


def test_a_double_precision_base_is_refused():
    with pytest.raises(TypeError, match="requires float32/float16/bfloat16"):
        tuned(nn.Linear(8, 6, dtype=torch.float64))

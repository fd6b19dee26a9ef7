import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pondera._weights import owned
from pondera.errors import BadInput
from pondera.parametrize.weight_normalization import data_dependent_weight_norm_, weight_norm


def rows(y, axis=-1):
    return y.movedim(axis, -1).flatten(0, -2)


def assert_standard(y, axis=-1, atol=1e-5):
    features = rows(y, axis)
    assert features.mean(0).abs().max() < atol
    assert (features.var(0, correction=0) - 1).abs().max() < atol


def length(layer):
    return layer.parametrizations.weight.original0.flatten()


def wave(n, *shape):
    j = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(1.0 + n + 1.7 * j**1.1).reshape(shape)


# -- the start --------------------------------------------------------------------------------------------------------


def test_one_layer_by_hand():
    # weight (3, 4): v.x of the inputs (1, 0) and (0, 1) is 3 and 4, so mu = 3.5, sigma = 0.5 and |v| = 5:
    # t = v.x / 5 has mean 0.7 and deviation 0.1, g = 10, b = -7
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    data_dependent_weight_norm_(layer, torch.eye(2))
    assert length(layer).item() == pytest.approx(10.0, rel=1e-5)
    assert layer.bias.item() == pytest.approx(-7.0, rel=1e-5)
    assert layer.parametrizations.weight.original1.tolist() == [[3.0, 4.0]], "the direction is as it was"
    assert layer(torch.eye(2)).flatten().tolist() == pytest.approx([-1.0, 1.0], rel=1e-5)


def test_agrees_with_the_authors_code():
    """openai/weightnorm (commit 3503e68), its Lasagne layer's initializing pass on the same weights and batch."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(wave(1, 4, 3).T)
        net[2].weight.copy_(wave(2, 3, 2).T)
    data_dependent_weight_norm_(net, wave(0, 6, 4))
    assert length(net[0]).tolist() == pytest.approx([4.418474, 2.698884, 3.900503], abs=1e-6)
    assert net[0].bias.tolist() == pytest.approx([-0.120606, 0.060179, 0.267567], abs=1e-6)
    assert length(net[2]).tolist() == pytest.approx([1.655513, 1.548871], abs=1e-6)
    assert net[2].bias.tolist() == pytest.approx([0.330752, -0.022831], abs=1e-6)


LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 7, 7), 1),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (5, 4, 9), 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4), 1),
    "unbatched conv": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 9), 0),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), (5, 4, 3, 3), 1),
    "linear": (lambda: nn.Linear(4, 6), (9, 4), -1),
    "sequence": (lambda: nn.Linear(4, 6), (5, 7, 4), -1),
}


@pytest.mark.parametrize("which", LAYERS)
def test_every_kind_of_layer(which):
    torch.manual_seed(0)
    build, shape, axis = LAYERS[which]
    layer, x = build(), 3 * torch.randn(shape) + 2
    twin = copy.deepcopy(layer)
    data_dependent_weight_norm_(layer, x)
    assert_standard(layer(x), axis)
    # the function is a feature's own shift and scale of the old one; so only length and bias have changed
    new, old = rows(layer(x), axis), rows(twin(x), axis)
    assert torch.allclose(new, (old - old.mean(0)) / old.std(0, correction=0), atol=1e-4)


class Tangled(nn.Module):
    """Registered in another order than run, one layer used twice, a residual branch, dropout and a norm layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.twice = nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.first = nn.Linear(5, 8)
        self.seen = {}

    def forward(self, x):
        self.seen["first"] = a = self.first(x)
        x = torch.relu(self.norm(a))
        self.seen["twice"] = b = self.twice(x)
        x = x + self.drop(torch.tanh(b))
        x = x + self.twice(x)
        self.seen["head"] = self.head(x)
        return self.seen["head"]


def test_any_graph_in_execution_order_and_the_model_s_state_is_kept():
    torch.manual_seed(0)
    model, x = Tangled(), torch.randn(200, 5) * 4 + 1
    norm = copy.deepcopy(model.norm.state_dict())
    random = torch.get_rng_state()
    assert data_dependent_weight_norm_(model, x) is model
    assert torch.equal(random, torch.get_rng_state())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(norm[k], v) for k, v in model.norm.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()(x)
    for y in model.seen.values():
        assert_standard(y)


def test_attention_s_output_projection_and_nothing_of_its_packed_weight():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(16, 6, 8)
    packed = attention.in_proj_weight.detach().clone()
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model.self_attn = attention
    data_dependent_weight_norm_(model, x)
    assert torch.equal(attention.in_proj_weight, packed)
    assert not parametrize.is_parametrized(attention, "in_proj_weight")
    model.eval()
    assert_standard(attention(x, x, x)[0])


def test_gpt2_s_conv1d_has_its_outputs_last():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    layer, x = pytorch_utils.Conv1D(6, 4), torch.randn(50, 4)
    data_dependent_weight_norm_(layer, x)
    assert length(layer).shape == (6,)
    assert_standard(layer(x))


def test_without_a_bias_the_variance_is_one_and_the_mean_stays_nonzero():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3)), torch.randn(50, 4) + 5
    data_dependent_weight_norm_(net, x)
    assert torch.allclose(net[0](x).var(0, correction=0), torch.ones(6), atol=1e-4)
    assert net[0](x).mean(0).abs().min() > 0.01
    assert_standard(net(x), atol=1e-4)


def test_a_layer_already_held_is_set_as_it_stands():
    torch.manual_seed(0)
    plain, x = nn.Linear(5, 6), torch.randn(40, 5)
    held = weight_norm(copy.deepcopy(plain))
    with torch.no_grad():
        held.parametrizations.weight.original0.mul_(3.0)
    for layer in (plain, held):
        data_dependent_weight_norm_(layer, x)
    assert len(held.parametrizations.weight) == 1
    assert torch.allclose(length(held), length(plain), rtol=1e-4)


def test_frozen_layers_stay_frozen_and_half_precision_stays_half():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).bfloat16(), torch.randn(64, 5).bfloat16()
    net[0].requires_grad_(False)
    data_dependent_weight_norm_(net, x)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in net[0].parameters())
    assert all(p.requires_grad for p in net[2].parameters())
    assert_standard(net(x).float(), atol=0.05)


def test_keyword_and_positional_batches_are_the_same():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x, shift):
            return self.layer(x + shift)

    torch.manual_seed(0)
    a, x, shift = Two(), torch.randn(20, 3), torch.randn(20, 3)
    b = copy.deepcopy(a)
    data_dependent_weight_norm_(a, (x, shift))
    data_dependent_weight_norm_(b, {"shift": shift, "x": x})
    assert torch.equal(a(x, shift), b(x, shift))


# -- refusals leave the model as it was -------------------------------------------------------------------------------


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


def dead():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        net[1].weight[0] = 0
    return net


def mlp():
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


torch.manual_seed(0)
X = torch.randn(10, 3)
REFUSED = {
    "equal inputs": (mlp, X[:1].expand(10, 3), "3 of its 3 features are constant over the 10 values of this batch"),
    "one example": (mlp, X[:1], "constant over the 1 values"),
    "dead feature": (dead, X, "the layer of 1.weight: 1 of its 2 features"),
    "empty": (mlp, X[:0], "a batch with numbers in it"),
    "no tensors": (mlp, (), "an empty tuple"),
    "not a tensor": (mlp, [1.0], "got float"),
    "nan": (mlp, torch.full((4, 3), torch.nan), "got 12 NaN of 12"),
    "infinite": (mlp, torch.full((4, 3), torch.inf), "NaN or infinite numbers in the output of the layer of 0.weight"),
    "misfit": (mlp, torch.randn(4, 7), "could not run the model on its batch"),
    "unreached": (Skips, X, "never calls the layer"),
    "shared": (tied, X, "shared by 0.weight and 1.weight"),
    "held otherwise": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), X, "parametrized by _SpectralNorm"),
    "held along another axis": (lambda: weight_norm(nn.Linear(3, 3), dim=1), X, "weight_norm with dim=0"),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), X, "another hook computes it"),
    "grouped transposed": (lambda: nn.ConvTranspose1d(2, 4, 2, groups=2), X, "transposed convolution with 2 groups"),
    "nothing owned": (lambda: nn.LayerNorm(3), X, "found no weight it owns in LayerNorm"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), X, "meta device"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("which", REFUSED)
def test_refused_in_one_sentence_and_the_model_is_as_it_was(which):
    build, batch, words = REFUSED[which]
    model = build()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(BadInput, match=words) as caught:
        data_dependent_weight_norm_(model, batch)
    assert "\n" not in str(caught.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    if which != "meta":
        assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(m.training for m in model.modules())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


def test_a_tensor_is_no_model():
    with pytest.raises(BadInput, match=r"needs an nn\.Module to run the batch through, got Tensor"):
        data_dependent_weight_norm_(torch.eye(3), X)


# -- torch's parametrization, to which the method resolves ------------------------------------------------------------


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(5, 7), lambda: nn.Conv2d(3, 4, 3), lambda: nn.ConvTranspose1d(3, 4, 2)]
)
def test_torch_s_weight_norm_registers_and_removes_without_changing_the_weight(build):
    torch.manual_seed(0)
    layer = build()
    plain = layer.weight.detach().clone()
    weight_norm(layer)
    assert torch.allclose(layer.weight, plain, rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2.5)
    held = layer.weight.detach().clone()
    assert torch.allclose(held, 2.5 * plain, rtol=1e-6)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, held)
    assert isinstance(layer.weight, nn.Parameter)


def test_torch_s_weight_norm_keeps_the_gradient_of_v_at_right_angles_to_w():
    # eq. 4: the gradient of v is projected away from w, so v only grows; by hand for w = (3, 4), dL/dw = (1, 0):
    # g / |v| (I - w w' / |w|^2) (1, 0) = (1 - 9/25, -12/25) and dL/dg = (1, 0).(3, 4) / 5
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    weight_norm(layer)
    layer.weight[0, 0].backward()
    held = layer.parametrizations.weight
    assert held.original1.grad.flatten().tolist() == pytest.approx([0.64, -0.48], abs=1e-6)
    assert held.original0.grad.item() == pytest.approx(0.6, abs=1e-6)


def test_the_started_model_saves_loads_and_bakes():
    torch.manual_seed(0)
    net, x = mlp(), torch.randn(30, 3)
    data_dependent_weight_norm_(net, x)
    twin = mlp()
    for one in list(owned(twin)):
        weight_norm(one.module)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))
    held = net(x)
    for i in (0, 2):
        parametrize.remove_parametrizations(net[i], "weight")
    assert torch.equal(net(x), held)

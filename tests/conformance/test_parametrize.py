"""The battery every parametrization passes, by discovery."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pondera.parametrize
from pondera.errors import BadInput

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2),
}
INPUTS = {"linear": (3, 5), "conv": (3, 4, 6, 6), "transposed": (3, 4, 6, 6)}


ARGUMENTS = {}  # name: what a parametrization must be told
CHANGES = {
    "Bitwise",
    "Conditioned",
    "SignedSupermask",
}  # those that do not hold every weight: registering moves a weight to one they do hold


def holds_a_weight(name):
    """A class with both ways of torch.nn.utils.parametrize, or a function that puts one on a layer."""
    method = getattr(pondera.parametrize, name)
    if isinstance(method, type):
        return issubclass(method, nn.Module) and hasattr(method, "right_inverse")
    parameters = list(inspect.signature(method).parameters)
    return parameters[0] == "module" and "batch" not in parameters


HOLDERS = sorted(n for n in pondera.parametrize.__all__ if holds_a_weight(n))


def hold(name, layer):
    method = getattr(pondera.parametrize, name)
    if isinstance(method, type):
        parametrize.register_parametrization(layer, "weight", method(**ARGUMENTS.get(name, {})))
    else:
        method(layer, **ARGUMENTS.get(name, {}))
    return layer


def test_there_are_parametrizations():
    assert HOLDERS


@pytest.mark.parametrize("name", sorted(pondera.parametrize.__all__))
def test_docstring(name):
    method = getattr(pondera.parametrize, name)
    if not method.__module__.startswith("pondera"):
        return  # torch's own
    doc = inspect.getdoc(method)
    for part in ("Args:", "Raises:", "Paper:", ">>>"):
        assert part in doc, f"{name} documents no {part}"


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("name", HOLDERS)
def test_registering_and_removing_leave_the_function(name, which):
    torch.manual_seed(0)
    layer, x = LAYERS[which](), torch.randn(INPUTS[which])
    plain = layer(x)
    hold(name, layer)
    assert parametrize.is_parametrized(layer, "weight")
    assert name in CHANGES or torch.allclose(layer(x), plain, atol=1e-6)
    held = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    assert torch.equal(layer.weight, held)
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("name", HOLDERS)
def test_assigning_reaches_the_weight(name):
    torch.manual_seed(0)
    layer = hold(name, nn.Linear(5, 7))
    new = torch.randn(7, 5)
    layer.weight = new
    if name in CHANGES:  # the nearest it holds: what is assigned and read is then kept
        new = layer.weight.detach().clone()
        layer.weight = new
    assert torch.allclose(layer.weight, new, atol=1e-6)


@pytest.mark.parametrize("name", HOLDERS)
def test_state_dict_deepcopy_and_training(name):
    torch.manual_seed(0)
    layer, x = hold(name, nn.Linear(5, 7)), torch.randn(3, 5)
    twin = hold(name, nn.Linear(5, 7))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    copied = copy.deepcopy(layer)
    sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    sgd.step()
    assert torch.equal(copied(x), twin(x))
    assert not torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("name", HOLDERS)
def test_bfloat16(name):
    layer = hold(name, nn.Linear(5, 7).bfloat16())
    assert layer(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16


OURS = [n for n in HOLDERS if isinstance(getattr(pondera.parametrize, n), type)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OURS)
def test_the_weight_keeps_its_type_and_has_gradients(name, dtype):
    torch.manual_seed(0)
    layer = hold(name, nn.Conv2d(3, 4, 3).to(dtype))
    assert layer.weight.dtype == dtype
    layer.weight.square().sum().backward()
    trained = [p for p in layer.parametrizations.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("name", OURS)
def test_a_weight_with_nan_is_refused_and_left(name):
    layer = nn.Linear(5, 7)
    with torch.no_grad():
        layer.weight[2, 3] = torch.nan
    before = layer.weight.detach().clone()
    with pytest.raises(BadInput, match=r"NaN"):
        hold(name, layer)
    assert not parametrize.is_parametrized(layer)
    assert torch.equal(layer.weight.isnan(), before.isnan())


@pytest.mark.parametrize("name", OURS)
def test_a_whole_model_saves_and_loads_into_a_fresh_one(name, tmp_path):
    def build(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        return nn.Sequential(hold(name, net[0]), net[1], net[2], hold(name, net[3]))

    net, twin, x = build(0), build(1), torch.randn(2, 2, 6, 6)
    assert not torch.equal(net(x), twin(x))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    twin.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(net(x), twin(x))

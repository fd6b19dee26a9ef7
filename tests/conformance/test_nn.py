"""The battery every layer passes, by discovery; a layer's line in `LAYERS` says how to make it and what it takes."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import pondera.nn
from pondera.errors import BadInput
from pondera.nn import equivariance_error

LAYERS = {"Maxout": (lambda **kw: pondera.nn.Maxout(6, 4, 3, **kw), lambda: torch.randn(5, 6))}
NO_HALF = set()  # need float32 at least, and refuse less in words
KEEPS = set()  # keep their own precision under autocast, for they would be wrong in half
KINKED = set()  # gradcheck would step over a kink: tested with the layer


@dataclass
class Keeps:
    """A group that a layer is equivariant to, its actions on inputs and outputs, and an action it is not equivariant to."""

    group: Any
    before: Any = 1
    after: Any = 1
    wrong: Any = None  # in the place of `after`
    build: Any = None  # where the line in LAYERS is not what is to be asked
    x: Any = None


EQUIVARIANT: dict[str, list[Keeps]] = {}

EVERY = sorted(n for n in pondera.nn.__all__ if inspect.isclass(getattr(pondera.nn, n)))


def make(name, **kw):
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    return build(**kw), inputs()


def test_every_layer_has_its_line():
    assert set(EVERY) == set(LAYERS)
    assert set(EVERY) >= NO_HALF | KEEPS | KINKED | set(EQUIVARIANT)


@pytest.mark.parametrize("name", [n for n in pondera.nn.__all__ if callable(getattr(pondera.nn, n))])
def test_docstring(name):
    doc = inspect.getdoc(getattr(pondera.nn, name))
    for part in ("Args:", "Raises:", "Paper:", ">>>") if name in EVERY else (">>>",):
        assert part in doc, f"{name} documents no {part}"


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_and_deepcopy_give_the_same_layer(name):
    layer, x = make(name)
    other = LAYERS[name][0]()
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), layer.parameters()))
    assert repr(layer).startswith(name)


@pytest.mark.parametrize("name", EVERY)
def test_in_a_sequence(name):
    layer, x = make(name)
    assert torch.equal(nn.Sequential(nn.Identity(), layer)(x), layer(x))
    assert layer(x).grad_fn is not None or not list(layer.parameters())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_leading_dimensions(name, dtype):
    if dtype == torch.bfloat16 and name in NO_HALF:
        with pytest.raises(BadInput, match="float32"):
            layer, x = make(name, dtype=dtype)
            layer(x.to(dtype))
        return
    layer, x = make(name, dtype=dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    deeper = layer(x.to(dtype).unsqueeze(0))  # may be another matrix product: a few last places of the largest
    assert torch.allclose(deeper, out.unsqueeze(0), rtol=0, atol=4 * torch.finfo(dtype).eps * out.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch(name):
    layer, x = make(name)
    out = layer(x[:0]) if x.ndim > 1 else layer(x)
    assert out.shape[1:] == layer(x).shape[1:]


@pytest.mark.parametrize("name", EVERY)
def test_autocast(name):
    layer, x = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == (torch.float32 if name in KEEPS else torch.bfloat16)
    assert torch.allclose(out.float(), layer(x), atol=0.1 * max(1.0, layer(x).abs().max().item()))


@pytest.mark.parametrize("name", EVERY)
def test_gradients(name):
    layer, x = make(name, dtype=torch.float64)
    if name not in KINKED:
        assert torch.autograd.gradcheck(layer, x.double().requires_grad_())
    layer(x.double()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_compile(name):
    layer, x = make(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6 * max(1.0, layer(x).abs().max().item()))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_export(name):
    layer, x = make(name)
    exported = torch.export.export(layer, (x,)).module()
    assert torch.allclose(exported(x), layer(x), atol=1e-6 * max(1.0, layer(x).abs().max().item()))


@pytest.mark.parametrize("name", EVERY)
def test_meta_device(name):
    layer, _ = make(name, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert isinstance(layer, nn.Module)


@pytest.mark.parametrize(("name", "keeps"), [(n, k) for n, every in EQUIVARIANT.items() for k in every])
def test_equivariance(name, keeps):
    torch.manual_seed(0)
    layer = (keeps.build or LAYERS[name][0])(dtype=torch.float64)
    x = (keeps.x or LAYERS[name][1])().double()
    assert layer(x).abs().max() > 1e-3
    assert equivariance_error(layer, x, keeps.group, keeps.before, keeps.after) < 1e-10
    if keeps.wrong is not None:
        assert equivariance_error(layer, x, keeps.group, keeps.before, keeps.wrong) > 1e-3

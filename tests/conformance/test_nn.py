"""The battery every layer passes, by discovery; a layer's line in `LAYERS` says how to make it and what it takes."""

import copy
import inspect

import pytest
import torch
from torch import nn

import pondera.nn

LAYERS = {"Maxout": (lambda **kw: pondera.nn.Maxout(6, 4, 3, **kw), lambda: torch.randn(5, 6))}
EVERY = sorted(n for n in pondera.nn.__all__ if inspect.isclass(getattr(pondera.nn, n)))


def make(name, **kw):
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    return build(**kw), inputs()


def test_every_layer_has_its_line():
    assert set(EVERY) == set(LAYERS)


@pytest.mark.parametrize("name", EVERY)
def test_docstring(name):
    doc = inspect.getdoc(getattr(pondera.nn, name))
    for part in ("Args:", "Raises:", "Paper:", ">>>"):
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_leading_dimensions(name, dtype):
    layer, x = make(name, dtype=dtype)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    deeper = layer(x.to(dtype).view(1, *x.shape))  # may be another matrix product: a few last places of the largest
    assert torch.allclose(deeper, out.unsqueeze(0), rtol=0, atol=4 * torch.finfo(dtype).eps * out.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_autocast(name):
    layer, x = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.float(), layer(x), atol=0.1)


@pytest.mark.parametrize("name", EVERY)
def test_gradients(name):
    layer, x = make(name, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, x.double().requires_grad_())
    layer(x.double()).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_compile(name):
    layer, x = make(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_meta_device(name):
    layer, _ = make(name, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    assert isinstance(layer, nn.Module)

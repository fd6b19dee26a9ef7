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
from pondera.nn.gaunt import harmonics


def semi_structured(**kw):
    deep = nn.Sequential(nn.Linear(6, 5, **kw), nn.Tanh(), nn.Linear(5, 2, **kw))
    return pondera.nn.SemiStructured(nn.Linear(6, 2, **kw), deep)


def on_blades(g, x):
    return x @ pondera.nn.outermorphism(g).mT


def on_harmonics(degree):
    def act(g, x):
        points = torch.randn(4 * (degree + 1) ** 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        Y, turned = harmonics(degree, points), harmonics(degree, points @ g.T)
        return x @ torch.linalg.lstsq(Y, turned).solution

    return act


def if2net(**kw):
    layer, (x, y) = pondera.nn.IF2Net(6, 3, 20, **kw), (torch.randn(8, 6), torch.arange(8) % 3)
    return layer if layer.weight.is_meta else layer.fit_task(x.to(layer.weight), y)


def t1(**kw):
    """Its last map starts at zero, where nothing could be seen."""
    net = pondera.nn.T1(2, 3, modes=(4, 3), size=(7, 6), width=5, layers=2, head=8, **kw)
    nn.init.normal_(net.last.weight)
    return net


LAYERS = {
    "BrauerLinear": (lambda **kw: pondera.nn.BrauerLinear("SO(3)", 2, 3, 3, 2, **kw), lambda: torch.randn(5, 3, 3, 3)),
    "Btt": (lambda **kw: pondera.nn.Btt(12, 20, rank=2, normalize=True, **kw), lambda: torch.randn(5, 12)),
    "FourierActivation": (lambda **kw: pondera.nn.FourierActivation(4, **kw), lambda: torch.randn(5, 6)),
    "GauntTensorProduct": (lambda **kw: pondera.nn.GauntTensorProduct(3, 2, 2, **kw), lambda: torch.randn(5, 3, 9)),
    "GeometricProduct": (lambda **kw: pondera.nn.GeometricProduct((3, 1), 3, **kw), lambda: torch.randn(5, 3, 16)),
    "GhostBatchNorm1d": (
        lambda **kw: pondera.nn.GhostBatchNorm1d(3, ghost_size=4, **kw),
        lambda: torch.randn(10, 3, 5),
    ),
    "GhostBatchNorm2d": (
        lambda **kw: pondera.nn.GhostBatchNorm2d(3, ghost_size=4, **kw),
        lambda: torch.randn(10, 3, 2, 4),
    ),
    "GroupKAN": (lambda **kw: pondera.nn.GroupKAN(6, 4, groups=3, **kw), lambda: torch.randn(5, 6)),
    "GroupRational": (lambda **kw: pondera.nn.GroupRational(groups=3, start="gelu", **kw), lambda: torch.randn(5, 6)),
    "HermiteActivation": (lambda **kw: pondera.nn.HermiteActivation(4, **kw), lambda: torch.randn(5, 6)),
    "HippoProphecy": (lambda **kw: pondera.nn.HippoProphecy(3, 8, **kw), lambda: torch.randn(3, 30, 2)),
    "IF2Net": (lambda **kw: if2net(**kw), lambda: torch.randn(5, 6)),
    "KAN": (lambda **kw: pondera.nn.KAN([3, 4, 2], **kw), lambda: torch.rand(5, 3) * 2 - 1),
    "KANLinear": (lambda **kw: pondera.nn.KANLinear(6, 4, bias=True, **kw), lambda: torch.rand(5, 6) * 2 - 1),
    "KATBlock": (lambda **kw: pondera.nn.KATBlock(8, 2, groups=2, **kw), lambda: torch.randn(3, 5, 8)),
    "Kronecker": (lambda **kw: pondera.nn.Kronecker(12, 20, **kw), lambda: torch.randn(5, 12)),
    "Maxout": (lambda **kw: pondera.nn.Maxout(6, 4, 3, **kw), lambda: torch.randn(5, 6)),
    "Monarch": (lambda **kw: pondera.nn.Monarch(12, 20, **kw), lambda: torch.randn(5, 12)),
    "MultivectorLinear": (
        lambda **kw: pondera.nn.MultivectorLinear((2, 0, 1), 3, 2, bias=True, **kw),
        lambda: torch.randn(5, 3, 8),
    ),
    "MultivectorNorm": (lambda **kw: pondera.nn.MultivectorNorm((3,), 3, **kw), lambda: torch.randn(5, 3, 8)),
    "NAU": (lambda **kw: pondera.nn.NAU(6, 4, **kw), lambda: torch.randn(5, 6)),
    "NMU": (lambda **kw: pondera.nn.NMU(6, 4, **kw), lambda: torch.randn(5, 6)),
    "PermutationLinear": (
        lambda **kw: pondera.nn.PermutationLinear(4, 2, 2, 3, 2, **kw),
        lambda: torch.randn(5, 3, 4, 4),
    ),
    "S4D": (lambda **kw: pondera.nn.S4D(4, 6, **kw), lambda: torch.randn(3, 7, 4)),
    "SemiStructured": (lambda **kw: semi_structured(**kw), lambda: torch.randn(5, 6)),
    "T1": (t1, lambda: torch.randn(3, 2, 7, 6)),
    "T1Layer": (lambda **kw: pondera.nn.T1Layer(5, (4, 3), 42, **kw), lambda: torch.randn(3, 5, 4, 3)),
    "TT": (lambda **kw: pondera.nn.TT(12, 20, rank=2, n_cores=2, **kw), lambda: torch.randn(5, 12)),
    "TropicalActivation": (lambda **kw: pondera.nn.TropicalActivation(4, **kw), lambda: torch.randn(5, 6)),
}
NO_HALF = {"HippoProphecy", "T1", "T1Layer"}  # need float32 at least, and refuse less in words
# keep their own precision under autocast, for they would be wrong in half
KEEPS = {
    "FourierActivation",
    "GauntTensorProduct",
    "GeometricProduct",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GroupRational",
    "HermiteActivation",
    "HippoProphecy",
    "KATBlock",
    "MultivectorNorm",
    "NMU",
    "T1",
    "T1Layer",
    "TropicalActivation",
}
OVER_BATCHES = {"GhostBatchNorm1d", "GhostBatchNorm2d"}  # take statistics of the first dimension: one, and not empty


@dataclass
class Keeps:
    """A group that a layer is equivariant to, its actions on inputs and outputs, and an action it is not equivariant to."""

    group: Any
    before: Any = 1
    after: Any = 1
    wrong: Any = None  # in the place of `after`
    build: Any = None  # where the line in LAYERS is not what is to be asked
    x: Any = None


def biased(layer):
    """With a bias that is not zero, as it may be after training."""
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def brauer(group, k, l):
    return {
        "build": lambda **kw: biased(pondera.nn.BrauerLinear(group, k, l, 3, 2, **kw)),
        "x": lambda: torch.randn(5, 3, *[int(group[-2])] * k),
    }


EQUIVARIANT: dict[str, list[Keeps]] = {
    "BrauerLinear": [
        Keeps("SO(3)", 2, 3, wrong=2, **brauer("SO(3)", 2, 3)),
        Keeps("O(3)", 2, 2, wrong=0, **brauer("O(3)", 2, 2)),
        Keeps("O(2)", 4, 2, wrong=0, **brauer("O(2)", 4, 2)),
        Keeps("Sp(4)", 2, 2, wrong=0, **brauer("Sp(4)", 2, 2)),
        Keeps("Sp(2)", 1, 3, wrong=2, **brauer("Sp(2)", 1, 3)),
    ],
    "GauntTensorProduct": [
        Keeps("O(3)", on_harmonics(2), on_harmonics(4), wrong=0),
        Keeps(
            "O(3)",
            on_harmonics(5),
            on_harmonics(3),
            wrong=0,
            build=lambda **kw: pondera.nn.GauntTensorProduct(3, 5, 5, 3, **kw),
            x=lambda: torch.randn(5, 3, 36),
        ),
        Keeps(
            "O(3)",
            on_harmonics(2),
            on_harmonics(4),
            wrong=0,
            build=lambda **kw: pondera.nn.GauntTensorProduct(3, 2, 2, method="fourier", **kw),
        ),
    ],
    "GeometricProduct": [
        Keeps("O(3,1)", on_blades, on_blades, wrong=0),
        Keeps(
            "O(2,1,1)",
            on_blades,
            on_blades,
            wrong=0,
            build=lambda **kw: pondera.nn.GeometricProduct((2, 1, 1), 3, per="grade", first_order=True, **kw),
        ),
    ],
    "MultivectorLinear": [Keeps("O(2,0,1)", on_blades, on_blades, wrong=0)],
    "MultivectorNorm": [Keeps("O(3)", on_blades, on_blades, wrong=0)],
    "PermutationLinear": [
        Keeps("S(4)", 2, 2, wrong=1, build=lambda **kw: biased(pondera.nn.PermutationLinear(4, 2, 2, 3, 2, **kw))),
        Keeps(
            "S(3)",
            1,
            2,
            wrong=1,
            build=lambda **kw: biased(pondera.nn.PermutationLinear(3, 1, 2, 3, 2, basis="orbit", **kw)),
            x=lambda: torch.randn(5, 3, 3),
        ),
    ],
}

EVERY = sorted(n for n in pondera.nn.__all__ if inspect.isclass(getattr(pondera.nn, n)))


def make(name, **kw):
    build, inputs = LAYERS[name]
    torch.manual_seed(0)
    return build(**kw), inputs()


def test_every_layer_has_its_line():
    assert set(EVERY) == set(LAYERS)
    assert set(EVERY) >= NO_HALF | KEEPS | OVER_BATCHES | set(EQUIVARIANT)


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
    if name in OVER_BATCHES:
        with pytest.raises(BadInput, match="dimensions"):
            layer(x.to(dtype)[None])
        return
    deeper = layer(x.to(dtype).unsqueeze(0))  # may be another matrix product: a few last places of the largest
    assert torch.allclose(deeper, out.unsqueeze(0), rtol=0, atol=4 * torch.finfo(dtype).eps * out.abs().max().item())


@pytest.mark.parametrize("name", EVERY)
def test_an_empty_batch(name):
    layer, x = make(name)
    if name in OVER_BATCHES:
        with pytest.raises(BadInput, match="two values"):
            layer(x[:0])
        return
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

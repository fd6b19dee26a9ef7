import copy
import zlib
from itertools import permutations, product
from math import prod

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.weightspace import (
    PermutationSpec,
    UniversalFunctional,
    UniversalInvariant,
    UniversalNet,
    apply_permutation,
    equivariance_error,
    stack_states,
    trace_permutations,
)
from pondera.weightspace.neural_functionals import bell

F64 = torch.float64
MLP = (
    PermutationSpec(
        {"w0": ("a", None), "b0": ("a",), "w1": ("b", "a"), "b1": ("b",), "w2": (None, "b"), "b2": (None,)}
    ),
    {"w0": (3, 2), "b0": (3,), "w1": (3, 3), "b1": (3,), "w2": (2, 3), "b2": (2,)},
)
RNN = (
    PermutationSpec({"ih": ("h", None), "hh": ("h", "h"), "b": ("h",), "out": (None, "h")}),
    {"ih": (3, 2), "hh": (3, 3), "b": (3,), "out": (2, 3)},
)
TWO = (RNN[0], {"ih": (2, 2), "hh": (2, 2), "b": (2,), "out": (2, 2)})  # fewer units than slots
RESIDUAL = (
    PermutationSpec({"in": ("r", None), "scale": ("r",), "up": ("h", "r"), "down": ("r", "h"), "out": ("r",)}),
    {"in": (3, 1), "scale": (3,), "up": (2, 3), "down": (3, 2), "out": (3,)},
)
HEADS = (
    PermutationSpec(
        {"qkv": ((((None, 2), ("heads", 2), ("inner", 2)),), "r"), "out": ("r", ((("heads", 2), (None, 1)),))}
    ),
    {"qkv": (8, 2), "out": (2, 2)},
)
JOINED = (PermutationSpec({"w": (((("a", 2),), (("b", 3),), ((None, 1),)), "a")}), {"w": (6, 2)})
CASES = {"mlp": MLP, "rnn": RNN, "two": TWO, "residual": RESIDUAL, "heads": HEADS, "joined": JOINED}


def like(shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def unit_states(shapes):
    """Every unit vector of weight space, as a batch of states."""
    total = sum(prod(s) for s in shapes.values())
    parts = torch.eye(total, dtype=F64).split([prod(s) for s in shapes.values()], 1)
    return {name: x.reshape(-1, *shape) for (name, shape), x in zip(shapes.items(), parts, strict=True)}


def dimensions(spec, shapes):
    """Of the equivariant linear maps, and of the invariant vectors: means over the group of (fixed entries)^2 and of them."""
    numbered, at = {}, 0
    for name, shape in shapes.items():
        numbered[name] = torch.arange(at, at + prod(shape)).view(shape)
        at += prod(shape)
    sizes = spec.sizes(numbered)
    fixed = []
    for orders in product(*(permutations(range(n)) for n in sizes.values())):
        moved = apply_permutation(spec, {p: torch.tensor(o) for p, o in zip(sizes, orders, strict=True)}, numbered)
        fixed.append(sum(int((moved[n] == numbered[n]).sum()) for n in numbered))
    return sum(f * f for f in fixed) / len(fixed), sum(fixed) / len(fixed)


def family(layer, shapes):
    """All maps of a layer without constants: (weights, entries of the matrix)."""
    basis = {name: x.unsqueeze(-1) for name, x in unit_states(shapes).items()}
    params = dict(layer.named_parameters())
    rows = []
    for p in params.values():
        for k in range(p.numel()):
            with torch.no_grad():
                for q in params.values():
                    q.zero_()
                p.view(-1)[k] = 1
                out = layer(basis)
            out = out if isinstance(out, dict) else {"": out}
            rows.append(torch.cat([x.flatten(1) for x in out.values()], 1).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_the_terms_are_a_basis_of_all_equivariant_maps(case):
    spec, shapes = CASES[case]
    pairs, fixed = dimensions(spec, shapes)
    rows = family(UniversalFunctional(spec, like(shapes), 1, 1, bias=False, dtype=F64), shapes)
    assert len(rows) == pairs == torch.linalg.matrix_rank(rows)
    assert torch.linalg.matrix_rank(rows[1:]) == pairs - 1  # and none can be left out
    head = family(UniversalInvariant(spec, like(shapes), 1, 1, bias=False, dtype=F64), shapes)
    assert len(head) == fixed == torch.linalg.matrix_rank(head)
    full = UniversalFunctional(spec, like(shapes), 1, 1, dtype=F64)
    assert sum(b.numel() for b in full.maps.bias) == fixed


def test_known_dimensions():
    """(0,1)->(0,1): 4; (0,0)->(0,0): 15, at 3 units 14, at 2 units 8; (0,)->(0,0): 5; (0,1)->(1,2): 2; 2-3-3-2: 114 and 9."""
    assert [bell(m) for m in range(6)] == [1, 1, 2, 5, 15, 52]

    def terms(x, y, n=5):
        spec = PermutationSpec({"x": x, "y": y})
        layer = UniversalFunctional(spec, {"x": torch.zeros(*[n] * len(x)), "y": torch.zeros(*[n] * len(y))}, 1, 1)
        return sum(s.piece == 0 for sources in layer.maps.layout[1].values() for s, _ in sources)

    assert terms(("p", "q"), ("p", "q")) == 4
    assert [terms(("p", "p"), ("p", "p"), n) for n in (4, 3, 2, 1)] == [15, 14, 8, 1]
    assert terms(("p",), ("p", "p")) == 5
    assert terms(("p", "q"), ("q", "r")) == 2
    assert dimensions(*MLP) == (114, 9)


def wave(shape, k):
    return torch.sin(k + 1.7 * torch.arange(prod(shape), dtype=F64)).float().view(shape)


def signature(out, inn, target, source, k):
    blocks = [list(b) for b in target.blocks]
    free = set(range(len(source.blocks))) - set(source.kept)
    for a, b in zip(target.filled, source.kept, strict=True):
        blocks[a] += [k + s for s in source.blocks[b]]
    blocks += [[k + s for s in source.blocks[b]] for b in free]
    return repr((out, inn, sorted(tuple(b) for b in blocks)))


def test_agrees_with_the_authors_code():
    """AllanYangZhou/universal_neural_functional at 08f69dc (jax 0.10.2, flax 0.12.8): one UNFLayer on a recurrent cell, each
    theta a wave whose phase is told by its term; sums of |Y|, the first three entries, and a weighted sum."""
    axes = {"a_ih": (1, 0), "b_hh": (1, 1), "c_b": (1,), "d_out": (2, 1)}
    size = {0: 4, 1: 5, 2: 6}
    spec = PermutationSpec({n: tuple(map(str, s)) for n, s in axes.items()})
    shapes = {n: tuple(size[i] for i in s) for n, s in axes.items()}
    x = {n: wave((*shape, 2), j).unsqueeze(0) for j, (n, shape) in enumerate(shapes.items())}
    layer = UniversalFunctional(spec, like(shapes), 2, 3)
    with torch.no_grad():
        for o, layout in enumerate(layer.maps.layout):
            for target, sources in layout.items():
                for source, rows in sources:
                    out, inn = layer.pieces[o].name, layer.pieces[source.piece].name
                    name = signature(out, inn, target, source, len(axes[out]))
                    layer.maps.weight[o][rows] = wave((2, 3), zlib.crc32(name.encode()) % 1000)
            even = [all(len(b) == 1 for b in blocks) for blocks in layer.maps.constants[o]].index(True)
            layer.maps.bias[o][even] = wave((3,), 7 + o)
        y = layer(x)
    theirs = {
        "a_ih": (53.787125, [-1.208074, -0.443138, 1.322265], -3.615331),
        "b_hh": (89.460548, [-0.392481, -2.305665, 0.986626], 7.810232),
        "c_b": (12.400686, [-0.238254, 0.89527, 0.007553], 1.413878),
        "d_out": (115.960724, [-0.230002, -0.299692, 0.307229], 0.661982),
    }
    for name, (total, first, weighted) in theirs.items():
        assert y[name].abs().sum().item() == pytest.approx(total, rel=1e-5)
        assert y[name].flatten()[:3].tolist() == pytest.approx(first, abs=1e-5)
        assert (y[name][0] * wave(y[name].shape[1:], 3)).sum().item() == pytest.approx(weighted, abs=2e-5)


def test_by_hand():
    """(h,) -> (h, h) at 3 units: its five terms, alone."""
    spec = PermutationSpec({"b": ("h",), "w": ("h", "h")})
    layer = UniversalFunctional(spec, {"b": torch.zeros(3), "w": torch.zeros(3, 3)}, 1, 1, bias=False)
    b = torch.tensor([1.0, 2.0, 6.0])
    seen = {}
    for target, sources in layer.maps.layout[1].items():
        for source, rows in sources:
            if source.piece == 0:
                with torch.no_grad():
                    for p in layer.parameters():
                        p.zero_()
                    layer.maps.weight[1][rows] = 1
                out = layer({"b": b.view(1, 3, 1), "w": torch.zeros(1, 3, 3, 1)})["w"][0, ..., 0]
                seen[target.blocks, target.filled] = out
    apart, joined = ((0,), (1,)), ((0, 1),)
    assert torch.equal(seen[apart, ()], torch.full((3, 3), 3.0))
    assert torch.equal(seen[apart, (0,)], b[:, None].expand(3, 3))
    assert torch.equal(seen[apart, (1,)], b.expand(3, 3))
    assert torch.equal(seen[joined, ()], 3 * torch.eye(3))
    assert torch.equal(seen[joined, (0,)], b.diag())
    assert len(seen) == 5


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)
        self.att = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        x = self.inp(x)
        y = self.norm(x)
        return self.out(x + self.att(y, y, y, need_weights=False)[0])


def test_attention_from_the_trace():
    net = Attention()
    spec = trace_permutations(net, torch.randn(3, 5, 4), matchable=False)
    states = stack_states([Attention() for _ in range(3)])
    model = UniversalNet(spec, net, (4, 4), 2)
    g = torch.Generator().manual_seed(0)
    assert equivariance_error(model, states, spec, generator=g) < 1e-5
    assert equivariance_error(UniversalNet(spec, net, (4, 4)), states, spec, generator=g) < 1e-5
    assert spec.axes["att.in_proj_weight"][0] is not None


def test_compiles_vmaps_and_half_precision():
    spec, shapes = RNN
    layer = UniversalFunctional(spec, like(shapes), 2, 3)
    x = {n: torch.randn(4, *s, 2) for n, s in shapes.items()}
    out = layer(x)
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)(x)
    assert all(torch.allclose(out[n], compiled[n], atol=1e-6) for n in out)
    params = {n: torch.stack([p, 2 * p]) for n, p in layer.named_parameters()}
    two = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(params)
    assert all(torch.allclose(two[n][1], 2 * out[n], atol=1e-5) for n in out)
    half = layer.bfloat16()({n: v.bfloat16() for n, v in x.items()})
    assert all(half[n].dtype == torch.bfloat16 and torch.allclose(half[n].float(), out[n], atol=0.1) for n in out)


def test_refusals():
    spec, shapes = MLP
    with pytest.raises(BadInput, match=r"cannot be traced \(the spec says nothing about more"):
        UniversalFunctional(spec, {**like(shapes), "more": torch.zeros(2)}, 1, 1)
    with pytest.raises(BadInput, match=r"cannot be traced \(the state lacks w1"):
        UniversalFunctional(spec, {n: x for n, x in like(shapes).items() if n != "w1"}, 1, 1)
    four = PermutationSpec({"w": ("p",) * 4})
    with pytest.raises(BadInput, match="4,140 terms from w to w, above the 1,000"):
        UniversalFunctional(four, {"w": torch.zeros(2, 2, 2, 2)}, 1, 1)
    assert UniversalFunctional(four, {"w": torch.zeros(2, 2, 2, 2)}, 1, 1, most_terms=5000).maps.terms == 128
    with pytest.raises(BadInput, match="in_channels of at least 1"):
        UniversalFunctional(spec, like(shapes), 0, 1)
    with pytest.raises(BadInput, match="a PermutationSpec and a network"):
        UniversalFunctional("spec", like(shapes), 1, 1)
    layer = UniversalFunctional(spec, like(shapes), 1, 1)
    with pytest.raises(BadInput, match=r"w0 as \(networks, 3, 2, 1\)"):
        layer({n: torch.zeros(2, *s) for n, s in shapes.items()})
    with pytest.raises(BadInput, match="at least one layer"):
        UniversalNet(spec, like(shapes), ())

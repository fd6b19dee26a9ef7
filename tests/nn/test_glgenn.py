from itertools import product
from math import comb

import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import (
    GeometricProduct,
    MultivectorLinear,
    MultivectorNorm,
    equivariance_error,
    geometric_product,
    group_element,
    multivector,
    outermorphism,
)

F64 = torch.float64
SIGNATURES = [(1,), (2,), (3,), (0, 2), (1, 3), (2, 0, 1), (1, 1, 2), (5,), (4, 1)]


def size(layer):
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("signature", SIGNATURES)
def test_generators_and_associativity(signature):
    p, q, r = (*signature, 0, 0)[:3]
    n = p + q + r
    e = multivector(torch.eye(n, dtype=F64), signature)
    one = multivector(torch.ones(1, dtype=F64), signature, 0)
    metric = [1] * p + [-1] * q + [0] * r
    for i, j in product(range(n), repeat=2):
        both = geometric_product(e[i], e[j], signature) + geometric_product(e[j], e[i], signature)
        assert torch.equal(both, 2 * metric[i] * (i == j) * one)
    a, b, c = torch.randn(3, 2**n, dtype=F64)
    left = geometric_product(geometric_product(a, b, signature), c, signature)
    assert torch.allclose(left, geometric_product(a, geometric_product(b, c, signature), signature))
    assert torch.allclose(geometric_product(one, a, signature), a)


def test_blades_in_order():
    """e1 e2 is the first bivector, e2 e3 the last, e1 e2 e3 the volume."""
    e = multivector(torch.eye(3), (3,))
    e12, e23 = geometric_product(e[0], e[1], (3,)), geometric_product(e[1], e[2], (3,))
    assert e12.tolist() == [0, 0, 0, 0, 1, 0, 0, 0] and e23.tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
    assert geometric_product(e12, e[2], (3,))[7] == 1
    assert torch.equal(
        multivector(torch.tensor([1.0, 2.0, 3.0]), (3,), 2), 1 * e12 + 3 * e23 + 2 * geometric_product(e[0], e[2], (3,))
    )


def test_outermorphism_is_the_algebra_s():
    g = group_element("O(2,1,1)", generator=torch.Generator().manual_seed(0), flip=True)
    M = outermorphism(g)
    a, b = torch.randn(2, 16, dtype=F64)
    ab = geometric_product(a, b, (2, 1, 1))
    assert torch.allclose(M @ ab, geometric_product(M @ a, M @ b, (2, 1, 1)))
    assert M[-1, -1].item() == pytest.approx(torch.linalg.det(g).item())


@pytest.mark.parametrize("signature", [(3,), (4,), (5,), (6,)])
def test_linear_multiplies_types(signature):
    n = signature[0]
    layer = MultivectorLinear(signature, 1, 1, dtype=F64)
    grades = [g for g in range(n + 1) for _ in range(comb(n, g))]
    x = torch.randn(1, 2**n, dtype=F64)
    assert torch.allclose(layer(x), x * layer.weight[0, 0, [g % 4 for g in grades]])


def test_sizes_against_the_authors():
    """Counted from their code and CGENN's: 8 channels, n = 3 to 7."""
    assert [len(GeometricProduct((n,), 1).triples) for n in (1, 2, 3, 4, 5, 6)] == [4, 10, 20, 29, 32, 32]
    assert [size(GeometricProduct((n,), 8)) for n in range(3, 8)] == [448, 520, 544, 544, 544]
    grade = [size(GeometricProduct((n,), 8, per="grade", first_order=True)) for n in range(3, 8)]
    assert grade == [712, 968, 1272, 1632, 2056]
    assert [size(MultivectorLinear((n,), 2, 8, per=per)) for n in (5, 7) for per in ("type", "grade")] == [
        64,
        96,
        64,
        128,
    ]


def test_all_weights_one_is_the_plain_product():
    layer = GeometricProduct((2, 1), 3, dtype=F64)
    layer.weight.data.fill_(1.0)
    x = torch.randn(4, 3, 8, dtype=F64)
    assert torch.allclose(layer(x), geometric_product(x, layer.norm(layer.right(x)), (2, 1)))


def test_product_by_types_one_by_one():
    torch.manual_seed(0)
    layer = GeometricProduct((4, 1), 2, dtype=F64)
    x = torch.randn(3, 2, 32, dtype=F64)
    right = layer.norm(layer.right(x))
    kind = torch.tensor([g % 4 for g in range(6) for _ in range(comb(5, g))])
    parts = lambda v, t: v * (kind == t)
    wanted = torch.zeros_like(x)
    for w, (i, j, k) in zip(layer.weight.T, layer.triples):
        wanted += w[:, None] * parts(geometric_product(parts(x, i), parts(right, k), (4, 1)), j)
    assert torch.allclose(layer(x), wanted)


def fixed(layer, count, rename):
    """Parameters sin(0.7 k), in the order of the authors' own."""
    named = dict(layer.named_parameters())
    with torch.no_grad():
        for name in rename:
            p = named[name]
            p.copy_((torch.arange(p.numel()).view_as(p) * 0.7).sin())
    assert len(named) == len(rename)
    return layer((torch.arange(2 * count).view(1, 2, count) * 1.3).cos())


@pytest.mark.parametrize(
    ("signature", "kw", "first", "last", "norm"),
    [
        (
            (4, 1),
            {},
            [0.901556, 0.0115907, -1.87103, -0.840481, 7.13092, 3.82306],
            [-1.921745, -2.564306, 1.939965],
            17.46134,
        ),
        (
            (2, 1, 1),
            {},
            [0.217517, 1.609960, 0.741162, 0.102001, -1.699100, 2.854980],
            [-1.312820, 2.442395, 3.442145],
            9.450901,
        ),
        (
            (3, 1),
            {"per": "grade", "first_order": True},
            [-0.0806129, 1.442258, 0.473774, -2.000211, -1.193665, 1.065301],
            [-0.631498, 0.497665, -2.305052],
            7.556740,
        ),
    ],
)
def test_against_the_authors_code(signature, kw, first, last, norm):
    """What katyafilimoshina/glgenn e7f4c2b, and DavidRuhe/clifford-group-equivariant-neural-networks 8482b06 for grades, give."""
    names = ["weight", "norm.a", "right.weight"] + ["left.weight", "left.bias"] * bool(kw)
    y = fixed(GeometricProduct(signature, 2, **kw), 1 << sum(signature), names)
    assert y[0, 0, :6].tolist() == pytest.approx(first, abs=2e-5)
    assert y[0, 1, -3:].tolist() == pytest.approx(last, abs=2e-5)
    assert y.norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("per", ["type", "grade"])
@pytest.mark.parametrize("signature", SIGNATURES)
def test_equivariance_in_every_signature(signature, per):
    torch.manual_seed(0)
    p, q, r = (*signature, 0, 0)[:3]
    layer = GeometricProduct(signature, 2, per=per, first_order=True, dtype=F64)
    torch.nn.init.normal_(layer.left.bias)
    act = lambda g, x: x @ outermorphism(g).mT
    assert equivariance_error(layer, torch.randn(2, 2, 1 << p + q + r, dtype=F64), f"O({p},{q},{r})", act, act) < 1e-11


def test_norm_by_hand():
    """(3, 4) has norm 5; divisor (1 + 5) / 2 at the start. Null vectors are multiplied by 2."""
    layer = MultivectorNorm((2,), 1, dtype=F64)
    assert layer(multivector(torch.tensor([[3.0, 4.0]], dtype=F64), (2,)))[0, 1:3].tolist() == pytest.approx(
        [1, 4 / 3], rel=1e-6
    )
    light = MultivectorNorm((1, 1), 1, dtype=F64)(multivector(torch.tensor([[1.0, 1.0]], dtype=F64), (1, 1)))
    assert light[0, 1:3].tolist() == pytest.approx([2, 2], rel=1e-3)


def test_on_a_meta_device_and_back():
    layer = GeometricProduct((3,), 2, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    twin = GeometricProduct((3,), 2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 2, 8)
    assert torch.equal(twin(x), layer(x))


def test_bad_input():
    for make, words in (
        (lambda: MultivectorLinear((2, 0, 0, 1), 1, 1), "needs a signature"),
        (lambda: MultivectorLinear((0,), 1, 1), "1 to 10 in sum"),
        (lambda: MultivectorLinear((11,), 1, 1), "1 to 10 in sum"),
        (lambda: MultivectorLinear(3, 1, 1), "got 3"),
        (lambda: MultivectorLinear((3,), 0, 1), "channels_in of at least 1"),
        (lambda: GeometricProduct((3,), 1.5), "channels of at least 1, a whole number, got 1.5"),
        (lambda: GeometricProduct((3,), 1, per="blade"), 'per "type" or per "grade", got \'blade\''),
        (lambda: GeometricProduct((3,), 2)(torch.zeros(2, 4)), r"shape \(\*, 2, 8\)"),
        (lambda: MultivectorLinear((3,), 2, 1)(torch.zeros(3, 8)), r"shape \(\*, 2, 8\)"),
        (lambda: multivector(torch.zeros(3), (2,)), r"shape \(\*, 2\)"),
        (lambda: multivector(torch.zeros(3), (3,), 4), "a grade of 0 to 3, got 4"),
        (lambda: geometric_product(torch.zeros(4), torch.zeros(8), (2,)), r"shape \(\*, 4\)"),
        (lambda: outermorphism(torch.zeros(2, 3)), "a square matrix"),
    ):
        with pytest.raises(BadInput, match=words):
            make()

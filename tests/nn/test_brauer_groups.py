import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import BrauerLinear, act_on, equivariance_error, equivariant_maps

F64 = torch.float64
EYE = torch.eye(3, dtype=F64)


def rank(maps):
    return int(torch.linalg.matrix_rank(maps.flatten(1), atol=1e-9)) if len(maps) else 0


def same_span(a, b):
    return rank(a) == rank(b) == rank(torch.cat([a.flatten(1), b.flatten(1)]))


def test_known_maps():
    assert torch.equal(equivariant_maps("O(3)", 1, 1), EYE[None])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    assert same_span(equivariant_maps("SO(2)", 1, 1), torch.stack([torch.eye(2, dtype=F64), turn]))
    assert torch.equal(equivariant_maps("O(3)", 2, 0)[0], EYE.view(1, 9))  # the trace
    assert torch.equal(equivariant_maps("O(3)", 0, 2)[0], EYE.view(9, 1))
    assert equivariant_maps("Sp(2)", 2, 0).tolist() == [[[0.0, 1.0, -1.0, 0.0]]]
    x = torch.randn(3, 3, dtype=F64)
    three = torch.stack([(M @ x.flatten()) for M in equivariant_maps("O(3)", 2, 2)])
    assert same_span(three, torch.stack([x, x.T, x.trace() * EYE]).flatten(1))


def test_vector_to_matrix_of_SO3_is_the_cross_product_matrix():
    layer = BrauerLinear("SO(3)", 1, 2, 1, 1, bias=False, dtype=F64)
    v, w = torch.randn(2, 3, dtype=F64).unbind()
    layer.weight.data.fill_(1.0)
    assert torch.allclose(layer(v[None])[0] @ w, torch.linalg.cross(w, v)) or torch.allclose(
        layer(v[None])[0] @ w, torch.linalg.cross(v, w)
    )


def test_determinant():
    layer = BrauerLinear("SO(3)", 3, 0, 1, 1, bias=False, dtype=F64)
    layer.weight.data.fill_(1.0)
    v = torch.randn(3, 3, dtype=F64)
    assert torch.allclose(layer(torch.einsum("i,j,k->ijk", *v)[None])[0], torch.linalg.det(v))


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ("O(1)", {2: (1, 1), 4: (3, 1), 6: (15, 1)}),
        ("O(2)", {2: (1, 1), 3: (0, 0), 4: (3, 3), 6: (15, 10)}),
        ("O(3)", {2: (1, 1), 4: (3, 3), 6: (15, 15)}),
        ("O(4)", {4: (3, 3), 6: (15, 15)}),
        ("SO(2)", {2: (2, 2), 4: (9, 6), 6: (60, 20)}),
        ("SO(3)", {2: (1, 1), 3: (1, 1), 4: (3, 3), 5: (10, 6), 6: (15, 15)}),
        ("SO(4)", {4: (4, 4)}),
        ("Sp(2)", {2: (1, 1), 4: (3, 2), 6: (15, 5)}),
        ("Sp(4)", {4: (3, 3), 6: (15, 14)}),
    ],
)
def test_number_of_diagrams_and_dimensions(group, wanted):
    """(m - 1)!! matchings, C(m, n) (m - n - 1)!! with free legs; dimensions from tables of invariants.

    At n = 3 e3nn 0.6.0's ReducedTensorProducts finds as many, and they span the same: of 1o 1, 3, 15 for m = 2, 4, 6,
    of 1e 1 and 6 for m = 3, 5.
    """
    for m, (diagrams, dimension) in wanted.items():
        every, kept = (equivariant_maps(group, m // 2, m - m // 2, spanning_set=s) for s in (True, False))
        assert (len(every), rank(every)) == (diagrams, dimension)
        assert len(kept) == rank(kept) == dimension


@pytest.mark.parametrize("spanning_set", [False, True])
@pytest.mark.parametrize(
    ("group", "k", "l"),
    [("O(2)", 3, 3), ("O(3)", 1, 3), ("O(4)", 2, 2), ("SO(2)", 3, 1), ("SO(3)", 2, 3), ("SO(4)", 2, 2), ("SO(3)", 0, 3)]
    + [("SO(3)", 4, 1), ("Sp(2)", 3, 1), ("Sp(4)", 2, 4), ("Sp(4)", 4, 0), ("Sp(2)", 1, 1)],
)
def test_equals_the_dense_product_and_keeps_its_group(group, k, l, spanning_set):
    torch.manual_seed(0)
    layer = BrauerLinear(group, k, l, 2, 3, spanning_set=spanning_set, bias=False, dtype=F64)
    n = layer.n
    x = torch.randn(4, 2, *[n] * k, dtype=F64)
    W = layer.dense_weight().reshape(3 * n**l, 2 * n**k)
    assert torch.allclose(layer(x).flatten(1), x.flatten(1) @ W.T, atol=1e-12)
    assert equivariance_error(layer, x, group, k, l) < 1e-12


def test_reflections():
    """SO(3): what has a Levi-Civita symbol changes sign, what has none does not."""
    x = torch.randn(2, 1, 3, 3, 3, dtype=F64)
    for k, sign in ((3, -1), (2, 1)):
        layer = BrauerLinear("SO(3)", k, 2, 1, 1, bias=False, dtype=F64)

        def with_sign(g, y, sign=sign):
            return act_on(2)(g, y) * (torch.linalg.det(g).sign() if sign < 0 else 1)

        at = x if k == 3 else x[..., 0]
        assert equivariance_error(layer, at, "O(3)", k, with_sign) < 1e-12


def test_symplectic_maps_need_the_form():
    """O(2)'s maps keep orthogonal elements of Sp(2) and fail for those that stretch."""
    x = torch.randn(2, 1, 2, 2, dtype=F64)
    assert equivariance_error(BrauerLinear("O(2)", 2, 2, 1, 1, bias=False, dtype=F64), x, "Sp(2)", 2, 2) > 1e-3


def test_bias_only_where_there_is_an_invariant_tensor():
    assert BrauerLinear("O(3)", 1, 3, 1, 2).bias is None
    assert BrauerLinear("SO(3)", 2, 3, 1, 2).bias.shape == (1, 2)
    assert BrauerLinear("Sp(4)", 2, 2, 1, 2).bias.shape == (1, 2)
    assert BrauerLinear("O(3)", 2, 0, 1, 2, bias=False).bias is None


@pytest.mark.parametrize(("group", "k", "l"), [("O(4)", 2, 2), ("SO(3)", 3, 2), ("Sp(4)", 3, 1), ("O(3)", 4, 2)])
def test_start_keeps_the_size(group, k, l):
    torch.manual_seed(0)
    layer = BrauerLinear(group, k, l, 200, 20)
    out = layer(torch.randn(20, 200, *[layer.n] * k))
    assert 0.3 < out.square().mean() < 3


def test_bad_input():
    for args, words in (
        (("U(3)", 1, 1, 1, 1), r"knows the groups O\(n\), SO\(n\), Sp\(n\), got 'U\(3\)'"),
        (("S(3)", 1, 1, 1, 1), "knows the groups"),
        (("Sp(3)", 1, 1, 1, 1), "needs an even n"),
        (("O(3)", 1, 0, 1, 1), "only the zero map is equivariant to O\\(3\\)"),
        (("O(3)", 4, 4, 1, 1), "up to order_in \\+ order_out = 7"),
        (("O(3)", 1, 1, 0, 1), "channels_in of at least 1"),
    ):
        with pytest.raises(BadInput, match=words):
            BrauerLinear(*args)
    with pytest.raises(BadInput, match=r"BrauerLinear needs a floating-point tensor of shape \(\*, 2, 3\), got"):
        BrauerLinear("O(3)", 1, 1, 2, 1)(torch.zeros(5, 2, 4))

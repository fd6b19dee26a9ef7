import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import diagram_product
from pondera.nn._diagrams import diagrams, entries

F64 = torch.float64


def test_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert diagram_product(x, [(0, 2), (1, 3)], 2, "O(2)").tolist() == x.tolist()
    assert diagram_product(x, [(0,), (1, 2), (3,)], 2, "S(2)").tolist() == [[3.0, 8.0], [3.0, 8.0]]
    assert diagram_product(x, [(0, 1, 2, 3)], 2, "S(2)").tolist() == [[1.0, 0.0], [0.0, 5.0]]
    assert diagram_product(x, [(0, 1)], 0, "Sp(2)").item() == 2 - 3
    v = torch.tensor([1.0, 2.0, 3.0])
    assert diagram_product(v, [], 2, "SO(3)", free=(0, 1, 2)).tolist() == [[0, 3, -2], [-3, 0, 1], [2, -1, 0]]
    assert diagram_product(torch.tensor(2.0), [(0, 1)], 2, "O(2)").tolist() == [[2.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize(
    ("kind", "n"), [("S", 2), ("S", 3), ("O", 3), ("SO", 2), ("SO", 3), ("SO", 4), ("Sp", 2), ("Sp", 4)]
)
def test_every_small_diagram_equals_its_matrix(kind, n):
    torch.manual_seed(0)
    for m in range(5):
        for k in range(m + 1):
            for d in diagrams(kind, n, k, m - k, True):
                x = torch.randn(2, *[n] * k, dtype=F64)
                y = diagram_product(x, d.blocks, m - k, f"{kind}({n})", free=d.free)
                assert torch.allclose(y.reshape(2, -1), x.reshape(2, -1) @ entries(d, kind, n).T, atol=1e-12), d


def test_adjoint_is_the_diagram_upside_down():
    """<d x, y> = <x, d' y>, with outputs and inputs exchanged."""
    torch.manual_seed(0)
    x, y = torch.randn(3, 3, 3, dtype=F64), torch.randn(3, 3, dtype=F64)
    blocks = [(0, 3), (1,), (2, 4)]
    back = [tuple((v - 2) % 5 for v in b) for b in blocks]  # 0, 1 go to 3, 4 and 2, 3, 4 to 0, 1, 2
    one = (diagram_product(x, blocks, 2, "S(3)") * y).sum()
    assert torch.allclose(one, (x * diagram_product(y, back, 3, "S(3)")).sum())


def test_large_orders_need_no_matrix():
    """The matrix would have 40^6 = 4e9 entries."""
    x = torch.randn(40, 40, 40)
    y = diagram_product(x, [(0, 1), (2, 3), (4, 5)], 3, "O(40)")
    assert torch.allclose(y[3, 3], torch.einsum("abb->a", x), atol=1e-4) and not y[3, 4].any()


@pytest.mark.parametrize(
    ("blocks", "order_out", "group", "free", "words"),
    [
        ([(0, 1)], 1, "O(3)", (), "x with 1 last axes of length 3"),
        ([(0, 2)], 1, "O(2)", (), "each of the legs"),
        ([(0,), (1,)], 1, "O(2)", (), "blocks of two legs"),
        ([(0, 1)], 1, "U(2)", (), "knows the groups"),
        ([(0, 1)], 2, "O(2)", (2,), "takes free legs for SO"),
        ([(0, 1), (2, 3), (4, 5), (6, 7)], 4, "O(2)", (), "goes up to"),
        ([(0, 1)], 3, "O(2)", (), "each of the legs"),
    ],
)
def test_bad_input(blocks, order_out, group, free, words):
    with pytest.raises(BadInput, match=words):
        diagram_product(torch.zeros(2), blocks, order_out, group, free=free)

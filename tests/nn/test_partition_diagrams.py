from itertools import permutations, product

import pytest
import torch

from pondera.errors import BadInput
from pondera.nn import PermutationLinear, equivariance_error, equivariant_maps

F64 = torch.float64
BELL = [1, 1, 2, 5, 15, 52, 203]


def rank(maps):
    return int(torch.linalg.matrix_rank(maps.flatten(1), atol=1e-9))


def test_order_one_is_identity_and_mean():
    """y = 2 x + 3 mean(x) + 0.5."""
    layer = PermutationLinear(4, 1, 1, 1, 1, dtype=F64)
    layer.weight.data = torch.tensor([2.0, 3.0], dtype=F64).view(2, 1, 1)
    layer.bias.data.fill_(0.5)
    assert layer(torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=F64)).tolist() == [[11.5, 13.5, 15.5, 21.5]]


def test_matrices_to_scalars_are_trace_and_sum():
    layer = PermutationLinear(3, 2, 0, 1, 1, bias=False, dtype=F64)
    A = torch.arange(9, dtype=F64).view(1, 3, 3)
    seen = {}
    for i, d in enumerate(layer.diagrams):
        layer.weight.data = torch.eye(2, dtype=F64)[i].view(2, 1, 1)
        seen[d.blocks] = layer(A).item()
    assert seen == pytest.approx({((0, 1),): 12 / 3, ((0,), (1,)): 36 / 9})  # means over n and over n^2


def test_matrices_to_matrices_are_the_fifteen_operations():
    """Maron et al. 2019's list for graphs, by hand, spans what the layer spans."""
    n = 5
    A = torch.eye(n * n, dtype=F64).view(-1, n, n)
    one, eye = torch.ones(n, n, dtype=F64), torch.eye(n, dtype=F64)
    diag, row, col = A.diagonal(dim1=1, dim2=2), A.sum(2), A.sum(1)
    trace, total = diag.sum(1)[:, None, None], A.sum((1, 2))[:, None, None]
    down, across = (lambda v: v[:, :, None] * one), (lambda v: v[:, None, :] * one)
    hand = [A, A.mT, trace * one, trace * eye, total * one, total * eye]
    hand += [f(v) for v in (diag, row, col) for f in (down, across, torch.diag_embed)]
    hand = torch.stack([h.flatten(1).mT for h in hand])
    ours = equivariant_maps(f"S({n})", 2, 2)
    assert len(hand) == len(ours) == 15
    assert rank(hand) == rank(torch.cat([hand, ours])) == 15


def test_ranks():
    """Ranks of the diagrams for l + k = 2, 3, 4; with n or more legs, Bell's numbers."""
    table = {1: [1, 1, 1], 2: [2, 4, 8], 3: [2, 5, 14], 4: [2, 5, 15]}
    for n, wanted in table.items():
        for m, number in zip((2, 3, 4), wanted):
            every = equivariant_maps(f"S({n})", 1, m - 1, spanning_set=True)
            assert len(every) == BELL[m] and rank(every) == number
            for basis in ("diagram", "orbit"):
                kept = equivariant_maps(f"S({n})", 1, m - 1, basis=basis)
                assert len(kept) == rank(kept) == rank(torch.cat([kept, every])) == number


@pytest.mark.parametrize("n", [2, 4])
def test_orbit_elements_entry_by_entry(n):
    """X_pi is 1 where indices are equal exactly if in one block; D_pi is the sum of X over coarser partitions."""
    m = 4
    orbit = equivariant_maps(f"S({n})", 2, 2, basis="orbit").view(-1, *[n] * m)
    layer = PermutationLinear(n, 2, 2, 1, 1)
    blocks = sorted(d.blocks for d in layer.diagrams)
    seen = torch.zeros([n] * m, dtype=F64)
    for X in orbit:
        at = torch.nonzero(X)
        same = {tuple((i[:, None] == i).flatten().tolist()) for i in at}
        assert len(same) == 1 and set(X.unique().tolist()) <= {0.0, 1.0}  # one pattern of equal indices each
        seen += X
    assert (seen == 1).all()  # a partition of all index tuples
    assert len(blocks) == len(orbit)


@pytest.mark.parametrize(("k", "l"), [(0, 0), (0, 2), (1, 0), (2, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("basis", ["diagram", "orbit"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_equals_the_dense_product_and_commutes_with_every_permutation(n, k, l, basis):
    torch.manual_seed(0)
    layer = PermutationLinear(n, k, l, 2, 3, basis=basis, dtype=F64)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(4, 2, *[n] * k, dtype=F64)
    dense = torch.tensordot(x, layer.dense_weight().flatten(1 + l, 1 + l + k).flatten(0, l).mT, 1) if not k else None
    if k:
        W = layer.dense_weight().reshape(3 * n**l, 2 * n**k)
        dense = x.flatten(1) @ W.T
    constant = layer(torch.zeros_like(x))
    assert torch.allclose(layer(x), dense.view(4, 3, *[n] * l) + constant, atol=1e-12)
    every = iter([torch.eye(n, dtype=F64)[list(p)] for p in permutations(range(n))])
    count = len(list(permutations(range(n))))
    assert equivariance_error(layer, x, lambda _: next(every), k, l, draws=count) < 1e-13


def test_both_bases_are_the_same_functions():
    torch.manual_seed(0)
    one, other = (PermutationLinear(3, 2, 2, 1, 1, basis=b, bias=False, dtype=F64) for b in ("diagram", "orbit"))
    both = []
    for layer in (one, other):
        maps = []
        for i in range(len(layer.weight)):
            layer.weight.data = torch.eye(len(layer.weight), dtype=F64)[i].view(-1, 1, 1)
            maps.append(layer.dense_weight().detach().flatten())
        both.append(torch.stack(maps))
    assert rank(both[0]) == rank(both[1]) == rank(torch.cat(both)) == 14


def test_the_same_weights_serve_another_n():
    """A layer for 5 items takes a layer's state for 4; a constant tensor gives the same at every n."""
    torch.manual_seed(0)
    small, large = PermutationLinear(4, 2, 2, 2, 3), PermutationLinear(5, 2, 2, 2, 3)
    large.load_state_dict(small.state_dict())
    a, b = small(torch.ones(2, 4, 4)), large(torch.ones(2, 5, 5))
    assert torch.allclose(a[:, 0, 1], b[:, 0, 1], atol=1e-6) and torch.allclose(a[:, 0, 0], b[:, 0, 0], atol=1e-6)
    assert len(PermutationLinear(2, 2, 2, 1, 1).weight) == 8  # fewer items than axes: fewer weights


def test_output_keeps_its_size_as_n_grows():
    torch.manual_seed(0)
    sizes = [PermutationLinear(n, 2, 2, 64, 64, bias=False)(torch.ones(64, n, n)).std().item() for n in (4, 32)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5) and 0.3 < sizes[0] < 2


def test_on_a_meta_device_and_back():
    layer = PermutationLinear(3, 1, 1, 1, 1, basis="orbit", device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert equivariance_error(layer.double(), torch.randn(1, 3, dtype=F64), "S(3)") < 1e-13


@pytest.mark.parametrize(
    ("args", "kw", "words"),
    [
        ((0, 1, 1, 1, 1), {}, "n of at least 1, a whole number, got 0"),
        ((3, 1, 1, 0, 1), {}, "channels_in of at least 1"),
        ((3, 1, 1, 1, 2.0), {}, "channels_out of at least 1, a whole number, got 2.0"),
        ((3, -1, 1, 1, 1), {}, "order_in of at least 0"),
        ((3, 4, 4, 1, 1), {}, "up to order_in \\+ order_out = 7"),
        ((3, 1, 1, 1, 1), {"basis": "irreps"}, 'takes basis "diagram" or "orbit", got \'irreps\''),
    ],
)
def test_bad_sizes(args, kw, words):
    with pytest.raises(BadInput, match=words):
        PermutationLinear(*args, **kw)


def test_bad_inputs():
    layer = PermutationLinear(3, 2, 1, 2, 1)
    for x in (torch.zeros(2, 3, 4), torch.zeros(3, 3), torch.zeros(5, 1, 3, 3), torch.zeros(2, 3, 3).long(), [1.0]):
        with pytest.raises(BadInput, match=r"shape \(\*, 2, 3, 3\), got"):
            layer(x)
    for group, words in (("U(3)", "knows the groups"), ("Sp(3)", "an even n"), ("O(0)", "knows the groups")):
        with pytest.raises(BadInput, match=words):
            equivariant_maps(group, 1, 1)
    with pytest.raises(BadInput, match='takes basis "diagram"'):
        equivariant_maps("O(3)", 1, 1, basis="orbit")


def test_counts_by_burnside():
    for n, m in product((2, 3), (3, 5)):
        fixed = sum(sum(g[i] == i for i in range(n)) ** m for g in permutations(range(n)))
        count = fixed // len(list(permutations(range(n))))
        assert len(equivariant_maps(f"S({n})", m - 2, 2)) == count

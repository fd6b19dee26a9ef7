from math import prod

import pytest
import torch

from pondera.errors import BadInput
from pondera.linalg.tensor_train import balance, split_size, tensor_train, train_bonds, train_matrix

ROWS, COLS = (3, 4, 2), (2, 3, 4)


def wave(m=24, n=24):
    return torch.sin(torch.arange(m * n, dtype=torch.float64) ** 2).reshape(m, n)


def unfolded(w, rows, cols, k):
    """By brute force: entry (i, j) goes to row (i_1 j_1 .. i_k j_k) and column (i_k+1 ..)."""
    n = len(rows)
    left = prod(rows[:k]) * prod(cols[:k])
    out = torch.zeros(left, w.numel() // left, dtype=w.dtype)
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            digits, a, b = [], i, j
            for q in reversed(range(n)):
                digits.append((a % rows[q], b % cols[q]))
                a, b = a // rows[q], b // cols[q]
            row = column = 0
            for q, (p, r) in enumerate(reversed(digits)):
                if q < k:
                    row = (row * rows[q] + p) * cols[q] + r
                else:
                    column = (column * rows[q] + p) * cols[q] + r
            out[row, column] = w[i, j]
    return out


def test_a_kronecker_product_is_a_train_of_bond_one():
    a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    cores = tensor_train(torch.kron(a, b), (2, 1), (2, 3), bond=1)
    assert [tuple(c.shape) for c in cores] == [(1, 2, 2, 1), (1, 1, 3, 1)]
    assert torch.allclose(train_matrix(cores), torch.kron(a, b), atol=1e-6)


def test_contraction_by_hand():
    g1 = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 1, 2)  # rows i_1, bond 2
    g2 = torch.tensor([[1.0, 0.0], [1.0, 10.0]]).reshape(2, 1, 2, 1)  # bond, columns j_2
    assert train_matrix([g1, g2]).tolist() == [[3.0, 20.0], [7.0, 40.0]]


@pytest.mark.parametrize("seed", range(3))
def test_contraction_is_the_product_of_the_cores_matrices(seed):
    g = torch.Generator().manual_seed(seed)
    bonds = (1, 3, 2, 1)
    cores = [
        torch.randn(d, i, j, e, generator=g, dtype=torch.float64) for d, i, j, e in zip(bonds, ROWS, COLS, bonds[1:])
    ]
    w = train_matrix(cores)
    for i, j in ((0, 0), (5, 7), (23, 23), (13, 10)):
        (i1, i2, i3), (j1, j2, j3) = (i // 8, i // 2 % 4, i % 2), (j // 12, j // 4 % 3, j % 4)
        assert torch.allclose(w[i, j], cores[0][:, i1, j1] @ cores[1][:, i2, j2] @ cores[2][:, i3, j3])


def test_full_bonds_meet_every_matrix():
    w = wave()
    cores = tensor_train(w, ROWS, COLS)
    assert [c.shape[-1] for c in cores] == [6, 8, 1]
    assert torch.allclose(train_matrix(cores), w, atol=1e-13)
    for core in cores[:-1]:
        q = core.flatten(0, 2)
        assert torch.allclose(q.T @ q, torch.eye(q.shape[1], dtype=q.dtype), atol=1e-13)


@pytest.mark.parametrize("bond", [1, 2, 3, 5, 7])
def test_error_within_the_bound_and_at_least_the_best_of_each_cut(bond):
    w = wave()
    error = (train_matrix(tensor_train(w, ROWS, COLS, bond=bond)) - w).square().sum()
    left_out = [torch.linalg.svdvals(unfolded(w, ROWS, COLS, k))[bond:].square().sum() for k in (1, 2)]
    assert max(left_out) * (1 - 1e-12) <= error <= sum(left_out) * (1 + 1e-12)


def test_two_cores_are_the_best_of_their_rank():
    w = wave(12, 10)
    u, s, vh = torch.linalg.svd(unfolded(w, (3, 4), (2, 5), 1), full_matrices=False)
    cores = balance(tensor_train(w, (3, 4), (2, 5), bond=4))
    flat = cores[0].flatten(0, 2) @ cores[1].flatten(1)
    assert torch.allclose(flat, u[:, :4] * s[:4] @ vh[:4], atol=1e-12)
    assert torch.allclose(cores[0].flatten(0, 2).norm(dim=0), s[:4].sqrt())
    assert torch.allclose(cores[1].flatten(1).norm(dim=1), s[:4].sqrt())


def test_a_train_with_column_sizes_of_one_is_a_low_rank_product():
    w = wave(7, 5)
    u, s, vh = torch.linalg.svd(w)
    cores = tensor_train(w, (7, 1, 1), (1, 1, 5), bond=2)
    assert torch.allclose(train_matrix(cores), u[:, :2] * s[:2] @ vh[:2], atol=1e-12)


@pytest.mark.parametrize(
    ("bond", "ours", "theirs"), [(2, 0.91018917, 0.93184695), (3, 0.83364321, 0.85530856), (4, 0.72616256, 0.74805336)]
)
def test_nearer_than_the_balanced_cores_cut_down(bond, ours, theirs):
    """`theirs`: relative errors that class MPO of zfgao66/OPF (53797e1, compress_tools/Matrix2MPO.py) gives on `wave()`."""
    w = wave()
    for cores in (tensor_train(w, ROWS, COLS, bond=bond), balance(tensor_train(w, ROWS, COLS, bond=bond))):
        assert float((train_matrix(cores) - w).norm() / w.norm()) == pytest.approx(ours, abs=1e-7)
    full = balance(tensor_train(w, ROWS, COLS))
    cut = [full[0][..., :bond], full[1][:bond, ..., :bond], full[2][:bond]]
    assert float((train_matrix(cut) - w).norm() / w.norm()) == pytest.approx(theirs, abs=1e-7)


def test_balanced_cores_agree_with_that_class():
    """Norms of its cores, and its first singular values at both bonds; all entries agree to 6e-14 up to signs."""
    w = wave()
    cores = balance(tensor_train(w, ROWS, COLS))
    assert [float(c.norm()) for c in cores] == pytest.approx([6.428196, 2.618528, 6.89088], abs=1e-5)
    at_first = cores[0].flatten(0, 2).norm(dim=0).square()
    at_last = cores[-1].flatten(1).norm(dim=1).square()
    assert at_first[:3].tolist() == pytest.approx([7.656994, 7.182676, 7.07974], abs=1e-5)
    assert at_last[:3].tolist() == pytest.approx([6.886177, 6.728207, 6.431688], abs=1e-5)


def test_balance_keeps_the_matrix_and_does_not_care_for_the_gauge():
    w, g = wave(), torch.Generator().manual_seed(0)
    cores = tensor_train(w, ROWS, COLS, bond=4)
    turn = torch.randn(4, 4, generator=g, dtype=torch.float64)
    other = [cores[0] @ turn, torch.tensordot(turn.inverse(), cores[1], 1), cores[2]]
    first, second = balance(cores), balance(other)
    assert torch.allclose(train_matrix(first), train_matrix(cores), atol=1e-12)
    for a, b in zip(first, second):
        assert torch.allclose(a.abs(), b.abs(), atol=1e-10)


def test_deficient_rank_gives_no_large_entries():
    w = torch.outer(torch.arange(1.0, 25), torch.ones(24))
    cores = balance(tensor_train(w, ROWS, COLS))
    assert torch.allclose(train_matrix(cores), w, rtol=1e-4, atol=1e-3)
    assert max(float(c.abs().max()) for c in cores) < 30
    assert not any(c.any() for c in balance(tensor_train(torch.zeros(24, 24), ROWS, COLS)))


def test_contraction_is_differentiable():
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 1, 2), (2, 1, 3, 2), (2, 2, 2, 1))
    cores = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *c: train_matrix(c), cores)


def test_half_precision_is_worked_on_in_float32():
    w = wave().bfloat16()
    cores = tensor_train(w, ROWS, COLS)
    assert all(c.dtype == torch.bfloat16 for c in cores)
    assert (train_matrix([c.float() for c in cores]) - w.float()).abs().max() < 0.05


@pytest.mark.parametrize(
    ("n", "parts"), [(1, 3), (2, 5), (13, 2), (768, 5), (4096, 5), (11008, 4), (30522, 3), (50257, 5)]
)
def test_sizes_are_split_exactly(n, parts):
    sizes = split_size(n, parts)
    assert prod(sizes) == n
    assert len(sizes) == parts
    assert sizes == tuple(sorted(sizes, reverse=True))


def test_counts_of_an_untruncated_train():
    # 768 x 768 in five cores: 1.147 of the dense count, the largest core as large as the matrix
    rows, cols = (3, 4, 4, 4, 4), (4, 4, 4, 4, 3)
    d = train_bonds(rows, cols)
    counts = [a * i * j * b for a, i, j, b in zip(d, rows, cols, d[1:])]
    assert counts == [144, 36864, 589824, 36864, 144]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tensor_train(torch.ones(4, 4), (2, 2), (2, 3)), r"shape \(4, 4\), which is not 2 \* 2 x 2 \* 3"),
        (lambda: tensor_train(torch.ones(4, 4), (2, 2), (4,)), r"as many positive row as column sizes"),
        (lambda: tensor_train(torch.ones(4, 4), (2, 2), (2, 2), bond=0), "bond of at least 1, got 0"),
        (lambda: tensor_train(torch.full((4, 4), torch.nan), (2, 2), (2, 2)), "finite numbers, got 16"),
        (lambda: tensor_train(torch.ones(4, 4, dtype=torch.long), (2, 2), (2, 2)), "floating-point"),
        (lambda: tensor_train(torch.empty(0, 4), (2, 2), (2, 2)), "with entries"),
        (lambda: tensor_train(torch.empty(4, 4, device="meta"), (2, 2), (2, 2)), "meta device"),
        (lambda: split_size(0, 2), "positive size and number of parts, got 0 and 2"),
        (lambda: train_bonds((2, -1), (2, 2)), "positive"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(BadInput, match=words):
        call()

import pytest
import torch

from pondera.errors import BadInput
from pondera.linalg.givens import givens_tree, rotations


def dense(blocks, n):
    """T as a product of n x n matrices, straight from which pairs a level turns."""
    t, used, step, count = torch.eye(n, dtype=blocks.dtype), 0, 1, n
    while count > 1:
        level = torch.eye(n, dtype=blocks.dtype)
        for k in range(count // 2):
            if used == len(blocks):  # the root was left out
                return t
            i, j = 2 * step * k, 2 * step * k + step
            level[[[i], [j]], [i, j]] = blocks[used]
            used += 1
        t, step, count = level @ t, 2 * step, (count + 1) // 2
    assert used == len(blocks)
    return t


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 31, 33])
@pytest.mark.parametrize("root", [True, False])
def test_every_size_is_the_product_of_the_dense_levels(n, root):
    g = torch.Generator().manual_seed(n)
    blocks = torch.randn(n - 1 if root else n - 2, 2, 2, generator=g, dtype=torch.float64)
    x = torch.randn(2, 3, n, generator=g, dtype=torch.float64)
    t = dense(blocks, n)
    assert torch.allclose(givens_tree(x, blocks), x @ t.T)
    assert torch.allclose(givens_tree(x, blocks, transpose=True), x @ t)


@pytest.mark.parametrize("n", [2, 7, 8, 100])
def test_rotations_make_a_rotation(n):
    theta = torch.linspace(-3, 3, n - 1, dtype=torch.float64)
    t = givens_tree(torch.eye(n, dtype=torch.float64), rotations(theta))
    assert torch.allclose(t @ t.T, torch.eye(n, dtype=torch.float64))
    assert torch.linalg.det(t).item() == pytest.approx(1)


def test_no_angle_changes_no_bit():
    x = torch.randn(4, 9)
    for transpose in (False, True):
        assert torch.equal(givens_tree(x, rotations(torch.zeros(8)), transpose=transpose), x)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradients(transpose):
    blocks = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: givens_tree(x, b, transpose=transpose), (x, blocks))


def test_the_work_a_row_grows_linearly():
    """Numbers kept for the backward pass, per coordinate: bounded, where levels of full length keep log2 n times as many."""

    def kept(n):
        held = {}
        theta, x = torch.zeros(n - 1, requires_grad=True), torch.ones(256, n, requires_grad=True)
        blocks = rotations(theta)

        def keep(t):
            if t.numel() >= 256:
                held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = givens_tree(x, blocks)
        return sum(held.values()) / (4 * y.numel())

    assert kept(1024) < 2.5


@pytest.mark.parametrize("m", [0, 3, 6])
def test_another_number_of_blocks_is_refused(m):
    with pytest.raises(BadInput, match=r"over 6 coordinates needs blocks of shape \(5, 2, 2\), or \(4, 2, 2\)"):
        givens_tree(torch.ones(6), torch.zeros(m, 2, 2))

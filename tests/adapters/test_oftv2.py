import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.adapters.oft import BlockRotation, OftConfig
from pondera.errors import BadInput
from pondera.linalg.cayley import cayley, skew


def wrapped(layer, config):
    return peft.get_peft_model(nn.Sequential(layer), config)


def away(net, size=0.1, seed=0):
    """Move every trained number from its start."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net


def peft_rotation(terms, q):
    """R of PEFT's OFT for one block with the numbers q above the diagonal."""
    b = round((1 + (1 + 8 * len(q)) ** 0.5) / 2)
    exact = {"use_cayley_neumann": False} if terms == 0 else {"num_cayley_neumann_terms": terms}
    net = wrapped(nn.Linear(b, 1), peft.OFTConfig(oft_block_size=b, target_modules=["0"], **exact))
    module = net.base_model.model[0].oft_R["default"].double()
    with torch.no_grad():
        module.weight.copy_(q)
    return module.get_weight().detach()


def same_up_to_rounding(a, b):
    """The layer adds up the same products, but of a copy of its input that lies differently in memory, which may decide
    in which order. That is worth units in the last place of the largest output: 2.5 at most in 50 draws, 8 allowed."""
    return torch.allclose(a, b, rtol=0, atol=8 * torch.finfo(b.dtype).eps * b.abs().max().item())


# -- ours ------------------------------------------------------------------------------------------------------------


def test_block_of_two_by_hand():
    """b = 2: every pair of inputs turns by 2 arctan q, and the merged weight by the same angle the other way round."""
    core = BlockRotation(torch.zeros(1, 4, dtype=torch.float64), OftConfig(block_size=2, terms=0))
    with torch.no_grad():
        core.q.copy_(torch.tensor([[1.0], [0.0]]))  # Q = [[0, 1], [-1, 0]]: R = [[0, 1], [-1, 0]]
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    assert core(x).tolist() == [[-2.0, 1.0, 3.0, 4.0]]
    assert core.merged(x).tolist() == [[2.0, -1.0, 3.0, 4.0]]


@pytest.mark.parametrize("terms", [0, 2, 3, 4, 5, 6])
def test_rows_times_the_block_diagonal_matrix(terms):
    core = away(BlockRotation(torch.zeros(1, 12, dtype=torch.float64), OftConfig(block_size=4, terms=terms)), 0.2)
    r = torch.block_diag(*cayley(skew(core.q, 4), terms or None))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.allclose(core(x), x @ r)
    assert torch.allclose(core.merged(x), x @ r.T)


@pytest.mark.parametrize(("n", "b"), [(12, 4), (12, 12), (12, 1), (64, 32)])
def test_trained_numbers(n, b):
    core = BlockRotation(torch.zeros(3, n), OftConfig(block_size=b))
    assert sum(p.numel() for p in core.parameters()) == n * (b - 1) / 2


def test_exact_keeps_lengths_and_angles_of_the_weight_vectors():
    torch.manual_seed(0)
    layer = nn.Linear(24, 7, dtype=torch.float64)
    before = layer.weight.detach().clone()
    after = (
        away(wrapped(layer, OftConfig(block_size=8, terms=0, target_modules=["0"])), 1.0).merge_and_unload()[0].weight
    )
    assert not torch.allclose(after, before)
    assert torch.allclose(after @ after.T, before @ before.T)


@pytest.mark.parametrize("kernel", [1, 3, (1, 5)])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_any_kernel_starts_as_the_identity_and_merges(kernel, padding_mode):
    torch.manual_seed(0)
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(k // 2 for k in size)
    layer = nn.Conv2d(4, 3, kernel, stride=2, padding=padding, padding_mode=padding_mode)
    x = torch.randn(2, 4, 9, 9)
    before = layer(x)
    net = wrapped(layer, OftConfig(block_size=2, target_modules=["0"]))
    assert same_up_to_rounding(net(x), before)
    after = away(net, 0.5)(x)
    assert not torch.allclose(after, before, atol=0.1)
    assert torch.allclose(net.merge_and_unload()(x), after, atol=1e-5)


def test_embedding_and_conv1d():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 8), Conv1D(6, 8))
    x = torch.arange(9)
    before = net(x)
    net = peft.get_peft_model(net, OftConfig(block_size=4, target_modules=["0", "1"]))
    assert same_up_to_rounding(net(x), before)
    after = away(net, 0.5)(x)
    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(net.merge_and_unload()(x), after, atol=1e-5)


@pytest.mark.parametrize("b", [0, 5, 24, -4, 4.0])
def test_a_block_size_that_does_not_divide_is_refused(b):
    with pytest.raises(BadInput, match=r"layer '0': OFT needs a block_size that divides 12.*such as \[.*got"):
        wrapped(nn.Linear(12, 3), OftConfig(block_size=b, target_modules=["0"]))


@pytest.mark.parametrize("terms", [1, -2])
def test_terms_that_make_no_series_are_refused(terms):
    with pytest.raises(BadInput, match=f"terms of at least 2, or 0 for the exact transform; got {terms}"):
        OftConfig(terms=terms)


# -- PEFT's object, and where the two part ---------------------------------------------------------------------------


def test_peft_agrees_for_linear_layers():
    """With four terms or more the same numbers mean the same rotation; exact ones need the other sign."""
    q = 0.1 * torch.randn(28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for terms in (4, 5, 6, 7):
        assert torch.allclose(peft_rotation(terms, q), cayley(skew(q, 8), terms))
    assert torch.allclose(peft_rotation(0, q), cayley(skew(-q, 8)))


def test_pefts_exact_and_neumann_transforms_are_inverses():
    """One checkpoint opened under the other setting turns back instead of on."""
    q = 0.05 * torch.randn(28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact, series = peft_rotation(0, q), peft_rotation(8, q)
    eye = torch.eye(8, dtype=torch.float64)
    assert torch.linalg.matrix_norm(exact @ series - eye, 2) < 1e-4
    assert torch.linalg.matrix_norm(exact - series, 2) > 0.3


def test_pefts_three_terms_are_four_and_its_two_are_not_the_formulas():
    q = 0.2 * torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    big, eye = skew(q, 4), torch.eye(4, dtype=torch.float64)
    assert torch.equal(peft_rotation(3, q), peft_rotation(4, q))
    assert torch.allclose(cayley(big, 3), eye + 2 * big + big @ big)
    assert torch.allclose(peft_rotation(2, q), eye + 2 * big)
    assert torch.allclose(cayley(big, 2), eye + big)


@pytest.mark.parametrize("norm", [0.1, 0.4, 0.8])
def test_four_or_six_terms_of_peft_are_nearer_to_a_rotation_than_its_five(norm):
    """|R^T R - I| is 2 q^4 - q^8 for five terms, q^6 for four, q^10 for six."""
    big = skew(torch.randn(28, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 8)
    big = big * (norm / torch.linalg.matrix_norm(big, 2))
    q = big[tuple(torch.triu_indices(8, 8, 1))]
    error = {
        k: torch.linalg.matrix_norm((r := peft_rotation(k, q)).T @ r - torch.eye(8).double(), 2) for k in (4, 5, 6)
    }
    assert error[5].item() == pytest.approx(2 * norm**4 - norm**8, rel=1e-6)
    assert error[4].item() == pytest.approx(norm**6, rel=1e-6)
    assert error[6].item() == pytest.approx(norm**10, rel=1e-6)


@pytest.mark.parametrize(("kernel", "same"), [(1, True), (3, False)])
def test_pefts_convolution_is_the_identity_at_the_start_only_for_one_by_one(kernel, same):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(4, 3, kernel), torch.randn(2, 4, 8, 8)
    before = layer(x)
    net = wrapped(layer, peft.OFTConfig(oft_block_size=2, target_modules=["0"]))
    assert torch.allclose(net(x), before, atol=1e-6) is same


def test_peft_changes_a_block_size_that_does_not_divide():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        net = wrapped(nn.Linear(12, 3), peft.OFTConfig(oft_block_size=5, target_modules=["0"]))
    assert net.base_model.model[0].oft_block_size["default"] == 4
    assert any("Adjusted" in str(w.message) for w in said)


# -- the products and the backward written by hand ---------------------------------------------------------------------


def by_autograd(q, x, b):
    """The rotation by a solver and the rows by one sum, in which autograd finds its own way back."""
    blocks = cayley(skew(q, b))
    return torch.einsum("...kb,kbc->...kc", x.unflatten(-1, blocks.shape[:2]), blocks).flatten(-2)


def turned(q, x, b):
    core = BlockRotation(torch.zeros(1, x.shape[-1]), OftConfig(block_size=b))
    return torch.func.functional_call(core, {"q": q}, (x,))


def numbers(n, b, size, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (size * torch.randn(n // b, b * (b - 1) // 2, generator=g, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(("n", "b"), [(12, 4), (24, 12), (6, 2), (3, 3), (64, 32)])
def test_first_and_second_gradients(n, b):
    q, x = numbers(n, b, 0.3).requires_grad_(), torch.randn(2, 1, n, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, x: turned(q, x, b), (q, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda q, x: turned(q, x, b), (q, x), fast_mode=True)
    frozen = q.detach()
    assert torch.autograd.gradgradcheck(lambda x: turned(frozen, x, b), (x,), fast_mode=True)


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.01, 0.05, 0.1, 0.3, 3.0])
@pytest.mark.parametrize("b", [16, 32, 128])
def test_products_are_as_near_as_a_solver(size, b):
    """Both sides of the bound below which the inverse is made of products; against float64."""
    q = numbers(256, b, size)
    x, g = torch.randn(7, 256, dtype=torch.float64), torch.randn(7, 256, dtype=torch.float64)
    found = {}
    for name, turn, dtype in (
        ("ours", turned, torch.float32),
        ("before", by_autograd, torch.float32),
        ("exact", by_autograd, torch.float64),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in (q, x)]
        y = turn(*leaves, b)
        found[name] = [t.detach().double() for t in (y, *torch.autograd.grad(y, leaves, g.to(dtype)))]
    for ours, before, exact in zip(*found.values()):
        rounding = 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() < 2 * (before - exact).abs().max() + rounding


@pytest.mark.parametrize("size", [0.02, 0.05, 0.1, 1.0])
def test_stays_a_rotation_in_float32(size):
    r = turned(numbers(64, 32, size, torch.float32), torch.eye(64), 32)
    assert torch.allclose(r @ r.T, torch.eye(64), atol=5e-6)


def test_many_rows_are_the_rows_one_by_one():
    """Above a megabyte the rows are taken in parts."""
    q, x = numbers(64, 32, 0.1, torch.float32).requires_grad_(), torch.randn(3, 4000, 64, requires_grad=True)
    g = torch.randn(3, 4000, 64)
    y = turned(q, x, 32)
    gq, gx = torch.autograd.grad(y, (q, x), g)
    z = by_autograd(q, x, 32)
    wq, wx = torch.autograd.grad(z, (q, x), g)
    assert torch.allclose(y, z, atol=1e-5)
    assert torch.allclose(gx, wx, atol=1e-5)
    assert torch.allclose(gq, wq, rtol=1e-4, atol=1e-4 * wq.abs().max().item())
    assert turned(q, x[:0], 32).shape == (0, 4000, 64)
    assert torch.equal(turned(q, x.permute(1, 0, 2), 32), y.permute(1, 0, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_numbers_go_the_old_way(dtype):
    core = away(BlockRotation(torch.zeros(1, 64), OftConfig(block_size=32)), 0.1).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    blocks = cayley(skew(core.q.float(), 32)).to(dtype)
    assert torch.equal(core(x), torch.einsum("...kb,kbc->...kc", x.unflatten(-1, (2, 32)), blocks).flatten(-2))


def test_function_transforms_and_forward_mode_go_the_old_way():
    q, x, v = numbers(8, 4, 0.3), torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    y = by_autograd(q, x, 4)
    assert torch.allclose(torch.func.vmap(lambda row: turned(q, row, 4))(x), y)
    out, tangent = torch.func.jvp(lambda x: turned(q, x, 4), (x,), (v,))
    assert torch.allclose(out, y) and torch.allclose(tangent, by_autograd(q, v, 4))
    with torch.autograd.forward_ad.dual_level():
        dual = turned(q, torch.autograd.forward_ad.make_dual(x, v), 4)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(dual).tangent, by_autograd(q, v, 4))

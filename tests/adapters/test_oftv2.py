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

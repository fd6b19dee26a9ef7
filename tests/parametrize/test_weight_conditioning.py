import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pondera.errors import BadInput
from pondera.parametrize import Conditioned


def condition(w):
    s = torch.linalg.svdvals(w)
    return (s[0] / s[-1]).item()


def test_rows_columns_and_both_by_hand():
    w = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    root = math.sqrt(20)
    for what, expected in (
        ("rows", [[0.6, 0.8], [0.0, 1.0]]),
        ("columns", [[1.0, 4 / root], [0.0, 2 / root]]),
        ("both", [[1.0, 0.8 / math.sqrt(1.64)], [0.0, 1 / math.sqrt(1.64)]]),
    ):
        assert torch.allclose(Conditioned(what)(w), torch.tensor(expected), atol=1e-7), what


def test_a_diagonal_matrix_is_conditioned_perfectly():
    assert condition(torch.diag(torch.logspace(-3, 3, 7))) == pytest.approx(1e6, rel=1e-3)
    assert condition(Conditioned()(torch.diag(torch.logspace(-3, 3, 7)))) == pytest.approx(1, abs=1e-6)


def test_rows_are_torch_s_weight_norm_with_lengths_at_one():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3)
    ours = Conditioned()(layer.weight.detach())
    parametrizations.weight_norm(layer)
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(1.0)
    assert torch.allclose(ours, layer.weight, atol=1e-7)


def test_a_convolution_is_its_flattened_matrix_and_dim_turns_it():
    w = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for what in ("rows", "columns", "both"):
        flat = Conditioned(what)(w.flatten(1)).view_as(w)
        assert torch.allclose(Conditioned(what)(w), flat, atol=1e-7)
        turned = Conditioned(what, dim=1)(w.transpose(0, 1)).transpose(0, 1)
        assert torch.allclose(turned, flat, atol=1e-7)


def test_van_der_sluis_bound_by_search():
    """The condition number by rows is within sqrt(rows) of the best of 2,000 other scalings of the rows."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        w = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        w = w * torch.randn(4, 1, generator=generator, dtype=torch.float64).exp()
        scales = torch.randn(2000, 4, 1, generator=generator, dtype=torch.float64).exp()
        s = torch.linalg.svdvals(scales * Conditioned()(w))
        best = (s[:, 0] / s[:, -1]).min().item()
        assert condition(Conditioned()(w)) <= math.sqrt(4) * best


@pytest.mark.parametrize(
    ("scaled", "what", "lowest", "highest"),
    [
        ("no", "rows", 0.98, 1.0),
        ("rows", "rows", 0.01, 0.03),
        ("columns", "rows", 0.9, 1.0),
        ("columns", "columns", 0.15, 0.3),
    ],
)
def test_it_helps_where_lengths_differ_and_hardly_else(scaled, what, lowest, highest):
    """Median ratio of condition numbers, 64 x 256, entries Gaussian, rows or columns times a log-normal number."""
    generator, ratios = torch.Generator().manual_seed(0), []
    for _ in range(20):
        w = torch.randn(64, 256, generator=generator)
        if scaled != "no":
            w = w * torch.randn(*((64, 1) if scaled == "rows" else (256,)), generator=generator).exp()
        ratios.append(condition(Conditioned(what)(w)) / condition(w))
    assert lowest < torch.tensor(ratios).median().item() < highest


def test_a_matrix_whose_conditioning_gets_worse():
    """Singular values 1/k between random directions: rows are near each other already, and evening them out does harm."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        u, v = (torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0] for _ in "uv")
        w = u @ torch.diag(1 / torch.arange(1, 65, dtype=torch.float64)) @ v
        assert condition(w) == pytest.approx(64, rel=1e-6)
        assert condition(Conditioned()(w)) > 64


def test_gradient_is_right_and_at_right_angles_to_each_row():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for what in ("rows", "columns", "both"):
        assert torch.autograd.gradcheck(Conditioned(what), w)
        assert torch.autograd.gradgradcheck(Conditioned(what), w)
    (Conditioned()(w) * torch.arange(12.0).view(4, 3)).sum().backward()
    assert (w.grad * w).sum(1).abs().max() < 1e-12


def test_the_scale_of_the_parameter_does_not_matter_and_bfloat16_keeps_unit_rows():
    w = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(Conditioned()(1e-6 * w), Conditioned()(w), atol=1e-6)
    half = Conditioned()(w.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float().norm(dim=1) - 1).abs().max() < 5e-3


def test_refused():
    with pytest.raises(BadInput, match="rows, columns, both at unit length, got 'row'"):
        Conditioned("row")
    with pytest.raises(BadInput, match=r"2 rows of zeros in a float32 tensor of shape \(3, 2\)"):
        Conditioned().right_inverse(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(BadInput, match="1 column of zeros"):
        Conditioned("both").right_inverse(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    with pytest.raises(BadInput, match="at least two dimensions"):
        parametrize.register_parametrization(nn.Linear(2, 2), "bias", Conditioned())
    with pytest.raises(BadInput, match=r"Conditioned\(dim=2\) needs a weight with that dimension"):
        parametrize.register_parametrization(nn.Linear(2, 2), "weight", Conditioned(dim=2))

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pondera.errors import BadInput
from pondera.penalties import convolution_singular_values, orthogonal_convolution, orthogonal_convolution_exists

D = torch.float64


def kernel(*shape):
    return 0.5 * torch.cos(1.0 + 0.7 * torch.arange(torch.Size(shape).numel(), dtype=D)).reshape(shape)


def brute(w, size, *, stride=1, dilation=1, groups=1):
    """The operator's matrix, column by column, from torch's own convolution of a circularly padded input."""
    d = w.ndim - 2
    apart = (dilation,) * d if isinstance(dilation, int) else dilation
    pads = [p for a, k in zip(apart[::-1], tuple(w.shape[2:])[::-1]) for p in (0, a * (k - 1))]
    x = torch.eye(w.shape[1] * groups * torch.Size(size).numel(), dtype=D).reshape(-1, w.shape[1] * groups, *size)
    conv = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    return conv(F.pad(x, pads, mode="circular"), w, stride=stride, dilation=dilation, groups=groups).flatten(1).T


def test_one_filter_of_two_taps_by_hand():
    # K = (a, b): correlations ab, a^2 + b^2, ab: L = 2 (ab)^2 + (a^2 + b^2 - 1)^2
    a, b = 0.5, 2.0
    found = orthogonal_convolution(torch.tensor([[[a, b]]], dtype=D)).item()
    assert found == pytest.approx(2 * (a * b) ** 2 + (a * a + b * b - 1) ** 2)


@pytest.mark.parametrize(
    ("shape", "stride", "theirs"),
    [
        ((4, 2, 3, 3), 1, 184.973419),
        ((2, 6, 3, 3), 1, 423.105835),
        ((9, 2, 3, 3), 2, 414.794678),
        ((18, 2, 3, 3), 4, 1479.258667),
        ((5, 3, 5, 5), 2, 3476.900391),
    ],
)
def test_agrees_with_the_authors_code(shape, stride, theirs):
    # LorthRegularizer of deel-ai/deel-lip 1.5.0 (as at 0d1cdae), TensorFlow, float32, on these kernels
    assert orthogonal_convolution(kernel(*shape), stride=stride).item() == pytest.approx(theirs, rel=1e-6)


CASES = [  # shape, size, stride, dilation, groups
    ((3, 2, 3), (8,), 1, 1, 1),
    ((3, 2, 4), (12,), 3, 1, 1),
    ((5, 2, 3, 3), (6, 6), 1, 1, 1),
    ((9, 2, 3, 3), (6, 6), 2, 1, 1),
    ((6, 2, 3, 2), (8, 6), (2, 1), 1, 1),
    ((4, 2, 2, 2), (6, 6), 1, 2, 2),
    ((6, 1, 3, 2), (8, 6), 2, (1, 2), 2),
    ((3, 2, 2, 2, 2), (4, 4, 4), 2, 1, 1),
]


@pytest.mark.parametrize(("shape", "size", "stride", "dilation", "groups"), CASES)
def test_penalty_and_singular_values_are_those_of_the_operator(shape, size, stride, dilation, groups):
    w = kernel(*shape)
    a = brute(w, size, stride=stride, dilation=dilation, groups=groups)
    small = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    positions = a.shape[0] // shape[0]
    of = {"stride": stride, "dilation": dilation, "groups": groups}
    by_operator = (small - torch.eye(len(small), dtype=D)).square().sum() / positions
    assert orthogonal_convolution(w, **of).item() == pytest.approx(by_operator.item(), rel=1e-10)
    assert torch.allclose(convolution_singular_values(w, size, **of), torch.linalg.svdvals(a), atol=1e-10)


def test_orthogonal_kernels_have_penalty_zero_and_singular_values_one():
    shuffle = torch.eye(8, dtype=D).reshape(8, 2, 2, 2)
    shifts = torch.zeros(3, 3, 3, 3, dtype=D)
    for i, at in enumerate([(0, 0), (1, 2), (2, 1)]):
        shifts[i, i, *at] = 1
    for w, stride in ((shuffle, 2), (shifts, 1), (torch.cat([shuffle, torch.zeros(2, 2, 2, 2, dtype=D)]), 2)):
        assert orthogonal_convolution(w, stride=stride).item() == 0
        assert torch.allclose(convolution_singular_values(w, 6, stride=stride), torch.ones(1, dtype=D))


def test_a_transposed_convolution_counts_as_what_it_transposes():
    layer = nn.ConvTranspose2d(8, 2, 2, stride=2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(8).reshape(8, 2, 2, 2))
    assert orthogonal_convolution(layer).item() == 0
    wide = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
    assert torch.equal(orthogonal_convolution(wide), orthogonal_convolution(wide.weight, stride=2, groups=2))


def test_existence_is_what_descent_finds():
    # where none exists the least penalty is M - C k (deleting all but C k rows), where one does it is 0
    for m, c, k, s in [(6, 2, 3, 1), (2, 6, 3, 1), (3, 1, 2, 4), (5, 1, 2, 3), (4, 1, 3, 2)]:
        w = torch.randn(m, c, k, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_()
        lbfgs = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def again(w=w, s=s, lbfgs=lbfgs):
            lbfgs.zero_grad()
            loss = orthogonal_convolution(w, stride=s)
            loss.backward()
            return loss

        lbfgs.step(again)
        least = min(m, c * s) - c * min(k, s)
        assert orthogonal_convolution(w, stride=s).item() == pytest.approx(max(0, least), abs=1e-8)
        assert orthogonal_convolution_exists(m, c, (k,), stride=s) == (least <= 0)


def test_existence_is_the_theorem_on_equal_axes():
    for m, c, k, s, d in product((1, 3, 4, 8, 9, 27, 40), (1, 2, 3), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3)):
        theorem = (m > c * s**d or m <= c * k**d) and (m < c * s**d or s <= k)
        assert orthogonal_convolution_exists(m, c, (k,) * d, stride=s) == theorem
    assert not orthogonal_convolution_exists(4, 1, (3, 3), stride=(1, 4))  # every fourth column of pixels is never read
    assert orthogonal_convolution_exists(8, 4, 3, groups=4) == orthogonal_convolution_exists(2, 1, 3)


def test_half_precision_is_worked_on_in_float32():
    w = kernel(9, 2, 3, 3).bfloat16()
    assert orthogonal_convolution(w, stride=2) == orthogonal_convolution(w.float(), stride=2).bfloat16()


def test_singular_values_pass_gradients():
    w = kernel(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: convolution_singular_values(w, 5).square(), w)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: orthogonal_convolution(nn.Linear(3, 3)), "found no convolution in Linear"),
        (lambda: orthogonal_convolution(nn.Conv2d(3, 3, 3), stride=2), "with a bare weight only"),
        (
            lambda: orthogonal_convolution(torch.ones(2, 2, 3, 3), stride=(1, 1, 1)),
            r"for each of 2 axes, got \(1, 1, 1\)",
        ),
        (lambda: orthogonal_convolution(torch.ones(2, 2, 3), stride=0), "at least 1"),
        (lambda: orthogonal_convolution(torch.ones(3, 2, 3), groups=2), "divide the 3 outputs"),
        (lambda: orthogonal_convolution(torch.ones(1, 1, 1, 1, 1, 1)), "at most three axes"),
        (lambda: convolution_singular_values(torch.ones(2, 2, 3), 2), "not below the kernel's extent"),
        (lambda: convolution_singular_values(torch.ones(2, 2, 3), 5, stride=2), "multiple of the stride"),
        (lambda: convolution_singular_values(torch.full((2, 2, 3), torch.nan), 4), "finite numbers"),
        (lambda: orthogonal_convolution_exists(4, 3, 3, groups=2), "groups divide, got 4, 3 and 2 groups"),
        (lambda: orthogonal_convolution_exists(4, 3, (3, 3), stride=(1,)), "for each of 2 axes"),
    ],
)
def test_bad_input_is_one_sentence(call, words):
    with pytest.raises(BadInput, match=words):
        call()

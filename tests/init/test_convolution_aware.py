import math

import pytest
import torch
from torch import nn

from pondera._weights import owned
from pondera.errors import BadInput
from pondera.init import convolution_aware as module
from pondera.init.convolution_aware import convolution_aware_


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(*shape, seed=0, **kw):
    return convolution_aware_(torch.empty(shape, dtype=torch.float64), generator=generator(seed), **kw)


def grams(w):
    """One Gram matrix of the filters of each output unit, relative to its mean diagonal."""
    rows = w.flatten(2)
    gram = rows @ rows.mT
    return gram / gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]


# What the paper's own class (keras-contrib, commit 3fc5ef7) makes of one output unit without noise when each Gaussian
# array it draws is sin(1 + n + 1.7 j^1.1), n the number of the draw, j the flat index; divided by its norm. A singular
# vector's sign is LAPACK's choice, so filters are compared up to theirs.
AUTHORS = {
    (1, 2, 3, 3): [
        [0.182121, -0.270644, -0.270644, -0.154668, 0.28984, 0.271169, -0.154668, 0.271169, 0.28984],
        [0.175174, -0.079602, -0.079602, 0.350318, -0.205388, 0.205231, 0.350318, 0.205231, -0.205388],
    ],
    (1, 4, 5): [
        [-0.242771, -0.266503, 0.091985, 0.091985, -0.266503],
        [0.447038, -0.20972, -0.000241, -0.000241, -0.20972],
        [0.019458, 0.01326, -0.326682, -0.326682, 0.01326],
        [-0.426382, 0.141655, 0.170554, 0.170554, 0.141655],
    ],
}


@pytest.mark.parametrize("shape", AUTHORS)
def test_agrees_with_the_authors_class_on_the_same_draws(shape, monkeypatch):
    def wave(like, size, generator):
        _, draws, *one = size
        j = torch.arange(math.prod(one), dtype=torch.float64)
        return torch.stack([torch.sin(1.0 + n + 1.7 * j**1.1) for n in range(draws)]).reshape(size)

    monkeypatch.setattr(module, "_randn", wave)
    w = start(*shape, eps_std=0.0)
    ours, theirs = (w / w.norm()).flatten(2)[0], torch.tensor(AUTHORS[shape], dtype=torch.float64)
    signs = (ours * theirs).sum(1, keepdim=True).sign()
    assert torch.allclose(ours * signs, theirs, atol=2e-6)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 7), (8, 20, 3, 3), (4, 2, 3, 3, 3), (3, 7, 4, 4), (5, 6, 1, 1), (6, 1, 3, 3)])
def test_sample_variance_is_he_s(shape, exact):
    w = start(*shape, exact=exact)
    assert w.var(correction=0).item() == pytest.approx(2 / math.prod(shape[1:]), rel=1e-6)


def test_rows_of_the_spectrum_are_orthonormal_before_the_transform():
    a = torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=generator())
    rows = module._spectra(a, torch.ones(5, 2, 6, 1))
    assert torch.allclose(rows @ rows.mT, torch.eye(6, dtype=torch.float64).expand(5, 2, 6, 6), atol=1e-10)


def test_spectra_of_a_two_by_two_by_hand():
    # [[1, 2], [4, 1]] made symmetric from both triangles is [[1, 6], [6, 1]]: singular vectors (1, +-1) / sqrt 2
    rows = module._spectra(torch.tensor([[1.0, 2.0], [4.0, 1.0]]), torch.tensor([[1.0], [-1.0]]))
    h = 0.5**0.5
    assert torch.allclose(rows, torch.tensor([[h, h], [-h, h]])), "7 = 1 + 6 comes before |1 - 6| = 5"


def test_signs_are_drawn_and_not_lapack_s():
    # LAPACK's own signs give the first of two rows a mean first entry of -0.55, and filters of 3 taps a negative mean
    w = start(2000, 2, 3, eps_std=0.0)
    mean = w.mean() / w.std() * w.numel() ** 0.5
    assert abs(mean.item()) < 5  # standard errors; LAPACK's signs give -12


def test_the_released_filters_are_even_without_noise_and_not_orthogonal():
    w = start(8, 6, 3, 3, eps_std=0.0)
    assert torch.fft.rfft2(w).imag.abs().max() < 1e-12  # point-symmetric about tap (0, 0), cyclically
    off = grams(w) - torch.eye(6, dtype=torch.float64)
    assert off.abs().max() > 0.1


def test_noise_on_each_tap():
    empty = torch.empty(400, 6, 3, 3, dtype=torch.float64)
    plain, noisy = (module._released(empty, eps, generator()) for eps in (0.0, 0.05))
    assert (noisy - plain).std().item() == pytest.approx(0.05, rel=0.03)


@pytest.mark.parametrize("shape", [(4, 9, 3, 3), (4, 5, 5), (2, 8, 2, 2, 2)])
def test_exact_filters_are_orthogonal_in_space_and_in_fourier(shape):
    w = start(*shape, exact=True)
    eye = torch.eye(shape[1], dtype=torch.float64)
    assert (grams(w) - eye).abs().max() < 1e-10
    spectrum = torch.fft.fftn(w, dim=list(range(2, w.ndim))).flatten(2)
    gram = (spectrum @ spectrum.mH).abs()
    assert (gram / gram[0, 0, 0] - eye).abs().max() < 1e-10


def test_exact_beyond_the_number_of_taps_is_orthogonal_in_blocks():
    gram = grams(start(3, 22, 3, 3, exact=True))
    for block in (slice(0, 9), slice(9, 18), slice(18, 22)):
        inside = gram[:, block, block]
        assert (inside - torch.eye(inside.shape[-1], dtype=torch.float64)).abs().max() < 1e-10
    assert gram[:, :9, 9:].abs().max() > 0.1, "27 vectors in 9 dimensions"


def test_dense_weights_become_orthogonal():
    w = start(5, 8)
    assert torch.allclose(w @ w.mT, torch.eye(5, dtype=torch.float64), atol=1e-12)


def test_in_a_module_every_kind_has_its_rule_and_its_layout():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 10, 3, groups=2),
        nn.Flatten(),
        nn.Linear(10, 7),
    )
    model = model.double()
    biases = [model[i].bias.detach().clone() for i in (0, 2, 4)]
    convolution_aware_(model, exact=True, generator=generator())
    assert all(torch.equal(model[i].bias, b) for i, b in zip((0, 2, 4), biases, strict=True)), "biases are not touched"
    conv, transposed, dense = (one.read().detach() for one in owned(model))
    assert (grams(conv) - torch.eye(2)).abs().max() < 1e-10  # fan-in 4 / 2 channels
    assert conv.var(correction=0).item() == pytest.approx(2 / (2 * 9))
    # a transposed convolution keeps (in, out / groups, *kernel): an output channel reads 6 / 2 = 3 inputs
    assert transposed.shape == (10, 3, 3, 3)
    assert (grams(transposed) - torch.eye(3)).abs().max() < 1e-10
    assert transposed.var(correction=0).item() == pytest.approx(2 / (3 * 9))
    assert torch.allclose(dense @ dense.mT, torch.eye(7, dtype=torch.float64), atol=1e-12)


def test_equal_layers_get_different_weights():
    # the released class re-seeds at each call, so that equal shapes start equal
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    convolution_aware_(model, generator=generator())
    assert not torch.allclose(model[0].weight, model[1].weight)


@pytest.mark.parametrize("exact", [False, True])
def test_a_single_entry_is_finite(exact):
    draws = torch.cat([start(1, 1, 1, 1, seed=s, exact=exact).flatten() for s in range(400)])
    assert draws.var().item() == pytest.approx(2.0, rel=0.25)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (nn.Linear(3, 3), "found no convolution in Linear"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "torch.nn.init.orthogonal_"),
        (torch.ones(2, 2, 2, 2, 2, 2), "2 to 5 dimensions"),
        (torch.ones(3), "at least two dimensions"),
        (torch.empty(2, 2, 3, 3, device="meta"), "meta device"),
    ],
)
def test_bad_input_is_one_sentence(bad, words):
    with pytest.raises(BadInput, match=words):
        convolution_aware_(bad)


@pytest.mark.parametrize("eps", [-0.1, math.nan, math.inf])
def test_bad_noise(eps):
    with pytest.raises(BadInput, match="eps_std of at least 0"):
        convolution_aware_(torch.empty(2, 2, 3, 3), eps_std=eps)


def test_a_refused_model_is_left_as_it_was():
    dense = nn.Linear(3, 3)
    before = dense.weight.detach().clone()
    with pytest.raises(BadInput):
        convolution_aware_(dense)
    assert torch.equal(dense.weight, before)

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from pondera.adapters.svft import PATTERNS, Svft, SvftConfig, signed_svd
from pondera.errors import BadInput


def weight(out, n):
    """Fixed numbers, no two singular values of which are near each other."""
    return torch.sin((torch.arange(out * n) + 1.0) ** 2).view(out, n)


def core(w, **fields):
    return Svft(w, SvftConfig(**fields))


def fill(model, seed=0):
    """Coefficients from N(0, 1), as if trained."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(".m"):
            p.data.normal_(generator=g)
    return model


def test_by_hand():
    # U = V = I: the places are those of the weight itself
    w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    one = core(w, off_diagonal=1)
    assert one.place.tolist() == [0, 1, 3, 4, 5, 7, 8]
    one.m.data = torch.arange(1.0, 8.0)
    assert torch.allclose(one.delta(), torch.tensor([[1.0, 2, 0], [3, 4, 5], [0, 6, 7]]), atol=1e-6)
    assert torch.allclose(one(torch.tensor([[1.0, 0, 2]])), torch.tensor([[1.0, 13, 14]]), atol=1e-5)
    plain = core(w, pattern="plain")
    plain.m.data = torch.tensor([1.0, -2.0, 0.5])
    assert torch.allclose(plain.delta(), torch.diag(plain.m), atol=1e-6)


@pytest.mark.parametrize(("out", "n"), [(7, 7), (9, 5), (5, 9)])
@pytest.mark.parametrize("d", [0, 1, 3, 4, 50])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_number_of_coefficients(pattern, d, out, n):
    if pattern == "top_k" and out != n:
        return
    one, small = core(weight(out, n), pattern=pattern, off_diagonal=d), min(out, n)
    d = 0 if pattern == "plain" else min(d, small - 1)
    k = small * (2 * d + 1) - d * (d + 1)
    assert one.m.numel() == k == sum(p.numel() for p in one.parameters())
    assert one.place.tolist() == sorted(set(one.place.tolist()))
    if pattern in ("plain", "banded"):
        assert k == sum(abs(i - j) <= d for i in range(small) for j in range(small))
        assert all(abs(p // small - p % small) <= d for p in one.place.tolist())


@pytest.mark.parametrize(
    ("shape", "d", "first_row", "output", "merged", "gradient"),
    [
        # y[0], |y|, |W'|, |d sum(y) / d s| of LinearWithSVFT(lin, d, "banded") at 8303115d, its SparseTensor replaced by
        # a dense one, signs of the vectors as ours, coefficients cos(0), cos(1), ..., gate 0
        ((5, 4), 0, (0.171249, -1.469726, -0.083018, 0.891997, 0.544947), 3.024789, 3.538466, 1.055375),
        ((5, 4), 2, (0.081360, -1.346774, -0.288156, 1.290286, 0.576474), 2.961442, 3.587166, 1.363993),
        ((4, 6), 1, (1.842637, -1.213926, 1.548054, -0.571879), 4.132566, 4.013128, 0.028327),
        ((4, 4), 1, (0.524926, -1.275627, -1.341239, 1.140332), 3.865556, 3.344600, 1.138083),
    ],
)
def test_agrees_with_the_authors_code(shape, d, first_row, output, merged, gradient):
    out, n = shape
    layer = nn.Linear(n, out)
    layer.weight.data, layer.bias.data = weight(out, n), torch.arange(out) / 10
    net = get_peft_model(nn.Sequential(layer), SvftConfig(off_diagonal=d, target_modules=["0"]))
    m = net.base_model.model[0].cores["default"].m
    m.data = torch.cos(torch.arange(len(m)) * 1.0) / 2  # the gate's sigmoid(0)
    y = net(torch.cos(torch.arange(3 * n) * 0.7).view(3, n))
    y.sum().backward()
    assert y[0].tolist() == pytest.approx(first_row, abs=2e-6)
    assert y.norm().item() == pytest.approx(output, abs=5e-6)
    assert m.grad.norm().item() / 2 == pytest.approx(gradient, abs=5e-6)
    assert net.merge_and_unload()[0].weight.norm().item() == pytest.approx(merged, abs=5e-6)


def test_kaiming_start_has_the_size_of_the_authors():
    """Half of N(0, 2/k) on k places: |W' - W|^2 is 1/2 on average, whatever k; their code gave 0.486 on 200 x 200."""
    torch.manual_seed(0)
    for fields in ({"pattern": "plain"}, {"off_diagonal": 1}, {"off_diagonal": 8, "pattern": "random"}):
        sizes = [core(weight(60, 50), start="kaiming", **fields).delta().square().sum() for _ in range(40)]
        assert torch.stack(sizes).mean().item() == pytest.approx(0.5, rel=0.15)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 8), (11, 6), (6, 11)])
def test_the_change_is_zero_off_the_pattern(pattern, shape):
    if pattern == "top_k" and shape[0] != shape[1]:
        return
    one = fill(nn.ModuleList([core(weight(*shape).double(), pattern=pattern, off_diagonal=2)]))[0]
    U, _, Vt = torch.linalg.svd(weight(*shape).double(), full_matrices=False)  # signs of LAPACK's own
    seen = (U.T @ one.delta() @ Vt.T).abs() > 1e-12
    assert seen.flatten().nonzero().flatten().tolist() == one.place.tolist()
    x = torch.randn(3, 4, shape[1], dtype=torch.float64)
    assert torch.allclose(one(x), x @ one.delta().T)


def test_plain_keeps_the_singular_vectors():
    """The paper's statement on structure: W' has U and V, with values sigma + m."""
    w = weight(9, 6).double()
    one = core(w, pattern="plain")
    one.m.data = torch.linspace(-0.2, 0.3, 6, dtype=torch.float64)
    U, s, Vt = torch.linalg.svd(w, full_matrices=False)
    values = U.T @ (w + one.delta()) @ Vt.T
    assert torch.allclose(values, torch.diag(s + one.m), atol=1e-12)
    assert torch.allclose(U @ values @ Vt, w + one.delta(), atol=1e-12)


def test_a_full_pattern_reaches_any_square_target_and_no_pattern_leaves_the_spans():
    """The paper's statement on expressivity, and its limit: min(out, in) directions on the larger side."""
    w, target = weight(6, 6).double(), torch.randn(6, 6, dtype=torch.float64)
    one = core(w, off_diagonal=5)
    one.m.data = (one.U.T @ (target - w) @ one.Vt.T).flatten()
    assert torch.allclose(w + one.delta(), target, atol=1e-12)
    tall = fill(nn.ModuleList([core(weight(9, 4).double(), off_diagonal=3)]))[0]
    U = torch.linalg.svd(weight(9, 4).double())[0]
    assert torch.allclose(U[:, 4:].T @ tall.delta(), torch.zeros(5, 4, dtype=torch.float64), atol=1e-12)


def test_rank_of_the_change_is_that_of_its_coefficients():
    """The paper's statement on rank: up to min(k, n); with k = n plain coefficients all n, where LoRA's rank 1 has 1."""
    one = core(weight(12, 8).double(), pattern="plain")
    for k in range(9):
        one.m.data = torch.zeros(8, dtype=torch.float64)
        one.m.data[:k] = 1
        assert torch.linalg.matrix_rank(one.delta()) == k


def test_top_k_takes_the_best_aligned_vectors():
    w = weight(7, 7).double()
    one = core(w, pattern="top_k", off_diagonal=1)
    U, _, Vt = torch.linalg.svd(w)
    aligned = {(i, j): abs(float(U[:, i] @ Vt[j])) for i in range(7) for j in range(7)}
    best = sorted(aligned, key=aligned.get, reverse=True)[:19]
    assert one.place.tolist() == sorted(7 * i + j for i, j in best)


def test_random_places_follow_the_seed_and_are_saved(tmp_path):
    def net(seed):
        torch.manual_seed(seed)
        return get_peft_model(nn.Sequential(base()), SvftConfig(pattern="random", off_diagonal=1, target_modules=["0"]))

    def base():
        layer = nn.Linear(6, 6, bias=False)
        layer.weight.data = weight(6, 6)
        return layer

    places = [net(s).base_model.model[0].cores["default"].place.tolist() for s in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    trained, x = fill(net(0)), torch.randn(3, 6)
    trained.save_pretrained(tmp_path)
    torch.manual_seed(5)
    loaded = PeftModel.from_pretrained(nn.Sequential(base()), tmp_path)
    assert loaded.base_model.model[0].cores["default"].place.tolist() == places[0]
    assert torch.equal(loaded(x), trained(x))


def test_file_holds_coefficients_and_signature_alone(tmp_path):
    net = get_peft_model(nn.Sequential(nn.Linear(8, 6)), SvftConfig(off_diagonal=1, target_modules=["0"]))
    net.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {k.rpartition(".")[2]: tuple(v.shape) for k, v in saved.items()} == {"m": (16,), "signature": (3, 6)}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_refuses_another_base(tmp_path, low_cpu_mem_usage):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 40))
    trained = fill(get_peft_model(copy.deepcopy(base), SvftConfig(off_diagonal=1, target_modules=["0"])))
    trained.save_pretrained(tmp_path)
    x = torch.randn(3, 40)

    def load(net):
        return PeftModel.from_pretrained(net, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)

    assert torch.equal(load(copy.deepcopy(base))(x), trained(x))
    bfloat = copy.deepcopy(base).bfloat16()
    flipped = copy.deepcopy(base)
    flipped[0].weight.data[0] *= -1  # the same singular values
    for other in (nn.Sequential(nn.Linear(40, 40)), bfloat, flipped):
        with pytest.raises(BadInput, match="other singular vectors than those of this base weight"):
            load(other)
    with pytest.raises(BadInput, match=r"\(40 of 40 differ\)"):
        load(nn.Sequential(nn.Linear(40, 40)).double())


def test_a_base_in_half_precision_is_its_own_base(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(40, 40)).bfloat16()
    trained = fill(get_peft_model(copy.deepcopy(base), SvftConfig(off_diagonal=1, target_modules=["0"])))
    trained.save_pretrained(tmp_path)
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), trained(x))
    follows = get_peft_model(
        copy.deepcopy(base), SvftConfig(off_diagonal=1, target_modules=["0"]), autocast_adapter_dtype=False
    )
    fill(follows).save_pretrained(tmp_path / "half")  # vectors and signature in bfloat16
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "half", autocast_adapter_dtype=False)
    assert torch.equal(again(x), follows(x))


def test_signs_do_not_depend_on_the_library(monkeypatch):
    w, svd = weight(9, 7), torch.linalg.svd
    expected = signed_svd(w)

    def flipped(*args, **kwargs):
        U, s, Vt = svd(*args, **kwargs)
        sign = torch.tensor([1, -1, -1, 1, -1, 1, -1.0]).double()
        return U * sign, s, Vt * sign[:, None]

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert all(torch.equal(a, b) for a, b in zip(signed_svd(w), expected, strict=True))
    U, s, Vt = expected
    assert torch.allclose((U * s) @ Vt, w.double())


def test_another_algorithm_gives_the_same_vectors():
    """LAPACK's other driver, through SciPy: in float64 the vectors of a float32 weight agree to 1e-8."""
    from scipy.linalg import svd

    torch.manual_seed(0)
    w = torch.randn(300, 200)
    U, s, Vt = (torch.tensor(x) for x in svd(w.double().numpy(), full_matrices=False, lapack_driver="gesvd"))
    sign = torch.where((torch.arange(1, 301).double().sin() @ U) < 0, -1.0, 1.0).double()
    for ours, theirs in zip(signed_svd(w), (U * sign, s, Vt * sign[:, None]), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-8)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 9), Conv1D(9, 6), nn.Conv2d(3, 5, (2, 3), padding=1), nn.Embedding(12, 5)], ids=type
)
@pytest.mark.parametrize("pattern", ["plain", "banded", "random"])
def test_every_layer_kind_merges_what_it_computes(layer, pattern):
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(layer))
    x = {nn.Conv2d: torch.randn(2, 3, 6, 7), nn.Embedding: torch.arange(12)}.get(type(layer), torch.randn(4, 6))
    before = net(x)
    adapted = get_peft_model(net, SvftConfig(pattern=pattern, off_diagonal=1, target_modules=["0"]))
    assert torch.equal(adapted(x), before)
    y = fill(adapted)(x)
    assert (y - before).abs().max() > 0.1
    assert torch.allclose(adapted.merge_and_unload()(x), y, atol=1e-5)


def test_all_zero_weights_stay_within_finite_numbers():
    one = core(torch.zeros(5, 4), off_diagonal=1, start="kaiming")
    assert torch.isfinite(one.delta()).all()
    assert torch.isfinite(one.signature).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pattern": "band"}, "one of plain, banded, random, top_k, got 'band'; did you mean banded"),
        ({"start": "random"}, "one of zero, kaiming, got 'random'"),
        ({"off_diagonal": -1}, "at least 0 for off_diagonal, got -1"),
        ({"off_diagonal": 1.5}, "whole number"),
        ({"off_diagonal": True}, "whole number"),
    ],
)
def test_bad_configuration(fields, words):
    with pytest.raises(BadInput, match=words):
        SvftConfig(**fields)


def test_bad_layers():
    for bad in (torch.nan, torch.inf):
        w = weight(5, 5)
        w[2, 3] = bad
        with pytest.raises(BadInput, match="finite numbers, got 1 NaN"):
            core(w)
    net = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(BadInput, match=r"layer '0': SVFT's top_k .* needs a square weight, got \(4, 6\)"):
        get_peft_model(net, SvftConfig(pattern="top_k", target_modules=["0"]))
    with pytest.raises(BadInput, match="SVFT adapts Linear, Conv1D, Conv2d, Embedding layers, got LayerNorm"):
        get_peft_model(nn.Sequential(nn.LayerNorm(4)), SvftConfig(target_modules=["0"]))
    assert type(net[0]) is nn.Linear

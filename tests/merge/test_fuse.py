import pytest
import torch
from safetensors.torch import load_file, save_file

from pondera.errors import BadInput
from pondera.merge import fuse, fuse_files


def models(n=3):
    return [{"body.w": torch.full((2, 2), 2.0**i), "head.w": torch.full((2 + i, 2), float(i))} for i in range(n)]


def test_weights_by_hand():
    a, b, c = (m["body.w"] for m in models())
    assert torch.equal(fuse(models(), drop="head")["body.w"], torch.full((2, 2), 7 / 3))
    assert torch.equal(fuse(models(), [0.5, 0.25, 0.25], drop="head")["body.w"], 0.5 * a + 0.25 * b + 0.25 * c)
    assert torch.equal(fuse(models(), [0, 1, 0], drop="head")["body.w"], b)


def test_the_average_of_averages():
    g = torch.Generator().manual_seed(0)
    states = [{"w": torch.randn(50, generator=g)} for _ in range(4)]
    halves = [fuse(states[:2]), fuse(states[2:])]
    assert torch.allclose(fuse(halves)["w"], fuse(states)["w"], atol=1e-6)
    assert torch.allclose(fuse(states[::-1])["w"], fuse(states)["w"], atol=1e-6)
    assert torch.allclose(fuse([states[0]] * 3)["w"], states[0]["w"])
    assert torch.equal(fuse([states[0]] * 2)["w"], states[0]["w"])


def test_agrees_with_mergekit():
    """mergekit 0.1.5, its linear method on sin((0.7 + 0.1 k) n + k), n = 0 ... 29, k = 0, 1, 2, weights 0.2, 0.3, 0.5 and
    equal: position-weighted sums of the result."""
    waves = [{"w": torch.sin(torch.arange(30.0) * (0.7 + 0.1 * k) + k).view(6, 5)} for k in range(3)]
    place = torch.arange(1, 31, dtype=torch.float64)
    for weights, figure in AGREED.items():
        merged = fuse(waves, weights)["w"].double().flatten()
        assert (merged * place).sum().item() == pytest.approx(figure, abs=1e-4)


AGREED = {(0.2, 0.3, 0.5): 8.355411, None: 3.613594}


def test_heads_of_other_tasks_are_left_out_in_both_doors(tmp_path):
    paths = []
    for i, m in enumerate(models()):
        save_file(m, tmp_path / f"{i}.safetensors")
        paths.append(tmp_path / f"{i}.safetensors")
    fused = fuse(models(), drop=["head"])
    assert list(fused) == ["body.w"]
    report = fuse_files(paths, tmp_path / "out.safetensors", [0.2, 0.3, 0.5], drop=["head"])
    assert [t.name for t in report.tensors] == ["body.w"]
    got = load_file(tmp_path / "out.safetensors")
    assert list(got) == ["body.w"]
    assert torch.equal(got["body.w"], fuse(models(), [0.2, 0.3, 0.5], drop="head.w")["body.w"])
    with pytest.raises(BadInput, match=r"head\.w \(2, 2\) against \(3, 2\)"):
        fuse_files(paths, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("weights", "drop", "words"),
    [
        ([0.5, 0.5], "head", "a weight for each of its 3 models, got 2"),
        ([0.5, 0.5, 0.5], "head", r"add up to one, got \[0.5, 0.5, 0.5\] with sum 1.5"),
        ([-0.5, 1, 0.5], "head", "not negative"),
        ([float("nan"), 1, 0], "head", "not negative"),
        (None, "haed", "nothing called 'haed'; did you mean head"),
        (None, "ead", "nothing called 'ead'"),
        (None, ["head", "body"], "no tensor in model 1"),
    ],
)
def test_refused_in_one_sentence(weights, drop, words):
    with pytest.raises(BadInput, match=words) as error:
        fuse(models(), weights, drop=drop)
    assert "\n" not in str(error.value)

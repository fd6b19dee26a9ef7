"""`pondera compress` and `pondera zoo` as a user types them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pondera.cli import _app


@pytest.fixture
def pondera(tmp_path, monkeypatch, capsys):
    """`pondera ...` in this process, in a folder with a model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file({"a.weight": torch.randn(8, 16), "a.bias": torch.randn(8)}, "m.safetensors")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pondera", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            _app.main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=left.value.code or 0, stdout=said.out, stderr=said.err)

    return run


def refused(result, words):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert words in lines[0]


def test_each_command_writes_and_tells(pondera):
    for args, words in (
        (("svd", "m.safetensors", "-o", "s.safetensors", "--keep", "0.5", "--merged"), "factored, rank 2"),
        (("quantize", "m.safetensors", "-o", "q.safetensors", "--bits", "3"), "quantised, bits 3"),
        (("prune", "m.safetensors", "-o", "p.safetensors", "--pattern", "2:4"), "pruned"),
    ):
        done = pondera("compress", *args)
        assert done.returncode == 0, done.stderr
        assert words in done.stdout
        assert "a.weight" in done.stdout
        assert "written" in done.stdout
    assert torch.linalg.matrix_rank(load_file("s.safetensors")["a.weight"], rtol=1e-4) == 2
    assert set(load_file("q.safetensors")) == {"a.codes", "a.scale", "a.bias"}
    assert (load_file("p.safetensors")["a.weight"].unflatten(1, (4, 4)) != 0).sum(2).eq(2).all()
    told = json.loads(pondera("compress", "prune", "m.safetensors", "-o", "j.safetensors", "--json").stdout)
    assert told["layers"][0]["numbers"] == 64


def test_compress_refuses_in_words(pondera):
    refused(pondera("compress", "svd", "gone", "-o", "x"), "gone")
    refused(pondera("compress", "svd", "m.safetensors", "-o", "x.safetensors", "--keep", "2"), "at most 1")
    refused(pondera("compress", "quantize", "m.safetensors", "-o", "x.safetensors", "--bits", "1"), "bits of 2 to 8")
    refused(
        pondera("compress", "prune", "m.safetensors", "-o", "x.safetensors", "--calibration", "m.safetensors"), "config"
    )


def test_a_zoo_is_made_shown_and_goes_on(pondera):
    small = ("--n", "5", "--set", "steps=2", "--set", "width=6", "-q")
    done = pondera("zoo", "make", "digits-inrs", "-o", "zoo", *small)
    assert done.returncode == 0, done.stderr
    assert "5 networks, 67 numbers each" in done.stdout.replace("\n", " ")
    assert pondera("zoo", "make", "digits-inrs", "-o", "zoo", *small).returncode == 0
    assert "label" in pondera("zoo", "show", "zoo").stdout
    assert "transformers" in pondera("zoo", "list").stdout
    refused(pondera("zoo", "make", "digits-inr", "-o", "zoo2"), "did you mean digits-inrs")
    refused(pondera("zoo", "make", "classifiers", "-o", "zoo2", "--set", "width"), "NAME=NUMBER")
    refused(pondera("zoo", "make", "digits-inrs", "-o", "zoo", "--n", "6"), "another recipe")
    refused(pondera("zoo", "show", "m.safetensors"), "no zoo")


def test_export_refuses_in_words(pondera):
    refused(pondera("export", "m.safetensors", "-o", "x.safetensors"), "no finished customization")
    refused(pondera("export", "m.safetensors", "-o", "x.bin"), ".safetensors file")
    refused(pondera("export", ".", "-o", "x.safetensors", "--form", "gguf"), "diffusers, kohya, comfyui")

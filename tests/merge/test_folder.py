"""Folders as Hugging Face has them: what is written beside the weights, dtypes, the hub's cache, old folders, the card."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pondera.errors import BadInput
from pondera.merge import _stream, bang_files, fuse, fuse_files, merge_recipe, model_stock_files, wise_ft_files

SHA = "0123456789abcdef0123456789abcdef01234567"


def write(folder, value, dtype=torch.float32, parts=1, **config):
    """A folder with a config, a tokenizer and weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": "float32"} | config))
    (folder / "tokenizer.json").write_text(f"tokens of {folder.name}")
    (folder / "notes.txt").write_text("mine")
    state = {f"layer.{i}.weight": torch.full((4, 8), value + i, dtype=dtype) for i in range(3)}
    state |= {"n": torch.tensor(3), "phase": torch.full((2,), 1j * value, dtype=torch.complex64)}
    if parts == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for i in range(parts):
        some = dict(list(state.items())[i::parts])
        save_file(some, folder / f"model-{i + 1:05d}-of-{parts:05d}.safetensors")
        where |= dict.fromkeys(some, f"model-{i + 1:05d}-of-{parts:05d}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def numbers(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def head_of(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def recipe_of(folder):
    return (folder / "README.md").read_text().split("```yaml\n")[1].split("```")[0]


@pytest.fixture
def two(tmp_path):
    return [write(tmp_path / "a", 0.0), write(tmp_path / "b", 2.0, parts=2)]


def test_a_folder_gives_a_folder_with_all_that_belongs_to_the_base(two, tmp_path):
    out = tmp_path / "out"
    report = fuse_files(two, out)
    names = ["model.safetensors", "config.json", "tokenizer.json", "README.md"]
    assert [f.name for f in report.files] == names
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    assert (out / "tokenizer.json").read_text() == "tokens of a"
    assert (out / "config.json").read_bytes() == (two[0] / "config.json").read_bytes()
    assert torch.equal(numbers(out)["layer.2.weight"], torch.full((4, 8), 3.0))
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    fuse_files([two[0] / "model.safetensors", two[1]], tmp_path / "alone.safetensors")  # a file gives a file
    with pytest.raises(BadInput, match="ends in .safetensors, or a shard size"):
        fuse_files([two[0] / "model.safetensors", two[1]], tmp_path / "other")


def test_shards_have_the_size_of_transformers_unless_told_otherwise(two, tmp_path, monkeypatch):
    import inspect

    transformers = pytest.importorskip("transformers")
    theirs = inspect.signature(transformers.PreTrainedModel.save_pretrained).parameters["max_shard_size"].default
    assert theirs in (_stream.SHARD, "5GB")  # of transformers 5, and of 4
    monkeypatch.setattr(_stream, "SHARD", "300B")
    fuse_files(two, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    fuse_files(two, tmp_path / "told", shard_size="150B")
    assert len(list((tmp_path / "told").glob("*.safetensors"))) == 4


def test_the_dtype_asked_for_is_written_and_said(two, tmp_path):
    write(tmp_path / "h", 1.0, torch.float16)
    for dtype in ("bfloat16", torch.bfloat16):
        report = fuse_files([*two, tmp_path / "h"], tmp_path / "out", dtype=dtype, replace=True)
    got = numbers(tmp_path / "out")
    assert {k: str(x.dtype)[6:] for k, x in got.items()} == {
        "layer.0.weight": "bfloat16", "layer.1.weight": "bfloat16", "layer.2.weight": "bfloat16", "n": "int64",
        "phase": "complex64",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert yaml.safe_load(recipe_of(tmp_path / "out"))["dtype"] == "bfloat16"
    said = "complex64 and float32, model 2 complex64 and float32, model 3 complex64 and float16"
    assert (
        f"dtypes: read model 1 {said}; computed in complex64 and float32; written as bfloat16 and complex64"
        in report.summary()
    )
    assert report.to_json()["dtypes"] == report.dtypes
    assert fuse_files(two, tmp_path / "plain").dtypes == ""
    wide = fuse_files([two[0]] * 2, tmp_path / "wide", dtype="float64")
    assert wide.dtypes.startswith("dtypes: read complex64 and float32; computed in complex64 and float64; written")
    with pytest.raises(
        BadInput, match=r"cannot write numbers as 'int8'; it can as float64, float32, float16, bfloat16"
    ):
        fuse_files(two, tmp_path / "none", dtype="int8")
    with pytest.raises(BadInput, match="would write NaN or infinity into layer.0.weight, which is float16"):
        fuse_files([write(tmp_path / "big", 1e6)] * 2, tmp_path / "none", dtype="float16")
    assert not (tmp_path / "none").exists()


def test_mixed_dtypes_are_said_in_memory_too():
    report = fuse([{"w": torch.ones(2).bfloat16()}, {"w": torch.ones(2)}]).report
    assert report.dtypes == "dtypes: read model 1 bfloat16, model 2 float32; computed in float32; written as bfloat16"
    assert report.dtypes in report.summary()


def test_nested_configs_are_told_the_dtype(two, tmp_path):
    (two[0] / "config.json").write_text(json.dumps({"text_config": {"dtype": "float32"}, "n": 1}))
    fuse_files(two, tmp_path / "out", dtype="float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"text_config": {"dtype": "float16"}, "n": 1}
    (two[0] / "config.json").write_text("{}")
    fuse_files(two, tmp_path / "out", dtype="float16", replace=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float16"}


# -- old folders ------------------------------------------------------------------------------------------------------


def test_an_old_folder_is_replaced_when_told_and_only_by_a_whole_one(two, tmp_path):
    out = write(tmp_path / "out", 7.0)
    (out / "old.txt").write_text("old")
    with pytest.raises(BadInput, match="into a new folder only, and .*out exists .*--replace") as error:
        fuse_files(two, out)
    assert "\n" not in str(error.value)
    bad = write(tmp_path / "bad", float("nan"))
    with pytest.raises(BadInput, match="NaN"):
        fuse_files([two[0], bad], out, replace=True)
    assert (out / "old.txt").read_text() == "old"
    fuse_files(two, out, replace=True)
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "bad", "out"]


def test_what_is_read_and_what_is_no_model_is_never_replaced(two, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "thesis.txt").write_text("years of work")
    (tmp_path / "link").symlink_to(two[1])
    save_file({"w": torch.ones(1)}, tmp_path / "loose.safetensors")
    for out, words in (
        (two[1], "would replace .*b, in which model 2 .* lies"),
        (tmp_path, "would replace .*, in which model 1 .* lies"),
        (tmp_path / "texts", "only a folder with a model in it"),
        (tmp_path / "link", "into a new folder only"),
    ):
        with pytest.raises(BadInput, match=words):
            fuse_files(two, out, replace=True)
    assert (tmp_path / "texts" / "thesis.txt").exists()
    assert len(list(two[1].iterdir())) == 6


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(two, tmp_path, monkeypatch):
    out, rename = write(tmp_path / "out", 7.0), os.replace

    def failing(a, b):
        if os.fspath(b) == str(out) and not os.fspath(a).endswith(".old"):
            raise OSError("no")
        rename(a, b)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        fuse_files(two, out, replace=True)
    assert (out / "notes.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]


# -- the hub's cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache laid out as huggingface_hub does it, numbers behind links."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, value, **kwargs):
        top = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        folder = write(top / "snapshots" / SHA, value, **kwargs)
        (top / "refs").mkdir()
        (top / "refs" / "main").write_text(SHA)
        (top / "blobs").mkdir()
        for i, file in enumerate(sorted(folder.iterdir())):
            shutil.move(file, top / "blobs" / str(i))
            file.symlink_to(os.path.relpath(top / "blobs" / str(i), folder))
        return folder

    return add


def test_ids_of_the_hub_are_found_in_its_cache_and_pinned_on_the_card(cache, tmp_path, two):
    cache("org/base", 0.0, parts=2), cache("org/tuned", 2.0), cache("tuned2", 4.0)
    out = tmp_path / "out"
    report = model_stock_files("org/base", [f"org/tuned@{SHA}", "tuned2"], out)
    assert {t.facts["t"] for t in report.merged if t.name.startswith("layer")} == {1.0}
    head = head_of(out)
    assert head["base_model"] == ["org/base", "org/tuned", "tuned2"]
    assert set(head["tags"]) >= {"merge"} and head["base_model_relation"] == "merge"
    made = yaml.safe_load(recipe_of(out))
    assert made == {
        "merge_method": "model_stock", "base_model": f"org/base@{SHA}",
        "models": [{"model": f"org/tuned@{SHA}"}, {"model": f"tuned2@{SHA}"}],
    }  # fmt: skip
    merge_recipe(made, tmp_path / "again")
    assert all(torch.equal(x, numbers(tmp_path / "again")[k]) for k, x in numbers(out).items())
    assert not any((out / name).is_symlink() for name in os.listdir(out))
    fuse_files(["org/tuned", two[0]], tmp_path / "both")
    assert head_of(tmp_path / "both")["base_model"] == ["org/tuned"]


def test_what_is_not_in_the_cache_is_asked_for_and_nothing_downloaded(cache, tmp_path, monkeypatch):
    import socket

    def never(*args, **kwargs):
        raise AssertionError("went out to the net")

    monkeypatch.setattr(socket, "create_connection", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    folder = cache("org/half", 0.0, parts=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    for given, words in (
        ("org/none", r"no file or folder org/none here, and no such model in the hub's cache .*`hf download org/none`"),
        ("org/half@v1.0", r"`hf download org/half --revision v1.0`"),
        ("org/half", r"without model-00002-of-00002.safetensors; `hf download org/half` brings it whole"),
        ("../none", "cannot read"),
    ):
        with pytest.raises(BadInput, match=words) as error:
            fuse_files([given, given], tmp_path / "out.safetensors")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out.safetensors").exists()


# -- the card ---------------------------------------------------------------------------------------------------------


def test_every_method_writes_the_recipe_that_makes_it_again(two, tmp_path):
    a, b = two
    c = write(tmp_path / "c", 3.0)
    merges = {
        "equal": lambda out: fuse_files([a, b, c], out),
        "weights": lambda out: fuse_files([a, b, c], out, [0.2, 0.3, 0.5], drop="layer.1"),
        "stock": lambda out: model_stock_files(a, [b, c], out, filter_wise=True),
        "wise": lambda out: wise_ft_files(a, b, out, 0.3),
        "bang": lambda out: bang_files(a, b, out, 0.3, head=["layer.2"], scale=0.5, dtype="bfloat16"),
    }
    for name, merge in merges.items():
        report, file = merge(tmp_path / name), tmp_path / f"{name}.yml"
        file.write_text(recipe_of(tmp_path / name))
        again = merge_recipe(file, tmp_path / f"{name}2")
        assert again.tensors == report.tensors, name
        one, other = numbers(tmp_path / name), numbers(tmp_path / f"{name}2")
        assert list(one) == list(other)
        assert all(torch.equal(x, other[k]) and x.dtype == other[k].dtype for k, x in one.items()), name
        with safe_open(tmp_path / name / "model.safetensors", framework="pt") as kept:
            assert kept.metadata() == {"format": "pt", "merge_recipe": file.read_text()}


def test_a_fingerprint_tells_models_apart(two, tmp_path):
    def prints(out):
        return [line.split("`")[3] for line in (out / "README.md").read_text().splitlines() if "fingerprint `" in line]

    fuse_files(two, tmp_path / "one")
    shutil.copytree(two[1], tmp_path / "copy")
    fuse_files([two[0], tmp_path / "copy"], tmp_path / "same")
    assert prints(tmp_path / "one") == prints(tmp_path / "same")
    assert len(set(prints(tmp_path / "one"))) == 2
    save_file(numbers(two[0]) | {"n": torch.tensor(4)}, two[0] / "model.safetensors", metadata={"format": "pt"})
    fuse_files(two, tmp_path / "other")
    assert prints(tmp_path / "other")[0] != prints(tmp_path / "one")[0]
    text = (tmp_path / "one" / "README.md").read_text()
    for words in ("arXiv 2204.03044", "change relative to the base", "pondera 0", "torch ", "SHA-256"):
        assert words in text
    assert "base_model" not in head_of(tmp_path / "one"), "a path is no model of the hub"

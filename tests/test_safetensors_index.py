"""An index of safetensors files may not name a file outside its folder; every reader refuses it before a shard is opened."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pondera import _safetensors
from pondera.errors import BadInput
from pondera.init import select_file
from pondera.merge import fuse_files

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    """A folder with an index, and a file beside the folder that it should never read. Gives a writer of the index."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(2, 2)}, folder / "here.safetensors")
    save_file({"a": torch.full((2, 2), 2.0)}, folder / "sub" / "below.safetensors")
    save_file({"a": torch.full((2, 2), 3.0)}, tmp_path / "secret.safetensors")

    def named(file):
        (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
        return folder

    return named


OUTSIDE = [
    "../secret.safetensors", "sub/../../secret.safetensors", "sub/./../../model/../secret.safetensors", "..", "../model",
    "/etc/passwd", "//host/share/x.safetensors", "..\\secret.safetensors", "sub\\..\\..\\secret.safetensors",
    "C:\\secret.safetensors", "C:secret.safetensors", "\\secret.safetensors", "\\\\host\\share\\x.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", [*OUTSIDE, None])
def test_outside_its_folder_is_refused_before_anything_is_opened(file, model, tmp_path, monkeypatch):
    folder = model(file or str(tmp_path / "secret.safetensors"))
    opened = []
    monkeypatch.setattr(_safetensors, "safe_open", lambda *a, **k: opened.append(a))
    readers = (
        lambda: fuse_files([folder, folder], tmp_path / "out.safetensors"),
        lambda: fuse_files([folder / INDEX, folder], tmp_path / "out.safetensors"),
        lambda: select_file(folder / INDEX, folder / INDEX, tmp_path / "out.safetensors"),
    )
    for read in readers:
        with pytest.raises(BadInput, match=r"^\w+ refuses .*index\.json, which names a file outside its folder: '.*'$"):
            read()
    assert opened == []
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("here.safetensors", 1),
        ("./here.safetensors", 1),
        ("sub/below.safetensors", 2),
        ("sub/../here.safetensors", 1),
        ("no_such/../here.safetensors", 1),
    ],
)
def test_inside_is_read(file, value, model, tmp_path):
    fuse_files([model(file), model(file)], tmp_path / "out.safetensors")
    assert (load_file(tmp_path / "out.safetensors")["a"] == value).all()


def test_links_are_followed_but_not_by_way_of_two_dots(model, tmp_path):
    folder = model("linked.safetensors")  # as the cache of the hub has its files: links to blobs elsewhere
    (folder / "linked.safetensors").symlink_to(tmp_path / "secret.safetensors")
    fuse_files([folder, folder], tmp_path / "out.safetensors")
    assert (load_file(tmp_path / "out.safetensors")["a"] == 3).all()
    (tmp_path / "far" / "away").mkdir(parents=True)
    save_file({"a": torch.full((2, 2), 4.0)}, tmp_path / "far" / "here.safetensors")
    (folder / "link").symlink_to(tmp_path / "far" / "away")
    model("link/../here.safetensors")  # the system would go to far/here.safetensors
    fuse_files([folder, folder], tmp_path / "out.safetensors")
    assert (load_file(tmp_path / "out.safetensors")["a"] == 1).all()


@pytest.mark.parametrize("file", ["", ".", 3, None, ["here.safetensors"], "no_such.safetensors", "nul\0.safetensors"])
def test_what_is_no_name_of_a_file(file, model, tmp_path):
    folder = model(file)
    with pytest.raises(BadInput, match="cannot read") as error:
        fuse_files([folder, folder], tmp_path / "out.safetensors")
    assert "\n" not in str(error.value)

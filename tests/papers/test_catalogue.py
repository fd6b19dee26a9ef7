"""The catalogue agrees with the code: rows name what exists, and what exists is named."""

import importlib
import inspect
import re

import pytest

from pondera.errors import BadInput
from pondera.papers import catalogue, paper, status
from pondera.replications import evidence, keys
from pondera.replications._claims import evidence_folder

ROOMS = ("init", "parametrize", "nn", "penalties", "optim", "probe", "adapters", "merge")


def test_all_rows_are_there_and_whole():
    rows = catalogue()
    assert len(rows) == 195
    assert len({p.key for p in rows}) == 195
    for p in rows:
        assert p.title
        assert re.fullmatch(r"[a-z0-9-]+", p.key)
        assert re.fullmatch(r"(\d{4}\.\d{4,5}|[a-z-]+/\d{7})?", p.arxiv), p.key
        assert len(p.summary) > 60, p.key
        assert p.use, p.key
        assert p.avoid, p.key
        assert len(p.words) >= 4, p.key
        if re.match(r"\d{4}\.", p.arxiv):
            assert p.year == 2000 + int(p.arxiv[:2]), p.key


@pytest.mark.parametrize("p", [p for p in catalogue() if p.objects], ids=lambda p: p.key)
def test_every_object_named_resolves(p):
    for value in p.resolve():
        assert callable(value)


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_object_is_named_by_a_row(room):
    named = {path for p in catalogue() for path in p.objects}
    # serve every matrix optimizer, every merge
    shared = {"pondera.optim.groups", "pondera.merge.MergedState"}
    module = importlib.import_module(f"pondera.{room}")
    results = {
        n
        for n in module.__all__
        if inspect.isclass(getattr(module, n)) and hasattr(getattr(module, n), "__dataclass_fields__")
    }
    for name in module.__all__:
        if name not in results and name.islower() | name[0].isupper():
            assert f"pondera.{room}.{name}" in named | shared, f"pondera.{room}.{name} is in no row"


def test_status_is_derived():
    assert {status(p) for p in catalogue()} <= {"planned", "built", "tested"}
    for p in catalogue():
        assert (status(p) == "planned") == (not p.objects)
        assert (status(p) == "tested") == bool(p.objects and (evidence_folder() / p.room / f"{p.key}.json").is_file())


def test_every_built_row_of_ours_has_replication_and_evidence():
    for p in catalogue():
        if p.objects:
            assert p.key in keys(), f"{p.key} has objects and no replication"
            assert evidence(p.key), f"{p.key} has objects and no evidence"


def test_unknown_key_names_the_nearest():
    with pytest.raises(BadInput, match="did you mean lsuv"):
        paper("lsvu")

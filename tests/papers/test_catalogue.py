"""The catalogue agrees with the code: rows name what exists, and what exists is named."""

import importlib
import inspect
import re
from dataclasses import replace

import pytest

from pondera._sources import evidence_folder
from pondera.errors import BadInput
from pondera.papers import catalogue, instead, paper, replications, status, to_reproduce
from pondera.papers import evidence as found_by
from pondera.replications import evidence, keys, room

ROOMS = ("init", "parametrize", "nn", "penalties", "optim", "probe", "adapters", "merge", "compress", "weightspace")


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
    shared = {"pondera.optim.groups", "pondera.optim.spread", "pondera.optim.gather_state"}
    shared |= {"pondera.merge.MergedState", "pondera.merge.merge_recipe"}
    shared |= {
        f"pondera.nn.{name}" for name in ("act_on", "equivariance_error", "group_element", "rate_groups", "swap_linear")
    }
    kept = ("LowRankLinear", "bake", "cost", "density", "hold_masks", "magnitude_prune", "masks_of", "quantize")
    files = ("load_compressed", "prune_files", "quantize_files", "svd_files", "trim_files")
    shared |= {f"pondera.compress.{name}" for name in (*kept, *files, "quantize_tensor")}
    states = ("Standardize", "equivariance_error", "permute_states", "stack_states", "unstack_states")
    zoo = ("coordinates", "fit_inrs", "load_zoo", "make_zoo", "run_states", "siren", "start_states", "train_states")
    tools = (*states, *zoo, "zoo_kinds", "apply_permutation", "trace_permutations")
    shared |= {f"pondera.weightspace.{name}" for name in tools}
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


def test_replications_and_evidence_are_found_without_importing_one():
    assert replications() == {key: room(key) for key in keys()}
    for p in catalogue():
        assert (status(p) == "tested") == bool(p.objects and evidence(p.key))


@pytest.mark.parametrize(
    "name",
    [
        "lsuv",
        "LSUV",
        " Lsuv ",
        "1511.06422",
        "1511.06422v7",
        "arXiv:1511.06422",
        "https://arxiv.org/abs/1511.06422",
        "http://www.arxiv.org/pdf/1511.06422v2.pdf",
        "All you need is a good init",
        "lsuv_",
        "pondera.init.lsuv_",
    ],
)
def test_a_paper_by_any_of_its_names(name):
    assert paper(name).key == "lsuv"


def test_titles_short_titles_and_every_number():
    assert paper("KAN: Kolmogorov-Arnold Networks").key == paper("kan").key == "kan"
    assert paper("T-LoRA").key == "t-lora"
    for p in catalogue():
        assert paper(p.title).key == p.key
        if p.arxiv:
            assert paper(f"https://arxiv.org/abs/{p.arxiv}v3").key == p.key


def test_a_name_of_nothing_and_a_name_of_several(monkeypatch):
    with pytest.raises(BadInput, match=r"no paper has the key '2999\.99999'"):
        paper("2999.99999")
    with pytest.raises(BadInput, match="no paper has the key ''"):
        paper("")
    twins = tuple(replace(paper("lsuv"), key=key) for key in ("one", "two"))
    monkeypatch.setattr("pondera.papers.catalogue", lambda: twins)
    with pytest.raises(BadInput, match="'lsuv_' is in several papers: one, two; name one of them"):
        paper("lsuv_")


def test_what_is_built_and_near_a_planned_row():
    for p in [p for p in catalogue() if not p.objects]:
        near = instead(p)
        assert len(near) == 3
        assert all(q.objects for q in near)
    assert any(q.room == "optim" for q in instead(paper("shampoo-4bit")))
    assert paper("lsuv") not in instead(paper("lsuv"))


def test_a_planned_row_has_nothing_to_reproduce():
    planned = next(p for p in catalogue() if not p.objects and p.key not in keys())
    with pytest.raises(BadInput, match=f"{planned.key} is planned, with no claim to re-run yet; built and near it are"):
        to_reproduce(planned.key)
    assert to_reproduce("1511.06422") == to_reproduce("LSUV") == "lsuv"
    assert to_reproduce("calibration") == "calibration"  # a replication that is no paper's
    with pytest.raises(BadInput, match="did you mean calibration"):
        to_reproduce("calibratoin")


def test_unknown_key_names_the_nearest():
    with pytest.raises(BadInput, match="did you mean lsuv"):
        paper("lsvu")


def test_headlines_agree_with_verdicts():
    for p in catalogue():
        assert bool(p.came_to) == bool(p.headline), p.key
        if not p.came_to:
            continue
        assert p.came_to in found_by.HEADLINES, p.key
        assert 20 < len(p.headline) <= 320, f"{p.key}: a headline is one sentence, and has {len(p.headline)} letters"
        found = found_by.counts(p.key)
        needed = {
            "helps": ("holds",),
            "exact": ("holds",),
            "only when": ("holds",),
            "no gain shown": ("refuted", "undecided"),
            "not testable here": ("not testable here",),
        }[p.came_to]
        assert any(o in found for o in needed), f"{p.key}: {p.came_to}, and its claims: {found}"
        assert p.came_to != "not testable here" or len(found) == 1, p.key
        assert not found_by.stale(p.key), f"{p.key}: a headline needs evidence that fits its sources"

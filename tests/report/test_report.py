"""The report as text: what it says, that it says it safely, and that the code it gives does what the lab did."""

import inspect
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pondera.doctor._snippet import snippet
from pondera.errors import BadInput
from pondera.lab import Recipe, load_task
from pondera.lab.plan import Tried
from pondera.lab.recipe import CALIBRATION, ROOMS, names
from pondera.lab.results import Comparison, Row
from pondera.lab.space import Point
from pondera.lab.stats import difference
from pondera.lab.train import schedule
from pondera.report import _comparison as report_module
from pondera.report._comparison import render, write
from pondera.report._drawn import fate
from pondera.report._figures import counts

nan, inf = math.nan, math.inf
GRID = (0.001, 0.0031622776601683794, 0.01, 0.1)
BASE = [0.95, 0.96, 0.955]
TUNING = [
    (0.001, 0.5, nan),
    (GRID[1], 0.9, 0.95),
    (0.01, 0.8, 0.94),
    (0.1, nan, nan),
]  # rate, after a quarter, at the end
NAN = "diverged: training loss became nan at step 3"
SIGNAL = [
    {"layer": "0", "kind": "Linear", "role": "weight", "variance": 9.0, "signal": 1.0},
    {"layer": "1", "kind": "ReLU", "role": "activation", "variance": 9.0, "signal": 0.5},
    {"layer": "2", "kind": "Linear", "role": "weight", "variance": 9.0, "signal": 1e-6},
    {"layer": "4", "kind": "Linear", "role": "weight", "variance": 9.0, "signal": 0.0},
]


def unit(tuning: list[tuple[float, float, float]]) -> list[Tried]:
    """A unit's trials; those without any figure failed."""
    return [Tried(Point(x), a, b, NAN if math.isnan(a) and math.isnan(b) else "") for x, a, b in tuning]


def row(recipe: str, scores: list[float], base: list[float] | None = None, comparisons: int = 1, **over: Any) -> Row:
    recipe_ = Recipe.parse(recipe)
    both = [(a, b) for a, b in zip(scores, base or []) if math.isfinite(a) and math.isfinite(b)]
    d = difference(*map(list, zip(*both)), comparisons=comparisons) if len(both) > 1 else None
    failed = {i: "diverged: training loss became nan at step 7" for i, s in enumerate(scores) if math.isnan(s)}
    given: dict[str, Any] = {
        "spec": recipe, "name": recipe_.name, "recipe": recipe_, "edge": 0, "scores": scores,
        "chosen": [None if math.isnan(s) else Point(GRID[1]) for s in scores], "trials": [unit(TUNING)] * len(scores),
        "failed": failed, "difference": d, "at_equal_time": d, "step_seconds": 0.00142, "start_seconds": 0.02,
        "parameters": 100, "signal": SIGNAL, "baseline": base is None,
        "curves": [[[0, 0.0, 0.1, nan], [10, 0.1, 0.8, 1.0], [20, 0.2, s, 0.5]] for s in scores],
    }  # fmt: skip
    return Row(**(given | over))


def comparison(*rows: Row, **over: Any) -> Comparison:
    given: dict[str, Any] = {
        "task": load_task("digits"), "rows": list(rows), "seeds": len(rows[0].scores), "steps": 20, "rates": GRID,
        "runs": 30, "repeated": 4, "seconds": 12.3, "versions": {"pondera": "0.1.0", "torch": "2.6"},
    }  # fmt: skip
    return Comparison(**(given | over))


def failed(recipe: str, base: list[float] | None = None) -> Row:
    none = [unit([(x, nan, nan) for x in GRID])] * 3
    return row(recipe, [nan] * 3, base, step_seconds=nan, start_seconds=nan, trials=none, curves=[[]] * 3)


ALL = comparison(
    row("", BASE),
    row("init=orthogonal", [s + 0.1 for s in BASE], BASE),
    row("optim=SGD(momentum=0.9)", [0.85, 0.86, 0.851], BASE),
    row("penalty=norm_loss", [0.951, 0.958, 0.957], BASE),
    failed("loose: optim=SGD(momentum=1e6)", BASE),
    row("parametrize=weight_norm", [0.95, nan, 0.96], BASE, edge=2),
)


class Page(HTMLParser):
    """Tags with their attributes, and the visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self.inside = "", [""]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append("")

    def handle_data(self, data: str) -> None:
        self.words += data if self.inside[-1] not in ("script", "style") else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def specs(text: str) -> dict[str, Any]:
    """The figures as a strict JSON reader sees them."""
    block = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.S)
    assert block

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(block[1], parse_constant=refuse)


# -- what it says -----------------------------------------------------------------------------------------------------


def test_headline_and_table_hold_the_findings() -> None:
    words = Page(render(ALL)).words
    assert "digits: 1 of 5 recipes better than the baseline" in words
    for heading in ("Better than the baseline", "Worse than the baseline", "No difference shown", "Failed"):
        assert heading in words
    assert "0.955[0.943, 0.967]" in words  # mean and t-interval of BASE: 0.955 -+ 4.303 * 0.005 / sqrt(3)
    assert "3.2e-03" in words
    assert "1.42 ms" in words
    assert "20.0 ms" in words
    assert "failed in 3 of 3 units" in words
    assert "failed in 1 of 3 units" in words
    assert "at an end in 2 of 3" in words
    assert "3 seeds would show a difference of" in words  # beside what was not called
    assert "seeds 0, 1 and 2: diverged: training loss became nan at step 7" in words
    assert "3 seeds only" in words
    assert "nan" not in words.replace("became nan", "")


@pytest.mark.parametrize(
    ("rows", "title"),
    [
        ([row("", BASE)], "one recipe, and no other to compare it with"),
        ([failed("")], "the one recipe failed"),
        ([failed(""), row("init=orthogonal", BASE, [nan] * 3)], "the baseline failed, so nothing can be compared"),
        ([row("", BASE), failed("init=orthogonal", BASE)], "every recipe but the baseline failed"),
        ([row("", [0.9]), row("init=orthogonal", [0.95], [0.9])], "too few seeds to tell recipes apart"),
        ([row("", BASE), row("init=orthogonal", BASE[::-1], BASE)], "no recipe shown to be better than the baseline"),
        ([row("", BASE), row("init=orthogonal", [0.5, 0.51, 0.5], BASE)], "no recipe shown to be better"),
    ],
)
def test_title_says_what_was_found(rows: list[Row], title: str) -> None:
    page = Page(render(comparison(*rows)))
    assert f"digits: {title}" in page.words
    assert "nan" not in page.words.replace("became nan", "")
    assert not re.search(r"\binf\b", page.words)


def test_a_difference_that_turns_at_equal_time_is_told() -> None:
    worse = difference([0.1, 0.11, 0.1], [0.9, 0.9, 0.91])
    one = row("init=orthogonal", [s + 0.1 for s in BASE], BASE, at_equal_time=worse)
    assert (
        "Given equal seconds instead of equal steps, init=orthogonal: worse."
        in Page(render(comparison(row("", BASE), one))).words
    )


def test_fate_of_each_rate_is_counted_over_units() -> None:
    found = fate(ALL.rows[0])
    assert {x: [k for k, n in f.items() if n] for x, f in found.items()} == {
        0.001: ["dropped"], GRID[1]: ["chosen", "finished"], 0.01: ["finished"], 0.1: ["failed"],
    }  # fmt: skip
    assert found[GRID[1]]["chosen"] == 3
    other = [(0.001, 0.5, nan), (GRID[1], 0.9, 0.95), (0.01, 0.8, 0.96), (0.1, 0.1, nan)]
    chosen = [Point(GRID[1]), Point(0.01), Point(0.01)]
    mixed = row("", BASE, trials=[unit(TUNING), unit(other), unit(other)], chosen=chosen)
    assert (fate(mixed)[0.01]["chosen"], fate(mixed)[0.1]) == (
        2,
        {"chosen": 0, "finished": 0, "dropped": 2, "failed": 1},
    )
    words = Page(render(comparison(mixed))).words
    assert "while tuning: no score at 1.0e-01 (1 unit); the first: diverged" in words
    assert "3.2e-03 to 1.0e-02" in words  # what the units were tuned to
    assert mixed.rate == 0.01


def test_one_rate_means_nothing_was_tuned() -> None:
    one = row("", BASE, trials=[unit([(0.01, nan, 0.9)])] * 3, chosen=[Point(0.01)] * 3)
    text = render(comparison(one, rates=(0.01,), tuned=False, trials=1))
    assert "There is one rate, 1.0e-02; no rate was tuned." in Page(text).words
    assert "a verdict is one at this rate" in Page(text).words
    assert set(specs(text)) == {"curves", "signal"}


def test_a_task_that_does_not_repeat_is_told() -> None:
    assert "The task is not deterministic" in Page(render(comparison(row("", BASE), repeatable=False))).words
    assert "not deterministic" not in Page(render(comparison(row("", BASE), repeatable=True))).words


def test_looks_and_what_was_searched_are_told() -> None:
    axis = ("optim", "weight_decay")
    points = [Point(GRID[1], ((axis, v),)) for v in (0.1, 0.02, 0.01)]
    trials = [[Tried(p, 0.9, 0.95), Tried(Point(0.1, ((axis, 0.5),)), 0.1, nan)] for p in points]
    searched = row("optim=AdamW(weight_decay=log(0.001,1))", BASE, BASE, chosen=points, trials=trials)
    words = Page(render(comparison(row("", BASE), searched, looks=(5, 8, 12)))).words
    assert "weight_decay 0.02" in words
    assert "optim weight_decay over log(0.001,1)" in words
    assert "with looks at 5, 8 and 12" in words
    assert re.search(r"AdamW\(model\.parameters\(\), lr=[\d.e-]+, weight_decay=0\.02\)", words)


def test_figures_hold_the_numbers() -> None:
    found = specs(render(ALL))
    assert set(found) == {"differences", "curves", "signal", *(f"rate{i}" for i in range(6))}
    means = [t["x"][0] for t in found["differences"]["data"] if t["mode"] == "markers" and len(t["x"]) == 1]
    assert means[0] == pytest.approx(0.1)
    ours = [t for t in found["curves"]["data"] if t["meta"] == {"recipe": 0, "mode": "second"} and "marker" in t]
    assert ours[0]["x"] == pytest.approx([0.02, 0.12, 0.22])
    assert ours[0]["y"][-1] == pytest.approx(0.955)
    assert found["signal"]["data"][0]["y"] == [1.0, 1e-6, None]
    assert found["rate4"]["data"][2]["x"] == list(GRID)  # every rate failed


def test_a_broken_run_is_drawn_as_far_as_it_got() -> None:
    """Seeds need not start at zero: reasons go by the seed, curves by its place."""
    one = row("init=orthogonal", [0.95, nan, 0.96], BASE, failed={8: "diverged: training loss became nan at step 15"})
    found = specs(render(comparison(row("", BASE), one)))["curves"]["data"]
    broken = [t for t in found if "seed 8 failed after step" in t.get("hovertemplate", "")]
    assert [t["x"] for t in broken] == [[0, 10]]
    mean = [t for t in found if t["meta"] == {"recipe": 1, "mode": "step"} and t["mode"] == "lines+markers"]
    assert mean[0]["y"][-1] == pytest.approx(0.955)


def test_axes_that_count_have_whole_numbers_alone() -> None:
    found = specs(render(ALL))
    assert found["signal"]["layout"]["xaxis"]["tickvals"] == [1, 2, 3, 4]
    assert found["signal"]["data"][0]["x"] == [1, 3, 4]  # as `inspect` numbers them, activations counted
    assert found["curves"]["axes"]["step"]["tickvals"] == [0, 5, 10, 15, 20]
    assert "tickvals" not in found["curves"]["axes"]["second"]
    for low, high in ((0, 1), (1, 1), (1, 7), (0, 300), (1, 79), (0, 123_456)):
        marks = counts("", low, high)["tickvals"]
        assert 1 <= len(marks) <= 8
        assert all(isinstance(k, int) and low <= k <= high for k in marks)


def curve(late: float) -> list[list[float]]:
    return [[0, 0.0, 0.1, nan], [10, 0.1, late - 0.1, 1.0], [20, 0.2, late, 0.5]]


def test_the_close_up_comes_first_where_curves_coincide() -> None:
    near = [row("", BASE), row("init=orthogonal", BASE, BASE, curves=[curve(0.93)] * 3)]
    far = [row("", BASE), row("init=orthogonal", BASE, BASE, curves=[curve(0.5)] * 3)]
    for rows, close in ((near, True), (far, False), (near[:1], False)):
        text = render(comparison(*rows))
        assert specs(text)["curves"]["close"] is close
        on = [a["value"] for a in Page(text).all("input") if "checked" in a]
        assert on == ["step", "close" if close else "all"]


def test_what_could_have_been_shown_stands_once_on_its_card() -> None:
    same = [row("", BASE), *(row(r, BASE[::-1], BASE) for r in ("init=orthogonal", "init=lsuv"))]
    words = Page(render(comparison(*same))).words
    assert words.count("would have been seen in four of five tables") == 1
    assert words.count("3 seeds would show a difference of") == 2  # in the table, recipe by recipe


def test_how_it_was_done_is_told_in_sentences_of_bearable_length() -> None:
    for looks, tuned in (((), True), ((5, 8), True), ((), False)):
        text = render(comparison(row("", BASE), looks=looks, tuned=tuned, rates=GRID if tuned else (0.01,)))
        told = re.sub("<[^>]*>", " ", text[text.index('id="method"') : text.index("In figures")])
        for sentence in re.split(r"[.:;]\s", told):
            assert len(sentence.split()) <= 32, sentence


def test_no_signal_no_figure() -> None:
    text = render(comparison(row("", BASE, signal=[])))
    assert "The signal was not looked at" in text
    assert "signal" not in specs(text)


# -- that it says it safely -------------------------------------------------------------------------------------------


def test_names_and_reasons_are_text_not_markup() -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>'
    one = replace(row("init=orthogonal", [nan, 0.9, 0.95], BASE), name=evil, failed={0: f"raised: {evil}"})
    page = Page(render(comparison(row("", BASE), one)))
    assert len(page.all("script")) == 3
    assert page.all("img") == []
    assert page.words.count(evil) >= 3
    for trace in specs(render(comparison(row("", BASE), one)))["curves"]["data"]:
        assert "<script" not in trace["name"]  # plotly reads names as a small HTML


def test_page_is_whole_and_alone() -> None:
    text = render(ALL)
    page = Page(text)
    assert text.count("* plotly.js v") == 1
    assert page.all("html") == [{"lang": "en"}]
    assert all("src" not in attrs for _, attrs in page.tags)
    for _, attrs in page.tags:
        assert (attrs.get("href") or "#")[:5].startswith(("#", "data:"))
    targets = {a["href"] for a in page.all("a")}
    assert targets <= {f"#{attrs.get('id')}" for _, attrs in page.tags}
    assert len({a.get("id") for _, a in page.tags if a.get("id")}) == sum(bool(a.get("id")) for _, a in page.tags)
    assert render(ALL) == text


def test_page_is_readable_without_eyes() -> None:
    page = Page(render(ALL))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == 1
    assert {th["scope"] for th in page.all("th")} == {"col", "row"}
    assert len(page.all("figure")) == len(page.all("figcaption")) == 4
    plots = [a for a in page.all("div") if a.get("class") == "plot"]
    assert len(plots) == 9
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)
    assert "init=orthogonal: +0.100 [+0.100, +0.100], better" in str(plots[0]["aria-label"])


# -- writing ----------------------------------------------------------------------------------------------------------


def test_write_returns_the_path(tmp_path: Path) -> None:
    path = write(ALL, str(tmp_path / "r.html"))
    assert path == tmp_path / "r.html"
    assert path.read_text(encoding="utf-8") == render(ALL)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_name_with_a_lone_surrogate_is_written(tmp_path: Path) -> None:
    write(comparison(replace(row("", BASE), name="caf\udce9")), tmp_path / "r.html")


@pytest.mark.parametrize(
    ("path", "words"),
    [(".", "needs the path of a file, got the folder"), ("no/r.html", "there is no folder"), ("x" * 400, "too long")],
)
def test_write_refuses_a_wrong_path(path: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        write(ALL, tmp_path / path)


def test_an_unwritable_place_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.html").write_text("old")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(BadInput, match=r"cannot be written to .*r\.html: Permission denied"):
        write(ALL, tmp_path / "r.html")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_a_failing_render_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.html").write_text("old")
    monkeypatch.setattr(report_module, "method", lambda c: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(ALL, tmp_path / "r.html")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


# -- the code it gives ------------------------------------------------------------------------------------------------

STEPS = 6


def small_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    return [(torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)) for _ in range(STEPS)]


def as_the_lab_does(recipe: Recipe, rate: float, steered: bool) -> nn.Module:
    model, loader = small_model(), data()
    torch.manual_seed(3)
    recipe.start(model, loader[0][0], torch.default_generator)

    def shrink(at: str) -> bool:
        if recipe.compresses_at != at:
            return False
        loss = lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1])
        recipe.shrink(model, cycle(loader), loss, lambda batch: batch[0], torch.Generator().manual_seed(0))
        return True

    shrink("start")
    optimizers = recipe.optimizers(model, rate, "AdamW")
    base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    for step, (x, y) in enumerate(loader, 1):
        for o, rates in zip(optimizers, base):
            for g, r in zip(o.param_groups, rates):
                g["lr"] = r * schedule(step, STEPS) if steered else r
            o.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        penalty = recipe.penalty_of(model)
        (loss if penalty is None else loss + penalty).backward()
        for o in optimizers:
            o.step()
        if step == round(0.8 * STEPS) and shrink("late"):
            optimizers = recipe.optimizers(model, rate, "AdamW")
            base = [[g["lr"] for g in o.param_groups] for o in optimizers]
    shrink("end")
    return model


def as_the_snippet_does(recipe: Recipe, rate: float, schedule: str) -> nn.Module:
    model, loader = small_model(), data()
    code = snippet(recipe, rate, steps=STEPS, schedule=schedule)
    mine = {"model": model, "loader": loader, "batch": loader[0][0], "loss_fn": nn.functional.cross_entropy}
    small = recipe.choice("compress")
    if small is not None:  # as the snippet says: whole batches where a loss is asked for, else inputs
        whole = "loss" in inspect.signature(small.resolve()).parameters
        mine["calibration"] = [batch if whole else batch[0] for batch in islice(cycle(loader), CALIBRATION)]
    torch.manual_seed(3)
    exec(compile(code, "snippet", "exec"), mine)
    return model


def assert_same(recipe: Recipe, schedule: str = "cosine", rate: float = 0.01) -> None:
    ours = as_the_lab_does(recipe, rate, schedule == "cosine").state_dict()
    theirs = as_the_snippet_does(recipe, rate, schedule).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.isfinite().all()
        torch.testing.assert_close(theirs[name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "init=orthogonal(gain=1.4)",
        "init=kaiming_normal(mode='fan_out',nonlinearity='relu')+parametrize=weight_norm",
        "parametrize=spectral_norm(n_power_iterations=2)",
        "penalty=norm_loss",
        "penalty=norm_loss(factor=0.5,target=2.0)+optim=SGD(momentum=0.9)",
        "optim=Adam(betas=(0.8,0.9))",
        "init=torch.nn.init:xavier_uniform_",
        "layer=Btt(rank=2)",
        "layer=Monarch(only='0',scaled=False)+init=structured_start",
        "compress=magnitude_prune(keep=0.3)+optim=SGD(momentum=0.9)",
    ],
)
def test_snippet_trains_as_the_lab_did(recipe: str, schedule: str) -> None:
    assert_same(Recipe.parse(recipe), schedule)


def test_snippet_splits_for_torch_muon() -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    assert_same(Recipe(optim="Muon"))


def our_methods() -> list[tuple[str, str]]:
    """Every method of pondera's own rooms, by discovery."""
    return [(room, name) for room in ROOMS for name in names(room) if _is_ours(room, name)]


def _is_ours(room: str, name: str) -> bool:
    return Recipe(**{room: name}).choice(room).resolve().__module__.startswith("pondera.")


@pytest.mark.parametrize(("room", "name"), our_methods())
def test_snippet_of_every_method_of_ours(room: str, name: str) -> None:
    recipe = Recipe(**{room: name})
    try:
        as_the_lab_does(recipe, 0.01, True)
    except (BadInput, TypeError) as error:
        pytest.skip(f"not for this model: {error}")
    if room == "compress" and "generator" in inspect.signature(recipe.choice(room).resolve()).parameters:
        ours = as_the_snippet_does(recipe, 0.01, "cosine")  # draws what it draws; the lab's draws follow its seeds
        assert all(p.isfinite().all() for p in ours.parameters())
        return
    assert_same(recipe)


def test_snippet_has_no_name_of_the_reader_in_it() -> None:
    code = snippet(Recipe.parse("a\nlabel: optim=SGD"), 0.1, steps=3)
    assert "label" not in code

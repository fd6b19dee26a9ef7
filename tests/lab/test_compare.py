"""The comparison: what it decides, what it reports, and that its table depends on nothing but the runs."""

import math
from pathlib import Path

import pytest
import torch

from pondera.errors import BadInput
from pondera.lab import Recipe, compare, load_task
from pondera.lab.data import batches
from pondera.lab.plan import Design, kept, ranked
from pondera.lab.space import Point
from pondera.lab.stats import difference, interval
from pondera.lab.train import RunSpec, prepare, run, schedule, stream

QUICK = {"store": "sqlite://", "workers": 1, "progress": False}


def write_task(folder, *, build=None, data=None, extra=""):
    build = build or "return nn.Linear(4, 2)"
    data = data or "x = torch.randn(40, 4); y = (x[:, 0] > 0).long(); return (x[:30], y[:30]), (x[30:], y[30:])"
    path = Path(folder) / "mine.py"
    path.write_text(
        f"import torch\nfrom torch import nn\nsettings = dict(steps=8, batch=8, rates=[0.1])\n"
        f"def build():\n    {build}\ndef data():\n    torch.manual_seed(0); {data}\n{extra}\n"
    )
    return str(path)


# -- statistics, against numbers worked by hand ------------------------------------------------------------------------


def test_interval_by_hand():
    # mean 3, sd sqrt(2.5), t(0.975, 4) = 2.7764: half width 2.7764 * 1.5811 / sqrt 5 = 1.9632
    mean, low, high = interval([1, 2, 3, 4, 5])
    assert mean == 3
    assert (low, high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)


def test_difference_by_hand():
    # differences 1, 2, 3: mean 2, half width 4.3027 * 1 / sqrt 3 = 2.4841; both arms have sd 1 and 2: pooled sqrt 2.5
    d = difference([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert (d.mean, d.low, d.high) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert d.standardised == pytest.approx(2 / math.sqrt(2.5))
    assert d.verdict == "no difference shown"
    assert not d.large


def test_more_comparisons_make_wider_intervals():
    a, b = [3.0, 5.1, 7.2, 8.0], [2.0, 3.0, 5.9, 7.0]
    one, ten = difference(a, b), difference(a, b, comparisons=10)
    assert ten.low < one.low < one.high < ten.high
    # Bonferroni: t(1 - 0.05/20, 3) = 7.4533 against t(0.975, 3) = 3.1824
    assert (ten.high - ten.mean) / (one.high - one.mean) == pytest.approx(7.4533 / 3.1824, rel=1e-4)


def test_worse_and_better():
    assert difference([0.1, 0.11, 0.12], [0.9, 0.91, 0.92]).verdict == "worse"
    assert difference([0.9, 0.91, 0.92], [0.1, 0.11, 0.12]).verdict == "better"
    assert difference([0.5, 0.5], [0.5, 0.5]).verdict == "no difference shown"


# -- tuning ------------------------------------------------------------------------------------------------------------


def test_best_third_goes_on_and_ties_go_to_the_lower_validation_loss():
    values = [(0.2, -0.1), (0.9, -1.0), (0.9, -0.5), (0.5, -0.1), None, None]
    assert ranked(values) == [2, 1, 3, 0]
    assert ranked([None] * 6) == []
    assert [kept(n) for n in (1, 2, 3, 4, 9)] == [1, 1, 1, 2, 3]


def test_tuning_finds_the_planted_rate(tmp_path):
    """A quadratic at step size r contracts by 1 - r a step: of 0.01, 1 and 3 only 1 solves it."""
    extra = (
        "def loss(model, batch): return 0.5 * sum(p.square().sum() for p in model.parameters())\n"
        "def score(model, test): return -float(sum(p.square().sum() for p in model.parameters()))"
    )
    path = write_task(tmp_path, extra=extra + "\nsettings.update(optim='SGD', schedule='constant')")
    table = compare(path, [""], rates=[0.01, 1.0, 3.0], seeds=2, **QUICK)
    assert table.rows[0].rate == 1.0
    assert not table.rows[0].edge
    assert max(table.rows[0].scores) == 0
    # from 0.01 the space is extended twice, as far as it goes, and ends where it still improves: at an end in both units
    short = compare(path, [""], rates=[0.0001, 0.001], seeds=2, **QUICK).rows[0]
    assert (short.edge, [p.rate for p in short.chosen]) == (2, [0.1, 0.1])


def test_tuning_never_sees_test(tmp_path):
    """Test labels are noise here: were they used to tune, a best rate would come from them."""
    task = load_task("digits")
    train, test = task.data()
    fit, held = task.split("tune")
    assert len(fit[0]) + len(held[0]) == len(train[0])
    rows = {tuple(r) for r in train[0].tolist()}
    assert all(tuple(r) in rows for part in (fit[0], held[0]) for r in part.tolist())
    # the two parts do not overlap: as many distinct places as examples
    assert len({tuple(r) for r in fit[0].tolist()} & {tuple(r) for r in held[0].tolist()}) <= len(train[0]) - len(rows)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    # 20 steps: one of warm-up, then cosine: half-way between step 1 and step 21 the share is 1/2
    assert schedule(1, 20) == 1.0
    assert schedule(11, 20) == pytest.approx(0.5)
    assert schedule(20, 20) == pytest.approx((1 + math.cos(math.pi * 19 / 20)) / 2)


def test_batches_are_epochs_without_repeats_and_follow_the_seed():
    x = torch.arange(10).float()
    feed = batches((x,), 3, seed=1)
    epoch = torch.cat([next(feed)[0] for _ in range(3)])
    assert len(set(epoch.tolist())) == 9
    again = batches((x,), 3, seed=1)
    assert torch.equal(epoch, torch.cat([next(again)[0] for _ in range(3)]))
    assert not torch.equal(epoch, torch.cat([b[0] for b, _ in zip(batches((x,), 3, seed=2), range(3))]))


def test_a_run_equals_a_bare_loop(tiny):
    """The lab adds nothing to the training: a plain PyTorch loop with the same seeds gives the same bits."""
    task = load_task(tiny)
    spec = RunSpec(task.name, task.path, task.source, Recipe(optim="SGD(momentum=0.9)"), 0.1, 3, 24, 24, "final")
    ours = run(spec)
    train, test = task.data()
    torch.manual_seed(stream(3, "weights"))
    model = task.module.build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    feed = batches(train, 16, stream(3, "data"))
    for step in range(1, 25):
        for g in sgd.param_groups:
            g["lr"] = 0.1 * schedule(step, 24)
        x, y = next(feed)
        sgd.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()
    assert ours["score"] == (model(test[0]).argmax(1) == test[1]).double().mean().item()
    assert ours["status"] == "ok"


def test_run_leaves_thread_count_and_is_repeatable(tiny):
    task = load_task(tiny)
    spec = RunSpec(task.name, task.path, task.source, Recipe(), 0.1, 0, 24, 24, "final")
    torch.set_num_threads(2)
    a = run(spec)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert a["curve"][-1][2:] == run(spec)["curve"][-1][2:]


def test_key_depends_on_everything_that_matters(tiny):
    task = load_task(tiny)

    def spec(recipe="", rate=0.1, seed=0, phase="final", **more):
        design = Design(task, (Recipe.parse(recipe),), range(3), 24, (0.1,), 1, **more)
        return design.spec(design.recipes[0], Point(rate), seed, phase)

    base = spec()
    others = [
        spec(rate=0.2),
        spec(seed=1),
        spec(phase="tuned"),
        spec(phase="rung"),
        spec("init=orthogonal"),
        spec(depends="x"),
    ]
    changed = load_task(tiny).source + "\n# changed"
    others.append(RunSpec(task.name, task.path, changed, Recipe(), 0.1, 0, 24, 24, "final"))
    assert len({s.key for s in [base, *others]}) == len(others) + 1
    assert spec().key == base.key


# -- the table ---------------------------------------------------------------------------------------------------------


def test_same_table_whatever_the_workers(tiny):
    recipes = ["", "optim=Adam", "init=orthogonal"]
    one = compare(tiny, recipes, seeds=3, **QUICK).table(timing=False)
    two = compare(tiny, recipes, seeds=3, **QUICK | {"workers": 2}).table(timing=False)
    assert one == two


def test_second_time_everything_is_found(tiny, tmp_path):
    store = tmp_path / "runs.db"
    first = compare(tiny, ["", "optim=Adam"], seeds=2, **QUICK | {"store": store})
    again = compare(tiny, ["", "optim=Adam"], seeds=2, **QUICK | {"store": store})
    more = compare(tiny, ["", "optim=Adam"], seeds=3, **QUICK | {"store": store})
    assert (first.repeated, again.repeated, again.runs) == (0, again.runs, first.runs)
    assert again.table() == first.table()
    assert [r.scores[:2] for r in more.rows] == [r.scores for r in first.rows]
    assert more.repeated == first.runs


def test_seeds_are_shared_and_salt_only_moves_the_weights(tiny):
    table = compare(tiny, ["", "salt=1"], seeds=3, rates=[0.1], **QUICK)
    a, b = table.rows
    assert a.scores != b.scores
    assert compare(tiny, ["", "twin: optim=SGD"], seeds=3, rates=[0.1], **QUICK).rows[1].scores == a.scores


def test_failures_are_rows_and_the_rest_goes_on(tmp_path):
    extra = (
        "import os\n"
        "class Bad(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        raise RuntimeError('planted')\n"
        "class Greedy(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        torch.empty(10**15)\n"
        "class Explode(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        for g in self.param_groups:\n"
        "            for p in g['params']: p.data.mul_(1e30)\n"
        "class Die(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        os._exit(9)\n"
    )
    path = write_task(tmp_path)
    (tmp_path / "planted.py").write_text("import torch\n" + extra)
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        recipes = [
            "",
            "optim=planted:Bad",
            "optim=planted:Greedy",
            "optim=planted:Explode",
            "optim=planted:Die",
            "optim=Adam",
        ]
        table = compare(path, recipes, seeds=2, **QUICK | {"workers": 2})
    finally:
        sys.path.remove(str(tmp_path))
    base, bad, greedy, explode, die, adam = table.rows
    assert not table.ok
    assert not base.failed
    assert not adam.failed
    assert adam.difference is not None
    for row, words in ((bad, "raised: RuntimeError: planted"), (greedy, "memory: RuntimeError"), (explode, "diverged: training loss became"), (die, "killed: its process died 2 times")):  # fmt: skip
        assert len(row.failed) == 2
        assert all(words in why for why in row.failed.values()), row.failed
        assert row.verdict == "failed in 2 of 2 units"
        assert all(math.isnan(s) for s in row.scores)


def test_a_recipe_that_fails_everywhere_in_tuning_says_so(tiny):
    table = compare(tiny, ["", "optim=SGD(momentum=0.0,weight_decay=1e30)"], seeds=2, **QUICK)
    row = table.rows[1]
    assert math.isnan(row.rate)
    assert "no learning rate finished (diverged" in row.failed[0]


def test_penalty_factor_and_parametrize_reach_the_run(tiny):
    table = compare(
        tiny, ["", "penalty=norm_loss(factor=1.0)", "penalty=norm_loss(factor=0.0)"], seeds=2, rates=[0.1], **QUICK
    )
    assert table.rows[2].scores == table.rows[0].scores
    assert [c[-1][3] for c in table.rows[1].curves] != [c[-1][3] for c in table.rows[0].curves]


def test_a_start_asks_the_task_for_what_it_needs(tmp_path):
    """`copy_(model, teacher)` gets `teacher()` of the task file; `examples` are the training data of the run."""
    (tmp_path / "starts_of_mine.py").write_text(
        "import torch\nseen = []\n"
        "def copy_(model, teacher, *, generator=None):\n    model.load_state_dict(teacher.state_dict()); return model\n"
        "def look_(model, examples, *, generator=None):\n    seen.append(examples); return model\n"
    )
    extra = "def teacher():\n    m = nn.Linear(4, 2); nn.init.zeros_(m.weight); nn.init.zeros_(m.bias); return m"
    path = write_task(tmp_path, extra=extra)
    import sys

    sys.path.insert(0, str(tmp_path))
    try:
        task = load_task(path)
        model = prepare(task, Recipe(init="starts_of_mine:copy_"), 0, task.split("final")[0])
        assert not any(p.any() for p in model.parameters())
        prepare(task, Recipe(init="starts_of_mine:look_"), 0, task.split("final")[0])
        import starts_of_mine

        (examples,) = starts_of_mine.seen
        assert [t.shape for t in examples] == [(30, 4), (30,)]
        with pytest.raises(BadInput, match="the start needs teacher, and the task tiny has no function teacher\\(\\)"):
            compare(Path(__file__).with_name("tiny.py"), ["", "init=starts_of_mine:copy_"], **QUICK)
    finally:
        sys.path.remove(str(tmp_path))


# -- bad input: one sentence each ---------------------------------------------------------------------------------------

BAD_TASKS = {
    "no build": (dict(build="return 1"), "build\\(\\) of the task mine must return an nn.Module, got int"),
    "raises": (dict(build="raise KeyError('lost')"), "build\\(\\) of the task mine raised KeyError: 'lost'"),
    "data raises": (dict(data="1/0"), "data\\(\\) of the task mine raised ZeroDivisionError"),
    "no pair": (
        dict(data="return torch.ones(3)"),
        "must return \\(train, test\\) or \\(train, validation, test\\), got Tensor",
    ),
    "nan": (
        dict(data="x = torch.ones(9, 4); x[2, 1] = torch.nan; y = torch.ones(9).long(); return (x, y), (x, y)"),
        "train data of the task mine holds 1 NaN or infinite numbers of 36",
    ),
    "lengths": (
        dict(data="return (torch.ones(3, 4), torch.ones(2)), (torch.ones(3, 4), torch.ones(3))"),
        "same number of examples",
    ),
    "too few classes": (
        dict(data="x = torch.randn(9, 4); y = torch.arange(9); return (x, y), (x, y)"),
        "the model scores 2 classes, 0 to 1, and the targets go from class 0 to 8",
    ),
    "regression shape": (
        dict(data="x = torch.randn(9, 4); y = torch.randn(9); return (x, y), (x, y)"),
        "output of shape \\(\\d+, 2\\) does not fit targets",
    ),
    "wrong width": (dict(build="return nn.Linear(5, 2)"), "raised RuntimeError on its first batch"),
    "loss no scalar": (
        dict(extra="def loss(m, b): return m(b[0])"),
        "must be a scalar tensor, got shape \\(\\d+, 2\\)",
    ),
    "setting": (dict(extra="settings['stepz'] = 3"), "no entry 'stepz'; did you mean steps"),
    "syntax": (dict(extra="def ("), "raised SyntaxError on line"),
    "import": (
        dict(extra="import nothing_like_this"),
        "raised ModuleNotFoundError: No module named 'nothing_like_this'",
    ),
}


@pytest.mark.parametrize("which", BAD_TASKS)
def test_bad_task(which, tmp_path):
    parts, words = BAD_TASKS[which]
    with pytest.raises(BadInput, match=words) as caught:
        compare(write_task(tmp_path, **parts), ["", "optim=SGD"], **QUICK)
    assert "\n" not in str(caught.value)


def test_task_without_build(tmp_path):
    path = tmp_path / "half.py"
    path.write_text("def data(): pass\n")
    with pytest.raises(BadInput, match="has no function build\\(\\)"):
        load_task(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"task": "digit"}, "no task is called 'digit'; did you mean digits"),
        ({"task": "missing.py"}, "the task file missing.py does not exist"),
        ({"recipes": []}, "at least one recipe"),
        ({"recipes": ["init=lsvu"]}, "no init method is called 'lsvu'; did you mean lsuv"),
        ({"recipes": ["optim=AdamWW"]}, "did you mean AdamW"),
        ({"recipes": ["strat=lsuv"]}, "a recipe is made of"),
        ({"recipes": ["init=lsuv(tolerance=1)"]}, "init=lsuv takes no argument 'tolerance'"),
        ({"recipes": ["init=lsuv(0.1)"]}, "need their names"),
        ({"recipes": ["init=lsuv(tol=x)"]}, "not Python literals"),
        ({"recipes": ["init=lsuv+init=zero"]}, "chooses init twice"),
        ({"recipes": ["", ""]}, "given twice"),
        ({"recipes": ["a: init=zero", "a: init=lsuv"]}, "two recipes are called 'a'"),
        ({"recipes": ["penalty=norm_loss(target=-1.0)"]}, "does not fit: norm_loss needs a target"),
        ({"recipes": ["init=convolution_aware"]}, "'init=convolution_aware' does not fit.*convolution"),
        ({"recipes": ["optim=SGD(nesterov=True)"]}, "Nesterov momentum requires"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"budget": 0}, "budget is optimisation steps a run, at least 1, got 0"),
        ({"rates": []}, "positive learning rates"),
        ({"rates": [-1.0]}, "positive learning rates"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"device": "cuda:99"}, "the device 'cuda:99' cannot be used here"),
        ({"store": "/nowhere/at/all/runs.db"}, "the folder /nowhere/at/all does not exist"),
    ],
)
def test_bad_arguments(given, words, tiny):
    kw = {"task": tiny, "recipes": [""], **QUICK, **given}
    with pytest.raises(BadInput, match=words) as caught:
        compare(kw.pop("task"), kw.pop("recipes"), **kw)
    assert "\n" not in str(caught.value)


def test_corrupt_and_unwritable_store(tiny, tmp_path):
    corrupt = tmp_path / "corrupt.db"
    corrupt.write_bytes(b"this is no database" * 100)
    kept = corrupt.read_bytes()
    with pytest.raises(BadInput, match="corrupt.db cannot be used: .*not a database"):
        compare(tiny, [""], **QUICK | {"store": corrupt})
    assert corrupt.read_bytes() == kept
    with pytest.raises(BadInput, match="is a folder"):
        compare(tiny, [""], **QUICK | {"store": tmp_path})
    other = tmp_path / "other.db"
    import sqlite3

    with sqlite3.connect(other) as c:
        c.execute("create table pondera_runs (something integer)")
    with pytest.raises(BadInput, match="cannot be used"):
        compare(tiny, [""], **QUICK | {"store": other})


def test_read_only_store(tiny):
    """Root may write anywhere, so the read-only place is a file system that refuses."""
    place = Path("/proc/sys")
    with pytest.raises(BadInput, match="cannot be used|cannot be opened"):
        compare(tiny, [""], **QUICK | {"store": place / "runs.db"})

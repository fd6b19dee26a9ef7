"""What a comparison runs: the plan told made-up results, and what must follow from them."""

import math
import random

import pytest

from pondera.errors import BadInput
from pondera.lab import Recipe, compare, load_task, plan_of
from pondera.lab.plan import EXTENSIONS, Block, Design, Plan
from pondera.lab.space import RATE, Log, OneOf, Point, Uniform, ends, grid, points

GRID = tuple(10 ** (k / 2) for k in range(-8, 1))
QUICK = {"store": "sqlite://", "workers": 1, "progress": False}


def design(tiny, recipes=("", "optim=Adam"), seeds=range(3), rates=GRID, trials=9, steps=40):
    return Design(load_task(tiny), tuple(Recipe.parse(r) for r in recipes), seeds, steps, rates, trials)


def ok(valid, score=None, loss=1.0):
    return {"status": "ok", "valid": valid, "valid_loss": loss, "score": score, "train_loss": 0.0, "curve": [], "parameters": 1,
            "step_seconds": 0.0, "start_seconds": 0.0}  # fmt: skip


LOST = {"status": "diverged", "reason": "training loss became nan at step 3", "curve": []}


def carry_out(plan, answer, order=None):
    """Tell the plan results until it is complete; in the order runs come up, or shuffled."""
    rng, waiting = random.Random(order), []
    while True:
        waiting += plan.fresh()
        if not waiting:
            assert plan.done
            return plan
        at = 0 if order is None else rng.randrange(len(waiting))
        spec = waiting.pop(at)
        plan.tell(spec.key, answer(spec))


def near(best, low=0.0):
    """Scores that fall with the distance to a best rate, and a little with the seed."""

    def answer(spec):
        value = 1 - abs(math.log10(spec.rate) - math.log10(best)) / 10 - 0.001 * (spec.seed % 7) + low
        return ok(value, value)

    return answer


# -- a unit ------------------------------------------------------------------------------------------------------------


def test_a_unit_is_tuned_for_itself_under_schedules_of_the_runs_own_length(tiny):
    plan = carry_out(Plan(design(tiny)), near(0.01))
    for arm in (0, 1):
        units = list(plan.of(arm))
        assert [u.seed for u in units] == [0, 1, 2]
        for u in units:
            rung = [s for s in u.specs() if s.phase == "rung"]
            whole = [s for s in u.specs() if s.phase == "tuned"]
            assert [(s.steps, s.stop) for s in rung] == [
                (10, 10)
            ] * 9  # a schedule of its own length, not a quarter of one
            assert [(s.steps, s.stop) for s in whole] == [(40, 40)] * 3
            assert {s.seed for s in (*rung, *whole)} == {u.seed}
            assert u.point.rate == pytest.approx(0.01)
            assert u.result["score"] == pytest.approx(1 - 0.001 * u.seed)


def test_the_one_that_validates_best_at_the_end_is_the_unit_whatever_its_test_score(tiny):
    def answer(spec):
        if spec.phase == "rung":
            return ok(1 - abs(math.log10(spec.rate) + 2))
        return ok(spec.rate, score=-spec.rate)  # of those that went on, the highest rate validates best and tests worst

    unit = next(carry_out(Plan(design(tiny)), answer).of(0))
    assert unit.point.rate == pytest.approx(10**-1.5)
    assert unit.result["score"] == pytest.approx(-(10**-1.5))


def test_when_all_that_passed_the_cut_fail_later_the_next_are_tried(tiny):
    """The comparison died here once: it looked for the reason among the runs of the first cut, none of which had failed."""

    def answer(spec):
        if spec.phase == "rung":
            return ok(spec.rate)  # the highest rates look best
        return LOST if spec.rate > 0.01 else ok(spec.rate, spec.rate)

    unit = next(carry_out(Plan(design(tiny)), answer).of(0))
    assert unit.point.rate == pytest.approx(0.01)
    none = carry_out(Plan(design(tiny)), lambda s: ok(s.rate) if s.phase == "rung" else LOST)
    assert all(u.result is None for u in none.of(0))
    assert next(none.of(0)).why == "no learning rate finished (diverged: training loss became nan at step 3)"


def test_the_real_comparison_says_so_too(tmp_path):
    """Every rate passes the cut and raises later: a failed row, and no traceback."""
    path = tmp_path / "late.py"
    path.write_text(
        "import torch\nfrom torch import nn\nsettings = dict(steps=40, batch=8, rates=[0.01, 0.1])\nsteps = [0]\n"
        "def build():\n    steps[0] = 0\n    return nn.Linear(4, 2)\n"
        "def data():\n    torch.manual_seed(0); x = torch.randn(40, 4); y = (x[:, 0] > 0).long()\n"
        "    return (x[:30], y[:30]), (x[30:], y[30:])\n"
        "def loss(model, batch):\n    steps[0] += 1\n    if steps[0] > 30: raise RuntimeError('planted')\n"
        "    return nn.functional.cross_entropy(model(batch[0]), batch[1])\n"
    )
    row = compare(path, [""], seeds=2, **QUICK).rows[0]
    assert row.verdict == "failed in 2 of 2 units"
    assert row.failed[0] == "no learning rate finished (raised: RuntimeError: planted)"


def test_any_order_of_work_gives_the_same_units(tiny):
    recipes = ("", "optim=Adam", "optim=SGD(momentum=uniform(0,0.9))")
    plans = [carry_out(Plan(design(tiny, recipes)), near(3.0), order) for order in (None, 1, 2)]
    found = [[(u.arm, u.seed, u.point, u.result["score"]) for b in p.blocks for u in b.units] for p in plans]
    assert found[0] == found[1] == found[2]
    assert set(plans[0].known) == set(plans[1].known) == set(plans[2].known)


# -- spaces ------------------------------------------------------------------------------------------------------------


def test_every_recipe_gets_the_same_number_of_trials_whatever_it_searches(tiny):
    recipes = ("", "optim=AdamW(weight_decay=log(1e-3,1))", "optim=SGD(momentum=uniform(0.5,0.9))+penalty=norm_loss(factor=log(1e-4,1))")  # fmt: skip
    plan = carry_out(Plan(design(tiny, recipes)), near(0.01))
    for b in plan.blocks:
        assert {len(u.early) for u in b.units} == {9}
        assert len({len(u.late) for u in b.units}) == 1


def test_points_are_a_latin_hypercube_drawn_anew_for_each_seed():
    spaces = {
        ("optim", "weight_decay"): Log(1e-3, 1.0),
        ("adapter", "r"): OneOf((4, 8, 16)),
        ("optim", "m"): Uniform(0.0, 1.0),
    }
    one, two = (points(GRID, 9, spaces, seed) for seed in (1, 2))
    assert [p.rate for p in one] == list(GRID) == [p.rate for p in two]
    for axis, space in spaces.items():
        assert [p[axis] for p in one] != [p[axis] for p in two]
        if isinstance(space, OneOf):
            assert sorted(p[axis] for p in one) == [4, 4, 4, 8, 8, 8, 16, 16, 16]
        else:
            strata = sorted(
                math.log(p[axis] / 1e-3) / math.log(1e3) if isinstance(space, Log) else p[axis] for p in one
            )
            assert [int(9 * min(s, 0.9999)) for s in strata] == list(range(9))
    assert points(GRID, 9, spaces, 1) == one


def test_trials_besides_the_grids_length():
    assert grid(GRID, 9) == GRID
    assert grid((0.01, 1.0), 5) == (0.01, 0.0316, 0.1, 0.316, 1.0)
    with pytest.raises(BadInput, match="one trial cannot choose between 9 rates"):
        grid(GRID, 1)


def test_a_searched_value_reaches_the_run(tmp_path, tiny):
    """With the rate given, only the momentum is searched; the planted loss is least at 0.5 of (0.1, 0.5, 0.9)."""
    path = tmp_path / "planted.py"
    path.write_text(
        "import torch\nfrom torch import nn\nsettings = dict(steps=8, batch=8, rates=[0.1], optim='SGD')\n"
        "def build():\n    m = nn.Linear(1, 1, bias=False); nn.init.ones_(m.weight); return m\n"
        "def data():\n    x = torch.ones(20, 1); return (x, x), (x, x)\n"
        "def loss(model, batch):\n    return 0.5 * model.weight.square().sum()\n"
        "class Far(torch.optim.SGD):\n    pass\n"
        "def score(model, test):\n    return -float(model.weight.detach().abs().sum())\n"
    )
    recipe = "optim=SGD(momentum=choice(0.1,0.5,0.9))"
    table = compare(path, ["", recipe], seeds=2, **QUICK)
    fixed = {m: compare(path, [f"optim=SGD(momentum={m})"], seeds=2, **QUICK).rows[0] for m in (0.1, 0.5, 0.9)}
    best = max(fixed, key=lambda m: fixed[m].score[0])
    assert table.rows[1].setting == Recipe(optim=f"SGD(momentum={best})")
    assert table.rows[1].scores == fixed[best].scores
    assert [len(unit) for unit in table.rows[1].trials] == [3, 3]


def test_what_cannot_be_a_space_is_refused_in_a_sentence():
    for text, words in {
        "AdamW(weight_decay=lug(1,2))": "a space in optim=AdamW is log",
        "AdamW(weight_decay=log(0,1))": "two positive numbers, low below high",
        "AdamW(weight_decay=uniform(2,1))": "two numbers, low below high",
        "AdamW(weight_decay=choice(1))": "at least two different values",
        "AdamW(weight_decay=choice([1],[2]))": "takes numbers, text, True, False or None",
    }.items():
        with pytest.raises(BadInput, match=words) as caught:
            Recipe(optim=text)
        assert "\n" not in str(caught.value)


# -- ends of the space --------------------------------------------------------------------------------------------------


def test_an_end_is_extended_and_every_recipe_gets_as_many_further_trials(tiny):
    def answer(spec):  # Adam's best lies one step beyond the grid, the other's inside it
        return near(10**0.5 if "Adam" in str(spec.recipe) else 0.01)(spec)

    plan = carry_out(Plan(design(tiny)), answer)
    for b in plan.blocks:
        sgd, adam = b.units
        # the first extension finds 3.2, which is now the outermost; the second, 10, shows that it is the best
        assert b.rounds == 2
        assert adam.point.rate == pytest.approx(3.2)
        assert adam.ends == {}
        assert len(sgd.late) == len(adam.late) == 3 + 2
        assert sgd.point.rate == pytest.approx(0.01)


def test_extension_is_bounded_and_what_stays_at_an_end_is_said(tiny):
    plan = carry_out(Plan(design(tiny)), near(1e6))
    assert [b.rounds for b in plan.blocks] == [EXTENSIONS] * 3
    for u in plan.of(0):
        assert u.point.rate == pytest.approx(10.0)
        assert u.ends == {RATE: 1}


def test_a_unit_whose_rates_all_diverge_is_tried_at_smaller_ones(tiny):
    def answer(spec):
        return LOST if spec.rate > 5e-5 else ok(0.5, 0.5)

    for u in carry_out(Plan(design(tiny)), answer).of(0):
        assert u.point.rate == pytest.approx(3.2e-5)


def test_what_raises_at_every_rate_is_not_tried_at_smaller_ones(tiny):
    bad = {"status": "raised", "reason": "planted", "curve": []}
    plan = carry_out(Plan(design(tiny)), lambda s: bad)
    assert all(len(u.points) == 9 and not u.late for u in plan.of(0))


def test_ends_of_values_to_choose_from_are_their_own():
    axis = ("adapter", "r")
    tried = [Point(0.1, ((axis, v),)) for v in (4, 8)]
    assert ends(tried[1], tried, {axis: OneOf((4, 8, 16))}) == {}
    assert ends(tried[0], tried, {axis: OneOf((4, 8, 16))}) == {axis: -1}
    text = [Point(0.1, ((axis, v),)) for v in ("a", "b")]
    assert ends(text[0], text, {axis: OneOf(("a", "b"))}) == {}


# -- seeds added until decided ------------------------------------------------------------------------------------------


def test_seeds_are_added_for_the_undecided_alone(tiny):
    asked = []

    def decide(blocks: list[Block]):
        asked.append(len(blocks))
        return [2] if len(blocks) < 8 else []

    plan = Plan(design(tiny, ("", "optim=Adam", "init=orthogonal"), range(5)), 30, decide)
    carry_out(plan, near(0.01), order=3)
    assert asked == [5, 8]
    assert [[u.arm for u in b.units] for b in plan.blocks] == [[0, 1, 2]] * 5 + [[0, 2]] * 3


def test_until_decided_stops_where_a_difference_is_clear(tmp_path, tiny):
    table = compare(tiny, ["", "init=zeros", "salt=1"], seeds=3, max_seeds=8, until_decided=True, rates=[1.0], **QUICK)
    base, dead, twin = table.rows
    assert dead.verdict == "worse"
    assert len(dead.scores) < 8
    assert len(base.scores) == len(twin.scores) == 8
    assert twin.verdict == "no difference shown"
    assert table.looks == (3, 5, 8)


# -- the plan beforehand ------------------------------------------------------------------------------------------------


def test_the_plan_counts_what_is_run(tiny):
    recipes = ["", "optim=Adam", "optim=SGD(momentum=uniform(0,0.9))"]
    _, costs = plan_of(tiny, recipes, seeds=2)
    table = compare(tiny, recipes, seeds=2, **QUICK)
    least = sum(k.short + k.whole for k in costs)
    assert least <= table.runs - 2 <= sum(k.most for k in costs)  # the two short runs that are compared with each other
    assert all(k.hours > 0 for k in costs)
    _, fixed = plan_of(tiny, recipes[:2], seeds=2, rates=[0.1])
    assert [(k.short, k.whole, k.most) for k in fixed] == [(0, 2, 2)] * 2


def test_what_one_trial_or_one_rate_means(tiny):
    one = compare(tiny, ["", "optim=Adam"], seeds=2, rates=[0.1], **QUICK)
    assert (one.tuned, one.trials) == (False, 1)
    with pytest.raises(BadInput, match="one trial cannot choose between 3 rates"):
        compare(tiny, [""], trials=1, **QUICK)
    more = compare(tiny, [""], seeds=1, trials=5, **QUICK)
    assert len(more.rates) == 5
    assert len(more.rows[0].trials[0]) >= 5

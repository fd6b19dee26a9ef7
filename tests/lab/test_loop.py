"""Training by the lab's loop under each setting, and by a loop the task brings."""

import math

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab import Recipe, compare, load_task
from pondera.lab._chained import Chained
from pondera.lab.train import RunSpec, run, schedule, stream

QUICK = {"store": "sqlite://", "workers": 1, "progress": False, "seeds": 2, "rates": [0.05]}
COMMON = """import torch
from torch import nn
settings = dict(steps=12, batch=8, optim='SGD')
g = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=g); Y = (X[:, 0] + 0.3 * torch.randn(60, generator=g) > 0).long()
def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
def data():
    return (X[:40], Y[:40]), (X[40:], Y[40:])
"""
OWN = """
def accuracy(model, part):
    x, y = part
    with torch.no_grad():
        return (model(x).argmax(-1) == y).double().mean().item()
def train(run):
    feed = run.batches()
    for step in range(1, run.steps + 1):
        for o in run.optimizers:
            for group in o.param_groups:
                group['lr'] = run.rate * run.share(step)
        x, y = next(feed)
        run.optimizer.zero_grad()
        run.loss(nn.functional.cross_entropy(run.model(x), y)).backward()
        run.optimizer.step()
    return lambda part: accuracy(run.model, part)
"""


def task(folder, extra="", **settings):
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(f"{COMMON}settings.update({settings!r})\n{extra}")
    return path


def one(path, phase="final", **over):
    t = load_task(path)
    given = {"rate": 0.05, "seed": 0, "steps": 12, "stop": 12} | over
    return run(RunSpec(t.name, t.path, t.source, Recipe(), phase=phase, **given))


# -- settings ----------------------------------------------------------------------------------------------------------


def bare(path, step):
    """A plain loop with the lab's draws; `step(model, optimizer, batch, i)` is what a setting changes."""
    from pondera.lab.data import batches

    t = load_task(path)
    (fit, test), s = t.data(), t.settings
    torch.manual_seed(stream(0, "weights"))
    model = t.module.build()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    feed = batches(fit, s.batch, stream(0, "data"))
    for i in range(1, 13):
        sgd.param_groups[0]["lr"] = 0.05 * schedule(i, 12)
        step(model, sgd, next(feed), i)
    return model, test


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def last_loss(path, model):
    test = load_task(path).data()[1]
    with torch.no_grad():
        return loss_of(model, test).item()


SCORE = "def score(model, test):\n    return -nn.functional.cross_entropy(model(test[0]).float(), test[1]).item()\n"


def test_clipping_equals_a_bare_loop(tmp_path):
    path = task(tmp_path / "a", SCORE, clip=0.1)

    def step(model, sgd, batch, i):
        sgd.zero_grad()
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        sgd.step()

    assert one(path)["score"] == -last_loss(path, bare(path, step)[0])
    assert one(task(tmp_path / "b", SCORE))["score"] != one(path)["score"]


def test_accumulation_is_the_whole_batch_in_parts(tmp_path):
    whole, parts = one(task(tmp_path / "a", SCORE)), one(task(tmp_path / "b", SCORE, accumulate=3))
    assert parts["score"] == pytest.approx(whole["score"], rel=1e-5)
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_the_average_of_the_weights_is_what_is_scored(tmp_path):
    path = task(tmp_path / "a", SCORE, ema=0.8)
    averages = []

    def step(model, sgd, batch, i):
        sgd.zero_grad()
        loss_of(model, batch).backward()
        sgd.step()
        now = [p.detach().clone() for p in model.parameters()]
        averages[:] = now if i == 1 else [0.8 * a + 0.2 * p for a, p in zip(averages, now)]

    model, _ = bare(path, step)
    for p, a in zip(model.parameters(), averages):
        p.data.copy_(a)
    assert one(path)["score"] == pytest.approx(-last_loss(path, model), rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_nearly_alike_and_the_weights_stay_single(tmp_path, precision):
    whole, half = one(task(tmp_path / "a", SCORE)), one(task(tmp_path / "b", SCORE, precision=precision))
    assert half["status"] == "ok", half
    assert half["score"] != whole["score"]
    assert half["score"] == pytest.approx(whole["score"], rel=0.05)


@pytest.mark.slow
def test_compiled_training_gives_the_same_to_rounding(tmp_path):
    whole, compiled = one(task(tmp_path / "a", SCORE)), one(task(tmp_path / "b", SCORE, compile=True))
    assert compiled["status"] == "ok", compiled
    assert compiled["score"] == pytest.approx(whole["score"], rel=1e-4)


def test_settings_go_together_with_a_penalty(tmp_path):
    path = task(tmp_path / "a", "", clip=1.0, accumulate=2, ema=0.9, precision="bf16")
    table = compare(path, ["", "penalty=norm_loss(factor=0.1)"], **QUICK)
    assert table.ok
    assert table.rows[0].curves[0][-1][3] != table.rows[1].curves[0][-1][3]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"precision": "half"}, "precision of the task mine is 'no', 'bf16' or 'fp16', got 'half'"),
        ({"clip": 0}, "clip of the task mine is a norm above 0"),
        ({"ema": 1.0}, "ema of the task mine is a decay between 0 and 1"),
        ({"accumulate": 9}, "1 to the batch's 8, got 9"),
    ],
)
def test_wrong_settings(tmp_path, setting, words):
    with pytest.raises(BadInput, match=words):
        load_task(task(tmp_path / "a", **setting))


# -- a loop of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [[0.05], [0.05, 0.5]])
def test_an_own_loop_that_does_what_the_lab_does_gives_what_the_lab_gives(tmp_path, rates):
    recipes = ["", "optim=Adam", "init=orthogonal", "penalty=norm_loss(factor=0.1)"]
    lab = compare(task(tmp_path / "a"), recipes, **QUICK | {"rates": rates})
    own = compare(task(tmp_path / "b", OWN), recipes, **QUICK | {"rates": rates})
    assert [r.scores for r in own.rows] == [r.scores for r in lab.rows]
    assert [[p.rate for p in r.chosen] for r in own.rows] == [[p.rate for p in r.chosen] for r in lab.rows]


def test_what_a_loop_may_return(tmp_path):
    body = OWN.replace("    return lambda part: accuracy(run.model, part)\n", "    return {}\n")
    want = compare(task(tmp_path / "a", OWN), [""], **QUICK).rows[0].scores
    for gives in ("None", "accuracy(run.model, run.test)", "lambda part: torch.tensor(accuracy(run.model, part))"):
        path = task(tmp_path / "b", body.replace("return {}", f"return {gives}"))
        assert compare(path, [""], **QUICK).rows[0].scores == pytest.approx(want)
    one_number = task(tmp_path / "c", body.replace("return {}", "return 0.5"))
    with pytest.raises(
        BadInput, match="returned one number, and the run is scored on validation and on test"
    ) as caught:
        compare(one_number, [""], **QUICK | {"rates": [0.05, 0.5]})
    assert "\n" not in str(caught.value)
    with pytest.raises(
        BadInput, match="must return a score, a function of a part that gives one, or None; it gave a str"
    ):
        compare(task(tmp_path / "d", body.replace("return {}", "return 'good'")), [""], **QUICK)


def test_a_loop_that_leaves_the_penalty_out_fails_and_is_told(tmp_path):
    silent = OWN.replace("run.loss(nn.functional.cross_entropy(run.model(x), y)).backward()",
                         "nn.functional.cross_entropy(run.model(x), y).backward()")  # fmt: skip
    path = task(tmp_path / "a", silent)
    assert compare(path, [""], **QUICK).ok
    with pytest.raises(BadInput, match="never called run.loss\\(loss\\), which adds it"):
        compare(path, ["", "penalty=norm_loss"], **QUICK)


def test_reports_are_the_curve_and_a_wild_one_ends_the_run(tmp_path):
    told = OWN.replace("        run.optimizer.step()\n", "        run.optimizer.step()\n"
                       "        if step % 4 == 0: run.report(step, accuracy(run.model, run.valid or run.test))\n")  # fmt: skip
    row = compare(task(tmp_path / "a", told), [""], **QUICK).rows[0]
    assert [[p[0] for p in c] for c in row.curves] == [[4, 8, 12]] * 2
    assert all(c[-1][2] == s and math.isfinite(c[-1][3]) for c, s in zip(row.curves, row.scores))
    wild = OWN.replace("        run.optimizer.step()\n", "        run.optimizer.step()\n"
                       "        if step == 5: run.report(step, float('nan'))\n")  # fmt: skip
    row = compare(task(tmp_path / "b", wild), [""], **QUICK).rows[0]
    assert row.failed[0] == "diverged: score became nan at step 5"
    lost = OWN.replace("x, y = next(feed)", "x, y = next(feed); x = x * float('nan') if step == 3 else x")
    row = compare(task(tmp_path / "c", lost), [""], **QUICK).rows[0]
    assert row.failed[0] == "diverged: training loss became nan"


def test_an_error_in_the_loop_is_told_before_anything_runs(tmp_path):
    with pytest.raises(BadInput, match="the task mine raised KeyError in its training loop: 'lost'"):
        compare(task(tmp_path / "a", "def train(run):\n    raise KeyError('lost')\n"), [""], **QUICK)


def test_two_optimizers_are_one_to_a_loop():
    torch.manual_seed(0)
    nets = [nn.Linear(3, 2) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(5, 3)
    apart = [torch.optim.SGD([nets[0].weight], lr=0.1, momentum=0.9), torch.optim.Adam([nets[0].bias], lr=0.01)]
    both = Chained([torch.optim.SGD([nets[1].weight], lr=0.1, momentum=0.9), torch.optim.Adam([nets[1].bias], lr=0.01)])
    fall = torch.optim.lr_scheduler.LambdaLR(both, lambda k: 1 / (1 + k))
    for k in range(4):
        for o in apart:
            o.zero_grad()
        nets[0](x).square().sum().backward()
        for o, rate in zip(apart, (0.1, 0.01)):
            o.param_groups[0]["lr"] = rate / (1 + k)
            o.step()
        both.zero_grad()
        nets[1](x).square().sum().backward()
        both.step()
        fall.step()
        assert torch.equal(nets[0].weight, nets[1].weight)
        assert torch.equal(nets[0].bias, nets[1].bias)
    again = Chained(
        [torch.optim.SGD([nets[1].weight], lr=0.1, momentum=0.9), torch.optim.Adam([nets[1].bias], lr=0.01)]
    )
    again.load_state_dict(both.state_dict())
    state = again.optimizers[0].state[nets[1].weight]["momentum_buffer"]
    assert torch.equal(state, both.optimizers[0].state[nets[1].weight]["momentum_buffer"])
    assert [g is h for g, h in zip(again.param_groups, [g for o in again.optimizers for g in o.param_groups])] == [
        True
    ] * 2


def test_lbfgs_and_sparse_optimizers_are_refused_in_words(tmp_path):
    with pytest.raises(BadInput, match="optim=LBFGS evaluates the loss several times a step"):
        compare(task(tmp_path / "a"), ["", "optim=LBFGS"], **QUICK)
    with pytest.raises(BadInput, match="SparseAdam does not support dense gradients"):
        compare(task(tmp_path / "a"), ["", "optim=SparseAdam"], **QUICK)

"""The tasks that penalties are for: what they say of their data is true, a run learns, and a penalty reaches them."""

import pytest
import torch

from pondera.lab import load_task
from pondera.lab.recipe import Recipe
from pondera.lab.train import RunSpec, run


def short(name, recipe="", rate=0.01, steps=30, seed=0):
    t = load_task(name)
    return run(RunSpec(t.name, t.path, t.source, Recipe.parse(recipe), rate, seed, steps, steps, "final"))["score"]


def test_continual_learns_every_order_of_pixels():
    (x, y), (x_test, y_test) = load_task("continual").data()
    assert len(x) == 1000 and len(x_test) == 797 and x.shape[1] == 64 and set(y.tolist()) == set(y_test.tolist())
    assert short("continual", steps=10) < 0.3 < 0.5 < short("continual", steps=200)  # a step a task; twenty
    assert short("continual", steps=20) != short("continual", steps=20, seed=1)  # other orders


def test_continual_is_as_long_as_asked_for():
    """Steps that tasks do not divide are all done."""
    seen = []
    t = load_task("continual")

    class Counted(torch.optim.SGD):
        def step(self, *a, **k):
            seen.append(1)
            return super().step(*a, **k)

    from types import SimpleNamespace

    model = t.build()
    optimizer = Counted(model.parameters(), lr=0.01)
    (x, y), test = t.data()

    def batches():
        while True:
            yield x[:10], y[:10]

    score = t.module.train(
        SimpleNamespace(seed=0, steps=37, batches=batches, model=model, optimizer=optimizer, loss=lambda value: value)
    )
    assert len(seen) == 37
    assert 0 <= score(test) <= 1


def test_longtail_has_the_counts_it_says():
    train, tune, test = load_task("longtail").module.data()
    counts = [int((train[1] == k).sum()) for k in range(10)]
    assert sorted(counts, reverse=True) == [300, 180, 108, 65, 39, 23, 14, 8, 5, 3]
    assert [int((tune[1] == k).sum()) for k in range(10)] == [20] * 10
    assert [int((test[1] == k).sum()) for k in range(10)] == [180] * 10
    rows = [tuple(r) for part in (train, tune, test) for r in part[0][:, 60:140].tolist()]
    assert len(set(rows)) > 0.995 * len(rows)  # no image twice, but for a few that look alike there


def test_longtail_passes_over_the_rare():
    t = load_task("longtail")
    assert 0.2 < short("longtail", steps=60) < 0.8
    assert t.settings.score == "balanced accuracy"


def test_sae_knows_its_features():
    t = load_task("sae")
    true, rows = t.module.world()
    assert torch.allclose(true.norm(dim=1), torch.ones(32), atol=1e-6)
    model = t.build()
    with torch.no_grad():
        model.decoder[:32] = 3 * true
    assert t.module.score(model, None) == pytest.approx(1)
    assert t.module.score(t.build(), None) < 0.6
    on = rows @ torch.linalg.pinv(true)  # 32 directions in 24 dimensions: no unique code, but rows lie in their span
    assert torch.allclose(on @ true, rows, atol=1e-4)
    assert short("sae", steps=200) > 0.62


def test_the_penalty_of_decoders_reaches_the_autoencoder():
    t = load_task("sae")
    torch.manual_seed(0)
    model = t.build()
    (choice,) = [Recipe.parse("penalty=orthogonal_decoder(factor=2.0,chunk=64)")]
    from pondera.penalties import orthogonal_decoder

    assert choice.penalty_of(model).item() == pytest.approx(2 * orthogonal_decoder(model.decoder).item())

"""The tasks "photo" and "audio": a network that is one picture, and one that is one sound."""

import math

import pytest
import torch

from pondera.lab import Recipe, load_task
from pondera.lab.train import RunSpec, run

NAMES = ["audio", "photo"]


@pytest.fixture(params=NAMES)
def task(request):
    return load_task(request.param)


def points(part):
    return {tuple(p) for p in torch.cat(part, 1).tolist()}


def test_train_and_test_are_the_signal_cut_in_two(task):
    train, test = task.data()
    values = task.module.signal().reshape(-1, 1)
    assert len(test[0]) == len(values) // 4
    assert not {tuple(p) for p in train[0].tolist()} & {tuple(p) for p in test[0].tolist()}
    assert points(train) | points(test) == points((task.module.coordinates(), values))


def test_the_same_every_time(task):
    again = task.module.data()
    assert all(torch.equal(a, b) for part, other in zip(task.data(), again) for a, b in zip(part, other))
    assert all(torch.equal(a, b) for s, r in zip(task.module.signals(), task.module.signals()) for a, b in zip(s, r))


def test_it_leaves_the_random_state_alone(task):
    before = torch.get_rng_state()
    task.module.data()
    task.module.signals()
    assert torch.equal(before, torch.get_rng_state())


def test_signals_are_of_the_same_kind_and_not_the_one_scored(task):
    signal, others = task.module.signal().reshape(-1, 1), task.module.signals()
    grid = {tuple(p) for p in task.module.coordinates().tolist()}
    scored = {tuple(p): v for p, v in zip(task.module.coordinates().tolist(), signal[:, 0].tolist())}
    assert len(others) > 30
    for x, y in others:
        assert y.shape == (1024, 1)
        assert {tuple(p) for p in x.tolist()} <= grid
        assert y.abs().max() <= 1
        assert y.std() > 0
        assert sum(scored[tuple(p)] == v for p, v in zip(x.tolist(), y[:, 0].tolist())) < 100  # by chance only


def test_score_by_hand(task):
    model, (x, y) = torch.nn.Identity(), (torch.tensor([[0.0], [1.0]]), torch.tensor([[0.2], [1.2]]))
    assert task.score(model, (x, y)) == pytest.approx(10 * math.log10(4 / 0.04), rel=1e-5)
    assert task.score(model, (x, x)) == 10 * math.log10(4 / 1e-12)


def test_start_is_sirens(task):
    torch.manual_seed(0)
    net = task.build()
    first, *others = [m for m in net if isinstance(m, torch.nn.Linear)]
    assert first.weight.abs().max() <= 1 / first.in_features
    for layer in others:
        bound = math.sqrt(6 / layer.in_features) / 30
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    x = task.data()[0][0]
    assert torch.equal(net[1](x), torch.sin(30 * x))


def test_a_run_knows_more_of_the_unseen_points_than_their_mean(task):
    unseen = task.data()[1][1]
    constant = 10 * math.log10(4 / float(unseen.var()))
    spec = RunSpec(task.name, task.path, task.source, Recipe(), rate=1e-3, seed=0, steps=250, stop=250, phase="final")
    result = run(spec)
    assert result["status"] == "ok", result
    assert result["score"] > constant + 2


def test_crops_share_no_pixel():
    photo = load_task("photo").module
    places = list(photo.crops())
    assert photo.PLACE in places
    for i, (name, row, column) in enumerate(places):
        for other, r, c in places[:i]:
            assert name != other or abs(row - r) >= photo.SIDE or abs(column - c) >= photo.SIDE


def test_sounds_are_broadband_and_limited():
    audio = load_task("audio").module
    hertz = torch.fft.rfftfreq(audio.SAMPLES, 1 / audio.SAMPLES)
    for seed in range(5):
        y = audio.sound(seed)
        assert y.abs().max() == 1
        power = torch.fft.rfft(y.double()).abs().square()
        share = power.cumsum(0) / power.sum()
        assert share[hertz <= audio.TOP + 20][-1] > 0.99
        assert share[hertz <= 100][-1] < 0.5
        assert share[hertz <= 400][-1] < 0.9

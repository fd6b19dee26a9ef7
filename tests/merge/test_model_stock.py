import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pondera.errors import BadInput
from pondera.merge import _stream, model_stock, model_stock_files, stock_epoch_
from pondera.merge.model_stock import ratio


def wave(k, *shape):
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32) * (0.7 + 0.1 * k) + k).view(shape)


def family(n, *shape):
    w0 = wave(0, *shape)
    return w0, [w0 + 0.1 * wave(5, *shape) + 0.1 * wave(i + 1, *shape) for i in range(n)]


def stock(w0, ws, **kwargs):
    merged = model_stock({"w": w0}, [{"w": w} for w in ws], **kwargs)
    return merged["w"], merged.report.tensors[0].facts


@pytest.mark.parametrize(("degrees", "t"), [(0, 1), (60, 2 / 3), (90, 0), (45, 2 * 0.5**0.5 / (1 + 0.5**0.5))])
def test_two_updates_at_an_angle(degrees, t):
    a = math.radians(degrees)
    w0 = torch.tensor([1.0, -2.0])
    ws = [w0 + torch.tensor([3.0, 0.0]), w0 + 3 * torch.tensor([math.cos(a), math.sin(a)])]
    merged, facts = stock(w0, ws)
    assert facts["t"] == pytest.approx(t, abs=1e-6)
    assert facts["cos"] == pytest.approx(math.cos(a), abs=1e-6)
    assert torch.allclose(merged, t * (ws[0] + ws[1]) / 2 + (1 - t) * w0, atol=1e-5)


def test_t_is_the_foot_of_the_perpendicular_from_the_centre():
    """On the shell the paper describes: a centre mu, w_i - mu at right angles to each other and to w_0 - mu. The merge is the
    point of the plane through w_0, w_1, ... nearest to mu, here found by least squares."""
    for n in (2, 3, 5):
        w0, mu = torch.zeros(20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
        mu[0] = 2.0
        ws = [mu.clone() for _ in range(n)]
        for i, w in enumerate(ws):
            w[1 + i] = 1.5
        d = torch.stack([w - w0 for w in ws], 1)
        nearest = w0 + d @ torch.linalg.lstsq(d, (mu - w0)[:, None]).solution[:, 0]
        merged, _ = stock(w0, ws)
        assert torch.allclose(merged, nearest, atol=1e-12)


def test_agrees_with_mergekit():
    """mergekit 0.1.5, its model_stock on the waves above: position-weighted sum and norm of the change, two entries."""
    figures = {
        (2, (6, 5), False): (0.859687, 0.151575, 0.867049, 1.012486),
        (2, (7,), False): (-0.842104, 0.158189, 0.871475, -0.882515),
        (2, (7,), True): (-0.842104, 0.158189, 0.871475, -0.882515),
        (3, (6, 5), False): (1.131419, 0.236554, 0.876262, 1.041787),
        (3, (6, 5), True): (1.137749, 0.20147, 0.863807, 1.041692),
        (3, (7,), True): (-0.090755, 0.017197, 0.866122, -0.872571),
    }
    for (n, shape, filter_wise), expected in figures.items():
        w0, ws = family(n, *shape)
        out, facts = stock(w0, ws, filter_wise=filter_wise)
        d = (out.double() - w0.double()).flatten()
        got = (d @ torch.arange(1, len(d) + 1, dtype=torch.float64), d.norm(), out.flatten()[3], out.flatten()[-1])
        assert [float(x) for x in got] == pytest.approx(expected, abs=2e-5)
        assert not facts["clamped"]


def test_obtuse_updates_are_clamped_where_mergekit_leaves_the_base_behind():
    w0 = torch.tensor([1.0, 1.0])
    ws = [w0 + torch.tensor([1.0, 0.0]), w0 + torch.tensor([-0.97, 0.24])]  # cos -.97: t would be -66
    merged, facts = stock(w0, ws)
    assert torch.equal(merged, w0)
    assert (facts["t"], facts["clamped"]) == (0, 1)
    opposite, facts = stock(w0, [w0 + 1, w0 - 1])  # the pole
    assert torch.equal(opposite, w0)
    report = model_stock({"w": w0}, [{"w": w} for w in ws]).report
    assert "t clamped to 0: w" in report.summary()
    assert "t clamped to 0: nowhere" in model_stock({"w": w0}, [{"w": ws[0]}] * 2).report.summary()


def test_rows_have_angles_of_their_own():
    torch.manual_seed(0)
    w0, ws = torch.randn(3, 2, 2), [torch.randn(3, 2, 2) for _ in range(3)]
    merged, facts = stock(w0, ws, filter_wise=True)
    rows = [stock(w0[i], [w[i] for w in ws]) for i in range(3)]
    assert torch.allclose(merged, torch.stack([r[0] for r in rows]), atol=1e-6)
    assert facts["t"] == pytest.approx(sum(r[1]["t"] for r in rows) / 3)
    assert facts["clamped"] == sum(r[1]["clamped"] for r in rows)


@pytest.mark.parametrize("budget", [1, 300, 2**22])
@pytest.mark.parametrize("filter_wise", [True, False])
def test_blocks_and_files_give_the_same(tmp_path, budget, filter_wise, monkeypatch):
    w0, ws = family(2, 8, 3, 2)
    states = [
        {"w": w, "n": torch.tensor(i), "e": torch.zeros(0, 3), "b": w.flatten()[:4].clone()}
        for i, w in enumerate([w0, *ws])
    ]
    whole = model_stock(states[0], states[1:], filter_wise=filter_wise)
    monkeypatch.setattr(_stream, "BUDGET", budget)
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for s, path in zip(states, paths):
        save_file(s, path)
    report = model_stock_files(paths[0], paths[1:], tmp_path / "out.safetensors", filter_wise=filter_wise)
    got = load_file(tmp_path / "out.safetensors")
    assert all(torch.allclose(x, got[k], atol=1e-7) for k, x in whole.items())
    assert got["n"].item() == 0
    facts = {t.name: t.facts for t in whole.report.tensors}
    for t in report.tensors:  # in the file's order
        assert t.facts == pytest.approx(facts[t.name], abs=1e-6)


def test_frozen_and_equal_tensors():
    w0, (w1, _) = family(2, 5)
    assert torch.equal(stock(w0, [w0, w0])[0], w0)
    assert torch.equal(stock(w0, [w0, w1])[0], w0)
    for filter_wise in (False, True):
        merged, facts = stock(w0, [w1, w1, w1], filter_wise=filter_wise)
        assert (facts["t"], facts["cos"]) == (1, 1)  # no rounding: every ratio of what is equal is 1
        assert torch.allclose(merged, w1)


def test_small_updates_keep_their_angle():
    """Where 1e-8 or 1e-6 is added to denominators updates of this size would seem at right angles."""
    w0 = torch.zeros(1000)
    d = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ws = [1e-6 * d, 1e-6 * d.roll(1) + 1e-6 * d]
    big, small = stock(w0, [w * 1e6 for w in ws])[1], stock(w0, ws)[1]
    assert small["cos"] == pytest.approx(big["cos"], rel=1e-4)
    assert big["cos"] == pytest.approx(0.5**0.5, abs=0.05)


def test_half_precision_angles_are_taken_in_float32():
    w0, ws = family(2, 64, 64)
    half = [w.bfloat16() for w in (w0, *ws)]
    merged, facts = stock(half[0], half[1:])
    assert merged.dtype == torch.bfloat16
    assert facts["t"] == pytest.approx(stock(half[0].float(), [w.float() for w in half[1:]])[1]["t"], rel=1e-6)


def test_ratio_is_held_between_0_and_1():
    cos = torch.linspace(-1, 1, 201, dtype=torch.float64)
    for n in (2, 3, 10):
        t = ratio(cos, n)
        assert t.min() == 0 and t.max() == pytest.approx(1)
        assert (t.diff() >= 0).all()
        inside = cos[cos > 0]
        assert torch.allclose(t[cos > 0], n * inside / (1 + (n - 1) * inside))


# -- during training --------------------------------------------------------------------------------------------------


def runs(n=2):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    models = [copy.deepcopy(base) for _ in range(n)]
    for i, m in enumerate(models):
        m(torch.randn(8, 3) + i)
        with torch.no_grad():
            m[0].weight.add_(torch.randn(4, 3) + 1)
    models[0][1].num_batches_tracked.fill_(5)
    return base, models


def test_an_epoch_sets_all_to_the_merge_in_place():
    base, models = runs()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    expected = model_stock(base, models)
    weight, optimizer = models[0][0].weight, torch.optim.Adam(models[0].parameters())
    report = stock_epoch_(models, base)
    assert weight is models[0][0].weight is optimizer.param_groups[0]["params"][0]
    for m in models:
        for k, x in m.state_dict().items():
            assert torch.equal(x, expected[k]) or k == "1.num_batches_tracked"
    assert [m[1].num_batches_tracked.item() for m in models] == [5, 1]
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in before.items())
    assert report.tensors == expected.report.tensors
    assert report.method == "stock_epoch_"


def test_an_epoch_refuses_shared_memory_and_changes_nothing():
    base, models = runs()
    for bad, start in (
        ([models[0], models[0]], base),
        ([base, models[1]], base),
        (models, models[0].state_dict()),
        (models[:1], base),
        ([models[0], "model"], base),
    ):
        before = {k: v.clone() for k, v in models[0].state_dict().items()}
        with pytest.raises(BadInput) as error:
            stock_epoch_(bad, start)
        assert "\n" not in str(error.value)
        assert all(torch.equal(v, before[k]) for k, v in models[0].state_dict().items())


@pytest.mark.parametrize(
    ("finetuned", "words"),
    [
        ([{"w": torch.ones(2)}], "at least 3 models, got 2"),
        ([{"w": torch.ones(2)}, {"w": torch.ones(3)}], r"model 3 differs in w \(2,\) against \(3,\)"),
        ([{"w": torch.ones(2)}, {"v": torch.ones(2)}], "model 3 lacks w and has v besides"),
        ([{"w": torch.ones(2)}, {"w": torch.full((2,), torch.nan)}], "NaN or infinity in w of model 3"),
    ],
)
def test_refused_in_one_sentence(finetuned, words):
    with pytest.raises(BadInput, match=words):
        model_stock({"w": torch.zeros(2)}, finetuned)

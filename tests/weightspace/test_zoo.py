import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pondera.errors import BadInput
from pondera.weightspace import (
    coordinates,
    fit_inrs,
    load_zoo,
    make_zoo,
    run_states,
    siren,
    start_states,
    train_states,
    zoo_kinds,
)
from pondera.weightspace.zoo import KINDS

SMALL = {"steps": 3, "width": 6}


def test_batched_training_is_each_network_by_itself():
    """Against torch's AdamW with a cosine, network by network, each at its own rate and decay."""
    g = torch.Generator().manual_seed(0)
    states = start_states(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 3, g)
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    rate, decay = torch.tensor([0.01, 0.02, 0.05]), torch.tensor([0.0, 0.1, 1.0])
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found = train_states(
        states, lambda s, _: (run_states(net, s, x) - y).square().mean((1, 2)), steps=20, rate=rate, decay=decay
    )
    for i in range(3):
        net.load_state_dict({n: v[i] for n, v in states.items()})
        optimizer = torch.optim.AdamW(net.parameters(), float(rate[i]), weight_decay=float(decay[i]))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        for _ in range(20):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            optimizer.step()
            schedule.step()
        for name, p in net.named_parameters():
            assert torch.allclose(found[name][i], p, atol=1e-5), name


def test_a_network_that_diverges_leaves_the_others_alone():
    states = {"w": torch.tensor([[1.0], [1e30]])}
    found = train_states(states, lambda s, _: s["w"].square().square().sum(1), steps=5, rate=0.1)
    alone = train_states({"w": states["w"][:1]}, lambda s, _: s["w"].square().square().sum(1), steps=5, rate=0.1)
    assert torch.equal(found["w"][0], alone["w"][0])


def test_sirens_start_and_fit():
    net = siren(64, 2, w0=20.0)
    assert net[0].weight.abs().max() <= 0.5
    assert net[2].weight.abs().max() <= (6 / 64) ** 0.5 / 20
    images = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0))
    states = fit_inrs(images, width=16, steps=300)
    seen = run_states(siren(16, 2), states, coordinates(6, 6)).view(3, 6, 6)
    assert (seen - images).square().mean() < 1e-3 * images.var()
    shared = fit_inrs(images, width=16, steps=0, shared_start=True)
    assert torch.equal(shared["2.weight"][0], shared["2.weight"][2])
    for bad in (torch.rand(3, 6), torch.ones(2, 2, 2, dtype=torch.long), torch.full((1, 2, 2), torch.nan)):
        with pytest.raises(BadInput, match="fit_inrs"):
            fit_inrs(bad)


def test_a_stopped_zoo_goes_on_and_is_the_same(tmp_path):
    done = []

    class Stop(Exception):
        pass

    def stop_after_one(n, total):
        done.append((n, total))
        raise Stop

    with pytest.raises(Stop):
        make_zoo("digits-inrs", tmp_path / "a", n=150, progress=stop_after_one, **SMALL)
    assert done == [(100, 150)]
    with pytest.raises(BadInput, match="not finished"):
        load_zoo(tmp_path / "a")
    first = load_file(tmp_path / "a" / "nets-00000.safetensors")
    make_zoo("digits-inrs", tmp_path / "a", n=150, **SMALL)
    make_zoo("digits-inrs", tmp_path / "b", n=150, **SMALL)
    a, b = load_zoo(tmp_path / "a"), load_zoo(tmp_path / "b")
    assert len(a) == 150
    assert torch.equal(a.states["0.weight"][:100], first["state/0.weight"])
    assert all(torch.equal(a.states[n], b.states[n]) for n in a.states)
    assert not torch.equal(a.states["0.weight"][0], a.states["0.weight"][100])
    assert a.model()(torch.zeros(1, 2)).shape == (1, 1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind(kind, tmp_path):
    """What a zoo says of a network is what the network does."""
    settings = {"transformers": {"widths": [8, 12], "steps": 2}, "classifiers": {"steps": 30}}.get(kind, SMALL)
    make_zoo(kind, tmp_path / "zoo", n=3, **settings)
    zoo = load_zoo(tmp_path / "zoo", "width=8" if kind == "transformers" else None)
    assert len(zoo) == (2 if kind == "transformers" else 3)
    assert set(zoo.states) == set(zoo.model().state_dict())
    assert json.loads((tmp_path / "zoo" / "zoo.json").read_text())["kind"] == kind
    if kind == "classifiers":
        from pondera.weightspace.zoo import _digits

        images, labels = _digits()
        model = zoo.model()
        model.load_state_dict({n: x[1] for n, x in zoo.states.items()})
        assert (model(images[1000:]).argmax(1) == labels[1000:]).float().mean() == pytest.approx(
            float(zoo.facts["accuracy"][1])
        )


def test_refusals(tmp_path):
    make_zoo("transformers", tmp_path / "t", n=2, widths=[8, 12], steps=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("keep")
    for call, words in (
        (lambda: make_zoo("digits", tmp_path / "x"), "did you mean"),
        (lambda: make_zoo("classifiers", tmp_path / "x", widht=3), "no setting 'widht'"),
        (lambda: make_zoo("classifiers", tmp_path / "x", n=0), "at least 1"),
        (lambda: make_zoo("classifiers", tmp_path / "no" / "x"), "does not exist"),
        (lambda: make_zoo("classifiers", tmp_path / "other"), "has other things in it"),
        (lambda: make_zoo("transformers", tmp_path / "t", n=2, widths=[8, 16], steps=1), "another recipe"),
        (lambda: load_zoo(tmp_path / "t"), r"mixed architectures, take one at a time: group=width=8, width=12"),
        (lambda: load_zoo(tmp_path / "t", "width=9"), "no architecture 'width=9'"),
        (lambda: load_zoo(tmp_path / "other"), "holds no zoo"),
        (lambda: siren(0), "width of at least 1"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
    assert set(zoo_kinds()["classifiers"]) == {"says", "n", "width", "steps"}

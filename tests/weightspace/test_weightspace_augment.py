import math
from itertools import pairwise, permutations
from math import prod

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.weightspace import (
    add_noise,
    drop_smallest,
    drop_weights,
    flip_signs,
    match_states,
    move_inputs,
    run_states,
    scale_units,
    shift_phases,
    siren,
    start_states,
    weight_mixup,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def sirens(n=5, width=8, depth=2):
    return {k: x.double() for k, x in start_states(lambda: siren(width, depth), n, gen(1)).items()}


def apart(model, a, b, x):
    return (run_states(model, a, x) - run_states(model, b, x)).abs().max().item()


X = torch.rand(30, 2, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("move", [flip_signs, lambda s, g: shift_phases(s, g, w0=30.0)])
@pytest.mark.parametrize("depth", [1, 2])
def test_exact_on_sirens(move, depth):
    states = sirens(depth=depth)
    moved = move(states, gen())
    assert not torch.equal(moved["0.bias"], states["0.bias"])
    assert not torch.equal(moved[f"{2 * depth}.weight"], states[f"{2 * depth}.weight"])
    assert apart(siren(8, depth), states, moved, X) < 1e-10


def test_signs_on_tanh_and_scales_on_relu():
    for act, move in ((nn.Tanh, flip_signs), (nn.ReLU, scale_units)):
        net = nn.Sequential(nn.Linear(2, 6), act(), nn.Linear(6, 5, bias=False), act(), nn.Linear(5, 3))
        states = {n: torch.randn(4, *x.shape, dtype=torch.float64) for n, x in net.state_dict().items()}
        assert apart(net, states, move(states, gen()), X) < 1e-10
    assert apart(net, states, flip_signs(states, gen()), X) > 0.1  # ReLU is not odd


def test_moved_inputs():
    """f'(x) = f(A x + t), with A and t read off the weights; a turn and back is nothing."""
    states = sirens()
    moved = move_inputs(states, gen())
    for i in range(3):
        w, b = states["0.weight"][i], states["0.bias"][i]
        a = torch.linalg.lstsq(w, moved["0.weight"][i]).solution
        t = torch.linalg.lstsq(w, (moved["0.bias"][i] - b).unsqueeze(1)).solution.flatten()
        assert abs(t).max() <= 0.25
        size = a.det().sqrt()
        assert 0.8 <= size <= 1.2
        assert torch.allclose(a @ a.T, size**2 * torch.eye(2, dtype=torch.float64))
        assert abs(math.degrees(math.atan2(a[1, 0], a[0, 0]))) <= 30
        one = {n: x[i : i + 1] for n, x in states.items()}
        then = {n: x[i : i + 1] for n, x in moved.items()}
        assert torch.allclose(run_states(siren(8), one, X @ a.T + t), run_states(siren(8), then, X))
    assert move_inputs(states, gen(), rotate=0, scale=0, translate=0)["0.weight"].equal(states["0.weight"])


def test_noise_dropout_and_their_sizes():
    states = {"w": torch.randn(20, 50, 60, generator=gen(2)), "one": torch.ones(20, 1)}
    noisy = add_noise(states, gen(), scale=0.3)
    assert (noisy["w"] - states["w"]).std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(noisy["one"], states["one"])
    dropped = drop_weights(states, gen(), p=0.25)["w"]
    gone = dropped == 0
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.allclose(dropped[~gone], states["w"][~gone] / 0.75)


def wave(shape, k):
    return torch.sin(k + 1.7 * torch.arange(prod(shape), dtype=torch.float64)).float().view(shape)


def waves(sizes, k):
    states = {}
    for i, (a, b) in enumerate(pairwise(sizes)):
        states |= {f"{i}.weight": wave((1, b, a), k + i), f"{i}.bias": wave((1, b), k + 5 + i)}
    return states


def squared(a, b):
    return sum((a[n] - b[n]).square().sum() for n in a).item()


@pytest.mark.parametrize(
    ("sizes", "before", "after"),
    [((2, 8, 1), 53.0108, 12.317184), ((2, 8, 8, 1), 174.84576, 21.823967), ((2, 6, 7, 5, 1), 187.07718, 46.276134)],
)
def test_matching_agrees_with_the_authors(sizes, before, after):
    """AvivSham/deep-weight-space-augmentations at 429e372, merge_two on waves: the same order; squared distances."""
    a, b = waves(sizes, 0), waves(sizes, 40)
    assert squared(a, b) == pytest.approx(before, rel=1e-5)
    assert squared(a, match_states(b, a)) == pytest.approx(after, rel=1e-5)


def test_quantile_agrees_with_the_authors():
    """The same at 429e372: QuantileAugmentation(0.5) on waves 2-5-4-1 after seed 3 sets one entry of 42 to zero."""
    states = waves((2, 5, 4, 1), 0)
    made = drop_smallest(states, gen(3), q=0.5)
    assert sum(int((x == 0).sum()) for x in made.values()) == 1
    everything = torch.cat([x.flatten() for x in states.values()])
    kept = torch.cat([x.flatten() for x in made.values()])
    assert kept[everything.abs().argmin()] == 0


def test_matching_finds_what_was_planted():
    states = sirens(3)
    planted = flip_signs(states, gen(4))
    back = match_states(planted, states, signed=True)
    assert all(torch.allclose(back[n], states[n]) for n in states)
    assert squared(match_states(planted, states), states) > 1  # permutations alone cannot mend signs
    small = waves((2, 3, 1), 0), waves((2, 3, 1), 40)
    best = min(
        squared(small[0], {"0.weight": small[1]["0.weight"][:, list(o)], "0.bias": small[1]["0.bias"][:, list(o)],
                           "1.weight": small[1]["1.weight"][:, :, list(o)], "1.bias": small[1]["1.bias"]})
        for o in permutations(range(3))
    )  # fmt: skip
    assert squared(small[0], match_states(small[1], small[0])) == pytest.approx(best)


def test_mixup():
    states = sirens(6)
    mixed, alpha, partner = weight_mixup(states, gen(), align="none")
    w = states["2.weight"]
    a = alpha.view(-1, 1, 1)
    assert torch.allclose(mixed["2.weight"], a * w + (1 - a) * w[partner])
    assert alpha.min() >= 0 and alpha.max() <= 1
    alone, alpha, _ = weight_mixup(states, gen(), low=1.0, high=1.0)
    assert (alpha == 1).all() and all(torch.allclose(alone[n], states[n]) for n in states)
    # a network and its permuted copy give the network, whatever alpha
    one = {n: x[:1] for n, x in states.items()}
    order = torch.randperm(8, generator=gen(5))
    copy = one | {
        "0.weight": one["0.weight"][:, order],
        "0.bias": one["0.bias"][:, order],
        "2.weight": one["2.weight"][:, :, order],
    }
    pair = {n: torch.cat([one[n], copy[n]]) for n in one}
    for seed in range(3):
        for align in ("match", match_states):
            assert all(torch.allclose(weight_mixup(pair, gen(seed), align=align)[0][n], pair[n]) for n in pair)
    assert not torch.equal(weight_mixup(states, gen(), align="random")[0]["0.weight"], mixed["0.weight"])


def test_refusals():
    states = sirens()
    with pytest.raises(BadInput, match="flip_signs needs states of MLPs: mlp_spec needs weights"):
        flip_signs({"w": torch.zeros(2, 3, 4, 5)}, gen())
    with pytest.raises(BadInput, match=r"a share in \[0, 1\)"):
        drop_weights(states, gen(), p=1.0)
    with pytest.raises(BadInput, match="hidden layer w has none"):
        shift_phases({"w": torch.zeros(2, 3, 4), "v": torch.zeros(2, 1, 3)}, gen())
    with pytest.raises(BadInput, match="reads 4; give rotate=0"):
        move_inputs({"w": torch.zeros(2, 3, 4), "v": torch.zeros(2, 1, 3)}, gen())
    with pytest.raises(BadInput, match="shifts by the first bias, and w has none"):
        move_inputs({"w": torch.zeros(2, 3, 2), "v": torch.zeros(2, 1, 3)}, gen())
    with pytest.raises(BadInput, match="match, random, none or a function, got 'best'"):
        weight_mixup(states, gen(), align="best")
    with pytest.raises(BadInput, match="same names and shapes"):
        match_states(states, sirens(4))
    with pytest.raises(BadInput, match="got NaN or infinity in 0.weight or 2.weight"):
        match_states(states | {"0.weight": states["0.weight"] * torch.nan}, states)
    with pytest.raises(BadInput, match="a scale of at least 0"):
        add_noise(states, gen(), scale=-1)
    with pytest.raises(BadInput, match="0 <= low <= high <= 1"):
        weight_mixup(states, gen(), low=0.5, high=0.2)

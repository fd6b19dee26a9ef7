"""The battery of what reads and writes weights, by discovery; a layer's line in `LAYERS`, an augmentation's in `MOVES`."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pondera.weightspace
from pondera.errors import BadInput
from pondera.weightspace import equivariance_error, permute_states, stack_states, trace_permutations


def net(act=nn.ReLU):
    return nn.Sequential(nn.Linear(2, 5), act(), nn.Linear(5, 4), act(), nn.Linear(4, 3))


def nets(n=6, act=nn.ReLU, channels=None, dtype=torch.float32):
    torch.manual_seed(0)
    states = {name: x.to(dtype) for name, x in stack_states([net(act) for _ in range(n)]).items()}
    if channels is None:
        return states
    return {name: torch.randn(*x.shape, channels, dtype=dtype) for name, x in states.items()}


SPEC = trace_permutations(net(), torch.randn(3, 2))


# a layer that takes a batch of states: how to make it, and how many channels its input has (None: none)
LAYERS: dict[str, tuple] = {
    "NeuronGraphEncoder": (lambda **kw: pondera.weightspace.NeuronGraphEncoder(net()).to(**kw), None),
    "Standardize": (lambda **kw: pondera.weightspace.Standardize(nets()).to(**kw), None),
    "WeightStatistics": (lambda **kw: pondera.weightspace.WeightStatistics(list(nets())), None),
}
UNEVEN: set[str] = set()  # layers that are not equivariant by their nature, and say so
# an augmentation of a batch of states: how it is called, and whether every network's function stays
MOVES: dict[str, tuple] = {
    "permute_states": (lambda states, g: pondera.weightspace.permute_states(SPEC, states, g), True),
}
# public names that are neither; each has tests of its own
OTHERS = {
    "CheckpointSearch",
    "Choice",
    "EntangledConv2d",
    "EntangledLinear",
    "HypernetTuner",
    "LinearHypernet",
    "LoGAH",
    "LowRankDecoder",
    "MixtureBatchNorm1d",
    "MixtureBatchNorm2d",
    "MixtureConv2d",
    "MixtureLinear",
    "PermutationSpec",
    "apply_permutation",
    "choices",
    "coordinates",
    "distillation_loss",
    "draw_choices",
    "equivariance_error",
    "expand_stages",
    "expected_improvement",
    "fit_inrs",
    "grow",
    "load_zoo",
    "make_zoo",
    "parameter_graph",
    "run_states",
    "search_checkpoints",
    "select",
    "share_stages",
    "siren",
    "sparsemax",
    "stack_states",
    "stage_counts",
    "start_states",
    "trace_permutations",
    "train_states",
    "unstack_states",
    "zoo_kinds",
}


def results():
    space = pondera.weightspace
    return {n for n in space.__all__ if hasattr(getattr(space, n), "__dataclass_fields__") and n != "PermutationSpec"}


def test_every_public_name_is_asked():
    public = set(pondera.weightspace.__all__) - results()
    assert public == set(LAYERS) | set(MOVES) | OTHERS, (
        "give a new name a line in LAYERS or MOVES, or test it by itself"
    )


def build(name, **kw):
    torch.manual_seed(1)
    return LAYERS[name][0](**kw)


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_follows_the_symmetries(name):
    layer = build(name, dtype=torch.float64).eval()
    states = nets(channels=LAYERS[name][1], dtype=torch.float64)
    error = equivariance_error(layer, states, SPEC, generator=torch.Generator().manual_seed(0))
    if name in UNEVEN:
        assert error > 1e-3
    else:
        assert error < 1e-10
        # and it does look at the weights: other networks give something else
        other = {n: x.roll(1, 0) for n, x in states.items()}
        a, b = layer(states), layer(other)
        a, b = (list(v.values()) if isinstance(v, dict) else [v] for v in (a, b))
        assert any(not torch.allclose(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layer_is_a_module_like_any_other(name):
    layer, states = build(name).eval(), nets(channels=LAYERS[name][1])
    out = layer(states)
    again = build(name).eval()
    again.load_state_dict(layer.state_dict())
    assert same(again(states), out)
    assert same(copy.deepcopy(layer)(states), out)
    one = layer({n: x[:1] for n, x in states.items()})
    for got, of in zip(values(one), values(out), strict=True):  # each network by itself
        assert torch.allclose(got, of[:1], rtol=1e-4, atol=1e-5)
    missing = dict(list(states.items())[1:])
    with pytest.raises(BadInput) as caught:
        layer(missing)
    assert "\n" not in str(caught.value)
    total = sum(x.float().square().sum() for x in values(layer.train()({n: x.clone() for n, x in states.items()})))
    if any(p.requires_grad for p in layer.parameters()):
        total.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", sorted(MOVES))
def test_move_keeps_form_and_what_it_was_given(name):
    call, exact = MOVES[name]
    act = nn.ReLU
    states = nets(act=act)
    before = {n: x.clone() for n, x in states.items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    moved = call(states, torch.Generator().manual_seed(5))
    assert torch.equal(rng, torch.get_rng_state()), "draws by its generator alone"
    moved = moved[0] if isinstance(moved, tuple) else moved
    assert {n: (x.shape, x.dtype) for n, x in moved.items()} == {n: (x.shape, x.dtype) for n, x in before.items()}
    assert all(torch.equal(states[n], before[n]) for n in before), "what it was given stays"
    again = call(states, torch.Generator().manual_seed(5))
    again = again[0] if isinstance(again, tuple) else again
    assert all(torch.equal(again[n], moved[n]) for n in moved)
    assert any(not torch.equal(moved[n], before[n]) for n in moved)
    if exact:
        x, body = torch.randn(7, 2), net(act)
        for i in range(6):
            one, other = ({n: v[i] for n, v in s.items()} for s in (before, moved))
            assert torch.allclose(functional_call(body, one, x), functional_call(body, other, x), atol=1e-5)


def values(out):
    return list(out.values()) if isinstance(out, dict) else [out]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


@pytest.mark.parametrize("name", [*sorted(LAYERS), *sorted(MOVES)])
def test_documented(name):
    doc = inspect.getdoc(getattr(pondera.weightspace, name))
    assert ">>>" in doc
    assert "Args:" in doc


def test_the_wrong_layer_is_found_out():
    states = nets()
    g = torch.Generator().manual_seed(1)
    assert (
        max(equivariance_error(lambda s: s["0.weight"][:, 0].sum(1), states, SPEC, generator=g) for _ in "12345") > 0.1
    )
    moved = permute_states(SPEC, states, torch.Generator().manual_seed(1))
    assert any(not torch.equal(moved[n], states[n]) for n in moved)

import pytest
import torch
from torch import nn
from torch.func import functional_call

from pondera.errors import BadInput
from pondera.weightspace import (
    Standardize,
    permute_states,
    stack_states,
    trace_permutations,
    unstack_states,
)


def net():
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))


def test_there_and_back():
    nets = [net() for _ in range(4)]
    states = stack_states(nets)
    for one, state in zip(nets, unstack_states(states), strict=True):
        assert all(torch.equal(x, state[n]) for n, x in one.state_dict().items())
    nets[0][0].weight.data.zero_()
    assert states["0.weight"][0].any(), "copies"
    counted = stack_states([nn.BatchNorm1d(3)] * 2)
    assert "num_batches_tracked" not in counted


def test_permuted_networks_are_the_same_functions_in_other_orders():
    torch.manual_seed(0)
    states, x = stack_states([net() for _ in range(4)]), torch.randn(6, 2)
    moved = permute_states(trace_permutations(net(), x), states, torch.Generator().manual_seed(1))
    orders = set()
    for i in range(4):
        before, after = ({n: v[i] for n, v in s.items()} for s in (states, moved))
        assert torch.allclose(functional_call(net(), before, x), functional_call(net(), after, x), atol=1e-6)
        orders.add(tuple((after["0.bias"][:, None] == before["0.bias"]).int().argmax(1).tolist()))
    assert len(orders) > 1, "every network has its own"


def test_standardize_does_not_tell_units_apart():
    torch.manual_seed(0)
    states = stack_states([net() for _ in range(50)])
    s = Standardize(states)
    out = s(states)
    for name, x in out.items():
        assert float(x.mean()) == pytest.approx(0, abs=1e-5), name
        assert float(x.std(correction=0)) == pytest.approx(1, abs=1e-5), name
        assert torch.allclose(s.inverse(out)[name], states[name], atol=1e-6)
    assert s.mean.shape == (4,)


def test_refusals():
    for call, words in (
        (lambda: stack_states([]), "at least one"),
        (lambda: stack_states([net(), nn.Linear(2, 5)]), r"network 1 lacks 0\.weight"),
        (lambda: stack_states([net(), nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3))]), "one architecture"),
        (lambda: stack_states([nn.Linear(2, 2, bias=False), nn.Linear(2, 2)]), "has bias besides"),
        (lambda: stack_states([{"w": torch.tensor([torch.nan])}]), "NaN"),
        (lambda: unstack_states({"a": torch.zeros(2), "b": torch.zeros(3)}), "got 2 in a and 3 in b"),
        (lambda: Standardize({"a": torch.ones(2, 2)})({"b": torch.ones(2, 2)}), "lack a"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_networks_with_batch_norm_whose_counters_are_left_out():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval()
    x = torch.randn(6, 2)
    spec = trace_permutations(body, x)
    moved = permute_states(spec, stack_states([body, body]), torch.Generator().manual_seed(1))
    one = {name: v[0] for name, v in moved.items()}
    assert not torch.equal(one["0.bias"], body[0].bias)
    assert torch.allclose(functional_call(body, one, x), body(x), atol=1e-6)

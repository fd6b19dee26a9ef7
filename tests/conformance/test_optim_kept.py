"""The optimizers' batteries over those of a kept library that rows point at, without what they do not promise."""

import inspect

import pytest
import torch

import pondera.optim
from tests.conformance import test_optim, test_optim_edges

kept = pytest.importorskip("pytorch_optimizer")

KEPT = {"AdamP": 0.02, "FAdam": 0.02, "SGDP": 0.3}  # each at a rate that so few steps show, where none is given
CHECKS = {
    name: check
    for battery in (test_optim, test_optim_edges)
    for name, check in vars(battery).items()
    if name.startswith("test_") and "name" in inspect.signature(check).parameters
}
NOT_PROMISED = {
    "test_docstring": "how pondera documents its own",
    "test_refuses_in_one_sentence": "BadInput is pondera's",
    "test_complex_parameters_are_refused": "BadInput is pondera's",
    "test_a_gradient_that_is_not_finite_moves_nothing": "BadInput is pondera's; as torch's own they let it through",
}
COPY = "a copy has lost `maximize` and cannot step (4.1.0)"
LAYOUT = "it asks for a view of the gradient that channels_last does not give (4.1.0)"
DOUBLE = "its state is float32 beside float64 parameters (4.1.0)"
FAILS = {(name, "test_deepcopy_goes_its_own_way"): COPY for name in KEPT}
FAILS |= {(name, "test_channels_last_and_strided_weights"): LAYOUT for name in ("AdamP", "SGDP")}
FAILS |= {
    ("FAdam", check): DOUBLE
    for check in ("test_channels_last_and_strided_weights", "test_two_optimizers_share_a_model")
}
FAILS |= {("FAdam", "test_precisions", torch.float64): DOUBLE}


@pytest.fixture(autouse=True)
def in_the_rooms_place(monkeypatch):
    """The batteries look their optimizers up in the room."""
    for name, rate in KEPT.items():
        method = getattr(kept, name)
        monkeypatch.setattr(pondera.optim, name, method, raising=False)
        monkeypatch.setitem(
            test_optim.MADE_BY, name, lambda params, lr=rate, method=method, **kw: method(params, lr=lr, **kw)
        )


def given(check):
    """The arguments of a check besides the name, one dict a case."""
    found = [{}]
    for mark in getattr(check, "pytestmark", []):
        argument, values = (mark.args[0], mark.args[1]) if mark.name == "parametrize" else ("name", ())
        if argument != "name":
            found = [{**one, argument: value} for one in found for value in values]
    return found


def cases():
    for name in KEPT:
        for check in sorted(set(CHECKS) - set(NOT_PROMISED)):
            slow = any(m.name == "slow" for m in getattr(CHECKS[check], "pytestmark", []))
            for more in given(CHECKS[check]):
                fails = FAILS.get((name, check)) or FAILS.get((name, check, *more.values()))
                marks = [pytest.mark.slow] * slow + [pytest.mark.xfail(strict=True, reason=fails)] * bool(fails)
                yield pytest.param(name, check, more, id="-".join(map(str, (name, check, *more.values()))), marks=marks)


@pytest.mark.parametrize(("name", "check", "more"), list(cases()))
def test_kept(name, check, more):
    CHECKS[check](name, **more)

"""Look before training: where signal, gradient or class balance is lost, which start mends it, and the code to paste.

>>> import torch
>>> from pondera.doctor import inspect
>>> inspect(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)), torch.randn(16, 4)).layers[0].kind
'Linear'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pondera.doctor._faults import Fault, Start
    from pondera.doctor._inspect import Inspection, inspect
    from pondera.doctor._rank import rank_starts
    from pondera.doctor._ranking import Ranking, Trial
    from pondera.doctor._snippet import snippet, start_code

_LATER = {
    "Fault": "_faults",
    "Inspection": "_inspect",
    "Ranking": "_ranking",
    "Start": "_faults",
    "Trial": "_ranking",
    "inspect": "_inspect",
    "rank_starts": "_rank",
    "snippet": "_snippet",
    "start_code": "_snippet",
}
__all__ = ["Fault", "Inspection", "Ranking", "Start", "Trial", "inspect", "rank_starts", "snippet", "start_code"]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"pondera.doctor.{_LATER[name]}"), name)
    raise AttributeError(f"module 'pondera.doctor' has no attribute {name!r}")

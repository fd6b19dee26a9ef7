"""The lab: compare choices about weights on a task, fairly; look at a model before training it; customise one.

>>> from pondera.lab import Recipe
>>> Recipe(init="lsuv", optim="NorMuon").name
'init=lsuv+optim=NorMuon'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pondera.lab.recipe import Recipe
from pondera.lab.task import Settings, Task, built_in, load_task

if TYPE_CHECKING:
    from pondera.lab._compare import Comparison, Row, compare
    from pondera.lab._customize import Customized, customize, load_base, load_customized
    from pondera.lab._inspect import Inspection, inspect
    from pondera.lab._rank import Ranking, rank_starts
    from pondera.lab.stats import Difference, difference

_LATER = {  # heavier parts, loaded when used
    "Comparison": "_compare",
    "Row": "_compare",
    "compare": "_compare",
    "Customized": "_customize",
    "customize": "_customize",
    "load_base": "_customize",
    "load_customized": "_customize",
    "Inspection": "_inspect",
    "inspect": "_inspect",
    "Ranking": "_rank",
    "rank_starts": "_rank",
    "Difference": "stats",
    "difference": "stats",
}
__all__ = [
    "Comparison",
    "Customized",
    "Difference",
    "Inspection",
    "Ranking",
    "Recipe",
    "Row",
    "Settings",
    "Task",
    "built_in",
    "compare",
    "customize",
    "difference",
    "inspect",
    "load_base",
    "load_customized",
    "load_task",
    "rank_starts",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"pondera.lab.{_LATER[name]}"), name)
    raise AttributeError(f"module 'pondera.lab' has no attribute {name!r}")

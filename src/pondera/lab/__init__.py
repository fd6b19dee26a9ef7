"""The lab: compare choices about weights on a task, fairly.

>>> from pondera.lab import Recipe
>>> Recipe(init="lsuv", optim="NorMuon").name
'init=lsuv+optim=NorMuon'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pondera.errors import needs_extra, require_extra
from pondera.lab.recipe import Recipe
from pondera.lab.task import Settings, Task, built_in, load_task

if TYPE_CHECKING:
    from pondera.lab._compare import Cost, Stopped, compare, plan_of
    from pondera.lab._judge import judge
    from pondera.lab.judgement import Judgement
    from pondera.lab.results import Comparison, Row
    from pondera.lab.stats import Difference, difference

_LATER = {  # heavier parts, loaded when used
    "Comparison": "results",
    "Cost": "_compare",
    "Row": "results",
    "Stopped": "_compare",
    "compare": "_compare",
    "plan_of": "_compare",
    "Difference": "stats",
    "Judgement": "judgement",
    "judge": "_judge",
    "difference": "stats",
}
_NEEDS = {  # packages of the extra
    "compare": ("scipy", "sqlalchemy"),
    "difference": ("scipy",),
    "judge": ("scipy",),
    "plan_of": ("scipy", "sqlalchemy"),
}
__all__ = [
    "Comparison",
    "Cost",
    "Difference",
    "Judgement",
    "Recipe",
    "Row",
    "Settings",
    "Stopped",
    "Task",
    "built_in",
    "compare",
    "difference",
    "judge",
    "load_task",
    "plan_of",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        require_extra(f"pondera.lab.{name}", *_NEEDS.get(name, ()))  # now, and not after hours of work
        with needs_extra(f"pondera.lab.{name}", "lab"):
            return getattr(import_module(f"pondera.lab.{_LATER[name]}"), name)
    raise AttributeError(f"module 'pondera.lab' has no attribute {name!r}")

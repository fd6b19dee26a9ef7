"""pondera: one home for the weights of neural networks and of data.

The rooms load when first used: ``pondera.init`` (where weights start), ``pondera.parametrize`` (how they are held),
``pondera.nn`` (layers that hold them so), ``pondera.penalties`` (what pulls on them), ``pondera.optim`` (how they
move), ``pondera.probe`` (how they are looked at), ``pondera.lab`` (fair comparisons), ``pondera.papers`` (the
catalogue), ``pondera.replications`` (claims re-run).

>>> import pondera
>>> "lsuv_" in dir(pondera.init)
True
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_DOORS = ("init", "lab", "linalg", "nn", "optim", "papers", "parametrize", "penalties", "probe", "replications")
__all__ = [*_DOORS, "__version__"]


def __getattr__(name: str) -> ModuleType:
    if name in _DOORS:
        return import_module(f"pondera.{name}")
    raise AttributeError(f"module 'pondera' has no attribute {name!r}; its rooms are {', '.join(_DOORS)}")


def __dir__() -> list[str]:
    return sorted(__all__)

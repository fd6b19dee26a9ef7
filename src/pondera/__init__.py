"""pondera: one home for the weights of neural networks and of data.

The rooms load when first used: ``pondera.init`` (where weights start), ``pondera.parametrize`` (how they are held),
``pondera.nn`` (layers that hold them so), ``pondera.penalties`` (what pulls on them), ``pondera.optim`` (how they
move), ``pondera.probe`` (how they are looked at), ``pondera.adapters`` (reuse, as PEFT methods), ``pondera.merge``
(several models into one), ``pondera.compress`` (smaller weights), ``pondera.weightspace`` (networks that read or write
weights), ``pondera.lab`` (fair comparisons), ``pondera.doctor`` (a look before training),
``pondera.customize`` (one image to a diffusion adapter), ``pondera.papers`` (the catalogue),
``pondera.replications`` (claims re-run).

>>> import pondera
>>> "lsuv_" in dir(pondera.init)
True
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see of the rooms that load later
    from pondera import (
        adapters,
        compress,
        customize,
        doctor,
        init,
        lab,
        linalg,
        merge,
        nn,
        optim,
        papers,
        parametrize,
        penalties,
        probe,
        replications,
        report,
        weightspace,
    )

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "adapters",
    "compress",
    "customize",
    "doctor",
    "init",
    "lab",
    "linalg",
    "merge",
    "nn",
    "optim",
    "papers",
    "parametrize",
    "penalties",
    "probe",
    "replications",
    "report",
    "weightspace",
]
_DOORS = tuple(name for name in __all__ if not name.startswith("_"))


def __getattr__(name: str) -> ModuleType:
    if name in _DOORS:
        return import_module(f"pondera.{name}")
    raise AttributeError(f"module 'pondera' has no attribute {name!r}; its rooms are {', '.join(_DOORS)}")


def __dir__() -> list[str]:
    return sorted(__all__)

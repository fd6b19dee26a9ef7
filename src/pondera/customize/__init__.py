"""One photo to a diffusion adapter: the trainer, what loads its results, and a small base of glyphs to try it on.

>>> from pondera.customize import customize
>>> customize.__name__
'customize'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pondera.errors import require_extra

if TYPE_CHECKING:
    from pondera.customize._export import Exported, export
    from pondera.customize._train import Customized, customize, load_base, load_customized

PACKAGES = ("diffusers", "accelerate", "PIL", "peft", "transformers", "aenum")  # of the extra
__all__ = ["Customized", "Exported", "customize", "export", "load_base", "load_customized"]
_OF_EXPORT = ("Exported", "export")


def __getattr__(name: str) -> Any:
    if name in __all__:
        require_extra("pondera.customize", *PACKAGES)  # now, and not at the end of a training
        return getattr(import_module(f"pondera.customize.{'_export' if name in _OF_EXPORT else '_train'}"), name)
    raise AttributeError(f"module 'pondera.customize' has no attribute {name!r}")

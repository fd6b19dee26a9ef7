"""The one place where pondera's adapters are made known to PEFT.

PEFT looks every method up by a member of its enum `PeftType`. Ours are added to it under names that begin with
``PONDERA_``, so that a method PEFT may add later under the paper's own name does not collide with ours.
"""

from aenum import extend_enum
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def register(config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make `config` usable with `peft.get_peft_model`; `model.prefix` is ``"pondera_NAME_"``."""
    name = model.prefix.removesuffix("_")
    if name.upper() not in PeftType.__members__:
        extend_enum(PeftType, name.upper(), name.upper())
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)

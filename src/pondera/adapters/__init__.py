"""Reuse by adapters: configurations for PEFT, used as PEFT's own.

Import this module before loading a saved adapter of ours, so that PEFT knows the method.

>>> import peft, torch
>>> from pondera.adapters import TLoraConfig, at_timestep
>>> net = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), TLoraConfig(r=4, target_modules=["0"]))
>>> with at_timestep(net, 100):
...     net(torch.ones(1, 8)).shape
torch.Size([1, 8])
"""

from pondera.errors import needs_extra

with needs_extra("pondera.adapters", "adapters"):
    from pondera.adapters.dota import DotaConfig
    from pondera.adapters.givens import GivensConfig, soft_orthogonality
    from pondera.adapters.lora_start import lora_start_
    from pondera.adapters.oft import OftConfig
    from pondera.adapters.sorsa import SorsaConfig, orthonormality, orthonormality_callback
    from pondera.adapters.svft import SvftConfig
    from pondera.adapters.t_lora import TLoraConfig, active_rank, at_timestep, plain_lora

__all__ = [
    "DotaConfig",
    "GivensConfig",
    "OftConfig",
    "SorsaConfig",
    "SvftConfig",
    "TLoraConfig",
    "active_rank",
    "at_timestep",
    "lora_start_",
    "orthonormality",
    "orthonormality_callback",
    "plain_lora",
    "soft_orthogonality",
]

"""Reuse by adapters: configurations for PEFT, used as PEFT's own.

Import this module before loading a saved adapter of ours, so that PEFT knows the method.

>>> import peft, torch
>>> from pondera.adapters import TLoraConfig, at_timestep
>>> net = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), TLoraConfig(r=4, target_modules=["0"]))
>>> with at_timestep(net, 100):
...     net(torch.ones(1, 8)).shape
torch.Size([1, 8])
"""

from pondera.adapters.t_lora import TLoraConfig, active_rank, at_timestep, plain_lora

__all__ = ["TLoraConfig", "active_rank", "at_timestep", "plain_lora"]

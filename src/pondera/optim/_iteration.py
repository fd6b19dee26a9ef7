"""Newton-Schulz's iteration as the matrix optimizers use it: its settings in a group, and which precision it runs in."""

import torch
from jaxtyping import Float
from torch import Tensor

from pondera.errors import BadInput
from pondera.linalg import newton_schulz
from pondera.optim._base import Group, whole_number

# whether this CPU multiplies matrices of bfloat16 by instructions of its own
NATIVE_BFLOAT16 = any(
    getattr(torch.cpu, asked, bool)() for asked in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
)


def check_iteration(who: str, group: Group) -> None:
    """BadInput for an `ns_steps` or `ns_dtype` that cannot be."""
    whole_number(who, "ns_steps", group["ns_steps"])
    if not (group["ns_dtype"] is None or getattr(group["ns_dtype"], "is_floating_point", False)):
        raise BadInput(f"{who} needs a floating-point dtype for ns_dtype, got {group['ns_dtype']!r}")


def orthogonalised(U: Float[Tensor, "m n"], group: Group) -> Float[Tensor, "m n"]:
    """Newton-Schulz's result for U after `ns_steps`, in the precision `ns_dtype` asks for (None: see `precision`)."""
    return newton_schulz(U, steps=group["ns_steps"], dtype=group["ns_dtype"] or precision(U))


def precision(U: Tensor) -> torch.dtype:
    """bfloat16 where products in it are native, else float32; float64 stays."""
    if U.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if U.device.type != "cpu" or NATIVE_BFLOAT16 else torch.float32

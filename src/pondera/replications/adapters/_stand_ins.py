"""What shams of adapters are made of: the pretrained weight without what it has learnt."""

import torch
from torch import Generator, Tensor


def scattered(weight: Tensor, seed: int = 0) -> Tensor:
    """The numbers of `weight`, each at a place drawn at random.

    >>> scattered(torch.arange(4.0).view(2, 2)).sum()
    tensor(6.)
    """
    order = torch.randperm(weight.numel(), generator=Generator().manual_seed(seed))
    return weight.detach().flatten()[order.to(weight.device)].view_as(weight)

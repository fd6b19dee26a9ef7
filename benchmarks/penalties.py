"""What a penalty adds to a training step: forward, backward and AdamW with it, beside the same without.

Run `python -m benchmarks penalties`. A stack of four linear layers of 512 on 256 rows, three convolutions of 32 channels on 32 images
of 16 x 16, and a sparse autoencoder of 2,048 features on 512 rows of 256. In turn on one thread; times are medians.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optim import interleaved
from pondera.penalties import SparseAutoencoder, norm_loss, orthogonal_convolution, orthogonal_decoder, spectral

WIDTH, ROWS = 512, 256


def stack() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    x = torch.randn(ROWS, WIDTH)
    return net, lambda net: net(x).square().mean()


def convolutions() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    net = nn.Sequential(*(m for _ in range(3) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())))
    x = torch.randn(32, 32, 16, 16)
    return net, lambda net: net(x).square().mean()


def autoencoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = torch.randn(512, 256)
    return SparseAutoencoder(256, 2048, 16), lambda net: (net(x)[0] - x).square().mean()


def remembered() -> Callable[[nn.Module], Tensor]:
    memory: dict[str, Tensor] = {}
    return lambda net: spectral(net, memory=memory)


CASES: dict[str, tuple[Any, Callable[[], Callable[[nn.Module], Tensor]]]] = {
    "norm_loss": (stack, lambda: norm_loss),
    "norm_loss, convolutions": (convolutions, lambda: norm_loss),
    "spectral, one power iteration": (stack, remembered),
    "spectral, exact": (stack, lambda: spectral),
    "orthogonal_convolution": (convolutions, lambda: orthogonal_convolution),
    "orthogonal_decoder": (autoencoder, lambda: lambda net: orthogonal_decoder(net, chunk=512)),
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [compared(name, *case) for name, case in list(CASES.items())[: 2 if quick else None]]
    finally:
        torch.set_num_threads(threads)


def compared(name: str, build: Any, make: Callable[[], Callable[[nn.Module], Tensor]]) -> dict[str, Any]:
    penalty = make()
    a, b = interleaved(steps(*build(), penalty), steps(*build(), None))
    note = f"adds {100 * (a / b - 1):.1f}% to a step"
    return {
        "name": name,
        "ours": "with it",
        "peer": "without",
        "seconds_ours": a,
        "seconds_peer": b,
        "ratio": a / b,
        "note": note,
    }


def steps(
    net: nn.Module, loss: Callable[[nn.Module], Tensor], penalty: Callable[[nn.Module], Tensor] | None
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        value = loss(net)
        (value if penalty is None else value + 1e-3 * penalty(net)).backward()
        optimizer.step()

    return step

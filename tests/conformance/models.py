"""Small models of every shape users bring, for the batteries."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class Residual(nn.Module):
    """Two branches summed, a norm layer between; layers registered in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 6)
        self.first = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head(x + self.second(self.norm(x)))


class Attention(nn.Module):
    """Embedding, attention and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.act = nn.Linear(8, 16), nn.ReLU()
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.down(self.act(self.up(x))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def conv1d() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 6, 5), nn.Tanh(), nn.Conv1d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(32, 5)),
    "cnn": (cnn, lambda: torch.randn(16, 3, 8, 8)),
    "conv1d": (conv1d, lambda: torch.randn(16, 2, 12)),
    "residual": (Residual, lambda: torch.randn(32, 5)),
    "attention": (Attention, lambda: torch.randint(11, (16, 6))),
    "parametrized": (parametrized, lambda: torch.randn(32, 5)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The model and a batch for it, drawn from `seed`."""
    torch.manual_seed(seed)
    build, batch = MODELS[name]
    return build(), batch()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

"""Starts that need more than any model and a batch: for each a model they own something in, and what else they take."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .architectures import GraphNet, _graph


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def siren() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1, 16), Sine(), nn.Linear(16, 16), Sine(), nn.Linear(16, 16), Sine(), nn.Linear(16, 1)
    )


def coordinates(n: int = 64) -> Tensor:
    return torch.linspace(-1, 1, n).unsqueeze(1)


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


def select_from() -> tuple[nn.Module, dict[str, Any], Any]:
    return _mlp(8), {"teacher": _mlp(20), "method": "random"}, torch.randn(12, 6)


def winner() -> tuple[nn.Module, dict[str, Any], Any]:
    return siren(), {"signal": torch.sin(40 * coordinates(256)) + 0.1 * torch.randn(256, 1)}, coordinates()


def meta_learn() -> tuple[nn.Module, dict[str, Any], Any]:
    signals = [(coordinates(), torch.sin(k * coordinates())) for k in (1.0, 2.0, 3.0, 4.0)]
    return siren(), {"signals": signals, "outer_steps": 2}, coordinates()


def virgo() -> tuple[nn.Module, dict[str, Any], Any]:
    batch = _graph()
    return GraphNet(), {"batch": batch}, batch


def rich_features() -> tuple[nn.Module, dict[str, Any], Any]:
    x = torch.randn(60, 6)
    return _mlp(8), {"examples": (x, (x[:, 0] > 0).long())}, torch.randn(12, 6)


def maxout() -> tuple[nn.Module, dict[str, Any], Any]:
    from pondera.nn import Maxout

    return nn.Sequential(Maxout(6, 8, 3), Maxout(8, 8, 3), nn.Linear(8, 3)), {}, torch.randn(12, 6)


class Blocks(nn.Module):
    """Numbered residual blocks, as layer-indexed starts need them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def layer_index_rescale() -> tuple[nn.Module, dict[str, Any], Any]:
    return Blocks(), {}, torch.randn(12, 6)


# name of the start -> (model, its keyword arguments, inputs of the model)
SPECIAL: dict[str, Callable[[], tuple[nn.Module, dict[str, Any], Any]]] = {
    "select_from_": select_from,
    "winner_": winner,
    "meta_learn_": meta_learn,
    "virgo_": virgo,
    "rich_features_": rich_features,
    "maxout_": maxout,
    "layer_index_rescale_": layer_index_rescale,
}


def make_special(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any], Any]:
    torch.manual_seed(seed)
    return SPECIAL[name]()

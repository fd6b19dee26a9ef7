"""Architectures as users have them, small, and what a start does to each kind of layer in them.

`python -m tests.conformance.architectures` writes the table of docs/guide/starts-by-layer.md; a test compares it.
"""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pondera.init
from pondera._weights import owned
from pondera.errors import BadInput

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "starts-by-layer.md"


class Bottleneck(nn.Module):
    """torchvision's bottleneck block, in plain torch."""

    def __init__(self, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inside != out:
            self.downsample = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + skip)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Bottleneck(8, 4), Bottleneck(16, 4))
        self.layer2 = nn.Sequential(Bottleneck(16, 8, 2), Bottleneck(32, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layer2(self.layer1(x))).flatten(1))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config)


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv, SAGEConv

        self.first, self.act, self.second = GCNConv(6, 16), nn.ReLU(), SAGEConv(16, 16)
        self.third = GCNConv(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.act(self.first(x, edge_index))
        return self.third(self.act(self.second(x, edge_index)), edge_index)


def parametrized() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(2, 6, 3)), nn.ReLU(), nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(36, 8)), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(36, 12),
        nn.ReLU(), nn.Linear(12, 5),
    )  # fmt: skip


def _graph() -> tuple[Tensor, Tensor]:
    edges = torch.randint(24, (2, 90))
    return torch.randn(24, 6), torch.cat([edges, edges.flip(0)], 1)


Batch = Any
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "plain": (plain, lambda: torch.randn(32, 3, 8, 8)),
    "resnet": (ResNet, lambda: torch.randn(16, 3, 32, 32)),
    "gpt2": (gpt2, lambda: {"input_ids": torch.randint(37, (16, 12))}),
    "bert": (bert, lambda: {"input_ids": torch.randint(37, (16, 12))}),
    "vit": (vit, lambda: {"pixel_values": torch.randn(16, 3, 16, 16)}),
    "graph": (GraphNet, _graph),
    "parametrized": (parametrized, lambda: torch.randn(32, 2, 8)),
}

# kind of layer in the table -> (architecture, parameter)
LAYERS: dict[str, tuple[str, str]] = {
    "linear, growing": ("vit", "vit.layers.0.mlp.fc1.weight"),
    "linear, shrinking": ("vit", "vit.layers.0.mlp.fc2.weight"),
    "linear, square": ("bert", "bert.encoder.layer.0.attention.output.dense.weight"),
    "classifier": ("bert", "classifier.weight"),
    "separate query": ("bert", "bert.encoder.layer.0.attention.self.query.weight"),
    "fused qkv (Conv1D)": ("gpt2", "transformer.h.0.attn.c_attn.weight"),
    "MLP in (Conv1D)": ("gpt2", "transformer.h.0.mlp.c_fc.weight"),
    "convolution": ("resnet", "conv1.weight"),
    "1x1 convolution": ("resnet", "layer1.1.conv1.weight"),
    "grouped convolution": ("resnet", "layer1.1.conv2.weight"),
    "depthwise convolution": ("plain", "3.weight"),
    "transposed convolution": ("plain", "5.weight"),
    "patch embedding": ("vit", "vit.embeddings.patch_embeddings.projection.weight"),
    "graph convolution": ("graph", "first.lin.weight"),
    "under weight norm": ("parametrized", "0.weight"),
    "under spectral norm": ("parametrized", "3.weight"),
    "bias": ("vit", "vit.layers.0.mlp.fc1.bias"),
    "norm layer": ("resnet", "bn1.weight"),
    "token embedding": ("gpt2", "transformer.wte.weight"),
    "tied head": ("gpt2", "lm_head.weight"),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Batch]:
    """The architecture and a batch for it, drawn from `seed`; biases and norm weights away from 0 and 1."""
    torch.manual_seed(seed)
    build, batch = ARCHITECTURES[name]
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.05 * torch.randn_like(p))
    return model, batch()


ELSEWHERE = {"maxout_", "virgo_"}  # they start one kind of layer, and are tested on models of it


def parameters_of(name: str) -> Any:
    return inspect.signature(getattr(pondera.init, name)).parameters


def generic() -> list[str]:
    """Starts that need nothing but a model, and perhaps a batch: those that can start any architecture."""
    starts = [n for n in pondera.init.__all__ if n.endswith("_")]
    needed = {
        n: [p.name for p in list(parameters_of(n).values())[1:] if p.default is p.empty and p.name != "batch"]
        for n in starts
    }
    return sorted(n for n in starts if not needed[n] and n not in ELSEWHERE)


def start(name: str, model: nn.Module, batch: Batch, seed: int = 0) -> nn.Module:
    takes, extra = parameters_of(name), {}
    if "batch" in takes:
        extra["batch"] = batch
    if "nonlinearity" in takes:
        extra["nonlinearity"] = "relu"  # transformers keep their activations in functions, where no start can see them
    return getattr(pondera.init, name)(model, generator=torch.Generator().manual_seed(seed), **extra)


def get(model: nn.Module, path: str) -> Tensor:
    """A parameter as it acts in forward; weights as (out, in, *kernel) whatever the layer's own layout."""
    for one in owned(model):
        if one.name == path:
            return one.read().detach()
    module, _, attribute = path.rpartition(".")
    return getattr(model.get_submodule(module), attribute).detach()


def words(before: Tensor, after: Tensor) -> str:
    """What became of a weight, measured: left, zero, orthonormal, a few values only, or drawn; and its gain."""
    if torch.equal(before, after):
        return "left"
    if not after.any():
        return "zero"
    if after.ndim < 2:
        return "drawn"
    w = after.flatten(1).double()
    gain = float(w.square().mean().sqrt() * w.shape[1] ** 0.5)
    rows, columns = w @ w.T, w.T @ w
    small = rows if len(rows) <= len(columns) else columns
    scale = float(small.diagonal().mean())
    if torch.allclose(small, scale * torch.eye(len(small), dtype=w.dtype), atol=1e-4 * scale):
        kind = "orthogonal"
    elif len(w.abs().mul(1e4 / float(w.abs().max())).round().unique()) <= 4:
        kind = "few values"
    else:
        kind = "drawn"
    return f"{kind}, gain {gain:.2f}"


def table() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """For every start a cell a kind of layer; and the sentences of those that refuse an architecture."""
    cells: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    for name in generic():
        started: dict[str, tuple[nn.Module, nn.Module] | None] = {}
        for which in ARCHITECTURES:
            model, batch = make(which)
            was = copy.deepcopy(model)
            try:
                started[which] = (was, start(name, model, batch))
            except BadInput as error:
                started[which] = None
                refused[f"{name} on {which}"] = str(error)
        cells[name] = {}
        for layer, (which, path) in LAYERS.items():
            pair = started[which]
            if pair is None:
                cells[name][layer] = "refused"
                continue
            cells[name][layer] = words(get(pair[0], path), get(pair[1], path))
    return cells, refused


def page() -> str:
    """The page of the docs."""
    cells, refused = table()
    names = list(cells)
    head = (
        "# Which start treats which layer how\n\n"
        "Measured by a test on small models with the architectures users have: a ResNet in plain PyTorch, GPT-2, BERT and "
        "ViT from `transformers`, a PyTorch Geometric net, a net under parametrizations. *left*: not touched. "
        "*orthogonal*: all singular values equal. *few values*: at most four different sizes of entries (identities, "
        "Hadamard matrices). *drawn*: anything else. *gain*: root mean square of the entries times the square root of "
        "the fan-in; 1 keeps the scale of independent inputs, 1.41 of those that come out of a ReLU. All starts were told "
        "that the activation is ReLU, where they ask. Starts that need more than a model and a batch (a teacher, a "
        "signal, a graph) are on their own pages.\n\n"
    )
    rows = ["| Layer | " + " | ".join(f"`{n}`" for n in names) + " |", "|---" * (len(names) + 1) + "|"]
    rows += [f"| {layer} | " + " | ".join(cells[n][layer] for n in names) + " |" for layer in LAYERS]
    said: dict[str, list[str]] = {}
    for where, sentence in refused.items():
        said.setdefault(sentence, []).append(where)
    notes = "\n".join(f"- {', '.join(where)}: {sentence}." for sentence, where in said.items())
    tail = f"\n\n## What is refused, and how\n\n{notes}\n" if notes else "\n"
    return head + "\n".join(rows) + tail


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

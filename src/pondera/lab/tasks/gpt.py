"""Fine-tune a small pre-trained GPT from Python to C++; the score is minus the test loss.

The net (0.8 million weights, characters) was pre-trained on the standard library's Python source by
`scripts/train_small_gpt.py`; its weights, gpt.safetensors, lie beside this file. It is adapted to C++, another language in
the same symbols: trained on the headers of PyTorch's c10/util and scored on those of c10/core, both of which ship in
torch/include. No window overlaps another, and test windows that training holds word for word (the notices at the head and
foot of files) are left out. The test loss is 2.11 nats before and 1.50 after 300 steps of the whole net at a rate of 0.001
(PyTorch 2.13, one seed); it differs a little between versions of PyTorch.

Everything `build()` returns can be trained. An adapter freezes that net and is put on the layers `adapt` names; nothing
else need be trained, since the symbols are the same.
"""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

settings = {
    "steps": 300,
    "batch": 8,
    "rates": [10 ** (k / 2) for k in range(-9, -1)],  # 3e-5 ... 0.1
    "score": "minus nats per character",
    "evaluations": 6,
}
adapt = {"target_modules": ["query", "key", "value", "out", "up", "down"], "modules_to_save": []}
SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT, WIDTH, HEADS, BLOCKS = 128, 128, 4, 4
WEIGHTS = "ee924a52fcff7722"  # checksum of gpt.safetensors: other weights are another task
TRAIN, TEST = "c10/util", "c10/core"  # folders of torch/include
SCORED = 128  # windows


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        n = self.norm1(x)
        q, k, v = (f(n).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallGPT(nn.Module):
    """The net before pre-training, drawn as torch draws its layers."""

    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(len(SYMBOLS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(SYMBOLS))

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.place(places))))


def windows(text, stride):
    """(x, y) of CONTEXT symbols each, y one symbol on, `stride` symbols apart; other characters are left out."""
    index = {c: i for i, c in enumerate(SYMBOLS)}
    cut = torch.tensor([index[c] for c in text if c in index]).unfold(0, CONTEXT + 1, stride)
    return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()


def build():
    from safetensors.torch import load

    stored = Path(__file__).with_name("gpt.safetensors").read_bytes()
    if hashlib.sha256(stored).hexdigest()[:16] != WEIGHTS:
        raise RuntimeError("gpt.safetensors is not the file this task was written for")
    model = SmallGPT()
    model.load_state_dict({name: t.float() for name, t in load(stored).items()})
    return model


def source(folder):
    """The headers of a folder of torch/include, one after another."""
    headers = sorted((Path(torch.__file__).parent / "include" / folder).rglob("*.h"))
    if not headers:
        raise FileNotFoundError(f"this PyTorch ships no headers in torch/include/{folder}")
    return "\n".join(path.read_text(encoding="utf-8") for path in headers)


def data():
    train = source(TRAIN)
    x, y = windows(source(TEST), CONTEXT)
    known = "".join(c for c in train if c in SYMBOLS)
    new = [i for i, ids in enumerate(x.tolist()) if "".join(SYMBOLS[k] for k in ids) not in known]
    spread = torch.linspace(0, len(new) - 1, SCORED).long()
    pick = torch.tensor(new)[spread]
    return windows(train, CONTEXT), (x[pick], y[pick])


@torch.no_grad()
def score(model, test):
    """Minus the mean loss of a symbol on the first SCORED windows, in half a second on one core."""
    x, y = (t[:SCORED] for t in test)
    loss = sum(
        F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum") for a, b in zip(x.split(64), y.split(64))
    )
    return -float(loss) / y.numel()

"""Predict the next character of the Python standard library's source with a small GPT; the score is minus the test loss.

The text is what this interpreter ships (argparse, ast, ...), so figures differ a little between Python versions.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

settings = {"steps": 300, "batch": 16, "score": "minus nats per character", "evaluations": 6}
MODULES = ("argparse", "ast", "calendar", "csv", "difflib", "doctest", "heapq", "inspect", "locale", "mailbox")
HELD_OUT = ("textwrap", "statistics")
SYMBOLS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT, WIDTH, HEADS, BLOCKS = 64, 64, 4, 2


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
    def __init__(self):
        super().__init__()
        self.token, self.place = nn.Embedding(len(SYMBOLS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(SYMBOLS))

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.place(places))))


def build():
    return SmallGPT()


def data():
    index = {c: i for i, c in enumerate(SYMBOLS)}

    def windows(names, stride):
        text = "\n".join((Path(argparse_file).parent / f"{n}.py").read_text(encoding="utf-8") for n in names)
        ids = torch.tensor([index[c] for c in text if c in index])
        cut = ids.unfold(0, CONTEXT + 1, stride)
        return cut[:, :-1].contiguous(), cut[:, 1:].contiguous()

    import argparse

    argparse_file = argparse.__file__
    return windows(MODULES, CONTEXT // 2), windows(HELD_OUT, CONTEXT)


@torch.no_grad()
def score(model, test):
    x, y = test
    loss = sum(
        F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum")
        for a, b in zip(x.split(256), y.split(256))
    )
    return -float(loss) / y.numel()

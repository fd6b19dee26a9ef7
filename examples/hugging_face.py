"""A Hugging Face model on batches of names: which of two halves of the vocabulary does a sentence begin with?

    pondera compare examples/hugging_face.py "optim=SGD(momentum=0.9)" --seeds 2 --budget 20 --rates 0.001,0.01

The model comes from a configuration and the sentences are drawn, so nothing is downloaded. In your own file ``build`` would
be ``AutoModelForSequenceClassification.from_pretrained(...)``, and ``data`` the parts of a data set after ``map(tokenize)``.
"""

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

settings = {"steps": 100, "batch": 16, "rates": [10 ** (k / 2) for k in range(-8, -2)]}


def build():
    return BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )


class Sentences(Dataset):
    """Examples as a tokenizer gives them; text columns may stay, they are left out of batches."""

    def __init__(self, count, seed):
        self.ids = torch.randint(2, 100, (count, 12), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        ids = self.ids[i].tolist()
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(ids[0] > 50)}


def data():
    return Sentences(800, seed=0), Sentences(200, seed=1)

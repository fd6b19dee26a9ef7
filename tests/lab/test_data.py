"""Data in the forms people have: each gives the same training as the tensors it holds, and nothing is loaded whole."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pondera.errors import BadInput
from pondera.lab import compare, load_task
from pondera.lab.data import Items, Part, batches, collated, head, joined, known_by, once, read, some

QUICK = {"store": "sqlite://", "workers": 1, "progress": False, "seeds": 2, "rates": [0.05]}
COMMON = """import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
settings = dict(steps=12, batch=8, optim='SGD')
g = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=g); Y = (X[:, 0] + 0.3 * torch.randn(60, generator=g) > 0).long()
def build():
    return nn.Linear(4, 2)
class Lazy(Dataset):
    asked = []
    def __init__(self, places): self.places = places
    def __len__(self): return len(self.places)
    def __getitem__(self, i):
        Lazy.asked.append(i)
        return X[self.places[i]], Y[self.places[i]]
class Flow(IterableDataset):
    def __init__(self, places): self.places = places
    def __iter__(self):
        for i in self.places: yield X[i], Y[i]
"""
FORMS = {
    "tensors": "(X[:40], Y[:40]), (X[40:], Y[40:])",
    "tensor data sets": "TensorDataset(X[:40], Y[:40]), TensorDataset(X[40:], Y[40:])",
    "data sets": "Lazy(range(40)), Lazy(range(40, 60))",
    "loaders": "DataLoader(Lazy(range(40)), batch_size=3), DataLoader(Lazy(range(40, 60)), batch_size=7)",
    "mixed": "(X[:40], Y[:40]), Lazy(range(40, 60))",
}


def task(folder, form, extra=""):
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(f"{COMMON}def data():\n    return {form}\n{extra}")
    return path


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_trains_as_the_tensors_do(tmp_path, form):
    """The same order of the same examples: equal scores, tuned and at one rate."""
    for rates in ([0.05], [0.05, 0.5]):
        want = compare(task(tmp_path / "a", FORMS["tensors"]), ["", "init=xavier_normal"], **QUICK | {"rates": rates})
        got = compare(task(tmp_path / "b", FORMS[form]), ["", "init=xavier_normal"], **QUICK | {"rates": rates})
        assert [r.scores for r in got.rows] == [r.scores for r in want.rows]
        assert [r.rate for r in got.rows] == [r.rate for r in want.rows]


def test_a_stream_trains_in_its_own_order_and_needs_a_validation_part_to_tune(tmp_path):
    three = "Flow(range(30)), Flow(range(30, 40)), Flow(range(40, 60))"
    table = compare(task(tmp_path / "a", three), [""], **QUICK | {"rates": [0.05, 0.5]})
    assert table.ok
    assert any("a stream" in k for k in table.depends)
    two = task(tmp_path / "b", "Flow(range(40)), Flow(range(40, 60))")
    assert compare(two, [""], **QUICK).ok
    with pytest.raises(BadInput, match="are a stream, from which no part can be held out") as caught:
        compare(two, [""], **QUICK | {"rates": [0.05, 0.5]})
    assert "\n" not in str(caught.value)


def test_nothing_is_gone_through_before_it_is_needed(tmp_path):
    """A data set of a million examples: a comparison of few steps asks for few of them."""
    form = "Lazy(range(60)) , Lazy(range(40, 60))"
    extra = (
        "class Big(Dataset):\n    asked = 0\n    def __len__(self): return 1_000_000\n"
        "    def __getitem__(self, i):\n        Big.asked += 1\n        return X[i % 60], Y[i % 60]\n"
        "def data():\n    return Big(), Lazy(range(40, 60))\n"
    )
    path = task(tmp_path / "a", form, extra)
    table = compare(path, [""], **QUICK | {"seeds": 1})
    asked = load_task(path).module.Big.asked
    assert asked < 3000, asked
    assert any("hash of 32 of 1000000 examples" in k for k in table.depends)


MAPPED = """
class Output(dict):
    __getattr__ = dict.get
class Net(nn.Module):
    def __init__(self):
        super().__init__(); self.layer = nn.Linear(4, 2)
    def forward(self, inputs, labels=None):
        logits = self.layer(inputs)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)
def build():
    return Net()
class Rows(Dataset):
    def __init__(self, places): self.places = places
    def __len__(self): return len(self.places)
    def __getitem__(self, i):
        return {"inputs": X[self.places[i]].tolist(), "labels": int(Y[self.places[i]]), "text": "left out"}
"""


def test_mappings_and_the_models_own_loss_need_no_loss_of_the_task(tmp_path):
    rows = task(tmp_path / "a", "Rows(range(40)), Rows(range(40, 60))", MAPPED)
    plain = compare(task(tmp_path / "b", FORMS["tensors"]), ["", "init=lsuv"], **QUICK)
    table = compare(rows, ["", "init=lsuv"], **QUICK)
    assert [r.scores for r in table.rows] == [r.scores for r in plain.rows]  # the same net, data and accuracy
    assert table.rows[1].signal


def test_a_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"inputs": torch.randn(30, 4).tolist(), "labels": [0, 1] * 15, "text": ["a"] * 30}
    )
    part = read(made, "train data")
    assert isinstance(part, Items)
    batch = part.at([0, 3])
    assert {k: tuple(v.shape) for k, v in batch.items()} == {"inputs": (2, 4), "labels": (2,)}
    assert known_by(part)[0] == "fingerprint of the data set"


def test_an_output_with_logits_and_a_tuple_are_scores(tmp_path):
    extra = (
        "class Named(nn.Module):\n    def __init__(self):\n        super().__init__(); self.layer = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n        return GIVES(self.layer(x))\n"
    )
    want = compare(task(tmp_path / "a", FORMS["tensors"]), [""], **QUICK).rows[0].scores
    for gives in ("lambda y: {'logits': y}", "lambda y: (y, None)"):
        text = f"GIVES = {gives}\n{extra}def build():\n    return Named()\n"
        assert compare(task(tmp_path / "b", FORMS["tensors"], text), [""], **QUICK).rows[0].scores == want


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[1, 2]", "a list of int"),
        ("'text'", "got str"),
        ("DataLoader(TensorDataset(X[:0], Y[:0]))", "at least one example, got an empty data set"),
        ("[]", "at least one example, got an empty data set"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, given, words):
    with pytest.raises(BadInput, match=words) as caught:
        compare(task(tmp_path / "a", f"{given}, (X, Y)"), [""], **QUICK)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_said_in_a_sentence(tmp_path):
    ragged = "class R(Dataset):\n    def __len__(self): return 9\n    def __getitem__(self, i): return {'x': [0] * (i + 1)}\n"
    with pytest.raises(BadInput, match="column 'x' holds entries of different shapes"):
        compare(task(tmp_path / "a", "R(), R()", ragged), [""], **QUICK)
    silent = MAPPED.replace(
        "loss = None if labels is None else nn.functional.cross_entropy(logits, labels)", "loss = None"
    )
    with pytest.raises(BadInput, match="gives no loss for a batch of inputs, labels; let the data hold its labels"):
        compare(task(tmp_path / "b", "Rows(range(40)), Rows(range(40, 60))", silent), [""], **QUICK)
    with pytest.raises(BadInput, match="hold 3 tensors, not \\(x, y\\); give it a loss"):
        compare(task(tmp_path / "c", "(X, Y, Y), (X, Y, Y)"), [""], **QUICK)


def test_parts_by_hand():
    x, y = torch.arange(10), torch.arange(10) * 2
    items = read(TensorDatasetLike(x, y), "x")
    assert isinstance(items, Part)
    assert len(items.subset(torch.tensor([1, 3, 5]))) == 3
    assert items.subset(torch.tensor([1, 3, 5])).subset(torch.tensor([2])).at([0])[0].tolist() == [5]
    assert some(items, 3)[1].tolist() == [0, 2, 4]
    assert [b[0].tolist() for b in once(items, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(head(items, 4)) == 4
    both = joined(items.subset(torch.tensor([0, 1])), items.subset(torch.tensor([8])))
    assert [b[0].tolist() for b in once(both, 5)] == [[0, 1, 8]]
    feed, plain = batches(items, 4, 7), batches((x, y), 4, 7)
    for _ in range(7):
        assert torch.equal(next(feed)[0], next(plain)[0])
    assert collated([(x[:2], 1), (x[2:4], 2)])[1].tolist() == [1, 2]
    assert known_by((x, y)) != known_by((x, y + 1))
    assert isinstance(read(DataLoader(Endless()), "x"), Part)
    with pytest.raises(BadInput, match="gave no batch"):
        next(batches(read(Endless(0), "x"), 4, 0))
    assert read(TensorDataset(x), "x")[0].equal(x)


class TensorDatasetLike(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Endless(IterableDataset):
    def __init__(self, n=3):
        self.n = n

    def __iter__(self):
        return iter([torch.ones(2)] * self.n)

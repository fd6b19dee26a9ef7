"""Hugging Face's Trainer and Lightning as training loops of tasks, with the real packages on tiny models."""

import gc
import importlib.util
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pondera.errors import BadInput, MissingExtra
from pondera.lab import Recipe, compare, load_task
from pondera.lab.train import RunSpec, run

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
has_lightning = pytest.mark.skipif(
    not importlib.util.find_spec("lightning"), reason="needs pip install 'pondera[lightning]'"
)
QUICK = {"store": "sqlite://", "workers": 1, "progress": False, "seeds": 1}
COMMON = """import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
settings = dict(steps=6, batch=40, optim="SGD", score="accuracy", evaluations=2)
g = torch.Generator().manual_seed(0)
IDS = torch.randint(5, 40, (60, 6), generator=g); Y = (IDS[:, 0] > 22).long()
class Rows(Dataset):
    def __init__(self, places): self.places = places
    def __len__(self): return len(self.places)
    def __getitem__(self, i):
        if i >= len(self.places): raise IndexError
        j = self.places[i]
        return {"input_ids": IDS[j].tolist(), "attention_mask": [1] * 6, "labels": int(Y[j]), "text": "left out"}
def build():
    from transformers import BertConfig, BertForSequenceClassification
    return BertForSequenceClassification(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=8, hidden_dropout_prob=DROP,
        attention_probs_dropout_prob=DROP, initializer_range=0.3))
adapt = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
def data():
    return Rows(range(40)), Rows(range(40, 60))
def accuracy(given):
    return {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}
"""
LOSS = """def score(model, part):
    found = [(float(model(**b).loss), len(b["labels"])) for b in part.once(64)]
    return -sum(l * n for l, n in found) / sum(n for _, n in found)
"""
PLAIN = "dict(max_grad_norm=0.0)"  # the Trainer clips by itself, the lab's loop does not


def task(folder, *extra, drop=0.0, **settings):
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(f"DROP = {drop}\n{COMMON}settings.update({settings!r})\n" + "\n".join(extra))
    return path


def trained(call, before=""):
    return f"def train(run):\n    from pondera.lab.trainers import with_trainer\n    {before or 'pass'}\n    return {call}\n"


def one(path, recipe="", **over):
    """One run; the error where it raised."""
    t = load_task(path)
    given = {"rate": 0.5, "seed": 0, "steps": 6, "stop": 6, "phase": "final"} | over
    return run(RunSpec(t.name, t.path, t.source, Recipe.parse(recipe), **given))


def refused(path, words, **over):
    out = one(path, **over)
    assert out["status"] == "raised"
    assert words in out["reason"], out["reason"]
    assert "\n" not in out["reason"]


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "optim=AdamW(weight_decay=0.1)",
        "penalty=norm_loss(factor=0.5)",
        "adapter=Lora(r=2)",
        pytest.param(
            "optim=Muon", marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
        ),
    ],
)
def test_on_whole_batches_the_trainer_gives_what_the_lab_gives(tmp_path, recipe):
    """Batches of all examples have no order: the same steps, rates, optimizers and penalty, so the same loss on the test."""
    lab = one(task(tmp_path / "a", LOSS), recipe, rate=0.02)
    own = one(task(tmp_path / "b", trained(f"with_trainer(run, args={PLAIN})")), recipe, rate=0.02)
    assert own["status"] == "ok", own
    near = 1e-3 if "Muon" in recipe or "Adam" in recipe else 1e-5  # these enlarge what sums in another order differ by
    assert own["score"] == pytest.approx(lab["score"], rel=near)
    assert [p[0] for p in own["curve"]] == [3, 6]
    assert own["curve"][0][2] == pytest.approx(lab["curve"][1][2], rel=near)
    assert own["train_loss"] == pytest.approx(lab["train_loss"], rel=near)


def test_accumulation_adds_the_penalty_once_a_step(tmp_path):
    """For a loss that the Trainer divides by the parts, and for one that is divided by the examples of all of them."""
    shared = """
def summed(out, labels, num_items_in_batch=None):
    whole = nn.functional.cross_entropy(out.logits, labels, reduction="sum")
    return whole / (len(labels) if num_items_in_batch is None else num_items_in_batch)
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = build_bert()
    def forward(self, input_ids, attention_mask, labels=None):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
build_bert = build
"""
    parts = "args=dict(max_grad_norm=0.0, per_device_train_batch_size=10, gradient_accumulation_steps=4)"
    recipe = "penalty=norm_loss(factor=0.1)"
    whole = one(task(tmp_path / "a", trained(f"with_trainer(run, args={PLAIN})")), recipe, rate=0.1)
    by_items = task(tmp_path / "b", shared, trained(f"with_trainer(run, {parts}, compute_loss_func=summed)"))
    by_parts = task(tmp_path / "c", shared, "def build(): return Plain()", trained(f"with_trainer(run, {parts})"))
    for path in (by_items, by_parts):
        assert one(path, recipe, rate=0.1)["score"] == pytest.approx(whole["score"], rel=1e-4)


def test_what_follows_from_the_seed_and_the_penalty(tmp_path):
    path = task(tmp_path / "a", trained("with_trainer(run)"), batch=8, drop=0.1)
    first = one(path)
    assert one(path)["score"] == first["score"]
    assert one(path, seed=1)["score"] != first["score"]
    assert one(path, "penalty=norm_loss(factor=0.0)")["score"] == first["score"]
    assert one(path, "penalty=norm_loss(factor=10.0)")["score"] != first["score"]
    seldom = task(tmp_path / "b", trained("with_trainer(run)"), batch=8, drop=0.1, evaluations=1)
    assert one(seldom)["score"] == first["score"]  # looking at the test does not change the training


@pytest.mark.slow
def test_tuned_and_scored_by_a_metric(tmp_path):
    call = "with_trainer(run, compute_metrics=accuracy, metric='accuracy')"
    table = compare(task(tmp_path / "a", trained(call)), ["", "optim=Adam"], rates=[0.01, 0.5], **QUICK)
    assert table.ok
    assert all(s * 20 == pytest.approx(round(s * 20)) for r in table.rows for s in r.scores)  # shares of 20 examples
    none = trained("None", "with_trainer(run)")  # the lab's own accuracy
    both = [one(task(tmp_path / "b", text))["score"] for text in (trained(call), none)]
    assert both[0] == both[1]
    less = trained("with_trainer(run, compute_metrics=accuracy, metric='accuracy', greater_is_better=False)")
    assert one(task(tmp_path / "c", less))["score"] == -both[0]


def test_a_loss_that_is_no_number_ends_the_run_as_diverged(tmp_path):
    extra = trained("with_trainer(run, compute_loss_func=lambda out, labels, **k: out.logits.sum() * float('nan'))")
    out = one(task(tmp_path / "a", extra))
    assert out["status"] == "diverged"
    assert out["reason"] == "training loss became nan"


def test_nothing_is_left_on_disk_and_nothing_is_printed(tmp_path, monkeypatch, capsys):
    there, temporary = tmp_path / "there", tmp_path / "temporary"
    there.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    args = "dict(output_dir='out', logging_steps=1, eval_strategy='steps', eval_steps=2, save_strategy='steps', save_steps=2)"
    path = task(tmp_path / "a", trained(f"with_trainer(run, args={args})"))
    for _ in range(2):
        assert one(path)["status"] == "ok"
    failing = trained("with_trainer(run, compute_loss_func=lambda out, labels, **k: 1 / 0)")
    assert one(task(tmp_path / "b", failing))["status"] == "raised"
    gc.collect()
    assert list(there.rglob("*")) == list(temporary.rglob("*")) == []
    assert capsys.readouterr().out == ""


def test_arguments_of_the_users_own_win(tmp_path):
    linear = "dict(max_grad_norm=0.0, lr_scheduler_type='linear', warmup_steps=2)"
    small = "dict(max_grad_norm=0.0, per_device_train_batch_size=4, learning_rate=run.rate, max_steps=run.steps)"
    texts = [PLAIN, linear, small, "{}", "transformers.TrainingArguments('out', max_grad_norm=0.0, report_to=[])"]
    scores = [
        one(task(tmp_path / "a", "import transformers", trained(f"with_trainer(run, args={a})")))["score"]
        for a in texts
    ]
    assert len(set(scores)) == 4
    assert scores[-1] == scores[0]
    assert one(task(tmp_path / "b", trained("with_trainer(run)"), clip=0.01))["score"] != scores[3]


def test_a_trainer_class_of_ones_own_and_its_callbacks(tmp_path):
    extra = """import transformers
SEEN = []
class Mine(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        found = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * found[0], found[1]) if return_outputs else 2 * found[0]
class Told(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        SEEN.append(state.global_step)
"""
    path = task(tmp_path / "a", extra, trained("with_trainer(run, trainer_class=Mine, callbacks=[Told()])"))
    out = one(path, rate=1e-9)
    assert load_task(path).module.SEEN == [1, 2, 3, 4, 5, 6]
    plain = one(task(tmp_path / "b", trained("with_trainer(run)")), rate=1e-9)
    assert out["train_loss"] == pytest.approx(2 * plain["train_loss"], rel=1e-5)


def test_the_best_model_is_chosen_by_validation_alone(tmp_path):
    args = "dict(load_best_model_at_end=True, eval_strategy='steps', eval_steps=1, save_strategy='steps', save_steps=1)"
    extra = (
        "from transformers import EarlyStoppingCallback",
        trained(f"with_trainer(run, args={args}, callbacks=CALLS)"),
    )
    path = task(tmp_path / "a", "CALLS = []", *extra)
    refused(path, "choose by validation data, and a comparison at one rate has none")
    out = one(path, phase="tuned")
    assert out["status"] == "ok", out
    assert [p[0] for p in out["curve"]] == [6]  # what was seen on the way is not the test's
    early = task(tmp_path / "b", "CALLS = []", extra[0], extra[1].replace("CALLS", "[EarlyStoppingCallback(1)]"))
    assert one(early, phase="tuned", rate=5.0)["status"] == "ok"


FORMS = {
    "rows": "Rows(range(40)), Rows(range(40, 60))",
    "tensors": "(IDS[:40], torch.ones(40, 6).long(), Y[:40]), (IDS[40:], torch.ones(20, 6).long(), Y[40:])",
    "loaders": "DataLoader(Rows(range(40)), collate_fn=stacked), DataLoader(Rows(range(40, 60)), collate_fn=stacked)",
    "streams": "DataLoader(Flow(range(40)), 40, collate_fn=stacked), DataLoader(Flow(range(40, 60)), 20, collate_fn=stacked)",
}
MORE = """
class Flow(IterableDataset):
    def __init__(self, places): self.rows = Rows(places)
    def __iter__(self): return (self.rows[i] for i in range(len(self.rows)))
def stacked(rows):
    return {k: torch.tensor([r[k] for r in rows]) for k in ("input_ids", "attention_mask", "labels")}
"""


def test_every_form_of_data_gives_the_same(tmp_path):
    scores = []
    for form in FORMS.values():
        text = (
            f"{MORE}\ndef data():\n    return {form}\n",
            "def inputs(batch): return batch[0]\n" * form.startswith("("),
        )
        out = one(task(tmp_path / "a", *text, trained(f"with_trainer(run, args={PLAIN})")))
        assert out["status"] == "ok", out
        scores.append(out["score"])
    assert scores == pytest.approx([scores[0]] * len(scores), rel=1e-5)


def test_texts_made_into_data_by_functions(tmp_path):
    extra = """
class Made(Dataset):
    def __init__(self, rows): self.rows = rows
    def __len__(self): return len(self.rows)
    def __getitem__(self, i): return {"input_ids": self.rows[i]["input_ids"], "labels": self.rows[i]["labels"]}
"""
    call = trained("with_trainer(run, train_dataset=Made, eval_dataset=Made)")
    want = one(task(tmp_path / "b", trained("with_trainer(run)")))["score"]
    assert one(task(tmp_path / "a", extra, call))["score"] == pytest.approx(want, rel=1e-5)


def test_a_hugging_face_data_set(tmp_path):
    pytest.importorskip("datasets")
    extra = """
def data():
    from datasets import Dataset
    whole = Dataset.from_list([Rows(range(60))[i] for i in range(60)])
    return whole.select(range(40)), whole.select(range(40, 60))
"""
    want = one(task(tmp_path / "b", trained("with_trainer(run)")))["score"]
    path = task(tmp_path / "a", extra, trained("with_trainer(run)"))
    assert one(path)["score"] == pytest.approx(want, rel=1e-5)
    assert one(path, phase="tuned")["status"] == "ok"


def test_a_plain_module_on_tensors(tmp_path):
    extra = """
settings.update(score="R2")
def build(): return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
def data(): return (IDS[:40] / 40, Y[:40]), (IDS[40:] / 40, Y[40:])
"""
    lab = "def score(model, test): return -nn.functional.cross_entropy(model(test[0]), test[1])\n"
    own = one(task(tmp_path / "a", extra, trained(f"with_trainer(run, args={PLAIN})")))
    assert own["score"] == pytest.approx(one(task(tmp_path / "b", extra, lab))["score"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("args=dict(learning_rate=2e-5)", "leave learning_rate out of the TrainingArguments"),
        ("args=transformers.TrainingArguments('o', learning_rate=2e-5)", "the lab tunes the learning rate"),
        ("args=dict(max_steps=99)", "leave max_steps out of the TrainingArguments, which say max_steps=99"),
        ("args=dict(num_train_epochs=3)", "budget says how many steps"),
        ("args=dict(optim='adafactor')", "the recipe brings the optimizer"),
        ("args=dict(weight_decay=0.1)", "the recipe brings the optimizer"),
        ("args=dict(seed=7)", "every run has the seed"),
        ("args=dict(max_grad_nrom=1)", "have no 'max_grad_nrom'; did you mean max_grad_norm"),
        ("args=[1]", "args must be a dict or transformers.TrainingArguments, got list"),
        ("optimizers=(None, None)", "leave optimizers out of with_trainer"),
        ("train_dataset=[1]", "train_dataset must be a function of the run's part, got a list"),
        ("compute_metrics=accuracy", "say which entry of compute_metrics is the score"),
        ("metric='accuracy'", "give compute_metrics too"),
        ("compute_metrics=accuracy, metric='f1'", "gives no f1 to score by; it gives"),
    ],
)
def test_what_contradicts_the_comparison_is_refused(tmp_path, given, words):
    refused(task(tmp_path / "a", "import transformers", trained(f"with_trainer(run, {given})")), words)


def test_what_of_the_settings_the_trainer_does_not_know(tmp_path):
    refused(
        task(tmp_path / "a", trained("with_trainer(run)"), ema=0.9), "the task's setting ema is of the lab's own loop"
    )
    refused(task(tmp_path / "b", trained("with_trainer(run)"), accumulate=2), "say gradient_accumulation_steps")


def test_without_the_packages_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    from pondera.lab import trainers

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"with_trainer needs the extra: pip install 'pondera\[adapters\]'"):
        trainers.with_trainer(None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtra, match=r"with_lightning needs the extra: pip install 'pondera\[lightning\]'"):
        trainers.with_lightning(None, None, monitor="x")


# -- Lightning ---------------------------------------------------------------------------------------------------------

LIT = """
def data(): return (IDS[:40] / 40, Y[:40]), (IDS[40:] / 40, Y[40:])
def build(): return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(DROP), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
settings.update(batch=8)
adapt = {"target_modules": ["3"], "modules_to_save": ["5"]}
from lightning.pytorch import LightningModule
class Lit(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])
    def validation_step(self, batch, index):
        out = self.model(batch[0])
        self.log("loss", nn.functional.cross_entropy(out, batch[1]))
        self.log("accuracy", (out.argmax(-1) == batch[1]).double().mean())
    def configure_optimizers(self):
        raise AssertionError("the recipe brings the optimizer")
"""


def lit(call, *before):
    lines = "".join(f"    {line}\n" for line in before)
    return f"def train(run):\n    from pondera.lab.trainers import with_lightning\n{lines}    return {call}\n"


CALL = lit("with_lightning(run, Lit, monitor='accuracy')")


@has_lightning
@pytest.mark.parametrize(
    "recipe",
    [
        "",
        "optim=Adam",
        "penalty=norm_loss(factor=0.5)",
        "adapter=Lora(r=2)",
        pytest.param(
            "optim=Muon", marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
        ),
    ],
)
def test_lightning_gives_what_the_lab_gives(tmp_path, recipe):
    """The same batches, rates, draws, optimizers and penalty: the same numbers, with dropout too."""
    lab = one(task(tmp_path / "a", LIT, drop=0.1), recipe, rate=0.05)
    own = one(task(tmp_path / "b", LIT, CALL, drop=0.1), recipe, rate=0.05)
    assert own["status"] == "ok", own
    assert own["score"] == lab["score"]
    assert [p[0] for p in own["curve"]] == [3, 6]
    assert [p[2] for p in own["curve"]] == [p[2] for p in lab["curve"][1:]]
    assert own["train_loss"] == pytest.approx(lab["train_loss"], rel=1e-6)


@has_lightning
def test_lightning_by_the_settings(tmp_path):
    for settings in ({"clip": 0.1}, {"accumulate": 2}, {"schedule": "constant"}, {"precision": "bf16"}):
        loss = "def score(model, test): return -nn.functional.cross_entropy(model(test[0]).float(), test[1])\n"
        call = lit("with_lightning(run, Lit, monitor='loss', mode='min')")
        recipe = "penalty=norm_loss(factor=0.1)"
        lab = one(task(tmp_path / "a", LIT, loss, **settings), recipe)
        own = one(task(tmp_path / "b", LIT, call, **settings), recipe)
        assert own["status"] == "ok", own
        assert own["score"] == pytest.approx(lab["score"], rel=1e-2 if "precision" in settings else 1e-5), settings


@has_lightning
def test_lightning_tuned_with_a_loader_and_losses_in_a_dict(tmp_path):
    loader = """
def loader(part, training):
    from torch.utils.data import TensorDataset
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(*part), 8, shuffle=training, generator=g)
class Named(Lit):
    def training_step(self, batch, index):
        return {"loss": super().training_step(batch, index), "more": 1}
"""
    call = lit("with_lightning(run, Named, monitor='accuracy', loader=loader, trainer={'gradient_clip_val': 1.0})")
    table = compare(task(tmp_path / "a", LIT, loader, call), ["", "penalty=norm_loss"], rates=[0.05, 0.5], **QUICK)
    assert table.ok


@has_lightning
def test_lightning_leaves_nothing_and_ends_when_lost(tmp_path, monkeypatch, capsys):
    there, temporary = tmp_path / "there", tmp_path / "temporary"
    there.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(there)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert one(task(tmp_path / "a", LIT, CALL))["status"] == "ok"
    lost = LIT.replace(
        "cross_entropy(self.model(batch[0]), batch[1])", "cross_entropy(self.model(batch[0]) * float('nan'), batch[1])"
    )
    out = one(task(tmp_path / "b", lost, CALL))
    assert (out["status"], out["reason"]) == ("diverged", "training loss became nan")
    stop = "from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint"
    kept = lit(
        "with_lightning(run, Lit, monitor='accuracy', callbacks=[EarlyStopping('loss'), ModelCheckpoint(monitor='loss')])",
        stop,
    )
    path = task(tmp_path / "c", LIT, kept)
    assert one(path, phase="tuned")["status"] == "ok"
    refused(path, "early stopping and checkpoints choose by validation data")
    gc.collect()
    assert list(there.rglob("*")) == list(temporary.rglob("*")) == []
    assert capsys.readouterr().out == ""


@has_lightning
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("Lit, monitor='accuracy', trainer={'max_epochs': 3}", "leave max_epochs out of the Trainer's arguments"),
        ("Lit, monitor='accuracy', trainer={'devices': 2}", "on which device it runs"),
        ("Lit, monitor='acuracy'", "logs no 'acuracy'; did you mean accuracy"),
        ("Lit, monitor='accuracy', mode='most'", "mode is 'max' or 'min', got 'most'"),
        ("lambda model: model, monitor='accuracy'", "must return a LightningModule, got Sequential"),
        ("ByHand, monitor='accuracy'", "steps its optimizers by hand; write such a loop in train(run)"),
    ],
)
def test_what_contradicts_the_comparison_is_refused_by_lightning(tmp_path, given, words):
    by_hand = "class ByHand(Lit):\n    automatic_optimization = False\n"
    refused(task(tmp_path / "a", LIT, by_hand, lit(f"with_lightning(run, {given})")), words)


@has_lightning
def test_modules_of_the_older_package_name(tmp_path):
    pytest.importorskip("pytorch_lightning")
    older = LIT.replace("from lightning.pytorch import", "from pytorch_lightning import")
    assert one(task(tmp_path / "a", older, CALL))["score"] == one(task(tmp_path / "b", LIT, CALL))["score"]


# -- what the guide shows ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
LOOPS = [
    block
    for block in re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/guide/hugging-face.md").read_text("utf-8"), re.S | re.M
    )
    if "def train(run)" in block
]


def test_the_guide_shows_a_trainer_and_a_loop():
    assert len(LOOPS) == 2


@pytest.mark.parametrize("at", [0, 1])
def test_loops_of_the_guide_run_as_they_stand(tmp_path, at):
    path = tmp_path / "mine.py"
    path.write_text(f"{(ROOT / 'examples' / 'hugging_face.py').read_text('utf-8')}\n\n{LOOPS[at]}")
    for recipe in ("", "optim=SGD(momentum=0.9)+penalty=norm_loss"):
        out = one(path, recipe, rate=0.01)
        assert out["status"] == "ok", out
        assert 0 <= out["score"] <= 1


@pytest.mark.parametrize("name", ["hugging_face", pytest.param("lightning_task", marks=has_lightning)])
def test_the_examples_run(name):
    out = one(ROOT / "examples" / f"{name}.py", "optim=SGD(momentum=0.9)", rate=0.01)
    assert out["status"] == "ok", out
    assert 0 <= out["score"] <= 1


def test_a_bad_run_is_told_before_anything_runs(tmp_path):
    path = task(tmp_path / "a", trained("with_trainer(run, args=dict(learning_rate=2e-5))"))
    with pytest.raises(BadInput, match="leave learning_rate out of the TrainingArguments"):
        compare(path, [""], **QUICK | {"rates": [0.1]})

"""An adapter as one choice of a recipe: what it freezes, where it goes, and how a comparison treats it."""

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab import Recipe, compare
from pondera.lab.recipe import names
from pondera.lab.task import load_task
from pondera.lab.train import prepare

TASK = """
import torch
from torch import nn

adapt = {"target_modules": ["0"], "modules_to_save": ["2"]}
settings = {"steps": 4, "batch": 16, "rates": [1e-3, 1e-2], "validation": 0.2, "evaluations": 2}

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def data():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return (x[:80], y[:80]), (x[80:], y[80:])
"""


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(TASK)
    return load_task(path)


def test_ours_and_pefts_are_offered_without_their_ending():
    known = names("adapter")
    assert {"TLora", "Lora", "OFT", "Miss", "Psoft"} <= set(known)
    assert not {"Peft", "PromptTuning", "PromptLearning"} & set(known)


def test_the_base_is_frozen_and_the_task_says_where(task):
    model = prepare(task, Recipe(adapter="Lora(r=2)"), 0, task.split("tune")[0])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "0.lora_A.default.weight", "0.lora_B.default.weight",
        "2.modules_to_save.default.weight", "2.modules_to_save.default.bias",
    }  # fmt: skip


def test_a_recipes_own_layers_come_before_the_tasks(task):
    model = prepare(
        task, Recipe(adapter="Lora(r=2,target_modules=['2'],modules_to_save=None)"), 0, task.split("tune")[0]
    )
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "2.lora_A.default.weight", "2.lora_B.default.weight",
    ]  # fmt: skip


def test_the_start_of_an_adapter_follows_the_seed_and_leaves_the_stream(task):
    fit = task.split("tune")[0]
    one, same, other = (prepare(task, Recipe(adapter="Lora(r=2)"), s, fit) for s in (0, 0, 1))
    key = "0.lora_A.default.weight"
    assert torch.equal(one.state_dict()[key], same.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])
    prepare(task, Recipe(), 0, fit)
    plain = torch.rand(1)
    prepare(task, Recipe(adapter="Lora(r=2)"), 0, fit)
    assert torch.equal(torch.rand(1), plain)


def test_eva_looks_at_the_batch(task):
    model = prepare(
        task, Recipe(adapter="Lora(r=2,init_lora_weights='eva',modules_to_save=None)"), 0, task.split("tune")[0]
    )
    a = model[0].lora_A["default"].weight
    assert torch.allclose(a @ a.T, torch.eye(2), atol=1e-4)  # right singular vectors of the activations


def test_adapters_are_compared_with_full_fine_tuning(task):
    found = compare(
        task,
        ["", "adapter=Lora(r=2)", "lora and sgd: adapter=Lora(r=2)+optim=SGD"],
        seeds=2,
        store="sqlite://",
        workers=1,
        progress=False,
    )
    assert [row.parameters for row in found.rows] == [83, 55, 55]
    assert found.ok


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("Lorra", "no adapter method is called 'Lorra'; did you mean"),
        ("Lora(rank=2)", "takes no argument 'rank'"),
        ("PromptTuning", "no adapter method is called"),
    ],
)
def test_refused(adapter, says):
    with pytest.raises(BadInput, match=says):
        Recipe(adapter=adapter)


def test_adapt_must_be_a_dict(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(TASK.replace('adapt = {"target_modules": ["0"], "modules_to_save": ["2"]}', "adapt = 3"))
    with pytest.raises(BadInput, match="adapt of the task wrong must be a dict, got int"):
        load_task(path).adapt


def test_nothing_else_is_taken_for_an_adapter():
    model = nn.Linear(2, 2)
    assert Recipe().start(model, torch.zeros(1, 2), torch.Generator()) is model

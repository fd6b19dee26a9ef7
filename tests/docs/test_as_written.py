"""The README and the guide, carried out as they stand: every command, every snippet; only what they leave open is small."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.torch import save_file
from typer.testing import CliRunner

import pondera.lab
import pondera.replications
from pondera.cli._app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
# What the commands leave to their defaults is made small here; what they say holds.
SMALL = {
    "compare": {"seeds": 2, "budget": 2, "rates": "0.01", "workers": 1},
    "inspect": {"seconds": 0.5},
    "customize": {"steps": 2, "rank": 4, "per_prompt": 1, "quiet": True},
}
LARGE = {
    "--seeds 5 --budget 100": "--seeds 2 --budget 5",  # the demo, a minute by itself
    "compare gpt --adapter": "compare digits --adapter",  # the same adapters on a net that takes a tenth of the time
}
ENDS = {"pondera judge results.csv": 1}  # the page says so: a run of its table diverged
ELSEWHERE = {
    "--ray": "needs a cluster; tests/lab starts one",
    "org/one": "needs models in the hub's cache; tests/merge makes some",
}
# Parts of a file that the page says where to put, or that shows a form only.
FRAGMENTS = {("add-a-method", "def units_reach"), ("own-task", "def train"), ("hugging-face", "def train")}


def fences(path: Path) -> list[tuple[str, str]]:
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    return [(t.info.strip(), t.content) for t in tokens if t.type == "fence"]


def commands(path: Path) -> list[str]:
    """Every pondera command of a page, whole, in the order of reading."""
    text = "\n".join(body for kind, body in fences(path) if kind in ("", "text", "console"))
    lines = re.sub(r" *\\\n *", " ", text).splitlines()
    return [said for line in lines if (said := line.removeprefix("$ ")).startswith("pondera ")]


def snippets(path: Path) -> list[str]:
    bodies = [body for kind, body in fences(path) if kind == "python"]
    return [b for b in bodies if not any(page == path.stem and mark in b for page, mark in FRAGMENTS)]


COMMANDS = [(p, line) for p in PAGES for line in dict.fromkeys(commands(p))]
RUN = list({line: (p, line) for p, line in COMMANDS if not any(mark in line for mark in ELSEWHERE)}.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader of the pages has lying there: a task, checkpoints, results, a photo, a pipeline."""
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", here / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "examples" / "wine.py", here / "my_task.py")
    weights = {"body.weight": (8, 6), "body.bias": (8,), "head.weight": (3, 8)}
    for name in ("base", "tuned", "run1", "run2", "a", "b", "c"):
        drawn = {k: torch.randn(shape) for k, shape in weights.items()}
        save_file(drawn, here / f"{name}.safetensors")
        (here / name).mkdir()
        save_file(drawn, here / name / "model.safetensors")
    (recipe,) = [b for kind, b in fences(ROOT / "docs/guide/merge.md") if kind == "yaml"]
    (here / "recipe.yml").write_text(re.sub(r"model: \S+", "model: base", recipe), encoding="utf-8")
    (results,) = [b for kind, b in fences(ROOT / "docs/guide/judge.md") if b.startswith("method,seed,accuracy")]
    (here / "results.csv").write_text(results, encoding="utf-8")
    return here


@pytest.fixture(scope="module")
def photo(folder: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("diffusers")
    from tests.customize.pipelines import stable_diffusion

    image.new("RGB", (40, 40), (200, 30, 30)).save(folder / "dog.png")
    for name in ("stable-diffusion", "pipeline"):
        stable_diffusion().save_pretrained(folder / "path" / "to" / name)


@pytest.fixture(scope="module")
def language_model(folder: Path) -> None:
    """A small model as Hugging Face saves it, with its tokenizer, and a text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64
    )  # fmt: skip
    to = folder / "path" / "to" / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(to)
    words = [f"w{i}" for i in range(127)]
    made = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i + 1 for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(to)
    (folder / "text.txt").write_text(" ".join(words * 3), encoding="utf-8")


def at_once(claims: Any) -> Any:
    """The same claims, their runs left out: reproduce is tried here, not the papers."""
    from dataclasses import replace

    def quick(one: Any) -> Any:
        def run(lab: Any, *method: Any) -> Any:
            return pondera.replications.conclude(True, x=1.0)

        run.__name__ = one.name
        return replace(one, run=run)

    return lambda key: [quick(c) for c in claims(key)]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "line"), RUN, ids=[f"{p.stem}-{i}" for i, (p, _) in enumerate(RUN)])
def test_commands_do_what_the_page_says(
    path: Path, line: str, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "path/to/model" in line:
        request.getfixturevalue("language_model")
    if "customize" in line or "export" in line:
        request.getfixturevalue("photo")
        monkeypatch.setattr("pondera.cli._customize.DEMO_STEPS", 2)
    if "lightning_task" in line:
        pytest.importorskip("lightning")
    if "adapter" in line.lower() or "hugging_face" in line:
        pytest.importorskip("peft")
    monkeypatch.setattr("pondera.replications._claims.claims", at_once(pondera.replications.claims))
    monkeypatch.chdir(folder)
    for said, small in LARGE.items():
        line = line.replace(said, small)
    words = shlex.split(line, comments=True)[1:]
    left = [Path(words[i + 1]) for i, word in enumerate(words) if word in ("--report", "-o", "--out", "--csv")]
    for made in (*left, Path("customized")):  # by a command of another page
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    done = CliRunner().invoke(app, words, default_map=SMALL, catch_exceptions=False)
    expected = next((status for start, status in ENDS.items() if line.startswith(start)), 0)
    assert done.exit_code == expected, done.output
    assert done.output.strip()
    assert all(made.exists() for made in left), f"{line} did not leave {left}"


@pytest.mark.parametrize("path", [p for p in PAGES if snippets(p)], ids=lambda p: p.stem)
@pytest.mark.slow
def test_snippets_run_in_the_order_of_the_page(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pondera.lab.compare

    def small(task: Any, recipes: Any, **said: Any) -> Any:
        return whole(task, recipes, **{"seeds": 2, "budget": 2, "trials": 2, "workers": 1, "progress": False} | said)

    monkeypatch.setattr(pondera.lab, "compare", small)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "__main__"}
    for code in snippets(path):
        exec(compile(code, str(path), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize(("page", "example"), [("own-task", "wine"), ("hugging-face", "hugging_face")])
def test_loops_of_the_guide_train_the_examples(page: str, example: str, folder: Path) -> None:
    pytest.importorskip("transformers" if page == "hugging-face" else "sklearn")
    task = (ROOT / "examples" / f"{example}.py").read_text(encoding="utf-8")
    loops = [b for kind, b in fences(ROOT / "docs" / "guide" / f"{page}.md") if kind == "python" and "def train" in b]
    assert loops
    for i, loop in enumerate(loops):
        file = folder / f"{example}_{i}.py"
        file.write_text(f"{task}\n\n{loop}", encoding="utf-8")
        table = pondera.lab.compare(
            str(file), ["", "optim=SGD"], budget=3, seeds=2, rates=[0.01], workers=1, store="sqlite://", progress=False
        )
        assert table.ok, [r.failed for r in table.rows]


def test_what_is_left_out_is_still_there() -> None:
    lines = [line for _, line in COMMANDS]
    assert all(any(mark in line for line in lines) for mark in ELSEWHERE)
    for page, mark in FRAGMENTS:
        (path,) = [p for p in PAGES if p.stem == page]
        assert any(mark in body for kind, body in fences(path) if kind == "python")
    assert len(RUN) > 25


def test_make_demo_is_the_command_that_the_guide_shows() -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert recipe
    made = shlex.split(recipe[1].replace("\\\n", " ").replace("$(BIN)/", ""))
    assert made in [shlex.split(line, comments=True) for _, line in COMMANDS]

"""The site: a page for every paper, guide pages that hold, an example that runs, and a build without warnings."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from markdown_it import MarkdownIt

import pondera.replications
from pondera.lab import Recipe, compare, load_task
from pondera.papers import Paper, catalogue, evidence, paper, status
from pondera.papers.page import commands, ours, page, replicated, snippets, text

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HAND_WRITTEN = [DOCS / "index.md", *sorted((DOCS / "guide").glob("*.md"))]
BUILT = [p for p in catalogue() if p.objects]
NO_SPHINX = not all(importlib.util.find_spec(m) for m in ("sphinx", "myst_parser", "furo"))
needs_sphinx = pytest.mark.skipif(NO_SPHINX, reason="the site needs the extra: pip install 'pondera[docs]'")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pondera_docs_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(markdown: str) -> str:
    """What a reader sees of inline Markdown, headings and paragraphs in one line."""
    tokens = [t for t in MarkdownIt().enable("table").parse(markdown) if t.type == "inline"]
    return " ".join("".join(c.content for c in t.children or [] if c.type in ("text", "code_inline")) for t in tokens)


def blocks(path: Path, language: str) -> list[str]:
    tokens = MarkdownIt().parse(path.read_text(encoding="utf-8"))
    return [t.content for t in tokens if t.type == "fence" and t.info.strip() == language]


def said(path: Path) -> list[list[str]]:
    """The arguments of every pondera command in a page."""
    text = "".join(blocks(path, "console")).replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("$ pondera ")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of the site, generated pages and all, away from the checkout."""
    root = tmp_path_factory.mktemp("site")
    generate = load(DOCS / "_generate.py")
    shutil.copytree(DOCS, root / "docs", ignore=shutil.ignore_patterns(*generate.FOLDERS, "__pycache__"))
    (root / "examples").symlink_to(ROOT / "examples")
    (root / "src").symlink_to(ROOT / "src")
    generate.generate(root / "docs")
    return root / "docs"


# -- a page for every paper -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", [False, True])
@pytest.mark.parametrize("p", catalogue(), ids=lambda p: p.key)
def test_every_page_has_title_status_and_advice(p: Paper, site: bool) -> None:
    made = page(p, site=site)
    text = words(made)
    assert made.startswith(f"# {p.key}\n")
    for needed in (p.title, p.summary, p.use, p.avoid, status(p)):
        assert " ".join(needed.split()).replace("`", "") in text
    assert not p.arxiv or p.url in made


@pytest.mark.parametrize("p", BUILT, ids=lambda p: p.key)
def test_pages_of_built_methods_name_each_public_object(p: Paper) -> None:
    for site in (False, True):
        made = page(p, site=site)
        assert all(path in made for path in p.objects)


@pytest.mark.parametrize("p", BUILT, ids=lambda p: p.key)
def test_snippets_run_as_they_stand(p: Paper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = snippets(p)
    assert shown or not any(ours(path, value) for path, value in zip(p.objects, p.resolve())), "no example anywhere"
    for s in shown:
        exec(compile(s.source, s.path, "exec"), {"__name__": "snippet"})
        assert not re.search(r"(from|import) pondera\S*\._", s.session), "an example imports a private module"


def test_shapes_that_commands_are_tried_on_are_those_of_the_tasks() -> None:
    from pondera.papers.page import TASKS, _fits

    for name, (shape, classes) in TASKS.items():
        (x, y), _ = load_task(name).data()
        assert tuple(x.shape[1:]) == shape
        assert int(y.max()) < classes
        assert _fits(name, Recipe())
    assert commands(paper("norm-loss")) == ["pondera compare digits --penalty norm_loss"]


@pytest.mark.parametrize("p", BUILT, ids=lambda p: p.key)
def test_commands_on_pages_name_recipes_that_exist(p: Paper) -> None:
    for line in commands(p):
        _, _, task, option, name = line.split()
        load_task(task)
        Recipe(**{option.removeprefix("--"): name})


def test_what_is_not_built_promises_nothing() -> None:
    planned = next(p for p in catalogue() if not p.objects and not replicated(p.key))
    assert not snippets(planned)
    assert not commands(planned)
    assert "## API" not in page(planned)
    assert "## Reproduce" not in page(planned)


def test_evidence_becomes_a_table_figures_and_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = pondera.replications.claims("norm-loss")
    gap = {"mean": -0.25, "low": -0.5, "high": -0.125, "size": 1.0, "n": 5}
    record = {"name": first.name, "claim": first.text, "source": "Sec. 3", "criterion": "|norm - 1| < 0.05 * a"}
    record |= {
        "budget": "quick",
        "verdict": "refuted",
        "seconds": 2.0,
        "figures": ["norm-loss-a.svg"],
        "note": "Why <so>.",
    }
    record |= {
        "measured": {"the_gap": gap, "each": [1.0] * 9},
        "versions": dict.fromkeys(("torch", "python", "pondera"), "1"),
    }
    monkeypatch.setattr("pondera.papers.evidence.recorded", lambda key: [record])
    made = page(paper("norm-loss"), site=True)
    text = words(made)
    assert "|norm - 1| < 0.05 * a" in text
    assert "the gap -0.25 (95% interval -0.5 to -0.125, n = 5)" in text
    assert "1, 1, 1, 1, 1, 1 and 3 more" in text
    assert "Why <so>." in text
    assert "](norm-loss-a.svg)" in made
    assert made.count("**refuted**") == 1
    assert made.count("not run yet") == len(others)


# -- generating -------------------------------------------------------------------------------------------------------


def test_generating_again_touches_nothing_and_removes_what_is_stale(copy: Path) -> None:
    generate = load(DOCS / "_generate.py")
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.md")}
    stale = copy / "methods" / "no-such-paper.md"
    stale.write_text("old", encoding="utf-8")
    generate.generate(copy)
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*.md")} == before
    assert {p.key for p in catalogue()} <= {p.stem for p in (copy / "methods").glob("*.md")}


def test_tables_of_the_generator_name_rooms_and_papers_that_exist() -> None:
    generate = load(DOCS / "_generate.py")
    assert set(generate.ROOMS) == {p.room for p in catalogue()}
    assert {k for _, keys in generate.SYMPTOMS for k in keys} <= {p.key for p in catalogue()}


def test_lists_show_every_paper_with_its_status(copy: Path) -> None:
    rows = (copy / "methods" / "index.md").read_text(encoding="utf-8").splitlines()
    for p in catalogue():
        row = next(r for r in rows if r.startswith(f"| [{p.key}]("))
        assert f"| {status(p)} |" in row
        room = (copy / "rooms" / f"{p.room}.md").read_text(encoding="utf-8")
        assert f"[{p.key}](../methods/{p.key}.md)" in room


def test_what_papers_came_to_is_said_of_every_one_that_was_tried(copy: Path) -> None:
    words = (copy / "methods" / "came-to.md").read_text(encoding="utf-8")
    tried = [p for p in catalogue() if evidence.recorded(p.key)]
    assert f"{len(tried)} of them" in words
    for p in tried:
        told = f"- [{p.key}]({p.key}.md) ({p.room}), **{p.came_to}**: {text(p.headline)}"
        assert told in words if p.came_to else f"[{p.key}]({p.key}.md)" in words.partition("not summed up yet")[2]
    total = next(r for r in words.partition("## Claims")[2].splitlines() if r.startswith("| all |"))
    counted = [evidence.counts(p.key) for p in tried]
    assert [int(n or 0) for n in total.split("|")[3:7]] == [
        sum(c.get(o, 0) for c in counted) for o in evidence.OUTCOMES
    ]


def test_choices_name_only_what_is_built(copy: Path) -> None:
    made = (copy / "methods" / "_choices.md").read_text(encoding="utf-8")
    named = set(re.findall(r"/methods/([\w-]+)\.md", made))
    assert named <= {p.key for p in BUILT}


# -- guide pages ------------------------------------------------------------------------------------------------------


def test_links_and_included_files_exist(copy: Path) -> None:
    for path in sorted(copy.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        body = re.sub(r"^```(?!\{).*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", body)
        links += re.findall(r"^```\{(?:literalinclude|include)\} (\S+)$", body, flags=re.MULTILINE)
        for link in links:
            to, _, anchor = link.partition("#")
            target = (copy / to[1:] if to.startswith("/") else path.parent / to) if to else path
            assert target.is_file(), f"{path.relative_to(copy)} points at {link}"
            if anchor:
                heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads], link


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda p: p.stem)
def test_commands_in_the_guide_are_commands(path: Path) -> None:
    import typer

    from pondera.cli._app import app

    group: Any = typer.main.get_command(app)
    for args in said(path):
        context = group.make_context("pondera", list(args), resilient_parsing=True)
        _, command, rest = group.resolve_command(context, list(args))
        given = command.make_context(command.name, rest, parent=context).params
        for room in ("init", "parametrize", "penalty", "optim"):
            names = given.get(room) or []
            for name in [names] if isinstance(names, str) else names:
                Recipe(**{room: name})
        for recipe in given.get("recipes") or []:
            Recipe.parse(recipe)
        if "key" in given:
            assert paper(" ".join(given["key"])).objects, f"{path.name} shows {given['key']}, which is not built"
        for key in given.get("keys") or []:
            pondera.replications.claims(key)
        if "task" in given:
            load_task(ROOT / given["task"] if given["task"].endswith(".py") else given["task"])


def test_recipes_in_the_guide_are_recipes() -> None:
    (text,) = blocks(DOCS / "guide" / "own-task.md", "text")
    for line in text.splitlines():
        Recipe.parse(line)


@pytest.mark.parametrize("path", HAND_WRITTEN, ids=lambda p: p.stem)
def test_python_in_the_guide_is_python(path: Path) -> None:
    for code in blocks(path, "python"):
        compile(code, str(path), "exec")


def test_the_first_snippet_of_the_site_runs() -> None:
    first, *_ = blocks(DOCS / "index.md", "python")
    exec(first, {})


# -- the example task -------------------------------------------------------------------------------------------------


def test_the_example_task_loads_and_runs_two_recipes() -> None:
    table = compare(
        ROOT / "examples" / "wine.py",
        ["", "optim=SGD(momentum=0.9)"],
        budget=20,
        seeds=2,
        store="sqlite://",
        workers=1,
        progress=False,
    )
    assert table.ok
    assert [len(r.finished) for r in table.rows] == [2, 2]
    assert all(s > 0.5 for r in table.rows for s in r.finished)  # three kinds: chance is a third


def test_settings_in_the_guide_are_those_of_the_lab() -> None:
    from pondera.lab import Settings

    text = (DOCS / "guide" / "own-task.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+|\(.*?\)) \|", text.partition("## Settings")[2], flags=re.MULTILINE))
    expected = {k: f.default for k, f in Settings.__dataclass_fields__.items() if k != "rates"}
    assert rows == {k: f'`"{v}"`' if isinstance(v, str) else str(v) for k, v in expected.items()}


# -- the site ---------------------------------------------------------------------------------------------------------


@needs_sphinx
def test_docstrings_in_house_style_become_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    conf = load(DOCS / "conf.py")
    given = [
        "Fills lsuv_ in (out, *k); |x|.",
        ".. math:: |x|_2 \\\\",
        "",
        "Args:",
        "    a: one.",
        "Returns: a",
        "    scalar.",
    ]
    given += ["Raises: BadInput: never.", "Paper: A 2020.", "", ">>> f(*a)", "|x|"]
    made = "\n".join(conf.sections(given))
    assert r"lsuv\_ in (out, \*k); \|x\|." in made
    assert ".. math:: |x|_2 \\\\" in made
    assert ">>> f(*a)\n|x|" in made
    assert "\n\n:returns: a\n    scalar.\n:raises BadInput: never.\n:Paper: A 2020.\n" in made


@needs_sphinx
def test_formulas_become_mathml_and_unknown_ones_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    conf = load(DOCS / "conf.py")
    assert "<math" in conf.mathml(r"a &= \dots \\ b &= \lVert \bm{c} \rVert", block=True)
    assert conf.mathml(r"\nonsense < 1", block=False) == r"<code>\nonsense &lt; 1</code>"


@needs_sphinx
@pytest.mark.slow
def test_the_site_builds_without_a_warning(copy: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-b",
        "html",
        str(copy),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for p in catalogue():
        assert (tmp_path / "site" / "methods" / f"{p.key}.html").is_file()
    for made in (tmp_path / "site").rglob("*.html"):  # nothing is loaded from elsewhere when a page is opened
        loaded = re.findall(
            r'<(?:script|img|link)\b[^>]*?(?:src|href)="(https?:[^"]+)"', made.read_text(encoding="utf-8")
        )
        assert not loaded, f"{made.name} loads {loaded[0]}"

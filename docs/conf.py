"""How the site is built: ``sphinx-build -W --keep-going -b html docs site``. Nothing is fetched, then or when read.

Docstrings are written in Google's sections, with one house habit: ``Returns:``, ``Raises:`` and ``Paper:`` begin on the
line of their name. `sections` turns these into fields before napoleon sees them. Formulas become MathML, which browsers
draw by themselves, with the converter that comes inside docutils.
"""

import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _generate

from pondera import __version__

project = "pondera"
author = "The pondera authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/_*.md"]  # parts that other pages include
default_role = "code"
language = "en"

html_theme = "furo"
html_title = "pondera"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False

myst_heading_anchors = 3
autodoc_inherit_docstrings = False  # what torch says of its own methods stays on torch's site
autodoc_member_order = "bysource"
maximum_signature_line_length = 90
smartquotes_action = "D"  # dashes only: docstrings quote Python's strings
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # a shape such as "n *places" is no reST
napoleon_custom_sections = [("Paper", "returns_style"), "Shape"]

log = logging.getLogger(__name__)

INLINE_SECTION = re.compile(r"^(Returns|Raises|Yields|Paper|Papers|Note|Notes|Code|Shape): +(\S.*)$")
ONE_LINE_ARGS = re.compile(r"^(Args): +(\S.*)$")
PLAIN = re.compile(r"(?<=[(\[])\*(?=\w)|(?<=[(\[,] )\*(?=\w)|\||(?<=[A-Za-z0-9])_(?!\w|: )")
RAISED = re.compile(r"^(\w+): +(.*)$")
EQUATION = re.compile(r"\s{2,}\(((?:eq|eqs|Eq|Eqs|Alg|Sec)\.? ?[^()]*(?:\([^()]*\))?[^()]*)\)\s*$")
ALIASES = {r"\dots": r"\ldots", r"\bm": r"\boldsymbol", r"\big": r"\bigl", r"\Big": r"\Bigl"}


def sections(lines: list[str]) -> list[str]:
    """House sections that begin on the line of their name, as reST fields; the rest as it is."""
    out: list[str] = []
    inside = False  # a field begun here
    for line in _prose(lines):
        found = INLINE_SECTION.match(line) or ONE_LINE_ARGS.match(line)
        if found:
            if out and out[-1].strip() and not inside:
                out.append("")
            out.append(_field(*found.groups()))
            inside = True
            continue
        if inside and line.strip() and not line.startswith(" "):
            inside = False
            if out[-1].strip():
                out.append("")
        out.append(line)
    return out


def _prose(lines: list[str]) -> Iterator[str]:
    r"""The lines with those signs escaped that stand for themselves in docstrings and for markup in reST.

    These are the star of a shape such as (out, \*fan_in), the bars of \|x\|, and the underscore that ends lsuv\_. Code
    in backquotes, doctests with their answers, directives such as formulas, and literal blocks stay.
    """
    kept = -1  # indentation of what opened a block that stays
    doctest = False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip():
            kept = -1 if indent <= kept else kept
            doctest = doctest or line.lstrip().startswith(">>>")
        else:
            doctest = False
        if kept >= 0 or doctest or line.lstrip().startswith(("..", "| ", "+-")):
            yield line
        else:
            parts = re.split(r"(`+[^`]+`+_*)", line)
            yield "".join(p if i % 2 else PLAIN.sub(r"\\\g<0>", p) for i, p in enumerate(parts))
        if kept < 0 and (line.lstrip().startswith(".. ") or line.rstrip().endswith("::")):
            kept = indent


def _field(name: str, words: str) -> str:
    typed = RAISED.match(words) if name == "Raises" else None
    if typed:
        return f":raises {typed.group(1)}: {typed.group(2)}"
    return f":{name.lower() if name in ('Returns', 'Yields', 'Raises') else name}: {words}"


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = sections(lines)


def mathml(tex: str, block: bool) -> str:
    """A formula as MathML; as its source, in code, where docutils' converter does not know a command."""
    for old, new in ALIASES.items():
        tex = re.sub(re.escape(old) + r"(?![a-zA-Z])", lambda _, new=new: new, tex)
    try:
        return str(tex2mathml(tex, as_block=block))
    except MathError as error:
        log.info("formula left as source: %s: %s", error, " ".join(tex.split()))
        return f"<code>{escape(tex)}</code>"


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    rows = node.astext().splitlines()
    named = [EQUATION.search(r) for r in rows]
    tex = "\n".join(r[: m.start()] if m else r for r, m in zip(rows, named))
    marks = ", ".join(m.group(1) for m in named if m)
    number = f'<span class="eqno">({escape(marks)})</span>' if marks else ""
    self.body.append(f'<div class="math">{mathml(tex, block=True)}{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("builder-inited", lambda app: _generate.generate(Path(app.srcdir)))
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}

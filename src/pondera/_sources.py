"""Where modules of this library come from and what their files import, read and not run: no torch, no import.

What a stored run and recorded evidence depend on is found out by these.
"""

import ast
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pondera.errors import BadInput

DIGITS = 16
SELF = "pondera"
_BY_NAME = {"import_module", "__import__", "find_spec", "files"}  # functions that are given a module's name


@dataclass(frozen=True)
class Statement:
    """One import: ``from ..module import names`` with `level` dots, or ``import module`` with no names. A name comes with
    what it is bound to."""

    level: int
    module: str
    names: tuple[tuple[str, str], ...] = ()

    def absolute(self, package: str) -> str | None:
        """The module's full name, seen from `package`; None when the dots lead out of it."""
        if not self.level:
            return self.module
        parts = package.split(".") if package else []
        if self.level > len(parts):
            return None
        return ".".join([*parts[: len(parts) - self.level + 1], *filter(None, [self.module])])


@dataclass(frozen=True)
class SourceFile:
    """What a module's file holds. exports: its `__all__` where that is a literal, for ``from package import *``."""

    digest: str
    statements: tuple[Statement, ...] = ()
    exports: tuple[str, ...] = ()


def read(file: str) -> SourceFile:
    try:
        at = os.stat(file)
        return _parsed(file, at.st_mtime_ns, at.st_size, at.st_ctime_ns)  # ctime: a copy may keep the other two
    except OSError as error:
        raise BadInput(f"the module file {file} cannot be read: {error.strerror or type(error).__name__}") from None


@lru_cache(maxsize=8192)
def _parsed(file: str, mtime_ns: int, size: int, ctime_ns: int) -> SourceFile:
    content = Path(file).read_bytes()
    if not file.endswith((".py", ".pyw")):  # compiled: its bytes are all there is
        return SourceFile(digest(content))
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return SourceFile(digest(content))
    return SourceFile(digest(content), tuple(statements(tree)), tuple(exports(tree)))


@lru_cache(maxsize=64)
def statements_of(source: str) -> tuple[Statement, ...]:
    try:
        return tuple(statements(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return ()


def statements(tree: ast.AST) -> Iterator[Statement]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Statement(0, a.name) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield Statement(node.level, node.module or "", tuple((a.name, a.asname or a.name) for a in node.names))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].value
            if called in _BY_NAME and isinstance(name, str) and name.strip("."):
                bare = name.lstrip(".")
                yield Statement(len(name) - len(bare), bare)


def exports(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
            value = getattr(node, "value", None)
            if isinstance(value, (ast.List, ast.Tuple)):
                yield from (e.value for e in value.elts if isinstance(e, ast.Constant) and isinstance(e.value, str))


def home(module: str, name: str, depth: int = 0) -> str:
    """The module of pondera that ``from module import name`` takes it from."""
    if own_file(f"{module}.{name}"):
        return f"{module}.{name}"
    file = own_file(module)
    if file is None or file.name != "__init__.py" or depth > 8:
        return module
    for s in read(str(file)).statements:
        source = s.absolute(module)
        for original, bound in s.names:
            if bound == name and source and source.startswith(f"{SELF}."):
                return home(source, original, depth + 1)
    return module


def own_file(name: str) -> Path | None:
    base = Path(__file__).parent.joinpath(*name.split(".")[1:])
    return next((f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()), None)


def package_of(name: str, file: Path) -> str:
    return name if file.name == "__init__.py" else name.rpartition(".")[0]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]


# -- what a claim's evidence depends on -------------------------------------------------------------------------------


def evidence_folder() -> Path:
    """Where evidence lies, a folder a room: the repository's `evidence/` in a checkout, the packaged copy elsewhere."""
    package = Path(__file__).resolve().parent
    packaged = package / "_evidence"
    return packaged if packaged.is_dir() else package.parents[1] / "evidence"


RULE = "2"  # of running and judging: raise it when comparisons or verdicts come out otherwise for the same sources
# what is covered by RULE, or holds no numbers
_APART = ("cli", "papers", "report", "doctor", "lab", "errors", "_files", "_words", "_versions", "_sources")
_FRAMEWORK = {f"{SELF}.replications{m}" for m in ("", "._claims", "._outcomes", "._lab", "._kept")}
_ROOMS = ("init", "parametrize", "penalties", "optim", "adapters", "nn")  # recipes name their methods


def claim_sources(replication: str, name: str) -> tuple[str, dict[str, str]]:
    """The fingerprint of what one claim's figures come from, and the files it lies in.

    Covered are the claim's function with whatever it reaches in its module, the criterion, method and sham it is stated
    with, the modules of pondera that these import or name in a recipe ("init=lsuv"), those which these import in turn, and
    the built-in tasks named. Comments, docstrings and layout are not; of the lab, only the tasks, and the version of its rule.

    Args: replication: the module, such as ``"pondera.replications.init.lsuv"``. name: of the claim's function.
    Returns: the rule's version and a hash of 16 hexadecimal digits, and module -> hash of its file's bytes.
    Raises: BadInput: if there is no such module or function.
    """
    file = own_file(replication)
    reached = _reached(str(file), name) if file else None
    if file is None or reached is None:
        raise BadInput(f"there is no claim {name!r} in {replication}")
    text, statements, words = reached
    todo = [m for s in statements for m in _modules(s, replication.rpartition(".")[0])]
    todo += [m for word in words for m in _named(word)]
    found: dict[str, Path] = {}
    while todo:
        module = todo.pop()
        at = own_file(module)
        if module in found or at is None or _left_out(module):
            continue
        found[module] = at
        todo += [m for s in read(str(at)).statements for m in _modules(s, package_of(module, at))]
    parts = [text, *(f"{m} {_meaning(str(found[m]))}" for m in sorted(found))]
    files = {replication: file} | found
    return f"{RULE}-{digest(chr(10).join(parts).encode())}", {m: _bytes(str(files[m])) for m in sorted(files)}


def still_fits(replication: str, name: str, fingerprint: str, files: dict[str, str]) -> bool:
    """Whether a fingerprint that was recorded is what `claim_sources` gives now; nothing is parsed where no file changed.

    >>> still_fits("pondera.replications.init.lsuv", "unit_variance_in_any_graph", "0" * 16, {})
    False
    """
    now = {m: at for m in files if (at := own_file(m))}
    if not fingerprint.startswith(f"{RULE}-"):
        return False
    if files and all(m in now and _bytes(str(now[m])) == mark for m, mark in files.items()):
        return True
    try:
        return claim_sources(replication, name)[0] == fingerprint
    except BadInput:
        return False


def _modules(s: Statement, package: str) -> list[str]:
    """The modules of pondera that one import leads to."""
    module = s.absolute(package)
    if not module or module.partition(".")[0] != SELF:
        return []
    return [home(module, name) for name, _ in s.names] or [module]


def _left_out(module: str) -> bool:
    inside = module.removeprefix(f"{SELF}.")
    if inside.startswith("lab.tasks.") and not inside.startswith("lab.tasks._"):
        return False
    return module == SELF or module in _FRAMEWORK or any(inside == p or inside.startswith(f"{p}.") for p in _APART)


def _named(word: str) -> list[str]:
    """Modules behind a word of a text without blanks: a method as recipes name it, or a built-in task."""
    task = f"{SELF}.lab.tasks.{word}"
    return [*_names().get(word, ()), *([task] if own_file(task) else [])]


@lru_cache(maxsize=1)
def _names() -> dict[str, tuple[str, ...]]:
    """What recipes call the methods of the rooms -> the modules that have them."""
    found: dict[str, tuple[str, ...]] = {}
    for room in _ROOMS:
        package = f"{SELF}.{room}"
        at = own_file(package)
        for name in read(str(at)).exports if at else ():
            short = name.removesuffix("_").removesuffix("Config")
            found[short] = (*found.get(short, ()), home(package, name))
    return found


@lru_cache(maxsize=512)
def _bytes(file: str) -> str:
    return digest(Path(file).read_bytes())


@lru_cache(maxsize=512)
def _meaning(file: str) -> str:
    """Hash of what a file's text does: without comments, docstrings and layout."""
    return digest(_bare(ast.parse(Path(file).read_bytes())).encode())


def _bare(tree: ast.AST) -> str:
    """A tree's text without docstrings, and without what only words errors."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):  # a lambda's is an expression
            continue
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            value = getattr(body[0], "value", None) if isinstance(body[0], ast.Expr) else None
            body = body[isinstance(value, ast.Constant) and isinstance(value.value, str) :]
        node.body = [s for s in body if not _words_errors(s)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _words_errors(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == f"{SELF}.errors"
    return isinstance(node, ast.Expr) and getattr(getattr(node.value, "func", None), "id", "") == "require_extra"


def _reached(file: str, name: str) -> tuple[str, list[Statement], set[str]] | None:
    """Of a replication's file, what one claim reaches: its text, the imports, and the words that may name methods."""
    tree = ast.parse(Path(file).read_bytes())
    bound: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        for target in _binds(node):
            bound.setdefault(target, []).append(node)
    if not any(isinstance(node, ast.FunctionDef) for node in bound.get(name, [])):
        return None
    seen: dict[int, ast.stmt] = {}
    todo = [name]
    asked: set[str] = set()
    while todo:
        wanted = todo.pop()
        if wanted in asked:
            continue
        asked.add(wanted)
        for node in bound.get(wanted, []):
            if id(node) not in seen:
                seen[id(node)] = node
                _state(node)
                todo += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    order = [node for node in tree.body if id(node) in seen]
    imports = [node for node in order if isinstance(node, (ast.Import, ast.ImportFrom))]
    rest = [node for node in order if not isinstance(node, (ast.Import, ast.ImportFrom))]
    strings = {
        n.value for node in rest for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    words = {w for s in strings if s and not re.search(r"\s", s) for w in re.findall(r"\w+", s)}
    used = [s for node in imports for s in _only(node, asked)]
    inside = [s for node in rest for s in statements(node)]
    return "\n".join(_bare(node) for node in rest), used + inside, words


def _binds(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(a.asname or a.name).partition(".")[0] for a in node.names]
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _state(node: ast.stmt) -> None:
    """Of a claim's decorator keep what figures depend on; its prose may be mended."""
    for call in getattr(node, "decorator_list", []):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "claim":
            call.args = []
            call.keywords = [k for k in call.keywords if k.arg in ("criterion", "method", "sham")]


def _only(node: ast.Import | ast.ImportFrom, asked: set[str]) -> Iterator[Statement]:
    """An import's statements, of the names that are asked for."""
    for alias in node.names:
        if (alias.asname or alias.name).partition(".")[0] in asked:
            if isinstance(node, ast.Import):
                yield Statement(0, alias.name)
            else:
                yield Statement(node.level, node.module or "", ((alias.name, alias.asname or alias.name),))

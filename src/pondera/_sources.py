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


def home(module: str, name: str) -> str:
    """The module of pondera that ``from module import name`` takes it from."""
    return origin(module, name)[0]


def origin(module: str, name: str, depth: int = 0) -> tuple[str, str]:
    """The module of pondera that ``from module import name`` takes it from, and its name there; a module itself is `WHOLE`."""
    file = own_file(module)
    if file is None or file.name != "__init__.py" or depth > 8:
        return module, name
    for s in read(str(file)).statements:
        source = s.absolute(module)
        for original, bound in s.names:
            if bound == name and source and source.startswith(f"{SELF}."):
                return origin(source, original, depth + 1)
    return (f"{module}.{name}", WHOLE) if own_file(f"{module}.{name}") else (module, name)


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


RULE = "3"  # of running and judging: raise it when comparisons or verdicts come out otherwise for the same sources
# what is covered by RULE, or holds no numbers
_APART = ("cli", "papers", "report", "doctor", "lab", "errors", "_files", "_words", "_versions", "_sources")
_FRAMEWORK = {f"{SELF}.replications{m}" for m in ("", "._claims", "._outcomes", "._lab", "._kept")}
_ROOMS = ("init", "parametrize", "penalties", "optim", "adapters", "nn")  # recipes name their methods


def claim_sources(replication: str, name: str) -> tuple[str, dict[str, str]]:
    """The fingerprint of what one claim's figures come from, and the files it lies in.

    Covered are the claim's function with the criterion, method and sham it is stated with, and whatever it reaches by name:
    in its module, and through imports in other modules of pondera, of each the functions, classes and values that are
    reached and what runs when it is imported; the methods named in a recipe ("init=lsuv") and the built-in tasks named. A
    module that is used as a whole (``import pondera.linalg``) counts as a whole. Comments, docstrings and layout are not
    covered; of the lab, only the tasks, and the version of its rule.

    Args: replication: the module, such as ``"pondera.replications.init.lsuv"``. name: of the claim's function.
    Returns: the rule's version and a hash of 16 hexadecimal digits, and module -> hash of its file's bytes.
    Raises: BadInput: if there is no such module or function.
    """
    file = own_file(replication)
    if file is None or not any(p.makes(name) for p in _pieces(str(file))):
        raise BadInput(f"there is no claim {name!r} in {replication}")
    reached: dict[str, set[str]] = {}  # of each module the names asked for; WHOLE for all of it
    todo = [(replication, name)]
    while todo:
        module, wanted = todo.pop()
        at = own_file(module)
        asked = reached.setdefault(module, set())
        if wanted in asked or at is None or (module != replication and _left_out(module)):
            continue
        asked.add(wanted)
        for piece in _closure(str(at), wanted):
            todo += [m for s in piece.statements for m in _asked_for(s, package_of(module, at))]
            if module == replication:
                todo += [(m, n) for word in piece.words for m, n in _named(word)]
    files = {m: at for m in reached if (at := own_file(m)) and (m == replication or not _left_out(m))}
    parts = [m + " " + _text(str(files[m]), reached[m]) for m in sorted(files)]
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


def _asked_for(s: Statement, package: str) -> list[tuple[str, str]]:
    """The modules of pondera that one import leads to, and what is taken from each."""
    module = s.absolute(package)
    if not module or module.partition(".")[0] != SELF:
        return []
    return [origin(module, name) for name, _ in s.names] or [(module, WHOLE)]


def _left_out(module: str) -> bool:
    inside = module.removeprefix(f"{SELF}.")
    if inside.startswith("lab.tasks.") and not inside.startswith("lab.tasks._"):
        return False
    return module == SELF or module in _FRAMEWORK or any(inside == p or inside.startswith(f"{p}.") for p in _APART)


def _named(word: str) -> list[tuple[str, str]]:
    """What is behind a word of a text without blanks: a method as recipes name it, or a built-in task."""
    task = f"{SELF}.lab.tasks.{word}"
    return [*_names().get(word, ()), *([(task, WHOLE)] if own_file(task) else [])]


@lru_cache(maxsize=1)
def _names() -> dict[str, tuple[tuple[str, str], ...]]:
    """What recipes call the methods of the rooms -> where they are made."""
    found: dict[str, tuple[tuple[str, str], ...]] = {}
    for room in _ROOMS:
        package = f"{SELF}.{room}"
        at = own_file(package)
        for name in read(str(at)).exports if at else ():
            short = name.removesuffix("_").removesuffix("Config")
            found[short] = (*found.get(short, ()), origin(package, name))
    return found


@lru_cache(maxsize=512)
def _bytes(file: str) -> str:
    return digest(Path(file).read_bytes())


# -- a module by its top-level statements, and which of them a name reaches -------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A statement at the top of a module. text: what it does, without comments, docstrings and layout. binds, uses: the names
    it binds and reads. statements: its imports. words: those of its strings without blanks. always: whether it does something
    when imported beside binding names. makes_function: whether it defines one. imports: whether it only imports."""

    text: str
    binds: frozenset[str]
    uses: frozenset[str]
    statements: tuple[Statement, ...]
    words: frozenset[str]
    always: bool
    makes_function: bool
    imports: bool

    def makes(self, name: str) -> bool:
        return self.makes_function and name in self.binds


WHOLE = "*"  # asked for where all of a module counts
# decorators that leave their function where it was, and keep no list of it
_PLAIN = {
    "cache",
    "lru_cache",
    "dataclass",
    "contextmanager",
    "no_grad",
    "claim",
    "wraps",
    "overload",
    "runtime_checkable",
}


@lru_cache(maxsize=512)
def _pieces(file: str) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for node in _without_docstring(ast.parse(Path(file).read_bytes()).body):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):  # each name apart
            found += [_piece(type(node)(**{**vars(node), "names": [alias]})) for alias in node.names]
        else:
            _state(node)
            found.append(_piece(node))
    return tuple(found)


def _piece(node: ast.stmt) -> Piece:
    bare = _bare(node)
    inside = list(ast.walk(node))
    names = [n for n in inside if isinstance(n, ast.Name)]
    imports = isinstance(node, (ast.Import, ast.ImportFrom))
    strings = {n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return Piece(
        "" if imports or _words_errors(node) else bare,
        frozenset(_binds(node)),
        frozenset(n.id for n in names),
        tuple(statements(node)) if not isinstance(node, ast.ImportFrom) or node.module != f"{SELF}.errors" else (),
        frozenset(w for s in strings if s and not re.search(r"\s", s) for w in re.findall(r"\w+", s)),
        not imports and _acts(node),
        isinstance(node, ast.FunctionDef),
        imports,
    )


def _acts(node: ast.stmt) -> bool:
    """Whether a statement does something beside binding its names: a call, a table's entry, a decorator that keeps a list."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
        return any((d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "")) not in _PLAIN for d in called)
    return not isinstance(node, (ast.Assign, ast.AnnAssign)) or any(
        not isinstance(t, (ast.Name, ast.Tuple)) for t in getattr(node, "targets", [getattr(node, "target", None)])
    )


@lru_cache(maxsize=8192)
def _closure(file: str, wanted: str) -> tuple[Piece, ...]:
    """The pieces of a module that `wanted` reaches by name, and those that act by themselves, in the module's order."""
    pieces = _pieces(file)
    if wanted == WHOLE:
        return pieces
    taken = {i for i, p in enumerate(pieces) if p.always}
    asked, todo = {wanted}, {wanted}.union(*(pieces[i].uses for i in taken))
    while todo:
        asked |= todo
        more = {i for i, p in enumerate(pieces) if i not in taken and p.binds & todo}
        taken |= more
        todo = set().union(*(pieces[i].uses for i in more)) - asked
    return tuple(pieces[i] for i in sorted(taken))


def _text(file: str, wanted: set[str]) -> str:
    """Hash of what all the names reach."""
    taken = {id(p) for name in wanted for p in _closure(file, name)}
    return digest(chr(10).join(p.text for p in _pieces(file) if id(p) in taken and not p.imports).encode())


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    value = getattr(body[0], "value", None) if body and isinstance(body[0], ast.Expr) else None
    return body[isinstance(value, ast.Constant) and isinstance(value.value, str) :]


def _bare(tree: ast.AST) -> str:
    """A tree's text without docstrings, and without what only words errors."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):  # a lambda's is an expression
            continue
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            body = _without_docstring(body)
        node.body = [s for s in body if not _words_errors(s)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _words_errors(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == f"{SELF}.errors"
    return isinstance(node, ast.Expr) and getattr(getattr(node.value, "func", None), "id", "") == "require_extra"


def _binds(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
        return
    for n in ast.walk(node):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):  # within an if or a try
            yield n.name
        elif isinstance(n, (ast.Import, ast.ImportFrom)):
            yield from ((a.asname or a.name).partition(".")[0] for a in n.names)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            yield n.id


def _state(node: ast.stmt) -> None:
    """Of a claim's decorator keep what figures depend on; its prose may be mended."""
    for call in getattr(node, "decorator_list", []):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "claim":
            call.args = []
            call.keywords = [k for k in call.keywords if k.arg in ("criterion", "method", "sham")]

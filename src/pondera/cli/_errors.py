"""What went wrong in one sentence."""

import ast
import re
from importlib.resources import files

import typer

from pondera.errors import EXTRAS, BadInput, missing_extra


def sentence(error: Exception, command: str) -> str | None:
    """One sentence for bad input, a missing extra or a wrong command line; None for an error of the program's own."""
    missing = missing_extra(error, command)
    if isinstance(error, BadInput):
        if missing is None or missing is error or "pip install" in str(error):
            return str(error)
        return f"{error}; it needs the extra: pip install 'pondera[{missing.extra}]'"
    if isinstance(error, ImportError):
        if missing is None and "pip install" in str(error):
            return str(error)
        return None if missing is None else str(missing)
    if isinstance(error, typer.Abort):
        return "stopped"
    if hasattr(error, "format_message"):  # a wrong command line, by typer's class or, in older releases, by click's
        said = " ".join(error.format_message().split()).rstrip(".")
        said = re.sub(r"\. Did you mean (.*)\?$", r" (did you mean \1?)", said)
        context = getattr(error, "ctx", None)
        return f"{said[:1].lower()}{said[1:]}" + (f"; see `{context.command_path} --help`" if context else "")
    return None


def packages_of_task(task: str) -> list[str]:
    """Packages of extras that a built-in task imports, read from its file; none for a task of the user's own."""
    return packages_in("lab", "tasks", f"{task}.py") if task.isidentifier() else []


def packages_in(*path: str) -> list[str]:
    """Packages of extras that one file of this library imports anywhere, read and not run."""
    file = files("pondera").joinpath(*path)
    if not file.is_file():
        return []
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "find_spec":
            found += [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return list(dict.fromkeys(top for name in found if (top := name.partition(".")[0]) in EXTRAS))

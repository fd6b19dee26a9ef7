"""What a run depends on besides its numbers: the local modules behind a task, installed packages, data, methods' sources.

Nothing is imported or run to find out. Modules are looked up where Python would find them and their text is read.

Covered: modules named in an import statement anywhere in the text, and by a literal name in `import_module("name")`,
`find_spec("name")` and `resources.files("name")`.
Not covered: names computed at run time, files of data, and code the text opens itself. A task's data are covered by their
own hash, see `data_hash`.
"""

import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from torch import Tensor

from pondera import _sources
from pondera.errors import BadInput

CHUNK = 2**24  # bytes of a tensor that may be copied at once
_APART = tuple(
    f"{_sources.SELF}.{part}" for part in ("lab", "report", "cli", "papers", "replications")
)  # no method's numbers
_SHAPES_ONLY = {"jaxtyping", "beartype", "typing_extensions"}  # annotations: another version gives the same numbers
_INSTALLED = {"site-packages", "dist-packages"}
_STDLIB = tuple({os.path.realpath(p) for k, p in sysconfig.get_paths().items() if k in ("stdlib", "platstdlib")})


# -- modules ----------------------------------------------------------------------------------------------------------


def local_sources(source: str, path: str) -> dict[str, str]:
    """Hashes of the local modules a task imports, directly or through other local modules.

    Local is what is found beside the task file or on `sys.path` and is neither part of Python, nor installed (under
    ``site-packages`` or ``dist-packages``), nor pondera itself. An editable checkout of another package is local. The
    task's folder is searched first. Found are imports anywhere in the text, those inside functions too, relative ones in
    packages, the packages on the way to a module, and `import_module("name")` and the like with a literal name.

    Files of data beside the task are not covered, nor are modules whose name is computed at run time.

    Args:
        source: the text of the task file.
        path: where it lies; its folder need not exist (on another machine).
    Returns: module name -> the first 16 hexadecimal digits of the sha256 of its file's bytes, in order of the names. Paths
        are not in it, so a checkout that was moved gives the same. Text that does not parse has no imports; a module
        that does not parse is hashed and not followed.
    Raises: BadInput: when a module's file cannot be read.

    >>> from tempfile import mkdtemp
    >>> folder = Path(mkdtemp())
    >>> _ = (folder / "my_layers.py").write_text("import math")
    >>> list(local_sources("import torch, my_layers", str(folder / "task.py")))
    ['my_layers']
    """
    return _walk(_sources.statements_of(source), _search_path(path))[0]


def imported_packages(source: str, path: str) -> list[str]:
    """The top-level names a task and its local modules import that are neither local, nor part of Python, nor pondera.

    Args: source, path: as in `local_sources`.
    Returns: the names in order, installed or not; for `packages`.
    Raises: BadInput: when a local module's file cannot be read.

    >>> imported_packages("import math, sklearn.datasets\\nfrom torch import nn", "task.py")
    ['sklearn', 'torch']
    """
    return sorted(_walk(_sources.statements_of(source), _search_path(path))[1])


def packages(names: Iterable[str]) -> dict[str, str]:
    """Versions of the installed distributions behind top-level import names.

    What these distributions need themselves is not looked at.

    Args: names: such as ``"sklearn"``; names that no installed distribution provides are left out.
    Returns: distribution name -> version, in order of the names.

    >>> list(packages(["torch", "no_such_package"]))
    ['torch']
    """
    providers = _providers(tuple(sys.path))
    found = {d for name in names for d in providers.get(name, ())}
    return {d: metadata.version(d) for d in sorted(found)}


def module_sources(obj: Any) -> str:
    """What a method's numbers depend on: the source of its module and of what that imports, or a version.

    Args: obj: a function, a class, a callable object, or a module.
    Returns: for an object of an installed package its ``"distribution==version"``. Otherwise a hash of 16 hexadecimal
        digits. Of a module of the user's: of its file, its local modules (see `local_sources`) and the versions of the
        packages they import. Of a method of pondera: of its module, the modules of pondera that it imports, directly or
        not, without the lab, the command line, the catalogue and the replications, and the versions of the packages they
        import.
    Raises: BadInput: when the object has no source that can be read.

    >>> module_sources(torch.optim.SGD) == f"torch=={torch.__version__}"
    True
    """
    while isinstance(obj, functools.partial):
        obj = obj.func
    module = obj if isinstance(obj, ModuleType) else sys.modules.get(getattr(obj, "__module__", None) or "")
    name = module.__name__ if module else ""
    file = getattr(module, "__file__", None)
    top = name.partition(".")[0]
    if top == _sources.SELF:
        found, outside = _own(name)
    elif (
        top == "torch"
    ):  # never read, even where it is a checkout: two thousand files, and the version names the commit
        return f"torch=={torch.__version__}"
    elif top in sys.stdlib_module_names or (file and _place(file) == "python"):
        return f"python=={sys.version.split()[0]}"
    elif file and _place(file) == "installed" and (versions := packages([top])):
        return ",".join(f"{d}=={v}" for d, v in versions.items())
    elif module and file:
        # a file that no distribution knows is local wherever it lies
        read = _sources.read(file)
        search = _search_path(_root(module, file))
        found, outside = _walk(read.statements, search, package=module.__package__ or "", local=top)
        found[name] = read.digest
    else:  # typed into a session, or made while it ran
        try:
            text = inspect.getsource(obj)
        except (OSError, TypeError):
            what = getattr(obj, "__qualname__", None) or type(obj).__name__
            raise BadInput(
                f"{what} of {name or 'no module'} has no source that can be read, so a change of it could not be noticed; "
                "put it into a file"
            ) from None
        found, outside = _walk(_sources.statements_of(text), _search_path("session.py"))
        found[name] = _sources.digest(text.encode())
    versions = packages(outside - _SHAPES_ONLY)
    return _sources.digest(json.dumps([sorted(found.items()), sorted(versions.items())]).encode())


@dataclass(frozen=True)
class _Found:
    """Where a module was found. file: None for a namespace package. inside: where its submodules are, None if no package."""

    place: str
    file: str | None = None
    inside: tuple[str, ...] | None = None


def _walk(
    statements: Iterable[_sources.Statement], search: list[str], package: str = "", local: str = ""
) -> tuple[dict[str, str], set[str]]:
    """Hashes of the local modules behind the statements, and the top-level names of what is installed (or nowhere).

    local: a top-level name that counts as local wherever it lies.
    """
    PathFinder.invalidate_caches()  # they go by a folder's time, too coarse for a file that has just been written
    known: dict[str, _Found | None] = {}

    def find(name: str) -> _Found | None:
        if name not in known:
            parent, _, last = name.rpartition(".")
            if not parent:
                known[name] = _find_top(name, search, local)
            else:
                above = find(parent)
                known[name] = _look_up(last, list(above.inside)) if above and above.inside else None
        return known[name]

    hashes: dict[str, str] = {}
    outside: set[str] = set()
    seen: set[str] = set()
    todo = [*_names(statements, package), *filter(None, [package])]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        top = name.partition(".")[0]
        found = find(top)
        if found is None or found.place == "installed":
            if top != _sources.SELF and top not in sys.stdlib_module_names:
                outside.add(top)
            continue
        if found.place != "local":
            continue
        parent, _, last = name.rpartition(".")
        if parent:
            todo.append(parent)  # a package's __init__ runs on the way to what is in it
        if last == "*":
            here = find(parent)
            exports = _sources.read(here.file).exports if here and here.file else ()
            todo.extend(f"{parent}.{e}" for e in exports)
            continue
        here = find(name)
        if here and here.file:
            read = _sources.read(here.file)
            hashes[name] = read.digest
            todo.extend(_names(read.statements, name if here.inside is not None else parent))
    return dict(sorted(hashes.items())), outside


def _names(statements: Iterable[_sources.Statement], package: str) -> Iterator[str]:
    """Every name the statements may stand for, modules and what may be modules in them."""
    for s in statements:
        module = s.absolute(package)
        if module:
            yield module
            yield from (f"{module}.{name}" for name, _ in s.names)


def _search_path(path: str) -> list[str]:
    """Where the modules a file imports are looked for: beside it, then where Python looks."""
    folder = str(Path(path).resolve().parent)
    return [folder, *(p for p in sys.path if isinstance(p, str))]


def _find_top(name: str, search: list[str], local: str) -> _Found | None:
    if name == _sources.SELF or name in sys.builtin_module_names:
        return _Found("python")
    found = _look_up(name, search)
    if found is None and name not in sys.stdlib_module_names:
        found = _look_up(name, list(_checkouts(tuple(sys.path))))
    return _Found("local", found.file, found.inside) if found and name == local else found


def _look_up(name: str, search: list[str]) -> _Found | None:
    """The module `name`, without dots, in the folders; never imports anything."""
    spec = PathFinder.find_spec(name, search)
    if spec is None:
        return None
    inside = None if spec.submodule_search_locations is None else tuple(spec.submodule_search_locations)
    if not (spec.has_location and spec.origin):  # a namespace package: folders only, local if one of them is
        places = {_place(p): p for p in inside or ()}
        ours = tuple(p for p in inside or () if _place(p) == "local")
        return _Found("local" if ours else next(iter(places), "python"), None, ours or inside)
    file = Path(os.path.abspath(spec.origin))
    while not file.exists() and file != file.parent:  # within a zip archive: the archive is what can change
        file = file.parent
    return _Found(_place(spec.origin), str(file), inside)


def _place(file: str) -> str:
    """ "installed", "python" or "local", by where a file lies."""
    path = os.path.abspath(file)
    if _INSTALLED & set(Path(path).parts):
        return "installed"
    real = os.path.realpath(path)
    return "python" if any(real.startswith(folder + os.sep) for folder in _STDLIB) else "local"


def _root(module: ModuleType, file: str) -> str:
    """A path in the folder that the module's top-level name lies in."""
    path = Path(file).resolve()
    for _ in range(module.__name__.count(".") + hasattr(module, "__path__")):
        path = path.parent
    return str(path)


# -- pondera's own modules --------------------------------------------------------------------------------------------


def _own(start: str) -> tuple[dict[str, str], set[str]]:
    """Hashes of a module of pondera and of those it imports, and the top-level names of other packages they import.

    A package's `__init__` only collects the methods of a room. What is imported from it leads to the module that has it,
    or a change of any method would be one of every method.
    """
    hashes: dict[str, str] = {}
    outside: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        file = _sources.own_file(name)
        if name in hashes or file is None or (name != start and _apart(name)):
            continue
        read = _sources.read(str(file))
        hashes[name] = read.digest
        package = _sources.package_of(name, file)
        for s in read.statements:
            module = s.absolute(package)
            top = (module or "").partition(".")[0]
            if not module or top in sys.stdlib_module_names:
                continue
            if top != _sources.SELF:
                outside.add(top)
            elif s.names:
                todo.extend(_sources.home(module, bound) for bound, _ in s.names)
            else:
                todo.append(module)
    return hashes, outside


def _apart(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in _APART)


# -- installed packages -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _providers(search: tuple[str, ...]) -> dict[str, list[str]]:
    """Top-level import name -> distributions; asked once for each `sys.path`, as it reads every distribution's files."""
    return {k: list(v) for k, v in metadata.packages_distributions().items()}


@lru_cache(maxsize=8)
def _checkouts(search: tuple[str, ...]) -> tuple[str, ...]:
    """Folders of the editable installs, for those that `sys.path` does not show (they bring a finder of their own)."""
    folders: dict[str, None] = {}
    for distribution in metadata.distributions():
        try:
            about = json.loads(distribution.read_text("direct_url.json") or "{}")
            if about.get("dir_info", {}).get("editable") and distribution.metadata["Name"] != _sources.SELF:
                root = url2pathname(urlsplit(about["url"]).path)
                folders |= {root: None, os.path.join(root, "src"): None}
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return tuple(folders)


# -- data -------------------------------------------------------------------------------------------------------------


def data_hash(*batches: tuple[Tensor, ...]) -> str:
    """Hash of tensors: how many there are in each batch, their dtypes, shapes and bytes.

    The same in every process and on every machine of the same byte order, wherever the tensors live and however they lie
    in memory. Nothing larger than 16 MiB is copied.

    Args: batches: tuples of tensors of any dtype and shape, such as the two of ``task.data()``.
    Returns: the first 16 hexadecimal digits of a sha256.

    >>> data_hash((torch.arange(3),)) == data_hash((torch.tensor([0, 1, 2]),))
    True
    >>> data_hash((torch.arange(3),)) == data_hash((torch.arange(3.0),))
    False
    """
    # sha256 has instructions of its own on most processors of today: twice as fast as blake2b there
    state = hashlib.sha256()
    for batch in batches:
        state.update(f"batch of {len(batch)};".encode())
        for x in batch:
            state.update(f"{x.dtype}{list(x.shape)}{x.layout};".encode())
            for part in _dense(x.detach()):
                _add(state.update, part)
    return state.hexdigest()[: _sources.DIGITS]


def _dense(x: Tensor) -> list[Tensor]:
    if x.layout == torch.strided:
        return [x]
    entries = x.to_sparse_coo().coalesce()
    return [entries.indices(), entries.values()]


def _add(update: Callable[[memoryview], None], x: Tensor) -> None:
    """Give the bytes of `x` in the order of its indices."""
    lazy = x.is_conj() or x.is_neg()  # bits that are not yet in the numbers
    if x.numel() == 0:
        return
    copied = x.device.type != "cpu" or lazy or not x.is_contiguous()
    if copied and x.ndim and x.numel() * x.element_size() > CHUNK:
        rows = max(1, CHUNK * len(x) // (x.numel() * x.element_size()))
        for some in x.split(rows) if len(x) > 1 else [x[0]]:
            _add(update, some)
        return
    x = x.resolve_conj().resolve_neg().cpu().contiguous()
    flat = x.as_strided((x.numel(),), (1,))  # one entry is contiguous at any stride, and no bytes to torch but at 1
    update(memoryview(flat.view(torch.uint8).numpy()))

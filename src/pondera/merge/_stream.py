"""Merging goes name by name: a rule is given the tensors of one name from every model and yields the merged one in blocks.

Two doors lead to it, `merge_states` for state dicts in memory and `merge_files` for safetensors files. The first model
is the base: the result has its names, their order, its dtypes and its integers. Arithmetic is in float32, in float64
where a model or the output has that.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Num
from torch import Tensor, nn

from pondera._safetensors import (
    INDEX,
    LABELS,
    Behind,
    FileModel,
    appearing_file,
    appearing_folder,
    as_bytes,
    header,
    in_order,
    shards,
)
from pondera.errors import BadInput, nearest, require_float
from pondera.merge._card import CARD, KEY, Told, as_yaml, card
from pondera.merge._card import names as labels
from pondera.merge._hub import located

BUDGET = 2**22  # bytes of numbers held at once, all models together: few enough for a core's own cache, too
SHARD = "50GB"  # of a shard at most, as transformers 5 has it
State = nn.Module | Mapping[str, Tensor]
Facts = dict[str, float]  # what a rule found on one tensor, for the report


@dataclass(frozen=True)
class Change:
    """What became of one tensor. how: "merged", "copied" from the base, or "copied, models differ" (integers only).
    change: norm of new minus base over norm of the base. facts: what the method says of it, such as t."""

    name: str
    shape: tuple[int, ...]
    how: str
    change: float = 0.0
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. files: those that were written, none in memory. dtypes: where models differ or another was asked
    for, what was read, computed in and written."""

    method: str
    models: int
    tensors: list[Change]
    files: list[Path] = field(default_factory=list)
    dtypes: str = ""

    @property
    def merged(self) -> list[Change]:
        return [t for t in self.tensors if t.how == "merged"]

    @property
    def copied(self) -> list[Change]:
        return [t for t in self.tensors if t.how != "merged"]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words; infinity (a base of zeros that changed) as the word."""
        rows = [
            {"name": t.name, "shape": list(t.shape), "how": t.how, "change": _plain(t.change)}
            | {k: _plain(v) for k, v in t.facts.items()}
            for t in self.tensors
        ]
        return {
            "method": self.method,
            "models": self.models,
            "files": [str(f) for f in self.files],
            "dtypes": self.dtypes,
            "tensors": rows,
        }

    def summary(self) -> str:
        """A few lines: how many tensors, how far they moved, what the method found."""
        lines = [f"{self.method}: {self.models} models, {len(self.merged)} tensors merged, {len(self.copied)} copied"]
        if self.dtypes:
            lines.append(self.dtypes)
        differ = [t.name for t in self.copied if t.how != "copied"]
        if differ:
            lines.append(f"integers of the base kept where models differ: {_listed(differ)}")
        if self.merged:
            lines.append(f"change relative to the base: {_spread(self.merged, lambda t: t.change)}")
        for fact in dict.fromkeys(k for t in self.merged for k in t.facts):
            having = [t for t in self.merged if fact in t.facts]
            if fact == "clamped":
                names = [t.name for t in having if t.facts[fact]]
                lines.append(f"t clamped to 0: {_listed(names) if names else 'nowhere'}")
            else:
                lines.append(f"{fact}: {_spread(having, lambda t, fact=fact: t.facts[fact])}")  # type: ignore[misc]
        if self.files:
            lines.append(f"written: {_listed([str(f) for f in self.files])}")
        return "\n".join(lines)


class MergedState(dict[str, Tensor]):
    """A state dict, new in memory, that knows its `report`."""

    report: MergeReport


class Part:
    """One tensor of one model, read when a rule asks. What is read may be the model's own memory: never write to it."""

    def __init__(self, model: "_Model", name: str, work: torch.dtype, who: str) -> None:
        self.model, self.name, self.work, self.who = model, name, work, who
        self.shape, self.numel = model.shapes[name], math.prod(model.shapes[name])
        self._last: tuple[tuple[int, int], Tensor] | None = None
        self._room: Tensor | None = None  # one place for all that is converted, which stays in the core's cache

    def flat(self, low: int, high: int) -> Num[Tensor, "n"]:
        """Entries low .. high of the flattened tensor in the dtype of the arithmetic; good until the next are asked for."""
        if self._last is None or self._last[0] != (low, high):
            self._last = None
            x = self.model.read(self.name, low, high)
            if x.dtype != self.work:
                if self._room is None or self._room.numel() < high - low:
                    self._room = torch.empty(high - low, dtype=self.work, device=x.device)
                x = self._room[: high - low].copy_(x)
            self._last = (low, high), x
        return self._last[1]

    def whole(self) -> Num[Tensor, "*shape"]:
        """The tensor in its shape, checked to be finite, for a rule that cannot go in blocks."""
        self.check(0, self.numel)
        return self.flat(0, self.numel).view(self.shape)

    def check(self, low: int, high: int) -> None:
        if not _finite(self.flat(low, high)):
            raise BadInput(f"{self.who} found NaN or infinity in {self.name} of {self.model.said}")


Rule = Callable[
    [list[Part], Facts], Iterator[Tensor]
]  # yields flat blocks of the merged tensor in order, each new in memory


def blocks(parts: Sequence[Part], row: int = 1) -> Iterator[list[Num[Tensor, "n"]]]:
    """The same stretch of every part, one stretch after the other; whole rows of `row` entries at a time.

    They are not checked: what is no finite number comes through sums and products, and is looked for in what they give.
    """
    step = BUDGET // (2 * parts[0].work.itemsize * (len(parts) + 2))  # twice: as stored and as reckoned with
    step = max(row, step // row * row)
    for low in range(0, parts[0].numel, step):
        yield [p.flat(low, min(low + step, p.numel)) for p in parts]


def merge_states(
    who: str,
    models: Sequence[State],
    rule: Rule,
    *,
    least: int = 2,
    drop: str | Iterable[str] = (),
    named: Iterable[str] = (),
) -> MergedState:
    """Merge state dicts or modules in memory; the base first. Tensors tied in every model are tied in the result.

    least: how many models there must be. drop: parts of names to leave out. named: parts of names that must occur.
    """
    sources = [_State(model, f"model {i}", who) for i, model in enumerate(models, 1)]
    named = list(named)
    names = _names(who, sources, least, drop, named)
    odd = [n for n in names if len({s.device(n) for s in sources}) > 1]
    if odd:
        raise BadInput(f"{who} needs models on one device, and they differ in {_listed(odd)}")
    changes: dict[str, Change] = {}
    made: dict[tuple[Any, ...], str] = {}
    out = MergedState()
    for name in names:
        tie = tuple(s.identity(name) for s in sources)
        first = name if None in tie else made.setdefault(tie, name)
        if first != name:
            if any(is_in(part, name) != is_in(part, first) for part in named):
                raise BadInput(f"{who} cannot treat {name} apart from {first}, to which it is tied")
            seen = changes[first]
            out[name], changes[name] = out[first], Change(name, seen.shape, seen.how, seen.change, seen.facts)
            continue
        flat = torch.empty(
            math.prod(sources[0].shapes[name]), dtype=sources[0].dtypes[name], device=sources[0].device(name)
        )
        low = 0
        for block in _blocks_of(who, name, sources, rule, changes, sources[0].dtypes[name]):
            flat[low : low + len(block)] = block
            low += len(block)
        out[name] = flat.view(sources[0].shapes[name])
    dtypes = _dtypes(sources, names, sources[0].dtypes)
    out.report = MergeReport(who, len(models), [changes[n] for n in names], dtypes=dtypes)
    return out


def merge_files(
    who: str,
    models: Sequence[str | Path],
    out: str | Path,
    rule: Rule,
    *,
    least: int = 2,
    drop: str | Iterable[str] = (),
    named: Iterable[str] = (),
    shard_size: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
    told: Told | None = None,
) -> MergeReport:
    """Merge models that lie in safetensors files, a few MiB at a time, whatever their size.

    Each model is a ``.safetensors`` file, the ``.safetensors.index.json`` of one in shards, a folder that holds one
    of them, or one in the cache of Hugging Face's hub, by its id. `out` is a ``.safetensors`` file; or, where the base is no
    single file or with `shard_size` (bytes, or as "5GB"), a new folder: shards and their index, called as Hugging Face
    calls them, beside the base's config and tokenizer, and for a model with a config a card. Without `shard_size` the
    shards are `SHARD`, and one alone needs no index. The output appears whole at the end or not at all, and keeps the
    base's metadata, with the recipe.

    dtype: of all floating-point numbers that are written, instead of the base's. replace: a folder with a model in it may
    be replaced. told: for the recipe and the card.
    """
    out = Path(out)
    paths = [located(path, who) for path in models]
    sources = [FileModel(path, who) for path in paths]
    for i, source in enumerate(sources, 1):
        source.said = f"model {i} ({source.said})"
    names = _names(who, sources, least, drop, named)
    limit = as_bytes(SHARD if shard_size is None else shard_size, who)
    to = None if dtype is None else _floating(dtype, who)
    base, changes = sources[0], {}  # type: FileModel, dict[str, Change]
    folder_wanted = shard_size is not None or (out.suffix != ".safetensors" and not base.alone)
    _check_out(who, out, folder_wanted, sources, replace)
    kinds = {n: to if to is not None and base.dtypes[n].is_floating_point else base.dtypes[n] for n in names}
    told = told or Told(who)
    if told.inputs is not None:
        models, paths = told.inputs, [located(path, who) for path in told.inputs]
    called, recipe = labels(models, paths), None
    if told.recipe is not None:
        recipe = as_yaml(told.recipe(called) | ({} if to is None else {"dtype": _word(to)}))
    metadata = base.metadata | ({} if recipe is None else {KEY: recipe})

    def fill(file: Any, group: list[str]) -> None:
        ordered = in_order(group, kinds)
        file.write(header(ordered, base.shapes, kinds, metadata))
        with Behind(file) as behind:
            for name in ordered:
                for block in _blocks_of(who, name, sources, rule, changes, kinds[name]):
                    behind.write(block)

    def report(files: list[Path]) -> MergeReport:
        dtypes = _dtypes(sources, names, kinds, always=to is not None)
        return MergeReport(who, len(sources), [changes[n] for n in names], files, dtypes)

    if not folder_wanted:
        with appearing_file(out, who) as file:
            fill(file, names)
        return report([out])
    sizes = {n: math.prod(base.shapes[n]) * kinds[n].itemsize for n in names}
    plan = shards(names, sizes, limit)
    if shard_size is None and len(plan) == 1:
        plan = {"model.safetensors": names}
    about = base.index.get("metadata")
    about = (about if isinstance(about, dict) else {}) | {"total_size": sum(sizes.values())}
    where = {n: shard for shard, group in plan.items() for n in group}
    written = [*plan, *[INDEX] * (list(plan) != ["model.safetensors"]), *(path.name for path in base.beside)]
    with appearing_folder(out, who) as folder:
        for shard, group in plan.items():
            with open(folder / shard, "wb") as file:
                fill(file, group)
        if INDEX in written:
            index = json.dumps({"metadata": about, "weight_map": where}, indent=2)
            (folder / INDEX).write_text(index + "\n", encoding="utf-8")
        for path in base.beside:
            if path.name == "config.json" and to is not None:
                (folder / path.name).write_text(_config(path, _word(to), who), encoding="utf-8")
            else:
                shutil.copyfile(path, folder / path.name)
        if "config.json" in written:
            text = card(told, recipe, called, paths, report([]).summary())
            (folder / CARD).write_text(text, encoding="utf-8")
            written.append(CARD)
    return report([out / name for name in written])


def _blocks_of(
    who: str, name: str, sources: Sequence["_Model"], rule: Rule, changes: dict[str, Change], kind: torch.dtype
) -> Iterator[Tensor]:
    """The new tensor of one name, flat, as `kind`; what became of it goes into `changes`."""
    shape = sources[0].shapes[name]
    if not _number(kind):
        yield from _copied(name, sources, changes)
        return
    work = _work([*(s.dtypes[name] for s in sources), kind])
    parts, facts = [Part(s, name, work, who) for s in sources], {}  # type: list[Part], Facts
    low, moved, size, room = 0, 0.0, 0.0, None
    for block in rule(parts, facts):
        n = block.numel()
        new, old = block.to(kind), parts[0].flat(low, low + n)
        if kind == work:
            far = _square(new - old)
        else:
            room = torch.empty(n, dtype=work, device=new.device) if room is None or room.numel() < n else room
            far = _square(room[:n].copy_(new).sub_(old))
        # finite only if both are: who brought what is not is looked for only then
        if not math.isfinite(far):
            for part, i in itertools.product(parts, range(0, parts[0].numel, n)):
                part.check(i, min(i + n, part.numel))
            if not _finite(new.to(work)):
                raise BadInput(
                    f"{who} would write NaN or infinity into {name}, which is {str(kind).removeprefix('torch.')}"
                )
        moved += far
        size += _square(old)
        low += n
        yield new
    assert low == parts[0].numel, "a rule yields every entry once"
    change = math.sqrt(moved / size) if size else math.inf if moved else 0.0
    changes[name] = Change(name, shape, "merged", change, facts)


def _copied(name: str, sources: Sequence["_Model"], changes: dict[str, Change]) -> Iterator[Tensor]:
    """Counters, indices and masks: the base's own, for their mean means nothing."""
    n, same = math.prod(sources[0].shapes[name]), True
    step = max(1, BUDGET // (sources[0].dtypes[name].itemsize * (len(sources) + 1)))
    for low in range(0, n, step):
        mine, *others = (s.read(name, low, min(low + step, n)).cpu() for s in sources)
        same = same and all(torch.equal(mine, other) for other in others)
        yield mine
    changes[name] = Change(name, sources[0].shapes[name], "copied" if same else "copied, models differ")


def _finite(x: Num[Tensor, "n"]) -> bool:
    """No NaN or infinity in it; by the extremes, several times as fast as asking each entry."""
    x = torch.view_as_real(x) if x.is_complex() else x
    return not x.numel() or all(math.isfinite(end) for end in torch.aminmax(x))


def _square(x: Num[Tensor, "n"]) -> float:
    """Sum of squares, in float64 unless float32 holds the squares."""
    if x.dtype == torch.float32:
        s = float(torch.dot(x, x))
        if 1e-30 * x.numel() < s < math.inf:
            return s
    wide = torch.complex128 if x.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(x, dtype=wide)) ** 2


def _number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _work(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    work = torch.float32
    for dtype in dtypes:
        if dtype.itemsize > 1:  # 8-bit floats have no place in torch's promotion
            work = torch.promote_types(work, dtype)
    return work


def _floating(dtype: str | torch.dtype, who: str) -> torch.dtype:
    """A floating-point dtype by its name."""
    known = {_word(x): x for x in LABELS if x.is_floating_point}
    name = _word(dtype) if isinstance(dtype, torch.dtype) else str(dtype)
    if name not in known:
        raise BadInput(f"{who} cannot write numbers as {name!r}; it can as {', '.join(known)}")
    return known[name]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(
    sources: Sequence["_Model"], names: Iterable[str], kinds: Mapping[str, torch.dtype], always: bool = False
) -> str:
    """One line on what was read, computed in and written; empty where all is of one dtype and none was asked for."""
    numbers = [n for n in names if _number(kinds[n])]

    def listed(dtypes: Iterable[torch.dtype]) -> str:
        return " and ".join(sorted({_word(x) for x in dtypes}))

    said = [listed(s.dtypes[n] for n in numbers) for s in sources]
    if not numbers or not (always or any(s.dtypes[n] != sources[0].dtypes[n] for s in sources for n in numbers)):
        return ""
    read = ", ".join(f"model {i} {x}" for i, x in enumerate(said, 1)) if len(set(said)) > 1 else said[0]
    work = listed(_work([*(s.dtypes[n] for s in sources), kinds[n]]) for n in numbers)
    return f"dtypes: read {read}; computed in {work}; written as {listed(kinds[n] for n in numbers)}"


def _config(path: Path, dtype: str, who: str) -> str:
    """A config with another dtype, wherever it names one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{who} cannot read {path}: {error}") from None
    found = False

    def renew(at: Any) -> None:
        nonlocal found
        for key in ("dtype", "torch_dtype"):
            if isinstance(at.get(key), str):
                at[key], found = dtype, True
        for value in at.values():
            if isinstance(value, dict):
                renew(value)

    renew(config)
    return json.dumps(config if found else config | {"torch_dtype": dtype}, indent=2) + "\n"


# -- models -----------------------------------------------------------------------------------------------------------


class _Model(Protocol):
    """What the stream asks of a model, in memory or in files."""

    said: str
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]

    def read(self, name: str, low: int, high: int) -> Tensor: ...
    def identity(self, name: str) -> Any: ...
    def device(self, name: str) -> torch.device: ...


class _State:
    """A state dict."""

    def __init__(self, model: State, said: str, who: str) -> None:
        if isinstance(model, nn.Module):
            model = model.state_dict()
        if not isinstance(model, Mapping):
            raise BadInput(f"{who} needs state dicts or modules, got {type(model).__name__} as {said}")
        for name, x in model.items():
            if not isinstance(x, Tensor):
                raise BadInput(f"{who} needs tensors, got {type(x).__name__} as {name} of {said}")
            if x.is_floating_point():
                require_float(x, who, f"{name} in {said}")
            elif x.is_meta:
                raise BadInput(f"{who} got {name} of {said} on the meta device, which holds no numbers")
            if x.layout != torch.strided or x.is_quantized:
                raise BadInput(f"{who} needs dense tensors, got a {x.layout} or quantized one as {name} of {said}")
        self.said, self.state = said, {name: x.detach() for name, x in model.items()}
        self.shapes = {name: tuple(x.shape) for name, x in self.state.items()}
        self.dtypes = {name: x.dtype for name, x in self.state.items()}
        self._flat = "", torch.empty(0)

    def read(self, name: str, low: int, high: int) -> Tensor:
        if self._flat[0] != name:  # not contiguous: flattened once, not for every stretch
            self._flat = name, self.state[name].reshape(-1)
        return self._flat[1][low:high]

    def identity(self, name: str) -> Any:
        """Where the numbers lie: the same for tied tensors; None for what has no numbers."""
        x = self.state[name]
        return (x.data_ptr(), x.dtype, x.shape, x.stride()) if x.numel() else None

    def device(self, name: str) -> torch.device:
        return self.state[name].device


# -- checks -----------------------------------------------------------------------------------------------------------


def is_in(part: str, name: str) -> bool:
    """Whether `part` is the name or a whole part of it between dots: "head" is in "net.head.weight", not in "ahead"."""
    return f".{part}." in f".{name}."


def _names(who: str, sources: Sequence[Any], least: int, drop: str | Iterable[str], named: Iterable[str]) -> list[str]:
    """The names to merge, in the base's order; the models checked to have the same ones in the same shapes."""
    if len(sources) < least:
        raise BadInput(f"{who} needs at least {least} models, got {len(sources)}")
    drop = [drop] if isinstance(drop, str) else list(drop)
    known = {name for s in sources for name in s.shapes}
    for part in (*drop, *named):
        if not any(is_in(part, name) for name in known):
            parts = {".".join(n.split(".")[:k]) for n in known for k in range(1, n.count(".") + 2)}
            raise BadInput(f"{who} found nothing called {part!r}{nearest(part, parts)}")
    for s in sources:
        s.shapes = {name: shape for name, shape in s.shapes.items() if not any(is_in(part, name) for part in drop)}
    base = sources[0]
    if not base.shapes:
        raise BadInput(f"{who} found no tensor in {base.said}")
    for other in sources[1:]:
        lacks, extra = ([n for n in a.shapes if n not in b.shapes] for a, b in ((base, other), (other, base)))
        if lacks or extra:
            words = [f"lacks {_listed(lacks)}"] * bool(lacks) + [f"has {_listed(extra)} besides"] * bool(extra)
            raise BadInput(f"{who} needs models with the same names: {other.said} {' and '.join(words)}")
        odd = [
            f"{n} {base.shapes[n]} against {other.shapes[n]}" for n in base.shapes if base.shapes[n] != other.shapes[n]
        ]
        if odd:
            raise BadInput(f"{who} needs models with the same shapes: {other.said} differs in {_listed(odd)}")
        odd = [n for n in base.shapes if _number(base.dtypes[n]) != _number(other.dtypes[n])]
        if odd:
            raise BadInput(f"{who} cannot merge integers with other numbers: {other.said} differs in {_listed(odd)}")
    return list(base.shapes)


def _check_out(who: str, out: Path, folder: bool, sources: Sequence[FileModel], replace: bool = False) -> None:
    if folder == (out.suffix == ".safetensors"):
        wanted = (
            "a folder's name when it writes shards" if folder else "a name that ends in .safetensors, or a shard size"
        )
        raise BadInput(f"{who} cannot write {out}: it needs {wanted}")
    if not out.absolute().parent.is_dir():
        raise BadInput(f"{who} cannot write {out}: the folder {out.parent} does not exist")
    for source in sources:
        if out.resolve() in source.paths:
            raise BadInput(f"{who} would write over {out}, which it reads as {source.said}; give another name")
    if folder and (out.is_symlink() or out.is_file() or (out.is_dir() and any(os.scandir(out)))):
        plain = not (out.is_symlink() or out.is_file())
        may = " (replace=True, or --replace, puts it in an old model's place)" if plain and not replace else ""
        if not replace or not plain:
            raise BadInput(f"{who} writes shards into a new folder only, and {out} exists" + may)
        for source in sources:
            if any(out.resolve() in path.parents for path in (*source.paths, *source.given)):
                raise BadInput(f"{who} would replace {out}, in which {source.said} lies; give another name")
        if not any(out.glob("*.safetensors")):
            raise BadInput(f"{who} replaces only a folder with a model in it, and {out} has no .safetensors file")
    if not folder and out.is_dir():
        raise BadInput(f"{who} cannot write {out}, which is a folder")


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _spread(rows: list[Change], value: Callable[[Change], float]) -> str:
    rows = sorted(rows, key=value)
    low, mid, high = rows[0], rows[len(rows) // 2], rows[-1]
    return f"from {value(low):.4g} ({low.name}) to {value(high):.4g} ({high.name}), median {value(mid):.4g}"


def _plain(x: float) -> float | str:
    return x if math.isfinite(x) else str(x)

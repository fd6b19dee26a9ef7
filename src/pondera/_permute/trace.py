"""Which axes of a model move together, found by running it once: every tensor in flight carries a label for each axis.

`labels` says what the labels are, `rules` what each operation does to them. An operation without a rule fixes all it meets.
What was found is then tried.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from pondera._batch import Batch, in_eval_mode, tensor_arguments
from pondera._permute.labels import InFlight, Label, Labels, ends, fix, leaves, rows_of, tensors
from pondera._permute.rules import rule_of
from pondera._permute.spec import Axis, PermutationSpec, apply_permutation, random_permutations
from pondera.errors import BadInput

WHO = "trace_permutations"


def trace_permutations(model: nn.Module, example: Batch, *, matchable: bool = True) -> PermutationSpec:
    """Find the permutations of hidden units that leave a model's function unchanged, and prove them on the example.

    The model runs once on `example`, in eval mode. Linear layers, convolutions (grouped ones by whole groups and alike
    inside all groups), norm layers, residual sums, flattening, concatenation, attention (heads as blocks; inside the
    heads one order for all of them) and element-wise operations are followed, whatever the modules are called. Left out
    from the start, with a note: what would have to stand on two axes of one tensor (a recurrent weight, `x + linear(x)`),
    for no match can be found of it; `matchable=False` keeps it.

    Then the proof, on a copy of the state in float64 whose entries are all moved a little, so that equal ones cannot hide
    an error. All permutations are drawn at random, and the outputs must stay. One that changes them is dropped; so is one
    that the outputs do not show when a single tensor is reordered, for there that they stay proves nothing. This runs the
    model at least once a permutation and needs memory for three copies in float64.

    The inner order of heads is one for all heads because a spec's axes are products; permutations of one head alone,
    which exist too, are not in it.

    Args:
        model: any model with hidden units; nothing of it changes.
        example: what its forward takes: a tensor, a tuple or list (positional), or a mapping (by keyword). What forward
            returns (in tuples, lists and mappings) is what must not change.
        matchable: leave out what `weight_matching` could not solve.
    Returns: the spec of the model's `state_dict`. Its `notes` say what stays fixed and why.
    Raises: BadInput: if the batch is empty, holds NaN or does not fit, the model is on the meta device or holds NaN, or its
        outputs are no tensors or differ from run to run.

    >>> spec = trace_permutations(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3))
    >>> spec.axes["0.weight"], spec.axes["0.bias"], spec.axes["2.weight"]
    (('0', None), ('0',), (None, '0'))
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"{WHO} needs an nn.Module, got {type(model).__name__}")
    args, kwargs = tensor_arguments(example, WHO)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, x in state.items():
        if x.is_meta or isinstance(x, UninitializedTensorMixin):
            raise BadInput(f"{WHO} needs a model with numbers in it; {name} is lazy or on the meta device")
        if x.is_floating_point() and x.isnan().any():
            raise BadInput(f"{WHO} found NaN in {name}")
    aliases = _aliases(model, state)
    with torch.inference_mode(), in_eval_mode(model), _same_random_state(model):
        copied = {name: x.clone() for name, x in state.items()}
        tracer = Tracer({name: copied[name] for name in aliases})
        inputs = tuple(x.clone() for x in args), {k: x.clone() for k, x in kwargs.items()}
        with tracer:
            outputs = _run(model, copied, inputs)
        for x in tensors(outputs):
            tracer.labels.fix(x)
        axes, notes = tracer.found(aliases, matchable)
        spec = PermutationSpec(axes, _carried(model, aliases), tuple(notes))
        return _proved(spec, model, state, aliases, (args, kwargs))


def _aliases(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names a tensor has in the state dict, by its first name; buffers that are not in it are left out."""
    first = {id(x): name for name, x in state.items()}
    names: dict[str, list[str]] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        if isinstance(x, Tensor) and id(x) in first:
            names.setdefault(first[id(x)], []).append(name)
    return names


def _carried(model: nn.Module, aliases: Mapping[str, list[str]]) -> frozenset[str]:
    parameters = dict(model.named_parameters())
    buffers = {name for first, names in aliases.items() if first not in parameters for name in names}
    return frozenset(buffers | {name for names in aliases.values() for name in names[1:]})


@contextmanager
def _same_random_state(model: nn.Module) -> Iterator[None]:
    with torch.random.fork_rng(sorted({p.device.index for p in model.parameters() if p.is_cuda})):
        yield


def _run(model: nn.Module, state: dict[str, Tensor], inputs: Any) -> Any:
    args, kwargs = inputs
    own = [(table, dict(table)) for m in model.modules() for table in (m._parameters, m._buffers)]
    try:
        return functional_call(model, state, args, kwargs)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise BadInput(f"{WHO} could not run the model on its example: {' '.join(str(error).split())}") from error
    finally:
        for table, was in own:  # functional_call does not give back those of a module that stands in two places
            table.update(was)


# -- the proof --------------------------------------------------------------------------------------------------------


def _proved(
    spec: PermutationSpec, model: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, list[str]], inputs: Any
) -> PermutationSpec:
    """The spec without the permutations that change the outputs."""
    g = torch.Generator().manual_seed(0)
    for double in (True, False):  # in float64 where the model can
        moved = {name: _moved(x, g, double) for name, x in state.items()}
        given = tuple(_cast(x, double) for x in inputs[0]), {k: _cast(x, double) for k, x in inputs[1].items()}
        try:
            before = [x.clone() for x in tensors(_run(model, dict(moved), given))]
            break
        except BadInput:
            if not double:
                raise
    if not before:
        raise BadInput(f"{WHO} found no tensor in what the model returns, so nothing to hold unchanged")

    part = {name: moved[name] for name in aliases}
    full = {alias: x for name, x in part.items() for alias in aliases[name]}
    known = spec.sizes(full)

    def same(new: Mapping[str, Tensor]) -> bool:
        after = tensors(_run(model, {**moved, **{name: new[aliases[name][0]] for name in part}}, given))
        return all(_close(x, y) for x, y in zip(before, after, strict=True))

    def unchanged(some: Iterable[str]) -> bool:
        sizes = {p: n for p, n in known.items() if p in set(some)}
        return same(apply_permutation(spec, random_permutations(sizes, g), full))

    def seen(p: str) -> bool:
        """Whether the outputs show it when one tensor alone is reordered; else that they stay proves nothing."""
        new = apply_permutation(spec, {p: torch.arange(known[p]).roll(1)}, full)
        alone = dict.fromkeys(
            place.tensor for place in spec.places[p] if place.tensor in {a[0] for a in aliases.values()}
        )
        return any(not same({**full, name: new[name]}) for name in alone)

    if not unchanged(()):
        raise BadInput(f"{WHO} cannot prove anything: the model returns something else every time it runs")
    notes = {f"{p!r} stays fixed: the outputs do not show what it does": p for p in known if not seen(p)}
    if not unchanged(p for p in known if p not in notes.values()):
        notes |= {f"{p!r} stays fixed: reordering it changes the outputs": p for p in known if not unchanged([p])}
    dropped = set(notes.values())
    if not unchanged(p for p in known if p not in dropped):
        raise BadInput(f"{WHO} found permutations that leave the outputs alone one by one but not together")
    return PermutationSpec(_without(spec.axes, dropped), spec.carried, (*spec.notes, *notes)) if dropped else spec


def _moved(x: Tensor, g: Generator, double: bool) -> Tensor:
    """Every entry moved by a part of the tensor's size, so that equal ones part; what is positive stays so."""
    if not x.is_floating_point() or not x.numel():
        return x.clone()
    old = x.double()
    noise = (2 * torch.rand(x.shape, generator=g, dtype=torch.float64) - 1).to(x.device)
    size = float(old.square().mean().sqrt()) or 0.3
    new = old * (1 + 0.5 * noise) if bool((old >= 0).all()) and bool(old.any()) else old + 0.3 * size * noise
    return new if double else new.to(x.dtype)


def _cast(x: Tensor, double: bool) -> Tensor:
    return x.double() if double and x.is_floating_point() else x.clone()


def _close(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    if x.numel() == 0:
        return True
    allowed = 1e-5 if x.dtype == torch.float64 else torch.finfo(x.dtype).eps ** 0.5
    x, y = x.double(), y.double()
    apart = torch.where(x == y, 0.0, (x - y).abs())  # infinities may be meant, as in masked scores
    return bool(apart.max() <= allowed * x[x.isfinite()].abs().sum() / x.numel() ** 0.5)


def _without(axes: Mapping[str, tuple[Axis, ...]], dropped: set[str]) -> dict[str, tuple[Axis, ...]]:
    return {name: tuple(_fixed(e, dropped) for e in entries) for name, entries in axes.items()}


def _fixed(entry: Axis, dropped: set[str]) -> Axis:
    if entry is None or isinstance(entry, str):
        return None if entry in dropped else entry
    return _simple([[(None if p in dropped else p, n) for p, n in row] for row in entry])


def _simple(rows: Sequence[Sequence[tuple[str | None, int]]]) -> Axis:
    """An axis' rows in the shortest form."""
    short: list[tuple[tuple[str | None, int], ...]] = []
    for row in rows:
        new: list[tuple[str | None, int]] = []
        for name, n in row:
            if name is None and new and new[-1][0] is None:
                n *= new.pop()[1]
            new.append((name, n))
        if short and len(new) == len(short[-1]) == 1 and new[0][0] is None and short[-1][0][0] is None:
            new = [(None, new[0][1] + short.pop()[0][1])]
        short.append(tuple(new))
    if len(short) == 1 and len(short[0]) == 1:
        return short[0][0][0]
    return tuple(short)


# -- the run ----------------------------------------------------------------------------------------------------------


class Tracer(TorchDispatchMode):
    """Runs operations and labels what they return."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.state = state
        self.used: set[int] = set()
        self.lost: dict[str, None] = {}
        self.labels = InFlight(state.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given, rule = list(tensors((args, kwargs))), rule_of(func)
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self.used.update(id(x) for x in given)
        out = func(*args, **kwargs)
        try:
            labels = rule(self.labels, out, *args, **kwargs) if rule else self.unknown(func, out, given)
        except (TypeError, ValueError, LookupError):  # arguments in a form its rule does not know
            labels = self.unknown(func, out, given)
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        for x, found in zip(outs, labels if isinstance(out, (tuple, list)) else [labels]):
            if isinstance(x, Tensor):
                self.labels.put(x, found)
        return out

    def unknown(self, func: Any, out: Any, given: Sequence[Tensor]) -> Any:
        """An operation without a rule: whatever it met has its order from now on."""
        if any(not leaf.fixed for x in given for label in self.labels.of(x) for leaf in ends(label)):
            name = func.overloadpacket.__name__
            self.lost[f"the operation {name} is not followed: the units it meets stay fixed"] = None
        for x in given:
            self.labels.fix(x)
        if isinstance(out, (tuple, list)):
            return [leaves(x.shape) if isinstance(x, Tensor) else [] for x in out]
        return leaves(out.shape) if isinstance(out, Tensor) else []

    def found(
        self, aliases: Mapping[str, list[str]], matchable: bool = True
    ) -> tuple[dict[str, tuple[Axis, ...]], list[str]]:
        """Entries for every name of the state dict, and notes on what was left fixed."""
        notes = list(self.lost)
        rows: dict[str, list[list[Labels]]] = {}
        for name, x in self.state.items():
            labels = self.labels.of(x) if id(x) in self.used else leaves(x.shape)
            rows[name] = [rows_of(label) for label in labels]
        for name, entries in rows.items():  # a leaf on two axes, or twice in a row, makes no linear assignment
            seen: dict[Label, int] = {}
            for axis, entry in enumerate(entries):
                for row in entry:
                    for leaf in (leaf for leaf in row if leaf.size > 1):
                        twice = matchable and seen.setdefault(leaf, axis) != axis
                        if not leaf.fixed and (twice or row.count(leaf) > 1):
                            fix(leaf)
                            notes.append(f"{leaf.size} units stand on two axes or factors of {name} and stay fixed")
        called: dict[Label, str] = {}
        for first in (True, False):  # named after the tensor whose first axis it is, where there is one
            for name, entries in rows.items():
                for entry in entries[:1] if first else entries:
                    for leaf in (leaf for row in entry for leaf in row):
                        if not leaf.fixed and leaf.size > 1 and leaf not in called:
                            called[leaf] = _unused(re.sub(r"[._]*(weight|bias)$", "", name) or name, called.values())
        axes = {
            alias: tuple(
                _simple([[(called.get(leaf), leaf.size) for leaf in row] for row in entry]) for entry in rows[name]
            )
            for name, names in aliases.items()
            for alias in names
        }
        return axes, notes


def _unused(name: str, taken: Iterable[str]) -> str:
    known = set(taken)
    return next(n for n in (name, *(f"{name}#{i}" for i in range(2, len(known) + 3))) if n not in known)

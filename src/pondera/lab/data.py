"""The data of a task in any of the forms people have: tensors, data sets, loaders, streams; nothing need fit in memory.

Tensors stay a plain tuple, examples first. Everything else becomes a `Part`, from which batches are made one by one: a data
set with a length is shuffled by seed, a stream gives its examples in its own order. A batch is a tuple or a mapping of
tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from pondera.errors import BadInput, not_finite

Batch = Any  # a tuple of tensors, or a mapping of names to them
SAMPLE = 32  # examples of a data set that are looked at to know it by


class Part:
    """One part of a task's data that is not held as tensors."""

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Endless batches to train on; where the order can be chosen it depends on `seed` alone."""
        raise NotImplementedError

    def once(self, size: int) -> Iterator[Batch]:
        """Every example once, in order."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        return self.once(64)


def collated(items: list[Any]) -> Any:
    """Examples as one batch; of mappings the columns of numbers, each stacked (text columns are left out).

    Raises: BadInput: where a column's entries differ in length.

    >>> collated([{"input_ids": [1, 2], "labels": 0, "text": "a"}, {"input_ids": [3, 4], "labels": 1, "text": "b"}])
    {'input_ids': tensor([[1, 2],
            [3, 4]]), 'labels': tensor([0, 1])}
    """
    if not isinstance(items[0], Mapping):
        return default_collate(items)
    found = {}
    for name, value in items[0].items():
        if isinstance(value, (str, bytes)) or value is None:
            continue
        column = [torch.as_tensor(i[name]) for i in items]
        if len({c.shape for c in column}) > 1:
            shapes = ", ".join(dict.fromkeys(str(tuple(c.shape)) for c in column))
            raise BadInput(
                f"the column {name!r} holds entries of different shapes ({shapes[:80]}), which cannot be stacked; pad them, or "
                "give a DataLoader whose collate_fn does"
            )
        found[name] = torch.stack(column)
    return found


@dataclass(frozen=True)
class Items(Part):
    """A data set with a length (map style), or the places of it that `indices` names."""

    dataset: Any
    collate: Callable[[list[Any]], Any] = collated
    indices: Tensor | None = None

    def __len__(self) -> int:
        return len(self.dataset) if self.indices is None else len(self.indices)

    def at(self, places: Sequence[int] | Tensor) -> Batch:
        """The batch of the examples at these places."""
        own = places if self.indices is None else self.indices[torch.as_tensor(places)]
        return as_batch(self.collate([self.dataset[int(i)] for i in own]))

    def subset(self, places: Tensor) -> "Items":
        return Items(self.dataset, self.collate, places if self.indices is None else self.indices[places])

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        for pick in orders(len(self), size, seed):
            yield self.at(pick)

    def once(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            yield self.at(range(start, min(len(self), start + size)))


@dataclass(frozen=True)
class Stream(Part):
    """Batches that can only be gone through: an iterable data set, or a loader over one. Begun anew when it ends."""

    source: Iterable[Any]
    batched: bool

    def once(self, size: int) -> Iterator[Batch]:
        loader = self.source if self.batched else DataLoader(self.source, batch_size=size)  # type: ignore[arg-type]
        for batch in loader:
            yield as_batch(batch)

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        while True:
            seen = 0
            for batch in self.once(size):
                seen += 1
                yield batch
            if not seen:
                raise BadInput("the stream of training data gave no batch; it must be one that can be begun again")


def orders(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled places of n examples, `size` at a time; the order depends on `seed` alone."""
    generator, size = torch.Generator().manual_seed(seed), min(size, n)
    while True:
        order = torch.randperm(n, generator=generator)
        for at in range(0, n - size + 1, size):
            yield order[at : at + size]


# -- the same questions asked of tensors and of parts ------------------------------------------------------------------


def batches(fit: "tuple[Tensor, ...] | Part", size: int, seed: int) -> Iterator[Batch]:
    """Endless shuffled batches; the order depends on `seed` alone, so recipes that share a seed see the same data."""
    if isinstance(fit, Part):
        yield from fit.batches(size, seed)
    else:
        for pick in orders(len(fit[0]), size, seed):
            yield tuple(t[pick] for t in fit)


def once(part: "tuple[Tensor, ...] | Part", size: int) -> Iterator[Batch]:
    """Every example once, in order."""
    if isinstance(part, Part):
        yield from part.once(size)
    else:
        for at in range(0, len(part[0]), size):
            yield tuple(t[at : at + size] for t in part)


def some(part: "tuple[Tensor, ...] | Part", n: int) -> Batch:
    """The first `n` examples (a stream's first batch of that size), or all where there are fewer."""
    if isinstance(part, Items):
        return part.at(range(min(n, len(part))))
    if isinstance(part, Part):
        return next(part.once(n))
    return tuple(t[:n] for t in part)


def head(part: "tuple[Tensor, ...] | Part", n: int) -> "tuple[Tensor, ...] | Part":
    """The first `n` examples as a part of the same kind; a stream as it is."""
    if isinstance(part, Items):
        return part.subset(torch.arange(min(n, len(part))))
    return part if isinstance(part, Part) else tuple(t[:n] for t in part)


def moved(batch: Batch, device: str) -> Batch:
    """A batch on a device; as it is on the CPU."""
    if device == "cpu":
        return batch
    if isinstance(batch, Mapping):
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return tuple(t.to(device, non_blocking=True) if isinstance(t, Tensor) else t for t in batch)


@dataclass(frozen=True)
class Placed(Part):
    """A part whose batches come on a device."""

    part: Part
    device: str

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        return (moved(b, self.device) for b in self.part.batches(size, seed))

    def once(self, size: int) -> Iterator[Batch]:
        return (moved(b, self.device) for b in self.part.once(size))


def placed(part: "tuple[Tensor, ...] | Part", device: str) -> "tuple[Tensor, ...] | Part":
    """A part to be scored on: tensors whole, anything else batch by batch as it is gone through."""
    if device == "cpu":
        return part
    return Placed(part, device) if isinstance(part, Part) else moved(part, device)


def joined(one: "tuple[Tensor, ...] | Part", two: "tuple[Tensor, ...] | Part") -> "tuple[Tensor, ...] | Part":
    """Two parts as one; of a stream the first alone."""
    if isinstance(one, Items) and isinstance(two, Items):
        whole = [range(len(p)) if p.indices is None else p.indices.tolist() for p in (one, two)]
        return Items(ConcatDataset([Subset(p.dataset, w) for p, w in zip((one, two), whole)]), one.collate)
    if isinstance(one, Part) or isinstance(two, Part):
        return one
    return tuple(torch.cat([a, b]) for a, b in zip(one, two))


def count(batch: Batch) -> int:
    """Examples in a batch.

    >>> count({"input_ids": torch.ones(3, 5), "labels": torch.ones(3)})
    3
    """
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next(len(v) for v in values if isinstance(v, Tensor) and v.ndim)


def as_batch(given: Any) -> Batch:
    """What a collate function gave, as a tuple or a plain mapping.

    Raises: BadInput: for something else.
    """
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, (tuple, list)):
        return tuple(given)
    if isinstance(given, Tensor):
        return (given,)
    raise BadInput(f"a batch must be a tuple or a mapping of tensors, got {type(given).__name__}")


# -- from what a task's data() gave ------------------------------------------------------------------------------------


def read(part: Any, what: str) -> "tuple[Tensor, ...] | Part":
    """One part of a task's data: a tuple of tensors stays one, a data set or loader becomes a `Part`.

    Raises: BadInput: for anything else, tensors that do not fit each other, or numbers that are not finite.
    """
    if isinstance(part, TensorDataset):
        part = part.tensors
    if isinstance(part, DataLoader):
        if isinstance(part.dataset, IterableDataset):
            return Stream(part, True)
        if not len(part.dataset):  # type: ignore[arg-type]
            raise BadInput(f"{what} must hold at least one example, got an empty data set")
        return Items(part.dataset, part.collate_fn)  # its order and batch size are the lab's to choose
    if isinstance(part, IterableDataset):
        return Stream(part, False)
    if isinstance(part, (tuple, list)) and part and not all(isinstance(t, (Tensor,)) or _array(t) for t in part):
        raise BadInput(
            f"{what} must be a tuple of tensors, a data set or a loader, got a {type(part).__name__} of "
            f"{', '.join(dict.fromkeys(type(t).__name__ for t in part))}"
        )
    if isinstance(part, (tuple, list)) and part:
        return _tensors(part, what)
    if (
        hasattr(part, "__getitem__")
        and hasattr(part, "__len__")
        and not isinstance(part, (str, bytes, Mapping, Tensor))
    ):
        if not len(part):
            raise BadInput(f"{what} must hold at least one example, got an empty data set")
        return Items(part)
    raise BadInput(f"{what} must be a tuple of tensors, a data set or a loader, got {type(part).__name__}")


def _array(value: Any) -> bool:
    return hasattr(value, "__array__")


def _tensors(part: Sequence[Any], what: str) -> tuple[Tensor, ...]:
    tensors = tuple(torch.as_tensor(t) for t in part)
    n = len(tensors[0]) if tensors[0].ndim else 0
    if n == 0 or any(t.ndim == 0 or len(t) != n for t in tensors):
        raise BadInput(f"{what} must hold the same number of examples, at least one, in each tensor; got shapes "
                       f"{[tuple(t.shape) for t in tensors]}")  # fmt: skip
    for t in tensors:
        if bad := not_finite(t):
            raise BadInput(f"{what} holds {bad} NaN or infinite numbers of {t.numel()}; clean or impute them first")
    return tensors


def known_by(part: "tuple[Tensor, ...] | Part") -> tuple[str, str]:
    """(how, what) a part is known by in the keys of runs: all tensors, a data set's own fingerprint, or a sample of it."""
    from pondera.lab.fingerprint import data_hash

    if not isinstance(part, Part):
        return "hash of the tensors", data_hash(part)
    if not isinstance(part, Items):
        return "a stream, known by the task's text alone", ""
    own = getattr(part.dataset, "_fingerprint", None)
    if isinstance(own, str):
        return "fingerprint of the data set", f"{own}-{len(part)}"
    n = len(part)
    places = sorted({round(k * (n - 1) / max(1, min(SAMPLE, n) - 1)) for k in range(min(SAMPLE, n))})
    found = part.at(places)
    values = list(found.values()) if isinstance(found, Mapping) else list(found)
    return (
        f"hash of {len(places)} of {n} examples",
        f"{data_hash(tuple(v for v in values if isinstance(v, Tensor)))}-{n}",
    )

"""What a compression did, layer by layer: plain data, said in words, written as JSON."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

Facts = Mapping[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])


def applied(at: str) -> Callable[[Method], Method]:
    """When a recipe applies a method: at the "start" of training, "late" in it (four fifths through; the rule), or at its
    "end", for what training on would undo."""

    def mark(method: Method) -> Method:
        method.at = at  # type: ignore[attr-defined]
        return method

    return mark


@dataclass(frozen=True)
class LayerChange:
    """What became of one weight.

    name: of the weight in the state dict. how: "factored", "pruned", "quantised", "kept". shape: as it was. numbers: how
    many are held now (those of both factors; those that are not zero). bits: of storage now, scales and positions
    included. was_bits: before. error: relative change of what the layer gives out (`of` says of what it is measured:
    "output" on the calibration data, or "weight"). facts: what the method says of it, such as its rank.
    """

    name: str
    how: str
    shape: tuple[int, ...]
    numbers: int
    bits: float
    was_bits: float
    error: float = 0.0
    of: str = "weight"
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class CompressReport:
    """What a method did to a model. facts: of the whole, such as a predicted change of the loss beside the measured one."""

    method: str
    layers: list[LayerChange]
    facts: Facts = field(default_factory=dict)

    @property
    def changed(self) -> list[LayerChange]:
        return [one for one in self.layers if one.how != "kept"]

    @property
    def ratio(self) -> float:
        """Bits of the listed weights now over before."""
        was = sum(one.was_bits for one in self.layers)
        return sum(one.bits for one in self.layers) / was if was else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and words."""
        rows = [{**vars(one), "shape": list(one.shape), "facts": dict(one.facts)} for one in self.layers]
        return {"method": self.method, "layers": rows, "facts": dict(self.facts)}

    def summary(self) -> str:
        """A few lines to read: what changed, by how much, and where it cost most."""
        done = self.changed
        if not done:
            return f"{self.method}: nothing changed"
        held = sum(one.numbers for one in done)
        of = sum(math.prod(one.shape) for one in done)
        worst = max(done, key=lambda one: one.error)
        lines = [
            f"{self.method}: {len(done)} of {len(self.layers)} weights changed, {held:,} of {of:,} numbers held "
            f"({held / of:.1%}), {sum(one.bits for one in done) / 8e6:.3g} MB of {sum(one.was_bits for one in done) / 8e6:.3g} MB",
            f"largest relative change of {worst.of}: {worst.error:.3g} ({worst.name})",
        ]
        said = [f"{k.replace('_', ' ')} {v:.4g}" for k, v in self.facts.items() if isinstance(v, float)]
        return "\n".join(lines + ([", ".join(said)] if said else []))

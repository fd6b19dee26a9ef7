"""What a merge says of itself: the recipe that makes it again, and the model card of its folder."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pondera._safetensors import FileModel
from pondera._versions import versions
from pondera.merge._hub import pinned

CARD, KEY = "README.md", "merge_recipe"  # the card's name in a folder; the recipe's in the metadata of a file
SAMPLES, SAMPLE = 64, 4096


@dataclass(frozen=True)
class Told:
    """title: the method and its paper. recipe: from the models' names, what `merge_recipe` reads; None where it has none.
    inputs: the models as given, where they are others than those that are read."""

    title: str
    recipe: Callable[[list[str]], dict[str, Any]] | None = None
    inputs: Sequence[str | Path] | None = None


def names(given: Sequence[str | Path], paths: Sequence[Path]) -> list[str]:
    """The models' names in a recipe: of the hub's with the commit, others as given."""
    pins = [pinned(path) for path in paths]
    return [str(one) if pin is None else f"{pin[0]}@{pin[1]}" for one, pin in zip(given, pins)]


def as_yaml(recipe: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=False)


def card(told: Told, recipe: str | None, called: Sequence[str], paths: Sequence[Path], summary: str) -> str:
    """The page of a merged model, with the head that the hub reads."""
    import yaml

    pins = [pinned(path) for path in paths]
    bases = list(dict.fromkeys(pin[0] for pin in pins if pin is not None))
    head: dict[str, Any] = {"base_model": bases, "base_model_relation": "merge"} if bases else {}
    head |= {"library_name": "transformers", "tags": ["merge", "pondera"]}
    rows = [
        f"| `{name}` | {f'revision `{pin[1]}`' if pin else f'fingerprint `{fingerprint(path)}`'} |"
        for name, path, pin in zip(called, paths, pins)
    ]
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "", "# A merge of models", "",
        f"Method: {told.title}.", "", "| model | which |", "| --- | --- |", *rows, "",
    ]  # fmt: skip
    if recipe is not None:
        lines += ["`pondera merge recipe.yml -o OUT` makes it again from this recipe:", ""]
        lines += ["```yaml", recipe.rstrip(), "```", ""]
    lines += ["```text", summary, "```", ""]
    if len([pin for pin in pins if pin is None]):
        lines += [
            f"A fingerprint is the SHA-256 of a model's headers and of {SAMPLES} stretches of {SAMPLE} bytes, evenly spaced "
            "over each of its files.", ""
        ]  # fmt: skip
    lines += ["Made with " + ", ".join(f"{k} {v}" for k, v in versions().items()) + ".", ""]
    return "\n".join(lines)


def fingerprint(path: Path) -> str:
    """What tells a model's files from others at the cost of a glance: headers, sizes and samples, hashed."""
    seen = hashlib.sha256()
    for file in sorted({e.path for e in FileModel(path, "merge").entries.values()}, key=lambda file: file.name):
        with open(file, "rb") as raw:
            size = file.stat().st_size
            header = raw.read(8)
            seen.update(size.to_bytes(8, "little") + header + raw.read(int.from_bytes(header, "little")))
            for i in range(SAMPLES):
                raw.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
                seen.update(raw.read(SAMPLE))
    return seen.hexdigest()[:16]

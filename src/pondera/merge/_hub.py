"""Where a model lies that was named by a path or as the Hugging Face hub names it; nothing is downloaded."""

import json
import re
from pathlib import Path

from pondera.errors import BadInput

HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>\w[\w./-]*))?")
SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")


def located(given: str | Path, who: str) -> Path:
    """The path of a model; one that is no path here, such as ``org/name`` or ``org/name@revision``, from the hub's cache.

    Raises: BadInput: for a model that is not in the cache, or not whole, naming the command that brings it.
    """
    path, asked = Path(given), HUB_ID.fullmatch(Path(given).as_posix())
    if path.exists() or asked is None or path.suffix in (".safetensors", ".json"):
        return path
    name, revision = asked["id"], asked["revision"]
    get = f"`hf download {name}{f' --revision {revision}' if revision else ''}`"
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise BadInput(
            f"{who} finds no file or folder {given}; for a model of the hub it needs huggingface_hub: "
            "pip install 'pondera[adapters]'"
        ) from None
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):
        raise BadInput(
            f"{who} finds no file or folder {given} here, and no such model in the hub's cache "
            f"({constants.HF_HUB_CACHE}); {get} brings one of the hub"
        ) from None
    lacking = [file for file in _weights(folder) if not any(folder.glob(file))]
    if lacking:
        raise BadInput(f"{who} finds {given} in the hub's cache, but without {lacking[0]}; {get} brings it whole")
    return folder


def _weights(folder: Path) -> list[str]:
    for index in folder.glob("*.safetensors.index.json"):
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return []  # what is wrong with it is said where it is read
    return ["*.safetensors"]


def pinned(path: Path) -> tuple[str, str] | None:
    """Id and commit of a model in the hub's cache; None for one that lies elsewhere."""
    found = SNAPSHOT.search(str(path.absolute()))
    return None if found is None else (found[1].replace("--", "/"), found[2])

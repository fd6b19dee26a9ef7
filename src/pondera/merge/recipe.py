"""A merge from a recipe file, in the form mergekit reads, where the methods agree."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pondera.errors import BadInput, nearest
from pondera.merge._stream import MergeReport
from pondera.merge.bang import bang_files, wise_ft_files
from pondera.merge.fuse import fuse_files
from pondera.merge.model_stock import model_stock_files

WHO = "merge_recipe"
# What each method takes beside the models: of a model, and of the merge.
METHODS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"weight"}, {"weight", "normalize", "drop"}),
    "model_stock": (set(), {"filter_wise"}),
    "wise_ft": (set(), {"alpha"}),
    "bang": (set(), {"alpha", "head", "scale"}),
}
KEYS = {"merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source"}
ELSEWHERE = {"slices", "modules", "tokenizer", "chat_template"}  # of mergekit's


def merge_recipe(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    shard_size: int | str | None = None,
    dtype: Any = None,
    replace: bool = False,
) -> MergeReport:
    """Merge as a recipe says: a YAML file in mergekit's form, or what it holds.

    .. code-block:: yaml

        merge_method: linear          # or model_stock, wise_ft, bang
        models:
          - model: org/one            # a path, or the id of a model in the hub's cache
            parameters: {weight: 0.7}
          - model: runs/two
            parameters: {weight: 0.3}
        dtype: bfloat16

    linear is `fuse_files`: `weight` of each model, or one for all under `parameters`, divided by their sum unless
    `normalize: false`; `drop`, names left out. model_stock is `model_stock_files`, with `base_model` and `filter_wise`.
    wise_ft and bang are `wise_ft_files` and `bang_files`, with `base_model`, one model, `alpha`, `head` and `scale`. The
    numbers are computed in float32 at least; `dtype` is that of the output, `out_dtype` goes before it. The tokenizer is
    the base's: `tokenizer_source: base`, or left out.

    Args:
        recipe: the file, or the mapping read from it. Paths in it are seen from the current folder.
        out, shard_size, replace: as in `fuse_files`.
        dtype: goes before the recipe's.
    Returns: the report of the method.
    Raises: BadInput: for a key, a method or a parameter that is not known here, which is never passed over; a value
        that the method cannot take; and as the method.

    >>> import torch
    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import load_file, save_file
    >>> folder = Path(mkdtemp())
    >>> for i in range(2):
    ...     save_file({"w": torch.full((2,), 4.0 * i)}, folder / f"{i}.safetensors")
    >>> models = [{"model": str(folder / f"{i}.safetensors"), "parameters": {"weight": 1 + 2 * i}} for i in range(2)]
    >>> report = merge_recipe({"merge_method": "linear", "models": models}, folder / "out.safetensors")
    >>> load_file(folder / "out.safetensors")["w"]
    tensor([3., 3.])
    """
    asked = dict(recipe) if isinstance(recipe, Mapping) else _read(Path(recipe))
    method = asked.get("merge_method")
    if method not in METHODS:
        raise BadInput(f"{WHO} has the methods {', '.join(METHODS)}, and the recipe asks for merge_method {method!r}")
    for key in asked:
        if key in ELSEWHERE:
            raise BadInput(f"{WHO} has no {key}, which mergekit has: it merges whole models with the base's tokenizer")
    _known(asked, KEYS, "the recipe")
    of_model, of_merge = METHODS[method]
    given = _mapping(asked.get("parameters"), "parameters")
    _known(given, of_merge, f"the parameters of {method}")
    names, weights = _models(asked.get("models"), of_model, method)
    base = _name(asked["base_model"], "base_model") if asked.get("base_model") is not None else None
    if asked.get("tokenizer_source") not in (None, "base", base or names[0]):
        raise BadInput(
            f"{WHO} copies the base's tokenizer (tokenizer_source: base), and the recipe asks for "
            f"{asked['tokenizer_source']!r}"
        )
    written: dict[str, Any] = {
        "shard_size": shard_size,
        "dtype": dtype or asked.get("out_dtype") or asked.get("dtype"),
        "replace": replace,
    }
    if method == "linear":
        return _linear(names, weights, base, given, out, written)
    if base is None:
        raise BadInput(f"{WHO} needs a base_model for {method}")
    tuned = [name for name in names if name != base]  # where the base is listed too, it is the base
    if method == "model_stock":
        return model_stock_files(base, tuned, out, filter_wise=_truth(given, "filter_wise", False), **written)
    if len(tuned) != 1:
        raise BadInput(f"{WHO} needs one model beside the base_model for {method}, got {len(tuned)}")
    alpha = _number(given.get("alpha", 0.5), "alpha")
    if method == "wise_ft":
        return wise_ft_files(base, tuned[0], out, alpha, **written)
    head = _words(given.get("head", []), "head")
    return bang_files(base, tuned[0], out, alpha, head=head, scale=_number(given.get("scale", 1.0), "scale"), **written)


def _linear(
    names: list[str], weights: list[Any], base: str | None, given: dict[str, Any], out: Any, written: dict[str, Any]
) -> MergeReport:
    if base is not None and base not in names:
        raise BadInput(f"{WHO} averages what is among the models, and base_model {base} is not")
    a = [_number(given.get("weight") if w is None else w, f"weight of {n}") for n, w in zip(names, weights)]
    total = sum(a)
    if _truth(given, "normalize", True):
        if not (math.isfinite(total) and total > 0):
            raise BadInput(f"{WHO} needs weights with a sum above 0 to divide by, got {a}")
        a = [x / total for x in a]
    elif abs(total - 1) > 1e-6:
        raise BadInput(f"{WHO} needs weights that add up to one where normalize is false, got {a} with sum {total:g}")
    order = sorted(range(len(names)), key=lambda i: names[i] != base)  # the base first, the others as they stand
    equal = len(set(a)) == 1
    drop = _words(given.get("drop", []), "drop")
    return fuse_files([names[i] for i in order], out, None if equal else [a[i] for i in order], drop=drop, **written)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML's own would take the last of two equal keys."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for i, key in enumerate(keys):
                if key in keys[:i]:
                    raise BadInput(f"{WHO} finds {key!r} twice in {path}, line {node.value[i][0].start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise BadInput(f"{WHO} cannot read {path} as a recipe: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{WHO} needs a recipe with merge_method and models in {path}, got {type(found).__name__}")
    return found


def _models(given: Any, of_model: set[str], method: str) -> tuple[list[str], list[Any]]:
    if not isinstance(given, list) or not given:
        raise BadInput(f"{WHO} needs a list of models in the recipe, got {given!r}")
    names, weights = [], []
    for one in given:
        one = _mapping({"model": one} if isinstance(one, str) else one, "a model")
        _known(one, {"model", "parameters"}, "a model of the recipe")
        names.append(_name(one.get("model"), "model"))
        own = _mapping(one.get("parameters"), f"parameters of {names[-1]}")
        _known(own, of_model, f"the parameters of a model in {method}")
        weights.append(own.get("weight"))
    return names, weights


def _known(given: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in given:
        if key not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise BadInput(f"{WHO} does not know {key!r} in {where}{nearest(str(key), known)} (known: {listed})")


def _mapping(given: Any, what: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadInput(f"{WHO} needs names and values as {what}, got {given!r}")
    return dict(given)


def _name(given: Any, what: str) -> str:
    if isinstance(given, Path):
        return str(given)
    if not isinstance(given, str) or not given:
        raise BadInput(f"{WHO} needs a path or the hub's id as {what}, got {given!r}")
    return given


def _number(given: Any, what: str) -> float:
    """YAML reads 1e-3 as a word."""
    try:
        if not isinstance(given, bool | list | dict):
            return float(given)
    except (TypeError, ValueError):
        pass
    raise BadInput(f"{WHO} needs one number as {what}, got {given!r}")


def _truth(given: dict[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise BadInput(f"{WHO} needs true or false as {key}, got {value!r}")
    return value


def _words(given: Any, what: str) -> list[str]:
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
        raise BadInput(f"{WHO} needs names as {what}, got {given!r}")
    return given

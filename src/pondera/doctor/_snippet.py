"""The code that does what a recipe did, to paste into one's own training script."""

import importlib
import inspect
import math
from typing import Any

import torch
from torch import nn

from pondera.errors import BadInput
from pondera.lab.loop import COMPRESSED_AT
from pondera.lab.recipe import _DOORS, _ENDING, CALIBRATION, DEFAULT_FACTOR, Choice, Recipe, material_of, parse_choice
from pondera.lab.train import START_BATCH, WARM_UP

EACH_LAYER = "    if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):"


def snippet(
    recipe: Recipe,
    rate: float,
    *,
    steps: int,
    optim: str = "AdamW",
    schedule: str = "cosine",
    adapt: dict[str, Any] | None = None,
) -> str:
    """Python that starts, holds and trains a model as `recipe` did, at learning rate `rate`.

    It uses names of the reader's own: ``model``, ``loss_fn(output, target)``, ``loader`` (of inputs and targets) and,
    for starts that look at data, ``batch``. optim, schedule: the task's, where the recipe chooses none. adapt: the task's,
    for an adapter.
    Raises: BadInput: for a method that cannot be found any more.

    >>> print(snippet(Recipe(optim="SGD(momentum=0.9)"), 0.1, steps=300, schedule="constant"))
    import torch
    <BLANKLINE>
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    <BLANKLINE>
    for inputs, target in loader:
        optimizer.zero_grad()
        loss = loss_fn(model(inputs), target)
        loss.backward()
        optimizer.step()
    """
    held, moved = recipe.choice("parametrize"), recipe.choice("optim") or parse_choice("optim", optim)
    start, adapter, layer = recipe.choice("init"), recipe.choice("adapter"), recipe.choice("layer")
    scaled = layer is not None and layer.kwargs.get("scaled", True) and hasattr(layer.resolve(), "rates")
    optimizers = _optimizers(moved, rate, scaled)
    many = len(optimizers) > 1
    small, at = recipe.choice("compress"), recipe.compresses_at
    made = [line for lines in optimizers for line in lines] + (["optimizers = [muon, adamw]"] if many else [])
    late = _late(small, made, steps, many, schedule == "cosine") if small and at == "late" else []
    blocks = [
        _swap(layer) if layer else [],
        _batch_note([c for c in (start, held) if c]),
        _start(start) if start else [],
        _hold(held) if held else [],
        _adapt(adapter, adapt or {}) if adapter else [],
        _calibration_note(small) if small else [],
        [_compress(small)] if small and at == "start" else [],
        [line for lines in optimizers for line in lines],
        ["optimizers = [muon, adamw]"] if many else [],
        _steering(steps, many) if schedule == "cosine" else [],
        _loop(recipe.choice("penalty"), many, schedule == "cosine", late),
        [_compress(small)] if small and at == "end" else [],
    ]
    body = "\n\n".join("\n".join(block) for block in blocks if block).replace("torch.nn.", "nn.")
    used = (
        {_address(c)[0] for c in (*recipe.choices(), moved)}
        | ({"peft"} if adapter else set())
        | ({"pondera.optim"} if "pondera.optim." in body else set())
        | ({"pondera.nn"} if "pondera.nn." in body else set())
        | ({"pondera.compress"} if "pondera.compress." in body else set())
    )
    lines = {f"import {module}" for module in used if not module.startswith("torch.")}
    lines |= {"import torch"} if "torch." in body else set()
    lines |= {"from torch import nn"} if "nn.Linear" in body else set()
    imports = sorted(lines, key=lambda line: (line.startswith("from"), line))
    return "\n".join((["import math", ""] if "math." in body else []) + imports) + f"\n\n{body}"


def start_code(recipe: Recipe) -> str:
    """Python that gives a model the start of `recipe`, and nothing else; empty for a recipe without one.

    >>> print(start_code(Recipe(init="zero")))
    import pondera.init
    <BLANKLINE>
    pondera.init.zero_(model)
    """
    start = recipe.choice("init")
    if start is None:
        return ""
    module, lines = _address(start)[0], [*_batch_note([start]), *_start(start)]
    head = "from torch import nn" if module.startswith("torch.") else f"import {module}"
    return "\n".join([head, "", *lines]).replace("torch.nn.", "nn.")


def _batch_note(choices: list[Choice]) -> list[str]:
    looking = any("batch" in inspect.signature(c.resolve()).parameters for c in choices)
    notes = [f"# batch: the inputs of some {START_BATCH} training examples"] if looking else []
    needed = list(dict.fromkeys(n for c in choices if c.room == "init" for n in material_of(c)))
    said = {"examples": "examples: the training data, a tuple of tensors"}
    return notes + [f"# {said.get(n, f'{n}: what the task gives by its function {n}()')}" for n in needed]


def _start(choice: Choice) -> list[str]:
    method = choice.resolve()
    if method.__module__ != "torch.nn.init":
        return [_call(choice, "model")]
    return [
        "# every linear and convolution weight, each by itself; biases at zero",
        "for layer in model.modules():",
        EACH_LAYER,
        f"        {_call(choice, 'layer.weight')}",
        "        if layer.bias is not None:",
        "            nn.init.zeros_(layer.bias)",
    ]


def _swap(choice: Choice) -> list[str]:
    told = [f"{k}={_literal(v)}" for k, v in choice.args if k != "scaled"]
    return [f"pondera.nn.swap_linear({', '.join(['model', '.'.join(_address(choice)), *told])})"]


def _hold(choice: Choice) -> list[str]:
    method = choice.resolve()
    if isinstance(method, type) and issubclass(method, nn.Module):
        made = _call(choice)
        put = f'torch.nn.utils.parametrize.register_parametrization(layer, "weight", {made})'
    elif "batch" in inspect.signature(method).parameters:
        return [_call(choice, "model")]
    else:
        put = _call(choice, "layer")
    return ["for layer in list(model.modules()):", EACH_LAYER, f"        {put}"]


def _adapt(choice: Choice, adapt: dict[str, Any]) -> list[str]:
    told = {k: v for k, v in {"target_modules": "all-linear", **adapt}.items() if k not in choice.kwargs and v}
    config = _call(Choice("adapter", choice.name, (*told.items(), *choice.args)))
    lines = [f"model = peft.get_peft_model(model, {config})"]
    if choice.kwargs.get("init_lora_weights") == "eva":
        lines.append("peft.initialize_lora_eva_weights(model, [batch], forward_fn=lambda m, b: m(b))  # batch: inputs")
    return lines


def _optimizers(choice: Choice, rate: float, scaled: bool = False) -> list[list[str]]:
    method, lr = choice.resolve(), f"lr={rate:.4g}"
    if method is getattr(torch.optim, "Muon", None):
        from pondera.optim._groups import VECTOR_RATE_RATIO

        return [
            [
                "# hidden matrices by Muon, everything else by AdamW",
                "groups = pondera.optim.groups(model)",
                'matrices = [p for g in groups if g["matrix"] for p in g["params"] if p.ndim == 2]',
                "hidden = {id(p) for p in matrices}",
                "others = [p for p in model.parameters() if id(p) not in hidden]",
                f"muon = {_call(choice, 'matrices', lr)}",
            ],
            [f"adamw = torch.optim.AdamW(others, lr={rate * VECTOR_RATE_RATIO:.4g}, weight_decay=0.0)"],
        ]
    if getattr(method, "wants_model", False):
        params = "model"
    elif getattr(method, "matrix_method", False):
        params = "pondera.optim.groups(model)"
    else:
        params = f"pondera.nn.rate_groups(model, {lr})" if scaled else "model.parameters()"
    return [[f"optimizer = {_call(choice, params, lr)}"]]


def _steering(steps: int, many: bool) -> list[str]:
    warm = max(1, round(WARM_UP * steps))
    scheduler = "torch.optim.lr_scheduler.LambdaLR"
    return [
        f"steps, warm = {steps}, {warm}  # as compared; warm-up, then cosine to zero",
        "",
        "def share(done):",
        "    if done < warm:",
        "        return (done + 1) / warm",
        "    return 0.5 * (1 + math.cos(math.pi * min(1, (done + 1 - warm) / (steps - warm + 1))))",
        "",
        f"schedulers = [{scheduler}(o, share) for o in optimizers]"
        if many
        else f"scheduler = {scheduler}(optimizer, share)",
    ]


def _calibration_note(choice: Choice) -> list[str]:
    takes = inspect.signature(choice.resolve()).parameters
    of = "(inputs, target)" if "loss" in takes else "inputs"
    return [f"# calibration: a list of {CALIBRATION} training batches, each {of}"] if "calibration" in takes else []


def _compress(choice: Choice) -> str:
    takes = inspect.signature(choice.resolve()).parameters
    given = ["model", *(["calibration"] if "calibration" in takes else [])]
    given += ["loss=lambda model, batch: loss_fn(model(batch[0]), batch[1])"] if "loss" in takes else []
    return _call(choice, *given)


def _late(choice: Choice, made: list[str], steps: int, many: bool, steered: bool) -> list[str]:
    """Within the loop: compress, and go on with optimizers of what is left."""
    at = max(1, round(COMPRESSED_AT * steps))
    lines = [f"if step == {at}:  # the rest of the steps trains what is left", f"    {_compress(choice)}"]
    lines += [f"    {line}" for line in made]
    if steered:
        new = "torch.optim.lr_scheduler.LambdaLR({}, lambda done: share(done + " + str(at) + "))"
        lines += [
            f"    schedulers = [{new.format('o')} for o in optimizers]"
            if many
            else f"    scheduler = {new.format('optimizer')}"
        ]
    return [f"    {line}" for line in lines]


def _loop(penalty: Choice | None, many: bool, steered: bool, late: list[str]) -> list[str]:
    def each(what: str, call: str) -> list[str]:
        return [f"    for one in {what}s:", f"        one.{call}()"] if many else [f"    {what}.{call}()"]

    loss = "    loss = loss_fn(model(inputs), target)"
    if penalty:
        kwargs = penalty.kwargs
        factor = kwargs.pop("factor", DEFAULT_FACTOR)
        loss += f" + {_literal(factor)} * {_call(Choice('penalty', penalty.name, tuple(kwargs.items())), 'model')}"
    return [
        "for step, (inputs, target) in enumerate(loader, 1):" if late else "for inputs, target in loader:",
        *each("optimizer", "zero_grad"),
        loss,
        "    loss.backward()",
        *each("optimizer", "step"),
        *(each("scheduler", "step") if steered else []),
        *late,
    ]


def _call(choice: Choice, *given: str) -> str:
    """The call as written in Python: given arguments, ``batch`` where the method looks at data, the recipe's own."""
    takes = inspect.signature(choice.resolve()).parameters if choice.room in ("init", "parametrize") else {}
    inside = list(given)
    if "batch" in takes:
        second = list(takes).index("batch") == 1 and takes["batch"].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        inside.append("batch" if second else "batch=batch")
    if choice.room == "init" and takes:
        inside += [f"{n}={n}" for n in material_of(choice) if given[:1] == ("model",)]
    inside += [f"{k}={_literal(v)}" for k, v in choice.args]
    return f"{'.'.join(_address(choice))}({', '.join(inside)})"


def _address(choice: Choice) -> tuple[str, str]:
    """Module and public name of a choice's method."""
    if ":" in choice.name:
        module, _, name = choice.name.partition(":")
        return module, name
    method = choice.resolve()
    for door in _DOORS[choice.room]:
        for name in (choice.name + _ENDING.get(choice.room, "_"), choice.name):
            if getattr(importlib.import_module(door), name, None) is method:
                return door, name
    raise BadInput(f"no {choice.room} method is called {choice.name!r}")


def _literal(value: Any) -> str:
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)

"""A recipe: one choice a room, read from a string, checked before anything runs."""

import ast
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from pondera._weights import require_owned
from pondera.errors import BadInput, missing_extra, nearest
from pondera.lab.fingerprint import module_sources
from pondera.lab.space import Axis, Log, OneOf, Point, Space, Uniform, make

ROOMS = ("layer", "init", "parametrize", "adapter", "compress", "penalty", "optim")
_DOORS: dict[str, tuple[str, ...]] = {  # where a room's names are looked up, in this order
    "layer": ("pondera.nn",),
    "compress": ("pondera.compress",),
    "init": ("pondera.init", "torch.nn.init", "pondera.nn"),  # the last for the starts of its own layers
    "parametrize": ("pondera.parametrize", "torch.nn.utils.parametrizations"),
    "adapter": ("pondera.adapters", "peft"),
    "penalty": ("pondera.penalties",),
    "optim": ("pondera.optim", "torch.optim", "pytorch_optimizer"),
}
_OPTIONAL = {"pytorch_optimizer": "optim"}  # doors that need not be there, and the extra that brings them
_ENDING = {"adapter": "Config"}  # what a public name ends in besides the name a recipe gives; an underscore otherwise
_EXTRA = {"adapter": "adapters"}  # the extra a room needs
_SHARED = {  # what a recipe applies a room's methods with, whoever wrote them
    "init": "pondera._weights",
    "parametrize": "pondera._weights",
    "optim": "pondera.optim._groups",
    "layer": "pondera.nn.swap",
}
_OF_SWAP = ("only", "head", "match", "scaled")  # arguments of layer= that say where layers go, not what they are
_GIVEN_TO_COMPRESS = ("calibration", "loss", "generator")  # what the lab gives a compression besides the model
DEFAULT_FACTOR = 0.01
CALIBRATION = 8  # training batches that a compression looks at


@dataclass(frozen=True)
class Choice:
    """One method by name with its arguments: ``lsuv(tol=0.01)``."""

    room: str
    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        inside = ",".join(f"{k}={v!r}" for k, v in self.args)
        return f"{self.name}({inside})" if inside else self.name

    @property
    def kwargs(self) -> dict[str, Any]:
        return dict(self.args)

    @property
    def spaces(self) -> dict[Axis, Space]:
        """The arguments that are searched."""
        return {(self.room, k): v for k, v in self.args if isinstance(v, (Log, Uniform, OneOf))}

    def resolve(self) -> Callable[..., Any]:
        """The public object the name stands for; BadInput with the nearest names when there is none."""
        return _resolve(self.room, self.name)

    def check(self) -> None:
        """Raise BadInput for an unknown name or an argument the method does not take."""
        method = self.resolve()
        try:
            known = inspect.signature(method).parameters
        except ValueError:  # a builtin without a signature: its own call will judge
            return
        given = ("self", "params", "lr", "batch", "generator", "model", "weight", "target")
        settable = [p for p in known if p not in given]
        if self.room == "compress":
            settable = [p for p in known if p not in ("model", *_GIVEN_TO_COMPRESS)]
        if self.room == "layer":
            settable = [p for p in list(known)[2:] if p not in ("self", "bias", "device", "dtype")] + [*_OF_SWAP]
        if self.room == "penalty":
            settable = [p for p in known if p not in ("self", "weight", "model")] + ["factor"]
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return
        for name in self.kwargs:
            if name not in settable:
                if self.room == "optim" and name in ("lr", "learning_rate", "rate"):
                    one = self.kwargs[name]
                    raise BadInput(
                        f"optim={self.name} takes no {name}, for the learning rate is tuned for every recipe; to give one to all, "
                        f"say --rates {one}, or rates=[{one}] in Python"
                    )
                hint = nearest(name, settable)
                raise BadInput(
                    f"{self.room}={self.name} takes no argument {name!r}{hint} (it takes {', '.join(settable)})"
                )


@dataclass(frozen=True)
class Recipe:
    """One choice a room; None keeps what the task does by itself.

    Args:
        init: a start, a function of `pondera.init` or `torch.nn.init` without the final underscore: ``"lsuv(tol=0.01)"``.
        parametrize: of `pondera.parametrize` or `torch.nn.utils.parametrizations`, put on every owned weight.
        adapter: a configuration of `pondera.adapters` or PEFT without the final Config: ``"Svft"``, ``"Lora(r=8)"``; put on
            the layers the task's dict ``adapt`` names, all linear ones otherwise. What was built is frozen.
        penalty: of `pondera.penalties`, added to the loss times ``factor=`` (0.01): ``"norm_loss(factor=0.1)"``.
        optim: of `pondera.optim`, `torch.optim` or, with the extra "optim", `pytorch_optimizer`; its learning rate is tuned,
            so it is not an argument.
        salt: shifts the draw of the weights while the data order stays; for A/A tests of the comparison itself.
        label: the name in tables; by default the choices themselves.
        layer: of `pondera.nn`, in the place of the model's linear layers but the head: ``"Btt(rank=2)"``; ``only='blocks.*'``,
            ``head=True`` and ``match='parameters'`` are those of `pondera.nn.swap_linear`. Where the layers say how their
            rates scale, the optimizer follows it; ``scaled=False`` leaves that out.
        compress: of `pondera.compress`: ``"magnitude_prune(keep=0.1)"``. Applied four fifths through the steps, on
            `CALIBRATION` training batches, so that the last fifth trains what is left; a method that training on would undo
            (a quantiser) at the end, one that prunes before training at the start. Size and multiplications are reported.
    An argument may be searched along with the learning rate: ``"AdamW(weight_decay=log(1e-3,1))"``, ``"Lora(r=choice(4,8))"``,
    ``"SGD(momentum=uniform(0.5,0.99))"``; every recipe of a comparison gets the same number of trials all the same.
    A method of your own is named ``module:object`` where Python can import it. Reading such a recipe imports the module,
    which runs its code: take none from a source you would not run code from.
    Raises: BadInput: for an unknown method (nearest names offered), a wrong argument, or text that does not parse.

    >>> str(Recipe(init="lsuv(tol=0.01)", optim="NorMuon"))
    'init=lsuv(tol=0.01)+optim=NorMuon'
    """

    init: str | None = None
    parametrize: str | None = None
    adapter: str | None = None
    penalty: str | None = None
    optim: str | None = None
    layer: str | None = None
    compress: str | None = None
    salt: int = 0
    label: str | None = None

    def __post_init__(self) -> None:
        for choice in self.choices():
            choice.check()

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """Read ``"label: init=lsuv(tol=0.01)+optim=NorMuon"``; label and every choice are optional, ``""`` is the baseline.

        >>> Recipe.parse("mine: optim=SGD(momentum=0.9)").name
        'mine'
        """
        before, colon, after = text.partition(": ")
        label, rest = (before.strip(), after) if colon and "=" not in before else (None, text)
        given: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in _split(rest, "+"))):
            room, equals, value = part.partition("=")
            if not equals or room.strip() not in (*ROOMS, "salt"):
                raise BadInput(
                    f"a recipe is made of {', '.join(f'{r}=NAME' for r in ROOMS)} joined by '+', got {part!r}"
                    f"{nearest(room.strip(), ROOMS)}"
                )
            if room.strip() in given:
                raise BadInput(f"the recipe {text!r} chooses {room.strip()} twice")
            given[room.strip()] = int(value) if room.strip() == "salt" else value.strip()
        return cls(**given, label=label or None)

    def choices(self) -> Iterator[Choice]:
        """The choices made, in the order they are applied."""
        for room in ROOMS:
            text = getattr(self, room)
            if text is not None:
                yield parse_choice(room, text)

    def choice(self, room: str) -> Choice | None:
        return next((c for c in self.choices() if c.room == room), None)

    def __str__(self) -> str:
        return _text(self)

    @property
    def name(self) -> str:
        return self.label or str(self) or "as built"

    @property
    def spaces(self) -> dict[Axis, Space]:
        """What the recipe searches besides the learning rate.

        >>> Recipe(optim="AdamW(weight_decay=log(1e-3,1))").spaces
        {('optim', 'weight_decay'): log(0.001,1)}
        """
        return {axis: space for c in self.choices() for axis, space in c.spaces.items()}

    def at(self, point: Point) -> "Recipe":
        """The recipe with the values of one trial in the place of its spaces.

        >>> searched = Recipe(optim="AdamW(weight_decay=log(1e-3,1))")
        >>> str(searched.at(Point(0.1, ((("optim", "weight_decay"), 0.01),))))
        'optim=AdamW(weight_decay=0.01)'
        """
        if not point.values:
            return self
        return _at(self, point.values)

    def fingerprint(self) -> str:
        """Hash of the choices and of the source of the methods chosen: a changed method is a new run."""
        text = str(self) + "".join(_source_hash(c.room, c.name) for c in self.choices())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    # -- applying it ------------------------------------------------------------------------------------------------

    def start(
        self,
        model: nn.Module,
        batch: Any,
        generator: torch.Generator,
        material: Callable[[str], Any] | None = None,
        adapt: dict[str, Any] | None = None,
    ) -> nn.Module:
        """Give `model` its start, its parametrizations and its adapter, in place.

        batch: inputs for data-driven starts. material: gives what else a start must have (a teacher, the signal to
        fit) by the name of its parameter. adapt: what an adapter is told besides its own arguments.
        """
        layer = self.choice("layer")
        if layer is not None:
            from pondera.nn import swap_linear

            settings = layer.kwargs
            settings.pop("scaled", None)
            swap_linear(model, layer.resolve(), **settings)  # drawn by torch's global generator, as the model was
        init = self.choice("init")
        if init is not None:
            _call_start(init, model, batch, generator, material)
        held = self.choice("parametrize")
        if held is not None:
            method = held.resolve()
            if isinstance(method, type):
                for one in require_owned(model, held.name):
                    if one.rows is not None and one.rows.start:
                        continue  # a part of a packed projection, which is held as one weight
                    held_by: Any = method  # a class of modules
                    torch_parametrize.register_parametrization(one.module, one.attribute, held_by(**held.kwargs))
            elif "batch" in inspect.signature(method).parameters:
                _call_start(held, model, batch, generator, material)
            else:
                for one in require_owned(model, held.name):
                    if one.attribute == "weight":
                        method(one.module, **held.kwargs)
        adapter = self.choice("adapter")
        if adapter is not None:
            _put_on(adapter, model, batch, generator, adapt or {})
        return model

    @property
    def compresses_at(self) -> str | None:
        """When the recipe's compression is applied: "start", "late" or "end"; None where there is none."""
        choice = self.choice("compress")
        return None if choice is None else str(getattr(choice.resolve(), "at", "late"))

    def shrink(
        self, model: nn.Module, feed: Iterator[Any], loss: Callable[..., Tensor], inputs: Callable[[Any], Any],
        generator: torch.Generator,
    ) -> Any:  # fmt: skip
        """Apply the recipe's compression to `model`, in place; its report.

        feed: training batches, of which it sees `CALIBRATION`; their `inputs` alone where it asks for no `loss`.
        """
        choice = self.choice("compress")
        assert choice is not None, "a recipe with a compression"
        method = choice.resolve()
        takes = inspect.signature(method).parameters
        given: dict[str, Any] = {"generator": generator} if "generator" in takes else {}
        if "calibration" in takes:
            seen = [next(feed) for _ in range(CALIBRATION)]
            given["calibration"] = seen if "loss" in takes else [inputs(batch) for batch in seen]
        if "loss" in takes:
            given["loss"] = loss
        return method(model, **given, **choice.kwargs)

    def penalty_of(self, model: nn.Module) -> Tensor | None:
        """The penalty times its factor, or None."""
        choice = self.choice("penalty")
        if choice is None:
            return None
        kwargs = choice.kwargs
        factor = kwargs.pop("factor", DEFAULT_FACTOR)
        return factor * choice.resolve()(model, **kwargs)

    def optimizers(self, model: nn.Module, rate: float, default: str) -> list[torch.optim.Optimizer]:
        """The optimizer at learning rate `rate` (two where torch's Muon leaves the vectors to AdamW)."""
        choice = self.choice("optim") or parse_choice("optim", default)
        method = choice.resolve()
        if method is getattr(torch.optim, "Muon", None):
            from pondera.optim import groups
            from pondera.optim._groups import VECTOR_RATE_RATIO

            split = groups(model)
            matrices = [p for g in split if g["matrix"] for p in g["params"] if p.ndim == 2]
            if not matrices:
                raise BadInput("optim=Muon needs hidden matrices of two dimensions, and the model has none")
            chosen = {id(p) for p in matrices}
            rest = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
            muon = method(matrices, lr=rate, **choice.kwargs)
            return [muon, torch.optim.AdamW(rest, lr=rate * VECTOR_RATE_RATIO, weight_decay=0.0)] if rest else [muon]
        params: Any = [p for p in model.parameters() if p.requires_grad]
        if getattr(method, "wants_model", False):
            return [method(model, lr=rate, **choice.kwargs)]
        if getattr(method, "matrix_method", False):
            from pondera.optim import groups

            params = groups(model)
        elif (layer := self.choice("layer")) is not None and layer.kwargs.get("scaled", True):
            from pondera.nn import rate_groups

            params = rate_groups(model, rate)
        return [method(params, lr=rate, **choice.kwargs)]


def _put_on(choice: Choice, model: nn.Module, batch: Any, generator: torch.Generator, adapt: dict[str, Any]) -> None:
    """Adapt `model` in place by PEFT; an adapter that looks at activations (EVA) sees the batch."""
    import peft

    config = choice.resolve()(**{"target_modules": "all-linear", **adapt, **choice.kwargs})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
        adapted = peft.get_peft_model(model, config)
        if getattr(config, "init_lora_weights", None) == "eva":
            peft.initialize_lora_eva_weights(
                adapted,
                [batch],
                forward_fn=lambda m, b: m(**b) if isinstance(b, dict) else m(b),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )


def parse_choice(room: str, text: str) -> Choice:
    """Read ``name(arg=value, ...)``; values are Python literals.

    >>> parse_choice("init", "lsuv(tol=0.01)").kwargs
    {'tol': 0.01}
    """
    name, paren, inside = text.strip().partition("(")
    if not name or (paren and not text.strip().endswith(")")):
        raise BadInput(f"a choice is NAME or NAME(arg=value, ...), got {text!r} for {room}")
    if not paren:
        return Choice(room, name)
    try:
        call = ast.parse(f"f({inside}", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise BadInput(f"the arguments of {room}={name} need their names (arg=value), got {text!r}")
        args = {str(k.arg): _value(k.value, f"{room}={name}") for k in call.keywords}
    except (SyntaxError, AssertionError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"the arguments in {text!r} are not Python literals (numbers, quoted text, lists) or spaces (log(low,high), "
            "uniform(low,high), choice(a,b))"
        ) from None
    return Choice(room, name, tuple(sorted(args.items())))


def _value(node: ast.expr, where: str) -> Any:
    """A literal, or a space to search."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        return make(node.func.id, [ast.literal_eval(a) for a in node.args], where)
    return ast.literal_eval(node)


@lru_cache(maxsize=100_000)
def _text(recipe: Recipe) -> str:
    parts = [f"{c.room}={c}" for c in recipe.choices()] + ([f"salt={recipe.salt}"] if recipe.salt else [])
    return "+".join(parts)


@lru_cache(maxsize=100_000)
def _at(recipe: Recipe, values: tuple[tuple[Axis, Any], ...]) -> Recipe:
    found = recipe
    for choice in recipe.choices():
        here = {arg: v for (room, arg), v in values if room == choice.room}
        if here:
            one = replace(choice, args=tuple(sorted((choice.kwargs | here).items())))
            found = replace(found, **{choice.room: str(one)})
    return found


def _open(room: str, door: str) -> Any:
    """The module a room's names are looked up in; None for one that need not be installed, and is not."""
    try:
        return importlib.import_module(door)
    except ImportError as error:
        if door in _OPTIONAL and missing_extra(error, door) is not None:
            return None
        found = missing_extra(error, f"the recipe's {room}", _EXTRA.get(room))
        if found is None:
            raise
        raise found from None


def names(room: str) -> list[str]:
    """Every name a recipe may give for `room`, ours first."""
    found: dict[str, None] = {}
    for door in _DOORS[room]:
        module = _open(room, door)
        if module is None:
            continue
        for public in getattr(module, "__all__", dir(module)):
            if _fits(room, public, getattr(module, public, None)):
                found[public.removesuffix(_ENDING.get(room, "_"))] = None
    return list(found)


def _fits(room: str, public: str, value: Any) -> bool:
    if public.startswith("_") or not callable(value):
        return False
    if room == "init":
        return public.endswith("_") and not public.startswith("_no_grad")
    if room == "adapter":
        import peft

        kinds = (peft.PeftConfig, peft.PromptLearningConfig)
        return (
            public.endswith("Config")
            and isinstance(value, type)
            and issubclass(value, kinds[0])
            and not (value in kinds or issubclass(value, kinds[1]))
        )
    if room == "optim":
        return _is_class(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer and _takes_params(value)
    if room == "layer":
        return _is_class(value, nn.Module) and _stands_for_linear(value)
    if isinstance(value, type):
        return room == "parametrize" and issubclass(value, nn.Module) and hasattr(value, "right_inverse")
    if not inspect.isfunction(value):
        return False
    first, *others = inspect.signature(value).parameters.values()
    if room == "compress":
        gives = inspect.signature(value).return_annotation
        rest = [p for p in others if p.name not in _GIVEN_TO_COMPRESS and p.default is p.empty]
        return first.name == "model" and not rest and getattr(gives, "__name__", gives) == "CompressReport"
    if room == "parametrize":
        return first.name == "module" or any(p.name == "batch" for p in others)
    alone = all(p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in others)
    return first.name in ("weight", "model", "decoder") and alone and not public.endswith("_")


def _named(room: str, name: str) -> Callable[..., Any]:
    """The object that ``module:object`` names. Nothing of it is called before it is known to be of the room's kind."""
    module, _, attribute = name.partition(":")
    if _of_python(module):  # by name: importing some of these already does something
        raise BadInput(f"{room}={name} names a module of Python's standard library, which has no {room} method")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # the module's own code has run, and may raise anything
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"{room}={name} cannot be imported: {words}") from None
    inner = found
    while isinstance(inner, partial):
        inner = inner.func
    if _of_python(str(getattr(inner, "__module__", None) or "")):
        raise BadInput(f"{room}={name} comes from Python's standard library, which has no {room} method")
    if room == "optim":
        fits, kind = _is_class(found, torch.optim.Optimizer), "a subclass of torch.optim.Optimizer"
    elif room == "layer":
        fits = _is_class(found, nn.Module) and _stands_for_linear(found)
        kind = "a subclass of nn.Module that is made of (in_features, out_features)"
    elif room == "adapter":
        fits, kind = _is_class(found, _open(room, "peft").PeftConfig), "a subclass of peft.PeftConfig"
    elif room in ("init", "penalty", "compress"):
        fits, kind = _is_function(found), "a Python function whose first parameter takes the model"
    else:
        fits = _is_class(found, nn.Module) or _is_function(found)
        kind = "a subclass of nn.Module or a Python function whose first parameter takes the module"
    if not fits:
        sort = "class" if isinstance(found, type) else type(found).__name__
        got = f"the {sort} {getattr(found, '__qualname__', '')}".rstrip()
        raise BadInput(f"{room}={name} must be {kind}, got {got}")
    return found


def _of_python(module: str) -> bool:
    return module.partition(".")[0] in sys.stdlib_module_names


def _takes_params(method: type) -> bool:
    """Whether an optimizer is made of parameters and a rate, or of the model where it says so: none that wraps another."""
    if getattr(method, "wants_model", False):
        return True
    first, *others = inspect.signature(method).parameters.values()
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return first.name == "params" and all(p.default is not p.empty or p.name == "lr" or p.kind in free for p in others)


def _stands_for_linear(method: type) -> bool:
    """Whether a layer is made of two sizes and what may be left out or told."""
    takes = list(inspect.signature(method).parameters)
    return takes[:2] == ["in_features", "out_features"]


def _is_class(value: Any, kind: type) -> bool:
    return isinstance(value, type) and issubclass(value, kind)


def _is_function(value: Any) -> bool:
    """Whether a model or tensor can be its first argument, by its signature; what has none is not written in Python."""
    if isinstance(value, type) or not callable(value):
        return False
    try:
        first = next(iter(inspect.signature(value).parameters.values()), None)
    except (ValueError, TypeError):
        return False
    if first is None or first.kind in (first.KEYWORD_ONLY, first.VAR_KEYWORD):
        return False
    wants = getattr(first.annotation, "__name__", str(first.annotation))
    return wants not in ("str", "bytes", "int", "float", "bool", "Path", "PathLike")


@lru_cache(maxsize=256)
def _resolve(room: str, name: str) -> Callable[..., Any]:
    if ":" in name:
        return _named(room, name)
    lacking = ""
    for door in _DOORS[room]:
        module = _open(room, door)
        if module is None:
            lacking = f"; {door} has more, with pip install 'pondera[{_OPTIONAL[door]}]'"
            continue
        public = getattr(module, "__all__", dir(module))
        for candidate in (name + _ENDING.get(room, "_"), name):
            if candidate in public and _fits(room, candidate, getattr(module, candidate)):
                return getattr(module, candidate)
    raise BadInput(f"no {room} method is called {name!r}{_meant(room, name, names(room))}{lacking}")


def _meant(room: str, name: str, known: list[str]) -> str:
    """What a name that is not known may mean, as the end of a sentence."""
    module, dot, last = name.rpartition(".")
    short = last.removesuffix("_").removesuffix(_ENDING.get(room, "_"))
    same = [k for k in known if k.lower() == short.lower()]
    if same:
        return f"; did you mean {' or '.join(f'{room}={k}' for k in same)}?"
    if dot:
        return f"; an object of a module is named with a colon: {room}={module}:{last}"
    return nearest(name, known) or f" (known: {', '.join(known[:12])}, ...)"


def material_of(choice: Choice) -> list[str]:
    """What a start must have besides the model, a batch and its arguments: the names of its other required parameters.

    >>> material_of(parse_choice("init", "lsuv"))
    []
    """
    takes = inspect.signature(choice.resolve()).parameters.values()
    needed = [p.name for p in takes if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [n for n in needed[1:] if n not in ("batch", "generator", *choice.kwargs)]  # the first is the model


def _call_start(
    choice: Choice,
    model: nn.Module,
    batch: Any,
    generator: torch.Generator,
    material: Callable[[str], Any] | None = None,
) -> None:
    method = choice.resolve()
    takes = inspect.signature(method).parameters
    extra: dict[str, Any] = {}
    for name in material_of(choice):
        if material is None:
            raise BadInput(f"{choice.room}={choice.name} needs {name}, which is not given")
        extra[name] = material(name)
    if "batch" in takes:
        extra["batch"] = batch
    if "generator" in takes:
        extra["generator"] = generator
    if method.__module__ == "torch.nn.init":  # tensor starts of torch: on every owned weight, biases zero
        for one in require_owned(model, choice.name):
            new = one.read().detach().clone()
            method(new, **choice.kwargs, **extra)
            one.write(new)
            one.fill_bias(0.0)
        return
    method(model, **choice.kwargs, **extra)


@lru_cache(maxsize=256)
def _source_hash(room: str, name: str) -> str:
    parts = [module_sources(_resolve(room, name))]
    if ":" in name:  # where it is named, for it may be defined elsewhere: Quick = partial(theirs, tol=0.1)
        parts.append(module_sources(importlib.import_module(name.partition(":")[0])))
    if room in _SHARED:
        parts.append(module_sources(importlib.import_module(_SHARED[room])))
    return " ".join(parts)


def _split(text: str, mark: str) -> Iterator[str]:
    """Split at `mark` outside brackets."""
    depth, at = 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == mark and depth == 0 and not (i and text[i - 1] in "eE"):
            yield text[at:i]
            at = i + 1
    yield text[at:]


def as_recipe(given: "Recipe | str | dict[str, Any]") -> Recipe:
    """A recipe from itself, its text, or a dict of its fields."""
    if isinstance(given, Recipe):
        return given
    if isinstance(given, str):
        return Recipe.parse(given)
    if isinstance(given, dict):
        known = {f.name for f in fields(Recipe)}
        for key in given:
            if key not in known:
                raise BadInput(f"a recipe has no field {key!r}{nearest(key, known)}")
        return Recipe(**given)
    raise BadInput(f"a recipe is a Recipe, its text or a dict, got {type(given).__name__}")

"""Zoos of trained networks, made here: images as small networks, classifiers of known accuracy, transformers of several widths.

A zoo is a recipe before it is a collection: its folder says how it was made, and the same recipe makes it again. Networks of
one architecture train together in one batch; what is finished is on disk, and a zoo that was stopped goes on where it was.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from pondera._files import write_atomically
from pondera.errors import BadInput, describe, nearest, needs_extra, require_finite
from pondera.weightspace._states import States, count

RECIPE = "zoo.json"


class Sine(nn.Module):
    """sin(w0 x): the activation of a SIREN."""

    def __init__(self, w0: float = 30.0) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return torch.sin(self.w0 * x)

    def extra_repr(self) -> str:
        return f"w0={self.w0:g}"


def siren(width: int = 24, depth: int = 2, *, inputs: int = 2, outputs: int = 1, w0: float = 30.0) -> nn.Sequential:
    """A SIREN: coordinates in, values out; started as its authors start it.

    Weights of the first layer are uniform within 1 / inputs, of the others within sqrt(6 / fan_in) / w0.

    Args:
        width, depth: of the hidden layers, and how many.
        inputs, outputs: sizes at the ends.
        w0: what each pre-activation is multiplied by; 30, as Sitzmann et al. 2020 (arXiv 2006.09661) have it.
    Raises: BadInput: for sizes below 1.

    >>> [tuple(p.shape) for p in siren(8, 1).parameters()]
    [(8, 2), (8,), (1, 8), (1,)]
    """
    for what, n in {"width": width, "depth": depth, "inputs": inputs, "outputs": outputs}.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise BadInput(f"siren needs a {what} of at least 1, a whole number, got {n!r}")
    sizes = [inputs, *[width] * depth, outputs]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        linear = nn.Linear(a, b)
        bound = 1 / a if i == 0 else math.sqrt(6 / a) / w0
        nn.init.uniform_(linear.weight, -bound, bound)
        layers += [linear, Sine(w0)]
    return nn.Sequential(*layers[:-1])


def start_states(build: Callable[[], nn.Module], n: int, generator: Generator) -> dict[str, Tensor]:
    """n networks at their own random starts, as one batch of states; torch's own random state is left alone.

    Args:
        build: makes one network.
        n: how many.
        generator: gives the seed of every start.

    >>> start_states(lambda: nn.Linear(3, 2), 4, torch.Generator().manual_seed(0))["weight"].shape
    torch.Size([4, 2, 3])
    """
    seeds = torch.randint(2**31, (n,), generator=generator).tolist()
    found: list[dict[str, Tensor]] = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            found.append({name: p.detach() for name, p in build().named_parameters()})
    return {name: torch.stack([s[name] for s in found]) for name in found[0]}


def run_states(model: nn.Module, states: States, x: Tensor, *, shared: bool = True) -> Float[Tensor, "nets *out"]:
    """What every network of a batch gives for an input.

    Args:
        model: the architecture; its own numbers do not count.
        states: of its parameters, (nets, *shape).
        x: the input of all networks, or (shared=False) one a network, stacked.

    >>> run_states(nn.Linear(3, 2), {"weight": torch.zeros(4, 2, 3), "bias": torch.ones(4, 2)}, torch.randn(5, 3)).shape
    torch.Size([4, 5, 2])
    """
    count(states, "run_states")
    call = vmap(lambda s, v: functional_call(model, s, (v,)), in_dims=(0, None if shared else 0))
    found: Tensor = call(dict(states), x)
    return found


def train_states(
    states: States,
    loss: Callable[[dict[str, Tensor], int], Float[Tensor, "nets"]],
    *,
    steps: int,
    rate: float | Float[Tensor, "nets"] = 1e-3,
    decay: float | Float[Tensor, "nets"] = 0.0,
) -> dict[str, Tensor]:
    """Train a batch of networks together by AdamW with a cosine, each at a rate and decay of its own.

    Args:
        states: the starts, (nets, *shape); not changed.
        loss: of the states at a step, one number a network. Their gradients do not mix: each is a network's own.
        steps: how many.
        rate, decay: of all, or one each.
    Returns: the trained states. Networks whose loss is no number stop where they were.

    >>> w = train_states({"w": torch.zeros(2, 1)}, lambda s, i: (s["w"] - 1).square().sum(1), steps=200, rate=0.1)["w"]
    >>> bool((w - 1).abs().max() < 0.05)
    True
    """
    p = {name: x.detach().clone().requires_grad_() for name, x in states.items()}
    n = count(states, "train_states")
    first = {name: torch.zeros_like(x) for name, x in states.items()}
    second = {name: torch.zeros_like(x) for name, x in states.items()}
    each = {name: torch.as_tensor(rate, dtype=x.dtype).expand(n).view(n, *[1] * (x.ndim - 1)) for name, x in p.items()}
    off = {name: torch.as_tensor(decay, dtype=x.dtype).expand(n).view(n, *[1] * (x.ndim - 1)) for name, x in p.items()}
    for i in range(steps):
        gradients = torch.autograd.grad(loss(p, i).sum(), list(p.values()))
        now = 0.5 * (1 + math.cos(math.pi * i / steps))
        with torch.no_grad():
            for (name, x), g in zip(p.items(), gradients, strict=True):
                g = g.nan_to_num(0, 0, 0)
                first[name].lerp_(g, 0.1)
                second[name].lerp_(g.square(), 0.001)
                step = first[name] / (1 - 0.9 ** (i + 1)) / ((second[name] / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
                x.mul_(1 - now * each[name] * off[name]).sub_(now * each[name] * step)
    return {name: x.detach() for name, x in p.items()}


def coordinates(height: int, width: int) -> Float[Tensor, "pixels 2"]:
    """The pixels' places, row by row, in [-1, 1] squared: (vertical, horizontal).

    >>> coordinates(2, 2).tolist()
    [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.cartesian_prod(y, x)


def fit_inrs(
    images: Float[Tensor, "nets height width"],
    *,
    width: int = 24,
    depth: int = 2,
    w0: float = 30.0,
    steps: int = 300,
    rate: float = 1e-3,
    shared_start: bool = False,
    generator: Generator | None = None,
) -> dict[str, Tensor]:
    """A SIREN for every image, all trained together: the value at each pixel from its coordinates.

    Args:
        images: values around 0 to 1.
        width, depth, w0: of the network (`siren`).
        steps, rate: of Adam with a cosine; on 8 x 8 digits the defaults leave a mean squared error below 1e-6.
        shared_start: all from one start, which makes them easy to tell apart even by their flat weights. By default each
            has its own, and only their functions are alike.
        generator: draws the starts; seed 0 by default.
    Returns: states (nets, *shape) of ``siren(width, depth)``.
    Raises: BadInput: if the images are no such tensor, or hold NaN.

    >>> states = fit_inrs(torch.rand(3, 4, 4), width=8, depth=1, steps=5)
    >>> states["0.weight"].shape
    torch.Size([3, 8, 2])
    """
    if not isinstance(images, Tensor) or images.ndim != 3 or not images.is_floating_point():
        got = describe(images) if isinstance(images, Tensor) else type(images).__name__
        raise BadInput(f"fit_inrs needs images (nets, height, width), got a {got}")
    require_finite(images, "fit_inrs", "images")
    g = generator or torch.Generator().manual_seed(0)
    model = siren(width, depth, w0=w0)
    states = start_states(lambda: siren(width, depth, w0=w0), 1 if shared_start else len(images), g)
    if shared_start:
        states = {name: x.expand(len(images), *x.shape[1:]).clone() for name, x in states.items()}
    at, values = coordinates(*images.shape[1:]), images.flatten(1)
    return train_states(
        states,
        lambda s, _: (run_states(model, s, at).squeeze(-1) - values).square().mean(1),
        steps=steps,
        rate=rate,
    )


# -- zoos on disk ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zoo:
    """Networks of one architecture and what is known of each.

    states: (nets, *shape) by name. facts: by word, one number a network, such as its label or its accuracy. recipe: how
    the zoo was made. group: which of a zoo's architectures this is ("" where there is one).
    """

    states: dict[str, Tensor]
    facts: dict[str, Tensor]
    recipe: dict[str, Any] = field(default_factory=dict)
    group: str = ""

    def __len__(self) -> int:
        return count(self.states, "Zoo")

    def model(self) -> nn.Module:
        """A network of the zoo's architecture, for `run_states` and `trace_permutations`."""
        return KINDS[self.recipe["kind"]].build(self.recipe, self.group)


@dataclass(frozen=True)
class Kind:
    """One kind of zoo. settings: what its recipe says, with defaults. groups: its architectures. build: one network.
    make: chunk by chunk, the states and facts of networks low to high of a group."""

    says: str
    settings: dict[str, Any]
    groups: Callable[[dict[str, Any]], list[str]]
    build: Callable[[dict[str, Any], str], nn.Module]
    make: Callable[[dict[str, Any], str, int, int], tuple[dict[str, Tensor], dict[str, Tensor]]]
    chunk: int


def make_zoo(
    kind: str,
    out: str | Path,
    *,
    n: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
    **settings: Any,
) -> Path:
    """Make a zoo in a folder, or finish one that was begun there by the same recipe.

    Args:
        kind: "digits-inrs" (SIRENs of scikit-learn's 8 x 8 digits), "classifiers" (digit classifiers of one small
            architecture; rate, decay and amount of data drawn) or "transformers" (character models of the standard
            library's source, of several widths).
        out: the folder. Finished chunks of networks are kept when it is stopped.
        n: networks, of all architectures together; each kind's default otherwise.
        seed: of everything drawn. progress: told how many are done, of how many.
        settings: others of the kind's, by name: `zoo_kinds` lists them.
    Returns: the folder.
    Raises: BadInput: for an unknown kind or setting, or a folder with another zoo or other things in it.

    >>> import tempfile
    >>> folder = make_zoo("digits-inrs", Path(tempfile.mkdtemp()) / "zoo", n=4, steps=3, width=6, depth=1)
    >>> zoo = load_zoo(folder)
    >>> len(zoo), zoo.states["0.weight"].shape, sorted(zoo.facts)
    (4, torch.Size([4, 6, 2]), ['error', 'image', 'label'])
    """
    if kind not in KINDS:
        raise BadInput(f"make_zoo knows {', '.join(KINDS)}, got {kind!r}{nearest(kind, KINDS)}")
    known = KINDS[kind]
    if unknown := [name for name in settings if name not in known.settings]:
        raise BadInput(
            f"a zoo of {kind} has no setting {unknown[0]!r}{nearest(unknown[0], known.settings)}; it has {', '.join(known.settings)}"
        )
    recipe: dict[str, Any] = {"kind": kind, "seed": seed, **known.settings, **settings}
    recipe["n"] = _whole(recipe["n"] if n is None else n)
    folder = Path(out)
    _prepare(folder, recipe)
    plan = list(_plan(recipe))
    done, total = 0, sum(high - low for _, low, high, _ in plan)
    for group, low, high, name in plan:
        path = folder / name
        if not path.exists():
            states, facts = known.make(recipe, group, low, high)
            whole = {f"state/{k}": v.contiguous() for k, v in states.items()}
            whole |= {f"fact/{k}": v.contiguous() for k, v in facts.items()}
            beside = path.with_name(f".{path.name}")
            save_file(whole, beside)
            beside.replace(path)
        done += high - low
        if progress is not None:
            progress(done, total)
    return folder


def load_zoo(folder: str | Path, group: str | None = None) -> Zoo:
    """A zoo that `make_zoo` made, in memory.

    Args:
        folder: where it is.
        group: which architecture, where there are several ("width=32").
    Raises: BadInput: if the folder holds no zoo or an unfinished one, or the group is missing or unknown.
    """
    at = Path(folder)
    recipe = _recipe(at)
    groups = KINDS[recipe["kind"]].groups(recipe)
    if group is None:
        if len(groups) > 1:
            raise BadInput(f"the zoo in {at} has mixed architectures, take one at a time: group={', '.join(groups)}")
        group = groups[0]
    if group not in groups:
        raise BadInput(f"the zoo in {at} has no architecture {group!r}; it has {', '.join(groups)}")
    parts: dict[str, list[Tensor]] = {}
    for its, _, _, name in _plan(recipe):
        if its != group:
            continue
        if not (at / name).exists():
            raise BadInput(f"the zoo in {at} is not finished ({name} is missing): make it again, it goes on from there")
        with safe_open(at / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                parts.setdefault(key, []).append(file.get_tensor(key))
    whole = {key: torch.cat(x) for key, x in parts.items()}
    states = {key.removeprefix("state/"): x for key, x in whole.items() if key.startswith("state/")}
    facts = {key.removeprefix("fact/"): x for key, x in whole.items() if key.startswith("fact/")}
    return Zoo(states, facts, recipe, group)


def zoo_kinds() -> dict[str, dict[str, Any]]:
    """The kinds of zoo there are, with their settings and defaults.

    >>> sorted(zoo_kinds())
    ['classifiers', 'digits-inrs', 'transformers']
    """
    return {name: {"says": kind.says, **kind.settings} for name, kind in KINDS.items()}


def _plan(recipe: Mapping[str, Any]) -> Iterator[tuple[str, int, int, str]]:
    """(architecture, from, to, file) of every chunk."""
    kind = KINDS[recipe["kind"]]
    groups = kind.groups(dict(recipe))
    for i, group in enumerate(groups):
        n = recipe["n"] // len(groups) + (i < recipe["n"] % len(groups))
        for low in range(0, n, kind.chunk):
            yield group, low, min(low + kind.chunk, n), f"{group.replace('=', '-') or 'nets'}-{low:05d}.safetensors"


def _prepare(folder: Path, recipe: dict[str, Any]) -> None:
    if not folder.absolute().parent.is_dir():
        raise BadInput(f"make_zoo cannot write {folder}: the folder {folder.parent} does not exist")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"make_zoo writes a folder, and {folder} is a file")
    if folder.is_dir() and (folder / RECIPE).exists():
        old = _recipe(folder)
        odd = [k for k in recipe if old.get(k) != recipe[k]]
        if odd:
            raise BadInput(
                f"{folder} holds a zoo of another recipe ({odd[0]} is {old.get(odd[0])!r}, not {recipe[odd[0]]!r}); take "
                "another folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput(f"make_zoo needs a new or empty folder, and {folder} has other things in it")
    folder.mkdir(exist_ok=True)
    write_atomically(folder / RECIPE, json.dumps(recipe, indent=1) + "\n")


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(f"{folder} holds no zoo: it has no {RECIPE}") from None
    except ValueError as error:
        raise BadInput(f"{folder / RECIPE} is no JSON: {error}") from None
    if not isinstance(recipe, dict) or recipe.get("kind") not in KINDS:
        raise BadInput(f"{folder / RECIPE} names no kind of zoo that is known: {', '.join(KINDS)}")
    return recipe


def _whole(n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise BadInput(f"make_zoo needs a whole number of networks, at least 1, got {n!r}")
    return n


def _generator(recipe: Mapping[str, Any], *parts: object) -> Generator:
    import hashlib

    text = "/".join(map(str, (recipe["seed"], *parts)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big"))


def _digits() -> tuple[Float[Tensor, "n 64"], Int[Tensor, "n"]]:
    with needs_extra("a zoo of digits", "lab"):
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


# -- the kinds ---------------------------------------------------------------------------------------------------------


def _build_inr(recipe: dict[str, Any], group: str) -> nn.Module:
    return siren(recipe["width"], recipe["depth"], w0=recipe["w0"])


def _make_inrs(recipe: dict[str, Any], group: str, low: int, high: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images, labels = _digits()
    which = torch.arange(low, high) % len(images)
    said = {k: recipe[k] for k in ("width", "depth", "w0", "steps", "rate", "shared_start")}
    g = _generator(recipe, 0 if recipe["shared_start"] else low)
    picture = images[which].unflatten(1, (8, 8))
    states = fit_inrs(picture, **said, generator=g)
    seen = run_states(_build_inr(recipe, group), states, coordinates(8, 8)).squeeze(-1)
    error = (seen - images[which]).square().mean(1)
    return states, {"label": labels[which], "image": which, "error": error}


def _build_classifier(recipe: dict[str, Any], group: str) -> nn.Module:
    w = recipe["width"]
    return nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))


def _make_classifiers(
    recipe: dict[str, Any], group: str, low: int, high: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    images, labels = _digits()
    n, steps, g = high - low, recipe["steps"], _generator(recipe, low)
    drawn = torch.rand(3, n, generator=g)
    rate, decay = 10 ** (-4 + 2.5 * drawn[0]), 10 ** (-4 + 4 * drawn[1])
    share = 10 ** (-1.7 + 1.7 * drawn[2])  # of the 1,000 training images that a network sees
    model = _build_classifier(recipe, group)
    states = start_states(lambda: _build_classifier(recipe, group), n, g)
    x, y, test, right = images[:1000], labels[:1000], images[1000:], labels[1000:]
    batches = (torch.rand(steps, n, 32, generator=g) * (share * 1000).clamp_min(20)[:, None]).long().clamp_max(999)

    def loss(s: dict[str, Tensor], i: int) -> Tensor:
        out = run_states(model, s, x[batches[i]], shared=False)
        return F.cross_entropy(out.flatten(0, 1), y[batches[i]].flatten(), reduction="none").view(n, -1).mean(1)

    states = train_states(states, loss, steps=steps, rate=rate, decay=decay)
    with torch.no_grad():
        accuracy = (run_states(model, states, test).argmax(-1) == right).float().mean(1)
    return states, {"accuracy": accuracy, "rate": rate, "decay": decay, "share": share}


class _CharModel(nn.Module):
    """A causal transformer on characters."""

    def __init__(self, width: int, blocks: int = 2, heads: int = 4, context: int = 32, symbols: int = 97) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(symbols, width), nn.Embedding(context, width)
        kind: dict[str, Any] = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, **kind) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length symbols"]:
        n = ids.shape[1]
        x = self.token(ids) + self.place.weight[:n]
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        out: Tensor = self.head(self.norm(x))
        return out


def _build_transformer(recipe: dict[str, Any], group: str) -> nn.Module:
    return _CharModel(int(group.partition("=")[2]))


def _make_transformers(
    recipe: dict[str, Any], group: str, low: int, high: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import argparse
    import textwrap

    def ids(path: str) -> Tensor:
        text = Path(path).read_text(encoding="utf-8")
        return torch.tensor([max(0, min(96, ord(c) - 31)) for c in text])

    train, test = ids(argparse.__file__), ids(textwrap.__file__).unfold(0, 33, 33)
    states: list[dict[str, Tensor]] = []
    losses = []
    for i in range(low, high):
        g = _generator(recipe, group, i)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=g)))
            model = _build_transformer(recipe, group)
        optimizer = torch.optim.AdamW(model.parameters(), recipe["rate"])
        for step in range(recipe["steps"]):
            for one in optimizer.param_groups:
                one["lr"] = recipe["rate"] * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
            at = torch.randint(len(train) - 33, (32, 1), generator=g) + torch.arange(33)
            out = model(train[at[:, :-1]])
            loss = F.cross_entropy(out.flatten(0, 1), train[at[:, 1:]].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(test[:, :-1]).flatten(0, 1), test[:, 1:].flatten()))
        states.append({name: x.detach().clone() for name, x in model.state_dict().items()})
    return {k: torch.stack([s[k] for s in states]) for k in states[0]}, {"loss": torch.stack(losses)}


KINDS = {
    "digits-inrs": Kind(
        "a SIREN for each of scikit-learn's 8 x 8 digits, with its class and its error",
        {"n": 1000, "width": 24, "depth": 2, "w0": 30.0, "steps": 300, "rate": 1e-3, "shared_start": False},
        lambda recipe: [""],
        _build_inr,
        _make_inrs,
        100,
    ),
    "classifiers": Kind(
        "digit classifiers 64-width-width-10, rate, decay and amount of data drawn, with their test accuracy",
        {"n": 500, "width": 16, "steps": 200},
        lambda recipe: [""],
        _build_classifier,
        _make_classifiers,
        100,
    ),
    "transformers": Kind(
        "causal character models of the standard library's source, two blocks, with their test loss",
        {"n": 12, "widths": [16, 32, 48], "steps": 200, "rate": 3e-3},
        lambda recipe: [f"width={w}" for w in recipe["widths"]],
        _build_transformer,
        _make_transformers,
        1,
    ),
}

"""Dynamic sparse training: masks whose weakest weights die and others grow; and one such mask for each task in a row."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from pondera.compress.masks import Mask, hold_masks, masks_of, prunable
from pondera.errors import BadInput, describe, require_finite

LAYERS, DEATHS = ("erk", "uniform"), ("magnitude", "set", "taylor")
GROWTHS = ("gradient", "momentum", "random", "unfired")
LEAST_RATE, MOMENTUM = 0.005, 0.9


def erdos_renyi_densities(
    shapes: Mapping[str, Sequence[int]], density: float, *, layers: str = "erk"
) -> dict[str, float]:
    r"""The share of weights each layer keeps, so that the whole keeps `density` (Erdos-Renyi kernel).

    .. math:: d_\ell = \min\left(1, \; \epsilon \, \frac{\sum_j n_{\ell j}}{\prod_j n_{\ell j}}\right)

    over the dimensions n of a layer's weight, kernel included, with :math:`\epsilon` such that :math:`\sum_\ell d_\ell N_\ell = d N`:
    a layer whose share would pass 1 is made dense, and :math:`\epsilon` found again for the others. Small layers end dense.

    Args:
        shapes: of the weights, by name.
        density: d, in (0, 1].
        layers: "erk", or "uniform": d for each.
    Returns: shares by name.
    Raises: BadInput: for a density out of range, another rule, or no shape.
    Paper: Yildirim et al. 2024, arXiv 2308.14831, after Mocanu et al. (2018) and Evci et al. (2020).

    >>> {k: round(v, 3) for k, v in erdos_renyi_densities({"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (10, 32)}, 0.2).items()}
    {'a': 0.551, 'b': 0.112, 'c': 1.0}
    """
    who = "erdos_renyi_densities"
    _one_of(layers, LAYERS, "rule for its layers", who)
    if not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise BadInput(f"{who} needs a density above 0 and at most 1, got {density!r}")
    size = {name: math.prod(s) for name, s in shapes.items()}
    if not size or not all(size.values()):
        raise BadInput(f"{who} needs shapes of weights that are not empty, got {dict(shapes)}")
    if layers == "uniform":
        return dict.fromkeys(shapes, float(density))
    dense: set[str] = set()
    while True:
        raw = {n: sum(s) / size[n] for n, s in shapes.items() if n not in dense}
        if not raw:
            return dict.fromkeys(shapes, 1.0)
        wanted = density * sum(size.values()) - sum(size[n] for n in dense)
        epsilon = wanted / sum(r * size[n] for n, r in raw.items())
        most = max(raw.values())
        if epsilon * most <= 1:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in shapes}
        dense |= {n for n, r in raw.items() if r == most}


@torch.no_grad()
def rewire_mask(
    weight: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    rate: float,
    *,
    death: str = "magnitude",
    growth: str = "gradient",
    gradient: Float[Tensor, "*shape"] | None = None,
    momentum: Float[Tensor, "*shape"] | None = None,
    fired: Bool[Tensor, "*shape"] | None = None,
    generator: Generator | None = None,
) -> Bool[Tensor, "*shape"]:
    r"""One update of a layer's mask: ceil(rate * held) weights die, as many grow.

    Args:
        weight: its values, 0 where the mask leaves it out.
        mask: True where a weight is held.
        rate: share of the held weights that die.
        death: "magnitude": the smallest :math:`|w|`; "taylor": the smallest :math:`(w g)^2`; "set": half the smallest positive
            ones, half the negative ones nearest 0.
        growth: "gradient" or "momentum": the largest absolute value of that among the places left out; "random": any of them;
            "unfired": any of those that were never held, then any.
        gradient, momentum: g of every place, held or not, and a running mean of it.
        fired: places that were held at some time.
        generator: source of the draws, on the CPU.
    Returns: the new mask, with as many weights as before. A weight may die and grow again at once: it keeps its value then.
    Raises: BadInput: for another rule, a rate outside [0, 1], tensors that do not fit, or without the gradient a rule needs.
    Paper: Yildirim et al. 2024, arXiv 2308.14831, after the authors' code (muratonuryildirim/CL-with-DST), but that the number that
        grow at random is exact, and that for "set" the code keeps only the most negative weights, where SET (Mocanu et al. 2018)
        takes those nearest 0.

    >>> w, held = torch.tensor([[3.0, 0.1, 0.0, 0.0]]), torch.tensor([[True, True, False, False]])
    >>> rewire_mask(w, held, 0.5, gradient=torch.tensor([[0.0, 0.1, 0.2, 0.9]]))
    tensor([[ True, False, False,  True]])
    """
    who = "rewire_mask"
    _one_of(death, DEATHS, "death", who)
    _one_of(growth, GROWTHS, "growth", who)
    if not 0 <= rate <= 1:
        raise BadInput(f"{who} needs a rate of 0 to 1, got {rate!r}")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise BadInput(
            f"{who} needs a mask of truth values like its weight, a {describe(weight)}; got a {describe(mask)}"
        )
    for name, given, rules in (("gradient", gradient, {"gradient", "taylor"}), ("momentum", momentum, {"momentum"})):
        if (asks := rules & {death, growth}) and (given is None or given.shape != weight.shape):
            what = "none" if given is None else f"a {describe(given)}"
            raise BadInput(f"{who} needs a {name} like its weight, a {describe(weight)}, for {min(asks)}; got {what}")
    w, held = weight.flatten(), mask.flatten().clone()
    n = math.ceil(rate * int(held.sum()))
    if not n:
        return mask.clone()
    if death == "set":
        positive, negative = held & (w > 0), held & (w <= 0)
        half = min(n - n // 2, int(positive.sum()))
        half = max(half, n - int(negative.sum()))
        for part, k in ((positive, half), (negative, n - half)):
            held[torch.where(part, w.abs(), torch.inf).topk(k, largest=False).indices] = False
    else:
        size = w.abs() if death == "magnitude" else (w * gradient.flatten()).square()  # type: ignore[union-attr]
        held[torch.where(held, size, torch.inf).topk(n, largest=False).indices] = False
    if growth in ("gradient", "momentum"):
        score = (gradient if growth == "gradient" else momentum).flatten().abs().float()  # type: ignore[union-attr]
    else:
        score = torch.rand(w.shape, generator=generator).to(w.device)
        if growth == "unfired" and fired is not None:
            score += (~fired.flatten()).float()
    held[torch.where(held, -torch.inf, score).topk(n).indices] = True
    return held.view_as(mask)


class DynamicSparsity:
    r"""Training under masks that change: every so many steps the weakest weights die and as many others grow.

    The masks are held on the model (`hold_masks`), so the optimizer, the loss and the loop are any. Call `step()` after each step of
    the optimizer:

    .. code-block:: python

        sparsity = DynamicSparsity(model, density=0.1, every=100, total=len(loader) * epochs)
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
            sparsity.step()

    The share that dies falls by a cosine from `rate` to 0.005 over `total` steps. What grows starts from 0. The number of weights
    never changes. The optimizer may be older than this object: the parameters stay the same.

    Args:
        model: the weights of linear and convolution layers are masked, all anew; biases, norms and embeddings are not.
        density: share of weights held.
        layers: how it is spread, see `erdos_renyi_densities`; "uniform" for strong sparsity, says the paper.
        death, growth: see `rewire_mask`. For "momentum" a running mean of the gradient is kept, with 0.9; the authors' code reads the
            optimizer's own, which here has seen no gradient of what is left out.
        rate: share of a layer's weights that dies, at first.
        every: steps between updates.
        total: steps over which the rate falls; None: it stays.
        optimizer: if given, its state for what died or grew is set to 0; else a weight grows with the momentum it died with.
        generator: source of the draws, on the CPU.
    Raises: BadInput: for numbers or rules out of range, or weights with NaN.
    Paper: Yildirim et al. 2024, arXiv 2308.14831. Defaults are the authors' code's: density 0.2, rate 0.5, every 400 steps; ERK and
        growth by gradient are among their better choices at mild sparsity (abstract).

    >>> net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2))
    >>> sparsity = DynamicSparsity(net, 0.2, growth="random", every=1, generator=torch.Generator().manual_seed(0))
    >>> held = int(sum(m.sum() for m in masks_of(net).values()))
    >>> sparsity.step()
    >>> int(sum(m.sum() for m in masks_of(net).values())) == held
    True
    """

    def __init__(
        self,
        model: nn.Module,
        density: float = 0.2,
        *,
        layers: str = "erk",
        death: str = "magnitude",
        growth: str = "gradient",
        rate: float = 0.5,
        every: int = 400,
        total: int | None = None,
        optimizer: Optimizer | None = None,
        generator: Generator | None = None,
    ) -> None:
        who = "DynamicSparsity"
        _one_of(death, DEATHS, "death", who)
        _one_of(growth, GROWTHS, "growth", who)
        if not 0 <= rate <= 1:
            raise BadInput(f"{who} needs a rate of 0 to 1, got {rate!r}")
        for name, number in (("every", every), ("total", 1 if total is None else total)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise BadInput(f"{who} needs {name} of at least one step, got {number!r}")
        shapes = {name: w.shape for name, w in prunable(model, who).items()}
        shares = erdos_renyi_densities(shapes, density, layers=layers)
        self.model, self.death, self.growth, self.rate = model, death, growth, rate
        self.every, self.total, self.optimizer, self.generator = every, total, optimizer, generator
        self.steps = 0
        masks = {name: _drawn(shape, shares[name], generator) for name, shape in shapes.items()}
        hold_masks(model, masks)
        self._held = {name: _watched(model, name) for name in masks}
        self.fired = {name: mask.mask.clone() for name, (mask, _) in self._held.items()}
        self._watch()

    @property
    def rate_now(self) -> float:
        """The share that would die at this step."""
        if self.total is None:
            return self.rate
        low = min(LEAST_RATE, self.rate)
        return low + (self.rate - low) * (1 + math.cos(math.pi * min(1.0, self.steps / self.total))) / 2

    def step(self) -> None:
        """To be called after each step of the optimizer; every `every`-th changes the masks."""
        self.steps += 1
        self._average()
        if self.steps % self.every == 0:
            self.rewire()
        self._watch()

    @torch.no_grad()
    def rewire(self) -> None:
        """Let weights die and others grow, now.

        Raises: BadInput: if a rule needs a gradient and no backward pass has been seen.
        """
        new = {}
        for name, (mask, original) in self._held.items():
            weight = original.masked_fill(~mask.mask, 0)
            require_finite(weight, "DynamicSparsity", f"weight {name}")
            new[name] = rewire_mask(
                weight, mask.mask, self.rate_now, death=self.death, growth=self.growth, gradient=mask.seen,
                momentum=mask.mean, fired=self.fired[name], generator=self.generator,
            )  # fmt: skip
        stayed = {name: mask.mask & new[name] for name, (mask, _) in self._held.items()}
        hold_masks(self.model, new)
        for name, (_, original) in self._held.items():
            self.fired[name] |= new[name]
            state = {} if self.optimizer is None else self.optimizer.state.get(original, {})
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == original.shape:
                    value.masked_fill_(~stayed[name], 0)

    def _average(self) -> None:
        for mask, _ in self._held.values():
            if self.growth == "momentum" and mask.seen is not None:
                mean = torch.zeros_like(mask.seen) if mask.mean is None else mask.mean
                mask.mean = mean.lerp_(mask.seen, 1 - MOMENTUM)

    def _watch(self) -> None:
        """Gradients of all places are kept for the step that needs them; for their running mean, always."""
        soon = (self.steps + 1) % self.every == 0 and (self.growth == "gradient" or self.death == "taylor")
        for mask, _ in self._held.values():
            mask.watch, mask.seen = soon or self.growth == "momentum", None


class SparseTasks:
    r"""One network for several tasks in a row, with a sparse mask for each and no forgetting.

    A task trains, under masks of its own, the weights that no task before it used; it may read theirs, which are frozen. Biases, norm
    layers and their statistics, which no mask divides, are kept for each task. So what a task gives out later is what it gave
    out when it was finished, to the bit.

    .. code-block:: python

        tasks = SparseTasks(model, density=0.1)
        for name, loader in data.items():
            tasks.begin(every=100)
            optimizer = torch.optim.Adam(model.parameters())
            for x, y in loader:
                ...
                optimizer.step()
                tasks.step()
            tasks.finish(name)
        tasks.use("first")

    With density d a share of :math:`(1 - d)^t` of the weights is free after t tasks, if their masks are drawn apart.

    Args:
        model: as in `DynamicSparsity`. Its weights at this moment are what free weights start each task from.
        density: share of weights held by a task.
        isolate: False lets a task train all weights of its mask, those of others too: the rival that forgets.
        settings: further settings of `DynamicSparsity`, for all tasks.
    Raises: BadInput: for a task finished twice, used but not finished, or finished before it began.
    Paper: Yildirim et al. 2024, arXiv 2308.14831, after the authors' code (muratonuryildirim/CL-with-DST). There biases and norm layers
        are shared and overwritten by later tasks, and an old weight that dies and grows again is read as 0 in training and at
        its old value afterwards; here it has its old value in both.

    >>> net = nn.Linear(6, 2)
    >>> tasks = SparseTasks(net, 0.3)
    >>> tasks.begin(), tasks.finish("a")
    (None, None)
    >>> was = net(torch.ones(6)).clone()
    >>> tasks.begin(); net.bias.data += 1; tasks.step(); tasks.finish("b"); tasks.use("a")
    >>> torch.equal(net(torch.ones(6)), was)
    True
    """

    def __init__(self, model: nn.Module, density: float = 0.2, *, isolate: bool = True, **settings: Any) -> None:
        self.model, self.density, self.isolate, self.settings = model, density, isolate, settings
        self._start = {name: w.clone() for name, w in prunable(model, "SparseTasks").items()}
        self.used = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self._start.items()}
        self._record = {name: w.clone() for name, w in self._start.items()}
        self._tasks: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self.now: DynamicSparsity | None = None

    @torch.no_grad()
    def begin(self, **settings: Any) -> None:
        """Start a task: draw its mask, put the weights of earlier tasks in place, and start the free ones anew."""
        if self.now is not None:
            raise BadInput("SparseTasks got a new task before the last was finished")
        now = DynamicSparsity(self.model, self.density, **(self.settings | settings))
        for name, (_, original) in now._held.items():
            original.copy_(torch.where(self.used[name], self._record[name], self._start[name]))
        self.now = now

    @torch.no_grad()
    def step(self) -> None:
        """To be called after each step of the optimizer: puts earlier tasks' weights back, and lets the masks change."""
        now = self._begun("step")
        self._put_back(now)  # before the masks change, which judges weights
        now.step()
        self._put_back(now)

    @torch.no_grad()
    def finish(self, name: str) -> None:
        """Keep the task's mask and what is its own, and freeze its weights."""
        now = self._begun("finish")
        if name in self._tasks:
            raise BadInput(f"SparseTasks has a task {name!r} already")
        self._put_back(now)
        masks = {n: m.clone() for n, m in masks_of(self.model).items()}
        for n, (_, original) in now._held.items():
            fresh = masks[n] if not self.isolate else masks[n] & ~self.used[n]
            self._record[n] = torch.where(fresh, original, self._record[n])
            self.used[n] |= masks[n]
        self._tasks[name] = (masks, {n: x.clone() for n, x in self._own()})
        self.now = None

    @torch.no_grad()
    def use(self, name: str) -> None:
        """Put a finished task's network in place."""
        if self.now is not None or name not in self._tasks:
            raise BadInput(
                f"SparseTasks can use a finished task when none is under way, got {name!r} of {list(self._tasks)}"
            )
        masks, own = self._tasks[name]
        hold_masks(self.model, masks)
        for n in masks:
            _watched(self.model, n)[1].copy_(self._record[n])
        for n, x in self._own():
            x.copy_(own[n])

    @property
    def free(self) -> float:
        """Share of weights that no finished task uses."""
        n = sum(u.numel() for u in self.used.values())
        return 1 - sum(int(u.sum()) for u in self.used.values()) / n

    def _own(self) -> Iterable[tuple[str, Tensor]]:
        masked = {
            f"{p}.parametrizations.{a}." if p else f"parametrizations.{a}."
            for p, _, a in (n.rpartition(".") for n in self._start)
        }
        return ((n, x) for n, x in self.model.state_dict().items() if not any(n.startswith(m) for m in masked))

    def _put_back(self, now: DynamicSparsity) -> None:
        if self.isolate:
            for name, (_, original) in now._held.items():
                original.copy_(torch.where(self.used[name], self._record[name], original))

    def _begun(self, what: str) -> DynamicSparsity:
        if self.now is None:
            raise BadInput(f"SparseTasks needs begin() before {what}()")
        return self.now


class _Watched(Mask):
    """A mask that sees the gradient of every place, also of those it leaves out."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask)
        self.watch = False
        self.seen: Tensor | None = None  # since the last step, over all backward passes
        self.mean: Tensor | None = None

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        out = super().forward(weight)
        if self.watch and out.requires_grad:
            out.register_hook(self._see)
        return out

    def _see(self, g: Tensor) -> None:
        self.seen = g.detach().clone() if self.seen is None else self.seen + g.detach()


def _watched(model: nn.Module, name: str) -> tuple[_Watched, nn.Parameter]:
    path, _, attribute = name.rpartition(".")
    parts: Any = model.get_submodule(path).parametrizations[attribute]  # type: ignore[index, union-attr]
    if not isinstance(parts[0], _Watched):
        parts[0] = _Watched(parts[0].mask)
    return parts[0], parts.original


def _drawn(shape: torch.Size, share: float, generator: Generator | None) -> Tensor:
    """A mask with exactly the rounded share of its places, at least one."""
    n = math.prod(shape)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.rand(n, generator=generator).topk(max(1, round(share * n))).indices] = True
    return mask.view(shape)


def _one_of(given: str, known: tuple[str, ...], what: str, who: str) -> None:
    if given not in known:
        raise BadInput(f"{who} needs a {what} of {', '.join(known)}, got {given!r}")

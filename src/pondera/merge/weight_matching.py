"""Weight matching: reorder the hidden units of one network so that its weights lie nearest to another's."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from pondera._batch import Batch
from pondera._permute import (
    Axis,
    Permutations,
    PermutationSpec,
    Place,
    State,
    apply_permutation,
    identities,
    index_of,
    names_of,
    random_permutations,
    reorder,
    require_matchable,
    trace_permutations,
)
from pondera.errors import BadInput, describe, nearest, require_extra, require_finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOLERANCE = 1e-12  # of what counts as progress, relative to |a| |b|


@dataclass(frozen=True)
class Matched:
    """How one network was reordered to fit another.

    Attributes:
        permutations: by name; unit i of the result is unit `permutations[p][i]` of what was given.
        state: the reordered state.
        history: the objective, the sum of <W_a, reordered W_b> over the tensors that some permutation reorders and that are
            not carried, at the identity and after every pass of the start that was kept (at its random permutations,
            where it is not the first); from `straight_through_matching` the loss at the midpoint, minibatch by minibatch.
        objectives: the objective each start ended with.
        distance: distance of the two networks before and after; the objective is all of it that permutations change.
        converged: whether a whole pass brought nothing more; from `straight_through_matching` whether every match did.
    """

    permutations: dict[str, Int[Tensor, "n"]]
    state: dict[str, Tensor]
    history: tuple[float, ...]
    objectives: tuple[float, ...]
    distance: tuple[float, float]
    converged: bool

    @property
    def objective(self) -> float:
        """The objective of what was kept."""
        return max(self.objectives)

    def summary(self) -> str:
        """The finding in plain words."""
        units = sum(len(p) for p in self.permutations.values())
        moved = sum(int((p != torch.arange(len(p))).sum()) for p in self.permutations.values())
        before, after = self.distance
        starts = f"the best of {len(self.objectives)} starts, " if len(self.objectives) > 1 else ""
        end = "a local optimum" if self.converged else "not yet a local optimum"
        fall = f" ({1 - after / before:.0%} less)" if before else ""
        return (
            f"{moved} of {units} units in {len(self.permutations)} permutations moved. The distance between the networks "
            f"goes from {before:.4g} to {after:.4g}{fall}; {starts}{end}."
        )


def weight_matching(
    a: nn.Module | State,
    b: nn.Module | State,
    spec: PermutationSpec | None = None,
    *,
    example: Batch | None = None,
    restarts: int = 1,
    generator: Generator | None = None,
    max_iter: int = 100,
) -> Matched:
    r"""Reorder the hidden units of network b so that its weights fit those of network a.

    Sought are the permutations pi that leave b's function as it is and bring it nearest to a:

    .. math:: \arg\min_\pi \lVert \theta_a - \pi(\theta_b) \rVert^2
              = \arg\max_\pi \sum_\ell \langle W^a_\ell,\; P_\ell W^b_\ell P_{\ell-1}^T \rangle

    The sum runs over the tensors that some permutation reorders: what the others hold, such as the last layer's bias, is
    the same wherever the units lie and is left out of the objective, as is what the spec carries.

    With all permutations but one held, that one is a linear assignment and is solved exactly; permutations are visited
    in a random order until a whole pass brings nothing (more than 1e-12 of |a| |b|, in float64). Every pass can only
    raise the objective. The end depends on the order: with several hidden layers it is a local optimum, with one the
    global one. One whose neighbours have not moved since its last visit lies best as it lies and is passed over; of the
    products of the others only those with units that moved are taken anew.

    Permutations change no singular value. What matching does is to turn the leading singular vectors of the two networks
    toward each other (`singular_alignment`); the distance falls little between networks trained apart. Merge the two,
    `(1 - t) * a + t * result`, or look at `barrier`. Batch norm's running statistics are reordered with the units, do
    not count in the match, and must be re-estimated after merging (`reset_norms_`).

    Both networks and one reordered copy are in memory, and in float64 up to three tensors at a time and the n x n products
    of each permutation of n units; these are kept where the tensors that it reorders hold at least n x n numbers.

    Args:
        a: the network that stays, a module or a state dict.
        b: the network to reorder, of the same architecture; it is not changed.
        spec: which axes move together, by hand or from `trace_permutations`. None: traced on `a`, which must then be a
            module.
        example: what the traced model's forward takes; only without `spec`.
        restarts: number of starts, the best is kept. The first begins with the identity, the others with random
            permutations.
        generator: source of the orders and random starts; None takes torch's default one.
        max_iter: most passes of a start.
    Returns: a `Matched`.
    Raises: BadInput: if neither `spec` nor a module with an `example` is given, a tensor is missing, unknown to the spec,
        of another shape, not real or not finite, or `restarts` or `max_iter` is below 1. A spec without permutations has
        nothing to match and is refused too.
    Paper: Ito, Yamada and Kumagai 2025, arXiv 2402.04051 (the analysis); Ainsworth, Hayase and Srinivasa 2023, arXiv
        2209.04836 (the algorithm). Differences from the code of the latter: there products are float32 against an absolute
        tolerance of 1e-12, so rounding can pass for progress; a permutation is replaced there also when it gains nothing.
        Restarts are ours.

    >>> a = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> spec = trace_permutations(a, torch.randn(5, 3))
    >>> b = apply_permutation(spec, {"0": torch.tensor([2, 0, 3, 1])}, a.state_dict())
    >>> found = weight_matching(a, b, spec)
    >>> all(torch.equal(found.state[name], x) for name, x in a.state_dict().items())
    True
    """
    who = "weight_matching"
    if restarts < 1 or max_iter < 1:
        raise BadInput(f"{who} needs at least one start and one pass, got restarts={restarts}, max_iter={max_iter}")
    spec = _spec(spec, a, example, who)
    a, b = _state(a), _state(b)
    sizes = _require_alike([a, b], spec, who)
    runs = []
    for start in range(restarts):
        first = random_permutations(sizes, generator) if start else {}
        runs.append(_ascend(spec, sizes, a, b, first, generator, max_iter))
    best = max(runs, key=lambda run: run.history[-1])
    return _matched(spec, a, b, best, runs[0].start.objective, best.history, tuple(run.history[-1] for run in runs))


@dataclass(frozen=True)
class ManyMatched:
    """How several networks were reordered to fit each other.

    Attributes:
        permutations: one set a network, as in `Matched`.
        states: the reordered states.
        mean: their mean; entries that are no floating-point numbers are the first network's.
        history: sum over networks of the squared distance to the mean, before and after every pass.
        converged: whether a whole pass brought no network nearer to the mean of the others.
    """

    permutations: list[dict[str, Int[Tensor, "n"]]]
    states: list[dict[str, Tensor]]
    mean: dict[str, Tensor]
    history: tuple[float, ...]
    converged: bool

    def summary(self) -> str:
        """The finding in plain words."""
        end = "no network can come nearer alone" if self.converged else "not yet at an end"
        return (
            f"{len(self.states)} networks: root mean square distance to their mean from "
            f"{(self.history[0] / len(self.states)) ** 0.5:.4g} to {(self.history[-1] / len(self.states)) ** 0.5:.4g} in "
            f"{len(self.history) - 1} passes; {end}."
        )


def match_many(
    models: Sequence[nn.Module | State],
    spec: PermutationSpec | None = None,
    *,
    example: Batch | None = None,
    generator: Generator | None = None,
    max_iter: int = 100,
) -> ManyMatched:
    """Reorder several networks so that they fit each other, and average them.

    Networks are visited in a random order; each is matched to the mean of the others as they lie now, until no network's
    distance to that mean falls (by more than 1e-12 of the norms). Every step lowers the sum of squared distances; the end
    is a local optimum.

    Args:
        models: at least two networks of one architecture, modules or state dicts; they are not changed.
        spec, example: as in `weight_matching`; without a spec the first network is traced.
        generator: source of the orders; None takes torch's default one.
        max_iter: most passes over the networks, and of each match.
    Returns: a `ManyMatched`.
    Raises: BadInput: as `weight_matching`, and for fewer than two networks.
    Paper: "MergeMany" of Ainsworth et al. 2023, arXiv 2209.04836.

    >>> a = {"w": torch.tensor([[1.0], [2.0], [3.0]])}
    >>> others = {"w": a["w"].flip(0)}, {"w": a["w"].roll(1, 0)}
    >>> found = match_many([a, *others], PermutationSpec({"w": ("h", None)}), generator=Generator().manual_seed(0))
    >>> found.mean["w"].flatten().sort().values.tolist(), found.history[-1]
    ([1.0, 2.0, 3.0], 0.0)
    """
    who = "match_many"
    if isinstance(models, (nn.Module, Mapping)) or len(models) < 2:
        raise BadInput(f"{who} needs a list of at least two networks")
    if max_iter < 1:
        raise BadInput(f"{who} needs at least one pass, got max_iter={max_iter}")
    spec = _spec(spec, models[0], example, who)
    given = [_state(m) for m in models]
    sizes = _require_alike(given, spec, who)
    now, perms = [dict(s) for s in given], [identities(sizes) for _ in given]
    counted = [name for name in spec.axes if given[0][name].is_floating_point()]
    total = {name: sum(s[name].double() for s in now) for name in counted}
    apart = [name for name in counted if name not in spec.carried]
    history, converged = [_spread(now, total, apart)], False
    for _ in range(max_iter):
        progress = False
        for i in _shuffled(len(now), generator):
            others = dict(now[i]) | {name: (total[name] - now[i][name]) / (len(now) - 1) for name in counted}
            run = _ascend(spec, sizes, others, now[i], {}, generator, max_iter)
            if all(torch.equal(order, torch.arange(sizes[p])) for p, order in run.permutations.items()):
                continue
            progress = True
            perms[i] = {p: perms[i][p][order] for p, order in run.permutations.items()}
            for name in counted:
                total[name] -= now[i][name]
            now[i] = apply_permutation(spec, perms[i], given[i])
            for name in counted:
                total[name] += now[i][name]
        history.append(_spread(now, total, apart))
        if not progress:
            converged = True
            break
    mean = {name: (total[name] / len(now)).to(x) if name in total else x for name, x in now[0].items()}
    return ManyMatched(perms, now, mean, tuple(history), converged)


def straight_through_matching(
    model: nn.Module,
    a: nn.Module | State,
    b: nn.Module | State,
    loss: Callable[[nn.Module, Any], Tensor],
    data: Iterable[Any],
    spec: PermutationSpec | None = None,
    *,
    example: Batch | None = None,
    epochs: int = 1,
    lr: float = 1e-2,
    momentum: float = 0.9,
    generator: Generator | None = None,
    max_iter: int = 100,
) -> Matched:
    r"""Search the permutations of b by the loss at the midpoint, with gradients straight through the matching.

    A free point x starts at a. For every minibatch

    .. math:: \pi = \mathrm{match}(x, b), \qquad
              g = \nabla_p \, L\bigl(\tfrac12 (\theta_a + p)\bigr)\big|_{p = \pi(\theta_b)}, \qquad x \leftarrow \mathrm{SGD}(x, g)

    where the match starts from the last one. The permutations with the lowest minibatch loss are kept; that loss is
    noisy, so use large batches.

    Args:
        model: a module of the architecture, in the mode (train or eval) the loss is wanted in; a copy of it is used.
        a, b, spec, example: as in `weight_matching`; without a spec `model` is traced.
        loss: ``loss(model, batch)``, a scalar to be minimised.
        data: minibatches, gone through once an epoch: a DataLoader or a list.
        epochs, lr, momentum: of the descent on x.
        generator, max_iter: as in `weight_matching`.
    Returns: a `Matched` whose history is the loss at the midpoint.
    Raises: BadInput: as `weight_matching`; also if the data are empty, or the loss is no scalar or not finite.
    Paper: the straight-through estimator of Ainsworth et al. 2023, arXiv 2209.04836, which Ito et al. 2025 compare with
        weight matching. As in the authors' code: the rate 1e-2, momentum 0.9, the best minibatch; there 250 epochs.

    >>> a, b = (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)) for _ in range(2))
    >>> data = [torch.randn(8, 3)]
    >>> found = straight_through_matching(a, a, b, lambda m, x: m(x).square().mean(), data, example=data[0], epochs=3)
    >>> len(found.history)
    3
    """
    who = "straight_through_matching"
    spec = _spec(spec, model, example, who)
    a, b = _state(a), _state(b)
    sizes = _require_alike([a, b, _state(model)], spec, who)
    work = deepcopy(model)
    where, parameters = _state(work), dict(work.named_parameters(remove_duplicate=False))
    x = {name: (t.detach().clone() if name in parameters else t) for name, t in a.items()}
    optimizer = torch.optim.SGD([x[name] for name in parameters], lr=lr, momentum=momentum)
    perms, best, converged = identities(sizes), None, True
    losses: list[float] = []
    for _ in range(epochs):
        for batch in data:
            run = _ascend(spec, sizes, x, b, perms, generator, max_iter)
            perms, converged = run.permutations, converged and run.converged
            p = apply_permutation(spec, perms, b)
            with torch.no_grad():
                for name, t in where.items():
                    t.copy_(torch.lerp(a[name], p[name].to(a[name]), 0.5) if t.is_floating_point() else a[name])
            work.zero_grad()
            value = loss(work, batch)
            if not isinstance(value, Tensor) or value.numel() != 1 or not bool(value.isfinite()):
                what = describe(value) if isinstance(value, Tensor) else type(value).__name__
                raise BadInput(
                    f"{who} needs a finite scalar from its loss, got {value!r} ({what}) after {len(losses)} batches"
                )
            value.backward()  # type: ignore[no-untyped-call]
            for name, q in parameters.items():
                x[name].grad = None if q.grad is None else q.grad / 2  # the midpoint moves by half of p
            optimizer.step()
            losses.append(float(value.detach()))
            if best is None or losses[-1] < min(losses[:-1]):
                best = perms
    if best is None:
        raise BadInput(f"{who} needs at least one epoch with at least one batch, got {epochs} epochs and no batch")
    wide = _Wide(), _Wide()
    start = _compare(spec, a, b, {}, wide)
    kept = _Run(best, losses, start, converged)
    return _matched(spec, a, b, kept, start.objective, losses, (_compare(spec, a, b, best, wide).objective,))


@dataclass(frozen=True)
class SingularAlignment:
    r"""How far the leading singular vectors of two networks point the same way, layer by layer.

    Attributes:
        scores: R_gamma by gamma, over all layers; 1 for equal networks (with distinct singular values), about 0 for
            unrelated ones.
        layers: the same, by the weight's name.
        counts: the number of singular values a gamma keeps, mean of the two networks.
        values: singular values of each weight in both networks, falling.
    """

    scores: dict[float, float]
    layers: dict[float, dict[str, float]]
    counts: dict[float, float]
    values: dict[str, tuple[Float[Tensor, "r"], Float[Tensor, "r"]]]

    def summary(self) -> str:
        """The finding in plain words."""
        parts = [
            f"{self.scores[g]:.3f} among values from {g:g} of the largest ({self.counts[g]:g})" for g in self.scores
        ]
        return f"Alignment of singular vectors over {len(self.values)} weights: {', '.join(parts)}."

    def plot(self) -> "Figure":
        """R_gamma of every layer (a matplotlib figure)."""
        require_extra("SingularAlignment.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(6, 3.4), layout="constrained")
        ax = fig.subplots()
        for gamma, scores in self.layers.items():
            ax.plot(range(len(scores)), list(scores.values()), "o-", label=f"γ = {gamma:g}")
        ax.axhline(0, color="0.8", lw=0.8)
        ax.set_xticks(range(len(self.values)), list(self.values), rotation=30, ha="right", fontsize=7)
        ax.set(ylabel="alignment of singular vectors")
        ax.legend()
        return fig


def singular_alignment(
    a: nn.Module | State, b: nn.Module | State, *, gammas: Sequence[float] = (0.0, 0.3)
) -> SingularAlignment:
    r"""Measure whether the leading singular vectors of two networks point the same way; give b before and after a match.

    With W_a = sum_i s_i u_i v_i^T of a layer and the same of b,

    .. math:: R_\gamma = \frac{1}{n_\gamma} \sum_\ell \sum_{s_i^a \ge \gamma s_1^a} \sum_{s_j^b \ge \gamma s_1^b}
                         (u_i^a \cdot u_j^b)(v_i^a \cdot v_j^b)

    n_gamma the number of such values, mean of both networks. Reordering multiplies U and V by permutations and leaves
    every s: a match raises sum_ij s_i s_j (u_i . u_j)(v_i . v_j), so it aligns pairs of large values first. Kernels count
    as matrices (out, in * kernel).

    Args:
        a, b: networks of one architecture, modules or state dicts.
        gammas: shares of the largest singular value, each between 0 and 1.
    Returns: a `SingularAlignment`, over all tensors with at least two dimensions (tied ones once each name).
    Raises: BadInput: if names or shapes differ, there is no such tensor, one is not finite, or a gamma is out of range.
    Paper: Ito et al. 2025, arXiv 2402.04051. The score is recalled, not read: which count divides it is ours.

    >>> found = singular_alignment({"w": torch.diag(torch.tensor([2.0, 1]))}, {"w": torch.diag(torch.tensor([2.0, -1]))})
    >>> {gamma: round(score, 6) for gamma, score in found.scores.items()}
    {0.0: 0.0, 0.3: 0.0}
    """
    who = "singular_alignment"
    a, b = _state(a), _state(b)
    names = [name for name, x in a.items() if x.is_floating_point() and x.ndim > 1 and x.numel()]
    if not names:
        raise BadInput(f"{who} needs a weight with at least two dimensions, got none among {len(a)} tensors")
    for gamma in gammas:
        if not 0 <= gamma <= 1:
            raise BadInput(f"{who} needs gammas between 0 and 1, got {gamma}")
    values, sums, counts = {}, {g: {} for g in gammas}, {g: {} for g in gammas}  # type: ignore[var-annotated]
    for name in names:
        _require_same(name, a, b, who)
        (u, s, vt), (w, t, zt) = (
            torch.linalg.svd(_finite(x[name], name, who).double().flatten(1), full_matrices=False) for x in (a, b)
        )
        values[name] = s, t
        same = (u.T @ w) * (vt @ zt.T)
        for g in gammas:
            i, j = int((s >= g * s[0]).sum()), int((t >= g * t[0]).sum())
            sums[g][name], counts[g][name] = float(same[:i, :j].sum()), (i + j) / 2
    return SingularAlignment(
        {g: sum(sums[g].values()) / sum(counts[g].values()) for g in gammas},
        {g: {name: sums[g][name] / counts[g][name] for name in names} for g in gammas},
        {g: sum(counts[g].values()) for g in gammas},
        values,
    )


# -- the ascent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """objective: as in `Matched`. norm: |a| |b| of each tensor. size: |a|^2 + |b|^2 of all floating-point ones; rest: their
    <a, b> where no permutation moves anything; NaN if one moves integers, which count in the objective alone."""

    objective: float
    norm: dict[str, float]
    size: float
    rest: float


@dataclass(frozen=True)
class _Run:
    permutations: dict[str, Tensor]
    history: list[float]
    start: _Start
    converged: bool


def _ascend(
    spec: PermutationSpec,
    sizes: Mapping[str, int],
    a: State,
    b: State,
    first: Permutations,
    generator: Generator | None,
    max_iter: int,
) -> _Run:
    """Coordinate ascent from the permutations `first`; those left out begin with the identity."""
    require_extra("weight_matching", "scipy")
    from scipy.optimize import linear_sum_assignment

    perms, names, wide = dict(first), list(sizes), (_Wide(), _Wide(), _Wide())
    still = identities(sizes)
    start = _compare(spec, a, b, perms, wide)
    products = {p: _Products(spec, a, b, p, sizes[p], wide) for p in names}
    least = {p: TOLERANCE * sum(start.norm[name] for name in products[p].tensors) for p in names}
    history = [start.objective]
    for _ in range(max_iter):
        total, progress = history[-1], False
        for p in (names[i] for i in _shuffled(len(names), generator)):
            if not products[p].moved(perms):
                continue  # nothing it hangs on has moved: it lies best as it lies
            A = products[p].at(perms).cpu()  # A_ij: unit i of a with unit j of b
            order = torch.from_numpy(linear_sum_assignment(A.numpy(), maximize=True)[1])
            gain = float((A.gather(1, order[:, None]) - A.gather(1, perms.get(p, still[p])[:, None])).sum())
            if gain > least[p]:
                perms[p], total, progress = order, total + gain, True
        history.append(total)
        if not progress:
            return _Run(still | perms, history, start, True)
    return _Run(still | perms, history, start, False)


def _compare(spec: PermutationSpec, a: State, b: State, perms: Permutations, wide: "tuple[_Wide, ...]") -> _Start:
    """How two networks lie, b reordered; what is carried does not count."""
    objective, size, rest, norm = 0.0, 0.0, 0.0, {}
    for name, entries in spec.axes.items():
        if name in spec.carried:
            continue
        x, y = (into(t).flatten() for into, t in zip(wide, (a[name], reorder(b[name], entries, perms))))
        both, squares = float(x @ y), (float(x @ x), float(y @ y))
        norm[name] = (squares[0] * squares[1]) ** 0.5
        permuted, number = any(map(names_of, entries)), a[name].is_floating_point()
        objective += both if permuted else 0.0
        size += sum(squares) if number else 0.0
        if number != permuted:
            rest += both if number else math.nan
    return _Start(objective, norm, size, rest)


class _Wide:
    """Tensors in float64, each in the memory of the one before it: fresh memory costs more than the arithmetic."""

    def __init__(self) -> None:
        self.held = torch.empty(0, dtype=torch.float64)

    def __call__(self, x: Tensor, device: torch.device | None = None) -> Tensor:
        if self.held.numel() < x.numel() or self.held.device != (device or x.device):
            self.held = torch.empty(x.numel(), dtype=torch.float64, device=device or x.device)
        return self.held[: x.numel()].view(x.shape).copy_(x)


_Beside = tuple[int, Axis, set[str]]  # an axis of a tensor, its entry, and which other permutations stand there


class _Products:
    """Inner products of a permutation's units, a's with b's, in float64, where the other permutations lie as they lie.

    Once others have moved, only the entries that they moved are multiplied anew. The n x n products are kept for that,
    where the tensors they come from hold at least as many numbers; elsewhere all is multiplied anew.
    """

    def __init__(
        self, spec: PermutationSpec, a: State, b: State, p: str, n: int, wide: tuple[_Wide, _Wide, _Wide]
    ) -> None:
        self.a, self.b, self.n, self.wide = a, b, n, wide
        self.places: list[tuple[Place, list[_Beside]]] = []
        self.vectors: list[str] = []  # biases and the like: many, small and reordered by nothing else
        for place in spec.places[p]:
            if place.tensor in spec.carried:
                continue
            if len(spec.axes[place.tensor]) == 1 and place.n is None:
                self.vectors.append(place.tensor)
            else:
                axes = ((axis, entry, names_of(entry) - {p}) for axis, entry in enumerate(spec.axes[place.tensor]))
                self.places.append((place, [beside for beside in axes if beside[2]]))
        self.beside = {q for _, axes in self.places for _, _, names in axes for q in names}
        self.tensors = [*self.vectors, *dict.fromkeys(place.tensor for place, _ in self.places)]
        self.keep = n * n <= sum(a[name].numel() for name in self.tensors)
        self.kept: Tensor | None = None
        self.others: Permutations | None = None if self.tensors else {}  # as they lay the last time

    def moved(self, perms: Permutations) -> bool:
        """Whether another permutation has moved since the last time, or there was none."""
        return self.others is None or any(perms.get(q) is not self.others.get(q) for q in self.beside)

    def at(self, perms: Permutations) -> Float[Tensor, "n n"]:
        """Unit i of a with unit j of b as given."""
        now = {q: perms[q] for q in self.beside if q in perms}
        A = self.kept
        if A is None:
            A = torch.zeros(self.n, self.n, dtype=torch.float64, device=self.a[self.tensors[0]].device)
            if self.vectors:
                x, y = (torch.stack([s[t].to(A) for t in self.vectors]) for s in (self.a, self.b))
                A.addmm_(x.T, y)
        for place, axes in self.places:
            for factors in self._factors(place, axes, now):
                x, y, *less = (into(t.movedim(place.axis, 0), A.device) for into, t in zip(self.wide, factors))
                y = y.sub_(*less) if less else y
                A.addmm_(_units(x, place), _units(y, place).T)
        self.others, self.kept = now, A if self.keep else None
        return A

    def _factors(self, place: Place, axes: list[_Beside], now: Permutations) -> Iterator[tuple[Tensor, ...]]:
        """What to multiply: a with b, or parts of a with what lies there in b, less what lay there."""
        a, b, old = self.a[place.tensor], self.b[place.tensor], self.others
        if self.kept is None or old is None:
            yield a, _ordered(b, axes, now)
            return
        for i, (axis, entry, names) in enumerate(axes):  # one axis after the other goes from `old` to `now`
            if all(now.get(q) is old.get(q) for q in names):
                continue
            was, lies = (index_of(entry, perms, b.shape[axis]) for perms in (old, now))
            at = (was != lies).nonzero().flatten() if axis != place.axis else torch.arange(len(was))
            parts = [x.index_select(axis, index[at].to(x.device)) for x, index in ((b, lies), (b, was))]
            parts = [_ordered(_ordered(x, axes[:i], now), axes[i + 1 :], old) for x in parts]
            yield a.index_select(axis, at.to(a.device)), *parts


def _ordered(x: Tensor, axes: Sequence[_Beside], perms: Permutations) -> Tensor:
    for axis, entry, names in axes:
        if names & perms.keys():
            x = x.index_select(axis, index_of(entry, perms).to(x.device))
    return x


def _units(x: Tensor, place: Place) -> Float[Tensor, "n rest"]:
    """A tensor with the permuted axis first, as one row a unit of the permutation."""
    n = place.n or len(x)
    if n == len(x):
        return x.flatten(1) if x.ndim > 1 else x[:, None]
    x = x[place.start : place.start + place.outer * n * place.inner]
    return x.reshape(place.outer, n, -1).transpose(0, 1).reshape(n, -1)


def _shuffled(n: int, generator: Generator | None) -> list[int]:
    return torch.randperm(n, generator=generator, device=generator.device if generator else None).tolist()


def _matched(
    spec: PermutationSpec,
    a: State,
    b: State,
    run: _Run,
    before: float,
    history: Sequence[float],
    objectives: tuple[float, ...],
) -> Matched:
    """before: the objective at the identity."""
    new = apply_permutation(spec, run.permutations, b)
    distance = tuple(_distance(spec, a, x, run.start, now) for x, now in ((b, before), (new, max(objectives))))
    new = {name: x.clone() if x is b[name] else x for name, x in new.items()}
    return Matched(run.permutations, new, tuple(history), objectives, (distance[0], distance[1]), run.converged)


def _distance(spec: PermutationSpec, a: State, b: State, start: _Start, objective: float) -> float:
    """By |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b>, unless a and b lie so near that digits cancel."""
    square = start.size - 2 * (objective + start.rest)
    if not square > 1e-3 * start.size:
        wide, square = _Wide(), 0.0
        for name in spec.axes:
            if name not in spec.carried and a[name].is_floating_point():
                apart = wide(a[name]).sub_(b[name].to(a[name].device)).flatten()
                square += float(apart @ apart)
    return square**0.5


def _spread(states: Sequence[State], total: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """Sum over networks of the squared distance to their mean."""
    n = len(states)
    return sum(float((s[name].double() - total[name] / n).square().sum()) for s in states for name in names)


# -- what is given ----------------------------------------------------------------------------------------------------


def _state(x: nn.Module | State) -> dict[str, Tensor]:
    if isinstance(x, nn.Module):
        x = x.state_dict()
    if not isinstance(x, Mapping) or not all(isinstance(t, Tensor) for t in x.values()):
        raise BadInput(f"a network is a module or a state dict of tensors, got {type(x).__name__}")
    return {name: t.detach() for name, t in x.items()}


def _spec(spec: PermutationSpec | None, model: object, example: Batch | None, who: str) -> PermutationSpec:
    if spec is None:
        if not isinstance(model, nn.Module) or example is None:
            raise BadInput(f"{who} needs a PermutationSpec, or a module and an example to trace it on")
        spec = trace_permutations(model, example)
    elif not isinstance(spec, PermutationSpec):
        raise BadInput(f"{who} needs a PermutationSpec, got {type(spec).__name__}")
    if not spec.places:
        why = f" ({'; '.join(spec.notes)})" if spec.notes else ""
        raise BadInput(f"{who} got a spec without any permutation{why}; there is nothing to match")
    require_matchable(spec, who)
    return spec


def _require_alike(states: Sequence[State], spec: PermutationSpec, who: str) -> dict[str, int]:
    first = states[0]
    for other in states[1:]:
        for name in {**first, **other}:
            _require_same(name, first, other, who)
    sizes = spec.sizes(first)
    for state in states:
        for name in spec.axes:
            _finite(state[name], name, who)
    return sizes


def _require_same(name: str, a: State, b: State, who: str) -> None:
    for one, other in ((a, b), (b, a)):
        if name not in one:
            raise BadInput(f"{who} found {name} in one network only{nearest(name, set(one) - set(other))}")
    if a[name].shape != b[name].shape:
        raise BadInput(
            f"{who} needs two networks of one shape; {name} is a {describe(a[name])} and a {describe(b[name])}"
        )


def _finite(x: Tensor, name: str, who: str) -> Float[Tensor, "*shape"]:
    """A tensor without NaN or infinity; integers (counters, indices) are finite as they are."""
    return require_finite(x, who, name) if x.is_floating_point() or x.is_complex() or x.is_meta else x

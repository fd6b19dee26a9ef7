"""Augmentations of weight space: new training examples from networks, some with the same function, some mixed."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from pondera.errors import BadInput, needs_extra
from pondera.weightspace._states import States, count, permute_states
from pondera.weightspace.weight_space_nets import mlp_spec

Aligner = Callable[[dict[str, Tensor], dict[str, Tensor]], Mapping[str, Tensor]]


def flip_signs(states: States, generator: Generator, *, p: float = 0.5) -> dict[str, Tensor]:
    r"""Flip hidden units: what goes in and what comes out of a unit changes sign. The function stays for odd activations.

    .. math:: (w_u, b_u, v_u) \to (-w_u, -b_u, -v_u), \qquad v_u \sigma(w_u x + b_u) \text{ the same where } \sigma(-z) = -\sigma(z)

    such as sin (SIREN) and tanh; not for ReLU.

    Args:
        states: of MLPs: weights (nets, out, in) in the order they are applied, biases (nets, out) after them.
        generator: draws the units, each net's own.
        p: the share of units that flip; 0.5 as in the authors' code.
    Returns: new tensors of the same names and shapes.
    Raises: BadInput: for states that are no such MLPs, or p outside [0, 1].
    Paper: Shamsian et al. 2023, arXiv 2311.08851; 2024, arXiv 2402.04081.

    >>> g = torch.Generator().manual_seed(0)
    >>> s = {"a": torch.ones(1, 2, 1), "b": torch.ones(1, 1, 2)}
    >>> flipped = flip_signs(s, g)
    >>> flipped["a"].flatten().tolist(), flipped["b"].flatten().tolist()
    ([-1.0, 1.0], [-1.0, 1.0])
    """
    _share("flip_signs", p)
    return _units(states, "flip_signs", lambda w: 1 - 2 * (_uniform(w.shape[:2], w, generator) < p).to(w.dtype))


def shift_phases(states: States, generator: Generator, *, w0: float = 30.0, most: int = 4) -> dict[str, Tensor]:
    r"""Move the phases of a SIREN's units by half periods, and flip what comes out of odd ones. The function stays.

    .. math:: b_u \to b_u + k \pi / \omega_0, \quad v_u \to (-1)^k v_u, \qquad \sin(z + k \pi) = (-1)^k \sin(z)

    Args:
        states: of SIRENs x -> sin(w0 (W x + b)), every hidden layer with a bias; the last layer linear.
        generator: draws k for each unit.
        w0: the frequency their activation multiplies by.
        most: k is drawn from -most to most - 1; 4 as in the authors' code.
    Returns, Raises, Paper: as `flip_signs`; BadInput also where a hidden layer has no bias.

    >>> s = {"a": torch.ones(1, 2, 1), "c": torch.zeros(1, 2), "b": torch.ones(1, 1, 2)}
    >>> moved = shift_phases(s, torch.Generator().manual_seed(0), w0=math.pi)
    >>> moved["c"].tolist(), moved["b"].flatten().tolist()
    ([[0.0, 3.0]], [1.0, -1.0])
    """
    who = "shift_phases"
    if not (w0 > 0 and math.isfinite(w0)) or most < 1:
        raise BadInput(f"{who} needs w0 above 0 and most of at least 1, got {w0} and {most}")
    layers = _layers(states, who)
    out = dict(states)
    for (w, b), (after, _) in pairwise(layers):
        if b is None:
            raise BadInput(f"{who} moves biases, and the hidden layer {w} has none")
        x = states[b]
        k = torch.randint(-most, most, x.shape, generator=generator, device=generator.device).to(x.device)
        out[b] = out[b] + k.to(x.dtype) * (math.pi / w0)  # in the precision of the states
        out[after] = out[after] * (1 - 2 * (k % 2)).to(x.dtype).unsqueeze(1)
    return out


def scale_units(states: States, generator: Generator, *, spread: float = 0.5) -> dict[str, Tensor]:
    r"""Multiply what goes into a hidden unit by s > 0 and what comes out by 1 / s. The function stays for ReLU.

    .. math:: (w_u, b_u, v_u) \to (s w_u, s b_u, v_u / s), \qquad \log s \sim U(-r, r)

    Args:
        states: of MLPs with positively homogeneous activations (ReLU, leaky ReLU), as in `flip_signs`.
        generator: draws s for each unit.
        spread: r, above 0; ours (the older code of the authors has such a scale, its size could not be looked up).
    Returns, Raises, Paper: as `flip_signs`.

    >>> s = {"a": torch.ones(1, 2, 1), "b": torch.ones(1, 1, 2)}
    >>> scaled = scale_units(s, torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(scaled["b"] @ scaled["a"], s["b"] @ s["a"]))
    True
    """
    if not (spread > 0 and math.isfinite(spread)):
        raise BadInput(f"scale_units needs a spread above 0, got {spread}")
    return _units(
        states, "scale_units", lambda w: ((2 * _uniform(w.shape[:2], w, generator) - 1) * spread).exp(), inverse=True
    )


def move_inputs(
    states: States, generator: Generator, *, rotate: float = 30.0, scale: float = 0.2, translate: float = 0.25
) -> dict[str, Tensor]:
    r"""Turn, stretch and shift what networks hold: the first layer reads A x + t in place of x. Labels stay, functions do not.

    .. math:: W_1 \to W_1 A, \quad b_1 \to b_1 + W_1 t, \qquad A = s R_\theta

    with :math:`\theta \sim U(\pm r)`, :math:`s \sim 1 + U(\pm c)` and :math:`t \sim U(\pm d)^n`.

    Args:
        states: of MLPs as in `flip_signs`; of implicit representations, whose inputs are coordinates.
        generator: draws one transform a network.
        rotate: r, in degrees; 0 where the inputs are not two coordinates.
        scale, translate: c in [0, 1) and d, at least 0. The defaults are those of the authors' code, which has them as three
            augmentations, and may shift deeper layers too, which moves nothing exactly.
    Returns, Raises, Paper: as `flip_signs`; BadInput also for a rotation of other than two inputs, and a shift without a bias.

    >>> s = {"a": torch.eye(2).unsqueeze(0), "c": torch.zeros(1, 2)}
    >>> turned = move_inputs(s, torch.Generator().manual_seed(0), scale=0, translate=0)["a"][0]
    >>> bool(torch.allclose(turned @ turned.T, torch.eye(2), atol=1e-6))
    True
    """
    who = "move_inputs"
    if not (0 <= scale < 1 and translate >= 0 and math.isfinite(rotate + translate)):
        raise BadInput(
            f"{who} needs scale in [0, 1), translate of at least 0 and finite numbers, got {scale}, {translate}, {rotate}"
        )
    w, b = _layers(states, who)[0]
    x = states[w]
    nets, _, n = x.shape
    if rotate and n != 2:
        raise BadInput(f"{who} turns two coordinates, and {w} reads {n}; give rotate=0")
    if translate and b is None:
        raise BadInput(f"{who} shifts by the first bias, and {w} has none; give translate=0")
    draw = 2 * _uniform((nets, 2 + n), x, generator) - 1
    angle, size, t = draw[:, 0] * math.radians(rotate), 1 + scale * draw[:, 1], translate * draw[:, 2:]
    out = dict(states)
    if b is not None:
        out[b] = states[b] + torch.einsum("nji,ni->nj", x, t)
    if rotate:
        c, s = angle.cos(), angle.sin()
        x = x @ torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
    out[w] = x * size.view(-1, 1, 1)
    return out


def add_noise(states: States, generator: Generator, *, scale: float = 0.1) -> dict[str, Tensor]:
    """Normal noise on every entry, as large as `scale` times the deviation of its tensor, network by network.

    Args:
        states: any batch of states.
        generator: draws the noise.
        scale: at least 0. 0.1 as in the older code of the authors, whose noise however is one constant a tensor; the later one
            has 0.32, which on small SIRENs is more than the signal.
    Returns: new tensors of the same names and shapes.
    Raises: BadInput: for a negative scale.
    Paper: Shamsian et al. 2023, arXiv 2311.08851.

    >>> noisy = add_noise({"w": torch.tensor([[1.0, 3.0]])}, torch.Generator().manual_seed(0))["w"]
    >>> bool((noisy - torch.tensor([1.0, 3.0])).abs().max() < 0.5)
    True
    """
    if not (scale >= 0 and math.isfinite(scale)):
        raise BadInput(f"add_noise needs a scale of at least 0, got {scale}")
    count(states, "add_noise")
    out = {}
    for name, x in states.items():
        z = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
        flat = x.flatten(1)
        std = flat.float().std(1) if flat.shape[1] > 1 else torch.zeros(len(x), device=x.device)  # one has no deviation
        out[name] = x + scale * std.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) * z
    return out


def drop_weights(states: States, generator: Generator, *, p: float = 0.1) -> dict[str, Tensor]:
    """Set a share p of all entries to 0, and the others up by 1 / (1 - p).

    Args:
        states: any batch of states.
        generator: draws the entries.
        p: in [0, 1); 0.1 as in the authors' code.
    Returns: new tensors of the same names and shapes.
    Raises: BadInput: for p outside [0, 1).
    Paper: Shamsian et al. 2023, arXiv 2311.08851.

    >>> drop_weights({"w": torch.ones(1, 4)}, torch.Generator().manual_seed(0), p=0.5)["w"]
    tensor([[0., 2., 0., 0.]])
    """
    _share("drop_weights", p, below=True)
    count(states, "drop_weights")
    return {name: x.masked_fill(_uniform(x.shape, x, generator) < p, 0) / (1 - p) for name, x in states.items()}


def drop_smallest(states: States, generator: Generator, *, q: float = 0.1) -> dict[str, Tensor]:
    """Set each network's smallest entries to 0: those below the quantile of sizes over all tensors, drawn from U(0, q).

    Args:
        states: any batch of states.
        generator: draws one quantile a network.
        q: in [0, 1]; 0.1 as in the authors' code.
    Returns: new tensors of the same names and shapes.
    Raises: BadInput: for q outside [0, 1].
    Paper: Shamsian et al. 2023, arXiv 2311.08851 (there "quantile").

    >>> drop_smallest({"w": torch.tensor([[4.0, -1.0, 2.0, 3.0]])}, torch.Generator().manual_seed(0), q=1.0)["w"]
    tensor([[4., 0., 0., 3.]])
    """
    _share("drop_smallest", q)
    nets = count(states, "drop_smallest")
    sizes = torch.cat([x.detach().abs().flatten(1).float() for x in states.values()], 1).sort(1).values
    at = (
        q * _uniform((nets, 1), sizes, generator) * (sizes.shape[1] - 1)
    )  # linear between order statistics, as torch.quantile
    low = sizes.gather(1, at.floor().long())
    edge = low + (at - at.floor()) * (sizes.gather(1, at.ceil().long()) - low)
    return {name: x.masked_fill(x.abs() < edge.view(-1, *[1] * (x.ndim - 1)), 0) for name, x in states.items()}


def weight_mixup(
    states: States,
    generator: Generator,
    *,
    align: str | Aligner = "match",
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[dict[str, Tensor], Float[Tensor, "nets"], Int[Tensor, "nets"]]:
    r"""MixUp of networks: each with another of the batch, whose hidden units may first be put in an order that fits.

    .. math:: w = \alpha w_i + (1 - \alpha) \, \pi(w_j), \qquad \alpha \sim U(l, h)

    The loss is mixed alike: `alpha * loss(out, y) + (1 - alpha) * loss(out, y[partner])`, network by network.

    Args:
        states: any batch of states ("match": of MLPs as in `flip_signs`).
        generator: draws partners and alpha, one a network.
        align: "match", the paper's: the partner by `match_states`; "random": the partner in a random order; "none": as it is;
            or a function of (partners, states) that gives the partners aligned to the states.
        low, high: of alpha, within [0, 1]; 0 and 1 as in the authors' code.
    Returns: the mixed states, alpha, and the index of each network's partner.
    Raises: BadInput: for another word, bounds out of order.
    Paper: Shamsian et al. 2023, arXiv 2311.08851; 2024, arXiv 2402.04081 (there by Git Re-Basin, without signs).

    >>> s = {"a": torch.tensor([[[1.0], [2.0]], [[2.0], [1.0]]]), "b": torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]]])}
    >>> mixed, alpha, partner = weight_mixup(s, torch.Generator().manual_seed(1))  # a network and its permuted copy
    >>> bool(torch.allclose(mixed["a"], s["a"]))
    True
    """
    nets = count(states, "weight_mixup")
    if not 0 <= low <= high <= 1:
        raise BadInput(f"weight_mixup needs 0 <= low <= high <= 1, got {low} and {high}")
    partner = torch.randperm(nets, generator=generator, device=generator.device)
    first = next(iter(states.values()))
    alpha = low + (high - low) * _uniform((nets,), first, generator)
    other: Mapping[str, Tensor] = {name: x[partner.to(x.device)] for name, x in states.items()}
    if align == "match":
        other = match_states(other, states)
    elif align == "random":
        other = permute_states(mlp_spec({name: x[0] for name, x in states.items()}), other, generator)
    elif callable(align):
        other = align(dict(other), dict(states))
    elif align != "none":
        raise BadInput(f"weight_mixup aligns by match, random, none or a function, got {align!r}")
    mixed = {}
    for name, x in states.items():
        a = alpha.to(x).view(-1, *[1] * (x.ndim - 1))
        mixed[name] = a * x + (1 - a) * other[name]
    return mixed, alpha, partner.to(first.device)


@torch.no_grad()
def match_states(states: States, to: States, *, signed: bool = False, sweeps: int = 20) -> dict[str, Tensor]:
    r"""Every MLP of a batch with its hidden units in the order (and sign) that brings it nearest to its counterpart.

    Layer after layer, until no order changes (Git Re-Basin's weight matching, from the order as it is): the permutation of largest

    .. math:: \langle P, \; W_i^{to} W_i^\top + b_i^{to} b_i^\top + W_{i+1}^{to \top} W_{i+1} \rangle

    with the orders of the neighbours as they stand, an assignment problem. The distance never grows.

    Args:
        states: of MLPs as in `flip_signs`.
        to: as many of the same shapes.
        signed: units may also flip, as odd activations allow: assigned by |.|, flipped where the entry is negative. Ours.
        sweeps: the most rounds through the layers.
    Returns: new tensors of the same names and shapes.
    Raises: BadInput: for states that are no MLPs, or differ in names or shapes; NaN.
    Paper: Ainsworth et al. 2022, arXiv 2209.04836 (the algorithm); Shamsian et al. 2023, arXiv 2311.08851 (its use here).

    >>> a = {"a": torch.tensor([[[1.0], [2.0]]]), "b": torch.tensor([[[3.0, 4.0]]])}
    >>> match_states({"a": a["a"].flip(1), "b": a["b"].flip(2)}, a)["a"].flatten().tolist()
    [1.0, 2.0]
    """
    who = "match_states"
    with needs_extra(who):
        from scipy.optimize import linear_sum_assignment

    layers = _layers(states, who)
    if {n: x.shape for n, x in states.items()} != {n: x.shape for n, x in to.items()}:
        raise BadInput(f"{who} needs two batches of the same names and shapes")
    out = dict(states)
    for _ in range(sweeps):
        changed = False
        for (w, b), (after, _) in pairwise(layers):
            score = (to[w] @ out[w].mT + to[after].mT @ out[after]).double()
            if b is not None:
                score = score + to[b].unsqueeze(2) * out[b].unsqueeze(1)
            table = score.cpu().numpy()
            if not np.isfinite(table).all():
                raise BadInput(f"{who} needs finite weights, got NaN or infinity in {w} or {after}")
            gain = np.abs(table) if signed else table
            order = torch.from_numpy(np.stack([linear_sum_assignment(one, maximize=True)[1] for one in gain]))
            at = order.to(score.device)
            new = score.gather(2, at.unsqueeze(2)).squeeze(2)
            old = score.diagonal(dim1=1, dim2=2)
            flip = torch.where(new < 0, -1.0, 1.0) if signed else torch.ones_like(new)
            better = (new * flip).sum(1) > old.sum(1) * (1 + 1e-9) + 1e-12  # ties keep the order there is
            if not bool(better.any()):
                continue
            changed = True
            at = torch.where(better.unsqueeze(1), at, torch.arange(at.shape[1], device=at.device))
            flip = torch.where(better.unsqueeze(1), flip, 1.0).to(out[w].dtype)
            out[w] = out[w].gather(1, at.unsqueeze(2).expand_as(out[w])) * flip.unsqueeze(2)
            out[after] = out[after].gather(2, at.unsqueeze(1).expand_as(out[after])) * flip.unsqueeze(1)
            if b is not None:
                out[b] = out[b].gather(1, at) * flip
        if not changed:
            break
    return out


def _layers(states: States, who: str) -> list[tuple[str, str | None]]:
    """Names of weight and bias, layer by layer. Raises: BadInput: for what is no chain of linear layers."""
    count(states, who)
    try:
        mlp_spec({name: x[0] for name, x in states.items()})
    except BadInput as error:
        raise BadInput(f"{who} needs states of MLPs: {error}") from None
    names = list(states)
    following = [*names[1:], None]
    pairs = zip(names, following, strict=True)
    return [(n, m if m is not None and states[m].ndim == 2 else None) for n, m in pairs if states[n].ndim == 3]


def _units(states: States, who: str, draw: Callable[[Tensor], Tensor], inverse: bool = False) -> dict[str, Tensor]:
    """Every hidden unit's incoming weights and bias times a factor, its outgoing ones times it (or one over it)."""
    layers = _layers(states, who)
    out = dict(states)
    for (w, b), (after, _) in pairwise(layers):
        s = draw(states[w])
        out[w] = out[w] * s.unsqueeze(2)
        if b is not None:
            out[b] = out[b] * s
        out[after] = out[after] * (1 / s if inverse else s).unsqueeze(1)
    return out


def _uniform(shape: Sequence[int], like: Tensor, generator: Generator) -> Tensor:
    return torch.rand(tuple(shape), generator=generator, device=generator.device).to(like)


def _share(who: str, p: float, below: bool = False) -> None:
    if not (0 <= p < 1 or (p == 1 and not below)):
        raise BadInput(f"{who} needs a share in [0, 1{')' if below else ']'}, got {p}")

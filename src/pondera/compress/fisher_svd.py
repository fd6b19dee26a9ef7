"""Fisher-weighted SVD: cut a layer's rank where the loss feels it least, by a Kronecker-factored Fisher information."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera._batch import in_eval_mode
from pondera.compress._calibration import Loss, batches_of, forward, grams, inputs_of, linear_layers, mean_loss
from pondera.compress._report import CompressReport, LayerChange
from pondera.compress.low_rank import LowRankLinear, replace_linear
from pondera.errors import BadInput, describe, require_finite, require_matrix

Kind = Literal["nearest", "kfac", "rows", "activations", "scales", "none"]
NEED_GRADIENTS = ("nearest", "kfac", "rows")
Pair = tuple[Tensor | None, Tensor | None]  # A and B; None is the identity
WHO = "fisher_svd"


def fisher_svd(
    model: nn.Module,
    calibration: Sequence[Any],
    keep: float = 0.8,
    *,
    loss: Loss,
    factors: Kind | Mapping[str, Pair] = "nearest",
    rank: int | Mapping[str, int] | None = None,
    damping: float = 1e-3,
    per_sample: bool = True,
    only: str = "*",
    head: bool = False,
) -> CompressReport:
    r"""Replace linear layers by two thin ones, truncated in the metric of the loss (GFWSVD), in place.

    With G_k the gradient of the loss of sample k with respect to a weight W (out, in), the observed Fisher information
    is F = (1/K) sum_k vec(G_k) vec(G_k)', and to second order a change D of W costs

    .. math:: \tfrac12 \frac1K \sum_k \langle G_k, D \rangle^2 \approx \tfrac12 \operatorname{tr}(D' B D A),
              \qquad F \approx A \otimes B

    with A (in, in) and B (out, out) the nearest Kronecker product (`nearest_kronecker`). The best weight of rank r in this
    metric is a truncated SVD between Cholesky factors (`weighted_svd`). Other choices of A and B are the known rivals.

    Args:
        model: changed in place: each plain `nn.Linear` whose rank pays becomes a `LowRankLinear`; the bias stays as it is.
        calibration: batches as `loss` takes them. The first dimension of what a layer reads counts the samples.
        keep: share of a layer's numbers to keep: r = floor(keep * out * in / (out + in)), at least 1 (the authors' code
            rounds up, on request to a multiple of 8). Layers that this would not make smaller stay. 0.8 is the abstract's
            "20 % compression".
        loss: `loss(model, batch)`, a scalar, a mean over the batch's samples.
        factors: where A and B come from, one of the words of `fisher_factors`, or what it gave: several ranks can be tried
            on factors made once.
        rank: r in the place of what `keep` gives, for all layers or by the layer's name (others stay).
        damping: added to A and to B, as a share of the mean of its diagonal. 1e-3 is ours; the authors' code blends in 0.2
            and more, and only where Cholesky's factorization fails, as it does with fewer samples than features.
        per_sample: as `fisher_factors` takes it.
        only: pattern of the names of the layers to take.
        head: whether the last linear layer is taken as well (the authors leave it out).
    Returns: the report. Its facts: `loss_before`, `loss_after`, `measured` (their difference) and, where every layer has
        both factors, `predicted`: half the trace above, summed over the layers, without damping.
    Raises: BadInput: for a share, rank or word out of range, data the loss cannot be taken of, or gradients with NaN. The
        model is then as it was.
    Paper: Chekalina et al. 2025, arXiv 2505.17974. From the abstract and the authors' code (sayankotor/FisherKronecker); the
        body of the paper was not read. Their per-layer ranks by a table of sensitivities go into `rank`.

    >>> net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> data = [(torch.randn(8, 16), torch.randint(3, (8,))) for _ in range(2)]
    >>> report = fisher_svd(net, data, 0.5, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    >>> net[0].rank, report.layers[0].numbers
    (4, 128)
    """
    batches, layers = batches_of(calibration, WHO), linear_layers(model, WHO, only, head)
    if not (isinstance(damping, (int, float)) and 0 <= damping < float("inf")):
        raise BadInput(f"{WHO} needs a damping of at least 0, got {damping!r}")
    ranks = _ranks(layers, keep, rank)
    taken = {name: m for name, m in layers.items() if name in ranks}
    before = mean_loss(model, batches, WHO, loss)
    if isinstance(factors, Mapping):
        if lacking := [name for name in taken if name not in factors]:
            raise BadInput(
                f"{WHO} needs factors for the layer {lacking[0]}, got them for {', '.join(list(factors)[:6])}"
            )
        pairs = dict(factors)
    else:
        pairs = _factors(model, taken, batches, factors, loss, per_sample, WHO)
    new, rows, predicted = {}, [], []
    for name, m in layers.items():
        w = m.weight.detach()
        was = float(w.numel() * w.element_size() * 8)
        if name not in ranks:
            rows.append(LayerChange(f"{name}.weight", "kept", tuple(w.shape), w.numel(), was, was))
            continue
        up, down = weighted_svd(w, *(_damped(x, damping) for x in pairs[name]), rank=ranks[name])
        with torch.random.fork_rng():  # a new layer draws its start first
            made = LowRankLinear.from_factors(up.to(w.dtype), down.to(w.dtype), m.bias)
        made.requires_grad_(m.weight.requires_grad)
        d = (made.up.double() @ made.down.double()).detach() - w.double()
        predicted.append(_cost(d, *pairs[name]))
        n = made.up.numel() + made.down.numel()
        lost = float(d.norm() / w.double().norm()) if w.any() else 0.0
        rows.append(
            LayerChange(
                f"{name}.weight",
                "factored",
                tuple(w.shape),
                n,
                n * was / w.numel(),
                was,
                lost,
                facts={"rank": made.rank},
            )
        )
        new[name] = made
    old: dict[str, nn.Module] = dict(taken)
    replace_linear(model, new)
    try:
        after = mean_loss(model, batches, WHO, loss)
    except BaseException:
        replace_linear(model, old)
        raise
    facts = {"loss_before": before, "loss_after": after, "measured": after - before}
    told = [x for x in predicted if x is not None]
    return CompressReport(WHO, rows, facts | ({"predicted": sum(told)} if len(told) == len(taken) else {}))


def fisher_factors(
    model: nn.Module,
    calibration: Sequence[Any],
    factors: Kind = "nearest",
    *,
    loss: Loss,
    per_sample: bool = True,
    only: str = "*",
    head: bool = False,
) -> dict[str, Pair]:
    r"""A (in, in) and B (out, out) of each linear layer, in whose metric `fisher_svd` truncates. None is the identity.

    Args:
        model: looked at; nothing of it changes.
        calibration, loss, only, head: as of `fisher_svd`.
        factors: with x what a layer reads and g the gradient of its output,
            "nearest": the paper's, `nearest_kronecker` of the samples' gradients G_k.
            "kfac": A = E[xx'], B = E[gg'], as if the two were independent.
            "rows": A = I, B diagonal: sums over rows of the mean squared gradients (FWSVD).
            "activations": A = E[xx'], B = I (the whitening of SVD-LLM).
            "scales": A diagonal: mean |x| of each input, B = I (ASVD at its exponent of 1/2).
            "none": A = B = I, the plain SVD.
        per_sample: False takes one gradient a batch, which is cheaper; it mixes the samples' gradients before they are squared.
    Returns: a pair for each layer, by its name.
    Raises: BadInput: for an unknown word, data the loss cannot be taken of, or gradients with NaN.
    Memory: "nearest" and "rows" hold K gradients of every layer; "kfac" and "activations" two matrices a layer.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    >>> data = [(torch.randn(8, 4), torch.randint(2, (8,)))]
    >>> a, b = fisher_factors(net, data, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))["0"]
    >>> a.shape, b.shape
    (torch.Size([4, 4]), torch.Size([3, 3]))
    """
    who = "fisher_factors"
    batches, layers = batches_of(calibration, who), linear_layers(model, who, only, head)
    return _factors(model, layers, batches, factors, loss, per_sample, who)


@torch.no_grad()
def weighted_svd(
    weight: Float[Tensor, "out in"],
    a: Float[Tensor, "in in"] | None = None,
    b: Float[Tensor, "out out"] | None = None,
    *,
    rank: int,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    r"""The factors of rank r that minimise tr((W - W_r)' B (W - W_r) A).

    .. math:: A = L_A L_A', \quad B = L_B L_B', \quad L_B' W L_A = U S V',
              \quad \text{up} = L_B^{-\top} U_r S_r^{1/2}, \quad \text{down} = S_r^{1/2} V_r' L_A^{-1}

    The minimum is the sum of the squares of the singular values left out.

    Args:
        weight: W.
        a, b: symmetric and positive definite; None is the identity, and both None the plain SVD.
        rank: r, 1 to min(out, in).
    Returns: up and down, float64 (the Cholesky factors of badly conditioned A and B need it).
    Raises: BadInput: for shapes that do not fit, a rank out of range, NaN, or a matrix that is not positive definite.

    >>> up, down = weighted_svd(torch.diag(torch.tensor([2.0, 1.0])), torch.diag(torch.tensor([1.0, 9.0])), rank=1)
    >>> (up @ down).abs().round()
    tensor([[0., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    w = require_finite(require_matrix(weight, "weighted_svd"), "weighted_svd", "weight").double()
    if w.ndim != 2:
        raise BadInput(f"weighted_svd needs a weight (out, in), got a {describe(weight)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(w.shape):
        raise BadInput(f"weighted_svd needs a rank of 1 to {min(w.shape)} for {tuple(w.shape)}, got {rank!r}")
    la, lb = _cholesky(a, w.shape[1], "A"), _cholesky(b, w.shape[0], "B")
    middle = w if la is None else w @ la
    middle = middle if lb is None else lb.mT @ middle
    u, s, vh = torch.linalg.svd(middle, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    if lb is not None:
        up = torch.linalg.solve_triangular(lb.mT, up, upper=True)
    if la is not None:
        down = torch.linalg.solve_triangular(la, down, upper=False, left=False)
    return up, down


@torch.no_grad()
def nearest_kronecker(
    grads: Float[Tensor, "K out in"], *, steps: int = 100, tol: float = 1e-6
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
    r"""A and B of the Kronecker product nearest to (1/K) sum_k vec(G_k) vec(G_k)', without forming either.

    Rearranged, that matrix is (1/K) sum_k G_k \otimes G_k, and the nearest product its leading singular pair (Van Loan and
    Pitsianis 1993). Alternating power steps from B = I,

    .. math:: A \leftarrow \frac1K \sum_k G_k' B G_k, \quad A \leftarrow A / \lVert A \rVert_F, \qquad
              B \leftarrow \frac1K \sum_k G_k A G_k',

    keep both positive semidefinite, so the signs cannot come out wrong as they can from a Krylov solver, which the authors use.
    The first step alone gives the means of G'G and GG'.

    Args:
        grads: G_k, one a sample.
        steps: at most so many. The authors ask scipy's `svds` for three triples and use the first.
        tol: stop when A changes by less, in its norm of 1.
    Returns: A of Frobenius norm 1, and B, in the gradients' dtype (float32 for halves).
    Raises: BadInput: for another shape, NaN, or gradients that are all 0 (then any A will do).
    Cost: K (out^2 in + out in^2) multiplications a step, and no memory beyond the gradients'.

    >>> g = torch.tensor([[[1.0, 2.0], [2.0, 4.0]]])
    >>> a, b = nearest_kronecker(g)
    >>> a
    tensor([[0.2000, 0.4000],
            [0.4000, 0.8000]])
    """
    if not isinstance(grads, Tensor) or grads.ndim != 3 or not grads.numel():
        what = describe(grads) if isinstance(grads, Tensor) else type(grads).__name__
        raise BadInput(f"nearest_kronecker needs gradients (K, out, in), got {what}")
    g = require_finite(grads, "nearest_kronecker", "gradients")
    g = g.float() if g.element_size() < 4 else g
    k, out, _ = g.shape
    scale = g.norm()
    if not scale:
        raise BadInput(f"nearest_kronecker needs gradients that are not all 0, got {k} of them")
    g = g * (k**0.5 / scale)
    tall, wide = g.flatten(0, 1), g.mT.flatten(0, 1)  # (K out, in), (K in, out)
    a, b = torch.zeros_like(tall[:1].mT @ tall[:1]), torch.eye(out, dtype=g.dtype, device=g.device)
    for _ in range(steps):
        new = tall.mT @ (b @ g).flatten(0, 1) / k
        new = new / new.norm()
        b = wide.mT @ (new @ g.mT).flatten(0, 1) / k
        a, moved = new, (new - a).norm()
        if moved < tol:
            break
    return (a + a.mT) / 2, (b + b.mT) / 2 * (scale**2 / k)


def _factors(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: list[Any],
    factors: str,
    loss: Loss,
    per_sample: bool,
    who: str,
) -> dict[str, Pair]:
    if factors not in get_args(Kind):
        raise BadInput(f"{who} knows the factors {', '.join(get_args(Kind))}, got {factors!r}")
    found: dict[str, Pair] = dict.fromkeys(layers, (None, None))
    if not layers or factors == "none":
        return found
    if factors == "activations":
        return {name: (a, None) for name, a in grams(model, layers, batches, who, loss).items()}
    if factors == "scales":
        read = inputs_of(model, layers, batches, who, loss)
        return {name: (x.double().abs().mean(0).diag(), None) for name, x in read.items()}
    pieces = _backward(model, layers, batches, loss, who, reduce=_moments if factors == "kfac" else _gradients)
    for name in layers:
        each = pieces.pop(name)
        if factors == "kfac":
            xx, gg, places, samples = (sum(x) for x in zip(*each))
            # B summed over a sample's places, each taken as independent of the others
            found[name] = xx / places, require_finite(gg, who, f"gradients of {name}") / samples
            continue
        g = torch.cat([x for (x,) in each] if per_sample else [x.mean(0, keepdim=True) for (x,) in each])
        require_finite(g, who, f"gradients of {name}")
        if factors == "rows":
            found[name] = None, g.double().square().mean(0).sum(1).diag()
        elif g.any():
            found[name] = nearest_kronecker(g)
    return found


Reduce = Callable[[Tensor, Tensor], tuple[Any, ...]]


def _moments(x: Float[Tensor, "n places in"], g: Float[Tensor, "n places out"]) -> tuple[Any, ...]:
    samples, x, g = len(x), x.flatten(0, 1), g.flatten(0, 1)
    return (x.mT @ x).double(), (g.mT @ g).double(), len(x), samples


def _gradients(x: Float[Tensor, "n places in"], g: Float[Tensor, "n places out"]) -> tuple[Any, ...]:
    return (g.mT @ x,)


def _backward(
    model: nn.Module, layers: Mapping[str, nn.Linear], batches: list[Any], loss: Loss, who: str, reduce: Reduce
) -> dict[str, list[tuple[Any, ...]]]:
    """What `reduce` makes of each layer's inputs and of its output's gradients (of one sample's loss), batch by batch.

    A layer called several times in one pass comes with its calls side by side, as places. No parameter gets a gradient.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            probe = torch.zeros_like(out, requires_grad=True)  # a tensor of its own: what follows may work in place
            calls.setdefault(name, []).append((args[0].detach(), probe))
            return out + probe

        return hook

    found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in layers}
    hooks = [m.register_forward_hook(watch(name)) for name, m in layers.items()]
    try:
        with in_eval_mode(model), torch.random.fork_rng(), torch.enable_grad():
            for batch in batches:
                calls.clear()
                value = forward(model, batch, who, loss)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    what = describe(value) if isinstance(value, Tensor) else type(value).__name__
                    raise BadInput(f"{who} needs a loss that is one number with a gradient, got {what}")
                if silent := [name for name in layers if name not in calls]:
                    raise BadInput(
                        f"{who} saw nothing reach the layer {silent[0]} in the calibration data; leave it out by only="
                    )
                probes = [p for each in calls.values() for _, p in each]
                grads = iter(torch.autograd.grad(value.squeeze(), probes, allow_unused=True))
                for name, each in calls.items():
                    x = torch.cat([_three(x) for x, _ in each], 1)
                    g = torch.cat(
                        [_three(torch.zeros_like(p) if d is None else d) for (_, p), d in zip(each, grads)], 1
                    )
                    found[name].append(reduce(x, g * len(g)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _three(x: Tensor) -> Float[Tensor, "samples places features"]:
    x = x.float() if x.element_size() < 4 else x
    return x.reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])


def _cost(d: Tensor, a: Tensor | None, b: Tensor | None) -> float | None:
    """The loss that a change of the weight is predicted to add; None without both factors."""
    return None if a is None or b is None else 0.5 * float((d @ a.double() * (b.double() @ d)).sum())


def _damped(x: Tensor | None, damping: float) -> Tensor | None:
    """Plus a share of the mean of its diagonal; None, the identity, where nothing was seen."""
    if x is None or not (mean := float(x.diagonal().mean())) > 0:
        return None
    return x.double() + damping * mean * torch.eye(len(x), dtype=torch.float64, device=x.device)


def _cholesky(x: Tensor | None, n: int, what: str) -> Tensor | None:
    if x is None:
        return None
    if x.shape != (n, n):
        raise BadInput(f"weighted_svd needs {what} of shape {(n, n)}, got a {describe(x)}")
    lower, failed = torch.linalg.cholesky_ex(require_finite(x, "weighted_svd", what).double())
    if failed:
        raise BadInput(
            f"weighted_svd needs a positive definite {what}, and the given one is not in its first {int(failed)} rows; raise damping"
        )
    return lower


def _ranks(layers: Mapping[str, nn.Linear], keep: float, rank: int | Mapping[str, int] | None) -> dict[str, int]:
    """The rank of every layer that is factored."""
    if isinstance(rank, Mapping) and (unknown := [name for name in rank if name not in layers]):
        raise BadInput(f"{WHO} found no layer {unknown[0]!r} among those it takes: {', '.join(list(layers)[:6])}")
    if rank is None and not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise BadInput(f"{WHO} needs a share to keep above 0 and at most 1, got {keep!r}")
    found = {}
    for name, m in layers.items():
        out, inner = m.weight.shape
        r = rank.get(name) if isinstance(rank, Mapping) else rank
        if r is None:
            if isinstance(rank, Mapping):
                continue
            r = max(1, int(keep * out * inner / (out + inner)))
            if r * (out + inner) >= out * inner:
                continue
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= min(out, inner):
            raise BadInput(f"{WHO} needs a rank of 1 to {min(out, inner)} for {name}, got {r!r}")
        found[name] = r
    return found

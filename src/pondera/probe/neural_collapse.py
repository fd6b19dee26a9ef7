"""Neural collapse: how far features and classifier have become one point a class, and what they end as in linear heads."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pondera._weights import is_gpt_conv1d
from pondera.errors import BadInput, describe, nearest, require_extra, require_finite
from pondera.probe._untouched import require_model, run, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
WHO = "neural_collapse"


@dataclass(frozen=True)
class NeuralCollapse:
    """How collapsed the features before a classifier are.

    Full collapse is within = 0 and nearest = 1 with either `simplex` and the first of `duality` at 0 (a simplex), or
    `orthogonal` and the second of `duality` (an orthogonal frame). Below, W are the classifier's rows, M the class means
    and M_c the means minus the mean of all features, as matrices of one row a class; a distance is `frame_distance`.

    Attributes:
        within: NC1, tr(S_W S_B^+) / K: scatter within classes by scatter between them.
        simplex: NC2 for W and for M_c: distance of the Gram matrix to that of a simplex, I - 11^T / K.
        orthogonal: NC2 for W and for M: distance of the Gram matrix to its own diagonal, an orthogonal frame of any
            lengths.
        duality: NC3, distance between W and M_c, and root mean square over classes of the distance between the
            directions of w_k and mu_k (which allows lengths of their own).
        nearest: NC4, share of the examples that the classifier gives to the class of the nearest mean.
        weight_gram, mean_gram: W W^T and M M^T; their diagonals hold the squared lengths.
        counts: examples of each class.
        classes: the classes that occur, in the order of the rows above.
    """

    within: Float[Tensor, ""]
    simplex: Float[Tensor, "2"]
    orthogonal: Float[Tensor, "2"]
    duality: Float[Tensor, "2"]
    nearest: Float[Tensor, ""]
    weight_gram: Float[Tensor, "K K"]
    mean_gram: Float[Tensor, "K K"]
    counts: Int[Tensor, "K"]
    classes: Int[Tensor, "K"]

    def summary(self) -> str:
        """The finding in plain words."""
        frame = "a simplex" if self.simplex.sum() < self.orthogonal.sum() else "an orthogonal frame"
        lengths = self.mean_gram.diagonal().sqrt()
        return (
            f"{int(self.counts.sum())} examples of {len(self.counts)} classes: scatter within classes is "
            f"{self.within:.3g} of that between them (NC1). Weights and class means are {self.simplex[0]:.2f} and "
            f"{self.simplex[1]:.2f} from a simplex, {self.orthogonal[0]:.2f} and {self.orthogonal[1]:.2f} from an "
            f"orthogonal frame (NC2), so nearer to {frame}; lengths of the means go from {lengths.min():.3g} to "
            f"{lengths.max():.3g}. Weights and means differ by {self.duality[0]:.2f} centred, {self.duality[1]:.2f} in "
            f"direction (NC3). {self.nearest:.1%} of the examples go to the nearest class mean (NC4)."
        )

    def plot(self) -> "Figure":
        """Cosines between the rows of the classifier and between the class means (a matplotlib figure)."""
        require_extra("NeuralCollapse.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(8.4, 3.6), layout="constrained")
        for ax, name, gram in zip(
            fig.subplots(1, 2), ("classifier", "class means"), (self.weight_gram, self.mean_gram), strict=True
        ):
            length = gram.diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
            shown = ax.imshow((gram / length / length[:, None]).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
            ax.set(title=f"{name}: cosines", xlabel="class (in order)", ylabel="class (in order)")
        fig.colorbar(shown, ax=fig.axes)
        return fig


def neural_collapse(
    model: nn.Module, batch: Batch, targets: Int[Tensor, "*N"] | None = None, *, layer: str | None = None
) -> NeuralCollapse:
    r"""Measure neural collapse in the features that enter a model's classifier.

    With h_i the features of example i of class y_i, mu_k the mean of class k and mu_G that of all examples,

    .. math:: S_W = \frac1N \sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^T, \quad
              S_B = \frac1K \sum_k (\mu_k - \mu_G)(\mu_k - \mu_G)^T, \quad
              NC1 = \tfrac1K \mathrm{tr}(S_W S_B^+)

    `NeuralCollapse` says what NC2, NC3 and NC4 are. Give training data: collapse is a matter of what was trained on.
    Balanced classes with a bias tend to a simplex; without bias, balanced or not, means and weights tend to an
    orthogonal frame with the lengths of `deep_linear_geometry`.

    The model runs once, in eval mode without gradients, and is left as it was. Everything is computed in float64.

    Args:
        model: a classifier.
        batch: what its forward takes: a tensor, a tuple or list (positional), or a mapping (by keyword).
        targets: the class of every example; of every position where the features are (N, positions, d). None: the
            classes the classifier guesses, which makes NC4 optimistic and says nothing about errors.
        layer: name of the classifier: a linear layer whose outputs are the classes, or an `nn.Sequential` of linear
            layers only, whose product is W (its biases count in NC4 alone). None: the linear layer that runs last.
    Returns: a `NeuralCollapse`, over the classes that occur.
    Raises: BadInput: if the batch is empty, holds NaN or does not fit the model; if no linear layer runs, or the named
        one is none, runs not or more than once; if targets are no integers, not one a feature vector, or not rows of
        the classifier; if fewer than two classes occur, or all have the same mean.
    Paper: Dang et al. 2023, arXiv 2301.00437; the metrics are those of Papyan, Han and Donoho 2020 (arXiv 2008.08186).
        NC1 and the simplex distances are as in the authors' code. There the distance to an orthogonal frame is to one of
        equal or of predicted lengths, and NC3 is that of W M_c^T from a simplex; ours need no prediction.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> with torch.no_grad():
    ...     w = net[1].weight.copy_(torch.eye(2))
    >>> found = neural_collapse(net, torch.tensor([[2.0, 0], [2, 0], [0, 1]]), torch.tensor([0, 0, 1]))
    >>> found.within.item(), found.orthogonal.tolist(), found.mean_gram.diagonal().tolist()
    (0.0, [0.0, 0.0], [4.0, 1.0])
    """
    require_model(model, WHO)
    with untouched(model):
        head, h, out = _classifier(model, batch, layer)
        w = reduce(lambda product, one: one @ product, (_matrix(part) for part in _linear(head)))
    h, out, w = (require_finite(t.detach(), WHO, what).cpu().double() for t, what in zip((h, out, w), PARTS))
    y = _classes(targets, h, out)
    return _measure(h.flatten(0, -2), out.flatten(0, -2), w, y)


PARTS = ("features", "classifier's output", "classifier's weight")


def _linear(module: nn.Module | None) -> list[nn.Module]:
    """The linear layers a classifier consists of, in order; none if it is no classifier."""
    if isinstance(module, nn.Linear) or (module is not None and is_gpt_conv1d(module)):
        return [module]
    parts = list(module) if isinstance(module, nn.Sequential) else []
    return parts if all(isinstance(p, nn.Linear) for p in parts) else []


def _matrix(layer: nn.Module) -> Tensor:
    w = torch.as_tensor(layer.weight)
    return (w.t() if is_gpt_conv1d(layer) else w).double()


def _classifier(model: nn.Module, batch: Batch, layer: str | None) -> tuple[nn.Module, Tensor, Tensor]:
    """The classifier with what it got and what it gave on the batch."""
    modules = dict(model.named_modules())
    if layer is None:
        watched = [m for m in modules.values() if not isinstance(m, nn.Sequential) and _linear(m)]
    else:
        named = {n: m for n, m in modules.items() if _linear(m)}
        if layer not in named:
            raise BadInput(
                f"{WHO} found no linear layer or sequence of linear layers named {layer!r}{nearest(layer, named)}"
            )
        watched = [named[layer]]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        calls.append((module, (*args, *kwargs.values())[0], out))

    for module in watched:
        module.register_forward_hook(keep, with_kwargs=True)  # `untouched` takes it away again
    run(model, batch, WHO)
    if not calls:
        raise BadInput(f"{WHO} saw {layer or 'no linear layer'} {'not ' if layer else ''}run on this batch")
    if layer is not None and len(calls) > 1:
        raise BadInput(f"{WHO} saw {layer} run {len(calls)} times on one batch; its features are then not one set")
    head, h, out = calls[-1]
    return head, h.clone(), out.clone()


def _classes(targets: Tensor | None, h: Tensor, out: Tensor) -> Int[Tensor, "N"]:
    k = out.shape[-1]
    if h.ndim < 2:
        raise BadInput(f"{WHO} needs a batch of examples, got features as a {describe(h)}")
    if k < 2:
        raise BadInput(f"{WHO} needs a classifier with an output a class, got {k} output")
    if targets is None:
        y = out.argmax(-1).flatten()
    elif not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        got = describe(targets) if isinstance(targets, Tensor) else type(targets).__name__
        raise BadInput(f"{WHO} needs integer targets, the class of every example, got a {got}")
    elif targets.shape != h.shape[:-1]:
        raise BadInput(
            f"{WHO} needs targets of shape {tuple(h.shape[:-1])}, one a feature vector, got a {describe(targets)}"
        )
    else:
        y = targets.detach().cpu().flatten().long()
        if not ((y >= 0) & (y < k)).all():
            raise BadInput(
                f"{WHO} needs targets from 0 to {k - 1}, the rows of the classifier, got {int(y.min())} to "
                f"{int(y.max())}"
            )
    if len(y.unique()) < 2:
        whose = "the model guesses" if targets is None else "the targets hold"
        raise BadInput(f"{WHO} needs examples of two classes or more; {whose} class {int(y[0])} only")
    return y


def _measure(
    h: Float[Tensor, "N d"], out: Float[Tensor, "N rows"], w: Float[Tensor, "rows d"], y: Int[Tensor, "N"]
) -> NeuralCollapse:
    classes, index, counts = y.unique(return_inverse=True, return_counts=True)
    n, k = len(h), len(classes)
    w = w[classes]
    means = h.new_zeros(k, h.shape[1]).index_add_(0, index, h) / counts[:, None]
    centred = means - h.mean(0)
    # tr(S_W S_B^+) / K by the singular values of the centred means: S_B = V diag(s^2 / K) V^T
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    real = s.square() > s[0].square() * max(h.shape[1], k) * torch.finfo(h.dtype).eps
    if s[0] <= torch.finfo(h.dtype).eps * h.abs().max():
        raise BadInput(f"{WHO} needs classes that differ; the means of all {k} classes are the same")
    within = (((h - means[index]) @ vh[real].T) / s[real]).square().sum() / n
    guess = out.argmax(-1)
    near = classes[torch.cdist(h, means).argmin(1)]
    mean_gram, weight_gram = means @ means.T, w @ w.T
    directions = F.normalize(w, dim=1) - F.normalize(means, dim=1)
    ideal = torch.eye(k, dtype=h.dtype) - 1 / k
    return NeuralCollapse(
        within=within,
        simplex=torch.stack([frame_distance(weight_gram, ideal), frame_distance(centred @ centred.T, ideal)]),
        orthogonal=torch.stack([frame_distance(g, g.diagonal().diag()) for g in (weight_gram, mean_gram)]),
        duality=torch.stack([frame_distance(w, centred), directions.square().sum(1).mean().sqrt()]),
        nearest=(guess == near).double().mean(),
        weight_gram=weight_gram,
        mean_gram=mean_gram,
        counts=counts,
        classes=classes,
    )


def frame_distance(a: Float[Tensor, "m n"], b: Float[Tensor, "m n"]) -> Float[Tensor, ""]:
    r"""Distance of two matrices regardless of scale: a Gram matrix of `neural_collapse`, say, from a predicted one.

    .. math:: \left\lVert \frac{A}{\lVert A \rVert_F} - \frac{B}{\lVert B \rVert_F} \right\rVert_F

    Args:
        a, b: two matrices of one shape. A zero matrix stays zero.
    Returns: the distance, between 0 and 2.
    Raises: BadInput: if the shapes differ.
    Paper: Dang et al. 2023, arXiv 2301.00437 (its NC2).

    >>> round(frame_distance(torch.eye(2), 3 * torch.eye(2)).item(), 6)
    0.0
    """
    if a.shape != b.shape:
        raise BadInput(f"frame_distance needs two matrices of one shape, got a {describe(a)} and a {describe(b)}")
    return (F.normalize(a.flatten(), dim=0) - F.normalize(b.flatten(), dim=0)).norm()


# -- the prediction ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeepLinearGeometry:
    """The global minimum of a deep linear head with free features under squared loss and weight decay.

    The K classes part into K directions of their own. In direction r all layers have one singular value each.

    Attributes:
        singular_values: of W_1, ..., W_M and of the class means' matrix with columns sqrt(n_k) h_k, a row each; in the
            order of `targets`.
        targets: the singular values of the (centred, with a bias) target matrix, sqrt(n_k) without a bias.
        threshold: a direction vanishes if its squared target is at most this: without a bias, a class with that many
            examples or fewer.
        weight_gram: W W^T of the product W = W_M ... W_1.
        mean_gram: h_k . h_l of the class means.
        outputs: W h_k + b, a column a class.
        loss: the objective there.
    """

    singular_values: Float[Tensor, "layers+1 K"]
    targets: Float[Tensor, "K"]
    threshold: Float[Tensor, ""]
    weight_gram: Float[Tensor, "K K"]
    mean_gram: Float[Tensor, "K K"]
    outputs: Float[Tensor, "K K"]
    loss: Float[Tensor, ""]

    @property
    def weight_lengths(self) -> Float[Tensor, "K"]:
        """Length of each row of the product of the layers."""
        return self.weight_gram.diagonal().clamp_min(0).sqrt()

    @property
    def mean_lengths(self) -> Float[Tensor, "K"]:
        """Length of each class mean."""
        return self.mean_gram.diagonal().clamp_min(0).sqrt()


def deep_linear_geometry(
    class_counts: Sequence[int] | Int[Tensor, "K"],
    layers: int = 1,
    lambda_W: float | Sequence[float] = 5e-4,
    lambda_H: float = 5e-4,
    *,
    bias: bool = False,
) -> DeepLinearGeometry:
    r"""Predict what weights and features of a deep linear head end as, balanced or not.

    The unconstrained-features model takes the features H (d, N) as free as the weights, with Y the one-hot targets:

    .. math:: \min \; \frac{1}{2N} \lVert W_M \cdots W_1 H + b 1^T - Y \rVert_F^2
              + \sum_{l=1}^M \frac{\lambda_{W_l}}{2} \lVert W_l \rVert_F^2 + \frac{\lambda_H}{2} \lVert H \rVert_F^2

    At the minimum the features of a class are one point, neighbouring layers share their singular directions, and every
    direction is a problem of one number. Without a bias direction k is class k, with n_k examples; s_k being its
    singular value in W_1, x = (c s_k^(2M) / (N lambda_H))^(1/M) with c = lambda_{W_1}^M / prod_l lambda_{W_l} minimises

    .. math:: \frac{1}{x^M + 1} + \frac{b}{n_k} x, \qquad b = M N \Big(N \lambda_H \prod_l \lambda_{W_l}\Big)^{1/M}

    so x is the largest root of M x^(M-1) / (x^M + 1)^2 = b / n_k, or 0 where that does not beat 0:

    .. math:: x = 0 \iff n_k \le \frac{M b}{(M-1)^{(M-1)/M}} \quad (\text{with } 0^0 = 1: n_k \le b \text{ for } M = 1)

    Rare classes then vanish: mean and weights are zero (minority collapse). For M = 1 lengths go to zero continuously,
    for M > 1 they jump. With a bias (free of decay) Y is replaced by Y minus its mean over the examples; for balanced
    classes that is a simplex, n_k being the count of a class in each of K - 1 directions.

    Args:
        class_counts: n_k, the number of examples of each class.
        layers: M, the number of linear layers, at least 1.
        lambda_W: weight decay of W_1, ..., W_M, one number for all or a list. (5e-4 each: the authors' experiments.)
        lambda_H: decay of the features.
        bias: whether the last layer has one.
    Returns: a `DeepLinearGeometry`, in float64. Every width is taken to be at least the number of classes.
    Raises: BadInput: for fewer than two classes, counts that are not positive whole numbers, fewer than one layer,
        decays that are not positive and finite or not one a layer.
    Paper: Dang et al. 2023, arXiv 2301.00437, balanced and imbalanced MSE theorems. Read from the authors' code and
        derived again; the comparison with 0 is derived (their code keeps the largest root even where 0 is better), as
        is the imbalanced case with a bias. Note that their training code divides the squared error by N K, which makes
        its decays K times as strong as here.

    >>> found = deep_linear_geometry([60, 31, 9], lambda_W=0.05, lambda_H=0.02)
    >>> round(found.threshold.item(), 9)
    10.0
    >>> found.mean_lengths
    tensor([0.3475, 0.3503, 0.0000], dtype=torch.float64)
    """
    n = torch.as_tensor(class_counts)
    if n.ndim != 1 or len(n) < 2 or n.is_floating_point() or not (n > 0).all():
        raise BadInput(f"deep_linear_geometry needs two or more class counts, whole and above 0, got {class_counts}")
    if layers < 1:
        raise BadInput(f"deep_linear_geometry needs at least one layer, got {layers}")
    decays = [float(lambda_W)] * layers if isinstance(lambda_W, (int, float)) else [float(v) for v in lambda_W]
    if len(decays) != layers or not all(0 < v < math.inf for v in (*decays, lambda_H)):
        raise BadInput(
            f"deep_linear_geometry needs positive decays, one a layer ({layers}), got lambda_W {lambda_W}, lambda_H "
            f"{lambda_H}"
        )
    n = n.double()
    total, m, root = n.sum(), layers, n.sqrt()
    u, y, vh = n.new_ones(len(n)).diag(), root, n.new_ones(len(n)).diag()
    if bias:
        u, y, vh = torch.linalg.svd(root.diag() - torch.outer(n, root) / total)
    squared = y.square() if bias else n
    b = m * total * (total * lambda_H * math.prod(decays)) ** (1 / m)
    threshold = m * b / (m - 1) ** ((m - 1) / m)
    x = torch.where(squared <= threshold, 0.0, _largest_root(b / squared, m))
    gain = x**m / (x**m + 1)
    z = y * gain  # singular values of the outputs
    share = (lambda_H * math.prod(decays) * z.square()) ** (1 / (m + 1))  # lambda_l s_l^2, the same in every layer
    singular = torch.stack([(share / decay).sqrt() for decay in (*decays, lambda_H)])
    product, features = singular[:-1].prod(0), (vh.T * singular[-1]) / root[:, None]
    outputs = (u * z) @ vh / root
    if bias:
        outputs = outputs + ((n / total) - outputs @ n / total)[:, None]
    return DeepLinearGeometry(
        singular_values=singular,
        targets=y,
        threshold=threshold,
        weight_gram=(u * product.square()) @ u.T,
        mean_gram=features @ features.T,
        outputs=outputs,
        loss=((y - z).square().sum() / total + (m + 1) * share.sum()) / 2,
    )


def _largest_root(r: Float[Tensor, "K"], m: int) -> Float[Tensor, "K"]:
    """The largest x with m x^(m-1) / (x^m + 1)^2 = r, by bisection where the left side falls; for r up to the threshold."""
    lo = torch.full_like(r, float(m - 1)) ** (1 / m)  # where a root beats 0 it lies at x^m >= m - 1
    hi = (m / r) ** (1 / (m + 1))  # the left side is below m x^(-m-1)
    for _ in range(80):
        mid = (lo + hi) / 2
        above = m * mid ** (m - 1) > r * (mid**m + 1) ** 2
        lo, hi = torch.where(above, mid, lo), torch.where(above, hi, mid)
    return (lo + hi) / 2

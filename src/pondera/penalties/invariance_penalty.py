"""Invariance penalties: features whose best last layer is the same in every environment."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_float

Loss = Callable[[Tensor, Tensor], Tensor]


def irm(
    outputs: Sequence[Float[Tensor, "n *k"]],
    targets: Sequence[Tensor],
    *,
    loss: Loss | None = None,
    halves: bool = False,
) -> Float[Tensor, ""]:
    r"""IRMv1: squared slope of each environment's risk along the scale of the outputs, mean over environments.

    .. math:: \frac{1}{E} \sum_e \Big( \frac{d}{ds} R_e(s f) \Big|_{s = 1} \Big)^2

    Zero where rescaling the outputs gains nothing in any environment. That is necessary for the last layer to be best
    in all of them, and not sufficient once the features have more than one dimension: see `invariance`.

    Args:
        outputs: the model's outputs, one tensor an environment.
        targets: what they should be, one tensor an environment: classes (long) or numbers of the outputs' shape.
        loss: mean risk of (outputs, targets); by default cross-entropy for classes and, for numbers, the squared error
            summed over an example's outputs and averaged over examples. It is differentiated by `torch.func.grad`.
        halves: the product of the slopes over even and over odd rows in place of the square: unbiased over batches, as
            DomainBed has it, and at times negative.
    Returns: a scalar in the outputs' dtype. DomainBed averages over environments as here; InvarianceUnitTests sums, and adds
        the squared slope along a shift of the outputs.
    Raises: BadInput: if the lists are empty or unequal, an environment's rows do not match or are fewer than one (two
        for halves), or outputs are not floating point.
    Paper: Khezeli et al. 2021, arXiv 2106.09777, who criticise it; Arjovsky et al. 2019, arXiv 1907.02893, who made it.
        Their experiments divide the whole loss by the factor where that is above 1, without which a step explodes.

    >>> f, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])  # d/ds mean (s f - y)^2 = 2 mean f (f - y) = 2
    >>> irm([f], [y])
    tensor(4.)
    """
    risk = loss or _risk
    _require_environments("irm", targets, outputs=outputs)
    total: list[Tensor] = []
    for f, y in zip(outputs, targets, strict=True):
        if halves and len(f) < 2:
            raise BadInput(f"irm needs two rows an environment to halve it, got outputs as {describe(f)}")
        parts = [(f[::2], y[::2]), (f[1::2], y[1::2])] if halves else [(f, y)]
        slopes = [(_gradient(risk, fi, yi) * fi).sum() for fi, yi in parts]
        total.append(slopes[0] * slopes[-1])
    return torch.stack(total).mean()


def invariance(
    features: Sequence[Float[Tensor, "n d"]],
    outputs: Sequence[Float[Tensor, "n *k"]],
    targets: Sequence[Tensor],
    *,
    power: int = 1,
    ridge: float = 0.0,
    loss: Loss | None = None,
) -> Float[Tensor, ""]:
    r"""Squared gradient of each environment's risk in the last layer, measured by the Gram matrix of the features.

    .. math:: \frac{1}{E} \sum_e \operatorname{tr} \big( G_e^T I_e^{-p} G_e \big), \qquad
              G_e = \nabla_W R_e(\Phi W), \quad I_e = \frac{1}{n_e} \Phi_e^T \Phi_e

    The plain gradient (p = 0, IRMv1 with a vector) can be made as small as one likes by rescaling the features and
    the last layer against each other, with the same outputs: then I_e is ill-conditioned. With p = 1 the penalty is the
    same for every invertible change of the features. For the squared error it is exactly 4 (R_e(w) - min_w R_e).

    That is also its limit (derived here): features of as many dimensions as the inputs, related to them by an
    invertible map, let every environment's risk down to its own minimum whatever the features are. The penalised risk
    differs from the plain one by constants, and minimising it is plain pooled training at every factor. The features
    must be fewer than the inputs; a single one (``features = outputs``) serves.

    Args:
        features: what the last, linear layer reads, one tensor an environment, with a column of ones where that layer
            has a bias. Gradients run through them and through their Gram matrix.
        outputs: what the layer makes of them, one tensor an environment.
        targets: one tensor an environment: classes (long) or numbers of the outputs' shape.
        power: p: 1 measures in risk, 2 in the weights' distance (||w - w_e||^2, for the squared error), 0 not at all.
            The paper's power is recalled, not read: 1.
        ridge: added to the Gram matrix, in units of its mean diagonal. 0: none; then it must be regular, which takes
            more rows than features. Its size matters wherever the matrix is near singular. ReLU features with dead units need it.
        loss: as in `irm`. For cross-entropy the Gram matrix stands in for the Hessian (our extension).
    Returns: a scalar in the features' dtype (bf16 is factored in float32), 0 exactly where W is best in each environment.
        Over few rows it is biased upward, by about d sigma^2 / n_e at W best in truth.
    Raises: BadInput: as `irm`; if power is none of 0, 1, 2 or ridge negative; if a Gram matrix is singular (as for
        features that are all 0, where any layer would be "best").
    Paper: Khezeli, Blaas, Soboczenski, Chia, Kalantari 2021, arXiv 2106.09777 (read in its abstract; formula derived).

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 1.0])  # w = 1: risk 0.5; best w = 0.6: risk 0.1
    >>> round(invariance([x], [x[:, 0]], [y]).item(), 4)
    1.6
    >>> round(invariance([x / 10], [x[:, 0]], [y]).item(), 4)
    1.6
    """
    if power not in (0, 1, 2):
        raise BadInput(f"invariance needs a power of 0, 1 or 2, got {power!r}")
    if not 0 <= ridge < float("inf"):
        raise BadInput(f"invariance needs a finite ridge of at least 0, got {ridge}")
    risk = loss or _risk
    _require_environments("invariance", targets, outputs=outputs, features=features)
    total: list[Tensor] = []
    for e, (phi, f, y) in enumerate(zip(features, outputs, targets, strict=True)):
        if phi.ndim > 2:
            raise BadInput(f"invariance needs features of shape (rows, features), got a {describe(phi)}")
        rows = phi.unsqueeze(1) if phi.ndim == 1 else phi
        wide = rows.float() if rows.element_size() < 4 else rows
        g = wide.mT @ _gradient(risk, f, y).to(wide.dtype).reshape(len(wide), -1)  # G_e; the risk is a mean already
        if power:
            root = _root(wide.mT @ wide / len(wide), ridge, e, len(wide))
            g = torch.linalg.solve_triangular(root, g, upper=False)  # |L^-1 G|^2 = tr G' I^-1 G
            if power == 2:
                g = torch.linalg.solve_triangular(root.mT, g, upper=True)  # I^-1 G
        total.append(g.square().sum().to(phi.dtype))
    return torch.stack(total).mean()


def _risk(outputs: Tensor, target: Tensor) -> Tensor:
    if not target.is_floating_point():
        return F.cross_entropy(outputs, target)
    return (outputs - target).square().flatten(1).sum(1).mean() if outputs.ndim > 1 else F.mse_loss(outputs, target)


def _gradient(risk: Loss, outputs: Tensor, target: Tensor) -> Tensor:
    """d R / d outputs, itself differentiable."""
    gradient: Tensor = torch.func.grad(lambda f: risk(f, target))(outputs)
    return gradient


def _root(gram: Tensor, ridge: float, environment: int, rows: int) -> Tensor:
    """Cholesky factor, refused where the matrix is singular to working precision."""
    d = len(gram)
    if ridge:
        gram = gram + ridge * gram.diagonal().mean() * torch.eye(d, dtype=gram.dtype, device=gram.device)
    root, info = torch.linalg.cholesky_ex(gram)
    pivot, largest = root.detach().diagonal().square().min(), gram.detach().diagonal().max()  # rounded at the largest
    failed, pivot, largest = torch.stack([info.to(root.dtype), pivot, largest]).tolist()
    if failed or (rows < d and not ridge) or not pivot > d * torch.finfo(gram.dtype).eps * largest:
        raise BadInput(
            f"invariance needs a regular Gram matrix in every environment; that of environment {environment} "
            f"({rows} rows, {d} features) is singular: give more rows or fewer features, or a ridge (1e-3, say)"
        )
    return root


def _require_environments(who: str, targets: Sequence[Tensor], **given: Sequence[Tensor]) -> None:
    counts = {what: len(each) for what, each in {**given, "targets": targets}.items()}
    if len(set(counts.values())) > 1 or not len(targets):
        raise BadInput(f"{who} needs one tensor an environment in each list, got {counts}")
    for what, each in {**given, "targets": targets}.items():
        for e, x in enumerate(each):
            if not isinstance(x, Tensor) or what != "targets":
                require_float(x, who, what)
            if x.ndim < 1 or not x.numel() or len(x) != len(targets[e]):
                raise BadInput(
                    f"{who} needs as many rows in its {what} as targets, at least one, in environment {e}; got a "
                    f"{describe(x)} and targets as {describe(targets[e])}"
                )
    for f, y in zip(given["outputs"], targets, strict=True):
        if y.is_floating_point() and y.shape != f.shape:
            raise BadInput(
                f"{who} needs numeric targets of the outputs' shape, got a {describe(y)} beside a {describe(f)}"
            )

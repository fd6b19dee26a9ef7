"""Weight balancing for long-tailed classes: the pieces of the two-stage recipe, and of the one-stage recipe it reduces to.

Two stages (Alshammari et al. 2022): train with cross-entropy and strong weight decay (5e-3); then freeze the features and
train the last layer with `class_balanced_weights`, decay, and `max_norm_` after every epoch, at the limit that
`max_norm_limit` gave at the start. One stage (Hasegawa and Sato 2024): fix the last layer's weight at `simplex_etf`, train
the rest with cross-entropy, the same decay and `feature_decay` (factor 1e-2), and use `adjust_logits` when predicting.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pondera.errors import BadInput, describe, require_finite, require_float
from pondera.linalg import haar


@torch.no_grad()
def max_norm_limit(classifier: Float[Tensor, "classes features"] | nn.Linear, share: float = 0.1) -> float:
    r"""Where to cap the rows of a last layer: between the shortest and the longest as they are now.

    .. math:: \delta = \min_c \lVert w_c \rVert + t \, (\max_c \lVert w_c \rVert - \min_c \lVert w_c \rVert)

    Args:
        classifier: the last layer, or its weight.
        share: t, 0.1 as in the released code.
    Returns: the limit, for `max_norm_`.
    Raises: BadInput: if the weight is no finite matrix or share is not within 0 and 1.
    Paper: Hasegawa and Sato 2024, arXiv 2305.16573 (released code).

    >>> max_norm_limit(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 0.5)
    2.0
    """
    if not 0 <= share <= 1:
        raise BadInput(f"max_norm_limit needs a share within 0 and 1, got {share}")
    low, high = _weight(classifier, "max_norm_limit").norm(dim=1).aminmax()
    return float(low + share * (high - low))


@torch.no_grad()
def max_norm_(classifier: Float[Tensor, "classes features"] | nn.Linear, limit: float) -> Tensor | nn.Linear:
    r"""Project a last layer in place: rows longer than `limit` are scaled to it, the others stay.

    .. math:: w_c \leftarrow \min(1, \delta / \lVert w_c \rVert) \, w_c

    Frequent classes grow long rows, and with them large logits; a cap takes that advantage away. The bias stays as it is.

    Args:
        classifier: the last layer, or its weight.
        limit: the largest norm of a row, delta; the recipe takes `max_norm_limit` at the start of the second stage.
    Returns: `classifier`.
    Raises: BadInput: if the weight is no finite matrix or the limit is not positive and finite.
    Paper: Hasegawa and Sato 2024, arXiv 2305.16573; Alshammari et al. 2022, arXiv 2203.14197. The released code raises
        norms to a power tau twice over; equal to this at its tau of 1.

    >>> max_norm_(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 2.0).diagonal()
    tensor([1., 2., 2.])
    """
    if not 0 < limit < float("inf"):
        raise BadInput(f"max_norm_ needs a positive, finite limit, got {limit}")
    w = _weight(classifier, "max_norm_")
    norms = w.norm(dim=1, keepdim=True, dtype=torch.float32 if w.element_size() < 4 else None)
    w.mul_((limit / norms).clamp_max(1).to(w.dtype))  # 1 for a row of zeros: limit / 0 is infinite
    return classifier


def class_balanced_weights(counts: Float[Tensor, " classes"], *, beta: float = 0.9999) -> Float[Tensor, " classes"]:
    r"""Weights of the classes in a balanced loss, by effective number of examples; their mean is 1.

    .. math:: \alpha_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c \alpha_c = K

    The recipe's loss is the plain mean over a batch of alpha_y times the cross-entropy:
    ``F.cross_entropy(logits, y, weight=alpha, reduction="none").mean()``. (With ``reduction="mean"`` torch divides by the
    weights of the batch.)

    Args:
        counts: examples of each class, n_c, at least one each.
        beta: 0 weighs all alike, 1 by 1 / n_c; 0.9999 in the released second stage.
    Returns: float32 weights alpha.
    Raises: BadInput: if counts are no vector of at least 1 each, or beta is not within 0 and 1.
    Paper: Hasegawa and Sato 2024, arXiv 2305.16573; Cui et al. 2019, arXiv 1901.05555.

    >>> class_balanced_weights(torch.tensor([1, 3]), beta=1.0)
    tensor([1.5000, 0.5000])
    """
    n = _counts(counts, "class_balanced_weights")
    if not 0 <= beta <= 1:
        raise BadInput(f"class_balanced_weights needs a beta within 0 and 1, got {beta}")
    effective = n if beta == 1 else torch.expm1(n * torch.tensor(beta, dtype=n.dtype).log()).neg()
    return ((1 / effective) / (1 / effective).mean()).float()


def adjust_logits(
    logits: Float[Tensor, "*batch classes"],
    counts: Float[Tensor, " classes"],
    tau: float,
    *,
    kind: Literal["multiplicative", "additive"] = "multiplicative",
) -> Float[Tensor, "*batch classes"]:
    r"""Logits of a trained net with the classes' shares taken out; nothing is trained.

    .. math:: z_c \, p_c^{-\tau} \quad \text{(multiplicative)}, \qquad z_c - \tau \log p_c \quad \text{(additive)}

    The multiplicative one is what longer rows of rare classes do, and the paper's. It presumes logits above zero, as a
    simplex classifier over ReLU features mostly gives to the classes in question: a negative logit of a rare class gets
    more negative, and a bias is multiplied along.

    Args:
        logits: z.
        counts: examples of each class in training; p_c is its share.
        tau: strength, 0 changes nothing. No default: the released settings have 0.65 on CIFAR-100 and 1.6 on CIFAR-10,
            so tune it, on validation data with as many of each class.
        kind: "multiplicative" or "additive".
    Returns: adjusted logits; their largest is the prediction, they are no probabilities.
    Raises: BadInput: if logits do not fit the counts, tau is negative or not finite, or the kind is unknown.
    Paper: Hasegawa and Sato 2024, arXiv 2305.16573; the additive one Menon et al. 2021, arXiv 2007.07314.

    >>> adjust_logits(torch.tensor([2.0, 1.0]), torch.tensor([3, 1]), 1.0)
    tensor([2.6667, 4.0000])
    """
    n = _counts(counts, "adjust_logits")
    require_float(logits, "adjust_logits", "logits")
    if logits.ndim < 1 or logits.shape[-1] != len(n):
        raise BadInput(f"adjust_logits needs logits of {len(n)} classes, as the counts have, got a {describe(logits)}")
    if not 0 <= tau < float("inf"):
        raise BadInput(f"adjust_logits needs a finite tau of at least 0, got {tau}")
    log_p = (n / n.sum()).log().to(logits)
    if kind == "multiplicative":
        return logits * torch.exp(-tau * log_p)
    if kind == "additive":
        return logits - tau * log_p
    raise BadInput(f"adjust_logits knows the kinds multiplicative and additive, got {kind!r}")


def simplex_etf(
    classes: int, features: int, *, generator: torch.Generator | None = None
) -> Float[Tensor, "classes features"]:
    r"""A last layer whose rows are unit vectors as far apart as K vectors can be, turned at random: a simplex frame.

    .. math:: W = \sqrt{\tfrac{K}{K - 1}} \, \big( I - \tfrac{1}{K} 1 1^T \big) \, Q^T, \qquad
              w_c^T w_c = 1, \quad w_c^T w_{c'} = -\tfrac{1}{K - 1}

    To be held fixed; a bias may be trained beside it, as the released code does.

    Args:
        classes: K, at least 2.
        features: width of the features, at least K.
        generator: draws the turn Q, orthonormal columns.
    Returns: a float32 matrix.
    Raises: BadInput: if there are fewer than two classes, or fewer features than classes.
    Paper: Hasegawa and Sato 2024, arXiv 2305.16573. The released code draws a whole rotation of the features; its first
        K columns are what we draw.

    >>> w = simplex_etf(4, 6)
    >>> torch.allclose(w @ w.T, 4 / 3 * torch.eye(4) - 1 / 3, atol=1e-6)
    True
    """
    if classes < 2 or features < classes:
        raise BadInput(f"simplex_etf needs two classes or more and as many features, got {classes} and {features}")
    frame = (classes / (classes - 1)) ** 0.5 * (torch.eye(classes) - 1 / classes)
    return frame @ haar(features, classes, generator=generator).float().T


def feature_decay(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    r"""Half the mean squared length of the features: decay for what a fixed classifier reads.

    .. math:: \frac{1}{2n} \sum_i \lVert h_i \rVert^2

    With the classifier fixed, cross-entropy can only fall by longer features; this holds them.

    Args:
        features: h, what the last layer reads; the factor was 1e-2.
    Returns: a scalar in the features' dtype, 0 exactly for features that are all 0.
    Raises: BadInput: if features are no floating-point matrix with entries.
    Paper: Hasegawa and Sato 2024, arXiv 2305.16573 (released code).

    >>> feature_decay(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor(6.5000)
    """
    require_float(features, "feature_decay", "features")
    if features.ndim != 2 or not features.numel():
        raise BadInput(f"feature_decay needs features of shape (rows, features), got a {describe(features)}")
    return features.square().sum(1).mean() / 2


def _weight(classifier: Tensor | nn.Linear, who: str) -> Tensor:
    w = classifier.weight if isinstance(classifier, nn.Linear) else classifier
    require_finite(w, who, "classifier")
    if w.ndim != 2 or not w.numel():
        raise BadInput(f"{who} needs the last layer's weight of shape (classes, features), got a {describe(w)}")
    return w


def _counts(counts: Tensor, who: str) -> Tensor:
    n = torch.as_tensor(counts).double()
    if n.ndim != 1 or not len(n) or not bool((n >= 1).all()) or not bool(n.isfinite().all()):
        raise BadInput(f"{who} needs the examples of each class as a vector, at least one each, got {n.tolist()}")
    return n

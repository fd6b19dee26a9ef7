"""Training for certified robustness: the robust loss, the rise of eps, and two terms that help while eps rises."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pondera._bounds import Clip, Eps, box_around, class_differences, margins, propagate
from pondera.errors import BadInput

Bounds = list[tuple[Tensor, Tensor]]
MID, BETA = 0.25, 4.0  # of the rise: the share of it that is a power, and that power
EPS_AT_ZERO = 1e-6  # while eps is 0 the two terms are taken at this one
TINY = 1e-12


def warmup(step: int, *, start: int, length: int) -> float:
    r"""The share of the final eps at a training step: 0, then a smooth rise, then 1.

    With t = `step` - `start`, T = `length` and m = T / 4 the share rises like a power up to m and then on a straight line
    of the same slope:

    .. math:: \alpha t^4 \; (t \le m), \qquad \alpha m^4 + 4 \alpha m^3 (t - m) \; (m \le t \le T), \qquad
              \alpha = \frac{1}{m^4 + 4 m^3 (T - m)}

    Args:
        step: the step, counted from 0.
        start: the first step of the rise. Before it training is natural.
        length: steps of the rise; 0 jumps.
    Returns: a number from 0 to 1, for `certified_loss(..., ramp=)`.
    Raises: BadInput: if one of them is negative.
    Paper: Shi et al. 2021, arXiv 2103.17268, by the scheduler of their library auto_LiRPA (SmoothedScheduler, after
        DeepMind's IBP code). They count in epochs and start at the beginning of epoch 2 on CIFAR-10, 1 on MNIST, and rise
        for 80 and 20 epochs of 160 and 70.

    >>> [round(warmup(t, start=100, length=400), 4) for t in (0, 100, 150, 200, 300, 500, 900)]
    [0.0, 0.0, 0.0048, 0.0769, 0.3846, 1.0, 1.0]
    """
    if min(step, start, length) < 0:
        raise BadInput(f"warmup needs step, start and length of at least 0, got {step}, {start} and {length}")
    t, m = step - start, int(length * MID)
    if t <= 0 or t >= length:
        return float(t >= length)
    if m == 0:
        return t / length
    alpha = 1 / (m**BETA + BETA * m ** (BETA - 1) * (length - m))
    return alpha * (t**BETA if t < m else m**BETA + BETA * m ** (BETA - 1) * (t - m))


def certified_loss(
    model: nn.Module,
    x: Float[Tensor, "batch *features"],
    labels: Int[Tensor, "batch"],
    eps: Eps,
    *,
    ramp: float = 1.0,
    clip: Clip = None,
    weight: float = 0.5,
    tol: float = 0.5,
) -> Float[Tensor, ""]:
    r"""The loss of certified training at one step: robust cross-entropy, and the warm-up terms while eps rises.

    With m the lower bounds of the margins in the box of size ramp * eps, and m_y = 0,

    .. math:: L = CE(-\underline m, y) + \lambda (1 - ramp) (L_{tight} + L_{relu})

    While ramp is 0 the first part is the natural cross-entropy. Over the M layers that feed a ReLU, with bounds l and u,
    c = (l + u) / 2, r = (u - l) / 2, and r_0 the radius of the input (means over batch and units):

    .. math::
        L_{tight} = \frac{1}{M} \sum_i \frac{[\tau - \bar r_0 / \bar r_i]_+}{\tau}, \qquad
        L_{relu} = \frac{1}{M} \sum_i \frac{[\tau - \rho(a_i, d_i)]_+ + [\tau - \rho(A_i, D_i)]_+}{\tau}

    where rho(p, q) = min(p, q) / max(p, q); a is the mean of c over all units with those not surely active (l > 0) set to
    0, d that of -c over the surely inactive ones (u < 0); A and D are the sums of (c - mean c)^2 over the active and the
    inactive ones. The first term is zero where bounds are at most 1 / tau wider than the input's, the second where
    active and inactive units balance. A layer with neither (all unstable) has no second term.

    Args:
        model: a classifier in train mode. BatchNorm takes its statistics from the clean batch and updates its running ones.
        x, labels: a batch.
        eps: the final eps, as in `interval_bounds`.
        ramp: the share of eps reached, from `warmup`.
        clip: the range inputs can take, such as (0, 1).
        weight: lambda, 0.5 in the paper (0.1 to 0.2 on TinyImageNet). 0 leaves plain IBP training.
        tol: tau, 0.5.
    Returns: a scalar, differentiable in the weights.
    Raises: BadInput: as `interval_bounds`, for labels that do not fit, a ramp outside [0, 1], a negative weight, a tol
        outside (0, 1], and for a model without ReLU where the warm-up terms need one.
    Paper: Shi et al. 2021, arXiv 2103.17268; the terms are those of the authors' code. Differences: where a layer has no
        inactive or no active units the code's gradient is NaN, ours is finite at the same value.

    >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> loss = certified_loss(net, torch.rand(8, 2), torch.tensor([0, 1] * 4), 0.1, ramp=0.5, clip=(0, 1))
    >>> loss.backward()
    """
    who = "certified_loss"
    if not 0 <= ramp <= 1:
        raise BadInput(f"{who} needs a ramp from 0 to 1, got {ramp}")
    if not (weight >= 0 and 0 < tol <= 1):
        raise BadInput(f"{who} needs a weight of at least 0 and a tol in (0, 1], got {weight} and {tol}")
    share = weight * (1 - ramp)
    size = torch.as_tensor(eps, dtype=x.dtype, device=x.device) * ramp
    if ramp == 0 and share:
        size = size.clamp(min=EPS_AT_ZERO)
    entered: Bounds | None = [] if share else None
    out = propagate(model, x, size, clip=clip, entered=entered, who=who)
    if ramp == 0:
        class_differences(out.value, labels, who)  # words bad labels
        loss = F.cross_entropy(out.value, labels)
    else:
        c, r = margins(out, labels, who)
        worst = torch.cat([c.new_zeros(len(c), 1), r - c], dim=1)
        loss = F.cross_entropy(worst, torch.zeros_like(labels))
    if entered is None:
        return loss
    if not entered:
        raise BadInput(f"{who} found no ReLU for its warm-up terms; give weight=0 to train without them")
    lower, upper = box_around(x, size, clip, who)
    return loss + share * (tightness_term(entered, (upper - lower).mean() / 2, tol) + relu_term(entered, tol))


def tightness_term(entered: Bounds, r_0: Float[Tensor, ""], tol: float) -> Float[Tensor, ""]:
    """L_tight, from the bounds that enter each ReLU and the mean radius of the input."""
    radii = torch.stack([(u - l).mean() / 2 for l, u in entered])
    return (tol - r_0 / radii.clamp(min=TINY)).relu().mean() / tol


def relu_term(entered: Bounds, tol: float) -> Float[Tensor, ""]:
    """L_relu, from the bounds that enter each ReLU."""
    terms = []
    for l, u in entered:
        c = (l + u) / 2
        active, inactive = l > 0, u < 0
        spread = (c - c.mean()).square()
        means = balance((c * active).mean(), -(c * inactive).mean())
        spreads = balance((spread * active).sum(), (spread * inactive).sum())
        some = (active | inactive).any()
        terms.append(torch.where(some, (tol - means).relu() + (tol - spreads).relu(), 0.0))
    return torch.stack(terms).mean() / tol


def balance(p: Tensor, q: Tensor) -> Tensor:
    """min / max of two numbers that are not negative."""
    return torch.minimum(p, q) / torch.maximum(p, q).clamp(min=TINY)

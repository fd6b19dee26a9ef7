"""Non-commutative invariance (NCI): source features are drawn to the target's, which are left as they are."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_float

Discriminator = Callable[[Tensor], Tensor]


def nci_discriminator(
    sources: Sequence[Float[Tensor, "n d"]], target: Float[Tensor, "m d"], discriminator: Discriminator
) -> Float[Tensor, ""]:
    r"""What the discriminator minimises, before each step of the features: to tell all domains from each other.

    .. math:: \sum_{i=1}^S \mathrm{CE}(D(h_i), i) + \mathrm{CE}(D(h_\tau), 0)

    The features are detached: nothing but the discriminator learns from it.

    Args:
        sources: features of each source domain, a tensor each.
        target: features of unlabelled examples of the target domain.
        discriminator: gives S + 1 logits an example: first the target, then the sources in their order.
    Returns: a scalar. It is a sum of S + 1 means, as in the released code.
    Raises: BadInput: if there is no source, features do not fit each other, or the discriminator gives another number of logits.
    Paper: Chaudhuri et al. 2024, arXiv 2402.11682 (Algorithm as in the released code, which takes at most five sources).

    >>> h = torch.zeros(4, 3)
    >>> round(nci_discriminator([h, h], h, torch.nn.Linear(3, 3, bias=False)).item(), 4)  # it knows nothing: 3 log 3
    3.2958
    """
    logits = [_logits(h.detach(), discriminator, len(sources)) for h in _checked(sources, target, "nci_discriminator")]
    labels = [*range(1, len(sources) + 1), 0]
    losses = [
        F.cross_entropy(z, z.new_full((len(z),), i, dtype=torch.long)) for z, i in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses).sum()


def nci(
    sources: Sequence[Float[Tensor, "n d"]],
    target: Float[Tensor, "m d"],
    discriminator: Discriminator,
    *,
    commutative: bool = False,
) -> Float[Tensor, ""]:
    r"""What is added to the loss of the encoder: source features should be taken for the target's.

    .. math:: \frac{1}{S} \, \mathrm{CE}\big( D(h_1, \dots, h_S), 0 \big)

    The target's features get no gradient, so that information that only the target has is not given up for likeness.
    A step is: `nci_discriminator` for the discriminator, then the classification loss of the sources plus this for encoder
    and classifier. Its gradient reaches the discriminator's weights, too: clear it before the discriminator's own step.

    Args:
        sources: features of each source domain, a tensor each, with their gradients.
        target: features of unlabelled examples of the target domain.
        discriminator: as in `nci_discriminator`.
        commutative: draw the target's features to the sources' as well, by -log of the probability that D gives to all
            sources together: the symmetric penalty of the same form, for comparison (ours).
    Returns: a scalar, 0 where the discriminator is sure that every source example is of the target. The released code
        adds it without a factor; the division by S is its own.
    Raises: BadInput: as `nci_discriminator`.
    Paper: Chaudhuri, Georgescu, Dutta 2024, arXiv 2402.11682. In networks with batch norm, source and target batches are normalised
        apart there, which helps the discriminator; freeze it. Target labels must not choose the settings, or say so.

    >>> h = torch.zeros(4, 3)
    >>> round(nci([h, h], h, torch.nn.Linear(3, 3, bias=False)).item(), 4)  # log(3) / 2
    0.5493
    """
    *all_sources, tau = _checked(sources, target, "nci")
    s = len(sources)
    z = _logits(torch.cat(all_sources), discriminator, s)
    loss = F.cross_entropy(z, z.new_zeros(len(z), dtype=torch.long)) / s
    if commutative:
        z = _logits(tau, discriminator, s)
        loss = loss + (z.logsumexp(1) - z[:, 1:].logsumexp(1)).mean() / s
    return loss


def _checked(sources: Sequence[Tensor], target: Tensor, who: str) -> list[Tensor]:
    if isinstance(sources, Tensor) or not len(sources):
        raise BadInput(f"{who} needs a list of source features, a tensor each domain, at least one")
    every = [*sources, target]
    for h in every:
        require_float(h, who, "features")
        if h.ndim != 2 or not h.numel() or h.shape[1] != target.shape[-1]:
            raise BadInput(
                f"{who} needs features of shape (rows, {target.shape[-1]}) in every domain, as the target's are; got "
                f"a {describe(h)}"
            )
    return every


def _logits(h: Tensor, discriminator: Discriminator, sources: int) -> Tensor:
    z = discriminator(h)
    if z.shape != (len(h), sources + 1):
        raise BadInput(
            f"the discriminator must give {sources + 1} logits an example, target first, for {sources} source domains; "
            f"got a {describe(z)}"
        )
    return z

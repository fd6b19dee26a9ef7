"""The labelled pseudo tangent kernel: how learning one labelled example moves the model on another."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pondera.errors import BadInput, describe, require_extra
from pondera.probe._tangent import Seen, gram, look
from pondera.probe._untouched import require_model, untouched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class LabelledKernel:
    """How labelled examples interact in the eyes of a model.

    Attributes:
        kernel: entry (i, j) is positive when a small step on example i with its label serves j with its label.
        labels: that were used, (N,), or (N, places) for models that guess at several places of an example.
        parameters: number of trainable parameters.
    """

    kernel: Float[Tensor, "n n"]
    labels: Int[Tensor, "n *places"]
    parameters: int

    @cached_property
    def cosine(self) -> Float[Tensor, "n n"]:
        """Of the angle between the gradient vectors of two examples, 0 where one vanishes."""
        norm = self.kernel.diagonal().clamp_min(0).sqrt()
        size = norm.unsqueeze(1) * norm
        return torch.where(size > 0, self.kernel / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).clamp(-1, 1)

    @property
    def relations(self) -> Int[Tensor, "n n"]:
        """1 for interchangeable pairs, 0 for unrelated and -1 for contradictory ones: which the cosine is nearest to."""
        return self.cosine.round().to(torch.int8)

    @property
    def groups(self) -> Int[Tensor, "n"]:
        """The label of each example; one group for all where examples have several labels."""
        return self.labels if self.labels.ndim == 1 else torch.zeros_like(self.labels.flatten(1)[:, 0])

    @property
    def typicality(self) -> Float[Tensor, "n"]:
        """Mean cosine with the other examples of the same label: high for redundant ones, low for odd or mislabelled ones.

        Zero for the only example of a label.
        """
        same = (self.groups.unsqueeze(1) == self.groups).fill_diagonal_(False)
        return (self.cosine * same).sum(1) / same.sum(1).clamp_min(1)

    @property
    def self_first(self) -> Bool[Tensor, "n"]:
        """Whether no example serves this one more than it serves itself; where false, the authors suspect poison."""
        return self.kernel.diagonal() >= self.kernel.amax(1)

    def summary(self) -> str:
        """The finding in plain words."""
        n = len(self.kernel)
        if n == 1:
            return f"One labelled example, {self.parameters:,} trainable parameters: it has no pairs."
        same = self.groups.unsqueeze(1) == self.groups
        upper = torch.ones_like(same).triu(1)
        shares = []
        for name, pairs in (("the same label", same & upper), ("different labels", ~same & upper)):
            if pairs.any():
                r = self.relations[pairs]
                counts = [f"{(r == k).float().mean():.0%} {w}" for k, w in RELATIONS.items()]
                shares.append(f"pairs with {name}: {', '.join(counts)}")
        least = self.typicality.argsort(stable=True)[:5].tolist()
        return (
            f"{n} labelled examples, {self.parameters:,} trainable parameters; {'; '.join(shares)}. Least like the others of "
            f"their label: {', '.join(map(str, least))}. {int((~self.self_first).sum())} are served better by another "
            f"example than by themselves."
        )

    def plot(self) -> "Figure":
        """Cosines between all examples, sorted by label, and their distribution (a matplotlib figure)."""
        require_extra("LabelledKernel.plot", "matplotlib")
        from matplotlib.figure import Figure

        fig = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = fig.subplots(1, 2)
        order = self.groups.argsort(stable=True)
        picture = left.imshow(self.cosine[order][:, order].cpu().float().numpy(), vmin=-1, vmax=1, cmap="RdBu")
        fig.colorbar(picture, ax=left, label="cosine")
        left.set(xlabel="example, by label", ylabel="example, by label")
        same = self.groups.unsqueeze(1) == self.groups
        upper = torch.ones_like(same).triu(1)
        for name, pairs, colour in (("same label", same, "#4477aa"), ("different labels", ~same, "#ee6677")):
            values = self.cosine[pairs & upper].cpu().float().numpy()
            if len(values):
                right.hist(values, bins=50, range=(-1, 1), density=True, color=colour, alpha=0.6, label=name)
        right.set(xlabel="cosine between two examples", ylabel="density")
        right.legend(frameon=False)
        return fig


RELATIONS = {1: "interchangeable", 0: "unrelated", -1: "contradictory"}


def labelled_ntk(model: nn.Module, batch: Batch, targets: Int[Tensor, "n *places"] | None = None) -> LabelledKernel:
    r"""The labelled pseudo tangent kernel of a classifier on a labelled batch (lpNTK).

    .. math:: \kappa(i, j) = v_i^T v_j, \qquad v_i = \frac{1}{\sqrt{K}} \sum_{k=1}^{K} s_k(y_i) \, \nabla_\theta z_k(x_i),
              \qquad s_k(y) = \begin{cases} +1 & k = y \\ -1 & k \ne y \end{cases}

    with z the K logits. A gradient step on the cross-entropy of example i moves the logits of j by Theta(j, i)(e_y - p):
    up for the label, down for the rest. Only these signs are kept, s(y), so that the kernel does not fade as the model
    learns its examples; kappa(i, j) is then how much the step on i moves the logits of j in the direction that j's own
    label asks for. By the cosine of v_i and v_j pairs are interchangeable (near 1), unrelated (near 0) or contradictory
    (near -1); where the three meet is not in the code, here it is at +-1/2 (derived).

    Take a model that has learnt the task. At a random start the kernel knows the inputs alone: in the limit of great
    width kappa is the tangent kernel times the mean of s_k(y) s_k(y'), 1 for equal labels and (K - 4) / K for different
    ones (derived). For the same reason two labels contradict each other less, the more classes there are: one image
    with two labels has a cosine near -1 for K = 2 and near 0.6 for K = 10. Compare cosines with those of the same label
    (`typicality`) rather than with 0.

    The model runs in eval mode and is left as it was; memory is bounded as in `ntk`.

    Args:
        model: a classifier; the classes are on the last axis of its output, on axis 1 for outputs of four axes or more.
            One output an example is read by its sign.
        batch: what its forward takes: a tensor, a tuple or list (positional), or a mapping (by keyword); the first axis
            of each tensor is that of the examples.
        targets: the label of each example, or of each place where there are several. None takes the model's own guesses,
            which cannot show a wrong label.
    Returns: a `LabelledKernel`; `sample_clusters` and `redundant_first` take it.
    Raises: BadInput: as `ntk`; for targets of another shape, not integers, or outside the classes.
    Paper: Guo, Ren, Albrecht and Smith 2024, arXiv 2401.08808. Its text was not at hand; the kernel is that of the
        authors' code (MaskSumKernel), which leaves out the constant 1 / K.

    >>> net = nn.Linear(2, 2, bias=False)  # v_i v_j = x_i x_j (s_i s_j) / 2
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    >>> found = labelled_ntk(net, x, torch.tensor([0, 0, 1]))
    >>> found.kernel
    tensor([[ 1.,  1., -1.],
            [ 1.,  2., -1.],
            [-1., -1.,  1.]])
    >>> found.relations[0].tolist()  # itself, a neighbour with its label, its twin with the other
    [1, 1, -1]
    """
    who = "labelled_ntk"
    require_model(model, who)
    with untouched(model, grad=True):
        seen = look(model, batch, who)
        labels, signs = _signs(seen, targets, who)
        kernel = gram(model, seen, signs.unsqueeze(1), None, None, who)[:, :, 0, 0] / signs.shape[1]
    return LabelledKernel(kernel, labels, sum(p.numel() for p in model.parameters() if p.requires_grad))


def _signs(seen: Seen, targets: Tensor | None, who: str) -> tuple[Tensor, Float[Tensor, "n outputs"]]:
    """The labels, and s(y) laid out as the flattened outputs are."""
    z = seen.scores
    single = z.ndim == 1 or (z.ndim == 2 and z.shape[1] == 1)
    if single:
        z, axis, classes = z.reshape(-1, 1), 1, 2
        guesses = (z[:, 0] > 0).long()
    else:
        axis = z.ndim - 1 if z.ndim < 4 else 1
        guesses, classes = z.argmax(axis), z.shape[axis]
    labels = guesses
    if targets is not None:
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != guesses.shape:
            got = describe(targets) if isinstance(targets, Tensor) else type(targets).__name__
            raise BadInput(f"{who} needs integer targets of shape {tuple(guesses.shape)}, got {got}")
        labels = targets.detach().long().to(z.device)
        if not ((labels >= 0) & (labels < classes)).all():
            raise BadInput(
                f"{who} needs targets from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
    if single:
        return labels, (2 * labels - 1).to(z.dtype).unsqueeze(1)
    return labels, torch.full_like(z, -1.0).scatter_(axis, labels.unsqueeze(axis), 1.0).flatten(1)


@dataclass(frozen=True)
class SampleClusters:
    """Examples gathered around heads that are as unlike each other as can be.

    Attributes:
        heads: the example at the head of each cluster, label after label, in the order in which they were chosen.
        cluster: of each example, an index into `heads`.
        sizes: examples in each cluster, its head included.
    """

    heads: Int[Tensor, "clusters"]
    cluster: Int[Tensor, "n"]
    sizes: Int[Tensor, "clusters"]


def sample_clusters(found: LabelledKernel, count: int) -> SampleClusters:
    """Farthest-point clustering of the examples of each label by their labelled kernel.

    The first head of a label is the example with the largest entry; each further one is the example least similar to
    its head. An example belongs to the head it is most similar to, by the kernel itself, not the cosine. Large clusters
    hold the easy, redundant examples of a label, clusters of one the odd ones.

    Args:
        found: from `labelled_ntk`.
        count: clusters a label, at least 1; a label with fewer examples has as many clusters as examples.
    Returns: a `SampleClusters`.
    Raises: BadInput: for a count below 1.
    Paper: Guo, Ren, Albrecht and Smith 2024, arXiv 2401.08808, as in the authors' code (experiment 3.2), except that
        theirs takes no further head from a cluster whose head is less similar to itself than to all its members.

    >>> kernel = torch.tensor([[3.0, 2.5, 0.0], [2.5, 2.8, 0.5], [0.0, 0.5, 1.0]])
    >>> sample_clusters(LabelledKernel(kernel, torch.zeros(3, dtype=torch.long), 1), 2)
    SampleClusters(heads=tensor([0, 2]), cluster=tensor([0, 0, 1]), sizes=tensor([2, 1]))
    """
    if count < 1:
        raise BadInput(f"sample_clusters needs at least one cluster a label, got {count}")
    heads: list[int] = []
    cluster = torch.empty(len(found.kernel), dtype=torch.long)
    for _, members in _by_label(found):
        order, own = _farthest(found.kernel[members][:, members], count)
        cluster[members] = own + len(heads)
        heads += members[order].tolist()
    return SampleClusters(torch.tensor(heads), cluster, torch.bincount(cluster, minlength=len(heads)))


def redundant_first(found: LabelledKernel) -> Int[Tensor, "n"]:
    """All examples in the order in which they can be dropped, the most redundant first.

    `sample_clusters` with ever more clusters makes one example after another a head; the last ones to become heads are
    closest to what is there already and are dropped first. Keeping the heads of a clustering is the authors' pruning,
    and this order holds it for every number kept. Labels shrink in proportion.

    Args: found: from `labelled_ntk` of a model that has learnt the task.
    Returns: a permutation of the examples; to drop a tenth, leave out its first tenth.
    Raises: nothing beyond what its argument can raise.
    Paper: Guo, Ren, Albrecht and Smith 2024, arXiv 2401.08808 (their code prunes to heads; the order is derived).

    >>> kernel = torch.tensor([[3.0, 2.5, 0.0], [2.5, 2.8, 0.5], [0.0, 0.5, 1.0]])
    >>> redundant_first(LabelledKernel(kernel, torch.zeros(3, dtype=torch.long), 1))
    tensor([1, 2, 0])
    """
    place = torch.empty(len(found.kernel), dtype=torch.float64)
    for _, members in _by_label(found):
        order, _ = _farthest(found.kernel[members][:, members], len(members))
        place[members[order]] = torch.arange(len(members), dtype=torch.float64) / len(members)
    return place.argsort(descending=True, stable=True)


def _by_label(found: LabelledKernel) -> list[tuple[int, Int[Tensor, "members"]]]:
    groups = found.groups.cpu()
    return [(int(g), (groups == g).nonzero().flatten()) for g in groups.unique()]


def _farthest(kernel: Float[Tensor, "m m"], count: int) -> tuple[Int[Tensor, "heads"], Int[Tensor, "m"]]:
    """Heads in the order of their choice, and for each example which of them it belongs to."""
    kernel = kernel.cpu()
    heads = [int(kernel.diagonal().argmax())]  # of a Gram matrix no entry is larger
    own = torch.zeros(len(kernel), dtype=torch.long)
    near = kernel[heads[0]].clone()  # similarity to the own head; heads themselves are out of the running
    near[heads[0]] = torch.inf
    for k in range(1, min(count, len(kernel))):
        new = int(near.argmin())
        heads.append(new)
        closer = kernel[new] > near
        own[closer] = own[new] = k
        near = torch.where(closer, kernel[new], near)
        near[new] = torch.inf
    return torch.tensor(heads), own

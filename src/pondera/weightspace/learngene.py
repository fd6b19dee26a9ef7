"""Stage-wise weight sharing (SWS): one small set of trained blocks from which models of any depth start."""

import copy
from collections.abc import Iterable, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_float

Blocks = nn.ModuleList | nn.Sequential


def share_stages(blocks: Iterable[nn.Module], counts: Sequence[int]) -> Blocks:
    r"""The blocks of the auxiliary model: within a stage every layer is the same block, with one set of weights.

    .. math:: \theta_i = \theta_{s(i)}, \qquad s = (\underbrace{0, \dots, 0}_{c_1}, \underbrace{1, \dots, 1}_{c_2}, \dots)

    The gradient of a shared weight is the sum over its layers; norms inside a block are shared with it. Put the result in
    the model's place of blocks, ``model.blocks = share_stages(model.blocks, counts)``, and train it with `distillation_loss`.
    `parameters()` has each weight once, the state dict under each layer's name.

    Args:
        blocks: one a layer, sum(counts) of them, of which the first of each stage stays; or one a stage.
        counts: layers of each stage, in order; 3, 3, 4, 3, 3 in the paper's auxiliary model of 16 layers.
    Returns: an `nn.Sequential` where blocks was one, else an `nn.ModuleList`; its blocks are those given, not copies.
    Raises: BadInput: for counts that are not positive whole numbers, or another number of blocks.
    Paper: Xia, Zhu, Yang and Geng 2024, arXiv 2404.16897 (IJCAI); facts from the authors' code.

    >>> shared = share_stages([nn.Linear(4, 4) for _ in range(6)], (2, 3, 1))
    >>> shared[0] is shared[1], shared[1] is shared[2], sum(p.numel() for p in shared.parameters())
    (True, False, 60)
    """
    counts = _counts(counts, "share_stages", least=1)
    given = _blocks(blocks, "share_stages")
    if len(given) not in (sum(counts), len(counts)):
        raise BadInput(
            f"share_stages needs a block for each of {sum(counts)} layers or one for each of {len(counts)} stages, "
            f"got {len(given)}"
        )
    starts = [sum(counts[:s]) for s in range(len(counts))]
    stages = given if len(given) == len(counts) else [given[i] for i in starts]
    return _like(blocks, [stage for stage, count in zip(stages, counts, strict=True) for _ in range(count)])


def expand_stages(shared: Iterable[nn.Module], depth: int | Sequence[int]) -> Blocks:
    """The blocks of a model of another depth: each layer starts as its own copy of its stage's block.

    Stages are told by their blocks being one object, so `shared` may be what `share_stages` gave or one block a stage.
    At the auxiliary model's own depth the function is the same; the layers of a stage part as they train.

    Args:
        shared: blocks of the auxiliary model, stage by stage.
        depth: how many layers, spread over the stages by `stage_counts`, or the layers of each stage (0 leaves it out).
    Returns: a list like `shared` of copies that share nothing. Everything else of the model (embeddings, last norm, head)
        is the auxiliary model's and is copied by `load_state_dict`; look at the keys it lacks.
    Raises: BadInput: for a depth below 1, counts that do not fit the stages, stages that are not contiguous.
    Paper: Xia et al. 2024, arXiv 2404.16897.

    >>> import torch
    >>> shared = share_stages([nn.Linear(4, 4) for _ in range(3)], (2, 1))
    >>> deep = expand_stages(shared, 5)
    >>> [torch.equal(a.weight, shared[k].weight) for a, k in zip(deep, (0, 0, 0, 2, 2))], deep[0] is deep[1]
    ([True, True, True, True, True], False)
    """
    given = _blocks(shared, "expand_stages")
    stages = [block for i, block in enumerate(given) if not i or block is not given[i - 1]]
    if len({id(block) for block in stages}) < len(stages):
        raise BadInput("expand_stages needs the layers of a stage side by side, got a block that comes back")
    counts = stage_counts(depth, len(stages)) if isinstance(depth, int) else _counts(depth, "expand_stages", least=0)
    if len(counts) != len(stages) or not sum(counts):
        raise BadInput(f"expand_stages needs a count for each of {len(stages)} stages and a layer, got {tuple(counts)}")
    layers = [copy.deepcopy(stage) for stage, count in zip(stages, counts, strict=True) for _ in range(count)]
    return _like(shared, layers)


def stage_counts(depth: int, stages: int) -> tuple[int, ...]:
    """How many layers of a model come from each stage: evenly, the earlier stages taking what is left over.

    With fewer layers than stages, layer i comes from stage floor(i stages / depth).

    Args:
        depth: layers of the model.
        stages: stages of the auxiliary model.
    Raises: BadInput: unless both are at least 1.
    Paper: the authors' code lists 3, 3, 2, 2, 2 for 12 layers of 5 stages; the rule for other depths is ours.

    >>> stage_counts(12, 5), stage_counts(16, 5), stage_counts(2, 5)
    ((3, 3, 2, 2, 2), (4, 3, 3, 3, 3), (1, 0, 1, 0, 0))
    """
    for name, value in (("depth", depth), ("stages", stages)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BadInput(f"stage_counts needs {name} of at least 1, a whole number, got {value!r}")
    if depth < stages:
        taken = {i * stages // depth for i in range(depth)}
        return tuple(int(s in taken) for s in range(stages))
    each, over = divmod(depth, stages)
    return tuple(each + (s < over) for s in range(stages))


def distillation_loss(
    logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"] | None = None,
    *,
    alpha: float = 1.0,
    temperature: float = 3.0,
) -> Float[Tensor, ""]:
    r"""Soft distillation as the auxiliary model is trained with: labels and a teacher's softened probabilities.

    .. math:: (1 - \alpha) \, {\rm CE}(z, y) + \alpha \, \frac{T^2}{B C} \sum_{b, c} p^t_{bc} \log \frac{p^t_{bc}}{p_{bc}},
              \qquad p = {\rm softmax}(z / T)

    The sum over B inputs and C classes is divided by both, as in DeiT's code; other codes divide by B alone.

    Args:
        logits, teacher_logits: (batch, classes); no gradient reaches the teacher.
        labels: class indices; needed for an alpha below 1 alone.
        alpha: share of the teacher; 1 in the authors' commands.
        temperature: T; 3 in DeiT's code (recalled).
    Returns: a scalar, differentiable.
    Raises: BadInput: for logits that differ in shape, an alpha outside [0, 1], a temperature not above 0, labels missing.
    Paper: Xia et al. 2024, arXiv 2404.16897; the loss of Touvron et al. 2021 (DeiT).

    >>> import torch
    >>> distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    tensor(0.)
    """
    who = "distillation_loss"
    require_float(logits, who, "batch of logits")
    require_float(teacher_logits, who, "batch of teacher's logits")
    if logits.ndim != 2 or logits.shape != teacher_logits.shape or not logits.numel():
        raise BadInput(
            f"{who} needs logits (batch, classes) of both, got {describe(logits)}, {describe(teacher_logits)}"
        )
    if not 0 <= alpha <= 1 or not temperature > 0:
        raise BadInput(f"{who} needs an alpha in [0, 1] and a temperature above 0, got {alpha} and {temperature}")
    if labels is None and alpha < 1:
        raise BadInput(f"{who} needs labels for an alpha below 1, got none and {alpha}")
    student, teacher = (F.log_softmax(z / temperature, 1) for z in (logits, teacher_logits.detach()))
    soft = (
        (teacher.exp() * (teacher - student)).sum() * temperature**2 / logits.numel()
    )  # F.kl_div has no batching rule
    if labels is None or alpha == 1:
        return alpha * soft
    return (1 - alpha) * F.cross_entropy(logits, labels) + alpha * soft


def _blocks(blocks: Iterable[nn.Module], who: str) -> list[nn.Module]:
    given = list(blocks)
    if not given or not all(isinstance(block, nn.Module) for block in given):
        raise BadInput(f"{who} needs a list of modules, one a layer or stage, got {len(given)} things, not all modules")
    return given


def _counts(counts: Sequence[int], who: str, least: int) -> list[int]:
    found = list(counts)
    if not found or any(isinstance(c, bool) or not isinstance(c, int) or c < least for c in found):
        raise BadInput(f"{who} needs counts of at least {least}, whole numbers, one a stage, got {found}")
    return found


def _like(given: Iterable[nn.Module], layers: list[nn.Module]) -> Blocks:
    return nn.Sequential(*layers) if isinstance(given, nn.Sequential) else nn.ModuleList(layers)

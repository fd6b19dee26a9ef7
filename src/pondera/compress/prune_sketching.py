"""Pruning before training as sketching: masks drawn at random by a score, not taken from its top."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call

from pondera._batch import in_eval_mode
from pondera._weights import require_owned
from pondera.compress._calibration import Loss, _tensors, batches_of, forward
from pondera.compress._report import CompressReport
from pondera.compress.masks import bake, hold_masks, prunable, pruned, top_masks
from pondera.errors import BadInput, describe, require_finite

SCORES = ("magnitude", "snip", "synflow")
Scores = Mapping[str, Float[Tensor, "*shape"]]


# -- networks ----------------------------------------------------------------------------------------------------------


def sketch_prune(
    model: nn.Module,
    calibration: Any = None,
    *,
    keep: float = 0.1,
    score: str = "magnitude",
    sample: bool = True,
    rounds: int | None = None,
    loss: Loss | None = None,
    generator: Generator | None = None,
) -> CompressReport:
    r"""Prune an untrained model by a mask drawn at random, with chances by a score. The mask is held; train then.

    Rounds r = 1 .. R go from all weights to the share `keep`, :math:`k_r = \mathrm{keep}^{r / R}`; in each the score of what is
    left is found anew and a mask kept by it: drawn (`sketch_masks`), or the top k. Scores are those of `pruning_scores`.

    A top-k mask by a score that needs no data can leave a layer without a weight, after which nothing passes: a drawn one
    rarely does. Where the score is good by itself (SNIP, SynFlow in 100 rounds) drawing changes little.

    Args:
        model: changed in place; the weights of linear and convolution layers are pruned, biases, norms and embeddings are not.
        calibration: batches for "snip" (with `loss`) and for the form of the input of "synflow"; without them "synflow" takes
            one row of ones, which fits models that begin with a linear layer.
        keep: share of weights kept. The default is a common one and not the paper's.
        score: "magnitude", "snip" or "synflow".
        sample: draw the mask; False takes the top, as those methods do by themselves.
        rounds: R; by default 1, and 100 for "synflow" without drawing, as its authors have it.
        loss: `loss(model, batch)`; "snip" needs it.
        generator: source of the draws, on the CPU; None takes torch's default one.
    Returns: the report; its fact `empty_weights` counts weights of which nothing was kept: such a net cannot learn.
    Raises: BadInput: for a share, score or rounds out of range, what "snip" lacks, weights or data with NaN.
    Paper: Bar and Giryes 2023, arXiv 2305.17559. The body was not read and there is no code of theirs. Binary masks in networks are
        recalled; the draw without replacement by Gumbel's rule is our reading. SNIP: Lee et al. 2019, arXiv 1810.02340.
        SynFlow: Tanaka et al. 2020, arXiv 2006.05467, whose code takes absolute values of buffers as well; here parameters alone.

    >>> net = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> sketch_prune(net, keep=0.25, generator=torch.Generator().manual_seed(0)).ratio < 0.3
    True
    """
    who = "sketch_prune"
    if rounds is None:
        rounds = 100 if score == "synflow" and not sample else 1
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise BadInput(f"{who} needs at least one round, got {rounds!r}")
    if not (isinstance(keep, (int, float)) and 0 < keep <= 1):
        raise BadInput(f"{who} needs a share to keep above 0 and at most 1, got {keep!r}")
    weights = {name: w.clone() for name, w in prunable(model, who).items()}
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for r in range(1, rounds + 1):
        found = pruning_scores(model, calibration, score=score, loss=loss, masks=masks)
        masks = sketch_masks(found, keep ** (r / rounds), sample=sample, generator=generator)
    empty = float(sum(not m.any() for m in masks.values()))
    report = pruned(weights, masks, who, empty_weights=empty)
    hold_masks(model, masks)
    return report


sketch_prune.at = "start"  # type: ignore[attr-defined]  # where a recipe applies it: before training


@torch.no_grad()
def sketch_masks(
    scores: Scores, keep: float, *, sample: bool = True, generator: Generator | None = None
) -> dict[str, Tensor]:
    r"""Masks that keep a share of all weights: drawn without replacement with chances by their scores, or the top.

    The k largest of :math:`\log s_i + G_i` with Gumbel noise :math:`G_i = -\log(-\log u_i)` are k draws without replacement, each
    with chances :math:`s_i / \sum_j s_j` among those left. A score of 0 is never drawn while there are others.

    Args:
        scores: by the weight's name, at least 0.
        keep: share of all weights, in (0, 1]; exactly the rounded number is kept, at least one.
        sample: draw; False takes the largest scores.
        generator: source of the draws, on the CPU.
    Returns: by name, True where a weight is kept.
    Raises: BadInput: for scores below 0, NaN or none above 0, or a share out of range.
    Paper: Bar and Giryes 2023, arXiv 2305.17559: masks with chances by a pruner's scores; without replacement is our reading.

    >>> masks = sketch_masks({"weight": torch.tensor([[0.0, 1.0, 2.0]])}, 2 / 3, generator=torch.Generator().manual_seed(0))
    >>> masks["weight"].tolist()
    [[False, True, True]]
    """
    who = "sketch_masks"
    for name, s in scores.items():
        require_finite(s, who, f"scores of {name}")
        if (s < 0).any():
            raise BadInput(f"{who} needs scores of at least 0, got some below in those of {name}, a {describe(s)}")
    if not scores or not any(s.any() for s in scores.values()):
        raise BadInput(f"{who} needs a score above 0, got none")
    if not sample:
        return top_masks(scores, keep, "model", who)
    keys = {}
    for name, s in scores.items():
        u = torch.rand(s.shape, dtype=torch.float64, generator=generator).clamp_min(torch.finfo(torch.float64).tiny)
        keys[name] = s.double().log() - (-u.log()).log().to(s.device)
    return top_masks(keys, keep, "model", who)


def pruning_scores(
    model: nn.Module,
    calibration: Any = None,
    *,
    score: str = "magnitude",
    loss: Loss | None = None,
    masks: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    r"""What each weight counts for before training.

    - ``"magnitude"``: :math:`|w|`.
    - ``"snip"``: :math:`|w \, \partial L / \partial w|`, the gradients of all batches summed first, over its sum for all weights.
    - ``"synflow"``: :math:`|w \, \partial R / \partial w|`, where R is the sum of the outputs of the model with all parameters
      replaced by their absolute values, for an input of ones. In float64, for R overflows float32 in deep nets. Without
      biases the scores of each layer of a ReLU net sum to R.

    The model is looked at in eval mode and not changed.

    Args:
        model: its weights of linear and convolution layers are scored.
        calibration, score, loss: as in `sketch_prune`.
        masks: what is left of each weight; the others count as 0 and score 0.
    Returns: scores by the weight's name in the state dict, of its shape, in float32 or float64.
    Raises: BadInput: for another score, without the loss or data that it needs, for a score with NaN or infinity.
    Paper: as in `sketch_prune`.

    >>> net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    >>> a, b = pruning_scores(net, score="synflow").values()
    >>> torch.allclose(a.sum(), b.sum())
    True
    """
    who = "pruning_scores"
    if score not in SCORES:
        raise BadInput(f"{who} knows the scores {', '.join(SCORES)}, got {score!r}")
    weights = prunable(model, who)
    if score == "magnitude":
        held = weights if masks is None else {n: w * masks[n] for n, w in weights.items()}
        return {n: (w if w.dtype == torch.float64 else w.float()).abs() for n, w in held.items()}
    if score == "snip" and (loss is None or calibration is None):
        raise BadInput(f"{who} needs calibration batches and a loss for the score 'snip'")
    batches = None if calibration is None else batches_of(calibration, who)
    plain = bake(copy.deepcopy(model)).requires_grad_(True)
    with torch.no_grad():
        for name, mask in (masks or {}).items():
            plain.get_parameter(name).mul_(mask)
    with in_eval_mode(plain), torch.random.fork_rng():
        found = (
            _snip(plain, batches, loss, list(weights))
            if score == "snip"
            else _synflow(plain, batches, loss, list(weights))
        )
    for name, s in found.items():
        require_finite(s, who, f"{score} score of {name}")
    return found


def _snip(model: nn.Module, batches: Any, loss: Any, names: list[str]) -> dict[str, Tensor]:
    params = [model.get_parameter(n) for n in names]
    total = [torch.zeros_like(p) for p in params]
    for batch in batches:
        out = forward(model, batch, "pruning_scores", loss)
        for t, g in zip(total, torch.autograd.grad(out, params, allow_unused=True), strict=True):
            if g is not None:
                t += g
    scores = [(p.detach() * g).abs() for p, g in zip(params, total, strict=True)]
    scores = [s if s.dtype == torch.float64 else s.float() for s in scores]
    whole = torch.stack([s.sum() for s in scores]).sum()
    if not whole > 0:
        raise BadInput("pruning_scores found no gradient of the loss for any weight")
    return {n: s / whole for n, s in zip(names, scores, strict=True)}


def _synflow(model: nn.Module, batches: Any, loss: Loss | None, names: list[str]) -> dict[str, Tensor]:
    args, kwargs = _ones(model, batches, loss)
    state = {
        n: p.detach().abs().double().requires_grad_(n in names)
        for n, p in model.named_parameters(remove_duplicate=False)
    }
    state |= {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
    try:
        out = functional_call(model, state, args, kwargs)
    except (RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise BadInput(f"pruning_scores could not run the model on an input of ones in float64: {words}") from error
    total = torch.stack([x.sum() for x in _tensors(out) if x.is_floating_point()]).sum()
    grads = torch.autograd.grad(total, [state[n] for n in names], allow_unused=True)
    return {
        n: torch.zeros_like(state[n]) if g is None else (state[n].detach() * g).abs()
        for n, g in zip(names, grads, strict=True)
    }


def _ones(model: nn.Module, batches: Any, loss: Loss | None) -> tuple[Any, Any]:
    """What the model is called with on one example, its real numbers all 1."""
    if batches is None:
        first = require_owned(model, "pruning_scores")[0]
        if first.kind != "linear":
            raise BadInput(
                f"pruning_scores needs a calibration batch to know the input of a model that begins with a {first.kind} one"
            )
        like = first.read()
        return (torch.ones(1, like.shape[1], dtype=torch.float64, device=like.device),), {}
    seen: list[Any] = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            forward(model, batches[0], "pruning_scores", loss)
    finally:
        hook.remove()
    if not seen:
        raise BadInput("pruning_scores saw the loss call nothing of the model on its calibration batch")
    one = [torch.ones_like(x[:1], dtype=torch.float64) if x.is_floating_point() else x[:1] for x in _tensors(seen[0])]
    left = iter(one)

    def put(x: Any) -> Any:
        if isinstance(x, Tensor):
            return next(left)
        if isinstance(x, Mapping):
            return {k: put(v) for k, v in x.items()}
        return type(x)(put(v) for v in x) if isinstance(x, (tuple, list)) else x

    return put(seen[0][0]), put(seen[0][1])


# -- the linear model, where it is exact -------------------------------------------------------------------------------


@torch.no_grad()
def sketch_probabilities(
    weight: Float[Tensor, "d"], norms: Float[Tensor, "d"] | None = None, *, mix: float = 0.0
) -> Float[Tensor, "d"]:
    r"""The chances that make the sketch's error least: :math:`p_i \propto |w_i| \, \lVert a_i \rVert`, mixed with even ones.

    Args:
        weight: w of the linear model A w.
        norms: :math:`\lVert a_i \rVert` of each feature over the data; None where there are no data: all alike.
        mix: share of even chances. Chances from a start are bad for what training makes of the weights: an entry near 0 at the
            start may not stay there, and its error is divided by its chance.
    Returns: chances that sum to 1.
    Raises: BadInput: for shapes that differ, NaN, a mix outside [0, 1], or weights that are all 0.
    Paper: Bar and Giryes 2023, arXiv 2305.17559, by Drineas, Kannan and Mahoney's (2006) sampling; the mix is ours.

    >>> sketch_probabilities(torch.tensor([1.0, -3.0]))
    tensor([0.2500, 0.7500])
    """
    who = "sketch_probabilities"
    size = require_finite(weight, who, "weight").abs()
    if norms is not None:
        size = size * require_finite(norms, who, "norms").abs() if norms.shape == weight.shape else size
        if norms.shape != weight.shape:
            raise BadInput(f"{who} needs a norm for each weight, got a {describe(norms)} for a {describe(weight)}")
    if not 0 <= mix <= 1:
        raise BadInput(f"{who} needs a mix of 0 to 1, got {mix!r}")
    if weight.ndim != 1 or not size.any():
        raise BadInput(f"{who} needs a vector of weights that are not all 0, got a {describe(weight)}")
    return (1 - mix) * size / size.sum() + mix / len(size)


@torch.no_grad()
def sketch_mask(
    probabilities: Float[Tensor, "d"], draws: int, *, generator: Generator | None = None
) -> Float[Tensor, "d"]:
    r"""The unbiased mask :math:`m_i = c_i / (s p_i)`, with :math:`c_i` of s draws with replacement that fell on i.

    Fewer than s entries are kept where some are drawn again.

    Args:
        probabilities: p, that sum to 1.
        draws: s, at least 1.
        generator: source of the draws, on the CPU.
    Returns: m, whose mean over draws is 1 wherever p is above 0.
    Raises: BadInput: for no draws, or chances that are below 0 or do not sum to 1.
    Paper: Bar and Giryes 2023, arXiv 2305.17559.

    >>> sketch_mask(torch.tensor([1.0, 0.0]), 3)
    tensor([1., 0.])
    """
    p = _chances(probabilities, draws, "sketch_mask")
    drawn = torch.multinomial(p.double().cpu(), draws, replacement=True, generator=generator).to(p.device)
    count = torch.bincount(drawn, minlength=len(p)).to(p.dtype)
    return torch.where(count > 0, count / (draws * p), 0)


@torch.no_grad()
def sketch_error(
    weight: Float[Tensor, "d"], features: Float[Tensor, "n d"], probabilities: Float[Tensor, "d"], draws: int
) -> Float[Tensor, ""]:
    r"""The mean squared error of a linear model under the unbiased mask, in closed form.

    .. math:: \mathbb E \lVert A (m \circ w) - A w \rVert^2
              = \frac1s \left( \sum_i \frac{w_i^2 \lVert a_i \rVert^2}{p_i} - \lVert A w \rVert^2 \right)

    It holds for whatever weights the mask is put on: with p from the start and w from the end of training it is the error that
    a mask found at the start makes at the end.

    Args:
        weight: w, at the start or after training.
        features: A, a column a feature.
        probabilities, draws: p and s of `sketch_mask`.
    Returns: the error; infinite where a chance is 0 and the entry's part is not.
    Raises: BadInput: as `sketch_mask`, and for shapes that do not fit.
    Paper: Bar and Giryes 2023, arXiv 2305.17559, whose bounds start from it (for their distance of trained weights from their start
        see there); derived here from Drineas, Kannan and Mahoney's (2006) sampling.

    >>> sketch_error(torch.ones(2), torch.eye(2), torch.tensor([0.5, 0.5]), 2)
    tensor(1.)
    """
    who = "sketch_error"
    p = _chances(probabilities, draws, who)
    require_finite(weight, who, "weight")
    require_finite(features, who, "features")
    if weight.shape != p.shape or features.ndim != 2 or features.shape[1:] != p.shape:
        raise BadInput(
            f"{who} needs a column of features and a chance for each weight, got a {describe(features)} and {len(p)} "
            f"chances for a {describe(weight)}"
        )
    part = weight.square() * features.square().sum(0)
    whole = torch.where(part > 0, part / p, 0).sum()
    return (whole - (features @ weight).square().sum()) / draws


def _chances(p: Tensor, draws: int, who: str) -> Tensor:
    require_finite(p, who, "probabilities")
    if p.ndim != 1 or (p < 0).any() or abs(float(p.double().sum()) - 1) > 1e-4:
        raise BadInput(
            f"{who} needs a vector of chances that sum to 1, got a {describe(p)} with sum {float(p.sum()):.4g}"
        )
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise BadInput(f"{who} needs at least one draw, got {draws!r}")
    return p

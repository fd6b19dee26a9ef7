"""Selective decay: weights the loss hardly depends on shrink, the others train as usual; then cuts as large as quality allows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from pondera.compress._calibration import Loss, batches_of, mean_loss
from pondera.compress._report import CompressReport
from pondera.compress.masks import hold_masks, prunable, pruned, top_masks
from pondera.errors import BadInput

SCALES = ("relative", "raw")


class SelectiveDecay:
    r"""Weight decay for the weights that do not matter just now, attached to any optimizer.

    After each step of the optimizer every weight is drawn to 0 by its *irrelevance*, a number in (0, 1] that is 1 where the
    loss does not depend on the weight and falls with the size of its gradient:

    .. math:: w \leftarrow w - \eta \lambda \, I(w) \, w, \qquad I = \exp(-k \, |\partial L / \partial w|)

    I counts as a constant, and the decay is decoupled from the optimizer's own scaling, as in AdamW (under Adam a term in
    the gradient would be scaled away). With ``scale="raw"``, k = 1, as the paper is recalled: gradients of one weight are
    so small (1e-5 to 1e-3 in a small net) that I is 1 all over and the method is plain weight decay. With
    ``scale="relative"`` k is `sharpness` over the mean size of the model's gradients that are not 0, so that I no longer depends on how
    the loss is scaled, on the batch or on the net.

    What to know:

    - The gradient is that of the last batch. At an optimum its mean is 0 and what is left is noise, whose square is the
      Fisher information: it is this that the decay then goes by.
    - Units that are dead in a batch have no gradient: their weights decay fully. So do rows of an input that is always 0.

    Args:
        model: the weights of linear and convolution layers decay; biases, norms and embeddings do not.
        optimizer: that steps the model; a hook is put after its step, and its rate (eta, of each weight's own group) counts.
        strength: lambda, at least 0.
        scale: what a gradient is measured by: "relative" to the mean over all weights, or "raw".
        sharpness: k, times the mean where relative; 0 is plain decoupled weight decay.
    Raises: BadInput: for another scale, numbers below 0, a weight that the optimizer does not step.
    Paper: Bonetta, Ribero and Cancelliere 2022, arXiv 2204.04977 (Applied Intelligence 2023). Only the abstract was read: the
        form of I is recalled, the relative scale and the decoupling are ours, and there is no code of the authors to compare with.

    >>> net = nn.Linear(4, 2)
    >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> decay = SelectiveDecay(net, sgd, 0.5)
    >>> net.weight.grad, was = torch.zeros(2, 4), net.weight.detach().clone()
    >>> sgd.step()
    >>> torch.allclose(net.weight, 0.95 * was)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        strength: float = 1e-2,
        *,
        scale: str = "relative",
        sharpness: float = 1.0,
    ) -> None:
        who = "SelectiveDecay"
        if scale not in SCALES:
            raise BadInput(f"{who} measures gradients by one of {', '.join(SCALES)}, got {scale!r}")
        for name, number in (("strength", strength), ("sharpness", sharpness)):
            if not (isinstance(number, (int, float)) and number >= 0 and math.isfinite(number)):
                raise BadInput(f"{who} needs a {name} of at least 0, got {number!r}")
        held = {id(p) for p in _trained(model, who).values()}
        self.strength, self.scale, self.sharpness = float(strength), scale, float(sharpness)
        self._groups = [(g, [p for p in g["params"] if id(p) in held]) for g in optimizer.param_groups]
        if missing := len(held) - sum(len(ps) for _, ps in self._groups):
            raise BadInput(f"{who} got an optimizer that does not step {missing} of the model's {len(held)} weights")
        self._hook = optimizer.register_step_post_hook(self._decay)

    @torch.no_grad()
    def _decay(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = [(g, [p for p in ps if p.grad is not None]) for g, ps in self._groups]
        every = [p.grad for _, ps in now for p in ps]
        if not every:
            return
        k = torch.tensor(self.sharpness, device=every[0].device)
        if self.scale == "relative":
            total = torch.stack([t.float() for t in torch._foreach_norm(every, 1)]).sum()
            seen = torch.stack([g.count_nonzero() for g in every]).sum()  # what a mask holds at 0 does not count
            k = k * seen / total.clamp_min(torch.finfo(torch.float32).tiny)
        for group, ps in now:
            if not ps:
                continue
            exponents = torch._foreach_abs([p.grad for p in ps])
            torch._foreach_mul_(exponents, -k)
            torch._foreach_exp_(exponents)
            torch._foreach_mul_(exponents, -(group["lr"] * self.strength))
            torch._foreach_addcmul_(ps, ps, exponents)

    def remove(self) -> None:
        """Decay no more."""
        self._hook.remove()


def relevance_prune(
    model: nn.Module,
    calibration: Any,
    *,
    loss: Loss,
    tolerance: float = 0.005,
    score: Callable[[nn.Module, Any], float] | None = None,
    resolution: float = 0.01,
) -> CompressReport:
    r"""Cut the smallest weights, as many as quality allows: the threshold on worsening. The mask is held.

    The largest share of weights is sought, by halving, of which the smallest by absolute value over all layers can be set to 0
    and the score worsens by at most `tolerance`. The masks stay while training goes on (with `SelectiveDecay`), and the next
    call cuts further: these are the rounds of the paper.

    Args:
        model: changed in place; the weights of linear and convolution layers are cut.
        calibration: batches to judge by, held out from training.
        loss: `loss(model, batch)`; the score is exp(-mean loss), the geometric mean of the probabilities given, unless
            `score` is given.
        tolerance: how far the score may fall, 0.005 as half a point of accuracy.
        score: `score(model, batches)`, larger is better, such as an accuracy.
        resolution: the share is found to this part of the weights still held.
    Returns: the report, with the score before and after among its facts.
    Raises: BadInput: for a tolerance or resolution out of range, weights or data with NaN, a loss that cannot be run.
    Paper: Bonetta, Ribero and Cancelliere 2022, arXiv 2204.04977. Recalled: thresholds fall where the metric worsens by more than a
        tolerance; that the share is found by halving is ours (the score need not fall evenly, so a larger share may exist).

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> net, x = nn.Linear(20, 2), torch.randn(64, 20)
    >>> net.weight.data[:, 5:] *= 1e-4
    >>> report = relevance_prune(net, [(x, net(x).argmax(1))], loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    >>> report.layers[0].numbers <= 10
    True
    """
    who = "relevance_prune"
    if not (isinstance(tolerance, (int, float)) and 0 <= tolerance < math.inf):
        raise BadInput(f"{who} needs a tolerance of at least 0, got {tolerance!r}")
    if not 0 < resolution < 1:
        raise BadInput(f"{who} needs a resolution between 0 and 1, got {resolution!r}")
    batches = batches_of(calibration, who)
    weights = {name: w.clone() for name, w in prunable(model, who).items()}
    held = {name: w != 0 for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    alive = sum(int(m.sum()) for m in held.values())
    sizes = {name: w.abs() for name, w in weights.items()}

    def judged() -> float:
        found = score(model, batches) if score else math.exp(-mean_loss(model, batches, who, loss))
        if not math.isfinite(found):
            raise BadInput(f"{who} needs a finite score of the model, got {found}")
        return float(found)

    originals = _trained(model, who)
    kept = {name: p.detach().clone() for name, p in originals.items()}

    def masks_at(share: float) -> dict[str, Tensor]:
        return {n: m & held[n] for n, m in top_masks(sizes, max(share * alive, 1) / total, "model", who).items()}

    before = after = judged()
    low, high = 0.0, 1.0  # shares of the held weights: too few, enough
    try:
        while high - low > resolution:
            middle = (low + high) / 2
            masks = masks_at(middle)
            with torch.no_grad():
                for name, p in originals.items():
                    p.copy_(kept[name] * masks[name])
            now = judged()
            if now >= before - tolerance:
                high, after = middle, now
            else:
                low = middle
    finally:
        with torch.no_grad():
            for name, p in originals.items():
                p.copy_(kept[name])
    masks = masks_at(high) if high < 1 else held
    report = pruned(weights, masks, who, score_before=before, score_after=after)
    hold_masks(model, masks)
    return report


def _trained(model: nn.Module, who: str) -> dict[str, nn.Parameter]:
    """The trained tensors of the weights a pruning owns, under their masks where they have some."""
    found = {}
    for name in prunable(model, who):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        held = parametrize.is_parametrized(module, attribute)
        found[name] = module.parametrizations[attribute].original if held else getattr(module, attribute)  # type: ignore[index, union-attr]
    return found

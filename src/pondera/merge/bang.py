"""WiSE-FT and BANG: interpolate between a pretrained and a fine-tuned model, and keep the latter from being too sure."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from pondera.errors import BadInput, describe, require_finite, require_float
from pondera.merge._card import Told
from pondera.merge._stream import (
    Facts,
    MergedState,
    MergeReport,
    Part,
    Rule,
    State,
    blocks,
    is_in,
    merge_files,
    merge_states,
)


def wise_ft(pretrained: State, finetuned: State, alpha: float = 0.5) -> MergedState:
    r"""WiSE-FT: the weights on the line from a pretrained to a fine-tuned model.

    .. math:: w = (1 - \alpha) \, w_{\rm pre} + \alpha \, w_{\rm ft}

    Args:
        pretrained: state dict or module, with the head it is used with (of CLIP: the one made of class names); dtypes,
            devices and integers of the result are its own.
        finetuned: what became of it, with the same names and shapes.
        alpha: the way to the fine-tuned model, 0 to 1.
    Returns: a new state dict; its `report` says how far each tensor is from the pretrained one.
    Raises: BadInput: as `fuse`; for an alpha outside [0, 1].
    Paper: Wortsman et al. 2022, arXiv 2109.01903; looked into by Lin et al. 2023, arXiv 2309.17230.

    >>> wise_ft({"w": torch.zeros(2)}, {"w": torch.ones(2)}, alpha=0.25)["w"]
    tensor([0.2500, 0.2500])
    """
    return merge_states("wise_ft", [pretrained, finetuned], _interpolate("wise_ft", alpha))


def wise_ft_files(
    pretrained: str | Path,
    finetuned: str | Path,
    out: str | Path,
    alpha: float = 0.5,
    *,
    shard_size: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
) -> MergeReport:
    """`wise_ft` on safetensors files, a few MiB at a time.

    Args:
        pretrained, finetuned: each a file, an index, a folder or an id as in `fuse_files`.
        alpha: the way to the fine-tuned model, 0 to 1.
        out, shard_size, dtype, replace: as in `fuse_files`.
    Returns: what was written and how far each tensor moved.
    Raises: BadInput: as `wise_ft` and `fuse_files`.
    Paper: Wortsman et al. 2022, arXiv 2109.01903.

    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import load_file, save_file
    >>> folder = Path(mkdtemp())
    >>> for i in range(2):
    ...     save_file({"w": torch.full((2,), float(i))}, folder / f"{i}.safetensors")
    >>> report = wise_ft_files(folder / "0.safetensors", folder / "1.safetensors", folder / "out.safetensors", 0.25)
    >>> load_file(folder / "out.safetensors")["w"]
    tensor([0.2500, 0.2500])
    """
    rule = _interpolate("wise_ft", alpha)
    told = Told("WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903)", _recipe("wise_ft", {"alpha": float(alpha)}))
    return merge_files(
        "wise_ft", [pretrained, finetuned], out, rule, shard_size=shard_size, dtype=dtype, replace=replace, told=told
    )


# -- BANG -------------------------------------------------------------------------------------------------------------


def bang_loss(
    model: Callable[[Tensor], Float[Tensor, "batch classes"]],
    x: Float[Tensor, "batch *input"],
    y: Int[Tensor, "batch"],
    *,
    smoothing: float = 0.1,
    mixup: float = 0.2,
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    r"""The loss BANG fine-tunes with: cross-entropy with Mixup and label smoothing, so that the model is not too sure.

    .. math:: \lambda \, {\rm CE}_\epsilon(f(\tilde x), y) + (1 - \lambda) \, {\rm CE}_\epsilon(f(\tilde x), y_\pi), \qquad
              \tilde x = \lambda x + (1 - \lambda) x_\pi, \quad \lambda \sim {\rm Beta}(a, a)

    with a random order :math:`\pi` of the batch, one :math:`\lambda` a batch, and targets of which :math:`\epsilon` is
    spread evenly over all classes. BANG is this fine-tuning, then `wise_ft`; its averaging is no other.

    Args:
        model: gives logits for inputs.
        x: inputs that can be mixed, floating-point.
        y: class indices.
        smoothing: epsilon, in [0, 1); 0 leaves the labels sharp.
        mixup: a, at least 0; 0 mixes nothing.
        generator: source of the draw, on the CPU; None takes torch's default one.
    Returns: the loss of the batch, differentiable.
    Raises: BadInput: for a smoothing or mixup out of range, inputs that are no floating-point numbers, labels that are
        not one index an input.
    Paper: Lin et al. 2023, arXiv 2309.17230 (ICLR 2024): Mixup (Zhang et al. 2018) and label smoothing, alone or together.
        The defaults are common ones; the paper's own could not be looked up.

    >>> model = torch.nn.Linear(4, 3)
    >>> loss = bang_loss(model, torch.randn(8, 4), torch.randint(3, (8,)), generator=torch.Generator().manual_seed(0))
    >>> loss.shape
    torch.Size([])
    """
    who = "bang_loss"
    require_float(x, who, "batch of inputs")
    if not 0 <= smoothing < 1:
        raise BadInput(f"{who} needs a smoothing in [0, 1), got {smoothing}")
    if not (mixup >= 0 and math.isfinite(mixup)):
        raise BadInput(f"{who} needs a mixup of at least 0, got {mixup}")
    if not x.ndim or y.shape != x.shape[:1] or not len(y) or y.dtype != torch.long:
        raise BadInput(f"{who} needs one int64 class index for each input, got a {describe(y)} for a {describe(x)}")
    if not mixup:
        return F.cross_entropy(model(x), y, label_smoothing=smoothing)
    a, b = torch._standard_gamma(torch.full((2,), mixup, dtype=torch.float64), generator=generator).tolist()
    share = a / (a + b)
    order = torch.randperm(len(y), generator=generator).to(y.device)
    out = model(share * x + (1 - share) * x[order])
    first, second = (F.cross_entropy(out, labels, label_smoothing=smoothing) for labels in (y, y[order]))
    return share * first + (1 - share) * second


def bang(
    pretrained: State, finetuned: State, alpha: float = 0.5, *, head: str | Iterable[str] = (), scale: float = 1.0
) -> MergedState:
    r"""Balanced averaging. After fine-tuning with `bang_loss` this is `wise_ft`, and needs neither `head` nor `scale`.

    For a model that was fine-tuned in the ordinary way, what can be had without training is the paper's picture of the
    trouble turned round. There the surer model is one whose classifier is multiplied by a factor above 1, so that it
    outvotes the other. Here the fine-tuned classifier, and so its logits, is multiplied by `scale` before the
    interpolation:

    .. math:: w = (1 - \alpha) \, w_{\rm pre} + \alpha \, s \, w_{\rm ft} \text{ in the head}, \qquad
              w = (1 - \alpha) \, w_{\rm pre} + \alpha \, w_{\rm ft} \text{ elsewhere}

    Take s from `balancing_scale`, on data like those the model was fine-tuned on but held out.

    Args:
        pretrained, finetuned, alpha: as in `wise_ft`.
        head: names, or whole parts of dotted names, of the classifier: a linear last layer, weight and bias.
        scale: s, above 0.
    Returns: a new state dict, with its `report`.
    Raises: BadInput: as `wise_ft`; for a scale not above 0, a head without a scale or the other way round, a name in
        `head` that is none.
    Paper: Lin et al. 2023, arXiv 2309.17230 (ICLR 2024). The scaled head is ours: the paper fine-tunes with Mixup and
        label smoothing, holds that scaling does not carry over to averages of weights, and scales only to explain.

    >>> pre, ft = ({"body": torch.full((1,), x), "head.weight": torch.full((1,), x)} for x in (0.0, 1.0))
    >>> dict(bang(pre, ft, head="head", scale=0.5))
    {'body': tensor([0.5000]), 'head.weight': tensor([0.2500])}
    """
    head = _head(head, scale)
    return merge_states("bang", [pretrained, finetuned], _interpolate("bang", alpha, head, scale), named=head)


def bang_files(
    pretrained: str | Path,
    finetuned: str | Path,
    out: str | Path,
    alpha: float = 0.5,
    *,
    head: str | Iterable[str] = (),
    scale: float = 1.0,
    shard_size: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    replace: bool = False,
) -> MergeReport:
    """`bang` on safetensors files, a few MiB at a time.

    Args:
        pretrained, finetuned: each a file, an index, a folder or an id as in `fuse_files`.
        alpha, head, scale: as in `bang`.
        out, shard_size, dtype, replace: as in `fuse_files`.
    Returns: what was written and how far each tensor moved.
    Raises: BadInput: as `bang` and `fuse_files`.
    Paper: Lin et al. 2023, arXiv 2309.17230 (ICLR 2024).

    >>> from tempfile import mkdtemp
    >>> from safetensors.torch import load_file, save_file
    >>> folder = Path(mkdtemp())
    >>> for i in range(2):
    ...     save_file({"head.weight": torch.full((2,), float(i))}, folder / f"{i}.safetensors")
    >>> pre, ft, out = (folder / f"{name}.safetensors" for name in (0, 1, "out"))
    >>> report = bang_files(pre, ft, out, head="head", scale=0.5)
    >>> load_file(out)["head.weight"]
    tensor([0.2500, 0.2500])
    """
    head = _head(head, scale)
    rule = _interpolate("bang", alpha, head, scale)
    asked = {"alpha": float(alpha)} | ({"head": head, "scale": float(scale)} if head else {})
    told = Told("BANG (Lin et al. 2023, arXiv 2309.17230)", _recipe("bang", asked))
    return merge_files(
        "bang", [pretrained, finetuned], out, rule, named=head, shard_size=shard_size, dtype=dtype, replace=replace,
        told=told,
    )  # fmt: skip


def _recipe(method: str, parameters: dict[str, Any]) -> Callable[[list[str]], dict[str, Any]]:
    def recipe(names: list[str]) -> dict[str, Any]:
        return {
            "merge_method": method,
            "base_model": names[0],
            "models": [{"model": name} for name in names[1:]],
            "parameters": parameters,
        }

    return recipe


@torch.no_grad()
def balancing_scale(
    pretrained_logits: Float[Tensor, "batch classes"], finetuned_logits: Float[Tensor, "batch classes"]
) -> float:
    """The factor on a fine-tuned model's logits at which it is as sure as the pretrained one.

    How sure a model is: the mean over the batch of its largest probability, which grows with the factor.

    Args:
        pretrained_logits, finetuned_logits: of the two models on the same inputs; on held-out ones, for a model is surer
            of what it was trained on.
    Returns: the factor, found to a part in a million; below 1 where the fine-tuned model is the surer one.
    Raises: BadInput: for shapes that differ, NaN or infinity, a pretrained model so sure or unsure that no factor between
        1e-4 and 1e4 gives that.
    Paper: Lin et al. 2023, arXiv 2309.17230 (ICLR 2024), which scales logits to explain; the rule for the factor is ours.

    >>> logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    >>> round(balancing_scale(logits, 4 * logits), 4)
    0.25
    """
    who = "balancing_scale"
    for x, which in ((pretrained_logits, "pretrained"), (finetuned_logits, "fine-tuned")):
        require_finite(x, who, f"{which} logits")
        if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] < 2 or x.shape != pretrained_logits.shape:
            raise BadInput(
                f"{who} needs logits (batch, classes) of both models alike, got {which} ones as a {describe(x)}"
            )
    wanted = _confidence(pretrained_logits)
    low, high = 1e-4, 1e4
    if not _confidence(low * finetuned_logits) < wanted < _confidence(high * finetuned_logits):
        raise BadInput(f"{who} finds no factor that brings the fine-tuned model to the pretrained one's {wanted:.4g}")
    while high / low > 1 + 1e-6:
        mid = (low * high) ** 0.5
        low, high = (mid, high) if _confidence(mid * finetuned_logits) < wanted else (low, mid)
    return (low * high) ** 0.5


def _confidence(logits: Float[Tensor, "batch classes"]) -> float:
    return float(logits.double().softmax(-1).amax(-1).mean())


def _head(head: str | Iterable[str], scale: float) -> list[str]:
    head = [head] if isinstance(head, str) else list(head)
    if not (scale > 0 and math.isfinite(scale)):
        raise BadInput(f"bang needs a scale above 0, got {scale}")
    if bool(head) != (scale != 1):
        raise BadInput(f"bang needs the head and its scale together, got head={head} and scale={scale}")
    return head


def _interpolate(who: str, alpha: float, head: Iterable[str] = (), scale: float = 1.0) -> Rule:
    """The rule of the line between two models; the second's tensors under a name in `head` multiplied by `scale`."""
    if not 0 <= alpha <= 1:
        raise BadInput(f"{who} needs an alpha between 0 and 1, got {alpha}")
    head = list(head)

    def rule(parts: list[Part], facts: Facts) -> Iterator[Tensor]:
        s = 1.0
        if any(is_in(part, parts[0].name) for part in head):
            s = facts["scale"] = scale
        for pre, ft in blocks(parts):
            yield (1 - alpha) * pre + alpha * s * ft

    return rule

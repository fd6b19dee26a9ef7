"""Rich features (Bonsai): features a net finds when each round may not live on those of the rounds before, in one start."""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera._weights import Owned, owned, require_owned, start_each
from pondera.errors import BadInput, all_finite, describe, require_finite

WHO = "rich_features_"


def rich_features_(
    model: nn.Module,
    examples: Sequence[Tensor],
    *,
    rounds: int = 2,
    erm_steps: int = 51,
    steps: int = 501,
    rate: float = 5e-4,
    decay: float = 0.0011,
    generator: Generator | None = None,
) -> nn.Module:
    r"""Start `model` from a rich representation of the training data (RFC, the Bonsai algorithm), in place.

    1. Discovery. Round 0 trains a fresh net by ERM for a few steps: it lives on the features that are easiest to learn.
       Round r trains another fresh net on the groups that the earlier nets make of the examples, by the worst of them,

       .. math::
           \min_\theta \max_{j < r, \, s} \; \mathrm{mean}_{i \in G_{j,s}} \; \ell(f_\theta(x_i), y_i), \qquad
           G_{j,s} = \{ i : [f_j(x_i) \text{ predicts } y_i] = s \}, \; s \in \{0, 1\},

       so that a feature which is wrong where an earlier net is wrong does not pay. Environments are not used.
    2. Synthesis. One more fresh net, with a head for each discovered net, is trained on their hard predictions in place
       of the labels, by the mean of the heads' losses. Half of its examples are drawn, with replacement, where all
       discovered nets are right or all are wrong, half from the rest.
    3. The net's features become the start; the model's head is the mean of the heads, weights and biases.

    Each episode is full-batch Adam on its loss plus `decay` times the sum of all squares of weights and biases, from
    Xavier's uniform weights and zero biases. Then train the model by any method, its features free or frozen.

    Learned are the weights and biases of linear, convolution and attention layers; norm layers, embeddings and all
    buffers stay. The work is done on copies in eval mode (dropout off), half precision in float32, with all examples in
    each step: give a subset where memory is short.

    Args:
        model: a classifier with a linear layer as its head: one output a class, or one output for classes 0 and 1.
        examples: (x, y): what forward takes and the labels, integers for one output a class, floating 0 and 1 of the
            output's shape for one. Further tensors, such as the environment of each example, are not looked at.
        rounds: nets to discover, at least 2. Discovery stops early, with a `UserWarning`, when a round serves its worst
            group no better than guessing (ours), or when no earlier net is wrong anywhere.
        erm_steps: Adam's steps of round 0. It decides what later rounds must do without: too many and the net learns
            examples by heart, so that "wrong" means noise. Tune it.
        steps: those of every later episode.
        rate: Adam's rate.
        decay: factor of the squares. All five defaults are the authors' for ColoredMNIST, an MLP of width 390.
        generator: source of all draws, on the weights' device; None takes torch's default one.
    Returns: `model`.
    Raises: BadInput: for examples that are empty, not finite, of different numbers or do not fit the model, labels that
        are no classes, a model without a linear layer as its head or without a layer before it, an argument that is out
        of range, training that diverges. The model is then what it was.
    Paper: Zhang, Lopez-Paz and Bottou 2022, arXiv 2203.15516; rule and numbers are those of the authors' code for
        ColoredMNIST (two rounds, one output). Derived: several classes, by cross-entropy.

    >>> g = torch.Generator().manual_seed(0)
    >>> y = torch.randint(2, (500,), generator=g)
    >>> easy, hard = ((y + (torch.rand(500, generator=g) < wrong)) % 2 for wrong in (0.1, 0.25))  # wrong in 10%, 25%
    >>> x = torch.stack([3.0 * easy, hard], 1)
    >>> net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> net = rich_features_(net, (x, y), rate=0.01, generator=g)
    >>> corners = net(torch.tensor([[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.0]])).softmax(1)[:, 1]
    >>> bool(corners[1] - corners[0] > 0.2), bool(corners[2] - corners[0] > 0.2)     # it lives on both
    (True, True)
    """
    _check(rounds, erm_steps, steps, rate, decay)
    require_owned(model, WHO)
    net = _copy(model)
    x, y = _checked(examples, net)
    head = _head(net, x, y)
    gpus = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    with torch.enable_grad(), torch.random.fork_rng(gpus):
        right, predicted = _discover(net, x, y, rounds, erm_steps, steps, rate, decay, generator)
        heads = _synthesise(net, head, x, right, predicted, steps, rate, decay, generator)
    with torch.no_grad():
        head.write(heads.weight.unflatten(0, (len(right), -1)).mean(0))
        if head.bias is not None:
            head.bias.copy_(heads.bias.unflatten(0, (len(right), -1)).mean(0))
        named = dict(model.named_parameters())
        for name, p in _learned(net).items():
            named[name].copy_(p)
    return model


# -- the episodes ------------------------------------------------------------------------------------------------------


def _discover(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    rounds: int,
    erm_steps: int,
    steps: int,
    rate: float,
    decay: float,
    generator: Generator | None,
) -> tuple[Bool[Tensor, "nets examples"], list[Tensor]]:
    """Where each discovered net is right, and its hard predictions in the form of labels."""
    right: list[Tensor] = []
    predicted: list[Tensor] = []
    for r in range(rounds):
        groups = [g for known in right for g in (known, ~known) if g.any()] or [torch.ones(len(x), dtype=torch.bool)]
        if r and all(known.all() for known in right):
            warnings.warn(f"{WHO} stops after {r} of {rounds} rounds: no net so far is wrong anywhere", stacklevel=3)
            break
        masks = torch.stack(groups).to(x.device)
        shares = masks.double() / masks.sum(1, keepdim=True)

        def worst(shares: Tensor = shares) -> Float[Tensor, ""]:
            losses = _losses(net(x), y)
            return (shares.to(losses.dtype) @ losses).max()

        start_each(net, lambda w: nn.init.xavier_uniform_(w, generator=generator), who=WHO)
        _descend(worst, list(_learned(net).values()), steps if r else erm_steps, rate, decay)
        with torch.no_grad():
            out, served = net(x), float(worst())
        guessing = math.log(2 if y.is_floating_point() else out.shape[-1])
        if r and served >= guessing:
            warnings.warn(
                f"{WHO} stops after {r} of {rounds} rounds: the next net serves its worst group no better than guessing "
                f"(loss {served:.3f}, guessing {guessing:.3f})",
                stacklevel=3,
            )
            break
        labels = _predictions(out, y)
        predicted.append(labels)
        right.append((labels == y).reshape(len(y)))
    return torch.stack(right), predicted


def _synthesise(
    net: nn.Module,
    head: Owned,
    x: Tensor,
    right: Bool[Tensor, "nets examples"],
    predicted: list[Tensor],
    steps: int,
    rate: float,
    decay: float,
    generator: Generator | None,
) -> nn.Linear:
    """Train `net`'s features under one head a discovered net; the heads, one below the other."""
    outputs, inputs = head.read().shape
    start_each(net, lambda w: nn.init.xavier_uniform_(w, generator=generator), who=WHO)
    heads = nn.Linear(inputs, len(right) * outputs, head.bias is not None, device=x.device, dtype=head.read().dtype)
    nn.init.xavier_uniform_(heads.weight, generator=generator)
    if heads.bias is not None:
        nn.init.zeros_(heads.bias)
    pick = _resampled(right, generator)
    x, targets = x[pick], [p[pick] for p in predicted]

    def distilled() -> Float[Tensor, ""]:
        parts = heads(_features(net, head, x)).chunk(len(targets), -1)
        return torch.stack([_losses(o, t).mean() for o, t in zip(parts, targets, strict=True)]).mean()

    last = {id(p) for p in head.module.parameters()}
    below = [p for p in _learned(net).values() if id(p) not in last]
    _descend(distilled, below + list(heads.parameters()), steps, rate, decay)
    return heads


def _resampled(right: Bool[Tensor, "nets examples"], generator: Generator | None) -> Tensor:
    """Half the examples from those that all nets or none get right, half from the others; all where one is empty."""
    share = right.double().mean(0)
    agree = (share == 0) | (share == 1)
    sides = [side for side in (agree.nonzero().squeeze(1), (~agree).nonzero().squeeze(1)) if len(side)]
    each, device = right.shape[1] // len(sides), right.device
    at = [torch.randint(len(s), (each,), generator=generator, device=device) for s in sides]
    return torch.cat([s[i] for s, i in zip(sides, at, strict=True)])


def _descend(loss: Callable[[], Tensor], learned: list[Tensor], steps: int, rate: float, decay: float) -> None:
    """Adam on the loss and decay times the sum of squares."""
    adam = torch.optim.Adam(learned, lr=rate)
    for step in range(steps):
        adam.zero_grad()
        total = loss() + decay * torch.stack([p.square().sum() for p in learned]).sum()
        if not torch.isfinite(total):
            raise BadInput(f"{WHO} diverged: the loss is {total.item()} at step {step + 1}; lower rate ({rate:g})")
        total.backward()
        adam.step()
    if not all(all_finite(p) for p in learned):
        raise BadInput(f"{WHO} diverged: weights are not finite after step {steps}; lower rate ({rate:g})")


# -- labels ------------------------------------------------------------------------------------------------------------


def _losses(out: Tensor, y: Tensor) -> Float[Tensor, "examples"]:
    """Each example's cross-entropy."""
    if y.is_floating_point():
        return F.binary_cross_entropy_with_logits(out.reshape(len(y)), y.reshape(len(y)), reduction="none")
    return F.cross_entropy(out, y, reduction="none")


def _predictions(out: Tensor, y: Tensor) -> Tensor:
    return (out > 0).to(y.dtype).reshape(y.shape) if y.is_floating_point() else out.argmax(-1)


# -- the model ---------------------------------------------------------------------------------------------------------


def _copy(model: nn.Module) -> nn.Module:
    try:
        net = copy.deepcopy(model).eval()
    except Exception as error:
        raise BadInput(f"{WHO} could not copy the {type(model).__name__}: {_one_line(error)}") from error
    net = net.float() if any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters()) else net
    for p in _learned(net).values():  # also what is frozen gets a start
        p.requires_grad_()
    return net


def _learned(net: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of the layers a start owns, by name."""
    own = {id(p) for one in owned(net) for p in one.module.parameters()}
    return {name: p for name, p in net.named_parameters() if id(p) in own}


def _features(net: nn.Module, head: Owned, x: Tensor) -> Tensor:
    """What the head receives."""
    seen: list[Tensor] = []
    hook = head.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        net(x)
    finally:
        hook.remove()
    return seen[-1]


def _head(net: nn.Module, x: Tensor, y: Tensor) -> Owned:
    """The linear layer whose output is the model's; BadInput where there is none or the labels do not fit it."""
    layers = {one.module: one for one in owned(net) if one.kind == "linear"}
    seen: list[tuple[nn.Module, Tensor]] = []
    hooks = [m.register_forward_hook(lambda module, args, out: seen.append((module, out))) for m in layers]
    try:
        with torch.no_grad(), torch.random.fork_rng(sorted({t.device.index for t in net.parameters() if t.is_cuda})):
            out = net(x[:2])
    except Exception as error:
        raise BadInput(
            f"{WHO} could not run the model on its examples ({describe(x)}): {type(error).__name__}: {_one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(out, Tensor) or len(out) != len(x[:2]):
        raise BadInput(f"{WHO} needs a model that gives scores for each example, got {_words(out)}")
    if not seen or not _equal(seen[-1][1], out):
        raise BadInput(f"{WHO} needs a model that ends in a linear layer, and none puts out what the model puts out")
    head = seen[-1][0]
    if [m for m, _ in seen].count(head) > 1:
        raise BadInput(f"{WHO} needs a head that is used once; forward calls {layers[head].name} several times")
    if all(one.module is head for one in owned(net)):
        raise BadInput(f"{WHO} needs a layer before the head, for features; the model has {layers[head].name} alone")
    if y.is_floating_point():
        if out.shape[1:] != y.shape[1:] or out.numel() != len(out):
            raise BadInput(
                f"{WHO} needs one output for each floating-point label; got {_words(out)} and a {describe(y)}"
            )
        wrong = (y != 0) & (y != 1)
    else:
        if out.ndim != 2 or out.shape[1] < 2 or y.ndim != 1:
            raise BadInput(
                f"{WHO} needs scores (examples, classes), of two classes at least, for integer labels (examples); got "
                f"{_words(out)} and a {describe(y)}"
            )
        wrong = (y < 0) | (y >= out.shape[1])
    if wrong.any():
        raise BadInput(
            f"{WHO} got {int(wrong.sum())} labels of {len(y)} that are no class of the model's {_words(out)}"
        )
    return layers[head]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether the same numbers, NaN included, in the same order: one may be a view of the other."""
    return a.numel() == b.numel() and torch.allclose(a.flatten(), b.flatten(), rtol=0, atol=0, equal_nan=True)


# -- what is given -----------------------------------------------------------------------------------------------------


def _checked(examples: Sequence[Tensor], net: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(examples, Tensor) or not isinstance(examples, Sequence) or len(examples) < 2:
        raise BadInput(f"{WHO} needs examples (x, y), inputs and labels, got {_words(examples)}")
    x, y = examples[:2]
    for what, t in (("inputs", x), ("labels", y)):
        if not isinstance(t, Tensor):
            raise BadInput(f"{WHO} needs a tensor for its {what}, got {type(t).__name__}")
        if t.is_meta or t.numel() == 0 or t.ndim == 0:
            raise BadInput(f"{WHO} needs {what} with numbers in them, got a {describe(t)}")
        if t.is_floating_point():
            require_finite(t, WHO, what)
    if len(x) != len(y):
        raise BadInput(f"{WHO} needs a label for each input, got {len(x)} inputs and {len(y)} labels")
    work = next(p for p in net.parameters() if p.is_floating_point()).dtype
    y = y.to(work) if y.is_floating_point() else y.long()
    return (x.to(work) if x.is_floating_point() else x), y


def _check(rounds: int, erm_steps: int, steps: int, rate: float, decay: float) -> None:
    if not all(isinstance(n, int) for n in (rounds, erm_steps, steps)) or rounds < 2 or min(erm_steps, steps) < 1:
        raise BadInput(
            f"{WHO} needs rounds of at least 2 and steps of at least 1, got {rounds}, {erm_steps} and {steps}"
        )
    if not (0 < rate < math.inf and 0 <= decay < math.inf):
        raise BadInput(f"{WHO} needs a rate above 0 and a decay of at least 0, got {rate} and {decay}")


def _words(x: Any) -> str:
    return f"a {describe(x)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"

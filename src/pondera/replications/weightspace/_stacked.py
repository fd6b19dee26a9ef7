"""Many networks of one architecture trained side by side, each with its own start, rate and order of the data."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

States = dict[str, Tensor]


def stacked(nets: Sequence[nn.Module]) -> States:
    """Their parameters, (nets, *shape) by name; a shared one once."""
    named = [dict(net.named_parameters()) for net in nets]
    return {name: torch.stack([one[name].detach() for one in named]) for name in named[0]}


def adamw(
    model: nn.Module,
    states: States,
    rates: Sequence[float],
    batches: Iterable[tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    decay: float = 0.0,
    cosine: int | None = None,
    seen: list[Tensor] | None = None,
) -> States:
    """AdamW (betas 0.9 and 0.999), a rate a net.

    batches: tensors (nets, batch, ...): inputs, then what `loss` takes after the outputs. cosine: steps over which the rates
    fall to zero by half a cosine. seen: is given each step's losses, (nets,).
    """
    weights = {name: w.clone().requires_grad_() for name, w in states.items()}
    first, second = ([torch.zeros_like(w) for w in weights.values()] for _ in "ab")
    rate = torch.tensor(rates)

    def one(named: States, batch: tuple[Tensor, ...]) -> Tensor:
        return loss(functional_call(model, named, batch[0]), *batch[1:])

    for t, batch in enumerate(batches, start=1):
        losses = vmap(one)(weights, batch)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()))
        if seen is not None:
            seen.append(losses.detach())
        now = rate * (0.5 * (1 + torch.cos(torch.tensor(torch.pi * (t - 1) / cosine))) if cosine else 1)
        with torch.no_grad():
            for w, m, v, g in zip(weights.values(), first, second, gradients, strict=True):
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                each = now.view(-1, *[1] * (w.ndim - 1))
                if decay:
                    w.mul_(1 - each * decay)
                w.sub_(each * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8))
    return {name: w.detach() for name, w in weights.items()}


@torch.no_grad()
def outputs(model: nn.Module, states: States, x: Tensor) -> Tensor:
    """What every net gives for the same inputs, (nets, batch, ...)."""
    return vmap(lambda named: functional_call(model, named, x))(states)

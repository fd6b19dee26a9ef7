"""FAdam (arXiv 2405.12807): momentum on the natural gradient, decay through the Fisher, and training beside AdamW."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pondera.replications import Finding, Lab, Sham, claim, conclude, met
from pondera.replications.optim import _little
from pondera.replications.optim._little import Point

Make = Callable[..., torch.optim.Optimizer]


def fadam(params: Any, **settings: Any) -> torch.optim.Optimizer:
    from pytorch_optimizer import FAdam  # heavy, hence here

    return FAdam(params, **settings)


def written_out(w: Tensor, gradients: list[Tensor], lr: float, weight_decay: float, clip: float) -> Tensor:
    """Algorithm 1 in plain tensors, float64."""
    m, f, beta1, beta2 = torch.zeros_like(w), torch.zeros_like(w), 0.9, 0.999
    for t, g in enumerate(gradients, 1):
        b = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
        f = b * f + (1 - b) * g.square()
        base = f.sqrt() + torch.minimum(torch.tensor(1e-8), 0.01 * g.square().mean().sqrt())

        def clipped(x: Tensor) -> Tensor:
            return x / max(1.0, float(x.square().mean().sqrt()) / clip)

        m = beta1 * m + (1 - beta1) * clipped(g / base)
        w = w - lr * (m + weight_decay * clipped(w / base))
    return w


def adamw(params: Any, **settings: Any) -> torch.optim.Optimizer:
    settings.pop("clip", None)
    return torch.optim.AdamW(params, **settings)


@claim(
    "Momentum is of the natural gradient, clipped, and decay goes through the Fisher information as well",
    source="Algorithm 1",
    criterion="pytorch_optimizer's FAdam beside the algorithm written out, 12 x 5 normal weights and gradients, 20 steps in float64, "
    "rate 0.01, decay 0.1, clips 1 and 0.5, 5 draws: entries differ by less than 1e-12",
    method=fadam,
    sham=Sham("torch.optim.AdamW", adamw),
)
def follows_the_algorithm(lab: Lab, make: Make) -> Finding:
    off = []
    for clip in (1.0, 0.5):
        for seed in lab.seeds:
            g = lab.generator(seed)
            start, *gradients = torch.randn(21, 12, 5, generator=g, dtype=torch.float64)
            w = nn.Parameter(start.clone())
            settings = {"momentum_dtype": torch.float64, "fim_dtype": torch.float64} if make is fadam else {}
            optimizer = make([w], lr=0.01, weight_decay=0.1, clip=clip, **settings)
            for G in gradients:
                w.grad = G.clone()
                optimizer.step()
            off.append(float((w.detach() - written_out(start, gradients, 0.01, 0.1, clip)).abs().max()))
    return conclude(met(max(off) < 1e-12), largest_difference=off)


FRESH, MOST = 1000, 12  # seeds, apart from those looked at before


def little_fadam(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return fadam(net.parameters(), lr=point[0], weight_decay=point[1])


def little_adamw(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=point[0], weight_decay=point[1])


class Sign(torch.optim.Optimizer):
    """FAdam without its Fisher information: momentum of the gradient's sign, decay of the weight's sign."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad.sign(), 0.1)
                p.sub_(m + group["weight_decay"] * p.sign(), alpha=group["lr"])


def little_sign(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return Sign(net.parameters(), *point)


@claim(
    "It trains at least as well as AdamW on a small language model",
    source="abstract; Sec. 4.1",
    criterion="small GPT, 150 steps; rates (0.003, 0.01, 0.03) times decays (0.01, 0.1) for AdamW, the same rates times (0.001, 0.01) "
    "for FAdam, whose decay is relative to no weight's size, each extended where the best is at an end, on two seeds of their own; "
    "5 seeds, others added until decided, at most 12: test loss over AdamW's at most 1.01, interval below it. Five seeds alone had "
    "left it open, and seeds are new",
    budget="full",
    method=little_fadam,
    sham=Sham("signs in the place of the Fisher information", little_sign),
)
def trains_as_adamw(lab: Lab, make: _little.Make) -> Finding:
    rates = (0.003, 0.01, 0.03)
    (ours, tried), (theirs, others) = (
        _little.tuned(make, rates, (0.001, 0.01)),
        _little.tuned(little_adamw, rates, (0.01, 0.1)),
    )

    def losses(seed: int) -> tuple[float, float]:
        (a,), (b,) = (_little.final(of, at, [FRESH + seed]) for of, at in ((make, ours), (little_adamw, theirs)))
        return a, b

    def ratio(seed: int) -> float:
        a, b = losses(seed)
        return a / b

    part, found, seen = lab.until_decided(ratio, most=MOST, below=1.01)
    return conclude(
        {"at most 1% above": part},
        loss_over_adamws=found,
        test_loss={name: [losses(s)[k] for s in range(len(seen))] for k, name in enumerate(("it", "AdamW"))},
        rate_and_decay={"it": ours, "AdamW": theirs},
        trials={"it": tried, "AdamW": others},
    )

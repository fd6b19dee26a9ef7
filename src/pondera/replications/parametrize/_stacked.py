"""Held nets of one shape beside each other, one for each seed and setting, trained in one pass by their own modules."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # seed and generator to a batch
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs and targets of one net to its loss


@dataclass(frozen=True)
class Run:
    """One net: its seed, and what its optimizer is told. decay: the share of `decayed` parameters that each step takes away."""

    seed: int
    rate: float
    decay: float = 0.0


@dataclass
class Stack:
    """Nets with their parameters stacked along a first dimension. losses: (steps, nets), each before its step."""

    net: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self, x: Tensor, *, each: bool = False) -> Tensor:
        """Outputs of all nets. each: `x` has a first dimension, an input for each net."""
        run = torch.vmap(
            lambda p, b, x: functional_call(self.net, (p, b), (x,)),
            in_dims=(0, 0, 0 if each else None),
            randomness="error",
        )
        return run(self.parameters, self.buffers, x)

    def nets(self) -> list[nn.Module]:
        """The nets one by one."""
        found = []
        n = len(next(iter(self.parameters.values())))
        for i in range(n):
            one = copy.deepcopy(self.net)
            state = {k: v[i].detach() for k, v in (self.parameters | self.buffers).items()}
            one.load_state_dict(state)
            found.append(one)
        return found


def stack(nets: Sequence[nn.Module]) -> Stack:
    parameters, buffers = stack_module_state(list(nets))
    return Stack(copy.deepcopy(nets[0]), parameters, buffers)


def train(
    make: Callable[[int], nn.Module],
    runs: Sequence[Run],
    draw: Draw,
    loss: Loss,
    *,
    steps: int,
    adam: bool = True,
    momentum: float = 0.9,
    decayed: Callable[[str], bool] = lambda name: True,
    factor: Callable[[int], float] | None = None,
) -> Stack:
    """Train one net for each run, by Adam or by SGD with Nesterov's momentum, each at its own rate.

    Decay is decoupled and not multiplied by the rate; both follow the schedule, `factor` of the step from 1 to `steps`, by
    default the lab's. Nets of one seed start alike and see the same batches.
    """
    from pondera.lab.train import schedule

    follow = factor or (lambda step: schedule(step, steps))
    made = {seed: make(seed) for seed in dict.fromkeys(run.seed for run in runs)}
    held = stack([made[run.seed] for run in runs])
    trained = {k: p for k, p in held.parameters.items() if p.requires_grad}
    first = {k: torch.zeros_like(p) for k, p in trained.items()}
    second = {k: torch.zeros_like(p) for k, p in trained.items()} if adam else {}
    rates, decays = (torch.tensor([getattr(run, name) for run in runs]) for name in ("rate", "decay"))
    generators = {seed: torch.Generator().manual_seed(seed) for seed in made}
    course = []
    for step in range(1, steps + 1):
        batches = {seed: draw(seed, g) for seed, g in generators.items()}
        x, y = (torch.stack([batches[run.seed][k] for run in runs]) for k in (0, 1))
        each = torch.vmap(loss)(held(x, each=True), y)
        course.append(each.detach())
        gradients = torch.autograd.grad(each.sum(), list(trained.values()))
        scale = follow(step)
        with torch.no_grad():
            for (name, p), g in zip(trained.items(), gradients, strict=True):
                shape = (-1, *[1] * (p.ndim - 1))
                m = first[name]
                if adam:
                    m.lerp_(g, 1 - 0.9)
                    v = second[name].mul_(0.999).addcmul_(g, g, value=1 - 0.999)
                    move = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                else:
                    m.mul_(momentum).add_(g)
                    move = g + momentum * m
                if decays.any() and decayed(name):
                    p.mul_(1 - scale * decays.view(shape))
                p.sub_(scale * rates.view(shape) * move)
    held.losses = torch.stack(course)
    return held

"""Denoised weights: a diffusion model that writes the weights of a network for a described task, block by block."""

import math
from collections.abc import Callable
from math import prod

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from pondera.errors import BadInput, describe, require_finite
from pondera.weightspace._states import States, count

LONGEST = 10_000.0  # period of the slowest sinusoid


class WeightBlocks(nn.Module):
    """Networks as blocks of equal size: tensors in order, flattened, cut, and the last block filled with zeros.

    Entries are told as deviations from the collection's mean network, in units of their tensor's deviation, since one block may
    hold tensors of different scale. Both are kept for the way back.

    Args:
        states: the collection, (nets, *shape) by name; of networks that share a start, so that entries have a meaning.
        size: of a block.
        eps: the least deviation divided by.
    Raises: BadInput: for a size below 1, an empty collection, NaN.

    >>> blocks = WeightBlocks({"w": torch.randn(5, 3, 2), "b": torch.randn(5, 3)}, size=4)
    >>> blocks.mask.tolist()
    [[True, True, True, True], [True, True, True, True], [True, False, False, False]]
    >>> x = {"w": torch.randn(2, 3, 2), "b": torch.randn(2, 3)}
    >>> back = blocks.unpack(blocks.pack(x))
    >>> all(torch.allclose(back[n], x[n], atol=1e-6) for n in x)
    True
    """

    mean: Tensor
    std: Tensor

    def __init__(self, states: States, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        count(states, "WeightBlocks")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BadInput(f"WeightBlocks needs a size of at least 1, a whole number, got {size!r}")
        self.size, self.shapes = size, {name: tuple(x.shape[1:]) for name, x in states.items()}
        for name, x in states.items():
            require_finite(x, "WeightBlocks", name)
        means = {name: x.detach().float().mean(0) for name, x in states.items()}
        stds = [
            (x.detach().float() - means[n]).square().mean().sqrt().clamp_min(eps).expand(means[n].numel())
            for n, x in states.items()
        ]
        self.register_buffer("mean", torch.cat([m.flatten() for m in means.values()]))
        self.register_buffer("std", torch.cat(stds))

    @property
    def entries(self) -> int:
        return len(self.mean)

    @property
    def blocks(self) -> int:
        return -(-self.entries // self.size)

    @property
    def mask(self) -> Bool[Tensor, "blocks size"]:
        """Which places hold entries."""
        at = torch.arange(self.blocks * self.size, device=self.mean.device)
        return (at < self.entries).view(self.blocks, self.size)

    def pack(self, states: States) -> Float[Tensor, "nets blocks size"]:
        """Raises: BadInput: if the states are not of the collection's names and shapes."""
        nets = count(states, "WeightBlocks")
        for name, shape in self.shapes.items():
            if name not in states or tuple(states[name].shape[1:]) != shape:
                got = describe(states[name]) if name in states else "none"
                raise BadInput(f"WeightBlocks needs {name} as (networks, {', '.join(map(str, shape))}), got {got}")
        flat = torch.cat([states[name].reshape(nets, -1) for name in self.shapes], 1)
        filled = nn.functional.pad((flat - self.mean) / self.std, (0, self.blocks * self.size - self.entries))
        return filled.view(nets, self.blocks, self.size)

    def unpack(self, blocks: Float[Tensor, "nets blocks size"]) -> dict[str, Tensor]:
        """Back to states; what is in the filling is left out. Raises: BadInput: for another shape."""
        if blocks.shape[1:] != (self.blocks, self.size):
            raise BadInput(f"WeightBlocks needs (networks, {self.blocks}, {self.size}), got a {describe(blocks)}")
        flat = blocks.flatten(1)[:, : self.entries] * self.std + self.mean
        parts = flat.split([prod(shape) for shape in self.shapes.values()], 1)
        return {name: x.view(-1, *shape) for (name, shape), x in zip(self.shapes.items(), parts, strict=True)}


class WeightDiffusion(nn.Module):
    r"""Diffusion over blocks of weights, given what a task is: its samples are starts for networks of new tasks.

    A network is cut into `WeightBlocks`. One denoiser serves all of them: given a noisy block, the time, the task's embedding c
    and the block's index k it predicts the clean block,

    .. math:: x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon, \qquad
              \min_\theta \; \mathbb E \, \lVert x_\theta(x_t, t, c, k) - x_0 \rVert^2

    over entries (the filling does not count), with a cosine schedule. All blocks of all networks are sampled as one batch: in
    one step :math:`x_\theta(\epsilon, T, c, k)`, which is the paper's way, or in several by DDIM without noise. One step
    from noise that tells nothing is the mean of the blocks given c and k: a regression. More steps draw every block
    by itself.

    Args:
        states: the collection of trained networks, (nets, *shape) by name; best trained from one common start.
        condition: the size of a task's embedding, a vector of the user's own.
        block: entries a block; ours (the paper's size could not be looked up).
        hidden, layers: of the denoiser, a residual MLP with scale and shift by (t, c, k); ours (the paper: a 1-D UNet).
        steps: T, of the schedule; 1000 as in DDPM.
    Raises: BadInput: for sizes below 1; in `loss` and `sample`, embeddings that do not fit, NaN.
    Paper: Gong, Zhan, Li, Idelbayev, Zharkov, Aberman, Tulyakov, Wang and Ren 2024, arXiv 2407.11966 (ECCV), from its
        abstract and summaries: blocks of equal size, index and text conditions, one step. Clean-block prediction,
        deviations from the mean network and the denoiser are our reading; no code was published.

    >>> nets = {"w": torch.randn(20, 6, 3), "b": torch.randn(20, 6)}
    >>> model = WeightDiffusion(nets, condition=2, block=8, hidden=16)
    >>> g = torch.Generator().manual_seed(0)
    >>> model.loss(nets, torch.randn(20, 2), g).ndim
    0
    >>> model.sample(torch.randn(4, 2), g)["w"].shape
    torch.Size([4, 6, 3])
    """

    kept: Tensor

    def __init__(
        self, states: States, condition: int, *, block: int = 64, hidden: int = 128, layers: int = 3, steps: int = 1000
    ) -> None:
        super().__init__()
        for what, n in {"condition": condition, "hidden": hidden, "layers": layers, "steps": steps}.items():
            if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                raise BadInput(f"WeightDiffusion needs {what} of at least 1, a whole number, got {n!r}")
        self.blocks = WeightBlocks(states, block)
        self.condition, self.steps, self.hidden = condition, steps, hidden
        self.register_buffer("kept", cosine_schedule(steps))
        self.told = nn.Sequential(
            nn.Linear(2 * 32 + condition, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()
        )
        self.enter = nn.Linear(block, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden, elementwise_affine=False) for _ in range(layers))
        self.films = nn.ModuleList(nn.Linear(hidden, 2 * hidden) for _ in range(layers))
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden)) for _ in range(layers)
        )
        self.leave = nn.Linear(hidden, block)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(
        self,
        noisy: Float[Tensor, "n block"],
        t: Int[Tensor, "n"],
        condition: Float[Tensor, "n condition"],
        index: Int[Tensor, "n"],
    ) -> Float[Tensor, "n block"]:
        """The clean blocks, as the denoiser sees them."""
        told = self.told(torch.cat([sinusoids(t, 32), sinusoids(index, 32), condition], 1))
        h = self.enter(noisy)
        for norm, film, inner in zip(self.norms, self.films, self.inner, strict=True):
            scale, shift = film(told).chunk(2, 1)
            h = h + inner(norm(h) * (1 + scale) + shift)
        clean: Tensor = self.leave(h)
        return clean

    def loss(
        self, states: States, conditions: Float[Tensor, "nets condition"], generator: Generator, batch: int = 256
    ) -> Float[Tensor, ""]:
        """Mean squared error of the clean entries, on a batch of blocks drawn at random with their times and noise."""
        x = self.blocks.pack(states)
        self._require(conditions, len(x))
        g, on = generator, generator.device
        net, index, t = (
            torch.randint(n, (batch,), generator=g, device=on).to(x.device)
            for n in (len(x), self.blocks.blocks, self.steps)
        )
        noise = torch.randn(batch, self.blocks.size, generator=g, device=on).to(x)
        clean, mask = x[net, index], self.blocks.mask[index]
        kept = self.kept[t].to(x.dtype).unsqueeze(1)
        guess = self(kept.sqrt() * clean + (1 - kept).sqrt() * noise, t, conditions[net], index)
        return ((guess - clean).square() * mask).sum() / mask.sum()

    @torch.no_grad()
    def sample(
        self, conditions: Float[Tensor, "nets condition"], generator: Generator, steps: int = 1
    ) -> dict[str, Tensor]:
        """Networks for tasks, one an embedding; all blocks in one batch.

        Args:
            conditions: embeddings of the tasks.
            generator: draws the noise that it starts from.
            steps: of DDIM, evenly over the schedule from its end; 1 as in the paper.
        """
        nets, many = len(conditions), self.blocks.blocks
        self._require(conditions, nets)
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= self.steps:
            raise BadInput(f"WeightDiffusion samples in 1 to {self.steps} steps, got {steps!r}")
        x = torch.randn(nets * many, self.blocks.size, generator=generator, device=generator.device).to(conditions)
        index, told = torch.arange(many, device=x.device).repeat(nets), conditions.repeat_interleave(many, 0)

        def denoise(x: Tensor, t: int) -> Tensor:
            clean: Tensor = self(x, torch.full_like(index, t), told, index)
            return clean

        return self.blocks.unpack(ddim(denoise, x, self.kept, steps).view(nets, many, -1))

    def _require(self, conditions: Tensor, nets: int) -> None:
        if not isinstance(conditions, Tensor) or tuple(conditions.shape) != (nets, self.condition):
            got = describe(conditions) if isinstance(conditions, Tensor) else type(conditions).__name__
            raise BadInput(f"WeightDiffusion needs embeddings ({nets} networks, {self.condition}), got a {got}")
        require_finite(conditions, "WeightDiffusion", "embeddings")


def cosine_schedule(steps: int, offset: float = 0.008) -> Float[Tensor, "steps"]:
    r"""What is kept of the signal's variance after each step, by a cosine (Nichol and Dhariwal 2021), no step taking over 0.999.

    >>> cosine_schedule(4)
    tensor([8.4701e-01, 4.9384e-01, 1.4427e-01, 1.4427e-04])
    """

    def f(t: float) -> float:
        return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

    lost = torch.tensor([min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)], dtype=torch.float64)
    return (1 - lost).cumprod(0).float()


def ddim(
    denoise: Callable[[Tensor, int], Tensor], x: Float[Tensor, "n block"], kept: Float[Tensor, "steps"], steps: int
) -> Float[Tensor, "n block"]:
    """DDIM without noise, for a denoiser (x, t) that predicts the clean blocks: from x at the last time, in so many steps."""
    times = torch.linspace(len(kept) - 1, 0, steps + 1).round().long().tolist()[:-1]
    clean = x
    for i, t in enumerate(times):
        clean = denoise(x, t)
        if i + 1 < len(times):
            now, then = kept[t].to(x.dtype), kept[times[i + 1]].to(x.dtype)
            noise = (x - now.sqrt() * clean) / (1 - now).sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * noise
    return clean


def sinusoids(at: Int[Tensor, "n"], size: int) -> Float[Tensor, "n size"]:
    """Sines and cosines of a whole number, with periods from 2 pi to 10,000 times that."""
    rates = torch.exp(-math.log(LONGEST) * torch.arange(size // 2, device=at.device) / (size // 2))
    angles = at.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)

"""TangleNAS (arXiv 2312.10440): one supernet's memory, and good architectures sooner than by sampling paths or at random?"""

import itertools
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from pondera.lab.tasks import digits
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.weightspace.tangle_search import Choice, EntangledConv2d, EntangledLinear, choices, draw_choices

# -- one layer --------------------------------------------------------------------------------------------------------


class MixedOutputs(EntangledConv2d):
    """The same choices and weights, every option run by itself and the outputs mixed."""

    def forward(self, x: Tensor) -> Tensor:
        out, kernel = self.out_channels, self.kernel_size
        assert isinstance(out, Choice)
        assert isinstance(kernel, Choice)
        assert self.bias is not None
        total = x.new_zeros(())
        for (a, c), (b, k) in itertools.product(
            zip(out.draw(), out.options, strict=True), zip(kernel.draw(), kernel.options, strict=True)
        ):
            s = (kernel.largest - k) // 2
            y = F.conv2d(x, self.weight[:c, :, s : s + k, s : s + k], self.bias[:c], padding=k // 2)
            total = total + a * b * F.pad(y, (0, 0, 0, 0, 0, out.largest - c))
        return total


def kept(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes a forward pass keeps for the backward pass, each storage once; parameters do not count."""
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if not (t.is_leaf and t.requires_grad):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    holding = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (holding.append(t), keep(t))[1], lambda t: t):  # type: ignore[func-returns-value]
        f(x)
    return sum(found.values())


def multiplications(f: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        f(x)
    return counter.get_total_flops()


@claim(
    "Mixing slices as weights gives what mixing the options' outputs gives, with the memory and multiplications of one layer",
    source="Sec. 3 (superposition of weights), abstract (memory of a weight-entangled space)",
    criterion="convolution of 8 channels to 8, 16 or 32, kernels 3, 5, 7 (nine options), 16 images of 16 x 16, softmax weights, "
    "float64: outputs "
    "and the gradients of weight and alpha equal those of mixed outputs to 1e-10; float32: bytes kept for the backward pass at "
    "most 1.2 times "
    "those of the largest plain convolution, each with a ReLU behind it, multiplications at most 1.001 times (the masks' own)",
    method=EntangledConv2d,
    sham=Sham("every option run by itself and the outputs mixed", MixedOutputs),
)
def memory_of_one_layer(lab: Lab, layer: type[EntangledConv2d]) -> Finding:
    def made(kind: type[EntangledConv2d]) -> EntangledConv2d:
        torch.manual_seed(0)
        built = kind(8, Choice([8, 16, 32], "softmax"), Choice([3, 5, 7], "softmax"))
        for k, choice in enumerate(choices(built)):
            choice.alpha.data = torch.tensor([0.3, -0.2, 0.5]) * (k + 1)
        return built

    x = torch.randn(16, 8, 16, 16)
    found = []
    for kind in (layer, MixedOutputs):
        one = made(kind).double()
        draw_choices(one)
        y = one(x.double())
        found.append([y, *torch.autograd.grad(y.sin().sum(), list(one.parameters()))])
    gap = max(float((a - b).detach().abs().max()) for a, b in zip(*found, strict=True))
    one, plain = made(layer), nn.Conv2d(8, 32, 7, padding=3)
    draw_choices(one)
    memory = kept(lambda x: one(x).relu(), x) / kept(lambda x: plain(x).relu(), x)
    work = multiplications(one, x) / multiplications(plain, x)
    return conclude(
        {"same function": met(gap < 1e-10), "memory": met(memory <= 1.2), "multiplications": met(work <= 1.001)},
        difference=gap,
        memory_over_plain=memory,
        multiplications_over_plain=work,
    )


# -- a search ---------------------------------------------------------------------------------------------------------

SPACE = {"c1": (4, 8, 16), "c2": (8, 16, 32), "k": (1, 3)}
ALL = list(itertools.product(*SPACE.values()))
STEPS, BATCH, ALONE = 200, 32, 200  # weight steps of a search (and as many for the alphas), steps of a net by itself
LEGS = 4  # looks at the search
TUNING, FRESH = (100, 101), 40
Architecture = tuple[int, ...]
Search = Callable[[int, float], list[Architecture]]


class Net(nn.Module):
    """Two convolutions that share a kernel size, and a linear layer; plain where sizes are given."""

    def __init__(self, c1: int | Choice, c2: int | Choice, k: int | Choice) -> None:
        super().__init__()
        self.conv1, self.conv2 = EntangledConv2d(1, c1, k), EntangledConv2d(c1, c2, k)
        self.head = EntangledLinear(c2, 10)
        self.searched = [c for c in (c1, c2, k) if isinstance(c, Choice)]

    def forward(self, x: Tensor) -> Tensor:
        h = F.avg_pool2d(self.conv1(x).relu(), 2)
        return self.head(self.conv2(h).relu().mean((2, 3)))


@cache
def data() -> tuple[tuple[Tensor, Tensor], ...]:
    """Two halves of the training images, for weights and for alphas, and the test images."""
    (x, y), (u, v) = digits.data()
    x, u = x.view(-1, 1, 8, 8), u.view(-1, 1, 8, 8)
    return (x[:600], y[:600]), (x[600:1200], y[600:1200]), (u, v)


def batches(which: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    (x, y), g = data()[which], torch.Generator().manual_seed(10 * seed + which)
    while True:
        i = torch.randint(len(x), (BATCH,), generator=g)
        yield x[i], y[i]


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@torch.no_grad()
def loss(model: nn.Module, which: int) -> float:
    x, y = data()[which]
    return float(F.cross_entropy(model(x), y))


def alone(architecture: Architecture, seed: int, steps: int, rate: float = 0.01) -> Net:
    torch.manual_seed(seed)
    model = Net(*architecture)
    optimizer, own = torch.optim.Adam(model.parameters(), lr=rate, fused=True), batches(0, seed)
    for _ in range(steps):
        descend(model, optimizer, next(own))
    return model


@cache
def table() -> dict[Architecture, float]:
    """Test loss of every architecture trained by itself, mean of two seeds."""
    return {one: sum(loss(alone(one, 900 + s, ALONE), 2) for s in (0, 1)) / 2 for one in ALL}


def regret(found: list[Architecture]) -> float:
    """How far what was held best lies above the best, in test loss, on the average over the looks."""
    truth = table()
    return sum(truth[one] for one in found) / len(found) - min(truth.values())


def supernet(method: str, seed: int) -> Net:
    torch.manual_seed(seed)
    return Net(*(Choice(options, method) for options in SPACE.values()))


def by_gradients(method: str, trained: bool = True) -> Search:
    @cache
    def search(seed: int, rate: float) -> list[Architecture]:
        """Alternating steps on weights and alphas; rate: Adam's of the alphas."""
        model, g = supernet(method, seed), torch.Generator().manual_seed(seed)
        alphas = [choice.alpha for choice in choices(model)]
        own = {id(a) for a in alphas}
        weights = torch.optim.Adam([p for p in model.parameters() if id(p) not in own], lr=0.01, fused=True)
        scores = torch.optim.Adam(alphas, lr=rate, betas=(0.5, 0.999))
        first, second, found = batches(0, seed), batches(1, seed), []
        if not trained:
            for a in alphas:
                nn.init.normal_(a, generator=g)
        for step in range(STEPS):
            for choice in choices(model):
                choice.temperature = 10 - 9.9 * step / (STEPS - 1)
            for optimizer, own_batches in ((weights, first), (scores, second)):
                if optimizer is scores and not trained:
                    continue
                draw_choices(model, g)
                descend(model, optimizer, next(own_batches))
            if (step + 1) % (STEPS // LEGS) == 0:
                found.append(tuple(choice.best for choice in model.searched))
        return found

    return search


@cache
def by_paths(seed: int, rate: float) -> list[Architecture]:
    """SPOS: as many gradients, all on the weights of paths drawn by chance; all 18 are then rated with the shared weights."""
    model, g = supernet("uniform", seed), torch.Generator().manual_seed(seed)
    own = [p for p in model.parameters() if not any(p is choice.alpha for choice in choices(model))]
    optimizer, first, found = torch.optim.Adam(own, lr=rate, fused=True), batches(0, seed), []
    for step in range(2 * STEPS):
        draw_choices(model, g)
        descend(model, optimizer, next(first))
        if (step + 1) % (2 * STEPS // LEGS) == 0:
            rated = {}
            for one in ALL:
                for choice, option in zip(model.searched, one, strict=True):
                    choice.fix(option)
                rated[one] = loss(model, 1)
            found.append(min(ALL, key=lambda one: rated[one]))
    return found


@cache
def at_random(seed: int, steps: float) -> list[Architecture]:
    """Nets drawn by chance, each trained for some steps by itself, in all as many gradients."""
    order = torch.randperm(len(ALL), generator=torch.Generator().manual_seed(seed)).tolist()
    rated: dict[Architecture, float] = {}
    found = []
    nets = 2 * STEPS // int(steps)
    for k in range(nets):
        one = ALL[order[k]]
        rated[one] = loss(alone(one, seed, int(steps)), 1)
        if (k + 1) % (nets // LEGS) == 0:
            found.append(min(rated, key=lambda one: rated[one]))
    return found


def tuned(search: Search, grid: tuple[float, ...], n: int) -> tuple[list[float], float, list[Architecture]]:
    course = {at: sum(regret(search(seed, at)) for seed in TUNING) for at in grid}
    at = min(grid, key=lambda a: course[a])
    found = [search(FRESH + seed, at) for seed in range(n)]
    return [regret(f) for f in found], at, [f[-1] for f in found]


drnas, untrained = by_gradients("drnas"), by_gradients("drnas", trained=False)


@claim(
    "Searching by gradients finds better architectures at any time than sampled paths or random search, for as many gradients",
    source="abstract; any-time figures and tables against SPOS and random search",
    criterion="8x8 digits, 18 nets of two convolutions (4 to 16 and 8 to 32 channels, kernels 1 and 3), truth: test loss of each "
    "trained by itself, mean of 2 seeds; DrNAS over entangled weights, 200 steps each on weights and alphas, looked at four "
    "times; "
    "regret in test loss, mean over the looks, minus that of SPOS (400 weight steps, all 18 rated with the shared weights) and "
    "of "
    "random search (nets trained by themselves, 400 steps in all); four settings of each tried on 2 seeds, 8 fresh seeds: both "
    "95% "
    "intervals below 0. Beside it, not decisive: against the rule to take the largest net. (Seeds 40 to 47: with 120 steps and "
    "rates of the "
    "alphas from 0.01 up, tried first, the search was too fast for its weights and fell to the smallest options)",
    budget="full",
    method=drnas,
    sham=Sham("alphas by chance, not trained", untrained),
)
def better_at_any_time(lab: Lab, search: Search) -> Finding:
    n = len(lab.draws(max(lab.n_seeds, 8)))
    rates = (0.003, 0.01, 0.03, 0.1)
    ours, rate, chosen = tuned(search, rates, n)
    paths, path_rate, path_chosen = tuned(by_paths, (0.001, 0.003, 0.01, 0.03), n)
    random, random_steps, _ = tuned(at_random, (25, 33, 50, 100), n)
    largest = regret([ALL[-1]])
    gaps = {"SPOS": lab.effect(ours, paths), "random search": lab.effect(ours, random)}
    parts = {f"against {name}": weigh(gap, below=0) for name, gap in gaps.items()}
    parts["against the largest net"] = weigh(lab.effect(ours, [largest] * n), below=0)
    truth = sorted(table().items(), key=lambda item: item[1])
    return conclude(
        parts,
        central=["against SPOS", "against random search"],
        gaps=gaps,
        regret={"DrNAS": ours, "SPOS": paths, "random": random, "the largest net": largest},
        tuned={"DrNAS": rate, "SPOS": path_rate, "random": random_steps},
        chosen={"DrNAS": chosen, "SPOS": path_chosen},
        best={str(one): value for one, value in truth[:3]},
        worst=truth[-1][1],
    )

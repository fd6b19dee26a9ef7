"""DCT projection (arXiv 2505.17967): how near its subspace comes to the SVD's, at what memory, and whether it trains as well."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.lab.tasks import code
from pondera.linalg import dct_matrix
from pondera.optim._base import Group, MatrixOptimizer, State
from pondera.optim._groups import groups
from pondera.optim.dct_projection import DCTAdamW, largest_columns
from pondera.replications import Effect, Finding, Lab, Sham, claim, conclude, met
from pondera.replications._outcomes import weigh
from pondera.replications.optim import _little
from pondera.replications.optim._little import Point

RANK = 16  # a quarter of the smaller side of every hidden matrix
Basis = Callable[[Float[Tensor, "n d"], torch.Generator], Float[Tensor, "d r"]]


class GaLore(MatrixOptimizer):
    """AdamW in the r leading singular vectors of the gradient, found anew every so many steps; the rest as in DCTAdamW."""

    def __init__(self, params: Any, lr: float = 5e-3, *, rank: int = RANK, update_proj_gap: int = 50) -> None:
        own = {"lr": lr, "rank": rank, "update_proj_gap": update_proj_gap, "eps": 1e-8, "betas": (0.9, 0.999)}
        rest = {"weight_decay": 0.0, "vector_lr_ratio": 1.0, "vector_eps": 1e-8, "vector_weight_decay": 0.0}
        super().__init__(params, own | rest)

    def _direction(self, update: Tensor, gradient: Tensor | None, state: State, group: Group) -> Tensor:
        turned = update.shape[0] < update.shape[1]
        G = update.T if turned else update
        if "step" not in state:
            zeros = {k: G.new_zeros(len(G), min(group["rank"], G.shape[1])) for k in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.tensor(0.0), **zeros)
        state["step"] += 1
        t = int(state["step"])
        if t == 1 or t % group["update_proj_gap"] == 0:
            state["projection"] = self.basis(G, group["rank"])
        P, m, v = state["projection"], state["exp_avg"], state["exp_avg_sq"]
        g = G @ P
        beta1, beta2 = group["betas"]
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = m / ((1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"]))
        return P @ u.T if turned else u @ P.T

    def basis(self, G: Float[Tensor, "n d"], r: int) -> Float[Tensor, "d r"]:
        return torch.linalg.svd(G, full_matrices=False).Vh[:r].T.contiguous()


class RandomColumns(GaLore):
    """Columns of the cosine transform drawn by chance, once, in the place of those the gradient lies in."""

    def basis(self, G: Float[Tensor, "n d"], r: int) -> Float[Tensor, "d r"]:
        d = G.shape[1]
        drawn = torch.randperm(d, generator=torch.Generator().manual_seed(d))[:r]
        return dct_matrix(d, dtype=G.dtype)[:, drawn]


def dct_columns(G: Tensor, generator: torch.Generator) -> Tensor:
    Q = dct_matrix(G.shape[1])
    return Q[:, largest_columns(G @ Q, RANK, 1).long()]


def random_columns(G: Tensor, generator: torch.Generator) -> Tensor:
    return dct_matrix(G.shape[1])[:, torch.randperm(G.shape[1], generator=generator)[:RANK]]


def leading_singular_vectors(G: Tensor, generator: torch.Generator) -> Tensor:
    return torch.linalg.svd(G, full_matrices=False).Vh[:RANK].T


def coordinates(G: Tensor, generator: torch.Generator) -> Tensor:
    """The unit vectors in the place of cosines: the neurons on the smaller side that the gradient is largest at."""
    return torch.eye(G.shape[1])[:, largest_columns(G, RANK, 1).long()]


@cache
def gradients(seed: int) -> list[Tensor]:
    """Of every hidden matrix of the small GPT after 20 steps of AdamW, the shorter side last."""
    (x, y), *_ = _little.text()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = code.build()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(21):
            i = torch.randint(len(x), (16,))
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]).flatten(0, 1), y[i].flatten()).backward()
            if _ < 20:
                optimizer.step()
    whole = [p.grad for p in groups(net)[0]["params"]]
    return [g if len(g) >= g.shape[1] else g.T for g in whole]


def lost(basis: Basis, seed: int) -> float:
    """Share of the gradient's square outside the subspace, mean over the matrices."""
    generator = torch.Generator().manual_seed(seed)
    shares = []
    for G in gradients(seed):
        P = basis(G, generator)
        shares.append(float((G - G @ P @ P.T).square().sum() / G.square().sum()))
    return sum(shares) / len(shares)


@claim(
    "The cosine columns a gradient lies in most come near the best subspace there is, its leading singular vectors",
    source="abstract; Sec. 3",
    criterion="gradients of the 12 hidden matrices of the small GPT after 20 steps, rank a quarter of the smaller side; share of the "
    "gradient's square that is lost, mean over the matrices: of what singular vectors gain over columns drawn by chance, the "
    "chosen columns gain at least half (interval of 5 seeds above 0.5). Beside it the same of the unit vectors in the place of cosines",
    method=dct_columns,
    sham=Sham("columns drawn by chance", random_columns),
)
def subspace_is_near_the_svd(lab: Lab, basis: Basis) -> Finding:
    def share(of: Basis) -> Effect:
        chance = [1 - RANK / 64] * len(lab.seeds)  # what a subspace drawn by chance loses in the mean
        best = [lost(leading_singular_vectors, s) for s in lab.seeds]
        return lab.effect([(c - lost(of, s)) / (c - b) for c, b, s in zip(chance, best, lab.seeds, strict=True)])

    found, plain = share(basis), share(coordinates)
    return conclude(
        {"at least half of what singular vectors gain": weigh(found, above=0.5)},
        note=f"The unit vectors the gradient is largest at, with no transform at all, gain {plain.mean:.0%} of it, the columns "
        f"tried {found.mean:.0%}: what there is to gain comes from choosing, not from cosines.",
        share_of_the_gain=found,
        share_of_the_gain_of_unit_vectors=plain,
        lost={
            name: [lost(of, s) for s in lab.seeds]
            for name, of in (
                ("it", basis),
                ("singular vectors", leading_singular_vectors),
                ("unit vectors", coordinates),
            )
        },
    )


def dct_adamw(params: Any) -> DCTAdamW:
    return DCTAdamW(params, rank=RANK)


def galore(params: Any) -> GaLore:
    return GaLore(params, rank=RANK)


@claim(
    "It needs less memory than GaLore: indices in the place of a projection for every layer",
    source="abstract; Sec. 3",
    criterion="bytes kept after a step on the 12 hidden matrices of the small GPT at rank 16, the shared basis counted: a matrix saves "
    "the 16 d numbers of its projection but for 16 indices of 4 bytes, and all together are below GaLore's",
    method=dct_adamw,
    sham=Sham("GaLore, which keeps a projection a matrix", galore),
)
def less_memory_than_galore(lab: Lab, make: Callable[[Any], torch.optim.Optimizer]) -> Finding:
    matrices = [nn.Parameter(p.detach().clone()) for p in groups(code.build())[0]["params"]]
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=lab.generator(0))

    def kept(of: Callable[[Any], torch.optim.Optimizer]) -> tuple[list[int], int]:
        optimizer = of(matrices)
        optimizer.step()
        shared = sum(q.nbytes for q in getattr(optimizer, "_bases", {}).values())
        return [sum(s.nbytes for s in optimizer.state[p].values() if s.ndim) for p in matrices], shared

    (ours, shared), (theirs, _) = kept(make), kept(galore)
    adamw, _ = kept(torch.optim.AdamW)
    saved = [b - a for a, b in zip(ours, theirs, strict=True)]
    wanted = [4 * RANK * min(p.shape) - 4 * RANK for p in matrices]
    return conclude(
        {"a projection less a matrix": met(saved == wanted), "all together": met(sum(ours) + shared < sum(theirs))},
        bytes_saved_a_matrix=saved,
        bytes={"it": sum(ours), "its shared basis": shared, "GaLore": sum(theirs), "AdamW": sum(adamw)},
    )


def little_dct(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return DCTAdamW(groups(net), lr=point[0], rank=RANK)


def little_random(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return RandomColumns(groups(net), lr=point[0], update_proj_gap=10**9)


def little_galore_10(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return GaLore(groups(net), lr=point[0], update_proj_gap=10)


def little_galore_50(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return GaLore(groups(net), lr=point[0], update_proj_gap=50)


def little_adamw(net: nn.Module, point: Point) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=point[0], weight_decay=0.0)


RATES, FRESH = (0.003, 0.01, 0.03), 1000


@claim(
    "It trains as well as low rank by singular value decompositions",
    source="abstract; Sec. 5",
    criterion="small GPT, 150 steps, rank 16 of 64, every arm tuned on three rates, extended where the best is at an end, on two seeds "
    "of their own; 5 seeds, test loss: minus that of GaLore (a decomposition every 10 or every 50 steps, the better of both on the "
    "seeds reported) below 0.02 nats a character, and minus that of columns drawn by chance once below 0. Beside it the distance "
    "to AdamW of full rank. An earlier criterion asked for the first alone, which columns drawn by chance met too; seeds are new",
    budget="full",
    method=little_dct,
    sham=Sham("columns drawn by chance once, in the place of the largest", little_random),
)
def trains_as_well_as_galore(lab: Lab, make: _little.Make) -> Finding:
    galores, chance = ("GaLore, every 10", "GaLore, every 50"), "columns by chance"
    arms = {"it": make, galores[0]: little_galore_10, galores[1]: little_galore_50, chance: little_random}
    arms["AdamW"] = little_adamw
    points = {name: _little.tuned(arm, RATES) for name, arm in arms.items()}
    seeds = [FRESH + s for s in lab.seeds]
    losses = {name: _little.final(arm, points[name][0], seeds) for name, arm in arms.items()}
    better = min(galores, key=lambda name: sum(losses[name]))
    to_galore, to_chance = (lab.effect(losses["it"], losses[name]) for name in (better, chance))
    return conclude(
        {
            "at most 0.02 nats behind GaLore": weigh(to_galore, below=0.02),
            "ahead of columns drawn by chance": weigh(to_chance, below=0),
        },
        loss_minus_galores=to_galore,
        loss_minus_that_of_columns_by_chance=to_chance,
        loss_minus_adamws=lab.effect(losses["it"], losses["AdamW"]),
        the_better_galore=better,
        test_loss=losses,
        rate_and_trials={name: [p[0], n] for name, (p, n) in points.items()},
    )

"""4-bit Shampoo (arXiv 2405.18144): eigenvectors or the preconditioner in four bits, rectified or not, at which loss?"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from pondera.linalg import haar, matrix_power
from pondera.linalg.matrix_roots import raised
from pondera.optim._base import Group, State
from pondera.optim.shampoo_4bit import Shampoo4bit, keep, kept, quantised, rectified, restored
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh
from pondera.replications.optim._characters import run

Make = Callable[..., torch.optim.Optimizer]
Root = Callable[[Tensor, Tensor], Tensor]
EPS, D = 1e-6, 128
CONDITIONS = (1e2, 1e4, 1e6)


class PreconditionerIn4Bits(Shampoo4bit):
    """The factor itself in four bits with its diagonal in full, in the place of its eigenvectors."""

    def _take_in(self, X: Tensor, state: State, name: str, group: Group) -> None:
        d = len(X)
        A = self._factor(state, name, d, group) if f"{name}_values" in state else torch.eye(d).to(X) * group["eps"]
        A = (A * group["beta"]).addmm_(X, X.mT, alpha=1 - group["beta"])
        state[f"{name}_values"] = A.diagonal().clone()
        keep(state, f"{name}_vectors", A.fill_diagonal_(0), group)

    def _factor(self, state: State, name: str, d: int, group: Group) -> Tensor:
        A = kept(state, f"{name}_vectors", d, group) + torch.diag(state[f"{name}_values"])
        return (A + A.mT) / 2

    def _take_root(self, state: State, name: str, group: Group) -> None:
        A = self._factor(state, name, len(state[f"{name}_values"]), group)
        root = matrix_power(A, -0.25, eps=group["eps"])
        state[f"{name}_diagonal"] = root.diagonal().clone()
        keep(state, f"{name}_root", root.fill_diagonal_(0), group)


# -- one matrix -------------------------------------------------------------------------------------------------------


def by_eigenvectors(V: Tensor, s: Tensor, turns: int = 4, quantizer: str = "linear-2") -> Tensor:
    """A^-1/4 of A = V diag(s) V^T from eigenvectors that went through four bits."""
    V = rectified(restored(*quantised(V.mT, quantizer), len(s), quantizer).mT, turns)
    return (V * raised(s, -0.25, EPS)) @ V.mT


def by_preconditioner(V: Tensor, s: Tensor, quantizer: str = "linear-2") -> Tensor:
    """The same from A that went through four bits off its diagonal."""
    A = (V * s) @ V.mT
    off = A - torch.diag(A.diagonal())
    back = restored(*quantised(off, quantizer), len(s), quantizer) + torch.diag(A.diagonal())
    return matrix_power(back, -0.25, eps=EPS)


def matrices(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random eigenvectors, eigenvalues evenly spaced in their logarithm, of each condition."""
    g = torch.Generator().manual_seed(seed)
    return [(haar(D, D, generator=g), torch.logspace(0, -float(torch.log10(torch.tensor(c))), D)) for c in CONDITIONS]


def error(root: Root, V: Tensor, s: Tensor) -> float:
    exact = (V * raised(s, -0.25, EPS)) @ V.mT
    return float((root(V, s) - exact).norm() / exact.norm())


@claim(
    "An inverse fourth root from quantised eigenvectors is far nearer than one from the quantised preconditioner",
    source="abstract; Sec. 3.2 (Table 1)",
    criterion="128 x 128, random eigenvectors, eigenvalues from 1 down to 1/100, 1e-4 and 1e-6, 5 seeds: relative Frobenius error of "
    "A^-1/4 at most a fifth of that with A's own entries off the diagonal in the same four bits, in every one",
    method=by_eigenvectors,
    sham=Sham("the preconditioner's entries quantised", by_preconditioner),
)
def eigenvectors_are_better(lab: Lab, root: Root) -> Finding:
    ours = [[error(root, *A) for A in matrices(seed)] for seed in lab.seeds]
    naive = [[error(by_preconditioner, *A) for A in matrices(seed)] for seed in lab.seeds]
    columns = list(zip(CONDITIONS, zip(*ours, strict=True), zip(*naive, strict=True), strict=True))
    parts = {f"condition {c:g}": met(all(a <= b / 5 for a, b in zip(x, y, strict=True))) for c, x, y in columns}
    return conclude(parts, error={f"{c:g}": {"this": x, "preconditioner": y} for c, x, y in columns})


@claim(
    "Restoring orthogonality brings the root nearer, and the squared map is slightly better than the dynamic tree",
    source="abstract; Sec. 3.3, 3.4",
    criterion="the same matrices and 5 seeds: the error after four rectifications is below that without in every one; the interval "
    "of the error with the squares of even steps minus that with the tree lies below 0 at each condition",
    method=by_eigenvectors,
    sham=Sham("not rectified, and the tree", partial(by_eigenvectors, turns=0, quantizer="dynamic")),
)
def rectified_and_squared(lab: Lab, root: Root) -> Finding:
    arms: dict[str, Root] = {
        "this": root,
        "not rectified": partial(
            by_eigenvectors, turns=0, quantizer="dynamic" if root is not by_eigenvectors else "linear-2"
        ),
        "tree": partial(by_eigenvectors, quantizer="dynamic"),
    }
    found = {name: [[error(arm, *A) for A in matrices(seed)] for seed in lab.seeds] for name, arm in arms.items()}
    parts, table = {}, {}
    for k, c in enumerate(CONDITIONS):
        this, bare, tree = ([row[k] for row in found[name]] for name in arms)
        parts[f"rectified, condition {c:g}"] = met(all(a < b for a, b in zip(this, bare, strict=True)))
        parts[f"squares, condition {c:g}"] = weigh(lab.effect(this, tree), below=0)
        table[f"{c:g}"] = {"this": this, "not rectified": bare, "tree": tree}
    return conclude(parts, error=table)


# -- memory -----------------------------------------------------------------------------------------------------------


def in_32_bits(params: Any, **more: Any) -> Shampoo4bit:
    """The same in full precision: no factor is large enough to be packed."""
    return Shampoo4bit(params, **{**more, "least": 10**12})


@claim(
    "Its factors and roots take less than a fifth of the memory",
    source="abstract; Sec. 4",
    criterion="matrices of 64 x 128 and 512 x 512 once both have roots: state in bytes without momentum at most a fifth of that in 32 "
    "bits; with momentum beside it",
    method=Shampoo4bit,
    sham=Sham("the same in 32 bits", in_32_bits),
)
def a_fifth_of_the_memory(lab: Lab, make: Make) -> Finding:
    def size(make: Make, shape: tuple[int, int]) -> tuple[int, int]:
        w = nn.Parameter(torch.zeros(shape))
        w.grad = torch.randn(shape, generator=lab.generator(0))
        optimizer = make([w], factor_every=1, root_every=1)
        optimizer.step()
        state = {k: v.nbytes for k, v in optimizer.state[w].items() if v.ndim}
        return sum(state.values()) - state["momentum_buffer"], sum(state.values())

    shares = {}
    for shape in ((64, 128), (512, 512)):
        ours, full = size(make, shape), size(in_32_bits, shape)
        shares[f"{shape[0]} x {shape[1]}"] = [a / b for a, b in zip(ours, full, strict=True)]
    parts = {name: met(share[0] <= 0.2) for name, share in shares.items()}
    return conclude(parts, share_without_and_with_momentum=shares)


# -- training ---------------------------------------------------------------------------------------------------------

FRESH = 1000  # seed, apart from those looked at before
RATES = (0.3, 1.0, 3.0)  # extended where the best is at an end
OFTEN = (("factor_every", 5), ("root_every", 10))


def sgd(params: Any, **more: Any) -> Shampoo4bit:
    """No factor is ever taken: momentum SGD on matrices."""
    return Shampoo4bit(params, **{**more, "factor_every": 10**9, "root_every": 10**9})


@cache
def rate_of(make: Make, seed: int) -> float:
    """The best rate of another draw."""
    rates = list(RATES)
    seen: dict[float, float] = {}
    while True:
        seen |= {r: run(make, r, FRESH + 500 + seed, OFTEN) for r in rates if r not in seen}
        best = min(seen, key=seen.__getitem__)
        if best not in (rates[0], rates[-1]) or not 0.01 < best < 100:
            return best
        rates = [rates[0] / 3, *rates] if best == rates[0] else [*rates, rates[-1] * 3]


@claim(
    "It trains like Shampoo in 32 bits",
    source="abstract; Sec. 4",
    criterion="next character of Python source from the eight before, MLP of 128-64-64-97 (all factors are large enough to be "
    "packed), 200 steps, factors every 5 and roots every 10, 5 seeds, the rate tuned for 32 bits on another draw of each (0.3 to 3, "
    "extended) and given to both: the interval of its test loss minus that of 32 bits lies within 0.02 nats, and that of its loss "
    "minus the loss of momentum SGD, tuned alike, below 0",
    budget="full",
    method=Shampoo4bit,
    sham=Sham("the preconditioner's entries in four bits", PreconditionerIn4Bits),
)
def trains_like_32_bits(lab: Lab, make: Make) -> Finding:
    rates = [rate_of(in_32_bits, seed) for seed in lab.seeds]

    def losses(make: Make, rates: list[float]) -> list[float]:
        return [min(run(make, r, FRESH + s, OFTEN), 10.0) for s, r in zip(lab.seeds, rates, strict=True)]

    ours, full = losses(make, rates), losses(in_32_bits, rates)
    rates_of_sgd = [rate_of(sgd, seed) for seed in lab.seeds]
    plain = losses(sgd, rates_of_sgd)
    to_full, to_sgd = lab.effect(ours, full), lab.effect(ours, plain)
    return conclude(
        {"as in 32 bits": weigh(to_full, within=0.02), "below SGD": weigh(to_sgd, below=0)},
        test_loss_minus_32_bits=to_full,
        test_loss_minus_sgd=to_sgd,
        loss={"this": ours, "32 bits": full, "SGD": plain},
        rates={"32 bits": rates, "SGD": rates_of_sgd},
    )

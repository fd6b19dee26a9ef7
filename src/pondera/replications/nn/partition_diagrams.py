"""Partition diagrams (arXiv 2212.08648): the maps that keep permutations, all of them, how many, and products of groups."""

from collections import Counter
from itertools import permutations
from math import comb, factorial, prod
from typing import Protocol

import torch
from torch import Tensor

from pondera.nn._diagrams import equivariant_maps
from pondera.nn.equivariance import act_on, equivariance_error
from pondera.nn.partition_diagrams import PermutationLinear
from pondera.replications import Finding, Lab, Sham, claim, conclude, met

F64 = torch.float64
CASES = [(n, k, m - k) for m in range(6) for k in range(m + 1) for n in range(1, 7)]


class Maps(Protocol):
    def __call__(self, n: int, order_in: int, order_out: int) -> Tensor: ...


def by_layer(n: int, order_in: int, order_out: int, basis: str = "diagram") -> Tensor:
    """The maps of the layer's weights, each alone, (maps, n^l, n^k): an output channel a weight, one unit tensor at a time."""
    made = PermutationLinear(n, order_in, order_out, 1, 1, bias=False, basis=basis)
    weights = len(made.weight)
    layer = PermutationLinear(n, order_in, order_out, 1, weights, bias=False, basis=basis, dtype=F64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(weights, dtype=F64).unsqueeze(2))
        units = torch.eye(n**order_in, dtype=F64).view(-1, 1, *[n] * order_in)
        return layer(units).flatten(2).permute(1, 2, 0) if order_out else layer(units).T.unsqueeze(1)


def quoted(n: int, order_in: int, order_out: int) -> Tensor:
    """All Bell(l + k) diagrams, whatever n."""
    return equivariant_maps(f"S({n})", order_in, order_out, spanning_set=True)


def shifts(n: int, order_in: int, order_out: int) -> Tensor:
    """Maps that commute with cyclic shifts: indicators of orbits of index tuples under i -> i + 1."""
    m = order_in + order_out
    at = torch.arange(n**m)
    digits = (
        torch.stack([at // n ** (m - 1 - j) % n for j in range(m)], 1) if m else torch.zeros(1, 0, dtype=torch.long)
    )
    first = digits[:, :1] if m else digits
    orbit = ((digits - first) % n * torch.tensor([n**j for j in range(m)])).sum(1)
    every = orbit.unique()
    return (orbit == every.unsqueeze(1)).to(F64).view(len(every), n**order_out, n**order_in)


def rank(maps: Tensor) -> int:
    flat = maps.flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return int((torch.linalg.eigvalsh(flat @ flat.T) > 1e-9).sum())


# -- how many ----------------------------------------------------------------------------------------------------------


def fixed_points(n: int, m: int) -> int:
    """Dimension of what S_n leaves alone in (R^n)^m: the mean over all permutations of (fixed points)^m."""
    return sum(sum(g[i] == i for i in range(n)) ** m for g in permutations(range(n))) // factorial(n)


def walks(n: int, m: int) -> int:
    """Closed walks of m steps from the trivial representation through the McKay quiver of R^n: a step takes a box off a Young
    diagram of n boxes and puts one on."""
    at = Counter({(n,): 1})
    for _ in range(m):
        after: Counter[tuple[int, ...]] = Counter()
        for shape, ways in at.items():
            for i in range(len(shape)):
                off = [row - (j == i) for j, row in enumerate(shape)]
                if off != sorted(off, reverse=True):
                    continue
                off = [row for row in off if row]
                for j in range(len(off) + 1):
                    on = [*off, 0]
                    on[j] += 1
                    if on == sorted(on, reverse=True):
                        after[tuple(row for row in on if row)] += ways
        at = after  # type: ignore[assignment]
    return at[(n,)]


def stirling(m: int, t: int) -> int:
    return sum((-1) ** j * comb(t, j) * (t - j) ** m for j in range(t + 1)) // factorial(t)


@claim(
    "A layer needs as many weights a pair of channels as there are partitions of its l + k axes into at most n blocks; "
    "the Bell number of l + k, which is widely quoted, is right only for n >= l + k",
    source="abstract; the count by paths through the McKay quiver",
    criterion="all l + k <= 5 and n = 1 to 6: number of the layer's weights = rank of their maps = sum of S(l + k, t) "
    "for t <= n = mean over all permutations of (fixed points)^(l + k) = closed walks of l + k steps through the "
    "McKay quiver; Bell(l + k) exceeds it where n < l + k and equals it elsewhere",
    method=by_layer,
    sham=Sham("the Bell(l + k) diagrams, whatever n", quoted),
)
def number_of_weights(lab: Lab, maps: Maps) -> Finding:
    wrong, counts = [], {}
    bell_right = True
    for n, k, l in CASES:
        m = k + l
        found = maps(n, k, l)
        numbers = {len(found), rank(found), sum(stirling(m, t) for t in range(n + 1)), fixed_points(n, m), walks(n, m)}
        if len(numbers) > 1:
            wrong.append(f"n = {n}, {k} to {l}: {sorted(numbers)}")
        counts[f"n = {n}, l + k = {m}"] = len(found)
        bell = sum(stirling(m, t) for t in range(m + 1))
        bell_right &= bell == fixed_points(n, m) if n >= m else bell > fixed_points(n, m)
    return conclude(
        {
            "all five numbers agree": met(not wrong, "; ".join(wrong[:3])),
            "Bell's only for n >= l + k": met(bell_right),
        },
        weights=counts,
        cases=len(CASES),
    )


# -- these and no others -----------------------------------------------------------------------------------------------


def averaged(n: int, order_in: int, order_out: int, seed: int) -> Tensor:
    """A random matrix made equivariant the slow way: the mean of g^-1 M g over all n! permutations."""
    g = torch.Generator().manual_seed(seed)
    M = torch.randn([n] * (order_in + order_out), generator=g, dtype=F64)
    every = [
        M[torch.meshgrid(*[torch.tensor(p)] * M.ndim, indexing="ij")] if M.ndim else M for p in permutations(range(n))
    ]
    return torch.stack(every).mean(0).reshape(n**order_out, n**order_in)


def outside(target: Tensor, maps: Tensor) -> float:
    """The share of a matrix that no sum of the maps reaches."""
    Q, R, _ = torch.linalg.svd(maps.flatten(1).T, full_matrices=False)
    Q = Q[:, R / R[0] > 1e-9]
    t = target.flatten()
    return float((t - Q @ (Q.T @ t)).norm() / t.norm())


@claim(
    "The partitions' maps, in either basis, are equivariant, and every equivariant linear map is a sum of them",
    source="abstract; the theorems on the diagram and the orbit basis",
    criterion="all l + k <= 4 and n = 1 to 5, diagram and orbit basis: under every permutation (n <= 4; six random "
    "ones for n = 5) relative error of a random sum below 1e-12; a Gaussian matrix averaged over all n! permutations "
    "lies in their span up to 1e-10",
    method=by_layer,
    sham=Sham("the maps that commute with cyclic shifts", lambda n, k, l, basis="diagram": shifts(n, k, l)),
)
def these_and_no_others(lab: Lab, maps: Maps) -> Finding:
    worst, left, most = {"diagram": 0.0, "orbit": 0.0}, {"diagram": 0.0, "orbit": 0.0}, 0
    for n, k, l in CASES:
        if k + l > 4 or n > 5:
            continue
        mean = averaged(n, k, l, seed=n)
        for basis in worst:
            found = maps(n, k, l, basis=basis)  # type: ignore[call-arg]
            g = lab.generator(10 * n + k)
            M = torch.einsum("d,dij->ij", torch.randn(len(found), generator=g, dtype=F64), found)
            x = torch.randn(n**k, generator=g, dtype=F64).view([n] * k)

            def layer(x: Tensor, M: Tensor = M, n: int = n, l: int = l) -> Tensor:
                return (M @ x.flatten()).view([n] * l)

            if n <= 4:
                every = iter([torch.eye(n, dtype=F64)[list(p)] for p in permutations(range(n))])
                draws, group = factorial(n), lambda _, every=every: next(every)
            else:
                draws, group = 6, f"S({n})"  # type: ignore[assignment]
            error = equivariance_error(layer, x, group, act_on(k), act_on(l), draws=draws)
            worst[basis], left[basis] = max(worst[basis], error), max(left[basis], outside(mean, found))
            most = max(most, len(found))
    return conclude(
        {
            "equivariant": met(max(worst.values()) < 1e-12),
            "complete": met(max(left.values()) < 1e-10),
        },
        largest_error=worst,
        largest_share_outside=left,
        most_maps=most,
    )


# -- local symmetries --------------------------------------------------------------------------------------------------

LOCAL = [((2, 1, 1), (3, 1, 1)), ((2, 1, 0), (3, 1, 2)), ((3, 1, 1), (4, 1, 0)), ((2, 2, 1), (2, 1, 1))]


def products(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("pij,qkl->pqikjl", a, b).reshape(
        len(a) * len(b), a.shape[1] * b.shape[1], a.shape[2] * b.shape[2]
    )


def one_by_one(a: Tensor, b: Tensor) -> Tensor:
    count = max(len(a), len(b))
    return torch.cat([products(a[i % len(a)][None], b[i % len(b)][None]) for i in range(count)])


@claim(
    "Layers with local symmetries, a group of permutations for each of several sets of items, are tensor products of "
    "these",
    source="abstract; the generalisation to local symmetries",
    criterion="four products S_a x S_b on (R^a)^k tensor (R^b)^k', a, b <= 4: rank of all Kronecker products of the "
    "two layers' maps = their number = product over both groups of the means of (fixed points)^(orders); relative "
    "error of a random sum under 12 random pairs of permutations below 1e-12",
    method=products,
    sham=Sham("products of the i-th map of one with the i-th of the other alone", one_by_one),
)
def local_symmetries(lab: Lab, combined) -> Finding:  # type: ignore[no-untyped-def]
    right, worst, counts = True, 0.0, {}
    for seed, ((a, k, l), (b, kb, lb)) in enumerate(LOCAL):
        found = combined(by_layer(a, k, l), by_layer(b, kb, lb))
        wanted = prod((fixed_points(a, k + l), fixed_points(b, kb + lb)))
        right &= len(found) == rank(found) == wanted
        counts[f"S_{a} x S_{b}, orders {k}, {kb} to {l}, {lb}"] = {"maps": len(found), "counted": wanted}
        g = lab.generator(seed)
        M = torch.einsum("d,dij->ij", torch.randn(len(found), generator=g, dtype=F64), found)
        x = torch.randn(M.shape[1], generator=g, dtype=F64)
        for _ in range(12):
            p, q = (torch.eye(n, dtype=F64)[torch.randperm(n, generator=g)] for n in (a, b))
            before, after = (torch.kron(_power(p, i), _power(q, j)) for i, j in ((k, kb), (l, lb)))
            moved, wanted_y = M @ (before @ x), after @ (M @ x)
            worst = max(worst, float((moved - wanted_y).abs().max() / wanted_y.abs().max()))
    return conclude(
        {"as many as counted": met(right), "equivariant": met(worst < 1e-12)}, maps=counts, largest_error=worst
    )


def _power(p: Tensor, order: int) -> Tensor:
    out = torch.ones(1, 1, dtype=F64)
    for _ in range(order):
        out = torch.kron(out, p)
    return out

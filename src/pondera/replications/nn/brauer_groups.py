"""Brauer's group equivariant networks (arXiv 2212.08630): the maps that keep O(n), SO(n), Sp(n), all of them, how many."""

from functools import cache
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from pondera.errors import BadInput
from pondera.nn._diagrams import equivariant_maps
from pondera.nn.brauer_groups import BrauerLinear
from pondera.nn.equivariance import act_on, equivariance_error, group_element, symplectic_form
from pondera.replications import Finding, Lab, Sham, claim, conclude, met

F64 = torch.float64
GROUPS = ("O(1)", "O(2)", "O(3)", "SO(2)", "SO(3)", "Sp(2)", "Sp(4)")
SMALL = 729  # entries of a map, up to which the null space is found


class Maps(Protocol):
    def __call__(self, group: str, order_in: int, order_out: int) -> Tensor: ...


def spanning(group: str, order_in: int, order_out: int) -> Tensor:
    """The paper's whole set."""
    return equivariant_maps(group, order_in, order_out, spanning_set=True)


def without_their_own(group: str, order_in: int, order_out: int) -> Tensor:
    """O(n)'s maps for every group: no Levi-Civita symbol, delta in the place of the symplectic form."""
    return equivariant_maps(f"O({group.split('(')[1]}", order_in, order_out, spanning_set=True)


PLAIN = Sham("the diagrams of O(n) for every group, delta in the place of J, no Levi-Civita symbol", without_their_own)


def cases(most: int = 6) -> list[tuple[str, int, int]]:
    """Groups and orders with l + k up to `most` (5 for Sp(4), whose maps are large), every split for l + k <= 4, else the middle."""
    found = []
    for group in GROUPS:
        for m in range(1, most + 1):
            for k in range(m + 1) if m <= 4 else (m // 2,):
                found.append((group, k, m - k))
    return found


# -- equivariant -------------------------------------------------------------------------------------------------------


@claim(
    "The diagrams' maps commute with their group: O(n) with reflections, SO(n) without, Sp(n) with its stretching "
    "elements",
    source="abstract; the theorems on O(n), SO(n) and Sp(n)",
    criterion="all l + k <= 6 (middle split above 4), O(1..3), SO(2..3), Sp(2), Sp(4), the whole spanning set: "
    "relative error of a random sum below 1e-10 for 6 random elements, every second of O(n) a reflection, Sp(n) not "
    "orthogonal; under reflections SO(n)'s maps with a Levi-Civita symbol change sign, to 1e-10",
    method=spanning,
    sham=PLAIN,
)
def equivariant(lab: Lab, maps: Maps) -> Finding:
    worst: dict[str, float] = {}
    for seed, (group, k, l) in enumerate(cases()):
        found = maps(group, k, l)
        if not len(found):
            continue
        n = int(group[-2])
        g = lab.generator(seed)
        M = torch.einsum("d,dij->ij", torch.randn(len(found), generator=g, dtype=F64), found)
        x = torch.randn([n] * k, generator=g, dtype=F64)

        def layer(x: Tensor, M: Tensor = M, n: int = n, l: int = l) -> Tensor:
            return (M @ x.flatten()).view([n] * l)

        error = equivariance_error(layer, x, group, act_on(k), act_on(l), seed=seed)
        worst[group] = max(worst.get(group, 0.0), error)
    flips = 0.0
    own = maps("SO(3)", 2, 1)
    for seed in range(6):
        g = group_element("O(3)", generator=lab.generator(seed), flip=True)  # type: ignore[assignment]
        x = torch.randn(3, 3, generator=lab.generator(seed), dtype=F64)
        for M in own:
            moved, wanted = M @ (g @ x @ g.T).flatten(), -(g @ (M @ x.flatten()))  # type: ignore[attr-defined]
            flips = max(flips, float((moved - wanted).abs().max() / wanted.abs().max()))
    return conclude(
        {
            "equivariant": met(max(worst.values()) < 1e-10),
            "SO(n)'s own change sign under reflections": met(len(own) == 1 and flips < 1e-10),
        },
        largest_error=worst,
        cross_product_under_reflections=flips,
    )


# -- all of them -------------------------------------------------------------------------------------------------------


@cache
def null_space(group: str, m: int) -> int:
    """Dimension of what a group leaves alone in (R^n)^m, from generators: their Lie algebra, and a reflection for O(n).

    The maps of k-th to l-th order tensors are as many, for every split of m: the groups have a form that lowers indices."""
    kind, n = group.split("(")[0], int(group[-2])
    if kind == "Sp":
        units = torch.eye(n * n, dtype=F64).view(-1, n, n)
        algebra = [symplectic_form(n) @ (S + S.mT) for S in units]
    else:
        algebra = [E - E.mT for E in torch.eye(n * n, dtype=F64).view(-1, n, n)]
    total = torch.zeros(n**m, n**m, dtype=F64)
    for A in algebra:
        if A.any():
            whole = sum(_on_axis(A, j, m) for j in range(m))
            total += whole.mT @ whole  # type: ignore[union-attr]
    if kind == "O":
        flip = torch.diag(torch.tensor([-1.0] + [1.0] * (n - 1), dtype=F64))
        whole = torch.ones(1, 1, dtype=F64)
        for _ in range(m):
            whole = torch.kron(whole, flip)
        whole = whole - torch.eye(n**m, dtype=F64)
        total += whole.mT @ whole
    return int((torch.linalg.eigvalsh(total) < 1e-8).sum())


def _on_axis(A: Tensor, j: int, m: int) -> Tensor:
    n = len(A)
    return torch.kron(torch.kron(torch.eye(n**j, dtype=F64), A), torch.eye(n ** (m - 1 - j), dtype=F64))


@cache
def by_characters(group: str, m: int) -> int:
    """The same dimension as the mean of trace^m over the compact group (for Sp its compact form), by Weyl's formula."""
    kind, n, points = group.split("(")[0], int(group[-2]), 64
    t = 2 * torch.pi * torch.arange(points, dtype=F64) / points
    c = 2 * t.cos()
    if kind == "O":  # half rotations, half reflections
        if n == 1:
            return int(m % 2 == 0)
        if n == 2:
            return by_characters("SO(2)", m) // 2 if m else 1
        return by_characters("SO(3)", m) if m % 2 == 0 else 0  # -1 is in O(3) and takes x to (-1)^m x
    if group == "SO(2)":
        density, trace = torch.ones_like(t), c
    elif group == "SO(3)":
        density, trace = 1 - t.cos(), 1 + c
    elif group == "Sp(2)":
        density, trace = 2 * t.sin().square(), c
    else:
        assert group == "Sp(4)"
        density = (t.sin().square()[:, None] * t.sin().square()) * (c[:, None] - c).square()
        trace = c[:, None] + c
        density = density / density.mean()
    return round(float((density * trace**m).mean()))


def rank(maps: Tensor) -> int:
    flat = maps.flatten(1)
    if not len(flat):
        return 0
    flat = flat / flat.norm(dim=1, keepdim=True)
    return int((torch.linalg.eigvalsh(flat @ flat.T) > 1e-9).sum())


@claim(
    "They span all equivariant linear maps, and are independent for O(n) exactly if 2 n >= l + k, for Sp(n) exactly if "
    "n >= l + k",
    source="abstract; the theorems on O(n), SO(n) and Sp(n); the condition for a basis is recalled, not read",
    criterion="all l + k <= 6 (middle split above 4), O(1..3), SO(2..3), Sp(2), Sp(4): rank of the spanning set = mean "
    "of trace^(l + k) over the group by Weyl's formula = dimension of the null space of the generators (where n^(l + "
    "k) <= 729) = number of weights of the layer, 0 where it refuses; number of diagrams = rank exactly if the "
    "condition holds (O(n) and Sp(n), l + k even)",
    method=spanning,
    sham=PLAIN,
)
def all_of_them(lab: Lab, maps: Maps) -> Finding:
    wrong, table, independent = [], {}, True
    for group, k, l in cases():
        m, n = k + l, int(group[-2])
        found = maps(group, k, l)
        numbers = [rank(found), by_characters(group, m)]
        if n**m <= SMALL:
            numbers.append(null_space(group, m))
        try:
            numbers.append(len(BrauerLinear(group, k, l, 1, 1).weight))
        except BadInput:
            numbers.append(0)
        if len(set(numbers)) > 1:
            wrong.append(f"{group}, {k} to {l}: {numbers}")
        if not group.startswith("SO") and m % 2 == 0:
            enough = n >= m if group.startswith("Sp") else 2 * n >= m
            independent &= (len(found) == rank(found)) == enough
        table[f"{group}, l + k = {m}"] = {"diagrams": len(found), "dimension": by_characters(group, m)}
    return conclude(
        {
            "all counts agree": met(not wrong, "; ".join(wrong[:3])),
            "independent exactly as said": met(independent),
        },
        counts=table,
        cases=len(cases()),
    )


# -- what the groups tell apart ----------------------------------------------------------------------------------------

LAWS = ("torque, r x F", "volume of three vectors", "stress, a s + b trace(s) 1", "Lorentz force by the field's tensor")


def law(name: str, g: torch.Generator) -> tuple[Tensor, Tensor, tuple[str, int, int]]:
    """40 inputs, outputs and (group that suffices, orders) of a law of physics in space."""
    v = torch.randn(40, 3, 3, generator=g, dtype=F64)
    if name == LAWS[0]:
        return torch.einsum("zi,zj->zij", v[:, 0], v[:, 1]), torch.linalg.cross(v[:, 0], v[:, 1]), ("SO(3)", 2, 1)
    if name == LAWS[1]:
        return torch.einsum("zi,zj,zk->zijk", *v.unbind(1)), torch.linalg.det(v), ("SO(3)", 3, 0)
    if name == LAWS[2]:
        eye = torch.eye(3, dtype=F64)
        return v, 1.5 * v + 0.7 * v.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * eye, ("O(3)", 2, 2)
    field = v[:, :, :] - v.mT
    speed = torch.randn(40, 3, generator=g, dtype=F64)
    return torch.einsum("zij,zk->zijk", field, speed), (field @ speed[:, :, None])[..., 0], ("O(3)", 3, 1)


def misfit(group: str, x: Tensor, y: Tensor, order_in: int, order_out: int) -> float:
    """Relative error on the second half of the data, of a layer's weights fitted to the first by least squares."""
    try:
        layer = BrauerLinear(group, order_in, order_out, 1, 1, bias=False, dtype=F64)
    except BadInput:
        return 1.0
    columns = []
    for i in range(len(layer.weight)):
        with torch.no_grad():
            layer.weight.copy_(torch.eye(len(layer.weight), dtype=F64)[i].view(-1, 1, 1))
            columns.append(layer(x.unsqueeze(1)).flatten(1))
    A, half = torch.stack(columns, -1), len(x) // 2
    y = y.reshape(len(y), -1)
    w = torch.linalg.lstsq(A[:half].flatten(0, 1), y[:half].flatten()).solution
    return float((A[half:] @ w - y[half:]).norm() / y[half:].norm())


@claim(
    "One linear layer on products of vectors holds laws of physics exactly; those that a reflection tells apart need "
    "SO(n)",
    source="our use of the abstract's characterisation: which laws are linear and equivariant",
    criterion="four laws in space, weights by least squares on 20 draws, 20 fresh ones: relative error below 1e-10 for "
    "torque and volume by SO(3), for stress and Lorentz force by O(3); above 0.9 for torque and volume by O(3); at "
    "most 4 weights each; in each of 5 seeds",
    method=misfit,
    sham=Sham("O(3) in the place of SO(3)", lambda group, *rest: misfit(group.replace("SO", "O"), *rest)),
)
def laws(lab: Lab, fit) -> Finding:  # type: ignore[no-untyped-def]
    errors = {name: [] for name in LAWS}  # type: dict[str, list[float]]
    reflected: list[float] = []
    weights = {}
    for seed in lab.seeds:
        for name in LAWS:
            x, y, (group, k, l) = law(name, lab.generator(seed))
            errors[name].append(fit(group, x, y, k, l))
            weights[name] = len(BrauerLinear(group, k, l, 1, 1).weight)
            if group == "SO(3)":
                reflected.append(misfit("O(3)", x, y, k, l))
    return conclude(
        {
            "laws held": met(max(max(e) for e in errors.values()) < 1e-10),
            "O(n) cannot hold torque and volume": met(min(reflected) > 0.9),
            "few weights": met(max(weights.values()) <= 4),
        },
        largest_error={name: max(e) for name, e in errors.items()},
        weights=weights,
        of_a_dense_map={name: prod(law(name, lab.generator(0))[j][0].numel() for j in (0, 1)) for name in LAWS},
        least_error_by_O3=min(reflected),
    )

"""Fast products with diagrams (arXiv 2304.14165): equal to the dense ones, and how many operations they take, counted."""

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor

from pondera.nn._diagrams import Diagram, contract, diagrams, entries, factor, put, spread
from pondera.nn.brauer_groups import BrauerLinear
from pondera.nn.fast_brauer import diagram_product
from pondera.nn.partition_diagrams import PermutationLinear
from pondera.replications import Finding, Lab, Sham, claim, conclude, met
from pondera.replications.nn._counting import Counting, counted

F64 = torch.float64
SIZES = {"S": (2, 3), "O": (2, 3), "SO": (2, 3), "Sp": (2, 4)}

Product = Callable[..., Tensor]


def dense_product(x: Tensor, blocks: Any, order_out: int, group: str, *, free: Any = ()) -> Tensor:
    """The matrix formed, then multiplied by."""
    kind, n = group.split("(")[0], int(group.split("(")[1][:-1])
    k = sum(len(b) for b in blocks) + len(free) - order_out
    M = entries(Diagram(order_out, k, tuple(blocks), tuple(free)), kind, n).to(x)
    lead = x.shape[: x.ndim - k]
    return (x.reshape(*lead, n**k) @ M.mT).view(*lead, *[n] * order_out)


def never_turned(x: Tensor, blocks: Any, order_out: int, group: str, *, free: Any = ()) -> Tensor:
    """The same steps without the permutation between what is read and what is written."""
    kind, n = group.split("(")[0], int(group.split("(")[1][:-1])
    k = sum(len(b) for b in blocks) + len(free) - order_out
    read, _, write = factor(Diagram(order_out, k, tuple(blocks), tuple(free)))
    seen = contract(x.reshape(1, -1, *[n] * k), read, kind, {})
    out = put({write.blocks: spread(seen, write)}, n, order_out, signed=kind == "Sp")
    return out.view(*x.shape[: x.ndim - k], *[n] * order_out)


@claim(
    "The product by factors of the diagram equals the product with its matrix, for all four groups",
    source="abstract",
    criterion="every diagram with l + k <= 5 (and all of l = k = 3 for n <= 3) for S(n), O(n), SO(n), n = 2, 3, and "
    "Sp(2), Sp(4): outputs and gradients with respect to the input equal the dense ones within 1e-12 of the largest "
    "entry, in float64",
    method=diagram_product,
    sham=Sham("the axes left in the order in which they were read", never_turned),
)
def equal_to_dense(lab: Lab, product: Product) -> Finding:
    worst, tried = 0.0, {}  # type: ignore[var-annotated]
    for kind, sizes in SIZES.items():
        for n in sizes:
            for m in range(1, 7):
                for k in range(m + 1) if m < 6 else ((3,) if n <= 3 else ()):
                    for one in diagrams(kind, n, k, m - k, True):
                        g = lab.generator(len(tried))
                        x = torch.randn(2, *[n] * k, generator=g, dtype=F64).requires_grad_()
                        y = product(x, one.blocks, m - k, f"{kind}({n})", free=one.free)
                        v = torch.randn(y.shape, generator=g, dtype=F64)
                        M = entries(one, kind, n)
                        wanted, back = x.detach().reshape(2, -1) @ M.mT, v.reshape(2, -1) @ M
                        (grad,) = torch.autograd.grad((y * v).sum(), x)
                        for a, b in ((y.detach().reshape(2, -1), wanted), (grad.reshape(2, -1), back)):
                            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
                        tried[f"{kind}({n})"] = tried.get(f"{kind}({n})", 0) + 1
    return conclude(met(worst < 1e-12), largest_error=worst, diagrams_tried=tried)


# -- how many operations -----------------------------------------------------------------------------------------------


def exponent(counts: list[int], sizes: tuple[int, ...]) -> float:
    """Slope between the two largest sizes; nothing to do counts as 0."""
    a, b = counts[-2:]
    return log(b / a) / log(sizes[-1] / sizes[-2]) if a else 0.0


def operations(product: Product, one: Diagram, kind: str, n: int) -> tuple[int, int]:
    """Additions and multiplications, and entries written: a matrix product has n^(l + k) of the first."""
    if product is dense_product:
        return n ** (one.order_in + one.order_out), n**one.order_out
    x = torch.zeros([n] * one.order_in)
    mode = counted(lambda: product(x, one.blocks, one.order_out, f"{kind}({n})", free=one.free))
    return mode.arithmetic, mode.written


@claim(
    "Additions and multiplications fall from n^(l + k) to at most O(n^(k - 1)) for O(n) and Sp(n) and O(n^k) for S_n",
    source="abstract (a significant reduction); the exponents are recalled, not read",
    criterion="counted as torch runs, every diagram with k = l = 2 and k = l = 3, from n = 16 to 32, and 8 to 16: "
    "largest exponent over diagrams at most k - 1 + 0.1 for O(n) and Sp(n), at most k + 0.1 for S_n, entries written "
    "(beside n^l zeros) at most exponent max(k, l) + 0.1; for SO(3), every diagram with l + k = 5 fewer additions and "
    "multiplications than the dense",
    method=diagram_product,
    sham=Sham("the matrix formed, then multiplied by", dense_product),
)
def exponents(lab: Lab, product: Product) -> Finding:
    slopes: dict[str, float] = {}
    written: dict[str, float] = {}
    for kind in ("O", "Sp", "S"):
        for k, sizes in ((2, (16, 32)), (3, (8, 16))):
            at = []
            for one in diagrams(kind, sizes[0], k, k, True):
                pairs = [operations(product, one, kind, n) for n in sizes]
                at.append([exponent([p[j] for p in pairs], sizes) for j in (0, 1)])
            name = f"{kind}(n), k = l = {k}"
            slopes[name], written[name] = max(a[0] for a in at), max(a[1] for a in at)
    grood = [(one, operations(product, one, "SO", 3)[0]) for one in diagrams("SO", 3, 3, 2, True)]
    most = max(count for _, count in grood)
    return conclude(
        {
            "O(n)": met(all(slopes[f"O(n), k = l = {k}"] <= k - 1 + 0.1 for k in (2, 3))),
            "Sp(n)": met(all(slopes[f"Sp(n), k = l = {k}"] <= k - 1 + 0.1 for k in (2, 3))),
            "S_n": met(all(slopes[f"S(n), k = l = {k}"] <= k + 0.1 for k in (2, 3))),
            "written": met(
                all(written[f"{kind}(n), k = l = {k}"] <= k + 0.1 for kind in ("O", "Sp", "S") for k in (2, 3))
            ),
            "SO(3)": met(most < 3**5),
        },
        largest_exponent_of_arithmetic=slopes,
        largest_exponent_of_written=written,
        most_for_SO3_of_243=most,
    )


# -- whole layers ------------------------------------------------------------------------------------------------------


def by_factors(layer: torch.nn.Module, x: Tensor) -> Counting:
    return counted(lambda: layer(x))


def by_matrix(layer: Any, x: Tensor) -> Counting:
    """The product with the formed matrix; forming it is not counted."""
    mode = Counting()
    inputs, outputs = x[0].numel(), layer.channels_out * layer.n**layer.order_out
    mode.arithmetic, mode.written = len(x) * inputs * outputs, len(x) * outputs
    return mode


@claim(
    "A whole layer, a weight for each diagram and pair of channels, takes a small part of the operations of its "
    "matrix, the less the larger n",
    source="abstract; layers with channels are our reading",
    criterion="8 channels in and out, batch of 8, counted as torch runs: O(n) and S_n with k = l = 3 at n = 16: "
    "additions and multiplications below a tenth of the dense, and a smaller share at n = 16 than at n = 8; the same "
    "for O(n), S_n, Sp(n) with k = l = 2 at n = 32 and 16",
    method=by_factors,
    sham=Sham("the product with the formed matrix", by_matrix),
)
def whole_layers(lab: Lab, count: Callable[..., Counting]) -> Finding:
    shares: dict[str, list[float]] = {}
    for name, make, k, sizes in (  # type: ignore[assignment]
        ("O(n), k = l = 3", lambda n: BrauerLinear(f"O({n})", 3, 3, 8, 8, bias=False), 3, (8, 16)),
        ("S_n, k = l = 3", lambda n: PermutationLinear(n, 3, 3, 8, 8, bias=False), 3, (8, 16)),
        ("O(n), k = l = 2", lambda n: BrauerLinear(f"O({n})", 2, 2, 8, 8, bias=False), 2, (16, 32)),
        ("Sp(n), k = l = 2", lambda n: BrauerLinear(f"Sp({n})", 2, 2, 8, 8, bias=False), 2, (16, 32)),
        ("S_n, k = l = 2", lambda n: PermutationLinear(n, 2, 2, 8, 8, bias=False), 2, (16, 32)),
    ):
        shares[name] = []
        for n in sizes:
            x = torch.zeros(8, 8, *[n] * k)
            layer = make(n)
            shares[name].append(count(layer, x).arithmetic / by_matrix(layer, x).arithmetic)
    return conclude(
        {
            "below a tenth": met(max(s[1] for s in shares.values()) < 0.1),
            "less at the larger n": met(all(s[1] < s[0] for s in shares.values())),
        },
        share_of_the_dense_arithmetic=shares,
    )

"""Orthogonal convolutions (arXiv 2108.05623): when they exist, what the penalty says of the operator, what it is good for."""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.linalg import as_matrix, haar
from pondera.penalties.orthogonal_convolution import (
    convolution_singular_values,
    orthogonal_convolution,
    orthogonal_convolution_exists,
)
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Exists = Callable[..., bool]
Penalty = Callable[..., Tensor]  # of a kernel, with stride= and groups= by name
Operator = Callable[[Tensor, int, int, str], Tensor]  # of a kernel, positions an axis, stride, padding: a matrix


def operator(w: Tensor, positions: int, stride: int, padding: str) -> Tensor:
    """The convolution as a matrix, from torch's own on every unit vector; taps are centred."""
    d, k = w.ndim - 2, w.shape[-1]
    x = torch.eye(w.shape[1] * positions**d, dtype=w.dtype).reshape(-1, w.shape[1], *(positions,) * d)
    if padding != "none":
        x = F.pad(x, [(k - 1) // 2, k // 2] * d, mode={"circular": "circular", "zeros": "constant"}[padding])
    return (F.conv1d if d == 1 else F.conv2d)(x, w, stride=stride).flatten(1).T


def apart(a: Tensor) -> Tensor:
    """A A^T - I, or A^T A - I where A has more rows than columns."""
    small = a @ a.T if a.shape[0] <= a.shape[1] else a.T @ a
    return small - torch.eye(len(small), dtype=a.dtype)


def descended(w: Tensor, loss: Callable[[Tensor], Tensor], steps: int = 200) -> tuple[float, Tensor]:
    """The least loss that L-BFGS finds from a kernel, and the kernel there."""
    w = w.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([w], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-9, history_size=20)

    def again() -> Tensor:
        lbfgs.zero_grad()
        value = loss(w)
        value.backward()
        return value

    lbfgs.step(again)  # type: ignore[no-untyped-call]
    return float(loss(w).detach()), w.detach()


def random_kernel(*shape: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=g) / prod(shape[1:]) ** 0.5


# -- existence ---------------------------------------------------------------------------------------------------------

ARCHITECTURES = [  # M, C, kernel, stride
    *((m, c, (k,), s) for c, k, s in ((1, 2, 1), (1, 2, 3), (1, 3, 4), (2, 1, 2), (2, 2, 2)) for m in (1, 2, 3, 4, 5)),
    *((m, 1, (2, 2), s) for s in (1, 2, 3) for m in (1, 4, 5, 9)),
]


def always(*architecture: Any, **stride: Any) -> bool:
    return True


@cache
def least_distance(m: int, c: int, kernel: tuple[int, ...], stride: int, enough: float) -> float:
    """Least |A A^T - I|^2 an output position over five random starts, of the operator itself; the first small one will do."""
    size = 2 * stride if 2 * stride >= 2 * kernel[0] - 1 else 3 * stride

    def loss(w: Tensor) -> Tensor:
        return apart(operator(w, size, stride, "circular")).square().sum() / (size // stride) ** len(kernel)

    least = inf
    for seed in range(5):
        least = min(least, descended(random_kernel(m, c, *kernel, seed=seed), loss)[0])
        if least < enough:
            break
    return least


@claim(
    "With circular padding an orthogonal convolution exists exactly where the condition on the architecture says so",
    source="abstract; Theorem 4 (necessary and sufficient)",
    criterion="37 architectures of one and two axes (1 to 9 outputs, 1 or 2 inputs, kernels of 1 to 3, strides of 1 to 4): least "
    "|A A^T - I|_F^2 (A^T A where A has more rows) an output position of the explicit operator, by L-BFGS from 5 random kernels: "
    "below 1e-8 where the condition holds, above 0.5 where it does not, without exception; each kind at least 5 times",
    method=orthogonal_convolution_exists,
    sham=Sham("every architecture is said to have one", always),
)
def exist_where_the_condition_says(lab: Lab, exists: Exists) -> Finding:
    found = {(m, c, k, s): least_distance(m, c, k, s, 1e-9) for m, c, k, s in ARCHITECTURES}
    said = {one: exists(one[0], one[1], one[2], stride=one[3]) for one in found}
    with_one = [least for one, least in found.items() if said[one]]
    without = [least for one, least in found.items() if not said[one]]
    return conclude(
        {
            "found where it says so": met(len(with_one) >= 5 and max(with_one) < 1e-8),
            "not found where it denies it": met(len(without) >= 5 and min(without) > 0.5),
        },
        architectures={"with": len(with_one), "without": len(without)},
        largest_where_said=max(with_one, default=0.0),
        smallest_where_denied=min(without, default=inf),
    )


def circular_whatever_is_asked(w: Tensor, positions: int, stride: int, padding: str) -> Tensor:
    return operator(w, positions, stride, "circular")


@claim(
    "Other paddings leave no room: without padding none exists, with zeros only kernels that read one position",
    source="abstract; the section on 'valid' and 'same' boundary conditions (stride 1)",
    criterion="kernels of 3 with 4 outputs and 2 inputs and with 2 and 4, signals of 8, L-BFGS on the explicit operator from 5 random "
    "kernels each. Circular: distance below 1e-8, with more than 10% of the kernel's square outside its centre in 4 of 5 starts or "
    "more. Zeros: in every start distance above 0.01 or less than 1% of the square outside the centre. None, 4 outputs: distance "
    "above 0.1 in every start",
    method=operator,
    sham=Sham("circular padding whatever is asked for", circular_whatever_is_asked),
)
def other_paddings_leave_no_room(lab: Lab, of: Operator) -> Finding:
    def ends(m: int, c: int, padding: str) -> list[tuple[float, float]]:
        def loss(w: Tensor) -> Tensor:
            return apart(of(w, 8, 1, padding)).square().sum() / 8

        each = [descended(random_kernel(m, c, 3, seed=seed), loss) for seed in lab.seeds]
        return [(least, 1 - float(w[:, :, 1].square().sum() / w.square().sum())) for least, w in each]

    both = {padding: ends(4, 2, padding) + ends(2, 4, padding) for padding in ("circular", "zeros")}
    none = ends(4, 2, "none")
    return conclude(
        {
            "plenty with circular padding": met(
                max(least for least, _ in both["circular"]) < 1e-8
                and sum(outside > 0.1 for _, outside in both["circular"]) >= 0.8 * len(both["circular"])
            ),
            "only one position with zeros": met(
                all(least > 0.01 or outside < 0.01 for least, outside in both["zeros"])
            ),
            "none without padding": met(min(least for least, _ in none) > 0.1),
        },
        distance_and_share_outside_the_centre=both | {"none": none},
    )


# -- the operator ------------------------------------------------------------------------------------------------------


def of_the_flattened_kernel(w: Tensor, *, stride: int = 1) -> Tensor:
    """The kernel as a matrix of M x C k^2 is to have orthonormal rows, or columns."""
    return apart(as_matrix(w)).square().sum()


SHAPES = {  # M, C, k, stride
    "rows": (4, 6, 3, 1),
    "rows, stride 2": (6, 3, 3, 2),
    "even kernel": (4, 3, 4, 2),
    "square": (8, 2, 3, 2),
    "columns": (6, 2, 3, 1),
    "columns, stride 2": (14, 3, 3, 2),
    "wide kernel": (5, 4, 5, 1),
}
OUTPUTS = (16, 32, 64)


@claim(
    "The penalty is the operator's distance to an isometry, bounds it in every direction, and does so for every image size",
    source="abstract; theorems on L_orth in Frobenius and spectral norm; scalability in N",
    criterion="7 architectures (rows and columns, strides 1 and 2), kernels random and at L_orth of about 1e-2 and 1e-4 on the way of "
    "L-BFGS, outputs of 16, 32 and 64 positions an axis, all singular values by FFT: |A A^T - I|_F^2 / N^2 = L_orth within 1e-6 of it; "
    "|s^2 - 1| at most (alpha L_orth)^(1/2) with the theorem's alpha; the largest |s^2 - 1| at 64 at most 1.2 times that at 16",
    method=orthogonal_convolution,
    sham=Sham("orthonormal rows or columns of the flattened kernel", of_the_flattened_kernel),
)
def bounds_the_operator_at_every_size(lab: Lab, penalty: Penalty) -> Finding:
    worst_equality, worst_bound, growth, near = 0.0, 0.0, 0.0, 0.0
    for i, (m, c, k, s) in enumerate(SHAPES.values()):
        rows, columns = m * (2 * ((k - 1) // s) + 1) ** 2, c * (2 * k - 1) ** 2
        alpha = rows if m < c * s * s else columns if m > c * s * s else min(rows, columns)
        for w in on_the_way(m, c, k, s, i):
            loss = float(penalty(w, stride=s))
            furthest = []
            for n in OUTPUTS:
                error = convolution_singular_values(w, n * s, stride=s).square() - 1
                furthest.append(float(error.abs().max()))
                worst_equality = max(worst_equality, abs(float(error.square().sum()) / n**2 / loss - 1))
                worst_bound = max(worst_bound, furthest[-1] / (alpha * loss) ** 0.5)
            growth = max(growth, furthest[-1] / furthest[0])
            near = max(near, furthest[-1]) if loss < 1e-3 else near
    return conclude(
        {
            "equal to the mean distance": met(worst_equality < 1e-6),
            "bound never broken": met(worst_bound <= 1),
            "flat in the image's size": met(growth < 1.2),
        },
        largest_relative_difference=worst_equality,
        largest_share_of_the_bound=worst_bound,
        largest_growth_from_16_to_64=growth,
        largest_error_at_64_of_nearly_orthogonal_kernels=near,
    )


@cache
def on_the_way(m: int, c: int, k: int, s: int, seed: int) -> list[Tensor]:
    """A random kernel, and what descent on the operator's distance makes of it at about 1e-2 and 1e-4."""
    kernels = [random_kernel(m, c, k, k, seed=seed)]
    w = kernels[0]
    for level in (1e-2, 1e-4):
        for _ in range(100):
            at, w = descended(w, partial(orthogonal_convolution, stride=s), steps=2)
            if at < level:
                break
        kernels.append(w)
    return kernels


# -- training ----------------------------------------------------------------------------------------------------------

CHANNELS, CLASSES, STEPS, BATCH = (1, 12, 24, 24), 10, 150, 32
STRIDES = (1, 2, 1)
RATES = (0.01, 0.03, 0.1)
FACTORS = (0.0, 0.001, 0.01, 0.1, 0.3)
DECAYS = (0.0, 1e-4, 1e-3, 1e-2, 3e-2)
REACH = 0.5  # of the attack, in the norm of an image whose pixels lie between 0 and 1


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(y)


def nothing(w: Tensor, *, stride: int = 1, groups: int = 1) -> Tensor:
    return 0.0 * w.sum()


def flattened(w: Tensor, *, stride: int = 1, groups: int = 1) -> Tensor:
    k = w.flatten(1).reshape(groups, -1, w[0].numel())
    short = k @ k.mT if k.shape[1] <= k.shape[2] else k.mT @ k
    return (short - torch.eye(short.shape[1])).square().sum()


def forward(parameters: list[Tensor], x: Tensor) -> Tensor:
    """Logits (seeds, images, classes) of nets side by side; images (seeds, images, 1, 8, 8)."""
    n, h = len(x), x.flatten(0, 1)
    for w, s in zip(parameters[:3], STRIDES):
        taps = F.unfold(F.pad(h, (1, 1, 1, 1), mode="circular"), 3, stride=s)  # (seeds images, C 9, positions)
        side = h.shape[-1] // s
        taps = taps.reshape(n, -1, *taps.shape[1:]).transpose(1, 2).flatten(2)
        h = torch.bmm(w.reshape(n, -1, taps.shape[1]), taps).relu()  # one net's filters on all its images
        h = h.reshape(n, h.shape[1], -1, side, side).transpose(1, 2).flatten(0, 1)
    return torch.baddbmm(parameters[4].unsqueeze(1), h.reshape(n, -1, parameters[3].shape[2]), parameters[3].mT)


def _loss(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(forward(parameters, x).flatten(0, 1), y.flatten(), reduction="sum") / x.shape[1]


def attacked(parameters: list[Tensor], x: Tensor, y: Tensor, steps: int = 5) -> Tensor:
    """Images moved by at most REACH in Euclidean norm to where the loss is larger (projected gradient ascent)."""
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_()
        (g,) = torch.autograd.grad(_loss(parameters, moved, y), moved)
        step = (
            moved.detach() - x + REACH / 2 * g / g.flatten(2).norm(dim=2).clamp_min(1e-12).view(*g.shape[:2], 1, 1, 1)
        )
        length = step.flatten(2).norm(dim=2).view(*g.shape[:2], 1, 1, 1)
        moved = x + step * (REACH / length.clamp_min(REACH))
    return moved.detach()


@cache
def trained(seeds: range, penalty: Penalty, factor: float, decay: float, rate: float) -> dict[str, list[float]]:
    """Figures a seed: accuracy and accuracy under attack on images to tune on and to test on; the spread of singular values."""
    x, y = _digits()
    n, sources = len(seeds), [torch.Generator().manual_seed(seed) for seed in seeds]
    order = torch.stack([torch.randperm(len(x), generator=g) for g in sources])
    sets = {"train": order[:, :300], "tune": order[:, 300:500], "test": order[:, 500:900]}
    shapes = [(b, a, 3, 3) for a, b in pairwise(CHANNELS)]
    drawn = [[haar(s[0], prod(s[1:]), generator=g).reshape(s) for s in shapes] for g in sources]
    parameters = [torch.cat(layer) for layer in zip(*drawn)]
    wide = CHANNELS[-1] * 16
    parameters += [
        torch.stack([torch.randn(CLASSES, wide, generator=g) / wide**0.5 for g in sources]),
        torch.zeros(n, CLASSES),
    ]
    parameters = [p.requires_grad_() for p in parameters]
    sgd = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=decay)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, STEPS)
    for _ in range(STEPS):
        rows = torch.stack([torch.randint(300, (BATCH,), generator=g) for g in sources])
        at = sets["train"].gather(1, rows)
        loss = _loss(parameters, x[at], y[at])
        if factor:
            loss = loss + factor * sum(penalty(w, stride=s, groups=n) for w, s in zip(parameters, STRIDES))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        plan.step()
    found: dict[str, list[float]] = {}
    for name in ("tune", "test"):
        images, labels = x[sets[name]], y[sets[name]]
        for what, seen in (("", images), (", attacked", attacked(parameters, images, labels))):
            with torch.no_grad():
                found[name + what] = (
                    (forward(parameters, seen).argmax(2) == labels).float().mean(1).nan_to_num(0.0).tolist()
                )
    worst = [inf] * n  # of what diverged
    for i in range(n):
        kernels = [w.detach().chunk(n)[i] for w in parameters[:3]]
        if all(w.isfinite().all() for w in kernels):
            values = [convolution_singular_values(w, side, stride=s) for w, s, side in zip(kernels, STRIDES, (8, 8, 4))]
            worst[i] = float((torch.cat(values).square() - 1).abs().max())
    return found | {"furthest": worst}


SETTING = (
    "three circular convolutions (12, 24, 24 channels of 3x3, one of stride 2), started with orthonormal flattened kernels, ReLU, a "
    "linear layer; 300 digits, 150 steps of SGD with momentum, 10 seeds; "
)


@claim(
    "The factor of the penalty sets how near to an isometry the trained convolutions are",
    source="abstract (the parameter tunes a tradeoff between accuracy and orthogonality); experiments",
    criterion=SETTING
    + "rate 0.1, factors 0, 0.001, 0.01, 0.1: the largest |s^2 - 1| over the three layers falls from each factor to the next in "
    "every seed; at 0.1 it is below a tenth of that at 0, and below that under the same pull on the flattened kernels",
    budget="full",
    method=orthogonal_convolution,
    sham=Sham("the same pull on the flattened kernels", flattened),
)
def factor_sets_the_distance(lab: Lab, penalty: Penalty) -> Finding:
    seeds = lab.draws(10)
    runs = {f: trained(seeds, penalty if f else nothing, f, 0.0, 0.1) for f in FACTORS[:4]}
    spread = [r["furthest"] for r in runs.values()]
    beside = trained(seeds, flattened, FACTORS[3], 0.0, 0.1)["furthest"]
    return conclude(
        {
            "nearer with each factor": met(all(b < a for one, other in pairwise(spread) for a, b in zip(one, other))),
            "less than a tenth at 0.1": met(all(b < a / 10 for a, b in zip(spread[0], spread[-1]))),
            "nearer than with flattened kernels": met(all(a < b for a, b in zip(spread[-1], beside))),
        },
        furthest={f: [min(r["furthest"]), max(r["furthest"])] for f, r in runs.items()},
        furthest_with_flattened_kernels=[min(beside), max(beside)],
        accuracy={f: sum(r["test"]) / 10 for f, r in runs.items()},
        accuracy_attacked={f: sum(r["test, attacked"]) / 10 for f, r in runs.items()},
    )


@claim(
    "With its factor tuned, the penalty benefits both accuracy and robustness",
    source="abstract; experiments on real data (there CIFAR10 and Imagenette)",
    criterion=SETTING
    + "each seed picks factor (5) and rate (3) for the penalty, weight decay (5) and rate (3) for the net without it, on 200 other "
    "digits: by accuracy for accuracy, by accuracy under attack (projected gradient, 5 steps, Euclidean norm 0.5) for robustness; "
    "test accuracy and test accuracy under attack minus the net without: both intervals above 0",
    budget="full",
    method=orthogonal_convolution,
    sham=Sham("no pull at all", nothing),
)
def benefits_accuracy_and_robustness(lab: Lab, penalty: Penalty) -> Finding:
    seeds = lab.draws(10)
    pull = {f: (nothing, 0.0) if penalty is nothing or not f else (penalty, f) for f in FACTORS}
    pulled = {(f, r): trained(seeds, *pull[f], 0.0, r) for f in FACTORS for r in RATES}
    plain = {(d, r): trained(seeds, nothing, 0.0, d, r) for d in DECAYS for r in RATES}

    def best(runs: dict[tuple[float, float], dict[str, list[float]]], what: str) -> tuple[list[float], list[Any]]:
        taken = [max(runs, key=lambda at: runs[at]["tune" + what][i]) for i in seeds]
        return [runs[at]["test" + what][i] for i, at in enumerate(taken)], taken

    parts, figures = {}, {}
    for name, what in (("accuracy", ""), ("robustness", ", attacked")):
        (ours, taken), (theirs, theirs_taken) = best(pulled, what), best(plain, what)
        gap = lab.effect(ours, theirs)
        parts[name] = weigh(gap, above=0)
        figures[name] = {"gap": gap, "with": sum(ours) / 10, "without": sum(theirs) / 10, "factor_and_rate": taken}
        figures[name]["decay_and_rate"] = theirs_taken
    return conclude(parts, **figures)

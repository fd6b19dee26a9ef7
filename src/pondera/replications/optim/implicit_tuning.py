"""Implicit tuning (arXiv 1911.02590): is it the derivative through training, at what memory, and does a decay a weight pay?

Ridge regression has everything in closed form; the digits' logistic regression has a decay for each of its 640 weights.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.optim.implicit_tuning import Hypergradient, implicit_hypergradient
from pondera.replications import Finding, Lab, Sham, claim, conclude, met

Method = Callable[..., Hypergradient]


def identity(train: Any, val: Any, weights: Any, hyper: Any, *, steps: int = 20, alpha: Any = None) -> Hypergradient:
    """A multiple of the identity in the place of the inverse Hessian."""
    return implicit_hypergradient(train, val, weights, hyper, steps=0, alpha=alpha)


# -- exactness --------------------------------------------------------------------------------------------------------


def ridge(seed: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor], Any, Tensor]:
    """Training loss by weights and log decays, validation loss, the minimum by the decays, and decays."""
    g = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    X, V, truth = new(30, 8), new(30, 8), new(8)
    y, u = X @ truth + 0.3 * new(30), V @ truth + 0.3 * new(30)

    def train(w: Tensor, decay: Tensor) -> Tensor:
        return (X @ w - y).square().mean() / 2 + (decay.exp() * w.square()).sum() / 2

    def val(w: Tensor) -> Tensor:
        return (V @ w - u).square().mean()

    def solved(decay: Tensor) -> Tensor:
        return torch.linalg.solve(X.T @ X / 30 + decay.exp().diag(), X.T @ y / 30)

    return train, val, solved, (0.3 * new(8) - 1).requires_grad_()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@claim(
    "The series with J products is the derivative through J + 1 steps from the optimum, and goes to the true hypergradient",
    source="Sec. 4, the theorem on unrolling; Alg. 3",
    criterion="ridge regression of 30 x 8 in float64, a log decay for each weight, 5 draws: with J = 0, 3 and 20 and "
    "a = 0.2 equal to reverse mode "
    "through J + 1 steps of gradient descent within 1e-10 (relative), and within 1e-3 of the derivative through the "
    "closed form at J = 20 and "
    "its own a, where J = 0 is off by more than 0.05",
    method=implicit_hypergradient,
    sham=Sham("the identity in the place of the inverse Hessian", identity),
)
def equals_unrolled(lab: Lab, method: Method) -> Finding:
    unrolled_off: list[float] = []
    exact_off: list[float] = []
    none_off: list[float] = []
    for seed in lab.seeds:
        train, val, solved, decay = ridge(seed)
        w = solved(decay).detach().requires_grad_()
        for steps in (0, 3, 20):
            moved = w
            for _ in range(steps + 1):
                (g,) = torch.autograd.grad(train(moved, decay), moved, create_graph=True)
                moved = moved - 0.2 * g
            (unrolled,) = torch.autograd.grad(val(moved), decay)
            found = method(train(w, decay), val(w), [w], decay, steps=steps, alpha=0.2)
            unrolled_off.append(relative(found.grads[0], unrolled))
        (exact,) = torch.autograd.grad(val(solved(decay)), decay)
        exact_off.append(relative(method(train(w, decay), val(w), [w], decay, steps=20).grads[0], exact))
        none_off.append(relative(identity(train(w, decay), val(w), [w], decay).grads[0], exact))
    return conclude(
        {
            "equals unrolling": met(max(unrolled_off) < 1e-10),
            "near the closed form": met(max(exact_off) < 1e-3),
            "no product is not": met(min(none_off) > 0.05),
        },
        off_unrolled=max(unrolled_off),
        off_closed_form=exact_off,
        off_without_products=none_off,
    )


# -- memory -----------------------------------------------------------------------------------------------------------


def unrolled(train: Callable[..., Tensor], val: Callable[..., Tensor], w: Tensor, decay: Tensor, steps: int) -> None:
    moved = w
    for _ in range(steps + 1):
        (g,) = torch.autograd.grad(train(moved, decay), moved, create_graph=True)
        moved = moved - 0.1 * g
    torch.autograd.grad(val(moved), decay)


def by_neumann(train: Callable[..., Tensor], val: Callable[..., Tensor], w: Tensor, decay: Tensor, steps: int) -> None:
    implicit_hypergradient(train(w, decay), val(w), [w], decay, steps=steps, alpha=0.1)


def kept_bytes(run: Callable[[], None]) -> int:
    """The most bytes that graphs hold at one time, each storage counted once."""
    held: dict[int, list[int]] = {}
    total = most = 0

    class Saved:
        def __init__(self, t: Tensor) -> None:
            nonlocal total, most
            self.tensor, self.key = t, t.untyped_storage().data_ptr()
            entry = held.setdefault(self.key, [0, t.untyped_storage().nbytes()])
            entry[0] += 1
            total += entry[1] if entry[0] == 1 else 0
            most = max(most, total)

        def __del__(self) -> None:
            nonlocal total
            entry = held[self.key]
            entry[0] -= 1
            if not entry[0]:
                total -= entry[1]
                del held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda s: s.tensor):
        run()
    return most


@claim(
    "Its memory does not grow with the number of products, where that of unrolling does",
    source="abstract; table of costs",
    criterion="logistic regression on 200 digits with 640 decays, bytes that autograd's graphs hold at most: at 100 "
    "products at most 1.1 times those at 5, "
    "and at 20 at most a quarter of those of reverse mode through 20 steps",
    method=by_neumann,
    sham=Sham("reverse mode through as many steps", unrolled),
)
def memory_is_flat(lab: Lab, method: Callable[..., None]) -> Finding:
    x, y = (t[:200].clone() for t in digits())  # a slice would count with the whole it is cut from

    def train(w: Tensor, decay: Tensor) -> Tensor:
        return F.cross_entropy(x @ w, y) + (decay.exp() * w.square()).sum() / 2

    def val(w: Tensor) -> Tensor:
        return F.cross_entropy(x @ w, y)

    w, decay = (torch.full((64, 10), v, requires_grad=True) for v in (0.01, -6.0))
    ours = {steps: kept_bytes(lambda steps=steps: method(train, val, w, decay, steps)) for steps in (5, 20, 100)}  # type: ignore[misc]
    theirs = {steps: kept_bytes(lambda steps=steps: unrolled(train, val, w, decay, steps)) for steps in (5, 20, 100)}  # type: ignore[misc]
    return conclude(
        {"flat": met(ours[100] <= 1.1 * ours[5]), "a quarter of unrolling": met(ours[20] <= theirs[20] / 4)},
        bytes=ours,
        bytes_unrolled=theirs,
    )


# -- a decay a weight -------------------------------------------------------------------------------------------------

FRESH, MOST = 100, 12
OUTER, INNER, SCALARS = 40, 10, tuple(range(-10, 2))  # updates of decays, steps between, logs of one decay for all


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 16
    return x - x.mean(0), torch.tensor(bunch.target)


Split = tuple[Tensor, Tensor]


def parts(seed: int) -> tuple[Split, Split, Split]:
    """200 to train on, 500 to validate on, 1,097 to test on; a tenth of the pixels' scale as noise."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    first, second, third = order[:200], order[200:700], order[700:]
    return (x[first], y[first]), (x[second], y[second]), (x[third], y[third])


def minimum(data: Split, decay: Tensor, w: Tensor | None = None) -> Tensor:
    """The weights of least training loss at these decays, by L-BFGS."""
    x, y = data
    w = (torch.zeros(64, 10) if w is None else w.detach().clone()).requires_grad_()
    optimizer = torch.optim.LBFGS([w], max_iter=INNER if decay.numel() > 1 else 60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w, y) + (decay.detach().exp() * w.square()).sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return w


@cache
def one_decay(seed: int) -> tuple[float, float, float]:
    """The log decay for all weights that is best on the validation set, its loss there, and that without decay on "
    "the test set."""
    train, (xv, yv), (xt, yt) = parts(seed)
    found = []
    for log in SCALARS:
        w = minimum(train, torch.tensor(float(log))).detach()
        found.append((float(F.cross_entropy(xv @ w, yv)), float(log), float(F.cross_entropy(xt @ w, yt))))
    best = min(found)
    both = minimum((torch.cat([train[0], xv]), torch.cat([train[1], yv])), torch.tensor(best[1])).detach()
    return best[1], best[2], found[0][2], float(F.cross_entropy(xt @ both, yt))  # type: ignore[return-value]


@cache
def tuned(method: Method, seed: int) -> tuple[float, float]:
    """Test loss with a decay for each weight, tuned from the best single one; and the residual of the last product."""
    train, (xv, yv), (xt, yt) = parts(seed)
    x, y = train
    decay = torch.full((64, 10), one_decay(seed)[0], requires_grad=True)
    outer = torch.optim.Adam([decay], lr=0.1)
    w, found = None, None
    best = (float("inf"), float("inf"))
    for _ in range(OUTER + 1):
        w = minimum(train, decay, w)
        val = F.cross_entropy(xv @ w, yv)
        best = min(best, (float(val.detach()), float(F.cross_entropy(xt @ w, yt).detach())))
        loss = F.cross_entropy(x @ w, y) + (decay.exp() * w.square()).sum() / 2
        found = method(loss, val, [w], decay, steps=20)
        decay.grad = found.grads[0]
        outer.step()
    assert found is not None
    return best[1], found.residual


def shuffled(train: Any, val: Any, weights: Any, hyper: Tensor, *, steps: int = 20) -> Hypergradient:
    """The hypergradient with its entries dealt to other weights."""
    found = implicit_hypergradient(train, val, weights, hyper, steps=steps)
    g = found.grads[0]
    order = torch.randperm(g.numel(), generator=torch.Generator().manual_seed(0))
    return Hypergradient((g.flatten()[order].view_as(g),), *list(vars(found).values())[1:])


@claim(
    "A decay tuned for each weight generalises better than the best single one, and than none",
    source="abstract; Sec. 5 (there a decay for each weight of networks up to millions)",
    criterion="logistic regression on 200 digits, 500 to validate, 1,097 to test: test loss with 640 decays after 40 "
    "updates (20 products, Adam at 0.1, "
    "L-BFGS between, the best on the validation set kept), from the best of 12 single decays, minus that of this "
    "single decay, "
    "and minus that of the smallest (e^-10): 95% intervals below 0; 5 seeds, others added until decided, at most 12. "
    "Networks of millions "
    "are out of reach here",
    budget="full",
    method=implicit_hypergradient,
    sham=Sham("the hypergradient's entries dealt to other weights", shuffled),
)
def a_decay_a_weight_pays(lab: Lab, method: Method) -> Finding:
    over_one, gap, _ = lab.until_decided(
        lambda s: tuned(method, FRESH + s)[0] - one_decay(FRESH + s)[1], below=0, most=MOST
    )
    over_none, other, _ = lab.until_decided(
        lambda s: tuned(method, FRESH + s)[0] - one_decay(FRESH + s)[2], below=0, most=MOST
    )
    seeds = range(FRESH, FRESH + lab.ran)
    return conclude(
        {"below the best single decay": over_one, "below the smallest": over_none},
        minus_single=gap,
        minus_none=other,
        mean_test_loss={
            "a decay a weight": sum(tuned(method, s)[0] for s in seeds) / len(seeds),
            "single": sum(one_decay(s)[1] for s in seeds) / len(seeds),
            "none": sum(one_decay(s)[2] for s in seeds) / len(seeds),
            "single, trained on both sets": sum(one_decay(s)[3] for s in seeds) / len(seeds),
        },
        log_of_single=[one_decay(s)[0] for s in seeds],
        residual=[tuned(method, s)[1] for s in seeds],
    )

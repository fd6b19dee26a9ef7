"""Shampoo squared (arXiv 2406.17748): one step of power iteration, how near the best Kronecker product, at what tricks?"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pondera.lab.tasks import digits
from pondera.linalg import matrix_power
from pondera.optim.shampoo_squared import KroneckerFit, kronecker_fit
from pondera.replications import Finding, Lab, Sham, claim, conclude, met

Pair = tuple[Tensor, Tensor]
FRESH = 1000  # seed, apart from those looked at before
N, STEPS, BATCH = 600, 300, 64  # gradients of single examples; Adam's steps of the trained nets; examples a step
NETS = ("MLP", "CNN")


def squared(fit: KroneckerFit) -> Pair:
    """L (x) R / tr(L)."""
    return fit.L / fit.L.trace(), fit.R


def classical(fit: KroneckerFit) -> Pair:
    """L^1/2 (x) R^1/2, what the optimizer was said to approximate by."""
    return matrix_power(fit.L, 0.5), matrix_power(fit.R, 0.5)


def build(kind: str, seed: int) -> tuple[nn.Module, str]:
    """A net and the name of the weight looked at: 12 x 16 of an MLP, 8 x 36 of a convolution."""
    torch.manual_seed(seed)
    if kind == "MLP":
        return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10)), "0.weight"
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    ), "3.weight"


@cache
def data(kind: str) -> Pair:
    (x, y), _ = digits.data()
    x = x.view(-1, 8, 8)
    return (F.avg_pool2d(x, 2).flatten(1) if kind == "MLP" else x), y


@cache
def net(kind: str, seed: int, trained: bool) -> tuple[nn.Module, str, Tensor]:
    """The net at its start or after training, and there the gradients of the batches it was trained on."""
    model, name = build(kind, seed)
    x, y = data(kind)
    over_time = []
    if trained:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(STEPS):
            i = torch.randint(len(x), (BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            over_time.append(model.get_parameter(name).grad.detach().flatten(1).clone())  # type: ignore[union-attr]
            optimizer.step()
    return model, name, torch.stack(over_time) if over_time else torch.empty(0)


@cache
def gradients(kind: str, seed: int, trained: bool, real: bool, batch: int = 1) -> Tensor:
    """N gradients in float64, each of `batch` examples; labels are the real ones or drawn from the model's own prediction."""
    model, name, _ = net(kind, seed, trained)
    x, y = data(kind)
    g = torch.Generator().manual_seed(seed)
    i = torch.randperm(len(x), generator=g)[:N] if batch == 1 else torch.randint(len(x), (N * batch,), generator=g)
    with torch.no_grad():
        drawn = torch.multinomial(model(x[i]).softmax(1), 1, generator=g)[:, 0]
    labels = (y[i] if real else drawn).view(-1, batch)
    rest = {k: p.detach() for k, p in model.named_parameters()}

    def loss(weight: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, {**rest, name: weight}, (inputs,))
        return F.cross_entropy(out, targets)

    one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    parts = zip(x[i].view(-1, batch, *x.shape[1:]).split(100), labels.split(100), strict=True)
    return (
        torch.cat([one(rest[name], a, b) for a, b in parts])
        .flatten(2 if kind == "CNN" else 1)
        .view(N, -1, rest[name][0].numel())
        .double()
    )


@cache
def fitted(kind: str, seed: int, view: str) -> tuple[KroneckerFit, Tensor]:
    """The fit and its gradients, by the view: Hessian at the start, Hessian after training, Adagrad."""
    if view == "Adagrad":
        G = net(kind, seed, True)[2].double()
    else:
        G = gradients(kind, seed, trained=view == "Hessian, trained", real=False)
    return kronecker_fit(G), G


def cosine(pair: Pair, G: Tensor) -> float:
    """Of A (x) B with H = E[vec(G) vec(G)^T]."""
    A, B = pair
    flat = G.flatten(1)
    size = (flat.mT @ flat).norm() / len(G) if len(G) > flat.shape[1] else (flat @ flat.mT).norm() / len(G)
    inner = (A * torch.tensordot(G @ B, G, dims=([0, 2], [0, 2]))).sum() / len(G)
    return float(inner / (size * A.norm() * B.norm()))


@claim(
    "Shampoo's squared approximation is one step of power iteration toward the best Kronecker product",
    source="abstract; Sec. 2 (Prop. 1)",
    criterion="digits, gradients of 600 single examples of a 12 x 16 layer, 5 seeds, float64: the pair, each side scaled to norm 1, "
    "equals one step from the identity with the rearranged matrix of H written out (relative distance below 1e-10), and iterated on "
    "it reaches the cosine of that matrix's first singular pair within 1e-6",
    method=squared,
    sham=Sham("the pair of square roots, which the optimizer was taken to use", classical),
)
def is_one_power_step(lab: Lab, pair: Callable[[KroneckerFit], Pair]) -> Finding:
    apart, gap, from_pair = [], [], []
    for seed in lab.seeds:
        fit, G = fitted("MLP", seed, "Hessian, start")
        n, rows, columns = G.shape
        flat = G.flatten(1)
        H = (flat.mT @ flat / n).view(rows, columns, rows, columns).permute(0, 2, 1, 3).reshape(rows**2, columns**2)
        step = (H @ torch.eye(columns).double().flatten(), H.T @ torch.eye(rows).double().flatten())
        apart.append(
            max(float((p.flatten() / p.norm() - s / s.norm()).norm()) for p, s in zip(pair(fit), step, strict=True))
        )
        s = torch.linalg.svdvals(H)
        gap.append(float(s[0] / s.norm()) - fit.cosine["optimum"])
        from_pair.append(float(s[0] / s.norm()) - cosine(pair(fit), G))
    return conclude(
        {
            "one step from the identity": met(max(apart) < 1e-10),
            "the iteration finds the best": met(max(map(abs, gap)) < 1e-6),
        },
        largest_distance=max(apart),
        cosine_of_the_best_minus_iterated=gap,
        cosine_of_the_best_minus_the_pair=from_pair,
    )


@claim(
    "It is close to the best Kronecker product, closer than what Shampoo was taken to use",
    source="abstract; Sec. 3 (Fig. 1)",
    criterion="cosine with H at least 0.98 of the best product's, and above that of L^1/2 (x) R^1/2, in every one of 5 seeds: "
    "a 12 x 16 layer of an MLP and an 8 x 36 convolution on digits, in the Hessian's view (600 single examples, labels drawn from "
    "the model) at the start and after 300 steps of Adam, and in Adagrad's (the gradients of those 300 batches of 64)",
    method=squared,
    sham=Sham("the pair of square roots, which the optimizer was taken to use", classical),
)
def near_the_optimum(lab: Lab, pair: Callable[[KroneckerFit], Pair]) -> Finding:
    parts, table = {}, {}
    for view in ("Hessian, start", "Hessian, trained", "Adagrad"):
        for kind in NETS:
            fits = [fitted(kind, FRESH + seed, view) for seed in lab.seeds]
            ours = [cosine(pair(fit), G) for fit, G in fits]
            best, roots = ([fit.cosine[name] for fit, _ in fits] for name in ("optimum", "shampoo"))
            near = all(a >= 0.98 * b for a, b in zip(ours, best, strict=True))
            closer = all(a > r for a, r in zip(ours, roots, strict=True))
            parts[f"near, {view}, {kind}"] = met(near)
            parts[f"closer than square roots, {view}, {kind}"] = met(closer)
            table[f"{view}, {kind}"] = {"best": best, "this": ours, "square roots": roots}
            table[f"{view}, {kind}"] |= {"error of the best": [fit.error["optimum"] for fit, _ in fits]}
            table[f"{view}, {kind}"] |= {"error of L (x) R / tr": [fit.error["shampoo_squared"] for fit, _ in fits]}
            table[f"{view}, {kind}"] |= {"error of square roots": [fit.error["shampoo"] for fit, _ in fits]}

    def shares(of: str, kind: str) -> tuple[float, float]:
        rows = [row for name, row in table.items() if name.endswith(kind)]
        seen = [a / b for row in rows for a, b in zip(row[of], row["best"], strict=True)]
        return min(seen), max(seen)

    this, roots = ({kind: shares(of, kind) for kind in NETS} for of in ("this", "square roots"))  # type: ignore[assignment]
    note = ""
    if this["CNN"][0] < 0.98 <= this["MLP"][0]:
        note = (
            f"the layer of the MLP keeps {this['MLP'][0]:.3f} or more of the best product's cosine, the convolution, whose H is "
            f"further from any Kronecker product, {this['CNN'][0]:.3f} to {this['CNN'][1]:.3f}; wider convolutions (to 16 x 144) came "
            "to the same on other seeds"
        )
    return conclude(parts, note=note, share_of_the_best=this, share_of_square_roots=roots, cosines=table)


def drawn_labels(kind: str, seed: int, trained: bool) -> Tensor:
    return gradients(kind, seed, trained, False, BATCH)


def real_labels(kind: str, seed: int, trained: bool) -> Tensor:
    return gradients(kind, seed, trained, True, BATCH)


@claim(
    "Gradients of batches keep the approximation of the Hessian if labels are drawn from the model, and not with the real ones",
    source="abstract; Sec. 4",
    criterion="L and R from 600 gradients of batches of 64 in the place of single examples, labels drawn from the model: "
    "cosine of L (x) R with the H of single examples (600, drawn labels) at least 0.95 of the best product's, in 5 seeds, both "
    "nets, at the start and after 300 steps of Adam; single examples with real labels (the empirical Fisher) beside it",
    method=drawn_labels,
    sham=Sham("batches with the real labels", real_labels),
)
def batches_keep_it(lab: Lab, made: Callable[[str, int, bool], Tensor]) -> Finding:
    parts, table = {}, {}
    for trained in (False, True):
        view = "Hessian, trained" if trained else "Hessian, start"
        for kind in NETS:
            seeds = [FRESH + seed for seed in lab.seeds]
            fits = [fitted(kind, seed, view) for seed in seeds]
            best = [fit.cosine["optimum"] for fit, _ in fits]

            def shares(G: list[Tensor]) -> list[float]:
                sides = [(g @ g.mT, g.mT @ g) for g in G]
                pairs = [(a.mean(0), b.mean(0)) for a, b in sides]
                return [cosine(p, h) / b for p, (_, h), b in zip(pairs, fits, best, strict=True)]  # noqa: B023

            batches = shares([made(kind, seed, trained) for seed in seeds])
            table[f"{view}, {kind}"] = {"batches": batches}
            table[f"{view}, {kind}"] |= {"single, real": shares([gradients(kind, s, trained, True) for s in seeds])}
            parts[f"{view}, {kind}"] = met(min(batches) >= 0.95)
    return conclude(parts, share_of_the_best=table)

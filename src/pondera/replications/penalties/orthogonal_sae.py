"""OrtSAE (arXiv 2509.22033): are features less alike and general ones less absorbed, at what loss of reconstruction and what cost?

Absorption needs known features: synthetic activations with a hierarchy, where a child is active only with its parent. Real
ones are the token states of a pre-trained sentence encoder.
"""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pondera.penalties import SparseAutoencoder, orthogonal_decoder
from pondera.replications import Finding, Lab, Sham, claim, conclude, met, weigh

Penalty = Callable[..., Tensor]


def no_penalty(decoder: Tensor, *, chunk: int = 8192, **drawn: Any) -> Tensor:
    """No pull at all."""
    return 0.0 * decoder.sum()


def all_pairs(decoder: Tensor, *, chunk: int = 8192, **drawn: Any) -> Tensor:
    """Every feature compared with every other."""
    return orthogonal_decoder(decoder, chunk=len(decoder))


@claim(
    "The cost grows in proportion to the number of features",
    source="abstract: scaling linearly with the SAE size",
    criterion="multiply-adds of the penalty and its gradient at 1,024, 2,048, 4,096 features of 64 numbers, chunks of 256: each "
    "doubling costs between 1.99 and 2.01 times as much",
    method=orthogonal_decoder,
    sham=Sham("all pairs compared", all_pairs),
)
def cost_grows_in_proportion(lab: Lab, penalty: Penalty) -> Finding:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for n in (1024, 2048, 4096):
        decoder = torch.randn(n, 64, generator=lab.generator(0)).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            penalty(decoder, chunk=256, generator=lab.generator(1)).backward()
        counts.append(counter.get_total_flops())
    growth = [b / a for a, b in pairwise(counts)]
    return conclude(
        {"in proportion": met(all(1.99 < g < 2.01 for g in growth))}, operations_in_products=counts, growth=growth
    )


# -- a hierarchy whose features are known -------------------------------------------------------------------------------

D, PARENTS, CHILDREN, FREE, N, K = 24, 8, 2, 8, 64, 3
TRUE = PARENTS * (1 + CHILDREN) + FREE
STEPS, BATCH, ROWS = 1000, 256, 20_000
GAMMAS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


def world(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of the true features, which are active (rows, features), and the activations.

    Parents and free features are active in an eighth of the rows, a child in half of those of its parent; sizes are uniform on 0.5 to
    1.5.
    """
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(TRUE, D, generator=g), dim=1)
    single = torch.rand(ROWS, PARENTS + FREE, generator=g) < 0.125
    child = (torch.rand(ROWS, PARENTS, CHILDREN, generator=g) < 0.5) & single[:, :PARENTS, None]
    active = torch.cat([single[:, :PARENTS], child.flatten(1), single[:, PARENTS:]], 1)
    sizes = 0.5 + torch.rand(ROWS, TRUE, generator=g)
    return directions, active, (active * sizes) @ directions


def trained(penalty: Penalty, gammas: tuple[float, ...], chunk: int, seeds: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Autoencoders for each seed and factor side by side: encoders, encoder biases, decoders, biases."""
    x = torch.stack([world(seed)[2] for seed in seeds])
    runs = len(seeds) * len(gammas)
    starts = [SparseAutoencoder(D, N, K, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    p = [
        torch.stack([getattr(s, name).detach() for s in starts]).repeat_interleave(len(gammas), 0).requires_grad_()
        for name in ("encoder", "encoder_bias", "decoder", "bias")
    ]
    adam = torch.optim.Adam(p, lr=3e-3)
    factor = torch.tensor(gammas).repeat(len(seeds)).view(-1, 1, 1)
    g = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(ROWS, (BATCH,), generator=g)
        xb = x[:, rows].repeat_interleave(len(gammas), 0)
        reconstruction, _ = reconstructed(p, xb)
        error = (reconstruction - xb).square().sum(2).mean(1)
        # all nets in one call, their features in chunks of their own; the factor scales the gradient, not the value
        flat = (p[2] * factor + (p[2] * (1 - factor)).detach()).flatten(0, 1)
        order = (torch.arange(runs)[:, None] * N + torch.randperm(N, generator=g)).flatten()
        pull = runs * penalty(flat, chunk=chunk, order=order)
        adam.zero_grad()
        (error.sum() + pull).backward()
        adam.step()
        with torch.no_grad():
            p[2].copy_(F.normalize(p[2], dim=2))
    return tuple(t.detach() for t in p)


def reconstructed(p: list[Tensor] | tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
    """BatchTopK for each net: its K activations a row that are largest over the batch."""
    encoder, encoder_bias, decoder, bias = p
    f = torch.baddbmm(encoder_bias[:, None], x - bias[:, None], encoder.mT).relu()
    kept = f.flatten(1).topk(K * x.shape[1], dim=1)
    code = torch.zeros_like(f).flatten(1).scatter(1, kept.indices, kept.values).view_as(f)
    return torch.baddbmm(bias[:, None], code, decoder), code


def nearest(decoder: Tensor, alive: Tensor) -> Tensor:
    """Largest cosine of each living feature with another living one."""
    d = F.normalize(decoder[alive], dim=1)
    return (d @ d.T).fill_diagonal_(-1).amax(1)


def absorbed(code: Tensor, active: Tensor) -> float:
    """Share of the rows with a child in which the feature that tells its parent best is off, mean over children."""
    on = (code > 0).float()
    parents, children = (
        active[:, :PARENTS].float(),
        active[:, PARENTS : PARENTS * (1 + CHILDREN)].view(-1, PARENTS, CHILDREN),
    )
    told = torch.corrcoef(torch.cat([on, parents], 1).T)[:N, N:].nan_to_num(-1).argmax(0)
    missed = 1 - on[:, told]
    each = (missed[..., None] * children).sum(0) / children.sum(0)
    return float(each.mean())


@cache
def examined(
    penalty: Penalty, chunk: int, seeds: tuple[int, ...], gammas: tuple[float, ...] = GAMMAS
) -> list[dict[float, dict[str, float]]]:
    """For each seed and factor: explained variance, absorption, likeness, on the last 5,000 rows."""
    p = trained(penalty, gammas, chunk, seeds)
    found = []
    for i, seed in enumerate(seeds):
        directions, active, x = world(seed)
        row = {}
        for j, gamma in enumerate(gammas):
            one = [t[i * len(gammas) + j][None] for t in p]
            reconstruction, code = reconstructed(one, x[None, -5000:])
            code, alive = code[0], (code[0] > 0).any(0)
            cosines = nearest(one[2][0], alive)
            wrong = (reconstruction[0] - x[-5000:]).square().sum() / (x[-5000:] - x.mean(0)).square().sum()
            best = (directions @ F.normalize(one[2][0][alive], dim=1).T).amax(1)
            row[gamma] = {
                "explained": 1 - float(wrong),
                "absorption": absorbed(code, active[-5000:]),
                "likeness": float(cosines.mean()),
                "near copies": float((cosines > 0.9).double().mean()),
                "recovered": float((best > 0.9).double().mean()),
                "alive": float(alive.double().mean()),
            }
        found.append(row)
    return found


def within(row: dict[float, dict[str, float]], loss: float) -> float:
    """The largest factor at which explained variance falls by at most `loss`; no label is looked at."""
    return max(gamma for gamma in row if row[gamma]["explained"] >= row[0.0]["explained"] - loss)


SYNTHETIC = (
    "24 numbers made of 32 sparse features, 16 of them children active only with one of 8 parents; BatchTopK autoencoder of 64 "
    "features, 3 active (the true number), 1,000 Adam steps of 256; 8 seeds; the penalty in four chunks at every step, its factor the "
    "largest of 0.5, 1, 2, 4, 8 at which explained variance stays within 0.01 of that without"
)


@claim(
    "General features are absorbed less by special ones, at equal reconstruction",
    source="abstract: absorption reduced by 65% (there language models' activations)",
    criterion=SYNTHETIC
    + ": logarithm of the share of child rows in which the parent's feature is off, over that without, has its 95% "
    "interval below log 0.7; mean largest cosine between features below 0.7 of that without in each seed; explained variance "
    "minus that without above -0.01 (interval)",
    method=orthogonal_decoder,
    sham=Sham("no penalty", no_penalty),
)
def absorption_falls(lab: Lab, penalty: Penalty) -> Finding:
    seeds = tuple(lab.draws(max(lab.n_seeds, 8)))
    rows = examined(penalty, N // 4, seeds)
    taken = [within(row, 0.01) for row in rows]
    ours, base = [row[gamma] for row, gamma in zip(rows, taken)], [row[0.0] for row in rows]
    gap = lab.effect([log(a["absorption"] / b["absorption"]) for a, b in zip(ours, base)])
    explained = lab.effect([a["explained"] for a in ours], [b["explained"] for b in base])
    likeness = [a["likeness"] / b["likeness"] for a, b in zip(ours, base)]
    return conclude(
        {
            "absorption cut by 30% or more": weigh(gap, below=log(0.7)),
            "features less alike": met(max(likeness) < 0.7),
            "reconstruction kept": weigh(explained, above=-0.01),
        },
        log_absorption_over_without=gap,
        explained_minus_without=explained,
        likeness_over_without=likeness,
        recovered_minus_without=lab.effect([a["recovered"] for a in ours], [b["recovered"] for b in base]),
        mean={
            name: {k: sum(r[k] for r in of) / len(of) for k in of[0]}
            for name, of in (("with", ours), ("without", base))
        },
        factors=taken,
        mean_by_factor={g: {k: sum(r[g][k] for r in rows) / len(rows) for k in rows[0][g]} for g in GAMMAS},
    )


# -- token states of a sentence encoder --------------------------------------------------------------------------------

REAL_N, REAL_K, REAL_STEPS, REAL_BATCH = 512, 16, 200, 256


@cache
def states() -> Tensor:
    """States after two layers of all-MiniLM-L6-v2, a row a token of 1,200 sentences of docstrings, scaled to mean square 1."""
    from pondera.lab.tasks.minilm import build, data

    encoder = build().encoder.eval()
    del encoder.encoder.layer[2:]
    ids = data()[0][0][:1200]
    with torch.no_grad():
        h = torch.cat([encoder(input_ids=i, attention_mask=(i != 0).long()).last_hidden_state for i in ids.split(100)])
    h = h[ids != 0]
    h = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(0))]
    h = h - h.mean(0)
    return h / h.square().mean().sqrt()


@cache
def of_real(penalty: Penalty, seed: int) -> dict[str, float]:
    x = states()
    train, test = x[:-3000], x[-3000:]
    g, draw = (torch.Generator().manual_seed(s) for s in (seed, 100 + seed))
    sae = SparseAutoencoder(x.shape[1], REAL_N, REAL_K, generator=g)
    adam = torch.optim.Adam(sae.parameters(), lr=2e-3, fused=True)
    for _ in range(REAL_STEPS):
        xb = train[torch.randint(len(train), (REAL_BATCH,), generator=g)]
        loss = (sae(xb)[0] - xb).square().mean() + 0.25 * penalty(sae.decoder, chunk=REAL_N // 4, generator=draw)
        adam.zero_grad()
        loss.backward()
        adam.step()
        sae.normalize_()
    with torch.no_grad():
        reconstruction, code = sae.eval()(test)
    cosines = nearest(sae.decoder.detach(), (code > 0).any(0))
    return {
        "explained": 1 - float((reconstruction - test).square().sum() / test.square().sum()),
        "active": float((code > 0).sum(1).double().mean()),
        "likeness": float(cosines.mean()),
        "near copies": float((cosines > 0.9).double().mean()),
        "above a half": float((cosines > 0.5).double().mean()),
        "alive": float((code > 0).any(0).double().mean()),
    }


@claim(
    "On a language model's states features are less alike at equal reconstruction",
    source="abstract: more distinct features, on-par performance (there Gemma-2-2B, 65,536 features)",
    criterion="token states of two layers of all-MiniLM-L6-v2 (384 numbers), 512 features, 16 active, 200 Adam steps of 256, factor "
    "0.25 on chunks of 128, 8 seeds: mean largest cosine between features below 0.8 of that without in each seed; explained variance "
    "minus that without above -0.01 (interval); and the share of features with a cosine above 0.5 minus that without below 0 "
    "(interval)",
    budget="full",
    method=orthogonal_decoder,
    sham=Sham("no penalty", no_penalty),
)
def states_of_a_language_model(lab: Lab, penalty: Penalty) -> Finding:
    seeds = lab.draws(max(lab.n_seeds, 8))
    ours, base = ([of_real(of, seed) for seed in seeds] for of in (penalty, no_penalty))
    likeness = [a["likeness"] / b["likeness"] for a, b in zip(ours, base)]
    explained, alike = (lab.effect([a[k] for a in ours], [b[k] for b in base]) for k in ("explained", "above a half"))
    most = max(r["near copies"] for r in (*ours, *base))
    return conclude(
        {
            "features less alike": met(max(likeness) < 0.8),
            "reconstruction kept": weigh(explained, above=-0.01),
            "fewer like pairs": weigh(alike, below=0),
        },
        likeness_over_without=likeness,
        explained_minus_without=explained,
        above_a_half_minus_without=alike,
        mean={
            name: {k: sum(r[k] for r in of) / len(of) for k in of[0]}
            for name, of in (("with", ours), ("without", base))
        },
        note="" if most else "no two features came nearer than a cosine of 0.9, with the penalty or without",
    )

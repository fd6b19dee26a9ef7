"""BANG (arXiv 2309.17230): do averaged models profit from many unlike shortcuts, and is a too sure model what spoils them?

Multi-coloured digits, after the paper's (details recalled): 14x14 MNIST with 32 patches, each of one of ten colours. In
training every patch shows its own colour for the label; out of distribution a share of the patches shows any colour.
"""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.merge.bang import balancing_scale, bang, bang_loss, wise_ft
from pondera.replications import Effect, Finding, Lab, Part, Sham, claim, conclude, weigh
from pondera.replications.merge._small import SIDE, Data, accuracy, digits

PATCHES, COLOURS, WIDTH, BATCH = 32, 10, 64, 32
WRONG = (0.7, 0.8, 0.9)  # shares of patches of any colour, out of distribution
HEAD = "2"
FIRST_STEPS, STEPS, RATES = 300, 200, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
Loss = Callable[..., Tensor]
Average = Callable[..., dict[str, Tensor]]


def sharp(model: nn.Module, x: Tensor, y: Tensor, generator: Generator) -> Tensor:
    """Plain cross-entropy."""
    return bang_loss(model, x, y, smoothing=0.0, mixup=0.0, generator=generator)


def coloured(data: Data, wrong: Tensor, generator: Generator) -> Data:
    """The digits with a patch for each entry of `wrong`, the chance that it shows any colour and not the label's own.

    A patch enters as ten numbers, one of them not zero, sized so that all patches together weigh as much as 32 ones do.
    """
    x, y = data
    n = len(wrong)
    own = torch.rand(n, COLOURS, generator=torch.Generator().manual_seed(0)).argsort(1)  # patch and label to colour
    any_colour = torch.randint(COLOURS, (len(y), n), generator=generator)
    off = torch.rand(len(y), n, generator=generator) < wrong
    shown = torch.where(off, any_colour, own[:, y].T)
    patches = F.one_hot(shown, COLOURS).float() * (PATCHES / n) ** 0.5
    return torch.cat([x.flatten(1), patches.flatten(1)], 1), y


def net(patches: int = PATCHES) -> nn.Sequential:
    return nn.Sequential(nn.Linear(SIDE**2 + COLOURS * patches, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def train(model: nn.Module, data: Data, rate: float, steps: int, seed: int, loss: Loss = sharp) -> nn.Module:
    (x, y), g = data, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for _ in range(steps):
        i = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        loss(model, x[i], y[i], generator=g).backward()
        optimizer.step()
    return model


def parts(seed: int) -> tuple[Data, Data, Data]:
    """Images to train on first (1,500), to fine-tune on (500), and to test on."""
    x, y = digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    first, second, test = order[:1500], order[1500:2000], order[2000:]
    return (x[first], y[first]), (x[second], y[second]), (x[test], y[test])


def everywhere(wrong: float, patches: int = PATCHES) -> Tensor:
    return torch.full((patches,), wrong)


def outside(test: Data, seed: int, patches: int = PATCHES) -> list[Data]:
    """The test images out of distribution, one set for each share of wrong patches."""
    return [coloured(test, everywhere(w, patches), torch.Generator().manual_seed(9 + seed)) for w in WRONG]


def mean_accuracy(model: nn.Module, sets: list[Data]) -> float:
    return sum(accuracy(model, data) for data in sets) / len(sets)


# -- two models of one kind -------------------------------------------------------------------------------------------


@cache
def twins(seed: int, patches: int) -> tuple[nn.Module, nn.Module]:
    """Two nets that differ in their start and the order of the data."""
    data = coloured(parts(seed)[0], everywhere(0.0, patches), torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    one, other = (train(net(patches), data, 1e-3, FIRST_STEPS, 10 * seed + k) for k in (1, 2))
    return one, other


Together = Callable[[Tensor, Tensor], Tensor]


def mean_of_logits(a: Tensor, b: Tensor) -> Tensor:
    return (a + b) / 2


def the_first(a: Tensor, b: Tensor) -> Tensor:
    return a


def too_sure(logits: Tensor) -> Tensor:
    """As of a net whose head is multiplied by 5."""
    return 5 * logits


def as_it_is(logits: Tensor) -> Tensor:
    return logits


@claim(
    "Two networks that differ in their start alone do better together out of distribution where there are many shortcuts",
    source="experiment on MultiColorMNIST and SingleColorMNIST (recalled)",
    criterion="MLP of width 64, 1,500 images, colours all right in training, mean over 70, 80 and 90% wrong patches, 5 seeds: "
    "accuracy of the averaged logits minus the better of the two has its 95% interval above 0 with 32 patches, and the gain "
    "over the mean of the two is larger with 32 patches than with 1 (interval of the difference above 0)",
    method=mean_of_logits,
    sham=Sham("the first of the two alone", the_first),
)
def many_shortcuts_help_ensembles(lab: Lab, together: Together) -> Finding:
    rows: dict[int, dict[str, list[float]]] = {}
    for patches in (1, PATCHES):
        row = rows.setdefault(patches, {"one": [], "other": [], "both": [], "right where both are wrong": []})
        for seed in lab.seeds:
            test = parts(seed)[2]
            sets = outside(test, seed, patches)
            pair = twins(seed, patches)
            right = dict.fromkeys(row, 0.0)
            for x, y in sets:
                with torch.no_grad():
                    a, b = (model(x) for model in pair)
                hit = [(logits.argmax(1) == y) for logits in (a, b, together(a, b))]
                for key, h in zip(row, (*hit, hit[2] & ~hit[0] & ~hit[1])):
                    right[key] += float(h.double().mean()) / len(sets)
            for key, share in right.items():
                row[key].append(share)
    many, single = rows[PATCHES], rows[1]
    better = [max(pair) for pair in zip(many["one"], many["other"])]
    gain = {n: [b - (o + p) / 2 for o, p, b in zip(r["one"], r["other"], r["both"])] for n, r in rows.items()}
    over, more = lab.effect(many["both"], better), lab.effect(gain[PATCHES], gain[1])
    return conclude(
        {"both ahead of the better": weigh(over, above=0), "more so with 32 patches": weigh(more, above=0)},
        both_minus_better=over,
        gain_with_32_minus_with_1=more,
        gain=gain,
        with_32=many,
        with_1=single,
    )


@claim(
    "What an ensemble gains is lost when one of its models is too sure",
    source="section on BANG: analysis of two models of which one is scaled up (recalled)",
    criterion="the two nets with 32 patches as before: accuracy out of distribution of the averaged logits minus that with the "
    "second net's logits multiplied by 5 has its 95% interval above 0 (added when the other claims had run, before its own run)",
    method=too_sure,
    sham=Sham("logits as they are", as_it_is),
)
def too_sure_spoils_ensembles(lab: Lab, changed: Callable[[Tensor], Tensor]) -> Finding:
    found: dict[str, list[float]] = {}
    for seed in lab.seeds:
        sets = outside(parts(seed)[2], seed)
        one, other = twins(seed, PATCHES)
        with torch.no_grad():
            for name, change in (("even", as_it_is), ("the second changed", changed)):
                hits = [((one(x) + change(other(x))).argmax(1) == y).double().mean() for x, y in sets]
                found.setdefault(name, []).append(float(sum(hits)) / len(sets))
            found.setdefault("the second alone", []).append(mean_accuracy(other, sets))
    gap = lab.effect(found["even"], found["the second changed"])
    return conclude(weigh(gap, above=0), even_minus_changed=gap, accuracy=found)


# -- pretrained and fine-tuned ----------------------------------------------------------------------------------------


@cache
def start(seed: int) -> nn.Module:
    """A pretrained net: half of the patches tell it something, and those are wrong half the time."""
    first, _, _ = parts(seed)
    wrong = torch.cat([everywhere(0.5, PATCHES // 2), everywhere(1.0, PATCHES // 2)])
    torch.manual_seed(seed)
    return train(net(), coloured(first, wrong, torch.Generator().manual_seed(seed)), 1e-3, FIRST_STEPS, seed)


@cache
def fine_tuned(seed: int, rate: float, loss: Loss) -> nn.Module:
    """Fine-tuned where all patches are right."""
    data = coloured(parts(seed)[1], everywhere(0.0), torch.Generator().manual_seed(100 + seed))
    return train(copy.deepcopy(start(seed)), data, rate, STEPS, 100 + seed, loss)


def as_net(state: dict[str, Tensor]) -> nn.Module:
    model = net()
    model.load_state_dict(state)
    return model


def the_fine_tuned(pretrained: nn.Module, finetuned: nn.Module) -> dict[str, Tensor]:
    """No average at all."""
    return finetuned.state_dict()


def head_as_it_is(pretrained: nn.Module, finetuned: nn.Module, *, head: str, scale: float) -> dict[str, Tensor]:
    return wise_ft(pretrained, finetuned)


@cache
def halves(seed: int) -> tuple[Data, Data]:
    """The images to tune on (500) and the others to test on."""
    x, y = parts(seed)[2]
    return (x[:500], y[:500]), (x[500:], y[500:])


@cache
def fine_tuning(seed: int, loss: Loss, average: Average) -> tuple[float, nn.Module, nn.Module]:
    """The rate at which the average is best out of distribution on the images to tune on, what was fine-tuned at it, and
    the average."""
    sets = outside(halves(seed)[0], 500 + seed)

    def made(rate: float) -> tuple[nn.Module, nn.Module]:
        tuned = fine_tuned(seed, rate, loss)
        return tuned, as_net(average(start(seed), tuned))

    rate = max(RATES, key=lambda r: mean_accuracy(made(r)[1], sets))
    return rate, *made(rate)


SETTING = (
    "MLP of width 64; pretrained where 16 of 32 patches are right half the time, fine-tuned on 500 images where all are right; "
    "half-way average; in each seed the rate of fine-tuning is tuned for each kind of model, from 1e-4 to 3e-2 in six steps, on 500 "
    "held-out images out of distribution, with the shifts of the test; accuracy out of distribution (mean over 70, 80 and 90% wrong "
    "patches); 5 seeds, others added until decided, at most 30: "
)
KINDS: dict[str, tuple[Loss, Average]] = {
    "fine-tuned": (sharp, the_fine_tuned),
    "WiSE-FT": (sharp, wise_ft),
    "calm fine-tuned": (bang_loss, the_fine_tuned),
    "BANG": (bang_loss, wise_ft),
}


@cache
def row(seed: int, loss: Loss, average: Average) -> dict[str, float]:
    """Accuracy in distribution, out of it, and where every patch has any colour, so that the digit alone tells."""
    return {"rate": fine_tuning(seed, loss, average)[0]} | looked_at(fine_tuning(seed, loss, average)[2], seed)


@cache
def looked_at(model: nn.Module, seed: int) -> dict[str, float]:
    test = halves(seed)[1]
    inside, alone = (coloured(test, everywhere(w), torch.Generator().manual_seed(7 + seed)) for w in (0.0, 1.0))
    return {
        "in": accuracy(model, inside),
        "out": mean_accuracy(model, outside(test, seed)),
        "digit alone": accuracy(model, alone),
    }


def ahead(lab: Lab, minus: dict[str, Callable[[int], float]]) -> tuple[dict[str, Part], dict[str, Effect]]:
    """Differences by name, each with seeds added until it is decided."""
    found = {name: lab.until_decided(unit, above=0) for name, unit in minus.items()}
    return {name: part for name, (part, _, _) in found.items()}, {name: e for name, (_, e, _) in found.items()}


def out(seed: int, loss: Loss, average: Average) -> float:
    return row(seed, loss, average)["out"]


def before(seed: int) -> float:
    return looked_at(start(seed), seed)["out"]


def figures(lab: Lab, kinds: dict[str, tuple[Loss, Average]]) -> dict[str, Any]:
    """Mean of each figure over the seeds that ran, and how often each rate was taken."""
    seeds = range(lab.ran)
    rows = {"pretrained": [looked_at(start(s), s) for s in seeds]}
    rows |= {name: [row(s, *kind) for s in seeds] for name, kind in kinds.items()}
    sides = ("in", "out", "digit alone")
    return {
        "mean_accuracy": {n: {side: sum(r[side] for r in rs) / len(rs) for side in sides} for n, rs in rows.items()},
        "rates": {n: {f"{q:g}": [r["rate"] for r in rows[n]].count(q) for q in RATES} for n in kinds},
    }


@claim(
    "The average of a pretrained and a fine-tuned model (WiSE-FT) does better out of distribution than both",
    source="abstract; Sec. 2",
    criterion=SETTING + "WiSE-FT minus the pretrained and minus the fine-tuned model: both intervals above 0",
    budget="full",
    method=wise_ft,
    sham=Sham("the fine-tuned model as it is", the_fine_tuned),
)
def wise_ft_beats_both_ends(lab: Lab, average: Average) -> Finding:
    minus = {
        "ahead of the pretrained": lambda seed: out(seed, sharp, average) - before(seed),
        "ahead of the fine-tuned": lambda seed: out(seed, sharp, average) - out(seed, sharp, the_fine_tuned),
    }
    parts, gaps = ahead(lab, minus)
    return conclude(
        parts,
        differences=gaps,
        **figures(lab, {"fine-tuned": KINDS["fine-tuned"], "average": (sharp, average)}),
    )


@claim(
    "BANG does better out of distribution than WiSE-FT and than both ends",
    source="abstract; experiments (there CLIP on ImageNet and five shifts, Mixup and label smoothing)",
    criterion=SETTING
    + "BANG (fine-tuned with bang_loss as it comes) minus WiSE-FT, minus the pretrained and minus the calm fine-tuned model: the "
    "three intervals above 0",
    budget="full",
    method=bang_loss,
    sham=Sham("fine-tuned with plain cross-entropy", sharp),
)
def bang_beats_wise_ft(lab: Lab, loss: Loss) -> Finding:
    minus = {
        "ahead of WiSE-FT": lambda seed: out(seed, loss, wise_ft) - out(seed, sharp, wise_ft),
        "ahead of the pretrained": lambda seed: out(seed, loss, wise_ft) - before(seed),
        "ahead of the calm fine-tuned": lambda seed: out(seed, loss, wise_ft) - out(seed, loss, the_fine_tuned),
    }
    parts, gaps = ahead(lab, minus)
    kinds = KINDS | {"calm fine-tuned": (loss, the_fine_tuned), "BANG": (loss, wise_ft)}
    said = figures(lab, kinds)
    alone = {name: of["digit alone"] for name, of in said["mean_accuracy"].items()}
    note = ""
    if parts["ahead of WiSE-FT"].outcome == "refuted" and alone["calm fine-tuned"] < alone["fine-tuned"]:
        note = (
            "a net fine-tuned with Mixup and label smoothing reads the digit worse: with all patches of any colour it is right on "
            f"{alone['calm fine-tuned']:.2f} of the images, after ordinary fine-tuning on {alone['fine-tuned']:.2f}, before on "
            f"{alone['pretrained']:.2f}. Both are known to draw a model to features that vary least within a class (Chidambaram "
            "and Ge 2025), and these are the shortcuts"
        )
    return conclude(parts, differences=gaps, note=note, **said)


@cache
def interventions(seed: int, average: Average) -> dict[str, dict[str, float]]:
    """Accuracy out of distribution with the head as it is and scaled, the factors, and how sure each model is where it is wrong."""
    held, test = halves(seed)
    x, _ = coloured(held, everywhere(0.0), torch.Generator().manual_seed(7 + seed))
    sets = outside(test, seed)
    pre = start(seed)
    ft, calm = fine_tuning(seed, sharp, wise_ft)[1], fine_tuning(seed, bang_loss, wise_ft)[1]
    models, sure = {"pretrained": pre, "fine-tuned": ft, "calm fine-tuned": calm}, {}
    with torch.no_grad():
        logits = {name: model(x) for name, model in models.items()}
        for name, model in models.items():
            wrong = [p[p.argmax(1) != y].softmax(1).amax(1) for p, y in ((model(a), b) for a, b in sets)]
            sure[name] = float(torch.cat(wrong).mean())
    down = balancing_scale(logits["pretrained"], logits["fine-tuned"])
    up = balancing_scale(logits["fine-tuned"], logits["calm fine-tuned"])
    states = {
        "WiSE-FT": wise_ft(pre, ft),
        "head calmed": average(pre, ft, head=HEAD, scale=down),
        "BANG": wise_ft(pre, calm),
        "head made sure": average(pre, calm, head=HEAD, scale=up),
    }
    return {
        "accuracy": {name: mean_accuracy(as_net(state), sets) for name, state in states.items()},
        "factor": {"calmed": down, "made sure": up},
        "confidence where wrong": sure,
    }


@claim(
    "What spoils the average is that the fine-tuned model is too sure: calming its head mends it, making BANG's sure undoes it",
    source="section on BANG (there by scaling logits); the two interventions are ours",
    criterion=SETTING
    + "factors from balancing_scale on held-out images in distribution: WiSE-FT with the fine-tuned head scaled to the pretrained "
    "model's confidence minus WiSE-FT, and BANG minus BANG with its head scaled to the ordinary fine-tuned model's confidence: both "
    "intervals above 0",
    budget="full",
    method=bang,
    sham=Sham("the head left as it is", head_as_it_is),
)
def confidence_is_the_cause(lab: Lab, average: Average) -> Finding:
    def minus(a: str, b: str, seed: int) -> float:
        accuracies = interventions(seed, average)["accuracy"]
        return accuracies[a] - accuracies[b]

    parts, gaps = ahead(
        lab,
        {
            "calming mends WiSE-FT": partial(minus, "head calmed", "WiSE-FT"),
            "making sure undoes BANG": partial(minus, "BANG", "head made sure"),
        },
    )
    rows = [interventions(seed, average) for seed in range(lab.ran)]
    means = {what: {n: sum(r[what][n] for r in rows) / len(rows) for n in of} for what, of in rows[0].items()}
    sure = means["confidence where wrong"]
    return conclude(
        parts,
        differences=gaps,
        means=means,
        note=f"where it is wrong the ordinary fine-tuned net is sure by {sure['fine-tuned']:.2f} on average, the pretrained one by "
        f"{sure['pretrained']:.2f}, the calm one by {sure['calm fine-tuned']:.2f}",
    )


@cache
def corrected(seed: int, average: Average) -> dict[str, float]:
    """Shares of images out of distribution on which the average is right and both ends are wrong, and the other way round."""
    _, tuned, merged = fine_tuning(seed, sharp, average)
    shares = {"right where both are wrong": 0.0, "wrong where both are right": 0.0}
    sets = outside(halves(seed)[1], seed)
    for x, y in sets:
        with torch.no_grad():
            a, b, both = (model(x).argmax(1) == y for model in (start(seed), tuned, merged))
        for name, hit in zip(shares, (both & ~a & ~b, ~both & a & b)):
            shares[name] += float(hit.double().mean()) / len(sets)
    return shares


@claim(
    "The average is right in cases in which the pretrained and the fine-tuned model are both wrong",
    source="abstract; that they must be more than those it spoils is ours. Stated when the other claims had run",
    criterion=SETTING
    + "share of images on which WiSE-FT is right and both ends are wrong, minus the share on which it is wrong and both are right, "
    "above 0",
    budget="full",
    method=wise_ft,
    sham=Sham("the fine-tuned model as it is", the_fine_tuned),
)
def corrects_where_both_are_wrong(lab: Lab, average: Average) -> Finding:
    def net_of(seed: int) -> float:
        right, wrong = corrected(seed, average).values()
        return right - wrong

    part, net_share, _ = lab.until_decided(net_of, above=0)
    rows = [corrected(seed, average) for seed in range(lab.ran)]
    return conclude(
        part, net_share=net_share, mean_share={name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    )

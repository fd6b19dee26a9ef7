"""BANG (arXiv 2309.17230): do averaged models profit from many unlike shortcuts, and is a too sure model what spoils them?

Multi-coloured digits, after the paper's (details recalled): 14x14 MNIST with 32 patches, each of one of ten colours. In
training every patch shows its own colour for the label; out of distribution a share of the patches shows any colour.
"""

import copy
from functools import cache

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.merge.bang import balancing_scale, bang, bang_loss, wise_ft
from pondera.replications import Finding, Lab, claim, judge
from pondera.replications.init.weight_selection import accuracy
from pondera.replications.merge.fuse import SIDE, digits

Data = tuple[Tensor, Tensor]
PATCHES, COLOURS, WIDTH, BATCH = 32, 10, 64, 32
WRONG = (0.7, 0.8, 0.9)  # shares of patches of any colour, out of distribution
HEAD = "2"
FIRST_STEPS, STEPS, RATES, TUNING = 300, 200, (3e-4, 1e-3, 3e-3), (1000, 1001)
SHARP: dict[str, float] = {"smoothing": 0.0, "mixup": 0.0}


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


def train(model: nn.Module, data: Data, rate: float, steps: int, seed: int, **kwargs: float) -> nn.Module:
    (x, y), g = data, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    for _ in range(steps):
        i = torch.randint(len(x), (BATCH,), generator=g)
        optimizer.zero_grad()
        bang_loss(model, x[i], y[i], generator=g, **kwargs).backward()
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
    one, other = (train(net(patches), data, 1e-3, FIRST_STEPS, 10 * seed + k, **SHARP) for k in (1, 2))
    return one, other


@claim(
    "Two networks that differ in their start alone do better together out of distribution where there are many shortcuts",
    source="experiment on MultiColorMNIST and SingleColorMNIST (recalled)",
    criterion="MLP of width 64, 1,500 images, colours all right in training, mean over 70, 80 and 90% wrong patches, 5 seeds: "
    "accuracy of the averaged logits minus the better of the two has its 95% interval above 0 with 32 patches, and the gain "
    "over the mean of the two is larger with 32 patches than with 1 (interval of the difference above 0)",
)
def many_shortcuts_help_ensembles(lab: Lab) -> Finding:
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
                hit = [(logits.argmax(1) == y) for logits in (a, b, a + b)]
                for key, h in zip(row, (*hit, hit[2] & ~hit[0] & ~hit[1])):
                    right[key] += float(h.double().mean()) / len(sets)
            for key, share in right.items():
                row[key].append(share)
    many, single = rows[PATCHES], rows[1]
    better = [max(pair) for pair in zip(many["one"], many["other"])]
    gain = {n: [b - (o + p) / 2 for o, p, b in zip(r["one"], r["other"], r["both"])] for n, r in rows.items()}
    over, more = lab.effect(many["both"], better), lab.effect(gain[PATCHES], gain[1])
    return judge(
        over.above and more.above,
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
)
def too_sure_spoils_ensembles(lab: Lab) -> Finding:
    found: dict[str, list[float]] = {}
    for seed in lab.seeds:
        sets = outside(parts(seed)[2], seed)
        one, other = twins(seed, PATCHES)
        with torch.no_grad():
            for factor in (1.0, 2.0, 5.0):
                hits = [((one(x) + factor * other(x)).argmax(1) == y).double().mean() for x, y in sets]
                found.setdefault(f"times {factor:g}", []).append(float(sum(hits)) / len(sets))
            found.setdefault("the second alone", []).append(mean_accuracy(other, sets))
    gap = lab.effect(found["times 1"], found["times 5"])
    return judge(gap.above, even_minus_times_5=gap, accuracy=found)


# -- pretrained and fine-tuned ----------------------------------------------------------------------------------------


@cache
def start(seed: int) -> nn.Module:
    """A pretrained net: half of the patches tell it something, and those are wrong half the time."""
    first, _, _ = parts(seed)
    wrong = torch.cat([everywhere(0.5, PATCHES // 2), everywhere(1.0, PATCHES // 2)])
    torch.manual_seed(seed)
    return train(net(), coloured(first, wrong, torch.Generator().manual_seed(seed)), 1e-3, FIRST_STEPS, seed, **SHARP)


@cache
def fine_tuned(seed: int, rate: float, calm: bool) -> nn.Module:
    """Fine-tuned where all patches are right; `calm` with Mixup and label smoothing, as BANG does it."""
    data = coloured(parts(seed)[1], everywhere(0.0), torch.Generator().manual_seed(100 + seed))
    return train(copy.deepcopy(start(seed)), data, rate, STEPS, 100 + seed, **({} if calm else SHARP))


def as_net(state: dict[str, Tensor]) -> nn.Module:
    model = net()
    model.load_state_dict(state)
    return model


MODELS = {
    "fine-tuned": lambda seed, rate: fine_tuned(seed, rate, False),
    "calm fine-tuned": lambda seed, rate: fine_tuned(seed, rate, True),
    "WiSE-FT": lambda seed, rate: as_net(wise_ft(start(seed), fine_tuned(seed, rate, False))),
    "BANG": lambda seed, rate: as_net(wise_ft(start(seed), fine_tuned(seed, rate, True))),
}


@cache
def rates() -> dict[str, float]:
    """The rate of fine-tuning that is best out of distribution for each kind of model, on two seeds of their own."""
    return {
        name: max(RATES, key=lambda r: sum(mean_accuracy(build(s, r), outside(parts(s)[2], s)) for s in TUNING))
        for name, build in MODELS.items()
    }


SETTING = (
    "MLP of width 64; pretrained where 16 of 32 patches are right half the time, fine-tuned on 500 images where all are right; "
    "half-way average; rate of fine-tuning tuned for each kind of model on one grid and two other seeds, 5 seeds: "
)


WISE = (
    "ahead of the pretrained net and level with the fine-tuned one, which here loses nothing out of distribution: half of the "
    "patches are new to it, and all of them stay a little right"
)
CALM = (
    "Mixup and label smoothing do harm here, each alone: a net fine-tuned with either reads the digit worse. With all patches of "
    "any colour it is right on 0.57 to 0.62 of the images, after ordinary fine-tuning on 0.76 to 0.77, before on 0.81 (seeds 0 "
    "and 1, rate 1e-3). Both are known to draw a model to features that vary least within a class (Chidambaram and Ge 2025), and "
    "these are the shortcuts"
)
SURE = (
    "there was little to mend: where it is wrong, the ordinary fine-tuned net is hardly surer (0.54 to 0.60) than the pretrained "
    "one (0.49 to 0.52). Training that small does not make a model as sure as fine-tuned CLIP is. The calm net is less sure than "
    "either, and BANG's loss against WiSE-FT is not one of balance"
)


@cache
def table(seeds: range) -> dict[str, dict[str, list[float]]]:
    """Accuracy of each kind of model in and out of distribution, a number a seed."""
    found: dict[str, dict[str, list[float]]] = {n: {"in": [], "out": []} for n in ("pretrained", *MODELS)}
    for seed in seeds:
        test = parts(seed)[2]
        inside, sets = coloured(test, everywhere(0.0), torch.Generator().manual_seed(7 + seed)), outside(test, seed)
        for name, row in found.items():
            model = start(seed) if name == "pretrained" else MODELS[name](seed, rates()[name])
            row["in"].append(accuracy(model, inside))
            row["out"].append(mean_accuracy(model, sets))
    return found


@claim(
    "The average of a pretrained and a fine-tuned model (WiSE-FT) does better out of distribution than both",
    source="abstract; Sec. 2",
    criterion=SETTING + "accuracy out of distribution (mean over 70, 80 and 90% wrong patches) of WiSE-FT minus the "
    "pretrained and minus the fine-tuned model: both 95% intervals above 0",
)
def wise_ft_beats_both_ends(lab: Lab) -> Finding:
    found = table(lab.seeds)
    gaps = {end: lab.effect(found["WiSE-FT"]["out"], found[end]["out"]) for end in ("pretrained", "fine-tuned")}
    return judge(all(g.above for g in gaps.values()), wise_ft_minus=gaps, accuracy=found, rates=rates(), note=WISE)


@claim(
    "BANG does better out of distribution than WiSE-FT and than both ends",
    source="abstract; experiments (there CLIP on ImageNet and five shifts, Mixup and label smoothing)",
    criterion=SETTING
    + "accuracy out of distribution of BANG (fine-tuned with bang_loss as it comes) minus WiSE-FT, minus the "
    "pretrained and minus the calm fine-tuned model: the three 95% intervals above 0",
)
def bang_beats_wise_ft(lab: Lab) -> Finding:
    found = table(lab.seeds)
    gaps = {o: lab.effect(found["BANG"]["out"], found[o]["out"]) for o in ("WiSE-FT", "pretrained", "calm fine-tuned")}
    return judge(all(g.above for g in gaps.values()), bang_minus=gaps, accuracy=found, rates=rates(), note=CALM)


@claim(
    "What spoils the average is that the fine-tuned model is too sure: calming its head mends it, making BANG's sure undoes it",
    source="section on BANG (there by scaling logits); the two interventions are ours",
    criterion=SETTING
    + "factors from balancing_scale on held-out images in distribution: WiSE-FT with the fine-tuned head "
    "scaled to the pretrained model's confidence minus WiSE-FT, and BANG minus BANG with its head scaled to the ordinary "
    "fine-tuned model's confidence, out of distribution: both 95% intervals above 0",
)
def confidence_is_the_cause(lab: Lab) -> Finding:
    out: dict[str, list[float]] = {"WiSE-FT": [], "head calmed": [], "BANG": [], "head made sure": []}
    factors: dict[str, list[float]] = {"calmed": [], "made sure": []}
    sure: dict[str, list[float]] = {"pretrained": [], "fine-tuned": [], "calm fine-tuned": []}
    for seed in lab.seeds:
        test = parts(seed)[2]
        held, test = (test[0][:500], test[1][:500]), (test[0][500:], test[1][500:])
        x, _ = coloured(held, everywhere(0.0), torch.Generator().manual_seed(7 + seed))
        sets = outside(test, seed)
        pre = start(seed)
        ft, calm = fine_tuned(seed, rates()["WiSE-FT"], False), fine_tuned(seed, rates()["BANG"], True)
        with torch.no_grad():
            logits = {"pretrained": pre(x), "fine-tuned": ft(x), "calm fine-tuned": calm(x)}
            for name, model in (("pretrained", pre), ("fine-tuned", ft), ("calm fine-tuned", calm)):
                wrong = [p[p.argmax(1) != y].softmax(1).amax(1) for p, y in ((model(a), b) for a, b in sets)]
                sure[name].append(float(torch.cat(wrong).mean()))
        down = balancing_scale(logits["pretrained"], logits["fine-tuned"])
        up = balancing_scale(logits["fine-tuned"], logits["calm fine-tuned"])
        factors["calmed"].append(down)
        factors["made sure"].append(up)
        states = (
            wise_ft(pre, ft),
            bang(pre, ft, head=HEAD, scale=down),
            wise_ft(pre, calm),
            bang(pre, calm, head=HEAD, scale=up),
        )
        for row, state in zip(out.values(), states):
            row.append(mean_accuracy(as_net(state), sets))
    mends, undoes = lab.effect(out["head calmed"], out["WiSE-FT"]), lab.effect(out["BANG"], out["head made sure"])
    return judge(
        mends.above and undoes.above,
        calmed_minus_wise_ft=mends,
        bang_minus_made_sure=undoes,
        accuracy_out=out,
        factors=factors,
        confidence_where_wrong=sure,
        note=SURE,
    )

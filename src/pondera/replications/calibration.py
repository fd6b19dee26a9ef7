"""The lab put to its own test: equal recipes must rarely be called different, unequal ones always. No paper; our claims."""

from pondera.lab.stats import difference
from pondera.replications import Finding, Lab, claim, judge

REPEATS, A_CALL = 40, 5  # A/A pairs, and how many of them one comparison holds


@claim(
    "The same recipe under two names is rarely called different",
    source="our own promise; the intervals claim 5%",
    criterion="digits, AdamW, 40 A/A pairs of 5 seeds, weights drawn apart, each arm tuned for itself: at most 10% called",
    budget="full",
)
def same_recipe_is_not_called_different(lab: Lab) -> Finding:
    """The salt draws the arms' weights apart; with equal salts every difference would be exactly zero."""
    called, means, rates_differ = 0, [], 0
    for block in range(REPEATS // A_CALL):
        salts = range(1, 2 * A_CALL + 1)
        table = lab.compare("digits", [f"salt={s}" for s in salts], first_seed=100 * block, budget=150)
        for one, other in zip(table.rows[::2], table.rows[1::2]):
            d = difference(one.scores, other.scores)
            called += d.verdict != "no difference shown"
            rates_differ += one.rate != other.rate
            means.append(d.mean)
    return judge(
        called <= 0.1 * REPEATS,
        called=called,
        pairs=REPEATS,
        arms_tuned_to_different_rates=rates_differ,
        mean_difference=sum(means) / len(means),
        largest_difference=max(means, key=abs),
    )


@claim(
    "A known difference is called, and called large, every time",
    source="our own promise",
    criterion="deep (40 plain layers), default start against LSUV, 10 repeats of 5 seeds: better and large in all 10",
    budget="full",
)
def known_difference_is_called(lab: Lab) -> Finding:
    found = []
    for repeat in range(10):
        table = lab.compare("deep", ["", "init=lsuv"], first_seed=100 * repeat, budget=100)
        found.append(table.rows[1].difference)
    return judge(
        all(d is not None and d.verdict == "better" and d.large for d in found),
        called_better_and_large=sum(d is not None and d.verdict == "better" and d.large for d in found),
        repeats=len(found),
        smallest_difference=min(d.mean for d in found if d is not None),
    )

"""The leagues: ``python docs/_league.py [TASK ...]`` runs `pondera compare` and keeps its table in ``docs/league/``.

Starts are compared on the tasks that train from nothing, adapters on those that start from a trained net; optimizers and what
regularises by kind and task: ``optimizers:digits``, ``regularisers:continual``.

A file a task: the command as one would type it, what it printed as JSON, steps and versions. Finished runs lie in
``league.db``: the same command goes on from there. `_generate.py` makes the page's tables from the files.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RULE = "every seed tuned for itself"  # tables without this word were drawn by the rule before it
FOLDER = Path(__file__).resolve().parent / "league"
EVERYWHERE = (
    "kaiming_normal", "xavier_normal", "lsuv", "orthogonal", "zero", "idinit", "activation_variance", "edge_of_chaos",
    "low_rank_iid", "block_sparse", "low_rank", "ibp",
)  # fmt: skip
TOLD = {"activation_variance", "edge_of_chaos", "low_rank_iid", "block_sparse", "orthogonal"}  # ask for the activation
# task -> (options, its activation where no module shows it, starts beside those above, starts that do not fit)
TASKS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = {
    "digits": ((), "", (), ()),
    "mnist": ((), "", ("convolution_aware",), ()),
    "deep": (("--budget", "150"), "", (), ()),
    "code": (("--budget", "60", "--rates", "0.003,0.01"), "gelu", ("layer_index_rescale",), ()),
    "photo": (("--budget", "150"), "sin", ("winner",), ("activation_variance",)),
}


ADAPTERS = (  # PEFT's and ours, of sizes for layers of width 128 to 384
    "Lora(r=8)", "Lora(r=8,init_lora_weights='pissa')", "Lora(r=8,init_lora_weights='eva')",
    "Miss(r=8,init_weights='bat')", "OFT(oft_block_size=16)", "Psoft(r=32)", "Sorsa(r=8)", "Svft(pattern='plain')",
    "Svft(off_diagonal=8)", "Oft(block_size=16)", "Givens(form='scaled')", "Dota(r=8,n_cores=3)",
)  # fmt: skip
ADAPTED: dict[str, tuple[str, ...]] = {
    "gpt": ("--budget", "40", "--seeds", "3", "--rates", "0.001,0.003,0.01,0.03"),
    "minilm": ("--budget", "80", "--seeds", "6", "--rates", "0.0003,0.001,0.003,0.01,0.03"),
}


FEWER = {  # where a run takes long: one adapter of each kind
    "gpt": (
        "Lora(r=8)", "Lora(r=8,init_lora_weights='pissa')", "OFT(oft_block_size=16)", "Sorsa(r=8)", "Svft(pattern='plain')",
    ),
}  # fmt: skip


DECAY = "weight_decay=log(1e-4,1)"
OPTIMIZERS = (  # each with its decay searched for beside its rate, where it has one
    f"SGD(momentum=0.9,{DECAY})", f"SGDW({DECAY})", f"AdamW({DECAY})", f"AdamP({DECAY})", f"SGDP(momentum=0.9,{DECAY})",
    f"pytorch_optimizer:FAdam({DECAY})", f"NovoGrad({DECAY})", f"Adafactor(eps=(1e-15,1e-3),{DECAY})", f"Muon({DECAY})",
    f"NorMuon({DECAY})", f"AuON({DECAY})", f"HybridAuON({DECAY})", f"TrustRegion({DECAY})", f"SteepestDescent({DECAY})",
    f"Shampoo({DECAY})", f"Shampoo4bit(factor_every=10,root_every=20,{DECAY})", f"KLShampoo({DECAY})", f"DCTAdamW({DECAY})",
    f"StructuredNGD({DECAY})", f"PolyakMomentum({DECAY})", "SMB",
)  # fmt: skip
WIDE = ("--rates", "0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1.0")
BEST = tuple(  # on digits
    f"optim={name}({DECAY})" for name in ("Muon", "NorMuon", "TrustRegion", "Shampoo", "HybridAuON", "AdamW", "AdamP")
) + (f"optim=Adafactor(eps=(1e-15,1e-3),{DECAY})",)
SHORT = ("--budget", "100", "--seeds", "3", "--rates", "0.001,0.003,0.01,0.03,0.1")
FEW = ("--rates", "0.001,0.002,0.004,0.008,0.016,0.032")
PULLS = (  # what pulls on weights, or holds them otherwise; decay is the one to beat
    "optim=AdamW(weight_decay=log(1e-3,3))", "penalty=norm_loss(factor=log(1e-4,1))", "penalty=spectral(factor=log(1e-4,1))",
    "parametrize=Conditioned", "parametrize=weight_norm",
)  # fmt: skip
FINE = ("--rates", "0.001,0.003,0.01,0.03")
SWAPPED = (  # as large as the linear layers they stand for, where they can be
    "layer=Btt(match='parameters')", "layer=Monarch(match='parameters')", "layer=TT(match='parameters')",
    "layer=Btt(rank=1)", "layer=KANLinear(grid=3)", "layer=GroupKAN(groups=2)", "layer=Maxout(pieces=2)",
)  # fmt: skip
SMALLER = (  # factors, bits and zeros at several sizes; the plain rule beside each
    "compress=fisher_svd(keep=0.5)", "compress=fisher_svd(keep=0.5,factors='activations')",
    "compress=fisher_svd(keep=0.5,factors='none')", "compress=magnitude_prune(keep=0.3)",
    "compress=net_trim(epsilon=0.1)", "compress=sketch_prune(keep=0.3)", "compress=quantize(bits=3)",
    "compress=requant(bits=3)", "compress=ompq(bits=3)", "compress=quantize(bits=2)", "compress=requant(bits=2)",
)  # fmt: skip
# kind -> task -> recipes, options
LEAGUES: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "optimizers": {
        "digits": (tuple(f"optim={o}" for o in OPTIMIZERS), WIDE),
        "mnist": (BEST, SHORT),
        "code": (BEST, (*SHORT[:-1], "0.003,0.01,0.03")),
    },
    "compressions": {
        "digits": (SMALLER, ("--rates", "0.001,0.003,0.01")),
        "mnist": (SMALLER, ("--rates", "0.001,0.003", "--budget", "150")),
        "code": (
            tuple(s for s in SMALLER if "net_trim" not in s and "ompq" not in s),
            ("--rates", "0.003,0.01", "--budget", "100", "--seeds", "3"),
        ),
    },
    "layers": {
        "fit": (SWAPPED, FINE),
        "arithmetic": (SWAPPED, FINE),
        "digits": (SWAPPED, FINE),
    },
    "regularisers": {
        "continual": (PULLS, FEW),
        "longtail": (PULLS, FEW),
        "shift": (PULLS, FEW),
        "sae": (
            (
                "penalty=orthogonal_decoder(factor=log(1e-2,10))",
                "penalty=orthogonal_decoder(factor=log(1e-2,10),chunk=16)",
            ),
            FEW,
        ),
        "digits": ((*PULLS, "parametrize=Bitwise", "parametrize=Compander", "parametrize=SignedSupermask"), FEW),
    },
}


def command(task: str) -> list[str]:
    """`pondera compare` on one task with every start, adapter, optimizer or regulariser that fits it."""
    kind, colon, on = task.partition(":")
    if colon:
        recipes, options = LEAGUES[kind][on]
        return ["pondera", "compare", on, *recipes, *options, "--json"]
    if task in ADAPTED:
        chosen = [word for name in FEWER.get(task, ADAPTERS) for word in ("--adapter", name)]
        return ["pondera", "compare", task, *chosen, *ADAPTED[task], "--json"]
    options, activation, more, without = TASKS[task]
    words = ["pondera", "compare", task]
    for name in (*EVERYWHERE, *more):
        if name not in without:
            told = f"(nonlinearity='{activation}')" if activation and name in TOLD else ""
            words += ["--init", f"{name}{told}"]
    return [*words, *options, "--json"]


def run(task: str) -> None:
    import torch

    from pondera import __version__
    from pondera.lab import compare

    words = command(task)
    what, _, on = task.rpartition(":")
    what = what or ("adapters" if task in ADAPTED else "starts")
    recipes, more = asked(words)
    hands = int(os.environ.get("WORKERS", "2"))
    found = compare(on, recipes, **more, store="league.db", workers=hands, progress=False)
    about = {"pondera": __version__, "torch": torch.__version__, "python": platform.python_version()}
    rows = [slim(row) for row in found.to_json()["rows"]]
    for row in rows:
        if what == "adapters":
            row |= costs(on, row["recipe"])
        elif what == "layers":
            row |= {"numbers": row["parameters"]}
        elif what == "optimizers":
            row |= {"state": state(on, row["setting"]), "band": band(row)}
        elif what == "compressions":
            row |= {"stored": row["bytes"], "products": row["multiplications"]}
        row.pop("units")
        for k in ("bytes", "multiplications", *(["numbers"] if what != "layers" else [])):
            row.pop(k, None)
    kept = {"command": words, "rule": RULE, "versions": about, "rows": rows}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{what}-{on}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def asked(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The recipes of a command, the baseline first, and what else it says, as `pondera.lab.compare` takes them."""
    recipes, more = [""], {}
    rest = iter(words[3:])
    for word in rest:
        if word in ("--init", "--adapter"):
            recipes.append(f"{word[2:]}={next(rest)}")
        elif word in ("--seeds", "--budget"):
            more[word[2:]] = int(next(rest))
        elif word == "--rates":
            more["rates"] = [float(r) for r in next(rest).split(",")]
        elif word != "--json":
            recipes.append(word)
    return recipes, more


def slim(row: dict[str, Any]) -> dict[str, Any]:
    """A row as tables need it: without curves and what the signal did."""
    return {k: v for k, v in row.items() if k not in ("signal", "to_the_baseline", "at_equal_time", "peak_memory")}


def band(row: dict[str, Any]) -> float:
    """How many decades of rates are good: within a twentieth of the best validation score after a quarter, mean over units.

    Each rate counts as long as the grid's step, half a decade.
    """
    widths = []
    for unit in row["units"]:
        early = [t["early"] for t in unit["trials"] if t["early"] is not None]
        best = max(early, default=None)
        widths.append(0.0 if best is None else 0.5 * sum(e >= best - abs(best) / 20 for e in early))
    return sum(widths) / len(widths)


def state(task: str, recipe: str) -> float:
    """Numbers of state that the optimizer keeps for each number of the model, in units of four bytes, after two dozen steps."""
    import torch

    from pondera.lab import Recipe, load_task
    from pondera.lab.data import batches
    from pondera.lab.loop import asks, step_with
    from pondera.lab.train import prepare

    loaded, parsed = load_task(task), Recipe.parse("" if recipe == "as built" else recipe)
    fit, _ = loaded.split("final")
    model = prepare(loaded, parsed, 0, fit)
    feed, held = batches(fit, loaded.settings.batch, 0), parsed.optimizers(model, 1e-4, loaded.settings.optim)
    for _ in range(24):
        batch = next(feed)

        def closure(batch: Any = batch) -> torch.Tensor:
            model.zero_grad()
            loss = loaded.loss(model, batch)
            loss.backward()
            return loss

        value = None if asks(held[0]) == "closure" else closure()
        for o in held:
            o.step(closure) if value is None else step_with(o, value)
    found = [
        v for o in held for kept in o.state.values() for v in kept.values() if isinstance(v, torch.Tensor) and v.ndim
    ]
    return sum(v.numel() * v.element_size() for v in found) / sum(4 * p.numel() for p in model.parameters())


def costs(task: str, recipe: str) -> dict[str, float]:
    """What one choice takes besides time: trained numbers, and the bytes that training needs beyond the weights.

    Those are gradients and Adam's two moments of what is trained, what an adapter keeps frozen of its own, and what the
    forward pass of one batch saves for the backward pass, each piece of memory once.
    """
    import torch

    from pondera.lab import Recipe, load_task
    from pondera.lab.data import batches
    from pondera.lab.train import prepare

    loaded = load_task(task)
    fit, _ = loaded.split("final")
    plain = loaded.build()
    before = sum(x.numel() * x.element_size() for x in (*plain.parameters(), *plain.buffers()))
    model = prepare(loaded, Recipe.parse("" if recipe == "as built" else recipe), 0, fit)
    trained = [p for p in model.parameters() if p.requires_grad]
    everything = {x.data_ptr(): x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        place = x.untyped_storage()
        if place.data_ptr() not in everything:
            saved[place.data_ptr()] = place.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = loaded.loss(model, next(batches(fit, loaded.settings.batch, 0)))
    del loss
    numbers = sum(p.numel() for p in trained)
    state = 3 * sum(p.numel() * p.element_size() for p in trained)
    own = max(0, sum(everything.values()) - before)
    return {"trained": numbers, "training_bytes": state + own + sum(saved.values())}


if __name__ == "__main__":
    for each in sys.argv[1:] or (
        *TASKS,
        *ADAPTED,
        *(f"{kind}:{on}" for kind, tasks in LEAGUES.items() for on in tasks),
    ):
        run(each)

"""The leagues: ``python docs/_league.py [TASK ...]`` runs `pondera compare` and keeps its table in ``docs/league/``.

Starts are compared on the tasks that train from nothing, adapters on those that start from a trained net, and optimizers and
penalties on tasks of both kinds: ``optim:digits``, ``penalty:noisy``.

A file a task: the command as one would type it, what it printed as JSON, steps and versions. Finished runs lie in
``league.db``: the same command goes on from there. `_generate.py` makes the page's tables from the files.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

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


OPTIMIZERS = (
    "SGD(momentum=0.9)", "SGDW", "AdamW(weight_decay=0.0)", "AdamP", "SGDP(momentum=0.9)", "FAdam", "NovoGrad",
    "Adafactor(eps=(1e-15,1e-3))", "Muon(weight_decay=0.0)", "NorMuon", "AuON", "TrustRegion", "SteepestDescent", "Shampoo",
    "Shampoo4bit", "KLShampoo", "DCTAdamW", "StructuredNGD", "PolyakMomentum", "SMB",
)  # fmt: skip
WIDE = "0.0001,0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1.0"
OPTIMIZED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # task -> options, optimizers
    "digits": (("--rates", WIDE), OPTIMIZERS),
}
PENALTIES = ()
PENALISED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}


def command(task: str) -> list[str]:
    """`pondera compare` on one task with every start, adapter, optimizer or penalty that fits it."""
    room, colon, rest = task.partition(":")
    if colon:
        options, names = {"optim": OPTIMIZED, "penalty": PENALISED}[room][rest]
        return ["pondera", "compare", rest, *(w for n in names for w in (f"--{room}", n)), *options, "--json"]
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
    words = command(task)
    hands = ("--workers", workers) if (workers := os.environ.get("WORKERS")) else ()
    done = subprocess.run(
        [sys.executable, "-m", *words, *hands, "--store", "league.db", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):  # 1: some run failed, which is a result
        sys.exit(done.stderr.strip() or f"pondera compare {task} ended with {done.returncode}")
    import torch

    from pondera import __version__

    about = {"pondera": __version__, "torch": torch.__version__, "python": platform.python_version()}
    kept = {"command": words, "rule": RULE, "versions": about, "rows": json.loads(done.stdout.splitlines()[-1])}
    what = "starts"
    if task in ADAPTED:
        what = "adapters"
        for row in kept["rows"]:
            row |= costs(task, row["recipe"])
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{what}-{task}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


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
    for each in sys.argv[1:] or (*TASKS, *ADAPTED):
        run(each)

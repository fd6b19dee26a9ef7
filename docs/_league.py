"""The league of starts: ``python docs/_league.py [TASK ...]`` runs `pondera compare` and keeps its table in ``docs/league/``.

A file a task: the command as one would type it, what it printed as JSON, steps and versions. Finished runs lie in
``league.db``: the same command goes on from there. `_generate.py` makes the page's tables from the files.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

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


def command(task: str) -> list[str]:
    """`pondera compare` on one task with every start that fits it."""
    options, activation, more, without = TASKS[task]
    words = ["pondera", "compare", task]
    for name in (*EVERYWHERE, *more):
        if name not in without:
            told = f"(nonlinearity='{activation}')" if activation and name in TOLD else ""
            words += ["--init", f"{name}{told}"]
    return [*words, *options, "--json"]


def run(task: str) -> None:
    words = command(task)
    done = subprocess.run(
        [sys.executable, "-m", *words, "--store", "league.db", "-q"], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):  # 1: some run failed, which is a result
        sys.exit(done.stderr.strip() or f"pondera compare {task} ended with {done.returncode}")
    import torch

    from pondera import __version__

    about = {"pondera": __version__, "torch": torch.__version__, "python": platform.python_version()}
    kept = {"command": words, "versions": about, "rows": json.loads(done.stdout.splitlines()[-1])}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"starts-{task}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for each in sys.argv[1:] or TASKS:
        run(each)

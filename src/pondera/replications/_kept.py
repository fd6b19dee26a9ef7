"""Many runs of one experiment, in two processes, each kept on disk as soon as it is done: a stopped one goes on from there."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def run_all(name: str, function: Callable[[Any], dict[str, Any]], tasks: Sequence[Any], about: str) -> list[dict]:
    """``[function(task) for task in tasks]`` with the results as JSON has them.

    Args:
        name: of the experiment, for the file in the system's folder for temporary files.
        function: a module's function; takes one of the tasks, gives a dict of plain values.
        tasks: plain values.
        about: whatever else the results depend on (settings, the source); another text is another file.
    """
    mark = hashlib.sha256(about.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"pondera-{name}-{mark}.jsonl"
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            found[row["task"]] = row["result"]
    left = [t for t in tasks if json.dumps(t) not in found]
    if left:
        with ProcessPoolExecutor(2, get_context("spawn")) as pool, path.open("a") as file:
            waiting = {pool.submit(function, t): json.dumps(t) for t in left}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                file.write(json.dumps({"task": waiting[done], "result": done.result()}) + "\n")
                file.flush()
    return [found[json.dumps(t)] for t in tasks]

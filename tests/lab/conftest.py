import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = str(Path(__file__).with_name("tiny.py"))
RECIPES = ["init=xavier_normal", "optim=Adam", "init=orthogonal+optim=SGD(momentum=0.9)"]


@pytest.fixture
def command(tmp_path):
    """Start `pondera compare` on the tiny task as a user would; returns the process."""

    def start(*options, store=None, pause=0.0, seeds=4):
        env = os.environ | {"TINY_PAUSE": str(pause), "OMP_NUM_THREADS": "1"}
        args = [sys.executable, "-m", "pondera", "compare", TINY, *RECIPES, "--seeds", str(seeds), "--json", "-q"]
        args += ["--store", str(store or tmp_path / "runs.db"), *options]
        return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    return start


def table_of(process, timeout=240):
    """The table a command printed, less what depends on the clock."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    clock = ("step_seconds", "start_seconds", "equal_time_difference", "equal_time_verdict", "peak_memory")
    return [{k: v for k, v in row.items() if k not in clock} for row in json.loads(out)]

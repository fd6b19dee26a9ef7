"""Local processes: what one run costs another, when they end, and that they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pondera.errors import BadInput
from pondera.lab.execute import executor

from . import naps
from .naps import Nap, carry_out

ROOT = str(Path(__file__).parents[2])
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="looks at processes through /proc")


@pytest.fixture
def hands(monkeypatch):
    """Executors of naps; the workers find this file's folder on their path."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda workers=2, **options: executor(
        workers, ray=None, threads=options.pop("threads", 1), device="cpu", work=naps.work, **options
    )


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids, seconds=30):
    end = time.monotonic() + seconds
    while any(alive(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(p) for p in pids)


def descendants(pid):
    """Every process below one, children's children included."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                pass
    found, new = set(), {pid}
    while new:
        new = {p for p, of in parents.items() if of in new} - found
        found |= new
    return found


def test_each_run_comes_back_and_processes_stay(hands):
    results = carry_out(hands(), [Nap(str(i), "time.sleep(0.3)") for i in range(6)])
    assert {r["status"] for r in results.values()} == {"ok"}
    pids = {r["pid"] for r in results.values()}
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert gone(pids)


def test_workers_are_forked_from_one_server_that_has_paid_for_the_imports(hands):
    look = "import torch; out |= dict(parent=os.getppid(), cpu=time.process_time(), torch=torch.get_num_threads())"
    look += "; out['server'] = open(f'/proc/{os.getppid()}/cmdline').read()"
    results = carry_out(hands(threads=2), [Nap(str(i), look + "; time.sleep(0.3)") for i in range(4)]).values()
    assert len({r["parent"] for r in results}) == 1
    assert all("forkserver" in r["server"] for r in results)
    assert {r["torch"] for r in results} == {2}
    assert min(r["cpu"] for r in results) < 1.5  # importing torch and what optimizers need takes longer


def test_the_server_has_no_threads_and_no_gpu():
    """What is forked must be simple: a thread of the server would be missing in the workers, its locks held for ever."""
    script = (
        "import os, sys, tests.lab.naps as naps\n"
        "from pondera.lab.execute import executor\n"
        "if __name__ == '__main__':\n"
        "    look = \"out['threads'] = len(os.listdir(f'/proc/{os.getppid()}/task'))\"\n"
        "    look += \"; import torch; out['cuda'] = torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()\"\n"
        '    look += "; torch.set_num_threads(2); torch.ones(600, 600) @ torch.ones(600, 600)"\n'
        "    hands = executor(2, ray=None, threads=1, device='cpu', work=naps.work)\n"
        "    print(naps.carry_out(hands, [naps.Nap('a', look)])['a'])\n"
    )
    done = script_of(script)
    out, err = done.communicate(timeout=120)
    assert "'threads': 1, 'cuda': (False, False)" in out, err


def script_of(text, **more):
    """A script of a user's own, started in a group of its own."""
    folder = more.pop("folder", None)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([ROOT, *sys.path])}
    if folder is None:
        import tempfile

        folder = tempfile.mkdtemp()
    path = Path(folder) / "script.py"
    path.write_text(text)
    return subprocess.Popen([sys.executable, str(path)], env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def test_workers_see_the_environment_of_now(hands, monkeypatch):
    carry_out(hands(), [Nap("before")])  # the server has begun
    monkeypatch.setenv("PONDERA_TEST_OF_NOW", "yes")
    assert carry_out(hands(), [Nap("a", "out['found'] = os.environ.get('PONDERA_TEST_OF_NOW')")])["a"]["found"] == "yes"


def test_a_run_may_have_processes_of_its_own(hands):
    do = "import multiprocessing as m; p = m.get_context('fork').Process(target=str); p.start(); p.join(); out['code'] = p.exitcode"
    assert carry_out(hands(), [Nap("a", do)])["a"]["code"] == 0


# -- runs that go wrong -----------------------------------------------------------------------------------------------------


def test_what_a_run_raises_is_its_result(hands):
    ends = carry_out(
        hands(), [Nap("a", "1 / 0"), Nap("b"), Nap("c", "out['f'] = lambda: 0"), Nap("d", "out['x'] = 'y' * 10**7")]
    )
    assert ends["a"]["status"] == "raised"
    assert ends["a"]["reason"] == "ZeroDivisionError: division by zero"
    assert ends["b"]["status"] == "ok"
    assert ends["c"]["status"] == "raised"
    assert len(ends["d"]["x"]) == 10**7


def test_a_death_is_tried_again_and_two_are_a_result(hands, tmp_path):
    mark = f"open({str(tmp_path)!r} + '/tries', 'a').write('x'); "
    once = f"p = {str(tmp_path)!r} + '/once'; there = os.path.exists(p); open(p, 'w').close(); there or os.kill(os.getpid(), 9)"
    ends = carry_out(hands(), [Nap("ever", mark + "os._exit(9)"), Nap("once", once), Nap("fine", "time.sleep(0.5)")])
    assert (ends["once"]["status"], ends["fine"]["status"]) == ("ok", "ok")
    assert ends["ever"]["status"] == "killed"
    assert "its process died 2 times" in ends["ever"]["reason"]
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_worker_that_dies_between_runs_costs_no_run(hands):
    pool = hands(1, timeout=100)
    pool.submit(Nap("a"))
    result = next(r for _ in range(200) for _, r in pool.wait(0.5))
    os.kill(result["pid"], signal.SIGKILL)
    assert gone([result["pid"]])
    again = carry_out(pool, [Nap("b")])["b"]
    assert again["status"] == "ok"
    assert again["pid"] != result["pid"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_takes_too_long_is_stopped_once(hands, tmp_path, workers):
    mark = f"open({str(tmp_path)!r} + '/tries', 'a').write(str(os.getpid()) + ' '); time.sleep(600)"
    ends = carry_out(hands(workers, timeout=3.0), [Nap("slow", mark), Nap("fine"), Nap("later")])
    assert ends["slow"] == {"status": "timeout", "reason": "took longer than 3 s", "wall": 3.0}
    assert (ends["fine"]["status"], ends["later"]["status"]) == ("ok", "ok")
    pids = (tmp_path / "tries").read_text().split()
    assert len(pids) == 1
    assert gone(pids)


def test_the_clock_of_a_run_does_not_count_the_imports():
    """The time is the run's: that of the first run does not begin before its process can take it."""
    script = (
        "import sys, tests.lab.naps as naps\n"
        "from pondera.lab.execute import executor\n"
        "if __name__ == '__main__':\n"
        "    hands = executor(1, ray=None, threads=1, device='cpu', work=naps.work, timeout=0.5)\n"
        "    print(naps.carry_out(hands, [naps.Nap('a')])['a']['status'])\n"
    )
    out, err = script_of(script).communicate(timeout=120)
    assert out == "ok\n", err


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_a_wrong_time_is_one_sentence(hands, timeout):
    with pytest.raises(BadInput, match="must be a positive number of seconds, got"):
        hands(timeout=timeout)


# -- the end ----------------------------------------------------------------------------------------------------------------

LONG = (
    "import sys, time, tests.lab.naps as naps\n"
    "from pondera.lab.execute import executor\n"
    "if __name__ == '__main__':\n"
    "    hands = executor(2, ray=None, threads=1, device='cpu', work=naps.work)\n"
    "    print('begun', flush=True)\n"
    "    try:\n"
    "        naps.carry_out(hands, [naps.Nap(str(i), 'time.sleep(LONG)') for i in range(40)])\n"
    "    except KeyboardInterrupt:\n"
    "        print('stopped by the user', flush=True)\n"
)


@pytest.mark.parametrize("wait", [0.0, 1.0, 15.0], ids=["at once", "while it imports", "at work"])
def test_control_c_is_the_parents_alone(wait):
    process = script_of(LONG.replace("LONG", "100.0" if wait > 5 else "0.1"))
    assert process.stdout.readline() == "begun\n"
    time.sleep(wait)
    below = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert (out, err) == ("stopped by the user\n", "")
    assert process.returncode == 0
    assert gone(below)


def test_nothing_outlives_a_parent_that_is_killed():
    process = script_of(LONG.replace("LONG", "100.0"))
    process.stdout.readline()
    for _ in range(600):
        below = descendants(process.pid)
        if len(below) >= 4:  # the server, its helper, two workers
            break
        time.sleep(0.1)
    assert len(below) >= 4
    process.kill()
    process.communicate()
    assert gone(below, 20)


def test_an_executor_that_nobody_closed_ends_with_the_script():
    script = (
        LONG.replace("LONG", "100.0")
        .replace("hands = ", "hands = kept = ")
        .replace("naps.carry_out(hands, ", "kept.submit(*")
    )
    script = script.replace("range(40)]", "range(1)]") + "    time.sleep(5)\n"
    process = script_of(script)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("begun\n", "")


def test_a_script_without_a_guard_is_told_so(tmp_path):
    script = LONG.replace("if __name__ == '__main__':", "if True:").replace("LONG", "0.1")
    process = script_of(script, folder=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "a script that calls compare needs `if __name__ == '__main__':` before the call" in err.splitlines()[-1]

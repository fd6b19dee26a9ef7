"""The same command on a Ray cluster of two workers on loopback: the same table, also when one worker is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pondera.errors import BadInput
from pondera.lab.execute import _require_listening
from pondera.lab.store import Store

from .conftest import table_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("ray")


def ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    found = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return found


@pytest.fixture
def cluster():
    """A head that runs nothing and two workers of one CPU each; (address, processes of the workers)."""
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    (port,) = ports(1)
    env = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_DASHBOARD": "1", "RAY_health_check_failure_threshold": "2",
                        "RAY_health_check_period_ms": "1000"}  # fmt: skip
    common = ["--node-ip-address=127.0.0.1", "--block", "--object-store-memory=100000000", "--disable-usage-stats"]
    started = []

    def start(*options):
        process = subprocess.Popen(
            [ray, "start", *common, *options],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        started.append(process)
        return process

    start("--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false")
    for _ in range(300):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    workers = []
    for n in (1, 2):  # one after the other: two that join at once may pick the same ports
        workers.append(start(f"--address=127.0.0.1:{port}", "--num-cpus=1"))
        wait_for_cpus(f"127.0.0.1:{port}", n)
    yield f"127.0.0.1:{port}", workers
    for process in reversed(started):
        end(process)


def wait_for_cpus(address, n, seconds=120):
    script = (
        "import ray, sys, time\n"
        f"ray.init(address={address!r}, log_to_driver=False, logging_level='ERROR')\n"
        f"end = time.time() + {seconds}\n"
        f"while ray.cluster_resources().get('CPU', 0) < {n} and time.time() < end: time.sleep(0.2)\n"
        f"sys.exit(ray.cluster_resources().get('CPU', 0) < {n})"
    )
    for _ in range(5):  # the head may need a moment before it takes a driver
        if subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=2 * seconds).returncode == 0:
            return
        time.sleep(2)
    pytest.fail(f"the cluster at {address} did not reach {n} CPUs")


def end(process, how=signal.SIGTERM):
    """End what one `ray start` began: its process group, nothing else."""
    try:
        os.killpg(process.pid, how)
        process.wait(15)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def raylet_below(process):
    """The number of the raylet, a node's own process, that one `ray start` began."""
    for entry in Path("/proc").iterdir():
        try:
            group = int((entry / "stat").read_text().rpartition(")")[2].split()[2])
            name = (entry / "cmdline").read_text().split("\0")[0]
        except (OSError, ValueError, IndexError):
            continue
        if group == process.pid and name.endswith("/raylet"):
            return int(entry.name)
    pytest.fail("the node has no raylet")


def kill_node(process):
    """All that one `ray start` began dies at once, as when the machine is switched off."""
    end(process, signal.SIGKILL)


def kill_raylet(process):
    """Only the node's own process dies; what it had begun finds out by itself."""
    os.kill(raylet_below(process), signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_node, kill_raylet])
def test_same_table_on_a_cluster_that_loses_a_node(cluster, command, tmp_path, kill):
    address, workers = cluster
    local = table_of(command("--workers", "1", store=tmp_path / "local.db"))
    if kill is kill_node:
        assert table_of(command("--ray", address, store=tmp_path / "ray.db")) == local
    disturbed = command("--ray", address, store=tmp_path / "disturbed.db", pause=0.03)
    for _ in range(1200):
        time.sleep(0.1)
        if (tmp_path / "disturbed.db").exists() and finished(tmp_path / "disturbed.db") >= 6:
            break
    assert disturbed.poll() is None, "it finished before the kill"
    kill(workers[0])
    assert table_of(disturbed) == local
    kept = Store(tmp_path / "disturbed.db")
    assert set(kept.executions().values()) == {1}
    kept.close()


def finished(path):
    kept = Store(path)
    try:
        return len(kept.executions())
    finally:
        kept.close()


def test_how_a_run_may_end_on_a_cluster(cluster, tmp_path):
    """In a process of its own, as one process has one cluster."""
    address, _ = cluster
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, tests.lab.naps as naps\n"
        "from tests.lab.naps import Nap\n"
        "from pondera.lab.execute import executor\n"
        f"hands = executor(1, ray={address!r}, threads=1, device='cpu', work=naps.work, timeout=30.0)\n"
        "runs = [Nap('slow', 'time.sleep(600)'), Nap('raises', '1 / 0'), Nap('dies', 'os._exit(9)')]\n"
        "runs += [Nap(str(i), 'time.sleep(3)') for i in range(6)]\n"
        "for key, end in sorted(naps.carry_out(hands, runs, 200).items()): print(key, end['status'], end.get('reason'))\n"
    )
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[:6] == [f"{i} ok None" for i in range(6)], done.stdout
    assert lines[6] == "dies killed lost on the cluster: WorkerCrashedError"
    assert lines[7] == "raises raised ZeroDivisionError: division by zero"
    assert lines[8] == "slow timeout took longer than 30 s"


def test_no_cluster_is_one_sentence(command):
    process = command("--ray", "127.0.0.1:1")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in err.strip().splitlines()[-1]


def test_a_cluster_that_is_gone_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BadInput, match="no Ray cluster answers at 'auto', which was 127.0.0.1:1"):
        _require_listening("auto")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
    with pytest.raises(BadInput, match="which was 127.0.0.1:2"):
        _require_listening("auto")
    monkeypatch.delenv("RAY_ADDRESS")
    (tmp_path / "ray" / "ray_current_cluster").unlink()
    _require_listening("auto")  # nothing known: ray says so itself, at once

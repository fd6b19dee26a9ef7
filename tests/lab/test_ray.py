"""The same command on a Ray cluster of two workers on loopback: the same table, also when one worker is killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

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


def test_same_table_on_a_cluster(cluster, command, tmp_path):
    address, workers = cluster
    local = table_of(command("--workers", "1", store=tmp_path / "local.db"))
    assert table_of(command("--ray", address, store=tmp_path / "ray.db")) == local
    disturbed = command("--ray", address, store=tmp_path / "disturbed.db", pause=0.03)
    from pondera.lab.store import Store

    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "disturbed.db").exists() and len(Store(tmp_path / "disturbed.db").executions()) >= 6:
            break
    assert disturbed.poll() is None, "it finished before the kill"
    end(workers[0], signal.SIGKILL)
    assert table_of(disturbed) == local


def test_no_cluster_is_one_sentence(command):
    process = command("--ray", "127.0.0.1:1")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in err.strip().splitlines()[-1]

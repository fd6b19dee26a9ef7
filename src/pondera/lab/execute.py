"""Where runs are carried out: in this process, in local processes, or on a Ray cluster. Each offers `submit` and `wait`."""

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from pondera.errors import BadInput
from pondera.lab.train import RunSpec, run

TRIES = 2  # a run whose process dies twice is a result: killed


class Executor(Protocol):
    """Carries out runs. free: how many more can be submitted now."""

    @property
    def free(self) -> int: ...
    def submit(self, spec: RunSpec) -> None: ...
    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]: ...
    def close(self) -> None: ...


class Inline:
    """One run at a time in this process."""

    def __init__(self) -> None:
        self._next: RunSpec | None = None

    @property
    def free(self) -> int:
        return int(self._next is None)

    def submit(self, spec: RunSpec) -> None:
        self._next = spec

    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
        if self._next is None:
            time.sleep(seconds)
            return
        spec, self._next = self._next, None
        yield spec, run(spec)

    def close(self) -> None:
        pass


class Processes:
    """One run at a time in each of `workers` local processes; a process that dies is replaced and its run tried again."""

    def __init__(self, workers: int, threads: int):
        self._threads = threads
        self._slots: list[ProcessPoolExecutor | None] = [None] * workers
        self._running: dict[int, tuple[RunSpec, Future[dict[str, Any]], int]] = {}

    @property
    def free(self) -> int:
        return len(self._slots) - len(self._running)

    def submit(self, spec: RunSpec) -> None:
        slot = next(i for i in range(len(self._slots)) if i not in self._running)
        self._start(slot, spec, 1)

    def _start(self, slot: int, spec: RunSpec, attempt: int) -> None:
        pool = self._slots[slot]
        if pool is None:
            pool = self._slots[slot] = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _begin_worker, (os.getpid(), self._threads)
            )
        self._running[slot] = spec, pool.submit(run, spec), attempt

    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
        if not self._running:
            time.sleep(seconds)
            return
        wait([f for _, f, _ in self._running.values()], seconds, FIRST_COMPLETED)
        for slot, (spec, future, attempt) in list(self._running.items()):
            if not future.done():
                continue
            del self._running[slot]
            try:
                yield spec, future.result()
            except BrokenProcessPool:
                self._stop(slot)
                if attempt < TRIES:
                    self._start(slot, spec, attempt + 1)
                else:
                    yield spec, killed()

    def _stop(self, slot: int) -> None:
        pool, self._slots[slot] = self._slots[slot], None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        for slot, pool in enumerate(self._slots):
            if pool is not None:
                for process in list((getattr(pool, "_processes", None) or {}).values()):
                    process.terminate()
                self._stop(slot)


def killed() -> dict[str, Any]:
    """The result of a run whose process died every time it was tried."""
    return {
        "status": "killed",
        "reason": f"its process died {TRIES} times (out of memory, or killed from outside)",
        "wall": 0.0,
    }


def _begin_worker(parent: int, threads: int) -> None:
    """Set up a worker process: its thread count, and an end with its parent however that dies."""
    import torch

    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ray:
    """Runs as tasks of an existing Ray cluster, one CPU each (or one GPU); a run lost with its node is tried elsewhere."""

    def __init__(self, address: str, threads: int, device: str):
        try:
            import ray
        except ImportError:
            raise BadInput("running on a Ray cluster needs the extra: pip install 'pondera[ray]'") from None
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            _require_listening(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except Exception as error:
                raise BadInput(f"no Ray cluster answers at {address!r}: {' '.join(str(error).split())[:200]}") from None
        # a run lost with its process is ray's to retry; a lost node as well
        needs: dict[str, Any] = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": threads}
        self._run = ray.remote(max_retries=TRIES + 1, **needs)(run)
        kind, each = ("GPU", 1) if "num_gpus" in needs else ("CPU", threads)
        self._room = int(ray.cluster_resources().get(kind, 0) // each)
        if self._room < 1:
            raise BadInput(f"the Ray cluster at {address!r} has fewer than {each} {kind}s, which one run needs")
        self._running: dict[Any, RunSpec] = {}

    @property
    def free(self) -> int:
        return self._room - len(self._running)

    def submit(self, spec: RunSpec) -> None:
        self._running[self._run.remote(spec)] = spec

    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
        if not self._running:
            time.sleep(seconds)
            return
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        for reference in done:
            spec = self._running.pop(reference)
            try:
                yield spec, self._ray.get(reference)
            except (self._ray.exceptions.RayError, OSError) as error:
                yield spec, killed() | {"reason": f"lost on the cluster: {type(error).__name__}"}

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._mine:
            self._ray.shutdown()


def _require_listening(address: str) -> None:
    """BadInput when nothing answers at a "host:port" (ray itself would try for minutes); other addresses are ray's to judge."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise BadInput(f"no Ray cluster answers at {address!r}: {error}") from None


def executor(workers: int, *, ray: str | None, threads: int, device: str) -> Executor:
    """The executor for the given options."""
    if ray is not None:
        return Ray(ray, threads, device)
    return Inline() if workers == 1 else Processes(workers, threads)

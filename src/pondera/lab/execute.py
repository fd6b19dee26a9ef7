"""Where runs are carried out: in this process, in local processes, or on a Ray cluster. Each offers `submit` and `wait`."""

import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from pondera.errors import BadInput
from pondera.lab.train import RunSpec, run

TRIES = 2  # a run whose process dies twice is a result: killed
Work = Callable[[RunSpec], dict[str, Any]]


class Executor(Protocol):
    """Carries out runs. free: how many more can be submitted now."""

    @property
    def free(self) -> int: ...
    def submit(self, spec: RunSpec) -> None: ...
    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]: ...
    def close(self) -> None: ...


def executor(
    workers: int, *, ray: str | None, threads: int, device: str, timeout: float | None = None, work: Work = run
) -> Executor:
    """The executor for the given options. timeout: seconds one run may take. work: what carries out a run."""
    if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
        raise BadInput(f"the time a run may take must be a positive number of seconds, got {timeout}")
    if ray is not None:
        return Ray(ray, threads, device, timeout, work)
    if workers == 1 and timeout is None:
        return Inline(work)
    return Processes(
        workers, threads, timeout, work, gpus=visible_gpus(device)
    )  # a run that is to be stopped needs a process of its own


# -- here -------------------------------------------------------------------------------------------------------------


class Inline:
    """One run at a time in this process."""

    def __init__(self, work: Work = run) -> None:
        self._work = work
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
        yield spec, self._work(spec)

    def close(self) -> None:
        pass


# -- in local processes -----------------------------------------------------------------------------------------------


class Processes:
    """One run at a time in each of `workers` local processes.

    A process that dies is replaced and its run tried again; one whose run takes longer than `timeout` is killed, and
    that is the run's result. Processes begin when they are needed and stay for the runs that follow.
    """

    def __init__(
        self, workers: int, threads: int, timeout: float | None = None, work: Work = run, gpus: Sequence[str] = ()
    ):
        self._begin = lambda slot: _Worker(threads, work, gpus[slot % len(gpus)] if gpus else None)
        self._timeout = timeout
        self._slots: list[_Worker | None] = [None] * workers
        self._running: dict[int, _Running] = {}
        self._stillborn = 0
        warm()

    @property
    def free(self) -> int:
        return len(self._slots) - len(self._running)

    def submit(self, spec: RunSpec) -> None:
        slot = next(i for i in range(len(self._slots)) if i not in self._running)
        self._start(slot, _Running(spec))

    def _start(self, slot: int, running: "_Running") -> None:
        worker = self._slots[slot]
        if worker is not None and not worker.alive:  # it died idle, which says nothing about any run
            worker.end()
            worker = None
        if worker is None:
            worker = self._slots[slot] = self._begin(slot)
        self._running[slot] = running
        if worker.ready:
            self._send(worker, running)

    def _send(self, worker: "_Worker", running: "_Running") -> None:
        try:
            worker.pipe.send_bytes(pickle.dumps(running.spec))
        except OSError:
            pass  # it has just died; `wait` finds out
        running.deadline = None if self._timeout is None else time.monotonic() + self._timeout

    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
        if not self._running:
            time.sleep(seconds)
            return
        end = time.monotonic() + seconds
        while True:
            due = [r.deadline for r in self._running.values() if r.deadline is not None]
            workers = [w for i in self._running if (w := self._slots[i]) is not None]
            watched = [sign for w in workers for sign in w.signs]
            connection.wait(watched, max(0.0, min([end, *due]) - time.monotonic()))
            done = [(slot, result) for slot in list(self._running) if (result := self._look(slot)) is not None]
            finished = [(self._running.pop(slot).spec, result) for slot, result in done]
            if finished or time.monotonic() >= end:
                yield from finished
                return

    def _look(self, slot: int) -> dict[str, Any] | None:
        """The result of the run in a slot, or None when there is none yet."""
        worker, running = self._slots[slot], self._running[slot]
        assert worker is not None
        dead = not worker.alive  # asked first: what it sent before it died is still in the pipe
        try:
            while worker.pipe.poll():
                said = worker.pipe.recv_bytes()
                if said:
                    return pickle.loads(said)
                worker.ready, self._stillborn = True, 0
                self._send(worker, running)
        except (EOFError, OSError):
            dead = True
        if dead:
            return self._bury(slot, worker, running)
        if running.deadline is not None and time.monotonic() > running.deadline:
            self._stop(slot)
            return timed_out(self._timeout or 0.0)
        return None

    def _bury(self, slot: int, worker: "_Worker", running: "_Running") -> dict[str, Any] | None:
        self._stop(slot)
        if worker.ready:
            running.deaths += 1
            if running.deaths >= TRIES:
                return killed()
        else:
            self._stillborn += 1
            if self._stillborn >= TRIES:
                raise BadInput(
                    "the processes that should carry out the runs end before they begin (above is what they said); "
                    "a script that calls compare needs `if __name__ == '__main__':` before the call, or workers=1 (--workers 1)"
                )
        running.deadline = None
        self._start(slot, running)
        return None

    def _stop(self, slot: int) -> None:
        worker, self._slots[slot] = self._slots[slot], None
        if worker is not None:
            worker.end()

    def close(self) -> None:
        for worker in self._slots:
            if worker is not None:
                worker.terminate()  # all at once, then each is waited for
        for slot in range(len(self._slots)):
            self._stop(slot)
        self._running.clear()


class _Running:
    """A run under way: when it is to be stopped, and how many processes it has cost."""

    def __init__(self, spec: RunSpec):
        self.spec = spec
        self.deadline: float | None = None
        self.deaths = 0


class _Worker:
    """A process that carries out one run after the other. ready: it has begun, and takes runs."""

    def __init__(self, threads: int, work: Work, gpu: str | None = None):
        context = _context()
        self.ready = self._ended = self._started = False
        self.pipe, self._theirs = context.Pipe()
        # a daemon ends with this process; `_serve` undoes what else that means
        sees = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}  # so that "cuda" is this worker's own card
        given = (self._theirs, threads, work, os.environ | sees)
        self._process = context.Process(target=_serve, args=given, daemon=True)
        _in_background(self._start)  # the server of processes may still be importing

    def _start(self) -> None:
        try:
            self._process.start()
        except Exception:
            pass  # nothing was begun: its end of the pipe closes all the same
        self._theirs.close()
        self._started = True
        if self._ended:
            self.end()

    @property
    def alive(self) -> bool:
        return not self._started or self._process.is_alive()

    @property
    def signs(self) -> list[Any]:
        """What becomes readable when it has something to say, or dies."""
        return [self.pipe, self._process.sentinel] if self._started and self._process.pid else [self.pipe]

    def terminate(self) -> None:
        if self._started and self._process.pid:
            self._process.terminate()

    def end(self) -> None:
        self._ended = True
        self.pipe.close()
        if self._started and self._process.pid:
            self._process.kill()
            self._process.join(5.0)


def visible_gpus(device: str) -> list[str]:
    """The cards that runs on ``cuda`` are spread over, by the names CUDA knows them by; none for another device.

    A device with a number, such as ``cuda:1``, is that card for every run.
    """
    if device != "cuda":
        return []
    import torch

    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given or [str(i) for i in range(torch.cuda.device_count())]


def _context() -> Any:
    """Processes are forked by a server that has paid for the imports, where the system can; begun anew elsewhere."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if has_server else "spawn")


def warm(task_source: str = "") -> None:
    """Begin, in the background, the imports that all workers share. Called early it costs no time of its own.

    What is imported must start no threads and touch no GPU, as the workers are forked from there. `task_source`: a
    task's text; what it is likely to load from scikit-learn is then loaded once as well.
    """
    context = _context()
    if context.get_start_method() != "forkserver":
        return
    from multiprocessing import forkserver

    # torch._dynamo: optimizers import it at their first step, a second each
    modules = ["torch", "torch._dynamo", "pondera.lab.train"]
    modules += [m for m in ("pondera.cli",) if m in sys.modules]  # the command's own file is imported by every worker
    modules += ["sklearn.datasets"] * ("sklearn" in task_source)
    context.set_forkserver_preload(modules)
    _in_background(forkserver.ensure_running)


def _in_background(begin: Callable[[], None]) -> None:
    """Begin a process in a thread that holds Ctrl-C back, which the process inherits: the terminal sends it to all."""

    def held_back() -> None:
        if os.name == "posix":
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # its start would let Ctrl-C through again
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        begin()

    threading.Thread(target=held_back, daemon=True).start()


def _serve(pipe: Any, threads: int, work: Work, environment: dict[str, str]) -> None:
    """A worker's life: say that it has begun, then answer each run with its result, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.current_process().daemon = False  # a run may have processes of its own (data loaders)
    os.environ.clear()
    os.environ.update(environment)  # the server knows the one it began with
    import torch

    torch.set_num_threads(threads)
    answer = b""
    while True:
        try:
            pipe.send_bytes(answer)
            sent = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            answer = pickle.dumps(work(pickle.loads(sent)))
        except Exception as error:
            reason = f"{type(error).__name__}: {_one_line(error)}"
            answer = pickle.dumps({"status": "raised", "reason": reason, "wall": 0.0})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


# -- on a cluster -----------------------------------------------------------------------------------------------------


class Ray:
    """Runs as tasks of an existing Ray cluster, one CPU each (or one GPU); a run lost with its node is tried elsewhere."""

    def __init__(self, address: str, threads: int, device: str, timeout: float | None = None, work: Work = run):
        try:
            import ray
        except ImportError:
            raise BadInput("running on a Ray cluster needs the extra: pip install 'pondera[ray]'") from None
        self._ray: Any = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            _require_listening(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except Exception as error:
                raise BadInput(f"no Ray cluster answers at {address!r}: {_one_line(error)}") from None
            _keep_quiet()
        # a run lost with its process is ray's to retry; a lost node as well
        needs: dict[str, Any] = {"num_gpus": 1} if device.startswith("cuda") else {"num_cpus": threads}
        self._run = ray.remote(max_retries=TRIES + 1, **needs)(_marked)
        self._work = work
        kind, each = ("GPU", 1) if "num_gpus" in needs else ("CPU", threads)
        self._room = int(ray.cluster_resources().get(kind, 0) // each)
        if self._room < 1:
            raise BadInput(f"the Ray cluster at {address!r} has fewer than {each} {kind}s, which one run needs")
        self._running: dict[Any, tuple[RunSpec, int]] = {}
        self._timeout = timeout
        self._clock: Any = None if timeout is None else ray.remote(num_cpus=0, max_restarts=-1)(_Clock).remote()
        self._numbered = 0

    @property
    def free(self) -> int:
        return self._room - len(self._running)

    def submit(self, spec: RunSpec) -> None:
        self._numbered += 1
        self._running[self._run.remote(self._work, spec, self._clock, self._numbered)] = spec, self._numbered

    def wait(self, seconds: float) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
        if not self._running:
            time.sleep(seconds)
            return
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        for reference in done:
            spec, _ = self._running.pop(reference)
            try:
                yield spec, self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                reason = f"{type(error.cause).__name__}: {_one_line(error.cause)}"
                yield spec, {"status": "raised", "reason": reason, "wall": 0.0}
            except (self._ray.exceptions.RayError, OSError) as error:
                yield spec, killed() | {"reason": f"lost on the cluster: {type(error).__name__}"}
        yield from self._stopped()

    def _stopped(self) -> Iterator[tuple[RunSpec, dict[str, Any]]]:
        """Stop the runs that take too long, counted from when they began, not from when they queued."""
        if self._timeout is None or self._clock is None:
            return
        try:
            ages = self._ray.get(self._clock.ages.remote(), timeout=5)
        except (self._ray.exceptions.RayError, OSError):
            return  # the clock is being moved to another node
        for reference, (spec, number) in list(self._running.items()):
            if ages.get(number, 0.0) > self._timeout:
                self._ray.cancel(reference, force=True)
                del self._running[reference]
                yield spec, timed_out(self._timeout)

    def close(self) -> None:
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._clock is not None:
            self._ray.kill(self._clock)
        if self._mine:
            self._ray.shutdown()


def _keep_quiet() -> None:
    """What ray tells of lost processes goes to standard output even so, amid a table; the results tell it in our words."""
    try:
        from ray._private import worker
    except ImportError:
        return
    worker.print_to_stdstream = lambda *_, **__: None


class _Clock:
    """When each run on the cluster began, by one clock."""

    def __init__(self) -> None:
        self._began: dict[int, float] = {}

    def begin(self, number: int) -> None:
        self._began[number] = time.monotonic()

    def ages(self) -> dict[int, float]:
        now = time.monotonic()
        return {n: now - t for n, t in self._began.items()}


def _marked(work: Work, spec: RunSpec, clock: Any, number: int) -> dict[str, Any]:
    if clock is not None:
        clock.begin.remote(number)
    return work(spec)


def _require_listening(address: str) -> None:
    """BadInput when nothing answers at a "host:port", or at the one that "auto" stands for (ray itself would try for minutes,
    also where the cluster it last knew of is gone); other addresses are ray's to judge."""
    at = address
    if address == "auto":  # as ray looks it up
        last = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "ray_current_cluster")
        at = os.environ.get("RAY_ADDRESS") or (last.read_text(encoding="utf-8").strip() if last.is_file() else "")
    host, colon, port = at.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        where = f"{address!r}" if at == address else f"{address!r}, which was {at}"
        raise BadInput(f"no Ray cluster answers at {where}: {error}") from None


# -- ends that are no run's own ---------------------------------------------------------------------------------------


def killed() -> dict[str, Any]:
    """The result of a run whose process died every time it was tried."""
    return {
        "status": "killed",
        "reason": f"its process died {TRIES} times (out of memory, or killed from outside)",
        "wall": 0.0,
    }


def timed_out(seconds: float) -> dict[str, Any]:
    """The result of a run that was stopped."""
    return {"status": "timeout", "reason": f"took longer than {seconds:g} s", "wall": seconds}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

"""Work in chunks over worker processes, on this machine or on a Ray cluster.

An engine calls a function on lists of items and gives the results back as they come. A worker that dies (out of
memory, killed) costs nothing but time: what it had is computed again, and if a chunk kills its worker twice, its
items are tried one by one, so that only those which do it are lost. What the work is, and what has been done
before, is the caller's affair: `journal.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cfrl.errors import UserError
from cfrl.runs.interrupt import deaf_children
from cfrl.runs.options import EngineOptions

LOST = "the worker process died on it (out of memory?)"
_ATTEMPTS = 2  # of a chunk, before its items are tried one by one
_AHEAD = 2  # chunks with a cluster for each of its cores

Function = Callable[[list[Any]], list[Any]]


def count_workers(asked: int | None, device: str = "cpu") -> int:
    """As many as asked for; None: one for each core, or one where the work is done by a GPU."""
    return asked or (count_cores() if device == "cpu" else 1)


def count_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Task:
    """Part of a chunk: its items, and which places of the chunk's results they are for."""

    chunk: int
    items: list[Any]
    places: list[int]
    attempts: int = 0


class Ledger:
    """Chunks to do, tasks to do again, and the results of chunks that are not yet complete."""

    def __init__(self, chunks: Iterable[list[Any]], attempts: int = _ATTEMPTS) -> None:
        self._chunks, self._attempts = enumerate(chunks), attempts
        self._again: deque[Task] = deque()
        self._results: dict[int, list[Any]] = {}
        self._open: dict[int, int] = {}

    def take(self) -> Task | None:
        """The next task; None if there is none left, but for those that are being worked on."""
        if self._again:
            return self._again.popleft()
        chunk, items = next(self._chunks, (None, []))
        if chunk is None:
            return None
        self._results[chunk], self._open[chunk] = [None] * len(items), len(items)
        return Task(chunk, list(items), list(range(len(items))))

    def enter(self, task: Task, values: list[Any] | None) -> Iterator[tuple[int, list[Any]]]:
        """Take the results of a task, None if its worker died; yields the chunk if that completes it."""
        if values is None:
            task.attempts += 1
            if task.attempts < self._attempts:
                self._again.appendleft(task)
                return
            if len(task.items) > 1:
                parts = zip(task.items, task.places, strict=True)
                self._again.extendleft(Task(task.chunk, [item], [place]) for item, place in parts)
                return
            values = [None]
        for place, value in zip(task.places, values, strict=True):
            self._results[task.chunk][place] = value
        self._open[task.chunk] -= len(values)
        if not self._open[task.chunk]:
            yield task.chunk, self._results.pop(task.chunk)


class LocalEngine:
    """Worker processes of this machine, started when they are first needed. Close it, or use it with `with`.

    Each worker computes with one thread, so that results do not depend on the number of workers.

    patience: seconds for a chunk, after which its worker counts as dead; attempts: of a chunk whose worker dies.
    inherited: what workers do instead of the function that `map` is given. They are forks of this process, which start
        at once and need no pickle of it; on a CPU of Linux alone.
    """

    def __init__(
        self,
        workers: int,
        patience: float | None = None,
        attempts: int = _ATTEMPTS,
        inherited: Function | None = None,
    ) -> None:
        self.workers, self.patience, self.attempts, self.inherited = workers, patience, attempts, inherited
        self._pool: list[_Worker] = []

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._pool:
            worker.stop()
        self._pool = []

    def map(self, function: Function, chunks: Iterable[list[Any]]) -> Iterator[tuple[int, list[Any]]]:
        """Yield (index of a chunk, results of its items), in the order in which chunks are done.

        Chunks are taken as workers get free. A lost item has the result None. `function` gives one result per item
        and can be pickled.

        Raises:
            UserError: as the function raises it.
            RuntimeError: any other exception of the function, with its traceback.
        """
        ledger = Ledger(chunks, self.attempts)
        busy: dict[Connection, _Worker] = {}
        try:
            while True:
                while len(busy) < self.workers and (task := ledger.take()) is not None:
                    worker = self._idle(busy)
                    worker.start(function, task)
                    busy[worker.connection] = worker
                if not busy:
                    return
                for connection in self._done(busy):
                    worker = busy.pop(connection)
                    values = worker.result()
                    if values is None:
                        self._pool.remove(worker)
                    yield from ledger.enter(worker.task, values)
        finally:
            for worker in busy.values():
                worker.stop()
                self._pool.remove(worker)

    def _idle(self, busy: dict[Connection, _Worker]) -> _Worker:
        for worker in self._pool:
            if worker.connection not in busy:
                return worker
        self._pool.append(_Worker(self.inherited))
        return self._pool[-1]

    def _done(self, busy: dict[Connection, _Worker]) -> list[Connection]:
        """Of those that have something to tell; what has had its time is killed, and tells so."""
        if self.patience is None:
            return wait(list(busy))
        deadline = self.patience + min(worker.since for worker in busy.values())
        done = wait(list(busy), max(deadline - time.monotonic(), 0))
        for worker in [] if done else busy.values():
            if time.monotonic() - worker.since >= self.patience:
                worker.process.kill()
        return done


class RayEngine:
    """The same on a Ray cluster: the one at `address`, or a local one with `workers` processes.

    Machines may come and go: what was at work on one that is lost counts as if its worker had died. Only so many chunks
    are handed over as the cluster can soon begin, so that it never holds all of a large dataset.
    """

    def __init__(
        self,
        workers: int,
        address: str | None = None,
        patience: float | None = None,
        attempts: int = _ATTEMPTS,
        device: str = "cpu",
    ) -> None:
        """device: "cuda" asks for a GPU for each chunk at work; without asking Ray hides them from its workers.

        A program that has joined a cluster already works on that one, and stays.

        Raises UserError if ray is missing or the cluster does not answer.
        """
        try:
            import ray
        except ImportError as error:
            raise UserError("--engine ray needs the package: pip install 'cfrl[ray]'") from error
        self._ray, self.patience, self.attempts = ray, patience, attempts
        self._resource = "CPU" if device == "cpu" else "GPU"
        here = {"num_cpus": workers, "include_dashboard": False}
        self._joined = not ray.is_initialized()
        if not self._joined:
            return
        try:
            ray.init(**({"address": address} if address else here), log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"--address {address}: no Ray cluster answers there ({error})") from error

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._joined:
            self._ray.shutdown()

    def map(self, function: Function, chunks: Iterable[list[Any]]) -> Iterator[tuple[int, list[Any]]]:
        """As `LocalEngine.map`."""
        threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        gpus = int(self._resource == "GPU")
        attempt = self._ray.remote(max_retries=0, num_gpus=gpus, runtime_env=threads)(_timed_attempt)
        shared = self._ray.put(function)  # with its settings, once for all chunks
        ledger = Ledger(chunks, self.attempts)
        busy: dict[Any, Task] = {}
        try:
            while True:
                room = self._room()
                while len(busy) < room and (task := ledger.take()) is not None:
                    busy[attempt.remote(shared, task.items, self.patience)] = task
                if not busy:
                    return
                for reference in self._ray.wait(list(busy))[0]:
                    task = busy.pop(reference)
                    yield from ledger.enter(task, self._result(reference))
        finally:
            for reference in busy:
                self._ray.cancel(reference, force=True)

    def _room(self) -> int:
        """How many chunks may be with the cluster: one at work and one waiting for each core (GPU) that it has now."""
        return _AHEAD * max(int(self._ray.cluster_resources().get(self._resource, 0)), 1)

    def _result(self, reference: Any) -> list[Any] | None:
        """The results of a task, or None if its worker died, or the machine that it was on."""
        errors = self._ray.exceptions
        try:
            return _unpack(self._ray.get(reference))
        except (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError, errors.ObjectLostError):
            return None


Engine = LocalEngine | RayEngine


def make_engine(
    options: EngineOptions, device: str = "cpu", patience: float | None = None, attempts: int = _ATTEMPTS
) -> Engine:
    """The engine of the settings.

    Args:
        device: the type of the device that workers compute on.
        patience, attempts: as in `LocalEngine`.

    Raises:
        UserError: as `RayEngine`.
    """
    workers = count_workers(options.workers, device)
    if options.engine == "ray":
        return RayEngine(workers, options.address, patience, attempts, device)
    return LocalEngine(workers, patience, attempts)


class _Worker:
    """One process, and the task that it is at."""

    def __init__(self, inherited: Function | None = None) -> None:
        context = multiprocessing.get_context("fork" if inherited else "spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, inherited), daemon=True)
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # torch and numpy read it when the child imports them
        try:
            with deaf_children():
                self.process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
        theirs.close()
        self.task: Task
        self.since: float  # monotonic seconds

    def start(self, function: Function, task: Task) -> None:
        self.task, self.since = task, time.monotonic()
        with suppress(BrokenPipeError):  # it died while idle; `result` will tell
            self.connection.send((function, task.items))

    def result(self) -> list[Any] | None:
        """The results of the task, or None if the process died."""
        try:
            return _unpack(self.connection.recv())
        except (EOFError, ConnectionResetError):
            self.stop()
            return None

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, inherited: Function | None) -> None:
    """Life of a worker process: compute what comes until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # of pymatgen, once per worker
    while True:
        try:
            function, items = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            connection.send(_attempt(inherited or function, items))
        except BrokenPipeError:
            return


def _end_with_parent() -> None:
    """A killed command must not leave workers at work."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _timed_attempt(function: Function, items: list[Any], patience: float | None) -> tuple[str, Any]:
    """The same in a process that ends itself when its time is up: on a cluster nobody else can tell when it began."""
    timer = threading.Timer(patience or 0, os._exit, (1,))
    if patience is not None:
        timer.start()
    try:
        return _attempt(function, items)
    finally:
        timer.cancel()


def _attempt(function: Function, items: list[Any]) -> tuple[str, Any]:
    """What happened, in a form that crosses processes: "done" and the results, or a kind of error and what it says."""
    try:
        return "done", function(items)
    except UserError as error:
        return "user error", error
    except Exception:
        return "error", traceback.format_exc()


def _unpack(reply: tuple[str, Any]) -> list[Any]:
    kind, value = reply
    if kind == "user error":
        raise value
    if kind == "error":
        raise RuntimeError(f"in a worker process:\n{value}")
    return value

"""Work in chunks over worker processes, on this machine or on a Ray cluster.

An engine calls a function on lists of items and gives the results back as they come. A worker that dies (out of
memory, killed) costs nothing but time: what it had is computed again, and if a chunk kills its worker twice, its
items are tried one by one, so that only those which do it are lost. What the work is, and what has been done
before, is the caller's affair: `screen.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from cfrl.errors import UserError

LOST = "the worker process died on it (out of memory?)"
_ATTEMPTS = 2  # of a chunk, before its items are tried one by one

Function = Callable[[list[Any]], list[Any]]


def count_workers(asked: int, device: str) -> int:
    """As many as asked for; 0: one for each core, or one where the work is done by a GPU.

    Raises:
        UserError: a negative number.
    """
    if asked < 0:
        raise UserError(f"--workers {asked}: should be 0 (automatic) or more")
    return asked or (len(os.sched_getaffinity(0)) if device == "cpu" else 1)


@dataclass
class Task:
    """Part of a chunk: its items, and which places of the chunk's results they are for."""

    chunk: int
    items: list[Any]
    places: list[int]
    attempts: int = 0


class LocalEngine:
    """Worker processes of this machine, started when they are first needed. Close it, or use it with `with`.

    Each worker computes with one thread, so that results do not depend on the number of workers.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
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

    def map(self, function: Function, chunks: Sequence[list[Any]]) -> Iterator[tuple[int, list[Any]]]:
        """Yield (index of a chunk, results of its items), in the order in which chunks are done.

        A lost item has the result None. `function` gives one result per item and can be pickled.

        Raises:
            UserError: as the function raises it.
            RuntimeError: any other exception of the function, with its traceback.
        """
        waiting = deque(Task(i, list(items), list(range(len(items)))) for i, items in enumerate(chunks))
        results: list[list[Any]] = [[None] * len(items) for items in chunks]
        open_parts = [len(items) for items in chunks]
        busy: dict[Connection, _Worker] = {}
        try:
            while waiting or busy:
                for worker in self._idle(min(self.workers, len(waiting) + len(busy)), busy):
                    if waiting:
                        worker.start(function, waiting.popleft())
                        busy[worker.connection] = worker
                for connection in wait(list(busy)):
                    worker = busy.pop(connection)
                    task, values = worker.task, worker.result()
                    if values is None:
                        self._pool.remove(worker)
                        waiting.extendleft(reversed(_again(task)))
                        values = [None] * len(task.items) if _hopeless(task) else []
                    for place, value in zip(task.places, values, strict=False):
                        results[task.chunk][place] = value
                    open_parts[task.chunk] -= len(values)
                    if values and not open_parts[task.chunk]:
                        yield task.chunk, results[task.chunk]
        finally:
            for worker in busy.values():
                worker.stop()
                self._pool.remove(worker)

    def _idle(self, wanted: int, busy: dict[Connection, _Worker]) -> list[_Worker]:
        while len(self._pool) < wanted:
            self._pool.append(_Worker())
        return [worker for worker in self._pool if worker.connection not in busy]


class _Worker:
    """One process, and the task that it is at."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # torch and numpy read it when the child imports them
        try:
            self.process.start()
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
        theirs.close()
        self.task: Task

    def start(self, function: Function, task: Task) -> None:
        self.task = task
        task.attempts += 1
        with suppress(BrokenPipeError):  # it died while idle; `result` will tell
            self.connection.send((function, task.items))

    def result(self) -> list[Any] | None:
        """The results of the task, or None if the process died."""
        try:
            kind, value = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.stop()
            return None
        if kind == "user error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"in a worker process:\n{value}")
        return value

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _again(task: Task) -> list[Task]:
    """What to try after the worker died on a task: the same, its items one by one, or nothing more."""
    if task.attempts < _ATTEMPTS:
        return [task]
    if _hopeless(task):
        return []
    return [Task(task.chunk, [item], [place]) for item, place in zip(task.items, task.places, strict=True)]


def _hopeless(task: Task) -> bool:
    return len(task.items) == 1 and task.attempts >= _ATTEMPTS


def _serve(connection: Connection) -> None:
    """Life of a worker process: compute what comes until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    warnings.simplefilter("ignore")  # of pymatgen, once per worker
    while True:
        try:
            function, items = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            reply = "done", function(items)
        except UserError as error:
            reply = "user error", str(error)
        except Exception:
            reply = "error", traceback.format_exc()
        try:
            connection.send(reply)
        except BrokenPipeError:
            return

"""A worker process: started, asked, watched. What it computes stands in `worker.py`.

Nothing is pickled, nothing waits forever: a watch kills a worker that takes too long, and whatever goes wrong is one
`WorkerFault` that says what it was. To start anew is the caller's affair.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from threading import Timer
from typing import Any

import numpy as np

from cfrl.potentials.worker import read_message, write_message
from cfrl.untrusted import one_line

_LAST_WORDS = 300  # characters of what a dead worker said
_PARTING = 5.0  # seconds from its last word to its end


class WorkerFault(Exception):
    """The worker died, took too long, or said what no worker says; the message says which."""


class Worker:
    """A process that speaks `worker.py`'s messages.

    hello: what it said of itself.
    """

    def __init__(self, command: Sequence[str], patience: float) -> None:
        """Starts it.

        Args:
            command: the program and its arguments.
            patience: seconds until it must have said what it is.

        Raises:
            WorkerFault: it cannot be started, or died before it said a word.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._late = 0.0  # seconds that were too long for it
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for this process
            )
        except OSError as error:
            raise WorkerFault(f"{command[0]} cannot be started: {error.strerror or error}") from error
        self._end = weakref.finalize(self, _end, self._process)
        self.hello, _ = self._receive(patience)

    def ask(
        self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], answers: int, patience: float
    ) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """Send a request, and yield so many answers, header and arrays; `patience`: seconds for each.

        Raises:
            WorkerFault: after which the worker is of no use.
        """
        with self._watched(patience), suppress(BrokenPipeError):  # what it died of is told below
            write_message(self._process.stdin, header, **arrays)
        for _ in range(answers):
            yield self._receive(patience)

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._end()

    def _receive(self, patience: float) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            with self._watched(patience):
                return read_message(self._process.stdout)
        except EOFError:
            raise WorkerFault(self._cause_of_death()) from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WorkerFault(f"it spoke, but no message ({one_line(error)})") from error

    def _watched(self, patience: float) -> _Watch:
        return _Watch(patience, self._expire)

    def _expire(self, patience: float) -> None:
        self._late = patience
        self._process.kill()

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(_PARTING)
        except subprocess.TimeoutExpired:
            return "it fell silent"
        if self._late:
            return f"it took longer than {self._late:g} s"
        if code < 0:
            return f"it was killed by {signal.Signals(-code).name}" + " (out of memory?)" * (code == -signal.SIGKILL)
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(self._errors.tell() - 10_000, 0))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"it ended with status {code}" + f" ({last[:_LAST_WORDS]})" * bool(last)


class _Watch:
    """Calls `expire` with the seconds where its block takes longer."""

    def __init__(self, seconds: float, expire: Any) -> None:
        self._timer = Timer(seconds, expire, (seconds,))
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()

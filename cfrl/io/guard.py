"""One thing at a time in a process that may die or hang, for work on what a stranger's file holds.

A compiled library can abort, loop for ever without listening to signals, or fill the memory; then this process ends,
the caller gets the reason, and the next call starts another. It is a plain child, not one of multiprocessing, so that
the script of a caller need not be importable, and it costs its start only where it is used.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
SECONDS = 20.0  # for one call; what a crystal takes is a thousandth of it
STARTING = 120.0  # seconds until the child has imported what it needs
MEMORY = 4 << 30  # bytes that the child may take


class Lost(Exception):
    """The process died or took too long; the message says which."""


class Guard(Generic[T]):
    """Calls `function(*arguments)` in a child process; both must be picklable. Close it, or use it with `with`."""

    def __init__(self, function: Callable[..., T], seconds: float = SECONDS) -> None:
        self.function, self.seconds = function, seconds
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def __call__(self, *arguments: object) -> T:
        """What the function returns. Raises Lost; and RuntimeError for an exception of the function."""
        if self._process is None:
            self._start()
        failed, value = self._ask(arguments, self.seconds)
        if failed:
            raise RuntimeError(value)
        return value

    def _start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from cfrl.io.guard import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._ask(self.function, STARTING)

    def _ask(self, question: object, seconds: float) -> Any:
        process, late = self._process, threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            pickle.dump(question, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            self.close()
            raise Lost(f"took more than {seconds:g} s" if late.is_set() else "the process died on it") from error
        except BaseException:  # Ctrl-C: half an answer may be on its way
            self.close()
            raise
        finally:
            timer.cancel()


def serve() -> None:
    """Life of the child: take the function, then arguments until the other end closes."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _limit_memory()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    function = None
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if function is None:
            function, answer = question, None
        else:
            answer = _attempt(function, question)
        pickle.dump(answer, answers)
        answers.flush()


def _attempt(function: Callable[..., T], arguments: tuple) -> tuple[bool, T | str]:
    try:
        return False, function(*arguments)
    except Exception as error:
        return True, f"{type(error).__name__}: {error}"


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard), hard))

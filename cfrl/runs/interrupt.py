"""Ctrl-C and SIGTERM as a wish to stop at the next good moment, so that no step is lost; code that never ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from multiprocessing import resource_tracker
from typing import TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# After Ctrl-C torchrun asks its processes to end too, and kills them half a minute later.
LAUNCHED, BY_LAUNCHER = "TORCHELASTIC_RUN_ID", (signal.SIGTERM,)
GRACE = 10.0  # seconds that a call has left once a stop is wished
_POLL = 0.1  # seconds


@dataclass
class StopWish:
    """`requested` becomes True with the first signal, `when` (monotonic seconds) says since when."""

    requested: bool = False
    when: float = inf


class TooLong(Exception):
    """A call took longer than its limit."""


class Abandoned(KeyboardInterrupt):
    """A stop was wished during a call, and the call did not end in time."""


_wish = StopWish()  # of the innermost `stop_on_signal`


@contextmanager
def stop_on_signal() -> Iterator[StopWish]:
    """Within the block the first signal only sets the flag; a second one acts as it always does.

    Elsewhere than in the main thread, where Python has no signals, the flag stays False.
    """
    global _wish
    wish, outer = StopWish(), _wish
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def note(_number: int, _frame: object) -> None:
        wish.requested, wish.when = True, time.monotonic()
        restore(BY_LAUNCHER if LAUNCHED in os.environ else ())

    def restore(still: Collection[signal.Signals] = ()) -> None:
        for number, handler in previous.items():
            if number not in still:
                signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, note)
    _wish = wish
    try:
        yield wish
    finally:
        _wish = outer
        restore()


@contextmanager
def deaf_children() -> Iterator[None]:
    """Around the start of processes: Ctrl-C, which reaches all of a terminal, is for this process, and not yet.

    A mask, which children inherit, keeps it from them from their first moment on. Here it would not do: the kernel
    gives the signal to a thread that has no mask, and a process started by halves would outlive this one.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # if it were started within the block, it would lift the mask
    heard: list[int] = []
    main = threading.current_thread() is threading.main_thread()  # the only one whose work Ctrl-C interrupts
    handler = signal.signal(signal.SIGINT, lambda *_: heard.append(1)) if main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if main:
            signal.signal(signal.SIGINT, handler)
        if heard:
            signal.raise_signal(signal.SIGINT)


def call(function: Callable[[], T], limit: float | None = None) -> T:
    """`function()`, for code that may never end: after `limit` seconds (None: never) it is left alone.

    It runs in a thread of its own, which no exit waits for, since nothing can end a thread of Python from outside.

    Raises:
        TooLong: the limit has passed.
        Abandoned: a stop was wished, and `GRACE` seconds later the call was still at work.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # whatever it is, it belongs to the caller
            result.set_exception(error)

    thread, began = threading.Thread(target=work, daemon=True), time.monotonic()
    thread.start()
    thread.join(_POLL)
    while thread.is_alive():
        now = time.monotonic()
        if limit and now - began > limit:
            raise TooLong
        if now - max(began, _wish.when) > GRACE and _wish.requested:
            raise Abandoned
        thread.join(_POLL)
    return result.result()

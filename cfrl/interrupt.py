"""Ctrl-C and SIGTERM as a wish to stop at the next good moment, so that no step is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopWish:
    """`requested` becomes True with the first signal."""

    requested: bool = False


@contextmanager
def stop_on_signal() -> Iterator[StopWish]:
    """Within the block the first signal only sets the flag; a second one acts as it always does.

    Elsewhere than in the main thread, where Python has no signals, the flag stays False.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def note(_number: int, _frame: object) -> None:
        wish.requested = True
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        restore()

"""Work without gradients on a CPU, piece by piece on as many threads, or in as many processes, as torch has threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import current_process
from typing import TypeVar

import torch

from cfrl.errors import UserError
from cfrl.runs.engine import LocalEngine

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device, processes: bool = False
) -> Iterator[Result]:
    """What comes of each piece, in order.

    Products as small as this network's gain little from being shared among threads, and pieces that fit a cache gain
    nothing from being larger. So each piece has a thread to itself; what comes of it does not depend on their number.
    On other devices, and where gradients are recorded, one piece follows the other.

    Args:
        processes: pieces take seconds, of thousands of small operations, whose threads would wait for each other: each
            has a process to itself, where this one can be forked.

    Raises:
        UserError: a process was killed, twice.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(pieces) < 2 or torch.is_grad_enabled():
        yield from map(work, pieces)
        return
    if processes and sys.platform == "linux" and not current_process().daemon:  # whose children are not allowed
        yield from _forked(work, pieces, threads)
        return

    def one(piece: Piece) -> Result:
        with torch.no_grad():  # which is each thread's own
            return work(piece)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(one, pieces)
    finally:
        torch.set_num_threads(threads)


def _forked(work: Callable[[Piece], Result], pieces: Sequence[Piece], processes: int) -> Iterator[Result]:
    def some(pieces: list[Piece]) -> list[Result]:
        torch.set_num_threads(1)
        return [work(piece) for piece in pieces]

    waiting, next_one = {}, 0
    with LocalEngine(min(processes, len(pieces)), inherited=some) as engine:
        for number, (result,) in engine.map(None, [[piece] for piece in pieces]):
            if result is None:
                raise UserError(
                    "a worker process was killed, twice (out of memory?); do less at once, such as with --draw-size"
                )
            waiting[number] = result
            while next_one in waiting:
                yield waiting.pop(next_one)
                next_one += 1

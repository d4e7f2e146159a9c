"""Work without gradients on a CPU, piece by piece on as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Piece], Result], pieces: Sequence[Piece], device: torch.device) -> Iterator[Result]:
    """What comes of each piece, in order.

    Products as small as this network's gain little from being shared among threads, and pieces that fit a cache gain
    nothing from being larger. So each piece has a thread to itself; what comes of it does not depend on their number.
    On other devices, and where gradients are recorded, one piece follows the other.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(pieces) < 2 or torch.is_grad_enabled():
        yield from map(work, pieces)
        return

    def one(piece: Piece) -> Result:
        with torch.no_grad():  # which is each thread's own
            return work(piece)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(one, pieces)
    finally:
        torch.set_num_threads(threads)

"""One progress bar for all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[..., None]  # advance(done, total=None, note="")


def no_progress(done: int, total: int | None = None, note: str = "") -> None:
    """For work that nobody watches."""


@contextmanager
def progress_bar(label: str, total: int | None, console: Console | None, download: bool = False) -> Iterator[Advance]:
    """Shows how much is done, and the time left, while the block runs; yields `advance(done, total=None, note="")`.

    The bar goes to stderr: in a terminal and a notebook it moves, into a pipe or a file goes its last state alone.

    Args:
        total: None: not known before `advance` is told.
        console: where the command prints; none is shown if that is None or quiet.
        download: the numbers are bytes from the net.
    """
    if console is None or console.quiet:
        yield no_progress
        return
    amount = [DownloadColumn(), TransferSpeedColumn()] if download else [TextColumn("{task.fields[note]}")]
    columns = (TextColumn(label), BarColumn(), *amount, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    # What is printed meanwhile stays above the bar, where both go to a terminal; into a pipe it goes as ever.
    above = sys.stdout is not None and sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=above) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(done: int, total: int | None = total, note: str = "") -> None:
            progress.update(task, completed=done, total=total or None, note=note or f"{done:,}/{total or 0:,}")

        advance(0)
        yield advance

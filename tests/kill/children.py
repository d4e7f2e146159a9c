"""Commands as child processes, forked from this one, which has imported everything: a start costs milliseconds.

A child counts what it writes below its folder (files opened for writing, renamed, removed; folders made; files forced
to the disk; rows logged), and can be told to kill itself right before the k-th of these events. Between two of them
the files do not change, so these are all the states that a kill can leave, but for halves of a single write.
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT = 300  # seconds until a child counts as hanging
_GRACE = 20  # seconds for a killed command's own workers to notice
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Aim:
    """A kill: by which signal, and before which event (from 1) or, if that is 0, how many seconds after the start."""

    number: signal.Signals
    event: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        when = f"before event {self.event}" if self.event else f"after {self.seconds:.2f} s"
        return f"{self.number.name} {when}"


@dataclass
class Ended:
    """How a child ended: its return code (negative: the signal; None: it hung), its output, and lingering workers."""

    code: int | None
    output: str
    seconds: float
    lingering: int = 0


def run(arguments: list[str], folder: Path, aim: Aim | None = None, trace: Path | None = None) -> Ended:
    """Run `cfrl ARGUMENTS` in a folder, to its end or to its kill.

    Args:
        arguments: of the command line.
        folder: working folder of the child.
        aim: when to kill it; None: not at all.
        trace: a file for the names of all events, one a line.
    """
    output = folder.with_suffix(".out")
    start = time.monotonic()
    child = os.fork()
    if not child:
        _live(arguments, folder, output, aim, trace)
    code = _wait(child, start, aim if aim and not aim.event else None)
    seconds = time.monotonic() - start
    lingering = _end_workers(child)
    text = output.read_text(errors="replace") if output.exists() else ""
    return Ended(code, text, seconds, lingering)


def _wait(child: int, start: float, aim: Aim | None) -> int | None:
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - start
        if aim and passed >= aim.seconds:
            _strike(child, aim.number)
            aim = None
        if passed > LIMIT:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


def _strike(child: int, number: signal.Signals) -> None:
    """Ctrl-C reaches all of a terminal's processes, the other signals the command alone."""
    with suppress(ProcessLookupError):
        (os.killpg if number == signal.SIGINT else os.kill)(child, number)


def _end_workers(session: int) -> int:
    """Wait until nothing is left of a child's session; what does not go by itself is ended and counted."""
    deadline = time.monotonic() + _GRACE
    while (left := _processes_of(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(left)


def _processes_of(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, of = entry.read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found.append(int(entry.parent.name))
    return found


# ---- in the child ------------------------------------------------------------------------------------------------


def _live(arguments: list[str], folder: Path, output: Path, aim: Aim | None, trace: Path | None) -> None:
    """The whole life of a child; does not return."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for number, place, flags in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
            os.dup2(os.open(place, flags), number)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _count_events(str(folder.resolve()), aim, trace)
        sys.argv = ["cfrl", *arguments]
        runpy.run_module("cfrl.cli", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_events(root: str, aim: Aim | None, trace: Path | None) -> None:
    from cfrl.runs.folder import RunFolder

    me, done = os.getpid(), 0
    record = os.fdopen(os.open(trace, os.O_WRONLY | os.O_CREAT), "w", 1) if trace else None

    def happen(what: str, path: str) -> None:
        nonlocal done
        path = os.path.abspath(path)
        if os.getpid() != me or not path.startswith(root) or "/tensorboard" in path:
            return
        done += 1
        if record:
            record.write(f"{what} {re.sub(r'[.][^.]+[.]tmp$', '.tmp', os.path.basename(path))}\n")
        if aim and done == aim.event:
            _strike(me, aim.number)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in _CHANGES) and isinstance(arguments[0], str | Path):
            happen(event, str(arguments[event == "os.rename"]))

    sys.addaudithook(audit)
    fsync, log = os.fsync, RunFolder.log

    def forced(file: int) -> None:
        happen("fsync", os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def logged(run: RunFolder, *rest: Any) -> None:
        happen("log", str(run.path / "metrics.csv"))
        log(run, *rest)

    os.fsync, RunFolder.log = forced, logged

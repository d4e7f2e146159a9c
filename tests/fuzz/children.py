"""Cases in child processes, forked from this one, which has imported everything: a case costs milliseconds.

A child does several cases one after another, each in a folder of its own, and tells what came of each. Processor time
and memory are limited for each case; a child that dies or hangs is the outcome of its case, and another takes over.
"""

from __future__ import annotations

import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from cfrl import cli
from cfrl.io import guard
from tests.fuzz.cases import Area, Case

GOOD = ("accepted", "refused")
BAD = {
    "fault": "a traceback, 'a fault of cfrl', an exit status of its own, or death by a signal",
    "unclear": "refused, but not in one line that names the file or the setting",
    "hang": "more processor or wall time than the limit",
    "memory": "grew by more than the limit",
    "silent": "accepted, though an oracle says that it is wrong",
    "mistaken": "refused, though an oracle says that it is sound",
}
_BATCH = 40  # cases of one child
_ADDRESS = 3 << 30  # bytes that a case may ask for; beyond, the system refuses


@dataclass(frozen=True)
class Limits:
    """Of one case: seconds of processor time (of wall time, four times that), and MB that the process may grow by."""

    seconds: int = 30
    megabytes: int = 600


@dataclass(frozen=True)
class Result:
    """What came of a case: one of `GOOD` or `BAD`, and its first line."""

    number: int
    area: str
    outcome: str
    line: str = ""
    seconds: float = 0.0


def run(
    areas: dict[str, Area], numbers: Iterable[int], seed: int, folder: Path, workers: int, limits: Limits
) -> Iterator[Result]:
    """Results of the cases with these numbers, as they come."""
    areas_of = list(areas)
    waiting = deque(numbers)
    children: dict[Connection, _Child] = {}
    try:
        while waiting or children:
            while waiting and len(children) < workers:
                batch = [waiting.popleft() for _ in range(min(_BATCH, len(waiting)))]
                child = _Child(areas, batch, seed, folder, limits)
                children[child.pipe] = child
            for pipe in wait(list(children), timeout=1):
                child = children[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    outcome = child.end()
                    del children[pipe]
                    if child.left:
                        number = child.left.popleft()
                        yield Result(number, areas_of[number % len(areas)], *outcome)
                    waiting.extendleft(reversed(child.left))
                    continue
                child.since = time.monotonic()
                if isinstance(message, Result):
                    child.left.popleft()
                    yield message
            for child in children.values():
                if time.monotonic() - child.since > 4 * limits.seconds:
                    child.late = True
                    child.kill()
    finally:
        for child in children.values():
            child.kill()
            child.end()


class _Child:
    """left: cases not yet done, the first of them at work. since: when that began, seconds."""

    def __init__(self, areas: dict[str, Area], batch: list[int], seed: int, folder: Path, limits: Limits) -> None:
        self.left, self.since, self.late = deque(batch), time.monotonic(), False
        self.pipe, theirs = Pipe(duplex=False)
        self.folder = folder / f"{batch[0]}"
        self.process = os.fork()
        if not self.process:
            _live(areas, batch, seed, self.folder, limits, theirs)
        theirs.close()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)

    def end(self) -> tuple[str, str]:
        """The outcome of the case at which the child ended."""
        _, status = os.waitpid(self.process, 0)
        self.kill()  # what it had started
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        if self.late or code == -signal.SIGXCPU:
            return "hang", "took too long"
        return "fault", f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


# ---- in the child ------------------------------------------------------------------------------------------------


def _live(areas: dict[str, Area], batch: list[int], seed: int, folder: Path, limits: Limits, pipe: Connection) -> None:
    """The whole life of a child; does not return."""
    code = 70
    try:
        os.setpgid(0, 0)
        guard.Guard._start = _start_forked
        names = list(areas)
        for number in batch:
            name, work = names[number % len(names)], folder / str(number)
            work.mkdir(parents=True)
            os.chdir(work)
            pipe.send(number)
            start = time.monotonic()
            outcome, line = _attempt(areas[name], random.Random(f"{seed}:{number}"), folder / "output", limits)
            pipe.send(Result(number, name, outcome, line, time.monotonic() - start))
            os.chdir(folder)
            shutil.rmtree(work, ignore_errors=True)
        code = 0
    finally:
        os._exit(code)


def _attempt(area: Area, rng: random.Random, output: Path, limits: Limits) -> tuple[str, str]:
    try:
        case = area(rng)
    except Exception:
        return "fault", f"the harness: {traceback.format_exc()}"
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    used = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + limits.seconds, -1))
    resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + _ADDRESS, -1))
    code, text = _run(case, output)
    grown = (_memory("VmHWM") - before) >> 20
    resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
    if grown > limits.megabytes or re.search(r"MemoryError|allocate memory|Unable to allocate|bad_alloc", text):
        return "memory", f"grew by {grown} MB; {text[-300:]}"
    return judge(case, code, text)


def judge(case: Case, code: int, text: str) -> tuple[str, str]:
    """Outcome, and the line that goes with it."""
    complaints = [line for line in text.splitlines() if line.startswith("cfrl: error: ")]
    if "Traceback (most recent call last)" in text or "fault of cfrl" in text or code not in (0, 2):
        return "fault", f"{code}: {complaints[0] if complaints else text[-2000:]}"
    if code == 0:
        problem = case.wrong or case.check()
        return ("silent", problem) if problem else ("accepted", "")
    usage = re.sub(r"[\s│]+", " ", text) if "╭─ Error" in text else ""
    line = complaints[0] if len(complaints) == 1 and text.rstrip().endswith(complaints[0]) else usage
    if case.sound:
        return "mistaken", line or text
    if not line or len(line) > 1500 or not any(name[:60] in line for name in case.names):
        return "unclear", f"{' '.join(case.names)}: {line or text}"
    return "refused", line


def _run(case: Case, output: Path) -> tuple[int, str]:
    """Exit status, and all that was printed."""
    target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(target, number)
    stream = io.TextIOWrapper(io.FileIO(target, "w"), errors="backslashreplace", line_buffering=True)
    sys.stdout = sys.stderr = stream
    code = 0
    try:
        if callable(case.command):
            case.command()
        else:
            sys.argv = ["cfrl", *case.command]
            cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        code = cli._complain(error)
    except BaseException:
        traceback.print_exc()
        code = 1
    stream.flush()
    text = output.read_text(errors="replace")
    stream.close()
    return code, text


def _memory(name: str) -> int:
    """Bytes, of /proc/self/status."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) << 10


class _Forked:
    """Stands for the `Popen` of a guard's process: forked instead of started, which saves seconds of imports."""

    def __init__(self) -> None:
        (read, self_out), (self_in, write) = os.pipe(), os.pipe()
        self.process = os.fork()
        if not self.process:
            try:
                for number, file in enumerate((read, write, os.open(os.devnull, os.O_WRONLY))):
                    os.dup2(file, number)
                os.closerange(3, 1024)
                sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.FileIO(0)), None, None
                guard.serve()
            finally:
                os._exit(1)
        os.close(read)
        os.close(write)
        self.stdin, self.stdout = os.fdopen(self_out, "wb"), os.fdopen(self_in, "rb")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)

    def communicate(self) -> None:
        for stream in (self.stdin, self.stdout):
            with suppress(OSError):
                stream.close()
        with suppress(ChildProcessError):
            os.waitpid(self.process, 0)


def _start_forked(self: guard.Guard) -> None:
    self._process = _Forked()
    self._ask(self.function, guard.STARTING)

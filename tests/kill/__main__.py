"""`python -m tests.kill --kills 200 --seed 0`: a table of what became of killed commands; exit status 1 if any failed.

For each command, first a run without a kill, with a list of its events (see children.py). Then cases: the command is
killed (half of the time before one of these events, each kind of event at least once where there are kills enough;
else at a random moment), sometimes killed again while it goes on, and at last let go on to its end. The result must be
that of the run without a kill.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cfrl.files import provenance
from tests.kill import jobs
from tests.kill.children import Aim, Ended, run
from tests.kill.jobs import JOBS, Job, Result

PRELOADED = (  # so that no child has to
    "cfrl.model.training",
    "cfrl.rl.loop",
    "cfrl.commands.screen",
    "cfrl.screening.retrieval",
    "cfrl.cli",
    "cfrl.stability.hull",
    "cfrl.screening.ranking",
    *("matplotlib.pyplot", "torch.utils.tensorboard", "torch._dynamo", "scipy.stats", "pymatgen.io.cif"),
)
OUTCOMES = ("recovered", "lost rows", "wrong result", "cannot resume", "hang", "fault")
SIGNALS = [signal.SIGKILL] * 8 + [signal.SIGTERM] * 2 + [signal.SIGINT] * 2


@dataclass
class Reference:
    """A run without a kill: what came out, the names of its events, how long it took."""

    result: Result
    events: list[str]
    seconds: float


@dataclass
class Case:
    """Kills of one job, one after the other: `aims` of the first start, then of going on."""

    job: str
    number: int
    aims: list[Aim]


@dataclass
class Outcome:
    """What became of a case."""

    case: Case
    outcome: str
    kills: int
    detail: str = ""
    where: list[str] = field(default_factory=list)


# ---- one case ----------------------------------------------------------------------------------------------------


def make_reference(name: str, root: Path) -> Reference:
    job, folder = JOBS[name], _folder(root, name, 0)
    job.lay(root / "inputs", folder)
    trace = folder.with_suffix(".events")
    ended = run(job.arguments(root / "inputs"), folder, trace=trace)
    if ended.code != 0:
        raise RuntimeError(f"{name} fails without any kill:\n{ended.output}")
    return Reference(job.result(folder), trace.read_text().splitlines(), ended.seconds)


def run_case(case: Case, reference: Reference, root: Path) -> Outcome:
    job, folder = JOBS[case.job], _folder(root, case.job, case.number)
    job.lay(root / "inputs", folder)
    kills, done = 0, {}

    def outcome(text: str, ended: Ended) -> Outcome:
        kind, _, detail = text.partition(": ")
        return Outcome(case, kind, kills, f"{detail}\n{ended.output[-1500:]}" if detail else "")

    for aim in case.aims:
        ended = run(_arguments(job, root, folder), folder, aim)
        kills += ended.code != 0
        if problem := _after_kill(ended, folder, done):
            return outcome(problem, ended)
        done = jobs.journals(folder)
    ended = run(_arguments(job, root, folder), folder)
    return outcome(_verdict(job, ended, folder, reference, done), ended)


def _folder(root: Path, name: str, number: int) -> Path:
    folder = root / f"{name}-{number}"
    folder.mkdir()
    return folder


def _arguments(job: Job, root: Path, folder: Path) -> list[str]:
    return job.resume(folder) or job.arguments(root / "inputs")


def _after_kill(ended: Ended, folder: Path, done: dict[Path, bytes]) -> str:
    if ended.code is None:
        return "hang: it did not end"
    if ended.lingering:
        return f"hang: {ended.lingering} of its processes outlived it"
    if ended.code > 0 and ("Traceback" in ended.output or "fault of cfrl" in ended.output):
        return "fault: a traceback"
    if ended.code == 2:
        return "cannot resume: refused"
    return jobs.broken_file(folder) or jobs.forgotten(done) or jobs.unsaved(ended.output, folder)


def _verdict(job: Job, ended: Ended, folder: Path, reference: Reference, done: dict[Path, bytes]) -> str:
    if ended.code is None:
        return "hang: it did not end"
    if ended.code != 0:
        return f"cannot resume: exit status {ended.code}"
    if ended.lingering:
        return f"hang: {ended.lingering} of its processes outlived it"
    try:
        found = job.result(folder)
    except Exception as error:
        return f"wrong result: {type(error).__name__}: {error}"
    return jobs.difference(reference.result, found, job.tolerance) or jobs.forgotten(done) or "recovered"


# ---- all of them -------------------------------------------------------------------------------------------------


def plan(kills: int, references: dict[str, Reference], random_: random.Random, before: int, pattern: str) -> list[Case]:
    """Cases with `kills` kills in all, shared out among the jobs; `before`: how many cases there were already."""
    parts = sum(JOBS[name].share for name in references)
    cases = []
    bounds = [0.0]
    for name in references:
        bounds.append(bounds[-1] + kills * JOBS[name].share / parts)
    for (name, reference), low, high in zip(references.items(), bounds, bounds[1:], strict=False):
        left = round(high) - round(low)
        aims = _aims(reference, left, random_, pattern)
        while aims:
            count = min(len(aims), 1 + (random_.random() < 0.25) + (random_.random() < 0.1))
            cases.append(Case(name, before + len(cases) + 1, [aims.pop() for _ in range(count)]))
    return cases


def _aims(reference: Reference, count: int, random_: random.Random, pattern: str) -> list[Aim]:
    aimed = _spread(reference.events, count if pattern else (count + 1) // 2, random_, pattern)
    moments = [random_.uniform(0, reference.seconds) for _ in range(count - len(aimed))]
    aims = [Aim(random_.choice(SIGNALS), event=event) for event in aimed]
    aims += [Aim(random_.choice(SIGNALS), seconds=moment) for moment in moments]
    random_.shuffle(aims)
    return aims


def _spread(events: list[str], count: int, random_: random.Random, pattern: str) -> list[int]:
    """Numbers of `count` matching events: one of each kind, then a second one of each, and so on, in random order."""
    numbers = [number for number, event in enumerate(events, 1) if re.search(pattern, event)]
    random_.shuffle(numbers)
    earlier: Counter[str] = Counter()
    turn = {}
    for number in numbers:
        turn[number] = earlier[events[number - 1]]
        earlier[events[number - 1]] += 1
    numbers.sort(key=turn.__getitem__)
    return numbers[:count]


def show(outcomes: list[Outcome], seconds: float) -> None:
    """The table, and what each failure was."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        for row in (JOBS[outcome.case.job].command, "all"):
            table[row][outcome.outcome] += 1
            table[row]["cases"] += 1
            table[row]["kills"] += outcome.kills
    head = ("kills", "cases", *OUTCOMES)
    print(f"{'command':<10}" + "".join(f"{name:>15}" for name in head))
    for row in [name for name in table if name != "all"] + ["all"]:
        print(f"{row:<10}" + "".join(f"{table[row][name]:>15}" for name in head))
    print(f"{seconds / 60:.1f} minutes")
    for outcome in outcomes:
        if outcome.outcome != "recovered":
            aims = ", then ".join(map(str, outcome.case.aims))
            print(f"\n{outcome.outcome}: {outcome.case.job}, case {outcome.case.number}, {aims}: {outcome.detail}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default=",".join(JOBS), help="which ones")
    parser.add_argument("--aim", default="", help="kill only before events that match, e.g. 'rename checkpoint'")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument("--folder", help="an empty folder where everything stays; else a temporary one")
    options = parser.parse_args(arguments)
    root = Path(options.folder or tempfile.mkdtemp(prefix="kill-")).resolve()
    (root / "inputs").mkdir(parents=True)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    provenance()  # asks git once instead of in every child
    start = time.monotonic()
    names = options.jobs.split(",")
    # Each lane forks its children itself; it has no threads that a fork would lose.
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("fork")) as lanes:
        lanes.submit(jobs.prepare, root / "inputs").result()
        references = dict(zip(names, lanes.map(make_reference, names, [root] * len(names)), strict=True))
        outcomes: list[Outcome] = []
        random_ = random.Random(options.seed)
        while (left := options.kills - sum(outcome.kills for outcome in outcomes)) > 0:  # some come after the end
            cases = plan(left, references, random_, len(outcomes), options.aim)
            running = [lanes.submit(run_case, case, references[case.job], root) for case in cases]
            outcomes += [future.result() for future in running]
    show(outcomes, time.monotonic() - start)
    return int(any(outcome.outcome != "recovered" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

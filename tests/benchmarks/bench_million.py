"""How seconds and memory grow with the number of crystals.

    python tests/benchmarks/bench_million.py [ROWS ...] [--folder FOLDER] [--draws FILE.h5] [--json FILE]

The rows are random draws of the embedded default model: no such dataset can be had offline. Each step is a process of
its own, its memory that of its largest process. What is in the folder already is not made again; with `--draws` the
rows are the first of that file. The exponent is that of the growth from one number of rows to the next.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from rich.console import Console
from rich.table import Table

QUERIES = 1000  # crystals that are looked up among all


def hull(path: str) -> None:
    """The hull of all rows, and the distances of some from it; energies are random, compositions are not."""
    from cfrl.io.storage import iter_crystals
    from cfrl.stability.hull import ReferenceHull

    rng, hull = np.random.default_rng(0), None
    for batch in iter_crystals(path):
        energies = rng.normal(-4, 1, len(batch))
        if hull is None:
            hull = ReferenceHull.from_compositions(batch, energies, "mp2020")
        else:
            hull.add(batch, energies)
        last = batch[:QUERIES], energies[:QUERIES]
    hull.e_above_hull(*last)


def duplicates(path: str) -> None:
    """Which rows have the fingerprint of an earlier one."""
    from cfrl.crystals.fingerprint import fingerprints, firsts
    from cfrl.io.storage import iter_crystals

    firsts([name for batch in iter_crystals(path) for name in fingerprints(batch)])


def novelty(path: str) -> None:
    """Which formulas are known, where those of all rows are."""
    from cfrl.crystals.known import KnownFormulas
    from cfrl.io.storage import iter_crystals

    known = KnownFormulas.of(name for batch in iter_crystals(path) for name in batch.formulas())
    for batch in iter_crystals(path):
        known.holds(batch.formulas())


def steps(rows: int, draws: str | None) -> dict[str, list[str]]:
    """Arguments after `python`, by what they do."""
    cut = "import sys; from cfrl.io.storage import read_crystals, write_crystals; "
    cut += "write_crystals('draws.h5', read_crystals(sys.argv[1], stop=int(sys.argv[2])))"
    cfrl, here = ["-m", "cfrl"], [__file__, "--step"]
    return {
        "draw": ["-c", cut, draws, str(rows)] if draws else [*cfrl, "sample", "-n", str(rows), "-o", "draws.h5"],
        "write extxyz": [*cfrl, "convert", "draws.h5", "draws.extxyz"],
        "import it": [*cfrl, "data", "import", "draws.extxyz", "-o", "data.h5", "--validation", "0.001"],
        "info": [*cfrl, "data", "info", "data.h5"],
        "pretrain on 1%": [
            *(*cfrl, "pretrain", "--dataset", "data.h5", "--weights", "0.01", "--epochs", "1"),
            *("--preset", "tiny", "--exchange", "0"),
        ],
        "retrieve": [
            *(*cfrl, "retrieve", "--run", "stable", "--dataset", "data.h5", "--samples", "0"),
            *("--reward-crystals", "0"),
        ],
        **{name: [*here, name, "data.h5"] for name in FUNCTIONS},
    }


FUNCTIONS = {"duplicates": duplicates, "novelty": novelty, "hull": hull}
MAKES = {"draw": "draws.h5", "write extxyz": "draws.extxyz", "import it": "data.h5"}


def measured(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and GiB of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)}: {error}")
    return time.perf_counter() - began, usage.ru_maxrss / 2**20


def show(told: dict[str, dict[int, tuple[float, float]]]) -> None:
    sizes = sorted({rows for found in told.values() for rows in found})
    table = Table("", *(f"{rows:,}: s, GiB" for rows in sizes), *(f"to {rows:,}" for rows in sizes[1:]))
    for name, found in told.items():
        cells = [f"{found[rows][0]:.1f}, {found[rows][1]:.2f}" if rows in found else "" for rows in sizes]
        for less, more in pairwise(sizes):
            both = less in found and more in found
            growth = both and math.log(found[more][0] / found[less][0]) / math.log(more / less)
            cells.append(f"{growth:.2f}" if both else "")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where files and figures go, and are found again; none: nowhere")
    parser.add_argument("--draws", type=Path)
    parser.add_argument("--json", type=Path, help="seconds and GiB by step and rows")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        sys.exit(FUNCTIONS[given.step[0]](given.step[1]))
    told: dict[str, dict[int, tuple[float, float]]] = {}
    with TemporaryDirectory() as temporary:
        for rows in given.rows:
            folder = (given.folder or Path(temporary)) / str(rows)
            folder.mkdir(parents=True, exist_ok=True)
            for name, arguments in steps(rows, given.draws and str(given.draws.resolve())).items():
                if not (folder / MAKES.get(name, "-")).exists():
                    told.setdefault(name, {})[rows] = measured(arguments, folder)
            show(told)
    if given.json:
        given.json.write_text(json.dumps(told))

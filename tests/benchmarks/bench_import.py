"""How many structures a second `cfrl data import` takes from CIF text to HDF5, start-up included.

    python tests/benchmarks/bench_import.py [FILE] [--workers 2]

Without a file, mp_20.csv.gz of the development data is read. Also printed: the two halves of the work in one process
(CPU time), and pymatgen's parser on the same rows.
"""

import argparse
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from conftest import SHARED
from rich.console import Console
from rich.table import Table

from cfrl.commands.data import run_import
from cfrl.config import DataConfig
from cfrl.crystals import analysis
from cfrl.crystals.symmetry import SymmetryError
from cfrl.io import readers

SAMPLE = 1000  # entries for the rates of the parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=SHARED / "data" / "mp_20.csv.gz")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    table = Table("work", "structures", "seconds", "per second")

    def row(name: str, count: int, seconds: float) -> None:
        table.add_row(name, f"{count:,}", f"{seconds:.1f}", f"{count / seconds:,.0f}")

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = run_import(
            [str(arguments.file)], Path(folder) / "out.h5", replace(DataConfig(), workers=arguments.workers)
        )
        row(
            f"import, {arguments.workers} processes, CIF text to HDF5",
            len(done.crystals) + len(done.dropped),
            time.perf_counter() - start,
        )

    entries = [entry for _, (_, entry) in zip(range(SAMPLE), readers.iter_entries(arguments.file), strict=False)]
    start = time.process_time()
    cells = [readers.parse(entry.kind, entry.payload) for entry in entries]
    row("parse, one process, CPU time", len(entries), time.process_time() - start)
    start = time.process_time()
    for cell in cells:
        try:
            analysis.analyse(*cell)
        except SymmetryError:
            continue
    row("symmetry, one process, CPU time", len(entries), time.process_time() - start)

    from pymatgen.core import Structure

    warnings.simplefilter("ignore")
    start = time.process_time()
    for entry in entries[:100]:
        Structure.from_str(entry.payload, fmt="cif")
    row("pymatgen's CIF parser, CPU time", len(entries[:100]), time.process_time() - start)
    Console().print(table)


if __name__ == "__main__":
    main()

"""Rates of orbit expansion and of conversions, on 1,000 real crystals and one core.

Run:  python tests/benchmarks/bench_symmetry.py

Target: orbit expansion of a batch of 1,000 at 20,000 crystals/s.
"""

import csv
import gzip
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Structure

from cfrl.crystals import symmetry
from cfrl.crystals.crystal import CrystalBatch

MP_20 = Path(__file__).resolve().parents[3] / "shared" / "data" / "mp_20.csv.gz"
CRYSTALS = 1000
ROUNDS = 5


def real_structures() -> tuple[str, list[Structure]]:
    """Materials Project crystals when the development data is there, else pymatgen's prototypes."""
    if not MP_20.exists():
        prototypes = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
        return "prototypes", (prototypes * (CRYSTALS // len(prototypes) + 1))[:CRYSTALS]
    with gzip.open(MP_20, "rt") as file:
        rows = [row for row, _ in zip(csv.DictReader(file), range(CRYSTALS), strict=False)]
    return "mp_20", [Structure.from_str(row["cif"], fmt="cif") for row in rows]


def rate(function: Callable[[], object]) -> float:
    """Crystals per second of processor time (others may share the machine), the best of several rounds."""
    times = []
    for _ in range(ROUNDS):
        begin = time.process_time()
        function()
        times.append(time.process_time() - begin)
    return CRYSTALS / min(times)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the CIF parser
    name, structures = real_structures()
    crystals = CrystalBatch.from_structures(structures, errors="skip")
    crystals = CrystalBatch.cat([crystals, crystals])[:CRYSTALS]
    last = crystals.num_descriptions() - 1
    work = {
        "orbit expansion": lambda: symmetry.expand_orbits(crystals.space_group, crystals.wyckoff, crystals.frac_coords),
        "shortest distances": crystals.shortest_distances,
        "validity": crystals.valid,
        "equivalent descriptions": lambda: crystals.described_as(last),
        "structures -> batch (moyo)": lambda: CrystalBatch.from_structures(structures, errors="skip"),
        "batch -> structures": crystals.to_structures,
    }
    print(f"{CRYSTALS} crystals of {name}, {float(crystals.num_atoms.double().mean()):.1f} atoms per cell, one core")
    for title, function in work.items():
        print(f"{title:28s} {rate(function):12,.0f} crystals/s")


if __name__ == "__main__":
    main()

"""Judge a screening's finds by SevenNet, which cannot be installed beside mace-torch: three steps, two environments.

    python scripts/judge_by_sevennet.py write runs/SCREEN finds.pkl                # here
    python scripts/judge_by_sevennet.py energies finds.pkl energies.pkl            # where `pip install sevenn` was
    python scripts/judge_by_sevennet.py judge finds.pkl energies.pkl mp_energies.csv.gz  # here

Finds: unique, novel, unflagged, within 0.1 eV/atom of the hull. Energies of the crystals as they were relaxed.
"""

import csv
import pickle
import sys
from pathlib import Path

import numpy as np


def write(run: str, out: str) -> None:
    from cfrl.io.storage import read_crystals

    with open(Path(run) / "table.csv", encoding="utf-8") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    crystals = read_crystals(Path(run) / "screen.h5")
    cells = []
    for name, structure in zip(crystals.ids, crystals.to_structures(), strict=True):
        if rows[name]["meta_sun"] == "1" and not rows[name]["flags"]:
            numbers = [site.specie.Z for site in structure]
            above = float(rows[name]["e_above_hull"])
            cells.append((structure.lattice.matrix, numbers, structure.frac_coords, above))
    Path(out).write_bytes(pickle.dumps(cells))


def energies(finds: str, out: str) -> None:
    from ase import Atoms
    from sevenn.calculator import SevenNetCalculator

    calculator, found = SevenNetCalculator("7net-l3i5", device="cpu"), []
    for matrix, numbers, positions, _ in pickle.loads(Path(finds).read_bytes()):
        atoms = Atoms(numbers=numbers, scaled_positions=positions, cell=matrix, pbc=True, calculator=calculator)
        found.append(atoms.get_potential_energy() / len(atoms))
    Path(out).write_bytes(pickle.dumps(found))


def judge(finds: str, energies: str, reference: str) -> None:
    from pymatgen.core import Lattice, Structure

    from cfrl.potentials.scales import mp2020_correction
    from cfrl.stability.hull import ReferenceHull

    cells = pickle.loads(Path(finds).read_bytes())
    structures = [Structure(Lattice(matrix), numbers, places) for matrix, numbers, places, _ in cells]
    energy = np.array(pickle.loads(Path(energies).read_bytes())) + [mp2020_correction(s) for s in structures]
    formulas = [s.composition.reduced_formula for s in structures]
    above = ReferenceHull.load(reference).e_above_hull(formulas, energy).e_above_hull
    own = np.array([cell[-1] for cell in cells])
    print(f"{len(own)} finds; within 0.1 eV/atom by SevenNet too: {np.mean(above <= 0.1):.1%}")
    below = own <= 0
    print(f"on or below the hull: {np.mean(below):.1%}; by both: {np.mean(below & (above <= 0)):.1%}")


if __name__ == "__main__":
    {"write": write, "energies": energies, "judge": judge}[sys.argv[1]](*sys.argv[2:])

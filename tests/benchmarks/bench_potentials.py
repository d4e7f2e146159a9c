"""Crystals per second of each potential on real crystals of mp_20 (prototypes where that is not at hand).

CHGNet's ASE calculator one by one, CHGNet's own batches, and ours: folded by symmetry, batched, pipelined.

    python tests/benchmarks/bench_potentials.py [--device cuda] [--json rates.json]
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable
from csv import DictReader
from pathlib import Path

import numpy as np
import torch
from pymatgen.core import Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from cfrl.potentials import load_potential
from cfrl.potentials.chgnet import CHGNetPotential

PATH = Path(__file__).resolve().parents[3] / "shared" / "data" / "mp_20.csv.gz"


def crystals(n: int) -> list[Structure]:
    if not PATH.is_file():
        from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

        return [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY if len(entry["snl"].structure) < 40][:n]
    with gzip.open(PATH, "rt") as file:
        rows = list(DictReader(file))
    step = len(rows) // n
    return [Structure.from_str(row["cif"], fmt="cif") for row in rows[: n * step : step]]


def rate(run: Callable[[list[Structure]], object], structures: list[Structure]) -> float:
    run(structures[:3])
    start = time.perf_counter()
    run(structures)
    return len(structures) / (time.perf_counter() - start)


def serial_ase(model: torch.nn.Module, device: str) -> Callable[[list[Structure]], object]:
    from chgnet.model import CHGNetCalculator
    from pymatgen.io.ase import AseAtomsAdaptor

    calculator = CHGNetCalculator(model, use_device=device)

    def run(structures: list[Structure]) -> None:
        for structure in structures:
            atoms = AseAtomsAdaptor.get_atoms(structure)
            atoms.calc = calculator
            atoms.get_potential_energy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="crystals a second by name: primitive and conventional cells")
    options = parser.parse_args()
    primitive = crystals(400)
    conventional = [SpacegroupAnalyzer(s, 0.01).get_conventional_standard_structure() for s in primitive[::4]]
    potential = load_potential("chgnet", options.device)
    whole = CHGNetPotential("0.3.0", torch.device(options.device), symmetry=False)
    model = potential.model
    print(f"{options.device}, torch threads: {torch.get_num_threads()}\n")
    rows = {
        "ASE calculator, one by one": (serial_ase(model, options.device), 60),
        "CHGNet's batches, energy": (lambda s: model.predict_structure(s, task="e"), 200),
        "CHGNet's batches, forces and stress": (lambda s: model.predict_structure(s, task="efs"), 60),
        "ours without symmetry, energy": (whole.compute, 200),
        "ours, energy": (potential.compute, 400),
        "ours, energy and features": (lambda s: potential.compute(s, features=True), 400),
        "ours, forces and stress": (lambda s: potential.compute(s, forces=True, stress=True), 400),
    }
    sizes = [np.mean([len(s) for s in group]) for group in (primitive, conventional)]
    print(f"{'crystals/s':36} primitive ({sizes[0]:.1f} atoms)  conventional ({sizes[1]:.1f} atoms)")
    told = {}
    for name, (run, n) in rows.items():
        with torch.no_grad() if "energy" in name else torch.enable_grad():
            told[name] = [rate(run, group[: max(n, 1)]) for group in (primitive, conventional)]
        print(f"{name:36} {told[name][0]:>14.1f} {told[name][1]:>24.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(told))


if __name__ == "__main__":
    main()

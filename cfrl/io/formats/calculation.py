"""What a DFT calculation says of its crystal, in the names and units of columns.

energy_per_atom: eV; energy_scale: which energies it may be compared with ("mp-raw", "r2scan", "qe-pbe", ...; absent:
unknown). max_force: eV/angstrom; pressure: GPa, positive where the cell wants to grow; band_gap: eV, 0 for a metal.
eps_electronic, eps_total: a third of the trace of the dielectric tensor, without and with the ions. converged: whether
the relaxation ended by itself (1, 0). run_type, hubbards, potcars: what corrections depend on.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from cfrl.io.formats.entry import Entry, stem, unpacked

if TYPE_CHECKING:
    from pymatgen.core import Structure

STEPS = ("relax", "static", "dielectric")  # folders of one crystal's calculations
# Files of one calculation, the most telling first: of a folder that has several, one is read.
RESULTS = re.compile(r"(vasprun|OUTCAR|CONTCAR|POSCAR)(\.(?:orig|static|relax\d*))?(\.xml)?")
_TELLING = ("vasprun", "OUTCAR", "CONTCAR", "POSCAR")


def calculation_entry(name: str, structure: Structure, values: dict[str, float | str], identity: str = "") -> Entry:
    """An entry of a finished calculation; what is not known of it (NaN) is left out of the values."""
    known = {k: v for k, v in values.items() if isinstance(v, str) or not math.isnan(v)}
    return Entry(name, 1, identity or folder_name(name), "dict", structure.as_dict(), known)


def mechanics(forces: np.ndarray | None, stress: np.ndarray | None) -> dict[str, float]:
    """Of forces (N, 3) in eV/angstrom and a stress (3, 3) in GPa, positive under compression."""
    found = {}
    if forces is not None and len(forces):
        found["max_force"] = float(np.linalg.norm(forces, axis=1).max())
    if stress is not None and np.shape(stress) == (3, 3):
        found["pressure"] = float(np.trace(stress) / 3)
    return found


def folder_name(name: str) -> str:
    """What a calculation is called: as its folder, or as its file where that has a name of its own."""
    path = unpacked(PurePath(name))
    parent = path.parent
    if not parent.name or not (RESULTS.fullmatch(path.name) or path.name == "data-file-schema.xml"):
        return stem(name)
    if parent.name in STEPS and parent.parent.name:
        return f"{parent.parent.name}-{parent.name}"
    return parent.name


def most_telling(paths: list) -> list:
    """The files without those that tell less of the same calculation than another of their folder."""
    best: dict[PurePath, tuple] = {}
    for path in paths:
        match = RESULTS.fullmatch(unpacked(path).name)
        if match:
            rank = (-_TELLING.index(match[1]), match[2] is None or "orig" not in match[2], path.name)
            best[path.parent] = max(best.get(path.parent, (rank, path)), (rank, path))
    kept = {path for _, path in best.values()}
    stored = {path.with_suffix(".save") for path in paths if path.suffix == ".xml"}  # Quantum ESPRESSO writes it twice
    return [
        path
        for path in paths
        if (path in kept or not RESULTS.fullmatch(unpacked(path).name))
        and not (path.name == "data-file-schema.xml" and path.parent in stored)
    ]

"""What a screening does with crystals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cfrl.settings import (
    DEVICES,
    POTENTIAL_HELP,
    POTENTIALS,
    Count,
    CountOrZero,
    Distance,
    Range,
    Settings,
    Tolerance,
    option,
)


@dataclass(frozen=True)
class ScreeningOptions(Settings):
    """Stages, and their limits."""

    validity: bool = option(True, "Check distances, volume, density and charge neutrality; invalid ones go no further.")
    unique: bool = option(True, "Look for duplicates and for known crystals; duplicates go no further.")
    relax: bool = option(True, "Relax positions and cell with the potential.")
    stability: bool = option(True, "Compute energies and distances to the convex hull.")
    potential: str = option("chgnet", POTENTIAL_HELP, choices=POTENTIALS)
    min_distance: Distance = option(0.5, "Angstrom; crystals with atoms closer than this are invalid.")
    max_density: Annotated[float, Range(0, 1000, open_below=True)] = option(
        40.0, "g/cm^3; denser crystals are invalid."
    )
    symprec: Tolerance = option(0.01, "Angstrom; how far atoms may be off the symmetry that is looked for.")
    free: bool = option(False, "Let the relaxation break the space group.")
    fmax: Annotated[float, Range(0, 10, open_below=True)] = option(
        0.05, "eV/angstrom; the relaxation ends when all forces are smaller."
    )
    steps: CountOrZero = option(200, "Steps of the relaxation at most; what is not relaxed by then is marked so.")
    metastable: Annotated[float, Range(0, 10)] = option(
        0.1, "eV/atom above the hull up to which a crystal is metastable, and a candidate."
    )
    chunk: Count | None = option(None, "Crystals that a worker relaxes at once; 0: 16 on a CPU, 512 on a GPU.", unset=0)
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)

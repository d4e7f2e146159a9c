"""What a screening does with crystals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cfrl.model.options import ElementWishes
from cfrl.settings import (
    DEVICES,
    POTENTIAL_HELP,
    POTENTIALS,
    Count,
    CountOrZero,
    Distance,
    Fraction,
    Minutes,
    Range,
    Seed,
    Settings,
    Temperature,
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
    judge: str | None = option(
        None,
        "Another potential, which relaxes what is metastable a little and gives a second opinion on its energy, e.g. "
        "`sevennet:7net-l3i5` (cfrl potentials add sevennet); empty: none.",
        choices=POTENTIALS,
        unset="",
    )
    judge_steps: CountOrZero = option(20, "Steps of the judge's own relaxation at most; 0: its energy as they stand.")
    need_both: bool = option(True, "Candidates must be metastable by the judge too; else it only adds its columns.")
    chunk: Count | None = option(None, "Crystals that a worker relaxes at once; 0: 32 on a CPU, 512 on a GPU.", unset=0)
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)

    describe: bool = option(
        False,
        "Columns to filter by: dimensionality of the bonds, oxidation states, Herfindahl-Hirschman indices, voids (pip "
        "install 'cfrl[pores]').",
    )
    elastic: bool = option(
        False, "Compute the elastic tensors of all candidates; what is mechanically unstable is none."
    )
    phonons: CountOrZero = option(
        0,
        "Compute the phonons of so many candidates, the first of the ranking (pip install 'cfrl[phonons]'); what is "
        "dynamically unstable is none; 0: no phonons.",
    )
    supercell: Annotated[float, Range(1, 100)] = option(
        10.0, "Angstrom; in the supercell of phonons no atom is nearer to its own image."
    )
    phonon_tolerance: Annotated[float, Range(0, 100)] = option(
        0.1, "THz; frequencies that are imaginary by more make a crystal dynamically unstable."
    )
    follow: bool = option(
        False,
        "With phonons: displace what is dynamically unstable along its lowest mode, relax it without symmetry, and "
        "screen what comes of it.",
    )


@dataclass(frozen=True)
class ProtocolOptions(Settings):
    """Figures by a protocol of the field."""

    protocol: Literal["lemat"] | None = option(
        None, "Also figures by the definitions of LeMat-GenBench: `lemat`; empty: none.", unset=""
    )
    protocol_data: str | None = option(
        None,
        "The benchmark's own tables: the folder data/ of lemat-genbench; empty: what stands in for them.",
        unset="",
    )
    submission: str | None = option(
        None, "Folder to make for its leaderboard: exactly 2,500 CIFs and a card; empty: none.", unset=""
    )
    submit: Literal["drawn", "relaxed"] = option(
        "drawn", "Which crystals the submission holds: as they came (drawn), or as they are relaxed here (relaxed)."
    )


@dataclass(frozen=True)
class GrowthOptions(ElementWishes):
    """How a dataset grows: where candidates come from, which are relaxed, what is kept."""

    n: Count = option(1000, "Stop when so many crystals have been kept.", flags=("-n",))
    time_limit: Minutes | None = option(
        None,
        "Minutes of work (earlier sessions of a resumed run count) after which no more lots are begun; 0: no limit.",
        unset=0.0,
    )
    substitute: Fraction = option(
        0.5, "Share (0 to 1) of the candidates made by exchanging elements of known crystals; the others are drawn."
    )
    balance: Fraction = option(
        0.25,
        "Shares of kinds and space groups among what is kept: as among the real crystals (0), all alike (1), or in "
        "proportion to those to the power 1 - balance.",
    )
    new: Literal["formula", "structure"] = option(
        "formula", "What must not be known: formula, or structure (other structures of known formulas are kept too)."
    )
    within: Annotated[float, Range(0, 10)] = option(0.1, "eV/atom above the hull up to which a crystal is kept.")
    temperature: Temperature = option(1.0, "Of the draws. Below 1: likelier crystals; above 1: more varied.")
    max_atoms: Count | None = option(
        100, "At most so many atoms in the conventional cell; 0: no limit but 20 sites.", unset=0
    )
    potential: str = option("chgnet", POTENTIAL_HELP, choices=POTENTIALS)
    fmax: Annotated[float, Range(0, 10, open_below=True)] = option(
        0.05, "eV/angstrom; the relaxation ends when all forces are smaller."
    )
    steps: Count = option(200, "Steps of the relaxation at most; what is not relaxed by then is dropped.")
    give_up: Annotated[float, Range(0, 10)] | None = option(
        0.3,
        "eV/atom beyond --within; what is above this after 10 steps of relaxation is given up; negative: nothing is.",
        unset=-1.0,
    )
    symprec: Tolerance = option(
        0.05, "Angstrom; how far atoms of a relaxed crystal may be off the symmetry that is looked for."
    )
    lot: Count = option(32, "Crystals that a worker relaxes in one go; what is not written down yet when a run stops.")
    lots: Count = option(64, "Lots between two updates of file, hull and balance; many times the workers.")
    seed: Seed = option(0, "Seed of the candidates.")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)

"""How structure files become crystals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfrl.runs.options import EngineOptions
from cfrl.settings import Count, FractionBelowOne, Gigabytes, Ratio, Seed, Tolerance, option


@dataclass(frozen=True)
class ImportOptions(EngineOptions):
    """Symmetry, limits and splits of an import."""

    symprec: Tolerance = option(0.01, "Angstrom; how far atoms may be off the symmetry that is looked for.")
    max_sites: Count = option(20, "Drop crystals with more symmetry-inequivalent sites (20 is what a model can hold).")
    max_atoms: Count | None = option(
        None, "Drop crystals with more atoms in the conventional cell; 0: no limit.", unset=0
    )
    validation: FractionBelowOne = option(
        0.1, "Fraction (0 to 1) of the crystals for validation, where the source has no splits."
    )
    test: FractionBelowOne = option(0.0, "Fraction (0 to 1) of the crystals for test, where the source has no splits.")
    split_by: Literal["row", "formula"] = option(
        "row", "row: draw crystals; formula: draw reduced formulas, so that none is in two splits."
    )
    seed: Seed = option(0, "Seed of the splits.")
    max_file_gb: Gigabytes = option(4.0, "GB; refuse files that are larger, unfolded where they are compressed.")
    max_ratio: Ratio = option(
        200.0, "Refuse compressed files that unfold into more than 64 MB and so many times their size."
    )
    corrections: Literal["mp2020"] | None = option(
        None,
        "mp2020: bring PBE(+U) energies of VASP to the scale of the Materials Project's hull; empty: as computed.",
        unset="",
    )
    energy_scale: str | None = option(
        None,
        "Scale of energies whose files do not tell: mp-raw (PBE with the Materials Project's settings, uncorrected), "
        "mp2020, or a name of your own; empty: unknown.",
        choices=("mp-raw", "mp2020"),
        unset="",
    )

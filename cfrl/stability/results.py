"""Results of calculations: that their energies are on one scale, corrected where that is due, and on a hull."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cfrl.errors import UserError
from cfrl.io.datasets import read_structures
from cfrl.io.importing import Columns, Dropped, Imported
from cfrl.potentials.scales import CORRECTED, RAW, Run, Uncorrectable, mp2020_correction
from cfrl.stability.flags import FEW_REFERENCES
from cfrl.stability.hull import CREDIBLE, ReferenceHull

ENERGY, SCALE = "energy_per_atom", "energy_scale"
LOWEST, HIGHEST = -30.0, 10.0  # eV/atom on the Materials Project's scale; tungsten has -13, few crystals are positive
DEEPEST = -6.0  # eV/atom below a hull of few phases; no compound lies farther below its elements
FAR = 3.0  # eV/atom above the hull, for half of the crystals: their energies are something else


def settled(imported: Imported, declared: str | None = None, corrections: str | None = None) -> Imported:
    """The same crystals with energies on one scale, named in the column `energy_scale` where it is known.

    Args:
        declared: the scale of energies whose files do not tell.
        corrections: "mp2020" adds the Materials Project's corrections to `energy_per_atom`; crystals that they do not
            apply to (another +U or POTCAR than MPRelaxSet's) are dropped, with the reason.

    Raises:
        UserError: energies on several scales, not per atom, or none that could be corrected.
    """
    energies = imported.columns.get(ENERGY)
    if not isinstance(energies, np.ndarray) or not np.isfinite(energies).any():
        if declared or corrections:
            raise UserError(f"no column {ENERGY} with energies in these files, so no scale and no corrections apply")
        return imported
    known = np.isfinite(energies)
    scales = np.array(_texts(imported.columns, SCALE, len(energies)), dtype=object)
    scales[known & (scales == "")] = declared or ""
    scales[~known] = ""
    _check_one(imported, scales, known)
    scale = scales[known][0]
    if scale in (RAW, CORRECTED):
        _check_units(imported, energies)
    if corrections:
        return _corrected(imported, scale)
    return replace(imported, columns=imported.columns | ({SCALE: scales.tolist()} if scale else {}))


def _check_one(imported: Imported, scales: np.ndarray, known: np.ndarray) -> None:
    ids = np.array(imported.crystals.ids, dtype=object)
    found = {scale: ids[known & (scales == scale)][0] for scale in dict.fromkeys(scales[known])}
    if len(found) > 1:
        told = ", ".join(f"{scale or 'unknown'} ({row})" for scale, row in found.items())
        raise UserError(
            f"energies are on several scales: {told}; import those of each scale to a file of their own"
            + (", or say what the unknown ones are: --energy-scale" if "" in found else "")
        )


def _check_units(imported: Imported, energies: np.ndarray) -> None:
    wrong = np.flatnonzero((energies < LOWEST) | (energies > HIGHEST))
    if len(wrong):
        raise UserError(
            f"{imported.crystals.ids[wrong[0]]}: {ENERGY} is {energies[wrong[0]]:.6g}; on this scale it lies between "
            f"{LOWEST:g} and {HIGHEST:g}: give eV, divided by the number of atoms"
        )


def _corrected(imported: Imported, scale: str) -> Imported:
    if scale != RAW:
        remedy = f"declare it, if they are PBE with its settings: --energy-scale {RAW}" if not scale else "leave it out"
        raise UserError(
            f"--corrections mp2020 is for uncorrected PBE(+U) energies of VASP ({RAW}), these are on the scale "
            f"{scale or 'unknown'}: {remedy}"
        )
    columns, n = dict(imported.columns), len(imported.crystals)
    energies, reasons = columns[ENERGY].copy(), {}
    details = [_texts(columns, name, n) for name in ("run_type", "hubbards", "potcars")]
    for row, structure in enumerate(imported.crystals.to_structures()):
        if np.isfinite(energies[row]):
            try:
                energies[row] += mp2020_correction(structure, Run.of(*(values[row] for values in details)))
            except Uncorrectable as error:
                reasons[row] = f"no MP2020 correction: {error}"
    kept = np.array([row not in reasons for row in range(n)], dtype=bool)
    if not kept.any():
        raise UserError(f"no energy could be corrected; the first: {reasons[0]}")
    columns[ENERGY], columns[SCALE] = energies, [CORRECTED if np.isfinite(e) else "" for e in energies]
    chosen = {
        k: v[kept] if isinstance(v, np.ndarray) else np.array(v, object)[kept].tolist() for k, v in columns.items()
    }
    ids = imported.crystals.ids
    dropped = [Dropped("", row + 1, ids[row], reason) for row, reason in reasons.items()]
    return Imported(imported.crystals[kept], chosen, imported.split[kept], imported.dropped + dropped)


def _texts(columns: Columns, name: str, n: int) -> list[str]:
    """A column of strings; one that is empty all along was taken for unknown numbers."""
    values = columns.get(name)
    return values if isinstance(values, list) else [""] * n


# ---- on the hull ----


@dataclass
class Added:
    """Results that were put on a hull: n ids, formulas, and distances (n,) to the hull before, eV/atom."""

    ids: list[str]
    formulas: list[str]
    e_above_hull: np.ndarray


def add_results(hull: ReferenceHull, names: Sequence[str]) -> Added:
    """Adds phases to a hull, in place.

    Args:
        names: datasets with the columns `energy_per_atom` (eV) and `energy_scale`.

    Raises:
        UserError: no energies, on another scale than the hull's, or in other units than eV/atom.
    """
    parts = [_read(name, hull) for name in names]
    ids, compositions, energies = ([value for part in parts for value in part[i]] for i in range(3))
    found = hull.e_above_hull(compositions, energies)
    distance = found.e_above_hull
    deep = np.flatnonzero(distance < np.where(found.num_references < FEW_REFERENCES, DEEPEST, CREDIBLE))
    known = distance[np.isfinite(distance)]
    if len(deep) or (len(known) and np.median(known) > FAR):
        row = int(deep[0]) if len(deep) else int(np.nanargmax(distance))
        raise UserError(
            f"{ids[row]}: {ENERGY} of {energies[row]:.6g} lies {distance[row]:+.2f} eV/atom off the hull; it should be "
            "in eV, for each atom, and on the hull's scale"
        )
    hull.add(compositions, energies)
    return Added(ids, [composition.reduced_formula for composition in compositions], distance)


def _read(name: str, hull: ReferenceHull) -> tuple[list, list, list]:
    """ids, compositions and energies (eV/atom) of the rows that have one."""
    structures, ids, columns, _ = read_structures(name)
    energies = columns.get(ENERGY)
    if not isinstance(energies, np.ndarray) or not np.isfinite(energies).any():
        raise UserError(f"{name}: no column {ENERGY} with energies in eV; `cfrl data import` reads results of DFT")
    rows = np.flatnonzero(np.isfinite(energies)).tolist()
    for scale in dict.fromkeys(_texts(columns, SCALE, len(ids))[row] for row in rows):
        if not scale:
            raise UserError(
                f"{name}: does not tell the scale of its energies; import it again with --energy-scale {RAW} or "
                f"{CORRECTED}"
            )
        problem = "" if hull.energy_scale == "unknown" else hull.mismatch(scale)
        if problem:
            remedy = (
                "import it again with --corrections mp2020" if scale == RAW else "give a hull of that scale: --hull"
            )
            raise UserError(f"{name}: {problem}; {remedy}")
    return [ids[row] for row in rows], [structures[row].composition for row in rows], energies[rows].tolist()

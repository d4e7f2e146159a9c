"""The stages of a screening as functions of lists: what a worker process does with some crystals.

Each takes a list of items and gives one record, a plain dict that JSON can hold, for each. A crystal that cannot
be worked on gets a record that says why; it never raises. Which crystals go where is decided in `commands/screen.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals import fingerprint
from cfrl.crystals.crystal import DALTON_PER_CUBIC_ANGSTROM, CrystalBatch
from cfrl.crystals.distances import contacts, shortest_distance
from cfrl.crystals.elements import ATOMIC_NUMBERS, MASSES
from cfrl.crystals.oxidation import charge_balance
from cfrl.crystals.refusal import composition_flags
from cfrl.runs.journal import Record
from cfrl.stability.flags import APART, OVERLAP

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.potentials import Evaluation, Potential


CHECKED = 2  # the edition of `check`: journals of an earlier one hold less, and are not taken for those of this one
MAX_SITES = 1000  # inequivalent sites; screening also takes crystals that the generator could not write


@dataclass(frozen=True)
class Limits:
    """What a crystal must satisfy to be valid.

    min_distance: angstrom, between any two atoms
    min_volume, max_volume: angstrom^3 per atom
    max_density: g/cm^3
    """

    min_distance: float = 0.5
    min_volume: float = 1.0
    max_volume: float = 300.0
    max_density: float = 40.0


ANY = Limits(0.0, 0.0, math.inf, math.inf)


def check(structures: list[Structure], limits: Limits, symprec: float) -> list[Record]:
    """Geometry, chemistry and symmetry of crystals.

    Records: `status` ("" or why it is invalid), `shortest_distance` (angstrom), `volume_per_atom` (angstrom^3),
    `density` (g/cm^3), `no_overlap` (whether no distance is below 0.7 of the sum of the covalent radii), `isolation`
    (largest distance of an atom to its nearest neighbour, in sums of covalent radii, at most 1.5), `charge_neutral`,
    `alloy`, the flags of a composition, `space_group` (0 = not found), `fingerprint`.
    """
    records = [_geometry(structure, limits) for structure in structures]
    fit = [row for row, record in enumerate(records) if not record["status"]]
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(
        [structures[row] for row in fit], symprec, errors="skip", dropped=dropped, max_sites=MAX_SITES
    )
    described = [row for i, row in enumerate(fit) if i not in dropped]
    for row, group, key in zip(
        described, crystals.space_group.tolist(), fingerprint.fingerprints(crystals), strict=True
    ):
        records[row].update(space_group=group, fingerprint=key)
    formulas = [structures[row].composition.reduced_formula for row in fit]
    found = composition_flags(formulas)
    for place, (row, formula) in enumerate(zip(fit, formulas, strict=True)):
        balance = charge_balance(formula)
        records[row].update(charge_neutral=balance == "neutral", alloy=balance == "alloy")
        records[row] |= {name: bool(flag[place]) for name, flag in found.items()}
    return records


def _geometry(structure: Structure, limits: Limits) -> Record:
    record: Record = {"space_group": 0, "fingerprint": ""}
    strange = [s.species_string for s in structure if not s.is_ordered or s.specie.symbol not in ATOMIC_NUMBERS]
    if strange:
        return record | {"status": f"disordered or not an element: {strange[0]}"}
    volume = structure.volume / len(structure)
    if not (math.isfinite(volume) and volume > 0 and np.isfinite(structure.frac_coords).all()):
        return record | {"status": "no cell: its volume or a coordinate is not a positive finite number"}
    mass = sum(MASSES[site.specie.Z] for site in structure) / len(structure)
    record["volume_per_atom"] = volume
    record["density"] = mass * DALTON_PER_CUBIC_ANGSTROM / volume
    if not limits.min_volume <= volume <= limits.max_volume:
        return record | {"status": f"volume of {volume:.3g} A^3 per atom"}
    if record["density"] > limits.max_density:
        return record | {"status": f"density of {record['density']:.3g} g/cm^3"}
    record["shortest_distance"] = shortest_distance(structure)
    if record["shortest_distance"] < limits.min_distance:
        return record | {"status": f"atoms {record['shortest_distance']:.2f} A apart"}
    reach = APART if volume >= Limits.min_volume else OVERLAP  # in a denser cell nobody is alone, all are neighbours
    contact = contacts(structure, reach)
    record["no_overlap"], record["isolation"] = bool(contact.min() >= OVERLAP), float(contact.max())
    return record | {"status": ""}


@dataclass(frozen=True)
class Group:
    """Crystals of one formula, to be compared with each other and with known ones."""

    structures: list[Structure]
    fingerprints: list[str]
    known: list[Structure]
    known_fingerprints: list[str]


def match(groups: list[Group]) -> list[Record]:
    """Duplicates and known crystals within each group.

    Records: `duplicate_of` (place of an earlier crystal of the group, or None) and `known` (place of a known one, or
    None), each a list along the group.
    """
    return [_match_group(group) for group in groups]


def _match_group(group: Group) -> Record:
    prepare = fingerprint.prepare
    candidates = [prepare(*pair) for pair in zip(group.structures, group.fingerprints, strict=True)]
    known = [prepare(*pair) for pair in zip(group.known, group.known_fingerprints, strict=True)]
    duplicates = fingerprint.match_within(candidates)
    return {"duplicate_of": duplicates, "known": fingerprint.match_against(candidates, known)}


@dataclass(frozen=True)
class Relaxation:
    """How to relax: `fmax` in eV/angstrom, `steps` at most, symmetry kept or not."""

    fmax: float
    steps: int
    keep_symmetry: bool


def relax(structures: list[Structure], potential: str, device: str, settings: Relaxation) -> list[Record]:
    """Relax positions and cell.

    Records: `energy_per_atom` (eV), `energy_scale`, `converged`, `relax_steps`, `rmsd` (angstrom),
    `volume_change` (relative), `status`, and `structure` where it has one: the end, or the last sound point.
    """
    from cfrl.potentials.relax import relax as relax_structures

    model = _potential(potential, device)
    result = relax_structures(
        structures, model, fmax=settings.fmax, steps=settings.steps, keep_symmetry=settings.keep_symmetry
    )
    records = []
    for i, structure in enumerate(result.structures):
        record = {
            "energy_per_atom": float(result.energy[i]),
            "energy_scale": model.energy_scale,
            "converged": bool(result.converged[i]),
            "relax_steps": int(result.steps[i]),
            "rmsd": float(result.rmsd[i]),
            "volume_change": float(result.volume_change[i]),
            "status": result.status[i],
        }
        records.append(record if structure is None else record | {"structure": _cell(structure)})
    return records


def _cell(structure: Structure) -> dict[str, Any]:
    """A structure as JSON holds it, every digit kept; `screen.restore` is the way back."""
    return {
        "lattice": structure.lattice.matrix.tolist(),
        "frac_coords": structure.frac_coords.tolist(),
        "numbers": list(structure.atomic_numbers),
    }


def energies(structures: list[Structure], potential: str, device: str) -> list[Record]:
    """Energies as the crystals stand.

    Records: `energy_per_atom` (eV), `max_force` (eV/angstrom), `energy_scale`, `status`.
    """
    model = _potential(potential, device)
    result = model.compute(structures, forces=True)
    return [
        {
            "energy_per_atom": float(result.energy[i]),
            "max_force": float(np.linalg.norm(result.forces[i], axis=1).max()),
            "energy_scale": model.energy_scale,
            "status": status,
        }
        for i, status in enumerate(result.status)
    ]


def judge(structures: list[Structure], potential: str, device: str, settings: Relaxation) -> list[Record]:
    """Records of `relax`, or of `energies` where no step is allowed, without the structure: only the energy counts."""
    if not settings.steps:
        return energies(structures, potential, device)
    records = relax(structures, potential, device, settings)
    return [{name: value for name, value in record.items() if name != "structure"} for record in records]


def predict(structures: list[Structure], predictors: tuple[str, ...], device: str) -> list[Record]:
    """Records: for each predictor its target and `<target>_std`, one standard deviation."""
    from cfrl.rewards.predictors import load_predictor

    records: list[Record] = [{} for _ in structures]
    evaluations: dict[str, Evaluation] = {}
    for predictor in map(load_predictor, predictors):
        potential = _potential(predictor.potential, device)
        predictor.check(potential)
        if predictor.potential not in evaluations:
            evaluations[predictor.potential] = potential.compute(structures, features=True)
        mean, spread = predictor.predict(structures, evaluations[predictor.potential])
        for record, m, s in zip(records, mean.tolist(), spread.tolist(), strict=True):
            record |= {predictor.target: m, f"{predictor.target}_std": s}
    return records


@cache
def _potential(name: str, device: str) -> Potential:
    """Loaded once in a worker process."""
    from cfrl.potentials import load_potential
    from cfrl.runs.devices import choose_device

    return load_potential(name, choose_device(device))

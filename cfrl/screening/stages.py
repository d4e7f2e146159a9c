"""The stages of a screening as functions of lists: what a worker process does with some crystals.

Each takes a list of items and gives one record, a plain dict that JSON can hold, for each. A crystal that cannot
be worked on gets a record that says why; it never raises. Which crystals go where is decided in `commands/screen.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals import fingerprint
from cfrl.crystals.crystal import DALTON_PER_CUBIC_ANGSTROM, CrystalBatch
from cfrl.crystals.distances import contacts, shortest_distance
from cfrl.crystals.elements import ATOMIC_NUMBERS, MASSES
from cfrl.crystals.oxidation import charge_balance
from cfrl.crystals.refusal import composition_flags
from cfrl.potentials.cells import reason_of
from cfrl.potentials.pool import loaded
from cfrl.rewards.chemistry import hhi_of
from cfrl.runs.journal import Record
from cfrl.screening import voids
from cfrl.stability.flags import APART, OVERLAP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pymatgen.core import Structure

    from cfrl.potentials import Evaluation
    from cfrl.screening.phonons import PhononSettings


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


def match(groups: list[Group], ltol: float = fingerprint.LTOL) -> list[Record]:
    """Duplicates and known crystals within each group, lengths being equal within `ltol` of them.

    Records: `duplicate_of` (place of an earlier crystal of the group, or None) and `known` (place of a known one, or
    None), each a list along the group.
    """
    return [_match_group(group, ltol) for group in groups]


def _match_group(group: Group, ltol: float) -> Record:
    prepare = fingerprint.prepare
    candidates = [prepare(*pair) for pair in zip(group.structures, group.fingerprints, strict=True)]
    known = [prepare(*pair) for pair in zip(group.known, group.known_fingerprints, strict=True)]
    duplicates = fingerprint.match_within(candidates, ltol=ltol)
    return {"duplicate_of": duplicates, "known": fingerprint.match_against(candidates, known, ltol=ltol)}


@dataclass(frozen=True)
class Relaxation:
    """How to relax: `fmax` in eV/angstrom, `steps` at most, symmetry kept or not."""

    fmax: float
    steps: int
    keep_symmetry: bool


def relax(
    structures: list[Structure],
    potential: str,
    device: str,
    settings: Relaxation,
    ceiling: Sequence[float] | None = None,
) -> list[Record]:
    """Relax positions and cell; what is far above its ceiling (eV/atom) soon is given up.

    Records: `energy_per_atom` (eV), `energy_scale`, `converged`, `relax_steps`, `rmsd` (angstrom),
    `volume_change` (relative), `status`, and `structure` where it has one: the end, or the last sound point.
    """
    from cfrl.potentials.relax import relax as relax_structures

    model = loaded(potential, device)
    how = {"fmax": settings.fmax, "steps": settings.steps, "keep_symmetry": settings.keep_symmetry}
    result = relax_structures(structures, model, **how, ceiling=ceiling)
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
    model = loaded(potential, device)
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


def embed(structures: list[Structure], potential: str, device: str) -> list[Record]:
    """Energies as the crystals stand, and where the potential sees them.

    Records: `energy_per_atom` (eV), `energy_scale`, `embedding` (d numbers: its last layer averaged over the atoms;
    none of a potential without features), `status`.
    """
    model = loaded(potential, device)
    result = model.compute(structures, features=bool(model.feature_size))
    embeddings = model.embeddings(result.features) if result.features is not None else np.empty((len(structures), 0))
    return [
        {
            "energy_per_atom": float(result.energy[i]),
            "energy_scale": model.energy_scale,
            "embedding": [float(f"{number:.6g}") for number in embeddings[i]] if not status else [],
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
        potential = loaded(predictor.potential, device)
        predictor.check(potential)
        if predictor.potential not in evaluations:
            evaluations[predictor.potential] = potential.compute(structures, features=True)
        mean, spread = predictor.predict(structures, evaluations[predictor.potential])
        for record, m, s in zip(records, mean.tolist(), spread.tolist(), strict=True):
            record |= {predictor.target: m, f"{predictor.target}_std": s}
    return records


def describe(structures: list[Structure]) -> list[Record]:
    """What people filter by.

    Records: `dimensionality` (0 molecules, 1 chains, 2 layers, 3; of pymatgen's CrystalNN bonds, counted as Larsen et
    al., Phys. Rev. Mater. 3, 034003, 2019), `oxidation_states` (the likeliest by composition, such as
    "Ba2+ Ti4+ O2-"; "" where charges do not balance), `hhi_production`, `hhi_reserve` (by mass, 0 to 10,000),
    `largest_sphere`, `free_sphere` (angstrom, see voids.py). None: unknown.
    """
    return [
        {"dimensionality": _dimensionality(structure), "oxidation_states": _oxidation_states(structure)}
        | dict(zip(("largest_sphere", "free_sphere"), _spheres(structure), strict=True))
        | dict(zip(("hhi_production", "hhi_reserve"), hhi_of(structure.composition.reduced_formula), strict=True))
        for structure in structures
    ]


def _dimensionality(structure: Structure) -> int | None:
    from pymatgen.analysis.dimensionality import get_dimensionality_larsen
    from pymatgen.analysis.graphs import StructureGraph
    from pymatgen.analysis.local_env import CrystalNN

    try:
        return int(get_dimensionality_larsen(StructureGraph.from_local_env_strategy(structure, CrystalNN())))
    except Exception:  # it meets crystals that nobody thought of
        return None


def _spheres(structure: Structure) -> tuple[float | None, float | None]:
    if not voids.installed():
        return None, None
    try:
        return voids.spheres(structure)
    except Exception:  # as above
        return None, None


def _oxidation_states(structure: Structure) -> str:
    from pymatgen.core import Species

    try:
        guesses = structure.composition.oxi_state_guesses(max_sites=-1)
    except Exception:
        return ""
    return " ".join(str(Species(symbol, state)) for symbol, state in guesses[0].items()) if guesses else ""


def elastic(structures: list[Structure], potential: str, device: str) -> list[Record]:
    """Records: `stiffness` (6 x 6, GPa), `lowest_stiffness` (its lowest eigenvalue), `mechanically_stable`,
    `bulk_modulus_vrh`, `shear_modulus_vrh` (GPa), `status`.
    """
    from cfrl.screening.elastic import compute_elasticity

    return [
        {"status": reason_of(found)}
        if isinstance(found, Exception)
        else {
            "stiffness": found.stiffness.round(3).tolist(),
            "lowest_stiffness": found.lowest,
            "mechanically_stable": found.lowest > 0,
            "bulk_modulus_vrh": found.bulk_modulus,
            "shear_modulus_vrh": found.shear_modulus,
            "status": "",
        }
        for found in compute_elasticity(structures, loaded(potential, device))
    ]


def phonons(structures: list[Structure], potential: str, device: str, settings: PhononSettings) -> list[Record]:
    """Records: `lowest_frequency` (THz), `dynamically_stable`, `bands`, `dos` (as `Phonons` has them), `phonopy` (its
    yaml), `mode` (an imaginary one, for `follow`: `frequency`, `q`, `cell`, `displacements`; or None), `status`.
    """
    from cfrl.screening.phonons import compute_phonons

    model, records = loaded(potential, device), []
    for structure in structures:
        try:
            found = compute_phonons(structure, model, settings)
        except Exception as error:  # phonopy meets crystals that nobody thought of
            records.append({"status": reason_of(error)})
            continue
        mode = found.softest and {
            "frequency": found.softest.frequency,
            "q": found.softest.q.round(6).tolist(),
            "cell": _cell(found.softest.cell),
            "displacements": found.softest.displacements.tolist(),
        }
        records.append(
            {
                "lowest_frequency": found.lowest,
                "dynamically_stable": found.lowest >= -settings.tolerance,
                "bands": {name: _rounded(values) for name, values in found.bands.items()},
                "dos": {name: _rounded(values) for name, values in found.dos.items()},
                "phonopy": found.yaml(),
                "mode": mode,
                "status": "",
            }
        )
    return records


def follow(
    modes: list[tuple[Structure, list]], potential: str, device: str, settings: Relaxation, symprec: float
) -> list[Record]:
    """Where imaginary modes lead: supercells and the displacements of their atoms, as `phonons` records them.

    Records: `structure`, a primitive cell of the symmetry (within symprec, angstrom) that it has come to; `status`.
    """
    from cfrl.screening.phonons import follow_mode, primitive_cell

    model, records = loaded(potential, device), []
    for cell, displacements in modes:
        try:
            end = follow_mode(cell, np.array(displacements), model, settings.fmax, settings.steps)
            records.append({"structure": _cell(primitive_cell(end, symprec)[0].structure()), "status": ""})
        except Exception as error:
            records.append({"status": reason_of(error)})
    return records


def _rounded(values: Any) -> list[Any]:
    return [value if isinstance(value, str) else np.round(value, 5).tolist() for value in values]

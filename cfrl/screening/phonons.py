"""Phonons of one crystal: frozen displacements in a supercell, forces by a potential, the rest by phonopy.

The crystal is relaxed further, its space group kept, and brought into the primitive standard cell. phonopy (Togo, J.
Phys. Soc. Jpn. 92, 012001, 2023) finds the displacements that symmetry leaves, and makes force constants of the
forces, which come in batches, folded by what symmetry a displaced atom leaves. Long-range dipoles (LO-TO splitting)
are not in them: no potential here gives Born charges. Which crystals are asked is decided in `probes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.analysis import find_symmetry
from cfrl.crystals.elements import SYMBOLS
from cfrl.errors import UserError
from cfrl.potentials import Potential
from cfrl.potentials.cells import SymmetricCell, UnusableCrystal
from cfrl.potentials.relax import relax

if TYPE_CHECKING:
    from phonopy import Phonopy
    from pymatgen.core import Structure

FMAX, STEPS = 0.005, 500  # eV/angstrom; of the relaxation before
SYMPREC = 1e-3  # angstrom; of the primitive cell, whose symmetry is exact then
DISPLACEMENT = 0.05  # angstrom; CHGNet's forces are wavy below 0.03 (docs/phonons.md)
MESH = 60.0  # angstrom; a q-point mesh as of a supercell so long
PATH_POINTS = 15.0  # points of the band structure per 1/angstrom (2 pi included)
MAX_ATOMS = 1000  # of a supercell
MAX_MODE_ATOMS, MAX_REPEATS = 240, 6  # of a supercell that holds one mode
AMPLITUDES = (0.05, 0.1, 0.2, 0.3, 0.4)  # angstrom; longest way of an atom along an imaginary mode, tried each


@dataclass(frozen=True)
class PhononSettings:
    """supercell: angstrom, its least translation. tolerance: THz below zero that is not yet imaginary."""

    supercell: float
    tolerance: float


@dataclass
class Mode:
    """A phonon that a supercell of m atoms holds.

    frequency: THz, negative where imaginary
    q: (3,) in reciprocal vectors of the primitive cell
    cell: the supercell, not displaced
    displacements: (m, 3) angstrom, the longest of length 1
    """

    frequency: float
    q: np.ndarray
    cell: Structure
    displacements: np.ndarray


@dataclass
class Phonons:
    """Phonons of a crystal; frequencies in THz, imaginary ones negative.

    phonopy: force constants, with the acoustic sum rule imposed; its primitive cell is the crystal's, relaxed
    lowest: of a mesh, of the points that the supercell holds and of the special points
    softest: the lowest mode that a small supercell holds, None if none is imaginary
    bands: `distance` (n_q,) 1/angstrom along the path, `frequencies` (n_q, 3 N), `ticks`, `labels`
    dos: `frequency` (k,), `density` (k,) states per THz and primitive cell
    """

    phonopy: Phonopy
    lowest: float
    softest: Mode | None
    bands: dict[str, Any]
    dos: dict[str, Any]

    def yaml(self) -> str:
        """What phonopy reads: cells, displacements and forces (`phonopy-load`)."""
        with TemporaryDirectory() as folder:
            path = Path(folder) / "phonopy.yaml"
            self.phonopy.save(path)
            return path.read_text(encoding="utf-8")


def require_phonopy() -> None:
    """Raises UserError where phonopy is missing."""
    try:
        import phonopy  # noqa: F401
    except ImportError as error:
        raise UserError("--phonons needs the package: pip install 'cfrl[phonons]'") from error


def compute_phonons(structure: Structure, potential: Potential, settings: PhononSettings) -> Phonons:
    """The phonons of a crystal. Raises UnusableCrystal with the reason why there are none."""
    phonopy = force_constants(structure, potential, settings.supercell)
    bands, special = _bands(phonopy)
    points = np.concatenate([special, _commensurate_points(phonopy)])
    phonopy.run_mesh(MESH, is_gamma_center=True)
    phonopy.run_total_dos()
    dos = phonopy.get_total_dos_dict()
    at_points = _frequencies(phonopy, points)
    lowest = min(float(phonopy.get_mesh_dict()["frequencies"].min()), float(at_points.min()))
    softest = _softest(phonopy, points, at_points[:, 0]) if lowest < -settings.tolerance else None
    if softest and softest.frequency >= -settings.tolerance:
        softest = None
    return Phonons(phonopy, lowest, softest, bands, {"frequency": dos["frequency_points"], "density": dos["total_dos"]})


def force_constants(structure: Structure, potential: Potential, length: float) -> Phonopy:
    """phonopy with the force constants of a crystal, relaxed first.

    Args:
        length: angstrom, the least translation of the supercell.

    Raises:
        UnusableCrystal: it cannot be relaxed or evaluated, or is too large.
    """
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    cell, conventional = primitive_cell(_relaxed(structure, potential))
    matrix = supercell_matrix(cell.matrix, conventional, length)
    atoms = len(cell) * round(abs(np.linalg.det(matrix)))
    if atoms > MAX_ATOMS:
        raise UnusableCrystal(f"{atoms} atoms in a supercell of {length:g} A, at most {MAX_ATOMS} are taken")
    unit = PhonopyAtoms(numbers=cell.numbers, cell=cell.matrix, scaled_positions=cell.frac)
    phonopy = Phonopy(unit, matrix, np.eye(3))
    phonopy.generate_displacements(distance=DISPLACEMENT)
    displaced = [_structure(c.cell, c.numbers, c.scaled_positions) for c in phonopy.supercells_with_displacements]
    found = potential.compute(displaced, forces=True)
    if reason := next(filter(None, found.status), ""):
        raise UnusableCrystal(f"a displaced supercell: {reason}")
    phonopy.produce_force_constants(np.array(found.forces), show_drift=False)
    phonopy.symmetrize_force_constants(show_drift=False)
    return phonopy


def primitive_cell(structure: Structure, symprec: float = SYMPREC) -> tuple[SymmetricCell, np.ndarray]:
    """The primitive cell in the standard setting, exactly symmetric, and the rows of the conventional one, (3, 3).

    `symprec`: angstrom.
    """
    found = find_symmetry(structure.lattice.matrix, structure.frac_coords, structure.atomic_numbers, symprec)
    cell = found.prim_std_cell
    exact = SymmetricCell.of(_structure(cell.basis, cell.numbers, cell.positions))
    return exact, np.array(found.std_cell.basis)


def supercell_matrix(primitive: np.ndarray, conventional: np.ndarray, length: float) -> np.ndarray:
    """(3, 3) int, columns are translations of the supercell in primitive ones (phonopy's convention).

    Repeats of the primitive or of the conventional cell, whichever needs fewer atoms. No atom is nearer than `length`
    (angstrom) to an image of its own.

    Args:
        primitive, conventional: (3, 3) rows, angstrom.
    """
    best = None
    for cell in (primitive, conventional):
        lengths = np.linalg.norm(cell, axis=1)
        to_primitive = np.rint(cell @ np.linalg.inv(primitive)).astype(int)
        least = length
        while True:
            repeats = np.ceil(least / lengths - 1e-6).astype(int)
            matrix = to_primitive * repeats[:, None]
            if best is not None and abs(np.linalg.det(matrix)) > abs(np.linalg.det(best)) + 0.5:
                break
            if _shortest(matrix @ primitive) >= length - 1e-3:
                best = matrix
                break
            least *= 1.1
    return best.T


def _shortest(lattice: np.ndarray) -> float:
    from pymatgen.core import Lattice

    return min(Lattice(lattice).get_niggli_reduced_lattice().abc)


def _relaxed(structure: Structure, potential: Potential) -> Structure:
    result = relax([structure], potential, fmax=FMAX, steps=STEPS)
    if result.status[0]:
        raise UnusableCrystal(result.status[0])
    if not result.converged[0]:
        raise UnusableCrystal(f"not relaxed to {FMAX:g} eV/A within {STEPS} steps")
    return result.structures[0]


def _structure(lattice: np.ndarray, numbers: np.ndarray, frac: np.ndarray) -> Structure:
    from pymatgen.core import Lattice, Structure

    return Structure(Lattice(lattice), [SYMBOLS[z] for z in numbers], frac)


# ---- of force constants ----


def _frequencies(phonopy: Phonopy, points: np.ndarray) -> np.ndarray:
    """(k, 3 N) THz, ascending."""
    phonopy.run_qpoints(points)
    return np.sort(phonopy.get_qpoints_dict()["frequencies"], axis=1)


def _bands(phonopy: Phonopy) -> tuple[dict[str, Any], np.ndarray]:
    """The band structure along ASE's path (Setyawan, Curtarolo 2010), and the special points (k, 3)."""
    from ase.cell import Cell

    path = Cell(phonopy.primitive.cell).bandpath(density=PATH_POINTS)
    distance, ticks, labels = path.get_linear_kpoint_axis()
    return {
        "distance": distance,
        "frequencies": _frequencies(phonopy, path.kpts),
        "ticks": ticks,
        "labels": labels,
    }, np.array(list(path.special_points.values()))


def _commensurate_points(phonopy: Phonopy) -> np.ndarray:
    """(k, 3): where the frequencies are the supercell's own, not interpolated."""
    from phonopy.harmonic.dynmat_to_fc import get_commensurate_points

    return get_commensurate_points(np.rint(phonopy.supercell_matrix).astype(int))


def _softest(phonopy: Phonopy, points: np.ndarray, lowest: np.ndarray) -> Mode | None:
    """The lowest mode at one of the points (k, 3), whose lowest frequencies are (k,), that a small supercell holds."""
    for row in np.argsort(lowest, kind="stable"):
        q = points[row]
        repeats = np.array([Fraction(float(x)).limit_denominator(MAX_REPEATS).denominator for x in q])
        exact = np.abs(q * repeats - np.rint(q * repeats)).max() < 1e-5
        if exact and repeats.prod() * len(phonopy.primitive) <= MAX_MODE_ATOMS:
            moved = phonopy.run_modulations(repeats, [[q, 0, 1.0, 0.0]])
            displacements, cell = moved.modulations[0].real, moved.supercell
            displacements = displacements / np.linalg.norm(displacements, axis=1).max()
            structure = _structure(cell.cell, cell.numbers, cell.scaled_positions)
            return Mode(float(lowest[row]), q, structure, displacements)
    return None


# ---- what an imaginary mode leads to ----


def follow_mode(cell: Structure, displacements: np.ndarray, potential: Potential, fmax: float, steps: int) -> Structure:
    """The crystal that an imaginary mode leads to, relaxed without symmetry.

    Args:
        cell: m atoms. displacements: (m, 3) angstrom, as of `Mode`.
        fmax: eV/angstrom. steps: of the relaxation, at most.

    Raises:
        UnusableCrystal: the relaxation fails, or the energy does not fall.
    """
    moved = [cell.copy() for _ in AMPLITUDES]
    for structure, amplitude in zip(moved, AMPLITUDES, strict=True):
        for atom, way in enumerate(amplitude * displacements):
            structure.translate_sites([atom], way, frac_coords=False)
    energy = potential.compute([cell, *moved], corrected=False).energy
    if np.isnan(energy[0]) or not np.nanmin(energy[1:]) < energy[0]:
        raise UnusableCrystal(f"no fall of the energy within {AMPLITUDES[-1]:g} A along the mode")
    result = relax([moved[int(np.nanargmin(energy[1:]))]], potential, fmax=fmax, steps=steps, keep_symmetry=False)
    if result.status[0]:
        raise UnusableCrystal(result.status[0])
    return result.structures[0]

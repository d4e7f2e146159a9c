"""Does a potential do what its card says? Units, energy scale and speed, measured on known crystals.

That forces and stress are derivatives of the energy, in eV and angstrom, a displacement and a strain tell. Whether
energies are on the hull's scale, known crystals do: they lie on the hull or little above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.errors import UserError
from cfrl.potentials import Potential, load_potential
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.scales import DECLARED
from cfrl.stability.hull import ReferenceHull

if TYPE_CHECKING:
    from pymatgen.core import Structure

NEAR = 0.1  # eV/atom above the hull; known crystals lie within
FAR = 0.15  # eV/atom; a median beyond says that energies are on another scale, or in other units
SHAKE, STEP = 0.1, 0.02  # angstrom; how far atoms are moved off their places, and by how much then
STRAIN = 0.005
WRONG = 0.2  # of a derivative; units differ by more, float32 and forces of a network's own by less
NOISE = 0.05  # eV/angstrom, and eV; so much a derivative may be off anyway
TRIES = 5  # crystals for the derivatives, should a potential not know the elements of the first


@dataclass
class Measured:
    """What a potential was found to be.

    scale: of its energies, as `compute` gives them. device, ms_per_atom: milliseconds for energy and forces.
    crystals: how many known ones have a distance to the hull; 0 where their scales differ.
    median, tail: eV/atom above the hull, half and 95% of them lie below. near: share within NEAR.
    """

    scale: str
    device: str
    ms_per_atom: float
    crystals: int = 0
    median: float = float("nan")
    tail: float = float("nan")
    near: float = float("nan")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def known_crystals(structures: Sequence[Structure], hull: ReferenceHull, n: int) -> list[Structure]:
    """At most n of the structures, evenly picked, that the default potential finds within NEAR of the hull.

    Where the hull is on another scale than that, any.
    """
    structures = [structure for structure in structures if len(structure) <= 40]
    judge = load_potential("chgnet", "cpu")
    if not hull.mismatch(judge.energy_scale):
        distance = hull.e_above_hull(structures, judge.compute(structures).energy).e_above_hull
        structures = [structures[row] for row in np.flatnonzero(np.abs(distance) <= NEAR)]
    rows = np.linspace(0, len(structures) - 1, min(n, len(structures))).astype(int)
    return [structures[row] for row in rows]


def measure(
    potential: Potential,
    structures: Sequence[Structure],
    hull: ReferenceHull,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Units, scale and speed of a potential.

    Args:
        structures: known crystals, on the hull or little above it.
        progress: called with the number of crystals done.

    Raises:
        UserError: forces or stress are no derivatives of the energy, energies are not on the scale that they should
            be on, or none could be computed.
    """
    check_derivatives(potential, sorted(structures, key=len)[:TRIES])
    start = time.perf_counter()
    found = potential.compute(structures, forces=True, progress=progress)
    seconds = time.perf_counter() - start
    atoms = sum(len(structures[row]) for row in np.flatnonzero(found.ok))
    if not atoms:
        raise UserError(f"{potential.name}: no known crystal could be evaluated: {found.status[0]}")
    measured = Measured(potential.energy_scale, str(potential.device), 1000 * seconds / atoms)
    if hull.mismatch(potential.energy_scale):
        return measured
    distance = hull.e_above_hull(structures, found.energy).e_above_hull
    distance = distance[np.isfinite(distance)]
    if len(distance):
        measured.crystals, measured.near = len(distance), float(np.mean(distance <= NEAR))
        measured.median, measured.tail = (float(np.quantile(distance, share)) for share in (0.5, 0.95))
    if abs(measured.median) > FAR:
        raise UserError(
            f"{potential.name}: known crystals lie {measured.median:+.2f} eV/atom from the hull in the median: its "
            f"energies are not eV on the scale {potential.energy_scale}; declare another (@{' or @'.join(DECLARED)}), "
            "or none, and make a hull with it (cfrl data hull)"
        )
    return measured


def check_derivatives(potential: Potential, structures: Sequence[Structure]) -> None:
    """Forces against energies of displaced atoms, stress against those of a strained cell, by central differences.

    Raises:
        UserError: they differ by more than WRONG, or none of the structures can be evaluated.
    """
    for structure in structures:
        cells, direction, strain = _displaced(structure)
        found = potential.compute(cells, forces=True, stress=True, corrected=False)
        if found.ok.all():
            break
    else:
        reason = next(reason for reason in found.status if reason)
        raise UserError(f"{potential.name}: no known crystal could be evaluated: {reason}")
    energy = found.energy * len(structure)
    force = -(energy[1] - energy[2]) / (2 * STEP)
    _compare(potential.name, "forces", float((found.forces[0] * direction).sum()), force)
    work = (energy[3] - energy[4]) / (2 * STRAIN)
    _compare(potential.name, "stress", float((found.stress[0] * strain).sum() * cells[0].volume), work)


def _compare(name: str, what: str, told: float, derivative: float) -> None:
    if abs(told - derivative) > NOISE + WRONG * max(abs(told), abs(derivative)):
        raise UserError(
            f"{name}: its {what} are not the derivative of its energy ({told:.3g} where it is {derivative:.3g}): "
            "energies must be eV, forces eV/angstrom, stress eV/angstrom^3"
        )


def _displaced(structure: Structure) -> tuple[list[SymmetricCell], np.ndarray, np.ndarray]:
    """A shaken cell, the same displaced forth and back, strained forth and back; direction (N, 3), strain (3, 3)."""
    rng = np.random.default_rng(0)
    cell = SymmetricCell.of(structure).without_symmetry()
    inverse = np.linalg.inv(cell.matrix)
    cell = cell.moved(cell.matrix, cell.frac + rng.normal(0, SHAKE / 3**0.5, cell.frac.shape) @ inverse)
    found = rng.normal(size=cell.frac.shape)
    direction = found / np.linalg.norm(found)
    strain = np.diag([1.0, 0.5, -0.3]) + 0.2
    moved = [cell.moved(cell.matrix, cell.frac + sign * STEP * direction @ inverse) for sign in (1, -1)]
    strained = [cell.moved(cell.matrix @ (np.eye(3) + sign * STRAIN * strain), cell.frac) for sign in (1, -1)]
    return [cell, *moved, *strained], direction, strain

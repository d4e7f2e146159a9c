"""Relaxation of many crystals at once: positions and cell, the space group kept.

A crystal is moved along its symmetric modes only: displacements and strains that the space group allows, often a
handful. On these few coordinates quasi-Newton steps within a trust radius (damped BFGS, Nocedal & Wright,
Numerical Optimization, procedure 18.2), begun from the Hessian of a network of springs between neighbours, need
far fewer evaluations than FIRE on all atoms. Each round evaluates all crystals in work as one batch; finished
ones make room for waiting ones. Storing results, and workers, are left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from cfrl.potentials import Evaluation, Potential, load_potential
from cfrl.potentials.cells import SymmetricCell, UnusableCrystal, neighbours

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.crystals.crystal import CrystalBatch

RADIUS, MAX_RADIUS, MIN_RADIUS = 0.2, 0.5, 1e-4  # angstrom; longest way of an atom in one step
BOND = 2.0  # angstrom; a strain counts as the change of such a bond
SPRING, DECAY, FLOOR = 6.0, 3.0, 0.5  # eV/angstrom^2, per nearest distance, eV/angstrom^2
NOISE = 1e-5  # eV/atom; float32 energies of the same crystal differ by as much
COLLAPSED, EXPLODED = 0.25, 4.0  # volume against the start's
PATIENCE = 10  # evaluations, after which a crystal far above its ceiling is given up
GIVEN_UP = "given up: too high"
SHAKE = 0.01  # angstrom; frees a crystal from the symmetry of its forces


@dataclass
class Relaxed:
    """One crystal's relaxation.

    structure: the end, or the last sound point where it failed; None if it could not be started
    energy: eV/atom at the end, NaN if it failed
    steps: evaluations of energy and forces
    converged: forces and stress are below the threshold
    status: "" or why the crystal was taken out
    rmsd: angstrom, root mean square displacement of atoms, without the change of the cell and a common drift
    volume_change: relative to the start
    fall: eV/atom by which the last step lowered the energy; 0 where it has converged, or there was none
    """

    structure: Structure | None
    energy: float
    steps: int
    converged: bool
    status: str
    rmsd: float
    volume_change: float
    fall: float = 0.0


@dataclass
class RelaxResult:
    """Relaxations of n crystals in the order they came; the fields of `Relaxed`, one array or list each."""

    structures: list[Structure | None]
    energy: np.ndarray
    steps: np.ndarray
    converged: np.ndarray
    status: list[str]
    rmsd: np.ndarray
    volume_change: np.ndarray
    fall: np.ndarray

    @classmethod
    def of(cls, crystals: list[Relaxed]) -> RelaxResult:
        return cls(
            structures=[c.structure for c in crystals],
            energy=np.array([c.energy for c in crystals], dtype=np.float64),
            steps=np.array([c.steps for c in crystals], dtype=np.int64),
            converged=np.array([c.converged for c in crystals], dtype=bool),
            status=[c.status for c in crystals],
            rmsd=np.array([c.rmsd for c in crystals], dtype=np.float64),
            volume_change=np.array([c.volume_change for c in crystals], dtype=np.float64),
            fall=np.array([c.fall for c in crystals], dtype=np.float64),
        )

    def __len__(self) -> int:
        return len(self.status)

    def __getitem__(self, rows: slice) -> RelaxResult:
        return RelaxResult(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def cat(cls, parts: Sequence[RelaxResult]) -> RelaxResult:
        """The parts one after the other."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        return cls(*(list(chain(*c)) if isinstance(c[0], list) else np.concatenate(c) for c in columns))


def relax(
    structures: CrystalBatch | Iterable[Structure],
    potential: Potential | str = "chgnet",
    *,
    fmax: float = 0.05,
    steps: int = 200,
    cell: bool = True,
    keep_symmetry: bool = True,
    ceiling: Sequence[float] | None = None,
    progress: Callable[[int], None] | None = None,
) -> RelaxResult:
    """Relax n crystals.

    Args:
        structures: pymatgen structures or a CrystalBatch.
        potential: one, or the name of one, see `load_potential`.
        fmax: eV/angstrom; converged when no force is larger, nor volume * stress / atoms (a row of it, in eV), which
            is ASE's criterion for a FrechetCellFilter.
        steps: evaluations per crystal, at most.
        cell: relax the cell too.
        keep_symmetry: keep the space group found at the start; otherwise atoms are shaken by 0.01 angstrom first
            (the same way each time) and every coordinate is free.
        ceiling: (n,) eV/atom, of which a crystal that is above after `PATIENCE` evaluations is given up, with a
            status; None or infinite: none is.
        progress: called with the number of crystals done.

    Raises:
        UserError: there is no such potential. A crystal that cannot be relaxed has a status instead.
    """
    potential = load_potential(potential) if isinstance(potential, str) else potential
    structures = structures.to_structures() if hasattr(structures, "to_structures") else list(structures)
    done: dict[int, Relaxed] = {}

    def finish(row: int, result: Relaxed) -> None:
        done[row] = result
        if progress is not None:
            progress(len(done))

    waiting = iter(enumerate(structures))
    active: list[tuple[int, _Walk]] = []
    while True:
        while sum(len(walk.start) for _, walk in active) < 2 * potential.max_atoms:  # two batches overlap
            row, structure = next(waiting, (None, None))
            if row is None:
                break
            try:
                active.append((row, _Walk(structure, potential, fmax, steps, cell, keep_symmetry)))
            except UnusableCrystal as reason:
                finish(row, Relaxed(None, np.nan, 0, False, str(reason), np.nan, np.nan))
        if not active:
            return RelaxResult.of([done[row] for row in range(len(structures))])
        trials = [walk.trial for _, walk in active]
        found = potential.compute(trials, forces=True, stress=True, corrected=False)
        for i, (_, walk) in enumerate(active):
            walk.take(found.energy[i] * len(walk.start), found.forces[i], found.stress[i], found.status[i])
        for row, walk in active:
            if ceiling is not None and walk.steps == PATIENCE and not walk.ended:
                walk.give_up_above(ceiling[row], potential)
            if walk.ended:
                finish(row, walk.result(potential))
        active = [(row, walk) for row, walk in active if not walk.ended]


class _Walk:
    """One crystal on its way down: coordinates q along its symmetric modes, and the point to evaluate next."""

    def __init__(
        self, structure: Structure, potential: Potential, fmax: float, steps: int, cell: bool, keep_symmetry: bool
    ) -> None:
        start = SymmetricCell.of(structure)
        start.check(potential.elements, potential.cutoff)
        self.start = start if keep_symmetry else _shaken(start)
        self.modes, self.strains = symmetric_modes(self.start)
        self.strains = self.strains[: len(self.strains) * cell] / (BOND * len(start) ** 0.5)
        self.fmax, self.max_steps = fmax, steps
        self.hessian = self._springs(potential.cutoff)
        self.q = np.zeros(len(self.modes) + len(self.strains))
        self.step = np.zeros_like(self.q)
        self.trial = self.start
        self.point: SymmetricCell | None = None  # the best so far, where energy and gradient hold
        self.energy, self.gradient = np.inf, np.zeros_like(self.q)
        self.radius = RADIUS
        self.fall = 0.0  # eV of the cell
        self.steps = 0
        self.converged = self.ended = False
        self.status = ""

    def take(self, energy: float, forces: np.ndarray, stress: np.ndarray, status: str) -> None:
        """The potential's word on the trial point (energy of the cell, eV): go on from it, or step shorter."""
        self.steps += 1
        first = self.point is None
        if status:
            if first or self._shrink():
                return self._end(status)
        else:
            gradient = self._gradient(forces, stress)
            if not first:
                self._update(gradient - self.gradient)
            if energy <= self.energy + NOISE * len(self.start):
                self._accept(energy, gradient)
                if self._is_converged(forces, stress):
                    self.converged = True
                    return self._end("")
            elif self._shrink():
                return self._end("")
        if self.steps >= self.max_steps:
            return self._end("")
        self._propose()

    def give_up_above(self, energy: float, potential: Potential) -> None:
        """End the walk if it has come no lower than this, eV/atom."""
        if self.result(potential).energy > energy:
            self._end(GIVEN_UP)

    def result(self, potential: Potential) -> Relaxed:
        """With the corrections that the potential's energies need."""
        end = self.point
        if end is None:
            return Relaxed(None, np.nan, self.steps, False, self.status, np.nan, np.nan)
        final = Evaluation(np.array([self.energy / len(end)]), [self.status])
        potential.correct([end], final)
        moved = (end.frac - self.start.frac) @ end.matrix
        moved -= moved.mean(axis=0)
        return Relaxed(
            structure=end.structure(),
            energy=np.nan if final.status[0] else float(final.energy[0]),
            steps=self.steps,
            converged=self.converged,
            status=final.status[0],
            rmsd=float(np.sqrt((moved**2).sum(axis=1).mean())),
            volume_change=end.volume / self.start.volume - 1,
            fall=0.0 if self.converged else self.fall / len(end),
        )

    def _end(self, status: str) -> None:
        self.ended, self.status = True, status

    def _accept(self, energy: float, gradient: np.ndarray) -> None:
        self.fall = 0.0 if self.point is None else max(self.energy - energy, 0.0)
        self.q = self.q + self.step
        self.point, self.energy, self.gradient = self.trial, energy, gradient
        if np.any(self.step) and self._length(self.step) > 0.9 * self.radius:
            self.radius = min(2 * self.radius, MAX_RADIUS)

    def _shrink(self) -> bool:
        """Shorter steps from the last point; true if they have become too short to go on."""
        self.radius = 0.25 * self._length(self.step)
        return self.radius < MIN_RADIUS

    def _propose(self) -> None:
        """The quasi-Newton step from the last point, no longer than the radius."""
        step = -np.linalg.solve(self.hessian, self.gradient)
        self.step = step * min(1.0, self.radius / max(self._length(step), 1e-12))
        self.trial = self._at(self.q + self.step)
        ratio = self.trial.volume / self.start.volume
        if not COLLAPSED < ratio < EXPLODED:
            word = "collapsed" if ratio <= COLLAPSED else "exploded"
            self._end(f"{word}: volume {ratio:.2g} times the start's")

    def _at(self, q: np.ndarray) -> SymmetricCell:
        moved, strain = self._split(q)
        displaced = self.start.frac + moved @ np.linalg.inv(self.start.matrix)
        return self.start.moved(self.start.matrix @ (np.eye(3) + strain), displaced)

    def _split(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Displacements (N, 3) in the start's cell, angstrom, and strain (3, 3)."""
        k = len(self.modes)
        return np.tensordot(q[:k], self.modes, 1), np.tensordot(q[k:], self.strains, 1)

    def _length(self, step: np.ndarray) -> float:
        moved, strain = self._split(step)
        return max(np.linalg.norm(moved, axis=1).max(), BOND * np.linalg.norm(strain))

    def _gradient(self, forces: np.ndarray, stress: np.ndarray) -> np.ndarray:
        """dE/dq of the trial point, whose atoms are at (start + moved) (1 + strain)."""
        deformed = np.eye(3) + self._split(self.q + self.step)[1]
        atoms = -np.tensordot(self.modes, forces @ deformed.T, 2)
        cell = np.linalg.solve(deformed.T, stress) * self.trial.volume
        return np.concatenate([atoms, np.tensordot(self.strains, cell, 2)])

    def _is_converged(self, forces: np.ndarray, stress: np.ndarray) -> bool:
        largest = np.linalg.norm(forces, axis=1).max()
        if len(self.strains):
            cell = stress * self.trial.volume / len(self.start)
            largest = max(largest, np.linalg.norm(cell, axis=1).max())
        return bool(largest < self.fmax)

    def _update(self, change: np.ndarray) -> None:
        """Damped BFGS: learn the curvature along the last step, keep the Hessian positive definite."""
        step, hessian = self.step, self.hessian
        image = hessian @ step
        expected, seen = step @ image, step @ change
        if expected < 1e-12:
            return
        if seen < 0.2 * expected:
            change = image + (0.8 * expected / (expected - seen)) * (change - image)
        self.hessian = hessian - np.outer(image, image) / expected + np.outer(change, change) / (step @ change)

    def _springs(self, cutoff: float) -> np.ndarray:
        """Hessian in q of springs along neighbours, stiff for the nearest and weaker by exp with distance."""
        cell = self.start
        first, size, _ = cell.orbits()
        center, neighbour, translation, distance = neighbours(cell, first, cutoff)
        nearest = np.full(len(first), np.inf)
        np.minimum.at(nearest, center, distance)
        atom = first[center]
        vector = (cell.frac[neighbour] + translation - cell.frac[atom]) @ cell.matrix
        direction = vector / distance[:, None]
        along_modes = np.einsum("kea,ea->ke", self.modes[:, neighbour] - self.modes[:, atom], direction)
        along_strains = np.einsum("eb,sbc,ec->se", vector, self.strains, direction)
        along = np.concatenate([along_modes, along_strains])
        stiffness = SPRING * np.exp(-DECAY * (distance / nearest[center] - 1)) * size[center] / 2
        return (along * stiffness) @ along.T + FLOOR * np.eye(len(along))


def symmetric_modes(cell: SymmetricCell) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal displacements (k, N, 3) and strains (m, 3, 3) that leave the space group as it is."""
    n = len(cell)
    turns = np.linalg.inv(cell.matrix) @ cell.rotations.transpose(0, 2, 1) @ cell.matrix  # act on row vectors
    modes = []
    for atom in cell.orbits()[0]:
        fields = np.zeros((3, n, 3))
        for axis in range(3):
            np.add.at(fields[axis], cell.image[:, atom], turns[:, axis])
        modes.append(_orthonormal(fields.reshape(3, -1)))
    pairs = [(a, b) for a in range(3) for b in range(a, 3)]
    strains = np.zeros((6, 3, 3))
    for i, (a, b) in enumerate(pairs):
        strains[i, a, b] = strains[i, b, a] = 1.0 if a == b else 0.5**0.5
    averaged = np.einsum("gba,sbc,gcd->sad", turns, strains, turns) / len(turns)
    return np.concatenate(modes).reshape(-1, n, 3), _orthonormal(averaged.reshape(6, 9)).reshape(-1, 3, 3)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the space that the rows span."""
    _, size, basis = np.linalg.svd(rows, full_matrices=False)
    return basis[size > 1e-6 * max(size.max(), 1.0)]


def _shaken(cell: SymmetricCell) -> SymmetricCell:
    noise = np.random.default_rng(0).normal(0, SHAKE, cell.frac.shape)
    return cell.without_symmetry().moved(cell.matrix, cell.frac + noise @ np.linalg.inv(cell.matrix))

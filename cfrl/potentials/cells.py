"""Periodic cells with their symmetry: what potentials and relaxations work on.

A `SymmetricCell` is read from a pymatgen structure and checked once; everything after is numpy. Which graphs a
model makes of it is decided in the adapters (folded.py, mace.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cfrl.crystals.analysis import find_symmetry
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.symmetry import SymmetryError

if TYPE_CHECKING:
    from pymatgen.core import Structure

MIN_DISTANCE = 0.3  # angstrom; closer atoms are no crystal, and their neighbour lists explode
MAX_NEIGHBOURS = 500_000  # directed pairs within the cutoff in one crystal
MIN_VOLUME, MAX_VOLUME = 0.1, 10_000.0  # cubic angstrom per atom; a flat cell, a gas
SYMPREC = 1e-4  # angstrom; tight, since equivalent atoms are taken as exactly equivalent
MARGIN = 1e-2  # angstrom beyond the cutoff, so that equivalent bonds at the cutoff are found together
PAIRS_AT_ONCE = 2_000_000  # bounds the memory of matching atoms under operations


class UnusableCrystal(ValueError):
    """This one crystal cannot be evaluated; the message is its status."""


def reason_of(error: Exception) -> str:
    """The status of a crystal with which something failed."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UnusableCrystal) else f"failed: {type(error).__name__}: {text}"[:200]


@dataclass
class SymmetricCell:
    """A cell of N atoms with its g symmetry operations as permutations of atoms.

    matrix (3, 3): rows are the lattice vectors, angstrom
    frac (N, 3), numbers (N,)
    rotations (g, 3, 3) int: in fractional coordinates, acting on columns
    image (g, N) int, shift (g, N, 3) int: operation g takes atom i to atom image[g, i], translated by shift
    """

    matrix: np.ndarray
    frac: np.ndarray
    numbers: np.ndarray
    rotations: np.ndarray
    image: np.ndarray
    shift: np.ndarray

    @classmethod
    def of(cls, structure: Structure, symprec: float = SYMPREC) -> SymmetricCell:
        """The cell of a pymatgen structure with the operations that moyo finds.

        Args:
            symprec: angstrom.

        Raises:
            UnusableCrystal: there are no atoms, or sites that are not one element each.
        """
        if not len(structure):
            raise UnusableCrystal("no atoms")
        if not structure.is_ordered:
            raise UnusableCrystal("disordered sites")
        numbers = np.array([getattr(site.specie, "Z", 0) for site in structure])
        if not ((numbers > 0) & (numbers < len(SYMBOLS))).all():
            raise UnusableCrystal("a site holds something that is not an element")
        matrix, frac = (
            np.array(a, dtype=np.float64, order="C") for a in (structure.lattice.matrix, structure.frac_coords)
        )
        operations = _operations(matrix, frac, numbers, symprec)
        matched = operations and _match_atoms(matrix, frac, numbers, *operations, 10 * symprec)
        if matched:
            return cls(matrix, frac, numbers, operations[0], *matched)
        return cls._plain(matrix, frac, numbers)

    @classmethod
    def _plain(cls, matrix: np.ndarray, frac: np.ndarray, numbers: np.ndarray) -> SymmetricCell:
        n = len(numbers)
        identity = np.eye(3, dtype=np.int64)[None]
        return cls(matrix, frac, numbers, identity, np.arange(n)[None], np.zeros((1, n, 3), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def volume(self) -> float:
        """Cubic angstrom."""
        return float(abs(np.linalg.det(self.matrix)))

    def moved(self, matrix: np.ndarray, frac: np.ndarray) -> SymmetricCell:
        """The same atoms elsewhere; the caller keeps the symmetry."""
        return replace(self, matrix=matrix, frac=frac)

    def without_symmetry(self) -> SymmetricCell:
        return self._plain(self.matrix, self.frac, self.numbers)

    def structure(self) -> Structure:
        """As pymatgen structure."""
        from pymatgen.core import Lattice, Structure

        return Structure(Lattice(self.matrix), [SYMBOLS[z] for z in self.numbers], self.frac)

    def check(self, elements: frozenset[int], cutoff: float) -> None:
        """Raises UnusableCrystal for what no potential can evaluate, before any graph is built."""
        unknown = sorted(set(self.numbers.tolist()) - elements)
        if unknown:
            symbols = ", ".join(SYMBOLS[z] for z in unknown)
            raise UnusableCrystal(f"element {symbols} unknown to the potential")
        if not (np.isfinite(self.matrix).all() and np.isfinite(self.frac).all()):
            raise UnusableCrystal("cell or coordinates are not finite")
        volume = self.volume / len(self)
        if not MIN_VOLUME < volume < MAX_VOLUME:
            raise UnusableCrystal(f"volume of {volume:.3g} A^3 per atom")
        if np.linalg.norm(self.matrix, axis=1).min() < MIN_DISTANCE:
            raise UnusableCrystal(f"atoms closer than {MIN_DISTANCE} A")
        if len(self) / volume * 4 / 3 * np.pi * cutoff**3 > MAX_NEIGHBOURS:
            raise UnusableCrystal(f"more than {MAX_NEIGHBOURS} neighbours")

    def orbits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First atom (r,) and number of atoms (r,) of each orbit, and the orbit of each atom (N,)."""
        first, orbit, size = np.unique(self.image.min(axis=0), return_inverse=True, return_counts=True)
        return first, size, orbit

    def translations_only(self) -> SymmetricCell:
        """The same cell with its centring translations as the only symmetry."""
        keep = (self.rotations == np.eye(3, dtype=np.int64)).all(axis=(1, 2))
        return replace(self, rotations=self.rotations[keep], image=self.image[keep], shift=self.shift[keep])

    def unfold_gradient(self, gradient: np.ndarray) -> np.ndarray:
        """dE/dfrac (N, 3) of the folded energy -> of the whole cell, by averaging over the group."""
        return np.einsum("gba,gnb->na", self.rotations, gradient[self.image]) / len(self.rotations)

    def unfold_strain(self, gradient: np.ndarray) -> np.ndarray:
        """dE/dstrain (3, 3) of the folded energy -> of the whole cell."""
        inverse = np.linalg.inv(self.matrix)
        turns = inverse @ self.rotations.transpose(0, 2, 1) @ self.matrix
        average = np.einsum("gab,bc,gdc->ad", turns, gradient, turns) / len(turns)
        return (average + average.T) / 2


def neighbours(
    cell: SymmetricCell, first: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs from each orbit's first atom, sorted by orbit; they reach MARGIN beyond the cutoff.

    Args:
        first: (r,) the first atom of each orbit.
        cutoff: angstrom.

    Returns:
        orbit (e,), neighbour (e,), its translation (e, 3), distance (e,) in angstrom.

    Raises:
        UnusableCrystal: atoms overlap, or one is isolated.
    """
    from pymatgen.optimization.neighbors import find_points_in_spheres

    cart = cell.frac @ cell.matrix
    pbc = np.ones(3, dtype=np.int64)
    center, neighbour, translation, distance = find_points_in_spheres(
        cart, np.ascontiguousarray(cart[first]), cutoff + MARGIN, pbc, cell.matrix, 1e-8
    )
    translation = np.rint(translation).astype(np.int64)
    itself = (first[center] == neighbour) & (translation == 0).all(axis=1)
    center, neighbour, translation, distance = (a[~itself] for a in (center, neighbour, translation, distance))
    if len(distance) and distance.min() < MIN_DISTANCE:
        raise UnusableCrystal(f"atoms closer than {MIN_DISTANCE} A")
    if len(distance) > MAX_NEIGHBOURS:
        raise UnusableCrystal(f"more than {MAX_NEIGHBOURS} neighbours")
    if len(np.unique(center[distance < cutoff])) < len(first):
        raise UnusableCrystal(f"an atom has no neighbour within {cutoff:g} A")
    order = np.argsort(center, kind="stable")
    return center[order], neighbour[order], translation[order], distance[order]


def primitive(cell: SymmetricCell) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A smallest cell of the same crystal: without what its centring translations repeat.

    Returns:
        Its matrix (3, 3), angstrom, rows are lattice vectors; an atom (r,) for each of its atoms; which of these each
        atom of the whole cell is (N,).
    """
    cell = cell.translations_only()
    first, _, orbit = cell.orbits()
    g = len(cell.rotations)
    steps = np.rint((cell.frac[cell.image[:, 0]] + cell.shift[:, 0] - cell.frac[0]) * g) / g  # exact: g steps are whole
    around = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 1, 3)
    vectors = (steps + around).reshape(-1, 3)
    chosen = np.empty((0, 3))
    for vector in vectors[np.argsort(np.linalg.norm(vectors @ cell.matrix, axis=1), kind="stable")]:
        grown = np.vstack([chosen, vector])
        if np.linalg.matrix_rank(grown, tol=1e-6) == len(grown):
            chosen = grown
        if len(chosen) == 3:
            break
    determinant = np.linalg.det(chosen)
    if abs(abs(determinant) * g - 1) > 1e-6:  # a cell so skew that its shortest vectors are not among these
        return cell.matrix, np.arange(len(cell)), np.arange(len(cell))
    return np.sign(determinant) * chosen @ cell.matrix, first, orbit


def _operations(
    matrix: np.ndarray, frac: np.ndarray, numbers: np.ndarray, symprec: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Rotations (g, 3, 3) and translations (g, 3) of a cell, or None where moyo gives up."""
    try:
        operations = find_symmetry(matrix, frac, numbers, symprec).operations
    except SymmetryError:  # extreme cells, where no symmetry is right too
        return None
    return np.array(operations.rotations), np.array(operations.translations)


def _match_atoms(
    matrix: np.ndarray,
    frac: np.ndarray,
    numbers: np.ndarray,
    rotations: np.ndarray,
    translations: np.ndarray,
    tolerance: float,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Where each operation takes each atom: (g, n) atoms and (g, n, 3) translations; None if one goes astray."""
    moved = np.einsum("gab,nb->gna", rotations, frac) + translations[:, None]  # (g, n, 3)
    image = np.empty(moved.shape[:2], dtype=np.int64)
    for number in np.unique(numbers):
        atoms = np.nonzero(numbers == number)[0]
        pieces = 1 + len(rotations) * len(atoms) ** 2 // PAIRS_AT_ONCE
        for rows in np.array_split(np.arange(len(rotations)), pieces):
            offset = moved[rows[:, None], atoms][:, :, None] - frac[atoms]  # (g, s, s, 3)
            nearest = np.abs(offset - np.rint(offset)).sum(axis=-1).argmin(axis=-1)
            image[rows[:, None], atoms] = atoms[nearest]
    shift = np.rint(moved - frac[image])
    stray = np.linalg.norm((moved - frac[image] - shift) @ matrix, axis=-1).max()
    if stray > tolerance or (np.sort(image, axis=1) != np.arange(len(frac))).any():
        return None
    return image, shift.astype(np.int64)

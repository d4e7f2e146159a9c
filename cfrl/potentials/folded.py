"""Crystal graphs folded by symmetry: one node per orbit of atoms, one edge per orbit of bonds.

An invariant graph network gives equivalent atoms, bonds and angles the same features. It can therefore run on
orbits instead, with the orbit's size as a weight, and gives exactly the energy of the whole cell at a fraction
of the work (a rock-salt cell of 8 atoms has 2 orbits of atoms). Folding also removes centring translations, so
that a conventional cell costs no more than a primitive one. Gradients with respect to positions and strain
become those of the whole cell after averaging over the group (`SymmetricCell.unfold_gradient`).

Only for potentials whose features are scalars; what a network computes on the graph is not decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from cfrl.potentials.base import MAX_NEIGHBOURS, MIN_DISTANCE, UnusableCrystal
from cfrl.symmetry import _moyo

SYMPREC = 1e-4  # angstrom; tight, since equivalent atoms are taken as exactly equivalent
MARGIN = 1e-2  # angstrom beyond the cutoff, so that equivalent bonds at the cutoff are found together
IMAGES = 128  # lattice translations of a neighbour lie within +-64
PAIRS_AT_ONCE = 2_000_000  # bounds the memory of matching atoms under operations


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
    def of(cls, structure: Any, symmetry: bool = True, symprec: float = SYMPREC) -> SymmetricCell:
        """The cell of a pymatgen structure with the operations that moyo finds, or with none."""
        matrix = np.ascontiguousarray(structure.lattice.matrix)
        frac = np.ascontiguousarray(structure.frac_coords)
        numbers = np.array([site.specie.Z for site in structure])
        if not symmetry:
            return cls._without_symmetry(matrix, frac, numbers)
        operations = _operations(matrix, frac, numbers, symprec)
        matched = operations and _match_atoms(matrix, frac, numbers, *operations, 10 * symprec)
        if not matched:
            return cls._without_symmetry(matrix, frac, numbers)
        return cls(matrix, frac, numbers, operations[0], *matched)

    @classmethod
    def _without_symmetry(cls, matrix: np.ndarray, frac: np.ndarray, numbers: np.ndarray) -> SymmetricCell:
        n = len(numbers)
        identity = np.eye(3, dtype=np.int64)[None]
        return cls(matrix, frac, numbers, identity, np.arange(n)[None], np.zeros((1, n, 3), dtype=np.int64))

    def orbits(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First atom (r,) and number of atoms (r,) of each orbit, and the orbit of each atom (N,)."""
        first, orbit, size = np.unique(self.image.min(axis=0), return_inverse=True, return_counts=True)
        return first, size, orbit

    def translations_only(self) -> SymmetricCell:
        """The same cell with its centring translations as the only symmetry."""
        keep = (self.rotations == np.eye(3)).all(axis=(1, 2))
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


@dataclass
class FoldedGraph:
    """One crystal as orbits. "Edge" is a directed pair center -> neighbour that starts at an orbit's first atom.

    cell: the whole cell
    number, size (r,): atomic number and atoms of each orbit
    center, neighbour (e,), translation (e, 3): edges as atoms of the cell and the neighbour's lattice translation
    edge (c,): for each orbit of directed edges, one of its edges
    source, target, bond, count (c,): orbit of its center and of its neighbour, its bond, edges per center
    bond_edge (b,): one edge of each bond; a bond is an orbit of undirected edges
    angle_center, angle_bond, angle_other (a,): orbit of the atom between two bonds, the bonds
    angle_edges (2, a), angle_count (a,): the two edges from the center, and equivalent angles per bond
    """

    cell: SymmetricCell
    number: np.ndarray
    size: np.ndarray
    center: np.ndarray
    neighbour: np.ndarray
    translation: np.ndarray
    edge: np.ndarray
    source: np.ndarray
    target: np.ndarray
    bond: np.ndarray
    count: np.ndarray
    bond_edge: np.ndarray
    angle_center: np.ndarray
    angle_bond: np.ndarray
    angle_other: np.ndarray
    angle_edges: np.ndarray
    angle_count: np.ndarray

    def __len__(self) -> int:
        return len(self.number)


def fold(cell: SymmetricCell, cutoff: float, angle_cutoff: float) -> FoldedGraph:
    """The folded graph of a cell, pairs within `cutoff` and angles between pairs within `angle_cutoff`.

    Raises UnusableCrystal for overlapping or isolated atoms.
    """
    first, size, orbit = cell.orbits()
    center, neighbour, translation, distance = neighbours(cell, first, cutoff)
    edges = _EdgeOrbits(cell, first, orbit, center, neighbour, translation)
    edge, count = edges.first, edges.count
    reverse = edges.reverse()
    bonds, bond = np.unique(np.minimum(np.arange(len(edge)), reverse), return_inverse=True)
    short = distance < angle_cutoff
    angles = edges.angles(bonds, reverse, short)
    return FoldedGraph(
        cell=cell,
        number=cell.numbers[first],
        size=size,
        center=first[center],
        neighbour=neighbour,
        translation=translation,
        edge=edge,
        source=center[edge],
        target=orbit[neighbour[edge]],
        bond=bond,
        count=count,
        bond_edge=edge[bonds],
        angle_center=center[angles.edges[0]],
        angle_bond=angles.bond,
        angle_other=bond[edges.orbit[angles.edges[1]]],
        angle_edges=angles.edges,
        angle_count=angles.count,
    )


@dataclass
class _Angles:
    bond: np.ndarray
    edges: np.ndarray
    count: np.ndarray


class _EdgeOrbits:
    """Orbits of directed edges under the group; edges are compared as integers, no distance decides."""

    def __init__(self, cell, first, orbit, center, neighbour, translation) -> None:
        self.cell, self.first_atom, self.atom_orbit = cell, first, orbit
        self.center, self.neighbour, self.translation = center, neighbour, translation
        self.code = self._encode(center, neighbour, translation)
        self.images = [self._images(o) for o in range(len(first))]
        key = np.empty_like(self.code)
        for o, images in enumerate(self.images):
            key[center == o] = images.min(axis=0)
        _, self.first, self.orbit, self.count = np.unique(
            key, return_index=True, return_inverse=True, return_counts=True
        )

    def _encode(self, center: np.ndarray, neighbour: np.ndarray, translation: np.ndarray) -> np.ndarray:
        code = center * len(self.cell.numbers) + neighbour
        for axis in range(3):
            code = code * IMAGES + translation[..., axis] + IMAGES // 2
        return code

    def _images(self, o: int) -> np.ndarray:
        """(s, e): codes of the edges of orbit o's first atom under the s operations that leave it in place."""
        cell, atom = self.cell, self.first_atom[o]
        mine = self.center == o
        keep = np.nonzero(cell.image[:, atom] == atom)[0]
        neighbour, translation = self.neighbour[mine], self.translation[mine]
        moved = np.einsum("gab,eb->gea", cell.rotations[keep], translation)
        moved += cell.shift[keep][:, neighbour] - cell.shift[keep, atom][:, None]
        return self._encode(np.array(o), cell.image[keep][:, neighbour], moved)

    def reverse(self) -> np.ndarray:
        """(c,): the orbit of the reversed edges, for each orbit of edges."""
        cell = self.cell
        atom, neighbour = self.first_atom[self.center[self.first]], self.neighbour[self.first]
        back = (cell.image == cell.image.min(axis=0)).argmax(axis=0)  # an operation to the orbit's first atom
        operation = back[neighbour]
        turned = np.einsum("eab,eb->ea", cell.rotations[operation], self.translation[self.first])
        translation = cell.shift[operation, atom] - turned - cell.shift[operation, neighbour]
        code = self._encode(self.atom_orbit[neighbour], cell.image[operation, atom], translation)
        order = np.argsort(self.code)
        found = order[np.searchsorted(self.code[order], code).clip(max=len(order) - 1)]
        # an edge beyond the cutoff may lack its partner; it carries no weight and stands for itself
        return np.where(self.code[found] == code, self.orbit[found], np.arange(len(self.first)))

    def angles(self, bonds: np.ndarray, reverse: np.ndarray, short: np.ndarray) -> _Angles:
        """Angles at both ends of every short bond with the other short edges there, up to symmetry."""
        near = np.nonzero(short[self.first[bonds]])[0]
        ends = np.concatenate([bonds[near], reverse[bonds[near]]])  # orbits of directed edges
        bond = np.concatenate([near, near])
        edge = self.first[ends]
        parts = [self._angles_at(o, edge, bond, short) for o in np.unique(self.center[edge])]
        if not parts:
            return _Angles(np.empty(0, np.int64), np.empty((2, 0), np.int64), np.empty(0, np.int64))
        return _Angles(*(np.concatenate([getattr(p, f.name) for p in parts], axis=-1) for f in fields(_Angles)))

    def _angles_at(self, o: int, edge: np.ndarray, bond: np.ndarray, short: np.ndarray) -> _Angles:
        here = self.center[edge] == o
        edge, bond = edge[here], bond[here]
        mine = np.nonzero(self.center == o)[0]
        others = short[mine]
        images = self.images[o]  # (s, e)
        fixes = images[:, np.searchsorted(mine, edge)] == self.code[edge]  # (s, k): leaves the first edge in place
        partners = images[:, others]  # (s, f)
        key = np.where(fixes[:, :, None], partners[:, None, :], np.iinfo(np.int64).max).min(axis=0)  # (k, f)
        _, key = np.unique(key, return_inverse=True)
        key = key.reshape(len(edge), -1) + np.arange(len(edge))[:, None] * (key.max() + 1)
        key[edge[:, None] == mine[others][None]] = -1  # an edge makes no angle with itself
        found, index, count = np.unique(key, return_index=True, return_counts=True)
        index, count = index[found >= 0], count[found >= 0]
        row, column = np.divmod(index, int(others.sum()))
        return _Angles(bond[row], np.stack([edge[row], mine[others][column]]), count)


def neighbours(
    cell: SymmetricCell, first: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs from each orbit's first atom: orbit, neighbour, its translation, distance, sorted by orbit.

    They reach MARGIN beyond the cutoff. Raises UnusableCrystal for overlapping or isolated atoms.
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


def _operations(matrix, frac, numbers, symprec):
    """Rotations (g, 3, 3) and translations (g, 3) of a cell, or None where moyo gives up."""
    cell_type, dataset_type = _moyo()
    cell = cell_type(matrix.tolist(), frac.tolist(), numbers.tolist())
    try:
        operations = dataset_type(cell, symprec=symprec).operations
    except Exception:  # extreme cells; no symmetry is always right
        return None
    return np.array(operations.rotations), np.array(operations.translations)


def _match_atoms(matrix, frac, numbers, rotations, translations, tolerance):
    """Where each operation takes each atom: (g, n) atoms and (g, n, 3) translations; None if one goes astray."""
    moved = np.einsum("gab,nb->gna", rotations, frac) + translations[:, None]
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

"""Crystal graphs folded by symmetry: one node per orbit of atoms, one edge per orbit of bonds.

An invariant graph network gives equivalent atoms, bonds and angles the same features. It can therefore run on
orbits instead, with the orbit's size as a weight, and gives exactly the energy of the whole cell at a fraction
of the work (a rock-salt cell of 8 atoms has 2 orbits of atoms). Folding also removes centring translations, so
that a conventional cell costs no more than a primitive one. Gradients with respect to positions and strain
become those of the whole cell after averaging over the group (`SymmetricCell.unfold_gradient`).

Only for potentials whose features are scalars; what a network computes on the graph is not decided here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from cfrl.potentials.cells import SymmetricCell, neighbours

IMAGES = 128  # lattice translations of a neighbour lie within +-64


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
    """The folded graph of a cell.

    Args:
        cutoff, angle_cutoff: angstrom; of pairs, and of the pairs that have angles between them.

    Raises:
        UnusableCrystal: atoms overlap, or one is isolated.
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

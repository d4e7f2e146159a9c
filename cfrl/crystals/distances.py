"""How near the atoms of a crystal come to each other, periodic images included."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cfrl.crystals.elements import COVALENT_RADII

if TYPE_CHECKING:
    from pymatgen.core import Structure

_PACKING = 1.13  # no two of N points in a volume V can all be farther apart than 1.1225 (V / N)^(1/3)


def shortest_distance(structure: Structure) -> float:
    """Between two atoms, angstrom."""
    radius = _PACKING * (structure.volume / len(structure)) ** (1 / 3)
    return float(structure.get_neighbor_list(radius)[3].min())


def contacts(structure: Structure, limit: float) -> np.ndarray:
    """For each atom the smallest distance over the sum of both covalent radii (Cordero et al. 2008), or `limit`; (N,).

    The smallest of all tells overlaps, the largest an atom on its own.
    """
    radii = np.array([COVALENT_RADII[site.specie.Z] for site in structure])
    center, neighbour, _, distance = structure.get_neighbor_list(2 * limit * radii.max())
    nearest = np.full(len(structure), limit)
    np.minimum.at(nearest, center, distance / (radii[center] + radii[neighbour]))
    return nearest


def closest_contact(structure: Structure, limit: float) -> float:
    """The smallest of all `contacts`."""
    return float(contacts(structure, limit).min())

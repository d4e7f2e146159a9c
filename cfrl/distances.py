"""How near the atoms of a crystal come to each other, periodic images included."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pymatgen.core import Structure

_PACKING = 1.13  # no two of N points in a volume V can all be farther apart than 1.1225 (V / N)^(1/3)


def shortest_distance(structure: Structure) -> float:
    """Between two atoms, angstrom."""
    radius = _PACKING * (structure.volume / len(structure)) ** (1 / 3)
    return float(structure.get_neighbor_list(radius)[3].min())


def closest_contact(structure: Structure, limit: float) -> float:
    """The smallest distance over the sum of the covalent radii (Cordero et al. 2008) of its two atoms, or `limit`."""
    from ase.data import covalent_radii

    radii = covalent_radii[[site.specie.Z for site in structure]]
    center, neighbour, _, distance = structure.get_neighbor_list(2 * limit * radii.max())
    return float((distance / (radii[center] + radii[neighbour])).min(initial=limit))

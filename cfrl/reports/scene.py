"""A crystal to look at, and to take away."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.display import shown_atoms
from cfrl.crystals.elements import SYMBOLS
from cfrl.io.export import cif_texts

_BOND = 1.15  # a bond: closer than so many sums of covalent radii
_SYMPREC = 0.01  # angstrom
_MAX_BONDED = 400  # atoms; a larger cell is shown without bonds


def scene(crystal: CrystalBatch) -> dict[str, Any]:
    """A conventional cell for 3Dmol: atoms (those on the cell's faces on every such face), bonds, edges; angstrom."""
    from ase.data import covalent_radii

    frac, numbers = shown_atoms(crystal)
    matrix = crystal.lattice_matrix()[0].double().numpy()
    points = frac @ matrix
    bonds: list[list[int]] = []
    if len(points) <= _MAX_BONDED:
        reach = _BOND * (covalent_radii[numbers][:, None] + covalent_radii[numbers])
        distance = np.linalg.norm(points[:, None] - points, axis=-1)
        near = np.triu(distance < reach, 1)
        if len(set(numbers.tolist())) > 1:
            near &= numbers[:, None] != numbers
        bonds = np.argwhere(near).tolist()
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    edges = [(a, b) for i, a in enumerate(corners) for b in corners[i + 1 :] if np.abs(a - b).sum() == 1]
    return {
        "atoms": [[SYMBOLS[z], *np.round(xyz, 3).tolist()] for z, xyz in zip(numbers.tolist(), points, strict=True)],
        "bonds": bonds,
        "box": [np.round(np.stack(edge) @ matrix, 3).tolist() for edge in edges],
    }


def cif_links(crystals: CrystalBatch) -> list[str]:
    """A `data:` address of each crystal's CIF, with the symmetry: the page itself holds what the link downloads."""
    return ["data:chemical/x-cif," + quote(text) for text in cif_texts(crystals.to_structures(), _SYMPREC)]

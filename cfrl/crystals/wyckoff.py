"""Tables of all space groups: their Wyckoff positions, lattice parameters and normalisers.

They are read from assets/wyckoff.npz (made by scripts/make_wyckoff_tables.py), which holds the International Tables'
coordinate triplets of every Wyckoff position in the standard settings: unique axis b and cell choice 1, hexagonal axes
for rhombohedral groups, origin choice 2 where there are two. Letters are counted from one (1 = 'a', ..., 26 = 'z',
27 = 'A'); 0 is an empty site.

The first triplet of every position is a projection: its free coordinates stand for themselves and its tied ones are
integer combinations of *earlier* free ones plus a constant, as in (x, 2x, 1/4). So it maps coordinates to coordinates,
and wrapping a coordinate to [0, 1) never makes a tied one ambiguous.

What is done with the tables is in symmetry.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from cfrl.assets import ASSETS

NUM_SPACE_GROUPS = 230
NUM_LETTERS = 28  # with 0 = empty
TABLES_PATH = ASSETS / "wyckoff.npz"

_TRANSLATION_DENOMINATOR = 24

# last space group of the system, independent ones of (a, b, c, alpha, beta, gamma), the length that each of
# a, b, c copies, angles fixed by symmetry (degrees)
_LATTICE_SYSTEMS = (
    (2, (0, 1, 2, 3, 4, 5), (0, 1, 2), {}),  # triclinic
    (15, (0, 1, 2, 4), (0, 1, 2), {3: 90.0, 5: 90.0}),  # monoclinic, unique axis b
    (74, (0, 1, 2), (0, 1, 2), {3: 90.0, 4: 90.0, 5: 90.0}),  # orthorhombic
    (142, (0, 2), (0, 0, 2), {3: 90.0, 4: 90.0, 5: 90.0}),  # tetragonal
    (194, (0, 2), (0, 0, 2), {3: 90.0, 4: 90.0, 5: 120.0}),  # trigonal and hexagonal
    (230, (0,), (0, 0, 0), {3: 90.0, 4: 90.0, 5: 90.0}),  # cubic
)


@dataclass(frozen=True)
class WyckoffTables:
    """Dense tables indexed by [space_group, wyckoff]; row 0 and letter 0 are empty. Matrices are float64.

    multiplicity (231, 28) int64: atoms per conventional cell.
    dof (231, 28) int64: number of free coordinates of the first triplet.
    free (231, 28, 3) bool: the coordinate is free.
    scored (231, 28, 3) bool: the coordinate is not a constant (the published code scores these).
    num_letters (231,) int64: number of Wyckoff positions, that is, the last letter.
    project_matrix (231, 28, 3, 3), project_shift (231, 28, 3): the first triplet, as the affine map of
        coordinates that keeps the free ones and computes the others from them.
    lattice_free (231, 6) bool: which of a, b, c, alpha, beta, gamma are independent.
    lattice_source (231, 6) int64: the parameter that each one copies.
    lattice_angle (231, 6): its value where symmetry fixes it (degrees), else NaN.
    polar (231, 3) bool: the origin is arbitrary along this axis.
    polar_shifts (p, 3), polar_count (231,), polar_offset (231,) int64: by how much operations move points along polar
        axes, each value once: (0, 0, 0) and, where there is a screw c/2, (0, 0, 1/2).
    rotations (t, 3, 3), translations (t, 3): all triplets of all positions, acting on the representative.
    offset (231, 28) int64: where the triplets of a position begin.
    """

    multiplicity: Tensor
    dof: Tensor
    free: Tensor
    scored: Tensor
    num_letters: Tensor
    project_matrix: Tensor
    project_shift: Tensor
    lattice_free: Tensor
    lattice_source: Tensor
    lattice_angle: Tensor
    polar: Tensor
    polar_shifts: Tensor
    polar_count: Tensor
    polar_offset: Tensor
    rotations: Tensor
    translations: Tensor
    offset: Tensor


@dataclass(frozen=True)
class NormalizerTables:
    """The other descriptions of a crystal: one operation for each coset of its group in the group's normaliser.

    Other origins (in Fm-3m the shift by (1/2, 1/2, 1/2), which exchanges a and b) and other axes that leave
    the shape of a general cell of the crystal system alone; in orthorhombic groups also permuted axes. Shifts
    along polar axes are arbitrary and left out. The first operation of a group is the identity; then come
    those that keep the hand of the crystal, then its mirror images.

    count (231,), proper_count (231,) int64: descriptions, and those of the same hand.
    offset (231,) int64: where the operations of a group begin.
    rotations (m, 3, 3), translations (m, 3): acting on fractional coordinates.
    letters (m, 28) int64: the Wyckoff position that each one becomes.
    lengths (m, 3) int64: the old axis that each of the new a, b, c is.
    """

    count: Tensor
    proper_count: Tensor
    offset: Tensor
    rotations: Tensor
    translations: Tensor
    letters: Tensor
    lengths: Tensor


@cache
def _stored() -> dict[str, np.ndarray]:
    with np.load(TABLES_PATH) as file:
        return dict(file)


@cache
def arrays() -> dict[str, np.ndarray]:
    """The fields of WyckoffTables as numpy arrays, for work on single crystals."""
    stored = _stored()
    multiplicity = stored["multiplicity"].astype(np.int64)
    rotations = stored["rotations"].astype(np.float64)
    translations = stored["translations"] / _TRANSLATION_DENOMINATOR
    offset = (np.cumsum(multiplicity) - multiplicity.ravel()).reshape(multiplicity.shape)
    exists = multiplicity > 0
    first = np.where(exists, offset, 0)
    matrix = rotations[first] * exists[..., None, None]
    free = np.diagonal(matrix, axis1=-2, axis2=-1) != 0
    return {
        "multiplicity": multiplicity,
        "dof": free.sum(-1),
        "free": free,
        "scored": matrix.any(-1),
        "num_letters": exists.sum(-1),
        "project_matrix": matrix,
        "project_shift": translations[first] * exists[..., None],
        **_polar_arrays(multiplicity, rotations, translations, offset),
        "rotations": rotations,
        "translations": translations,
        "offset": offset,
        **_lattice_arrays(),
    }


def _polar_arrays(
    multiplicity: np.ndarray, rotations: np.ndarray, translations: np.ndarray, offset: np.ndarray
) -> dict[str, np.ndarray]:
    """Axes whose coordinates no operation of the group turns, and by how much operations shift these coordinates."""
    polar = np.zeros((NUM_SPACE_GROUPS + 1, 3), dtype=bool)
    shifts = [np.zeros((0, 3))]
    for group in range(1, NUM_SPACE_GROUPS + 1):
        general = (multiplicity[group] > 0).sum()
        operations = slice(offset[group, general], offset[group, general] + multiplicity[group, general])
        polar[group] = (rotations[operations] == np.eye(3)).all((0, 1))
        shifts.append(np.unique(translations[operations] * polar[group], axis=0))
    count = np.array([len(part) for part in shifts])
    return {
        "polar": polar,
        "polar_shifts": np.concatenate(shifts),
        "polar_count": count,
        "polar_offset": np.cumsum(count) - count,
    }


def _lattice_arrays() -> dict[str, np.ndarray]:
    free = np.zeros((NUM_SPACE_GROUPS + 1, 6), dtype=bool)
    source = np.tile(np.arange(6), (NUM_SPACE_GROUPS + 1, 1))
    angle = np.full((NUM_SPACE_GROUPS + 1, 6), np.nan)
    begin = 1
    for end, independent, lengths, fixed in _LATTICE_SYSTEMS:
        groups = slice(begin, end + 1)
        free[groups, independent] = True
        source[groups, :3] = lengths
        for index, value in fixed.items():
            angle[groups, index] = value
        begin = end + 1
    return {"lattice_free": free, "lattice_source": source, "lattice_angle": angle}


@cache
def tables(device: str | torch.device = "cpu") -> WyckoffTables:
    """The Wyckoff tables on a device (cached)."""
    return WyckoffTables(**{name: torch.from_numpy(array).to(device) for name, array in arrays().items()})


@cache
def normalizer_tables(device: str | torch.device = "cpu") -> NormalizerTables:
    """The normalisers of all groups on a device (cached)."""
    stored = _stored()
    count = stored["normalizer_count"].astype(np.int64)
    rotations = stored["normalizer_rotations"].astype(np.float64)
    group = np.repeat(np.arange(NUM_SPACE_GROUPS + 1), count)
    fields = {
        "count": count,
        "proper_count": np.bincount(group[np.linalg.det(rotations) > 0], minlength=NUM_SPACE_GROUPS + 1),
        "offset": np.cumsum(count) - count,
        "rotations": rotations,
        "translations": stored["normalizer_translations"] / _TRANSLATION_DENOMINATOR,
        "letters": stored["normalizer_letters"].astype(np.int64),
        "lengths": np.abs(rotations).argmax(-1),
    }
    return NormalizerTables(**{name: torch.from_numpy(array).to(device) for name, array in fields.items()})

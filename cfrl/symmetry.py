"""Space-group symmetry: Wyckoff tables, orbit expansion, and from a structure to its asymmetric unit.

The tables (assets/wyckoff.npz, made by scripts/make_wyckoff_tables.py) hold the International Tables'
coordinate triplets of every Wyckoff position in the standard settings: unique axis b and cell choice 1,
hexagonal axes for rhombohedral groups, origin choice 2 where there are two. Letters are counted from one
(1 = 'a', ..., 26 = 'z', 27 = 'A'); 0 is an empty site.

The first triplet of every position is a projection: its free coordinates stand for themselves and its tied
ones are integer combinations of *earlier* free ones plus a constant, as in (x, 2x, 1/4). So it maps
coordinates to coordinates, and wrapping a coordinate to [0, 1) never makes a tied one ambiguous.

What a crystal is made of (CrystalBatch) lives in crystal.py; nothing here knows of it. moyopy is imported
only by `analyse`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfrl.errors import UserError

NUM_SPACE_GROUPS = 230
NUM_LETTERS = 28  # with 0 = empty
MAX_SITES = 20
TABLES_PATH = Path(__file__).parent / "assets" / "wyckoff.npz"

_TRANSLATION_DENOMINATOR = 24
_ROUNDING = 10_000  # coordinates that differ by less than 1e-4 count as equal when descriptions are ordered
_SNAP_TOLERANCE = 2e-3  # fractional; how far a refined atom may lie from its Wyckoff position

# last space group, independent lattice parameters, parameter that each of (a, b, c, alpha, beta, gamma) copies,
# angles fixed by symmetry (degrees)
_LATTICE_SYSTEMS = (
    (2, (0, 1, 2, 3, 4, 5), (0, 1, 2), {}),  # triclinic
    (15, (0, 1, 2, 4), (0, 1, 2), {3: 90.0, 5: 90.0}),  # monoclinic, unique axis b
    (74, (0, 1, 2), (0, 1, 2), {3: 90.0, 4: 90.0, 5: 90.0}),  # orthorhombic
    (142, (0, 2), (0, 0, 2), {3: 90.0, 4: 90.0, 5: 90.0}),  # tetragonal
    (194, (0, 2), (0, 0, 2), {3: 90.0, 4: 90.0, 5: 120.0}),  # trigonal and hexagonal
    (230, (0,), (0, 0, 0), {3: 90.0, 4: 90.0, 5: 90.0}),  # cubic
)


class SymmetryError(UserError):
    """A structure that cannot be described by a space group and Wyckoff sites; the message says why."""


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
    rotations: Tensor
    translations: Tensor
    offset: Tensor


@cache
def _arrays() -> dict[str, np.ndarray]:
    """The fields of WyckoffTables as numpy arrays."""
    with np.load(TABLES_PATH) as file:
        multiplicity = file["multiplicity"].astype(np.int64)
        rotations = file["rotations"].astype(np.float64)
        translations = file["translations"] / _TRANSLATION_DENOMINATOR
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
        "rotations": rotations,
        "translations": translations,
        "offset": offset,
        **_lattice_arrays(),
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
    return WyckoffTables(**{name: torch.from_numpy(array).to(device) for name, array in _arrays().items()})


def letter_name(wyckoff: int) -> str:
    """'a' for 1, ..., 'z' for 26, 'A' for 27."""
    if not 1 <= wyckoff < NUM_LETTERS:
        raise ValueError(f"no Wyckoff letter has the number {wyckoff}")
    return "abcdefghijklmnopqrstuvwxyzA"[wyckoff - 1]


def letter_index(letter: str) -> int:
    """Inverse of `letter_name`."""
    return "abcdefghijklmnopqrstuvwxyzA".index(letter) + 1


def multiplicity(space_group: Tensor, wyckoff: Tensor) -> Tensor:
    """Atoms per conventional cell of each site: (n,), (n, s) -> (n, s); 0 for empty sites and unknown letters."""
    return tables(wyckoff.device).multiplicity[space_group[:, None], wyckoff]


def wrap(frac_coords: Tensor) -> Tensor:
    """Fractional coordinates in [0, 1), also where rounding would give 1."""
    wrapped = frac_coords - frac_coords.floor()
    return torch.where(wrapped >= 1, torch.zeros_like(wrapped), wrapped)


def project_coords(space_group: Tensor, wyckoff: Tensor, frac_coords: Tensor) -> Tensor:
    """Put representatives on the first triplet of their Wyckoff position: (n, s, 3) -> (n, s, 3) in [0, 1).

    Free coordinates are kept (wrapped), the others computed from them; empty sites become 0.
    """
    t = tables(frac_coords.device)
    matrix = t.project_matrix[space_group[:, None], wyckoff].to(frac_coords.dtype)
    shift = t.project_shift[space_group[:, None], wyckoff].to(frac_coords.dtype)
    return wrap((matrix * frac_coords[..., None, :]).sum(-1) + shift)


def constrain_lattice(space_group: Tensor, lattice: Tensor) -> Tensor:
    """Fill in the lattice parameters that symmetry ties or fixes: (n,), (n, 6) -> (n, 6); angstrom, degrees."""
    t = tables(lattice.device)
    copied = lattice.gather(-1, t.lattice_source[space_group])
    angle = t.lattice_angle[space_group].to(lattice.dtype)
    return torch.where(angle.isnan(), copied, angle)


def lattice_matrix(lattice: Tensor) -> Tensor:
    """Lattice vectors as rows, (n, 6) -> (n, 3, 3) in angstrom, oriented as pymatgen does (c along z, a in xz)."""
    a, b, c = lattice[..., :3].unbind(-1)
    alpha, beta, gamma = lattice[..., 3:].deg2rad().unbind(-1)
    cos_gamma_star = (alpha.cos() * beta.cos() - gamma.cos()) / (alpha.sin() * beta.sin())
    gamma_star = cos_gamma_star.clamp(-1, 1).acos()
    zero = torch.zeros_like(a)
    vector_a = [a * beta.sin(), zero, a * beta.cos()]
    vector_b = [-b * alpha.sin() * gamma_star.cos(), b * alpha.sin() * gamma_star.sin(), b * alpha.cos()]
    return torch.stack(vector_a + vector_b + [zero, zero, c], -1).unflatten(-1, (3, 3))


def expand_orbits(space_group: Tensor, wyckoff: Tensor, frac_coords: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All atoms of the conventional cells of a batch.

    space_group (n,), wyckoff (n, s), frac_coords (n, s, 3) of the representatives (projected on their
    Wyckoff position first, so they need not be exact). Returns fractional coordinates (N, 3) in [0, 1) and,
    for each atom, its crystal (N,) and its site (N,). Atoms are ordered by crystal, then site; the first atom
    of a site is its representative.
    """
    t = tables(frac_coords.device)
    count = t.multiplicity[space_group[:, None], wyckoff].flatten()
    row = torch.repeat_interleave(count)  # (N,) crystal * s + site
    first = (count.cumsum(0) - count)[row]
    triplet = (
        t.offset[space_group[:, None], wyckoff].flatten()[row]
        + torch.arange(len(row), device=row.device)
        - first
    )
    rotation = t.rotations.to(frac_coords.dtype)[triplet]
    translation = t.translations.to(frac_coords.dtype)[triplet]
    frac = wrap((rotation * frac_coords.flatten(0, 1)[row][:, None, :]).sum(-1) + translation)
    num_sites = wyckoff.shape[1]
    return frac, row // num_sites, row % num_sites


class AsymmetricUnit(NamedTuple):
    """A crystal in the published representation, as numpy arrays; see `analyse`."""

    space_group: int
    wyckoff: np.ndarray  # (s,) int64
    species: np.ndarray  # (s,) int64
    frac_coords: np.ndarray  # (s, 3)
    lattice: np.ndarray  # (6,) conventional cell, angstrom and degrees


def analyse(
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    symprec: float = 0.01,
    max_sites: int = MAX_SITES,
) -> AsymmetricUnit:
    """Find the space group with moyo and describe the crystal in the standard setting.

    lattice (3, 3) rows in angstrom, frac_coords (N, 3), numbers (N,) atomic numbers, symprec in angstrom.
    Each orbit is given by its point that satisfies the first coordinate triplet of its Wyckoff position
    and, of these, has the smallest (x, y, z); sites are ordered by letter, then x, y, z. Among equivalent
    origins and axes of the space group moyo's choice stands.

    Raises SymmetryError when moyo finds no symmetry or the crystal has more than max_sites sites.
    """
    from moyopy import Cell, MoyoDataset

    cell = Cell(np.asarray(lattice).tolist(), np.asarray(frac_coords).tolist(), np.asarray(numbers).tolist())
    try:
        found = MoyoDataset(cell, symprec=symprec)
    except ValueError as error:
        raise SymmetryError(f"symmetry not found: {error}") from error

    orbit_atoms = np.unique(found.orbits)
    if len(orbit_atoms) > max_sites:
        raise SymmetryError(f"too many sites: {len(orbit_atoms)} inequivalent sites, at most {max_sites} fit")
    letters, mapping = found.wyckoffs, found.mapping_std_prim
    wyckoff = np.array([letter_index(letters[i]) for i in orbit_atoms])
    species = np.asarray(numbers, dtype=np.int64)[orbit_atoms]
    basis, primitive = np.array(found.std_cell.basis), found.prim_std_cell
    positions = np.array(primitive.positions)[[mapping[i] for i in orbit_atoms]]
    positions = positions @ np.array(primitive.basis) @ np.linalg.inv(basis)

    frac_coords, key = _representatives(found.number, wyckoff, positions)
    expected = _arrays()["multiplicity"][found.number, wyckoff].sum()
    if expected != len(found.std_cell.numbers):
        raise SymmetryError(
            f"symmetry not consistent: {len(found.std_cell.numbers)} atoms on {expected} positions"
        )
    order = np.lexsort((key, wyckoff))
    return AsymmetricUnit(
        found.number,
        wyckoff[order],
        species[order],
        frac_coords[order],
        _lattice_parameters(found.number, basis),
    )


def _representatives(
    space_group: int, wyckoff: np.ndarray, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each orbit, given by any of its points (s, 3), the smallest point on the first triplet, and its rank."""
    t = _arrays()
    general = t["num_letters"][space_group]
    begin = t["offset"][space_group, general]
    operations = slice(begin, begin + t["multiplicity"][space_group, general])
    orbit = positions @ t["rotations"][operations].transpose(0, 2, 1) + t["translations"][operations][:, None]
    orbit = orbit.transpose(1, 0, 2)  # (s, operations, 3)
    matrix, shift = t["project_matrix"][space_group, wyckoff], t["project_shift"][space_group, wyckoff]
    projected = orbit @ matrix.transpose(0, 2, 1) + shift[:, None]
    distance = orbit - projected
    distance = np.abs(distance - np.rint(distance)).max(-1)
    key = np.where(distance < _SNAP_TOLERANCE, _lexicographic_key(projected), np.inf)
    best = key.argmin(-1)[:, None]
    key = np.take_along_axis(key, best, -1)[:, 0]
    if np.isinf(key).any():
        raise SymmetryError(
            "symmetry not consistent: an atom lies off its Wyckoff position; try a smaller symprec"
        )
    frac_coords = np.take_along_axis(projected, best[..., None], 1)[:, 0]
    frac_coords = frac_coords - np.floor(frac_coords)
    frac_coords[frac_coords >= 1 - 0.5 / _ROUNDING] = 0.0
    return frac_coords, key


def _lexicographic_key(frac_coords: np.ndarray) -> np.ndarray:
    """One number that orders points (..., 3) by wrapped x, then y, then z, each rounded to 1e-4."""
    digits = np.rint(frac_coords * _ROUNDING) % _ROUNDING
    return (digits[..., 0] * _ROUNDING + digits[..., 1]) * _ROUNDING + digits[..., 2]


def _lattice_parameters(space_group: int, basis: np.ndarray) -> np.ndarray:
    """a, b, c, alpha, beta, gamma of basis rows, exact where symmetry fixes them."""
    lengths = np.linalg.norm(basis, axis=1)
    metric = basis @ basis.T / np.outer(lengths, lengths)
    angles = np.degrees(np.arccos(metric[[1, 0, 0], [2, 2, 1]]))
    parameters = torch.from_numpy(np.concatenate([lengths, angles]))
    return constrain_lattice(torch.tensor([space_group]), parameters[None])[0].numpy()

"""Space-group symmetry: Wyckoff tables, orbit expansion, and from a structure to its asymmetric unit.

The tables (assets/wyckoff.npz, made by scripts/make_wyckoff_tables.py) hold the International Tables'
coordinate triplets of every Wyckoff position in the standard settings: unique axis b and cell choice 1,
hexagonal axes for rhombohedral groups, origin choice 2 where there are two. Letters are counted from one
(1 = 'a', ..., 26 = 'z', 27 = 'A'); 0 is an empty site.

The first triplet of every position is a projection: its free coordinates stand for themselves and its tied
ones are integer combinations of *earlier* free ones plus a constant, as in (x, 2x, 1/4). So it maps
coordinates to coordinates, and wrapping a coordinate to [0, 1) never makes a tied one ambiguous.

What a crystal is made of (CrystalBatch) lives in crystal.py; nothing here knows of it. moyopy is imported
only by `find_symmetry`.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cfrl.assets import ASSETS
from cfrl.errors import UserError

NUM_SPACE_GROUPS = 230
NUM_LETTERS = 28  # with 0 = empty
MAX_SITES = 20
TABLES_PATH = ASSETS / "wyckoff.npz"

_TRANSLATION_DENOMINATOR = 24
ON_POSITION = 1e-4  # fractional; a point this close to its Wyckoff position lies on it
_ROUNDING = 10_000  # coordinates that differ by less than 1e-4 count as equal where points are ordered
_STEP_OFFSET = (3 - 5**0.5) / 2  # of a step; the golden ratio is far from all fractions
_KEY_END = _ROUNDING**3  # larger than the order key of any point
_ZERO_TOLERANCE = 1e-6  # a coordinate this close below 1 is 0

CRYSTAL_SYSTEMS = {  # name -> its last space group
    "triclinic": 2,
    "monoclinic": 15,
    "orthorhombic": 74,
    "tetragonal": 142,
    "trigonal": 167,
    "hexagonal": 194,
    "cubic": 230,
}

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


class SymmetryError(UserError):
    """A structure that cannot be described by a space group and Wyckoff sites; the message says why."""


class OddCellError(SymmetryError):
    """A cell so thin, skewed, dense or large that moyo may work on it for ever, or abort the process."""


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
def _arrays() -> dict[str, np.ndarray]:
    """The fields of WyckoffTables as numpy arrays."""
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
    return WyckoffTables(**{name: torch.from_numpy(array).to(device) for name, array in _arrays().items()})


@cache
def normalizer_tables(device: str | torch.device = "cpu") -> NormalizerTables:
    """The normalisers of all groups on a device (cached)."""
    stored = _stored()
    count = stored["normalizer_count"].astype(np.int64)
    rotations = stored["normalizer_rotations"].astype(np.float64)
    group = np.repeat(np.arange(NUM_SPACE_GROUPS + 1), count)
    arrays = {
        "count": count,
        "proper_count": np.bincount(group[np.linalg.det(rotations) > 0], minlength=NUM_SPACE_GROUPS + 1),
        "offset": np.cumsum(count) - count,
        "rotations": rotations,
        "translations": stored["normalizer_translations"] / _TRANSLATION_DENOMINATOR,
        "letters": stored["normalizer_letters"].astype(np.int64),
        "lengths": np.abs(rotations).argmax(-1),
    }
    return NormalizerTables(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def normalizer_operations(space_group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations (k, 3, 3), translations (k, 3) and letter maps (k, 28) of one group; see NormalizerTables."""
    t = normalizer_tables()
    rows = slice(int(t.offset[space_group]), int(t.offset[space_group] + t.count[space_group]))
    return t.rotations[rows], t.translations[rows], t.letters[rows]


def letter_name(wyckoff: int) -> str:
    """'a' for 1, ..., 'z' for 26, 'A' for 27."""
    if not 1 <= wyckoff < NUM_LETTERS:
        raise ValueError(f"no Wyckoff letter has the number {wyckoff}")
    return "abcdefghijklmnopqrstuvwxyzA"[wyckoff - 1]


def letter_index(letter: str) -> int:
    """Inverse of `letter_name`."""
    return "abcdefghijklmnopqrstuvwxyzA".index(letter) + 1


def multiplicity(space_group: Tensor, wyckoff: Tensor) -> Tensor:
    """Atoms per conventional cell of each site, (n,), (n, s) -> (n, s); 0 where the letter does not exist."""
    return tables(wyckoff.device).multiplicity[space_group[:, None], wyckoff]


def wrap(frac_coords: Tensor) -> Tensor:
    """Fractional coordinates in [0, 1), also where rounding would give 1."""
    wrapped = frac_coords - frac_coords.floor()
    return torch.where(wrapped >= 1, torch.zeros_like(wrapped), wrapped)


def project_coords(space_group: Tensor, wyckoff: Tensor, frac_coords: Tensor) -> Tensor:
    """Put representatives on the first triplet of their Wyckoff position: (n, s, 3) -> (n, s, 3) in [0, 1).

    Free coordinates are kept (wrapped), the others computed from them; empty sites become 0.
    """
    return _project(tables(frac_coords.device), space_group[:, None], wyckoff, frac_coords)


def _project(t: WyckoffTables, space_group: Tensor, wyckoff: Tensor, frac_coords: Tensor) -> Tensor:
    matrix = t.project_matrix[space_group, wyckoff].to(frac_coords.dtype)
    shift = t.project_shift[space_group, wyckoff].to(frac_coords.dtype)
    return wrap((matrix * frac_coords[..., None, :]).sum(-1) + shift)


def constrain_lattice(space_group: Tensor, lattice: Tensor) -> Tensor:
    """Fill in what symmetry ties or fixes: (n,), (n, 6) -> (n, 6); angstrom and degrees."""
    t = tables(lattice.device)
    copied = lattice.gather(-1, t.lattice_source[space_group])
    angle = t.lattice_angle[space_group].to(lattice.dtype)
    return torch.where(angle.isnan(), copied, angle)


def lattice_matrix(lattice: Tensor) -> Tensor:
    """Lattice vectors as rows, (n, 6) -> (n, 3, 3), angstrom; oriented as in pymatgen (c along z, a in xz)."""
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
    first = t.offset[space_group[:, None], wyckoff].flatten() - (count.cumsum(0) - count)
    triplet = first[row] + torch.arange(len(row), device=row.device)
    rotation = t.rotations.to(frac_coords.dtype)[triplet]
    translation = t.translations.to(frac_coords.dtype)[triplet]
    frac = wrap((rotation * frac_coords.flatten(0, 1)[row][:, None, :]).sum(-1) + translation)
    num_sites = wyckoff.shape[1]
    return frac, row // num_sites, row % num_sites


def representatives(space_group: Tensor, wyckoff: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """From any point of each orbit to the one that describes it: (n,), (n, s), (n, s, 3) -> (n, s, 3), (n, s).

    Of the points of the orbit that lie on the first triplet of the Wyckoff position, the smallest by x, y, z
    (to within 1e-4). The second tensor says how far, in fractional units, the nearest point of the orbit is
    from the first triplet: beyond ON_POSITION the letter is wrong and the representative means nothing.
    """
    n, s = wyckoff.shape
    t = tables(points.device)
    general = t.num_letters[space_group][:, None] * (wyckoff > 0)
    images, crystal, site = expand_orbits(space_group, general, points)
    row = crystal * s + site
    letter = wyckoff.flatten()[row]
    projected = _project(t, space_group[crystal], letter, images)
    distance = projected - images
    distance = (distance - distance.round()).abs().amax(-1)
    nearest = _scatter_min(row, distance, n * s)
    key = _order_key(projected).where(distance < ON_POSITION, _KEY_END)
    chosen = (key == _scatter_min(row, key, n * s)[row]).nonzero()[:, 0]
    smallest = torch.zeros_like(points).flatten(0, 1)
    smallest[row[chosen]] = projected[chosen]
    smallest = torch.where(smallest > 1 - _ZERO_TOLERANCE, 0, smallest).unflatten(0, (n, s))
    return project_coords(space_group, wyckoff, smallest), nearest.unflatten(0, (n, s))


def sort_sites(wyckoff: Tensor, frac_coords: Tensor) -> Tensor:
    """The order of sites by letter, then x, y, z (to within 1e-4), empty ones last: (n, s), (n, s, 3) -> (n, s)."""
    letter = torch.where(wyckoff > 0, wyckoff, NUM_LETTERS)
    return (letter * _KEY_END + _order_key(frac_coords)).argsort(dim=-1, stable=True)


def transform_sites(
    space_group: Tensor, wyckoff: Tensor, frac_coords: Tensor, lattice: Tensor, choice: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Describe crystals from another origin or other axes; choice (n,) counts as NormalizerTables does.

    Returns wyckoff (n, s), one point of each orbit (n, s, 3) and lattice (n, 6); sites keep their places, so
    they are no longer ordered, and the points are not yet the representatives (see `representatives`).
    """
    t = normalizer_tables(frac_coords.device)
    row = t.offset[space_group] + choice
    rotation = t.rotations[row].to(frac_coords.dtype)
    points = torch.einsum("nij,nsj->nsi", rotation, frac_coords) + t.translations[row].to(rotation)[:, None]
    lengths = lattice[:, :3].gather(1, t.lengths[row])
    return described_letters(space_group, wyckoff, choice), wrap(points), torch.cat([lengths, lattice[:, 3:]], -1)


def described_letters(space_group: Tensor, wyckoff: Tensor, choice: Tensor) -> Tensor:
    """The letters that `transform_sites` gives, (n, s), sites in their places."""
    t = normalizer_tables(wyckoff.device)
    return t.letters[t.offset[space_group] + choice].gather(1, wyckoff)


def _scatter_min(row: Tensor, values: Tensor, size: int) -> Tensor:
    """The smallest value of each row; 0 for rows without any."""
    result = torch.zeros(size, dtype=values.dtype, device=values.device)
    return result.scatter_reduce_(0, row, values, "amin", include_self=False)


def _order_key(frac_coords: Tensor) -> Tensor:
    """An integer that orders points (..., 3) by x, then y, then z modulo 1, each to 1e-4."""
    x, y, z = (steps(frac_coords, _ROUNDING) % _ROUNDING).unbind(-1)
    return (x * _ROUNDING + y) * _ROUNDING + z


def steps(values: Tensor, per_unit: int) -> Tensor:
    """Values as integers, so many to the unit, such that noise rarely changes one.

    Steps begin neither at 0 nor at any other fraction or short decimal, where coordinates like to be.
    """
    return (values * per_unit + _STEP_OFFSET).floor().long()


def places(counts: Tensor) -> Tensor:
    """0, ..., counts[0] - 1, 0, ..., counts[1] - 1, and so on."""
    return torch.arange(int(counts.sum()), device=counts.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)


class AsymmetricUnit(NamedTuple):
    """Space group and orbits of one crystal, as plain numpy; CrystalBatch.from_units makes a batch of many."""

    space_group: int
    wyckoff: np.ndarray  # (s,) int64
    species: np.ndarray  # (s,) int64
    points: np.ndarray  # (s, 3) any atom of each orbit, fractional coordinates in the standard setting
    lattice: np.ndarray  # (6,) conventional cell, angstrom and degrees


def analyse(
    lattice: np.ndarray,
    frac_coords: np.ndarray,
    numbers: np.ndarray,
    symprec: float = 0.01,
    max_sites: int = MAX_SITES,
    odd_cells: bool = False,
) -> AsymmetricUnit:
    """Find the space group with moyo and list the orbits in the standard setting.

    lattice (3, 3) rows in angstrom, frac_coords (N, 3), numbers (N,) atomic numbers, symprec in angstrom.
    Among the equivalent origins and axes of the space group moyo's choice stands. Cheap enough to call per
    structure in worker processes; choosing and ordering the representatives is left to the batch.

    Raises SymmetryError when moyo finds no symmetry or the crystal has more than max_sites sites, and OddCellError
    for odd cells, unless odd_cells says that this process may hang or die.
    """
    if len(numbers) == 0:
        raise SymmetryError("no atoms")
    found = find_symmetry(lattice, frac_coords, numbers, symprec, odd_cells)
    orbit_atoms = np.unique(found.orbits)
    if len(orbit_atoms) > max_sites:
        raise SymmetryError(f"too many sites: {len(orbit_atoms)} inequivalent sites, at most {max_sites} fit")
    letters, mapping = found.wyckoffs, found.mapping_std_prim
    wyckoff = np.array([letter_index(letters[i]) for i in orbit_atoms])
    expected, present = _arrays()["multiplicity"][found.number, wyckoff].sum(), len(found.std_cell.numbers)
    if expected != present:
        raise SymmetryError(f"symmetry not consistent: {present} atoms for positions of {expected}")
    standing = len(numbers) * abs(np.linalg.det(found.std_linear))
    if abs(standing - present) > 0.5:  # moyo takes atoms closer than symprec for one
        raise SymmetryError(f"atoms at the same place: {standing:.0f} atoms in a cell for {present}")
    basis, primitive = np.array(found.std_cell.basis), found.prim_std_cell
    points = np.array(primitive.positions)[[mapping[i] for i in orbit_atoms]]
    points = points @ np.array(primitive.basis) @ np.linalg.inv(basis)
    species = np.asarray(numbers, dtype=np.int64)[orbit_atoms]
    return AsymmetricUnit(found.number, wyckoff, species, points, _lattice_parameters(found.number, basis))


def find_symmetry(
    lattice: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, symprec: float, odd_cells: bool = False
) -> Any:
    """What moyo finds of a cell, its MoyoDataset; arguments and errors as for `analyse`."""
    if not odd_cells:
        _refuse_odd_cell(np.asarray(lattice), len(numbers), symprec)
    cell_type, dataset_type = _moyo()
    cell = cell_type(np.asarray(lattice).tolist(), np.asarray(frac_coords).tolist(), np.asarray(numbers).tolist())
    try:
        return dataset_type(cell, symprec=symprec)
    except BaseException as error:  # a panic in moyo's Rust is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise SymmetryError(f"symmetry not found: {error}") from error


def _refuse_odd_cell(lattice: np.ndarray, atoms: int, symprec: float) -> None:
    """The bounds are measured: beyond them are all but 1 in 10,000 of the cells, made to be hard, on which moyo hangs.

    Of 34,000 real crystals none is beyond them at the usual symprec.
    """
    lengths = np.sqrt((lattice * lattice).sum(1))
    volume, least, longest = abs(np.linalg.det(lattice)), lengths.min(), lengths.max()
    sound = volume > 2 * atoms and volume > 0.01 * lengths.prod() and least > 1.2 and atoms <= 1000
    if not (sound and symprec * longest < 0.5 * least):
        raise OddCellError(
            f"symmetry not found: {atoms} atoms in {volume:.3g} cubic angstrom, axes of {least:.3g} to {longest:.3g}"
        )


@cache
def _moyo() -> tuple[type, type]:
    """moyo's classes, imported when needed; without its remarks on every cell that is not primitive."""
    from moyopy import Cell, MoyoDataset

    logging.getLogger("moyo").setLevel(logging.ERROR)
    return Cell, MoyoDataset


def _lattice_parameters(space_group: int, basis: np.ndarray) -> np.ndarray:
    """a, b, c, alpha, beta, gamma of basis rows, exact where symmetry fixes them."""
    lengths = np.sqrt((basis * basis).sum(1))
    cosines = (basis[[1, 0, 0]] * basis[[2, 2, 1]]).sum(1) / (lengths[[1, 0, 0]] * lengths[[2, 2, 1]])
    parameters = np.concatenate([lengths, np.degrees(np.arccos(cosines))])
    t = _arrays()
    angle = t["lattice_angle"][space_group]
    return np.where(np.isnan(angle), parameters[t["lattice_source"][space_group]], angle)

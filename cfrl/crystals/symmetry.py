"""Space-group symmetry of batches: orbits and their representatives, lattices, other origins and axes.

All functions take tensors of many crystals and work from the tables in wyckoff.py. Finding the symmetry of a structure
is analysis.py's work; what a crystal is made of (CrystalBatch) lives in crystal.py, and nothing here knows of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfrl.crystals.wyckoff import NUM_LETTERS, WyckoffTables, normalizer_tables, tables
from cfrl.errors import UserError

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


class SymmetryError(UserError):
    """A structure that cannot be described by a space group and Wyckoff sites; the message says why."""


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

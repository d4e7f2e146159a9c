"""Which crystals are the same: duplicates among samples, and samples that are already known.

pymatgen's StructureMatcher decides; this file chooses whom it is asked about. Crystals can only match when they
have the same reduced formula and the same number of atoms in the primitive cell. Among those, crystals of equal
fingerprint (formula, space group, Wyckoff sequence) come first, then the nearest by a descriptor that moves
little when atoms do, so that a strained copy whose symmetry was lost is met as well. A crystal is compared with at
most `MAX_CANDIDATES` others, however many there are: the matcher's work grows linearly. Where its yes is plain, as
in most matches, it is not asked.

Agreement with comparing all pairs, and the rate: tests/test_fingerprint.py, tests/benchmarks/bench_screen.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import gcd
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cfrl.crystals import symmetry
from cfrl.crystals.analysis import find_symmetry
from cfrl.crystals.crystal import CrystalBatch, reduced_formula
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.symmetry import SymmetryError
from cfrl.crystals.wyckoff import tables

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

T = TypeVar("T")
K = TypeVar("K")

MAX_CANDIDATES = 12
LTOL, STOL, ANGLE_TOL = 0.2, 0.3, 5.0  # StructureMatcher's own tolerances: lengths, relative; sites, in units of
# (volume per atom)^(1/3); angles, degrees
_CLEARLY = 0.99  # of a tolerance: rounding has no say
_SYMPREC = 1e-3  # angstrom; of primitive cells
_SHRINKING = 0.25  # angstrom; pymatgen's own tolerance of primitive cells, along each axis
_NEIGHBOURS = 12  # distances per element in the descriptor
_RADIUS = 2.2  # of the neighbour search, in units of (volume per atom)^(1/3): 45 atoms on average
# Space groups in two hands, left to right. A crystal and its mirror image match.
_OTHER_HAND = {78: 76, 95: 91, 96: 92, 145: 144, 153: 151, 154: 152, 170: 169, 172: 171, 179: 178, 181: 180, 213: 212}


def fingerprint(space_group: int, wyckoff: Sequence[int], species: Sequence[int]) -> str:
    """Formula, space group and Wyckoff sequence of a crystal, such as ``BaTiO3|221|Ba:a Ti:b O:c``.

    The sequence is the first among those that other origins and axes of the space group give (its Euclidean
    normaliser), so that it does not depend on how the crystal is described; nor on its hand.

    Args:
        space_group: 1..230.
        wyckoff: (s,) letters, 1 = 'a'; zeros are empty sites.
        species: (s,) atomic numbers.
    """
    multiplicity = _multiplicity()[space_group]
    sites = [(w, z) for w, z in zip(wyckoff, species, strict=True) if w]
    sequence = min(sorted((new[w], z) for w, z in sites) for new in _letter_maps(space_group))
    formula = reduced_formula([z for _, z in sites], [multiplicity[w] for w, _ in sites])
    group = _OTHER_HAND.get(space_group, space_group)
    return f"{formula}|{group}|" + " ".join(f"{SYMBOLS[z]}:{symmetry.letter_name(w)}" for w, z in sequence)


def fingerprints(crystals: CrystalBatch) -> list[str]:
    """`fingerprint` of every crystal of a batch."""
    rows = zip(crystals.space_group.tolist(), crystals.wyckoff.tolist(), crystals.species.tolist(), strict=True)
    return [fingerprint(*row) for row in rows]


def prototypes(crystals: CrystalBatch) -> list[str]:
    """Space group and Wyckoff sequence of every crystal, such as ``221|a b c``, whatever its elements.

    As in `fingerprint`, the sequence is the first among the equivalent ones; elements have no say in which that is.
    """
    named = []
    for group, row in zip(crystals.space_group.tolist(), crystals.wyckoff.tolist(), strict=True):
        letters = min(sorted(new[w] for w in row if w) for new in _letter_maps(group))
        named.append(f"{_OTHER_HAND.get(group, group)}|{' '.join(map(symmetry.letter_name, letters))}")
    return named


def firsts(keys: Sequence[str]) -> np.ndarray:
    """Rows where each key comes for the first time, in order.

    By hashes of 8 bytes: among a million keys two agree by chance once in ten million times.
    """
    hashes = np.fromiter(map(hash, keys), dtype=np.int64, count=len(keys))
    return np.sort(np.unique(hashes, return_index=True)[1])


def varied(crystals: CrystalBatch) -> np.ndarray:
    """Rows of crystals that have neither formula nor prototype in common with an earlier one of these rows.

    For lists of the best: more of a formula are mostly one crystal whose symmetry came out otherwise, and more of a
    prototype one crystal with a neighbour of its elements.
    """
    seen: set[str] = set()
    rows = []
    for row, keys in enumerate(zip(crystals.formulas(), prototypes(crystals), strict=True)):
        if seen.isdisjoint(keys):
            seen.update(keys)
            rows.append(row)
    return np.array(rows, dtype=np.int64)


@dataclass(frozen=True)
class Candidate:
    """A crystal made ready for comparisons: its primitive cell, Niggli-reduced.

    matrix: (3, 3) lattice vectors as rows, angstrom
    frac_coords: (n, 3)
    numbers: (n,) atomic numbers, ascending
    fingerprint: see `fingerprint`, or "" if unknown
    """

    matrix: np.ndarray
    frac_coords: np.ndarray
    numbers: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def parameters(self) -> np.ndarray:
        """(6,) a, b, c in units of (volume per atom)^(1/3), alpha, beta, gamma in degrees."""
        lengths = np.sqrt(np.square(self.matrix).sum(axis=1))
        cosines = (self.matrix[[1, 0, 0]] * self.matrix[[2, 2, 1]]).sum(1) / (lengths[[1, 0, 0]] * lengths[[2, 2, 1]])
        unit = (abs(np.linalg.det(self.matrix)) / len(self)) ** (1 / 3)
        return np.concatenate([lengths / unit, np.degrees(np.arccos(cosines))])

    @cached_property
    def structure(self) -> Structure:
        """As pymatgen has it, the atoms in the same order."""
        from pymatgen.core import Structure

        return Structure(self.matrix, [SYMBOLS[z] for z in self.numbers], self.frac_coords)

    @cached_property
    def descriptor(self) -> np.ndarray:
        """(elements * 12,), see `descriptor`."""
        return descriptor(self.structure)


def prepare(structure: Structure, fingerprint: str = "") -> Candidate:
    """Reduce a crystal as StructureMatcher would, once instead of at every comparison.

    pymatgen's search for the primitive cell is slow, and takes atoms for the same that are up to 0.25 angstrom off
    along each axis of the cell that comes in. It is asked only where it may find a smaller cell than moyo does.
    """
    cell = structure.lattice.matrix, structure.frac_coords, np.array(structure.atomic_numbers)
    try:
        found = find_symmetry(*cell, _SYMPREC).prim_std_cell
    except SymmetryError:
        found = None
    if found is not None:
        exact = _reduced(np.array(found.basis), np.array(found.positions), np.array(found.numbers), fingerprint)
        if not _may_shrink(exact):
            return exact
    smaller = _reduced(*cell).structure.get_primitive_structure(_SHRINKING)
    return _candidate(smaller.lattice.matrix, smaller.frac_coords, np.array(smaller.atomic_numbers), fingerprint)


def _reduced(matrix: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, fingerprint: str = "") -> Candidate:
    """Of a cell, (3, 3), (n, 3) and (n,), that in a Niggli-reduced lattice."""
    from pymatgen.core import Lattice

    lattice = Lattice(matrix)
    try:
        lattice = lattice.get_niggli_reduced_lattice()
    except ValueError:  # its search does not end for some very skewed cells
        lattice = lattice.get_lll_reduced_lattice()
    return _candidate(lattice.matrix, frac_coords @ matrix @ lattice.inv_matrix % 1, numbers, fingerprint)


def _candidate(matrix: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, fingerprint: str) -> Candidate:
    order = np.argsort(numbers, kind="stable")
    return Candidate(matrix, frac_coords[order], numbers[order], fingerprint)


def _may_shrink(cell: Candidate) -> bool:
    """Whether some translation brings every atom near one of its element: else pymatgen cannot find a smaller cell.

    Among the translations of a smaller cell is one by a part, 1/2 or 1/3 and so on, of a lattice vector. An atom is off
    by at most _SHRINKING along each of three axes, so by their sum: here that is a box, over the distances of planes.
    """
    of = {z: cell.frac_coords[cell.numbers == z] for z in np.unique(cell.numbers)}
    reach = 3 * _SHRINKING * np.sqrt(np.square(np.linalg.inv(cell.matrix)).sum(axis=0))
    return any(_brings_together(cell, of, parts, reach) for parts in _prime_factors(gcd(*map(len, of.values()))))


def _brings_together(cell: Candidate, of: dict[int, np.ndarray], parts: int, reach: np.ndarray) -> bool:
    shifts = np.indices((parts,) * 3).reshape(3, -1).T[1:] / parts
    for z, point in zip(cell.numbers, cell.frac_coords, strict=True):
        gap = shifts[:, None] - (of[z] - point)  # (shifts, atoms, 3)
        shifts = shifts[(np.abs(gap - gap.round()) < reach).all(axis=2).any(axis=1)]
        if not len(shifts):
            return False
    return True


def _prime_factors(n: int) -> list[int]:
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]


def descriptor(structure: Structure) -> np.ndarray:
    """Average distances to the 1st, 2nd, ... 12th neighbour, for each element in turn: (elements * 12,).

    In units of (volume per atom)^(1/3). They are those of Widdowson et al., MATCH 87, 529 (2022), taken by
    element: independent of the cell, and moving an atom by d moves none of them by more than 2 d.
    """
    numbers = np.array([site.specie.Z for site in structure])
    length = (structure.volume / len(structure)) ** (1 / 3)
    centers, _, _, distances = structure.get_neighbor_list(_RADIUS * length)
    nearest = np.full((len(structure), _NEIGHBOURS), _RADIUS)
    order = np.lexsort((distances, centers))
    centers, distances = centers[order], distances[order]
    rank = np.arange(len(centers)) - np.searchsorted(centers, centers)
    near = rank < _NEIGHBOURS
    nearest[centers[near], rank[near]] = distances[near] / length
    return np.concatenate([nearest[numbers == z].mean(axis=0) for z in np.unique(numbers)])


def find_duplicates(
    structures: Sequence[Structure], fingerprints: Sequence[str] | None = None, limit: int = MAX_CANDIDATES
) -> list[int | None]:
    """For each crystal the earlier one that it repeats, or None for the first of its kind.

    Crystals are compared with earlier ones that are themselves the first of their kind.

    Args:
        structures: ordered pymatgen structures.
        fingerprints: of each, if known; they only order the comparisons.
        limit: comparisons for each crystal at most.
    """
    result: list[int | None] = [None] * len(structures)
    fingerprints = fingerprints or [""] * len(structures)
    for rows in group_by(range(len(structures)), lambda row: structures[row].reduced_formula).values():
        if len(rows) > 1:
            candidates = [prepare(structures[row], fingerprints[row]) for row in rows]
            for row, found in zip(rows, match_within(candidates, limit), strict=True):
                result[row] = None if found is None else rows[found]
    return result


def find_known(
    structures: Sequence[Structure],
    known: Sequence[Structure],
    fingerprints: Sequence[str] | None = None,
    limit: int = MAX_CANDIDATES,
) -> list[int | None]:
    """For each crystal the row of a known one that it matches, or None if it is novel.

    Args:
        structures: ordered pymatgen structures.
        known: the same; only those whose formula occurs among the structures cost more than a look.
        fingerprints: of the structures, if known; they only order the comparisons.
        limit: comparisons for each crystal at most.
    """
    result: list[int | None] = [None] * len(structures)
    fingerprints = fingerprints or [""] * len(structures)
    known_rows = group_by(range(len(known)), lambda row: known[row].reduced_formula)
    for formula, rows in group_by(range(len(structures)), lambda row: structures[row].reduced_formula).items():
        if formula in known_rows:
            candidates = [prepare(structures[row], fingerprints[row]) for row in rows]
            others = [prepare(known[row]) for row in known_rows[formula]]
            for row, found in zip(rows, match_against(candidates, others, limit), strict=True):
                result[row] = None if found is None else known_rows[formula][found]
    return result


def match_within(candidates: Sequence[Candidate], limit: int = MAX_CANDIDATES, ltol: float = LTOL) -> list[int | None]:
    """As `find_duplicates`, for prepared crystals of one formula; `ltol`: see `LTOL`."""
    result: list[int | None] = [None] * len(candidates)
    for rows in _comparable(candidates).values():
        pool = _Pool([candidates[row] for row in rows], ltol)
        firsts = np.zeros(len(rows), dtype=np.int64)  # places in the pool
        count = 0
        for place, row in enumerate(rows):
            found = pool.first_match(candidates[row], firsts[:count], limit)
            if found is None:
                firsts[count], count = place, count + 1
            else:
                result[row] = rows[found]
    return result


def match_against(
    candidates: Sequence[Candidate], known: Sequence[Candidate], limit: int = MAX_CANDIDATES, ltol: float = LTOL
) -> list[int | None]:
    """As `find_known`, for prepared crystals of one formula; `ltol`: see `LTOL`."""
    result: list[int | None] = [None] * len(candidates)
    known_rows = _comparable(known)
    for atoms, rows in _comparable(candidates).items():
        others = known_rows.get(atoms, [])
        pool = _Pool([known[i] for i in others], ltol)
        for row in rows:
            found = pool.first_match(candidates[row], np.arange(len(others)), limit)
            result[row] = None if found is None else others[found]
    return result


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Lists of items by key, in order of first appearance."""
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def _comparable(candidates: Sequence[Candidate]) -> dict[int, list[int]]:
    """Rows by number of atoms in the primitive cell: crystals in which it differs never match."""
    return group_by(range(len(candidates)), lambda row: len(candidates[row]))


class _Pool:
    """Crystals of one formula and size, to be searched for one that matches."""

    def __init__(self, members: list[Candidate], ltol: float) -> None:
        self.members, self.ltol = members, ltol
        self.fingerprints = np.array([member.fingerprint for member in members])

    @cached_property
    def vectors(self) -> np.ndarray:
        """(members, elements * 12) descriptors."""
        return np.array([member.descriptor for member in self.members])

    def first_match(self, query: Candidate, places: np.ndarray, limit: int) -> int | None:
        """The place of a match, trying `limit` of them."""
        order = self._by_likeness(query, places) if len(places) > 1 else places
        return next((int(place) for place in order[:limit] if self._match(self.members[place], query)), None)

    def _by_likeness(self, query: Candidate, places: np.ndarray) -> np.ndarray:
        """The places: those of equal fingerprint first, then by distance."""
        distance = np.square(self.vectors[places] - query.descriptor).sum(axis=1)
        differs = (self.fingerprints[places] != query.fingerprint) | (query.fingerprint == "")
        return places[np.lexsort((distance, differs))]

    def _match(self, member: Candidate, query: Candidate) -> bool:
        return plainly_match(member, query, self.ltol) or _matcher(self.ltol).fit(
            member.structure, query.structure, skip_structure_reduction=True
        )


def plainly_match(one: Candidate, other: Candidate, ltol: float = LTOL) -> bool:
    """Whether StructureMatcher is bound to find a match, by the first of all the cells and shifts that it would try.

    It lays the atoms of both into the cell of averaged lengths and angles, shifts the first atom of the rarest element
    onto each of the other's, pairs the atoms so that the sum of squared distances is least, and takes the mean of the
    shifts away, which lessens the sum; no distance may then exceed STOL. None exceeds the root of the sum, so that any
    pairing with a sum below STOL^2 will do.

    Args:
        one, other: of one formula, with equally many atoms.
        ltol: see `LTOL`.
    """
    ratios, angles = one.parameters[:3] / other.parameters[:3], one.parameters[3:] - other.parameters[3:]
    if np.abs(np.log(ratios)).max() > _CLEARLY * np.log1p(ltol) or np.abs(angles).max() > _CLEARLY * ANGLE_TOL:
        return False
    metric = _metric((one.parameters + other.parameters) / 2)
    n = len(one)
    limit = (_CLEARLY * STOL) ** 2 * (np.linalg.det(metric) / n**2) ** (1 / 3)
    strangers = np.where(one.numbers == other.numbers[:, None], 0.0, np.inf)
    anchor = np.isfinite(strangers).sum(axis=1).argmin()
    for shift in one.frac_coords[one.numbers == other.numbers[anchor]] - other.frac_coords[anchor]:
        gap = one.frac_coords - (other.frac_coords + shift)[:, None]  # (n, n, 3)
        gap -= gap.round()
        squared = ((gap @ metric) * gap).sum(axis=2) + strangers
        partners = squared.argmin(axis=1)
        if squared.min(axis=1).sum() < limit and len(np.unique(partners)) == n:
            return True
    return False


def _metric(parameters: np.ndarray) -> np.ndarray:
    """(3, 3) products of the lattice vectors that have these lengths and angles."""
    lengths, (alpha, beta, gamma) = parameters[:3], np.cos(np.radians(parameters[3:]))
    return np.outer(lengths, lengths) * np.array([[1, gamma, beta], [gamma, 1, alpha], [beta, alpha, 1]])


@cache
def _matcher(ltol: float) -> StructureMatcher:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(ltol, STOL, ANGLE_TOL)


@cache
def _multiplicity() -> list[list[int]]:
    """Atoms per conventional cell, [space_group][letter]."""
    return tables().multiplicity.tolist()


@cache
def _letter_maps(space_group: int) -> list[list[int]]:
    """What each letter becomes, one list for each different effect of the normaliser."""
    return symmetry.normalizer_operations(space_group)[2].unique(dim=0).tolist()

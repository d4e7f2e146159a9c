"""Which crystals are the same: duplicates among samples, and samples that are already known.

pymatgen's StructureMatcher decides; this file chooses whom it is asked about. Crystals can only match when they
have the same reduced formula and the same number of atoms in the primitive cell. Among those, crystals of equal
fingerprint (formula, space group, Wyckoff sequence) come first, then the nearest by a descriptor that moves
little when atoms do, so that a strained copy whose symmetry was lost is met as well. A crystal is compared with at
most `MAX_CANDIDATES` others, however many there are: the matcher's work grows linearly.

Agreement with comparing all pairs, and the rate: tests/test_fingerprint.py, tests/benchmarks/bench_screen.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cfrl.crystals import symmetry
from cfrl.crystals.crystal import CrystalBatch, reduced_formula
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.wyckoff import tables

if TYPE_CHECKING:
    from pymatgen.analysis.structure_matcher import StructureMatcher
    from pymatgen.core import Structure

T = TypeVar("T")
K = TypeVar("K")

MAX_CANDIDATES = 12
LTOL = 0.2  # StructureMatcher's own tolerance of lengths, relative
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
    """Rows where each key comes for the first time, in order."""
    return np.sort(np.unique(keys, return_index=True)[1])


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
    """A crystal made ready for comparisons.

    reduced: Niggli-reduced primitive cell
    fingerprint: see `fingerprint`, or "" if unknown
    descriptor: (elements * 12,) see `descriptor`
    """

    reduced: Structure
    fingerprint: str
    descriptor: np.ndarray


def prepare(structure: Structure, fingerprint: str = "") -> Candidate:
    """Reduce a crystal as StructureMatcher would, once instead of at every comparison."""
    try:
        reduced = structure.get_reduced_structure("niggli")
    except ValueError:  # its search does not end for some very skewed cells
        reduced = structure.get_reduced_structure("LLL")
    reduced = reduced.get_primitive_structure()
    return Candidate(reduced, fingerprint, descriptor(reduced))


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
    return group_by(range(len(candidates)), lambda row: len(candidates[row].reduced))


class _Pool:
    """Crystals of one formula and size, to be searched for one that matches."""

    def __init__(self, members: list[Candidate], ltol: float) -> None:
        self.members, self.ltol = members, ltol
        self.vectors = np.array([member.descriptor for member in members])
        self.fingerprints = np.array([member.fingerprint for member in members])

    def first_match(self, query: Candidate, places: np.ndarray, limit: int) -> int | None:
        """The place of a match: of equal fingerprint first, then by distance, asking the matcher `limit` times."""
        if not len(places):
            return None
        distance = np.square(self.vectors[places] - query.descriptor).sum(axis=1)
        differs = (self.fingerprints[places] != query.fingerprint) | (query.fingerprint == "")
        for i in np.lexsort((distance, differs))[:limit]:
            place = int(places[i])
            if _matcher(self.ltol).fit(self.members[place].reduced, query.reduced, skip_structure_reduction=True):
                return place
        return None


@cache
def _matcher(ltol: float) -> StructureMatcher:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(ltol=ltol)


@cache
def _multiplicity() -> list[list[int]]:
    """Atoms per conventional cell, [space_group][letter]."""
    return tables().multiplicity.tolist()


@cache
def _letter_maps(space_group: int) -> list[list[int]]:
    """What each letter becomes, one list for each different effect of the normaliser."""
    return symmetry.normalizer_operations(space_group)[2].unique(dim=0).tolist()

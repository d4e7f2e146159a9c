"""Generate cfrl/assets/wyckoff.npz: Wyckoff positions and normalisers of all 230 space groups.

Settings are the standard ones of the International Tables A: unique axis b and cell choice 1,
hexagonal axes for rhombohedral groups, origin choice 2 where there are two. The triplets and their
order are read from pyxtal (not needed at run time); cfrl's tests check every one of them against moyo.
The normalisers are found by trying all rotations of the crystal system with all shifts on a grid.

Run:  python scripts/make_wyckoff_tables.py [OUTPUT]

Needs pyxtal and numpy; takes about a minute. What the arrays mean is documented in cfrl/crystals/wyckoff.py.
"""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pyxtal.symmetry import Group

NUM_LETTERS = 28  # 0 = empty, 1 = 'a', ..., 26 = 'z', 27 = 'A'
DENOMINATOR = 24  # every translation, of triplets and of normalisers, is a multiple of 1/24
OUTPUT = Path(__file__).parent.parent / "cfrl" / "assets" / "wyckoff.npz"

IDENTITY = np.eye(3, dtype=int)
SIGNED_PERMUTATIONS = np.array(
    [
        np.diag(signs)[list(order)]
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
    ]
)
GRID = np.array(list(itertools.product(range(DENOMINATOR), repeat=3)))


class Position(NamedTuple):
    """All triplets of one Wyckoff position, as maps of the representative's coordinates (shifts in 1/24)."""

    rotations: np.ndarray  # (m, 3, 3) int
    shifts: np.ndarray  # (m, 3) int


def letter_index(letter: str) -> int:
    """1 for 'a', 26 for 'z', 27 for 'A' (only group 47 has that many)."""
    return 27 if letter == "A" else ord(letter) - ord("a") + 1


def read_positions(number: int) -> list[Position]:
    """The Wyckoff positions of a space group from 'a' to the general one."""
    found = sorted(Group(number).Wyckoff_positions, key=lambda p: letter_index(p.letter))
    assert [letter_index(p.letter) for p in found] == list(range(1, len(found) + 1))
    positions = []
    for wyckoff in found:
        rotations = np.array([op.rotation_matrix for op in wyckoff.ops])
        shifts = np.array([op.translation_vector for op in wyckoff.ops]) * DENOMINATOR
        assert np.allclose(rotations, rotations.round())
        assert np.allclose(shifts, shifts.round())
        position = Position(rotations.round().astype(int), shifts.round().astype(int) % DENOMINATOR)
        check_first_triplet(position.rotations[0], position.shifts[0], f"{number}{wyckoff.letter}")
        positions.append(position)
    return positions


def check_first_triplet(rotation: np.ndarray, shift: np.ndarray, name: str) -> None:
    """The first triplet must be a projection: tied coordinates are integer combinations of earlier free ones.

    Then it can be read as a map from coordinates to coordinates, and a lattice translation of a free
    coordinate moves the tied ones by lattice translations too: nothing is ambiguous modulo 1.
    """
    ranks = [np.linalg.matrix_rank(rotation[: j + 1]) for j in range(3)]
    free = np.diff([0, *ranks]).astype(bool)
    assert np.array_equal(rotation[free], IDENTITY[free]), f"{name}: free coordinates are not themselves"
    assert not rotation[:, ~free].any(), f"{name}: depends on a tied coordinate"
    assert not np.triu(rotation, 1).any(), f"{name}: depends on a later coordinate"
    assert not shift[free].any(), f"{name}: free coordinate is shifted"


def metric_rotations(number: int) -> np.ndarray:
    """Rotations that keep the shape of a cell of the crystal system, and axis permutations in orthorhombic ones."""
    diagonal = SIGNED_PERMUTATIONS[np.abs(SIGNED_PERMUTATIONS).trace(axis1=1, axis2=2) == 3]
    if number <= 2:
        return np.array([IDENTITY, -IDENTITY])
    if number <= 15:
        return diagonal[diagonal[:, 0, 0] == diagonal[:, 2, 2]]
    if number <= 74:
        return SIGNED_PERMUTATIONS
    if number <= 142:
        return SIGNED_PERMUTATIONS[SIGNED_PERMUTATIONS[:, 2, 2] != 0]
    if number <= 194:
        return read_positions(191)[-1].rotations  # P6/mmm
    return SIGNED_PERMUTATIONS


def encode(shifts: np.ndarray) -> np.ndarray:
    return shifts % DENOMINATOR @ np.array([DENOMINATOR**2, DENOMINATOR, 1])


def normaliser_shifts(rotation: np.ndarray, group: Position, shifts: np.ndarray) -> np.ndarray:
    """Those of the shifts s for which (rotation, s) maps the group onto itself by conjugation."""
    inverse = np.rint(np.linalg.inv(rotation)).astype(int)
    for g, w in zip(group.rotations, group.shifts, strict=True):
        conjugate = rotation @ g @ inverse
        same = (group.rotations == conjugate).all((1, 2))
        moved = shifts + w @ rotation.T - shifts @ conjugate.T
        shifts = shifts[np.isin(encode(moved), encode(group.shifts[same]))]
        if not len(shifts):
            break
    return shifts


def normaliser_cosets(number: int, group: Position) -> list[tuple[np.ndarray, np.ndarray]]:
    """One (rotation, shift) for each coset of the group in its normaliser; the identity first, proper ones next.

    Along polar axes any shift normalises the group; these are left out (shift 0).
    """
    polar = (group.rotations @ IDENTITY == IDENTITY).all((0, 1))
    grid = GRID[(GRID[:, polar] == 0).all(1)]
    found = [
        (rotation, shift) for rotation in metric_rotations(number) for shift in normaliser_shifts(rotation, group, grid)
    ]
    found.sort(key=simplicity)
    cosets, seen = [], set()
    for rotation, shift in found:
        if (rotation.tobytes(), int(encode(shift))) in seen:
            continue
        cosets.append((rotation, shift))
        moved = group.rotations @ shift + group.shifts
        moved[:, polar] = 0
        rotations = (group.rotations @ rotation).astype(rotation.dtype)
        seen.update((r.tobytes(), int(s)) for r, s in zip(rotations, encode(moved), strict=True))
    return cosets


def simplicity(operation: tuple[np.ndarray, np.ndarray]) -> tuple:
    """Order in which representatives are preferred: proper, pure shifts, short shifts."""
    rotation, shift = operation
    improper = np.linalg.det(rotation) < 0
    length = np.minimum(shift, DENOMINATOR - shift).sum()
    turned = not np.array_equal(rotation, IDENTITY)
    return improper, turned, length, shift.tolist(), (-rotation).ravel().tolist()


def mapped_letters(rotation: np.ndarray, shift: np.ndarray, positions: list[Position]) -> np.ndarray:
    """Which Wyckoff position (28,) each one becomes under an operation of the normaliser."""
    letters = np.zeros(NUM_LETTERS, dtype=np.int8)
    generic = np.array([0.1234, 0.2718, 0.3571])
    group = positions[-1]
    for index, position in enumerate(positions, start=1):
        point = position.rotations[0] @ generic + position.shifts[0] / DENOMINATOR
        point = rotation @ point + shift / DENOMINATOR
        orbit = group.rotations @ point + group.shifts / DENOMINATOR
        for other, candidate in enumerate(positions, start=1):
            if len(candidate.rotations) != len(position.rotations):
                continue
            distance = orbit @ (candidate.rotations[0] - IDENTITY).T + candidate.shifts[0] / DENOMINATOR
            if np.abs(distance - distance.round()).max(1).min() < 1e-6:
                assert letters[index] == 0
                letters[index] = other
    assert sorted(letters[letters > 0]) == list(range(1, len(positions) + 1))
    return letters


def all_arrays() -> dict[str, np.ndarray]:
    """Triplets of all positions and cosets of all normalisers, one after the other, and how many there are."""
    multiplicity = np.zeros((231, NUM_LETTERS), dtype=np.int16)
    normalizer_count = np.zeros(231, dtype=np.int16)
    triplets, cosets, letters = [], [], []
    for number in range(1, 231):
        positions = read_positions(number)
        triplets += positions
        multiplicity[number, 1 : len(positions) + 1] = [len(p.rotations) for p in positions]
        operations = normaliser_cosets(number, positions[-1])
        normalizer_count[number] = len(operations)
        cosets += operations
        letters += [mapped_letters(*operation, positions) for operation in operations]
    return {
        "multiplicity": multiplicity,
        "rotations": np.concatenate([p.rotations for p in triplets]).astype(np.int8),
        "translations": np.concatenate([p.shifts for p in triplets]).astype(np.int8),
        "normalizer_count": normalizer_count,
        "normalizer_rotations": np.array([rotation for rotation, _ in cosets]).astype(np.int8),
        "normalizer_translations": np.array([shift for _, shift in cosets]).astype(np.int8),
        "normalizer_letters": np.array(letters),
    }


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    arrays = all_arrays()
    np.savez_compressed(output, **arrays)
    sizes = f"{len(arrays['rotations'])} triplets, {len(arrays['normalizer_rotations'])} operations of normalisers"
    print(f"{output}: {sizes}, {output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

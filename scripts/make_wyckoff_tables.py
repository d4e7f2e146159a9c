"""Generate cfrl/assets/wyckoff.npz: the Wyckoff positions of all 230 space groups.

Settings are the standard ones of the International Tables A: unique axis b and cell choice 1,
hexagonal axes for rhombohedral groups, origin choice 2 where there are two. The triplets and their
order are read from pyxtal (not needed at run time); cfrl's tests check every one of them against moyo.

Run:  python scripts/make_wyckoff_tables.py [OUTPUT]

Needs pyxtal and numpy. What the arrays mean is documented in cfrl/symmetry.py.
"""

import sys
from pathlib import Path

import numpy as np
from pyxtal.symmetry import Group

NUM_LETTERS = 28  # 0 = empty, 1 = 'a', ..., 26 = 'z', 27 = 'A'
DENOMINATOR = 24  # every translation of every triplet is a multiple of 1/24
OUTPUT = Path(__file__).parent.parent / "cfrl" / "assets" / "wyckoff.npz"


def letter_index(letter: str) -> int:
    """1 for 'a', 26 for 'z', 27 for 'A' (only group 47 has that many)."""
    return 27 if letter == "A" else ord(letter) - ord("a") + 1


def check_first_triplet(rotation: np.ndarray, translation: np.ndarray, name: str) -> None:
    """The first triplet must be a projection: tied coordinates are integer combinations of earlier free ones.

    Then it can be read as a map from coordinates to coordinates, and a lattice translation of a free
    coordinate moves the tied ones by lattice translations too: nothing is ambiguous modulo 1.
    """
    ranks = [np.linalg.matrix_rank(rotation[: j + 1]) for j in range(3)]
    free = np.diff([0, *ranks]).astype(bool)
    assert np.array_equal(rotation[free], np.eye(3)[free]), f"{name}: free coordinates are not themselves"
    assert not rotation[:, ~free].any(), f"{name}: depends on a tied coordinate"
    assert not np.triu(rotation, 1).any(), f"{name}: depends on a later coordinate"
    assert not translation[free].any(), f"{name}: free coordinate is shifted"


def wyckoff_arrays() -> dict[str, np.ndarray]:
    """Triplets of all positions one after the other, and how many each [space group, letter] has."""
    multiplicity = np.zeros((231, NUM_LETTERS), dtype=np.int16)
    rotations, translations = [], []
    for number in range(1, 231):
        positions = sorted(Group(number).Wyckoff_positions, key=lambda p: letter_index(p.letter))
        assert [letter_index(p.letter) for p in positions] == list(range(1, len(positions) + 1))
        for position in positions:
            rotation = np.array([op.rotation_matrix for op in position.ops])
            shift = np.array([op.translation_vector for op in position.ops]) * DENOMINATOR
            assert np.allclose(rotation, rotation.round())
            assert np.allclose(shift, shift.round())
            check_first_triplet(rotation[0], shift[0], f"{number}{position.letter}")
            multiplicity[number, letter_index(position.letter)] = len(position.ops)
            rotations.append(rotation.round().astype(np.int8))
            translations.append((shift.round() % DENOMINATOR).astype(np.int8))
    return {
        "multiplicity": multiplicity,
        "rotations": np.concatenate(rotations),
        "translations": np.concatenate(translations),
    }


def main() -> None:
    output = Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT
    arrays = wyckoff_arrays()
    np.savez_compressed(output, **arrays)
    print(f"{output}: {len(arrays['rotations'])} triplets, {output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

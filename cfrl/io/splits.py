"""Training, validation and test: which crystals go where."""

from __future__ import annotations

import hashlib

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError


def assign_splits(
    crystals: CrystalBatch, validation: float, test: float = 0.0, by: str = "row", seed: int = 0
) -> np.ndarray:
    """0 = train, 1 = validation, 2 = test, (n,): the same for the same crystals and seed.

    By "row", that many crystals are drawn. By "formula", reduced formulas are drawn instead: no formula is in two
    splits, whichever other crystals there are, and the fractions hold on average.

    Raises:
        UserError: fractions that leave nothing for training.
    """
    n = len(crystals)
    if validation + test >= 1:
        raise UserError(f"validation = {validation} and test = {test}: must be fractions that leave some for training")
    if by == "row":
        place = np.random.default_rng(seed).permutation(n) + 0.5
        place = place / max(n, 1)
    else:
        place = np.array([_uniform(f"{seed}:{formula}") for formula in crystals.formulas()])
    return np.select([place < validation, place < validation + test], [1, 2], 0)


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56

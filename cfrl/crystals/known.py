"""Formulas that are known, as hashes: which of many crystals repeat one, without the data that they come from.

By formula, because a structure can be disguised: the same crystal in a lower symmetry has another fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cfrl.assets import ASSETS

EMBEDDED = ASSETS / "known.npy"  # formulas that the embedded generator learnt from (scripts/make_known.py)


class KnownFormulas:
    """A set of reduced formulas.

    Args:
        hashes: (m,) uint64 of `formula_hash`.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        self.hashes = np.unique(hashes)

    def __len__(self) -> int:
        return len(self.hashes)

    @classmethod
    def of(cls, formulas: Iterable[str]) -> KnownFormulas:
        """From reduced formulas as `CrystalBatch.formulas` writes them."""
        return cls(np.fromiter(map(formula_hash, formulas), dtype=np.uint64))

    @classmethod
    def embedded(cls) -> KnownFormulas:
        """Those that the embedded generator learnt from."""
        return cls(np.load(EMBEDDED, allow_pickle=False))

    def save(self, path: str | Path) -> None:
        """As an array of hashes."""
        np.save(path, self.hashes)

    def holds(self, formulas: Iterable[str]) -> np.ndarray:
        """(n,) bool. One of 10^15 new formulas is taken for a known one by chance."""
        asked = np.fromiter(map(formula_hash, formulas), dtype=np.uint64)
        return np.isin(asked, self.hashes)


def formula_hash(formula: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(formula.encode(), digest_size=8).digest(), "little")

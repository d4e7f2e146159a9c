"""What kind of crystal: how many elements, which anion, how many sites.

Tuning should change how good crystals of a kind are, not which kinds are drawn; and a gain is told by kinds, because an
easier kind is no better crystal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS, NUM_ELEMENTS

# In this order: an oxyhalide counts as oxide. Without any of them: intermetallic, for short (hydrides and borides too).
ANIONS = {
    "oxide": ("O",),
    "halide": ("F", "Cl", "Br", "I"),
    "chalcogenide": ("S", "Se", "Te"),
    "pnictide": ("N", "P", "As", "Sb"),
    "intermetallic": (),
}
ELEMENTS = ("1 element", "2 elements", "3 elements", "4 or more")
SITES = ("1 site", "2 sites", "3 sites", "4 sites", "5 or 6", "7 or 8", "9 or more")
_MOST_SITES = (1, 2, 3, 4, 6, 8)  # of each class but the last
# What can be held or told -> the names of its classes.
CLASSES: dict[str, tuple[str, ...]] = {"elements": ELEMENTS, "anion": tuple(ANIONS), "sites": SITES}

LANTHANIDES = frozenset(range(57, 72))


def kinds(crystals: CrystalBatch) -> dict[str, np.ndarray]:
    """For each of `CLASSES` the class of every crystal, (n,) int64, places in its tuple of names."""
    present = _present(crystals)
    return {
        "elements": np.minimum(present.sum(1), len(ELEMENTS)) - 1,
        "anion": _anion(present),
        "sites": np.digitize(crystals.num_sites.cpu().numpy(), _MOST_SITES, right=True),
    }


def cells(crystals: CrystalBatch, names: Sequence[str]) -> np.ndarray:
    """The joint kind of each crystal in some of `CLASSES`, (n,) int64 below `num_cells(names)`."""
    labels, cell = kinds(crystals), np.zeros(len(crystals), dtype=np.int64)
    for name in names:
        cell = cell * len(CLASSES[name]) + labels[name]
    return cell


def num_cells(names: Sequence[str]) -> int:
    """How many joint kinds there are."""
    return int(np.prod([len(CLASSES[name]) for name in names], dtype=int))


def anion_of(formula: str) -> str:
    """The class of `ANIONS` of a formula, such as "oxide"."""
    symbols = set(re.findall("[A-Z][a-z]?", formula))
    return next(name for name, anions in ANIONS.items() if symbols & set(anions) or not anions)


def shares(labels: np.ndarray, name: str, weight: np.ndarray | None = None) -> np.ndarray:
    """Share of each class of `CLASSES[name]` among crystals with these labels (n,); zeros where there are none."""
    count = np.bincount(labels, weight, minlength=len(CLASSES[name])).astype(np.float64)
    return count / max(count.sum(), 1e-12)


def without_lanthanide_swaps(crystals: CrystalBatch) -> CrystalBatch:
    """The same with every lanthanide written as lanthanum: exchanging 4f neighbours makes a near-copy."""
    lanthanide = (crystals.species >= min(LANTHANIDES)) & (crystals.species <= max(LANTHANIDES))
    return replace(crystals, species=crystals.species.masked_fill(lanthanide, min(LANTHANIDES)))


def _present(crystals: CrystalBatch) -> np.ndarray:
    """(n, NUM_ELEMENTS) bool, which elements each crystal holds."""
    species = crystals.species.cpu().numpy()
    present = np.zeros((len(species), NUM_ELEMENTS), dtype=bool)
    present[np.arange(len(species))[:, None], species] = True
    present[:, 0] = False
    return present


def _anion(present: np.ndarray) -> np.ndarray:
    holds = [present[:, [ATOMIC_NUMBERS[symbol] for symbol in symbols]].any(1) for symbols in ANIONS.values()]
    holds[-1][:] = True  # what none of the others took
    return np.argmax(holds, axis=0)

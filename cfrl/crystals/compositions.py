"""Compositions as rows of atomic fractions, from whatever has one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from cfrl.crystals.elements import ATOMIC_NUMBERS, SYMBOLS

SIMPLE_FORMULA = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d*)?|\.\d+)?")


def fractions(compositions: Any) -> tuple[np.ndarray, list[str]]:
    """Atomic fractions (n, 119) by atomic number, and for each a status: "" or why it is not a composition.

    Reads a CrystalBatch, an (n, 119) array of amounts, or a sequence of formulas, pymatgen Structures or
    Compositions, or mappings from symbol or atomic number to amount.
    """
    if hasattr(compositions, "space_group"):
        amounts, status = _crystal_amounts(compositions), [""] * len(compositions)
    elif isinstance(compositions, np.ndarray) and compositions.ndim == 2:
        amounts, status = compositions.astype(np.float64), [""] * len(compositions)
    else:
        amounts, status = _listed_amounts(list(compositions))
    total = amounts.sum(axis=1, keepdims=True)
    bad = ~((total[:, 0] > 0) & np.isfinite(total[:, 0]) & (amounts >= 0).all(axis=1))
    for row in np.nonzero(bad)[0]:
        status[row] = status[row] or "no composition"
    amounts[bad] = 0.0
    return amounts / np.where(bad[:, None], 1.0, total), status


def _crystal_amounts(crystals: Any) -> np.ndarray:
    species = crystals.species.cpu().numpy()
    multiplicity = crystals.multiplicity.cpu().numpy() * (species > 0)
    amounts = np.zeros((len(species), len(SYMBOLS)))
    np.add.at(amounts, (np.arange(len(species))[:, None], species), multiplicity)
    return amounts


def _listed_amounts(items: list[Any]) -> tuple[np.ndarray, list[str]]:
    amounts, status = np.zeros((len(items), len(SYMBOLS))), [""] * len(items)
    for row, item in enumerate(items):
        try:
            for number, amount in _parse(item):
                amounts[row, number] += amount
        except (KeyError, ValueError, TypeError, AttributeError):
            status[row] = f"not a composition: {str(item)[:60]!r}"
    return amounts, status


def _parse(item: Any) -> Iterable[tuple[int, float]]:
    if isinstance(item, str):
        return _parse_formula(item)
    composition = getattr(item, "composition", item)
    return [(_atomic_number(key), float(amount)) for key, amount in composition.items()]


def _atomic_number(key: Any) -> int:
    if isinstance(key, str):
        return ATOMIC_NUMBERS[key]
    number = int(getattr(key, "Z", key))
    if not 0 < number < len(SYMBOLS):  # pymatgen gives made-up elements made-up numbers
        raise ValueError(f"no element {key}")
    return number


@lru_cache(maxsize=65536)
def _parse_formula(formula: str) -> tuple[tuple[int, float], ...]:
    """Element symbols and amounts; pymatgen reads what has brackets. Raises ValueError or KeyError."""
    parts = SIMPLE_FORMULA.findall(formula)
    if not parts or "".join(symbol + amount for symbol, amount in parts) != formula.strip():
        from pymatgen.core import Composition

        return tuple((_atomic_number(e), float(a)) for e, a in Composition(formula).items())
    return tuple((ATOMIC_NUMBERS[symbol], float(amount or 1)) for symbol, amount in parts)

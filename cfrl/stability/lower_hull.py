"""The lower convex hull at given compositions, each in its own chemical system.

The hull's energy at a composition is that of the cheapest mixture of phases: a linear program. Most chemical systems
are asked about once, so that no facets are kept; the programs of many compositions, each a few steps of the simplex
method over some hundred phases, go side by side (one by one, scipy's linprog takes milliseconds for each).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cfrl.crystals.elements import SYMBOLS

FLAT = 1e-6  # eV/atom, or of a phase in a mixture; less counts as none
_CHEAPER = 1e-10  # eV/atom; a phase that lowers a mixture by less does not lower it
_NUDGE = 1e-9  # of an atomic fraction: so no two phases of a mixture are used up at once, and no step is in vain
_PURE = 1 - 1e-9  # atomic fraction
_STEPS = 1000  # most of those of the simplex method; some 20 are usual, and what it has then is a mixture too
_SHARE = 1e-9  # of a phase; less is none


@dataclass(frozen=True)
class Rivals:
    """The phases that compete with each of n compositions of k elements: of its chemical system, without polymorphs.

    owner: (m,) ascending, which composition a phase competes with
    points: (m, k) atomic fractions, columns as in the composition's
    energies: (m,) eV/atom
    """

    owner: np.ndarray
    points: np.ndarray
    energies: np.ndarray

    def __getitem__(self, keep: np.ndarray) -> Rivals:
        return Rivals(self.owner[keep], self.points[keep], self.energies[keep])

    def count_compounds(self, n: int) -> np.ndarray:
        """How many are no elements, (n,)."""
        return np.bincount(self.owner[self.points.max(axis=1, initial=0.0) < _PURE], minlength=n)


def lower_hull(shares: np.ndarray, elements: np.ndarray, rivals: Rivals) -> tuple[np.ndarray, list[str]]:
    """Energies of the hull, (n,) eV/atom, and n strings: "" or which element has no phase of its own (NaN).

    Args:
        shares: (n, k) atomic fractions, all of them positive.
        elements: (n, k) their atomic numbers.
        rivals: of each.
    """
    pure = np.full(shares.shape, np.inf)
    rows, columns = np.nonzero(rivals.points >= _PURE)
    np.minimum.at(pure, (rivals.owner[rows], columns), rivals.energies[rows])
    missing = np.isinf(pure)
    status = [""] * len(shares)
    for row in np.flatnonzero(missing.any(1)):
        status[row] = f"no reference for element {', '.join(SYMBOLS[z] for z in elements[row][missing[row]])}"
    pure = np.where(missing, np.nan, pure)
    formation = rivals.energies - (rivals.points * pure[rivals.owner]).sum(1)
    low = formation < FLAT  # others are no part of a cheapest mixture; nor those of systems where an element is missing
    return (shares * pure).sum(1) + _cheapest_mixtures(shares, replace(rivals, energies=formation)[low]), status


def _cheapest_mixtures(shares: np.ndarray, rivals: Rivals) -> np.ndarray:
    """Formation energies (n,) of the cheapest mixtures of phases, the elements' own being zero.

    The simplex method. A mixture is of k phases, at first the elements; a plane through their energies prices every
    other phase, and the one farthest below its price comes in for the one that is used up first.
    """
    n, k = shares.shape
    mixture, cost = np.tile(np.eye(k), (n, 1, 1)), np.zeros((n, k))
    nudged, price = shares + _NUDGE * np.arange(1, k + 1), np.zeros((n, k))
    for _ in range(_STEPS):
        if not len(rivals.owner):
            break
        active, first = np.unique(rivals.owner, return_index=True)
        inverse = np.linalg.inv(mixture[active])
        price[active] = np.einsum("nij,nj->ni", inverse, cost[active])
        saving = rivals.energies - (rivals.points * price[rivals.owner]).sum(1)
        best = np.minimum.reduceat(saving, first)
        at_best = np.flatnonzero(saving == np.repeat(best, np.diff(first, append=len(saving))))
        entering = at_best[np.unique(rivals.owner[at_best], return_index=True)[1]]
        goes_on = best < -_CHEAPER
        active, inverse, entering = active[goes_on], inverse[goes_on], entering[goes_on]
        amounts = np.einsum("ni,nij->nj", nudged[active], inverse)
        replaced = np.einsum("ni,nij->nj", rivals.points[entering], inverse)
        leaving = np.where(replaced > _SHARE, amounts / np.maximum(replaced, _SHARE), np.inf).argmin(1)
        mixture[active, leaving], cost[active, leaving] = rivals.points[entering], rivals.energies[entering]
        rivals = rivals[np.isin(rivals.owner, active)]
    return (shares * price).sum(1)


def expected_gap(compounds: np.ndarray, elements: int) -> np.ndarray:
    """How far a hull is too high on average, (n,) eV/atom, where so many compositions of compounds are known, (n,).

    0.1 / (x + 0.36), x = compounds for each pair of the elements: fitted (tests/benchmarks/fit_expected_gap.py) to the
    gap between the hull of the 29,511 Materials Project phases near the hull whose compositions the embedded
    reference's own crystals cover and that of all 130,867, at 1,820 crystals of the generator `small`. Binaries with
    0, 1, 2 and 3 or 4 known compounds: 0.28, 0.05, 0.03, 0.01 eV/atom; ternaries with 3 or 4, 5 to 8, 9 to 16: 0.08,
    0.04, 0.02.
    A reference that was filled up from all of the Materials Project has no such gap to it; what that database lacks
    in turn is taken to follow the same rule.
    """
    pairs = elements * (elements - 1) / 2
    return 0.1 / (compounds / pairs + 0.36) if pairs else np.zeros(len(compounds))

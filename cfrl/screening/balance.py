"""Which candidates are worth a relaxation, so that a growing dataset is not more of what is easy.

What a generator proposes, and what survives, is mostly small, of few elements, in a few space groups. Candidates are
cheap and relaxations are not: so each is let through with a probability of its kind and space group, such that what is
kept has the shares that are wanted.
"""

from __future__ import annotations

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.kinds import cells, num_cells
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS

HELD = ("elements", "anion", "sites")
SHAPE = (num_cells(HELD), NUM_SPACE_GROUPS + 1)
DRAWS = 8  # candidates for each that passes, on average; the rarest kinds would ask for thousands
_PRIOR = 500  # candidates that the shares of the real crystals count for, before there are any
_LEAST_YIELD = 0.2  # of the average; what survives less still is not made up for: it would take all relaxations
_PRIOR_YIELD = 5  # candidates of the average yield, that every kind begins with
_ROUNDS = 100  # of proportional fitting


def places(crystals: CrystalBatch) -> tuple[np.ndarray, np.ndarray]:
    """Kind and space group of each crystal, (n,) and (n,): where it counts in a table of `SHAPE`."""
    return cells(crystals, HELD), crystals.space_group.cpu().numpy()


def count(crystals: CrystalBatch) -> np.ndarray:
    """How many crystals there are of each kind and space group, `SHAPE` int64."""
    table = np.zeros(SHAPE, dtype=np.int64)
    np.add.at(table, places(crystals), 1)
    return table


def target(real: np.ndarray, balance: float) -> tuple[np.ndarray, np.ndarray]:
    """The shares wanted of the kinds and of the space groups: those of the real crystals to the power 1 - balance.

    0 keeps the real shares, 1 makes all alike that there are among the real ones.

    Args:
        real: `SHAPE` counts of real crystals.
    """
    wanted = []
    for axis in (1, 0):
        shares = real.sum(axis).astype(np.float64)
        powers = np.where(shares > 0, np.maximum(shares, 1) ** (1 - balance), 0.0)
        wanted.append(powers / powers.sum())
    return wanted[0], wanted[1]


def acceptance(
    real: np.ndarray, proposed: np.ndarray, passed: np.ndarray, kept: np.ndarray, balance: float
) -> np.ndarray:
    """Probability that a candidate passes, by kind and space group, `SHAPE`.

    The factors of kinds and of space groups that lead what is proposed, and survives, to the target are fitted, then
    scaled so that one of `DRAWS` candidates passes. What is too rare to reach its share so
    passes always.

    Args:
        real, proposed, passed, kept: `SHAPE` counts of real crystals, and of one source's candidates: all of them,
            those that passed, and those of these that were kept in the end. The first stand for the second as long as
            these are few.
    """
    real = np.maximum(real, proposed > 0)  # what comes up exists
    kinds, groups = target(real, balance)
    share = (_PRIOR * real / real.sum() + proposed) / (_PRIOR + proposed.sum())
    weight = np.outer(*_fitted(share * _yields(real, passed, kept), kinds, groups))
    return _scaled(weight, share)


def _yields(real: np.ndarray, passed: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Share of what passed that is kept, a factor of the kind times one of the space group, as they fit the counts."""
    average = (kept.sum() + 1) / (passed.sum() + 1)
    unseen = _PRIOR_YIELD * real / np.maximum(real.sum(1, keepdims=True), 1)
    survivors = kept + average * unseen
    fitted = np.outer(*_fitted(passed + unseen, survivors.sum(1), survivors.sum(0)))
    return np.maximum(fitted, _LEAST_YIELD * average)


def _fitted(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of rows and of columns by which the table gets these sums: iterative proportional fitting."""
    of_row, of_column = np.ones(len(rows)), np.ones(len(columns))
    for _ in range(_ROUNDS):
        of_row = _ratio(rows, table @ of_column)
        of_column = _ratio(columns, of_row @ table)
    return of_row, of_column


def _ratio(wanted: np.ndarray, there: np.ndarray) -> np.ndarray:
    return np.divide(wanted, there, out=np.zeros_like(wanted), where=there > 0)


def _scaled(weight: np.ndarray, share: np.ndarray) -> np.ndarray:
    """min(1, s weight) with s such that the mean over the shares is 1 / DRAWS, or as near as all ones come."""
    some = weight[weight > 0]
    low, high = 1 / (DRAWS * some.max()), 1 / some.min()
    for _ in range(100):  # they differ by many orders of magnitude
        middle = (low * high) ** 0.5
        low, high = (middle, high) if (share * np.minimum(1, middle * weight)).sum() < 1 / DRAWS else (low, middle)
    return np.minimum(1.0, high * weight)

"""Two quantities against each other, where a reward asks for both: points, and the Pareto front of each group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from cfrl.reports.figures import BLUE, GREY, ORANGE, Figure, Series
from cfrl.reports.labels import label, name_alone

_LOG = ("dielectric", "eps_total", "eps_electronic")  # quantities that span decades
_MOST_TERMS = 3  # of more, each pair would have a figure
_SURE = 0.9  # of pairs of crystals, to say which way a quantity is wanted
_ASKED = 1000  # crystals whose pairs are looked at


def pareto_front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows of which no other row has more of both, by falling x."""
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    order = known[np.lexsort((-y[known], -x[known]))]
    highest = np.maximum.accumulate(y[order])
    return order[np.concatenate([[True], y[order][1:] > highest[:-1]])] if len(order) else order


def pareto(groups: Mapping[str, Mapping[str, Any]], terms: Sequence[str]) -> list[Figure]:
    """One figure for each pair of quantities that a reward weighs against each other.

    Args:
        groups: two groups of crystals, by name: their columns (n,), with the reward and its terms.
        terms: names of the reward's terms, of their spreads and parts.
    """
    figures = []
    for x, y, merit in _pairs(terms):
        if not all(name in columns for columns in groups.values() for name in (x, y, merit)):
            continue
        columns = [[np.asarray(group[name]) for name in (x, y, merit)] for group in groups.values()]
        signs = _wanted(*np.concatenate(columns, axis=1))
        figure = Figure(
            f"pareto-{len(figures) + 1}" if figures else "pareto",
            f"{name_alone(x).capitalize()} and {name_alone(y)}",
            label(x),
            label(y),
            log_x=_on_log_axis(x),
            log_y=_on_log_axis(y),
        )
        for name, (a, b, _), color, line in zip(groups, columns, (GREY, BLUE), (GREY, ORANGE), strict=True):
            figure.series.append(Series(a, b, name, "points", color))
            if signs:
                front = pareto_front(signs[0] * a, signs[1] * b)
                figure.series.append(Series(a[front], b[front], "", "line", line))
        if signs:
            better = (
                f"{'more' if sign > 0 else 'less'} {name_alone(n)}" for sign, n in zip(signs, (x, y), strict=True)
            )
            figure.note = f"Lines: crystals of which no other of the group has both {' and '.join(better)}."
        figures.append(figure)
    return figures


def quantities(terms: Sequence[str]) -> list[str]:
    """What is in the reward: its terms; the two parts of a term in its place, where it has two."""
    return [name for term, parts in _parts(terms).items() for name in (parts if len(parts) == 2 else [term])]


def _pairs(terms: Sequence[str]) -> list[tuple[str, str, str]]:
    """Pairs of quantities, and the column that tells which is better: the two parts of a term, and terms."""
    parts = _parts(terms)
    pairs = [(*names, term) for term, names in parts.items() if len(names) == 2]
    if len(parts) <= _MOST_TERMS:
        pairs += [(x, y, "reward") for x, y in combinations(parts, 2)]
    return pairs


def _parts(terms: Sequence[str]) -> dict[str, list[str]]:
    """Term -> its parts, spread left aside."""
    whole = [name for name in terms if not any(name.startswith(f"{other}/") for other in terms)]
    return {t: [name for name in terms if name.startswith(f"{t}/") and name != f"{t}/spread"] for t in whole}


def _wanted(x: np.ndarray, y: np.ndarray, merit: np.ndarray) -> tuple[int, int] | None:
    """Whether more (1) or less (-1) of x and of y is better; None where that cannot be said, as of a target value.

    A crystal that is ahead of another in both should have the higher merit.
    """
    known = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & np.isfinite(merit))
    some = known[:: 1 + len(known) // _ASKED]
    dx, dy, dm = (np.subtract.outer(v[some], v[some]) for v in (x, y, merit))
    agreement = {}
    for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        ahead = (signs[0] * dx > 0) & (signs[1] * dy > 0) & (dm != 0)
        if ahead.any():
            agreement[signs] = float((dm[ahead] > 0).mean())
    best = max(agreement, key=agreement.__getitem__, default=None)
    return best if best and agreement[best] >= _SURE else None


def _on_log_axis(name: str) -> bool:
    return name.split("/")[-1].split("(")[0] in _LOG

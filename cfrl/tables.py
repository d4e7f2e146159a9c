"""A table is its columns, name -> (n,) values: what HDF5 files hold and numpy computes with. Here it is CSV.

Without pandas, which only those get who ask for a frame (`cfrl.screen`): models are trained and crystals drawn on
machines that lack it.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfrl.errors import UserError
from cfrl.files import atomic_file

Columns = dict[str, np.ndarray]  # numbers, or strings as objects; NaN and "" are unknown
TEXT = ("id", "formula", "known_as", "duplicate_of", "parent")  # also where each looks like a number: InF, NaN


def write_csv(path: str | Path, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
    """Floats to six digits, nothing for NaN. Raises UserError where it cannot be written."""
    with atomic_file(path) as temp, temp.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(map(as_text, np.asarray(c, object)) for c in columns.values()), strict=True))


def read_csv(path: Path) -> dict[str, list[Any]]:
    """Columns; numbers where all of a column are (empty: NaN). Raises UserError where there is no such file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; did the run come to its end?")
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(head)}
    return {name: words if name in TEXT else _numbers(words) for name, words in columns.items()}


def join(parts: Sequence[Columns]) -> Columns:
    """Tables one below the other; NaN where a part lacks a column."""
    names = dict.fromkeys(name for part in parts for name in part)
    blanks = [np.full(len(next(iter(part.values()))), np.nan) for part in parts]
    return {k: np.concatenate([p.get(k, nan) for p, nan in zip(parts, blanks, strict=True)]) for k in names}


def spread_out(values: np.ndarray, rows: np.ndarray | Sequence[int], n: int) -> np.ndarray:
    """(n,) float64: the values at these rows, numbers or (n,) bool; NaN elsewhere."""
    column = np.full(n, np.nan)
    column[rows] = values
    return column


def distinct(names: Iterable[str], mark: str = "#") -> list[str]:
    """Names told apart: a, b, a -> a, b, a#2."""
    used, again = dict[str, None](), Counter[str]()
    for name in names:
        new = name
        while new in used:
            again[name] += 1
            new = f"{name}{mark}{again[name] + 1}"
        used[new] = None
    return list(used)


def as_text(value: Any) -> str:
    """A value of a table as CSV has it."""
    if isinstance(value, float | np.floating):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _numbers(words: list[str]) -> list[Any]:
    try:
        return [float(word) if word else math.nan for word in words]
    except ValueError:
        return words

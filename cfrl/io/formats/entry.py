"""What files are cut into and what comes of it: an entry, its cell with atoms, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cfrl.crystals.elements import ATOMIC_NUMBERS, SYMBOLS

if TYPE_CHECKING:
    from pymatgen.core import Structure

Payload = str | dict | None  # text, or a dictionary of JSON, of one structure
ID_COLUMNS = ("material_id", "mat_id", "entry_id", "id")
COMPRESSED = (".gz", ".bz2", ".xz")
MAX_ATOMS = 4000  # of one structure; 20 sites of the largest multiplicity, 192, are 3,840
LARGEST = 1e4  # angstrom, or cells; what is farther off is a slip


class Unusable(Exception):
    """An entry that gives no cell with atoms; the message is `reason: detail`."""


class Cell(NamedTuple):
    """A crystal as it stands in a file."""

    lattice: np.ndarray  # (3, 3) rows a, b, c in angstrom
    frac_coords: np.ndarray  # (N, 3)
    numbers: np.ndarray  # (N,) atomic numbers


@dataclass
class Entry:
    """One structure of a file, not yet parsed.

    file, row: where it stands; rows count from 1.
    id: its name, "" if the file gives none.
    kind: which parser understands `payload`.
    values: further columns, numbers or strings.
    split: code of `storage.SPLITS`, -1 if the file does not say.
    """

    file: str
    row: int
    id: str
    kind: str
    payload: Payload
    values: dict[str, float | str] = field(default_factory=dict)
    split: int = -1


def unpacked(path: PurePath) -> PurePath:
    """The path without the ending of a compression."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def stem(name: str) -> str:
    """The name of a file without folders and endings, for structures that have none of their own."""
    return unpacked(PurePath(name)).stem


def scalars(mapping: Mapping[str, object]) -> dict[str, float | str]:
    """The numbers, then the strings of a mapping."""
    numbers = {k: float(v) for k, v in mapping.items() if isinstance(v, int | float | np.number | np.bool_)}
    return numbers | {k: v for k, v in mapping.items() if isinstance(v, str)}


def identity(record: Mapping[str, object]) -> str:
    """The name that a record, or its `data`, gives to itself; "" for none."""
    levels = [record, record["data"]] if isinstance(record.get("data"), dict) else [record]
    return next((str(level[key]) for level in levels for key in ID_COLUMNS if level.get(key) is not None), "")


def refuse_many_atoms(count: int) -> None:
    """Raises Unusable where there are too many atoms to be read."""
    if count > MAX_ATOMS:
        raise Unusable(f"too many atoms: {count}, at most {MAX_ATOMS} can be read")


def sound(cell: Cell) -> Cell:
    """The cell, if a crystal can have it. Raises Unusable."""
    n = len(cell.numbers)
    refuse_many_atoms(n)
    if n == 0 or cell.lattice.shape != (3, 3) or cell.frac_coords.shape != (n, 3):
        raise Unusable("unparsable: no atoms, or not three numbers for each")
    if not (np.isfinite(cell.lattice).all() and np.isfinite(cell.frac_coords).all()):
        raise Unusable("unparsable: a coordinate or cell length is not a finite number")
    if max(np.abs(cell.lattice).max(), np.abs(cell.frac_coords).max()) > LARGEST:
        raise Unusable(f"unparsable: a coordinate or cell length is above {LARGEST:,.0f}")
    if abs(np.linalg.det(cell.lattice)) < 1e-3:
        raise Unusable("unparsable: a cell without volume")
    if not (cell.numbers.min() >= 1 and cell.numbers.max() < len(SYMBOLS)):
        raise Unusable("unparsable: an atomic number is none")
    return cell


def from_structure(structure: Structure) -> Cell:
    """The cell of a pymatgen structure. Raises Unusable for one that is not made of one element a site."""
    if not structure.is_ordered:
        raise Unusable("disordered: a site is shared or partly occupied")
    symbols = [getattr(site.specie, "symbol", "?") for site in structure]
    unknown = [symbol for symbol in symbols if symbol not in ATOMIC_NUMBERS]
    if unknown:
        raise Unusable(f"unparsable: {unknown[0]} is not an element")
    numbers = np.array([ATOMIC_NUMBERS[symbol] for symbol in symbols])
    return Cell(structure.lattice.matrix, structure.frac_coords, numbers)

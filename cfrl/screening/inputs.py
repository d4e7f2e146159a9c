"""What a screening starts from: the crystals of its input, and those that are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch, reduced_formula
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import UserError
from cfrl.io import readers
from cfrl.io.catalogue import dataset_path, is_dataset
from cfrl.io.datasets import read_structures
from cfrl.io.formats.entry import Unusable
from cfrl.io.formats.records import STRUCTURE_COLUMNS
from cfrl.io.storage import iter_crystals
from cfrl.stability.hull import ReferenceHull
from cfrl.tables import distinct

if TYPE_CHECKING:
    import pandas as pd
    from pymatgen.core import Structure


@dataclass
class Samples:
    """What the input holds: n rows, first the m readable crystals, then the others.

    ids: n names, unique
    structures: m pymatgen structures
    problems: n - m reasons why a row cannot be read
    columns: name -> (n,) numbers or strings that stood beside the crystals
    """

    ids: list[str]
    structures: list[Structure]
    problems: list[str]
    columns: dict[str, np.ndarray]


@dataclass(frozen=True)
class KnownCrystal:
    """One crystal of a `--known` dataset; its fingerprint is "" if unknown."""

    name: str
    structure: Structure
    fingerprint: str


def read_samples(source: str) -> Samples:
    """The crystals of the input, and a row for each that cannot be read.

    Raises:
        UserError: the input cannot be read, or holds nothing at all.
    """
    structures, ids, columns, dropped = read_structures(source)
    ids += [entry.id or f"{Path(entry.file).name}:{entry.row}" for entry in dropped]
    if not ids:
        raise UserError(f"{source}: there is no crystal in it")
    ids = distinct(ids)
    filled = {}
    for name, values in columns.items():
        values = np.asarray(values)
        blank = np.full(len(dropped), np.nan if values.dtype.kind == "f" else "", dtype=values.dtype)
        filled[name] = np.concatenate([values, blank])
    return Samples(ids, structures, [entry.reason for entry in dropped], filled)


def read_known(names: Iterable[str], formulas: set[str]) -> dict[str, list[KnownCrystal]]:
    """Crystals of datasets or structure files that have one of these reduced formulas, by formula.

    Raises:
        UserError: a dataset that does not exist or cannot be read.
    """
    known: dict[str, list[KnownCrystal]] = {}
    for name in names:
        if not is_dataset(name):
            for formula, crystal in _known_in_files(name, formulas):
                known.setdefault(formula, []).append(crystal)
        else:
            start = 0
            for crystals in iter_crystals(dataset_path(name)):  # it may be millions
                for formula, found in known_by_formula(crystals, formulas, name, start).items():
                    known.setdefault(formula, []).extend(found)
                start += len(crystals)
    return known


def known_by_formula(
    crystals: CrystalBatch, formulas: set[str], name: str = "known", start: int = 0
) -> dict[str, list[KnownCrystal]]:
    """Those of the crystals that have one of these reduced formulas, by formula.

    Without ids they are called by the `name` and their row, counted from `start`.
    """
    own = np.array(crystals.formulas(), dtype=object)
    rows = np.nonzero(np.isin(own, list(formulas)))[0]
    crystals = crystals[rows]
    ids = crystals.ids or [f"{name}:{start + row}" for row in rows]
    known: dict[str, list[KnownCrystal]] = {}
    for formula, *parts in zip(own[rows], ids, crystals.to_structures(), fingerprints(crystals), strict=True):
        known.setdefault(formula, []).append(KnownCrystal(*parts))
    return known


def _known_in_files(name: str, formulas: set[str]) -> Iterator[tuple[str, KnownCrystal]]:
    for path in readers.input_files(name):
        for _, entry in readers.iter_entries(path):
            try:
                cell = readers.parse(entry.kind, entry.payload)
            except Unusable:
                continue
            formula = reduced_formula(cell.numbers.tolist(), [1] * len(cell.numbers))
            if formula in formulas:
                yield formula, KnownCrystal(entry.id or f"{path.name}:{entry.row}", readers.to_structure(cell), "")


def is_formula_list(name: str) -> bool:
    """Whether this is a CSV with a column `formula` and without structures."""
    if ".csv" not in Path(name).suffixes or not Path(name).is_file():
        return False
    head = _csv_columns(name, nrows=0).columns
    return "formula" in head and not set(STRUCTURE_COLUMNS) & set(head)


def read_formulas(name: str) -> ReferenceHull:
    """The formulas of such a list, as phases without energies.

    Raises:
        UserError: a row that is no formula.
    """
    formulas = _csv_columns(name, usecols=["formula"])["formula"].tolist()
    try:
        return ReferenceHull.from_compositions(formulas, np.full(len(formulas), np.nan))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _csv_columns(name: str, **options: Any) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(name, dtype=str, keep_default_na=False, **options)  # NaN is a formula
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{name}: cannot be read as a CSV: {error}") from error

"""Records: rows of a CSV, and JSON of pymatgen: structures, computed entries and lists of them."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from cfrl.crystals.elements import ATOMIC_NUMBERS
from cfrl.errors import UserError
from cfrl.io.formats.entry import ID_COLUMNS, Cell, Entry, Payload, Unusable, identity, refuse_many_atoms, scalars, stem

STRUCTURE_COLUMNS = ("cif", "structure")
_FIELD = 64 << 20  # bytes of one CSV field


def read_csv(text: TextIO, name: str) -> Iterator[Entry]:
    """An entry for each row: a CIF or a dictionary in one of STRUCTURE_COLUMNS, the other columns its values."""
    csv.field_size_limit(_FIELD)
    rows = csv.DictReader(text, strict=True)
    header = rows.fieldnames
    if not header:
        raise UserError(f"{name}: is empty")
    structure = next((column for column in STRUCTURE_COLUMNS if column in header), None)
    if structure is None:
        have = ", ".join(column[:40] for column in header[:12])
        raise UserError(f"{name}: has no column 'cif' (it has {have}); give the one that holds CIF text this name")
    named = next((column for column in ID_COLUMNS if column in header), None)
    kept = [c for c in header if c not in (named, "") and not c.startswith((structure, "cif", "Unnamed:"))]
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            payload = row[structure] or ""
            kind = "dict" if payload.lstrip().startswith("{") else "cif"
            if None in row or None in row.values():  # which field is which cannot be known
                kind, payload = "unreadable", f"unparsable: it has not the {len(header)} fields of the header"
            values = {column: row[column] or "" for column in kept}
            yield Entry(name, number, (row[named] or "") if named else "", kind, payload, values)
    except csv.Error as error:  # a quote that is never closed takes all that follows
        raise UserError(f"{name}: row {number + 1} cannot be read as csv: {error}; mend its quotes") from error


def read_json(text: TextIO, name: str) -> Iterator[Entry]:
    """An entry for each structure of a document: one, a list, or the `entries` of a dictionary."""
    document = json.load(text)
    if isinstance(document, dict):
        document = document.get("entries", [document])
    if not isinstance(document, list):
        raise UserError(f"{name}: is neither a structure nor a list of them")
    for number, record in enumerate(document, 1):
        try:
            entry = _record_entry(name, number, record, len(document) == 1)
        except (AttributeError, TypeError, ValueError, ArithmeticError, RecursionError):
            entry = Entry(name, number, "", "unreadable", "unparsable: not a structure")
        yield entry


def _record_entry(name: str, number: int, record: dict, alone: bool) -> Entry:
    is_structure = "lattice" in record and "sites" in record
    structure = record if is_structure else record.get("structure")
    values = _record_values({} if is_structure else record, structure)
    named = identity(record) or (stem(name) if alone else "")
    return Entry(name, number, named, "dict", structure, values)


def _record_values(record: dict, structure: object) -> dict[str, float | str]:
    """Numbers and strings of a JSON record, of its `data` too; `energy_per_atom` in eV of a computed entry."""
    nested = [record, record.get("data"), structure.get("properties") if isinstance(structure, dict) else None]
    values: dict[str, float | str] = {}
    for level in nested:
        values |= scalars({k: v for k, v in (level or {}).items() if k not in ID_COLUMNS and k[:1] not in "@"})
    if isinstance(values.get("energy"), float) and isinstance(structure, dict) and structure.get("sites"):
        energy = values["energy"] + (values.get("correction") or 0.0)
        values.setdefault("energy_per_atom", energy / len(structure["sites"]))
    return values


def parse(payload: Payload) -> Cell:
    """A pymatgen Structure as its dictionary, or that written as JSON or as Python prints it."""
    if isinstance(payload, str):
        try:
            payload = json.loads(payload)
        except json.JSONDecodeError:
            payload = ast.literal_eval(payload)
    if not isinstance(payload, dict):
        raise Unusable("unparsable: there is no structure")
    if not all(payload["lattice"].get("pbc", [True])):
        raise Unusable("unparsable: not periodic in three directions")
    refuse_many_atoms(len(payload["sites"]))
    species = [site["species"] for site in payload["sites"]]
    if any(len(parts) != 1 or float(parts[0]["occu"]) != 1 for parts in species):
        raise Unusable("disordered: a site is shared or partly occupied")
    symbols = [parts[0]["element"] for parts in species]
    unknown = [symbol for symbol in symbols if symbol not in ATOMIC_NUMBERS]
    if unknown:
        raise Unusable(f"unparsable: {unknown[0]} is not an element")
    coords = np.array([site["abc"] for site in payload["sites"]], dtype=np.float64).reshape(-1, 3)
    matrix = np.array(payload["lattice"]["matrix"], dtype=np.float64)
    return Cell(matrix, coords, np.array([ATOMIC_NUMBERS[symbol] for symbol in symbols]))

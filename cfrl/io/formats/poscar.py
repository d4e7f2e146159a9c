"""POSCAR: one structure, parsed by pymatgen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from cfrl.io.formats.calculation import folder_name
from cfrl.io.formats.entry import Cell, Entry, from_structure, refuse_many_atoms


def read(text: TextIO, name: str) -> Iterator[Entry]:
    """The one entry that such a file is."""
    yield Entry(name, 1, folder_name(name), "poscar", text.read())


def parse(text: str) -> Cell:
    """Its cell."""
    from pymatgen.core import Structure

    counts = [int(word) for line in text.splitlines()[5:7] for word in line.split() if word.isdecimal()]
    refuse_many_atoms(sum(counts))
    return from_structure(Structure.from_str(text, fmt="poscar"))

"""Binary files of ASE: trajectories (.traj) and databases (.db)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cfrl.io.formats.calculation import calculation_entry, mechanics
from cfrl.io.formats.entry import Entry, scalars, stem
from cfrl.untrusted import one_line

if TYPE_CHECKING:
    from ase import Atoms


def read_trajectory(text: TextIO, name: str) -> Iterator[Entry]:
    """The last frame of each relaxation: frames one after the other of the same atoms."""
    import ase.io

    with tempfile.TemporaryDirectory() as folder:
        path = _stored(text, folder, "a.traj")
        try:
            frames = ase.io.read(path, index=":", format="traj")
        except Exception as error:  # ase raises anything on broken input
            yield _broken(name, 1, "trajectory", error)
            return
    ends = [list(group)[-1] for _, group in groupby(frames, lambda atoms: tuple(atoms.numbers))]
    for number, atoms in enumerate(ends, 1):
        yield _entry(name, number, atoms, {}, stem(name) if len(ends) == 1 else "")


def read_database(text: TextIO, name: str) -> Iterator[Entry]:
    """Each row, with its key-value pairs."""
    import ase.db

    with tempfile.TemporaryDirectory() as folder:
        path = _stored(text, folder, "a.db")
        try:
            rows = [(row.toatoms(), dict(row.key_value_pairs), row.id) for row in ase.db.connect(path).select()]
        except Exception as error:
            yield _broken(name, 1, "database of ASE", error)
            return
    for number, (atoms, pairs, identity) in enumerate(rows, 1):
        yield _entry(name, number, atoms, scalars(pairs), str(pairs.get("name", f"{stem(name)}-{identity}")))


def _stored(text: TextIO, folder: str, name: str) -> Path:
    """The bytes as a file: ASE opens these by path, and members of a zip have none."""
    path = Path(folder) / name
    path.write_bytes(text.buffer.read())
    return path


def _entry(name: str, number: int, atoms: Atoms, values: dict[str, float | str], identity: str) -> Entry:
    from ase.units import GPa
    from pymatgen.io.ase import AseAtomsAdaptor

    try:
        if not atoms.pbc.all():
            return Entry(name, number, identity, "unreadable", "unparsable: not periodic in three directions")
        results = atoms.calc.results if atoms.calc else {}
        if results.get("energy") is not None:
            values = values | {"energy_per_atom": float(results["energy"]) / len(atoms)}
        stress = -atoms.get_stress(voigt=False) / GPa if results.get("stress") is not None else None
        values = values | mechanics(results.get("forces"), stress)
        entry = calculation_entry(name, AseAtomsAdaptor.get_structure(atoms), values, identity or stem(name))
    except Exception as error:
        return _broken(name, number, "row", error)
    entry.row, entry.id = number, identity
    return entry


def _broken(name: str, number: int, what: str, error: Exception) -> Entry:
    return Entry(name, number, stem(name), "unreadable", f"unparsable: not a readable {what}: {one_line(error)}")

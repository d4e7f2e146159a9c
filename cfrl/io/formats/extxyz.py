"""extxyz: frames one after the other, parsed by ASE."""

from __future__ import annotations

import io
import itertools
from collections import deque
from collections.abc import Iterator
from typing import TextIO

from cfrl.errors import UserError
from cfrl.io.formats.entry import ID_COLUMNS, MAX_ATOMS, Cell, Entry, Unusable, identity, scalars


def read(text: TextIO, name: str) -> Iterator[Entry]:
    """An entry for each frame; what the comment line says of it are its values."""
    from ase.io.extxyz import key_val_str_to_dict

    number = 0
    while count := text.readline():
        if not count.strip():
            continue
        number += 1
        if not count.strip().isdigit():  # where the next frame begins is unknown
            yield Entry(name, number, "", "unreadable", f"unparsable: '{count.strip()[:40]}' is not a number of atoms")
            return
        comment = text.readline()
        atoms, lines = int(count), iter(text.readline, "")
        if atoms > MAX_ATOMS:
            deque(itertools.islice(lines, atoms), maxlen=0)
            yield Entry(name, number, "", "unreadable", f"too many atoms: {atoms}, at most {MAX_ATOMS} can be read")
            continue
        frame = [count, comment, *itertools.islice(lines, atoms)]
        try:
            info = key_val_str_to_dict(comment)
        except Exception:  # ase's parser raises anything
            info = {}  # the parser will say what is wrong with the frame
        values = scalars({k: v for k, v in info.items() if k.lower() not in ("pbc", *ID_COLUMNS)})
        if atoms and isinstance(values.get("energy"), float):
            values.setdefault("energy_per_atom", values["energy"] / atoms)
        yield Entry(name, number, identity(info), "extxyz", "".join(frame), values)
    if not number:
        raise UserError(f"{name}: is empty")


def parse(text: str) -> Cell:
    """The cell of one frame."""
    import ase.io

    atoms = ase.io.read(io.StringIO(text), format="extxyz")
    if not atoms.pbc.all():
        raise Unusable("unparsable: not periodic in three directions")
    return Cell(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)

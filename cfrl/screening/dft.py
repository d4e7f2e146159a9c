"""Inputs for DFT, and folders of files that take the place of older ones whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cfrl.errors import UserError

if TYPE_CHECKING:
    from pymatgen.core import Structure


DFT_SETS = {"scan": "MPScanRelaxSet", "pbe": "MPRelaxSet"}


def write_vasp(structure: Structure, folder: Path, kind: str) -> None:
    """VASP inputs of the primitive cell: POSCAR, INCAR, KPOINTS and POTCAR.spec (which POTCARs to concatenate).

    Args:
        structure: the crystal.
        folder: where to; it is made.
        kind: a key of `DFT_SETS`.
    """
    from pymatgen.io.vasp import sets

    inputs = getattr(sets, DFT_SETS[kind])(structure.get_primitive_structure())
    inputs.write_input(folder, potcar_spec=True)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of an old one when the block ends."""
    partial_path = path.with_name(path.name + ".partial")
    shutil.rmtree(partial_path, ignore_errors=True)
    try:
        partial_path.mkdir(parents=True)
        yield partial_path
        shutil.rmtree(path, ignore_errors=True)
        partial_path.rename(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error

"""What a screening leaves: table, crystals, candidates, inputs for DFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cfrl.config import ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.files import atomic_file, provenance
from cfrl.io.storage import write_crystals
from cfrl.screening import stages
from cfrl.screening.tally import Summary, Table

if TYPE_CHECKING:
    from pymatgen.core import Structure


DFT_SETS = {"scan": "MPScanRelaxSet", "pbe": "MPRelaxSet"}


def _write(
    path: Path,
    table: Table,
    order: np.ndarray,
    structures: dict[int, Structure],
    config: ScreenConfig,
    summary: Summary,
) -> None:
    """Table, crystals, summary, and the candidates' files. `order`: rows, the candidates first."""
    table.write_csv(path / "table.csv", order)
    table.write_csv(path / "flagged.csv", [row for row in order if table["held_back"][row]])
    _write_crystals(path / "screen.h5", table, order, structures, config)
    with atomic_file(path / "summary.json") as temp:
        temp.write_text(json.dumps(summary.as_dict() | provenance(), indent=2) + "\n", encoding="utf-8")
    candidates = [int(row) for row in order if table["candidate"][row]][: config.top]
    width = len(str(len(candidates)))
    names = {row: f"{place:0{width}d}-{table['formula'][row]}" for place, row in enumerate(candidates, 1)}
    with _replaced(path / "cifs") as folder:
        for row, name in names.items():
            structures[row].to(folder / f"{name}.cif", fmt="cif", symprec=config.symprec)
    if config.dft:
        with _replaced(path / "dft") as folder:
            for row, name in names.items():
                write_vasp(structures[row], folder / name, config.dft)


def _write_crystals(
    path: Path, table: Table, order: np.ndarray, structures: dict[int, Structure], config: ScreenConfig
) -> None:
    rows = [int(row) for row in order if table["space_group"][row] > 0]
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(
        [structures[row] for row in rows],
        config.symprec,
        [table["id"][row] for row in rows],
        errors="skip",
        dropped=dropped,
        max_sites=stages.MAX_SITES,
    )
    rows = [row for place, row in enumerate(rows) if place not in dropped]
    columns = {name: values[rows] for name, values in table.columns.items() if name != "id"}
    write_crystals(path, crystals, columns=columns, attrs={"rank": config.rank, "filter": config.filter or ""})


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
def _replaced(path: Path) -> Iterator[Path]:
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

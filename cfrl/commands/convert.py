"""`cfrl convert`: crystals from one format into another."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from cfrl.errors import UserError
from cfrl.io.datasets import read_structures
from cfrl.io.export import check_output, export_structures

Cell = Literal["as-is", "conventional", "primitive"]


def convert(
    source: str, output: str, cell: Cell = "as-is", symprec: float = 0.01, console: Console | None = None
) -> Path:
    """Reads whatever `cfrl screen` reads, writes what the ending of `output` says.

    Args:
        cell: the cell that is written; a dataset (.h5) always holds conventional ones.
        symprec: angstrom; of the symmetry in CIFs and datasets, and of the cells.

    Raises:
        UserError: nothing can be read, or nowhere to write.
    """
    check_output(output)
    structures, ids, columns, dropped = read_structures(source)
    if not structures:
        reason = f"; the first: {dropped[0].reason}" if dropped else ""
        raise UserError(f"{source}: no structure can be read{reason}")
    path, lost = export_structures(structures, ids, output, cell, symprec, columns)
    if console is not None:
        console.print(f"{path}: {len(structures) - len(lost)} crystals", highlight=False, soft_wrap=True)
        for name, reason in [*((entry.id, entry.reason) for entry in dropped), *lost][:5]:
            console.print(f"left out: {name}: {reason}", highlight=False)
    return path

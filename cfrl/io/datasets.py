"""Datasets, loaded by name or from files, whole or as a stream, and what they hold.

File formats are in `readers.py`, their import in `importing.py`, the HDF5 schema in `storage.py`, downloads in
`fetch.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.errors import UserError
from cfrl.io import readers, storage
from cfrl.io.catalogue import dataset_path, is_dataset
from cfrl.io.formats.entry import Unusable
from cfrl.io.importing import _RESERVED, Columns, Dropped, _columns, _files, _name, read_files
from cfrl.io.options import ImportOptions
from cfrl.io.readers import Limits
from cfrl.io.storage import describe, iter_crystals

if TYPE_CHECKING:
    from pymatgen.core import Structure


def load_dataset(
    name: str | Path, split: str | None = None, options: ImportOptions = ImportOptions(workers=1)
) -> CrystalBatch:
    """Crystals of a dataset with ids and properties.

    Args:
        name: "prototypes" (pymatgen's, always there), a fetched name, an `.h5` file, or any structure file or folder.
        split: only "train", "validation" or "test".
        options: how structure files are read; by default in this process, since a caller's script need not be
            importable by others.

    Raises:
        UserError: no such dataset, or one that cannot be read.
    """
    if is_dataset(name):
        return storage.read_crystals(dataset_path(name), split)
    imported = read_files([str(name)], options)
    if not len(imported.crystals):
        raise UserError(f"{name}: no structure can be used ({imported.dropped[0].reason})")
    numbers = {k: torch.from_numpy(v) for k, v in imported.columns.items() if isinstance(v, np.ndarray)}
    crystals = replace(imported.crystals, properties=numbers)
    if split is None:
        return crystals
    return crystals[imported.splits(options) == storage.split_code(split)]


def read_structures(
    name: str | Path, limits: Limits = Limits()
) -> tuple[list[Structure], list[str], Columns, list[Dropped]]:
    """Structures of any input, as they stand there: symmetry is neither looked for nor needed.

    Args:
        name: whatever `load_dataset` takes.
        limits: of the size of files.

    Returns:
        structures, ids, columns (name -> (n,) float64 or list of strings), and what could not be used.

    Raises:
        UserError: an input that cannot be read.
    """
    if is_dataset(name):
        path = dataset_path(name)
        crystals, columns = storage.read_crystals(path), storage.read_columns(path)
        ids = crystals.ids or [str(i) for i in range(len(crystals))]
        columns = {k: v.tolist() if v.dtype == object else v for k, v in columns.items() if k not in _RESERVED}
        return crystals.to_structures(), ids, columns, []
    structures, kept, dropped = [], [], []
    for path, strict in _files(name):
        for _, entry in readers.iter_entries(path, strict, limits):
            try:
                structures.append(readers.to_structure(readers.parse(entry.kind, entry.payload)))
                kept.append(replace(entry, payload=None))
            except Unusable as error:
                dropped.append(Dropped(entry.file, entry.row, entry.id, str(error)))
    return structures, [_name(entry) for entry in kept], _columns([entry.values for entry in kept]), dropped


def summarise(path: Path) -> dict[str, Any]:
    """Counts of `space_groups` and of `elements` (crystals holding them), `sites` and `atoms` per crystal (n,),
    and the known values of each of `properties`. Reads in chunks."""
    groups, elements = Counter(), Counter()
    sites, atoms = [], []
    for crystals in storage.iter_crystals(path):
        groups.update(crystals.space_group.tolist())
        present = np.zeros((len(crystals), len(SYMBOLS)), dtype=bool)
        np.put_along_axis(present, crystals.species.numpy(), True, axis=1)
        elements.update({z: int(n) for z, n in enumerate(present.sum(0)) if z and n})
        sites.append(crystals.num_sites.numpy())
        atoms.append(crystals.num_atoms.numpy())
    names = storage.describe(path)["properties"]
    columns = storage.read_columns(path, names) if names else {}
    return {
        "space_groups": groups,
        "elements": elements,
        "sites": np.concatenate(sites) if sites else np.zeros(0, int),
        "atoms": np.concatenate(atoms) if atoms else np.zeros(0, int),
        "properties": {name: values[~np.isnan(values)] for name, values in columns.items()},
    }


_ROWS = 4096  # crystals in memory at once


class Dataset:
    """A dataset that streams by. Files that are no HDF5 of ours are read whole."""

    def __init__(self, name: str, split: str | None) -> None:
        self._crystals, self._path, self._split = None, None, split
        if is_dataset(name):
            self._path = dataset_path(name)
            about = describe(self._path)
            self.size = about["splits"][split] if split else about["crystals"]
            self.properties = about["properties"]
        else:
            self._crystals = load_dataset(name, split)
            self.size, self.properties = len(self._crystals), sorted(self._crystals.properties)

    def batches(self, advance: Callable[[int], None] = lambda done: None) -> Iterator[CrystalBatch]:
        """At most `_ROWS` crystals at a time; `advance` is told how many are done."""
        done = 0
        for batch in self._stream():
            yield batch
            done += len(batch)
            advance(done)

    def pick(self, rows: np.ndarray) -> CrystalBatch:
        """The crystals of some rows, in the order of the rows, which must ascend."""
        picked, start = [], 0
        for batch in self._stream():
            inside = rows[(rows >= start) & (rows < start + len(batch))] - start
            picked.append(batch[inside])
            start += len(batch)
        return CrystalBatch.cat(picked)

    def _stream(self) -> Iterator[CrystalBatch]:
        if self._crystals is None:
            yield from iter_crystals(self._path, _ROWS, self._split)
        else:
            yield from (self._crystals[start : start + _ROWS] for start in range(0, self.size, _ROWS))

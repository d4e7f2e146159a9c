"""The HDF5 schema of datasets and rollouts: crystals with ids, properties and text columns.

One file holds n crystals with m sites in all. Sites are ragged, so they lie flat, crystal after crystal:

    /offsets          (n + 1,) int64     sites of crystal i: offsets[i] to offsets[i + 1]
    /wyckoff          (m,) uint8         Wyckoff letter: 1 = 'a', ..., 26 = 'z', 27 = 'A'
    /species          (m,) uint8         atomic number
    /frac_coords      (m, 3) float       fractional, of the orbit's representative (first coordinate triplet)
    /space_group      (n,) uint8         1..230, International Tables standard setting
    /lattice          (n, 6) float       a, b, c (angstrom), alpha, beta, gamma (degrees), conventional cell
    /split            (n,) uint8         0 = train, 1 = validation, 2 = test
    /ids              (n,) UTF-8 string  may be absent
    /properties/NAME  (n,) float64       NaN = unknown. Datasets: band_gap, e_above_hull, ...; rollouts: step,
                                         log_prob, log_prob_base, reward, every reward term
    /text/NAME        (n,) UTF-8 string  e.g. the source of a structure; rollouts: status, "" where all went well

Floats are float32 or float64, as they were given. Everything is chunked, shuffled, gzipped and appendable.
Attributes of the root: `format` = "cfrl-crystals", `schema_version` = 1, the provenance `command`, `version`,
`git_revision`, `date`, and what the writer adds (`source`, `seed`, ...). A "/" in a NAME is stored as "%2F".

How structures become crystals is not here: `crystals/analysis.py` for the symmetry, `importing.py` for files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS, tables
from cfrl.errors import UserError
from cfrl.files import atomic_file, provenance
from cfrl.untrusted import fitting, open_hdf5

FORMAT = "cfrl-crystals"
SCHEMA_VERSION = 1
SPLITS = {"train": 0, "validation": 1, "test": 2}
_CHUNK = 4096  # crystals per HDF5 chunk
_TEXT = h5py.string_dtype("utf-8")
_PER_SITE = ("wyckoff", "species", "frac_coords")
_KINDS = {  # kinds of numbers, and what comes after the first dimension
    "offsets": ("iu",),
    "wyckoff": ("iu",),
    "species": ("iu",),
    "frac_coords": ("f", 3),
    "space_group": ("iu",),
    "lattice": ("f", 6),
    "split": ("iu",),
}
_LARGEST = 1e4  # angstrom, degrees, fractions of a cell
_PADDING, _SPARE = 100, 1_000_000  # crystals padded to the longest are at most so many times the sites, and so many

Columns = Mapping[str, ArrayLike]  # (n,) numbers or strings each


def write_crystals(
    path: str | Path,
    crystals: CrystalBatch,
    *,
    columns: Columns | None = None,
    split: Sequence[int] | np.ndarray | None = None,
    attrs: Mapping[str, str | float] | None = None,
) -> None:
    """Write crystals to a new file, or over an old one; never half a file.

    Args:
        path: the `.h5` file.
        crystals: their `ids` and `properties` are written too.
        columns: more values per crystal: numbers (kept as properties) or strings.
        split: (n,) 0 = train, 1 = validation, 2 = test; default: all train.
        attrs: plain values to be kept as attributes of the file, beside the provenance.

    Raises:
        UserError: the file cannot be written.
        ValueError: a column of another length than the crystals.
    """
    with atomic_file(path) as temp, _in_memory(temp, "w") as file:
        file.attrs.update(format=FORMAT, schema_version=SCHEMA_VERSION, **provenance(), **(attrs or {}))
        _create(file, "offsets", np.zeros(1, dtype=np.int64))
        _append(file, _flatten(crystals, columns or {}, split))
        _save(file, temp)


def append_crystals(
    path: str | Path,
    crystals: CrystalBatch,
    *,
    columns: Columns | None = None,
    split: Sequence[int] | np.ndarray | None = None,
    attrs: Mapping[str, str | float] | None = None,
) -> None:
    """Add crystals at the end of a file (made where there is none). A kill leaves the old file or the new one.

    Columns may differ from those of the file: what is not given becomes NaN or "". `attrs` are those of a new file.

    Raises:
        UserError: the file cannot be read or written.
        ValueError: a column of another length than the crystals.
    """
    path = Path(path)
    if not path.exists():
        return write_crystals(path, crystals, columns=columns, split=split, attrs=attrs)
    with open_crystals(path):
        pass
    datasets = _flatten(crystals, columns or {}, split)
    with fitting(path), atomic_file(path) as temp, _in_memory(path, "r+") as file:
        _append(file, datasets)
        _save(file, temp)


def replace_property(path: str | Path, name: str, values: np.ndarray) -> None:
    """Other numbers in a property that the file has, (n,). A kill leaves the old file or the new one.

    Raises:
        UserError: the file cannot be read or written.
    """
    path = Path(path)
    with open_crystals(path):
        pass
    with fitting(path), atomic_file(path) as temp, _in_memory(path, "r+") as file:
        file[f"properties/{_escape(name)}"][:] = values
        _save(file, temp)


def read_crystals(path: str | Path, split: str | None = None, start: int = 0, stop: int | None = None) -> CrystalBatch:
    """Crystals with their ids and properties (text columns: `read_columns`).

    Args:
        path: a file of `write_crystals`.
        split: only "train", "validation" or "test".
        start: first row of the file.
        stop: end of the rows; default: all.

    Raises:
        UserError: no such file, not one of ours, damaged, or of a newer schema.
    """
    with open_crystals(path) as file:
        return _read(file, split, start, stop)


def iter_crystals(path: str | Path, chunk: int = 4096, split: str | None = None) -> Iterator[CrystalBatch]:
    """The crystals of a file, at most `chunk` at a time: for files that are larger than the memory.

    Raises:
        UserError: as `read_crystals`.
    """
    with open_crystals(path) as file:
        for start in range(0, len(file["space_group"]), chunk):
            crystals = _read(file, split, start, start + chunk)
            if len(crystals):
                yield crystals


def read_columns(path: str | Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Values per crystal: properties (float64), text columns (arrays of str), `split` (uint8) and `ids`.

    Args:
        path: a file of `write_crystals`.
        names: which ones; default: all.

    Raises:
        UserError: a column that the file does not have; else as `read_crystals`.
    """
    with open_crystals(path) as file:
        known = _columns(file)
        missing = [name for name in names or () if name not in known]
        if missing:
            raise UserError(f"{path}: has no column '{missing[0]}'; it has {', '.join(sorted(known))}")
        return {name: _read_split(file) if name == "split" else _read_column(known[name]) for name in names or known}


def describe(path: str | Path) -> dict[str, Any]:
    """What a file holds, without reading the crystals.

    Returns:
        `crystals`, `sites` (counts), `splits` (name -> count), `properties`, `text` (lists of names), `attrs`.

    Raises:
        UserError: as `read_crystals`.
    """
    with open_crystals(path) as file:
        counts = np.bincount(_read_split(file), minlength=len(SPLITS))
        return {
            "crystals": len(file["space_group"]),
            "sites": len(file["wyckoff"]),
            "splits": {name: int(counts[code]) for name, code in SPLITS.items()},
            "properties": sorted(_group(file, "properties")),
            "text": sorted(_group(file, "text")),
            "attrs": {key: value.item() if hasattr(value, "item") else value for key, value in file.attrs.items()},
        }


@contextmanager
def open_crystals(path: str | Path) -> Iterator[h5py.File]:
    """The file, open for reading and checked; faults of HDF5 become a `UserError` that names the file."""
    with open_hdf5(path) as file:
        _check(file, Path(path))
        yield file


def read_rows(path: str | Path) -> tuple[CrystalBatch, dict[str, np.ndarray], dict[int, str]]:
    """Crystals, columns, and which rows are no crystals with the reason: for an import, which leaves those out.

    Raises:
        UserError: as `read_crystals`, but not for rows.
    """
    with open_crystals(path) as file:
        rows = slice(0, len(file["space_group"]))
        crystals = _read_slice(file, rows)
        columns = {name: _read_column(data) for name, data in _columns(file).items()}
        return crystals, columns, faults(crystals, columns["split"])


def faults(crystals: CrystalBatch, split: np.ndarray) -> dict[int, str]:
    """Rows that are no crystals, and why: numbers beyond their range, NaN in cell or coordinates.

    Cells and distances may be impossible: a sampler draws such crystals too, and they are kept.
    """
    group, occupied = crystals.space_group, crystals.wyckoff > 0
    exists = (group >= 1) & (group <= NUM_SPACE_GROUPS)
    letters = tables().num_letters[torch.where(exists, group, 0)]
    known = (crystals.wyckoff >= 0) & (crystals.wyckoff <= letters[:, None])
    elements = (crystals.species >= 0) & (crystals.species < len(SYMBOLS)) & (occupied == (crystals.species > 0))
    checks = {
        f"space group not 1 to {NUM_SPACE_GROUPS}": exists,
        "Wyckoff letter not of its space group": known.all(1),
        f"atomic number not 1 to {len(SYMBOLS) - 1}": elements.all(1),
        "coordinate not a number, or absurd": (crystals.frac_coords.abs() <= _LARGEST).flatten(1).all(1),
        "cell not of numbers, or absurd": (crystals.lattice.abs() <= _LARGEST).all(1),
        f"split not 0 to {len(SPLITS) - 1}": torch.from_numpy(np.isin(split, list(SPLITS.values()))),
    }
    found: dict[int, str] = {}
    for reason, good in checks.items():
        for row in (~good).nonzero()[:, 0].tolist():
            found.setdefault(row, reason)
    return found


def split_code(name: str) -> int:
    """The number that stands for "train", "validation" or "test" in `split`.

    Raises:
        UserError: another name.
    """
    if name not in SPLITS:
        raise UserError(f"split '{name}' is none of {', '.join(SPLITS)}")
    return SPLITS[name]


def to_flat(padded: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows of a padded array (n, s, ...) one after the other: (sum of counts, ...)."""
    return padded[_filled(counts, padded.shape[1])]


def to_padded(flat: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The inverse of `to_flat`: (n, largest count, ...), zero where there is nothing."""
    width = int(counts.max(initial=0))
    padded = np.zeros((len(counts), width, *flat.shape[1:]), dtype=flat.dtype)
    padded[_filled(counts, width)] = flat
    return padded


def _filled(counts: np.ndarray, width: int) -> np.ndarray:
    return np.arange(width) < counts[:, None]


def _in_memory(path: Path, mode: str) -> h5py.File:
    """A file that is changed in memory alone: where the disk is full, HDF5 itself fails in pieces, not cleanly."""
    return h5py.File(path, mode, driver="core", backing_store=False, block_size=1 << 22)


def _save(file: h5py.File, path: Path) -> None:
    file.flush()
    path.write_bytes(file.id.get_file_image())


def _check(file: h5py.File, path: Path) -> None:
    if file.attrs.get("format") != FORMAT:
        raise UserError(f"{path}: is HDF5 but not a file of crystals of cfrl; make one with `cfrl data import`")
    version = file.attrs.get("schema_version", 0)
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: has schema version {version!s:.20}, this cfrl reads {SCHEMA_VERSION}; update cfrl")
    for name, (kinds, *width) in _KINDS.items():
        if file[name].dtype.kind not in kinds or list(file[name].shape[1:]) != width:
            raise UserError(f"{path}: is damaged: {name} is {file[name].dtype} of shape {file[name].shape}")
    n, m = len(file["space_group"]), len(file["wyckoff"])
    lengths = [len(file["offsets"]) - 1, len(file["lattice"]), len(file["split"])]
    lengths += [len(column) for column in _columns(file).values()]
    sites = [len(file["species"]), len(file["frac_coords"]), int(file["offsets"][-1])]
    if any(length != n for length in lengths) or any(count != m for count in sites):
        raise UserError(f"{path}: is damaged: its columns differ in length")
    for name, data in _columns(file).items():
        if data.ndim != 1 or not (data.dtype.kind in "biuf" or h5py.check_string_dtype(data.dtype)):
            raise UserError(f"{path}: is damaged: column {name} is {data.dtype} of shape {data.shape}")
    counts = np.diff(file["offsets"][:].astype(np.int64), prepend=0)
    if (counts < 0).any() or file["offsets"][0] != 0 or n * int(counts.max(initial=0)) > _PADDING * m + _SPARE:
        raise UserError(f"{path}: is damaged: its offsets do not count sites")


def _columns(file: h5py.File) -> dict[str, h5py.Dataset]:
    columns = {**_group(file, "properties"), **_group(file, "text"), "split": file["split"]}
    return {**columns, "ids": file["ids"]} if "ids" in file else columns


def _group(file: h5py.File, name: str) -> dict[str, h5py.Dataset]:
    """Columns of a group by name. A slash would nest in HDF5, so it is escaped in the file."""
    return {key.replace("%2F", "/"): data for key, data in file.get(name, {}).items()}


def _escape(name: str) -> str:
    name = _storable(name).replace("/", "%2F")
    return name if name.strip(".") else f"_{name}"  # to HDF5 dots are places, and no name is none


def _texts(values: Iterable[object]) -> np.ndarray:
    return np.array([_storable(str(value)) for value in values], dtype=object)


def _storable(text: str) -> str:
    """Without what HDF5 cannot keep: zero bytes, and halves of characters."""
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _read_column(data: h5py.Dataset, rows: slice = slice(None)) -> np.ndarray:
    return data.asstr()[rows] if h5py.check_string_dtype(data.dtype) else data[rows]


def _read_split(file: h5py.File, rows: slice = slice(None)) -> np.ndarray:
    split = file["split"][rows]
    bad = np.flatnonzero(~np.isin(split, list(SPLITS.values())))
    if len(bad):
        row = (rows.start or 0) + bad[0]
        raise UserError(f"{file.filename}: row {row + 1}: split not 0 to {len(SPLITS) - 1}; {_remedy(file)}")
    return split


def _remedy(file: h5py.File) -> str:
    return f"`cfrl data import {file.filename} -o NEW.h5` leaves such rows out"


def _read(file: h5py.File, split: str | None, start: int, stop: int | None) -> CrystalBatch:
    start, stop, _ = slice(start, stop).indices(len(file["space_group"]))
    rows = slice(start, max(start, stop))
    crystals, splits = _read_slice(file, rows), _read_split(file, rows)
    for row, reason in faults(crystals, splits).items():
        raise UserError(f"{file.filename}: row {start + row + 1}: {reason}; {_remedy(file)}")
    return crystals if split is None else crystals[torch.from_numpy(splits == split_code(split))]


def _read_slice(file: h5py.File, rows: slice) -> CrystalBatch:
    offsets = file["offsets"][rows.start : rows.stop + 1].astype(np.int64)
    sites, counts = slice(offsets[0], offsets[-1]), np.diff(offsets)
    padded = {name: to_padded(file[name][sites], counts) for name in _PER_SITE}
    return CrystalBatch(
        space_group=_integers(file["space_group"][rows]),
        wyckoff=_integers(padded["wyckoff"]),
        species=_integers(padded["species"]),
        frac_coords=torch.from_numpy(padded["frac_coords"]),
        lattice=torch.from_numpy(file["lattice"][rows].astype(padded["frac_coords"].dtype)),  # one precision
        ids=_read_column(file["ids"], rows).tolist() if "ids" in file else None,
        properties={
            k: torch.from_numpy(data[rows].astype(np.float64)) for k, data in _group(file, "properties").items()
        },
    )


def _integers(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _flatten(
    crystals: CrystalBatch, columns: Columns, split: Sequence[int] | np.ndarray | None
) -> dict[str, np.ndarray]:
    """Datasets of the schema, by path."""
    n = len(crystals)
    wyckoff = crystals.wyckoff.cpu().numpy()
    counts = (wyckoff > 0).sum(axis=1)
    datasets = {
        "offsets": np.cumsum(counts),
        "space_group": crystals.space_group.cpu().numpy().astype(np.uint8),
        "wyckoff": to_flat(wyckoff, counts).astype(np.uint8),
        "species": to_flat(crystals.species.cpu().numpy(), counts).astype(np.uint8),
        "frac_coords": to_flat(crystals.frac_coords.detach().cpu().numpy(), counts),
        "lattice": crystals.lattice.detach().cpu().numpy(),
        "split": np.zeros(n, np.uint8) if split is None else np.asarray(split, dtype=np.uint8),
    }
    if crystals.ids is not None:
        datasets["ids"] = _texts(crystals.ids)
    for name, values in {**crystals.properties, **columns}.items():
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        if values.dtype.kind in "biuf":
            datasets[f"properties/{_escape(name)}"] = values.astype(np.float64)
        else:
            datasets[f"text/{_escape(name)}"] = _texts(values)
    for name, values in datasets.items():
        if name not in _PER_SITE and len(values) != n:
            raise ValueError(f"{name} has {len(values)} values for {n} crystals")
    return datasets


def _append(file: h5py.File, datasets: Mapping[str, np.ndarray]) -> None:
    n_old = len(file["space_group"]) if "space_group" in file else 0
    n = n_old + len(datasets["space_group"])
    for name, values in datasets.items():
        if name == "offsets":
            values = values + file["offsets"][-1]
        if name not in file:
            _create(file, name, _blank(n_old, values))
        data = file[name]
        data.resize(len(data) + len(values), axis=0)
        data[len(data) - len(values) :] = values
    for data in _columns(file).values():  # those that were not given this time
        if len(data) < n:
            missing = n - len(data)
            data.resize(n, axis=0)
            data[n - missing :] = "" if h5py.check_string_dtype(data.dtype) else np.nan


def _blank(n: int, like: np.ndarray) -> np.ndarray:
    """What earlier rows hold in a column that comes later: (n, ...)."""
    blank = {"O": "", "f": np.nan}.get(like.dtype.kind, 0)
    return np.full((n, *like.shape[1:]), blank, dtype=like.dtype)


def _create(file: h5py.File, name: str, values: np.ndarray) -> None:
    file.create_dataset(
        name,
        data=values,
        dtype=_TEXT if values.dtype == object else values.dtype,
        maxshape=(None, *values.shape[1:]),
        chunks=(_CHUNK, *values.shape[1:]),
        compression="gzip",
        shuffle=True,
    )

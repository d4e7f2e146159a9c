"""Structure files, one entry at a time: CSV, CIF, POSCAR, extxyz, pymatgen JSON, results of DFT; in folders or zips.

Reading has two halves. `iter_entries` walks through files and cuts them into entries without understanding them;
`parse` turns one entry into a cell with atoms. The first is cheap and runs in one process, the second runs in many.
A file that cannot be read is a `UserError`; an entry that cannot be used is an `Unusable` with the reason.

The formats themselves are in formats/. Finding the symmetry is `crystals/analysis.py`; datasets are made in
`importing.py`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple, TextIO

from cfrl.errors import UserError
from cfrl.io.formats import ase_files, cif, extxyz, poscar, records, vasp, xml
from cfrl.io.formats.calculation import most_telling
from cfrl.io.formats.entry import Cell, Entry, Payload, Unusable, sound, stem, unpacked
from cfrl.untrusted import check_file, one_line

if TYPE_CHECKING:
    from pymatgen.core import Structure

_FREE = 64 << 20  # bytes that any compressed file may unfold into


class Limits(NamedTuple):
    """What a file may unfold into: gigabytes, and times its compressed size."""

    gigabytes: float = 4.0
    ratio: float = 200.0


# ---- files -> entries ----


def input_files(path: str | Path) -> list[Path]:
    """The files to read: the path itself, or what a folder holds, sorted by name.

    Raises:
        UserError: a path that does not exist, has an unknown ending, or a folder without a structure file.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in (*READERS, ".zip"))
        if not found:
            raise UserError(f"{path}: no structure file in this folder; known endings: {', '.join(READERS)}")
        return most_telling(found)
    check_file(path, most=1 << 60)
    if _kind(path) not in (*READERS, ".zip"):
        known = ", ".join((*READERS, ".zip", ".h5"))
        raise UserError(f"{path}: unknown kind of file; known endings: {known}, and .gz, .bz2, .xz after them")
    return [path]


def iter_entries(path: Path, strict: bool = True, limits: Limits = Limits()) -> Iterator[tuple[int, Entry]]:
    """Entries of a file, each with the number of the file's bytes that have been read so far.

    Args:
        path: one of `input_files`.
        strict: raise if the file cannot be read; otherwise it becomes one unusable entry. (Members of a zip are
            never strict: one bad file must not stop the others.)
        limits: of the file, or of each member of a zip.

    Raises:
        UserError: the file cannot be read.
    """
    if path.suffix != ".zip":
        with _open(path) as raw:
            for entry in _read(raw, str(path), strict, limits, path.stat().st_size):
                yield path.stat().st_size if raw.closed else raw.tell(), entry
        return
    done = 0
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir() and _kind(PurePath(m.filename)) in READERS]
            if not members:
                raise UserError(f"{path}: no structure file in this zip; known endings: {', '.join(READERS)}")
            told = {str(name) for name in most_telling([PurePath(m.filename) for m in members])}
            for member in (m for m in members if str(PurePath(m.filename)) in told):
                name = f"{path}/{member.filename}"
                try:
                    with archive.open(member) as raw:
                        for entry in _read(raw, name, False, limits, member.compress_size):
                            yield done, entry
                except (RuntimeError, NotImplementedError, zipfile.BadZipFile, OSError) as error:  # encrypted, damaged
                    yield done, Entry(name, 1, stem(name), "unreadable", f"{name}: cannot be read: {error}")
                done += member.compress_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{path}: cannot be read as a zip: {one_line(error)}") from error


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _kind(path: PurePath) -> str:
    """The ending that says what a file is, compression left aside; files of VASP have none."""
    name = unpacked(path)
    if name.suffix.lower() in READERS:
        return name.suffix.lower()
    return next((kind for start, kind in _NAMED.items() if name.name.startswith(start)), name.suffix.lower())


class _Limited(io.RawIOBase):
    """A stream that ends with a UserError where a file unfolds into more than it may."""

    def __init__(self, stream: BinaryIO, most: float, advice: str) -> None:
        self.stream, self.left, self.advice = stream, most, advice

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise UserError(self.advice)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.stream.close()
        super().close()


def _unfolded(raw: BinaryIO, name: str, limits: Limits, packed: int) -> BinaryIO:
    """The content of a file of `packed` bytes, no more than the limits allow."""
    suffix, most = PurePath(name).suffix, limits.gigabytes * 2**30
    stream = _DECOMPRESS[suffix](raw) if suffix in _DECOMPRESS else raw
    by_ratio = limits.ratio * packed + _FREE
    limit, setting = (by_ratio, f"max_ratio = {limits.ratio:g}") if by_ratio < most else (most, "max_file_gb")
    advice = (
        f"{name}: unfolds into more than {limit / 2**30:.3g} GB; if that is right, raise {setting} (section [data])"
    )
    return io.BufferedReader(_Limited(stream, limit, advice), 1 << 16)


def open_text(path: Path) -> TextIO:
    """A text file, compressed or not, that unfolds into no more than the usual limits.

    Raises:
        UserError: it cannot be opened; when read on, that it unfolds into too much.
    """
    raw = _open(check_file(path, most=1 << 60))
    return io.TextIOWrapper(_unfolded(raw, str(path), Limits(), path.stat().st_size), encoding="utf-8-sig", newline="")


def _read(raw: BinaryIO, name: str, strict: bool, limits: Limits, packed: int) -> Iterator[Entry]:
    path = PurePath(name)
    kind = _kind(path)
    try:
        stream = _unfolded(raw, name, limits, packed)
        with io.TextIOWrapper(stream, encoding="utf-8-sig", errors=_ERRORS.get(kind, "strict"), newline="") as text:
            yield from READERS[kind](text, name)
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        csv.Error,
        RecursionError,
        OverflowError,
        ValueError,
        UserError,
    ) as error:
        message = (
            str(error) if isinstance(error, UserError) else f"{name}: cannot be read as {kind.lstrip('.')}: {error}"
        )
        if strict:
            raise UserError(message) from error
        yield Entry(name, 1, path.stem, "unreadable", message)


_DECOMPRESS: dict[str, Callable[[BinaryIO], IO[bytes]]] = {  # by `entry.COMPRESSED`
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_ERRORS = {".cif": "replace", ".vasp": "replace", "OUTCAR": "replace"}  # their comments come in all encodings
_NAMED = {"OUTCAR": "OUTCAR", "CONTCAR": ".vasp", "POSCAR": ".vasp"}
READERS: dict[str, Callable[[TextIO, str], Iterator[Entry]]] = {
    ".csv": records.read_csv,
    ".cif": cif.read,
    ".extxyz": extxyz.read,
    ".xyz": extxyz.read,
    ".json": records.read_json,
    ".vasp": poscar.read,
    ".xml": xml.read,
    "OUTCAR": vasp.read_outcar,
    ".traj": ase_files.read_trajectory,
    ".db": ase_files.read_database,
}


# ---- entry -> cell ----


def parse(kind: str, payload: Payload) -> Cell:
    """The cell of an `Entry`.

    Raises:
        Unusable: `unparsable: ...` or `disordered: ...`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cell = _PARSERS[kind](payload)
        except Unusable:
            raise
        except Exception as error:  # third-party parsers raise anything on broken input
            raise Unusable(f"unparsable: {one_line(error)}") from error
    return sound(cell)


def to_structure(cell: Cell) -> Structure:
    """The cell as a pymatgen structure."""
    from pymatgen.core import Lattice, Structure

    return Structure(Lattice(cell.lattice), cell.numbers.tolist(), cell.frac_coords)


def _refuse(message: str) -> Cell:
    raise Unusable(
        message if message.startswith(("unparsable", "too many", "not converged")) else f"unparsable: {message}"
    )


_PARSERS: dict[str, Callable[[Payload], Cell]] = {
    "cif": cif.parse,
    "poscar": poscar.parse,
    "dict": records.parse,
    "extxyz": extxyz.parse,
    "unreadable": _refuse,
}

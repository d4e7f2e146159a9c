"""Structure files, one entry at a time: CSV, CIF, POSCAR, extxyz, pymatgen JSON; compressed, in folders or zips.

Reading has two halves. `iter_entries` walks through files and cuts them into entries without understanding them;
`parse` turns one entry into a cell with atoms. The first is cheap and runs in one process, the second runs in many.
A file that cannot be read is a `UserError`; an entry that cannot be used is an `Unusable` with the reason.

Finding the symmetry is not here: `symmetry.py`; datasets are made in `data.py`.
"""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import re
import struct
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

import numpy as np
from scipy.spatial import cKDTree

from cfrl.crystals.elements import ATOMIC_NUMBERS, SYMBOLS
from cfrl.errors import UserError
from cfrl.untrusted import check_file, one_line

if TYPE_CHECKING:
    from pymatgen.core import Structure

ID_COLUMNS = ("material_id", "mat_id", "entry_id", "id")
STRUCTURE_COLUMNS = ("cif", "structure")
MAX_ATOMS = 4000  # of one structure; 20 sites of the largest multiplicity, 192, are 3,840
_LARGEST = 1e4  # angstrom, or cells; what is farther off is a slip
_FIELD = 64 << 20  # bytes of one CSV field
_FREE = 64 << 20  # bytes that any compressed file may unfold into
_MERGE_TOLERANCE = 1e-3  # atoms closer than this (fractional) are left to pymatgen, which merges or refuses them
_IDEAL_TOLERANCE = 1e-4  # pymatgen's: coordinates so near (relatively) to 1/3 or 2/3 are those


class Unusable(Exception):
    """An entry that gives no cell with atoms; the message is `reason: detail`."""


class Limits(NamedTuple):
    """What a file may unfold into: gigabytes, and times its compressed size."""

    gigabytes: float = 4.0
    ratio: float = 200.0


class Cell(NamedTuple):
    """A crystal as it stands in a file."""

    lattice: np.ndarray  # (3, 3) rows a, b, c in angstrom
    frac_coords: np.ndarray  # (N, 3)
    numbers: np.ndarray  # (N,) atomic numbers


@dataclass
class Entry:
    """One structure of a file, not yet parsed.

    file, row: where it stands; rows count from 1.
    id: its name, "" if the file gives none.
    kind: which parser understands `payload`.
    values: further columns, numbers or strings.
    split: code of `storage.SPLITS`, -1 if the file does not say.
    """

    file: str
    row: int
    id: str
    kind: str
    payload: Any
    values: dict[str, Any] = field(default_factory=dict)
    split: int = -1


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
        return found
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
            for member in members:
                name = f"{path}/{member.filename}"
                try:
                    with archive.open(member) as raw:
                        for entry in _read(raw, name, False, limits, member.compress_size):
                            yield done, entry
                except (RuntimeError, NotImplementedError, zipfile.BadZipFile, OSError) as error:  # encrypted, damaged
                    yield done, Entry(name, 1, _stem(name), "unreadable", f"{name}: cannot be read: {error}")
                done += member.compress_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise UserError(f"{path}: cannot be read as a zip: {one_line(error)}") from error


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _kind(path: PurePath) -> str:
    """The ending that says what a file is, compression left aside."""
    return (path.with_suffix("") if path.suffix in _DECOMPRESS else path).suffix.lower()


class _Limited(io.RawIOBase):
    """A stream that ends with a UserError where a file unfolds into more than it may."""

    def __init__(self, stream: BinaryIO, most: float, advice: str) -> None:
        self.stream, self.left, self.advice = stream, most, advice

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
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
        message = str(error) if isinstance(error, UserError) else f"{name}: cannot be read as {kind[1:]}: {error}"
        if strict:
            raise UserError(message) from error
        yield Entry(name, 1, path.stem, "unreadable", message)


def _read_csv(text: TextIO, name: str) -> Iterator[Entry]:
    csv.field_size_limit(_FIELD)
    rows = csv.DictReader(text, strict=True)
    header = rows.fieldnames
    if not header:
        raise UserError(f"{name}: is empty")
    structure = next((column for column in STRUCTURE_COLUMNS if column in header), None)
    if structure is None:
        have = ", ".join(column[:40] for column in header[:12])
        raise UserError(f"{name}: has no column 'cif' (it has {have}); give the one that holds CIF text this name")
    identity = next((column for column in ID_COLUMNS if column in header), None)
    kept = [c for c in header if c not in (identity, "") and not c.startswith((structure, "cif", "Unnamed:"))]
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            payload = row[structure] or ""
            kind = "dict" if payload.lstrip().startswith("{") else "cif"
            if None in row or None in row.values():  # which field is which cannot be known
                kind, payload = "unreadable", f"unparsable: it has not the {len(header)} fields of the header"
            values = {column: row[column] or "" for column in kept}
            yield Entry(name, number, (row[identity] or "") if identity else "", kind, payload, values)
    except csv.Error as error:  # a quote that is never closed takes all that follows
        raise UserError(f"{name}: row {number + 1} cannot be read as csv: {error}; mend its quotes") from error


def _read_cif(text: TextIO, name: str) -> Iterator[Entry]:
    content = text.read()
    blocks = [block for block in re.split(r"(?m)^(?=data_)", content) if "_atom_site_fract_x" in block]
    for number, block in enumerate(blocks if len(blocks) > 1 else [content], 1):
        identity = _stem(name) if len(blocks) <= 1 else f"{_stem(name)}-{number}"
        yield Entry(name, number, identity, "cif", block)


def _read_poscar(text: TextIO, name: str) -> Iterator[Entry]:
    yield Entry(name, 1, _stem(name), "poscar", text.read())


def _read_extxyz(text: TextIO, name: str) -> Iterator[Entry]:
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
        values = _scalars({k: v for k, v in info.items() if k.lower() not in ("pbc", *ID_COLUMNS)})
        yield Entry(name, number, _identity(info), "extxyz", "".join(frame), values)
    if not number:
        raise UserError(f"{name}: is empty")


def _read_json(text: TextIO, name: str) -> Iterator[Entry]:
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
    identity = _identity(record) or (_stem(name) if alone else "")
    return Entry(name, number, identity, "dict", structure, values)


def _record_values(record: dict, structure: Any) -> dict[str, Any]:
    """Numbers and strings of a JSON record, of its `data` too; `energy_per_atom` in eV of a computed entry."""
    nested = [record, record.get("data"), structure.get("properties") if isinstance(structure, dict) else None]
    values: dict[str, Any] = {}
    for level in nested:
        values |= _scalars({k: v for k, v in (level or {}).items() if k not in ID_COLUMNS and k[:1] not in "@"})
    if isinstance(values.get("energy"), float) and isinstance(structure, dict) and structure.get("sites"):
        energy = values["energy"] + (values.get("correction") or 0.0)
        values.setdefault("energy_per_atom", energy / len(structure["sites"]))
    return values


def _scalars(mapping: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: float(v) for k, v in mapping.items() if isinstance(v, int | float | np.number | np.bool_)}
    return numbers | {k: v for k, v in mapping.items() if isinstance(v, str)}


def _identity(record: dict) -> str:
    levels = [record, record["data"]] if isinstance(record.get("data"), dict) else [record]
    return next((str(level[key]) for level in levels for key in ID_COLUMNS if level.get(key) is not None), "")


def _stem(name: str) -> str:
    path = PurePath(name)
    return (path.with_suffix("") if path.suffix in _DECOMPRESS else path).stem


_DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
_ERRORS = {".cif": "replace", ".vasp": "replace"}  # their comments come in all encodings
READERS: dict[str, Callable[[TextIO, str], Iterator[Entry]]] = {
    ".csv": _read_csv,
    ".cif": _read_cif,
    ".extxyz": _read_extxyz,
    ".xyz": _read_extxyz,
    ".json": _read_json,
    ".vasp": _read_poscar,
}


# ---- entry -> cell ----


def parse(kind: str, payload: Any) -> Cell:
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
    return _sound(cell)


def _sound(cell: Cell) -> Cell:
    """The cell, if a crystal can have it. Raises Unusable."""
    n = len(cell.numbers)
    if n > MAX_ATOMS:
        raise Unusable(f"too many atoms: {n}, at most {MAX_ATOMS} can be read")
    if n == 0 or cell.lattice.shape != (3, 3) or cell.frac_coords.shape != (n, 3):
        raise Unusable("unparsable: no atoms, or not three numbers for each")
    if not (np.isfinite(cell.lattice).all() and np.isfinite(cell.frac_coords).all()):
        raise Unusable("unparsable: a coordinate or cell length is not a finite number")
    if max(np.abs(cell.lattice).max(), np.abs(cell.frac_coords).max()) > _LARGEST:
        raise Unusable(f"unparsable: a coordinate or cell length is above {_LARGEST:,.0f}")
    if abs(np.linalg.det(cell.lattice)) < 1e-3:
        raise Unusable("unparsable: a cell without volume")
    if not (cell.numbers.min() >= 1 and cell.numbers.max() < len(SYMBOLS)):
        raise Unusable("unparsable: an atomic number is none")
    return cell


def to_structure(cell: Cell) -> Structure:
    """The cell as a pymatgen structure."""
    from pymatgen.core import Lattice, Structure

    return Structure(Lattice(cell.lattice), cell.numbers.tolist(), cell.frac_coords)


def _parse_cif(text: str) -> Cell:
    if not text.strip():
        raise Unusable("unparsable: empty")
    cell = plain_cif(text)
    if cell is not None:
        return cell
    if _ENDLESS.search(text):
        raise Unusable("unparsable: a number of more than 100 digits")
    _check_cell(text)
    from pymatgen.io.cif import CifParser

    parser = CifParser.from_str(text)
    for block in parser.as_dict().values():  # pymatgen compares every atom with every image of every other
        sites, operations = (
            max((len(block.get(key, ())) for key in keys), default=0) for keys in (_SITES, _OPERATIONS)
        )
        if sites * max(operations, 1) > 8 * MAX_ATOMS:  # some write all atoms and all operations
            raise Unusable(f"too many atoms: {sites} times {operations} operations, at most {MAX_ATOMS} can be read")
    return _from_structure(parser.parse_structures(primitive=False)[0])


def _check_cell(text: str) -> None:
    """Raises Unusable for a cell parameter of a CIF that no cell can have, or two of a name in a block that differ."""
    seen: dict[str, float] = {}
    for kind, name, number in _PARAMETER.findall(text):
        value, limit = float(number), 180.0 if kind.lower() == "angle" else _LARGEST
        if not 0 < value < limit or (seen.setdefault(name.lower(), value) != value and text.count("data_") <= 1):
            raise Unusable(f"unparsable: _cell_{kind}_{name} is {number}, or stands there twice")


_ENDLESS = re.compile(r"\d{101}")  # pymatgen's patterns take the square of its length, and more
_PARAMETER = re.compile(
    r"^[ \t]*_cell_(length|angle)_(a|b|c|alpha|beta|gamma)\s+['\"]?([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)",
    re.M | re.I,
)
_CELL = re.compile(r"^_cell_(?:length|angle)_(a|b|c|alpha|beta|gamma)[ \t]+([-+.\deE]+)[ \t\r]*$", re.M)
_SITES = ("_atom_site_label", "_atom_site_fract_x", "_atom_site_type_symbol")
_OPERATIONS = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz", "_space_group_symop.operation_xyz")
_PLAIN = re.compile(
    r"\s*(?:#.*\n)*data_\S*[ \t\r]*\n(?P<head>(?:_\S+[ \t]+(?:'[^'\n]*'|[^\s'\"]+)[ \t\r]*\n)+)"
    r"loop_\s+_symmetry_equiv_pos_site_id\s+_symmetry_equiv_pos_as_xyz\s+1\s+'x, y, z'\s+"
    r"loop_\s+_atom_site_type_symbol\s+_atom_site_label\s+_atom_site_symmetry_multiplicity\s+_atom_site_fract_x\s+"
    r"_atom_site_fract_y\s+_atom_site_fract_z\s+_atom_site_occupancy\s*\n(?P<rows>[^_#;]+)\Z"
)
_SYMBOL = re.compile(r"([A-Z][a-z]?)(?:\d*\.?\d*[+-])?$")


def plain_cif(text: str) -> Cell | None:
    """The cell of a CIF in the plain style that pymatgen writes (P 1, full occupancy), or None for any other.

    About a hundred times faster than a full parser and equal to pymatgen's, whose rounding to thirds it shares.
    """
    plain = _PLAIN.match(text)
    if plain is None:
        return None
    parameters, words = _CELL.findall(plain["head"]), plain["rows"].split()
    symbols = [_SYMBOL.match(word) for word in words[0::7]]
    if len(symbols) > MAX_ATOMS:
        raise Unusable(f"too many atoms: {len(symbols)}, at most {MAX_ATOMS} can be read")
    if len(words) % 7 or not all(symbol and symbol[1] in ATOMIC_NUMBERS for symbol in symbols):
        return None
    try:
        named = {name: float(number) for name, number in parameters}
        a, b, c, alpha, beta, gamma = (named[name] for name in ("a", "b", "c", "alpha", "beta", "gamma"))
        lattice = lattice_from_parameters(a, b, c, alpha, beta, gamma)
        frac = np.array([words[3::7], words[4::7], words[5::7]], dtype=np.float64).T
        ordered = all(float(occupancy) == 1.0 for occupancy in words[6::7])
    except (ValueError, KeyError):
        return None
    if len(parameters) != 6 or min(named.values()) <= 0 or max(alpha, beta, gamma) >= 180:
        return None
    for third in (1 / 3, 2 / 3):
        frac[np.abs(frac / third - 1) <= _IDEAL_TOLERANCE] = third
    if not (np.abs(frac) < _LARGEST).all():
        return None
    apart = not cKDTree(frac % 1 % 1, boxsize=1).query_pairs(_MERGE_TOLERANCE, p=np.inf)  # -1e-18 % 1 is 1
    numbers = np.array([ATOMIC_NUMBERS[symbol[1]] for symbol in symbols])
    return Cell(lattice, frac, numbers) if ordered and apart else None


def lattice_from_parameters(a: float, b: float, c: float, alpha: float, beta: float, gamma: float) -> np.ndarray:
    """Rows a, b, c (3, 3), c along z, of lengths in angstrom and angles in degrees (pymatgen's orientation)."""
    cos_alpha, cos_beta, cos_gamma = np.cos(np.radians([alpha, beta, gamma]))
    sin_alpha, sin_beta = np.sin(np.radians([alpha, beta]))
    cos_star = np.clip((cos_alpha * cos_beta - cos_gamma) / (sin_alpha * sin_beta), -1, 1)
    sin_star = np.sqrt(1 - cos_star**2)
    return np.array(
        [
            [a * sin_beta, 0.0, a * cos_beta],
            [-b * sin_alpha * cos_star, b * sin_alpha * sin_star, b * cos_alpha],
            [0.0, 0.0, c],
        ]
    )


def _parse_poscar(text: str) -> Cell:
    from pymatgen.core import Structure

    counts = [int(word) for line in text.splitlines()[5:7] for word in line.split() if word.isdecimal()]
    if sum(counts) > MAX_ATOMS:
        raise Unusable(f"too many atoms: {sum(counts)}, at most {MAX_ATOMS} can be read")
    return _from_structure(Structure.from_str(text, fmt="poscar"))


def _parse_dict(payload: dict | str | None) -> Cell:
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
    if len(payload["sites"]) > MAX_ATOMS:
        raise Unusable(f"too many atoms: {len(payload['sites'])}, at most {MAX_ATOMS} can be read")
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


def _parse_extxyz(text: str) -> Cell:
    from ase.io import read

    atoms = read(io.StringIO(text), format="extxyz")
    if not atoms.pbc.all():
        raise Unusable("unparsable: not periodic in three directions")
    return Cell(atoms.cell.array, atoms.get_scaled_positions(), atoms.numbers)


def _from_structure(structure: Structure) -> Cell:
    if not structure.is_ordered:
        raise Unusable("disordered: a site is shared or partly occupied")
    symbols = [getattr(site.specie, "symbol", "?") for site in structure]
    unknown = [symbol for symbol in symbols if symbol not in ATOMIC_NUMBERS]
    if unknown:
        raise Unusable(f"unparsable: {unknown[0]} is not an element")
    numbers = np.array([ATOMIC_NUMBERS[symbol] for symbol in symbols])
    return Cell(structure.lattice.matrix, structure.frac_coords, numbers)


def _refuse(message: str) -> Cell:
    raise Unusable(message if message.startswith(("unparsable", "too many")) else f"unparsable: {message}")


_PARSERS: dict[str, Callable[[Any], Cell]] = {
    "cif": _parse_cif,
    "poscar": _parse_poscar,
    "dict": _parse_dict,
    "extxyz": _parse_extxyz,
    "unreadable": _refuse,
}

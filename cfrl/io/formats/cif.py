"""CIF: blocks of a text, each parsed by pymatgen, or about a hundred times faster where pymatgen had written it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from cfrl.crystals.elements import ATOMIC_NUMBERS
from cfrl.io.formats.entry import LARGEST, MAX_ATOMS, Cell, Entry, Unusable, from_structure, refuse_many_atoms, stem

_MERGE_TOLERANCE = 1e-3  # atoms closer than this (fractional) are left to pymatgen, which merges or refuses them
_IDEAL_TOLERANCE = 1e-4  # pymatgen's: coordinates so near (relatively) to 1/3 or 2/3 are those
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


def read(text: TextIO, name: str) -> Iterator[Entry]:
    """An entry for each block with atoms."""
    content = text.read()
    blocks = [block for block in re.split(r"(?m)^(?=data_)", content) if "_atom_site_fract_x" in block]
    for number, block in enumerate(blocks if len(blocks) > 1 else [content], 1):
        identity = stem(name) if len(blocks) <= 1 else f"{stem(name)}-{number}"
        yield Entry(name, number, identity, "cif", block)


def parse(text: str) -> Cell:
    """The cell of one block."""
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
    return from_structure(parser.parse_structures(primitive=False)[0])


def _check_cell(text: str) -> None:
    """Raises Unusable for a cell parameter of a CIF that no cell can have, or two of a name in a block that differ."""
    seen: dict[str, float] = {}
    for kind, name, number in _PARAMETER.findall(text):
        value, limit = float(number), 180.0 if kind.lower() == "angle" else LARGEST
        if not 0 < value < limit or (seen.setdefault(name.lower(), value) != value and text.count("data_") <= 1):
            raise Unusable(f"unparsable: _cell_{kind}_{name} is {number}, or stands there twice")


def plain_cif(text: str) -> Cell | None:
    """The cell of a CIF in the plain style that pymatgen writes (P 1, full occupancy), or None for any other.

    About a hundred times faster than a full parser and equal to pymatgen's, whose rounding to thirds it shares.
    """
    plain = _PLAIN.match(text)
    if plain is None:
        return None
    parameters, words = _CELL.findall(plain["head"]), plain["rows"].split()
    symbols = [_SYMBOL.match(word) for word in words[0::7]]
    refuse_many_atoms(len(symbols))
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
    if not (np.abs(frac) < LARGEST).all():
        return None
    from scipy.spatial import cKDTree  # here, because models are trained where scipy is not

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

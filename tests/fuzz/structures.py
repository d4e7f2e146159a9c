"""Structure files: import and screening. The oracle is pymatgen's own reading (ase's of extxyz) of each entry."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from pymatgen.core import Lattice, Structure

from cfrl.io import readers
from cfrl.io.formats.entry import Unusable
from cfrl.screening.inputs import read_samples
from tests.fuzz import seeds
from tests.fuzz.cases import Case, damaged, garbled

PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = seeds.texts()
_LENGTH = 0.01  # angstrom, and degrees; coarser than any rounding, finer than any wrong reading


def case(rng: random.Random) -> Case:
    """A damaged file, or one of the absurd ones."""
    name = _absurd(rng) if rng.random() < 0.15 else _damaged(rng)
    if rng.random() < 0.2:
        return Case(lambda: read_samples(name), [name], check=lambda: problem(Path(name)))
    words = ["data", "import", name, "-o", "out.h5", "--workers", "1", "--validation", "0", "--max-file-gb", "0.01"]
    return Case(words, [name], check=lambda: stored_problem(Path("out.h5")) or problem(Path(name)) or _kept(Path(name)))


def _damaged(rng: random.Random) -> str:
    name = rng.choice(list(TEXTS))
    text = TEXTS[name]
    if name.endswith(".json") and rng.random() < 0.5:
        document = json.loads(text)
        for _ in range(rng.choice((1, 1, 3))):
            _swap_leaf(rng, document)
        text = json.dumps(document)
    elif rng.random() < 0.9:
        text = garbled(rng, text)
    data = text.encode("utf-8", "surrogateescape")
    if rng.random() < 0.15:
        data = damaged(rng, data)
    if rng.random() < 0.2:
        ending, pack = rng.choice(list(PACKED.items()))
        data, name = pack(data), name + ending
        data = damaged(rng, data) if rng.random() < 0.5 else data
    elif rng.random() < 0.15:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as archive:
            for inner in (name, "sound.cif"):
                archive.writestr(inner, data if inner == name else TEXTS["plain0.cif"])
        data, name = packed.getvalue(), "many.zip"
        data = damaged(rng, data) if rng.random() < 0.6 else data
    Path(name).write_bytes(data)
    return name


def _swap_leaf(rng: random.Random, document: Any) -> None:
    """Another value, or none, somewhere in JSON."""
    while isinstance(document, dict | list) and document:
        key = rng.choice(list(document) if isinstance(document, dict) else range(len(document)))
        if not (isinstance(document[key], dict | list) and document[key]) or rng.random() < 0.1:
            values = (None, float("nan"), float("inf"), -1, 0, 1e308, 10**30, "", "Qq", [], {}, [[]], True, 1.5)
            document[key] = rng.choice(values)
            return
        document = document[key]


def _absurd(rng: random.Random) -> str:
    """Files that aim at sizes, orders of keys, other kinds of files, libraries that hang."""
    plain = TEXTS[f"plain{rng.randrange(len(seeds.structures()))}.cif"]
    match rng.randrange(13):
        case 0:  # cell parameters in another order: they count by name
            lines = re.findall(r"_cell_(?:length|angle).*\n", plain)
            shuffled = lines[:]
            rng.shuffle(shuffled)
            return _write("order.cif", plain.replace("".join(lines), "".join(shuffled)))
        case 1:
            return _write("missing.cif", re.sub(rf"_cell_\w+_{rng.choice(('a', 'b', 'beta'))}\s.*\n", "", plain))
        case 2:
            parameter = rng.choice(("length_a", "length_b", "angle_alpha", "angle_gamma"))
            value = rng.choice(("nan", "-5", "0", "1e-5", "5000", "1e9", "179.999", "180", "360", "1e400", "0.3"))
            return _write("odd.cif", re.sub(rf"_cell_{parameter}\s+\S+", f"_cell_{parameter} {value}", plain))
        case 3:  # a needle, or a plate
            thin = 10 ** rng.uniform(-3, 1)
            structure = Structure(
                np.diag([thin, 10 ** rng.uniform(-2, 2), 10 ** rng.uniform(0, 3.9)])
                + np.tril(rng.uniform(-1, 1) * np.ones((3, 3)), -1),
                ["Si", "C"],
                [[0, 0, 0], [rng.random(), rng.random(), rng.random()]],
                to_unit_cell=False,
            )
            return _write("needle.vasp", structure.to(fmt="poscar"))
        case 4:
            atoms = rng.choice((900, 4000, 4001, 12000))
            rows = "".join(
                f"  H  H{i}  1  {rng.random():.5f}  {rng.random():.5f}  {rng.random():.5f}  1\n" for i in range(atoms)
            )
            head = plain[: plain.index("_atom_site_occupancy\n") + len("_atom_site_occupancy\n")]
            return _write("many.cif", re.sub(r"(_cell_length_\w+)\s+\S+", r"\1 90", head) + rows)
        case 5:
            count = rng.choice(("99999999999", "4001", "-3", "0", "1e3", "3.0", "٣", " 8 ", "8" * 400))
            return _write("count.extxyz", TEXTS["frames.extxyz"].replace("8\n", f"{count}\n", 1))
        case 6:
            content = b"data_x\n" + b"\0" * (rng.choice((1, 12, 20)) << 20)
            name, pack = rng.choice(
                (("bomb.cif.gz", PACKED[".gz"]), ("bomb.cif.xz", lambda b: lzma.compress(b, preset=0)))
            )
            Path(name).write_bytes(pack(content))
            return name
        case 7:
            os.symlink("/dev/zero", "zero.cif")
            return "zero.cif"
        case 8:
            os.mkfifo("pipe.cif")
            return "pipe.cif"
        case 9:
            depth = rng.choice((100, 5000, 200_000))
            opening, closing = rng.choice((("[", "]"), ('{"structure":', "}")))
            return _write("deep.json", opening * depth + "1" + closing * depth)
        case 10:
            Path("folder.cif").mkdir()
            return "folder.cif"
        case 11:
            operations = "".join(f"  {i}  'x, y, z+{i / 50000}'\n" for i in range(1, rng.choice((200, 3000))))
            return _write("operations.cif", plain.replace("  1  'x, y, z'\n", operations))
        case _:
            return _write("nothing" + rng.choice((".cif", ".csv", ".json", ".vasp", ".zip", ".extxyz", ".cif.gz")), "")


def _write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8", errors="surrogateescape")
    return name


# ---- oracles -----------------------------------------------------------------------------------------------------


def problem(path: Path) -> str:
    """What the readers make of each entry, against another reading of the same text."""
    if path.is_dir():
        return ""
    for _, entry in readers.iter_entries(path):
        try:
            cell = readers.parse(entry.kind, entry.payload)
        except Unusable:
            continue
        place = f"{path} row {entry.row}"
        if not (np.isfinite(cell.lattice).all() and np.isfinite(cell.frac_coords).all()):
            return f"{place}: a cell of {cell.lattice.tolist()}"
        if cell.numbers.min() < 1 or cell.numbers.max() > 118:
            return f"{place}: atomic numbers {cell.numbers.tolist()}"
        try:
            others = _others(entry.kind, entry.payload)
        except Exception as error:
            return f"{place}: accepted, but another reader says {type(error).__name__}: {error}"
        ours = readers.to_structure(cell)
        if not any(_same(ours, other) for other in others):
            return f"{place}: {_told(ours)}, but another reader sees {[_told(other) for other in others]}"
    return ""


def _cif(text: str) -> list[Structure]:
    """By pymatgen, or where that stumbles over a sound file, by ase."""
    from ase.io.cif import read_cif
    from pymatgen.io.ase import AseAtomsAdaptor
    from pymatgen.io.cif import CifParser

    try:
        return CifParser.from_str(text).parse_structures(primitive=False)
    except Exception:
        return [AseAtomsAdaptor.get_structure(read_cif(io.BytesIO(text.encode()), index=0))]


def _others(kind: str, payload: Any) -> list[Structure]:
    """The structures in a text, as pymatgen or ase read it."""
    from pymatgen.io.ase import AseAtomsAdaptor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "cif":
            return _cif(payload)
        if kind == "poscar":
            return [Structure.from_str(payload, fmt="poscar")]
        if kind == "extxyz":
            from ase.io import read

            return [AseAtomsAdaptor.get_structure(read(io.StringIO(payload), format="extxyz"))]
        read = json.loads(payload) if isinstance(payload, str) else payload
        symbols = [site["species"][0]["element"] for site in read["sites"]]
        return [Structure(Lattice(read["lattice"]["matrix"]), symbols, [site["abc"] for site in read["sites"]])]


def _same(ours: Structure, theirs: Structure) -> bool:
    return (
        ours.composition.element_composition.almost_equals(theirs.composition.element_composition)
        and np.abs(np.subtract(ours.lattice.parameters, theirs.lattice.parameters)).max() < _LENGTH
    )


def _told(structure: Structure) -> str:
    return f"{structure.formula} in {np.round(structure.lattice.parameters, 3).tolist()}"


def stored_problem(path: Path, drawn: bool = False) -> str:
    """Numbers that no crystal has, in a dataset; read with h5py alone. What was `drawn` may have impossible cells."""
    with h5py.File(path) as file:
        data = {
            name: file[name][:] for name in ("space_group", "species", "wyckoff", "lattice", "frac_coords", "split")
        }
        counts = np.diff(file["offsets"][:].astype(int))
        infinite = [name for name, values in file.get("properties", {}).items() if np.isinf(values[:]).any()]
    n = len(data["space_group"])
    ranges = {"space_group": (1, 230), "species": (1, 118), "wyckoff": (1, 27), "split": (0, 2)}
    for name, (low, high) in ranges.items():
        if ((data[name] < low) | (data[name] > high)).any():
            return f"stored {name} from {data[name].min()} to {data[name].max()}"
    if not (np.isfinite(data["frac_coords"]).all() and np.isfinite(data["lattice"]).all()):
        return "stored a cell or coordinates that are not finite"
    if not drawn and not ((data["lattice"] > 0) & (data["lattice"] <= [[1e4] * 3 + [180] * 3])).all():
        return "stored a cell that no crystal has"
    if len(counts) != n or (counts < 1).any():
        return "stored a crystal without sites"
    return f"stored infinite {infinite[0]}" if infinite else ""


def _kept(path: Path) -> str:
    """Composition and volume of the imported crystals, where the file holds one: all the way to the dataset."""
    if path.suffix not in (".cif", ".vasp"):
        return ""
    entries = [entry for _, entry in readers.iter_entries(path)]
    with h5py.File("out.h5") as file:
        if len(entries) != 1 or len(file["space_group"]) != 1:
            return ""
    from cfrl.io.storage import read_crystals

    ours = read_crystals("out.h5").to_structures()[0]
    for theirs in _others(entries[0].kind, entries[0].payload):
        volumes = [s.volume / len(s) for s in (ours, theirs)]
        same = ours.composition.reduced_formula == theirs.composition.element_composition.reduced_formula
        if same and abs(volumes[0] / volumes[1] - 1) < 0.05:
            return ""
    return f"{path}: stored as {_told(ours)}, but it is {_told(theirs)}"

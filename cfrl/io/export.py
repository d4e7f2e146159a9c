"""Crystals out to the files of the field, by the ending of the name. The way in is readers.py."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfrl.crystals.crystal import CrystalBatch, reduced_formula
from cfrl.errors import UserError
from cfrl.files import atomic_file, check_writable, write_problem
from cfrl.io.storage import write_crystals

if TYPE_CHECKING:
    from pymatgen.core import Structure

ENDINGS = ".h5, .csv, .extxyz, .json, .cif, .vasp (one crystal), .zip (of CIFs) or a folder (of CIFs)"
Columns = Mapping[str, Sequence[float | str]]


def export_crystals(crystals: CrystalBatch, path: str | Path, attrs: dict[str, str] | None = None) -> Path:
    """Writes crystals by the ending of the name, see `ENDINGS`. Returns the path.

    Properties go along in .h5, .csv, .extxyz and .json. `attrs` are kept in HDF5 only.

    Raises:
        UserError: an ending that is none of these, a folder that is not empty, or nowhere to write.
    """
    path = Path(path)
    check_output(path)
    if path.suffix == ".h5":
        write_crystals(path, crystals, attrs=attrs)
        return path
    numbers = {name: values.tolist() for name, values in crystals.properties.items()}
    columns = {"space_group": crystals.space_group.tolist(), **numbers}
    return _write(crystals.to_structures(), crystals.ids, columns, path)


def export_structures(
    structures: Sequence[Structure],
    ids: Sequence[str],
    path: str | Path,
    cell: str = "as-is",
    symprec: float = 0.01,
    columns: Columns | None = None,
) -> tuple[Path, list[tuple[str, str]]]:
    """Writes pymatgen structures likewise, CIFs and datasets with the symmetry that is found.

    Args:
        ids: names, as many.
        cell: "as-is", or the standard "conventional" or "primitive" one.
        symprec: angstrom.
        columns: name -> values that go along.

    Returns:
        The path, and what had to be left out: (name, reason).

    Raises:
        UserError: as `export_crystals`.
    """
    path, columns, dropped = Path(path), dict(columns or {}), {}
    check_output(path)
    kept = [_in_cell(row, structure, cell, symprec, dropped) for row, structure in enumerate(structures)]
    rows = [row for row, structure in enumerate(kept) if structure is not None]
    kept, names = [kept[row] for row in rows], [ids[row] for row in rows]
    columns = {name: [values[row] for row in rows] for name, values in columns.items()}
    if path.suffix == ".h5":
        off: dict[int, str] = {}
        crystals = CrystalBatch.from_structures(kept, symprec, names, errors="skip", dropped=off)
        sound = [i for i in range(len(kept)) if i not in off]
        write_crystals(path, crystals, columns={k: [v[i] for i in sound] for k, v in columns.items()})
        dropped |= {rows[i]: reason for i, reason in off.items()}
    else:
        _write(kept, names, columns, path, symprec)
    return path, [(ids[row], reason) for row, reason in sorted(dropped.items())]


def check_output(path: str | Path, count: int = 1) -> None:
    """Fail before there are `count` crystals to write. Raises as `export_crystals`."""
    path = Path(path)
    if path.suffix == ".vasp" and count != 1:
        raise UserError(f"{path}: a .vasp file holds one crystal, and there are {count}; try a folder")
    if path.suffix not in (".h5", "", *_WRITERS):
        raise UserError(f"{path}: cannot tell the format from '{path.suffix}'; write to {ENDINGS}")
    if path.suffix:
        check_writable(path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; name another one")


def _in_cell(row: int, structure: Structure, cell: str, symprec: float, dropped: dict[int, str]) -> Structure | None:
    if cell == "as-is":
        return structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    try:
        analyzer = SpacegroupAnalyzer(structure, symprec)
        if cell == "primitive":
            return analyzer.get_primitive_standard_structure()
        return analyzer.get_conventional_standard_structure()
    except Exception as error:  # spglib's, and pymatgen's of several kinds
        dropped[row] = f"no symmetry found: {error}"
        return None


def _write(
    structures: Sequence[Structure],
    ids: Sequence[str] | None,
    columns: Columns,
    path: Path,
    symprec: float | None = None,
) -> Path:
    check_output(path, len(structures))
    if path.suffix:
        with atomic_file(path) as temporary:
            _WRITERS[path.suffix](structures, _names(structures, ids), columns, temporary, symprec)
    else:
        _write_folder(structures, _names(structures, ids), path, symprec)
    return path


def _write_csv(
    structures: Sequence[Structure], names: list[str], columns: Columns, path: Path, symprec: float | None
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["material_id", "formula", *columns, "cif"])
        cifs = cif_texts(structures, symprec)
        for row in zip(names, map(_formula, structures), *columns.values(), cifs, strict=True):
            writer.writerow(row)


def _write_extxyz(
    structures: Sequence[Structure], names: list[str], columns: Columns, path: Path, symprec: float | None
) -> None:
    import ase.io
    from pymatgen.io.ase import AseAtomsAdaptor

    images = [AseAtomsAdaptor.get_atoms(structure, msonable=False) for structure in structures]
    for i, (atoms, name) in enumerate(zip(images, names, strict=True)):
        atoms.calc = None
        atoms.info = {"id": name} | {key: values[i] for key, values in columns.items()}
    ase.io.write(path, images, format="extxyz")


def _write_json(
    structures: Sequence[Structure], names: list[str], columns: Columns, path: Path, symprec: float | None
) -> None:
    records = [
        {"material_id": name, **{key: values[i] for key, values in columns.items()}, "structure": structure.as_dict()}
        for i, (name, structure) in enumerate(zip(names, structures, strict=True))
    ]
    path.write_text(json.dumps(records, default=float) + "\n", encoding="utf-8")


def _write_cif(
    structures: Sequence[Structure], names: list[str], columns: Columns, path: Path, symprec: float | None
) -> None:
    blocks = (
        cif.replace(cif[cif.index("data_") :].partition("\n")[0], f"data_{name}", 1)
        for name, cif in zip(names, cif_texts(structures, symprec), strict=True)
    )
    path.write_text("\n".join(blocks), encoding="utf-8")


def _write_poscar(
    structures: Sequence[Structure], names: list[str], columns: Columns, path: Path, symprec: float | None
) -> None:
    path.write_text(structures[0].to(fmt="poscar"), encoding="utf-8")


def _write_zip(
    structures: Sequence[Structure], names: list[str], columns: Columns, path: Path, symprec: float | None
) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, cif in zip(names, cif_texts(structures, symprec), strict=True):
            archive.writestr(f"{name}.cif", cif)


_WRITERS: dict[str, Callable[..., None]] = {
    ".csv": _write_csv,
    ".extxyz": _write_extxyz,
    ".json": _write_json,
    ".cif": _write_cif,
    ".vasp": _write_poscar,
    ".zip": _write_zip,
}


def _write_folder(structures: Sequence[Structure], names: list[str], path: Path, symprec: float | None) -> None:
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, cif in zip(names, cif_texts(structures, symprec), strict=True):
            (partial / f"{name}.cif").write_text(cif, encoding="utf-8")
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(write_problem(path, error)) from error


def _formula(structure: Structure) -> str:
    numbers = [site.specie.Z for site in structure]
    return reduced_formula(numbers, [1] * len(numbers))


def _names(structures: Sequence[Structure], ids: Sequence[str] | None) -> list[str]:
    """Ids fit for file names, unique."""
    width = len(str(max(len(structures) - 1, 0)))
    if ids is None or len(set(ids)) < len(structures):
        return [f"{i:0{width}d}-{_formula(structure)}" for i, structure in enumerate(structures)]
    return ["".join(c if c.isalnum() or c in "-_.+" else "_" for c in name) for name in ids]


def cif_texts(structures: Sequence[Structure], symprec: float | None) -> Iterator[str]:
    """A CIF of each, with the symmetry where it is looked for and found, else with all atoms of the cell."""
    from pymatgen.io.cif import CifWriter

    for structure in structures:
        try:
            yield str(CifWriter(structure, symprec=symprec))
        except Exception:  # spglib finds none
            yield str(CifWriter(structure))

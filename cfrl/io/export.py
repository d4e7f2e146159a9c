"""Crystals out to the files of the field, by the ending of the name. The way in is data.py."""

from __future__ import annotations

import csv
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.files import atomic_file, check_writable, write_problem
from cfrl.io.storage import write_crystals

ENDINGS = ".h5, .csv, .extxyz, .zip (of CIFs) or a folder (of CIFs)"


def export_crystals(crystals: CrystalBatch, path: str | Path, attrs: dict[str, str] | None = None) -> Path:
    """Writes crystals as .h5, .csv (with a `cif` column), .extxyz, or CIFs in a .zip or a folder.

    Properties go along, but for CIFs. `attrs` are kept in HDF5 only. Returns the path.

    Raises:
        UserError: an ending that is none of these, a folder that is not empty, or nowhere to write.
    """
    path = Path(path)
    check_output(path)
    write = {".csv": _write_csv, ".extxyz": _write_extxyz, ".zip": _write_zip}
    if path.suffix == ".h5":
        write_crystals(path, crystals, attrs=attrs)
    elif path.suffix:
        with atomic_file(path) as temporary:
            write[path.suffix](crystals, temporary)
    else:
        _write_folder(crystals, path)
    return path


def check_output(path: str | Path) -> None:
    """Fail before there are crystals to write. Raises as `export_crystals`."""
    path = Path(path)
    if path.suffix not in (".h5", ".csv", ".extxyz", ".zip", ""):
        raise UserError(f"{path}: cannot tell the format from '{path.suffix}'; write to {ENDINGS}")
    if path.suffix:
        check_writable(path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; name another one")


def _write_csv(crystals: CrystalBatch, path: Path) -> None:
    names = list(crystals.properties)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["material_id", "formula", "space_group", *names, "cif"])
        rows = zip(_names(crystals), crystals.formulas(), crystals.space_group.tolist(), strict=True)
        for i, (row, cif) in enumerate(zip(rows, _cifs(crystals), strict=True)):
            writer.writerow([*row, *(float(crystals.properties[name][i]) for name in names), cif])


def _write_extxyz(crystals: CrystalBatch, path: Path) -> None:
    import ase.io

    images = crystals.to_atoms()
    for i, (atoms, name) in enumerate(zip(images, _names(crystals), strict=True)):
        atoms.info = {"id": name, "space_group": int(crystals.space_group[i])}
        atoms.info |= {key: float(values[i]) for key, values in crystals.properties.items()}
    ase.io.write(path, images, format="extxyz")


def _write_zip(crystals: CrystalBatch, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, cif in zip(_names(crystals), _cifs(crystals), strict=True):
            archive.writestr(f"{name}.cif", cif)


def _write_folder(crystals: CrystalBatch, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for name, cif in zip(_names(crystals), _cifs(crystals), strict=True):
            (partial / f"{name}.cif").write_text(cif, encoding="utf-8")
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(write_problem(path, error)) from error


def _names(crystals: CrystalBatch) -> list[str]:
    """Ids fit for file names, unique."""
    width = len(str(max(len(crystals) - 1, 0)))
    numbered = [f"{i:0{width}d}-{formula}" for i, formula in enumerate(crystals.formulas())]
    if crystals.ids is None or len(set(crystals.ids)) < len(crystals):
        return numbered
    return ["".join(c if c.isalnum() or c in "-_.+" else "_" for c in name) for name in crystals.ids]


def _cifs(crystals: CrystalBatch) -> Iterator[str]:
    from pymatgen.io.cif import CifWriter

    for structure in crystals.to_structures():
        yield str(CifWriter(structure))

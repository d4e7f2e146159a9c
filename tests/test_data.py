"""Datasets: every format gives the same crystals, a bad row costs nothing else, a kill leaves no half file."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from cfrl.commands import data as commands
from cfrl.config import DataConfig
from cfrl.crystals.conversion import from_units
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io import catalogue, fetch, importing, readers, storage
from cfrl.io import datasets as data
from cfrl.io.formats import cif
from cfrl.io.formats.entry import Cell, Unusable
from cfrl.io.splits import assign_splits

ONE = DataConfig(workers=1)


def assigned(crystals, options):
    return assign_splits(crystals, options.validation, options.test, options.split_by, options.seed)


@pytest.fixture(scope="session")
def structures():
    """The first sixty of pymatgen's prototypes: real crystals that every installation has."""
    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

    return [prototype["snl"].structure for prototype in AFLOW_PROTOTYPE_LIBRARY[:60]]


@pytest.fixture(scope="session")
def cifs(structures):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [structure.to(fmt="cif") for structure in structures]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests keep out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Path(os.environ["CFRL_CACHE"])


def write_csv(path: Path, rows: list[dict], opener=open) -> Path:
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def atoms_of(cell: Cell) -> np.ndarray:
    """Atoms in an order of their own: (N, 4) number and wrapped coordinates."""
    rows = np.column_stack([cell.numbers, np.mod(cell.frac_coords, 1)])
    return rows[np.lexsort(rows.T[::-1])]


def same_crystals(a: CrystalBatch, b: CrystalBatch, tolerance: float = 2e-4) -> None:
    assert a.space_group.tolist() == b.space_group.tolist()
    assert a.formulas() == b.formulas()
    assert a.num_atoms.tolist() == b.num_atoms.tolist()
    assert torch.allclose(a.volumes(), b.volumes(), rtol=tolerance)


# ---- reading ----


def assert_as_pymatgen(text: str) -> None:
    from pymatgen.core import Structure

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structure = Structure.from_str(text, fmt="cif")
    cell = cif.plain_cif(text)
    assert cell is not None
    np.testing.assert_allclose(cell.lattice, structure.lattice.matrix, rtol=0, atol=1e-12)
    theirs = Cell(structure.lattice.matrix, structure.frac_coords, np.array(structure.atomic_numbers))
    assert np.array_equal(atoms_of(cell), atoms_of(theirs))


def test_plain_cif_is_exact(cifs):
    for text in cifs[:30]:
        assert_as_pymatgen(text)


def test_plain_cif_is_exact_on_real_rows(shared):
    for name in ("mp_20", "mpts_52", "mixed_databases"):
        entries = [entry for _, entry in readers.iter_entries(shared / "data" / f"{name}.csv.gz")]
        for entry in random.Random(0).sample(entries, 15):
            assert_as_pymatgen(entry.payload)


def test_plain_cif_reads_ions():
    from pymatgen.core import Lattice, Structure

    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    cell = cif.plain_cif(salt.to(fmt="cif"))
    if cell is not None:  # pymatgen writes ions with a loop of oxidation numbers before the atoms
        assert sorted(cell.numbers.tolist()) == [11] * 4 + [17] * 4
    assert sorted(readers.parse("cif", salt.to(fmt="cif")).numbers.tolist()) == [11] * 4 + [17] * 4


def edit(text: str, old: str, new: str) -> str:
    assert len(re.findall(old, text)) >= 1
    return re.sub(old, new, text, count=1)


def test_anything_unusual_goes_to_the_full_parser(structures, cifs):
    plain = next(text for text, s in zip(cifs, structures, strict=True) if len(s) >= 4)
    assert cif.plain_cif(plain) is not None
    last_row = plain.rstrip().splitlines()[-1]
    unusual = {
        "occupancy": plain.replace(last_row, re.sub(r"\S+$", "0.5", last_row)),
        "uncertainty": edit(plain, r"(_cell_length_a\s+\S+)", r"\1(3)"),
        "operation": edit(plain, r"'x, y, z'", "'x, y, z'\n  2  '-x, -y, -z'"),
        "two blocks": plain + plain,
        "coincident atoms": plain.rstrip() + "\n" + last_row + "\n",
        "label": plain.replace(last_row, "  D" + last_row.lstrip().split(maxsplit=1)[1].join(["  ", ""])),
        "comment": plain + "# the end\n",
        "no cell": edit(plain, r"_cell_length_b.*\n", ""),
        "missing value": plain.replace(last_row, last_row.rsplit(maxsplit=1)[0]),
    }
    for name, text in unusual.items():
        assert cif.plain_cif(text) is None, name
    with pytest.raises(Unusable, match="disordered: a site is shared or partly occupied"):
        readers.parse("cif", unusual["occupancy"])


def test_cif_with_symmetry_operations(structures, cifs):
    """The full parser expands the operations to the same crystal."""
    from pymatgen.io.cif import CifWriter

    rows = []
    for structure in structures[:8]:
        text = str(CifWriter(structure, symprec=0.01))
        assert cif.plain_cif(text) is None
        rows.append(readers.parse("cif", text))
    units = [importing.analyse(*row) for row in rows]
    same_crystals(from_units(units), CrystalBatch.from_structures(structures[:8]), 1e-3)


def test_lattice_parameters():
    from pymatgen.core import Lattice

    rng = np.random.default_rng(0)
    for _ in range(50):
        parameters = (*rng.uniform(2, 20, 3), *rng.uniform(70, 110, 3))
        expected = Lattice.from_parameters(*parameters).matrix
        np.testing.assert_allclose(cif.lattice_from_parameters(*parameters), expected, atol=1e-12)


@pytest.fixture(scope="session")
def formats(tmp_path_factory, structures, cifs):
    """The same twelve crystals in every way that they may come."""
    from pymatgen.entries.computed_entries import ComputedStructureEntry
    from pymatgen.io.ase import AseAtomsAdaptor

    folder, chosen = tmp_path_factory.mktemp("formats"), range(0, 60, 5)
    dicts = [structures[i].as_dict() for i in chosen]
    rows = [{"material_id": f"m-{i}", "band_gap": i / 10, "cif": cifs[i]} for i in chosen]
    write_csv(folder / "a.csv", rows)
    write_csv(folder / "b.csv.gz", rows, gzip.open)
    write_csv(
        folder / "python.csv",
        [{"id": row["material_id"], "structure": str(d)} for row, d in zip(rows, dicts, strict=True)],
    )
    write_csv(folder / "json.csv", [{"structure": json.dumps(d)} for d in dicts])
    for name in ("folder", "poscars"):
        (folder / name).mkdir()
    with zipfile.ZipFile(folder / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, i in enumerate(chosen):
            (folder / "folder" / f"{number:03d}.cif").write_text(cifs[i])
            archive.writestr(f"inner/{number:03d}.cif", cifs[i])
            (folder / "poscars" / f"{number:03d}.vasp").write_text(structures[i].to(fmt="poscar"))
        archive.writestr("inner/notes.txt", "not a structure")
    (folder / "folder" / "README").write_text("not a structure")
    (folder / "many.cif").write_text("\n".join(cifs[i] for i in chosen))
    (folder / "list.json").write_text(json.dumps(dicts))
    (folder / "entries.json").write_text(
        json.dumps(
            {"entries": [ComputedStructureEntry(structures[i], -3.0 * len(structures[i])).as_dict() for i in chosen]}
        )
    )
    with gzip.open(folder / "records.json.gz", "wt") as file:
        json.dump(
            [{"material_id": f"m-{i}", "structure": d, "data": {"gap": 1}} for i, d in zip(chosen, dicts, strict=True)],
            file,
        )
    from ase.io import write

    atoms = [AseAtomsAdaptor.get_atoms(structures[i], msonable=False) for i in chosen]
    for i, frame in zip(chosen, atoms, strict=True):
        frame.info = {"material_id": f"m-{i}", "energy_ev": -1.5, "note": "two words"}
    write(folder / "d.extxyz", atoms, format="extxyz")
    storage.write_crystals(folder / "e.h5", CrystalBatch.from_structures([structures[i] for i in chosen]))
    return folder


NAMES = "a.csv b.csv.gz python.csv json.csv folder c.zip many.cif poscars list.json entries.json records.json.gz"


@pytest.mark.parametrize("name", [*NAMES.split(), "d.extxyz", "e.h5"])
def test_every_format_gives_the_same_crystals(formats, structures, name):
    expected = CrystalBatch.from_structures([structures[i] for i in range(0, 60, 5)])
    imported = importing.read_files([str(formats / name)], ONE)
    assert imported.dropped == []
    same_crystals(imported.crystals, expected)
    assert len(set(imported.crystals.ids)) == 12
    read, ids, columns, dropped = data.read_structures(formats / name)
    assert (len(read), len(ids), dropped) == (12, 12, [])
    assert all(len(values) == 12 for values in columns.values())
    assert [s.composition.reduced_formula for s in read] == [structures[i].reduced_formula for i in range(0, 60, 5)]


def test_ids_and_columns_of_formats(formats):
    def read(name):
        imported = importing.read_files([str(formats / name)], ONE)
        return imported.crystals.ids, imported.columns

    ids = [f"m-{i}" for i in range(0, 60, 5)]
    for name in ("a.csv", "python.csv", "records.json.gz", "d.extxyz"):
        assert read(name)[0] == ids
    assert read("json.csv")[0][2] == "json-3"
    assert read("folder")[0][2] == "002"
    assert read("c.zip")[0][2] == "002"
    np.testing.assert_allclose(read("a.csv")[1]["band_gap"], np.arange(0, 60, 5) / 10)
    assert read("records.json.gz")[1]["gap"].tolist() == [1.0] * 12
    np.testing.assert_allclose(read("entries.json")[1]["energy_per_atom"], -3.0)
    columns = read("d.extxyz")[1]
    assert columns["energy_ev"].tolist() == [-1.5] * 12
    assert columns["note"] == ["two words"] * 12


def test_kinds_of_columns():
    rows = [
        {"gap": "1.5", "source": "mp", "mixed": "1", "empty": "", "split": "2", "json": 3.0},
        {"gap": "", "source": "", "mixed": "x", "empty": "", "split": "1"},
        {"gap": "None", "source": "2", "mixed": "", "empty": "", "split": "0", "json": 4.0},
    ]
    columns = importing._columns(rows)
    np.testing.assert_equal(columns["gap"], [1.5, np.nan, np.nan])
    assert columns["source"] == ["mp", "", "2"]
    assert columns["mixed"] == ["1", "x", ""]
    np.testing.assert_equal(columns["empty"], [np.nan] * 3)
    np.testing.assert_equal(columns["json"], [3, np.nan, 4])
    assert "split" not in columns  # the schema's own name
    assert columns["split_"].tolist() == [2, 1, 0]


# ---- import ----


def bad_rows(cifs: list[str]) -> list[dict]:
    """Good rows with every kind of bad row between them."""
    plain = cifs[0]
    last = plain.rstrip().splitlines()[-1]
    words = last.split()
    general = "\n".join(
        f"  H  H{i}  1  {x:.5f}  {y:.5f}  {z:.5f}  1"
        for i, (x, y, z) in enumerate(np.random.default_rng(0).random((25, 3)))
    )
    twins = "\n".join(f"  {words[0]}  X{i}  1  {0.1 + i * 0.0004:.5f}  0.3  0.7  1" for i in range(2))
    head = re.match(r"(?s).*_atom_site_occupancy\n", plain)[0]
    lone_twins = head + "  H  H0  1  0.1000  0.2  0.3  1\n  H  H1  1  0.1002  0.2  0.3  1\n"
    rows = {
        "good-1": plain,
        "empty": "",
        "prose": "this is no CIF",
        "cut": plain[: len(plain) // 3],
        "good-2": cifs[1],
        "disordered": plain.replace(last, re.sub(r"\S+$", "0.5", last)),
        "no-element": plain.replace(last, last.replace(words[0], "Qq")),
        "not-finite": re.sub(r"(_cell_length_a\s+)\S+", r"\1nan", plain),
        "flat": re.sub(r"(_cell_length_a\s+)\S+", r"\g<1>0.0", plain),
        "large": plain.replace(last, last + "\n" + general),
        "twins": plain.replace(last, last + "\n" + twins),
        "one-atom-twice": lone_twins,
        "good-3": cifs[2],
        "dictionary": "{'lattice': 3}",
    }
    return [{"material_id": name, "cif": text, "value": len(name)} for name, text in rows.items()]


def test_bad_rows_never_stop_the_others(tmp_path, cifs):
    path = write_csv(tmp_path / "bad.csv", bad_rows(cifs))
    imported = commands.run_import([str(path)], tmp_path / "out.h5", ONE)
    reasons = {row.id: row.reason.partition(":")[0] for row in imported.dropped}
    assert reasons == {
        "empty": "unparsable",
        "prose": "unparsable",
        "cut": "unparsable",
        "disordered": "disordered",
        "no-element": "unparsable",
        "not-finite": "unparsable",
        "flat": "unparsable",
        "large": "too many sites",
        "twins": "atoms too close",
        "one-atom-twice": "symmetry not found",
        "dictionary": "unparsable",
    }
    crystals = storage.read_crystals(tmp_path / "out.h5")
    assert crystals.ids == ["good-1", "good-2", "good-3"]
    assert crystals.properties["value"].tolist() == [6, 6, 6]
    with open(tmp_path / "out.dropped.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["row"], row["id"]) for row in table[:2]] == [("2", "empty"), ("3", "prose")]
    assert {row["file"] for row in table} == {str(path)}
    assert all("\n" not in row["reason"] for row in table)
    commands.run_import([str(write_csv(tmp_path / "good.csv", bad_rows(cifs)[:1]))], tmp_path / "out.h5", ONE)
    assert not (tmp_path / "out.dropped.csv").exists()  # a table of an earlier import would mislead


def test_limits(tmp_path, formats):
    plain = importing.read_files([str(formats / "a.csv")], ONE).crystals
    for source in ("a.csv", "e.h5"):
        imported = importing.read_files([str(formats / source)], replace(ONE, max_atoms=12, max_sites=2))
        fits = (plain.num_atoms <= 12) & (plain.num_sites <= 2)
        assert 0 < len(imported.crystals) < 12
        same_crystals(imported.crystals, plain[fits])
        assert set(imported.reasons()) == {"too many atoms", "too many sites"}
        assert len(imported.crystals) + len(imported.dropped) == 12


def test_many_processes_give_what_one_gives(tmp_path, cifs):
    rows = [{"cif": text, "n": i} for i, text in enumerate(cifs * 6)] + bad_rows(cifs)
    rows = [{"cif": row["cif"], "n": i} for i, row in enumerate(rows)]
    path = write_csv(tmp_path / "a.csv", rows)
    one = importing.read_files([str(path)], ONE)
    two = importing.read_files([str(path)], replace(ONE, workers=2))
    assert one.dropped == two.dropped
    assert one.columns["n"].tolist() == two.columns["n"].tolist()
    for name in ("space_group", "wyckoff", "species", "frac_coords", "lattice"):
        assert torch.equal(getattr(one.crystals, name), getattr(two.crystals, name))


def test_several_inputs(tmp_path, formats):
    commands.run_import(
        [str(formats / n) for n in ("a.csv", "d.extxyz")], tmp_path / "one.h5", replace(ONE, validation=0.5)
    )
    assert storage.describe(tmp_path / "one.h5")["splits"] == {"train": 12, "validation": 12, "test": 0}
    before = storage.read_columns(tmp_path / "one.h5")
    assert np.isnan(before["energy_ev"]).sum() == 12
    commands.run_import(
        [str(tmp_path / "one.h5"), str(formats / "folder")], tmp_path / "two.h5", replace(ONE, validation=0)
    )
    columns = storage.read_columns(tmp_path / "two.h5")
    assert columns["split"].tolist() == [*before["split"], *[0] * 12]  # a file of ours keeps its splits
    assert columns["note"].tolist() == [""] * 12 + ["two words"] * 12 + [""] * 12
    assert columns["ids"].tolist()[:24] == before["ids"].tolist()


def test_splits():
    crystals = data.load_dataset("prototypes")
    n = len(crystals)
    config = replace(ONE, validation=0.2, test=0.1)
    split = assigned(crystals, config)
    assert np.bincount(split).tolist() == [n - int((split > 0).sum()), round(0.2 * n), round(0.1 * n)]
    assert np.array_equal(split, assigned(crystals, config))
    assert not np.array_equal(split, assigned(crystals, replace(config, seed=1)))
    by_formula = replace(config, split_by="formula")
    split = assigned(crystals, by_formula)
    homes = {}
    for formula, code in zip(crystals.formulas(), split.tolist(), strict=True):
        homes.setdefault(formula, set()).add(code)
    assert all(len(codes) == 1 for codes in homes.values())
    assert abs((split == 1).mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(homes))
    assert np.array_equal(assigned(crystals[50:60], by_formula), split[50:60])  # whoever else is there
    for wrong in ({"validation": 0.7, "test": 0.3}, {"validation": 0.9, "test": 0.9}):
        with pytest.raises(UserError, match="must be"):
            assigned(crystals, replace(config, **wrong))


def test_bad_inputs(tmp_path, formats):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "header.csv").write_text("cif,material_id\n")
    (tmp_path / "columns.csv").write_text("formula,energy\nNaCl,1\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "plain.csv.gz").write_text("cif\n1\n")
    (tmp_path / "cut.csv.gz").write_bytes((formats / "b.csv.gz").read_bytes()[:2000])
    (tmp_path / "bad.json").write_text("[{")
    (tmp_path / "empty.extxyz").touch()
    (tmp_path / "bad.zip").write_text("PK")
    zipfile.ZipFile(tmp_path / "nothing.zip", "w").close()
    (tmp_path / "prose.cif").write_text("Dear reader,")
    (tmp_path / "what.pdf").touch()
    (tmp_path / "text.h5").write_text("no")
    (tmp_path / "hollow").mkdir()
    expected = {
        "missing.csv": "no such file",
        "empty.csv": "is empty",
        "header.csv": "no structure can be used",
        "columns.csv": "has no column 'cif' .it has formula, energy",
        "binary.csv": "cannot be read as csv",
        "plain.csv.gz": "cannot be read as csv: Not a gzipped file",
        "cut.csv.gz": "cannot be read as csv: Compressed file ended",
        "bad.json": "cannot be read as json",
        "empty.extxyz": "is empty",
        "bad.zip": "cannot be read as a zip",
        "nothing.zip": "no structure file in this zip",
        "prose.cif": "no structure can be used .most often: unparsable",
        "what.pdf": "unknown kind of file; known endings: .csv",
        "text.h5": "is not an HDF5 file",
        "hollow": "no structure file in this folder",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            commands.run_import([str(tmp_path / name)], tmp_path / "out.h5", ONE)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out.h5").exists()
    for output, message in {
        "out.csv": "end in .h5",
        "hollow.h5/out.h5": "make it first",
        "what.pdf/a.h5": "not a folder",
    }.items():
        with pytest.raises(UserError, match=message):
            commands.run_import([str(formats / "a.csv")], tmp_path / output, ONE)


def test_broken_files_among_many(tmp_path, cifs):
    """In a folder or zip a broken file is one dropped row, under its own name."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.cif").write_text(cifs[i])
    (tmp_path / "in" / "0b.cif.gz").write_text("not gzip")
    (tmp_path / "in" / "1b.json").write_text("{")
    (tmp_path / "in" / "2b.extxyz").write_text("two\natoms\n")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in sorted((tmp_path / "in").iterdir()):
            archive.write(path, path.name)
    for name in ("in", "in.zip"):
        imported = importing.read_files([str(tmp_path / name)], ONE)
        assert imported.crystals.ids == ["0", "1", "2"]
        assert sorted(Path(row.file).name for row in imported.dropped) == ["0b.cif.gz", "1b.json", "2b.extxyz"]
        assert imported.reasons() == {"unparsable": 3}


# ---- interruption ----


@pytest.fixture(scope="module")
def large(tmp_path_factory, cifs):
    path = tmp_path_factory.mktemp("large") / "large.csv"
    return write_csv(path, [{"material_id": f"m{i}", "cif": text} for i, text in enumerate(cifs * 150)])


def start_import(source: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "cfrl.cli", "data", "import", str(source), "-o", str(output), "--workers", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def processes_of(session: int) -> list[str]:
    listed = subprocess.run(["ps", "-s", str(session), "-o", "pid=,stat=,args="], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if " Z" not in line]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.parametrize(("number", "started"), [(signal.SIGKILL, True), (signal.SIGINT, True), (signal.SIGINT, False)])
def test_interrupted_import_leaves_nothing(tmp_path, large, number, started):
    """kill -9 of the command alone, or Ctrl-C, amid the work: the old file stays, no process lingers.

    Not `started`: while the fork server still imports what its workers need.
    """
    output = tmp_path / "out.h5"
    storage.write_crystals(output, data.load_dataset("prototypes")[:3])
    running = start_import(large, output)
    wait_for(lambda: len(processes_of(running.pid)) >= 3 + started)  # command, tracker, fork server; workers
    if started:
        time.sleep(random.Random(int(number)).uniform(0.5, 2))
    assert running.poll() is None
    (os.kill if number == signal.SIGKILL else os.killpg)(running.pid, number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0
    assert "Traceback" not in errors
    wait_for(lambda: not processes_of(running.pid))
    assert len(storage.read_crystals(output)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_killed_while_writing(tmp_path, cifs):
    """A kill between the temporary file and the rename: the next import takes the leftover away."""
    path = write_csv(tmp_path / "a.csv", [{"cif": cifs[0]}])
    script = (
        "import os, signal, cfrl.files\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from cfrl.commands.data import run_import, DataConfig\n"
        f"run_import([{str(path)!r}], {str(tmp_path / 'out.h5')!r}, DataConfig(workers=1))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not (tmp_path / "out.h5").exists()
    assert len(list(tmp_path.glob(".out.h5.*.tmp"))) == 1
    commands.run_import([str(path)], tmp_path / "out.h5", ONE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "out.h5"]


# ---- datasets by name ----


def test_prototypes(cache):
    crystals = data.load_dataset("prototypes")
    assert len(crystals) > 280
    assert crystals.valid().all()
    assert len(set(crystals.ids)) == len(crystals)
    assert len(data.load_dataset("prototypes", "train")) + len(data.load_dataset("prototypes", "validation")) == len(
        crystals
    )
    path = catalogue.dataset_path("prototypes")
    assert path.parent == cache
    assert "Cinnabar" in storage.read_columns(path, ["mineral"])["mineral"]
    path.write_bytes(path.read_bytes()[:1000])
    assert len(data.load_dataset("prototypes")) == len(crystals)  # a damaged cache is made again


def test_load_dataset_of_any_file(formats):
    crystals = data.load_dataset(formats / "a.csv")
    assert crystals.properties["band_gap"].shape == (12,)
    parts = [data.load_dataset(str(formats / "a.csv"), split) for split in ("train", "validation")]
    assert [len(part) for part in parts] == [11, 1]
    same_crystals(data.load_dataset(formats / "e.h5"), crystals)
    for name, message in {
        "prototype": "did you mean 'perov-5'|no dataset named 'prototype'",
        "mp-20": "get it with: cfrl data fetch mp-20",
        "nothing.csv": "no such file",
    }.items():
        with pytest.raises(UserError, match=message):
            data.load_dataset(name)
    with pytest.raises(UserError, match="is not a dataset yet; make one of it: cfrl data import"):
        catalogue.dataset_path(formats / "a.csv")


def test_info_counts(tmp_path):
    crystals = data.load_dataset("prototypes")
    crystals.properties["half"] = torch.where(torch.arange(len(crystals)) % 2 == 0, torch.nan, 1.0).double()
    storage.write_crystals(tmp_path / "a.h5", crystals)
    counted = data.summarise(tmp_path / "a.h5")
    assert sum(counted["space_groups"].values()) == len(crystals)
    assert counted["space_groups"][225] == int((crystals.space_group == 225).sum())
    assert counted["elements"][8] == int((crystals.species == 8).any(1).sum())
    assert counted["atoms"].tolist() == crystals.num_atoms.tolist()
    assert len(counted["properties"]["half"]) == len(crystals) // 2
    console = Console(record=True, width=100, file=io.StringIO())
    commands.run_info(str(tmp_path / "a.h5"), console)
    shown = console.export_text()
    for part in (f"{len(crystals)} crystals", "cubic", "half", "schema_version", "validation"):
        assert part in shown
    storage.write_crystals(tmp_path / "none.h5", CrystalBatch.empty())
    commands.run_info(str(tmp_path / "none.h5"), console)


# ---- fetch ----


class Server(http.server.ThreadingHTTPServer):
    """`files` on loopback, with ranges and ETags; breaks off after `break_after` bytes, `breaks` times."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.break_after, self.breaks, self.ranges = 0, 0, True
        self.asked: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, content = self.server, self.server.files.get(self.path[1:])
        if content is None:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        server.asked.append((self.path[1:], wanted))
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        body = content[start:]
        if server.breaks:
            server.breaks -= 1
            body = body[: server.break_after]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(fetch, "_WAIT", 0.01)
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(3_000_000)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_download_goes_on_where_it_broke_off(tmp_path, server, content):
    server.files["x.bin"] = content
    server.break_after, server.breaks = 700_000, 2
    seen = []
    file = fetch.SourceFile(server.url("x.bin"), sha256(content))
    path, note = fetch.download(file, tmp_path, lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == content
    assert note == "checksum verified"
    starts = [int(wanted[6:-1]) for _, wanted in server.asked[1:]]
    whole_blocks = 700_000 // fetch._BLOCK * fetch._BLOCK
    assert starts == [whole_blocks, 2 * whole_blocks]
    assert seen[-1] == (len(content), len(content))
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    fetch.download(file, tmp_path)
    assert len(server.asked) == 3  # nothing is downloaded twice


def test_download_goes_on_in_the_next_run(tmp_path, server, content):
    server.files["x.bin"] = content
    server.break_after, server.breaks = 100_000, 99
    file = fetch.SourceFile(server.url("x.bin"), sha256(content))
    with pytest.raises(UserError, match=r"the connection broke off.*; run again to go on"):
        fetch.download(file, tmp_path)
    kept = (tmp_path / "x.bin.part").stat().st_size
    assert kept >= len(server.asked) * fetch._BLOCK
    server.breaks = 0
    assert fetch.download(file, tmp_path)[0].read_bytes() == content
    assert server.asked[-1][1] == f"bytes={kept}-"


@pytest.mark.parametrize("ranges", [True, False])
def test_half_a_download_of_another_version_is_not_used(tmp_path, server, content, ranges):
    server.files["x.bin"] = content
    server.break_after, server.breaks, server.ranges = 100_000, 99, ranges
    with pytest.raises(UserError):
        fetch.download(fetch.SourceFile(server.url("x.bin")), tmp_path)
    server.files["x.bin"] = changed = content[::-1]
    server.breaks = 0
    path, note = fetch.download(fetch.SourceFile(server.url("x.bin")), tmp_path)
    assert path.read_bytes() == changed
    assert "no published checksum" in note


def test_wrong_checksum_is_refused(tmp_path, server, content):
    server.files["x.bin"] = content
    with pytest.raises(UserError, match=f"has another checksum than {'0' * 64}.*not kept"):
        fetch.download(fetch.SourceFile(server.url("x.bin"), "0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_first_checksum_holds(tmp_path, server, content):
    server.files["x.bin"] = content
    file = fetch.SourceFile(server.url("x.bin"))
    path, _ = fetch.download(file, tmp_path)
    assert fetch.download(file, tmp_path)[1] == "checksum as at the first download"
    path.unlink()
    server.files["x.bin"] = content + b"tampered"
    with pytest.raises(UserError, match="has another checksum"):
        fetch.download(file, tmp_path)


def test_servers_that_refuse(tmp_path, server):
    with pytest.raises(UserError, match="the server answers 404"):
        fetch.download(fetch.SourceFile(server.url("nothing")), tmp_path)
    with pytest.raises(UserError, match="no connection; the dataset 'prototypes' needs none"):
        fetch.download(fetch.SourceFile("http://127.0.0.1:9/x"), tmp_path)


def test_fetch_a_source_of_the_config(tmp_path, server, formats, monkeypatch):
    """From an entry in cfrl.toml to crystals by name, with the splits that the publisher gave."""
    for name in ("a.csv", "b.csv.gz"):
        server.files[name] = (formats / name).read_bytes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CFRL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cfrl.toml").write_text(
        f"[[data.sources.mine]]\nurl = '{server.url('a.csv')}'\nsplit = 'test'\n"
        f"[[data.sources.mine]]\nurl = '{server.url('b.csv.gz')}'\nsplit = 'train'\n"
        f"[data.sources.single]\nurl = '{server.url('a.csv')}'\nsha256 = '{sha256(server.files['a.csv'])}'\n"
        "[data.sources.wrong]\naddress = 'x'\n"
    )
    from cfrl.config import resolve

    config = resolve(DataConfig, {"workers": 1})
    commands.run_fetch("mine", config)
    assert len(data.load_dataset("mine")) == 24
    assert len(data.load_dataset("mine", "test")) == 12
    assert data.load_dataset("mine", "test").ids[0] == "m-0"
    commands.run_fetch("single", config)
    assert len(data.load_dataset("single", "validation")) == 1
    with pytest.raises(UserError, match=r"data\.sources\.wrong: must be a table with url"):
        commands.run_fetch("wrong", config)
    with pytest.raises(UserError, match="no dataset named 'mien' is known; did you mean 'mine'"):
        commands.run_fetch("mien", config)


def test_public_sources_are_well_formed():
    for name, files in fetch.SOURCES.items():
        names = [Path(file.url).name for file in files]
        assert len(set(names)) == len(names), name
        assert all(file.url.startswith("https://") and file.split in ("", *storage.SPLITS) for file in files)
        assert all(readers._kind(Path(file.url)) in readers.READERS for file in files)


def test_worker_function_survives_a_panic(monkeypatch):
    """A panic in compiled code is no `Exception`; it costs its row only."""

    class PanicException(BaseException):
        pass

    def panics(*_):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(importing, "analyse", panics)
    cell = Cell(np.eye(3) * 4, np.zeros((1, 3)), np.array([3]))
    monkeypatch.setitem(readers._PARSERS, "cell", lambda payload: payload)
    work = partial(importing._analyse, symprec=0.01, max_sites=20, max_atoms=0)
    arrays, reasons = work([("cell", cell)])
    assert len(arrays[0]) == 0
    assert reasons == {0: "symmetry not found: PanicException: index out of bounds"}

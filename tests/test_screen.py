"""Screening: known truth in, truth out; interrupted and uninterrupted runs alike; bad input never stops it."""

import csv
import errno
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.io.vasp import Incar, Poscar

import cfrl
from cfrl.commands import screen as screening
from cfrl.commands.screen import screen
from cfrl.config import ScreenConfig, read_run_config
from cfrl.errors import UserError
from cfrl.io.storage import read_columns
from cfrl.reports.report import write_report
from cfrl.runs import journal
from cfrl.runs.journal import Journal
from cfrl.screening import pipeline, stages
from cfrl.screening.tally import rate
from cfrl.stability.flags import FLAGS

QUICK = ScreenConfig(relax=False, stability=False, report=False, workers=1)


class SerialEngine:
    """The same work in this process: no workers to start. `interrupt_after` plays Ctrl-C, `done` counts items."""

    interrupt_after: int | None = None
    done: ClassVar[list[int]] = []

    def __init__(self, *settings: object) -> None:
        pass

    def __enter__(self) -> "SerialEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def map(self, function: Callable, chunks: list[list]) -> Iterator[tuple[int, list]]:
        for index, items in enumerate(chunks):
            if self.interrupt_after is not None and len(SerialEngine.done) >= self.interrupt_after:
                raise KeyboardInterrupt
            SerialEngine.done.append(len(items))
            yield index, function(items)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[SerialEngine]:
    monkeypatch.setattr(screening, "make_engine", SerialEngine)
    monkeypatch.chdir(tmp_path)
    SerialEngine.interrupt_after, SerialEngine.done = None, []
    return SerialEngine


def rock_salt(a: str = "Na", b: str = "Cl", length: float = 5.6) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(length), [a, b], [[0, 0, 0], [0.5, 0.5, 0.5]])


def perovskite(a: str, b: str, length: float = 4.0) -> Structure:
    sites = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    return Structure.from_spacegroup("Pm-3m", Lattice.cubic(length), [a, b, "O"], sites)


def write_csv(path: Path, structures: dict[str, Structure], **columns: list) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "cif", *columns])
        for row, (name, structure) in enumerate(structures.items()):
            writer.writerow([name, structure.to(fmt="cif"), *(values[row] for values in columns.values())])
    return path


def read_table(run: Path) -> dict[str, dict[str, str]]:
    with (run / "table.csv").open() as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight crystals: two of them twice, one with atoms on top of each other."""
    strained = perovskite("Ba", "Ti")
    strained.apply_strain([0.004, -0.003, 0.002])
    crowded = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.05, 0, 0]])
    crystals = {
        "salt": rock_salt(),
        "salt again": rock_salt("Na", "Cl", 5.7).get_primitive_structure(),
        "MgO": rock_salt("Mg", "O", 4.25),
        "BaTiO3": perovskite("Ba", "Ti"),
        "strained": strained * [1, 2, 1],
        "SrTiO3": perovskite("Sr", "Ti", 3.9),
        "crowded": crowded,
        "Cu": Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]]),
    }
    return write_csv(
        tmp_path_factory.mktemp("input") / "samples.csv", crystals, gap=[5.0, 5.0, 4.4, 1.8, 1.8, 1.9, 0.0, 0.0]
    )


@pytest.fixture
def hull_file(tmp_path: Path) -> Path:
    """CHGNet-like energies (eV/atom) of elements and oxides; none for copper."""
    energies = {"Na": -1.3, "Cl": -1.8, "Mg": -1.5, "O": -4.9, "Ba": -1.9, "Ti": -7.8, "Sr": -1.7}
    energies |= {"NaCl": -3.4, "MgO": -6.1, "BaO": -6.2, "SrO": -6.0, "TiO2": -9.3}
    path = tmp_path / "hull.csv"
    path.write_text("formula,energy_per_atom\n" + "".join(f"{f},{e}\n" for f, e in energies.items()))
    return path


def test_duplicates_novelty_and_validity(serial: type[SerialEngine], samples: Path, tmp_path: Path) -> None:
    known = write_csv(tmp_path / "known.csv", {"mp-1": rock_salt("Mg", "O", 4.2), "mp-2": perovskite("Ca", "Ti")})
    table = read_table(screen(str(samples), replace(QUICK, known=[str(known)])))
    assert table["salt again"]["status"] == "duplicate of salt"
    assert table["strained"]["status"] == "duplicate of BaTiO3"
    assert "0.20 A apart" in table["crowded"]["status"]
    assert table["crowded"]["valid"] == "0"
    assert {name for name, row in table.items() if row["unique"] == "1"} == {"salt", "MgO", "BaTiO3", "SrTiO3", "Cu"}
    assert {name: row["known_as"] for name, row in table.items() if row["novel"] == "0"} == {"MgO": "mp-1"}
    assert table["salt"]["space_group"] == "225"
    assert table["BaTiO3"]["fingerprint"].startswith("BaTiO3|221|")
    assert table["BaTiO3"]["charge_neutral"] == "1"
    assert (table["BaTiO3"]["no_overlap"], table["crowded"]["no_overlap"]) == ("1", "")
    assert table["BaTiO3"]["input_gap"] == "1.8"


def test_hull_distances_agree_with_pymatgen(serial: type[SerialEngine], samples: Path, hull_file: Path) -> None:
    run = screen(str(samples), replace(QUICK, stability=True, hull=str(hull_file)))
    table = read_table(run)
    entries = []
    for row in csv.DictReader(hull_file.open()):
        composition = Composition(row["formula"])
        entries.append(PDEntry(composition, float(row["energy_per_atom"]) * composition.num_atoms))
    diagram = PhaseDiagram(entries)
    for name in ("salt", "MgO", "BaTiO3", "SrTiO3"):
        composition = Composition(table[name]["formula"])
        energy = float(table[name]["energy_per_atom"])
        expected = energy - diagram.get_hull_energy(composition) / composition.num_atoms
        assert float(table[name]["e_above_hull"]) == pytest.approx(expected, abs=1e-5)
    assert table["Cu"]["hull_status"] == "no reference for element Cu"
    assert table["Cu"]["energy_per_atom"]
    assert table["salt again"]["stable"] == table["salt"]["stable"], "a duplicate counts as its original"
    assert "unknown origin" in json.loads((run / "summary.json").read_text())["warning"]


def test_rank_filter_and_what_is_written(serial: type[SerialEngine], samples: Path) -> None:
    config = replace(
        QUICK, report=True, rank="-input_gap", filter="input_gap > 1.8 and num_atoms >= 5", top=2, dft="pbe"
    )
    run = screen(str(samples), config)
    rows = list(read_table(run).values())
    assert [row["id"] for row in rows if row["candidate"] == "1"] == ["salt", "MgO", "SrTiO3"]
    assert [row["id"] for row in rows][:3] == ["salt", "MgO", "SrTiO3"], "candidates stand first, best first"
    assert (run / "report.html").exists()
    assert sorted(path.name for path in (run / "cifs").iterdir()) == ["1-NaCl.cif", "2-MgO.cif"]
    assert Structure.from_file(run / "cifs" / "1-NaCl.cif").reduced_formula == "NaCl"
    assert Poscar.from_file(run / "dft" / "2-MgO" / "POSCAR").structure.reduced_formula == "MgO"
    assert Incar.from_file(run / "dft" / "2-MgO" / "INCAR")["ENCUT"] == 520
    crystals, columns = cfrl.read_crystals(run / "screen.h5"), read_columns(run / "screen.h5")
    assert crystals.ids[:3] == ["salt", "MgO", "SrTiO3"]
    assert crystals.formulas()[:3] == ["NaCl", "MgO", "SrTiO3"]
    assert columns["input_gap"][0] == 5.0
    assert columns["status"][crystals.ids.index("strained")] == "duplicate of BaTiO3"


def test_gaps_of_the_table_decide_the_smearing(serial: type[SerialEngine], tmp_path: Path) -> None:
    crystals = {"salt": rock_salt(), "MgO": rock_salt("Mg", "O", 4.25), "TiN": rock_salt("Ti", "N", 4.24)}
    source = write_csv(tmp_path / "in.csv", crystals, band_gap=[5.0, "", 0.0], band_gap_std=[0.5, "", 0.1])
    run = screen(str(source), replace(QUICK, rank="input_band_gap", dft="pbe"))
    folders = {note["id"]: run / "dft" / note["name"] for note in json.loads((run / "dft/inputs.json").read_text())}
    smearing = {name: Incar.from_file(folder / "INCAR")["ISMEAR"] for name, folder in folders.items()}
    assert smearing == {"salt": -5, "MgO": 0, "TiN": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filter": "ehul < 0.1"}, "did you mean 'ehull'"),
        ({"filter": "ehull <"}, "--filter"),
        ({"rank": "__import__('os')"}, "--rank"),
        ({"allow": "noblegas"}, "did you mean 'noble_gas'"),
        ({"dft": "lda"}, "dft = 'lda' is none of pbe, scan"),
        ({"pseudos": "nowhere.json"}, "nowhere.json"),
        ({"known": ["nowhere.h5"]}, "nowhere.h5"),
        ({"stability": True, "hull": "nowhere.csv"}, "nowhere.csv"),
        ({"stability": True, "potential": "chgnet:r2scan"}, "scale r2scan, the reference is on the scale mp2020"),
        ({"stability": True, "potential": "mace:own.model"}, "mace:own.model@mp-raw"),
    ],
)
def test_bad_settings_are_told_before_the_work(
    serial: type[SerialEngine], samples: Path, change: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        screen(str(samples), replace(QUICK, **change))
    assert not serial.done
    assert not Path("runs").exists()


# ---- candidates, flags and rates ----


@pytest.fixture
def judged(tmp_path: Path) -> Path:
    """Sound are NaCl, which has a copy, and MgO."""
    crystals = {
        "krypton": rock_salt("Kr", "F", 5.0),
        "salt": rock_salt(),
        "copy": rock_salt(),
        "technetium": rock_salt("Tc", "O", 4.4),
        "MgO": rock_salt("Mg", "O", 4.25),
        "odd": Structure.from_spacegroup("Pm-3m", Lattice.cubic(3.4), ["Mg", "Cl"], [[0, 0, 0], [0.5] * 3]),
        "Cu": Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]]),
    }
    return write_csv(tmp_path / "judged.csv", crystals)


@pytest.fixture
def judge(tmp_path: Path) -> ScreenConfig:
    """Its hull puts KrF 0.52 eV/atom below, NaCl 0.014 below, all else up to 0.04 above; copper has one phase."""
    phases = dict.fromkeys(("Na", "Cl", "Mg", "O", "Kr", "F", "Tc"), 0.0)
    phases |= {"Cu": -4.10, "NaCl": -3.65, "MgO": -6.33, "MgCl": -2.80, "TcO": -8.10}
    phases |= {f"{pair}{k}": 9.0 for pair in ("NaCl", "MgO", "MgCl", "TcO", "KrF") for k in range(2, 14)}
    path = tmp_path / "my_hull.csv"
    path.write_text("formula,energy_per_atom\n" + "".join(f"{f},{e}\n" for f, e in phases.items()))
    known = write_csv(tmp_path / "known.csv", {"mp-2": perovskite("Ca", "Ti")})
    return replace(QUICK, stability=True, hull=str(path), known=[str(known)])


def test_what_is_flagged_never_ranks_among_candidates(
    serial: type[SerialEngine], judged: Path, judge: ScreenConfig
) -> None:
    run = screen(str(judged), judge)
    table = read_table(run)
    assert {name: row["flags"] for name, row in table.items() if row["flags"]} == {
        "krypton": "far_below_hull, noble_gas, not_neutral",
        "technetium": "radioactive",
        "odd": "not_neutral",
        "Cu": "sparse_reference, element",
    }
    assert table["krypton"]["noble_gas"] == table["krypton"]["flagged"] == "1"
    assert table["salt"]["noble_gas"] == table["salt"]["flagged"] == "0"
    assert [name for name, row in table.items() if row["candidate"] == "1"] == list(table)[:2] == ["salt", "MgO"]
    assert sorted(path.name for path in (run / "cifs").iterdir()) == ["1-NaCl.cif", "2-MgO.cif"]
    with (run / "flagged.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["krypton", "Cu", "technetium", "odd"]
    assert cfrl.read_crystals(run / "screen.h5").ids[:2] == ["salt", "MgO"]


def test_atoms_on_their_own_are_flagged(serial: type[SerialEngine], tmp_path: Path) -> None:
    crystals = {"apart": rock_salt(length=9.0), "salt": rock_salt()}  # 1.7 and 1.04 sums of covalent radii
    table = read_table(screen(str(write_csv(tmp_path / "few.csv", crystals)), replace(QUICK, unique=False)))
    assert {name: (row["flags"], row["candidate"]) for name, row in table.items()} == {
        **{"salt": ("", "1"), "apart": ("exploded", "0")},
    }


@pytest.mark.parametrize(
    ("change", "candidates"),
    [
        ({"allow": "element,sparse_reference"}, ["salt", "MgO", "Cu"]),
        ({"allow": "noble_gas,far_below_hull,not_neutral"}, ["krypton", "salt", "MgO", "odd"]),
        ({"metastable": 0.0}, ["salt"]),
        ({"allow": "not_neutral", "filter": "not_neutral == 1"}, ["odd"]),
        ({"rank": "-ehull"}, ["MgO", "salt"]),
    ],
)
def test_what_a_candidate_is_can_be_set(
    serial: type[SerialEngine], judged: Path, judge: ScreenConfig, change: dict, candidates: list[str]
) -> None:
    table = read_table(screen(str(judged), replace(judge, **change)))
    assert [name for name, row in table.items() if row["candidate"] == "1"] == candidates


def test_known_crystals_are_no_candidates(serial: type[SerialEngine], judged: Path, judge: ScreenConfig) -> None:
    table = read_table(screen(str(judged), replace(judge, known=[str(judged)])))
    assert not [name for name, row in table.items() if row["candidate"] == "1" or row["held_back"] == "1"]


def test_rates_say_by_what_they_were_judged(serial: type[SerialEngine], judged: Path, judge: ScreenConfig) -> None:
    run = screen(str(judged), replace(judge, metastable=0.05))
    summary = json.loads((run / "summary.json").read_text())
    rates = {rate["name"]: rate for rate in summary["rates"]}
    for name, threshold in (("S.U.N.", "0 eV/atom"), ("meta-S.U.N.", "0.05 eV/atom")):
        for word in ("my_hull.csv (", "chgnet-0.3.0", f"at most {threshold}", "known.csv"):
            assert word in rates[name]["definition"]
    assert "Zeni" not in json.dumps(summary)
    counts = {name: rates[name]["count"] for name in rates if "S.U.N." in name}
    assert counts == {"S.U.N.": 2, "S.U.N., unflagged": 1, "meta-S.U.N.": 6, "meta-S.U.N., unflagged": 2}
    assert summary["by_elements"]["1"] == {
        **{"crystals": 1, "novel": 1, "new formula": 0, "stable": 0, "metastable": 1},
        **{"S.U.N.": 0, "S.U.N., unflagged": 0, "meta-S.U.N.": 1, "meta-S.U.N., unflagged": 0},
    }
    anions = {name: (row["crystals"], row["meta-S.U.N., unflagged"]) for name, row in summary["by_anion"].items()}
    assert anions == {"oxide": (2, 1), "halide": (4, 1), "chalcogenide": (0, 0), "pnictide": (0, 0),
                      "intermetallic": (1, 0)}  # fmt: skip
    shares = [rates[f"valid, {kind}"]["count"] for kind in ("charge neutral", "alloy", "element alone")]
    assert shares == [4, 0, 1], "rock salt, its copy, MgO and TcO; no alloy; copper"
    assert summary["flags"]["not_neutral"] == {"crystals": 2, "held back": 2}


def test_the_funnel_never_rises(serial: type[SerialEngine], judged: Path, judge: ScreenConfig, tmp_path: Path) -> None:
    """The copy is a duplicate, and novel: more crystals are novel than unique. A run of before is read as it is."""
    run = screen(str(judged), replace(judge, report=True))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["funnel"] == {
        **{"all": 7, "valid": 7, "unique": 6, "novel": 6, "within 0.1 eV/atom": 6},
        **{"unflagged": 2, "candidates": 2, "stable": 1},
    }
    for name in ("judgement", "funnel", "flags", "by_elements", "by_anion"):
        del summary[name]
    for entry in summary["rates"]:
        entry["count"] += entry["name"] == "novel"
    (run / "summary.json").write_text(json.dumps(summary))
    rows = list(read_table(run).values())
    new = {*FLAGS, "flags", "flagged", "held_back", "alloy", "isolation", "isolation_relaxed", "new_formula"}
    with (run / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name not in new], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    for text in ((run / "report.html").read_text(), write_report(run).read_text()):
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
        counts = data["figures"]["funnel"]["data"][0]["y"]
        assert counts == sorted(counts, reverse=True)
        assert len(counts) >= 5


def test_formulas_that_nobody_lists(serial: type[SerialEngine], judged: Path, judge: ScreenConfig) -> None:
    table = read_table(screen(str(judged), judge))
    assert {name for name, row in table.items() if row["new_formula"] == "1"} == {"krypton"}
    listed = judged.with_name("formulas.csv")
    listed.write_text("formula\nF4Kr4\nNaN\nNa(Cl)1\n")
    run = screen(str(judged), replace(QUICK, known=[str(listed)]))
    table = read_table(run)
    assert {name for name, row in table.items() if row["new_formula"] == "0"} == {"krypton", "salt", "copy"}
    assert not any(row["novel"] for row in table.values()), "a formula says nothing of structures"
    rates = {rate["name"]: rate for rate in json.loads((run / "summary.json").read_text())["rates"]}
    assert (rates["new formula"]["count"], "novel" in rates) == (4, False)
    assert "formulas.csv" in rates["new formula"]["definition"]
    listed.write_text("formula\nNaCl\nXyz\n")
    with pytest.raises(UserError, match=r"formulas.csv: .*2.*Xyz"):
        screen(str(judged), replace(QUICK, known=[str(listed)]))


# ---- bad input ----


def test_bad_crystals_become_rows_with_a_reason(serial: type[SerialEngine], tmp_path: Path) -> None:
    folder = tmp_path / "cifs"
    folder.mkdir()
    large = rock_salt() * [4, 4, 4]
    large.perturb(0.05, seed=0)
    disordered = Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    good = {"good": rock_salt(), "large": large, "einsteinium": rock_salt("Es", "O", 5.0), "disordered": disordered}
    for name, structure in good.items():
        structure.to(folder / f"{name}.cif")
    (folder / "broken.cif").write_text("data_broken\n_cell_length_a 5.0\nloop_\n_atom_site_label\nNa1 Na2")
    (folder / "empty.cif").write_text("")
    hull = tmp_path / "hull.csv"
    hull.write_text("formula,energy_per_atom\nNa,-1.3\nCl,-1.8\n")
    run = screen(str(folder), replace(QUICK, stability=True, hull=str(hull)))
    table = read_table(run)
    assert len(table) == 6
    status = {name.partition(".")[0]: row["status"] for name, row in table.items()}
    assert status["good"] == ""
    assert status["large"] == "duplicate of good"
    assert status["einsteinium"] == "element Es unknown to the potential"
    assert status["disordered"].startswith("unreadable: disordered")
    assert status["broken"].startswith("unreadable:")
    assert status["empty"].startswith("unreadable:")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["crystals"] == 6
    assert next(r for r in summary["rates"] if r["name"] == "valid")["count"] == 3


def test_a_cell_of_512_atoms_without_symmetry_goes_through(serial: type[SerialEngine], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = rock_salt() * [4, 4, 4]
    large.translate_sites(0, [0.01, 0.003, 0.002])
    for site in range(len(large)):
        large.translate_sites(site, rng.normal(scale=0.02, size=3), frac_coords=False)
    assert len(large) == 512
    run = screen(str(write_csv(tmp_path / "large.csv", {"large": large})), QUICK)
    assert read_table(run)["large"]["space_group"] == "1"
    assert int(cfrl.read_crystals(run / "screen.h5").num_atoms[0]) == 512


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "is empty"),
        ("zip.h5", b"PK\x03\x04 no HDF5", "is not an HDF5 file"),
        ("x.dat", b"1", "unknown kind of file; known endings: .csv"),
        ("a.zip", b"no", "cannot be read as a zip"),
    ],
)
def test_files_that_are_not_what_they_say(
    serial: type[SerialEngine], tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        screen(str(path), QUICK)
    assert not (tmp_path / "runs").exists()


def test_a_file_without_a_crystal_is_a_row_with_a_reason(serial: type[SerialEngine], tmp_path: Path) -> None:
    path = tmp_path / "text.cif"
    path.write_bytes(b"\x00\x01")
    (row,) = read_table(screen(str(path), QUICK)).values()
    assert (row["id"], row["valid"], row["candidate"]) == ("text", "0", "0")
    assert row["status"].startswith("unreadable: unparsable: Invalid CIF file")


def test_a_full_disk_is_told_and_what_was_done_is_kept(
    serial: type[SerialEngine], samples: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    serial.interrupt_after = 0
    with pytest.raises(KeyboardInterrupt):
        screen(str(samples), QUICK, output=str(tmp_path / "run"))
    serial.interrupt_after = None
    with monkeypatch.context() as context:
        context.setattr(journal.os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            screen("", QUICK, resume=tmp_path / "run")
    table = read_table(screen(str(samples), QUICK, resume=tmp_path / "run"))
    assert len(table) == 8


def test_a_kill_amid_the_copy_of_the_table_leaves_the_old_one(
    serial: type[SerialEngine], samples: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(_source: Path, target: Path) -> None:
        Path(target).write_text("half a tab")
        raise KeyboardInterrupt

    monkeypatch.setattr(screening.shutil, "copyfile", killed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.csv").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        screen(str(samples), QUICK, output="out.csv")
    assert (tmp_path / "out.csv").read_text() == "old"


# ---- resuming ----


def test_journal_forgets_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "stage.jsonl"
    with Journal(path) as journal:
        journal.add([1, 2], [{"x": 1.5}, {"x": float("nan")}])
        journal.add([3], [{"x": 3.0}])
    path.write_bytes(path.read_bytes()[:-4])
    with Journal(path) as journal:
        assert list(journal.records) == ["1", "2"]
        journal.add([3], [{"x": 4.0}])
    assert Journal(path).records["3"] == {"x": 4.0}


def test_ctrl_c_in_each_stage_then_resume(
    serial: type[SerialEngine], samples: Path, hull_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Interrupted after every single chunk of every stage: the same table, and no chunk computed twice."""
    monkeypatch.setattr(pipeline, "_CHECK_CHUNK", 3)
    monkeypatch.setattr(pipeline, "_MATCH_CHUNK", 1)
    config = ScreenConfig(hull=str(hull_file), chunk=2, report=False, workers=1)
    whole = screen(str(samples), config, output=str(tmp_path / "whole"))
    total = len(serial.done)
    assert {path.name.partition("-")[0] for path in (whole / "stages").iterdir()} == {
        *("validity", "matching", "relax", "recheck")
    }
    serial.done, run, interruptions = [], None, 0
    while run is None:
        serial.interrupt_after = len(serial.done) + 1
        resume = tmp_path / "parts" if interruptions else None
        try:
            run = screen(str(samples), config, "" if resume else str(tmp_path / "parts"), resume)
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == total - 1
    assert len(serial.done) == total, "nothing was computed twice"
    assert (run / "table.csv").read_bytes() == (whole / "table.csv").read_bytes()
    table = read_table(run)
    assert table["BaTiO3"]["converged"] == "1"
    assert table["BaTiO3"]["space_group_relaxed"] == "221"
    assert float(table["SrTiO3"]["volume_change"]) == pytest.approx((3.94 / 3.9) ** 3 - 1, abs=0.03)
    assert table["MgO"]["rmsd"] == "0"


def test_resume_computes_only_what_a_new_setting_asks_for(
    serial: type[SerialEngine], samples: Path, hull_file: Path
) -> None:
    run = screen(str(samples), QUICK)
    serial.done = []
    screen("", replace(QUICK, filter="num_atoms < 3", rank="density"), resume=run)
    assert not serial.done
    config = replace(QUICK, stability=True, hull=str(hull_file))
    screen("", config, resume=run)
    assert serial.done == [5], "only the energies of the five crystals that are left"
    assert read_run_config(ScreenConfig, run / "config.toml") == config, "settings beside --resume count from now on"


def test_one_and_two_workers_agree(samples: Path, hull_file: Path, tmp_path: Path) -> None:
    tables = []
    for workers in (1, 2):
        config = replace(QUICK, stability=True, hull=str(hull_file), workers=workers, chunk=2)
        run = screen(str(samples), config, output=str(tmp_path / str(workers)))
        tables.append((run / "table.csv").read_bytes())
    assert tables[0] == tables[1]


# ---- known truth ----


def test_a_known_crystal_that_relaxes_to_another_is_not_novel(serial: type[SerialEngine], tmp_path: Path) -> None:
    """Atoms thrown into a box match nothing after the relaxation; thrown in they were known."""
    lattice = Lattice.from_parameters(5.2, 5.0, 4.8, 80, 95, 85)
    places = [[0.4, 0.2, 0.09], [0.58, 0.3, 0.67], [0.2, 0.94, 0.37], [0.11, 0.63, 0.93]]
    apart = Structure(lattice, ["Mg", "Mg", "O", "O"], places)
    known = write_csv(tmp_path / "known.csv", {"known": apart})
    config = replace(QUICK, relax=True, known=[str(known)])
    run = screen(str(write_csv(tmp_path / "samples.csv", {"sample": apart})), config)
    row = read_table(run)["sample"]
    assert not StructureMatcher().fit(apart, cfrl.read_crystals(run / "screen.h5").to_structures()[0])
    assert (row["novel"], row["known_as"]) == ("0", "known")


def test_overlap_is_counted_in_covalent_radii() -> None:
    """Na-Cl: 0.7 of 1.66 + 1.02 A is 1.88 A, half a cubic cell of 3.75 A; caesium chloride's corners do not matter."""
    copper = Structure.from_spacegroup("Pm-3m", Lattice.cubic(1.8), ["Cu"], [[0, 0, 0]])  # meets its own images
    records = stages.check([rock_salt("Na", "Cl", 3.8), rock_salt("Na", "Cl", 3.7), copper], stages.ANY, 0.01)
    assert [record["no_overlap"] for record in records] == [True, False, False]


def test_wilson_interval_against_published_numbers() -> None:
    """Newcombe, Stat. Med. 17, 857 (1998), table I, method 3."""
    for count, total, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = rate("valid", count, total)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_materials_project_crystals_as_if_generated(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 known crystals and 20 of them again: nothing novel, 200 unique, the database's stability."""
    monkeypatch.setattr(screening, "make_engine", SerialEngine)
    csv.field_size_limit(10**9)
    with gzip.open(shared / "data" / "mp_20.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))[::60][:200]
    paths = tmp_path / "samples.csv", tmp_path / "known.csv"
    for path, chosen in zip(paths, (rows + rows[::10], rows), strict=True):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(chosen)
    config = ScreenConfig(
        relax=False, report=False, workers=1, known=[str(paths[1])], hull=str(shared / "data" / "mp_energies.csv.gz")
    )
    run = screen(str(paths[0]), config, output=str(tmp_path / "run"))
    rates = {r["name"]: r for r in json.loads((run / "summary.json").read_text())["rates"]}
    assert rates["valid"]["count"] == 220
    assert rates["unique"]["count"] == 200
    assert rates["novel"]["count"] == 0
    columns = read_columns(run / "screen.h5")
    error = np.abs(columns["e_above_hull"] - columns["input_e_above_hull"])
    assert np.isfinite(error).sum() > 180
    assert np.nanmedian(error) < 0.030

"""DFT out and in: inputs are right for metals and insulators, results come back as they were, on one energy scale."""

import gzip
import json
import re
import runpy
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from pymatgen.core import Lattice, Structure
from pymatgen.entries.compatibility import MaterialsProject2020Compatibility
from pymatgen.io.vasp import Incar, Poscar
from pymatgen.io.vasp.outputs import Vasprun

import cfrl
from cfrl.commands.data import run_import
from cfrl.commands.data_hull import build_hull
from cfrl.commands.rewards_train import read_targets, run_train
from cfrl.config import DataConfig, PredictorConfig
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import UserError
from cfrl.io.storage import read_columns
from cfrl.potentials import load_potential
from cfrl.potentials.scales import mp2020_correction
from cfrl.rewards.predictors import load_predictor
from cfrl.screening.dft import KINDS, Candidate, believed_gap, read_pseudos, write_inputs
from cfrl.stability.hull import ReferenceHull
from tests.calculations import espresso, outcar, vasprun


def crystal(group: str, length: float, species: list[str], sites: list[list[float]]) -> Structure:
    return Structure.from_spacegroup(group, Lattice.cubic(length), species, sites)


CENTER, EDGE = [0.5, 0.5, 0.5], [0.5, 0.5, 0.0]
SALT = crystal("Fm-3m", 5.6, ["Na", "Cl"], [[0, 0, 0], CENTER])
COPPER = crystal("Fm-3m", 3.6, ["Cu"], [[0, 0, 0]])
WUSTITE = crystal("Fm-3m", 4.3, ["Fe", "O"], [[0, 0, 0], CENTER])
TITANATE = crystal("Pm-3m", 3.9, ["Sr", "Ti", "O"], [[0, 0, 0], CENTER, EDGE])
FLUORITE = crystal("Fm-3m", 5.46, ["Ca", "F"], [[0, 0, 0], [0.25, 0.25, 0.25]])
CRYSTALS = {"1-NaCl": SALT, "2-Cu": COPPER, "3-FeO": WUSTITE, "4-SrTiO3": TITANATE}
GAPS = {"1-NaCl": 5.0, "2-Cu": 0.0, "3-FeO": None, "4-SrTiO3": 1.8}
ONE = DataConfig(workers=1)


def results(inputs: list[Path | str], output: Path, **settings: str) -> tuple[cfrl.CrystalBatch, dict]:
    run_import([str(path) for path in inputs], output, DataConfig(workers=1, **settings))
    return cfrl.read_crystals(output), read_columns(output)


# ---- out ----


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind; no warning of a library may leave it."""
    candidates = [Candidate(name, f"row {name}", CRYSTALS[name], GAPS[name]) for name in CRYSTALS]
    folders = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for kind in KINDS:
            folders[kind] = tmp_path_factory.mktemp(kind)
            write_inputs(candidates, folders[kind], kind, {})
    return folders


def test_metals_have_no_tetrahedra(inputs: dict[str, Path]) -> None:
    for kind in ("pbe", "scan"):
        incar = {name: Incar.from_file(inputs[kind] / name / "INCAR") for name in CRYSTALS}
        assert incar["2-Cu"]["ISMEAR"] > 0, "Methfessel-Paxton for what is known to be a metal"
        assert (incar["3-FeO"]["ISMEAR"], incar["3-FeO"]["SIGMA"]) == (0, 0.05), "unknown: right for metals too"
        assert incar["1-NaCl"]["ISMEAR"] == incar["4-SrTiO3"]["ISMEAR"] == -5
    assert Incar.from_file(inputs["scan"] / "1-NaCl" / "INCAR")["METAGGA"] == "R2scan"


@pytest.mark.parametrize(
    ("structure", "gap", "spread", "believed"),
    [
        (SALT, 5.0, 0.5, 5.0),
        (SALT, 0.4, 0.5, None),
        (SALT, np.nan, np.nan, None),
        (SALT, 0.01, 0.3, 0.0),
        (SALT, 5.0, np.nan, 5.0),
        (COPPER, 3.0, 0.1, 0.0),
    ],
)
def test_a_gap_counts_where_it_is_sure(structure: Structure, gap: float, spread: float, believed: float | None) -> None:
    assert believed_gap(structure, gap, spread) == believed


def test_settings_are_the_materials_projects(inputs: dict[str, Path]) -> None:
    incar = Incar.from_file(inputs["pbe"] / "3-FeO" / "INCAR")
    assert (incar["ENCUT"], incar["LDAUU"], incar["ISIF"]) == (520, [5.3, 0], 3)
    assert (inputs["pbe"] / "3-FeO" / "POTCAR.spec").read_text().split() == ["Fe_pv", "O"]
    noted = {note["name"]: note for note in json.loads((inputs["pbe"] / "inputs.json").read_text())}
    assert noted["3-FeO"]["id"] == "row 3-FeO"
    assert noted["3-FeO"]["mp2020_correction"] == pytest.approx((-0.687 - 2.256) / 2), "of an oxide, and of Fe with U"
    assert noted["2-Cu"]["mp2020_correction"] == 0
    assert "--corrections mp2020" in (inputs["pbe"] / "README.md").read_text()
    assert "--corrections" not in (inputs["scan"] / "README.md").read_text()


def test_dielectric_response_of_insulators_only(inputs: dict[str, Path]) -> None:
    incar = Incar.from_file(inputs["dielectric"] / "4-SrTiO3" / "dielectric" / "INCAR")
    assert (incar["LEPSILON"], incar["IBRION"], incar["ISMEAR"]) == (True, 8, 0)
    assert Incar.from_file(inputs["dielectric"] / "4-SrTiO3" / "relax" / "INCAR")["NSW"] > 1
    assert not (inputs["dielectric"] / "2-Cu" / "dielectric").exists()


def test_exported_crystals_are_the_same(inputs: dict[str, Path]) -> None:
    expected = fingerprints(cfrl.CrystalBatch.from_structures(list(CRYSTALS.values())))
    for kind, name in (("pbe", "POSCAR"), ("scan", "POSCAR"), ("atomate2", "POSCAR"), ("dielectric", "relax/POSCAR")):
        found = [Poscar.from_file(inputs[kind] / crystal / name).structure for crystal in CRYSTALS]
        assert fingerprints(cfrl.CrystalBatch.from_structures(found)) == expected
    atoms = [ase.io.read(inputs["qe"] / name / "pw.in", format="espresso-in") for name in CRYSTALS]
    found = [Structure(a.cell.array, list(a.symbols), a.get_scaled_positions()) for a in atoms]
    assert fingerprints(cfrl.CrystalBatch.from_structures(found)) == expected
    volumes = [structure.get_primitive_structure().volume for structure in CRYSTALS.values()]
    assert [structure.volume for structure in found] == pytest.approx(volumes, rel=1e-6)


def test_espresso_takes_names_and_cutoffs_from_the_library(tmp_path: Path) -> None:
    table = {
        "Na": {"filename": "na_pbe_v1.5.uspp.F.UPF", "cutoff_wfc": 40.0, "cutoff_rho": 320.0},
        "Cl": {"filename": "Cl.pbe-n-rrkjus_psl.1.0.0.UPF", "cutoff_wfc": 50, "cutoff_rho": 200},
        "Fe": {"filename": "Fe.upf", "cutoff_wfc": 90.0, "cutoff_rho": 1080.0},
    }
    (tmp_path / "sssp.json").write_text(json.dumps(table))
    chosen = [Candidate(name, name, CRYSTALS[name], GAPS[name]) for name in ("1-NaCl", "3-FeO")]
    write_inputs(chosen, tmp_path, "qe", read_pseudos(str(tmp_path / "sssp.json")))
    text = (tmp_path / "1-NaCl" / "pw.in").read_text()
    for line in (
        "ecutwfc          = 50",
        "ecutrho          = 320.0",
        "nspin            = 1",
        "degauss          = 0.002",
    ):
        assert line in text
    assert "na_pbe_v1.5.uspp.F.UPF" in text
    assert not (tmp_path / "3-FeO").exists()
    notes = json.loads((tmp_path / "inputs.json").read_text())
    assert [note["problem"] for note in notes] == ["", "no inputs: no pseudopotential of O in the table"]


def test_spins_and_smearing_of_espresso(inputs: dict[str, Path]) -> None:
    text = (inputs["qe"] / "3-FeO" / "pw.in").read_text()
    assert "nspin            = 2" in text
    assert "smearing         = 'marzari-vanderbilt'" in text, "a gap that is not known"


def test_an_element_without_potcar_stops_no_other(tmp_path: Path) -> None:
    californium = crystal("Fm-3m", 4.9, ["Cf", "O"], [[0, 0, 0], CENTER])
    write_inputs([Candidate("1-CfO", "a", californium), Candidate("2-NaCl", "b", SALT, 5.0)], tmp_path, "pbe", {})
    notes = json.loads((tmp_path / "inputs.json").read_text())
    assert [note["problem"] for note in notes] == ["no inputs: MPRelaxSet has no POTCAR for Cf", ""]
    assert (tmp_path / "2-NaCl" / "INCAR").exists()
    assert not (tmp_path / "1-CfO").exists()


@pytest.mark.parametrize("text", ["[1, 2]", "{}", '{"Na": {"filename": "x"}}', "no json"])
def test_tables_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=r"t\.json"):
        read_pseudos(str(tmp_path / "t.json"))


def test_the_flow_is_a_script_that_jobflow_takes(inputs: dict[str, Path]) -> None:
    """That it makes flows is tested where atomate2 is installed; everywhere, that it is Python."""
    script = inputs["atomate2"] / "flow.py"
    compile(script.read_text(), str(script), "exec")
    pytest.importorskip("atomate2")
    flows = runpy.run_path(str(script))["flows"]()
    assert [flow.name for flow in flows] == list(CRYSTALS)
    assert all(len(flow.jobs) == 2 for flow in flows), "a double relaxation, and a static calculation"


# ---- in ----


@pytest.fixture(scope="module")
def calculated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `--dft pbe` when VASP has been there: two are done, one is not converged, one was cut off."""
    folder = tmp_path_factory.mktemp("calculated")
    write_inputs([Candidate(n, n, CRYSTALS[n], GAPS[n]) for n in CRYSTALS], folder, "pbe", {})
    parts = {name: Poscar.from_file(folder / name / "POSCAR").structure for name in CRYSTALS}
    salt = vasprun(parts["1-NaCl"], -6.79, gap=5.1, potcars=["PAW_PBE Na_pv 19Sep2006", "PAW_PBE Cl 06Sep2000"][::-1])
    (folder / "1-NaCl" / "vasprun.xml.gz").write_bytes(gzip.compress(salt.encode("latin-1")))
    (folder / "1-NaCl" / "OUTCAR").write_text(outcar(parts["1-NaCl"], -99.0))
    (folder / "2-Cu" / "vasprun.xml").write_text(vasprun(parts["2-Cu"], -3.7, steps=60))
    iron = ["PAW_PBE Fe_pv 06Sep2000", "PAW_PBE O 08Apr2002"]
    (folder / "3-FeO" / "vasprun.xml").write_text(vasprun(parts["3-FeO"], -14.2, hubbards=[5.3, 0], potcars=iron))
    (folder / "4-SrTiO3" / "vasprun.xml").write_text(vasprun(parts["4-SrTiO3"], -40.0)[:2500])
    return folder


def test_a_folder_of_calculations(calculated: Path, tmp_path: Path) -> None:
    crystals, columns = results([calculated], tmp_path / "r.h5")
    assert crystals.ids == ["1-NaCl", "3-FeO"], "named after their folders, each read once"
    assert fingerprints(crystals) == fingerprints(cfrl.CrystalBatch.from_structures([SALT, WUSTITE]))
    assert columns["energy_per_atom"] == pytest.approx([-3.395, -7.1])
    assert columns["band_gap"] == pytest.approx([5.1, 0.0]), "bands that cross the Fermi level make a metal"
    assert columns["max_force"] == pytest.approx([0.01, 0.01])
    assert columns["pressure"] == pytest.approx([0.5, 0.5])
    assert columns["converged"].tolist() == [1, 1]
    assert columns["energy_scale"].tolist() == ["mp-raw", "mp-raw"]
    dropped = (tmp_path / "r.dropped.csv").read_text()
    assert "not converged: the electronic steps ran out" in dropped
    assert "no finished vasprun.xml" in dropped


def test_corrections_are_pymatgens(tmp_path: Path) -> None:
    """Against `process_entry` of what pymatgen itself reads from the same files."""
    peroxide = Structure(
        Lattice.cubic(5.0), ["Li", "Li", "O", "O"], [[0, 0, 0], CENTER, [0.25, 0.25, 0.25], [0.5, 0.4, 0.25]]
    )
    known = {
        "salt": (SALT, (), ["Na_pv", "Cl"]),
        "iron": (WUSTITE, (5.3, 0.0), ["Fe_pv", "O"]),
        "titanate": (TITANATE, (), ["Sr_sv", "Ti_pv", "O"]),
        "fluorite": (FLUORITE, (), ["Ca_sv", "F"]),
        "copper": (COPPER, (), ["Cu_pv"]),
        "peroxide": (peroxide, (), ["Li_sv", "O"]),
    }
    expected = {}
    for name, (structure, hubbards, potcars) in known.items():
        path = tmp_path / name / "vasprun.xml"
        path.parent.mkdir()
        path.write_text(
            vasprun(
                structure, -5.0 * len(structure), hubbards=hubbards, potcars=[f"PAW_PBE {p} 1Jan2000" for p in potcars]
            )
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry = Vasprun(path, parse_dos=False, parse_potcar_file=False).get_computed_entry(entry_id=name)
            entry.parameters["run_type"] = "GGA+U" if hubbards else "GGA"  # "PBE" where the INCAR names it
            expected[name] = MaterialsProject2020Compatibility().process_entry(entry).energy_per_atom
    crystals, columns = results([tmp_path], tmp_path / "r.h5", corrections="mp2020")
    assert dict(zip(crystals.ids, columns["energy_per_atom"], strict=True)) == pytest.approx(expected, abs=1e-6)
    assert set(columns["energy_scale"]) == {"mp2020"}
    assert expected["peroxide"] > -5.0 - 0.687 / 2, "a peroxide is corrected by less than an oxide"


def test_other_settings_are_not_corrected(tmp_path: Path) -> None:
    for name, potcars, hubbards in (
        ("good", ["Fe_pv", "O"], (5.3, 0.0)),
        ("no U", ["Fe_pv", "O"], ()),
        ("other POTCAR", ["Fe", "O"], (5.3, 0.0)),
    ):
        (tmp_path / name).mkdir()
        titles = [f"PAW_PBE {p} 1Jan2000" for p in potcars]
        (tmp_path / name / "vasprun.xml").write_text(vasprun(WUSTITE, -56.0, hubbards=hubbards, potcars=titles))
    crystals, columns = results([tmp_path], tmp_path / "r.h5", corrections="mp2020")
    assert crystals.ids == ["good"]
    assert columns["energy_per_atom"] == pytest.approx(-7.0 + mp2020_correction(WUSTITE))
    assert (tmp_path / "r.dropped.csv").read_text().count("no MP2020 correction") == 2


def test_outcar(tmp_path: Path) -> None:
    (tmp_path / "OUTCAR.gz").write_bytes(gzip.compress(outcar(WUSTITE, -56.8, u=5.3).encode()))
    crystals, columns = results([tmp_path / "OUTCAR.gz"], tmp_path / "r.h5")
    assert fingerprints(crystals) == fingerprints(cfrl.CrystalBatch.from_structures([WUSTITE]))
    assert columns["energy_per_atom"] == pytest.approx(-7.1)
    assert (columns["run_type"][0], columns["hubbards"][0]) == ("GGA+U", "Fe 5.3")
    assert (columns["max_force"][0], columns["pressure"][0]) == pytest.approx((0.02, 0.5))
    (tmp_path / "OUTCAR").write_text(outcar(WUSTITE, -56.8, converged=False))
    with pytest.raises(UserError, match="not converged"):
        results([tmp_path / "OUTCAR"], tmp_path / "s.h5")


def test_espresso(tmp_path: Path) -> None:
    (tmp_path / "out" / "2-NaCl.save").mkdir(parents=True)
    text = espresso(SALT, -4 * 3310.0, prefix="2-NaCl", gap=5.2)
    (tmp_path / "out" / "2-NaCl.xml").write_text(text)
    (tmp_path / "out" / "2-NaCl.save" / "data-file-schema.xml").write_text(text)
    (tmp_path / "Cu").mkdir()
    (tmp_path / "Cu" / "data-file-schema.xml").write_text(espresso(COPPER, -4 * 2900.0))
    (tmp_path / "Cu" / "other.xml").write_text(espresso(COPPER, -4 * 2900.0, done=False))
    crystals, columns = results([tmp_path], tmp_path / "r.h5")
    assert crystals.ids == ["Cu", "2-NaCl"]
    assert fingerprints(crystals) == fingerprints(cfrl.CrystalBatch.from_structures([COPPER, SALT]))
    assert columns["energy_per_atom"] == pytest.approx([-2900, -1655])
    assert columns["band_gap"] == pytest.approx([0, 5.2])
    assert (columns["max_force"][1], columns["pressure"][1]) == pytest.approx((0.02, 0.5), rel=1e-5)
    assert set(columns["energy_scale"]) == {"qe-pbe"}
    assert "not converged" in (tmp_path / "r.dropped.csv").read_text()


def test_dielectric_tensors(tmp_path: Path) -> None:
    for step, epsilon in (("relax", None), ("dielectric", 2.4)):
        (tmp_path / "1-NaCl" / step).mkdir(parents=True)
        (tmp_path / "1-NaCl" / step / "vasprun.xml").write_text(vasprun(SALT, -27.0, gap=5.0, epsilon=epsilon))
    crystals, columns = results([tmp_path], tmp_path / "r.h5")
    assert crystals.ids == ["1-NaCl-dielectric", "1-NaCl-relax"]
    assert columns["eps_electronic"][0] == pytest.approx(2.4)
    assert columns["eps_total"][0] == pytest.approx(4.8)
    assert np.isnan(columns["eps_total"][1])


def relaxation(structure: Structure, energies: list[float]) -> list[ase.Atoms]:
    frames = []
    for energy in energies:
        atoms = structure.to_ase_atoms(msonable=False)
        forces = np.zeros((len(atoms), 3))
        forces[0, 1] = 0.03
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=np.zeros(6))
        frames.append(atoms)
    return frames


def test_trajectories_end_where_they_end(tmp_path: Path) -> None:
    frames = relaxation(SALT, [-20.0, -25.0, -27.0]) + relaxation(WUSTITE, [-50.0, -56.0])
    ase.io.write(tmp_path / "a.traj", frames)
    crystals, columns = results([tmp_path / "a.traj"], tmp_path / "r.h5")
    assert crystals.formulas() == ["NaCl", "FeO"]
    assert columns["energy_per_atom"] == pytest.approx([-27 / 8, -7])
    assert columns["max_force"] == pytest.approx([0.03, 0.03])
    assert "energy_scale" not in columns, "nobody knows"


def test_databases_of_ase_in_a_zip(tmp_path: Path) -> None:
    from ase.db import connect

    with connect(tmp_path / "a.db") as database:
        for structure, energy, gap in ((SALT, -27.0, 5.0), (COPPER, -14.8, 0.0)):
            database.write(relaxation(structure, [energy])[0], gap=gap, source="test")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.db", "inner/a.db")
    for file in ("a.db", "a.zip"):
        crystals, columns = results([tmp_path / file], tmp_path / "r.h5", energy_scale="mp2020")
        assert crystals.formulas() == ["NaCl", "Cu"]
        assert columns["gap"].tolist() == [5, 0]
        assert columns["energy_per_atom"] == pytest.approx([-27 / 8, -3.7])
        assert set(columns["energy_scale"]) == {"mp2020"}


def test_poscar_by_its_name_and_extxyz_per_atom(tmp_path: Path) -> None:
    (tmp_path / "NaCl").mkdir()
    for name in ("POSCAR", "CONTCAR"):
        SALT.to(tmp_path / "NaCl" / name, fmt="poscar")
    (tmp_path / "POSCAR_7").write_text(COPPER.to(fmt="poscar"))
    ase.io.write(tmp_path / "x.extxyz", relaxation(WUSTITE, [-56.0]))
    crystals, columns = results([tmp_path], tmp_path / "r.h5")
    assert dict(zip(crystals.formulas(), crystals.ids, strict=True)) == {"NaCl": "NaCl", "Cu": "POSCAR_7", "FeO": "x-1"}
    energy = dict(zip(crystals.formulas(), columns["energy_per_atom"], strict=True))
    assert energy["FeO"] == pytest.approx(-7)
    assert np.isnan(energy["NaCl"])


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (
            {"a/vasprun.xml": vasprun(SALT, -27.0), "b/vasprun.xml": vasprun(SALT, -40.0, metagga="R2SCAN")},
            {},
            "mp-raw.*r2scan",
        ),
        ({"a/vasprun.xml": vasprun(SALT, -27.0), "b/OUTCAR": outcar(SALT, -27e3)}, {}, "lies between"),
        ({"a/vasprun.xml": vasprun(SALT, -27.0, metagga="R2SCAN")}, {"corrections": "mp2020"}, "r2scan: leave it out"),
        ({"a.vasp": SALT.to(fmt="poscar")}, {"corrections": "mp2020"}, "no column energy_per_atom"),
        ({"a.xml": "<html/>", "b.xml": "<modeling>"}, {}, "neither a vasprun"),
        ({"a.traj": "nonsense"}, {}, "not a readable trajectory"),
        ({"a.db": "nonsense"}, {}, "not a readable database"),
        ({"OUTCAR": "EDIFF is reached aborting loop because EDIFF is reached"}, {}, "no finished OUTCAR"),
        ({"x.xml": espresso(SALT, -27.0)[:900]}, {}, "no finished calculation of Quantum ESPRESSO"),
    ],
)
def test_faults_are_one_line(tmp_path: Path, files: dict[str, str], settings: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    dropped = tmp_path / "r.dropped.csv"
    with pytest.raises(UserError) as error:
        results([tmp_path / "in"], tmp_path / "r.h5", **settings)
    told = str(error.value) + (dropped.read_text() if dropped.exists() else "")
    assert re.search(message, told)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r.h5").exists()


def test_unknown_scales_are_declared(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "a.traj", relaxation(SALT, [-27.0]))
    with pytest.raises(UserError, match="--energy-scale mp-raw"):
        results([tmp_path / "a.traj"], tmp_path / "r.h5", corrections="mp2020")
    _, columns = results([tmp_path / "a.traj"], tmp_path / "r.h5", corrections="mp2020", energy_scale="mp-raw")
    assert columns["energy_per_atom"] == pytest.approx([-27 / 8 + mp2020_correction(SALT)])


# ---- the loop closes ----


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    path = tmp_path / "hull.csv"
    path.write_text(
        "formula,energy_per_atom,scale\n" + "".join(f"{f},{e},gga\n" for f, e in {"Na": -1.3, "Cl": -1.8}.items())
    )
    return path


def test_results_lower_the_hull(calculated: Path, reference: Path, tmp_path: Path) -> None:
    run_import([str(calculated / "1-NaCl")], tmp_path / "r.h5", DataConfig(workers=1, corrections="mp2020"))
    energy = read_columns(tmp_path / "r.h5")["energy_per_atom"][0]
    assert energy == pytest.approx(-3.395 - 0.307)
    hull = build_hull([], tmp_path / "new.h5", add=[str(tmp_path / "r.h5")], hull=str(reference))
    assert hull.e_above_hull(["NaCl"], [energy]).e_above_hull[0] == pytest.approx(0, abs=1e-9)
    assert ReferenceHull.load(tmp_path / "new.h5").e_above_hull(["NaCl"], [energy + 0.1]).e_above_hull[
        0
    ] == pytest.approx(0.1)
    assert ReferenceHull.load(reference).e_above_hull(["NaCl"], [energy]).e_above_hull[0] == pytest.approx(
        energy + 1.55
    )


def test_what_does_not_belong_on_the_hull(calculated: Path, reference: Path, tmp_path: Path) -> None:
    results([calculated], tmp_path / "raw.h5")
    ase.io.write(tmp_path / "a.traj", relaxation(SALT, [-27.0]))
    results([tmp_path / "a.traj"], tmp_path / "unknown.h5")
    ase.io.write(tmp_path / "b.traj", relaxation(SALT, [-27.0 * 8]))  # of the cell, where it should be of an atom
    results([tmp_path / "b.traj"], tmp_path / "cell.h5", energy_scale="mp2020")
    SALT.to(tmp_path / "POSCAR", fmt="poscar")
    results([tmp_path / "POSCAR"], tmp_path / "bare.h5")
    for name, message in (
        ("raw", "import it again with --corrections mp2020"),
        ("unknown", "--energy-scale mp-raw or mp2020"),
        ("cell", "off the hull"),
        ("bare", "no column energy_per_atom"),
    ):
        with pytest.raises(UserError, match=message):
            build_hull([], tmp_path / "new.h5", add=[str(tmp_path / f"{name}.h5")], hull=str(reference))
    with pytest.raises(UserError, match="name datasets"):
        build_hull([], tmp_path / "new.h5", hull=str(reference))
    assert not (tmp_path / "new.h5").exists()


def test_results_are_labels(tmp_path: Path) -> None:
    """What `cfrl rewards train results.h5 --target band_gap` and `--target energy_per_atom` learn from."""
    for i in range(52):
        (tmp_path / f"{i}-NaCl").mkdir()
        strained = SALT.copy()
        strained.scale_lattice(SALT.volume * (1 + i / 100))
        (tmp_path / f"{i}-NaCl" / "vasprun.xml").write_text(vasprun(strained, -27.0 + i / 10, gap=5 - i / 20))
    results([tmp_path], tmp_path / "r.h5")
    structures, values = read_targets([str(tmp_path / "r.h5")], "band_gap", log=False)
    order = np.argsort([structure.volume for structure in structures])
    assert values[order] == pytest.approx(5 - np.arange(52) / 20)
    assert len(read_targets([str(tmp_path / "r.h5")], "energy_per_atom", log=False)[1]) == 52


def test_a_correction_is_learnt_from_few_results(tmp_path: Path) -> None:
    """Another method, whose gaps are wider by 30% and 1 eV in oxides: 60 of them mend most of it."""
    potential = load_potential("chgnet", "cpu")
    crystals = cfrl.load_dataset("prototypes")
    crystals = crystals[(crystals.num_atoms <= 12)][:110]
    structures = crystals.to_structures()
    evaluation = potential.compute(structures, features=True)
    base, _ = load_predictor("band_gap").predict(structures, evaluation)
    oxide = (crystals.species == 8).any(1).numpy()
    truth = 1.3 * base + oxide
    cfrl.write_crystals(tmp_path / "r.h5", crystals[:60], columns={"hse_gap": truth[:60]})
    config = PredictorConfig(
        target="hse_gap", correct="band_gap", unit="eV", hidden=32, folds=2, batch_size=8, device="cpu"
    )
    path = run_train([str(tmp_path / "r.h5")], tmp_path / "hse.safetensors", config)
    predicted, spread = load_predictor(str(path)).predict(structures[60:], evaluation[np.arange(60, len(structures))])
    error = np.abs(predicted - truth[60:])
    assert np.nanmean(error) < 0.6 * np.nanmean(np.abs(base - truth)[60:])
    assert np.nanmin(spread) > 0
    assert "Corrects the embedded predictor `band_gap`" in path.with_suffix(".md").read_text()
    with pytest.raises(UserError, match="with --log"):
        run_train([str(tmp_path / "r.h5")], path, replace(config, correct="eps_total"))


def test_the_loop_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "close_the_loop.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "less error than with random crystals" in done.stdout or "more error" in done.stdout
    assert (tmp_path / "error.png").stat().st_size > 1000

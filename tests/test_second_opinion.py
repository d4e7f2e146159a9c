"""`cfrl screen --judge`: what the second judge says is its own, candidates need both, and its faults cost nothing."""

import csv
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

import cfrl
from cfrl.commands.screen import screen
from cfrl.config import ScreenConfig
from cfrl.errors import UserError
from cfrl.potentials import load_potential
from cfrl.potentials.environments import Environment
from cfrl.potentials.pool import loaded
from cfrl.potentials.relax import relax
from cfrl.stability.hull import ReferenceHull
from tests.test_screen import SerialEngine

OTHER = "chgnet:0.2.0"  # real, at hand, on the hull's scale, and not of one mind with 0.3.0
QUICK = ScreenConfig(relax=False, report=False, workers=1, unique=False, metastable=0.5, allow="element")
SILVER_KILLS = """
import os
from ase.calculators.emt import EMT

class Picky(EMT):
    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        if "Ag" in atoms.get_chemical_symbols() and not os.path.exists("mended"):
            os._exit(1)
        super().calculate(atoms, properties, system_changes)
"""


def cubic(group, species, places, length):
    return Structure.from_spacegroup(group, Lattice.cubic(length), species, places)


def rock_salt(a, b, length):
    return cubic("Fm-3m", [a, b], [[0, 0, 0], [0.5] * 3], length)


def metal(symbol, length):
    return cubic("Fm-3m", [symbol], [[0, 0, 0]], length)


@pytest.fixture(scope="module")
def crystals():
    """From the hull to far above it."""
    pairs = [("Na", "Cl", 5.7), ("Mg", "O", 4.25), ("Li", "F", 4.1), ("Ca", "S", 5.7), ("Ti", "N", 4.25)]
    pairs += [("Na", "Br", 6.2), ("Zn", "O", 4.3), ("Fe", "O", 4.3), ("Mg", "S", 5.5), ("Ga", "As", 5.4)]
    perovskites = [cubic("Pm-3m", [a, "Ti", "O"], [[0] * 3, [0.5] * 3, [0.5, 0.5, 0]], 3.95) for a in ("Sr", "Ba")]
    return [rock_salt(*pair) for pair in pairs] + perovskites


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Writes crystals where `screen` reads them, in an empty folder; it works in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cfrl.commands.screen.make_engine", SerialEngine)
    loaded.cache_clear()

    def write(structures):
        path = tmp_path / "crystals.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["material_id", "cif"])
            rows.writerows([str(i), structure.to(fmt="cif")] for i, structure in enumerate(structures))
        return str(path)

    return write


def read_table(run):
    with (run / "table.csv").open() as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row["id"]))


def distances(structures, name):
    energy = load_potential(name, "cpu").compute(structures).energy
    return ReferenceHull.load().e_above_hull(structures, energy).e_above_hull


def test_candidates_are_what_both_find_metastable(crystals):
    first, second = distances(crystals, "chgnet"), distances(crystals, OTHER)
    apart = int(np.argmax(second - first))
    for threshold in (0.02, 0.1, float(first[apart] + second[apart]) / 2):
        near = first <= threshold
        both = near & (second <= threshold)
        settings = {"relax": False, "metastable": threshold, "judge": OTHER, "judge_steps": 0}
        table = cfrl.screen(crystals, **settings)
        np.testing.assert_allclose(table["judge_e_above_hull"], np.where(near, second, np.nan), atol=1e-4)
        assert (table["candidate"] == 1).tolist() == (both & (table["flagged"] == 0)).tolist()
        alone = cfrl.screen(crystals, **settings, need_both=False)
        assert (alone["candidate"] == 1).tolist() == (near & (alone["flagged"] == 0)).tolist()
    assert both.sum() < near.sum(), "the last threshold lies between what the two say of one crystal"


def test_the_judge_relaxes_a_little_on_its_own(crystals):
    strained = [structure.copy() for structure in crystals[:4]]
    for structure in strained:
        structure.scale_lattice(structure.volume * 1.06)
    table = cfrl.screen(strained, relax=False, metastable=0.5, judge=OTHER, judge_steps=7)
    own = relax(strained, load_potential(OTHER, "cpu"), steps=7)
    np.testing.assert_allclose(table["judge_energy_per_atom"], own.energy, atol=1e-4)
    assert (table["judge_e_above_hull"] < table["e_above_hull"]).all(), "the first left them strained"


def test_summary_and_report_tell_what_both_say(source, crystals):
    config = replace(QUICK, judge=OTHER, judge_steps=0, report=True, metastable=0.1)
    run = screen(source(crystals), config)
    table, summary = read_table(run), json.loads((run / "summary.json").read_text())
    first, second = distances(crystals, "chgnet"), distances(crystals, OTHER)
    near = first <= 0.1
    found = summary["agreement"]
    assert (found["asked"], found["judged"]) == (near.sum(), near.sum())
    assert found["metastable"] == (second[near] <= 0.1).sum()
    assert (found["stable"], found["stable_both"]) == ((first <= 0).sum(), ((first <= 0) & (second <= 0)).sum())
    assert found["difference"] == pytest.approx(np.median((second - first)[near]), abs=1e-4)
    rates = {rate["name"]: rate for rate in summary["rates"]}
    assert rates["metastable, by both"]["count"] == found["metastable"]
    assert "chgnet-0.2.0" in rates["metastable, by both"]["definition"]
    assert summary["funnel"]["by both judges"] == found["metastable"]
    assert "chgnet-0.2.0" in summary["judgement"]
    page = (run / "report.html").read_text()
    assert "Second opinion" in page
    assert summary["opinion"] in page
    assert (run / "plots" / "second-opinion.png").exists()
    assert [row["judge_metastable"] for row in table].count("") == (~near).sum()


def test_without_a_judge_nothing_is_said_of_one(source, crystals):
    run = screen(source(crystals[:2]), QUICK)
    assert not [name for name in read_table(run)[0] if name.startswith("judge")]
    assert "both" not in (run / "summary.json").read_text()


def test_resume_asks_the_judge_only_what_it_has_not_said(source, crystals):
    run = screen(source(crystals[:3]), replace(QUICK, judge=OTHER, judge_steps=0))
    journals = {path.name: path.read_bytes() for path in (run / "stages").iterdir()}
    screen("", replace(QUICK, judge=OTHER, judge_steps=0, need_both=False), resume=run)
    assert {path.name: path.read_bytes() for path in (run / "stages").iterdir()} == journals
    screen("", replace(QUICK, judge=OTHER, judge_steps=2), resume=run)
    new = {path.name for path in (run / "stages").iterdir()} - set(journals)
    assert [name.split("-")[0] for name in new] == ["judge"]


# ---- faults ----


@pytest.fixture
def picky(tmp_path, monkeypatch):
    """A judge whose worker silver kills, until there is a file `mended`."""
    monkeypatch.setenv("CFRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "lib"), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "picky.py").write_text(SILVER_KILLS)
    Environment("ase:picky:Picky", sys.executable, scale="mp2020").save()
    return "ase:picky:Picky"


def test_a_worker_that_dies_marks_its_row_and_no_other(source, picky):
    metals = [metal("Cu", 3.6), metal("Ag", 4.15), metal("Al", 4.05)]
    run = screen(source(metals), replace(QUICK, judge=picky, judge_steps=0, allow="element,sparse_reference"))
    rows = read_table(run)
    assert "worker was lost" in rows[1]["judge_status"]
    assert [row["judge_e_above_hull"] != "" for row in rows] == [True, False, True]
    assert rows[1]["candidate"] == "0", "nobody has said yes twice"
    assert rows[1]["status"] == "", "the first judge's word stands"
    assert "1 could not be judged" in json.loads((run / "summary.json").read_text())["opinion"]


def test_a_worker_that_always_dies_ends_the_run_and_nothing_is_lost(source, picky, tmp_path):
    config = replace(QUICK, judge=picky, judge_steps=0, chunk=6)
    with pytest.raises(UserError, match=r"5 crystals in a row.*cfrl screen --resume runs/") as caught:
        screen(source([metal("Ag", 4.10 + 0.02 * i) for i in range(6)]), config)
    assert "\n" not in str(caught.value)
    run = next((tmp_path / "runs").iterdir())
    before = {path.name: path.read_bytes() for path in (run / "stages").iterdir() if "judge" not in path.name}
    (tmp_path / "mended").touch()
    screen("", config, resume=run)
    assert all(row["judge_energy_per_atom"] for row in read_table(run))
    assert before.items() <= {path.name: path.read_bytes() for path in (run / "stages").iterdir()}.items()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"judge": "sevennet:7net-0"}, "cfrl potentials add sevennet:7net-0"),
        ({"judge": "sevenet"}, "unknown potential 'sevenet'"),
        ({"judge": "chgnet"}, "is the potential itself"),
        ({"judge": "chgnet:r2scan"}, "on the scale r2scan"),
        ({"judge": OTHER, "stability": False}, "leave --stability on"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_told_before_the_work(source, crystals, tmp_path, monkeypatch, change, problem):
    monkeypatch.setenv("CFRL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=problem) as caught:
        screen(source(crystals[:1]), replace(QUICK, **change))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()

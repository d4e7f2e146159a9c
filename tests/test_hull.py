"""Hull distances against pymatgen's PhaseDiagram and against the Materials Project's own."""

import bz2
import csv
import gzip
import json
from itertools import product

import h5py
import numpy as np
import pytest
from scipy.optimize import linprog

from cfrl.crystals.compositions import fractions
from cfrl.crystals.elements import ATOMIC_NUMBERS
from cfrl.errors import UserError
from cfrl.stability.hull import ReferenceHull

SYMBOLS = ["Li", "Fe", "P", "O", "Na", "U", "Cl"]  # U lies beyond bit 64 of a chemical system


def random_phases(symbols, n, seed):
    """n random compounds within up to len(symbols) elements, and one phase of each element."""
    rng = np.random.default_rng(seed)
    amounts = rng.integers(0, 5, (n, len(symbols))) * (rng.random((n, len(symbols))) < 0.6)
    amounts = amounts[amounts.sum(1) > 0]
    formulas = list(symbols)
    formulas += ["".join(f"{s}{a}" for s, a in zip(symbols, row, strict=True) if a) for row in amounts]
    mixing = -2.0 * (1 - (amounts / amounts.sum(1, keepdims=True)).max(1))
    energies = np.concatenate([rng.normal(-4, 1, len(symbols)), mixing - 4 + rng.normal(0, 1, len(amounts))])
    return formulas, energies


def pymatgen_distances(formulas, energies, queries, query_energies):
    from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
    from pymatgen.core import Composition

    compositions = [Composition(f) for f in formulas]
    entries = [PDEntry(c, e * c.num_atoms) for c, e in zip(compositions, energies, strict=True)]
    diagram = PhaseDiagram(entries)
    hull = [diagram.get_hull_energy_per_atom(Composition(q)) for q in queries]
    return np.asarray(query_energies) - np.array(hull)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_distances_agree_with_pymatgen(k):
    symbols = SYMBOLS[-k:]
    formulas, energies = random_phases(symbols, 40, seed=k)
    queries, query_energies = random_phases(symbols, 30, seed=100 + k)
    result = ReferenceHull.from_compositions(formulas, energies).e_above_hull(queries, query_energies)
    expected = pymatgen_distances(formulas, energies, queries, query_energies)
    np.testing.assert_allclose(result.e_above_hull, expected, atol=1e-7)
    assert (result.e_above_hull < -0.01).any() or k == 1
    assert result.status == [""] * len(queries)


def test_distances_at_the_phases_themselves_are_those_of_a_linear_program():
    """Where a composition is a phase's own, all other amounts in its mixture are zero: many bases, one vertex."""
    formulas, energies = random_phases(SYMBOLS[:5], 300, seed=3)
    hull = ReferenceHull.from_compositions(formulas, energies)
    result = hull.e_above_hull(formulas, energies)
    shares = fractions(formulas)[0]
    cheapest = [linprog(energies, A_eq=shares.T, b_eq=point, method="highs").fun for point in shares]
    np.testing.assert_allclose(result.e_above_hull, energies - cheapest, atol=1e-9)


def test_counts_only_phases_of_the_chemical_system():
    hull = ReferenceHull.from_compositions(["Li", "O", "Li2O", "Fe", "FeO", "Li2O2"], [-2, -5, -5, -8, -7, -4])
    result = hull.e_above_hull(["LiO", "Fe", "LiFeO2"], [-4.0, -8.5, -7.0])
    assert result.num_references.tolist() == [4, 1, 6]
    # LiO sits between Li2O (x_O = 1/3) and O: -5 on both ends, above it by 1; Fe half an eV below its reference
    np.testing.assert_allclose(result.e_above_hull[:2], [1.0, -0.5])


def test_a_system_without_compounds_is_the_line_between_its_elements():
    hull = ReferenceHull.from_compositions(["Li", "Fe", "LiFe"], [-2.0, -8.0, -4.0])
    np.testing.assert_allclose(hull.e_above_hull(["LiFe3"], [-6.0]).e_above_hull, [0.5])


def test_trouble_is_a_status_of_that_crystal_alone():
    hull = ReferenceHull.from_compositions(["Li", "O", "Li2O"], [-2, -5, -5])
    result = hull.e_above_hull(["Li2O", "LiXe", "CsXeO", "nonsense!", "Li2O", ""], [-5, -1, -1, -1, np.nan, -1])
    assert result.status[0] == ""
    assert result.status[1] == "no reference for element Xe"
    assert result.status[2] == "no reference for element Xe, Cs"
    assert "nonsense!" in result.status[3]
    assert result.status[4] == "no energy"
    assert result.status[5]
    assert np.isnan(result.e_above_hull[1:]).all()
    assert result.e_above_hull[0] == pytest.approx(0)


def test_no_crystals_give_no_distances():
    result = ReferenceHull.from_compositions(["Li"], [-2.0]).e_above_hull([], [])
    assert (len(result.e_above_hull), result.status) == (0, [])


def test_compositions_are_read_from_everything_that_has_one():
    from pymatgen.core import Composition, Lattice, Structure

    from cfrl.crystals.crystal import CrystalBatch

    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    array = np.zeros((1, 119))
    array[0, [11, 17]] = 3
    sources = [["NaCl"], ["Na2(Cl)2"], [Composition("NaCl")], [salt], [{"Na": 1, 17: 1}], array]
    for source in [*sources, CrystalBatch.from_structures([salt])]:
        found, status = fractions(source)
        assert status == [""]
        assert found[0, 11] == found[0, 17] == 0.5
        assert found.sum() == 1


def test_reference_survives_a_round_trip_through_hdf5(tmp_path):
    formulas, energies = random_phases(SYMBOLS, 50, seed=0)
    hull = ReferenceHull.from_compositions(formulas, energies, "chgnet-0.3.0")
    hull.save(tmp_path / "hull.h5", {"source": "random"})
    again = ReferenceHull.load(tmp_path / "hull.h5")
    assert again.energy_scale == "chgnet-0.3.0"
    assert again.elements == sorted(ATOMIC_NUMBERS[s] for s in SYMBOLS)
    queries, query_energies = random_phases(SYMBOLS, 20, seed=1)
    first, second = (h.e_above_hull(queries, query_energies).e_above_hull for h in (hull, again))
    assert np.array_equal(first, second)
    with h5py.File(tmp_path / "hull.h5") as file:
        assert file.attrs["source"] == "random"


def test_pruning_keeps_the_hull_where_it_is():
    formulas, energies = random_phases(SYMBOLS[:4], 200, seed=5)
    hull = ReferenceHull.from_compositions(formulas, energies, "x")
    small = hull.near_hull(0.0)
    assert len(small) < len(hull) / 2
    queries, query_energies = random_phases(SYMBOLS[:4], 50, seed=6)
    full, pruned = (h.e_above_hull(queries, query_energies).e_above_hull for h in (hull, small))
    np.testing.assert_allclose(full, pruned, atol=1e-9)


@pytest.mark.parametrize(("suffix", "opener"), [(".json", open), (".json.gz", gzip.open), (".json.bz2", bz2.open)])
@pytest.mark.parametrize("wrapped", [True, False])
def test_computed_entries_are_a_reference(tmp_path, suffix, opener, wrapped):
    from pymatgen.core import Lattice, Structure
    from pymatgen.entries.computed_entries import ComputedEntry, ComputedStructureEntry

    cell = Structure(Lattice.cubic(3), ["O", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    entries = [ComputedEntry("Li2", -4.0), ComputedStructureEntry(cell, -10.0)]
    entries.append(ComputedEntry("Li4O2", -27.0, correction=-3.0))
    data = [e.as_dict() for e in entries]
    path = tmp_path / f"entries{suffix}"
    with opener(path, "wt") as file:
        json.dump({"entries": data} if wrapped else data, file)
    hull = ReferenceHull.load(path, energy_scale="mp2020")
    assert hull.energy_scale == "mp2020"
    np.testing.assert_allclose(hull.e_above_hull(["Li2O"], [-4.9]).e_above_hull, [0.1])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "formula,energy\nLi,-1\n", "energy_per_atom"),
        ("b.csv", "formula,energy_per_atom\nLi,-1\nO,\n", "line 3"),
        ("c.csv", "formula,energy_per_atom\nLi,-1\nXyz,-2\n", "phase 2"),
        ("d.csv", "formula,energy_per_atom\n", "no reference phases"),
        ("e.csv.gz", "plain text", "not a readable CSV file"),
        ("f.json", "{", "not a readable JSON file"),
        ("g.json", '[{"energy": 1.0}]', "entry 1"),
        ("h.json", '{"a": 1}', "list of entries"),
        ("i.h5", "no HDF5", "is not an HDF5 file"),
        ("j.txt", "", ".csv"),
    ],
)
def test_bad_references_are_told_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        ReferenceHull.load(tmp_path / name)
    assert words in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_foreign_hdf5(tmp_path):
    with pytest.raises(UserError, match="no such"):
        ReferenceHull.load(tmp_path / "none.csv")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(UserError, match="not a reference hull"):
        ReferenceHull.load(tmp_path / "other.h5")


def test_mismatch_of_scales_is_told():
    hull = ReferenceHull.from_compositions(["Li"], [-2.0], "mp2020")
    assert hull.mismatch("mp2020") == hull.mismatch("chgnet-0.3.0") == ""
    assert "mace-own" in hull.mismatch("mace-own")
    assert "mp2020" in hull.mismatch("mace-own")
    hull.energy_scale = "chgnet-0.3.0"  # as references were once marked
    assert hull.mismatch("mp2020") == ""


def test_filling_adds_only_compositions_that_are_missing():
    hull = ReferenceHull.from_compositions(["Na", "Cl", "NaCl"], [-1.0, -2.0, -3.0], "chgnet")
    other = ReferenceHull.from_compositions(["Na2Cl2", "NaCl3", "K", "KNaCl2"], [-9.0, -2.5, -1.0, -3.0], "mp")
    filled = hull.filled(other)
    assert len(filled) == 6
    assert filled.energy_scale == "chgnet"
    np.testing.assert_allclose(filled.e_above_hull(["NaCl", "NaCl3", "KNaCl2"], [-3.0, -2.5, -3.0]).e_above_hull, 0)


def test_what_contradicts_own_phases_is_not_filled_in():
    hull = ReferenceHull.from_compositions(["Na", "O", "Na2O", "Na2O2"], [-1.3, -4.9, -3.9, -4.3], "chgnet")
    other = ReferenceHull.from_compositions(["NaO2", "NaO2", "NaO3", "Na3O"], [-6.0, -5.9, -6.0, -3.4], "mp")
    filled = hull.filled(other, tolerance=0.1)
    assert len(filled) == 5  # Na3O, which lowers the hull by less; without superoxides 1.5 eV/atom too deep
    np.testing.assert_allclose(filled.e_above_hull(["Na2O2", "Na3O"], [-4.3, -3.4]).e_above_hull, 0, atol=1e-9)
    assert hull.filled(other).e_above_hull(["Na2O2"], [-4.3]).e_above_hull[0] > 0.5


def test_energies_carried_over_from_another_functional_fill_only_gaps(tmp_path):
    path = tmp_path / "entries.csv"
    rows = ["Na,-1,gga", "Cl,-2,gga", "Na2Cl2,-3,gga", "NaCl,-9,r2scan-shifted", "NaCl3,-2.5,r2scan-shifted"]
    path.write_text("\n".join(["formula,energy_per_atom,scale", *rows]))
    hull = ReferenceHull.load(path)
    assert len(hull) == 4
    np.testing.assert_allclose(hull.e_above_hull(["NaCl", "NaCl3"], [-3.0, -2.5]).e_above_hull, 0, atol=1e-9)


def entries(path, step):
    """Every `step`-th Materials Project entry: (n, 119) shares, energies, and the database's own distances, eV/atom."""
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))[::step]
    energies, database = (np.array([float(r[name]) for r in rows]) for name in ("energy_per_atom", "e_above_hull"))
    return fractions([r["formula"] for r in rows])[0], energies, database


def tails(hull, shares, energies, database):
    """Of oxides, fluorides and others: the share of entries that the hull puts 0.1 eV/atom from where they belong."""
    difference = hull.e_above_hull(shares, energies).e_above_hull - database
    known, oxide, fluoride = np.isfinite(difference), shares[:, 8] > 0, shares[:, 9] > 0
    classes = (oxide, fluoride & ~oxide, ~fluoride & ~oxide)
    return np.array([(np.abs(difference[known & group]) > 0.1).mean() for group in classes])


def test_distances_agree_with_the_materials_project(shared):
    path = shared / "data" / "mp_energies.csv.gz"
    hull = ReferenceHull.load(path, energy_scale="mp2020")
    shares, energies, database = entries(path, 100)
    distance = hull.e_above_hull(shares, energies).e_above_hull
    known = np.isfinite(distance)
    assert known.mean() > 0.97
    assert np.median(np.abs(distance - database)[known]) < 0.005
    assert (tails(hull, shares, energies, database) < 0.01).all()


def test_the_embedded_hull_is_where_the_materials_project_has_it(shared):
    """Filled from wrong energies the oxides' share was 6%, though the median moved by 5 meV/atom alone."""
    found = tails(ReferenceHull.load(), *entries(shared / "data" / "mp_energies.csv.gz", 20))
    assert (found < [0.015, 0.03, 0.05]).all(), found


# Measured enthalpies of formation, kJ/mol (298 K; CRC Handbook, 97th ed.). Wrong superoxides in the filling put Na2O2
# 0.3 to 0.6 eV/atom too deep.
MEASURED = {
    **{"MgO": -601.6, "Al2O3": -1675.7, "SiO2": -910.7, "CaO": -634.9, "ZnO": -350.5, "Fe2O3": -824.2, "V2O5": -1550.6},
    **{"LiF": -616.0, "NaF": -576.6, "CaF2": -1228.0, "KF": -567.3, "NaCl": -411.2, "MgCl2": -641.3, "AlN": -318.0},
    **{"Na2O": -414.2, "Na2O2": -510.9, "KO2": -284.9, "Li2O2": -634.3, "Mg2SiO4": -2174.0, "MgAl2O4": -2299.9},
    **{"Ca3Al2Si3O12": -6640.0, "CaMgSi2O6": -3206.0, "Mg3Al2Si3O12": -6285.0, "Al2SiO5": -2589.0},
}


def test_the_embedded_hull_knows_its_chemistry():
    """Formation energies as measured, but for what corrected DFT and CHGNet err; the gases on MP2020's scale."""
    from pymatgen.core import Composition

    hull = ReferenceHull.load()

    def energy(formula):
        return -hull.e_above_hull([formula], [0.0]).e_above_hull[0]

    assert energy("O") == pytest.approx(-4.948, abs=0.03)
    assert energy("F") == pytest.approx(-1.911, abs=0.15)
    for formula, enthalpy in MEASURED.items():
        composition = Composition(formula)
        pure = sum(amount * energy(str(element)) for element, amount in composition.items())
        measured = enthalpy / 96.485 / composition.num_atoms
        assert energy(formula) - pure / composition.num_atoms == pytest.approx(measured, abs=0.16), formula


def test_every_subset_of_a_large_system_counts():
    """13 elements: subsets are no longer looked up one by one."""
    from cfrl.crystals.elements import SYMBOLS as ALL

    symbols = ALL[11:24]
    pairs = [a + b for a, b in product(symbols, symbols) if a < b]
    hull = ReferenceHull.from_compositions([*symbols, *pairs], [-1.0] * 13 + [-1.5] * len(pairs))
    result = hull.e_above_hull(["".join(symbols)], [-1.0])
    assert result.num_references[0] == 13 + len(pairs)
    np.testing.assert_allclose(result.e_above_hull, [0.5])


def test_incredible_distances_become_a_status():
    hull = ReferenceHull.from_compositions(["Na", "Cl", "NaCl"], [0.0, 0.0, -1.0])
    result = hull.e_above_hull(["NaCl", "NaCl", "NaCl2"], [-1.2, -30.0, 0.0]).credible()
    assert result.e_above_hull[0] == pytest.approx(-0.2)
    assert np.isnan(result.e_above_hull[1])
    assert result.status[0] == result.status[2] == ""
    assert result.status[1] == "29.0 eV/atom below the hull: its energy, or the reference, must be at fault"


def test_doubt_falls_with_what_is_known_and_is_none_for_elements():
    salts = ["Na", "Cl", "K", "NaCl", "NaCl", "Na2Cl"]
    hull = ReferenceHull.from_compositions(salts, [0.0, 0.0, 0.0, -1.0, -0.9, -0.1], "x")
    doubt = hull.e_above_hull(["Na", "NaK", "NaCl3", "NaKCl"], np.zeros(4)).doubt
    expected = [0.0, 0.1 / 0.36, 0.1 / 2.36, 0.1 / (2 / 3 + 0.36)]  # polymorphs count once
    assert doubt.tolist() == pytest.approx(expected)


def test_doubt_is_the_gap_to_a_fuller_reference(shared):
    """Half of the Materials Project's compounds forgotten: how far the hull was too high at the forgotten ones."""
    full = ReferenceHull.load(shared / "data" / "mp_energies.csv.gz")
    pure = (full.numbers > 0).sum(1) == 1
    known = pure | (np.random.default_rng(0).random(len(full)) < 0.5)
    half = ReferenceHull(full.numbers[known], full.fractions[known], full.energies[known])
    rows = np.random.default_rng(1).choice(np.flatnonzero(~known), 400, replace=False)
    compositions = full._dense()[rows]
    low, high = (hull.e_above_hull(compositions, np.zeros(400)) for hull in (full, half))
    known = np.isfinite(low.e_above_hull)  # a few hold xenon or neptunium, which have no elemental reference
    gap, doubt = (low.e_above_hull - high.e_above_hull)[known], high.doubt[known]
    assert known.mean() > 0.98
    assert (gap > -1e-9).all()
    assert gap[doubt > np.median(doubt)].mean() > 1.3 * gap[doubt <= np.median(doubt)].mean()
    assert 1 / 3 < doubt.mean() / gap.mean() < 3


def test_a_reference_knows_its_compositions_however_they_are_written() -> None:
    hull = ReferenceHull.from_compositions(["BaTiO3", "Fe", "Sc150Zn"], [0.0, 0.0, 0.0])
    found = hull.knows(["Ti2Ba2O6", "BaTi(O)3", "Fe4", "TiO2", "Ba", "Sc151Zn", "Sc300Zn2", "Au"])
    assert found.tolist() == [True, True, True, False, False, False, True, False]

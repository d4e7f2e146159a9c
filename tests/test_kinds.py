"""Kinds of crystals, formulas that are known, and what a model's crystals are made of."""

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

import cfrl
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.kinds import CLASSES, anion_of, kinds, shares, without_lanthanide_swaps
from cfrl.crystals.known import KnownFormulas
from cfrl.rl.makeup import compared, halved, makeup


def rock_salt(a: str, b: str) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.0), [a, b], [[0, 0, 0], [0.5] * 3])


def perovskite(a: str, b: str, x: str) -> Structure:
    sites = [[0.5] * 3, [0, 0, 0], [0.5, 0, 0]]
    return Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.0), [a, b, x], sites)


@pytest.fixture(scope="module")
def crystals() -> cfrl.CrystalBatch:
    copper = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0, 0, 0]])
    several = [rock_salt("Na", "Cl"), perovskite("Ba", "Ti", "O"), perovskite("Cs", "Pb", "Br"), copper]
    return cfrl.CrystalBatch.from_structures([*several, rock_salt("La", "As"), rock_salt("Ni", "Al")])


def test_kinds_of_what_a_chemist_knows(crystals):
    found = {name: [CLASSES[name][k] for k in labels] for name, labels in kinds(crystals).items()}
    assert found["elements"] == [
        *("2 elements", "3 elements", "3 elements", "1 element", "2 elements", "2 elements"),
    ]
    assert found["anion"] == ["halide", "oxide", "halide", "intermetallic", "pnictide", "intermetallic"]
    assert [anion_of(formula) for formula in crystals.formulas()] == found["anion"]
    assert found["sites"] == ["2 sites", "3 sites", "3 sites", "1 site", "2 sites", "2 sites"]


def test_every_number_of_sites_and_elements_has_its_class():
    sites = torch.arange(1, 21)
    species = torch.where(torch.arange(20)[None] < sites[:, None], torch.arange(3, 23)[None], 0)
    wyckoff = (species > 0).long()
    batch = cfrl.CrystalBatch(
        torch.ones(20, dtype=torch.long), wyckoff, species, torch.zeros(20, 20, 3), torch.ones(20, 6)
    )
    found = kinds(batch)
    assert [CLASSES["sites"][k] for k in found["sites"]] == [
        *("1 site", "2 sites", "3 sites", "4 sites", "5 or 6", "5 or 6", "7 or 8", "7 or 8"),
        *["9 or more"] * 12,
    ]
    assert [CLASSES["elements"][k] for k in found["elements"]][:5] == [
        *("1 element", "2 elements", "3 elements", "4 or more", "4 or more"),
    ]


def test_shares_add_up_and_count_weights():
    labels = np.array([0, 0, 1, 4])
    assert shares(labels, "anion").tolist() == [0.5, 0.25, 0, 0, 0.25]
    assert shares(labels, "anion", np.array([0, 0, 1, 1])).tolist() == [0, 0.5, 0, 0, 0.5]
    assert shares(labels[:0], "anion").tolist() == [0] * 5


def test_neighbouring_lanthanides_make_near_copies():
    batch = cfrl.CrystalBatch.from_structures([rock_salt(m, "N") for m in ("Ce", "Gd", "Lu", "Y")])
    assert len(set(fingerprints(batch))) == 4
    keys = fingerprints(without_lanthanide_swaps(batch))
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_known_formulas_hold_what_they_were_made_of(tmp_path):
    known = KnownFormulas.of(["NaCl", "BaTiO3", "NaCl"])
    assert len(known) == 2
    assert known.holds(["BaTiO3", "NaClO", "NaCl", "TiBaO3"]).tolist() == [True, False, True, False]
    known.save(tmp_path / "known.npy")
    assert np.array_equal(np.load(tmp_path / "known.npy"), known.hashes)


def test_the_embedded_generator_knows_the_textbook():
    known = KnownFormulas.embedded()
    assert len(known) > 20_000
    assert known.holds(["NaCl", "BaTiO3", "MgO", "SiO2"]).all()
    assert not known.holds(["Na13Cl", "XeAu9", "Hg7O2Li"]).any()


def test_makeup_tells_kinds_guards_and_repeats(crystals):
    several = cfrl.CrystalBatch.cat([crystals, crystals[[0]]])
    status = ["", "guard: known", "", "guard: element", "", "", "no reference for element Na"]
    found = makeup(several, status)
    assert found["elements: 2 elements"] == pytest.approx(4 / 7)
    assert found["anion: halide"] == pytest.approx(3 / 7)
    assert (found["guard: known"], found["guard: element"]) == (pytest.approx(1 / 7), pytest.approx(1 / 7))
    assert "guard: noble_gas" not in found
    assert found["without a score"] == pytest.approx(3 / 7)
    assert found["unique"] == pytest.approx(6 / 7)
    assert found["prototypes"] == pytest.approx(3 / 7)  # rock salt, perovskite, a single face-centred site


def test_a_kind_that_has_halved_is_named():
    before = {"anion: oxide": 0.24, "anion: halide": 0.14, "anion: pnictide": 0.03, "elements: 1 element": 0.5}
    after = {"anion: oxide": 0.11, "anion: halide": 0.08, "anion: pnictide": 0.0, "elements: 1 element": 0.0}
    table = compared(before | {"unique": 1.0}, after | {"unique": 0.2})
    found = dict(zip(table["share_of"], zip(table["before"], table["after"], strict=True), strict=True))
    assert halved(found, 256) == ["anion: oxide"]
    assert halved(found, 1000) == ["anion: oxide", "anion: pnictide"]  # 30 of them are no chance any more

"""Duplicates and known crystals: the judge's verdict on all pairs is the truth that few comparisons must reproduce."""

import numpy as np
import pytest
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Element, Lattice, Structure

from cfrl.crystals import fingerprint
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import (
    descriptor,
    find_duplicates,
    find_known,
    fingerprints,
    firsts,
    plainly_match,
    prepare,
    prototypes,
    varied,
)

ELEMENTS = [Element(symbol) for symbol in ("O", "Ti", "Ba", "Na")]


@pytest.fixture(scope="module")
def polymorphs() -> list[Structure]:
    """Real prototypes with the same few elements, so that many share a formula: 200 crystals."""
    structures = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
    chosen = []
    for structure in structures:
        elements = sorted(structure.composition.elements, key=lambda e: (structure.composition[e], e.Z))
        if len(structure) <= 16 and len(elements) <= len(ELEMENTS):
            new = dict(zip(elements, ELEMENTS, strict=False))
            species = [new[site.specie] for site in structure]
            chosen.append(Structure(structure.lattice, species, structure.frac_coords))
    return chosen[:200]


def copy_of(structure: Structure, rng: np.random.Generator, kind: str) -> Structure:
    """The same crystal, described otherwise or slightly strained."""
    copy = structure.copy()
    if kind == "rotated":
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        copy = Structure(Lattice(copy.lattice.matrix @ rotation), copy.species, copy.frac_coords)
    elif kind == "shifted":
        copy.translate_sites(range(len(copy)), rng.random(3))
    elif kind == "supercell":
        copy.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, 2]])
    else:
        copy.apply_strain(rng.normal(scale=0.005, size=3))
        copy.perturb(0.01)
    return Structure.from_sites([copy[i] for i in rng.permutation(len(copy))])


def brute_force(structures: list[Structure]) -> list[bool]:
    """Whether each crystal matches an earlier one that is the first of its kind, asking about all pairs."""
    matcher = StructureMatcher()
    reduced = [s.get_reduced_structure("niggli").get_primitive_structure() for s in structures]
    firsts: list[int] = []
    repeats = []
    for row, structure in enumerate(reduced):
        found = any(
            reduced[first].reduced_formula == structure.reduced_formula
            and matcher.fit(reduced[first], structure, skip_structure_reduction=True)
            for first in firsts
        )
        repeats.append(found)
        if not found:
            firsts.append(row)
    return repeats


def test_agrees_with_comparing_all_pairs(polymorphs: list[Structure]) -> None:
    rng = np.random.default_rng(0)
    kinds = ["rotated", "shifted", "supercell", "strained"]
    originals = [int(i) for i in rng.choice(len(polymorphs), 100, replace=False)]
    copies = [copy_of(polymorphs[i], rng, kinds[n % 4]) for n, i in enumerate(originals)]
    structures = polymorphs + copies
    assert len(structures) == 300
    found = find_duplicates(structures)
    assert [original is not None for original in found] == brute_force(structures)
    assert all(found[len(polymorphs) + n] is not None for n in range(100)), "every copy is a duplicate"


def test_known_crystals_are_found_in_any_description(polymorphs: list[Structure]) -> None:
    rng = np.random.default_rng(1)
    known, rest = polymorphs[:60], polymorphs[60:120]
    copies = [copy_of(s, rng, ("rotated", "supercell", "strained")[i % 3]) for i, s in enumerate(known)]
    matcher = StructureMatcher()
    found = find_known(copies + rest, known)
    for structure, row in zip(copies + rest, found, strict=True):
        if row is None:
            assert not any(matcher.fit(other, structure) for other in known)
        else:
            assert matcher.fit(known[row], structure)
    assert all(row is not None for row in found[:60])


def test_primitive_cells_have_as_many_atoms_as_those_of_pymatgen(polymorphs: list[Structure]) -> None:
    """Also of supercells whose atoms are off by less than pymatgen takes for the same."""
    rng = np.random.default_rng(5)
    supercells = [structure * [1, 1, 2] for structure in polymorphs if len(structure) <= 8]
    for n, structure in enumerate(supercells):
        structure.perturb((0.0, 0.02, 0.05)[n % 3])
        structure.translate_sites(range(len(structure)), rng.random(3))
    sizes = [len(prepare(structure)) for structure in polymorphs + supercells]
    assert sizes == [
        len(structure.get_reduced_structure("niggli").get_primitive_structure())
        for structure in polymorphs + supercells
    ]
    assert len(set(sizes)) > 10


def test_what_plainly_matches_matches(polymorphs: list[Structure]) -> None:
    """Over all pairs of one formula and size among the prototypes and copies strained by up to a tenth."""
    rng = np.random.default_rng(6)
    copies = []
    for structure in polymorphs * 5:
        copy = structure.copy()
        copy.apply_strain(rng.normal(scale=rng.uniform(0, 0.05), size=3))
        copy.perturb(rng.uniform(0, 0.3))
        copies.append(copy)
    comparable = fingerprint.group_by(map(prepare, polymorphs + copies), lambda c: c.structure.formula)
    pairs = [(one, other) for group in comparable.values() for one in group[:12] for other in group if one is not other]
    plain = [pair for pair in pairs if plainly_match(*pair)]
    assert len(pairs) > 5000
    assert len(plain) > 500
    matcher = StructureMatcher()
    some = rng.permutation(len(plain))[:500]
    assert all(matcher.fit(*(c.structure for c in plain[i]), skip_structure_reduction=True) for i in some)


def test_comparisons_grow_linearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many different crystals of one formula: the judge is asked about a few neighbours of each."""
    rng = np.random.default_rng(2)
    structures = [
        Structure(
            Lattice.from_parameters(*rng.uniform(3, 9, 3), *rng.uniform(70, 110, 3)), ["Na"] * 3, rng.random((3, 3))
        )
        for _ in range(150)
    ]
    calls = 0

    class Never:
        def fit(self, *args: object, **kwargs: object) -> bool:
            nonlocal calls
            calls += 1
            return False

    monkeypatch.setattr(fingerprint, "_matcher", lambda ltol: Never())
    find_duplicates(structures, limit=5)
    assert calls <= 5 * len(structures)


def test_fingerprint_does_not_depend_on_the_description(polymorphs: list[Structure]) -> None:
    rng = np.random.default_rng(3)
    chosen = polymorphs[:80]
    copies = [copy_of(s, rng, ("rotated", "shifted", "supercell")[i % 3]) for i, s in enumerate(chosen)]
    before = fingerprints(CrystalBatch.from_structures(chosen, symprec=0.01))
    after = fingerprints(CrystalBatch.from_structures(copies, symprec=0.01))
    assert np.mean([a == b for a, b in zip(before, after, strict=True)]) > 0.97  # borderline symmetry may differ


def test_fingerprint_of_exchanged_origins() -> None:
    """Perovskite with Ti or Ba at the origin; rock salt with either ion there; anti-perovskite is another."""
    barium_titanate = fingerprint.fingerprint(221, [1, 2, 3, 0], [22, 56, 8, 0])
    assert barium_titanate == fingerprint.fingerprint(221, [1, 2, 4], [56, 22, 8])
    assert barium_titanate != fingerprint.fingerprint(221, [1, 2, 3], [56, 22, 8])
    assert fingerprint.fingerprint(225, [1, 2], [11, 17]) == fingerprint.fingerprint(225, [1, 2], [17, 11])
    assert fingerprint.fingerprint(225, [1, 2], [11, 17]).startswith("NaCl|225|")


def test_prototype_forgets_the_elements_only() -> None:
    def salt(a: str, b: str, length: float, group: str = "Fm-3m") -> Structure:
        other = [0.5] * 3 if group == "Fm-3m" else [0.25] * 3
        return Structure.from_spacegroup(group, Lattice.cubic(length), [a, b], [[0, 0, 0], other])

    batch = CrystalBatch.from_structures([salt("Na", "Cl", 5.6), salt("O", "Mg", 4.2), salt("Zn", "S", 5.4, "F-43m")])
    rock_salt, other, zincblende = prototypes(batch)
    assert rock_salt == other == "225|a b"
    assert zincblende.startswith("216|")


def test_firsts_are_the_rows_where_a_key_is_new() -> None:
    assert firsts(["b", "a", "b", "c", "a"]).tolist() == [0, 1, 3]
    assert firsts([]).tolist() == []


def test_varied_crystals_share_neither_formula_nor_prototype() -> None:
    def crystal(group: str, length: float, *sites: tuple[str, float]) -> Structure:
        lattice = Lattice.cubic(length)
        return Structure.from_spacegroup(group, lattice, [z for z, _ in sites], [[x] * 3 for _, x in sites])

    lithium, copper, sodium = (("Li", 0.0),), (("Cu", 0.0),), (("Na", 0.0),)
    slightly_off = Structure(Lattice.tetragonal(3.4, 3.5), ["Li"] * 2, [[0, 0, 0], [0.5, 0.5, 0.52]])
    salt = (("Na", 0.0), ("Cl", 0.5))
    batch = CrystalBatch.from_structures(
        [
            crystal("Im-3m", 3.4, *lithium),
            crystal("Fm-3m", 4.3, *lithium),
            slightly_off,
            crystal("Im-3m", 4.2, *sodium),  # the prototype of the first
            crystal("Fm-3m", 3.6, *copper),  # that of the second, which is not in the list
            crystal("Fm-3m", 5.6, *salt),
            crystal("Pm-3m", 3.4, *salt),
        ]
    )
    assert varied(batch).tolist() == [0, 4, 5]
    assert varied(batch[:0]).tolist() == []


def test_mirror_images_are_one_crystal() -> None:
    quartz = Structure.from_spacegroup(
        "P3_121", Lattice.hexagonal(4.91, 5.4), ["Si", "O"], [[0.47, 0, 1 / 3], [0.41, 0.27, 0.21]]
    )
    mirrored = Structure(quartz.lattice, quartz.species, -quartz.frac_coords)
    left, right = CrystalBatch.from_structures([quartz, mirrored]).space_group.tolist()
    assert {left, right} == {152, 154}
    assert find_duplicates([quartz, mirrored]) == [None, 0]
    assert len(set(fingerprints(CrystalBatch.from_structures([quartz, mirrored])))) == 1


def test_descriptor_is_that_of_the_crystal_and_moves_little(polymorphs: list[Structure]) -> None:
    rng = np.random.default_rng(4)
    for structure in polymorphs[::20]:
        reference = descriptor(structure)
        np.testing.assert_allclose(descriptor(copy_of(structure, rng, "rotated")), reference, atol=1e-6)
        np.testing.assert_allclose(descriptor(structure * [2, 1, 1]), reference, atol=1e-6)
        moved = structure.copy()
        moved.perturb(0.05)
        length = (structure.volume / len(structure)) ** (1 / 3)
        assert np.abs(descriptor(moved) - reference).max() <= 2 * 0.05 / length + 1e-9

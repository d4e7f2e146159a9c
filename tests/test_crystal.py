"""CrystalBatch: round trips with real crystals, geometry against pymatgen, and batch operations."""

import csv
import gzip
import random

import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Composition, Element, Lattice, Structure

from cfrl.crystals import symmetry
from cfrl.crystals.analysis import AsymmetricUnit
from cfrl.crystals.conversion import from_units
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.distances import closest_contact
from cfrl.crystals.elements import ATOMIC_NUMBERS, COVALENT_RADII, MASSES, SYMBOLS, atomic_number
from cfrl.crystals.symmetry import SymmetryError
from cfrl.errors import UserError


def same(one: Structure, other: Structure) -> bool:
    """StructureMatcher, with its second way for the few cells that its primitive reduction cannot shrink."""
    return StructureMatcher().fit(one, other) or StructureMatcher(primitive_cell=False, attempt_supercell=True).fit(
        *sorted((one, other), key=len)
    )


ROCK_SALT = Structure(Lattice.from_parameters(3.96, 3.96, 3.96, 60, 60, 60), ["Na", "Cl"], [[0] * 3, [0.5] * 3])
COPPER = Structure(Lattice.from_parameters(2.55, 2.55, 2.55, 60, 60, 60), ["Cu"], [[0] * 3])
PEROVSKITE = Structure(
    Lattice.cubic(4.0),
    ["O", "O", "O", "Ti", "Ba"],
    [[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5] * 3, [0] * 3],
)


@pytest.fixture(scope="module")
def prototypes() -> list[Structure]:
    """The 288 real prototype crystals that come with pymatgen; a few have more than 20 sites."""
    structures = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
    assert len(structures) == 288
    return structures


@pytest.fixture(scope="module")
def batch(prototypes: list[Structure]) -> CrystalBatch:
    ids = [f"prototype-{row}" for row in range(len(prototypes))]
    return CrystalBatch.from_structures(prototypes, ids=ids, errors="skip", dtype=torch.float64)


# ---- round trips ----


def test_prototypes_round_trip(prototypes: list[Structure], batch: CrystalBatch) -> None:
    assert len(batch) > 280
    for structure in batch.to_structures():
        original = prototypes[int(structure.properties["id"].split("-")[1])]
        assert same(original, structure), original.formula


def test_materials_project_round_trip(shared) -> None:
    with gzip.open(shared / "data" / "mp_20.csv.gz", "rt") as file:
        rows = random.Random(0).sample(list(csv.DictReader(file)), 300)
    structures = [Structure.from_str(row["cif"], fmt="cif") for row in rows]
    crystals = CrystalBatch.from_structures(structures)
    assert crystals.valid().all()
    failed = [
        row["material_id"]
        for row, old, new in zip(rows, structures, crystals.to_structures(), strict=True)
        if not same(old, new)
    ]
    assert not failed


def test_from_structures_is_a_fixed_point(batch: CrystalBatch) -> None:
    """Described again, a crystal keeps its group, its cell, and (up to the choice of origin) its letters."""
    again = CrystalBatch.from_structures(batch.to_structures(), dtype=torch.float64)
    assert torch.equal(again.space_group, batch.space_group)
    assert (again.volumes() / batch.volumes() - 1).abs().max() < 1e-6
    assert all(equivalent(batch[row], again[row]) for row in range(len(batch)))


def test_ase_round_trip(batch: CrystalBatch) -> None:
    some = batch[:20]
    again = CrystalBatch.from_atoms(some.to_atoms(), dtype=torch.float64)
    assert torch.equal(again.space_group, some.space_group)
    assert again.formulas() == some.formulas()


def equivalent(one: CrystalBatch, other: CrystalBatch, coords: float | None = None) -> bool:
    """Whether a description of one (batches of one) has the letters, elements (and coordinates) of the other."""
    if int(one.space_group) != int(other.space_group) or one.formulas() != other.formulas():
        return False
    for choice in range(int(one.num_descriptions(mirror=True))):
        described = one.described_as(torch.tensor([choice]))
        sites = [
            sorted(zip(b.wyckoff[0].tolist(), b.species[0].tolist(), strict=True))
            for b in (described.trim(), other.trim())
        ]
        if sites[0] != sites[1]:
            continue
        if coords is None:
            return True
        apart = (described.trim().frac_coords - other.trim().frac_coords)[:, described.trim().wyckoff[0] > 0]
        if (apart - apart.round()).abs().max() < coords:
            return True
    return False


@pytest.mark.parametrize("change", ["permuted", "rotated", "shifted", "supercell", "primitive"])
def test_description_does_not_depend_on_the_input_cell(batch: CrystalBatch, change: str) -> None:
    generator = np.random.default_rng(0)
    some = batch[torch.arange(0, len(batch), 6)]
    altered = []
    for structure in some.to_structures():
        if change == "permuted":
            structure = Structure.from_sites([structure[i] for i in generator.permutation(len(structure))])
        elif change == "rotated":
            turn, _ = np.linalg.qr(generator.normal(size=(3, 3)))
            matrix = structure.lattice.matrix @ (turn * np.linalg.det(turn))
            structure = Structure(Lattice(matrix), structure.species, structure.frac_coords)
        elif change == "shifted":
            structure = structure.translate_sites(range(len(structure)), generator.random(3))
        elif change == "supercell":
            structure = structure.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, 2]])
        else:
            structure = structure.get_primitive_structure()
        altered.append(structure)
    again = CrystalBatch.from_structures(altered, dtype=torch.float64)
    polar = symmetry.tables().polar[some.space_group].any(-1)
    # In oblique systems several cells are equally reduced; there, and along polar axes, only letters are compared.
    exact = ~polar & (some.space_group > 15)
    for row in range(len(some)):
        assert equivalent(some[row], again[row], 1e-3 if exact[row] else None), (change, some.formulas()[row])


# ---- equivalent descriptions ----


def test_equivalent_descriptions_are_the_same_crystals(batch: CrystalBatch) -> None:
    some = batch[torch.arange(0, len(batch), 3)]
    generator = torch.Generator().manual_seed(0)
    choice = (torch.rand(len(some), generator=generator) * some.num_descriptions(mirror=True)).long()
    other = some.described_as(choice)
    assert (other.wyckoff != some.wyckoff).any(-1).sum() > 10
    assert (other.shortest_distances() - some.shortest_distances()).abs().max() < 1e-9
    assert other.formulas() == some.formulas()
    found = CrystalBatch.from_structures(other.to_structures())
    assert torch.equal(found.space_group, some.space_group)
    for one, two in zip(some.to_structures(), other.to_structures(), strict=True):
        assert same(one, two), one.formula


def test_canonical_description_is_one_for_all_equivalent_ones(batch: CrystalBatch) -> None:
    generator = torch.Generator().manual_seed(1)
    choice = (torch.rand(len(batch), generator=generator) * batch.num_descriptions()).long()
    described = batch.described_as(choice)
    changed = (described.wyckoff != batch.wyckoff).any(1) | (described.species != batch.species).any(1)
    assert changed.float().mean() > 0.2  # else there is nothing to show
    back = described.canonical()
    assert torch.equal(back.wyckoff, batch.wyckoff)
    gap = back.frac_coords - batch.frac_coords
    moved = (gap - gap.round()).abs().amax((1, 2)) > 2e-3
    # Where a coordinate lies between two roundings, noise of 1e-16 may decide for another description.
    assert (moved | (back.species != batch.species).any(1)).float().mean() < 0.02
    assert all(same(a, b) for a, b in zip(back.to_structures()[:60], batch.to_structures()[:60], strict=True))


def test_first_description_is_the_crystal_itself(batch: CrystalBatch) -> None:
    same_again = batch.described_as(torch.zeros(len(batch), dtype=torch.long))
    assert torch.equal(same_again.wyckoff, batch.wyckoff)
    assert torch.equal(same_again.species, batch.species)
    assert torch.allclose(same_again.frac_coords, batch.frac_coords, atol=1e-12)
    assert torch.equal(same_again.lattice, batch.lattice)


def test_rock_salt_has_two_descriptions() -> None:
    salt = CrystalBatch.from_structures([ROCK_SALT])
    assert salt.wyckoff.tolist() == [[1, 2]]
    assert int(salt.num_descriptions()) == 2
    other = salt.described_as(torch.tensor([1]))
    assert other.wyckoff.tolist() == [[1, 2]]
    assert other.species.tolist() == salt.species.flip(1).tolist()


def test_permuted_axes_take_the_lattice_along() -> None:
    lattice = Lattice.orthorhombic(4.0, 5.0, 6.0)
    crystal = CrystalBatch.from_structures([Structure(lattice, ["Na", "Cl"], [[0, 0, 0], [0.5, 0, 0]])])
    described = [crystal.described_as(torch.tensor([i])) for i in range(int(crystal.num_descriptions()))]
    assert len(described) == 48
    assert {tuple(d.lattice[0, :3].tolist()) for d in described} > {(4.0, 5.0, 6.0), (6.0, 4.0, 5.0)}
    assert all(same(d.to_structures()[0], crystal.to_structures()[0]) for d in described)


# ---- order and representatives ----


def test_sites_are_ordered_and_representatives_smallest(batch: CrystalBatch) -> None:
    occupied = batch.wyckoff > 0
    assert (batch.num_sites == occupied.long().cumprod(1).sum(1)).all()  # padding at the end
    both = occupied[:, 1:]
    assert (batch.wyckoff.diff(dim=1)[both] >= 0).all()
    tied = both & (batch.wyckoff.diff(dim=1) == 0)
    before, after = batch.frac_coords[:, :-1][tied], batch.frac_coords[:, 1:][tied]
    for a, b in zip(before.tolist(), after.tolist(), strict=True):
        assert [round(x, 4) for x in a] <= [round(x, 4) for x in b]
    projected = symmetry.project_coords(batch.space_group, batch.wyckoff, batch.frac_coords)
    assert torch.equal(projected, batch.frac_coords)


# ---- geometry ----


def test_volumes_densities_formulas(batch: CrystalBatch) -> None:
    for row, structure in enumerate(batch.to_structures()):
        assert float(batch.volumes()[row]) == pytest.approx(structure.volume)
        assert float(batch.densities()[row]) == pytest.approx(structure.density, rel=1e-6)
        formula = batch.formulas()[row]
        assert (
            Composition(formula).get_integer_formula_and_factor()[0]
            == Composition(structure.composition.get_integer_formula_and_factor()[0]).get_integer_formula_and_factor()[
                0
            ]
        )
        assert int(batch.num_atoms[row]) == len(structure)


def test_formula_is_written_as_chemists_do() -> None:
    assert CrystalBatch.from_structures([PEROVSKITE]).formulas() == ["BaTiO3"]


def test_elements_are_those_of_pymatgen() -> None:
    for number in range(1, len(SYMBOLS)):
        element = Element.from_Z(number)
        assert SYMBOLS[number] == element.symbol
        assert MASSES[number] == pytest.approx(float(element.atomic_mass))
        assert COVALENT_RADII[number] == pytest.approx(covalent_radii[number])
    assert atomic_number("Ti") == ATOMIC_NUMBERS["Ti"] == 22
    with pytest.raises(UserError, match="'Xx' is not an element"):
        atomic_number("Xx")


def test_shortest_distances_are_those_of_pymatgen(batch: CrystalBatch) -> None:
    """pymatgen's distance matrix has no images of an atom itself; they are the shortest lattice vector."""
    ours = batch.shortest_distances()
    for row, structure in enumerate(batch.to_structures()):
        pairs = structure.distance_matrix[np.triu_indices(len(structure), 1)]
        own = min(structure.lattice.get_niggli_reduced_lattice().abc)
        expected = min([own, *pairs])
        assert float(ours[row]) == pytest.approx(expected, abs=1e-6)


def test_closest_contacts_are_those_of_the_neighbour_list(batch: CrystalBatch) -> None:
    ours = batch.closest_contacts().tolist()
    assert ours == pytest.approx([closest_contact(structure, 3.0) for structure in batch.to_structures()], abs=1e-6)
    rock_salt = CrystalBatch.from_structures([ROCK_SALT])
    contact = float(rock_salt.closest_contacts())
    assert contact == pytest.approx(float(rock_salt.shortest_distances()) / (1.66 + 1.02))
    assert rock_salt.valid(min_contact=contact - 0.01).tolist() == [True]
    assert rock_salt.valid(min_contact=contact + 0.01).tolist() == [False]


def test_valid_flags_what_is_impossible() -> None:
    good = CrystalBatch.from_structures([ROCK_SALT])
    assert good.valid().tolist() == [True]
    assert good.valid(min_distance=3.0).tolist() == [False]  # Na-Cl is 2.8 angstrom

    def changed(name: str, index: tuple[int, ...], value: float) -> CrystalBatch:
        copy = good[:]
        tensor = getattr(copy, name).clone()
        tensor[index] = value
        setattr(copy, name, tensor)
        return copy

    bad = [
        changed("lattice", (0, 0), float("nan")),
        changed("lattice", (0, 0), -5.6),
        changed("lattice", (0, 3), 175.0),
        changed("lattice", (0, 2), 1e-3),
        changed("wyckoff", (0, 1), 20),  # Fm-3m ends at l
        changed("wyckoff", (0, 1), 1),  # both on 4a: one atom on another
        changed("species", (0, 1), 0),
        changed("frac_coords", (0, 0, 0), float("nan")),
    ]
    assert CrystalBatch.cat([good, *bad]).valid().tolist() == [True] + [False] * len(bad)
    triangle = good[:]
    triangle.lattice = torch.tensor([[5.0, 5.0, 5.0, 120.0, 120.0, 121.0]])  # angles add up to more than 360
    assert triangle.valid().tolist() == [False]


# ---- batches ----


def test_slices_masks_and_joins(batch: CrystalBatch) -> None:
    batch = CrystalBatch(**(vars(batch) | {"properties": {"gap": torch.arange(len(batch), dtype=torch.float64)}}))
    mask = batch.num_sites == 2
    parts = [batch[:10], batch[torch.tensor([10, 3])], batch[mask], batch[-1]]
    joined = CrystalBatch.cat([part.trim() for part in parts])
    order = [*range(10), 10, 3, *mask.nonzero()[:, 0].tolist(), len(batch) - 1]
    assert joined.ids == [batch.ids[i] for i in order]
    assert joined.properties["gap"].tolist() == [float(i) for i in order]
    wide = batch[order]
    assert joined.wyckoff.shape[1] == int(wide.num_sites.max())
    assert torch.equal(joined.frac_coords, wide.frac_coords[:, : joined.wyckoff.shape[1]])
    assert joined.formulas() == wide.formulas()
    backwards = np.arange(4)[::-1]
    backwards.flags.writeable = False
    assert batch[backwards].ids == batch.ids[3::-1]
    assert len(list(batch[:3])) == 3
    with pytest.raises(IndexError):
        batch[len(batch)]


def test_join_of_unlike_batches() -> None:
    salt = CrystalBatch.from_structures(
        [ROCK_SALT],
        properties={"gap": [5.0]},
    )
    copper = CrystalBatch.from_structures([COPPER])
    joined = CrystalBatch.cat([salt, copper, CrystalBatch.empty()])
    assert joined.num_sites.tolist() == [2, 1]
    assert joined.properties["gap"][0] == 5.0
    assert joined.properties["gap"][1].isnan()
    assert joined.ids is None
    assert joined.formulas() == ["NaCl", "Cu"]


def test_empty_batch() -> None:
    empty = CrystalBatch.empty()
    assert len(CrystalBatch.cat([])) == 0
    assert empty.to_structures() == []
    assert empty.formulas() == []
    assert empty.valid().tolist() == empty.shortest_distances().tolist() == []
    assert len(CrystalBatch.from_structures([])) == 0


def test_dtypes(batch: CrystalBatch) -> None:
    assert batch.frac_coords.dtype == batch.lattice.dtype == torch.float64
    single = batch.to(dtype=torch.float32)
    assert single.lattice.dtype == single.volumes().dtype == single.shortest_distances().dtype == torch.float32
    assert single.space_group.dtype == single.wyckoff.dtype == single.species.dtype == torch.int64
    assert torch.allclose(single.shortest_distances().double(), batch.shortest_distances(), atol=1e-4)
    assert all(0 <= x < 1 for x in single.atoms()[0].flatten().tolist())


def test_shapes_are_checked(batch: CrystalBatch) -> None:
    with pytest.raises(ValueError, match="lattice has shape"):
        CrystalBatch(batch.space_group, batch.wyckoff, batch.species, batch.frac_coords, batch.lattice[:, :3])
    with pytest.raises(ValueError, match="2 ids for"):
        CrystalBatch(**(vars(batch) | {"ids": ["a", "b"]}))


# ---- faults ----


def test_bad_structures_are_dropped_with_a_reason() -> None:
    good = Structure(Lattice.cubic(3), ["Po"], [[0, 0, 0]])
    mixed = Structure(Lattice.cubic(3), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    crowded = Structure(Lattice.cubic(9), ["C"] * 25, np.random.default_rng(0).random((25, 3)))
    overlapping = Structure(Lattice.cubic(3), ["C", "C"], [[0, 0, 0], [0, 0, 0]])
    dummy = Structure(Lattice.cubic(3), ["X"], [[0, 0, 0]])
    structures = [mixed, good, crowded, overlapping, dummy, good]
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(
        structures, ids=list("abcdef"), properties={"gap": range(6)}, errors="skip", dropped=dropped
    )
    assert crystals.ids == ["b", "f"]
    assert crystals.properties["gap"].tolist() == [1.0, 5.0]
    reasons = {0: "disordered", 2: "too many sites", 3: "symmetry not found", 4: "not an element"}
    assert dropped.keys() == reasons.keys()
    assert all(reason in dropped[row] for row, reason in reasons.items())
    with pytest.raises(SymmetryError, match="structure 0: disordered"):
        CrystalBatch.from_structures(structures)


def test_letters_that_do_not_fit_the_points_are_refused() -> None:
    unit = AsymmetricUnit(
        225, np.array([1]), np.array([11]), np.array([[0.1, 0.0, 0.0]]), np.array([5, 5, 5, 90, 90, 90.0])
    )
    with pytest.raises(SymmetryError, match="structure 0: symmetry not consistent"):
        from_units([unit])
    dropped: dict[int, str] = {}
    assert len(from_units([unit], dropped=dropped)) == 0
    assert list(dropped) == [0]

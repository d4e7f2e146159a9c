"""Symmetry tables against group theory, geometry and moyo, for all 230 space groups."""

from pathlib import Path

import numpy as np
import pytest
import torch
from moyopy import Cell, MoyoDataset, operations_from_number

from cfrl.crystals import symmetry
from cfrl.crystals.analysis import analyse, find_symmetry
from cfrl.crystals.conversion import from_units
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.symmetry import SymmetryError

GROUPS = range(1, 231)
CELL = torch.tensor([[36.4, 41.2, 46.8, 83.0, 101.0, 97.0]], dtype=torch.float64)  # general, in every system


def general_operations(group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations and translations of the general position, which are the operations of the group."""
    t = symmetry.tables()
    last = int(t.num_letters[group])
    begin, count = int(t.offset[group, last]), int(t.multiplicity[group, last])
    return t.rotations[begin : begin + count], t.translations[begin : begin + count]


def as_set(rotations: torch.Tensor, translations: torch.Tensor) -> set[tuple[int, ...]]:
    """Operations modulo lattice translations, comparable."""
    shifts = (translations * 24).round().int() % 24
    return {tuple(row) for row in torch.cat([rotations.round().int().flatten(1), shifts], 1).tolist()}


def every_position() -> tuple[torch.Tensor, torch.Tensor]:
    """Space group (1731,) and letter (1731,) of all Wyckoff positions."""
    return (symmetry.tables().multiplicity > 0).nonzero(as_tuple=True)


def random_crystals(space_group: torch.Tensor, wyckoff: torch.Tensor, seed: int = 0) -> CrystalBatch:
    """Crystals with free parameters in general position; the element tells the column of the site."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(*wyckoff.shape, 3, generator=generator, dtype=torch.float64)
    coords = symmetry.project_coords(space_group, wyckoff, points)
    lattice = symmetry.constrain_lattice(space_group, CELL.repeat(len(space_group), 1))
    species = torch.arange(1, wyckoff.shape[1] + 1) * (wyckoff > 0)
    return CrystalBatch(space_group, wyckoff, species, coords, lattice)


def distinct_points(frac: torch.Tensor) -> int:
    """How many of the points (m, 3) differ modulo lattice translations."""
    apart = frac[:, None] - frac[None]
    apart = (apart - apart.round()).abs().amax(-1)
    return int((~((apart < 1e-6) & (torch.arange(len(frac))[:, None] > torch.arange(len(frac)))).any(1)).sum())


def cells(crystals: CrystalBatch) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return [(a.cell.array, a.get_scaled_positions(), a.numbers) for a in crystals.to_atoms()]


# ---- tables ----


def test_operations_are_those_of_moyo() -> None:
    for group in GROUPS:
        theirs = operations_from_number(group)
        rotations = torch.tensor(theirs.rotations, dtype=torch.float64)
        translations = torch.tensor(theirs.translations, dtype=torch.float64)
        assert as_set(*general_operations(group)) == as_set(rotations, translations), group


def test_known_positions() -> None:
    """A few entries of the International Tables A that are easy to get wrong."""
    t = symmetry.tables()
    assert int(t.num_letters[1:].sum()) == 1731
    assert int(t.num_letters[47]) == 27
    point = torch.tensor([[[0.1, 0.2, 0.3]]], dtype=torch.float64)

    def first(group: int, letter: str) -> list[float]:
        wyckoff = torch.tensor([[symmetry.letter_index(letter)]])
        return symmetry.project_coords(torch.tensor([group]), wyckoff, point)[0, 0].tolist()

    assert first(227, "a") == pytest.approx([1 / 8, 1 / 8, 1 / 8])  # origin choice 2
    assert first(225, "c") == pytest.approx([1 / 4, 1 / 4, 1 / 4])
    assert first(166, "h") == pytest.approx([0.1, 0.9, 0.3])  # hexagonal axes
    assert first(178, "b") == pytest.approx([0.1, 0.2, 1 / 4])  # x, 2x, 1/4
    assert first(14, "e") == pytest.approx([0.1, 0.2, 0.3])
    assert first(5, "a") == pytest.approx([0.0, 0.2, 0.0])  # unique axis b
    assert symmetry.multiplicity(torch.tensor([225]), torch.tensor([[1, 3, 12, 0]])).tolist() == [[4, 8, 192, 0]]


def test_orbits_have_as_many_points_as_the_multiplicity_says() -> None:
    group, letter = every_position()
    crystals = random_crystals(group, letter[:, None])
    frac, _, crystal, _ = crystals.atoms()
    for row, points in enumerate(frac.split(crystals.num_atoms.tolist())):
        assert distinct_points(points) == int(crystals.num_atoms[row])
    assert torch.equal(crystal.bincount(), crystals.num_atoms)


def test_multiplicity_times_site_symmetry_is_the_order_of_the_group() -> None:
    """Orbit-stabiliser theorem, and a point with d degrees of freedom is fixed by a d-dimensional subspace."""
    t = symmetry.tables()
    group, letter = every_position()
    crystals = random_crystals(group, letter[:, None])
    for row in range(len(group)):
        rotations, translations = general_operations(int(group[row]))
        point = crystals.frac_coords[row, 0]
        moved = rotations @ point + translations - point
        stabilizer = rotations[(moved - moved.round()).abs().amax(-1) < 1e-9]
        assert len(stabilizer) * int(t.multiplicity[group[row], letter[row]]) == len(rotations)
        fixed = torch.linalg.matrix_rank(stabilizer.mean(0), atol=1e-9)
        assert int(fixed) == int(t.dof[group[row], letter[row]])


def test_first_triplet_is_a_projection_without_ambiguity() -> None:
    """Tied coordinates are integer combinations of earlier free ones, so whole shifts of the input change nothing."""
    t = symmetry.tables()
    matrix = t.project_matrix
    assert torch.equal(matrix, matrix.round())
    assert torch.equal(matrix @ matrix, matrix)
    assert not matrix.triu(1).any()
    assert torch.equal(t.free, matrix.diagonal(dim1=-2, dim2=-1) == 1)
    assert torch.equal(t.free.sum(-1), t.dof)
    assert (t.scored | ~t.free).all()
    group, letter = every_position()
    crystals = random_crystals(group, letter[:, None])
    shift = torch.randint(-2, 3, crystals.frac_coords.shape)
    again = symmetry.project_coords(group, letter[:, None], crystals.frac_coords + shift)
    apart = again - crystals.frac_coords
    assert (apart - apart.round()).abs().max() < 1e-12
    assert ((again >= 0) & (again < 1)).all()


def test_wrap_never_gives_one() -> None:
    tiny = torch.tensor([-1e-9, -1e-20, 1.0, -0.25])
    assert symmetry.wrap(tiny).tolist() == [0.0, 0.0, 0.0, 0.75]


def test_reference_crystals_satisfy_the_first_triplets() -> None:
    """The published representation: our tables must leave all its coordinates where they are."""
    data = np.load(Path(__file__).parent / "data" / "crystals.npz")
    group, wyckoff = torch.from_numpy(data["G"]).long(), torch.from_numpy(data["W"]).long()
    coords = torch.from_numpy(data["XYZ"])
    apart = (symmetry.project_coords(group, wyckoff, coords) - coords)[wyckoff > 0]
    assert (apart - apart.round()).abs().max() < 1e-9


# ---- lattice ----


def test_operations_are_isometries_of_the_constrained_lattice() -> None:
    groups = torch.arange(1, 231)
    matrix = symmetry.lattice_matrix(symmetry.constrain_lattice(groups, CELL.repeat(230, 1)))
    metric = matrix @ matrix.mT
    for group in GROUPS:
        rotations, _ = general_operations(group)
        g = metric[group - 1]
        assert (rotations.mT @ g @ rotations - g).abs().max() < 1e-9 * g.abs().max(), group


def test_free_lattice_parameters() -> None:
    """Changing a tied parameter changes nothing; changing a free one does."""
    t = symmetry.tables()
    groups = torch.arange(1, 231)
    base = CELL.repeat(230, 1)
    for index in range(6):
        moved = base.clone()
        moved[:, index] += 1.0
        changed = (symmetry.constrain_lattice(groups, moved) != symmetry.constrain_lattice(groups, base)).any(-1)
        assert torch.equal(changed, t.lattice_free[groups, index])
    assert t.lattice_free[[1, 3, 16, 75, 143, 195]].sum(-1).tolist() == [6, 4, 3, 2, 2, 1]


def test_lattice_matrix_is_that_of_pymatgen() -> None:
    from pymatgen.core import Lattice

    ours = symmetry.lattice_matrix(CELL)[0].numpy()
    assert np.allclose(ours, Lattice.from_parameters(*CELL[0].tolist()).matrix)


# ---- moyo ----


@pytest.fixture(scope="module")
def one_crystal_per_position() -> CrystalBatch:
    """Every Wyckoff position of every group, with a general position beside it so that the group is exact."""
    group, letter = every_position()
    general = symmetry.tables().num_letters[group]
    return random_crystals(group, torch.stack([letter, general], 1))


def test_moyo_keeps_its_remarks_to_itself(caplog) -> None:
    """It has one for every cell that is not primitive."""
    caplog.set_level(0)
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    found = find_symmetry(np.diag([3.0, 3.0, 6.0]), positions, np.array([29, 29]), 0.01)
    assert found.number == 221
    assert not [record for record in caplog.records if record.name.startswith("moyo")]


def test_moyo_finds_the_group_and_the_positions(one_crystal_per_position: CrystalBatch) -> None:
    """Letters may differ from ours by a change of origin only, and the crystal stays the same."""
    crystals = one_crystal_per_position
    found = from_units([analyse(*cell, symprec=1e-3) for cell in cells(crystals)])
    assert torch.equal(found.space_group, crystals.space_group)
    assert (found.shortest_distances() - crystals.shortest_distances()).abs().max() < 1e-3
    assert (found.volumes() / crystals.volumes() - 1).abs().max() < 1e-5
    for row in range(len(crystals)):
        ours = {frozenset(zip(crystals.wyckoff[row].tolist(), crystals.species[row].tolist(), strict=True))}
        maps = symmetry.normalizer_operations(int(crystals.space_group[row]))[2]
        theirs = {
            frozenset(zip(letters.tolist(), found.species[row].tolist(), strict=True))
            for letters in maps[:, found.wyckoff[row]]
        }
        assert ours <= theirs


def test_broken_symmetry_is_noticed(one_crystal_per_position: CrystalBatch) -> None:
    """What the test above would miss if expansion were wrong: one displaced atom changes the group."""
    lattice, frac, numbers = cells(one_crystal_per_position[-1])[0]
    frac[1, 0] += 0.1 / lattice[0, 0]
    assert analyse(lattice, frac, numbers, symprec=1e-3, max_sites=1000).space_group != 230


@pytest.mark.parametrize(
    ("lattice", "frac", "reason"),
    [
        (np.eye(3) * 4, np.zeros((0, 3)), "no atoms"),
        (np.eye(3) * 4, np.zeros((2, 3)), "symmetry not found"),  # one atom on another
        (np.eye(3) * 4, np.full((1, 3), np.nan), "symmetry not found"),
        (np.zeros((3, 3)), np.zeros((1, 3)), "symmetry not found"),
        (np.diag([9.0, 8.0, 7.0]), np.random.default_rng(0).random((21, 3)), "too many sites"),
    ],
)
def test_hopeless_structures_say_why(lattice: np.ndarray, frac: np.ndarray, reason: str) -> None:
    with pytest.raises(SymmetryError, match=reason):
        analyse(lattice, frac, np.arange(1, len(frac) + 1) * 0 + 6)


# ---- representatives ----


def test_any_atom_of_an_orbit_gives_the_same_representative() -> None:
    group, letter = every_position()
    crystals = random_crystals(group, letter[:, None])
    frac, _, crystal, _ = crystals.atoms()
    sample = torch.randperm(len(frac), generator=torch.Generator().manual_seed(0))[:3000]
    from_any, distance = symmetry.representatives(
        group[crystal[sample]], letter[crystal[sample]][:, None], frac[sample][:, None]
    )
    canonical, _ = symmetry.representatives(group, letter[:, None], crystals.frac_coords)
    assert distance.max() < 1e-9
    assert (from_any - canonical[crystal[sample]]).abs().max() < 1e-9


def test_representative_is_the_smallest_point_on_the_first_triplet() -> None:
    """In Pm-3m, 6e is (x, 0, 0): of the orbit of (0, 0, 0.7) both (0.3, 0, 0) and (0.7, 0, 0) qualify."""
    group, wyckoff = torch.tensor([221]), torch.tensor([[symmetry.letter_index("e")]])
    point = torch.tensor([[[0.0, 0.0, 0.7]]], dtype=torch.float64)
    coords, distance = symmetry.representatives(group, wyckoff, point)
    assert coords[0, 0].tolist() == pytest.approx([0.3, 0.0, 0.0])
    assert float(distance) < 1e-12
    _, distance = symmetry.representatives(group, wyckoff, point + 0.1)
    assert float(distance) > 0.05


# ---- normalisers ----


def test_sizes_of_normalisers() -> None:
    """International Tables A, table 3.5.2 (axis permutations of orthorhombic groups included)."""
    t = symmetry.normalizer_tables()
    expected = {2: 8, 14: 8, 47: 8 * 6, 62: 8, 123: 4, 139: 2, 166: 2, 194: 2, 198: 8, 216: 8, 225: 2, 227: 2, 230: 1}
    assert {group: int(t.count[group]) for group in expected} == expected
    # centrosymmetric groups have no hand, the 65 groups of rotations and screws have two
    one_handed = [int(t.count[g]) == 2 * int(t.proper_count[g]) for g in GROUPS]
    rotations_only = [bool((torch.linalg.det(general_operations(g)[0]) > 0).all()) for g in GROUPS]
    enantiomorphic = {
        76,
        78,
        91,
        95,
        92,
        96,
        144,
        145,
        151,
        153,
        152,
        154,
        169,
        170,
        171,
        172,
        178,
        179,
        180,
        181,
        212,
        213,
    }
    for group in GROUPS:
        assert one_handed[group - 1] == (rotations_only[group - 1] and group not in enantiomorphic), group
    assert sum(rotations_only) == 65


def test_normalisers_map_every_group_onto_itself() -> None:
    for group in GROUPS:
        rotations, translations = general_operations(group)
        known = as_set(rotations, translations)
        turns, shifts, _ = symmetry.normalizer_operations(group)
        for turn, shift in zip(turns, shifts, strict=True):
            turned = turn @ rotations @ turn.inverse()
            assert as_set(turned, shift + translations @ turn.mT - turned @ shift) == known, group


def test_letters_of_equivalent_descriptions_are_those_of_moyo() -> None:
    """moyo's own normaliser of a random crystal in every group (it does not permute axes of unequal length)."""
    generator = torch.Generator().manual_seed(1)
    for group in GROUPS:
        last = int(symmetry.tables().num_letters[group])
        some = torch.randperm(last, generator=generator)[:4] + 1
        wyckoff = torch.cat([some, torch.tensor([last])])[None]
        cell = cells(random_crystals(torch.tensor([group]), wyckoff))[0]
        found = MoyoDataset(Cell(*(array.tolist() for array in cell)), symprec=1e-3)
        sequences = [sequence for _, sequence in found.normalizer_wyckoff_positions().coset_representatives]
        theirs = {
            frozenset(
                (symmetry.letter_index(w.letter), z) for w, z in zip(sequence, found.std_cell.numbers, strict=True)
            )
            for sequence in sequences
        }
        rotations, _, maps = symmetry.normalizer_operations(group)
        if 16 <= group <= 74:
            maps = maps[(rotations.abs() == torch.eye(3)).all(-1).all(-1)]
        unit = analyse(*cell, symprec=1e-3)
        ours = {
            frozenset(zip(letters.tolist(), unit.species.tolist(), strict=True)) for letters in maps[:, unit.wyckoff]
        }
        assert ours == theirs, group


def test_polar_axes() -> None:
    polar = symmetry.tables().polar
    assert polar[[1, 3, 6, 25, 79, 160, 225]].tolist() == [
        [True, True, True],
        [False, True, False],
        [True, False, True],
        [False, False, True],
        [False, False, True],
        [False, False, True],
        [False, False, False],
    ]
    assert int(polar[1:].any(-1).sum()) == 68  # the polar space groups

"""Canonical descriptions: the same, for all 230 space groups, whatever origin, cell and order of atoms came in."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Structure

from cfrl.commands.data import run_import
from cfrl.config import DataConfig
from cfrl.crystals import symmetry
from cfrl.crystals.canonical import with_representatives
from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.storage import read_crystals, write_crystals
from cfrl.model.files import load_model
from cfrl.model.transformer import CrystalTransformer
from cfrl.screening.retrieval import rank

CELL = torch.tensor([[36.4, 41.2, 46.8, 83.0, 101.0, 97.0]], dtype=torch.float64)
GENERAL = (8, 8, 26)  # elements on the general position: two sites that can only be told apart by their coordinates
SPECIAL = (8, 12, 12)


def random_crystals(seed: int) -> CrystalBatch:
    """A crystal of each space group: three sites on the general and three on random positions."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(1, 231)
    last = symmetry.tables().num_letters[groups]
    some = (torch.rand(230, len(SPECIAL), generator=generator) * last[:, None]).long() + 1
    wyckoff = torch.cat([some, last[:, None].expand(-1, len(GENERAL))], 1)
    # Nothing fits twice on a position without freedom.
    fixed = symmetry.tables().dof[groups[:, None], wyckoff] == 0
    twice = (wyckoff[:, :, None] == wyckoff[:, None]).tril(-1).any(-1)
    wyckoff = torch.where(fixed & twice, last[:, None], wyckoff)
    points = torch.rand(*wyckoff.shape, 3, generator=generator, dtype=torch.float64)
    lattice = symmetry.constrain_lattice(groups, CELL.repeat(230, 1))
    species = torch.tensor(SPECIAL + GENERAL).repeat(230, 1)
    return with_representatives(CrystalBatch(groups, wyckoff, species, points, lattice))[0]


def rigidly_shifted(crystals: CrystalBatch, seed: int) -> CrystalBatch:
    """Moved at random along polar axes, and described by random equivalent origins and axes."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.rand(len(crystals), 1, 3, generator=generator, dtype=torch.float64)
    shift = shift * symmetry.tables().polar[crystals.space_group][:, None]
    moved = replace(crystals, frac_coords=crystals.frac_coords + shift.to(crystals.frac_coords))
    choice = torch.rand(len(crystals), generator=generator) * crystals.num_descriptions()
    return with_representatives(moved)[0].described_as(choice.long())


def other_cell(structure: Structure, rng: np.random.Generator) -> Structure:
    """Shifted, in another cell of the same lattice, its atoms in another order."""
    turn = np.zeros((3, 3))
    while round(np.linalg.det(turn)) != 1:
        turn = rng.integers(-2, 3, (3, 3))
    structure = structure.copy()
    structure.make_supercell(turn, to_unit_cell=True)
    structure.translate_sites(range(len(structure)), rng.random(3))
    return Structure.from_sites([structure[i] for i in rng.permutation(len(structure))])


def differing(one: CrystalBatch, other: CrystalBatch, coords: float = 1e-6, lattice: float = 1e-5) -> list[int]:
    """Rows of unlike descriptions; coordinates are compared modulo 1."""
    apart = one.frac_coords - other.frac_coords
    apart = (apart - apart.round()).abs().amax((1, 2)) > coords
    apart |= (one.wyckoff != other.wyckoff).any(1) | (one.species != other.species).any(1)
    apart |= (one.lattice - other.lattice).abs().amax(1) > lattice
    return (apart | (one.space_group != other.space_group)).nonzero()[:, 0].tolist()


@pytest.fixture(scope="module", params=[0, 1])
def crystals(request) -> CrystalBatch:
    return random_crystals(request.param)


@pytest.fixture(scope="module")
def polar() -> CrystalBatch:
    """Real polar crystals among pymatgen's prototypes, wurtzite and moissanite with them."""
    structures = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
    found = CrystalBatch.from_structures(structures, errors="skip", dtype=torch.float64)
    found = found[symmetry.tables().polar[found.space_group].any(-1) & (found.num_sites <= 20)].trim()
    assert len(found) == 25
    assert {"ZnS", "SiC"} <= set(found.formulas())
    return found


# ---- one description of a crystal ----


def test_origin_and_axes_do_not_matter(crystals: CrystalBatch) -> None:
    canonical = crystals.canonical()
    for seed in range(3):
        assert differing(rigidly_shifted(crystals, seed).canonical(), canonical) == []


def test_canonical_is_idempotent(crystals: CrystalBatch, polar: CrystalBatch) -> None:
    for some in (crystals, polar):
        assert differing(some.canonical().canonical(), some.canonical()) == []


def test_canonical_is_the_same_crystal(crystals: CrystalBatch) -> None:
    """All distances between atoms, by elements; and it stays on the first triplets, in order, at 0 where polar."""
    canonical = crystals.canonical()
    assert (symmetry.representatives(canonical.space_group, canonical.wyckoff, canonical.frac_coords)[1] < 1e-9).all()
    projected = symmetry.project_coords(canonical.space_group, canonical.wyckoff, canonical.frac_coords)
    assert torch.equal(projected, canonical.frac_coords)
    assert torch.equal(with_representatives(canonical)[0].wyckoff, canonical.wyckoff)
    small = (crystals.num_atoms <= 100).nonzero()[:, 0]
    assert len(small) > 120
    for one, other in zip(crystals[small].to_structures(), canonical[small].to_structures(), strict=True):
        assert np.allclose(*(_distances(s) for s in (one, other)), atol=1e-6), one.properties
    frac, _, crystal, _ = canonical.atoms()
    off = (frac - frac.round()).abs() * symmetry.tables().polar[canonical.space_group[crystal]]
    nearest = torch.full((230,), torch.inf, dtype=frac.dtype).scatter_reduce_(0, crystal, off.amax(1), "amin")
    assert nearest.max() < 1e-9


def _distances(structure: Structure) -> np.ndarray:
    numbers = np.array([site.specie.Z for site in structure])
    pairs = np.minimum.outer(numbers, numbers) * 100 + np.maximum.outer(numbers, numbers)
    return np.sort(pairs * 1000 + structure.distance_matrix, axis=None)


def test_cell_shift_and_order_of_a_structure_do_not_matter(crystals: CrystalBatch) -> None:
    """Through moyo, which sees another cell of the lattice each time."""
    rng = np.random.default_rng(0)
    structures = crystals.to_structures()
    again = [
        CrystalBatch.from_structures(some, symprec=1e-3, dtype=torch.float64)
        for some in (structures, [other_cell(s, rng) for s in structures])
    ]
    assert again[0].space_group.tolist() == [s.properties["space_group"] for s in structures]
    assert differing(*again, coords=1e-5, lattice=1e-4) == []


def test_real_polar_crystals(polar: CrystalBatch) -> None:
    rng = np.random.default_rng(1)
    # One is triclinic in a cubic cell, which can be turned in 24 ways.
    polar = polar[~((polar.space_group == 1) & ((polar.lattice[:, 3:] - 90).abs() < 1e-3).all(1))]
    assert len(polar) == 24
    again = CrystalBatch.from_structures([other_cell(s, rng) for s in polar.to_structures()], dtype=torch.float64)
    assert differing(again._pad(polar.wyckoff.shape[1]), polar, coords=1e-4, lattice=1e-3) == []


def test_canonical_agrees_between_precisions(crystals: CrystalBatch) -> None:
    """Files hold float32; noise near 0, near 1 and at round numbers must not decide."""
    single = rigidly_shifted(crystals, 5).to(dtype=torch.float32).canonical()
    assert differing(single.to(dtype=torch.float64), crystals.canonical(), coords=1e-5, lattice=1e-3) == []


def test_noise_at_special_values_does_not_matter() -> None:
    """Coordinates at multiples of 1/32, where 1e-3 and 1e-4 meet halves, with noise of either sign."""
    generator = torch.Generator().manual_seed(0)
    sites = torch.tensor([[1, 3, 3, 5], [5, 9, 0, 3], [5, 27, 8, 31]])
    frac = torch.stack([sites, sites.roll(1, 1), sites.roll(2, 1)], -1).double() / 32
    wyckoff, species = torch.full((3, 4), 1), torch.tensor([[8, 8, 8, 26]]).repeat(3, 1)
    wyckoff = symmetry.tables().num_letters[torch.tensor([1, 4, 7])][:, None].expand(3, 4)
    crystals = CrystalBatch(torch.tensor([1, 4, 7]), wyckoff, species, frac, CELL.repeat(3, 1))
    first = crystals.canonical()
    for _ in range(50):
        noise = (torch.rand(frac.shape, generator=generator, dtype=torch.float64) - 0.5) * 2e-9
        assert differing(replace(crystals, frac_coords=frac + noise).canonical(), first) == []


def test_wurtzite_has_an_atom_at_the_origin(polar: CrystalBatch) -> None:
    wurtzite = polar[polar.formulas().index("ZnS")]
    assert float(wurtzite.frac_coords[0, :2, 2].min()) == pytest.approx(0, abs=1e-6)


def test_no_sites_and_no_crystals() -> None:
    empty = CrystalBatch.empty(4)
    assert len(empty.canonical()) == 0
    bare = CrystalBatch(
        torch.tensor([1, 2]), *torch.zeros(2, 2, 0, dtype=torch.long), torch.zeros(2, 0, 3), CELL.repeat(2, 1)
    )
    assert len(bare.canonical()) == 2


# ---- what follows from it ----


def test_probability_and_ranking_do_not_depend_on_the_origin(polar: CrystalBatch) -> None:
    """Moved along their axes, the same crystals had log P some 10 nats and ratios some 2 nats apart."""
    base, tuned = load_model(), load_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    shifted = rigidly_shifted(polar, 0).to(dtype=torch.float32)
    before = _log_prob(base, polar) - _log_prob(base, shifted)
    assert before.abs().median() > 2  # else there is nothing to show
    assert (_log_prob(base, polar.canonical()) - _log_prob(base, shifted.canonical())).abs().max() < 0.02
    one, two = (rank(tuned, base, [some])[0] for some in (polar, shifted))
    for name in ("log_ratio", "log_prob", "log_prob_base"):
        assert two[name] == pytest.approx(one[name], abs=0.02)


@torch.no_grad()
def _log_prob(model: CrystalTransformer, crystals: CrystalBatch) -> torch.Tensor:
    return sum(model.log_prob(crystals.to(dtype=torch.float32)).values())


def test_import_of_an_older_dataset_makes_it_canonical(polar: CrystalBatch, tmp_path) -> None:
    old = rigidly_shifted(polar, 1)
    write_crystals(tmp_path / "old.h5", old)
    run_import([str(tmp_path / "old.h5")], tmp_path / "new.h5", DataConfig())
    new = read_crystals(tmp_path / "new.h5").to(dtype=torch.float64)._pad(polar.wyckoff.shape[1])
    assert differing(new, polar, coords=1e-5, lattice=1e-3) == []

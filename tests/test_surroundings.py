"""What stands around a place: against distances to every atom in 125 cells, one place at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.descriptors import electronegativities
from cfrl.crystals.elements import ATOMIC_NUMBERS, COVALENT_RADII
from cfrl.crystals.surroundings import _CENTRES, _WIDTHS, FAR, Surroundings
from cfrl.crystals.symmetry import constrain_lattice, project_coords
from cfrl.crystals.wyckoff import tables
from cfrl.model.drawing import draw
from tests.test_model import tiny_model

GROUPS = (16, 31, 62, 75, 99, 123, 136, 186, 194, 198, 221, 225)  # all angles are fixed: no cell is skewed by chance


@pytest.fixture(scope="module")
def crystals() -> CrystalBatch:
    torch.manual_seed(0)
    drawn = draw(tiny_model(5), torch.tensor(GROUPS).repeat(4)).to(dtype=torch.float64)
    lattice = constrain_lattice(drawn.space_group, 4 + 3 * torch.rand(len(drawn), 6).double())
    drawn = replace(drawn, lattice=lattice, properties={})
    return drawn[(drawn.num_atoms <= 60) & (drawn.num_sites > 1)]


def last_free(crystals: CrystalBatch, row: int, site: int) -> int | None:
    free = tables().free[crystals.space_group[row], crystals.wyckoff[row, site]]
    return int(free.nonzero().max()) if free.any() else None


def naive(crystals: CrystalBatch, row: int, site: int, axis: int, value: float) -> np.ndarray:
    """Word by word what `Surroundings` promise, of one place."""
    coords = crystals.frac_coords[row : row + 1].clone()
    coords[0, site, axis] = value
    group, letters = crystals.space_group[row : row + 1], crystals.wyckoff[row : row + 1]
    one = replace(crystals[[row]], frac_coords=project_coords(group, letters, coords))
    cell = one.lattice_matrix()[0].numpy()
    frac, number, _, of_site = (x.numpy() for x in one.atoms())
    cells = np.stack(np.meshgrid(*[range(-2, 3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    me, charge = int(np.flatnonzero(of_site == site)[0]), electronegativities()
    nearest, counts = FAR, np.zeros((2, len(_CENTRES)))
    for atom in np.flatnonzero(of_site <= site):
        if atom == me:
            continue
        length = np.linalg.norm((frac[atom] - frac[me] + cells) @ cell, axis=1).min()
        length = min(length / (COVALENT_RADII[number[me]] + COVALENT_RADII[number[atom]]), FAR)
        nearest = min(nearest, length)
        shells = np.exp(-(((length - np.array(_CENTRES)) / np.array(_WIDTHS)) ** 2))
        counts += np.outer([1, abs(charge[number[me]] - charge[number[atom]])], shells) * (length < FAR)
    return np.concatenate([[nearest, math.log(max(nearest, 0.05))], np.log(1 + counts.ravel())])


def test_against_all_atoms_in_125_cells(crystals):
    values = np.random.default_rng(0).random(3)
    looked = 0
    for row in range(len(crystals)):
        for site in range(int(crystals.num_sites[row])):
            axis = last_free(crystals, row, site)
            if axis is None:
                continue
            at = [torch.tensor([number]) for number in (row, site, axis)]
            told = Surroundings(crystals, *at, torch.float64)(torch.tensor(values)[None])[0].numpy()
            wanted = [naive(crystals, row, site, axis, value) for value in values]
            np.testing.assert_allclose(told, wanted, atol=0.02)  # what is nearer than 0.01 angstrom is as near as that
            np.testing.assert_allclose(told[:, 2:], np.array(wanted)[:, 2:], atol=0.01)
            looked += 1
    assert looked > 60


def test_later_sites_are_not_looked_at(crystals):
    row = torch.arange(len(crystals))
    first = torch.zeros_like(row)
    free = torch.tensor([last_free(crystals, i, 0) == 2 for i in range(len(crystals))])
    assert free.sum() > 5
    values = torch.rand(int(free.sum()), 4, dtype=torch.float64)
    moved = replace(crystals, frac_coords=crystals.frac_coords.clone(), species=crystals.species.clone())
    moved.frac_coords[:, 1:] += 0.3
    moved.species[:, 1:] = (moved.species[:, 1:] > 0) * ATOMIC_NUMBERS["Cs"]
    at = row[free], first[free], first[free] + 2
    told, again = (Surroundings(batch, *at, values.dtype)(values) for batch in (crystals, moved))
    torch.testing.assert_close(told, again)


def test_on_top_of_an_atom_the_gradient_is_finite():
    """Two sites of P1, the second where the first one is."""
    crystal = CrystalBatch(
        torch.tensor([1]),
        torch.tensor([[1, 1]]),
        torch.tensor([[11, 17]]),
        torch.zeros(1, 2, 3).double(),
        torch.tensor([[5.0, 5.0, 5.0, 90.0, 90.0, 90.0]]).double(),
    )
    values = torch.tensor([[0.0, 0.1, 0.5]], dtype=torch.float64, requires_grad=True)
    told = Surroundings(crystal, *(torch.tensor([number]) for number in (0, 1, 2)), values.dtype)(values)
    reach = COVALENT_RADII[11] + COVALENT_RADII[17]
    assert told[0, :, 0].tolist() == pytest.approx([0.01 / reach, 0.5 / reach, 2.5 / reach])
    told.sum().backward()
    assert values.grad.isfinite().all()

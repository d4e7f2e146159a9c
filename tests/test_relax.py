"""Relaxation against CHGNet's own optimiser, and against what symmetry, pressure and broken crystals demand."""

import moyopy
import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from cfrl.potentials import load_potential
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.chgnet import CHGNetPotential
from cfrl.potentials.relax import GIVEN_UP, PATIENCE, relax, symmetric_modes


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet", "cpu")


def salt(a=5.69):
    face = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return Structure(Lattice.cubic(a), ["Na"] * 4 + ["Cl"] * 4, np.concatenate([face, face + 0.5]))


def wurtzite(a=3.4, c=5.0, u=0.40):
    third = [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5]]
    return Structure(Lattice.hexagonal(a, c), ["Zn", "Zn", "O", "O"], [*third, *np.add(third, [0, 0, u])])


def rutile(a=4.5, c=3.1, x=0.32):
    oxygen = [[x, x, 0], [-x, -x, 0], [0.5 + x, 0.5 - x, 0.5], [0.5 - x, 0.5 + x, 0.5]]
    return Structure(Lattice.tetragonal(a, c), ["Ti"] * 2 + ["O"] * 4, [[0, 0, 0], [0.5] * 3, *oxygen])


def triclinic():
    lattice = Lattice.from_parameters(4.9, 5.2, 5.6, 84, 95, 101)
    return Structure(lattice, ["Mg", "Si", "O", "O"], [[0, 0, 0], [0.5, 0.45, 0.55], [0.55, 0, 0.4], [0, 0.5, 0.1]])


def space_group(structure, symprec=1e-3):
    cell = moyopy.Cell(
        structure.lattice.matrix.tolist(), structure.frac_coords.tolist(), list(structure.atomic_numbers)
    )
    return moyopy.MoyoDataset(cell, symprec=symprec).number


@pytest.mark.parametrize(
    ("structure", "displacements", "strains"),
    [(salt(), 0, 1), (rutile(), 1, 2), (wurtzite(), 2, 2), (triclinic(), 12, 6)],
)
def test_symmetric_modes_are_the_free_parameters(structure, displacements, strains):
    """Rock salt: a. Rutile: a, c, x. Wurtzite: a, c, z of both (one is a drift along the polar axis)."""
    modes, cell_modes = symmetric_modes(SymmetricCell.of(structure))
    assert (len(modes), len(cell_modes)) == (displacements, strains)
    gram = np.tensordot(modes, modes, ([1, 2], [1, 2]))
    np.testing.assert_allclose(gram, np.eye(displacements), atol=1e-9)


@pytest.mark.parametrize("structure", [salt(), rutile(), wurtzite(), salt().get_primitive_structure()])
def test_moving_along_symmetric_modes_keeps_the_space_group(structure):
    modes, strains = symmetric_modes(SymmetricCell.of(structure))
    rng = np.random.default_rng(0)
    strain = np.eye(3) + 0.05 * np.tensordot(rng.normal(size=len(strains)), strains, 1)
    cart = structure.cart_coords + 0.1 * np.tensordot(rng.normal(size=len(modes)), modes, 1)
    moved = Structure(
        Lattice(structure.lattice.matrix @ strain), structure.species, cart @ strain, coords_are_cartesian=True
    )
    assert space_group(moved) == space_group(structure)
    assert not np.allclose(moved.lattice.abc, structure.lattice.abc)


def test_energies_and_structures_are_those_of_chgnets_optimiser(chgnet):
    from chgnet.model import StructOptimizer
    from pymatgen.analysis.structure_matcher import StructureMatcher

    structures = [salt(5.3).get_primitive_structure(), wurtzite()]
    result = relax(structures, chgnet, fmax=0.02)
    assert result.converged.all()
    assert result.status == ["", ""]
    optimiser = StructOptimizer(model=chgnet.model, use_device="cpu")
    for i, structure in enumerate(structures):
        own = optimiser.relax(structure, fmax=0.02, verbose=False, assign_magmoms=False)
        assert result.energy[i] == pytest.approx(own["trajectory"].energies[-1] / len(structure), abs=0.002)
        assert result.steps[i] < len(own["trajectory"].energies)
        assert StructureMatcher(scale=False).fit(own["final_structure"], result.structures[i])
    assert chgnet.compute(result.structures).energy == pytest.approx(result.energy, abs=1e-4)


def test_the_end_has_no_forces_no_stress_and_the_start_s_space_group(chgnet):
    structures = [rutile(), wurtzite(), triclinic()]
    result = relax(structures, chgnet, fmax=0.03)
    assert result.converged.all()
    found = chgnet.compute(result.structures, forces=True, stress=True)
    for i, structure in enumerate(result.structures):
        assert np.linalg.norm(found.forces[i], axis=1).max() < 0.031
        assert np.abs(found.stress[i]).max() * structure.volume / len(structure) < 0.031
        assert space_group(structure) == space_group(structures[i])


def test_displacement_and_volume_are_measured_from_the_start(chgnet):
    shifted = wurtzite()
    result = relax([salt(5.2), shifted], chgnet)
    end = result.structures
    assert result.rmsd[0] == pytest.approx(0, abs=1e-9)
    assert result.volume_change[0] == pytest.approx(end[0].volume / 5.2**3 - 1)
    assert result.volume_change[0] > 0.05
    # zinc and oxygen move apart along c by (u_end - 0.40) c; each goes half that way in the frame of no drift
    apart = (end[1].frac_coords[2, 2] - end[1].frac_coords[0, 2] - 0.40) * end[1].lattice.c
    assert result.rmsd[1] == pytest.approx(abs(apart) / 2, abs=1e-6)


def test_free_relaxation_leaves_a_saddle_that_symmetry_holds(chgnet):
    """The ideal cubic perovskite may only scale; let free, bismuth and scandium leave the centres."""
    frac = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    cubic = Structure(Lattice.cubic(4.05), ["Bi", "Sc", "O", "O", "O"], frac)
    held, free = (relax([cubic], chgnet, keep_symmetry=keep) for keep in (True, False))
    assert held.status == free.status == [""]
    assert held.rmsd[0] == pytest.approx(0, abs=1e-9)
    assert space_group(held.structures[0]) == 221
    assert free.energy[0] < held.energy[0] - 0.1
    assert space_group(free.structures[0], 0.05) != 221


def test_fixed_cell(chgnet):
    result = relax([rutile()], chgnet, cell=False)
    np.testing.assert_allclose(result.structures[0].lattice.matrix, rutile().lattice.matrix)
    assert result.converged[0]
    assert result.rmsd[0] > 0.01


def test_steps_are_limited(chgnet):
    result = relax([triclinic()], chgnet, steps=3, fmax=1e-3)
    assert (result.steps[0], result.converged[0], result.status[0]) == (3, False, "")
    assert result.energy[0] < chgnet.compute([triclinic()]).energy[0]


def test_what_is_above_its_ceiling_after_some_steps_is_given_up(chgnet):
    """Between its energy at the tenth step and the end, a ceiling lets it go on only where it is lower than that."""
    far, early, end = triclinic(), relax([triclinic()], chgnet, steps=PATIENCE), relax([triclinic()], chgnet)
    assert end.steps[0] > PATIENCE
    assert end.energy[0] < early.energy[0] - 1e-3
    levels = early.energy[0] + np.array([-1e-3, 1e-3, np.inf, np.nan])
    result = relax([far, far, far, far, salt()], chgnet, ceiling=[*levels, -np.inf])
    assert result.status == [GIVEN_UP, "", "", "", ""]
    assert result.steps[0] == PATIENCE
    assert result.converged.tolist() == [False, True, True, True, True]
    assert result.steps[4] < PATIENCE, "one that has converged by then is kept"
    assert np.isnan(result.energy[0])
    np.testing.assert_allclose(result.energy[1:4], end.energy[0], atol=1e-3)


def test_crystals_are_replaced_as_they_finish_and_each_is_counted_once(chgnet, monkeypatch):
    structures = [salt(5.69 - 0.02 * i) for i in range(5)] + [rutile(), wurtzite()]
    together = relax(structures, chgnet)
    monkeypatch.setattr(chgnet, "max_atoms", 8)
    done = []
    result = relax(structures, chgnet, progress=done.append)
    np.testing.assert_allclose(result.energy, together.energy, atol=1e-4)
    assert done == list(range(1, 8))


def test_crystals_that_cannot_be_relaxed_are_taken_out_with_a_reason(chgnet):
    overlapping = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]])
    isolated = Structure(Lattice.cubic(12), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    unknown = Structure(Lattice.cubic(3.3), ["Po"], [[0, 0, 0]])
    disordered = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    result = relax([overlapping, salt(), isolated, unknown, disordered], chgnet)
    assert result.converged.tolist() == [False, True, False, False, False]
    for status, word in zip(result.status, ["closer", "", "no neighbour", "Po", "disordered"], strict=True):
        assert word in status
        assert bool(word) == bool(status)
    assert np.isnan(result.energy[[0, 2, 3, 4]]).all()
    assert result.structures[0] is None
    assert len(relax([], chgnet)) == 0


class Pressed(CHGNetPotential):
    """CHGNet under pressure (eV/angstrom^3): the enthalpy in place of the energy."""

    pressure = 0.0

    def evaluate(self, graphs, forces, stress, features):
        part = super().evaluate(graphs, forces, stress, features)
        part.energy += self.pressure * np.array([g.cell.volume / len(g.cell) for g in graphs])
        part.stress += self.pressure * np.eye(3)
        return part


@pytest.mark.parametrize(("pressure", "word"), [(-0.5, "exploded"), (3.0, "collapsed")])
def test_exploding_and_collapsing_crystals_are_taken_out(pressure, word):
    pressed = Pressed("0.3.0", torch.device("cpu"))
    pressed.pressure = pressure
    result = relax([salt()], pressed)
    assert not result.converged[0]
    assert word in result.status[0]
    assert np.isnan(result.energy[0])
    assert result.structures[0] is not None


def test_the_last_fall_says_what_is_left_to_fall(chgnet):
    far = triclinic()
    ends = [relax([far], chgnet, steps=k) for k in range(1, 5)]
    energies = [end.energy[0] for end in ends]
    assert sorted(energies, reverse=True) == energies
    assert ends[0].fall.tolist() == [0.0]  # nothing to compare with
    for k in (1, 2, 3):
        if energies[k - 1] > energies[k]:
            assert ends[k].fall[0] == pytest.approx(energies[k - 1] - energies[k], abs=1e-5)
    assert ends[1].fall[0] > 0.01
    whole = relax([far], chgnet)
    assert whole.converged[0]
    assert whole.fall.tolist() == [0.0]

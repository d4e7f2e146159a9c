"""Phonons and elastic tensors: phonopy by hand, group theory, energies; known soft crystals, and where they go."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.lj import LennardJones as AseLennardJones
from chgnet.model.dynamics import CHGNetCalculator
from phonopy import Phonopy
from pymatgen.core import Lattice, Structure

import cfrl
from cfrl.commands.screen import screen
from cfrl.config import ScreenConfig
from cfrl.errors import UserError
from cfrl.potentials import Evaluation, Potential, load_potential
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.relax import relax
from cfrl.reports.phonons import phonon_figures
from cfrl.screening import stages
from cfrl.screening.elastic import GPA, compute_elasticity
from cfrl.screening.phonons import DISPLACEMENT, PhononSettings, compute_phonons, supercell_matrix
from cfrl.screening.pipeline import restore
from tests.test_screen import SerialEngine, read_table, rock_salt, serial, write_csv  # noqa: F401

LOOSE = PhononSettings(supercell=6.0, tolerance=0.1)


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet", "cpu")


def cubic(group: str, a: float, species: list[str], sites: list) -> Structure:
    return Structure.from_spacegroup(group, Lattice.cubic(a), species, sites)


def silicon() -> Structure:
    return cubic("Fd-3m", 5.43, ["Si"], [[0, 0, 0]])


def zirconia() -> Structure:
    """Cubic, the phase of high temperature: its oxygen columns shift along c, which gives the tetragonal phase."""
    return cubic("Fm-3m", 5.1, ["Zr", "O"], [[0, 0, 0], [0.25, 0.25, 0.25]])


def copper(group: str, a: float) -> Structure:
    return cubic(group, a, ["Cu"], [[0, 0, 0]])


# ---- phonons ----


@pytest.mark.parametrize("structure", [silicon(), rock_salt()], ids=["Si", "NaCl"])
def test_frequencies_are_those_of_phonopy_by_hand_with_chgnets_own_calculator(chgnet, structure) -> None:
    ours = compute_phonons(structure, chgnet, LOOSE).phonopy
    hand = Phonopy(ours.unitcell, ours.supercell_matrix, np.eye(3))
    hand.generate_displacements(distance=DISPLACEMENT)
    calculator = CHGNetCalculator(model=chgnet.model, use_device="cpu")
    forces = []
    for cell in hand.supercells_with_displacements:
        atoms = Structure(cell.cell, cell.symbols, cell.scaled_positions).to_ase_atoms()
        forces.append(calculator.get_property("forces", atoms))
    hand.produce_force_constants(np.array(forces), show_drift=False)
    raw = hand.get_frequencies([0, 0, 0])
    assert np.abs(raw[np.argsort(np.abs(raw))][:3]).max() < 0.1, "acoustic sum rule, which is not imposed here"
    hand.symmetrize_force_constants(show_drift=False)
    for q in ([0, 0, 0], [0.5, 0, 0.5], [0.5, 0.5, 0.5]):
        np.testing.assert_allclose(ours.get_frequencies(q), hand.get_frequencies(q), atol=0.02)


def test_modes_of_silicon_are_as_degenerate_as_group_theory_says(chgnet) -> None:
    found = compute_phonons(silicon(), chgnet, LOOSE)
    gamma, x = (found.phonopy.get_frequencies(q) for q in ([0, 0, 0], [0.5, 0, 0.5]))
    np.testing.assert_allclose(gamma, [0, 0, 0, *[gamma[5]] * 3], atol=0.01)
    np.testing.assert_allclose(x[::2], x[1::2], atol=0.01)  # the glide joins all modes at X in pairs
    assert found.lowest > -0.05
    assert found.softest is None
    states = np.trapezoid(found.dos["density"], found.dos["frequency"])
    assert states == pytest.approx(6, rel=0.05), "as many states as degrees of freedom"


def test_supercells_hold_no_atom_nearer_to_its_image() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        primitive = rng.normal(size=(3, 3)) * 2 + 4 * np.eye(3)
        matrix = supercell_matrix(primitive, primitive, 9.0)
        steps = np.stack(np.meshgrid(*[range(-3, 4)] * 3), -1).reshape(-1, 3)
        lengths = np.linalg.norm(steps[steps.any(1)] @ matrix.T @ primitive, axis=1)
        assert lengths.min() >= 9.0 - 1e-3


def test_supercells_are_repeats_of_the_cell_that_needs_fewer_atoms() -> None:
    hexagonal = Lattice.hexagonal(3.0, 30.0).matrix
    primitive = np.array([[2, 1, 1], [-1, 1, 1], [-1, -2, 1]]) / 3 @ hexagonal
    matrix = supercell_matrix(primitive, hexagonal, 9.0)
    np.testing.assert_allclose(matrix.T @ primitive, np.diag([3, 3, 1]) @ hexagonal, atol=1e-9)
    salt = np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2 * 5.6
    assert round(np.linalg.det(supercell_matrix(salt, np.eye(3) * 5.6, 11.0))) == 27  # not 32, twice the cube


def test_cubic_zirconia_is_unstable_at_x_and_becomes_tetragonal(chgnet) -> None:
    found = compute_phonons(zirconia(), chgnet, LOOSE)
    mode = found.softest
    assert found.lowest == pytest.approx(mode.frequency)
    assert mode.frequency < -3
    np.testing.assert_allclose(np.sort(np.abs(mode.q)), [0, 0.5, 0.5], atol=1e-9)
    oxygen = [site.specie.symbol == "O" for site in mode.cell]
    assert np.abs(mode.displacements[np.logical_not(oxygen)]).max() < 0.05, "zirconium stands still"
    along = [mode.cell.copy() for _ in range(2)]
    for atom, way in enumerate(mode.displacements):
        along[1].translate_sites([atom], 0.05 * way, frac_coords=False)
    start, moved = chgnet.compute(along).energy
    assert moved < start
    record = stages.follow(
        [(mode.cell, mode.displacements)], "chgnet", "cpu", stages.Relaxation(0.02, 200, False), 0.05
    )
    assert record[0]["status"] == ""
    end = restore(record[0]["structure"])
    assert end.get_space_group_info(0.01)[1] == 137
    held, end = relax([zirconia(), end], chgnet).energy
    assert end < held - 0.01


def test_what_a_supercell_cannot_hold_is_said(chgnet) -> None:
    lead = stages.phonons([silicon()], "chgnet", "cpu", PhononSettings(100.0, 0.1))
    assert "atoms in a supercell of 100 A" in lead[0]["status"]


# ---- elasticity ----


CRYSTALS = {
    "Si": silicon(),
    "salt": rock_salt(),
    "salt, primitive": rock_salt().get_primitive_structure(),
    "MgO": rock_salt("Mg", "O", 4.25),
    "fcc Cu": copper("Fm-3m", 3.6),
    "bcc Cu": copper("Im-3m", 2.9),
    "simple cubic Cu": copper("Pm-3m", 2.4),
}


@pytest.fixture(scope="module")
def tensors(chgnet):
    return dict(zip(CRYSTALS, compute_elasticity(list(CRYSTALS.values()), chgnet), strict=True))


class LennardJones(Potential):
    """Argon's, by ASE; smooth where it is cut off."""

    name, training_scale, elements, cutoff, max_atoms = "lennard-jones", "", frozenset([18]), 9.0, 10_000
    scale_of = name_of = staticmethod(str)

    def prepare(self, cell: SymmetricCell) -> Atoms:
        return Atoms(cell.numbers, cell=cell.matrix, scaled_positions=cell.frac, pbc=True)

    def evaluate(self, graphs: list[Atoms], forces: bool, stress: bool, features: bool) -> Evaluation:
        for atoms in graphs:
            atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=9.0, ro=7.0, smooth=True)
        return Evaluation(
            np.array([atoms.get_potential_energy() / len(atoms) for atoms in graphs]),
            [""] * len(graphs),
            [atoms.get_forces() for atoms in graphs] if forces else None,
            np.stack([atoms.get_stress(voigt=False) for atoms in graphs]) if stress else None,
        )


def of_energies(structure: Structure, potential: Potential) -> tuple[float, float]:
    """Bulk modulus and C11 - C12 (GPa) of a cubic crystal, from energies alone.

    9 V B = d2E/de2 of all axes alike; strains (d, -d, d^2/(1 - d^2)) keep the volume and cost V (C11 - C12) d^2.
    """
    start = relax([structure], potential, fmax=0.001).structures[0]
    amounts = np.linspace(-0.02, 0.02, 9)
    strains = [e * np.eye(3) for e in amounts] + [np.diag([d, -d, d * d / (1 - d * d)]) for d in amounts]
    cells = [Structure(start.lattice.matrix @ (np.eye(3) + s), start.species, start.frac_coords) for s in strains]
    energy = potential.compute(cells).energy * len(start)
    bulk = 2 * np.polyfit(amounts, energy[:9], 4)[2] / (9 * start.volume)
    return GPA * bulk, GPA * np.polyfit(amounts, energy[9:], 4)[2] / start.volume


@pytest.mark.parametrize("name", ["salt", "MgO"])
def test_bulk_modulus_is_that_of_the_energy_and_volume(chgnet, tensors, name: str) -> None:
    """As far as CHGNet's ripples allow: its energy is not smooth (docs/phonons.md)."""
    modulus, _ = of_energies(CRYSTALS[name], chgnet)
    assert tensors[name].bulk_modulus == pytest.approx(modulus, rel=0.15)


def test_a_smooth_potential_s_tensor_is_exact() -> None:
    """Argon by Lennard-Jones: the moduli of the energy, and Cauchy's relation of pair potentials, C12 = C44."""
    argon = cubic("Fm-3m", 5.2, ["Ar"], [[0, 0, 0]])
    [tensor] = compute_elasticity([argon], LennardJones())
    modulus, shear = of_energies(argon, LennardJones())
    c = tensor.stiffness
    assert tensor.bulk_modulus == pytest.approx(modulus, rel=0.02)
    assert c[0, 0] - c[0, 1] == pytest.approx(shear, rel=0.02)
    assert c[0, 1] == pytest.approx(c[3, 3], rel=0.03)
    assert tensor.lowest > 1


def test_the_tensor_does_not_depend_on_the_cell(tensors) -> None:
    whole, primitive = tensors["salt"], tensors["salt, primitive"]
    assert primitive.bulk_modulus == pytest.approx(whole.bulk_modulus, rel=0.03)
    assert primitive.shear_modulus == pytest.approx(whole.shear_modulus, rel=0.1)


def test_cubic_tensors_have_three_constants(tensors) -> None:
    for name in ("Si", "salt", "fcc Cu", "bcc Cu"):
        c = tensors[name].stiffness
        expected = np.diag([c[0, 0]] * 3 + [c[3, 3]] * 3)
        expected[:3, :3] += c[0, 1] * (1 - np.eye(3))
        np.testing.assert_allclose(c, expected, atol=0.5)
        assert tensors[name].bulk_modulus == pytest.approx((c[0, 0] + 2 * c[0, 1]) / 3, rel=1e-3)


def test_copper_is_stable_as_fcc_alone(chgnet, tensors) -> None:
    assert tensors["fcc Cu"].lowest > 10
    assert tensors["simple cubic Cu"].lowest < -10
    bcc = tensors["bcc Cu"]
    assert bcc.lowest == pytest.approx(bcc.stiffness[0, 0] - bcc.stiffness[0, 1], abs=0.5), "the way of Bain, to fcc"
    assert bcc.lowest < -10
    assert of_energies(CRYSTALS["bcc Cu"], chgnet)[1] < 0


def test_one_crystal_s_failure_stays_its_own() -> None:
    unknown = copper("Pm-3m", 3.3).replace_species({"Cu": "Po"})
    elastic = stages.elastic([unknown, copper("Fm-3m", 3.6)], "chgnet", "cpu")
    phonons = stages.phonons([unknown, copper("Fm-3m", 3.6)], "chgnet", "cpu", LOOSE)
    for first, second in (elastic, phonons):
        assert first == {"status": "element Po unknown to the potential"}
        assert second["status"] == ""
    assert (elastic[1]["mechanically_stable"], phonons[1]["dynamically_stable"]) == (True, True)
    json.dumps([elastic, phonons])


# ---- in a screening ----


@pytest.fixture
def oxides(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "oxides.csv", {"MgO": rock_salt("Mg", "O", 4.25), "ZrO2": zirconia()})


def test_unstable_candidates_are_none_and_their_successors_get_rows(
    serial: type[SerialEngine],  # noqa: F811
    oxides: Path,
) -> None:
    """Also where the filter asks for what is not known before."""
    config = ScreenConfig(stability=False, elastic=True, phonons=2, supercell=5.0, follow=True)
    config = replace(config, filter="dynamically_stable == 1", rank="-lowest_frequency")
    run = screen(str(oxides), config)
    table = read_table(run)
    assert set(table) == {"MgO", "ZrO2", "ZrO2-followed"}
    assert (table["MgO"]["dynamically_stable"], table["MgO"]["candidate"]) == ("1", "1")
    assert (table["ZrO2"]["dynamically_stable"], table["ZrO2"]["candidate"]) == ("0", "0")
    child = table["ZrO2-followed"]
    assert (child["parent"], child["unique"], child["space_group"]) == ("ZrO2", "1", "137")
    assert float(child["energy_per_atom"]) < float(table["ZrO2"]["energy_per_atom"]) - 0.01
    assert all(row["mechanically_stable"] for row in table.values())
    summary = json.loads((run / "summary.json").read_text())
    rates = {rate["name"]: (rate["count"], rate["total"]) for rate in summary["rates"]}
    assert rates["valid"] == (2, 2), "a successor is not of the input"
    assert rates["dynamically stable"] == (1, 2)
    assert summary["followed"]["successors"] == 1
    assert cfrl.read_crystals(run / "screen.h5").ids.count("ZrO2-followed") == 1
    assert "Phonons of ZrO" in (run / "report.html").read_text()
    files = sorted((run / "phonons").glob("*.json"))
    assert len(files) == 3
    bands, states = phonon_figures(next(path for path in files if json.loads(path.read_text())["id"] == "ZrO2"))
    assert np.nanmin(np.array(bands.series[0].y, float)) < -3
    assert len(bands.series) == len(states.series) == 2, "what is imaginary in a colour of its own"
    done = len(serial.done)
    before = (run / "table.csv").read_bytes()
    screen(None, config, resume=run)
    assert len(serial.done) == done, "nothing is computed twice"
    assert (run / "table.csv").read_bytes() == before


def test_phonopy_reads_what_is_written(
    serial: type[SerialEngine],  # noqa: F811
    tmp_path: Path,
) -> None:
    import phonopy

    source = write_csv(tmp_path / "salt.csv", {"salt": rock_salt()})
    run = screen(str(source), ScreenConfig(stability=False, relax=False, report=False, phonons=1, supercell=5.0))
    found = phonopy.load(next((run / "phonons").glob("*.yaml")), primitive_matrix="P", log_level=0)
    record = json.loads(next((run / "phonons").glob("*.json")).read_text())
    assert max(found.get_frequencies([0, 0, 0])) == pytest.approx(np.max(record["bands"]["frequencies"][0]), abs=0.02)


def test_without_phonopy_the_remedy_is_said_before_the_work(
    serial: type[SerialEngine],  # noqa: F811
    oxides: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "phonopy", None)
    with pytest.raises(UserError, match=r"pip install 'cfrl\[phonons\]'"):
        screen(str(oxides), ScreenConfig(phonons=1))
    assert not Path("runs").exists()


def test_the_library_has_them_too() -> None:
    """Magnesia and beryllia, as rock salt and as caesium chloride."""
    squeezed = cubic("Pm-3m", 2.3, ["Be", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    table = cfrl.screen([rock_salt("Mg", "O", 4.25), squeezed], stability=False, relax=False, elastic=True)
    assert table["mechanically_stable"].tolist() == [1.0, 0.0]
    assert table["candidate"].tolist() == [1.0, 0.0]

"""Potentials against their own packages, against finite differences, and against crystals made to break them."""

import threading

import numpy as np
import pytest
import torch
from pymatgen.core import Element, Lattice, Structure

from cfrl.crystals import symmetry
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.potentials import Evaluation, load_potential
from cfrl.potentials.cells import SymmetricCell
from cfrl.potentials.chgnet import CHGNetPotential
from cfrl.potentials.folded import fold

ENERGY, FORCE, STRESS = 2e-4, 1e-3, 5e-5  # float32 noise: eV/atom, eV/angstrom, eV/angstrom^3


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet", "cpu")


@pytest.fixture(scope="module")
def crystals():
    """One crystal in nearly every space group, of the first two Wyckoff positions, cells of at most 48 atoms."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(1, 231)
    wyckoff = torch.tensor([[1, min(2, int(n))] for n in symmetry.tables().num_letters[1:]])
    coords = symmetry.project_coords(group, wyckoff, torch.rand(230, 2, 3, generator=generator, dtype=torch.float64))
    atoms = symmetry.multiplicity(group, wyckoff).sum(1)
    lengths = (12.0 * atoms[:, None]) ** (1 / 3) * (0.9 + 0.2 * torch.rand(230, 3, generator=generator))
    angles = 80 + 20 * torch.rand(230, 3, generator=generator)
    lattice = symmetry.constrain_lattice(group, torch.cat([lengths, angles], 1).double())
    species = torch.tensor([[38, 8], [22, 7], [11, 17], [29, 16], [13, 15]])[torch.arange(230) % 5]
    batch = CrystalBatch(group, wyckoff, species, coords, lattice)
    return batch[(atoms <= 48) & (batch.shortest_distances() > 0.8)].to_structures()


def salt(a=5.69):
    face = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    return Structure(Lattice.cubic(a), ["Na"] * 4 + ["Cl"] * 4, np.concatenate([face, face + 0.5]))


def low_symmetry(seed=0):
    """A perovskite whose atoms and cell are shaken: no symmetry, forces and stress."""
    rng = np.random.default_rng(seed)
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    matrix = 3.95 * (np.eye(3) + rng.normal(0, 0.02, (3, 3)))
    return Structure(Lattice(matrix), ["Sr", "Ti", "O", "O", "O"], frac + rng.normal(0, 0.02, (5, 3)))


@pytest.mark.parametrize("name", ["chgnet", "chgnet:0.2.0"])
def test_energies_and_features_are_chgnets_own(name, crystals):
    """The folded graphs give what CHGNet gives for whole cells, in every space group."""
    potential = load_potential(name, "cpu")
    assert len(crystals) > 150
    crystals = crystals[:: 4 if name == "chgnet" else 16]
    own = potential.model.predict_structure(crystals, task="e", return_atom_feas=True)
    result = potential.compute(crystals, features=True)
    assert result.status == [""] * len(crystals)
    np.testing.assert_allclose(result.energy, [float(o["e"]) for o in own], atol=ENERGY)
    layer = result.features.reshape(len(crystals), 2, 4, 64)[:, 0]
    for features, o in zip(layer, own, strict=True):
        atoms = o["atom_fea"]
        expected = np.stack([atoms.mean(0), atoms.std(0), atoms.min(0), atoms.max(0)])
        np.testing.assert_allclose(features, expected, atol=2e-3)


def test_forces_and_stress_are_chgnets_own(chgnet, crystals):
    structures = [*crystals[::12], low_symmetry()]
    own = chgnet.model.predict_structure(structures, task="efs", batch_size=4)
    result = chgnet.compute(structures, forces=True, stress=True)
    for forces, stress, o in zip(result.forces, result.stress, own, strict=True):
        np.testing.assert_allclose(forces, o["f"], atol=FORCE)
        np.testing.assert_allclose(stress, o["s"] / 160.21766208, atol=STRESS)


def test_forces_and_stress_are_derivatives_of_the_energy(chgnet):
    structure = low_symmetry()
    n, h = len(structure), 0.01
    direction = np.random.default_rng(1).normal(size=(n, 3))
    strain = np.diag([0.2, -0.1, 0.15]) + 0.05
    displaced = []
    for sign in (-1, 1):
        moved = structure.cart_coords + sign * h * direction
        displaced.append(Structure(structure.lattice, structure.species, moved, coords_are_cartesian=True))
    for sign in (-1, 1):
        lattice = Lattice(structure.lattice.matrix @ (np.eye(3) + sign * h * strain))
        displaced.append(Structure(lattice, structure.species, structure.frac_coords))
    low, high, compressed, stretched = chgnet.compute(displaced).energy * n
    result = chgnet.compute([structure], forces=True, stress=True)
    assert (low - high) / (2 * h) == pytest.approx((result.forces[0] * direction).sum(), rel=0.02)
    work = (stretched - compressed) / (2 * h)
    assert work == pytest.approx((result.stress[0] * strain).sum() * structure.volume, rel=0.02)


def test_energy_does_not_depend_on_the_description(chgnet):
    structure = low_symmetry()
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
    rotated = Structure(Lattice(structure.lattice.matrix @ turn), structure.species, structure.frac_coords)
    shifted = Structure(structure.lattice, structure.species, structure.frac_coords + 0.31)
    result = chgnet.compute([structure, rotated, shifted, structure * [2, 1, 1]], features=True)
    np.testing.assert_allclose(result.energy, result.energy[0], atol=ENERGY)
    np.testing.assert_allclose(result.features, np.tile(result.features[:1], (4, 1)), atol=2e-3)


def test_folding_removes_what_symmetry_repeats():
    graph = fold(SymmetricCell.of(salt()), 6.0, 3.0)
    whole = fold(SymmetricCell.of(salt()).without_symmetry(), 6.0, 3.0)
    assert (len(graph), len(whole)) == (2, 8)
    assert graph.size.tolist() == [4, 4]
    # shells of rock salt within 6 A: sqrt(1..4) a/2, one orbit each and per kind of atom; the first is one bond
    assert len(graph.edge) == 8
    assert sorted(graph.count.tolist()) == [6, 6, 6, 6, 8, 8, 12, 12]
    assert len(graph.bond_edge) == 6
    assert (graph.count * graph.size[graph.source]).sum() == whole.count.sum() == len(whole.edge)
    assert sorted(graph.angle_count.tolist()) == [1, 1, 4, 4]  # 180 and 90 degrees at Na and at Cl


def test_order_batches_and_progress(chgnet, crystals, monkeypatch):
    monkeypatch.setattr(chgnet, "max_atoms", 20)
    done = []
    together = chgnet.compute(crystals[:12], progress=done.append)
    alone = [chgnet.compute([s]).energy[0] for s in crystals[:12]]
    np.testing.assert_allclose(together.energy, alone, atol=ENERGY)
    assert done == sorted(done)
    assert done[-1] == 12
    assert len(done) > 2


def test_graphs_are_built_while_the_model_works(chgnet, monkeypatch):
    """The model's first batch waits until a graph of the second is begun: in turns that would never come."""
    begun, waits, prepare, evaluate = threading.Event(), [], chgnet.prepare, chgnet.evaluate

    def watched_prepare(cell):
        if len(cell) == 32:
            begun.set()
        return prepare(cell)

    def watched_evaluate(graphs, *asked):
        waits.append(begun.wait(60))
        return evaluate(graphs, *asked)

    monkeypatch.setattr(chgnet, "max_atoms", 8)
    monkeypatch.setattr(chgnet, "prepare", watched_prepare)
    monkeypatch.setattr(chgnet, "evaluate", watched_evaluate)
    result = chgnet.compute([salt(), salt() * [2, 2, 1]])
    assert waits == [True, True]
    assert result.energy[0] == pytest.approx(result.energy[1], abs=ENERGY)


def test_no_crystals(chgnet):
    result = chgnet.compute([], forces=True, stress=True, features=True)
    assert len(result) == 0
    assert result.features.shape == (0, chgnet.feature_size)


def test_crystal_batch_is_evaluated_like_its_structures(chgnet):
    batch = CrystalBatch.from_structures([salt(), low_symmetry()])
    np.testing.assert_allclose(
        chgnet.compute(batch).energy, chgnet.compute([salt(), low_symmetry()]).energy, atol=ENERGY
    )


BROKEN = {
    "Po": Structure(Lattice.cubic(3.3), ["Po"], [[0, 0, 0]]),
    "Rn, Cm": Structure(Lattice.cubic(4), ["Rn", "Cm"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "closer": Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]]),
    "closer ": Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]]),
    "closer than": Structure(Lattice.orthorhombic(0.2, 30, 30), ["Na"], [[0, 0, 0]]),
    "no neighbour": Structure(Lattice.cubic(12), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
    "volume": Structure(Lattice([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), ["Na"], [[0, 0, 0]]),
    "volume of": Structure(Lattice.cubic(500), ["Na"], [[0, 0, 0]]),
    "finite": Structure(Lattice.cubic(4), ["Na"], [[0, np.nan, 0]]),
    "not finite": Structure(Lattice([[np.inf, 0, 0], [0, 3, 0], [0, 0, 3]]), ["Na"], [[0, 0, 0]]),
    "disordered": Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]),
    "no atoms": Structure(Lattice.cubic(4), [], []),
}


def test_broken_crystals_get_a_status_alone(chgnet):
    structures = [salt(), *BROKEN.values(), salt()]
    result = chgnet.compute(structures, forces=True, stress=True, features=True)
    assert result.status[0] == result.status[-1] == ""
    assert result.energy[0] == pytest.approx(result.energy[-1], abs=ENERGY)
    for reason, status in zip(BROKEN, result.status[1:-1], strict=True):
        assert reason.strip() in status
    assert np.isnan(result.energy[1:-1]).all()
    assert np.isnan(result.stress[1:-1]).all()
    assert np.isnan(result.features[1:-1]).all()
    assert [f.shape for f in result.forces] == [(len(s), 3) for s in structures]


class Fragile(CHGNetPotential):
    """CHGNet with too little memory, and with troubles of its own when it meets certain elements."""

    limit = 10**9

    def evaluate(self, graphs, forces, stress, features):
        numbers = np.concatenate([g.cell.numbers for g in graphs])
        if len(numbers) > self.limit:
            raise self.error
        if Element("K").Z in numbers:
            raise ValueError("no potassium today\nsecond line")
        part = super().evaluate(graphs, forces, stress, features)
        for i, graph in enumerate(graphs):
            part.energy[i] += 1e4 * (Element("Rb").Z in graph.cell.numbers)
            part.energy[i] *= np.nan if Element("Cs").Z in graph.cell.numbers else 1
        return part


@pytest.fixture(scope="module")
def fragile():
    return Fragile("0.3.0", torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory: 8 GB")],
)
def test_out_of_memory_halves_the_batch_and_goes_on(fragile, error, monkeypatch, chgnet):
    monkeypatch.setattr(fragile, "limit", 20)
    monkeypatch.setattr(fragile, "error", error, raising=False)
    monkeypatch.setattr(fragile, "max_atoms", 100)
    structures = [salt(5.5 + 0.05 * i) for i in range(9)] + [salt() * [2, 2, 1]] + [salt(6.0)]
    result = fragile.compute(structures)
    expected = chgnet.compute(structures)
    assert result.status == [""] * 9 + ["out of memory", ""]
    np.testing.assert_allclose(np.delete(result.energy, 9), np.delete(expected.energy, 9), atol=ENERGY)
    assert fragile.max_atoms <= 20


def test_what_breaks_or_fools_the_model_is_told_apart(fragile):
    structures = [salt()]
    for metal in ("K", "Rb", "Cs", "Na"):
        structures.append(salt(6.5).replace_species({"Na": metal}))
    result = fragile.compute(structures)
    assert result.status[0] == result.status[4] == ""
    assert result.status[1] == "failed: ValueError: no potassium today"
    assert "implausible energy" in result.status[2]
    assert "NaN" in result.status[3]
    assert np.isnan(result.energy[1:4]).all()


def test_evaluations_slice_and_join(chgnet):
    structures = [salt(), BROKEN["Po"], low_symmetry()]
    result = chgnet.compute(structures, forces=True, stress=True, features=True)
    again = Evaluation.cat([result[:1], result[np.array([1, 2])]])
    assert again.status == result.status
    assert again.ok.tolist() == [True, False, True]
    for name in ("energy", "stress", "features"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(again.forces, result.forces, strict=True))
    assert Evaluation.cat([chgnet.compute([salt()])]).forces is None


@pytest.mark.parametrize("name", ["chgnett", "chgnet:9.9", "mace:", "mace:no/such.model", "", "chgnet@pbe"])
def test_unknown_potentials_are_told_in_one_line(name):
    with pytest.raises(UserError) as caught:
        load_potential(name, "cpu")
    assert "\n" not in str(caught.value)


MACE_ELEMENTS = [3, 8, 9, 11, 14, 17, 22, 26, 27, 38]


@pytest.fixture(scope="module")
def mace_network():
    """A tiny MACE with random weights: real in every part, small in every size."""
    from cfrl.potentials.mace import imported_mace

    with imported_mace():
        from e3nn import o3
        from mace import modules
    torch.manual_seed(0)
    blocks = modules.interaction_classes
    return modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=6,
        num_polynomial_cutoff=5,
        max_ell=2,
        interaction_cls=blocks["RealAgnosticResidualInteractionBlock"],
        interaction_cls_first=blocks["RealAgnosticInteractionBlock"],
        num_interactions=2,
        num_elements=len(MACE_ELEMENTS),
        hidden_irreps=o3.Irreps("8x0e + 8x1o"),
        MLP_irreps=o3.Irreps("8x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.linspace(-1, -5, len(MACE_ELEMENTS)),
        avg_num_neighbors=12.0,
        atomic_numbers=MACE_ELEMENTS,
        correlation=2,
        atomic_inter_scale=3.0,
        atomic_inter_shift=-0.1,
    )


@pytest.fixture(scope="module")
def mace(mace_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("mace") / "tiny.model"
    torch.save(mace_network, path)
    potential = load_potential(f"mace:{path}", "cpu")
    potential.path = path
    return potential


def test_mace_agrees_with_its_own_calculator(mace, mace_network):
    from pymatgen.io.ase import AseAtomsAdaptor

    from cfrl.potentials.mace import imported_mace

    with imported_mace():
        from mace.calculators import MACECalculator

    calculator = MACECalculator(models=[mace_network], device="cpu", default_dtype="float32")
    centred = Structure(Lattice.cubic(4.2), ["Na", "Na"], [[0.1, 0, 0], [0.6, 0.5, 0.5]])
    structures = [salt(), low_symmetry(), low_symmetry(1) * [1, 2, 1], centred]
    result = mace.compute(structures, forces=True, stress=True, features=True)
    assert result.status == [""] * 4
    for i, structure in enumerate(structures):
        atoms = AseAtomsAdaptor.get_atoms(structure)
        atoms.calc = calculator
        assert result.energy[i] == pytest.approx(atoms.get_potential_energy() / len(atoms), abs=1e-5)
        np.testing.assert_allclose(result.forces[i], atoms.get_forces(), atol=1e-4)
        np.testing.assert_allclose(result.stress[i], atoms.get_stress(voigt=False), atol=1e-6)
        descriptors = calculator.get_descriptors(atoms)
        np.testing.assert_allclose(result.features[i, :16], descriptors.mean(0), atol=1e-5)
        np.testing.assert_allclose(result.features[i, -16:], descriptors.max(0), atol=1e-5)
    assert np.abs(result.forces[1]).max() > 0.01
    assert np.abs(result.stress[0]).max() > 1e-4


built = Structure.from_spacegroup
HEMATITE = built("R-3c", Lattice.hexagonal(5.04, 13.75), ["Fe", "O"], [[0, 0, 0.3553], [0.3059, 0, 0.25]])
LAYERS = [[0, 0, 0], [1 / 3, 2 / 3, 0.25], [1 / 3, 2 / 3, 0.65]]
PEROXIDE = built("P6_3/mmc", Lattice.hexagonal(3.16, 7.69), ["Li", "Li", "O"], LAYERS)
RUTILE = built("P4_2/mnm", Lattice.tetragonal(4.7, 3.18), ["Co", "F"], [[0, 0, 0], [0.306, 0.306, 0]])
SILICON = built("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]])
# Wang et al. 2021, eV per atom that bears the correction
CORRECTIONS = [
    (HEMATITE, {"Fe": 5.3}, (2 * -2.256 + 3 * -0.687) / 5),
    (PEROXIDE, {}, 2 * -0.465 / 4),
    (salt(), {}, -0.614 / 2),
    (RUTILE, {"Co": 3.32}, (-1.638 + 2 * -0.462) / 3),
    (SILICON, {}, 0.0),
]


def test_a_model_of_raw_energies_gets_pymatgens_corrections(mace):
    """The file does not say what it was trained on; declared as raw, it is on the hull's scale."""
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    raw = load_potential(f"mace:{mace.path}@mp-raw", "cpu")
    assert (mace.energy_scale, raw.energy_scale) == ("mace-tiny", "mp2020")
    structures = [structure for structure, _, _ in CORRECTIONS]
    own, shifted = (p.compute(structures, forces=True, features=True) for p in (mace, raw))
    assert shifted.status == [""] * 5
    np.testing.assert_allclose(shifted.energy - own.energy, [value for _, _, value in CORRECTIONS], atol=1e-6)
    scheme = MaterialsProject2020Compatibility(check_potcar=False)
    for structure, hubbards, value in CORRECTIONS:
        parameters = {"run_type": "GGA+U" if hubbards else "GGA", "hubbards": hubbards}
        entry = scheme.process_entry(ComputedStructureEntry(structure, -1.0, parameters=parameters))
        assert entry.correction_per_atom == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(shifted.uncorrected, own.energy, atol=1e-6)  # what predictors see
    np.testing.assert_array_equal(shifted.forces[0], own.forces[0])
    np.testing.assert_allclose(shifted[[1, 3]].correction, [CORRECTIONS[1][2], CORRECTIONS[3][2]])
    assert np.isnan(raw.compute([salt(), BROKEN["Po"]]).energy).tolist() == [False, True]


def test_a_relaxation_is_corrected_at_its_end(mace):
    from cfrl.potentials.relax import relax

    raw = load_potential(f"mace:{mace.path}@mp-raw", "cpu")
    own, shifted = (relax([salt(5.5)], potential, steps=3) for potential in (mace, raw))
    assert shifted.energy[0] - own.energy[0] == pytest.approx(-0.614 / 2)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("chgnet", "mp2020"),
        ("chgnet:r2scan", "r2scan"),
        ("mace:medium", "mp2020"),
        ("mace:medium-mpa-0", "mp2020"),
        ("mace:medium-omat-0", "mace-medium-omat-0"),
        ("mace:medium-omat-0@mp-raw", "mp2020"),
        ("mace:some/own.model", "mace-own"),
        ("mace:some/own.model@mp2020", "mp2020"),
        ("mace:a@b/own.model", "mace-own"),
    ],
)
def test_energy_scales_are_known_by_name(name, scale):
    from cfrl.stability.hull import ReferenceHull
    from cfrl.stability.scales import check_scale

    hull = ReferenceHull.from_compositions(["Li"], [-2.0], scale)
    check_scale(name, hull)
    check_scale(name, ReferenceHull.from_compositions(["Li"], [-2.0]))  # of unknown origin
    hull.energy_scale = "another"
    with pytest.raises(UserError, match=scale) as caught:
        check_scale(name, hull)
    assert "cfrl data hull" in str(caught.value)
    assert "@mp-raw" in str(caught.value)


def test_names_tell_energies_with_corrections_from_those_without():
    from cfrl.potentials import full_name

    assert full_name("mace:medium") == "mace:medium@mp-raw"
    assert full_name("mace:own.model") == "mace:own.model"
    assert full_name("chgnet") == "chgnet"


def test_mace_reduces_centred_cells(mace):
    assert len(mace.prepare(SymmetricCell.of(salt())).first) == 2
    assert len(mace.prepare(SymmetricCell.of(low_symmetry() * [1, 1, 2])).first) == 5


def test_mace_names_the_elements_it_does_not_know(mace):
    result = mace.compute([salt(), salt().replace_species({"Na": "K"}), BROKEN["no neighbour"]], forces=True)
    assert result.status[0] == ""
    assert "element K" in result.status[1]
    assert "no neighbour" in result.status[2]


class Exploit:
    """Pickled, it calls a function of the attacker's choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_model_files_cannot_run_code(mace, tmp_path):
    import os

    from torch.fx.graph_module import reduce_graph_module

    trace = tmp_path / "trace"
    source = f"def forward(self):\n    open({str(trace)!r}, 'w')\n"
    attacks = [
        Exploit(os.mkdir, str(trace)),
        Exploit(reduce_graph_module, {"_code": source}, ""),
        Exploit(reduce_graph_module, {"_code": f"__import__('os').mkdir({str(trace)!r})"}, ""),
        Exploit(reduce_graph_module, {"_code": "def forward(self):\n    return 1\n"}, source + "forward(0)\n"),
        {"weights": torch.zeros(3)},
    ]
    for i, attack in enumerate(attacks):
        path = tmp_path / f"{i}.model"
        torch.save(attack, path)
        with pytest.raises(UserError, match=r"not a MACE model"):
            load_potential(f"mace:{path}", "cpu")
    assert not trace.exists()
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(UserError, match="not a MACE model"):
        load_potential(f"mace:{tmp_path / 'text.model'}", "cpu")


def test_mace_leaves_the_safety_of_torch_load_alone(mace, tmp_path):
    import os

    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.save(Exploit(os.getcwd), tmp_path / "file.pt")
    with pytest.raises(Exception, match="Weights only"):
        torch.load(tmp_path / "file.pt")

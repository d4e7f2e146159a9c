"""Structure types, and what is predicted from them: which crystals are of one, which elements go where; candidates."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from cfrl.commands.predict import predict
from cfrl.config import PredictConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.structure_types import StructureTypes
from cfrl.crystals.substitution import replacement_table
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.model.distributions import SamplerOptions
from cfrl.model.options import Wishes
from cfrl.model.prediction import ERROR, TRUST, likelihoods, likely_crystals, shared_out
from cfrl.model.sampler import space_group_prior
from cfrl.model.wishes import parse_formula
from cfrl.tables import read_csv
from tests.test_model import tiny_model

# ---- structure types -----------------------------------------------------------------------------------------------


def rock_salt(a: str, b: str, edge: float) -> Structure:
    return Structure.from_spacegroup(225, Lattice.cubic(edge), [a, b], [[0, 0, 0], [0.5, 0.5, 0.5]])


def caesium_chloride(a: str, b: str, edge: float) -> Structure:
    return Structure.from_spacegroup(221, Lattice.cubic(edge), [a, b], [[0, 0, 0], [0.5, 0.5, 0.5]])


def rutile(a: str, b: str, x: float, c: float = 2.95) -> Structure:
    return Structure.from_spacegroup(136, Lattice.tetragonal(4.6, c), [a, b], [[0, 0, 0], [x, x, 0]])


@pytest.fixture(scope="module")
def types() -> StructureTypes:
    known = [rock_salt("Na", "Cl", 5.6), rock_salt("Mg", "O", 4.2), caesium_chloride("Cs", "Cl", 4.1)]
    known += [rutile("Ti", "O", 0.305), rutile("Sn", "O", 0.307, 3.1), rutile("Ti", "O", 0.305, 5.9)]
    return StructureTypes.of(CrystalBatch.from_structures([*known, rock_salt("K", "Cl", 6.3)]))


def placed(types: StructureTypes, formula: str) -> dict[str, float]:
    elements, _, (amounts,) = parse_formula(formula)
    crystals, weights = types.with_formula(elements, amounts, replacement_table())
    assert set(crystals.formulas()) <= {formula}
    sums = defaultdict(float)
    for name, weight in zip(fingerprints(crystals), weights, strict=True):
        sums[name.split("|", 1)[1]] += weight
    return dict(sums)


def test_crystals_are_of_a_type_where_only_elements_and_scale_differ(types):
    assert types.type_of.tolist() == [0, 0, 1, 2, 2, 3, 0], "a cell twice as long is another type"
    assert types.amounts.tolist() == [[1, 1], [1, 1], [1, 2], [1, 2]]
    assert types.crystals.formulas() == ["NaCl", "CsCl", "TiO2", "TiO2"]


def test_known_crystals_can_be_sketched(types):
    """Letters and elements are their own, positions and cell nearly: K and Cl sit in the cell of NaCl, made larger."""
    sketches = types.sketches()
    assert sketches.formulas() == ["NaCl", "MgO", "CsCl", "TiO2", "SnO2", "TiO2", "KCl"]
    assert sketches.space_group.tolist() == [225, 225, 221, 136, 136, 136, 225]
    sodium, potassium = sketches[0].lattice[0, 0], sketches[6].lattice[0, 0]
    assert sodium == pytest.approx(5.6)
    assert 5.8 < potassium < 6.6
    embedded = load_dataset("structure-types")
    assert len(embedded) == len(StructureTypes.embedded().known)
    assert embedded.valid().all()


def test_likely_is_what_replaces_the_known_elements(types):
    table = replacement_table()
    k, br, na, cl, mg, ox = (ATOMIC_NUMBERS[symbol] for symbol in ("K", "Br", "Na", "Cl", "Mg", "O"))

    def both(first: int, second: int) -> float:
        return table[first, k] * table[second, br] + table[first, br] * table[second, k]

    sums = placed(types, "KBr")
    assert set(sums) == {"225|K:a Br:b", "221|K:a Br:b"}
    assert sums["225|K:a Br:b"] == pytest.approx(both(na, cl) + both(mg, ox) + both(k, cl))
    assert placed(types, "K2Br") == {}.fromkeys(["136|Br:a K:f"], pytest.approx(0, abs=1e-6))
    assert placed(types, "NaClO4") == {}


def test_cells_follow_the_atoms(types):
    crystals, _ = types.with_formula((ATOMIC_NUMBERS["Pb"], ATOMIC_NUMBERS["Te"]), (1, 1), replacement_table())
    assert crystals.lattice[0, 0] == pytest.approx(5.6 * (1.46 + 1.38) / (1.66 + 1.02), rel=0.01)  # Cordero's radii


def test_types_are_kept_in_a_file(types, tmp_path):
    types.write(tmp_path / "types.npz")
    read = StructureTypes.read(tmp_path / "types.npz")
    assert (read.known == types.known).all()
    assert (read.type_of == types.type_of).all()
    assert placed(read, "KBr") == pytest.approx(placed(types, "KBr"))


@pytest.mark.parametrize(
    ("formula", "prototype", "place"),
    [
        ("NaCl", "225|Na:a Cl:b", 1),
        ("MgB2", "191|Mg:a B:d", 1),
        ("LiMn2O4", "227|Li:a Mn:d O:e", 1),
        ("LiFePO4", "62|Fe:a Li:c O:c O:c P:c O:d", 3),
        ("TiO2", "136|Ti:a O:f", 4),
        ("BaTiO3", "221|Ti:a Ba:b O:d", 5),
        ("GaAs", "216|Ga:a As:c", 6),
        ("MgO", "225|O:a Mg:b", 30),
    ],
)
def test_embedded_types_know_famous_crystals(formula, prototype, place):
    sums = placed(StructureTypes.embedded(), formula)
    names = [prototype, prototype.replace("Fe:a Li:c", "Li:a Fe:c")]  # olivine as it is often written, or the other way
    order = sorted(sums, key=sums.get, reverse=True)
    assert any(name in order[:place] for name in names), order[:place]


# ---- candidates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_candidates_are_shared_out_as_well_as_can_be(seed):
    """Against all ways to share them out."""
    random = np.random.default_rng(seed)
    prototypes, n = int(random.integers(1, 4)), int(random.integers(1, 6))
    mass, chance = random.random(prototypes), random.choice([0.95, 0.6], prototypes)
    at_most = random.integers(0, 4, prototypes)
    names = [str(i) for i in range(prototypes)]
    mapped = [dict(zip(names, x.tolist(), strict=True)) for x in (mass, chance, at_most)]
    order = shared_out(mapped[0], mapped[1], n, mapped[2])
    assert len(order) == min(n, at_most.sum())
    counts = [order.count(name) for name in names]
    worth = {
        way: (mass * (1 - (1 - chance) ** np.array(way))).sum()
        for way in itertools.product(*(range(limit + 1) for limit in at_most))
        if sum(way) <= n
    }
    assert worth[tuple(counts)] == pytest.approx(max(worth.values()))


def test_candidates_are_of_the_likely_prototypes():
    """Without types a prototype weighs what the model gives its letters and elements, however it came to be drawn."""
    model = tiny_model()
    asked = Wishes(formula="NaCl", num_sites="2", space_group="221,225")
    crystals = likely_crystals(model, 100, asked)
    names, mass = fingerprints(crystals), crystals.properties["log_weight"]
    assert len(crystals) <= 100
    assert crystals.valid().all()
    assert {name.split("|")[0] for name in names} == {"NaCl"}
    prior = space_group_prior(model, asked.space_group)
    # In both, sodium on a and chlorine on b or the other way round are all that there is to add up.
    told = {name: float(weight) for name, weight in zip(names, mass, strict=True)}
    exact = {}
    for group in (221, 225):
        ways = CrystalBatch(
            torch.full((2,), group),
            torch.tensor([[1, 2], [1, 2]]),
            torch.tensor([[11, 17], [17, 11]]),
            torch.tensor([[[0.0] * 3, [0.5] * 3]] * 2),
            torch.tensor([[5.0, 5, 5, 90, 90, 90]] * 2),
        )
        with torch.no_grad():
            scores = model.log_prob(ways, SamplerOptions())
        exact[group] = float((scores["wyckoff"] + scores["species"]).double().logsumexp(0) + prior[group])
    assert told["NaCl|225|Na:a Cl:b"] - told["NaCl|221|Na:a Cl:b"] == pytest.approx(
        TRUST * (exact[225] - exact[221]), abs=1e-4
    )


def test_what_is_likely_is_weighed_against_its_energy():
    weights, energies = np.log([0.6, 0.3, 0.1]), np.array([-3.0, -3.0, -3.0])
    assert likelihoods(weights, energies) == pytest.approx([0.6, 0.3, 0.1])
    lower = likelihoods(weights, energies - [0, 0, ERROR])  # by one error: e times as likely as before
    assert lower[2] / lower[0] == pytest.approx(np.e / 6)


def test_rock_salt_is_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rock_salt("Na", "Cl", 5.6).to("known.cif")
    config = PredictConfig(n=16, space_group="1,62,225", known=["known.cif"], workers=1, device="cpu")
    path = predict("NaCl", config)
    table = read_csv(path / "prediction.csv")
    assert table["space_group"][0] == 225
    assert table["known_as"][0] != ""
    assert table["e_above_hull"][0] == pytest.approx(0, abs=0.02)
    assert table["above_lowest"] == sorted(table["above_lowest"])
    assert sum(table["likelihood"]) == pytest.approx(1, abs=1e-4)
    assert np.argmax(table["likelihood"]) == 0
    assert sum(table["times"]) <= 16
    lowest = Structure.from_file(next((path / "cifs").glob("1*-NaCl.cif")))
    assert lowest.get_space_group_info()[1] == 225
    assert (path / "energy_volume.png").stat().st_size > 0
    times = (path / "screen" / "stages").stat().st_mtime_ns
    assert predict("", config, resume=path) == path  # nothing is drawn or relaxed again
    assert (path / "screen" / "stages").stat().st_mtime_ns == times
    assert read_csv(path / "prediction.csv") == table


def test_a_known_type_comes_with_its_coordinates(types):
    """Rutile, whose oxygen stands at a free coordinate: of the first candidate of each cell it is the known one."""
    asked = Wishes(formula="RuO2", space_group="136", num_sites="2")
    crystals = likely_crystals(tiny_model(), 8, asked, types=types)
    assert set(crystals.formulas()) == {"RuO2"}
    rows = [name == "RuO2|136|Ru:a O:f" for name in fingerprints(crystals)]
    assert crystals.frac_coords[rows][:2, 1, 0].tolist() == pytest.approx([0.305, 0.305])
    ratios = (crystals.lattice[rows, 2] / crystals.lattice[rows, 0])[:2].tolist()
    assert sorted(ratios) == pytest.approx([2.95 / 4.6, 5.9 / 4.6], rel=1e-4)


@pytest.mark.parametrize("asked", [Wishes(formula="RuO2", z="4"), Wishes(formula="RuA2"), Wishes(system="Ru-O")])
def test_known_types_are_tried_only_where_they_are_as_wished(types, asked):
    without = likely_crystals(tiny_model(), 8, asked)
    crystals = likely_crystals(tiny_model(), 8, asked, types=types)
    assert fingerprints(crystals) == fingerprints(without)


def test_known_types_have_no_more_sites_than_the_model_holds():
    """Sr2U2O7 is known with 11 inequivalent sites; this model holds six."""
    asked, types = Wishes(formula="Sr2U2O7"), StructureTypes.embedded()
    assert placed(types, "Sr2U2O7")["6|O:a O:a O:a O:a Sr:a U:a O:b O:b O:b Sr:b U:b"] > 0
    crystals = likely_crystals(tiny_model(max_sites=7), 8, asked, types=types)
    assert set(crystals.formulas()) == {"Sr2U2O7"}
    assert crystals.num_sites.max() <= 6


def test_what_cannot_be_predicted_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="smallest that can has 2 atoms"):
        predict("NaCl", PredictConfig(n=2, num_atoms="1"))
    with pytest.raises(UserError, match="name a formula"):
        predict("", PredictConfig())
    assert not list(tmp_path.iterdir())

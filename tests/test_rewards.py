"""Rewards: their physics, the rule of signs, caution, one pass for all, the cache, and code that misbehaves."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from scipy.stats import norm
from typer.testing import CliRunner

import cfrl
from cfrl.config import reward_definitions
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.potentials import load_potential
from cfrl.rewards import RewardContext, Scored, build_reward, registry
from cfrl.rewards.predictors import load_predictor
from cfrl.rewards.stability import BEST, GPA_PER_EV_A3, WORST
from cfrl.screening import stages
from cfrl.stability.hull import ReferenceHull

COPPER = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0, 0, 0]])


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    rock_salt = [[0, 0, 0], [0.5, 0.5, 0.5]]
    perovskite = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return [
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], rock_salt),
        Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.24), ["Mg", "O"], rock_salt),
        COPPER,
        Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.46), ["Si"], [[0, 0, 0]]),
        Structure(Lattice.cubic(4.0), ["Ba", "Ti", "O", "O", "O"], perovskite),
    ]


@pytest.fixture(scope="module")
def crystals(structures: list[Structure]) -> CrystalBatch:
    return CrystalBatch.from_structures(structures)


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet", "cpu")


@pytest.fixture(scope="module")
def hull() -> ReferenceHull:
    """Elements, an oxide and a salt, near CHGNet's energies."""
    energies = {"Na": -1.31, "Cl": -1.84, "NaCl": -3.5, "MgO": -6.0, "Mg": -1.6, "O": -4.95, "Cu": -4.1, "Si": -5.42}
    return ReferenceHull.from_compositions(list(energies), list(energies.values()), "chgnet-0.3.0")


@pytest.fixture
def context(chgnet, hull: ReferenceHull, crystals: CrystalBatch) -> RewardContext:
    return RewardContext(chgnet, hull, crystals[:1])


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for memory in (registry._entry_points, registry._load_entry_point, registry._import):
        memory.cache_clear()


@pytest.fixture
def passes(chgnet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of crystals in each pass of the potential."""
    sizes, compute = [], chgnet.compute

    def counting(structures, **asked):
        sizes.append(len(structures))
        return compute(structures, **asked)

    monkeypatch.setattr(chgnet, "compute", counting)
    return sizes


# ---- physics -----------------------------------------------------------------------------------------------------


def test_rewards_of_the_crystal_alone(crystals: CrystalBatch, structures: list[Structure]) -> None:
    terms = build_reward("density + volume_per_atom")(crystals).terms
    np.testing.assert_allclose(terms["density"], [s.density for s in structures], rtol=1e-3)
    np.testing.assert_allclose(terms["volume_per_atom"], [s.volume / len(s) for s in structures], rtol=1e-5)


def test_supply_and_price_against_pymatgen(crystals: CrystalBatch, structures: list[Structure]) -> None:
    from pymatgen.analysis.cost import CostAnalyzer, CostDBElements
    from pymatgen.analysis.hhi import HHIModel

    terms = build_reward("cost + hhi + hhi(kind=production)")(crystals).terms
    price = CostAnalyzer(CostDBElements())
    formulas = [s.composition.reduced_formula for s in structures]
    np.testing.assert_allclose(terms["cost"], [price.get_cost_per_kg(f) for f in formulas], rtol=1e-3)
    np.testing.assert_allclose(terms["hhi(kind=production)"], [HHIModel().get_hhi(f)[0] for f in formulas])
    np.testing.assert_allclose(terms["hhi"], [HHIModel().get_hhi(f)[1] for f in formulas])


def test_charge_neutral_is_what_screening_calls_so() -> None:
    """On real crystals: screening's neutral ones earn 1, and with alloys its alloys as well."""
    structures = load_dataset("prototypes").to_structures()
    batch = CrystalBatch.from_structures(structures)
    records = stages.check(structures, stages.ANY, 0.01)
    neutral, alloy = (np.array([record[name] for record in records]) for name in ("charge_neutral", "alloy"))
    assert 20 < neutral.sum() < len(neutral)
    assert 20 < alloy.sum() < len(alloy)
    np.testing.assert_array_equal(build_reward("charge_neutral")(batch).total, neutral)
    np.testing.assert_array_equal(build_reward("charge_neutral(alloys=True)")(batch).total, neutral | alloy)


def test_ehull_is_energy_minus_hull(crystals, structures, context, hull, chgnet) -> None:
    result = build_reward("ehull", context=context)(crystals)
    energy = chgnet.compute(structures).energy
    expected = [energy[0] + 3.5, energy[1] + 6.0, energy[2] + 4.1, energy[3] + 5.42]
    np.testing.assert_allclose(result.terms["ehull"][:4], expected, atol=1e-4)
    result = build_reward("ehull", context=RewardContext(chgnet, hull, caution=0))(crystals)
    np.testing.assert_array_equal(result.total[:4], -np.clip(result.terms["ehull"][:4], BEST, WORST))
    assert np.isnan(result.total[4])
    assert result.status[:4] == [""] * 4
    assert "Ba" in result.status[4], "no reference for barium: a status, not an error"


def test_far_below_the_hull_and_in_unknown_systems_there_is_no_prize(crystals, chgnet) -> None:
    """An offline reference misses compounds: a distance below its hull is worth as much as BEST, less the doubt."""
    poor = {"Na": -1.31, "Cl": -1.84, "NaCl": -3.5, "Na3Cl": -1.7}
    context = RewardContext(chgnet, ReferenceHull.from_compositions(list(poor), list(poor.values()), "chgnet-0.3.0"))
    result = build_reward("ehull", context=context)(crystals[:1])
    assert -0.3 < result.terms["ehull"][0] < -0.1, "the column holds the distance itself"
    assert result.terms["ehull/spread"][0] == pytest.approx(0.1 / 2.36)  # two compounds known
    assert result.total[0] == pytest.approx(-BEST)
    close = build_reward("ehull", context=RewardContext(chgnet, _shifted(crystals[:1], chgnet, 0.1)))(crystals[:1])
    assert close.terms["ehull"][0] == pytest.approx(-0.1, abs=1e-4)
    assert close.total[0] == pytest.approx(-(0.1 / 0.36 - 0.1), abs=1e-4), "no compound known: 0.28 eV/atom of doubt"
    free = RewardContext(chgnet, _shifted(crystals[:1], chgnet, 0.02), caution=0)
    assert build_reward("ehull", context=free)(crystals[:1]).total[0] == pytest.approx(0.02, abs=1e-4)


def test_only_what_compares_energies_asks_for_one_scale(crystals, hull) -> None:
    context = RewardContext("chgnet:r2scan", hull)
    assert np.isfinite(build_reward("force", context=context)(crystals[:1]).total).all()
    with pytest.raises(UserError, match="scale"):
        build_reward("force + ehull", context=context)
    build_reward("ehull", context=RewardContext("chgnet:r2scan", ReferenceHull.from_compositions(["Na"], [-1.3])))


def _shifted(crystals: CrystalBatch, chgnet, depth: float) -> ReferenceHull:
    """Elements alone, such that the one crystal lies `depth` eV/atom below the line between them."""
    energy = float(chgnet.compute(crystals).energy[0]) + depth
    return ReferenceHull.from_compositions(["Na", "Cl"], [energy, energy], "chgnet-0.3.0")


def test_force_is_the_larger_pull_on_atoms_and_cell(chgnet) -> None:
    shaken = Structure(Lattice.cubic(3.9), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.4]])
    result = build_reward("force", context=RewardContext(chgnet))(CrystalBatch.from_structures([shaken]))
    single = chgnet.compute([shaken], forces=True, stress=True)
    assert result.terms["force/atoms"][0] == pytest.approx(np.linalg.norm(single.forces[0], axis=1).max(), rel=1e-3)
    step = 2e-3  # work done when the cell grows along z: dE = stress_zz * volume * strain
    stretched = [shaken.copy(), shaken.copy()]
    for crystal, sign in zip(stretched, (-1, 1), strict=True):
        crystal.lattice = Lattice.from_parameters(3.9, 3.9, 3.9 * (1 + sign * step), 90, 90, 90)
    energy = chgnet.compute(stretched).energy * 2
    stress = (energy[1] - energy[0]) / (2 * step) / shaken.volume
    principal = np.linalg.eigvalsh(single.stress[0])  # z is one of its axes: four mirrors run along it
    assert principal[np.abs(principal - stress).argmin()] == pytest.approx(stress, rel=0.03)
    pull = np.abs(principal).max() * (shaken.volume / 2) ** (2 / 3)
    assert result.terms["force/cell"][0] == pytest.approx(pull, rel=1e-3)
    assert result.terms["force"][0] == max(result.terms["force/atoms"][0], result.terms["force/cell"][0])
    assert result.total[0] == -result.terms["force"][0]


def test_bulk_modulus_by_strain_agrees_with_energies(crystals, structures, chgnet) -> None:
    reward = build_reward("bulk_modulus(method=strain)", context=RewardContext(chgnet))
    got = reward(crystals[2:4]).total
    for value, structure in zip(got, structures[2:4], strict=True):
        edges = structure.volume * np.array([0.99**3, 1.01**3])
        volumes = np.concatenate([edges * 0.997, edges * 1.003])
        scaled = [structure.copy() for _ in volumes]
        for crystal, volume in zip(scaled, volumes, strict=True):
            crystal.scale_lattice(volume)
        energy = chgnet.compute(scaled).energy * len(structure)
        pressure = -(energy[2:] - energy[:2]) / (volumes[2:] - volumes[:2])
        modulus = -structure.volume * (pressure[1] - pressure[0]) / (edges[1] - edges[0])
        assert value == pytest.approx(modulus * GPA_PER_EV_A3, rel=0.03)
    assert 60 < got[1] < 130, "silicon: 98 GPa measured"


def test_novelty(crystals: CrystalBatch, context: RewardContext) -> None:
    larger = Structure.from_spacegroup("Fm-3m", Lattice.cubic(6.2), ["Na", "Cl"], [[0.5] * 3, [0, 0, 0]])
    polymorph = Structure.from_spacegroup("Pm-3m", Lattice.cubic(3.3), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    richer = Structure.from_spacegroup("Pm-3m", Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [0, 0.5, 0.5]])
    batch = CrystalBatch.from_structures([larger, polymorph, richer, COPPER])
    scores = {
        level: build_reward(f"novelty(level={level})", context=context)(batch).total.tolist()
        for level in ("structure", "formula", "system")
    }
    assert scores == {"structure": [0, 1, 1, 1], "formula": [0, 0, 1, 1], "system": [0, 0, 0, 1]}
    with pytest.raises(UserError, match="give --dataset"):
        build_reward("novelty")(batch)


def test_predicted_properties_of_textbook_crystals(crystals: CrystalBatch, chgnet) -> None:
    formula = "band_gap + dielectric + dielectric(kind=electronic) + bulk_modulus + dielectric_bandgap"
    terms = build_reward(formula, context=RewardContext(chgnet))(crystals).terms
    salt, magnesia, copper, silicon, _ = range(5)
    gap = terms["band_gap"]
    assert gap[copper] < 0.1
    assert gap[salt] > 4 and gap[magnesia] > 3.5 and 0.1 < gap[silicon] < 1.2  # noqa: PT018 (PBE: 5.0, 4.4, 0.6)
    assert terms["dielectric"][magnesia] == pytest.approx(10, rel=0.25)
    assert terms["dielectric(kind=electronic)"][magnesia] == pytest.approx(3.1, rel=0.15)
    doubt = terms["dielectric(kind=electronic)/spread"]
    assert terms["dielectric(kind=electronic)"][silicon] == pytest.approx(13, abs=2 * doubt[silicon])
    assert doubt[silicon] < 4
    assert terms["bulk_modulus"][magnesia] == pytest.approx(155, rel=0.2)
    assert terms["bulk_modulus"][salt] == pytest.approx(24, rel=0.3)
    np.testing.assert_allclose(terms["dielectric_bandgap"], gap * terms["dielectric"])
    np.testing.assert_array_equal(terms["dielectric_bandgap/band_gap"], gap)


def test_the_probability_of_a_range_is_that_of_a_normal_error(crystals: CrystalBatch, chgnet) -> None:
    ranges = {"low": "low=1", "middle": "low=1, high=4.5", "high": "low=4.5", "below": "high=1"}
    told = {
        name: build_reward(f"in_range(of=band_gap, {words})", context=RewardContext(chgnet))(crystals).total
        for name, words in ranges.items()
    }
    terms = build_reward("band_gap", context=RewardContext(chgnet))(crystals).terms
    gap, spread = terms["band_gap"], terms["band_gap/spread"]
    np.testing.assert_allclose(told["middle"], norm.cdf(4.5, gap, spread) - norm.cdf(1, gap, spread), atol=1e-12)
    np.testing.assert_allclose(told["below"] + told["middle"] + told["high"], 1, atol=1e-12)
    np.testing.assert_allclose(told["low"], told["middle"] + told["high"], atol=1e-12)
    assert told["below"][2] > 0.99  # copper, a metal: no gap lies below 0
    assert told["high"][0] > 0.5  # rock salt
    with pytest.raises(UserError, match="one of band_gap"):
        build_reward("in_range(of=colour)")


# ---- signs and caution -------------------------------------------------------------------------------------------


def test_rule_of_signs(crystals: CrystalBatch) -> None:
    volume = crystals.volumes().double().numpy() / crystals.num_atoms.numpy()
    assert build_reward("volume_per_atom")(crystals).total == pytest.approx(-volume)
    assert build_reward("1*volume_per_atom")(crystals).total == pytest.approx(volume)
    assert build_reward("density")(crystals).total == pytest.approx(crystals.densities().double().numpy())
    assert build_reward("-volume_per_atom")(crystals).total == pytest.approx(-volume)


def test_caution_makes_every_prize_smaller(crystals: CrystalBatch, chgnet) -> None:
    def total(spec: str, caution: float | None) -> np.ndarray:
        return build_reward(spec, context=RewardContext(chgnet, caution=caution))(crystals).total

    terms = build_reward("dielectric_bandgap + band_gap", context=RewardContext(chgnet))(crystals).terms
    merit, doubt = terms["dielectric_bandgap"], terms["dielectric_bandgap/spread"]
    gap, gap_doubt = terms["band_gap"], terms["band_gap/spread"]
    assert (doubt > 0).all()
    np.testing.assert_allclose(total("dielectric_bandgap", None), np.maximum(merit - doubt, 0))
    np.testing.assert_allclose(total("dielectric_bandgap", 0), merit)
    np.testing.assert_allclose(total("dielectric_bandgap", 2), np.maximum(merit - 2 * doubt, 0))
    np.testing.assert_allclose(total("band_gap", None), np.maximum(gap - gap_doubt, 0))
    np.testing.assert_allclose(total("band_gap", 0), gap)
    np.testing.assert_allclose(total("band_gap", 1), np.maximum(gap - gap_doubt, 0))
    np.testing.assert_allclose(total("-band_gap", 1), -(gap + gap_doubt), err_msg="a wanted small value: add")
    window = np.maximum(np.abs(gap + gap_doubt - 2), np.abs(np.maximum(gap - gap_doubt, 0) - 2))
    np.testing.assert_allclose(total("target(band_gap, 2)", 1), -window)
    np.testing.assert_allclose(total("-abs(band_gap - 2)", None), -window)
    far = total("abs(band_gap - 2)", None)
    inside = np.abs(gap - 2) < gap_doubt
    assert (far[inside] <= gap_doubt[inside] / 8 + 1e-9).all(), "the spread reaches 2: it may be no distance from it"
    nearer = np.minimum(np.abs(gap + gap_doubt - 2), np.abs(np.maximum(gap - gap_doubt, 0) - 2))
    np.testing.assert_allclose(far[~inside], nearer[~inside])


def test_caution_finds_the_worst_within_the_spread(crystals: CrystalBatch) -> None:
    means = np.array([-2.0, 0.9, 1.1, 4.0, 1.0])

    @cfrl.register_reward("unsure", spread=True, caution=1.0)
    def unsure(crystals, structures):
        return Scored(means, spread=np.full(5, 0.5))

    @cfrl.register_reward("unsure_min", goal="min", spread=True, caution=1.0)
    def unsure_min(crystals, structures):
        return Scored(means, spread=np.full(5, 0.5))

    def total(spec: str) -> list[float]:
        return build_reward(spec)(crystals).total.tolist()

    assert total("unsure") == pytest.approx(means - 0.5)
    assert total("unsure_min") == pytest.approx(-means - 0.5), "a small value is wanted: caution counts upwards"
    assert total("-unsure_min") == pytest.approx(-means - 0.5)
    assert total("1 - 2*unsure") == pytest.approx(1 - 2 * (means + 0.5))
    assert total("-abs(unsure - 1)") == pytest.approx(-np.abs(means - 1) - 0.5)
    assert total("target(unsure, 1, 0.5)") == pytest.approx(-2 * np.abs(means - 1) - 1)
    assert total("abs(unsure - 1)") == pytest.approx([2.5, 0, 0, 2.5, 0], abs=0.07), "the least lies between the ends"
    assert total("only(1, unsure > 0.7)") == [0, 0, 0, 1, 0]
    assert np.isnan(total("log(1.5 - unsure)")).tolist() == [False, False, True, True, True]

    def told(spec: str, caution: float | None = None) -> list[str]:
        reward = build_reward(spec, context=RewardContext(caution=caution))
        return reward.smothered(reward(crystals).terms)

    (line,) = told("target(unsure, 1, 0.4) - 2*window(unsure, 0, 1.2)")
    assert line.startswith("target(unsure, 1, 0.4) is narrow beside the doubt that is taken off (0.5, median)")
    assert len(told("target(unsure, 1, 0.4) - 2*window(unsure, 0, 1.2)", 2.0)) == 2
    assert told("target(unsure, 1, 0.4)", 0.0) == told("abs(unsure - 1)") == []


@pytest.mark.parametrize("spec", ["band_gap", "dielectric", "dielectric(kind=electronic)", "dielectric_bandgap",
                                  "dielectric_bandgap(kind=electronic)", "bulk_modulus", "property"])  # fmt: skip
def test_every_predictor_is_cautious_by_default(spec: str, crystals: CrystalBatch, chgnet, tmp_path: Path) -> None:
    if spec == "property":
        load_predictor("bulk_modulus").save(tmp_path / "mine.safetensors")
        spec = "'property:mine.safetensors'"
    reward = build_reward(spec, context=RewardContext(chgnet))
    result = reward(crystals[:4])
    value, spread = (result.terms[name] for name in reward.columns[:2])
    assert (spread > 0).all()
    least = 1 if spec.startswith("dielectric") and "gap" not in spec else 0
    np.testing.assert_allclose(result.total, np.maximum(value - spread, least))
    small = build_reward(f"-{spec}", context=RewardContext(chgnet))(crystals[:4])
    np.testing.assert_allclose(small.total, -(value + spread), err_msg="a wanted small value: add")


def test_figure_of_merit_of_either_constant(crystals: CrystalBatch, chgnet) -> None:
    spec = "dielectric_bandgap(kind=electronic)"
    context = RewardContext(chgnet)
    terms = build_reward(f"{spec} + dielectric_bandgap + dielectric(kind=electronic)", context=context)(crystals).terms
    np.testing.assert_array_equal(terms[f"{spec}/dielectric"], terms["dielectric(kind=electronic)"])
    np.testing.assert_allclose(terms[spec], terms[f"{spec}/band_gap"] * terms["dielectric(kind=electronic)"])
    ionic = [0, 1]  # NaCl, MgO
    assert (terms["dielectric_bandgap"][ionic] > 1.5 * terms[spec][ionic]).all(), "ions move: total, by default"
    from cfrl.rewards.registry import find_reward

    listed = find_reward("dielectric_bandgap").description
    assert "kind=total" in listed
    assert "kind=electronic" in listed


# ---- one pass, and a memory --------------------------------------------------------------------------------------


def test_terms_share_one_pass(crystals, context, passes: list[int]) -> None:
    result = build_reward("dielectric_bandgap - 2*ehull - force + band_gap", context=context)(crystals[:4])
    assert np.isfinite(result.total).all()
    assert passes == [4]


def test_scores_are_remembered_by_structure(crystals, context, passes: list[int]) -> None:
    reward = build_reward("ehull + band_gap", context=context)
    first = reward(crystals[torch.tensor([0, 1, 0])])
    assert passes == [2], "a crystal that comes twice is computed once"
    assert first.total[0] == first.total[2]
    again = reward(crystals[torch.tensor([1, 3, 0])])
    assert passes == [2, 1]
    assert again.total[[0, 2]].tolist() == first.total[[1, 0]].tolist()
    padded = CrystalBatch.cat([crystals[4:5], crystals[0:1]])[1:2]
    assert padded.wyckoff.shape[1] > crystals[0:1].trim().wyckoff.shape[1]
    assert reward(padded).total[0] == first.total[0]
    assert passes == [2, 1], "padding is not part of a crystal"
    moved = crystals[0:1]
    moved.lattice = moved.lattice * 1.01
    assert reward(moved).total[0] != first.total[0]


def test_order_of_columns_and_no_crystals(crystals, context) -> None:
    reward = build_reward("ehull + dielectric_bandgap", context=context)
    nothing = reward(crystals[:0])
    assert nothing.total.shape == (0,)
    assert nothing.status == []
    parts = [f"dielectric_bandgap/{part}" for part in ("spread", "band_gap", "dielectric")]
    assert list(nothing.terms) == reward.columns == ["ehull", "ehull/spread", "dielectric_bandgap", *parts]


def test_given_structures_are_used(crystals, structures) -> None:
    seen = []

    @cfrl.register_reward("looks")
    def looks(crystals, structures):
        seen.extend(structures)
        return np.zeros(len(structures))

    build_reward("looks")(crystals, structures)
    assert all(a is b for a, b in zip(seen, structures, strict=True))


def test_a_crystal_that_the_potential_refuses_fails_alone(structures, chgnet) -> None:
    polonium = Structure(Lattice.cubic(3.35), ["Po"], [[0, 0, 0]])
    batch = CrystalBatch.from_structures([structures[0], polonium, structures[1]])
    result = build_reward("band_gap", context=RewardContext(chgnet))(batch)
    assert np.isfinite(result.total[[0, 2]]).all()
    assert np.isnan(result.total[1])
    assert result.status == ["", "band_gap: element Po unknown to the potential", ""]


def test_gates_and_infinities_have_statuses(crystals: CrystalBatch) -> None:
    result = build_reward("log(density - 5)")(crystals)
    light = crystals.densities().numpy() < 5
    assert np.isnan(result.total).tolist() == light.tolist()
    assert [bool(reason) for reason in result.status] == light.tolist()


def test_standardise_resumes(crystals: CrystalBatch) -> None:
    one, two = build_reward("standardise(density)"), build_reward("standardise(density)")
    one(crystals)
    two.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one(crystals, update=False).total, two(crystals, update=False).total)
    assert one(crystals, update=False).total.mean() == pytest.approx(0, abs=1e-12)


# ---- others' rewards ---------------------------------------------------------------------------------------------


def test_own_reward_with_a_parameter(crystals: CrystalBatch) -> None:
    @cfrl.register_reward("sites", unit="sites", goal="min")
    def sites(crystals, structures, *, times: int = 1):
        """How many sites."""
        return crystals.num_sites * times

    assert build_reward("sites")(crystals).total.tolist() == (-crystals.num_sites).tolist()
    assert build_reward("0 + sites(times=3)")(crystals).total.tolist() == (3 * crystals.num_sites).tolist()
    with pytest.raises(UserError, match="no parameter 'time'; it has times"):
        build_reward("sites(time=3)")
    with pytest.raises(UserError, match="times should be a float"):
        build_reward("sites(times=many)")
    with pytest.raises(UserError, match="kind is 'totl'; it is one of total, electronic"):
        build_reward("dielectric(kind=totl)")


def test_rewards_of_modules_and_files(crystals: CrystalBatch, tmp_path: Path) -> None:
    source = "def twice(crystals, structures):\n    return [2.0 * len(s) for s in structures]\n"
    (tmp_path / "rewards_of_mine.py").write_text(source)
    expected = (2 * crystals.num_atoms).tolist()
    assert build_reward("rewards_of_mine:twice")(crystals).total.tolist() == expected
    assert build_reward("./rewards_of_mine.py:twice")(crystals).total.tolist() == expected
    assert build_reward("'rewards_of_mine:twice' / 2")(crystals).total.tolist() == crystals.num_atoms.tolist()
    assert "rewards_of_mine:twice" in build_reward("rewards_of_mine:twice")(crystals).terms


def test_rewards_of_installed_packages(crystals: CrystalBatch, tmp_path: Path) -> None:
    (tmp_path / "their_package.py").write_text("def seven(crystals, structures):\n    return [7] * len(crystals)\n")
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cfrl.rewards]\nseven = their_package:seven\nbroken = missing_one:f\n")
    sys.path.insert(0, str(tmp_path))
    assert build_reward("seven")(crystals).total.tolist() == [7] * len(crystals)
    with pytest.warns(UserWarning, match="broken"):
        assert "seven" in [reward.name for reward in registry.all_rewards()]
    with pytest.raises(UserError, match="reward 'broken' of missing_one:f cannot be loaded"):
        build_reward("broken")


def test_named_formulas_of_cfrl_toml(crystals: CrystalBatch, tmp_path: Path) -> None:
    (tmp_path / "cfrl.toml").write_text('[rewards.light]\nexpression = "target(density, wanted)"\nwanted = 2.0\n')
    density, own = crystals.densities().double().numpy(), reward_definitions()
    assert build_reward("light", definitions=own)(crystals).total == pytest.approx(-np.abs(density - 2))
    doubled = build_reward("2*light(wanted=4)", definitions=own)
    assert doubled(crystals).total == pytest.approx(-2 * np.abs(density - 4))
    (tmp_path / "cfrl.toml").write_text("[rewards.light]\nwanted = 2.0\n")
    with pytest.raises(UserError, match=r"\[rewards.light\] needs a line like expression"):
        reward_definitions()


# ---- bad input: one clear line each ------------------------------------------------------------------------------


def _register(function) -> str:
    cfrl.register_reward("faulty")(function)
    return "faulty"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ehul", "unknown reward 'ehul'; did you mean 'ehull'"),
        ("band_gap - ehul", "did you mean 'ehull'"),
        ("no_module_of_this_name:f", "no module 'no_module_of_this_name'"),
        ("math:sqroot", "math has no function 'sqroot'"),
        ("math:pi", "no function 'pi'"),
        ("missing.py:f", "no file missing.py"),
        ("property:missing.safetensors", "no predictor file missing.safetensors"),
        ("system('rm')", "'system(...)' cannot be called"),
    ],
)
def test_what_cannot_be_built(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_reward(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_on_import(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text("\nraise RuntimeError('no licence')\n")
    with pytest.raises(
        UserError, match=r"failing.py cannot be imported: RuntimeError: no licence \(failing.py, line 2\)"
    ):
        build_reward("failing.py:f")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: np.zeros((n, 2)), "returned shape (5, 2) instead of (5,)"),
        (lambda n: np.zeros(n - 1), "returned shape (4,) instead of (5,)"),
        (lambda n: 1.0, "returned shape () instead of (5,)"),
        (lambda n: ["good"] * n, "instead of numbers"),
        (lambda n: [None] * n, "instead of numbers"),
        (lambda n: None, "instead of numbers"),
        (lambda n: [[1.0]] + [[1.0, 2.0]] * (n - 1), "ragged list"),
    ],
)
def test_what_is_no_score_ends_with_one_line(returned, message: str, crystals: CrystalBatch) -> None:
    reward = build_reward(_register(lambda crystals, structures: returned(len(structures))))
    with pytest.raises(UserError) as caught:
        reward(crystals)
    assert message in str(caught.value)
    assert "reward 'faulty' returned" in str(caught.value)


def test_a_reward_that_always_raises(crystals: CrystalBatch) -> None:
    def faulty(crystals, structures):
        raise KeyError("model.pt")

    with pytest.raises(
        UserError, match=r"reward 'faulty' fails on every crystal: KeyError: 'model.pt' \(test_rewards.py"
    ):
        build_reward(_register(faulty))(crystals)


def test_a_reward_that_raises_on_one_crystal_loses_only_that(crystals: CrystalBatch) -> None:
    def faulty(crystals, structures):
        if any(len(s) == 5 for s in structures):
            raise ValueError("five atoms\nare too many")
        return [len(s) for s in structures]

    reward = build_reward(_register(faulty))
    result = reward(crystals)
    assert result.total[:4].tolist() == crystals.num_atoms[:4].tolist()
    assert np.isnan(result.total[4])
    assert result.status[4].startswith("faulty: ValueError: five atoms are too many (test_rewards.py")
    assert np.isnan(reward(crystals[4:]).total).all(), "it has worked before: the run goes on"


@pytest.mark.parametrize("dtype", [np.float32, np.int64, bool])
def test_what_is_masked_is_not_scored(crystals: CrystalBatch, dtype: type) -> None:
    hidden = [False, True, False, True, False]

    def faulty(crystals, structures):
        values = np.ma.masked_array(np.ones(5, dtype), hidden)
        return Scored(values, spread=values, parts={"part": values})

    cfrl.register_reward("faulty", spread=True, parts=["part"])(faulty)
    result = build_reward("faulty")(crystals)
    for column in (result.total, *result.terms.values()):
        np.testing.assert_array_equal(np.isnan(column), hidden)
    assert result.status == ["", "faulty: not a number"] * 2 + [""]


def test_a_reward_that_hangs_is_not_waited_for_twice(crystals: CrystalBatch) -> None:
    calls, end = [], threading.Event()

    def faulty(crystals, structures):
        calls.append(len(structures))
        end.wait()

    reward = build_reward(_register(faulty), context=RewardContext(timeout=0.2))
    for _ in range(2):
        with pytest.raises(UserError, match=r"'faulty' took longer than 0.2 s for 5 crystals and was given up"):
            reward(crystals)
    end.set()
    assert calls == [5]


def test_a_reward_within_its_time_and_one_that_times_out_by_itself(crystals: CrystalBatch) -> None:
    """A TimeoutError of the reward's own is as any other exception."""

    def faulty(crystals, structures):
        if len(structures) > 1 or len(structures[0]) == 5:
            raise TimeoutError("no answer")
        return [len(s) for s in structures]

    result = build_reward(_register(faulty), context=RewardContext(timeout=60))(crystals)
    assert result.total[:4].tolist() == crystals.num_atoms[:4].tolist()
    assert result.status[4].startswith("faulty: TimeoutError: no answer")


def test_nan_and_infinity_are_not_scores(crystals: CrystalBatch) -> None:
    def faulty(crystals, structures):
        return torch.tensor([1.0, np.nan, np.inf, -np.inf, 2.0])

    result = build_reward(_register(faulty))(crystals)
    np.testing.assert_array_equal(np.isnan(result.total), [False, True, True, True, False])
    np.testing.assert_array_equal(np.isnan(result.terms["faulty"]), [False, True, True, True, False])
    assert result.status == ["", "faulty: not a number", "faulty: infinite", "faulty: infinite", ""]


def test_scored_gives_reasons_and_parts(crystals: CrystalBatch) -> None:
    @cfrl.register_reward("rich", parts=("half",), spread=True, caution=1.0)
    def rich(crystals, structures):
        values = crystals.num_atoms.double().numpy()
        status = ["too large" if v > 5 else "" for v in values]
        return Scored(values, status, np.ones(len(values)), {"half": values / 2})

    result = build_reward("rich")(crystals[3:])
    assert result.status == ["rich: too large", ""]
    assert result.total[1] == 4
    assert result.terms["rich/half"][1] == 2.5


def test_names_goals_and_needs_are_checked() -> None:
    with pytest.raises(UserError, match="use letters"):
        cfrl.register_reward("my reward")
    with pytest.raises(UserError, match="'max' or 'min'"):
        cfrl.register_reward("mine", goal="up")(lambda c, s: None)
    with pytest.raises(UserError, match="known needs are energy"):
        cfrl.register_reward("mine", needs=("charges",))(lambda c, s: None)


def test_a_predictor_of_other_features(crystals: CrystalBatch) -> None:
    old = load_potential("chgnet:0.2.0", "cpu")
    result = build_reward("band_gap", context=RewardContext(old))(crystals[:1])
    assert result.terms["band_gap"][0] > 4, (
        "the features that it was trained on come from the potential named in its file"
    )
    with pytest.raises(UserError, match="trained on other features"):
        load_predictor("band_gap").check(old)


@pytest.mark.parametrize(("key", "value"), [("feature_version", "chgnet-0.1/old"), ("composition", "elements-0")])
def test_a_predictor_file_of_other_features_is_refused(key, value, crystals: CrystalBatch, chgnet, tmp_path: Path):
    """Features of the potential, or descriptors of elements, that have changed since: one line, never a number."""
    predictor = load_predictor("band_gap")
    predictor.header[key] = value
    predictor.save(tmp_path / "old.safetensors")
    with pytest.raises(UserError, match="'band_gap' was trained on other features") as caught:
        build_reward("property:old.safetensors", context=RewardContext(chgnet))(crystals[:1])
    assert "\n" not in str(caught.value)


def test_the_table_of_rewards() -> None:
    from cfrl.cli import app

    result = CliRunner().invoke(app, ["rewards"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for name in ("ehull", "force", "dielectric_bandgap", "band_gap", "dielectric", "density", "bulk_modulus", "hhi"):
        assert f"\n{name} " in f"\n{result.output}", name
    for text in (
        "eV/atom",
        "kind=total|electronic",
        "energy, hull",
        "novelty",
        "charge_neutral",
        "cost",
        "volume_per_atom",
    ):
        assert text in result.output


# ---- relaxed before it is scored, guards, sun


def test_what_is_scored_is_the_relaxed_crystal(chgnet, hull):
    """A strained rock salt scores as the relaxed one does; its own energy is far higher."""
    from cfrl.potentials.relax import relax

    strained = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.0), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    batch = CrystalBatch.from_structures([strained])
    scores = {
        steps: build_reward("ehull", context=RewardContext(chgnet, hull, caution=0.0, relax_steps=steps))(batch)
        for steps in (0, 2, 20)
    }
    values = {steps: float(result.terms["ehull"][0]) for steps, result in scores.items()}
    assert values[0] > values[2] > values[20]
    assert values[0] - values[20] > 0.1
    full = relax([strained], chgnet).energy
    assert values[20] == pytest.approx(float(hull.e_above_hull(batch, full).e_above_hull[0]), abs=2e-3)


def test_force_is_that_of_the_crystal_as_drawn(chgnet):
    strained = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.0), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    batch = CrystalBatch.from_structures([strained])
    plain, relaxed = (
        build_reward("force", context=RewardContext(chgnet, relax_steps=k))(batch).terms["force"][0] for k in (0, 20)
    )
    assert plain == pytest.approx(relaxed, rel=1e-5)
    assert plain > 0.1


def test_features_are_those_of_the_relaxed_crystal(chgnet):
    strained = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.0), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])
    sound = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.26), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])

    def gap(structure: Structure, steps: int) -> float:
        context = RewardContext(chgnet, relax_steps=steps)
        return float(build_reward("band_gap", context=context)(CrystalBatch.from_structures([structure])).total[0])

    assert gap(strained, 30) == pytest.approx(gap(sound, 30), abs=0.01)
    assert abs(gap(strained, 0) - gap(sound, 0)) > 0.04


GUARDED = {
    "NaCl": ("Na", "Cl", 5.69),
    "element": ("Cu", "Cu", 3.0),
    "noble_gas": ("Kr", "F", 5.0),
    "radioactive": ("Tc", "O", 4.4),
    "overlap": ("Mg", "O", 2.6),
    "exploded": ("Mg", "O", 9.0),
}


@pytest.fixture(scope="module")
def suspects() -> CrystalBatch:
    salt = [[0, 0, 0], [0.5, 0.5, 0.5]]
    made = [Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [x, y], salt) for x, y, a in GUARDED.values()]
    odd = Structure.from_spacegroup("Pm-3m", Lattice.cubic(3.4), ["Mg", "Cl"], [[0, 0, 0], [0.5] * 3])
    return CrystalBatch.from_structures([*made, odd])


def test_each_guard_stops_what_it_is_named_for_and_can_be_lifted(suspects):
    from cfrl.rewards.guards import GUARDS, heeded

    known = CrystalBatch.from_structures([COPPER])  # so that none of the others is known
    names = [*GUARDED, "not_neutral"]
    context = RewardContext(known=known)
    result = build_reward("density", context=context, guards=heeded(None))(suspects)
    assert result.status == ["", *(f"guard: {name}" for name in names[1:])]
    assert np.isfinite(result.total).tolist() == [True] + [False] * 6
    assert not result.abstained.any()
    for row, name in enumerate(names[1:], 1):
        alone = build_reward("density", context=context, guards=(name,))(suspects)
        assert alone.status[row] == f"guard: {name}"
        assert set(alone.status) == {"", f"guard: {name}"}
        lifted = build_reward("density", context=context, guards=heeded(name))(suspects)
        assert lifted.status[row] != f"guard: {name}"  # krypton fluoride is not neutral either
        assert lifted.status[0] == ""
    free = build_reward("density", context=context, guards=heeded("all"))(suspects)
    assert np.isfinite(free.total).all()
    assert heeded("all") == ()
    assert set(heeded(None)) == set(GUARDS)
    with pytest.raises(UserError, match="did you mean 'radioactive'"):
        heeded("radioactiv")


def test_a_property_is_learned_from_known_crystals_too_and_only_discovery_minds_them(suspects, hull, chgnet):
    from cfrl.rewards.guards import heeded

    context = RewardContext(chgnet, hull)  # the embedded generator knows NaCl
    guards = heeded("sparse_reference,far_below_hull")
    density = build_reward("density", context=context, guards=guards)
    plain = density(suspects[[0]])
    assert (plain.status, plain.abstained.tolist()) == ([""], [False])
    assert "known" in density.withheld.names  # learned from, but not handed out
    assert "known" not in density.refuses.names
    sun = build_reward("sun", context=context, guards=guards)
    assert sun.refuses.names == sun.withheld.names == density.withheld.names
    sought = sun(suspects[[0]])
    assert (sought.status, sought.abstained.tolist()) == (["guard: known"], [False])
    free = build_reward("sun", context=context, guards=())(suspects[[0]])
    assert free.total.tolist() == [0.0]
    assert free.terms["sun/novel"].tolist() == [0.0]
    assert free.terms["sun/stable"][0] > 0.5


def test_a_sparse_reference_is_no_fault_of_the_crystal(suspects, hull, chgnet):
    from cfrl.rewards.guards import heeded

    context = RewardContext(chgnet, hull, known=CrystalBatch.from_structures([COPPER]))
    result = build_reward("ehull", context=context, guards=heeded("far_below_hull"))(suspects[[0]])
    assert (result.status, result.abstained.tolist()) == (["guard: sparse_reference"], [True])
    assert list(result.terms) == ["ehull", "ehull/spread"]  # guards have no columns of their own
    assert np.isfinite(result.terms["ehull"][0])


def test_what_falls_apart_has_no_property_unless_the_hull_is_asked_for_anyway(chgnet):
    """Magnesia as rock salt, and as caesium chloride, 0.7 eV/atom above."""
    from cfrl.rewards.guards import UNSTABLE, heeded

    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.25), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])
    other = Structure.from_spacegroup("Pm-3m", Lattice.cubic(2.65), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])
    both = CrystalBatch.from_structures([salt, other])
    guards = heeded("sparse_reference,known")
    gap = build_reward("band_gap", context=RewardContext(chgnet, relax_steps=4), guards=guards)(both)
    assert gap.status == ["", f"guard: {UNSTABLE}"]
    assert np.isfinite(gap.total).tolist() == [True, False]
    assert not gap.abstained.any()
    as_drawn = build_reward("band_gap", context=RewardContext(chgnet), guards=guards)(both)
    assert as_drawn.status == ["", ""]  # almost everything is unstable as drawn
    hull = build_reward("ehull", context=RewardContext(chgnet, relax_steps=4), guards=guards)(both)
    assert hull.status == ["", ""]
    assert hull.total[0] > hull.total[1] + 0.4


def test_sun_is_the_probability_to_lie_within_reach_of_the_hull(hull):
    from scipy.stats import norm

    class Judge:
        """A potential whose word is given."""

        name, energy_scale, elements, cutoff, feature_version = "given", "chgnet-0.3.0", None, 5.0, ""

        def compute(self, structures, **asked):
            from cfrl.potentials import Evaluation

            return Evaluation(np.array([-3.5 + 0.02, -3.5 + 0.1, -3.5 + 0.5]), [""] * 3)

    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    batch = CrystalBatch.from_structures([salt, salt.copy().scale_lattice(150), salt.copy().scale_lattice(160)])
    context = RewardContext(Judge(), hull, known=CrystalBatch.from_structures([COPPER]))
    result = build_reward("sun", context=context)(batch)
    above = result.terms["sun/e_above_hull"]
    np.testing.assert_allclose(above, [0.02, 0.1, 0.5], atol=1e-6)
    doubt = hull.e_above_hull(batch, np.zeros(3)).doubt
    np.testing.assert_allclose(result.total, norm.cdf((0.1 - above - doubt) / 0.03), rtol=1e-6)


def test_sun_looks_ahead_of_a_relaxation_that_is_cut_short(hull, chgnet):
    from scipy.stats import norm

    from cfrl.potentials.relax import relax
    from cfrl.rewards.stability import ERRS, LEFT

    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(6.6), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])  # of 5.6
    batch = CrystalBatch.from_structures([salt])
    context = RewardContext(chgnet, hull, known=CrystalBatch.from_structures([COPPER]), relax_steps=2)
    result = build_reward("sun", context=context)(batch)
    cut = relax(batch, chgnet, steps=2)
    above = hull.e_above_hull(batch, cut.energy).credible()
    assert cut.fall[0] > 0.01
    end = above.e_above_hull + above.doubt - LEFT * cut.fall
    np.testing.assert_allclose(result.total, norm.cdf((0.1 - end) / (0.03 + ERRS * cut.fall)), rtol=1e-6)

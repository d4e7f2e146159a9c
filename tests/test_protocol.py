"""LeMat-GenBench's figures: definitions on crystals made by hand, closed forms, counts, files that go out and in."""

import json
import math
import pickle
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement, product
from pathlib import Path

import numpy as np
import pytest
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

import cfrl
from cfrl.cli import app
from cfrl.commands import screen as screening
from cfrl.commands.sample import run_sample
from cfrl.commands.screen import screen
from cfrl.config import FinetuneConfig, SampleConfig, ScreenConfig
from cfrl.errors import UserError
from cfrl.io.storage import read_crystals
from cfrl.reports.report import write_report
from cfrl.runs.folder import RunFolder
from cfrl.screening import distributions, lemat, protocol, stages, submission
from cfrl.screening.distributions import Sample
from cfrl.stability.flags import FLAGS
from tests.test_screen import SerialEngine, perovskite, read_table, rock_salt, serial, write_csv  # noqa: F401
from tests.tiny import base_model

QUICK = ScreenConfig(relax=False, stability=False, report=False, workers=1, device="cpu")
COPPER = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.61), ["Cu"], [[0, 0, 0]])


def pair(a: str, b: str, distance: float) -> Structure:
    """Two atoms in a cell so large that no other images meet."""
    return Structure(Lattice.cubic(8), [a, b], [[0, 0, 0], [distance / 8, 0, 0]])


# ---- valid ----


@pytest.mark.parametrize(
    ("a", "b", "least"),
    [("Na", "Cl", 0.5 * (0.7 + 1.8 + 1.0)), ("H", "H", 0.5 * (0.7 + 0.25 + 0.25)), ("He", "Cs", 0.5 * (0.7 + 1 + 2.6))],
)
def test_atoms_are_at_least_half_of_padding_and_radii_apart(a: str, b: str, least: float) -> None:
    """He has no atomic radius: 1 angstrom."""
    assert not lemat.distances_hold(pair(a, b, least - 0.01))
    assert lemat.distances_hold(pair(a, b, least + 0.01))
    assert lemat.distances_hold(pair(a, b, 8 - least - 0.01)), "an image is as near"
    assert not lemat.distances_hold(pair(a, b, 8 - least + 0.01))


def test_an_atom_and_its_own_images_are_not_looked_at() -> None:
    assert lemat.distances_hold(Structure(Lattice.cubic(0.5), ["Cs"], [[0, 0, 0]]))


def test_which_test_balances_the_charges() -> None:
    """Salts by valences, metals by SMACT's score, an element by having no bonds; sodium dichloride by nothing."""
    cscl = Structure.from_spacegroup("Pm-3m", Lattice.cubic(2.9), ["Fe", "Al"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    silicon = Structure.from_spacegroup("Fd-3m", Lattice.cubic(5.43), ["Si"], [[0, 0, 0]])
    fluorite = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.5), ["Na", "Cl"], [[0, 0, 0], [0.25, 0.25, 0.25]])
    assert lemat.charge_test(rock_salt()) == "valences"
    assert lemat.charge_test(perovskite("Ba", "Ti")) == "valences"
    assert lemat.charge_test(cscl) == "metallic"
    assert lemat.charge_test(silicon) == "no bonds"
    assert fluorite.composition.reduced_formula == "NaCl2"
    assert lemat.charge_test(fluorite) == ""
    assert lemat.charge_test(fluorite, {"Na": [2], "Cl": [-1]}) == "states", "the benchmark's own table decides"


def test_uncommon_states_count_where_the_electronegative_are_negative() -> None:
    """OF2 has O+2: the more electronegative fluorine is negative."""
    oxygen_fluoride = Structure(Lattice.cubic(9), ["O", "F", "F"], [[0, 0, 0], [0.2, 0.2, 0], [0.8, 0.2, 0]])
    assert lemat._test_composition(oxygen_fluoride, {"O": [-2], "F": [-1]}) == "all states"
    helium = Structure(Lattice.cubic(9), ["O", "He"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert lemat._test_composition(helium, {"O": [-2], "He": [3]}) == "", "no electronegativity, no correlation"


@pytest.mark.parametrize("seed", range(12))
def test_balances_are_those_of_all_combinations(seed: int) -> None:
    """Against the definition: every multiset of states that differ by one at most, each sum but 0."""
    random = np.random.default_rng(seed)
    amounts = {name: int(random.integers(1, 5)) for name in "ABC"[: random.integers(1, 4)]}
    states = {name: sorted({int(s) for s in random.integers(-4, 6, size=4)} - {0}) for name in amounts}
    sums = [
        {sum(chosen) for chosen in combinations_with_replacement(states[name], n) if max(chosen) - min(chosen) <= 1}
        for name, n in amounts.items()
    ]
    wanted = {
        tuple(total / n for total, n in zip(found, amounts.values(), strict=True))
        for found in product(*(each - {0} for each in sums))
        if sum(found) == 0
    }
    found = list(lemat.balances(amounts, states))
    assert set(found) == wanted
    assert len(found) == len(wanted)


def test_many_atoms_of_an_element_are_no_work() -> None:
    """CuSi64: 1.3 billion multisets, of which 500 sums are asked for."""
    assert next(lemat.balances({"Cu": 1, "Si": 64}, {"Cu": [1, 2], "Si": [-4, -3, -2, -1, 1, 2, 3, 4]}), None) is None
    assert next(lemat.balances({"O": 64, "Si": 32}, {"O": [-2], "Si": [4]})) == (-2.0, 4.0)


@pytest.mark.parametrize(
    ("structure", "plausible"),
    [
        (rock_salt(), True),
        (Structure(Lattice.cubic(101), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]), False),  # too long, too thin
        (Structure(Lattice.orthorhombic(0.9, 9, 9), ["Na"], [[0, 0, 0]]), False),  # too short
        (rock_salt("U", "U", 4.5), False),  # 35 g/cm^3
        (Structure(Lattice.cubic(1.2), ["H"], [[0, 0, 0]]), False),  # 0.58 atoms/A^3
        (Structure(Lattice.cubic(1.3), ["H"], [[0, 0, 0]]), True),  # 0.46
    ],
)
def test_plausible_cells(structure: Structure, plausible: bool) -> None:
    assert lemat.cell_is_plausible(structure) == plausible


def test_what_cannot_be_tested_is_not_valid() -> None:
    disordered = Structure(Lattice.cubic(4), [{"Na": 0.5, "K": 0.5}, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    alone, salt = lemat.check([disordered, rock_salt()], {})
    assert not (alone["charge"] and alone["distances"] and alone["plausible"])
    assert salt == {"charge": "valences", "distances": True, "plausible": True, "space_group": 225}


# ---- distributions ----


def test_vendi_score_and_entropy_in_closed_form() -> None:
    assert distributions.vendi_score(np.array([7, 7, 7, 7, 0])) == pytest.approx(4)
    assert distributions.entropy(np.array([5])) == 0
    assert distributions.entropy(np.array([1, 3])) == pytest.approx(math.log(4) - 0.75 * math.log(3))


def test_vendi_score_is_that_of_a_kernel_of_kinds() -> None:
    """Of the eigenvalues of K / n (Friedman and Dieng 2023) with K = 1 between crystals of a kind, else 0."""
    kinds = np.array([0, 0, 0, 1, 1, 2])
    values = np.linalg.eigvalsh((kinds[:, None] == kinds).astype(float) / len(kinds)).clip(1e-15)
    assert distributions.vendi_score(np.bincount(kinds)) == pytest.approx(np.exp(-(values * np.log(values)).sum()))


def test_distances_of_distributions_in_closed_form() -> None:
    assert distributions.jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == pytest.approx(math.sqrt(math.log(2)))
    assert distributions.jensen_shannon(np.array([0.2, 0.8]), np.array([0.2, 0.8])) == pytest.approx(0)
    assert distributions.mmd(np.array([0.0]), np.array([2.0])) == pytest.approx(2 - 2 * math.exp(-2))
    assert distributions.mmd(np.array([0.0, 1.0]), np.array([1.0, 0.0])) == pytest.approx(0)


def test_frechet_distance_of_normal_distributions() -> None:
    """Of covariances that commute: squared differences of the means and of the standard deviations along the axes."""
    random = np.random.default_rng(0)
    white = random.normal(size=(500, 3))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T  # covariance 1, exactly
    turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
    ours, theirs, shift = np.array([1.0, 2, 3]), np.array([2.0, 2, 0.5]), np.array([0.3, 0, -1])
    found = distributions.frechet(white * ours @ turn, (white * theirs + shift) @ turn)
    assert found == pytest.approx((shift**2).sum() + ((ours - theirs) ** 2).sum())


def test_a_sample_counts_cells_as_they_are() -> None:
    crystals = [perovskite("Ba", "Ti"), rock_salt(), COPPER]
    sample = Sample.of(crystals, [221, 225, 225])
    assert sample.atoms.sum() == 5 + 8 + 4
    assert sample.shares["CompositionCounts"][28] == pytest.approx(4 / 17)
    assert sample.shares["Composition"][7] == pytest.approx(1 / 6), "six times an element is in a crystal"
    assert sample.shares["CrystalSystem"].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert sample.quantities["Density(atoms/A^3)"] == pytest.approx([5 / 64, 8 / 5.6**3, 4 / 3.61**3])
    batch = Sample.of_crystals(cfrl.CrystalBatch.from_structures(crystals))
    for name in ("space_group", "atoms", "volume", "density"):
        np.testing.assert_allclose(getattr(batch, name), getattr(sample, name), rtol=1e-5)


def test_diversity() -> None:
    """Two of four crystals are copper: by hand."""
    crystals = [COPPER, COPPER, perovskite("Ba", "Ti"), rock_salt()]
    found = distributions.diversity(Sample.of(crystals, [225, 225, 221, 225]), crystals)
    assert found["sites, mean"] == (4 + 4 + 5 + 8) / 4
    assert found["sites, Vendi score"] == pytest.approx(2**1.5)
    assert found["space groups, Vendi score"] == pytest.approx(math.exp(math.log(4) - 0.75 * math.log(3)))
    assert found["elements, coverage"] == pytest.approx(6 / 118)
    assert found["space groups, coverage"] == pytest.approx(2 / 230)
    # copper twice, two others: 1.5 bits each of density, a, b, c; packing 0.82, 0.82, others
    assert found["size, entropy"] == pytest.approx(1.5 * math.log(2) / 2)
    assert distributions.packing_factor(COPPER) == pytest.approx(4 * 4 / 3 * math.pi * 1.32**3 / 3.61**3)
    californium = Structure(Lattice.cubic(5.75), ["Cf"] * 4, COPPER.frac_coords)  # no table holds its radius
    assert distributions.packing_factor(californium) == pytest.approx(4 * 4 / 3 * math.pi * 1.69**3 / 5.75**3)


# ---- counts ----


def test_counts_by_hand() -> None:
    """Rows 0 and 1 are one stable crystal; 2 and 3 are equal, 2 stable and known, 3 metastable; 4 is invalid."""
    yes = np.ones(6, dtype=bool)
    found = protocol.Findings(
        charge=yes,
        distances=np.array([1, 1, 1, 1, 0, 1], dtype=bool),
        plausible=yes,
        space_group=np.full(6, 225),
        kind=np.array([0, 0, 2, 2, 4, 5]),
        novel=np.array([1, 1, 0, 1, 1, 1.0]),
        e_above_hull=np.array([0.0, -0.3, -0.1, 0.1, -1, 0.1001]),
        embedding=np.empty((0, 0)),
    )
    counts = {name: int(mask.sum()) for name, mask in found.conditions().items()}
    assert counts == {
        "charge neutral": 6,
        "distances": 5,
        "plausible": 6,
        "valid": 5,
        "unique": 3,
        "novel": 4,
        "stable": 3,
        "metastable": 1,
        "unique, of the stable": 2,
        "unique, of the metastable": 1,
        "S.U.N.": 1,
        "M.S.U.N.": 1,
        "S.U.N. + M.S.U.N.": 2,
    }
    figures = protocol.Figures(10, {"drawn": counts}, {"drawn": {}}, "")
    assert figures.shares("drawn")["S.U.N. + M.S.U.N."] == (2, 2 / 5, 2 / 10)
    assert math.isnan(figures.shares("drawn")["valid"][1]), "valid ones are not asked how many of them are"
    assert set(counts) == set(protocol.DEFINITIONS)


def test_lengths_are_held_against_each_other_more_closely_than_by_the_matchers_default() -> None:
    """A perovskite drawn out by a quarter: of one volume, lengths are 16% off, between the two tolerances."""
    long = perovskite("Ba", "Ti")
    long.apply_strain([0, 0, 0.25])
    group = stages.Group([perovskite("Ba", "Ti"), long], ["", ""], [], [])
    assert stages.match([group])[0]["duplicate_of"] == [None, 0]
    assert stages.match([group], ltol=protocol.LTOL)[0]["duplicate_of"] == [None, None]


# ---- the command ----


@pytest.fixture(scope="module")
def crystals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Salt twice, magnesia that is known, copper; sodium and chlorine too near; and a row that cannot be read."""
    near = Structure(Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [1.6 / 5, 0, 0]])
    rows = {"salt": rock_salt(), "again": rock_salt() * [1, 1, 2], "MgO": rock_salt("Mg", "O", 4.3), "Cu": COPPER}
    path = write_csv(tmp_path_factory.mktemp("protocol") / "crystals.csv", rows | {"near": near})
    path.write_text(path.read_text() + "broken,no cif at all\n")
    return path


@pytest.fixture
def hull_file(tmp_path: Path) -> Path:
    path = tmp_path / "hull.csv"
    energies = {"Na": -1.3, "Cl": -1.8, "Mg": -1.5, "O": -4.9, "Cu": -4.1, "NaCl": -3.0, "MgO": -5.9}
    path.write_text("formula,energy_per_atom\n" + "".join(f"{f},{e}\n" for f, e in energies.items()))
    return path


def test_protocol_of_a_file(
    serial: type[SerialEngine],  # noqa: F811
    crystals: Path,
    hull_file: Path,
    tmp_path: Path,
) -> None:
    known = write_csv(tmp_path / "known.csv", {"mp-1": rock_salt("Mg", "O", 4.2), "mp-2": perovskite("Ca", "Ti")})
    config = replace(QUICK, relax=True, steps=4, stability=True, hull=str(hull_file), known=[str(known)])
    run = screen(str(crystals), replace(config, protocol="lemat"))
    table, summary = read_table(run), json.loads((run / "summary.json").read_text())
    found = summary["protocol"]
    counts = {name: row["count"] for name, row in found["counts"]["drawn"].items()}
    assert found["crystals"] == 6, "what cannot be read was submitted too"
    assert counts["valid"] == 4
    assert found["counts"]["drawn"]["valid"]["of_all"] == pytest.approx(4 / 6)
    assert (counts["unique"], counts["novel"]) == (3, 3)
    assert {name: row["lemat_valid"] for name, row in table.items()} == dict.fromkeys(
        ("salt", "again", "MgO", "Cu"), "1"
    ) | {"near": "0", "broken": "0"}
    assert (table["near"]["lemat_distances"], table["near"]["valid"]) == ("0", "1"), "nearer than the benchmark allows"
    assert (table["MgO"]["lemat_novel"], table["again"]["lemat_unique"]) == ("0", "0")
    assert float(table["MgO"]["lemat_e_above_hull"]) > float(table["MgO"]["e_above_hull"]), "it was relaxed after that"
    assert set(found["counts"]) == {"drawn", "relaxed"}
    numbers = found["numbers"]
    above = [float(row["lemat_e_above_hull"]) for row in table.values() if row["lemat_valid"] == "1"]
    assert numbers["drawn"]["energy above hull, mean (eV/atom)"] == pytest.approx(np.mean(above), abs=1e-5)
    assert numbers["drawn"]["RMSD of the relaxation, mean (A)"] > 0
    assert numbers["drawn"]["JSD, SpaceGroup"] == pytest.approx(
        distributions.jensen_shannon(np.array([0, 1.0]), np.array([0.5, 0.5]))
    ), "salt, magnesia and copper: 225; known: 225 and 221"
    assert numbers["drawn"]["Frechet distance"] > 0
    assert "LeMat-Bulk" in found["instead"]
    write_report(run)
    assert "LeMat-GenBench" in (run / "report.html").read_text()


def test_submission_is_exactly_so_many_cifs(
    serial: type[SerialEngine],  # noqa: F811
    crystals: Path,
    hull_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert submission.SIZE == 2500
    config = replace(QUICK, protocol="lemat", submission=str(tmp_path / "mine"))
    with pytest.raises(UserError, match=r"takes exactly 2,500 crystals, and crystals.csv has 5 that can be read"):
        screen(str(crystals), config)
    assert not (tmp_path / "mine").exists()
    with pytest.raises(UserError, match="add --protocol lemat"):
        screen(str(crystals), replace(config, protocol=None))

    for module in (submission, screening):
        monkeypatch.setattr(module, "SIZE", 3)
    screen(str(crystals), config)
    files = sorted((tmp_path / "mine" / "cifs").iterdir())
    assert [path.name for path in files] == ["0.cif", "1.cif", "2.cif"]
    wanted = [rock_salt(), rock_salt() * [1, 1, 2], rock_salt("Mg", "O", 4.3)]
    for path, structure in zip(files, wanted, strict=True):
        read = Structure.from_file(path)
        assert read.lattice.parameters == pytest.approx(structure.lattice.parameters)
        assert StructureMatcher(primitive_cell=False, scale=False, ltol=1e-4, stol=1e-4).fit(read, structure)
    card = (tmp_path / "mine" / "card.md").read_text()
    assert "| unique | 2 | 66.7% | 66.7% |" in card, "of the three that are submitted"
    assert "- pre-relaxed: no" in card
    assert f"- training data: {submission.BLANK}" in card

    screen(str(crystals), replace(config, relax=True, steps=3, submit="relaxed"))
    relaxed = [Structure.from_file(path) for path in sorted((tmp_path / "mine" / "cifs").iterdir())]
    assert relaxed[2].volume != pytest.approx(wanted[2].volume, rel=1e-4)
    assert StructureMatcher().fit(relaxed[0], relaxed[1]), "a duplicate is relaxed as its original"
    assert "- pre-relaxed: yes, by chgnet-0.3.0" in (tmp_path / "mine" / "card.md").read_text()

    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(UserError, match="is no submission"):
        screen(str(crystals), config)


def test_the_benchmarks_own_tables(tmp_path: Path) -> None:
    """Those that are there are used; what is no such table is told in a line."""
    with pytest.raises(UserError, match="no such folder"):
        protocol.read_tables(tmp_path / "data")
    with pytest.raises(UserError, match="none of the benchmark's tables"):
        protocol.read_tables(tmp_path)
    sizes = {"SpaceGroup": 230, "CrystalSystem": 7, "CompositionCounts": 118, "Composition": 118}
    shares = {name: {str(i + 1): 1 / size for i in range(size)} for name, size in sizes.items()}
    values = {name: np.arange(3.0) for name in ("Volume", "Density(g/cm^3)", "Density(atoms/A^3)")}
    (tmp_path / "lemat_icsd_oxi_state_mapping.json").write_text('{"Na": [1], "Cl": [-1, 5]}')
    (tmp_path / "mp20_jsdistance_distributions.json").write_text(json.dumps(shares))
    (tmp_path / "mp20_mmd_values_15k.pkl").write_bytes(pickle.dumps(values))
    tables = protocol.read_tables(tmp_path)
    assert tables["states"]["Cl"] == [-1, 5]
    assert tables["shares"]["CrystalSystem"] == pytest.approx([1 / 7] * 7)
    assert tables["quantities"]["Volume"].tolist() == [0, 1, 2]

    (tmp_path / "mp20_jsdistance_distributions.json").write_text(
        json.dumps(shares | {"CrystalSystem": shares["Composition"]})
    )
    with pytest.raises(UserError, match="no distribution CrystalSystem over 1 to 7"):
        protocol.read_tables(tmp_path)
    (tmp_path / "mp20_jsdistance_distributions.json").unlink()
    (tmp_path / "mp20_mmd_values_15k.pkl").write_bytes(pickle.dumps({"Volume": Counter("abc")}))
    with pytest.raises(UserError, match=r"refused: it holds collections\.Counter"):
        protocol.read_tables(tmp_path)


# ---- crystals of a model ----


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was rewarded for density; its weights are untrained."""
    config = FinetuneConfig(reward="density", allow="all", device="cpu")
    run = RunFolder.create("finetune", "density", config, tmp_path_factory.mktemp("tuned") / "runs")
    base_model(run.path / "model.safetensors")
    return run.path


def test_screening_a_model(
    serial: type[SerialEngine],  # noqa: F811
    tuned: Path,
    tmp_path: Path,
) -> None:
    """Its draws are those of `cfrl sample`; its reward, here the density, is a column, and ranks."""
    config = replace(QUICK, model=str(tuned), n=16, seed=3, unique=False, allow=",".join(FLAGS))
    run = screen(None, config)
    drawn = read_crystals(run / "crystals.h5")
    run_sample(SampleConfig(n=16, model=str(tuned), seed=3, device="cpu"), str(tmp_path / "sample.h5"))
    assert drawn.formulas() == read_crystals(tmp_path / "sample.h5").formulas()
    rows = list(read_table(run).values())
    scores = [float(row["reward"]) for row in rows if row["candidate"] == "1"]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) > 1
    for row in rows:
        assert float(row["reward"]) == pytest.approx(float(row["density"]), rel=1e-4)
        assert row["reward/density"] == row["reward"]
    kept = read_crystals(run / "screen.h5")
    told = {row["id"]: float(row["reward"]) for row in rows}
    assert kept.properties["reward"].tolist() == pytest.approx([told[name] for name in kept.ids], rel=1e-4)

    made = (run / "crystals.h5").stat().st_mtime_ns
    screen(None, replace(config, rank="reward"), resume=run)
    assert (run / "crystals.h5").stat().st_mtime_ns == made, "nothing is drawn again"
    again = [float(row["reward"]) for row in read_table(run).values() if row["candidate"] == "1"]
    assert again == sorted(again)
    with pytest.raises(UserError, match="Leave one of them out"):
        screen("crystals.csv", config)
    with pytest.raises(UserError, match=r"2,500 crystals, and --model .* has 16"):  # before any is drawn
        screen(None, replace(config, protocol="lemat", submission="mine"))


def test_screening_a_model_that_nothing_was_tuned_towards(
    serial: type[SerialEngine],  # noqa: F811
    tmp_path: Path,
) -> None:
    config = replace(QUICK, model=str(base_model(tmp_path / "base.safetensors")), n=4, rank="density")
    table = read_table(screen(None, config))
    assert len(table) == 4
    assert "reward" not in next(iter(table.values()))


def test_the_model_may_be_the_newest_run(tuned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From the command line, where nothing else is named; and a model that is not there."""
    from typer.testing import CliRunner

    monkeypatch.chdir(tuned.parents[1])
    flags = ["--no-relax", "--no-stability", "--no-report", "--workers", "1", "--device", "cpu", "-n", "3"]
    result = CliRunner().invoke(app, ["screen", "--model", "last", *flags, "-o", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert len(read_table(tmp_path / "run")) == 3
    result = CliRunner().invoke(app, ["screen", "--model", "nowhere", *flags])
    assert isinstance(result.exception, UserError)
    assert "no such model" in str(result.exception)

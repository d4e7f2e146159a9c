"""Predictors: what they learn, whether their spread is honest, that no compound leaks, and files that do not fit."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from safetensors import safe_open
from scipy.stats import spearmanr
from typer.testing import CliRunner

import cfrl
from cfrl.assets import ASSETS
from cfrl.commands.rewards_train import card, read_targets, run_train
from cfrl.errors import UserError
from cfrl.potentials import load_potential
from cfrl.rewards.predictor_training import PredictorOptions, assign_folds, make_splits, prototypes_of
from cfrl.rewards.predictor_training import train as train_on
from cfrl.rewards.predictors import BUILT_IN, composition, load_predictor

QUICK = {"members": 3, "hidden": 32, "epochs": 30, "batch_size": 64, "dropout": 0.0, "folds": 3, "lr": 1e-2}
HEADER = {"target": "y", "unit": "eV", "potential": "chgnet", "feature_version": "made up", "data": ["made up"]}


def train(x: np.ndarray, y: np.ndarray, formulas: list[str], *others, prototypes: list[str] | None = None):
    """`train` on crystals of which each formula is a prototype of its own, unless said otherwise."""
    return train_on(x, y, formulas, formulas if prototypes is None else prototypes, *others)


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet", "cpu")


@pytest.fixture(scope="module")
def noisy() -> dict:
    """y = sin(2 a) + b + noise, where the noise grows with c; 1,200 rows to learn from and 2,000 fresh ones."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3200, 6)).astype(np.float32)
    noise = 0.05 + 0.4 * (x[:, 2] > 0)
    y = np.sin(2 * x[:, 0]) + x[:, 1] + noise * rng.normal(size=len(x))
    groups = [f"compound {i // 2}" for i in range(1200)]
    predictor, validation = train(x[:1200], y[:1200], groups, PredictorOptions(**QUICK), HEADER)
    return {"x": x[1200:], "y": y[1200:], "noise": noise[1200:], "predictor": predictor, "validation": validation}


def test_a_function_is_learnt(noisy: dict) -> None:
    mean, _ = noisy["predictor"].from_descriptors(noisy["x"])
    error = mean - noisy["y"]
    assert 1 - error.var() / noisy["y"].var() > 0.85
    rmse = np.sqrt((error**2).mean())
    assert noisy["validation"].metrics["rmse"] == pytest.approx(rmse, rel=0.15), "cross-validation tells the truth"


def test_spread_is_honest_on_fresh_data(noisy: dict) -> None:
    mean, spread = noisy["predictor"].from_descriptors(noisy["x"])
    covered = np.mean(np.abs(mean - noisy["y"]) <= spread)
    assert 0.65 < covered < 0.85, "somewhat wide: calibrated for crystals unlike those of the training"
    quiet, loud = spread[noisy["noise"] < 0.1], spread[noisy["noise"] > 0.1]
    assert np.median(loud) > 2 * np.median(quiet), "it knows where the data are noisy"
    center = np.linalg.norm(noisy["x"], axis=1) < 2
    far = noisy["predictor"].from_descriptors(noisy["x"] * 4)[1]
    assert np.median(far[center]) > 1.5 * np.median(spread[center]), "and that it knows little far from them"


def test_zeros_are_a_class_of_their_own() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1500, 4)).astype(np.float32)
    y = np.where(x[:, 0] + 0.1 * rng.normal(size=len(x)) > 0.5, 2 + x[:, 1], 0.0).clip(0)
    options = PredictorOptions(zero=0.05, **QUICK)
    predictor, validation = train(x[:1000], y[:1000], [str(i) for i in range(1000)], options, HEADER)
    assert validation.metrics["auc"] > 0.97
    mean, spread = predictor.from_descriptors(x[1000:])
    zero, clear = y[1000:] < 0.05, np.abs(x[1000:, 0] - 0.5) > 0.4
    assert mean[zero & clear].max() < 0.3
    assert np.abs(mean - y[1000:])[~zero & clear].mean() < 0.3
    assert spread[~clear].mean() > 2 * spread[clear].mean(), "it doubts most where the class is unclear"
    assert (mean >= 0).all()


def test_no_compound_leaks() -> None:
    rng = np.random.default_rng(2)
    x = np.repeat(rng.normal(size=(60, 10)), 8, axis=0).astype(np.float32)  # each compound eight times over
    y = np.repeat(rng.normal(size=60), 8)  # nothing to learn but the compound itself
    groups = np.repeat([f"AB{i}" for i in range(60)], 8)
    _, grouped = train(x, y, groups, PredictorOptions(**QUICK), HEADER)
    _, leaking = train(x, y, [str(i) for i in range(len(y))], PredictorOptions(**QUICK), HEADER)
    assert grouped.metrics["r2"] < 0.1
    assert leaking.metrics["r2"] > 0.5, "the test can fail: with single rows as groups it does leak"


def test_folds() -> None:
    groups = [f"{i % 37}" for i in range(500)]
    fold = assign_folds(groups, 5)
    assert all(len({fold[i] for i in range(500) if groups[i] == g}) == 1 for g in set(groups))
    assert np.ptp(np.bincount(fold)) <= 14, "groups of 13 or 14"
    uneven = np.repeat(["large", *"abcdefghijkl"], [100, *[25] * 12])
    assert np.bincount(assign_folds(uneven, 4)).tolist() == [100] * 4
    with pytest.raises(UserError, match="only 3 different formulas"):
        assign_folds(["a", "b", "c"], 5)


def test_splits_hold_whole_groups_back() -> None:
    rng = np.random.default_rng(5)
    center = rng.integers(0, 12, 600)
    x = (10 * rng.normal(size=(12, 8))[center] + rng.normal(size=(600, 8))).astype(np.float32)
    formulas, prototypes = [f"A{i}" for i in range(600)], [f"{i % 40}|a b" for i in range(600)]
    splits = make_splits(x, formulas, prototypes, PredictorOptions())
    assert list(splits) == ["formula", "prototype", "cluster"]
    for fold in splits.values():
        assert set(fold) == set(range(5))
    assert all(len(set(splits["prototype"][i::40])) == 1 for i in range(40))
    together = [len(set(splits["cluster"][center == i])) == 1 for i in range(12)]
    assert np.mean(together) > 0.7, "what lies together is held back together"
    alike = make_splits(x, formulas, ["221|a b c"] * 400 + prototypes[400:], PredictorOptions())
    assert list(alike) == ["formula", "cluster"], "one prototype is most of the data"


def test_prototypes_of_crystals() -> None:
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.69), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
    magnesia = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.24), ["Mg", "O"], [[0, 0, 0], [0.5] * 3])
    alloy = Structure(Lattice.cubic(3), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]])
    assert prototypes_of([salt, alloy, magnesia]) == ["225|a b", "Cu0.5Au0.5", "225|a b"]


@pytest.mark.parametrize("log", [False, True])
def test_spread_holds_for_unseen_prototypes(log: bool) -> None:
    """Values that depend on the prototype beyond what descriptors say: between formulas of one that can be learnt."""
    rng = np.random.default_rng(6)

    def draw(names: range, rows: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        of = rng.integers(0, len(names), rows)
        offset = np.array([np.random.default_rng(1000 + k).normal(size=7) for k in names])
        x = np.column_stack([rng.normal(size=(rows, 3)), offset[of, :6] + 0.1 * rng.normal(size=(rows, 6))])
        y = x[:, 0] + 0.7 * offset[of, 6] + 0.05 * rng.normal(size=rows)
        return x.astype(np.float32), 10 ** (0.3 * y) if log else y, [f"{names[k]}|a" for k in of]

    x, y, prototypes = draw(range(60), 1500)
    options = PredictorOptions(log=log, **QUICK)
    predictor, validation = train(x, y, [str(i) for i in range(1500)], options, HEADER, prototypes=prototypes)
    header = predictor.header
    harder = header["harder_splits"]
    assert header["calibration"] == max(m["calibration"] for m in (validation.metrics, *harder.values()))
    assert min(m[key] for m in harder.values() for key in ("within_1_sigma", "within_1_sigma_top")) >= 0.68
    fresh, truth, _ = draw(range(100, 400), 3000)
    mean, spread = predictor.from_descriptors(fresh)
    top = np.argsort(-mean)[:150]
    for rows in (slice(None), top):
        assert np.mean((np.abs(mean - truth) <= spread)[rows]) > 0.65
    as_for_formulas = spread * validation.metrics["calibration"] / header["calibration"]
    assert np.mean(np.abs(mean - truth) <= as_for_formulas) < 0.55, "the test can fail: by formula it is overconfident"
    assert np.median(mean[top]) > 1.1 * np.median(truth[top]), "the highest predictions are too high"
    cautious = mean - spread
    best = np.argsort(-cautious)[:150]
    assert np.median(cautious[best]) <= np.median(truth[best]), "less one spread they are not"


def test_training_is_reproducible_and_files_keep_everything(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(200, 4)).astype(np.float32), 10 ** rng.normal(size=200)
    options = PredictorOptions(log=True, **QUICK | {"epochs": 3})
    one, _ = train(x, y, [str(i) for i in range(200)], options, HEADER)
    two, _ = train(x, y, [str(i) for i in range(200)], options, HEADER)
    one.save(tmp_path / "p.safetensors")
    for other in (two, load_predictor(str(tmp_path / "p.safetensors"))):
        np.testing.assert_array_equal(one.from_descriptors(x), other.from_descriptors(x))
    mean, spread = one.from_descriptors(100 * x)
    assert y.min() * 0.999 <= mean.min() <= mean.max() <= y.max() * 1.001, "never beyond what it has seen"
    assert (spread > 0).all()
    del one.header["harder_splits"]
    one.save(tmp_path / "old.safetensors")
    np.testing.assert_array_equal(
        load_predictor(str(tmp_path / "old.safetensors")).from_descriptors(100 * x)[1], spread
    )


def test_composition() -> None:
    from cfrl.crystals.descriptors import element_descriptors

    table = element_descriptors().numpy()
    got = composition(["NaCl", "Fe"])
    k = table.shape[1]
    pair = table[[11, 17]]
    np.testing.assert_allclose(got[0, :k], pair.mean(0), atol=1e-6)
    np.testing.assert_allclose(got[0, k : 2 * k], pair.std(0), atol=1e-6)
    np.testing.assert_allclose(got[0, 2 * k : 3 * k], pair.min(0), atol=1e-6)
    np.testing.assert_allclose(got[0, 3 * k : 4 * k], pair.max(0), atol=1e-6)
    np.testing.assert_allclose(got[1, :k], table[26], atol=1e-6)
    assert got[:, -1].tolist() == [2, 1]


def test_a_prediction_does_not_depend_on_the_cell(chgnet) -> None:
    quartz = Structure.from_spacegroup(
        "P3_221", Lattice.hexagonal(4.91, 5.43), ["Si", "O"], [[0.465, 0, 2 / 3], [0.415, 0.272, 0.785]]
    )
    cells = [quartz, quartz * (2, 1, 1), quartz.get_reduced_structure("LLL")]
    evaluation = chgnet.compute(cells, features=True)
    for name in BUILT_IN:
        mean, spread = load_predictor(name).predict(cells, evaluation)
        np.testing.assert_allclose(mean, mean[0], rtol=2e-3, err_msg=name)
        np.testing.assert_allclose(spread, spread[0], rtol=2e-2, err_msg=name)


def test_a_crystal_without_features_has_no_prediction(chgnet) -> None:
    crystals = [Structure(Lattice.cubic(3.3), [e], [[0, 0, 0]]) for e in ("Po", "Cu")]
    mean, spread = load_predictor("band_gap").predict(crystals, chgnet.compute(crystals, features=True))
    assert np.isnan([mean[0], spread[0]]).all()
    assert np.isfinite([mean[1], spread[1]]).all()


@pytest.mark.parametrize("name", BUILT_IN)
def test_shipped_predictors(name: str, chgnet) -> None:
    predictor = load_predictor(name)
    predictor.check(chgnet)
    path = ASSETS / f"{name}.safetensors"
    assert path.stat().st_size < 1.5e6
    assert path.with_suffix(".md").read_text() == card(predictor), "the card beside the file is that of the file"
    with safe_open(path, "np") as file:
        assert file.get_tensor("weight_0").shape[0] >= 5, "an ensemble"
    figures = predictor.header["cross_validation"]
    least = {"band_gap": 0.26, "eps_electronic": 0.070, "eps_total": 0.125, "bulk_modulus": 0.075}
    assert figures["mae"] < least[name]
    assert figures.get("auc", 1.0) > 0.97
    harder = predictor.header["harder_splits"]
    assert list(harder) == ["prototype", "cluster"]
    covered = "within_1_sigma" if predictor.header["zero"] is None else "within_1_sigma_nonzero"
    assert "| unseen | formula | prototype | cluster |" in card(predictor)
    for split in (figures, *harder.values()):
        assert min(split[covered], split["within_1_sigma_top"]) > 0.65
        assert split["top_cautious_ratio"] <= 1


def test_ranking_of_real_crystals(chgnet, shared: Path) -> None:
    """The shipped file gives what its card says (most rows were in training; this is a check of the file)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        structures, values = read_targets([str(shared / "data" / "dielectric.csv.gz")], "eps_total", True)
    rows = np.linspace(0, len(values) - 1, 100).astype(int)
    some = [structures[i] for i in rows]
    mean, _ = load_predictor("eps_total").predict(some, chgnet.compute(some, features=True))
    assert spearmanr(mean, values[rows]).statistic > 0.85


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 prototype crystals and their densities as a CSV."""
    crystals = cfrl.load_dataset("prototypes")
    crystals = crystals[(crystals.num_atoms <= 12) & (crystals.species.amax(1) <= 83)][:80]
    path = tmp_path_factory.mktemp("data") / "densities.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "cif", "density", "words", "zero"])
        for i, structure in enumerate(crystals.to_structures()):
            writer.writerow([f"id-{i}", structure.to(fmt="cif"), float(structure.density), "abc", i - 5])
    return path


def test_train_command(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cfrl.cli import app

    monkeypatch.chdir(tmp_path)
    arguments = ["rewards", "train", str(table), "--target", "density", "--log", "--unit", "g/cm3"]
    arguments += [
        "--epochs",
        "60",
        "--batch-size",
        "16",
        "--hidden",
        "32",
        "--folds",
        "3",
        "--members",
        "3",
        "-o",
        "density.safetensors",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for word in ("MAE", "RMSE", "R2", "Spearman", "within 1 sigma", "--reward property:density.safetensors"):
        assert word in result.output
    assert (tmp_path / "density.png").stat().st_size > 5000
    written = (tmp_path / "density.md").read_text()
    assert "no formula is on both sides" in written
    assert "| unseen | formula | prototype | cluster |" in written
    assert "| unseen | formula | prototype | cluster |" in result.output
    crystals = cfrl.load_dataset("prototypes")
    crystals = crystals[(crystals.num_atoms <= 12) & (crystals.species.amax(1) <= 83)][:80]
    terms = cfrl.build_reward("'property:density.safetensors' - density")(crystals).terms
    assert spearmanr(terms["property:density.safetensors"], terms["density"]).statistic > 0.95


def test_files_at_fault(table: Path, tmp_path: Path) -> None:
    from cfrl.config import PredictorConfig

    def fails(message: str, data: Path = table, **settings) -> None:
        with pytest.raises(UserError) as caught:
            run_train([str(data)], tmp_path / "p.safetensors", PredictorConfig(**settings))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "p.safetensors").exists()

    fails("no column 'densty'; did you mean 'density'?", target="densty")
    fails("holds words, not numbers", target="words")
    fails("zero of id-0 is -5, which has no logarithm", target="zero", log=True)
    short = tmp_path / "short.csv"
    with table.open(newline="") as source, short.open("w", newline="") as sink:
        csv.writer(sink).writerows([row for _, row in zip(range(10), csv.reader(source), strict=False)])
    fails("9 crystals have a value of 'density'; 50 are needed", data=short, target="density")


def test_files_that_are_no_predictor(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "words.safetensors").write_text("not at all")
    save_file({"a": np.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("words", "other"):
        with pytest.raises(UserError, match=f"{name}.safetensors: not a predictor"):
            load_predictor(str(tmp_path / f"{name}.safetensors"))

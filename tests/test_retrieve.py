"""Retrieval: ratios against closed forms, rankings against brute force, labels that are never seen, and the command."""

import csv
import json
import math
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console

from cfrl.commands.retrieve import retrieve
from cfrl.config import FinetuneConfig, RetrieveConfig, read_run_config
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import read_crystals, write_crystals
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import draw
from cfrl.model.files import Extras, load_model, save_model
from cfrl.model.sampler import sample
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.screening.ranking import composition_neighbours, expected_hits, is_good, rank_correlation, rate_ranking
from cfrl.screening.retrieval import Meetings, discovery_curve, log_ratios, meet, rank
from cfrl.settings import to_toml
from tests.tiny import SIZES, tuned_run

COPPER = 29  # its logit is no other distribution's: letters and coordinates use the first 28 outputs of the head


@pytest.fixture(scope="module")
def prototypes() -> CrystalBatch:
    return load_dataset("prototypes")


@pytest.fixture(scope="module")
def models() -> tuple[CrystalTransformer, CrystalTransformer]:
    """A model and the same one disturbed."""
    torch.manual_seed(0)
    base, tuned = (CrystalTransformer(SIZES).eval().requires_grad_(False) for _ in range(2))
    tuned.load_state_dict(base.state_dict())
    for parameter in tuned.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return tuned, base


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tuned_run(tmp_path_factory.mktemp("tuned"))


def labelled(path, prototypes, seed=0, name="density"):
    """The prototypes with a made-up column, as a dataset."""
    values = np.random.default_rng(seed).normal(size=len(prototypes))
    write_crystals(path, prototypes, columns={name: values})
    return str(path)


# ---- by likelihood


def test_ratio_is_reward_over_beta_minus_log_z_at_the_known_optimum(prototypes):
    """Elements drawn without regard to what came before: tilting copper by d is the optimum of reward/beta = d n_Cu,
    and each site contributes -log Z = -log(1 + p_Cu (e^d - 1))."""
    torch.manual_seed(1)
    base, tuned = (CrystalTransformer(SIZES).eval().requires_grad_(False) for _ in range(2))
    base.head.weight[28:119] = 0
    base.head.weight[:28] = 0
    tuned.load_state_dict(base.state_dict())
    d = 1.7
    tuned.head.bias[COPPER] += d
    crystals = prototypes[prototypes.num_sites < SIZES.max_sites]
    copper = (crystals.species == COPPER).sum(1).double()
    assert copper.max() >= 2
    share = base.head.bias[1:119].double().softmax(0)[COPPER - 1]
    expected = d * copper - crystals.num_sites * math.log(1 + share * (math.exp(d) - 1))
    columns = log_ratios(tuned, base, crystals)
    assert columns["log_ratio"] == pytest.approx(expected.numpy(), abs=1e-4)
    assert columns["log_ratio/lattice"] == pytest.approx(0, abs=1e-5)


def test_mean_of_exp_ratio_over_the_base_model_is_one(models):
    """E_base[P_tuned / P_base] = 1: the ratio is that of two normalised distributions, densities included."""
    tuned, base = models
    torch.manual_seed(3)
    weight = np.exp(log_ratios(tuned, base, draw(base, torch.randint(1, 231, (1500,))))["log_ratio"])
    assert abs(weight.mean() - 1) < 4 * weight.std() / math.sqrt(len(weight))
    assert weight.std() > 0.1  # else the two models are too much alike for the test to mean anything


def test_columns_agree_with_each_other(models, prototypes):
    tuned, base = models
    tuned.space_group_log_prob[221] += 0.5
    columns = log_ratios(tuned, base, prototypes)
    tuned.space_group_log_prob[221] -= 0.5
    fits = prototypes.num_sites.numpy() < SIZES.max_sites
    assert (~fits).any()
    assert np.isnan(columns["log_ratio"][~fits]).all()
    c = {name: values[fits] for name, values in columns.items()}
    assert c["log_ratio"] == pytest.approx(sum(c[f"log_ratio/{name}"] for name in FACTORS))
    assert c["log_ratio"] == pytest.approx(c["log_prob"] - c["log_prob_base"])
    assert c["log_ratio_per_site"] * prototypes.num_sites.numpy()[fits] == pytest.approx(c["log_ratio"])
    in_group = prototypes.space_group.numpy()[fits] == 221
    assert c["log_ratio_joint"] - c["log_ratio"] == pytest.approx(0.5 * in_group, abs=1e-6)


@pytest.mark.parametrize("by", ["crystal", "site"])
def test_ranking_does_not_depend_on_how_the_dataset_is_cut(models, prototypes, by):
    whole, best = rank(*models, [prototypes], top=20, by=by)
    cut, best_cut = rank(*models, (prototypes[i : i + 37] for i in range(0, len(prototypes), 37)), top=20, by=by)
    assert (whole["rank"] == cut["rank"]).all()
    assert best.ids == best_cut.ids
    scores = whole["log_ratio" if by == "crystal" else "log_ratio_per_site"]
    order = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), kind="stable")
    assert best.ids == [prototypes.ids[row] for row in order[:20]]
    assert (whole["rank"][np.isnan(scores)] == 0).all()


def test_crystals_stream_by_and_are_not_kept(models, prototypes):
    handed_out = []

    def batches():
        for _ in range(20):
            batch = prototypes[:10]
            handed_out.append(weakref.ref(batch))
            yield batch
            assert sum(reference() is not None for reference in handed_out) <= 2

    columns, best = rank(*models, batches(), top=5)
    assert len(columns["id"]) == 200
    assert len(best) == 5


def test_an_empty_dataset_is_an_error(models):
    with pytest.raises(UserError, match="no crystals"):
        rank(*models, [])


# ---- by sampling


def test_samples_that_are_in_the_dataset_are_met(prototypes):
    one, two = prototypes[3], prototypes[100]
    meetings = meet(
        CrystalBatch.cat([one, two, one]), CrystalBatch.cat([two]), (prototypes[i : i + 50] for i in range(0, 288, 50))
    )
    assert meetings.tuned.tolist() == [3, 100, 3]
    assert meetings.base.tolist() == [100]
    counts = meetings.counts()
    assert counts["row"].tolist() == [3, 100]
    assert counts["tuned"].tolist() == [2, 1]
    assert counts["base"].tolist() == [0, 1]


def test_a_material_that_is_not_in_the_dataset_is_not_met(prototypes):
    assert meet(prototypes[:5], prototypes[:1], [prototypes[5:10]]).base.tolist() == [-1]


def test_the_same_letters_are_not_yet_the_same_crystal(prototypes):
    """Pyrite with its sulphur moved to 1/4 has the same formula, group and letters; the bonds differ."""
    row = next(i for i, p in enumerate(prototypes) if p.space_group == 205 and p.num_sites == 2)
    other = replace(prototypes[row], frac_coords=prototypes[row].frac_coords.clone())
    sulphur = int(other.frac_coords[0, :, 0].argmax())
    other.frac_coords[0, sulphur] = 0.25
    assert meet(prototypes[row], other, [prototypes]).tuned.tolist() == [row]
    assert meet(prototypes[row], other, [prototypes]).base.tolist() == [-1]


def test_atoms_on_top_of_each_other_meet_nothing(prototypes):
    squeezed = replace(prototypes[3], lattice=prototypes[3].lattice * torch.tensor([0.1, 0.1, 0.1, 1, 1, 1]))
    assert meet(squeezed, prototypes[3], [prototypes]).tuned.tolist() == [-1]


def test_a_crystal_is_met_in_another_setting_of_its_origin(prototypes):
    """Rock salt with its two sites exchanged: letters a and b of group 225 change places."""
    row = next(i for i, p in enumerate(prototypes) if p.space_group == 225 and p.wyckoff[0, :3].tolist() == [1, 2, 0])
    salt = prototypes[row]
    moved = CrystalBatch(salt.space_group, salt.wyckoff, salt.species.clone(), salt.frac_coords, salt.lattice)
    moved.species[0, :2] = salt.species[0, :2].flip(0)
    assert meet(moved, moved, [prototypes]).tuned.tolist() == [row]


def test_discovery_curve_counts_distinct_materials():
    rows = np.random.default_rng(0).integers(-1, 12, 60)
    expected = [len(set(rows[: i + 1].tolist()) - {-1}) for i in range(len(rows))]
    assert discovery_curve(rows).tolist() == expected
    assert discovery_curve(np.full(4, -1)).tolist() == [0, 0, 0, 0]


def test_nothing_met_is_no_fault():
    counts = Meetings(np.full(3, -1), np.full(3, -1)).counts()
    assert all(len(values) == 0 for values in counts.values())


# ---- is it right?


def test_area_under_the_curve_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(1)
    scores, good = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[good] for b in scores[~good]]
    assert rate_ranking("", scores, good).auc == pytest.approx(np.mean(pairs))


def test_ties_count_as_if_in_random_order():
    rng = np.random.default_rng(2)
    scores, good = rng.integers(0, 4, 30).astype(float), rng.random(30) < 0.4
    shuffled = []
    for _ in range(4000):
        order = rng.permutation(30)
        shuffled.append(np.cumsum(good[order][np.argsort(-scores[order], kind="stable")]))
    assert expected_hits(scores, good) == pytest.approx(np.mean(shuffled, 0), abs=0.06)


def test_perfect_and_random_rankings():
    label = np.arange(1000.0)
    good = is_good(label)
    assert good.sum() == 50
    perfect, random = rate_ranking("perfect", label, good), rate_ranking("random", np.zeros(1000), good)
    assert perfect.enrichment[10] == pytest.approx(20)
    assert perfect.precision[100] == pytest.approx(0.5)
    assert perfect.auc == 1
    assert list(random.enrichment.values()) == pytest.approx([1] * len(random.enrichment))
    assert random.auc == 0.5
    unknown = np.where(good, np.nan, label)
    assert rate_ranking("", unknown, good).precision[500] == 0  # what could not be scored comes last


def test_composition_neighbours_against_a_loop():
    rng = np.random.default_rng(3)
    x, y = rng.random((40, 119)), rng.random(40)
    distance = np.linalg.norm(x[:, None] - x, axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1)[:, :5]
    assert composition_neighbours(x, x, y) == pytest.approx(y[nearest].mean(1), abs=1e-6)
    seeds = x[:7] + 0.01
    expected = -np.sort(np.linalg.norm(x[:, None] - seeds, axis=-1), axis=1)[:, :5].mean(1)
    assert composition_neighbours(x, seeds, None) == pytest.approx(expected, abs=1e-3)


def test_a_crystals_own_label_is_not_seen_by_the_neighbours():
    x = np.random.default_rng(4).random((20, 119))
    y = np.zeros(20)
    y[5] = 100
    assert composition_neighbours(x, x, y)[5] == 0


def test_correlation_within_groups_sees_through_their_constants():
    """ratio = reward / beta - log Z(G): perfect within the groups, spoilt between them."""
    rng = np.random.default_rng(5)
    reward, group = rng.normal(size=300), rng.integers(1, 4, 300)
    ratio = 3 * reward - 50.0 * group
    found = rank_correlation(ratio, reward, group)
    assert found["within"] == pytest.approx(1)
    assert abs(found["all"]) < 0.6
    ratio[:10] = np.nan
    assert rank_correlation(ratio, reward, group)["crystals"] == 290
    assert math.isnan(rank_correlation(ratio[:10], reward[:10], group[:10])["all"])


# ---- the command


def test_defaults_take_the_newest_run_its_base_and_the_bases_dataset(run, tmp_path, prototypes):
    text = StringIO()
    config = RetrieveConfig(samples=20, reward_crystals=40, device="cpu")
    made = retrieve(config, Console(file=text, width=200), root=run.path.parent)
    assert made.finished
    result = json.loads((made.path / "retrieval.json").read_text())
    assert result["tuned"] == str(run.path)
    assert result["base"].endswith("base.safetensors")
    assert result["dataset"] == "prototypes"
    assert result["crystals"] == len(prototypes)
    assert result["scored"] == int((prototypes.num_sites < SIZES.max_sites).sum())
    assert result["correlation"]["crystals"] == 40
    assert result["sampling"]["draws"] == 20
    with h5py.File(made.path / "ranking.h5") as file:
        by = result["ranked_by"]
        told, place, ids = file[by][:], file["rank"][:], file["id"].asstr()[:]
        assert {"critic", "implied_reward", "log_ratio"} <= set(file)
    with open(made.path / "retrieved.csv") as file:
        rows = list(csv.DictReader(file))
    assert by == "critic"
    assert len(rows) == 100
    assert all(float(a[by]) >= float(b[by]) for a, b in pairwise(rows))
    assert rows[0]["id"] == ids[place == 1][0]
    assert float(rows[0][by]) == pytest.approx(np.nanmax(told), rel=1e-5)
    best = read_crystals(made.path / "retrieved.h5")
    assert best.ids == [row["id"] for row in rows]
    assert best.formulas() == [row["formula"] for row in rows]
    assert "newest fine-tuning run" in text.getvalue()
    assert rows[0]["id"] in text.getvalue()


def tuned_with(run, folder, **settings):
    """A copy of a run, as if it had been made with these settings."""
    copy = Path(shutil.copytree(run.path, folder / run.path.name))
    config = replace(read_run_config(FinetuneConfig, copy / "config.toml"), **settings)
    (copy / "config.toml").write_text(to_toml({"finetune": config}))
    return copy


def test_ratios_and_draws_are_those_of_the_runs_own_sampler(run, tmp_path, prototypes, monkeypatch):
    folder = tuned_with(
        run, tmp_path, elements="Na,Cl,O,Ti,Mg", max_atoms=24, temperature=0.7, top_p=0.999, space_group="225,1,2"
    )
    options = SamplerOptions(0.7, 0.999, (8, 11, 12, 17, 22), 24)
    drawn = []
    monkeypatch.setattr("cfrl.commands.retrieve.sample", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    made = retrieve(
        RetrieveConfig(run=str(folder), dataset="prototypes", samples=300, reward_crystals=0, top=5, device="cpu"),
        root=tmp_path / "runs",
    )
    tuned, base = load_model(folder), load_model(run.path.parents[1] / "base.safetensors")
    with h5py.File(made.path / "ranking.h5") as file:
        columns = {name: file[name][:] for name in ("log_prob", "log_prob_base", "log_ratio", "rank")}
    fits = prototypes[prototypes.num_sites < SIZES.max_sites]
    with torch.no_grad():
        new = sum(x.double() for x in tuned.log_prob(fits, options).values()).numpy()
        old = sum(x.double() for x in base.log_prob(fits, replace(options, top_p=1.0)).values()).numpy()
    possible = (new > -1e9) & (old > -1e9)
    allowed = torch.tensor([0, *options.elements])
    assert all(torch.isin(fits.species, allowed).all(1).numpy()[possible])
    assert (columns["rank"] > 0).sum() == possible.sum() > 0
    ranked = columns["rank"] > 0
    assert columns["log_prob"][ranked] == pytest.approx(new[possible], abs=1e-6)
    assert columns["log_ratio"][ranked] == pytest.approx((new - old)[possible], abs=1e-6)
    for crystals in drawn:
        assert torch.isin(crystals.species, allowed).all()
        assert crystals.num_atoms.max() <= 24
        assert set(crystals.space_group.tolist()) <= {225, 1, 2}


@pytest.mark.parametrize("learned", [False, True])
def test_draws_and_joint_ratio_use_the_runs_own_shares(run, tmp_path, learned, monkeypatch):
    """A run that began from all space groups alike; where it tuned the shares, the model file holds them."""
    folder = tuned_with(run, tmp_path, space_group="uniform", learn_space_groups=learned)
    tuned, base = load_model(folder), load_model(run.path.parents[1] / "base.safetensors")
    base.space_group_log_prob.copy_(torch.full((231,), -torch.inf).index_fill(0, torch.tensor([225, 221]), 0.0))
    base.space_group_log_prob[[225, 221]] = torch.tensor([0.99, 0.01]).log()
    tuned.space_group_log_prob.copy_(base.space_group_log_prob)
    if learned:
        tuned.space_group_log_prob[[225, 221]] = torch.tensor([0.2, 0.8]).log()
    save_model(base, tmp_path / "base.safetensors")
    save_model(tuned, folder / "model.safetensors")
    drawn = []
    monkeypatch.setattr("cfrl.commands.retrieve.sample", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    config = RetrieveConfig(run=str(folder), base=str(tmp_path / "base.safetensors"), dataset="prototypes")
    made = retrieve(replace(config, samples=400, reward_crystals=0, device="cpu"), root=tmp_path / "runs")
    share = [float((crystals.space_group == 221).double().mean()) for crystals in drawn]
    assert share == pytest.approx([0.8 if learned else 0.5, 0.5], abs=0.1)
    with h5py.File(made.path / "ranking.h5") as file:
        gain, group = file["log_ratio_joint"][:] - file["log_ratio"][:], file["space_group"][:]
    known = np.isfinite(gain)
    assert set(group[known]) == {221, 225}
    assert gain[known & (group == 221)] == pytest.approx(math.log(0.8 / 0.5) if learned else 0, abs=1e-5)


def test_a_base_that_is_another_network_by_now_is_told(run, tmp_path):
    """The embedded `default` was one of another size when the run was made."""
    folder = tuned_with(run, tmp_path)
    save_model(load_model(run.path), folder / "model.safetensors", Extras({"base_model": "default"}))
    config = RetrieveConfig(run=str(folder), dataset="prototypes", samples=0, reward_crystals=0, device="cpu")
    with pytest.raises(UserError, match="tuned from 'default', which is another network here: give --base"):
        retrieve(config, root=tmp_path / "runs")


def test_a_run_that_can_draw_none_of_the_dataset_is_told_so(run, tmp_path):
    folder = tuned_with(run, tmp_path, elements="Og")
    config = RetrieveConfig(run=str(folder), dataset="prototypes", samples=0, reward_crystals=0, device="cpu")
    with pytest.raises(UserError, match="none of the dataset's 286 crystals can be drawn"):
        retrieve(config, root=tmp_path / "runs")


def test_labels_change_the_verdict_and_nothing_else(run, tmp_path, prototypes):
    paths = [labelled(tmp_path / f"{seed}.h5", prototypes, seed) for seed in (0, 1)]
    made = [
        retrieve(
            RetrieveConfig(run=str(run.path), dataset=path, samples=0, reward_crystals=60, device="cpu"),
            root=tmp_path / "runs",
        )
        for path in paths
    ]
    results = [json.loads((folder.path / "retrieval.json").read_text()) for folder in made]
    assert [result["property"] for result in results] == [
        "density",
        "density",
    ]  # the column that the reward is named as
    tables = []
    for folder in made:
        with open(folder.path / "retrieved.csv") as file:
            tables.append([(row["id"], row["log_ratio"]) for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    verdicts = [{v["name"]: v for v in result["verdicts"]} for result in results]
    assert verdicts[0]["likelihood ratio"] != verdicts[1]["likelihood ratio"]
    names = {"likelihood ratio", "random", "base model's likelihood", "composition near best rollouts"}
    assert names | {"composition neighbours' labels", "reward model (the same part)"} <= set(verdicts[0])


@pytest.mark.parametrize("critical", [True, False])
def test_a_property_is_not_mistaken_for_a_ranking_of_its_name(run, tmp_path, prototypes, critical):
    """What an earlier retrieval has written is such a dataset; a model without a critic is not judged by its column."""
    folder = tuned_with(run, tmp_path)
    if not critical:
        save_model(load_model(folder), folder / "model.safetensors")
    values = np.random.default_rng(0).normal(size=len(prototypes))
    write_crystals(
        tmp_path / "d.h5", prototypes, columns={"critic": values, "dataset_critic": -values, "sites": values}
    )
    config = RetrieveConfig(run=str(folder), dataset=str(tmp_path / "d.h5"), samples=0, reward_crystals=0, device="cpu")
    made = retrieve(replace(config, property="critic"), root=tmp_path / "runs")
    with h5py.File(made.path / "ranking.h5") as file:
        assert file["dataset_critic"][:] == pytest.approx(values)
        assert file["dataset_dataset_critic"][:] == pytest.approx(-values)
        assert file["dataset_sites"][:] == pytest.approx(values)
        assert (file["sites"][:] == prototypes.num_sites.numpy()).all()
        assert ("critic" in file) == critical
    result = json.loads((made.path / "retrieval.json").read_text())
    names = {verdict["name"] for verdict in result["verdicts"]}
    assert names >= {"likelihood ratio", "random"}
    assert ("critic of the tuning" in names) == critical
    assert result["property"] == "dataset_critic"
    assert ("critic" in read_crystals(made.path / "retrieved.h5").properties) == critical


def test_a_true_label_is_found_by_the_reward_itself(run, tmp_path, prototypes):
    """The label is the density, and so is the reward: ranking by it must be perfect, and low is good with a minus."""
    write_crystals(tmp_path / "true.h5", prototypes, columns={"rho": prototypes.densities().double().numpy()})
    settings = dict(run=str(run.path), dataset=str(tmp_path / "true.h5"), samples=0, reward_crystals=1000, device="cpu")
    for name, auc in (("rho", 1.0), ("-rho", 0.0)):
        made = retrieve(RetrieveConfig(property=name, **settings), root=tmp_path / "runs")
        verdicts = {v["name"]: v for v in json.loads((made.path / "retrieval.json").read_text())["verdicts"]}
        assert verdicts["reward model"]["auc"] == pytest.approx(auc, abs=0.02)


def test_any_structure_file_is_a_dataset(run, tmp_path, prototypes):
    for name, structure in zip("ab", prototypes[:2].to_structures(), strict=True):
        structure.to(str(tmp_path / f"{name}.cif"))
    config = RetrieveConfig(run=str(run.path), dataset=str(tmp_path), samples=0, reward_crystals=0, device="cpu")
    made = retrieve(config, root=tmp_path / "runs")
    assert sorted(read_crystals(made.path / "retrieved.h5").formulas()) == sorted(prototypes[:2].formulas())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"property": "band_gapp"}, "did you mean 'band_gap'"),
        ({"rank": "best"}, "none of critic, reward, crystal, site, joint"),
        ({"run": "nowhere"}, "no such model"),
        ({"dataset": "nothing.h5"}, "no such file"),
        ({"top": 0}, "at least 1"),
        ({"split": "training"}, "none of train, validation, test"),
    ],
)
def test_bad_settings_are_named(run, tmp_path, prototypes, settings, message):
    dataset = labelled(tmp_path / "d.h5", prototypes, name="band_gap")
    settings = {"run": str(run.path), "dataset": dataset, "samples": 0, "device": "cpu", **settings}
    with pytest.raises(UserError, match=message):
        retrieve(RetrieveConfig(**settings), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_without_a_run_the_command_says_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "cfrl.cli", "retrieve"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "cfrl finetune" in done.stderr
    assert "Traceback" not in done.stderr

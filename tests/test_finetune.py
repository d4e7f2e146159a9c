"""The fine-tuning loop: theory on a reward known in closed form, faults, interruptions, and a real potential."""

import math
import os
import signal
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from cfrl.commands import finetune as command
from cfrl.commands.finetune import finetune, start
from cfrl.config import FinetuneConfig, read_run_config
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.refusal import REFUSED
from cfrl.errors import NotFinite, UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import read_columns, read_crystals, write_crystals
from cfrl.model.files import load_extras, load_model
from cfrl.model.sampler import SamplerOptions, sample, space_group_prior
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.reports import monitor
from cfrl.rewards import RewardContext, build_reward, register_reward, registry
from cfrl.rewards.scoring import crystal_keys
from cfrl.rewards.stability import BEST, WORST
from cfrl.rl import loop as module
from cfrl.rl import rollouts
from cfrl.rl.loop import begin, robust_std
from cfrl.rl.options import TuningOptions
from cfrl.rl.policy import Baseline
from cfrl.rl.rollouts import INVALID, Kept, Memory, Rollout, collect
from cfrl.rl.sources import FreshCrystals
from cfrl.rl.tuning import SpaceGroupPrior, Tuning
from cfrl.runs.folder import RunFolder
from tests.tiny import SIZES, trained_model, unchecked

ROOT = Path(__file__).parents[1]

QUICK = dict(steps=3, n=24, batch_size=8, evaluate=0, plots=False, device="cpu", lr=3e-3)
QUICK |= dict(min_distance=0.0, max_atoms=16, scale_crystals=24)
FREE = dict(hold=None, factors=",".join(FACTORS))  # all that can move may move
QUICK |= FREE | dict(algorithm="ppo", epochs=2, beta=0.1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return str(trained_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


def scored(values: torch.Tensor, name: str = "toy", status: list[str] | None = None) -> SimpleNamespace:
    values = values.double().numpy()
    return SimpleNamespace(total=values, terms={name: values}, status=status or [""] * len(values))


def first_is_oxygen(crystals: CrystalBatch) -> SimpleNamespace:
    return scored(crystals.species[:, 0] == 8, "oxygen")


def tune(tiny_model, tmp_path, scorer=first_is_oxygen, resume=None, any_lr=None, **changes) -> RunFolder:
    config = FinetuneConfig(**{"model": tiny_model, "reward": "toy", **QUICK, **changes})
    config = unchecked(config, lr=any_lr) if any_lr else config
    return finetune(config, reward=scorer, root=tmp_path, resume=resume, quiet=True)


# ---- theory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("algorithm", "kl"), [("ppo", "reward"), ("rloo", "loss"), ("vargrad", "reward")])
def test_oxygen_reward_reaches_what_theory_says(tiny_model, tmp_path, algorithm, kl):
    """For a yes/no reward the optimum is p* = p0 e^(1/beta) / (p0 e^(1/beta) + 1 - p0), and so is its KL."""
    beta, elements = 0.5, "O,Mg,Si,Ti,Ba,S,Fe,Al"
    wanted = dict(space_group="225", elements=elements, max_atoms=8)
    base = sample(load_model(tiny_model), 3000, space_group=225, elements=elements.split(","), max_atoms=8, seed=1,
                  keep_invalid=True, min_distance=0.0)  # fmt: skip
    p0 = float((base.species[:, 0] == 8).double().mean())
    odds = p0 / (1 - p0) * math.exp(1 / beta)
    expected = odds / (1 + odds)
    expected_kl = expected * math.log(expected / p0) + (1 - expected) * math.log((1 - expected) / (1 - p0))
    assert expected - p0 > 0.25

    run = tune(tiny_model, tmp_path, algorithm=algorithm, kl=kl, beta=beta, standardize=False, diversity=0, penalty="0",
               steps=40, n=192, batch_size=96, epochs=2, lr=2e-3, clip_advantage=0, **wanted)  # fmt: skip
    metrics = run.metrics()
    tuned = np.mean(metrics["reward/mean"][-10:])
    kl_found = np.mean(metrics["kl"][-10:])
    assert abs(tuned - expected) < 0.06
    assert expected_kl - 0.1 < kl_found < expected_kl + 0.5  # never less than the reward costs, and little wasted
    assert all(0.5 < ratio < 2 for ratio in metrics["ratio"])
    fresh = sample(load_model(run.path), 1000, space_group=225, elements=elements.split(","), max_atoms=8, seed=2,
                   keep_invalid=True)  # fmt: skip
    assert abs(float((fresh.species[:, 0] == 8).double().mean()) - expected) < 0.08


def test_ratio_starts_at_one_although_the_model_has_dropout(tiny_model, tmp_path):
    assert load_model(tiny_model).config.dropout == 0.5
    options = dict(temperature=0.8, top_p=0.95, elements="O,Mg,Ti,Si,S")
    run = tune(tiny_model, tmp_path, steps=1, epochs=1, batch_size=24, micro_batch=10, **options)
    metrics = {name: values[0] for name, values in run.metrics().items()}
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics["step_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    plain = tune(tiny_model, tmp_path, steps=1)
    assert plain.metrics()["kl"][0] == pytest.approx(0, abs=1e-6)  # the policy is the starting model
    several = tune(tiny_model, tmp_path, steps=1, epochs=3, elements="O,Mg")  # both occur, so there is a gradient
    assert abs(several.metrics()["ratio"][0] - 1) > 1e-4


def test_a_step_ends_where_the_policy_has_gone_far_enough(tiny_model, tmp_path):
    """The first batch is always learned from: there the policy is still its start."""
    settings = dict(steps=1, epochs=4, batch_size=8, warmup=0, lr=0.02, elements="O,Mg,Ti,Si")
    free = tune(tiny_model, tmp_path, max_step_kl=0, **settings).metrics()
    bound = tune(tiny_model, tmp_path, max_step_kl=0.02, **settings).metrics()
    assert free["epochs"] == [4]
    assert bound["epochs"][0] in (1 / 3, 2 / 3, 1)
    assert 0 < bound["step_kl"][0] < free["step_kl"][0]
    assert bound["clip_fraction"][0] < free["clip_fraction"][0]
    once = load_model(tune(tiny_model, tmp_path, max_step_kl=1e-12, **settings).path).state_dict()
    short = load_model(tune(tiny_model, tmp_path, max_step_kl=1e-12, **settings | {"epochs": 1}).path).state_dict()
    assert all(torch.equal(once[name], short[name]) for name in once)


def test_a_nucleus_is_frozen_for_a_step(tiny_model, tmp_path):
    """Else what the new policy's own nucleus leaves out has a ratio of 0, and weights become NaN."""
    sampler = dict(top_p=0.6, elements="O,Mg,Ti,Si")
    settings = sampler | dict(steps=3, epochs=4, batch_size=8, lr=0.002, warmup=0, max_step_kl=0)
    run = tune(tiny_model, tmp_path, replay=8, **settings)
    metrics = run.metrics()
    assert all(1e-6 < kl < 100 for kl in metrics["step_kl"]), metrics["step_kl"]
    assert all(0.01 < ratio < 100 for ratio in metrics["ratio"]), metrics["ratio"]
    assert all(math.isfinite(v) for name in ("loss", "kl", "gradient_norm") for v in metrics[name])
    assert metrics["kl"][0] > 0.1  # cut to its nucleus the starting model is not the starting model
    assert all(torch.isfinite(p).all() for p in load_model(run.path).parameters())


@pytest.mark.parametrize("batch_size", [8, 24], ids=["three updates", "one update"])
def test_weights_that_run_away_stop_the_run_and_are_not_saved(tiny_model, tmp_path, batch_size):
    good = tune(tiny_model, tmp_path, steps=2)
    before = (good.path / "model.safetensors").read_bytes()
    with pytest.raises(NotFinite, match=r"is (nan|-?inf) \(in step 3; .* holds 2 steps.*lower --lr than 1e\+30"):
        tune(tiny_model, tmp_path, steps=5, resume=good.path, any_lr=1e30, batch_size=batch_size, epochs=1,
             checkpoint_minutes=0)  # fmt: skip
    assert (good.path / "model.safetensors").read_bytes() == before
    assert good.load_checkpoint()["step"] == 2
    again = tune(tiny_model, tmp_path, steps=3, resume=good.path)
    assert again.metrics()["step"] == [1, 2, 3]


def test_what_a_crystal_counts_for(tiny_model):
    """Reward in standard deviations, minus beta KL, plus each factor's entropy bonus; no advantage beyond its limit."""
    config = FinetuneConfig(model=tiny_model, device="cpu", kl="reward", beta=0.5, entropy_species=0.2,
                            entropy_lattice=0.1, clip_advantage=1.5, **FREE)  # fmt: skip
    tuning = start(config)
    tuning.scale = 2.0
    rng = torch.Generator().manual_seed(0)
    old, base = -3 * torch.rand(2, 24, 5, generator=rng, dtype=torch.float64)
    crystals = crystals_of(24)
    crystals.properties = {}
    earned = torch.randn(24, generator=rng, dtype=torch.float64)
    earned[0] = 1e6
    batch = module._prepare(tuning, crystals, earned, old, base, {}, Kept.none(), torch.ones(24, dtype=torch.bool), rng)
    score = earned / 2 - 0.5 * (old - base).sum(1) - 0.2 * old[:, 1] - 0.1 * old[:, 3]
    torch.testing.assert_close(batch.advantage, (score - score.mean()).clamp(-1.5, 1.5))
    assert tuning.baseline.mean == pytest.approx(float(score.mean()))
    tuning.baseline = Baseline(0.9)
    tuning.baseline.mean = 0.3
    batch = module._prepare(tuning, crystals, earned, old, base, {}, Kept.none(), torch.ones(24, dtype=torch.bool), rng)
    torch.testing.assert_close(batch.advantage, (score - 0.3).clamp(-1.5, 1.5))
    assert batch.advantage[0] == 1.5
    assert batch.advantage.abs().min() < 1
    assert tuning.baseline.mean == pytest.approx(0.9 * 0.3 + 0.1 * float(score.mean()))  # known from now on


def test_rollouts_hold_the_likelihood_of_what_was_drawn(tiny_model, tmp_path):
    """Sites stay in the order drawn, and log P is that of the sampler with its temperature and masks."""
    run = tune(tiny_model, tmp_path, steps=1, temperature=0.7, elements="O,Mg,Ti")
    crystals = read_crystals(run.path / "rollouts.h5")
    options = SamplerOptions(temperature=0.7, elements=(8, 12, 22), max_atoms=16)
    with torch.no_grad():
        scores = load_model(tiny_model).log_prob(crystals, options)
    expected = sum(scores[name].double() for name in FACTORS)
    torch.testing.assert_close(crystals.properties["log_prob"], expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(crystals.properties["log_prob_base"], expected, atol=1e-4, rtol=1e-5)
    assert set(crystals.properties) >= {"step", "reward", "oxygen", "valid", "log_prob", "log_prob_base"}
    assert set(read_columns(run.path / "rollouts.h5", ["status"])["status"]) <= {"", INVALID}


def test_gradient_accumulation_changes_nothing(tiny_model, tmp_path):
    weights = []
    for micro_batch in (24, 5):
        run = tune(tiny_model, tmp_path, steps=2, batch_size=24, micro_batch=micro_batch)
        weights.append(torch.cat([p.flatten() for p in load_model(run.path).parameters()]))
    start = torch.cat([p.flatten() for p in load_model(tiny_model).parameters()])
    moved = (weights[0] - start).abs().max()
    # Adam's first steps turn rounding into steps where a gradient is all but zero: compare most, not all.
    assert ((weights[0] - weights[1]).abs() < 0.01 * moved).double().mean() > 0.97


@pytest.mark.parametrize("algorithm", ["ppo", "vargrad"])
def test_learned_space_groups_rise_keep_their_floor_and_are_saved(tiny_model, tmp_path, algorithm):
    def is_cubic(crystals: CrystalBatch) -> SimpleNamespace:
        return scored(crystals.space_group >= 195)

    before = load_model(tiny_model).space_group_log_prob.exp()
    settings = dict(scorer=is_cubic, steps=12, n=64, batch_size=64, learn_space_groups=True, beta=0.05,
                    space_group_lr=0.2, space_group_floor=0.2, diversity=0, lr=1e-5, algorithm=algorithm)  # fmt: skip
    run = tune(tiny_model, tmp_path, **settings)
    after = load_model(run.path).space_group_log_prob.exp()
    assert float(after[195:].sum()) > float(before[195:].sum()) + 0.15
    assert float(after.sum()) == pytest.approx(1, abs=1e-5)
    assert (after >= 0.2 * before - 1e-6).all()
    assert (after[before == 0] == 0).all()
    metrics = run.metrics()
    assert metrics["effective_space_groups"][-1] < metrics["effective_space_groups"][0]
    assert metrics["kl/space_group"][-1] > 0.01
    fixed = tune(tiny_model, tmp_path, **settings | {"learn_space_groups": False, "steps": 2})
    torch.testing.assert_close(load_model(fixed.path).space_group_log_prob.exp(), before)


def test_starting_shares(tiny_model):
    model = load_model(tiny_model)
    seen = model.space_group_log_prob.isfinite()
    uniform = space_group_prior(model, "uniform")
    prior = SpaceGroupPrior(uniform, learn=True, floor=0.1)
    assert prior.effective() == pytest.approx(int(seen.sum()), rel=1e-5)
    torch.testing.assert_close(prior.log_prob().exp(), uniform.double().exp(), atol=1e-7, rtol=1e-6)


# ---- collapse ----------------------------------------------------------------------------------------------------


def crystals_of(n: int, seed: int = 0) -> CrystalBatch:
    torch.manual_seed(seed)
    return sample(CrystalTransformer(SIZES), n, space_group=[1, 62, 225], seed=seed, keep_invalid=True)


def test_diversity_filter_and_penalty():
    memory = Memory("25%", diversity=2, window=6, replay_size=0)
    crystals = crystals_of(5)
    reward, valid = torch.tensor([1.0, 2.0, 3.0, 4.0, math.nan]).double(), torch.ones(5, dtype=torch.bool)
    memory.add(
        Rollout(crystals, reward, valid, [""] * 4 + ["broken"], torch.zeros(5, dtype=torch.bool)), ["a"] * 4 + ["b"]
    )
    assert memory.penalty == 1.75  # 25th percentile of 1, 2, 3, 4
    earned = memory.earned(reward, ["a", "new", "a", "a", "b"])
    # "a" came four times, two are free: half of what is above the penalty; below the penalty nothing is gained.
    assert earned.tolist() == [1.0, 2.0, 1.75 + 0.5 * 1.25, 1.75 + 0.5 * 2.25, 1.75]
    again = Rollout(crystals, reward, valid, [""] * 4 + ["broken"], torch.zeros(5, dtype=torch.bool))
    memory.add(again, ["c", "d", "e", "f", "b"])  # 6 are looked back on: two "a" are left
    assert memory.earned(torch.tensor([4.0]), ["a"]).tolist() == [4.0]
    assert memory.seen == {"a", "c", "d", "e", "f"}  # "b" has no score
    fixed = Memory("-3", 0, 8, 0)
    assert fixed.earned(torch.tensor([math.nan, 7.0]), ["a", "b"]).tolist() == [-3.0, 7.0]
    assert Memory("5%", 0, 8, 0).penalty == 0  # nothing scored yet
    for bad in ("x", "150%", "nan", "%"):
        with pytest.raises(UserError, match="penalty"):
            Memory(bad, 0, 8, 0)


def test_replay_keeps_the_best_of_each_fingerprint():
    memory = Memory("5%", 0, 8, replay_size=4)
    for seed in range(3):
        crystals = crystals_of(12, seed)
        reward = torch.randn(12, generator=torch.Generator().manual_seed(seed)).double()
        reward[3] = math.nan
        rows = [*range(12), 0, 1]  # the same ones again
        rollout = Rollout(
            crystals[rows], reward[rows], torch.ones(14, dtype=torch.bool), [""] * 14, torch.zeros(14, dtype=torch.bool)
        )
        drawn = torch.full((14,), -float(seed)).double()
        memory.keep(rollout, drawn, drawn[:, None].expand(-1, 5), fingerprints(rollout.crystals))
    every = torch.cat([torch.randn(12, generator=torch.Generator().manual_seed(s)) for s in range(3)]).double()
    every[[3, 15, 27]] = -math.inf
    assert memory.kept.reward.tolist() == every.sort(descending=True).values[:4].tolist()
    chosen = memory.replay(10, torch.Generator().manual_seed(0))
    assert len(chosen) == len(set(chosen.keys)) == 4
    assert fingerprints(chosen.crystals) == chosen.keys
    drawn_in = {float(reward): seed for seed in range(3) for reward in every[12 * seed : 12 * seed + 12]}
    assert [-drawn_in[reward] for reward in chosen.reward.tolist()] == chosen.log_prob.tolist()
    assert torch.equal(chosen.base[:, 4], chosen.log_prob)

    other = Memory("5%", 0, 8, replay_size=4)
    other.load_state_dict(memory.state_dict())
    again = other.replay(10, torch.Generator().manual_seed(0))
    assert torch.equal(again.crystals.species, chosen.crystals.species)
    assert (again.keys, again.log_prob.tolist()) == (chosen.keys, chosen.log_prob.tolist())


def test_a_policy_that_repeats_itself_is_seen_in_the_metrics(tiny_model, tmp_path):
    """One element, one space group, one atom: `unique` and `new` fall, and the filter takes the reward away."""
    run = tune(tiny_model, tmp_path, steps=3, elements="O", space_group="225", max_atoms=4, diversity=3)
    metrics = run.metrics()
    assert metrics["unique"][0] <= 2 / 24
    assert metrics["new"][1] == 0
    assert metrics["chemical_systems"][0] == 1
    assert metrics["effective_space_groups"][0] == pytest.approx(1)


# ---- scoring -----------------------------------------------------------------------------------------------------


def test_lots_are_scored_in_order(tiny_model):
    model, groups, lots = load_model(tiny_model), torch.tensor([225] * 10 + [62] * 10), []

    def reward(crystals: CrystalBatch) -> SimpleNamespace:
        lots.append(len(crystals))
        return scored(crystals.species[:, 0])

    waiting = iter(groups.split(8))
    settings = dict(seed=3, chunk=8, min_distance=0.0)
    rollout = collect(model, lambda k: next(waiting), 20, SamplerOptions(), reward, **settings)
    assert len(lots) == 3
    assert torch.equal(rollout.crystals.space_group, groups)
    known = rollout.scored
    assert torch.equal(rollout.reward[known], rollout.crystals.species[known, 0].double())
    assert [reason == "" for reason in rollout.status] == known.tolist()
    assert set(rollout.seconds) == {"sample", "score"}


def test_drawing_and_scoring_do_not_wait_for_each_other(tiny_model, monkeypatch):
    """The first lot's score waits for the second lot, the third lot for that score: in turns neither would come."""
    drawn, scoring, draw = threading.Event(), threading.Event(), rollouts.draw
    draws, waits = [], []

    def watched_draw(*arguments):
        draws.append(1)
        if len(draws) == 3:
            waits.append(scoring.wait(60))
        crystals = draw(*arguments)
        if len(draws) == 2:
            drawn.set()
        return crystals

    def reward(crystals: CrystalBatch) -> SimpleNamespace:
        scoring.set()
        waits.append(drawn.wait(60))
        return first_is_oxygen(crystals)

    monkeypatch.setattr(rollouts, "draw", watched_draw)
    settings = dict(seed=3, chunk=8, min_distance=0.0)
    model = load_model(tiny_model)

    def cubic(k: int) -> torch.Tensor:
        return torch.full((k,), 225)

    together = collect(model, cubic, 24, SamplerOptions(), reward, **settings)
    assert waits == [True] * 4
    monkeypatch.undo()
    again = collect(model, cubic, 24, SamplerOptions(), first_is_oxygen, **settings)
    assert torch.equal(together.crystals.frac_coords, again.crystals.frac_coords)


def test_what_is_refused_is_drawn_anew_and_never_scored(tiny_model):
    """What is kept are exactly those of all the draws that are wanted, in their order."""
    settings = dict(seed=3, chunk=16, min_distance=0.0)
    model, seen = load_model(tiny_model), []

    def cubic(k: int) -> torch.Tensor:
        return torch.full((k,), 225)

    def light(crystals: CrystalBatch) -> np.ndarray:
        return (crystals.species[:, 0] <= 50).numpy()

    def reward(crystals: CrystalBatch) -> SimpleNamespace:
        seen.append(crystals)
        return first_is_oxygen(crystals)

    every = collect(model, cubic, 160, SamplerOptions(), first_is_oxygen, **settings)
    kept = collect(model, cubic, 40, SamplerOptions(), reward, wanted=light, **settings)
    rows = np.flatnonzero(light(every.crystals))[:40]
    assert len(rows) == len(kept) == 40
    assert torch.equal(kept.crystals.lattice, every.crystals[rows].lattice)
    assert all(light(crystals).all() for crystals in seen)
    drawn = 16 * (rows[-1] // 16 + 1)
    assert kept.refused == drawn - light(every.crystals)[:drawn].sum() > 0
    with pytest.raises(UserError, match="lift a guard"):
        collect(model, cubic, 1, SamplerOptions(), reward, wanted=lambda c: np.zeros(len(c), dtype=bool), **settings)


def test_crystals_without_a_score_earn_the_penalty_and_never_nan(tiny_model, tmp_path):
    def fragile(crystals: CrystalBatch) -> SimpleNamespace:
        value = crystals.num_atoms.double()
        value[crystals.num_sites > 1] = math.nan
        return scored(value, status=["" if v == v else "no reference for element Po" for v in value.tolist()])

    run = tune(tiny_model, tmp_path, scorer=fragile, steps=2, penalty="-7")
    columns = read_columns(run.path / "rollouts.h5")
    failed = columns["status"] != ""
    assert failed.any()
    assert (~failed).any()
    assert (columns["reward"][failed] == -7).all()
    assert np.isnan(columns["toy"][failed]).all()
    assert np.isfinite(columns["reward"]).all()
    metrics = run.metrics()
    assert all(math.isfinite(v) for name in ("reward/mean", "kl", "loss", "baseline") for v in metrics[name])


def test_nothing_can_be_scored(tiny_model, tmp_path):
    def hopeless(crystals: CrystalBatch) -> SimpleNamespace:
        return scored(torch.full((len(crystals),), math.nan), status=["no"] * len(crystals))

    run = tune(tiny_model, tmp_path, scorer=hopeless, steps=2, replay=4)
    assert run.metrics()["scored"] == [0, 0]
    assert all(torch.isfinite(p).all() for p in load_model(run.path).parameters())
    assert (read_columns(run.path / "rollouts.h5")["reward"] == 0).all()


def test_a_reward_that_fails_loses_nothing(tiny_model, tmp_path):
    calls = []

    def breaks(crystals: CrystalBatch) -> SimpleNamespace:
        calls.append(1)
        if len(calls) == 3:
            raise UserError("my_reward.py: returned strings")
        return first_is_oxygen(crystals)

    with pytest.raises(UserError, match=r"my_reward.py.*step 3"):
        tune(tiny_model, tmp_path, scorer=breaks, steps=5, standardize=False)
    (folder,) = tmp_path.iterdir()
    run = RunFolder.open(folder)
    assert run.load_checkpoint()["step"] == 2
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2}


def test_reward_metrics_have_stable_names(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=1)
    expected = {
        "reward/mean",
        "reward/median",
        "reward/oxygen",
        "kl",
        "clip_fraction",
        "ratio",
        "unique",
        "valid",
        "scored",
    }
    expected |= {f"entropy/{name}" for name in FACTORS} | {f"kl/{name}" for name in FACTORS}
    expected |= {f"seconds/{stage}" for stage in ("sample", "score", "likelihood", "update")}
    assert expected <= set(run.metrics())


# ---- the unit of the reward --------------------------------------------------------------------------------------


def test_standard_deviation_is_robust():
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, generator=rng).double() * 3
    assert robust_std(normal) == pytest.approx(3, rel=0.1)
    normal[:40] = 1e6  # a few absurd scores
    assert robust_std(normal) == pytest.approx(3, rel=0.1)
    assert robust_std(torch.tensor([0.0] * 99 + [1.0]).double()) == pytest.approx(0.0995, rel=0.01)  # nearly all equal
    assert robust_std(torch.tensor([2.0, 2.0, math.nan]).double()) == 1
    assert robust_std(torch.tensor([0.1, 0.1 + 1e-12, 0.1]).double()) == 1  # equal but for rounding
    assert robust_std(torch.tensor([math.nan]).double()) == 1


def heavy_tailed(n: int, rng: torch.Generator) -> torch.Tensor:
    """Like `dielectric_bandgap` of the embedded model: 86% earn nothing, the others 0.1 to 90."""
    value = torch.exp(torch.randn(n, generator=rng, dtype=torch.float64) + 2.2).clamp(max=90)
    return value * (torch.rand(n, generator=rng) > 0.86)


def test_standard_deviation_of_a_sparse_reward_is_no_lottery():
    rng = torch.Generator().manual_seed(1)
    found = np.array([robust_std(heavy_tailed(FinetuneConfig().scale_crystals, rng)) for _ in range(10)])
    assert np.abs(found / np.median(found) - 1).max() < 0.3


def test_the_unit_of_the_reward_is_that_of_the_starting_model_whatever_the_seed(tiny_model, tmp_path):
    """A reward that one crystal in ten earns; of a step's 24 crystals none may be among them, or five."""

    def rare(crystals: CrystalBatch) -> SimpleNamespace:
        return scored(40.0 * (crystals.species[:, 0] % 10 == 3))

    settings = dict(scorer=rare, steps=2, scale_crystals=400)
    scales = [tune(tiny_model, tmp_path, seed=seed, **settings).metrics()["scale"] for seed in range(3)]
    assert scales == [scales[0]] * 3
    base = sample(load_model(tiny_model), 2000, seed=5, max_atoms=16, keep_invalid=True)
    expected = float((40.0 * (base.species[:, 0] % 10 == 3)).std())
    assert expected > 0
    assert scales[0][0] == pytest.approx(expected, rel=0.3)
    assert tune(tiny_model, tmp_path, standardize=False).metrics()["scale"] == [1, 1, 1]


# ---- ends and interruptions --------------------------------------------------------------------------------------

EVERYTHING = dict(learn_space_groups=True, replay=6, target_kl=2.0, entropy_species=0.01, diversity=1, epochs=2)
EVERYTHING |= dict(draw_size=10)  # lots, scored while others are drawn


def same_run(one: RunFolder, other: RunFolder) -> None:
    first, second = load_model(one.path).state_dict(), load_model(other.path).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    metrics, others = one.metrics(), other.metrics()
    for name in metrics:
        if not name.startswith("seconds/"):
            np.testing.assert_array_equal(metrics[name], others[name], err_msg=name)
    a, b = (read_crystals(run.path / "rollouts.h5") for run in (one, other))
    assert torch.equal(a.frac_coords, b.frac_coords)
    assert torch.equal(a.properties["step"], b.properties["step"])
    assert torch.equal(a.properties["log_prob"], b.properties["log_prob"])


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "dpo", "rebel"])
def test_a_resumed_run_continues_exactly(tiny_model, tmp_path, algorithm):
    settings = dict(algorithm=algorithm, lr_final=1.0, **EVERYTHING)  # the rate falls to the end, wherever that is
    straight = tune(tiny_model, tmp_path / "straight", steps=6, **settings)
    half = tune(tiny_model, tmp_path / "half", steps=3, **settings)
    resumed = tune(tiny_model, tmp_path / "half", steps=6, resume=half.path, **settings)
    assert resumed.path == half.path
    same_run(straight, resumed)


def test_crystals_are_compared_within_groups_that_hold_several(tiny_model):
    """GRPO takes the mean of a space group off: of a group of one nothing is left. Shares stay those of the prior."""
    prior = SpaceGroupPrior(load_model(tiny_model).space_group_log_prob, learn=False, floor=0.0)
    groups = prior.sample(40_000, torch.Generator().manual_seed(0), repeats=8)
    assert (groups.view(-1, 8) == groups[::8, None]).all()
    shares = torch.bincount(groups[::8], minlength=231) / 5_000
    assert (shares - prior.base.exp()).abs().max() < 0.03
    assert len(prior.sample(13, torch.Generator(), repeats=8)) == 13
    asked = {name: TuningOptions(algorithm=name).repeats for name in ("vargrad", "ppo", "grpo", "rebel")}
    assert asked == {"vargrad": 1, "ppo": 1, "grpo": 8, "rebel": 8}
    assert TuningOptions(group_size=3).repeats == 3


def test_settings_beside_resume_win(tiny_model, tmp_path):
    """Also those whose value is part of the state: a beta, the rates in Adam, the shares of the space groups."""
    first = dict(learn_space_groups=True, replay=4, beta=0.1)
    run = tune(tiny_model, tmp_path, steps=2, **first)

    def resumed(**changes: Any) -> Tuning:
        config = FinetuneConfig(**{"model": tiny_model, "reward": "toy", **QUICK, **first, **changes})
        tuning = start(config)
        tuning.load_state_dict(run.load_checkpoint())
        return tuning

    assert resumed(beta=5.0).beta == 5
    assert resumed(beta=5.0, target_kl=1.0).beta == 5
    assert resumed(lr=0.7).optimiser.param_groups[0]["peak"] == 0.7
    assert resumed(space_group="221,225").prior.groups.tolist() == [221, 225]
    assert resumed(learn_space_groups=False).prior.learn is False
    plain, other = resumed(), resumed(reward="another")
    assert plain.scale == run.metrics()["scale"][0]
    assert len(plain.memory.kept) > 0
    assert (other.scale, other.baseline.mean, other.memory.recent, len(other.memory.kept)) == (None, None, [], 0)
    assert other.memory.seen == plain.memory.seen
    assert torch.equal(plain.prior.logits, other.prior.logits)

    again = tune(tiny_model, tmp_path, steps=4, resume=run.path, **first | {"beta": 5.0})
    assert again.metrics()["beta"] == [0.1, 0.1, 5, 5]
    assert read_run_config(FinetuneConfig, run.path / "config.toml").beta == 5  # the folder tells, the next resume too


def test_a_beta_that_was_adapted_stays_so(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=2, target_kl=50.0)
    tuning = start(FinetuneConfig(**{"model": tiny_model, "reward": "toy", **QUICK, "target_kl": 50.0}))
    tuning.load_state_dict(run.load_checkpoint())
    assert tuning.beta < 0.09


def test_a_checkpoint_of_before_its_settings_were_kept_goes_on(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=2)
    state = run.load_checkpoint()
    del state["settings"]
    run.save_checkpoint(state)
    assert tune(tiny_model, tmp_path, steps=3, resume=run.path).metrics()["scale"] == [state["scale"]] * 3


def test_a_run_is_resumed_by_one_process_at_a_time(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=1)
    before = (run.path / "config.toml").read_text()
    with run.locked(), pytest.raises(UserError, match="another process is at work"):
        tune(tiny_model, tmp_path, steps=2, resume=run.path)
    assert RunFolder.open(run.path).metrics()["step"] == [1]
    assert (run.path / "config.toml").read_text() == before
    assert tune(tiny_model, tmp_path, steps=2, resume=run.path).metrics()["step"] == [1, 2]


def test_a_checkpoint_of_another_model_is_refused(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=1)
    with pytest.raises(UserError, match="another shape"):
        tune("", tmp_path, steps=2, resume=run.path)


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint(tiny_model, tmp_path):
    straight = tune(tiny_model, tmp_path / "straight", steps=4, **EVERYTHING)
    calls = []

    def interrupted(crystals: CrystalBatch) -> SimpleNamespace:
        calls.append(1)
        if len(calls) == 3 + 4:  # the first lot of the second step: 24 crystals come in three lots, also for the scale
            os.kill(os.getpid(), signal.SIGINT)
        return first_is_oxygen(crystals)

    with pytest.raises(KeyboardInterrupt):
        tune(tiny_model, tmp_path / "half", scorer=interrupted, steps=4, **EVERYTHING)
    (folder,) = (tmp_path / "half").iterdir()
    run = RunFolder.open(folder)
    assert run.load_checkpoint()["step"] == 2
    assert not run.finished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    same_run(straight, tune(tiny_model, tmp_path, steps=4, resume=folder, **EVERYTHING))


KILLED = """
import os, signal, sys, torch
from types import SimpleNamespace
from cfrl.config import FinetuneConfig
from cfrl.commands import finetune as command
from cfrl.runs.folder import RunFolder
torch.set_num_threads(1)
save = RunFolder.save_checkpoint

def killed(run, state):  # the rows of step 5 are written, the checkpoint that knows of them is not
    if state["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    save(run, state)

def reward(crystals):
    values = (crystals.species[:, 0] == 8).double().numpy()
    return SimpleNamespace(total=values, terms={"oxygen": values}, status=[""] * len(values))

model, root, resume = sys.argv[1:]
config = FinetuneConfig(model=model, reward="toy", steps=8, n=16, evaluate=0, device="cpu", lr=3e-3,
                        min_distance=0.0, max_atoms=16, checkpoint_minutes=0.0, replay=4, plots=False)
if root.endswith("killed") and not resume:
    RunFolder.save_checkpoint = killed
command.finetune(config, reward=reward, root=root, resume=resume or None)
"""


def test_kill_9_loses_no_written_row_and_the_run_goes_on(tiny_model, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def start(root: str, resume: str = "") -> subprocess.Popen:
        command = [sys.executable, str(script), tiny_model, str(tmp_path / root), resume]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert start("killed").wait() == -signal.SIGKILL
    (folder,) = (tmp_path / "killed").iterdir()
    before = read_crystals(folder / "rollouts.h5")
    assert len(before) == 5 * 16
    assert RunFolder.open(folder).metrics()["step"] == [1, 2, 3, 4, 5]
    assert RunFolder.open(folder).load_checkpoint()["step"] == 4

    assert start("killed", str(folder)).wait() == 0
    assert start("straight").wait() == 0
    after = read_crystals(folder / "rollouts.h5")
    assert len(after) == 8 * 16
    assert torch.equal(after.frac_coords[: len(before)], before._pad(after.wyckoff.shape[1]).frac_coords)
    same_run(RunFolder.open(next((tmp_path / "straight").iterdir())), RunFolder.open(folder))


def test_a_run_ends_when_the_kl_runs_away_or_time_is_up(tiny_model, tmp_path):
    away = tune(tiny_model, tmp_path, steps=8, lr=0.03, beta=0.0, max_kl=0.5, max_step_kl=0)
    assert len(away.metrics()["step"]) < 8
    assert away.finished
    short = tune(tiny_model, tmp_path, steps=500, time_limit=1 / 60)
    assert 1 <= len(short.metrics()["step"]) < 100
    assert (short.path / "model.safetensors").exists()


def test_learning_rate_rises_and_falls_to_the_nearer_end():
    config = FinetuneConfig(steps=100, warmup=5, lr_final=0.1)
    rates = [module.rate_fraction(config, step, 0.0) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[50] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert max(rates) == rates[4]
    timed = FinetuneConfig(steps=100, warmup=0, lr_final=0.1, time_limit=10.0)
    assert module.rate_fraction(timed, 2, 300.0) == pytest.approx(0.55)  # half of the time, not 2% of the steps
    assert module.rate_fraction(timed, 50, 1.0) == pytest.approx(0.55)


def test_time_of_earlier_sessions_counts(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=500, time_limit=1 / 60)
    steps = len(run.metrics()["step"])
    again = tune(tiny_model, tmp_path, steps=500, time_limit=1 / 60, resume=run.path)
    assert len(again.metrics()["step"]) == steps + 1  # the limit is looked at after a step


def test_adaptive_beta_moves_towards_the_target(tiny_model, tmp_path):
    run = tune(tiny_model, tmp_path, steps=3, target_kl=50.0)
    beta = run.metrics()["beta"]
    assert beta[0] > beta[1] > beta[2]  # far below the target: let it go


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "pp0"}, "did you mean 'ppo'"),
        ({"kl": "nowhere"}, "reward, loss"),
        ({"rollouts": "x.h5"}, "only --algorithm dpo and rebel"),
        ({"n": -4}, "n"),
        ({"algorithm": "vargrad", "beta": 0.0}, "more than 0"),
        ({"hold": "size"}, "no such kind"),
        ({"share": "oxide"}, "between 0 and 1"),
        ({"factors": "letters"}, "no such factor"),
        ({"lr": 0.0}, "lr"),
        ({"lr_final": 2.0}, "lr_final"),
        ({"penalty": "low"}, "penalty"),
        ({"space_group_floor": 1.0}, "space_group_floor"),
        ({"space_group": "999"}, "999"),
        ({"elements": "Xx"}, "Xx"),
        ({"device": "abacus"}, "abacus"),
        ({"dataset": "nothing.h5"}, "nothing.h5"),
    ],
)
def test_bad_settings_are_named_before_anything_is_made(tiny_model, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        tune(tiny_model, tmp_path / "runs", **changes)
    assert not (tmp_path / "runs").exists()


# ---- offline preferences, validation, evaluation -----------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["dpo", "rebel"])
def test_learning_from_a_rollouts_file(tiny_model, tmp_path, algorithm):
    model = load_model(tiny_model)
    crystals = sample(model, 300, space_group=[225, 221], max_atoms=16, seed=0, keep_invalid=True)
    oxygen = ((crystals.species == 8).any(1)).double()
    oxygen[:5] = math.nan
    path = tmp_path / "scored.h5"
    write_crystals(path, crystals, columns={"reward": oxygen})
    settings = dict(algorithm=algorithm, rollouts=str(path), n=48, batch_size=24)
    run = tune(tiny_model, tmp_path, None, steps=15, **settings)
    metrics = run.metrics()
    assert metrics["loss"][-1] < metrics["loss"][0]
    assert all(math.isnan(kl) for kl in metrics["kl"])  # the crystals are not the policy's own
    new = sample(load_model(run.path), 300, space_group=[225, 221], max_atoms=16, seed=5, keep_invalid=True)
    assert (new.species == 8).any(1).double().mean() > oxygen.nanmean() + 0.1

    write_crystals(path, crystals)
    with pytest.raises(UserError, match="no column 'reward'"):
        tune(tiny_model, tmp_path, None, algorithm=algorithm, rollouts=str(path))
    write_crystals(path, crystals, columns={"reward": torch.ones(300)})
    with pytest.raises(UserError, match="nothing to prefer"):
        tune(tiny_model, tmp_path, None, algorithm=algorithm, rollouts=str(path))


def test_validation_loss_evaluation_and_plots(tiny_model, tmp_path, capsys):
    run = tune(tiny_model, tmp_path, steps=3, dataset="prototypes", validate_every=3, evaluate=20, plots=True)
    validation = load_dataset("prototypes", split="validation").canonical()
    validation = validation[validation.num_sites < SIZES.max_sites]
    with torch.no_grad():
        start, end = (
            -float(sum(values.double().mean() for values in load_model(model).log_prob(validation).values()))
            for model in (tiny_model, run.path)
        )
    losses = run.metrics()["validation/loss"]
    assert np.isfinite(losses).tolist() == [True, False, True]
    assert losses[2] == pytest.approx(end, rel=1e-5), "that of the model that was saved"
    assert start != pytest.approx(end, rel=1e-3), "which is another one than it was"
    before, after = read_columns(run.path / "before.h5"), read_columns(run.path / "after.h5")
    assert len(before["reward"]) == len(after["reward"]) == 20
    assert (run.path / "progress.png").read_bytes()[:4] == b"\x89PNG"
    monitor.summarise(run)
    shown = capsys.readouterr().out
    assert "20 fresh crystals" in shown
    assert "Best crystals" in shown
    assert "model.safetensors" in shown


def test_an_anchor_holds_the_model_to_real_crystals(tiny_model, tmp_path):
    """Where nothing is to be earned it is maximum likelihood; where something is, less of the data is forgotten."""
    real = load_dataset("prototypes", split="train").canonical()
    real = real[real.num_sites < SIZES.max_sites]

    @torch.no_grad()
    def nats(model) -> float:
        return -float(sum(values.double().mean() for values in load_model(model).log_prob(real).values()))

    def indifferent(crystals):
        return scored(torch.zeros(len(crystals)))

    shared = dict(steps=8, n=64, batch_size=32, dataset="prototypes", validate_every=100, beta=0.0)
    run = tune(tiny_model, tmp_path / "a", indifferent, anchor=1.0, max_step_kl=None, **shared)
    told = run.metrics()["real"]
    assert told[0] == pytest.approx(nats(tiny_model), rel=0.05), "of the crystals that a step has seen"
    assert nats(run.path) < nats(tiny_model) - 0.5
    free, held = (
        tune(tiny_model, tmp_path / name, anchor=weight, **shared) for name, weight in (("b", 0.0), ("c", 0.3))
    )
    assert nats(held.path) < nats(free.path) - 0.5
    assert "real" not in free.metrics()
    earned = held.metrics()["reward/mean"]
    assert np.mean(earned[-2:]) > 1.5 * np.mean(earned[:2])


def test_what_no_anchor_can_hold_is_refused(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"anchor: vargrad's optimum .* --algorithm ppo"):
        tune(tiny_model, tmp_path, algorithm="vargrad", anchor=1.0, dataset="prototypes")
    with pytest.raises(UserError, match=r"anchor: there are no real crystals; .* --dataset"):
        tune(tiny_model, tmp_path, anchor=1.0)


def test_no_crystal_of_before_is_scored_anew_after_a_survey(tiny_model, tmp_path, monkeypatch):
    """The tuning learns from known crystals too, which a tuned model withholds: both see the same draws."""
    asked = []
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    @register_reward("counted")
    def counted(crystals, structures):
        asked.extend(crystal_keys(crystals))
        return crystals.densities().double().numpy()

    settings = QUICK | dict(scale_crystals=96, draw_size=16, evaluate=24, seed=3)
    config = FinetuneConfig(model=tiny_model, reward="counted", **settings)
    tuning = start(config)
    known = FreshCrystals(tuning, first_is_oxygen).survey().crystals[::3]
    reward = build_reward("counted", context=RewardContext(known=known), guards=("element", "known"))
    source = FreshCrystals(tuning, reward)
    begin(tuning, source)
    surveyed = set(asked)
    assert "known" in reward.withheld.reasons(source.survey().crystals.formulas())
    assert len(asked) == len(surveyed), "each crystal once"
    command.evaluate(source, config, tmp_path)
    before, after = (read_crystals(tmp_path / name) for name in ("before.h5", "after.h5"))
    assert len(before) == len(after) == 24
    assert not set(before.formulas()) & set(known.formulas())
    keys, new = (
        {key for key, valid in zip(crystal_keys(crystals), crystals.properties["valid"].tolist(), strict=True) if valid}
        for crystals in (before, after)
    )
    assert len(keys) > 10
    assert keys <= surveyed
    assert set(asked[len(surveyed) :]) == new - surveyed != set(), "those of the policy, and no others"


def test_time_by_stage_is_shown(tiny_model, tmp_path, capsys):
    config = FinetuneConfig(model=tiny_model, reward="toy", **QUICK | {"steps": 2})
    run = finetune(config, reward=first_is_oxygen, root=tmp_path)
    took = run.metrics()
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 2
    for line, drawing, update in zip(steps, took["seconds/sample"], took["seconds/update"], strict=True):
        assert f"(sample {drawing:.2f}, score " in line
        assert line.endswith(f"update {update:.2f})")
    assert any(line.startswith("Seconds per step: sample ") for line in lines)
    live = monitor.Live(run, 2, quiet=True)
    live.update(1, {name: values[0] for name, values in took.items()})
    console = Console(width=150, file=StringIO())
    console.print(live._table(1, {name: values[0] for name, values in took.items()}))
    assert f"update {took['seconds/update'][0]:.2f}" in console.file.getvalue()


def test_sparkline():
    assert monitor.sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert monitor.sparkline([1, math.nan, 1]) == "▁ ▁"
    assert len(monitor.sparkline(list(range(1000)), 30)) == 30


@pytest.mark.parametrize("potential", ["chgnet:r2scan", "mace:own.model", "mace:medium-omat-0"])
def test_energies_on_another_scale_than_the_hull_are_refused_before_a_run(tiny_model, tmp_path, potential):
    with pytest.raises(UserError, match=f"reference is on the scale mp2020.*--potential {potential}"):
        tune(tiny_model, tmp_path / "runs", None, steps=1, reward="density - ehull", potential=potential)
    assert not (tmp_path / "runs").exists()


# ---- a real potential --------------------------------------------------------------------------------------------


def test_ehull_tuning_on_chgnet(tiny_model, tmp_path):
    """The real pipeline: CHGNet's energies against a hull of prototypes, which lacks some of the elements."""
    from cfrl.commands.data_hull import build_hull
    from cfrl.potentials import load_potential

    hull = build_hull(["prototypes"], tmp_path / "hull.h5")
    settings = dict(
        reward="ehull", hull=str(tmp_path / "hull.h5"), min_distance=0.5, max_atoms=12, allow="all", relax_steps=0
    )
    run = tune(tiny_model, tmp_path / "runs", None, steps=2, n=32, evaluate=16, **settings)
    columns = read_columns(run.path / "rollouts.h5")
    good = columns["status"] == ""
    assert good.sum() > 5
    worst = np.clip(columns["ehull"] + columns["ehull/spread"], BEST, WORST)
    np.testing.assert_allclose(columns["reward"][good], -worst[good])
    reason = "ehull: no reference for element "
    told = [text.removeprefix(reason).split(", ") for text in columns["status"] if text.startswith(reason)]
    missing = {symbol for symbols in told for symbol in symbols}
    assert missing, "crystals are drawn with elements that the prototypes lack"
    assert not missing & {SYMBOLS[number] for number in hull.elements}
    assert np.isfinite(columns["reward"]).all()
    again = hull.e_above_hull(
        crystals := read_crystals(run.path / "rollouts.h5")[torch.from_numpy(good)],
        load_potential("chgnet", "cpu").compute(crystals.to_structures()).energy,
    )
    np.testing.assert_allclose(again.e_above_hull, columns["ehull"][good], atol=1e-3)
    resumed = tune(tiny_model, tmp_path, None, steps=3, n=32, resume=run.path, **settings)
    assert resumed.metrics()["step"] == [1, 2, 3]


REPEATED = """
import sys, time, torch
from pathlib import Path
from cfrl.config import FinetuneConfig
from cfrl.commands.finetune import finetune
from cfrl.rewards import build_reward
torch.set_num_threads(1)
reward = build_reward("dielectric_bandgap")

def disturbing(crystals):
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        torch.rand(3)
    return reward(crystals)

model, root, steps, resume = sys.argv[1:]
config = FinetuneConfig(model=model, reward="dielectric_bandgap", steps=int(steps), n=12, batch_size=6,
                        draw_size=4, scale_crystals=12, lr=3e-3, lr_final=1.0, max_atoms=12, evaluate=0, plots=False,
                        device="cpu")
finetune(config, reward=disturbing, root=root, resume=resume or None, quiet=True)
"""


def test_a_seed_fixes_a_run_in_fresh_processes(tiny_model, tmp_path):
    """CHGNet and predictors load in the scoring thread, and draw from torch's global state while the sampler draws.

    They do so for moments only; the reward goes on drawing, so that no lot is safe.
    """
    (tmp_path / "run.py").write_text(REPEATED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(folder: str, steps: int, resume: str = "") -> RunFolder:
        command = [sys.executable, str(tmp_path / "run.py"), tiny_model, str(tmp_path / folder), str(steps), resume]
        subprocess.run(command, env=environment, check=True)
        (path,) = (tmp_path / folder).iterdir()
        return RunFolder.open(path)

    straight, half = run("straight", 3), run("half", 2)
    first = half.metrics()
    assert first["scored"][0] > 0
    for name, values in straight.metrics().items():
        if not name.startswith("seconds/"):
            assert values[:2] == first[name], name
    same_run(straight, run("half", 3, str(half.path)))


def test_a_property_is_sought_where_crystals_last(tmp_path):
    """A tuning for one starts from the embedded model that was tuned for stability, unless another is named."""
    assert load_extras("stable").refusal.names == REFUSED
    asked = {"band_gap": True, "dielectric_bandgap": True, "ehull": False, "sun": False, "band_gap - ehull": False}
    for reward, lasting in (asked | {"contact": False, "density": False}).items():
        assert command.configured_reward(FinetuneConfig(reward=reward), "cpu").lasting is lasting, reward
    assert not command.configured_reward(FinetuneConfig(reward="band_gap", allow="unstable"), "cpu").lasting
    quick = dict(steps=1, n=4, scale_crystals=8, unscored=4, replay=4, evaluate=0, plots=False, device="cpu")
    for named, base in ((None, "stable"), ("default", "default")):
        run = finetune(FinetuneConfig(reward="band_gap", model=named, **quick), root=tmp_path, quiet=True)
        assert load_extras(run.path).header["base_model"] == base
        assert read_run_config(FinetuneConfig, run.path / "config.toml").model == base
        begun, ended = (torch.nn.utils.parameters_to_vector(load_model(m).parameters()) for m in (base, run.path))
        assert 0 < (begun - ended).abs().max() < 0.01


def test_models_load_before_the_first_step(tiny_model, tmp_path, monkeypatch):
    """And what cannot be loaded is said before a run folder is made."""
    monkeypatch.setattr(command, "step", lambda *_: (_ for _ in ()).throw(UserError("no step today")))
    settings = FinetuneConfig(model=tiny_model, reward="dielectric_bandgap", standardize=False, **QUICK)
    made = command.configured_reward(settings, "cpu")
    monkeypatch.setattr(command, "configured_reward", lambda *_: made)
    with pytest.raises(UserError, match="no step today"):
        finetune(settings, root=tmp_path, quiet=True)
    assert {"potential", "_predictors"} <= set(vars(made.context))
    assert {"band_gap", "eps_total"} <= set(made.context._predictors)
    monkeypatch.undo()
    with pytest.raises(UserError, match="give --dataset"):
        tune(tiny_model, tmp_path / "none", None, reward="novelty")
    assert not (tmp_path / "none").exists()

"""Steering samples pi_base exp(r / beta): against enumeration; its unit is that of tuning; limits; what is written."""

import copy
import math
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import cfrl
from cfrl.commands.sample import run_sample
from cfrl.config import SampleConfig
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.errors import UserError
from cfrl.io.storage import describe, read_columns, read_crystals
from cfrl.model.files import load_model
from cfrl.rl.loop import robust_std
from cfrl.rl.options import TuningOptions
from cfrl.rl.sources import FreshCrystals
from cfrl.rl.steering import steer
from cfrl.rl.tuning import Tuning
from cfrl.runs.folder import RunFolder
from tests.test_chains import SMALL, THREE, enumerated, keys, prior_of, reward_of
from tests.tiny import trained_model

TINY = {"space_group": 225, "elements": THREE, "max_atoms": SMALL.max_atoms, "min_distance": 0.0}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return trained_model(tmp_path_factory.mktemp("model") / "model.safetensors")


class Known:
    """A reward of letters and elements that can be enumerated. Fluorides have none where `fluorides` is False."""

    def __init__(self, fluorides=True, needs=(), pause=0.0):
        self.fluorides, self.needs, self.pause, self.asked = fluorides, set(needs), pause, 0

    def __call__(self, crystals, structures=None):
        time.sleep(self.pause)
        self.asked += len(crystals)
        keyed = keys(crystals)
        total = np.array([reward_of(key) for key in keyed])
        if not self.fluorides:
            total[[9 in {a for _, a in key} for key in keyed]] = np.nan
        status = ["" if good else "a fluoride" for good in np.isfinite(total)]
        return SimpleNamespace(total=total, terms={"known": total}, status=status)


def with_cells():
    """The model of `prior_of`, whose cells are all possible: what a crystal weighs then hangs on its sites alone."""
    prior = prior_of()
    k = prior.model.config.lattice_components
    with torch.no_grad():
        weight, bias = (x[NUM_ELEMENTS : NUM_ELEMENTS + 13 * k] for x in prior.model.head.parameters())
        weight.mul_(0.02)
        bias[k : 7 * k], bias[7 * k :] = 2.0, -3.0
    return prior


@pytest.mark.parametrize(("needs", "budget"), [((), 40_000), (("features",), 12_000)], ids=["plain", "by a critic"])
@pytest.mark.parametrize("fluorides", [True, False], ids=["all", "some without a score"])
def test_the_target_is_sampled(needs, budget, fluorides):
    """Mean reward and shares of crystals are those of enumeration, whether or not a critic leads the walks."""
    prior, scorer = with_cells(), Known(fluorides, needs)
    beta = 1.0 if needs else 0.5  # by a critic the chains are slower
    steered = steer(prior.model, scorer, 8000, beta=beta, budget=budget, chains=200, seed=3, **TINY)
    told = steered.numbers
    weight = {
        key: share * math.exp(reward_of(key) * (1 / (beta * told["unit"]) - 1.5))  # enumerated with a tilt of 1.5 r
        for key, share in enumerated(prior).items()
        if fluorides or 9 not in {a for _, a in key}
    }
    total = sum(weight.values())
    exact = sum(w * reward_of(key) for key, w in weight.items()) / total
    assert told["temperature"] == 1
    assert told["r_hat"] < (1.4 if needs else 1.2)
    reward = steered.crystals.properties["reward"]
    assert abs(float(reward.mean()) - exact) < 4 * float(reward.std()) / math.sqrt(told["effective_draws"])
    found = keys(steered.crystals)
    assert set(found) <= set(weight)
    for key, w in weight.items():
        share = w / total
        error = math.sqrt(share * (1 - share) / told["effective_draws"]) + 1e-3
        assert abs(found.count(key) / len(found) - share) < 5 * error, key


def test_the_unit_is_that_of_tuning(model_file):
    model, reward = load_model(str(model_file)), cfrl.build_reward("density")
    tuning = Tuning(copy.deepcopy(model), TuningOptions(hold=""))
    survey = FreshCrystals(tuning, reward).survey()
    steered = steer(model, cfrl.build_reward("density"), 8, budget=2048, chains=2000)
    assert steered.numbers["unit"] == robust_std(survey.reward)
    torch.testing.assert_close(steered.scored.lattice, survey.crystals.lattice[survey.valid])


def test_budget_and_time_are_kept():
    prior, scorer = with_cells(), Known()
    steered = steer(prior.model, scorer, 50, beta=0.5, budget=700, chains=64, **TINY)
    assert scorer.asked == steered.numbers["scored"] == len(steered.scored) <= 700
    assert steered.numbers["scored"] > 700 - 64
    assert steered.ended == "The budget is spent."
    slow = Known(pause=0.05)
    began = time.monotonic()
    steered = steer(prior.model, slow, 50, budget=10**6, chains=64, time_limit=0.05, **TINY)
    assert time.monotonic() - began < 10
    assert steered.ended == "The time limit is reached."
    assert len(steered.crystals) == 50


def test_a_wish_to_stop_is_heard_and_the_rest_is_kept():
    prior, scorer = with_cells(), Known()
    steered = steer(prior.model, scorer, 50, budget=10**6, chains=64, stopped=lambda: scorer.asked > 1500, **TINY)
    assert steered.ended == "Stopped."
    assert 1500 < scorer.asked < 1500 + 64 + 1
    assert len(steered.crystals) == 50
    early = steer(prior.model, Known(), 50, budget=10**6, chains=64, stopped=lambda: True, **TINY)
    assert len(early.crystals) == 50  # of the model, as far as it got
    assert early.numbers["temperature"] == 0


def test_nothing_to_go_by_is_said():
    with pytest.raises(UserError, match=r"none has a score \(\d+ times: not today\)"):
        steer(with_cells().model, no_score, 10, budget=200, chains=16, **TINY)


def no_score(crystals):
    n = len(crystals)
    return SimpleNamespace(total=np.full(n, np.nan), terms={}, status=["not today"] * n)


# ---- expressions, guards, the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "good"),
    [
        ("target(density, 6, 0.5)", lambda crystals: (crystals.densities() - 6).abs() < 1),
        ("only(density, volume_per_atom > 15)", lambda crystals: crystals.volumes() / crystals.num_atoms > 15),
        ("density * (density < 5)", lambda crystals: crystals.densities() < 5),
    ],
    ids=["target", "gate", "product"],
)
def test_expressions_steer(model_file, reward, good):
    model = load_model(str(model_file))
    crystals = cfrl.sample(model, 60, toward=reward, beta=0.03, budget=6000, chains=64, allow="all", seed=1)
    plain = cfrl.sample(model, 300, seed=1)
    assert good(crystals).double().mean() > 0.9
    assert good(plain).double().mean() < 0.7
    assert {"reward", "log_prob", "density"} <= set(crystals.properties)


def test_guards_are_heeded(model_file):
    model = load_model(str(model_file))
    steered = steer(model, "density", 60, beta=0.2, budget=900, chains=64, allow="known,not_neutral")
    assert all(len(set(row) - {0}) > 1 for row in steered.scored.species.tolist())  # no element alone
    lifted = steer(model, "density", 60, beta=0.2, budget=900, chains=64, allow="all")
    assert any(len(set(row) - {0}) == 1 for row in lifted.scored.species.tolist())


def test_the_command_writes_and_tells(model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = SampleConfig(
        n=40, model=str(model_file), toward="density", beta=0.3, budget=700, chains=32, allow="all", seed=5
    )
    console = Console(record=True, width=200, stderr=True)
    path = run_sample(config, None, console)
    told = console.export_text()
    for words in ("crystals scored in", "split R-hat", "moves taken: ", "unique", "best: ", "reward: median"):
        assert words in told
    crystals = read_crystals(path)
    assert len(crystals) == 40
    run = RunFolder.open(path.parent)
    assert run.finished
    metrics = run.metrics()
    assert metrics["scored"][-1] <= 700
    assert metrics["temperature"][-1] == 1
    assert {"accepted/score", "r_hat", "effective", "unique", "scored_per_second"} <= set(metrics)
    scored = read_crystals(path.parent / "scored.h5")
    assert len(scored) == len(read_columns(path.parent / "scored.h5", ["status"])["status"]) == metrics["scored"][-1]
    assert set(crystals.properties["reward"].tolist()) <= set(scored.properties["reward"].tolist())
    again = read_crystals(run_sample(config, str(tmp_path / "again.h5")))
    torch.testing.assert_close(again.lattice, crystals.lattice)
    assert float(describe(tmp_path / "again.h5")["attrs"]["steering/temperature"]) == 1


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"toward": "densty"}, "densty"),
        ({"toward": "density", "keep_invalid": True}, "keep_invalid"),
        ({"toward": "novelty"}, "give --known"),
        ({"toward": "density", "allow": "elemnt"}, "no such guard"),
    ],
)
def test_bad_wishes_leave_no_run(model_file, tmp_path, monkeypatch, wish, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run_sample(SampleConfig(n=4, model=str(model_file), **wish))
    assert not (tmp_path / "runs").exists()


def test_toward_nothing_is_plain_sampling(model_file):
    model = load_model(str(model_file))
    plain = partial(cfrl.sample, model, 20, seed=3)
    torch.testing.assert_close(plain().lattice, cfrl.model.sampler.sample(model, 20, seed=3).lattice)

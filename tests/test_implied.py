"""What a tuned model implies of the reward: the formula, the file, and that tuning makes it true."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

import cfrl
from cfrl.crystals.compositions import fractions
from cfrl.crystals.kinds import cells, kinds, num_cells
from cfrl.errors import UserError
from cfrl.model.files import Extras, load_extras, load_model, save_model
from cfrl.model.implied import ImpliedReward
from cfrl.model.sampler import sample
from cfrl.rl.loop import begin, step
from cfrl.rl.options import TuningOptions
from cfrl.rl.sources import FreshCrystals
from cfrl.rl.tuning import Tuning


def some_implied(names=("elements", "sites")) -> ImpliedReward:
    rng = torch.Generator().manual_seed(0)
    group, kind = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (231, num_cells(names)))
    return ImpliedReward(names, group, kind, 0.25)


def test_it_is_the_ratio_and_the_log_z_of_the_group_and_the_kind():
    implied, crystals = some_implied(), sample(load_model(), 40, seed=0)
    ratio = np.linspace(-3, 3, 40)
    labels = kinds(crystals)
    place = labels["elements"] * 7 + labels["sites"]
    expected = 0.25 * (ratio + implied.space_group.numpy()[crystals.space_group] + implied.kind.numpy()[place])
    assert implied(crystals, ratio) == pytest.approx(expected)
    assert (cells(crystals, ()) == 0).all()
    assert num_cells(()) == 1


def test_a_model_file_keeps_it_and_a_damaged_one_says_so(tmp_path):
    path, implied, model = tmp_path / "m.safetensors", some_implied(), load_model()
    save_model(model, path, Extras(implied=implied))
    again = load_extras(path).implied
    assert (again.names, again.unit) == (implied.names, implied.unit)
    torch.testing.assert_close(again.space_group, implied.space_group, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.kind, implied.kind, rtol=1e-6, atol=1e-6)
    for name, weight in load_model(path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert load_extras(None).implied is None
    tensors, header = load_file(path), load_extras(path).header
    faults = (
        ({}, {"log_z_kind": tensors["log_z_kind"][:5]}),
        ({}, {"log_z_kind": tensors["log_z_kind"] * torch.nan}),
        ({"implied_reward": json.dumps({"names": ["colour"], "unit": 1})}, {}),
        ({"implied_reward": "{}"}, {}),
    )
    for more_header, more_tensors in faults:
        save_file(tensors | more_tensors, tmp_path / "bad.safetensors", metadata=header | more_header)
        with pytest.raises(UserError, match=r"bad\.safetensors"):
            load_extras(tmp_path / "bad.safetensors")


def test_tuning_makes_it_the_reward_also_where_a_kind_is_held():
    """Fluorine, oxygen and chlorine are wanted: what is implied of unseen crystals agrees with it."""

    def wanted(crystals: cfrl.CrystalBatch, structures=None):
        return cfrl.rewards.RewardResult(fractions(crystals)[0][:, [8, 9, 17]].sum(1), {}, [""] * len(crystals))

    options = TuningOptions(n=48, steps=12, scale_crystals=512, unscored=96, replay=96, hold="elements,anion,sites")
    tuning = Tuning(load_model(), options)
    source = FreshCrystals(tuning, wanted)
    begin(tuning, source)
    for _ in range(options.steps):
        step(tuning, source)
    fresh = sample(load_model(), 600, seed=11)
    truth = fractions(fresh)[0][:, [8, 9, 17]].sum(1)
    new, old = (model.log_prob(fresh) for model in (tuning.policy(), tuning.base))
    ratio = sum((new[name] - old[name]).double() for name in ("wyckoff", "species", "coords", "lattice"))
    ratio = ratio.detach().numpy()
    implied = tuning.implied_reward()
    by_ratio, by_reward = (spearmanr(scores, truth).statistic for scores in (ratio, implied(fresh, ratio)))
    print(by_ratio, by_reward)
    assert by_reward > max(by_ratio, 0.4)

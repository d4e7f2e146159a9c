"""The critic: it learns means, sees no coordinates, and is the same after a checkpoint."""

import copy
from functools import cache

import pytest
import torch

import cfrl
from cfrl.crystals.compositions import fractions
from cfrl.model.files import Extras, load_extras, save_model
from cfrl.model.options import ModelConfig
from cfrl.model.sampler import sample
from cfrl.model.transformer import CrystalTransformer
from cfrl.rl import loop
from cfrl.rl.critic import Critic, word_of
from cfrl.rl.options import TuningOptions
from cfrl.rl.rollouts import Memory, Rollout
from cfrl.rl.tuning import Tuning, settled


@cache
def many() -> cfrl.CrystalBatch:
    """Drawn when first asked for: a run of other tests collects this file too."""
    return sample(cfrl.load_model(), 1200, seed=0)


@cache
def means() -> torch.Tensor:
    """Oxygen, fluorine, chlorine: a mean that elements decide, in units of its spread."""
    share = torch.from_numpy(fractions(many())[0][:, [8, 9, 17]].sum(1))
    return share / share.std()


def taught(passes: int, rows: slice = slice(1000)) -> Critic:
    rng = torch.Generator().manual_seed(1)
    noisy = means() + 2 * torch.randn(len(means()), generator=rng, dtype=torch.float64)
    critic = Critic(0)
    for _ in range(passes):
        critic.learn(many()[rows], noisy[rows], rng)
    return critic


def test_it_finds_the_mean_under_four_times_as_much_noise():
    told, truth = taught(6)(many()[1000:]), means()[1000:]
    assert 1 - (told - truth).square().mean() / truth.var() > 0.6


def test_it_sees_letters_and_elements_alone_in_whatever_order():
    critic, some = taught(1), many()[1000:1050]
    told = critic(some)
    assert told.std() > 0.01
    moved = some[torch.arange(50)]
    moved.frac_coords = torch.rand_like(moved.frac_coords)
    moved.lattice = 2 * moved.lattice
    torch.testing.assert_close(critic(moved), told)
    last = (some.num_sites - 1).clamp(min=0)
    swapped = some[torch.arange(50)]
    for row, end in enumerate(last.tolist()):  # the first and the last site change places
        for field in (swapped.wyckoff, swapped.species):
            field[row, [0, end]] = field[row, [end, 0]]
    torch.testing.assert_close(critic(swapped), told, rtol=1e-4, atol=1e-4)
    other = some[torch.arange(50)]
    other.species = torch.where(other.species > 0, (other.species + 7) % 90 + 1, 0)
    assert not torch.allclose(critic(other), told, atol=0.01)


def test_it_goes_on_after_a_checkpoint_as_if_there_had_been_none():
    one = taught(2)
    two = Critic(5)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for critic in (one, two):
        critic.learn(many()[:256], means()[:256], torch.Generator().manual_seed(3))
    assert torch.equal(one(many()[1000:]), two(many()[1000:]))


def test_it_is_asked_only_where_no_coordinate_is_tuned():
    assert TuningOptions().criticised
    assert not TuningOptions(factors="species,coords").criticised
    assert not TuningOptions(algorithm="ppo").criticised
    assert settled(TuningOptions(), {"features"}).criticised
    assert not settled(TuningOptions(), {"energy", "hull"}).criticised
    assert settled(TuningOptions(critic="on"), {"energy", "hull"}).criticised
    model = CrystalTransformer(
        ModelConfig(embed_size=8, h0_size=16, model_size=8, num_layers=1, num_heads=1, key_size=8, max_sites=6)
    )
    assert Tuning(model, TuningOptions(critic="off")).critic is None


def test_a_policy_learns_more_from_noisy_scores_through_it(monkeypatch):
    """The same few noisy scores: fresh crystals of the policy that a critic taught are better.

    Its word alone counts here: of a real reward, whose noise is less and which may mislead a critic, it is a quarter.
    """
    monkeypatch.setattr(loop, "OWN", 0.0)

    def noisy(crystals: cfrl.CrystalBatch, structures=None):
        truth = torch.from_numpy(fractions(crystals)[0][:, [8, 9, 17]].sum(1))
        seed = int(1e6 * float(crystals.frac_coords.double().sum())) % 2**31
        noise = torch.randn(len(crystals), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return cfrl.rewards.RewardResult((truth + 1.6 * noise).numpy(), {}, [""] * len(crystals))

    gains = {}
    for critic in ("on", "off"):
        tuned = cfrl.finetune(
            cfrl.load_model(),
            noisy,
            steps=12,
            n=48,
            scale_crystals=512,
            critic=critic,
            beta=0.2,
            unscored=512,
            replay=192,
            hold=None,
        )
        fresh = sample(tuned.model, 1500, seed=7)
        gains[critic] = float(fractions(fresh)[0][:, [8, 9, 17]].sum(1).mean())
    base = float(fractions(many())[0][:, [8, 9, 17]].sum(1).mean())
    print(base, gains)
    assert gains["on"] > gains["off"] > base


def test_it_learns_what_a_crystal_is_worth_beside_what_it_earns():
    """Half of the crystals earn nothing because they would fall apart; their worth is told all the same."""
    worth = means()
    falls = torch.arange(len(worth)) % 2 == 0
    critic, rng = Critic(0), torch.Generator().manual_seed(0)
    for _ in range(40):
        rows = torch.randperm(1000, generator=rng)[:256]
        earned = torch.stack([worth.masked_fill(falls, 0.0), worth], 1)
        critic.learn(many()[rows], earned[rows], rng)
    earns, is_worth = critic(many()[1000:]), critic.worth(many()[1000:])
    assert float(torch.corrcoef(torch.stack([is_worth, worth[1000:]]))[0, 1]) > 0.8
    assert float(is_worth.mean()) == pytest.approx(float(worth.mean()), rel=0.15)
    assert 0.35 < float(earns.mean() / is_worth.mean()) < 0.65


def test_a_model_file_keeps_it_and_a_damaged_one_says_so(tmp_path):
    critic, model, path = taught(1), cfrl.load_model(), tmp_path / "m.safetensors"
    assert word_of(load_extras(None).critic) is None
    save_model(model, path, Extras(critic=critic.tensors(scale=3.0)))
    said = word_of(load_extras(path).critic)(many()[1000:])
    torch.testing.assert_close(torch.from_numpy(said), 3 * critic.worth(many()[1000:]))
    for name, weight in cfrl.load_model(str(path)).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    tensors = load_extras(path).critic
    for fault in ({"critic.centre": torch.zeros(3)}, {"critic.weights.0": torch.zeros(4, 3, 3)},
                  {"critic.spread": tensors["critic.spread"] * torch.nan}):  # fmt: skip
        with pytest.raises((ValueError, RuntimeError)):
            word_of(tensors | fault)


def test_half_of_a_lesson_are_crystals_of_the_starting_model_which_stay():
    memory = Memory("5%", 0, 8, replay_size=40, best=False, balanced=True)
    for k in range(6):
        some = many()[50 * k : 50 * k + 50]
        reward, every = torch.full((50,), float(k), dtype=torch.float64), torch.ones(50, dtype=torch.bool)
        rollout = Rollout(some, reward, every, [""] * 50, ~every)
        first = every if k < 2 else None  # one of the two unscored
        asked = every if k else ~every
        memory.keep(rollout, reward, reward[:, None].expand(-1, 5), [str(k)] * 50, asked, first)
    assert memory.kept.first.sum() == 100
    assert len(memory.kept) == 140
    replayed = memory.replay(30, torch.Generator().manual_seed(0))
    assert replayed.first.sum() == 15
    _, told = memory.lesson(40, torch.Generator().manual_seed(0))
    assert sorted(told[:, 0].tolist()) == [1.0] * 20 + [5.0] * 20  # none that was not asked about

"""The critic: it learns means, sees no coordinates, and is the same after a checkpoint."""

import copy

import torch

import cfrl
from cfrl.crystals.compositions import fractions
from cfrl.model.options import ModelConfig
from cfrl.model.sampler import sample
from cfrl.model.transformer import CrystalTransformer
from cfrl.rl.critic import Critic
from cfrl.rl.options import TuningOptions
from cfrl.rl.tuning import Tuning

MANY = sample(cfrl.load_model(), 1200, seed=0)
TRUTH = torch.from_numpy(fractions(MANY)[0][:, [8, 9, 17]].sum(1))  # O, F, Cl: a mean that elements decide
TRUTH = TRUTH / TRUTH.std()


def taught(passes: int, rows: slice = slice(1000)) -> Critic:
    rng = torch.Generator().manual_seed(1)
    noisy = TRUTH + 2 * torch.randn(len(TRUTH), generator=rng, dtype=torch.float64)
    critic = Critic(0)
    for _ in range(passes):
        critic.learn(MANY[rows], noisy[rows], rng)
    return critic


def test_it_finds_the_mean_under_four_times_as_much_noise():
    told, truth = taught(6)(MANY[1000:]), TRUTH[1000:]
    assert 1 - (told - truth).square().mean() / truth.var() > 0.6


def test_it_sees_letters_and_elements_alone_in_whatever_order():
    critic, some = taught(1), MANY[1000:1050]
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
        critic.learn(MANY[:256], TRUTH[:256], torch.Generator().manual_seed(3))
    assert torch.equal(one(MANY[1000:]), two(MANY[1000:]))


def test_it_is_asked_only_where_no_coordinate_is_tuned():
    assert TuningOptions().criticised
    assert not TuningOptions(factors="species,coords").criticised
    assert not TuningOptions(algorithm="ppo").criticised
    model = CrystalTransformer(
        ModelConfig(embed_size=8, h0_size=16, model_size=8, num_layers=1, num_heads=1, key_size=8, max_sites=6)
    )
    assert Tuning(model, TuningOptions(critic=False)).critic is None


def test_a_policy_learns_more_from_noisy_scores_through_it():
    """The same few noisy scores: fresh crystals of the policy that a critic taught are better."""

    def noisy(crystals: cfrl.CrystalBatch, structures=None):
        truth = torch.from_numpy(fractions(crystals)[0][:, [8, 9, 17]].sum(1))
        seed = int(1e6 * float(crystals.frac_coords.double().sum())) % 2**31
        noise = torch.randn(len(crystals), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return cfrl.rewards.RewardResult((truth + 0.4 * noise).numpy(), {}, [""] * len(crystals))

    gains = {}
    for critic in (True, False):
        tuned = cfrl.finetune(
            cfrl.load_model(), noisy, steps=12, n=48, scale_crystals=512, critic=critic, unscored=96, replay=96, hold=""
        )
        fresh = sample(tuned.model, 400, seed=7)
        gains[critic] = float(fractions(fresh)[0][:, [8, 9, 17]].sum(1).mean())
    base = float(fractions(MANY)[0][:, [8, 9, 17]].sum(1).mean())
    print(base, gains)
    assert gains[True] > gains[False] > base

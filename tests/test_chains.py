"""Chains go where they should: against enumeration on a tiny model, against weighted draws on the real one."""

import itertools
import math
from collections import Counter

import pytest
import torch
from scipy import stats

import cfrl
from cfrl.crystals.crystal import CrystalBatch
from cfrl.model.chains import MOVES, Prior, Tally, accept, chosen, walk
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import Given, draw
from cfrl.model.network import TOKENS
from cfrl.model.sampler import space_group_prior
from cfrl.rl.mixing import effective_draws, effective_size, next_temperature, split_r_hat, systematic
from tests.test_model import tiny_model

ALL = {"fresh": 1.0, "regrow": 2.0, "coordinates": 1.0, "lattice": 1.0, "site": 2.0, "element": 2.0}
THREE = (3, 9, 17)  # Li, F, Cl
SMALL = SamplerOptions(elements=THREE, max_atoms=8)
FIXED = {1: (0.0, 0.0, 0.0), 2: (0.5, 0.5, 0.5), 3: (0.25, 0.25, 0.25)}  # positions a, b, c of Fm-3m


def prior_of(groups=(225,), options=SMALL, seed=4, order="site"):
    """A tiny model whose choices hang on each other strongly, so that a wrong ratio shows."""
    model = tiny_model(seed=seed, order=order)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return Prior(model, options, space_group_prior(model, list(groups), options.max_atoms))


def reward_of(key):
    """Some number from -1 to 1 of letters and elements; whatever it is."""
    return math.sin(sum((7 * i + 3) * w * 1.7 + (5 * i + 1) * a * 0.9 for i, (w, a) in enumerate(key)))


def keys(crystals):
    """(letter, element) of each site."""
    pairs = zip(crystals.wyckoff.tolist(), crystals.species.tolist(), strict=True)
    return [tuple((w, a) for w, a in zip(*pair, strict=True) if w) for pair in pairs]


def tilt(crystals):
    return torch.tensor([1.5 * reward_of(key) for key in keys(crystals)], dtype=torch.float64)


def enumerated(prior):
    """Every crystal of Fm-3m within 8 atoms (a, b, c and ab) and its share of p exp(tilt)."""
    outcomes = [
        tuple(zip(letters, elements, strict=True))
        for letters in [(1,), (2,), (3,), (1, 2)]
        for elements in itertools.product(THREE, repeat=len(letters))
    ]
    padded = [(*outcome, (0, 0))[:2] for outcome in outcomes]
    batch = CrystalBatch(
        torch.full((len(outcomes),), 225),
        torch.tensor([[w for w, _ in sites] for sites in padded]),
        torch.tensor([[a for _, a in sites] for sites in padded]),
        torch.tensor([[FIXED.get(w, (0.0, 0.0, 0.0)) for w, _ in sites] for sites in padded]).double(),
        torch.tensor([[5.0, 5.0, 5.0, 90.0, 90.0, 90.0]]).double().repeat(len(outcomes), 1),
    )
    scores = prior.model.log_prob(batch, prior.options)
    weight = (scores["wyckoff"] + scores["species"] + tilt(batch)).detach().exp()
    return dict(zip(outcomes, (weight / weight.sum()).tolist(), strict=True))


def moved(prior, crystals, weights, steps, seed=1, tilt=tilt):
    tally = Tally()
    end, risen, _ = walk(prior, crystals, tilt, steps, torch.Generator().manual_seed(seed), weights, tally)
    torch.testing.assert_close(tilt(end) - tilt(crystals), risen)
    return end, tally


def compared(crystals, expected):
    """p-value of the chi-square test of these crystals against shares by key, the rare ones taken together."""
    found = Counter(keys(crystals))
    assert set(found) <= set(expected)
    pairs = sorted((share * found.total(), found[key]) for key, share in expected.items())
    rare = [pair for pair in pairs if pair[0] < 5]
    pairs = [tuple(map(sum, zip(*rare, strict=True))), *pairs[len(rare) :]] if rare else pairs
    wanted, observed = zip(*pairs, strict=True)
    return stats.chisquare(observed, wanted).pvalue


@pytest.mark.parametrize("weights", [{"fresh": 1.0}, {"regrow": 1.0}, ALL], ids=["fresh", "regrow", "all"])
@pytest.mark.parametrize("order", TOKENS)
def test_stationary_distribution_is_the_enumerated_one(weights, order):
    prior = prior_of(order=order)
    expected = enumerated(prior)
    start = draw(prior.model, torch.full((4000,), 225), SMALL, torch.Generator().manual_seed(0))
    assert compared(start, expected) < 1e-6  # the model's crystals are others
    # all crystals make the same kind of move at a time: of 40 steps too few may be to fresh ones
    end, _ = moved(prior, start, weights, 120 if weights is ALL else 40)
    assert compared(end, expected) > 1e-3


@pytest.mark.parametrize("name", ["site", "element"])
def test_substitution_alone_reaches_what_it_can(name):
    """`site` keeps the letters; `element` also which sites are alike. Within such a class shares are as enumerated."""

    def class_of(key):
        elements = [a for _, a in key]
        return tuple(w for w, _ in key), name == "element" and tuple(map(elements.index, elements))

    prior = prior_of()
    expected = enumerated(prior)
    start = draw(prior.model, torch.full((3000,), 225), SMALL, torch.Generator().manual_seed(0))
    end, tally = moved(prior, start, {name: 1.0}, 80)
    assert [class_of(key) for key in keys(start)] == [class_of(key) for key in keys(end)]
    assert tally.rates()[name] > 0.05
    for kind in {class_of(key) for key in expected}:
        inside = {key: share for key, share in expected.items() if class_of(key) == kind}
        rows = [row for row, key in enumerate(keys(end)) if key in inside]
        total = sum(inside.values())
        if len(inside) == 1 or len(rows) < 50:
            continue
        assert compared(end[rows], {key: share / total for key, share in inside.items()}) > 1e-4


def geometric(crystals):
    """A tilt of all that there is: letters, elements, coordinates and lattice. Between -3 and 3."""
    lengths = (crystals.lattice[:, :3].double() / 3).sin().sum(1) / 3
    there = (crystals.wyckoff > 0)[..., None]  # however wide the padding
    x = ((2 * math.pi * crystals.frac_coords.double()).cos() * there).sum((1, 2)).sin()
    return lengths + x + (1.3 * crystals.species.double() + crystals.wyckoff).sum(1).sin()


def exact(prior, n, seed):
    """n draws of p exp(geometric), by rejection."""
    generator = torch.Generator().manual_seed(seed)
    drawn = prior.draw(prior.space_groups(12 * n, generator), generator)
    good = accept(geometric(drawn) - 3, generator)
    assert good.sum() > n / 6
    return drawn[good]


def watched(crystals):
    """What distributions are compared by."""
    first = crystals.frac_coords[:, 0].double()
    return {
        "sites": crystals.num_sites.double(),
        "group": crystals.space_group.double(),
        "element": crystals.species[:, 0].double(),
        "elements": crystals.species.double().sum(1),
        "x": first.sum(1),
        "last x": crystals.frac_coords.double().sum((1, 2)),
        "a": crystals.lattice[:, 0].double(),
        "tilt": geometric(crystals),
        "log_prob": crystals.properties["log_prob"],
    }


@pytest.mark.parametrize("order", TOKENS)
@pytest.mark.parametrize("name", MOVES)
def test_a_move_leaves_the_distribution_as_it_is(name, order):
    """From exact draws of the target to exact draws of the target, coordinates, lattice and space groups included."""
    prior = prior_of((4, 99, 186), SamplerOptions(elements=THREE, max_atoms=8), order=order)
    start, other = exact(prior, 1500, 0), exact(prior, 1500, 7)
    end, tally = moved(prior, start, {name: 1.0}, 4, tilt=geometric)
    assert 0.02 < tally.rates()[name] < 1
    scores = prior.model.log_prob(end, prior.options)
    for factor, values in scores.items():
        torch.testing.assert_close(values.detach(), end.properties[f"log_prob/{factor}"], atol=1e-6, rtol=1e-6)
    for what, values in watched(end).items():
        assert stats.ks_2samp(values, watched(other)[what]).pvalue > 1e-4, what


def test_a_walk_proposes_to_another_target():
    """What a walk by one tilt ends in is taken or not by another: the chain follows the latter."""
    prior = prior_of()
    expected = enumerated(prior)
    generator = torch.Generator().manual_seed(3)
    now = draw(prior.model, torch.full((2000,), 225), SMALL, generator)

    def wrong(crystals):  # one that leads the wrong way (-0.6) does it too, in 60 rounds
        return 0.4 * tilt(crystals)

    for _ in range(30):
        new, risen, stirred = walk(prior, now, wrong, 3, generator, ALL, Tally())
        same = torch.tensor([a == b for a, b in zip(keys(now), keys(new), strict=True)])
        assert (same | stirred).all()
        now = chosen(new, now, accept(tilt(new) - tilt(now) - risen, generator))
    assert compared(now, expected) > 1e-3


def test_what_is_given_is_fed_and_counted():
    prior = prior_of((4, 99, 186))
    generator = torch.Generator().manual_seed(0)
    crystals = prior.draw(prior.space_groups(300, generator), generator)
    sites = crystals.num_sites
    same = prior.draw(crystals.space_group, generator, Given(crystals, sites + 1, sites, sites))
    assert torch.equal(same.wyckoff, crystals.wyckoff)
    assert torch.equal(same.species, crystals.species)
    torch.testing.assert_close(same.frac_coords, crystals.frac_coords)
    for factor in ("wyckoff", "species", "coords"):
        torch.testing.assert_close(
            same.properties[f"log_prob/{factor}"], crystals.properties[f"log_prob/{factor}"], atol=1e-8, rtol=1e-8
        )
    assert (same.lattice != crystals.lattice).any(1).all()
    one = torch.ones_like(sites)
    grown = prior.draw(crystals.space_group, generator, Given(crystals, one, one, one))
    assert torch.equal(grown.species[:, 0], crystals.species[:, 0])
    torch.testing.assert_close(grown.frac_coords[:, 0], crystals.frac_coords[:, 0])
    assert not torch.equal(grown.num_sites, sites)


def test_the_impossible_is_never_taken():
    generator = torch.Generator().manual_seed(0)
    odds = torch.tensor([0.0, -torch.inf, torch.nan, 5.0]).double().repeat(1000)
    assert accept(odds, generator).view(-1, 4).all(0).tolist() == [True, False, False, True]
    assert not accept(odds, generator).view(-1, 4)[:, 1:3].any()


# ---- on the real model -----------------------------------------------------------------------------------------------


def test_mean_of_the_real_model_is_that_of_weighted_draws():
    """Density, with its logarithm as tilt: within the standard errors of both ways of asking."""
    model = cfrl.load_model()
    options = SamplerOptions(max_atoms=12)
    prior = Prior(model, options, space_group_prior(model, [225, 221, 139, 123], 12))

    def dense(crystals):
        return (2 * crystals.densities().double().log()).masked_fill(~crystals.possible_cells(), -torch.inf)

    generator = torch.Generator().manual_seed(0)
    drawn = prior.draw(prior.space_groups(3000, generator), generator)
    weight, value = dense(drawn).exp(), drawn.densities().double().nan_to_num()
    mean = float((weight * value).sum() / weight.sum())
    error = float((weight * (value - mean)).square().sum().sqrt() / weight.sum())
    start = drawn[dense(drawn).isfinite()][:500]
    end, tally = moved(prior, start, ALL, 24, tilt=dense)
    assert min(tally.rates().values()) > 0.05
    chain = end.densities().double()
    assert abs(float(chain.mean()) - mean) < 4 * math.hypot(error, float(chain.std()) / math.sqrt(len(chain)))
    assert mean - float(value.mean()) > 6 * error  # it is another distribution


# ---- how well --------------------------------------------------------------------------------------------------------


def test_effective_size_and_temperature():
    assert effective_size(torch.zeros(50).double()) == pytest.approx(50)
    assert effective_size(torch.tensor([0.0, -1e5, -1e5])) == pytest.approx(1)
    energy = 8 * torch.special.ndtri((torch.arange(20_000).double() + 0.5) / 20_000)  # normal, of deviation 8
    there = next_temperature(energy, 0.1, 10_000)
    assert effective_size((there - 0.1) * energy) == pytest.approx(10_000, rel=1e-3)
    # the effective share of normal energies is exp(-(step * deviation)^2)
    assert (there - 0.1) * 8 == pytest.approx(math.sqrt(math.log(2)), rel=0.02)
    assert next_temperature(energy * 1e-3, 0.5, 500) == 1.0


def test_systematic_resampling_is_fair():
    log_weight = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts = torch.stack(
        [torch.bincount(systematic(log_weight, 10, torch.Generator().manual_seed(s)), minlength=4) for s in range(400)]
    ).double()
    wanted = torch.tensor([5.0, 3.0, 1.5, 0.5]).double()
    assert ((counts - wanted).abs() < 1 + 1e-9).all()
    torch.testing.assert_close(counts.mean(0), wanted, atol=0.1, rtol=0)
    assert set(systematic(torch.tensor([-torch.inf, 0.0, 0.0]), 8, torch.Generator()).tolist()) == {1, 2}


def test_mixing_of_known_chains():
    """Independent draws, AR(1) chains of known autocorrelation time, and chains that stay apart."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 400, generator=generator).double()
    assert split_r_hat(noise) == pytest.approx(1, abs=0.01)
    assert effective_draws(noise) == pytest.approx(noise.numel(), rel=0.1)
    phi, chain = 0.8, [noise[:, 0]]
    for step in noise[:, 1:].T:
        chain.append(phi * chain[-1] + math.sqrt(1 - phi**2) * step)
    chain = torch.stack(chain, 1)
    assert effective_draws(chain) == pytest.approx(chain.numel() * (1 - phi) / (1 + phi), rel=0.2)
    assert split_r_hat(noise + 3 * torch.arange(64)[:, None]) > 5
    assert math.isnan(split_r_hat(noise[:, :3]))
    assert math.isnan(effective_draws(torch.zeros(4, 20)))

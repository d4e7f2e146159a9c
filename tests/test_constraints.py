"""What is asked for is drawn, all of it and nothing else; what is open is what can still be met, by brute force."""

from collections import Counter
from dataclasses import replace
from math import gcd

import pytest
import torch

import cfrl
from cfrl.commands.finetune import start
from cfrl.config import FinetuneConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS, SYMBOLS
from cfrl.crystals.wyckoff import arrays
from cfrl.errors import UserError
from cfrl.model.constraints import MOST_ATOMS, Composition, Demand, Template
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import draw
from cfrl.model.options import Wishes
from cfrl.model.sampler import evidence, space_group_shares
from cfrl.model.wishes import parse_formula, sampler_options
from tests.test_model import tiny_model

LI, OX, MN = 3, 8, 25
SITES = 3


# ---- what is open --------------------------------------------------------------------------------------------------


def sequences(group: int, elements: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """All crystals of up to three sites, as (letter, element) pairs in an order that a model may write."""
    dof, last = arrays()["dof"][group], int(arrays()["num_letters"][group])
    found, open_ = [], [()]
    for _ in range(SITES):
        open_ = [
            (*sites, (letter, element))
            for sites in open_
            for letter in range(sites[-1][0] + (dof[sites[-1][0]] == 0) if sites else 1, last + 1)
            for element in elements
        ]
        found += open_
    return found


def contents(group: int, sites: tuple[tuple[int, int], ...]) -> Counter:
    amount = Counter()
    for letter, element in sites:
        amount[element] += int(arrays()["multiplicity"][group, letter])
    return amount


def is_formula(amounts: list[int], wanted: tuple[int, ...]) -> bool:
    divisor = gcd(*amounts)
    return [a // divisor for a in amounts] == list(wanted)


CASES = {
    "formula": (Demand((LI, OX), 0, ((2, 1),)), lambda c: set(c) == {LI, OX} and is_formula([c[LI], c[OX]], (2, 1))),
    "units": (Demand((LI, OX), 0, ((1, 1),), units=(2, 3)), lambda c: set(c) == {LI, OX} and c[LI] == c[OX] in (2, 3)),
    "range": (
        Demand((LI, OX), 0, ((1, 1), (1, 2))),
        lambda c: set(c) == {LI, OX} and any(is_formula([c[LI], c[OX]], (1, k)) for k in (1, 2)),
    ),
    "anonymous": (
        Demand((OX,), 1, ((1, 2),)),
        lambda c: len(c) == 2 and c[OX] > 0 and is_formula([c[OX], c[next(e for e in c if e != OX)]], (1, 2)),
    ),
    "two anonymous": (
        Demand((), 2, ((1, 2),)),
        lambda c: len(c) == 2 and is_formula(sorted(c.values()), (1, 2)),
    ),
    "system": (Demand((LI, OX)), lambda c: set(c) == {LI, OX}),
    "required": (Demand((OX,), others=True), lambda c: c[OX] > 0),
    "atoms": (Demand(others=True, atoms=(4, 6)), lambda c: 4 <= sum(c.values()) <= 6),
    "required in so many atoms": (
        Demand((OX,), others=True, atoms=(3, 8)),
        lambda c: c[OX] > 0 and 3 <= sum(c.values()) <= 8,
    ),
}


@pytest.mark.parametrize("group", [1, 25, 115, 139, 147, 221, 225])
@pytest.mark.parametrize("case", CASES)
def test_a_choice_is_open_exactly_where_some_way_to_go_on_meets_the_demand(case, group):
    demand, met = CASES[case]
    elements = (LI, OX, MN) if demand.anonymous or demand.others else (LI, OX)
    constraint = Composition(demand, [group], SITES)
    unit = gcd(*arrays()["multiplicity"][group].tolist())
    most = MOST_ATOMS * unit if demand.amounts and not demand.units else 10**9
    good = [
        sites
        for sites in sequences(group, elements)
        if met(contents(group, sites)) and contents(group, sites).total() <= most
    ]
    assert bool(constraint.feasible()[group]) == bool(good)
    if not good:
        return
    begun = {sites[:k] for sites in good for k in range(len(sites) + 1)}
    following = {prefix: set() for prefix in begun}
    for sites in good:
        for k in range(len(sites)):
            following[sites[:k]].add(sites[k])
    for prefix in begun:
        state = constraint.start(1, torch.device("cpu"))
        g = torch.tensor([group])
        for letter, element in prefix:
            state = constraint.after(state, g, torch.tensor([letter]), torch.tensor([element]))
        letters = ~constraint.letters(state, g)[0].isneginf()
        lowest = prefix[-1][0] + (arrays()["dof"][group, prefix[-1][0]] == 0) if prefix else 1
        letters[1:lowest] = False  # the order of letters is the network's own mask
        stop = {0} if prefix in good else set()
        assert set(letters.nonzero()[:, 0].tolist()) == {letter for letter, _ in following[prefix]} | stop
        for letter in {letter for letter, _ in following[prefix]}:
            allowed = ~constraint.species(state, g, torch.tensor([letter]))[0].isneginf()
            shown = {e for e in allowed.nonzero()[:, 0].tolist() if e in elements}
            assert shown == {element for at, element in following[prefix] if at == letter}


@pytest.mark.parametrize("sites", [(1, 1), (2, 2), (2, 3)])
def test_so_many_sites_and_no_others(sites):
    constraint = Composition(Demand((LI, OX), 0, ((1, 1),), sites=sites), range(1, 231), 6)
    groups = constraint.feasible().nonzero()[:, 0]
    if sites == (1, 1):  # two elements need two sites
        assert not len(groups)
        return
    crystals = draw(tiny_model(), groups, SamplerOptions(constraint=constraint), torch.Generator().manual_seed(0))
    assert sites[0] <= crystals.num_sites.min()
    assert crystals.num_sites.max() <= sites[1]
    assert set(crystals.formulas()) == {"LiO"}


# ---- one distribution ----------------------------------------------------------------------------------------------

ASKED = {
    "formula": Wishes(formula="LiMn2O4"),
    "anonymous": Wishes(formula="A2BO4", exclude="radioactive"),
    "anonymous, one given": Wishes(formula="ABO3", require="Ti"),
    "range": Wishes(formula="Li1-2MnO3", z="1-4"),
    "system": Wishes(system="Li-Mn-O"),
    "required": Wishes(require="O", num_atoms="4-12", num_sites="2-3"),
    "favoured": Wishes(favour="O=3,Li=-2", elements="Li,O,Mn"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_log_prob_of_a_constrained_draw_is_what_the_sampler_says(asked, temperature, top_p):
    model = tiny_model()
    options = sampler_options(ASKED[asked], model.config.max_sites - 1, temperature, top_p)
    groups = torch.arange(1, 231) if options.constraint is None else options.constraint.feasible().nonzero()[:, 0]
    crystals = draw(model, groups, options, torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = model.log_prob(crystals, options)
    assert options.constraint is None or options.constraint.met_by(crystals).all()
    for name, values in scores.items():
        torch.testing.assert_close(values, crystals.properties[f"log_prob/{name}"], atol=1e-8, rtol=1e-8)


def test_what_does_not_meet_the_demand_has_no_probability():
    model = tiny_model()
    options = sampler_options(Wishes(formula="LiMn2O4"), model.config.max_sites - 1)
    crystals = draw(model, torch.tensor([225, 14, 2]), SamplerOptions(), torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (sum(model.log_prob(crystals, options).values()) < -1e8).all()


def test_evidence_is_the_share_of_free_draws_that_meet_the_demand():
    """Within four standard errors of both estimates, for a demand that is often met."""
    model, n, group = tiny_model(), 4000, torch.tensor([221])
    free = draw(model, group.expand(n), SamplerOptions(), torch.Generator().manual_seed(0))
    common = int(free.species[free.species > 0].mode().values)
    asked = Wishes(require=SYMBOLS[common], num_sites="1-3", space_group="221")
    options = sampler_options(asked, model.config.max_sites - 1)
    met = ((free.species == common).any(1) & (free.num_sites <= 3)).double()
    told = evidence(model, group.expand(200), torch.arange(200) % 4 + 1, options).double().exp()
    error = (met.var() / n + told.var() / 200).sqrt()
    assert 0.01 < met.mean() < 0.99
    assert options.constraint.met_by(free).tolist() == met.bool().tolist()
    assert abs(met.mean() - told.mean()) < 4 * error
    assert error < 0.2 * met.mean()


def test_favoured_elements_come_as_much_more_often():
    """The odds of an element change by the factor that was asked for."""
    model, group = tiny_model(), torch.full((1,), 225)
    plain = sampler_options(Wishes(num_sites="1"), model.config.max_sites - 1)
    favoured = replace(plain, favour=((OX, 1.5),))
    crystal = CrystalBatch(group, torch.tensor([[1]]), torch.tensor([[OX]]), torch.zeros(1, 1, 3), torch.ones(1, 6))
    with torch.no_grad():
        p, q = (model.log_prob(crystal, o)["species"].exp() for o in (plain, favoured))
    assert float((q / (1 - q)) / (p / (1 - p))) == pytest.approx(torch.tensor(1.5).exp().item(), rel=1e-6)


# ---- on the embedded model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "reduced"),
    [
        ("NaCl", "NaCl"),
        ("MgO", "MgO"),
        ("GaAs", "GaAs"),
        ("TiO2", "TiO2"),
        ("BaTiO3", "BaTiO3"),
        ("LiFePO4", "LiFePO4"),
        ("MgB2", "MgB2"),
        ("Ca(OH)2", "CaH2O2"),
        ("Li0.5CoO2", "LiCo2O4"),
    ],
)
def test_a_formula_comes_out_as_itself(formula, reduced):
    crystals = cfrl.sample(cfrl.load_model(), 12, formula=formula, space_group=[1, 2, 14, 62, 194, 225, 227], seed=0)
    assert set(crystals.formulas()) == {reduced}
    structures = crystals[:3].to_structures()
    assert {s.composition.reduced_formula for s in structures} == {
        CrystalBatch.from_structures(structures[:1]).to_structures()[0].composition.reduced_formula
    }


def test_a_system_is_kept_and_whole():
    crystals = cfrl.sample(
        cfrl.load_model(), 40, system="Li-Mn-O", space_group="12,62,166,225", num_atoms="1-40", seed=0
    )
    assert {frozenset(row) - {0} for row in crystals.species.tolist()} == {frozenset({LI, MN, OX})}
    assert crystals.num_atoms.max() <= 40


def test_excluded_elements_stay_away():
    excluded = {8, *range(84, 90), 43, 61}
    crystals = cfrl.sample(cfrl.load_model(), 200, exclude="radioactive,O", seed=0)
    assert not excluded & set(crystals.species.unique().tolist())


def test_the_shares_of_space_groups_follow_the_formula():
    """Rock salt for NaCl and spinel for MgAl2O4 are what the model learnt."""
    model = cfrl.load_model()
    for formula, groups, best in (("NaCl", "225,62,14,2", 225), ("MgAl2O4", "227,12,14,62", 227)):
        asked = Wishes(formula=formula, space_group=groups)
        shares = space_group_shares(model, asked, sampler_options(asked, model.config.max_sites - 1))
        assert shares.argmax() == best
        assert shares.exp()[best] > 0.5


def test_density_and_volume_are_kept_to():
    model = cfrl.load_model()
    crystals = cfrl.sample(model, 40, density="5-6", volume_per_atom="10-20", elements="Ti,O,Ba,Sr,Ca,Mg", seed=0)
    density, volume = crystals.densities(), crystals.volumes() / crystals.num_atoms
    assert len(crystals) == 40
    assert 5 <= density.min() <= density.max() <= 6
    assert 10 <= volume.min() <= volume.max() <= 20
    with pytest.raises(UserError, match="range such as"):
        cfrl.sample(model, 1, density="heavy")


# ---- like a crystal ------------------------------------------------------------------------------------------------


@pytest.fixture
def rock_salt(tmp_path):
    path = tmp_path / "rock_salt.cif"
    crystals = CrystalBatch(
        torch.tensor([225]),
        torch.tensor([[1, 2]]),
        torch.tensor([[11, 17]]),
        torch.tensor([[[0, 0, 0], [0.5, 0.5, 0.5]]]),
        torch.tensor([[5.6, 5.6, 5.6, 90, 90, 90.0]]),
    )
    crystals.to_structures()[0].to(str(path))
    return str(path)


def test_like_keeps_the_prototype_the_elements_or_the_formula(rock_salt):
    model = cfrl.load_model()
    same = cfrl.sample(model, 30, like=rock_salt, seed=0)
    assert set(same.space_group.tolist()) == {225}
    assert same.wyckoff.unique(dim=0).tolist() == [[1, 2]]
    assert len(set(same.formulas())) > 5
    assert all(a != b for a, b in same.species.tolist())  # two elements stay two
    moved = cfrl.sample(model, 30, like=rock_salt, vary="coordinates", seed=0)
    assert set(moved.formulas()) == {"NaCl"}
    assert moved.lattice[:, 0].unique().numel() == 30
    other = cfrl.sample(model, 30, like=rock_salt, vary="space_group", seed=0)
    assert set(other.formulas()) == {"NaCl"}
    assert len(set(other.space_group.tolist())) > 1


def test_a_template_keeps_which_sites_share_an_element():
    template = Template(221, [1, 2, 3], [38, 22, 22], same_elements=False)
    options = SamplerOptions(constraint=template)
    crystals = draw(tiny_model(), torch.full((50,), 221), options, torch.Generator().manual_seed(0))
    assert (crystals.species[:, 1] == crystals.species[:, 2]).all()
    assert (crystals.species[:, 0] != crystals.species[:, 1]).all()


# ---- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "named", "anonymous", "formulas"),
    [
        ("LiMn2O4", "Li O Mn", 0, {(1, 4, 2)}),
        ("O2Ti", "O Ti", 0, {(2, 1)}),
        ("Ca(OH)2", "H O Ca", 0, {(2, 2, 1)}),
        ("A2BO4", "O", 2, {(4, 2, 1)}),
        ("A[B]O3", "B O", 1, {(1, 3, 1)}),
        ("ABX3", "", 3, {(1, 1, 3)}),
        ("BN", "B N", 0, {(1, 1)}),
        ("Li1-2MnO3", "Li O Mn", 0, {(1, 3, 1), (2, 3, 1)}),
        ("Li2O2", "Li O", 0, {(1, 1)}),
        ("Li0.5CoO2", "Li O Co", 0, {(1, 4, 2)}),
        ("NaClNa", "Na Cl", 0, {(2, 1)}),
    ],
)
def test_formulas_are_read(text, named, anonymous, formulas):
    elements, others, amounts = parse_formula(text)
    assert elements == tuple(ATOMIC_NUMBERS[name] for name in named.split())
    assert (others, set(amounts)) == (anonymous, formulas)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"formula": "Lq3"}, "no element Lq"),
        ({"formula": "li2o"}, "cannot be read"),
        ({"formula": ""}, None),
        ({"formula": "Li0"}, "above 0"),
        ({"formula": "Li1-900Mn1-900O1-900"}, "too many formulas"),
        ({"formula": "LiMn2O4", "exclude": "Mn"}, "leave out Mn"),
        ({"formula": "LiMn2O4", "system": "Li-O"}, "no crystal can be both"),
        ({"formula": "LiMn2O4", "require": "Fe"}, "no crystal can be both"),
        ({"formula": "ABO3", "require": "Ti,Sr,Ba"}, "no crystal can be both"),
        ({"formula": "ABO3", "elements": "Ti,O"}, "too few elements"),
        ({"formula": "LiMn2O4", "num_atoms": "3-5"}, "the smallest that can has 7 atoms"),
        ({"formula": "LiMn2O4", "space_group": "221", "num_sites": "2"}, "holds this formula"),
        ({"formula": "Li", "space_group": "225", "z": "3"}, "can"),
        ({"z": "4"}, "needs a --formula"),
        ({"system": "Li-Qq"}, "not an element"),
        ({"require": "Li", "exclude": "Li"}, "no crystal can be both"),
        ({"num_atoms": "9-4"}, "range such as 4-20"),
        ({"num_sites": "0"}, "above 0"),
        ({"num_atoms": "1-3", "space_group": "227"}, "can be so"),
        ({"favour": "O"}, "O=2"),
        ({"like": "nowhere.cif"}, "nowhere.cif"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(wishes, message):
    model = tiny_model()

    def ask():
        asked = Wishes(**wishes)
        space_group_shares(model, asked, sampler_options(asked, model.config.max_sites - 1))

    if message is None:
        ask()
        return
    with pytest.raises(UserError, match=message):
        ask()


# ---- in tuning -----------------------------------------------------------------------------------------------------


def test_tuning_draws_what_was_asked_for():
    model = tiny_model()
    tuned = cfrl.finetune(
        model,
        lambda crystals: _Scores(crystals),
        formula="ABO3",
        space_group="221",
        steps=2,
        n=16,
        scale_crystals=16,
        critic="off",
        hold=None,
    )
    formulas = tuned.crystals.formulas()
    assert all("O3" in formula for formula in formulas)
    assert tuned.metrics[0]["kl"] == pytest.approx(0, abs=1e-4)


class _Scores:
    def __init__(self, crystals):
        self.total = crystals.lattice[:, 0].double().numpy()
        self.status, self.terms = [""] * len(crystals), {}


def test_the_settings_of_a_run_hold_what_was_asked_for(tmp_path):
    tuning = start(FinetuneConfig(formula="SrTiO3", space_group="221"))
    crystals = draw(tuning.model, torch.full((20,), 221), tuning.sampler, torch.Generator().manual_seed(0))
    assert set(crystals.formulas()) == {"SrTiO3"}

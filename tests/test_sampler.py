"""Sampler and likelihood are one distribution; densities are densities; symmetry survives sampling."""

import itertools
import math
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from rich.console import Console
from scipy import integrate, stats

import cfrl
from cfrl.commands.finetune import start
from cfrl.commands.sample import run_sample
from cfrl.config import FinetuneConfig, SampleConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import NUM_ELEMENTS
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import REFUSED, Refusal, parse_refused
from cfrl.crystals.wyckoff import tables
from cfrl.errors import NotFinite, UserError
from cfrl.io.export import export_crystals
from cfrl.io.storage import read_crystals
from cfrl.model.distributions import IMPOSSIBLE, Categorical, LatticeMixture, SamplerOptions, VonMisesMixture, von_mises
from cfrl.model.drawing import draw
from cfrl.model.files import Extras, load_extras, load_model, save_model
from cfrl.model.network import TOKENS
from cfrl.model.sampler import sample, space_group_prior
from cfrl.model.transformer import CrystalTransformer
from tests.test_model import FACTORS, TINY, tiny_model

PLAIN = SamplerOptions()
PEROVSKITE = [[0] * 3, [0.5] * 3, [0.5, 0.5, 0]]
SHARP = SamplerOptions(temperature=0.6, top_p=0.8, elements=(3, 8, 22, 38), max_atoms=24)


# ---- one distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PLAIN, SHARP], ids=["plain", "temperature, top-p, masks"])
@pytest.mark.parametrize("order", TOKENS)
@pytest.mark.parametrize("descriptors", [False, True])
def test_log_prob_of_a_draw_is_what_the_sampler_says(options, descriptors, order):
    model = tiny_model(descriptors=descriptors, order=order)
    torch.manual_seed(0)
    crystals = draw(model, torch.arange(1, 231)[tables().multiplicity[1:, 1] <= 24], options)
    with torch.no_grad():
        scores = model.log_prob(crystals, options)
    for name in FACTORS:
        said = crystals.properties[f"log_prob/{name}"]
        torch.testing.assert_close(scores[name], said, atol=1e-8, rtol=1e-8)


def test_masks_hold():
    torch.manual_seed(0)
    crystals = draw(tiny_model(), torch.full((300,), 225), SHARP)
    assert set(crystals.species.unique().tolist()) <= {0, *SHARP.elements}
    assert crystals.num_atoms.max() <= SHARP.max_atoms
    t = tables()
    for wyckoff in crystals.wyckoff.tolist():
        occupied = [w for w in wyckoff if w]
        assert occupied == sorted(occupied)
        for letter, count in Counter(occupied).items():
            assert count == 1 or t.dof[225, letter] > 0


@pytest.mark.parametrize(
    "options",
    [
        SamplerOptions(elements=(3, 9), max_atoms=8),
        SamplerOptions(temperature=1.7, elements=(3, 9), max_atoms=8),
        SamplerOptions(top_p=0.7, elements=(3, 9), max_atoms=8),
    ],
    ids=["plain", "temperature", "top-p"],
)
@pytest.mark.parametrize("order", TOKENS)
def test_frequencies_of_discrete_choices(options, order):
    """Group 225 within 8 atoms has only a, b, c and ab: all outcomes are listed and counted (chi-square)."""
    model, n = tiny_model(seed=4, order=order), 20_000
    outcomes = [
        (letters, elements)
        for letters in [(1,), (2,), (3,), (1, 2)]
        for elements in itertools.product((3, 9), repeat=len(letters))
    ]
    fixed = {1: (0.0, 0.0, 0.0), 2: (0.5, 0.5, 0.5), 3: (0.25, 0.25, 0.25)}
    batch = CrystalBatch(
        torch.full((len(outcomes),), 225),
        torch.tensor([(*w, 0)[:2] for w, _ in outcomes]),
        torch.tensor([(*a, 0)[:2] for _, a in outcomes]),
        torch.tensor([[fixed.get(k, (0.0, 0.0, 0.0)) for k in (*w, 0)[:2]] for w, _ in outcomes]).double(),
        torch.tensor([[5.0, 5.0, 5.0, 90.0, 90.0, 90.0]]).double().repeat(len(outcomes), 1),
    )
    with torch.no_grad():
        scores = model.log_prob(batch, options)
    expected = (scores["wyckoff"] + scores["species"]).exp().numpy()
    assert expected.sum() == pytest.approx(1, abs=1e-9)

    torch.manual_seed(11)
    drawn = draw(model, torch.full((n,), 225), options)
    counts = Counter(
        (tuple(w for w in wyckoff if w), tuple(a for a in species if a))
        for wyckoff, species in zip(drawn.wyckoff.tolist(), drawn.species.tolist(), strict=True)
    )
    assert set(counts) <= set(outcomes)
    observed = np.array([counts[outcome] for outcome in outcomes])
    possible = expected > 1e-9
    assert observed[~possible].sum() == 0
    assert stats.chisquare(observed[possible], n * expected[possible]).pvalue > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        PLAIN,
        SamplerOptions(temperature=1.3, elements=(8, 22, 56), max_atoms=60),
        SamplerOptions(top_p=0.7, temperature=0.8, max_atoms=60),
    ],
    ids=["plain", "temperature, masks", "frozen nucleus"],
)
def test_importance_weights_average_to_one(options):
    """E_sampler[exp(log P_new - log P_sampler)] = 1 for any other model, within the nuclei of the sampler."""
    old, new = tiny_model(seed=1), tiny_model(seed=1)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for parameter in new.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    groups = torch.tensor([1, 14, 62, 166, 225]).repeat(1200)
    crystals = draw(old, groups, options, torch.Generator().manual_seed(2))
    nuclei = old.nuclei(crystals, options)
    with torch.no_grad():
        same = sum(old.log_prob(crystals, options, nuclei=nuclei, chunk=700).values())
        ratio = (sum(new.log_prob(crystals, options, nuclei=nuclei).values()) - same).exp()
    torch.testing.assert_close(same, crystals.properties["log_prob"])
    error = ratio.std() / math.sqrt(len(ratio))
    assert ratio.std() > 0.02  # the models do differ
    assert abs(float(ratio.mean()) - 1) < 4 * float(error)


def test_what_was_drawn_stays_possible():
    """Crystals of another sampler lie outside the nucleus: frozen with them it gives them a finite likelihood."""
    model, options = tiny_model(seed=1), SamplerOptions(top_p=0.3)
    crystals = draw(model, torch.tensor([14, 225]).repeat(50), PLAIN, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outside = sum(model.log_prob(crystals, options).values())
        inside = sum(model.log_prob(crystals, options, nuclei=model.nuclei(crystals, options)).values())
    assert outside.min() < IMPOSSIBLE / 2
    assert inside.min() > -1000
    assert model.nuclei(crystals, PLAIN) == {}


# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_coordinate_density_integrates_to_one_and_matches_its_samples(temperature):
    torch.manual_seed(0)
    logits, mean = torch.randn(2, 5, dtype=torch.float64)
    mixture = VonMisesMixture(logits, mean, torch.tensor([0.1, 2.0, 30.0, 900.0, 5.0]), SamplerOptions(temperature))
    grid = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)
    wide = VonMisesMixture(*(x.expand(len(grid), 5) for x in (logits, mean, mixture.concentration * temperature)),
                           SamplerOptions(temperature))  # fmt: skip
    density = wide.log_prob(grid).exp().numpy()
    assert integrate.simpson(density, x=grid.numpy()) == pytest.approx(1, abs=1e-6)
    samples = VonMisesMixture(*(x.expand(20_000, 5) for x in (logits, mean, mixture.concentration * temperature)),
                              SamplerOptions(temperature)).sample()  # fmt: skip
    cumulative = integrate.cumulative_simpson(density, x=grid.numpy(), initial=0)
    assert stats.kstest(samples.numpy(), lambda x: np.interp(x, grid.numpy(), cumulative)).pvalue > 1e-3


@pytest.mark.parametrize("kappa", [0.0, 1e-9, 1e-4, 0.3, 1.0, 30.0, 9e5, 1.1e6, 1e12])
def test_von_mises_draws_are_von_mises(kappa):
    angles = von_mises(torch.full((20_000,), kappa, dtype=torch.float64), torch.Generator().manual_seed(1)).numpy()
    assert np.abs(angles).max() <= math.pi
    if kappa < 1e-8:
        law = stats.uniform(-math.pi, 2 * math.pi)
    else:
        law = stats.norm(scale=kappa**-0.5) if kappa > 1e5 else stats.vonmises(kappa)
    assert stats.kstest(angles, law.cdf).pvalue > 1e-3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_cannot_be_drawn(bad):
    with pytest.raises(NotFinite, match="weights are damaged"):
        von_mises(torch.tensor([1.0, bad], dtype=torch.float64))
    with pytest.raises(NotFinite, match="weights are damaged"):
        VonMisesMixture(torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2, 3), bad), PLAIN).sample()
    with pytest.raises(NotFinite, match="weights are damaged"):
        Categorical(torch.full((2, 3), bad), None, PLAIN).sample()
    model = tiny_model()
    with torch.no_grad():
        model.head.bias.fill_(bad)
    with pytest.raises(NotFinite, match="weights are damaged"):
        sample(model, 2, space_group=225, seed=0)


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_end(temperature):
    crystals = sample(tiny_model(), 4, space_group=[2, 14], temperature=temperature, seed=0, keep_invalid=True)
    assert len(crystals) == 4
    assert crystals.properties["log_prob"].isfinite().all()


@pytest.mark.parametrize("free", [(0,), (0, 2), (0, 1, 4)], ids=["cubic", "tetragonal", "three of six"])
def test_joint_lattice_density_integrates_to_one(free):
    torch.manual_seed(0)
    mask = torch.zeros(6, dtype=torch.bool)
    mask[list(free)] = True
    logits, mean, std = torch.randn(3), torch.randn(3, 6), torch.rand(3, 6) + 0.2
    axis = torch.linspace(-7, 7, 121, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * len(free)).reshape(-1, len(free))
    value = torch.zeros(len(points), 6, dtype=torch.float64)
    value[:, list(free)] = points
    n = len(points)
    mixture = LatticeMixture(
        logits.double().expand(n, 3), mean.double().expand(n, 3, 6), std.double().expand(n, 3, 6), mask, PLAIN
    )
    cell = float(axis[1] - axis[0]) ** len(free)
    assert float(mixture.log_prob(value).exp().sum()) * cell == pytest.approx(1, abs=1e-4)


def test_nucleus_keeps_the_smallest_sufficient_set():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = Categorical(logits, None, SamplerOptions(top_p=0.75)).log_probs.exp()
    torch.testing.assert_close(kept, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=1e-6, rtol=0)
    always_one = Categorical(logits, None, SamplerOptions(top_p=1e-6)).log_probs.exp()
    torch.testing.assert_close(always_one, torch.tensor([1.0, 0.0, 0.0, 0.0]), atol=1e-6, rtol=0)


# ---- symmetry --------------------------------------------------------------------------------------------------------


def plausible_model() -> CrystalTransformer:
    """Untrained, but for cells of a likely size and shape, so that most of its crystals are possible."""
    model = tiny_model()
    k = TINY.lattice_components
    with torch.no_grad():
        lattice = model.head.bias[NUM_ELEMENTS + k : NUM_ELEMENTS + 7 * k].view(k, 6)
        lattice.copy_(torch.tensor([3.5, 3.5, 3.5, 1.5, 1.5, 1.5]))
        model.head.bias[NUM_ELEMENTS + 7 * k : NUM_ELEMENTS + 13 * k] = -3.0
    return model


def test_sampled_crystals_have_the_space_group_that_was_asked_for():
    """An untrained model, every group: moyo finds it or a supergroup, for at least 99% of the valid crystals."""
    import moyopy

    torch.manual_seed(3)
    crystals = draw(plausible_model(), torch.arange(1, 231).repeat(4), SamplerOptions(max_atoms=200))
    crystals = crystals[crystals.valid(min_distance=0.3)]
    assert len(set(crystals.space_group.tolist())) > 200
    t, kept = tables(), 0
    for structure, group in zip(crystals.to_structures(), crystals.space_group.tolist(), strict=True):
        numbers = [site.specie.Z for site in structure]
        cell = moyopy.Cell(structure.lattice.matrix.tolist(), structure.frac_coords.tolist(), numbers)
        found = moyopy.MoyoDataset(cell, symprec=1e-3)
        # All operations of the group are operations of the crystal, so it must have at least as many.
        kept += found.operations.num_operations >= int(t.multiplicity[group, t.num_letters[group]])
    assert kept / len(crystals) >= 0.99


# ---- what users call -------------------------------------------------------------------------------------------------


def test_same_seed_same_crystals_and_no_trace_in_the_global_state():
    model = tiny_model()
    before = torch.get_rng_state()
    one, two, other = (sample(model, 30, seed=s, keep_invalid=True, draw_size=8) for s in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.frac_coords, two.frac_coords)
    assert torch.equal(one.lattice, two.lattice)
    assert one.wyckoff.shape != other.wyckoff.shape or not torch.equal(one.wyckoff, other.wyckoff)


def test_without_a_seed_other_crystals_come_each_time():
    torch.manual_seed(0)
    one = sample(tiny_model(), 30, keep_invalid=True)
    torch.manual_seed(0)
    two = sample(tiny_model(), 30, keep_invalid=True)
    assert one.formulas() != two.formulas()


def test_another_thread_may_draw_meanwhile():
    """The scoring thread of a tuning run loads models, which draw their first weights from torch's global state."""
    model, stop = tiny_model(), threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            torch.randn(10)

    alone = sample(model, 60, seed=7, keep_invalid=True, draw_size=8)
    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        beside = sample(model, 60, seed=7, keep_invalid=True, draw_size=8)
    finally:
        stop.set()
        thread.join()
    assert torch.equal(alone.frac_coords, beside.frac_coords)
    assert torch.equal(alone.lattice, beside.lattice)


def test_invalid_crystals_are_drawn_again_in_their_own_group():
    model = plausible_model()
    crystals = sample(model, 40, space_group=[2, 225], seed=0)
    assert len(crystals) == 40
    assert crystals.properties["valid"].all()
    assert crystals.valid().all()
    assert (crystals.properties["draws"] >= 1).all()
    assert crystals.properties["draws"].max() > 1  # some had to be drawn again
    assert set(crystals.space_group.tolist()) == {2, 225}


def test_atoms_that_overlap_are_moved_and_letters_and_elements_stay():
    """Rare kinds of crystals overlap most: if they were drawn anew, there would be fewer of them."""
    model = cfrl.load_model("small")
    assert model.config.order != "composition"
    as_they_come, apart = (sample(model, 96, seed=3, min_distance=0, min_contact=limit) for limit in (0, 0.7))
    overlap, still = as_they_come.closest_contacts() < 0.7, apart.closest_contacts() < 0.7
    assert 10 < overlap.sum() < 50
    assert still.sum() < overlap.sum() / 2
    assert torch.equal(apart.properties["draws"] > 1, overlap)
    assert (apart.properties["draws"][still] == 4).all()
    assert torch.equal(as_they_come.wyckoff, apart.wyckoff)
    assert torch.equal(as_they_come.species, apart.species)
    assert torch.equal(as_they_come.frac_coords[~overlap], apart.frac_coords[~overlap])
    with torch.no_grad():
        scores = sum(model.log_prob(apart).values())
    assert torch.allclose(scores.double(), apart.properties["log_prob"], atol=1e-3), "the model's own density"


def test_where_the_cell_comes_first_an_overlap_is_mended_as_it_is_drawn():
    """Of the same letters and elements, hardly any is left; most need no second geometry."""
    model = cfrl.load_model()
    assert model.config.order == "composition"
    as_they_come, apart = (sample(model, 256, seed=3, min_distance=0, min_contact=limit) for limit in (0, 0.7))
    overlap, still = as_they_come.closest_contacts() < 0.7, apart.closest_contacts() < 0.7
    assert 10 < overlap.sum() < 50
    assert still.sum() < overlap.sum() / 4
    assert (apart.properties["draws"] > 1).sum() < overlap.sum() / 2
    assert torch.equal(as_they_come.wyckoff, apart.wyckoff)
    assert torch.equal(as_they_come.species, apart.species)
    with torch.no_grad():
        scores = sum(model.log_prob(apart).values())
    assert torch.allclose(scores.double(), apart.properties["log_prob"], atol=1e-3), "the model's own density"


def test_space_group_prior():
    model = tiny_model()
    model.space_group_log_prob.fill_(-torch.inf)
    model.space_group_log_prob[[14, 225]] = torch.tensor([0.75, 0.25], dtype=torch.float64).log()
    assert space_group_prior(model).exp()[[14, 225]].tolist() == pytest.approx([0.75, 0.25])
    assert space_group_prior(model, [225]).exp()[225] == pytest.approx(1)
    assert space_group_prior(model, [1, 2]).exp()[1] == pytest.approx(
        0.5
    )  # not seen in training, asked for all the same
    assert torch.equal(space_group_prior(model, "14,225"), space_group_prior(model))
    assert torch.equal(space_group_prior(model, ""), space_group_prior(model))
    assert space_group_prior(model, "uniform").exp()[[14, 225]].tolist() == pytest.approx([0.5, 0.5])
    faults = (((231,), "from 1 to 230"), ((225, 3), "fits into 3 atoms"), (("Fm-3m",), "'Fm-3m'.* or uniform"))
    for arguments, message in faults:
        with pytest.raises(UserError, match=message):
            space_group_prior(model, *arguments)


@pytest.mark.parametrize("setting", ["", "uniform", "221,225"])
def test_a_space_group_setting_means_the_same_everywhere(tmp_path, setting):
    """`cfrl sample` draws in the groups from which a tuning run with the same setting starts."""
    model, path = tiny_model(), tmp_path / "model.safetensors"
    shares = torch.zeros(231).index_fill(0, torch.tensor([1, 221, 225]), 1.0)
    shares[1] = 98
    model.space_group_log_prob.copy_((shares / shares.sum()).log())
    save_model(model, path)
    tuning = start(FinetuneConfig(model=str(path), space_group=setting, device="cpu"))
    config = SampleConfig(n=200, model=str(path), space_group=setting, keep_invalid=True)
    drawn = read_crystals(run_sample(config, str(tmp_path / "drawn.h5")))
    expected = tuning.prior.log_prob().exp() * 200
    counts = torch.bincount(drawn.space_group, minlength=231)
    assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1e-9).all()
    assert {int(g) for g in drawn.space_group.unique()} <= {int(g) for g in expected.nonzero()}


def test_elements_must_exist():
    with pytest.raises(UserError, match="Xx"):
        cfrl.sample(tiny_model(), 1, elements=["Xx"])


@pytest.mark.parametrize("name", ["out.h5", "out.csv", "out.extxyz", "out.zip", "folder"])
def test_exported_crystals_come_back(tmp_path, name):
    from pymatgen.analysis.structure_matcher import StructureMatcher

    from cfrl.io.datasets import read_structures

    crystals = sample(plausible_model(), 6, seed=1, max_atoms=40)
    path = export_crystals(crystals, tmp_path / name)
    if name == "out.h5":
        back = read_crystals(path).to_structures()
        torch.testing.assert_close(read_crystals(path).properties["log_prob"], crystals.properties["log_prob"])
    else:
        back = read_structures(path)[0]
    matcher = StructureMatcher(primitive_cell=False, scale=False, ltol=1e-3, stol=1e-3, angle_tol=0.1)
    assert all(matcher.fit(a, b) for a, b in zip(crystals.to_structures(), back, strict=True))


def test_export_refuses_what_it_cannot_write(tmp_path):
    crystals = sample(tiny_model(), 1, seed=1)
    with pytest.raises(UserError, match="cannot tell the format"):
        export_crystals(crystals, tmp_path / "out.pdf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("data")
    with pytest.raises(UserError, match="not an empty folder"):
        export_crystals(crystals, tmp_path / "full")
    assert (tmp_path / "full" / "precious.txt").exists()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_wanted_is_drawn_and_nothing_else_changes():
    model = tiny_model(descriptors=True)

    def light(crystals: CrystalBatch) -> np.ndarray:
        return (crystals.species[:, 0] <= 50).numpy()

    every = sample(model, 64, seed=5, keep_invalid=True)
    kept = sample(model, 64, seed=5, keep_invalid=True, wanted=light)
    assert len(kept) == 64
    assert light(kept).all()
    rows = np.flatnonzero(light(every))
    assert 10 < len(rows) < 64
    assert torch.equal(kept.lattice[: len(rows)], every[rows].lattice)
    with pytest.raises(UserError, match="were not refused"):
        sample(model, 1, seed=5, keep_invalid=True, wanted=lambda crystals: np.zeros(len(crystals), dtype=bool))


def test_a_refusal_names_what_a_formula_meets_and_counts():
    refusal = Refusal(REFUSED, KnownFormulas.of(["NaCl"]))
    formulas = ["NaCl", "MgO", "Cu", "KrF", "TcO2", "NaCl3", "TiAl"]
    assert refusal.reasons(formulas) == ["known", "", "element", "noble_gas", "radioactive", "not_neutral", ""]
    assert Refusal(["known"]).reasons(["NaCl", "Cu"]) == ["known", "known"]  # the embedded generator's own
    assert Refusal([]).reasons(formulas) == [""] * 7
    titanate = Structure.from_spacegroup(
        "Pm-3m", Lattice.cubic(4.0), ["Ba", "Ti", "O"], [[0] * 3, [0.5] * 3, [0.5, 0.5, 0]]
    )
    copper = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.6), ["Cu"], [[0] * 3])
    batch = CrystalBatch.from_structures([titanate, copper])
    assert refusal(batch).tolist() == [True, False]
    assert str(refusal) == "50% of 2 draws were refused (element 50%)"
    assert parse_refused("all") == REFUSED
    assert parse_refused("none") == ()
    with pytest.raises(UserError, match="did you mean 'element'"):
        parse_refused("elemnt")


def test_a_model_file_tells_what_its_crystals_should_not_be(tmp_path):
    model, path = tiny_model(), tmp_path / "tuned.safetensors"
    save_model(model, path, Extras(refusal=Refusal(["element", "known"], KnownFormulas.of(["BaTiO3", "NaCl"]))))
    refusal = load_extras(path).refusal
    assert refusal.names == ("known", "element")
    assert refusal.reasons(["BaTiO3", "Cu", "CaTiO3", "KrF"]) == ["known", "element", "", ""]
    for name, weight in load_model(path).state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])
    assert load_extras().refusal.names == ()  # the embedded model draws whatever it learned


def test_sample_refuses_what_the_tuning_did_unless_told_otherwise(tmp_path):
    from rich.console import Console

    path = tmp_path / "tuned.safetensors"
    save_model(load_model(), path, Extras(refusal=Refusal(["element", "known"])))
    known = KnownFormulas.embedded()

    def shares(**settings: str) -> tuple[float, float]:
        with Console(quiet=True) as console:
            run_sample(SampleConfig(n=100, model=str(path), **settings), str(tmp_path / "out.h5"), console)
        formulas = read_crystals(tmp_path / "out.h5").formulas()
        return known.holds(formulas).mean(), Refusal(["element"]).reasons(formulas).count("element") / 100

    assert shares() == (0.0, 0.0)
    assert shares(refuse="none")[0] > 0.15
    assert shares(refuse="element")[0] > 0.15
    assert shares(refuse="element")[1] == 0


def test_sample_says_how_many_have_no_overlap(tmp_path):
    told = Console(record=True, width=200)
    path = run_sample(SampleConfig(n=48, seed=3, min_contact=0.7), str(tmp_path / "apart.h5"), told)
    share = (read_crystals(path).closest_contacts() >= 0.7).double().mean()
    assert f"{share:.1%} have no overlap (of 0.7)" in told.export_text()

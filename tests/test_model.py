"""The network: against the published code's numbers, and against a second, naive implementation."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cfrl.commands.model import pack_model
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import Refusal
from cfrl.crystals.symmetry import multiplicity
from cfrl.crystals.wyckoff import tables
from cfrl.errors import UserError
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import draw
from cfrl.model.files import Extras, load_extras, load_model, save_model
from cfrl.model.layers import KeyValueCache
from cfrl.model.network import TOKENS, unscale_lattice
from cfrl.model.options import PRESETS, ModelConfig
from cfrl.model.published import import_published, read_checkpoint
from cfrl.model.transformer import CrystalTransformer
from cfrl.runs.folder import RunFolder

DATA = Path(__file__).parent / "data"  # numbers of the published code

TINY = ModelConfig(8, 12, 16, 2, 2, 8, 3, 4, 2, dropout=0.0)
FACTORS = ("wyckoff", "species", "coords", "lattice")


def tiny_model(seed: int = 0, **changes) -> CrystalTransformer:
    torch.manual_seed(seed)
    return CrystalTransformer(replace(TINY, **changes)).double().eval()


@pytest.fixture(scope="module")
def crystals() -> CrystalBatch:
    """Drawn by another tiny model: every kind of lattice and many Wyckoff positions."""
    torch.manual_seed(1)
    groups = torch.tensor([1, 2, 5, 12, 14, 31, 62, 74, 123, 139, 148, 160, 166, 176, 191, 194, 205, 216, 221, 225])
    return draw(tiny_model(5), groups).to(dtype=torch.float64)


# ---- the published code's numbers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published_crystals() -> CrystalBatch:
    file = np.load(DATA / "crystals.npz")
    group, wyckoff, species = (torch.tensor(file[name]).long() for name in "GWA")
    coords = torch.tensor(np.where(file["XYZ"] > 1e9, 0.0, file["XYZ"]))
    lattice = unscale_lattice(torch.tensor(file["L"]).double(), multiplicity(group, wyckoff).sum(1))
    return CrystalBatch(group, wyckoff, species, coords, lattice)


@pytest.fixture(params=["small", "alex20"])
def published(request) -> tuple[CrystalTransformer, Mapping[str, np.ndarray]]:
    """A model of the published code, and that code's numbers; the large one's weights are not in this repository."""
    if request.param == "small":
        return import_published(read_checkpoint(DATA / "small_epoch_000001.pkl")), np.load(DATA / "small_expected.npz")
    folder = request.getfixturevalue("shared") / "crystalformer_reference"
    model = import_published(dict(np.load(folder / "alex20_params_f16_seeded.npz")))
    return model, np.load(folder / "alex20_expected.npz")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_log_probabilities_of_the_published_code(published, published_crystals, dtype, tolerance):
    model, expected = published
    model = model.to(dtype)
    with torch.no_grad():
        scores = model.log_prob(published_crystals.to(dtype=dtype))
    for ours, theirs in zip(FACTORS, ("w", "a", "xyz", "l"), strict=True):
        np.testing.assert_allclose(scores[ours], expected[f"logp_{theirs}"], atol=tolerance, rtol=0)


def test_outputs_of_the_published_code(published, published_crystals):
    """Row by row, for the first four crystals: logits (masked, normalised), means, widths, concentrations."""
    expected = torch.tensor(published[1]["output_first4"])
    model, options = published[0].double(), SamplerOptions()
    crystals = published_crystals[:4].trim()
    with torch.no_grad():
        features = model.features(crystals)

    def close(ours, theirs):
        torch.testing.assert_close(ours.float().clamp(min=-1e9), theirs.clamp(min=-1e9), atol=1e-5, rtol=1e-5)

    kx, kl = model.config.coord_components, model.config.lattice_components
    for i, row in enumerate(crystals):
        group, wyckoff = row.space_group, row.wyckoff[0]
        atoms = torch.zeros(1, dtype=torch.long)
        first = model.wyckoff_distribution(model.first_wyckoff_logits(group), group, None, atoms, options)
        close(first.log_probs[0], expected[i, 0, :28])
        for site in range(int(row.num_sites)):
            theirs = expected[i, 1 + 5 * site : 6 + 5 * site]
            ours = [features[name][i, site] for name in ("species", "x", "y", "z", "wyckoff")]
            close(model.species_distribution(ours[0], options).log_probs, theirs[0, :119])
            lattice = model.lattice_distribution(ours[0][None], group, options)
            close(lattice.components.log_probs[0], theirs[0, 119 : 119 + kl])
            close(lattice.mean[0].flatten(), theirs[0, 119 + kl : 119 + 7 * kl])
            close(lattice.std[0].flatten(), theirs[0, 119 + 7 * kl : 119 + 13 * kl])
            for axis in range(3):
                mixture = model.coordinate_distribution(ours[1 + axis], options)
                parts = mixture.components.log_probs, mixture.mean, mixture.concentration
                for k, part in enumerate(parts):
                    close(part, theirs[1 + axis, k * kx : (k + 1) * kx])
            logits = model.wyckoff_logits(ours[4][None, None], group)[:, 0]
            later = model.wyckoff_distribution(logits, group, wyckoff[site : site + 1], atoms, options)
            close(later.log_probs[0], theirs[4, :28])


def test_published_size_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in CrystalTransformer(PRESETS["alex-20"]).parameters()) == 4_833_575


# ---- a second implementation, one crystal and one number at a time ---------------------------------------------------


def naive_log_prob(model: CrystalTransformer, crystal: CrystalBatch, published: bool) -> dict[str, float]:
    """Section 3 of the design written out in numpy for one crystal: no batching, no masks by broadcasting."""
    p = {name: t.detach().numpy() for name, t in model.state_dict().items()}
    c, t = model.config, tables()
    g, m = int(crystal.space_group), int(crystal.num_sites)
    w, a = crystal.wyckoff[0, :m].tolist(), crystal.species[0, :m].tolist()
    xyz = crystal.frac_coords[0].numpy()

    def linear(name, x):
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def log_softmax(x):
        return x - x.max() - np.log(np.exp(x - x.max()).sum())

    def rotate(x, position):
        half = len(x) // 2
        angle = position * 10000.0 ** (-2 * np.arange(half) / len(x))
        left, right = x[:half], x[half:]
        return np.concatenate(
            [left * np.cos(angle) - right * np.sin(angle), right * np.cos(angle) + left * np.sin(angle)]
        )

    ge = p["space_group_embedding.weight"][g - 1]
    tokens = []
    for i in range(m + 1):
        letter = w[i] if i < m else 0
        size = float(t.multiplicity[g, letter])
        tokens.append(linear("wyckoff_in", np.concatenate([ge, p["wyckoff_embedding.weight"][letter], [size]])))
        if i < m:
            tokens.append(linear("species_in", np.concatenate([ge, p["species_embedding.weight"][a[i]]])))
            for k in range(3):
                waves = [f(2 * math.pi * n * xyz[i, k]) for n in range(1, c.fourier + 1) for f in (math.sin, math.cos)]
                tokens.append(linear(f"coords_in.{k}", np.concatenate([ge, waves])))
    h = tokens
    for layer in range(c.num_layers):
        b = f"blocks.{layer}."
        x = [norm(b + "norm_attention", v) for v in h]
        q, k, v = ([linear(b + f"attention.{n}", y) for y in x] for n in ("query", "key", "value"))
        new = []
        for i in range(len(h)):
            out = []
            for head in range(c.num_heads):
                s = slice(head * c.key_size, (head + 1) * c.key_size)
                score = [rotate(q[i][s], i) @ rotate(k[j][s], j) / math.sqrt(c.key_size) for j in range(i + 1)]
                weight = np.exp(log_softmax(np.array(score)))
                out.append(sum(weight[j] * v[j][s] for j in range(i + 1)))
            new.append(h[i] + linear(b + "attention.out", np.concatenate(out)))
        h = [y + linear(b + "mlp.2", gelu(linear(b + "mlp.0", norm(b + "norm_mlp", y)))) for y in new]
    o = [linear("head", norm("norm", y)) for y in h]

    scores = dict.fromkeys(FACTORS, 0.0)
    for i in range(m + 1):
        logits = linear("first_wyckoff", gelu(linear("first_hidden", ge))) if i == 0 else o[5 * i - 1][:28]
        lowest = 1 if i == 0 else w[i - 1] + (int(t.dof[g, w[i - 1]]) == 0)
        allowed = [n for n in range(28) if lowest <= n <= int(t.num_letters[g]) or (n == 0 and i > 0)]
        letter = w[i] if i < m else 0
        if i < c.max_sites - 1 or published:
            scores["wyckoff"] += log_softmax(logits[allowed])[allowed.index(letter)]
        if i == m:
            break
        scores["species"] += log_softmax(o[5 * i][1:119])[a[i] - 1]
        for k in range(3):
            if not (t.scored if published else t.free)[g, w[i], k]:
                continue
            weight, mean, width = np.split(o[5 * i + 1 + k][: 3 * c.coord_components], 3)
            kappa = np.log1p(np.exp(width))
            angle = 2 * math.pi * (xyz[i, k] - 0.5)
            density = np.exp(kappa * np.cos(angle - mean)) / (2 * math.pi * np.i0(kappa))
            scores["coords"] += np.log((np.exp(log_softmax(weight)) * density).sum())
    n, kl = int(crystal.num_atoms), c.lattice_components
    value = crystal.lattice[0].numpy() * ([n ** (-1 / 3)] * 3 + [math.pi / 180] * 3)
    weight, mean, width = np.split(o[5 * m][119 : 119 + 13 * kl], [kl, 7 * kl])
    std = np.log1p(np.exp(width)).reshape(kl, 6) + 1e-3
    normal = np.exp(-0.5 * ((value - mean.reshape(kl, 6)) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    free = t.lattice_free[g].numpy()
    mixture = np.exp(log_softmax(weight))
    if published:
        scores["lattice"] = np.log(mixture @ normal)[free].sum()
    else:
        scores["lattice"] = np.log(mixture @ normal[:, free].prod(1))
    return scores


@pytest.mark.parametrize("likelihood", ["exact", "published"])
def test_log_prob_against_a_naive_implementation(crystals, likelihood):
    model = tiny_model(likelihood=likelihood)
    with torch.no_grad():
        scores = model.log_prob(crystals, chunk=7)
    for i in range(len(crystals)):
        naive = naive_log_prob(model, crystals[i], likelihood == "published")
        for name in FACTORS:
            # 1e-6: rotary tables are float32 by convention
            assert float(scores[name][i]) == pytest.approx(naive[name], abs=1e-6 * max(1, abs(naive[name]))), (i, name)


# ---- what must hold for any weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("descriptors", [False, True])
def test_cached_decoding_equals_the_full_pass(descriptors):
    model = tiny_model(descriptors=descriptors)
    tokens = torch.randn(6, 31, TINY.model_size, dtype=torch.float64)
    with torch.no_grad():
        full = model.transform(tokens, torch.arange(31))
        cache, rows = KeyValueCache(TINY.num_layers), torch.arange(6)
        for position in range(31):
            if position in (13, 20):  # some crystals finish: the batch is compacted
                running = [True, False, True, True, False, True] if position == 13 else [False, True, False, True]
                keep = cache.select(torch.tensor(running))
                assert sorted(keep.tolist()) == [row for row, on in enumerate(running) if on]
                rows = rows[keep]
            step = model.transform(tokens[rows, position : position + 1], torch.tensor([position]), cache)[:, 0]
            torch.testing.assert_close(step, full[rows, position], atol=1e-12, rtol=0)


@pytest.mark.parametrize("order", TOKENS)
def test_nothing_after_the_stop_matters(crystals, order):
    model = tiny_model(order=order)
    padded = crystals._pad(20)
    with torch.no_grad():
        alone, together = model(crystals.trim()), model(padded)
    for name in FACTORS:
        torch.testing.assert_close(alone[name], together[name], atol=1e-10, rtol=0)


def test_log_prob_keeps_the_order_of_the_crystals(crystals):
    model = tiny_model()
    order = torch.randperm(len(crystals), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        straight, shuffled = model.log_prob(crystals, chunk=4), model.log_prob(crystals[order], chunk=3)
    for name in FACTORS:
        torch.testing.assert_close(straight[name][order], shuffled[name], atol=1e-10, rtol=0)


@pytest.mark.parametrize("order", TOKENS)
def test_gradient_of_log_prob_against_finite_differences(crystals, order):
    model = tiny_model(descriptors=True, order=order)
    parameter = model.blocks[0].attention.key.weight
    direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sum(x.sum() for x in model.log_prob(crystals).values()).backward()
    slope = (parameter.grad * direction).sum()

    def value(step: float) -> float:
        with torch.no_grad():
            parameter.add_(step * direction)
            total = sum(x.sum() for x in model.log_prob(crystals).values())
            parameter.sub_(step * direction)
        return float(total)

    assert (value(1e-5) - value(-1e-5)) / 2e-5 == pytest.approx(float(slope), rel=1e-4)


def test_gradient_is_finite_where_the_cell_cannot_be(crystals):
    """Such crystals are drawn, and a policy learns from them."""
    model = tiny_model(order="composition")
    impossible = replace(crystals, lattice=crystals.lattice.clone())
    impossible.lattice[:4] = torch.tensor([4.0, 5.0, 6.0, 0.0, 90.0, 90.0])
    impossible.lattice[4:8] = torch.tensor([-4.0, 5.0, 0.0, 150.0, 170.0, 20.0])
    assert not impossible.possible_cells()[:8].any()
    sum(x.sum() for x in model.log_prob(impossible).values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_too_many_sites_are_refused(crystals):
    with pytest.raises(UserError, match="holds at most 3"):
        tiny_model(max_sites=4).log_prob(crystals)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", TOKENS)
@pytest.mark.parametrize("descriptors", [False, True])
def test_save_and_load(tmp_path, crystals, descriptors, order):
    model = tiny_model(descriptors=descriptors, order=order).float()
    model.space_group_log_prob[225] = -0.5
    save_model(model, tmp_path / "model.safetensors", Extras({"dataset": "prototypes"}))
    for name in (tmp_path, tmp_path / "model.safetensors"):
        back = load_model(name)
        assert back.config == model.config
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True)
        )


def test_last_is_the_newest_run_with_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished tuning"):
        load_model("last")
    for seed, command in ((1, "pretrain"), (2, "finetune")):
        save_model(tiny_model(seed).float(), RunFolder.create(command).path / "model.safetensors")
    RunFolder.create("finetune")  # interrupted before it had weights
    assert torch.equal(load_model("last").head.weight, tiny_model(2).float().head.weight)


def test_packed_models_are_half_as_large_and_name_no_folder(tmp_path):
    model = CrystalTransformer(PRESETS["tiny"])
    header = {"preset": "tiny", "base_model": "/home/anna/base", "dataset": "/home/anna/mp.h5", "reward": "contact"}
    known = KnownFormulas.of(["BaTiO3"])
    save_model(model, tmp_path / "whole.safetensors", Extras(header, Refusal(["known"], known)))
    pack_model(tmp_path / "whole.safetensors", tmp_path / "packed.safetensors")
    extras = load_extras(tmp_path / "packed.safetensors")
    assert extras.refusal.reasons(["BaTiO3", "NaCl"]) == ["known", ""]
    packed = extras.header
    assert not any("/home" in value for value in packed.values())
    assert (packed["preset"], packed["dataset"], packed["reward"]) == ("tiny", "mp.h5", "contact")
    assert (tmp_path / "packed.safetensors").stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    for name, weights in load_model(tmp_path / "packed.safetensors").state_dict().items():
        torch.testing.assert_close(weights, model.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (("none.safetensors", "no such model"), ("text.safetensors", "not a readable")):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / name)

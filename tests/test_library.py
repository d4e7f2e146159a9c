"""cfrl from Python: values in, values out, nothing on the disk."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cfrl
from cfrl.crystals.display import DRAWN
from cfrl.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def crystals():
    known = cfrl.load_dataset("prototypes")
    return known[known.num_atoms <= 8][:40]


@pytest.fixture(scope="module")
def model(crystals):
    return cfrl.pretrain(crystals, crystals[:10], preset="tiny", epochs=30, batch_size=20, lr=4e-3, warmup=5, seed=1)


def test_training_learns(model, crystals):
    untrained = cfrl.pretrain(crystals, preset="tiny", epochs=1, lr=1e-9, seed=1)
    better = sum(model.log_prob(crystals).values()) - sum(untrained.log_prob(crystals).values())
    assert (better > 0).double().mean() > 0.9
    assert not better.requires_grad


def test_only_training_asks_for_gradients(model, crystals):
    """A user calls log_prob and has numbers; what is trained further learns all the same."""
    for ready in (model, cfrl.load_model()):
        assert not any(values.requires_grad for values in ready.log_prob(crystals[:3]).values())
    again = cfrl.pretrain(crystals[:20], init=model, epochs=1, batch_size=20, lr=1e-3)
    moved = [not torch.equal(old, new) for old, new in zip(model.parameters(), again.parameters(), strict=True)]
    assert all(moved)  # the optimiser leaves alone what has no gradient


def test_tuning_leaves_the_model_alone(model, crystals):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    tuned = cfrl.finetune(
        model, "density", watch=lambda step, metrics: seen.append(step), steps=8, n=32, batch_size=16, lr=2e-3,
        scale_crystals=32, min_distance=0.0, seed=3,
    )  # fmt: skip
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert seen == list(range(1, 9))
    assert len(tuned.metrics) == 8
    assert tuned.crystals.properties["step"].tolist() == [float(k) for k in range(1, 9) for _ in range(32)]
    assert any(not torch.equal(before[name], value) for name, value in tuned.model.state_dict().items())
    columns, best = cfrl.retrieve(tuned.model, model, crystals, top=5)
    assert len(best) == 5
    assert sorted(columns["rank"].tolist()) == list(range(1, 41))


def test_own_rewards(model):
    """A function that scores a batch, as a command takes it by name."""

    @cfrl.register_reward("of_the_library_test")
    def size(crystals, structures):
        return -crystals.num_atoms.double().numpy()

    tuned = cfrl.finetune(
        model, "of_the_library_test", steps=2, n=16, batch_size=8, scale_crystals=16, min_distance=0.0, allow="all"
    )
    assert tuned.crystals.properties["reward"].max() < 0
    with pytest.raises(UserError, match=r"unexpected|steps = "):
        cfrl.finetune(model, "density", steps=0)


def test_screening(crystals):
    few = crystals[[0, 1, 0]]
    table = cfrl.screen(few, known=crystals[1:2], relax=False, device="cpu")
    assert table["unique"].tolist() == [1, 1, 0]
    assert table["novel"].tolist()[:2] == [1, 0]
    assert table["formula"].tolist() == few.formulas()
    assert table["e_above_hull"].notna().tolist() == [True, True, False]  # the duplicate went no further


def test_relaxing_and_the_hull(crystals):
    relaxed = cfrl.relax(crystals[:2], "chgnet", steps=5)
    assert len(relaxed.energy) == 2
    hull = cfrl.Hull.from_compositions(["Li", "F", "LiF"], [0.0, 0.0, -3.0])
    assert hull.e_above_hull(["LiF"], [-2.9]).e_above_hull[0] == pytest.approx(0.1)


def test_a_batch_says_what_it_is(crystals):
    text = repr(crystals)
    assert text.startswith("CrystalBatch(40 crystals: ")
    assert f"{crystals.formulas()[0]} ({int(crystals.space_group[0])})" in text
    assert len(text) < 300
    assert repr(crystals[:0]) == "CrystalBatch(0 crystals: )"


def test_a_notebook_shows_a_table_and_pictures(crystals):
    page = crystals[:6]._repr_html_()
    rows = [re.findall("<td>(.*?)</td>", row) for row in page.split("<tr>")[1:]]
    assert [row[0] for row in rows] == crystals.ids[:6]
    assert [int(row[3]) for row in rows] == crystals.num_sites[:6].tolist()
    assert np.allclose([float(row[5]) for row in rows], crystals.densities()[:6], rtol=1e-3)
    assert page.count("data:image/png;base64,") == DRAWN
    assert "40 crystals, the first 20" in crystals._repr_html_()
    hostile = replace(crystals[:1], ids=["<script>"], properties={"<b>": torch.tensor([torch.nan]).double()})
    assert not re.search("<script>|<b>", hostile._repr_html_())


def test_what_cannot_be_drawn_is_listed(crystals):
    flat = crystals[:2]
    flat.lattice = torch.tensor([[5.0, 5.0, 5.0, 60.0, 60.0, 121.0], [torch.nan] * 6])
    assert flat._repr_html_().count("<tr>") == 2
    assert "<img" not in flat._repr_html_()


def test_the_example_runs(capsys):
    runpy.run_path(str(ROOT / "examples" / "library.py"))
    assert "log P(C | G) in nats" in capsys.readouterr().out

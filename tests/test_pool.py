"""A potential over several workers: the same numbers as in one process, and a crystal that kills costs itself alone."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from cfrl.commands.finetune import finetune, scoring_pool
from cfrl.config import FinetuneConfig
from cfrl.errors import UserError
from cfrl.io.storage import read_columns
from cfrl.potentials import Evaluation, load_potential
from cfrl.potentials.pool import PotentialPool, _computed
from cfrl.potentials.relax import relax
from cfrl.rewards import RewardContext
from cfrl.runs.engine import LOST, LocalEngine
from cfrl.runs.ranks import ALONE


def rock_salts() -> list[Structure]:
    pairs = [("Na", "Cl"), ("Mg", "O"), ("Li", "F"), ("K", "Br"), ("Ca", "S")]
    cells = [Lattice.cubic(a) for a in (5.4, 4.4)]
    return [
        Structure.from_spacegroup("Fm-3m", cell, pair, [[0] * 3, [0.5] * 3]).get_primitive_structure()
        for cell in cells
        for pair in pairs
    ]


def die_of_lithium(structures: list[Structure]) -> list[Evaluation]:
    if any("Li" in structure.composition for structure in structures):
        os.kill(os.getpid(), signal.SIGKILL)
    return _computed(structures, name="chgnet", device="cpu")


@pytest.fixture(scope="module")
def pool() -> Iterator[PotentialPool]:
    with LocalEngine(2) as engine:
        yield PotentialPool(engine, "cpu")


def test_a_pool_gives_what_one_process_gives(pool: PotentialPool) -> None:
    structures, potential = rock_salts(), load_potential("chgnet", "cpu")
    alone = potential.compute(structures, features=True, forces=True)
    shared = pool.compute("chgnet", structures, potential, features=True, forces=True)
    assert len(structures) > pool._chunk, "several chunks"
    np.testing.assert_allclose(shared.energy, alone.energy, atol=1e-5)
    np.testing.assert_allclose(shared.features, alone.features, atol=1e-4)
    assert shared.status == alone.status
    ends, shared = relax(structures, potential, steps=4), pool.relax("chgnet", structures, 4)
    np.testing.assert_allclose(shared.energy, ends.energy, atol=1e-4)
    np.testing.assert_allclose(shared.fall, ends.fall, atol=1e-4)
    assert [end.volume for end in shared.structures] == pytest.approx([end.volume for end in ends.structures], rel=1e-3)
    assert len(pool.relax("chgnet", [], 4)) == len(pool.compute("chgnet", [], potential)) == 0


def test_a_crystal_that_kills_costs_itself_alone(pool: PotentialPool) -> None:
    structures, potential = rock_salts()[:5], load_potential("chgnet", "cpu")
    found = Evaluation.cat(pool._each(die_of_lithium, structures, lambda one: Evaluation(np.full(1, np.nan), [LOST])))
    assert found.status == [LOST if "Li" in one.composition else "" for one in structures]
    np.testing.assert_allclose(found.energy[found.ok], potential.compute(structures).energy[found.ok], atol=1e-5)


def test_tuning_scores_alike_wherever_it_scores(tmp_path) -> None:
    config = partial(FinetuneConfig, reward="ehull + band_gap", steps=1, n=8, scale_crystals=8, evaluate=0, plots=False)
    settings = {"device": "cpu", "critic": "off", "max_atoms": 12, "hold": None}
    rewards = [
        read_columns(
            finetune(config(score_on=where, score_workers=2, **settings), root=tmp_path / where, quiet=True).path
            / "rollouts.h5",
            ["reward"],
        )["reward"]
        for where in ("here", "local")
    ]
    np.testing.assert_allclose(rewards[0], rewards[1], rtol=1e-3, atol=1e-3)
    assert np.isfinite(rewards[0]).any()


def test_a_pool_needs_a_name(pool: PotentialPool) -> None:
    with pytest.raises(UserError, match="by its name"):
        RewardContext(load_potential("chgnet", "cpu"), pool=pool)


@pytest.mark.parametrize(
    ("settings", "pooled"),
    [
        ({}, True),
        ({"steps": 2}, False),
        ({"score_on": "here"}, False),
        ({"potential": "ase:mine:make"}, False),
        ({"score_on": "local", "steps": 2}, True),
    ],
)
def test_long_tunings_of_one_process_score_in_others(monkeypatch, settings, pooled) -> None:
    monkeypatch.setattr("cfrl.commands.finetune.count_cores", lambda: 2)
    with scoring_pool(FinetuneConfig(device="cpu", **settings), ALONE) as pool:
        assert (pool is not None) == pooled

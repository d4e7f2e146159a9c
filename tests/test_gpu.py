"""What a GPU computes is what the CPU computes. Skipped where there is none: python -m pytest -m gpu."""

import numpy as np
import pytest
import torch

import cfrl
from cfrl.config import PretrainConfig
from cfrl.model.drawing import draw
from cfrl.model.sampler import seeded
from cfrl.model.training import Trainer

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def crystals() -> cfrl.CrystalBatch:
    return cfrl.sample(cfrl.load_model(device="cpu"), 64, seed=0)


@pytest.mark.parametrize("name", ["default", "small"])
def test_log_probabilities(crystals, name):
    """Within 1e-3 nats for each crystal and factor, in float32."""
    here, there = (cfrl.load_model(name, device).log_prob(crystals.to(device)) for device in ("cpu", DEVICE))
    for factor, values in here.items():
        torch.testing.assert_close(there[factor].cpu(), values, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["default", "small"])
def test_what_is_drawn_has_the_log_probability_that_the_sampler_says(name):
    model = cfrl.load_model(name, DEVICE)
    groups = torch.tensor([1, 2, 14, 62, 139, 166, 194, 221, 225, 227], device=DEVICE).repeat(100)
    crystals = draw(model, groups, generator=seeded(model.device, 0))
    with torch.no_grad():
        told = sum(model.log_prob(crystals).values()).double()
    torch.testing.assert_close(crystals.properties["log_prob"].double(), told, rtol=0, atol=2e-3)


def test_draws_are_as_likely_as_those_of_the_cpu():
    """Mean log-probability of 2,000 crystals, within four standard errors."""
    told = [
        cfrl.sample(cfrl.load_model(device=device), 2000, seed=1, keep_invalid=True).properties["log_prob"].double()
        for device in ("cpu", DEVICE)
    ]
    error = sum(x.var() / len(x) for x in told) ** 0.5
    assert abs(told[0].mean() - told[1].mean()) < 4 * error


def test_a_step_of_training(crystals):
    """The same weights and loss as on the CPU, without dropout, in float32."""
    ends = []
    for device in ("cpu", DEVICE):
        options = PretrainConfig(batch_size=32, dropout=0.0, precision="float32", warmup=0, epochs=1)
        trainer = Trainer(options, crystals, crystals[:0], torch.device(device), init=cfrl.load_model(device=device))
        trainer._train_step(torch.arange(32))
        ends.append((trainer.sums["train/species"], [x.detach().cpu() for x in trainer.model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=0.1)  # nats, of 32 crystals
    for one, other in zip(*(weights for _, weights in ends), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=5e-4)


def test_tuning():
    """An easy reward is learnt there too."""

    class Oxygen:
        def __init__(self, batch):
            self.total = (batch.species == 8).any(1).double().numpy()
            self.status, self.terms = [""] * len(batch), {}

    tuned = cfrl.finetune(
        cfrl.load_model(device=DEVICE), Oxygen, steps=15, n=64, scale_crystals=256, critic="off", hold=None, lr=1e-3
    )
    rewards = [metrics["reward/mean"] for metrics in tuned.metrics]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1


def test_energies_and_relaxation(crystals):
    """CHGNet's: within 1e-4 eV/atom, and relaxed within 5 meV/atom."""
    pytest.importorskip("chgnet")
    from cfrl.potentials import load_potential
    from cfrl.potentials.relax import relax

    structures = crystals[crystals.num_atoms <= 20].to_structures()[:16]
    found = [load_potential("chgnet", device) for device in ("cpu", DEVICE)]
    energies = [potential.compute(structures).energy for potential in found]
    np.testing.assert_allclose(energies[0], energies[1], atol=1e-4)
    ends = [relax(structures, potential, steps=100).energy for potential in found]
    assert np.median(np.abs(ends[0] - ends[1])) < 5e-3

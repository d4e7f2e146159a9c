"""What makes this program fast still does: pytest -m benchmark. Ratios on one machine, in one process, not seconds.

Each is asked for at less than half of what was measured (docs/speed.md), so that other work beside it does no harm.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Composition

import cfrl
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.fingerprint import find_duplicates
from cfrl.io.datasets import load_dataset
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import draw
from cfrl.model.sampler import seeded
from cfrl.potentials import load_potential
from cfrl.potentials.relax import relax
from cfrl.stability.hull import ReferenceHull

pytestmark = pytest.mark.benchmark


@pytest.fixture(scope="module")
def model():
    return cfrl.load_model()


def faster(ours: float, other: float, times: float) -> None:
    """Holds seconds for each against seconds for each; the ratio is shown by -s."""
    print(f"{other / ours:.1f} times as fast")
    assert other > times * ours


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def begun(crystals: CrystalBatch, sites: int) -> CrystalBatch:
    """Their first sites."""
    columns = {name: getattr(crystals, name)[:, :sites] for name in ("wyckoff", "species", "frac_coords")}
    return replace(crystals, **columns, properties={})


def test_a_batch_is_drawn_faster_than_its_crystals_one_by_one(model):
    groups, options = torch.arange(1, 231)[::3], SamplerOptions()
    together = cpu_seconds(lambda: draw(model, groups, options, seeded(model.device, 0)))
    alone = cpu_seconds(lambda: [draw(model, groups[i : i + 1], options, seeded(model.device, i)) for i in range(16)])
    faster(together / len(groups), alone / 16, 4)


def test_the_sampler_beats_a_loop_that_sees_each_crystal_anew_for_every_token(model):
    """The loop asks the network for the whole crystal so far, five times a site, as one without a cache must."""
    options = SamplerOptions()
    crystals = draw(model, torch.arange(1, 231)[::3], options, seeded(model.device, 0))

    @torch.no_grad()
    def loop() -> None:
        for sites in range(1, crystals.wyckoff.shape[1] + 1):
            for _ in range(5):
                model.log_prob(begun(crystals[crystals.num_sites >= sites], sites))

    ours = cpu_seconds(lambda: draw(model, crystals.space_group, options, seeded(model.device, 0)))
    faster(ours, cpu_seconds(loop), 2)


def test_a_batch_of_log_probabilities_beats_one_by_one(model):
    crystals = load_dataset("prototypes")[:256]
    with torch.no_grad():
        model.log_prob(crystals[:32])  # what is set up once does not count
        together = cpu_seconds(lambda: model.log_prob(crystals))
        alone = cpu_seconds(lambda: [model.log_prob(crystals[i : i + 1]) for i in range(32)])
    faster(together / len(crystals), alone / 32, 1.5)


def test_relaxing_together_beats_the_optimiser_of_chgnet():
    from chgnet.model import StructOptimizer

    structures = load_dataset("prototypes")[:6].to_structures()
    potential = load_potential("chgnet", "cpu")
    optimiser = StructOptimizer(model=potential.model, use_device="cpu")
    ours = cpu_seconds(lambda: relax(structures, potential, fmax=0.05))
    own = cpu_seconds(
        lambda: [optimiser.relax(s, fmax=0.05, verbose=False, assign_magmoms=False) for s in structures[:3]]
    )
    faster(ours / len(structures), own / 3, 3)


def test_duplicates_beat_all_pairs():
    structures = load_dataset("prototypes").to_structures()
    same = [s for s in structures if s.composition.anonymized_formula == "AB"][:40]
    for structure in same:
        structure.replace_species({e: s for e, s in zip(structure.composition, ("Na", "Cl"), strict=True)})
    matcher = StructureMatcher()
    ours = cpu_seconds(lambda: find_duplicates(same))
    pairs = cpu_seconds(lambda: [matcher.fit(a, b) for i, a in enumerate(same) for b in same[:i]])
    faster(ours, pairs, 3)


def test_a_hull_of_many_systems_beats_a_phase_diagram_for_each():
    rng, n = np.random.default_rng(0), 400
    amounts = np.zeros((n, 119))
    for row in amounts:
        row[rng.choice(np.arange(3, 23), 3, replace=False)] = rng.integers(1, 4, 3)
    elements = np.eye(119)[3:23]
    energies = np.concatenate([np.zeros(len(elements)), -rng.random(n)])
    hull = ReferenceHull.from_compositions(np.concatenate([elements, amounts]), energies)
    entries = [
        PDEntry(Composition({SYMBOLS[z]: row[z] for z in row.nonzero()[0]}), energy * row.sum())
        for row, energy in zip(np.concatenate([elements, amounts]), energies, strict=True)
    ]

    def diagrams() -> None:
        for entry in entries[-40:]:
            inside = [other for other in entries if set(other.elements) <= set(entry.elements)]
            PhaseDiagram(inside).get_e_above_hull(entry)

    ours = cpu_seconds(lambda: hull.e_above_hull(amounts, energies[-n:]))
    faster(ours / n, cpu_seconds(diagrams) / 40, 3)

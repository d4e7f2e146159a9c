"""How near atoms come to each other, against hand calculation and pymatgen."""

from __future__ import annotations

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.distances import closest_contact, shortest_distance
from cfrl.rewards import build_reward


def rock_salt(length: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(length), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_contacts_are_counted_in_covalent_radii() -> None:
    """Na and Cl: 1.66 + 1.02 A, half a cubic cell apart; Cu and its own images: 2.64 A."""
    assert closest_contact(rock_salt(5.6), 2.0) == pytest.approx(2.8 / 2.68)
    assert closest_contact(rock_salt(3.0), 0.75) == pytest.approx(1.5 / 2.68)
    assert closest_contact(rock_salt(5.6), 0.75) == 0.75
    copper = Structure.from_spacegroup("Pm-3m", Lattice.cubic(1.8), ["Cu"], [[0, 0, 0]])
    assert closest_contact(copper, 0.7) == pytest.approx(1.8 / 2.64)


def test_contact_as_reward() -> None:
    crystals = CrystalBatch.from_structures([rock_salt(5.6), rock_salt(3.0)])
    np.testing.assert_allclose(build_reward("contact")(crystals).total, [0.75, 1.5 / 2.68], rtol=1e-5)
    np.testing.assert_allclose(build_reward("contact(limit=0.5)")(crystals).total, 0.5)


def test_shortest_distance_against_pymatgen() -> None:
    rng = np.random.default_rng(5)
    for _ in range(30):
        lattice = Lattice.from_parameters(*rng.uniform(2, 12, 3), *rng.uniform(60, 115, 3))
        structure = Structure(lattice, ["Na"] * 4, rng.random((4, 3)))
        expected = min(n.nn_distance for site in structure for n in structure.get_neighbors(site, 6.0))
        assert shortest_distance(structure) == pytest.approx(expected, abs=1e-6)

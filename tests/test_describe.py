"""Columns to filter by: crystals whose bonds and charges are known."""

import pytest
from pymatgen.core import Lattice, Structure

from cfrl.screening import stages
from tests.test_screen import perovskite, rock_salt

LAYERS = Lattice.hexagonal(2.46, 6.7)
CHAINS = Lattice.hexagonal(4.37, 4.95)


@pytest.mark.parametrize(
    ("structure", "dimensionality", "states"),
    [
        (Structure.from_spacegroup("Pa-3", Lattice.cubic(5.6), ["C", "O"], [[0] * 3, [0.1185] * 3]), 0, "C4+ O2-"),
        (Structure.from_spacegroup("P3_121", CHAINS, ["Se"], [[0.2254, 0, 1 / 3]]), 1, "Se0+"),
        (Structure.from_spacegroup("P6_3/mmc", LAYERS, ["C", "C"], [[0, 0, 0.25], [1 / 3, 2 / 3, 0.25]]), 2, "C0+"),
        (rock_salt(), 3, "Na+ Cl-"),
        (perovskite("Ba", "Ti"), 3, "Ba2+ Ti4+ O2-"),
        (Structure(Lattice.cubic(3.4), ["Mg", "Cl"], [[0, 0, 0], [0.5] * 3]), 3, ""),
    ],
    ids=["dry ice", "selenium", "graphite", "salt", "BaTiO3", "MgCl"],
)
def test_dimensionality_and_oxidation_states(structure: Structure, dimensionality: int, states: str) -> None:
    [record] = stages.describe([structure])
    assert record["dimensionality"] == dimensionality
    assert record["oxidation_states"] == states


def test_scarcity_is_that_of_the_elements_by_mass() -> None:
    """Rare earths come from one country, sodium and chlorine from everywhere."""
    rare, common = stages.describe([rock_salt("Nd", "N", 5.1), rock_salt()])
    assert rare["hhi_production"] > 8000 > 3000 > common["hhi_production"] > 0
    assert rare["hhi_reserve"] > common["hhi_reserve"]

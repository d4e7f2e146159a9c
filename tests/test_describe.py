"""Columns to filter by: crystals whose bonds and charges are known."""

import math

import pytest
from pymatgen.core import Lattice, Structure

from cfrl.screening import stages
from tests.test_screen import perovskite, rock_salt

LAYERS = Lattice.hexagonal(2.46, 6.7)
CHAINS = Lattice.hexagonal(4.37, 4.95)
SODALITE = Structure.from_spacegroup(229, Lattice.cubic(8.9), ["Si", "O"], [[0.25, 0.5, 0], [0.147, 0.147, 0.5]])
RUTILE = Structure.from_spacegroup(136, Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]])


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


def test_room_between_atoms_is_that_of_spheres(capfd: pytest.CaptureFixture[str]) -> None:
    """Between argon atoms at the corners of a cube: in its middle; and in the middle of a face, the way out."""
    edge, radius = 6.0, 1.88  # Zeo++'s own for argon
    [record] = stages.describe([Structure(Lattice.cubic(edge), ["Ar"], [[0, 0, 0]])])
    assert record["largest_sphere"] == pytest.approx(math.sqrt(3) * edge - 2 * radius, abs=1e-3)
    assert record["free_sphere"] == pytest.approx(math.sqrt(2) * edge - 2 * radius, abs=1e-3)
    sodalite, rutile = stages.describe([SODALITE, RUTILE])
    assert 2 < sodalite["free_sphere"] < sodalite["largest_sphere"] < 7, "cages of 6 angstrom, windows of six rings"
    assert rutile["free_sphere"] < 1
    assert "Voronoi" not in capfd.readouterr().out, "nothing of what Zeo++ prints"

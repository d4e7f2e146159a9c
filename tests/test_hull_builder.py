"""Reference hulls from a potential: whose energies, which phases, relaxed how, and going on after an interruption."""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from cfrl.commands.data_hull import build_hull
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io.storage import write_crystals
from cfrl.potentials import load_potential
from cfrl.potentials.relax import relax
from cfrl.runs.engine import LocalEngine
from cfrl.screening import stages
from cfrl.stability.hull import ReferenceHull


def rock_salt(a):
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture
def dataset(tmp_path):
    """Sodium, chlorine, rock salt twice and a stretched one, and an element that CHGNet does not know."""
    structures = [
        Structure(Lattice.cubic(4.2), ["Na", "Na"], [[0, 0, 0], [0.5, 0.5, 0.5]]),
        Structure(Lattice.cubic(5.0), ["Cl", "Cl"], [[0, 0, 0], [0.4, 0, 0]]),
        rock_salt(5.6),
        rock_salt(5.6),
        rock_salt(7.5),
        Structure(Lattice.cubic(3.3), ["Po"], [[0, 0, 0]]),
    ]
    path = tmp_path / "crystals.h5"
    write_crystals(path, CrystalBatch.from_structures(structures))
    return path


def test_a_hull_holds_the_potentials_energies_of_the_phases_near_it(dataset, tmp_path):
    hull = build_hull([str(dataset)], tmp_path / "hull.h5", workers=1)
    potential = load_potential("chgnet", "cpu")
    assert len(hull) == 3  # one rock salt, and not the stretched one
    assert hull.energy_scale == potential.energy_scale == "mp2020"
    energy = potential.compute([rock_salt(5.6)]).energy
    np.testing.assert_allclose(hull.e_above_hull(["NaCl"], energy).e_above_hull, [0.0], atol=1e-5)
    assert len(ReferenceHull.load(tmp_path / "hull.h5")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crystals.h5", "hull.h5"]


def test_gaps_are_filled_from_another_reference(dataset, tmp_path):
    (tmp_path / "other.csv").write_text("formula,energy_per_atom\nNa3Cl,-2.6\nNaCl,-9\nNaCl5,9\nNaCl3,-9\n")
    hull = build_hull([str(dataset)], tmp_path / "hull.h5", fill=str(tmp_path / "other.csv"), workers=1)
    assert len(hull) == 4  # sodium, chlorine, rock salt and Na3Cl; not NaCl3, which puts rock salt far above the hull
    np.testing.assert_allclose(hull.e_above_hull(["Na3Cl"], [-2.6]).e_above_hull, [0.0], atol=1e-6)


def test_relaxing_lowers_what_is_near_the_hull(dataset, tmp_path):
    hull = build_hull([str(dataset)], tmp_path / "hull.h5", relax=True, workers=1)
    relaxed = relax([rock_salt(5.6)], load_potential("chgnet", "cpu")).energy
    np.testing.assert_allclose(hull.e_above_hull(["NaCl"], relaxed).e_above_hull, [0.0], atol=2e-3)
    assert relaxed < load_potential("chgnet", "cpu").compute([rock_salt(5.6)]).energy - 1e-3


def test_a_stopped_build_goes_on_and_forgets_nothing(dataset, tmp_path, monkeypatch):
    whole = build_hull([str(dataset)], tmp_path / "whole.h5", relax=True, workers=1)

    computed = []

    def watched(engine, function, chunks, map=LocalEngine.map):
        computed.append((function.func, len(chunks)))
        if computed == [(stages.energies, 1), (stages.relax, 1)]:
            raise KeyboardInterrupt
        return map(engine, function, chunks)

    monkeypatch.setattr(LocalEngine, "map", watched)
    with pytest.raises(KeyboardInterrupt):
        build_hull([str(dataset)], tmp_path / "hull.h5", relax=True, workers=1)
    assert not (tmp_path / "hull.h5").exists()
    again = build_hull([str(dataset)], tmp_path / "hull.h5", relax=True, workers=1)
    assert computed[2:] == [(stages.energies, 0), (stages.relax, 1)]  # the energies were in the journal
    np.testing.assert_array_equal(again.energies, whole.energies)


def test_nothing_to_evaluate_is_told(tmp_path):
    path = tmp_path / "polonium.h5"
    write_crystals(path, CrystalBatch.from_structures([Structure(Lattice.cubic(3.3), ["Po"], [[0, 0, 0]])]))
    with pytest.raises(UserError, match="Po"):
        build_hull([str(path)], tmp_path / "hull.h5", workers=1)

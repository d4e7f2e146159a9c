"""Flags: which crystals are suspect, and that compositions are judged as a chemist would."""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from cfrl.crystals.oxidation import charge_balance
from cfrl.crystals.refusal import composition_flags
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.screening import stages
from cfrl.stability.flags import APART, FLAGS, check_flags, hull_flags, relaxation_flags
from cfrl.stability.hull import ReferenceHull


@pytest.mark.parametrize(
    ("kind", "formulas"),
    [
        ("neutral", "NaCl BaTiO3 Mg2Ge GaSb CeO2 SiC"),
        ("alloy", "TiAl Ti3Al Ti2Al MnRh3 NaMg PmRh3 Cu3Au"),  # SMACT alone calls TiAl, Ti3Al and MnRh3 neutral
        ("element", "Cu O2 Si Ge"),
        ("not neutral", "NaCl2 MgH5 S2Cl5 OgF2"),
    ],
)
def test_charge_balance(kind: str, formulas: str) -> None:
    assert {formula: charge_balance(formula) for formula in formulas.split()} == dict.fromkeys(formulas.split(), kind)


def test_absurd_compositions_are_told_at_once() -> None:
    """A bad model draws such; to try all charges of thirteen elements takes hours."""
    assert charge_balance("Ca12Am12Zr12TiNbGa36Si24B36Sb12H36Pt12S12O12") == "not neutral"
    assert charge_balance("LiNaKMgCaAlSiO8") == "neutral"


def test_flags_of_compositions() -> None:
    formulas = ["F6Ar", "TcO2", "PmP2Ir2", "ThO2", "UO2", "PuO2", "Bi2O3", "PoO2", "Cl2", "TiAl", "NaCl2", "NaCl"]
    flags = composition_flags(formulas)
    found = {name: {f for f, flag in zip(formulas, flags[name], strict=True) if flag} for name in flags}
    assert found == {
        "noble_gas": {"F6Ar"},
        "radioactive": {"TcO2", "PmP2Ir2", "PuO2", "PoO2"},
        "element": {"Cl2"},
        "not_neutral": {"F6Ar", "PmP2Ir2", "NaCl2"},
    }


def test_flags_of_the_hull_see_what_is_no_longer_given_as_a_distance() -> None:
    """Thirteen phases of Na-Cl, none but the elements of Mg-O; 1.5 eV/atom below the hull no distance is given."""
    formulas = ["Na", "Cl", "Mg", "O", *(f"Na{k}Cl" for k in range(1, 12))]
    hull = ReferenceHull.from_compositions(formulas, np.zeros(len(formulas)))
    found = hull.e_above_hull(["NaCl", "NaCl", "NaCl", "MgO"], [-0.09, -0.11, -1.5, 0.0])
    assert np.isnan(found.credible().e_above_hull[2])
    flags = hull_flags(found.e_above_hull, found.num_references)
    assert flags["far_below_hull"].tolist() == [False, True, True, False]
    assert flags["sparse_reference"].tolist() == [False, False, False, True]


def test_exploded_by_volume_by_displacement_and_by_an_atom_on_its_own() -> None:
    nan = np.nan
    volume, rmsd = np.array([0.9, 1.1, -0.4, -0.6, nan, 0, nan]), np.array([0, 0, 0, 0, nan, 3.5, nan])
    isolation = np.array([1, 1, 1, 1, nan, 1, 1.5])
    assert relaxation_flags(volume, rmsd, isolation)["exploded"].tolist() == [*[False, True] * 3, True]
    lonely = Structure(Lattice.cubic(9), ["Na", "Cl", "H"], [[0, 0, 0], [0.27, 0, 0], [0.5, 0.5, 0.5]])
    assert stages.check([lonely], stages.ANY, 0.01)[0]["isolation"] == APART


def test_real_crystals_are_not_exploded() -> None:
    """Of the prototypes one has atoms on their own: silicon blown up to 3.4 A between neighbours, an idealised cell."""
    crystals = load_dataset("prototypes")
    records = stages.check(crystals.to_structures(), stages.ANY, 0.01)
    alone = {f for f, record in zip(crystals.formulas(), records, strict=True) if record["isolation"] >= APART}
    assert len(records) > 250
    assert alone == {"Si"}


def test_a_flag_that_does_not_exist_is_told() -> None:
    assert check_flags("noble_gas, element") == ["noble_gas", "element"]
    assert check_flags(",".join(FLAGS)) == list(FLAGS)
    with pytest.raises(UserError, match="--allow noblegas: no such flag; did you mean 'noble_gas'"):
        check_flags("noblegas")

"""Is a crystal valid by the definitions of LeMat-GenBench (Betala et al. 2025, arXiv:2512.04562)?

Its three tests, with the numbers and in the order of its code (`validity_metrics.py` of github.com/LeMaterial/lemat-
genbench, Apache-2.0): charges balance, no two atoms are too near, the cell is plausible. A test that cannot be made is
not passed. What a set of crystals comes to is in `protocol.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cfrl.runs.journal import Record

if TYPE_CHECKING:
    from pymatgen.core import Structure

METALLIC = 0.7  # of SMACT's score; above it nobody asks for charges
CHARGE = 0.1  # elementary charges of a cell that may be left
NO_VALENCE = 1e-15  # sums of bond valences below it are none
NEAREST, PADDING = 0.5, 0.7  # two atoms are at least NEAREST (PADDING + r_i + r_j) apart, angstrom
RADIUS = 1.0  # angstrom, of elements without an atomic radius
MASS_DENSITY = (0.01, 25.0)  # g/cm^3
ATOM_DENSITY = (1e-5, 0.5)  # atoms/angstrom^3
LENGTH = (1.0, 100.0)  # angstrom
VOLUME = 1.0  # angstrom^3, of the cell; less is none
SYMPREC = 0.01  # angstrom

States = Mapping[str, Sequence[int]]  # oxidation states of elements


def check(structures: list[Structure], states: States) -> list[Record]:
    """The three tests.

    Args:
        states: oxidation states of elements, those of the benchmark; of others pymatgen's are taken.

    Records: `charge` (which of the tests of `charge_test` is passed, "" if none), `distances` and `plausible` (whether
    they are), `space_group` (0: none found).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pymatgen, about elements without an electronegativity or a radius
        return [_check(structure, states) for structure in structures]


def _check(structure: Structure, states: States) -> Record:
    record = {"charge": "", "distances": False, "plausible": False, "space_group": 0}
    try:
        record["space_group"] = space_group(structure)
        record["distances"] = distances_hold(structure)
        record["plausible"] = bool(record["space_group"]) and cell_is_plausible(structure)
        record["charge"] = charge_test(structure, states)
    except Exception:  # of several libraries, on crystals of any kind: what cannot be tested is not valid
        pass
    return record


# ---- charges ----


def charge_test(structure: Structure, states: States | None = None) -> str:
    """The first test by which the charges of a crystal balance; "" if there is none.

    metallic: SMACT's metallicity score is above 0.7.
    no bonds: at no inequivalent site do pymatgen's bond valences sum up to anything.
    valences: pymatgen's BVAnalyzer assigns oxidation states, whose sum is within 0.1 of zero.
    states: common oxidation states balance; within an element they differ by one at most.
    all states: so do others, the positive ones at the less electronegative elements (Pearson correlation below 0).

    Raises:
        Exception: of pymatgen, on an element that it has no data for; such a crystal is not valid.
    """
    from pymatgen.analysis.bond_valence import BVAnalyzer
    from smact.metallicity import metallicity_score

    try:
        if metallicity_score(structure.composition) > METALLIC:
            return "metallic"
        if _has_no_bonds(structure):
            return "no bonds"
    except Exception:  # an element without data: the next test may have them
        pass
    try:
        decorated = BVAnalyzer().get_oxi_state_decorated_structure(structure)
    except ValueError:
        return _test_composition(structure, states or {})
    return "valences" if abs(sum(site.specie.oxi_state for site in decorated)) <= CHARGE else ""


def _has_no_bonds(structure: Structure) -> bool:
    from pymatgen.analysis.bond_valence import calculate_bv_sum
    from pymatgen.analysis.local_env import get_neighbors_of_site_with_index
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    sites = [
        sites[0] for sites in SpacegroupAnalyzer(structure, SYMPREC).get_symmetrized_structure().equivalent_indices
    ]
    return all(
        abs(calculate_bv_sum(structure[site], get_neighbors_of_site_with_index(structure, site))) < NO_VALENCE
        for site in sites
    )


def _test_composition(structure: Structure, states: States) -> str:
    from pymatgen.core import Element

    amounts = {
        str(element): int(n) for element, n in structure.composition.element_composition.reduced_composition.items()
    }
    elements = {symbol: Element(symbol) for symbol in amounts}
    common = {
        symbol: states.get(symbol) or element.icsd_oxidation_states or element.common_oxidation_states
        for symbol, element in elements.items()
    }
    if any(True for _ in balances(amounts, common)):
        return "states"
    known = {symbol: element.oxidation_states for symbol, element in elements.items()}
    electronegativity = [element.X for element in elements.values()]
    with np.errstate(invalid="ignore", divide="ignore"):
        sensible = any(np.corrcoef(found, electronegativity)[0, 1] < 0 for found in balances(amounts, known))
    return "all states" if sensible else ""


def balances(amounts: Mapping[str, int], states: States) -> Iterator[tuple[float, ...]]:
    """Mean oxidation states of the elements for which charges balance; one after the other.

    Within an element states differ by one at most, and their sum is not 0.

    Args:
        amounts: atoms of each element in the formula.
        states: of each element.
    """
    sums = [sorted(_sums(n, states[symbol]) - {0}) for symbol, n in amounts.items()]
    rest = [{0}]  # what the elements from here on can add up to
    for own in reversed(sums):
        rest.append({total + more for total in rest[-1] for more in own})
    rest.reverse()

    def extend(place: int, total: int, chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if place == len(sums):
            yield chosen
            return
        for own in sums[place]:
            if -(total + own) in rest[place + 1]:
                yield from extend(place + 1, total + own, (*chosen, own))

    for found in extend(0, 0, ()):
        yield tuple(total / n for total, n in zip(found, amounts.values(), strict=True))


def _sums(n: int, states: Sequence[int]) -> set[int]:
    """What n atoms can add up to if their states are all one of these, or two of these that differ by one."""
    steps = range(n) if n > 1 else (0,)
    return {n * state + k for state in states for k in steps if k == 0 or state + 1 in states}


# ---- geometry ----


def distances_hold(structure: Structure) -> bool:
    """Whether no two atoms of the cell are nearer than 0.5 (0.7 A + r_i + r_j), r being pymatgen's atomic radii.

    Distances are the shortest between images of two atoms; an atom and its own images are not looked at.
    """
    radius = np.array([float(site.specie.atomic_radius or RADIUS) for site in structure])
    least = NEAREST * (PADDING + radius[:, None] + radius)
    pairs = np.triu_indices(len(structure), 1)
    return bool((structure.distance_matrix[pairs] >= least[pairs]).all())


def cell_is_plausible(structure: Structure) -> bool:
    """Whether densities, lengths, angles and volume are possible, and a CIF can be written."""
    from pymatgen.io.cif import CifWriter

    str(CifWriter(structure))
    return (
        MASS_DENSITY[0] <= structure.density <= MASS_DENSITY[1]
        and ATOM_DENSITY[0] <= len(structure) / structure.volume <= ATOM_DENSITY[1]
        and structure.volume > VOLUME
        and all(LENGTH[0] <= length <= LENGTH[1] for length in structure.lattice.abc)
        and all(0 < angle < 180 for angle in structure.lattice.angles)
    )


def space_group(structure: Structure) -> int:
    """1..230 as spglib finds it within 0.01 A; 0 where it finds none."""
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    try:
        return int(SpacegroupAnalyzer(structure, SYMPREC).get_space_group_number())
    except Exception:  # spglib's, of several kinds
        return 0

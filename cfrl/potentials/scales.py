"""Which energies may be compared: the scale of a potential's training data, and the corrections that are due to it.

"mp2020" is what the Materials Project publishes: GGA and GGA+U, mixed and corrected (Wang et al., Sci. Rep. 11, 15496,
2021). "mp-raw" is the same without corrections, as in MPtrj's total energies; what is trained on it gets pymatgen's
`MaterialsProject2020Compatibility` added, and is then on "mp2020". Anything else is a scale of its own, named after its
training data ("omat24", whose pseudopotentials are newer ones: MP2020's corrections do not fit it) or the potential.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from cfrl.errors import UserError

if TYPE_CHECKING:
    from pymatgen.core import Composition, Structure
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

CORRECTED, RAW = "mp2020", "mp-raw"
OMAT24 = "omat24"
DECLARED = (CORRECTED, RAW)


def split_scale(name: str) -> tuple[str, str]:
    """ "mace:my.model@mp-raw" -> ("mace:my.model", "mp-raw"); the scale is "" where none is declared.

    Raises:
        UserError: no such scale.
    """
    potential, _, scale = name.rpartition("@")
    if not potential or "." in scale or "/" in scale:  # the @ belongs to a path
        return name, ""
    if scale not in DECLARED:
        raise UserError(f"{name}: no energy scale {scale!r}; after @ stands {' or '.join(DECLARED)}")
    return potential, scale


class Uncorrectable(Exception):
    """A calculation that the MP2020 corrections are not made for; the message says why."""


class Run(NamedTuple):
    """How an energy was computed: what pymatgen calls it ("GGA", "GGA+U"), U in eV by element, the POTCARs' titles."""

    run_type: str
    hubbards: dict[str, float]
    potcars: list[str]

    @classmethod
    def of(cls, run_type: str, hubbards: str, potcars: str) -> Run | None:
        """From columns of a dataset: "GGA+U", "Fe 5.3 Co 3.32", "PAW_PBE Fe_pv 06Sep2000, ..."; None: not told."""
        words = hubbards.split()
        us = dict(zip(words[::2], map(float, words[1::2]), strict=True))
        return cls(run_type, us, potcars.split(", ")) if run_type else None


def mp2020_correction(structure: Structure, run: Run | None = None) -> float:
    """eV/atom to add to the GGA(+U) energy of a pymatgen structure.

    O and S are classed by the distances in the structure (oxide, peroxide, superoxide), other anions by composition.

    Args:
        run: how it was computed; None: as MPRelaxSet does.

    Raises:
        Uncorrectable: another functional, U or POTCAR than MPRelaxSet's.
    """
    from pymatgen.entries.compatibility import CompatibilityError
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    hubbards = _hubbards(structure) if run is None else run.hubbards
    parameters = {"run_type": "GGA+U" if hubbards else "GGA", "hubbards": hubbards}
    if run is not None:
        parameters |= {"run_type": run.run_type, "potcar_symbols": run.potcars}
    data = {"oxidation_states": _oxidation_states(structure.composition)}
    entry = ComputedStructureEntry(structure, 0.0, parameters=parameters, data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compositions without oxidation states, noble gases without electronegativity
        try:
            adjustments = _scheme(check_potcar=run is not None).get_adjustments(entry)
        except CompatibilityError as error:
            raise Uncorrectable(str(error)) from error
    return sum(adjustment.value for adjustment in adjustments) / len(structure)


def _hubbards(structure: Structure) -> dict[str, float]:
    """U in eV of the transition metals, which MPRelaxSet gives them in oxides and fluorides."""
    symbols = [element.symbol for element in sorted(structure.composition.elements, key=lambda element: element.X)]
    settings = _scheme(check_potcar=False).u_settings.get(symbols[-1], {})
    return {symbol: settings[symbol] for symbol in symbols if settings.get(symbol)}


@lru_cache(maxsize=16384)
def _oxidation_states(composition: Composition) -> dict[str, float]:
    """As pymatgen guesses them, which takes longer than all the rest."""
    try:
        return dict(next(iter(composition.oxi_state_guesses(max_sites=-20)), {}))
    except ValueError:  # too many atoms for a guess
        return {}


@cache
def _scheme(check_potcar: bool) -> MaterialsProject2020Compatibility:
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

    return MaterialsProject2020Compatibility(check_potcar=check_potcar)  # a potential has none

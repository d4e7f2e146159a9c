"""Whether the energies of a potential may be held against a reference hull."""

from __future__ import annotations

from cfrl.errors import UserError
from cfrl.potentials import Potential, energy_scale
from cfrl.stability.hull import ReferenceHull


def check_scale(potential: Potential | str, hull: ReferenceHull) -> None:
    """Raises UserError if a potential, or the one of this name, is known to be on another energy scale than the hull.

    Needs no model, so that it can be asked before anything is loaded. A reference of unknown origin is the user's word.
    """
    if isinstance(potential, str):
        name, scale = energy_scale(potential)
    else:
        name, scale = potential.name, potential.energy_scale
    problem = "" if hull.energy_scale == "unknown" else hull.mismatch(scale)
    if problem:
        raise UserError(
            f"{name}: {problem}; make a reference with it (cfrl data hull DATASET... --potential {name}) and give it "
            f"as --hull, or declare what it was trained on: {name}@mp-raw (uncorrected Materials Project energies; "
            f"they get the MP2020 corrections) or {name}@mp2020 (corrected ones)"
        )

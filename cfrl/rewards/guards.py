"""Guards: what earns nothing, whatever the reward says, because it is a way to a prize that is none.

An optimiser finds whatever a potential, a reference or a predictor gets wrong, and whatever is easy without being new.
The flags of a screening (`stability/flags.py`) close most of these ways; a tuning heeds them from the first step on,
and some more. Each can be lifted by its name. `docs/rewards.md` says what each closes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cfrl.crystals.distances import contacts
from cfrl.errors import UserError, nearest
from cfrl.rewards.registry import RewardInfo
from cfrl.rewards.scoring import Inputs, Scored
from cfrl.stability.flags import APART, FLAGS, OVERLAP, composition_flags, hull_flags, relaxation_flags

LANTHANIDE_SWAP = "lanthanide_swap"
GUARDS = {
    **FLAGS,
    "overlap": "two atoms nearer than 0.7 sums of covalent radii: potentials and predictors never saw such crystals",
    "known": "a formula that is known already: repeating the training data is no discovery",
    LANTHANIDE_SWAP: "a crystal that came before with a neighbouring lanthanide counts as a repeat",
}
# These say that nobody knows, not that the crystal is bad: it is left out of learning, neither praised nor blamed.
ABSTAIN = ("sparse_reference", "known")
OF_HULL = ("far_below_hull", "sparse_reference")


def heeded(allow: str | None) -> tuple[str, ...]:
    """The guards that are left when those of a list such as "element,known", or "all", are lifted.

    Raises:
        UserError: a name that is none.
    """
    lifted = {name.strip() for name in (allow or "").split(",") if name.strip()}
    for name in lifted - {"all"}:
        if name not in GUARDS:
            raise UserError(f"allow {name}: no such guard{nearest(name, GUARDS)}; there are: {', '.join(GUARDS)}, all")
    return () if "all" in lifted else tuple(name for name in GUARDS if name not in lifted)


def guard_info(others: Iterable[RewardInfo], hull: bool) -> RewardInfo:
    """The term that tells of each crystal which guards it meets; its value is how many, its parts say which.

    Args:
        others: the terms of the reward. Guards that need an energy hold where these ask for one anyway.
        hull: whether the potential's energies can be compared with the hull's.
    """
    needs = {need for info in others for need in info.needs}
    passes = needs & {"energy", "forces", "stress", "features"}
    names = [name for name in GUARDS if name != LANTHANIDE_SWAP]
    if not (passes and hull):
        names = [name for name in names if name not in OF_HULL]
    if "known" in needs:  # the reward has its own word on what is known
        names.remove("known")
    asked = ("known", *(("energy", "hull") if passes and hull else ()))

    def meet(crystals: Any, structures: list[Any], inputs: Inputs) -> Scored:
        found = _flags(crystals, inputs, names)
        parts = {name: found[name].astype(float) for name in names}
        return Scored(sum(parts.values()), parts=parts)

    return RewardInfo("guard", meet, "how many guards a crystal meets", needs=asked, parts=tuple(names))


def _flags(crystals: Any, inputs: Inputs, names: list[str]) -> dict[str, np.ndarray]:
    """(n,) bool by name."""
    formulas, relaxed = crystals.formulas(), inputs.relaxed
    found = composition_flags(formulas)
    nearest = [contacts(structure, APART) for structure in relaxed.structures]
    isolation, closest = (np.array([of(near) for near in nearest]) for of in (np.max, np.min))
    found |= relaxation_flags(relaxed.volume_change, relaxed.rmsd, isolation)
    found["overlap"] = closest < OVERLAP
    if "known" in names:
        found["known"] = inputs.context.known.holds(formulas)
    if "sparse_reference" in names:
        result = inputs.context.hull.e_above_hull(crystals, inputs.evaluation.energy)
        found |= hull_flags(result.e_above_hull, result.num_references)
    return found

"""Guards: what earns nothing, whatever the reward says, because it is a way to a prize that is none.

An optimiser finds whatever a potential, a reference or a predictor gets wrong, and whatever is easy without being new.
The flags of a screening (`stability/flags.py`) close most of these ways; a tuning heeds them from the first step on,
and some more. Each can be lifted by its name. `docs/rewards.md` says what each closes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.distances import contacts
from cfrl.crystals.refusal import KNOWN, Refusal
from cfrl.rewards.context import PASSES, Inputs, RewardContext, Scored
from cfrl.rewards.expression import Expression, Term
from cfrl.rewards.registry import RewardInfo
from cfrl.rewards.scoring import Reward, RewardResult
from cfrl.rewards.stability import chance
from cfrl.settings import parse_names
from cfrl.stability.flags import APART, FLAGS, OVERLAP, hull_flags, relaxation_flags
from cfrl.tables import spread_out

LANTHANIDE_SWAP, UNSTABLE = "lanthanide_swap", "unstable"
GUARDS = {
    **FLAGS,
    "overlap": "two atoms nearer than 0.7 sums of covalent radii: potentials and predictors never saw such crystals",
    UNSTABLE: "likely to end more than 0.1 eV/atom above the hull: what falls apart has no properties (where crystals "
    "are relaxed before they are scored, by a reward that does not ask for the hull itself)",
    "known": "a formula that is known already: repeating the training data is no discovery",
    LANTHANIDE_SWAP: "a crystal that came before with a neighbouring lanthanide counts as a repeat",
}
# Says that nobody knows, not that the crystal is bad: it is left out of learning, neither praised nor blamed.
ABSTAIN = frozenset({"sparse_reference"})
MET = Term("guard")
OF_STRUCTURE = ("exploded", "overlap")
OF_HULL = ("far_below_hull", "sparse_reference", UNSTABLE)


def heeded(allow: str | None) -> tuple[str, ...]:
    """The guards that are left when those of a list such as "element,known", or "all", are lifted.

    Raises:
        UserError: a name that is none.
    """
    lifted = parse_names(allow, (*GUARDS, "all"), "allow", "guard")
    return () if "all" in lifted else tuple(name for name in GUARDS if name not in lifted)


class Guarded(Reward):
    """A reward that heeds guards: a crystal that meets one has no total, and its status says which.

    Those of the composition come first: what they stop costs no evaluation. A sampler that asks `refuses` first hands
    in none of them. That a formula is known is for a reward of new crystals to mind; a property can be learned from
    known crystals too.

    Args:
        guards: names of `GUARDS`.
    """

    def __init__(
        self, expression: Expression, infos: Mapping[Term, RewardInfo], context: RewardContext, guards: Iterable[str]
    ) -> None:
        self.guards = tuple(guards)
        needs = {need for info in infos.values() for need in info.needs}
        self.withheld = Refusal(self.guards, context.known if KNOWN in self.guards else None)
        self.refuses = Refusal(set(self.guards) - ({KNOWN} - needs), self.withheld.known)
        self._seen = [name for name in OF_STRUCTURE if name in self.guards]
        if needs & PASSES and context.fits_hull:  # where an energy is at hand anyway
            minded = {UNSTABLE} if "hull" in needs else set()
            self._seen += [name for name in OF_HULL if name in self.guards and name not in minded]
        self.lasting = UNSTABLE in self._seen
        infos = {**infos, MET: self._info()} if self._seen else infos
        super().__init__(expression, infos, context)
        self.needs = needs

    def __call__(
        self, crystals: CrystalBatch, structures: Sequence[Any] | None = None, update: bool = True
    ) -> RewardResult:
        """As `Reward`; the terms of a crystal whose composition meets a guard are NaN."""
        status = self.refuses.reasons(crystals.formulas())
        go = [row for row, met in enumerate(status) if not met]
        chosen = None if structures is None else [structures[row] for row in go]
        result = super().__call__(crystals[go], chosen, update)
        for name in sorted(self._seen, key=ABSTAIN.__contains__):  # faults before doubts
            for place in np.flatnonzero(result.terms[f"{MET}/{name}"]):
                result.status[place] = result.status[place] or name
        for row, reason in zip(go, result.status, strict=True):
            status[row] = reason
        terms = {name: spread_out(values, go, len(status)) for name, values in result.terms.items() if not _own(name)}
        total = np.where([not reason for reason in status], spread_out(result.total, go, len(status)), np.nan)
        abstained = np.array([reason in ABSTAIN for reason in status], dtype=bool)
        told = [reason in ("", UNSTABLE) for reason in status]
        worth = np.where(told, spread_out(result.worth, go, len(status)), np.nan)
        status = [f"guard: {reason}" if reason in GUARDS else reason for reason in status]
        return RewardResult(total, terms, status, abstained, worth)

    @property
    def columns(self) -> list[str]:
        """Names of the columns in `RewardResult.terms`."""
        return [name for name in super().columns if not _own(name)]

    def _info(self) -> RewardInfo:
        """The term whose parts say which other guards a crystal meets."""
        needs = ("energy", "hull") if set(self._seen) & set(OF_HULL) else ()

        def meet(crystals: CrystalBatch, structures: list[Any], inputs: Inputs) -> Scored:
            found = self._structures(crystals, inputs)
            parts = {name: found[name].astype(float) for name in self._seen}
            return Scored(sum(parts.values()), parts=parts)

        return RewardInfo(MET.name, meet, needs=needs or ("potential",), parts=tuple(self._seen))

    def _structures(self, crystals: CrystalBatch, inputs: Inputs) -> dict[str, np.ndarray]:
        """(n,) bool by name."""
        relaxed = inputs.relaxed
        nearest = [contacts(structure, APART) for structure in relaxed.structures]
        isolation, closest = (np.array([of(near) for near in nearest]) for of in (np.max, np.min))
        found = relaxation_flags(relaxed.volume_change, relaxed.rmsd, isolation)
        found["overlap"] = closest < OVERLAP
        if set(self._seen) & set(OF_HULL):
            result = inputs.context.hull.e_above_hull(crystals, inputs.evaluation.energy)
            found |= hull_flags(result.e_above_hull, result.num_references)
            hopeless = chance(result.e_above_hull, relaxed.fall) < 0.5
            found[UNSTABLE] = hopeless & (inputs.context.relax_steps > 0)
        return found


def _own(name: str) -> bool:
    return name == MET.name or name.startswith(f"{MET}/")

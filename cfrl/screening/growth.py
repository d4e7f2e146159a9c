"""What is kept of a growing dataset: relaxed crystals judged one lot after the other, each against those before it.

Near the hull, unlike anything known or kept, and without a flag. What is kept becomes a phase of the hull, so that
later finds compete with earlier ones. Candidates and their relaxations: `candidates.py`; files and processes: the
command, `commands/data_grow.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import Candidate, match_against, prepare
from cfrl.crystals.kinds import kinds
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import KNOWN, REFUSED, Refusal
from cfrl.model.wishes import has_elements
from cfrl.runs.journal import Record
from cfrl.screening import balance
from cfrl.screening.candidates import SOURCES, Plan, dense, from_record, near_copies
from cfrl.screening.options import GrowthOptions
from cfrl.stability.flags import FLAGS, hull_flags
from cfrl.stability.hull import ReferenceHull

_Row = tuple[CrystalBatch, int]  # one of a batch
COUNTED = ("proposed", "passed", "kept")


@dataclass
class Tallies:
    """Candidates of each of `SOURCES` so far: all, those that the balance let pass, those kept; (2, *SHAPE) each."""

    proposed: np.ndarray = field(default_factory=lambda: np.zeros((len(SOURCES), *balance.SHAPE), dtype=np.int64))
    passed: np.ndarray = field(default_factory=lambda: np.zeros((len(SOURCES), *balance.SHAPE), dtype=np.int64))
    kept: np.ndarray = field(default_factory=lambda: np.zeros((len(SOURCES), *balance.SHAPE), dtype=np.int64))

    def state(self) -> dict[str, torch.Tensor]:
        """As a checkpoint keeps it; `of_state` is the way back."""
        return {name: torch.from_numpy(getattr(self, name)) for name in COUNTED}

    @classmethod
    def of_state(cls, state: dict[str, torch.Tensor]) -> Tallies:
        return cls(*(state[name].numpy().copy() for name in COUNTED))


class Growth:
    """The crystals that there are, the hull that they make, and what is asked of more."""

    def __init__(
        self,
        options: GrowthOptions,
        reference: ReferenceHull,
        known: CrystalBatch | None,
        real: CrystalBatch,
        grown: CrystalBatch,
        allowed: Iterable[str] = (),
    ) -> None:
        """
        Args:
            reference: the hull before anything was kept.
            known: crystals that are no find; None: the formulas that the embedded generator learnt from.
            real: what the shares of kinds and space groups are taken from, where it holds the elements that are wished.
            grown: crystals kept earlier, with properties "energy_per_atom" (eV) and "e_above_reference".
            allowed: names of `FLAGS` that keep no crystal out.
        """
        self.options, self.reference = options, reference
        self.flags = [name for name in FLAGS if name not in set(allowed)]
        self.hull = reference[np.arange(len(reference))]
        asked = has_elements(real, options)
        real = real[asked] if asked.any() else real
        compounds = kinds(real)["elements"] > 0
        self.real = balance.count(real[compounds] if "element" in self.flags and compounds.any() else real)
        self.tallies = Tallies()
        self._known = KnownFormulas.embedded() if known is None else KnownFormulas.of(known.formulas())
        self._alike: dict[str, list[Candidate | _Row]] = defaultdict(list)  # by formula
        self._keys: set[str] = set()
        if known is not None:
            self._keys.update(near_copies(known))
            if options.new == "structure":
                self._note(known)
        self._keys.update(near_copies(grown))
        self._note(grown)
        if len(grown) and "e_above_reference" in grown.properties:
            self._add_phases(grown, grown.properties["energy_per_atom"].numpy())

    def plan(
        self, model: str, prototypes: Iterable[str], table: np.ndarray, hull: str | None = None, number: int = 1
    ) -> Plan:
        """For the next lots of a round of this number, from what came of the earlier ones; `Plan` names the rest."""
        tallies = self.tallies
        accept = {
            source: balance.acceptance(
                self.real, tallies.proposed[i], tallies.passed[i], tallies.kept[i], self.options.balance
            )
            for i, source in enumerate(SOURCES)
        }
        guards = [name for name in REFUSED if name in self.flags]
        guards += [KNOWN] * (self.options.new == "formula")
        return Plan(
            self.options,
            number,
            model,
            tuple(prototypes),
            table,
            accept,
            Refusal(guards, self._known),
            KnownFormulas.of(self._keys),
            "exploded" not in self.flags,
            hull,
        )

    def take(self, record: Record) -> tuple[CrystalBatch, dict[str, np.ndarray], Counter[str]]:
        """What of a lot is kept, with its columns, and how many of its candidates met what."""
        counts: Counter[str] = Counter(record["counts"])
        crystals, energy = from_record(record["crystals"]), np.array(record["energy_per_atom"])
        own = self.reference.e_above_hull(crystals, energy).credible()
        above = self.hull.e_above_hull(crystals, energy).e_above_hull
        flags = hull_flags(own.e_above_hull, own.num_references)
        keys, rows = near_copies(crystals), []
        for row in range(len(crystals)):
            reason = next((name for name, flag in flags.items() if flag[row] and name in self.flags), "")
            if own.status[row]:
                reason = reason or "no_hull"
            elif above[row] > self.options.within:
                reason = reason or "above_hull"
            if reason or (reason := self._repeats(crystals[row], keys[row])):
                counts[reason] += 1
                continue
            self._keys.add(keys[row])
            rows.append(row)
        counts["kept"] += len(rows)
        kept = crystals[rows]
        self._count(record, rows)
        self._add_phases(kept, energy[rows], own.e_above_hull[rows])
        columns = {
            "energy_per_atom": energy[rows],
            "e_above_hull": above[rows],
            "e_above_reference": own.e_above_hull[rows],
            "source": np.full(len(rows), record["source"], dtype=object),
            "parent": np.array(record["parent"], dtype=object)[rows],
        }
        return kept, columns, counts

    def _repeats(self, crystal: CrystalBatch, key: str) -> str:
        """Whether a relaxed crystal, a batch of one, is like one that there is; if not it is one from now on."""
        if key in self._keys:
            return "copy_relaxed"
        formula = crystal.formulas()[0]
        own, others = _prepared((crystal, 0)), [_prepared(other) for other in self._alike[formula]]
        self._alike[formula] = [*others]  # made ready once
        if match_against([own], others)[0] is not None:
            return "duplicate"
        self._alike[formula].append(own)
        return ""

    def _note(self, crystals: CrystalBatch) -> None:
        bare = replace(crystals, ids=None, properties={})
        for row, formula in enumerate(crystals.formulas()):
            self._alike[formula].append((bare, row))

    def _add_phases(self, crystals: CrystalBatch, energy: np.ndarray, above: np.ndarray | None = None) -> None:
        """Only what lies below the reference can lower the hull; the others change no distance."""
        above = crystals.properties["e_above_reference"].numpy() if above is None else above
        low = np.flatnonzero(above < 0)
        if len(low):
            self.hull.add(crystals[low], energy[low])

    def _count(self, record: Record, rows: list[int]) -> None:
        which = SOURCES.index(record["source"])
        self.tallies.proposed[which] += dense(record["proposed"])
        self.tallies.passed[which] += dense(record["passed"])
        np.add.at(self.tallies.kept[which].reshape(-1), np.array(record["place"], dtype=np.int64)[rows], 1)


def _prepared(crystal: Candidate | _Row) -> Candidate:
    if isinstance(crystal, Candidate):
        return crystal
    batch, row = crystal
    return prepare(batch[row].to_structures()[0])

"""Elastic tensors and phonons of candidates: who is asked, and what follows from the answers.

They cost more than all stages before, so only what is a candidate by those is asked. A candidate that turns out
unstable is none any more. With `follow` it gets a successor, whither its imaginary mode leads: a new row of the table,
which goes through all stages as the others did, and through these. Successors have none of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.potentials import full_name
from cfrl.rewards.expression import Expression
from cfrl.runs.journal import Record, Work
from cfrl.screening import stages
from cfrl.screening.inputs import KnownCrystal
from cfrl.screening.options import ScreeningOptions
from cfrl.screening.phonons import PhononSettings, require_phonopy
from cfrl.screening.pipeline import InProcess, match, relaxed_by, restore, run_stages
from cfrl.screening.table import DESCRIBED, ELASTIC, PARENT, PHONONS, Table

if TYPE_CHECKING:
    from pymatgen.core import Structure

_ELASTIC_CHUNK = 4  # crystals that a worker gets at once
_FOLLOW = stages.Relaxation(fmax=0.02, steps=300, keep_symmetry=False)
_NOWHERE = "not followed: no supercell is small enough for its imaginary modes"
_FOLLOW_SYMPREC = 0.05  # angstrom; of the symmetry to which a successor has come


def asked_columns(options: ScreeningOptions) -> tuple[str, ...]:
    """The columns that the options ask for. Raises UserError where phonopy is missing."""
    columns = DESCRIBED * options.describe + ELASTIC * options.elastic
    if not options.phonons:
        return columns
    require_phonopy()
    return columns + PHONONS + (PARENT,) * options.follow


@dataclass
class Probes:
    """Fills the columns of `ELASTIC` and `PHONONS`; table and structures grow by the successors.

    work, table, structures, options, known, predictors: of the stages that are done.
    judge: notes stability, what a second judge says, and flags in the table.
    rank, condition: of candidates, as `Table.order` takes them. What names a column that is about to be filled waits
        for it, and candidates are chosen without it.
    elastic, phonons: row -> record of `stages.elastic`, of `stages.phonons`.
    """

    work: Work | InProcess
    table: Table
    structures: dict[int, Structure]
    options: ScreeningOptions
    known: dict[str, list[KnownCrystal]] | None
    predictors: list[str]
    judge: Callable[[Work | InProcess], None]
    rank: Expression
    condition: Expression
    elastic: dict[int, Record] = field(default_factory=dict)
    phonons: dict[int, Record] = field(default_factory=dict)

    def run(self) -> None:
        options = self.options
        if options.elastic:
            self._ask_elastic(self._candidates((*ELASTIC, *PHONONS)))
        if options.phonons:
            self._ask_phonons(self._candidates(PHONONS)[: options.phonons])
        if not (options.phonons and options.follow and (found := self._follow())):
            return
        first, self.work = len(self.table), self.work.about(found.values())
        self._add_successors(found)
        if options.elastic:
            self._ask_elastic(self._candidates((*ELASTIC, *PHONONS), first))
        self._ask_phonons(self._candidates(PHONONS, first))

    def _candidates(self, unknown: tuple[str, ...], first: int = 0) -> list[int]:
        """Rows from `first` on, best first, chosen without the unknown columns."""
        self.judge(self.work)
        rank, condition = self.rank, self.condition
        if any(term.name in unknown for term in rank.terms):
            rank = Expression("ehull" if self.table.stability else "density")
        if any(term.name in unknown for term in condition.terms):
            condition = Expression("1")
        order = self.table.order(rank, condition)
        return [int(row) for row in order if row >= first and self.table["candidate"][row]]

    def _ask_elastic(self, rows: list[int]) -> None:
        ask = partial(stages.elastic, potential=self.options.potential, device=self.options.device)
        items = {row: self.structures[row] for row in rows}
        records = self.work.run("elastic", ask, items, self._settings(), _ELASTIC_CHUNK)
        self.table.fill(records, status="elastic_status")
        self.elastic |= records

    def _ask_phonons(self, rows: list[int]) -> None:
        how = PhononSettings(self.options.supercell, self.options.phonon_tolerance)
        ask = partial(stages.phonons, potential=self.options.potential, device=self.options.device, settings=how)
        items = {row: self.structures[row] for row in rows}
        records = self.work.run("phonons", ask, items, self._settings() | asdict(how), 1)
        self.table.fill(records, status="phonon_status")
        self.phonons |= records

    def _settings(self) -> dict[str, Any]:
        return {"potential": full_name(self.options.potential), "of": relaxed_by(self.options)}

    def _follow(self) -> dict[int, Structure]:
        """Row of an unstable crystal -> the structure that its imaginary mode leads to."""
        how = {"potential": self.options.potential, "device": self.options.device}
        ask = partial(stages.follow, **how, settings=_FOLLOW, symprec=_FOLLOW_SYMPREC)
        modes = {row: record["mode"] for row, record in self.phonons.items() if record.get("mode")}
        items = {row: (restore(mode["cell"]), mode["displacements"]) for row, mode in modes.items()}
        settings = self._settings() | {"supercell": self.options.supercell, "by": asdict(_FOLLOW)}
        records = self.work.run("follow", ask, items, settings, 1)
        for row in self.phonons:
            if self.table["dynamically_stable"][row] == 0:
                self.table["phonon_status"][row] = records[row]["status"] if row in records else _NOWHERE
        return {row: restore(record["structure"]) for row, record in records.items() if "structure" in record}

    def _add_successors(self, found: dict[int, Structure]) -> None:
        """New rows, led through the stages, and held against the other crystals of the table but the unstable ones.

        A slight distortion of a crystal is its equal to StructureMatcher: a successor were a duplicate of its parent.
        """
        table, first = self.table, len(self.table)
        more = Table([f"{table['id'][row]}-followed" for row in found], list(found.values()), [], {})
        more.add_columns(name for name in table.columns if name not in more.columns and not name.startswith("input_"))
        more[PARENT][:] = [table["id"][row] for row in found]
        ends = run_stages(self.work, list(found.values()), more, self.options, self.known, self.predictors)
        table.extend(more)
        self.structures |= {first + row: end for row, end in ends.items()}
        if self.options.unique:
            others = (table["dynamically_stable"] != 0) & np.isin(table["formula"], more["formula"])
            fit = {row: structure for row, structure in self.structures.items() if others[row]}
            match(InProcess(), table, fit, self.known, {})

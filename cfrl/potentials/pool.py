"""A potential in many processes, or on many machines: crystals go to an engine, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cfrl.potentials import Evaluation, Potential, load_potential
from cfrl.potentials.relax import Relaxed, RelaxResult, relax
from cfrl.runs.devices import choose_device
from cfrl.runs.engine import LOST, Engine

if TYPE_CHECKING:
    from pymatgen.core import Structure

Result = TypeVar("Result", Evaluation, RelaxResult)
CHUNK = {"cpu": 8, "cuda": 128}  # crystals that a worker gets at once


class PotentialPool:
    """Relaxes and evaluates on the workers of an engine; each loads a potential once, by its name.

    What comes out does not depend on how many workers there are. A crystal that costs a worker its life has a status.
    """

    def __init__(self, engine: Engine, device: str = "auto") -> None:
        """device: of each worker; also decides how many crystals it gets at once."""
        self.engine, self.device = engine, device
        self._chunk = CHUNK[choose_device(device).type]

    def relax(self, name: str, structures: Sequence[Structure], steps: int) -> RelaxResult:
        """As `relax`, the space group kept."""
        if not len(structures):
            return RelaxResult.of([])
        move = partial(_relaxed, name=name, device=self.device, steps=steps)
        lost = RelaxResult.of([Relaxed(None, np.nan, 0, False, LOST, np.nan, np.nan)])
        return RelaxResult.cat(self._each(move, structures, lambda structure: lost))

    def compute(self, name: str, structures: Sequence[Structure], like: Potential, **asked: bool) -> Evaluation:
        """As `Potential.compute`. like: the potential, for the sizes of what is lost."""
        if not len(structures):
            return like.blank([], **asked)
        evaluate = partial(_computed, name=name, device=self.device, **asked)

        def lost(structure: Structure) -> Evaluation:
            return replace(like.blank([structure], **asked), status=[LOST])

        return Evaluation.cat(self._each(evaluate, structures, lost))

    def _each(
        self,
        work: Callable[[list[Structure]], list[Result]],
        structures: Sequence[Structure],
        lost: Callable[[Structure], Result],
    ) -> list[Result]:
        rows = range(len(structures))
        chunks = [list(structures[start : start + self._chunk]) for start in rows[:: self._chunk]]
        found: list[Result | None] = [None] * len(structures)
        for index, results in self.engine.map(work, chunks):
            found[index * self._chunk : index * self._chunk + len(results)] = results
        return [lost(structure) if one is None else one for structure, one in zip(structures, found, strict=True)]


@cache
def loaded(name: str, device: str) -> Potential:
    """A potential, loaded once in a process."""
    return load_potential(name, choose_device(device))


def _relaxed(structures: list[Structure], name: str, device: str, steps: int) -> list[RelaxResult]:
    result = relax(structures, loaded(name, device), steps=steps)
    return [result[row : row + 1] for row in range(len(structures))]


def _computed(structures: list[Structure], name: str, device: str, **asked: Any) -> list[Evaluation]:
    result = loaded(name, device).compute(structures, **asked)
    return [result[row : row + 1] for row in range(len(structures))]

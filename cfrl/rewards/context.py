"""What rewards work with, loaded when first used and computed once for all terms, and what they may return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.runs.ranks import ALONE, Ranks

if TYPE_CHECKING:
    import torch
    from pymatgen.core import Structure

    from cfrl.crystals.known import KnownFormulas
    from cfrl.potentials import Evaluation, Potential
    from cfrl.potentials.pool import PotentialPool
    from cfrl.potentials.relax import RelaxResult
    from cfrl.rewards.predictors import Predictor
    from cfrl.stability.hull import ReferenceHull

PASSES = {"energy", "features"}  # of the needs, those that the potential serves from crystals as they are scored


@dataclass
class Scored:
    """What a reward function may return in place of an array.

    values: (n,), NaN where it could not be scored
    status: n strings, "" or the reason
    spread: (n,) how unsure each value is, one standard deviation, for rewards registered with `spread`
    parts: (n,) for each of the names registered as `parts`
    """

    values: np.ndarray
    status: Sequence[str] | None = None
    spread: np.ndarray | None = None
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Settled:
    """n crystals on their way down in energy.

    structures: n; those that could not be started as they were drawn
    volume_change: (n,) relative to the start; rmsd: (n,) angstrom; NaN where it failed
    fall: (n,) eV/atom by which the last step lowered the energy, 0 where nothing more is to come
    evaluation: energies and why some failed; None: nothing was relaxed
    """

    structures: list[Structure]
    volume_change: np.ndarray
    rmsd: np.ndarray
    fall: np.ndarray
    evaluation: Evaluation | None = None


class RewardContext:
    """What rewards work with, loaded when first used and shared by all terms.

    potential: a `Potential` or the name of one
    hull: a `ReferenceHull` or a file; None: the embedded one
    dataset: known crystals for `novelty`: a name, a file or a `CrystalBatch`
    device: where models run
    caution: spreads to subtract from every predicted quantity; None: each reward's own
    timeout: seconds that one call of a reward from outside this package may take; None: for ever
    known: crystals that are no discovery, for `sun` and the guards: as `dataset`; None: what the embedded generator
        learnt from
    relax_steps: evaluations by which a crystal is relaxed, its symmetry kept, before it is scored; 0: as it was drawn
    ranks: the processes that share the work of potentials
    pool: workers that do it, for each of the ranks; None: it is done here
    memo: where rewards keep what they work out once
    """

    def __init__(
        self,
        potential: Potential | str = "chgnet",
        hull: ReferenceHull | str | None = None,
        dataset: CrystalBatch | str | None = None,
        device: torch.device | str | None = None,
        caution: float | None = None,
        timeout: float | None = None,
        known: CrystalBatch | str | None = None,
        relax_steps: int = 0,
        ranks: Ranks = ALONE,
        pool: PotentialPool | None = None,
    ) -> None:
        """Raises UserError for a potential that workers cannot load, since it has no name."""
        if pool is not None and not isinstance(potential, str):
            raise UserError("a pool of workers loads the potential by its name: give that")
        self._potential, self._hull, self._dataset, self._known = potential, hull, dataset, known
        self.relax_steps, self.ranks, self.pool = relax_steps, ranks, pool
        self.device = None if device is None or str(device) == "auto" else device
        self.caution, self.timeout = caution, timeout
        self.memo: dict[Any, Any] = {}
        self._predictors: dict[str, Predictor] = {}
        self._others: dict[str, Potential] = {}

    @cached_property
    def potential(self) -> Potential:
        if not isinstance(self._potential, str):
            return self._potential
        from cfrl.potentials import load_potential

        return load_potential(self._potential, self.device)

    @cached_property
    def hull(self) -> ReferenceHull:
        from cfrl.stability.hull import ReferenceHull

        return self._hull if isinstance(self._hull, ReferenceHull) else ReferenceHull.load(self._hull)

    @property
    def fits_hull(self) -> bool:
        """Whether the potential's energies can be compared with the hull's."""
        try:
            self.check_scale()
        except UserError:
            return False
        return True

    def check_scale(self) -> None:
        """Raises UserError if the potential's energies cannot be compared with the hull's."""
        from cfrl.stability.scales import check_scale

        check_scale(self._potential, self.hull)

    @cached_property
    def dataset(self) -> CrystalBatch:
        """Raises UserError if no dataset was given."""
        if self._dataset is None:
            raise UserError("the reward 'novelty' needs known crystals to compare with: give --dataset")
        if isinstance(self._dataset, CrystalBatch):
            return self._dataset
        from cfrl.io.datasets import load_dataset

        return load_dataset(self._dataset)

    @cached_property
    def known(self) -> KnownFormulas:
        """Formulas that are no discovery."""
        from cfrl.crystals.known import KnownFormulas

        if self._known is None:
            return KnownFormulas.embedded()
        if isinstance(self._known, CrystalBatch):
            return KnownFormulas.of(self._known.formulas())
        from cfrl.io.datasets import load_dataset

        return KnownFormulas.of(load_dataset(self._known).formulas())

    def load(self, needs: Iterable[str], predictors: Iterable[str] = ()) -> None:
        """Load now what would be loaded when first used. Raises UserError for what cannot be."""
        for need in needs:
            getattr(self, need if need in ("hull", "dataset", "known") else "potential")
        for name in predictors:
            self.feature_potential(self.predictor(name))

    def predictor(self, name: str) -> Predictor:
        """A property predictor, embedded (by name) or in a file."""
        if name not in self._predictors:
            from cfrl.rewards.predictors import load_predictor

            self._predictors[name] = load_predictor(name)
        return self._predictors[name]

    def feature_potential(self, predictor: Predictor) -> Potential:
        """The potential that gives the features a predictor was trained on: the shared one wherever possible.

        Raises UserError if neither it nor the one named in the predictor's file does.
        """
        if predictor.feature_version == self.potential.feature_version:
            potential = self.potential
        else:
            potential = self._other(predictor.potential)
        predictor.check(potential)
        return potential

    def relax(self, structures: list[Structure]) -> RelaxResult:
        """Structures relaxed by `relax_steps`, a share by each of the processes."""
        from cfrl.potentials.relax import RelaxResult, relax

        def share(rows: slice) -> RelaxResult:
            if self.pool is not None:
                return self.pool.relax(self._potential, structures[rows], self.relax_steps)
            return relax(structures[rows], self.potential, steps=self.relax_steps)

        return RelaxResult.cat(self.ranks.shared(share, len(structures)))

    def compute(self, potential: Potential, structures: list[Structure], **asked: bool) -> Evaluation:
        """As `Potential.compute`, a share by each of the processes."""
        from cfrl.potentials import Evaluation

        def share(rows: slice) -> Evaluation:
            if self.pool is not None:
                return self.pool.compute(self._name(potential), structures[rows], potential, **asked)
            return potential.compute(structures[rows], **asked)

        return Evaluation.cat(self.ranks.shared(share, len(structures)))

    def _name(self, potential: Potential) -> str:
        return next((name for name, other in self._others.items() if other is potential), self._potential)

    def _other(self, name: str) -> Potential:
        """A potential beside the shared one, loaded once."""
        if name not in self._others:
            from cfrl.potentials import load_potential

            self._others[name] = load_potential(name, self.device)
        return self._others[name]


class Inputs:
    """What rewards with `needs` get beside the crystals: the shared passes of the potential, and the context."""

    def __init__(self, context: RewardContext, crystals: CrystalBatch, structures: list[Any], needs: set[str]) -> None:
        self.context, self.crystals, self.structures = context, crystals, structures
        self._needs = needs
        self._predictions: dict[str, tuple[np.ndarray, np.ndarray, list[str]]] = {}

    @cached_property
    def relaxed(self) -> Settled:
        """The crystals as they are scored: relaxed by `relax_steps`, or as they were drawn."""
        n = len(self.structures)
        if not (self.context.relax_steps and self._needs & PASSES):
            return Settled(list(self.structures), np.zeros(n), np.zeros(n), np.zeros(n))
        from cfrl.potentials import Evaluation

        result = self.context.relax(self.structures)
        ends = [drawn if end is None else end for drawn, end in zip(self.structures, result.structures, strict=True)]
        energy = np.where([not reason for reason in result.status], result.energy, np.nan)
        return Settled(ends, result.volume_change, result.rmsd, result.fall, Evaluation(energy, result.status))

    @cached_property
    def evaluation(self) -> Evaluation:
        """Energy and features (where some term needs them) of the crystals as they are scored."""
        relaxed = self.relaxed
        if relaxed.evaluation is None:
            return self.drawn
        if "features" not in self._needs:
            return relaxed.evaluation
        found = self.context.compute(self.context.potential, relaxed.structures, features=True)
        # one that fell apart on the way has features, but they tell nothing
        found.status = [a or b for a, b in zip(relaxed.evaluation.status, found.status, strict=True)]
        found.energy = np.where([not reason for reason in found.status], found.energy, np.nan)
        return found

    @cached_property
    def drawn(self) -> Evaluation:
        """What the terms need of the crystals as they were drawn."""
        asked = {need: need in self._needs for need in ("forces", "stress", "features")}
        return self.context.compute(self.context.potential, self.structures, **asked)

    def predict(self, name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Mean (n,), spread (n,) and status of a predictor, each predictor asked once."""
        if name not in self._predictions:
            predictor = self.context.predictor(name)
            potential = self.context.feature_potential(predictor)
            shared = potential is self.context.potential
            ends = self.relaxed.structures
            evaluation = self.evaluation if shared else self.context.compute(potential, ends, features=True)
            mean, spread = predictor.predict(ends, evaluation)
            self._predictions[name] = mean, spread, list(evaluation.status)
        return self._predictions[name]

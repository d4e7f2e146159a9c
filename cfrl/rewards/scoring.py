"""From a formula to scores of a batch: each term once, one pass of the potential for all, statuses, a cache.

Sign. A term is a physical quantity. A reward given by a bare name is maximised or minimised as its `goal` says:
``ehull`` means "as low as possible", so its total is minus the energy above the hull. In an expression the user
writes the signs: ``dielectric_bandgap - 2*ehull``. Totals are always to be maximised.

Caution. A term with a spread enters as the value, within K spreads of its mean, that makes the total of that crystal
the least: the mean less K spreads where much is wanted, plus K spreads where little is, and what lies farthest off a
target. What enters is held between the `minimum` and the `maximum` of the reward. The columns of the terms hold the
means as they are; ``TERM/spread`` holds the spread.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.refusal import Refusal
from cfrl.errors import UserError
from cfrl.rewards.context import Inputs, RewardContext, Scored
from cfrl.rewards.expression import Expression, Term
from cfrl.rewards.registry import RewardInfo, describe, find_reward
from cfrl.runs import interrupt

if TYPE_CHECKING:
    import torch


WITHIN = np.linspace(-1, 1, 9)  # in units of caution times spread
HULL_STEPS, PROPERTY_STEPS = 4, 8  # evaluations
NOT_FINITE = "the expression has no finite value here"


@dataclass
class RewardResult:
    """Scores of n crystals.

    total: (n,) float64, to be maximised, NaN where there is a status
    terms: (n,) float64 by name: each term's own value, ``TERM/part`` and ``TERM/spread``
    status: n strings, "" or the reason why there is no total
    abstained: (n,) bool, where there is no total because nobody can know it, no fault of the crystal; None: nowhere
    worth: (n,) float64, the total at the predictors' word: nothing taken off for doubt, nor for what falls apart; NaN
        where it is unknown; None: the total
    """

    total: np.ndarray
    terms: dict[str, np.ndarray]
    status: list[str]
    abstained: np.ndarray | None = None
    worth: np.ndarray | None = None


def build_reward(
    spec: str,
    *,
    context: RewardContext | None = None,
    definitions: Mapping[str, Mapping[str, Any]] | None = None,
    guards: Iterable[str] = (),
) -> Reward:
    """The reward of an expression, or of a name that `cfrl rewards` lists.

    Args:
        context: what the reward works with; None: the embedded models.
        definitions: names of your own, as the tables [rewards.NAME] of cfrl.toml have them: an `expression` and the
            numbers that it names.
        guards: names of `guards.GUARDS`: a crystal that meets one has no total.

    Raises UserError: an unknown name or parameter, a formula that cannot be read, a file that does not load, a
    potential and a hull on different energy scales where both are needed.
    """
    expression = Expression(spec, definitions or {})
    infos = {term: find_reward(term.name) for term in expression.terms}
    context = context or RewardContext()
    if guards := tuple(guards):
        from cfrl.rewards.guards import Guarded

        return Guarded(expression, infos, context, guards)
    return Reward(expression, infos, context)


def relax_steps_for(reward: Reward) -> int:
    """How far crystals should be relaxed before this reward is asked of them.

    As drawn, 30% of the crystals of `small` lie within 0.1 eV/atom of the hull, relaxed 69%, and the rank
    correlation of the two distances is 0.55; after 4 evaluations it is 0.78 (`bench_relax_steps.py`). What features a
    predictor sees gains more: large cells, drawn with distorted anions, are all metals to it. A critic that learnt band
    gaps of 1,024 crystals ranks the real ones with a ROC AUC of 0.85 (as drawn), 0.92 (4), 0.94 (8), 0.95 (relaxed).
    """
    if "hull" in reward.needs:
        return HULL_STEPS
    return PROPERTY_STEPS if "features" in reward.needs else 0


class Reward:
    """Scores crystals: ``reward(crystals) -> RewardResult``. Remembers every crystal that it has scored.

    Attributes:
        refuses: what it needs not be asked about; None: nothing, it has no guards.
        withheld: what a model tuned by it should not hand out; None: nothing.
        lasting: whether it wants a property of crystals that last.
    """

    refuses: Refusal | None = None
    withheld: Refusal | None = None
    lasting = False

    def __init__(
        self,
        expression: Expression,
        infos: Mapping[Term, RewardInfo],
        context: RewardContext,
    ) -> None:
        self.expression, self.context = expression, context
        self._terms = {term: _BoundTerm(term, info) for term, info in infos.items()}
        self.needs = {need for info in infos.values() for need in info.needs}
        bare = expression.single
        self._sign = -1.0 if bare is not None and infos[bare].goal == "min" else 1.0
        self._cache: dict[bytes, dict[Term, _Row]] = {}
        if any({"energy", "hull"} <= set(info.needs) for info in infos.values()):
            context.check_scale()

    def __repr__(self) -> str:
        return f"Reward({'-' if self._sign < 0 else ''}{self.expression.source})"

    @property
    def columns(self) -> list[str]:
        """Names of the columns in `RewardResult.terms`."""
        return [name for term in self._terms.values() for name in term.columns]

    def __call__(
        self, crystals: CrystalBatch, structures: Sequence[Any] | None = None, update: bool = True
    ) -> RewardResult:
        """Score crystals.

        structures: the same crystals as pymatgen structures, if at hand
        update: let `standardise` learn from them; False to score without leaving a trace

        Raises UserError: a reward function fails on every crystal or returns something that is no score.
        """
        rows = self._rows(crystals, structures)
        scores = {term: bound.join([row[term] for row in rows]) for term, bound in self._terms.items()}
        total, worth = self._total(scores, update)
        status = [self._reason(i, total, scores) for i in range(len(rows))]
        total = np.where(np.isfinite(total), total, np.nan)
        columns = (bound.named(scores[term]) for term, bound in self._terms.items())
        return RewardResult(total, {k: v for named in columns for k, v in named.items()}, status, worth=worth)

    def load(self) -> None:
        """Load the models and tables that the terms work with. Raises UserError for what cannot be loaded."""
        for term in self._terms.values():
            self.context.load(term.info.needs, term.info.predictors)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the statistics of `standardise`."""
        return self.expression.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.expression.load_state_dict(state)

    def smothered(self, columns: Mapping[str, Any]) -> list[str]:
        """What caution leaves next to nothing of: a range that is narrower than what is typically taken off for doubt.

        Args:
            columns: (n,) numbers by name, with the terms' own (`RewardResult.terms`).
        """
        told = []
        for text, term, reach in self.expression.ranges:
            spread = np.asarray(columns.get(f"{term}/spread", np.nan), float)
            doubt = self._caution(term) * np.median(spread[np.isfinite(spread)]) if np.isfinite(spread).any() else 0.0
            if doubt > reach:
                told.append(
                    f"{text} is narrow beside the doubt that is taken off ({doubt:.2g}, median): little of it is left "
                    f"to tell crystals apart. Ask for the probability, in_range(of={term.name}, low=..., high=...), or "
                    "trust the means: --caution 0."
                )
        return told

    def _caution(self, term: Term) -> float:
        own = self._terms[term].info.caution
        return own if self.context.caution is None else self.context.caution

    def _rows(self, crystals: CrystalBatch, structures: Sequence[Any] | None) -> list[dict[Term, _Row]]:
        """Every crystal's terms, from the cache where a crystal has been seen."""
        if not len(crystals):
            return []
        keys = crystal_keys(crystals)
        lasting = [term for term in self._terms.values() if term.info.cached]
        fresh = {key: i for i, key in reversed(list(enumerate(keys))) if key not in self._cache}
        where = sorted(fresh.values())
        if lasting and where:
            known = self._evaluate(lasting, crystals, structures, where)
            self._cache.update({keys[i]: row for i, row in zip(where, known, strict=True)})
        rows = [dict(self._cache.get(key, {})) for key in keys]
        passing = [term for term in self._terms.values() if not term.info.cached]
        if passing:
            whole = self._evaluate(passing, crystals, structures, list(range(len(keys))))
            rows = [row | more for row, more in zip(rows, whole, strict=True)]
        return rows

    def _evaluate(
        self, terms: list[_BoundTerm], crystals: CrystalBatch, structures: Sequence[Any] | None, where: list[int]
    ) -> list[dict[Term, _Row]]:
        some = crystals[where]
        structures = some.to_structures() if structures is None else [structures[i] for i in where]
        needs = {need for term in terms for need in term.info.needs}
        inputs = Inputs(self.context, some, structures, needs)
        columns = {term.term: term.evaluate(some, structures, inputs) for term in terms}
        return [{term: rows[i] for term, rows in columns.items()} for i in range(len(where))]

    def _held(self, term: Term, values: np.ndarray) -> np.ndarray:
        info = self._terms[term].info
        return np.clip(values, info.minimum, info.maximum)

    def _total(self, scores: Mapping[Term, Scored], update: bool) -> tuple[np.ndarray, np.ndarray]:
        """With caution, and without."""
        means = {term: self._held(term, score.values) for term, score in scores.items()}
        total = self._sign * self.expression(means, update)
        if not self._doubts(scores):
            return total, total
        cautious = dict(means)
        for term, doubt in self._doubts(scores).items():
            # not the ends alone: abs(x - 1) is least between them
            values = np.stack([self._held(term, scores[term].values + step * doubt) for step in WITHIN])
            totals = np.stack([self._sign * self.expression(means | {term: value}) for value in values])
            cautious[term] = np.take_along_axis(values, totals.argmin(0)[None], 0)[0]  # the first NaN, if any
        return np.minimum(total, self._sign * self.expression(cautious)), total

    def _doubts(self, scores: Mapping[Term, Scored]) -> dict[Term, np.ndarray]:
        """Caution times spread of the terms that have both."""
        doubts = {}
        for term, score in scores.items():
            caution = self._caution(term)
            if self._terms[term].info.spread and caution:
                doubts[term] = caution * score.spread
        return doubts

    @staticmethod
    def _reason(i: int, total: np.ndarray, scores: Mapping[Term, Scored]) -> str:
        if np.isfinite(total[i]):
            return ""
        reasons = (f"{term}: {score.status[i]}" for term, score in scores.items() if score.status[i])
        return next(reasons, NOT_FINITE)


@dataclass(frozen=True)
class _Row:
    """One crystal's result of one term: `numbers` are value, spread if any, parts."""

    numbers: tuple[float, ...]
    status: str


class _BoundTerm:
    """A reward function with its parameters."""

    def __init__(self, term: Term, info: RewardInfo) -> None:
        self.term, self.info = term, info
        self.parameters = info.check_parameters(dict(term.parameters))
        extra = [*(["spread"] if info.spread else []), *info.parts]
        self.columns = [str(term), *(f"{term}/{name}" for name in extra)]
        self._works = False
        self._given_up: BaseException | None = None

    def evaluate(self, crystals: CrystalBatch, structures: list[Any], inputs: Inputs) -> list[_Row]:
        """One row per crystal. A crystal on which the function raises gets a status, alone."""
        try:
            rows = self._split(self._run(crystals, structures, inputs))
        except UserError:
            raise
        except Exception as error:  # a reward is a user's code and may raise anything
            rows = self._one_by_one(crystals, structures, inputs, error)
        self._works = True
        return rows

    def join(self, rows: list[_Row]) -> Scored:
        table = np.array([row.numbers for row in rows], dtype=np.float64).reshape(len(rows), len(self.columns))
        spread = table[:, 1] if self.info.spread else None
        parts = dict(zip(self.info.parts, table.T[len(self.columns) - len(self.info.parts) :], strict=True))
        return Scored(table[:, 0], [row.status for row in rows], spread, parts)

    def named(self, scored: Scored) -> dict[str, np.ndarray]:
        spread = [] if scored.spread is None else [scored.spread]
        return dict(zip(self.columns, [scored.values, *spread, *scored.parts.values()], strict=True))

    def _run(self, crystals: CrystalBatch, structures: list[Any], inputs: Inputs) -> Scored:
        arguments = (crystals, structures, inputs) if self.info.needs else (crystals, structures)
        out = self._call(arguments, inputs.context.timeout)
        scored = out if isinstance(out, Scored) else Scored(out)
        n = len(crystals)
        values = self._array(scored.values, n)
        status = [""] * n if scored.status is None else list(scored.status)
        for i in np.nonzero(~np.isfinite(values))[0]:
            status[i] = status[i] or ("not a number" if np.isnan(values[i]) else "infinite")
        values = np.where([not reason for reason in status], values, np.nan)
        spread = self._array(scored.spread, n) if self.info.spread else None
        return Scored(values, status, spread, {name: self._array(scored.parts[name], n) for name in self.info.parts})

    def _call(self, arguments: tuple[Any, ...], timeout: float | None) -> Any:
        if (getattr(self.info.function, "__module__", None) or "").startswith("cfrl."):
            return self.info.function(*arguments, **self.parameters)
        if self._given_up is not None:
            raise self._given_up
        try:
            return interrupt.call(partial(self._call_foreign, arguments), timeout)
        except interrupt.TooLong:
            self._given_up = UserError(
                f"reward '{self.term}' took longer than {timeout:g} s for {len(arguments[0])} crystals and was given "
                "up; mend it, or give it more time: --reward-timeout SECONDS (0: for ever)"
            )
        except interrupt.Abandoned:
            self._given_up = interrupt.Abandoned(f"reward '{self.term}' did not end and was given up")
        raise self._given_up

    def _call_foreign(self, arguments: tuple[Any, ...]) -> Any:
        try:
            return self.info.function(*arguments, **self.parameters)
        except Exception:
            raise
        except BaseException as error:  # sys.exit() and the like must not end the run as if all were well
            raise UserError(
                f"reward '{self.term}' ended the program ({describe(error)}); it should return its scores, or raise an "
                "ordinary exception"
            ) from error

    def _one_by_one(
        self, crystals: CrystalBatch, structures: list[Any], inputs: Inputs, error: Exception
    ) -> list[_Row]:
        rows: list[_Row] = []
        for i in range(len(crystals)):
            one = Inputs(inputs.context, crystals[[i]], structures[i : i + 1], set(self.info.needs))
            try:
                rows += self._split(self._run(one.crystals, one.structures, one))
                self._works = True
            except UserError:
                raise
            except Exception as alone:  # see evaluate
                rows.append(_Row((math.nan,) * len(self.columns), describe(alone)))
        if not self._works:
            raise UserError(f"reward '{self.term}' fails on every crystal: {describe(error)}") from error
        return rows

    def _array(self, values: Any, n: int) -> np.ndarray:
        """(n,) float64, NaN where an array is masked. Raises UserError for anything that is not n numbers."""
        values = values.detach().cpu() if hasattr(values, "detach") else values
        try:
            array = np.ma.asanyarray(values)
        except ValueError as error:
            raise UserError(f"reward '{self.term}' returned a ragged list instead of {n} numbers") from error
        if array.dtype.kind not in "fiub":
            raise UserError(
                f"reward '{self.term}' returned {array.dtype} instead of numbers (NaN marks what cannot be scored)"
            )
        if array.shape != (n,):
            raise UserError(f"reward '{self.term}' returned shape {array.shape} instead of ({n},), one per crystal")
        return array.astype(np.float64).filled(np.nan)

    def _split(self, scored: Scored) -> list[_Row]:
        table = np.column_stack(list(self.named(scored).values()))
        return [_Row(tuple(numbers), reason) for numbers, reason in zip(table.tolist(), scored.status, strict=True)]


def crystal_keys(crystals: CrystalBatch) -> list[bytes]:
    """(n) keys, equal for crystals that are written equally to 1e-4 of the cell and 1e-3 A or degrees."""
    sites = crystals.num_sites.tolist()
    columns = (
        crystals.space_group.cpu().numpy().astype(np.int16),
        crystals.wyckoff.cpu().numpy().astype(np.int16),
        crystals.species.cpu().numpy().astype(np.int16),
        _rounded(crystals.frac_coords, 1e-4),
        _rounded(crystals.lattice, 1e-3),
    )
    keys = []
    for i, s in enumerate(sites):
        group, wyckoff, species, coords, lattice = (column[i] for column in columns)
        content = b"".join(x.tobytes() for x in (group, wyckoff[:s], species[:s], coords[:s], lattice))
        keys.append(hashlib.blake2b(content, digest_size=16).digest())
    return keys


def _rounded(values: torch.Tensor, unit: float) -> np.ndarray:
    far = 2.0**60
    steps = values.detach().cpu().double().numpy() / unit
    return np.rint(np.nan_to_num(steps, nan=-far, posinf=far, neginf=-far)).astype(np.int64)

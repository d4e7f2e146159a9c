"""One step's crystals on their way from the sampler through the reward, and what a run remembers of earlier ones.

A rollout is crystals, the scores of each, and a status for those without one. Memory: scores seen lately (for the
penalty), how often each fingerprint came lately (diversity filter), some for replay. Objectives: `policy.py`;
the loop: `loop.py`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.model.distributions import SamplerOptions
from cfrl.model.drawing import draw
from cfrl.model.sampler import random_seed, require_common, seeded
from cfrl.runs.ranks import ALONE, Ranks
from cfrl.tables import spread_out

INVALID = "atoms too close or impossible cell"
RECENT = 2000  # scores that a percentile penalty looks back on


@dataclass
class Rollout:
    """n scored crystals on the CPU, sites in the order drawn.

    reward: (n,) float64, NaN without a score.
    valid: (n,) bool, no two atoms too close and a possible cell.
    status: n strings, "" where there is a score, else the reason why not.
    abstained: (n,) bool, without a score because nobody can tell it: neither praised nor blamed.
    terms: (n,) float64 by name, of each term of the reward in its own unit.
    seconds: time spent by stage; sampling and scoring may overlap.
    refused: how many more were drawn, and thrown away for what they are made of.
    worth: (n,) float64, see `RewardResult`; NaN where it is unknown.
    """

    crystals: CrystalBatch
    reward: Tensor
    valid: Tensor
    status: list[str]
    abstained: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    refused: int = 0
    worth: Tensor | None = None

    def __post_init__(self) -> None:
        self.worth = self.reward if self.worth is None else self.worth

    def __len__(self) -> int:
        return len(self.status)

    @property
    def scored(self) -> Tensor:
        """(n,) bool."""
        return ~torch.isnan(self.reward)

    def table(self, **columns: Tensor) -> CrystalBatch:
        """The crystals with reward, terms and `columns`, (n,) each, as properties: the rows of a file."""
        known = {"valid": self.valid.double(), "reward": self.reward, **self.terms}
        return replace(self.crystals, properties=known | columns)

    @classmethod
    def cat(cls, parts: Sequence[Rollout], seconds: Mapping[str, float]) -> Rollout:
        """The parts one after the other."""
        return cls(
            CrystalBatch.cat(part.crystals for part in parts),
            torch.cat([part.reward for part in parts]),
            torch.cat([part.valid for part in parts]),
            [reason for part in parts for reason in part.status],
            torch.cat([part.abstained for part in parts]),
            {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms},
            dict(seconds),
            sum(part.refused for part in parts),
            torch.cat([part.worth for part in parts]),
        )


KEPT_COLUMNS = ("reward", "worth", "log_prob", "base", "asked", "first")


@dataclass
class Kept:
    """n crystals that are kept for replay.

    reward, worth: (n,) float64, NaN without a score.
    log_prob: (n,) float64, log P(C, G) under the policy that drew them.
    base: (n, 5) float64, log-probabilities under the starting model.
    asked: (n,) bool, whether a score was asked for.
    first: (n,) bool, whether they were there before the first step: crystals of the starting model.
    keys: their fingerprints.
    """

    crystals: CrystalBatch
    reward: Tensor
    worth: Tensor
    log_prob: Tensor
    base: Tensor
    asked: Tensor
    first: Tensor
    keys: list[str]

    @classmethod
    def none(cls) -> Kept:
        """No crystal."""
        nothing = torch.empty(0, 5, dtype=torch.float64)
        number, mark = nothing[:, 0], nothing[:, 0].bool()
        return cls(CrystalBatch.empty(), number, number, number, nothing, mark, mark, [])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: Tensor) -> Kept:
        keys = [self.keys[row] for row in rows]
        columns = (getattr(self, name)[rows] for name in KEPT_COLUMNS)
        return Kept(self.crystals[rows].trim(), *columns, keys)

    def __add__(self, other: Kept) -> Kept:
        crystals = CrystalBatch.cat([self.crystals, other.crystals])
        columns = (torch.cat([getattr(self, name), getattr(other, name)]) for name in KEPT_COLUMNS)
        return Kept(crystals, *columns, self.keys + other.keys)


def collect(
    model: torch.nn.Module,
    space_groups: Callable[[int], Tensor],
    n: int,
    options: SamplerOptions,
    reward: Callable[..., Any],
    *,
    seed: int,
    chunk: int,
    min_distance: float = 0.5,
    wanted: Callable[[CrystalBatch], np.ndarray] | None = None,
    ranks: Ranks = ALONE,
) -> Rollout:
    """Draw n crystals and score them; one lot is scored while the next is drawn, where one process does both.

    Impossible crystals are not drawn again: a policy should learn what they are. Each lot is drawn by a generator of
    its own, seeded by (seed, lot): what the reward's thread does has no part in it.

    Args:
        space_groups: draws so many of them, (k,).
        chunk: crystals drawn at once.
        wanted: which of k crystals to keep, (k,) bool, such as a `Refusal`; None: all. What is kept follows the policy
            conditioned on it. Its log-probability differs from the policy's by a number that is the same for all
            crystals of a group, which no objective here sees: each takes the mean off what it learns from.
        ranks: the processes that share the drawing; the reward sees to its own (`RewardContext`).

    Raises:
        UserError: the reward cannot be computed at all, or hardly anything is wanted.
    """
    seconds = Counter()
    lots = draw_lots(
        model, space_groups, n, options, seed=seed, chunk=chunk, wanted=wanted, seconds=seconds, ranks=ranks
    )
    if ranks.size > 1:  # they must not talk of two things at once
        lots = list(lots)
    with ThreadPoolExecutor(1) as worker:
        jobs = [worker.submit(score, *lot, reward, min_distance, seconds) for lot in lots]
        parts = [job.result() for job in jobs]
    return Rollout.cat(parts, seconds)


def draw_lots(
    model: torch.nn.Module,
    space_groups: Callable[[int], Tensor],
    n: int,
    options: SamplerOptions,
    *,
    seed: int,
    chunk: int,
    wanted: Callable[[CrystalBatch], np.ndarray] | None = None,
    seconds: Counter | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[CrystalBatch, int]]:
    """n crystals on the CPU, lot by lot, and how many were refused on the way. Arguments as those of `collect`.

    A round is a lot for each process. Those past the last one needed are thrown away: the crystals are the same for
    any number of processes.
    """
    found = drawn = lot = 0
    while found < n:
        start = time.perf_counter()
        left = [n - found - i * chunk if wanted is None else chunk for i in range(ranks.size)]
        groups = [space_groups(min(chunk, some)) for some in left if some > 0]
        mine = None
        if ranks.rank < len(groups):
            generator = seeded(model.device, random_seed(seed, lot + ranks.rank))
            crystals = draw(model, groups[ranks.rank], options, generator).to("cpu")
            mine = crystals if wanted is None else crystals[torch.from_numpy(np.flatnonzero(wanted(crystals)))]
        if seconds is not None:
            seconds["sample"] += time.perf_counter() - start
        for crystals, asked in zip(ranks.gather(mine), groups, strict=False):
            refused = len(asked) - len(crystals)
            drawn, crystals = drawn + len(asked), crystals[: n - found]
            found += len(crystals)
            require_common(found, drawn, "lift a guard (--allow)")
            if len(crystals):
                yield crystals, refused
        lot += len(groups)


def score(
    crystals: CrystalBatch, refused: int, reward: Callable[..., Any], min_distance: float, seconds: Counter
) -> Rollout:
    """The crystals with their scores; those that are impossible are not asked about."""
    start, n = time.perf_counter(), len(crystals)
    valid = crystals.valid(min_distance)
    result, rows = reward(crystals[valid]), valid.numpy()
    status = np.full(n, INVALID, dtype=object)
    status[rows] = result.status
    terms = {name: torch.from_numpy(spread_out(values, rows, n)) for name, values in result.terms.items()}
    abstained = torch.zeros_like(valid)
    if getattr(result, "abstained", None) is not None:
        abstained[valid] = torch.as_tensor(result.abstained)
    seconds["score"] += time.perf_counter() - start
    total = torch.from_numpy(spread_out(result.total, rows, n))
    worth = getattr(result, "worth", None)
    worth = total if worth is None else torch.from_numpy(spread_out(worth, rows, n))
    return Rollout(crystals, total, valid, status.tolist(), abstained, terms, refused=refused, worth=worth)


def chemical_systems(crystals: CrystalBatch) -> list[frozenset[int]]:
    """Elements of each crystal."""
    return [frozenset(row) - {0} for row in crystals.species.tolist()]


class Memory:
    """What a run remembers of its crystals. `state_dict` and `load_state_dict` make it resumable.

    Args:
        penalty: "5%" (a percentile of the last `RECENT` scores) or a number.
        diversity: how often a fingerprint may come before it earns less; 0: as often as it likes.
        window: among how many of the last crystals it is counted. Not among all: in a long run everything has come
            often, and what counts is whether the policy repeats itself now.
        replay_size: how many crystals are kept for replay.
        best: keep the best of each fingerprint; else the latest, whatever they earned.
        balanced: half of what is replayed are crystals of the starting model, which stay: what is learnt of the whole
            is not forgotten over what the policy draws now.

    Raises:
        UserError: `penalty` is neither.
    """

    def __init__(
        self, penalty: str, diversity: int, window: int, replay_size: int, best: bool = True, balanced: bool = False
    ) -> None:
        self._percentile, self._fixed = _parse_penalty(penalty)
        self._best, self._balanced = best, balanced
        self.diversity, self.window, self.replay_size = diversity, window, replay_size
        self.recent: list[float] = []
        self.seen: set[str] = set()
        self._window_keys: list[str] = []
        self.kept = Kept.none()

    def add(self, rollout: Rollout, keys: list[str]) -> None:
        """Take note of a step's crystals; `keys` are their fingerprints."""
        self.recent = (self.recent + rollout.reward[rollout.scored].tolist())[-RECENT:]
        scored = [key for key, good in zip(keys, rollout.scored.tolist(), strict=True) if good]
        self.seen.update(scored)
        self._window_keys = (self._window_keys + scored)[-self.window :]

    @property
    def penalty(self) -> float:
        """What a crystal without a score earns; 0 as long as nothing was scored."""
        if self._percentile is None:
            return self._fixed
        return float(np.percentile(self.recent, self._percentile)) if self.recent else 0.0

    def with_penalty(self, reward: Tensor) -> Tensor:
        """Reward with the penalty in place of NaN."""
        return torch.where(torch.isnan(reward), self.penalty, reward)

    def earned(self, reward: Tensor, keys: list[str]) -> Tensor:
        """Reward with the penalty in place of NaN, drawn towards the penalty where a fingerprint came too often.

        With k > diversity comings in the window a crystal keeps diversity / k of what it is above the penalty.
        """
        reward = self.with_penalty(reward)
        if not self.diversity:
            return reward
        count = Counter(self._window_keys)
        share = torch.tensor([min(1.0, self.diversity / max(count[key], 1)) for key in keys], dtype=reward.dtype)
        above = reward > self.penalty
        return torch.where(above, self.penalty + share * (reward - self.penalty), reward)

    def keep(
        self,
        rollout: Rollout,
        log_prob: Tensor,
        base: Tensor,
        keys: list[str],
        asked: Tensor | None = None,
        first: Tensor | None = None,
    ) -> None:
        """Keep a step's crystals for replay, those aside that the reward abstains from.

        Args:
            log_prob: (n,) log P(C, G) under the policy that drew them.
            base: (n, 5) log-probabilities under the starting model.
            asked: (n,) bool, whether a score was asked for; None: of all.
            first: (n,) bool, whether these are the crystals of the starting model; None: they are not.
        """
        if not self.replay_size:
            return
        every = torch.ones(len(rollout), dtype=torch.bool)
        asked, first = every if asked is None else asked, ~every if first is None else first
        new = Kept(rollout.crystals, rollout.reward, rollout.worth, log_prob, base, asked, first, keys)
        every = self.kept + new[(~rollout.abstained).nonzero()[:, 0]]
        old = every.first.nonzero()[:, 0] if self._balanced else torch.arange(0)
        later = (~every.first).nonzero()[:, 0] if self._balanced else torch.arange(len(every))
        rows = self._best_rows(every) if self._best else torch.cat([old, later[-self.replay_size :]])
        self.kept = every[rows]

    def _best_rows(self, every: Kept) -> Tensor:
        """The best of each fingerprint, best first."""
        first: dict[str, int] = {}
        for row in torch.argsort(every.reward.nan_to_num(-math.inf), descending=True, stable=True).tolist():
            first.setdefault(every.keys[row], row)
        rows = [row for row in first.values() if not math.isnan(every.reward[row])]
        return torch.tensor(rows[: self.replay_size], dtype=torch.int64)

    def replay(self, n: int, generator: torch.Generator) -> Kept:
        """Up to `n` of those that were kept, at random."""
        return self.kept[self._some(torch.ones(len(self.kept), dtype=torch.bool), n, generator)]

    def lesson(self, n: int, generator: torch.Generator) -> tuple[CrystalBatch, Tensor]:
        """Up to `n` of those whose score was asked for, at random, and what they earned and are worth, (n, 2)."""
        some = self.kept[self._some(self.kept.asked, n, generator)]
        return some.crystals, torch.stack([self.with_penalty(some.reward), self.with_penalty(some.worth)], 1)

    def _some(self, among: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Up to `n` rows of those marked (kept,)."""

        def shuffled(marks: Tensor, most: int) -> Tensor:
            rows = marks.nonzero()[:, 0]
            return rows[torch.randperm(len(rows), generator=generator)[:most]]

        if not self._balanced:
            return shuffled(among, n)
        later = shuffled(among & ~self.kept.first, n // 2)
        return torch.cat([later, shuffled(among & self.kept.first, n - len(later))])

    def forget_scores(self) -> None:
        """Keep what crystals there were, and no score: from now on another reward counts."""
        self.recent, self.kept = [], Kept.none()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        kept = {name: getattr(self.kept, name) for name in (*KEPT_COLUMNS, "keys")}
        seen = {"recent": self.recent, "seen": sorted(self.seen), "window": self._window_keys}
        return {**seen, "kept": kept | {"crystals": vars(self.kept.crystals)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.recent, self.seen, self._window_keys = state["recent"], set(state["seen"]), state["window"]
        kept = dict(state.get("kept", {}))  # older versions kept less
        crystals = CrystalBatch(**kept.pop("crystals")) if kept else None
        self.kept = Kept(crystals, **({"worth": kept["reward"]} | kept)) if kept else Kept.none()


def _parse_penalty(text: str) -> tuple[float | None, float]:
    """(percentile, 0) or (None, number)."""
    try:
        number = float(text.strip().removesuffix("%"))
        if not math.isfinite(number) or (text.strip().endswith("%") and not 0 <= number <= 100):
            raise ValueError
    except ValueError as error:
        raise UserError(f"penalty '{text}': give a number, or a percentile from 0% to 100%") from error
    return (number, 0.0) if text.strip().endswith("%") else (None, number)

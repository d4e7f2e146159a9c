"""One step's crystals on their way from the sampler through the reward, and what a run remembers of earlier ones.

A rollout is a `CrystalBatch` whose properties hold what is known of each crystal (`reward`, every reward term,
`valid`), and a status for those without a score. Memory: scores seen lately (for the penalty), how often each
fingerprint came lately (diversity filter), the best so far (replay). Objectives: `policy.py`; the loop: `loop.py`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.model.distributions import SamplerOptions
from cfrl.model.sampler import draw, seeded

INVALID = "atoms too close or impossible cell"
RECENT = 2000  # scores that a percentile penalty looks back on


@dataclass
class Rollout:
    """n scored crystals on the CPU, sites in the order drawn.

    crystals: properties `reward` (n,), NaN without a score; `valid` 1/0; one per reward term, in its own unit.
    status: n strings, "" where there is a score, else the reason why not.
    terms: names of the reward's terms.
    seconds: time spent by stage; sampling and scoring may overlap.
    """

    crystals: CrystalBatch
    status: list[str]
    terms: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.status)

    @property
    def reward(self) -> Tensor:
        return self.crystals.properties["reward"]

    @property
    def scored(self) -> Tensor:
        """(n,) bool."""
        return ~torch.isnan(self.reward)


def collect(
    model: torch.nn.Module,
    space_groups: Tensor,
    options: SamplerOptions,
    reward: Callable[..., Any],
    *,
    seed: int,
    chunk: int,
    min_distance: float = 0.5,
) -> Rollout:
    """Draw one crystal in each of `space_groups` (n,) and score it; one lot is scored while the next is drawn.

    Nothing is drawn again: a rejected crystal would make the likelihood that of another sampler. Each lot is drawn by a
    generator of its own, seeded by (seed, lot): what the reward's thread does has no part in it.

    Raises:
        UserError: the reward cannot be computed at all.
    """
    seconds = Counter()
    with ThreadPoolExecutor(1) as worker:
        lots = _draw(model, space_groups, options, seed, chunk, min_distance, seconds)
        jobs = [worker.submit(_score, lot, reward, seconds) for lot in lots]
        parts = [job.result() for job in jobs]
    crystals = CrystalBatch.cat(part.crystals for part in parts)
    return Rollout(crystals, [reason for part in parts for reason in part.status], parts[0].terms, dict(seconds))


def _draw(
    model: torch.nn.Module,
    space_groups: Tensor,
    options: SamplerOptions,
    seed: int,
    chunk: int,
    min_distance: float,
    seconds: Counter,
) -> Iterator[CrystalBatch]:
    for k, groups in enumerate(space_groups.split(chunk)):
        start = time.perf_counter()
        crystals = draw(model, groups, options, seeded(model.device, random_seed(seed, k))).to("cpu")
        crystals.properties = {"valid": crystals.valid(min_distance).double()}
        seconds["sample"] += time.perf_counter() - start
        yield crystals


def _score(crystals: CrystalBatch, reward: Callable[..., Any], seconds: Counter) -> Rollout:
    start = time.perf_counter()
    n, valid = len(crystals), crystals.properties["valid"] > 0
    result = reward(crystals[valid])
    status = np.full(n, INVALID, dtype=object)
    status[valid.numpy()] = result.status
    columns = {"reward": result.total, **result.terms}
    scores = {name: _spread(values, valid) for name, values in columns.items()}
    crystals.properties.update(scores)
    seconds["score"] += time.perf_counter() - start
    return Rollout(crystals, status.tolist(), list(result.terms))


def random_seed(*numbers: int) -> int:
    """A seed that is a function of these numbers, and of their order, alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _spread(values: Any, where: Tensor) -> Tensor:
    """Values of the crystals marked in `where`, NaN for the others, (n,) float64."""
    whole = torch.full(where.shape, math.nan, dtype=torch.float64)
    whole[where] = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    return whole


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
        replay_size: how many of the best crystals are kept.

    Raises:
        UserError: `penalty` is neither.
    """

    def __init__(self, penalty: str, diversity: int, window: int, replay_size: int) -> None:
        self._percentile, self._fixed = _parse_penalty(penalty)
        self.diversity, self.window, self.replay_size = diversity, window, replay_size
        self.recent: list[float] = []
        self.seen: set[str] = set()
        self._window_keys: list[str] = []
        self.best = CrystalBatch.empty()
        self._best_keys: list[str] = []

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

    def keep_best(self, crystals: CrystalBatch, keys: list[str]) -> None:
        """Keep the best of each fingerprint; `crystals` have the properties `reward` and `drawn`."""
        if not self.replay_size:
            return
        crystals = CrystalBatch.cat([self.best, crystals]) if len(self.best) else crystals
        keys = self._best_keys + keys
        kept: dict[str, int] = {}
        for row in torch.argsort(crystals.properties["reward"].nan_to_num(-math.inf), descending=True, stable=True):
            kept.setdefault(keys[row], int(row))
        rows = [row for row in kept.values() if not math.isnan(crystals.properties["reward"][row])]
        rows = rows[: self.replay_size]
        self.best, self._best_keys = crystals[rows].trim(), [keys[row] for row in rows]

    def replay(self, n: int, generator: torch.Generator) -> tuple[CrystalBatch, list[str]]:
        """Up to `n` of the best, at random, with their fingerprints."""
        rows = torch.randperm(len(self.best), generator=generator)[:n]
        return self.best[rows], [self._best_keys[row] for row in rows]

    def forget_scores(self) -> None:
        """Keep what crystals there were, and no score: from now on another reward counts."""
        self.recent, self.best, self._best_keys = [], CrystalBatch.empty(), []

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        best = {"best": vars(self.best), "keys": self._best_keys}
        return {"recent": self.recent, "seen": sorted(self.seen), "window": self._window_keys, **best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.recent, self.seen, self._window_keys = state["recent"], set(state["seen"]), state["window"]
        self.best, self._best_keys = CrystalBatch(**state["best"]), state["keys"]


def _parse_penalty(text: str) -> tuple[float | None, float]:
    """(percentile, 0) or (None, number)."""
    try:
        number = float(text.strip().removesuffix("%"))
        if not math.isfinite(number) or (text.strip().endswith("%") and not 0 <= number <= 100):
            raise ValueError
    except ValueError as error:
        raise UserError(f"penalty '{text}': give a number, or a percentile from 0% to 100%") from error
    return (number, 0.0) if text.strip().endswith("%") else (None, number)

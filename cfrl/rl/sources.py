"""Where the crystals of a step come from: drawn from the policy and scored, or recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.model.sampler import random_seed
from cfrl.model.wishes import AllOf, InRange, Wanted
from cfrl.rewards import Reward
from cfrl.rl import policy
from cfrl.rl.rollouts import Rollout, collect, draw_lots
from cfrl.rl.tuning import Tuning

Scorer = Callable[[CrystalBatch], Any]
SCALE_SEED = 0  # the same for all runs, so that the unit of a reward is


class FreshCrystals:
    """Drawn from the policy, and scored. The reward is that of many crystals at once: see `begin`.

    Args:
        scorer: the reward.
        wanted: which crystals to score at all, (n,) bool; None: all that the reward does not refuse.
    """

    fresh = True

    def __init__(self, tuning: Tuning, scorer: Scorer, wanted: Wanted | None = None) -> None:
        if wanted is None and isinstance(scorer, Reward):  # a bare function refuses nothing
            wanted = scorer.refuses
        self.tuning, self.scorer = tuning, scorer
        self.wanted = AllOf.of(wanted, InRange.of(tuning.options))

    def __call__(self, generator: torch.Generator, seed: int) -> Rollout:
        """The crystals of one step. Its `generator` is left alone: many processes draw more lots than one does."""
        options, own = self.tuning.options, torch.Generator().manual_seed(random_seed(seed))
        groups = partial(self.tuning.prior.sample, generator=own, repeats=options.repeats)
        return self._collect(self.tuning.model, groups, options.per_step, seed)

    def judging(self) -> FreshCrystals:
        """The same for judging a model: scores leave no trace in the reward, and what is withheld is not drawn."""
        if not isinstance(self.scorer, Reward):
            return self
        return FreshCrystals(self.tuning, partial(self.scorer, update=False), self.scorer.withheld)

    def unscored(self, n: int, seed: int) -> Rollout:
        """n wanted crystals of the starting model, without a score."""
        tuning, chunk = self.tuning, self.tuning.options.draw_size
        groups = space_groups(tuning.prior.base, seed)
        lots = draw_lots(
            tuning.base, groups, n, tuning.sampler, seed=seed, chunk=chunk, wanted=self.wanted, ranks=tuning.ranks
        )
        crystals = CrystalBatch.cat([CrystalBatch.empty(), *(lot for lot, _ in lots)])
        every, nothing = torch.ones(n, dtype=torch.bool), torch.full((n,), torch.nan, dtype=torch.float64)
        return Rollout(crystals, nothing, every, [""] * n, ~every)

    def draw(self, n: int, seed: int, tuned: bool) -> Rollout:
        """n scored crystals of the policy, or of the starting model; the same for the same seed."""
        tuning = self.tuning
        model, shares = (tuning.model, tuning.prior.log_prob()) if tuned else (tuning.base, tuning.prior.base)
        return self._collect(model, space_groups(shares, seed), n, seed)

    def survey(self) -> Rollout:
        """Many scored crystals of the starting model: the unit of the reward and the shares of kinds come from them.

        One step's crystals would do for most rewards, but not for sparse ones (85% of the crystals of `small`
        earn no `dielectric_bandgap`): from batch to batch the unit would change by a factor of three, and beta with it.
        The crystals are the same whatever the run's seed: the unit belongs to the model and the reward.
        """
        return self.draw(self.tuning.options.scale_crystals, SCALE_SEED, tuned=False)

    def _collect(self, model: nn.Module, groups: Callable[[int], Tensor], n: int, seed: int) -> Rollout:
        options = self.tuning.options
        return collect(
            model,
            groups,
            n,
            self.tuning.sampler,
            self.scorer,
            seed=seed,
            chunk=options.draw_size,
            min_distance=options.min_distance,
            wanted=self.wanted,
            ranks=self.tuning.ranks,
        )


class RecordedCrystals:
    """Crystals with rewards (n,) that were drawn before, n of them at random per step; for paired objectives.

    Raises:
        UserError: no two crystals of one space group differ in reward.
    """

    fresh = False

    def __init__(self, crystals: CrystalBatch, reward: Tensor, per_step: int) -> None:
        self.crystals, self.reward, self.per_step = replace(crystals, properties={}), reward, per_step
        if not len(self._pairs(torch.Generator())):
            raise UserError("no two crystals of one space group differ in reward; nothing to prefer")

    def __call__(self, generator: torch.Generator, seed: int) -> Rollout:
        """Neighbours by space group come together: a random choice of single crystals would hold few pairs."""
        pairs = self._pairs(generator)
        few = torch.randperm(len(pairs), generator=generator)[: max(self.per_step // 2, 1)]
        rows = pairs[few].unique()
        reward = self.reward[rows]
        status = ["no score" if missing else "" for missing in torch.isnan(reward)]
        every = torch.ones(len(rows), dtype=torch.bool)
        return Rollout(self.crystals[rows].trim(), reward, every, status, ~every)

    def survey(self) -> Rollout:
        """All of them."""
        every = torch.ones(len(self.crystals), dtype=torch.bool)
        return Rollout(self.crystals, self.reward, every, [""] * len(every), ~every)

    def _pairs(self, generator: torch.Generator) -> Tensor:
        return policy.preference_pairs(self.reward.nan_to_num(-1e9), self.crystals.space_group, generator)


def space_groups(log_shares: Tensor, seed: int) -> Callable[[int], Tensor]:
    """Draws so many space groups."""
    generator, shares = torch.Generator().manual_seed(seed), log_shares.detach().exp().cpu()
    return partial(torch.multinomial, shares, replacement=True, generator=generator)


Source = FreshCrystals | RecordedCrystals

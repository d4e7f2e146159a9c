"""Steering: crystals of pi*(C) ~ pi_base(C) exp(r(C) / beta), drawn without tuning a model.

pi* is what tuning regresses to (docs/retrieval.md); here it is sampled, for one wish and some hundreds of crystals. A
population of crystals starts as the model draws them and is cooled towards pi*: at each inverse temperature t it is
weighted and resampled to pi_base exp(t r / beta), and moved by chains that leave this as it is (annealed sequential
Monte Carlo: Neal 2001; Del Moral, Doucet and Jasra 2006). The effective size of the weights says how fast. The moves,
and why they are right, stand in `model/chains.py`.

A score costs a hundred draws. So a chain walks some steps by the word of a critic, which learns from all that was
scored, before the reward is asked whether it may stay where it has got to. That is right whatever the critic says; what
a poor one costs is proposals.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import UserError
from cfrl.model import sampler
from cfrl.model.chains import Prior, Tally, accept, walk
from cfrl.model.sampler import random_seed, seeded, space_group_shares
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import AllOf, InRange, Wanted, sampler_options, wishes_of
from cfrl.rewards import Reward, RewardContext, build_reward, relax_steps_for
from cfrl.rewards.context import PASSES
from cfrl.rewards.guards import heeded
from cfrl.rl import loop
from cfrl.rl.critic import Critic
from cfrl.rl.mixing import effective_draws, effective_size, next_temperature, split_r_hat, systematic
from cfrl.rl.options import SteeringOptions
from cfrl.rl.rollouts import Rollout, draw_lots, score
from cfrl.rl.sources import SCALE_SEED, Scorer, space_groups

# How often each move is made. Elements decide most of what a crystal is worth, so most moves change them.
WEIGHTS = {"fresh": 1.0, "regrow": 3.0, "coordinates": 1.0, "lattice": 1.0, "site": 3.0, "element": 3.0}
STEPS = 8  # of a walk by the word of a critic, for each score
EFFECTIVE = 0.9  # of the chains: how far the effective size of the weights may fall from one temperature to the next
SURVEY, LOT = 1024, 128  # crystals of the model that give the unit, and how many are drawn at once: as tuning has them
MOTIONLESS = 100  # sweeps in which no chain has moved, after which none will
WALK_SEED = 2  # of what the chains do, beside the user's
STEERING = {f.name for f in fields(SteeringOptions)}


@dataclass
class Steered:
    """What steering leaves.

    crystals: up to n, in random order, with "log_prob" (log P(C | G) of the model), "reward" and its terms.
    scored: all that were scored on the way; status: of each, "" or why it has no score.
    numbers: what was watched, see `Steering.numbers`.
    ended: why it ended before its time, or "".
    """

    crystals: CrystalBatch
    scored: CrystalBatch
    status: list[str]
    numbers: dict[str, float]
    ended: str = ""


class Scores:
    """Asks the reward, counts how often, and remembers every answer.

    Args:
        wanted: which crystals may come out, (n,) bool.
    """

    def __init__(self, scorer: Scorer, wanted: Wanted, min_distance: float) -> None:
        self.scorer, self.wanted, self.min_distance = scorer, wanted, min_distance
        self.parts: list[Rollout] = []
        self.asked, self.seconds = 0, Counter()

    def possible(self, crystals: CrystalBatch) -> Tensor:
        """(n,) bool: neither refused for the composition nor impossible; others have no probability, and no score."""
        good = torch.from_numpy(np.array(self.wanted(crystals), dtype=bool))
        good[good.clone()] = crystals[good].valid(self.min_distance)
        return good

    def __call__(self, crystals: CrystalBatch) -> Rollout:
        """Of n crystals on the CPU."""
        rollout = score(crystals, 0, self.scorer, self.min_distance, self.seconds)
        self.asked += int(rollout.valid.sum())
        self.parts.append(rollout)
        return rollout

    def all(self) -> Rollout:
        """Every crystal that was asked about so far."""
        return Rollout.cat(self.parts, self.seconds)


@dataclass
class Chains:
    """n crystals on the CPU, and of each its reward (n,), the terms of that, and from which of the model's it descends.

    ancestor: (n,) int64.
    """

    crystals: CrystalBatch
    reward: Tensor
    terms: dict[str, Tensor]
    ancestor: Tensor

    def __len__(self) -> int:
        return len(self.reward)

    def __getitem__(self, rows: Tensor) -> Chains:
        terms = {name: values[rows] for name, values in self.terms.items()}
        return Chains(self.crystals[rows], self.reward[rows], terms, self.ancestor[rows])

    @classmethod
    def cat(cls, parts: Sequence[Chains]) -> Chains:
        """One after the other."""
        crystals = CrystalBatch.cat(part.crystals for part in parts)
        reward, ancestor = (torch.cat([getattr(part, name) for part in parts]) for name in ("reward", "ancestor"))
        terms = {name: torch.cat([part.terms[name] for part in parts]) for name in parts[0].terms}
        return cls(crystals, reward, terms, ancestor)

    @classmethod
    def of(cls, rollout: Rollout) -> Chains:
        """Each its own ancestor."""
        return cls(rollout.crystals, rollout.reward, rollout.terms, torch.arange(len(rollout)))

    def table(self) -> CrystalBatch:
        """The crystals with what is known of them."""
        known = {"log_prob": self.crystals.properties["log_prob"], "reward": self.reward, **self.terms}
        return replace(self.crystals, properties=known)


class Steering:
    """A run: its chains, their inverse temperature, the critic, what was watched.

    Args:
        prior: what the model draws.
        scorer: the reward.
        options: sizes and limits.
        wanted: what may come out, (n,) bool of n crystals.
        asked: what the reward is asked about when its unit is taken, likewise; None: all.
        seed: of the chains. The crystals that give the unit are the same whatever it is, and those of tuning.
        criticised: whether chains walk by the word of a critic.
        stopped: tells whether somebody wishes to stop.
        watch: called with this object whenever crystals were scored.

    Attributes:
        temperature: inverse: 0, as the model draws, to 1, as is wished.
        kept: the chains after each sweep at 1.
    """

    def __init__(
        self,
        prior: Prior,
        scorer: Scorer,
        options: SteeringOptions,
        wanted: Wanted,
        asked: Wanted | None = None,
        *,
        min_distance: float = 0.5,
        seed: int = 0,
        criticised: bool = False,
        stopped: Callable[[], bool] = lambda: False,
        watch: Callable[[Steering], None] = lambda steering: None,
    ) -> None:
        self.prior, self.options, self.asked, self.stopped, self.watch = prior, options, asked, stopped, watch
        self.scores = Scores(scorer, wanted, min_distance)
        self.generator = seeded(prior.model.device, random_seed(seed, WALK_SEED))
        self.lots = torch.Generator().manual_seed(random_seed(seed, WALK_SEED, 0))  # on the CPU
        self.critic = Critic(seed) if criticised else None
        self.walked, self.settled = Tally(), Tally()  # of moves, and of walks whose end the reward was asked about
        self.temperature, self.scale, self.effective = 0.0, 1.0, math.nan
        self.sweeps = self.idle = 0  # all of them, and how many of late in which no chain moved
        self.chains: Chains | None = None
        self.kept: list[Chains] = []
        self.began, self.longest, self.ended = time.monotonic(), 0.0, ""

    def __str__(self) -> str:
        """Where it stands, such as "1,536 scored, cooled to 12%, median 4.1"."""
        where = f"{self.scores.asked:,} scored"
        if self.sweeps:
            where += f", cooled to {self.temperature:.1%}, median reward {float(self.chains.reward.median()):.4g}"
        return where

    def run(self) -> None:
        """From the model's crystals to what is wished, then sweep after sweep until the budget is spent.

        Raises:
            UserError: no crystal of the model has a score, or the reward is at fault.
        """
        self.survey()
        lesson = loop.FIRST_PASSES * self.scores.asked
        while self.has_time(self.options.chains):
            self.learn(lesson)
            if self.temperature < 1:
                self.cool()
            self.sweep()
            lesson = loop.PASSES * self.options.chains

    def survey(self) -> None:
        """Score crystals of the model: they are the first population, and give the unit of the reward."""
        size = min(SURVEY, max(self.options.budget // 2, 1))
        groups = space_groups(self.prior.groups, SCALE_SEED)
        lots = draw_lots(
            self.prior.model, groups, size, self.prior.options, seed=SCALE_SEED, chunk=LOT, wanted=self.asked
        )
        for lot, _ in lots:
            began = time.monotonic()
            self.scores(lot)
            self.longest = time.monotonic() - began
            self.watch(self)
            if not self.has_time(0):
                break
        seen = self.scores.all()
        self.scale = loop.robust_std(seen.reward)
        good = seen.scored.clone()
        good[good.clone()] = self.scores.possible(seen.crystals[good])
        if not good.any():
            why = Counter(reason for reason in seen.status if reason).most_common(1)
            raise UserError(
                f"of {len(seen)} crystals of the model none has a score"
                + (f" ({why[0][1]} times: {why[0][0]})" if why else ": all are refused")
            )
        self.chains = Chains.of(seen)[good.nonzero()[:, 0]]
        if isinstance(self.scores.scorer, Reward):  # what is standardised stays so: the target must not move
            self.scores.scorer = partial(self.scores.scorer, update=False)

    def cool(self) -> None:
        """To the next temperature: weigh the chains, and resample them."""
        n, energy = self.options.chains, self.energy(self.chains.reward)
        size = EFFECTIVE * min(n, len(self.chains))
        there = next_temperature(energy, self.temperature, size)
        log_weight = (there - self.temperature) * energy
        self.effective = effective_size(log_weight)
        self.chains, self.temperature = self.chains[systematic(log_weight, n, self.lots)], there

    def sweep(self) -> None:
        """Every chain walks, and stays where it got to or goes back, as the reward has it."""
        began = time.monotonic()
        chains, t = self.chains, self.temperature
        steps = STEPS if self.critic else 1
        crystals = chains.crystals.trim().to(self.prior.model.device)
        new, told, moved = walk(self.prior, crystals, self.tilt, steps, self.generator, WEIGHTS, self.walked)
        new, rows = new.to("cpu"), moved.nonzero()[:, 0]
        if len(rows):
            found = Chains.of(self.scores(new[rows]))
            found.ancestor = chains.ancestor[rows]
            rise = t * self.energy(found.reward - chains.reward[rows]) - told[rows]
            taken = accept(rise, self.lots)  # NaN, no score, is never taken
            self.settled.add("score", taken)
            where = torch.arange(len(chains)).index_put((rows[taken],), len(chains) + taken.nonzero()[:, 0])
            self.chains = Chains.cat([chains, found])[where]
        self.sweeps, self.idle = self.sweeps + 1, 0 if len(rows) else self.idle + 1
        if t == 1:
            self.kept.append(self.chains)
        self.longest = time.monotonic() - began
        self.watch(self)

    def tilt(self, crystals: CrystalBatch) -> Tensor:
        """What a walk goes by, (n,): the critic's word, 0 without one; -inf for what cannot be."""
        crystals = crystals.to("cpu")
        good = self.scores.possible(crystals)
        told = torch.zeros(len(crystals), dtype=torch.float64)
        if self.critic and good.any():
            told[good] = self.temperature / self.options.beta * self.critic(crystals[good])
        return told.masked_fill(~good, -torch.inf)

    def energy(self, reward: Tensor) -> Tensor:
        """r / beta, with r in its unit."""
        return reward / (self.scale * self.options.beta)

    def learn(self, n: int) -> None:
        """The critic learns n of the crystals that were scored; one without a score earned the least of all."""
        if self.critic is None:
            return
        seen = self.scores.all()
        rows = (seen.valid & ~seen.abstained).nonzero()[:, 0]
        reward = seen.reward[rows] / self.scale
        reward = torch.where(reward.isnan(), reward[~reward.isnan()].min(), reward)
        for _ in range(math.ceil(n / len(rows))):
            some = torch.randperm(len(rows), generator=self.lots)[:n]
            self.critic.learn(seen.crystals[rows[some]], reward[some], self.lots)

    def has_time(self, more: int) -> bool:
        """Whether there is time and budget for another round with so many scores at most; else `ended` says why not."""
        limit = self.options.time_limit
        if self.stopped():
            self.ended = "Stopped."
        elif limit and time.monotonic() - self.began + self.longest > 60 * limit:
            self.ended = "The time limit is reached."
        elif self.scores.asked + more > self.options.budget:
            self.ended = "The budget is spent."
        elif self.idle == MOTIONLESS:
            self.ended = "No chain finds anywhere to go."
        return not self.ended

    def result(self, n: int) -> Steered:
        """Up to n crystals of the last sweeps at the temperature that was reached."""
        parts = self.kept[-math.ceil(n / self.options.chains) :] or [self.chains]
        last = Chains.cat(parts)
        rows = torch.randperm(len(last), generator=self.lots)[:n]
        crystals = last[rows].table()
        seen = self.scores.all()
        scored = seen.table(log_prob=seen.crystals.properties["log_prob"])[seen.valid]
        status = [reason for reason, valid in zip(seen.status, seen.valid.tolist(), strict=True) if valid]
        return Steered(crystals, scored, status, self.numbers(crystals), self.ended)

    def numbers(self, crystals: CrystalBatch | None = None) -> dict[str, float]:
        """How far crystals (None: those of the chains) can be trusted to be samples of the target.

        "temperature": inverse, 1 where beta is as asked; "beta": what it is, in the reward's "unit". "effective": size
        that the last weights were worth. "r_hat": split R-hat of the reward over chains; "effective_draws": what the
        sweeps at 1 are worth. "ancestors": from how many of the model's crystals the chains descend. "accepted/MOVE":
        share of proposals taken within the walks; "accepted/score": of walks, by the reward.
        """
        crystals = self.chains.crystals if crystals is None else crystals
        seconds = time.monotonic() - self.began
        rewards = torch.stack([chains.reward for chains in self.kept], 1) if self.kept else torch.zeros(1, 0)
        return {
            "reward/mean": float(self.chains.reward.mean()),
            "reward/median": float(self.chains.reward.median()),
            "scored": self.scores.asked,
            "seconds": seconds,
            "scored_per_second": self.scores.asked / max(seconds, 1e-9),
            "unit": self.scale,
            "temperature": self.temperature,
            "beta": self.options.beta / self.temperature if self.temperature else math.inf,
            "sweeps": self.sweeps,
            "sweeps_at_beta": len(self.kept),
            "effective": self.effective,
            "r_hat": split_r_hat(rewards),
            "effective_draws": effective_draws(rewards),
            "ancestors": len(self.chains.ancestor.unique()),
            "unique": len(set(fingerprints(crystals))) / max(len(crystals), 1),
            "formulas": len(set(crystals.formulas())),
            **{f"accepted/{name}": rate for name, rate in (self.walked.rates() | self.settled.rates()).items()},
        }


# ---- for a caller ----------------------------------------------------------------------------------------------------


def steer(
    model: CrystalTransformer,
    toward: str | Scorer,
    n: int = 100,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    min_distance: float = 0.5,
    wanted: Wanted | None = None,
    context: RewardContext | None = None,
    stopped: Callable[[], bool] = lambda: False,
    watch: Callable[[Steering], None] = lambda steering: None,
    **options: Any,
) -> Steered:
    """Crystals of pi*(C) ~ pi_base(C) exp(r(C) / beta), and how well they were sampled.

    Args:
        toward: the reward r, a name or an expression (see `build_reward`), or what scores a batch of crystals.
        n: how many of the last chains to hand out.
        temperature, top_p, min_distance, seed, wanted: what pi_base is; see `sample`.
        context: what a named reward works with; None: the embedded models.
        stopped: tells whether somebody wishes to stop.
        watch: called with the state whenever crystals were scored; see `Steering.numbers`.
        options: fields of `SteeringOptions`, such as beta=0.1, budget=2000, and of `Wishes`, such as system="Ba-Ti-O".

    Raises:
        UserError: an option, a wish or the reward is at fault, or no crystal of the model has a score.
    """
    settings = SteeringOptions(**{k: v for k, v in options.items() if k in STEERING})
    asked = wishes_of(**{k: v for k, v in options.items() if k not in STEERING})
    limits = sampler_options(asked, model.config.max_sites - 1, temperature, top_p)
    if isinstance(toward, str):
        toward = build_reward(toward, context=context, guards=heeded(settings.allow))
        if context is None:
            toward.context.relax_steps = relax_steps_for(toward)
    judged = toward if isinstance(toward, Reward) else None
    refusal = AllOf.of(judged and judged.withheld, wanted, InRange.of(asked))
    was_training = model.training
    model.eval()
    steering = Steering(
        Prior(model, limits, space_group_shares(model, asked, limits)),
        toward,
        settings,
        refusal or (lambda crystals: np.ones(len(crystals), dtype=bool)),
        judged and judged.refuses,
        min_distance=min_distance,
        seed=int(np.random.SeedSequence(seed).generate_state(1)[0]) if seed is None else seed,
        criticised=bool(judged and PASSES & judged.needs),
        stopped=stopped,
        watch=watch,
    )
    steering.run()
    model.train(was_training)
    return steering.result(n)


def sample(
    model: CrystalTransformer,
    n: int,
    *,
    toward: str | Scorer | None = None,
    **wishes: Any,
) -> CrystalBatch:
    """Generates n crystals.

    Args:
        model: from `load_model`.
        toward: a reward, name or expression, whose high values are sought: crystals of pi_base exp(r / beta), by chains
            that score thousands (docs/steering.md), with "reward" and its terms as properties; None: of the model.
        wishes: `space_group`, `elements`, `max_atoms`, `temperature`, `top_p`, `seed`, `min_distance`, `wanted`, as
            `cfrl.model.sampler.sample` has them, and more of its own. With `toward`: `beta`, `budget`, `time_limit`,
            `chains`, `allow` of `SteeringOptions` and `context`, `watch` of `steer`, which also tells how well it went.

    Returns:
        CrystalBatch on the CPU with properties "log_prob" (log P(C | G) of the model, nats), and others.

    Raises:
        UserError: a wish or the reward that leaves nothing to draw, or a damaged model.
    """
    if toward is None:
        return sampler.sample(model, n, **wishes)
    return steer(model, toward, n, **wishes).crystals

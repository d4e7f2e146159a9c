"""How a policy is tuned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfrl.model.options import Wishes
from cfrl.settings import (
    Count,
    CountOrZero,
    Distance,
    Fraction,
    FractionBelowOne,
    Minutes,
    PositiveFraction,
    PositiveWeight,
    Seed,
    Settings,
    SignedWeight,
    Temperature,
    Weight,
    option,
)


@dataclass(frozen=True)
class TuningOptions(Wishes):
    """Draw, score, update: sizes, objective, limits."""

    algorithm: Literal["vargrad", "ppo", "grpo", "rloo", "dpo", "rebel"] = option(
        "vargrad",
        "vargrad (regression to the optimum, from fresh and earlier crystals), ppo, grpo (space group as prompt), rloo "
        "(leave-one-out), dpo (preferences between pairs) or rebel (differences of reward between pairs).",
    )
    steps: Count = option(60, "Rounds of sampling, scoring and updating.")
    time_limit: Minutes | None = option(
        None,
        "Minutes of work (earlier sessions of a resumed run count) after which the run ends; 0: no limit.",
        unset=0.0,
    )
    n: Count | None = option(
        None,
        "Crystals drawn and scored per step; 0: 128, or 32 where a critic makes more of them.",
        unset=0,
        flags=("-n",),
    )
    group_size: Count | None = option(
        None,
        "Crystals drawn for each space group that is drawn (before refusals); 0: 8 where they are compared within "
        "their group (grpo, dpo, rebel), else 1.",
        unset=0,
    )
    draw_size: Count = option(128, "Crystals drawn at once; while one lot is scored the next is drawn.")
    epochs: Count = option(1, "Passes over each step's crystals.")
    batch_size: Count = option(128, "Crystals (dpo, rebel: pairs) per optimiser step.")
    micro_batch: Count = option(32, "Crystals per backward pass; gradients of a batch are accumulated.")
    lr: PositiveFraction = option(3e-4, "Peak learning rate of Adam, per optimiser step.")
    lr_final: Fraction = option(
        0.05, "Learning rate at the end of the steps or the time limit, as a fraction of the peak (falls linearly)."
    )
    warmup: CountOrZero = option(5, "Steps of linear learning-rate warm-up.")
    clip_gradient: PositiveWeight = option(1.0, "Largest norm of the gradient; longer ones are shortened to it.")
    clip_ratio: PositiveWeight = option(0.2, "PPO: policy ratios beyond 1 +- this earn nothing more.")
    clip_advantage: PositiveWeight | None = option(
        5.0, "Largest size of an advantage, in units of the reward (see standardize); 0: no limit.", unset=0.0
    )
    baseline_decay: Fraction = option(
        0.9, "Decay, per step, of the running means of rewards, one for each space group, that are PPO's baseline."
    )
    standardize: bool = option(
        True, "Count rewards in standard deviations of the starting model's, so that beta suits any reward."
    )
    scale_crystals: Count = option(
        1024, "Crystals of the starting model that are scored before the first step, for their standard deviation."
    )
    beta: Weight | None = option(
        None,
        "Weight of the KL to the starting model, in units of the reward (see standardize); negative: 0.05 where a "
        "critic takes part, else 0.2.",
        unset=-1.0,
    )
    anchor: Weight = option(
        0.0,
        "Weight of the likelihood of real crystals (--dataset) beside the reward, in units of the reward per nat: "
        "what was learned from data is not forgotten; 0: none. Not for vargrad.",
    )
    kl: Literal["reward", "loss"] = option("reward", "Where the KL enters: reward (as in the paper) or loss.")
    target_kl: PositiveWeight | None = option(
        None, "Adapt beta so that the KL stays near this many nats; 0: fixed beta.", unset=0.0
    )
    max_kl: PositiveWeight | None = option(
        100.0, "Stop the run when the KL passes this many nats; 0: never.", unset=0.0
    )
    max_step_kl: PositiveWeight | None = option(
        0.3, "Leave a step's crystals once the policy is this many nats from where it drew them; 0: never.", unset=0.0
    )
    entropy_wyckoff: SignedWeight = option(
        0.0, "Bonus for the entropy of Wyckoff letters, in units of the reward per nat."
    )
    entropy_species: SignedWeight = option(0.0, "Bonus for the entropy of elements, in units of the reward per nat.")
    entropy_coords: SignedWeight = option(0.0, "Bonus for the entropy of coordinates, in units of the reward per nat.")
    entropy_lattice: SignedWeight = option(0.0, "Bonus for the entropy of the lattice, in units of the reward per nat.")
    penalty: str = option("5%", "Reward of a crystal that cannot be scored: a number or a percentile of recent scores.")
    diversity: Count | None = option(
        1,
        "A fingerprint (formula, space group, Wyckoff letters) that came more often than this among the last "
        "diversity_window crystals earns less; 0: never.",
        unset=0,
    )
    diversity_window: Count | None = option(
        None, "Among how many of the last crystals fingerprints are counted; 0: those of 64 steps.", unset=0
    )
    factors: str = option(
        "wyckoff,species",
        "What the reward moves: some of wyckoff, species, coords, lattice; the others stay where the model has them.",
    )
    hold: str | None = option(
        "auto",
        "Hold the shares of kinds where the starting model has them: elements (how many), anion, sites; auto: all "
        "three where the reward asks for the hull, else elements and sites; empty: let go.",
        unset="",
    )
    hold_strength: Weight = option(1.0, "What a nat of divergence of these shares costs, in units of the reward.")
    share: str | None = option(
        None, "Shares that are wished instead, e.g. `oxide=0.5,1 element=0.01`; empty: none.", unset=""
    )
    allow: str | None = option(
        None,
        "Guards to lift, e.g. `element,known`, or `all` (docs/rewards.md: what each closes); empty: none.",
        unset="",
    )
    critic: Literal["auto", "on", "off"] = option(
        "auto",
        "Learn from what letters and elements earn on average, as a critic tells it that learns from all scored "
        "crystals (on), or from each crystal's own score (off); auto: on, but not where the reward asks for the hull. "
        "For vargrad; off where coords or lattice are tuned.",
    )
    unscored: CountOrZero = option(
        3072, "Crystals of the starting model that are replayed on the critic's word alone, without a score."
    )
    replay: CountOrZero | None = option(
        None,
        "Earlier crystals that join each step's batch: vargrad takes any, ppo, grpo and rloo the best, weighted for "
        "the change of policy; negative: 256 for vargrad, 0 for the others.",
        unset=-1,
    )
    replay_size: Count | None = option(
        None,
        "How many crystals are kept for replay; 0: the last 8192 for vargrad, the best 256 for the others.",
        unset=0,
    )
    replay_clip: PositiveWeight = option(2.0, "Largest weight of a replayed crystal (1: as a fresh one).")
    learn_space_groups: bool = option(False, "Tune the shares of the space groups too.")
    space_group_lr: PositiveFraction = option(0.03, "Learning rate of the space groups' logits.")
    space_group_floor: FractionBelowOne = option(
        0.1, "Each space group keeps this part of its share; needs learn_space_groups."
    )
    temperature: Temperature = option(
        1.0, "Of the sampler. Below 1: likelier crystals; above 1: more varied; 1: as trained."
    )
    top_p: PositiveFraction = option(
        1.0, "Of the sampler: keep the likeliest choices up to this total probability; 1: all."
    )
    min_distance: Distance = option(0.5, "Angstrom; crystals with atoms closer than this are not scored.")
    validate_every: Count = option(5, "Steps between validation losses; needs dataset.")
    seed: Seed = option(0, "Seed of sampling and of the order of updates.")

    @property
    def per_step(self) -> int:
        """How many crystals are drawn and scored per step."""
        return self.n or (32 if self.critic == "on" else 128)

    @property
    def repeats(self) -> int:
        """How many crystals are drawn for each space group that is drawn."""
        return self.group_size or (8 if self.algorithm in ("grpo", "dpo", "rebel") else 1)

    @property
    def window(self) -> int:
        """Among how many of the last crystals fingerprints are counted: not among all, lest what is best be left."""
        return self.diversity_window or 64 * self.per_step

    @property
    def kl_weight(self) -> float:
        """beta. A property is tuned further than a distance to the hull: its tail is longer than a normal one's."""
        return self.beta if self.beta is not None else 0.05 if self.critic == "on" else 0.2

    @property
    def criticised(self) -> bool:
        """Whether a critic's word stands for the score: it sees no coordinates, so they must not be tuned."""
        moved = {name.strip() for name in self.factors.split(",")}
        return self.critic != "off" and self.algorithm == "vargrad" and not moved & {"coords", "lattice"}

    @property
    def replayed(self) -> tuple[int, int]:
        """How many crystals are replayed each step, and among how many that are kept."""
        n, kept = (256, 8192) if self.algorithm == "vargrad" else (0, 256)
        n = n if self.replay is None else self.replay
        return n, (self.replay_size or kept) if n else 0


@dataclass(frozen=True)
class SteeringOptions(Settings):
    """Crystals towards a reward, without training: how far, how many chains, at what cost."""

    beta: PositiveWeight = option(
        1.5,
        "What a nat of improbability costs, in standard deviations of the reward over the model's crystals; below 1 a "
        "population that scores thousands narrows to few formulas.",
    )
    budget: Count = option(4096, "Crystals to score at most, 1024 of them the model's own, for that unit.")
    time_limit: Minutes | None = option(None, "Minutes after which the chains end; 0: no limit.", unset=0.0)
    chains: Count = option(128, "Crystals that are moved side by side.")
    allow: str | None = option(
        None, "Guards of the reward to lift, e.g. `element,known`, or `all` (docs/rewards.md); empty: none.", unset=""
    )

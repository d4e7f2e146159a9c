"""Rewards: what a crystal is worth. `cfrl rewards` lists them and shows how formulas are written."""

from __future__ import annotations

from cfrl.rewards import chemistry, geometry, predicted, stability  # noqa: F401 (they register themselves)
from cfrl.rewards.context import Inputs, RewardContext, Scored
from cfrl.rewards.expression import Expression
from cfrl.rewards.registry import RewardInfo, all_rewards, find_reward, register_reward
from cfrl.rewards.scoring import Reward, RewardResult, build_reward, relax_steps_for

__all__ = [
    "Expression",
    "Inputs",
    "Reward",
    "RewardContext",
    "RewardInfo",
    "RewardResult",
    "Scored",
    "all_rewards",
    "build_reward",
    "find_reward",
    "register_reward",
    "relax_steps_for",
]

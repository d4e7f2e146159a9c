"""Objectives of reinforcement fine-tuning: functions of tensors; no model, no loop, no state but PPO's running means.

A crystal C is drawn in space group G with log-probability `log_prob`, the sum of its factors (wyckoff, species,
coords, lattice; also space_group where the prior over G is learned). What is maximised is

    J = E[r(C)] - beta * KL(policy || base),        whose optimum is p*(C) ~ p_base(C) exp(r(C) / beta)

(arXiv 2504.02367). Sampling, scoring and the optimiser live in `loop.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cfrl.crystals.wyckoff import NUM_SPACE_GROUPS

PAIRED = ("dpo", "rebel")  # learn from pairs of crystals, whoever drew them
ALGORITHMS = ("ppo", "vargrad", "grpo", "rloo", *PAIRED)
LEAN = 3.0  # crystals: how much a kind's running mean leans on that of all


# ---------------------------------------------------------------------------------------------------- KL


def kl_k3(log_ratio: Tensor) -> Tensor:
    """KL(policy || base) seen from one sample of the policy: exp(-d) - 1 + d >= 0, d = log policy/base.

    Where the policy reaches all of the base, its mean is the mean of d (because E[base/policy] = 1) and, near the base,
    its variance is far smaller (J. Schulman, "Approximating KL divergence", 2020). Elsewhere see `kl_estimate`.
    """
    return torch.expm1(-log_ratio) + log_ratio


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """KL(policy || base) from samples of the policy; `log_ratio` (n, factors) is log policy - log base. -> ().

    The plain mean. Estimates that take E[base/policy] = 1 for granted, as `kl_k3` does, vary less near the base but are
    too low wherever the samples miss a part of the base: a policy cut to its nucleus (there E[base/policy] is the
    share of the base inside), one that has all but left some elements, or one far away.
    """
    return log_ratio.mean(0).sum()


def kl_loss(log_prob: Tensor, log_prob_old: Tensor, log_prob_base: Tensor) -> Tensor:
    """KL(policy || base) as a loss, (n,), for samples of the old policy: (policy / old) * `kl_k3`.

    The ratio is what makes the gradient right, (policy / old) d grad log policy. `kl_k3` alone has the gradient
    of the opposite divergence, KL(base || policy).
    """
    return torch.exp(log_prob - log_prob_old) * kl_k3(log_prob - log_prob_base)


def adapt_beta(beta: float, kl: float, target: float, rate: float = 0.3) -> float:
    """The next beta of a proportional controller that holds the KL near `target` (arXiv 1909.08593, sec. 2.2)."""
    error = min(max(kl / target - 1.0, -1.0), 1.0)
    return beta * (1.0 + rate * error)


# ---------------------------------------------------------------------------------------------------- rewards


def shaped_reward(
    reward: Tensor, log_prob: Tensor, log_prob_base: Tensor, beta: float, entropy: Tensor | float = 0.0
) -> Tensor:
    """What one sample of the policy adds to J: r - beta (log policy - log base) - sum_f entropy_f log policy_f.

    Args:
        reward: (n,).
        log_prob: (n, factors) under the policy that drew the samples.
        log_prob_base: (n, factors).
        beta: weight of the KL, in units of the reward; 0 where the KL is in the loss.
        entropy: (factors,) or a number: weight of the entropy of each factor. In the reward, not in the loss:
            -log p at a sample has no mean gradient, and this form also holds for continuous factors.
    """
    kl = (log_prob - log_prob_base).sum(1)
    return reward - beta * kl - (entropy * log_prob).sum(1)


# ---------------------------------------------------------------------------------------------------- advantages


def rloo_advantage(score: Tensor) -> Tensor:
    """Score minus the mean score of all the others, (n,) -> (n,) (arXiv 2402.14740)."""
    n = len(score)
    return (score - score.mean()) * (n / max(n - 1, 1))


def grpo_advantage(score: Tensor, group: Tensor, eps: float = 1e-6) -> Tensor:
    """Score standardised within its group (arXiv 2402.03300, sec. 4.1.2); the group is the space group.

    A group of one, which has none of its own, takes mean and standard deviation of the batch.

    Args:
        score: (n,).
        group: (n,) int64, any labels.
        eps: added to the standard deviation.
    """
    _, index, size = torch.unique(group, return_inverse=True, return_counts=True)
    mean = torch.zeros_like(size, dtype=score.dtype).index_add(0, index, score) / size
    square = torch.zeros_like(mean).index_add(0, index, (score - mean[index]).square())
    std = torch.sqrt(square / (size - 1).clamp(min=1))
    alone = (size == 1)[index]
    batch_std = score.std() if len(score) > 1 else torch.zeros_like(score.sum())
    centre = torch.where(alone, score.mean(), mean[index])
    return (score - centre) / (torch.where(alone, batch_std, std[index]) + eps)


class Baseline:
    """Running means of the score: of all crystals, of those of each kind, and of what is left in each space group.

    The space group is given before a crystal is drawn, so the mean of its crystals may be taken off without bias. It
    explains a third to a half of the variance of energies above hull. The kind is the policy's choice: taking its mean
    off means that no kind earns more than another by being easy (`hold.py`). Cells with few recent crystals lean on
    the mean of all, space groups on that of their kinds.

    Args:
        decay: per step, of the weight of what was seen before.
        cells: how many kinds; 1: they make no difference.
    """

    def __init__(self, decay: float, cells: int = 1) -> None:
        self.decay = decay
        self.cells = torch.zeros(2, cells, dtype=torch.float64)  # sum of scores, count
        self.groups = torch.zeros(2, NUM_SPACE_GROUPS + 1, dtype=torch.float64)  # of what the kinds leave
        self.mean: float | None = None

    def of(self, space_group: Tensor, cell: Tensor) -> Tensor:
        """(n,) int64 each -> (n,) float64."""
        return self.kinds().to(cell.device)[cell] + self.space_groups().to(space_group.device)[space_group]

    def kinds(self) -> Tensor:
        """The part of the kind, (cells,) float64."""
        return (self.cells[0] + LEAN * (self.mean or 0.0)) / (self.cells[1] + LEAN)

    def space_groups(self) -> Tensor:
        """The part of the space group, (231,) float64."""
        return self.groups[0] / (self.groups[1] + 1)

    def update(self, score: Tensor, space_group: Tensor, cell: Tensor) -> None:
        """Scores (n,) float64 of a step's crystals, their space groups and kinds (n,), on the CPU."""
        if not len(score):
            return
        now = float(score.mean())
        self.mean = now if self.mean is None else self.decay * self.mean + (1 - self.decay) * now
        one = torch.ones_like(score)
        self.cells = (self.decay * self.cells).index_add(1, cell, torch.stack([score, one]))
        rest = score - self.kinds()[cell]
        self.groups = (self.decay * self.groups).index_add(1, space_group, torch.stack([rest, one]))

    def state_dict(self) -> dict[str, Tensor | float | None]:
        """Tensors and plain values."""
        return {name: getattr(self, name) for name in ("cells", "groups", "mean")}

    def load_state_dict(self, state: dict[str, Tensor | float | None]) -> None:
        """Go on from there, as far as the same kinds are told apart."""
        if "cells" in state and state["cells"].shape == self.cells.shape:
            for name, value in state.items():
                setattr(self, name, value)


def advantages(
    algorithm: str, score: Tensor, space_group: Tensor, cell: Tensor, baseline: Baseline
) -> tuple[Tensor, Tensor]:
    """Advantages of the crystals given their space groups, and of the space groups themselves: (n,), (n,).

    They differ where the baseline depends on the group: that leaves no signal about which group to choose.
    """
    if algorithm == "grpo":
        return grpo_advantage(score, space_group), grpo_advantage(score, torch.zeros_like(space_group))
    if algorithm == "rloo":
        advantage = rloo_advantage(score)
        return advantage, advantage
    return score - baseline.of(space_group, cell), score - (baseline.mean or 0.0)


# ---------------------------------------------------------------------------------------------------- objectives


def clipped_surrogate(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), (n,): to be maximised (arXiv 1707.06347, eq. 7)."""
    ratio = torch.exp(log_prob - log_prob_old)
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def is_clipped(log_prob: Tensor, log_prob_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """(n,) bool: samples that the clipping of `clipped_surrogate` keeps from any further gradient."""
    ratio = torch.exp(log_prob - log_prob_old)
    return torch.where(advantage >= 0, ratio > 1 + clip, ratio < 1 - clip)


def importance_weight(log_prob: Tensor, log_prob_drawn: Tensor, limit: float) -> Tensor:
    """Weight of a replayed sample: min(policy / policy that drew it, limit), (n,).

    Times `clipped_surrogate` (whose ratio starts at 1) this is decoupled PPO (arXiv 2110.00641).
    """
    return torch.exp(log_prob - log_prob_drawn).clamp(max=limit)


def dpo_loss(chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta * (difference of log policy/base, chosen - rejected)), (pairs,) (arXiv 2305.18290, eq. 7)."""
    return -logsigmoid(beta * ((chosen - base_chosen) - (rejected - base_rejected)))


def rebel_loss(log_ratio_gap: Tensor, reward_gap: Tensor, beta: float) -> Tensor:
    """(difference of log policy/base - difference of reward / beta)^2 of pairs, (pairs,) (arXiv 2404.16767, eq. 1).

    Zero for every pair exactly at the optimum p*: the regression needs no samples of the policy, and its noise ends
    with its error. `dpo_loss` knows which of two is better; this knows by how much.
    """
    return (log_ratio_gap - reward_gap / beta).square()


def held_loss(log_ratio: Tensor, beta: float) -> Tensor:
    """beta (log policy/base)^2 / 2 of the factors that the reward does not move, (n, factors) -> (n,).

    The regression of `vargrad_loss` with nothing to earn. Half a square is, near the base, the KL.
    """
    return 0.5 * beta * log_ratio.square().sum(1)


def vargrad_loss(advantage: Tensor, log_prob: Tensor, log_prob_old: Tensor, beta: float) -> Tensor:
    """(r - beta log policy/base - b)^2 / (2 beta), (n,): the variance of what should be one number, -beta log Z(G).

    VarGrad (arXiv 2010.10436), trajectory balance with an estimated log Z (arXiv 2201.13259, eq. 14). Zero for every
    crystal exactly at the optimum p*, so that any crystals will do, whoever drew them and however often. For crystals
    that the policy has just drawn its gradient is that of the policy gradient with baseline b and the KL in the reward.

    Args:
        advantage: (n,) of the score with the KL under `log_prob_old`: r - beta log old/base - b.
        beta: above 0.
    """
    return (advantage - beta * (log_prob - log_prob_old)).square() / (2 * beta)


def preference_pairs(reward: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """Pairs (chosen, rejected) of one group and different reward, (pairs, 2) indices into `reward`.

    Every crystal is matched with one random partner of its group, so that a batch of n gives at most n pairs.
    """
    order = torch.argsort(torch.rand(len(reward), generator=generator))
    order = order[torch.argsort(group[order].cpu(), stable=True)]  # shuffled within each group
    sorted_group = group[order.to(group.device)].cpu()
    _, index, size = torch.unique_consecutive(sorted_group, return_inverse=True, return_counts=True)
    start = (torch.cumsum(size, 0) - size)[index]
    partner = start + (torch.arange(len(order)) - start + 1) % size[index]  # the next one around the group
    a, b = order.to(reward.device), order[partner].to(reward.device)
    better = reward[a] > reward[b]
    pairs = torch.stack([torch.where(better, a, b), torch.where(better, b, a)], 1)
    pairs = pairs[reward[a] != reward[b]]
    return torch.unique(pairs, dim=0)  # a group of two names its one pair twice


# ---------------------------------------------------------------------------------------------------- space groups


def floored_log_prob(logits: Tensor, base_log_prob: Tensor, floor: float) -> Tensor:
    """Log of floor * base + (1 - floor) * softmax(logits), (groups,): no group falls below `floor` of its base share.

    The floor is part of the policy, so that ratios and KL need no correction for it.
    """
    if floor == 0:
        return torch.log_softmax(logits, 0)
    weight = torch.as_tensor(floor, dtype=logits.dtype)
    return torch.logaddexp(base_log_prob + weight.log(), torch.log_softmax(logits, 0) + torch.log1p(-weight))

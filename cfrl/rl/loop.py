"""Tuning by reinforcement: draw crystals, score them, move the policy towards the reward, repeat.

`step` is one round. Objectives: `policy.py`. Drawing, scoring and the memory of earlier crystals: `rollouts.py`. What
changes from step to step: `tuning.py`. Randomness is a function of (seed, step) alone, so that a run that is
interrupted goes on exactly as it would have.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import NotFinite
from cfrl.model.sampler import random_seed
from cfrl.model.transformer import FACTORS, CrystalTransformer
from cfrl.rewards import RewardContext, build_reward, relax_steps_for
from cfrl.rewards.guards import heeded
from cfrl.rl import policy
from cfrl.rl.options import TuningOptions
from cfrl.rl.rollouts import RECENT, Kept, Rollout, chemical_systems
from cfrl.rl.sources import FreshCrystals, Scorer, Source
from cfrl.rl.tuning import CRYSTAL, SPACE_GROUP, Tuning, settled

UNSCORED_SEED = 1  # of the crystals of the starting model that are not scored, the same for all runs
MANY = 256  # crystals whose log-probabilities are computed at once
PASSES, FIRST_PASSES = 8, 16  # of the critic, over as many crystals as a step scores, and over all before the first
OWN = 0.75  # weight of a crystal's own score, beside the critic's word of it
WATCHED = ("loss", "ratio", "clip_fraction", "step_kl")  # of an update
ROUNDING = 1e-6  # scores that differ by less, in units of the largest, are equal


# ---- one step ----------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one step learns from, on the model's device: n crystals, of which the last may be replayed ones.

    old, base: (n, 5) log-probabilities under the policy at the start of the step, and under the starting model.
    advantage, group_advantage: (n,) of the crystal given its space group, and of the space group.
    reward: (n,) in units of its scale, NaN nowhere.
    weight: (n,) 1, or the importance weight of a replayed crystal.
    nuclei: what top-p kept at the start of the step (see `CrystalTransformer.nuclei`).
    items: what is learned from at once: (m, 1) rows, or (m, 2) pairs of rows (chosen, rejected).
    """

    crystals: CrystalBatch
    old: Tensor
    base: Tensor
    advantage: Tensor
    group_advantage: Tensor
    reward: Tensor
    weight: Tensor
    nuclei: dict[str, Tensor]
    items: Tensor


def step(tuning: Tuning, source: Source) -> tuple[CrystalBatch, list[str], dict[str, float]]:
    """One round: the rows for rollouts.h5, their status, the metrics. If `source` raises, nothing has happened."""
    options = tuning.options
    seed = random_seed(options.seed, tuning.step + 1)
    generator = torch.Generator().manual_seed(seed)
    rollout = source(generator, seed)
    n, seconds = len(rollout), rollout.seconds
    alike = tuning.keys(rollout.crystals)
    keys = fingerprints(rollout.crystals)
    new = len({key for key in alike if key not in tuning.memory.seen})
    tuning.memory.add(rollout, alike)

    start = time.perf_counter()
    replayed = tuning.memory.replay(options.replayed[0], generator)
    crystals = CrystalBatch.cat([rollout.crystals, replayed.crystals])
    nuclei = tuning.nuclei(crystals)
    old, entropies = tuning.log_probs_and_entropies(crystals, nuclei)
    base = torch.cat([tuning.log_probs_base(rollout.crystals), replayed.base.to(old.device)])
    seconds["likelihood"] = time.perf_counter() - start

    start = time.perf_counter()
    reward, explained = torch.cat([rollout.reward, replayed.reward]), math.nan
    told = tuning.critic is not None and tuning.critic.taught
    if told:
        own, word = tuning.memory.with_penalty(reward), tuning.scale * tuning.critic(crystals)
        explained = _explained(own[:n], word[:n])
        # Of what the policy drew the score counts too: where a critic errs is where a policy that believes it goes.
        drawn = torch.cat([torch.ones(n, dtype=torch.bool), replayed.asked & ~replayed.first])
        reward = torch.where(drawn, OWN * own + (1 - OWN) * word, word)
    earned = tuning.memory.earned(reward, alike + replayed.keys)
    learned = torch.cat([~rollout.abstained, replayed.asked | told])
    batch = _prepare(tuning, crystals, earned.to(old.device), old, base, nuclei, replayed, learned, generator)
    tuning.hold.update(rollout.crystals[rollout.valid])
    update = _update(tuning, batch, generator)
    seconds["update"] = time.perf_counter() - start

    metrics = {
        **_reward_metrics(rollout),
        **_divergence(old[:n] - base[:n], offline=not source.fresh),
        **update,
        **{f"entropy/{name}": float(values[:n].double().mean()) for name, values in entropies.items()},
        "valid": float(rollout.valid.double().mean()),
        "unique": len(set(keys)) / n,
        "refused": rollout.refused / (rollout.refused + n),
        "new": new / n,
        "chemical_systems": len(set(chemical_systems(rollout.crystals))),
        "space_groups": len(rollout.crystals.space_group.unique()),
        "effective_space_groups": tuning.prior.effective(),
        "penalty": tuning.memory.penalty,
        "beta": tuning.beta,
        "critic/explained": explained,
        "scale": tuning.scale,
        "baseline": tuning.baseline.mean if tuning.baseline.mean is not None else math.nan,
        "abstained": float(rollout.abstained.double().mean()),
        **{f"divergence/{name}": value for name, value in tuning.hold.divergence().items()},
        **{f"seconds/{stage}": value for stage, value in seconds.items()},
    }
    written = rollout.table(
        reward=tuning.memory.with_penalty(rollout.reward),
        step=torch.full((n,), tuning.step + 1.0, dtype=torch.float64),
        log_prob=old[:n, CRYSTAL].sum(1).cpu(),
        log_prob_base=base[:n, CRYSTAL].sum(1).cpu(),
    )
    tuning.memory.keep(rollout, old[:n].sum(1).cpu(), base[:n].cpu(), alike)
    if tuning.critic:
        _teach(tuning, PASSES * n, generator)
    if options.target_kl and source.fresh:
        tuning.beta = policy.adapt_beta(tuning.beta, metrics["kl"], options.target_kl)
    tuning.step += 1
    return written, rollout.status, metrics


def _teach(tuning: Tuning, n: int, generator: torch.Generator) -> None:
    """One pass of the critic over n of the crystals that the memory keeps."""
    crystals, reward = tuning.memory.lesson(n, generator)
    tuning.critic.learn(crystals, reward / tuning.scale, generator)


def _explained(reward: Tensor, told: Tensor) -> float:
    """Share of the variance of scores (n,) that the critic told before it knew them; may be negative."""
    return float(1 - (reward - told).square().mean() / reward.var(correction=0).clamp(min=1e-12))


def _prepare(
    tuning: Tuning,
    crystals: CrystalBatch,
    earned: Tensor,
    old: Tensor,
    base: Tensor,
    nuclei: dict[str, Tensor],
    replayed: Kept,
    learned: Tensor,
    generator: torch.Generator,
) -> Batch:
    """Advantages, weights and what to learn from. The running means then know the crystals, and not before.

    `learned` (n,) bool: not those that the reward abstains from.
    """
    options, fresh = tuning.options, len(crystals) - len(replayed)
    bonus = [getattr(options, f"entropy_{name}") for name in FACTORS] + [0.0]
    regress = options.algorithm == "vargrad"
    beta = tuning.beta if options.kl == "reward" or regress else 0.0
    entropy = torch.tensor(bonus, dtype=old.dtype, device=old.device)[tuning.learned]
    score = policy.shaped_reward(earned / tuning.scale, old[:, tuning.learned], base[:, tuning.learned], beta, entropy)
    score = score + tuning.hold.pull(crystals).to(score.device)
    group, cell = crystals.space_group.to(old.device), tuning.hold.cells(crystals).to(old.device)
    # A regression is to the optimum of whatever it learns from; a policy gradient is that of the policy.
    known = learned if regress else learned & (torch.arange(len(learned)) < fresh)
    if tuning.baseline.mean is None and known.any():
        tuning.baseline.mean = float(score[known].mean())
    limit = options.clip_advantage or math.inf
    advantage, group_advantage = (
        torch.where(learned.to(a.device), a.clamp(-limit, limit), 0.0)
        for a in policy.advantages(options.algorithm, score, group, cell, tuning.baseline)
    )
    tuning.baseline.update(score[known].cpu(), crystals.space_group[known].cpu(), cell[known].cpu())
    weight = torch.ones_like(earned)
    drawn = replayed.log_prob.to(old.device)
    if not regress:
        weight[fresh:] = policy.importance_weight(old[fresh:].sum(1), drawn, options.replay_clip)
    items = learned.nonzero().to(old.device)
    if options.algorithm in policy.PAIRED:
        # With fixed shares the policy is one of crystals given their space group: only those can be compared.
        items = policy.preference_pairs(earned, torch.zeros_like(group) if tuning.prior.learn else group, generator)
        items = items[learned.to(items.device)[items].all(1)]
    rewards, crystals = earned / tuning.scale, crystals.to(tuning.model.device)
    return Batch(crystals, old, base, advantage, group_advantage, rewards, weight, nuclei, items)


def _update(tuning: Tuning, batch: Batch, generator: torch.Generator) -> dict[str, float]:
    """Passes of minibatches over one batch, until the policy is `max_step_kl` from its start; means over all of them.

    `epochs` of the metrics is how many passes were learned from, `real` what a real crystal costs (nats, all factors).

    Raises:
        NotFinite: a loss or a gradient is, or the policy that the step leaves behind.
    """
    options = tuning.options
    parameters = [p for group in tuning.optimiser.param_groups for p in group["params"]]
    ranks = tuning.ranks
    for group in tuning.optimiser.param_groups:
        group["lr"] = group["peak"] * rate_fraction(options, tuning.step, tuning.seconds)
    sums = dict.fromkeys((*WATCHED, "gradient_norm", "real"), 0.0)
    seen = learned = 0
    tokens = tuning.model.num_tokens(batch.crystals)[batch.items].amax(1).cpu()
    for chosen in _minibatches(options, len(batch.items), generator):
        tuning.optimiser.zero_grad(set_to_none=True)
        chosen = chosen[tokens[chosen].argsort()]  # crystals of a size together: no time is spent on padding
        found = torch.zeros(len(WATCHED), dtype=torch.float64, device=batch.items.device)
        for part in chosen.split(options.micro_batch)[ranks.rank :: ranks.size]:
            loss, watched = _loss(tuning, batch, batch.items[part.to(batch.items.device)])
            (loss.sum() / len(chosen)).backward()
            found += torch.stack([watched[name].double().sum() for name in WATCHED])
        real = _recall(tuning, len(chosen), generator)
        ranks.add([found, real])
        ranks.add(_gradients(parameters) if ranks.size > 1 else [])
        for name, value in zip(WATCHED, found.tolist(), strict=True):
            sums[name] += value
        sums["real"] += float(real)
        kl = float(found[WATCHED.index("step_kl")]) / len(chosen)
        norm = float(nn.utils.clip_grad_norm_(parameters, options.clip_gradient))
        _require_finite({"loss": sums["loss"], "gradient": norm})
        sums["gradient_norm"] += norm * len(chosen)
        seen += len(chosen)
        if options.max_step_kl and kl > options.max_step_kl:
            break
        tuning.optimiser.step()
        learned += len(chosen)
    with torch.no_grad():  # a few crystals will do: weights that are too large to work with spoil them all
        few = {name: kept[: options.micro_batch] for name, kept in batch.nuclei.items()}
        after = tuning.log_probs(batch.crystals[: options.micro_batch], few).sum()
        weights = sum(p.sum() for p in parameters)
    _require_finite({"sum of the weights": float(weights), "log-probability after the step": float(after)})
    if tuning.real is None:
        del sums["real"]
    means = {name: value / max(seen, 1) for name, value in sums.items()}  # there may be no pair
    return {**means, "epochs": learned / max(len(batch.items), 1)}


def _recall(tuning: Tuning, n: int, generator: torch.Generator) -> Tensor:
    """Adds the gradient of the anchor, minus the mean log P(C | G) of n real crystals; the sum of that, (1,) nats.

    The mixed objective of Ouyang et al. 2022 (arXiv 2203.02155, eq. 2). Of several processes each does its part.
    """
    nats = torch.zeros(1, dtype=torch.float64, device=tuning.model.device)
    if tuning.real is None:
        return nats
    options, ranks = tuning.options, tuning.ranks
    rows = torch.randint(len(tuning.real), (n,), generator=generator)
    rows = rows[tuning.model.num_tokens(tuning.real[rows]).argsort()]
    for part in rows.split(options.micro_batch)[ranks.rank :: ranks.size]:
        scores = tuning.model.log_prob(tuning.real[part].to(tuning.model.device))
        loss = -torch.stack([scores[name].sum() for name in FACTORS]).sum()
        (options.anchor * loss / n).backward()
        nats += loss.detach().double()
    return nats


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Zeros where a process had nothing to learn from."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters]


def _require_finite(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value}")


def rate_fraction(options: TuningOptions, step: int, seconds: float) -> float:
    """Learning rate of a step as a fraction of the peak; `step` steps and `seconds` of work came before it.

    Up from almost nothing, because Adam's first steps are as large as any, on no more than one batch's evidence. Then
    down to the end of the run, by whichever limit is nearer, because what noise moves the policy costs KL and earns
    nothing: at a constant rate the last iterate wanders about the optimum.
    """
    progress = step / options.steps
    if options.time_limit:
        progress = max(progress, seconds / (60 * options.time_limit))
    rise = min(1.0, (step + 1) / max(options.warmup, 1))
    return rise * (1 - (1 - options.lr_final) * min(progress, 1.0))


def _minibatches(options: TuningOptions, n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each batch, shuffled anew for each pass."""
    for _ in range(options.epochs):
        order = torch.randperm(n, generator=generator)
        yield from order.split(options.batch_size) if n else ()


def _loss(tuning: Tuning, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each item (m,), and what is watched of them, (m,) each."""
    options, rows = tuning.options, items.flatten()
    factors = tuning.log_probs(batch.crystals[rows], {name: kept[rows] for name, kept in batch.nuclei.items()})
    old_factors, base_factors = batch.old[rows], batch.base[rows]
    now, old, base = (x[:, tuning.learned].sum(1) for x in (factors, old_factors, base_factors))
    advantage, weight = batch.advantage[rows], batch.weight[rows]
    if options.algorithm == "vargrad":
        # where the space groups are learnt, a baseline of each would leave no signal about which to choose
        gap = batch.group_advantage[rows] if tuning.prior.learn else advantage
        loss = weight * policy.vargrad_loss(gap, now, old, tuning.beta)
        clipped = torch.zeros_like(now)
    elif options.algorithm in policy.PAIRED:
        now_pairs, base_pairs, rewards = (x.view(-1, 2) for x in (now, base, batch.reward[rows]))
        if options.algorithm == "dpo":
            loss = policy.dpo_loss(*now_pairs.unbind(1), *base_pairs.unbind(1), tuning.beta)
        else:
            gaps = (x[:, 0] - x[:, 1] for x in (now_pairs - base_pairs, rewards))
            loss = policy.rebel_loss(*gaps, tuning.beta)
        clipped = torch.zeros_like(now)
    else:
        moved_factors = tuning.learned[CRYSTAL]
        crystal, crystal_old = (x[:, CRYSTAL][:, moved_factors].sum(1) for x in (factors, old_factors))
        gain = policy.clipped_surrogate(crystal, crystal_old, advantage, options.clip_ratio)
        clipped = policy.is_clipped(crystal, crystal_old, advantage, options.clip_ratio).double()
        if tuning.prior.learn:
            gain = gain + policy.clipped_surrogate(
                factors[:, SPACE_GROUP],
                old_factors[:, SPACE_GROUP],
                batch.group_advantage[rows],
                options.clip_ratio,
            )
        if options.kl == "loss":
            gain = gain - tuning.beta * policy.kl_loss(now, old, base)
        loss = -weight * gain
    held = policy.held_loss((factors - base_factors)[:, ~tuning.learned], tuning.beta)
    loss = loss + held.view(items.shape).mean(1)
    with torch.no_grad():
        moved = (factors - old_factors).sum(1)
        watched = {"ratio": torch.exp(moved), "clip_fraction": clipped, "step_kl": policy.kl_k3(-moved)}
        watched = {name: values.view(items.shape).mean(1) for name, values in watched.items()}
    return loss, {"loss": loss.detach(), **watched}


def robust_std(reward: Tensor) -> float:
    """Standard deviation of scores (n,), the outermost percent on either side drawn in; 1 where all are equal.

    Drawn in, because a few absurd scores must not make all others equal. Quantiles alone will not do: of a sparse
    reward, which most crystals do not earn at all, they are 0 or not by chance. NaN is left out.
    """
    known = reward[~torch.isnan(reward)].numpy()
    if not len(known):
        return 1.0
    low, high = np.quantile(known, 0.01, method="higher"), np.quantile(known, 0.99, method="lower")
    deviation = float(known.clip(low, high).std() or known.std())
    return deviation if deviation > ROUNDING * np.abs(known).max() else 1.0


def _reward_metrics(rollout: Rollout) -> dict[str, float]:
    """Over the crystals with a score; names that are always there."""
    known = rollout.reward[rollout.scored].numpy()
    metrics = {"scored": len(known) / len(rollout)}
    for name, function in (("mean", np.mean), ("median", np.median), ("std", np.std), ("max", np.max)):
        metrics[f"reward/{name}"] = float(function(known)) if len(known) else math.nan
    for name, values in rollout.terms.items():
        metrics[f"reward/{name}"] = float(values.nanmean())
    return metrics


def _divergence(log_ratio: Tensor, offline: bool) -> dict[str, float]:
    """KL(policy || starting model) in nats by factor and in all; unknown from crystals that the policy did not draw."""
    names = (*FACTORS, "space_group")
    parts = [math.nan if offline else float(policy.kl_estimate(log_ratio[:, i : i + 1])) for i in range(len(names))]
    return {"kl": sum(parts), **{f"kl/{name}": part for name, part in zip(names, parts, strict=True)}}


def why_end(options: TuningOptions, metrics: dict[str, float], seconds: float) -> str:
    """Why the run should end before its last step, or ""."""
    if options.max_kl and metrics["kl"] > options.max_kl:
        return (
            f"The KL to the starting model is {metrics['kl']:.1f} nats, above max_kl = {options.max_kl:g}; raise beta."
        )
    if options.time_limit and seconds > 60 * options.time_limit:
        return "The time limit is reached."
    return ""


# ---- watching and judging ----------------------------------------------------------------------------------------


@torch.no_grad()
def validate(tuning: Tuning, crystals: CrystalBatch) -> dict[str, float]:
    """Mean -log P of known crystals, nats: what the model forgets on the way."""
    fits = crystals.num_sites < tuning.model.config.max_sites
    scores = tuning.model.log_prob(crystals[fits])
    means = {f"validation/{name}": -float(scores[name].double().mean()) for name in FACTORS}
    return {"validation/loss": sum(means.values()), **means}


def begin(tuning: Tuning, source: Source) -> None:
    """Before the first step: what rewards are counted in (the standard deviation of the source's scores, or 1), which
    shares are held, and the first crystals to learn from.
    """
    options, regress = tuning.options, tuning.options.algorithm == "vargrad"
    tuning.scale = 1.0
    if not (options.standardize or (source.fresh and (tuning.hold.names or regress))):
        return
    survey = source.survey()
    if options.standardize:
        tuning.scale = robust_std(survey.reward)
    if source.fresh:
        tuning.hold.aim(survey.crystals[survey.scored | survey.abstained])
    if source.fresh and regress:
        tuning.memory.recent = survey.reward[survey.scored].tolist()[-RECENT:]
        _keep_of_base(tuning, survey, torch.ones(len(survey), dtype=torch.bool))
    if tuning.critic and options.unscored:
        more = source.unscored(options.unscored, UNSCORED_SEED)
        _keep_of_base(tuning, more, torch.zeros(len(more), dtype=torch.bool))
    if tuning.critic:
        generator = torch.Generator().manual_seed(options.seed)
        for _ in range(FIRST_PASSES):
            _teach(tuning, options.scale_crystals, generator)


def _keep_of_base(tuning: Tuning, rollout: Rollout, asked: Tensor) -> None:
    """Keep crystals of the starting model for replay; a regression asks not who drew them."""
    parts = torch.arange(len(rollout)).split(MANY)
    base = torch.cat([tuning.log_probs_base(rollout.crystals[rows]) for rows in parts]).cpu()
    tuning.memory.keep(rollout, base.sum(1), base, tuning.keys(rollout.crystals), asked, torch.ones_like(asked))


# ---- all of it, for a caller -------------------------------------------------------------------------------------


@dataclass
class Tuned:
    """What tuning leaves.

    model: the policy. crystals: all that were drawn, with "reward", "step" and the terms of the reward as properties.
    metrics: name -> value, for each step.
    """

    model: CrystalTransformer
    crystals: CrystalBatch
    metrics: list[dict[str, float]]


def finetune(
    model: CrystalTransformer,
    reward: str | Scorer,
    *,
    context: RewardContext | None = None,
    watch: Callable[[int, dict[str, float]], None] | None = None,
    real: CrystalBatch | None = None,
    **options: Any,
) -> Tuned:
    """Tune a model towards a reward; the model itself stays as it is.

    Args:
        reward: a name or an expression (see `build_reward`), or what scores a batch of crystals.
        context: what a named reward works with; None: the embedded models.
        watch: called with the step's number and its metrics.
        real: crystals whose likelihood counts beside the reward, if anchor=... gives it a weight.
        options: fields of `TuningOptions`, such as steps=60, n=128, beta=0.1.

    Raises:
        UserError: an option or the reward is at fault, or nothing was left to learn from.
    """
    settings = TuningOptions(**options)
    if isinstance(reward, str):
        reward = build_reward(reward, context=context, guards=heeded(settings.allow))
        settings = settled(settings, reward.needs)
        if context is None:
            reward.context.relax_steps = relax_steps_for(reward)
    tuning = Tuning(copy.deepcopy(model), settings, real=real)
    source = FreshCrystals(tuning, reward)
    begin(tuning, source)
    metrics, parts = [], []
    while tuning.step < settings.steps:
        began = time.monotonic()
        crystals, _, row = step(tuning, source)
        tuning.seconds += time.monotonic() - began
        metrics.append(row)
        parts.append(crystals)
        if watch is not None:
            watch(tuning.step, row)
        if not row["scored"] or why_end(settings, row, tuning.seconds):
            break
    return Tuned(tuning.policy().requires_grad_(False), CrystalBatch.cat(parts), metrics)

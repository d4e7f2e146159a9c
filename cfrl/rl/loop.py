"""`cfrl finetune`: draw crystals, score them, move the policy towards the reward, repeat.

`finetune` is the whole command, top to bottom. Objectives: `policy.py`. Drawing, scoring and the memory of earlier
crystals: `rollouts.py`. What a checkpoint holds: `tuning.py`. What the user sees: `monitor.py`.
Randomness is a function of (seed, step) alone, so that a resumed run goes on exactly as it would have.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cfrl.config import FinetuneConfig, read_run_config
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.errors import NotFinite, UserError
from cfrl.io.storage import read_columns, read_crystals, write_crystals
from cfrl.model.transformer import FACTORS
from cfrl.reports.report import write_report
from cfrl.rewards import Reward, RewardContext, build_reward
from cfrl.rewards.trust import confirm_code
from cfrl.rl import monitor, policy
from cfrl.rl.rollouts import Rollout, chemical_systems, collect, random_seed
from cfrl.rl.tuning import RunLog, Tuning
from cfrl.runs.folder import RunFolder
from cfrl.runs.interrupt import Abandoned, stop_on_signal

Scorer = Callable[[CrystalBatch], Any]
Source = Callable[[torch.Generator, int], Rollout]
VALIDATION_CRYSTALS = 512
SCALE_SEED = 0  # the same for all runs, so that the unit of a reward is
ROUNDING = 1e-6  # scores that differ by less, in units of the largest, are equal


def finetune(
    config: FinetuneConfig | None = None,
    *,
    reward: Scorer | None = None,
    resume: str | Path | None = None,
    root: str | Path = "runs",
    quiet: bool = False,
    trust: bool = False,
) -> RunFolder:
    """Tune a model towards a reward.

    Args:
        config: the settings; default: those of the run that is resumed, else the defaults.
        reward: what scores a batch of crystals; default: made of `config.reward` by `build_reward`.
        resume: a run folder to go on with, instead of a new one.
        root: where a new run folder is made.
        quiet: show nothing.
        trust: import code that the settings of a resumed run name; else the user is asked.

    Returns:
        The run folder: metrics.csv, rollouts.h5, checkpoint.pt, model.safetensors and plots; with `config.evaluate`
        also before.h5 and after.h5, fresh crystals of both models.

    Raises:
        UserError: a setting, a file or the reward is at fault; finished steps are saved.
        KeyboardInterrupt: after Ctrl-C, once the step at hand is finished and saved.
    """
    if config is None:
        config = read_run_config(FinetuneConfig, Path(resume) / "config.toml") if resume else FinetuneConfig()
    _check(config)
    if resume and reward is None and not config.rollouts:
        confirm_code(config.reward, Path(resume) / "config.toml", trust)
    tuning = Tuning(config)
    scorer = reward
    if scorer is None and not config.rollouts:
        scorer = build_reward(config.reward, context=RewardContext.from_config(config, tuning.model.device))
        scorer.load()
    source = _offline_source(config) if config.rollouts else _online_source(config, tuning, scorer)
    validation = _validation_crystals(config)
    run = RunFolder.open(resume) if resume else RunFolder.create("finetune", config.reward, config, root)
    log = RunLog(run, tuning, scorer if isinstance(scorer, Reward) else None)
    reason = ""
    with run.locked(), stop_on_signal() as stop, monitor.Live(run, config.steps, quiet) as live:
        log.restore()
        if resume:
            run.write_config("finetune", config)
        saved = time.monotonic()
        while tuning.step < config.steps and not reason:
            began = time.monotonic()
            try:
                if tuning.scale is None:
                    tuning.scale = _scale(tuning, config, scorer)
                    live.say(f"Unit of the reward: {tuning.scale:.4g}.")
                crystals, status, metrics = _step(tuning, config, source)
            except NotFinite as error:  # the weights are spoilt: what was saved last is better
                raise NotFinite(
                    f"{error} (in step {tuning.step + 1}; {run.path} holds {log.saved} steps: go on from there with "
                    f"--resume and a lower --lr than {config.lr:g})"
                ) from error
            except UserError as error:
                log.save()
                raise UserError(f"{error} (in step {tuning.step + 1}; {run.path} holds the steps before)") from error
            except Abandoned as error:
                live.say(f"Step {tuning.step + 1} is lost: {error}.")
                break
            if validation is not None and (tuning.step == 1 or tuning.step % config.validate_every == 0):
                metrics |= _validate(tuning, validation)
            tuning.seconds += time.monotonic() - began
            log.add(crystals, status, metrics)
            live.update(tuning.step, metrics)
            if not metrics["scored"]:
                reason, count = Counter(status).most_common(1)[0]
                live.say(
                    f"Step {tuning.step}: nothing to learn from, no crystal has a score ({count} times: {reason})."
                )
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                log.save()
                saved = time.monotonic()
            reason = "Stopped." if stop.requested else _why_end(config, metrics, tuning.seconds)
        log.save()
        if stop.requested:
            run.close()
            live.say(f"Stopped after step {tuning.step}. Go on with: cfrl finetune --resume {run.path}")
            raise KeyboardInterrupt
        if reason:
            live.say(f"{reason} The run ends after step {tuning.step} of {config.steps}.")
        if config.evaluate and not config.rollouts:
            live.say(f"Drawing {config.evaluate} fresh crystals from the model before and after.")
            evaluate(tuning, config, scorer, run.path)
    if config.plots:
        monitor.plot(run)
        write_report(run)
    run.finish()
    if not quiet:
        monitor.summarise(run)
    return run


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


def _step(tuning: Tuning, config: FinetuneConfig, source: Source) -> tuple[CrystalBatch, list[str], dict[str, float]]:
    """One round: the rows for rollouts.h5, their status, the metrics. If `source` raises, nothing has happened."""
    seed = random_seed(config.seed, tuning.step + 1)
    generator = torch.Generator().manual_seed(seed)
    rollout = source(generator, seed)
    n, seconds = len(rollout), rollout.seconds
    keys = fingerprints(rollout.crystals)
    new = len({key for key in keys if key not in tuning.memory.seen})
    tuning.memory.add(rollout, keys)

    start = time.perf_counter()
    replayed, replayed_keys = tuning.memory.replay(config.replay, generator)
    crystals = CrystalBatch.cat([rollout.crystals, replayed]) if len(replayed) else rollout.crystals
    nuclei = tuning.nuclei(crystals)
    old, entropies = tuning.log_probs_and_entropies(crystals, nuclei)
    base = tuning.log_probs_base(crystals)
    seconds["likelihood"] = time.perf_counter() - start

    start = time.perf_counter()
    earned = tuning.memory.earned(crystals.properties["reward"], keys + replayed_keys)
    batch = _prepare(tuning, config, crystals, earned.to(old.device), old, base, nuclei, n, generator)
    update = _update(tuning, config, batch, generator)
    seconds["update"] = time.perf_counter() - start

    metrics = {
        **_reward_metrics(rollout),
        **_divergence(old[:n] - base[:n], offline=bool(config.rollouts)),
        **update,
        **{f"entropy/{name}": float(values[:n].double().mean()) for name, values in entropies.items()},
        "valid": float(rollout.crystals.properties["valid"].mean()),
        "unique": len(set(keys)) / n,
        "new": new / n,
        "chemical_systems": len(set(chemical_systems(rollout.crystals))),
        "space_groups": len(rollout.crystals.space_group.unique()),
        "effective_space_groups": tuning.prior.effective(),
        "penalty": tuning.memory.penalty,
        "beta": tuning.beta,
        "scale": tuning.scale,
        "baseline": tuning.baseline.mean,
        **{f"seconds/{stage}": value for stage, value in seconds.items()},
    }
    written = replace(rollout.crystals, properties=dict(rollout.crystals.properties))
    written.properties |= {
        "reward": tuning.memory.with_penalty(rollout.reward),
        "step": torch.full((n,), tuning.step + 1.0, dtype=torch.float64),
        "log_prob": old[:n, : len(FACTORS)].sum(1).cpu(),
        "log_prob_base": base[:n, : len(FACTORS)].sum(1).cpu(),
    }
    drawn = replace(rollout.crystals, properties={"reward": rollout.reward, "drawn": old[:n].sum(1).cpu()})
    tuning.memory.keep_best(drawn, keys)
    if config.target_kl and not config.rollouts:
        tuning.beta = policy.adapt_beta(tuning.beta, metrics["kl"], config.target_kl)
    tuning.step += 1
    return written, rollout.status, metrics


def _prepare(
    tuning: Tuning,
    config: FinetuneConfig,
    crystals: CrystalBatch,
    earned: Tensor,
    old: Tensor,
    base: Tensor,
    nuclei: dict[str, Tensor],
    fresh: int,
    generator: torch.Generator,
) -> Batch:
    """Advantages, weights and what to learn from. The running means then know the fresh crystals, and not before."""
    bonus = [getattr(config, f"entropy_{name}") for name in FACTORS] + [0.0]
    beta = tuning.beta if config.kl == "reward" else 0.0
    entropy = torch.tensor(bonus, dtype=old.dtype, device=old.device)
    score = policy.shaped_reward(earned / tuning.scale, old, base, beta, entropy)
    group = crystals.space_group.to(old.device)
    if tuning.baseline.mean is None:
        tuning.baseline.mean = float(score[:fresh].mean())
    limit = config.clip_advantage or math.inf
    advantage, group_advantage = (
        a.clamp(-limit, limit) for a in policy.advantages(config.algorithm, score, group, tuning.baseline)
    )
    tuning.baseline.update(score[:fresh].cpu(), crystals.space_group[:fresh].cpu())
    weight = torch.ones_like(earned)
    if fresh < len(crystals):
        drawn = crystals.properties["drawn"][fresh:].to(old.device)
        weight[fresh:] = policy.importance_weight(old[fresh:].sum(1), drawn, config.replay_clip)
    items = torch.arange(len(crystals), device=old.device)[:, None]
    if config.algorithm in policy.PAIRED:
        # With fixed shares the policy is one of crystals given their space group: only those can be compared.
        items = policy.preference_pairs(earned, torch.zeros_like(group) if tuning.prior.learn else group, generator)
    rewards, crystals = earned / tuning.scale, crystals.to(tuning.model.device)
    return Batch(crystals, old, base, advantage, group_advantage, rewards, weight, nuclei, items)


def _update(tuning: Tuning, config: FinetuneConfig, batch: Batch, generator: torch.Generator) -> dict[str, float]:
    """Passes of minibatches over one batch, until the policy is `max_step_kl` from its start; means over all of them.

    `epochs` of the metrics is how many passes were learned from.

    Raises:
        NotFinite: a loss or a gradient is, or the policy that the step leaves behind.
    """
    parameters = [p for group in tuning.optimiser.param_groups for p in group["params"]]
    for group in tuning.optimiser.param_groups:
        group["lr"] = group["peak"] * rate_fraction(config, tuning.step, tuning.seconds)
    sums = dict.fromkeys(("loss", "ratio", "clip_fraction", "step_kl", "gradient_norm"), 0.0)
    seen = learned = 0
    for chosen in _minibatches(config, len(batch.items), generator):
        tuning.optimiser.zero_grad(set_to_none=True)
        kl = 0.0
        for part in chosen.split(config.micro_batch):
            loss, watched = _loss(tuning, config, batch, batch.items[part.to(batch.items.device)])
            (loss.sum() / len(chosen)).backward()
            for name, value in watched.items():
                sums[name] += float(value.sum())
            kl += float(watched["step_kl"].sum()) / len(chosen)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.clip_gradient))
        _require_finite({"loss": sums["loss"], "gradient": norm})
        sums["gradient_norm"] += norm * len(chosen)
        seen += len(chosen)
        if config.max_step_kl and kl > config.max_step_kl:
            break
        tuning.optimiser.step()
        learned += len(chosen)
    with torch.no_grad():  # a few crystals will do: weights that are too large to work with spoil them all
        few = {name: kept[: config.micro_batch] for name, kept in batch.nuclei.items()}
        after = tuning.log_probs(batch.crystals[: config.micro_batch], few).sum()
        weights = sum(p.sum() for p in parameters)
    _require_finite({"sum of the weights": float(weights), "log-probability after the step": float(after)})
    means = {name: value / max(seen, 1) for name, value in sums.items()}  # there may be no pair
    return {**means, "epochs": learned / max(len(batch.items), 1)}


def _require_finite(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise NotFinite(f"the {name} is {value}")


def rate_fraction(config: FinetuneConfig, step: int, seconds: float) -> float:
    """Learning rate of a step as a fraction of the peak; `step` steps and `seconds` of work came before it.

    Up from almost nothing, because Adam's first steps are as large as any, on no more than one batch's evidence. Then
    down to the end of the run, by whichever limit is nearer, because what noise moves the policy costs KL and earns
    nothing: at a constant rate the last iterate wanders about the optimum.
    """
    progress = step / config.steps
    if config.time_limit:
        progress = max(progress, seconds / (60 * config.time_limit))
    rise = min(1.0, (step + 1) / max(config.warmup, 1))
    return rise * (1 - (1 - config.lr_final) * min(progress, 1.0))


def _minibatches(config: FinetuneConfig, n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of each batch, shuffled anew for each pass."""
    for _ in range(config.epochs):
        order = torch.randperm(n, generator=generator)
        yield from order.split(config.batch_size) if n else ()


def _loss(tuning: Tuning, config: FinetuneConfig, batch: Batch, items: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each item (m,), and what is watched of them, (m,) each."""
    rows = items.flatten()
    factors = tuning.log_probs(batch.crystals[rows], {name: kept[rows] for name, kept in batch.nuclei.items()})
    old_factors, base_factors = batch.old[rows], batch.base[rows]
    now, old, base = factors.sum(1), old_factors.sum(1), base_factors.sum(1)
    advantage, weight = batch.advantage[rows], batch.weight[rows]
    if config.algorithm in policy.PAIRED:
        now_pairs, base_pairs, rewards = (x.view(-1, 2) for x in (now, base, batch.reward[rows]))
        if config.algorithm == "dpo":
            loss = policy.dpo_loss(*now_pairs.unbind(1), *base_pairs.unbind(1), tuning.beta)
        else:
            gaps = (x[:, 0] - x[:, 1] for x in (now_pairs - base_pairs, rewards))
            loss = policy.rebel_loss(*gaps, tuning.beta)
        clipped = torch.zeros_like(now)
    else:
        crystal, crystal_old = factors[:, :-1].sum(1), old_factors[:, :-1].sum(1)
        gain = policy.clipped_surrogate(crystal, crystal_old, advantage, config.clip_ratio)
        clipped = policy.is_clipped(crystal, crystal_old, advantage, config.clip_ratio).double()
        if tuning.prior.learn:
            gain = gain + policy.clipped_surrogate(
                factors[:, -1], old_factors[:, -1], batch.group_advantage[rows], config.clip_ratio
            )
        if config.kl == "loss":
            gain = gain - tuning.beta * policy.kl_loss(now, old, base)
        loss = -weight * gain
    with torch.no_grad():
        watched = {"ratio": torch.exp(now - old), "clip_fraction": clipped, "step_kl": policy.kl_k3(old - now)}
        watched = {name: values.view(items.shape).mean(1) for name, values in watched.items()}
    return loss, {"loss": loss.detach(), **watched}


def spread(reward: Tensor) -> float:
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
    for name in rollout.terms:
        values = rollout.crystals.properties[name]
        metrics[f"reward/{name}"] = float(values.nanmean())
    return metrics


def _divergence(log_ratio: Tensor, offline: bool) -> dict[str, float]:
    """KL(policy || starting model) in nats by factor and in all; unknown from crystals that the policy did not draw."""
    names = (*FACTORS, "space_group")
    parts = [math.nan if offline else float(policy.kl_estimate(log_ratio[:, i : i + 1])) for i in range(len(names))]
    return {"kl": sum(parts), **{f"kl/{name}": part for name, part in zip(names, parts, strict=True)}}


def _why_end(config: FinetuneConfig, metrics: dict[str, float], seconds: float) -> str:
    """Why the run should end before its last step, or ""."""
    if config.max_kl and metrics["kl"] > config.max_kl:
        return (
            f"The KL to the starting model is {metrics['kl']:.1f} nats, above max_kl = {config.max_kl:g}; raise beta."
        )
    if config.time_limit and seconds > 60 * config.time_limit:
        return "The time limit is reached."
    return ""


# ---- where crystals come from ------------------------------------------------------------------------------------


def _online_source(config: FinetuneConfig, tuning: Tuning, scorer: Scorer) -> Source:
    """Fresh crystals of the policy."""

    def draw_and_score(generator: torch.Generator, seed: int) -> Rollout:
        groups = tuning.prior.sample(config.n, generator)
        return _collect(tuning.model, groups, tuning, config, scorer, seed)

    return draw_and_score


def _collect(
    model: nn.Module, groups: Tensor, tuning: Tuning, config: FinetuneConfig, scorer: Scorer, seed: int
) -> Rollout:
    chunk, distance = config.draw_size, config.min_distance
    return collect(model, groups, tuning.options, scorer, seed=seed, chunk=chunk, min_distance=distance)


def _offline_source(config: FinetuneConfig) -> Source:
    """Crystals of a rollouts file with their rewards, `n` of them at random per step.

    Raises:
        UserError: the file has no reward, or no two crystals of one space group differ in it.
    """
    crystals = read_crystals(config.rollouts)
    reward = torch.from_numpy(read_columns(config.rollouts, ["reward"])["reward"])
    crystals.properties = {"reward": reward, "valid": torch.ones_like(reward)}
    if not len(policy.preference_pairs(reward.nan_to_num(-1e9), crystals.space_group, torch.Generator())):
        raise UserError(f"{config.rollouts}: no two crystals of one space group differ in reward; nothing to prefer")

    def pick(generator: torch.Generator, _seed: int) -> Rollout:
        # Neighbours by space group come together: a random choice of single crystals would hold few pairs.
        pairs = policy.preference_pairs(reward.nan_to_num(-1e9), crystals.space_group, generator)
        few = torch.randperm(len(pairs), generator=generator)[: max(config.n // 2, 1)]
        rows = crystals[pairs[few].unique()].trim()
        return Rollout(rows, ["" if known else "no score" for known in ~torch.isnan(rows.properties["reward"])], [])

    return pick


# ---- watching and judging ----------------------------------------------------------------------------------------


def _validation_crystals(config: FinetuneConfig) -> CrystalBatch | None:
    """Some of the dataset's validation split (of all its crystals where it has none)."""
    if not config.dataset:
        return None
    from cfrl.io.datasets import load_dataset

    crystals = load_dataset(config.dataset, split="validation")
    crystals = crystals if len(crystals) else load_dataset(config.dataset)
    order = torch.randperm(len(crystals), generator=torch.Generator().manual_seed(0))
    return crystals[order[:VALIDATION_CRYSTALS]].canonical()


@torch.no_grad()
def _validate(tuning: Tuning, crystals: CrystalBatch) -> dict[str, float]:
    """Mean -log P of known crystals, nats: what the model forgets on the way."""
    fits = crystals.num_sites < tuning.model.config.max_sites
    scores = tuning.model.log_prob(crystals[fits])
    means = {f"validation/{name}": -float(scores[name].double().mean()) for name in FACTORS}
    return {"validation/loss": sum(means.values()), **means}


def _scale(tuning: Tuning, config: FinetuneConfig, scorer: Scorer) -> float:
    """Unit of the reward: the spread of the scores of many crystals of the starting model (or of the file).

    One step's crystals would do for most rewards, but not for sparse ones (85% of the embedded model's crystals earn
    no `dielectric_bandgap`): from batch to batch their spread changes by a factor of three, and beta with it. The
    crystals are the same whatever the run's seed: the unit belongs to the model and the reward.
    """
    if not config.standardize:
        return 1.0
    if config.rollouts:
        return spread(torch.from_numpy(read_columns(config.rollouts, ["reward"])["reward"]))
    return spread(_fresh(tuning, config, scorer, config.scale_crystals, SCALE_SEED, tuned=False).reward)


def _fresh(tuning: Tuning, config: FinetuneConfig, scorer: Scorer, n: int, seed: int, tuned: bool) -> Rollout:
    """n scored crystals of the policy, or of the starting model."""
    model, shares = (tuning.model, tuning.prior.log_prob()) if tuned else (tuning.base, tuning.prior.base)
    generator = torch.Generator().manual_seed(seed)
    groups = torch.multinomial(shares.detach().exp().cpu(), n, replacement=True, generator=generator)
    return _collect(model, groups, tuning, config, scorer, seed)


def evaluate(tuning: Tuning, config: FinetuneConfig, scorer: Scorer, folder: Path) -> None:
    """Draw and score fresh crystals of the starting model and of the policy; same seeds, a file each."""
    if isinstance(scorer, Reward):
        scorer = partial(scorer, update=False)
    seed = random_seed(config.seed, 0)
    for name, tuned in (("before.h5", False), ("after.h5", True)):
        rollout = _fresh(tuning, config, scorer, config.evaluate, seed, tuned)
        write_crystals(folder / name, rollout.crystals, columns={"status": rollout.status})


def _check(config: FinetuneConfig) -> None:
    """Settings that exclude each other. Raises UserError."""
    if config.rollouts and config.algorithm not in policy.PAIRED:
        raise UserError("rollouts: only --algorithm dpo and rebel learn from a file; the others need fresh crystals")

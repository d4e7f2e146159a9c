"""`cfrl finetune`: draws crystals, scores them, moves the policy towards the reward, and repeats."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from cfrl.config import FinetuneConfig, read_run_config, reward_definitions
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import NotFinite, UserError
from cfrl.io.storage import append_crystals, read_columns, read_crystals, write_crystals
from cfrl.model.files import DEFAULT, EMBEDDED, STABLE, Extras, load_model, model_path, save_model
from cfrl.model.sampler import random_seed
from cfrl.potentials.families import is_outside
from cfrl.potentials.pool import PotentialPool
from cfrl.reports import monitor
from cfrl.reports.report import write_report
from cfrl.rewards import Reward, RewardContext, build_reward, relax_steps_for
from cfrl.rewards.guards import heeded
from cfrl.rewards.trust import confirm_code
from cfrl.rl import policy
from cfrl.rl.loop import begin, step, validate, why_end
from cfrl.rl.makeup import MAKEUP, compared, makeup
from cfrl.rl.sources import SCALE_SEED, FreshCrystals, RecordedCrystals, Scorer, Source
from cfrl.rl.tuning import Tuning, settled
from cfrl.runs.devices import choose_device
from cfrl.runs.engine import count_cores, make_engine
from cfrl.runs.folder import RunFolder
from cfrl.runs.interrupt import Abandoned, StopWish, stop_on_signal
from cfrl.runs.options import EngineOptions
from cfrl.runs.ranks import ALONE, Ranks, processes
from cfrl.tables import write_csv
from cfrl.untrusted import fitting

VALIDATION_CRYSTALS = 512
LONG = 512  # crystals of a run for which it pays that worker processes start
STOPPED = "Stopped."  # why a run ends after Ctrl-C


def finetune(
    config: FinetuneConfig | None = None,
    *,
    reward: Scorer | None = None,
    resume: str | Path | None = None,
    root: str | Path = "runs",
    quiet: bool = False,
    trust: bool = False,
) -> RunFolder | None:
    """Tune a model towards a reward. Of several processes (`torchrun`) the first one writes; the others get None.

    Args:
        config: the settings; default: those of the run that is resumed, else the defaults.
        reward: what scores a batch of crystals; default: made of `config.reward` by `build_reward`.
        resume: a run folder to go on with, instead of a new one.
        root: where a new run folder is made.
        quiet: show nothing.
        trust: import code that the settings of a resumed run name; else the user is asked.

    Returns:
        The run folder: metrics.csv, rollouts.h5, checkpoint.pt, model.safetensors and plots; with `config.evaluate`
        also before.h5 and after.h5, fresh crystals of both models, and makeup.csv, what they are made of.

    Raises:
        UserError: a setting, a file or the reward is at fault; finished steps are saved.
        KeyboardInterrupt: after Ctrl-C, once the step at hand is finished and saved.
    """
    if config is None:
        config = read_run_config(FinetuneConfig, Path(resume) / "config.toml") if resume else FinetuneConfig()
    _check(config)
    with processes(config.device) as ranks, scoring_pool(config, ranks) as pool:
        if resume and reward is None and not config.rollouts and ranks.first:
            confirm_code(config.reward, Path(resume) / "config.toml", trust)
        scorer = reward
        if scorer is None and not config.rollouts:
            scorer = configured_reward(config, ranks.device, ranks, pool)
            config = settled(config, scorer.needs)
            if config.model is None and getattr(scorer, "lasting", False):
                config = replace(config, model=STABLE)
        tuning = start(config, ranks)
        known = scorer if isinstance(scorer, Reward) else None
        if known is not None:
            known.load()
        source = _recorded(config) if config.rollouts else FreshCrystals(tuning, scorer)
        validation = _validation_crystals(config) if ranks.first else None
        if not ranks.first:
            _restore(tuning, known, RunFolder.open(resume) if resume else None)
            with stop_on_signal() as stop:
                if _tune(tuning, source, config, validation, stop, Watcher()) == STOPPED:
                    raise KeyboardInterrupt
                if config.evaluate and not config.rollouts:
                    evaluate(source, config, None)
            return None
        run = RunFolder.open(resume) if resume else RunFolder.create("finetune", config.reward, config, root)
        with run.locked(), stop_on_signal() as stop, monitor.Live(run, config.steps, quiet) as live:
            log = RunLog(run, tuning, _header(config), known, live, config.checkpoint_minutes)
            log.restore()
            if resume:
                run.write_config("finetune", config)
            try:
                reason = _tune(tuning, source, config, validation, stop, log)
            except NotFinite as error:  # the weights are spoilt: what was saved last is better
                raise NotFinite(
                    f"{error} (in step {tuning.step + 1}; {run.path} holds {log.saved} steps: go on from there with "
                    f"--resume and a lower --lr than {config.lr:g})"
                ) from error
            except UserError as error:
                log.save()
                raise UserError(f"{error} (in step {tuning.step + 1}; {run.path} holds the steps before)") from error
            log.save()
            if reason == STOPPED:
                run.close()
                live.say(f"Stopped after step {tuning.step}. Go on with: cfrl finetune --resume {run.path}")
                raise KeyboardInterrupt
            if reason:
                live.say(f"{reason} The run ends after step {tuning.step} of {config.steps}.")
            if config.evaluate and not config.rollouts:
                live.say(f"Drawing {config.evaluate} fresh crystals from the model before and after.")
                evaluate(source, config, run.path)
    if config.plots:
        monitor.plot(run)
        write_report(run)
    run.finish()
    if not quiet:
        monitor.summarise(run)
    return run


class Watcher:
    """What sees a tuning go by; this one lets it go."""

    def say(self, text: str) -> None:
        """A line for the user."""

    def add(self, crystals: CrystalBatch, status: list[str], metrics: dict[str, float]) -> None:
        """One step."""


def _tune(
    tuning: Tuning,
    source: Source,
    config: FinetuneConfig,
    validation: CrystalBatch | None,
    stop: StopWish,
    watcher: Watcher,
) -> str:
    """Steps to the last one, or until there is a reason to end: that reason, the same in all processes."""
    reason = ""
    while tuning.step < config.steps and not reason:
        began = time.monotonic()
        try:
            if tuning.scale is None:
                begin(tuning, source)
                watcher.say(f"Unit of the reward: {tuning.scale:.4g}.")
            crystals, status, metrics = step(tuning, source)
        except Abandoned as error:
            watcher.say(f"Step {tuning.step + 1} is lost: {error}.")
            return STOPPED
        if validation is not None and (tuning.step == 1 or tuning.step % config.validate_every == 0):
            metrics |= validate(tuning, validation)
        tuning.seconds += time.monotonic() - began
        watcher.add(crystals, status, metrics)
        if not metrics["scored"]:
            faults = [why for why in status if not why.startswith("guard: ")]  # the reward's own before guards
            fault, count = Counter(faults or status).most_common(1)[0]
            watcher.say(f"Step {tuning.step}: nothing to learn from, no crystal has a score ({count} times: {fault}).")
        ends = tuning.ranks.gather((stop.requested, why_end(config, metrics, tuning.seconds)))
        reason = STOPPED if any(stopped for stopped, _ in ends) else ends[0][1]
    return reason


def start(config: FinetuneConfig, ranks: Ranks | None = None) -> Tuning:
    """The state before the first step."""
    ranks = ranks or Ranks(device=choose_device(config.device))
    model = load_model(config.model, ranks.device)
    real = _real_crystals(config, model.config.max_sites - 1) if config.anchor else None
    return Tuning(model, config, config.rollouts is not None, config.plain(), ranks, real)


def _real_crystals(config: FinetuneConfig, most_sites: int) -> CrystalBatch | None:
    """The training split of the dataset, as pretraining shows it."""
    if not config.dataset:
        return None
    from cfrl.io.datasets import load_dataset

    crystals = load_dataset(config.dataset, split="train")
    return crystals[crystals.num_sites <= most_sites].canonical()


def settings_beside(model: Path) -> FinetuneConfig | None:
    """Those of the fine-tuning run whose folder holds a model's file; None where it lies elsewhere."""
    settings = model.parent / "config.toml"
    if settings.is_file() and "[finetune]" in settings.read_text(encoding="utf-8"):
        return read_run_config(FinetuneConfig, settings)
    return None


@contextmanager
def scoring_pool(config: FinetuneConfig, ranks: Ranks) -> Iterator[PotentialPool | None]:
    """The workers that ask the potential; None where this process does. Raises UserError as `make_engine`."""
    where, kind = config.score_on, choose_device(config.device).type
    if where == "auto":  # a step's few crystals gain more from a process for each core than from threads
        alone = ranks.size == 1 and not is_outside(config.potential)
        long = config.steps * config.per_step >= LONG
        where = "local" if alone and long and kind == "cpu" and count_cores() > 1 else "here"
    if where == "here":
        yield None
        return
    with make_engine(EngineOptions(config.score_workers, where, config.address), kind) as engine:
        yield PotentialPool(engine, config.device)


def configured_reward(
    config: FinetuneConfig, device: str | torch.device, ranks: Ranks = ALONE, pool: PotentialPool | None = None
) -> Reward:
    """The reward of the settings, with all that it works with; no model is loaded yet."""
    context = RewardContext(
        potential=config.potential,
        hull=config.hull,
        dataset=config.dataset,
        device=device,
        ranks=ranks,
        pool=pool,
        caution=config.caution,
        timeout=config.reward_timeout,
        known=config.known,
    )
    reward = build_reward(config.reward, context=context, definitions=reward_definitions(), guards=heeded(config.allow))
    context.relax_steps = relax_steps_for(reward) if config.relax_steps is None else config.relax_steps
    return reward


def _recorded(config: FinetuneConfig) -> RecordedCrystals:
    reward = torch.from_numpy(read_columns(config.rollouts, ["reward"])["reward"])
    try:
        return RecordedCrystals(read_crystals(config.rollouts), reward, config.per_step)
    except UserError as error:
        raise UserError(f"{config.rollouts}: {error}") from error


def _header(config: FinetuneConfig) -> dict[str, str]:
    """What the tuned model's file tells of its making."""
    told = {name: getattr(config, name) or "" for name in ("reward", "algorithm", "space_group", "elements")}
    embedded = (config.model or DEFAULT) in EMBEDDED
    base = config.model or DEFAULT if embedded else str(model_path(config.model).resolve())
    return {"base_model": base, **told}


def _validation_crystals(config: FinetuneConfig) -> CrystalBatch | None:
    """Some of the dataset's validation split (of all its crystals where it has none)."""
    if not config.dataset:
        return None
    from cfrl.io.datasets import load_dataset

    crystals = load_dataset(config.dataset, split="validation")
    crystals = crystals if len(crystals) else load_dataset(config.dataset)
    order = torch.randperm(len(crystals), generator=torch.Generator().manual_seed(0))
    return crystals[order[:VALIDATION_CRYSTALS]].canonical()


def evaluate(source: FreshCrystals, config: FinetuneConfig, folder: Path | None) -> None:
    """Draw and score fresh crystals of the starting model and of the policy, a file each; and what they are made of.

    Those of the starting model are the first of its survey (`FreshCrystals.survey`) that are not withheld, the same
    whatever the run's seed: a `Reward` has scored them before the first step, and remembers. Those of the policy have
    a seed of their own. makeup.csv: columns as `makeup.compared` has them. Without a folder nothing is written.
    """
    source, made = source.judging(), []
    for name, seed, tuned in (("before.h5", SCALE_SEED, False), ("after.h5", random_seed(config.seed, 0), True)):
        rollout = source.draw(config.evaluate, seed, tuned)
        if folder is not None:
            write_crystals(folder / name, rollout.table(), columns={"status": rollout.status})
            made.append(makeup(rollout.crystals, rollout.status))
    if folder is not None:
        write_csv(folder / MAKEUP, compared(*made))


def _check(config: FinetuneConfig) -> None:
    """Settings that exclude each other. Raises UserError."""
    if config.rollouts and config.algorithm not in policy.PAIRED:
        raise UserError("rollouts: only --algorithm dpo and rebel learn from a file; the others need fresh crystals")


def _restore(tuning: Tuning, reward: Reward | None, run: RunFolder | None) -> None:
    """Go on from a run's checkpoint, if there is one."""
    state = run.load_checkpoint() if run is not None else None
    if state is not None:
        with fitting(run.path / "checkpoint.pt"):
            tuning.load_state_dict(state)
            if reward is not None and "reward" not in tuning.changed(state):
                reward.load_state_dict(state["reward"])


class RunLog(Watcher):
    """Metrics, rollouts and checkpoints of a run, so ordered that a kill between any two writes does no harm.

    Rows of rollouts wait in memory and are written right before the checkpoint that knows of them. If a kill comes
    between, the steps that are done again give the same rows, and are not written twice.
    """

    def __init__(
        self,
        run: RunFolder,
        tuning: Tuning,
        header: dict[str, str],
        reward: Reward | None,
        live: monitor.Live,
        minutes: float,
    ) -> None:
        self.run, self.tuning, self.header, self.reward = run, tuning, header, reward
        self.live, self.minutes = live, minutes  # between two checkpoints
        self.path = run.path / "rollouts.h5"
        self.waiting: list[tuple[CrystalBatch, list[str]]] = []
        self.written = self.saved = 0  # the last step of the rollouts, and of the checkpoint
        self._when = time.monotonic()

    def restore(self) -> None:
        """Go on from the run's checkpoint, if there is one."""
        _restore(self.tuning, self.reward, self.run)
        self.saved = self.tuning.step
        self.run.truncate(self.tuning.step)
        if self.path.exists():
            self.written = int(read_columns(self.path, ["step"])["step"].max(initial=0))

    def say(self, text: str) -> None:
        self.live.say(text)

    def add(self, crystals: CrystalBatch, status: list[str], metrics: dict[str, float]) -> None:
        self.run.log(self.tuning.step, metrics)
        if self.tuning.step > self.written:
            self.waiting.append((crystals, status))
        self.live.update(self.tuning.step, metrics)
        if self.tuning.step == 1 and self.reward is not None:
            for line in self.reward.smothered(crystals.properties):
                self.say(line)
        if time.monotonic() - self._when > 60 * self.minutes:
            self.save()
            self._when = time.monotonic()

    def save(self) -> None:
        """Rollouts, checkpoint, model file."""
        if self.waiting:
            status = [reason for _, part in self.waiting for reason in part]
            crystals = CrystalBatch.cat(part for part, _ in self.waiting)
            append_crystals(self.path, crystals, columns={"status": status})
            self.written = self.tuning.step
            self.waiting.clear()
        state = self.tuning.state_dict()
        if self.reward is not None:
            state["reward"] = self.reward.state_dict()
        self.run.save_checkpoint(state)
        self.saved = self.tuning.step
        if self.tuning.step:  # a run that failed at once leaves no model that later commands would take for tuned
            header = {**self.header, "step": str(self.tuning.step)}
            extras = Extras(header, implied=self.tuning.implied_reward(), critic=self.tuning.critic_tensors())
            if self.reward is not None and self.reward.withheld is not None:
                extras.refusal = self.reward.withheld
            save_model(self.tuning.policy(), self.run.path / "model.safetensors", extras)

"""Crystals that a model draws for a screening, with the reward that it was tuned by: `cfrl screen --model`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cfrl.commands.finetune import configured_reward, settings_beside
from cfrl.commands.sample import draw, refusal_of
from cfrl.config import FinetuneConfig, SampleConfig, ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.storage import write_crystals
from cfrl.model.files import DEFAULT, EMBEDDED, load_extras, load_model, model_path
from cfrl.rewards.trust import confirm_code
from cfrl.runs.devices import choose_device
from cfrl.runs.folder import RunFolder
from cfrl.runs.progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console

    from cfrl.rewards import Reward

DRAWN = "crystals.h5"
REWARD = "reward"  # the column; those of its terms are reward/TERM
_AT_ONCE = 128  # crystals scored


def draw_for(
    config: ScreenConfig, run: RunFolder | None, output: str | None, trust: bool, console: Console
) -> RunFolder:
    """The run folder, with crystals of `config.model` in it as `cfrl sample` draws them, and their reward beside them.

    Args:
        config: model, n, seed and device.
        run: an interrupted run to go on with: what it has drawn stays; None: a new one is made.
        output: the name of a new run folder.
        trust: import code that the settings of the model's run name; else the user is asked.

    Raises:
        UserError: no such model, or its reward cannot be made.
    """
    if run is not None and (run.path / DRAWN).exists():
        return run
    sampling = SampleConfig(n=config.n, model=config.model, seed=config.seed, device=config.device)
    model, refusal = load_model(config.model, choose_device(config.device)), refusal_of(sampling)
    reward = tuned_reward(config, trust)
    if reward is not None:
        reward.load()
    named = replace(config, model=str(model_path(config.model)))  # `last` may be another when it is resumed
    run = run or RunFolder.create("screen", "drawn", named, path=output)
    began = time.monotonic()
    crystals = draw(sampling, model, refusal, console)
    attrs = {
        "model": str(config.model),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "seed": str(config.seed),
        "drawn in": f"{time.monotonic() - began:.0f} s",
    }
    attrs |= {"refused": str(refusal)} if refusal.names else {}
    attrs |= {"tuned by": repr(reward)} if reward is not None else {}
    columns = _scores(reward, crystals, console) if reward is not None else {}
    crystals = replace(crystals, properties={"log_prob": crystals.properties["log_prob"]})
    write_crystals(run.path / DRAWN, crystals, columns=columns, attrs=attrs)
    console.print(f"Model: {model_path(config.model)}", highlight=False, soft_wrap=True)
    if refusal.names:
        console.print(f"{refusal}", highlight=False)
    if reward is not None:
        console.print(
            f"{reward}: {np.isfinite(columns[REWARD]).sum():,} of {len(crystals):,} have one", highlight=False
        )
    return run


def tuned_reward(config: ScreenConfig, trust: bool) -> Reward | None:
    """What the model was tuned by: as the settings of its run have it, else as its file names it; None: by nothing.

    Raises:
        UserError: the reward, or what it works with, is not here any more.
    """
    path = model_path(config.model)
    if path == EMBEDDED[DEFAULT]:
        return None
    settings = path.parent / "config.toml"
    tuning = settings_beside(path)
    if tuning is None:
        known = config.known[0] if config.known else None
        tuning = FinetuneConfig(
            reward=load_extras(config.model).header.get("reward", ""),
            hull=config.hull,
            potential=config.potential,
            known=known,
            dataset=known,
        )
    if not tuning.reward or tuning.rollouts:
        return None
    confirm_code(tuning.reward, settings if settings.is_file() else path, trust)
    return configured_reward(tuning, choose_device(config.device))


def _scores(reward: Reward, crystals: CrystalBatch, console: Console) -> dict[str, np.ndarray]:
    """Columns: the reward, its terms, and why there is none."""
    parts = []
    with progress_bar("reward", len(crystals), console) as advance:
        for start in range(0, len(crystals), _AT_ONCE):
            parts.append(reward(crystals[start : start + _AT_ONCE], update=False))
            advance(min(start + _AT_ONCE, len(crystals)))
    terms = {name: np.concatenate([part.terms[name] for part in parts]) for name in parts[0].terms}
    total = np.concatenate([part.total for part in parts])
    status = np.array([reason for part in parts for reason in part.status], dtype=object)
    return {REWARD: total} | {f"{REWARD}/{name}": values for name, values in terms.items()} | {"reward_status": status}

"""`cfrl sample`: generates crystals, writes them, and says what they are like."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cfrl.config import FinetuneConfig, SampleConfig, ScoringInputs
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import KNOWN, Refusal, parse_refused
from cfrl.errors import UserError
from cfrl.io.export import check_output, export_crystals
from cfrl.io.storage import write_crystals
from cfrl.model.files import STABLE, load_extras, load_model, model_path
from cfrl.model.options import Wishes
from cfrl.model.sampler import sample, space_group_prior
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import sampler_options
from cfrl.rl.options import SteeringOptions
from cfrl.runs.devices import choose_device
from cfrl.runs.folder import RunFolder
from cfrl.runs.interrupt import stop_on_signal
from cfrl.runs.progress import progress_bar
from cfrl.runs.ranks import ALONE, Ranks, processes

if TYPE_CHECKING:
    from cfrl.rewards import Reward
    from cfrl.rl.steering import Steered

# Of the settings, what says which crystals the model draws.
DRAWN = (*(f.name for f in fields(Wishes)), "temperature", "top_p", "min_distance", "seed")


def run_sample(config: SampleConfig, output: str | None = None, console: Console | None = None) -> Path | None:
    """`cfrl sample`: generates crystals, writes them, and says what they are like.

    Of several processes (`torchrun`) the first one writes; the others get None.

    Args:
        config: settings.
        output: file or folder to write (see `export`); None: `crystals.h5` in a new run folder.

    Raises:
        UserError: bad settings, no such model, nowhere to write.
    """
    with processes(config.device) as ranks:
        silent = console is None or not ranks.first
        return _sample(config, output, Console(quiet=True) if silent else console, ranks)


def _sample(config: SampleConfig, output: str | None, console: Console, ranks: Ranks) -> Path | None:
    if output:
        check_output(output, config.n)
    scorer = _scorer(config) if config.toward else None
    if scorer and config.model is None and scorer.lasting:  # as a tuning does
        config = replace(config, model=STABLE)
    model = load_model(config.model, ranks.device)
    refusal = refusal_of(config)
    # What leaves nothing to draw leaves no run folder either.
    options = sampler_options(config, model.config.max_sites - 1)
    space_group_prior(model, config.space_group, config.max_atoms, options.constraint)
    if scorer:
        if ranks.size > 1:
            raise UserError("toward: its chains are moved by one process; leave torchrun out")
        scorer.load()
        return _steered(config, model, scorer, refusal, output, console)
    path = None
    if ranks.first:
        path = Path(output) if output else RunFolder.create("sample", config=config).path / "crystals.h5"
    crystals = draw(config, model, refusal, console, ranks)
    if path is None:
        return None
    export_crystals(crystals, path, {"model": config.model or "default", "seed": str(config.seed)})
    console.print(f"Model: {model_path(config.model)}", highlight=False, soft_wrap=True)
    if refusal.names:
        console.print(f"{refusal}; --refuse none: draw them too", highlight=False)
    _describe(crystals, config.min_contact, console)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    return path


def draw(
    config: SampleConfig, model: CrystalTransformer, refusal: Refusal, console: Console, ranks: Ranks = ALONE
) -> CrystalBatch:
    """`config.n` crystals of the model as the settings wish, none of them refused."""
    with progress_bar("sampling", config.n, console) as advance:
        return sample(
            model,
            config.n,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            keep_invalid=config.keep_invalid,
            min_distance=config.min_distance,
            min_contact=config.min_contact,
            draw_size=config.draw_size,
            wanted=refusal if refusal.names else None,
            progress=advance,
            ranks=ranks,
            **{f.name: getattr(config, f.name) for f in fields(Wishes)},
        )


def _steered(
    config: SampleConfig,
    model: CrystalTransformer,
    scorer: Reward,
    refusal: Refusal,
    output: str | None,
    console: Console,
) -> Path:
    """Crystals towards a reward; a run folder also gets scored.h5, all that was scored, and metrics.csv, a row a sweep.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once what there is is written.
    """
    from cfrl.rl.steering import Steering, steer

    run = None if output else RunFolder.create("sample", config.toward, config)
    path = run.path / "crystals.h5" if run else Path(output)
    logged = 0

    def watch(steering: Steering) -> None:
        nonlocal logged
        advance(min(steering.scores.asked, config.budget), note=str(steering))
        if run and steering.sweeps > logged:
            logged = steering.sweeps
            run.log(logged, steering.numbers())

    with stop_on_signal() as stop, progress_bar("steering", config.budget, console) as advance:
        steered = steer(
            model,
            scorer,
            config.n,
            **{name: getattr(config, name) for name in DRAWN},
            **{f.name: getattr(config, f.name) for f in fields(SteeringOptions)},
            wanted=refusal if refusal.names else None,
            stopped=lambda: stop.requested,
            watch=watch,
        )
    attrs = {f"steering/{name}": f"{value:.6g}" for name, value in steered.numbers.items()}
    export_crystals(steered.crystals, path, {"model": config.model or "default", "seed": str(config.seed), **attrs})
    if run:
        write_crystals(run.path / "scored.h5", steered.scored, columns={"status": steered.status})
        run.finish()
    console.print(f"Model: {model_path(config.model)}", highlight=False, soft_wrap=True)
    _tell(config, steered, console)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    if stop.requested:
        raise KeyboardInterrupt
    return path


def _scorer(config: SampleConfig) -> Reward:
    """The reward as `cfrl finetune` makes it. Raises UserError."""
    from cfrl.commands.finetune import configured_reward

    if config.keep_invalid:
        raise UserError("keep_invalid: what is impossible has no reward to be steered towards; leave it out")
    shared = {f.name: getattr(config, f.name) for f in fields(ScoringInputs)}
    settings = FinetuneConfig(
        reward=config.toward, dataset=config.known, known=config.known, allow=config.allow, **shared
    )
    scorer = configured_reward(settings, choose_device(config.device))
    if "dataset" in scorer.needs and config.known is None:
        raise UserError("the reward 'novelty' needs known crystals to compare with: give --known")
    return scorer


def _tell(config: SampleConfig, steered: Steered, console: Console) -> None:
    """What came out, and how far it can be trusted to be samples of the target."""
    told = steered.numbers
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"{told['scored']:,} crystals scored in {told['seconds'] / 60:.1f} minutes, "
        f"{told['scored_per_second']:.1f} a second. {steered.ended}"
    )
    say(
        f"{told['sweeps']} sweeps of {config.chains} chains, {told['sweeps_at_beta']} of them at beta {config.beta:g} "
        f"({config.beta * told['unit']:.4g} of the reward)"
    )
    rates = {name.removeprefix("accepted/"): rate for name, rate in told.items() if name.startswith("accepted/")}
    decided = rates.pop("score", math.nan)
    say(
        "moves taken: "
        + ", ".join(f"{name} {rate:.0%}" for name, rate in rates.items())
        + f"; by the reward {decided:.0%}"
    )
    if told["temperature"] < 1:
        say(f"These are samples at beta {told['beta']:.3g}, not yet {config.beta:g}: raise --budget or --time-limit")
    else:
        say(
            f"split R-hat of the reward {told['r_hat']:.2f} (1: the chains agree); what was drawn at beta is worth "
            f"{told['effective_draws']:.0f} independent draws"
        )
    say(
        f"{len(steered.crystals)} crystals, {told['unique']:.0%} unique, {told['formulas']} formulas, descended from "
        f"{told['ancestors']} of the model's"
    )
    names = [name for name in steered.crystals.properties if name != "log_prob" and not name.endswith("/spread")]
    for name in names:
        value = steered.crystals.properties[name]
        known = value[~value.isnan()]
        if len(known):
            say(f"{name}: median {known.median():.4g}, from {known.min():.4g} to {known.max():.4g}")
    best = steered.crystals.properties["reward"].argsort(descending=True)
    say("best: " + ", ".join(dict.fromkeys(steered.crystals[best[:16]].formulas())))


def refusal_of(config: SampleConfig) -> Refusal:
    """What is drawn anew: as asked, or as the model was tuned to leave out. Raises UserError."""
    tuned = load_extras(config.model).refusal
    auto = () if config.formula or config.like else tuned.names  # what is asked for by name is wanted, known or not
    names = auto if config.refuse == "auto" else parse_refused(config.refuse)
    if config.known is None or KNOWN not in names:
        return Refusal(names, tuned.known)
    from cfrl.io.datasets import load_dataset

    return Refusal(names, KnownFormulas.of(load_dataset(config.known).formulas()))


def _describe(crystals: CrystalBatch, min_contact: float, console: Console) -> None:
    if not len(crystals):
        return
    draws, valid = crystals.properties["draws"].sum(), crystals.properties["valid"].sum()
    if min_contact:
        apart = (crystals.closest_contacts() >= min_contact).double().mean()
        placed = f"{len(crystals)} crystals, placed {draws:.0f} times"
        console.print(f"{placed}; {apart:.1%} have no overlap (of {min_contact:g})", highlight=False)
    else:  # every crystal's last draw is the only one of its draws that can have been valid
        console.print(f"{len(crystals)} crystals; {valid / draws:.1%} of {draws:.0f} draws were valid")
    if valid < len(crystals):
        console.print(f"{len(crystals) - valid:.0f} invalid crystals are among them (valid = 0)")
    formulas = Counter(crystals.formulas())
    console.print(
        f"{len(formulas)} distinct formulas in {len(set(crystals.space_group.tolist()))} space groups; "
        f"{crystals.num_sites.double().mean():.1f} sites and {crystals.num_atoms.double().mean():.1f} atoms a cell"
    )
    console.print("for instance " + ", ".join(list(formulas)[:8]))

"""`cfrl sample`: generates crystals, writes them, and says what they are like."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from cfrl.config import SampleConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import KNOWN, Refusal, parse_refused
from cfrl.io.export import check_output, export_crystals
from cfrl.model.files import load_extras, load_model, model_path
from cfrl.model.options import Wishes
from cfrl.model.sampler import sample, space_group_prior
from cfrl.model.wishes import sampler_options
from cfrl.runs.devices import choose_device
from cfrl.runs.folder import RunFolder
from cfrl.runs.progress import progress_bar


def run_sample(config: SampleConfig, output: str | None = None, console: Console | None = None) -> Path:
    """`cfrl sample`: generates crystals, writes them, and says what they are like.

    Args:
        config: settings.
        output: file or folder to write (see `export`); None: `crystals.h5` in a new run folder.

    Raises:
        UserError: bad settings, no such model, nowhere to write.
    """
    console = console or Console(quiet=True)
    if output:
        check_output(output, config.n)
    model = load_model(config.model, choose_device(config.device))
    refusal = _refusal(config)
    # What leaves nothing to draw leaves no run folder either.
    options = sampler_options(config, model.config.max_sites - 1)
    space_group_prior(model, config.space_group, config.max_atoms, options.constraint)
    path = Path(output) if output else RunFolder.create("sample", config=config).path / "crystals.h5"
    with progress_bar("sampling", config.n, console) as advance:
        crystals = sample(
            model,
            config.n,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            keep_invalid=config.keep_invalid,
            min_distance=config.min_distance,
            draw_size=config.draw_size,
            wanted=refusal if refusal.names else None,
            progress=advance,
            **{f.name: getattr(config, f.name) for f in fields(Wishes)},
        )
    export_crystals(crystals, path, {"model": config.model or "default", "seed": str(config.seed)})
    console.print(f"Model: {model_path(config.model)}", highlight=False, soft_wrap=True)
    if refusal.names:
        console.print(f"{refusal}; --refuse none: draw them too", highlight=False)
    _describe(crystals, console)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)
    return path


def _refusal(config: SampleConfig) -> Refusal:
    """What is drawn anew: as asked, or as the model was tuned to leave out. Raises UserError."""
    tuned = load_extras(config.model).refusal
    auto = () if config.formula or config.like else tuned.names  # what is asked for by name is wanted, known or not
    names = auto if config.refuse == "auto" else parse_refused(config.refuse)
    if config.known is None or KNOWN not in names:
        return Refusal(names, tuned.known)
    from cfrl.io.datasets import load_dataset

    return Refusal(names, KnownFormulas.of(load_dataset(config.known).formulas()))


def _describe(crystals: CrystalBatch, console: Console) -> None:
    if not len(crystals):
        return
    draws, valid = crystals.properties["draws"].sum(), crystals.properties["valid"].sum()
    # Every crystal's last draw is the only one of its draws that can have been valid.
    console.print(f"{len(crystals)} crystals; {valid / draws:.1%} of {draws:.0f} draws were valid")
    if valid < len(crystals):
        console.print(f"{len(crystals) - valid:.0f} invalid crystals are among them (valid = 0)")
    formulas = Counter(crystals.formulas())
    console.print(
        f"{len(formulas)} distinct formulas in {len(set(crystals.space_group.tolist()))} space groups; "
        f"{crystals.num_sites.double().mean():.1f} sites and {crystals.num_atoms.double().mean():.1f} atoms a cell"
    )
    console.print("for instance " + ", ".join(list(formulas)[:8]))

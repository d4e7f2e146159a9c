"""`cfrl predict`: the structure of a formula: draws candidates, relaxes them, ranks them by energy.

runs/<date>-<time>-predict-<formula>/
    candidates.h5      as drawn: what the model believes in, without a look at any energy
    screen/            the screening of them (see screen.py)
    prediction.csv     the distinct structures, lowest first
    cifs/              the same, relaxed
    energy_volume.png  all candidates, relaxed
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from cfrl.commands.screen import screen
from cfrl.config import NO_TYPES, PredictConfig, ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.structure_types import StructureTypes
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import read_columns, read_crystals, write_crystals
from cfrl.model.files import load_model
from cfrl.model.options import CellWishes, Wishes
from cfrl.model.prediction import ERROR, likelihoods, likely_crystals
from cfrl.runs.devices import choose_device
from cfrl.runs.folder import RunFolder
from cfrl.screening.dft import replaced_folder
from cfrl.tables import write_csv

if TYPE_CHECKING:
    from pymatgen.core import Structure

SHOWN = 10
ASKED_FOR = "element,not_neutral,noble_gas,radioactive"  # flags of a composition: it is what the user wants


@dataclass
class Predicted:
    """A structure that candidates relaxed to.

    structure: relaxed. id: of the lowest of these candidates. times: how many there are.
    energy: eV/atom. e_above_hull: eV/atom, NaN where unknown. known_as: a known crystal that it is, or "".
    log_weight: of the likeliest of their prototypes, before any energy was looked at (`likely_crystals`).
    """

    structure: Structure
    id: str
    times: int
    energy: float
    e_above_hull: float
    known_as: str
    log_weight: float


def predict(formula: str, config: PredictConfig, resume: Path | None = None, console: Console | None = None) -> Path:
    """Predict the structure of a formula; returns the run folder.

    Args:
        formula: such as LiMn2O4; "" when resuming.
        resume: go on with this run folder: what was drawn and relaxed is kept.

    Raises:
        UserError: a formula that cannot be met, a reference that cannot be used, or no candidate that can be relaxed.
    """
    console = console or Console(quiet=True)
    formula = formula or (RunFolder.open(resume).source if resume else "") or ""
    if not formula:
        raise UserError("name a formula, such as LiMn2O4, or a run to go on with: --resume last")
    wishes = Wishes(formula=formula, **{f.name: getattr(config, f.name) for f in fields(CellWishes)})
    drawn = None if resume else _draw(config, wishes, console)  # what cannot be leaves no run folder
    run = RunFolder.open(resume) if resume else RunFolder.create("predict", formula, config, source=formula)
    path = run.path / "candidates.h5"
    if not path.exists():
        write_crystals(path, drawn if drawn is not None else _draw(config, wishes, console))
    stages = run.path / "screen"
    settings = ScreenConfig(
        known=config.known,
        hull=config.hull,
        potential=config.potential,
        fmax=config.fmax,
        steps=config.steps,
        workers=config.workers,
        engine=config.engine,
        address=config.address,
        device=config.device,
        allow=ASKED_FOR,
    )
    try:
        begun = (stages / "config.toml").is_file()
        screen(str(path), settings, None if begun else str(stages), stages if begun else None, _progress_only(console))
    except KeyboardInterrupt:
        console.print(f"Stopped; what is done is kept. Go on with: cfrl predict --resume {run.path}")
        raise
    found = distinct_structures(stages)
    rows = _rows(found)
    _write(run.path, found, rows)
    _plot(run.path, stages)
    run.finish()
    _show(formula, run.path, rows, console)
    return run.path


def _draw(config: PredictConfig, wishes: Wishes, console: Console) -> CrystalBatch:
    model = load_model(config.model, choose_device(config.device))
    with console.status(f"drawing {config.n} candidates"):
        return likely_crystals(model, config.n, wishes, config.seed, _types(config.types))


def _types(name: str | None) -> StructureTypes | None:
    if name == NO_TYPES:
        return None
    return StructureTypes.of(load_dataset(name)) if name else StructureTypes.embedded()


def _progress_only(console: Console) -> Console:
    """Shows bars, which go to the terminal alone; the tables of a screening would bury the answer."""
    return console if console.quiet else Console(quiet=not console.is_terminal)


def distinct_structures(screening: Path) -> list[Predicted]:
    """What the candidates of a screening relaxed to, lowest energy first; alike ones once.

    Alike is what pymatgen's StructureMatcher takes for the same. Raises UserError where nothing was relaxed.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    path = screening / "screen.h5"
    columns = read_columns(path, ["energy_per_atom", "e_above_hull", "known_as", "input_log_weight"])
    crystals, weights = read_crystals(path), columns["input_log_weight"].tolist()
    order = [row for row in np.argsort(columns["energy_per_atom"]) if np.isfinite(columns["energy_per_atom"][row])]
    if not order:
        raise UserError(f"{screening}: none of the candidates could be relaxed; draw more (-n)")
    structures, matcher, found = crystals.to_structures(), StructureMatcher(), []
    for row in order:
        same = next((one for one in found if matcher.fit(one.structure, structures[row])), None)
        if same is not None:
            same.times += 1
            same.known_as = same.known_as or columns["known_as"][row]
            same.log_weight = max(same.log_weight, weights[row])
            continue
        energy, distance = (float(columns[name][row]) for name in ("energy_per_atom", "e_above_hull"))
        known_as = columns["known_as"][row]
        found.append(Predicted(structures[row], crystals.ids[row], 1, energy, distance, known_as, weights[row]))
    return found


def _write(path: Path, found: list[Predicted], rows: list[dict[str, object]]) -> None:
    write_csv(path / "prediction.csv", {name: [row[name] for row in rows] for name in rows[0]})
    width = len(str(len(found)))
    with replaced_folder(path / "cifs") as folder:
        for place, one in enumerate(found, 1):
            name = f"{place:0{width}d}-{one.structure.composition.reduced_formula}.cif"
            one.structure.to(folder / name, fmt="cif", symprec=0.01)


def _rows(found: list[Predicted]) -> list[dict[str, object]]:
    weights, energies = (np.array([getattr(one, name) for one in found]) for name in ("log_weight", "energy"))
    likely = likelihoods(weights, energies).tolist()
    return [_row(place, one, found[0], p) for place, (one, p) in enumerate(zip(found, likely, strict=True), 1)]


def _row(place: int, one: Predicted, lowest: Predicted, likelihood: float) -> dict[str, object]:
    symbol, number = one.structure.get_space_group_info(symprec=0.01)
    return {
        "place": place,
        "id": one.id,
        "space_group": number,
        "symbol": symbol,
        "atoms": len(one.structure),
        "above_lowest": one.energy - lowest.energy,
        "e_above_hull": one.e_above_hull,
        "likelihood": likelihood,
        "volume_per_atom": one.structure.volume / len(one.structure),
        "times": one.times,
        "known_as": one.known_as,
    }


def _plot(path: Path, screening: Path) -> None:
    from cfrl.reports.figures import Figure, Series, save

    columns = read_columns(screening / "screen.h5", ["energy_per_atom"])
    crystals = read_crystals(screening / "screen.h5")
    volume = (crystals.volumes() / crystals.num_atoms).numpy()
    energy = columns["energy_per_atom"]
    points = Series(volume, energy - np.nanmin(energy), kind="points", text=[f"{i}" for i in crystals.ids])
    axes = ("volume (A^3/atom)", "energy above the lowest (eV/atom)")
    save(Figure("energy_volume", "Candidates, relaxed", *axes, [points]), path)


def _show(formula: str, path: Path, rows: list[dict[str, object]], console: Console) -> None:
    heads = ("", "space group", "atoms", "above lowest", "above hull", "likely", "found", "known as")
    total = sum(row["times"] for row in rows)
    grid = Grid(title=f"{formula}: {len(rows)} structures from {total} candidates; eV/atom", title_justify="left")
    for name in heads:
        grid.add_column(name, justify="left" if name == "known as" else "right")
    for row in rows[:SHOWN]:
        numbers = (f"{row[name]:.3f}" for name in ("above_lowest", "e_above_hull"))
        place, atoms, times = (str(row[name]) for name in ("place", "atoms", "times"))
        grid.add_row(place, _group(row), atoms, *numbers, f"{row['likelihood']:.0%}", f"{times} x", row["known_as"])
    console.print(grid)
    best = max(rows, key=lambda row: row["likelihood"])
    console.print(
        f"Most likely: {best['place']}, {_group(best)}, {best['likelihood']:.0%}, by its prototype's worth and an "
        f"energy that is right to {ERROR:g} eV/atom",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Wrote {path}/: prediction.csv, cifs/, energy_volume.png, screen/", highlight=False, soft_wrap=True)


def _group(row: dict[str, object]) -> str:
    return f"{row['symbol']} ({row['space_group']})"

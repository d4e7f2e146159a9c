"""Screen: which of these crystals deserve a DFT calculation?

`screen` leads crystals from any generator through the stages: validity, duplicates and known crystals, relaxation,
energy above the hull, properties; then it counts, ranks and writes. Of `screening/`, what a stage does with a crystal
is in `stages.py`, the table in `table.py`, what it comes to in `tally.py`; workers are `runs/engine.py`'s.

Results of a stage go to a journal in the run folder as they come. A journal is named by all that its results depend
on, so `--resume` computes what is missing, whatever was interrupted or changed, and nothing else.

    runs/<date>-<time>-screen-<input>/
        table.csv          one row per crystal of the input: candidates, others, flagged ones; each best first
        flagged.csv        rows of those that would be candidates but for a flag (flags.py)
        screen.h5          the final crystals (relaxed, if they were) with the same columns; a dataset of ours
        summary.json       counts and rates with 95% confidence intervals, and what they mean
        report.html        the same to look at, with plots beside it
        cifs/, dft/        the candidates
        stages/            the journals
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cfrl.config import ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.files import atomic_file, check_writable, provenance
from cfrl.io.storage import write_crystals
from cfrl.potentials import model_name
from cfrl.runs.devices import choose_device
from cfrl.runs.engine import count_workers, make_engine
from cfrl.runs.folder import RunFolder
from cfrl.runs.journal import Work, digest
from cfrl.screening import stages
from cfrl.screening.dft import replaced_folder, write_vasp
from cfrl.screening.inputs import is_formula_list, read_formulas, read_known, read_samples
from cfrl.screening.pipeline import check_judge, run_stages, second_opinion
from cfrl.screening.table import JUDGED, TEXT, Table, expression
from cfrl.screening.tally import Judgement, Summary, summarise
from cfrl.stability.flags import check_flags
from cfrl.stability.hull import ReferenceHull
from cfrl.stability.scales import check_scale

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from rich.console import Console

K = TypeVar("K", bound=Hashable)

_SHOWN = 10  # candidates on the terminal
_COLUMNS_SHOWN = {
    "id": "id",
    "formula": "formula",
    "space_group": "group",
    "e_above_hull": "ehull",
    "judge_e_above_hull": "by judge",
    "num_references": "refs",
    "known_as": "known as",
    "rmsd": "rmsd",
    "flags": "flags",
}


def screen(
    source: str | None,
    config: ScreenConfig,
    output: str | None = None,
    resume: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Screen the crystals of a file; returns the run folder.

    Args:
        source: whatever `data.read_structures` takes: our HDF5, CIF, CSV, extxyz, JSON, folders and zips. When
            resuming, None or empty: what the run was about.
        config: the settings.
        output: the run folder (default: a new one under `runs/`), or a .csv or .h5 that the table is copied to.
        resume: go on with this run folder: what its journals hold is not computed again.
        console: where to show progress and results.

    Raises:
        UserError: an input, a reference or a setting that cannot be used, or nowhere to write.
    """
    run = RunFolder.open(resume) if resume else None
    if run and not source:
        source = run.source
    if not source:
        raise UserError("name a file of crystals to screen, or a run to go on with: --resume last")
    ending = Path(output).suffix if output else ""
    copy = Path(output) if ending in (".csv", ".h5") else None
    if copy:
        check_writable(copy)
    elif ending[1:].isalpha():
        raise UserError(f"{output}: the table is copied to a .csv or .h5; the name of a run folder has no ending")
    rank, condition = expression(config.rank, "--rank"), expression(config.filter or "1", "--filter")
    samples = read_samples(source)
    table = Table(samples.ids, samples.structures, samples.problems, samples.columns)
    predictors = _predictors(config.properties)
    table.add_columns(column for target in predictors.values() for column in (target, f"{target}_std"))
    table.add_columns(JUDGED if config.judge else ())
    table.check_names(rank, condition)
    allowed = check_flags(config.allow or "")
    hull = ReferenceHull.load(config.hull) if config.stability else None
    if hull is not None:
        check_scale(config.potential, hull)
    check_judge(config, hull)
    lists = {name: read_formulas(name) for name in config.known if is_formula_list(name)}
    sets = [name for name in config.known if name not in lists]
    known = read_known(sets, set(table["formula"])) if config.unique and sets else None
    run = run or RunFolder.create("screen", Path(source).stem, config, path=None if copy else output, source=source)
    try:
        workers = count_workers(config.workers, choose_device(config.device).type)
        with run.locked(), make_engine(config.engine, workers, config.address) as engine:
            if resume:
                run.write_config("screen", config)
            work = Work(run.path / "stages", engine, digest(samples.structures), console)
            structures = run_stages(work, samples.structures, table, config, known, list(predictors))
            if hull is not None:
                table.judge_stability(hull, samples.structures, config.metastable)
            if config.judge:
                second_opinion(work, structures, table, config, hull)
    except UserError as error:
        raise UserError(f"{error}; what is done is kept: cfrl screen --resume {run.path}") from error
    except KeyboardInterrupt:
        if console:
            console.print(f"Stopped; what is done is kept. Go on with: cfrl screen --resume {run.path}")
        raise
    phases = [*lists.values(), *filter(None, [hull])]
    if phases or known is not None:
        table.note_new_formulas(known or {}, phases)
    table.note_flags(allowed)
    judgement = _judgement(config, hull, sets if known is not None else [], lists)
    order = table.order(rank, condition)
    summary = summarise(table, hull, judgement)
    _write(run.path, table, order, structures, config, summary)
    if copy:
        with atomic_file(copy) as temp:
            shutil.copyfile(run.path / ("table.csv" if copy.suffix == ".csv" else "screen.h5"), temp)
    if config.report:
        from cfrl.reports.report import write_report

        write_report(run)
    run.finish()
    if console:
        _show(run.path, table, order, summary, config, console)
    return run.path


def _judgement(
    config: ScreenConfig, hull: ReferenceHull | None, sets: Iterable[str], lists: Iterable[str]
) -> Judgement:
    """`sets` and `lists`: known crystals and formulas."""
    reference = Path(config.hull).name if config.hull else "the embedded reference"
    known, listed = ([Path(name).name for name in names] for names in (sets, lists))
    return Judgement(
        reference=f"{reference} ({len(hull):,} phases)" if hull else "",
        judge=f"{model_name(config.potential)}, {'relaxed by it' if config.relax else 'as the crystals stand'}",
        second=f"{model_name(config.judge)}, relaxed by it for {config.judge_steps} steps" if config.judge else "",
        need_both=config.need_both,
        threshold=config.metastable,
        known=" or ".join(known),
        formulas=" or ".join([*known, *listed, *[reference] * bool(hull)]),
    )


# ---- the stages ----


def _predictors(names: str | None) -> dict[str, str]:
    """Name -> what it predicts, for each predictor of `--properties`.

    Raises:
        UserError: a predictor that does not exist.
    """
    if not names:
        return {}
    from cfrl.rewards.predictors import BUILT_IN, load_predictor

    chosen = BUILT_IN if names == "all" else [name.strip() for name in names.split(",")]
    return {name: load_predictor(name).target for name in chosen}


# ---- results ----


def _show(
    path: Path, table: Table, order: np.ndarray, summary: Summary, config: ScreenConfig, console: Console
) -> None:
    from rich.table import Table as Grid

    grid = Grid(title=f"{len(table)} crystals", title_justify="left")
    for head, justify in (("", "left"), ("crystals", "right"), ("rate", "right"), ("95% interval", "right")):
        grid.add_column(head, justify=justify)
    for rate in summary.rates:
        share = f"{100 * rate.share:.1f}%"
        grid.add_row(
            rate.name, f"{rate.count} of {rate.total}", share, f"{100 * rate.low:.1f} to {100 * rate.high:.1f}%"
        )
    console.print(grid)
    console.print(summary.judgement, highlight=False)
    _show_groups("elements", "By number of elements", summary.by_elements, console)
    _show_groups("anion", "By anion", summary.by_anion, console)
    for average in summary.averages:
        console.print(
            f"{average.name}: mean {average.mean:.3f}, median {average.median:.3f} {average.unit} "
            f"({average.count} crystals)"
        )
    if summary.opinion:
        console.print(summary.opinion, highlight=False)
    for reason, count in summary.failures.items():
        console.print(f"{count} x {reason}")
    console.print("Left: " + " > ".join(f"{count} {name}" for name, count in summary.funnel.items()), highlight=False)
    for column, what in (("candidate", "candidates"), ("held_back", "held back by flags")):
        _show_rows(f"{what}, by {config.rank}", table, [row for row in order if table[column][row]], console)
    if summary.warning:
        console.print(f"Mind: {summary.warning}")
    written = ["table.csv", "flagged.csv", "screen.h5", "cifs/"]
    written += ["dft/"] * bool(config.dft) + ["report.html"] * config.report
    console.print(f"Wrote {path}/: {', '.join(written)}")


def _show_groups(head: str, title: str, groups: dict[str, dict[str, int]], console: Console) -> None:
    from rich.table import Table as Grid

    grid = Grid(head, title=title, title_justify="left")
    for label in groups:
        grid.add_column(label, justify="right")
    for name in next(iter(groups.values())):
        grid.add_row(name, *(str(counts[name]) for counts in groups.values()))
    console.print(grid)


def _show_rows(title: str, table: Table, rows: list[int], console: Console) -> None:
    """The first rows of a ranking, and the columns that have something to say of them."""
    from rich.table import Table as Grid

    there = [name for name in _COLUMNS_SHOWN if name in table.columns]
    texts = {name: [table.text(name, row, digits=3) for row in rows[:_SHOWN]] for name in there}
    shown = [name for name in texts if any(texts[name])]
    first = f", the first {_SHOWN}" if len(rows) > _SHOWN else ""
    grid = Grid(title=f"{len(rows)} {title}{first}", title_justify="left")
    for name in shown:
        grid.add_column(_COLUMNS_SHOWN[name], justify="left" if name in TEXT else "right")
    for row in zip(*(texts[name] for name in shown), strict=True):
        grid.add_row(*row)
    console.print(grid)


def _write(
    path: Path,
    table: Table,
    order: np.ndarray,
    structures: dict[int, Structure],
    config: ScreenConfig,
    summary: Summary,
) -> None:
    """Table, crystals, summary, and the candidates' files. `order`: rows, the candidates first."""
    table.write_csv(path / "table.csv", order)
    table.write_csv(path / "flagged.csv", [row for row in order if table["held_back"][row]])
    _write_crystals(path / "screen.h5", table, order, structures, config)
    with atomic_file(path / "summary.json") as temp:
        temp.write_text(json.dumps(summary.as_dict() | provenance(), indent=2) + "\n", encoding="utf-8")
    candidates = [int(row) for row in order if table["candidate"][row]][: config.top]
    width = len(str(len(candidates)))
    names = {row: f"{place:0{width}d}-{table['formula'][row]}" for place, row in enumerate(candidates, 1)}
    with replaced_folder(path / "cifs") as folder:
        for row, name in names.items():
            structures[row].to(folder / f"{name}.cif", fmt="cif", symprec=config.symprec)
    if config.dft:
        with replaced_folder(path / "dft") as folder:
            for row, name in names.items():
                write_vasp(structures[row], folder / name, config.dft)


def _write_crystals(
    path: Path, table: Table, order: np.ndarray, structures: dict[int, Structure], config: ScreenConfig
) -> None:
    rows = [int(row) for row in order if table["space_group"][row] > 0]
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(
        [structures[row] for row in rows],
        config.symprec,
        [table["id"][row] for row in rows],
        errors="skip",
        dropped=dropped,
        max_sites=stages.MAX_SITES,
    )
    rows = [row for place, row in enumerate(rows) if place not in dropped]
    columns = {name: values[rows] for name, values in table.columns.items() if name != "id"}
    write_crystals(path, crystals, columns=columns, attrs={"rank": config.rank, "filter": config.filter or ""})

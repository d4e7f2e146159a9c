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
        crystals.h5        what was drawn, of a screening of a model
        elastic.json       elastic tensors, by id (GPa, Voigt's notation)
        phonons/           of each crystal asked NAME.yaml for phonopy, and bands and density of states in NAME.json
        stages/            the journals
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Hashable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from rich.console import Console

from cfrl.commands.drawn import DRAWN, REWARD, draw_for
from cfrl.config import ScreenConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.files import atomic_file, check_writable, provenance
from cfrl.io.catalogue import dataset_path, is_dataset
from cfrl.io.storage import describe, write_crystals
from cfrl.potentials import model_name
from cfrl.runs.devices import choose_device
from cfrl.runs.engine import make_engine
from cfrl.runs.folder import RunFolder
from cfrl.runs.journal import Work, digest
from cfrl.screening import protocol, stages
from cfrl.screening.dft import Candidate, believed_gap, read_pseudos, replaced_folder, write_inputs
from cfrl.screening.inputs import is_formula_list, read_formulas, read_known, read_samples
from cfrl.screening.pipeline import check_judge, run_stages, second_opinion
from cfrl.screening.probes import Probes, asked_columns
from cfrl.screening.protocol import read_tables
from cfrl.screening.submission import SIZE, check_submission, write_submission
from cfrl.screening.table import JUDGED, TEXT, Table, expression
from cfrl.screening.tally import Judgement, Summary, summarise
from cfrl.stability.flags import check_flags
from cfrl.stability.hull import ReferenceHull
from cfrl.stability.scales import check_scale

if TYPE_CHECKING:
    from pymatgen.core import Structure

K = TypeVar("K", bound=Hashable)

_SHOWN = 10  # candidates on the terminal
_COLUMNS_SHOWN = {
    "id": "id",
    "formula": "formula",
    "reward": "reward",
    "space_group": "group",
    "e_above_hull": "ehull",
    "judge_e_above_hull": "by judge",
    "num_references": "refs",
    "known_as": "known as",
    "rmsd": "rmsd",
    "lowest_stiffness": "GPa",
    "lowest_frequency": "THz",
    "parent": "parent",
    "flags": "flags",
}


def screen(
    source: str | None,
    config: ScreenConfig,
    output: str | None = None,
    resume: Path | None = None,
    console: Console | None = None,
    trust: bool = False,
) -> Path:
    """Screen the crystals of a file, or of a model; returns the run folder.

    Args:
        source: whatever `data.read_structures` takes: our HDF5, CIF, CSV, extxyz, JSON, folders and zips. When
            resuming, None or empty: what the run was about. None as well where `config.model` draws them.
        config: the settings.
        output: the run folder (default: a new one under `runs/`), or a .csv or .h5 that the table is copied to.
        resume: go on with this run folder: what its journals hold is not computed again.
        console: where to show progress and results.
        trust: import code that the settings of the model's run name; else the user is asked.

    Raises:
        UserError: an input, a reference or a setting that cannot be used, or nowhere to write.
    """
    run = RunFolder.open(resume) if resume else None
    if run and not source:
        source = run.source
    _check_inputs(source, config)
    ending = Path(output).suffix if output else ""
    copy = Path(output) if ending in (".csv", ".h5") else None
    if copy:
        check_writable(copy)
    elif ending[1:].isalpha():
        raise UserError(f"{output}: the table is copied to a .csv or .h5; the name of a run folder has no ending")
    condition = expression(config.filter or "1", "--filter")
    if config.rank:
        expression(config.rank, "--rank")
    read_pseudos(config.pseudos)  # what is wrong with it is told before the work
    tables = read_tables(config.protocol_data) if config.protocol else {}
    if config.model:
        run = draw_for(config, run, None if copy else output, trust, console or Console(quiet=True))
        source = str(run.path / DRAWN)
    samples = read_samples(source)
    prefix = "" if config.model else "input_"
    table = Table(samples.ids, samples.structures, samples.problems, samples.columns, prefix)
    by = config.rank or (f"-{REWARD}" if REWARD in table.columns else "ehull")
    rank = expression(by, "--rank")
    predictors = _predictors(config.properties)
    table.add_columns(column for target in predictors.values() for column in (target, f"{target}_std"))
    if config.protocol:
        table.add_columns(protocol.COLUMNS)
    if config.submission:
        check_submission(config.submission, len(samples.structures), Path(source).name)
    table.add_columns(asked_columns(config))
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
    phases = [*lists.values(), *filter(None, [hull])]
    run = run or RunFolder.create("screen", Path(source).stem, config, path=None if copy else output, source=source)
    try:
        with run.locked(), make_engine(config, choose_device(config.device).type) as engine:
            if resume:
                run.write_config("screen", config)
            work = Work(run.path / "stages", engine, digest(samples.structures), console)
            structures = run_stages(work, samples.structures, table, config, known, list(predictors))

            def judge(work: Work) -> None:
                if hull is not None:
                    table.judge_stability(hull, structures, config.metastable)
                if config.judge:
                    second_opinion(work, structures, table, config, hull)
                if phases or known is not None:
                    table.note_new_formulas(known or {}, phases)
                table.note_flags(allowed)

            probes = Probes(work, table, structures, config, known, list(predictors), judge, rank, condition)
            probes.run()
            judge(probes.work)
            figures = None
            if config.protocol:
                compared = protocol.compared(sets) if known is not None else None
                named = " and ".join(Path(name).name for name in sets)
                reference = protocol.Reference(hull, known, compared, named, **tables)
                submitted = samples.structures[: SIZE if config.submission else None]
                total = len(submitted) if config.submission else len(samples.ids)
                figures = protocol.judge(work, submitted, structures, table, reference, config, total)
    except UserError as error:
        raise UserError(f"{error}; what is done is kept: cfrl screen --resume {run.path}") from error
    except KeyboardInterrupt:
        if console:
            console.print(f"Stopped; what is done is kept. Go on with: cfrl screen --resume {run.path}")
        raise
    judgement = _judgement(config, hull, sets if known is not None else [], lists)
    config = replace(config, rank=by)  # of the files of a run, config.toml alone keeps what was not set
    order = table.order(rank, condition)
    summary = replace(summarise(table, hull, judgement), protocol=figures.as_dict() if figures else {})
    _write(run.path, table, order, structures, config, summary)
    if config.submission:
        chosen = protocol.geometries(samples.structures[:SIZE], structures, table)[config.submit]
        write_submission(config.submission, chosen, _about(config, source), figures)
    _write_probes(run.path, table, probes)
    if copy:
        with atomic_file(copy) as temp:
            shutil.copyfile(run.path / ("table.csv" if copy.suffix == ".csv" else "screen.h5"), temp)
    if config.report:
        from cfrl.reports.report import write_report

        write_report(run)
    run.finish()
    if console:
        _show(run.path, table, order, summary, config, console)
        if figures:
            _show_protocol(figures, console)
        if config.submission:
            console.print(f"Submission: {config.submission}/ (cifs/, card.md)", highlight=False, soft_wrap=True)
    return run.path


def _check_inputs(source: str | None, config: ScreenConfig) -> None:
    """What is to be screened, and whether it can be submitted. Raises UserError."""
    if config.model and source:
        raise UserError(f"screen {source}, or what --model {config.model} draws? Leave one of them out")
    if not (source or config.model):
        raise UserError("name a file of crystals to screen, or --model, or a run to go on with: --resume last")
    if config.submission and not config.protocol:
        raise UserError("--submission needs the figures of a protocol for its card: add --protocol lemat")
    if config.submission and config.model:
        check_submission(config.submission, config.n, f"--model {config.model} -n {config.n}")


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


def _about(config: ScreenConfig, source: str) -> dict[str, str]:
    """What is known of the making of a submission's crystals."""
    relaxed = f"yes, by {model_name(config.potential)}: fmax {config.fmax:g} eV/A, at most {config.steps} steps"
    about = {"pre-relaxed": relaxed if config.submit == "relaxed" else "no", "crystals of": Path(source).name}
    if is_dataset(source):
        attrs = describe(dataset_path(source))["attrs"]
        told = ("model", "parameters", "seed", "drawn in", "refused", "tuned by")
        about |= {name: str(attrs[name]) for name in told if name in attrs}
    return about


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

    grid = Grid(title=f"{summary.crystals} crystals", title_justify="left")
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
    if summary.followed:
        counts = ", ".join(f"{count} {name}" for name, count in summary.followed.items())
        console.print(f"Along imaginary modes: {counts}", highlight=False)
    for column, what in (("candidate", "candidates"), ("held_back", "held back by flags")):
        _show_rows(f"{what}, by {config.rank}", table, [row for row in order if table[column][row]], console)
    if summary.warning:
        console.print(f"Mind: {summary.warning}")
    written = ["table.csv", "flagged.csv", "screen.h5", "cifs/"]
    written += ["elastic.json"] * (path / "elastic.json").exists() + ["phonons/"] * (path / "phonons").exists()
    written += ["dft/"] * bool(config.dft) + ["report.html"] * config.report
    console.print(f"Wrote {path}/: {', '.join(written)}")


def _show_protocol(figures: protocol.Figures, console: Console) -> None:
    from rich.table import Table as Grid

    grid = Grid(title=f"LeMat-GenBench, {figures.crystals:,} crystals", title_justify="left")
    grid.add_column("")
    for geometry in figures.counts:
        for head in (geometry, "of valid", "of all"):
            grid.add_column(head, justify="right")
    shares = [figures.shares(geometry) for geometry in figures.counts]
    for name in shares[0]:
        cells = []
        for count, valid, whole in (each[name] for each in shares):
            cells += [str(count), "" if np.isnan(valid) else f"{valid:.1%}", f"{whole:.1%}"]
        grid.add_row(name, *cells)
    console.print(grid)
    grid = Grid("", *figures.numbers)
    for name in dict.fromkeys(name for numbers in figures.numbers.values() for name in numbers):
        grid.add_row(name, *(f"{n[name]:.4g}" if name in n else "" for n in figures.numbers.values()))
    console.print(grid)
    console.print(figures.instead, highlight=False)


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
        chosen = [
            Candidate(name, table["id"][row], structures[row], _gap(table, row, structures[row]))
            for row, name in names.items()
        ]
        with replaced_folder(path / "dft") as folder:
            write_inputs(chosen, folder, config.dft, read_pseudos(config.pseudos))


def _gap(table: Table, row: int, structure: Structure) -> float | None:
    """What is known of a crystal's gap, by the predictor or from the input; see `believed_gap`."""
    gap, spread = (
        next((table[column][row] for column in (name, f"input_{name}") if column in table.columns), math.nan)
        for name in ("band_gap", "band_gap_std")
    )
    return believed_gap(structure, float(gap), float(spread)) if not isinstance(gap, str) else None


def _write_probes(path: Path, table: Table, probes: Probes) -> None:
    """Elastic tensors, force constants and what the report draws, of those that have them."""
    tensors = {str(table["id"][row]): r["stiffness"] for row, r in probes.elastic.items() if "stiffness" in r}
    found = {row: record for row, record in probes.phonons.items() if "bands" in record}
    (path / "elastic.json").unlink(missing_ok=True)  # of settings before --resume
    shutil.rmtree(path / "phonons", ignore_errors=True)
    if tensors:
        with atomic_file(path / "elastic.json") as temp:
            temp.write_text(json.dumps(tensors) + "\n", encoding="utf-8")
    if not found:
        return
    with replaced_folder(path / "phonons") as folder:
        for place, (row, record) in enumerate(found.items(), 1):
            name = f"{place:0{len(str(len(found)))}d}-{table['formula'][row]}"
            (folder / f"{name}.yaml").write_text(record["phonopy"], encoding="utf-8")
            facts = {key: record[key] for key in ("lowest_frequency", "bands", "dos")}
            text = json.dumps({"id": str(table["id"][row]), "formula": str(table["formula"][row])} | facts)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


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

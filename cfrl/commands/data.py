"""`cfrl data`: import structure files, fetch public datasets, look into a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.config import DataConfig
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.symmetry import CRYSTAL_SYSTEMS
from cfrl.errors import UserError
from cfrl.files import cache_folder, check_writable
from cfrl.io import fetch, storage
from cfrl.io.catalogue import HDF5, dataset_path, prepared_path
from cfrl.io.datasets import summarise
from cfrl.io.importing import Dropped, Imported, read_files
from cfrl.runs.progress import progress_bar
from cfrl.stability.results import settled
from cfrl.tables import write_csv

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def run_import(
    inputs: Sequence[str],
    output: str | Path,
    config: DataConfig,
    splits: Sequence[str] = (),
    console: Console | None = None,
) -> Imported:
    """`cfrl data import`: structure files -> one HDF5 file, and a table of the dropped rows beside it.

    Args:
        inputs: files, folders, zips; `.h5` files of ours keep their splits.
        output: the `.h5` to write. It appears complete or not at all.
        config: symmetry tolerance, limits, splits, workers.
        splits: one of `storage.SPLITS` (or "") per input, where the source has its own.
        console: a rich console for the progress bar and the summary.

    Raises:
        UserError: an input that cannot be read, an output that cannot be written, nothing usable, or energies that
            are not on one scale.
    """
    output = Path(output)
    check_writable(output, HDF5)
    with progress_bar("import", None, console) as advance:
        imported = read_files(inputs, config, splits, advance)
    if len(imported.crystals):
        imported = settled(imported, config.energy_scale, config.corrections)
    table = output.with_suffix(".dropped.csv")
    _write_dropped(imported.dropped, table)
    if not len(imported.crystals):
        most = imported.reasons().most_common(1)[0][0] if imported.dropped else "there is none"
        raise UserError(f"{inputs[0]}: no structure can be used (most often: {most}); see {table}")
    split = imported.splits(config)
    attrs = {"source": " ".join(map(str, inputs)), "seed": config.seed, "symprec": config.symprec}
    storage.write_crystals(output, imported.crystals, columns=imported.columns, split=split, attrs=attrs)
    if console:
        _print_summary(imported, split, output, table, console)
    return imported


def run_fetch(name: str, config: DataConfig, console: Console | None = None) -> Path:
    """`cfrl data fetch`: download a named source and prepare it, so that its name works as a dataset.

    Raises:
        UserError: unknown name, no connection, wrong checksum, or as `run_import`.
    """
    files = fetch.source_files(name, config.sources)
    folder = cache_folder() / name
    paths = []
    for file in files:
        with progress_bar(f"download {Path(file.url).name}", None, console, download=True) as advance:
            path, note = fetch.download(file, folder, advance)
        if console:
            console.print(f"{path.name}: {note}", style="dim", highlight=False)
        paths.append(path)
    prepared = prepared_path(name)
    run_import([str(path) for path in paths], prepared, config, [file.split for file in files], console)
    return prepared


def run_info(name: str, console: Console) -> None:
    """`cfrl data info`: counts, splits, symmetry, elements, sizes, properties and origin of a dataset.

    Raises:
        UserError: no such dataset, or not an HDF5 file of ours.
    """
    from rich.columns import Columns
    from rich.table import Table

    path = dataset_path(name)
    about = storage.describe(path)
    statistics = summarise(path)
    console.print(f"[bold]{path}[/]: {about['crystals']:,} crystals, {about['sites']:,} sites", highlight=False)

    def table(title: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(head):
            made.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            made.add_row(*(f"{v:,}" if isinstance(v, int) else f"{v:.4g}" if isinstance(v, float) else v for v in row))
        return made

    groups, elements = statistics["space_groups"], statistics["elements"]
    last = [0, *CRYSTAL_SYSTEMS.values()]
    counts = [sum(groups[g] for g in range(low + 1, high + 1)) for low, high in pairwise(last)]
    systems = list(zip(CRYSTAL_SYSTEMS, counts, strict=True))
    sizes = [(name, *_quantiles(statistics[name])) for name in ("sites", "atoms")]
    tables = [
        table("splits", ("split", "crystals"), about["splits"].items()),
        table("crystal systems", ("system", "crystals"), systems),
        table("space groups", ("number", "crystals"), ((str(g), n) for g, n in groups.most_common(10))),
        table("elements", ("symbol", "crystals"), ((SYMBOLS[z], n) for z, n in elements.most_common(10))),
        table("sizes", ("per crystal", "min", "median", "max"), sizes),
    ]
    console.print(Columns(tables))
    console.print(f"{len(elements)} elements, {len(groups)} space groups", highlight=False)
    known = ((name, len(v), *_quantiles(v)) for name, v in statistics["properties"].items())
    console.print(table("properties", ("name", "known", "min", "median", "max"), known))
    if about["text"]:
        console.print(f"text columns: {', '.join(about['text'])}", highlight=False)
    console.print(table("origin", ("attribute", "value"), ((k, str(v)) for k, v in about["attrs"].items())))


def _write_dropped(dropped: list[Dropped], path: Path) -> None:
    path.unlink(missing_ok=True)
    if dropped:
        write_csv(path, {name: [getattr(row, name) for row in dropped] for name in ("file", "row", "id", "reason")})


def _print_summary(imported: Imported, split: np.ndarray, output: Path, table: Path, console: Console) -> None:
    from rich.table import Table

    summary = Table(title="import", title_justify="left", title_style="bold")
    summary.add_column("structures")
    summary.add_column("count", justify="right")
    counts = np.bincount(split, minlength=len(storage.SPLITS))
    parts = ", ".join(f"{name} {counts[code]:,}" for name, code in storage.SPLITS.items())
    summary.add_row(f"kept ({parts})", f"{len(split):,}")
    for reason, count in imported.reasons().most_common():
        summary.add_row(f"dropped: {reason}", f"{count:,}")
    console.print(summary)
    console.print(f"written: {output}" + (f"; dropped rows: {table}" if imported.dropped else ""), highlight=False)


def _quantiles(values: np.ndarray) -> tuple[Any, Any, Any]:
    if not len(values):
        return "", "", ""
    lowest, median, highest = np.quantile(values, [0, 0.5, 1])
    return float(lowest), float(median), float(highest)

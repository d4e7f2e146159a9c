"""Datasets: import structure files into HDF5, fetch public ones, load them by name, look into them.

An import runs over the cores: this process reads files and writes the result, workers parse the structures and find
their symmetry. A structure that cannot be used is dropped with a reason and never stops the others.

File formats are in `readers.py`, the HDF5 schema in `storage.py`, downloads in `fetch.py`.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cfrl import __version__
from cfrl import config as settings
from cfrl.config import DataConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.symmetry import OddCellError, SymmetryError, analyse
from cfrl.errors import UserError
from cfrl.files import atomic_file, check_writable
from cfrl.io import fetch, readers, storage
from cfrl.io.guard import Guard, Lost
from cfrl.io.readers import Entry, Limits, Unusable
from cfrl.runs.interrupt import deaf_children

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from rich.console import Console

PROTOTYPES = "prototypes"
Analysed = tuple[list[np.ndarray], dict[int, str]]  # tensors of a CrystalBatch as arrays; row -> why it was dropped
MIN_DISTANCE = 0.5  # angstrom; below the shortest bond there is (H2, 0.74), so nothing real is lost
PUT_OFF = "put off"  # the reason of a row that is worked on later, where it can do no harm
_JOB = 64  # entries per job of a worker
_LONG = 500_000  # characters of an entry; so long ones are parsed with care
_PATIENCE = 60.0  # seconds for a job; it takes a tenth of one
_CHUNK = 4096  # crystals looked at at once
_INLINE = 256  # so few entries are not worth starting processes
_HDF5 = (".h5", ".hdf5")
_RESERVED = ("ids", "split")  # names that the schema uses itself
_UNKNOWN = ("", "None", "NA", "N/A", "null")  # NaN is a number of its own
_SYSTEMS = {
    "triclinic": (1, 2),
    "monoclinic": (3, 15),
    "orthorhombic": (16, 74),
    "tetragonal": (75, 142),
    "trigonal": (143, 167),
    "hexagonal": (168, 194),
    "cubic": (195, 230),
}


@dataclass
class Dropped:
    """A structure that was left out: where it stands, and why (`reason: detail`)."""

    file: str
    row: int
    id: str
    reason: str


@dataclass
class Imported:
    """What came out of files.

    crystals: the ones that can be used, in the order of the files.
    columns: name -> (n,) float64 (NaN = unknown) or list of strings.
    split: (n,) 0 = train, 1 = validation, 2 = test, -1 = not said by the source.
    dropped: the others.
    """

    crystals: CrystalBatch
    columns: dict[str, Any]
    split: np.ndarray
    dropped: list[Dropped] = field(default_factory=list)

    def reasons(self) -> Counter[str]:
        """How many were dropped for each reason, details left aside."""
        return Counter(row.reason.partition(":")[0] for row in self.dropped)


# ---- commands ----


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
        UserError: an input that cannot be read, an output that cannot be written, or nothing usable.
    """
    output = Path(output)
    check_writable(output, _HDF5)
    imported = read_files(inputs, config, splits, console)
    table = output.with_suffix(".dropped.csv")
    _write_dropped(imported.dropped, table)
    if not len(imported.crystals):
        most = imported.reasons().most_common(1)[0][0] if imported.dropped else "there is none"
        raise UserError(f"{inputs[0]}: no structure can be used (most often: {most}); see {table}")
    split = _fill_splits(imported, config)
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
    folder = fetch.cache_folder() / name
    paths = []
    for file in files:
        with _progress(console, f"download {Path(file.url).name}", download=True) as advance:
            path, note = fetch.download(file, folder, advance)
        if console:
            console.print(f"{path.name}: {note}", style="dim", highlight=False)
        paths.append(path)
    prepared = _prepared(name)
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
    systems = [(name, sum(groups[g] for g in range(low, high + 1))) for name, (low, high) in _SYSTEMS.items()]
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


# ---- loading ----


def load_dataset(name: str | Path, split: str | None = None) -> CrystalBatch:
    """Crystals of a dataset with ids and properties.

    Args:
        name: "prototypes" (pymatgen's, always there), a fetched name, an `.h5` file, or any structure file or folder.
        split: only "train", "validation" or "test".

    Raises:
        UserError: no such dataset, or one that cannot be read.
    """
    if _is_dataset(name):
        return storage.read_crystals(dataset_path(name), split)
    config = replace(settings.resolve(DataConfig), workers=1)  # a caller's script need not be importable
    imported = read_files([str(name)], config)
    if not len(imported.crystals):
        raise UserError(f"{name}: no structure can be used ({imported.dropped[0].reason})")
    numbers = {k: torch.from_numpy(v) for k, v in imported.columns.items() if isinstance(v, np.ndarray)}
    crystals = replace(imported.crystals, properties=numbers)
    if split is None:
        return crystals
    return crystals[_fill_splits(imported, config) == storage.split_code(split)]


def dataset_path(name: str | Path) -> Path:
    """The HDF5 file of a dataset: "prototypes", a fetched name, or the path of an `.h5` file itself.

    Raises:
        UserError: there is none; a structure file has to be imported first.
    """
    path = Path(name)
    if str(name) == PROTOTYPES and not path.exists():
        return _prototypes()
    if path.suffix in _HDF5:
        return path
    if path.exists():
        raise UserError(f"{name}: is not a dataset yet; make one of it: cfrl data import {name} -o {path.stem}.h5")
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"{name}: no such file")
    fetch.source_files(str(name), settings.resolve(DataConfig).sources)
    prepared = _prepared(str(name))
    if not prepared.exists():
        raise UserError(f"the dataset '{name}' is not on this machine; get it with: cfrl data fetch {name}")
    return prepared


def read_structures(name: str | Path) -> tuple[list[Structure], list[str], dict[str, Any], list[Dropped]]:
    """Structures of any input, as they stand there: symmetry is neither looked for nor needed.

    Args:
        name: whatever `load_dataset` takes.

    Returns:
        structures, ids, columns (name -> (n,) float64 or list of strings), and what could not be used.

    Raises:
        UserError: an input that cannot be read.
    """
    if _is_dataset(name):
        path = dataset_path(name)
        crystals, columns = storage.read_crystals(path), storage.read_columns(path)
        ids = crystals.ids or [str(i) for i in range(len(crystals))]
        columns = {k: v.tolist() if v.dtype == object else v for k, v in columns.items() if k not in _RESERVED}
        return crystals.to_structures(), ids, columns, []
    structures, kept, dropped = [], [], []
    config = settings.resolve(DataConfig)
    for path, strict in _files(name):
        for _, entry in readers.iter_entries(path, strict, Limits(config.max_file_gb, config.max_ratio)):
            try:
                structures.append(readers.to_structure(readers.parse(entry.kind, entry.payload)))
                kept.append(replace(entry, payload=None))
            except Unusable as error:
                dropped.append(Dropped(entry.file, entry.row, entry.id, str(error)))
    return structures, [_name(entry) for entry in kept], _columns([entry.values for entry in kept]), dropped


def summarise(path: Path) -> dict[str, Any]:
    """Counts of `space_groups` and of `elements` (crystals holding them), `sites` and `atoms` per crystal (n,),
    and the known values of each of `properties`. Reads in chunks."""
    groups, elements = Counter(), Counter()
    sites, atoms = [], []
    for crystals in storage.iter_crystals(path):
        groups.update(crystals.space_group.tolist())
        present = np.zeros((len(crystals), len(SYMBOLS)), dtype=bool)
        np.put_along_axis(present, crystals.species.numpy(), True, axis=1)
        elements.update({z: int(n) for z, n in enumerate(present.sum(0)) if z and n})
        sites.append(crystals.num_sites.numpy())
        atoms.append(crystals.num_atoms.numpy())
    names = storage.describe(path)["properties"]
    columns = storage.read_columns(path, names) if names else {}
    return {
        "space_groups": groups,
        "elements": elements,
        "sites": np.concatenate(sites) if sites else np.zeros(0, int),
        "atoms": np.concatenate(atoms) if atoms else np.zeros(0, int),
        "properties": {name: values[~np.isnan(values)] for name, values in columns.items()},
    }


# ---- from files to crystals ----


def read_files(
    inputs: Sequence[str], config: DataConfig, splits: Sequence[str] = (), console: Console | None = None
) -> Imported:
    """Crystals of structure files, folders and zips, over as many processes as `config.workers` says.

    Those of `.h5` files of ours come first.

    Raises:
        UserError: an input that cannot be read.
    """
    parts = [_stored(name, config) for name in inputs if _is_dataset(name)]
    named = itertools.zip_longest(inputs, splits, fillvalue="")
    files = [
        (*file, storage.SPLITS.get(split, -1))
        for name, split in named
        if not _is_dataset(name)
        for file in _files(name)
    ]
    batches, kept, dropped = [], [], []
    with _progress(console, "import") as advance:
        work = partial(_analyse, symprec=config.symprec, max_sites=config.max_sites, max_atoms=config.max_atoms)
        limits = Limits(config.max_file_gb, config.max_ratio)
        with closing(_map(work, _entries(files, limits, advance), config.workers)) as jobs:
            for entries, (arrays, reasons) in jobs:
                batches.append(CrystalBatch(*map(torch.from_numpy, arrays)))
                for row, entry in enumerate(entries):
                    entry.payload = None  # the text is not needed any more
                    if row in reasons:
                        dropped.append(Dropped(entry.file, entry.row, entry.id, reasons[row]))
                    else:
                        kept.append(entry)
    crystals = replace(CrystalBatch.cat(batches), ids=[_name(entry) for entry in kept])
    split = np.array([entry.split for entry in kept], dtype=np.int64)
    return _join([*parts, Imported(crystals, _columns([entry.values for entry in kept]), split, dropped)])


def assign_splits(crystals: CrystalBatch, config: DataConfig) -> np.ndarray:
    """0 = train, 1 = validation, 2 = test, (n,): the same for the same crystals and `config.seed`.

    By "row", that many crystals are drawn. By "formula", reduced formulas are drawn instead: no formula is in two
    splits, whichever other crystals there are, and the fractions hold on average.

    Raises:
        UserError: fractions that leave nothing for training.
    """
    n, validation, test = len(crystals), config.validation, config.test
    if validation + test >= 1:
        raise UserError(f"validation = {validation} and test = {test}: must be fractions that leave some for training")
    if config.split_by == "row":
        place = np.random.default_rng(config.seed).permutation(n) + 0.5
        place = place / max(n, 1)
    else:
        place = np.array([_uniform(f"{config.seed}:{formula}") for formula in crystals.formulas()])
    return np.select([place < validation, place < validation + test], [1, 2], 0)


def _entries(files: list[tuple[Path, bool, int]], limits: Limits, advance: Callable[..., None]) -> Iterator[Entry]:
    total, before, count = sum(path.stat().st_size for path, _, _ in files), 0, 0
    for path, strict, split in files:
        for done, entry in readers.iter_entries(path, strict, limits):
            entry.split = split
            count += 1
            advance(before + done, total, f"{count:,} structures")
            yield entry
        before += path.stat().st_size


def _files(name: str | Path) -> list[tuple[Path, bool]]:
    """Files of an input; what a folder holds may be broken, what the user names may not."""
    return [(path, not Path(name).is_dir()) for path in readers.input_files(name)]


def _analyse(
    payloads: list[tuple[str, Any]], symprec: float, max_sites: int, max_atoms: int, guarded: bool = False
) -> Analysed:
    """The crystals of entries given as (kind, payload), and for the other rows the reason why there is none.

    What a process may hang or die on is put off, unless this is a process that may (`guarded`).
    """
    units, rows, reasons = [], [], {}
    for row, (kind, payload) in enumerate(payloads):
        if isinstance(payload, str) and len(payload) > _LONG and not guarded:
            reasons[row] = PUT_OFF
            continue
        try:
            units.append(analyse(*readers.parse(kind, payload), symprec, max_sites, guarded))
            rows.append(row)
        except OddCellError:
            reasons[row] = PUT_OFF
        except (Unusable, SymmetryError) as error:
            reasons[row] = str(error)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic inside moyo is no Exception, and must cost one row only
            reasons[row] = f"symmetry not found: {type(error).__name__}: {error}"
    off: dict[int, str] = {}
    crystals = CrystalBatch.from_units(units, dropped=off)
    reasons |= {rows[i]: reason for i, reason in off.items()}
    rows = [row for i, row in enumerate(rows) if i not in off]
    valid, atoms = crystals.valid(MIN_DISTANCE), crystals.num_atoms
    small = atoms <= (max_atoms or torch.inf)
    for i in (~(valid & small)).nonzero()[:, 0].tolist():
        distance = crystals[i].shortest_distances().item()
        large = f"too many atoms: {atoms[i]} in the conventional cell, at most {max_atoms} fit"
        reasons[rows[i]] = f"atoms too close: {distance:.3f} angstrom" if small[i] else large
    crystals = crystals[valid & small]
    return _arrays(crystals), reasons


def _map(work: Callable, entries: Iterator[Entry], workers: int) -> Iterator[tuple[list[Entry], Analysed]]:
    """Jobs of entries with their results, in order; few entries are done in this process.

    What a process could hang or die on is done in one that may, entry by entry.
    """
    with Guard(partial(work, guarded=True)) as guard:
        for job, analysed in _unguarded(work, entries, workers or _cores()):
            yield job, _complete(job, analysed, guard)


def _unguarded(work: Callable, entries: Iterator[Entry], workers: int) -> Iterator[tuple[list[Entry], Analysed]]:
    jobs = iter(lambda: list(itertools.islice(entries, _JOB)), [])
    first = list(itertools.islice(jobs, _INLINE // _JOB))
    jobs = itertools.chain(first, jobs)
    if workers == 1 or len(first) < _INLINE // _JOB:
        for job in jobs:
            yield job, work(_payloads(job))
        return
    pool, waiting = _new_pool(workers), deque()
    try:
        for job in itertools.chain(jobs, [None]):
            if job:
                waiting.append((job, _submit(pool, work, job)))
            while len(waiting) > (4 * workers if job else 0):
                try:
                    result = waiting[0][1].result(_PATIENCE)
                except (BrokenProcessPool, TimeoutError):  # which job it was is unknown: all are done with care
                    _end(pool, kill=True)
                    pool = _new_pool(workers)
                    while waiting:
                        lost, future = waiting.popleft()
                        yield lost, _result_or_nothing(future, len(lost))
                else:
                    yield waiting.popleft()[0], result
    finally:
        _end(pool, kill=bool(waiting))


def _submit(pool: ProcessPoolExecutor, work: Callable, job: list[Entry]) -> Future:
    try:
        with deaf_children():  # it starts workers as it needs them
            return pool.submit(work, _payloads(job))
    except BrokenProcessPool as error:
        failed: Future = Future()
        failed.set_exception(error)
        return failed


def _result_or_nothing(future: Future, rows: int) -> Analysed:
    if future.done() and not future.cancelled() and future.exception() is None:
        return future.result()
    return _arrays(CrystalBatch.empty()), dict.fromkeys(range(rows), PUT_OFF)


def _payloads(job: list[Entry]) -> list[tuple[str, Any]]:
    return [(entry.kind, entry.payload) for entry in job]


def _complete(job: list[Entry], analysed: Analysed, guard: Guard) -> Analysed:
    """With the entries that were put off."""
    arrays, reasons = analysed
    late = [row for row, reason in reasons.items() if reason == PUT_OFF]
    if not late:
        return analysed
    rows = [row for row in range(len(job)) if row not in reasons]
    parts = [CrystalBatch(*map(torch.from_numpy, arrays))]
    for row in late:
        del reasons[row]
        try:
            found, why = guard(_payloads([job[row]]))
        except (Lost, RuntimeError) as error:
            found, why = None, {0: f"symmetry not found: {error}"}
        if why:
            reasons[row] = why[0]
        else:
            rows.append(row)
            parts.append(CrystalBatch(*map(torch.from_numpy, found)))
    return _arrays(CrystalBatch.cat(parts)[np.argsort(rows)]), reasons


def _arrays(crystals: CrystalBatch) -> list[np.ndarray]:
    """Between processes, arrays are lighter than tensors."""
    tensors = (crystals.space_group, crystals.wyckoff, crystals.species, crystals.frac_coords, crystals.lattice)
    return [tensor.numpy() for tensor in tensors]


def _new_pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, _context(), initializer=_start_worker)


def _end(pool: ProcessPoolExecutor, kill: bool) -> None:
    for process in list((pool._processes or {}).values()) if kill else ():  # the executor would wait for one that hangs
        process.kill()
    if kill and pool._call_queue is not None:  # before Python 3.11.5 the executor waits for what nobody reads any more
        pool._call_queue._reader.close()
    pool.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _context() -> multiprocessing.context.BaseContext:
    """Never plain fork: torch and HDF5 may hold threads here. The fork server imports once for all workers."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfrl.io.datasets", "moyopy"])
    return context


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed import must not leave workers that wait forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _name(entry: Entry) -> str:
    return entry.id or f"{Path(entry.file).name.partition('.')[0]}-{entry.row}"


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Values by name: float64 (NaN = unknown) where all of them are numbers, else strings."""
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name, "") for row in rows]
        name = f"{name}_" if name in _RESERVED else name
        try:
            columns[name] = _measured(np.array([math.nan if v in _UNKNOWN else float(v) for v in values]))
        except ValueError:
            columns[name] = [str(v) for v in values]
    return columns


def _measured(values: np.ndarray) -> np.ndarray:
    """Nobody has measured infinity: it is unknown."""
    return np.where(np.isinf(values), math.nan, values)


def _stored(name: str, config: DataConfig) -> Imported:
    """What one of our files holds, within the limits."""
    path = dataset_path(name)
    crystals, columns, faults = storage.read_rows(path)
    split = columns.pop("split").astype(np.int64)
    columns.pop("ids", None)
    crystals.properties = {}
    if crystals.ids is None:
        crystals.ids = [f"{path.stem}-{i}" for i in range(1, len(crystals) + 1)]
    reasons = {row: f"damaged: {reason}" for row, reason in faults.items()}
    sound = torch.tensor([row for row in range(len(crystals)) if row not in faults], dtype=torch.long)
    for rows in sound.split(_CHUNK):
        some = crystals[rows]
        for what, counts, limit in (
            ("sites", some.num_sites, config.max_sites),
            ("atoms", some.num_atoms, config.max_atoms),
        ):
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                if limit and count > limit:
                    reasons.setdefault(row, f"too many {what}: {count}, at most {limit} fit")
        for row in rows[~some.valid(MIN_DISTANCE)].tolist():
            reasons.setdefault(row, "not possible: its cell has no volume, or its atoms are too close")
    fits = np.array([row not in reasons for row in range(len(crystals))], dtype=bool)
    dropped = [Dropped(str(path), row + 1, crystals.ids[row], reason) for row, reason in sorted(reasons.items())]
    columns = {k: v[fits].tolist() if v.dtype == object else _measured(v[fits]) for k, v in columns.items()}
    # A file may be older than today's canonical descriptions.
    return Imported(crystals[fits].canonical(), columns, split[fits], dropped)


def _join(parts: list[Imported]) -> Imported:
    """One after the other; a column that a part lacks is unknown there."""
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part.columns):
        pieces = [part.columns.get(name) for part in parts]
        if any(isinstance(piece, list) for piece in pieces):
            texts = (
                piece if piece is not None else [""] * len(p.split) for p, piece in zip(parts, pieces, strict=True)
            )
            columns[name] = [str(value) for text in texts for value in text]
        else:
            unknown = (np.full(len(part.split), math.nan) for part in parts)
            columns[name] = np.concatenate([u if v is None else v for u, v in zip(unknown, pieces, strict=True)])
    return Imported(
        CrystalBatch.cat([part.crystals for part in parts]),
        columns,
        np.concatenate([part.split for part in parts]),
        [row for part in parts for row in part.dropped],
    )


def _fill_splits(imported: Imported, config: DataConfig) -> np.ndarray:
    return np.where(imported.split < 0, assign_splits(imported.crystals, config), imported.split)


def _uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56


# ---- where datasets are ----


def _is_dataset(name: str | Path) -> bool:
    return Path(name).suffix in _HDF5 or not Path(name).exists()


def _prepared(name: str) -> Path:
    return fetch.cache_folder() / f"{name}.h5"


def _prototypes() -> Path:
    """pymatgen's AFLOW prototypes as a dataset in the cache folder, made at the first call."""
    path = _prepared(f"{PROTOTYPES}-{__version__}")
    if path.exists():
        try:
            storage.describe(path)
            return path
        except UserError:  # damaged, or of an older schema: made again below
            pass
    from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

    structures = [prototype["snl"].structure for prototype in AFLOW_PROTOTYPE_LIBRARY]
    ids = _unique([prototype["tags"]["aflow"] for prototype in AFLOW_PROTOTYPE_LIBRARY])
    dropped: dict[int, str] = {}
    crystals = CrystalBatch.from_structures(structures, ids=ids, errors="skip", dropped=dropped)
    tags = [prototype["tags"] for i, prototype in enumerate(AFLOW_PROTOTYPE_LIBRARY) if i not in dropped]
    columns = {name: [str(tag[name]) for tag in tags] for name in ("mineral", "pearson", "strukturbericht")}
    split = assign_splits(crystals, DataConfig())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_crystals(
            path, crystals, columns=columns, split=split, attrs={"source": "pymatgen, AFLOW prototypes"}
        )
    except (OSError, UserError) as error:
        raise UserError(f"{path}: cannot be written; set CFRL_CACHE to a folder of yours") from error
    return path


def _unique(names: list[str]) -> list[str]:
    """Names told apart: A, B, A -> A, B, A-2."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name}-{seen[name]}" if seen[name] > 1 else name)
    return unique


# ---- output ----


def _write_dropped(dropped: list[Dropped], path: Path) -> None:
    path.unlink(missing_ok=True)
    if dropped:
        with atomic_file(path) as temp, temp.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "row", "id", "reason"])
            writer.writerows([row.file, row.row, row.id, row.reason] for row in dropped)


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


@contextmanager
def _progress(console: Console | None, label: str, download: bool = False) -> Iterator[Callable[..., None]]:
    """A bar with the time left on the console's terminal; gives `advance(done, total, note="")`, in bytes."""
    if console is None:
        yield lambda done, total, note="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    amount = [DownloadColumn(), TransferSpeedColumn()] if download else [TextColumn("{task.fields[note]}")]
    percent = TextColumn("{task.percentage:>3.0f}%")
    stderr = Console(stderr=True)
    with Progress(TextColumn(label), BarColumn(), percent, *amount, TimeRemainingColumn(), console=stderr) as progress:
        task = progress.add_task(label, total=None, note="")
        yield lambda done, total, note="": progress.update(task, completed=done, total=total or None, note=note)

"""Structure files to crystals, over the cores: this process reads, workers parse structures and find their symmetry.

A structure that cannot be used is dropped with a reason and never stops the others.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cfrl.crystals.analysis import OddCellError, analyse
from cfrl.crystals.conversion import from_units
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.symmetry import SymmetryError
from cfrl.io import readers, storage
from cfrl.io.catalogue import dataset_path, is_dataset
from cfrl.io.formats.entry import Entry, Payload, Unusable
from cfrl.io.guard import Guard, Lost
from cfrl.io.options import ImportOptions
from cfrl.io.readers import Limits
from cfrl.io.splits import assign_splits
from cfrl.runs.engine import count_workers, make_engine
from cfrl.runs.options import EngineOptions
from cfrl.runs.progress import Advance, no_progress

Columns = dict[str, np.ndarray | list[str]]  # (n,) float64 (NaN = unknown), or n strings
Analysed = tuple[list[np.ndarray], dict[int, str]]  # tensors of a CrystalBatch as arrays; row -> why it was dropped
MIN_DISTANCE = 0.5  # angstrom; below the shortest bond there is (H2, 0.74), so nothing real is lost
PUT_OFF = "put off"  # the reason of a row that is worked on later, where it can do no harm
_JOB = 64  # entries per job of a worker
_LONG = 500_000  # characters of an entry; so long ones are parsed with care
_PATIENCE = 60.0  # seconds for a job; it takes a tenth of one
_CHUNK = 4096  # crystals looked at at once
_INLINE = 256  # so few entries are not worth starting processes
_RESERVED = ("ids", "split")  # names that the schema uses itself
_UNKNOWN = ("", "None", "NA", "N/A", "null")  # NaN is a number of its own


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
    columns: Columns
    split: np.ndarray
    dropped: list[Dropped] = field(default_factory=list)

    def splits(self, options: ImportOptions) -> np.ndarray:
        """`split`, filled in where the source does not say."""
        made = assign_splits(self.crystals, options.validation, options.test, options.split_by, options.seed)
        return np.where(self.split < 0, made, self.split)

    def reasons(self) -> Counter[str]:
        """How many were dropped for each reason, details left aside."""
        return Counter(row.reason.partition(":")[0] for row in self.dropped)


def read_files(
    inputs: Sequence[str], options: ImportOptions, splits: Sequence[str] = (), advance: Advance = no_progress
) -> Imported:
    """Crystals of structure files, folders and zips, over the workers that `options` name.

    Those of `.h5` files of ours come first.

    Args:
        inputs: names or paths.
        options: symmetry, limits.
        splits: one of `storage.SPLITS` (or "") per input, where the source has its own.
        advance: told how many bytes are read, of how many.

    Raises:
        UserError: an input that cannot be read.
    """
    parts = [_stored(name, options) for name in inputs if is_dataset(name)]
    named = itertools.zip_longest(inputs, splits, fillvalue="")
    files = [
        (*file, storage.SPLITS.get(split, -1)) for name, split in named if not is_dataset(name) for file in _files(name)
    ]
    batches, kept, dropped = [], [], []
    work = partial(_analyse, symprec=options.symprec, max_sites=options.max_sites, max_atoms=options.max_atoms)
    limits = Limits(options.max_file_gb, options.max_ratio)
    with closing(_map(work, _entries(files, limits, advance), options)) as jobs:
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
    payloads: list[tuple[str, Payload]], symprec: float, max_sites: int, max_atoms: int, guarded: bool = False
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
    crystals = from_units(units, dropped=off)
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


def _map(work: Callable, entries: Iterator[Entry], options: EngineOptions) -> Iterator[tuple[list[Entry], Analysed]]:
    """Jobs of entries with their results, in order; few entries are done in this process.

    What a process could hang or die on is done in one that may, entry by entry.
    """
    with Guard(partial(work, guarded=True)) as guard:
        for job, analysed in _unguarded(work, entries, options):
            yield job, _complete(job, analysed, guard)


def _unguarded(
    work: Callable, entries: Iterator[Entry], options: EngineOptions
) -> Iterator[tuple[list[Entry], Analysed]]:
    jobs = iter(lambda: list(itertools.islice(entries, _JOB)), [])
    first = list(itertools.islice(jobs, _INLINE // _JOB))
    jobs = itertools.chain(first, jobs)
    alone = options.engine == "local" and count_workers(options.workers) == 1
    if alone or len(first) < _INLINE // _JOB:
        for job in jobs:
            yield job, work(_payloads(job))
        return
    begun: list[list[Entry]] = []  # jobs in their order; those that were yielded are emptied
    done: dict[int, Analysed] = {}
    chunks = ([_payloads(job)] for job in jobs if begun.append(job) is None)
    with (
        make_engine(options, patience=_PATIENCE, attempts=1) as engine,
        closing(engine.map(partial(_each, work), chunks)) as results,
    ):
        place = 0
        for index, [analysed] in results:
            done[index] = analysed or _nothing(len(begun[index]))  # it hung or died: all is done with care
            while place in done:
                yield begun[place], done.pop(place)
                begun[place], place = [], place + 1


def _each(work: Callable, jobs: list[list[tuple[str, Payload]]]) -> list[Analysed]:
    return [work(job) for job in jobs]


def _nothing(rows: int) -> Analysed:
    return _arrays(CrystalBatch.empty()), dict.fromkeys(range(rows), PUT_OFF)


def _payloads(job: list[Entry]) -> list[tuple[str, Payload]]:
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


def _name(entry: Entry) -> str:
    return entry.id or f"{Path(entry.file).name.partition('.')[0]}-{entry.row}"


def _columns(rows: list[dict[str, float | str]]) -> Columns:
    """Values by name: float64 (NaN = unknown) where all of them are numbers, else strings."""
    columns: Columns = {}
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


def _stored(name: str, options: ImportOptions) -> Imported:
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
            ("sites", some.num_sites, options.max_sites),
            ("atoms", some.num_atoms, options.max_atoms),
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
    columns: Columns = {}
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

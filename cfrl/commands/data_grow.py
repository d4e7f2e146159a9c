"""`cfrl data grow`: a dataset made larger by crystals of the program's own.

Candidates are drawn from a model, or made of known crystals by exchanging elements; relaxed and judged, those near the
hull are added to the output. Work goes in lots, which workers do on their own (`screening/candidates.py`), and a block
of lots at a time is judged, in the order of their numbers, and written (`screening/growth.py`): what comes out depends
on settings and seed, not on the workers.

    runs/<date>-<time>-grow-<output>/
        metrics.csv        one row per lot: candidates, how many met what, kept ones by kind
        checkpoint.pt      up to which lot all is written, and the counts that the balance goes by
        lots/              what workers have done of the present block

A kill at any moment costs what the workers were at. A block is written in three steps, output, metrics, checkpoint, of
which each can be done again: crystals have names that tell their lot, and those that are there are not added twice.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.config import GrowConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.kinds import CLASSES, kinds
from cfrl.crystals.substitution import substitution_table
from cfrl.errors import UserError
from cfrl.files import check_writable, locked
from cfrl.io.catalogue import HDF5, STRUCTURE_TYPES
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import append_crystals, read_columns, read_crystals, replace_property
from cfrl.model.files import load_model, model_path
from cfrl.model.wishes import sampler_options
from cfrl.potentials import energy_scale, full_name, model_name
from cfrl.runs.devices import choose_device
from cfrl.runs.engine import make_engine
from cfrl.runs.folder import RunFolder
from cfrl.runs.journal import Record, Work
from cfrl.screening.candidates import SOURCES, load_prototypes, run_lots, source_of, wishes_for
from cfrl.screening.growth import Growth, Tallies
from cfrl.stability.flags import check_flags
from cfrl.stability.hull import ReferenceHull
from cfrl.stability.scales import check_scale

if TYPE_CHECKING:
    from rich.console import Console

# What a candidate can meet, in the order in which it is asked.
REASONS = (
    *("balance", "known", "element", "noble_gas", "not_neutral", "radioactive", "copy", "overlap", "relaxed"),
    *("failed", "given_up", "not_converged", "overlap_relaxed", "exploded", "symmetry"),
    *("no_hull", "far_below_hull", "sparse_reference", "above_hull", "copy_relaxed", "duplicate", "lost", "kept"),
)
COLUMNS = ("energy_per_atom", "e_above_hull", "e_above_reference", "round", "lot", "source", "parent", "judge", "model")


def grow(
    output: str | None,
    config: GrowConfig,
    resume: Path | None = None,
    console: Console | None = None,
    root: str | Path = "runs",
) -> RunFolder:
    """Add crystals to a dataset; returns the run folder.

    Args:
        output: the `.h5` file, made where there is none. When resuming, None: the run's own.
        config: the settings.
        resume: go on with this run folder.
        console: for progress and results; None: silent.
        root: where a new run folder is made.

    Raises:
        UserError: a model, dataset, hull or setting that cannot be used, an output that cannot be written, or guards
            that leave nothing.
        KeyboardInterrupt: after Ctrl-C; what is done is kept.
    """
    run = RunFolder.open(resume) if resume else None
    output = output or (run.source if run else None)
    if not output:
        raise UserError("name the dataset to grow, -o FILE.h5, or a run to go on with: --resume last")
    path = Path(output)
    check_writable(path, HDF5)
    allowed = check_flags(config.allow or "")
    config = replace(config, model=str(model_path(config.model)), potential=full_name(config.potential))
    sampler_options(wishes_for(config), load_model(config.model).config.max_sites - 1)  # they can be met
    reference = ReferenceHull.load(config.hull)
    check_scale(config.potential, reference)
    prototypes = (config.prototypes,) if config.prototypes else tuple(config.known or [STRUCTURE_TYPES])
    known = CrystalBatch.cat(load_dataset(name) for name in config.known) if config.known else None
    real = known if known is not None else load_dataset(STRUCTURE_TYPES)
    for name in (*config.known, *prototypes):
        if not len(load_prototypes((name,), config.max_atoms)):
            raise UserError(
                f"{name}: holds no crystal of at most {config.max_atoms or 'any number of'} atoms and 20 sites"
            )
    # two runs that grow one file would each lose what the other adds
    with locked(path.with_name(f".{path.name}.lock"), f"{path}: another run is growing this file"):
        grown, before = _grown(path, _judge(config))
        if run is None:
            config = replace(config, round=config.round or before + 1)
            _refuse_taken(path, grown, config.round)
            run = RunFolder.create("grow", path.stem, config, root, source=str(path))
        with run.locked():
            if resume:
                run.write_config("grow", config)
            _Grower(run, path, config, console).grow(reference, known, real, grown, allowed, prototypes)
    return run


class _Grower:
    """One run: what is written where, and in which order."""

    def __init__(self, run: RunFolder, output: Path, config: GrowConfig, console: Console | None) -> None:
        self.run, self.output, self.config, self.console = run, output, config, console
        state = run.load_checkpoint() or {"lot": 0, "seconds": 0.0}
        self.lot, self.seconds = int(state["lot"]), float(state["seconds"])  # judged and written
        self.tallies = Tallies.of_state(state) if self.lot else Tallies()

    def grow(
        self,
        reference: ReferenceHull,
        known: CrystalBatch | None,
        real: CrystalBatch,
        grown: CrystalBatch,
        allowed: list[str],
        prototypes: tuple[str, ...],
    ) -> None:
        config = self.config
        lots = np.array([_lot_of(name, config.round) for name in grown.ids or []], dtype=np.int64)
        self.kept = int(((lots > 0) & (lots <= self.lot)).sum())
        grown = grown[lots <= self.lot] if len(grown) else grown  # later ones come again
        growth = Growth(config, reference, known, real, grown, allowed)
        growth.tallies = self.tallies
        table = substitution_table() if config.substitute > 0 else np.zeros((0, 0))
        try:
            with make_engine(config, choose_device(config.device).type) as engine:
                while self.kept < config.n and not self._late():
                    began = time.monotonic()
                    plan = growth.plan(config.model, prototypes, table, config.hull, config.round)
                    work = Work(self.run.path / "lots", engine, f"{config.round}", self.console)
                    numbers = range(self.lot + 1, self.lot + config.lots + 1)
                    records = work.run(
                        f"lots-{numbers[0]}",
                        partial(run_lots, plan=plan),
                        {number: number for number in numbers},
                        _what_counts(config),
                        chunk=1,
                    )
                    self._write(growth, records, began)
        except KeyboardInterrupt:
            self._say(f"Stopped; what is done is kept. Go on with: cfrl data grow --resume {self.run.path}")
            raise
        self._finish(growth)

    def _late(self) -> bool:
        limit = self.config.time_limit
        return limit is not None and self.seconds > 60 * limit

    def _write(self, growth: Growth, records: dict[int, Record], began: float) -> None:
        """Judge a block of lots and write it: output, metrics, checkpoint; any of it may have been done before."""
        parts, rows, total = [], [], Counter()
        for number, record in records.items():
            if "counts" not in record:  # its worker died on it
                record = {"source": source_of(number, self.config.substitute)}
                crystals, columns, counts = CrystalBatch.empty(), {}, Counter(lost=1)
            else:
                crystals, columns, counts = growth.take(record)
            total += counts
            rows.append((number, _metrics(record["source"], counts, crystals)))
            if len(crystals):
                parts.append(self._named(number, crystals, columns))
        if not total["relaxed"]:
            asked = total.pop("candidates", 0)
            met = ", ".join(f"{name} {count:,}" for name, count in total.most_common(3))
            raise UserError(f"of {asked:,} candidates none came as far as a relaxation ({met})")
        self._append(parts)
        self.run.truncate(self.lot)
        for number, metrics in rows:
            self.run.log(number, metrics)
        self.lot, self.kept = max(records), self.kept + total["kept"]
        seconds = time.monotonic() - began
        self.seconds += seconds
        self.run.save_checkpoint({"lot": self.lot, "seconds": self.seconds, **growth.tallies.state()})
        shutil.rmtree(self.run.path / "lots")
        kept, relaxed = total["kept"], total["relaxed"]
        self._say(
            f"lot {self.lot}: {total['candidates']:,} candidates, {relaxed:,} relaxed, {kept:,} kept "
            f"({kept / relaxed:.0%}, {3600 * kept / seconds:,.0f} an hour); {self.kept:,} in all"
        )

    def _named(self, number: int, crystals: CrystalBatch, columns: dict[str, Any]) -> tuple[CrystalBatch, dict]:
        n, config = len(crystals), self.config
        told = {"round": config.round, "lot": number}
        texts = {"judge": _judge(config), "model": _model_name(Path(config.model))}
        columns |= {name: np.full(n, float(value)) for name, value in told.items()}
        columns |= {name: np.full(n, value, dtype=object) for name, value in texts.items()}
        return replace(crystals, ids=[f"{_prefix(config.round)}{number}-{i}" for i in range(n)]), columns

    def _append(self, parts: list[tuple[CrystalBatch, dict[str, np.ndarray]]]) -> None:
        if not parts:
            return
        crystals = CrystalBatch.cat(part for part, _ in parts)
        columns = {name: np.concatenate([of[name] for _, of in parts]) for name in parts[0][1]}
        there = set(read_columns(self.output, ["ids"])["ids"]) if self.output.exists() else set()
        new = [row for row, name in enumerate(crystals.ids) if name not in there]
        if new:
            attrs = {"source": "cfrl data grow", "seed": self.config.seed, "hull": self.config.hull or "embedded"}
            columns = {name: values[new] for name, values in columns.items()}
            append_crystals(self.output, crystals[new], columns=columns, attrs=attrs)

    def _finish(self, growth: Growth) -> None:
        """Earlier finds against the hull that later ones have lowered."""
        if self.kept:
            crystals = read_crystals(self.output)
            energy = crystals.properties["energy_per_atom"].numpy()
            above = growth.hull.e_above_hull(crystals, energy).e_above_hull
            judged = np.isfinite(crystals.properties["e_above_reference"].numpy())
            replace_property(self.output, "e_above_hull", np.where(judged, above, crystals.properties["e_above_hull"]))
            risen = int((above[judged] > self.config.within).sum())
            self._say(
                f"{self.output}: {len(crystals):,} crystals; {risen:,} of them lie more than {self.config.within:g} "
                "eV/atom above the hull by now, which later finds have lowered (e_above_hull tells which)"
            )
            self._show_kinds(crystals)
        self.run.finish()
        self._say(f"Wrote {self.output if self.kept else 'nothing'}; {self.run.path}/metrics.csv tells of each lot")

    def _show_kinds(self, crystals: CrystalBatch) -> None:
        for name, labels in kinds(crystals).items():
            share = np.bincount(labels, minlength=len(CLASSES[name])) / len(labels)
            self._say(", ".join(f"{kind} {part:.0%}" for kind, part in zip(CLASSES[name], share, strict=True)))

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)


def _metrics(source: str, counts: Counter[str], crystals: CrystalBatch) -> dict[str, float]:
    """A row of metrics.csv."""
    row = {"substitution": float(source == SOURCES[1]), "candidates": counts["candidates"]}
    row |= {name: counts[name] for name in REASONS}
    for name, labels in kinds(crystals).items():
        found = np.bincount(labels, minlength=len(CLASSES[name]))
        row |= {f"kept/{kind}": int(n) for kind, n in zip(CLASSES[name], found, strict=True)}
    return row


def _what_counts(config: GrowConfig) -> dict[str, Any]:
    """The settings that the work of a lot depends on: with others, what is done of the present block is done again."""
    free = ("n", "time_limit", "lots", "workers", "engine", "address", "device")
    return {name: value for name, value in config.plain().items() if name not in free}


def _judge(config: GrowConfig) -> str:
    """The potential and the scale of its energies, such as chgnet-0.3.0@mp2020."""
    return f"{model_name(config.potential)}@{energy_scale(config.potential)[1]}"


def _grown(path: Path, judge: str) -> tuple[CrystalBatch, int]:
    """The crystals that the output holds, and the last round that it tells of."""
    if not path.exists():
        return CrystalBatch.empty(), 0
    crystals, columns = read_crystals(path), read_columns(path)
    if not set(COLUMNS) <= set(columns):
        raise UserError(f"{path}: is a dataset, but not one that was grown; name another output")
    others = set(columns["judge"]) - {judge, ""}
    if others:
        raise UserError(
            f"{path}: was judged by {', '.join(sorted(others))}; energies of {judge} cannot compete with those"
        )
    return crystals, int(np.nanmax(columns["round"], initial=0))


def _model_name(path: Path) -> str:
    """Of a run folder its own name: all their files are called alike."""
    return path.parent.name if path.name == "model.safetensors" else path.stem


def _prefix(number: int) -> str:
    return f"grown-{number}-"


def _lot_of(name: str, number: int) -> int:
    """The lot of a crystal of this round, by its name; 0: it is of another one."""
    match = re.fullmatch(re.escape(_prefix(number)) + r"(\d+)-\d+", name)
    return int(match[1]) if match else 0


def _refuse_taken(path: Path, grown: CrystalBatch, number: int) -> None:
    if any(_lot_of(name, number) for name in grown.ids or []):
        raise UserError(f"{path}: holds crystals of round {number} already; go on with that run (--resume), or --round")

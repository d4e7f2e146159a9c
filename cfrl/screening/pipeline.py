"""From crystals to a table: validity, duplicates and known crystals, relaxation, energies, properties."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import SYMBOLS
from cfrl.crystals.fingerprint import group_by
from cfrl.errors import UserError
from cfrl.potentials import full_name
from cfrl.rewards.expression import Expression
from cfrl.runs.devices import choose_device
from cfrl.runs.journal import Record, Work, digest
from cfrl.screening import stages
from cfrl.screening.inputs import KnownCrystal, known_by_formula
from cfrl.screening.options import ScreeningOptions
from cfrl.screening.table import JUDGED, Table
from cfrl.stability.hull import ReferenceHull
from cfrl.stability.scales import check_scale

if TYPE_CHECKING:
    import pandas as pd
    from pymatgen.core import Structure


_CHECK_CHUNK = 64  # crystals that a worker gets at once
_MATCH_CHUNK = 8  # formulas
_RELAX_CHUNK = {"cpu": 32, "cuda": 512}
_JUDGE_CHUNK = {"cpu": 4, "cuda": 256}  # the best potentials are slow


def run_stages(
    work: Work | InProcess,
    samples: list[Structure],
    table: Table,
    options: ScreeningOptions,
    known: dict[str, list[KnownCrystal]] | None,
    predictors: list[str],
) -> dict[int, Structure]:
    """Fills the table stage by stage; gives the final structure of every readable row."""
    structures = dict(enumerate(samples))
    limits = stages.Limits(options.min_distance, max_density=options.max_density) if options.validity else stages.ANY
    check = partial(stages.check, limits=limits, symprec=options.symprec)
    checked = {"edition": stages.CHECKED, "limits": asdict(limits), "symprec": options.symprec}
    table.fill(work.run("validity", check, structures, checked, _CHECK_CHUNK))
    table.note_valid()
    if options.unique:
        table["unique"][:] = 0.0
        match(work, table, structures, known, {**checked, "known": _digest_of(known)})

    model, relaxed = {"potential": full_name(options.potential)}, relaxed_by(options)
    chunk = options.chunk or _RELAX_CHUNK[choose_device(options.device).type]
    if options.relax:
        how = _relaxation(options, options.steps)
        relax = partial(stages.relax, potential=options.potential, device=options.device, settings=how)
        records = work.run("relax", relax, table.going_on(structures), relaxed, chunk)
        structures |= {row: restore(record["structure"]) for row, record in records.items() if "structure" in record}
        table.fill(records)
        table.note_scale(records)
        table.fill(work.run("recheck", check, table.going_on(structures), checked | relaxed, _CHECK_CHUNK), "_relaxed")
        if options.unique:
            match(work, table, structures, known, {**checked, **relaxed, "known": _digest_of(known)})
    elif options.stability:
        energies = partial(stages.energies, potential=options.potential, device=options.device)
        records = work.run("energy", energies, table.going_on(structures), model, chunk)
        table.fill(records)
        table.note_scale(records)
    if options.describe:
        going_on = table.going_on(structures)
        table.fill(work.run("describe", stages.describe, going_on, relaxed, _CHECK_CHUNK))
    if predictors:
        predict = partial(stages.predict, predictors=tuple(predictors), device=options.device)
        settings = relaxed | {"predictors": predictors}
        table.fill(work.run("properties", predict, table.going_on(structures), settings, chunk))
    return structures


def relaxed_by(options: ScreeningOptions) -> dict[str, Any]:
    """What the final structures depend on."""
    if not options.relax:
        return {}
    return {"potential": full_name(options.potential)} | asdict(_relaxation(options, options.steps))


def _relaxation(options: ScreeningOptions, steps: int) -> stages.Relaxation:
    return stages.Relaxation(options.fmax, steps, not options.free)


def second_opinion(
    work: Work | InProcess,
    structures: Mapping[int, Structure],
    table: Table,
    options: ScreeningOptions,
    hull: ReferenceHull,
) -> None:
    """What the second judge says of the metastable rows, from their final structures on: columns `JUDGED`.

    Of those that it has not been asked about: there may be more rows than the last time.
    """
    table.need_both = options.need_both
    unasked = (table["metastable"] == 1) & (table["judge_status"] == "") & np.isnan(table["judge_energy_per_atom"])
    near = {row: structure for row, structure in table.going_on(structures).items() if unasked[row]}
    settings = {"of": relaxed_by(options), "judge": full_name(options.judge)}
    settings |= {"steps": options.judge_steps, "fmax": options.fmax}
    how = _relaxation(options, options.judge_steps)
    ask = partial(stages.judge, potential=options.judge, device=options.device, settings=how)
    chunk = options.chunk or _JUDGE_CHUNK[choose_device(options.device).type]
    table.note_second_opinion(hull, near, work.run("judge", ask, near, settings, chunk), options.metastable)


def check_judge(options: ScreeningOptions, hull: ReferenceHull | None) -> None:
    """Raises UserError where a second judge is asked for that cannot be asked, before any work is done."""
    if not options.judge:
        return
    if hull is None:
        raise UserError("--judge gives a second opinion on the distance to the hull: leave --stability on")
    if full_name(options.judge) == full_name(options.potential):
        raise UserError(f"--judge {options.judge} is the potential itself; name another")
    check_scale(options.judge, hull)


def match(
    work: Work | InProcess,
    table: Table,
    structures: dict[int, Structure],
    known: dict[str, list[KnownCrystal]] | None,
    settings: dict[str, Any],
) -> None:
    """Notes duplicates, which go no further, and crystals that are known."""
    rows = list(table.going_on(structures))
    table["unique"][rows] = 1.0
    if known is not None:
        table.note_novel(rows)
    known = known or {}
    formulas = group_by(rows, lambda row: table["formula"][row])
    groups = {
        formula: stages.Group(
            [structures[row] for row in members],
            [table["fingerprint"][row] for row in members],
            [crystal.structure for crystal in known.get(formula, ())],
            [crystal.fingerprint for crystal in known.get(formula, ())],
        )
        for formula, members in formulas.items()
        if len(members) > 1 or formula in known
    }
    for formula, record in work.run("matching", stages.match, groups, settings, _MATCH_CHUNK).items():
        if "status" in record:
            table["status"][formulas[formula]] = record["status"]
            continue
        for row, original, hit in zip(formulas[formula], record["duplicate_of"], record["known"], strict=True):
            if hit is not None:
                table.note_known(row, known[formula][hit].name)
            if original is not None:
                table.note_duplicate(row, formulas[formula][original])


def restore(cell: Mapping[str, Any]) -> Structure:
    """A structure from a journal: `lattice`, `frac_coords`, `numbers`."""
    from pymatgen.core import Lattice, Structure

    return Structure(Lattice(cell["lattice"]), [SYMBOLS[z] for z in cell["numbers"]], cell["frac_coords"])


def _digest_of(known: dict[str, list[KnownCrystal]] | None) -> str:
    return digest(crystal.structure for crystals in (known or {}).values() for crystal in crystals)


class InProcess:
    """Runs stages here and now, and keeps nothing: `Work` without workers and journals."""

    def about(self, structures: Iterable[Structure]) -> InProcess:
        """As `Work.about`."""
        return self

    def run(
        self, name: str, function: Callable[..., list[Record]], items: Mapping[Any, Any], settings: Any, chunk: int
    ) -> dict[Any, Record]:
        """As `Work.run`."""
        keys, records = list(items), []
        for start in range(0, len(keys), chunk):
            records += function([items[key] for key in keys[start : start + chunk]])
        return dict(zip(keys, records, strict=True))


def screen(
    crystals: CrystalBatch | Sequence[Structure],
    *,
    known: CrystalBatch | None = None,
    hull: ReferenceHull | None = None,
    properties: Sequence[str] = (),
    **options: Any,
) -> pd.DataFrame:
    """Which of these crystals deserve a DFT calculation: a table with one row for each, in their order.

    Args:
        crystals: n crystals.
        known: for the novelty; None: it is not asked.
        hull: the reference; None: the embedded one.
        properties: predictors to ask, such as "band_gap".
        options: fields of `ScreeningOptions`, such as relax=False, metastable=0.05.

    Returns:
        n rows, and one for each successor where `follow` asks for them; columns as in table.csv: e_above_hull
        (eV/atom), unique, novel, candidate, flags, status, ...

    Raises:
        UserError: an option, or a potential whose energies do not fit the hull.
    """
    import pandas as pd

    from cfrl.screening.probes import Probes, asked_columns  # which needs this file

    settings = ScreeningOptions(**options)
    structures = crystals.to_structures() if isinstance(crystals, CrystalBatch) else list(crystals)
    ids = getattr(crystals, "ids", None) or [str(i) for i in range(len(structures))]
    table = Table(ids, structures, [], {})
    table.add_columns(name for target in properties for name in (target, f"{target}_std"))
    table.add_columns(asked_columns(settings))
    table.add_columns(JUDGED if settings.judge else ())
    held = None if known is None else known_by_formula(known, set(table["formula"]))
    hull = hull or (ReferenceHull.load() if settings.stability else None)
    if settings.stability:
        check_scale(settings.potential, hull)
    check_judge(settings, hull)
    ends = run_stages(InProcess(), structures, table, settings, held, list(properties))

    def judge(work: Work | InProcess) -> None:
        if settings.stability:
            table.judge_stability(hull, ends, settings.metastable)
            table.note_new_formulas(held or {}, [hull])
        if settings.judge:
            second_opinion(work, ends, table, settings, hull)
        table.note_flags(())

    rank, condition = Expression("ehull" if settings.stability else "density"), Expression("1")
    Probes(InProcess(), table, ends, settings, held, list(properties), judge, rank, condition).run()
    judge(InProcess())
    table.order(rank, condition)
    return pd.DataFrame(table.columns)

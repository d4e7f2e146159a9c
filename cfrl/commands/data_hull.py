"""`cfrl data hull`: a reference hull of known crystals, with the energies that a potential gives them, or DFT gave.

Crystals and reference then err alike, and no correction stands between them. Relaxing starts from the crystals that are
near the hull as they are: nothing that lies far above it comes down to it, and this saves most of the work.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.files import atomic_file, check_writable
from cfrl.io.datasets import load_dataset
from cfrl.potentials import full_name
from cfrl.runs.devices import choose_device
from cfrl.runs.engine import make_engine
from cfrl.runs.journal import Work, digest
from cfrl.runs.options import EngineOptions
from cfrl.screening import stages
from cfrl.stability.hull import ReferenceHull
from cfrl.stability.results import Added, add_results

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from rich.console import Console

CHUNK = 128  # crystals
_SHOWN = 10  # phases on the terminal
RELAXATION = stages.Relaxation(fmax=0.05, steps=200, keep_symmetry=True)
CONTRADICTION = 0.3  # eV/atom; a filling that puts relaxed phases farther above the hull is wrong, or they are
SAME_ENERGY = 3  # decimals of eV/atom; equal compositions that agree so far are one phase


def build_hull(
    datasets: Sequence[str],
    output: str | Path,
    potential: str = "chgnet",
    near_hull: float = 0.05,
    relax: bool = False,
    fill: str | None = None,
    add: Sequence[str] = (),
    hull: str | None = None,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> ReferenceHull:
    """Makes a reference hull, or adds results of calculations to one, and writes it.

    Stopped, the same call goes on where it was.

    Args:
        datasets: names or files; a crystal may be in several; none: nothing is made, `add` is added to `hull`.
        output: the .h5 file; what is done so far lies in a folder beside it, named after it, until the end.
        potential: as in `load_potential`.
        near_hull: eV/atom; phases farther above the hull are left out, and not relaxed.
        relax: relax the crystals near the hull, symmetry kept.
        fill: another reference, for compositions that the datasets lack; its energies should be on a close scale.
        add: datasets with energies, see `add_results`.
        hull: the reference that is added to where there are no datasets; None: the embedded one.
        workers, engine, address: as in `EngineOptions`.

    Raises:
        UserError: a dataset or potential that cannot be loaded, no crystal that can be evaluated, results that do not
            fit, or nowhere to write.
    """
    check_writable(output, (".h5",))
    if not datasets:
        return _extend(hull, add, output, console)
    if hull:
        raise UserError("datasets make a hull of their own: leave out --hull, which is what results alone are added to")
    filling = ReferenceHull.load(fill) if fill else None
    structures = CrystalBatch.cat(load_dataset(name) for name in datasets).to_structures()
    device, potential = str(choose_device(device)), full_name(potential)
    unfinished = Path(f"{output}.unfinished")
    with make_engine(EngineOptions(workers, engine, address), device) as running:
        work = Work(unfinished, running, digest(structures), console)
        evaluate = partial(stages.energies, potential=potential, device=device)
        records = work.run("energies", evaluate, dict(enumerate(structures)), {"potential": potential}, CHUNK)
        failed = Counter(record["status"] for record in records.values() if record["status"])
        energy = {row: record["energy_per_atom"] for row, record in records.items() if not record["status"]}
        if not energy:
            raise UserError(f"no crystal could be evaluated for the hull; the first: {records[0]['status']}")
        scale = next(record["energy_scale"] for record in records.values() if not record["status"])
        energy = _near(structures, _distinct(structures, energy), scale, near_hull)
        if relax:
            move = partial(stages.relax, potential=potential, device=device, settings=RELAXATION)
            items = {row: structures[row] for row in energy}
            settings = {"potential": potential, "relaxation": repr(RELAXATION)}
            relaxed = work.run("relaxation", move, items, settings, CHUNK)
            # What could not be relaxed keeps its energy: an upper bound.
            energy |= {row: record["energy_per_atom"] for row, record in relaxed.items() if not record["status"]}
            energy = _near(structures, _distinct(structures, energy), scale, near_hull)
    made = _hull(structures, energy, scale)
    if filling is not None:
        made = made.filled(filling, CONTRADICTION).near_hull(near_hull)
    if add:
        _show_added(add_results(made, add), console)
    source = " ".join(Path(name).name for name in [*datasets, *filter(None, [fill]), *add])
    made.save(output, {"potential": potential, "source": source, "relaxed": relax})
    shutil.rmtree(unfinished)
    if console is not None:
        for reason, count in failed.most_common(5):
            console.print(f"{count} crystals left out: {reason}")
        console.print(
            f"{output}: {len(made):,} phases within {near_hull} eV/atom of the hull of {len(structures):,} crystals, "
            f"{len(made.elements)} elements, energies by {potential}{', relaxed' if relax else ''}"
            + (f"; what they lack from {fill}" if fill else ""),
            highlight=False,
        )
    return made


def _extend(hull: str | None, add: Sequence[str], output: str | Path, console: Console | None) -> ReferenceHull:
    """A hull with results added, written to `output`."""
    if not add:
        raise UserError("name datasets to make a hull of, or results to add to one: --add results.h5")
    extended = ReferenceHull.load(hull)
    _show_added(add_results(extended, add), console)
    source = " ".join(Path(name).name for name in [hull or "the embedded reference", *add])
    with atomic_file(output) as temp:
        extended.save(temp, {"source": source})
    if console is not None:
        console.print(f"{output}: {len(extended):,} phases", highlight=False)
    return extended


def _show_added(added: Added, console: Console | None) -> None:
    if console is None:
        return
    stable = int((added.e_above_hull < 0).sum())
    console.print(f"added {len(added.ids)} phases; {stable} of them lie below the hull as it was", highlight=False)
    for row in np.argsort(added.e_above_hull)[:_SHOWN]:
        console.print(
            f"  {added.formulas[row]} ({added.ids[row]}): {added.e_above_hull[row]:+.3f} eV/atom", highlight=False
        )


def _hull(structures: list[Structure], energy: dict[int, float], scale: str) -> ReferenceHull:
    return ReferenceHull.from_compositions([structures[row].composition for row in energy], [*energy.values()], scale)


def _near(structures: list[Structure], energy: dict[int, float], scale: str, limit: float) -> dict[int, float]:
    """Of energies by row, those at most `limit` eV/atom above their own hull."""
    hull = _hull(structures, energy, scale)
    compositions = [structures[row].composition for row in energy]
    distance = hull.e_above_hull(compositions, np.array([*energy.values()])).e_above_hull
    return {row: value for (row, value), d in zip(energy.items(), distance, strict=True) if not d > limit}


def _distinct(structures: list[Structure], energy: dict[int, float]) -> dict[int, float]:
    """One row for each phase; datasets overlap."""
    phases = {
        (structures[row].composition.reduced_formula, round(value, SAME_ENERGY)): row for row, value in energy.items()
    }
    return {row: energy[row] for row in sorted(phases.values())}

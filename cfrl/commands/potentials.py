"""`cfrl potentials`: environments of their own for potentials that do not fit into this one.

`add` makes one, or takes a Python that has it already, and measures the potential there (stability/measured.py):
units, distance of known crystals to the hull, speed. What it finds is kept beside the environment, for `list`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.potentials import environments, load_potential
from cfrl.potentials.families import ASE, FAMILIES, Model, split_name
from cfrl.potentials.scales import CORRECTED, RAW, split_scale
from cfrl.runs.devices import choose_device
from cfrl.runs.progress import progress_bar
from cfrl.stability.hull import ReferenceHull
from cfrl.stability.measured import NEAR, Measured, known_crystals, measure

_TO_HULL = {CORRECTED: "the hull's", RAW: "MP2020 corrections bring it to the hull's"}


def add(
    name: str,
    console: Any,
    *,
    python: str | None = None,
    share: bool = True,
    again: bool = False,
    patience: float = environments.PATIENCE,
    check: int = 200,
    known: str = "prototypes",
    hull: str | None = None,
    device: str = "auto",
) -> None:
    """Make the environment of a potential if it is not there, and measure the potential.

    Args:
        name: a family, "sevennet:7net-0", or "ase:package.module:factory", with "@mp-raw" where its scale is declared.
        python: an interpreter that has the package; nothing is installed.
        share: let a new environment see the packages of this one.
        again: make it anew.
        patience: seconds for a crystal, after which a worker counts as hung.
        check: known crystals to measure it on; 0: only load it.
        known, hull: a dataset, and a reference hull; None: the embedded one.

    Raises:
        UserError: it cannot be installed, loaded, or is not what it should be. An ASE calculator is then not kept.
    """
    bare, scale = split_scale(name)
    place = environments.environment_name(bare)
    before = environments.look(place)
    environment = _environment(place, before, python, share, again, console)
    environment = replace(environment, patience=patience)
    if place.startswith(f"{ASE}:"):
        environment = replace(environment, scale=scale)
    environment.save()
    try:
        potential = load_potential(name, choose_device(device))
        console.print(f"{name} is loaded: {potential.name}, energies on the scale {potential.energy_scale}")
        if check:
            found = _measured(potential, check, known, hull, console)
            environment.measured[split_name(bare)[1]] = found.as_dict()
            environment.save()
            console.print(_found(found), highlight=False)
    except UserError:
        if place.startswith(f"{ASE}:"):
            _restore(place, before)
        raise
    console.print(f"--potential {bare} and --judge {bare} work from now on.")


def _environment(
    place: str, before: environments.Environment | None, python: str | None, share: bool, again: bool, console: Any
) -> environments.Environment:
    if python:
        found = shutil.which(python)
        if not found:
            raise UserError(f"--python {python}: no such program")
        return environments.Environment(place, str(Path(found).absolute()))
    if before and not again:
        console.print(f"{place}: the environment is there ({before.python})")
        return before
    if place.startswith(f"{ASE}:"):
        return environments.Environment(place, sys.executable)
    with console.status(f"Installing {' '.join(FAMILIES[place].pip)} ..."):
        made = environments.make(place, share)
    console.print(f"{place}: installed {' '.join(made.packages)} ({made.python})", highlight=False)
    return made


def _restore(place: str, before: environments.Environment | None) -> None:
    if before:
        before.save()
    else:
        environments.remove(place)


def _measured(potential: Any, n: int, known: str, hull: str | None, console: Any) -> Measured:
    reference = ReferenceHull.load(hull)
    crystals = known_crystals(load_dataset(known).to_structures(), reference, n)
    if not crystals:
        raise UserError(f"{known}: none of its crystals lies within {NEAR} eV/atom of the hull")
    with progress_bar("measuring   ", len(crystals), console) as progress:
        return measure(potential, crystals, reference, progress)


def _found(found: Measured | dict[str, Any]) -> str:
    """A line of what was measured."""
    found = found if isinstance(found, Measured) else Measured(**found)
    speed = f"{found.ms_per_atom:.3g} ms an atom on {found.device}"
    if not found.crystals:
        return f"scale {found.scale}: not the hull's; units right; {speed}"
    return (
        f"{found.crystals} known crystals: median {1000 * found.median:.1f} meV/atom above the hull, 95% below "
        f"{1000 * found.tail:.0f}, {found.near:.1%} within {NEAR:g} eV/atom; {speed}"
    )


def remove(name: str, console: Any) -> None:
    """Delete the environment of a potential. Raises UserError if there is none."""
    place = environments.environment_name(split_scale(name)[0])
    environments.remove(place)
    console.print(f"{place}: removed")


def show(console: Any) -> None:
    """Every potential's card: training data, energy scale, licence, weights; which are here, and what was measured."""
    there = {environment.name: environment for environment in environments.environments()}
    for name, (place, models) in _cards().items():
        console.print(f"[bold]{name}[/]: {_place(name, there.pop(name, None)) or place}", highlight=False)
        for model, card in models.items():
            to_hull = _TO_HULL.get(card.scale, "a hull of its own is needed: cfrl data hull")
            text = f"{card.data}; scale {card.scale} ({to_hull}); {card.licence}; weights {card.weights}"
            console.print(f"  {model}: {text}", highlight=False)
    for name, environment in there.items():
        console.print(f"[bold]{name}[/]: {_place(name, environment)}", highlight=False)


def _place(name: str, environment: environments.Environment | None) -> str:
    """Where an environment is and what was measured there; "" if there is none."""
    if environment is None:
        return ""
    measured = [f"\n  measured, {model}: {_found(found)}" for model, found in environment.measured.items()]
    return f"here ({environment.python})" + "".join(measured)


def _cards() -> dict[str, tuple[str, dict[str, Model]]]:
    """Name -> what it takes to have it, and its models, of every potential."""
    at_home = {
        "chgnet": {"0.3.0": Model("MPtrj", CORRECTED, "BSD-3-Clause", "in the package")},
        "mace": {"medium-mpa-0": Model("MPtrj, sAlex", RAW, "MIT")},
    }
    cards = {name: ("in this environment", models) for name, models in at_home.items()}
    return cards | {name: (f"cfrl potentials add {name}", family.models) for name, family in FAMILIES.items()}

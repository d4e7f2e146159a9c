"""Phases of a reference as others write them down: a CSV with formulas and energies, or a JSON list of entries."""

from __future__ import annotations

import csv
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cfrl.errors import UserError
from cfrl.io.readers import open_text

CARRIED_OVER = "-shifted"  # ends the `scale` of energies fitted from another functional, which scatter more


@dataclass
class Phases:
    """m phases: compositions (formulas, or amounts by element), eV/atom, and which energies were carried over."""

    compositions: list[Any] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    carried_over: list[bool] = field(default_factory=list)
    energy_scale: str = "unknown"


def read_phases(path: Path) -> Phases:
    """Reads .csv and .json (.gz and .bz2 too). Raises UserError for what cannot be read, naming the row at fault."""
    kind = path.with_suffix("").suffix if path.suffix in (".gz", ".bz2") else path.suffix
    if kind not in _READERS:
        raise UserError(f"{path}: a hull reference is .h5, .csv or .json (.gz and .bz2 too)")
    try:
        with open_text(path) as file:
            return _READERS[kind](file, path)
    except (OSError, EOFError, zlib.error, csv.Error, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not a readable {kind[1:].upper()} file ({error})") from error


def _read_csv(file: TextIO, path: Path) -> Phases:
    reader = csv.DictReader(file)
    missing = {"formula", "energy_per_atom"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path}: no column {' or '.join(sorted(missing))} (has: {reader.fieldnames})")
    phases = Phases(energy_scale="mp2020" if "scale" in reader.fieldnames else "unknown")
    for row in reader:
        try:
            energy = float(row["energy_per_atom"])
        except (TypeError, ValueError):
            energy = np.nan
        if not np.isfinite(energy):
            raise UserError(f"{path}, line {reader.line_num}: energy_per_atom is {row['energy_per_atom']!r}")
        phases.energies.append(energy)
        phases.compositions.append(row["formula"] or "")
        phases.carried_over.append((row.get("scale") or "").endswith(CARRIED_OVER))
    return phases


def _read_entries(file: TextIO, path: Path) -> Phases:
    data = json.load(file)
    entries = data.get("entries") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise UserError(f'{path}: neither a list of entries nor {{"entries": [...]}}')
    phases = Phases(carried_over=[False] * len(entries))
    for row, entry in enumerate(entries):
        try:
            composition = entry.get("composition") or _structure_composition(entry["structure"])
            energy = float(entry["energy"]) + float(entry.get("correction") or 0.0)
            phases.energies.append(energy / sum(composition.values()))
        except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{path}, entry {row + 1}: no composition and energy in it ({error!r})") from error
        phases.compositions.append(composition)
    return phases


_READERS = {".csv": _read_csv, ".json": _read_entries}


def _structure_composition(structure: dict[str, Any]) -> dict[str, float]:
    amounts: dict[str, float] = {}
    for site in structure["sites"]:
        for species in site["species"]:
            amounts[species["element"]] = amounts.get(species["element"], 0.0) + species["occu"]
    return amounts

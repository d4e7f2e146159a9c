"""Phonons on the page of a screening: band structure and density of states of each crystal that was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cfrl.reports.figures import BLUE, ORANGE, Figure, Series
from cfrl.reports.labels import slug, subscripts
from cfrl.untrusted import read_json


def phonon_figures(path: Path) -> list[Figure]:
    """Bands and states of a file of `phonons/`; what is imaginary is below zero, in orange."""
    record = read_json(path)
    note = f"{record['id']}, lowest frequency {record['lowest_frequency']:.3g} THz; below zero: imaginary."
    title = f"Phonons of {subscripts(record['formula'])}"
    bands = Figure(slug(f"bands-{path.stem}"), title, "", "frequency (THz)", note=note)
    bands.ticks, bands.series = _ticks(record["bands"]), _bands(record["bands"])
    frequency, density = (np.array(record["dos"][name]) for name in ("frequency", "density"))
    states = Figure(slug(f"states-{path.stem}"), "Density of states", "frequency (THz)", "states per THz and cell")
    states.series = [Series(frequency, density, color=BLUE)]
    if (frequency < 0).any():
        states.series.append(Series(frequency[frequency < 0], density[frequency < 0], color=ORANGE))
    return [bands, states]


def _bands(record: dict[str, Any]) -> list[Series]:
    """All bands as one line with gaps: after each band, and where the path jumps (no way between two points)."""
    distance, frequencies = np.array(record["distance"]), np.array(record["frequencies"])  # (q,), (q, b)
    jumps = 1 + np.flatnonzero(np.diff(distance) == 0)
    x = np.append(np.insert(distance, jumps, np.nan), np.nan)
    y = np.concatenate([np.append(np.insert(band, jumps, np.nan), np.nan) for band in frequencies.T])
    x = np.tile(x, frequencies.shape[1])
    below = np.where(y < 0, y, np.nan)
    return [Series(x, y, color=BLUE)] + [Series(x, below, color=ORANGE)] * bool((y < 0).any())


def _ticks(record: dict[str, Any]) -> dict[float, str]:
    """Special points; two that the path jumps between share a place."""
    names: dict[float, str] = {}
    for place, name in zip(record["ticks"], record["labels"], strict=True):
        name = "Γ" if name == "G" else name
        names[place] = f"{names[place]}|{name}" if place in names else name
    return names

"""Figures of groups of crystals: of what kinds they are, and how their quantities are distributed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.symmetry import CRYSTAL_SYSTEMS
from cfrl.reports.figures import BLUE, GREY, Figure, PeriodicTable, Series, histogram
from cfrl.reports.labels import label, slug, title


def comparison(groups: Mapping[str, CrystalBatch], quantities: Sequence[str]) -> list[Figure | PeriodicTable | None]:
    """Distributions of the quantities, sizes, crystal systems and elements of two groups of crystals."""
    sites = {key: crystals.num_sites.numpy().astype(float) for key, crystals in groups.items()}
    return [
        *(histogram(slug(f"histogram-{n}"), title(n), label(n), _values(groups, n)) for n in quantities),
        histogram("sites", "Sites", "inequivalent sites", sites),
        systems(groups),
        _shift(*groups.values()),
    ]


def systems(groups: Mapping[str, CrystalBatch]) -> Figure:
    """Shares of the crystal systems."""
    figure = Figure("systems", "Crystal systems", "", "share of crystals")
    for (key, crystals), color in zip(groups.items(), (GREY, BLUE) if len(groups) > 1 else (BLUE,), strict=True):
        system = np.searchsorted(list(CRYSTAL_SYSTEMS.values()), crystals.space_group.numpy())
        share = np.bincount(system, minlength=7) / max(len(crystals), 1)
        figure.series.append(Series([*CRYSTAL_SYSTEMS], share, key, "bars", color))
    return figure


def elements(crystals: CrystalBatch, name: str = "Elements") -> PeriodicTable:
    """How many of the crystals hold each element."""
    shares = {z: 100 * share for z, share in enumerate(_element_shares(crystals)) if share > 0}
    return PeriodicTable("elements", name, shares, "% of crystals with the element")


def _shift(before: CrystalBatch, after: CrystalBatch) -> PeriodicTable:
    """Which elements have become more frequent."""
    old, new = _element_shares(before), _element_shares(after)
    few = 0.5 / min(len(before), len(after))  # half a crystal: an element met once is no change
    shift = {z: math.log2((new[z] + few) / (old[z] + few)) for z in range(1, 119) if old[z] + new[z] > 0}
    note = Markup(
        "log<sub>2</sub> of the share of crystals that hold the element, after over before: blue, more often."
    )
    return PeriodicTable("elements", "Elements: what has changed", shift, "log2(after / before)", True, note)


def _values(groups: Mapping[str, CrystalBatch], name: str) -> dict[str, np.ndarray]:
    return {key: crystals.properties[name].numpy() for key, crystals in groups.items() if name in crystals.properties}


def _element_shares(crystals: CrystalBatch) -> np.ndarray:
    """(119,) share of crystals that hold each element."""
    present = np.zeros((len(crystals), 119), dtype=bool)
    np.put_along_axis(present, crystals.species.numpy(), True, axis=1)
    return present.mean(0) * (np.arange(119) > 0) if len(crystals) else np.zeros(119)

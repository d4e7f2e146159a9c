"""The report of a screening: how many crystals are candidates, which, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfrl.reports.figures import BLUE, ORANGE, Figure, Series, histogram
from cfrl.reports.groups import elements, systems
from cfrl.reports.labels import label, slug, title
from cfrl.reports.page import Page
from cfrl.reports.phonons import phonon_figures
from cfrl.reports.reading import crystals_if_any, read_result, settings
from cfrl.runs.folder import RunFolder
from cfrl.stability.flags import FLAGS
from cfrl.tables import read_csv

SHOWN_CRYSTALS = 12
SHOWN_ROWS = 1000
_SCREENED = (
    *("lowest_frequency", "lowest_stiffness", "bulk_modulus_vrh", "shear_modulus_vrh"),
    *("rmsd", "volume_change", "density", "energy_per_atom", "max_force"),
)
_FIRST = ("id", "formula", "space_group", "e_above_hull", "judge_e_above_hull", "num_references", "flags")
_LAST = (
    *("dimensionality", "oxidation_states", "known_as", "new_formula", "parent"),
    *("judge_status", "elastic_status", "phonon_status", "status"),
)


def screen_page(run: RunFolder) -> Page:
    """The page of a screening. Raises UserError where it did not come to its end."""
    summary = read_result(run.path / "summary.json")
    table = read_csv(run.path / "table.csv")
    crystals = crystals_if_any(run.path / "screen.h5")
    candidate = np.array(table["candidate"]) == 1
    held_back = np.array(table["held_back"]) == 1 if "held_back" in table else np.zeros_like(candidate)
    page = Page.of(run, f"Screening of {summary['crystals']:,} crystals")
    condition = settings(run).get("screen", {}).get("filter", "")
    drawn = int(candidate.sum()) - summary.get("followed", {}).get("candidates", 0)  # successors are not of the input
    page.verdict = verdict(_counts(summary), drawn, int(held_back.sum()), condition)
    rates = {rate["name"]: rate for rate in summary["rates"]}
    shown = ("valid", "unique", "novel", "stable", "metastable", "S.U.N.", "meta-S.U.N.")
    page.tiles({name: f"{rates[name]['share']:.1%}" for name in shown if name in rates})

    page.heading("What is left", " ".join(filter(None, map(summary.get, ("judgement", "warning")))))
    page.add_figures(_funnel(summary), _failures(summary))
    _add_rates(page, summary, rates)
    if summary.get("protocol"):
        _add_protocol(page, summary["protocol"])

    numbers = {name: np.array(column) for name, column in table.items() if column and isinstance(column[0], float)}
    known = {name: values for name, values in numbers.items() if np.isfinite(values).any()}
    predicted = [name.removesuffix("_std") for name in known if name.endswith("_std")]
    measured = ("reward", "e_above_hull", "judge_e_above_hull", *predicted, *_SCREENED)
    quantities = [name for name in measured if name in known]
    terms = [name for name in known if name.startswith("reward/")]
    columns = [*_FIRST, *quantities, *terms, *(f"{name}_std" for name in predicted), *_LAST]
    columns = [name for name in dict.fromkeys(columns) if name in table and (name not in numbers or name in known)]

    if opinion := summary.get("opinion"):
        page.heading("Second opinion", opinion)
        page.add_figures(_opinions(table, known))

    page.heading("Candidates", f"{candidate.sum():,}, in the order of the ranking.")
    row_of = {str(name): row for row, name in enumerate(table["id"])}
    first = crystals[[i for i, name in enumerate(crystals.ids) if candidate[row_of[name]]][:SHOWN_CRYSTALS]]
    facts = [name for name in (*quantities[:4], "num_references") if name in known]
    page.crystals(first, [{label(name): known[name][row_of[crystal.ids[0]]] for name in facts} for crystal in first])
    _add_rows(page, table, columns, candidate)
    _add_phonons(page, run, summary)
    if flags := summary.get("flags"):
        suspect = "that would be candidates but for what is suspect of them."
        page.heading("Held back by flags", f"{held_back.sum():,} {suspect}")
        counts = {what: [count[what] for count in flags.values()] for what in ("crystals", "held back")}
        meaning = [FLAGS.get(name, "") for name in flags]
        page.table({"flag": list(flags), **counts, "meaning": meaning}, sortable=False)
        _add_rows(page, table, columns, held_back)

    page.heading("Distributions", "Of all crystals that came so far.")
    page.add_figures(*(histogram(slug(name), title(name), label(name), {"": known[name]}) for name in quantities))
    if len(crystals):
        page.add_figures(systems({"": crystals}), elements(crystals))
    page.heading("The others")
    _add_rows(page, table, columns, ~(candidate | held_back))
    return page


def verdict(counts: Mapping[str, int], candidates: int, held_back: int, condition: str = "") -> str:
    """How many of how many are worth a DFT calculation, and what that means here.

    Args:
        counts: condition -> how many satisfy it and all before it; "all" first.
        candidates, held_back: crystals.
        condition: the filter that candidates satisfy.
    """
    total = counts["all"]
    asked = [name for name in counts if name not in ("all", "candidates", "stable")]
    asked = [f"{name} of the hull" if name.startswith("within") else name for name in asked]
    asked += [condition] if condition else []
    if not candidates:
        left = ", ".join(f"{count:,} {name}" for name, count in counts.items() if name not in ("all", "candidates"))
        return f"None of {total:,} crystals is a candidate for a DFT calculation (left after each condition: {left})."
    share = f" ({candidates / total:.0%})" if total >= 20 else ""
    more = f"; {counts['stable']:,} of them are on the hull or below it" if "stable" in counts else ""
    more += f"; {held_back:,} more are held back by flags" if held_back else ""
    return (
        f"{candidates:,} of {total:,} crystals{share} are candidates for a DFT calculation: {', '.join(asked)}{more}."
    )


def _counts(summary: Mapping[str, Any]) -> dict[str, int]:
    """How many crystals satisfy each condition and all before it."""
    if summary.get("funnel"):
        return summary["funnel"]
    rates = {rate["name"]: rate["count"] for rate in summary["rates"]}  # of a run that did not count them
    nested = ("valid", "unique", "meta-S.U.N.", "S.U.N.")  # the rates that hold one within the other
    return {"all": summary["crystals"]} | {name: rates[name] for name in nested if name in rates}


def _add_rates(page: Page, summary: Mapping[str, Any], rates: Mapping[str, Mapping[str, Any]]) -> None:
    """Tables of the rates, and of how many crystals of so many elements are what."""
    page.table(
        {
            "rate": list(rates),
            "crystals": [rate["count"] for rate in rates.values()],
            "of": [rate["total"] for rate in rates.values()],
            "share (%)": [100 * rate["share"] for rate in rates.values()],
            "95% from": [100 * rate["low"] for rate in rates.values()],
            "to": [100 * rate["high"] for rate in rates.values()],
            "meaning": [rate["definition"] for rate in rates.values()],
        },
        sortable=False,
    )
    for head, groups in (("elements", summary.get("by_elements")), ("anion", summary.get("by_anion"))):
        if groups:
            names = list(next(iter(groups.values())))
            page.table(
                {head: list(groups)} | {name: [row[name] for row in groups.values()] for name in names},
                sortable=False,
            )


def _add_protocol(page: Page, protocol: Mapping[str, Any]) -> None:
    """Figures by LeMat-GenBench, a column or three for each geometry."""
    page.heading("By the protocol of LeMat-GenBench", protocol["instead"])
    counts, numbers = protocol["counts"], protocol["numbers"]
    names = list(next(iter(counts.values())))
    columns: dict[str, list[Any]] = {"": names}
    for geometry, found in counts.items():
        columns[geometry] = [found[name]["count"] for name in names]
        for head, key in (("of valid", "of_valid"), ("of all", "of_all")):
            shares = [found[name][key] for name in names]
            columns[f"{geometry}, {head} (%)"] = [np.nan if share is None else 100 * share for share in shares]
    page.table(columns | {"meaning": [protocol["definitions"][name] for name in names]}, sortable=False)
    names = list(dict.fromkeys(name for found in numbers.values() for name in found))
    values = {geometry: [found.get(name, np.nan) for name in names] for geometry, found in numbers.items()}
    page.table({"": names} | values, sortable=False)


def _add_phonons(page: Page, run: RunFolder, summary: Mapping[str, Any]) -> None:
    """Pictures of the first crystals that were asked, successors among them."""
    files = sorted((run.path / "phonons").glob("*.json"))[:SHOWN_CRYSTALS]
    if not files:
        return
    counts = ", ".join(f"{count:,} {name}" for name, count in summary.get("followed", {}).items())
    page.heading("Phonons", f"Of the first candidates. Along imaginary modes: {counts}." if counts else "")
    for path in files:
        page.add_figures(*phonon_figures(path))


def _add_rows(page: Page, table: Mapping[str, Sequence[Any]], columns: Sequence[str], chosen: np.ndarray) -> None:
    """The chosen rows, and those of the columns that have something to say of them."""
    rows = np.flatnonzero(chosen)[:SHOWN_ROWS]
    shown = {name: [table[name][row] for row in rows] for name in columns}
    if len(rows):
        page.table({name: values for name, values in shown.items() if any(value != "" for value in values)})


def _funnel(summary: Mapping[str, Any]) -> Figure:
    counts = _counts(summary)
    bars = Series(list(counts), list(counts.values()), "", "bars", BLUE)
    note = "Crystals that satisfy each condition and all before it."
    return Figure("funnel", "The funnel", "", "crystals", [bars], note=note)


def _opinions(table: Mapping[str, Sequence[Any]], known: Mapping[str, np.ndarray]) -> Figure | None:
    """Distances to the hull by both judges."""
    if "judge_e_above_hull" not in known:
        return None
    first, second = known["e_above_hull"], known["judge_e_above_hull"]
    rows = np.flatnonzero(np.isfinite(first) & np.isfinite(second))
    ends = [min(first[rows].min(), second[rows].min()), max(first[rows].max(), second[rows].max())]
    points = Series(first[rows], second[rows], "", "points", BLUE, text=[table["formula"][row] for row in rows])
    equal = Series(ends, ends, "", "line", ORANGE, dash=True)
    note = "Energy above hull of what the first judge finds metastable; on the line both say the same."
    return Figure(
        "second-opinion", "Both judges", label("e_above_hull"), label("judge_e_above_hull"), [points, equal], note=note
    )


def _failures(summary: Mapping[str, Any], most: int = 8) -> Figure | None:
    failures = dict(list(summary["failures"].items())[:most])
    if not failures:
        return None
    names = [name if len(name) < 28 else name[:26] + "…" for name in failures]
    return Figure(
        "failures",
        "Why crystals went no further",
        "",
        "crystals",
        [Series(names, list(failures.values()), "", "bars", ORANGE)],
    )

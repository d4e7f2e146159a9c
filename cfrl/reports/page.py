"""One self-contained HTML page: figures, crystals that turn, tables that sort; it opens without a network.

`Page` collects what is to be shown, `assets/report.html` says how it looks. The page holds plotly and 3Dmol, its data
as JSON, and a Content-Security-Policy that forbids every request. How figures are drawn is in figures.py.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from cfrl.crystals.crystal import CrystalBatch
from cfrl.reports.figures import Figure, PeriodicTable
from cfrl.reports.labels import label, number_text, space_group_symbol, subscripts
from cfrl.reports.scene import cif_links, scene
from cfrl.runs.folder import RunFolder
from cfrl.untrusted import read_json

PRINTED_ROWS = 50  # of a table; on the screen it scrolls
_FILTERED = 10  # rows, from which a table has a box to filter it


class Page:
    """An HTML document that is put together section by section. Text is escaped unless it is `Markup`.

    verdict: one sentence on top, what the run comes to.
    """

    def __init__(self, title: str, subtitle: str, provenance: Mapping[str, str], verdict: str = "") -> None:
        self.title, self.subtitle, self.provenance, self.verdict = title, subtitle, provenance, verdict
        self.figures: list[Figure | PeriodicTable] = []
        self.sections: list[tuple[str, Any]] = []  # a macro of the template, and what it is given
        self._scenes: list[dict[str, Any]] = []

    @classmethod
    def of(cls, run: RunFolder, title: str, subtitle: str = "", verdict: str = "") -> Page:
        """The page of a run."""
        provenance = run.path / "run.json"
        return cls(title, subtitle or run.path.name, read_json(provenance) if provenance.is_file() else {}, verdict)

    def heading(self, text: str, intro: str = "") -> None:
        self.sections.append(("heading", {"text": text, "intro": intro}))

    def tiles(self, tiles: Mapping[str, Any]) -> None:
        """Key numbers: what it is -> value."""
        self.sections.append(("tiles", {name: number_text(value) for name, value in tiles.items()}))

    def add_figures(self, *figures: Figure | PeriodicTable | None) -> None:
        """Side by side where there is room; None is left out."""
        if shown := [figure for figure in figures if figure is not None]:
            self.figures += shown
            self.sections.append(("figures", [(f, isinstance(f, PeriodicTable)) for f in shown]))

    def crystals(self, crystals: CrystalBatch, facts: Sequence[Mapping[str, Any]]) -> None:
        """Cards with a 3-D view that turns and a CIF to download; `facts` beside each crystal: name -> value."""
        cards = []
        for crystal, formula, link, fact in zip(crystals, crystals.formulas(), cif_links(crystals), facts, strict=True):
            number = int(crystal.space_group[0])
            cards.append(
                {
                    "scene": len(self._scenes),
                    "formula": subscripts(formula),
                    "id": _linked(crystal.ids[0]) if crystal.ids and crystal.ids[0] else "",
                    "group": Markup("{} (no. {})").format(space_group_symbol(number), number),
                    "facts": {name: number_text(value) for name, value in fact.items()},
                    "cif": link,
                    "file": f"{formula}-{number}.cif",
                }
            )
            self._scenes.append(scene(crystal))
        self.sections.append(("crystals", cards))

    def table(self, columns: Mapping[str, Sequence[Any]], sortable: bool = True) -> None:
        """Columns by name; ids of the Materials Project become links, formulas get their subscripts."""
        number = {key: all(isinstance(v, int | float | np.number | None) for v in c) for key, c in columns.items()}
        cells = [[_cell(key, value, number[key]) for value in column] for key, column in columns.items()]
        rows = list(zip(*cells, strict=True))
        head = [(label(key), number[key]) for key in columns]
        filtered = sortable and len(rows) > _FILTERED
        self.sections.append(("table", {"head": head, "rows": rows, "sortable": sortable, "filtered": filtered}))

    def shares(self, shares: Mapping[str, tuple[float, float]], of: str = "share of crystals") -> None:
        """A table of named shares before and after: name -> (before, after), each of 1; NaN where it is not known."""
        before, after = (100 * np.array([pair[i] for pair in shares.values()], dtype=float) for i in (0, 1))
        columns = {"before (%)": before, "after (%)": after, "change (points)": after - before}
        self.table({of: list(shares), **{k: np.round(v, 1).tolist() for k, v in columns.items()}}, sortable=False)

    def html(self) -> str:
        """The whole document."""
        from jinja2 import Environment

        data = {"figures": {figure.name: figure.to_plotly() for figure in self.figures}, "crystals": self._scenes}
        # "</script>" inside a string would end the script element.
        text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
        scripts = ["plotly-basic.min.js.gz"] * bool(self.figures) + ["3Dmol-min.js.gz"] * bool(self._scenes)
        made = (("version", "cfrl"), ("date", ""), ("git_revision", "revision"))
        return (
            Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
            .from_string(_asset("report.html"))
            .render(
                page=self,
                printed_rows=PRINTED_ROWS,
                css=Markup(_asset("report.css").replace("PRINTED_ROWS_AND_ONE", str(PRINTED_ROWS + 1))),
                data=Markup(text),
                scripts=[Markup(_asset(name)) for name in (*scripts, "report.js")],
                made=[f"{name} {self.provenance[key]}".strip() for key, name in made if self.provenance.get(key)],
            )
        )


def _linked(name: str) -> str:
    """An id; those of the Materials Project lead to their page."""
    if re.fullmatch(r"mp-\d+", name):
        address = f"https://materialsproject.org/materials/{name}"
        return Markup('<a href="{}" target="_blank" rel="noopener">{}</a>').format(address, name)
    return escape(name)


def _cell(key: str, value: Any, numeric: bool) -> tuple[Any, str, bool]:
    """What it is sorted by, what is shown, and whether it is a number."""
    if numeric:
        known = value is not None and math.isfinite(value)
        return value if known else "", number_text(value), True
    form = {"id": _linked, "formula": subscripts}.get(key, str)
    return str(value), form(str(value)), False


def _asset(name: str) -> str:
    data = (files("cfrl.reports") / "assets" / name).read_bytes()
    return (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")

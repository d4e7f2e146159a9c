"""One self-contained HTML page: figures, crystals that turn, tables that sort; it opens without a network.

The page holds plotly and 3Dmol (assets/), its data as JSON, and a Content-Security-Policy that forbids every
request. What is put on it is decided in report.py; how figures are drawn, in figures.py.
"""

from __future__ import annotations

import gzip
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.display import shown_atoms, space_group_symbol, subscripts
from cfrl.crystals.elements import SYMBOLS
from cfrl.reports.figures import Figure, PeriodicTable

_BOND = 1.15  # a bond: closer than so many sums of covalent radii
_MAX_BONDED = 400  # atoms; a larger cell is shown without bonds

# What quantities are called on axes and in tables; others go by their own name.
LABELS = {
    "ehull": "energy above hull (eV/atom)",
    "e_above_hull": "energy above hull (eV/atom)",
    "band_gap": "band gap (eV)",
    "gap": "band gap (eV)",
    "dielectric": "dielectric constant",
    "eps_total": "dielectric constant",
    "eps_electronic": "electronic dielectric constant",
    "formation_energy_per_atom": "formation energy (eV/atom)",
    "formation_energy": "formation energy (eV/atom)",
    "bulk_modulus": "bulk modulus (GPa)",
    "shear_modulus": "shear modulus (GPa)",
    "density": "density (g/cm³)",
    "force": "largest force (eV/Å)",
    "energy": "energy (eV/atom)",
    "log_ratio": "log-likelihood ratio (nats)",
    "log_ratio_per_site": "log-likelihood ratio per site (nats)",
    "log_ratio_joint": "log-likelihood ratio with space group (nats)",
    "log_prob": "log P tuned (nats)",
    "log_prob_base": "log P base (nats)",
    "space_group": "space group",
    "rmsd": "RMSD of the relaxation (Å)",
    "volume_change": "relative change of volume",
    "energy_per_atom": "energy (eV/atom)",
    "max_force": "largest force (eV/Å)",
    "num_references": "references in the system",
    "known_as": "known as",
}


def label(name: str) -> str:
    """A quantity's name with its unit."""
    whole, _, part = name.rpartition("/")
    if part in ("spread", "std"):
        return f"spread of {label(whole)}"
    return LABELS.get(part, part.replace("_", " "))


class Page:
    """An HTML document that is put together section by section."""

    def __init__(self, title: str, subtitle: str, provenance: Mapping[str, str]) -> None:
        self.title, self.subtitle, self.provenance = title, subtitle, provenance
        self.figures: list[Figure | PeriodicTable] = []
        self._crystals: list[dict[str, Any]] = []
        self._parts: list[str] = []
        self._tables = 0

    def heading(self, text: str, intro: str = "") -> None:
        self._parts.append(f"<h2>{text}</h2>" + (f'<p class="intro">{intro}</p>' if intro else ""))

    def tiles(self, tiles: Mapping[str, Any]) -> None:
        """Key numbers: what it is -> value."""
        boxes = (
            f'<div class="tile"><b>{number_text(value)}</b><span>{name}</span></div>' for name, value in tiles.items()
        )
        self._parts.append(f'<div class="tiles">{"".join(boxes)}</div>')

    def add_figures(self, *figures: Figure | PeriodicTable | None) -> None:
        """Side by side where there is room; None is left out."""
        boxes = []
        for figure in figures:
            if figure is None:
                continue
            self.figures.append(figure)
            wide = " wide" if isinstance(figure, PeriodicTable) else ""
            note = f"<figcaption>{figure.note}</figcaption>" if figure.note else ""
            boxes.append(
                f'<figure class="figure{wide}"><h3>{figure.title}</h3>'
                f'<div class="plot" id="{figure.name}"></div>{note}</figure>'
            )
        if boxes:
            self._parts.append(f'<div class="figures">{"".join(boxes)}</div>')

    def crystals(self, crystals: CrystalBatch, facts: Sequence[Mapping[str, Any]]) -> None:
        """Cards with a 3-D view that turns; `facts` beside each crystal: name -> value."""
        cards = []
        for crystal, formula, fact in zip(crystals, crystals.formulas(), facts, strict=True):
            rows = "".join(f"<dt>{html.escape(k)}</dt><dd>{number_text(v)}</dd>" for k, v in fact.items())
            name = f"{_linked(crystal.ids[0])} · " if crystal.ids and crystal.ids[0] else ""
            group = f"{space_group_symbol(number := int(crystal.space_group[0]))} (no. {number})"
            cards.append(
                f'<article class="crystal"><div class="view" data-crystal="{len(self._crystals)}"></div>'
                f'<div class="text"><h3>{subscripts(formula)}</h3><p class="sub">{name}{group}</p>'
                f"<dl>{rows}</dl></div></article>"
            )
            self._crystals.append(scene(crystal))
        self._parts.append(f'<div class="crystals">{"".join(cards)}</div>')

    def table(self, columns: Mapping[str, Sequence[Any]], sortable: bool = True) -> None:
        """Columns by name; ids of the Materials Project become links, formulas get their subscripts."""
        self._tables += 1
        name, size = f"table-{self._tables}", len(next(iter(columns.values()), []))
        numeric = {key: all(isinstance(v, int | float | np.number | None) for v in c) for key, c in columns.items()}
        head = "".join(
            f'<th class="number">{html.escape(label(key))}</th>'
            if numeric[key]
            else f"<th>{html.escape(label(key))}</th>"
            for key in columns
        )
        body = "".join(
            "<tr>" + "".join(_cell(key, column[row], numeric[key]) for key, column in columns.items()) + "</tr>"
            for row in range(size)
        )
        if sortable and size > 10:
            self._parts.append(
                f'<input class="filter" type="search" placeholder="Filter, e.g. an element or id" '
                f'aria-label="Filter the table" data-table="{name}">'
            )
        kind = ' class="sortable"' if sortable else ""
        self._parts.append(
            f'<div class="table"><table id="{name}"{kind}><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def html(self) -> str:
        """The whole document."""
        data = {"figures": {figure.name: figure.to_plotly() for figure in self.figures}, "crystals": self._crystals}
        # "</script>" inside a string would end the script element.
        text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
        scripts = [_asset("plotly-basic.min.js.gz")] if self.figures else []
        scripts += [_asset("3Dmol-min.js.gz")] if self._crystals else []
        scripts.append(_asset("report.js"))
        made = " · ".join(
            html.escape(f"{name} {self.provenance[key]}".strip())
            for key, name in (("version", "cfrl"), ("date", ""), ("git_revision", "revision"))
            if self.provenance.get(key)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'; "
            "style-src 'unsafe-inline'; img-src data: blob:\">"
            f'<link rel="icon" href="data:,"><title>{html.escape(self.title)}</title>'
            f"<style>{_asset('report.css')}</style></head><body>"
            f'<header><div class="wrap"><h1>{html.escape(self.title)}</h1><p>{self.subtitle}</p>'
            f"<p><code>{html.escape(self.provenance.get('command', ''))}</code></p></div></header><main>"
            + "\n".join(self._parts)
            + f"<footer>{made}. Crystals turn with the mouse; Ctrl and the wheel zoom. Figures are also in plots/, as "
            "PNG and SVG.</footer></main>"
            f'<script type="application/json" id="data">{text}</script>'
            + "".join(f"<script>{script}</script>" for script in scripts)
            + "</body></html>\n"
        )


def scene(crystal: CrystalBatch) -> dict[str, Any]:
    """A conventional cell for 3Dmol: atoms (those on the cell's faces on every such face), bonds, edges; angstrom."""
    from ase.data import covalent_radii

    frac, numbers = shown_atoms(crystal)
    matrix = crystal.lattice_matrix()[0].double().numpy()
    points = frac @ matrix
    bonds: list[list[int]] = []
    if len(points) <= _MAX_BONDED:
        reach = _BOND * (covalent_radii[numbers][:, None] + covalent_radii[numbers])
        distance = np.linalg.norm(points[:, None] - points, axis=-1)
        near = np.triu(distance < reach, 1)
        if len(set(numbers.tolist())) > 1:
            near &= numbers[:, None] != numbers
        bonds = np.argwhere(near).tolist()
    corners = np.array([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], dtype=float)
    edges = [(a, b) for i, a in enumerate(corners) for b in corners[i + 1 :] if np.abs(a - b).sum() == 1]
    return {
        "atoms": [[SYMBOLS[z], *np.round(xyz, 3).tolist()] for z, xyz in zip(numbers.tolist(), points, strict=True)],
        "bonds": bonds,
        "box": [np.round(np.stack(edge) @ matrix, 3).tolist() for edge in edges],
    }


def _linked(name: str) -> str:
    """An id; those of the Materials Project lead to their page."""
    text = html.escape(name)
    if re.fullmatch(r"mp-\d+", name):
        return f'<a href="https://materialsproject.org/materials/{text}" target="_blank" rel="noopener">{text}</a>'
    return text


def _cell(key: str, value: Any, numeric: bool) -> str:
    if numeric:
        known = value is not None and math.isfinite(value)
        return f'<td class="number" data-value="{value if known else ""}">{number_text(value)}</td>'
    text = (
        _linked(str(value)) if key == "id" else subscripts(str(value)) if key == "formula" else html.escape(str(value))
    )
    return f'<td data-value="{html.escape(str(value))}">{text}</td>'


def number_text(value: Any) -> str:
    """For reading."""
    if isinstance(value, str):
        return html.escape(value)
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "−")
    return (f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}").replace("-", "−")


def _asset(name: str) -> str:
    data = (files("cfrl.reports") / "assets" / name).read_bytes()
    return (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")

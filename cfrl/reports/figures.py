"""A figure is described once and drawn twice: by plotly on the page, by matplotlib for the paper (PNG and SVG).

`Figure` holds curves, points, bars or histograms on two axes; `PeriodicTable` one number per element. What they show
is decided elsewhere. The page's figures are plain dicts for plotly.js; the plotly Python package is not needed. A
figure's own colours are those of paper, on which it is saved; report.css adapts them to a dark screen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cfrl.crystals.elements import SYMBOLS
from cfrl.files import atomic_file

# Okabe and Ito's palette, told apart by colour-blind readers and in grey.
BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#8A8F98",
)
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY)
INK, GRID = "#1F2933", "#E4E7EB"
FAINT = "rgba(138, 143, 152, 0.12)"  # on white and on black
SEQUENTIAL = ["#F3F6FA", "#C6DBEF", "#6BAED6", "#2171B5", "#08306B"]
DIVERGING = ["#B2182B", "#F4A582", "#F7F7F7", "#92C5DE", "#2166AC"]
_SIZE = (3.5, 2.6)  # inches: one column of a journal


@dataclass
class Series:
    """One set of data of a figure.

    kind: "line", "points", "steps" (a filled histogram; x holds one edge more than y), or "bars" (x may be words).
    text: what the page shows on hover, one per point.
    """

    x: Sequence[Any] | np.ndarray
    y: Sequence[float] | np.ndarray
    name: str = ""
    kind: str = "line"
    color: str = BLUE
    dash: bool = False
    text: Sequence[str] | None = None


@dataclass
class Figure:
    """Series on two axes. `name` is the file's; labels carry their units; `note` is the caption.

    ticks: places on the x axis that have a name, in place of numbers.
    """

    name: str
    title: str
    x: str
    y: str
    series: list[Series] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    note: str = ""
    ticks: Mapping[float, str] | None = None

    def to_plotly(self) -> dict[str, Any]:
        traces = [trace for series in self.series for trace in _TRACES[series.kind](series)]
        layout = {
            **_layout(),
            "xaxis": _axis(self.x, self.log_x) | self._named_ticks(),
            "yaxis": _axis(self.y, self.log_y) | ({"rangemode": "tozero"} if self.from_zero else {}),
            "showlegend": sum(bool(series.name) for series in self.series) > 1,
            "barmode": "group",
        }
        return {"data": traces, "layout": layout}

    def _named_ticks(self) -> dict[str, Any]:
        return {} if self.ticks is None else {"tickvals": list(self.ticks), "ticktext": list(self.ticks.values())}

    def draw(self, axes: Any) -> None:
        """On matplotlib axes."""
        words = [s for s in self.series if s.kind == "bars" and len(s.x) and isinstance(s.x[0], str)]
        for series in self.series:
            _DRAW[series.kind](axes, series, words)
        axes.set(xlabel=_mathtext(self.x), ylabel=_mathtext(self.y))
        if self.ticks is not None:
            axes.set_xticks(list(self.ticks), [_mathtext(name) for name in self.ticks.values()])
            axes.grid(axis="x", color=GRID, linewidth=0.6)
        if self.log_x:
            axes.set_xscale("log")
        if self.log_y:
            axes.set_yscale("log")
        if self.from_zero:
            axes.set_ylim(bottom=0)
        if words:
            axes.set_xticks(range(len(words[0].x)), [_mathtext(str(x)) for x in words[0].x], rotation=40, ha="right")
        if sum(bool(series.name) for series in self.series) > 1:
            axes.legend(frameon=False, fontsize=7, handlelength=1.4)


@dataclass
class PeriodicTable:
    """A number per element, as colours on the periodic table. `values`: by atomic number."""

    name: str
    title: str
    values: Mapping[int, float]
    label: str
    diverging: bool = False
    note: str = ""

    def to_plotly(self) -> dict[str, Any]:
        numbers = list(range(1, 119))
        places = [place(z) for z in numbers]
        known = np.array([self.values.get(z, np.nan) for z in numbers])
        low, high = self._limits(known)
        scale = DIVERGING if self.diverging else SEQUENTIAL
        shared = {"type": "bar", "width": 0.94, "textposition": "inside", "insidetextanchor": "middle"}
        shared |= {"textangle": 0, "showlegend": False, "hovertemplate": "%{customdata}<extra></extra>"}
        traces = []
        for there in (False, True):
            rows = [i for i in range(118) if np.isfinite(known[i]) == there]
            marker: dict[str, Any] = {"color": FAINT, "line": {"color": FAINT, "width": 1}}
            if there:
                marker |= {"color": known[rows].tolist(), "cmin": low, "cmax": high, "showscale": True}
                marker |= {"colorscale": [[i / (len(scale) - 1), c] for i, c in enumerate(scale)]}
                marker |= {"colorbar": _colorbar(self.label)}
            shades = ["#B4BAC3" if not there else _ink((known[i] - low) / (high - low), self.diverging) for i in rows]
            traces.append(
                shared
                | {
                    "x": [places[i][0] for i in rows],
                    "y": [0.94] * len(rows),
                    "base": [-places[i][1] - 0.47 for i in rows],
                    "text": [SYMBOLS[numbers[i]] for i in rows],
                    "customdata": [f"{SYMBOLS[numbers[i]]}: {known[i]:.3g}" if there else "" for i in rows],
                    "insidetextfont": {"color": shades, "size": 11},
                    "marker": marker,
                }
            )
        hidden = {"visible": False, "fixedrange": True}
        layout = _layout() | {"barmode": "overlay", "margin": {"l": 4, "r": 4, "t": 6, "b": 46}}
        return {
            "data": traces,
            "layout": layout | {"xaxis": hidden | {"range": [0.4, 18.6]}, "yaxis": hidden | {"range": [-9.9, -0.4]}},
        }

    def draw(self, axes: Any) -> None:
        """On matplotlib axes."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize
        from matplotlib.patches import Rectangle

        known = np.array([self.values.get(z, np.nan) for z in range(1, 119)])
        low, high = self._limits(known)
        colors = LinearSegmentedColormap.from_list("cfrl", DIVERGING if self.diverging else SEQUENTIAL)
        norm = Normalize(low, high)
        for z, value in enumerate(known, 1):
            x, y = place(z)
            there = np.isfinite(value)
            face = colors(norm(value)) if there else "#FAFBFC"
            axes.add_patch(Rectangle((x - 0.47, -y - 0.47), 0.94, 0.94, facecolor=face, edgecolor=GRID, linewidth=0.4))
            shade = _ink(norm(value), self.diverging) if there else "#B4BAC3"
            axes.text(x, -y, SYMBOLS[z], ha="center", va="center", fontsize=5.5, color=shade)
        axes.set(xlim=(0.4, 18.6), ylim=(-9.9, -0.4), aspect="equal")
        axes.axis("off")
        bar = axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, orientation="horizontal", fraction=0.04)
        bar.set_label(self.label)
        bar.outline.set_visible(False)

    def _limits(self, known: np.ndarray) -> tuple[float, float]:
        """Ends of the colour scale; about zero when diverging."""
        finite = known[np.isfinite(known)]
        high = float(np.abs(finite).max()) if len(finite) and np.abs(finite).max() > 0 else 1.0
        return (-high, high) if self.diverging else (0.0, high)


def place(number: int) -> tuple[float, float]:
    """Column 1..18 and row 1..9.4 of an element; lanthanides and actinides stand below the table."""
    if 57 <= number <= 71:
        return number - 57 + 3, 8.4
    if 89 <= number <= 103:
        return number - 89 + 3, 9.4
    noble = (2, 10, 18, 36, 54, 86, 118)  # the end of each row
    row = next(i for i, last in enumerate(noble) if number <= last)
    from_left = number - (noble[row - 1] if row else 0)
    return (from_left if from_left <= min(row + 1, 2) else 18 - (noble[row] - number)), row + 1


def histogram(
    name: str, title: str, x: str, groups: Mapping[str, np.ndarray], bins: int = 40, note: str = ""
) -> Figure | None:
    """Densities of one quantity in several groups over the same bins, 1st to 99th percentile; None without data."""
    groups = {label: values[np.isfinite(values)] for label, values in groups.items()}
    groups = {label: values for label, values in groups.items() if len(values)}
    if not groups:
        return None
    everything = np.concatenate(list(groups.values()))
    low, high = np.percentile(everything, [1, 99])
    if (everything == everything.round()).all() and high - low <= 60:
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    figure = Figure(name, title, x, "share of crystals", note=note)
    colors = (GREY, BLUE, ORANGE, GREEN) if len(groups) > 1 else (BLUE,)
    for (label, values), color in zip(groups.items(), colors, strict=False):
        counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        figure.series.append(Series(edges, counts / len(values), f"{label} (n = {len(values):,})", "steps", color))
    return figure


def save(figure: Figure | PeriodicTable, folder: Path) -> list[Path]:
    """`<name>.png` (300 dpi) and `<name>.svg` in the folder; the page's own title is left to the caption."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    style = {"font.size": 8, "font.family": "sans-serif", "axes.linewidth": 0.6, "svg.fonttype": "none"}
    style |= {"font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"], "axes.spines.top": False}
    style |= {"axes.spines.right": False, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "lines.linewidth": 1.2}
    size = (7.0, 3.9) if isinstance(figure, PeriodicTable) else _SIZE
    paths = []
    with mpl.rc_context(style):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        figure.draw(canvas.subplots())
        for ending in ("png", "svg"):
            paths.append(folder / f"{figure.name}.{ending}")
            with atomic_file(paths[-1]) as temp:
                canvas.savefig(temp, format=ending, dpi=300)
    return paths


# ---- plotly ------------------------------------------------------------------------------------------------------


def _layout() -> dict[str, Any]:
    return {
        "font": {"family": "Inter, system-ui, Segoe UI, Helvetica, Arial, sans-serif", "size": 13, "color": INK},
        "margin": {"l": 62, "r": 16, "t": 10, "b": 52},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "hovermode": "closest",
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "font": {"size": 12}},
        "bargap": 0.25,
    }


def _axis(title: str, log: bool) -> dict[str, Any]:
    style = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": "#9AA5B1", "ticks": "outside", "ticklen": 4}
    kind = {"type": "log"} if log else {}
    return {"title": {"text": title, "standoff": 8}, "automargin": True, "showline": True, **style, **kind}


def _colorbar(label: str) -> dict[str, Any]:
    title = {"text": label, "side": "top", "font": {"size": 12}}
    return {
        "orientation": "h",
        "title": title,
        "thickness": 9,
        "len": 0.5,
        "y": -0.02,
        "yanchor": "top",
        "outlinewidth": 0,
    }


def _plain(values: Any) -> list:
    """For JSON: NaN and infinities become gaps."""
    items = (value.item() if hasattr(value, "item") else value for value in values)
    return [None if isinstance(item, float) and not np.isfinite(item) else item for item in items]


def _hover(series: Series) -> dict[str, Any]:
    if series.text is None:
        return {}
    return {"text": list(series.text), "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>"}


def _line(s: Series) -> list[dict[str, Any]]:
    line = {"color": s.color, "width": 2, **({"dash": "dash"} if s.dash else {})}
    base = {"type": "scatter", "x": _plain(s.x), "y": _plain(s.y), "name": s.name, "line": line, "mode": "lines"}
    return [base | {"showlegend": bool(s.name)} | _hover(s)]


def _points(s: Series) -> list[dict[str, Any]]:
    marker = {"color": s.color, "size": 5, "opacity": 0.55 if len(s.x) > 300 else 0.85}
    base = {"type": "scatter", "x": _plain(s.x), "y": _plain(s.y), "name": s.name, "mode": "markers", "marker": marker}
    return [base | _hover(s)]


def _steps(s: Series) -> list[dict[str, Any]]:
    y = [*s.y, s.y[-1]]
    line = {"color": s.color, "width": 1.5, "shape": "hv"}
    fill = {"fill": "tozeroy", "fillcolor": _faint(s.color), "mode": "lines"}
    return [{"type": "scatter", "x": _plain(s.x), "y": _plain(y), "name": s.name, "line": line, **fill}]


def _bars(s: Series) -> list[dict[str, Any]]:
    base = {"type": "bar", "x": _plain(s.x), "y": _plain(s.y), "name": s.name, "marker": {"color": s.color}}
    return [base | _hover(s)]


_TRACES = {"line": _line, "points": _points, "steps": _steps, "bars": _bars}


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _ink(value: float, diverging: bool) -> str:
    """Readable on the colour of a value scaled to 0..1."""
    return "#FFFFFF" if (abs(value - 0.5) > 0.36 if diverging else value > 0.55) else INK


# ---- matplotlib --------------------------------------------------------------------------------------------------


def _draw_line(axes: Any, s: Series, words: list[Series]) -> None:
    axes.plot(s.x, s.y, color=s.color, label=_mathtext(s.name), linestyle="--" if s.dash else "-")


def _draw_points(axes: Any, s: Series, words: list[Series]) -> None:
    many = len(s.x) > 300
    style = {"color": s.color, "s": 4 if many else 9, "alpha": 0.5 if many else 0.85, "linewidths": 0}
    axes.scatter(s.x, s.y, label=_mathtext(s.name), rasterized=many, **style)


def _draw_steps(axes: Any, s: Series, words: list[Series]) -> None:
    axes.stairs(s.y, s.x, color=s.color, fill=True, alpha=0.18)
    axes.stairs(s.y, s.x, color=s.color, label=_mathtext(s.name), linewidth=1.2)


def _draw_bars(axes: Any, s: Series, words: list[Series]) -> None:
    if not words:
        axes.bar(s.x, s.y, color=s.color, label=_mathtext(s.name))
        return
    width = 0.8 / len(words)
    place = next(i for i, other in enumerate(words) if other is s)
    centre = np.arange(len(s.x)) + (place - (len(words) - 1) / 2) * width
    axes.bar(centre, s.y, width, color=s.color, label=_mathtext(s.name))


_DRAW = {"line": _draw_line, "points": _draw_points, "steps": _draw_steps, "bars": _draw_bars}


def _mathtext(label: str) -> str:
    """The few HTML tags that labels use, for matplotlib."""
    label = re.sub(r"<sub>(.*?)</sub>", r"$_{\\mathrm{\1}}$", label)
    return re.sub(r"<i>(.*?)</i>", r"$\1$", label)

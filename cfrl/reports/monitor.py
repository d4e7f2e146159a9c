"""What one sees of a fine-tuning run: live figures while it runs, plots and a summary when it ends.

Everything shown is read from the run folder's files or from the metrics of a step; nothing here changes a run.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table

from cfrl.crystals.fingerprint import varied
from cfrl.files import atomic_file
from cfrl.io.storage import read_columns, read_crystals
from cfrl.model.transformer import FACTORS
from cfrl.reports.figures import PALETTE, Figure, Series, save
from cfrl.reports.pareto import pareto
from cfrl.reports.reading import reward_terms
from cfrl.rl.makeup import MAKEUP, halved
from cfrl.runs.folder import RunFolder
from cfrl.tables import read_csv

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40  # characters of a sparkline
STAGES = ("sample", "score", "likelihood", "update")
BEST = 8  # crystals listed in the summary


class Live:
    """A table that follows the run in a terminal; elsewhere one line per step.

    Args:
        run: shown by its path.
        steps: of the whole run.
        quiet: show nothing.
    """

    def __init__(self, run: RunFolder, steps: int, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self.path, self.steps = run.path, steps
        self.history: dict[str, list[float]] = defaultdict(list)
        self._live = RichLive(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._last = time.monotonic()

    def __enter__(self) -> Live:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show one step."""
        now = time.monotonic()
        self.history["seconds/step"].append(now - self._last)
        self._last = now
        for name, value in metrics.items():
            self.history[name].append(value)
        if self._live:
            self._live.update(self._table(step, metrics), refresh=True)
        else:
            m = metrics
            self.console.print(
                f"step {step}/{self.steps}  reward {m['reward/mean']:.4g} (median {m['reward/median']:.4g})"
                f"  kl {m['kl']:.2f}  valid {m['valid']:.0%}  scored {m['scored']:.0%}  unique {m['unique']:.0%}"
                f"  {self.history['seconds/step'][-1]:.1f} s ({stage_seconds(metrics)})",
                soft_wrap=True,
            )

    def _table(self, step: int, metrics: Mapping[str, float]) -> Table:
        table = Table(title=f"step {step} of {self.steps}   {self.path}", title_justify="left", box=None)
        for heading, justify in (("", "left"), ("first", "right"), ("now", "right"), ("", "left")):
            table.add_column(heading, justify=justify)
        shown = [
            "reward/mean",
            "reward/median",
            *(f"reward/{term}" for term in reward_terms(self.history)),
            "kl",
            "beta",
            "ratio",
            "clip_fraction",
        ]
        shown += ["valid", "scored", "unique", "new", "chemical_systems", "effective_space_groups"]
        shown += [f"entropy/{name}" for name in FACTORS] + ["validation/loss"]
        for name in shown:
            if values := self.history.get(name):
                table.add_row(name, f"{values[0]:.4g}", f"{values[-1]:.4g}", sparkline(values))
        table.add_row("seconds", "", f"{self.history['seconds/step'][-1]:.1f}", stage_seconds(metrics))
        return table


def stage_seconds(metrics: Mapping[str, float]) -> str:
    """`sample 0.31, score 0.82, ...`: time by stage; the first two overlap where crystals come in several lots."""
    return ", ".join(f"{stage} {metrics[f'seconds/{stage}']:.2f}" for stage in STAGES if f"seconds/{stage}" in metrics)


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Bars of the values' course, averaged into at most `width` columns; a gap where all are NaN."""
    columns = [np.array(part) for part in np.array_split(np.asarray(values, dtype=float), min(width, len(values)))]
    means = [float(part[np.isfinite(part)].mean()) if np.isfinite(part).any() else math.nan for part in columns]
    known = [m for m in means if math.isfinite(m)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((m - low) * scale)] if math.isfinite(m) else " " for m in means)


# ---- plots -------------------------------------------------------------------------------------------------------


def plot(run: RunFolder) -> None:
    """`progress.png`: courses of the run; `pareto.png` where the reward weighs two quantities."""
    m = {name: np.array(values) for name, values in run.metrics().items()}
    terms = reward_terms(m)
    panels = {
        "reward": {"reward/mean": "mean", "reward/median": "median"},
        **{term: {f"reward/{term}": ""} for term in terms},
        "KL (nats)": {"kl": "all", **{f"kl/{name}": name for name in FACTORS}},
        "entropy (nats per crystal)": {f"entropy/{name}": name for name in FACTORS},
        "share of a batch": {name: name for name in ("valid", "scored", "unique", "new")},
        "space groups": {"space_groups": "in the batch", "effective_space_groups": "effective"},
        "clipped": {"clip_fraction": ""},
        "validation loss (nats)": {"validation/loss": ""},
        "seconds per step": {f"seconds/{stage}": stage for stage in STAGES},
    }
    figures = []
    for label, lines in panels.items():
        known = [(text, m[name]) for name, text in lines.items() if name in m and np.isfinite(m[name]).any()]
        series = [Series(m["step"], y, text, "line", color) for (text, y), color in zip(known, PALETTE, strict=False)]
        figures += [Figure("", "", "step", label, series)] if series else []
    if figures:
        _save_panels(figures, run.path / "progress.png")
    fresh = {name: run.path / f"{name}.h5" for name in ("before", "after")}
    columns = {name: read_columns(path) for name, path in fresh.items() if path.exists()}
    for figure in pareto(columns, terms) if len(columns) == 2 else []:
        save(figure, run.path)


def _save_panels(figures: Sequence[Figure], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = min(3, len(figures))
    rows = math.ceil(len(figures) / columns)
    canvas = Canvas(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(canvas)
    for place, figure in enumerate(figures, 1):
        figure.draw(canvas.add_subplot(rows, columns, place))
    with atomic_file(path) as temp:
        canvas.savefig(temp, format="png", dpi=130)


# ---- summary -----------------------------------------------------------------------------------------------------


def summarise(run: RunFolder) -> None:
    """Print fresh crystals before and after, the best crystals of the run, and where everything lies."""
    console = Console(highlight=False)
    if (run.path / "after.h5").exists():
        console.print(_comparison(run))
    made = shares_of(run)
    if made:
        console.print(_makeup(made))
        count = len(read_columns(run.path / "after.h5", ["reward"])["reward"])
        for name in halved(made, count):
            console.print(f"Warning: less than half is left of {name}: {made[name][0]:.0%} -> {made[name][1]:.0%}.")
    if (run.path / "rollouts.h5").exists():
        console.print(_best(run))
    means = {name: float(np.mean(values)) for name, values in run.metrics().items() if values}
    console.print(f"Seconds per step: {stage_seconds(means)}")
    for path in sorted(run.path.glob("*")):
        if path.suffix in (".safetensors", ".h5", ".csv", ".png"):
            console.print(f"  {path}", soft_wrap=True)
    if (run.path / "report.html").exists():
        console.print(f"Look at {run.path / 'report.html'} in a browser.", soft_wrap=True)


def _comparison(run: RunFolder) -> Table:
    before, after = (read_columns(run.path / name) for name in ("before.h5", "after.h5"))
    n = len(after["reward"])
    table = Table(title=f"{n} fresh crystals of each model", title_justify="left", box=None)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    hidden = {"split", "status", "ids", "valid", "reward"}
    rows = [("valid", np.mean, "valid", "{:.0%}"), ("reward, mean", np.nanmean, "reward", "{:.4g}")]
    rows += [("reward, median", np.nanmedian, "reward", "{:.4g}")]
    rows += [(f"{name}, median", np.nanmedian, name, "{:.4g}") for name in after if name not in hidden]
    for label, function, name, form in rows:
        values = [columns[name] for columns in (before, after)]
        if all(np.isfinite(v).any() for v in values):
            table.add_row(label, *(form.format(function(v)) for v in values))
    return table


def shares_of(run: RunFolder) -> dict[str, tuple[float, float]]:
    """What the fresh crystals of a run are made of, before and after; empty where none were drawn."""
    if not (run.path / MAKEUP).exists():
        return {}
    columns = read_csv(run.path / MAKEUP)
    return dict(zip(columns["share_of"], zip(columns["before"], columns["after"], strict=True), strict=True))


def _makeup(made: dict[str, tuple[float, float]]) -> Table:
    table = Table(title="What they are made of", title_justify="left", box=None)
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, shares in made.items():
        table.add_row(name, *(f"{share:.0%}" for share in shares))
    return table


def _best(run: RunFolder) -> Table:
    columns = read_columns(run.path / "rollouts.h5")
    scored = np.flatnonzero(columns["status"] == "")
    order = scored[np.argsort(-columns["reward"][scored], kind="stable")]
    crystals = read_crystals(run.path / "rollouts.h5")
    order = order[: 50 * BEST]
    best = order[varied(crystals[order])][:BEST]
    formulas = crystals[best].formulas()
    terms = [name for name in columns if name not in _BOOKKEEPING]
    table = Table(
        title="Best crystals of the run, one of each formula and each prototype", title_justify="left", box=None
    )
    for heading in ("formula", "space group", "reward", *terms, "step"):
        table.add_column(heading, justify="left" if heading == "formula" else "right")
    for formula, row in zip(formulas, best, strict=True):
        values = [f"{columns[name][row]:.4g}" for name in ("reward", *terms)]
        table.add_row(formula, str(int(crystals.space_group[row])), *values, f"{columns['step'][row]:.0f}")
    return table


_BOOKKEEPING = {"split", "status", "ids", "valid", "reward", "step", "log_prob", "log_prob_base"}

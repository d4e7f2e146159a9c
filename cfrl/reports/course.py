"""Metrics over the steps of a run; the whole report of a command that has no page of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cfrl.reports.figures import PALETTE, Figure, Series
from cfrl.reports.labels import label
from cfrl.reports.page import Page
from cfrl.reports.reading import command, metrics
from cfrl.runs.folder import RunFolder


def metrics_page(run: RunFolder) -> Page:
    """Every metric that was logged, grouped by the word before the slash."""
    page = Page.of(run, f"cfrl {command(run)}".strip())
    logged = metrics(run)
    groups: dict[str, dict[str, str]] = {}
    for name in logged:
        group, _, part = name.partition("/")
        if name != "step":
            groups.setdefault(group, {})[name] = part or group
    page.heading("Course of the run")
    page.add_figures(*(course(logged, group, label(group), label(group), names) for group, names in groups.items()))
    return page


def course(
    metrics: Mapping[str, np.ndarray], name: str, title: str, axis: str, shown: Mapping[str, str], note: str = ""
) -> Figure | None:
    """Metrics over steps (metric -> name in the legend); None where none of them was logged."""
    present = [metric for metric in shown if metric in metrics and np.isfinite(metrics[metric]).any()]
    if not present:
        return None
    figure = Figure(name, title, "step", axis, note=note)
    for metric, color in zip(present, PALETTE * 3, strict=False):
        known = np.isfinite(metrics[metric])
        figure.series.append(Series(metrics["step"][known], metrics[metric][known], shown[metric], "line", color))
    return figure

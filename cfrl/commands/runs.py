"""`cfrl runs`: lists the runs of a folder, or holds two against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cfrl.errors import UserError
from cfrl.runs.folder import RunFolder
from cfrl.untrusted import read_json, read_toml

ROOT = "runs"
# What the last row of metrics.csv is judged by, for each command.
FIGURES = {"finetune": ("reward/mean", "reward/median", "kl"), "pretrain": ("validation/loss", "train/loss")}


def show_runs(names: list[str], console: Console, root: str | Path = ROOT) -> None:
    """All runs under `root`, newest last; or, of two that are named, what differs.

    Raises:
        UserError: no run there, or another number of names.
    """
    if not names:
        _list(list(find_runs(root)), root, console)
    elif len(names) == 2:
        _compare(*(_named(name, root) for name in names), console)
    else:
        raise UserError("name no run, to list them all, or two, to compare them")


def find_runs(root: str | Path = ROOT) -> Iterator[RunFolder]:
    """Run folders in the order of their names, which is that of their making."""
    for config in sorted(Path(root).glob("*/config.toml")):
        if RunFolder(config.parent).command:
            yield RunFolder(config.parent)


def _named(name: str, root: str | Path) -> RunFolder:
    path = Path(name)
    return RunFolder.open(path if path.exists() else Path(root) / name)


def settings_of(run: RunFolder) -> dict[str, Any]:
    """What its config.toml says; nothing where that cannot be read."""
    try:
        document = read_toml(run.path / "config.toml")
    except UserError:
        return {}
    return {name: value for table in document.values() if isinstance(table, dict) for name, value in table.items()}


def status_of(run: RunFolder) -> str:
    """finished, at work (another process holds it), or stopped."""
    if run.finished:
        return "finished"
    try:
        with run.locked():
            return "stopped"
    except (UserError, OSError):
        return "at work"


def figures_of(run: RunFolder) -> dict[str, float]:
    """The last figures of a run, by name."""
    if run.command in FIGURES:
        metrics = run.metrics()
        last = {name: metrics[name][-1] for name in FIGURES[run.command] if len(metrics.get(name, ()))}
        return {"step": metrics["step"][-1], **last} if last else {}
    try:
        if run.command == "screen":
            funnel = read_json(run.path / "summary.json")["funnel"]
            return {name: funnel[name] for name in ("all", "candidates") if name in funnel}
        if run.command == "retrieve":
            result = read_json(run.path / "retrieval.json")
            verdicts = result.get("verdicts") or [{}]
            found = {"correlation": result["correlation"]["all"], "ROC AUC": verdicts[0].get("auc")}
            return {name: value for name, value in found.items() if value is not None}
    except (UserError, OSError, KeyError, TypeError, json.JSONDecodeError):
        pass
    return {}


def _list(runs: list[RunFolder], root: str | Path, console: Console) -> None:
    if not runs:
        raise UserError(f"{root}: there is no run yet")
    table = Table("run", "for", "status", "last figures", title=f"{len(runs)} runs in {root}/", title_justify="left")
    for run in runs:
        settings = settings_of(run)
        aim = settings.get("reward") if run.command == "finetune" else settings.get("dataset") or run.source
        table.add_row(run.path.name, str(aim or ""), status_of(run), _text(figures_of(run)))
    console.print(table, highlight=False)


def _compare(one: RunFolder, other: RunFolder, console: Console) -> None:
    heads = ("", one.path.name, other.path.name)
    for title, values in (("settings that differ", settings_of), ("last figures", figures_of)):
        a, b = values(one), values(other)
        rows = [name for name in {**a, **b} if values is figures_of or a.get(name) != b.get(name)]
        table = Table(*heads, title=title, title_justify="left")
        for name in rows:
            table.add_row(name, *(_value(each.get(name)) for each in (a, b)))
        console.print(table, highlight=False)


def _text(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in figures.items())


def _value(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)

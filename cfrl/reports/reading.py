"""What reports read of a run folder."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tomli

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io.storage import read_crystals
from cfrl.runs.folder import RunFolder
from cfrl.untrusted import read_json, read_text

_NAMES = ("id", "known_as", "duplicate_of")  # text, also where every one of them looks like a number


def settings(run: RunFolder) -> dict[str, dict[str, Any]]:
    """What `config.toml` holds: command -> settings."""
    return tomli.loads(read_text(run.path / "config.toml"))


def command(run: RunFolder) -> str:
    """The command that made the run; a folder may have been renamed, but its settings bear the command's name."""
    return next(iter(settings(run)), run.command)


def read_result(path: Path) -> dict[str, Any]:
    """A JSON file that a run writes at its end. Raises UserError where it is not there."""
    return read_json(_there(path))


def read_csv(path: Path) -> dict[str, list[Any]]:
    """Columns; numbers where all of a column are (empty: NaN). Raises UserError where there is no file."""
    with open(_there(path), newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    columns = {name: [row[i] for row in rows] for i, name in enumerate(head)}
    return {name: words if name in _NAMES else _typed(words) for name, words in columns.items()}


def crystals_if_any(path: Path) -> CrystalBatch:
    """Of a file that a run need not have."""
    return read_crystals(path) if path.is_file() else CrystalBatch.empty()


def metrics(run: RunFolder) -> dict[str, np.ndarray]:
    """Name -> its course. Raises UserError for a run that has logged nothing."""
    columns = {name: np.array(values) for name, values in run.metrics().items()}
    if not len(columns.get("step", ())):
        raise UserError(f"{run.path}: has no metrics yet; there is nothing to report")
    return columns


def reward_terms(metrics: Mapping[str, object]) -> list[str]:
    """Terms of the reward, their spreads and parts, of which there are metrics `reward/<term>`."""
    summary = ("mean", "median", "std", "max")
    return [name[7:] for name in metrics if name.startswith("reward/") and name[7:] not in summary]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; did the run come to its end?")
    return path


def _typed(words: list[str]) -> list[Any]:
    try:
        return [float(word) if word else math.nan for word in words]
    except ValueError:
        return words

"""What reports read of a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError
from cfrl.io.storage import read_crystals
from cfrl.runs.folder import RunFolder
from cfrl.untrusted import read_json, read_toml


def settings(run: RunFolder) -> dict[str, dict[str, Any]]:
    """What `config.toml` holds: command -> settings."""
    return read_toml(run.path / "config.toml")


def command(run: RunFolder) -> str:
    """The command that made the run; a folder may have been renamed, but its settings bear the command's name."""
    return next(iter(settings(run)), run.command)


def read_result(path: Path) -> dict[str, Any]:
    """A JSON file that a run writes at its end. Raises UserError where it is not there."""
    return read_json(_there(path))


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

"""Run folders: what one command leaves behind under `runs/`.

    runs/20260131-142507-finetune-ehull/
        config.toml      the resolved settings: defaults, cfrl.toml and flags together, also those of --resume
        run.json         command line, version, git revision, date
        input.txt        what the command works on, where that is not among its settings
        metrics.csv      one row per logged step; grows line by line, so a kill loses nothing that was logged
        checkpoint.pt    everything that is needed to go on; replaced atomically
        finished         exists once the command has come to its end
        .lock            held by the process that is at work on the run

Weights, rollouts and plots are the commands' own affair. Plots of metrics: `report.py`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cfrl.errors import UserError
from cfrl.files import atomic_file, locked, provenance, write_problem
from cfrl.settings import to_toml
from cfrl.untrusted import check_weights, fitting, read_checkpoint, read_text

_INPUT = "input.txt"
_NAME = re.compile(r"(?P<stamp>\d{8}-\d{6})-(?P<command>[a-z]+)(-(?P<tag>.+))?$")


class RunFolder:
    """A folder of one run. Make it with `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics_file: io.TextIOWrapper | None = None
        self._columns: list[str] = []
        self._board: Any = None

    @classmethod
    def create(
        cls,
        command: str,
        tag: str | None = None,
        config: Any = None,
        root: str | Path = "runs",
        path: str | Path | None = None,
        source: str | None = None,
    ) -> RunFolder:
        """A new folder `root/<date>-<time>-<command>[-<tag>]`, with the settings (a dataclass) in `config.toml`.

        `path` names the folder instead; `source` is what `RunFolder.source` will say. The settings are written last:
        without them a folder is no run, so that a kill on the way leaves nothing to go on with, or all of it.

        Raises:
            UserError: it cannot be made, or `path` holds something already.
        """
        tag = re.sub(r"[^\w.+]+", "_", tag or "").strip("_")[:80]
        path = _named_folder(Path(path)) if path else _new_folder(Path(root), f"{command}-{tag}" if tag else command)
        run = cls(path)
        with atomic_file(path / "run.json") as temp:
            temp.write_text(json.dumps(provenance(), indent=2) + "\n", encoding="utf-8")
        if source:
            with atomic_file(path / _INPUT) as temp:
                temp.write_text(source + "\n", encoding="utf-8")
        run.write_config(command, config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            UserError: there is none at `path`.
        """
        path = Path(path)
        if not (path / "config.toml").is_file():
            raise UserError(f"{path}: is not a run folder (there is no config.toml in it)")
        return cls(path)

    def write_config(self, command: str, config: Any = None) -> None:
        """Replace `config.toml` by the settings (a dataclass) of `command`."""
        with atomic_file(self.path / "config.toml") as temp:
            temp.write_text(to_toml({command: config} if config is not None else {}), encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from this run.

        Raises:
            UserError: another process is at work on the run.
        """
        with locked(self.path / ".lock", f"{self.path}: another process is at work on this run"):
            yield

    @property
    def command(self) -> str:
        """The command that made the run, from the folder's name ("" for a renamed folder)."""
        match = _NAME.match(self.path.name)
        return match["command"] if match else ""

    @property
    def source(self) -> str | None:
        """What the command works on, where that was noted."""
        path = self.path / _INPUT
        return read_text(path).strip() if path.exists() else None

    @property
    def finished(self) -> bool:
        """Whether the command came to its end; otherwise it was interrupted, or still runs."""
        return (self.path / "finished").exists()

    def finish(self) -> None:
        """Mark the run as complete and close its files."""
        self.close()
        with atomic_file(self.path / "finished") as temp:
            temp.write_text(provenance()["date"] + "\n", encoding="utf-8")

    # Metrics

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one row to `metrics.csv`, and to TensorBoard where it is installed.

        New names may appear at any time; the file is then rewritten with a wider header.
        """
        if self._metrics_file is None:
            self._open_metrics(self._read_rows())
        new = [name for name in metrics if name not in self._columns]
        if new:
            self._open_metrics(self._read_rows(), new)
        values = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        try:
            self._metrics_file.write(_csv_line([values.get(name, "") for name in self._columns]))
        except OSError as error:
            raise UserError(write_problem(self.path / "metrics.csv", error)) from error
        self._to_tensorboard(step, metrics)

    def metrics(self) -> dict[str, list[float]]:
        """Columns of `metrics.csv`; NaN where a row does not have a value. Empty before the first row."""
        with fitting(self.path / "metrics.csv"):
            columns, rows = self._read_rows()
            return {name: [_number(row[i]) for row in rows] for i, name in enumerate(columns)}

    def truncate(self, step: int) -> None:
        """Forget the rows after `step`: a resumed run writes them again."""
        with fitting(self.path / "metrics.csv"):
            columns, rows = self._read_rows()
            rows = [row for row in rows if _number(row[0]) <= step]
        self._open_metrics((columns, rows))
        self._close_tensorboard()
        self._board = self._tensorboard(purge_step=step + 1)

    def close(self) -> None:
        """Close the metrics file and TensorBoard; `log` opens them again."""
        if self._metrics_file is not None:
            self._metrics_file.close()
        self._metrics_file = None
        self._close_tensorboard()

    def _read_rows(self) -> tuple[list[str], list[list[str]]]:
        """Header and complete rows; a line cut off by a kill is left out."""
        path = self.path / "metrics.csv"
        if not path.exists():
            return ["step"], []
        whole_lines = read_text(path).rpartition("\n")[0]
        header, *rows = list(csv.reader(io.StringIO(whole_lines))) or [["step"]]
        return header, [row for row in rows if len(row) == len(header)]

    def _open_metrics(self, table: tuple[list[str], list[list[str]]], new: Sequence[str] = ()) -> None:
        """Rewrite `metrics.csv` with the columns `new` added, and go on appending to it line by line."""
        columns, rows = table
        if self._metrics_file is not None:
            self._metrics_file.close()
        self._columns = [*columns, *new]
        path = self.path / "metrics.csv"
        with atomic_file(path) as temp:
            lines = [self._columns, *(row + [""] * len(new) for row in rows)]
            temp.write_text("".join(map(_csv_line, lines)), encoding="utf-8")
        self._metrics_file = path.open("a", buffering=1, encoding="utf-8", newline="")

    def _tensorboard(self, purge_step: int | None = None) -> Any:
        """A writer, or False where tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return False
        return SummaryWriter(str(self.path / "tensorboard"), purge_step=purge_step)

    def _to_tensorboard(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._board is None:
            self._board = self._tensorboard()
        if self._board:
            for name, value in metrics.items():
                self._board.add_scalar(name, float(value), step)

    def _close_tensorboard(self) -> None:
        if self._board:
            self._board.close()
        self._board = None

    # Checkpoints

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace `checkpoint.pt` by `state`: tensors and plain Python values, in dicts and lists."""
        import torch

        with atomic_file(self.path / "checkpoint.pt") as temp, temp.open("wb") as file:
            torch.save(state, file)  # given a path, it would not say why it fails

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state that was saved last, on the CPU; None where there is none.

        Raises:
            UserError: the file is damaged, holds more than tensors and plain values, or NaN among its weights.
        """
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        state = read_checkpoint(path)
        check_weights({name: state.get(name) for name in ("model", "average", "optimizer", "optimiser")}, path)
        return state


def newest_run(command: str | Sequence[str], root: str | Path = "runs", holding: str | None = None) -> RunFolder | None:
    """The newest run of `command` (or of one of several), or None.

    Args:
        command: name or names of commands.
        root: the folder of runs.
        holding: only runs that hold this file, e.g. `model.safetensors`.
    """
    commands = [command] if isinstance(command, str) else command
    runs = []
    for config in Path(root).glob("*/config.toml"):
        match = _NAME.match(config.parent.name)
        if match and match["command"] in commands and (config.parent / (holding or "")).exists():
            runs.append((match["stamp"], config.stat().st_mtime_ns, config.parent))
    return RunFolder(max(runs)[2]) if runs else None


def _new_folder(root: Path, name: str) -> Path:
    """`root/<stamp>-<name>`; a taken stamp is moved on by a second, so names stay unique and sorted."""
    stamp = datetime.now()
    while True:
        path = root / f"{stamp:%Y%m%d-%H%M%S}-{name}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            stamp += timedelta(seconds=1)
        except OSError as error:
            raise UserError(f"{path}: cannot be made: {error.strerror}") from error


def _named_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
        begun = {"run.json", _INPUT}  # and hidden temporary files: what a kill in `create` leaves
        if {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - begun:
            raise UserError(f"{path}: is not empty; name another folder, or go on with --resume")
    except OSError as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}") from error
    return path


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _number(text: str) -> float:
    return float(text) if text else math.nan

"""Long work that can be interrupted: the records of every item go to a journal on disk as they come.

A journal is named by all that its records depend on, so going on means: compute what is not in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cfrl.errors import UserError
from cfrl.runs.engine import LOST, Engine
from cfrl.runs.progress import progress_bar
from cfrl.untrusted import read_bytes

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from rich.console import Console

K = TypeVar("K", bound=Hashable)
Record = dict[str, Any]  # what a stage says of one item


def digest(structures: Iterable[Structure]) -> str:
    """Changes with any crystal."""
    sha = hashlib.sha256()
    for s in structures:
        sha.update(s.lattice.matrix.tobytes() + s.frac_coords.tobytes() + s.formula.encode())
    return sha.hexdigest()


class Work:
    """Runs stages on an engine and keeps their results in journals."""

    def __init__(self, folder: Path, engine: Engine, key: str, console: Console | None) -> None:
        self.folder, self.engine, self.key, self.console = folder, engine, key, console
        folder.mkdir(parents=True, exist_ok=True)

    def about(self, structures: Iterable[Structure]) -> Work:
        """The same for other crystals: keys of theirs mean other items."""
        return Work(self.folder, self.engine, digest(structures), self.console)

    def run(
        self,
        name: str,
        function: Callable[[list[Any]], list[Record]],
        items: Mapping[K, Any],
        settings: Mapping[str, Any],
        chunk: int,
    ) -> dict[K, Record]:
        """The records of `items`; those that are in the journal are not computed again.

        Args:
            name: of the stage.
            function: one of `stages.py`, with its settings bound.
            items: what it works on, by row or another name that stays the same.
            settings: everything but the input that the records depend on.
            chunk: items that a worker gets at once.
        """
        text = json.dumps([self.key, name, settings], sort_keys=True)
        journal = Journal(self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl")
        missing = [key for key in items if str(key) not in journal.records]
        chunks = [missing[i : i + chunk] for i in range(0, len(missing), chunk)]
        with journal, progress_bar(f"{name:<12}", len(items), self.console) as progress:
            done = len(items) - len(missing)
            progress(done)
            for index, records in self.engine.map(function, [[items[key] for key in keys] for keys in chunks]):
                journal.add(chunks[index], [record or {"status": LOST} for record in records])
                done += len(records)
                progress(done)
        return {key: journal.records[str(key)] for key in items}


class Journal:
    """Records by key in a file of JSON lines, one line per chunk, written as chunks are done.

    A line that a kill or a full disk cut off is forgotten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        data = read_bytes(path) if path.exists() else b""
        self._end = data.rfind(b"\n") + 1
        for line in data[: self._end].splitlines():
            with suppress(ValueError, RecursionError, AttributeError):  # a damaged line is computed again
                records = json.loads(line).items()
                self.records.update({key: record for key, record in records if isinstance(record, dict)})

    def __enter__(self) -> Journal:
        self._file = self.path.open("ab")
        self._file.truncate(self._end)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, keys: Iterable[Hashable], records: Iterable[Record]) -> None:
        """Raises UserError where it cannot be written."""
        new = {str(key): record for key, record in zip(keys, records, strict=True)}
        try:
            self._file.write(json.dumps(new).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written: {error.strerror}; --resume {self.path.parents[1]} goes on from here"
            ) from error
        self.records.update(new)

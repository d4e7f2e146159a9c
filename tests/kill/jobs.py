"""What is killed: five commands on tiny data, how one goes on with each, and what must come out in the end."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from safetensors.numpy import load_file

from cfrl.commands.finetune import finetune
from cfrl.config import FinetuneConfig
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import read_columns, read_crystals, write_crystals
from cfrl.runs.folder import RunFolder, newest_run
from tests.tiny import SIZES, base_model

GROUPS = "2,139,221,225"  # the untrained model draws crystals with room between their atoms there
CLOCK = ("seconds", "crystals_per_second")  # metrics that differ from run to run


@dataclass
class Result:
    """What a command leaves behind: rows, each of which must be there once, and values, which must be the same."""

    rows: list[str]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One command.

    command: its name in the table.
    arguments: of the first start, made of the folder with the inputs.
    resume: of going on in a case's folder, where there is something to go on with; else it is started again.
    result: what has come out, from a case's folder.
    share: of all kills, in parts.
    lay: puts into a case's folder what an earlier run left there.
    tolerance: relative, of numbers. A resumed relaxation works on other batches, so float32 sums come out otherwise.
    """

    command: str
    arguments: Callable[[Path], list[str]]
    resume: Callable[[Path], list[str] | None]
    result: Callable[[Path], Result]
    share: float
    lay: Callable[[Path, Path], None] = lambda inputs, folder: None
    tolerance: float = 0.0


def prepare(folder: Path) -> None:
    """Inputs of all jobs: real crystals, a tiny untrained model, and a model tuned for two steps."""
    crystals = load_dataset("prototypes")
    small = crystals[crystals.num_sites < SIZES.max_sites]
    write_crystals(folder / "dataset.h5", small[:108], split=[int(i % 9 == 0) for i in range(108)])
    write_crystals(folder / "known.h5", crystals[100:200], columns={"density": crystals[100:200].densities().numpy()})
    write_crystals(folder / "input.h5", crystals[[*range(70), *range(12)]])
    write_crystals(folder / "few.h5", small[small.num_atoms <= 4][:8])
    texts = [structure.to(fmt="cif") for structure in crystals[:60].to_structures()]
    rows = [{"material_id": f"m-{i}", "cif": text, "band_gap": i / 10} for i, text in enumerate(texts)]
    rows.insert(7, {"material_id": "broken", "cif": "no crystal", "band_gap": 1.0})
    for name, copies in (("crystals.csv", 1), ("many.csv", 6)):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows * copies)
    write_crystals(folder / "old.h5", crystals[:3])
    model = str(base_model(folder / "base.safetensors"))
    settings = {"space_group": GROUPS, "min_distance": 0.0, "evaluate": 0, "plots": False, "device": "cpu"}
    config = FinetuneConfig(reward="density", model=model, steps=2, n=16, lr=1e-2, **settings)
    finetune(config, root=folder / "runs", quiet=True).path.rename(folder / "tuned")


# ---- commands ----------------------------------------------------------------------------------------------------


def _import(name: str, workers: int) -> Callable[[Path], list[str]]:
    return lambda inputs: ["data", "import", str(inputs / name), "-o", "out.h5", "--workers", str(workers)]


def _pretrain(inputs: Path) -> list[str]:
    settings = "--epochs 3 --batch-size 16 --augment --checkpoint-minutes 0 --device cpu"
    data, model = str(inputs / "dataset.h5"), str(inputs / "base.safetensors")
    return ["pretrain", "--dataset", data, "--init", model, *settings.split()]


def _finetune(*more: str) -> Callable[[Path], list[str]]:
    settings = "--reward density --steps 4 -n 12 --batch-size 6 --replay 4 --evaluate 8 --min-distance 0 --lr 0.01"
    settings += f" --scale-crystals 64 --space-group {GROUPS} --checkpoint-minutes 0 --device cpu"
    return lambda inputs: ["finetune", "--model", str(inputs / "base.safetensors"), *settings.split(), *more]


def _screen(name: str, *more: str) -> Callable[[Path], list[str]]:
    settings = "--no-stability --rank density --top 20 --no-report --workers 1 --device cpu -o screened"
    return lambda inputs: ["screen", str(inputs / name), "--known", str(inputs / "known.h5"), *settings.split(), *more]


def _retrieve(inputs: Path) -> list[str]:
    settings = "--samples 24 --reward-crystals 20 --top 10 --device cpu"
    return ["retrieve", "--run", str(inputs / "tuned"), "--dataset", str(inputs / "known.h5"), *settings.split()]


def _resume(command: str) -> Callable[[Path], list[str] | None]:
    def go_on(folder: Path) -> list[str] | None:
        return [command, "--resume", "last"] if newest_run(command, folder / "runs") else None

    return go_on


def _resume_screen(folder: Path) -> list[str] | None:
    return ["screen", "--resume", "screened"] if (folder / "screened" / "config.toml").exists() else None


def _old_import(inputs: Path, folder: Path) -> None:
    shutil.copy(inputs / "old.h5", folder / "out.h5")


# ---- results -----------------------------------------------------------------------------------------------------


def _imported(folder: Path) -> Result:
    result = _crystals(folder / "out.h5")
    dropped = (folder / "out.dropped.csv").read_text().splitlines()
    return Result(result.rows + dropped, result.values)


def _pretrained(folder: Path) -> Result:
    run = newest_run("pretrain", folder / "runs")
    metrics = _metrics(run)
    return Result([f"epoch {epoch:g}" for epoch in metrics["epoch"]], metrics | _weights(run) | _finished(run))


def _finetuned(folder: Path) -> Result:
    run = newest_run("finetune", folder / "runs")
    metrics, rollouts = _metrics(run), _crystals(run.path / "rollouts.h5")
    drawn = Counter()
    rows = [f"metrics of step {step:g}" for step in metrics["step"]]
    for step in rollouts.values["step"]:
        rows.append(f"crystal {drawn[step]} of step {step:g}")
        drawn[step] += 1
    values = metrics | _prefixed("rollouts", rollouts.values) | _weights(run) | _finished(run)
    for name in ("before", "after"):
        values |= _prefixed(name, _crystals(run.path / f"{name}.h5").values)
    return Result(rows, values)


def _screened(folder: Path) -> Result:
    run = RunFolder.open(folder / "screened")
    with open(run.path / "table.csv", newline="") as file:
        table = list(csv.DictReader(file))
    values = {name: [row[name] for row in table] for name in table[0]}
    values |= _prefixed("screen.h5", _crystals(run.path / "screen.h5").values)
    values["cifs"] = sorted(path.name for path in (run.path / "cifs").iterdir())
    return Result([row["id"] for row in table], values | _finished(run))


def _retrieved(folder: Path) -> Result:
    run = newest_run("retrieve", folder / "runs", holding="retrieval.json")
    with h5py.File(run.path / "ranking.h5") as file:
        values = {name: file[name][:] for name in file if name != "id"}
        ids = [name.decode() for name in file["id"][:]]
    for name in ("retrieved.csv", "rewards.csv", "met.csv", "discovery.csv", "retrieval.json"):
        values[name] = (run.path / name).read_text()
    return Result(ids, values | _finished(run))


def _metrics(run: RunFolder) -> dict[str, Any]:
    return {name: np.array(values) for name, values in run.metrics().items() if not name.startswith(CLOCK)}


def _weights(run: RunFolder) -> dict[str, Any]:
    return _prefixed("weights", load_file(run.path / "model.safetensors"))


def _finished(run: RunFolder) -> dict[str, Any]:
    return {"finished": run.finished}


def _crystals(path: Path) -> Result:
    crystals = read_crystals(path)
    names = ("space_group", "wyckoff", "species", "frac_coords", "lattice")
    tensors = {name: getattr(crystals, name).numpy() for name in names}
    return Result(list(crystals.ids or []), tensors | read_columns(path))


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}: {name}": value for name, value in values.items()}


def difference(expected: Result, found: Result, tolerance: float) -> str:
    """What is wrong with a result: "lost rows: ...", "wrong result: ..." or ""."""
    want, have = Counter(expected.rows), Counter(found.rows)
    if missing := list((want - have).elements()):
        return f"lost rows: {len(missing)}, first {missing[0]}"
    if more := list((have - want).elements()):
        return f"wrong result: {len(more)} rows too many, first {more[0]}"
    if expected.rows != found.rows:
        return "wrong result: rows in another order"
    if expected.values.keys() != found.values.keys():
        return f"wrong result: {sorted(expected.values.keys() ^ found.values.keys())[0]} is only in one of the two"
    for name, value in expected.values.items():
        if not _same(value, found.values[name], tolerance):
            return f"wrong result: {name} differs"
    return ""


def _same(one: Any, two: Any, tolerance: float) -> bool:
    one, two = (
        np.array(["nan" if word == "" else word for word in v]) if isinstance(v, list) else v for v in (one, two)
    )
    if not isinstance(one, np.ndarray):
        return one == two
    if one.shape != two.shape:
        return False
    if one.dtype.kind not in "fiub":
        try:
            one, two = one.astype(float), two.astype(float)
        except ValueError:
            return bool((one == two).all())
    return bool(np.allclose(one, two, rtol=tolerance, atol=tolerance, equal_nan=True))


# ---- what must hold right after a kill ---------------------------------------------------------------------------


def broken_file(folder: Path) -> str:
    """A file under its final name that cannot be read, or ""."""
    readers = {".h5": lambda p: h5py.File(p).close(), ".safetensors": load_file, ".json": _read_json}
    for path in folder.rglob("[!.]*"):
        if path.suffix in readers:
            try:
                readers[path.suffix](path)
            except Exception as error:
                return f"wrong result: {path.name} is broken: {error}"
    return ""


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def journals(folder: Path) -> dict[Path, bytes]:
    """The complete lines of every journal: work that is done and must not be done again."""
    found = {path: path.read_bytes() for path in folder.rglob("stages/*.jsonl")}
    return {path: data[: data.rfind(b"\n") + 1] for path, data in found.items()}


def forgotten(before: dict[Path, bytes]) -> str:
    """Which journal does not go on where it was, or ""."""
    for path, lines in before.items():
        if not path.exists() or not path.read_bytes().startswith(lines):
            return f"lost rows: {path.name} has been begun anew"
    return ""


def unsaved(output: str, folder: Path) -> str:
    """Of a run that says at which step it stopped: whether its checkpoint is of another step, or ""."""
    stopped = re.search(r"Stopped\s(?:at|after)\sstep\s(\d+)", output)
    if not stopped:
        return ""
    step = newest_run(("pretrain", "finetune"), folder / "runs").load_checkpoint()["step"]
    return "" if step == int(stopped[1]) else f"lost rows: stopped at step {stopped[1]}, saved is step {step}"


JOBS = {
    "import": Job("import", _import("crystals.csv", 1), lambda folder: None, _imported, 4, _old_import),
    "import-pool": Job("import", _import("many.csv", 2), lambda folder: None, _imported, 1, _old_import),
    "pretrain": Job("pretrain", _pretrain, _resume("pretrain"), _pretrained, 8),
    "finetune": Job("finetune", _finetune("--no-plots"), _resume("finetune"), _finetuned, 7),
    "finetune-report": Job("finetune", _finetune(), _resume("finetune"), _finetuned, 1),
    "screen": Job("screen", _screen("input.h5", "--no-relax"), _resume_screen, _screened, 5),
    "screen-relax": Job(
        "screen", _screen("few.h5", "--steps", "2", "--chunk", "2"), _resume_screen, _screened, 1, tolerance=1e-3
    ),
    "retrieve": Job("retrieve", _retrieve, lambda folder: None, _retrieved, 5),
}

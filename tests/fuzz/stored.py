"""What cfrl itself keeps: datasets, hulls, rollouts, run folders; cut, edited, or leading to other files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cfrl.io.storage import read_columns, read_crystals
from cfrl.runs.folder import RunFolder
from cfrl.stability.hull import ReferenceHull
from tests.fuzz.cases import NUMBERS, WORDS, Case, damaged, garbled
from tests.fuzz.seeds import Seeds
from tests.fuzz.structures import stored_problem

SECRET = b"a line of another file"


def case(rng: random.Random, seeds: Seeds) -> Case:
    """A dataset or hull (two in three), or a run folder."""
    return rng.choice((_dataset, _dataset, _dataset, _hull, _hull, _run))(rng, seeds)


def _dataset(rng: random.Random, seeds: Seeds) -> Case:
    shutil.copyfile(seeds.dataset, "known.h5")
    _damage(rng, Path("known.h5"))
    command = rng.choice((*["import"] * 3, "info", "read", "known"))
    names = ["known.h5"]
    if command == "import":
        words = ["data", "import", "known.h5", "-o", "out.h5", "--max-sites", "100"]
        return Case(words, names, check=lambda: stored_problem(Path("out.h5")) or _leaks("out.h5"))
    if command == "info":
        return Case(
            ["data", "info", "known.h5"], names, check=lambda: stored_problem(Path("known.h5"), True) or _leaks()
        )
    if command == "read":
        return Case(
            lambda: (read_crystals("known.h5"), read_columns("known.h5")),
            names,
            check=lambda: stored_problem(Path("known.h5"), drawn=True),
        )
    words = ["pretrain", "--dataset", "known.h5", "--init", str(seeds.model), "--epochs", "1", "--device", "cpu"]
    return Case(words, names, check=lambda: stored_problem(Path("known.h5")))


def _hull(rng: random.Random, seeds: Seeds) -> Case:
    if rng.random() < 0.35:
        rows = "formula,energy_per_atom\nNa,-1.3\nCl,-1.8\nNaCl,-3.4\nNaCl3,-2.5\n"
        name = rng.choice(("hull.csv", "hull.json"))
        entries = [{"composition": {"Na": 1}, "energy": -1.3}, {"composition": {"Na": 1, "Cl": 1.0}, "energy": -7}]
        text = rows if name == "hull.csv" else json.dumps({"entries": entries})
        data = garbled(rng, text).encode("utf-8", "surrogateescape")
        Path(name).write_bytes(damaged(rng, data) if rng.random() < 0.2 else data)
    else:
        name = "hull.h5"
        shutil.copyfile(seeds.hull, name)
        _damage(rng, Path(name))

    def use() -> None:
        hull = ReferenceHull.load(name)
        found.extend(hull.energies)
        hull.e_above_hull(["NaCl", "TiO2", "ZnO"], [-3.0, -8.0, -4.0])

    found: list[float] = []
    return Case(
        use,
        [name],
        check=lambda: "" if np.isfinite(found).all() and np.abs(found).max() < 1e4 else f"energies of {found}",
    )


def _run(rng: random.Random, seeds: Seeds) -> Case:
    """A file of a run folder, for the commands that go on with it or report of it."""
    shutil.copytree(seeds.run, "run-finetune-x")
    name = rng.choice(
        ("checkpoint.pt", "checkpoint.pt", "config.toml", "metrics.csv", "run.json", "rollouts.h5", "model.safetensors")
    )
    path = Path("run-finetune-x") / name
    if name.endswith(".h5"):
        _damage(rng, path)
    elif name.endswith((".toml", ".csv", ".json")):
        path.write_bytes(garbled(rng, path.read_text()).encode("utf-8", "surrogateescape"))
    else:
        path.write_bytes(damaged(rng, path.read_bytes()))
    names = [name, "run-finetune-x"]
    if rng.random() < 0.5:
        Path("run-finetune-x/finished").unlink()
        return Case(
            ["finetune", "--resume", "run-finetune-x", "--steps", "2"], [*names, *_settings()], check=_finite_model
        )

    def use() -> None:
        run = RunFolder.open("run-finetune-x")
        run.load_checkpoint()
        run.metrics()

    return Case(use, names)


def _settings() -> list[str]:
    """A damaged config.toml may be told by the setting alone, for flags win over it."""
    from dataclasses import fields

    from cfrl.config import FinetuneConfig

    return [f.name for f in fields(FinetuneConfig)]


def _finite_model() -> str:
    from safetensors.numpy import load_file

    for name, values in load_file("run-finetune-x/model.safetensors").items():
        if not np.isfinite(values).all() and "space_group_log_prob" not in name:
            return f"{name} of the model is not finite"
    return ""


def _leaks(*paths: str) -> str:
    """Whether bytes of the other file got into a result."""
    return next((f"{path} holds another file's bytes" for path in paths if SECRET in Path(path).read_bytes()), "")


# ---- damage to HDF5 ----------------------------------------------------------------------------------------------


def _damage(rng: random.Random, path: Path) -> None:
    if rng.random() < 0.3:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return
    Path("secret").write_bytes(SECRET * 100)
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in rng.sample(names, rng.choice((1, 1, 2))):
            if name in file:
                rng.choice(_EDITS)(rng, file, name)


def _value(rng: random.Random, file: h5py.File, name: str) -> None:
    """One number out of its range, or all."""
    data = file[name]
    if h5py.check_string_dtype(data.dtype):
        data[rng.randrange(len(data))] = rng.choice(("", "x" * 10_000, "\ud83d".encode("utf-8", "replace"), "nan"))
        return
    values = data[:]
    where = tuple(rng.randrange(size) for size in values.shape) if values.size and rng.random() < 0.8 else ...
    number = rng.choice((*NUMBERS, 9, 119, 200, 231, 28, 90.0, 180.0, 1e5))
    with np.errstate(all="ignore"):
        values[where] = np.array(number, dtype=object).astype(np.float64).astype(values.dtype)
    data[...] = values


def _replaced(change: Callable[[random.Random, np.ndarray], Any]) -> Callable[[random.Random, h5py.File, str], None]:
    def edit(rng: random.Random, file: h5py.File, name: str) -> None:
        values = file[name][:]
        del file[name]
        file[name] = change(rng, values)

    return edit


def _type(rng: random.Random, values: np.ndarray) -> Any:
    kinds = ("f2", "f8", "i8", "u8", "i1", "c16", "S5", "bool", [("a", "i4"), ("b", "f8")], "V8")
    kind = np.dtype(rng.choice(kinds))
    try:
        with np.errstate(all="ignore"):
            return values.astype(kind)
    except (TypeError, ValueError):
        return np.zeros(values.shape, kind)


def _shape(rng: random.Random, values: np.ndarray) -> Any:
    forms = (
        values[:-1],
        values[None],
        values.ravel(),
        values[:0],
        np.concatenate([values, values]),
        values[:1].sum() if values.dtype.kind in "iuf" else "x",
    )
    return rng.choice(forms)


def _link(rng: random.Random, file: h5py.File, name: str) -> None:
    data, place = file[name], f"{name}_elsewhere" if rng.random() < 0.2 else name
    shape, dtype = data.shape, data.dtype
    del file[name]
    match rng.randrange(7):
        case 0:
            file[place] = h5py.ExternalLink("known2.h5", "/split")
        case 1:
            file[place] = h5py.SoftLink(rng.choice(("/split", "/nowhere", f"/{place}", "/")))
        case 2:
            file.create_dataset(place, (200,), "u1", external=[("secret", 0, 2000)])
        case 3:
            layout = h5py.VirtualLayout(shape or (1,), dtype)
            file.create_virtual_dataset(place, layout)
        case 4:  # a bomb: a terabyte of zeros that no byte stands for
            file.create_dataset(
                place, (1 << rng.choice((31, 40)), *shape[1:]), dtype if dtype.kind in "iuf" else "u1", chunks=True
            )
        case 5:
            file.create_group(place)
        case 6:
            file[place] = h5py.Empty("f8")


def _attribute(rng: random.Random, file: h5py.File, name: str) -> None:
    known = list(file.attrs) or ["format"]
    key = rng.choice(known)
    if rng.random() < 0.3:
        del file.attrs[key]
    else:
        file.attrs[key] = rng.choice(
            (1, 2, -1, "other", b"\xff\xfe", 1.5, np.zeros(3), h5py.Empty("f4"), float("nan"), rng.choice(WORDS[:30]))
        )


def _gone(rng: random.Random, file: h5py.File, name: str) -> None:
    del file[name]


def _circle(rng: random.Random, file: h5py.File, name: str) -> None:
    group = file.require_group("circle")
    target = rng.choice(("/", "circle")) if rng.random() < 0.7 else name
    group[rng.choice(("again", "properties", f"again{len(group)}"))] = file[target]


def _new(rng: random.Random, file: h5py.File, name: str) -> None:
    """Another column."""
    place = rng.choice(("properties/", "text/", "", "properties/a/b/")) + rng.choice(
        ("new", "é", "ids", ".hidden", "%2F", "x" * 500)
    )
    if place not in file:
        file[place] = rng.choice(
            (
                np.zeros(3),
                np.full(8, np.nan),
                np.full(8, np.inf),
                "word",
                np.zeros((8, 2)),
                [b"\xff\xfe"] * 8,
                np.arange(8),
            )
        )


_EDITS = (*[_value] * 5, _replaced(_type), _replaced(_shape), _link, _link, _attribute, _gone, _circle, _new)

"""The HDF5 schema: what is written is read, foreign and damaged files are refused, a kill loses nothing."""

import random
import re
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest
import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.wyckoff import tables
from cfrl.errors import UserError
from cfrl.io import storage


def random_crystals(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> CrystalBatch:
    """Numbers in the right places: storage knows no crystallography beyond which letters a group has."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 21, n)
    mask = np.arange(20) < counts[:, None]
    groups = rng.integers(1, 231, n)
    return CrystalBatch(
        space_group=torch.tensor(groups),
        wyckoff=torch.tensor(rng.integers(1, tables().num_letters.numpy()[groups, None] + 1, (n, 20)) * mask),
        species=torch.tensor(rng.integers(1, 119, (n, 20)) * mask),
        frac_coords=torch.tensor(rng.random((n, 20, 3)) * mask[..., None], dtype=dtype),
        lattice=torch.tensor(rng.uniform(3, 120, (n, 6)), dtype=dtype),
        ids=[f"mp-{i}-α" for i in range(n)],
        properties={
            "band_gap": torch.tensor(np.where(rng.random(n) < 0.3, np.nan, rng.random(n))),
            "reward/ehull": torch.tensor(rng.normal(size=n)),
        },
    )


def assert_same(a: CrystalBatch, b: CrystalBatch) -> None:
    a, b = a.trim(), b.trim()
    for name in ("space_group", "wyckoff", "species", "frac_coords", "lattice"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name
    assert a.ids == b.ids
    assert a.properties.keys() == b.properties.keys()
    for name, values in a.properties.items():
        assert torch.equal(values.nan_to_num(-9), b.properties[name].nan_to_num(-9)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path, dtype):
    crystals = random_crystals(300, dtype=dtype)
    split = np.arange(300) % 3
    status = ["" if i % 2 else "kein Ergebnis: Ångström" for i in range(300)]
    columns = {"status": status, "step": np.arange(300)}
    storage.write_crystals(tmp_path / "a.h5", crystals, columns=columns, split=split, attrs={"seed": 7})
    read = storage.read_crystals(tmp_path / "a.h5")
    assert read.properties.pop("step").tolist() == list(range(300))
    assert_same(read, crystals)
    columns = storage.read_columns(tmp_path / "a.h5", ["status", "split"])
    assert columns["status"].tolist() == status
    assert columns["split"].tolist() == split.tolist()
    about = storage.describe(tmp_path / "a.h5")
    assert about["splits"] == {"train": 100, "validation": 100, "test": 100}
    assert about["attrs"]["seed"] == 7
    assert about["attrs"]["schema_version"] == storage.SCHEMA_VERSION


def test_no_crystals(tmp_path):
    storage.write_crystals(tmp_path / "a.h5", CrystalBatch.empty())
    assert len(storage.read_crystals(tmp_path / "a.h5")) == 0
    storage.append_crystals(tmp_path / "a.h5", random_crystals(5))
    assert len(storage.read_crystals(tmp_path / "a.h5")) == 5


def test_ragged_against_a_loop():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 6, 50)
    padded = storage.to_padded(flat := rng.random((counts.sum(), 3)), counts)
    start = 0
    for row, count in zip(padded, counts, strict=True):
        assert np.array_equal(row[:count], flat[start : start + count])
        assert not row[count:].any()
        start += count
    assert np.array_equal(storage.to_flat(padded, counts), flat)


def test_parts_of_a_file(tmp_path):
    crystals, split = random_crystals(500), np.random.default_rng(1).integers(0, 3, 500)
    storage.write_crystals(tmp_path / "a.h5", crystals, split=split)
    assert_same(CrystalBatch.cat(storage.iter_crystals(tmp_path / "a.h5", chunk=64)), crystals)
    assert_same(storage.read_crystals(tmp_path / "a.h5", start=100, stop=130), crystals[100:130])
    assert_same(storage.read_crystals(tmp_path / "a.h5", "test"), crystals[split == 2])
    assert_same(storage.read_crystals(tmp_path / "a.h5", "train", 50, 300), crystals[50:300][split[50:300] == 0])
    pieces = CrystalBatch.cat(storage.iter_crystals(tmp_path / "a.h5", chunk=7, split="validation"))
    assert_same(pieces, crystals[split == 1])
    with pytest.raises(UserError, match="split 'valid' is none of train"):
        storage.read_crystals(tmp_path / "a.h5", "valid")


def test_append_is_writing_at_once(tmp_path):
    crystals = random_crystals(200)
    for start in range(0, 200, 30):
        part = crystals[start : start + 30]
        storage.append_crystals(tmp_path / "a.h5", part, columns={"status": part.ids}, split=[1] * len(part))
    assert_same(storage.read_crystals(tmp_path / "a.h5"), crystals)
    assert storage.read_columns(tmp_path / "a.h5")["status"].tolist() == crystals.ids
    assert storage.describe(tmp_path / "a.h5")["splits"]["validation"] == 200


def test_columns_that_come_and_go(tmp_path):
    first, second = random_crystals(3), random_crystals(2, seed=1)
    first.properties = {"a": torch.tensor([1.0, 2.0, 3.0])}
    second.properties, second.ids = {"b": torch.tensor([4.0, 5.0])}, None
    storage.write_crystals(tmp_path / "a.h5", first)
    storage.append_crystals(tmp_path / "a.h5", second, columns={"note": ["x", "y"]})
    columns = storage.read_columns(tmp_path / "a.h5")
    assert columns["note"].tolist() == ["", "", "", "x", "y"]
    assert columns["ids"].tolist() == [*first.ids, "", ""]
    np.testing.assert_equal(columns["a"], [1, 2, 3, np.nan, np.nan])
    np.testing.assert_equal(columns["b"], [np.nan, np.nan, np.nan, 4, 5])
    with pytest.raises(UserError, match="no column 'c'; it has a, b, ids, note, split"):
        storage.read_columns(tmp_path / "a.h5", ["c"])


def test_wrong_length(tmp_path):
    with pytest.raises(ValueError, match="x has 2 values for 3 crystals"):
        storage.write_crystals(tmp_path / "a.h5", random_crystals(3), columns={"x": [1, 2]})
    assert list(tmp_path.iterdir()) == []


def test_every_dataset_is_documented(tmp_path):
    storage.write_crystals(tmp_path / "a.h5", random_crystals(3), columns={"status": ["", "", ""]})
    names = []
    with h5py.File(tmp_path / "a.h5") as file:
        file.visititems(lambda name, item: names.append((name, item)) if isinstance(item, h5py.Dataset) else None)
        assert all(item.chunks and item.compression == "gzip" and item.maxshape[0] is None for _, item in names)
        for attribute in file.attrs:
            assert f"`{attribute}`" in storage.__doc__
        for name, _ in names:
            assert re.sub("/.*", "/NAME", name) + " " in storage.__doc__


def test_truncated_anywhere(tmp_path):
    storage.write_crystals(tmp_path / "a.h5", random_crystals(200))
    whole = (tmp_path / "a.h5").read_bytes()
    for size in {0, 1, 7, 8, 100, *random.Random(0).sample(range(len(whole)), 30), len(whole) - 1}:
        (tmp_path / "b.h5").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"b\.h5: is (damaged|not an HDF5 file)"):
            storage.read_crystals(tmp_path / "b.h5")


def test_files_that_are_not_ours(tmp_path):
    (tmp_path / "text.h5").write_text("crystals")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1, 2]
    storage.write_crystals(tmp_path / "newer.h5", random_crystals(2))
    with h5py.File(tmp_path / "newer.h5", "r+") as file:
        file.attrs["schema_version"] = 99
    storage.write_crystals(tmp_path / "short.h5", random_crystals(2))
    with h5py.File(tmp_path / "short.h5", "r+") as file:
        file["lattice"].resize(1, axis=0)
    storage.write_crystals(tmp_path / "lacking.h5", random_crystals(2))
    with h5py.File(tmp_path / "lacking.h5", "r+") as file:
        del file["wyckoff"]
    expected = {
        "none.h5": "no such file",
        ".": "is a folder",
        "text.h5": "is not an HDF5 file",
        "other.h5": "not a file of crystals",
        "newer.h5": "schema version 99, this cfrl reads 1; update",
        "short.h5": "columns differ in length",
        "lacking.h5": "is damaged",
    }
    for name, message in expected.items():
        for read in (
            storage.read_crystals,
            storage.describe,
            storage.read_columns,
            lambda p: list(storage.iter_crystals(p)),
        ):
            with pytest.raises(UserError, match=message):
                read(tmp_path / name)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        storage.write_crystals(tmp_path / "no" / "a.h5", random_crystals(1))


SCRIPT_HEAD = f"""
import sys
sys.path.insert(0, {str(__file__).rpartition("/")[0]!r})
from test_storage import random_crystals
from cfrl.io import storage
from cfrl.errors import UserError
"""


def test_full_disk(tmp_path):
    """A limit on the file size stands for a full disk: the old file stays, one line says why."""
    storage.write_crystals(tmp_path / "a.h5", random_crystals(50))
    script = SCRIPT_HEAD + textwrap.dedent(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            storage.append_crystals(sys.argv[1], random_crystals(20_000))
        except UserError as error:
            print(error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a.h5"], capture_output=True, text=True)
    assert "a.h5: cannot be written" in done.stdout, done.stderr
    assert len(storage.read_crystals(tmp_path / "a.h5")) == 50
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_kill_while_appending(tmp_path):
    """kill -9 at random moments: every row that was reported as written is there, and the file opens."""
    path = tmp_path / "a.h5"
    script = SCRIPT_HEAD + textwrap.dedent(
        """
        step = int(sys.argv[2])
        while True:
            storage.append_crystals(sys.argv[1], random_crystals(40, seed=step), columns={"step": [step] * 40})
            print(step, flush=True)
            step += 1
        """
    )
    rng, step = random.Random(0), 0
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", script, path, str(step)], stdout=subprocess.PIPE, text=True)
        reported = int(writer.stdout.readline())  # at least one is through
        time.sleep(rng.uniform(0.05, 0.4))
        writer.kill()
        reported = max([reported, *map(int, re.findall(r"(\d+)\n", writer.stdout.read()))])
        writer.wait()
        steps = storage.read_columns(path, ["step"])["step"]
        complete = len(steps) // 40
        assert steps.tolist() == [step for step in range(complete) for _ in range(40)]
        assert complete - 1 in (reported, reported + 1)  # the last one may have come through unreported
        step = complete
    assert_same(storage.read_crystals(path, stop=40), with_step(0))
    storage.append_crystals(path, random_crystals(1))
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]  # what killed writers left behind is gone


def with_step(step: int) -> CrystalBatch:
    crystals = random_crystals(40, seed=step)
    crystals.properties["step"] = torch.full((40,), float(step), dtype=torch.float64)
    return crystals

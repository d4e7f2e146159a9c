"""What is written: names checked before the work; full disks, closed pipes, forbidden folders, Ctrl-C at any moment."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cfrl import files
from cfrl.cli import main
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.io.export import export_crystals
from cfrl.io.storage import append_crystals, write_crystals
from cfrl.model.files import save_model
from cfrl.model.transformer import CrystalTransformer
from cfrl.runs.folder import RunFolder
from tests.tiny import SIZES, base_model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["cfrl", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("cfrl: error: ")


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("sample --model missing -o x.xyz", "write to .h5, .csv, .extxyz, .json, .cif, .vasp (one crystal), .zip"),
        ("sample --model missing -o missing/x.csv", "missing is not a folder; make it first"),
        ("sample --model missing -o full", "full: exists and is not an empty folder"),
        ("data import a.cif -o x.csv", "let its name end in .h5"),
        ("data hull missing.h5 -o x.json", "let its name end in .h5"),
        ("data grow --model missing -o x.json", "let its name end in .h5"),
        ("rewards train a.csv -o x.pt", "let its name end in .safetensors"),
        ("model pack missing -o x.pt", "let its name end in .safetensors"),
        ("model import missing.pkl -o x.h5", "let its name end in .safetensors"),
        ("screen a.cif -o x.vasp", "the table is copied to a .csv or .h5"),
        ("screen a.cif -o missing/x.csv", "missing is not a folder; make it first"),
    ],
)
def test_names_are_checked_before_anything_else(folder, monkeypatch, capsys, command, wanted):
    """Even where the input is at fault too, or the model: nothing has been read yet."""
    (folder / "full").mkdir()
    (folder / "full" / "mine").touch()
    before = sorted(folder.rglob("*"))
    assert wanted in complaint(monkeypatch, capsys, *command.split())
    assert sorted(folder.rglob("*")) == before


def test_sampling_that_cannot_begin_leaves_no_run(folder, monkeypatch, capsys):
    model = str(base_model(folder / "m.safetensors"))
    for words in (["--elements", "Xx"], ["--space-group", "231"], ["--space-group", "225", "--max-atoms", "1"]):
        complaint(monkeypatch, capsys, "sample", "-n", "2", "--model", model, *words)
        assert [path.name for path in folder.iterdir()] == ["m.safetensors"]


# ---- disks and folders -------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within the block the system refuses to let a file grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_text(path: Path) -> None:
    with files.atomic_file(path) as temp:
        temp.write_text("x" * 10_000)


WRITERS = {
    "a.txt": write_text,
    "checkpoint.pt": lambda path: RunFolder(path.parent).save_checkpoint({"x": torch.randn(10_000)}),
    "a.safetensors": lambda path: save_model(CrystalTransformer(SIZES), path),
    "a.csv": lambda path: export_crystals(load_dataset("prototypes"), path),
    "a.extxyz": lambda path: export_crystals(load_dataset("prototypes"), path),
    "a.zip": lambda path: export_crystals(load_dataset("prototypes"), path),
    "a.h5": lambda path: write_crystals(path, load_dataset("prototypes")),
    "b.h5": lambda path: append_crystals(path, load_dataset("prototypes")),
}


@pytest.mark.parametrize(("name", "write"), WRITERS.items())
def test_a_full_disk_is_told_and_the_old_file_stays(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    old = path.read_bytes()
    with pytest.raises(UserError) as caught, largest_file(len(old) // 2):
        write(path)
    assert str(caught.value).startswith(f"{path}: cannot be written: File too large; raise the limit")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_half_folder(tmp_path):
    with pytest.raises(UserError, match=r"cifs: cannot be written: File too large"), largest_file(100):
        export_crystals(load_dataset("prototypes")[:3], tmp_path / "cifs")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_stdout(folder):
    with open("/dev/full", "w") as full:
        done = cfrl("rewards", stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device; make room" in done.stderr


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_a_folder_of_somebody_else(mode):
    """The reason is the folder's, whether it can be looked into or not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_text("old")
        os.chmod(folder, mode)
        if os.geteuid() == 0:  # root may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(UserError) as caught:
                write_text(path)
        finally:
            os.seteuid(os.getuid())
            os.chmod(folder, 0o700)
        assert str(caught.value) == f"{path}: cannot be written: Permission denied; write to a folder of yours"
        assert os.listdir(folder) == ["a.txt"]
        assert path.read_text() == "old"


def test_trouble_with_another_file_is_not_blamed_on_the_output(tmp_path):
    with pytest.raises(FileNotFoundError, match="input"), files.atomic_file(tmp_path / "output"):
        (tmp_path / "input").read_text()
    assert list(tmp_path.iterdir()) == []


# ---- pipes and Ctrl-C --------------------------------------------------------------------------------------------


def cfrl(*words: str, **options: Any) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-m", "cfrl", *words], text=True, timeout=120, **options)


def test_a_reader_that_leaves_loses_no_file(folder):
    """As in `cfrl sample -o e.csv 2>&1 | true`."""
    model = str(base_model(folder / "m.safetensors"))
    reading, writing = os.pipe()
    os.close(reading)
    done = cfrl("sample", "-n", "3", "--keep-invalid", "--model", model, "-o", "e.csv", stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 0
    assert len((folder / "e.csv").read_text().split("_cell_length_a")) == 4


@pytest.mark.parametrize(
    "module",
    ["raise_it()", "try:\n    raise_it()\nexcept BaseException:\n    pass\nimport typer_is_broken"],
    ids=["plain", "swallowed"],
)
def test_ctrl_c_while_modules_load(folder, module):
    """Also where the module that is being loaded catches everything."""
    begin = "import os, signal, time\ndef raise_it():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    (folder / "typer.py").write_text(begin + module)  # stands before the real one
    path = os.pathsep.join([str(folder), *sys.path])
    done = cfrl("sample", env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_a_reward_loads(folder):
    """A reward's module interrupts its own import."""
    (folder / "late.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = cfrl("finetune", "--reward", "late.py:f", "--model", str(base_model(folder / "m.safetensors")))
    assert (done.returncode, done.stderr) == (130, "")
    assert not (folder / "runs").exists()

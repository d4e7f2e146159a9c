"""The doctor: what is broken is named, what works is said to work, and nothing heavy is imported for versions."""

import base64
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

import cfrl.commands.doctor as doctor
import cfrl.crystals.wyckoff as wyckoff
from cfrl.errors import UserError
from cfrl.model import files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CFRL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Install a distribution by hand: metadata as pip writes it, and one file with its checksum."""

    def install(*requirements: str, content: bytes = b"as installed") -> Path:
        info = tmp_path / "madeup-1.0.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", "Name: madeup", "Version: 1.0", "Provides-Extra: more"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requirements), ""]))
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        (info / "RECORD").write_text(f"madeup.bin,sha256={digest},{len(content)}\n")
        (tmp_path / "madeup.bin").write_bytes(content)
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path / "madeup.bin"

    return install


def test_a_sound_installation(folder):
    """The whole command, in a process of its own: it names every package and file, and writes to the cache alone."""
    done = subprocess.run(
        [sys.executable, "-m", "cfrl.cli", "doctor"], capture_output=True, text=True, env=_environment(folder)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("All that cfrl needs is here and works.")
    for package in ("cfrl", "torch", "numpy", "pymatgen", "moyopy", "chgnet", "mace-torch"):
        assert f"{package} " in done.stdout
        assert metadata.version(package) in done.stdout
    for path in (*doctor.PACKAGE.glob("assets/*.safetensors"), *doctor.PACKAGE.glob("assets/*.[hcn]*")):
        assert f"assets/{path.name}" in done.stdout, "an asset that the doctor does not look at"
    assert {path.name for path in folder.iterdir()} <= {"cache"}


def _environment(folder: Path) -> dict[str, str]:
    return os.environ | {"COLUMNS": "160", "CFRL_CACHE": str(folder / "cache"), "HOME": str(folder)}


def test_versions_need_no_import():
    script = (
        "import sys\nfrom cfrl.commands.doctor import packages, folders\nlist(packages()), list(folders())\n"
        "heavy = {'torch', 'numpy', 'h5py', 'pymatgen', 'chgnet', 'mace', 'matplotlib', 'scipy', 'ase'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_missing_and_old_packages(distribution):
    distribution(
        "no-such-package-as-this>=2",
        "rich>=1000",
        "typer",
        "another-missing-package; extra == 'more'",
        "on-another-system; sys_platform == 'no-such-system'",
    )
    found = {finding.name: finding for finding in doctor.packages("madeup")}
    assert found.keys() == {"madeup", "no-such-package-as-this", "rich", "typer", "another-missing-package"}
    assert found["no-such-package-as-this"].problem == "missing; pip install 'no-such-package-as-this>=2'"
    assert found["rich"].value == metadata.version("rich")
    assert ">=1000" in found["rich"].note
    assert found["typer"].note == ""
    assert found["another-missing-package"].problem == ""
    assert "pip install 'madeup[more]'" in found["another-missing-package"].note


def test_not_installed():
    (finding,) = doctor.packages("no-such-package-as-this")
    assert "pip install" in finding.problem


def _truncate(path: Path, into: Path) -> Path:
    copy = into / path.name
    copy.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return copy


@pytest.mark.parametrize(
    ("name", "module", "constant"),
    [("default.safetensors", "model.files", "EMBEDDED"), ("hull.h5", "stability.hull", "DEFAULT_HULL")],
)
def test_half_a_file_is_named(folder, monkeypatch, name, module, constant):
    """And the others are still looked at."""
    half = _truncate(doctor.PACKAGE / "assets" / name, folder)
    if constant == "EMBEDDED":
        monkeypatch.setitem(files.EMBEDDED, "default", half)
    else:
        monkeypatch.setattr(f"cfrl.{module}.{constant}", half)
    found = {finding.name: finding for finding in doctor.models()}
    assert [key for key, finding in found.items() if finding.problem] == [f"assets/{name}"]
    assert name in found[f"assets/{name}"].problem
    assert "install cfrl again" in found[f"assets/{name}"].problem
    assert "89 elements" in found["chgnet"].note


def test_missing_predictor_is_named(folder, monkeypatch):
    monkeypatch.setattr("cfrl.rewards.predictors.ASSETS", folder)
    problems = {finding.name for finding in doctor.models() if finding.problem}
    assert problems == {
        f"assets/{name}.safetensors" for name in ("band_gap", "bulk_modulus", "eps_electronic", "eps_total")
    }


def test_damaged_tables_are_named(folder, monkeypatch):
    with zipfile.ZipFile(folder / "wyckoff.npz", "w") as file:
        file.writestr("multiplicity.npy", b"no array")
    monkeypatch.setattr(wyckoff, "TABLES_PATH", folder / "wyckoff.npz")
    caches = (wyckoff._stored, wyckoff.arrays, wyckoff.tables)
    for cache in caches:
        cache.cache_clear()
    try:
        found = {finding.name: finding for finding in doctor.models()}
    finally:
        for cache in caches:
            cache.cache_clear()
    assert found["assets/wyckoff.npz"].problem


def test_changed_file_is_found_by_its_checksum(distribution):
    path = distribution(content=b"weights")
    checksums = doctor._checksums("madeup")
    assert not doctor._altered(path, checksums)
    path.write_bytes(b"weightz")
    assert doctor._altered(path, checksums)
    assert doctor._checksums("no-such-package-as-this") == {}


def test_folders(folder):
    (folder / "cache" / "mp-20").mkdir(parents=True)
    (folder / "cache" / "mp-20" / "train.csv").write_bytes(b"x" * 3_000_000)
    (folder / "cache" / "small.h5").write_bytes(b"x" * 20_000)
    (folder / "runs" / "20260101-000000-sample").mkdir(parents=True)
    (folder / "runs" / "20260101-000000-sample" / "run.json").write_text("{}")
    cache, large, small, runs, settings = doctor.folders()
    assert cache.value == str(folder / "cache")
    assert cache.note.startswith("3.02 MB")
    assert (large.value.strip(), large.note) == ("mp-20", "3.00 MB")
    assert (small.value.strip(), small.note) == ("small.h5", "0.02 MB")
    assert runs.value == str(folder / "runs")
    assert "1 runs" in runs.note
    assert settings.value == "defaults"


def test_folder_that_cannot_be(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("CFRL_CACHE", str(folder / "file" / "cache"))
    (problem,) = [finding for finding in doctor.folders() if finding.problem]
    assert problem.name == "cache"
    assert str(folder / "file") in problem.problem


def test_everything_broken_is_in_one_line(folder, monkeypatch):
    (folder / "cfrl.toml").write_text("[sample]\nm = 3\n")
    monkeypatch.setattr("cfrl.rewards.predictors.ASSETS", folder)
    console = Console(file=(folder / "out").open("w"))
    with pytest.raises(UserError) as caught:
        doctor.doctor(console)
    message = str(caught.value)
    assert "\n" not in message
    assert "settings: cfrl.toml: unknown setting 'm'" in message
    assert "assets/band_gap.safetensors: " in message


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_interrupt(folder):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "cfrl.cli", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(folder),
    )
    process.stdout.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors

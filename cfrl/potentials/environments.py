"""Environments that potentials live in: made, found, removed; one folder each in the cache.

    <cache>/potentials/sevennet/
        environment.json   what is installed, with which Python, and what each model was measured to be
        venv/              the virtual environment, where cfrl made it

What is installed comes from the package index by a pinned name (`families.py`). By default the environment sees the
packages of the one that cfrl runs in, so that torch, which is most of it, is not installed twice: what the pins ask
for otherwise is installed beside it, and comes first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cfrl.errors import UserError, nearest
from cfrl.files import atomic_file, cache_folder
from cfrl.potentials.families import ASE, FAMILIES, split_name
from cfrl.untrusted import fitting, read_json

_WORKER = Path(__file__).with_name("worker.py")
_SHOWN = 300  # characters of pip's complaint
PATIENCE = 120.0  # seconds for a crystal


@dataclass
class Environment:
    """An environment that is there.

    name: of the family, or "ase:package.module:factory".
    python: the interpreter. own: whether cfrl made it, and removes it.
    scale: declared for an ASE calculator, as in `scales.py`; "" for a scale of its own.
    packages: what was installed. patience: seconds for a crystal, after which a worker counts as hung.
    measured: by model, what `cfrl potentials add` found: see `commands/potentials.py`.
    """

    name: str
    python: str
    own: bool = False
    scale: str = ""
    packages: list[str] = field(default_factory=list)
    patience: float = PATIENCE
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    def command(self, model: str, device: str) -> list[str]:
        """Starts its worker. What cfrl made does not look at PYTHONPATH, nor at packages of the home folder."""
        isolated = ["-I"] if self.own else []
        return [self.python, *isolated, str(_WORKER), split_name(self.name)[0], model, device]

    def save(self) -> None:
        """Raises UserError where it cannot be written."""
        path = _folder(self.name) / "environment.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temp:
            temp.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def environment_name(name: str) -> str:
    """Of a potential: "sevennet:7net-0" -> "sevennet"; an ASE calculator has one of its own.

    Raises:
        UserError: no such family, or an ASE calculator that is not named as one.
    """
    family, model = split_name(name)
    if family == ASE:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model):
            raise UserError(f"{name}: an ASE calculator is named like ase:package.module:factory")
        return name
    if family not in FAMILIES:
        known = (*FAMILIES, ASE)
        raise UserError(f"{name}: no potential of this name can be added{nearest(family, known)}: {', '.join(known)}")
    return family


def find(name: str) -> Environment:
    """The environment of a potential.

    Raises:
        UserError: it has not been added, or is damaged.
    """
    environment = look(environment_name(name))
    if environment is None:
        raise UserError(f"{name} needs an environment of its own; once: cfrl potentials add {name}")
    return environment


def look(name: str) -> Environment | None:
    """The environment of this name, if there is one. Raises UserError where it is damaged."""
    path = _folder(name) / "environment.json"
    if not path.exists():
        return None
    with fitting(path):
        return Environment(**read_json(path))


def environments() -> list[Environment]:
    """All that there are, by name."""
    found = []
    for path in sorted(_root().glob("*/environment.json")):
        with fitting(path):
            found.append(Environment(**read_json(path)))
    return found


def make(name: str, share: bool = True) -> Environment:
    """A virtual environment with a family's package.

    Args:
        name: of the family.
        share: let it see the packages of this Python.

    Raises:
        UserError: it cannot be made, or the package index does not have what it takes.
    """
    folder, pins = _folder(name), FAMILIES[name].pip
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        _run([sys.executable, "-m", "venv", str(folder / "venv")], "no virtual environment can be made")
        if share:
            packages = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], "broken")
            paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
            (Path(packages.strip()) / "cfrl-shared.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
        _run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins],
            f"{' '.join(pins)} cannot be installed; is the package index within reach? In an environment that has "
            f"it already: cfrl potentials add {name} --python PATH",
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    environment = Environment(name, str(python), own=True, packages=list(pins))
    environment.save()
    return environment


def remove(name: str) -> None:
    """Delete an environment's folder; a Python that cfrl did not make stays. Raises UserError if there is none."""
    folder = _folder(name)
    if not folder.is_dir():
        there = ", ".join(environment.name for environment in environments()) or "none"
        raise UserError(f"{name}: no such environment; there are: {there}")
    shutil.rmtree(folder)


def _root() -> Path:
    return cache_folder() / "potentials"


def _folder(name: str) -> Path:
    if name in FAMILIES:
        return _root() / name
    return _root() / f"ase-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _run(command: list[str], problem: str) -> str:
    """What a program prints. Raises UserError with its last word where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    except OSError as error:
        raise UserError(f"{problem} ({error.strerror or error})") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.startswith("ERROR")]
        last = (lines or (done.stderr or done.stdout).splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"{problem} ({last.strip()[:_SHOWN]})")
    return done.stdout

"""`cfrl doctor`: what is installed, on which machine, where files go, and whether the embedded models open.

Versions come from the packages' metadata, so that one broken package hides no other; only the checks of the last
table import anything heavy. It changes nothing: a repair is the user's, with the command that is printed.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cfrl import config
from cfrl.errors import UserError
from cfrl.files import cache_folder

PACKAGE = Path(__file__).parents[1]
LISTED = 8  # files of the cache that are named


@dataclass(frozen=True)
class Finding:
    """One line of a table. `problem`: what is broken and how to mend it; "" if nothing is."""

    name: str
    value: str = ""
    note: str = ""
    problem: str = ""


def doctor(console: Any) -> None:
    """Print the tables.

    Raises:
        UserError: something that cfrl needs is missing or broken; every such thing is named.
    """
    problems = []
    for title, look in (("Packages", packages), ("Machine", machine), ("Folders", folders), ("Models", models)):
        with console.status(f"{title} ..."):
            findings = list(look())
        console.print(_table(title, findings), "", highlight=False)
        problems += [f"{finding.name}: {finding.problem}" for finding in findings if finding.problem]
    if problems:
        raise UserError("; ".join(problems))
    console.print("All that cfrl needs is here and works.")


def _table(title: str, findings: list[Finding]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    for column in range(3):
        table.add_column(overflow="fold", no_wrap=column == 0)
    for finding in findings:
        note = f"[red]{escape(finding.problem)}[/]" if finding.problem else escape(finding.note)
        table.add_row(finding.name, escape(finding.value), note)
    return table


# ---- packages ----------------------------------------------------------------------------------------------------


def packages(distribution: str = "cfrl") -> Iterator[Finding]:
    """What `distribution` asks for in its metadata, and what of it there is; nothing is imported."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        yield Finding(distribution, "not installed", problem="runs from a bare folder; in it: pip install .")
        return
    yield Finding(distribution, metadata.version(distribution), str(PACKAGE))
    for extra in ("", *(metadata.metadata(distribution).get_all("Provides-Extra") or [])):
        for requirement in asked:
            if _belongs(requirement, extra):
                yield _package(requirement, f"{distribution}[{extra}]" if extra else "")


def _belongs(requirement: Any, extra: str) -> bool:
    marker = requirement.marker
    if marker is None:
        return not extra
    return marker.evaluate({"extra": extra}) and (not extra or not marker.evaluate({"extra": ""}))


def _package(requirement: Any, extra: str) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if extra:
            return Finding(name, "-", f"optional: pip install '{extra}'")
        return Finding(name, "missing", problem=f"missing; pip install '{name}{wanted}'")
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(name, version, "" if fits else f"not one of those that cfrl was tested with: {wanted}")


# ---- machine and folders -----------------------------------------------------------------------------------------


def machine() -> Iterator[Finding]:
    """Python, processors, memory, GPUs."""
    yield Finding("Python", platform.python_version(), sys.executable)
    yield Finding("system", f"{platform.system()} {platform.release()}", platform.machine())
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processors", f"{threads} threads", _thread_limit())
    with suppress(ValueError, AttributeError, OSError):  # not every system tells
        yield Finding("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB")
    yield from _gpus()


def _thread_limit() -> str:
    limit = os.environ.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={limit} limits torch" if limit else ""


def _gpus() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that torch is linked to
        yield Finding("CUDA", "unknown", problem=f"torch cannot be imported ({error})")
        return
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Finding("CUDA", "no device", built)
        return
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        try:
            free, total = torch.cuda.mem_get_info(number)
        except RuntimeError as error:  # found, but no context can be made: no memory left, or in exclusive use
            yield Finding(f"cuda:{number}", name, problem=f"cannot be used ({error}); --device cpu does without")
            continue
        yield Finding(f"cuda:{number}", name, f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free")


def folders() -> Iterator[Finding]:
    """Where downloads are kept, where runs go, and the settings that hold here."""
    cache, runs = cache_folder(), Path("runs").absolute()
    yield _folder("cache", cache, "$CFRL_CACHE moves it")
    inside = sorted(((_size(path), path.name) for path in cache.glob("*")), reverse=True)
    for size, name in inside[:LISTED]:
        yield Finding("", f"  {name}", _megabytes(size))
    if len(inside) > LISTED:
        yield Finding("", f"  and {len(inside) - LISTED} more")
    yield _folder("runs", runs, f"{sum(1 for _ in runs.glob('*/run.json'))} runs")
    yield _settings()


def _folder(name: str, path: Path, note: str) -> Finding:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(name, str(path), problem=f"{existing} is no folder that you may write to")
    held = f"{_megabytes(_size(path))}; {note}" if path.exists() else "not made yet"
    return Finding(name, str(path), f"{held}; {shutil.disk_usage(existing).free / 1e9:.0f} GB free")


def _settings() -> Finding:
    path = Path(config.USER_FILE)
    if not path.exists():
        return Finding("settings", "defaults", f"no {path} here")
    try:
        for section in config.SECTIONS.values():
            config.resolve(section)
        config.reward_definitions()
    except UserError as error:
        return Finding("settings", str(path), problem=str(error))
    return Finding("settings", str(path.absolute()), "overrides the defaults")


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # removed since it was listed
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


# ---- the models that come with cfrl ------------------------------------------------------------------------------


def models() -> Iterator[Finding]:
    """Every embedded file that computes something is opened as the commands open it."""
    from_wheel = _checksums("cfrl")
    for name, check in _checks().items():
        paths = [PACKAGE / name] if not name.endswith("/") else sorted((PACKAGE / name).glob("*"))
        size = sum(path.stat().st_size for path in paths if path.is_file())
        changed = [path.name for path in paths if path.is_file() and _altered(path, from_wheel)]
        try:
            note, problem = check(), ""
        except Exception as error:  # whatever it is, it is what the user came to hear
            note, problem = "", f"{error or type(error).__name__}; install cfrl again"
        if changed and not problem:
            problem = f"{', '.join(changed)} is not what was installed (checksum); install cfrl again"
        yield Finding(name, _megabytes(size), note, problem)
    yield _potential()


def _checks() -> dict[str, Callable[[], str]]:
    """File (or folder) of the package -> a function that opens it, says what is in it, and fails if it cannot."""
    from cfrl.rewards.predictors import BUILT_IN

    predictors = {f"assets/{name}.safetensors": lambda name=name: _predictor(name) for name in BUILT_IN}
    return {
        "assets/wyckoff.npz": _symmetry_tables,
        "assets/elements.csv": _element_table,
        **{f"assets/{name}.safetensors": partial(_generator, name) for name in config.EMBEDDED},
        "assets/hull.h5": _hull,
        "assets/known.npy": _known,
        "assets/structure_types.npz": _structure_types,
        "assets/grown.h5": _grown,
        **predictors,
        "reports/assets/": _report_parts,
    }


def _symmetry_tables() -> str:
    from cfrl.crystals.wyckoff import tables

    return f"Wyckoff positions of {int((tables().num_letters > 0).sum())} space groups"


def _element_table() -> str:
    from cfrl.crystals.descriptors import element_descriptors

    return f"descriptors of {int(element_descriptors().any(1).sum())} elements"


def _generator(name: str) -> str:
    from cfrl.model.files import load_model

    return f"generator, {sum(p.numel() for p in load_model(name).parameters()):,} parameters"


def _hull() -> str:
    from cfrl.stability.hull import ReferenceHull

    return f"reference hull, {len(ReferenceHull.load()):,} phases"


def _known() -> str:
    from cfrl.crystals.known import KnownFormulas

    return f"{len(KnownFormulas.embedded()):,} formulas that the generator learnt from"


def _structure_types() -> str:
    from cfrl.crystals.structure_types import StructureTypes

    types = StructureTypes.embedded()
    return f"{len(types):,} structure types of {len(types.type_of):,} known crystals"


def _grown() -> str:
    from cfrl.io.catalogue import GROWN
    from cfrl.io.datasets import load_dataset

    return f"{len(load_dataset(GROWN)):,} crystals of the program's own near the hull"


def _predictor(name: str) -> str:
    from cfrl.rewards.predictors import load_predictor

    predictor = load_predictor(name)
    return f"predictor, from features of {predictor.potential}"


def _report_parts() -> str:
    names = [path.name for path in (PACKAGE / "reports" / "assets").glob("*.gz")]
    for name in names:
        gzip.decompress((PACKAGE / "reports" / "assets" / name).read_bytes())
    return f"parts of report.html: {', '.join(sorted(names))}"


def _potential() -> Finding:
    from cfrl.potentials import load_potential

    try:
        potential = load_potential("chgnet", "cpu")
    except Exception as error:  # as above
        return Finding("chgnet", problem=f"{error or type(error).__name__}; pip install --force-reinstall chgnet")
    return Finding("chgnet", potential.name, f"default potential, {len(potential.elements)} elements")


def _checksums(distribution: str) -> dict[Path, str]:
    """SHA-256 of the files that a wheel has installed; none for an editable installation."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return {}
    return {Path(file.locate()).resolve(): file.hash.value for file in files if file.hash}


def _altered(path: Path, checksums: dict[Path, str]) -> bool:
    recorded = checksums.get(path.resolve())
    if recorded is None:
        return False
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != recorded

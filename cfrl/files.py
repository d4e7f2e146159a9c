"""Files that survive a crash, and where a file came from.

Everything that cfrl writes goes to a temporary file beside its destination first and is then renamed over it,
so that a kill, a full disk or Ctrl-C leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from cfrl import __version__
from cfrl.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REMEDIES = {
    errno.ENOSPC: "make room or write elsewhere",
    errno.EDQUOT: "make room or write elsewhere",
    errno.EFBIG: "raise the limit (ulimit -f) or write elsewhere",
    errno.EROFS: "write to a folder of yours",
    errno.EACCES: "write to a folder of yours",
    errno.EPERM: "write to a folder of yours",
    errno.ENOENT: "make its folder first",
    errno.ENOTDIR: "make its folder first",
    errno.ENAMETOOLONG: "choose a shorter name",
}


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Keeps other processes out by a file; the kernel lets go of it when a process ends, however it does.

    Args:
        busy: what is so when another process is there, for the UserError that is raised then.
    """
    from filelock import FileLock, Timeout

    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise UserError(f"{busy}; let it end, or stop it") from None


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends, and vanishes if the block fails.

    Leftovers of killed processes of this machine are removed on the way.

    Raises:
        UserError: the folder is missing or not writable, or the disk is full; the old file is still there.
    """
    path = Path(path)
    host = re.sub(r"\W", "_", socket.gethostname())
    temp = path.with_name(f".{path.name}.{host}-{os.getpid()}.tmp")
    try:
        with suppress(OSError):
            _remove_leftovers(path, host)
        temp.touch()  # fails at once where nothing can be written, before the work is done
        mode = temp.stat().st_mode
        yield temp
        temp.chmod(mode)  # some libraries make files that only their owner can read
        _fsync(temp)
        os.replace(temp, path)
    except Exception as error:
        cause = system_error(error)
        if cause is None or str(cause.filename or temp) != str(temp):  # nothing to do with this file
            raise
        raise UserError(write_problem(path, cause)) from error
    finally:
        with suppress(OSError):
            temp.unlink()


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind that of a library: h5py, safetensors and torch tell it in words or chains."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if told := re.search(r"(?:os error|errno =) (\d+)", str(error)):
            return OSError(int(told[1]), os.strerror(int(told[1])))
        error = error.__cause__ or error.__context__
    return None


def write_problem(path: str | Path, error: OSError) -> str:
    """One line: which file, why it cannot be written, what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return "; ".join(filter(None, [f"{path}: cannot be written: {reason}", _REMEDIES.get(error.errno)]))


def check_writable(path: str | Path, endings: Sequence[str] = ()) -> None:
    """Fail before the work rather than after it.

    Args:
        path: the file that will be written.
        endings: those its name may have; none: any.

    Raises:
        UserError: another ending, or no file can be written at `path`.
    """
    path = Path(path)
    if endings and path.suffix not in endings:
        raise UserError(f"{path}: will not be written as '{path.suffix}'; let its name end in {' or '.join(endings)}")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a file to write to")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        state = "is not writable" if os.path.isdir(path.parent) else "is not a folder; make it first"
        raise UserError(f"{path}: cannot be written: {path.parent} {state}")


def cache_folder() -> Path:
    """Where downloads, prepared datasets and environments are kept: `$CFRL_CACHE`, or the user's cache folder."""
    if os.environ.get("CFRL_CACHE"):
        return Path(os.environ["CFRL_CACHE"])
    import platformdirs

    return platformdirs.user_cache_path("cfrl")


def provenance() -> dict[str, str]:
    """Where a result comes from: `command` line, package `version`, `git_revision` ("" if none), `date` (UTC)."""
    return {
        "command": shlex.join(["cfrl" if i == 0 else word for i, word in enumerate(sys.argv)]),
        "version": __version__,
        "git_revision": _git_revision(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


@functools.cache
def _git_revision() -> str:
    """The commit that the package runs from, where it is a checkout and not an installation."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _remove_leftovers(path: Path, host: str) -> None:
    for temp in path.parent.glob(f".{path.name}.{host}-*.tmp"):
        pid = temp.name.removesuffix(".tmp").rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            temp.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())

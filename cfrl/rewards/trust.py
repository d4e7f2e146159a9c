"""Rewards that are files of code, named by the settings of a run folder: such a folder may come from a stranger."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

from cfrl.errors import UserError
from cfrl.rewards.expression import Expression


def confirm_code(reward: str, source: str | Path, trust: bool) -> None:
    """Ask before code is imported that not the user but `source` names; without a terminal `trust` must be given.

    Raises:
        UserError: the user says no, or there is nobody to ask.
    """
    named = [f"{term.name} ({_origin(term.name)})" for term in Expression(reward).terms if _is_code(term.name)]
    if not named:
        return
    told = f"{source} names a reward that is code: {', '.join(named)}"
    if trust:
        print(told, file=sys.stderr)
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{told}; look into it, then run it with --trust")
    print(f"{told}\nRun it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("the code was not run")


def _is_code(name: str) -> bool:
    return ":" in name and not name.startswith("property:")


def _origin(name: str) -> str:
    """The file that would be imported; nothing is."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return str(Path(place).resolve())
    package = PathFinder.find_spec(place.partition(".")[0], [str(Path.cwd()), *sys.path])
    if package is None:
        return "not found"
    return str(package.origin or next(iter(package.submodule_search_locations), ""))

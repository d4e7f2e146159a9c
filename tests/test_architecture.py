"""The map of the house (CONTRIBUTING.md): who may import whom."""

import ast
import re
from pathlib import Path

import pytest

import cfrl

ROOT = Path(cfrl.__file__).parent
HOUSE = Path(__file__).parents[1]
MAP = (HOUSE / "CONTRIBUTING.md").read_text(encoding="utf-8")
GROUND = set(re.search(r'ground\["(.+?)"\]', MAP)[1].split(", "))
ARROWS = set(re.findall(r"^ +(\w+)(?:\[.*?\])? --> (\w+)", MAP, re.MULTILINE))  # from what is imported to who imports
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
MODULES = [name for name in MODULES if name not in ("__init__.py", "__main__.py")]  # the doors know where all is


def room_of(name: str) -> str:
    """The room of a module's path or dotted name; all of the ground floor is one."""
    room = re.split(r"[/.]", name)[0]
    return "ground" if room in GROUND else room


def below(room: str) -> set[str]:
    """What can be reached against the arrows."""
    return {room}.union(*(below(lower) for lower, upper in ARROWS if upper == room))


def rooms_imported(path: Path) -> set[str]:
    """Rooms that a file imports anywhere, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cfrl":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cfrl."):
            found.add(node.module.removeprefix("cfrl."))
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("cfrl.") for alias in node.names if alias.name.startswith("cfrl.")}
    return {room_of(name) for name in found - {"__version__"}}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_imported_but_along_the_arrows(module):
    assert rooms_imported(ROOT / module) <= below(room_of(module))


def test_the_map_shows_what_there_is():
    assert {room_of(name) for name in MODULES} == {room for arrow in ARROWS for room in arrow}
    imported = {(lower, room_of(name)) for name in MODULES for lower in rooms_imported(ROOT / name)}
    assert imported >= ARROWS, "every arrow is an import"
    assert not [(a, b) for a, b in ARROWS if any(a in below(c) for c, d in ARROWS if d == b and c != a)], "none twice"


BESIDE = sorted(path for room in ("examples", "scripts", "tests/benchmarks") for path in (HOUSE / room).glob("*.py"))


@pytest.mark.parametrize("path", BESIDE, ids=lambda path: path.name)
def test_what_stands_beside_the_package_imports_what_there_is(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cfrl":
            exec(compile(ast.Module([node], []), str(path), "exec"), {})


@pytest.mark.parametrize(
    "module",
    [
        "cli.py",
        "config.py",
        "settings.py",
        "io/options.py",
        "model/options.py",
        "rl/options.py",
        "screening/options.py",
    ],
)
def test_help_needs_nothing_heavy(module):
    tops = [
        node for node in ast.parse((ROOT / module).read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {alias.name for node in tops if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tops if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"torch", "numpy", "pymatgen", "h5py", "pandas", "rich"}

"""The map of the house (CONTRIBUTING.md): who may import whom."""

import ast
from pathlib import Path

import pytest

import cfrl

ROOT = Path(cfrl.__file__).parent
# From the ground up; a room imports from those below it, and from itself.
FLOORS = (
    {"errors", "untrusted", "files", "settings", "assets"},
    {"crystals", "runs"},
    {"io"},
    {"model", "potentials"},
    {"stability"},
    {"rewards"},
    {"rl", "screening"},
    {"reports"},
    {"config"},
    {"commands"},
    {"cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
FRONT = {"__init__.py", "__main__.py"}  # the doors: they know where everything is


def rooms_imported(path: Path) -> set[str]:
    """Rooms, or modules on the ground floor, that a file imports anywhere, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "cfrl":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cfrl."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cfrl.")}
    return found - {"__version__"}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in FRONT])
def test_nothing_is_imported_from_above(module):
    room = module.split("/")[0].removesuffix(".py")
    imported = rooms_imported(ROOT / module)
    allowed = {other for other in FLOOR if FLOOR[other] < FLOOR[room] or other == room or FLOOR[room] == 0}
    allowed |= {"config"} if room == "config" else set()
    if module == "config.py":  # settings of commands, made of the options of the rooms
        allowed |= {"io", "model", "rl", "screening"}
    assert imported <= allowed, f"{module} imports {sorted(imported - allowed)}"


def test_every_room_is_on_the_map():
    assert {name.split("/")[0].removesuffix(".py") for name in MODULES if name not in FRONT} == set(FLOOR)


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

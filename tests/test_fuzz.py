"""Three hundred cases of the fuzzer, the same each time; `python -m tests.fuzz --cases 10000` does more."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# In a process of its own: one that has computed with threads cannot be forked.
PLANTED = """
import os, sys, time
from pathlib import Path

from cfrl.errors import UserError
from tests.fuzz import children
from tests.fuzz.cases import Case

def fails():
    raise ZeroDivisionError

def refuses():
    raise UserError("a file: is nothing")

def endless():
    while True:
        pass

def grows():
    rows = [bytes(1 << 20) + b"x" for _ in range(300)]

ways = {
    "fault": Case(fails, ["x"]),
    "death": Case(os.abort, ["x"]),
    "hang": Case(endless, ["x"]),
    "memory": Case(grows, ["x"]),
    "silent": Case(lambda: None, ["x"], wrong="it is"),
    "doubtful": Case(lambda: None, ["x"], check=lambda: "holds NaN"),
    "unclear": Case(refuses, ["x.cif"]),
    "mistaken": Case(refuses, ["file"], sound=True),
    "refused": Case(refuses, ["file"]),
    "accepted": Case(lambda: None, ["x"]),
}
areas = {name: lambda rng, case=case: case for name, case in ways.items()}
limits = children.Limits(seconds=2, megabytes=100)
for result in children.run(areas, range(len(areas)), 0, Path(sys.argv[1]), 2, limits):
    print(result.area, result.outcome)
"""


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_damaged_inputs_end_in_data_or_in_one_clear_line():
    """No fault, no hang, no growing memory, nothing accepted that an oracle refuses, nothing refused that is sound."""
    assert "| all | 300 |" in run("-m", "tests.fuzz", "--cases", "300", "--seed", "1", "--workers", "2")


def test_the_fuzzer_notices_what_it_looks_for(tmp_path):
    found = dict(line.split() for line in run("-c", PLANTED, str(tmp_path)).splitlines())
    assert found == {
        **{name: name for name in ("fault", "hang", "memory", "silent", "unclear", "mistaken", "refused", "accepted")},
        **{"death": "fault", "doubtful": "silent"},
    }

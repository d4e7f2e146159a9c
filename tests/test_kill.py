"""Twelve kills, fixed by a seed, right before files are replaced or rows logged; `python -m tests.kill` does more."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kill import children, jobs
from tests.kill.jobs import Result

# In a process of its own: one that has computed with threads cannot be forked.
SCRIPT = """
import sys
from tests.kill.__main__ import main
from cfrl.runs.folder import RunFolder

jobs = "import,pretrain,finetune,screen,retrieve"
aim = "rename (checkpoint|config|met|model|ranking|retrieved|rollouts|screen|out)|^log|^fsync .*jsonl"
sound = main(["--kills", "12", "--seed", "38", "--jobs", jobs, "--aim", aim, "--folder", sys.argv[1] + "/sound"])
RunFolder.truncate = lambda run, step: None
broken = main(["--kills", "1", "--jobs", "finetune", "--aim", "rename rollouts", "--folder", sys.argv[1] + "/broken"])
print("exit statuses", sound, broken)
"""


def test_killed_commands_go_on_to_the_same_result(tmp_path):
    """The second table is of a cfrl that forgets to cut off the metrics of steps that come again: one kill shows it."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=900)
    told = ended.stdout + ended.stderr
    assert "exit statuses 0 1" in told, told
    sound, broken = ([line.split() for line in part.splitlines()] for part in told.split("command  ")[1:])
    kills = {row[0]: int(row[1]) for row in sound[1:7]}
    assert kills.pop("all") == 12
    assert min(kills.values()) > 0
    assert len(kills) == 5
    assert ["finetune", *"11001000"] in broken
    assert "rows too many" in told


def test_a_lost_row_or_another_result_is_noticed():
    whole = Result(["a", "b"], {"x": [1.0, 2.0]})
    assert jobs.difference(whole, Result(["a", "b"], {"x": [1.0, 2.0]}), 0.0) == ""
    assert jobs.difference(whole, Result(["a"], {"x": [1.0, 2.0]}), 0.0) == "lost rows: 1, first b"
    assert jobs.difference(whole, Result(["a", "b", "b"], {"x": [1.0, 2.0]}), 0.0).startswith("wrong result: 1 rows")
    assert jobs.difference(whole, Result(["a", "b"], {"x": [1.0, 2.5]}), 0.1) == "wrong result: x differs"


@pytest.mark.parametrize("name", ["crystals.h5", "model.safetensors", "retrieval.json"])
def test_half_a_file_is_noticed(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"half": ')
    assert jobs.broken_file(tmp_path).startswith(f"wrong result: {name} is broken")


def test_a_hang_and_a_worker_that_stays_are_noticed(tmp_path, monkeypatch):
    """`cfrl` replaced by what neither ends nor dies of a kill, and by what leaves a process behind."""
    monkeypatch.setattr(children, "LIMIT", 1)
    monkeypatch.setattr(children, "_GRACE", 0.2)
    monkeypatch.setattr(children, "_live", lambda *_: time.sleep(60))
    assert children.run([], tmp_path / "a").code is None

    def leave(*_):
        os.setsid()
        subprocess.Popen(["sleep", "60"])
        os._exit(0)

    monkeypatch.setattr(children, "_live", leave)
    ended = children.run([], tmp_path / "b")
    assert (ended.code, ended.lingering) == (0, 1)

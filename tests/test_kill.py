"""Twelve kills, fixed by a seed, right before files are replaced or rows logged; `python -m tests.kill` does more."""

import subprocess
import sys
from pathlib import Path

# In a process of its own: one that has computed with threads cannot be forked.
SCRIPT = """
import sys
from tests.kill.__main__ import main
from cfrl.runs import RunFolder

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

"""A dozen kills out of the harness of `tests/kill`, the same each time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kill import children, jobs
from tests.kill.jobs import Result


def test_killed_commands_go_on_to_the_same_result(tmp_path):
    """Each of the five commands, killed before what it writes and at random moments, some of them twice."""
    command = ["-m", "tests.kill", "--kills", "12", "--seed", "1", "--jobs", "import,pretrain,finetune,screen,retrieve"]
    done = subprocess.run(
        [sys.executable, *command, "--folder", tmp_path / "kills"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " recovered " in done.stdout


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

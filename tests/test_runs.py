"""Run folders: unique names, metrics and checkpoints that survive kills, the newest fitting run."""

import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from cfrl import files
from cfrl.config import PretrainConfig, read_run_config
from cfrl.errors import UserError
from cfrl.runs import folder as runs
from cfrl.runs.folder import RunFolder, newest_run

ROOT = Path(__file__).parents[1]


def test_create_and_open(tmp_path):
    config = PretrainConfig(epochs=3, dataset='a "quoted" \\ name', lr=1e-5)
    run = RunFolder.create("pretrain", "band gap/Å", config, root=tmp_path / "runs")
    assert run.path.parent == tmp_path / "runs"
    assert run.path.name.endswith("-pretrain-band_gap_Å")
    assert read_run_config(PretrainConfig, run.path / "config.toml") == config
    assert RunFolder.open(run.path).command == "pretrain"
    assert not run.finished
    run.finish()
    assert RunFolder.open(run.path).finished
    with pytest.raises(UserError, match="is not a run folder"):
        RunFolder.open(tmp_path)


def test_names_are_unique_and_the_newest_is_found(tmp_path):
    made = [RunFolder.create("sample", root=tmp_path) for _ in range(5)]
    assert len({run.path for run in made}) == 5
    assert [run.path for run in made] == sorted(run.path for run in made)
    RunFolder.create("finetune", "ehull", root=tmp_path)
    RunFolder.create("finetune", "another", root=tmp_path)
    assert newest_run("sample", tmp_path).path == made[-1].path
    assert newest_run(("pretrain", "finetune"), tmp_path).path.name.endswith("-finetune-another")
    assert newest_run("retrieve", tmp_path) is None
    assert newest_run("sample", tmp_path / "nowhere") is None
    (made[1].path / "samples.h5").touch()
    assert newest_run("sample", tmp_path, holding="samples.h5").path == made[1].path
    (tmp_path / "notes").mkdir()
    (tmp_path / "20990101-000000-sample").mkdir()  # a folder that no run made has no config.toml
    assert newest_run("sample", tmp_path).path == made[-1].path


@pytest.mark.parametrize("written", range(4))
def test_a_folder_is_a_run_only_once_all_is_there(tmp_path, monkeypatch, written):
    """Killed before the first, second and third file: nothing to go on with, and the same command can start again."""
    replace, moves = os.replace, []

    def killed(temp, path):
        moves.append(path)
        if len(moves) > written:
            Path(temp).with_name(".config.toml.elsewhere-1.tmp").touch()  # a kill does not tidy up
            raise KeyboardInterrupt
        replace(temp, path)

    path = tmp_path / "named"
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt) if written < 3 else nullcontext():
        context.setattr(files.os, "replace", killed)
        RunFolder.create("screen", path=path, source="in.cif")
    if written == 3:
        assert RunFolder.open(path).source == "in.cif"
        with pytest.raises(UserError, match="is not empty"):
            RunFolder.create("screen", path=path, source="in.cif")
    else:
        with pytest.raises(UserError, match="is not a run folder"):
            RunFolder.open(path)
        assert RunFolder.create("screen", path=path, source="in.cif").source == "in.cif"


def test_root_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        RunFolder.create("sample", root=tmp_path / "file")


def test_metrics_grow_columns_and_resume(tmp_path):
    run = RunFolder.create("finetune", root=tmp_path)
    run.log(1, {"reward/mean": 0.5})
    run.log(2, {"reward/mean": 0.25, "kl": float("nan")})
    run.log(3, {"kl": 0.1})
    text = (run.path / "metrics.csv").read_text()
    assert text == "step,reward/mean,kl\n1,0.5,\n2,0.25,nan\n3,,0.1\n"
    resumed = RunFolder.open(run.path)
    resumed.truncate(2)
    resumed.log(3, {"kl": 0.2, "clip_fraction": 0.0})
    metrics = resumed.metrics()
    assert metrics["step"] == [1, 2, 3]
    np.testing.assert_equal(metrics["kl"], [np.nan, np.nan, 0.2])
    np.testing.assert_equal(metrics["clip_fraction"], [np.nan, np.nan, 0.0])
    np.testing.assert_equal(metrics["reward/mean"], [0.5, 0.25, np.nan])


def test_numbers_survive_exactly(tmp_path):
    run = RunFolder.create("pretrain", root=tmp_path)
    values = np.random.default_rng(0).normal(size=20) * 10.0 ** np.arange(-10, 10)
    for step, value in enumerate(values):
        run.log(step, {"loss": torch.tensor(value)})
    assert RunFolder.open(run.path).metrics()["loss"] == values.tolist()


def test_tensorboard_shows_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = RunFolder.create("pretrain", "x", PretrainConfig(), tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"reward/mean": 0.5 * step, "kl": float("nan")})
    run.close()
    events = accumulator.EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_half_a_line_is_forgotten(tmp_path):
    run = RunFolder.create("pretrain", root=tmp_path)
    run.log(1, {"loss": 1.0, "lr": 0.1})
    run.close()
    with (run.path / "metrics.csv").open("a") as file:
        file.write("2,0.12345")
    resumed = RunFolder.open(run.path)
    resumed.log(2, {"loss": 0.5, "lr": 0.1})
    assert resumed.metrics() == {"step": [1, 2], "loss": [1.0, 0.5], "lr": [0.1, 0.1]}


def test_checkpoint_round_trip(tmp_path):
    run = RunFolder.create("pretrain", root=tmp_path)
    assert run.load_checkpoint() is None
    state = {"weights": {"w": torch.randn(3, 4)}, "rng": torch.get_rng_state(), "step": 7, "best": None, "seen": [1, 2]}
    run.save_checkpoint(state)
    loaded = run.load_checkpoint()
    assert torch.equal(loaded["weights"]["w"], state["weights"]["w"])
    assert torch.equal(loaded["rng"], state["rng"])
    assert (loaded["step"], loaded["best"], loaded["seen"]) == (7, None, [1, 2])


class Harmful:
    """A pickle that would run code."""

    def __reduce__(self):
        return eval, ("1 + 1",)


def test_checkpoint_never_runs_code(tmp_path):
    run = RunFolder.create("pretrain", root=tmp_path)
    torch.save({"x": Harmful()}, run.path / "checkpoint.pt")
    with pytest.raises(UserError, match=r"checkpoint\.pt: is not a checkpoint"):
        run.load_checkpoint()
    for content in (b"", b"not a checkpoint"):
        (run.path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"checkpoint\.pt: is not a checkpoint"):
            run.load_checkpoint()


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_badly():
        with files.atomic_file(path) as temp:
            temp.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_badly()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_provenance():
    about = runs.provenance()
    assert about.keys() == {"command", "version", "git_revision", "date"}
    assert about["command"].startswith("cfrl")


SCRIPT = """
import sys
import torch
from cfrl.runs.folder import RunFolder
run = RunFolder.open(sys.argv[1])
state = run.load_checkpoint()
step = state["step"] if state else 0
run.truncate(step)
while True:
    step += 1
    run.log(step, {"loss": 1 / step, f"late/{step // 100}": step})
    if step % 10 == 0:
        run.save_checkpoint({"step": step, "blob": torch.zeros(100_000)})
    print(step, flush=True)
"""


def test_kill_and_resume(tmp_path):
    """kill -9 at random moments: no logged row is lost or doubled after resuming, checkpoints always load."""
    run = RunFolder.create("finetune", root=tmp_path)
    rng = random.Random(1)
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, run.path], stdout=subprocess.PIPE, text=True)
        child.stdout.readline()
        time.sleep(rng.uniform(0.05, 0.5))
        child.kill()
        reported = [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        child.wait()
        steps = run.metrics()["step"]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= max(reported, default=0)
        state = run.load_checkpoint()
        assert (state["step"] if state else 0) <= len(steps)


HOLDER = """
import sys, time
from pathlib import Path
from cfrl.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_and_a_killed_one_does_not_block(tmp_path):
    run = RunFolder.create("finetune", root=tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    other = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is at work"), run.locked():
            pass
    finally:
        other.kill()
        other.wait()
    with run.locked():
        pass
    with run.locked():  # and it was let go
        pass

"""Rewards, formulas, predictors and datasets at fault, on the command line: one clear line each, and nothing lost."""

import csv
import os
import pty
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import cfrl
from cfrl.cli import main
from cfrl.errors import UserError
from cfrl.io.storage import read_columns, write_crystals
from cfrl.rewards import registry
from cfrl.rewards.predictors import load_predictor
from cfrl.rewards.trust import confirm_code
from cfrl.rl.rollouts import INVALID
from cfrl.runs import interrupt
from cfrl.runs.folder import RunFolder
from tests.tiny import trained_model

MINE = """
import numpy as np

import os, signal, sys, time
from pathlib import Path

calls = []
Path("imported").touch()

def leaves(crystals, structures):
    sys.exit(0)

def interrupts(crystals, structures):
    raise KeyboardInterrupt

def hidden(crystals, structures):
    return np.ma.masked_array(np.arange(len(structures)), mask=np.arange(len(structures)) % 2)

def hangs(crystals, structures):
    calls.append(1)
    if len(calls) > 3:
        if len(calls) == 4 and Path("interrupt").exists():
            os.kill(os.getpid(), signal.SIGINT)
        while not Path("end").exists():
            time.sleep(0.01)
    return [len(s) for s in structures]

def raises(crystals, structures):
    raise ZeroDivisionError("no pressure")

def wide(crystals, structures):
    return np.zeros((len(structures), 2))

def words(crystals, structures):
    return ["good"] * len(structures)

def nothing(crystals, structures):
    return np.full(len(structures), np.nan)

def endless(crystals, structures):
    return np.full(len(structures), np.inf)

def late(crystals, structures):
    calls.append(1)
    return [len(s) for s in structures] if len(calls) < 4 else "broken"
"""
MENDED = """
def late(crystals, structures):
    return [len(s) for s in structures]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(trained_model(tmp_path_factory.mktemp("model") / "tiny.safetensors"))


@pytest.fixture
def cfrl_command(model, tmp_path, monkeypatch, capsys):
    """Runs `cfrl ...` in an empty folder: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    shutil.copy(model, "tiny.safetensors")
    Path("mine.py").write_text(MINE)

    def run(*words: str) -> tuple[int, str, str]:
        registry._import.cache_clear()
        monkeypatch.setattr(sys, "argv", ["cfrl", *words])
        with pytest.raises(SystemExit) as end:
            main()
        return (end.value.code or 0, *capsys.readouterr())

    return run


def finetune(run, *words: str) -> tuple[int, str, str]:
    quick = "--model tiny.safetensors --steps 4 -n 8 --draw-size 8 --min-distance 0 --space-group 221,225"
    quick += " --evaluate 0 --no-plots --max-atoms 8 --device cpu --elements Na,Cl,Mg,O --max-step-kl 0"
    quick += " --scale-crystals 8 --allow all"  # a reward may be asked of all that is drawn
    return run("finetune", *words, *quick.split())


def complaint(result: tuple[int, str, str]) -> str:
    """The one line of a command that failed as it should."""
    status, _, errors = result
    assert status == 2
    assert errors.startswith("cfrl: error: ")
    assert len(errors.splitlines()) == 1
    return errors


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("ehul", "unknown reward 'ehul'; did you mean 'ehull'"),
        ("density - 2*ehul", "did you mean 'ehull'"),
        ("__import__('os').system('touch gone')", "is not allowed"),
        ("density + open('gone', 'w')", "'open(...)' cannot be called"),
        ("property:missing.safetensors", "no predictor file missing.safetensors"),
        ("property:mine.py", "mine.py: not a predictor"),
        ("mine.py:rises", "mine.py has no function 'rises'; did you mean 'raises'"),
    ],
)
def test_rewards_that_cannot_be_built_leave_no_run(cfrl_command, reward, message):
    assert message in complaint(finetune(cfrl_command, "--reward", reward))
    assert not Path("gone").exists()
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"fails on every crystal: ZeroDivisionError: no pressure \(mine.py, line \d+\) \(in step 1"),
        ("wide", r"returned shape \(\d, 2\) instead of \(\d,\), one per crystal \(in step 1"),
        ("words", r"instead of numbers \(NaN marks what cannot be scored\) \(in step 1"),
    ],
)
def test_reward_files_at_fault(cfrl_command, name, message):
    assert re.search(message, complaint(finetune(cfrl_command, "--reward", f"mine.py:{name}")))


@pytest.mark.parametrize(("name", "reason"), [("nothing", "not a number"), ("endless", "infinite")])
def test_nan_and_infinity_are_told_and_never_learned_from(cfrl_command, name, reason):
    status, output, _ = finetune(cfrl_command, "--reward", f"mine.py:{name}")
    assert status == 0
    assert re.search(rf"Step 1: nothing to learn from.*\(\d times: mine.py:{name}: {reason}\)", output)
    (folder,) = Path("runs").iterdir()
    columns = read_columns(folder / "rollouts.h5")
    assert set(columns["status"]) <= {f"mine.py:{name}: {reason}", INVALID}
    assert (columns["reward"] == 0).all()
    assert all(torch.isfinite(weights).all() for weights in cfrl.load_model(folder).parameters())


def test_a_reward_that_breaks_on_the_way_loses_no_step(cfrl_command):
    assert "(in step 3; runs/" in complaint(finetune(cfrl_command, "--reward", "mine.py:late"))
    (folder,) = Path("runs").iterdir()
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2}
    Path("mine.py").write_text(MENDED)
    assert cfrl_command("finetune", "--resume", "last", "--trust")[0] == 0
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2, 3, 4}
    assert RunFolder.open(folder).finished


@pytest.mark.parametrize("name", ["leaves", "interrupts"])
def test_a_reward_cannot_end_the_program(cfrl_command, name):
    """Not even with status 0."""
    line = complaint(finetune(cfrl_command, "--reward", f"mine.py:{name}"))
    assert re.search(rf"reward 'mine.py:{name}' ended the program \(\w+: 0?.*\(mine.py, line \d+\)\); it should", line)


def test_a_module_cannot_end_the_program(cfrl_command):
    Path("script.py").write_text("import sys\nsys.exit(0)\n")
    line = complaint(finetune(cfrl_command, "--reward", "script.py:f"))
    assert "script.py cannot be imported: SystemExit: 0" in line
    assert not Path("runs").exists()


def test_masked_values_are_no_scores(cfrl_command):
    assert finetune(cfrl_command, "--reward", "mine.py:hidden")[0] == 0
    (folder,) = Path("runs").iterdir()
    columns = read_columns(folder / "rollouts.h5")
    masked = np.array([reason == "mine.py:hidden: not a number" for reason in columns["status"]])
    assert masked.any()
    assert np.array_equal(masked, np.isnan(columns["mine.py:hidden"]))
    assert (columns["mine.py:hidden"][~masked] % 2 == 0).all()


def test_a_reward_that_hangs_is_given_up(cfrl_command):
    """In the third step."""
    line = complaint(finetune(cfrl_command, "--reward", "mine.py:hangs", "--reward-timeout", "2"))
    Path("end").touch()
    assert "reward 'mine.py:hangs' took longer than 2 s for" in line
    assert "more time: --reward-timeout SECONDS (0: for ever) (in step 3; runs/" in line
    (folder,) = Path("runs").iterdir()
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2}
    assert RunFolder.open(folder).load_checkpoint()["step"] == 2
    assert cfrl_command("finetune", "--resume", "last", "--trust")[0] == 0
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2, 3, 4}


def test_one_ctrl_c_ends_a_run_whose_reward_hangs(cfrl_command, monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE", 0.5)
    Path("interrupt").touch()
    status, output, _ = finetune(cfrl_command, "--reward", "mine.py:hangs", "--reward-timeout", "0")
    Path("end").touch()
    assert status == 130
    assert "Step 3 is lost: reward 'mine.py:hangs' did not end and was given up." in output
    assert "Stopped after step 2. Go on with: cfrl finetune --resume runs/" in output
    (folder,) = Path("runs").iterdir()
    assert RunFolder.open(folder).load_checkpoint()["step"] == 2
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2}


def test_a_process_ends_though_its_reward_does_not(model, tmp_path):
    (tmp_path / "mine.py").write_text("def hangs(crystals, structures):\n    while True: pass\n")
    command = f"-m cfrl finetune --reward mine.py:hangs --reward-timeout 1 --model {model} -n 4 --min-distance 0"
    command += " --scale-crystals 4"
    done = subprocess.run(
        [sys.executable, *command.split(), "--no-plots"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert "took longer than 1 s" in done.stderr


# ---- code that a run folder names --------------------------------------------------------------------------------


@pytest.fixture
def strange_run(cfrl_command) -> Path:
    """A run of somebody else, whose reward is a file beside it."""
    assert finetune(cfrl_command, "--reward", "density")[0] == 0
    (folder,) = Path("runs").iterdir()
    settings = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(settings.replace('reward = "density"', "reward = \"density + 'mine.py:late'\""))
    return folder


@pytest.mark.parametrize("command", ["finetune --resume last", "retrieve --dataset prototypes --samples 0"])
def test_code_that_a_run_names_is_not_run_unasked(cfrl_command, strange_run, command):
    line = complaint(cfrl_command(*command.split()))
    told = f"names a reward that is code: mine.py:late ({Path('mine.py').resolve()})"
    assert told in line
    assert line.endswith("look into it, then run it with --trust\n")
    assert not Path("imported").exists()
    assert len(list(Path("runs").iterdir())) == 1
    Path("mine.py").write_text(MINE.replace("< 3", "< 300"))
    status, _, errors = cfrl_command(*command.split(), "--trust")
    assert (status, told in errors, Path("imported").exists()) == (0, True, True)


def test_a_reward_that_the_user_names_is_run(cfrl_command, strange_run):
    Path("mine.py").write_text(MENDED)
    assert cfrl_command("finetune", "--resume", "last", "--steps", "5", "--reward", "mine.py:late")[0] == 0


def test_figures_of_a_strange_run_need_no_code(cfrl_command, strange_run):
    assert cfrl_command("report", str(strange_run))[0] == 0
    assert cfrl_command("sample", "-n", "2", "--keep-invalid", "--model", str(strange_run), "-o", "a.csv")[0] == 0
    assert cfrl_command("retrieve", "--dataset", "prototypes", "--samples", "0", "--reward-crystals", "0")[0] == 0
    assert not Path("imported").exists()


@pytest.mark.parametrize(("answer", "trusted"), [("y", True), ("yes", True), ("", False), ("n", False), ("yep", False)])
def test_a_user_at_a_terminal_is_asked(cfrl_command, monkeypatch, answer, trusted):
    keyboard, terminal = pty.openpty()
    os.write(keyboard, f"{answer}\n".encode())
    with os.fdopen(os.dup(terminal)) as stdin, os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stderr", stderr)
        with nullcontext() if trusted else pytest.raises(UserError, match="the code was not run"):
            confirm_code("density - 'mine:late'", "runs/x/config.toml", trust=False)
    asked = ""
    while "[y/N]" not in asked:  # the answer's echo comes in a part of its own
        asked += os.read(keyboard, 4096).decode()
    os.close(keyboard)
    assert f"mine:late ({Path('mine.py').resolve()})" in asked
    assert not Path("imported").exists()


@pytest.mark.parametrize("reward", ["ehull", "density - 2*'property:missing.safetensors'", "only(band_gap, hhi < 3)"])
def test_what_is_no_code_needs_no_trust(reward):
    confirm_code(reward, "config.toml", trust=False)


def test_a_predictor_trained_on_other_features(cfrl_command):
    predictor = load_predictor("band_gap")
    predictor.header["composition"] = "elements-of-another-version"
    predictor.save("old.safetensors")
    line = complaint(finetune(cfrl_command, "--reward", "property:old.safetensors"))
    assert "the predictor of 'band_gap' was trained on other features" in line
    assert "train it again: `cfrl rewards train`" in line


def test_datasets_without_the_wanted_column(cfrl_command):
    crystals = cfrl.load_dataset("prototypes")[:3]
    with open("few.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["cif", "density"])
        writer.writerows([s.to(fmt="cif"), float(s.density)] for s in crystals.to_structures())
    train = ("rewards", "train", "few.csv", "-o", "p.safetensors")
    assert "few.csv: no column 'densty'; did you mean 'density'" in complaint(
        cfrl_command(*train, "--target", "densty")
    )
    assert not Path("p.safetensors").exists()
    write_crystals("plain.h5", crystals, columns={"energy": np.zeros(3)})
    line = complaint(finetune(cfrl_command, "--algorithm", "dpo", "--rollouts", "plain.h5"))
    assert "plain.h5: has no column 'reward'; it has energy" in line
    assert not Path("runs").exists()


def test_another_commands_run_is_not_resumed(cfrl_command):
    """It would be started as a run with default settings in that folder, and what lies there be overwritten."""
    folder = Path("runs/screened")
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("[screen]\nrelax = false\n")
    line = complaint(cfrl_command("finetune", "--resume", str(folder)))
    assert "config.toml: not the settings of a finetune run" in line
    assert (folder / "config.toml").read_text() == "[screen]\nrelax = false\n"

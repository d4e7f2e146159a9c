"""Rewards, formulas, predictors and datasets at fault, on the command line: one clear line each, and nothing lost."""

import csv
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import cfrl
from cfrl.cli import main
from cfrl.properties import load_predictor
from cfrl.rewards import registry
from cfrl.rollouts import INVALID
from cfrl.runs import RunFolder
from cfrl.storage import read_columns, write_crystals
from tests.tiny import trained_model

MINE = """
import numpy as np

calls = []

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
    return [len(s) for s in structures] if len(calls) < 3 else "broken"
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
    quick = "--model tiny.safetensors --steps 4 --batch-size 8 --sample-batch 8 --min-distance 0 --space-group 221,225"
    quick += " --evaluate 0 --no-plots --max-atoms 8 --device cpu --elements Na,Cl,Mg,O --max-step-kl 0"
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
        ("raises", r"fails on every crystal: ZeroDivisionError: no pressure \(mine.py, line 7\) \(in step 1"),
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
    assert cfrl_command("finetune", "--resume", "last")[0] == 0
    assert set(read_columns(folder / "rollouts.h5")["step"]) == {1, 2, 3, 4}
    assert RunFolder.open(folder).finished


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
